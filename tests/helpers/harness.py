"""lm-eval on local files: its own task definitions, with nothing but the data replaced."""

import json
from pathlib import Path
from typing import Any

import pytest

from alpaca.common.json_files import read_log
from helpers.benchmarks import hub_records, write_jsonl
from helpers.parity import apart

YAML = {
    "mmlu": "mmlu/default/mmlu_abstract_algebra.yaml",
    "arc": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
CHOICES = [name for name in YAML if name != "gsm8k"]
SHOTS = {"mmlu": 5, "boolq": 2, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0}  # others: 1


def harness_task(name: str, file: Path, shots_file: Path, shots: int) -> Any:
    """A task as lm-eval defines it, on our records; its shots are the first of a file."""
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(tasks.__file__).parent / YAML[name])
    files = {"test": str(file), "train": str(shots_file)}
    config |= {"dataset_path": "json", "dataset_name": None, "num_fewshot": shots}
    config |= {"dataset_kwargs": {"data_files": files, "cache_dir": str(file.parent / "cache")}}
    config |= {"training_split": None, "validation_split": None, "test_split": "test"}
    config |= {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    return ConfigurableTask(config=config)


def harness_results(name: str, task: Any, lm: Any) -> tuple[list[list], dict[str, float]]:
    """What lm-eval's model returns for each request of each question, and the metrics."""
    from lm_eval.evaluator import evaluate

    found = evaluate(lm, {"tasks": {name: task}}, bootstrap_iters=0)
    responses = {sample["doc_id"]: sample["resps"] for sample in found["samples"][name]}
    metrics = {key.split(",")[0]: value for key, value in found["results"][name].items()}
    return [[each for (each,) in responses[i]] for i in range(len(responses))], metrics


def harness_primer(task: Any) -> str:
    """The questions and answers that lm-eval's TruthfulQA begins with."""
    prompt, marker = task.doc_to_text({"question": "?"}), "\n\nQ: ?\nA:"
    assert prompt.endswith(marker)
    return prompt.removesuffix(marker)


def compare_with_harness(
    name: str, lm: Any, model: Path, command: Any, folder: Path, allowed: float, count: int = 12
) -> None:
    """lm-eval and `alpaca benchmark` on the same files: log-likelihoods and accuracies."""
    records = [hub_records(name.split("_")[0], *each) for each in ((count, 0), (5, 1))]
    if name == "boolq":  # lm-eval reads SuperGLUE's form
        records = [[r | {"label": int(r.pop("answer"))} for r in each] for each in records]
    file = write_jsonl(folder / "challenge.jsonl", records[0])
    shots_file, shots = write_jsonl(folder / "challenge-dev.jsonl", records[1]), SHOTS.get(name, 1)
    task = harness_task(name, file, shots_file, shots)
    responses, metrics = harness_results(name, task, lm)

    flags = ["--shots", shots, "--shots-from", shots_file] if shots else []
    if name.startswith("truthfulqa"):
        (primer := folder / "primer.txt").write_text(harness_primer(task) + "\n")
        flags = ["--primer", primer]
    out = folder / "out"
    flags += ["--model-dir", model, "--dtype", "fp32", "--tasks", file, "--out", out]
    assert command("benchmark", *flags)[0] == 0
    lines = [line for line in read_log(out / "scores.jsonl") if line["task"].startswith(name)]
    lines.sort(key=lambda line: line["question"])
    for line, theirs in zip(lines, responses, strict=True):
        ours = line["log_likelihoods"], line["tokens"]
        for found, tokens, (expected, _) in zip(*ours, theirs, strict=True):
            what = f"{model.stem}: log-likelihood of a token in an answer: lm-eval"
            apart(what, abs(found - expected) / tokens, allowed)
    (row, *_) = (
        row
        for row in json.loads((out / "results.json").read_text())["results"]
        if row["task"].startswith(name)
    )
    assert row["accuracy"] == pytest.approx(100 * metrics["acc"], abs=100 * allowed)
    if "acc_norm" in metrics:
        assert row["accuracy_per_character"] == pytest.approx(100 * metrics["acc_norm"])
