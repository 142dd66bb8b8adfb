"""Annotation files, model outputs and files for length control as AlpacaEval writes them."""

import csv
import json
import random
from math import exp, tanh
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


# ---------------------------------------------------------------- length control


def difficulties(n: int) -> list[float]:
    return [random.Random(n).gauss(-0.5, 1.3) for n in range(n)]


def chance(quality: float, longer: float, difficulty: float) -> float:
    """That a judge who likes length prefers an answer longer by so many of its deviations."""
    return 1 / (1 + exp(-(quality + 1.4 * tanh(longer) + 0.9 * difficulty)))


def gamed_lines(hardness: list[float]) -> list[dict]:
    """The lines of df_gamed.csv: two models, one long and one short, answer every instruction."""
    rng, lines = random.Random(0), []
    for model, longer in (("verbose", 0.8), ("concise", -0.8)):
        for index, difficulty in enumerate(hardness):
            d = rng.gauss(longer, 1)
            won = rng.random() < chance(0, d, difficulty)
            numbers = {"index": index, "preference": 0.97 if won else 0.02, "std_delta_len": -d}
            rest = {"instruction_difficulty": difficulty, "not_gamed_baseline": False}
            lines.append(numbers | rest | {"model": model})
    return lines


def write_csv(path: Path, lines: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, lines[0])
        table.writeheader()
        table.writerows(lines)
    return path


def judged_with(hardness: list[float], seed: int, quality: float = -0.5, **names) -> list[dict]:
    """Annotations of one model by the same judge, with soft preferences."""
    rng, entries = random.Random(seed), []
    for number, difficulty in enumerate(hardness):
        base = rng.randrange(500, 1500)
        length = max(1, base + round(rng.gauss(-150, 300)))
        won = rng.random() < chance(quality, (length - base) / 300, difficulty)
        outputs = {"output_1": "w" * base, "output_2": "w" * length}
        entries.append(entry(number, 1.96 if won else 1.01, **outputs, **names))
    return entries
