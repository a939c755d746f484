"""One colour per solution, the same in every picture, told apart by colour-blind readers too.

The palette is Okabe and Ito's without its yellow (too faint on white) and black (the baseline's), then three of
Paul Tol's "muted" colours for crowded catalogues.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformer_problems.catalogue import Catalogue
from transformer_problems.core.records import VerdictWord
from transformer_problems.core.summaries import Arm

PALETTE = (
    "#0072B2",  # blue
    "#D55E00",  # vermillion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
    "#332288",  # indigo
    "#882255",  # wine
    "#999933",  # olive
)
INK, MUTED, RULE = "#1A1A1A", "#5C5C5C", "#DDDDDD"
DARK_GROUND = "#1C1C1B"
BASELINE, CONTROL = "#3B3B3B", "#8C8C8C"
VERDICT_COLOURS: Mapping[VerdictWord, str] = {
    "helps": "#00734F",
    "no effect": "#5F5F5F",
    "hurts": "#B03A00",
    "inconclusive": "#7A5C00",
    "diverged": "#B03A00",
    "not runnable here": "#5F5F5F",
}
VERDICT_MARKS: Mapping[VerdictWord, str] = {
    "helps": "▲",
    "no effect": "=",
    "hurts": "▼",
    "inconclusive": "?",
    "diverged": "∞",
    "not runnable here": "○",
}
_VARIANT_DASHES = ((4.0, 1.6), (1.2, 1.4), (6.0, 1.5, 1.2, 1.5), (2.5, 1.2), (8.0, 2.0), (1.2, 3.0))
_READABLE = 4.5  # WCAG 2.1 contrast of text with its ground


@dataclass(frozen=True, slots=True)
class Stroke:
    """How one arm is drawn: its line's colour and dashes (none for a solid line), and its label's colour."""

    line: str
    text: str
    dashes: tuple[float, ...] = ()


def catalogue_colours(catalogue: Catalogue) -> dict[str, str]:
    """The colour of every solution of a catalogue, by slug."""
    return assign_colours([pair.solution.slug for pair in catalogue.pairs(p)] for p in catalogue.problems)


def assign_colours(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """A colour for each solution such that no two solutions of one group share one.

    Greedy colouring in the order given: the groups are the catalogue's problems, each a list of solution slugs.
    With more solutions in a group than the palette has colours, the least used colour repeats.
    """
    groups = [tuple(group) for group in groups]
    colours: dict[str, str] = {}
    for slug in dict.fromkeys(slug for group in groups for slug in group):
        taken = [colours[peer] for group in groups if slug in group for peer in group if peer in colours]
        colours[slug] = min(PALETTE, key=lambda colour: (taken.count(colour), PALETTE.index(colour)))
    return colours


def strokes(arms: Sequence[Arm], colours: Mapping[str, str]) -> dict[str, Stroke]:
    """How each arm is drawn: the first is the baseline; a solution's leading arm is solid, its variants dashed."""
    styles: dict[str, Stroke] = {}
    variants: dict[str | None, int] = {}
    for position, arm in enumerate(arms):
        if position == 0:
            styles[arm.slug] = Stroke(BASELINE, BASELINE)
            continue
        dashes: tuple[float, ...] = ()
        if not arm.lead:
            dashes = _VARIANT_DASHES[variants.get(arm.solution, 0) % len(_VARIANT_DASHES)]
            variants[arm.solution] = variants.get(arm.solution, 0) + 1
        line = CONTROL if arm.solution is None else colours[arm.solution]
        styles[arm.slug] = Stroke(line, readable(line), dashes)
    return styles


def readable(colour: str) -> str:
    """`colour`, darkened until text in it has enough contrast with white."""
    while contrast(colour, "#FFFFFF") < _READABLE:
        colour = _hex(int(channel * 0.96) for channel in _channels(colour))
    return colour


def dark_theme() -> dict[str, str]:
    """Every colour of a picture with its stand-in on a dark page: the same hue, light enough to read."""
    solutions = [*PALETTE, *map(readable, PALETTE), CONTROL, readable(CONTROL), *VERDICT_COLOURS.values()]
    neutrals = {"#FFFFFF": DARK_GROUND, RULE: "#3A3A36", MUTED: "#A8A79F", INK: "#ECEBE6", BASELINE: "#D6D5CF"}
    return neutrals | {colour: _readable_on_dark(colour) for colour in solutions}


def contrast(one: str, other: str) -> float:
    """WCAG 2.1 contrast ratio of two colours, 1 to 21."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _readable_on_dark(colour: str) -> str:
    while contrast(colour, DARK_GROUND) < _READABLE:
        colour = _hex(255 - int((255 - channel) * 0.96) for channel in _channels(colour))
    return colour


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _hex(channels: Iterable[int]) -> str:
    return "#" + "".join(f"{channel:02X}" for channel in channels)


def _luminance(colour: str) -> float:
    channels = _channels(colour)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in channels)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
