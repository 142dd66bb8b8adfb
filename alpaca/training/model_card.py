"""The card of a trained model: data/MODEL_CARD.md, filled in for the run.

A model travels without the folder it was trained in. Its card says what it was made of (files by
SHA-256), how it was trained, how well it does, and what it should not be used for. Hugging Face
looks for it in README.md. Model cards: arXiv:1810.03993; datasheets: 1803.09010.
"""

import hashlib
import platform
import subprocess
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from alpaca import CHECKOUT
from alpaca.common.errors import UserError
from alpaca.common.files import write_text
from alpaca.common.json_files import json_records
from alpaca.datagen.formats import parse_weight
from alpaca.training.job import Job
from alpaca.training.throughput import model_parameters, trained_count
from dataset import template_of

TEMPLATE = CHECKOUT / "data/MODEL_CARD.md"


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def describe_code(checkout: Path = CHECKOUT) -> str:
    """The commit of this project that is running, not of one that this is a copy inside."""
    words = ["git", f"--git-dir={checkout}/.git", f"--work-tree={checkout}", "describe", "--always"]
    words += ["--abbrev=40", "--exclude=*", "--dirty= with uncommitted changes"]
    try:
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return f"commit {commit}" if commit else "a copy without version history"


def describe_weights(folder: Path) -> str:
    files = [file for kind in ("safetensors", "bin", "pth") for file in folder.glob(f"*.{kind}")]
    files += [folder] if folder.is_file() else []  # GGUF
    return "\n".join(f"- `{file.name}`, SHA-256 `{sha256(file)}`" for file in sorted(files))


def describe_data(spec: str) -> str:
    """How many records a file has, and who wrote them according to their `provenance`. After hours
    of training, a file that cannot be read any more is not an error."""
    file, weight = parse_weight(spec)
    try:
        records = [record for _, record in json_records(file)]
    except (OSError, UserError):
        return f"`{file.name}`: not readable any more when this card was written"
    sources = [record.get("provenance") for record in records if isinstance(record, dict)]
    teachers = Counter(source.get("teacher") for source in sources if isinstance(source, dict))
    authors = ", ".join(f"{count:,} by {teacher}" for teacher, count in teachers.most_common())
    authors = authors or "of unknown authors"
    times = "" if weight == 1 else f", taken {weight:g} times"
    return f"`{file.name}`: {len(records):,} records{times}, {authors}; SHA-256 `{sha256(file)}`"


def fill_in_card(job: Job, recipe: dict[str, Any], results: str) -> str:
    config, model, template = job.config, job.model_config, template_of(job.tokenizer)
    cuda = torch.cuda.is_available()
    above = ("model_dir", "preset", "data")  # the card's first part describes them
    rows = [(k, v) for k, v in recipe.items() if k not in above and v is not None]
    base, files = "none: training started from random weights", ""
    if config.model_dir:
        base, files = f"`{config.model_dir.name}`", describe_weights(config.model_dir)
    flags = "--model-dir BASE --adapter FOLDER" if config.lora else "--model-dir FOLDER"
    safety = f"benchmark {flags} --tasks data/safety_prompts.jsonl --out runs/safety"
    facts = {
        "task": "text-generation",
        "purpose": "on instructions with Alpaca's recipe",
        "averaged": "a step's supervised tokens, which are those of the answers",
        "command": f'generate {flags} "Name three primary colors."',
        "measure": f"`alpaca {safety}` measures the latter.",
        "name": config.out.name,
        "date": time.strftime("%Y-%m-%d"),
        "code": describe_code(),
        "versions": f"torch {version('torch')}, Python {platform.python_version()}",
        "base": base,
        "base_files": files,
        "data_files": "\n".join(f"- {describe_data(spec)}" for spec in config.data),
        "held_out_files": "; ".join(map(describe_data, config.eval_data)) or "none",
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}",
        "recipe": "\n".join(f"| {name} | {value} |" for name, value in rows),
        "results": results,
        "template": template.name,
        "prompt": "".join(template.parts(template.question("(the instruction)"))),
        "parameters": f"{model_parameters(model):,}",
        "trained": f"{trained_count(model, config.lora):,}",
        "positions": f"{model.max_position_embeddings:,}",
        "examples": f"{len(job.train):,}",
        "supervised": f"{job.train.supervised.sum():,}",
    }
    if config.objective != "sft":
        purpose = f"with the objective `{config.objective}` (alpaca/training/objectives.py)"
        facts |= {"purpose": purpose, "averaged": "a step's pairs of answers"}
    if config.objective == "reward":
        facts |= {"task": "text-classification", "command": "best-of SAMPLES --reward-model FOLDER"}
        facts["measure"] = "It answers with rewards, so neither applies to it."
    return TEMPLATE.read_text(encoding="utf-8").format_map(facts)


def write_card(job: Job, recipe: dict[str, Any], results: str) -> None:
    """Beside the trained weights; hashing the base takes a while, so no rank should wait for it."""
    write_text(job.config.result / "README.md", fill_in_card(job, recipe, results))
