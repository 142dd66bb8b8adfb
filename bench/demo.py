"""`alpaca serve` against `transformers serve`: tokens a second of 1, 4 and 16 clients at once.

    python -m bench.demo [--runs 5]

A random model of 15.2M parameters in fp32, with a tokenizer of 32,000 tokens trained on made-up
words. Each client asks for a greedy completion, with about 40 tokens of prompt and 64 of answer.
The servers take turns: ours with the filter of rules and the watermark; ours without the watermark;
`transformers serve`; and the same with --continuous-batching, which decodes requests together as
ours does.
"""

import asyncio
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from alpaca.datagen.train_tokenizer import train_tokenizer
from bench.measure import ROOT, bench_parser, report, run_in_turns
from bench.models import SMALL, write_random

WORDS, NEW, CLIENTS = 24, 64, (1, 4, 16)
OURS, PLAIN, PEER, BATCHED = "ours", "ours, no watermark", "one by one", "continuous batching"
ONSETS = [*"bcdfghklmnprstvwz", "ch", "sh", "th"]
RHYMES = ["a", "e", "i", "o", "u", "ai", "ou", "an", "en", "in", "on"]
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
    write_random(folder / "model", SMALL, "fp32", folder / "words.model")
    return folder / "model"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def start_server(model: Path, name: str, log: Path) -> tuple[subprocess.Popen, str]:
    """The server's process, and its URL once it answers."""
    port = free_port()
    if name in (OURS, PLAIN):
        command = [sys.executable, "-m", "alpaca", "serve", "--model-dir", model, "--port", port]
        command += ["--rate", 0, "--filter", "rules", "--name", model]
        command += ["--no-watermark"] if name == PLAIN else []
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


async def request_all(url: str, model: Path, words: list[str], clients: int, stream: bool) -> float:
    """Tokens a second of all clients together."""
    rng = random.Random(clients)
    options = {"model": str(model), "max_tokens": NEW, "temperature": 0.0, "stream": stream}

    async def request(http: httpx.AsyncClient) -> None:
        prompt = " ".join(rng.choices(words, k=WORDS))
        response = await http.post(url, json={**options, "prompt": prompt})
        response.raise_for_status()
        if not stream:
            assert response.json()["usage"]["completion_tokens"] == NEW

    async with httpx.AsyncClient(timeout=600) as http:
        start = time.perf_counter()
        await asyncio.gather(*(request(http) for _ in range(clients)))
        return clients * NEW / (time.perf_counter() - start)


def main() -> None:
    args = bench_parser(__doc__, runs=True).parse_args()
    words = made_up_words(60_000)
    loads = [(clients, False) for clients in CLIENTS] + [(CLIENTS[-1], True)]
    with tempfile.TemporaryDirectory() as scratch:
        model, servers = write_model(Path(scratch), words), {}

        def rate(name: str, clients: int, stream: bool) -> dict:
            work = request_all(servers[name][1], model, words, clients, stream)
            return {"rate": asyncio.run(work)}

        try:
            for name in (OURS, PLAIN, PEER, BATCHED):
                servers[name] = start_server(model, name, Path(scratch) / "log.txt")
                rate(name, CLIENTS[-1], False)  # warms up
            time.sleep(GREEN_LISTS_S)
            figures = {}
            for load in loads:
                sides = {name: lambda name=name, load=load: rate(name, *load) for name in servers}
                figures[load] = run_in_turns(sides, args.runs, warm_up=0)
        finally:
            for process, _ in servers.values():
                process.terminate()
            for process, _ in servers.values():
                process.wait()
    lines = []
    for (clients, stream), found in figures.items():
        for peer in (PEER, BATCHED, PLAIN):
            label = f"{clients} at once{', streamed' * stream}, tok/s; {peer}"
            lines.append((label, found[OURS]["rate"], found[peer]["rate"], True))
    title = "Web server, 15.2M parameters, fp32, CPU, filter and watermark on"
    report(title, "peer", lines, ["torch", "transformers"])


if __name__ == "__main__":
    main()
