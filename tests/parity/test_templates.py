"""Ids of conversations against those of transformers' apply_chat_template."""

import pytest
from helpers.commands import ROOT
from helpers.templates import FOREIGN, write_chat_tokenizer

from alpaca.common.jinja import recognize, to_jinja
from dataset import chat_prompt, encode_record
from templates import TEMPLATES, Template
from tokenizer import load_tokenizer

TEXTS = ["Name a fruit.", "a pear", " spaces ", "It's 3\tor 42", "\n中文 🦙\n\n", "", "{}", "x\r\n"]
ANSWERS = ["a pear", "It is 42, 中文.", "No!"]  # no tokenizer merges them with what is before
# GPT-2's pattern cuts the two newlines of a Llama 3 header where an answer follows.
PAIRS = [(name, "llama-bpe") for name in (*TEMPLATES, *FOREIGN)]
PAIRS += [(name, "smollm") for name, _ in PAIRS if "llama" not in name]
SYSTEMS = (None, "Be brief.", " \n{} ", "")


def conversations(most_turns: int, systems: tuple) -> list[list[dict]]:
    found = []
    for system in systems:
        start = [{"role": "system", "content": system}] if system is not None else []
        for turns in range(1, most_turns + 1):
            kinds = [ANSWERS if i % 2 else TEXTS for i in range(turns)]
            texts = [kind[(2 * i + turns) % len(kind)] for i, kind in enumerate(kinds)]
            pairs = zip(["user", "assistant"] * 3, texts, strict=False)
            found.append(start + [{"role": role, "content": text} for role, text in pairs])
    return found


def compare(ours, theirs, template: Template, most_turns=6, systems=SYSTEMS) -> None:
    ours.template = template
    for messages in conversations(most_turns, systems):
        prompt = messages[-1]["role"] == "user"
        ids = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False, tokenize=True
        )
        assert chat_prompt(messages, ours) == ids, messages
        assert encode_record({"messages": messages}, ours)[0] == ids


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[0] in FOREIGN])
def test_ids_of_a_models_own_template_equal_transformers(tmp_path, name, kind):
    from transformers import AutoTokenizer

    folder = write_chat_tokenizer(tmp_path / "a", kind, chat_template=FOREIGN[name])
    template = recognize(FOREIGN[name])
    assert template and load_tokenizer(folder).template == template
    compare(load_tokenizer(folder), AutoTokenizer.from_pretrained(folder), template)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_written_jinja_gives_the_same_ids_in_transformers(tmp_path, name, kind):
    from transformers import AutoTokenizer

    template = TEMPLATES.get(name) or recognize(FOREIGN[name])
    assert template
    folder = write_chat_tokenizer(tmp_path / "a", kind)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = to_jinja(template, bos=ours.encode("", bos=True) != [])
    compare(ours, theirs, template)


@pytest.mark.parametrize("name", ["alpaca", "vicuna"])
def test_written_jinja_gives_the_same_ids_with_sentencepiece(name):
    """In the first turn: after a special token transformers puts a space. Where a text begins with
    one, it leaves out SentencePiece's own."""
    from transformers import LlamaTokenizer

    ours = load_tokenizer(ROOT / "data")
    theirs = LlamaTokenizer.from_pretrained(ROOT / "data", legacy=True)
    theirs.chat_template = to_jinja(TEMPLATES[name], bos=True)
    compare(ours, theirs, TEMPLATES[name], 2, SYSTEMS[:2])
