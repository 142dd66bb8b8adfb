"""One-line errors, progress, files that are whole or absent, logs that survive a kill."""

import io
import shlex
import subprocess
import sys
import time
import types

import pytest
from helpers.commands import ROOT, assert_refused, module_name, our_modules

from alpaca.common import errors, files, progress


def failing(error):
    def main():
        raise error

    return types.SimpleNamespace(__name__="tool", main=main)


def test_a_users_mistake_is_one_line_and_exit_2(command, tmp_path):
    assert_refused(
        command(failing(ValueError("line 3:\n  no field"))), "tool.py: error: line 3: no"
    )

    tool = types.SimpleNamespace(__name__="tool", main=(tmp_path / "absent").read_bytes)
    assert_refused(command(tool), f"{tmp_path}/absent: No such file or directory")


def test_a_bug_keeps_its_traceback(command):
    with pytest.raises(AssertionError):
        command(failing(AssertionError("a bug")))


def test_the_traceback_of_a_mistake_can_be_asked_for(command, monkeypatch):
    monkeypatch.setenv("ALPACA_TRACEBACK", "1")
    with pytest.raises(ValueError):
        command(failing(ValueError("x")))


def test_ctrl_c_is_130_and_other_ranks_are_silent(command, monkeypatch):
    assert command(failing(KeyboardInterrupt())) == (130, "", "tool.py: interrupted\n")
    monkeypatch.setenv("RANK", "3")
    assert command(failing(ValueError("everybody sees this"))) == (2, "", "")


def test_a_reader_that_left_is_no_mistake():
    program = "from alpaca.common import errors\n"
    program += "errors.run_command(lambda: [print('x' * 999) for _ in range(9999)])"
    run = subprocess.run(
        f"{sys.executable} -c {shlex.quote(program)} | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (141, "")


def test_work_goes_on_when_nobody_watches_its_progress(tmp_path):
    program = f"""
from alpaca.common import errors, files, progress
progress.QUIET_SECONDS = 0
def main():
    bar = progress.Progress(999, "steps")
    for _ in range(999): bar.step()
    errors.notice("nearly")
    open({str(tmp_path / "done")!r}, "w").close()
errors.run_command(main)"""
    run = subprocess.run(
        f"{sys.executable} -c {shlex.quote(program)} 2>&1 | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, check=False,
    )  # fmt: skip
    assert run.returncode == 0 and (tmp_path / "done").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_seldom_in_a_log(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    screen, log = Terminal(), io.StringIO()
    shown, logged = progress.Progress(200, "steps", screen), progress.Progress(200, "steps", log)
    for _ in range(200):
        now[0] += 1
        shown.step(extra="loss 1.5")
        logged.step()
    shown.close()
    logged.close()
    assert screen.getvalue().count("\n") == 1 and screen.getvalue().count("\r") == 200
    assert "50/200 steps  1 steps/s  2:30 left  loss 1.5" in screen.getvalue()
    lines = log.getvalue().splitlines()
    assert len(lines) == 7 and lines[0].startswith("30/200 steps")
    assert lines[-1] == "200/200 steps  1 steps/s  in 3:20"


def test_numbers_and_times_read_well():
    pairs = {0: "0", 7: "7", 0.123: "0.12", 3.25: "3.2", 512.6: "513", 9999: "9999"}
    for number, text in {
        **pairs,
        14300: "14.3K",
        999999: "1.0M",
        6.7e9: "6.7G",
        2e12: "2.0T",
    }.items():
        assert progress.short_number(number) == text
    for seconds, text in {7: "0:07", 750: "12:30", 11100: "3:05:00", float("inf"): "?"}.items():
        assert progress.duration(seconds) == text
    assert errors.join_names("abc") == "a, b, c"
    assert errors.join_names("abcdefghij") == "a, b, c, d, e, f, g, h and 2 more"


def test_atomic_file_leaves_the_old_content_when_its_writer_fails(tmp_path):
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


def test_atomic_folder_appears_only_when_its_writer_is_done(tmp_path):
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
        with pytest.raises(ValueError, match="being written by another process"):
            files.atomic_folder(path).__enter__()
    assert [entry.name for entry in path.iterdir()] == ["whole"]
    with pytest.raises(ValueError, match="out exists already"), files.atomic_folder(path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_the_last_act_of_an_atomic_folder_is_one_rename(tmp_path, monkeypatch):
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


def test_an_atomic_folder_makes_the_folders_above_it(tmp_path):
    with files.atomic_folder(tmp_path / "deep" / "er" / "out"):
        pass
    assert (tmp_path / "deep" / "er" / "out").is_dir()


def test_a_log_survives_a_line_torn_by_a_kill(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_jsonl(path, {"n": 1}, {"text": "zwölf\u2028\n"})
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = list(files.read_jsonl(path, skip_torn=True))
        files.append_jsonl(path, {"n": 3})
        assert list(files.read_jsonl(path)) == [*kept, {"n": 3}], whole[:cut]
    path.write_bytes(b'{"n": 1}\n' + b'{"torn": "' + b"x" * 200_000)
    files.append_jsonl(path, {"n": 2})
    assert list(files.read_jsonl(path)) == [{"n": 1}, {"n": 2}]


APPENDING = """
import sys
from alpaca.common import files
for n in range(40):
    files.append_jsonl(sys.argv[1], {"who": sys.argv[2], "n": n, "x": "x" * 20_000})
"""


def test_writers_of_one_log_lose_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", APPENDING, path, str(who)], cwd=ROOT)
        for who in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    written = {(record["who"], record["n"]) for record in files.read_jsonl(path)}
    assert len(written) == 160


def test_what_was_appended_is_on_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    files.append_jsonl(tmp_path / "log.jsonl", {})
    assert len(synced) == 2  # the file, and the folder that holds its new name
    files.append_jsonl(tmp_path / "log.jsonl", {})
    assert len(synced) == 3
    with files.atomic_file(tmp_path / "file") as file:
        file.write(b"x")
    assert len(synced) == 5


def test_a_partial_folder_renamed_while_its_lock_was_awaited_is_not_shared(tmp_path, monkeypatch):
    def slow_lock(handle, how, flock=files.fcntl.flock):
        (tmp_path / "out.partial").rename(tmp_path / "elsewhere")
        (tmp_path / "out.partial").mkdir()
        flock(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", slow_lock)
    with pytest.raises(ValueError, match="being written"), files.atomic_folder(tmp_path / "out"):
        pass


def test_a_symlink_is_no_place_for_a_new_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link exists"), files.atomic_folder(tmp_path / "link"):
        pass


def test_a_users_jsonl_is_read_whole_or_refused_by_line(tmp_path):
    path = tmp_path / "user.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}')
    assert list(files.read_jsonl(path)) == [{"n": 1}, {"n": 2}]
    for content, words in (
        ('{"n": 1}\n{"n": ', "line 2: not JSON"),
        ("[1]\n", "line 1: a JSON object was expected"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            list(files.read_jsonl(path))
    path.write_bytes(b'{"n": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        list(files.read_jsonl(path))


def test_every_module_can_be_imported_without_a_command_line():
    """And brings no compiler along, which would be two seconds at every start without a GPU."""
    names = ", ".join(module_name(file) for file in our_modules())
    compiler = "torch.cuda.is_available() or 'torch._dynamo' not in sys.modules"
    load = "alpaca.weights.checkpoint.load_model('data/tiny-llama')"
    code = f"import sys, torch, {names}; {load}; assert {compiler}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_who_only_reads_records_does_not_wait_for_torch():
    code = "import sys, selfinstruct, alpaca.datagen.curate, alpaca.evaluation.win_rate; "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
