"""The settings of a training run."""

import argparse

from alpaca.common.cli import positive
from alpaca.weights.lora import ATTENTION, TARGETS, LoraConfig

FLAGS = {  # of fsdp_train.py, and what they mean if they are left out
    "bits": 16,
    "lora_rank": LoraConfig().rank,
    "lora_alpha": LoraConfig().alpha,
    "lora_dropout": LoraConfig().dropout,
    "lora_targets": list(ATTENTION),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("an adapter instead (see lora.py)").add_argument
    flag("--lora", action="store_true", help="freeze the base and learn an adapter")
    flag("--bits", type=int, choices=(16, 8, 4), help="of the frozen blocks; 16: as --dtype says")
    flag("--lora-rank", type=positive(int), help="of what is added to a weight")
    flag("--lora-alpha", type=positive(float), help="alpha / rank scales it")
    flag("--lora-dropout", type=float, help="share of its inputs that is dropped")
    flag("--lora-targets", nargs="+", choices=TARGETS, metavar="NAME", help=f"{', '.join(TARGETS)}")


def lora_of(args: argparse.Namespace) -> LoraConfig:
    targets = tuple(dict.fromkeys(args.lora_targets))
    return LoraConfig(args.lora_rank, args.lora_alpha, args.lora_dropout, targets).check()
