"""Decoding on one GPU: tokens a second against transformers' `generate`, and the memory's limit.

    python -m bench.gpu_decode                                     # 16, 8 and 4 bits: three tables
    python -m bench.gpu_decode --only 16                           # one of them: under ten minutes
    python -m bench.gpu_decode --device cpu --preset tiny --only 4 # a dry run, on any machine

A random 7B, made on the GPU, answers one prompt of 64 tokens with 64 new ones, then 32 such prompts
at once. `generate` always has bf16 weights; without transformers its lines are left out. The sides
run one after the other, each in a process of its own. Decoding a token reads every weight once,
except the embedding: the limit is the rate at which memory is read, divided by these bytes.
"""

import json
import statistics
from importlib.util import find_spec
from unittest import mock

import torch

from alpaca.inference.engine import Engine
from alpaca.weights import loading
from alpaca.weights.presets import preset
from bench.decode import NEW, PROMPT, NoTokenizer, with_engine, with_generate
from bench.measure import gpu, gpu_parser, memory_rate, number, run_sides, stamp, store
from bench.models import hf_random, random_source

BATCH_SIZES, RUNS = (1, 32), 5


def run_ours(size: str, bits: int, device: str, compiled: bool) -> dict:
    config = preset(size)
    source = random_source(config, bits, device)
    with mock.patch.object(loading, "WeightSource", lambda *_: source):
        model = loading.load_model("", bits=bits, device=device, dtype=torch.bfloat16)
    weights = model.state_dict().items()
    read = sum(tensor.nbytes for name, tensor in weights if "embed_tokens" not in name)
    model, tokenizer = loading.optimize_layout(model, compiled), NoTokenizer(config.vocab_size)
    engine = Engine(model, tokenizer, max(BATCH_SIZES), PROMPT + NEW, compile=compiled)
    runs = {batch: medians(with_engine(engine, batch)) for batch in BATCH_SIZES}
    return {"runs": runs, "GB": read / 1e9, "GB/s": memory_rate(device)}


def medians(run) -> dict[str, float]:
    run()
    figures = [run() for _ in range(RUNS)]
    return {name: statistics.median(each[name] for each in figures) for name in figures[0]}


def run_transformers(size: str, device: str) -> dict:
    model = hf_random(preset(size), device, torch.bfloat16).eval()
    return {"runs": {batch: medians(with_generate(model, batch)) for batch in BATCH_SIZES}}


def table(size: str, bits: int, figures: dict, notes: list[str]) -> str:
    head = "| sequences | side | prompt tok/s | decode tok/s | of the limit | `generate` |"
    title = f"### Decode a {size} at {bits} bits on one GPU"
    lines = [title, "", head, "|---|---|---|---|---|---|"]
    ours = figures.get("ours") or figures.get("ours, compiled")
    limit = ours["GB/s"] / ours["GB"] if ours else 0  # tok/s of one sequence
    for batch in map(str, BATCH_SIZES):
        peer = figures.get("transformers", {}).get("runs", {}).get(batch)
        for side, found in figures.items():
            if rates := found["runs"].get(batch):
                speed = rates["decode tok/s"]
                share = f"{speed / limit:.0%}" if batch == "1" and "GB" in found else ""
                ratio = f"{speed / peer['decode tok/s']:.2f}×" if peer else ""
                cells = batch, side, number(rates["prompt tok/s"]), number(speed), share, ratio
                lines.append(f"| {' | '.join(cells)} |")
    if ours:
        memory = (
            f"Memory is read at {ours['GB/s']:,.0f} GB/s and a token reads {number(ours['GB'])} GB"
        )
        notes = [f"{memory} of weights: at most {limit:.0f} tok/s for one sequence.", *notes]
    packages = [name for name in ("torch", "transformers") if find_spec(name)]
    return "\n".join([*lines, "", *notes, "", stamp(packages), ""])


@torch.no_grad()
def main() -> None:
    parts = ["16", "8", "4"]
    args = gpu_parser(__doc__, parts).parse_args()
    if args.side:
        if args.side == "transformers":
            return print(json.dumps(run_transformers(args.preset, args.device)))
        compiled = args.side.endswith("compiled")
        return print(json.dumps(run_ours(args.preset, int(args.only[0]), args.device, compiled)))
    if args.device == "cuda" and not gpu():
        return print("No GPU: nothing is measured.")
    sides = ["ours"]
    if find_spec("transformers"):
        sides.append("transformers")
    else:
        print("transformers is not installed: `generate` is left out")
    if args.device == "cuda":
        sides.append("ours, compiled")  # last: it takes longest
    for bits in args.only:
        flags = {"device": args.device, "preset": args.preset, "only": bits}
        figures, notes = run_sides("bench.gpu_decode", sides, args.minutes, **flags)
        text = table(args.preset, int(bits), figures, notes)
        (store if args.device == "cuda" else print)(text)


if __name__ == "__main__":
    main()
