"""Train a SentencePiece tokenizer of LLaMA's kind on text files.

    alpaca train-tokenizer corpus.txt --vocab-size 1024 --out my.model

LLaMA's kind: byte-pair merges, a byte fallback for rare characters, every digit a token of its own,
and spaces left as they are. The same text gives the same model, byte for byte.

SentencePiece: arXiv:1808.06226; byte-pair encoding: arXiv:1508.07909.
"""

import argparse
import io
import signal
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from alpaca.common.errors import UserError, join_names
from alpaca.common.files import atomic_file, read_text
from tokenizer import load_tokenizer

FIXED = 3 + 256  # entries of every vocabulary: <unk>, <s>, </s> and the bytes


def train_tokenizer(files: list[Path], vocab_size: int, out: Path) -> None:
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: a file name in an existing folder was expected")
    if vocab_size <= FIXED:
        raise UserError(f"--vocab-size {vocab_size}: {FIXED} entries are fixed, name a larger one")
    lines = [line for file in files for line in read_text(file).splitlines()]
    if not any(line.strip() for line in lines):
        raise UserError(f"no text in {join_names(map(str, files))}")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            max_sentence_length=1 << 30,  # bytes; longer lines would be dropped silently
            num_threads=1,  # for the same model every time
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).rpartition("] ")[2].replace("required_chars", "the characters used")
        raise UserError(f"SentencePiece: {reason.partition(' Increase')[0]}") from None
    with atomic_file(out) as file:
        file.write(model.getvalue())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", type=Path, nargs="+", help="UTF-8 text, about a sentence a line")
    size = f"tokens, {FIXED} of them fixed (default: 1024)"
    add("--vocab-size", type=int, default=1024, help=size)
    add("--out", type=Path, required=True, help="the tokenizer.model to write")


def run(args: argparse.Namespace) -> None:
    # SentencePiece trains in C++, where Python's handler would not see Ctrl-C before the end.
    python_handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    train_tokenizer(args.files, args.vocab_size, args.out)
    signal.signal(signal.SIGINT, python_handler)
    print(f"{args.out}: {load_tokenizer(args.out).vocab_size} tokens")
