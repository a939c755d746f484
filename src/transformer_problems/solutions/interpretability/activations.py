"""Activations of chosen layers, gathered from a frozen model in batches."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.heads import check_key_mask
from transformer_problems.core.modes import evaluating
from transformer_problems.solutions.interpretability.answers import call
from transformer_problems.solutions.interpretability.readable import check_model_input
from transformer_problems.solutions.interpretability.sites import find_places, record


@torch.no_grad()
def collect_activations(
    model: nn.Module,
    tokens: Tensor,
    layers: Sequence[str],
    *,
    key_mask: Tensor | None = None,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """What layers give while a model answers in evaluation mode, on the CPU.

    The model sees one batch at a time, so that its device holds the activations of a single batch; those of all S
    sequences take S * N * C numbers a layer in the CPU's memory.

    Args:
        model: Any module whose layers give [B, N, C], or a tuple that begins with it; it is left as it was.
        tokens: Its input, S sequences.
        layers: Paths, as in `named_modules`, or patterns of them, as in fnmatch, e.g. ["body.blocks.*"].
        key_mask: True for real tokens, given on as `key_mask` or `attention_mask`, as the model takes it. Default all.
        batch_size: Sequences in a batch.

    Shape:
        tokens: [S, N]; key_mask: [S, N] bool; output: [S, N, C] by path.

    Raises:
        UnknownNameError: If a pattern matches no module.
        ArgumentError: If there are no sequences, the key mask does not fit them, or a token is not in the vocabulary
            of a model that `readable` can read.
        CombinationError: If a layer is not called exactly once in a pass, does not give [B, N, C], or the model takes
            no key mask.

    Source:
        Alain and Bengio 2016, arXiv:1610.01644, section 3: probes read the activations of a frozen model.

    Example:
        >>> import torch
        >>> from transformer_problems import Decoder, SelfAttention, collect_activations
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> found = collect_activations(model, torch.randint(100, (8, 12)), ["body.blocks.?"])
        >>> {path: list(x.shape) for path, x in found.items()}
        {'body.blocks.0': [8, 12, 32], 'body.blocks.1': [8, 12, 32]}
    """
    require_positive_int(batch_size=batch_size)
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or not len(tokens):
        got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ArgumentError(f"tokens must be a tensor of one sequence or more, [S, N]; got {got}.")
    check_model_input("tokens", tokens, model)
    check_key_mask(key_mask, tokens)
    places = find_places(model, layers)
    found: dict[str, Tensor] = {}
    with evaluating(model):
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            mask = None if key_mask is None else key_mask[rows]
            batch = record(places, partial(call, model, tokens[rows], mask))
            for place, x in zip(places, batch, strict=True):
                _check_hidden(place.site.path, x, len(tokens[rows]))
                if start == 0:
                    found[place.site.path] = x.new_empty(len(tokens), *x.shape[1:], device="cpu")
                found[place.site.path][rows] = x.cpu()
    return found


def _check_hidden(path: str, x: Tensor, num_sequences: int) -> None:
    if x.dim() != 3 or len(x) != num_sequences:
        raise CombinationError(
            f"a layer must give [{num_sequences}, N, C] for a batch of {num_sequences} sequences; {path} gave "
            f"{list(x.shape)}. Choose another module."
        )
