"""Is one model better than another? Asked of people who do not know whose answer is whose, or of a
model that judges; and told with how sure one can be.

    alpaca answers --out runs/eval/tiny                  # the model of `make train`
    alpaca answers --out runs/eval/base --model-dir data/tiny-llama --max-new-tokens 64
    alpaca answers --out runs/eval/mini --model gpt-4.1-mini --set alpaca_eval.json

    alpaca blind start runs/eval/tiny runs/eval/base --out runs/blind --raters ann ben
    alpaca blind rate runs/blind/ann
    alpaca blind unblind runs/blind runs/eval/tiny runs/eval/base

    alpaca judge runs/eval/tiny runs/eval/base --out runs/judged \\
        --judge gpt-4.1 --price-in 2 --price-out 8 --budget 5
    alpaca score runs/judged --plot leaderboard.svg

Each is resumable: the same command again goes on, and asks nothing twice. Models are asked as
`alpaca generate` asks them, servers as `selfinstruct.py` does. Files are AlpacaEval's: each model's
model_outputs.json, each comparison's annotations.json; published ones are read as they are.

Alpaca's own evaluation was the blind one, on self-instruct's 252 user-oriented instructions
(arXiv:2212.10560): 90 wins to 89. Sets: answers.py. Judging by people: blind.py, by a model:
judge.py. Win rates, and what the length of answers does to them: win_rate.py.

Shown by tests/test_evaluate.py:
test_a_leaderboard_in_the_order_of_the_files_and_sorted_for_people.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

from alpaca import CHECKOUT
from alpaca.common import charts
from alpaca.common.cli import Parser, positive, run_subcommand
from alpaca.common.errors import UserError, escape_control, run_command
from alpaca.common.files import atomic_file, claim_run_folder
from alpaca.datagen import request_log
from alpaca.evaluation import blind, judge, outputs, win_rate
from alpaca.evaluation.outputs import ANNOTATIONS, OUTPUTS, digest, paired, read_items, write_json
from alpaca.inference import generate
from alpaca.weights import loading

SET = CHECKOUT / "data/eval_instructions.jsonl"
# What makes no difference to the answers.
INCIDENTAL = {"command", "verb", "set", "out", "name", "max_batch_size", "device", "compile"}
INCIDENTAL |= {"in_flight", "timeout", "attempts", "first_wait", "key_env"}
INCIDENTAL |= {"price_in", "price_out", "budget", "instruction", "chat", "n", "json"}
INCIDENTAL |= {"model_dir", "adapter"}  # but what is in them does
OF_A_SERVER = {"model", "base_url", "kind", "request"}


# ---------------------------------------------------------------- answers


def answers_command(args: argparse.Namespace) -> None:
    """Run a model over a set of instructions."""
    items = {str(number): item for number, item in enumerate(read_items(args.set))}
    folders = checked(args)
    served = args.model is not None
    name = args.name or args.model or "+".join(map(own_name, folders))
    without = INCIDENTAL if served else INCIDENTAL | OF_A_SERVER
    settings = {key: value for key, value in vars(args).items() if key not in without}
    settings |= {"set": digest([item[:2] for item in items.values()]), "generator": name}
    settings["model's files"] = [outputs.stamp(folder, args.out.resolve()) for folder in folders]
    log = args.out / ("responses.jsonl" if served else "answers.jsonl")
    args.lock = claim_run_folder(args.out, settings, "answering", log.name)
    made = (outputs.answered_there if served else outputs.answered_here)(items, args, log)
    if not made:
        raise UserError(f"{args.out}: no answer to any of {len(items)} instructions")
    outputs.write_outputs(args.out / OUTPUTS, items, made, name)
    print(f"{len(made)} answers of {name} in {args.out / OUTPUTS}")
    why = "the same command asks again" if served else "the model has no room for them"
    for count, what in (
        (len(items) - len(made), f"have no answer and are left out: {why}"),
        (sum(one.cut for one in made.values()), f"were cut at {args.max_new_tokens} tokens"),
        (sum(not one.output.strip() for one in made.values()), "are empty"),
    ):
        if count:
            print(f"  {count} {what}")


def checked(args: argparse.Namespace) -> list[Path]:
    """The folders that a local model is made of. What does not go together is refused, before a
    folder is made for it."""
    generate.sampling(args, args.seed)
    if args.model is not None:
        taken = ("--temperature", "--top-p", "--max-new-tokens", "--stop")
        local = given(args, loading.add_model_arguments, generate.add_sampling_flags)
        if odd := [flag for flag in local if flag not in taken]:
            raise UserError(f"--model asks a server: {odd[0]} is for a model in a folder")
        request_log.endpoint_from_args(args, "--model", args.model)
        return []
    if odd := given(args, request_log.add_server_arguments):
        raise UserError(f"{odd[0]} is for a server: --model names the one of its models to ask")
    return loading.model_folders(args)


def given(args: argparse.Namespace, *groups: Callable) -> list[str]:
    """Those flags of these groups that are not at their defaults."""
    flags = Parser()
    for add in groups:
        add(flags)
    default = vars(flags.parse_args([]))
    odd = [name for name, value in default.items() if getattr(args, name) != value]
    return ["--" + name.replace("_", "-") for name in odd]


def own_name(folder: Path) -> str:
    """runs/tiny/model is "tiny"."""
    path = folder.absolute()
    return path.parent.name if path.name == "model" else path.name


# ---------------------------------------------------------------- people, or a model, compare


def start_command(args: argparse.Namespace) -> None:
    """Make a copy for each rater."""
    pairs = paired(args.model, args.baseline, args.common)
    count = blind.start(pairs, args.out, args.raters, args.num, args.seed)
    print(f"{count} pairs to rate. Each rater runs, at any time and as often as wanted:")
    for rater in args.raters:
        print(f"  alpaca blind rate {args.out / rater}")
    print(f"and then you: alpaca blind unblind {args.out} and the same two files")


def rate_command(args: argparse.Namespace) -> None:
    """Rate, in the terminal."""
    blind.rate(args.copy)


def unblind_command(args: argparse.Namespace) -> None:
    """Whose answers were liked?"""
    pairs = paired(args.model, args.baseline, args.common)
    report = blind.unblind(args.folder, pairs, args.early)
    votes, same = report.votes, report.agreement
    print(
        f"{pairs.model} {votes['model']} vs {votes['baseline']} {pairs.baseline}: votes; "
        f"{votes['tie']} ties, {votes['skip']} skipped, {votes['left']} not rated"
    )
    print(table(report.rows))
    if same.items:
        alpha = "" if same.alpha is None else f", Krippendorff's alpha {same.alpha:.2f}"
        print(f"raters agree in {same.per_cent:.1f} % of pairs{alpha} ({same.items} instructions)")
    print(f"{args.folder / ANNOTATIONS}; ratings are closed")


def judge_command(args: argparse.Namespace) -> None:
    """A model compares two models' answers."""
    pairs = paired(args.model, args.baseline, args.common)
    endpoint = request_log.endpoint_from_args(args, "--judge", args.judge)
    args.name = args.name or endpoint.model + (", explained" if args.explain else "")
    settings = {"answers": digest(pairs), "judge": endpoint.model, "url": endpoint.url}
    for name in ("kind", "request", "single_order", "explain", "no_logprobs"):
        settings[name] = getattr(args, name)
    settings["seed"] = args.seed if args.single_order else None
    log = args.out / "responses.jsonl"
    args.lock = claim_run_folder(args.out, settings, "judging", log.name)
    found = judge.judged(pairs, endpoint, args, log)
    for line in found.told:
        print(escape_control(line))
    silent = {entry["instruction"] for entry in found.entries if entry["preference"] is None}
    if silent.issuperset(pair.instruction for pair in pairs.all):
        count = sum(entry["preference"] is not None for entry in found.entries)
        why = f"{endpoint.model} gave none" if found.enough else "the budget has no room for one"
        why = f"{count} verdicts, but no pair has one in both orders" if count else why
        raise UserError(f"no verdict on any pair: {why}; nothing is written")
    file = args.out / ANNOTATIONS
    write_json(file, found.entries)
    if not found.enough:
        print(f"The budget of ${args.budget:g} is spent: a larger --budget goes on from here.")
    print(f"{file}\n{table(win_rate.leaderboard([file]))}")


# ---------------------------------------------------------------- score


def score_command(args: argparse.Namespace) -> None:
    """Win rates of annotation files."""
    files = [path / ANNOTATIONS if path.is_dir() else path for path in args.files]
    rows = win_rate.leaderboard(files, args.common)
    if args.plot:
        with atomic_file(args.plot, "w") as file:
            file.write(picture(rows))
    print(json.dumps(rows, indent=2, ensure_ascii=False) if args.json else table(rows))


def table(rows: list[dict]) -> str:
    """The best first, by the length-controlled rate. What is the same in all rows stands below."""
    rows = sorted(rows, key=lambda row: -row["length_controlled_win_rate"])
    lines = [cells(row) for row in rows]
    columns = {name: [line[name] for line in lines] for name in lines[0]}
    below = ""
    for name, told in (("baseline", "against "), ("judge", "judged by ")):
        if len(set(columns[name])) == 1:
            (only,) = set(columns.pop(name))
            below += f"{', ' if below else ''}{told}{only}" if only else ""
    shown = [[name, *map(escape_control, told)] for name, told in columns.items() if any(told)]
    widths = [max(map(len, column)) for column in shown]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*shown, strict=True)
    ]
    return "\n".join([*text, escape_control(below)] if below else text)


def cells(row: dict) -> dict[str, str]:
    return {
        "model": row["model"],
        "baseline": row["baseline"],
        "judge": row["annotator"],
        "win rate": rate(row, ""),
        "95 %": f"{row['win_rate_low']:.1f}–{row['win_rate_high']:.1f}",
        "length-controlled": rate(row, "length_controlled_"),
        "won–lost–drawn": f"{row['n_wins']}–{row['n_losses']}–{row['n_draws']}",
        "n": str(row["n"]),
        "missing": str(row["n_missing"] or ""),
        "length": f"{row['mean_length']:.0f}:{row['baseline_mean_length']:.0f}",
        "flips": "" if row["flip_rate"] is None else f"{100 * row['flip_rate']:.0f} %",
        "sign test": f"{row['sign_test']:.2g}",
        "": row["verdict"],
    }


def rate(row: dict, which: str) -> str:
    error = row[f"{which}standard_error"]
    return f"{row[f'{which}win_rate']:.2f}" + (f" ± {error:.2f}" if error is not None else "")


def picture(rows: list[dict]) -> str:
    """Raw and length-controlled rates of each model, with bounds of 95 %, as an SVG."""
    varying = [name for name in ("baseline", "annotator") if len({row[name] for row in rows}) > 1]
    bars = {}
    for row in sorted(rows, key=lambda row: -row["length_controlled_win_rate"]):
        middle, error = row["length_controlled_win_rate"], row["length_controlled_standard_error"]
        reach = win_rate.Z * error if error is not None else math.nan  # no bar
        bars[", ".join(row[name] for name in ("model", *varying))] = {
            "win rate": (row["win_rate_low"], row["win_rate"], row["win_rate_high"]),
            "length-controlled": (max(middle - reach, 0), middle, min(middle + reach, 100)),
        }
    return charts.interval_chart("Win rates, in per cent, with bounds of 95 %", bars, 0, 100)


# ---------------------------------------------------------------- command


def add_answers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is answered").add_argument
    told = "instructions, JSON or JSONL (default: data/eval_instructions.jsonl)"
    add("--set", type=Path, default=SET, help=told)
    add("--out", type=Path, required=True, help="folder; the same one again goes on")
    add("--name", help="of the model in all files (default: that of its folder, or --model)")
    loading.add_model_arguments(parser)
    generate.add_sampling_flags(parser)
    request_log.add_server_arguments(parser)
    parser.add_argument("--model", help="model of a server to ask (default: a --model-dir)")
    parser.set_defaults(command=answers_command, instruction=None, chat=False, n=1, json=False)


def add_two(parser: argparse.ArgumentParser) -> None:
    what = "model_outputs.json or a folder with one, of the model"
    parser.add_argument("model", type=Path, help=what)
    parser.add_argument("baseline", type=Path, help="the same of what it is compared with")
    parser.add_argument("--common", action="store_true", help="compare what both have answered")


def add_blind(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    verb = verbs.add_parser("start", help="make a copy for each rater")
    add_two(verb)
    verb.add_argument("--out", type=Path, required=True, help="new folder, for the copies")
    verb.add_argument("--raters", nargs="+", default=["rater"], help="names (default: rater)")
    count = positive(int)
    verb.add_argument("--num", type=count, help="pairs, drawn by lot (default: all)")
    verb.add_argument(
        "--seed", help="the same sides and order again; who knows it can unblind (default: by lot)"
    )
    verb.set_defaults(command=start_command)
    verb = verbs.add_parser("rate", help="rate, in the terminal; go on where you stopped")
    verb.add_argument("copy", type=Path, help="folder of the rater")
    verb.set_defaults(command=rate_command)
    verb = verbs.add_parser("unblind", help="count, test, and close the ratings")
    verb.add_argument("folder", type=Path, help="--out of start")
    add_two(verb)
    verb.add_argument("--early", action="store_true", help="though not all is rated")
    verb.set_defaults(command=unblind_command)


def add_judge(parser: argparse.ArgumentParser) -> None:
    add_two(parser)
    add = parser.add_argument_group("judge").add_argument
    add("--out", type=Path, required=True, help="folder; the same one again goes on")
    add("--judge", required=True, metavar="MODEL", help="model of the server that judges")
    add("--name", help="of the judge in annotations.json (default: the model's)")
    add("--single-order", action="store_true", help="each pair once, sides by lot: half the price")
    add("--explain", action="store_true", help="reasons first, then the verdict")
    add("--no-logprobs", action="store_true", help="for servers that refuse to be asked for them")
    count = positive(int)
    add("--tries", type=count, default=3, help="for a verdict, of all runs together (default: 3)")
    add("--seed", type=int, default=0, help="draws the sides of --single-order (default: 0)")
    request_log.add_server_arguments(parser)
    parser.set_defaults(command=judge_command)


def add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", help="annotations.json, or folders with one")
    parser.add_argument("--common", action="store_true", help="over the instructions that all have")
    parser.add_argument("--json", action="store_true", help="everything, in the order of the files")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="SVG of the win rates to write")
    parser.set_defaults(command=score_command)


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module, add, told in (
        ("answers", outputs, add_answers, "run a model over a set of instructions"),
        ("blind", blind, add_blind, "people compare, and do not know what"),
        ("judge", judge, add_judge, "a model compares"),
        ("score", win_rate, add_score, "win rates of annotation files, a leaderboard"),
    ):
        add(verbs.add_parser(name, help=told, description=module.__doc__))
    return parser.parse_args()


def main() -> None:
    run_subcommand(parse_args())


if __name__ == "__main__":
    run_command(main)
