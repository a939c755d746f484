"""Which weights magnitude pruning and Wanda put to zero, and that they stay there."""

from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.adaptation.lora import LoRA
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.magnitude_pruning import MagnitudePruning
from transformer_problems.solutions.compression.wanda import Wanda

TOKENS = torch.arange(14).view(2, 7) % 11


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(11, 16, 2, lambda: SelfAttention(16, 2, is_causal=False)).eval()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


@pytest.mark.parametrize("scope", ["row", "layer", "model"])
def test_the_smallest_of_a_scope_are_zero_and_the_rest_as_they_were(scope: str) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight *= 10
    pruned = MagnitudePruning(0.5, scope=scope)(model)
    before = [model[i].weight.detach() for i in (0, 2)]
    after = [pruned[i].weight.detach() for i in (0, 2)]
    groups = {
        "row": [(b[None, i].abs(), a[None, i]) for b, a in zip(before, after, strict=True) for i in range(len(b))],
        "layer": [(b.abs(), a) for b, a in zip(before, after, strict=True)],
        "model": [(torch.cat([b.abs().flatten() for b in before]), torch.cat([a.flatten() for a in after]))],
    }[scope]
    for sizes, values in groups:
        zero = values == 0
        assert zero.sum() == sizes.numel() // 2
        assert sizes[zero].max() < sizes[~zero].min()
    assert all(torch.equal(a[a != 0], b[a != 0]) for b, a in zip(before, after, strict=True))


def test_a_pattern_has_its_zeros_in_every_group() -> None:
    pruned = MagnitudePruning(pattern=(2, 4))(network())
    for layer in (pruned[0], pruned[2]):
        assert ((layer.weight == 0).view(-1, 4).sum(dim=1) == 2).all()


def test_wanda_ranks_by_weight_times_what_reaches_it() -> None:
    model = network().double()
    inputs = [torch.randn(3, 5, 8, dtype=torch.float64) * torch.arange(8) for _ in range(2)]
    pruned = Wanda(inputs, 0.25)(model)
    reached = torch.cat(inputs).flatten(0, 1)
    for i, x in ((0, reached), (2, model[:2](reached))):
        scores = (model[i].weight.abs() * x.norm(dim=0)).detach()
        for row, values in zip(scores, pruned[i].weight, strict=True):
            assert {*torch.nonzero(values == 0).flatten().tolist()} == {*row.argsort()[: len(row) // 4].tolist()}


def test_zeros_stay_while_training_goes_on() -> None:
    pruned = MagnitudePruning(0.5)(network())
    zero = pruned[0].weight == 0
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1, weight_decay=0.1)
    pruned(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(pruned[0].weight == 0, zero)
    assert not pruned[0].weight.grad[zero].any() and pruned[0].weight.grad[~zero].abs().sum() > 0


@pytest.mark.parametrize("transform", [MagnitudePruning(0.5), Wanda([TOKENS], 0.5)])
def test_saved_and_read_back_outputs_are_equal_and_the_original_untouched(transform, tmp_path: Path) -> None:
    model = encoder()
    before = model(TOKENS)
    pruned = transform(model)
    assert torch.equal(model(TOKENS), before)
    assert not torch.equal(pruned(TOKENS), before)
    save_treated(pruned, tmp_path / "model.safetensors")
    assert torch.equal(load_treated(tmp_path / "model.safetensors", encoder(1), transform)(TOKENS), pruned(TOKENS))


def test_an_adapter_is_not_merged_into_zeros() -> None:
    adapted = LoRA(rank=2)(MagnitudePruning(0.5)(network()))
    with pytest.raises(CombinationError, match="whose zeros it would fill"):
        LoRA().merge(adapted)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MagnitudePruning(), ArgumentError, "one of sparsity and pattern must be given"),
        (lambda: MagnitudePruning(0.5, pattern=(2, 4)), ArgumentError, "one of sparsity and pattern"),
        (lambda: MagnitudePruning(1.0), ArgumentError, "sparsity must be a share"),
        (lambda: MagnitudePruning(pattern=(4, 4)), ArgumentError, "pattern must be"),
        (lambda: MagnitudePruning(0.5, scope="rows"), UnknownNameError, "unknown scope 'rows'. Nearest: row"),
        (lambda: MagnitudePruning(pattern=(1, 5))(network()), ArgumentError, r"pattern must divide .* for 0 with 8"),
        (lambda: Wanda([], 0.5)(network()), ArgumentError, "calibration must be a sequence"),
        (lambda: Wanda([torch.full((1, 8), float("nan"))], 0.5)(network()), ArgumentError, "what reaches 0 is not"),
    ],
)
def test_bad_arguments_are_refused(make, error, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_layer_that_no_input_reaches_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(ArgumentError, match=r"idle met no input. Pass skip=\('idle',\)"):
        Wanda([torch.ones(1, 4)], 0.5)(Idle())
    Wanda([torch.ones(1, 4)], 0.5, skip=("idle",))(Idle())
