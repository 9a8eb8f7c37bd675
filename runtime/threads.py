"""How the threads of OpenMP wait for each other; imports nothing that loads an OpenMP library."""

from __future__ import annotations

import os

#: Variables that say how waiting threads spend their time, of any OpenMP library.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> None:
    """Let waiting threads of OpenMP sleep and not spin, unless a variable of the user says how they wait.

    A thread that spins keeps the core from the job that the others wait for: on a busy machine a step of training
    with two threads took many times as long. OpenMP libraries read the variables when they are loaded, so call this
    before torch is imported.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


__all__ = ["VARIABLES", "wait_passively"]
