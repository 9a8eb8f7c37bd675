"""Processes whose parent is gone."""

import os
import subprocess
import sys
import time

import pytest

CODE = "import time; from otdrg.runtime.interruptions import end_with_parent; end_with_parent({}); time.sleep(60)"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc: an ended process looks like a running one")
def test_end_with_parent_of_a_process_that_ended_unnoticed_ends():
    parent = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as long as nobody asks for its status
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", CODE.format(parent.pid)]).returncode == 1
    assert time.monotonic() - started < 40
    assert parent.wait() == 0
