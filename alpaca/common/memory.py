"""The memory that the C library gives to tensors."""

import ctypes
from contextlib import suppress


def keep_freed_memory(below: int = 1 << 30) -> None:
    """Have the C library keep freed memory for the next tensor instead of returning it.

    By default every large CPU tensor is fresh memory, which the system clears page by page: for a
    small model a fifth of a training step in fp32 and two fifths in bf16; and a third of a step
    that decodes 16 sequences and samples."""
    with suppress(OSError, AttributeError):  # a C library without mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, below)  # M_MMAP_THRESHOLD: bytes from which a tensor is a mapping of its own
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: never shrink the heap
