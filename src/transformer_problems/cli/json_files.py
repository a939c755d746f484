"""Reports for programs: one JSON file, whole or not at all."""

import json
from pathlib import Path
from typing import Any


def write_json(file: Path | None, told: dict[str, Any]) -> None:
    """Write it under another name, which is then given to the file, however the run ends; nothing without a file."""
    if file is None:
        return
    unfinished = file.with_name(f".{file.name}.part")
    try:
        unfinished.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
