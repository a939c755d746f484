"""Induction scores, patching and ablation find and cut a circuit whose weights are set by hand."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.activation_patching import activation_patching
from transformer_problems.solutions.interpretability.head_ablation import ablate_heads
from transformer_problems.solutions.interpretability.induction import induction_scores
from transformer_problems.solutions.interpretability.readable import readable
from transformer_problems.solutions.interpretability.sites import Site
from transformer_problems.solutions.position.rotary import RotaryEmbedding

SIZE = 16  # of the vocabulary, of the positions and of a head
TOKEN, POSITION, PREVIOUS, ANSWER = (slice(start, start + SIZE) for start in range(0, 4 * SIZE, SIZE))
SHARP = 200.0  # a match scores 200 / sqrt(16) = 50 above everything else
PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD = Site("blocks.0.mixer", head=0), Site("blocks.1.mixer", head=2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = SelfAttention(4 * SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(x)


class Circuit(nn.Module):
    """Two layers of attention alone, over a stream of four parts: token, position, previous token and answer.

    Head 0 of layer 0 writes the token before into `previous`; head 2 of layer 1 looks for its own token there and
    writes the token that it finds it at into `answer`. The other heads are random and speak softly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SIZE, 4 * SIZE)
        self.blocks = nn.ModuleList([Layer(), Layer()])
        unit = torch.eye(SIZE)
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.embedding.weight.zero_()[:, TOKEN] = unit
            for block in self.blocks:
                for projection in (block.mixer.q_proj, block.mixer.k_proj, block.mixer.v_proj):
                    projection.weight.normal_(std=0.3, generator=draws)
                block.mixer.out_proj.weight.normal_(std=1e-4, generator=draws)
            shift = torch.diag(torch.ones(SIZE - 1), 1)  # row i picks position i + 1: its query looks for key i
            q, k = self._plant(PREVIOUS_TOKEN_HEAD, PREVIOUS)
            q[:, POSITION], k[:, POSITION] = SHARP * shift, unit
            q, k = self._plant(INDUCTION_HEAD, ANSWER)
            q[:, TOKEN], k[:, PREVIOUS] = SHARP * unit, unit
            k[:, POSITION.start] = -2  # position 0 has no token before it and holds its own: never to be found

    def _plant(self, site: Site, writes: slice) -> tuple[Tensor, Tensor]:
        """A head that copies the token it attends to; views of its query and key weights, at zero."""
        mixer = self.get_submodule(site.path)
        rows = slice(site.head * SIZE, (site.head + 1) * SIZE)
        q, k, v = (layer.weight[rows].zero_() for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        v[:, TOKEN] = torch.eye(SIZE)
        out = mixer.out_proj.weight[:, rows].zero_()
        out[writes] = torch.eye(SIZE)
        return q, k

    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        places = nn.functional.pad(torch.eye(SIZE), (POSITION.start, 2 * SIZE))[: tokens.shape[1]]
        x = x + places
        for block in self.blocks:
            x = block(x)
        return 20 * x[..., ANSWER]


def test_the_planted_induction_head_scores_one_and_the_others_chance() -> None:
    found = induction_scores(Circuit(), num_tokens=8)
    assert len(found.scores) == 8
    assert found.strongest(1) == [INDUCTION_HEAD]
    assert found.scores[INDUCTION_HEAD] == pytest.approx(1, abs=1e-5)  # e^-50 a key, and float32
    assert found.uniform == pytest.approx(sum(1 / keys for keys in range(9, 17)) / 8)
    others = [score for site, score in found.scores.items() if site != INDUCTION_HEAD]
    assert found.scores[PREVIOUS_TOKEN_HEAD] < 1e-5  # it attends to one token, and never to that
    assert max(others) < 2 * found.uniform
    assert found.second_loss < 1e-4 < 2 < found.first_loss
    assert found.loss_drop == found.first_loss - found.second_loss


@pytest.mark.parametrize("head", [PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD], ids=["previous token", "induction"])
@pytest.mark.parametrize("mean", [False, True])
def test_without_either_planted_head_the_ability_is_gone(head: Site, mean: bool) -> None:
    model = Circuit()
    reference = torch.stack([torch.randperm(SIZE, generator=torch.Generator().manual_seed(i)) for i in range(20)])
    with ablate_heads(model, [head], mean_over=reference if mean else None):
        without = induction_scores(model, num_tokens=8)
    assert without.second_loss > 1.5  # of log 8, where the eight tokens seen are all that is known
    assert induction_scores(model, num_tokens=8).second_loss < 1e-4


def test_without_all_other_heads_the_ability_stays() -> None:
    model = Circuit()
    others = set(induction_scores(model, num_tokens=8).scores) - {PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD}
    with ablate_heads(model, sorted(others, key=str)):
        assert induction_scores(model, num_tokens=8).second_loss < 1e-4


def test_patching_restores_the_answer_along_the_circuit_and_nowhere_else() -> None:
    clean = torch.tensor([[3, 9, 1, 4, 7, 3], [8, 2, 11, 5, 0, 8]])  # A B ... A: the answer is B, at position 1
    corrupted = clean.clone()
    corrupted[:, 0] = 15

    def metric(logits: Tensor) -> Tensor:
        return logits[torch.arange(2), -1, clean[:, 1]].mean()

    heads = [Site("blocks.*.mixer", head=head) for head in range(4)]
    effects = activation_patching(Circuit(), clean, corrupted, metric, [*heads, "embedding", "blocks.?"])
    assert effects.clean == pytest.approx(20, abs=1e-2)
    assert effects.positions == (0, 1, 2, 3, 4, 5)
    restored = {site: effects.restored[row] for row, site in enumerate(effects.sites)}
    carriers = {
        (Site("embedding"), 0),
        (PREVIOUS_TOKEN_HEAD, 1),
        (Site("blocks.0"), 1),
        (INDUCTION_HEAD, 5),
        (Site("blocks.1"), 5),
    }
    assert len(restored) == 8 + 1 + 2
    for site, shares in restored.items():
        for position, share in enumerate(shares.tolist()):
            wanted = float((site, position) in carriers)
            assert share == pytest.approx(wanted, abs=0.02), (site, position)  # the soft heads' part


@pytest.mark.peer
@pytest.mark.parametrize("family", ["ours", "llama", "gpt2"])
def test_scores_are_those_of_attention_weights_at_their_place(family: str) -> None:
    if family == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=61, attn_implementation="eager", **sizes)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10)  # weights of order one, or attention would be uniform
    elif family == "llama":
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
        config = TheirConfig(
            vocab_size=61, initializer_range=0.3, num_key_value_heads=2, attn_implementation="eager", **sizes
        )
        model = LlamaForCausalLM(config).double()
    else:
        model = LlamaDecoder(LlamaConfig(61, 32, 2, 4, 40)).double()
    num_tokens, given = 7, []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    found = induction_scores(model, num_tokens=num_tokens, num_sequences=3)
    handle.remove()
    args, kwargs = given[0]
    tokens = args[0] if args else kwargs["input_ids"]
    assert torch.equal(tokens[:, :7], tokens[:, 7:])
    assert all(len(row.unique()) == 7 for row in tokens)
    with torch.no_grad():
        if family == "ours":
            weights, logits = _weights_of(model, tokens), model(tokens)
        else:
            output = model.eval()(tokens, output_attentions=True)
            weights, logits = output.attentions, output.logits
    assert len(found.scores) == 8
    for (site, score), (layer, head) in zip(
        found.scores.items(), [(layer, head) for layer in range(2) for head in range(4)], strict=True
    ):
        assert site.head == head
        assert str(layer) in site.path.split(".")
        naive = [float(weights[layer][b, head, 7 + i, i + 1]) for b in range(3) for i in range(7)]
        assert score == pytest.approx(sum(naive) / len(naive), rel=1e-5)
    log_probs = logits.log_softmax(-1)
    for copy, loss in ((0, found.first_loss), (7, found.second_loss)):
        naive = [-float(log_probs[b, copy + i - 1, tokens[b, copy + i]]) for b in range(3) for i in range(1, 7)]
        assert loss == pytest.approx(sum(naive) / len(naive), rel=1e-5)


@torch.no_grad()
def _weights_of(model: LlamaDecoder, tokens: Tensor) -> list[Tensor]:
    """softmax(q k^T / sqrt(D)) of each layer, written out."""
    found, x, num_tokens = [], model.embedding(tokens), tokens.shape[1]
    positions = torch.arange(num_tokens)
    for block in model.blocks:
        h = block.mixer_residual.norm(x)
        q, k = (layer(h).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (block.mixer.q_proj, block.mixer.k_proj))
        q, k = block.mixer.position.rotate(q, k, positions, positions)
        scores = (q @ k.mT) / 8**0.5
        found.append(scores.masked_fill(torch.ones(num_tokens, num_tokens).triu(1).bool(), -torch.inf).softmax(-1))
        x = block(x, positions=positions)
    return found


def test_the_same_seed_gives_the_same_scores_and_another_others() -> None:
    model = Decoder(50, 32, 1, lambda: SelfAttention(32, 4, position=RotaryEmbedding(8)))
    assert induction_scores(model, seed=1) == induction_scores(model, seed=1)
    assert induction_scores(model, seed=1) != induction_scores(model, seed=2)


def test_models_that_cannot_be_scored_are_refused() -> None:
    encoder = Encoder(50, 32, 1, lambda: SelfAttention(32, 4, is_causal=False))
    with pytest.raises(CombinationError, match="model must be causal .* looks ahead"):
        induction_scores(encoder)
    decoder = Decoder(50, 32, 1, lambda: SelfAttention(32, 4))
    with pytest.raises(ArgumentError, match="num_tokens must be from 2 to 50, .*; got 51"):
        induction_scores(decoder, num_tokens=51)
    with pytest.raises(ArgumentError, match="num_tokens must be from 2 to 50, .*; got 1"):
        induction_scores(decoder, num_tokens=1)
    with pytest.raises(ArgumentError, match="num_sequences must be positive; got 0"):
        induction_scores(decoder, num_sequences=0)
    with torch.no_grad():
        decoder.body.norm.weight[0] = torch.nan
    with pytest.raises(ArgumentError, match="logits must be finite"):
        induction_scores(decoder)
    with pytest.raises(ArgumentError, match="model must be an Encoder, Decoder"):
        induction_scores(nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match="model must be the torch.nn.Module itself; got an object of type StackR"):
        induction_scores(readable(decoder))
