"""Text ↔ token ids: one interface for two kinds of tokenizer.

    tokenizer = load_tokenizer("data")                # a tokenizer.model, tokenizer.json or folder
    ids = tokenizer.encode("Name a fruit.", bos=True)
    stream = tokenizer.stream()                       # decodes ids as they arrive
    text = "".join(stream.push(id) for id in ids) + stream.flush()

LLaMA 1 and 2 use SentencePiece (this file), SmolLM2 and Llama 3 byte-level BPE (bpe.py). For both:

  - BOS and EOS are added as ids and never parsed from text: a user who types `</s>` gets a few
    ordinary tokens.
  - A character may span several tokens. `stream` holds its bytes until it is complete; the strings
    it returns, joined, are `decode` of all ids.
  - `encode_after` encodes a continuation without changing the ids before it, as in decoding.

LLaMA's SentencePiece model (arXiv:1808.06226) has all 256 bytes as tokens, so decoding restores any
text. Only U+2581, SentencePiece's own sign for a space, comes back as a space.
"""

import codecs
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from alpaca.common.errors import UserError, check_unicode, notice
from alpaca.common.files import input_file
from alpaca.common.gguf_bpe import ADD_BOS, bpe_from_metadata, is_bpe
from alpaca.common.gguf_file import is_gguf, read_gguf
from alpaca.common.jinja import find_template
from alpaca.common.json_files import read_json
from alpaca.common.sentencepiece_file import model_from_metadata
from alpaca.common.tokenizer_json import read_tokenizer_json
from bpe import BPETokenizer
from templates import ALPACA, TEMPLATES, Template

SPACE = "\u2581"  # how SentencePiece writes a space
MAX_BYTES = 100 << 20  # of a tokenizer.model; one of 250,000 tokens has 5 MB


def read_model(file: Path) -> bytes:
    """A tokenizer.model, or the one that is in a GGUF file's metadata."""
    if is_gguf(file):
        return model_from_metadata(read_gguf(file).metadata, str(file))
    return input_file(file, MAX_BYTES).read_bytes()


def expects_bos(file: Path) -> bool:
    """Whether the model expects BOS before a text: yes, unless its files say otherwise."""
    if is_gguf(file):
        return read_gguf(file).metadata.get(ADD_BOS) is not False
    config = file.with_name("tokenizer_config.json")
    return not config.is_file() or read_json(config).get("add_bos_token") is not False


class SentencePieceTokenizer:
    template: Template | None = ALPACA  # see `load_tokenizer`

    def __init__(self, path: str | Path):
        """`path` is a tokenizer.model, or a GGUF file with one in it."""
        self.path = Path(path)
        self.sentencepiece = SentencePieceProcessor()
        try:
            self.sentencepiece.LoadFromSerializedProto(read_model(self.path))
            self.vocab_size = self.sentencepiece.vocab_size()
            self.sentencepiece.id_to_piece(list(range(self.vocab_size)))  # fails if not UTF-8
        except (RuntimeError, UnicodeDecodeError):
            raise UserError(f"{path}: not a SentencePiece model, or a damaged one") from None
        self.unk_id, self.bos_id = self.sentencepiece.unk_id(), self.sentencepiece.bos_id()
        self.eos_id = self.sentencepiece.eos_id()
        for name, token in (("unk", self.unk_id), ("bos", self.bos_id), ("eos", self.eos_id)):
            if token < 0:
                raise UserError(f"{path}: no {name} token, which every LLaMA needs")
        self.add_bos = expects_bos(self.path)
        self.newline_ids = self.encode("\n")  # a space, which SentencePiece puts first, and "\n"

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """`bos` puts BOS first, if the model expects it; `eos` puts EOS last."""
        check_unicode(text)
        first, last = [self.bos_id] * (bos and self.add_bos), [self.eos_id] * eos
        return first + self.sentencepiece.encode(text) + last

    def encode_after(self, before: str, text: str) -> tuple[list[int], bool]:
        """The ids of `text` after `before`, whose ids do not change, and whether a token that spans
        both was prevented. No token of LLaMA's spans a newline, so the last line of `before` is
        enough context."""
        line = before.rpartition("\n")[2]
        head, ids = self._encode_after_newline(line), self._encode_after_newline(line + text)
        if ids[: len(head)] == head:
            return ids[len(head) :], False
        return self._encode_after_newline(text), True

    def _encode_after_newline(self, text: str) -> list[int]:
        """The ids of a text after a newline: without the space that SentencePiece puts first."""
        ids, count = self.encode("\n" + text), len(self.newline_ids)
        if ids[:count] != self.newline_ids:
            reason = "so a prompt's ids would depend on the answer. LLaMA's tokenizer has none"
            raise UserError(f"{self.path} has tokens that span a newline, {reason}")
        return ids[count:]

    def special_id(self, name: str) -> int:
        token = self.sentencepiece.piece_to_id(name)
        if token == self.unk_id:
            raise UserError(f"{self.path} has no {name}: choose another --template")
        return token

    def count_missing(self, text: str) -> int:
        """`encode` drops no bytes: a character without a token becomes <unk>."""
        return 0

    def decode(self, ids: list[int]) -> str:
        try:
            return self.sentencepiece.decode(ids)
        except IndexError:
            raise UserError(f"{self.path} has only the tokens 0 to {self.vocab_size - 1}") from None

    def stream(self, after: Sequence[int] = ()) -> "TextStream":
        """A decoder that takes one id at a time; its text continues that of the ids `after`."""
        return TextStream(self, after)

    def piece(self, token: int) -> str:
        """A token as the vocabulary has it: "▁the", "</s>", or "<0xE4>" for a byte."""
        return self.sentencepiece.id_to_piece(token)

    def piece_bytes(self, token: int) -> bytes:
        """The bytes of a token's text."""
        if self.sentencepiece.is_byte(token):
            return bytes([int(self.piece(token)[3:5], 16)])  # <0xE4>
        return self.token_text(token).encode()

    def token_text(self, token: int) -> str:
        """A token as a person reads it: " the", "</s>", "<0xE4>"."""
        return self.piece(token).replace(SPACE, " ")


class TextStream:
    """Ids → text, one id at a time, as SentencePiece decodes them: consecutive byte tokens are
    UTF-8, a byte that is part of no character becomes U+FFFD, control tokens give no text, and the
    space that encoding put before the first word is removed."""

    def __init__(self, tokenizer: SentencePieceTokenizer, after: Sequence[int]):
        self.tokenizer, self.sentencepiece = tokenizer, tokenizer.sentencepiece
        self.bytes, self.at_start = b"", True
        # How many leading spaces does the decoder remove? Of two, LLaMA's removes 1; others remove
        # none (0: encoding puts no space first) or all (2: one from each token).
        space, unknown = self.sentencepiece.piece_to_id(SPACE), tokenizer.unk_id
        self.removed = 2 - len(tokenizer.decode([space, space])) if space != unknown else 1
        for token in after:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that became complete with this token; often empty."""
        if self.sentencepiece.is_byte(token):
            self.bytes += self.tokenizer.piece_bytes(token)
            return self._pop_characters(final=False)
        before = self._pop_characters(final=True)
        if self.sentencepiece.is_control(token):
            return before
        if self.sentencepiece.is_unknown(token):
            text = self.tokenizer.decode([token])
        else:
            text = self.tokenizer.token_text(token)
            if self.at_start and self.removed and text.startswith(" "):
                text = text[1:]
                self.at_start = self.removed > 1
        self.at_start = self.at_start and text == ""
        return before + text

    def flush(self) -> str:
        """The rest when no more ids follow: the bytes of an incomplete character, as U+FFFD."""
        return self._pop_characters(final=True)

    def _pop_characters(self, final: bool) -> str:
        """The complete characters at the head of the pending bytes. E4 B8 AD is one, "中". E4 alone
        waits, or is U+FFFD if `final`. E4 41 is U+FFFD and "A": no character begins with E4 41."""
        text = ""
        while self.bytes:
            try:
                whole, used = codecs.utf_8_decode(self.bytes, "strict", final)
            except UnicodeDecodeError as error:
                whole, used = self.bytes[: error.start].decode() + "\ufffd", error.start + 1
            text, self.bytes = text + whole, self.bytes[used:]
            if not used:
                break
        self.at_start = self.at_start and text == ""
        return text


# ---------------------------------------------------------------- either kind

Tokenizer = SentencePieceTokenizer | BPETokenizer


def load_tokenizer(
    path: str | Path, *models: Path | None, template: str | None = None
) -> Tokenizer:
    """That of a tokenizer.model, a tokenizer.json, a folder with one of them, or a GGUF file.

    Its template is the first of these: the one named, that of the first of `models` that has one,
    the one beside the tokenizer, Alpaca's."""
    tokenizer = open_tokenizer(Path(path))
    if template:
        tokenizer.template = TEMPLATES[template]
        for name in tokenizer.template.specials:
            tokenizer.special_id(name)
    else:
        tokenizer.template = find_template(*filter(None, models), Path(path))
    return tokenizer


def open_tokenizer(path: Path) -> Tokenizer:
    if path.is_dir():
        files = [path / name for name in ("tokenizer.model", "tokenizer.json")]
        path = next((file for file in files if file.exists()), files[0])
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".json":
        return read_tokenizer_json(path)
    if is_gguf(path) and is_bpe(metadata := read_gguf(path).metadata):
        return bpe_from_metadata(metadata, str(path))
    return SentencePieceTokenizer(path)


def answer_end(tokenizer: Tokenizer) -> int:
    """The token that ends an answer in the tokenizer's template."""
    end = tokenizer.template.end if tokenizer.template else ""
    return tokenizer.special_id(end) if end else tokenizer.eos_id


def end_ids(tokenizer: Tokenizer, config) -> list[int]:
    """All ids that end an answer: EOS, the other EOS ids of a LlamaConfig, the template's end."""
    listed = config.eos_token_id if isinstance(config.eos_token_id, list) else []
    listed = listed if tokenizer.eos_id in listed else [tokenizer.eos_id]
    return list(dict.fromkeys([*listed, answer_end(tokenizer)]))


def with_ends(config, tokenizer: Tokenizer):
    """A LlamaConfig for a model that was tuned with this tokenizer and its template."""
    ends = end_ids(tokenizer, config)
    return replace(config, eos_token_id=ends if ends[1:] else ends[0])


def check_tokenizer(tokenizer: Tokenizer, config) -> None:
    """Refuse a tokenizer that does not fit the model of a LlamaConfig."""
    count, size = tokenizer.vocab_size, config.vocab_size
    if count > size:
        counts = f"has {count} tokens, the model only {size} embeddings"
        raise UserError(f"{tokenizer.path} {counts}: it is another model's tokenizer")
    if count < size:
        unused = f"{count} to {size - 1} have no token and are never sampled"
        notice(f"the model has {size} embeddings: {unused}")
    bos, eos = config.bos_token_id, config.eos_token_id
    if bos != tokenizer.bos_id or tokenizer.eos_id not in (eos if isinstance(eos, list) else [eos]):
        ours = f"the tokenizer's bos {tokenizer.bos_id} and eos {tokenizer.eos_id} are used"
        notice(f"config.json has bos {bos} and eos {eos}: {ours}")
