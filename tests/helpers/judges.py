"""Judges for the tests: what they are shown, one without a bias, and the command that asks them."""

import hashlib
import re


def shown(prompt: str) -> tuple[str, str, str]:
    """Instruction, first and second answer as the judge is shown them."""
    mark = re.search(r"^(=====\w{16}) instruction$", prompt, re.M)[1]
    parts = re.split(rf"\n{mark} [a-zA-Z ]+\n", prompt)
    return tuple(parts[1:4])


def merit(text: str) -> int:
    """What an unbiased judge thinks of an answer."""
    return int(hashlib.sha256(b"?" + text.encode()).hexdigest()[:8], 16)


def fair(prompt: str) -> str:
    _, first, second = shown(prompt)
    return "A" if merit(first) > merit(second) else "B"


def judge(command, folder, server, model, baseline, *more):
    flags = ("--base-url", server.url, "--judge", "m", "--retry-wait", 0.01, *more)
    return command("judge", model, baseline, "--out", folder, *flags)
