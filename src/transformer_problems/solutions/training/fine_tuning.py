"""Fine-tuning: all of a trained model learns on, the lower layers more slowly or later than the upper ones."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from transformer_problems.core.arguments import require_positive, require_positive_int, require_share
from transformer_problems.solutions.training.monitor_layers import longest_stack, named_layers
from transformer_problems.solutions.training.recipe import ParameterGroups


def layerwise_learning_rates(decay: float = 0.75, *, layers: Iterable[nn.Module] | None = None) -> ParameterGroups:
    """Learning rate = peak * decay^depth from the top: 0 for the head, 1 for the last layer, L + 1 for the embedding.

    Low layers hold what is general, which a new task should change least; the head knows nothing of the task yet.
    What a model registers before its layers counts as embedding, what after them as head, a final norm included; an
    nn.Parameter of the model's own, outside any module of it, as embedding wherever it stands, for PyTorch keeps no
    order between parameters and modules: put one of the head's into a module. An embedding whose weights are the head's
    too counts as embedding, and layers that share weights as the lowest of them.

    Args:
        decay: Ratio of a layer's rate to that of the layer above.
        layers: Modules of the model, from first to last. Default the entries of the longest nn.ModuleList, or
            nn.Sequential of equal types.

    Raises:
        ArgumentError: If the decay is not above 0 and at most 1; at the start of training, if the model has no layers
            or not those.

    Source:
        Howard and Ruder 2018, arXiv:1801.06146, section 3.2.
        Differs from the paper: its decay is 1 / 2.6; 0.75 is that of He et al. 2021, arXiv:2111.06377, table 9.

    Example:
        >>> import torch
        >>> from transformer_problems import TrainingRecipe, adamw, layerwise_learning_rates
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> course = TrainingRecipe(adamw(1e-3, groups=layerwise_learning_rates(0.5))).start(model, num_steps=100)
        >>> [group["lr"] for group in course.optimizer.param_groups]  # of the last layer, and of those below it
        [0.0005, 0.00025, 0.000125]
    """
    require_positive(decay=decay)
    require_share(decay=decay)
    listed = None if layers is None else list(layers)

    def groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "lr": learning_rate * decay**depth}
            for depth, parameters in enumerate(_from_the_top(model, listed))
            if parameters
        ]

    return groups


class GradualUnfreezing:
    """A regulator: first the head learns alone, then, every so many steps, one more layer from the top.

    A head that starts from nothing sends gradients of no meaning down; by the time a layer learns, what stands above
    it gives it better ones. What counts as head and embedding is as for `layerwise_learning_rates`; where nothing
    follows the layers, the last of them is first.

    Every parameter's `requires_grad` is set before each step, also that of parameters frozen for another reason. The
    optimizer may hold all of them from the start: a frozen one has no gradient, and Adam passes it over, decay and
    averages included. In a loop of your own clear gradients with `set_to_none=True`, as is PyTorch's default: at a
    gradient of zero Adam would move it on.

    Args:
        steps_per_layer: Steps from one layer to the next.
        layers: As for `layerwise_learning_rates`.

    Raises:
        ArgumentError: If the number of steps is not positive; at the start of training, if the model has no layers or
            not those.

    Source:
        Howard and Ruder 2018, arXiv:1801.06146, section 3.3. Differs from the paper: steps in place of an epoch.

    Example:
        >>> import torch
        >>> from transformer_problems import GradualUnfreezing, TrainingRecipe, adamw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> course = TrainingRecipe(adamw(1e-3), regulators=(GradualUnfreezing(50),)).start(model, num_steps=100)
        >>> [parameter.requires_grad for parameter in model.parameters()]
        [False, False, True, True]
    """

    def __init__(self, steps_per_layer: int, *, layers: Iterable[nn.Module] | None = None) -> None:
        require_positive_int(steps_per_layer=steps_per_layer)
        self.steps_per_layer = steps_per_layer
        self.layers = None if layers is None else list(layers)

    def __call__(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Freeze and unfreeze for a step, counted from 0."""
        num_learning = 1 + step // self.steps_per_layer
        parts = [parameters for parameters in _from_the_top(model, self.layers) if parameters]
        for i, parameters in enumerate(parts):
            for parameter in parameters:
                parameter.requires_grad_(i < num_learning)


def _from_the_top(model: nn.Module, layers: list[nn.Module] | None) -> list[list[nn.Parameter]]:
    """The parameters of the head, of each layer from the last to the first, and of the embedding."""
    names = list(longest_stack(model) if layers is None else named_layers(model, layers))
    parts: list[list[nn.Parameter]] = [[] for _ in range(len(names) + 2)]
    outside = len(names) + 1  # the embedding; the head once a layer has come by
    for name, parameter in model.named_parameters():
        layer = next((i for i, start in enumerate(names) if name.startswith(f"{start}.")), None)
        if layer is not None:
            outside = 0
        parts[outside if layer is None else len(names) - layer].append(parameter)
    return parts
