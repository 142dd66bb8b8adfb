"""Files that are whole or absent, logs that survive a kill, JSON that names its file in errors.

atomic_file, atomic_folder   a reader sees the old state or the new one, whatever was killed
append_jsonl, read_log       a log that survives a kill in the middle of a line
claim                        a run's folder: locked, and held to the settings it began with
read_json, read_jsonl        files a user wrote
"""

import fcntl
import json
import os
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from alpaca.common.errors import listed


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, or a ValueError naming the file."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as mistake:
        raise ValueError(f"{path}: not JSON ({mistake})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object was expected")
    return content


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Yield a file under a temporary name; a body that ends well moves it to `path`."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Unless it is an empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise ValueError(f"{path} exists already: name a new folder, or remove it first")


@contextmanager
def atomic_folder(path: str | Path, keep: Container[str] = ()) -> Iterator[Path]:
    """Yield `NAME.partial` beside `path`; a body that ends well renames it to `path`.

    `path` may not hold anything yet. What an earlier run left under the partial name is removed,
    but for the files to `keep`: a run that names some finds them again after a kill, Ctrl-C or a
    full disk, and a user's mistake takes away only what the same run has begun. A lock on the
    folder, which dies with its process, keeps two writers out of each other's way."""
    path = Path(path).absolute()
    refuse_existing(path)
    partial = path.with_name(path.name + ".partial")
    found = partial.exists()
    partial.mkdir(parents=True, exist_ok=True)
    lock = locked(partial, f"{partial} is being written by another process", os.O_NOFOLLOW)
    try:
        for leftover in partial.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            elif leftover.is_symlink() or leftover.name not in keep:
                leftover.unlink()
        yield partial
        for file in (*partial.rglob("*"), partial):
            sync(file)
        os.rename(partial, path)
    except BaseException as problem:
        if not keep or (isinstance(problem, ValueError) and not found):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    sync(path.parent)


def locked(folder: Path, mistake: str, how: int = 0) -> int:
    """A lock on a folder, held until the handle that is returned is closed or the process ends."""
    handle = os.open(folder, os.O_RDONLY | how)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):  # not renamed, nor removed, since
            return handle
    os.close(handle)
    raise ValueError(mistake)


def claim(folder: Path, settings: dict[str, Any], doing: str, begun: str = "settings.json") -> int:
    """Make a folder, or find it, lock it for one process, and hold what it was begun with against
    `settings`; until there is a file `begun` they may change. Returns the lock."""
    file = folder / "settings.json"
    there = [path.name for path in folder.iterdir()] if folder.exists() else []
    if not file.exists() and (odd := [name for name in there if not name.endswith(".partial")]):
        raise ValueError(f"{folder} holds something else ({listed(odd, 3)}): name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder, f"another process is {doing} in {folder}")
    try:
        if not file.exists() or not (folder / begun).exists():
            with atomic_file(file, "w") as opened:
                json.dump(settings, opened, indent=2)
        before = read_json(file)
        if odd := [name for name in settings if before.get(name) != settings[name]]:
            told = (f"{name} was {before.get(name)}, now it is {settings[name]}" for name in odd)
            raise ValueError(f"{folder} is another run ({'; '.join(told)}): name another --out")
    except BaseException:
        os.close(lock)
        raise
    return lock


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_jsonl(path: str | Path, *records: dict) -> None:
    """Add records, a line each, durable on return. A line torn by a kill is cut off first; the lock
    keeps other writers from taking ours, still on its way, for such a line."""
    new = not os.path.exists(path)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start, tail = _last_line(file)
        if tail and is_json(tail):  # whole but for its newline
            file.write(b"\n")
        elif tail:
            file.truncate(start)
        file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(Path(path).parent)


def _last_line(file: IO[bytes]) -> tuple[int, bytes]:
    """What follows the last newline, and where it starts."""
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
    torn; in a user's file that is an error like any other."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if skip_torn and not line.endswith(b"\n") and not is_json(line):
                return
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as mistake:
                raise ValueError(f"{path}, line {number}: not JSON ({mistake})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: a JSON object was expected")
            yield record


def read_log(path: Path) -> Iterator[dict]:
    """The records of a log of ours, which may not be there yet, or end in a line torn by a kill."""
    if path.exists():
        yield from read_jsonl(path, skip_torn=True)
