"""Train a SentencePiece tokenizer of LLaMA's kind from text files.

    alpaca train-tokenizer corpus.txt --vocab-size 1024 --out my.model

SentencePiece: arXiv:1808.06226; byte-pair encoding: arXiv:1508.07909.
"""

import argparse
import io
import signal
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from alpaca.common.cli import Parser
from alpaca.common.errors import UserError, join_names, run_command
from alpaca.common.files import atomic_file
from tokenizer import Tokenizer


def train_tokenizer(files: list[Path], vocab_size: int, out: Path) -> None:
    """A tokenizer of LLaMA's kind: pair merges, byte fallback, single digits, spaces kept."""
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: a file name in a folder that exists was expected")
    if out.exists() and any(out.samefile(file) for file in files):
        raise UserError(f"{out} is one of the texts: the model would replace it")
    if vocab_size < 260:
        raise UserError(f"--vocab-size {vocab_size}: 3 special pieces and 256 bytes come first")
    lines = []
    for file in files:
        try:
            lines += file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as mistake:
            raise UserError(f"{file}: not UTF-8 at byte {mistake.start}") from None
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
            max_sentence_length=1 << 30,  # bytes; longer lines would be left out unsaid
            num_threads=1,  # the same text makes the same model
            minloglevel=2,
        )
    except RuntimeError as mistake:
        reason = str(mistake).rpartition("] ")[2].replace("required_chars", "the characters used")
        raise UserError(f"SentencePiece: {reason.partition(' Increase')[0]}") from None
    with atomic_file(out) as file:
        file.write(model.getvalue())


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="UTF-8 text, a sentence or so a line")
    parser.add_argument(
        "--vocab-size", type=int, default=1024, help="pieces, 259 of them fixed (default: 1024)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer.model to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    usual = signal.signal(signal.SIGINT, signal.SIG_DFL)  # SentencePiece would not hear Ctrl-C
    train_tokenizer(args.files, args.vocab_size, args.out)
    signal.signal(signal.SIGINT, usual)
    print(f"{args.out}: {Tokenizer(args.out).vocab_size} pieces")


if __name__ == "__main__":
    run_command(main)
