"""LlamaDecoder: the same model as transformers', streamed or whole, and folders that are read or clearly refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.models.llama import LlamaConfig, LlamaDecoder, load_llama, save_llama

SIZES = {"vocab_size": 61, "embed_dim": 48, "num_layers": 3, "num_heads": 6, "feed_forward_dim": 80}
LENGTHS = (1, 63, 64, 100, 101)


def make_model(**changes: object) -> LlamaDecoder:
    torch.manual_seed(0)
    model = LlamaDecoder(LlamaConfig(**{**SIZES, "num_kv_heads": 2, **changes}))
    with torch.no_grad():  # weights of order one, so that every part matters to the logits
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=parameter.shape[-1] ** -0.5)
    return model.eval()


def make_tokens(length: int, batch_size: int = 2) -> Tensor:
    return torch.randint(61, (batch_size, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_llama(make_model(), tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.peer
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": None}, {"tie_embeddings": True}, {"rotary_base": 500_000.0, "norm_eps": 1e-2}],
    ids=["grouped", "all heads", "tied", "base and eps"],
)
def test_transformers_reads_what_we_save_and_gives_the_same_logits_and_gradients(changes, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    ours = make_model(**changes)
    save_llama(ours, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for length in LENGTHS:
        tokens = make_tokens(length)
        # float32 sums of up to 101 terms through three layers, in another order: 2^-24 * 101 * 3 is 2e-5
        torch.testing.assert_close(ours(tokens), peer(tokens).logits, atol=2e-5, rtol=2e-5)
    tokens = make_tokens(33)
    weight = torch.randn(2, 33, 61, generator=torch.Generator().manual_seed(1))
    for logits in (ours(tokens), peer(tokens).logits):
        (logits * weight).mean().backward()
    theirs = dict(peer.named_parameters())
    pairs = {
        "embedding": "model.embed_tokens",
        "blocks.1.mixer.k_proj": "model.layers.1.self_attn.k_proj",
        "blocks.0.mixer.out_proj": "model.layers.0.self_attn.o_proj",
        "blocks.2.mixer_residual.norm": "model.layers.2.input_layernorm",
        "blocks.0.feed_forward.gate": "model.layers.0.mlp.gate_proj",
        "norm": "model.norm",
    }
    for own, other in pairs.items():
        gradient = ours.get_parameter(f"{own}.weight").grad
        expected = theirs[f"{other}.weight"].grad
        torch.testing.assert_close(gradient, expected, atol=2e-5 * expected.abs().max().item(), rtol=2e-5)


@pytest.mark.peer
def test_we_read_what_transformers_saves_in_one_file_or_in_shards(tmp_path) -> None:
    from transformers import LlamaConfig as PeerConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = PeerConfig(
        vocab_size=61,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=80,
        eos_token_id=[5, 7],
        rope_parameters={"rope_type": "default", "rope_theta": 20_000.0},
    )
    peer = LlamaForCausalLM(config).eval()
    tokens = make_tokens(20)
    for shard_size in ("1GB", "50KB"):
        target = tmp_path / shard_size
        peer.save_pretrained(target, max_shard_size=shard_size)
        model = load_llama(target)
        assert model.config.eos_token_ids == (5, 7)
        assert model.config.rotary_base == 20_000.0
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-5, rtol=1e-5)  # float32, other order
    assert len(list((tmp_path / "50KB").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 12], [20]])
def test_streamed_chunks_give_the_whole_sequence(num_kv_heads: int, chunks: list[int]) -> None:
    model, tokens = make_model(num_kv_heads=num_kv_heads), make_tokens(20)
    state = model.initial_state(2)
    parts = []
    with torch.no_grad():
        for part in tokens.split(chunks, dim=1):
            logits, state = model.stream(part, state)
            parts.append(logits)
        # float32 sums in another order, through three layers
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=2e-5, rtol=2e-5)
    assert state.num_seen == 20
    assert state.num_bytes == 2 * 3 * 2 * num_kv_heads * 20 * 8 * 4  # k and v, layers, batch, heads, tokens, D, bytes


def test_a_prefix_can_be_continued_in_two_ways() -> None:
    model, tokens = make_model(), make_tokens(10)
    with torch.no_grad():
        _, prefix = model.stream(tokens[:, :6], model.initial_state(2))
        first, _ = model.stream(tokens[:, 6:7], prefix)
        model.stream(tokens[:, 7:8], prefix)
        again, _ = model.stream(tokens[:, 6:7], prefix)
    assert torch.equal(first, again)


def test_later_tokens_and_masked_ones_change_nothing_before_them() -> None:
    model, tokens = make_model(), make_tokens(30)
    changed = tokens.clone()
    changed[:, 17:] = 0
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 17:] = False
    assert torch.equal(model(tokens)[:, :17], model(changed)[:, :17])
    # float32: a masked call may sum in another order
    torch.testing.assert_close(model(tokens, key_mask=mask)[:, :17], model(tokens)[:, :17], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_every_weight_and_the_config(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(tie_embeddings=True, bos_token_id=3, eos_token_ids=(3,), max_seq_len=99).to(dtype)
    save_llama(model, tmp_path)
    loaded = load_llama(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    for (name, saved), (_, back) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(saved, back), name
        assert back.dtype == dtype and back.requires_grad
    assert load_llama(tmp_path, dtype=torch.float64).norm.weight.dtype == torch.float64


def test_a_loaded_model_does_not_depend_on_its_files(folder: Path) -> None:
    model = load_llama(folder)
    save_llama(model, folder)
    (folder / "model.safetensors").write_bytes(b"")
    model(make_tokens(5))


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArgumentError, match=r"folder must hold model\.safetensors"):
        load_llama(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ArgumentError, match=r"folder must hold config\.json"):
        load_llama(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ArgumentError, match=r"folder must hold model-00002-of-00002\.safetensors"):
        load_llama(folder)


def test_a_pickle_is_refused_unread(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ArgumentError, match=r"pytorch_model\.bin, a pickle"):
        load_llama(folder)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights_are_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArgumentError, match=r"model\.safetensors must be readable and whole"):
        load_llama(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"config\.json must"):
        load_llama(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "must hold a LlamaForCausalLM"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number"),
        ({"num_attention_heads": "6"}, "num_attention_heads must be a positive whole number"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"mlp_bias": True}, "mlp_bias must be False"),
        ({"head_dim": 16}, "head_dim must be 8"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type must be 'default'"),
        ({"num_key_value_heads": 4}, "num_heads must be a multiple of num_kv_heads"),
        ({"num_hidden_layers": 4}, r"must hold model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"has no place for model\.layers\.2\."),
        ({"vocab_size": 60}, r"must have the shape \(60, 48\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(ArgumentError, match=message):
        load_llama(folder)


def test_an_unknown_weight_is_refused_and_old_rotary_tables_are_not(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = {**load_file(path), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights, path)
    load_llama(folder)
    save_file({**weights, "model.extra.weight": torch.ones(1)}, path)
    with pytest.raises(ArgumentError, match=r"no place for model\.extra\.weight"):
        load_llama(folder)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="folder must be writable"):
        save_llama(make_model(), tmp_path / "file")
