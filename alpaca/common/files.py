"""Files that are complete or absent, and outputs that never replace an input.

input_file, read_text        a file to read, which this command may then not write over
atomic_file, atomic_folder   a reader sees the old state or the new one, whenever a kill comes
write_text                   a text as such a file
lock_output                  keeps a second process from writing the same file
"""

import gzip
import io
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from alpaca.common.errors import UserError
from alpaca.common.system import lock_file

MAX_UNZIPPED = 2 << 30
INPUTS: set[Path] = set()  # what this command has read
OWNED: set[Path] = set()  # files and folders that it has locked, to write and to read again


def is_owned(path: Path) -> bool:
    path = path.resolve()
    return not OWNED.isdisjoint((path, *path.parents))


def input_file(path: str | Path, max_bytes: float = float("inf")) -> Path:
    """A regular file to read: a pipe or a device might never end."""
    path = Path(path)
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{path} is not a regular file")
    if info.st_size > max_bytes:
        raise UserError(f"{path} has {info.st_size:,} bytes, at most {max_bytes:,} were expected")
    INPUTS.add(path.resolve())
    return path


def read_text(path: str | Path, max_bytes: float = float("inf")) -> str:
    """The text of a UTF-8 file, perhaps gzipped; a byte-order mark is not part of it."""
    data = input_file(path, max_bytes).read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = unzip(data, Path(path), int(min(max_bytes, MAX_UNZIPPED)))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8: save the file as UTF-8") from None


def unzip(data: bytes, path: Path, max_bytes: int) -> bytes:
    try:
        with gzip.open(io.BytesIO(data)) as file:
            data = file.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip ({error})") from None
    if len(data) > max_bytes:
        raise UserError(f"{path}: more than {max_bytes:,} bytes when unzipped: divide it")
    return data


def refuse_input(path: Path) -> None:
    """Refuse to write over what this command has read, by whatever name or link."""
    if not path.exists() or is_owned(path):
        return
    if any(input.exists() and path.samefile(input) for input in INPUTS):
        raise UserError(f"{path} is an input of this command: name another output")


def refuse_same(flag: str, path: Path | None, other_flag: str, other: Path | None) -> None:
    """Refuse two outputs with one name: the second would take the place of the first."""
    if path and other and path.resolve() == other.resolve():
        raise UserError(f"{flag} and {other_flag} are both {path}: name two files")


def refuse_existing(path: Path) -> None:
    """Refuse to write over `path`, unless it is an empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise UserError(f"{path} exists already: use another name, or remove it first")


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Make an error of a write, such as a full disk, name its file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Yield a file with a temporary name; it is renamed to `path` if the body raises nothing."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    refuse_input(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: name another output")
    if path.exists() and (path.resolve().parent / "settings.json").exists() and not is_owned(path):
        raise UserError(f"{path} belongs to a run: name another output")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # half a surrogate pair becomes \ud800, which JSON reads as the same
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
        with named_errors(path), open(partial, mode, encoding=encoding, errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic_file(path, "w") as file:
        file.write(text)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents. Those that are empty in the end are removed again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in made:
            with suppress(OSError):  # not empty, or gone
                path.rmdir()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield the folder `NAME.partial`; it is renamed to `path` if the body raises nothing.

    `path` must not exist, or be empty. What an earlier, killed run left in the partial folder is
    removed. A lock on the folder, which ends with its process, keeps a second writer out."""
    path = Path(path).absolute()
    refuse_existing(path)
    partial = path.with_name(path.name + ".partial")
    for leftover in partial.rglob("*"):
        refuse_input(leftover)
    with made_folder(path.parent), made_folder(partial):
        lock = lock_path(partial, f"{partial} is being written by another process", os.O_NOFOLLOW)
        try:
            remove_contents(partial)
            with named_errors(path):
                yield partial
            for file in (*partial.rglob("*"), partial):
                fsync_path(file)
            os.rename(partial, path)
        except BaseException:
            remove_contents(partial)
            raise
        finally:
            os.close(lock)
        fsync_path(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_contents(folder: Path) -> None:
    for path in folder.iterdir():
        remove(path)


def lock_path(path: Path, refusal: str, open_flags: int = 0) -> int:
    """Lock a file or folder until the returned handle is closed or the process ends."""
    handle = os.open(path, os.O_RDONLY | open_flags)
    with suppress(BlockingIOError, FileNotFoundError):
        lock_file(handle, wait=False)
        if os.path.samestat(os.fstat(handle), os.stat(path)):  # not renamed, nor removed, since
            return handle
    os.close(handle)
    raise UserError(refusal)


@contextmanager
def owned(path: Path, lock: int) -> Iterator[None]:
    """While the lock is held, `path` and what lies in it may be read and written."""
    OWNED.add(path.resolve())
    try:
        yield
    finally:
        OWNED.discard(path.resolve())
        os.close(lock)


@contextmanager
def lock_output(path: Path) -> Iterator[None]:
    """Keep other processes from writing to a file, which need not exist yet."""
    refuse_input(path)
    target = path.resolve()  # one lock for all links to it
    beside = target.with_name(target.name + ".lock")
    beside.touch()
    with owned(path, lock_path(beside, f"another process is writing {path}")):
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
