"""One thread that decodes, for many askers that come and go.

    decoder = Decoder(engine, most=64)     # answers under way and waiting
    answers = await decoder.submit([ids], [Sampling()])
    while not answers.ended:
        await answers.news()               # its sequences' texts have grown
    decoder.cancel(answers)                # at any time; it frees their rows at the next token

The engine belongs to this thread. Whoever asks lives in an asyncio loop: what they want is put into
an inbox that the thread empties between two tokens, so a request joins, or leaves, at the next one.

  - News is told for all at once, one call into the loop, and to streams not at every token but
    every 30 ms, to others every half second: waking tasks costs time that decoding wants too.
  - `Sequence.finish_reason` is set after the text is whole: read the reason first, then the text.
  - Beyond `most` answers a request is refused at once: a queue that nobody will wait out only
    makes everybody late.
  - If a step fails, those in it have failed, and decoding goes on with the others. A request that
    fails to join, or to leave, harms no other either; `well` tells how the newest step went.

Shown by tests/test_serving.py: test_answers_are_those_of_one_at_a_time_whatever_joins_or_leaves.
"""

import asyncio
import sys
import threading
import time
import traceback
from queue import Empty, SimpleQueue

from alpaca.inference.engine import Engine, Sequence
from alpaca.inference.sampling import SamplingParams

EVERY, SELDOM = 0.03, 0.5  # s between two news of a stream; of another answer that goes on


class Busy(Exception):
    """No more answers now; perhaps in `wait` seconds."""

    def __init__(self, said: str, wait: float, own: bool):
        super().__init__(said)
        self.wait, self.own = wait, own  # the asker's own answers are too many


class Answers:
    """The answers to one request."""

    def __init__(self, stream: bool, asker: str):
        self.stream, self.asker, self.sequences = stream, asker, []
        self.told = time.monotonic()
        self.changed, self.accepted = asyncio.Event(), asyncio.get_running_loop().create_future()

    @property
    def ended(self) -> bool:
        return all(sequence.finish_reason for sequence in self.sequences)

    async def news(self) -> None:
        await self.changed.wait()
        self.changed.clear()


class Decoder:
    """To be made inside the loop that asks. `most` answers, `share` of them one asker's."""

    def __init__(self, engine: Engine, most: int, share: int | None = None):
        self.engine, self.most, self.share = engine, most, share or most
        self.loop = asyncio.get_running_loop()
        self.inbox: SimpleQueue = SimpleQueue()
        self.under_way: dict[Answers, int] = {}  # and how many; the loop's
        self.told, self.pace = 0.0, 0.0  # of the newest news; tokens a second, all together
        self.failed = False  # the newest step
        self.thread = threading.Thread(target=self.run, name="decoder", daemon=True)
        self.thread.start()

    # ------------------------------------------------------------ in the loop

    @property
    def load(self) -> int:
        return sum(self.under_way.values())

    @property
    def well(self) -> bool:
        return self.thread.is_alive() and not self.failed

    def check(self, count: int, asker: str = "") -> None:
        """Busy if there is no room for so many more."""
        if not self.thread.is_alive():
            raise RuntimeError("the thread that decodes has ended")
        if self.load + count > self.most:
            tokens = sum(s.params.max_new_tokens / 2 for a in self.under_way for s in a.sequences)
            wait = min(60.0, tokens / self.pace / max(1, self.load)) if self.pace else 1.0
            raise Busy("the server is busy: too many answers are waiting to be made", wait, False)
        if sum(n for a, n in self.under_way.items() if a.asker == asker) + count > self.share:
            said = "as many of your answers are being made as one client may have"
            raise Busy(said, 1.0, True)

    async def submit(
        self,
        prompts: list[list[int]],
        ways: list[SamplingParams],
        stream: bool = False,
        asker: str = "",
    ) -> Answers:
        """Have these answered; a ValueError if the engine does not take a prompt."""
        self.check(len(prompts), asker)
        answers = Answers(stream, asker)
        self.under_way[answers] = len(prompts)
        try:
            self.inbox.put((answers, prompts, ways))
            await answers.accepted
        except BaseException:
            self.cancel(answers)
            raise
        return answers

    def cancel(self, answers: Answers) -> None:
        """Also of what has ended: the end of every request."""
        if self.under_way.pop(answers, None) is not None:
            self.stop(answers.sequences)

    def stop(self, sequences: list[Sequence]) -> None:
        self.inbox.put(sequences)

    async def close(self) -> None:
        """When nobody asks any more."""
        self.inbox.put(None)
        await asyncio.to_thread(self.thread.join)

    def tell(self, accepted: list[tuple[Answers, Exception | None]], ended: bool) -> None:
        for answers, mistake in accepted:
            if not answers.accepted.done():  # or its asker has left
                if mistake:
                    answers.accepted.set_exception(mistake)
                else:
                    answers.accepted.set_result(None)
        now = time.monotonic()
        for answers in self.under_way:
            if answers.stream or now - answers.told > SELDOM or (ended and answers.ended):
                answers.told = now
                answers.changed.set()

    # ------------------------------------------------------------ in the thread

    def run(self) -> None:
        while True:
            accepted = self.empty_inbox()
            if accepted is None:
                return
            ended = self.step() if self.engine.busy else False
            now = time.monotonic()
            if accepted or ended or now - self.told > EVERY:
                self.told = now
                self.loop.call_soon_threadsafe(self.tell, accepted, ended)

    def step(self) -> bool:
        """One token for everybody; has anybody's answer ended?"""
        start = time.monotonic()
        try:
            stepped: list[Sequence] = self.engine.step()
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self.failed = True
            return True
        self.failed = False
        pace = len(stepped) / (time.monotonic() - start)
        self.pace += 0.05 * (pace - self.pace) if self.pace else pace
        return any(sequence.finish_reason for sequence in stepped)

    def empty_inbox(self) -> list[tuple[Answers, Exception | None]] | None:
        """Take what is there, and wait for something if there is nothing to decode."""
        accepted = []
        while True:
            try:
                found = self.inbox.get(block=not self.engine.busy and not accepted)
            except Empty:
                return accepted
            if found is None:
                return None
            mistake = None
            try:
                if isinstance(found, list):
                    for sequence in found:
                        self.engine.cancel(sequence)
                    continue
                for prompt, way in zip(*found[1:], strict=True):
                    found[0].sequences.append(self.engine.add(prompt, way))
            except Exception as problem:
                mistake = problem
                if not isinstance(problem, ValueError):
                    traceback.print_exc(file=sys.stderr)
            if isinstance(found, tuple):
                accepted.append((found[0], mistake))
