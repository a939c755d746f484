"""Problem 16: inefficient for dense inputs."""
