"""Probing: can a property be read from a layer, beyond what a probe would memorise of any property?"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from transformer_problems.core.arguments import (
    require_finite,
    require_not_negative,
    require_positive,
    require_positive_int,
)
from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.inputs import shown
from transformer_problems.core.seeding import generator


@dataclass(frozen=True, slots=True)
class ProbeScores:
    """How well a probe does on held-out sequences, as shares of their labelled tokens.

    Args:
        accuracy: At the property.
        control_accuracy: At random labels of token types, which only memory of the types can give.
        majority_accuracy: Of the answer that is most common in training, whatever the layer says.
    """

    accuracy: float
    control_accuracy: float
    majority_accuracy: float

    @property
    def selectivity(self) -> float:
        """Accuracy at the property less that at the control task."""
        return self.accuracy - self.control_accuracy


def probe(
    activations: Mapping[str, Tensor],
    labels: Tensor,
    tokens: Tensor,
    *,
    held_out: float = 0.25,
    penalty: float = 1.0,
    num_controls: int = 3,
    seed: int = 0,
) -> dict[str, ProbeScores]:
    """Train a linear probe on each layer, and the same probe on control tasks; score both on held-out sequences.

    A control task gives each token type one random label, drawn as often as the property has it, and keeps it wherever
    the token stands: nothing in the model can know it, so what a probe scores there it has memorised. A layer holds a
    property in so far as the probe is selective: good at the property and bad at the control. The probe is logistic
    regression on activations of zero mean and unit variance. That a property can be read does not mean that the model
    uses it.

    Args:
        activations: Of each layer by name, as `collect_activations` gives them.
        labels: Of each token, from 0; a negative one, such as -100, leaves the token out.
        tokens: Types that the control tasks label.
        held_out: Share of the sequences that the probe is scored on, drawn by the seed; one at least.
        penalty: Weight of the squared norm of the probe's weights. A greater one leaves less room to memorise.
        num_controls: Control tasks, whose accuracies are averaged.
        seed: Of the split and of the control tasks.

    Shape:
        activations: [S, N, C] each; labels, tokens: [S, N] whole numbers.

    Returns:
        Scores by layer.

    Raises:
        ArgumentError: If shapes do not fit, activations are not finite, or the training sequences lack labels, have
            only one class or one token type, or no held-out token has a label.

    Source:
        Hewitt and Liang 2019, arXiv:1909.03368, sections 2 and 3.
        Differs from the paper: the probe is linear only; several control tasks are averaged.

    Example:
        >>> import torch
        >>> from transformer_problems import probe
        >>> tokens, labels = torch.randint(50, (40, 10)), torch.randint(2, (40, 10))
        >>> knowing = torch.nn.functional.one_hot(labels, 8) + 0.1 * torch.randn(40, 10, 8)
        >>> scores = probe({"layer 1": knowing, "layer 2": torch.randn(40, 10, 8)}, labels, tokens)
        >>> scores["layer 1"].selectivity > 0.3 > scores["layer 2"].selectivity
        True
    """
    require_positive(penalty=penalty)
    require_finite(penalty=penalty)
    require_positive_int(num_controls=num_controls)
    require_not_negative(seed=seed)
    _check(activations, labels, tokens, held_out)
    labels, tokens = labels.cpu(), tokens.cpu()
    training, testing = _split(labels, held_out, seed)
    own = labels[training]
    most_common = own.bincount().argmax()
    controls = _control_tasks(tokens, own, training, num_controls, seed)
    scores = {}
    for layer, x in activations.items():
        x = x.detach().cpu()
        seen, unseen = x[training].double().numpy(), x[testing].double().numpy()

        def accuracy(task: Tensor, seen: np.ndarray = seen, unseen: np.ndarray = unseen) -> float:
            classifier = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=1000))
            classifier.fit(seen, task[training].numpy())
            return float(classifier.score(unseen, task[testing].numpy()))

        scores[layer] = ProbeScores(
            accuracy=accuracy(labels),
            control_accuracy=sum(map(accuracy, controls)) / num_controls,
            majority_accuracy=float((labels[testing] == most_common).double().mean()),
        )
    return scores


def _split(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labelled tokens of training and of held-out sequences, [S, N] bool each."""
    num_sequences = len(labels)
    num_held_out = min(max(1, round(held_out * num_sequences)), num_sequences - 1)
    is_held_out = torch.zeros(num_sequences, 1, dtype=torch.bool)
    is_held_out[torch.randperm(num_sequences, generator=generator(seed, "split"))[:num_held_out]] = True
    labelled = labels >= 0
    training, testing = labelled & ~is_held_out, labelled & is_held_out
    num_classes = len(labels[training].unique())
    if num_classes < 2:
        raise ArgumentError(
            f"labels must hold two classes at least among the training sequences; got {num_classes}. Label more "
            "sequences."
        )
    if not testing.any():
        raise ArgumentError("labels must reach the held-out sequences; got none there. Label more sequences.")
    return training, testing


def _control_tasks(tokens: Tensor, own: Tensor, training: Tensor, num_controls: int, seed: int) -> list[Tensor]:
    """Labels [S, N] that depend on the token's type alone, at random; two or more in training."""
    types, places = tokens.unique(return_inverse=True)
    if len(tokens[training].unique()) < 2:
        raise ArgumentError(
            "tokens must be of two types at least among the training sequences, for the control tasks to tell apart; "
            "got one. Give the types that the labels belong to."
        )
    shares = own.bincount().double()
    draws = generator(seed, "controls")
    tasks: list[Tensor] = []
    while len(tasks) < num_controls:
        task = shares.multinomial(len(types), replacement=True, generator=draws)[places]
        if len(task[training].unique()) > 1:
            tasks.append(task)
    return tasks


def _check(activations: Mapping[str, Tensor], labels: Tensor, tokens: Tensor, held_out: float) -> None:
    if not isinstance(held_out, Real) or not 0 < held_out < 1:
        raise ArgumentError(f"held_out must be a share between 0 and 1; got {held_out}. Choose 0.25.")
    if not _is_whole(labels) or labels.dim() != 2:
        raise ArgumentError(
            f"labels must be whole numbers [S, N]; got {shown(labels)}. Give one of a sequence as labels[:, None]."
        )
    if not _is_whole(tokens) or tokens.shape != labels.shape:
        raise ArgumentError(
            f"tokens must be whole numbers {list(labels.shape)}, as labels are; got {shown(tokens)}. Give what the "
            "model read."
        )
    if len(labels) < 2:
        raise ArgumentError("labels must be of two sequences at least, one of them to be held out; got one.")
    if not isinstance(activations, Mapping) or not activations:
        raise ArgumentError("activations must map names of layers to tensors; got none. Use collect_activations.")
    for layer, x in activations.items():
        fits = isinstance(x, Tensor) and x.dim() == 3 and x.shape[:2] == labels.shape and x.shape[2]
        if not fits or x.is_complex():
            raise ArgumentError(
                f"activations must be real numbers [{labels.shape[0]}, {labels.shape[1]}, C], for labels "
                f"{list(labels.shape)}; {layer} is {shown(x)}. Collect them from the same tokens."
            )
        if not bool(x[(labels >= 0).to(x.device)].isfinite().all()):
            raise ArgumentError(f"activations must be finite; {layer} holds NaN or infinity.")


def _is_whole(x: object) -> bool:
    return isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
