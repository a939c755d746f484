"""`python -m transformer_problems`, for where its command is not on the path."""

from transformer_problems.cli import main

if __name__ == "__main__":
    main()
