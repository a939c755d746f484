"""Gradient methods against captum, closed forms, and models that read one token by construction."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.core.seeding import generator
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.attribution import Attribution, Explainer
from transformer_problems.solutions.interpretability.gradient_x_input import GradientXInput
from transformer_problems.solutions.interpretability.integrated_gradients import IntegratedGradients
from transformer_problems.solutions.interpretability.readable import readable
from transformer_problems.solutions.interpretability.smooth_grad import SmoothGrad
from transformer_problems.solutions.position.sinusoidal import SinusoidalEncoding
from transformer_problems.solutions.residual.skip_connection import SkipConnection

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
MASK = torch.arange(7) < torch.tensor([[7], [5]])
METHODS = [GradientXInput(), IntegratedGradients(steps=20), SmoothGrad(samples=20)]
SAME = {"rtol": 1e-9, "atol": 1e-12}  # float64 through some tens of operations

FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}  # captum keeps quadrature weights and standard deviations in float32


def encoder() -> Encoder:
    torch.manual_seed(0)
    position = SinusoidalEncoding(16)
    return (
        Encoder(10, 16, 2, lambda: SelfAttention(16, 2, is_causal=False), num_outputs=3, position=position)
        .double()
        .eval()
    )


def from_embeddings(model: Encoder) -> Callable[[Tensor], Tensor]:
    """The last token's logits as a function of the embeddings, written out without any hook."""

    def run(embeddings: Tensor) -> Tensor:
        places = torch.arange(embeddings.shape[1])
        x = model.body.position.embed(embeddings * 4.0, places)
        x = model.body.blocks(x, key_mask=None, positions=places)
        logits: Tensor = model.head(model.body.norm(x))[:, -1]
        return logits

    return run


class OfEmbeddings:
    """A model that is a function of its embeddings [B, N, C] alone."""

    vocab_size = 10

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], width: int = 3) -> None:
        self.function = function
        self.table = 1.0 + torch.rand(10, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def logits(self, tokens: Tensor, *, key_mask: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        return self.function(tokens, self.embed(tokens) if embeddings is None else embeddings)

    def attentions(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> list[Tensor]:
        return []

    def reading(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        return torch.ones_like(tokens, dtype=torch.float64) / tokens.shape[1]


@pytest.mark.peer
def test_gradient_x_input_equals_captum_s() -> None:
    attr = pytest.importorskip("captum.attr")
    model = encoder()
    x = model.body.embedding(TOKENS).detach().requires_grad_()
    target = torch.tensor([2, 0])
    expected = attr.InputXGradient(from_embeddings(model)).attribute(x, target=target).sum(-1)
    found = GradientXInput().explain(model, TOKENS, target=target)
    torch.testing.assert_close(found.scores, expected.detach(), **SAME)
    assert torch.equal(found.target, target) and found.completeness_gap is None


@pytest.mark.peer
@pytest.mark.parametrize("baseline_token", [None, 0])
@pytest.mark.parametrize("steps", [5, 30])
def test_integrated_gradients_and_their_gap_equal_captum_s(baseline_token: int | None, steps: int) -> None:
    attr = pytest.importorskip("captum.attr")
    model = encoder()
    x = model.body.embedding(TOKENS).detach()
    baseline = (
        torch.zeros_like(x) if baseline_token is None else model.body.embedding(torch.zeros_like(TOKENS)).detach()
    )
    expected, gap = attr.IntegratedGradients(from_embeddings(model)).attribute(
        x, baseline, target=1, n_steps=steps, method="gausslegendre", return_convergence_delta=True
    )
    found = IntegratedGradients(steps=steps, baseline_token=baseline_token).explain(model, TOKENS, target=1)
    torch.testing.assert_close(found.scores, expected.sum(-1), **FLOAT32)
    torch.testing.assert_close(found.completeness_gap, gap, **FLOAT32)


@pytest.mark.peer
def test_integrated_gradients_equal_captum_s_of_the_embedding_layer() -> None:
    attr = pytest.importorskip("captum.attr")
    model = encoder()
    layer = attr.LayerIntegratedGradients(lambda tokens: model(tokens)[:, -1], model.body.embedding)
    expected = layer.attribute(TOKENS, torch.zeros_like(TOKENS), target=1, n_steps=10, method="gausslegendre")
    found = IntegratedGradients(steps=10, baseline_token=0).explain(model, TOKENS, target=1)
    torch.testing.assert_close(found.scores, expected.sum(-1), **FLOAT32)


@pytest.mark.peer
def test_smooth_grad_equals_captum_s_with_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    attr = pytest.importorskip("captum.attr")
    model, row = encoder(), TOKENS[:1]
    x = model.body.embedding(row).detach()
    spread = 0.2 * float(x.max() - x.min())
    draws = generator(3, "smooth grad")
    noise = torch.stack([torch.randn(x.shape[1:], generator=draws, dtype=x.dtype) for _ in range(6)])
    monkeypatch.setattr(torch, "normal", lambda mean, stdev: mean + stdev * noise)
    slopes = attr.NoiseTunnel(attr.Saliency(from_embeddings(model))).attribute(
        x, nt_type="smoothgrad", nt_samples=6, stdevs=spread, target=1, abs=False
    )
    found = SmoothGrad(noise=0.2, samples=6, seed=3).explain(model, row, target=1)
    torch.testing.assert_close(found.scores, (slopes.detach() * x).sum(-1), **FLOAT32)


def test_smooth_grad_tends_to_the_mean_gradient() -> None:
    # of sum(x^4) / 4 the mean gradient at noise s is x^3 + 3 x s^2
    model = OfEmbeddings(lambda _, x: x.pow(4).sum(-1)[:, :2] / 4)
    tokens, x = torch.tensor([[4, 7, 2]]), model.embed(torch.tensor([[4, 7, 2]]))
    spread = 0.15 * (x.max() - x.min())
    expected = (x * (x**3 + 3 * x * spread**2)).sum(-1)
    expected[:, 1:] = 0.0
    num = 4000
    found = SmoothGrad(samples=num).explain(model, tokens, target=0).scores
    # the gradient's standard deviation is 3 x^2 s to first order; 5 standard errors of the sum over C
    error = 5 * ((x * 3 * x**2 * spread).square().sum(-1) / num).sqrt()[0, 0]
    assert (found - expected).abs().max() < error < 0.01 * expected[0, 0]
    assert (found - GradientXInput().explain(model, tokens, target=0).scores).abs().max() > error


def test_completeness_is_exact_as_soon_as_the_quadrature_is() -> None:
    # A product of N = 6 embeddings is a polynomial of degree 6 along the line; n Gauss points integrate its gradient,
    # of degree 5, exactly from 2 n - 1 = 5 on. By symmetry each factor has a sixth of it.
    model = OfEmbeddings(lambda _, x: x.prod(dim=1)[:, :1], width=1)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    whole = model.logits(tokens)[0, 0]
    gaps = [
        IntegratedGradients(steps=steps).explain(model, tokens).completeness_gap.abs() / whole for steps in (1, 2, 3, 4)
    ]
    assert gaps[0] > 0.1 > gaps[1] > 1e-3 and max(gaps[2], gaps[3]) < 1e-14
    scores = IntegratedGradients(steps=3).explain(model, tokens).scores
    torch.testing.assert_close(scores, (whole / 6).expand(1, 6))


def test_the_gap_shrinks_geometrically_on_a_smooth_network() -> None:
    # Gauss-Legendre errs as rho^(-2n), rho > 1 the size of the ellipse in which the network along the line is analytic
    model, bound = encoder(), 1.0
    for steps in (4, 8, 16, 32, 64):
        found = IntegratedGradients(steps=steps, baseline_token=0).explain(model, TOKENS, target=1)
        with torch.no_grad():
            change = model(TOKENS)[:, -1, 1] - model(torch.zeros_like(TOKENS))[:, -1, 1]
        torch.testing.assert_close(found.scores.sum(1) - change, found.completeness_gap)
        gap = float(found.completeness_gap.abs().max())
        assert gap < bound
        bound = max(gap / 2, 1e-12)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_on_a_linear_model_every_method_gives_each_token_its_term(method: Explainer) -> None:
    weights = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = OfEmbeddings(lambda _, x: torch.einsum("bnc,nck->bk", x, weights))
    tokens = torch.tensor([[1, 5, 5, 0], [2, 2, 9, 3]])
    expected = torch.einsum("bnc,nc->bn", model.embed(tokens), weights[..., 1])
    torch.testing.assert_close(method.explain(model, tokens, target=1).scores, expected, **SAME)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_the_only_token_that_is_read_has_all_of_the_score(method: Explainer) -> None:
    widen = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def reads_sevens(tokens: Tensor, x: Tensor) -> Tensor:
        return torch.tanh((x * (tokens == 7)[..., None]).sum(1) @ widen)

    tokens = torch.tensor([[1, 7, 5, 0], [2, 2, 9, 7]])
    scores = method.explain(OfEmbeddings(reads_sevens), tokens).scores
    assert torch.equal(scores != 0, tokens == 7)


def planted() -> Encoder:
    """Every token attends to token 7 alone, and class 1 is what of it arrives: set by hand, not trained."""

    def mixer() -> SelfAttention:
        return SelfAttention(16, 1, is_causal=False, bias=True)

    model = Encoder(10, 16, 1, mixer, num_outputs=2, residual=SkipConnection).double()
    model.body.norm = nn.Identity()
    attention = model.body.blocks[0].mixer
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.body.embedding.weight.copy_(torch.eye(10, 16))
        attention.q_proj.bias[0] = 40.0  # every query is the same ...
        attention.k_proj.weight[0, 7] = 1.0  # ... and looks for coordinate 7, which token 7 alone has
        attention.v_proj.weight.copy_(torch.eye(16))
        attention.out_proj.weight.copy_(torch.eye(16))
        model.head.weight[1, 7] = 1.0
    return model


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_planted_evidence_is_on_top(method: Explainer) -> None:
    tokens = torch.tensor([[1, 7, 5, 0, 3], [7, 2, 9, 4, 1], [0, 2, 9, 7, 4]])
    found = method.explain(planted(), tokens, target=1)
    assert torch.equal(found.scores.argmax(dim=1), torch.tensor([1, 0, 3]))
    others = found.scores.masked_fill(tokens == 7, 0.0).abs().amax(dim=1)
    assert (found.scores.amax(dim=1) > 3 * others).all()


def test_a_norm_right_after_the_embeddings_hides_tokens_from_gradient_x_input_and_a_neutral_token_finds_them() -> None:
    # In one pre-norm layer the other tokens come in through a norm alone, which takes their scale away: by Euler's
    # theorem the gradient is orthogonal to each, but for the norm's eps. On the line from an embedding of zero all
    # change happens within the square root of eps, which no quadrature sees.
    torch.manual_seed(0)
    model = Encoder(10, 16, 1, lambda: SelfAttention(16, 2, is_causal=False), num_outputs=3).double()
    hidden = GradientXInput().explain(model, TOKENS, target=1).scores[:, :-1].abs()
    from_zero = IntegratedGradients().explain(model, TOKENS, target=1)
    from_token = IntegratedGradients(baseline_token=0).explain(model, TOKENS, target=1)
    assert hidden.amax() < 1e-3 * from_token.scores[:, :-1].abs().amax()
    assert (from_token.completeness_gap.abs() < 1e-3 * from_zero.completeness_gap.abs()).all()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_padding_scores_nothing_and_changes_nothing(method: Explainer) -> None:
    model = encoder()
    with torch.no_grad():
        model.body.embedding.weight[0] *= 100.0  # which no noise may be measured by
    whole = method.explain(model, TOKENS, key_mask=MASK, target=1)
    other = method.explain(model, torch.where(MASK, TOKENS, 0), key_mask=MASK, target=1)
    assert not whole.scores[~MASK].any()
    torch.testing.assert_close(whole.scores, other.scores, **SAME)
    alone = method.explain(model, TOKENS[1:], key_mask=MASK[1:], target=1)
    torch.testing.assert_close(whole.scores[1:], alone.scores, **SAME)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_give_float32_scores_near_the_wide_ones(method: Explainer, dtype: torch.dtype) -> None:
    wide = method.explain(encoder(), TOKENS, target=1).scores
    narrow = method.explain(encoder().to(dtype), TOKENS, target=1).scores
    assert narrow.dtype == torch.float32
    # two layers there and back; SmoothGrad draws in another dtype from the same stream, hence other noise
    if not isinstance(method, SmoothGrad):
        tolerance = 100 * torch.finfo(dtype).eps * wide.abs().max()
        assert (narrow - wide).abs().max() < tolerance


def test_the_default_target_is_the_answer_and_the_meaning_names_the_baseline() -> None:
    model = encoder()
    found = IntegratedGradients(steps=3, baseline_token=4).explain(model, TOKENS)
    assert torch.equal(found.target, model(TOKENS)[:, -1].argmax(dim=1))
    assert "from token 4 at every token" in found.meaning and isinstance(found, Attribution)
    assert "from an embedding of zero" in IntegratedGradients(steps=3).explain(model, TOKENS).meaning


def test_a_decoder_s_next_token_is_explained_at_any_place() -> None:
    torch.manual_seed(0)
    model = Decoder(10, 16, 1, lambda: SelfAttention(16, 2)).double()
    scores = GradientXInput().explain(readable(model, read_at=3), TOKENS, target=5).scores
    assert scores[:, :4].all() and not scores[:, 4:].any()


def test_the_same_seed_gives_the_same_scores() -> None:
    model = encoder()
    first, again, other = (SmoothGrad(samples=3, seed=s).explain(model, TOKENS, target=1).scores for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_models_and_modes_without_gradients_are_refused(method: Explainer) -> None:
    model = OfEmbeddings(lambda _, x: x.detach().sum(dim=1))
    with pytest.raises(CombinationError, match="a model must pass gradients to its embeddings .* passes none"):
        method.explain(model, TOKENS)
    with (
        torch.inference_mode(),
        pytest.raises(CombinationError, match="gradients cannot be taken of what belongs to torch.inference_mode"),
    ):
        method.explain(encoder(), TOKENS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntegratedGradients(steps=0), "steps must be positive; got 0"),
        (lambda: SmoothGrad(noise=float("inf")), "noise must be a finite number; got inf"),
        (lambda: IntegratedGradients(baseline_token=-1), "baseline_token must be a token, .*; got -1. Leave it out"),
        (lambda: SmoothGrad(noise=0.0), "noise must be positive; got 0.0"),
        (lambda: SmoothGrad(noise=float("nan")), "noise must be positive; got nan"),
        (lambda: SmoothGrad(samples=2.5), "samples must be a positive whole number; got 2.5"),
        (lambda: SmoothGrad(seed=-1), "seed must not be negative; got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], Explainer], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_baseline_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ArgumentError, match="baseline_token must be from 0 to 9; got 10"):
        IntegratedGradients(baseline_token=10).explain(encoder(), TOKENS)
