"""Random and hostile answers: the parser returns, and in time."""

import random
import time

import pytest
from helpers.commands import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca.common.json_files import read_log
from alpaca.datagen.prompts import alpaca_prompt, parse_tasks, reject_reason

SEEDS = list(read_log(ROOT / "data/seed_tasks.jsonl"))
JUNK = ["###", "\n", "4. ", "Instruction:", "Output", "```", "\x00", "**", "é", " " * 500, "😀"]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_parse_tasks_survives_mangled_answers(seed):
    rng = random.Random(seed)
    text = alpaca_prompt("", rng.sample(SEEDS, 4)).partition("Instruction:")[2]
    if rng.random() < 0.5:  # as markdown
        text = text.replace("Input:", "**Input:**").replace("###", "---")
    for _ in range(rng.randint(1, 25)):
        a, b = sorted(rng.choices(range(len(text) + 1), k=2))
        choice = rng.random()
        if choice < 0.3:
            text = text[:a] + text[min(b, a + 9) :]
        elif choice < 0.7:
            text = text[:a] + rng.choice(JUNK) + text[a:]
        elif choice < 0.9:
            text = text[:b] + text[a:b] + text[b:]
        else:
            text = text[:a] + text[a:b].swapcase() + text[b:]
    for task in parse_tasks(text, truncated=rng.random() < 0.5):
        assert all(isinstance(field, str) for field in task)
        assert task.reason in ("", "cut", "format")
        assert task.reason or (task.instruction and task.output)
        reject_reason(task.instruction)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_parse_tasks_survives_any_text(text):
    parse_tasks(text)
    reject_reason(text)


@pytest.mark.parametrize(
    "text",
    [" " * 200_000, "\n" * 200_000, "#" * 200_000, "4. Instruction: a\n4. Output:\n" * 20_000,
     "```\n" * 50_000, ("* " * 50_000 + "Input: x\n") * 2, "1" * 200_000, "**" + "_" * 200_000,
     (" " * 38 + "input\n") * 20_000],
    ids=range(9),
)  # fmt: skip
def test_parse_tasks_takes_linear_time(text):
    start = time.process_time()
    parse_tasks(text)
    parse_tasks("4. Instruction: x\n4. Output:\n" + text)
    assert time.process_time() - start < 2
