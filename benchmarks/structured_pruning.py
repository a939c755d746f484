"""Seconds of one forward pass: a dense encoder, half of its heads and neurons removed, and half of its weights zero.

    python benchmarks/structured_pruning.py --threads 2

The peer is torch.nn.utils.prune, which leaves zeros in dense matrices. They take turns, so that a slower moment of the
machine falls on all; the first turn of each warms up and is not counted.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from torch.nn.utils import prune

from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.structured_pruning import StructuredPruning


def main() -> None:
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = Encoder(257, options.width, options.layers, lambda: SelfAttention(options.width, 8, is_causal=False)).eval()
    models = {"dense": dense, "structured, 50%": StructuredPruning()(dense), "torch's prune, 50%": zeroed(dense)}
    print(f"width {options.width}, {options.layers} layers, {torch.get_num_threads()} threads")
    for batch in (1, 8):
        tokens = torch.randint(257, (batch, options.tokens))
        seconds = taking_turns(models, tokens, options.repeats)
        print(f"{batch} x {options.tokens} tokens, median of {options.repeats}")
        for name, value in seconds.items():
            print(f"  {name:<20}{value * 1e3:8.2f} ms   dense / this {seconds['dense'] / value:.2f}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def zeroed(model: nn.Module) -> nn.Module:
    """A copy with half of each layer's weights at zero, made permanent."""
    pruned = copy.deepcopy(model)
    for layer in (part for part in pruned.modules() if isinstance(part, nn.Linear)):
        prune.l1_unstructured(layer, "weight", amount=0.5)
        prune.remove(layer, "weight")
    return pruned


@torch.inference_mode()
def taking_turns(models: dict[str, nn.Module], tokens: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each model's pass."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model(tokens)
    for _ in range(repeats):
        for name, model in models.items():
            start = time.perf_counter()
            model(tokens)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
