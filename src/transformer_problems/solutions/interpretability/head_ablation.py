"""Head ablation: what a model does without chosen attention heads."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import shown
from transformer_problems.core.modes import evaluating
from transformer_problems.solutions.interpretability.readable import check_model_input
from transformer_problems.solutions.interpretability.sites import Site, find_places, record


@contextmanager
def ablate_heads(model: nn.Module, heads: Sequence[Site], *, mean_over: Tensor | None = None) -> Iterator[None]:
    """Inside, what heads give to their output projection is zero, or its mean over a reference input.

    Zero takes away what a head says and what it always says alike, so that later layers may meet what they never met;
    the mean leaves in what the head says whatever it reads, and takes away what depends on the input. Training under it
    works: heads cut receive no gradient. Afterwards the model is as it was.

    Args:
        model: With attention layers whose heads are equal slices of what an output projection reads: SelfAttention, or
            attention of transformers with out_proj, o_proj, c_proj or dense.
        heads: Sites with a head each, whose path may be a pattern of several layers.
        mean_over: Input that the model answers once, in evaluation mode; each head is put at its mean over these
            sequences and positions. Default none: heads are put at zero.

    Raises:
        UnknownNameError: If a path or pattern matches no attention layer.
        ArgumentError: If there are no heads, one is out of range, a site has none, or there is nothing to take a mean
            over, or a token that is not in the vocabulary of a model that `readable` can read.
        CombinationError: If the model has no such attention layers, or for a mean one is not called exactly once.

    Source:
        Michel et al. 2019, arXiv:1905.10650, section 2, for zero; Wang et al. 2022, arXiv:2211.00593, section 2, for
        the mean. Differs from the latter: the mean is over positions too.

    Example:
        >>> import torch
        >>> from transformer_problems import Decoder, SelfAttention, Site, ablate_heads
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> tokens = torch.randint(100, (1, 12))
        >>> with ablate_heads(model, [Site("body.blocks.0.mixer", head=2)]):
        ...     without = model(tokens)
        >>> torch.equal(without, model(tokens))
        False
    """
    places = find_places(model, heads)
    for place in places:
        if place.site.head is None:
            raise ArgumentError(
                f"heads must be sites with a head each; got {place.site.path} without. Write Site(path, head=0)."
            )
    if mean_over is None:
        fixed = [torch.zeros(()) for _ in places]
    else:
        if not isinstance(mean_over, Tensor) or not mean_over.numel():
            raise ArgumentError(
                f"mean_over must be a tensor of one sequence or more; got {shown(mean_over)}. Leave it out for zero."
            )
        check_model_input("mean_over", mean_over, model)
        with torch.no_grad(), evaluating(model):
            fixed = [x.flatten(0, -2).mean(dim=0) for x in record(places, lambda: model(mean_over))]
    with ExitStack() as hooks:
        for place, value in zip(places, fixed, strict=True):
            hooks.enter_context(place.watch(partial(_in_place_of, value)))
        yield


def _in_place_of(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x).expand_as(x)
