"""The tiny model learns from preferences, by each method in turn: ten minutes on two cores.

    python -m bench.farm [--out runs/farm] [--too-far]

AlpacaFarm's road in miniature (arXiv:2305.14387). The model of `make train` draws eight answers to
each of its 5,400 training instructions, and the checker `exact` says which are right. Its verdicts
make pairs of a right and a wrong answer, a quarter of them turned around, and expert iteration's
picks. Each entry of METHODS learns from such a file. Before and after are measured:

  - the share of held-out instructions that are answered exactly, with its 95 % interval (Wilson),
    and for each part: a new `word`, a new `wording`, or only a new `question`
  - the best of N answers at temperature 1, if the checker picks: of 16, all that a model can answer
  - KL(π‖π_ref): the mean of log π - log π_ref over answers of π, scored by both models

The reward model writes no answers: it picks among those of the model before. The recipes were
chosen on 1,200 fresh held-out records (data/make_sample.py); the 240 shipped ones are answered at
the end. A step whose output exists is skipped: the same command resumes.
"""

import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alpaca.common.charts import interval_chart, line_chart
from alpaca.common.errors import UserError, run_command
from alpaca.common.files import atomic_file
from alpaca.evaluation.best_of import expected_best, model_rewards, read_rewards, with_answer
from alpaca.evaluation.outputs import save_json
from alpaca.evaluation.win_rate import sign_test, wilson
from alpaca.weights.loading import load_model
from bench.measure import ROOT, bench_parser
from dataset import encode_all, make_row, pack_rows
from tokenizer import load_tokenizer

BEFORE, TOO_FAR, REWARD = "before", "DPO too far", "reward model"
PARTS = ("word", "wording", "question")
CORES = 2  # steps at a time, each on one
N = (1, 4, 16)  # answers to pick from
SHARED: dict[str, Any] = {"dtype": "fp32", "save_dtype": "fp32", "checkpointing": "none"}
SHARED |= {"save_every": 0, "sample_answers": 0}
PAIRWISE = {"data": "pairs", "batch_size": 32, "epochs": 1, "learning_rate": 2e-5}
FAR = {"epochs": 2, "learning_rate": 1e-4}
GROUP = {"batch_size": 16, "samples": 8, "max_length": 192, "max_steps": 50, "learning_rate": 2e-5}
METHODS: dict[str, dict[str, Any]] = {  # flags of fsdp_train.py; make_data() makes the data
    "more SFT": {"data": "train", "batch_size": 16, "epochs": 1, "learning_rate": 1e-4},
    "DPO": {"objective": "dpo", "beta": 0.1, **PAIRWISE},
    TOO_FAR: {"objective": "dpo", "beta": 0.1, **PAIRWISE, **FAR},
    "IPO": {"objective": "ipo", "beta": 0.1, **PAIRWISE},
    "DPO per token": {"objective": "dpo-norm", "beta": 1, **PAIRWISE},
    "expert iteration": {"data": "mixed", "batch_size": 16, "epochs": 2, "learning_rate": 1e-4},
    "group": {"objective": "group", "check": "exact", "data": "mixed", **GROUP},
    "reward model": {"objective": "reward", **PAIRWISE, "epochs": 2, "learning_rate": 3e-4},
}


def start(*words: object, **flags: Any) -> None:
    """Run a command of this project as a user would, on one core."""
    typed = [*map(str, words)]
    for name, value in flags.items():
        typed += [f"--{name.replace('_', '-')}", str(value)]
    program = ["-m", "alpaca"] if words[0] == "alpaca" else [str(ROOT / typed[0])]
    command = [sys.executable, *program, *typed[1:]]
    shown = (os.path.relpath(word) if os.path.isabs(word) else word for word in command[1:])
    sys.stdout.write(f"$ python {' '.join(shown)}\n")  # at once: other threads print, too
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(typed)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def parallel(steps: Iterable[Callable]) -> None:
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(lambda step: step(), steps))


def draw(model: Path, data: Path, out: Path, n: int, temperature: float) -> Path:
    """n answers to each record of `data`."""
    if not out.exists():
        unfinished = out.with_suffix(".unfinished")  # resumed by the command
        flags = {"model_dir": model, "data": data, "n": n, "temperature": temperature}
        flags |= {"dtype": "fp32", "max_new_tokens": 40, "max_batch_size": 64, "out": unfinished}
        start("alpaca", "samples", **flags)
        unfinished.rename(out)
    return out


def make_data(args: Namespace) -> dict[str, Path]:
    """What the checker makes of the model's answers to training instructions, and what is held out:
    the fresh records, some of them to draw several answers to, and the shipped ones."""
    names = ("train", "samples", "pairs", "mixed", "fresh", "some", "shipped")
    files = {name: args.out / f"{name}.json" for name in names}
    records = json.loads((ROOT / "data/sample_train.json").read_text())[: args.records]
    save_json(files["train"], records)
    if not files["samples"].exists():
        halves = [args.out / f"train-{k}.json" for k in range(CORES)]
        for k, half in enumerate(halves):
            save_json(half, records[k::CORES])
        each = partial(draw, args.model_dir, n=8, temperature=1)
        parallel(partial(each, half, half.with_suffix(".jsonl")) for half in halves)
        with atomic_file(files["samples"]) as file:
            file.write(b"".join(half.with_suffix(".jsonl").read_bytes() for half in halves))
    if not files["pairs"].exists():
        flags = {"check": "exact", "flip": 0.25, "pairs": files["pairs"]}
        start("alpaca", "best-of", files["samples"], **flags)
    # `mixed`: records with right and wrong answers; for `exact` a right one is the reference
    fields, pairs = ("instruction", "input", "output"), json.loads(files["pairs"].read_text())
    save_json(files["mixed"], [{name: pair[name] for name in fields} for pair in pairs])
    start("data/make_sample.py", "fresh", count=args.fresh, out=files["fresh"])
    save_json(files["some"], json.loads(files["fresh"].read_text())[::4])
    save_json(files["shipped"], json.loads((ROOT / "data/sample_heldout.json").read_text()))
    return files


def checked(samples: Path) -> tuple[list[dict], np.ndarray]:
    """Each answer as a record of its own, and which are right: (records, n)."""
    args = Namespace(samples=samples, check="exact", reward_model=None)
    records, answers, rewards = read_rewards(args)
    pairs = zip(records, answers, strict=True)
    return [with_answer(record, text) for record, some in pairs for text in some], rewards


@torch.no_grad()
def log_probs(folder: Path, records: list[dict]) -> Tensor:
    """log π of each record's answer, summed over its tokens and EOS."""
    model = load_model(folder, dtype=torch.float32)
    examples = encode_all(records, [""] * len(records), load_tokenizer(folder), 512)
    found = torch.empty(len(examples))
    for which in pack_rows(examples.lengths, 1, 4096)[0]:
        row = make_row(examples, np.array(which))
        losses = model(**row._asdict(), reduction="none")
        document = torch.searchsorted(row.cu_seqlens.long(), row.supervised, right=True) - 1
        found[which] = torch.zeros(len(which)).index_add(0, document, -losses)
    return found


def measure(model: Path, base: Path, files: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Of the fresh records: which are answered, the best of N answers to some of them, KL."""
    right = checked(draw(model, files["fresh"], folder / "greedy.jsonl", 1, 0))[1]
    samples = draw(model, files["some"], folder / "samples.jsonl", max(N), 1)
    records, rewards = checked(samples)
    best = [expected_best(rewards, n).mean() for n in N]
    kl = 0.0, 0.0
    if model != base:
        first = [record for i, record in enumerate(records) if i % max(N) < 4]  # KL needs no more
        ratios = log_probs(model, first) - log_probs(base, first)
        kl = ratios.mean().item(), ratios.std().item() / len(ratios) ** 0.5
    return {"right": right[:, 0].tolist(), "best": best, "kl": kl}


def rerank(model: Path, samples: Path) -> dict[str, Any]:
    """Which records are answered if a reward model picks among N answers."""
    records, right = checked(samples)
    rewards = np.reshape(model_rewards(model, records), right.shape)
    picked = [right[np.arange(len(right)), rewards[:, :n].argmax(1)] for n in N]
    return {"right": picked[-1].tolist(), "best": [each.mean() for each in picked], "kl": None}


def train_and_measure(name: str, held_out: str, files: dict[str, Path], args: Namespace) -> None:
    """Write what `name` answers of the records `held_out`: fresh or shipped."""
    folder, base = args.out / name.replace(" ", "-"), args.model_dir
    model = base
    folder.mkdir(exist_ok=True)
    if (folder / f"{held_out}.json").exists():
        return
    if name != BEFORE and not (model := folder / "model").exists():
        flags = SHARED | METHODS[name] | {"data": files[METHODS[name]["data"]], "out": folder}
        flags |= {"max_steps": args.max_steps} if args.max_steps else {}
        start("fsdp_train.py", model_dir=base, **flags)
    answers = folder / f"{held_out}.jsonl"
    if name == REWARD:
        drawn = args.out / BEFORE / "samples.jsonl"  # of the fresh records, by the first step
        if held_out == "shipped":
            drawn = draw(base, files["shipped"], answers, max(N), 1)
        result = rerank(model, drawn)
    elif held_out == "fresh":
        result = measure(model, base, files, folder)
    else:
        right = checked(draw(model, files["shipped"], answers, 1, 0))[1]
        result = {"right": right[:, 0].tolist()}
    save_json(folder / f"{held_out}.json", result)


def interval(right: np.ndarray) -> tuple[float, float, float]:
    low, high = wilson(right.sum(), len(right))
    return low, right.mean(), high


def report(names: list[str], files: dict[str, Path], out: Path) -> str:
    """The table; the charts are written into `out`."""
    parts = np.array([record["new"] for record in json.loads(files["fresh"].read_text())])
    heads = ["model", "shipped", "fresh", "won : lost (p)", *PARTS]
    heads += [*(f"best of {n}" for n in N), "KL"]
    lines, rows, curves = [heads, ["---"] * len(heads)], {}, {}
    for name in names:
        found = (out / name.replace(" ", "-") / f"{each}.json" for each in ("fresh", "shipped"))
        fresh, shipped = (json.loads(file.read_text()) for file in found)
        right, best, kl = np.array(fresh["right"]), fresh["best"], fresh["kl"]
        if name == BEFORE:
            before = right
            origin, bounds = (0.0, best[0]), [math.log(n) - (n - 1) / n for n in N]
            curves["best of 1, 4, 16: KL at most"] = list(zip(bounds, best, strict=True))
        elif kl:
            curves.setdefault(name.removesuffix(" too far"), [origin]).append((kl[0], best[0]))
        step = len(before) // len(right)  # the reward model judges answers to some records
        won, lost = (right > before[::step]).sum(), (right < before[::step]).sum()
        by_part = {part: right[parts[::step] == part] for part in PARTS}
        rows[name] = {part: interval(some) for part, some in by_part.items()}
        shares = (interval(np.array(some)) for some in (shipped["right"], right))
        cells = [name, *(f"{share:.1%} ({low:.1%}–{high:.1%})" for low, share, high in shares)]
        cells += [f"{won} : {lost} ({sign_test(int(won), int(lost)):.2g})"]
        cells += [f"{share:.1%}" for share in (*map(np.mean, by_part.values()), *best)]
        lines.append([*cells, f"{kl[0]:.3f} ± {1.96 * kl[1]:.3f}" if kl else ""])
    title = "Fresh held-out records answered exactly, by what is new"
    (out / "accuracy.svg").write_text(interval_chart(title, rows, 0.2, 1))
    titles = "Reward at temperature 1", "KL divergence from the model before"
    (out / "reward-kl.svg").write_text(line_chart(*titles, curves))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = bench_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "runs/farm", help="(default: runs/farm)")
    add("--model-dir", type=Path, default=ROOT / "runs/tiny/model", help="(default: make train's)")
    add("--records", type=int, help="learn from the first N training records (default: all)")
    add("--fresh", type=int, default=1200, help="held-out records to draw (default: 1200)")
    add("--max-steps", type=int, help="end each training after N steps")
    add("--too-far", action="store_true", help=f"also train {TOO_FAR!r} (over a minute more)")
    args, began = parser.parse_args(), time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.model_dir.exists():
        start("fsdp_train.py", out=args.model_dir.parent)
    files = make_data(args)
    names = [BEFORE, *(name for name in METHODS if name != TOO_FAR or args.too_far)]
    for held_out in ("fresh", "shipped"):
        parallel(partial(train_and_measure, name, held_out, files, args) for name in names)
    table = report(names, files, args.out)
    (args.out / "table.md").write_text(f"{table}\n")
    minutes = (time.monotonic() - began) / 60
    print(f"\n{table}\n\n{minutes:.1f} minutes; table and charts are in {args.out}")


if __name__ == "__main__":
    run_command(main)
