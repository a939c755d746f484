"""Pictures, pages and the site: reads summaries and records, draws and writes them, computes nothing.

Public names load at first use, so that the command line can format a number without importing matplotlib.
"""

import importlib
from typing import Any

_HOMES = {
    "draw_problem": "figures",
    "write_problem_page": "pages",
    "write_report": "site",
    "write_site": "site",
    "write_ward_page": "ward_page",
}

__all__ = ["draw_problem", "write_problem_page", "write_report", "write_site", "write_ward_page"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
