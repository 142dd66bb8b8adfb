"""Checkpoints against transformers, LoRA against PEFT: files, arithmetic and a training run."""

import json
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.checkpoints import TOKENIZER, read_tensors, same_tensors, shards_of
from helpers.lora import (
    WEIGHTS,
    adamw_losses,
    distance,
    lora_flags,
    randomize,
    trained_adapter,
    write_adapter,
    write_lora_base,
)
from helpers.models import LLAMA3, hf_model, random_ids, small_config, small_model
from helpers.parity import apart
from helpers.training import metrics, succeeded, train
from safetensors.torch import load_file

from alpaca.datagen.formats import load_records
from alpaca.training.parallel import trained_parameters
from alpaca.weights.adapter import load_adapter, save_adapter
from alpaca.weights.checkpoint import DTYPES, read_config
from alpaca.weights.loading import load_model
from alpaca.weights.lora import ATTENTION, TARGETS, LoraConfig, add_lora, initial_weights
from alpaca.weights.quantize import WeightSource
from alpaca.weights.writer import save_model
from dataset import encode_record, step_examples
from model import Llama
from tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def one_thread():
    """The models are so small that threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_folder_loads_bit_for_bit(tmp_path, shard, tied):
    theirs = hf_model(small_config(tie_word_embeddings=tied, rope_theta=1e6), torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "100KB")
    fields = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in fields and fields["rope_parameters"]["rope_theta"] == 1e6
    ours = load_model(tmp_path)
    assert same_tensors(ours.named_parameters(), theirs.named_parameters())
    assert same_tensors(read_tensors(tmp_path), theirs.named_parameters())
    assert read_config(tmp_path) == ours.config
    assert ours.config == small_config(tie_word_embeddings=tied, rope_theta=1e6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"rope_theta": 1e6, "head_dim": 24}, LLAMA3],
    ids=str,
)
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_transformers_opens_what_we_write(tmp_path, changes, shard_bytes):
    from transformers import AutoModelForCausalLM

    ours = small_model(**changes)
    with shards_of(shard_bytes):
        save_model(ours, ours.config, tmp_path / "m", tokenizer=TOKENIZER)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values()), info
    ids = random_ids(2, 24)
    distance = (ours(ids) - theirs(ids).logits).abs().max().item()
    apart("logits of a folder we wrote, opened by transformers", distance, 1e-5)
    assert theirs.generation_config.eos_token_id == 2
    generated = theirs.generate(ids, max_new_tokens=4, do_sample=False)
    assert generated.shape[0] == 2


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_transformers_sees_the_dtype_we_wrote(tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    save_model(small_model().to(dtype), small_config(), tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert theirs.dtype == dtype
    assert same_tensors(read_tensors(tmp_path / "m"), theirs.named_parameters())


def test_autotokenizer_adds_bos_on_what_we_write(tmp_path):
    from transformers import AutoTokenizer

    model = small_model(vocab_size=1024)
    save_model(model, model.config, tmp_path / "m", tokenizer=TOKENIZER)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "m"), load_tokenizer(tmp_path / "m")
    text = "Below is an instruction that describes a task."
    assert theirs(text).input_ids == ours.encode(text, bos=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


# ---------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_lora_base(tmp_path_factory.mktemp("base"))


def hf_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def peft_model(hf, **changes):
    from peft import LoraConfig, get_peft_model

    fields = {"r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION), "task_type": "CAUSAL_LM"}
    return get_peft_model(hf, LoraConfig(**{**fields, **changes}))


def peft_from(hf, folder):
    from peft import PeftModel

    with warnings.catch_warnings():  # PEFT only warns of missing and unexpected tensors
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(hf, folder).eval()


def peft_names(model: Llama) -> dict[str, torch.Tensor]:
    """Our adapter's tensors by the names they have inside of PEFT's model."""
    return {
        "base_model.model." + name.replace(".weight", ".default.weight"): tensor
        for name, tensor in trained_parameters(model).items()
    }


@pytest.mark.parametrize("targets", [ATTENTION, ("gate_proj", "up_proj", "down_proj"), ("v_proj",)])
def test_ten_steps_equal_pefts(base, targets):
    steps = partial(adamw_losses, count=10, lr=1e-2)

    def our_loss(model):
        return model(ids, labels=labels) / (labels[:, 1:] != -100).sum()

    def ours(alpha: float):
        model = load_model(base / "model")
        add_lora(model, LoraConfig(4, alpha, 0.0, targets))
        torch.manual_seed(3)
        randomize(model, 0.05)
        return model

    ids = random_ids(2, 24, vocab_size=1024)
    labels = ids.masked_fill(torch.arange(24) < 9, -100)
    mine, wrong = ours(8), ours(8.1)
    peft = peft_model(hf_of(base / "model"), target_modules=list(targets))
    inner = dict(peft.named_parameters())
    with torch.no_grad():
        for name, tensor in peft_names(mine).items():
            inner[name].copy_(tensor)
    expected = steps(peft, lambda model: model(input_ids=ids, labels=labels).loss)
    for found, loss in zip(steps(mine, our_loss), expected, strict=True):
        apart("LoRA: loss of ten steps: PEFT", abs(found - loss), 1e-5)
    weights = peft_names(mine)
    assert weights.keys() == {name for name, tensor in inner.items() if tensor.requires_grad}
    for name, tensor in weights.items():
        apart("LoRA: A and B after ten steps: PEFT", distance(tensor, inner[name]), 1e-5)
    assert expected[-1] < expected[0]
    assert steps(wrong, our_loss) != pytest.approx(expected, abs=1e-4), "this can tell"


@pytest.mark.parametrize("targets", [ATTENTION, TARGETS])
def test_peft_loads_ours(base, tmp_path, targets):
    model = load_model(base / "model")
    add_lora(model, LoraConfig(4, 8, 0.0, targets))
    randomize(model)
    lora = LoraConfig(4, 8, 0.05, targets)
    save_adapter(trained_parameters(model).items(), lora, tmp_path / "adapter", base / "model")
    ids = random_ids(2, 24, vocab_size=1024)
    peft = peft_from(hf_of(base / "model"), tmp_path / "adapter")
    assert distance(peft(ids).logits, model(ids)) <= 1e-5 * model(ids).abs().max()
    peft.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    written = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert set(fields) <= set(written)
    assert sorted(written["target_modules"]) == sorted(targets)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "r": 9},
        {"task_type": None},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
    ],
    ids=str,
)
def test_we_load_pefts(base, tmp_path, changes):
    peft, folder = peft_model(hf_of(base / "model"), **changes).eval(), tmp_path / "adapter"
    with torch.no_grad():
        for name, tensor in peft.named_parameters():
            if "lora_" in name:
                tensor.normal_(0, 0.1)
    peft.save_pretrained(folder)
    ids, model = random_ids(2, 24, vocab_size=1024), load_model(base / "model")
    plain, expected = model(ids), peft(ids).logits
    load_adapter(model, folder)
    assert distance(model(ids), expected) <= 1e-5 * expected.abs().max()
    assert distance(plain, expected) > 0.1
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")  # PEFT's older format
    (folder / WEIGHTS).unlink()
    assert torch.equal(load_model(base / "model", folder)(ids), model(ids))


def test_merged_model_is_pefts(base, command, tmp_path):
    from transformers import AutoTokenizer

    adapter, out = write_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    words = "--base", base / "model", "--adapter", adapter, "--out", out
    assert command("merge", *words)[0] == 0
    ids = random_ids(2, 24, vocab_size=1024)
    plain, expected = (load_model(base / "model", folder)(ids) for folder in (None, adapter))
    tolerance = 1e-5 * expected.abs().max()
    assert distance(load_model(out)(ids), expected) <= tolerance
    assert distance(plain, expected) > 1000 * tolerance
    assert distance(hf_of(out)(ids).logits, expected) <= tolerance
    assert AutoTokenizer.from_pretrained(out).decode([1]) == "<s>"
    theirs = peft_from(hf_of(base / "model"), adapter).merge_and_unload().state_dict()
    for name, weight in read_tensors(out).items():
        assert distance(weight, theirs[name]) <= 1e-6, name


def test_run_equals_a_plain_loop_with_peft(base, tmp_path):
    """Packed, sharded and clipped, against one example at a time."""
    out = tmp_path / "run"
    succeeded(train(lora_flags(base, out, lora_dropout=0, epochs=4)))
    model = peft_model(hf_of(base / "model"), lora_alpha=16)
    with torch.no_grad():  # A as the run began with it, B is zero
        first = initial_weights(WeightSource(base / "model"), 42)
        for name, tensor in model.named_parameters():
            if "lora_A" in name:
                tensor.copy_(first(name.replace(".default.", "."), tensor.shape))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    tokenizer, records = load_tokenizer(TOKENIZER), load_records(base / "records.json")
    examples = [encode_record(record, tokenizer)[:2] for record in records]
    examples = [(ids[:128], labels[:128]) for ids, labels in examples]
    for step, logged in enumerate(metrics(out)):
        batch = [examples[i] for i in step_examples(40, 16, 4, 42, step)]
        count = sum(label != -100 for _, labels in batch for label in labels)
        total = 0.0
        for ids, labels in batch:
            logits = model(torch.tensor([ids])).logits[0, :-1]
            loss = F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = logged["lr"]
        optimizer.step()
        optimizer.zero_grad()
        assert logged["loss"] == pytest.approx(total, rel=1e-5)
    assert step == 9
    theirs = {n.replace(".default.", "."): p for n, p in model.named_parameters()}
    for name, tensor in trained_adapter(out).items():
        assert (tensor - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
