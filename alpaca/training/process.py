"""A training process: signals and exit codes."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from alpaca.common.errors import notice, run_command
from alpaca.training.parallel import is_peer_failure


class StopSignal:
    """Notes Ctrl-C or SIGTERM, so that the step under way can finish. A second Ctrl-C ends the
    process at once; SIGTERM may come twice, from a scheduler and from torchrun."""

    def __init__(self):
        self.number = 0  # none yet

    def __enter__(self) -> "StopSignal":
        signals = signal.SIGINT, signal.SIGTERM
        self.previous = {number: signal.signal(number, self.receive) for number in signals}
        return self

    def __exit__(self, exception, *_) -> None:
        if exception is None:  # else the process is about to end, and not by a second SIGTERM
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        first, self.number = not self.number, number
        if first:
            os.write(2, b"stopping after this step\n")  # print is not safe in a handler


def run_rank(main: Callable[[], None]) -> NoReturn:
    """Run a command as one of several ranks, and end the process with its exit code."""
    code = 1
    try:
        run_command(main)
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    except Exception as error:
        peer_failed = isinstance(error, RuntimeError) and is_peer_failure(str(error))
        if peer_failed and not os.environ.get("ALPACA_TRACEBACK"):
            reason = str(error).strip().split("\n")[0]
            notice(f"another rank failed ({reason}); start again to resume", any_rank=True)
        else:
            traceback.print_exc()
    hard_exit(code if isinstance(code, int) else int(code is not None))


def hard_exit(code: int) -> NoReturn:
    """End now: threads that write a snapshot would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
