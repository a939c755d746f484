"""The backward kernels of `flash_attention_triton`: scores are formed again from the log-sum-exp of each row.

Queries and keys have a kernel each, so that every gradient is summed by one program, in one order, without atomic
additions.
"""

import triton
import triton.language as tl

from transformer_problems.kernels.flash_attention_forward import (
    head_start,
    key_ranges,
    keys_allowed,
    load_tokens,
    product,
    scores_of,
    store_tokens,
)


@triton.jit
def _add_grad_q(
    grad,
    q_tile,
    grad_tile,
    log_sum,
    mean_grad,
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
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        k_tile = load_tokens(k, column, k_stride, num_keys, HEAD_DIM, WIDTH)
        scores = scores_of(
            q_tile, k_tile, row, column, offset, num_keys, key_mask, mask_stride, scale, IS_CAUSAL, MASKED
        )
        weights = tl.exp2(scores - log_sum[:, None])
        v_tile = load_tokens(v, column, v_stride, num_keys, HEAD_DIM, WIDTH)
        grad_scores = weights * (product(grad_tile, tl.trans(v_tile)) - mean_grad[:, None])
        grad += product(grad_scores.to(k_tile.dtype), k_tile)
    return grad


@triton.jit
def grad_q_kernel(
    q,
    k,
    v,
    key_mask,
    out,
    log_sums,
    grad_out,
    mean_grads,
    grad_q,
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
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """The gradient of one tile of queries; leaves sum(out * grad_out) of each row for the gradients of the keys."""
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
    first_row = place.to(tl.int64) * num_queries
    q_tile = load_tokens(q, row, q_stride, num_queries, HEAD_DIM, WIDTH)
    grad_tile = load_tokens(grad_out + first_row * HEAD_DIM, row, HEAD_DIM, num_queries, HEAD_DIM, WIDTH)
    out_tile = load_tokens(out + first_row * HEAD_DIM, row, HEAD_DIM, num_queries, HEAD_DIM, WIDTH)
    mean_grad = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    tl.store(mean_grads + first_row + row, mean_grad, mask=row < num_queries)
    log_sum = tl.load(log_sums + first_row + row, mask=row < num_queries, other=float("inf"))
    common, end = key_ranges(start, offset, num_keys, key_mask, ROWS, COLUMNS, IS_CAUSAL)
    grad = tl.zeros([ROWS, WIDTH], tl.float32)
    grad = _add_grad_q(
        grad, q_tile, grad_tile, log_sum, mean_grad, k, v, key_mask, k_stride, v_stride, mask_stride, row, 0, common,
        offset, num_keys, scale, HEAD_DIM, WIDTH, COLUMNS, IS_CAUSAL, False,
    )  # fmt: skip
    grad = _add_grad_q(
        grad, q_tile, grad_tile, log_sum, mean_grad, k, v, key_mask, k_stride, v_stride, mask_stride, row, common, end,
        offset, num_keys, scale, HEAD_DIM, WIDTH, COLUMNS, IS_CAUSAL, True,
    )  # fmt: skip
    store_tokens(grad_q + first_row * HEAD_DIM, grad * softmax_scale, row, num_queries, HEAD_DIM, WIDTH)


@triton.jit
def _add_grad_kv(
    grad_k,
    grad_v,
    k_tile,
    v_tile,
    q,
    grad_out,
    log_sums,
    mean_grads,
    q_stride,
    column,
    begin,
    end,
    offset,
    num_queries,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what the queries from `begin` to `end` of one head give; scores stand transposed, [columns, rows]."""
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        q_tile = load_tokens(q, row, q_stride, num_queries, HEAD_DIM, WIDTH)
        log_sum = tl.load(log_sums + row, mask=row < num_queries, other=float("inf"))
        scores = product(k_tile, tl.trans(q_tile)) * scale
        if MASKED:
            scores = tl.where(column[:, None] <= row[None, :] + offset, scores, float("-inf"))
        weights = tl.exp2(scores - log_sum[None, :])
        grad_tile = load_tokens(grad_out, row, HEAD_DIM, num_queries, HEAD_DIM, WIDTH)
        grad_v += product(weights.to(grad_tile.dtype), grad_tile)
        mean_grad = tl.load(mean_grads + row, mask=row < num_queries, other=0.0)
        grad_scores = weights * (product(v_tile, tl.trans(grad_tile)) - mean_grad[None, :])
        grad_k += product(grad_scores.to(q_tile.dtype), q_tile)
    return grad_k, grad_v


@triton.jit
def grad_kv_kernel(
    q,
    k,
    v,
    key_mask,
    log_sums,
    grad_out,
    mean_grads,
    grad_k,
    grad_v,
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
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """The gradients of one tile of keys and values, summed over the query heads of its group."""
    num_tiles = tl.cdiv(num_keys, COLUMNS)
    start = tl.program_id(0) % num_tiles * COLUMNS
    place = tl.program_id(0) // num_tiles
    num_groups = num_heads // group_size
    batch, group = place // num_groups, place % num_groups
    column = start + tl.arange(0, COLUMNS)
    offset = num_keys - num_queries
    k_tile = load_tokens(head_start(k, batch, group, k_batch, k_head), column, k_stride, num_keys, HEAD_DIM, WIDTH)
    v_tile = load_tokens(head_start(v, batch, group, v_batch, v_head), column, v_stride, num_keys, HEAD_DIM, WIDTH)
    begin = 0
    common = 0
    if IS_CAUSAL:  # from the first query that sees one of these keys, and from the first that sees all
        begin = tl.maximum(start - offset, 0) // ROWS * ROWS
        common = tl.minimum(tl.cdiv(tl.maximum(start + COLUMNS - 1 - offset, 0), ROWS) * ROWS, num_queries)
    grad_k_tile = tl.zeros([COLUMNS, WIDTH], tl.float32)
    grad_v_tile = tl.zeros([COLUMNS, WIDTH], tl.float32)
    for member in range(group_size):
        head = group * group_size + member
        first_row = (batch * num_heads + head).to(tl.int64) * num_queries
        q_of_head = head_start(q, batch, head, q_batch, q_head)
        grad_of_head = grad_out + first_row * HEAD_DIM
        grad_k_tile, grad_v_tile = _add_grad_kv(
            grad_k_tile, grad_v_tile, k_tile, v_tile, q_of_head, grad_of_head, log_sums + first_row,
            mean_grads + first_row, q_stride, column, begin, common, offset, num_queries, scale, HEAD_DIM, WIDTH, ROWS,
            IS_CAUSAL,
        )  # fmt: skip
        grad_k_tile, grad_v_tile = _add_grad_kv(
            grad_k_tile, grad_v_tile, k_tile, v_tile, q_of_head, grad_of_head, log_sums + first_row,
            mean_grads + first_row, q_stride, column, common, num_queries, offset, num_queries, scale, HEAD_DIM, WIDTH,
            ROWS, False,
        )  # fmt: skip
    if key_mask is not None:  # a hidden key's column of the scores counts for nobody, so it need not be masked above
        seen = keys_allowed(key_mask + batch.to(tl.int64) * mask_batch, column, mask_stride, num_keys)[:, None]
        grad_k_tile = tl.where(seen, grad_k_tile, 0.0)
        grad_v_tile = tl.where(seen, grad_v_tile, 0.0)
    first_column = place.to(tl.int64) * num_keys * HEAD_DIM
    store_tokens(grad_k + first_column, grad_k_tile * softmax_scale, column, num_keys, HEAD_DIM, WIDTH)
    store_tokens(grad_v + first_column, grad_v_tile, column, num_keys, HEAD_DIM, WIDTH)
