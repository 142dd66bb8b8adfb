"""Decoding on a CPU: tokens a second against transformers and llama.cpp, and the memory's limit.

    python -m bench.decode [--runs 5]

First a random model of 1.1B parameters and one sequence: a prompt of 64 tokens, then 64 new ones,
greedily. Each side is a process that keeps its model loaded; the sides run in turn. llama.cpp
decodes the same model in its own files (BF16, Q8_0, Q4_0), if `pip install llama-cpp-python` has
been run, which needs a compiler. Decoding a token reads every weight once, except the embedding.
So the limit is the rate at which this machine reads memory, divided by those bytes; the rate is
measured by summing 1 GiB, in turn with the sides.

Then a model of 15.2M parameters and 16 sequences at once, against transformers in fp32 and bf16.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.weights.checkpoint import open_checkpoint
from alpaca.weights.gguf_writer import save_gguf
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.quantize import WeightSource, save_quantized
from alpaca.weights.writer import tensor_bytes
from bench.measure import (
    ROOT,
    Figures,
    PeakMemory,
    bench_parser,
    memory,
    memory_rate,
    module_command,
    report,
    run_in_turns,
)
from bench.models import SMALL, TINYLLAMA, write_random

PROMPT, NEW, BATCH = 64, 64, 16  # tokens, tokens, sequences
GGUF_TYPES = {16: "BF16", 8: "Q8_0", 4: "Q4_0"}


class NoTokenizer:
    """A random model's tokens are no text, and no token ends an answer."""

    bos_id, eos_id, template = 1, -1, None

    def __init__(self, vocab_size: int = 32000):
        self.vocab_size = vocab_size

    def stream(self, after=()) -> "NoTokenizer":
        return self

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def random_prompts(count: int, vocab_size: int = 32000) -> list[list[int]]:
    torch.manual_seed(1)
    return torch.randint(3, vocab_size, (count, PROMPT)).tolist()


# ---------------------------------------------------------------- sides: load, return a run


def rates(prefill_s: float, total_s: float, sequences: int = 1) -> dict:
    return {
        "prompt tok/s": sequences * PROMPT / prefill_s,
        "decode tok/s": sequences * (NEW - 1) / (total_s - prefill_s),
        "tok/s": sequences * NEW / total_s,
    }


def ours(folder: str, batch_size: int, device: str) -> Callable[[], dict]:
    model = optimize_layout(load_model(folder, device=device))
    return with_engine(Engine(model, NoTokenizer(), batch_size, PROMPT + NEW), batch_size)


def with_engine(engine: Engine, batch_size: int) -> Callable[[], dict]:
    prompts = random_prompts(batch_size, engine.tokenizer.vocab_size)
    engine.guess = lambda: []  # a random model repeats itself: guesses would be right too often

    def run() -> dict:
        sequences = [engine.add(ids, SamplingParams(max_new_tokens=NEW)) for ids in prompts]
        start = time.perf_counter()
        engine.step()
        first = time.perf_counter()
        while engine.busy:
            engine.step()
        end = time.perf_counter()
        assert all(len(s.ids) == NEW for s in sequences)
        engine.step()  # frees the slots
        return rates(first - start, end - start, batch_size)

    return run


def with_transformers(folder: str, batch_size: int, device: str) -> Callable[[], dict]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)
    return with_generate(model, batch_size)


def with_generate(model, batch_size: int) -> Callable[[], dict]:
    prompts = random_prompts(batch_size, model.config.vocab_size)
    ids = torch.tensor(prompts, device=model.device)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)

    def run() -> dict:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=1, **options).cpu()  # waits for a GPU
        first = time.perf_counter()
        out = model.generate(ids, max_new_tokens=NEW, **options).cpu()
        assert out.shape == (batch_size, PROMPT + NEW)
        return rates(first - start, time.perf_counter() - first, batch_size)

    return run


def llama_cpp(file: str, batch_size: int, device: str) -> Callable[[], dict]:
    from llama_cpp import Llama as LlamaCpp

    model = LlamaCpp(file, n_ctx=PROMPT + NEW, n_threads=2, n_threads_batch=2, verbose=False)
    (ids,) = random_prompts(1)

    def run() -> dict:
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        token, first = model.sample(temp=0.0), time.perf_counter()
        for _ in range(NEW - 1):
            model.eval([token])
            token = model.sample(temp=0.0)
        return rates(first - start, time.perf_counter() - start)

    return run


SIDES = {
    "ours": ours,
    "transformers": with_transformers,
    "llama.cpp": llama_cpp,
    "memory": lambda *_: lambda: {"GB/s": memory_rate()},
}


def run_on_request(side: str, path: str, batch_size: int, device: str) -> None:
    """Load, then print the figures of a run for every line on stdin."""
    torch.set_grad_enabled(False)
    with PeakMemory() as peak:  # only here: its sampling would slow down every side's turn
        run = SIDES[side](path, batch_size, device)
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        sizes = {"GB": peak.anonymous / 1e9, "mapped GB": memory()["RssFile"] / 1e9}
        print(json.dumps(run() | sizes), flush=True)


def run_loaded_in_turns(sides: dict[str, tuple], runs: int, device: str = "cpu") -> Figures:
    """{name: (side, path, batch size)} → figures; all stay loaded, and one runs at a time."""
    processes = {}
    for name, (side, path, batch_size) in sides.items():
        flags = {"side": side, "path": path, "batch_size": batch_size, "device": device}
        command = module_command("bench.decode", **flags)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, **pipes)
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"{name} did not start: {' '.join(command)}")
        processes[name] = process

    def request_run(process: subprocess.Popen) -> dict:
        print(file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    turns = {n: lambda process=process: request_run(process) for n, process in processes.items()}
    figures = run_in_turns(turns, runs, warm_up=0)  # each has run once already
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return figures


# ---------------------------------------------------------------- files of the other formats


def write_gguf(plain: Path, file: Path, kind: str) -> None:
    """The model in `plain` for llama.cpp, without a vocabulary. The head of a Q4_0 file has 8 bits,
    as ours."""
    config, stored = open_checkpoint(plain)
    pairs = ((name, tensor.read()) for name, tensor in stored.items())
    save_gguf(pairs, config, file, kind.lower(), {"tokenizer.ggml.model": "no_vocab"})


def write_quantized(plain: Path) -> dict[int, Path]:
    """Bits → folder, of the model in `plain` and of copies beside it with 8 and 4 bits."""
    folders = {16: plain, 8: plain.with_name("int8"), 4: plain.with_name("int4")}
    for bits in (8, 4):
        save_quantized(WeightSource(plain, bits), folders[bits])
    return folders


def bytes_per_token(folder: Path) -> int:
    """The bytes of weights that decoding a token reads."""
    sizes = tensor_bytes(WeightSource(folder).stored)
    return sum(size for name, size in sizes.items() if "embed_tokens" not in name)


# ---------------------------------------------------------------- the two tables


def one_sequence(scratch: Path, runs: int) -> None:
    write_random(scratch / "bf16", TINYLLAMA)
    folders = write_quantized(scratch / "bf16")
    sides = {f"ours {bits}": ("ours", folder, 1) for bits, folder in folders.items()}
    sides["transformers"] = ("transformers", folders[16], 1)
    pairs, packages = [(16, "transformers")], ["torch", "transformers"]
    if importlib.util.find_spec("llama_cpp"):
        packages.append("llama_cpp_python")
        for bits, kind in GGUF_TYPES.items():
            write_gguf(folders[16], file := scratch / f"{kind}.gguf", kind)
            sides[f"llama.cpp {kind}"] = ("llama.cpp", file, 1)
            pairs.append((bits, f"llama.cpp {kind}"))
    sides["memory"] = ("memory", "", 1)
    figures = run_loaded_in_turns(sides, runs)
    lines = []
    for bits, peer in pairs:
        a, b = figures[f"ours {bits}"], figures[peer]
        for figure in ("decode tok/s", "prompt tok/s", "tok/s"):
            lines.append((f"{bits} bits, {figure}; {peer}", a[figure], b[figure], True))
        totals = [[x + y for x, y in zip(s["GB"], s["mapped GB"], strict=True)] for s in (a, b)]
        lines.append((f"{bits} bits, peak memory and mapped pages, GB; {peer}", *totals))
    rate, read = statistics.median(figures["memory"]["GB/s"]), {}
    for bits, folder in folders.items():
        speed = statistics.median(figures[f"ours {bits}"]["decode tok/s"])
        read[bits] = speed * bytes_per_token(folder) / 1e9 / rate
    shares = ", ".join(f"{bits} bits {share:.0%}" for bits, share in read.items())
    note = f"Memory is read at {rate:.0f} GB/s. Share of it that ours reads weights at: {shares}."
    report("Decode one sequence, 1.1B parameters, CPU", "peer", lines, packages, note)


def many_sequences(scratch: Path, runs: int) -> None:
    lines = []
    for dtype in ("fp32", "bf16"):
        write_random(folder := scratch / f"small-{dtype}", SMALL, dtype)
        sides = {side: (side, folder, BATCH) for side in ("ours", "transformers")}
        a, b = run_loaded_in_turns(sides, runs).values()
        lines.append((f"{dtype}, tok/s", a["tok/s"], b["tok/s"], True))
        lines.append((f"{dtype}, peak anonymous memory, GB", a["GB"], b["GB"]))
    title = f"Decode {BATCH} sequences at once, 15.2M parameters, CPU"
    report(title, "transformers", lines, ["torch", "transformers"])


def main() -> None:
    internal = ("--side", "--path", "--batch-size", "--device")
    args = bench_parser(__doc__, runs=True, internal=internal).parse_args()
    if args.side:
        return run_on_request(args.side, args.path, int(args.batch_size), args.device)
    with tempfile.TemporaryDirectory() as scratch:
        one_sequence(Path(scratch), args.runs)
        many_sequences(Path(scratch), args.runs)


if __name__ == "__main__":
    main()
