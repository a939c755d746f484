"""Few examples are chosen evenly over classes and nested in more, and batches hold each once where there are enough."""

import pytest
import torch

from transformer_problems.core.errors import ArgumentError
from transformer_problems.core.seeding import generator
from transformer_problems.lab.data.choice import choose_labels, draw_batch, hold_out
from transformer_problems.lab.data.digits import load_digit_images

SIZES = (50, 3, 20)
CLASSES = torch.tensor([0] * SIZES[0] + [1] * SIZES[1] + [2] * SIZES[2])


@pytest.mark.parametrize("num", [1, 2, 3, 9, 10, 13, 31, 43, 73])
def test_labels_are_chosen_evenly_as_far_as_classes_go(num: int) -> None:
    chosen = choose_labels(CLASSES, num, generator(0))
    assert len(set(chosen.tolist())) == num
    counts = CLASSES[chosen].bincount(minlength=3).tolist()
    with_more = [count for count, size in zip(counts, SIZES, strict=True) if count < size]
    assert max(counts) - min(with_more, default=max(counts)) <= 1


@pytest.mark.parametrize("num", [1, 2, 10, 63, 64, 97, 100, 1000])
def test_fewer_are_the_first_of_more(num: int) -> None:
    classes = load_digit_images()[0].classes
    more = choose_labels(classes, len(classes), generator(0))
    assert torch.equal(choose_labels(classes, num, generator(0)), more[:num])


def test_other_draws_choose_others() -> None:
    classes = load_digit_images()[0].classes
    first, other = (set(choose_labels(classes, 10, generator(seed)).tolist()) for seed in (0, 1))
    assert first != other


def test_the_order_does_not_tell_the_class() -> None:
    """Every class comes first, second, ... for some draws."""
    classes = torch.arange(3).repeat_interleave(5)
    orders = {tuple(classes[choose_labels(classes, 3, generator(seed))].tolist()) for seed in range(100)}
    assert len(orders) == 6


def test_as_many_as_there_are_is_the_most() -> None:
    assert sorted(choose_labels(CLASSES, 1000, generator(0)).tolist()) == list(range(len(CLASSES)))


@pytest.mark.parametrize(("num", "batch_size"), [(1, 4), (3, 4), (4, 4), (63, 10), (100, 64)])
def test_batches_hold_each_example_once_where_there_are_enough(num: int, batch_size: int) -> None:
    batch = draw_batch(num, batch_size, seed=0, step=3)
    assert len(batch) == batch_size
    assert set(batch.tolist()) <= set(range(num))
    assert len(set(batch.tolist())) == batch_size or num < batch_size
    assert torch.equal(batch, draw_batch(num, batch_size, seed=0, step=3))
    if num > 4:
        assert not torch.equal(batch, draw_batch(num, batch_size, seed=0, step=4))
        assert not torch.equal(batch, draw_batch(num, batch_size, seed=1, step=3))


@pytest.mark.parametrize(("num", "batch_size"), [(4, 32), (40, 32)])
def test_batches_draw_every_example_alike(num: int, batch_size: int) -> None:
    steps = 2000
    drawn = torch.cat([draw_batch(num, batch_size, seed=0, step=step) for step in range(steps)])
    share = batch_size / num
    deviation = (steps * share * (1 - 1 / num if num < batch_size else 1 - share)) ** 0.5  # again and again, or once
    assert bool(((drawn.bincount(minlength=num) - steps * share).abs() < 5 * deviation).all())  # five sigma


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_the_same_share_of_every_class_is_held_out_and_one_at_least(share: float) -> None:
    known, held_out = hold_out(CLASSES, share, generator(0))
    assert sorted([*known.tolist(), *held_out.tolist()]) == list(range(sum(SIZES)))
    expected = [min(max(1, round(share * size)), size - 1) for size in SIZES]
    assert CLASSES[held_out].bincount(minlength=3).tolist() == expected


def test_what_is_held_out_follows_the_draws_in_random_order() -> None:
    first, again, other = (hold_out(CLASSES, 0.2, generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert set(first[1].tolist()) != set(other[1].tolist())
    for part in first:
        classes = CLASSES[part]
        assert not torch.equal(classes, classes.sort().values)


def test_a_class_of_one_cannot_be_held_out() -> None:
    with pytest.raises(ArgumentError, match=r"two examples each, to learn from and to hold out; class 7 has one. Add"):
        hold_out(torch.tensor([3, 3, 7]), 0.2, generator(0))
    with pytest.raises(ArgumentError, match="share must be a share from 0 to 1; got 1.5"):
        hold_out(CLASSES, 1.5, generator(0))
