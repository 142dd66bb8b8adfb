"""Decoding on a CPU: tokens a second against transformers and llama.cpp, beside what memory allows.

    python bench/decode.py [--runs 5]

First a random model of 1.1B parameters, one sequence: a prompt of 64 tokens, 64 new ones, the
likeliest each time. Every side is a process of its own that keeps its model loaded; they take
turns.
llama.cpp decodes the same shape in its own files (BF16, Q8_0, Q4_0), where `pip install
llama-cpp-python gguf` has been run, which needs a compiler. A decoded token needs every weight but
the embedding's once: the limit is the rate at which this machine sums 1 GiB, taken in turn with the
others, over those bytes.

Then a model of 15.2M parameters, 16 sequences at once, against transformers in fp32 and bf16.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from alpaca.inference.engine import Engine  # noqa: E402
from alpaca.inference.sampling import SamplingParams  # noqa: E402
from alpaca.weights.loading import load_model, optimize_layout  # noqa: E402
from alpaca.weights.quantize import WeightSource, save_quantized  # noqa: E402
from alpaca.weights.writer import save_model, tensor_bytes  # noqa: E402
from bench.load import SHAPE, write_random  # noqa: E402
from bench.measure import PeakMemory, memory, row, table  # noqa: E402
from bench.train import SHAPE as SMALL  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

PROMPT, NEW, BATCH = 64, 64, 16
KINDS = {16: "BF16", 8: "Q8_0", 4: "Q4_0"}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class NoTokenizer:
    """A random model says nothing that could be text, and never ends."""

    eos_id, vocab_size = -1, 32000

    def check(self, config) -> None:
        pass

    def stream(self, after=()) -> "NoTokenizer":
        return self

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def random_prompts(count: int) -> list[list[int]]:
    torch.manual_seed(1)
    return torch.randint(3, 32000, (count, PROMPT)).tolist()


# ---------------------------------------------------------------- sides: load, then run when asked


def ours(folder: str, rows: int, device: str) -> Callable[[], dict]:
    dtype = torch.float32 if folder.endswith("fp32") else None
    model = optimize_layout(load_model(folder, device=device, dtype=dtype))
    engine = Engine(model, NoTokenizer(), rows, PROMPT + NEW)
    prompts = random_prompts(rows)

    def run() -> dict:
        sequences = [engine.add(ids, SamplingParams(max_new_tokens=NEW)) for ids in prompts]
        start = time.perf_counter()
        engine.step()
        first = time.perf_counter()
        while engine.busy:
            engine.step()
        end = time.perf_counter()
        assert all(len(s.ids) == NEW for s in sequences)
        engine.step()  # frees the rows
        return rates(first - start, end - start, rows)

    return run


def rates(prompt_s: float, whole_s: float, rows: int = 1) -> dict:
    return {
        "prompt tok/s": rows * PROMPT / prompt_s,
        "decode tok/s": rows * (NEW - 1) / (whole_s - prompt_s),
        "tok/s": rows * NEW / whole_s,
    }


def theirs(folder: str, rows: int, device: str) -> Callable[[], dict]:
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if folder.endswith("fp32") else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    ids = torch.tensor(random_prompts(rows), device=device)
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how["attention_mask"] = torch.ones_like(ids)

    def run() -> dict:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=1, **how).cpu()  # waits, if it was a GPU
        first = time.perf_counter()
        out = model.generate(ids, max_new_tokens=NEW, **how).cpu()
        assert out.shape == (rows, PROMPT + NEW)
        return rates(first - start, time.perf_counter() - first, rows)

    return run


def llama_cpp(file: str, rows: int, device: str) -> Callable[[], dict]:
    from llama_cpp import Llama as Peer

    model = Peer(file, n_ctx=PROMPT + NEW, n_threads=2, n_threads_batch=2, verbose=False)
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


def bandwidth(folder: str, rows: int, device: str) -> Callable[[], dict]:
    numbers = torch.ones(1 << 28, device=device)

    def run() -> dict:
        start = time.perf_counter()
        for _ in range(8):
            total = numbers.sum()
        total.item()
        return {"GB/s": 8 * numbers.nbytes / (time.perf_counter() - start) / 1e9}

    return run


SIDES = {"ours": ours, "theirs": theirs, "llama.cpp": llama_cpp, "bandwidth": bandwidth}


def serve(side: str, path: str, rows: int, device: str) -> None:
    """Load, then answer every line on stdin with a run's figures."""
    torch.set_grad_enabled(False)
    with PeakMemory() as peak:  # its sampling would disturb the turns of all
        run = SIDES[side](path, rows, device)
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        sizes = {"GB": peak.anonymous / 1e9, "mapped GB": memory()["RssFile"] / 1e9}
        print(json.dumps(run() | sizes), flush=True)


def take_turns(
    sides: dict[str, tuple], runs: int, device: str = "cpu"
) -> dict[str, dict[str, list]]:
    """{name: (side, path, rows)} → {name: {figure: values}}, all loaded, one running at a time."""
    processes = {}
    for name, (side, path, rows) in sides.items():
        what = {"side": side, "path": path, "rows": rows, "device": device}
        flags = [f"--{name}={value}" for name, value in what.items()]
        command = [sys.executable, __file__, *flags]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes[name] = subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes)
        if processes[name].stdout.readline() != "ready\n":
            raise SystemExit(f"{name} did not start: {' '.join(command)}")
    found: dict[str, dict[str, list]] = {name: {} for name in sides}
    for _ in range(runs):
        for name, process in processes.items():
            print(file=process.stdin, flush=True)
            for figure, value in json.loads(process.stdout.readline()).items():
                found[name].setdefault(figure, []).append(value)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return found


def write_gguf(folder: Path, config: LlamaConfig, kind: str) -> str:
    """The same shape for llama.cpp, with random weights and no vocabulary."""
    import gguf
    import numpy as np

    path = str(folder / f"{kind}.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    random = np.random.default_rng(0)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    for name, shape in shapes.items():
        parts = name.split(".")
        if parts[-2] in names:
            title = f"blk.{parts[2]}.{names[parts[-2]]}.weight"
        elif "layernorm" in name:
            which = "attn_norm" if "input" in name else "ffn_norm"
            title = f"blk.{parts[2]}.{which}.weight"
        else:
            tops = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
            title = f"{tops[parts[-2]]}.weight"
        if len(shape) == 1:
            writer.add_tensor(title, np.ones(shape, np.float32))
            continue
        # the head of Q4_0 files is kept at 8 bits, as ours
        quant = "Q8_0" if kind == "Q4_0" and "lm_head" in name else kind
        quant = gguf.GGMLQuantizationType[quant]
        content = 0.02 * random.standard_normal(shape, np.float32)
        content = gguf.quants.quantize(content, quant)
        writer.add_tensor(title, content, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weight_bytes(folder: Path) -> int:
    """What one decoded token reads."""
    sizes = tensor_bytes(WeightSource(folder).stored)
    return sum(size for name, size in sizes.items() if "embed_tokens" not in name)


def one_sequence(folder: Path, runs: int) -> None:
    plain = folder / "bf16"
    write_random(plain)
    places = {16: plain, 8: folder / "int8", 4: folder / "int4"}
    for bits in (8, 4):
        save_quantized(WeightSource(plain, bits), places[bits])
    sides = {f"ours {bits}": ("ours", str(place), 1) for bits, place in places.items()}
    sides["transformers"] = ("theirs", str(plain), 1)
    peers = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name)]
    for kind in KINDS.values() if len(peers) == 2 else ():
        sides[f"llama.cpp {kind}"] = ("llama.cpp", write_gguf(folder, SHAPE, kind), 1)
    sides["memory"] = ("bandwidth", "", 1)
    found = take_turns(sides, runs)
    packages = ["torch", "transformers"]
    pairs = [(16, "transformers")]
    if len(peers) == 2:
        packages.append("llama_cpp_python")
        pairs += [(bits, f"llama.cpp {kind}") for bits, kind in KINDS.items()]
    rows = []
    for bits, peer in pairs:
        a, b = found[f"ours {bits}"], found[peer]
        for figure in ("decode tok/s", "prompt tok/s", "tok/s"):
            rows.append(row(f"{bits} bits, {figure}; {peer}", a[figure], b[figure], True))
        together = [[x + y for x, y in zip(s["GB"], s["mapped GB"], strict=True)] for s in (a, b)]
        rows.append(row(f"{bits} bits, peak memory and mapped pages, GB; {peer}", *together))
    print(table("Decoding one sequence, 1.1B parameters, CPU", "peer", rows, packages))
    rate = statistics.median(found["memory"]["GB/s"])
    limits = (
        f"{bits} bits {rate * 1e9 / weight_bytes(place):.1f}" for bits, place in places.items()
    )
    print(f"Memory is read at {rate:.0f} GB/s: at most, tok/s: {', '.join(limits)}.\n")


def many_sequences(folder: Path, runs: int) -> None:
    config = LlamaConfig(**SMALL)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = Llama(config)
    save_model(model, config, folder / "fp32")
    save_model(model, config, folder / "small-bf16", torch.bfloat16)
    rows = []
    for name in ("fp32", "small-bf16"):
        path = str(folder / name)
        sides = {"ours": ("ours", path, BATCH), "theirs": ("theirs", path, BATCH)}
        found = take_turns(sides, runs)
        a, b = found["ours"], found["theirs"]
        rows.append(row(f"{name.removeprefix('small-')}, tok/s", a["tok/s"], b["tok/s"], True))
        rows.append(row(f"{name.removeprefix('small-')}, peak anonymous GB", a["GB"], b["GB"]))
    title = f"Decoding {BATCH} sequences, 15.2M parameters, CPU"
    print(table(title, "transformers", rows, ["torch", "transformers"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each (default: 5)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args.side, args.path, args.rows, args.device)
    with tempfile.TemporaryDirectory() as scratch:
        one_sequence(Path(scratch), args.runs)
        many_sequences(Path(scratch), args.runs)


if __name__ == "__main__":
    main()
