"""The inputs of a training run, read and checked before it starts."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from alpaca.common.errors import UserError, is_rank_0, notice
from alpaca.datagen.checkers import Checker, load_checker
from alpaca.datagen.formats import Reading, load_mixture
from alpaca.datagen.overlap import find_twins, questions_of
from alpaca.datagen.preferences import load_preferences
from alpaca.training.config import TrainConfig
from alpaca.training.memory_plan import resolve_defaults
from alpaca.weights import lora
from alpaca.weights.checkpoint import open_checkpoint
from alpaca.weights.presets import preset
from alpaca.weights.reward import label_ends
from dataset import Examples, encode_all, question_ids, total_steps
from model import LlamaConfig
from tokenizer import Tokenizer, check_tokenizer, load_tokenizer


class Job(NamedTuple):
    config: TrainConfig
    model_config: LlamaConfig
    tokenizer: Tokenizer
    train: Examples
    held_out: Examples | None
    held_out_records: list[dict]
    steps: int
    checker: Checker | None = None
    records: Sequence[dict] = ()  # of the examples, if there is a checker


def prepare(config: TrainConfig) -> Job:
    """A user's errors are raised here, before training."""
    if config.preset:
        model_config = preset(config.preset)
    elif config.lora:
        base = lora.open_base(config.base, config.bits)
        model_config, config = base.config, replace(config, bits=base.bits)
    else:
        model_config, _ = open_checkpoint(config.base)
    if config.offload and config.bits < 16:
        raise UserError("--offload cannot move quantized weights: leave it out")
    if config.objective == "reward":  # counted as if its head was tied: it has one table
        model_config = replace(model_config, tie_word_embeddings=True)
    source = config.tokenizer or config.base
    tokenizer = load_tokenizer(source, config.model_dir, template=config.template)
    check_tokenizer(tokenizer, model_config)
    if config.max_length > model_config.max_position_embeddings:
        raise UserError(
            f"--max-length {config.max_length} is more than the model's "
            f"{model_config.max_position_embeddings} positions"
        )
    train_records, train = read_examples(config, config.data, tokenizer)
    steps = total_steps(len(train), config.batch_size, config.epochs)
    if not (steps := min(steps, config.max_steps or steps)):
        raise UserError(f"--epochs {config.epochs} of {len(train)} examples is less than one step")
    config = resolve_defaults(config, model_config, train, steps)
    records, held_out = [], None
    if config.eval_data:
        records, held_out = read_examples(config, config.eval_data, tokenizer)
        warn_of_overlap(train_records, records)
    inputs = Job(config, model_config, tokenizer, train, held_out, records, steps)
    if config.check:
        inputs = inputs._replace(checker=load_checker(config.check), records=train_records)
    return inputs


def warn_of_overlap(train_records: Sequence[dict], held_out: Sequence[dict]) -> None:
    """Say on rank 0 how many held-out questions are trained on; it changes nothing."""
    if not is_rank_0():
        return
    asked = [questions_of(record)[0] for record in held_out]
    if items := {twin.item for twin in find_twins(train_records, asked, rouge=False)}:
        notice(
            f"{len(items):,} of {len(asked):,} questions of --eval-data are in --data, such as "
            f"{asked[min(items)][:60]!r}: their loss says little of new ones; "
            "`alpaca decontaminate DATA --against SET` lists them"
        )


def read_examples(
    config: TrainConfig, files: Iterable[str], tokenizer: Tokenizer
) -> tuple[list[dict], Examples]:
    """The records of data files, of preferences the chosen ones, and all of them tokenized."""
    if config.documents == 1:
        reading = Reading(config.oasst, config.languages)
        records, origins = load_mixture(files, config.seed, reading)
        if config.check:
            return questions(records, origins, tokenizer, config.max_length)
        return records, encode_all(records, origins, tokenizer, config.max_length)
    found = load_preferences(files, config.seed)
    examples = encode_all(found.records, found.origins, tokenizer, config.max_length, found.p)
    counted = {what: number for what, number in found.report.items() if number and what != "kept"}
    if config.objective == "reward":
        examples = label_ends(examples)
    return found.records[::2], replace(examples, report={**examples.report, **counted})


def questions(
    records: list[dict], origins: list, tokenizer: Tokenizer, max_length: int
) -> tuple[list[dict], Examples]:
    """The records that leave room for an answer, and these tokenized, with their references."""
    if any("text" in record for record in records):
        raise UserError("--data has records of plain text: they ask nothing; remove them")
    fit = [i for i, r in enumerate(records) if len(question_ids(r, tokenizer)) < max_length]
    if not fit:
        raise UserError(f"no question leaves room in {max_length} tokens: raise --max-length")
    kept = [records[i] for i in fit]
    examples = encode_all(kept, [origins[i] for i in fit], tokenizer, max_length)
    return kept, replace(examples, report={"kept": len(fit), "dropped": len(records) - len(fit)})
