"""Pictures as elements of a page."""

import re

from transformer_problems.report.story import themed


def inline_svg(svg: str, label: str) -> str:
    """A picture as an element of a page: no metadata, the page's theme, a name for screen readers."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: themed(found[0]), body)
    return body.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
