"""Annotation files and model outputs as AlpacaEval writes them."""

import json
from pathlib import Path


def entry(number: int, preference, **changes) -> dict:
    """An annotation of equally long outputs, unless they are given."""
    plain = {
        "instruction": f"instruction {number}",
        "output_1": "baseline",
        "output_2": "a model!",
        "generator_1": "base",
        "generator_2": "tuned",
        "annotator": "judge",
        "preference": preference,
    }
    return plain | changes


def write(path: Path, entries: list) -> Path:
    path.write_text(json.dumps(entries))
    return path


def write_outputs(folder: Path, name: str, texts: dict[str, str]) -> Path:
    """A folder with a model's answers, {instruction: answer}."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"generator": name, "dataset": "d"}
    entries = [{"instruction": task, "output": text} | names for task, text in texts.items()]
    write(folder / "model_outputs.json", entries)
    return folder


def read_outputs(folder: Path) -> list[dict]:
    return json.loads((folder / "model_outputs.json").read_text())
