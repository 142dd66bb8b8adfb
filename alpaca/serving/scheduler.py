"""One thread that runs the engine, for many requests that come and go.

    worker = EngineThread(engine, max_sequences=64)      # decoded or waiting
    request = await worker.submit([ids], [SamplingParams()])
    while not request.ended:
        await request.updated()            # the texts of its sequences have grown
    worker.cancel(request)                 # at any time; its cache slots are free at the next token

The engine belongs to this thread. Requests live in an asyncio loop and put jobs into an inbox. The
thread empties it between two tokens: that is when sequences join and leave.

  - Updates reach all requests in one call into the loop: streams every 30 ms, others every half
    second. Waking a task for every token would take time from decoding.
  - `Sequence.finish_reason` is set after the text is complete: read it first, then the text.
  - Beyond `max_sequences` a request is refused at once: in a queue that nobody will wait out, all
    requests are late.
  - A step that fails ends the sequences in it, and later requests are decoded as before. A request
    that cannot be added or cancelled harms no other. `healthy` is False while steps fail.
"""

import asyncio
import threading
import time
import traceback
from collections import OrderedDict
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue

from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.inference.sequence import Sequence

MAX_CLIENTS = 10_000  # whose rates are remembered
STREAM_INTERVAL, OTHER_INTERVAL = 0.03, 0.5  # s between two updates of a request


class RateLimiter:
    """A token bucket per client: `per_minute` requests, a third of them at once."""

    def __init__(self, per_minute: float):
        self.per_second, self.burst = per_minute / 60, max(1.0, per_minute / 3)
        self.clients: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (tokens, when)

    def wait(self, client: str, cost: float = 1) -> float:
        """Seconds until the client may send this request; 0: it may now, and is charged."""
        if not self.per_second:
            return 0.0
        now = time.monotonic()
        tokens, then = self.clients.pop(client, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.per_second)
        missing = max(0.0, min(cost, self.burst) - tokens)
        self.clients[client] = (tokens if missing else tokens - min(cost, self.burst), now)
        if len(self.clients) > MAX_CLIENTS:
            self.clients.popitem(last=False)
        return missing / self.per_second


class BusyError(Exception):
    """No room now; perhaps in `wait` seconds. `own`: this client has too many sequences itself."""

    def __init__(self, message: str, wait: float, own: bool):
        super().__init__(message)
        self.wait, self.own = wait, own


class PendingRequest:
    """A request that is being answered, by one sequence or several."""

    def __init__(self, stream: bool, client: str):
        self.stream, self.client = stream, client
        self.sequences: list[Sequence] = []
        self.last_update, self.changed = time.monotonic(), asyncio.Event()
        self.accepted = Future()  # the engine has queued its sequences

    @property
    def ended(self) -> bool:
        return all(sequence.finish_reason for sequence in self.sequences)

    async def updated(self) -> None:
        await self.changed.wait()
        self.changed.clear()


class EngineThread:
    """To be created in the asyncio loop of the requests."""

    def __init__(self, engine: Engine, max_sequences: int, max_per_client: int | None = None):
        self.engine, self.max_sequences = engine, max_sequences
        self.max_per_client = max_per_client or max_sequences
        self.loop = asyncio.get_running_loop()
        self.inbox: SimpleQueue = SimpleQueue()
        self.pending: dict[PendingRequest, int] = {}  # and its sequences; used by the loop only
        self.last_notice, self.tokens_per_second, self.step_failed = 0.0, 0.0, False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    # ------------------------------------------------------------ in the loop

    @property
    def load(self) -> int:
        """Sequences that are decoded or waiting."""
        return sum(self.pending.values())

    @property
    def healthy(self) -> bool:
        return self.thread.is_alive() and not self.step_failed

    def check_room(self, count: int, client: str = "") -> None:
        """A BusyError if there is no room for so many more sequences."""
        if not self.thread.is_alive():
            raise RuntimeError("the engine's thread has ended")
        if self.load + count > self.max_sequences:
            sequences = [s for request in self.pending for s in request.sequences]
            tokens = sum(s.params.max_new_tokens / 2 for s in sequences)
            wait = 1.0
            if self.tokens_per_second:  # until the next of them ends
                wait = min(60.0, tokens / self.tokens_per_second / max(1, self.load))
            raise BusyError("the server is busy: too many answers are waiting", wait, False)
        own = sum(n for request, n in self.pending.items() if request.client == client)
        if own + count > self.max_per_client:
            raise BusyError("too many answers for one client at the same time", 1.0, True)

    async def submit(
        self, prompts: list[list[int]], params: list[SamplingParams], stream=False, client=""
    ) -> PendingRequest:
        """Queue the prompts; a UserError if the engine does not take one."""
        self.check_room(len(prompts), client)
        request = PendingRequest(stream, client)
        self.pending[request] = len(prompts)
        try:
            self.inbox.put(partial(self.add, request, prompts, params))
            await asyncio.wrap_future(request.accepted)
        except BaseException:
            self.cancel(request)
            raise
        return request

    def cancel(self, request: PendingRequest) -> None:
        """Every request ends with this, also if its sequences have ended."""
        if self.pending.pop(request, None) is not None:
            self.stop(request.sequences)

    def stop(self, sequences: list[Sequence]) -> None:
        self.inbox.put(lambda: [self.engine.cancel(sequence) for sequence in sequences])

    async def close(self) -> None:
        """End the thread, when no request is left."""
        self.inbox.put(None)
        await asyncio.to_thread(self.thread.join)

    def notify(self, any_ended: bool) -> None:
        now = time.monotonic()
        for request in self.pending:
            late = now - request.last_update > OTHER_INTERVAL
            if request.stream or late or (any_ended and request.ended):
                request.last_update = now
                request.changed.set()

    # ------------------------------------------------------------ in the thread

    def run(self) -> None:
        while self.run_jobs():
            any_ended = self.step() if self.engine.busy else False
            now = time.monotonic()
            if any_ended or now - self.last_notice > STREAM_INTERVAL:
                self.last_notice = now
                self.loop.call_soon_threadsafe(self.notify, any_ended)

    def run_jobs(self) -> bool:
        """Empty the inbox, and wait for a job if there is nothing to decode; False at the end."""
        while True:
            try:
                job = self.inbox.get(block=not self.engine.busy)
            except Empty:
                return True
            if job is None:
                return False
            try:
                job()
            except Exception:
                traceback.print_exc()

    def add(self, request: PendingRequest, prompts, params) -> None:
        if not request.accepted.set_running_or_notify_cancel():  # its client has left
            return
        try:
            for prompt, one in zip(prompts, params, strict=True):
                request.sequences.append(self.engine.add(prompt, one))
            request.accepted.set_result(None)
        except Exception as error:
            request.accepted.set_exception(error)

    def step(self) -> bool:
        """One token for every active sequence; True if one of them ended."""
        start = time.monotonic()
        try:
            sequences = self.engine.step()
        except Exception:
            traceback.print_exc()
            self.step_failed = True
            return True
        self.step_failed = False
        speed = len(sequences) / (time.monotonic() - start)
        weight = 0.05 if self.tokens_per_second else 1.0
        self.tokens_per_second += weight * (speed - self.tokens_per_second)  # a running mean
        return any(sequence.finish_reason for sequence in sequences)
