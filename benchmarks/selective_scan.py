"""Times one Mamba layer, forward and backward: ours, mambapy's and transformers' reference path, same weights.

python benchmarks/selective_scan.py                     # the reference path alone takes minutes
python benchmarks/selective_scan.py --slow-tokens 256   # the reference path on a shorter sequence
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.core.dependencies import require
from transformer_problems.core.errors import MissingDependencyError
from transformer_problems.solutions.recurrence.mamba import Mamba
from transformer_problems.solutions.recurrence.selective_scan import Backend, selective_scan_backend

AGREEMENT = 1e-4  # float32 rounds at 6e-8; sums over thousands of tokens and hundreds of channels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11, help="timed runs of ours and mambapy (after one untimed)")
    parser.add_argument("--slow-tokens", type=int, help="tokens for transformers' path; default as --tokens")
    parser.add_argument("--slow-repeats", type=int, default=1, help="timed runs of transformers' path; 0 skips it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    layer = Mamba(args.width, state_dim=args.states)
    compiled = selective_scan_backend(torch.empty(0)) == "cpp"
    try:
        quick_peer = mambapy_layer(layer)
        slow_peer = transformers_layer(layer) if args.slow_repeats else None
    except MissingDependencyError as error:
        parser.error(str(error))
    x = torch.randn(args.batch, args.tokens, args.width)
    check_agreement("mambapy", layer(x), quick_peer(x))
    print(
        f"Mamba layer, forward + backward, float32, batch {args.batch}, {args.tokens:,} tokens, width {args.width}, "
        f"{args.states} states, {args.threads} threads; medians of {args.repeats}"
    )
    backends: list[Backend] = ["torch", "cpp"] if compiled else ["torch"]
    arms = {backend: Mamba(args.width, state_dim=args.states, backend=backend) for backend in backends}
    for arm in arms.values():
        arm.load_state_dict(layer.state_dict())
    ours = {name: report(f"ours ({name})", arm, x, args.repeats) for name, arm in arms.items()}
    theirs = report("mambapy", quick_peer, x, args.repeats)
    for name, seconds in ours.items():
        print(f"ours ({name}) is {theirs / seconds:,.1f}x as fast as mambapy")
    if slow_peer is None:
        return
    x = x[:, : args.slow_tokens]
    check_agreement("transformers", layer(x), slow_peer(x))
    print(f"{x.shape[1]:,} tokens; transformers' median of {args.slow_repeats}, without an untimed run")
    ours = {name: report(f"ours ({name})", arm, x, args.repeats) for name, arm in arms.items()}
    theirs = report("transformers", slow_peer, x, args.slow_repeats, warmup=0)
    for name, seconds in ours.items():
        print(f"ours ({name}) is {theirs / seconds:,.1f}x as fast as transformers' reference path")


def mambapy_layer(layer: Mamba) -> nn.Module:
    mamba = require("mambapy.mamba", extra="peers")
    width = layer.out_proj.out_features
    peer: nn.Module = mamba.MambaBlock(mamba.MambaConfig(d_model=width, n_layers=1, d_state=layer.state_dim))
    peer.load_state_dict(layer.state_dict())
    return peer


def transformers_layer(layer: Mamba) -> nn.Module:
    require("transformers", extra="peers")
    modeling = require("transformers.models.mamba.modeling_mamba", extra="peers")
    config = modeling.MambaConfig(
        hidden_size=layer.out_proj.out_features, state_size=layer.state_dim, num_hidden_layers=1
    )
    peer: nn.Module = modeling.MambaMixer(config, layer_idx=0)
    peer.load_state_dict(layer.state_dict())
    return peer


def check_agreement(name: str, ours: Tensor, theirs: Tensor) -> None:
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert difference < AGREEMENT, f"{name} computes something else: relative difference {difference:.2g}"


def report(name: str, layer: Callable[[Tensor], Tensor], x: Tensor, repeats: int, *, warmup: int = 1) -> float:
    """Median seconds of forward and backward, also printed."""
    x = x.detach().requires_grad_()
    times_s = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        layer(x).sum().backward()
        times_s.append(time.perf_counter() - start)
    timed = times_s[warmup:]
    print(f"  {name:<14} {statistics.median(timed):9.4f} s  (best {min(timed):.4f})", flush=True)
    return statistics.median(timed)


if __name__ == "__main__":
    main()
