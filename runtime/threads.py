"""How the threads of OpenMP wait for each other; imports nothing that loads an OpenMP library."""

from __future__ import annotations

import os

import psutil

#: Variables that say how waiting threads spend their time, of any OpenMP library.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
#: A machine is busy if other jobs take this many cores.
_BUSY_CORES = 0.5
_SECONDS = 0.1


def wait_passively_if_busy() -> None:
    """Let waiting threads of OpenMP sleep and not spin if other jobs are running on this machine.

    A thread that spins keeps the core from the job that the others wait for; on a machine without other jobs it wakes
    up sooner (`benchmarks/rows/busy_machine.py`). A variable of the user that says how threads wait is left alone.
    OpenMP libraries read the variables when they are loaded, so call this before torch is imported.
    """
    if any(name in os.environ for name in VARIABLES):
        return
    if psutil.cpu_percent(_SECONDS) / 100 * (psutil.cpu_count() or 1) >= _BUSY_CORES:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


__all__ = ["VARIABLES", "wait_passively_if_busy"]
