"""The memory that `--plan` counts beside what a simulated step takes, on 1 to 1,024 ranks.

Half of the tokens are supervised; an adapter has the default rank and targets.

    python -m bench.plan        # a quarter of an hour on one core; no GPU
"""

import sys
from dataclasses import replace
from typing import Any

from alpaca.training.config import TrainConfig
from alpaca.training.memory_plan import Workload, peak_bytes
from alpaca.training.throughput import GIB
from alpaca.weights.lora import LoraConfig
from alpaca.weights.presets import preset
from bench.measure import bench_parser, stamp, store

LORA = {"lora": LoraConfig(), "checkpointing": "full"}
SETUPS: list[tuple[str, int, int, int, dict[str, Any]]] = [  # model, ranks, rows, tokens a row
    ("7B", 1, 1, 16384, {"checkpointing": "full"}),
    ("7B", 1, 2, 4096, {}),
    ("7B", 1, 1, 4096, LORA),
    ("7B", 1, 1, 4096, {**LORA, "bits": 8}),
    ("7B", 1, 1, 4096, {**LORA, "bits": 4}),
    ("7B", 1, 1, 4096, {"offload": True}),
    ("7B", 8, 1, 4096, {"checkpointing": "full"}),
    ("7B", 8, 1, 4096, {}),
    ("7B", 8, 1, 4096, {"checkpointing": "none"}),
    ("7B", 8, 1, 1725, {"reshard": False}),
    ("7B", 8, 1, 4096, LORA),
    ("7B", 64, 1, 4096, {}),
    ("7B", 1024, 1, 4096, {}),
    ("13B", 8, 1, 4096, {}),
    ("13B", 16, 1, 2048, {"replicas": 2}),
    ("65B", 64, 1, 2048, {"checkpointing": "full"}),
    ("65B", 1024, 1, 4096, {"checkpointing": "full", "replicas": 16}),
]


def describe(config: TrainConfig) -> str:
    parts = [config.checkpointing]
    if config.lora:
        parts.append(f"adapter on {config.bits} bits")
    if config.replicas > 1:
        parts.append(f"{config.replicas} × {config.gpus // config.replicas} ranks")
    parts += ["offload"] if config.offload else []
    parts += ["blocks stay gathered"] if config.stays_gathered else []
    return ", ".join(parts)


def measure() -> str:
    from bench.simulate import simulate  # loads torch's compiler
    from fsdp_train import build_optimizer, train_step

    head = "| model | ranks | rows | checkpointing | simulated, GiB a rank | planned | difference |"
    lines = ["### Memory planned and simulated", "", head, "|---|---|---|---|---|---|---|"]
    for name, gpus, rows, tokens, settings in SETUPS:
        shape = replace(preset(name), max_position_embeddings=max(2048, tokens))
        work = Workload(TrainConfig(gpus=gpus, chip="H100", **settings), shape, tokens, 0.5, rows)
        planned = peak_bytes(work)
        simulated = sum(simulate(work, build_optimizer, train_step).values())
        sizes = f"{simulated / GIB:.2f} | {planned / GIB:.2f} | {planned / simulated - 1:+.1%}"
        setup = f"{rows} of {tokens} | {describe(work.config)}"
        lines.append(f"| {name} | {gpus:,} | {setup} | {sizes} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join([*lines, "", stamp(["torch"]), ""])


def main() -> None:
    bench_parser(__doc__).parse_args()
    store(measure())


if __name__ == "__main__":
    main()
