"""Hold a conversation with a model in the terminal.

    alpaca chat --model-dir alpaca-7b --bits 4
    alpaca chat --system "You are a pirate." --temperature 0.8

Each turn is appended to the conversation and the whole of it is the next prompt, in the form that
training and the API use too (`chat_prompt` in dataset.py). /reset forgets the conversation, Ctrl-C
stops an answer, Ctrl-D or /quit ends the program.
"""

import argparse
import sys
from contextlib import suppress
from dataclasses import replace

from alpaca.common.errors import UserError
from alpaca.inference.answer import engine_from_args
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams, add_sampling_arguments, sampling_from_args
from alpaca.weights.loading import add_model_arguments
from dataset import chat_prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_sampling_arguments(parser, batched=False)
    parser.add_argument("--system", help="system message (default: the template's)")


def run(args: argparse.Namespace) -> None:
    params = sampling_from_args(args)
    chat(engine_from_args(args, 1), params, args.system)


def chat(engine: Engine, params: SamplingParams, system: str | None) -> None:
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (arrow keys and history while typing)

        print("/reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if text.strip() in ("/quit", "/exit"):
            return
        if text.strip() == "/reset":
            messages = list(start)
        if text.strip() in ("/reset", ""):
            continue
        turn = {"role": "user", "content": text}
        try:
            sequence = engine.add(chat_prompt([*messages, turn], engine.tokenizer), params)
        except UserError as error:
            print(f"({error}; /reset forgets the conversation)")
            continue
        with suppress(KeyboardInterrupt):
            for new in engine.stream_text(sequence):
                print(new, end="", flush=True)
        print()
        messages += [turn, {"role": "assistant", "content": sequence.text}]
        params = replace(params, seed=params.seed + 1)
