"""Adapters: PEFT's arithmetic and files, a base that does not move, and runs that repeat."""

import json
import signal
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.checkpoints import bits, edit_json, write_meta
from helpers.commands import ROOT, assert_refused
from helpers.models import hf_model, random_ids, small_config
from helpers.parity import apart
from helpers.training import figures, finish, flags, launch, metrics, write_records
from safetensors.torch import load_file, save_file

import fsdp_train
from alpaca.datagen.formats import load_records
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.training import parallel
from alpaca.training.run_dir import RunDir
from alpaca.weights import lora
from alpaca.weights.adapter import load_adapter, read_adapter, read_lora_config, save_adapter
from alpaca.weights.checkpoint import parameter_shapes, read_tensors
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.lora import ATTENTION, TARGETS, FrozenLinear, LoraConfig, ThinLinear, add_lora
from alpaca.weights.quantize import WeightSource, linear_class, save_quantized
from alpaca.weights.writer import save_model
from dataset import encode_record
from model import Llama
from tokenizer import Tokenizer

TOKENIZER = ROOT / "data/tokenizer.model"
WEIGHTS = "adapter_model.safetensors"


def random_adapter(model: Llama, size: float = 0.1) -> None:
    """Numbers for B too, which begins as zero."""
    with torch.no_grad():
        for module in model.modules():
            if type(module) is ThinLinear:
                module.weight.normal_(0, size)


def of_peft(model: Llama) -> dict[str, torch.Tensor]:
    """Our adapter's tensors by the names they have inside of PEFT's model."""
    named = {name: own for name, own in model.named_parameters() if own.requires_grad}
    return {
        "base_model.model." + name.replace(".weight", ".default.weight"): own
        for name, own in named.items()
    }


def peft_model(hf, **changes):
    from peft import LoraConfig, get_peft_model

    given = {"r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION), "task_type": "CAUSAL_LM"}
    return get_peft_model(hf, LoraConfig(**{**given, **changes}))


def theirs_from(hf, folder):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # PEFT only warns of tensors that it misses or does not know
        return PeftModel.from_pretrained(hf, folder).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that Hugging Face made, with a tokenizer, and 40 records."""
    folder = tmp_path_factory.mktemp("base")
    changes = {"vocab_size": 1024, "max_position_embeddings": 256, "intermediate_size": 192}
    hf_model(small_config(**changes)).save_pretrained(folder / "hf")
    model = load_model(folder / "hf")
    save_model(model, model.config, folder / "model", tokenizer=TOKENIZER)
    write_records(folder / "records.json", 40)
    return folder


def hf_of(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A random one on all seven projections."""
    model = load_model(base / "model")
    add_lora(model, 4, 8, 0.0, TARGETS)
    torch.manual_seed(5)
    random_adapter(model)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, LoraConfig(4, 8, 0.05, TARGETS), folder, base / "model")
    return folder


def distance(a, b) -> float:
    return (a - b).abs().max().item()


# ---------------------------------------------------------------- the arithmetic


def test_a_new_adapter_leaves_the_logits_exactly_the_bases(base):
    ids = random_ids(2, 20, vocab_size=1024)
    plain = load_model(base / "model")(ids)
    model = load_model(base / "model")
    add_lora(model, 4, 8, 0.5, TARGETS)
    assert torch.equal(model(ids), plain)
    random_adapter(model)
    assert distance(model(ids), plain) > 0.1
    assert not torch.equal(model(ids), model(ids)), "dropout is on while it learns"


@pytest.mark.parity
@pytest.mark.parametrize("targets", [ATTENTION, ("gate_proj", "up_proj", "down_proj"), ("v_proj",)])
def test_ten_steps_equal_pefts(base, targets):
    def steps(model, loss_of) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(10):
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def our_loss(model):
        return model(ids, labels=labels) / (labels[:, 1:] != -100).sum()

    def ours(alpha: float):
        model = load_model(base / "model")
        add_lora(model, 4, alpha, 0.0, targets)
        torch.manual_seed(3)
        random_adapter(model, 0.05)
        return model

    ids = random_ids(2, 24, vocab_size=1024)
    labels = ids.masked_fill(torch.arange(24) < 9, -100)
    mine, wrong = ours(8), ours(8.1)
    peft = peft_model(hf_of(base), target_modules=list(targets))
    inner = dict(peft.named_parameters())
    with torch.no_grad():
        for name, own in of_peft(mine).items():
            inner[name].copy_(own)
    expected = steps(peft, lambda model: model(input_ids=ids, labels=labels).loss)
    for found, loss in zip(steps(mine, our_loss), expected, strict=True):
        apart("LoRA: loss of ten steps: PEFT", abs(found - loss), 1e-5)
    weights = of_peft(mine)
    assert weights.keys() == {name for name, own in inner.items() if own.requires_grad}
    for name, own in weights.items():
        apart("LoRA: A and B after ten steps: PEFT", distance(own, inner[name]), 1e-5)
    assert expected[-1] < expected[0]
    assert steps(wrong, our_loss) != pytest.approx(expected, abs=1e-4), "this can tell"


def test_a_seventh_of_the_inputs_is_dropped_and_the_rest_made_larger():
    layer = lora.LoraLinear(torch.nn.Linear(64, 64, bias=False), LoraConfig(64, 64, 1 / 7))
    with torch.no_grad():
        layer.base.weight.zero_()
        for thin in (layer.lora_A, layer.lora_B):
            thin.weight.copy_(torch.eye(64))
    out = layer(torch.ones(1000, 64))
    assert (out == 0).float().mean().item() == pytest.approx(1 / 7, abs=0.01)
    assert out.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(layer.eval()(torch.ones(3, 64)), torch.ones(3, 64))


def test_A_begins_even_between_bounds_that_follow_from_its_inputs():
    weight = lora.init_A(torch.empty(4, 10_000))
    assert weight.abs().max() <= 0.01 and weight.std() == pytest.approx(0.01 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("arranged", [False, True])
def test_a_model_is_adapted_once_and_before_it_is_arranged(base, adapter, arranged):
    model = load_model(base / "model", None if arranged else adapter)
    if arranged:
        optimize_layout(model)
    with pytest.raises(ValueError, match=r"q_proj has an adapter or a layout for decoding already"):
        add_lora(model)


# ---------------------------------------------------------------- a rounded base


def rounded_and_plain(base, number: int) -> tuple[Llama, Llama]:
    """One adapter over integers, and over plain matrices of the same values."""
    source = WeightSource(base / "model", number, round_head=False)
    models = []
    for kept in (True, False):
        model = load_model(base / "model")
        for name in source.shapes:
            if kind := source.linear_class(name):
                layer = kind(**source.read(name))
                plain = model.get_submodule(path := name.removesuffix(".weight"))
                plain.weight.data = layer.dequantize()
                if kept:
                    model.set_submodule(path, layer)
        add_lora(model, 4, 8, 0.0, ("q_proj", "down_proj"))
        torch.manual_seed(4)
        random_adapter(model)
        models.append(model)
    return tuple(models)


@pytest.mark.parametrize("number", [8, 4])
def test_gradients_over_a_rounded_base_are_those_over_its_values(base, number):
    rounded, plain = rounded_and_plain(base, number)
    ids = random_ids(2, 24, vocab_size=1024)
    losses = [model(ids, labels=ids) for model in (rounded, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    theirs = dict(plain.named_parameters())
    found = [name for name, own in rounded.named_parameters() if own.grad is not None]
    assert len(found) == 2 * 2 * 2
    for name in found:
        ours = rounded.get_parameter(name).grad
        assert (ours - theirs[name].grad).norm() <= 1e-5 * ours.norm(), name
        assert ours.norm() > 0


@pytest.mark.parametrize("number", [8, 4])
def test_no_dequantized_weight_is_kept_for_the_backward_pass(base, number):
    model, _ = rounded_and_plain(base, number)
    kept = []
    ids = random_ids(1, 7, vocab_size=1024)

    def weights() -> list[tuple]:
        kept.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
        with hooks:
            model(ids, labels=ids)
        own = {p.data_ptr() for p in model.parameters()}
        large = [t for t in kept if t.ndim == 2 and min(t.shape) > 16 and t.data_ptr() not in own]
        return [tuple(t.shape) for t in large if 1024 not in t.shape]

    assert weights() == []
    for path, module in list(model.named_modules()):
        if type(module) is FrozenLinear:
            model.set_submodule(path, module.layer)  # as for decoding
    assert len(weights()) > 6, "this can tell"


# ---------------------------------------------------------------- PEFT's files


@pytest.mark.parametrize("targets", [ATTENTION, TARGETS])
def test_peft_loads_ours(base, tmp_path, targets):
    model = load_model(base / "model")
    add_lora(model, 4, 8, 0.0, targets)
    random_adapter(model)
    save_adapter(model, LoraConfig(4, 8, 0.05, targets), tmp_path / "adapter", base / "model")
    ids = random_ids(2, 24, vocab_size=1024)
    peft = theirs_from(hf_of(base), tmp_path / "adapter")
    assert distance(peft(ids).logits, model(ids)) <= 1e-5 * model(ids).abs().max()
    peft.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert set(fields) <= set(written)
    assert sorted(written["target_modules"]) == sorted(targets)


CHANGES = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "r": 9},
    "no task": {"task_type": None},
    "begun otherwise": {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_we_load_pefts(base, tmp_path, changes):
    peft = peft_model(hf_of(base), **changes).eval()
    with torch.no_grad():
        for name, own in peft.named_parameters():
            if "lora_" in name:
                own.normal_(0, 0.1)
    peft.save_pretrained(tmp_path / "adapter")
    ids = random_ids(2, 24, vocab_size=1024)
    model = load_model(base / "model")
    plain = model(ids)
    load_adapter(model, tmp_path / "adapter")
    expected = peft(ids).logits
    assert distance(model(ids), expected) <= 1e-5 * expected.abs().max()
    assert distance(plain, expected) > 0.1
    folder = tmp_path / "adapter"  # as PEFT once wrote it
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    again = load_model(base / "model")
    load_adapter(again, folder)
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_adapter_in_another_dtype_is_read_as_fp32(base, adapter, tmp_path, dtype):
    folder = copied(adapter, tmp_path / "adapter")
    stored = {name: own.to(dtype) for name, own in load_file(adapter / WEIGHTS).items()}
    save_file(stored, folder / WEIGHTS)
    _, found = read_adapter(folder, load_model(base / "model").config)
    for name, own in found.items():
        assert own.dtype == torch.float32
        assert torch.equal(own, stored["base_model.model." + name].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_adapter_has_the_models_dtype(base, adapter, dtype):
    model = load_model(base / "model", dtype=dtype)
    load_adapter(model, adapter)
    assert {module.weight.dtype for module in model.modules() if type(module) is ThinLinear} == {
        dtype
    }


def test_alpaca_loras_published_settings_are_read(base, adapter, tmp_path):
    """adapter_config.json as it was written in 2023, with the fields of that time."""
    fields = {"base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none"}
    fields |= {"enable_lora": None, "fan_in_fan_out": False, "inference_mode": True}
    fields |= {"lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False}
    fields |= {"modules_to_save": None, "peft_type": "LORA", "r": 16, "task_type": "CAUSAL_LM"}
    fields["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert read_lora_config(tmp_path / "adapter_config.json") == LoraConfig()


REFUSED = {
    "another method": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "projections left out": {"exclude_modules": ["layers.0"]},
    "parameters of no module": {"target_parameters": ["q_proj.weight"]},
    "layers saved whole": {"modules_to_save": ["lm_head"]},
    "ranks that differ": {"rank_pattern": {"q_proj": 8}},
    "alphas that differ": {"alpha_pattern": {"q_proj": 8}},
    "a classifier": {"task_type": "SEQ_CLS"},
    "prefix tuning": {"peft_type": "PREFIX_TUNING"},
    "a changed base": {"init_lora_weights": "pissa"},
    "some layers": {"layers_to_transform": [0]},
    "transposed weights": {"fan_in_fan_out": True},
    "what is not there yet": {"use_next_idea": 1},
    "a pattern": {"target_modules": ".*_proj"},
    "another projection": {"target_modules": ["q_proj", "lm_head"]},
    "no projection": {"target_modules": []},
    "no rank": {"r": "remove"},
    "rank 0": {"r": 0},
    "a word for a rank": {"r": "many"},
    "alpha 0": {"lora_alpha": 0},
}


def copied(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_plain_lora_is_refused_by_name(base, adapter, command, tmp_path, changes):
    edit_json(copied(adapter, tmp_path / "adapter") / "adapter_config.json", **changes)
    words = "--base", base / "model", "--adapter", tmp_path / "adapter"
    (name,) = changes
    told = {"r": "rank" if changes.get("r") == 0 else "r is", "lora_alpha": "alpha"}.get(name, name)
    told = "targets" if isinstance(changes.get("target_modules"), list) else told
    result = command("merge", *words, "--out", tmp_path / "out")
    assert_refused(result, "adapter_config.json", told)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def break_shape(weights):
    name = next(name for name in weights if "layers.1.mlp.up_proj.lora_A" in name)
    weights[name] = weights[name][:, 1:].contiguous()
    return "layers.1.mlp.up_proj.lora_A.weight is [4, 63]", "[4, 64]"


def break_missing(weights):
    del weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    return ("missing model.layers.0.self_attn.q_proj.lora_B.weight",)


def break_unexpected(weights):
    weights["base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"] = torch.ones(64, 4)
    return ("unexpected model.layers.2.self_attn.q_proj.lora_B.weight",)


def break_numbers(weights):
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3] = torch.nan
    return ("layers.0.self_attn.q_proj.lora_B.weight", "not finite")


def break_names(weights):
    name = next(iter(weights))
    weights[name.removeprefix("base_model.model.")] = weights[name] + 1
    return "twice"


def break_dtype(weights):
    name = next(iter(weights))
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    return "float8"


@pytest.mark.parametrize(
    "break_it",
    [break_names, break_dtype, break_shape, break_missing, break_unexpected, break_numbers],
)
def test_an_adapter_for_another_shape_is_refused(base, adapter, command, tmp_path, break_it):
    file = copied(adapter, tmp_path / "adapter") / WEIGHTS
    weights = load_file(file)
    words = break_it(weights)
    save_file(weights, file)
    how = "--model-dir", base / "model", "--adapter", tmp_path / "adapter"
    assert_refused(command("generate", *how, "Hello"), WEIGHTS, *words)


def test_a_folder_that_is_no_adapter_is_refused(base, adapter, command, tmp_path):
    how = "--model-dir", base / "model", "--adapter"
    assert_refused(command("generate", *how, tmp_path / "nowhere", "Hello"), "no such folder")
    (copied(adapter, tmp_path / "half") / WEIGHTS).unlink()
    assert_refused(command("generate", *how, tmp_path / "half", "Hello"), "adapter_model.bin")
    assert_refused(command("generate", "--adapter", adapter, "Hello"), "--model-dir")


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": -1}, "alpha"),
        ({"dropout": 1}, "dropout"),
        ({"targets": ()}, "none"),
        ({"targets": ("q_proj", "query")}, "query"),
    ],
)
def test_add_lora_refuses_what_cannot_be(base, how, word):
    with pytest.raises(ValueError, match=word):
        add_lora(load_model(base / "model"), **how)


# ---------------------------------------------------------------- merged


def merged(command, base, adapter, out) -> str:
    code, told, err = command("merge", "--base", base, "--adapter", adapter, "--out", out)
    assert code == 0, err
    return told


def test_a_merged_model_is_base_and_adapter(base, adapter, command, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told = merged(command, base / "model", adapter, tmp_path / "out")
    assert "14 of 14 adapted matrices have changed" in told
    ids = random_ids(2, 24, vocab_size=1024)
    model = load_model(base / "model")
    plain = model(ids)
    load_adapter(model, adapter)
    expected = model(ids)
    tolerance = 1e-5 * expected.abs().max()
    assert distance(load_model(tmp_path / "out")(ids), expected) <= tolerance
    assert distance(plain, expected) > 1000 * tolerance
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert distance(opened(ids).logits, expected) <= tolerance
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([1]) == "<s>"
    theirs = theirs_from(hf_of(base), adapter).merge_and_unload().state_dict()
    for name, weight in read_tensors(tmp_path / "out"):
        assert distance(weight, theirs[name]) <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_rounds_once_and_touches_nothing_else(base, adapter, command, tmp_path, dtype):
    model = load_model(base / "model")
    save_model(model, model.config, tmp_path / "base", dtype, TOKENIZER)
    merged(command, tmp_path / "base", adapter, tmp_path / "out")
    before, thin = dict(read_tensors(tmp_path / "base")), load_file(adapter / WEIGHTS)
    changed = 0
    for name, weight in read_tensors(tmp_path / "out"):
        expected, stem = before[name], "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in thin:
            A, B = (thin[f"{stem}.lora_{side}.weight"] for side in "AB")
            twice = expected + (B @ A * 2).to(dtype)
            expected = (expected.float() + B @ A * 2).to(dtype)
            assert not torch.equal(twice, weight), "rounding twice would show"
            changed += 1
        assert torch.equal(bits(weight), bits(expected)), name
    assert changed == 14


def test_a_merge_has_the_embeddings_dtype_or_the_one_that_is_asked_for(
    base, adapter, command, tmp_path
):
    model = load_model(base / "model")
    save_model(model, model.config, tmp_path / "base", torch.bfloat16, TOKENIZER)
    file = tmp_path / "base" / "model.safetensors"
    mixed = {n: own.float() if "norm" in n else own for n, own in load_file(file).items()}
    save_file(mixed, file, {"format": "pt"})
    merged(command, tmp_path / "base", adapter, tmp_path / "out")
    assert {own.dtype for _, own in read_tensors(tmp_path / "out")} == {torch.bfloat16}
    words = ("--base", tmp_path / "base", "--adapter", adapter, "--dtype", "fp32")
    assert command("merge", *words, "--out", tmp_path / "wide")[0] == 0
    assert {own.dtype for _, own in read_tensors(tmp_path / "wide")} == {torch.float32}


def test_metas_folder_is_merged_too(adapter, command, tmp_path):
    torch.manual_seed(0)
    model = Llama(small_config(vocab_size=1024, intermediate_size=192, num_key_value_heads=4))
    write_meta(model, tmp_path / "llama" / "7B", 2)
    (tmp_path / "llama" / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    add_lora(model, 2, 3, 0.0, ("q_proj", "down_proj"))
    random_adapter(model)
    save_adapter(model, LoraConfig(2, 3, 0.0, ("q_proj", "down_proj")), tmp_path / "adapter")
    merged(command, tmp_path / "llama" / "7B", tmp_path / "adapter", tmp_path / "out")
    ids = random_ids(2, 24, vocab_size=1024)
    result = load_model(tmp_path / "out", dtype=torch.float32)(ids)
    half = read_tensors(tmp_path / "llama" / "7B")
    near = 1e-5 if {t.dtype for _, t in half} == {torch.float32} else 0.05
    assert distance(result, model(ids)) <= near * model(ids).abs().max()
    assert (tmp_path / "out" / "tokenizer.model").exists()


def test_a_merge_that_changes_nothing_is_an_error(base, adapter, command, tmp_path):
    file = copied(adapter, tmp_path / "zero") / WEIGHTS
    weights = load_file(file)
    save_file({n: t * ("lora_A" in n) for n, t in weights.items()}, file)
    small = copied(adapter, tmp_path / "small") / WEIGHTS
    save_file({n: t * 1e-4 for n, t in weights.items()}, small)
    words = "--base", base / "model", "--out", tmp_path / "out"
    assert_refused(command("merge", *words, "--adapter", tmp_path / "zero"), "zero changes nothing")
    merged(command, base / "model", tmp_path / "small", tmp_path / "fp32")
    model = load_model(base / "model")
    save_model(model, model.config, tmp_path / "bf16", torch.bfloat16, TOKENIZER)
    words = "--base", tmp_path / "bf16", "--out", tmp_path / "out"
    assert_refused(command("merge", *words, "--adapter", tmp_path / "small"), "nothing", "bfloat16")
    assert not list(tmp_path.glob("out*"))


def test_a_merge_needs_a_tokenizer_and_a_base_that_is_not_rounded(base, adapter, command, tmp_path):
    words = "--adapter", adapter, "--out", tmp_path / "out", "--base"
    assert_refused(command("merge", *words, base / "hf"), "no tokenizer", "--tokenizer")
    how = "--bits", 8, "--model-dir", base / "model", "--out", tmp_path / "int8"
    assert command("quantize", *how)[0] == 0
    assert_refused(command("merge", *words, tmp_path / "int8"), "is quantized")
    assert_refused(command("merge", *words, tmp_path / "nowhere"), "nowhere")
    assert command("merge", *words, base / "hf", "--tokenizer", TOKENIZER)[0] == 0
    assert (tmp_path / "out" / "tokenizer.model").exists()
    assert_refused(command("merge", *words, base / "model"), "exists already")


# ---------------------------------------------------------------- decoded with


@pytest.mark.parametrize("number", [16, 8, 4])
def test_an_adapter_works_on_whatever_holds_the_base(base, adapter, number):
    """Against plain matrices of the same values, in fp32; kernels for integers compute in less."""
    ids = random_ids(1, 24, vocab_size=1024)
    source = WeightSource(base / "model", number)
    plain = load_model(base / "model")
    for name in source.shapes:
        if kind := source.linear_class(name):
            weight = kind(**source.read(name)).dequantize()
            plain.get_submodule(name.removesuffix(".weight")).weight.data = weight
    without = plain(ids)
    load_adapter(plain, adapter)
    expected = plain(ids)
    with torch.no_grad():
        found = optimize_layout(load_model(base / "model", adapter, number))(ids)
    near = {16: 1e-5, 8: 1e-3, 4: 0.03}[number] * expected.abs().max()
    assert distance(found, expected) <= near
    assert distance(without, expected) > 5 * near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_model_decodes_as_the_merged_one(base, adapter, command, tmp_path, dtype):
    merged(command, base / "model", adapter, tmp_path / "merged")
    tokenizer, way = Tokenizer(TOKENIZER), SamplingParams(max_new_tokens=12)
    prompts = [[1, 5, 6], [1, 400, 401, 402, 403]]

    def answers(model) -> list[list[int]]:
        return [s.ids for s in Engine(model, tokenizer, 2).generate(prompts, way)]

    ours = answers(optimize_layout(load_model(base / "model", adapter, dtype=dtype)))
    if dtype == torch.float32:
        assert ours == answers(optimize_layout(load_model(tmp_path / "merged")))
    assert ours != answers(optimize_layout(load_model(base / "model", dtype=dtype)))
    assert ours == answers(optimize_layout(load_model(base / "model", adapter, dtype=dtype)))


def test_generate_answers_with_an_adapter(base, adapter, command, tmp_path):
    merged(command, base / "model", adapter, tmp_path / "merged")
    ask = ("--max-new-tokens", 12, "Name a fruit.", "--model-dir")
    code, said, err = command("generate", *ask, base / "model", "--adapter", adapter)
    assert code == 0, err
    assert said == command("generate", *ask, tmp_path / "merged")[1]
    assert said != command("generate", *ask, base / "model")[1]
    assert command("generate", *ask, base / "model", "--adapter", adapter, "--bits", 4)[0] == 0


def test_a_file_of_answers_is_not_gone_on_with_by_another_adapter(base, adapter, command, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"instruction": "Go"}\n')
    out = tmp_path / "answers.jsonl"
    words = ("--model-dir", base / "model", "--file", tmp_path / "asked.jsonl", "--out", out)
    words += ("--max-new-tokens", 3)
    assert command("generate", *words, "--adapter", adapter)[0] == 0
    assert_refused(command("generate", *words), "answers.jsonl", "another")


# ---------------------------------------------------------------- trained


def lora_flags(base, out, **changes) -> list[str]:
    """test_train's run of 5 steps, of an adapter."""
    chosen = {"lora": True, "lora_dropout": 0.05, "lora_rank": 4, "save_dtype": None}
    chosen["learning_rate"] = 1e-2
    return flags(base, out, **{**chosen, **changes})


@pytest.fixture
def here(command):
    """Train in this process, as one rank: here(words) -> (code, out, err)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda words: command(fsdp_train, *words)
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)


def train(here, words) -> str:
    code, out, err = here(words)
    assert code == 0, err
    return out


def learned_in(out) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / WEIGHTS)


def assert_same_run(out, other, near: float = 1e-5) -> None:
    ours, theirs = figures(out), figures(other)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=near), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * near), a["step"]
    theirs = learned_in(other)
    for name, own in learned_in(out).items():
        # Adam makes steps of one size out of the smallest gradients, and these are rounded
        assert (own - theirs[name]).norm() <= 1e-3 * theirs[name].norm(), name


def differ(out, other) -> bool:
    ours, theirs = learned_in(out), learned_in(other)
    return any((ours[n] - theirs[n]).norm() > 0.01 * theirs[n].norm() for n in ours)


@pytest.mark.parametrize("number", [16, 8, 4])
def test_only_the_adapter_changes(base, here, tmp_path, monkeypatch, number):
    seen = {}

    def watched(model, *given):
        source = WeightSource(base / "model", number, round_head=False)
        for name, own in [*model.named_parameters(), *model.named_buffers()]:
            own = own.full_tensor() if hasattr(own, "full_tensor") else own
            stem, _, part = name.replace(".base", "").replace(".layer.", ".").rpartition(".")
            if "lora_" not in name:
                assert torch.equal(bits(own), bits(source.read(f"{stem}.weight")[part])), name
            seen[name] = own.clone()
        return export(model, *given)

    export = fsdp_train.save_result
    monkeypatch.setattr(fsdp_train, "save_result", watched)
    train(here, lora_flags(base, tmp_path / "run", bits=number))
    ours = learned_in(tmp_path / "run")
    assert len(ours) == 2 * 2 * 4 and len(seen) >= 2 * 9 + 3 + len(ours)
    assert all(own.dtype == torch.float32 and own.norm() > 0 for own in ours.values())
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_equals_a_plain_loop_with_peft(base, here, tmp_path):
    """Packed, sharded and clipped, against one example at a time."""
    from dataset import encode_record, step_examples

    train(here, lora_flags(base, tmp_path / "run", lora_dropout=0, epochs=4))
    model = peft_model(hf_of(base), lora_alpha=16)
    with torch.no_grad():  # A as the run began with it, B is zero
        first = lora.initial_weights(WeightSource(base / "model"), 42)
        for name, own in model.named_parameters():
            if "lora_A" in name:
                own.copy_(first(name.replace(".default.", "."), own.shape))
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, weight_decay=0.0)
    tokenizer, records = Tokenizer(TOKENIZER), load_records(base / "records.json")
    examples = [encode_record(record, tokenizer)[:2] for record in records]
    for step, logged in enumerate(metrics(tmp_path / "run")):
        chosen = [examples[i] for i in step_examples(40, 16, 4, 42, step)]
        count = sum(label != -100 for _, labels in chosen for label in labels)
        total = 0.0
        for ids, labels in chosen:
            logits = model(torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits, torch.tensor(labels[1:]), reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.param_groups[0]["lr"] = logged["lr"]
        optimizer.step()
        optimizer.zero_grad()
        assert logged["loss"] == pytest.approx(total, rel=1e-5)
    assert step == 9
    theirs = {n.replace(".default.", "."): p for n, p in model.named_parameters()}
    for name, tensor in learned_in(tmp_path / "run").items():
        assert (tensor - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """A run on one rank without dropout, the base as it is or rounded: reference(bits) -> folder"""
    made = {}

    def run(here, number: int):
        if number not in made:
            made[number] = tmp_path_factory.mktemp("reference") / "run"
            train(here, lora_flags(base, made[number], bits=number, lora_dropout=0))
        return made[number]

    return run


@pytest.mark.parametrize("number", [16, 4])
def test_two_ranks_equal_one(base, here, reference, tmp_path, number):
    words = lora_flags(base, tmp_path / "run", bits=number, lora_dropout=0)
    code, _, err = finish(launch(words, ranks=2))
    assert code == 0, err
    assert_same_run(tmp_path / "run", reference(here, number))
    assert differ(reference(here, 16), reference(here, 4)), "this can tell"


@pytest.mark.parametrize("number", [16, 4])
def test_what_is_computed_again_drops_the_same(base, here, tmp_path, number):
    for mode in ("none", "full", "selective"):
        how = {"bits": number, "lora_dropout": 0.3, "checkpointing": mode}
        train(here, lora_flags(base, tmp_path / mode, **how))
        assert_same_run(tmp_path / mode, tmp_path / "none")


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(base, here, tmp_path, monkeypatch):
    how = {"lora_dropout": 0.3, "epochs": 4}
    train(here, lora_flags(base, tmp_path / "whole", **how))
    step, done, opened = fsdp_train.train_step, [], []

    def open_run(*given):
        opened.append(RunDir(*given))
        return opened[-1]

    def interrupted(*given):
        done.append(1)
        given[-1].number = signal.SIGTERM if len(done) == 4 else 0
        return step(*given)

    monkeypatch.setattr(fsdp_train, "RunDir", open_run)
    for out in ("run", "other"):
        done.clear()
        monkeypatch.setattr(fsdp_train, "train_step", interrupted)
        code, _, err = here(lora_flags(base, tmp_path / out, **how))
        assert code == 128 + signal.SIGTERM and "stopped after step 4" in err
        torch.distributed.destroy_process_group()  # which leaving the process would do
        opened[-1].close()
        (snapshot,) = (tmp_path / out / "checkpoints").glob("step-??????")
        kept = dcp.FileSystemReader(snapshot).read_metadata().state_dict_metadata
        assert len(kept) == 3 * 16 and all(".lora_" in name for name in kept)
        monkeypatch.setattr(fsdp_train, "train_step", step)
        if out == "other":  # what is dropped must depend on the step
            monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
        train(here, lora_flags(base, tmp_path / out, **how))
    run, whole = ((tmp_path / n / "adapter" / WEIGHTS).read_bytes() for n in ("run", "whole"))
    assert run == whole and figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert differ(tmp_path / "other", tmp_path / "whole"), "this can tell"


def test_in_bf16_the_base_is_bf16_and_the_adapter_learns_in_fp32(base, here, tmp_path, monkeypatch):
    seen, step = {}, fsdp_train.train_step

    def watched(model, optimizer, *rest):
        block = model.model.layers[0].self_attn
        hook = block.q_proj.lora_A.register_forward_hook(
            lambda module, inputs, out: seen.update(compute=out.dtype)
        )
        result = step(model, optimizer, *rest)
        hook.remove()
        seen["base"] = {p.dtype for p in model.parameters() if not p.requires_grad}
        seen["learned"] = {p.dtype for p in model.parameters() if p.requires_grad}
        seen["moments"] = {s["exp_avg"].dtype for s in optimizer.state.values()}
        return result

    monkeypatch.setattr(fsdp_train, "train_step", watched)
    train(here, lora_flags(base, tmp_path / "run", dtype="bf16"))
    assert seen["base"] == {torch.bfloat16} and seen["compute"] == torch.bfloat16
    assert seen["learned"] == seen["moments"] == {torch.float32}


@pytest.mark.parametrize(("number", "mode"), [(16, "full"), (4, "selective")])
def test_blocks_are_compiled_once_in_one_piece_and_compute_the_same(number, mode):
    config = small_config(num_hidden_layers=4, intermediate_size=192)
    linear = partial(linear_class, bits=number, round_head=False)
    shapes = SimpleNamespace(config=config, shapes=parameter_shapes(config), linear_class=linear)
    ids, gradients = random_ids(1, 24), []
    for compiled in (False, True):
        torch.manual_seed(4)
        model = lora.build_lora_model(shapes, torch.float32, LoraConfig(4, 8, 0.0))
        parallel.apply_activation_checkpointing(model, mode)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for own in [*model.parameters(), *model.buffers()]:
                own.normal_(0, 0.1) if own.is_floating_point() else own.random_(0, 15)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for block in model.model.layers:
            if compiled:
                block.compile(backend="aot_eager", fullgraph=True)
        model(ids, labels=ids).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    # one for the first block, into whose input no gradient goes, and one for the others
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [16, 4])
def test_a_compiled_run_equals_a_plain_one(base, here, reference, tmp_path, number):
    torch._dynamo.reset()
    how = {"bits": number, "lora_dropout": 0, "compile": True, "checkpointing": "full"}
    train(here, lora_flags(base, tmp_path / "run", **how))
    assert_same_run(tmp_path / "run", reference(here, number), near=1e-4)


def test_a_rounded_folder_is_a_base_too(base, here, tmp_path):
    save_quantized(WeightSource(base / "model", 4), tmp_path / "int4", base / "model")
    out = tmp_path / "run"
    train(here, lora_flags(base, out, model_dir=tmp_path / "int4", lora_dropout=0))
    source = WeightSource(tmp_path / "int4")  # and the same values as plain matrices
    values = {n: source.read(n) for n in source.shapes}
    plain = {
        n: source.linear_class(n)(**p).dequantize()
        for n, p in values.items()
        if source.linear_class(n)
    }
    pairs = {n: plain.get(n, p.get("weight")) for n, p in values.items()}
    save_model(pairs.items(), source.config, tmp_path / "plain", torch.float32, TOKENIZER)
    same = lora_flags(base, tmp_path / "same", model_dir=tmp_path / "plain", lora_dropout=0)
    train(here, same)
    assert_same_run(out, tmp_path / "same")
    refused = here(flags(base, tmp_path / "no run", model_dir=tmp_path / "int4"))
    assert_refused(refused, "quantization_config")
    # asked for what it is, it is that, and every place that tells of bits tells these
    again = lora_flags(base, tmp_path / "again", model_dir=tmp_path / "int4", bits=4)
    train(here, [*again, "--max-steps", "1"])
    settings = json.loads((tmp_path / "again" / "settings.json").read_text())
    assert settings["lora"].endswith("base of 4 bits")
    assert "base of 4 bits" in (tmp_path / "again" / "adapter" / "README.md").read_text()
    code, told, _ = here([*lora_flags(base, out, model_dir=tmp_path / "int4"), "--plan"])
    assert code == 0 and "int4" in told
    other = lora_flags(base, tmp_path / "no run", model_dir=tmp_path / "int4", bits=8)
    assert_refused(here(other), "quantized already")
    moved = lora_flags(base, tmp_path / "no run", model_dir=tmp_path / "int4", offload=True)
    assert_refused(here(moved), "--offload cannot move quantized weights")


def test_the_held_out_loss_is_that_of_the_adapter_without_dropout(base, here, tmp_path):
    out = tmp_path / "run"
    words = lora_flags(base, out, lora_dropout=0.5, eval_data=base / "records.json")
    train(here, words)
    logged = [r["held_out_loss"] for r in metrics_of(out) if "held_out_loss" in r]
    model = load_model(base / "model")
    load_adapter(model, out / "adapter")
    examples = [
        encode_record(record, Tokenizer(TOKENIZER))[:2]
        for record in load_records(base / "records.json")
    ]
    with torch.no_grad():
        total = sum(
            model(torch.tensor([ids]), labels=torch.tensor([labels])) for ids, labels in examples
        )
    learned = sum(label != -100 for _, labels in examples for label in labels)
    assert logged[-1] == pytest.approx((total / learned).item(), rel=1e-4)


def metrics_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_an_adapter_learns_by_heart_and_answers(base, here, command, tmp_path):
    record = {"instruction": "Name the fox's colour.", "output": "the old red fox"}
    (tmp_path / "one.jsonl").write_text(json.dumps(record) + "\n")
    out = tmp_path / "run"
    changes = {"data": tmp_path / "one.jsonl", "eval_data": tmp_path / "one.jsonl", "bits": 8}
    changes |= {"batch_size": 4, "epochs": 160, "learning_rate": 3e-2, "sample_answers": 5}
    changes["lora_targets"] = None
    words = lora_flags(base, out, **changes)
    shown = train(here, words)
    assert "as expected: 1 of 1" in shown and "→ the old red fox" in shown
    assert f"wrote {out / 'adapter'}" in shown
    ask = "--model-dir", base / "model", "--adapter", out / "adapter", record["instruction"]
    assert command("generate", *ask)[1].strip() == "the old red fox"
    code, again, err = here(words)
    assert code == 0 and "is finished" in err and "as expected: 1 of 1" in again
    merged(command, base / "model", out / "adapter", tmp_path / "merged")
    ask = "--model-dir", tmp_path / "merged", record["instruction"]
    assert command("generate", *ask)[1].strip() == "the old red fox"


MISTAKES = {
    "no such projection": ({"lora_targets": "query"}, "query", "q_proj"),
    "rank 0": ({"lora_rank": 0}, "--lora-rank", "above 0"),
    "dropout 1": ({"lora_dropout": 1}, "dropout", "below 1"),
    "alpha 0": ({"lora_alpha": 0}, "--lora-alpha"),
    "bits": ({"bits": 3}, "--bits"),
    "without --lora": ({"lora": None}, "--lora-rank goes with --lora"),
    "no base": ({"model_dir": None, "preset": "tiny"}, "--preset", "--model-dir"),
    "rounded and offloaded": ({"bits": 4, "offload": True}, "--offload"),
}


@pytest.mark.parametrize("changes_and_words", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_leaves_no_folder(base, here, tmp_path, changes_and_words):
    changes, *words = changes_and_words
    words_given = lora_flags(base, tmp_path / "run", **{"lora_dropout": None, **changes})
    assert_refused(here(words_given), *words)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_adapter_or_of_the_whole_model_is_not_gone_on_with(base, here, tmp_path):
    train(here, lora_flags(base, tmp_path / "run"))
    assert_refused(here(lora_flags(base, tmp_path / "run", lora_rank=5)), "another run", "rank=4")
    assert_refused(here(lora_flags(base, tmp_path / "run", bits=8)), "another run", "16 bits")
    words = flags(base, tmp_path / "run", learning_rate=1e-2)
    assert_refused(here(words), "another run", "now it is None")


def test_offloaded_weights_learn_the_same(base, here, reference, tmp_path):
    train(here, lora_flags(base, tmp_path / "run", offload=True, lora_dropout=0))
    assert_same_run(tmp_path / "run", reference(here, 16))
