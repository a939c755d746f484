"""A monitor that any training loop can run under: what each layer's gradients, updates and attention do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn, optim
from torch.utils.hooks import RemovableHandle

from transformer_problems.core.arguments import require_positive_int
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.solutions.training.local_hook import LocalHook
from transformer_problems.solutions.training.monitor_alarms import Alarm, AlarmThresholds, find_alarms
from transformer_problems.solutions.training.monitor_layers import LayerRecord, longest_stack, named_layers, table
from transformer_problems.solutions.training.monitor_statistics import (
    AttentionReader,
    AttentionStatistics,
    attention_readers,
    holds_tokens,
    token_similarity,
    total_norm,
)

_USUAL = AlarmThresholds()


class TrainingMonitor:
    """Watches a training loop from hooks, layer by layer, and says what goes wrong in it.

    It hooks the forward passes of the layers and the optimizer's step, works at every `every`-th step only, and changes
    nothing: weights and random draws are bit for bit those of a training without it. `close`, or the end of the `with`
    block, removes every hook; records, alarms and report stay.

    A sample looks at the first forward pass with gradients of its step. It computes the scores again for at most two
    examples and 64 queries of each, reads the gradients as the optimizer gets them, that is after clipping, and holds a
    copy of the layers' trained weights while the optimizer steps.

    The token similarity is taken where there evidently are tokens: of layers that hold attention, and of outputs
    [B, N, C] of others that have a matrix of rows of C numbers, as every linear layer on tokens has.

    A copy of the model made meanwhile, also by pickle or torch.save, is not watched.

    Not seen are what happens between samples, a step that the loop gives up before the optimizer, and attention that is
    neither the `op` of a layer of this package nor nn.MultiheadAttention. An op is taken as a softmax over all keys
    that mask and causality allow, also where it looks at a window of them. Padding counts as tokens. Inside
    `checkpoint_layers` the token similarity is that of a segment's output. Under torch.compile the hooks break the
    graph, which costs speed and may round otherwise.

    Args:
        model: What is trained.
        optimizer: What trains it.
        every: Steps from one sample to the next; the first step is a sample.
        layers: Modules of the model, from first to last. Default the entries of the longest nn.ModuleList, or
            nn.Sequential of equal types, that does not itself lie in one of several entries.

    Raises:
        ArgumentError: If `every` is not positive, the model is none or has no such layers, or `layers` is empty or
            holds what is no module of the model.
        CombinationError: If the optimizer holds no parameter of the model.

    Source:
        Attention entropy: Zhai et al. 2023, arXiv:2303.06296, section 3; largest logit: Dehghani et al. 2023,
        arXiv:2302.05442, section 2; token similarity: Noci et al. 2022, arXiv:2206.03126, section 3.
        Differs from the papers: all are estimated on a few queries of a few examples.

    Example:
        >>> import torch
        >>> from transformer_problems import TrainingMonitor
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with TrainingMonitor(model, optimizer, every=5) as monitor:
        ...     for _ in range(10):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(2, 7, 16)).square().mean().backward()
        ...         optimizer.step()
        >>> [record.step for record in monitor.records if record.layer == "layers.0"]
        [0, 5]
        >>> print(monitor.report())  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        every: int = 20,
        layers: Iterable[nn.Module] | None = None,
    ) -> None:
        require_positive_int(every=every)
        _check_fit(model, optimizer)
        self.every = every
        self._layers = longest_stack(model) if layers is None else named_layers(model, layers)
        self._num_steps = 0
        self._sample: _Sample | None = _Sample()  # None in steps that are not sampled
        self._records: list[LayerRecord] = []
        self._hooks = self._attach(optimizer)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, by depth."""
        return tuple(self._layers)

    @property
    def records(self) -> tuple[LayerRecord, ...]:
        """What was sampled, by step, and within a step by depth."""
        return tuple(self._records)

    def alarms(self, thresholds: AlarmThresholds = _USUAL) -> list[Alarm]:
        """What went wrong so far, in the order in which it was first seen."""
        return find_alarms(self._records, thresholds)

    def report(self, thresholds: AlarmThresholds = _USUAL) -> str:
        """The last sample as a table by layer, then the alarms of all samples, one a line."""
        if not self._records:
            return "no step sampled yet"
        last = self._records[-len(self._layers) :]
        alarms = [str(alarm) for alarm in self.alarms(thresholds)] or ["no alarms"]
        return "\n".join([f"step {last[0].step}, every {self.every} steps", *table(last), "", *alarms])

    def close(self) -> None:
        """Remove every hook; once done, doing it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._sample = None  # lets go of the copies of a step that an error cut short

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __str__(self) -> str:
        return self.report()

    def _attach(self, optimizer: optim.Optimizer) -> list[RemovableHandle]:
        hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        homes: dict[nn.Module, list[str]] = {}
        readers: dict[nn.Module, AttentionReader] = {}
        for name, layer in self._layers.items():
            enter, leave = self._layer_hooks(name, layer)
            hooks.append(layer.register_forward_pre_hook(LocalHook(enter)))
            hooks.append(layer.register_forward_hook(LocalHook(leave)))
            for module, read in attention_readers(layer):
                readers[module] = read
                homes.setdefault(module, []).append(name)
        for module, read in readers.items():
            hook = LocalHook(self._attention_hook(read, homes[module]))
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return hooks

    def _layer_hooks(self, name: str, layer: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        batch_first = all(m.batch_first for m in layer.modules() if isinstance(m, nn.MultiheadAttention))

        def enter(module: nn.Module, inputs: Any) -> None:
            sample = self._sample
            if sample is not None and sample.awaits(name):
                sample.running.append(name)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            sample = self._sample
            if sample is not None and sample.running[-1:] == [name]:
                sample.running.pop()
                sample.similarity[name] = (
                    token_similarity(output, batch_first=batch_first) if holds_tokens(layer, output) else None
                )

        return enter, leave

    def _attention_hook(self, read: AttentionReader, homes: list[str]) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            sample = self._sample
            if sample is None:
                return
            at_work = homes if len(homes) == 1 else sample.running[-1:]  # several layers may share an op
            for name in filter(sample.awaits, at_work):
                statistics = read(*inputs, **keywords)
                if statistics is not None:
                    sample.attention.setdefault(name, []).append(statistics)

        return look

    def _before_step(self) -> None:
        if self._sample is None:
            return
        for name, layer in self._layers.items():
            numbers = [parameter for parameter in layer.parameters() if parameter.is_floating_point()]
            trained = [parameter for parameter in numbers if parameter.requires_grad]
            gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
            self._sample.gradient_norm[name] = total_norm(gradients) if gradients else None
            self._sample.size[name] = total_norm(numbers)
            self._sample.weights[name] = [(parameter, parameter.detach().clone()) for parameter in trained]

    def _after_step(self) -> None:
        if self._sample is not None:
            self._records += [self._sample.record(self._num_steps, name) for name in self._layers]
        self._num_steps += 1
        self._sample = _Sample() if self._num_steps % self.every == 0 else None


@dataclass(slots=True)
class _Sample:
    """What a step has shown so far, by layer; `running` are the layers inside whose forward pass we are."""

    running: list[str] = field(default_factory=list)
    similarity: dict[str, float | None] = field(default_factory=dict)
    attention: dict[str, list[AttentionStatistics]] = field(default_factory=dict)
    gradient_norm: dict[str, float | None] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)
    weights: dict[str, list[tuple[nn.Parameter, Tensor]]] = field(default_factory=dict)

    def awaits(self, layer: str) -> bool:
        """Whether a forward pass that reaches the layer now is the one to look at: no later one, no recomputation."""
        return torch.is_grad_enabled() and layer not in self.similarity

    def record(self, step: int, layer: str) -> LayerRecord:
        calls = self.attention.get(layer, [])
        return LayerRecord(
            step=step,
            layer=layer,
            gradient_norm=self.gradient_norm[layer],
            update_ratio=self._update_ratio(layer),
            largest_logit=max((call.largest_logit for call in calls), default=None),
            attention_entropy=_mean([call.entropy for call in calls]),
            attention_entropy_share=_mean([call.entropy_share for call in calls]),
            token_similarity=self.similarity.get(layer),
        )

    def _update_ratio(self, layer: str) -> float | None:
        weights, size = self.weights[layer], self.size[layer]
        if not weights or size == 0:
            return None
        return total_norm(after.detach() - before for after, before in weights) / size


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _check_fit(model: nn.Module, optimizer: optim.Optimizer) -> None:
    if not isinstance(model, nn.Module) or not isinstance(optimizer, optim.Optimizer):
        raise ArgumentError(
            f"model and optimizer must be an nn.Module and a torch.optim.Optimizer; got {type(model).__name__} and "
            f"{type(optimizer).__name__}. Pass TrainingMonitor(model, optimizer)."
        )
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in trained for parameter in model.parameters()):
        raise CombinationError(
            "optimizer must hold parameters of the model; it holds none of them. Pass the optimizer that trains it."
        )
