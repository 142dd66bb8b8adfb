"""Answers of a model that was just trained, to instructions it was not trained on."""

import gc

import torch

from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.training.config import TrainConfig
from alpaca.weights.checkpoint import DTYPES
from alpaca.weights.loading import load_model, optimize_layout
from dataset import encode_prompt
from model import Llama
from tokenizer import Tokenizer

PRINTED, PRINTED_LENGTH = 12, 200  # answers and their characters; all are compared, whole


def load_result(config: TrainConfig, device: torch.device) -> Llama:
    """The model as it was written to disk."""
    if not config.lora:
        return load_model(config.result, device=device)
    dtype = DTYPES[config.dtype]
    return optimize_layout(load_model(config.base, config.result, config.bits, device, dtype))


def print_sample_answers(
    config: TrainConfig, records: list[dict], tokenizer: Tokenizer, device: torch.device
) -> None:
    """Answer held-out instructions, print a dozen answers, and count those that equal `output`."""
    half = config.max_length // 2  # for the prompt, and as much for the answer
    asked = []
    for record in (record for record in records if "output" in record):
        ids = encode_prompt(record["instruction"], record["input"], tokenizer)
        if len(ids) <= half and len(asked) < config.sample_answers:
            asked.append((record, ids))
    if not asked:
        return
    gc.collect()  # frees the trained model, which is in reference cycles: two may not fit
    model = load_result(config, device)
    engine = Engine(model, tokenizer, min(64, len(asked)), config.max_length)
    sequences = engine.generate([ids for _, ids in asked], SamplingParams(max_new_tokens=half))
    answered = [(record, s.text) for (record, _), s in zip(asked, sequences, strict=True)]
    for record, text in answered[:: len(answered) // PRINTED + 1]:  # evenly spread
        instruction = f"{record['instruction']} [{record['input']}]".removesuffix(" []")
        shown = " ".join(text.split())  # one line, whatever the model wrote
        shown = f"{shown[:PRINTED_LENGTH]}…" if len(shown) > PRINTED_LENGTH else shown
        print(f"  {'right' if text == record['output'] else 'wrong'}  {instruction} → {shown}")
    right = sum(text == record["output"] for record, text in answered)
    share = f"{right} of {len(answered)} held-out instructions ({right / len(answered):.1%})"
    print(f"answered exactly as expected: {share}")
