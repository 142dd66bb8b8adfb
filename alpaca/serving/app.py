"""The demo: a page to try a model on, filtered and watermarked, and an API the world speaks.

    alpaca serve                                             # the model of `make train`
    alpaca serve --model-dir alpaca-7b --bits 4              # at http://127.0.0.1:7860
    curl http://127.0.0.1:7860/v1/completions -H 'Content-Type: application/json' \\
        -d '{"instruction": "Name three primary colors.", "max_tokens": 40}'

Alpaca's demo was withdrawn after a week, for what it cost and because its filter was not enough.
What this one does about it:

  - Requests are decoded together (scheduler.py): one joins at the next token, and one whose client
    has left frees its row at the next token. A bounded queue, and for each client a rate and a
    share of it, in answers: beyond them it is 503 or 429 with Retry-After, at once.
  - Prompt and answer pass a filter (moderation.py), the answer piece by piece before it is shown.
    With $OPENAI_API_KEY set that is OpenAI's moderation service, to which texts are sent; else a
    small list of rules. If the filter cannot be asked, nothing is shown.
  - Every answer bears a watermark (watermark.py; --no-watermark turns it off), and the page finds
    it. The default key is everybody's: set your own in $ALPACA_WATERMARK_KEY.
  - It listens to this machine alone unless --host says otherwise, serves the page and the API and
    no other path, and shows what a model says as text, never as HTML.

The API is OpenAI's: the trained model can be its own teacher. (Not the one of `make train`, which
knows 512 tokens: Self-Instruct's prompt has some 1,300.)

    alpaca serve --model-dir alpaca-7b --rate 0 --max-new-tokens 700 &
    OPENAI_API_KEY= python selfinstruct.py generate --out runs/own --teacher alpaca-7b \\
        --base-url http://127.0.0.1:7860/v1

SIGTERM and Ctrl-C let answers under way end; a second one does not wait.

Shown by tests/test_demo.py: test_nothing_is_shown_that_the_filter_did_not_pass.
"""

import argparse
import asyncio
import base64
import hashlib
import ipaddress
import math
import os
import re
import signal
import threading
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

from alpaca import CHECKOUT
from alpaca.common.cli import Parser, positive
from alpaca.common.errors import notice, run_command
from alpaca.common.files import append_jsonl
from alpaca.datagen.formats import load_records
from alpaca.inference.engine import Engine, Sequence
from alpaca.inference.watermark import KEY, Watermark
from alpaca.serving import http
from alpaca.serving import openai_schema as api
from alpaca.serving.http import Problem, Request, Response, as_json, soon
from alpaca.serving.moderation import (
    DOWN,
    Filter,
    Unavailable,
    add_filter_flags,
    chosen_filter,
    explained,
)
from alpaca.serving.scheduler import Answers, Busy, Decoder
from alpaca.weights.checkpoint import parameter_shapes
from alpaca.weights.loading import DEFAULT_MODEL, add_model_arguments, load_from_args

PAGE = Path(__file__).with_name("page.html")
LONGEST = 20_000  # characters of a text to check
MOST_REPORTS = 64 << 20  # bytes
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
POLICY += "; connect-src 'self'; img-src data:"
KEY_VARIABLE = "ALPACA_WATERMARK_KEY"
KEY_HELP = f"what only you know (default: ${KEY_VARIABLE}, which no list of processes shows; {KEY})"
RATE_HELP = "answers a minute a client, and a quarter of the queue; 0: any (default: 60)"
HOST_HELP = "another name it is reached by, a proxy's say; repeatable"
TELL = (
    "A language model of {million:,} million parameters, fine-tuned to follow instructions. It "
    "makes mistakes, invents facts, and can be biased or offensive: check what it says."
)


class Demo:
    def __init__(self, args, decoder: Decoder, filter: Filter, watermark: Watermark):
        self.args, self.decoder, self.filter, self.watermark = args, decoder, filter, watermark
        self.engine, self.tokenizer = decoder.engine, decoder.engine.tokenizer
        self.model = name_of(args)
        self.allowance, self.checking = http.Allowance(args.rate), asyncio.Semaphore(1)
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "alpaca"}
        self.pages = {  # for GET, as is /health
            "/": page(PAGE),
            "/api/about": as_json(about(args, self.engine, filter)),
            "/v1/models": as_json({"object": "list", "data": [model]}),
            f"/v1/models/{quote(self.model)}": as_json(model),
        }
        self.actions = {  # for POST
            "/v1/completions": self.answer,
            "/v1/chat/completions": self.answer,
            "/api/detect": self.detect,
            "/api/flag": self.flag,
        }

    async def handle(self, request: Request) -> Response:
        page = self.health() if request.path == "/health" else self.pages.get(request.path)
        action = self.actions.get(request.path)
        if not page and not action:
            raise Problem(404, "there is nothing at this path", code="not_found")
        methods = ("GET", "HEAD") if page else ("POST",)
        if request.method not in methods:
            allowed = {"Allow": ", ".join(methods)}
            raise Problem(405, f"this path takes {methods[0]}", headers=allowed)
        if page:
            return page
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which no foreign page's form can send
            raise Problem(415, "send JSON, as Content-Type: application/json")
        self.charge(request, 1)
        return await action(request)

    def health(self) -> Response:
        status = "ok" if self.decoder.well else "failing"
        told = {
            "status": status,
            "answers": self.decoder.load,
            "at_once": self.engine.max_batch_size,
        }
        return as_json(told, 200 if status == "ok" else 503)

    def charge(self, request: Request, cost: int) -> None:
        if wait := self.allowance.wait(self.client(request), cost):
            said = f"too many requests: try again in {max(1, round(wait))} s"
            raise Problem(429, said, "rate_limit_error", headers=soon(wait))

    def client(self, request: Request) -> str:
        """Behind a proxy all requests come from one address, and a header tells whose they are."""
        said = request.headers.get((self.args.client_header or "").lower(), "")
        return said.rpartition(",")[2].strip()[:64] or request.address

    # ------------------------------------------------------------ answers

    async def answer(self, request: Request) -> Response:
        body = api.read_json(request.body)
        most = self.args.max_new_tokens
        asked = api.understood(body, request.path, self.model, self.tokenizer, most)
        longest, param = max(map(len, asked.prompts)), "messages" if asked.chat else "prompt"
        if longest >= self.engine.max_length:
            said = f"the prompt has {longest} tokens; with its answer it may have "
            said += str(self.engine.max_length)
            raise Problem(400, said, param=param, code="context_length_exceeded")
        if asked.ways[0].logprobs and self.filter.name != "off":
            said = "likelier tokens are told only where nothing is filtered (--filter off)"
            raise Problem(400, said, param="logprobs", code="unsupported_parameter")
        (prompts, ways), asker = asked.each, self.client(request)
        self.charge(request, len(ways) - 1)
        deadline = asyncio.get_running_loop().time() + self.args.timeout
        async with self.within(deadline):
            self.decoder.check(len(ways), asker)
            _, found = await self.filter.passed(asked.text, 0, whole=True)
            if found:
                raise Problem(400, explained(found), param=param, code="content_filter")
            answers = await self.decoder.submit(prompts, ways, asked.stream, asker)
        told = self.told(answers, deadline)
        if asked.stream:
            headers = {"X-Accel-Buffering": "no"}  # a proxy should pass pieces on as they come
            return Response(self.events(asked, answers, told), "text/event-stream", headers=headers)
        return await self.whole(asked, answers, told)

    @asynccontextmanager
    async def within(self, deadline: float, sequences: Iterable[Sequence] = ()):
        """What keeps an answer from its asker is told as a Problem."""
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except Busy as busy:
            status, kind = (429, "rate_limit_error") if busy.own else (503, "overloaded")
            raise Problem(status, str(busy), kind, headers=soon(busy.wait)) from None
        except Unavailable:
            raise Problem(503, DOWN, "filter_unavailable", headers=soon(30)) from None
        except TimeoutError:
            begun = any(sequence.ids for sequence in sequences)
            said = f"no {'whole ' * begun}answer in {self.args.timeout:g} s: try again later"
            raise Problem(504 if begun else 503, said, "timeout", headers=soon(10)) from None

    async def whole(self, asked: api.Asked, answers: Answers, told: AsyncGenerator) -> Response:
        texts, reasons = [""] * len(answers.sequences), [""] * len(answers.sequences)
        try:
            async for index, new, reason, _ in told:
                texts[index] += new
                reasons[index] = reason
        finally:
            self.decoder.cancel(answers)
        return as_json(api.whole(asked, answers.sequences, texts, reasons))

    async def events(
        self, asked: api.Asked, answers: Answers, told: AsyncGenerator
    ) -> AsyncGenerator[bytes, None]:
        try:
            if first := api.first_pieces(asked):
                yield first
            async for index, new, reason, found in told:
                if new:
                    yield api.piece(asked, index, new)
                if reason:
                    yield api.piece(asked, index, "", reason, explained(found) if found else "")
            yield api.last_piece(asked, answers.sequences) + b"data: [DONE]\n\n"
        except Problem as problem:
            yield api.event({"error": problem.error})
        finally:
            self.decoder.cancel(answers)

    async def told(
        self, answers: Answers, deadline: float
    ) -> AsyncGenerator[tuple[int, str, str, str], None]:
        """(which answer, more of its text, why it ended, what was wrong with it), as the filter
        lets it pass. What was decoded meanwhile is in the next piece."""
        passed, shown = self.filter.passed, [0] * len(answers.sequences)
        before = [self.filter.tail(self.tokenizer.decode(s.prompt)) for s in answers.sequences]
        open_ = dict(enumerate(answers.sequences))
        while open_:
            async with self.within(deadline, answers.sequences):
                await answers.news()
                # the reason first: it is set after the text
                now = [(i, s.finish_reason or "", s.text) for i, s in open_.items()]
                if any(reason in ("failed", "cancelled") for _, reason, _ in now):
                    raise Problem(500, "the model failed at this answer", "server_error")
                checks = (passed(text, shown[i], why != "", before[i]) for i, why, text in now)
                ends = await asyncio.gather(*checks)
            for (index, reason, text), (end, found) in zip(now, ends, strict=True):
                new, shown[index] = text[shown[index] : end], end
                if found:
                    reason = "content_filter"
                    self.decoder.stop([open_[index]])  # nobody will see more of it
                if reason:
                    del open_[index]
                if new or reason:
                    yield index, new, reason, found

    # ------------------------------------------------------------ watermark and reports

    async def detect(self, request: Request) -> Response:
        text = api.text_of(api.read_json(request.body), "text")
        if len(text) > LONGEST:
            raise Problem(413, f"at most {LONGEST} characters", param="text")
        async with self.checking:  # it deals green lists, a quarter of a ms each
            return as_json(await asyncio.to_thread(self.coloured, text))

    def coloured(self, text: str) -> dict:
        """The text in tokens, each green or not (the first is neither), and the verdict."""
        ids, stream = self.tokenizer.encode(text), self.tokenizer.stream()
        if len(ids) < 2:
            raise Problem(400, "it takes two tokens to show a watermark", param="text")
        found = self.watermark.detect(ids)
        pieces = [stream.push(token) for token in ids]  # those inside a character are ""
        pieces[-1] += stream.flush()
        green = [None, *self.watermark.green_mask(ids)]
        tokens = [list(pair) for pair in zip(pieces, green, strict=True)]
        by_chance = {"gamma": self.watermark.gamma}
        return {**found, **by_chance, "verdict": self.watermark.verdict(found), "tokens": tokens}

    async def flag(self, request: Request) -> Response:
        body = api.read_json(request.body)
        report = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "model": self.model}
        for name in ("instruction", "input", "output", "why"):
            report[name] = api.text_of(body, name, "")
        for name in ("temperature", "top_p", "max_tokens"):
            report[name] = api.number(body, name, None, 0, 1 << 30)
        if not report["output"] and not report["why"]:
            raise Problem(400, "there is nothing to report", param="output")
        async with self.checking:
            await asyncio.to_thread(self.store, report)
        return as_json({"stored": True}, 201)

    def store(self, report: dict) -> None:
        file = self.args.reports
        if file.exists() and file.stat().st_size > MOST_REPORTS:
            raise Problem(503, "no more reports can be stored", "server_error", headers=soon(3600))
        private(file)
        append_jsonl(file, report)


def private(file: Path) -> None:
    """A file for its owner alone, if there is none yet: it will hold what people wrote."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)


def page(file: Path) -> Response:
    """The page, and a policy that lets its own script and style run and nothing else."""
    html, policy = file.read_bytes(), POLICY
    for tag in (b"script", b"style"):
        (inside,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside).digest()).decode()
        policy += f"; {tag.decode()}-src 'sha256-{digest}'"
    return Response(html, "text/html; charset=utf-8", 200, {"Content-Security-Policy": policy})


def name_of(args: argparse.Namespace) -> str:
    """`tiny` for runs/tiny/model, where training leaves it."""
    folder = args.model_dir.absolute()
    return args.name or (folder.parent if folder.name == "model" else folder).name


def about(args: argparse.Namespace, engine: Engine, filter: Filter) -> dict:
    """What the page tells and offers."""
    size = sum(math.prod(shape) for shape in parameter_shapes(engine.model.config).values())
    checked = {"off": "Nothing is filtered.", "rules": "A small list of rules filters texts here."}
    sent = f"What you ask and what it answers is sent to {filter.name} to be checked."
    return {
        "model": name_of(args),
        "notice": args.notice or TELL.format(million=max(1, round(size / 1e6))),
        "filter": checked.get(filter.name, sent),
        "watermark": not args.no_watermark,
        "max_tokens": min(args.max_new_tokens, engine.max_length),
        "examples": examples(args),
    }


def examples(args: argparse.Namespace) -> list[dict]:
    """A few short ones. The tiny model knows little more than what it was shown."""
    tiny = args.model_dir is DEFAULT_MODEL
    own = CHECKOUT / "data" / ("sample_heldout.json" if tiny else "eval_instructions.jsonl")
    records = [r for r in load_records(args.examples or own) if r.get("instruction")]
    short = [
        r for r in records if len(r["instruction"]) <= 90 and len(r["input"]) <= 200
    ] or records
    chosen = short[:: max(1, len(short) // 6)][:6]
    return [{"instruction": r["instruction"], "input": r["input"]} for r in chosen]


# ---------------------------------------------------------------- command


def deal_all(watermark: Watermark, ended: threading.Event) -> None:
    """Every green list once: later they cost next to nothing."""
    for token in range(watermark.vocab_size):
        if ended.is_set():
            return
        watermark.green_list(token)


@asynccontextmanager
async def running(args, bound, engine: Engine, filter: Filter, marks: Watermark):
    """The server while it answers; at the end answers under way may end."""
    ended = threading.Event()
    dealing = threading.Thread(target=deal_all, args=(marks, ended), name="green lists")
    async with filter:
        most = engine.max_batch_size + args.queue
        decoder = Decoder(engine, most, max(most // 4, api.MOST_ANSWERS) if args.rate else most)
        demo = Demo(args, decoder, filter, marks)
        address, _, _ = bound.getsockname()[0].partition("%")
        local = ipaddress.ip_address(address).is_loopback
        hosts = {*http.LOOPBACK, address, *args.allow_host} if local or args.allow_host else None
        if not local:
            notice(f"others may ask: it listens at {address}")
        server = http.Server(demo.handle, http.Limits(), hosts)
        await server.start(bound)
        if engine.watermark:
            dealing.start()
        try:
            yield server, demo
        finally:
            ended.set()
            await server.drain(args.drain)
            await decoder.close()


async def serve(args, bound, *parts) -> None:
    """Until SIGTERM or Ctrl-C."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    async with running(args, bound, *parts) as (_, demo):
        host, port = bound.getsockname()[:2]
        notice(f"{demo.model} at http://{f'[{host}]' if ':' in host else host}:{port}")
        mark = "on" if demo.engine.watermark else "off"
        notice(f"filter: {demo.filter.name}; watermark: {mark}")
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # a second one does what it always does
        if load := demo.decoder.load:
            notice(f"{load} answers under way have {args.drain:g} s")


def parse_args() -> argparse.Namespace:
    count, above_0 = positive(int), positive(float)
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    add = parser.add_argument_group("answers").add_argument
    add("--name", help="of the model, in the API (default: its folder's)")
    add("--rows", type=count, default=16, help="answers made at once (default: 16)")
    known = "(default: what the model knows, at most 2048)"
    add("--max-length", type=count, help=f"tokens of prompt and answer {known}")
    add("--max-new-tokens", type=count, default=512, help="of an answer at most (default: 512)")
    add("--no-watermark", action="store_true", help="answer without a watermark")
    key = os.environ.get(KEY_VARIABLE, KEY)
    add("--watermark-key", type=int, default=key, metavar="N", help=KEY_HELP)
    add_filter_flags(parser)
    add = parser.add_argument_group("who may ask, and how much").add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=int, default=7860, help="0: any that is free (default: 7860)")
    add("--allow-host", action="append", default=[], metavar="NAME", help=HOST_HELP)
    add("--client-header", metavar="NAME", help="header in which your proxy tells who asks")
    add("--rate", type=float, default=60, help=RATE_HELP)
    add("--queue", type=count, default=48, help="answers that may wait for a row (default: 48)")
    add("--timeout", type=above_0, default=120, help="seconds for an answer (default: 120)")
    add("--drain", type=above_0, default=30, help="seconds to end answers in (default: 30)")
    add = parser.add_argument_group("page").add_argument
    add("--examples", type=Path, help="JSON or JSONL of instructions (default: the project's)")
    add("--notice", help="what the page tells of model and terms (default: its size, a caution)")
    reports = CHECKOUT / "runs/demo/reports.jsonl"
    add("--reports", type=Path, default=reports, help=f"where reports go (default: {reports})")
    args = parser.parse_args()
    if not 0 <= args.rate < math.inf:
        parser.error("--rate is 0 or above")
    named = [http.host_of(name) for name in args.allow_host]
    if "" in named:
        parser.error(f"--allow-host {args.allow_host[named.index('')]!r} is no name of a host")
    args.allow_host = named
    return args


def made(args: argparse.Namespace) -> tuple[Engine, Watermark]:
    """The engine, and the watermark to look for, which it bears unless told otherwise."""
    model, tokenizer = load_from_args(args)
    marks = Watermark(model.config.vocab_size, key=args.watermark_key)
    length = args.max_length or min(2048, model.config.max_position_embeddings)
    used = None if args.no_watermark else marks
    return Engine(model, tokenizer, args.rows, length, args.compile, used), marks


def main() -> None:
    args = parse_args()
    filter = chosen_filter(args)
    with http.listening(args.host, args.port) as bound:
        engine, marks = made(args)
        private(args.reports)
        asyncio.run(serve(args, bound, engine, filter, marks))


if __name__ == "__main__":
    run_command(main)
