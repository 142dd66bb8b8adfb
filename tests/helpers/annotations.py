"""Annotation files as AlpacaEval writes them."""

import json


def entry(number: int, preference, **changes) -> dict:
    """An annotation of equally long outputs, unless they are given."""
    plain = {
        "instruction": f"instruction {number}",
        "output_1": "baseline",
        "output_2": "a model!",
        "generator_1": "base",
        "generator_2": "tuned",
        "annotator": "judge",
        "preference": preference,
    }
    return plain | changes


def write(path, entries: list):
    path.write_text(json.dumps(entries))
    return path
