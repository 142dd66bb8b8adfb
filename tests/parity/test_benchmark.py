"""`alpaca benchmark` against lm-eval on made-up files of every form, with tiny models."""

import pytest
from helpers.benchmarks import hub_records, write_jsonl
from helpers.bpe import write_bpe_model
from helpers.commands import ROOT
from helpers.harness import CHOICES, compare_with_harness, harness_results, harness_task
from helpers.parity import apart

from alpaca.common.json_files import read_log

pytest.importorskip("lm_eval", reason="the extra `parity` is not installed")


ALLOWED = {"random": 1e-5, "tiny-llama": 1e-4}


@pytest.fixture(scope="module", params=ALLOWED)
def model(request, tmp_path_factory):
    """One with byte-level BPE and one with SentencePiece."""
    if request.param == "random":
        return write_bpe_model(tmp_path_factory.mktemp("folder") / "random")
    return ROOT / "data" / request.param


@pytest.fixture(scope="module")
def lm(model):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4)


@pytest.mark.parametrize("name", CHOICES)
def test_log_likelihoods_and_accuracies_equal_lm_evals(name, lm, model, command, tmp_path):
    compare_with_harness(name, lm, model, command, tmp_path, ALLOWED[model.name])


def test_generated_answers_equal_lm_evals(lm, model, command, tmp_path):
    files = [tmp_path / f"{name}.jsonl" for name in ("test", "train")]
    for seed, file in enumerate(files):
        write_jsonl(file, hub_records("gsm8k", 4, seed))
    task = harness_task("gsm8k", *files, shots=1)
    task.config.generation_kwargs["max_gen_toks"] = 40
    theirs = harness_results("gsm8k", task, lm)[0]
    flags = ("--tasks", files[0], "--shots-from", files[1], "--shots", 1, "--max-new-tokens", 40)
    model_flags = ("--model-dir", model, "--dtype", "fp32", "--out", tmp_path / "out")
    assert command("benchmark", *flags, *model_flags)[0] == 0
    ours = [[line["output"]] for line in read_log(tmp_path / "out/scores.jsonl")]
    # transformers decodes an answer alone, and SentencePiece's first space is lost
    differing = sum(a.strip() != b.strip() for (a,), (b,) in zip(ours, theirs, strict=True))
    apart("GSM8K: generated answers that differ: lm-eval", differing, 0)
