"""Text ↔ ids: SentencePiece, wrapped thinly.

    python tokenizer.py train corpus.txt --vocab-size 1024 --out my.model

  - `encode` gives SentencePiece's own ids. BOS and EOS are added as ids, never parsed out of text:
    a user who types `</s>` gets a few ordinary tokens, and ends nothing.
  - LLaMA's vocabulary holds all 256 bytes as pieces, so any text can be written, if need be byte by
    byte, and decoding gives it back. Only U+2581, SentencePiece's own mark for a space, does not
    survive: it returns as a space.
  - A character can be spread over several tokens. `stream` holds its bytes back until it is whole;
    what it returns, joined, is what `decode` makes of all the ids at once.

SentencePiece: arXiv:1808.06226; byte-pair encoding: arXiv:1508.07909.

Shown by tests/test_tokenizer.py: test_ids_equal_hugging_faces_where_it_agrees_with_sentencepiece.
"""

import argparse
import codecs
import io
import signal
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

import console

SPACE = "\u2581"


class Tokenizer:
    def __init__(self, path: str | Path):
        """`path` is a tokenizer.model, or a folder that holds one."""
        path = Path(path)
        file = path / "tokenizer.model" if path.is_dir() else path
        if not file.is_file():
            hint = ""
            if (path / "tokenizer.json").exists():
                hint = " (tokenizer.json is not read: get the SentencePiece file it was made from)"
            raise ValueError(f"{file}: no such file{hint}")
        self.pieces = SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(file.read_bytes())
        except RuntimeError:
            raise ValueError(f"{file}: not a SentencePiece model") from None
        self.path, self.vocab_size = file, self.pieces.vocab_size()
        self.unk_id, self.bos_id = self.pieces.unk_id(), self.pieces.bos_id()
        self.eos_id = self.pieces.eos_id()
        for name, token in (("unk", self.unk_id), ("bos", self.bos_id), ("eos", self.eos_id)):
            if token < 0:
                raise ValueError(f"{file}: it has no {name} piece, so no LLaMA was trained with it")
        self.newline = self.encode("\n")  # what a text that goes on after a newline begins with

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        try:
            text.encode()  # JSON can smuggle in what no file may hold
        except UnicodeEncodeError as mistake:
            at = f"{text[mistake.start]!r} at character {mistake.start}"
            raise ValueError(f"half a surrogate pair is not text: {at}") from None
        return [self.bos_id] * bos + self.pieces.encode(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)

    def stream(self, after: list[int] = ()) -> "TextStream":
        """A decoder fed one id at a time; `after` are the ids its text goes on from."""
        stream = TextStream(self.pieces)
        for token in after:
            stream.push(token)
        return stream

    def check(self, config) -> None:
        """Does it fit the model with that LlamaConfig? Call it wherever both are loaded."""
        rows = config.vocab_size
        if self.vocab_size > rows:
            raise ValueError(
                f"{self.path} has {self.vocab_size} pieces, the model only {rows} embedding rows: "
                "they do not belong together"
            )
        if self.vocab_size < rows:
            extra = f"rows {self.vocab_size} to {rows - 1} have no piece and are never sampled"
            console.notice(f"the model has {rows} embedding rows: {extra}")
        theirs = config.bos_token_id, config.eos_token_id
        if theirs != (self.bos_id, self.eos_id):
            ours = f"the tokenizer's bos {self.bos_id} and eos {self.eos_id} are used"
            console.notice(f"config.json has bos {theirs[0]} and eos {theirs[1]}: {ours}")


class TextStream:
    """Ids to text as they come, whole characters only.

    It follows SentencePiece's decoder: pieces are text, byte pieces in a row are UTF-8 together,
    each byte of theirs that fits no character is U+FFFD, control pieces are nothing, and the space
    that encoding put before the first word is taken off again."""

    def __init__(self, pieces: SentencePieceProcessor):
        self.pieces, self.bytes, self.started = pieces, b"", False
        space = pieces.piece_to_id(SPACE)
        # How many spaces does the model drop at the start? Of two, LLaMA's drops 1; others drop
        # none (0: no space was put before the first word) or all (2: one from each piece).
        self.dropped = 2 - len(pieces.decode([space, space])) if space != pieces.unk_id() else 1

    def push(self, token: int) -> str:
        if self.pieces.is_byte(token):
            self.bytes += bytes([int(self.pieces.id_to_piece(token)[3:5], 16)])  # <0xE4>
            return self._characters(final=False)
        before = self._characters(final=True)
        if self.pieces.is_control(token):
            return before
        if self.pieces.is_unknown(token):
            piece = self.pieces.decode([token])
        else:
            piece = self.pieces.id_to_piece(token)
            if self.dropped and not self.started and piece.startswith(SPACE):
                piece = piece[1:]
                self.started = self.dropped == 1  # nothing more to drop
        self.started = self.started or piece != ""
        return before + piece.replace(SPACE, " ")

    def flush(self) -> str:
        """What is left when no more ids come: bytes of a character that never became whole."""
        return self._characters(final=True)

    def _characters(self, final: bool) -> str:
        """The whole characters at the head of the waiting bytes. E4 B8 AD is one, "中". E4 waits;
        E4 41 is U+FFFD and "A", since no character goes on like that; at the end E4 is U+FFFD."""
        text = ""
        while self.bytes:
            try:
                whole, used = codecs.utf_8_decode(self.bytes, "strict", final)
            except UnicodeDecodeError as bad:
                whole, used = self.bytes[: bad.start].decode() + "\ufffd", bad.start + 1
            text, self.bytes = text + whole, self.bytes[used:]
            if not used:
                break
        self.started = self.started or text != ""
        return text


def train(files: list[Path], vocab_size: int, out: Path) -> None:
    """A tokenizer of LLaMA's kind: pair merges, byte fallback, single digits, spaces kept."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"{out}: a file name in a folder that exists was expected")
    if out.exists() and any(out.samefile(file) for file in files):
        raise ValueError(f"{out} is one of the texts: the model would replace it")
    if vocab_size < 260:
        raise ValueError(f"--vocab-size {vocab_size}: 3 special pieces and 256 bytes come first")
    lines = []
    for file in files:
        try:
            lines += file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as mistake:
            raise ValueError(f"{file}: not UTF-8 at byte {mistake.start}") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"no text in {console.listed(map(str, files))}")
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
        raise ValueError(f"SentencePiece: {reason.partition(' Increase')[0]}") from None
    with console.atomic_file(out) as file:
        file.write(model.getvalue())


def parse_args() -> argparse.Namespace:
    parser = console.Parser(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train", help="make a tokenizer.model from text files")
    verb.add_argument("files", type=Path, nargs="+", help="UTF-8 text, a sentence or so a line")
    verb.add_argument(
        "--vocab-size", type=int, default=1024, help="pieces, 259 of them fixed (default: 1024)"
    )
    verb.add_argument("--out", type=Path, required=True, help="the tokenizer.model to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    usual = signal.signal(signal.SIGINT, signal.SIG_DFL)  # SentencePiece would not hear Ctrl-C
    train(args.files, args.vocab_size, args.out)
    signal.signal(signal.SIGINT, usual)
    print(f"{args.out}: {Tokenizer(args.out).vocab_size} pieces")


if __name__ == "__main__":
    console.run(main)
