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
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

from dataset import numbered_objects, parse_weight, prompt

HERE = Path(__file__).parent
TEMPLATE = HERE / "data" / "MODEL_CARD.md"


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def code() -> str:
    """Which state of this project is running."""
    asked = {"cwd": HERE, "capture_output": True, "text": True, "check": False}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **asked).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **asked).stdout.strip()
    except OSError:
        commit = changed = ""
    if not commit:
        return "of a copy without its history"
    return f"commit {commit}{', with changes that are in no commit' if changed else ''}"


def weights(folder: Path) -> str:
    found = [file for kind in ("safetensors", "bin", "pth") for file in folder.glob(f"*.{kind}")]
    return "\n".join(f"- `{file.name}`, SHA-256 `{sha256(file)}`" for file in sorted(found))


def dataset(file: Path) -> str:
    """How much is in it, and who wrote that, by what the records say of themselves."""
    if not file.exists():
        return f"- `{file.name}`: it was there when training began, and no longer when it ended"
    records = [record for _, record in numbered_objects(file)]
    sources = [record.get("provenance") for record in records if isinstance(record, dict)]
    named = Counter(source.get("teacher") for source in sources if isinstance(source, dict))
    told = ", ".join(f"{count:,} by {teacher}" for teacher, count in named.most_common())
    told = told or "they do not say who wrote them"
    return f"- `{file.name}`: {len(records):,} records, {told}; SHA-256 `{sha256(file)}`"


def results(metrics: list[dict]) -> str:
    """Losses at the beginning and the end, and what was spent."""
    steps = [record for record in metrics if "loss" in record]
    held_out = [record["held_out_loss"] for record in metrics if "held_out_loss" in record]
    tokens = sum(record["tokens"] for record in steps)
    hours = sum(record["tokens"] / max(1, record["tokens_per_s"]) for record in steps) / 3600
    first, last = steps[0]["loss"], steps[-1]["loss"]
    lines = [f"- training loss {first:.3f} at the first step, {last:.3f} at the last"]
    if held_out:
        lines.append(f"- held-out loss {held_out[0]:.3f} before, {held_out[-1]:.3f} after")
    return "\n".join([*lines, f"- {tokens:,} tokens in {hours:.2f} hours"])


def model_card(
    name: str,
    base: Path | None,  # None: random weights
    data: list[str],  # files, or FILE:WEIGHT
    recipe: dict,
    metrics: list[dict],  # metrics.jsonl
    **numbers: int,  # parameters, positions, examples, supervised
) -> str:
    gpu = torch.cuda.is_available()
    facts = {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "code": code(),
        "versions": f"torch {version('torch')}, Python {platform.python_version()}",
        "base": f"`{base.name}`" if base else "none; it began with random weights",
        "base_files": weights(base) if base else "",
        "data_files": "\n".join(dataset(parse_weight(spec)[0]) for spec in data),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {platform.machine()}",
        "recipe": "\n".join(f"| {field} | {value} |" for field, value in recipe.items()),
        "results": results(metrics),
        "prompt": prompt("(the instruction)"),
        **{what: f"{number:,}" for what, number in numbers.items()},
    }
    return TEMPLATE.read_text(encoding="utf-8").format_map(facts)
