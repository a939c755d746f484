"""A factorised table is the nearest of its rank, and costs what it says."""

from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.transforms import stored_bytes
from transformer_problems.core.treated_files import load_treated, save_treated
from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.compression.factorised_embedding import FactorisedEmbedding, FactoriseEmbedding

TOKENS = torch.arange(14).view(2, 7) % 40


def decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(40, 16, 1, lambda: SelfAttention(16, 2)).double().eval()


def test_the_table_is_the_nearest_of_its_rank() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(40, 16, dtype=torch.float64)
    made = FactoriseEmbedding(5)(nn.ModuleDict({"tokens": table}))["tokens"]
    values = torch.linalg.svdvals(table.weight)
    # Eckart and Young: what is left out are the smallest singular values
    left_out = (made.weight - table.weight).norm().item()
    assert left_out == pytest.approx(values[5:].norm().item(), rel=1e-10)
    torch.testing.assert_close(made(TOKENS), made.weight[TOKENS], rtol=1e-10, atol=1e-12)
    assert sum(p.numel() for p in made.parameters()) == 5 * (40 + 16)


def test_a_table_of_low_rank_loses_nothing_and_a_tied_output_layer_follows() -> None:
    model = decoder()
    with torch.no_grad():
        low = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 16, dtype=torch.float64)
        model.body.embedding.weight.copy_(low)
    factorised = FactoriseEmbedding(3)(model)
    torch.testing.assert_close(factorised(TOKENS), model(TOKENS), rtol=1e-8, atol=1e-8)
    assert stored_bytes(model) - stored_bytes(factorised) == 8 * (40 * 16 - 3 * 56)
    factorised(TOKENS).square().sum().backward()
    assert factorised.body.embedding.table.weight.grad.abs().sum() > 0


def test_saved_and_read_back_outputs_are_equal(tmp_path: Path) -> None:
    transform = FactoriseEmbedding(4)
    factorised = transform(decoder())
    save_treated(factorised, tmp_path / "model.safetensors")
    assert torch.equal(load_treated(tmp_path / "model.safetensors", decoder(1), transform)(TOKENS), factorised(TOKENS))


def test_positions_stay_and_bad_models_are_refused() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position_embeddings, self.tokens = nn.Embedding(40, 16), nn.Embedding(40, 16)

    made = FactoriseEmbedding(4)(Positions())
    assert isinstance(made.position_embeddings, nn.Embedding) and isinstance(made.tokens, FactorisedEmbedding)
    with pytest.raises(ArgumentError, match="rank must be below 11 to save anything on tokens of 40 x 16; got 12"):
        FactoriseEmbedding(12)(Positions())
    with pytest.raises(ArgumentError, match="must hold an embedding of tokens"):
        FactoriseEmbedding(4, skip=("tokens",))(Positions())
    tied = nn.ModuleDict({"tokens": nn.Embedding(40, 16), "head": nn.Linear(16, 40, bias=False)})
    tied["head"].weight = tied["tokens"].weight
    with pytest.raises(ArgumentError, match="tokens and head share theirs"):
        FactoriseEmbedding(4)(tied)
