"""Median milliseconds of a training step of a decoder with and without TrainingMonitor, and their ratio.

    python benchmarks/training_monitor.py --num-tokens 256 --batch-size 8 --threads 2

Rounds of as many steps as lie between two samples, so that each watched round holds exactly one, take turns with rounds
without a monitor, so that a slower moment of the machine falls on both. The first round of each warms up.
"""

import argparse
import statistics
import time

import torch
from torch import nn, optim

from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.rotary import RotaryEmbedding
from transformer_problems.solutions.training.monitor import TrainingMonitor


def main() -> None:
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    width, heads = options.embed_dim, options.num_heads
    model = Decoder(
        options.vocab_size,
        width,
        options.num_layers,
        lambda: SelfAttention(width, heads, position=RotaryEmbedding(width // heads)),
        device=options.device,
    )
    optimizer = optim.AdamW(model.parameters(), lr=1e-4)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for repeat in range(options.repeats + 1):
        plain_s = round_seconds(model, optimizer, options)
        with TrainingMonitor(model, optimizer, every=options.every):
            watched_s = round_seconds(model, optimizer, options)
        if repeat > 0:
            seconds["without"].append(plain_s)
            seconds["with"].append(watched_s)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters, {options.batch_size} x {options.num_tokens} tokens, float32, "
        f"{torch.get_num_threads()} threads, every {options.every} steps, median of {options.repeats}"
    )
    for name, times in seconds.items():
        print(f"{name:<8}{1e3 * statistics.median(times) / options.every:10.2f} ms a step")
    ratios = [watched / plain for watched, plain in zip(seconds["with"], seconds["without"], strict=True)]
    print(f"ratio   {statistics.median(ratios):10.3f}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--num-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def round_seconds(model: nn.Module, optimizer: optim.Optimizer, options: argparse.Namespace) -> float:
    """Seconds of a round of steps, the device's work included."""
    text = torch.randint(options.vocab_size, (options.batch_size, options.num_tokens + 1), device=options.device)
    wait(options.device)
    start = time.perf_counter()
    for _ in range(options.every):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
    wait(options.device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
