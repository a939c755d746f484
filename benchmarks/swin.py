"""Our Swin block against transformers' SwinLayer with the same weights, forward and forward + backward, in one run.

    python benchmarks/swin.py --side 56 --embed-dim 96 --num-heads 3 --threads 2

Both ways in which transformers computes attention take part. The side is best a multiple of the window: elsewhere
transformers lets tokens see the padding, and outputs differ.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from torch import Tensor, nn
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

from transformer_problems.models.grid import GridBlock
from transformer_problems.solutions.attention.shifted_windows import ShiftedWindowAttention


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    side, width = options.side, options.embed_dim
    x = torch.randn(options.batch_size, side, side, width)
    print(
        f"{options.batch_size} x {side} x {side} tokens, {options.num_heads} heads, width {width}, windows of "
        f"{options.window_size} x {options.window_size}, float32, {options.threads} threads, median of "
        f"{options.repeats}"
    )
    for shifted in (False, True):
        block = build(options, shifted=shifted)
        functions: dict[str, nn.Module] = {"ours": block}
        for attention in ("sdpa", "eager"):
            functions[f"transformers, {attention}"] = peer_of(block, options, attention)
        with torch.no_grad():
            for function in functions.values():
                # float32 sums of some hundred terms, in another order
                torch.testing.assert_close(function(x), block(x), atol=1e-4, rtol=0)
        for name, run in {"forward": forward, "forward + backward": forward_and_backward}.items():
            print(f"{'shifted' if shifted else 'plain'} windows, {name}")
            seconds = median_seconds({who: run(function, x) for who, function in functions.items()}, options.repeats)
            for who, median_s in seconds.items():
                print(f"  {who:22} {median_s * 1e3:9.2f} ms   ours / this {seconds['ours'] / median_s:.2f}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--side", type=int, default=56, help="tokens along each axis of the grid")
    parser.add_argument("--embed-dim", type=int, default=96)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument("--window-size", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=31)
    return parser.parse_args()


def build(options: argparse.Namespace, *, shifted: bool) -> GridBlock:
    window_size = (options.window_size, options.window_size)
    attention = ShiftedWindowAttention(options.embed_dim, options.num_heads, window_size, shifted=shifted)
    block = GridBlock(options.embed_dim, attention)
    nn.init.normal_(attention.bias_table)  # so that the comparison of outputs sees it
    return block


def peer_of(block: GridBlock, options: argparse.Namespace, attention: str) -> nn.Module:
    """transformers' layer with the weights of ours, without its dropout, on the same shapes."""
    config = SwinConfig(window_size=options.window_size, attn_implementation=attention)
    grid = (options.side, options.side)
    shift = options.window_size // 2 if block.mixer.shifted else 0
    layer = SwinLayer(config, options.embed_dim, grid, options.num_heads, shift_size=shift)
    with torch.no_grad():
        for ours, theirs in weights(block, layer):
            theirs.copy_(ours)
    return Peer(layer, grid).eval()


class Peer(nn.Module):
    def __init__(self, layer: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.grid = layer, grid

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1, 2), self.grid)[0].view(x.shape)


def weights(block: GridBlock, layer: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    pairs = [
        (block.mixer_residual.norm, layer.layernorm_before),
        (block.feed_forward_residual.norm, layer.layernorm_after),
        (block.feed_forward.up, layer.mlp.fc1),
        (block.feed_forward.down, layer.mlp.fc2),
        (block.mixer.out_proj, layer.attention.o_proj),
    ]
    for ours, theirs in pairs:
        yield from zip(ours.parameters(), theirs.parameters(), strict=True)
    projections = (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
    for name in ("weight", "bias"):
        parts = getattr(block.mixer.qkv_proj, name).chunk(3)
        yield from zip(parts, (getattr(projection, name) for projection in projections), strict=True)
    yield block.mixer.bias_table, layer.attention.relative_position_bias.relative_position_bias_table


def forward(function: nn.Module, x: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: function(x))


def forward_and_backward(function: nn.Module, x: Tensor) -> Callable[[], object]:
    own = x.clone().requires_grad_()
    inputs, weight = [own, *function.parameters()], torch.randn_like(x)
    return lambda: torch.autograd.grad((function(own) * weight).sum(), inputs)


def median_seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Functions take turns, so that whatever else the machine does meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            start = perf_counter()
            function()
            if turn >= 2:  # the first two warm up
                times[name].append(perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


if __name__ == "__main__":
    main()
