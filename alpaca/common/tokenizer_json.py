"""Reads and writes tokenizer.json, the file of Hugging Face's library `tokenizers`.

    tokenizer = read_tokenizer_json(Path("smollm2/tokenizer.json"))
    files = tokenizer_json_files(tokenizer)    # name → content, to be written

The file describes a tokenizer as a chain of components:

    normalizer      changes the text first; byte-level BPE has none
    pre_tokenizer   splits the text into words
    model           vocabulary and merges
    post_processor  puts BOS first, in some files
    decoder         turns pieces into text

and lists the added tokens, special or not. A component that `bpe.py` does not implement is refused
by name, because the ids would be wrong. The tokenizer_config.json beside it names BOS and EOS.
"""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from alpaca.common.errors import UserError
from alpaca.common.json_files import check_shape, read_json
from bpe import LLAMA3_WORDS, BPETokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": LLAMA3_WORDS},
    "behavior": "Isolated",
    "invert": False,
}
PRE_TOKENIZERS = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [DIGITS, BYTE_LEVEL],
    "llama-bpe": [SPLIT, BYTE_LEVEL | {"use_regex": False}],
}
COMPONENTS = {  # component: the field that lists its parts in a Sequence, the supported types
    "normalizer": ("normalizers", ()),
    "pre_tokenizer": ("pretokenizers", ("ByteLevel", "Digits", "Split")),
    "post_processor": ("processors", ("ByteLevel", "TemplateProcessing")),
    "decoder": ("decoders", ("ByteLevel",)),
}
HARMLESS = {  # field of the model: the values that do not change ids
    "type": ("BPE",), "dropout": (None, 0), "byte_fallback": (None, False),
    "fuse_unk": (None, False), "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}  # fmt: skip
MODEL = {"vocab": dict, "merges": list, "unk_token": str | None, "ignore_merges": bool | None}
ADDED = {"id": int, "content": str, "special": bool}


def refuse(file: Path, what: str) -> NoReturn:
    raise UserError(
        f"{file}: {what} is not supported, only byte-level BPE as in GPT-2, SmolLM2 and Llama 3. "
        "For LLaMA 1 and 2 give the tokenizer.model"
    )


def read_parts(content: dict, name: str, file: Path) -> list[dict]:
    """A component as the list of its parts, each of a supported type."""
    list_name, known = COMPONENTS[name]
    parts = content.get(name)
    if isinstance(parts, dict):
        parts = parts.get(list_name) if parts.get("type") == "Sequence" else [parts]
    parts = [] if parts is None else parts
    check_shape(parts, [{"type": str}], f"{file}: {name}")
    for part in parts:
        if part["type"] not in known:
            refuse(file, f"the {name} {part['type']!r}")
        part.pop("trim_offsets", None)  # does not change ids
    return parts


def read_tokenizer_json(file: Path) -> BPETokenizer:
    content = read_json(file, {"model": {"type": str}})
    model, added = content["model"], content.get("added_tokens") or []
    for field, values in HARMLESS.items():
        if model.get(field) not in values:
            refuse(file, f"a model with {field} {model[field]!r}")
    parts = {name: read_parts(content, name, file) for name in COMPONENTS}
    steps = [BYTE_LEVEL | p if p["type"] == "ByteLevel" else p for p in parts["pre_tokenizer"]]
    pre = next((name for name, known in PRE_TOKENIZERS.items() if steps == known), None)
    if pre is None:
        names = " + ".join(step["type"] for step in steps) or "null"
        refuse(file, f"the pre_tokenizer {names} with these settings")
    check_shape(model, MODEL, f"{file}: model")
    check_shape(added, [ADDED], f"{file}: added_tokens")
    vocab = dict(model["vocab"])
    for token in added:
        if vocab.setdefault(token["content"], token["id"]) != token["id"]:
            raise UserError(f"{file}: {token['content']!r} has two ids")
        if not token["special"] and any(map(token.get, ("single_word", "lstrip", "rstrip"))):
            refuse(file, f"the added token {token['content']!r} with these settings")
    if lacking := {*range(len(vocab))} - {id for id in vocab.values() if type(id) is int}:
        what = f"0 to {len(vocab) - 1}, each of them once: no token has the id {min(lacking)}"
        raise UserError(f"{file}: the ids are not {what}")
    bos, eos, add_bos = special_names(file, parts["post_processor"])
    unk = model.get("unk_token")
    for name in (bos, eos, unk):
        if name is not None and name not in vocab:
            raise UserError(f"{file}: the special token {name!r} is not in its vocabulary")
    return BPETokenizer(
        sorted(vocab, key=vocab.__getitem__),
        [read_merge(pair, file) for pair in model["merges"]],
        pre,
        vocab[eos],
        None if bos is None else vocab[bos],
        None if unk is None else vocab[unk],
        control=[token["id"] for token in added if token["special"]],
        added=[token["id"] for token in added if not token["special"]],
        add_bos=add_bos,
        ignore_merges=bool(model.get("ignore_merges")),
        path=file,
    )


def read_merge(pair: Any, file: Path) -> tuple[str, str]:
    """A merge is written "a b" or ["a", "b"]."""
    both = pair.split(" ") if isinstance(pair, str) else pair
    if isinstance(both, list) and len(both) == 2 and all(p and isinstance(p, str) for p in both):
        return both[0], both[1]
    raise UserError(f"{file}: a merge is {str(pair)[:50]!r}, where two pieces were expected")


def special_names(file: Path, post_processor: list[dict]) -> tuple[str | None, str, bool]:
    """The names of BOS and EOS, and whether a text begins with BOS."""
    names, add_bos = {}, False
    config_file = file.with_name("tokenizer_config.json")
    if config_file.exists():
        config = read_json(config_file, {"add_bos_token": bool | None})
        for field in ("bos_token", "eos_token"):
            name = config.get(field)
            names[field] = name.get("content") if isinstance(name, dict) else name
        check_shape(names, dict.fromkeys(names, str | None), str(config_file))
        add_bos = bool(config.get("add_bos_token"))
    for part in post_processor:
        if part["type"] == "TemplateProcessing":
            check_shape(part, {"single": [dict]}, f"{file}: post_processor")
            before = list(takewhile(lambda step: "SpecialToken" in step, part["single"]))
            check_shape(before, [{"SpecialToken": {"id": str}}], f"{file}: post_processor")
            if len(before) > 1:
                refuse(file, f"a post_processor that puts {len(before)} tokens before a text")
            for step in before:
                names["bos_token"], add_bos = step["SpecialToken"]["id"], True
    if names.get("eos_token") is None:
        raise UserError(f"{file}: no tokenizer_config.json beside it names its eos_token")
    return names.get("bos_token"), names["eos_token"], add_bos


def tokenizer_json_files(t: BPETokenizer) -> dict[str, bytes]:
    """The contents of tokenizer.json, and of tokenizer_config.json, which names BOS and EOS."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": token, "content": t.pieces[token], **flags, "special": token in t.control}
        for token in sorted(t.control | t.added)
    ]
    bos, eos, unk = (None if i is None else t.pieces[i] for i in (t.bos_id, t.eos_id, t.unk_id))
    steps = [{"trim_offsets": True, **step} for step in PRE_TOKENIZERS[t.pre]]
    template = [
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    bos_first = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": [*template, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [t.bos_id], "tokens": [bos]}},
    }
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": bos_first if t.add_bos else None,
        "decoder": BYTE_LEVEL | {"trim_offsets": True},
        "model": {
            "type": "BPE",
            "unk_token": unk,
            "ignore_merges": t.ignore_merges,
            "vocab": {piece: i for i, piece in enumerate(t.pieces)},
            "merges": sorted(t.ranks, key=t.ranks.__getitem__),
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    files = {"tokenizer.json": content, "tokenizer_config.json": config}
    return {
        name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
        for name, value in files.items()
    }
