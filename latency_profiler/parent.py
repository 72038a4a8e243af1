"""Processes that end with the one that has started them, however it ends."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # found here: a fork must not look for it


def die_with(parent: int) -> bool:
    """Have the kernel kill this process when its parent ends; False when that has ended before the kernel knew."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent
