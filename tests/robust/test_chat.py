"""`alpaca chat` in a terminal: Ctrl-C stops the answer and not the program."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import torch
from helpers.commands import ROOT
from helpers.models import small_config

from alpaca.weights.writer import save_model
from model import Llama


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 512, "num_hidden_layers": 8, "max_position_embeddings": 4096}
    config = small_config(vocab_size=1024, **size)
    model = Llama(config)
    model.lm_head.weight.data[2] = 0  # EOS is unlikely
    save_model(model, config, tmp_path / "slow", tokenizer=ROOT / "data/tokenizer.model")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "alpaca", "chat", "--model-dir", tmp_path / "slow"]
    command += ["--max-new-tokens", "4000"]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, start_new_session=True, cwd=ROOT, **streams)
    os.close(theirs)
    seen = ""

    def wait_for(condition) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while not condition(seen):
            assert select.select([ours], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(ours, 65536).decode(errors="replace")

    def at_the_prompt(text: str) -> bool:
        return text.endswith("\n> ")

    try:
        wait_for(at_the_prompt)
        os.write(ours, b"Go on.\n")
        seen = ""
        wait_for(lambda text: len(text) > 200)
        process.send_signal(signal.SIGINT)
        wait_for(at_the_prompt)
        assert len(seen) < 10_000
        seen = ""
        time.sleep(0.5)  # until readline waits for a key: before that it ignores the signal
        process.send_signal(signal.SIGINT)  # at the prompt it ends nothing either
        wait_for(at_the_prompt)
        os.write(ours, b"/quit\n")
        with suppress(OSError):  # the terminal's other end is closed
            while select.select([ours], [], [], 60)[0] and os.read(ours, 65536):
                pass
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
