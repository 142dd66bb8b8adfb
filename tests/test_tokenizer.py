"""The tokenizer against SentencePiece, and streams against whole decodes."""

import os
import random
from functools import lru_cache

import pytest
from helpers.commands import ROOT
from helpers.models import TOKENIZERS
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from alpaca.common.errors import UserError
from alpaca.weights.presets import preset
from model import LlamaConfig
from tokenizer import SPACE, SentencePieceTokenizer, check_tokenizer, load_tokenizer

HARD_TEXTS = ["", " ", "  two  spaces ", "\n", "\t\r\n", "\x00", "a\x00b", "</s>", "<0x0A>"]
HARD_TEXTS += ["<s>[INST]<unk>", "héllo", "中文字符", "日本語テキスト", "🦙🏽‍♀️", "עברית", "e\u0301"]
HARD_TEXTS += ["\ufffd", "\U0010ffff", "### Response:", "1234567890", "\u00a0", "x" * 500]
settings.register_profile("project", deadline=None, derandomize=True, max_examples=300)
settings.load_profile("project")


@pytest.fixture(params=TOKENIZERS, ids=["embedded", "llama"][: len(TOKENIZERS)], scope="module")
def tokenizer(request):
    return load_tokenizer(request.param)


sentencepiece = lru_cache(SentencePieceProcessor)  # loading takes longer than a text


def streamed(tokenizer, ids, after=()) -> str:
    stream = tokenizer.stream(after)
    return "".join([stream.push(token) for token in ids]) + stream.flush()


@pytest.mark.parametrize("text", HARD_TEXTS, ids=ascii)
def test_decode_restores_hard_texts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == streamed(tokenizer, ids)


@given(st.text())
def test_decode_restores_any_text(tokenizer, text):
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids == [1, *sentencepiece(str(tokenizer.path)).encode(text), 2]
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text.replace(SPACE, " ")
    assert b"".join(map(tokenizer.piece_bytes, ids[1:-1])) in (
        text.replace(SPACE, " ").encode(),
        b" " + text.replace(SPACE, " ").encode(),
    )


@given(st.data())
def test_stream_of_any_ids_equals_decode(tokenizer, data):
    """Invalid UTF-8, single bytes, control and unknown tokens included."""
    special = st.sampled_from([0, 1, 2])
    token = st.integers(0, tokenizer.vocab_size - 1) | st.integers(3, 258) | special
    ids = data.draw(st.lists(token, max_size=20))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    cut = data.draw(st.integers(0, len(ids)))
    before, after = ids[:cut], ids[cut:]
    if not before or not tokenizer.piece(before[-1]).startswith("<0x"):  # no character cut in two
        whole, start = tokenizer.decode(ids), tokenizer.decode(before)
        assert whole == start + streamed(tokenizer, after, after=before)


@pytest.mark.parametrize(
    "options",
    [{"remove_extra_whitespaces": True}, {"add_dummy_prefix": False}, {"byte_fallback": False}],
    ids=str,
)
def test_stream_equals_decode_for_models_with_other_space_rules(options, tmp_path):
    usual = {"byte_fallback": True, "remove_extra_whitespaces": False}
    with open(tmp_path / "t.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter((ROOT / "data/corpus.txt").read_text().splitlines()),
            model_writer=file, vocab_size=600, model_type="bpe", minloglevel=2,
            allow_whitespace_only_pieces=True, **usual | options,
        )  # fmt: skip
    tokenizer, rng = load_tokenizer(tmp_path / "t.model"), random.Random(0)
    spaces = [i for i in range(600) if SPACE in tokenizer.piece(i)]
    for _ in range(3000):
        pools = rng.choices([range(600), spaces, range(20)], k=rng.randrange(8))
        ids = [rng.choice(pool) for pool in pools]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids), ids


def test_stream_holds_a_character_until_it_is_complete(tokenizer):
    first = 3  # <0x00>
    stream = tokenizer.stream()
    llama = [first + byte for byte in "🦙".encode()]
    assert [stream.push(token) for token in llama] == ["", "", "", "🦙"]
    assert stream.push(first + 0xE4) == "" and stream.push(first + 0x41) == "\ufffdA"
    assert stream.push(first + 0xE4) == "" and stream.flush() == "\ufffd"


def test_encode_never_parses_special_tokens(tokenizer):
    assert not {0, 1, 2} & set(tokenizer.encode("</s> <s> <unk> </s>"))
    assert tokenizer.encode("hi", bos=True, eos=True) == [1, *tokenizer.encode("hi"), 2]


def test_encode_refuses_half_a_surrogate_pair(tokenizer):
    with pytest.raises(UserError, match=r"half a surrogate pair is not text: .* at character 2"):
        tokenizer.encode("ab\ud83e")


def test_encode_after_needs_a_tokenizer_without_tokens_across_a_newline():
    class Crossing(SentencePieceTokenizer):
        def encode(self, text, bos=False, eos=False):
            return super().encode(text.replace("\n#", "x"), bos, eos)

    tokenizer = Crossing(ROOT / "data/tokenizer.model")
    assert tokenizer.encode_after("", "a b") == (tokenizer.encode("\na b")[2:], False)
    assert tokenizer.encode_after("x\ny", "\na") == (tokenizer.encode("\ny\na")[3:], False)
    with pytest.raises(UserError, match=r"tokenizer\.model has tokens that span a newline"):
        tokenizer.encode_after("", "# a")


def test_check_compares_the_vocabulary_with_the_model(capsys):
    tokenizer, tiny = load_tokenizer(ROOT / "data"), preset("tiny")
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    check_tokenizer(tokenizer, tiny)
    assert tokenizer.vocab_size == tiny.vocab_size and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="has 1024 tokens, the model only 1023 embeddings"):
        check_tokenizer(tokenizer, LlamaConfig(vocab_size=1023))
    check_tokenizer(tokenizer, LlamaConfig(vocab_size=1025))
    assert "1024 to 1024 have no token and are never sampled" in capsys.readouterr().err
    check_tokenizer(tokenizer, LlamaConfig(vocab_size=1024, bos_token_id=0, eos_token_id=1))
    assert "the tokenizer's bos 1 and eos 2 are used" in capsys.readouterr().err


def test_decode_names_the_tokenizer_of_an_id_it_lacks():
    for ids in ([5, 1024], [-1]):
        with pytest.raises(UserError, match=r"tokenizer\.model has only the tokens 0 to 1023"):
            load_tokenizer(ROOT / "data").decode(ids)


def test_tokenizer_refuses_files_that_are_no_llama_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(UserError, match=r"tokenizer\.model: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: model is missing"):
        load_tokenizer(tmp_path)
    for content in (b"", b"\x00\xff not a model", b"{}"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
            load_tokenizer(tmp_path)
    whole, word = (ROOT / "data/tokenizer.model").read_bytes(), "▁the".encode()
    (tmp_path / "tokenizer.model").write_bytes(whole.replace(word, word[1:] + b"x", 1))
    with pytest.raises(UserError, match=r"tokenizer\.model: .* or a damaged one"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    os.mkfifo(tmp_path / "tokenizer.model")
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="is not a regular file"):
            load_tokenizer(path)
    with open(tmp_path / "t.model", "wb") as file:
        options = {"vocab_size": 6, "bos_id": -1, "eos_id": 1, "minloglevel": 2}
        SentencePieceTrainer.train(sentence_iterator=iter(["a b c"]), model_writer=file, **options)
    with pytest.raises(UserError, match="no bos token"):
        load_tokenizer(tmp_path / "t.model")
