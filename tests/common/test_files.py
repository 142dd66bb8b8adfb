"""Files that are complete or absent, and inputs that are never written over."""

import errno
import gzip
import json
import os

import pytest

from alpaca.common import files, system
from alpaca.common.errors import UserError
from alpaca.common.json_files import append_jsonl


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


def test_atomic_folder_renamed_during_locking_is_refused(tmp_path, monkeypatch):
    def slow_lock(handle, how, flock=system.fcntl.flock):
        (tmp_path / "out.partial").rename(tmp_path / "elsewhere")
        (tmp_path / "out.partial").mkdir()
        flock(handle, how)

    monkeypatch.setattr(system.fcntl, "flock", slow_lock)
    with pytest.raises(UserError, match="being written"), files.atomic_folder(tmp_path / "out"):
        pass


def test_atomic_folder_refuses_a_symlink(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link exists"), files.atomic_folder(tmp_path / "link"):
        pass


def test_an_input_is_never_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paper = tmp_path / "paper.txt"
    paper.write_text("paid for")
    (tmp_path / "link").symlink_to(paper)
    (tmp_path / "hard").hardlink_to(paper)
    (tmp_path / "folder").mkdir()
    assert files.read_text("folder/../paper.txt") == "paid for"
    for name in ("paper.txt", "./paper.txt", paper, "link", "hard", "folder/../link"):
        with pytest.raises(UserError, match="is an input of this command"), files.atomic_file(name):
            pass
        with pytest.raises(UserError, match="is an input of this command"):
            append_jsonl(name, {})
    assert paper.read_text() == "paid for" and (tmp_path / "link").is_symlink()
    with files.atomic_file("other.txt") as file:
        file.write(b"x")


def test_a_file_of_another_run_is_never_replaced(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "responses.jsonl").write_text("{}")
    with (
        pytest.raises(UserError, match="belongs to a run: name another output"),
        files.atomic_file(tmp_path / "responses.jsonl"),
    ):
        pass
    with files.atomic_file(tmp_path / "export.json") as file:
        file.write(b"x")
    assert (tmp_path / "responses.jsonl").read_text() == "{}"


def test_an_input_in_the_partial_folder_is_never_removed(tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model.bin").write_text("x")
    (tmp_path / "blob").write_text("x")
    (partial / "link").symlink_to(tmp_path / "blob")
    for name in ("model.bin", "link"):
        files.INPUTS.clear()
        files.input_file(partial / name)
        with (
            pytest.raises(UserError, match=f"out.partial/{name} is an input of this command"),
            files.atomic_folder(tmp_path / "out"),
        ):
            pass
        assert (partial / "model.bin").exists() and (partial / "link").exists()


def test_only_a_regular_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(UserError, match="is not a regular file"), files.atomic_file(path):
            pass
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


def test_half_a_surrogate_pair_is_written_as_json_spells_it(tmp_path):
    with files.atomic_file(tmp_path / "a.json", "w") as file:
        json.dump({"é": "\ud800"}, file, ensure_ascii=False)
    append_jsonl(tmp_path / "b.jsonl", {"é": "\ud800"})
    for path in tmp_path.iterdir():
        assert path.read_text("utf-8").strip() == r'{"é": "\ud800"}'


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="is not a regular file"):
            files.input_file(path)
    with pytest.raises(FileNotFoundError, match="none"):
        files.input_file(tmp_path / "none")


def test_a_bound_holds_for_what_a_gzip_file_expands_to(tmp_path):
    (tmp_path / "bomb").write_bytes(gzip.compress(bytes(100_000)))
    assert len(files.read_text(tmp_path / "bomb", 100_000)) == 100_000
    with pytest.raises(UserError, match="bomb: more than 99,999 bytes when unzipped"):
        files.read_text(tmp_path / "bomb", 99_999)


def test_an_error_of_a_write_names_its_file(tmp_path):
    for write in (files.atomic_file, files.atomic_folder):
        with (
            pytest.raises(OSError, match="No space left on device: '.*/big'"),
            write(tmp_path / "big"),
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_failed_outputs_leave_no_folder_behind(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "deep/er/out"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_lock_output_keeps_a_second_writer_out(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("")
    link = tmp_path / "link"
    link.symlink_to(path)
    with files.lock_output(path):
        files.input_file(path)  # a locked output may be read and written
        append_jsonl(path, {"n": 1})
        for name in (path, link):
            with (
                pytest.raises(UserError, match="another process is writing"),
                files.lock_output(name),
            ):
                pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answers.jsonl", "link"]
