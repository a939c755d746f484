"""How much of the model's work comes to nothing?"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.checkup import Visit, exactly
from transformer_problems.checkpoints.lengths import arithmetic_by_length, longest_input
from transformer_problems.checkpoints.subject import Kind
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.core.records import Interval
from transformer_problems.kernels.int8_product import int8_backends, int8_product
from transformer_problems.kernels.race import best_times
from transformer_problems.lab.meters.energy import estimate_energy
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.lab.meters.kernels import count_kernels
from transformer_problems.problems.p08_high_compute_cost.blocks import Block, Product, blocks_of, products_of

_NUM, _LENGTH = 4, 64
_IDLE = 0.01  # of what a neuron or head of its layer gives on average, at the most that was seen of it
_NUM_TEXTS, _BATCH = 64, 8
_ROWS = 64  # of the product that is raced in int8
_BOTTLENECK, _STACKED = 4, 4  # MobileBERT: a quarter of the width or so inside, four feed-forward networks a layer


class ComputeCheckup:
    """Watches what each neuron and head gives at most over some inputs, and prices those that give nothing.

    Of the user's own texts it also tells what batches spend on padding, as the tokenizer is set to pad: to a fixed
    length where its file says so, else to the longest text of each eight.
    """

    problem = 8
    not_for: Mapping[Kind, str] = {}
    needs_floats = "its linear layers hold int8 codes, and products with codes are not told apart by their weights"

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        subject, inputs = visit.subject, visit.inputs(_NUM, _LENGTH)
        products = products_of(subject, inputs)
        blocks = blocks_of(subject, products)
        work = sum(product.work for product in products)
        by_layer = [_idle_work(block) for block in blocks]
        idle = sum(by_layer) / work
        visit.progress(0.4)
        units = _NUM if subject.kind == "image" else inputs["input_ids"].numel() / 1000
        run = partial(subject.run, inputs)
        flops, moved = count_flops(run), count_kernels(run).bytes_moved
        unit = "image" if subject.kind == "image" else "1000_tokens"
        energy_j = estimate_energy(flops=flops, bytes_moved=moved).energy_j / units
        visit.progress(0.7)
        int8 = _int8_gain(blocks)
        figures = {
            f"per_{unit}_gflop": flops / units / 1e9,
            f"traffic_per_{unit}_bytes": moved / units,
            f"estimated_energy_per_{unit}_j": energy_j,
            "int8_gain_x": int8,
        }
        readings: dict[str, Interval] = {"idle_share": exactly(idle)}
        meaning = (
            f"{idle:.0%} of the products with weights give nothing; {flops / units / 1e9:,.2g} GFLOP and an estimated "
            f"{energy_j:,.2g} J for {'an image' if subject.kind == 'image' else '1,000 tokens'}"
        )
        if visit.material.own and subject.kind != "image":
            padding, how = _padding_share(visit)
            readings["padding_share"] = exactly(padding)
            meaning += f"; padding {how} takes {padding:.0%}"
        points = tuple((i + 1.0, _idle_work(block) / _block_work(block)) for i, block in enumerate(blocks))
        curve = Curve("How much of each layer's work gives nothing", "layer", "share of the layer's products", points)
        remedies = _remedies(blocks, products, idle, int8, moved)
        return Examination(readings, meaning, remedies, curve, figures)


def _block_work(block: Block) -> int:
    return sum(product.work for product in (*block.attention, *block.feed_forward))


def _idle_work(block: Block) -> float:
    """Of a layer: what its idle heads take of attention's products, and its idle neurons of the others."""
    heads = block.attention[-1].given().unflatten(0, (block.num_heads, -1)).sum(dim=1)
    idle = _idle(heads) * sum(product.work for product in block.attention)
    if block.feed_forward:
        idle += _idle(block.feed_forward[-1].given()) * sum(product.work for product in block.feed_forward)
    return idle


def _idle(given: Tensor) -> float:
    return float((given <= _IDLE * given.mean()).double().mean())


def _padding_share(visit: Visit) -> tuple[float, str]:
    """The part of the FLOPs that padding takes, and how texts are padded."""
    most, fixed = longest_input(visit.subject), fixed_padding(visit.subject.tokenizer)
    lengths = [len(row) for row in visit.short_texts(_NUM_TEXTS, min(most, fixed or most))]
    growth = arithmetic_by_length(visit)
    needed = sum(growth.at(length) for length in lengths)
    batches = [lengths[first : first + _BATCH] for first in range(0, len(lengths), _BATCH)]
    padded = [fixed or max(batch) for batch in batches for _ in batch]
    spent = sum(growth.at(length) for length in padded)
    how = f"to {fixed:,} tokens" if fixed else f"to the longest of {_BATCH} texts"
    return 1 - needed / spent, how


def fixed_padding(tokenizer: Any) -> int | None:
    """Tokens that the tokenizer's own file pads each text to; None where it pads to the longest, or not at all.

    Read from the file, since a call without padding makes transformers forget it.
    """
    file = Path(str(getattr(tokenizer, "name_or_path", ""))) / "tokenizer.json"
    if not file.is_file():
        return None
    strategy = (json.loads(file.read_text(encoding="utf-8")).get("padding") or {}).get("strategy")
    return int(strategy["Fixed"]) if isinstance(strategy, dict) and "Fixed" in strategy else None


def _int8_gain(blocks: list[Block]) -> float:
    """How many times faster than as it is the fastest int8 product of one of the model's sizes is here; at least 1."""
    last = (blocks[0].feed_forward or blocks[0].attention)[-1]
    matrix = last.matrix.detach()
    rows = torch.linspace(-1, 1, _ROWS * matrix.shape[1], device=matrix.device).view(_ROWS, -1)
    own_rows = rows.to(matrix.dtype)
    scales = matrix.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    weight = (matrix.float() / scales[:, None]).round().to(torch.int8)
    sums = weight.sum(dim=1, dtype=torch.int32)
    ways: dict[str, Callable[[], object]] = {"as it is": lambda: nn.functional.linear(own_rows, matrix)}
    for backend in int8_backends(matrix.device.type):
        ways[backend] = partial(int8_product, rows, weight, sums, scales, None, backend=backend)
    best_s = best_times(ways, matrix.device, num_runs=7)
    as_it_is = best_s.pop("as it is")
    return max(1.0, as_it_is / min(best_s.values()))


def _remedies(blocks: list[Block], products: list[Product], idle: float, int8: float, moved: int) -> tuple[Remedy, ...]:
    """Factors of arithmetic, of seconds for int8, and of traffic for fusion, whose least is the products' own.

    A bottleneck layer of MobileBERT's form works at a quarter of the width, with four feed-forward networks, and
    goes in and out of it: A / 16 + 4 B / 16 + 2 C C / 4 for attention A, network B and width C.
    """
    work = sum(product.work for product in products)
    light = float(work)
    for block in blocks:
        attention, network = (sum(product.work for product in part) for part in (block.attention, block.feed_forward))
        last = block.attention[-1]
        inside = (attention + _STACKED * network) / _BOTTLENECK**2
        light += inside + 2 * last.matrix.shape[0] ** 2 / _BOTTLENECK * last.rows - attention - network
    element = products[0].matrix.element_size()
    least = sum((product.rows * sum(product.matrix.shape) + product.matrix.numel()) * element for product in products)
    pruned = 1 / max(1e-6, 1 - idle)
    light_gain, fused = max(1.0, work / light), max(1.0, moved / least)
    return (
        Remedy("pruning", f"{pruned:.2f}x less arithmetic by leaving out what gives next to nothing", pruned),
        Remedy("quantization", f"its products {int8:.1f}x as fast in int8 on this machine, a byte a weight", int8),
        Remedy("lightweight-transformers", f"about {light_gain:.1f}x less arithmetic, trained anew", light_gain),
        Remedy("operator-fusion", f"up to {fused:.1f}x less memory traffic, same answers", fused),
    )


CHECKUP = ComputeCheckup()
