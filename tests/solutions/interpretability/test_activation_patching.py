"""Patching gives what a pass written out with the clean activation gives, in any batches."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError, UnknownNameError
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.activation_patching import activation_patching
from transformer_problems.solutions.interpretability.sites import Site

CLEAN = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
CORRUPTED = torch.tensor([[3, 2, 4, 1, 5], [9, 2, 7, 5, 3], [5, 0, 9, 7, 9]])


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(17, 16, 2, lambda: SelfAttention(16, 4, num_kv_heads=2)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.mul_(3)  # attention far from uniform
    return model


def finish(model: Decoder, x: Tensor, first: int) -> float:
    """The metric, from the stream before a block on."""
    for block in model.body.blocks[first:]:
        x = block(x)
    return float(metric(model.body.norm(x) @ model.body.embedding.weight.T))


def head_outputs(mixer: SelfAttention, h: Tensor) -> Tensor:
    """What each head reads, written out: [B, N, H, D]."""
    q, k, v = (layer(h).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = (q @ k.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 6, 7, 100])
def test_each_effect_is_that_of_a_pass_written_out(batch_size: int) -> None:
    model = decoder()
    sites = ["body.embedding", "body.blocks.0", Site("body.blocks.1.mixer", head=2), "body.blocks.1"]
    effects = activation_patching(model, CLEAN, CORRUPTED, metric, sites, positions=[4, 1, 2], batch_size=batch_size)
    assert effects.positions == (4, 1, 2)
    assert [site.path for site in effects.sites] == [site if isinstance(site, str) else site.path for site in sites]
    positions = torch.arange(5)
    clean, corrupted = (model.body.embed(tokens, positions) for tokens in (CLEAN, CORRUPTED))
    best, worst = finish(model, clean, 0), finish(model, corrupted, 0)
    assert effects.clean == pytest.approx(best, rel=1e-12)
    assert effects.corrupted == pytest.approx(worst, rel=1e-12)
    first, last = model.body.blocks
    middle = [first(x) for x in (clean, corrupted)]
    for column, p in enumerate(effects.positions):
        wanted = []
        for number, (ours, theirs) in enumerate(((corrupted, clean), (middle[1], middle[0]))):
            x = ours.clone()
            x[:, p] = theirs[:, p]
            wanted.append(finish(model, x, number))
        heads = [head_outputs(last.mixer, last.mixer_residual.norm(x)) for x in middle]
        mixed = heads[1].clone()
        mixed[:, p, 2] = heads[0][:, p, 2]
        x = middle[1] + last.mixer.out_proj(mixed.flatten(-2))
        x = x + last.feed_forward(last.feed_forward_residual.norm(x))
        wanted.append(finish(model, x, 2))
        x = last(middle[1])
        x[:, p] = last(middle[0])[:, p]
        wanted.append(finish(model, x, 2))
        for row, value in enumerate(wanted):
            share = (value - worst) / (best - worst)
            assert float(effects.restored[row, column]) == pytest.approx(share, rel=1e-8, abs=1e-10), (row, p)
    assert effects.restored[3].tolist() == pytest.approx([1, 0, 0], abs=1e-10)  # only the last position is read there


@pytest.mark.peer
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_of_transformers_are_patched(family: str) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double()
        layers, attention = "transformer.h", "attn"
    else:
        config = transformers.LlamaConfig(**sizes, intermediate_size=24)
        model = transformers.LlamaForCausalLM(config).double()
        layers, attention = "model.layers", "self_attn"
    sites = [f"{layers}.?", *(Site(f"{layers}.*.{attention}", head=head) for head in range(4))]
    effects = activation_patching(model, CLEAN, CORRUPTED, metric, sites)
    assert effects.restored.shape == (2 + 8, 5)
    assert effects.restored.isfinite().all()
    torch.testing.assert_close(effects.restored[1, -1], torch.tensor(1.0, dtype=torch.float64))
    # Without its position the first layer would be all that the input differs in: both changed positions are needed.
    assert effects.restored[0, 0].abs() < 1e-10
    assert (effects.restored[2:].abs() > 1e-10).any()


def test_inputs_other_than_tokens_and_models_without_logits_are_patched() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)).double()
    clean, corrupted = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    effects = activation_patching(model, clean, corrupted, lambda y: float(y), ["0", "1"])
    torch.testing.assert_close(effects.restored[0], effects.restored[1])
    weights = model[3].weight.view(2, 4)
    parts = ((model[1](model[0](clean)) - model[1](model[0](corrupted)))[0] * weights).sum(dim=1)
    torch.testing.assert_close(effects.restored[0], (parts / parts.sum()).detach())


def test_bad_input_is_refused() -> None:
    model, sites = decoder(), ["body.blocks.?"]
    with pytest.raises(UnknownNameError, match="unknown module 'blocks.9'. Nearest: "):
        activation_patching(model, CLEAN, CORRUPTED, metric, ["blocks.9"])
    for corrupted, got in ((CORRUPTED[:, 1:], "torch.int64 \\[3, 4\\]"), ([[1, 2]], "\\[\\[1, 2\\]\\]")):
        with pytest.raises(ArgumentError, match=f"must be tensors of one shape, .* \\[3, 5\\] and {got}"):
            activation_patching(model, CLEAN, corrupted, metric, sites)
    with pytest.raises(ArgumentError, match="metric must differ between clean and corrupted; got .* for both"):
        activation_patching(model, CLEAN, CLEAN, metric, sites)
    for positions, got in (([5], "5"), ([-1], "-1"), ([True], "True"), ([1.0], "1.0")):
        with pytest.raises(ArgumentError, match=f"positions must be whole numbers from 0 to 4; got {got}"):
            activation_patching(model, CLEAN, CORRUPTED, metric, sites, positions=positions)
    with pytest.raises(ArgumentError, match="positions must be whole numbers from 0 to 4; got 9"):
        activation_patching(model, CLEAN, CORRUPTED, metric, sites, positions=9)
    with pytest.raises(ArgumentError, match="positions must hold one position at least"):
        activation_patching(model, CLEAN, CORRUPTED, metric, sites, positions=[])
    with pytest.raises(ArgumentError, match="head must be one of the 4 of body.blocks.0.mixer; got 7"):
        activation_patching(model, CLEAN, CORRUPTED, metric, [Site("body.blocks.*.mixer", head=7)])
    with pytest.raises(ArgumentError, match="metric must give one finite number .*; got torch.float64 \\[3\\]"):
        activation_patching(model, CLEAN, CORRUPTED, lambda logits: logits[:, -1, 3], sites)
    for answer in (torch.nan, None, "much", torch.tensor(1j)):
        with pytest.raises(ArgumentError, match="metric must give one finite number .*; got (nan|None|'much'|torch.c)"):
            activation_patching(model, CLEAN, CORRUPTED, lambda logits, answer=answer: answer, sites)
    with pytest.raises(ArgumentError, match="metric must be a function of the model's output; got None"):
        activation_patching(model, CLEAN, CORRUPTED, None, sites)
    with pytest.raises(ArgumentError, match="sites must be paths or Site objects; got 3"):
        activation_patching(model, CLEAN, CORRUPTED, metric, [3])
    with pytest.raises(CombinationError, match="an activation must be \\[3, 5, C\\] .*; body.blocks.0.mixer.op gave"):
        activation_patching(model, CLEAN, CORRUPTED, metric, ["body.blocks.0.mixer.op"])
    with pytest.raises(ArgumentError, match="batch_size must be positive; got 0"):
        activation_patching(model, CLEAN, CORRUPTED, metric, sites, batch_size=0)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(part.training for part in model.modules())
