"""What a visit hands to check-ups: excerpts of one length from many places, and whole texts."""

import pytest
import torch

from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.loading import load_subject
from transformer_problems.checkpoints.material import Material, machines_texts
from transformer_problems.checkpoints.subject import Subject
from transformer_problems.core.errors import ArgumentError


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject(bundled("draft"))


def test_excerpts_are_of_places_far_from_each_other(subject: Subject) -> None:
    inputs = Visit(subject, machines_texts()).texts(4, 64)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, 64)
    assert len({tuple(row) for row in inputs["input_ids"].tolist()}) == 4
    assert bool(inputs["attention_mask"].all())


@pytest.mark.parametrize("num_characters", [200, 1_000, 9_000])
def test_short_material_gives_different_excerpts_too(subject: Subject, num_characters: int) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(num_characters - 1)) + "!"
    rows = Visit(subject, Material("own", texts=(text,), own=True)).texts(4, 150)["input_ids"]
    assert rows.shape == (4, 150)
    assert len({tuple(row) for row in rows.tolist()}) == 4


def test_material_shorter_than_an_excerpt_is_refused(subject: Subject) -> None:
    with pytest.raises(ArgumentError, match="excerpts of 100 tokens; own gave one of 5"):
        Visit(subject, Material("own", texts=("a b ",), own=True)).texts(2, 100)


def test_texts_of_unequal_length_are_padded_at_their_end(subject: Subject) -> None:
    visit = Visit(subject, Material("own", texts=("abc", "defgh", "i"), own=True))
    rows = visit.short_texts(3, 4)
    assert [row.tolist() for row in rows] == [[97, 98, 99], [100, 101, 102, 103]]  # one token tells nothing
    padded = visit.padded(rows)
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert torch.equal(padded["input_ids"][0, :3], rows[0])


@pytest.mark.parametrize(
    ("weight_bytes", "device", "array_bytes"),
    [
        (10**6, "cpu", 2**25),
        (10**8, "cpu", 5 * 10**7),  # the two arrays together as large as what a pass reads
        (10**10, "cpu", 2**28),
        (10**6, "cuda", 2**28),
    ],
)
def test_bandwidth_is_told_by_arrays_as_large_as_the_weights(weight_bytes: int, device: str, array_bytes: int) -> None:
    class Weighed(Subject):
        @property
        def weight_bytes(self) -> int:
            return weight_bytes

        @property
        def device(self) -> torch.device:
            return torch.device(device)

    visit = Visit(Weighed("model", "causal", torch.nn.Linear(1, 1)), Material("own"))
    assert visit.array_bytes == array_bytes
