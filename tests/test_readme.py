"""The examples that people copy run as they stand."""

import re
from pathlib import Path

import pytest

from transformer_problems.catalogue import load_catalogue

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
BLOCKS = [
    (f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 1}", match.group(1))
    for page in PAGES
    for match in re.finditer(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]
EXAMPLES = [(s.slug, s.example) for s in load_catalogue().solutions if s.example]


@pytest.mark.parametrize("code", [code for _, code in BLOCKS], ids=[place for place, _ in BLOCKS])
def test_page_example(code: str) -> None:
    exec(code, {})


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[slug for slug, _ in EXAMPLES])
def test_catalogue_example(code: str) -> None:
    exec(code, {})


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
