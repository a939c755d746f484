"""The examples that people copy run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest

from transformer_problems.catalogue import load_catalogue

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
BLOCKS = [
    (f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 1}", match.group(1))
    for page in PAGES
    for match in re.finditer(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]
EXAMPLES = {pair.example: pair.key for pair in load_catalogue().treatments if pair.example}


@pytest.mark.parametrize("code", [code for _, code in BLOCKS], ids=[place for place, _ in BLOCKS])
def test_page_example(code: str) -> None:
    exec(code, {})


@pytest.mark.parametrize("code", EXAMPLES, ids=EXAMPLES.values())
def test_catalogue_example(code: str) -> None:
    exec(code, {})


def test_the_example_of_retrieval_finds_the_passage_with_the_answer_first() -> None:
    names: dict[str, Any] = {}
    exec(load_catalogue().solution("rag").example, names)
    assert len(names["passages"]) > 2
    assert "48213" in names["prompt"].hits[0].passage


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
