"""Processes for tests that kill, signal or count them, started in a moment.

A server imports the libraries once and forks for each process, which saves the seconds that importing them takes.
Nothing of `otdrg` is imported before the fork.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = [
    "torch",
    "accelerate",
    "datasets",
    "peft",
    "timm",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.dinov2.modeling_dinov2",
    "torch.nn.parallel.distributed",
]


def _run(arguments, environment, output, error):
    gc.freeze()  # the libraries: each collection would take half a second and copy their memory
    for number, path in ((1, output), (2, error)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    kind, what, *rest = arguments
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


class Process:
    """`python -c CODE …` or `python -m MODULE …`, with what is used here of `subprocess.Popen`."""

    def __init__(self, arguments, env=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        folder = tempfile.mkdtemp()
        self._output, self._error = Path(folder, "output"), Path(folder, "error")
        arguments = [str(argument) for argument in arguments]
        environment = dict(os.environ if env is None else env)
        self._process = context.Process(target=_run, args=(arguments, environment, self._output, self._error))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.pid, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return [path.read_text(encoding="utf-8") if path.exists() else "" for path in (self._output, self._error)]
