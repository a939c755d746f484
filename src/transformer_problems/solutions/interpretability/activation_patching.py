"""Activation patching: which activations carry what makes one input's answer differ from another's."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.inputs import shown
from transformer_problems.core.modes import evaluating
from transformer_problems.solutions.interpretability.answers import answer
from transformer_problems.solutions.interpretability.readable import check_model_input
from transformer_problems.solutions.interpretability.sites import Place, Site, find_places, record


@dataclass(frozen=True, slots=True)
class PatchEffects:
    """What each activation restores.

    Args:
        restored: Share of the metric's difference that a patch restores, [sites, positions]: 0 as corrupted, 1 as
            clean; below 0 or above 1 where a patch does more than that.
        sites: Of the rows.
        positions: Of the columns.
        clean: The metric of the clean input.
        corrupted: That of the corrupted one.
    """

    restored: Tensor
    sites: tuple[Site, ...]
    positions: tuple[int, ...]
    clean: float
    corrupted: float


@torch.no_grad()
def activation_patching(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    metric: Callable[[Tensor], Tensor | float],
    sites: Sequence[Site | str],
    *,
    positions: Sequence[int] | None = None,
    batch_size: int = 64,
) -> PatchEffects:
    """Run the corrupted input with one activation at a time taken from the clean run; how much of the answer is back?

    Where a patch restores the metric, what the inputs differ in passes through that activation. One pass over the clean
    input, one over the corrupted, then sites * positions more of the corrupted, several in a batch. The clean
    activations of all sites are held at once.

    Args:
        model: Any module; it answers in evaluation mode and is left as it was.
        clean: Input with the answer that is looked for, one sequence or a batch of them.
        corrupted: The same, changed in what matters, position by position.
        metric: Of the model's output for these B sequences, one number: such as the difference of two logits.
        sites: Modules by path or pattern, or heads of attention layers.
        positions: Where to patch. Default everywhere.
        batch_size: Sequences in one pass, of which B go to each patch.

    Shape:
        clean, corrupted: [B, N, ...]; activations: [B, N, C].

    Raises:
        UnknownNameError: If a path or pattern matches nothing.
        ArgumentError: If the inputs differ in shape, a token is not in the vocabulary of a model that `readable` can
            read, a position or head is out of range, the metric is no finite number, or it is the same for both inputs.
        CombinationError: If a module is not called exactly once in a pass, or gives no [B, N, C].

    Source:
        Meng et al. 2022, arXiv:2202.05262, section 2. Differs from the paper: the corrupted input is given, not made
        with noise; the effect is a share of the whole difference.

    Example:
        >>> import torch
        >>> from transformer_problems import Decoder, SelfAttention, activation_patching
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> clean, corrupted = torch.tensor([[7, 42, 3]]), torch.tensor([[7, 99, 3]])
        >>> def metric(logits):
        ...     return logits[:, -1, 5].mean()
        >>> effects = activation_patching(model, clean, corrupted, metric, ["body.embedding", "body.blocks.*.mixer"])
        >>> effects.restored.shape  # rows: the embedding and two layers; columns: the three positions
        torch.Size([3, 3])
    """
    require_positive_int(batch_size=batch_size)
    tensors = isinstance(clean, Tensor) and isinstance(corrupted, Tensor)
    if not tensors or clean.shape != corrupted.shape or clean.dim() < 2 or not clean.numel():
        raise ArgumentError(
            f"clean and corrupted must be tensors of one shape, [B, N]; got {shown(clean)} and {shown(corrupted)}. "
            "Change tokens in their place."
        )
    check_model_input("clean", clean, model)
    check_model_input("corrupted", corrupted, model)
    if not callable(metric):
        raise ArgumentError(
            f"metric must be a function of the model's output; got {shown(metric)}. Write one that gives a number."
        )
    where = _checked_positions(positions, clean.shape[1])
    places = find_places(model, sites)
    with evaluating(model):
        outputs: list[Tensor] = []
        kept = record(places, lambda: outputs.append(answer(model(clean))))
        for place, activation in zip(places, kept, strict=True):
            _check_activation(place, activation, clean)
        best = _number(metric, outputs[0])
        worst = _number(metric, answer(model(corrupted)))
        noise = 8 * torch.finfo(outputs[0].dtype).eps * max(abs(best), abs(worst))
        if abs(best - worst) <= noise:
            raise ArgumentError(
                f"metric must differ between clean and corrupted; got {best:g} for both. Choose another corruption, or "
                "a metric of what it changes."
            )
        rows = [
            _patched(model, corrupted, metric, place, activation, where, max(1, batch_size // len(clean)))
            for place, activation in zip(places, kept, strict=True)
        ]
    restored = (torch.tensor(rows, dtype=torch.float64) - worst) / (best - worst)
    return PatchEffects(restored, tuple(place.site for place in places), where, best, worst)


def _patched(
    model: nn.Module,
    corrupted: Tensor,
    metric: Callable[[Tensor], Tensor | float],
    place: Place,
    clean: Tensor,
    positions: tuple[int, ...],
    num_at_once: int,
) -> list[float]:
    """The metric with the clean activation at each position in turn."""
    metrics: list[float] = []
    num_sequences = len(corrupted)
    for start in range(0, len(positions), num_at_once):
        chunk = positions[start : start + num_at_once]
        columns = torch.tensor(chunk, device=clean.device).repeat_interleave(num_sequences)
        rows = torch.arange(len(columns), device=clean.device)

        def patch(x: Tensor, rows: Tensor = rows, columns: Tensor = columns) -> Tensor:
            x = x.clone()
            x[rows, columns] = clean[rows % num_sequences, columns]
            return x

        copies = corrupted.repeat(len(chunk), *(1,) * (corrupted.dim() - 1))
        with place.watch(patch):
            output = answer(model(copies))
        metrics += [_number(metric, part) for part in output.split(num_sequences)]
    return metrics


def _number(metric: Callable[[Tensor], Tensor | float], output: Tensor) -> float:
    value = metric(output)
    is_number = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if not (is_number or isinstance(value, Real)) or not math.isfinite(float(value)):
        got = shown(value) if not is_number else f"{float(value)}"
        raise ArgumentError(f"metric must give one finite number for the batch; got {got}. Take the mean over it.")
    return float(value)


def _checked_positions(positions: Sequence[int] | None, num_tokens: int) -> tuple[int, ...]:
    if positions is None:
        return tuple(range(num_tokens))
    for position in positions if isinstance(positions, Iterable) else [positions]:
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < num_tokens:
            raise ArgumentError(
                f"positions must be whole numbers from 0 to {num_tokens - 1}; got {position!r}. Count from the front."
            )
    if isinstance(positions, int) or not positions:
        raise ArgumentError(f"positions must hold one position at least; got {positions!r}. Leave them out for all.")
    return tuple(positions)


def _check_activation(place: Place, activation: Tensor, inputs: Tensor) -> None:
    if activation.dim() < 3 or activation.shape[:2] != inputs.shape[:2]:
        raise CombinationError(
            f"an activation must be [{inputs.shape[0]}, {inputs.shape[1]}, C] to be patched by position; "
            f"{place.site.path} gave {list(activation.shape)}. Choose another module."
        )
