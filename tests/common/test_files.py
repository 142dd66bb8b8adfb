"""Files that are complete or absent, logs that survive a kill."""

import subprocess
import sys

import pytest
from helpers.commands import ROOT

from alpaca.common import files
from alpaca.common.errors import UserError


def test_atomic_file_keeps_the_old_content_on_failure(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_file(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with files.atomic_file(path, "w") as file:
        file.write("nëw")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "nëw" and len(list(tmp_path.iterdir())) == 1


def test_atomic_folder_appears_only_when_complete(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(RuntimeError), files.atomic_folder(path) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left by a killed run").write_text("x")
    with files.atomic_folder(path) as partial:
        (partial / "whole").write_text("x")
        assert not path.exists()
        with pytest.raises(UserError, match="being written by another process"):
            files.atomic_folder(path).__enter__()
    assert [entry.name for entry in path.iterdir()] == ["whole"]
    with pytest.raises(UserError, match="out exists already"), files.atomic_folder(path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_atomic_folder_syncs_all_before_the_rename(tmp_path, monkeypatch):
    synced, sync = [], files.fsync_path
    monkeypatch.setattr(files, "fsync_path", lambda path: (synced.append(path.name), sync(path)))

    def no_rename(source, target):
        assert {"a", "b", "out.partial"} <= set(synced) and not target.exists()
        raise OSError("power cut")

    monkeypatch.setattr(files.os, "rename", no_rename)
    with (
        pytest.raises(OSError, match="power cut"),
        files.atomic_folder(tmp_path / "out") as folder,
    ):
        (folder / "a").write_text("x")
        (folder / "b").write_text("x")
    assert not list(tmp_path.iterdir())


def test_atomic_folder_makes_its_parents(tmp_path):
    with files.atomic_folder(tmp_path / "deep" / "er" / "out"):
        pass
    assert (tmp_path / "deep" / "er" / "out").is_dir()


def test_append_jsonl_survives_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_jsonl(path, {"n": 1}, {"text": "zwölf\u2028\n"})
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        intact = list(files.read_jsonl(path, skip_torn=True))
        files.append_jsonl(path, {"n": 3})
        assert list(files.read_jsonl(path)) == [*intact, {"n": 3}], whole[:cut]
    path.write_bytes(b'{"n": 1}\n' + b'{"torn": "' + b"x" * 200_000)
    files.append_jsonl(path, {"n": 2})
    assert list(files.read_jsonl(path)) == [{"n": 1}, {"n": 2}]


def test_atomic_folder_renamed_during_locking_is_refused(tmp_path, monkeypatch):
    def slow_lock(handle, how, flock=files.fcntl.flock):
        (tmp_path / "out.partial").rename(tmp_path / "elsewhere")
        (tmp_path / "out.partial").mkdir()
        flock(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", slow_lock)
    with pytest.raises(UserError, match="being written"), files.atomic_folder(tmp_path / "out"):
        pass


def test_atomic_folder_refuses_a_symlink(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link exists"), files.atomic_folder(tmp_path / "link"):
        pass


APPENDING = """
import sys
from alpaca.common import files
for n in range(40):
    files.append_jsonl(sys.argv[1], {"who": sys.argv[2], "n": n, "x": "x" * 20_000})
"""


def test_append_jsonl_from_four_processes_loses_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", APPENDING, path, str(who)], cwd=ROOT)
        for who in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    written = {(record["who"], record["n"]) for record in files.read_jsonl(path)}
    assert len(written) == 160


def test_append_jsonl_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    files.append_jsonl(tmp_path / "log.jsonl", {})
    assert len(synced) == 2  # the file, and the folder that holds its new name
    files.append_jsonl(tmp_path / "log.jsonl", {})
    assert len(synced) == 3
    with files.atomic_file(tmp_path / "file") as file:
        file.write(b"x")
    assert len(synced) == 5


def test_read_jsonl_names_the_line_of_an_error(tmp_path):
    path = tmp_path / "user.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}')
    assert list(files.read_jsonl(path)) == [{"n": 1}, {"n": 2}]
    for content, words in (
        ('{"n": 1}\n{"n": ', "line 2: not JSON"),
        ("[1]\n", "line 1: a JSON object was expected"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            list(files.read_jsonl(path))
    path.write_bytes(b'{"n": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 1: not JSON"):
        list(files.read_jsonl(path))
