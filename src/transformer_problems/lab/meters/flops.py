"""How many floating-point operations a call makes."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from transformer_problems.core.errors import ArgumentError

Shape = Sequence[int]
aten = torch.ops.aten


def count_flops(function: Callable[[], object]) -> int:
    """FLOPs of the matrix products in one call, forward and backward, as executed.

    Counted: every matrix and dot product, convolution, attention product and weighted sum of rows
    (embedding_bag), batched or not, whatever Python called it (`@`, einsum, linear, SDPA); a multiply-add is
    2 FLOPs. Not counted: elementwise work (softmax, norms, activations, added biases), reductions, sorting,
    indexing, which are linear in the data that they
    touch. Recomputation counts, since it runs: checkpointed layers, and the scores that fused attention forms
    again in its backward pass (5 products where dense attention has 4). Causal and masked attention count the
    whole N x M rectangle, in dense attention because all of it is computed, in SDPA by PyTorch's convention,
    although its kernels may skip tiles that are masked out.

    Kernels of our own or of other packages count once they are registered with
    `torch.utils.flop_counter.register_flop_formula`, and as nothing before.

    Raises:
        ArgumentError: If the function runs one of PyTorch's fused layers (LSTM, the encoder fast path), whose
            products nobody can see; the message says how to unfuse it.
    """
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        # it tells modules apart by hooks on each, which is not asked here, takes as long as the counting, and fails
        # at views of parameters that are taken without gradients (DeBERTa's table of distances)
        counter.mod_tracker.__exit__()
        function()
    total: int = counter.get_total_flops()
    return total


def _sdpa(q: Shape, k: Shape, v: Shape, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """q k^T and weights v. q: [B, H, N, D]; k: [B, G, M, D]; v: [B, G, M, Dv]."""
    *_, num_keys, head_dim = k
    return 2 * prod(q[:-1]) * num_keys * (head_dim + v[-1])


def _sdpa_backward(
    grad: Shape, q: Shape, k: Shape, v: Shape, *args: object, out_shape: object = None, **kwargs: object
) -> int:
    """The scores again, then the gradients of weights, values, queries and keys: 3 products by D, 2 by Dv."""
    *_, num_keys, head_dim = k
    return 2 * prod(q[:-1]) * num_keys * (3 * head_dim + 2 * v[-1])


def _dot(a: Shape, b: Shape, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Any product of a [..., K] with b [K] or [K, N]."""
    return 2 * prod(a) * prod(b[1:])


def _added_dot(x: Shape, a: Shape, b: Shape, *args: object, out_shape: object = None, **kwargs: object) -> int:
    return _dot(a, b)


def _added_batched(x: Shape, a: Shape, b: Shape, *args: object, out_shape: object = None, **kwargs: object) -> int:
    return 2 * prod(a) * b[-1]


def _grouped(a: Shape, b: Shape, *args: object, out_shape: object = None, **kwargs: object) -> int:
    """Each row of a with the matrix of its group, as in a mixture of experts. a: [N, K]; b: [E, K, M]."""
    return 2 * prod(a) * b[-1]


def _weighted_bags(table: Shape, index: Shape, *args: Any, out_shape: object = None, **kwargs: object) -> int:
    """A weighted sum of chosen rows. table: [V, D]; index: [n], with a weight each, or none, which leaves sums."""
    per_sample_weights = args[4] if len(args) > 4 else None
    return 0 if per_sample_weights is None else 2 * prod(index) * table[-1]


def _bag_weights_backward(
    grad: Shape, table: Shape, index: Shape, *args: object, out_shape: object = None, **kwargs: object
) -> int:
    return 2 * prod(index) * table[-1]


def _bag_rows_backward(grad: Shape, index: Shape, *args: Any, out_shape: object = None, **kwargs: object) -> int:
    per_sample_weights = args[8] if len(args) > 8 else None
    return 0 if per_sample_weights is None else 2 * prod(index) * grad[-1]


def _unseen(remedy: str) -> Callable[..., int]:
    def refuse(*args: object, out_shape: object = None, **kwargs: object) -> int:
        raise ArgumentError(f"function must not run a fused layer whose FLOPs PyTorch hides. {remedy}")

    return refuse


_NO_FUSED_RNN = _unseen(
    "It runs a fused LSTM, GRU or RNN: count a loop over its cell, or disable fusion with "
    "torch.backends.mkldnn.flags(enabled=False) on the CPU or torch.backends.cudnn.flags(enabled=False) on CUDA."
)
_NO_FAST_PATH = _unseen(
    "It runs the fast path of nn.MultiheadAttention or nn.TransformerEncoderLayer: "
    "call torch.backends.mha.set_fastpath_enabled(False) first."
)

# What PyTorch's own registry lacks (2.6 to 2.13); its formulas for the rest stay in force.
_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    aten.mv: _dot,
    aten.dot: _dot,
    aten.vdot: _dot,
    aten._int_mm: _dot,
    **({aten._grouped_mm: _grouped} if hasattr(aten, "_grouped_mm") else {}),
    aten.addmv: _added_dot,
    aten.addbmm: _added_batched,
    aten._embedding_bag: _weighted_bags,
    aten._embedding_bag_forward_only: _weighted_bags,
    aten._embedding_bag_per_sample_weights_backward: _bag_weights_backward,
    aten._embedding_bag_backward: _bag_rows_backward,
    aten.mkldnn_rnn_layer: _NO_FUSED_RNN,
    aten._cudnn_rnn: _NO_FUSED_RNN,
    aten._native_multi_head_attention: _NO_FAST_PATH,
    aten._transformer_encoder_layer_fwd: _NO_FAST_PATH,
}
