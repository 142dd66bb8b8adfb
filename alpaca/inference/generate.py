"""Answer an instruction, or a file of them.

    alpaca generate "Name three primary colors."                   # the model of `make train`
    alpaca generate --model-dir alpaca-7b --bits 4 "Summarize this." --input "$(cat mail.txt)"
    alpaca generate --model-dir alpaca-7b --file questions.jsonl --out answers.jsonl
    alpaca generate --model-dir llama-7b --adapter my-adapter "Name three primary colors."

Instruction and input are put into the template that the model was tuned with, exactly as in
training. The answer is printed while it is generated; it ends with EOS, a --stop text or
--max-new-tokens. With --out, answers are
appended to a file one by one, and the same command resumes after it was stopped.

How tokens are chosen: sampling.py. How answers are decoded together: engine.py.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from alpaca.common.cli import positive
from alpaca.common.errors import UserError, notice
from alpaca.common.files import lock_output
from alpaca.common.json_files import append_jsonl
from alpaca.common.progress import Progress
from alpaca.inference.answer import (
    answer_questions,
    count_answered,
    engine_from_args,
    read_questions,
    settings_from_args,
)
from alpaca.inference.sampling import SamplingParams, add_sampling_arguments, sampling_from_args
from alpaca.inference.sequence import Sequence
from alpaca.weights.loading import add_model_arguments
from dataset import encode_prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, positive(int, 10_000)
    add("instruction", nargs="?", help="what to do; - reads it from standard input")
    add("--input", default="", help="the input of the instruction (default: none)")
    add("--n", type=count, default=1, help="answers to the instruction (default: 1)")
    add("--json", action="store_true", help="print JSON with tokens and log-probabilities")
    add("--stats", action="store_true", help="print tokens per second on stderr")
    add("--file", type=Path, help="JSON or JSONL file of instructions to answer instead")
    add("--out", type=Path, help="with --file: JSONL file to append answers to (default: stdout)")
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if (args.instruction is None) == (args.file is None):
        raise UserError("give an instruction or --file (a conversation: alpaca chat)")
    if args.file and (args.input or args.n > 1 or args.json or args.stats):
        raise UserError("--input, --n, --json and --stats need an instruction, not --file")
    if args.out and not args.file:
        raise UserError("--out needs --file")
    params = sampling_from_args(args)  # before the weights, so that errors come at once
    if args.file:
        generate_file(args, params)
    else:
        generate_one(args, params)


def generate_one(args: argparse.Namespace, params: SamplingParams) -> None:
    instruction = sys.stdin.read().strip("\n") if args.instruction == "-" else args.instruction
    engine = engine_from_args(args, min(args.n, args.max_batch_size))
    ids = encode_prompt(instruction, args.input, engine.tokenizer)
    params = replace(params, logprobs=0 if args.json else None)
    start = time.perf_counter()
    sequences = [engine.add(ids, replace(params, seed=params.seed + i)) for i in range(args.n)]
    if args.n == 1 and not args.json:
        try:
            for text in engine.stream_text(sequences[0]):
                print(text, end="", flush=True)
        finally:
            print()
    else:
        for number, sequence in enumerate(engine.finish(sequences), 1):
            print(as_json(sequence) if args.json else f"--- {number} ---\n{sequence.text}")
    if args.stats:
        seconds = time.perf_counter() - start
        tokens = sum(len(sequence.ids) for sequence in sequences)
        rate = f"{tokens / seconds:.1f} tokens/s"
        notice(f"{tokens} tokens after a prompt of {len(ids)} in {seconds:.2f} s: {rate}")


def as_json(sequence: Sequence) -> str:
    fields = {"text": sequence.text, "finish_reason": sequence.finish_reason}
    fields["tokens"] = [sequence.tokenizer.piece(token) for token in sequence.ids]
    fields["logprobs"] = [round(logprob, 4) for logprob in sequence.logprobs]
    return json.dumps(fields, ensure_ascii=False)


def generate_file(args: argparse.Namespace, params: SamplingParams) -> None:
    questions = read_questions(args.file)
    settings = settings_from_args(args, params)
    with lock_output(args.out) if args.out else nullcontext():
        write_answers(args, params, questions, settings)


def write_answers(
    args: argparse.Namespace, params: SamplingParams, questions: list[dict], settings: dict
) -> None:
    done = count_answered(args.out, questions, settings) if args.out else 0
    engine = engine_from_args(args, args.max_batch_size)
    progress = Progress(len(questions), "answers", done=done)
    answers = answer_questions(engine, questions, params, done)
    for question, output in zip(questions[done:], answers, strict=True):
        answer = {**question, "output": output}
        if args.out:
            append_jsonl(args.out, answer | settings)
            progress.step()
        else:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    if args.out:
        progress.close(str(args.out))
