"""Results that are written one by one, each as a line of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the results in a file, none if there is no file.

    A line that is cut short, as a killed run leaves it, is reported and skipped.
    """
    results = []
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            results.append(json.loads(line))
        except ValueError:
            print(f'{path}:{number} is cut short: what it was about is done again')
    return results


def append_line(path: Path, result: dict[str, Any]) -> None:
    """Append a result on a line of its own, even after one that was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a+b') as file:
        is_complete = file.tell() == 0 or path.read_bytes().endswith(b'\n')
        file.write(b'' if is_complete else b'\n')
        file.write(json.dumps(result).encode() + b'\n')
