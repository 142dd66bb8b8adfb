"""Quote results in a model's card, the README.md that the trainer writes beside the weights.

    alpaca benchmark --model-dir runs/tiny/model --tasks data/safety_prompts.jsonl \\
        --out runs/safety --card

The results replace what stands between two marks, and nothing else changes: a card that somebody
else wrote gets them where its owner puts the marks.
"""

import time
from collections.abc import Iterable
from pathlib import Path

from alpaca.common.errors import UserError, escape_control
from alpaca.common.files import atomic_file

CARD, MARKS = "README.md", (b"<!-- benchmark -->", b"<!-- end of benchmark -->")


def divide_card(folder: Path) -> tuple[bytes, bytes]:
    """What stands before the results and after them, the marks included."""
    file = folder / CARD
    before, first, rest = (file.read_bytes() if file.is_file() else b"").partition(MARKS[0])
    _, second, after = rest.partition(MARKS[1])
    if not second:
        lines = " and ".join(mark.decode() for mark in MARKS)
        raise UserError(f"--card: {file} has no place for results: add the lines {lines} to it")
    return before + first, second + after


def quote_results(folder: Path, results: str, files: Iterable[Path]) -> None:
    """Names come from elsewhere: in indented lines they are no Markdown."""
    before, after = divide_card(folder)
    names = escape_control(", ".join(file.name for file in files))
    lines = [f"{names}, measured on {time.strftime('%Y-%m-%d')}", "", *results.splitlines()]
    text = "".join(f"    {line}".rstrip() + "\n" for line in lines)
    with atomic_file(folder / CARD) as file:
        file.write(before + f"\n\n{text}\n".encode(errors="backslashreplace") + after)
