"""Tokens per second of greedy decoding at batch 1: LlamaDecoder.stream against transformers.generate.

    python benchmarks/decoding.py --threads 2

Both hold the same random weights and continue the same prompt. They take turns, so that a slower moment of the machine
falls on both; the first turn of each warms up and is not counted. The prompt's own pass is counted in both.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from transformer_problems.models.llama import LlamaConfig, LlamaDecoder, save_llama


def main() -> None:
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        num_kv_heads=options.num_kv_heads,
        feed_forward_dim=options.feed_forward_dim,
    )
    dtype = getattr(torch, options.dtype)
    ours = LlamaDecoder(config, dtype=dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_llama(ours, Path(folder))
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    prompt = torch.randint(options.vocab_size, (1, options.prompt_tokens))
    new = options.new_tokens
    runs: dict[str, Callable[[], Tensor]] = {
        "LlamaDecoder.stream": lambda: greedy(ours, prompt, new),
        "transformers.generate": lambda: peer.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )[:, prompt.shape[1] :],
    }
    with torch.inference_mode():
        rates, agreed = tokens_per_second(runs, new, options.repeats)
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    print(
        f"{parameters / 1e6:.0f}M parameters, {options.dtype}, {torch.get_num_threads()} threads, "
        f"{prompt.shape[1]} + {new} tokens, median of {options.repeats}; the first {agreed} tokens agree"
    )
    for name, rate in rates.items():
        print(f"{name:<22}{rate:8.1f} tokens/s")
    first, second = rates.values()
    print(f"ratio                 {first / second:8.2f}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--embed-dim", type=int, default=768)
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--num-kv-heads", type=int, default=12)
    parser.add_argument("--feed-forward-dim", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def greedy(model: LlamaDecoder, prompt: Tensor, num_tokens: int) -> Tensor:
    logits, state = model.stream(prompt, model.initial_state(1))
    tokens = [logits[:, -1:].argmax(dim=-1)]
    while len(tokens) < num_tokens:
        logits, state = model.stream(tokens[-1], state)
        tokens.append(logits.argmax(dim=-1))
    return torch.cat(tokens, dim=1)


def tokens_per_second(
    runs: dict[str, Callable[[], Tensor]], num_tokens: int, repeats: int
) -> tuple[dict[str, float], int]:
    """Median rate of each, and how many leading tokens are the same (bfloat16 rounds near ties differently)."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs = {name: run() for name, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    first, second = outputs.values()
    agreed = int((first == second).long().cumprod(dim=1).sum())
    return {name: num_tokens / statistics.median(times) for name, times in seconds.items()}, agreed


if __name__ == "__main__":
    main()
