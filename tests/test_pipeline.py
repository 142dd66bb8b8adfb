"""The whole road, offline: seeds, teacher, training, adapter, diff, watermark, comparison.

    make tour                        each step's command and what came of it: minutes
    pytest tests/test_pipeline.py    the same with shorter trainings

Teacher and judge are large models. Here they are scripts behind a local server, since a model of a
million parameters can be neither: the teacher puts tasks together from words, the judge looks up
the right answer. Everything else is what it says.
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

ROOT = Path(__file__).parent.parent
HELD_OUT = ROOT / "data/sample_heldout.json"
EXPECTED = {
    f"{record['instruction']}\n\n{record['input']}".strip(): record["output"]
    for record in json.loads(HELD_OUT.read_text())
}


def scripted(prompt: str) -> str:
    """The judge, if two answers are to be compared; else the teacher."""
    if "You compare two answers" not in prompt:
        return tasks_for(prompt)
    mark = re.search(r"^=====\w+", prompt, re.MULTILINE)[0]
    instruction, first, second = re.split(rf"\n?{mark} .+\n", prompt)[1:4]
    right = [text.strip() == EXPECTED[instruction] for text in (first, second)]
    return "C" if right[0] == right[1] else "AB"[right[1]]


class Tour:
    """Commands as a user types them in the project's folder, and what came of each, told."""

    def __init__(self, folder: Path, short: bool, say=print, runner=None):
        self.folder, self.short, self.say = folder, short, say
        self.runner = runner or self.in_a_process

    def words(self, command: str) -> list[str]:
        """`{}` in a command is the tour's folder."""
        return shlex.split(command.replace("{}", str(self.folder)))

    def run(self, what: str, command: str, shows: str = r".*\Z") -> str:
        """`shows` finds the line that is told."""
        self.say(f"\n{what}\n  $ {' '.join(self.words(command))}")
        start = time.monotonic()
        out = self.runner(self.words(command)).strip()
        self.say(f"  {re.search(shows, out)[0] or 'done'}   ({time.monotonic() - start:.0f} s)")
        return out

    def in_a_process(self, words: list[str]) -> str:
        done = subprocess.run(
            as_process(words), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @contextmanager
    def served(self, what: str, command: str) -> Iterator[str]:
        """The demo, while it serves; its address."""
        self.say(f"\n{what}\n  $ {' '.join(self.words(command))}")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        server = subprocess.Popen(as_process(self.words(command)), cwd=ROOT, **pipes)
        try:
            told = ""
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", told)):
                line = server.stdout.readline()
                assert line, f"the demo ended: {told}"
                told += line
            yield found[0]
        finally:
            server.terminate()
            server.communicate(timeout=60)
        assert server.returncode == 0


def as_process(words: list[str]) -> list[str]:
    return [
        sys.executable,
        *(["-m"] if words[0] == "alpaca" else words[:0]),
        *words[words[0] != "alpaca" :],
    ]


def take(tour: Tour) -> dict:
    """The road; what can be checked of it."""
    seen, short = {}, tour.short
    questions = json.loads(HELD_OUT.read_text())[:: 5 if short else 1]
    (tour.folder / "questions.json").write_text(json.dumps(questions))
    with Server(answer=scripted) as scripts:
        tour.run(
            "From seeds to instructions; the teacher is a script",
            "python selfinstruct.py generate --out {}/data --teacher script --kind completions "
            f"--base-url {scripts.url} --num {40 if short else 400} --concurrency 4",
        )
        tour.run("In Alpaca's format", "python selfinstruct.py export {}/data --out {}/taught.json")
        seen["taught"] = json.loads((tour.folder / "taught.json").read_text())
        seen["trained"] = tour.run(
            "A base is trained on them, and on the sample data",
            "python fsdp_train.py --out {}/tiny --data data/sample_train.json {}/taught.json "
            f"--max-steps {60 if short else 675} --sample-answers {10 if short else 240}",
            "answered exactly.*",
        )
        for name, model in (("tuned", "{}/tiny/model"), ("base", "data/tiny-llama")):
            tour.run(
                f"Held-out instructions, answered by the {name} model",
                "alpaca answers --set {}/questions.json --out {}/answers/"
                f"{name} --name {name} --model-dir {model} --max-new-tokens 16 --max-batch-size 32",
                ".* answers of .*",
            )
        seen["adapted"] = tour.run(
            "An adapter learns on top of it",
            "python fsdp_train.py --lora --model-dir {}/tiny/model --out {}/lora --data "
            "data/sample_train.json --eval-data {}/questions.json --dtype fp32 --batch-size 16 "
            f"--max-steps {10 if short else 200} --checkpointing none --sample-answers 10",
            "answered exactly.*",
        )
        tour.run(
            "And becomes part of it",
            "alpaca merge --base {}/tiny/model --adapter {}/lora/adapter --out {}/alpaca",
        )
        difference = "--base data/tiny-llama --diff {}/diff --tuned {}"
        tour.run(
            "Published as a difference to the base",
            f"python weightdiff.py make {difference}/alpaca --compress",
        )
        tour.run(
            "Which somebody else recovers",
            f"python weightdiff.py recover {difference}/recovered",
        )
        for name in ("alpaca", "recovered"):
            weights = (tour.folder / name / "model.safetensors").read_bytes()
            seen[name] = sha256(weights).hexdigest()
            tour.say(f"  SHA-256 of {name}: {seen[name]}")

        demo = "alpaca serve --model-dir {}/recovered --port 0 --rate 0 --filter rules"
        with tour.served("The demo answers, and marks what it says", demo) as url:
            answers = [ask(url, record) for record in questions[:48]]
        (tour.folder / "demo.txt").write_text("\n".join(answers))
        tour.say(f"  {answers[0].splitlines()}")
        (tour.folder / "other.txt").write_text((ROOT / "data/corpus.txt").read_text()[:6000])
        for name in ("demo", "other"):
            seen[name] = tour.run(
                f"Is there a mark in {name}.txt?",
                "alpaca watermark detect --json --tokenizer {}/recovered {}/" + f"{name}.txt",
            )
        tour.run(
            "Which model is better? The judge is a script",
            "alpaca judge {}/answers/tuned {}/answers/base --out {}/judged "
            f"--judge script --base-url {scripts.url}",
            ".*verdicts.*",
        )
        seen["score"] = tour.run("The score", "alpaca score {}/judged", "tuned .*")
    return seen


def ask(url: str, record: dict) -> str:
    """Four answers, at a temperature that leaves the watermark something to choose from."""
    body = {"instruction": record["instruction"], "input": record["input"], "n": 4, "seed": 1}
    body = json.dumps(body | {"temperature": 2, "max_tokens": 64}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return "\n".join(choice["text"] for choice in json.load(response)["choices"])


@pytest.fixture
def here(command, monkeypatch):
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


def test_the_whole_road(tmp_path, here):
    seen = take(Tour(tmp_path, short=True, say=lambda line: None, runner=here))
    assert len(seen["taught"]) >= 40 and seen["taught"][0]["instruction"]
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
        raise SystemExit(f"{args.out} is there: remove it to take the tour anew")
    args.out.mkdir(parents=True)
    os.environ.setdefault("OPENAI_API_KEY", "")  # the scripts want no key
    take(Tour(args.out.resolve(), args.short))


if __name__ == "__main__":
    main()
