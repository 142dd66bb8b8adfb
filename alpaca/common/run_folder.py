"""The folder of a run: one process at a time, resumed with equal settings only."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError, join_names
from alpaca.common.files import lock_path, made_folder, owned, remove_contents, write_text
from alpaca.common.json_files import read_json

RIGHT_ANSWERS = "right_answers.json"  # three held-out records that the trained model can answer


@contextmanager
def run_folder(folder: Path, settings: dict[str, Any], activity: str) -> Iterator[None]:
    """Make or open a run's folder, lock it, and compare `settings` with those of its beginning.

    A run begins with the first line of a log, a .jsonl file in the folder. Until then its settings
    may change, and if it fails before, a folder that was made for it is removed again."""
    file = folder / "settings.json"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if not file.exists() and (other := [n for n in names if not n.endswith(".partial")]):
        raise UserError(f"{folder} holds something else ({join_names(other)}): use another --out")

    def has_begun() -> bool:
        return any(log.stat().st_size for log in folder.glob("*.jsonl"))

    with (
        made_folder(folder),
        owned(folder, lock_path(folder, f"another process is {activity} in {folder}")),
    ):
        try:
            before = read_json(file) if file.exists() else {}
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed and has_begun():
                changes = [f"{n} was {before.get(n)}, now it is {settings[n]}" for n in changed]
                message = f"{folder} is another run ({'; '.join(changes)}): use another --out"
                raise UserError(message)
            if changed:
                write_text(file, json.dumps(settings, indent=2))
            yield
        except BaseException:
            if not names and not has_begun():
                remove_contents(folder)
            raise
