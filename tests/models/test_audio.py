"""The encoder of feature sequences: its ends, padding, injected blocks, bad input."""

import pytest
import torch
from torch import Tensor, nn

from transformer_problems.core.errors import ArgumentError, CombinationError
from transformer_problems.models.audio import ConformerEncoder
from transformer_problems.models.block import TransformerBlock
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.position.transformer_xl import TransformerXLRelative
from transformer_problems.solutions.tokens.conformer import ConformerBlock

WIDTH, FEATURES, CLASSES = 8, 5, 3
TOLERANCE = {"atol": 1e-10, "rtol": 0.0}  # float64 sums of some hundred terms through two layers


def attention() -> SelfAttention:
    return SelfAttention(WIDTH, 2, position=TransformerXLRelative(WIDTH, 2), is_causal=False)


BLOCKS = {
    "conformer": lambda: ConformerBlock(WIDTH, attention(), kernel_size=5),
    "transformer": lambda: TransformerBlock(WIDTH, attention()),
}


def build(block: str) -> ConformerEncoder:
    torch.manual_seed(0)
    return ConformerEncoder(FEATURES, WIDTH, 2, CLASSES, BLOCKS[block]).double()


def draw(length: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, FEATURES, dtype=torch.float64)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("length", [1, 63, 64, 100, 101])
def test_equals_its_parts_one_after_the_other(block: str, length: int) -> None:
    model, features = build(block).eval(), draw(length)
    x = model.projection(features)
    for layer in model.blocks:
        x = layer(x)
    expected = model.head(model.norm(x).mean(dim=1))
    torch.testing.assert_close(model(features), expected, **TOLERANCE)
    assert expected.shape == (2, CLASSES)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_padding_changes_nothing(block: str, is_training: bool) -> None:
    model, lengths = build(block).train(is_training), [7, 12, 1]
    sequences = [draw(length, 1)[0] for length in lengths]

    def padded(longest: int, filler: float) -> tuple[Tensor, Tensor]:
        features = torch.full((3, longest, FEATURES), filler, dtype=torch.float64)
        for row, sequence in zip(features, sequences, strict=True):
            row[: len(sequence)] = sequence
        return features, torch.arange(longest) < torch.tensor(lengths)[:, None]

    (short, short_mask), (long, long_mask) = padded(12, 0.0), padded(20, 9.0)
    logits = model(short, key_mask=short_mask)
    torch.testing.assert_close(model(long, key_mask=long_mask), logits, **TOLERANCE)
    if not is_training:  # statistics of a batch depend on all of it
        alone = torch.cat([model(sequence[None]) for sequence in sequences])
        torch.testing.assert_close(alone, logits, **TOLERANCE)


def test_a_sequence_without_real_frames_gives_the_bias() -> None:
    model = build("conformer").eval()
    mask = torch.tensor([[False] * 4, [True] * 4])
    logits = model(draw(4), key_mask=mask)
    assert logits.isfinite().all()
    assert torch.equal(logits[0], model.head.bias)


@pytest.mark.parametrize("block", BLOCKS)
def test_gradcheck(block: str) -> None:
    model, features = build(block).eval(), draw(4).requires_grad_()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert torch.autograd.gradcheck(lambda features: model(features, key_mask=mask), (features,))


@pytest.mark.parametrize("block", BLOCKS)
def test_learns_which_way_a_signal_moves(block: str) -> None:
    """Rising and falling sequences hold the same values: only their order tells them apart."""
    torch.manual_seed(0)
    model = ConformerEncoder(1, WIDTH, 2, 2, BLOCKS[block])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def batch() -> tuple[Tensor, Tensor]:
        rising, falls = torch.rand(32, 12, 1).sort(dim=1).values, torch.rand(32) < 0.5
        return torch.where(falls[:, None, None], rising.flip(1), rising), falls.long()

    for _ in range(150):
        features, classes = batch()
        loss = nn.functional.cross_entropy(model(features), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, classes = batch()
    assert (model.eval()(features).argmax(dim=-1) == classes).float().mean() > 0.9


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="num_classes must be positive; got 0"):
        ConformerEncoder(FEATURES, WIDTH, 2, 0, BLOCKS["conformer"])
    with pytest.raises(ArgumentError, match="num_layers must be positive; got 0"):
        ConformerEncoder(FEATURES, WIDTH, 0, CLASSES, BLOCKS["conformer"])
    with pytest.raises(ArgumentError, match=r"block must be a function .* Pass block=lambda: ConformerBlock"):
        ConformerEncoder(FEATURES, WIDTH, 2, CLASSES, BLOCKS["conformer"]())
    for block, said in (
        (None, "block must be a function that makes a layer; got None"),
        (
            ConformerBlock,
            "block must be callable without arguments; ConformerBlock is not: missing a required argument",
        ),
        (lambda: None, "block must make a module; it made None"),
    ):
        with pytest.raises(ArgumentError, match=said):
            ConformerEncoder(FEATURES, WIDTH, 2, CLASSES, block)  # type: ignore[arg-type]
    with pytest.raises(CombinationError, match="ConformerBlock is built for embed_dim=8, but its place here has"):
        ConformerEncoder(FEATURES, 16, 2, CLASSES, BLOCKS["conformer"])
    with pytest.raises(CombinationError, match="is a class, not an instance"):
        ConformerEncoder(FEATURES, WIDTH, 2, CLASSES, lambda: ConformerBlock)


def test_bad_inputs_are_named() -> None:
    model = build("conformer")
    for features in (draw(4)[0], draw(4)[..., :2], draw(0)):
        with pytest.raises(ArgumentError, match=rf"features must be \[B, N, {FEATURES}\] of one frame or more; got"):
            model(features)
    with pytest.raises(ArgumentError, match=r"key_mask must be bool \[2, 4\]"):
        model(draw(4), key_mask=torch.ones(2, 5, dtype=torch.bool))
