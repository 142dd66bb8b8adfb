"""The command line: one table of verbs, errors that name the flag or verb that was meant."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.commands import ROOT, assert_refused

import alpaca
from alpaca.__main__ import VERBS, load_verb
from alpaca.common.cli import Parser, not_negative, positive


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_refuses_an_unknown_flag(verb, command):
    code, out, err = command(verb, "--help")
    assert code == 0 and out.startswith(f"usage: alpaca {verb}") and not err
    code, out, err = command(verb, "--no-such-flag")
    assert code == 2 and not out and err.startswith(f"alpaca {verb}: error: ")
    assert err.count("\n") == 1 and len(err) < 300


def test_interrupt_while_modules_load_shows_no_traceback():
    code = "import os, signal, sys, alpaca.__main__ as program\n"
    code += "program.load_verb = lambda verb: os.kill(os.getpid(), signal.SIGINT)\n"
    code += "sys.argv = ['alpaca', 'generate']; program.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_list_of_verbs_into_a_closed_pipe_shows_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "alpaca"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_unknown_verb_is_answered_with_the_closest(command):
    assert_refused(command("generat"), "did you mean generate?")
    assert_refused(command("xyz"), "one of train-tokenizer, curate")
    assert_refused(command("x" * 9999), "one of train-tokenizer, curate")


def test_unknown_flag_is_answered_with_the_closest(capsys):
    parser = Parser(prog="tool")
    parser.add_argument("--learning-rate", type=float)
    with pytest.raises(SystemExit):
        parser.parse_args(["--learning-rat"])
    assert "did you mean --learning-rate?" in capsys.readouterr().err


def test_error_is_short_however_long_an_argument_is(capsys):
    parser = Parser(prog="tool")
    parser.add_argument("--num", type=not_negative)
    for value in ("9" * 5000, "9" * 400, "\x1b" * 390):  # Python reads at most 4,300 digits
        for words in ([f"--num={value}"], ["--num=1", value]):
            with pytest.raises(SystemExit):
                parser.parse_args(words)
            assert len(error := capsys.readouterr().err) <= 500 and "error: " in error


def test_verbs_run_in_a_folder_with_modules_of_the_same_names(tmp_path):
    """A user's own model.py must not shadow ours, nor need ours to be installed."""
    for name in ("model", "tokenizer", "dataset", "selfinstruct", "weightdiff"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    words = [shutil.which("alpaca", path=os.path.dirname(sys.executable))]
    if words[0] is None:  # not installed: what the script would do
        words = [sys.executable, "-c", f"import sys; sys.path.insert(1, {str(ROOT)!r}); "
                 "sys.argv[0] = 'alpaca'; from alpaca.__main__ import main; main()"]  # fmt: skip
    words += [
        "generate",
        "--model-dir",
        str(ROOT / "data/tiny-llama"),
        "--max-new-tokens",
        "4",
        "Hi",
    ]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_help_is_fast():
    """Under 0.3 s: no verb's module is loaded, let alone torch. The quickest of five counts."""

    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "alpaca", "--help"], cwd=ROOT, check=True,
                       capture_output=True)  # fmt: skip
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3


def test_help_of_every_verb_imports_no_heavy_package(monkeypatch):
    """It is the help that the parser has with the real packages."""
    monkeypatch.setenv("COLUMNS", "80")
    code = "import sys; from contextlib import suppress; from alpaca.__main__ import VERBS, main\n"
    code += "for verb in VERBS:\n  sys.argv = ['alpaca', verb, '--help']\n"
    code += "  with suppress(SystemExit): main()\n"
    code += "names = 'torch numpy httpx safetensors sentencepiece sympy'.split()\n"
    code += "print([name for name in names if hasattr(sys.modules.get(name), '__file__')])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "".join(load_verb(verb)[1].format_help() for verb in VERBS) + "[]\n"


@pytest.mark.parametrize(
    "words, replaced",
    [(["chat", "-h"], True), (["watermark", "--help"], True), (["chat"], False),
     (["generate", "--", "--help"], False), (["generate", "--input=-h"], False)],
)  # fmt: skip
def test_packages_are_replaced_for_help_alone(words, replaced, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["alpaca", *words])
    monkeypatch.setattr(alpaca.__main__, "load_verb", lambda verb: sys.exit(len(sys.meta_path)))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as finders:
        patch.setattr(sys, "meta_path", [])
        patch.delitem(sys.modules, "torch")
        alpaca.__main__.main()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert finders.value.code == replaced


def test_package_without_its_checkout_says_how_to_install(tmp_path):
    shutil.copytree(ROOT / "alpaca", tmp_path / "alpaca")
    done = subprocess.run(
        [sys.executable, "-m", "alpaca"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "pip install -e ." in done.stderr
    assert done.stderr.count("\n") == 1


def test_checkout_is_first_on_the_path():
    assert str(alpaca.CHECKOUT) in sys.path and alpaca.CHECKOUT == ROOT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--max-batch-size", "9" * 20], "more than 1,048,576"),
        (
            ["answers", "--out", "x", "--model", "m", "--request", '{"temperature": NaN}'],
            "JSON object",
        ),
        (
            ["answers", "--out", "x", "--model", "m", "--request", '{"user": "\\ud800"}'],
            "JSON object",
        ),
        (["answers", "--out", "x", "--model", "m", "--max-retries", "-3"], "int from 0"),
        (["serve", "--name", "a\udcff"], "UTF-8 text"),
        (["quantize", "--bogus"], "unrecognized argument --bogus"),
    ],
)
def test_flags_with_impossible_values_are_refused(command, words, message):
    assert_refused(command(*words), message)


def test_numbers_of_flags_are_above_0_and_finite():
    assert positive(float)("0.5") == 0.5 and positive(int, 5)("5") == 5
    for kind, text in ((int, "0"), (int, "-1"), (float, "0"), (float, "nan"), (float, "inf")):
        with pytest.raises(ValueError):
            positive(kind)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="6 is more than 5"):
        positive(int, 5)("6")
