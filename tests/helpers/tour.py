"""The whole road, offline: seeds, teacher, training, adapter, diff, watermark, comparison.

    make tour                                        minutes; ends with runs/tour/index.html
    pytest -m robust tests/robust/test_pipeline.py   the same with shorter trainings

Teacher and judge are large models. Here they are scripts behind a local server, because a model of
a million parameters can be neither: the teacher combines words into tasks, the judge looks up the
right answer. Everything else is real.
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from html import escape
from pathlib import Path

from helpers.teacher_server import Server, tasks_for

ROOT = Path(__file__).parents[2]
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>From seed tasks to a compared model</title>
<meta name="viewport" content="width=device-width"/><style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 sans-serif; max-width: 50rem; margin: auto; padding: 1rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; opacity: 0.8 }}
img {{ max-width: 100% }}
table {{ border-collapse: collapse }}
td, th {{ border: 1px solid gray; padding: 0.2rem 0.5rem; text-align: left }}
</style></head><body><h1>From seed tasks to a compared model</h1>
<p>A base model of 1.07M parameters takes the road of Alpaca. Teacher and judge are scripts, because
they would be large models; all else is real. Each step has its command and what that printed.</p>
{}
</body></html>
"""
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
    """Runs commands as a user types them in the project's folder. It prints what each answers, and
    collects that for a page."""

    def __init__(self, folder: Path, short: bool, show=print, runner=None):
        self.folder, self.short, self.show = folder, short, show
        self.runner = runner or run_in_a_process
        self.parts: list[str] = []  # HTML

    def words(self, title: str, command: str) -> list[str]:
        """Announce a command and split it into words; `{}` is the tour's folder."""
        words = shlex.split(command.replace("{}", str(self.folder)))
        self.show(f"\n{title}\n  $ {' '.join(words)}")
        shown = escape(command.replace("{}", "runs/tour"))
        self.parts.append(f"<h2>{escape(title)}</h2><pre>{shown}</pre>")
        return words

    def run(self, title: str, command: str, pattern: str = r".*\Z") -> str:
        """Run a command, print the line of its output that matches, and return the output."""
        start = time.monotonic()
        out = self.runner(self.words(title, command)).strip()
        seconds = time.monotonic() - start
        self.result(f"{re.search(pattern, out)[0] or 'done'}   ({seconds:.0f} s)")
        return out

    def result(self, line: str) -> None:
        self.show(f"  {line}")
        line = line.replace(f"{self.folder}/", "")
        self.parts.append(f"<p><strong>{escape(line)}</strong></p>")

    def link(self, *files: str) -> None:
        """Pictures are shown, other files are linked."""
        for file in files:
            assert (self.folder / file).exists(), file
            if file.endswith(".svg"):
                self.parts.append(f'<p><img src="{file}" alt="{file}"/></p>')
        links = (f'<a href="{file}">{file}</a>' for file in files)
        self.parts.append(f"<p>{', '.join(links)}</p>")

    def table(self, *rows: Iterable[str]) -> None:
        """The first row has the columns' names."""
        lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        lines[0] = lines[0].replace("td>", "th>")
        self.parts.append("".join(["<table>", *(f"<tr>{line}</tr>" for line in lines), "</table>"]))

    def write_page(self) -> None:
        (self.folder / "index.html").write_text(PAGE.format("\n".join(self.parts)))

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
        tour.link("data/records.jsonl", "data/rejected.jsonl", "data/responses.jsonl")
        tour.run(
            "In Alpaca's format", "python selfinstruct.py export {}/data --out {}/instructions.json"
        )
        seen["instructions"] = json.loads((tour.folder / "instructions.json").read_text())
        columns = "instruction", "input", "output"
        tour.table(columns, *([r[c] for c in columns] for r in seen["instructions"][:3]))
        tour.run("Look at them", "alpaca curate report {}/data --out {}/report.html", ".*records.*")
        tour.link("instructions.json", "report.html")
        seen["trained"] = tour.run(
            "Fine-tune the base on them and on the sample data",
            "python fsdp_train.py --out {}/tiny --data data/sample_train.json {}/instructions.json "
            f"--max-steps {60 if short else 450} --sample-answers {10 if short else 240}",
            "answered exactly.*",
        )
        tour.link("tiny/loss.svg", "tiny/metrics.jsonl", "tiny/model/README.md")
        for name, model in (("tuned", "{}/tiny/model"), ("base", "data/tiny-llama")):
            tour.run(
                f"Answer the held-out instructions with the {name} model",
                "alpaca answers --set {}/questions.json --out {}/answers/"
                f"{name} --name {name} --model-dir {model} --max-new-tokens 16 --max-batch-size 32",
                ".* answers of .*",
            )
        tour.table(*answers_side_by_side(tour.folder))
        seen["adapted"] = tour.run(
            "Train an adapter on top of it",
            "python fsdp_train.py --lora --model-dir {}/tiny/model --out {}/lora --data "
            "data/sample_train.json --eval-data {}/questions.json --dtype fp32 --batch-size 16 "
            f"--max-steps {10 if short else 100} --checkpointing none --sample-answers 10",
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
            r".*\d bytes.*",
        )
        tour.run(
            "Recover the model from the diff",
            f"python weightdiff.py recover {difference}/recovered",
        )
        for name in ("alpaca", "recovered"):
            weights = (tour.folder / name / "model.safetensors").read_bytes()
            seen[name] = sha256(weights).hexdigest()
            tour.result(f"SHA-256 of {name}: {seen[name]}")
        tour.run(
            "Convert it for llama.cpp",
            "alpaca convert {}/recovered {}/alpaca.gguf --type q8_0",
        )
        tour.link("diff/manifest.json", "recovered/config.json", "alpaca.gguf")

        demo = "alpaca serve --model-dir {}/recovered --port 0 --rate 0 --filter rules"
        with tour.serve("Serve it; its answers carry a watermark", demo) as url:
            answers = [ask(url, record) for record in questions[:48]]
        (tour.folder / "demo.txt").write_text("\n".join(answers))
        tour.result(f"48 instructions, 4 answers each; to the first: {answers[0].splitlines()}")
        (tour.folder / "other.txt").write_text((ROOT / "data/corpus.txt").read_text()[:6000])
        for name in ("demo", "other"):
            seen[name] = tour.run(
                f"Is {name}.txt watermarked?",
                "alpaca watermark --tokenizer {}/recovered {}/" + f"{name}.txt",
                r"z +\S+",
            )
        tour.run(
            "Compare the two models; the judge is a script",
            "alpaca judge {}/answers/tuned {}/answers/base --out {}/judged "
            f"--judge script --base-url {scripts.url}",
            ".*verdicts.*",
        )
        seen["score"] = tour.run(
            "Win rate", "alpaca score {}/judged --plot {}/win-rates.svg", "tuned .*"
        )
        tour.link("win-rates.svg", "judged/annotations.json")
    tour.write_page()
    return seen


def answers_side_by_side(folder: Path) -> list[tuple[str, str, str, str]]:
    files = [folder / f"answers/{name}/model_outputs.json" for name in ("tuned", "base")]
    tuned, base = (json.loads(file.read_text()) for file in files)
    rows = [("instruction", "expected", "tuned", "base")]
    for a, b in [*zip(tuned, base, strict=True)][:: len(tuned) // 8]:
        asked = a["instruction"]
        rows.append((asked, EXPECTED.get(asked, ""), a["output"], b["output"]))
    return rows


def ask(url: str, record: dict) -> str:
    """Four answers, at a temperature that leaves the watermark a choice."""
    body = {"instruction": record["instruction"], "input": record["input"], "n": 4, "seed": 1}
    body = json.dumps(body | {"temperature": 2, "max_tokens": 64}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return "\n".join(choice["text"] for choice in json.load(response)["choices"])


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
    print(f"\nwrote {args.out}/index.html")


if __name__ == "__main__":
    main()
