"""What every transform of a model shares: copies, order, shared weights, stored bytes, files."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError, OutputError
from transformer_problems.core.transforms import (
    Chain,
    TransformKind,
    replace_linears,
    stored_bytes,
    treated_copy,
)
from transformer_problems.core.treated_files import load_treated, save_treated


class Halved(nn.Module):
    made_by = "quantize"

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(outputs, inputs, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype))


class Halve:
    """Stores every weight in float16 and forgets the bias."""

    def __init__(self, kind: TransformKind = "quantize") -> None:
        self.kind = kind

    def __call__(self, model: nn.Module) -> nn.Module:
        treated = treated_copy(model, self)
        replace_linears(treated, self._make)
        return treated

    def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        return self(model)

    def __repr__(self) -> str:
        return "Halve()"

    @staticmethod
    def _make(path: str, layer: nn.Linear) -> nn.Module:
        made = Halved(layer.in_features, layer.out_features)
        made.codes.copy_(layer.weight.detach())
        return made


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Sequential(nn.Linear(5, 2)))


def test_a_treated_copy_leaves_the_original_as_it_was() -> None:
    model, x = network(), torch.randn(4, 3)
    before = model(x)
    treated = Halve()(model)
    assert isinstance(treated[0], Halved) and isinstance(treated[2][0], Halved)
    treated[0].codes.zero_()
    assert torch.equal(model(x), before)
    assert stored_bytes(model) == 4 * (15 + 5 + 10 + 2)
    assert stored_bytes(treated) == 2 * 25


def test_a_layer_under_two_names_is_made_once_and_stays_shared() -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    treated = Halve()(model)
    assert treated["a"] is treated["b"][0]
    assert stored_bytes(treated) == 2 * 9


@pytest.mark.parametrize(
    ("first", "second"),
    [("quantize", "prune"), ("adapt", "quantize"), ("quantize", "quantize"), ("fuse", "prune"), ("prune", "share")],
)
def test_meaningless_chains_are_refused_with_the_reason(first: TransformKind, second: TransformKind) -> None:
    with pytest.raises(CombinationError, match="Halve makes no sense after Halve: .*[.]$"):
        Chain(Halve(first), Halve(second))


def test_the_reason_is_the_same_on_a_model_that_was_treated_before() -> None:
    with pytest.raises(CombinationError, match="Halve makes no sense on 0, a Halved: its weights are codes already"):
        Halve()(Halve()(network()))


def test_sensible_chains_run_in_order() -> None:
    class Add:
        kind: TransformKind = "prune"

        def __call__(self, model: nn.Module) -> nn.Module:
            treated = treated_copy(model, self)
            with torch.no_grad():
                treated[0].weight.add_(1)
            return treated

        def rebuild(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
            return self(model)

    model = network()
    treated = Chain(Add(), Halve())(model)
    assert torch.equal(treated[0].codes, (model[0].weight + 1).detach().half())
    with pytest.raises(ArgumentError, match="transforms must hold one"):
        Chain()


def test_shared_weights_are_refused_unless_skipped() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4), "other": nn.Linear(3, 3)})
    model["head"].weight = model["embedding"].weight
    with pytest.raises(ArgumentError, match=r"head and embedding share theirs.*Pass skip=\('head',\) or untie"):
        Halve()(model)
    copy = treated_copy(model, Halve())
    assert replace_linears(copy, Halve._make, skip=("head",)) == ["other"]
    assert copy["head"].weight is copy["embedding"].weight


def test_an_attention_that_reads_its_output_layers_weight_keeps_it() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    copy = treated_copy(model, Halve())
    assert replace_linears(copy, Halve._make) == ["linear1", "linear2"]


@pytest.mark.parametrize(
    ("skip", "words"), [(("hed",), "unknown layer to skip 'hed'. Known: 0, 2.0"), ("0", r"Write \('0',\)")]
)
def test_patterns_that_name_nothing_are_refused(skip: tuple[str, ...], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        replace_linears(network(), Halve._make, skip=skip)


def test_nothing_to_replace_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"model must hold a torch\.nn\.Linear"):
        Halve()(nn.Sequential(nn.ReLU()))
    with pytest.raises(ArgumentError, match="must hold a torch.nn.Linear that is not skipped"):
        replace_linears(network(), Halve._make, skip=("*",))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = network()
    with torch.no_grad():
        model[2][0].bias[1] = value
    with pytest.raises(ArgumentError, match=r"weights must be finite; 2\.0\.bias holds NaN or infinity"):
        Halve()(model)
    with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module; got dict"):
        treated_copy({}, Halve())


def test_a_saved_model_comes_back_with_equal_outputs(tmp_path: Path) -> None:
    treated, x = Halve()(network()), torch.randn(4, 3)
    size = save_treated(treated, tmp_path / "model.safetensors")
    assert 2 * 25 < size == (tmp_path / "model.safetensors").stat().st_size
    fresh = network(seed=1)
    before = fresh(x)
    assert torch.equal(load_treated(tmp_path / "model.safetensors", fresh, Halve())(x), treated(x))
    assert torch.equal(fresh(x), before)


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_treated(Halve()(network()), path)
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[:5], b"", b"PK\3\4 a pickle"):
        path.write_bytes(damaged)
        with pytest.raises(ArgumentError, match=r"path must be a whole safetensors file; got .*Save it again"):
            load_treated(path, network(), Halve())
    with pytest.raises(ArgumentError, match="path must be a whole safetensors file"):
        load_treated(tmp_path / "missing", network(), Halve())
    path.write_bytes(whole)
    with pytest.raises(ArgumentError, match=r"must hold a Sequential treated by Halve\(\)"):
        load_treated(path, nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)), Halve())
    with pytest.raises(OutputError, match="path must be writable"):
        save_treated(network(), tmp_path / "no folder" / "model.safetensors")
