"""Compute the figures that notes on pages give for comparison; no verdict rests on them.

    python scripts/reference_lines.py

Bits per byte of tables counted over the training text, on the bytes that problems 4, 7 and 12 predict at standard
scale, and the peak of problem 7's caches alone for other ways to read a text than the one it measures. Some minutes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from transformer_problems.core.slots import Cache
from transformer_problems.lab.data.text import TextSplits, held_out_windows, load_text
from transformer_problems.lab.meters.memory import peak_memory_bytes
from transformer_problems.solutions.attention.kv_cache import KVCache
from transformer_problems.solutions.attention.paged_cache import PagedKVCache, PagePool

# windows, bytes in each, and the first of those that are predicted, as the problems' experiments have them
PREDICTED = {
    "problem 4, continuations": (64, 256, 224),
    "problem 7, windows": (32, 256, 1),
    "problem 12, at 1x": (16, 4096, 64),
    "problem 12, at longest": (16, 4096, 2048),
}
LAST = {"problem 12, at 1x": 128}  # behind the last byte predicted, where that is not the window's end

LAYERS, HEADS, HEAD_DIM, LENGTH, PAGE = 8, 4, 16, 8192, 16  # problem 7's caches
PROMPTS = (10, 512, 1000, LENGTH // 2)  # tokens read at once; the others one by one


def main() -> None:
    text = load_text()
    print(f"{text.source}: bits per byte of a table of bytes, and of pairs of bytes")
    for name, lines in reference_lines(text).items():
        print(f"{name}: {lines[0]:.2f}, {lines[1]:.2f}")
    print(f"peak MiB of {LAYERS} layers' caches, {HEADS} heads of {HEAD_DIM}, {LENGTH:,} tokens: plain, in pages")
    for prompt in PROMPTS:
        plain, paged = (cache_peak(make, prompt) / 2**20 for make in (plain_caches, paged_caches))
        print(f"prompt of {prompt:,}, then one by one: {plain:.1f}, {paged:.1f}")


def reference_lines(text: TextSplits) -> dict[str, tuple[float, float]]:
    """Bits per byte of single bytes and of pairs, counted over the training text with one count added to each."""
    train = text.train.long()
    singles = torch.bincount(train, minlength=256).double() + 1
    pairs = torch.bincount(train[:-1] * 256 + train[1:], minlength=256**2).view(256, 256).double() + 1
    single_bits, pair_bits = -(singles / singles.sum()).log2(), -(pairs / pairs.sum(1, keepdim=True)).log2()
    found = {}
    for name, (num, length, first) in PREDICTED.items():
        windows = held_out_windows(text.test, num=num, length=length)[:, : LAST.get(name, length)]
        before, predicted = windows[:, first - 1 : -1], windows[:, first:]
        found[name] = float(single_bits[predicted].mean()), float(pair_bits[before, predicted].mean())
    return found


def plain_caches() -> list[Cache]:
    return [KVCache.empty(1) for _ in range(LAYERS)]


def paged_caches() -> list[Cache]:
    pool = PagePool(LAYERS * LENGTH // PAGE, page_size=PAGE, num_kv_heads=HEADS, head_dim=HEAD_DIM)
    return [PagedKVCache.empty(1, pool=pool) for _ in range(LAYERS)]


@torch.no_grad()
def cache_peak(make: Callable[[], list[Cache]], prompt: int) -> int:
    """Most bytes at once while every layer appends the prompt and then token by token, and reads what it holds."""

    def read_all() -> None:
        caches = make()
        for num in (prompt, *[1] * (LENGTH - prompt)):
            entries: Tensor = torch.zeros(1, HEADS, num, HEAD_DIM)
            for layer, cache in enumerate(caches):
                caches[layer] = cache.append(entries, entries)
        for cache in caches:
            held = cache.keys, cache.values  # both at once, as attention takes them
            del held

    return peak_memory_bytes(read_all, device="cpu")


if __name__ == "__main__":
    main()
