"""Models with their batch norms folded answer as before, in float64 too; what cannot be folded is refused by name."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.core.transforms import Chain
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.kernels.linear import Linear
from transformer_problems.lab.meters.kernels import count_kernels
from transformer_problems.models.mobilevit import MobileViT, MobileViTStage
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.int8 import Int8Linear, QuantizeInt8
from transformer_problems.solutions.compression.magnitude_pruning import MagnitudePruning
from transformer_problems.solutions.deployment.fold_batch_norms import FoldBatchNorms, FoldedNorm
from transformer_problems.solutions.deployment.fused_projections import FuseProjections
from transformer_problems.solutions.tokens.conformer import ConformerBlock
from transformer_problems.solutions.tokens.convolutional_stem import ConvolutionalStem
from transformer_problems.solutions.tokens.inverted_residual import InvertedResidual


def filled(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with weights and statistics by which every part of a norm counts."""
    torch.manual_seed(0)
    model.double().eval()
    for norm in (part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)):
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.1, 3.0)
    return model


def vision(**options: int) -> MobileViT:
    stages = (MobileViTStage(8, stride=1), MobileViTStage(10, embed_dim=12, num_layers=1, num_heads=3))
    return MobileViT(stages, 5, stem_channels=8, expansion=2, **options)


def pair(layer: nn.Module, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, norm, nn.SiLU())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: pair(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4)),
    "our Linear": (lambda: pair(Linear(4, 6, bias=False), nn.BatchNorm1d(6)), (3, 4)),
    "Conv1d": (lambda: pair(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (3, 4, 9)),
    "Conv2d": (lambda: pair(nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)), (3, 4, 9, 8)),
    "groups": (lambda: pair(nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.BatchNorm2d(8)), (3, 4, 5, 4)),
    "circular": (
        lambda: pair(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6)),
        (3, 4, 5, 4),
    ),
    "Conv3d": (lambda: pair(nn.Conv3d(4, 6, (1, 2, 3)), nn.BatchNorm3d(6)), (3, 4, 3, 4, 5)),
    "no weights": (lambda: pair(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)), (3, 4, 5, 4)),
    "eps": (lambda: pair(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, eps=0.5, momentum=None)), (3, 4, 5, 4)),
    "stem": (lambda: ConvolutionalStem(8, 2), (2, 3, 12, 9)),
    "inverted residual": (lambda: InvertedResidual(4, 4), (2, 4, 6, 5)),
    "MobileViT": (vision, (2, 3, 20, 18)),
}


def in_formula(layer: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """What the norm says of the layer's output, channel by channel."""
    y = layer(x)
    one = [1, -1, *[1] * (y.dim() - 2)]
    weight = norm.weight if norm.affine else torch.ones_like(norm.running_mean)
    bias = norm.bias if norm.affine else torch.zeros_like(norm.running_mean)
    centred = (y - norm.running_mean.view(one)) / (norm.running_var + norm.eps).sqrt().view(one)
    return centred * weight.view(one) + bias.view(one)


@pytest.mark.parametrize("name", MODELS)
def test_folded_models_answer_as_before(name: str) -> None:
    make, shape = MODELS[name]
    model = filled(make())
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    folded = FoldBatchNorms()(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [part.training for part in folded.modules()] == modes
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in folded.modules())
    assert [path for path, _ in folded.named_modules()] == [path for path, _ in model.named_modules()]
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y, expected = folded(x), model(x)
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=0)  # float64 sums of some tens of numbers, layer by layer
    weight = torch.randn_like(y)
    found, theirs = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(found, theirs, atol=1e-10, rtol=0)
    if type(model) is nn.Sequential:
        torch.testing.assert_close(folded[:2](x), in_formula(model[0], model[1], x), atol=1e-12, rtol=0)


def test_a_kernel_less_runs_for_each_norm() -> None:
    model = filled(vision())
    folded, images = FoldBatchNorms()(model), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    num_norms = sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert num_norms == 1 + 2 * 3 + 3 + 1  # stem, two inverted residuals, a MobileViT block, the layer before the head
    with torch.inference_mode():
        before, after = (count_kernels(lambda m=m: m(images)) for m in (model, folded))
    assert before.kernels - after.kernels == num_norms
    assert after.bytes_moved < before.bytes_moved
    assert folded.train()(images[:, :, :1, :1]).shape == (1, 5)  # nothing is left that a single place would stop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folding_rounds_once(dtype: torch.dtype) -> None:
    """Weights in halves are the exact ones but for half a unit of the last place; float32 is computed in itself."""
    model = filled(pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).to(dtype).requires_grad_(False)
    exact = FoldBatchNorms()(copy.deepcopy(model).double())
    folded = FoldBatchNorms()(model)
    unit = torch.finfo(dtype).eps
    rounding = 8 * unit if dtype == torch.float32 else 0.51 * unit
    for found, expected in ((folded[0].weight, exact[0].weight), (folded[0].bias, exact[0].bias)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=rounding)  # atol: sums in float32
    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    y = exact(x.double())
    # weights, bias, the convolution's 36 products and the SiLU round; errors of random signs make few units
    torch.testing.assert_close(folded(x).double(), y, atol=8 * unit * float(y.abs().max()), rtol=0)


def test_each_of_several_places_of_a_norm_and_one_of_a_layer_in_two_places() -> None:
    norm = nn.BatchNorm2d(4)
    model = filled(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Sequential(nn.Conv2d(4, 4, 1), norm)))
    folded, x = FoldBatchNorms()(model), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert isinstance(folded[1], FoldedNorm) and isinstance(folded[2][1], FoldedNorm)
    torch.testing.assert_close(folded(x), model(x), atol=1e-12, rtol=0)
    twice = filled(pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model = nn.ModuleList([twice, nn.Sequential(twice, twice)])
    folded = FoldBatchNorms()(model)
    assert folded[0] is folded[1][0] is folded[1][1]
    torch.testing.assert_close(folded[1](x), model[1](x), atol=1e-12, rtol=0)


def test_what_does_not_learn_still_does_not() -> None:
    model = filled(pair(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)))
    assert [p.requires_grad for p in FoldBatchNorms()(model).parameters()] == [True, True]
    assert [p.requires_grad for p in FoldBatchNorms()(model.requires_grad_(False)).parameters()] == [False, False]
    assert [name for name, _ in FoldBatchNorms()(model).named_parameters()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("training", [False, True])
def test_a_saved_model_is_read_into_a_fresh_one(tmp_path: Path, training: bool) -> None:
    folded = FoldBatchNorms()(filled(vision()))
    save_treated(folded, tmp_path / "model.safetensors")
    fresh = vision().double().train(training)
    loaded = load_treated(tmp_path / "model.safetensors", fresh, FoldBatchNorms())
    assert loaded.head.training == training and fresh.stem[1].training == training
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(loaded(x), folded(x))


def test_it_goes_with_other_treatments_in_either_order() -> None:
    model, x = filled(vision()).float(), torch.randn(2, 3, 16, 16)
    assert isinstance(Chain(FoldBatchNorms(), QuantizeInt8())(model).head, Int8Linear)
    pruned = Chain(FoldBatchNorms(), MagnitudePruning(0.5))(model)
    assert float((pruned.head.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    for other in (QuantizeInt8(), FuseProjections()):
        before, after = Chain(other, FoldBatchNorms())(model), other(model)
        with torch.inference_mode():
            torch.testing.assert_close(before(x), after(x), atol=1e-3, rtol=1e-3)  # float32, and codes that may turn
    quantized = nn.Sequential(QuantizeInt8()(nn.Sequential(nn.Linear(4, 4)))[0], nn.BatchNorm1d(4)).eval()
    with pytest.raises(CombinationError, match="1 is a BatchNorm1d after a Int8Linear. Fold before other treatments"):
        FoldBatchNorms()(quantized)


def test_norms_that_are_skipped_stay() -> None:
    model = filled(vision())
    folded = FoldBatchNorms(skip=("stem.1", "stages.*"))(model)
    kept = [path for path, part in folded.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert "stem.1" in kept and len(kept) == 1 + 6 + 3 and isinstance(folded.widen[1], FoldedNorm)
    rest = FoldBatchNorms()(folded)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in rest.modules())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(rest(x), model(x), atol=1e-11, rtol=0)
    assert repr(FoldBatchNorms(skip=("stem.1",))) == "FoldBatchNorms(skip=('stem.1',))"
    assert repr(FoldBatchNorms()) == "FoldBatchNorms()"


def test_training_mode_is_refused() -> None:
    model = vision().eval()
    model.widen.train()
    with pytest.raises(ArgumentError, match=r"widen\.1 is in training mode\. Call eval\(\) on the model first"):
        FoldBatchNorms()(model)
    model.eval().head.train()  # which a norm does not see
    assert FoldBatchNorms()(model).head.training


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x).abs())


class Otherwise(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).abs())


def hooked(place: int) -> nn.Module:
    model = pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[place].register_forward_hook(lambda *_: None)
    return model


def tied() -> nn.Module:
    layer = nn.Conv2d(4, 4, 1)
    return nn.Sequential(layer, nn.BatchNorm2d(4), layer)


def tied_weight() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Apart(), r"in a torch\.nn\.Sequential to be folded; norm does not, in a Apart\. Put both into one, or pass"),
        (Otherwise(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), "to be folded; 1 does not, in a Otherwise"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), "to be folded; 0 does not, in a Sequential"),
        (nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]), "to be folded; 1 does not, in a ModuleList"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), "2 is a BatchNorm2d after a ReLU"),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)), "a BatchNorm2d after a ConvTranspose2d"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4)), "1 is a SyncBatchNorm after a Conv2d"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4)), "1 is a BatchNorm2d after a Linear"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
            "1 is a BatchNorm2d after a ParametrizedConv2d",
        ),
        (hooked(0), "what is folded must have no hooks, which would see other values; 1 or the layer before it has"),
        (hooked(1), "what is folded must have no hooks"),
        (
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            r"1 follows each batch, having none\. Build it with track_running_stats=True",
        ),
        (tied(), "those of the layer before 1 are used elsewhere too. Untie them, or pass skip"),
        (tied_weight(), "those of the layer before 1 are used elsewhere too"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(model: nn.Module, message: str) -> None:
    with pytest.raises((ArgumentError, CombinationError), match=message) as error:
        FoldBatchNorms()(model.eval())
    path = next(path for path, part in model.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    assert f"pass skip=({path!r},) to leave this norm alone." in str(error.value)
    with pytest.raises(ArgumentError, match="that is not skipped; every one is skipped"):
        FoldBatchNorms(skip=(path,))(model)


def test_a_norm_behind_a_forward_of_its_own_is_named_in_a_model_of_ours() -> None:
    model = ConformerBlock(8, SelfAttention(8, 2, is_causal=False)).eval()
    with pytest.raises(ArgumentError, match=r"convolution\.norm does not, in a ConvolutionModule"):
        FoldBatchNorms()(model)


def test_nothing_to_fold_is_said() -> None:
    for model in (nn.Sequential(nn.Linear(3, 3)), nn.BatchNorm1d(3)):
        with pytest.raises(ArgumentError, match=f"not skipped; this {type(model).__name__} holds none"):
            FoldBatchNorms()(model)
    with pytest.raises(UnknownNameError, match=r"unknown norm to skip 'stem\.2'\. Nearest: stem\.1"):
        FoldBatchNorms(skip=("stem.2",))(vision().eval())
    with pytest.raises(ArgumentError, match="skip must be a sequence of patterns; got the single text 'stem'"):
        FoldBatchNorms(skip="stem")


def test_weights_that_would_not_be_finite_are_refused() -> None:
    model = pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_var.fill_(float("nan"))
    with pytest.raises(ArgumentError, match=r"with 1 folded into them; in torch\.float32 they are not\. Train the"):
        FoldBatchNorms()(model)
    model[1].running_var.fill_(0.0)
    model[1].weight.data.fill_(1e4)
    with pytest.raises(ArgumentError, match=r"in torch\.float16 they are not\. Train .*, or call float\(\) on it"):
        FoldBatchNorms()(model.half())
    assert FoldBatchNorms()(model.float())(torch.ones(1, 4, 1, 1)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "shape"), [("Linear", (3, 6, 4)), ("Conv1d", (4, 8)), ("Conv2d", (4, 9, 8)), ("Linear", (4,))]
)
def test_inputs_whose_channels_the_norm_would_have_sought_elsewhere_are_refused(
    name: str, shape: tuple[int, ...]
) -> None:
    """A norm after a linear layer takes the N of [B, N, C] for the channels: an answer that no folded weights give."""
    folded = FoldBatchNorms()(filled(MODELS[name][0]()))
    with pytest.raises(ArgumentError, match=r"x must have \d dimensions where a batch norm was folded; got \["):
        folded(torch.zeros(*shape, dtype=torch.float64))
