"""The endpoints: OpenAI's API for one model, the page, watermark detection, reports.

    GET  /                       the page (page.html)
    GET  /health                 {"status": "ok", …}; 503 while decoding fails
    GET  /v1/models              and /v1/models/NAME
    POST /v1/completions         and /v1/chat/completions, streamed or not
    POST /api/detect             {"text": …} → z, p-value and the color of every token
    POST /api/flag               a report about an answer, appended to a file of bounded size

An answer passes these steps, each of which can refuse it: the client's rate, the schema, room in
the queue, the filter on the prompt, and the filter on every part of the answer before it is shown.
"""

import argparse
import asyncio
import base64
import hashlib
import os
import re
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

from alpaca.common.errors import UserError
from alpaca.common.json_files import append_jsonl, check_shape, json_records
from alpaca.common.run_folder import RIGHT_ANSWERS
from alpaca.common.system import lock_file
from alpaca.inference.engine import Engine
from alpaca.inference.sequence import Sequence
from alpaca.inference.watermark import Watermark
from alpaca.serving import openai_schema as api
from alpaca.serving.http import HTTPError, Request, Response, json_response
from alpaca.serving.moderation import UNAVAILABLE, Filter, FilterUnavailable, explain_refusal
from alpaca.serving.scheduler import BusyError, EngineThread, PendingRequest, RateLimiter
from alpaca.weights.checkpoint import parameter_shapes
from alpaca.weights.quantize import LINEAR
from dataset import template_of

PAGE_FILE = Path(__file__).with_name("page.html")
MAX_DETECT_LENGTH = 20_000  # characters
MAX_REPORTS_SIZE = 64 << 20  # bytes of a file; as many are kept in the one before it
PAGE_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE_POLICY += "; connect-src 'self'; img-src data:"
NOTICE = (
    "A language model, fine-tuned to follow instructions. It makes mistakes, invents facts, and "
    "can be biased or offensive: check what it says."
)


class App:
    def __init__(self, args, worker: EngineThread, filter: Filter, watermark: Watermark):
        self.args, self.worker, self.filter, self.watermark = args, worker, filter, watermark
        self.engine, self.tokenizer = worker.engine, worker.engine.tokenizer
        self.rates, self.one_at_a_time = RateLimiter(args.rate), asyncio.Semaphore(1)
        model = {"id": args.name, "object": "model", "created": 0, "owned_by": "alpaca"}
        self.pages = {  # for GET, as is /health
            "/": load_page(PAGE_FILE),
            "/api/about": json_response(describe(args, self.engine, filter)),
            "/v1/models": json_response({"object": "list", "data": [model]}),
            f"/v1/models/{quote(args.name)}": json_response(model),
        }
        self.actions = {  # for POST
            "/v1/completions": self.complete,
            "/v1/chat/completions": self.complete,
            "/api/detect": self.detect,
            "/api/flag": self.store_report,
        }

    async def handle(self, request: Request) -> Response:
        page = self.health() if request.path == "/health" else self.pages.get(request.path)
        action = self.actions.get(request.path)
        methods = ("GET", "HEAD") if page else ("POST",)
        if page and request.method in methods:
            return page
        if not page and not action:
            raise HTTPError(404, "there is nothing at this path", code="not_found")
        if not action or request.method not in methods:
            allowed = {"Allow": ", ".join(methods)}
            raise HTTPError(405, f"this path takes {methods[0]}", headers=allowed)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # no form of a foreign page can send this type
            raise HTTPError(415, "send JSON, as Content-Type: application/json")
        self.charge(request, 1)
        return await action(request)

    def health(self) -> Response:
        healthy, load = self.worker.healthy, self.worker.load
        content = {"status": "ok" if healthy else "failing", "answers": load}
        content["at_once"] = self.engine.max_batch_size
        return json_response(content, 200 if healthy else 503)

    def charge(self, request: Request, cost: int) -> None:
        if wait := self.rates.wait(request.address, cost):
            message = f"too many requests: try again in {max(1, round(wait))} s"
            raise HTTPError(429, message, "rate_limit_error", retry_after=wait)

    # ------------------------------------------------------------ answers

    async def complete(self, http_request: Request) -> Response:
        body, limit = api.parse_body(http_request.body), self.args.max_new_tokens
        request = api.parse_request(body, http_request.path, self.args.name, self.tokenizer, limit)
        longest, param = max(map(len, request.prompts)), "messages" if request.chat else "prompt"
        if longest >= self.engine.max_length:
            message = f"the prompt has {longest} tokens, and prompt and answer together may have "
            message += str(self.engine.max_length)
            raise HTTPError(400, message, param=param, code="context_length_exceeded")
        if request.params[0].logprobs and self.filter.name != "off":
            message = "top logprobs show unfiltered tokens: they need --filter off"
            raise HTTPError(400, message, param="logprobs", code="unsupported_parameter")
        (prompts, params), client = request.sequences, http_request.address
        self.charge(http_request, len(params) - 1)
        deadline = asyncio.get_running_loop().time() + self.args.timeout
        async with self.http_errors(deadline):
            self.worker.check_room(len(params), client)
            _, reason = await self.filter.check_next(request.text, 0, complete=True)
            if reason:
                raise HTTPError(400, explain_refusal(reason), param=param, code="content_filter")
            pending = await self.worker.submit(prompts, params, request.stream, client)
        parts = self.checked_parts(pending, deadline)
        if request.stream:
            headers = {"X-Accel-Buffering": "no"}  # a proxy should pass events on at once
            events = self.events(request, pending, parts)
            return Response(events, "text/event-stream", headers=headers)
        return await self.full_response(request, pending, parts)

    @asynccontextmanager
    async def http_errors(self, deadline: float, sequences: Iterable[Sequence] = ()):
        """Ends at the deadline; turns what prevents an answer into an HTTPError."""
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except BusyError as error:
            status, kind = (429, "rate_limit_error") if error.own else (503, "overloaded")
            raise HTTPError(status, str(error), kind, retry_after=error.wait) from None
        except FilterUnavailable:
            raise HTTPError(503, UNAVAILABLE, "filter_unavailable", retry_after=30) from None
        except TimeoutError:
            begun = any(sequence.ids for sequence in sequences)
            message = f"no {'complete ' * begun}answer in {self.args.timeout:g} s: try again later"
            raise HTTPError(504 if begun else 503, message, "timeout", retry_after=10) from None

    async def full_response(self, request, pending: PendingRequest, parts) -> Response:
        texts, reasons = [""] * len(pending.sequences), [""] * len(pending.sequences)
        try:
            async for index, new, reason, _ in parts:
                texts[index] += new
                reasons[index] = reason
        finally:
            self.worker.cancel(pending)
        return json_response(api.full_response(request, pending.sequences, texts, reasons))

    async def events(self, request, pending: PendingRequest, parts) -> AsyncGenerator[bytes, None]:
        try:
            if first := api.first_chunks(request):
                yield first
            async for index, new, reason, filtered in parts:
                if new:
                    yield api.chunk(request, index, new)
                if reason:
                    note = explain_refusal(filtered) if filtered else ""
                    yield api.chunk(request, index, "", reason, note)
            if request.include_usage:
                tokens = api.usage(request, pending.sequences)
                yield api.chunk_event(request, [], usage=tokens)
            yield b"data: [DONE]\n\n"
        except HTTPError as error:
            yield api.event({"error": error.error})
        finally:
            self.worker.cancel(pending)

    async def checked_parts(
        self, pending: PendingRequest, deadline: float
    ) -> AsyncGenerator[tuple[int, str, str, str], None]:
        """(index, new text, finish reason or "", filter's reason or "") of the answers, as the
        filter lets them pass. What is decoded during a check is in the next part."""
        sequences, shown = pending.sequences, [0] * len(pending.sequences)
        before = [self.filter.tail(self.tokenizer.decode(s.prompt)) for s in sequences]
        open_ = dict(enumerate(sequences))
        while open_:
            async with self.http_errors(deadline, sequences):
                await pending.updated()
                # the reason first: it is set after the text
                now = [(i, s.finish_reason or "", s.text) for i, s in open_.items()]
                if any(reason in ("failed", "cancelled") for _, reason, _ in now):
                    raise HTTPError(500, "the model failed at this answer", "server_error")
                check = self.filter.check_next
                checks = (check(text, shown[i], why != "", before[i]) for i, why, text in now)
                results = await asyncio.gather(*checks)
            for (index, reason, text), (end, filtered) in zip(now, results, strict=True):
                new, shown[index] = text[shown[index] : end], end
                if filtered:
                    reason = "content_filter"
                    self.worker.stop([open_[index]])  # the rest would not be shown
                if reason:
                    del open_[index]
                if new or reason:
                    yield index, new, reason, filtered

    # ------------------------------------------------------------ watermark and reports

    async def detect(self, request: Request) -> Response:
        text = api.get_text(api.parse_body(request.body), "text")
        if len(text) > MAX_DETECT_LENGTH:
            raise HTTPError(413, f"at most {MAX_DETECT_LENGTH} characters", param="text")
        async with self.one_at_a_time:  # a green list takes a quarter of a ms
            return json_response(await asyncio.to_thread(self.detection, text))

    def detection(self, text: str) -> dict:
        """The verdict, and the text as [token, is it green?]; for the first token that is null."""
        ids, stream = self.tokenizer.encode(text), self.tokenizer.stream()
        if len(ids) < 2:
            raise HTTPError(400, "a watermark needs at least two tokens", param="text")
        found = self.watermark.detect(ids)
        pieces = [stream.push(token) for token in ids]  # "" inside a character
        green = [None, *self.watermark.green_mask(ids)]
        tokens = [list(pair) for pair in zip(pieces, green, strict=True)]
        verdict, gamma = self.watermark.verdict(found), self.watermark.gamma
        return {**found, "gamma": gamma, "verdict": verdict, "tokens": tokens}

    async def store_report(self, request: Request) -> Response:
        body = api.parse_body(request.body)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        report = {"time": now, "model": self.args.name}
        for name in ("earlier", "instruction", "input", "output", "why"):
            report[name] = api.get_text(body, name, "")
        for name in ("temperature", "top_p", "max_tokens"):
            report[name] = api.get_number(body, name, None, 0, 1 << 30)
        if not report["output"] and not report["why"]:
            raise HTTPError(400, "the report is empty", param="output")
        async with self.one_at_a_time:
            await asyncio.to_thread(self.append_report, report)
        return json_response({"stored": True}, 201)

    def append_report(self, report: dict) -> None:
        """A full reports.jsonl becomes reports.1.jsonl, in place of the one before."""
        file = self.args.reports
        create_private(file)
        with open(file, "rb") as opened:
            lock_file(opened)  # or another server could move the new file, too
            if file.stat().st_size >= MAX_REPORTS_SIZE:
                os.replace(file, file.with_name(f"{file.stem}.1{file.suffix}"))
                create_private(file)
        append_jsonl(file, report)


def create_private(file: Path) -> None:
    """Create the file, if it is missing, for its owner only: it will hold what people wrote."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    if not file.is_file():
        raise UserError(f"{file} is not a file to store reports in: use another --reports")


def load_page(file: Path) -> Response:
    """The page, with a policy that allows its own script and style and nothing else."""
    html, policy = file.read_bytes(), PAGE_POLICY
    for tag in (b"script", b"style"):
        (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        policy += f"; {tag.decode()}-src 'sha256-{digest}'"
    return Response(html, "text/html; charset=utf-8", 200, {"Content-Security-Policy": policy})


def describe(args: argparse.Namespace, engine: Engine, filter: Filter) -> dict:
    """What the page shows about this server."""
    model = engine.model
    size = sum(shape.numel() for shape in parameter_shapes(model.config).values())
    kinds, stored = set(map(type, model.modules())), 8 * model.model.norm.weight.itemsize
    bits = next((bits for bits, kind in sorted(LINEAR.items()) if kind in kinds), stored)
    filters = {"off": "Nothing is filtered.", "rules": "A small list of rules filters texts here."}
    service = f"Questions and answers are sent to {filter.name} to be checked."
    return {
        "model": args.name,
        "weights": f"{max(1, round(size / 1e6)):,} million parameters of {bits} bits",
        "notice": args.notice or NOTICE,
        "filter": filters.get(filter.name, service),
        "watermark": not args.no_watermark,
        "max_tokens": min(args.max_new_tokens, engine.max_length),
        # Alpaca's template is for one instruction; the others separate the turns of a chat
        "turns": template_of(engine.tokenizer).name != "alpaca",
        "examples": page_examples(args),
    }


def read_questions(path: Path) -> list[dict[str, str]]:
    """Instruction and input of each record of a JSON or JSONL file; other fields are ignored."""
    questions = []
    for place, record in json_records(path):
        check_shape(record, {"instruction": str, "input": str | None}, place)
        questions.append({"instruction": record["instruction"], "input": record.get("input") or ""})
    if not questions:
        raise UserError(f"{path}: no instructions in it")
    return questions


def page_examples(args: argparse.Namespace) -> list[dict]:
    """Three instructions, by default those that the trainer saw this model answer."""
    file = args.examples or (args.adapter or args.model_dir).parent / RIGHT_ANSWERS
    return read_questions(file)[:3] if args.examples or file.is_file() else []
