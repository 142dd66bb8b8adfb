"""Published preference files → pairs of records: one question, the better and the worse answer.

    {"instruction": …, "input": …, "output_1": …, "output_2": …, "preference": 2}    AlpacaFarm
    {"instruction": …, "output_1": …, "output_2": …, "preference": 1.83, …}          `alpaca judge`
    {"prompt": "Name a colour.", "chosen": "Red", "rejected": "Five"}                TRL
    {"prompt": …, "chosen": [{"role": "user", …}, …], "rejected": […]}               UltraFeedback
    {"prompt": […], "chosen": [{"role": "assistant", …}], "rejected": […]}           TRL
    {"chosen": "\\n\\nHuman: Hi.\\n\\nAssistant: Hello.", "rejected": …}                 HH-RLHF

A preference runs from 1 (output_1 is better) to 2, as in AlpacaEval's files. Between them it says
how likely a judge finds output_2 better: 1.83 makes output_2 the chosen answer with p = 0.83. The
mean of a pair that was judged in both orders (`swapped`) is one preference, since judges favour a
position; its instruction and input are one text, so its prompt is that of an instruction alone.
Ties, pairs without a verdict and pairs of equal answers teach nothing: they are dropped and
counted. An empty answer is kept: its only token is the one that ends it.

Of two conversations only the last answers may differ. Whole dialogues, strings or messages, hold
the question, too. Files have weights, and odd conversations are skipped, as in formats.py.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from alpaca.common.errors import UserError, join_names
from alpaca.common.json_files import json_records
from alpaca.datagen.conversations import OddConversation, parse_turns, role_and_text
from alpaca.datagen.formats import Origin, mix_files, normalize_record, skip_odd, string_field

SPEAKER = re.compile(r"\n\n(Human|Assistant):")  # in HH-RLHF's dialogues
DROPPED = ("ties", "without a verdict", "equal answers")


class Preference(NamedTuple):
    chosen: dict  # a normalized record: {instruction, input, output} or {messages}
    rejected: dict  # the same question with the worse answer
    p: float  # how likely `chosen` is the better one: above 1/2, and 1 in most files


class Preferences(NamedTuple):
    """n pairs. Only the last answer of a conversation is compared: what precedes it is prompt."""

    records: list[dict]  # 2n: the chosen record of pair i is 2i, its rejected record 2i + 1
    p: list[float]  # n
    origins: list[Origin]  # 2n
    report: dict[str, int]  # how many were kept, are fractional, were dropped and why


def load_preferences(specs: Iterable[str | Path], seed: int = 0) -> Preferences:
    """The preferences of several files, `FILE` or `FILE:WEIGHT`."""
    dropped: Counter[str] = Counter()
    pairs, origins = mix_files(specs, seed, lambda file: read_preferences(file, dropped))
    report = {"kept": len(pairs), "fractional": sum(pair.p < 1 for pair in pairs)}
    answers = (last_answer(record) for pair in pairs for record in pair[:2])
    report["empty answers"] = sum(not answer.strip() for answer in answers)
    report |= {reason: dropped[reason] for reason in DROPPED}
    records = [record for pair in pairs for record in (pair.chosen, pair.rejected)]
    doubled = [origin for origin in origins for _ in range(2)]
    return Preferences(records, [pair.p for pair in pairs], doubled, report)


def read_preferences(path: Path, dropped: Counter[str]) -> list[tuple[str, dict, Preference]]:
    """(place, raw record, preference) for each pair of a file that one can learn from."""
    both_orders: dict[str, list[tuple[str, dict, tuple[dict, dict, float]]]] = {}
    for place, raw, pair in skip_odd(json_records(path), parse_pair):
        same = json.dumps([pair[:2], raw.get("annotator")]) if "swapped" in raw else place
        both_orders.setdefault(same, []).append((place, raw, pair))
    kept = []
    for found in both_orders.values():
        place, raw, (first, second, _) = found[0]
        score = sum(pair[2] for *_, pair in found) / len(found)  # nan if one of them is
        if first == second:
            dropped["equal answers"] += 1
        elif math.isnan(score) or score == 0.5:
            dropped["ties" if score == 0.5 else "without a verdict"] += 1
        else:
            better, worse = (second, first) if score > 0.5 else (first, second)
            kept.append((place, raw, Preference(better, worse, max(score, 1 - score))))
    if not kept:
        why = "all ties, equal or without a verdict" if both_orders else "no records"
        raise UserError(f"{path}: no preference to learn from: {why}")
    return kept


def parse_pair(raw: Any) -> tuple[dict, dict, float]:
    """Two normalized records of one question, and how much better the second is, from 0 to 1."""
    if not isinstance(raw, dict):
        raise UserError("an object with two answers to compare was expected")
    if "output_1" in raw and "output_2" in raw:
        fields = {name: raw.get(name) for name in ("instruction", "input")}
        first, second = (as_record(fields, string_field(raw, f"output_{n}")) for n in (1, 2))
        return first, second, parse_preference(raw.get("preference"))
    if "chosen" not in raw or "rejected" not in raw:
        fields = join_names(map(repr, raw)) or "none"
        expected = "chosen and rejected, or output_1, output_2 and preference"
        raise UserError(f"its fields ({fields}) hold no comparison: {expected} were expected")
    first, second = as_record(raw, raw["chosen"]), as_record(raw, raw["rejected"])
    if question(first) != question(second):
        raise OddConversation("chosen and rejected differ before their last answers")
    return first, second, 0.0


def as_record(raw: dict, answer: Any) -> dict:
    """The normalized record of a question with one of its answers, or with a whole dialogue."""
    prompt = raw.get("prompt", raw.get("instruction", raw.get("question")))
    system = [{"role": "system", "content": raw["system"]}] if raw.get("system") else []
    if isinstance(prompt or "", str) and isinstance(answer, str):
        if (text := (prompt or "") + answer).lstrip().startswith("Human:"):
            _, *parts = SPEAKER.split("\n\n" + text.lstrip())
            spoken = zip(parts[::2], parts[1::2], strict=True)
            turns = [{"from": who.lower(), "value": words.strip()} for who, words in spoken]
            return {"messages": parse_turns(system + turns)}
        if prompt is None:
            raise UserError("it has no prompt, and its answers do not begin with Human: add one")
        if not system:
            given = {"instruction": prompt, "input": raw.get("input"), "output": answer}
            return normalize_record(given)[0]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(answer, list) or not answer:
        raise UserError("chosen and rejected must be texts or lists of messages")
    if role_and_text(answer[0])[0] == "assistant":
        answer = [*(prompt if isinstance(prompt, list) else []), *answer]
    return {"messages": parse_turns(system + answer)}


def question(record: dict) -> Any:
    return record.get("messages", [record.get("instruction"), record.get("input"), None])[:-1]


def last_answer(record: dict) -> str:
    return record["messages"][-1]["content"] if "messages" in record else record["output"]


def parse_preference(preference: Any) -> float:
    """How much better output_2 is, from 0 to 1, nan for no verdict."""
    if preference is None or preference != preference:
        return math.nan
    number = isinstance(preference, int | float) and not isinstance(preference, bool)
    if not number or not (preference == 0 or 1 <= preference <= 2):
        expected = "1 (output_1 is better) to 2 (output_2 is better) or null was expected"
        raise UserError(f"preference {repr(preference)[:40]}: {expected}")
    return preference - 1.0 if preference else 0.5
