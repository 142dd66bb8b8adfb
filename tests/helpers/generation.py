"""Runs of selfinstruct.py against the scripted teacher, and what they leave behind."""

from pathlib import Path

import pytest

from alpaca.common.json_files import read_log
from helpers.commands import ROOT
from helpers.teacher_server import Server

SEEDS = ROOT / "data/seed_tasks.jsonl"
FOUR_STAGES = ("--pipeline", "self-instruct")


def arguments(out: Path, server: Server, num: int, *more) -> list[str]:
    given = ("generate", "--out", out, "--num", num, "--base-url", server.url, "--retry-wait", 0.01)
    given += ("--price-in", 1, "--price-out", 2, *more)
    given += () if {"--teacher", "--teachers"} & set(more) else ("--teacher", "m")
    return [str(value) for value in given]


def read(folder: Path, name: str) -> list[dict]:
    return list(read_log(folder / f"{name}.jsonl"))


def comparable(folder: Path) -> list[dict]:
    """Records without what differs from run to run."""
    records = read(folder, "records")
    for record in records:
        for name in ("time", "request_id", "url"):
            del record["provenance"][name]
    return records


def check_whole(folder: Path, num: int) -> None:
    """No record is lost or repeated, all are in order, and the cost is exact."""
    records, rejected, responses = (
        read(folder, name) for name in ("records", "rejected", "responses")
    )
    assert len(records) == num
    items = [line["item"] for line in records + rejected]
    assert len(set(items)) == len(items)
    assert len({entry["id"] for entry in responses}) == len(responses)
    order = [tuple(map(int, record["item"].split("."))) for record in records]
    assert order == sorted(order)
    for entry in responses:
        usage = entry["usage"]
        dollars = (usage["prompt"] + 2 * usage["completion"]) / 1e6
        assert entry["cost"] == pytest.approx(dollars)
