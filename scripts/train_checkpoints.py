"""Train the two bundled checkpoints on the Python standard library and write them with their model cards.

    python scripts/train_checkpoints.py

Tokens are bytes, so tokenizer files are written by hand. The held-out score is that of the weights as stored.
"""

import argparse
import json
import platform
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.core.seeding import generator, seeded
from transformer_problems.lab.data.text import TextSplits, held_out_windows, load_text, sample_windows
from transformer_problems.lab.meters.quality import bits_per_byte
from transformer_problems.lab.training import BatchLoss, TrainingLog, TrainingPlan, plain_recipe, train
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder, load_llama, save_llama
from transformer_problems.solutions.training.warmup import Warmup

CONTEXT = 256
WARMUP_STEPS = 100
BEGIN = 256  # the token after the 256 bytes
BEGIN_NAME = "<|endoftext|>"
BEGIN_SHARE = 1 / 8  # of the training windows open with BEGIN, so that a text can be begun from nothing


@dataclass(frozen=True, slots=True)
class Recipe:
    """What makes one checkpoint, but for the seed."""

    name: str
    config: LlamaConfig
    steps: int
    learning_rate: float
    batch_size: int

    @property
    def plan(self) -> TrainingPlan:
        return TrainingPlan(self.steps, plain_recipe(self.learning_rate, Warmup(WARMUP_STEPS)))


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    splits, licence = load_text(), python_licence()
    for recipe in recipes(options.steps):
        folder = bundled(recipe.name) if options.out is None else options.out / recipe.name
        model = make_model(recipe, options.seed)
        print(f"{recipe.name}: {count_parameters(model):,} parameters, {recipe.steps} steps", flush=True)
        loss = window_loss(splits.train, recipe.batch_size, options.seed)
        log = train(model, loss, recipe.plan, progress=report_progress())
        save_llama(model.to(torch.bfloat16), folder)
        write_tokenizer(folder)
        score, error = held_out_score(load_llama(folder, dtype=torch.float32), splits.test, options.windows)
        print(f"{recipe.name}: {score:.4f} bits per byte held out, {log.train_s:.0f} s", flush=True)
        card = model_card(recipe, model, splits, log, seed=options.seed, windows=options.windows, score=(score, error))
        (folder / "README.md").write_text(card)
        shutil.copy(licence, folder / "LICENSE-PYTHON.txt")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for base/ and draft/; default those of the package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimizer steps of each; default those of the recipes")
    parser.add_argument("--windows", type=int, default=1024, help="held-out windows scored")
    return parser.parse_args(arguments)


def recipes(steps: int | None) -> tuple[Recipe, Recipe]:
    def config(**sizes: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=BEGIN + 1,
            tie_embeddings=True,
            max_seq_len=CONTEXT,
            bos_token_id=BEGIN,
            eos_token_ids=(BEGIN,),
            **sizes,
        )

    base = config(embed_dim=256, num_layers=8, num_heads=4, num_kv_heads=2, feed_forward_dim=512)
    draft = config(embed_dim=128, num_layers=2, num_heads=2, num_kv_heads=1, feed_forward_dim=384)
    return (
        Recipe("base", base, steps or 1600, learning_rate=2e-3, batch_size=16),
        Recipe("draft", draft, steps or 3000, learning_rate=4e-3, batch_size=16),
    )


def make_model(recipe: Recipe, seed: int) -> LlamaDecoder:
    with seeded(seed, recipe.name):
        return LlamaDecoder(recipe.config)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def window_loss(data: Tensor, batch_size: int, seed: int) -> BatchLoss:
    """Cross-entropy of the next byte in random windows; products of matrices in bfloat16."""

    def loss(model: nn.Module, step: int) -> Tensor:
        draws = generator(seed, "windows", step)
        windows = sample_windows(data, num=batch_size, length=CONTEXT + 1, generator=draws)
        windows[torch.rand(batch_size, generator=draws) < BEGIN_SHARE, 0] = BEGIN
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(windows[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    return loss


def report_progress() -> Callable[[float], None]:
    """Prints one line for every twentieth part."""
    start, printed = time.perf_counter(), 0

    def report(fraction: float) -> None:
        nonlocal printed
        if int(20 * fraction) > printed:
            printed = int(20 * fraction)
            print(f"  {fraction:4.0%} after {time.perf_counter() - start:5.0f} s", flush=True)

    return report


@torch.no_grad()
def held_out_score(model: nn.Module, data: Tensor, num_windows: int) -> tuple[float, float]:
    """Bits per byte over evenly spaced windows of test text, and the standard error of that mean."""
    windows = held_out_windows(data, num=num_windows, length=CONTEXT + 1)
    scores = torch.cat([bits_per_byte(model(part[:, :-1]), part[:, 1:]) for part in windows.split(16)])
    return scores.mean().item(), scores.std().item() / num_windows**0.5


def write_tokenizer(folder: Path) -> None:
    """A BPE without merges over the 256 bytes: tokens are UTF-8 bytes, and transformers' AutoTokenizer agrees."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": BEGIN, "content": BEGIN_NAME, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {letter: byte for byte, letter in enumerate(letters())}, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": BEGIN_NAME for role in ("bos", "eos", "pad")},
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def letters() -> list[str]:
    """The visible letter that stands for each byte in a byte-level vocabulary: itself, or one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def python_licence() -> Path:
    """The terms that came with this Python, whose text the models learn from."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if not path.is_file():
        raise SystemExit(f"{path} is missing, and its text must go with the models. Use a Python built from source.")
    return path


def model_card(
    recipe: Recipe,
    model: LlamaDecoder,
    splits: TextSplits,
    log: TrainingLog,
    *,
    seed: int,
    windows: int,
    score: tuple[float, float],
) -> str:
    config = recipe.config
    seen, last = log.steps * recipe.batch_size * CONTEXT, log.losses[-100:]
    return f"""---
license: other
license_name: psf-2.0
license_link: LICENSE-PYTHON.txt
library_name: transformers
pipeline_tag: text-generation
---

# {recipe.name}: a byte-level language model of Python's standard library

A Llama of {count_parameters(model):,} parameters: {config.num_layers} layers, width {config.embed_dim}, \
{config.num_heads} query and {config.num_kv_heads} key/value heads, SwiGLU of {config.feed_forward_dim}, tied \
embeddings, bfloat16. It is small enough to come with the package, and meant for experiments on decoding and for \
tests, not for writing programs.

| | |
|---|---|
| Held-out score | {score[0]:.4f} bits per byte |
| Its standard error | {score[1]:.4f} |
| Measured on | {windows} windows of {CONTEXT} predicted bytes, evenly spaced over the {len(splits.test):,} bytes of \
test text, each from its own start, in float32 with the stored weights |
| Uniform guess | 8 bits per byte |

## Tokens

The 256 byte values, and `{BEGIN_NAME}` ({BEGIN}), which begins a text from nothing and pads. The model is never \
taught to emit it. The context is {CONTEXT} tokens.

## Data and licence

The {splits.source}, its sources and documentation: {len(splits.train):,} bytes of training text, \
{len(splits.valid):,} of validation (unused) and {len(splits.test):,} of test. Whole files are held out.

The terms that came with this Python, with their copyright notice, stand in `LICENSE-PYTHON.txt` and are to be kept. \
Clause 2 of the PSF licence permits to prepare derivative works of Python and to distribute them if both are kept. \
A few modules carry permissive terms of their own, listed in Python's documentation under "History and License". \
Change made, as clause 3 asks to state: a statistical model was trained on the text; no file of Python is included.

## Recipe

`make checkpoints` (`scripts/train_checkpoints.py`), seed {seed}, PyTorch {torch.__version__}, Python \
{platform.python_version()}, {torch.get_num_threads()} threads: {recipe.steps:,} steps of AdamW on \
{recipe.batch_size} windows of {CONTEXT} bytes ({seen:,} bytes seen), peak learning rate \
{recipe.learning_rate:g} after {WARMUP_STEPS} steps, cosine decay to a tenth, weight decay 0.01, gradient norm at \
most 1, matrix products in bfloat16. Training took {log.train_s:,.0f} s; the loss of the last 100 steps \
was {sum(last) / len(last):.4f} nats. The same seed on the same machine gives the same weights.
"""


if __name__ == "__main__":
    main()
