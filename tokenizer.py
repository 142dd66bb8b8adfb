"""Text ↔ ids: SentencePiece, wrapped thinly.

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

import codecs
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from alpaca.common.errors import UserError, notice

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
            raise UserError(f"{file}: no such file{hint}")
        self.sentencepiece = SentencePieceProcessor()
        try:
            self.sentencepiece.LoadFromSerializedProto(file.read_bytes())
        except RuntimeError:
            raise UserError(f"{file}: not a SentencePiece model") from None
        self.path, self.vocab_size = file, self.sentencepiece.vocab_size()
        self.unk_id, self.bos_id = self.sentencepiece.unk_id(), self.sentencepiece.bos_id()
        self.eos_id = self.sentencepiece.eos_id()
        for name, token in (("unk", self.unk_id), ("bos", self.bos_id), ("eos", self.eos_id)):
            if token < 0:
                raise UserError(f"{file}: it has no {name} piece, so no LLaMA was trained with it")
        self.newline_ids = self.encode("\n")  # what a text that goes on after a newline begins with

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        try:
            text.encode()  # JSON can smuggle in what no file may hold
        except UnicodeEncodeError as mistake:
            at = f"{text[mistake.start]!r} at character {mistake.start}"
            raise UserError(f"half a surrogate pair is not text: {at}") from None
        return [self.bos_id] * bos + self.sentencepiece.encode(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        return self.sentencepiece.decode(ids)

    def piece(self, token: int) -> str:
        """The vocabulary's entry: "▁the", "</s>", or "<0xE4>" for a single byte."""
        return self.sentencepiece.id_to_piece(token)

    def piece_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        piece = self.piece(token)
        if self.sentencepiece.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0xE4>
        return piece.replace(SPACE, " ").encode()

    def stream(self, after: list[int] = ()) -> "TextStream":
        """A decoder fed one id at a time; `after` are the ids its text goes on from."""
        stream = TextStream(self)
        for token in after:
            stream.push(token)
        return stream

    def check(self, config) -> None:
        """Does it fit the model with that LlamaConfig? Call it wherever both are loaded."""
        rows = config.vocab_size
        if self.vocab_size > rows:
            raise UserError(
                f"{self.path} has {self.vocab_size} pieces, the model only {rows} embedding rows: "
                "they do not belong together"
            )
        if self.vocab_size < rows:
            extra = f"rows {self.vocab_size} to {rows - 1} have no piece and are never sampled"
            notice(f"the model has {rows} embedding rows: {extra}")
        theirs = config.bos_token_id, config.eos_token_id
        if theirs != (self.bos_id, self.eos_id):
            ours = f"the tokenizer's bos {self.bos_id} and eos {self.eos_id} are used"
            notice(f"config.json has bos {theirs[0]} and eos {theirs[1]}: {ours}")


class TextStream:
    """Ids to text as they come, whole characters only.

    It follows SentencePiece's decoder: pieces are text, byte pieces in a row are UTF-8 together,
    each byte of theirs that fits no character is U+FFFD, control pieces are nothing, and the space
    that encoding put before the first word is taken off again."""

    def __init__(self, tokenizer: Tokenizer):
        pieces = tokenizer.sentencepiece
        self.sentencepiece, self.bytes, self.started = pieces, b"", False
        space = pieces.piece_to_id(SPACE)
        # How many spaces does the model drop at the start? Of two, LLaMA's drops 1; others drop
        # none (0: no space was put before the first word) or all (2: one from each piece).
        self.dropped = 2 - len(pieces.decode([space, space])) if space != pieces.unk_id() else 1

    def push(self, token: int) -> str:
        if self.sentencepiece.is_byte(token):
            self.bytes += bytes([int(self.sentencepiece.id_to_piece(token)[3:5], 16)])  # <0xE4>
            return self._characters(final=False)
        before = self._characters(final=True)
        if self.sentencepiece.is_control(token):
            return before
        if self.sentencepiece.is_unknown(token):
            piece = self.sentencepiece.decode([token])
        else:
            piece = self.sentencepiece.id_to_piece(token)
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
