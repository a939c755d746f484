"""A sheet of paper measured in inches from its top left corner, with text that knows its own size."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath

from transformer_problems.report.colours import INK

FONT = "DejaVu Sans"  # comes with matplotlib, so every machine draws the same picture
LEADING = 1.32  # line height in font sizes
_HINTING = 1.02  # how much wider hinted text may be than its outline

_outlines = TextToPath()


@cache
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of one line of text in inches; `size` in points."""
    font = FontProperties(family=FONT, size=size, weight=weight)
    width, _, _ = _outlines.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72 * _HINTING


def line_height(size: float) -> float:
    """Height of one line of text in inches."""
    return size / 72 * LEADING


def wrap(text: str, size: float, width: float, weight: str = "normal") -> list[str]:
    """The lines that `text` takes in a column `width` inches wide; a word wider than the column stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def balance(text: str, size: float, width: float, weight: str = "normal") -> list[str]:
    """The fewest lines that `wrap` finds, evened out so that the last is no lonely word."""
    lines = wrap(text, size, width, weight)
    narrow, wide = width / 2, width
    while len(lines) > 1 and wide - narrow > 0.05:
        middle = (narrow + wide) / 2
        tried = wrap(text, size, middle, weight)
        narrow, wide = (narrow, middle) if len(tried) == len(lines) else (middle, wide)
    return wrap(text, size, wide, weight)


class Sheet:
    """A figure addressed in inches from the top left corner.

    Args:
        width: Of the sheet, in inches.
        height: Of the sheet, in inches.
        dpi: Pixels per inch of the saved bitmap.
    """

    def __init__(self, width: float, height: float, dpi: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """An empty chart with its upper left corner at (x, y)."""
        bottom = 1 - (y + height) / self.height
        return self.figure.add_axes((x / self.width, bottom, width / self.width, height / self.height))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float,
        colour: str = INK,
        weight: Literal["normal", "bold"] = "normal",
        align: Literal["left", "center", "right"] = "left",
        anchor: Literal["top", "center"] = "top",
        opaque: bool = False,
    ) -> None:
        """One line of text at (x, y).

        Args:
            align: Which part of the line stands at x.
            anchor: Whether y is the top of the line box or its middle.
            opaque: On a white ground, so that grid lines do not run through it.
        """
        middle = y if anchor == "center" else y + line_height(size) / 2
        self.figure.text(
            x / self.width,
            1 - middle / self.height,
            text,
            fontsize=size,
            color=colour,
            fontweight=weight,
            ha=align,
            va="center_baseline",
            parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5} if opaque else None,
        )

    def lines(self, x: float, y: float, lines: Sequence[str], *, size: float, **style: Any) -> float:
        """Lines of text below each other; returns the y below the last."""
        for line in lines:
            self.text(x, y, line, size=size, **style)
            y += line_height(size)
        return y

    def stroke(self, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:
        """A line through points given in inches."""
        self.figure.add_artist(
            Line2D(
                [x / self.width for x in xs],
                [1 - y / self.height for y in ys],
                **{"linewidth": 0.6, "solid_capstyle": "butt", **style},
            )
        )
