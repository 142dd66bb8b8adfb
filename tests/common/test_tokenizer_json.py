"""tokenizer.json: what is read, what is refused by name, and what is written."""

import random

import pytest
from helpers.bpe import KINDS, SPECIAL, content_of, save_tokenizer, tables, write_bpe
from helpers.mutations import mutate

from alpaca.common.errors import UserError
from alpaca.common.tokenizer_json import read_tokenizer_json

TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": SPECIAL[1]}}, {"Sequence": {"id": "A"}}],
}
SPACE = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
QWEN = {"type": "Split", "pattern": {"Regex": "\\p{N}"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("kind", KINDS)
def test_written_file_is_read_back_the_same(tmp_path, kind):
    content = content_of(kind) | {"post_processor": TEMPLATE if kind == "llama-bpe" else None}
    content["added_tokens"].append({"id": 600, "content": "<tool>", "special": False})
    tokenizer = read_tokenizer_json(write_bpe(tmp_path / "a", content))
    assert tokenizer.add_bos == (kind == "llama-bpe") and tokenizer.pre == kind
    save_tokenizer(tokenizer, tmp_path / "b")
    again = read_tokenizer_json(tmp_path / "b" / "tokenizer.json")
    assert tables(again) == tables(tokenizer)
    text = "Hello <tool>it's 123 中文\n\n🦙"
    assert again.encode(text, bos=True) == tokenizer.encode(text, bos=True)


def test_merges_are_read_as_strings_and_as_pairs(tmp_path):
    pairs, strings = content_of(), content_of()
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair for pair in pairs["model"]["merges"]
    ]
    pairs["model"]["merges"] = merges
    strings["model"]["merges"] = [" ".join(pair) for pair in merges]
    files = [write_bpe(tmp_path / n, c) for n, c in (("a", pairs), ("b", strings))]
    assert len({str(tables(read_tokenizer_json(file))) for file in files}) == 1


def test_special_names_are_strings_objects_or_the_template_s(tmp_path):
    file = write_bpe(
        tmp_path, bos_token=None, eos_token={"content": SPECIAL[2]}, add_bos_token=None
    )
    tokenizer = read_tokenizer_json(file)
    assert tokenizer.bos_id is None and tokenizer.piece(tokenizer.eos_id) == SPECIAL[2]
    assert read_tokenizer_json(write_bpe(tmp_path, add_bos_token=True)).add_bos
    file = write_bpe(tmp_path, content_of() | {"post_processor": TEMPLATE}, bos_token=None)
    tokenizer = read_tokenizer_json(file)
    assert tokenizer.add_bos and tokenizer.piece(tokenizer.bos_id) == SPECIAL[1]
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no tokenizer_config.json beside it names its eos_token"):
        read_tokenizer_json(file)


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"normalizer": {"type": "NFC"}}, "the normalizer 'NFC'"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}]}}, "'Prepend'"),
        ({"pre_tokenizer": SPACE}, "the pre_tokenizer 'Metaspace'"),
        ({"pre_tokenizer": None}, "the pre_tokenizer null"),
        ({"pre_tokenizer": QWEN}, "the pre_tokenizer Split with these settings"),
        ({"decoder": {"type": "ByteFallback"}}, "the decoder 'ByteFallback'"),
        ({"post_processor": {"type": "BertProcessing"}}, "the post_processor 'BertProcessing'"),
        ({"model": {"type": "Unigram", "vocab": []}}, "type 'Unigram'"),
        ({"model": {"byte_fallback": True}}, "byte_fallback True"),
        ({"model": {"dropout": 0.1}}, "dropout 0.1"),
        ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix '##'"),
    ],
    ids=str,
)
def test_unknown_component_is_refused_by_name(tmp_path, part, error):
    content = content_of()
    model = content["model"] | part.get("model", {})
    with pytest.raises(UserError) as refusal:
        read_tokenizer_json(write_bpe(tmp_path, content | part | {"model": model}))
    assert error in str(refusal.value) and "is not supported" in str(refusal.value)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ({"vocab": {"a": 0, "b": 4}}, "not 0 to 4, each of them once: no token has the id 3"),
        ({"vocab": {"a": 10**400}}, "ids are not 0 to"),
        ({"vocab": {"a": True, "b": [], "c": 1.0}}, "ids are not 0 to"),
        ({"vocab": ["a"]}, "an object was expected"),
        ({"merges": ["a"]}, "two pieces were expected"),
        ({"merges": [["a", "b", "c"]]}, "two pieces were expected"),
        ({"merges": [["a", 1]]}, "two pieces were expected"),
        ({"merges": ["中 文"]}, "the vocabulary lacks what the merge"),
        ({"unk_token": "<nothing>"}, "'<nothing>' is not in its vocabulary"),
    ],
    ids=str,
)
def test_damaged_model_is_refused_in_one_line(tmp_path, model, error):
    content = content_of()
    content["model"] |= model
    with pytest.raises(UserError, match=error):
        read_tokenizer_json(write_bpe(tmp_path, content))


def test_added_token_with_two_ids_or_odd_flags_is_refused(tmp_path):
    token = {"id": 5, "content": SPECIAL[0], "special": True}
    content = content_of()
    content["added_tokens"].append(token)
    with pytest.raises(UserError, match="has two ids"):
        read_tokenizer_json(write_bpe(tmp_path, content))
    content = content_of()
    content["added_tokens"].append({"id": 600, "content": "xx", "special": False, "lstrip": True})
    with pytest.raises(UserError, match="the added token 'xx' with these settings"):
        read_tokenizer_json(write_bpe(tmp_path, content))


def test_any_damage_is_a_user_error_or_a_tokenizer(tmp_path):
    content = content_of("llama-bpe") | {"post_processor": TEMPLATE}
    vocab = {k: v for k, v in content["model"]["vocab"].items() if v < 270}
    content["model"] |= {"vocab": vocab, "merges": content["model"]["merges"][:11]}
    file, refused = write_bpe(tmp_path, content), 0
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for number in range(100):
        path = file if number % 4 else file.with_name("tokenizer_config.json")
        path.write_bytes(mutate(random.Random(number), path.name, whole[path]))
        try:
            tokenizer = read_tokenizer_json(file)
            ids = tokenizer.encode("Hello <|end|> wörld 12 🦙", bos=True, eos=True)
            tokenizer.decode(ids)
        except UserError:
            refused += 1
        path.write_bytes(whole[path])
    assert 20 < refused < 100
