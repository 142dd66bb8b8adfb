"""A user's mistake becomes one line on stderr and exit code 2; a bug keeps its traceback.

    run_command(main)   runs a command and turns what ends it into an exit code
    notice(text)        one line for a person, once under torchrun

ALPACA_TRACEBACK=1 shows a traceback for a user's mistake too.
"""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def run_command(main: Callable[[], None]) -> None:
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


def plain(text: str) -> str:
    """Text that can be written: half a surrogate pair, which JSON may hold, cannot."""
    return text.encode("utf-8", "replace").decode()


def listed(names: Iterable[str], most: int = 8) -> str:
    """`a, b, c and 12 more`."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
