"""A tuned model carries its chat template, and every command asks it in that."""

import io
import json
import sys

import pytest
from helpers.models import small_model
from helpers.templates import SMOLLM, write_chat_tokenizer
from helpers.training import flags, succeeded, train, write_records

from alpaca.common.jinja import find_template, recognize, to_jinja
from alpaca.serving.openai_schema import parse_request
from alpaca.weights.checkpoint import read_config
from alpaca.weights.writer import save_model
from dataset import chat_prompt
from templates import ALPACA, LLAMA3_CHAT, VICUNA
from tokenizer import load_tokenizer

QUESTION = [{"role": "user", "content": "Name a fruit."}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model whose own template is chatml, and 40 records."""
    folder = tmp_path_factory.mktemp("base")
    model = small_model(vocab_size=604, max_position_embeddings=512)
    tokenizer = write_chat_tokenizer(folder / "tokenizer", chat_template=SMOLLM)
    save_model(model, model.config, folder / "model", tokenizer=tokenizer)
    write_records(folder / "records.json", 40)
    return folder


def tune(base, out, **changes):
    """One step, in a template that is not the base's."""
    words = {"max_steps": 1, "max_length": 512, "sample_answers": 0, **changes}
    succeeded(train(flags(base, out, **words)))
    return out


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    return tune(base, tmp_path_factory.mktemp("run"), template="llama3") / "model"


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora")
    return tune(base, out, template="vicuna", lora=True) / "adapter"


def prompt_in(template, folder) -> list[int]:
    tokenizer = load_tokenizer(folder)
    tokenizer.template = template
    return chat_prompt(QUESTION, tokenizer)


def test_training_writes_its_template_in_place_of_the_bases(base, tuned, adapter):
    assert find_template(base / "model") == recognize(SMOLLM)
    assert (tuned / "chat_template.jinja").read_text() == to_jinja(LLAMA3_CHAT)
    assert "chat_template" not in json.loads((tuned / "tokenizer_config.json").read_text())
    assert "`llama3`" in (tuned / "README.md").read_text()
    end = load_tokenizer(tuned).special_id("<|eot_id|>")
    for name in ("config.json", "generation_config.json"):
        ends = json.loads((tuned / name).read_text())["eos_token_id"]
        assert ends == [load_tokenizer(tuned).eos_id, end]
    assert (adapter / "chat_template.jinja").read_text() == to_jinja(VICUNA)


def test_without_a_flag_the_bases_template_is_kept(base, tmp_path):
    tune(base, tmp_path / "run")
    assert find_template(tmp_path / "run/model") == recognize(SMOLLM)
    end = load_tokenizer(base / "model").special_id("<|im_end|>")
    assert end in read_config(tmp_path / "run/model").eos_token_id


@pytest.mark.parametrize("verb", ["generate", "chat", "answers"])
def test_commands_prompt_a_tuned_model_in_its_template(
    command, monkeypatch, asked, base, tuned, adapter, tmp_path, verb
):
    (tmp_path / "set.json").write_text(json.dumps([{"instruction": "Name a fruit."}]))
    words = {
        "generate": ["generate", "Name a fruit."],
        "chat": ["chat"],
        "answers": ["answers", "--set", tmp_path / "set.json"],
    }[verb]
    models = {
        LLAMA3_CHAT: ["--model-dir", tuned],
        VICUNA: ["--model-dir", base / "model", "--adapter", adapter],
        recognize(SMOLLM): ["--model-dir", base / "model"],
        ALPACA: ["--model-dir", tuned, "--template", "alpaca"],
    }
    for number, (template, model) in enumerate(models.items()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Name a fruit.\n"))
        out = ["--out", tmp_path / str(number)] if verb == "answers" else []
        code, _, err = command(*words, *out, *model, "--max-new-tokens", 1)
        assert code == 0, err
        assert asked.pop() == prompt_in(template, tuned) and not asked


def test_server_prompts_a_tuned_model_in_its_template(tuned):
    tokenizer = load_tokenizer(tuned)
    for body, path in (
        ({"messages": QUESTION}, "/v1/chat/completions"),
        ({"instruction": "Name a fruit."}, "/v1/completions"),
    ):
        request = parse_request(body, path, "m", tokenizer, 10)
        assert request.prompts == [prompt_in(LLAMA3_CHAT, tuned)]
        assert request.text == "Name a fruit."


def test_merged_model_ends_as_its_adapter(command, base, tmp_path):
    out = tune(base, tmp_path / "run", template="llama3", lora=True)
    merge = ["--base", base / "model", "--adapter", out / "adapter", "--dtype", "fp32"]
    assert command("merge", *merge, "--out", tmp_path / "merged")[0] == 0
    tokenizer = load_tokenizer(tmp_path / "merged")
    ends = [tokenizer.eos_id, tokenizer.special_id("<|eot_id|>")]
    assert read_config(tmp_path / "merged").eos_token_id == ends


def test_merged_and_converted_models_carry_the_adapters_template(command, base, adapter, tmp_path):
    merge = ["--base", base / "model", "--adapter", adapter, "--dtype", "fp32"]
    assert command("merge", *merge, "--out", tmp_path / "merged")[0] == 0
    config = json.loads((tmp_path / "merged/tokenizer_config.json").read_text())
    assert "chat_template" not in config
    convert = ["convert", base / "model", tmp_path / "m.gguf", "--adapter", adapter]
    assert command(*convert)[0] == 0
    for model in (tmp_path / "merged", tmp_path / "m.gguf"):
        assert load_tokenizer(model).template == VICUNA
