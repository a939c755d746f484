"""A Llama-shaped decoder, and its checkpoints in the layout of Hugging Face."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transformer_problems.core.arguments import require_multiple, require_positive
from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.core.heads import check_key_mask
from transformer_problems.core.inputs import check_tokens
from transformer_problems.core.slots import token_positions
from transformer_problems.kernels.linear import Linear, linear
from transformer_problems.kernels.rms_norm import RMSNorm
from transformer_problems.models.block import TransformerBlock
from transformer_problems.models.stack import StackState, TransformerLayers, check_state
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.normalization.pre_norm import PreNorm
from transformer_problems.solutions.position.rotary import RotaryEmbedding

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ARCHITECTURE = "LlamaForCausalLM"
_FIELDS = {  # ours -> Hugging Face's
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "feed_forward_dim": "intermediate_size",
}
_PARTS = {  # of a layer: ours -> Hugging Face's
    "mixer_residual.norm": "input_layernorm",
    "mixer.q_proj": "self_attn.q_proj",
    "mixer.k_proj": "self_attn.k_proj",
    "mixer.v_proj": "self_attn.v_proj",
    "mixer.out_proj": "self_attn.o_proj",
    "feed_forward_residual.norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_ENDS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The sizes of a Llama-shaped decoder.

    Args:
        vocab_size: V.
        embed_dim: C.
        num_layers: L.
        num_heads: H, a divisor of C.
        feed_forward_dim: F, inner width of the feed-forward network.
        num_kv_heads: G, a divisor of H. Default H.
        rotary_base: Base of the rotary embedding.
        norm_eps: Added to the mean square in every RMSNorm.
        tie_embeddings: The output layer uses the embedding's weights.
        max_seq_len: Tokens the model is meant for; recorded, not enforced.
        bos_token_id: Token that begins a text.
        eos_token_ids: Tokens that end one.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    feed_forward_dim: int
    num_kv_heads: int | None = None
    rotary_base: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_seq_len: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_positive(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            feed_forward_dim=self.feed_forward_dim,
            norm_eps=self.norm_eps,
            max_seq_len=self.max_seq_len,
        )
        require_multiple("embed_dim", self.embed_dim, "num_heads", self.num_heads)

    @classmethod
    def from_hugging_face(cls, fields: dict[str, Any], *, source: str) -> Self:
        """Read the fields of a config.json.

        Raises:
            ArgumentError: If it is of another architecture, lacks a field, or asks for what LlamaDecoder has not.
        """
        architectures = fields.get("architectures") or [fields.get("model_type")]
        if architectures not in ([_ARCHITECTURE], ["llama"]):
            raise ArgumentError(f"folder must hold a {_ARCHITECTURE}; {source} says {architectures}. Choose another.")
        for name in _FIELDS.values():
            if not isinstance(fields.get(name), int) or fields[name] < 1:
                raise ArgumentError(f"{name} must be a positive whole number; {source} says {fields.get(name)!r}.")
        rotary = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        head_dim = fields["hidden_size"] // fields["num_attention_heads"]
        for name, value, needed in (
            ("hidden_act", fields.get("hidden_act", "silu"), "silu"),
            ("attention_bias", fields.get("attention_bias", False), False),
            ("mlp_bias", fields.get("mlp_bias", False), False),
            ("head_dim", fields.get("head_dim") or head_dim, head_dim),
            ("rope_type", rotary.get("rope_type", rotary.get("type", "default")), "default"),
        ):
            if value != needed:
                raise ArgumentError(f"{name} must be {needed!r} for LlamaDecoder; {source} says {value!r}.")
        ends = fields.get("eos_token_id")
        return cls(
            **{ours: fields[theirs] for ours, theirs in _FIELDS.items()},
            num_kv_heads=fields.get("num_key_value_heads"),
            rotary_base=rotary.get("rope_theta", fields.get("rope_theta", 10_000.0)),
            norm_eps=fields.get("rms_norm_eps", 1e-6),
            tie_embeddings=fields.get("tie_word_embeddings", False),
            max_seq_len=fields.get("max_position_embeddings", 2048),
            bos_token_id=fields.get("bos_token_id"),
            eos_token_ids=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
        )

    def to_hugging_face(self, dtype: torch.dtype) -> dict[str, Any]:
        """The fields of a config.json."""
        return {
            "architectures": [_ARCHITECTURE],
            "model_type": "llama",
            **{theirs: getattr(self, ours) for ours, theirs in _FIELDS.items()},
            "num_key_value_heads": self.num_kv_heads or self.num_heads,
            "hidden_act": "silu",
            "rope_theta": self.rotary_base,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_seq_len,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": str(dtype).removeprefix("torch."),
        }


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), [..., C] -> [..., C]: a feed-forward network with a gate, without biases.

    Args:
        embed_dim: C.
        feed_forward_dim: F, the inner width.

    Source:
        Shazeer 2020, arXiv:2002.05202, section 2.
    """

    def __init__(
        self,
        embed_dim: int,
        feed_forward_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate = Linear(embed_dim, feed_forward_dim, bias=False, device=device, dtype=dtype)
        self.up = Linear(embed_dim, feed_forward_dim, bias=False, device=device, dtype=dtype)
        self.down = Linear(feed_forward_dim, embed_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


class LlamaDecoder(nn.Module):
    """A causal language model of pre-norm layers with RMSNorm, rotary positions, grouped heads and SwiGLU.

    Matrices start normal with standard deviation 0.02.

    Shape:
        tokens: [B, N] int; key_mask: [B, N] bool; positions: [N] or [B, N]; output: logits [B, N, V].

    Source:
        Touvron et al. 2023, arXiv:2302.13971, section 2.2. Differs from the paper: key/value heads may be fewer than
        query heads (arXiv:2307.09288, section 2.2), and the output layer may share the embedding's weights.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        width, head_dim = config.embed_dim, config.embed_dim // config.num_heads
        norm = partial(RMSNorm, eps=config.norm_eps)
        position = RotaryEmbedding(head_dim, base=config.rotary_base)
        self.embedding = nn.Embedding(config.vocab_size, width, device=device, dtype=dtype)
        self.blocks = TransformerLayers(
            TransformerBlock(
                width,
                SelfAttention(
                    width,
                    config.num_heads,
                    num_kv_heads=config.num_kv_heads,
                    position=position,
                    device=device,
                    dtype=dtype,
                ),
                residual=partial(PreNorm, norm=norm),
                feed_forward=partial(SwiGLU, feed_forward_dim=config.feed_forward_dim),
                device=device,
                dtype=dtype,
            )
            for _ in range(config.num_layers)
        )
        self.norm = norm(width, device=device, dtype=dtype)
        self.head = (
            None if config.tie_embeddings else Linear(width, config.vocab_size, bias=False, device=device, dtype=dtype)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        check_tokens(tokens)
        check_key_mask(key_mask, tokens)
        if positions is None:
            positions = token_positions(tokens.shape[1], tokens.device)
        return self._logits(self.blocks(self.embedding(tokens), key_mask=key_mask, positions=positions))

    def initial_state(self, batch_size: int) -> StackState:
        """The state before the first token: an empty cache for each layer."""
        return self.blocks.initial_state(batch_size)

    def stream(self, tokens: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """Logits of the next chunk, [B, n] -> [B, n, V], and the state after it."""
        check_tokens(tokens)
        check_state(state)
        x, state = self.blocks.stream(self.embedding(tokens), state)
        return self._logits(x), state

    def _logits(self, x: Tensor) -> Tensor:
        weight = self.embedding.weight if self.head is None else self.head.weight
        return linear(self.norm(x), weight)


def load_llama(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> LlamaDecoder:
    """The model of a Hugging Face folder: config.json with model.safetensors, whole or in shards.

    Args:
        dtype: Default that of the stored embedding.

    Raises:
        ArgumentError: If the folder lacks a file, holds pickled weights only, is damaged, is of another architecture,
            or its weights do not fit its config.
    """
    folder = Path(folder)
    config = LlamaConfig.from_hugging_face(_read_json(folder / "config.json"), source=str(folder / "config.json"))
    model = LlamaDecoder(config, device="meta")
    weights = _read_weights(folder)
    shapes = {_their_name(name): parameter.shape for name, parameter in model.named_parameters()}
    _check_weights(weights, shapes, folder)
    dtype = weights[_their_name("embedding.weight")].dtype if dtype is None else dtype
    state = {
        name: weights[_their_name(name)].to(device=device, dtype=dtype, copy=True)  # not the file mapped into memory
        for name, _ in model.named_parameters()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_llama(model: LlamaDecoder, folder: Path) -> None:
    """Write config.json and model.safetensors, which transformers reads as a LlamaForCausalLM.

    Raises:
        OutputError: If the folder cannot be written.
    """
    folder = Path(folder)
    weights = {_their_name(name): parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    config = model.config.to_hugging_face(model.embedding.weight.dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"folder must be writable; got {folder}: {error}. Choose another.") from error


def _their_name(name: str) -> str:
    """Hugging Face's name of one of our parameters."""
    module = name.removesuffix(".weight")
    if module in _ENDS:
        return f"{_ENDS[module]}.weight"
    _, layer, part = module.split(".", 2)
    return f"model.layers.{layer}.{_PARTS[part]}.weight"


def _read_json(path: Path) -> dict[str, Any]:
    fields = _read(path, lambda file: json.loads(file.read_text()))
    if not isinstance(fields, dict):
        raise ArgumentError(f"{path} must hold a JSON object; it holds a {type(fields).__name__}.")
    return fields


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / _INDEX).is_file() and not (folder / _WEIGHTS).is_file():
        shards = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise ArgumentError(f"{folder / _INDEX} must hold a weight_map from names to files; it holds none.")
        files = [folder / name for name in sorted({Path(str(shard)).name for shard in shards.values()})]
    else:
        files = [folder / _WEIGHTS]
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles and not files[0].is_file():
        raise ArgumentError(
            f"folder must hold {_WEIGHTS}; {folder} holds {pickles[0]}, a pickle, which could run any code when read. "
            "Save the model again as safetensors."
        )
    return {name: weight for file in files for name, weight in _read(file, load_file).items()}


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise ArgumentError(f"folder must hold {path.name}; {path.parent} does not. Choose another.") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise ArgumentError(f"{path} must be readable and whole: {error}. Fetch or save it again.") from error


def _check_weights(weights: dict[str, Tensor], shapes: dict[str, torch.Size], folder: Path) -> None:
    missing = sorted(shapes.keys() - weights.keys())
    if missing:
        raise ArgumentError(f"the weights of {folder} must hold {missing[0]}; {len(missing)} of {len(shapes)} lack.")
    tables = {name for name in weights if name.endswith("rotary_emb.inv_freq")}  # written by older versions
    unknown = sorted(weights.keys() - shapes.keys() - tables - {"lm_head.weight"})
    if unknown:
        raise ArgumentError(f"the weights of {folder} must fit its config.json, which has no place for {unknown[0]}.")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ArgumentError(
                f"{name} must have the shape {tuple(shape)}, by config.json; {folder} holds one of "
                f"{tuple(weights[name].shape)}. Fetch or save both again."
            )
