"""Every attention op, position encoding and mixer of the catalogue keeps the contract of its slot.

A catalogue entry of one of these roles without a sample here fails the build.
"""

import re
from itertools import product

import pytest
import torch

from transformer_problems import (
    ALiBi,
    AttentionSinks,
    ChunkedAttention,
    ConformerBlock,
    ContinualAttention,
    ConvolutionModule,
    DeltaRule,
    DenseAttention,
    DifferentialAttention,
    DropHead,
    EntmaxAttention,
    FlashAttention,
    GatedAttention,
    KNNMemoryAttention,
    LearnedPositions,
    LearnedTemperature,
    Linformer,
    LogLengthScale,
    LongformerAttention,
    Mamba,
    MemoryBankAttention,
    MemoryEfficientAttention,
    PackedAttention,
    PagedKVCache,
    PagePool,
    Performer,
    QuantizedKVCache,
    QueryKeyNorm,
    RandomizedPositions,
    RetroactiveAttention,
    RotaryEmbedding,
    ScaledRotaryEmbedding,
    SelfAttention,
    ShawRelative,
    SinusoidalEncoding,
    SlidingWindow,
    SparseAttention,
    T5RelativeBias,
    TopKAttention,
    TransformerXL,
    TransformerXLRelative,
    XPos,
)
from transformer_problems.catalogue import load_catalogue
from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.solutions.attention.fused_attention import FusedSelfAttention
from transformer_problems.solutions.attention.kernel_softmax import KernelSoftmaxAttention
from transformer_problems.solutions.attention.xformers_attention import XFormersAttention
from transformer_problems.solutions.tokens.bottleneck import BottleneckBlock
from transformer_problems.solutions.tokens.lightweight_convolution import LightweightConvolution
from transformer_problems.solutions.tokens.long_short import LongShortAttention
from transformer_problems.testing import check_attention_op, check_mixer, check_position

WIDTH, HEADS, HEAD_DIM = 32, 4, 8

OPS = {
    "dense": DenseAttention,
    "flash_sdpa": lambda: FlashAttention(backend="sdpa"),
    "flash_tiled": lambda: FlashAttention(backend="tiled", block_size=16),
    "window": lambda: SlidingWindow(5),
    "window_dilated": lambda: SlidingWindow(5, dilation=2),
    "window_dilated_by_head": lambda: SlidingWindow(5, dilation=(1, 1, 2, 3)),
    "sparse_strided": lambda: SparseAttention(8),
    "sparse_fixed": lambda: SparseAttention(8, pattern="fixed"),
    "performer": lambda: Performer(HEAD_DIM, num_features=16),
    "sinks": lambda: AttentionSinks(5, num_sinks=2),
    "top_k": lambda: TopKAttention(64, block_size=16),
    "memory_efficient": lambda: MemoryEfficientAttention(query_chunk=16, key_chunk=32),
    "kernel_softmax": KernelSoftmaxAttention,
    "xformers": XFormersAttention,
    "entmax": lambda: EntmaxAttention(1.5),
    "linformer": lambda: Linformer(101, 16, dtype=torch.float64),
    "temperature": lambda: LearnedTemperature(HEADS, initial=0.5, dtype=torch.float64),
    "temperature_window": lambda: LearnedTemperature(HEADS, SlidingWindow(5), initial=0.5, dtype=torch.float64),
    "query_key_norm": lambda: QueryKeyNorm(HEADS, dtype=torch.float64),
    "query_key_norm_window": lambda: QueryKeyNorm(HEADS, SlidingWindow(5), dtype=torch.float64),
    "query_key_norm_performer": lambda: QueryKeyNorm(HEADS, Performer(HEAD_DIM, num_features=16), dtype=torch.float64),
    "log_length": lambda: LogLengthScale(4),
    "log_length_window": lambda: LogLengthScale(4, SlidingWindow(5)),
    "log_length_sinks": lambda: LogLengthScale(4, AttentionSinks(5, num_sinks=2)),
    "drop_head": lambda: DropHead(rate=0.5).eval(),
    "drop_head_window": lambda: DropHead(SlidingWindow(5), rate=0.5).eval(),
    "drop_head_performer": lambda: DropHead(Performer(HEAD_DIM, num_features=16), rate=0.5).eval(),
}
MAX_LEN = {"linformer": 101}

POSITIONS = {
    "sinusoidal": lambda: SinusoidalEncoding(WIDTH),
    "learned": lambda: LearnedPositions(128, WIDTH),
    "shaw": lambda: ShawRelative(HEAD_DIM, max_distance=4),
    "t5": lambda: T5RelativeBias(HEADS, num_buckets=8, max_distance=16),
    "t5_bidirectional": lambda: T5RelativeBias(HEADS, num_buckets=8, max_distance=16, is_causal=False),
    "transformer_xl": lambda: TransformerXLRelative(WIDTH, HEADS),
    "rope": lambda: RotaryEmbedding(HEAD_DIM),
    "alibi": lambda: ALiBi(HEADS),
    "xpos": lambda: XPos(HEAD_DIM),
    "linear": lambda: ScaledRotaryEmbedding(HEAD_DIM, method="linear", factor=4, trained_length=16),
    "ntk": lambda: ScaledRotaryEmbedding(HEAD_DIM, method="ntk", factor=4, trained_length=16),
    "dynamic_ntk": lambda: ScaledRotaryEmbedding(HEAD_DIM, method="dynamic_ntk", factor=4, trained_length=16),
    "yarn": lambda: ScaledRotaryEmbedding(HEAD_DIM, method="yarn", factor=4, trained_length=16),
}

MIXERS = {  # segments, chunks and windows so short that gradients pass what is read from memory, and real searches
    "longformer_causal": lambda: LongformerAttention(WIDTH, HEADS, window_size=5, global_tokens=(0, 9), is_causal=True),
    "longformer": lambda: LongformerAttention(WIDTH, HEADS, window_size=5),
    "transformer_xl": lambda: TransformerXL(WIDTH, HEADS, segment_len=5, memory_len=9),
    "mamba": lambda: Mamba(WIDTH, state_dim=4),
    "delta_rule": lambda: DeltaRule(WIDTH, HEADS, chunk_size=16),
    "gated_delta_rule": lambda: DeltaRule(WIDTH, HEADS, chunk_size=16, gated=True),
    "memory_bank": lambda: MemoryBankAttention(WIDTH, HEADS, segment_len=2, left_context=1, num_memories=3),
    "chunked_causal": lambda: ChunkedAttention(WIDTH, HEADS, chunk_size=2, left_chunks=1, look_ahead=False),
    "continual": lambda: ContinualAttention(WIDTH, HEADS, window_len=4),
    "nearest_neighbors": lambda: KNNMemoryAttention(WIDTH, HEADS, segment_len=5, memory_len=9, num_neighbors=2),
    "gated": lambda: GatedAttention(SelfAttention(WIDTH, HEADS, position=RotaryEmbedding(HEAD_DIM))),
    "gated_by_head": lambda: GatedAttention(SelfAttention(WIDTH, HEADS), granularity="head"),
    "differential": lambda: DifferentialAttention(WIDTH, HEADS),
    "fused": lambda: FusedSelfAttention(WIDTH, HEADS, is_causal=False),
    "lightweight_convolution": lambda: LightweightConvolution(WIDTH, 5, is_causal=True),
    "long_short": lambda: LongShortAttention(WIDTH, SelfAttention(WIDTH // 2, HEADS), kernel_size=5),
    "bottleneck": lambda: BottleneckBlock(WIDTH, WIDTH // 2, HEADS),
    "grouped": lambda: SelfAttention(WIDTH, HEADS, num_kv_heads=2),
    "encoder": lambda: SelfAttention(WIDTH, HEADS, is_causal=False),
}
OTHER_MIXERS = {  # kept to their contract in their own tests
    "chunked": lambda: ChunkedAttention(WIDTH, HEADS, chunk_size=8, left_chunks=1),
    "retroactive": lambda: RetroactiveAttention(WIDTH, HEADS, window_len=9),
    "convolution": lambda: ConvolutionModule(WIDTH, 5, is_causal=True),
    "conformer": lambda: ConformerBlock(WIDTH, SelfAttention(WIDTH, HEADS), causal_convolution=True),
}
POSITIONED = {
    "transformer_xl": lambda position: TransformerXL(WIDTH, HEADS, segment_len=5, memory_len=9, position=position),
    "chunked": lambda position: ChunkedAttention(
        WIDTH, HEADS, chunk_size=2, left_chunks=1, look_ahead=False, position=position
    ),
    "memory_bank": lambda position: MemoryBankAttention(
        WIDTH, HEADS, segment_len=2, left_context=1, num_memories=3, position=position
    ),
    "continual": lambda position: ContinualAttention(WIDTH, HEADS, window_len=4, position=position),
    "differential": lambda position: DifferentialAttention(2 * WIDTH, HEADS, position=position),
    "nearest_neighbors": lambda position: KNNMemoryAttention(
        WIDTH, HEADS, segment_len=5, memory_len=9, num_neighbors=2, position=position
    ),
}
WIDTHS = {"differential": 2 * WIDTH}  # it halves its heads, and positions are told their width
POOL = PagePool(1000, page_size=8, num_kv_heads=2, head_dim=HEAD_DIM, dtype=torch.float64)
CACHES = {  # and the relative error that a stream may have: half a step of the range of a head's numbers
    "plain": (None, 1e-9),
    "paged": (lambda batch_size: PagedKVCache.empty(batch_size, pool=POOL), 1e-9),
    "int8": (lambda batch_size: QuantizedKVCache.empty(batch_size, bits=8, group_size=8, num_recent=8), 0.02),
    "int4": (lambda batch_size: QuantizedKVCache.empty(batch_size, bits=4, group_size=8, num_recent=8), 0.3),
}
SAMPLED = {
    *(type(make()).__name__ for make in (*OPS.values(), *POSITIONS.values(), *MIXERS.values())),
    RandomizedPositions.__name__,  # chooses positions for a model; it fills no slot
    PackedAttention.__name__,  # keeps the op's contract within each sequence only; tested with its packing
    *("QuantizedKVCache", "PagedKVCache"),  # sampled as caches of a layer, below
    *("RetrievalAugmented", "VectorIndex", "BM25Index"),  # memories of text, which no layer holds
    *("ShiftedWindowAttention", "SwinTransformer"),  # take tokens on a grid, which no slot does
    RetroactiveAttention.__name__,  # revises outputs that were given, which no slot allows
}


def test_every_catalogue_entry_of_these_roles_is_sampled() -> None:
    roles = {"attention", "position", "recurrence", "memory"}
    listed = {c.rpartition(":")[2] for s in load_catalogue().solutions if s.role in roles for c in s.code}
    assert listed <= SAMPLED, f"no sample for {listed - SAMPLED}"


@pytest.mark.parametrize("name", OPS)
def test_attention_op(name: str) -> None:
    op = OPS[name]()
    check_attention_op(op, num_heads=HEADS, head_dim=HEAD_DIM, max_seq_len=MAX_LEN.get(name))


@pytest.mark.parametrize("name", POSITIONS)
def test_position_encoding(name: str) -> None:
    check_position(POSITIONS[name](), embed_dim=WIDTH, num_heads=HEADS, max_seq_len=128)


@pytest.mark.parametrize("name", MIXERS)
def test_mixer(name: str) -> None:
    check_mixer(MIXERS[name], embed_dim=WIDTH)


@pytest.mark.parametrize("name", [*MIXERS, *OTHER_MIXERS])
def test_wrong_inputs_of_a_mixer_are_one_clear_error(name: str) -> None:
    mixer = (MIXERS | OTHER_MIXERS)[name]().eval()
    x = torch.randn(2, 37, WIDTH)
    calls = {"forward": mixer}
    if mixer.is_causal:
        calls["stream"] = lambda wrong: mixer.stream(wrong, mixer.initial_state(2))
    for call, wrong in product(calls.values(), (x[0], x[:, :0, 0], x[..., :5], x[:, :0, :5], x[None])):
        message = re.escape(f"x must be [B, N, {WIDTH}]; got {list(wrong.shape)}. Give one sequence as x[None].")
        with pytest.raises(ArgumentError, match=message):
            call(wrong)
    for wrong in (torch.ones(2, 37), torch.ones(37) > 0, torch.ones(1, 37) > 0):
        with pytest.raises(ArgumentError, match=r"key_mask must be bool \[2, 37\], True for real tokens; got torch\."):
            mixer(x, key_mask=wrong)
    for dtype, call in product((torch.float64, torch.bfloat16), calls.values()):
        with pytest.raises(ArgumentError, match=rf"must .*dtype.*; got {dtype}|x's dtype, {dtype}; got torch.float32"):
            call(x.to(dtype))
    with pytest.raises(ArgumentError, match="key_mask must be on cpu, as its tokens; got meta"):
        mixer(x, key_mask=torch.ones(2, 37, dtype=torch.bool, device="meta"))
    with pytest.raises(ArgumentError, match=r"key_mask must be bool \[2, 0\], True for real tokens; got torch\."):
        mixer(x[:, :0], key_mask=torch.ones(2, 37) > 0)


@pytest.mark.parametrize("position", [name for name, make in POSITIONS.items() if make().attends])
@pytest.mark.parametrize("op", OPS)
def test_every_op_with_every_position(op: str, position: str) -> None:
    """Causal self-attention of each pair streams exactly, or the pair is refused when it is built."""
    built_op, built_position = OPS[op](), POSITIONS[position]()
    refused = built_position.biases and not getattr(built_op, "accepts_bias", True)
    refused |= not getattr(built_op, "accepts_causal", True)
    refused |= getattr(built_op, "ignores_norms", False) and not built_position.keeps_norms
    if refused:
        with pytest.raises(CombinationError):
            SelfAttention(WIDTH, HEADS, op=built_op, position=built_position)
        return
    report = check_mixer(SelfAttention(WIDTH, HEADS, op=built_op, position=built_position), embed_dim=WIDTH)
    streamed = next(check for check in report.checks if check.name == "streamed equals whole")
    assert (streamed.outcome == "holds") == built_position.streams


@pytest.mark.parametrize("position", [name for name, make in POSITIONS.items() if make().attends])
@pytest.mark.parametrize("mixer", POSITIONED)
def test_every_mixer_with_every_position(mixer: str, position: str) -> None:
    """Each pair streams exactly where the position can be streamed, or is refused when it is built."""
    built = POSITIONS[position]()
    report = check_mixer(POSITIONED[mixer](built), embed_dim=WIDTHS.get(mixer, WIDTH))
    streamed = next(check for check in report.checks if check.name == "streamed equals whole")
    assert (streamed.outcome == "holds") == built.streams


@pytest.mark.parametrize("position", [name for name, make in POSITIONS.items() if make().attends])
@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_with_every_position(cache: str, position: str) -> None:
    """Grouped heads, a full window and a short one; a cache that rounds does so within its stated error."""
    make, tolerance = CACHES[cache]
    for op in (DenseAttention(), SlidingWindow(5), AttentionSinks(5, num_sinks=2)):
        built = POSITIONS[position]()
        mixer = SelfAttention(WIDTH, HEADS, num_kv_heads=2, op=op, position=built, cache=make)
        report = check_mixer(mixer, embed_dim=WIDTH, stream_tolerance=tolerance)
        streamed = next(check for check in report.checks if check.name == "streamed equals whole")
        assert (streamed.outcome == "holds") == built.streams
