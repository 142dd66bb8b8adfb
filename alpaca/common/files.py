"""Files that are complete or absent, logs that survive a kill, JSON errors that name their file.

atomic_file, atomic_folder   a reader sees the old state or the new one, whenever a kill comes
append_jsonl, read_log       a log that survives a kill in the middle of a line
claim_run_folder             a run's folder: locked, and resumed with equal settings only
read_json, json_records      files that a user wrote; read_jsonl: one object a line
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from alpaca.common.errors import UserError, join_names


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, or a UserError naming the file."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object was expected")
    return content


def json_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, value) for each element of a JSON list or each line of a JSONL file; the place, such
    as "data.json, record 3" or "data.jsonl, line 3", is what an error message begins with."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8: save the file as UTF-8") from None
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        yield from ((f"{path}, record {i}", value) for i, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Yield a file with a temporary name; it is renamed to `path` if the body raises nothing."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Refuse to write over `path`, unless it is an empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise UserError(f"{path} exists already: name a new folder, or remove it first")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield the folder `NAME.partial`; it is renamed to `path` if the body raises nothing.

    `path` must not exist, or be empty. What an earlier, killed run left in the partial folder is
    removed. A lock on the folder, which ends with its process, keeps a second writer out."""
    path = Path(path).absolute()
    refuse_existing(path)
    partial = path.with_name(path.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(partial, f"{partial} is being written by another process", os.O_NOFOLLOW)
    try:
        for leftover in partial.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        yield partial
        for file in (*partial.rglob("*"), partial):
            fsync_path(file)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    fsync_path(path.parent)


def lock_folder(folder: Path, refusal: str, open_flags: int = 0) -> int:
    """Lock a folder until the returned handle is closed or the process ends."""
    handle = os.open(folder, os.O_RDONLY | open_flags)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):  # not renamed, nor removed, since
            return handle
    os.close(handle)
    raise UserError(refusal)


def claim_run_folder(
    folder: Path, settings: dict[str, Any], activity: str, started: str = "settings.json"
) -> int:
    """Create or open a run's folder, lock it for this process, and compare `settings` with those it
    was started with. Until the file `started` exists they may still change. Returns the lock."""
    file = folder / "settings.json"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if not file.exists() and (other := [n for n in names if not n.endswith(".partial")]):
        raise UserError(
            f"{folder} holds something else ({join_names(other, 3)}): use another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder, f"another process is {activity} in {folder}")
    try:
        if not file.exists() or not (folder / started).exists():
            with atomic_file(file, "w") as opened:
                json.dump(settings, opened, indent=2)
        before = read_json(file)
        if changed := [name for name in settings if before.get(name) != settings[name]]:
            changes = (f"{n} was {before.get(n)}, now it is {settings[n]}" for n in changed)
            raise UserError(f"{folder} is another run ({'; '.join(changes)}): use another --out")
    except BaseException:
        os.close(lock)
        raise
    return lock


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_jsonl(path: str | Path, *records: dict) -> None:
    """Append records, one per line, durable on return. A line torn by an earlier kill is cut off
    first; the lock keeps other writers from mistaking our unfinished line for such a one."""
    new = not os.path.exists(path)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start, tail = _last_line(file)
        if tail and is_json(tail):  # complete except for its newline
            file.write(b"\n")
        elif tail:
            file.truncate(start)
        file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
        file.flush()
        os.fsync(file.fileno())
    if new:
        fsync_path(Path(path).parent)


def _last_line(file: IO[bytes]) -> tuple[int, bytes]:
    """Where the text after the last newline starts, and that text."""
    start, tail = file.seek(0, os.SEEK_END), b""
    while start > 0 and b"\n" not in tail:
        step = min(start, 1 << 16)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    head, newline, tail = tail.rpartition(b"\n")
    return start + len(head) + len(newline), tail


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def read_jsonl(path: str | Path, skip_torn: bool = False) -> Iterator[dict]:
    """The records of a JSONL file. `skip_torn` is for our own logs, whose last line a kill may have
    cut; in a user's file that is an error like any other."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if skip_torn and not line.endswith(b"\n") and not is_json(line):
                return
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: a JSON object was expected")
            yield record


def read_log(path: Path) -> Iterator[dict]:
    """The records of one of our logs, which may be missing or end in a line cut by a kill."""
    if path.exists():
        yield from read_jsonl(path, skip_torn=True)
