"""The scripts for clusters, with stand-ins for the programs that only a cluster has."""

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import otdrg
import pytest
from otdrg.cli import main

ROOT = Path(otdrg.__file__).parent
SLURM = ROOT / "recipes" / "slurm"
#: `srun` runs its command once for each node, one after the other; the others record how they were called.
PROGRAMS = {
    "srun": 'for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@"; done',
    "scontrol": 'printf "%s\\n" node7 node8',
    "accelerate": 'printf "%s\\t" "$@" >> calls; echo >> calls',
    "otdrg": 'printf "%s\\t" "$@" >> calls; echo >> calls',
}


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """Run a script as Slurm would in a job of N nodes with 4 GPUs; returns the recorded calls, each a list of words."""
    (tmp_path / "bin").mkdir()
    for name, content in PROGRAMS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{content}\n")
        path.chmod(0o755)

    def run(script, *arguments, nodes=1, **variables):
        variables |= {"SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "123456"}
        variables |= {"SLURM_JOB_NODELIST": "node[7-8]", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", SLURM / script, *arguments], env=variables, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return [call.split("\t")[:-1] for call in calls]

    return run


def launched(words):
    """The options of `accelerate launch`, and those of `train_hf.py`."""
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    options = launch_command_parser().parse_args(words[1:])
    assert (ROOT / options.config_file).is_file() and options.training_script == "train_hf.py"
    return options, options.training_script_args


@pytest.mark.parametrize("script", sorted(path.name for path in SLURM.glob("*.sbatch")))
def test_slurm_options_precede_commands_and_shell_is_valid(script):
    lines = (SLURM / script).read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    # Slurm does not read options after the first command.
    assert [line for line in lines[:first] if line.startswith("#SBATCH --")]
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    assert subprocess.run(["bash", "-n", SLURM / script]).returncode == 0


def test_slurm_prepare_array_makes_the_dataset(submit, tmp_path):
    command = ["prepare", "phantom", "--train", "3", "--validation", "1", "--test", "0", "--image-size", "32"]
    command += ["--studies-per-shard", "2", "--output", str(tmp_path / "studies")]
    for task in ("2", "1"):
        ((*words,),) = submit("prepare.sbatch", *command, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="2")
        assert words == [*command, "--shard", f"{task}/2"]
        assert main(words) == 0
    assert main([*command, "--merge"]) == 0
    (again,) = submit("prepare.sbatch", "label", "x", SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="1", SHARES="64")
    assert again == ["label", "x", "--shard", "3/64"]


def test_slurm_one_node_uses_its_gpus(submit):
    (call,) = submit("train_one_node.sbatch", "recipes/own data.yaml", "report.max_steps=1")
    options, arguments = launched(call)
    assert options.num_processes == 4 and options.config_file == "recipes/accelerate/ddp.yaml"
    assert arguments == ["recipes/own data.yaml", "report.max_steps=1", "--resume"]


def test_slurm_nodes_have_ranks_of_one_launch(submit):
    config = "recipes/accelerate/zero3.yaml"
    calls = submit("train_several_nodes.sbatch", "recipes/own data.yaml", nodes=2, ACCELERATE_CONFIG=config)
    for rank, call in enumerate(calls):
        options, arguments = launched(call)
        assert (options.num_machines, options.machine_rank, options.num_processes) == (2, rank, 8)
        assert (options.main_process_ip, options.main_process_port) == ("node7", 23456)
        assert options.config_file == config and arguments == ["recipes/own data.yaml", "--resume"]
    assert len(calls) == 2


def test_hf_job_trains_the_recipe_and_pushes(monkeypatch):
    from otdrg.training.recipe import load_recipe

    path = ROOT / "recipes" / "hf_job.py"
    spec = importlib.util.spec_from_file_location("hf_job", path)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    calls = []

    def run(words):
        calls.append(words)
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr("subprocess.run", run)
    recipe = str(ROOT / "recipes" / "own_data.yaml")
    assert job.main([recipe, "studies.options.folder=/studies", "--model", "org/otdrg", "report.max_steps=7"]) == 3
    (words,) = calls
    place = words.index("otdrg.train_hf") + 1
    assert words[0] == sys.executable and words[place] == recipe
    loaded = load_recipe(recipe, words[place + 1 :])
    assert loaded.studies.options == {"folder": "/studies"} and loaded.report.max_steps == 7
    assert (loaded.report.push_to_hub, loaded.report.hub_model_id) == (True, "org/otdrg")


def test_hf_job_metadata_names_extras_that_exist():
    path = ROOT / "recipes" / "hf_job.py"
    head, _, _ = path.read_text(encoding="utf-8").partition("# ///\n")
    assert head.startswith("# /// script\n") and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in head.splitlines(keepends=True)[1:]))
    assert metadata["dependencies"] == ["otdrg[metrics]"]
