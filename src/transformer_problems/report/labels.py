"""Places labels beside a chart so that none overlaps another, each as near to its line as that allows."""

from collections.abc import Sequence

from transformer_problems.core.errors import ArgumentError

_ROUNDING = 1e-9  # float64 sums of a few dozen heights of order one


def spread(targets: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Centres for labels of given heights, as near to their targets as non-overlap within [low, high] allows.

    Minimises the summed squared displacement. Stacking the labels in the order of their targets turns "no
    overlap" into "non-decreasing" once the heights below each label are subtracted, which is an isotonic
    regression: neighbours that would overlap pool into a block at the mean of their targets. Clipping the
    blocks to the bounds keeps the solution optimal. O(n log n).

    Args:
        targets: Where each label would like its centre; equal targets keep their order, the first on top.
        heights: Height of each label, its margin included.
        low: Lower edge of the space.
        high: Upper edge.

    Raises:
        ArgumentError: If the labels are together taller than the space.

    Source:
        Barlow et al. 1972, pool adjacent violators.
    """
    total = sum(heights)
    if total > high - low + _ROUNDING:
        raise ArgumentError(
            f"heights must fit between low and high; got {total:.3g} in {high - low:.3g}. "
            "Make the panel taller or draw fewer lines (Chart.draws)."
        )
    order = sorted(range(len(targets)), key=lambda i: (targets[i], -i))
    offsets, below = [], 0.0
    for i in order:
        offsets.append(below + heights[i] / 2)
        below += heights[i]
    wishes = [targets[i] - offset for i, offset in zip(order, offsets, strict=True)]
    blocks: list[tuple[float, int]] = []  # (mean wish, labels pooled)
    for wish in wishes:
        mean, size = wish, 1
        while blocks and blocks[-1][0] > mean:
            previous, pooled = blocks.pop()
            mean, size = (previous * pooled + mean * size) / (pooled + size), pooled + size
        blocks.append((mean, size))
    base = [min(max(mean, low), high - total) for mean, size in blocks for _ in range(size)]
    centres = [0.0] * len(order)
    for i, start, offset in zip(order, base, offsets, strict=True):
        centres[i] = start + offset
    return centres
