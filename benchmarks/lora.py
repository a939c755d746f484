"""Seconds of one training step with LoRA: ours against peft's, on the same model and data.

    python benchmarks/lora.py --threads 2

A step is forward, backward and AdamW on an encoder of 25M parameters. They take turns, so that a slower moment of the
machine falls on both; the first turn of each warms up and is not counted. QLoRA and full fine-tuning stand beside.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.adaptation.qlora import QLoRA
from transformer_problems.solutions.attention.self_attention import SelfAttention


def main() -> None:
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = Encoder(257, options.width, options.layers, lambda: SelfAttention(options.width, 8, is_causal=False))
    tokens = torch.randint(257, (options.batch, options.tokens))
    models = {
        "full fine-tuning": model,
        "ours, LoRA": LoRA(rank=options.rank, targets=("body.blocks.*",))(model),
        "peft, LoRA": peft_model(model, options.rank),
        "ours, QLoRA": QLoRA(rank=options.rank, targets=("body.blocks.*",))(model),
    }
    steps = {name: training_step(adapted, tokens) for name, adapted in models.items()}
    seconds = taking_turns(steps, options.repeats)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.0f}M parameters, rank {options.rank}, {options.batch} x {options.tokens} tokens, "
        f"{torch.get_num_threads()} threads, median of {options.repeats}"
    )
    for name, value in seconds.items():
        print(f"  {name:<18}{value * 1e3:9.1f} ms a step")
    print(f"peft / ours, LoRA   {seconds['peft, LoRA'] / seconds['ours, LoRA']:.2f}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def peft_model(model: nn.Module, rank: int) -> nn.Module:
    """peft's adapters beside the same layers of a copy."""
    import copy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, inject_adapter_in_model

    linears = [path for path, part in model.named_modules() if isinstance(part, nn.Linear) and "blocks" in path]
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=linears, lora_dropout=0.0)
    adapted: nn.Module = inject_adapter_in_model(config, copy.deepcopy(model))
    for name, p in adapted.named_parameters():
        p.requires_grad_("lora_" in name)
    return adapted


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def taking_turns(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
