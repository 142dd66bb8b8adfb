"""Every command on SmolLM2-135M: on its GGUF file, and on a folder converted from that.

ALPACA_SMOLLM2 names the file."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import read_tensors, same_tensors
from helpers.demo_server import arguments, running
from helpers.training import flags, succeeded, train

import weightdiff
from alpaca.__main__ import load_verb
from alpaca.common.jinja import find_template
from alpaca.inference.sampling import SamplingParams
from alpaca.serving.serve import make_engine
from dataset import encode_prompt
from templates import ALPACA, format_prompt
from tokenizer import load_tokenizer

FILE = Path(os.environ.get("ALPACA_SMOLLM2", "no file"))
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="ALPACA_SMOLLM2 names no GGUF file")
FRUIT = {"instruction": "Name a fruit.", "input": "", "output": "A pear."}
CAPITAL = {"instruction": "Name the capital.", "input": "Norway", "output": "Oslo"}
STORY = "Tell a story about a dragon who learns to swim."


def run_verb(verb: str, *words) -> None:
    module, parser = load_verb(verb)
    module.run(parser.parse_args([*map(str, words)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run_verb("convert", FILE, out := tmp_path_factory.mktemp("real") / "folder")
    return out


@pytest.fixture(scope="module", params=["file", "folder"])
def base(request, folder):
    return {"file": FILE, "folder": folder}[request.param]


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A step of fsdp_train.py in Alpaca's template: of all weights, and of an adapter."""
    out = tmp_path_factory.mktemp("tuned")
    (out / "records.json").write_text(json.dumps([FRUIT, CAPITAL]))
    words = {"model_dir": base, "data": out / "records.json", "template": "alpaca"}
    words |= {"max_steps": 1, "sample_answers": 0, "save_dtype": "bf16"}
    succeeded(train(flags(out, out / "full", **words)))
    succeeded(train(flags(out, out / "lora", lora=True, **words)))
    if base is FILE:
        run_verb("merge", "--base", base, "--adapter", out / "lora/adapter", "--out", out / "whole")
    else:
        run_verb("convert", base, out / "whole.gguf", "--adapter", out / "lora/adapter")
    return out


@pytest.fixture
def ask(command, monkeypatch, tmp_path):
    """Ask a model by every command that answers, and return what they print and write."""

    def ask_all(*model, tokens: int) -> list:
        out, limit = tmp_path / f"{len([*tmp_path.iterdir()])}", ["--max-new-tokens", tokens]
        (file := tmp_path / "set.json").write_text(json.dumps([FRUIT, CAPITAL]))
        monkeypatch.setattr(sys, "stdin", io.StringIO("Name a fruit.\nWhy?\n"))
        results = [
            command(verb, *words, *model, *limit)
            for verb, *words in (
                ["generate", CAPITAL["instruction"], "--input", CAPITAL["input"]],
                ["chat"],
                ["answers", "--set", file, "--out", out],
            )
        ]
        assert [code for code, _, _ in results] == [0] * 3, results
        engine, _ = make_engine(arguments(*model, "--no-watermark"))
        with running(engine, *limit) as server:
            content = {"messages": [{"role": "user", "content": "Name a fruit."}], "temperature": 0}
            chat = json.loads(server.post("/v1/chat/completions", content).read())
            page = {name: CAPITAL[name] for name in ("instruction", "input")}
            choices = chat["choices"] + server.answer(**page, temperature=0)["choices"]
        written = [each["output"] for each in json.loads((out / "model_outputs.json").read_text())]
        return [[text for _, text, _ in results[:2]], written, choices]

    return ask_all


def test_file_and_folder_are_answered_for_alike(ask, asked, command, folder, tmp_path):
    answers = ask("--model-dir", FILE, tokens=6)
    tokenizer = load_tokenizer(FILE)
    own = tokenizer.special_id("<|im_start|>")
    assert {prompt[0] for prompt in asked} == {own}, "untuned, it is asked in its own template"
    assert ask("--model-dir", folder, tokens=6) == answers
    for model in (FILE, folder):
        out = tmp_path / model.stem
        assert command("quantize", "--model-dir", model, "--bits", 4, "--out", out)[0] == 0
    weights = [tmp_path / model.stem / "model.safetensors" for model in (FILE, folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert command("generate", "Name a fruit.", "--max-new-tokens", 1, "--model-dir", out)[0] == 0


@pytest.mark.parametrize("form", ["adapter", "whole"])
def test_model_tuned_in_alpacas_template_is_asked_in_it(ask, asked, base, tuned, form):
    model = ["--model-dir", base, "--adapter", tuned / "lora/adapter"]
    if form == "whole":
        model = ["--model-dir", tuned / ("whole" if base is FILE else "whole.gguf")]
    ask(*model, tokens=1)
    encode = load_tokenizer(FILE).encode
    fruit, capital = (encode(format_prompt(r["instruction"], r["input"])) for r in (FRUIT, CAPITAL))
    again = asked.pop(2)  # in the chat
    assert asked == [capital, fruit, capital, fruit, fruit, capital]
    turn = encode("\n\n### Instruction:\nWhy?\n\n### Response:")
    assert again[: len(fruit)] == fruit and again[-len(turn) :] == turn


def test_weight_diff_gives_the_tuned_model_back(command, base, tuned, tmp_path):
    pair = ["--base", base, "--diff", tmp_path / "diff"]
    for verb in (
        ["make", "--tuned", tuned / "full/model"],
        ["verify"],
        ["recover", "--tuned", tmp_path / "model"],
    ):
        code, _, err = command(weightdiff, *verb, *pair)
        assert code == 0, err
    expected = read_tensors(tuned / "full/model")
    assert same_tensors(read_tensors(tmp_path / "model"), expected)
    assert not same_tensors(read_tensors(base), expected)
    assert find_template(tmp_path / "model") == ALPACA


def test_authors_rule_finds_the_watermark_of_49152_tokens(command, folder, tmp_path):
    from transformers import LlamaConfig, WatermarkDetector, WatermarkingConfig

    rule = WatermarkingConfig(greenlist_ratio=0.25, bias=2.0)
    detector = WatermarkDetector(LlamaConfig(vocab_size=49152), "cpu", rule, True)
    engine, _ = make_engine(arguments("--model-dir", FILE))  # of the server
    prompt = encode_prompt(STORY, "", engine.tokenizer)
    for marked in (True, False):
        params = SamplingParams(temperature=1, seed=1, max_new_tokens=160)
        (text := tmp_path / "text.txt").write_text(engine.generate([prompt], params)[0].text)
        engine.watermark = None
        ids = torch.tensor([engine.tokenizer.encode(text.read_text())])
        expected = detector(ids, return_dict=True).z_score[0]
        assert (expected > 4) == marked
        for model in (FILE, folder):
            result = command("watermark", text, "--tokenizer", model, "--json")[1]
            assert json.loads(result)["z"] == pytest.approx(expected, abs=1e-9)
