"""The FLOP counter against hand counts: 2 * rows * inner * columns for each matrix product."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from transformer_problems.core.errors import ArgumentError
from transformer_problems.lab.meters.flops import count_flops
from transformer_problems.solutions.attention.dense import DenseAttention

B, H, N, M, D = 2, 4, 8, 12, 16
ATTENTION_PRODUCT = 2 * B * H * N * M * D


def attention_inputs(*, num_kv_heads=H, requires_grad=False, dtype=torch.float32):
    q = torch.randn(B, H, N, D, dtype=dtype, requires_grad=requires_grad)
    k, v = (torch.randn(B, num_kv_heads, M, D, dtype=dtype, requires_grad=requires_grad) for _ in "kv")
    return q, k, v


def forward_and_backward(op, *inputs):
    return lambda: op(*inputs).sum().backward()


def test_matmul():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: torch.randn(6, 3, 5) @ torch.randn(6, 5, 7), 6 * 2 * 3 * 5 * 7),
        (lambda: torch.randn(3, 5) @ torch.randn(5), 2 * 3 * 5),
        (lambda: torch.randn(5) @ torch.randn(5, 7), 2 * 5 * 7),
        (lambda: torch.randn(5) @ torch.randn(5), 2 * 5),
        (lambda: torch.vdot(torch.randn(5), torch.randn(5)), 2 * 5),
        (lambda: torch.addmm(torch.randn(7), torch.randn(3, 5), torch.randn(5, 7)), 2 * 3 * 5 * 7),
        (lambda: torch.addmv(torch.randn(3), torch.randn(3, 5), torch.randn(5)), 2 * 3 * 5),
        (lambda: torch.baddbmm(torch.randn(6, 3, 7), torch.randn(6, 3, 5), torch.randn(6, 5, 7)), 6 * 2 * 3 * 5 * 7),
        (lambda: torch.addbmm(torch.randn(3, 7), torch.randn(6, 3, 5), torch.randn(6, 5, 7)), 6 * 2 * 3 * 5 * 7),
        (lambda: torch.einsum("bij,bjk->bik", torch.randn(6, 3, 5), torch.randn(6, 5, 7)), 6 * 2 * 3 * 5 * 7),
        (lambda: torch.einsum("i,i->", torch.randn(5), torch.randn(5)), 2 * 5),
        (lambda: torch._int_mm(torch.ones(32, 16).char(), torch.ones(16, 8).char()), 2 * 32 * 16 * 8),
    ],
    ids=["bmm", "mv", "vm", "dot", "vdot", "addmm", "addmv", "baddbmm", "addbmm", "einsum", "einsum_dot", "int_mm"],
)
def test_every_kind_of_product(function, expected):
    assert count_flops(function) == expected


@pytest.mark.parametrize("requires_grad", [False, True])
def test_weighted_sums_of_rows(requires_grad):
    table, weights = (torch.randn(9, 4, requires_grad=requires_grad), torch.randn(5, 3, requires_grad=requires_grad))
    index = torch.randint(9, (5, 3))
    product = 2 * 5 * 3 * 4

    def run():
        y = nn.functional.embedding_bag(index, table, per_sample_weights=weights, mode="sum")
        if requires_grad:
            y.sum().backward()

    assert count_flops(run) == (3 if requires_grad else 1) * product  # forward, and a gradient of each factor
    assert count_flops(lambda: nn.functional.embedding_bag(index, table, mode="sum")) == 0


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_grouped_mm"), reason="this PyTorch has no grouped products")
def test_rows_by_the_matrix_of_their_group():
    rows, matrices = torch.randn(24, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16()
    ends = torch.tensor([4, 4, 24], dtype=torch.int32)  # of each group's rows; one has none
    assert count_flops(lambda: torch.ops.aten._grouped_mm(rows, matrices, ends)) == 2 * 24 * 16 * 8


def test_a_view_of_a_parameter_taken_without_gradients_is_counted():
    table, layer = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 5)
    with torch.no_grad():
        assert count_flops(lambda: layer(table[2:8])) == 2 * 6 * 4 * 5


def test_elementwise_work_is_not_counted():
    x = torch.randn(5, 5)
    assert count_flops(lambda: (x.softmax(-1) * x + x.exp()).sum()) == 0


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_linear_counts_in_every_grad_mode(mode):
    layer = nn.Linear(5, 7)
    with mode():
        x = torch.randn(2, 3, 5)
        assert count_flops(lambda: layer(x)) == 2 * 6 * 5 * 7


def test_linear_backward_is_two_more_products():
    layer, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    assert count_flops(forward_and_backward(layer, x)) == 3 * 2 * 3 * 5 * 7


def test_linear_backward_skips_an_input_without_gradient():
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    assert count_flops(forward_and_backward(layer, x)) == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("groups", [1, 4])
def test_convolution(groups):
    layer, x = nn.Conv1d(4, 8, kernel_size=3, groups=groups), torch.randn(2, 4, 10)
    out_length = 10 - 3 + 1
    assert count_flops(lambda: layer(x)) == 2 * 2 * out_length * 8 * (4 // groups) * 3


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("op", [DenseAttention(), scaled_dot_product_attention], ids=["dense", "sdpa"])
def test_attention_forward_is_two_products_over_the_whole_rectangle(op, is_causal):
    q, k, v = attention_inputs()
    assert count_flops(lambda: op(q, k, v, is_causal=is_causal)) == 2 * ATTENTION_PRODUCT


def test_dense_attention_backward_is_four_products():
    inputs = attention_inputs(requires_grad=True)
    assert count_flops(forward_and_backward(DenseAttention(), *inputs)) == (2 + 4) * ATTENTION_PRODUCT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sdpa_backward_is_five_products_the_scores_being_formed_again(dtype):
    inputs = attention_inputs(requires_grad=True, dtype=dtype)
    assert count_flops(forward_and_backward(scaled_dot_product_attention, *inputs)) == (2 + 5) * ATTENTION_PRODUCT


def test_sdpa_with_grouped_heads_counts_every_query_head():
    q, k, v = attention_inputs(num_kv_heads=2)
    assert count_flops(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)) == 2 * ATTENTION_PRODUCT


def test_sdpa_with_a_mask_counts_the_whole_rectangle():
    q, k, v = attention_inputs()
    mask = torch.ones(N, M, dtype=torch.bool).tril()
    assert count_flops(lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask)) == 2 * ATTENTION_PRODUCT


def test_sdpa_that_falls_back_to_plain_products_counts_the_same():
    q, k, v = attention_inputs()
    assert count_flops(lambda: scaled_dot_product_attention(q, k, v, dropout_p=0.1)) == 2 * ATTENTION_PRODUCT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sdpa_counts_the_same_on_cuda():
    inputs = [x.detach().cuda().requires_grad_() for x in attention_inputs()]
    assert count_flops(forward_and_backward(scaled_dot_product_attention, *inputs)) == (2 + 5) * ATTENTION_PRODUCT


def test_recomputation_counts():
    layer, x = nn.Linear(5, 5, bias=False), torch.randn(3, 5, requires_grad=True)

    def step():
        checkpoint(lambda y: layer(y).exp(), x, use_reentrant=False).sum().backward()

    assert count_flops(step) == (1 + 1 + 2) * 2 * 3 * 5 * 5


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # torch sets every flag of the group
def test_a_fused_lstm_is_refused_and_the_unfused_one_counts():
    layer, x = nn.LSTM(5, 4, bias=False), torch.randn(1, 2, 5)
    with pytest.raises(ArgumentError, match="mkldnn"):
        count_flops(lambda: layer(x))
    with torch.backends.mkldnn.flags(enabled=False):
        assert count_flops(lambda: layer(x)) == 2 * 2 * (4 * 4) * (5 + 4)


def test_the_encoder_fast_path_is_refused():
    layer, x = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval(), torch.randn(1, 3, 8)
    with torch.no_grad(), pytest.raises(ArgumentError, match="set_fastpath_enabled"):
        count_flops(lambda: layer(x))


def test_counts_do_not_leak_from_call_to_call():
    x = torch.randn(5, 5)
    assert count_flops(lambda: x @ x) == count_flops(lambda: x @ x)
