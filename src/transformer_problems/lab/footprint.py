"""How many bytes training and decoding will take, predicted from a model's sizes before anything is allocated."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from transformer_problems.core.arguments import require_multiple, require_positive_int
from transformer_problems.core.errors import UnknownNameError

AttentionKind = Literal["dense", "flash", "flash_tiled", "memory_efficient"]
Optimizer = Literal["sgd", "momentum", "adamw"]
_MOMENTS: dict[Optimizer, int] = {"sgd": 0, "momentum": 1, "adamw": 2}
_STATISTIC = 4  # bytes of a float32: means, sums and exponentials are kept in it


@dataclass(frozen=True, slots=True)
class DecoderSize:
    """The sizes of a Decoder of SelfAttention layers, without parameters in its position encoding.

    Args:
        num_layers: L.
        embed_dim: C.
        num_heads: H.
        vocab_size: V; input and output embeddings are one matrix.
        num_kv_heads: G. Default H.
        expansion: F / C, the feed-forward network's inner width.
        rotary: Whether queries and keys are turned by RotaryEmbedding.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    vocab_size: int
    num_kv_heads: int | None = None
    expansion: int = 4
    rotary: bool = False

    def __post_init__(self) -> None:
        require_positive_int(num_layers=self.num_layers, vocab_size=self.vocab_size, expansion=self.expansion)
        require_multiple("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        require_multiple("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads or self.num_heads)

    @property
    def kv_dim(self) -> int:
        """G * D."""
        return self.embed_dim // self.num_heads * (self.num_kv_heads or self.num_heads)

    @property
    def num_parameters(self) -> int:
        """V C + 2 C + L (2 C^2 + 2 C G D + 2 C F + F + 5 C)."""
        width, inner = self.embed_dim, self.expansion * self.embed_dim
        layer = 2 * width**2 + 2 * width * self.kv_dim + 2 * width * inner + inner + 5 * width
        return self.vocab_size * width + 2 * width + self.num_layers * layer


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a training step by what they are for.

    Args:
        weights: The parameters.
        gradients: One for each parameter.
        optimizer: What the optimizer keeps between steps.
        activations: The most that is held at once of what the forward pass saves for the backward pass.
        scratch: The most that the gradients of activations add to them at any moment.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    scratch: int

    @property
    def total(self) -> int:
        """All at once: an upper bound, for activations are released while gradients appear."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.scratch


def predict_training_bytes(
    size: DecoderSize,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    optimizer: Optimizer = "adamw",
    attention: AttentionKind = "flash",
    checkpoint_every: int | Literal["sqrt"] | None = None,
) -> Footprint:
    """Bytes of one training step of a Decoder under a cross-entropy loss.

    With T = B N tokens, e bytes an element, and 4 bytes a statistic, a layer saves for the backward pass:

    - both norms: their inputs and outputs, 4 T C e, and a mean and a deviation a token, 4 T * 4;
    - attention: queries, keys and values for every query head, and its output, 4 T C e;
    - the feed-forward network: its inner width before and after the GELU, 2 T F e;
    - "dense": the weights of all scores, B H N^2 in float32 or wider, and once more in a narrower dtype, B H N^2 e;
    - "flash": a log-sum-exp a query and head, T H * 4; "flash_tiled": that, and the output once more, T C e;
    - rotary: cosines and sines, N D e, one pair for queries and keys; "flash" also the output once more, T C e, for
      turned queries lie head by head in memory, and so does then, on the CPU, what its kernel keeps.

    The last norm saves 2 T C e and 2 T * 4, the loss the log-probabilities, T V in float32. Scratch is the gradient of
    the logits, T V in float32, or of a feed-forward network, T (F + C) e, or with "dense" those of the last layer's
    weights and scores, 2 B H N^2 in float32 or wider, less what its feed-forward network and the head have released by
    then; whichever is larger. What single operations take for themselves and logits that the caller keeps come on top.

    Segments of s layers (`checkpoint_every`) save T C e each and, one after the other, what their s layers save.

    Args:
        checkpoint_every: As in `checkpoint_layers`; None saves everything.
        attention: Which op: DenseAttention, FlashAttention on "sdpa" or "tiled", or MemoryEfficientAttention.

    Raises:
        UnknownNameError: If there is no such optimizer or attention.
        ArgumentError: If a size is not positive.

    Source:
        Korthikanti et al. 2022, arXiv:2205.05198, section 4, counts a layer in the same way.
        Differs from the paper: the layers are this package's, without dropout, and dtypes vary.
    """
    require_positive_int(batch_size=batch_size, seq_len=seq_len)
    if optimizer not in _MOMENTS:
        raise UnknownNameError("optimizer", optimizer, _MOMENTS)
    if attention not in get_args(AttentionKind):
        raise UnknownNameError("attention", attention, get_args(AttentionKind))
    element, weights = dtype.itemsize, size.num_parameters * dtype.itemsize
    stream = batch_size * seq_len * size.embed_dim * element  # T C e: the hidden states once
    statistics = batch_size * seq_len * _STATISTIC
    layer = _layer_bytes(size, batch_size, seq_len, element, attention)
    head = 2 * stream + 2 * statistics + size.vocab_size * statistics
    released = (2 * size.expansion + 1) * stream
    if checkpoint_every is None:
        activations, released = size.num_layers * layer + head, released + head
    else:
        every = max(1, round(math.sqrt(size.num_layers))) if checkpoint_every == "sqrt" else checkpoint_every
        require_positive_int(checkpoint_every=every)
        inputs = math.ceil(size.num_layers / every) * stream
        activations = inputs + max(head, min(every, size.num_layers) * layer)
    scratch = max(size.vocab_size * statistics, (size.expansion + 1) * stream)
    if attention == "dense":
        num_scores = batch_size * size.num_heads * seq_len**2
        scratch = max(scratch, 2 * num_scores * max(element, _STATISTIC) - released)
    return Footprint(weights, weights, _MOMENTS[optimizer] * weights, activations, scratch)


def _layer_bytes(size: DecoderSize, batch_size: int, seq_len: int, element: int, attention: AttentionKind) -> int:
    """What one layer saves for the backward pass."""
    num_tokens, num_heads = batch_size * seq_len, size.num_heads
    stream = num_tokens * size.embed_dim * element
    saved = (4 + 4 + 2 * size.expansion) * stream + 4 * num_tokens * _STATISTIC
    if size.rotary:
        saved += seq_len * (size.embed_dim // num_heads) * element
    if attention == "dense":
        num_scores = batch_size * num_heads * seq_len**2
        saved += num_scores * (element if element >= _STATISTIC else _STATISTIC + element)
    elif attention != "memory_efficient":
        by_head = attention == "flash_tiled" or size.rotary  # the heads side by side are then a copy
        saved += num_tokens * num_heads * _STATISTIC + (stream if by_head else 0)
    return saved


def predict_cache_bytes(
    size: DecoderSize,
    *,
    batch_size: int,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    lookback: int | None = None,
    num_sinks: int = 0,
) -> int:
    """Bytes of the keys and values held after `num_tokens` tokens: 2 L B G D e times the tokens held.

    Args:
        lookback: Keys kept before the next query's own; None keeps all.
        num_sinks: First tokens kept beside them.

    Raises:
        ArgumentError: If a size is not positive.
    """
    require_positive_int(batch_size=batch_size, num_tokens=num_tokens)
    held = num_tokens if lookback is None else min(num_tokens, num_sinks + lookback)
    return 2 * size.num_layers * batch_size * size.kv_dim * held * dtype.itemsize


def predict_rounded_cache_bytes(
    size: DecoderSize,
    *,
    batch_size: int,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    bits: Literal[8, 4] = 8,
    group_size: int = 32,
    num_recent: int = 32,
) -> int:
    """Bytes of a QuantizedKVCache after `num_tokens` tokens, whose whole groups before the newest ones are rounded.

    A rounded token takes G D bits / 4 bytes of codes for key and value, and two numbers of the model's dtype for the
    range of each head's value; a group takes two numbers for the range of each key channel. The others take 2 G D e.

    Raises:
        ArgumentError: If a size is not positive.
    """
    require_positive_int(batch_size=batch_size, num_tokens=num_tokens, group_size=group_size)
    num_groups = max(0, num_tokens - num_recent) // group_size
    num_rounded = num_groups * group_size
    num_kv_heads = size.num_kv_heads or size.num_heads
    codes = num_rounded * size.kv_dim * bits // 4
    ranges = 2 * (num_rounded * num_kv_heads + num_groups * size.kv_dim) * dtype.itemsize
    exact = 2 * (num_tokens - num_rounded) * size.kv_dim * dtype.itemsize
    return size.num_layers * batch_size * (codes + ranges + exact)
