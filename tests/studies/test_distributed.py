"""The steps for datatrove: tasks of which some are killed give the dataset of one process."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import otdrg
import pytest
from otdrg.studies import open_source
from otdrg.studies.build import BuildOptions, build_studies_dataset
from PIL import Image

EXAMPLE = Path(otdrg.__file__).parent / "examples" / "prepare_with_datatrove.py"

#: Eight tasks on this machine; the last one kills all of them in the middle of its share, unless it has done so before.
KILLED = """
import os, signal, sys
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from otdrg.studies.build import BuildOptions
from otdrg.studies.csv_table import CSVSource
from otdrg.studies.distributed import BuildShare, MergeShares

table, output = sys.argv[1:]

class Killed(CSVSource):
    def read(self, entry):
        mark = Path(output + ".killed")
        if entry.id == "s31" and not mark.exists():
            mark.touch()
            os.killpg(0, signal.SIGKILL)
        return super().read(entry)

if __name__ == "__main__":
    for name, step, tasks in (("build", BuildShare, 8), ("merge", MergeShares, 1)):
        steps = [step(Killed(table=table), output, BuildOptions(studies_per_shard=2))]
        LocalPipelineExecutor(steps, tasks, workers=2, logging_dir=output + ".logs/" + name).run()
"""


@pytest.fixture
def table(tmp_path):
    """40 studies, of which 8 are skipped because their image is missing, all in train."""
    rng = np.random.default_rng(0)
    lines = ["id,image,report,split"]
    (tmp_path / "images").mkdir()
    for place in range(40):
        if place % 5 != 3:
            pixels = rng.integers(0, 256, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{place}.png")
        lines.append(f"s{place},images/{place}.png,Report {place}.,train")
    (tmp_path / "reports.csv").write_text("\n".join(lines))
    return str(tmp_path / "reports.csv")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_distributed_without_datatrove_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.setitem(sys.modules, "datatrove.data", None)
    monkeypatch.delitem(sys.modules, "otdrg.studies.distributed", raising=False)
    with pytest.raises(ImportError, match=r"needs datatrove \(.*\): pip install 'otdrg\[distributed\]'"):
        importlib.import_module("otdrg.studies.distributed")


@pytest.mark.slow
def test_distributed_local_tasks_killed_give_the_dataset_of_one_process(table, tmp_path):
    pytest.importorskip("datatrove", reason="datatrove is not installed (the extra `distributed`)")
    (tmp_path / "prepare.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "prepare.py"), table, str(tmp_path / "tasks")]
    done = subprocess.run(command, start_new_session=True, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    completed = list((tmp_path / "tasks.logs" / "build" / "completions").iterdir())
    assert 6 <= len(completed) < 8 and not (tmp_path / "tasks").exists()
    times = {path.name: path.stat().st_mtime_ns for path in completed}
    done = subprocess.run(command, start_new_session=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == times[path.name] for path in completed)
    options = BuildOptions(studies_per_shard=2)
    assert build_studies_dataset(open_source("csv", table=table), tmp_path / "whole", options).skipped == 8
    assert content(tmp_path / "tasks") == content(tmp_path / "whole")


@pytest.mark.slow
def test_distributed_two_ray_nodes_give_the_dataset_of_one_process(table, tmp_path):
    pytest.importorskip("datatrove", reason="datatrove is not installed (the extra `distributed`)")
    pytest.importorskip("ray", reason="ray is not installed (the extra `distributed`)")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        command = [sys.executable, str(EXAMPLE), table, str(tmp_path), "--output", str(tmp_path / "tasks")]
        command += ["--executor", "ray", "--tasks", "8", "--studies-per-shard", "2"]
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        with subprocess.Popen(command, env=environment, start_new_session=True) as first:
            completions = tmp_path / "tasks.logs" / "build" / "completions"
            while first.poll() is None and not (completions.is_dir() and any(completions.iterdir())):
                time.sleep(0.02)
            first.kill()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        cluster.shutdown()
    source = open_source("csv", table=table, images=str(tmp_path))
    build_studies_dataset(source, tmp_path / "whole", BuildOptions(studies_per_shard=2))
    assert content(tmp_path / "tasks") == content(tmp_path / "whole")
