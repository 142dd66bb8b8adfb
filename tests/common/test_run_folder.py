"""The folder of a run: one process, equal settings, no folder for a run that never began."""

import pytest

from alpaca.common.errors import UserError
from alpaca.common.files import atomic_file, input_file
from alpaca.common.json_files import append_jsonl
from alpaca.common.run_folder import run_folder


def test_run_folder_is_locked_and_compares_settings(tmp_path):
    folder = tmp_path / "runs" / "r"
    with run_folder(folder, {"seed": 0}, "testing"):
        append_jsonl(folder / "log.jsonl", {})
        with (
            pytest.raises(UserError, match="another process is testing in"),
            run_folder(folder, {"seed": 0}, "testing"),
        ):
            pass
    with (
        pytest.raises(UserError, match="is another run \\(seed was 0, now it is 1\\)"),
        run_folder(folder, {"seed": 1}, "testing"),
    ):
        pass
    assert {path.name for path in folder.iterdir()} == {"log.jsonl", "settings.json"}


def test_run_folder_without_a_log_is_removed(tmp_path):
    with pytest.raises(RuntimeError), run_folder(tmp_path / "runs/r", {"seed": 0}, "testing"):
        with atomic_file(tmp_path / "runs/r/seeds.json") as file:
            file.write(b"x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_run_folder_keeps_what_was_there_before(tmp_path):
    (tmp_path / "settings.json").write_text('{"seed": 0}')
    (tmp_path / "notes.txt").write_text("mine")
    with run_folder(tmp_path, {"seed": 1}, "testing"):
        pass  # before the first line of a log the settings may change
    assert (tmp_path / "settings.json").read_text() == '{\n  "seed": 1\n}'
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_run_folder_keeps_settings_that_are_not_compared(tmp_path):
    (tmp_path / "settings.json").write_text('{"rater": "ann"}')
    with run_folder(tmp_path, {}, "testing"):
        pass
    assert (tmp_path / "settings.json").read_text() == '{"rater": "ann"}'


def test_run_folder_may_be_read_and_written_again(tmp_path):
    with run_folder(tmp_path / "r", {}, "testing"):
        append_jsonl(tmp_path / "r/log.jsonl", {})
        with atomic_file(input_file(tmp_path / "r/log.jsonl")) as file:
            file.write(b"{}\n")
