"""Flags and recipes → TrainConfig."""

import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from alpaca import CHECKOUT
from alpaca.common.cli import Parser
from alpaca.common.errors import UserError
from alpaca.training.config import TrainConfig, add_arguments
from alpaca.weights.lora import LoraConfig

BASE = ("--model-dir", "llama", "--data", "a.json")


def config_of(*words: str) -> TrainConfig:
    parser = Parser()
    add_arguments(parser)
    return TrainConfig.from_args(parser.parse_args(words))


def test_defaults_are_alpacas_or_those_of_the_tiny_and_lora_recipes(monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    alpaca, tiny = config_of(*BASE), config_of()
    assert (alpaca.epochs, alpaca.batch_size, alpaca.learning_rate) == (3, 128, 2e-5)
    assert (alpaca.warmup_ratio, alpaca.max_length, alpaca.seed) == (0.03, 512, 42)
    assert (alpaca.dtype, alpaca.checkpointing, alpaca.lora) == ("bf16", "selective", None)
    assert alpaca.out == Path("runs/alpaca") and alpaca.eval_data == ()
    assert tiny.model_dir == Path("data/tiny-llama") and tiny.data == ("data/sample_train.json",)
    assert (tiny.epochs, tiny.batch_size, tiny.learning_rate, tiny.dtype) == (2, 16, 3e-4, "fp32")
    preset = config_of("--preset", "7B", "--tokenizer", "t", "--data", "a.json")
    assert replace(preset, preset=None, model_dir=Path("llama"), tokenizer=None) == alpaca
    adapter = config_of(*BASE, "--lora")
    assert (adapter.learning_rate, adapter.checkpointing, adapter.batch_size) == (3e-4, "full", 128)
    assert (adapter.out, adapter.lora, adapter.bits) == (Path("runs/alpaca-lora"), LoraConfig(), 16)
    assert config_of("--lora").out == Path("runs/tiny-lora") and config_of("--lora").dtype == "fp32"


def test_objectives_have_recipes_and_folders_of_their_own():
    found = [config_of(*BASE, "--objective", name) for name in ("dpo", "reward")]
    assert [(c.learning_rate, c.epochs, c.out.name) for c in found] == [
        (1e-6, 2, "dpo"),
        (3e-6, 1, "reward"),
    ]
    adapter = config_of(*BASE, "--objective", "ipo", "--lora")
    assert (adapter.learning_rate, adapter.epochs, adapter.out.name) == (1e-5, 2, "ipo-lora")
    group = config_of(*BASE, "--objective", "group", "--check", "exact")
    assert (group.learning_rate, group.batch_size, group.out.name) == (1e-6, 16, "group")


def test_flags_replace_defaults():
    words = ("--out", "here", "--learning-rate", "1", "--lora-rank", "2", "--epochs", "9")
    config = config_of("--lora", *words, "--lora-targets", "v_proj", "q_proj", "v_proj")
    assert (config.out, config.learning_rate, config.epochs) == (Path("here"), 1, 9)
    assert config.lora == LoraConfig(rank=2, targets=("v_proj", "q_proj"))
    assert config_of("--data", "a.json", "a.json").data == ("a.json", "a.json"), "twice"
    with pytest.raises(FrozenInstanceError):
        config.seed = 1


def test_default_paths_and_settings_do_not_depend_on_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    here, settings = config_of(), config_of().settings("id")
    monkeypatch.chdir(tmp_path)
    elsewhere = config_of()
    for config, folder in ((here, CHECKOUT), (elsewhere, tmp_path)):
        paths = [os.path.normpath(folder / path) for path in (config.base, *config.eval_data)]
        assert paths == [str(CHECKOUT / "data" / n) for n in ("tiny-llama", "sample_heldout.json")]
    assert here.out == Path("runs/tiny") and elsewhere.out != here.out
    assert elsewhere.settings("id") == settings and settings["model_dir"] == "data/tiny-llama"
    (tmp_path / "llama").mkdir()
    assert config_of(*BASE).settings("id")["model_dir"] == str(tmp_path / "llama")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lora-rank", "4"), "--lora-rank goes with --lora"),
        (("--bits", "4"), "--bits goes with --lora"),
        (("--preset", "7B", "--lora", "--tokenizer", "t"), "instead of --preset"),
        (("--objective", "dpo"), "needs a tuned model: give --model-dir"),
        (("--objective", "dpo", "--preset", "7B", "--tokenizer", "t"), "give --model-dir"),
        (("--objective", "dpo", "--languages", "de"), "--languages goes with --objective sft or g"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        config_of("--data", "a.json", *words)


def test_snapshots_are_due_at_intervals_after_a_time_and_at_the_end():
    def due(config: TrainConfig) -> list[int]:
        return [step for step in range(1, 11) if config.saves_after(step, 10, overdue=step == 5)]

    assert due(TrainConfig(save_every=4)) == [4, 5, 8, 10] and due(TrainConfig(save_every=0)) == []
