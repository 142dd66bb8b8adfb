"""Fine-tune a LLaMA on instructions: fully sharded data parallel, under torchrun.

    torchrun fsdp_train.py                                  # the embedded tiny model, here
    torchrun --nproc-per-node 8 fsdp_train.py --model-dir llama-7b --data alpaca_data.json
    torchrun --nproc-per-node 2 fsdp_train.py --device cpu  # two ranks without a GPU
    torchrun fsdp_train.py --lora --bits 4 --model-dir llama-7b --data alpaca_data.json
    python fsdp_train.py --model-dir llama-7b --data alpaca_data.json --plan --gpus 8

The second line is Alpaca's run, the fourth learns an adapter on a card of 12 GB (lora.py). Run a
command again and it goes on where it stopped. Worth knowing:

  - Weights, gradients and Adam's moments are fp32 and divided among the ranks; a block's weights
    are gathered in bf16 while it computes, gradients are reduced in fp32 (FSDP2, `fully_shard`).
  - The loss is the cross-entropy summed over the answers' tokens and divided by how many the whole
    step has: the number of ranks, rows or pieces a batch is cut into changes nothing.
  - Examples are packed (dataset.py), so a step costs its tokens and hardly more: where blocks are
    compiled, a row is filled up to a multiple of 128.
  - `--out` gathers settings.json, metrics.jsonl, loss.svg, checkpoints/ (removed at the end) and,
    when all is done, model/: a Hugging Face folder and its card; with `--lora` adapter/: PEFT's.
  - Ctrl-C and SIGTERM save after the step under way. torchrun gives that 30 seconds; a big model on
    a slow disk needs more, `--shutdown-timeout 300`; a dead GPU rank is noticed that much later.

ZeRO: arXiv:1910.02054; FSDP: 2304.11277; activation checkpointing: 1604.06174; AdamW: 1711.05101.

Shown by tests/test_train.py: test_the_run_equals_a_plain_loop_over_hugging_faces_model.
"""

import argparse
import gc
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from alpaca.common.cli import Parser, positive
from alpaca.common.errors import UserError, join_names, notice, run_command
from alpaca.common.files import atomic_file
from alpaca.datagen.formats import load_mixture, load_records
from alpaca.inference.answer import encode_question
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.training import memory_plan
from alpaca.training.config import FLAGS, add_flags, lora_of
from alpaca.training.model_card import model_card
from alpaca.training.parallel import (
    StopSignal,
    apply_activation_checkpointing,
    apply_compile,
    apply_fsdp,
    fill,
    keep_freed_memory,
    lost_contact,
    process_group,
    random_weight,
    together,
)
from alpaca.training.run_dir import RunFolder
from alpaca.training.snapshots import Snapshots
from alpaca.weights import lora
from alpaca.weights.adapter import save_adapter
from alpaca.weights.checkpoint import DTYPES, open_checkpoint, stored_tensors
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.writer import save_model
from dataset import (
    Examples,
    encode_all,
    make_row,
    pack_rows,
    step_examples,
    total_steps,
)
from model import Llama, LlamaConfig
from tokenizer import Tokenizer

# Flags left out mean Alpaca's recipe for 7B, which parse_args has as their defaults. Where no model
# to start from is named it is the embedded one, with this recipe:
TINY = {
    "model_dir": Path("data/tiny-llama"),
    "data": ["data/sample_train.json"],
    "eval_data": Path("data/sample_heldout.json"),
    "out": Path("runs/tiny"),
    "epochs": 2,
    "batch_size": 16,
    "lr": 3e-4,
    "checkpointing": "none",
    "dtype": "fp32",
    "save_every": 200,
    "answers": 1000,
}
# And --lora puts alpaca-lora's in place of either's:
LORA = {"lr": 3e-4, "checkpointing": "full", **FLAGS}
BETAS, EPS, CLIP = (0.9, 0.999), 1e-8, 1.0  # what Alpaca's command leaves at their defaults
SHAPE_STEP = 128  # compiled blocks see rows of a multiple of this many tokens


class Job(NamedTuple):
    """All that a run needs to know before a process group or a folder is made."""

    config: LlamaConfig
    tokenizer: Tokenizer
    train: Examples
    held_out: Examples | None
    questions: list[dict]  # held-out records, to be answered at the end
    steps: int


# ---------------------------------------------------------------- what is to be done


def prepare(args: argparse.Namespace) -> Job:
    """Read and check everything a user may have got wrong."""
    if args.preset:
        config = LlamaConfig.preset(args.preset)
    elif args.lora:
        source = lora.open_base(args.model_dir, args.bits)
        config, args.bits = source.config, source.bits
        if args.offload and args.bits < 16:
            raise UserError("--offload cannot move rounded weights: train without it")
    else:
        config, _ = open_checkpoint(args.model_dir)
    tokenizer = Tokenizer(args.tokenizer or args.model_dir)
    tokenizer.check(config)
    if not 0 <= args.warmup < 1:
        raise UserError(f"--warmup {args.warmup} is not a share of the steps, from 0 to below 1")
    for name in ("seed", "save_every", "answers"):
        if (number := getattr(args, name)) < 0:
            raise UserError(f"--{name.replace('_', '-')} {number} is below 0")
    if args.max_length > config.max_position_embeddings:
        raise UserError(
            f"--max-length {args.max_length} is more than the "
            f"{config.max_position_embeddings} positions the model knows"
        )
    if args.row_tokens < args.max_length:
        raise UserError(f"--row-tokens {args.row_tokens} cannot hold --max-length examples")
    train = encode_all(*load_mixture(args.data, args.seed), tokenizer, args.max_length)
    steps = total_steps(len(train), args.batch_size, args.epochs)
    steps = min(steps, args.max_steps or steps)
    if not steps:
        raise UserError(f"--epochs {args.epochs} of {len(train)} examples is not one step")
    questions, held_out = [], None
    if args.eval_data:
        questions = load_records(args.eval_data)
        origins = [f"{args.eval_data} record {number}" for number in range(1, len(questions) + 1)]
        held_out = encode_all(questions, origins, tokenizer, args.max_length)
    return Job(config, tokenizer, train, held_out, questions, steps)


def settings(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What decides the weights that come out, by the flags' names."""
    names = ("model_dir", "preset", "epochs", "batch_size", "lr", "warmup", "max_length")
    chosen = {name: getattr(args, name) for name in (*names, "max_steps", "seed", "dtype")}
    return {
        **chosen,
        "model_dir": str(args.model_dir),
        "data": f"{' '.join(args.data)}, as ids {job.train.digest()}",
        # None too, or a whole model's run would go on in an adapter's folder
        "lora": f"{args.lora}, base of {args.bits} bits" if args.lora else None,
    }


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up, never from 0, then half a cosine towards 0. Steps count from 0."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


# ---------------------------------------------------------------- a step


def build(args: argparse.Namespace, config: LlamaConfig, mesh: DeviceMesh) -> Llama:
    """The model, sharded and filled, without any rank ever holding it whole."""
    device, dtype = torch.device(mesh.device_type), DTYPES[args.dtype]
    source = lora.open_base(args.model_dir, args.bits) if args.lora else None
    with torch.device("meta"):
        model = lora.build_lora_model(source, dtype, args.lora) if args.lora else Llama(config)
    apply_activation_checkpointing(model, args.checkpointing)
    if args.compile:
        apply_compile(model)
    apply_fsdp(model, mesh, dtype, args.offload)
    model.to_empty(device="cpu" if args.offload else device)
    if args.lora:
        fill(model, mesh, lora.initial_weights(source, args.seed))
    elif args.preset:
        fill(model, mesh, random_weight(config, args.seed, device))
    else:
        stored = stored_tensors(args.model_dir)
        fill(model, mesh, lambda name, shape: stored[name].read())
    return model


def my_rows(
    examples: Examples, which: np.ndarray, args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """This rank's share of the examples, packed; as many rows on every rank."""
    rows = pack_rows(examples.lengths[which], dist.get_world_size(), args.row_tokens)
    multiple, bounds = 1, 0
    if args.compile:
        multiple, bounds = min(SHAPE_STEP, args.max_length), len(which) + 2
    for row in rows[dist.get_rank()]:
        packed = make_row(examples, which[row], multiple, bounds)
        yield {name: tensor.to(device) for name, tensor in packed._asdict().items()}


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    rows: Iterable[dict[str, Tensor]],
    learned: int,
    device: torch.device,
    stop: StopSignal,
) -> tuple[float, float, bool]:
    """One step: (mean loss of all ranks, gradient norm before clipping, is any asked to stop?).

    `learned` is how many supervised tokens the whole step has; FSDP averages gradients over the
    ranks, which multiplying by their number undoes. A step that is not finite changes nothing."""
    told = torch.zeros(2, dtype=torch.float64, device=device)
    for row in rows:
        loss = model(**row)
        (loss * (dist.get_world_size() / learned)).backward()
        told[0] += loss.detach()
    told[1] = stop.number
    dist.all_reduce(told)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).full_tensor().item()
    loss, stopping = told[0].item() / learned, told[1].item() > 0
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm, stopping


@torch.no_grad()
def held_out_loss(model: Llama, examples: Examples, args: argparse.Namespace, device) -> float:
    """Mean loss over examples that are not learned from."""
    total = torch.zeros(1, dtype=torch.float64, device=device)
    model.eval()  # an adapter drops nothing
    for row in my_rows(examples, np.arange(len(examples)), args, device):
        total += model(**row)
    model.train()
    dist.all_reduce(total)
    model.reshard()  # the root group would stay gathered until a backward pass
    return total.item() / int(examples.supervised.sum())


# ---------------------------------------------------------------- the run


def trainable(model: Llama) -> dict[str, torch.nn.Parameter]:
    """All but a frozen base: what has gradients and moments, goes into snapshots and comes out."""
    return {name: own for name, own in model.named_parameters() if own.requires_grad}


def adamw(model: Llama) -> torch.optim.AdamW:
    """AdamW with its moments in place, so that there is a state to load a snapshot into."""
    parameters = trainable(model).values()
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.to_local().device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def state_tensors(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in trainable(model).items():
        moments = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"exp_avg.{name}"] = moments["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
    return tensors


def restore(model: Llama, optimizer: torch.optim.Optimizer, snapshots: Snapshots) -> int:
    """Take up the newest snapshot; the number of steps done."""
    done = snapshots.load(state_tensors(model, optimizer))
    for moments in optimizer.state.values():
        moments["step"].fill_(done)
    if done:
        notice(f"going on after step {done}")
    return done


def train(
    args: argparse.Namespace, job: Job, run: RunFolder, mesh: DeviceMesh, device: torch.device
) -> None:
    """Train, or go on training, until model/ or adapter/ is there; exit before that if asked to."""
    stop = StopSignal()
    model = build(args, job.config, mesh)
    optimizer = adamw(model)
    snapshots = Snapshots(args.out / "checkpoints", args.keep)
    done = restore(model, optimizer, snapshots)
    run.begin(done, job.steps)
    if job.held_out and done == 0:
        run.add({"step": 0, "held_out_loss": held_out_loss(model, job.held_out, args, device)})
    lengths, supervised = job.train.lengths, job.train.supervised
    clock = time.perf_counter()
    for step in range(done, job.steps):
        # An adapter's dropout repeats itself on resuming; every rank drops something else.
        torch.manual_seed(hash((args.seed, step, dist.get_rank())))
        which = step_examples(len(job.train), args.batch_size, args.epochs, args.seed, step)
        learned = int(supervised[which].sum())
        rate = learning_rate(step, job.steps, args.lr, args.warmup)
        optimizer.param_groups[0]["lr"] = rate
        rows = my_rows(job.train, which, args, device)
        loss, norm, stopping = train_step(model, optimizer, rows, learned, device, stop)
        if not math.isfinite(loss) or not math.isfinite(norm):
            snapshots.finish()
            culprits = join_names((job.train.origins[i] for i in which), most=16)
            raise UserError(
                f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}. The weights are "
                f"as they were before and nothing is saved. The step's examples: {culprits}"
            )
        now = time.perf_counter()
        pace = speed(args, job.config, lengths[which], learned, now - clock, device)
        run.step({"step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm, **pace})
        clock = now
        last = step + 1 == job.steps
        due = args.save_every and (last or (step + 1) % args.save_every == 0)
        if due or stopping:
            snapshots.save(step + 1, state_tensors(model, optimizer))
        if stopping and not last:
            snapshots.finish()
            run.end()
            notice(f"stopped after step {step + 1}: the same command goes on from there")
            sys.exit(128 + (stop.number or signal.SIGTERM))
    if job.held_out:
        loss = held_out_loss(model, job.held_out, args, device)
        run.add({"step": job.steps, "held_out_loss": loss})
    run.end()
    export(model, job, args)
    snapshots.finish()
    snapshots.remove()
    stop.forget()


def speed(
    args: argparse.Namespace,
    config: LlamaConfig,
    lengths: np.ndarray,
    learned: int,
    seconds: float,
    device: torch.device,
) -> dict[str, float]:
    """A step's figures; MFU, the share of the chips' peak that useful work reaches, if known."""
    tokens = int(lengths.sum())
    figures = {
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds),
        "supervised_per_s": round(learned / seconds),
    }
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {**figures, "memory_GB": peak / 1e9}
    figures["memory_GB"] = torch.cuda.max_memory_allocated() / 1e9
    if chip := memory_plan.find_chip(torch.cuda.get_device_name()):
        length = memory_plan.mean_length(lengths)
        flops = memory_plan.flops_per_token(config, length, learned / tokens, args.lora) * tokens
        figures["mfu"] = flops / seconds / (chip.flops * dist.get_world_size())
    return figures


def export(model: Llama, job: Job, args: argparse.Namespace) -> None:
    """What was learned, a tensor at a time: all ranks gather it, the first writes it."""
    dtype = torch.float32 if args.lora else DTYPES[args.save_dtype]
    whole = ((n, p.detach().full_tensor().to(dtype)) for n, p in trainable(model).items())
    if dist.get_rank() > 0:
        for _ in whole:
            pass
    elif args.lora:
        save_adapter(whole, args.lora, outcome(args), args.model_dir)
    else:
        save_model(whole, job.config, outcome(args), dtype, args.tokenizer or args.model_dir)


def write_card(args: argparse.Namespace, job: Job, run: RunFolder, ranks: int) -> None:
    """data/MODEL_CARD.md, filled in for this run. It hashes the base: not while ranks wait."""
    optimizer = f"AdamW {BETAS}, eps {EPS}, no weight decay; norm clipped at {CLIP}"
    recipe = settings(args, job) | {"steps": job.steps, "optimizer": optimizer, "ranks": ranks}
    recipe |= {"ids": job.train.digest()}
    with atomic_file(outcome(args) / "README.md", "w") as file:
        file.write(model_card(args, job.config, job.train, recipe, run.summary()))


def outcome(args: argparse.Namespace) -> Path:
    return args.out / ("adapter" if args.lora else "model")


def show_answers(args: argparse.Namespace, job: Job, device: torch.device) -> None:
    """How the model that was written answers instructions that it was not trained on."""
    half = args.max_length // 2  # for the question, as much for its answer
    records = [record for record in job.questions if "output" in record]
    asked = [(r, encode_question(r["instruction"], r["input"], job.tokenizer)) for r in records]
    asked = [(record, ids) for record, ids in asked if len(ids) <= half][: args.answers]
    if not asked:
        return
    gc.collect()  # the trained model hangs in cycles, and two may not fit where one did
    engine = Engine(written(args, device), job.tokenizer, min(64, len(asked)), args.max_length)
    said = engine.generate([ids for _, ids in asked], SamplingParams(max_new_tokens=half))
    answered = [(record, s.text) for (record, _), s in zip(asked, said, strict=True)]
    for record, text in answered[:: len(answered) // 12 + 1]:  # a dozen, from all over
        told = f"{record['instruction']} [{record['input']}]".removesuffix(" []")
        print(f"  {'right' if text == record['output'] else 'wrong'}  {told} → {text}")
    right = sum(text == record["output"] for record, text in answered)
    share = f"{right} of {len(answered)} held-out instructions ({right / len(answered):.1%})"
    print(f"answered exactly as expected: {share}")


def written(args: argparse.Namespace, device: torch.device) -> Llama:
    if not args.lora:
        return load_model(outcome(args), device=device)
    adapted = load_model(args.model_dir, outcome(args), args.bits, device, DTYPES[args.dtype])
    return optimize_layout(adapted)


# ---------------------------------------------------------------- the command line


def flags(recipe: dict[str, Any]) -> str:
    said = {name: " ".join(v) if isinstance(v, list) else v for name, v in recipe.items()}
    return "\n".join(f"  --{name.replace('_', '-')} {value}" for name, value in said.items())


def parse_args() -> argparse.Namespace:
    recipes = f"""without --model-dir or --preset, flags left out mean:
{flags(TINY)}
with --lora (and --out ends in -lora):
{flags(LORA)}"""
    parser = Parser(description=__doc__, epilog=recipes)
    count, amount = positive(int), positive(float)
    here = "(default: %(default)s)"

    flag = parser.add_argument_group("what is trained on what").add_argument
    flag("--model-dir", type=Path, help="the base: a Hugging Face or a Meta folder")
    flag("--preset", help="or random weights: tiny, 7B, 13B, 30B or 65B")
    flag("--tokenizer", type=Path, help="a tokenizer.model (default: the base's)")
    flag("--data", nargs="+", metavar="FILE[:WEIGHT]", help="JSON or JSONL; FILE:2 counts twice")
    flag("--eval-data", type=Path, help="held-out records, tried before and after")
    flag("--out", type=Path, default=Path("runs/alpaca"), help=f"folder of the run {here}")

    flag = parser.add_argument_group("recipe").add_argument
    flag("--epochs", type=amount, default=3, help=f"how often every example is seen {here}")
    flag("--batch-size", type=count, default=128, help=f"examples a step, over all ranks {here}")
    flag("--lr", type=amount, default=2e-5, help=f"highest learning rate {here}")
    flag("--warmup", type=float, default=0.03, help=f"share of all steps {here}")
    flag("--max-length", type=count, default=512, help=f"tokens that an example is cut to {here}")
    flag("--max-steps", type=count, help="steps, if fewer than the epochs have")
    flag("--seed", type=int, default=42, help=f"of the shuffle {here}")

    add_flags(parser)

    flag = parser.add_argument_group("memory and speed").add_argument
    flag("--row-tokens", type=count, default=4096, help=f"most a rank computes at once {here}")
    kept = f"what blocks do not keep for the backward pass; full: all but their input {here}"
    modes = ("full", "selective", "none")
    flag("--checkpointing", choices=modes, default="selective", help=kept)
    dtypes = ("bf16", "fp32")
    flag("--dtype", choices=dtypes, default="bf16", help=f"what blocks compute in {here}")
    boolean = argparse.BooleanOptionalAction
    flag("--compile", action=boolean, help="compile the blocks (default: on a GPU)")
    flag("--offload", action="store_true", help="keep weights and moments in host memory")
    flag("--replicas", type=count, default=1, help=f"copies of the sharded model {here}")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help=f"to train on {here}")

    flag = parser.add_argument_group("saving").add_argument
    flag("--save-every", type=int, default=100, help=f"steps between snapshots; 0: none {here}")
    flag("--keep", type=count, default=2, help=f"snapshots that are kept {here}")
    flag("--resume", action="store_true", help="go on with a run, do not start one")
    flag("--save-dtype", choices=dtypes, default="bf16", help=f"model/'s {here}")
    flag("--answers", type=int, default=4, help=f"held-out instructions to answer {here}")

    flag = parser.add_argument_group("plan").add_argument
    flag("--plan", action="store_true", help="tell memory, steps and hours; do not train")
    flag("--gpus", type=count, default=1, help=f"how many to plan for {here}")
    flag("--chip", choices=memory_plan.CHIPS, help="which to plan for (default: this machine's)")

    args = parser.parse_args()
    if args.preset and args.model_dir:
        parser.error("--preset trains from random weights, --model-dir from a base: choose one")
    if args.preset and args.lora:
        parser.error("--lora adapts a base, and --preset is none: give a --model-dir")
    if not (args.preset or args.model_dir):
        parser.set_defaults(**TINY)
    if args.lora:
        out = parser.get_default("out")
        parser.set_defaults(**LORA, out=out.with_name(f"{out.name}-lora"))
    elif given := [name for name in FLAGS if getattr(args, name) is not None]:
        parser.error(f"--{given[0].replace('_', '-')} goes with --lora")
    args = parser.parse_args()  # again, for it is known now what flags left out mean
    args.lora = lora_of(args) if args.lora else None
    if args.data is None:
        parser.error("--data is needed: which records to train on")
    if args.preset and args.tokenizer is None:
        parser.error("--preset needs a --tokenizer")
    return args


def main() -> None:
    args = parse_args()
    if args.plan:
        return print(memory_plan.planned(args, prepare(args)))
    keep_freed_memory()
    with process_group(args.device, args.replicas) as (mesh, device):
        if args.compile is None:  # in fp32 there is no kernel for all documents, but a loop
            args.compile = device.type == "cuda" and args.dtype == "bf16"
        job = together(lambda: prepare(args))
        others = dist.get_rank() > 0
        run = together(lambda: RunFolder(args.out, settings(args, job), args.resume, others))
        finished = together(run.finished)
        dist.barrier()  # everybody has looked before anybody writes
        if finished:
            notice(f"{args.out} is finished; remove it to train anew")
            run.begin(job.steps + 1, job.steps)
            Snapshots(args.out / "checkpoints", args.keep).remove()  # if the last run was cut off
        else:
            counts = ", ".join(f"{number} {what}" for what, number in job.train.report.items())
            notice(f"examples: {counts}")
            train(args, job, run, mesh, device)
    if not others:
        if not (outcome(args) / "README.md").exists():
            write_card(args, job, run, mesh.size())
        print(run.summary())
        show_answers(args, job, device)
        made = outcome(args)
        print(f"{made} is the {made.name}, {run.chart} the picture")
    run.close()


def leave(code: int) -> None:
    """At once: threads of a snapshot under way would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    code = 1
    try:
        run_command(main)
        code = 0
    except SystemExit as end:
        code = end.code
    except Exception as mistake:
        gone = isinstance(mistake, RuntimeError) and lost_contact(str(mistake))
        if gone and not os.environ.get("ALPACA_TRACEBACK"):
            why = str(mistake).strip().split("\n")[0]
            notice(f"another rank is gone ({why}); start again to resume", any_rank=True)
        else:
            traceback.print_exc()
    leave(code)
