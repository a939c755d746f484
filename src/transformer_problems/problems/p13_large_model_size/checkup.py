"""Could the model be stored smaller, and what does it take to fine-tune it?"""

from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.checkup import Visit, estimate, exactly
from transformer_problems.checkpoints.sizes import told_bytes
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.errors import CombinationError
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.problems.p13_large_model_size.matrices import matrices_of, rank_share, repeats

_NUM_MATRICES = 16  # whose singular values are computed
_RANK, _GROUP = 8, 64  # of LoRA, and weights that share a scale in int4
_NF4_BITS = 4.127  # a weight of NF4 with double quantization, arXiv:2305.14314, section 3
_MOMENTS = 2  # numbers that Adam keeps for a weight
_NUM_EXAMPLES, _LENGTH, _NUM_ROWS = 2, 64, 256
_UNCHANGED = 0.01  # of a layer's output, relative
_SHARES = tuple(step / 40 for step in range(1, 40))


class SizeCheckup:
    """Which part of each matrix's directions it uses, which matrices are there twice, and the bill of fine-tuning.

    Two thin factors of rank R hold R (m + n) numbers of m n, so a square matrix that needs less than half of its rank
    can be stored smaller without any training. With 99% of the energy, an output changes by about 10%.
    """

    problem = 13
    not_for: Mapping[Kind, str] = {}
    needs_floats = (
        "its linear layers hold int8 codes: it is stored smaller already, and a fine-tuning begins with the float model"
    )

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination:
        subject = visit.subject
        matrices = matrices_of(subject.model)
        inner = _of_layers(subject, matrices)
        num = min(len(inner), _NUM_MATRICES)
        sample = [inner[len(inner) * i // num] for i in range(num)]
        shares = []
        for done, name in enumerate(sample):
            shares.append(rank_share(matrices[name]))
            visit.progress(done / len(sample))
        twice = repeats(matrices)
        repeated = sum(map(_bytes, (matrices[name] for name in twice))) / max(1, subject.weight_bytes)
        bill = _Bill(subject, [matrices[name] for name in inner])
        zeroed = _share_to_zero(visit)
        rank = estimate(shares)
        return Examination(
            {"rank_share": rank, "duplicate_share": exactly(repeated)},
            f"{told_bytes(bill.stored)} ({told_bytes(bill.int4)} in int4), tuned in {told_bytes(bill.full)} or "
            f"{told_bytes(bill.lora)} with LoRA; matrices use {rank.value:.0%} of their rank",
            _remedies(subject, bill, zeroed),
            Curve(
                "Rank that holds 99% of a matrix, over its full rank",
                "matrix, first layer to last",
                "share of the rank",
                tuple(enumerate(shares)),
                {"two thin factors are as large": ((0, 0.5), (len(shares) - 1, 0.5))},
            ),
            {
                "stored_bytes": bill.stored,
                "int8_bytes": bill.int8,
                "int4_bytes": bill.int4,
                "lora_trainable_parameters": bill.adapters,
                "full_fine_tuning_bytes": bill.full,
                "lora_fine_tuning_bytes": bill.lora,
                "qlora_fine_tuning_bytes": bill.qlora,
                "zeroed_within_1_percent_share": zeroed,
            },
        )


class _Bill:
    """Bytes by formula: weights, and for those that learn a gradient and Adam's two moments; no activations."""

    def __init__(self, subject: Subject, inner: list[Tensor]) -> None:
        each = subject.dtype.itemsize
        rounded = sum(weight.numel() for weight in inner)
        rows = sum(weight.shape[0] for weight in inner)
        self.stored = subject.weight_bytes
        others = self.stored - sum(map(_bytes, inner))
        self.int8 = others + rounded + 4 * rows  # a float32 scale for each output
        # a scale and a zero of 16 bits each for a group, the last of a row counted whole
        self.int4 = others + sum(_int4_bytes(weight) for weight in inner)
        self.adapters = sum(_RANK * sum(weight.shape) for weight in inner if min(weight.shape) >= _RANK)
        self.full = self.stored * (2 + _MOMENTS)
        learning = self.adapters * each * (2 + _MOMENTS)
        self.lora = self.stored + learning
        self.qlora = others + round(rounded * _NF4_BITS / 8) + learning


def _int4_bytes(weight: Tensor) -> int:
    rows, columns = weight.shape
    return rows * ((columns + 1) // 2 + 4 * -(-columns // _GROUP))


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _of_layers(subject: Subject, matrices: dict[str, Tensor]) -> list[str]:
    """Names of the matrices of linear layers, but for those at the model's ends, which quantizers leave alone."""
    linear = {
        f"{path}.weight"
        for path, part in subject.model.named_modules()
        if _is_linear(part) and part is not _head(subject.model)
    }
    return [name for name in matrices if name in linear]


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"  # GPT-2's linear layer, transposed


def _head(model: nn.Module) -> nn.Module | None:
    found: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return found


def _share_to_zero(visit: Visit) -> float:
    """The share of smallest weights that may go until a linear layer's output changes by 1%, median of a few layers."""
    head = _head(visit.subject.model)
    linears = [part for part in visit.subject.model.modules() if _is_linear(part) and part is not head]
    chosen = [linears[len(linears) * (2 * i + 1) // 8] for i in range(4)]
    seen: dict[nn.Module, Tensor] = {}

    def keep(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[part] = inputs[0].detach().flatten(0, -2)[:_NUM_ROWS].float()

    hooks = [part.register_forward_pre_hook(keep) for part in set(chosen)]
    try:
        visit.subject.run(visit.inputs(_NUM_EXAMPLES, _LENGTH))
    finally:
        for hook in hooks:
            hook.remove()
    return median(_unchanged_share(part, x) for part, x in seen.items())


def _unchanged_share(part: nn.Module, x: Tensor) -> float:
    weight = part.get_parameter("weight").detach().float()
    weight = weight.mT if isinstance(part, nn.Linear) else weight  # [I, O]
    output = x @ weight
    ranked = weight.abs().flatten().sort().values
    most = 0.0
    for share in _SHARES:
        small = weight.abs() <= ranked[int(share * (len(ranked) - 1))]
        if float((x @ (weight * small)).norm() / output.norm().clamp(min=1e-30)) > _UNCHANGED:
            break
        most = share
    return most


def _remedies(subject: Subject, bill: _Bill, zeroed: float) -> tuple[Remedy, ...]:
    adapters = told_bytes(bill.adapters * subject.dtype.itemsize)
    # a sparse file holds a weight and its column in 16 bits each, so it is smaller where fewer than half are left
    sparse = max(1.0, subject.dtype.itemsize / ((1 - zeroed) * (subject.dtype.itemsize + 2)))
    told = f"{zeroed:.0%} of the weights can go before an output changes by 1%"
    return (
        Remedy(
            "qlora",
            f"fine-tuned in {told_bytes(bill.qlora)} in place of {told_bytes(bill.full)}",
            bill.full / bill.qlora,
        ),
        Remedy(
            "lora", f"fine-tuned in {told_bytes(bill.lora)}; {adapters} stored for each task", bill.full / bill.lora
        ),
        Remedy("pruning", told, sparse),
        *_of_fewer_layers(subject),
    )


def _of_fewer_layers(subject: Subject) -> tuple[Remedy, ...]:
    """What is saved where each layer has weights of its own."""
    try:
        layers = [[tuple(weight.shape) for weight in layer.parameters()] for layer in subject.layers]
    except CombinationError:
        return ()
    held = sum(_bytes(weight) for layer in subject.layers for weight in layer.parameters())
    halved = subject.weight_bytes / (subject.weight_bytes - held / 2)
    half = Remedy("distillation", f"half of the layers: {halved:.1f}x smaller, taught by this model", halved)
    if any(layer != layers[0] for layer in layers):  # stages of different widths cannot share
        return (half,)
    shared = subject.weight_bytes / (subject.weight_bytes - held + held / len(layers))
    return half, Remedy("parameter-sharing", f"all layers stored once: {shared:.1f}x smaller, trained anew", shared)


CHECKUP = SizeCheckup()
