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


def write(path, entries: list):
    path.write_text(json.dumps(entries))
    return path


def write_outputs(folder: Path, name: str, texts: dict[str, str]) -> Path:
    """A folder with a model's answers, {instruction: answer}."""
    folder.mkdir(parents=True)
    write(
        folder / "model_outputs.json",
        [
            {"instruction": task, "output": text, "generator": name, "dataset": "d"}
            for task, text in texts.items()
        ],
    )
    return folder
