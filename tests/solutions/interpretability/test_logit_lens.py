"""The lens reads each layer as the model reads its last, which the last row equals exactly."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.models.decoder import Decoder
from transformer_problems.models.encoder import Encoder
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.interpretability.logit_lens import logit_lens
from transformer_problems.solutions.normalization.post_norm import PostNorm
from transformer_problems.solutions.recurrence.mamba import Mamba

TOKENS = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(9) < torch.tensor([[9], [5]])


def mixer() -> SelfAttention:
    return SelfAttention(16, 4)


def make_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return {
        "decoder": lambda: Decoder(17, 16, 3, mixer),
        "post-norm": lambda: Decoder(17, 16, 3, mixer, residual=PostNorm),
        "mamba": lambda: Decoder(17, 16, 3, lambda: Mamba(16)),
        "classifier": lambda: Encoder(17, 16, 3, lambda: SelfAttention(16, 4, is_causal=False), num_outputs=5),
        "llama": lambda: LlamaDecoder(LlamaConfig(17, 16, 3, 4, 24)),
        "tied llama": lambda: LlamaDecoder(LlamaConfig(17, 16, 3, 4, 24, tie_embeddings=True)),
    }[family]()


FAMILIES = ["decoder", "post-norm", "mamba", "classifier", "llama", "tied llama"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_row_is_the_models_own_logits(family: str, dtype: torch.dtype) -> None:
    model = make_model(family).to(dtype)
    depths = logit_lens(model, TOKENS)
    assert depths.shape == (3, 2, 9, 5 if family == "classifier" else 17)
    with torch.no_grad():  # with gradients, attention may take another path, which rounds otherwise in half precision
        assert torch.equal(depths[-1], model(TOKENS))
    assert not depths.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_what_the_model_gives_without_the_layers_after_it(family: str) -> None:
    depths = logit_lens(make_model(family), TOKENS, key_mask=MASK)
    for kept in (1, 2, 3):
        shorter = make_model(family)
        blocks = getattr(shorter, "body", shorter).blocks
        del blocks[kept:]
        assert torch.equal(depths[kept - 1], shorter(TOKENS, key_mask=MASK))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "GPTNeoXForCausalLM", "Qwen2ForCausalLM"])
def test_models_of_transformers_are_read(name: str) -> None:
    model = make_theirs(name)
    depths = logit_lens(model, TOKENS, key_mask=MASK)
    output = model.eval()(TOKENS, attention_mask=MASK.long(), output_hidden_states=True)
    assert torch.equal(depths[-1], output.logits)
    base = model.base_model
    norm = next(found for found in ("norm", "ln_f", "final_layer_norm") if hasattr(base, found))
    for layer in (0, 1):
        states = output.hidden_states[layer + 1]
        assert torch.equal(depths[layer], model.get_output_embeddings()(getattr(base, norm)(states)))


def make_theirs(name: str, **extra: object) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = model_class.config_class(**sizes, intermediate_size=24, num_key_value_heads=4, **extra)
    return model_class(config)


@pytest.mark.peer
def test_logits_with_something_after_the_output_layer_are_refused() -> None:
    model = make_theirs("Gemma2ForCausalLM", head_dim=4, final_logit_softcapping=0.1, pad_token_id=0)
    with pytest.raises(CombinationError, match="from its final norm and output layer alone; Gemma2ForCausalLM"):
        logit_lens(model, TOKENS)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForSequenceClassification"])
def test_other_models_of_transformers_are_refused(name: str) -> None:
    with pytest.raises(CombinationError, match=f"that can be told apart; {name} has not. Use a Decoder, Encoder"):
        logit_lens(make_theirs(name), TOKENS)


def test_models_of_other_forms_are_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"key_mask must be bool \[2, 9\], True for real tokens; got torch.bool \[9\]"
    ):
        logit_lens(make_model("decoder"), TOKENS, key_mask=MASK[0])
    with pytest.raises(CombinationError, match="told apart; Linear has not. Use a Decoder, Encoder or LlamaDecoder"):
        logit_lens(nn.Linear(3, 3), TOKENS)
    shared = make_model("decoder")
    shared.body.blocks[1] = shared.body.blocks[0]
    with pytest.raises(CombinationError, match="layer 0 was called 2 times"):
        logit_lens(shared, TOKENS)
    ill = make_model("decoder")
    with torch.no_grad():
        ill.body.norm.weight[0] = torch.nan
    with pytest.raises(CombinationError, match="or gave NaN"):
        logit_lens(ill, TOKENS)


def test_a_model_without_the_answer_is_refused() -> None:
    class Silent(Decoder):
        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            return {"logits of": super().forward(tokens)}

    with pytest.raises(CombinationError, match="must give a tensor, or have it as `logits`; got dict"):
        logit_lens(Silent(17, 16, 1, mixer), TOKENS)
