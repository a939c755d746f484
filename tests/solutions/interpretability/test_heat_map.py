"""Heat maps: every text in its colour, nothing that breaks out, readable on light and dark pages."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from transformer_problems.clinic.ward import byte_tokenizer
from transformer_problems.core.errors import ArgumentError, OutputError
from transformer_problems.solutions.interpretability.gradient_x_input import GradientXInput
from transformer_problems.solutions.interpretability.heat_map import heat_map_html, heat_map_png

HOSTILE = [
    "<script>alert(1)</script>",
    '"onload="x',
    "&amp;",
    "$a_1^{",
    "{curly}",
    "\n",
    "\t",
    "",
    " ",
    "Ġnot",
    "##ing",
]


class Spans(HTMLParser):
    """The first paragraph of spans: their texts, grounds and titles; and every tag that occurs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._inside = tag == "span" and "title" in dict(attrs)
        if self._inside:
            self.texts.append("")
            self.attributes.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def grounds(page: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, match)) for match in re.findall(r"rgba\((\d+), (\d+), (\d+), ", page)]


def opacities(page: str) -> list[float]:
    return [float(match) for match in re.findall(r"rgba\(\d+, \d+, \d+, ([\d.]+)\)", page)]


def test_texts_come_back_as_they_were_and_none_becomes_a_tag() -> None:
    page = heat_map_html(HOSTILE, torch.arange(11.0), title="<b>t</b>", meaning="<i>m</i> & {more}")
    found = Spans(page)
    assert found.texts == HOSTILE
    assert found.tags == {"html", "head", "meta", "title", "style", "body", "p", "strong", "small", "span"}
    assert [attributes["title"] for attributes in found.attributes] == [str(i) for i in range(11)]
    assert all(set(attributes) == {"style", "title"} for attributes in found.attributes)
    assert "&lt;i&gt;m&lt;/i&gt; &amp; {more}" in page


def test_nothing_is_loaded_and_both_themes_are_there() -> None:
    page = heat_map_html(["a"], [1.0])
    assert not re.search(r"https?:|src=|url\(|@import|<link|<script", page)
    assert "color-scheme: light dark" in page and "prefers-color-scheme: dark" in page


def test_colours_tell_for_from_against_and_strength_is_the_share_of_the_strongest() -> None:
    page = heat_map_html(["a", "b", "c", "d"], [2.0, -1.0, 0.0, 0.5])
    orange, blue = (213, 94, 0), (0, 114, 178)
    assert grounds(page)[:4] == [orange, blue, blue, orange]
    assert opacities(page)[:4] == pytest.approx([0.55, 0.275, 0.0, 0.1375], abs=0.0006)  # three digits
    assert "&nbsp;-2&nbsp;" in page and "&nbsp;2&nbsp;" in page
    assert set(opacities(heat_map_html(["a", "b"], [0.0, 0.0]))[:2]) == {0.0}


@pytest.mark.parametrize(("ink", "ground"), [("#1a1a1a", "#ffffff"), ("#ecebe6", "#1c1c1b")])
def test_text_on_the_strongest_colours_is_readable_in_both_themes(ink: str, ground: str) -> None:
    page = heat_map_html(["a", "b"], [1.0, -1.0])
    assert f"--ink: {ink}; --ground: {ground}" in page

    def luminance(colour: np.ndarray) -> float:
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def of(text: str) -> np.ndarray:
        return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255

    for colour in grounds(page)[:2]:
        behind = 0.55 * np.array(colour) / 255 + 0.45 * of(ground)
        darker, lighter = sorted([luminance(behind), luminance(of(ink))])
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5  # WCAG 2.1, level AA


def test_a_picture_holds_both_colours_and_grows_by_lines(tmp_path: Path) -> None:
    heat_map_png(["good", " not"], [1.0, -1.0], tmp_path / "short.png")
    short = imread(tmp_path / "short.png")
    pixels = (short[..., :3] * 255).round().reshape(-1, 3)
    for colour in ((213, 94, 0), (0, 114, 178)):
        blended = 0.55 * np.array(colour) + 0.45 * 255
        # the renderer rounds twice, hence two levels; each box is some hundred points
        assert (np.abs(pixels - blended).max(axis=1) <= 2).sum() > 1000
    heat_map_png(["word"] * 60, torch.linspace(-1, 1, 60), tmp_path / "long.png", title="t", meaning="What it means.")
    tall = imread(tmp_path / "long.png")
    assert tall.shape[1] == short.shape[1] and tall.shape[0] > short.shape[0]
    edge = np.concatenate([tall[:, :4], tall[:, -4:]], axis=1)
    assert (edge == 1).all(), "something runs off the page"


def test_pictures_take_any_text_and_no_title(tmp_path: Path) -> None:
    heat_map_png(HOSTILE, torch.zeros(11), tmp_path / "any.png", title="$x^{$", meaning="$y_{$")
    heat_map_png(["a"], [0.0], str(tmp_path / "bare.png"), title="")
    assert imread(tmp_path / "bare.png").shape[0] < imread(tmp_path / "any.png").shape[0]


@pytest.mark.parametrize(
    ("texts", "scores", "message"),
    [
        (["a", "b"], [1.0], r"scores must be one for each of 2 texts; got \[1\]"),
        (["a", "b"], torch.ones(1, 2), r"scores must be one for each of 2 texts; got \[1, 2\]"),
        ([], [], r"texts must be a sequence of one text a token; got \[\]"),
        ("ab", [1.0, 2.0], "texts must be a sequence of one text a token; got 'ab'"),
        (["a", 5], [1.0, 2.0], r"texts must be a sequence of one text a token; got \['a', 5\]"),
        (5, [1.0], "texts must be a sequence of one text a token; got 5"),
        (None, [1.0], "got None. Give a list, such as tokenizer.convert_ids_to_tokens"),
        (
            torch.tensor([5, 7]),
            [1.0, 2.0],
            r"got torch.int64 \[2\]. Give a list, such as tokenizer.convert_ids_to_tokens",
        ),
        (np.array(["a", "b"]), [1.0, 2.0], "texts must be a sequence of one text a token; got array"),
        (["a", "b"], ["x", "y"], r"scores must be numbers; got \['x', 'y'\]"),
        (["a", "b"], None, "scores must be numbers; got None"),
        (["a", "b"], torch.ones(2) * 1j, "scores must be real numbers; got torch.complex64"),
        (["a", "b"], [1.0, float("nan")], "scores must be finite; got NaN or infinity"),
    ],
)
def test_texts_and_scores_that_do_not_fit_are_refused(
    texts: list[str], scores: list[float], message: str, tmp_path: Path
) -> None:
    for draw in (heat_map_html, lambda texts, scores: heat_map_png(texts, scores, tmp_path / "x.png")):
        with pytest.raises(ArgumentError, match=message):
            draw(texts, scores)
    assert not (tmp_path / "x.png").exists()


def test_a_title_or_meaning_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="title must be a text; got 3"):
        heat_map_png(["a"], [1.0], tmp_path / "x.png", title=3)
    with pytest.raises(ArgumentError, match="meaning must be a text; got None"):
        heat_map_html(["a"], [1.0], meaning=None)


def test_line_ends_and_control_characters_are_drawn_and_written(tmp_path: Path) -> None:
    """Without a glyph matplotlib warns, which is an error here; half a surrogate pair it cannot draw at all."""
    texts = ["a\r\n", "\t", "\x00\x1b", "\ud800"]
    heat_map_png(texts, torch.zeros(4), tmp_path / "x.png")
    page = heat_map_html(texts, torch.zeros(4))
    assert "a\r\n</span>" in page and page.count("\N{REPLACEMENT CHARACTER}") == 3
    (tmp_path / "x.html").write_text(page, encoding="utf-8")


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="path must be writable; got .*missing"):
        heat_map_png(["a"], [1.0], tmp_path / "missing" / "x.png")


class Characters:
    """A tokenizer in Python alone, which knows no places in the text."""

    is_fast = False

    def __call__(self, text: str, *, return_offsets_mapping: bool = False) -> dict[str, list[int]]:
        if return_offsets_mapping:
            raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers.")
        return {"input_ids": [ord(letter) for letter in text]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["\N{LOWER ONE EIGHTH BLOCK}" if number == ord(" ") else chr(number) for number in ids]


def test_a_tokenizer_without_offsets_gives_the_texts_of_its_tokens(tmp_path: Path) -> None:
    tokenizer = Characters()
    ids = tokenizer("not bad")["input_ids"]
    texts = tokenizer.convert_ids_to_tokens(ids)
    assert Spans(heat_map_html(texts, torch.arange(7.0))).texts == list("not\N{LOWER ONE EIGHTH BLOCK}bad")
    heat_map_png(texts, torch.arange(7.0), tmp_path / "x.png")
    assert imread(tmp_path / "x.png").size


@pytest.mark.peer
def test_tokenizers_of_transformers_with_offsets_and_without_reach_from_text_to_page(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    text = "not b\N{LATIN SMALL LETTER A WITH DIAERESIS}d"
    for tokenizer in (transformers.ByT5Tokenizer(), byte_tokenizer()):
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=len(tokenizer), num_labels=3, **sizes)
        )
        asked = tokenizer(text, return_tensors="pt", return_offsets_mapping=tokenizer.is_fast)
        ids, mask = asked["input_ids"], asked["attention_mask"].bool()
        found = GradientXInput().explain(model, ids, key_mask=mask)
        texts = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        page = heat_map_html(texts, found.scores[0], meaning=found.meaning)
        assert len(Spans(page).texts) == len(texts) == ids.shape[1] and Spans(page).texts[0] == "n"
        heat_map_png(texts, found.scores[0], tmp_path / "x.png", meaning=found.meaning)
        assert imread(tmp_path / "x.png").size
        if tokenizer.is_fast:
            spans = [text[start:end] for start, end in asked["offset_mapping"][0].tolist()]
            assert Spans(heat_map_html(spans, found.scores[0])).texts == spans and spans[:5] == list("not b")
