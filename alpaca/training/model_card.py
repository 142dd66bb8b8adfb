"""What stands beside a trained model: data/MODEL_CARD.md, filled in.

A model travels without the folder it was trained in. Its card answers, for every run alike, what it
was made of (files by their SHA-256, so that anyone can tell whether theirs are the same), how, what
came of it, and what it should not be used for. The trainer writes it as README.md, which is where
Hugging Face looks for it.

Model cards: arXiv:1810.03993; datasheets: 1803.09010.

Shown by tests/test_modelcard.py: test_the_trainer_writes_it_beside_the_weights.
"""

import hashlib
import platform
import subprocess
import time
from argparse import Namespace
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

from alpaca import CHECKOUT
from alpaca.common.files import json_records
from alpaca.datagen.formats import parse_weight
from alpaca.training import memory_plan
from dataset import Examples, format_prompt
from model import LlamaConfig

HERE = CHECKOUT  # whose commit the card names
TEMPLATE = HERE / "data" / "MODEL_CARD.md"


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def code() -> str:
    """Which state of this project is running."""

    def git(*words: str) -> str:
        asked = {"cwd": HERE, "capture_output": True, "text": True, "check": False}
        return subprocess.run(["git", *words], **asked).stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")  # might be another project's, around a copy
        commit = git("rev-parse", "-q", "--verify", "HEAD")  # nothing before the first commit
        changed = git("status", "--porcelain", "-uno")
    except OSError:
        top = commit = ""
    if not commit or Path(top) != HERE.resolve():
        return "of a copy without its history"
    return f"commit {commit}{', with changes that are in no commit' if changed else ''}"


def weights(folder: Path) -> str:
    found = [file for kind in ("safetensors", "bin", "pth") for file in folder.glob(f"*.{kind}")]
    return "\n".join(f"- `{file.name}`, SHA-256 `{sha256(file)}`" for file in sorted(found))


def dataset(spec: str) -> str:
    """How much is in it, and who wrote that, by what the records say of themselves. The model is
    trained by now: what has become of a file since is told, not an error."""
    file, weight = parse_weight(spec)
    try:
        records = [record for _, record in json_records(file)]
    except (OSError, ValueError):
        return f"`{file.name}`: it could be read when training began, and no longer afterwards"
    sources = [record.get("provenance") for record in records if isinstance(record, dict)]
    named = Counter(source.get("teacher") for source in sources if isinstance(source, dict))
    told = ", ".join(f"{count:,} by {teacher}" for teacher, count in named.most_common())
    told = told or "they do not say who wrote them"
    taken = "" if weight == 1 else f", taken {weight:g} times"
    return f"`{file.name}`: {len(records):,} records{taken}, {told}; SHA-256 `{sha256(file)}`"


def model_card(
    args: Namespace, config: LlamaConfig, train: Examples, recipe: dict, results: str
) -> str:
    """The card of a run: the trainer's flags, what it learned from, and what came of it."""
    gpu = torch.cuda.is_available()
    whole = learned = memory_plan.parameters(config)
    if args.lora:
        learned = memory_plan.adapter_parameters(config, args.lora)
    above = ("model_dir", "preset", "data")  # in the card's first part
    told = {k: v for k, v in recipe.items() if k not in above and v is not None}
    facts = {
        "name": args.out.name,
        "date": time.strftime("%Y-%m-%d"),
        "code": code(),
        "versions": f"torch {version('torch')}, Python {platform.python_version()}",
        "base": f"`{args.model_dir.name}`"
        if args.model_dir
        else "none; it began with random weights",
        "base_files": weights(args.model_dir) if args.model_dir else "",
        "data_files": "\n".join(f"- {dataset(spec)}" for spec in args.data),
        "held_out_file": dataset(str(args.eval_data)) if args.eval_data else "none",
        "how": "--model-dir BASE --adapter FOLDER" if args.lora else "--model-dir FOLDER",
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {platform.machine()}",
        "recipe": "\n".join(f"| {field} | {value} |" for field, value in told.items()),
        "results": results,
        "prompt": format_prompt("(the instruction)"),
        "parameters": f"{whole:,}",
        "learned": f"{learned:,}",
        "positions": f"{config.max_position_embeddings:,}",
        "examples": f"{len(train):,}",
        "supervised": f"{train.supervised.sum():,}",
    }
    return TEMPLATE.read_text(encoding="utf-8").format_map(facts)
