"""The demo's server against `transformers serve`: tokens a second for 1, 4 and 16 clients at once.

    python bench/demo.py [--runs 5]

A random model of 15.2M parameters in fp32, a tokenizer of 32,000 pieces trained on made-up words.
Every client asks for a completion, about 40 tokens of prompt and 64 of answer, the likeliest each
time. The servers take turns: ours as it starts by itself, with
filter and watermark; ours without the watermark; `transformers serve`; and that with
--continuous-batching, which decodes requests together as ours does.
"""

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
import torch  # noqa: E402

from alpaca.datagen.train_tokenizer import train_tokenizer  # noqa: E402
from alpaca.weights.writer import save_model  # noqa: E402
from bench.measure import row, table  # noqa: E402
from bench.train import SHAPE  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

WORDS, NEW, CLIENTS = 24, 64, (1, 4, 16)
OURS, PLAIN, THEIRS, BATCHED = "ours", "ours, no watermark", "one by one", "continuous batching"


def made_up_words(count: int) -> list[str]:
    draw = random.Random(0)
    starts = [
        "b",
        "c",
        "d",
        "f",
        "g",
        "h",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "w",
        "z",
        "ch",
        "sh",
        "th",
    ]
    ends = ["a", "e", "i", "o", "u", "ai", "ou", "an", "en", "in", "on"]
    syllables = [start + end for start in starts for end in ends]
    return ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(count)]


def write_model(folder: Path, words: list[str]) -> Path:
    draw = random.Random(1)
    lines = "\n".join(" ".join(draw.choices(words, k=12)) for _ in range(30_000))
    (folder / "words.txt").write_text(lines)
    train_tokenizer([folder / "words.txt"], SHAPE["vocab_size"], folder / "words.model")
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    save_model(Llama(config), config, folder / "model", tokenizer=folder / "words.model")
    return folder / "model"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def started(model: Path, name: str, log: Path) -> tuple[subprocess.Popen, str]:
    """The server's process, and its URL once it answers."""
    port = str(free_port())
    if name in (OURS, PLAIN):
        command = [sys.executable, "-m", "alpaca", "serve", "--model-dir", model, "--port", port]
        command += ["--rate", "0", "--filter", "rules", "--name", str(model)]
        command += ["--no-watermark"] if name == PLAIN else []
    else:
        command = [Path(sys.executable).parent / "transformers", "serve", model, "--port", port]
        command += ["--device", "cpu", "--dtype", "float32"]
        command += ["--continuous-batching"] if name == BATCHED else []
    with open(log, "w") as said:
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said)
    for _ in range(240):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process, f"http://127.0.0.1:{port}/v1/completions"
        except httpx.TransportError:
            if process.poll() is not None:
                break
        time.sleep(0.5)
    raise SystemExit(f"{name} did not start: {log.read_text()[-2000:]}")


async def rate(url: str, model: Path, words: list[str], clients: int, stream: bool) -> float:
    """Tokens a second of all clients together."""
    draw = random.Random(clients)
    asked = {"model": str(model), "max_tokens": NEW, "temperature": 0.0, "stream": stream}

    async def client(http: httpx.AsyncClient) -> None:
        body = asked | {"prompt": " ".join(draw.choices(words, k=WORDS))}
        answer = await http.post(url, json=body)
        answer.raise_for_status()
        if not stream:
            assert json.loads(answer.content)["usage"]["completion_tokens"] == NEW

    async with httpx.AsyncClient(timeout=600) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return clients * NEW / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each (default: 5)")
    args = parser.parse_args()
    words = made_up_words(60_000)
    kinds = [(clients, False) for clients in CLIENTS] + [(CLIENTS[-1], True)]
    found: dict[tuple, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model, servers = write_model(Path(scratch), words), {}
        try:
            for name in (OURS, PLAIN, THEIRS, BATCHED):
                servers[name] = started(model, name, Path(scratch) / "log.txt")
                asyncio.run(rate(servers[name][1], model, words, CLIENTS[-1], False))  # warms up
            time.sleep(12)  # green lists are dealt
            for _ in range(args.runs):
                for clients, stream in kinds:
                    for name, (_, url) in servers.items():
                        value = asyncio.run(rate(url, model, words, clients, stream))
                        found.setdefault((name, clients, stream), []).append(value)
        finally:
            for process, _ in servers.values():
                process.terminate()
            for process, _ in servers.values():
                process.wait()
    rows = []
    for clients, stream in kinds:
        what = f"{clients} at once{', streamed' * stream}"
        for peer in (THEIRS, BATCHED, PLAIN):
            ours, other = (found[name, clients, stream] for name in (OURS, peer))
            rows.append(row(f"{what}, tok/s; {peer}", ours, other, True))
    title = "The demo's server, 15.2M parameters, fp32, CPU, filter and watermark on"
    print(table(title, "peer", rows, ["torch", "transformers"]))


if __name__ == "__main__":
    main()
