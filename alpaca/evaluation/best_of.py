"""Pick the best of n answers by a reward: best-of-n, expert iteration, preference pairs.

    alpaca best-of runs/samples.jsonl --check exact                      # only the expected rewards
    alpaca best-of runs/samples.jsonl --check number --n 16 --min-reward 1 --out runs/best.json
    alpaca best-of runs/samples.jsonl --check rewards.py:short --pairs runs/pairs.json --flip 0.25
    alpaca best-of runs/samples.jsonl --reward-model runs/reward/model --out runs/best.json

--out is data for fsdp_train.py: training on the picks is expert iteration. --pairs is a preference
file, the best answer against the worst (the first of equally good ones). --flip swaps a share of
the pairs, as AlpacaFarm's simulated annotators do (arXiv:2305.14387): noise a method must survive.

What reward to expect of the best of N answers is estimated from all n answers of a record, without
bias. With their rewards r_1 ≤ … ≤ r_n, r_j is the best in (j - 1 choose N - 1) of all sets of N:

    E_N = Σ_j r_j · (j - 1 choose N - 1) / (n choose N)

The mean over records is printed with its 95 % interval, and with log N - (N - 1) / N, which the KL
divergence between best-of-N and the model that drew the answers does not exceed (arXiv:2401.01879).
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np

from alpaca.common.cli import finite, positive, share
from alpaca.common.errors import UserError, errors_at
from alpaca.common.files import refuse_same
from alpaca.common.json_files import check_shape, json_records
from alpaca.datagen.checkers import load_checker
from alpaca.datagen.formats import normalize_record
from alpaca.evaluation.outputs import save_json
from alpaca.evaluation.win_rate import Z


def expected_best(rewards: np.ndarray, N: int) -> np.ndarray:
    """E_N for each record's rewards: (records, n) → (records)."""
    n = rewards.shape[1]
    weights = [math.comb(j, N - 1) / math.comb(n, N) for j in range(n)]
    return np.sort(rewards, axis=1) @ np.array(weights)


def format_rewards(rewards: np.ndarray) -> str:
    """A line for each N = 1, 2, 4, …, n."""
    records, n = rewards.shape
    lines = [f"   N     reward  {'95 %':>23}     KL ≤"]
    for N in sorted({n, *(2**k for k in range(n.bit_length()))}):
        best = expected_best(rewards, N)
        mean, interval = best.mean(), "unknown"
        if records > 1:
            half = Z * best.std(ddof=1) / records**0.5
            interval = f"[{mean - half:#.3g}, {mean + half:#.3g}]"
        lines.append(f"{N:4}  {mean:#9.3g}  {interval:>23}  {math.log(N) - (N - 1) / N:7.2f}")
    return "\n".join(lines)


def with_answer(record: dict, answer: str) -> dict:
    if "messages" not in record:
        return record | {"output": answer}
    return {"messages": [*record["messages"][:-1], {"role": "assistant", "content": answer}]}


def make_comparison(record: dict, chosen: str, rejected: str) -> dict:
    """A line of a preference file; preferences.py reads it, and so does TRL if it has messages."""
    if "messages" not in record:
        return record | {"chosen": chosen, "rejected": rejected}
    texts = {"chosen": chosen, "rejected": rejected}
    return {name: with_answer(record, text)["messages"] for name, text in texts.items()}


def read_rewards(args: argparse.Namespace) -> tuple[list[dict], list[list[str]], np.ndarray]:
    """Records that have answers, the answers, and their rewards (records, n)."""
    check = load_checker(args.check) if args.check else lambda record, answer: math.nan
    records, answers, rewards = [], [], []
    for place, line in json_records(args.samples):
        if isinstance(line, dict) and "outputs" not in line:
            raise UserError(f"{place}: outputs is missing: give a file of `alpaca samples`")
        check_shape(line, {"outputs": [str]}, place)
        if not (outputs := line["outputs"]):  # the prompt was too long
            continue
        if answers and len(outputs) != len(answers[0]):
            raise UserError(f"{place}: {len(outputs)} answers, where others have {len(answers[0])}")
        with errors_at(place):
            records += normalize_record(line)
            rewards.append([check(records[-1], text) for text in outputs])
        answers.append(outputs)
    if not records:
        raise UserError(f"{args.samples}: no answers in it: it should come from `alpaca samples`")
    if args.reward_model:
        texts = [with_answer(r, text) for i, r in enumerate(records) for text in answers[i]]
        rewards = np.reshape(model_rewards(args.reward_model, texts), (len(records), -1))
    return records, answers, np.array(rewards)


def model_rewards(folder: Path, records: list[dict]) -> list[float]:
    import torch  # which takes seconds to load

    from alpaca.weights.reward import load_reward_model, rewards
    from tokenizer import load_tokenizer

    model = load_reward_model(folder, "cuda" if torch.cuda.is_available() else "cpu")
    return rewards(model, load_tokenizer(folder), records)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("samples", type=Path, help="file of `alpaca samples`")
    rewards = parser.add_mutually_exclusive_group(required=True).add_argument
    checkers = "exact, number, regex (see alpaca/datagen/checkers.py), or FILE.py:NAME, a function"
    checkers += " of yours: NAME(record, answer) returns a number"
    rewards("--check", metavar="CHECKER", help=checkers)
    trained = "what --objective reward trained: its model/ (see alpaca/weights/reward.py)"
    rewards("--reward-model", type=Path, metavar="FOLDER", help=trained)
    add("--n", type=positive(int), help="pick among the first n answers (default: all)")
    add("--out", type=Path, help="JSON file to write: each record with its best answer")
    least = "leave picks with a lower reward out of --out (default: keep all)"
    add("--min-reward", type=finite, default=-math.inf, metavar="REWARD", help=least)
    add("--pairs", type=Path, help="JSON file to write: preferences, the best against the worst")
    flip = "share of the --pairs to swap at random (default: 0)"
    add("--flip", type=share, default=0.0, metavar="SHARE", help=flip)
    add("--seed", type=int, default=0, help="of --flip (default: 0)")


def run(args: argparse.Namespace) -> None:
    if args.min_reward > -math.inf and not args.out:
        raise UserError("--min-reward goes with --out")
    if args.flip and not args.pairs:
        raise UserError("--flip goes with --pairs")
    refuse_same("--out", args.out, "--pairs", args.pairs)
    records, answers, rewards = read_rewards(args)
    n = args.n or rewards.shape[1]
    if n > rewards.shape[1]:
        raise UserError(f"--n {n}: {args.samples} has {rewards.shape[1]} answers to each record")
    picks, pairs, flips = [], [], 0
    first = rewards[:, :n]
    for i, (best, worst) in enumerate(zip(first.argmax(1), first.argmin(1), strict=True)):
        if first[i, best] >= args.min_reward:
            picks.append(with_answer(records[i], answers[i][best]))
        if first[i, best] > first[i, worst]:
            flip = random.Random(f"{args.seed} {i} flip").random() < args.flip
            flips += flip
            chosen, rejected = (worst, best) if flip else (best, worst)
            pairs.append(make_comparison(records[i], answers[i][chosen], answers[i][rejected]))
    for path, content in ((args.out, picks), (args.pairs, pairs)):
        if path:
            save_json(path, content)
    print(f"{len(records)} records with {rewards.shape[1]} answers\n{format_rewards(rewards)}")
    if args.out:
        print(f"{args.out}: {len(picks)} of {len(records)} records with the best of {n} answers")
    if args.pairs:
        equal = f"; {len(records) - len(pairs)} records have no better and worse answer"
        print(f"{args.pairs}: {len(pairs)} pairs, {flips} of them flipped{equal}")
