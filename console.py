"""What every command here shares: errors, progress, files that are whole or absent, logs.

    run(main)                    a user's mistake becomes one line on stderr and exit code 2
    Progress(total, "tokens")    one line: done/total, rate, time left; all but silent when piped
    atomic_file, atomic_folder   a reader sees the old state or the new one, whatever was killed
    append_jsonl, read_log       a log that survives a kill in the middle of a line
    read_json, read_jsonl        files a user wrote; listed: names for a one-line error

`ValueError` is for what a user can cause, `assert` for what only a bug can: a bug keeps its
traceback. ALPACA_TRACEBACK=1 shows one for a user's mistake too.

Shown by tests/test_console.py: test_a_users_mistake_is_one_line_and_exit_2.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

QUIET_SECONDS = 30.0  # how often a progress line appears where nobody watches it move


def run(main: Callable[[], None]) -> None:
    """Run a command: exit 0 when done, 2 for a user's mistake, 130 for Ctrl-C, 141 for `| head`."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # who was reading has left: stop as other programs do, without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        notice("interrupted")
        sys.exit(130)
    except (ValueError, OSError) as mistake:
        if os.environ.get("ALPACA_TRACEBACK"):
            raise
        notice("error: " + one_line(mistake), own=isinstance(mistake, OSError))
        sys.exit(2)


def one_line(mistake: Exception) -> str:
    said = str(mistake)
    if isinstance(mistake, OSError) and mistake.strerror:
        said = ": ".join(str(part) for part in (mistake.filename, mistake.strerror) if part)
    return " ".join(said.split())


def notice(text: str, own: bool = False) -> None:
    """One line for a person. Under torchrun every rank meets the same mistake and rank 0 says it;
    what is a rank's `own`, a full disk say, it says itself."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or own:
        who = Path(sys.argv[0]).name + (f", rank {rank}" if rank != "0" else "")
        with suppress(BrokenPipeError):
            print(f"{who}: {printable(text)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """What would steer a terminal, shown instead: names and texts come from downloaded files."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as help and one line for a mistake."""

    def __init__(self, description: str | None = None, **how):
        how.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if description:  # which test shows it is for readers of the code
            description = description.partition("\n\nShown by ")[0]
        super().__init__(description=description, **how)

    def error(self, message: str):
        notice(f"error: {message} (--help tells more)")
        self.exit(2)

    def print_help(self, file: IO[str] | None = None) -> None:
        if os.environ.get("RANK", "0") == "0":  # under torchrun once, not by every rank
            super().print_help(file)


def run_verb(args: argparse.Namespace) -> None:
    """The command of a verb, which may leave what it got from `claim` in `args.lock`."""
    try:
        args.command(args)
    finally:
        if getattr(args, "lock", None) is not None:
            os.close(args.lock)


def positive(kind: type) -> Callable[[str], Any]:
    """For `type=` of a flag: an int or a float above 0."""

    def number(text: str) -> Any:
        if not 0 < kind(text) < math.inf:
            raise ValueError
        return kind(text)

    number.__name__ = f"{kind.__name__} above 0"  # argparse: invalid int above 0 value: '-3'
    return number


class Progress:
    """A line that redraws itself: `12/290 tensors  4.1 tensors/s  1:08 left  (more)`.

    Work that goes on from an earlier run has `done` some of it already."""

    def __init__(self, total: float, unit: str, stream: IO[str] | None = None, done: float = 0):
        self.total, self.unit, self.stream = total, unit, stream or sys.stderr
        self.live = self.stream.isatty()
        self.done = self.before = done
        self.start, self.width = time.monotonic(), 0
        self.shown = -math.inf if self.live else self.start

    def step(self, amount: float = 1, more: str = "") -> None:
        self.done += amount
        if time.monotonic() - self.shown >= (0.1 if self.live else QUIET_SECONDS):
            self.shown = time.monotonic()
            self._show(more, end="\r" if self.live else "\n")

    def close(self, more: str = "") -> None:
        """The last line stays, on a terminal and in a log alike."""
        self._show(more, end="\n")

    def _show(self, more: str, end: str) -> None:
        seconds = time.monotonic() - self.start
        rate = (self.done - self.before) / max(seconds, 1e-9)
        left = f"{clock((self.total - self.done) / rate if rate else math.inf)} left"
        parts = [
            f"{human(self.done)}/{human(self.total)} {self.unit}",
            f"{human(rate)} {self.unit}/s",
            left if self.done < self.total else f"in {clock(seconds)}",
        ]
        line = "  ".join(part for part in (*parts, more) if part)
        with suppress(BrokenPipeError):  # nobody watches any more; the work goes on
            print(line.ljust(self.width), end=end, file=self.stream, flush=True)
        self.width = len(line) if self.live else 0


def human(number: float) -> str:
    """7, 3.2, 512, 14.3K, 6.7G: few enough figures for a person to compare."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= max(size, 1e4) - size / 2e4:  # 999,960 reads 1.0M, not 1000.0K
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.2g}"


def clock(seconds: float) -> str:
    """0:07, 12:30, 3:05:00, or ? when nobody can know yet."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def listed(names: Iterable[str], most: int = 8) -> str:
    """`a, b, c and 12 more`."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


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


def plain(text: str) -> str:
    """Text that can be written: half a surrogate pair, which JSON may hold, cannot."""
    return text.encode("utf-8", "replace").decode()
