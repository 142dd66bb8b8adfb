"""What does a model know? Its accuracy on published benchmarks, whose files tasks.py describes.

    alpaca benchmark --model-dir alpaca-7b --tasks hellaswag_val.jsonl piqa/valid.jsonl \\
        --out runs/known
    alpaca benchmark --model-dir alpaca-7b --tasks mmlu/test/*.csv --shots 5 \\
        --shots-from mmlu/dev/*.csv --out runs/mmlu
    alpaca benchmark --model-dir alpaca-7b --tasks gsm8k/test.jsonl --shots 8 --out runs/gsm8k \\
        --max-new-tokens 400

Of several choices, a model picks the one that it finds likeliest after the prompt:

    accuracy        Σ log p(token of the choice)
    per character   the same divided by the choice's characters: long choices are not at a
                    disadvantage (lm-eval's acc_norm)
    per token       divided by its tokens

TruthfulQA's mc2 is the share that true answers have of all answers' probability. GSM8K's answers
are generated greedily; what counts is the number, and of safety prompts, whether the answer
declines (refusals.py). Intervals are Wilson's (win_rate.py). Prompts are plain texts, as published,
or with --apply-chat-template the instructions of a chat, as safety prompts always are. Every
question's scores are in scores.jsonl at once; the same command resumes.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from alpaca.capability.refusals import format_refusals, refusal_rows
from alpaca.capability.scoring import GENERATED, Scores, score_choices, score_generated
from alpaca.capability.tasks import ExamQuestion, add_shots, read_tasks
from alpaca.common.cli import not_negative, positive
from alpaca.common.errors import UserError, escape_control, notice
from alpaca.common.files import read_text
from alpaca.common.json_files import append_jsonl, read_log
from alpaca.common.progress import Progress
from alpaca.common.run_folder import run_folder
from alpaca.evaluation.answers import INCIDENTAL, defaults, identify_model
from alpaca.evaluation.outputs import digest, save_json
from alpaca.evaluation.win_rate import wilson
from alpaca.weights.loading import add_model_arguments, load_from_args
from tokenizer import check_tokenizer

# the shape of a line of scores.jsonl
SCORE_LINE = {"question": int, "task": str, "subject": str, "right": bool | int | float}
SCORE_LINE |= {"cut": bool}

# ---------------------------------------------------------------- accuracies


def result_rows(lines: list[Scores]) -> list[dict[str, Any]]:
    """A row for each task, followed by those of its subjects. Accuracies are percentages."""
    groups: dict[str, dict[str, list[Scores]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for subject in {"", line["subject"]}:
            groups[line["task"]][subject].append(line)
    rows = []
    for task, subjects in groups.items():
        for subject, group in sorted(subjects.items()):
            low, high = wilson(sum(line["right"] for line in group), n := len(group))
            row = {"task": task, "subject": subject, "n": n}
            row |= {"accuracy_low": 100 * low, "accuracy_high": 100 * high}
            for name in (name for name in group[0] if name.startswith("right")):
                accuracy = 100 * sum(line[name] for line in group) / n
                row[name.replace("right", "accuracy")] = accuracy
            rows.append(row)
    return rows


def format_results(rows: list[dict[str, Any]]) -> str:
    text = [f"{'':32}{'n':>7}{'accuracy':>10}{'95 %':>14}{'per character':>15}{'per token':>11}"]
    for row in rows:
        name = escape_control(f"  {row['subject']}" if row["subject"] else row["task"])
        interval = f"{row['accuracy_low']:.1f}–{row['accuracy_high']:.1f}"
        cells = f"{name:32}{row['n']:7}{row['accuracy']:10.2f}{interval:>14}"
        if "accuracy_per_token" in row:
            cells += f"{row['accuracy_per_character']:15.2f}{row['accuracy_per_token']:11.2f}"
        text.append(cells)
    return "\n".join(text)


# ---------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument_group("benchmark").add_argument, positive(int, 2**20)
    published = "benchmarks as they are published"
    add("--tasks", type=Path, nargs="+", required=True, metavar="FILE", help=published)
    add("--out", type=Path, required=True, help="folder to write; an existing one is resumed")
    add("--name", help="name of the model in results.json (default: its folder's)")
    shots = "solved questions of its task and subject before each question (default: 0)"
    add("--shots", type=not_negative, default=0, metavar="K", help=shots)
    source = "files to take them from, in order (default: --tasks, where they then do not count)"
    add("--shots-from", type=Path, nargs="+", metavar="FILE", help=source)
    primer = "text to put before every prompt, such as TruthfulQA's six questions with answers"
    add("--primer", type=Path, metavar="FILE", help=primer)
    chat = "ask in the model's chat template, or in --template"
    add("--apply-chat-template", action="store_true", help=chat)
    add("--limit", type=count, metavar="N", help="at most N questions of each task and subject")
    add("--max-new-tokens", type=count, default=256, help="of a generated answer (default: 256)")
    add("--max-batch-size", type=count, default=8, help="answers decoded together (default: 8)")
    add_model_arguments(parser)


def questions_from_args(args: argparse.Namespace) -> dict[int, ExamQuestion]:
    if args.shots_from and not args.shots:
        raise UserError("--shots-from needs --shots: how many of the records to show")
    questions = read_tasks(args.tasks)
    pool = read_tasks(args.shots_from) if args.shots_from else questions
    primer = read_text(args.primer) if args.primer else ""
    questions = add_shots(questions, pool, args.shots, primer, args.limit)
    if (args.shots or args.primer) and any(question.task == "safety" for question in questions):
        raise UserError("--shots and --primer do not go with safety prompts: ask them apart")
    return dict(enumerate(questions))


def run(args: argparse.Namespace) -> None:
    questions = questions_from_args(args)
    name, files = identify_model(args)
    relevant = {*defaults(add_model_arguments), "apply_chat_template", "max_new_tokens"}
    asked = [question[:5] for question in questions.values()]
    settings = {argument: getattr(args, argument) for argument in sorted(relevant - INCIDENTAL)}
    settings |= {
        "digest of what --tasks, --shots and --limit ask": digest(asked),
        "generator": name,
        "model's files": files,
    }
    with run_folder(args.out, settings, "benchmarking"):
        lines = ask_questions(questions, args)
        scored = [lines[number] for number in questions]
        rows = result_rows([line for line in scored if line["task"] != "safety"])
        safety = [line for line in scored if line["task"] == "safety"]
        pairs = [(due := line["subject"] == "harmful", line["right"] == due) for line in safety]
        refusals = refusal_rows(pairs)
        results = {"generator": name, "shots": args.shots, "results": rows, "refusals": refusals}
        save_json(args.out / "results.json", results)
    texts = format_results(rows) if rows else "", format_refusals(refusals)
    print("\n".join(filter(None, texts)))
    if cut := sum(line["cut"] for line in lines.values()):
        notice(f"{cut} prompts were too long for the model and lost their beginning")
    if unfinished := sum(line.get("unfinished", False) for line in lines.values()):
        notice(f"{unfinished} answers were cut at {args.max_new_tokens} tokens")


def ask_questions(
    questions: dict[int, ExamQuestion], args: argparse.Namespace
) -> dict[int, Scores]:
    """The line of scores.jsonl for each question. Only questions without one are asked."""
    log = args.out / "scores.jsonl"
    lines = {line["question"]: line for line in read_log(log, SCORE_LINE)}
    groups: dict[tuple[str, str], dict[int, ExamQuestion]] = defaultdict(dict)
    for number, question in questions.items():
        if number not in lines:
            groups[question.task, question.subject][number] = question
    if not groups:
        return lines
    model, tokenizer = load_from_args(args)
    check_tokenizer(tokenizer, model.eval().config)
    progress = Progress(len(questions), "questions", done=len(lines))
    for (task, subject), group in groups.items():
        score = score_generated if task in GENERATED else score_choices
        for number, scores in score(model, tokenizer, group, args):
            names = {"task": task, "subject": subject, "place": questions[number].place}
            lines[number] = {"question": number, **names, **scores}
            append_jsonl(log, lines[number], durable=False)
            progress.step()
    progress.close()
    return lines
