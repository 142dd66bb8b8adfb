"""Answer an instruction. (Many in a file: `alpaca answers`.)

    alpaca generate "Name three primary colors."                   # the model of `make train`
    alpaca generate --model-dir alpaca-7b --bits 4 "Summarize this." --input "$(cat mail.txt)"
    alpaca generate --model-dir llama-7b --adapter my-adapter "Name three primary colors."

Instruction and input are put into the template that the model was tuned with, exactly as in
training. The answer is printed while it is generated; it ends with EOS, a --stop text or
--max-new-tokens.

How tokens are chosen: sampling.py. How answers are decoded together: engine.py.
"""

import argparse
import json
import sys
import time
from dataclasses import replace

from alpaca.common.cli import positive
from alpaca.common.errors import notice
from alpaca.inference.answer import engine_from_args
from alpaca.inference.sampling import add_sampling_arguments, sampling_from_args
from alpaca.inference.sequence import Sequence
from alpaca.weights.loading import add_model_arguments
from dataset import encode_prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, positive(int, 10_000)
    add("instruction", help="what to do; - reads it from standard input")
    add("--input", default="", help="the input of the instruction (default: none)")
    add("--n", type=count, default=1, help="answers to the instruction (default: 1)")
    add("--json", action="store_true", help="print JSON with tokens and log-probabilities")
    add("--stats", action="store_true", help="print tokens per second on stderr")
    add_model_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    params = sampling_from_args(args)  # before the weights, so that errors come at once
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
