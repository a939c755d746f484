"""One table of a TOML or JSON file, read key by key."""

import re
from collections.abc import Collection
from typing import Any

from transformer_problems.core.errors import CatalogueError


class Table:
    """A table whose keys are taken one by one and checked; `done` refuses those that nobody took.

    Args:
        values: The table as parsed.
        where: What it is called in errors, e.g. "solutions.toml, solution rope".
    """

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, dict):
            raise CatalogueError(f"{where} must be a table; got {_short(values)}.")
        self._left, self.where = dict(values), where

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, kind: type | tuple[type, ...], rule: str) -> Any:
        """The value of a key that must be there and of a kind."""
        if key not in self._left:
            raise CatalogueError(f"{self.where} lacks {key}: add {rule}.")
        value = self._left.pop(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(key, rule, value)
        return value

    def text(self, key: str, pattern: str = r".+", rule: str = "a text that is not empty") -> str:
        """A text on one line."""
        text = " ".join(self.take(key, str, rule).split())
        if not re.fullmatch(pattern, text):
            raise self.error(key, rule, text)
        return text

    def integer(self, key: str, low: int, high: int) -> int:
        rule = f"a whole number from {low} to {high}"
        value: int = self.take(key, int, rule)
        if not low <= value <= high:
            raise self.error(key, rule, value)
        return value

    def choice(self, key: str, allowed: Collection[str]) -> Any:
        rule = f"one of {', '.join(allowed)}"
        value = self.take(key, str, rule)
        if value not in allowed:
            raise self.error(key, rule, value)
        return value

    def table(self, key: str) -> "Table":
        return Table(self.take(key, dict, f"a table, [{key}]"), f"{self.where}, {key}")

    def tables(self, key: str) -> list["Table"]:
        """The tables of a list, each called by its slug in errors where it has one."""
        found = []
        for number, values in enumerate(self.take(key, list, f"a list of tables, [[{key}]]"), 1):
            slug = values.get("slug", number) if isinstance(values, dict) else number
            found.append(Table(values, f"{self.where}, {key} {slug}"))
        return found

    def remaining(self) -> list[str]:
        """Keys not taken yet."""
        return list(self._left)

    def done(self) -> None:
        """Raise CatalogueError if there are keys that nobody took."""
        if self._left:
            raise CatalogueError(f"{self.where} has unknown keys: {', '.join(self._left)}. Remove or correct them.")

    def error(self, key: str, rule: str, value: object) -> CatalogueError:
        return CatalogueError(f"{self.where}: {key} must be {rule}; got {_short(value)}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
