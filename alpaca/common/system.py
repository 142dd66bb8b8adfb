"""What depends on the operating system: locks, memory, open files. The tests run on Linux.

macOS lacks /proc, mallopt and posix_fadvise, and its fsync leaves what it writes in the drive's own
cache: there, files survive a kill, but perhaps no power cut. Without fcntl nothing is locked.
"""

import ctypes
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from alpaca.common.errors import UserError, notice

fcntl: Any
resource: Any
try:
    import fcntl
    import resource
except ImportError:  # not on every system
    fcntl = resource = None


def lock_file(file: IO | int, wait: bool = True) -> None:
    """Lock an open file until it is closed. One that is locked already is waited for, or else
    raises a BlockingIOError."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def start_writing(file: IO, offset: int, length: int) -> None:
    """Let the disk begin with a part of a file: otherwise all the writing waits for fsync."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)


def keep_freed_memory(below: int = 1 << 30) -> None:
    """Have the C library keep freed memory for the next tensor instead of returning it.

    By default every large CPU tensor is fresh memory, which the system clears page by page: for a
    small model a fifth of a training step in fp32 and two fifths in bf16; and a third of a step
    that decodes 16 sequences and samples."""
    with suppress(OSError, AttributeError):  # a C library without mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, below)  # M_MMAP_THRESHOLD: bytes from which a tensor is a mapping of its own
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def host_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes that this machine has left, or without /proc all of them."""
    with suppress(OSError):
        (kilobytes,) = re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        return 1024 * int(kilobytes)
    return host_memory()


def peak_host_memory() -> int:
    """The most bytes that this process has used, or 0 where the system does not say."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak if sys.platform == "darwin" else 1024 * peak


def check_compiler(device: str, remedy: str) -> None:
    """Refuse --compile without a compiler, and say what it is for. torch.compile writes C++ for a
    CPU, and Triton builds its launcher in C for a GPU: without a compiler both end after a hundred
    lines of traceback, in the first step."""
    if device == "cuda":
        variable, names = "CC", ("gcc", "clang")
    elif device == "cpu":
        variable, names = "CXX", ("clang++" if sys.platform == "darwin" else "g++",)
    else:
        return
    if variable not in os.environ and not any(map(shutil.which, names)):
        raise UserError(f"torch.compile needs {' or '.join(names)}: install it, or {remedy}")
    if device == "cpu":
        notice("--compile is meant for a GPU: on a CPU it does little, and decoding gets slower")


def max_open_files(wanted: int) -> int:
    """Raise the number of files that this process may open to `wanted`, as far as it may."""
    if not resource:
        return wanted
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < wanted and files != resource.RLIM_INFINITY:
        files = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return wanted if files == resource.RLIM_INFINITY else files
