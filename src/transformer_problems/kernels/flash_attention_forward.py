"""The forward kernel of `flash_attention_triton`, and what its backward kernels share; importing this needs Triton.

Scores are kept in base 2, since exp2 is what the hardware has. Whole tiles of keys that every query of a tile may see
are gone through without a mask, those on the diagonal and at the ragged end with one.
"""

import triton
import triton.language as tl


@triton.jit
def head_start(base, batch, head, batch_stride, head_stride):
    """Where a head begins; in 64 bits, since a batch may hold more than 2^31 values."""
    return base + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def _cells(token, stride, WIDTH: tl.constexpr):
    return token.to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _inside(token, num_tokens, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    inside = (token < num_tokens)[:, None]
    if HEAD_DIM != WIDTH:
        inside = inside & (tl.arange(0, WIDTH) < HEAD_DIM)[None, :]
    return inside


@triton.jit
def load_tokens(head, token, stride, num_tokens, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[tokens, WIDTH] of one head, zeros past its last token and its last dimension."""
    inside = _inside(token, num_tokens, HEAD_DIM, WIDTH)
    return tl.load(head + _cells(token, stride, WIDTH), mask=inside, other=0.0)


@triton.jit
def store_tokens(head, values, token, num_tokens, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write [tokens, WIDTH] to a head that is packed, in its dtype."""
    inside = _inside(token, num_tokens, HEAD_DIM, WIDTH)
    tl.store(head + _cells(token, HEAD_DIM, WIDTH), values.to(head.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b):
    """a b summed in float32, without the shorter TF32 for float32."""
    if INTERPRETED:  # it multiplies the bits of bfloat16 as whole numbers; products of halves are exact in float32
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


INTERPRETED = tl.constexpr(not isinstance(product, triton.JITFunction))


@triton.jit
def keys_allowed(key_mask, column, mask_stride, num_keys):
    """[columns] bool: keys that exist and that the key mask, where there is one, lets be seen."""
    allowed = column < num_keys
    if key_mask is not None:
        allowed = tl.load(key_mask + column.to(tl.int64) * mask_stride, mask=allowed, other=0) != 0
    return allowed


@triton.jit
def scores_of(
    q_tile,
    k_tile,
    row,
    column,
    offset,
    num_keys,
    key_mask,
    mask_stride,
    scale,
    IS_CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[rows, columns] in base 2, -inf where a query may not attend."""
    scores = product(q_tile, tl.trans(k_tile)) * scale
    if MASKED:
        allowed = keys_allowed(key_mask, column, mask_stride, num_keys)[None, :]
        if IS_CAUSAL:
            allowed = allowed & (column[None, :] <= row[:, None] + offset)
        scores = tl.where(allowed, scores, float("-inf"))
    return scores


@triton.jit
def key_ranges(
    start,
    offset,
    num_keys,
    key_mask,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """For the queries from `start` on: where the keys that all of them see end, in whole tiles, and where any ends."""
    common = num_keys
    end = num_keys
    if CAUSAL:
        common = tl.maximum(tl.minimum(start + offset + 1, num_keys), 0)
        end = tl.maximum(tl.minimum(start + offset + ROWS, num_keys), 0)
    common = common // COLUMNS * COLUMNS
    if key_mask is not None:
        common = 0
    return common, end


@triton.jit
def _attend(
    largest,
    total,
    sums,
    q_tile,
    k,
    v,
    key_mask,
    k_stride,
    v_stride,
    mask_stride,
    row,
    begin,
    end,
    offset,
    num_keys,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The running softmax of a tile of queries after the keys from `begin` to `end`."""
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        k_tile = load_tokens(k, column, k_stride, num_keys, HEAD_DIM, WIDTH)
        scores = scores_of(
            q_tile, k_tile, row, column, offset, num_keys, key_mask, mask_stride, scale, IS_CAUSAL, MASKED
        )
        now_largest = tl.maximum(largest, tl.max(scores, 1))
        reference = now_largest
        if MASKED:  # a row that has seen no key yet
            reference = tl.where(now_largest == float("-inf"), 0.0, now_largest)
        weights = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(largest - reference)
        v_tile = load_tokens(v, column, v_stride, num_keys, HEAD_DIM, WIDTH)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + product(weights.to(v_tile.dtype), v_tile)
        largest = now_largest
    return largest, total, sums


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    key_mask,
    out,
    log_sums,
    q_batch,
    q_head,
    q_stride,
    k_batch,
    k_head,
    k_stride,
    v_batch,
    v_head,
    v_stride,
    mask_batch,
    mask_stride,
    num_heads,
    group_size,
    num_queries,
    num_keys,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """One tile of queries of one head: its output and each row's log-sum-exp, +inf where it sees no key."""
    num_tiles = tl.cdiv(num_queries, ROWS)
    start = tl.program_id(0) % num_tiles * ROWS
    place = tl.program_id(0) // num_tiles
    batch, head = place // num_heads, place % num_heads
    q = head_start(q, batch, head, q_batch, q_head)
    k = head_start(k, batch, head // group_size, k_batch, k_head)
    v = head_start(v, batch, head // group_size, v_batch, v_head)
    if key_mask is not None:
        key_mask += batch.to(tl.int64) * mask_batch
    row = start + tl.arange(0, ROWS)
    offset = num_keys - num_queries
    q_tile = load_tokens(q, row, q_stride, num_queries, HEAD_DIM, WIDTH)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    common, end = key_ranges(start, offset, num_keys, key_mask, ROWS, COLUMNS, IS_CAUSAL)
    largest, total, sums = _attend(
        largest, total, sums, q_tile, k, v, key_mask, k_stride, v_stride, mask_stride, row, 0, common, offset, num_keys,
        scale, HEAD_DIM, WIDTH, COLUMNS, IS_CAUSAL, False,
    )  # fmt: skip
    largest, total, sums = _attend(
        largest, total, sums, q_tile, k, v, key_mask, k_stride, v_stride, mask_stride, row, common, end, offset,
        num_keys, scale, HEAD_DIM, WIDTH, COLUMNS, IS_CAUSAL, True,
    )  # fmt: skip
    first_row = place.to(tl.int64) * num_queries
    empty = total == 0.0
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    store_tokens(out + first_row * HEAD_DIM, sums, row, num_queries, HEAD_DIM, WIDTH)
    log_sum = tl.where(empty, float("inf"), largest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(log_sums + first_row + row, log_sum, mask=row < num_queries)
