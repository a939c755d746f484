"""Median seconds of Performer and of PyTorch's dense attention on the same tokens, and how many times faster it is.

    python benchmarks/performer.py --num-tokens 16384 --threads 2

Both run forward only, without gradients, in float32; the runs alternate, so that a slower moment of the machine falls
on all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transformer_problems.solutions.attention.performer import Performer


def main() -> None:
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    op = Performer(options.head_dim, num_features=options.num_features, chunk_size=options.chunk_size)
    q, k, v = torch.randn(3, 1, options.num_heads, options.num_tokens, options.head_dim)
    print(
        f"{options.num_tokens:,} tokens, {options.num_heads} heads of {options.head_dim}, {op.num_features} features, "
        f"float32, {torch.get_num_threads()} threads, median of {options.repeats}"
    )
    for is_causal in (False, True):
        performer_s, dense_s = median_seconds(
            lambda causal=is_causal: op(q, k, v, is_causal=causal),
            lambda causal=is_causal: scaled_dot_product_attention(q, k, v, is_causal=causal),
            repeats=options.repeats,
        )
        direction = "causal" if is_causal else "bidirectional"
        print(
            f"{direction:13}  Performer {performer_s:8.4f} s  dense SDPA {dense_s:8.4f} s  "
            f"ratio {dense_s / performer_s:6.2f}"
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tokens", type=int, default=16_384)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--num-features", type=int, default=None, help="default: head_dim * ln(head_dim)")
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="default: PyTorch's own choice")
    return parser.parse_args()


def median_seconds(*functions: Callable[[], Tensor], repeats: int) -> list[float]:
    """Median time of each function; they take turns after one warm-up each."""
    times: list[list[float]] = [[] for _ in functions]
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for function, samples in zip(functions, times, strict=True):
                start = time.perf_counter()
                function()
                if repeat > 0:
                    samples.append(time.perf_counter() - start)
    return [statistics.median(samples) for samples in times]


if __name__ == "__main__":
    main()
