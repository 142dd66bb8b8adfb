"""JSON and JSONL files: logs that survive a kill, errors that name the line, bounds."""

import re
import subprocess
import sys

import pytest
from helpers.commands import ROOT

from alpaca.common import files
from alpaca.common.errors import UserError
from alpaca.common.files import INPUTS, lock_output
from alpaca.common.json_files import (
    MAX_LINE,
    append_jsonl,
    check_shape,
    json_records,
    read_json,
    read_log,
)


def test_append_jsonl_survives_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"n": 1}, {"text": "zwölf\u2028\n"})
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        INPUTS.clear()
        with lock_output(path):
            intact = list(read_log(path))
            append_jsonl(path, {"n": 3})
            assert list(read_log(path)) == [*intact, {"n": 3}], whole[:cut]
    INPUTS.clear()
    path.write_bytes(b'{"n": 1}\n' + b'{"torn": "' + b"x" * 200_000)
    append_jsonl(path, {"n": 2})
    assert list(read_log(path)) == [{"n": 1}, {"n": 2}]


APPENDING = """
import sys
from alpaca.common.json_files import append_jsonl
for n in range(40):
    append_jsonl(sys.argv[1], {"who": sys.argv[2], "n": n, "x": "x" * 20_000})
"""


def test_append_jsonl_from_four_processes_loses_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", APPENDING, path, str(who)], cwd=ROOT)
        for who in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    written = {(record["who"], record["n"]) for record in read_log(path)}
    assert len(written) == 160


def test_append_jsonl_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    append_jsonl(tmp_path / "log.jsonl", {})
    assert len(synced) == 2  # the file, and the folder that holds its new name
    append_jsonl(tmp_path / "log.jsonl", {})
    assert len(synced) == 3
    with files.atomic_file(tmp_path / "file") as file:
        file.write(b"x")
    assert len(synced) == 5


def test_read_log_names_the_line_of_an_error(tmp_path):
    path = tmp_path / "user.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}')
    assert list(read_log(path)) == [{"n": 1}, {"n": 2}]
    for content, words in (
        ('{"n": 1}\n{"n": \n', "line 2: not JSON"),
        ("[1]\n", "line 1 is \\[1\\], an object was expected"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            list(read_log(path))
    path.write_bytes(b'{"n": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 1: not JSON"):
        list(read_log(path))


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "nested more than 64 deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a": ' * 985 + "1" + "}" * 985, "nested more than 64 deep"),
        ("9" * 5000, "not JSON"),
        ('"' + "x" * MAX_LINE + '"', "longer than 8,388,608 characters"),
    ],
    ids=["unclosed", "lists", "objects", "digits", "long"],
)
def test_every_reader_bounds_a_line(tmp_path, text, words):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n' + text + "\n")
    for read in (json_records, read_log):
        with pytest.raises(UserError, match=f"a.jsonl, line 2: {words}"):
            list(read(path))


def test_json_list_bounds_depth_and_texts(tmp_path):
    path = tmp_path / "a.json"
    for value, words in (
        ('"' + "x" * (MAX_LINE + 1) + '"', "a text has"),
        ("[" * 64 + "]" * 64, "deep"),
    ):
        path.write_text(f"[1, {value}]")
        with pytest.raises(UserError, match=f"a.json: .*{words}"):
            list(json_records(path))


def test_read_json_bounds_the_file(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"config.json has 1,099,511,627,776 bytes, at most 67,"):
        read_json(tmp_path / "config.json")


SHAPE = {
    "id": re.compile(r"\d+"),
    "cost": int | float,
    "failed": str | None,
    "usage": {"prompt": int},
    "ids": [str],
}
GOOD = {"id": "7", "cost": 0.5, "usage": {"prompt": 1}, "ids": ["a"], "more": [{}]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": "x"}, r'f.json: id is "x", \\d\+ was expected'),
        ({"id": 7}, r"f.json: id is 7, \\d\+ was expected"),
        ({"cost": "1"}, 'f.json: cost is "1", an integer or a number was expected'),
        ({"cost": float("nan")}, "f.json: cost is NaN, an integer or a number was expected"),
        ({"cost": -(10**30)}, "f.json: cost is -1(0{30}), an integer or a number was expected"),
        ({"cost": True}, "f.json: cost is true, an integer or a number was expected"),
        ({"cost": None}, "f.json: cost is missing, an integer or a number was expected"),
        ({"failed": 1}, "f.json: failed is 1, a string or null was expected"),
        ({"usage": []}, r"f.json: usage is \[\], an object was expected"),
        ({"usage": {}}, "f.json: usage: prompt is missing, an integer was expected"),
        ({"ids": "a"}, 'f.json: ids is "a", a list was expected'),
        ({"ids": [None]}, "f.json: ids is missing, a string was expected"),
        ({"ids": ["x" * 99, 5]}, "f.json: ids is 5, a string was expected"),
    ],
)
def test_check_shape_names_the_field(change, message):
    check_shape(GOOD, SHAPE, "f.json")
    with pytest.raises(UserError, match=f"^{message}$"):
        check_shape(GOOD | change, SHAPE, "f.json")
