"""Attention flow: the most that can flow from the answer to a token when attention weights are capacities."""

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor, as_tensor, nn

from transformer_problems.solutions.interpretability.attention_maps import mixing_matrices, reading_of
from transformer_problems.solutions.interpretability.attribution import Attribution, pose
from transformer_problems.solutions.interpretability.readable import Readable

_UNIT = 2**30  # a capacity of one: SciPy counts flow in 32-bit integers


class AttentionFlow:
    """The layers as a network of pipes of capacity 0.5 A + 0.5 I, and for each token the maximum flow that reaches it.

    Each token's flow is found alone, so that tokens share pipes and flows add up to more than one. One forward pass,
    then N maximum flows a sequence in a graph of L N^2 edges, on the CPU: for short inputs.

    Capacities are rounded to multiples of 2^-30, so a flow errs by at most 2^-31 for each edge of the smallest cut, of
    which there are N^2 or fewer.

    Raises:
        ArgumentError: If the input does not fit the model.
        CombinationError: If the model has no attention weights, or negative ones.

    Source:
        Abnar and Zuidema 2020, arXiv:2005.00928, section 3.

    Example:
        >>> import torch
        >>> from transformer_problems import AttentionFlow, Decoder, SelfAttention
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> AttentionFlow().explain(model, torch.tensor([[7, 42, 3, 9]])).scores.shape
        torch.Size([1, 4])
    """

    def explain(
        self,
        model: nn.Module | Readable,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        target: int | Tensor | None = None,
    ) -> Attribution:
        case = pose(model, tokens, key_mask=key_mask, target=target)
        layers, reading = mixing_matrices(case), reading_of(case)
        flows = [
            _flows([layer[row].cpu().numpy() for layer in layers], reading[row].cpu().numpy())
            for row in range(len(tokens))
        ]
        scores = as_tensor(np.stack(flows), dtype=layers[0].dtype, device=tokens.device)
        return case.attribution(
            "attention flow",
            "The maximum flow from the answer's position to the token when attention weights are capacities, from 0 to "
            "1; each token's is found alone.",
            scores,
        )


def _flows(layers: list[np.ndarray], reading: np.ndarray) -> np.ndarray:
    """Maximum flow to each of N tokens. layers: [N, N] from the first on; reading: [N]; output: [N]."""
    graph, source = _network(layers, reading)
    return np.array([maximum_flow(graph, source, token).flow_value for token in range(len(reading))]) / _UNIT


def _network(layers: list[np.ndarray], reading: np.ndarray) -> tuple[csr_array, int]:
    """Capacities between nodes, and the source. Tokens are nodes 0 to N - 1, the outputs of layer i follow from i N."""
    num_tokens = len(reading)
    source = (len(layers) + 1) * num_tokens
    starts, ends, capacities = [], [], []
    for depth, layer in enumerate(layers):
        queries, keys = layer.nonzero()
        starts.append(queries + (depth + 1) * num_tokens)
        ends.append(keys + depth * num_tokens)
        capacities.append(layer[queries, keys])
    read = reading.nonzero()[0]
    starts.append(np.full_like(read, source))
    ends.append(read + len(layers) * num_tokens)
    capacities.append(reading[read])
    rounded = np.rint(np.concatenate(capacities).astype(np.float64) * _UNIT).astype(np.int32)
    edges = (np.concatenate(starts), np.concatenate(ends))
    return coo_array((rounded, edges), shape=(source + 1, source + 1)).tocsr(), source
