"""Scores drawn over their tokens: as a page for a browser, and as a picture."""

import html
from collections.abc import Sequence
from pathlib import Path
from unicodedata import category

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextToPath
from torch import Tensor

from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.core.inputs import shown

_INK = "#1a1a1a"
_FOR, _AGAINST = (213, 94, 0), (0, 114, 178)  # Okabe and Ito's vermillion and blue
_STRONGEST = 0.55  # of a colour's opacity: text above it stays readable on a white page and on a dark one
_VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "⇤", " ": "·"})  # marks that the font has
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_FONT = FontProperties(family="DejaVu Sans", size=12)  # comes with matplotlib
_WIDTH, _LINE, _PADDING, _MARGIN = 576.0, 24.0, 3.0, 14.0  # points, 72 an inch
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1a1a1a; --ground: #ffffff; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #ecebe6; --ground: #1c1c1b; }} }}
body {{ color: var(--ink); background: var(--ground); font: 16px/2 system-ui, sans-serif; margin: 1.5em; }}
span {{ white-space: pre-wrap; padding: 0.15em 0.1em; border-radius: 0.2em; }}
small {{ font-size: 0.85em; line-height: 1.5; }}
</style></head><body>
<p><strong>{title}</strong></p>
<p>{tokens}</p>
<p><small>{legend}</small></p>
</body></html>
"""


def heat_map_html(
    texts: Sequence[str], scores: Tensor | Sequence[float], *, title: str = "Scores", meaning: str = ""
) -> str:
    """A page of its own that shows one sequence's tokens, each on a ground as strong as its score.

    Orange is for the answer, blue against it, told apart by colour-blind readers too; the strongest score has the
    strongest colour, zero none. Nothing is loaded from elsewhere, it follows the reader's light or dark theme, and
    pointing at a token shows its score.

    Any tokenizer will do: `tokenizer.convert_ids_to_tokens(ids)` gives its own strings of tokens, which bring the marks
    of their spacing ("Ġnot", "▁not", "##ing") and are shown so. Places in the text are not needed; a tokenizer that
    gives them, as fast ones of transformers do by `return_offsets_mapping=True`, can show the text itself, as
    `[text[start:end] for start, end in offsets]`.

    Args:
        texts: One a token, shown as they are; control characters but tabs and line ends as the replacement character.
        scores: One a token, [N].
        title: Above the tokens.
        meaning: What a score means, such as an `Attribution`'s; below them.

    Raises:
        ArgumentError: If there are no texts, not one score for each, or scores are not finite.

    Example:
        >>> from transformer_problems import heat_map_html
        >>> page = heat_map_html(["not", " good"], [0.8, -0.3], title="Sentiment")
        >>> "rgba(213, 94, 0, 0.550)" in page
        True
    """
    values = _checked(texts, scores, title, meaning)
    tokens = "".join(
        f'<span style="background: {_css(shade)}" title="{value:.4g}">{html.escape(_without_control(text))}</span>'
        for text, value, shade in zip(texts, values, _shades(values), strict=True)
    )
    legend = "".join(
        f'<span style="background: {_css(shade)}">&nbsp;{value:.3g}&nbsp;</span> '
        for value, shade in zip(_ends(values), (-1.0, 0.0, 1.0), strict=True)
    )
    return _PAGE.format(title=html.escape(title), tokens=tokens, legend=f"{legend}{html.escape(meaning)}")


def heat_map_png(
    texts: Sequence[str],
    scores: Tensor | Sequence[float],
    path: Path | str,
    *,
    title: str = "Scores",
    meaning: str = "",
) -> None:
    """Write a picture of one sequence's tokens, each on a ground as strong as its score, in `heat_map_html`'s colours.

    Tokens run from left to right and are broken into lines; spaces and line ends in them are shown as marks, other
    control characters as the replacement character. Letters that matplotlib's DejaVu Sans lacks, such as Chinese ones,
    are drawn as empty boxes, with matplotlib's warning.

    Args:
        texts: One a token, from any tokenizer, as for `heat_map_html`.
        scores: One a token, [N].
        path: Of the PNG file.
        title: Above the tokens.
        meaning: What a score means, such as an `Attribution`'s; below them.

    Raises:
        ArgumentError: If there are no texts, not one score for each, or scores are not finite.
        OutputError: If the file cannot be written.

    Example:
        >>> from transformer_problems import heat_map_png
        >>> heat_map_png(["not", " good"], [0.8, -0.3], "scores.png")  # doctest: +SKIP
    """
    values = _checked(texts, scores, title, meaning)
    shades = [*_shades(values), -1.0, 0.0, 1.0]
    marked = [_without_control(text.translate(_VISIBLE)) for text in texts]
    ends = [f"{value:.3g}" for value in _ends(values)]
    words = [(word, 0.0) for word in meaning.split()]
    sections = [
        [(word, 0.0) for word in title.split()],
        list(zip(marked, shades, strict=False)),
        [*zip(ends, shades[-3:], strict=True), *words],
    ]
    figure = _drawn([section for section in sections if section])
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise OutputError(f"path must be writable; got {path}: {error}. Choose another.") from error


def _checked(texts: Sequence[str], scores: Tensor | Sequence[float], title: str, meaning: str) -> list[float]:
    for name, text in (("title", title), ("meaning", meaning)):
        if not isinstance(text, str):
            raise ArgumentError(f"{name} must be a text; got {shown(text)}. Leave it out for none of your own.")
    try:
        values = torch.as_tensor(scores).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"scores must be numbers; got {shown(scores)}. Give one a token.") from error
    if values.is_complex():
        raise ArgumentError(f"scores must be real numbers; got {shown(scores)}. Take their real part.")
    values = values.double()
    listed = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not listed or not texts or not all(isinstance(text, str) for text in texts):
        raise ArgumentError(
            f"texts must be a sequence of one text a token; got {shown(texts)}. Give a list, such as "
            "tokenizer.convert_ids_to_tokens(ids), which needs no offsets."
        )
    if values.shape != (len(texts),):
        raise ArgumentError(
            f"scores must be one for each of {len(texts)} texts; got {list(values.shape)}. Give one sequence's, "
            "such as attribution.scores[0], without padding."
        )
    if not bool(values.isfinite().all()):
        raise ArgumentError("scores must be finite; got NaN or infinity. Look for them where the scores come from.")
    return values.tolist()


def _without_control(text: str) -> str:
    """Characters that no font draws and no page may hold, such as half a surrogate pair, as one that says so."""
    return "".join(_UNKNOWN if category(sign) in ("Cc", "Cs") and sign not in "\n\t\r" else sign for sign in text)


def _ends(values: list[float]) -> tuple[float, float, float]:
    """The scores at both ends and the middle of the colours."""
    largest = max(map(abs, values))
    return -largest, 0.0, largest


def _shades(values: list[float]) -> list[float]:
    """Scores as shares of the strongest, -1 to 1; all zero where none is."""
    largest = max(map(abs, values)) or 1.0
    return [value / largest for value in values]


def _colour(shade: float) -> tuple[int, int, int]:
    return _FOR if shade > 0 else _AGAINST


def _opacity(shade: float) -> float:
    return _STRONGEST * abs(shade)


def _css(shade: float) -> str:
    red, green, blue = _colour(shade)
    return f"rgba({red}, {green}, {blue}, {_opacity(shade):.3f})"


def _drawn(sections: list[list[tuple[str, float]]]) -> Figure:
    """Texts with their shades; each section starts a line."""
    places, num_lines = _places([[_width_of(text) for text, _ in section] for section in sections])
    height = num_lines * _LINE + 2 * _MARGIN
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=144, facecolor="white")
    FigureCanvasAgg(figure)
    boxes = [box for section in sections for box in section]
    for (text, shade), (x, line) in zip(boxes, places, strict=True):
        bottom = height - _MARGIN - (line + 1) * _LINE
        corner, size = (x / _WIDTH, (bottom + 2) / height), (_width_of(text) / _WIDTH, (_LINE - 4) / height)
        colour = [channel / 255 for channel in _colour(shade)]
        figure.add_artist(Rectangle(corner, *size, color=(*colour, _opacity(shade)), linewidth=0))
        start = ((x + _PADDING) / _WIDTH, (bottom + 7) / height)
        figure.text(*start, text, fontproperties=_FONT, color=_INK, parse_math=False)
    return figure


def _width_of(text: str) -> float:
    """In points, with the room around it."""
    width: float = TextToPath().get_text_width_height_descent(text, _FONT, ismath=False)[0]
    return width + 2 * _PADDING


def _places(sections: list[list[float]]) -> tuple[list[tuple[float, int]], int]:
    """Where boxes of these widths go, as x in points and line; each section starts a line. Also the number of lines."""
    places: list[tuple[float, int]] = []
    line = 0
    for widths in sections:
        x = _MARGIN
        for width in widths:
            if x > _MARGIN and x + width > _WIDTH - _MARGIN:
                x, line = _MARGIN, line + 1
            places.append((x, line))
            x += width + 1
        line += 1
    return places, line
