"""Answer an evaluation set, with a model in a folder or with a model on a server.

    alpaca answers --out runs/eval/tiny                  # the model of `make train`
    alpaca answers --out runs/eval/base --model-dir data/tiny-llama --max-new-tokens 64
    alpaca answers --out runs/eval/mini --model gpt-4.1-mini --set alpaca_eval.json

The answers are written to model_outputs.json in AlpacaEval's format (outputs.py), which `alpaca
blind` and `alpaca judge` compare. A local model is prompted as by `alpaca generate`. A server's
chat API, the default, is sent the instruction as a user would write it, and puts it into its
model's template. The completions API is sent Alpaca's prompt: for base models and Alpacas.

Every answer is on disk as soon as it is made, so the same command resumes a stopped run. Answer i
is sampled with --seed + i: it depends neither on the answers decoded beside it nor on a restart.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from alpaca import CHECKOUT
from alpaca.common.cli import Parser
from alpaca.common.errors import UserError, notice
from alpaca.common.json_files import append_jsonl, read_log
from alpaca.common.progress import Progress
from alpaca.common.run_folder import run_folder
from alpaca.datagen.endpoints import add_server_arguments, endpoint_from_args
from alpaca.datagen.request_log import RequestLog, Teachers, ask_all, run_until_signal
from alpaca.evaluation.outputs import OUTPUTS, Item, digest, read_items, save_json
from alpaca.inference.answer import engine_from_args
from alpaca.inference.sampling import add_sampling_arguments, sampling_from_args
from alpaca.inference.sequence import Sequence
from alpaca.weights.loading import add_model_arguments, model_folders
from dataset import encode_prompt
from templates import format_prompt

EVAL_SET = CHECKOUT / "data/eval_instructions.jsonl"
LOCAL_ARGUMENTS = (add_model_arguments, add_sampling_arguments)
SERVER_SAMPLING = ("temperature", "top_p", "max_new_tokens", "stop")  # mean the same on a server
# Local arguments that do not change the answers. (The model's files do: settings_of adds those.)
INCIDENTAL = {"model_dir", "adapter", "device", "compile", "max_batch_size"}
ANSWER = {"id": str, "output": str, "cut": bool}  # a line of answers.jsonl; cut by the token limit


# ---------------------------------------------------------------- a model in a folder


def generate_local(items: dict[str, Item], args: argparse.Namespace, log: Path) -> dict:
    """id → answer. A prompt that is too long for the model is left out."""
    answers = {answer["id"]: answer for answer in read_log(log, ANSWER) if answer["id"] in items}
    todo = {id: item for id, item in items.items() if id not in answers}
    if not todo:
        return answers
    engine = engine_from_args(args, args.max_batch_size)
    prompts = {
        id: encode_prompt(item.instruction, item.input, engine.tokenizer)
        for id, item in todo.items()
    }
    pending: dict[Sequence, str] = {}
    # The longest first: prompts of similar length are decoded together, and too little memory
    # shows at once.
    for id in sorted(prompts, key=lambda id: -len(prompts[id])):
        params = replace(sampling_from_args(args), seed=args.seed + int(id))
        try:
            pending[engine.add(prompts[id], params)] = id
        except UserError as error:
            notice(f"{items[id].question[:60]!r} is left out: {error}")
    progress = Progress(len(answers) + len(pending), "answers", done=len(answers))
    while pending:
        for sequence in engine.step():
            if sequence.finish_reason:
                sequence.check()
                id = pending.pop(sequence)
                cut = sequence.finish_reason == "length"
                answers[id] = {"id": id, "output": sequence.text, "cut": cut}
                append_jsonl(log, answers[id])
                progress.step()
    progress.close()
    return answers


# ---------------------------------------------------------------- a model on a server


def generate_remote(items: dict[str, Item], args: argparse.Namespace, log: Path) -> dict:
    """id → answer. What the server does not answer is left out."""
    endpoint = endpoint_from_args(args, args.model)
    options = {"max_tokens": args.max_new_tokens, "temperature": args.temperature}
    options |= {"top_p": args.top_p if args.top_p < 1 else None, "stop": args.stop or None}
    options |= args.request
    answers: dict[str, dict] = {}

    async def ask(teachers: Teachers, id: str, item: Item) -> None:
        chat = endpoint.kind == "chat"
        text = item.question if chat else format_prompt(item.instruction, item.input)
        if reply := await teachers.ask_until(id, lambda reply: reply, 1, text, options):
            answers[id] = {"output": reply.text, "cut": reply.truncated}

    requests = RequestLog(log)
    work = ask_all(requests, endpoint, args, items, ask, "answers")
    if not run_until_signal(work):
        notice(f"the budget of ${args.budget:g} is spent: run again with a larger one to resume")
    notice(f"${requests.spent:.4f} spent")
    return answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation").add_argument
    set_help = "instructions, JSON or JSONL (default: data/eval_instructions.jsonl)"
    add("--set", type=Path, default=EVAL_SET, help=set_help)
    add("--out", type=Path, required=True, help="folder to write; an existing one is resumed")
    add("--name", help="name of the model in all files (default: its folder's, or --model)")
    add("--model", help="model on a server to ask, instead of --model-dir")
    for add_group in (*LOCAL_ARGUMENTS, add_server_arguments):
        add_group(parser)


def run(args: argparse.Namespace) -> None:
    items = {str(number): item for number, item in enumerate(read_items(args.set))}
    refuse_unused_arguments(args)
    name, files = (args.name or args.model, []) if args.model else identify_model(args)
    settings = settings_of(args, items, name, files)
    log = args.out / ("answers.jsonl" if args.model is None else "responses.jsonl")
    with run_folder(args.out, settings, "answering"):
        answers = (generate_local if args.model is None else generate_remote)(items, args, log)
        if not answers:
            raise UserError(f"{args.out}: none of the {len(items)} instructions has an answer")
        outputs = []
        for id in sorted(answers, key=int):
            output = {"instruction": items[id].question, "output": answers[id]["output"]}
            outputs.append(output | {"generator": name, "dataset": items[id].dataset})
        save_json(args.out / OUTPUTS, outputs)
    print(f"{len(answers)} answers of {name} in {args.out / OUTPUTS}")
    reason = "their prompts are too long" if args.model is None else "run again to retry"
    cut = sum(answer["cut"] for answer in answers.values())
    empty = sum(not answer["output"].strip() for answer in answers.values())
    for count, what in (
        (len(items) - len(answers), f"have no answer and are left out: {reason}"),
        (cut, f"were cut at {args.max_new_tokens} tokens"),
        (empty, "are empty"),
    ):
        if count:
            print(f"  {count} {what}")


def refuse_unused_arguments(args: argparse.Namespace) -> None:
    """Arguments for a server do not go with a local model, nor the other way round."""
    sampling_from_args(args)
    unused = defaults(add_server_arguments)
    problem = "is for a server: name its --model"
    if args.model is not None:
        endpoint_from_args(args, args.model)
        unused = defaults(*LOCAL_ARGUMENTS)
        problem = "is for a model in a folder, and --model asks a server"
    for name, default in unused.items():
        if name not in SERVER_SAMPLING and getattr(args, name) != default:
            raise UserError(f"--{name.replace('_', '-')} {problem}")


def defaults(*groups: Callable) -> dict[str, Any]:
    """The arguments that these functions add, by name, and their defaults."""
    parser = Parser()
    for add_group in groups:
        add_group(parser)
    return vars(parser.parse_args([]))


def settings_of(
    args: argparse.Namespace, items: dict[str, Item], name: str, files: list[str]
) -> dict[str, Any]:
    """All that the answers depend on: a run is resumed only with the same."""
    relevant = defaults(*LOCAL_ARGUMENTS).keys() - INCIDENTAL
    if args.model is not None:
        relevant = {*SERVER_SAMPLING, "model", "base_url", "kind", "request"}
    return {
        **{argument: getattr(args, argument) for argument in sorted(relevant)},
        "set": digest([item[:2] for item in items.values()]),
        "generator": name,
        "model's files": files,
    }


def identify_model(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The name of a model in a folder, and a description of each of its folders."""
    folders = model_folders(args)
    files = [describe_files(folder, args.out.resolve()) for folder in folders]
    return args.name or "+".join(map(folder_name, folders)), files


def describe_files(folder: Path, out: Path) -> str:
    """A text that changes when a model is trained again in the same place. `out` is ignored."""
    folder = folder.resolve()
    files = [folder, *folder.rglob("*")]  # a GGUF file stands for itself
    files = [file for file in files if file.is_file() and out not in file.parents]
    stats = [file.stat() for file in files if file.name != "README.md"]  # the card may change
    latest = max((stat.st_mtime_ns for stat in stats), default=0)
    written = datetime.fromtimestamp(latest // 10**9).isoformat(" ")
    size = sum(stat.st_size for stat in stats)
    return f"{folder}, {size} bytes, written {written}.{latest % 10**9:09}"


def folder_name(folder: Path) -> str:
    """runs/tiny/model is "tiny"."""
    path = folder.absolute()
    return path.parent.name if path.name == "model" else path.name
