"""Seconds of FlashAttention's back ends and PyTorch's scaled_dot_product_attention, one call or one training step.

    python benchmarks/attention.py --dtype bfloat16 --num-tokens 4096 --backward --threads 2
    python benchmarks/attention.py --dtype bfloat16 --num-tokens 8192 --backward --device cuda
    python benchmarks/attention.py --dtype bfloat16 --num-tokens 8192 --threads 2

All compute the same attention, which is checked, and take turns, so that a slower moment of the machine falls on all.
Races, compiling and waking threads happen in a warm-up that is not counted. Ratios are medians over turns of PyTorch's
seconds divided by the other's in the same turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transformer_problems import FlashAttention
from transformer_problems.kernels.flash_attention_amx import has_amx
from transformer_problems.kernels.flash_attention_triton import has_triton

PYTORCH = "PyTorch's SDPA"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, options.num_heads, options.num_tokens, options.head_dim)
    inputs = torch.randn(shape, generator=generator, device=device).to(dtype).unbind()
    q, k, v = (x.requires_grad_(options.backward) for x in inputs)
    auto = FlashAttention()
    attentions: dict[str, Attention] = {
        PYTORCH: lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=options.causal),
        "FlashAttention": lambda q, k, v: auto(q, k, v, is_causal=options.causal),
    }
    if options.tiled:
        tiled = FlashAttention(backend="tiled")
        attentions["tiled"] = lambda q, k, v: tiled(q, k, v, is_causal=options.causal)
    if device.type == "cuda" and has_triton():
        triton = FlashAttention(backend="triton")
        attentions["triton"] = lambda q, k, v: triton(q, k, v, is_causal=options.causal)
    if device.type == "cpu" and dtype == torch.bfloat16 and not options.backward and has_amx():
        amx = FlashAttention(backend="amx")
        attentions["amx"] = lambda q, k, v: amx(q, k, v, is_causal=options.causal)
    check_agreement(attentions, q, k, v)
    grad = torch.randn(q.shape, generator=generator, device=device).to(dtype)
    seconds = taking_turns(
        {name: step(attention, (q, k, v), grad) for name, attention in attentions.items()}, device, options.repeats
    )
    print(
        f"{options.num_tokens:,} tokens, {options.num_heads} heads of {options.head_dim}, {options.dtype}, "
        f"{'causal' if options.causal else 'every token sees all'}, "
        f"{'forward and backward' if options.backward else 'forward'}, {device}, "
        f"{torch.get_num_threads()} threads, {options.repeats} turns; FlashAttention ran {auto.last_run!r}"
    )
    for name, own in seconds.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[PYTORCH], own, strict=True))
        print(f"{name:16} {statistics.median(own):9.4f} s  {ratio:6.2f} x as fast as {PYTORCH}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=4096)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--backward", action="store_true", help="time the gradients too")
    parser.add_argument("--tiled", action="store_true", help="time the algorithm written out, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def step(attention: Attention, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> Callable[[], object]:
    def run() -> None:
        y = attention(*inputs)
        if y.requires_grad:
            torch.autograd.grad(y, inputs, grad)

    return run


@torch.no_grad()
def check_agreement(attentions: dict[str, Attention], q: Tensor, k: Tensor, v: Tensor) -> None:
    expected = attentions[PYTORCH](q, k, v)
    for attention in attentions.values():
        # weights and outputs are rounded once or twice to the dtype; float32 has sums of some thousand terms
        bound = 1e-5 if q.dtype == torch.float32 else 4 * torch.finfo(q.dtype).eps
        torch.testing.assert_close(attention(q, k, v), expected, atol=bound, rtol=bound)


def taking_turns(
    functions: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each function in each turn, after one turn that is not counted."""
    times_s: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = now(device)
            function()
            passed_s = now(device) - start
            if turn:
                times_s[name].append(passed_s)
    return times_s


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
