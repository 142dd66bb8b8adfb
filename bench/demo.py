"""`alpaca serve` against `transformers serve`: tokens a second, and how long readers wait.

    python -m bench.demo [--runs 5]

A random model of 15.2M parameters in fp32, with a tokenizer of 32,000 tokens trained on made-up
words. Each client asks for a greedy completion, with about 40 tokens of prompt and 64 of answer; no
prompt comes twice. The servers take turns: ours with the filter of rules and the watermark; ours
without both; `transformers serve`; and the same with --continuous-batching, which decodes requests
together as ours does.

The second table has what a reader sees of ours and the last: the time to the first part of an
answer and between parts, of 16 streams at once; how long 4 running streams stand still when a
prompt of about 1,500 tokens joins them; and a chat of ten turns, each with all turns before it.
With its filter ours shows whole words, and those of a random model have five tokens; without it, it
shows the tokens of the last 30 ms. The peer shows each token.
"""

import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx

from alpaca.datagen.train_tokenizer import train_tokenizer
from bench.measure import ROOT, Figures, bench_parser, report, run_in_turns
from bench.models import SMALL, write_random

WORDS, NEW, CLIENTS = 24, 64, (1, 4, 16)  # of a prompt; tokens of an answer; at once
RUNNING, LONG_NEW, LONG_WORDS = 4, 256, 900  # streams that a long prompt joins
CHAT_TURNS, CHAT_WORDS, CHAT_NEW = 10, 60, 32
OURS, PLAIN = "ours", "ours, unfiltered"
PEER, BATCHED = "one by one", "continuous batching"
ONSETS = [*"bcdfghklmnprstvwz", "ch", "sh", "th"]
RHYMES = ["a", "e", "i", "o", "u", "ai", "ou", "an", "en", "in", "on"]
SERVE = """
from alpaca.__main__ import main
from alpaca.inference.engine import Engine
Engine.guess = lambda engine: []  # a random model repeats itself: guesses would be right too often
main()
"""
GREEN_LISTS_S = 12  # seconds in which our server fills its cache of the watermark's lists


def made_up_words(count: int) -> list[str]:
    rng = random.Random(0)
    syllables = [onset + rhyme for onset in ONSETS for rhyme in RHYMES]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count)]


def write_model(folder: Path, words: list[str]) -> Path:
    rng = random.Random(1)
    lines = "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(30_000))
    (folder / "words.txt").write_text(lines)
    train_tokenizer([folder / "words.txt"], SMALL["vocab_size"], folder / "words.model")
    shape = {**SMALL, "max_position_embeddings": 2048}
    write_random(folder / "model", shape, "fp32", folder / "words.model")
    return folder / "model"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def start_server(model: Path, name: str, log: Path) -> tuple[subprocess.Popen, str]:
    """The server's process, and its URL once it answers."""
    port = free_port()
    if name in (OURS, PLAIN):
        command = [sys.executable, "-c", SERVE, "serve", "--model-dir", model, "--port", port]
        command += ["--rate", 0, "--name", model]
        command += ["--filter", "off", "--no-watermark"] if name == PLAIN else ["--filter", "rules"]
    else:
        command = [Path(sys.executable).parent / "transformers", "serve", model, "--port", port]
        command += ["--device", "cpu", "--dtype", "float32"]
        command += ["--continuous-batching"] if name == BATCHED else []
    with open(log, "w") as output:
        pipes = {"stdout": output, "stderr": output}
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, **pipes)
    for _ in range(240):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process, f"http://127.0.0.1:{port}/v1/completions"
        except httpx.TransportError:
            if process.poll() is not None:
                break
        time.sleep(0.5)
    process.kill()
    raise SystemExit(f"{name} did not start: {log.read_text()[-2000:]}")


class Clients:
    """Loads of a server: each takes a client and the server's URL, and returns figures."""

    def __init__(self, model: Path, words: list[str]):
        self.model, self.words, self.rng = str(model), words, random.Random(2)

    def run(self, load: Callable, url: str, *args) -> dict[str, float]:
        async def connected() -> dict[str, float]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(timeout=600, limits=limits) as http:
                return await load(http, url, *args)

        return asyncio.run(connected())

    def body(self, words: int, new: int, before: str = "") -> dict:
        prompt = before + " ".join(self.rng.choices(self.words, k=words))
        return {"model": self.model, "prompt": prompt, "max_tokens": new, "temperature": 0.0}

    async def rate(self, http, url: str, clients: int) -> dict[str, float]:
        """Tokens a second of all clients together."""

        async def ask() -> None:
            response = await http.post(url, json=self.body(WORDS, NEW))
            assert response.raise_for_status().json()["usage"]["completion_tokens"] == NEW

        start = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(clients)))
        return {"tok/s": clients * NEW / (time.perf_counter() - start)}

    async def streams(self, http, url: str, clients: int) -> dict[str, float]:
        start, times = time.perf_counter(), [[] for _ in range(clients)]
        await asyncio.gather(*(stream(http, url, self.body(WORDS, NEW), one) for one in times))
        seconds = time.perf_counter() - start
        first = [one[0] - start for one in times]
        gaps = sorted(b - a for one in times for a, b in pairwise(one))
        return {
            "tok/s": clients * NEW / seconds,
            "parts": statistics.mean(map(len, times)),
            "to the first part, median": 1e3 * statistics.median(first),
            "to the first part, slowest": 1e3 * max(first),
            "between parts, median": 1e3 * statistics.median(gaps),
            "between parts, 95th percentile": 1e3 * gaps[int(0.95 * len(gaps))],
            "between parts, longest": 1e3 * gaps[-1],
        }

    async def newcomer(self, http, url: str) -> dict[str, float]:
        running, own = [[] for _ in range(RUNNING)], []
        asked = [stream(http, url, self.body(WORDS, LONG_NEW), one) for one in running]
        tasks = [asyncio.create_task(one) for one in asked]
        while not all(running):  # until each has begun
            ended, _ = await asyncio.wait(tasks, timeout=0.01)
            assert not ended, "a stream ended before the others began"
        start = time.perf_counter()
        await stream(http, url, self.body(LONG_WORDS, NEW), own)
        await asyncio.gather(*tasks)
        gaps = [b - a for one in running for a, b in pairwise(one) if b > start]
        return {
            "longest stop of a running stream": 1e3 * max(gaps),
            "to the first part of its answer": 1e3 * (own[0] - start),
        }

    async def chat(self, http, url: str) -> dict[str, float]:
        found, conversation = {}, ""
        for turn in range(1, CHAT_TURNS + 1):
            body, times = self.body(CHAT_WORDS, CHAT_NEW, conversation), []
            start = time.perf_counter()
            conversation = body["prompt"] + await stream(http, url, body, times) + "\n"
            found[f"turn {turn}"] = 1e3 * (times[0] - start)
        return found


async def stream(http: httpx.AsyncClient, url: str, body: dict, times: list[float]) -> str:
    """The text of an answer; appends to `times` when each part came."""
    text = ""
    async with http.stream("POST", url, json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and (part := json.loads(line[6:])["choices"][0]["text"]):
                times.append(time.perf_counter())
                text += part
    return text


def main() -> None:
    args = bench_parser(__doc__, runs=True).parse_args()
    words = made_up_words(60_000)
    with tempfile.TemporaryDirectory() as scratch:
        model, servers = write_model(Path(scratch), words), {}
        clients = Clients(model, words)

        def measure(names: tuple[str, ...], load: Callable, *given: int) -> Figures:
            sides = {n: lambda n=n: clients.run(load, servers[n][1], *given) for n in names}
            return run_in_turns(sides, args.runs, warm_up=0)

        try:
            for name in (OURS, PLAIN, PEER, BATCHED):
                servers[name] = start_server(model, name, Path(scratch) / "log.txt")
                clients.run(clients.rate, servers[name][1], CLIENTS[-1])  # warms up
            time.sleep(GREEN_LISTS_S)
            names, waiting = tuple(servers), (OURS, PLAIN, BATCHED)
            rates = {f"{n} at once": measure(names, clients.rate, n) for n in CLIENTS}
            streams = measure(names, clients.streams, CLIENTS[-1])
            waits = {
                f"{CLIENTS[-1]} streams": streams,
                "a long prompt joins": measure(waiting, clients.newcomer),
                "chat, to the first part": measure(waiting, clients.chat),
            }
        finally:
            for process, _ in servers.values():
                process.terminate()
            for process, _ in servers.values():
                process.wait()
    rates[f"{CLIENTS[-1]} at once, streamed"] = streams
    lines = [
        (f"{load}, tok/s; {peer}", found[OURS]["tok/s"], found[peer]["tok/s"], True)
        for load, found in rates.items()
        for peer in (PEER, BATCHED, PLAIN)
    ]
    title = "Web server, 15.2M parameters, fp32, CPU, filter and watermark on"
    report(title, "peer", lines, ["torch", "transformers"])
    lines = [
        (f"{load}: {figure}{note}", ours, found[BATCHED][figure])
        for load, found in waits.items()
        for figure in found[OURS]
        if figure not in ("tok/s", "parts")
        for ours, note in ((found[OURS][figure], ""), (found[PLAIN][figure], "; unfiltered"))
    ]
    parts = ", ".join(f"{statistics.mean(streams[name]['parts']):.0f}" for name in waiting)
    note = f"Parts of an answer of {NEW} tokens: {parts} ({', '.join(waiting)})."
    report(
        "Web server, 15.2M parameters, waiting times in ms",
        BATCHED,
        lines,
        ["torch", "transformers"],
        note,
    )


if __name__ == "__main__":
    main()
