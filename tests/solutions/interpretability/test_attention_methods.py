"""Last attention, rollout and flow against naive products, another library's flow, and graphs known on paper."""

import itertools
from collections.abc import Sequence

import networkx
import numpy as np
import pytest
import torch
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.models.encoder import Encoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.attribution import Explainer
from transformer_problems.solutions.interpretability.flow import AttentionFlow
from transformer_problems.solutions.interpretability.last_attention import LastAttention
from transformer_problems.solutions.interpretability.readable import readable
from transformer_problems.solutions.interpretability.rollout import AttentionRollout

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
MASK = torch.arange(5) < torch.tensor([[5], [3]])
METHODS = [LastAttention(), AttentionRollout(), AttentionFlow()]


class Maps:
    """A model that has these attention weights [H, N, N] in its layers, and reads these shares [N] of them."""

    vocab_size = 10

    def __init__(self, layers: Sequence[Tensor], reading: Tensor) -> None:
        self.layers, self.shares = layers, reading

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens[..., None].double()

    def logits(self, tokens: Tensor, *, key_mask: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        return torch.zeros(len(tokens), 2, dtype=torch.float64)

    def attentions(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> list[Tensor]:
        return [layer.expand(len(tokens), *layer.shape) for layer in self.layers]

    def reading(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        return self.shares.expand(len(tokens), -1)


def random_maps(num_layers: int, num_tokens: int, seed: int, *, sparse: bool = False) -> Maps:
    draws = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(num_layers, 2, num_tokens, num_tokens, generator=draws, dtype=torch.float64)
    if sparse:
        scores = scores.masked_fill(scores < 0.5, -torch.inf)
        scores[..., 0] = 0.0
    reading = torch.nn.functional.one_hot(torch.tensor(num_tokens - 1), num_tokens).double()
    return Maps(list(scores.softmax(-1)), reading)


def mixed(model: Maps) -> list[np.ndarray]:
    """0.5 A + 0.5 I with rows that sum to one, written once more."""
    layers = [0.5 * layer.numpy().mean(axis=0) + 0.5 * np.eye(layer.shape[-1]) for layer in model.layers]
    return [layer / layer.sum(axis=-1, keepdims=True) for layer in layers]


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(10, 16, 3, lambda: SelfAttention(16, 2, is_causal=False), num_outputs=3).double()


@pytest.mark.parametrize(("num_layers", "num_tokens"), [(1, 1), (1, 4), (3, 7), (6, 13)])
def test_rollout_equals_the_naive_product(num_layers: int, num_tokens: int) -> None:
    model = random_maps(num_layers, num_tokens, seed=num_tokens)
    product = np.eye(num_tokens)
    for layer in mixed(model):
        product = layer @ product
    found = AttentionRollout().explain(model, torch.zeros(1, num_tokens, dtype=torch.long))
    np.testing.assert_allclose(found.scores[0].numpy(), product[-1], rtol=1e-12)


def test_rollout_of_attention_to_itself_is_the_position_itself_and_halves_with_each_layer_otherwise() -> None:
    alone = Maps([torch.eye(3, dtype=torch.float64)[None]] * 4, torch.tensor([0.0, 1.0, 0.0]))
    found = AttentionRollout().explain(alone, TOKENS[:, :3])
    assert torch.equal(found.scores, torch.tensor([[0.0, 1.0, 0.0]] * 2, dtype=torch.float64))
    to_first = torch.zeros(1, 3, 3, dtype=torch.float64)
    to_first[..., 0] = 1.0
    found = AttentionRollout().explain(Maps([to_first] * 4, torch.tensor([0.0, 0.0, 1.0])), TOKENS[:, :3])
    assert torch.equal(found.scores[0], torch.tensor([15 / 16, 0.0, 1 / 16], dtype=torch.float64))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("num_layers", "num_tokens"), [(1, 4), (2, 5), (4, 6)])
def test_flow_equals_networkx_s_maximum_flow(num_layers: int, num_tokens: int, sparse: bool) -> None:
    model = random_maps(num_layers, num_tokens, seed=num_layers, sparse=sparse)
    graph = networkx.DiGraph()
    for depth, layer in enumerate(mixed(model)):
        for query, key in itertools.product(range(num_tokens), repeat=2):
            graph.add_edge((depth + 1, query), (depth, key), capacity=layer[query, key])
    top = (num_layers, num_tokens - 1)
    expected = [networkx.maximum_flow_value(graph, top, (0, key)) for key in range(num_tokens)]
    found = AttentionFlow().explain(model, torch.zeros(1, num_tokens, dtype=torch.long))
    # capacities are rounded to 2^-30, and a cut has num_tokens^2 edges or fewer
    np.testing.assert_allclose(found.scores[0].numpy(), expected, rtol=0, atol=num_tokens**2 * 2.0**-31)


def test_flow_equals_the_smallest_of_all_cuts() -> None:
    model = random_maps(2, 3, seed=5)
    layers = mixed(model)
    nodes = [(depth, place) for depth in range(3) for place in range(3)]
    edges = {((d + 1, q), (d, k)): layers[d][q, k] for d in range(2) for q in range(3) for k in range(3)}
    found = AttentionFlow().explain(model, torch.zeros(1, 3, dtype=torch.long)).scores[0]
    for key in range(3):
        source, sink = (2, 2), (0, key)
        inner = [node for node in nodes if node not in (source, sink)]
        cuts = []
        for chosen in itertools.product([False, True], repeat=len(inner)):
            side = {source, *(node for node, with_source in zip(inner, chosen, strict=True) if with_source)}
            cuts.append(sum(size for (a, b), size in edges.items() if a in side and b not in side))
        assert abs(float(found[key]) - min(cuts)) < 9 * 2.0**-31


def test_flow_of_one_layer_is_its_row_and_of_more_never_less_than_rollout() -> None:
    one, several = random_maps(1, 5, seed=0), random_maps(4, 5, seed=1)
    tokens = torch.zeros(1, 5, dtype=torch.long)
    found = AttentionFlow().explain(one, tokens).scores[0].numpy()
    np.testing.assert_allclose(found, mixed(one)[0][-1], rtol=0, atol=2.0**-30)
    # rollout is a flow within the capacities, so the maximum is no less
    rollout = AttentionRollout().explain(several, tokens).scores
    assert (AttentionFlow().explain(several, tokens).scores >= rollout - 25 * 2.0**-31).all()


def test_an_answer_read_at_several_positions_is_their_mixture() -> None:
    maps = random_maps(3, 4, seed=2)
    maps.shares = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    product = np.linalg.multi_dot(mixed(maps)[::-1])
    np.testing.assert_allclose(AttentionRollout().explain(maps, tokens).scores[0], maps.shares.numpy() @ product)
    last = maps.layers[-1].mean(0).numpy()
    np.testing.assert_allclose(LastAttention().explain(maps, tokens).scores[0], maps.shares.numpy() @ last)
    flows = AttentionFlow().explain(maps, tokens).scores[0].numpy()
    assert (flows >= maps.shares.numpy() @ product - 1e-8).all() and (flows <= 1 + 1e-8).all()


def test_last_attention_is_the_mean_row_of_the_last_layer() -> None:
    model = encoder()
    last = readable(model).attentions(TOKENS, key_mask=MASK)[-1]
    found = LastAttention().explain(model, TOKENS, key_mask=MASK)
    torch.testing.assert_close(found.scores[0], last[0, :, 4].mean(0))
    torch.testing.assert_close(found.scores[1], last[1, :, 2].mean(0))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_padding_scores_nothing_and_changes_nothing(method: Explainer) -> None:
    model = encoder()
    found = method.explain(model, TOKENS, key_mask=MASK).scores
    other = method.explain(model, torch.where(MASK, TOKENS, 9), key_mask=MASK).scores
    alone = method.explain(model, TOKENS[1:, :3]).scores
    assert not found[1, 3:].any()
    torch.testing.assert_close(found, other)
    torch.testing.assert_close(found[1:, :3], alone, rtol=0, atol=1e-8)  # flows round to 2^-30


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_models_without_weights_and_weights_that_are_none_are_refused(method: Explainer) -> None:
    reading = torch.tensor([0.0, 0.0, 1.0])
    with pytest.raises(CombinationError, match="a model must have attention weights to be explained by them"):
        method.explain(Maps([], reading), TOKENS[:, :3])
    with pytest.raises(ArgumentError, match=r"attention weights must be \[2, H, 3, 3\]; got \[2, 1, 4, 4\]"):
        method.explain(Maps([torch.ones(1, 4, 4)], reading), TOKENS[:, :3])
    with pytest.raises(ArgumentError, match="attention weights must be finite"):
        method.explain(Maps([torch.full((1, 3, 3), torch.nan)], reading), TOKENS[:, :3])


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda m: type(m).__name__)
def test_negative_weights_are_no_shares(method: Explainer) -> None:
    weights = torch.tensor([[[1.5, -0.5], [0.5, 0.5]]])
    with pytest.raises(CombinationError, match="attention weights must not be negative to be shares; got -0.5"):
        method.explain(Maps([weights], torch.tensor([0.0, 1.0])), TOKENS[:, :2])
