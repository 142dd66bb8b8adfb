"""Made-up records in the forms in which benchmarks are published."""

import json
import random
from pathlib import Path

WORDS = ["stone", "river", "seven", "lamp", "green", "walk", "bird", "under", "cold", "bread"]


def solution(rng: random.Random) -> str:
    """A solution in GSM8K's form."""
    a, b = rng.randint(2, 4000), rng.randint(2, 900)
    result = rng.choice([f"{a * b:,}", f"{a * b}", f"-{a}", f"{a}.{b % 90 + 10}", f"{a:,}.5"])
    first = f"He pays {a}*{b}=<<{a}*{b}={a * b}>>{a * b} for {rng.choice(WORDS)}s, not ${b}."
    return f"{first}\nThat leaves {b} of {a:,}.\n#### {result}"


def hub_record(task: str, rng: random.Random) -> dict:
    """A record as the Hugging Face hub has it."""

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    def texts(count: int) -> list[str]:
        return [text(1, 6) for _ in range(count)]

    question = text(4, 9).capitalize() + "?"
    if task == "mmlu":
        record = {"question": f" {question}", "subject": "abstract_algebra", "choices": texts(4)}
        return record | {"answer": rng.randrange(4)}
    if task == "arc":
        labels = list(rng.choice(["ABCD", "ABCDE", "1234"]))
        choices = {"text": texts(len(labels)), "label": labels}
        return {"question": question, "choices": choices, "answerKey": rng.choice(labels)}
    if task == "hellaswag":
        wiki = f"{text(1, 3)} [title] {text(1, 3)}  [step] {text(1, 4)} [end]"
        record = {"activity_label": text(1, 2).title(), "ctx_a": rng.choice([wiki, text(3, 8)])}
        record["ctx_b"] = rng.choice(["", f"the {text(1, 3).title()}"])
        endings = [f"{ending}{rng.choice(['', ' [substeps] Then.'])}" for ending in texts(4)]
        return record | {"endings": endings, "label": str(rng.randrange(4))}
    if task == "truthfulqa":
        answers = list(dict.fromkeys(texts(7)))
        mc1 = {"choices": answers[1:5], "labels": [1, 0, 0, 0]}
        mc2 = {"choices": answers, "labels": [1, 1, *[0] * (len(answers) - 2)]}
        return {"question": question, "mc1_targets": mc1, "mc2_targets": mc2}
    if task == "piqa":
        sol1, sol2 = texts(2)
        return {"goal": question, "sol1": sol1, "sol2": sol2, "label": rng.randrange(2)}
    if task == "winogrande":
        option1, option2 = texts(2)
        record = {"sentence": f"{text(2, 5)} _ {text(2, 5)}.", "option1": option1}
        return record | {"option2": option2, "answer": rng.choice("12")}
    if task == "boolq":
        record = {"question": question.lower()[:-1], "passage": f"{text(20, 30)}."}
        return record | {"answer": rng.random() < 0.5}
    return {"question": question, "answer": solution(rng)}


def hub_records(task: str, count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(f"{task} {seed}")
    return [hub_record(task, rng) for _ in range(count)]


def write_jsonl(file: Path, records: list[dict]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
