"""Chat templates: which text has labels, and whose template a model is asked in."""

import json
import shutil
import time

import pytest
from helpers.bpe import KINDS
from helpers.commands import ROOT
from helpers.templates import FOREIGN, LLAMA31, SMOLLM, SMOLLM_SYSTEM, write_chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca.common.errors import UserError
from alpaca.common.jinja import find_template, recognize, to_jinja
from bpe import BPETokenizer
from dataset import chat_prompt, encode_prompt, encode_record
from model import IGNORE
from templates import ALPACA, CHATML, LLAMA3_CHAT, TEMPLATES, VICUNA
from tokenizer import answer_end, load_tokenizer

CHAT = [
    {"role": role, "content": content}
    for role, content in (
        ("system", "Be brief."),
        ("user", "Name a fruit. "),
        ("assistant", "A pear"),
        ("user", "<|im_end|> and</s><|eot_id|>"),
        ("assistant", " Tokens<|im_end|>"),
    )
]
PIECES = ["{{ ", " }}", "{% ", " %}", "{#", "#}", "'", '"', "\\", "\\n", "\n", "\\x", "\\N{", "{}"]
PIECES += ["<|im_start|>system\n", "<|im_end|>\n", "<|start_header_id|>", "<|eot_id|>", "bos_token"]
PIECES += ["<|im_start|>", "Cutting Knowledge Date: x\n", "26 Jul 2024", "trim"]
SHOWN = {  # the text of CHAT, with what has labels in [ ]
    "alpaca": "Be brief.\n\n### Instruction:\nName a fruit. \n\n### Response:[A pear<|end|>]"
    "\n\n### Instruction:\n<|im_end|> and</s><|eot_id|>\n\n### Response:"
    "[ Tokens<|im_end|><|end|>]",
    "vicuna": "Be brief. USER: Name a fruit. ASSISTANT:[ A pear<|end|>]"
    "USER: <|im_end|> and</s><|eot_id|> ASSISTANT:[ Tokens<|im_end|><|end|>]",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nName a fruit. <|im_end|>\n"
    "<|im_start|>assistant\n[A pear<|im_end|>]\n<|im_start|>user\n"
    "<|im_end|> and</s><|eot_id|><|im_end|>\n<|im_start|>assistant\n"
    "[ Tokens<|im_end|><|im_end|>]\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nName a fruit.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[A pear<|eot_id|>]"
    "<|start_header_id|>user<|end_header_id|>\n\n<|im_end|> and</s><|eot_id|><|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[Tokens<|im_end|><|eot_id|>]",
}


def show(ids: list[int], labels: list[int], tokenizer) -> str:
    pieces = [tokenizer.piece_bytes(token) for token in ids]
    marks = [label != IGNORE for label in [IGNORE, *labels, IGNORE]]
    for i in reversed(range(len(ids) + 1)):
        if marks[i] != marks[i + 1]:
            pieces.insert(i, b"]" if marks[i] else b"[")
    return b"".join(pieces).decode()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_each_template_by_turn(tmp_path, kind, name):
    tokenizer = load_tokenizer(write_chat_tokenizer(tmp_path, kind), template=name)
    assert isinstance(tokenizer, BPETokenizer)
    ids, labels, _ = encode_record({"messages": CHAT}, tokenizer)
    bos = "<|begin|>" if (name == "llama3" or kind == "llama-bpe") and name != "chatml" else ""
    shown = SHOWN[name]
    assert show(ids, labels, tokenizer) == bos + shown
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    for turns in (2, 4):  # what decoding sees is what training saw
        assert ids[: len(prompt := chat_prompt(CHAT[:turns], tokenizer))] == prompt
        assert labels[len(prompt)] == ids[len(prompt)]
    marks = ("<|im_start|>", "<|start_header_id|>", "<|end_header_id|>")
    ends = {"alpaca": 2, "vicuna": 2, "chatml": 5, "llama3": 5}[name]
    special = sum(token in tokenizer.control for token in ids)  # the user's are text
    assert special == sum(map(shown.count, marks)) + ends + bool(bos)
    assert ids[max(i for i, label in enumerate(labels) if label != IGNORE)] == answer_end(tokenizer)


def test_question_with_an_input_is_alpacas_or_two_paragraphs(tmp_path):
    tokenizer = load_tokenizer(write_chat_tokenizer(tmp_path))
    text = tokenizer.decode(encode_prompt("Add.", "2, 3", tokenizer))
    assert "paired with an input" in text and text.endswith("### Input:\n2, 3\n\n### Response:")
    tokenizer.template = CHATML
    text = tokenizer.decode(encode_prompt("Add.", "2, 3", tokenizer))
    assert text == "user\nAdd.\n\n2, 3\nassistant\n"


@pytest.mark.parametrize("template", [*TEMPLATES.values(), *map(recognize, FOREIGN.values())])
def test_written_jinja_is_recognized(template):
    for bos in (False, True):
        again = recognize(to_jinja(template, bos))
        assert again == template or (again, bos) == (template._replace(bos=bos), True)
    odd = CHATML._replace(system='"It\'s" {} \\n é🦙\t<b>\nlast line')
    assert recognize(to_jinja(odd)) == odd


def test_recognize_keeps_system_message_date_and_bos():
    smollm = CHATML._replace(system=SMOLLM_SYSTEM)
    assert recognize(SMOLLM) == smollm
    assert recognize("{{ bos_token }}" + SMOLLM) == smollm._replace(bos=True)
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 1 Jan 2025\n\n{}"
    later = LLAMA3_CHAT._replace(system="", first=LLAMA3_CHAT.first.replace("{}", dates))
    assert recognize(LLAMA31.replace("26 Jul 2024", "1 Jan 2025")) == later
    llama = FOREIGN["llama-3.0"]
    assert recognize(llama) == LLAMA3_CHAT
    default = "<|start_header_id|>system<|end_header_id|>\n\nBe kind. <|eot_id|>"
    template = recognize(f"{{% if no_system %}}{{{{ '{default}' }}}}{{% endif %}}{llama}")
    assert template == LLAMA3_CHAT._replace(system="Be kind. ")
    assert "".join(template.parts(CHAT[1:2])).startswith(default)  # a text of Jinja is not trimmed


def test_template_with_bos_where_the_tokenizer_has_none(tmp_path):
    """Jinja's bos_token is empty there."""
    folder = write_chat_tokenizer(tmp_path, chat_template=LLAMA31, bos_token=None)
    tokenizer = load_tokenizer(folder)
    assert chat_prompt(CHAT[1:2], tokenizer)[0] == tokenizer.special_id("<|start_header_id|>")


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ '[INST] ' + messages[0]['content'] + ' [/INST]' }}",
        "{{ '### Instruction:\n' + messages[0]['content'] + '\n### Response:\n' }}",
        "{{ '<|im_start|>' + messages[0].role + messages[0].content + '<|im_end|>' }}",
        "plain",
    ],
)
def test_unknown_template_is_refused_where_it_would_be_used(tmp_path, jinja):
    tokenizer = load_tokenizer(write_chat_tokenizer(tmp_path, chat_template=jinja))
    assert tokenizer.template is None and tokenizer.encode("x")
    with pytest.raises(UserError, match="none of alpaca, chatml, llama3, vicuna.*--template"):
        encode_prompt("Hi", "", tokenizer)
    assert load_tokenizer(tmp_path, template="vicuna").template == VICUNA


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30).map("".join))
def test_any_text_is_a_template_or_none(jinja):
    template = recognize(jinja)
    if template:
        assert recognize(to_jinja(template, bos=True)) in (template, template._replace(bos=True))
        template.parts(CHAT)


def test_hostile_templates_are_read_fast():
    start = time.process_time()
    for piece in ("{#", "{{", "{% '", '{{ "', "\\", "{{ '<|im_start|>system\n"):
        recognize(piece * (1 << 20 >> len(piece).bit_length()))
    assert time.process_time() - start < 5


def test_template_comes_from_the_first_place_that_has_one(tmp_path):
    folder, adapter = write_chat_tokenizer(tmp_path / "a"), tmp_path / "b"
    adapter.mkdir()
    assert load_tokenizer(folder, adapter, None).template == ALPACA == find_template(adapter)
    write_chat_tokenizer(folder, chat_template=SMOLLM)
    assert load_tokenizer(folder / "tokenizer.json", adapter).template == recognize(SMOLLM)
    (folder / "chat_template.jinja").write_text(LLAMA31)
    assert load_tokenizer(folder).template == recognize(LLAMA31)
    (adapter / "chat_template.jinja").write_text(to_jinja(VICUNA) + "\n")
    assert load_tokenizer(folder, adapter).template == VICUNA
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": SMOLLM}]
    config = {"chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_template(tmp_path) == recognize(SMOLLM)
    shutil.copy(ROOT / "data/tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.model").template == recognize(SMOLLM)


def test_template_that_a_tokenizer_cannot_write_is_refused():
    for name in ("chatml", "llama3"):
        with pytest.raises(UserError, match=r"tokenizer.model has no <\|.*another --template"):
            load_tokenizer(ROOT / "data/tokenizer.model", template=name)
