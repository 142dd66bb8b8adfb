"""Serve one model: a page to try it on, filtered and watermarked, and OpenAI's API.

    alpaca serve                                             # the model of `make train`
    alpaca serve --model-dir alpaca-7b --bits 4              # at http://127.0.0.1:7860
    curl http://127.0.0.1:7860/v1/completions -H 'Content-Type: application/json' \\
        -d '{"instruction": "Name three primary colors.", "max_tokens": 40}'

Alpaca's demo was taken down after a week, because of its cost and its filter's limits. Here:

  - Requests are decoded together (scheduler.py). What begins like an earlier text is not computed
    again (prefix_tree.py); by its speed a client could guess that others sent the same beginning:
    --prefix-memory 0 prevents that. The queue is bounded, and each client has a rate
    and a share of the queue; beyond them the response is 503 or 429 with Retry-After, at once.
  - Prompt and answer pass a filter (moderation.py): OpenAI's moderation service, to which the texts
    are sent, if $OPENAI_API_KEY is set, else a small list of rules.
  - Every answer is watermarked (watermark.py) unless --no-watermark is given, and the page detects
    it. The default key is public: set your own in $ALPACA_WATERMARK_KEY.
  - Only this machine can connect unless --host is given; --allow-host and --trusted-proxy are for
    a proxy. SIGTERM and Ctrl-C let running answers finish; a second one does not wait.

The served model can be the teacher of Self-Instruct, if it knows more than 2,000 tokens:

    alpaca serve --model-dir alpaca-7b --rate 0 --max-new-tokens 700 &
    OPENAI_API_KEY= python selfinstruct.py generate --out runs/own --teacher alpaca-7b \\
        --base-url http://127.0.0.1:7860/v1
"""

import argparse
import asyncio
import ipaddress
import os
import signal
import socket
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path

from alpaca import CHECKOUT
from alpaca.common.cli import bounded, not_negative, positive, utf8_text
from alpaca.common.errors import UserError, notice
from alpaca.common.system import max_open_files
from alpaca.inference.engine import Engine
from alpaca.inference.watermark import KEY, Watermark
from alpaca.serving.app import App, create_private
from alpaca.serving.http import LOOPBACK, Limits, Server, parse_host
from alpaca.serving.moderation import Filter, add_filter_arguments, make_filter
from alpaca.serving.openai_schema import MAX_CHOICES
from alpaca.serving.scheduler import EngineThread
from alpaca.weights.loading import add_model_arguments, load_from_args

KEY_VARIABLE = "ALPACA_WATERMARK_KEY"
MAX_STALL = 0.025  # seconds that running answers may wait for a new prompt, in each step


def bind_socket(host: str, port: int) -> socket.socket:
    """Take the address before anything slow begins; early clients wait until the server starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol named, asyncio sets TCP_NODELAY: without it a response can wait 40 ms
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()  # only bound, another process could bind it too
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}, port {port}: {reason}") from None
    return bound


def make_engine(args: argparse.Namespace) -> tuple[Engine, Watermark]:
    """The engine, and the watermark that the page detects."""
    model, tokenizer = load_from_args(args)
    watermark = Watermark(model.config.vocab_size, key=args.watermark_key)
    max_length = args.max_length or min(2048, model.config.max_position_embeddings)
    applied = None if args.no_watermark else watermark
    options = {"prefix_memory": args.prefix_memory << 20, "max_stall": MAX_STALL}
    limits = args.max_batch_size, max_length, args.compile
    return Engine(model, tokenizer, *limits, watermark=applied, **options), watermark


def fill_green_lists(watermark: Watermark, stop: threading.Event) -> None:
    """Compute green lists in the background, as many as are cached: then one costs next to nothing.
    The ids of frequent tokens are small."""
    for token in range(watermark.cached_lists):
        if stop.is_set():
            return
        watermark.green_list(token)


@asynccontextmanager
async def running_server(args, bound: socket.socket, engine: Engine, filter: Filter, watermark):
    """The server and its app; at the end running answers may finish."""
    stop = threading.Event()
    filler = threading.Thread(target=fill_green_lists, args=(watermark, stop))
    async with filter:
        limit = engine.max_batch_size + args.queue
        share = max(limit // 4, MAX_CHOICES) if args.rate else limit
        worker = EngineThread(engine, limit, share)
        app = App(args, worker, filter, watermark)
        address, _, _ = bound.getsockname()[0].partition("%")
        local = ipaddress.ip_address(address).is_loopback
        hosts = {*LOOPBACK, address, *args.allow_host} if local or args.allow_host else None
        if not local:
            notice(f"other machines can send requests: it listens at {address}")
        limits = Limits(connections=min(512, max_open_files(1024) // 2))
        server = Server(app.handle, limits, hosts, args.trusted_proxy)
        server.start(bound)
        if engine.watermark:
            filler.start()
        try:
            yield server, app
        finally:
            stop.set()
            await server.drain(args.drain)
            await worker.close()


async def serve_until_signal(args, bound: socket.socket, *parts) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    async with running_server(args, bound, *parts) as (_, app):
        host, port = bound.getsockname()[:2]
        notice(f"{args.name} at http://{f'[{host}]' if ':' in host else host}:{port}")
        watermark = "on" if app.engine.watermark else "off"
        notice(f"filter: {app.filter.name}; watermark: {watermark}")
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # a second signal has its usual effect
        if load := app.worker.load:
            notice(f"{load} running answers have {args.drain:g} s to finish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count, above_0 = positive(int, 2**20), positive(float)
    at_least_0 = bounded(float, 0, sys.float_info.max, "number from 0 on")
    add_model_arguments(parser)
    add = parser.add_argument_group("answers").add_argument
    add("--name", type=utf8_text, help="of the model, in the API (default: its folder's)")
    add("--max-batch-size", type=count, default=16, help="answers decoded at once (default: 16)")
    add("--max-length", type=count, help="of prompt and answer (default: the model's, up to 2048)")
    add("--max-new-tokens", type=count, default=512, help="of an answer, at most (default: 512)")
    help = "MiB for keys and values of earlier prompts and answers (default: 1024; 0: none)"
    add("--prefix-memory", type=not_negative, default=1024, metavar="MIB", help=help)
    add("--no-watermark", action="store_true", help="answer without a watermark")
    key, help = os.environ.get(KEY_VARIABLE, KEY), f"(default: ${KEY_VARIABLE}, else {KEY})"
    add("--watermark-key", type=int, default=key, metavar="N", help=help)
    add_filter_arguments(parser)
    add = parser.add_argument_group("clients").add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=int, default=7860, help="0: any free port (default: 7860)")
    help = "another name of this server, such as its proxy's; repeatable"
    add("--allow-host", action="append", default=[], metavar="NAME", help=help)
    help = "address or network of your proxy, which names clients in X-Forwarded-For; repeatable"
    add("--trusted-proxy", action="append", default=[], metavar="ADDRESS", help=help)
    help = "a client's answers per minute, and a quarter of --queue; 0: no limit (default: 60)"
    add("--rate", type=at_least_0, default=60, help=help)
    add("--queue", type=count, default=48, help="answers that may wait (default: 48)")
    add("--timeout", type=above_0, default=120, help="seconds for an answer (default: 120)")
    add("--drain", type=above_0, default=30, help="seconds for answers at shutdown (default: 30)")
    add = parser.add_argument_group("page").add_argument
    add("--examples", type=Path, help="JSON or JSONL of instructions (default: its training run's)")
    add("--notice", help="about the model and its terms (default: a caution)")
    reports = "runs/demo/reports.jsonl"
    help = f"file for reports (default: {reports})"
    add("--reports", type=Path, default=CHECKOUT / reports, help=help)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what makes no sense, and fill in the defaults that depend on other arguments."""
    for name in args.allow_host:
        if not parse_host(name):
            raise UserError(f"--allow-host {name!r} is not a host name")
    args.allow_host = [parse_host(name) for name in args.allow_host]
    for number, proxy in enumerate(args.trusted_proxy):
        try:
            args.trusted_proxy[number] = ipaddress.ip_network(proxy)
        except ValueError:
            message = f"--trusted-proxy {proxy!r} is not an address or a network like 10.0.0.0/8"
            raise UserError(message) from None
    folder = args.model_dir.absolute()
    args.name = args.name or (folder.parent if folder.name == "model" else folder).name


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    filter = make_filter(args)
    with bind_socket(args.host, args.port) as bound:
        engine, watermark = make_engine(args)
        create_private(args.reports)
        asyncio.run(serve_until_signal(args, bound, engine, filter, watermark))
