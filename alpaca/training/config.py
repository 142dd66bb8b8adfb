"""The settings of a training run: a frozen dataclass, made once from the command line.

Every field of `TrainConfig` is a flag of fsdp_train.py; its default is Alpaca's recipe for 7B.
TINY_RECIPE replaces some defaults if no base model or preset is given, LORA_RECIPE if `--lora` is,
and a recipe of OBJECTIVE_RECIPES if an objective other than Alpaca's is. Flags replace any default.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from alpaca import CHECKOUT
from alpaca.common.cli import not_negative, positive
from alpaca.common.errors import UserError
from alpaca.training.throughput import CHIPS
from alpaca.weights.lora import TARGETS, LoraConfig
from alpaca.weights.presets import SIZES
from templates import TEMPLATES

BETAS, EPS, CLIP = (0.9, 0.999), 1e-8, 1.0  # the defaults of Hugging Face's Trainer, as in Alpaca
TINY_RECIPE = {  # the model in data/; default paths are relative to the checkout
    "model_dir": Path("data/tiny-llama"),
    "data": ("data/sample_train.json",),
    "eval_data": ("data/sample_heldout.json",),
    "out": Path("runs/tiny"),
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 3e-4,
    "checkpointing": "none",
    "dtype": "fp32",
    "save_every": 200,
    "sample_answers": 1000,
}
LORA_RECIPE = {"learning_rate": 3e-4, "checkpointing": "full"}  # as alpaca-lora, see LoraConfig
PAIRWISE = ("dpo", "ipo", "dpo-norm")
OBJECTIVE_RECIPES = {  # for 7B: a smaller model needs a higher rate
    **{name: {"learning_rate": 1e-6, "epochs": 2} for name in PAIRWISE},  # AlpacaFarm's DPO
    "reward": {"learning_rate": 3e-6, "epochs": 1},  # as AlpacaFarm's reward model
    "group": {"learning_rate": 1e-6, "epochs": 1, "batch_size": 16},  # of 8 answers each
}
LORA_RATE = 1e-5  # of these objectives, with --lora
GROUPS = {  # titles of --help, by the first flag below them
    "model_dir": "model and data",
    "epochs": "recipe",
    "objective": "objective (alpaca/training/objectives.py)",
    "lora": "LoRA (alpaca/weights/lora.py)",
    "row_tokens": "memory and speed",
    "save_every": "saving",
    "plan": "plan",
}
DTYPE_NAMES = ("bf16", "fp32")
OBJECTIVES = ("sft", *OBJECTIVE_RECIPES)  # alpaca/training/objectives.py
FLAG_OBJECTIVES = {  # flags that the other objectives have no use for
    "beta": PAIRWISE,
    **dict.fromkeys(("check", "samples", "temperature"), ("group",)),
    **dict.fromkeys(("oasst", "languages"), ("sft", "group")),
}
COUNT, YES_OR_NO = positive(int, 2**20), argparse.BooleanOptionalAction
MIXTURE: dict[str, Any] = {"nargs": "+", "metavar": "FILE[:WEIGHT]"}


def flag(default: Any, help: str, type: Callable | None = None, **options: Any) -> Any:
    """A field that add_arguments turns into a flag."""
    if default is False:
        options = {"action": "store_true", **options}
    elif "action" not in options:
        options["type"] = type
    if default not in (None, False, ()):
        help += f" (default: {default})"
    return field(default=default, metadata={**options, "help": help})


@dataclass(frozen=True)
class TrainConfig:
    model_dir: Path | None = flag(None, "base model, a folder or a GGUF file", Path)
    preset: str | None = flag(None, "instead, random weights of this size", choices=SIZES)
    tokenizer: Path | None = flag(None, "file or folder (default: the base model's)", Path)
    template: str | None = flag(
        None, "chat template (default: the base model's, else alpaca)", choices=tuple(TEMPLATES)
    )
    data: tuple[str, ...] = flag(
        (), "records of any published form (docs/formats.md); FILE:2 repeats them", **MIXTURE
    )
    oasst: str = flag("best", "which replies of OpenAssistant's trees", choices=("best", "all"))
    languages: tuple[str, ...] = flag(
        (), "languages of those trees, such as en de (default: all)", nargs="+", metavar="LANG"
    )
    eval_data: tuple[str, ...] = flag(
        (), "held-out records, to report their loss before and after, by source", **MIXTURE
    )
    eval_every: int = flag(0, "report it also every N steps", positive(int), metavar="N")
    out: Path = flag(Path("runs/alpaca"), "folder of the run", Path)

    epochs: float = flag(3, "passes over the examples", positive(float, 10_000))
    batch_size: int = flag(128, "examples in a step, over all ranks", positive(int, 2**15))
    learning_rate: float = flag(2e-5, "highest learning rate", positive(float))
    warmup_ratio: float = flag(0.03, "share of the steps with a rising learning rate", float)
    max_length: int = flag(512, "tokens that an example is cut to", COUNT)
    max_steps: int | None = flag(None, "end after this many steps", positive(int))
    seed: int = flag(42, "seed of the shuffle, random weights and dropout", not_negative)

    objective: str = flag("sft", "sft: answers; group: rewards; else: pairs", choices=OBJECTIVES)
    beta: float = flag(0.1, "how strongly preferences hold to the reference", positive(float))
    check: str | None = flag(None, "group: exact, number, regex or FILE.py:NAME gives rewards", str)
    samples: int = flag(8, "group: answers to each of --batch-size instructions", COUNT)
    temperature: float = flag(1.0, "group: of the model that answers and learns", positive(float))

    lora: LoraConfig | None = flag(None, "train an adapter of a frozen base", action="store_true")
    bits: int = flag(16, "bits of a frozen block's weight; 16: as --dtype", int, choices=(16, 8, 4))

    row_tokens: int = flag(0, "most tokens in a row (default: 4096; on a GPU, what fits)", COUNT)
    checkpointing: str = flag(
        "selective", "what the backward pass recomputes", choices=("full", "selective", "none")
    )
    dtype: str = flag("bf16", "dtype that blocks compute in", choices=DTYPE_NAMES)
    compile: bool | None = flag(None, "compile the blocks (default: on a GPU)", action=YES_OR_NO)
    offload: bool = flag(False, "keep weights and moments in host memory")
    replicas: int = flag(1, "copies of the sharded model", COUNT)
    reshard: bool | None = flag(
        None, "gather blocks again for the backward pass (default: if needed)", action=YES_OR_NO
    )
    device: str = flag("auto", "device; a Mac's GPU has no FSDP", choices=("auto", "cpu", "cuda"))

    save_every: int = flag(100, "steps (or 15 minutes) between snapshots; 0: none", not_negative)
    save_total_limit: int = flag(2, "snapshots kept on disk", positive(int))
    save_dtype: str = flag("bf16", "dtype of model/", choices=DTYPE_NAMES)
    sample_answers: int = flag(4, "held-out instructions to answer at the end", not_negative)

    plan: bool = flag(False, "print memory, steps and hours; do not train")
    gpus: int = flag(1, "ranks to plan for, without torchrun", COUNT)
    chip: str | None = flag(None, "GPU to plan for (default: this machine's)", choices=CHIPS)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "TrainConfig":
        """Alpaca's defaults, replaced by a recipe's, replaced by the flags given."""
        given = dict(vars(args))
        adapter = {n: given.pop(f"lora_{n}") for n in LoraConfig._fields if f"lora_{n}" in given}
        defaults: dict[str, Any] = {each.name: each.default for each in fields(cls)}
        defaults["gpus"] = int(os.environ.get("WORLD_SIZE", "1"))
        if not given.keys() & {"model_dir", "preset"}:
            defaults |= TINY_RECIPE
        objective = given.get("objective", "sft")
        for name, objectives in FLAG_OBJECTIVES.items():
            if name in given and objective not in objectives:
                flag_name = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag_name} goes with --objective {' or '.join(objectives)}")
        if objective != "sft":
            if "model_dir" not in given:
                raise UserError(f"--objective {objective} needs a tuned model: give --model-dir")
            defaults |= {**OBJECTIVE_RECIPES[objective], "out": Path("runs", objective)}
        if "targets" in adapter:
            adapter["targets"] = tuple(dict.fromkeys(adapter["targets"]))
        if given.pop("lora", False):
            out = defaults["out"]
            defaults |= {**LORA_RECIPE, "out": out.with_name(f"{out.name}-lora")}
            defaults["lora"] = LoraConfig(**adapter).check()
            if objective != "sft":
                defaults["learning_rate"] = LORA_RATE
        elif adapter or "bits" in given:
            name = f"lora-{next(iter(adapter))}" if adapter else "bits"
            raise UserError(f"--{name} goes with --lora")
        for name in ("model_dir", "out"):  # paths in the checkout, as they are from this folder
            defaults[name] = defaults[name] and Path(os.path.relpath(CHECKOUT / defaults[name]))
        for name in ("data", "eval_data"):
            files = given.get(name) or (os.path.relpath(CHECKOUT / f) for f in defaults[name])
            given[name] = tuple(map(str, files))
        config = cls(**{**defaults, **given})
        for name in ("gpus", "chip"):
            if name in given and not config.plan:
                raise UserError(f"--{name} goes with --plan; torchrun says how many ranks train")
        config.validate()
        return config

    def validate(self) -> None:
        """Refuse flags that contradict each other, before any file is read."""
        if self.preset and self.model_dir:
            raise UserError("--preset means random weights, --model-dir a base model: give one")
        if self.plan and self.gpus % self.replicas:
            raise UserError(f"--gpus {self.gpus} is not a multiple of --replicas {self.replicas}")
        if self.preset and self.lora and not self.plan:
            raise UserError("--lora adapts a base model: give --model-dir instead of --preset")
        if self.preset and self.tokenizer is None:
            raise UserError("--preset needs a --tokenizer, such as data/tiny-llama")
        if self.eval_every and not self.eval_data:
            raise UserError("--eval-every goes with --eval-data")
        if not self.data:
            raise UserError("--data is needed: the records to train on")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"--warmup-ratio must be from 0 to below 1, not {self.warmup_ratio}")
        if self.objective == "reward" and self.lora:
            raise UserError("--objective reward trains all weights: leave out --lora")
        if self.objective == "group" and not self.check:
            raise UserError("--objective group needs --check exact, number, regex or FILE.py:NAME")
        if self.samples < 2:
            raise UserError("--samples 1: a reward is compared with the mean of several")
        if 0 < self.row_tokens < self.longest_example:
            least = "--max-length" if self.documents == 1 else "twice --max-length"
            raise UserError(f"--row-tokens {self.row_tokens}: below {least} {self.max_length}")

    @property
    def base(self) -> Path:
        """The model that training starts from; with --preset there is none."""
        assert self.model_dir is not None
        return self.model_dir

    @property
    def result(self) -> Path:
        """The folder that training ends with."""
        return self.out / ("adapter" if self.lora else "model")

    @property
    def snapshots(self) -> Path:
        return self.out / "checkpoints"

    @property
    def documents(self) -> int:
        """Of an example: a pair of answers is in one row."""
        return 1 if self.objective in ("sft", "group") else 2

    @property
    def longest_example(self) -> int:
        return self.max_length * self.documents

    @property
    def step_answers(self) -> int:
        """What a step learns from, at most: examples, or several answers to each."""
        return self.batch_size * (self.samples if self.objective == "group" else 1)

    @property
    def stays_gathered(self) -> bool:
        """Does a block stay gathered from its forward pass to its backward pass?"""
        return self.reshard is False

    def compiles(self, device: torch.device) -> bool:
        if self.compile is None:  # in fp32, packed attention is a loop over documents
            return device.type == "cuda" and self.dtype == "bf16"
        return self.compile

    def saves_after(self, step: int, steps: int, overdue: bool) -> bool:
        """Is a snapshot due after this step, counted from 1?"""
        return self.save_every > 0 and (overdue or step == steps or step % self.save_every == 0)

    def settings(self, digest: str) -> dict[str, Any]:
        """What decides the trained weights; a run resumes with equal settings only (--eval-every
        may differ: it changes no weight). `digest` is that of the tokenized training set."""
        names = ("preset", "epochs", "batch_size", "learning_rate", "warmup_ratio", "max_length")
        objective = self.objective + (f", beta {self.beta}" if self.objective in PAIRWISE else "")
        if self.objective == "group":
            objective += f", check {self.check}, {self.samples} samples, T {self.temperature}"
        return {
            "model_dir": self.model_dir and settings_path(self.model_dir),
            **{name: getattr(self, name) for name in (*names, "max_steps", "seed", "dtype")},
            "objective": None if self.objective == "sft" else objective,
            "data": f"{' '.join(Path(spec).name for spec in self.data)}, as ids {digest}",
            # even if None: a run of all weights must not resume in an adapter's folder
            "lora": f"{self.lora}, base of {self.bits} bits" if self.lora else None,
        }


def settings_path(path: Path) -> str:
    """The same text for a folder, wherever the command was started."""
    return os.path.abspath(path).removeprefix(f"{CHECKOUT}/")


def describe_recipe(recipe: dict[str, Any]) -> str:
    texts = {name: " ".join(v) if isinstance(v, tuple) else v for name, v in recipe.items()}
    return "\n".join(f"  --{name.replace('_', '-')} {text}" for name, text in texts.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of fsdp_train.py; one that is not given is absent from the parsed arguments."""
    parser.argument_default = argparse.SUPPRESS
    recipes = OBJECTIVE_RECIPES.items()
    objectives = (f"  {name:<10}{' '.join(describe_recipe(r).split())}" for name, r in recipes)
    parser.epilog = f"""defaults without --model-dir and --preset (paths in the checkout):
{describe_recipe(TINY_RECIPE)}
defaults with --lora (and --out ends in -lora):
{describe_recipe(LORA_RECIPE)}
defaults with --objective, for 7B (smaller models need a higher rate; --lora: {LORA_RATE}):
  all       --out runs/OBJECTIVE
{chr(10).join(objectives)}"""
    group: Any = parser
    for each in fields(TrainConfig):
        if each.name in GROUPS:
            group = parser.add_argument_group(GROUPS[each.name])
        group.add_argument(f"--{each.name.replace('_', '-')}", **each.metadata)
        if each.name == "lora":
            add_lora_arguments(group)


def add_lora_arguments(group: argparse._ArgumentGroup) -> None:
    rank, alpha, dropout, targets = LoraConfig()
    add, real = group.add_argument, positive(float)
    add("--lora-rank", type=positive(int), help=f"rank of the update (default: {rank})")
    add("--lora-alpha", type=real, help=f"alpha / rank scales the update (default: {alpha})")
    add("--lora-dropout", type=float, help=f"dropout of the adapter's inputs (default: {dropout})")
    names = f"of {', '.join(TARGETS)} (default: {' '.join(targets)})"
    add("--lora-targets", nargs="+", choices=TARGETS, metavar="NAME", help=f"matrices, {names}")
