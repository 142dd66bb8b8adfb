"""Ask a model, as it was trained to be asked.

    alpaca generate "Name three primary colors."                   # the model of `make train`
    alpaca generate --model-dir alpaca-7b --bits 4 "Summarize this." --input "$(cat mail.txt)"
    alpaca generate --model-dir alpaca-7b --chat
    alpaca generate --model-dir alpaca-7b --file questions.jsonl --out answers.jsonl
    alpaca generate --model-dir llama-7b --adapter my-adapter "Name three primary colors."

Instruction and input go into Alpaca's prompt, character for character the one of the training
data; the answer streams and ends where the model says it does. `--chat` keeps a conversation, in
the one form that training, chat and API share (dataset.py). How tokens are chosen: sampling.py; how
many answers are made at once: engine.py; weights of 8 or 4 bits: quantize.py; adapters: lora.py.

Shown by tests/test_generate.py: test_an_answer_is_the_templates_continuation.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from alpaca.common.cli import Parser, positive
from alpaca.common.errors import UserError, notice, run_command
from alpaca.common.files import append_jsonl, json_records, read_log
from alpaca.common.progress import Progress
from alpaca.inference.engine import Engine, Sequence
from alpaca.inference.sampling import SamplingParams
from alpaca.weights.loading import add_model_arguments, load_from_args
from dataset import chat_prompt, format_prompt
from tokenizer import Tokenizer


def question(instruction: str, input: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(format_prompt(instruction, input), bos=True)


# ---------------------------------------------------------------- the three ways to ask


def answer_one(engine: Engine, args: argparse.Namespace) -> None:
    """Print the answer as it comes, or several one behind the other."""
    text = sys.stdin.read().strip("\n") if args.instruction == "-" else args.instruction
    ids = question(text, args.input, engine.tokenizer)
    ways = [sampling(args, args.seed + i) for i in range(args.n)]
    started = time.perf_counter()
    if args.n == 1 and not args.json:
        sequences = [shown(engine, engine.add(ids, ways[0]))]
    else:
        sequences = engine.finish([engine.add(ids, way) for way in ways])
        for number, sequence in enumerate(sequences, 1):
            print(told(sequence) if args.json else f"--- {number} ---\n{sequence.text}")
    if args.stats:
        taken = time.perf_counter() - started
        tokens = sum(len(sequence.ids) for sequence in sequences)
        notice(
            f"{tokens} tokens after a prompt of {len(ids)} in {taken:.2f} s: "
            f"{tokens / taken:.1f} tokens/s"
        )


def shown(engine: Engine, sequence: Sequence) -> Sequence:
    """Print an answer while it is made; Ctrl-C ends it, and what it said stays."""
    at = 0
    try:
        for new in engine.stream_text(sequence):
            print(new, end="", flush=True)
            at += len(new)
    finally:
        print(sequence.text[at:], flush=True)  # what was held back
    return sequence


def told(sequence: Sequence) -> str:
    """An answer as a line of JSON."""
    tokens = [sequence.tokenizer.piece(token) for token in sequence.ids]
    fields = {"text": sequence.text, "reason": sequence.finish_reason, "tokens": tokens}
    fields["logprobs"] = [round(logprob, 4) for logprob in sequence.logprobs]
    return json.dumps(fields, ensure_ascii=False)


def chat(engine: Engine, args: argparse.Namespace) -> None:
    """A conversation at the prompt. Ctrl-C ends the answer, Ctrl-D or /quit the program."""
    start = [{"role": "system", "content": args.system}] if args.system else []
    history, number = list(start), 0
    if sys.stdin.isatty():
        import readline  # noqa: F401  (arrow keys and history at the prompt)

        print("/reset begins anew, Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if said.strip() in ("/quit", "/exit"):
            return
        if said.strip() == "/reset":
            history = list(start)
        if said.strip() in ("/reset", ""):
            continue
        turn = {"role": "user", "content": said}
        try:
            ids = chat_prompt([*history, turn], engine.tokenizer)
            sequence = engine.add(ids, sampling(args, args.seed + number))
        except ValueError as mistake:
            print(f"({mistake}; /reset begins anew)")
            continue
        with suppress(KeyboardInterrupt):
            shown(engine, sequence)
        history += [turn, {"role": "assistant", "content": sequence.text}]
        number += 1


def answer_file(args: argparse.Namespace) -> None:
    """One line of JSON an instruction, in their order; with --out, what is there is not asked."""
    records = list(read_questions(args.file))
    if not records:
        raise UserError(f"{args.file}: no instructions in it")
    how = {"model": str(args.model_dir.absolute()), "bits": args.bits}
    how |= {"sampling": vars(sampling(args, args.seed))}
    how |= {"adapter": str(args.adapter.absolute())} if args.adapter else {}
    how = json.loads(json.dumps(how))
    done = answered(args.out, records, how) if args.out else 0
    engine, sequences = ready(args), []
    for i, record in enumerate(records[done:], done):
        ids = question(record["instruction"], record["input"], engine.tokenizer)
        try:
            sequences.append(engine.add(ids, sampling(args, args.seed + i)))
        except ValueError as mistake:
            raise UserError(f"{args.file}, instruction {i + 1}: {mistake}") from None
    progress = Progress(len(records), "answers", done=done)
    for record, sequence in zip(records[done:], sequences, strict=True):
        engine.finish([sequence])  # the next ones' rows go on meanwhile
        answer = {**record, "output": sequence.text}
        if args.out:
            append_jsonl(args.out, answer | how)
            progress.step()
        else:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    if args.out:
        progress.close(str(args.out))


def answered(out: Path, records: list[dict], how: dict) -> int:
    """How many of the first instructions an earlier run has answered, in the same way."""
    count = 0
    for number, line in enumerate(read_log(out), 1):
        record = records[count] if count < len(records) else {}
        if not record or {**record, **how, "output": line.get("output")} != line:
            what = "another instruction, model or sampling" if record else "one more than are asked"
            raise UserError(f"{out}, line {number}: answers {what}: name another --out")
        count += isinstance(line["output"], str)
    return count


def read_questions(path: Path) -> Iterator[dict]:
    """Instruction and input of each record of a JSON or JSONL file; outputs do not matter."""
    for place, raw in json_records(path):
        if not isinstance(raw, dict) or not isinstance(raw.get("instruction"), str):
            raise UserError(f'{place}: no object with an "instruction"')
        given = raw.get("input") or ""
        if not isinstance(given, str):
            raise UserError(f'{place}: "input" is no text')
        yield {"instruction": raw["instruction"], "input": given}


# ---------------------------------------------------------------- command


def sampling(args: argparse.Namespace, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=seed,
        max_new_tokens=args.max_new_tokens,
        stop=tuple(args.stop),
        logprobs=0 if args.json else None,
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How a model answers; see `sampling`."""
    add, count = parser.add_argument, positive(int)
    add("--temperature", type=float, default=0.0, help="0: likeliest (default: 0)")
    add("--top-k", type=int, default=0, help="likeliest tokens kept; 0: all")
    add("--top-p", type=float, default=1.0, help="probability kept (default: 1)")
    add("--repetition-penalty", type=float, default=1.0, help="1: none (default)")
    add("--seed", type=int, default=0, help="same seed, same text (default: 0)")
    add("--stop", action="append", default=[], help="text to end at; repeatable")
    add("--max-new-tokens", type=count, default=256, help="of an answer (default: 256)")
    add("--max-batch-size", type=count, default=8, help="answers made at once (default: 8)")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("instruction", nargs="?", help="what to do; - reads it from stdin")
    # what is asked
    add("--input", default="", help="what to do it with (default: nothing)")
    add("--chat", action="store_true", help="a conversation at the prompt")
    add("--system", default="", help="with --chat: what takes the preamble's place")
    add("--file", type=Path, help="JSON or JSONL with an instruction a record")
    add("--out", type=Path, help="with --file: JSONL to add answers to")
    add("--n", type=positive(int), default=1, help="answers (default: 1)")
    # of whom, and how
    add_model_arguments(parser)
    add_sampling_flags(parser)
    # what is told
    add("--json", action="store_true", help="with tokens and log-probabilities")
    add("--stats", action="store_true", help="tokens a second, on stderr")
    args = parser.parse_args()
    asked = [args.instruction is not None, args.chat, args.file is not None]
    if sum(asked) != 1:
        parser.error("give one of: an instruction, --chat, --file")
    if args.n > 1 and args.instruction is None:
        parser.error("--n is for a single instruction")
    if args.out and not args.file:
        parser.error("--out goes with --file")
    if (args.json or args.stats) and args.instruction is None:
        parser.error("--json and --stats are for a single instruction")
    if (args.input and args.instruction is None) or (args.system and not args.chat):
        parser.error("--input goes with an instruction, --system with --chat")
    return args


def ready(args: argparse.Namespace) -> Engine:
    sampling(args, args.seed)  # a mistake there should not wait for the weights
    model, tokenizer = load_from_args(args)
    rows = min(args.n, args.max_batch_size) if args.instruction is not None else args.max_batch_size
    return Engine(model, tokenizer, 1 if args.chat else rows, compile=args.compile)


def main() -> None:
    args = parse_args()
    if args.file:
        answer_file(args)
    elif args.chat:
        chat(ready(args), args)
    else:
        answer_one(ready(args), args)


if __name__ == "__main__":
    run_command(main)
