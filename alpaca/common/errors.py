"""A user's error is one line on stderr and exit code 2; a bug keeps its traceback.

    run_command(main)   runs a command and turns the way it ends into an exit code
    UserError(text)     raised for anything a user can cause; the text says what to do about it
    errors_at(place)    lets the text of a UserError begin with a file, a line of it, or a name
    notice(text)        one line for a person, printed once under torchrun

ALPACA_TRACEBACK=1 shows the traceback of a UserError too.
"""

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UserError(Exception):
    """Something a user can cause and fix: one line that says what is wrong, where, and the fix."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command: exit 0 when done, 2 for a user's error, 130 for Ctrl-C, 141 for `| head`."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # what is not UTF-8 is refused or escaped later
            stream.reconfigure(errors=errors)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader is gone: stop silently, as other programs do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        notice("interrupted")
        sys.exit(130)
    except (UserError, OSError) as error:
        if os.environ.get("ALPACA_TRACEBACK"):
            raise
        notice("error: " + describe_error(error), any_rank=isinstance(error, OSError))
        sys.exit(2)


def describe_error(error: Exception) -> str:
    """The text of an error; of an OSError, its file and what happened to it."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return text


@contextmanager
def errors_at(place: object) -> Iterator[None]:
    """Put the place, such as a file and a line of it, before the text of the body's UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def is_rank_0() -> bool:
    """Also where there is one process only. Under torchrun, one of them speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def notice(text: str, any_rank: bool = False) -> None:
    """Print one line for a person, cut at 400 characters: a name in it may be a page long. Under
    torchrun all ranks meet the same errors, so only rank 0 prints; `any_rank` is for what concerns
    one rank alone, such as a full disk."""
    if is_rank_0() or any_rank:
        rank = "" if is_rank_0() else f", rank {os.environ['RANK']}"
        program = f"{Path(sys.argv[0]).name}{rank}"
        text = escape_control(" ".join(text.split()))
        text = text if len(text) <= 400 else f"{text[:250]} … {text[-147:]}"
        with suppress(BrokenPipeError):
            print(f"{program}: {text}", file=sys.stderr, flush=True)


def escape_control(text: str) -> str:
    """Escape what would control a terminal: names and texts come from downloaded files."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_unicode(text: str) -> None:
    """Refuse half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"{text[error.start]!r} at character {error.start}"
        raise UserError(f"half a surrogate pair is not text: {place}") from None


def replace_surrogates(text: str) -> str:
    """JSON can hold half a surrogate pair, which no file can: replace it by a question mark."""
    return text.encode("utf-8", "replace").decode()


def join_names(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 12 more`, each name cut at 120 characters."""
    names = [name if len(name) <= 120 else name[:119] + "…" for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if names[limit:] else "")
