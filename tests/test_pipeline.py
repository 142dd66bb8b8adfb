"""The whole road, offline: seeds, teacher, training, adapter, diff, watermark, comparison.

    make tour                        each step's command and what came of it: minutes
    pytest tests/test_pipeline.py    the same with shorter trainings

Teacher and judge are large models. Here they are scripts behind a local server, since a model of a
million parameters can be neither: the teacher puts tasks together from words, the judge looks up
the right answer. Everything else is what it says.
"""

import argparse
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
from teacher_server import Server, tasks_for

ROOT = Path(__file__).parent.parent
HELD_OUT, TRAINING = ROOT / "data/sample_heldout.json", ROOT / "data/sample_train.json"
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
    """Commands as a user would type them, in the project's folder; `say` hears of each step."""

    def __init__(self, folder: Path, short: bool, say=print):
        self.folder, self.short, self.say = folder, short, say
        self.environment = os.environ | {"OPENAI_API_KEY": "none"}

    def run(self, what: str, command: str) -> str:
        """`{}` in a command is the tour's folder."""
        start = time.monotonic()
        words = shlex.split(command.replace("{}", str(self.folder)))
        self.say(f"\n{what}\n  $ {command.replace('{}', str(self.folder))}")
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        last = (done.stdout.strip().splitlines() or ["done"])[-1]
        self.say(f"  {last}   ({time.monotonic() - start:.0f} s)")
        return done.stdout

    def steps(self, full: int, short: int) -> str:
        return f"--max-steps {short if self.short else full}"

    @contextmanager
    def demo(self, command: str) -> Iterator[str]:
        """The demo while it serves; its address."""
        self.say(f"\nThe model answers from the demo, watermarked\n  $ {command}")
        words = shlex.split(command.replace("{}", str(self.folder)))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        server = subprocess.Popen([sys.executable, *words[1:]], cwd=ROOT, **pipes)
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


def take(tour: Tour) -> dict:
    """The road. What can be checked of each step is returned."""
    seen = {}
    with Server(answer=scripted) as scripts:
        number = 40 if tour.short else 400
        tour.run(
            "Seeds to instructions, by a teacher that is a script",
            "python selfinstruct.py generate --out {}/data --teacher script --kind completions "
            f"--base-url {scripts.url} --num {number} --in-flight 4",
        )
        tour.run("In Alpaca's format", "python selfinstruct.py export {}/data --out {}/taught.json")
        seen["taught"] = len(json.loads((tour.folder / "taught.json").read_text()))

        seen["trained"] = tour.run(
            "Training, on the sample and what the teacher wrote",
            "python fsdp_train.py --out {}/tiny --data data/sample_train.json {}/taught.json "
            f"{tour.steps(675, 120)} --epochs 2",
        )
        for name, model in (("tiny", "{}/tiny/model"), ("base", "data/tiny-llama")):
            tour.run(
                f"Held-out instructions, answered by {name}",
                f"python evaluate.py answers --set {HELD_OUT} --out {{}}/{name}-answers "
                f"--name {name} --model-dir {model} --max-new-tokens 24 --rows 32",
            )
        seen["adapted"] = tour.run(
            "An adapter on top",
            "python fsdp_train.py --lora --model-dir {}/tiny/model --out {}/lora "
            f"--data {TRAINING} --eval-data {HELD_OUT} --dtype fp32 --batch-size 16 "
            f"--row-tokens 2048 {tour.steps(200, 20)} --answers 240",
        )
        tour.run(
            "Merged into the model",
            "python lora.py merge --base {}/tiny/model --adapter {}/lora/adapter --out {}/merged",
        )
        tour.run(
            "Published as a difference to the base",
            "python weightdiff.py make --base data/tiny-llama --tuned {}/merged --diff {}/diff "
            "--compress",
        )
        tour.run(
            "And recovered from it",
            "python weightdiff.py recover --base data/tiny-llama --diff {}/diff "
            "--tuned {}/recovered",
        )
        for name in ("merged", "recovered"):
            weights = (tour.folder / name / "model.safetensors").read_bytes()
            seen[name] = sha256(weights).hexdigest()
            tour.say(f"  {name}: SHA-256 {seen[name]}")

        command = "python demo.py --model-dir {}/recovered --port 0 --rate 0 --filter rules"
        command += " --reports {}/reports.jsonl"
        with tour.demo(command) as url:
            answer = ask(url, "Tell me a long list of words.")
        (tour.folder / "answer.txt").write_text(answer)
        tour.say(f"  {len(answer)} characters at temperature 2")
        mark = "python watermark.py detect --tokenizer {}/recovered {}/answer.txt"
        seen["marked"] = tour.run("Its answers bear the mark", mark)
        (tour.folder / "human.txt").write_text((ROOT / "data/corpus.txt").read_text()[:6000])
        mark = mark.replace("answer.txt", "human.txt")
        seen["unmarked"] = tour.run("Other text does not", mark)

        tour.run(
            "Two models compared, by a judge that is a script",
            "python evaluate.py judge {}/tiny-answers {}/base-answers --out {}/judged "
            f"--judge script --base-url {scripts.url}",
        )
        seen["score"] = tour.run("The score", "python evaluate.py score {}/judged --json")
    return seen


def ask(url: str, instruction: str) -> str:
    """Answers drawn at a temperature that leaves the watermark something to choose from."""
    body = {"instruction": instruction, "temperature": 2, "max_tokens": 200, "n": 8, "seed": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return "\n".join(choice["text"] for choice in json.load(response)["choices"])


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_whole_road(tmp_path, short):
    seen = take(Tour(tmp_path, short, say=lambda line: None))
    assert seen["taught"] >= 40
    first, last = map(float, re.search(r"held out ([\d.]+) → ([\d.]+)", seen["trained"]).groups())
    assert last < (0.5 if short else 0.1) * first
    assert "held-out instructions" in seen["adapted"]
    assert seen["merged"] == seen["recovered"]
    marked, unmarked = (
        float(re.search(r"z\D*(-?[\d.]+)", seen[which])[1]) for which in ("marked", "unmarked")
    )
    assert marked > 6 and abs(unmarked) < 4
    (model,) = json.loads(seen["score"])
    assert model["model"] == "tiny" and model["n"] == 240 and model["win_rate"] > 55


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
    take(Tour(args.out.resolve(), args.short))


if __name__ == "__main__":
    main()
