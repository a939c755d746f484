"""Tokens that a model has no embeddings for are one clear line in every tool that runs it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.activation_patching import activation_patching
from transformer_problems.solutions.interpretability.activations import collect_activations
from transformer_problems.solutions.interpretability.answers import answer
from transformer_problems.solutions.interpretability.faithfulness import faithfulness
from transformer_problems.solutions.interpretability.gradient_x_input import GradientXInput
from transformer_problems.solutions.interpretability.head_ablation import ablate_heads
from transformer_problems.solutions.interpretability.logit_lens import logit_lens
from transformer_problems.solutions.interpretability.rollout import AttentionRollout
from transformer_problems.solutions.interpretability.sites import Site

TOKENS = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(0))


def decoder() -> nn.Module:
    return Decoder(17, 16, 2, lambda: SelfAttention(16, 4))


def llama() -> nn.Module:
    return LlamaDecoder(LlamaConfig(17, 16, 2, 4, 24))


def gpt2() -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"vocab_size": 17, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


MODELS = [
    pytest.param((decoder, "body.blocks.*.mixer"), id="decoder"),
    pytest.param((llama, "blocks.*.mixer"), id="llama"),
    pytest.param((gpt2, "transformer.h.*.attn"), id="gpt2", marks=pytest.mark.peer),
]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].mean()


def ablate(model: nn.Module, tokens: Any, layers: str) -> None:
    with ablate_heads(model, [Site(layers, 0)], mean_over=tokens):
        model(TOKENS)


TOOLS: dict[str, tuple[str, Callable[[nn.Module, Any, str], object]]] = {
    "logit_lens": ("tokens", lambda model, tokens, layers: logit_lens(model, tokens)),
    "collect_activations": ("tokens", lambda model, tokens, layers: collect_activations(model, tokens, [layers])),
    "clean": ("clean", lambda model, tokens, layers: activation_patching(model, tokens, tokens, metric, [layers])),
    "corrupted": (
        "corrupted",
        lambda model, tokens, layers: activation_patching(model, TOKENS, tokens, metric, [layers]),
    ),
    "ablate_heads": ("mean_over", ablate),
    "gradients": ("tokens", lambda model, tokens, layers: GradientXInput().explain(model, tokens)),
    "attention": ("tokens", lambda model, tokens, layers: AttentionRollout().explain(model, tokens)),
    "faithfulness": (
        "tokens",
        lambda model, tokens, layers: faithfulness(model, tokens, GradientXInput().explain(model, TOKENS)),
    ),
}
BAD = {
    "negative": (TOKENS - 18, r"{name} must be from 0 to 16; got -1\d\. Use the tokenizer that belongs to the model"),
    "too large": (TOKENS + 1 + 16 * (TOKENS > 8), r"{name} must be from 0 to 16; got \d\d\. Use the tokenizer that be"),
    "floats": (TOKENS.float(), r"{name} must be whole numbers \[B, N\]; got torch.float32 \[2, 9\]. Give one sequence"),
    "bool": (TOKENS > 8, r"{name} must be whole numbers \[B, N\]; got torch.bool \[2, 9\]"),
    "complex": (TOKENS * 1j, r"{name} must be whole numbers \[B, N\]; got torch.complex64 \[2, 9\]"),
    "int8": (TOKENS.to(torch.int8), r"{name} must be whole numbers \[B, N\]; got torch.int8 \[2, 9\]"),
    "meta": (TOKENS.to("meta"), r"{name} must hold numbers; got torch.int64 \[2, 9\] on meta, which holds none"),
    "one sequence": (TOKENS[0], r"must be .*(\[B, N\]|\[S, N\]|of one shape); got"),
    "too many dimensions": (TOKENS[None], r"must be .*(\[B, N\]|\[S, N\]); got .*\[1, 2, 9\]"),
    "no tokens": (TOKENS[:, :0], r"must (hold a token at least|be tensors of one shape|be a tensor of one)"),
    "no sequences": (TOKENS[:0], r"must (hold a token at least|be tensors of one shape|be a tensor of one)"),
    "a list": (TOKENS.tolist(), r"must be .*; got .*list"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("bad", BAD)
def test_tokens_that_no_model_has_embeddings_for_are_refused(
    bad: str, tool: str, model: tuple[Callable[[], nn.Module], str]
) -> None:
    (make, layers), (tokens, message), (name, run) = model, BAD[bad], TOOLS[tool]
    made = make()
    before = [part.training for part in made.modules()]
    with pytest.raises(ArgumentError, match=message.format(name=name)):
        run(made, tokens, layers)
    assert [part.training for part in made.modules()] == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in made.modules())


def test_models_of_other_inputs_take_what_they_take() -> None:
    """Floats, tokens of a vocabulary that cannot be told, and inputs of more dimensions."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    x = torch.randn(2, 9, 4)
    assert torch.equal(collect_activations(model, x, ["0"])["0"], model[0](x).detach())
    found = activation_patching(model, x, -x, lambda y: answer(y)[:, -1].sum(), ["0"])
    assert found.restored.shape == (1, 9)
