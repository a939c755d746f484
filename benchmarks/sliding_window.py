"""Median seconds of SlidingWindow, compiled flex_attention and PyTorch's dense attention, and their ratios.

    python benchmarks/sliding_window.py --num-tokens 16384 --window-size 256 --threads 2

All run forward only, without gradients; the first two compute the same attention, which is checked. The runs alternate,
so that a slower moment of the machine falls on all of them. Compiling happens in a warm-up that is not counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from transformer_problems.solutions.attention.sliding_window import SlidingWindow


def main() -> None:
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, options.num_heads, options.num_tokens, options.head_dim)
    window_size = options.window_size
    window = SlidingWindow(window_size)

    def near(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        inside: Tensor = (row - column).abs() <= window_size
        return inside

    block_mask = create_block_mask(near, None, None, options.num_tokens, options.num_tokens, device="cpu")
    flex = torch.compile(flex_attention)
    functions: dict[str, Callable[[], Tensor]] = {
        "SlidingWindow": lambda: window(q, k, v),
        "compiled flex_attention": lambda: flex(q, k, v, block_mask=block_mask),
        "dense SDPA": lambda: scaled_dot_product_attention(q, k, v),
    }
    print(
        f"{options.num_tokens:,} tokens, {options.num_heads} heads of {options.head_dim}, {window_size} keys a side, "
        f"float32, {torch.get_num_threads()} threads, median of {options.repeats}"
    )
    with torch.no_grad():
        # float32 sums of some hundred terms, in another order
        torch.testing.assert_close(window(q, k, v), flex(q, k, v, block_mask=block_mask), atol=1e-5, rtol=0.0)
        seconds = median_seconds(functions, options.repeats)
    for name, median_s in seconds.items():
        print(f"{name:24} {median_s:8.4f} s  {median_s / seconds['SlidingWindow']:6.2f} x SlidingWindow")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tokens", type=int, default=16_384)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window-size", type=int, default=256, help="keys visible on each side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="default: PyTorch's own choice")
    return parser.parse_args()


def median_seconds(functions: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median time of each function; they take turns after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


if __name__ == "__main__":
    main()
