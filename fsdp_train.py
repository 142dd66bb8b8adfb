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

import console
import lora
import plan
from adapter import Lora, save_adapter
from checkpoint import DTYPES, check_tensors, load_model, read_config, save_model, stored_tensors
from dataset import (
    Examples,
    encode_all,
    load_mixture,
    load_records,
    make_row,
    pack_rows,
    prompt,
    step_examples,
    total_steps,
)
from generate import greedy
from model import Llama, LlamaConfig
from modelcard import model_card
from parallel import (
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
from runfolder import RunFolder
from snapshots import Snapshots
from tokenizer import Tokenizer

# What flags left out mean. Alpaca's 7B recipe, when a model is named:
ALPACA = {
    "data": None,
    "eval_data": None,
    "out": Path("runs/alpaca"),
    "epochs": 3,
    "batch_size": 128,
    "lr": 2e-5,
    "max_length": 512,
    "row_tokens": 4096,
    "checkpointing": "selective",
    "dtype": "bf16",
    "save_every": 100,
    "answers": 4,
}
# The embedded model's, when none is:
TINY = {
    "data": ["data/sample_train.json"],
    "eval_data": "data/sample_heldout.json",
    "out": Path("runs/tiny"),
    "epochs": 2,
    "batch_size": 16,
    "lr": 3e-4,
    "max_length": 512,
    "row_tokens": 4096,
    "checkpointing": "none",
    "dtype": "fp32",
    "save_every": 200,
    "answers": 1000,
}
# alpaca-lora's, with --lora in place of either's:
LORA = {"lr": 3e-4, "checkpointing": "full", **lora.FLAGS}
TINY_MODEL = Path("data/tiny-llama")
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
        source = lora.frozen(args.model_dir, args.bits)
        config, args.bits = source.config, source.recipe.bits
        if args.offload and args.bits < 16:
            raise ValueError("--offload cannot move rounded weights: train without it")
    else:
        config = read_config(args.model_dir)
        check_tensors(stored_tensors(args.model_dir), config, args.model_dir)
    tokenizer = Tokenizer(args.tokenizer or args.model_dir)
    tokenizer.check(config)
    if not 0 <= args.warmup < 1:
        raise ValueError(f"--warmup {args.warmup} is not a share of the steps, from 0 to below 1")
    for name in ("seed", "save_every", "answers"):
        if getattr(args, name) < 0:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {getattr(args, name)} is below 0")
    if args.max_length > config.max_position_embeddings:
        raise ValueError(
            f"--max-length {args.max_length} is more than the "
            f"{config.max_position_embeddings} positions the model knows"
        )
    if args.row_tokens < args.max_length:
        raise ValueError(f"--row-tokens {args.row_tokens} cannot hold --max-length examples")
    train = encode_all(*load_mixture(args.data, args.seed), tokenizer, args.max_length)
    steps = total_steps(len(train), args.batch_size, args.epochs)
    steps = min(steps, args.max_steps or steps)
    if not steps:
        raise ValueError(f"--epochs {args.epochs} of {len(train)} examples is not one step")
    questions = load_records(args.eval_data) if args.eval_data else []
    held_out = None
    if questions:
        origins = [f"{args.eval_data} record {i + 1}" for i in range(len(questions))]
        held_out = encode_all(questions, origins, tokenizer, args.max_length)
    return Job(config, tokenizer, train, held_out, questions, steps)


def settings(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What decides the weights that come out."""
    names = ("preset", "epochs", "batch_size", "lr", "warmup", "max_length", "seed", "dtype")
    files = {"base": str(args.model_dir), "data": " ".join(args.data), "ids": job.train.digest()}
    # None too, or a whole model's run would go on in an adapter's folder
    adapter = {"lora": f"{args.lora}, base of {args.bits} bits" if args.lora else None}
    chosen = {name: getattr(args, name) for name in names}
    return {**files, **adapter, **chosen, "steps": job.steps}


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
    source = lora.frozen(args.model_dir, args.bits) if args.lora else None
    with torch.device("meta"):
        model = lora.skeleton(source, dtype, args.lora) if args.lora else Llama(config)
    apply_activation_checkpointing(model, args.checkpointing)
    if args.compile:
        apply_compile(model)
    apply_fsdp(model, mesh, dtype, args.offload)
    model.to_empty(device="cpu" if args.offload else device)
    if args.lora:
        fill(model, mesh, lora.first_weights(source, args.seed))
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
    stop: "StopSignal",
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
    newest = snapshots.newest()
    if newest is None:
        return 0
    done = snapshots.load(newest, state_tensors(model, optimizer))["step"]
    for moments in optimizer.state.values():
        moments["step"].fill_(done)
    console.notice(f"going on after step {done}")
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
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = my_rows(job.train, which, args, device)
        loss, norm, stopping = train_step(model, optimizer, rows, learned, device, stop)
        if not math.isfinite(loss) or not math.isfinite(norm):
            snapshots.finish()
            culprits = console.listed((job.train.origins[i] for i in which), most=16)
            raise ValueError(
                f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}. The weights are "
                f"as they were before and nothing is saved. The step's examples: {culprits}"
            )
        clock, seconds = (now := time.perf_counter()), now - clock
        figures = {"step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm}
        pace = speed(job.config, args.lora, lengths[which], learned, seconds, device)
        run.step({**figures, **pace})
        last = step + 1 == job.steps
        due = args.save_every and (last or (step + 1) % args.save_every == 0)
        if due or stopping:
            snapshots.save(step + 1, state_tensors(model, optimizer), {"step": step + 1})
        if stopping and not last:
            snapshots.finish()
            run.end()
            console.notice(f"stopped after step {step + 1}: the same command goes on from there")
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
    config: LlamaConfig,
    adapter: Lora | None,
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
    if chip := plan.find_chip(torch.cuda.get_device_name()):
        share = learned / tokens
        flops = plan.flops_per_token(config, plan.mean_length(lengths), share, adapter) * tokens
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
    elsewhere = ("base", "data", "preset")  # on the card
    recipe = {k: v for k, v in settings(args, job).items() if k not in elsewhere and v is not None}
    recipe |= {"optimizer": f"AdamW {BETAS}, eps {EPS}, no weight decay; norm clipped at {CLIP}"}
    whole, layers = plan.parameters(job.config), job.config.num_hidden_layers
    learned = layers * plan.block_adapter_parameters(job.config, args.lora) if args.lora else whole
    card = model_card(
        args.out.name,
        args.model_dir,
        args.data,
        str(args.eval_data) if args.eval_data else None,
        recipe | {"ranks": ranks},
        run.records,
        adapter=args.lora is not None,
        parameters=whole,
        learned=learned,
        positions=job.config.max_position_embeddings,
        examples=len(job.train),
        supervised=int(job.train.supervised.sum()),
    )
    with console.atomic_file(outcome(args) / "README.md", "w") as file:
        file.write(card)


def outcome(args: argparse.Namespace) -> Path:
    return args.out / ("adapter" if args.lora else "model")


class StopSignal:
    """Ctrl-C or SIGTERM, heard at the end of a step. A second Ctrl-C is not waited for; SIGTERM may
    come twice, from a scheduler that tells every process and from torchrun passing it on."""

    def __init__(self):
        self.number = 0  # none yet
        signals = signal.SIGINT, signal.SIGTERM
        self.usual = {number: signal.signal(number, self.hear) for number in signals}

    def hear(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if not self.number:
            os.write(2, b"stopping after this step\n")  # print is not safe in here
        self.number = number

    def forget(self) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)


def show(args: argparse.Namespace, job: Job, run: RunFolder, device: torch.device) -> None:
    """What came of it: losses, and answers to instructions the model was not trained on."""
    losses = [loss for _, loss in run.points("loss")]
    tokens = sum(tokens for _, tokens in run.points("tokens"))
    print(f"{len(losses)} steps of {tokens:,} tokens; training loss", end=" ")
    print(f"{losses[0]:.3f} → {losses[-1]:.3f}", end="")
    held_out = [loss for _, loss in run.points("held_out_loss")]
    print(f"; held out {held_out[0]:.3f} → {held_out[-1]:.3f}" if held_out else "")
    answered = answers(args, job, device)
    for shown in range(0, len(answered), len(answered) // 12 + 1):  # a dozen, from all over
        record, answer = answered[shown]
        asked = f"{record['instruction']} [{record['input']}]".removesuffix(" []")
        print(f"  {'right' if answer == record['output'] else 'wrong'}  {asked} → {answer}")
    if answered:
        right = sum(answer == record["output"] for record, answer in answered)
        share = f"{right} of {len(answered)} held-out instructions ({right / len(answered):.1%})"
        print(f"answered exactly as expected: {share}")
    made = outcome(args)
    print(f"{made} is the {made.name}, {args.out / 'loss.svg'} the picture")


def answers(args: argparse.Namespace, job: Job, device: torch.device) -> list[tuple[dict, str]]:
    """The first held-out records, with what the model that was written says to them."""
    asked = []
    for record in (record for record in job.questions if "output" in record):
        ids = job.tokenizer.encode(prompt(record["instruction"], record["input"]), bos=True)
        if len(asked) < args.answers and len(ids) <= args.max_length // 2:
            asked.append((record, ids))
    gc.collect()  # the trained model hangs in cycles, and two may not fit where one did
    model, found = written(args, device) if asked else None, []
    for batch in (asked[start : start + 64] for start in range(0, len(asked), 64)):
        texts = greedy(model, job.tokenizer, [ids for _, ids in batch], args.max_length // 2)
        found += [(record, text) for (record, _), text in zip(batch, texts, strict=True)]
    return found


def written(args: argparse.Namespace, device: torch.device) -> Llama:
    if not args.lora:
        return load_model(outcome(args), device)
    recipe = lora.frozen(args.model_dir, args.bits).recipe
    return lora.load(args.model_dir, outcome(args), recipe, device, DTYPES[args.dtype])


# ---------------------------------------------------------------- the command line


def flags(recipe: dict[str, Any]) -> str:
    given = {name: v for name, v in recipe.items() if v is not None}
    said = {name: " ".join(v) if isinstance(v, list) else v for name, v in given.items()}
    return "\n".join(f"  --{name.replace('_', '-')} {value}" for name, value in said.items())


def parse_args() -> argparse.Namespace:
    recipes = f"""flags left out mean, with --model-dir or --preset (Alpaca's 7B recipe):
{flags(ALPACA)}
and without, for the embedded {TINY_MODEL}:
{flags(TINY)}
with --lora, in either case (and --out ends in -lora):
{flags(LORA)}"""
    parser = console.Parser(__doc__, epilog=recipes)
    count, amount = console.positive(int), console.positive(float)

    flag = parser.add_argument_group("what is trained on what").add_argument
    flag("--model-dir", type=Path, help="the base: a Hugging Face or a Meta folder")
    flag("--preset", help="or random weights: tiny, 7B, 13B, 30B or 65B")
    flag("--tokenizer", type=Path, help="a tokenizer.model (default: the base's)")
    flag("--data", nargs="+", metavar="FILE[:WEIGHT]", help="JSON or JSONL; FILE:2 counts twice")
    flag("--eval-data", type=Path, help="held-out records, tried before and after")
    flag("--out", type=Path, help="folder of the run")

    flag = parser.add_argument_group("recipe").add_argument
    flag("--epochs", type=amount, help="how often every example is seen")
    flag("--batch-size", type=count, help="examples a step, over all ranks")
    flag("--lr", type=amount, help="highest learning rate")
    flag("--warmup", type=float, default=0.03, help="share of all steps (default: 0.03)")
    flag("--max-length", type=count, help="tokens that an example is cut to")
    flag("--max-steps", type=count, help="steps, if fewer than the epochs have")
    flag("--seed", type=int, default=42, help="of the shuffle (default: 42)")

    lora.add_flags(parser)

    flag = parser.add_argument_group("memory and speed").add_argument
    flag("--row-tokens", type=count, help="most tokens a rank computes at once")
    kept = "what blocks do not keep for the backward pass (full: all but their input)"
    flag("--checkpointing", choices=("full", "selective", "none"), help=kept)
    flag("--dtype", choices=("bf16", "fp32"), help="what blocks compute in")
    boolean = argparse.BooleanOptionalAction
    flag("--compile", action=boolean, help="compile the blocks (default: on a GPU)")
    flag("--offload", action="store_true", help="keep weights and moments in host memory")
    flag("--replicas", type=count, default=1, help="copies of the sharded model (default: 1)")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")

    flag = parser.add_argument_group("saving").add_argument
    flag("--save-every", type=int, help="steps between snapshots; 0: none")
    flag("--keep", type=count, default=2, help="snapshots that are kept (default: 2)")
    flag("--resume", action="store_true", help="go on with a run, do not start one")
    flag("--save-dtype", choices=("bf16", "fp32"), default="bf16", help="model/'s (default: bf16)")
    flag("--answers", type=int, help="held-out instructions to answer at the end")

    flag = parser.add_argument_group("plan").add_argument
    flag("--plan", action="store_true", help="tell memory, steps and hours; do not train")
    flag("--gpus", type=count, default=1, help="how many to plan for (default: 1)")
    flag("--chip", choices=plan.CHIPS, help="which to plan for (default: this machine's)")

    args = parser.parse_args()
    if args.preset and args.model_dir:
        parser.error("--preset trains from random weights, --model-dir from a base: choose one")
    if args.preset and args.lora:
        parser.error("--lora adapts a base, and --preset is none: give a --model-dir")
    recipe = ALPACA if args.preset or args.model_dir else TINY
    if recipe is TINY:
        args.model_dir = TINY_MODEL
    if args.lora:
        recipe = recipe | LORA | {"out": recipe["out"].with_name(recipe["out"].name + "-lora")}
    elif given := [name for name in lora.FLAGS if getattr(args, name) is not None]:
        parser.error(f"--{given[0].replace('_', '-')} goes with --lora")
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.lora = lora.lora_of(args) if args.lora else None
    if args.data is None:
        parser.error("--data is needed: which records to train on")
    if args.preset and args.tokenizer is None:
        parser.error("--preset needs a --tokenizer")
    return args


def planned(args: argparse.Namespace) -> str:
    """What the run would take on `--gpus` of the chip, by the rows it would really have."""
    job = prepare(args)
    lengths, supervised = job.train.lengths, job.train.supervised
    longest = rows = tokens = 0
    for step in range(job.steps):
        which = step_examples(len(job.train), args.batch_size, args.epochs, args.seed, step)
        ranks = pack_rows(lengths[which], args.gpus, args.row_tokens)
        longest = max(longest, *(int(lengths[which[row]].sum()) for mine in ranks for row in mine))
        rows, tokens = max(rows, len(ranks[0])), tokens + int(lengths[which].sum())
    share = supervised.sum() / lengths.sum()
    how = args.checkpointing, DTYPES[args.dtype], args.offload, rows, args.lora, args.bits or 16
    run = plan.Run(job.config, args.gpus, args.replicas, longest, share, *how)
    chip = plan.CHIPS.get(args.chip)
    if chip is None and torch.cuda.is_available():
        chip = plan.find_chip(torch.cuda.get_device_name())
    return plan.report(run, tokens, job.steps, plan.mean_length(lengths), chip)


def main() -> None:
    args = parse_args()
    if args.plan:
        return print(planned(args))
    keep_freed_memory()
    with process_group(args.device, args.replicas) as (mesh, device):
        if args.compile is None:  # in fp32 there is no kernel for all documents, but a loop
            args.compile = device.type == "cuda" and args.dtype == "bf16"
        job = together(lambda: prepare(args))
        others = dist.get_rank() > 0
        run = together(lambda: RunFolder(args.out, settings(args, job), args.resume, others))
        finished = together(lambda: run.finished())
        dist.barrier()  # everybody has looked before anybody writes
        if finished:
            console.notice(f"{args.out} is finished; remove it to train anew")
            run.begin(job.steps + 1, job.steps)
            Snapshots(args.out / "checkpoints", args.keep).remove()  # if the last run was cut off
        else:
            console.notice(
                "examples: " + ", ".join(f"{n} {w}" for w, n in job.train.report.items())
            )
            train(args, job, run, mesh, device)
    if not others:
        if not (outcome(args) / "README.md").exists():
            write_card(args, job, run, mesh.size())
        show(args, job, run, device)
    run.close()


def leave(code: int) -> None:
    """At once: threads of a snapshot under way would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        console.run(main)
    except SystemExit as end:
        leave(end.code)
    except RuntimeError as mistake:
        if lost_contact(str(mistake)) and not os.environ.get("ALPACA_TRACEBACK"):
            why = str(mistake).strip().split("\n")[0]
            console.notice(f"another rank is gone ({why}); start again to go on", own=True)
        else:
            traceback.print_exc()
        leave(1)
    except Exception:
        traceback.print_exc()
        leave(1)
    leave(0)
