"""Fine-tuning on one GPU: useful tokens a second, MFU and memory, against transformers' Trainer.

    python -m bench.gpu_train                          # three tables: full, lora, lora-int4
    python -m bench.gpu_train --only full              # one of them: under ten minutes
    python -m bench.gpu_train --data alpaca_data.json --tokenizer llama-7b      # real lengths
    python -m bench.gpu_train --device cpu --preset tiny --batch-size 8 --steps 4      # a dry run

A random 7B, made on the GPU, is trained in batches of 128 examples with the lengths of Alpaca's:
those of bench/train.py, or of a file. Ours is `fsdp_train.train`, the whole loop, for 200 steps or
as many as there is time for; no snapshot and no result is written. Trainer, in bf16 autocast with
fp32 weights, pads micro-batches of 4 examples as in Alpaca's train.py, or packs 8 into a row; an
adapter is PEFT's, and its base is bf16. The sides run one after the other, each in a process of its
own; a side's rate is all its tokens by all its seconds, without the first steps. Peers that are not
installed are left out.
"""

import argparse
import gc
import json
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch

import fsdp_train
from alpaca.datagen.formats import load_mixture
from alpaca.training.config import TrainConfig
from alpaca.training.memory_plan import measure, peak_bytes, resolve_defaults
from alpaca.training.parallel import process_group
from alpaca.training.process import StopSignal
from alpaca.training.run_dir import RunDir, step_seconds
from alpaca.training.throughput import (
    CHIPS,
    GIB,
    estimated_seconds,
    find_chip,
    flops_per_token,
    mean_length,
    peak_memory,
)
from alpaca.weights import lora
from alpaca.weights.lora import LoraConfig
from alpaca.weights.presets import preset
from bench.decode import NoTokenizer
from bench.measure import (
    ROOT,
    gpu,
    gpu_parser,
    matmul_rate,
    memory_rate,
    number,
    run_sides,
    stamp,
    store,
)
from bench.models import hf_random, random_source
from bench.train import as_examples, examples, pad, run_trainer
from dataset import encode_all
from tokenizer import load_tokenizer

MICRO = 4  # examples of Trainer at a time
WARM_UP = 3  # steps that do not count: in them blocks are compiled
ALPACA, TRUSTED = 3 * 52_002, 200  # examples of three epochs; fewer steps make a rough guess
PEERS = ("transformers", "accelerate", "peft")
PARTS = {"full": (None, 16), "lora": (LoraConfig(), 16), "lora-int4": (LoraConfig(), 4)}


def training_pairs(args: argparse.Namespace, count: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels): random tokens, or the examples of a file, repeated if they are few."""
    vocab_size = preset(args.preset).vocab_size
    if not args.data:
        return examples(count, vocab_size)
    mixture, tokenizer = load_mixture([args.data], 0), load_tokenizer(args.tokenizer)
    data = encode_all(*mixture, tokenizer, TrainConfig.max_length)
    spans = [slice(a, b) for a, b in zip(data.starts, data.starts[1:], strict=False)]
    pairs = [(data.ids[span].tolist(), data.labels[span].tolist()) for span in spans]
    return (pairs * -(-count // len(pairs)))[:count]


class EnoughSteps(Exception):
    pass


class TimedRun(RunDir):
    """Ends the training loop after its last step, or when the time is over."""

    last, end = 0, 0.0

    def log_step(self, record: dict) -> None:
        super().log_step(record)
        if record["step"] == self.last or time.monotonic() > self.end:
            raise EnoughSteps


def run_ours(args: argparse.Namespace) -> dict:
    start, shape, (adapter, bits) = time.monotonic(), preset(args.preset), PARTS[args.only[0]]
    data = as_examples(training_pairs(args, args.batch_size * args.steps))
    settings = {"model_dir": Path("random"), "lora": adapter, "checkpointing": "full"}
    config = TrainConfig(
        **(settings if adapter else {"preset": args.preset}),
        bits=bits,
        device=args.device,
        batch_size=args.batch_size,
        epochs=1,
        save_every=0,
    )
    with process_group(args.device, 1) as (mesh, device):
        config = resolve_defaults(config, shape, data, args.steps)
        work, chip = measure(config, shape, data, args.steps), find_chip(gpu() or "")
        source = random_source(shape, bits, args.device, round_head=False)
        job = fsdp_train.Job(config, shape, NoTokenizer(), data, None, [], args.steps)
        with (
            tempfile.TemporaryDirectory() as folder,
            TimedRun(Path(folder) / "run", {}, quiet=False) as run,
            mock.patch.object(lora, "open_base", lambda *_: source),  # instead of model_dir's
            StopSignal() as stop,
            suppress(EnoughSteps),
        ):
            run.last, run.end = args.steps, start + 0.7 * float(args.seconds)  # then the peers
            fsdp_train.train(job, run, mesh, device, stop)
    plan = (
        f"Ours: {config.checkpointing} checkpointing, {work.rows} rows a step of up to "
        f"{work.row_tokens} tokens; --plan says {peak_bytes(work) / GIB:.1f} GiB"
    )
    plan += f" and {estimated_seconds(work, CHIPS[chip]):.2f} s a step" if chip else ""
    seconds = [step_seconds(record) for record in run.records]
    first = time.monotonic() - start - sum(seconds[1:])
    return {
        "tokens": [record["tokens"] for record in run.records],
        "seconds": seconds,
        "memory": peak_memory(torch.device(args.device)),
        "note": f"{plan}. Its first step ended after {first:.0f} s.",
    }


def run_peer(args: argparse.Namespace, packed: bool) -> dict:
    from transformers import DataCollatorWithFlattening

    adapter, _ = PARTS[args.only[0]]
    flash = packed and args.device == "cuda" and find_spec("flash_attn")
    attention = {"attn_implementation": "flash_attention_2" if flash else "sdpa"}
    dtype = torch.bfloat16 if adapter else torch.float32
    pairs = training_pairs(args, args.batch_size * args.peer_steps)
    collate = DataCollatorWithFlattening() if packed else pad
    how = collate, args.batch_size, 2 * MICRO if packed else MICRO
    options: dict = {"use_cpu": args.device == "cpu", "bf16": True}
    for checkpointing in (False, True):
        model = hf_random(preset(args.preset), args.device, dtype, use_cache=False, **attention)
        if adapter:
            model = with_adapter(model, adapter)
        try:
            options["gradient_checkpointing"] = checkpointing
            tokens, seconds, _ = run_trainer(model, pairs, *how, **options)
            break
        except torch.OutOfMemoryError:
            if checkpointing:
                raise
            del model
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {
        "tokens": tokens.tolist(),
        "seconds": seconds.tolist(),
        "memory": peak_memory(torch.device(args.device)),
        "note": "Trainer needed gradient checkpointing." if checkpointing else "",
    }


def with_adapter(model, adapter: LoraConfig):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    sizes = {"r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout}
    return get_peft_model(model, PeftConfig(**sizes, target_modules=[*adapter.targets]))


SIDES = {
    "ours": run_ours,
    "Trainer, padded": lambda args: run_peer(args, False),
    "Trainer, packed": lambda args: run_peer(args, True),
}


def table(args: argparse.Namespace, part: str, figures: dict, notes: list[str]) -> str:
    shape, (adapter, _), chip = preset(args.preset), PARTS[part], find_chip(gpu() or "")
    data = as_examples(training_pairs(args, args.batch_size * args.steps))
    share = float(data.supervised.sum() / data.lengths.sum())
    flops = flops_per_token(shape, mean_length(data.lengths), share, adapter)
    matmul, memory = 1e9 * matmul_rate("bf16", args.device), memory_rate(args.device)
    head = "| side | steps | useful tokens/s | MFU | of measured matmul | peak memory, GiB "
    head += "| Alpaca's 3 epochs, h | ours is faster |"
    lines = [f"### Fine-tune a {args.preset} on one GPU: {part}", "", head, "|---" * 8 + "|"]
    ours = None
    for side, found in figures.items():
        tokens, seconds = (sum(found[name][WARM_UP:]) for name in ("tokens", "seconds"))
        notes += [found["note"]] if found["note"] else []
        if not tokens:
            notes.append(f"{side}: no step after the first {WARM_UP}, which do not count.")
            continue
        rate, steps = tokens / seconds, len(found["tokens"]) - WARM_UP
        ours = rate if side == "ours" else ours
        hours = f"{ALPACA * data.lengths.mean() / rate / 3600:.2f}"
        cells = [side, str(steps), f"{rate:,.0f}"]
        cells += [f"{flops * rate / CHIPS[chip].flops:.1%}" if chip else ""]
        cells += [f"{flops * rate / matmul:.1%}", f"{found['memory'] / GIB:.1f}"]
        cells += [hours if steps + WARM_UP >= TRUSTED else f"about {hours}"]
        cells += [f"{ours / rate:.2f}×" if ours else ""]
        lines.append(f"| {' | '.join(cells)} |")
    what = f"Examples of {Path(args.data).name}" if args.data else "Log-normal lengths"
    about = (
        f"{what}, {data.lengths.mean():.0f} tokens on average. The hours are extrapolated to "
        f"52,002 of them in 3 epochs; from fewer than {TRUSTED} steps they are a guess (about). "
        f"Measured here: matrix product {number(matmul / 1e12)} TFLOP/s, memory "
        f"read at {number(memory)} GB/s."
    )
    packages = [name for name in ("torch", *PEERS) if find_spec(name)]
    return "\n".join([*lines, "", about, *notes, "", stamp(packages), ""])


def main() -> None:
    parser = gpu_parser(__doc__, [*PARTS])
    add = parser.add_argument
    add("--steps", type=int, default=TRUSTED, help=f"of ours (default: {TRUSTED})")
    add("--peer-steps", type=int, default=8, help="of Trainer (default: 8)")
    add("--batch-size", type=int, default=128, help="examples in a step (default: 128, as Alpaca)")
    add("--data", help="records to train on (default: random tokens of Alpaca's lengths)")
    tokenizer = ROOT / "data/tokenizer.model"
    add("--tokenizer", type=Path, default=tokenizer, help="of --data (default: the tiny model's)")
    args = parser.parse_args()
    if args.side:
        return print(json.dumps(SIDES[args.side](args)))
    if args.device == "cuda" and not gpu():
        return print("No GPU: nothing is measured.")
    names = ("steps", "peer_steps", "batch_size", "data", "tokenizer", "device", "preset")
    flags = {name: getattr(args, name) for name in names if getattr(args, name)}
    for part in args.only:
        needed = PEERS if PARTS[part][0] else PEERS[:2]
        missing = [name for name in needed if not find_spec(name)]
        notes = [f"Trainer is left out: {', '.join(missing)} not installed."] if missing else []
        sides = ["ours"] if missing else [*SIDES]
        figures, failed = run_sides("bench.gpu_train", sides, args.minutes, only=part, **flags)
        text = table(args, part, figures, [*notes, *failed])
        (store if args.device == "cuda" else print)(text)


if __name__ == "__main__":
    main()
