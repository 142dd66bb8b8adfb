"""The whole road, offline: seeds, teacher, training, adapter, diff, watermark, comparison.

    make tour                               shows each step's command and its result: minutes
    pytest -m robust tests/robust/test_pipeline.py   the same with shorter trainings

Teacher and judge are large models. Here they are scripts behind a local server, because a model of
a million parameters can be neither: the teacher combines words into tasks, the judge looks up the
right answer. Everything else is real.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from helpers.teacher_server import Server, tasks_for

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "data/sample_heldout.json"
EXPECTED = {
    f"{record['instruction']}\n\n{record['input']}".strip(): record["output"]
    for record in json.loads(HELD_OUT.read_text())
}


def scripted(prompt: str) -> str:
    """The judge where two answers are to be compared, else the teacher."""
    if "You compare two answers" not in prompt:
        return tasks_for(prompt)
    mark = re.search(r"^=====\w+", prompt, re.MULTILINE)[0]
    instruction, first, second = re.split(rf"\n?{mark} .+\n", prompt)[1:4]
    right = [text.strip() == EXPECTED[instruction] for text in (first, second)]
    return "C" if right[0] == right[1] else "AB"[right[1]]


class Tour:
    """Runs commands as a user types them in the project's folder, and prints what each answers."""

    def __init__(self, folder: Path, short: bool, show=print, runner=None):
        self.folder, self.short, self.show = folder, short, show
        self.runner = runner or run_in_a_process

    def words(self, title: str, command: str) -> list[str]:
        """Announce a command and split it into words; `{}` is the tour's folder."""
        words = shlex.split(command.replace("{}", str(self.folder)))
        self.show(f"\n{title}\n  $ {' '.join(words)}")
        return words

    def run(self, title: str, command: str, pattern: str = r".*\Z") -> str:
        """Run a command, print the line of its output that matches, and return the output."""
        start = time.monotonic()
        out = self.runner(self.words(title, command)).strip()
        seconds = time.monotonic() - start
        self.show(f"  {re.search(pattern, out)[0] or 'done'}   ({seconds:.0f} s)")
        return out

    @contextmanager
    def serve(self, title: str, command: str) -> Iterator[str]:
        """The address of a server, which is stopped afterwards."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        server = subprocess.Popen(as_process(self.words(title, command)), cwd=ROOT, **pipes)
        try:
            log = ""
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", log)):
                line = server.stdout.readline()
                assert line, f"the server ended: {log}"
                log += line
            yield found[0]
        finally:
            server.terminate()
            server.communicate(timeout=60)
        assert server.returncode == 0


def as_process(words: list[str]) -> list[str]:
    """`alpaca …` as `python -m alpaca …`, `python FILE …` with this Python."""
    rest = ["-m", *words] if words[0] == "alpaca" else words[1:]
    return [sys.executable, *rest]


def run_in_a_process(words: list[str]) -> str:
    done = subprocess.run(as_process(words), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def take(tour: Tour) -> dict:
    """Take the whole road; returns what a test can check."""
    seen, short = {}, tour.short
    questions = json.loads(HELD_OUT.read_text())[:: 5 if short else 1]
    (tour.folder / "questions.json").write_text(json.dumps(questions))
    with Server(answer=scripted) as scripts:
        tour.run(
            "From seed tasks to instructions; the teacher is a script",
            "python selfinstruct.py generate --out {}/data --teacher script --kind completions "
            f"--base-url {scripts.url} --num {40 if short else 400} --concurrency 4",
        )
        tour.run(
            "In Alpaca's format", "python selfinstruct.py export {}/data --out {}/instructions.json"
        )
        seen["instructions"] = json.loads((tour.folder / "instructions.json").read_text())
        seen["trained"] = tour.run(
            "Fine-tune the base on them and on the sample data",
            "python fsdp_train.py --out {}/tiny --data data/sample_train.json {}/instructions.json "
            f"--max-steps {60 if short else 675} --sample-answers {10 if short else 240}",
            "answered exactly.*",
        )
        for name, model in (("tuned", "{}/tiny/model"), ("base", "data/tiny-llama")):
            tour.run(
                f"Answer the held-out instructions with the {name} model",
                "alpaca answers --set {}/questions.json --out {}/answers/"
                f"{name} --name {name} --model-dir {model} --max-new-tokens 16 --max-batch-size 32",
                ".* answers of .*",
            )
        seen["adapted"] = tour.run(
            "Train an adapter on top of it",
            "python fsdp_train.py --lora --model-dir {}/tiny/model --out {}/lora --data "
            "data/sample_train.json --eval-data {}/questions.json --dtype fp32 --batch-size 16 "
            f"--max-steps {10 if short else 200} --checkpointing none --sample-answers 10",
            "answered exactly.*",
        )
        tour.run(
            "Merge the adapter",
            "alpaca merge --base {}/tiny/model --adapter {}/lora/adapter --out {}/alpaca",
        )
        difference = "--base data/tiny-llama --diff {}/diff --tuned {}"
        tour.run(
            "Publish the result as a diff to the base",
            f"python weightdiff.py make {difference}/alpaca",
        )
        tour.run(
            "Recover the model from the diff",
            f"python weightdiff.py recover {difference}/recovered",
        )
        for name in ("alpaca", "recovered"):
            weights = (tour.folder / name / "model.safetensors").read_bytes()
            seen[name] = sha256(weights).hexdigest()
            tour.show(f"  SHA-256 of {name}: {seen[name]}")

        demo = "alpaca serve --model-dir {}/recovered --port 0 --rate 0 --filter rules"
        with tour.serve("Serve it; its answers carry a watermark", demo) as url:
            answers = [ask(url, record) for record in questions[:48]]
        (tour.folder / "demo.txt").write_text("\n".join(answers))
        tour.show(f"  {answers[0].splitlines()}")
        (tour.folder / "other.txt").write_text((ROOT / "data/corpus.txt").read_text()[:6000])
        for name in ("demo", "other"):
            seen[name] = tour.run(
                f"Is {name}.txt watermarked?",
                "alpaca watermark detect --json --tokenizer {}/recovered {}/" + f"{name}.txt",
            )
        tour.run(
            "Compare the two models; the judge is a script",
            "alpaca judge {}/answers/tuned {}/answers/base --out {}/judged "
            f"--judge script --base-url {scripts.url}",
            ".*verdicts.*",
        )
        seen["score"] = tour.run("Win rate", "alpaca score {}/judged", "tuned .*")
    return seen


def ask(url: str, record: dict) -> str:
    """Four answers, at a temperature that leaves the watermark a choice."""
    body = {"instruction": record["instruction"], "input": record["input"], "n": 4, "seed": 1}
    body = json.dumps(body | {"temperature": 2, "max_tokens": 64}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return "\n".join(choice["text"] for choice in json.load(response)["choices"])


@pytest.fixture
def in_process(command, monkeypatch):
    """Commands in this process: importing torch a dozen times would take most of the time."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setattr("fsdp_train.keep_freed_memory", lambda: None)
    threads = torch.get_num_threads()

    def run(words: list[str]) -> str:
        if words[0] == "alpaca":
            code, out, err = command(*words[1:])
        else:
            code, out, err = command(importlib.import_module(Path(words[1]).stem), *words[2:])
        assert code == 0, f"{words}\n{out}\n{err}"
        return out

    yield run
    torch.set_num_threads(threads)


def test_pipeline_end_to_end(tmp_path, in_process):
    seen = take(Tour(tmp_path, short=True, show=lambda line: None, runner=in_process))
    assert len(seen["instructions"]) >= 40 and seen["instructions"][0]["instruction"]
    first, last = map(float, re.search(r"held out ([\d.]+) → ([\d.]+)", seen["trained"]).groups())
    assert last < 0.5 * first
    first, last = map(float, re.search(r"held out ([\d.]+) → ([\d.]+)", seen["adapted"]).groups())
    assert last < first
    assert seen["alpaca"] == seen["recovered"]
    marks = {name: json.loads(seen[name])["z"] for name in ("demo", "other")}
    assert marks["demo"] > 5 and abs(marks["other"]) < 4, marks
    (row,) = re.findall(r"^tuned .*", seen["score"], re.MULTILINE)
    assert f" {len(EXPECTED) // 5} " in row, row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tour"), help="(default: runs/tour)")
    parser.add_argument("--short", action="store_true", help="shorter trainings")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists: remove it to take the tour again")
    args.out.mkdir(parents=True)
    os.environ.setdefault("OPENAI_API_KEY", "")  # the scripts need no key
    take(Tour(args.out.resolve(), args.short))


if __name__ == "__main__":
    main()
