"""The chunked gated delta rule against transformers' reference, forward and forward + backward, in one run."""

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from transformer_problems.solutions.recurrence.delta_rule import delta_rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=2048, help="N, tokens")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    inputs, weight = draw(args.heads, args.length, args.head_dim)

    def ours() -> Tensor:
        q, k, v, beta, gate = inputs
        y, _ = delta_rule(q * q.shape[-1] ** -0.5, k, v, beta, gate=gate, chunk_size=args.chunk_size)
        return y

    def peer() -> Tensor:
        q, k, v, beta, gate = (x.transpose(1, 2) for x in inputs)
        y, _ = torch_chunk_gated_delta_rule(q, k, v, gate, beta, chunk_size=args.chunk_size)
        return y.transpose(1, 2)

    torch.testing.assert_close(ours(), peer(), atol=1e-5, rtol=1e-4)  # float32 sums of some hundred terms
    print(f"N={args.length}, {args.heads} heads of {args.head_dim}, {args.threads} threads, {args.repeats} repeats")
    for name, wrap in {"forward": without_gradients, "forward + backward": with_gradients(inputs, weight)}.items():
        ours_s, peer_s = median_seconds([wrap(ours), wrap(peer)], args.repeats)
        print(
            f"{name:<20}ours {ours_s * 1e3:8.2f} ms   peer {peer_s * 1e3:8.2f} ms   ours / peer {ours_s / peer_s:.2f}"
        )


def draw(num_heads: int, length: int, head_dim: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v, beta, gate in heads layout, and the weight that the backward pass starts from."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(1, num_heads, length, head_dim, generator=generator) for _ in range(4))
    beta, decay = (torch.rand(1, num_heads, length, generator=generator) for _ in range(2))
    inputs = [q, F.normalize(k, dim=-1), v, beta, -0.1 * decay]
    return [x.requires_grad_() for x in inputs], weight


def without_gradients(function: Callable[[], Tensor]) -> Callable[[], object]:
    return torch.no_grad()(function)


def with_gradients(inputs: list[Tensor], weight: Tensor) -> Callable[[Callable[[], Tensor]], Callable[[], object]]:
    return lambda function: lambda: torch.autograd.grad((function() * weight).sum(), inputs)


def median_seconds(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Functions take turns, so that whatever else the machine does meets all of them."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 2):
        for function, own in zip(functions, times, strict=True):
            start = perf_counter()
            function()
            if turn >= 2:  # the first two warm up
                own.append(perf_counter() - start)
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    main()
