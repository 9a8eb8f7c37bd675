"""Two CPU processes give what one gives, and what was asked for is what runs."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.processing_otdrg import OTDRGProcessor
from otdrg.runtime.processes import check_wrapper, start_processes
from otdrg.train_hf import main
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install otdrg[deepspeed])"
)

# Noise that each process would draw for itself, and losses that compare the studies of one process's batch, are off.
SAME = [
    "model.overrides.lora.lora_dropout=0.0",
    "model.overrides.vision_config.model_args.drop_path_rate=0.0",
    "report.evaluation={split: validation, metrics: [bleu_4, rouge_l], controls: [true_states]}",
    "report.ot_weight_warmup=0.0",
    "report.learning_rate=1e-2",
    "report.abnormal_sentence_weight=3",
    "report.abnormal_study_weight=2.5",
]


def results(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def lines(run, stage, field):
    return [line for line in results(run)[stage]["log_history"] if field in line]


def predictions(run):
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def one_process(tiny_recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("one")
    assert main([str(tiny_recipe), f"output_dir={run}", *SAME]) == 0
    return run


@pytest.fixture(scope="module")
def two_processes(tiny_recipe, tmp_path_factory, launch):
    run = tmp_path_factory.mktemp("two")
    batches = ["predictor.per_device_train_batch_size=2", "report.per_device_train_batch_size=2"]
    launch(["-m", "otdrg.train_hf", str(tiny_recipe), f"output_dir={run}", *SAME, *batches], OMP_NUM_THREADS="1")
    return run


def assert_same(one, two, stage, field, names):
    for single, joined in zip(lines(one, stage, field), lines(two, stage, field), strict=True):
        for name in {*names} & {*single}:
            assert joined[name] == pytest.approx(single[name], abs=1e-3), name


@pytest.mark.parametrize("stage", ["predictor", "report"])
def test_train_two_processes_equal_one(one_process, two_processes, stage):
    for run, expected in ((one_process, (1, None)), (two_processes, (2, "DistributedDataParallel"))):
        assert (results(run)[stage]["processes"], results(run)[stage]["wrapper"]) == expected
    assert_same(one_process, two_processes, stage, "loss", ("loss", "report_loss", "ot_loss", "grad_norm"))


def test_train_accumulated_batches_equal_one(tiny_recipe, one_process, tmp_path):
    shutil.copytree(one_process / "predictor", tmp_path / "predictor")
    batches = ["report.per_device_train_batch_size=2", "report.gradient_accumulation_steps=2", "stages=[report]"]
    assert main([str(tiny_recipe), f"output_dir={tmp_path}", *SAME, *batches]) == 0
    assert_same(one_process, tmp_path, "report", "loss", ("loss", "report_loss", "ot_loss", "grad_norm"))


def test_evaluate_two_processes_count_every_study_once(one_process, two_processes):
    """Of 5 studies in batches of 4 and of 2, the last of which two processes fill up with studies seen before."""
    assert_same(one_process, two_processes, "predictor", "eval_loss", ("eval_loss", "eval_macro_auc"))
    assert_same(one_process, two_processes, "report", "eval_loss", ("eval_loss", "eval_report_loss", "eval_ot_loss"))
    one, two = (results(run)["predictor"]["validation"] for run in (one_process, two_processes))
    assert two["findings"]["edema"]["studies"] == 5
    for name, row in one["findings"].items():
        assert two["findings"][name] == pytest.approx(row, abs=1e-5), name
    assert two["macro_ece"] == pytest.approx(one["macro_ece"], abs=1e-5)


def test_generate_two_processes_write_each_report_once(one_process, two_processes):
    one, two = (predictions(run) for run in (one_process, two_processes))
    assert len({row["id"] for row in two}) == len(two) == 5
    assert one == two and len({row["report"] for row in one}) > 1


SAVING = """
import sys
import torch
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.runtime.processes import start_processes

assert start_processes().num_processes == 2
model = OTDRGForReportGeneration.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_save_pretrained_by_all_processes_writes_once(trained_run, launch, tmp_path):
    launch(["-c", SAVING, str(trained_run / "model"), str(tmp_path)], OMP_NUM_THREADS="1")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (trained_run / "model", tmp_path)]
    assert configs[0]["weights_sha256"] == configs[1]["weights_sha256"]
    OTDRGForReportGeneration.from_pretrained(tmp_path)


# --- what was asked for ----------------------------------------------------------------------------------------------


def launch_arguments(*arguments):
    """The arguments of `accelerate launch`, with its configuration file read and checked by itself."""
    parsed = launch_command_parser().parse_args([*arguments, "train_hf.py"])
    return _validate_launch_command(parsed)[0]


def config_arguments(name):
    return launch_arguments("--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0")


@pytest.fixture
def as_launched(monkeypatch):
    """Sets the variables that accelerate would set for its processes."""

    def set_variables(environment):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("name", ["ddp", "cpu"])
def test_accelerate_config_plain_starts_processes(name):
    arguments = config_arguments(name)
    assert arguments.multi_gpu and not (arguments.use_fsdp or arguments.use_deepspeed or arguments.cpu)
    environment = prepare_multi_gpu_env(arguments)
    assert (arguments.nproc_per_node, environment["ACCELERATE_MIXED_PRECISION"]) == ("2", "no")
    assert environment.get("CUDA_VISIBLE_DEVICES", "").startswith("-1") == (name == "cpu")


def test_accelerate_config_fsdp2_shards_weights(as_launched):
    arguments = config_arguments("fsdp2")
    assert arguments.use_fsdp and not arguments.use_deepspeed
    as_launched(prepare_multi_gpu_env(arguments))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


@needs_deepspeed
def test_accelerate_config_zero3_shards_weights(as_launched):
    arguments = config_arguments("zero3")
    arguments.deepspeed_fields_from_accelerate_config = ""
    assert arguments.use_deepspeed and not arguments.use_fsdp
    as_launched(prepare_deepspeed_cmd_env(arguments)[1])
    plugin = DeepSpeedPlugin()
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"
    assert not plugin.zero3_init_flag


def test_start_processes_one_started_of_several_is_refused(as_launched, tiny_recipe, tmp_path, capsys):
    as_launched(prepare_simple_launcher_cmd_env(launch_arguments("--cpu", "--num_processes", "2"))[1])
    assert main([str(tiny_recipe), f"output_dir={tmp_path / 'run'}"]) == 1
    error = capsys.readouterr().err
    assert "asked for several processes and started one" in error and error.count("\n") == 1
    as_launched({})
    as_launched(prepare_simple_launcher_cmd_env(launch_arguments("--cpu", "--num_processes", "1"))[1])
    assert start_processes().num_processes == 1


def test_start_processes_fsdp_without_gpu_is_refused(as_launched):
    as_launched(prepare_multi_gpu_env(config_arguments("fsdp2")))
    with pytest.raises(ValueError, match=r"FSDP was asked for .* there is no GPU"):
        start_processes()
    with pytest.raises(ValueError, match="FSDP2 was asked for, but the model would be trained by one process alone"):
        check_wrapper(torch.nn.Linear(2, 2))


def test_start_processes_unused_deepspeed_is_refused(as_launched, monkeypatch):
    PartialState(cpu=True)
    as_launched({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})
    monkeypatch.setattr("otdrg.runtime.processes.is_deepspeed_available", lambda: True)
    with pytest.raises(ValueError, match=r"DeepSpeed was asked for .* would train without it"):
        start_processes()
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO-3 was asked for, but .* by one process alone"):
        check_wrapper(torch.nn.Linear(2, 2))
    monkeypatch.setattr("otdrg.runtime.processes.is_deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match=r"DeepSpeed was asked for .* is not there: pip install"):
        start_processes()


def test_start_processes_unconnected_processes_are_refused(as_launched, monkeypatch):
    PartialState(cpu=True)
    as_launched({"WORLD_SIZE": "2", "RANK": "0"})
    with pytest.raises(ValueError, match=r"2 processes were launched .* in a world of 1"):
        start_processes()
    as_launched({})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="one process was launched and sees 4 GPUs"):
        start_processes()


def accelerate_launch(config, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--main_process_port", "0", "-m", "otdrg.train_hf", *map(str, arguments)]
    # A configuration of the user's own must not matter.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_accelerate_config_cpu_trains_two_processes(tiny_recipe, tmp_path):
    done = accelerate_launch("cpu", tiny_recipe, f"output_dir={tmp_path}", "stages=[predictor]", "--traceback")
    assert done.returncode == 0, done.stderr
    stage = results(tmp_path)["predictor"]
    assert (stage["processes"], stage["wrapper"]) == (2, "DistributedDataParallel")


# --- weights that are shared out -------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_deepspeed
def test_train_zero3_saves_and_resumes(tiny_recipe, one_process, tmp_path):
    batches = ["predictor.per_device_train_batch_size=2", "report.per_device_train_batch_size=2"]
    run = tmp_path / "run"
    arguments = [tiny_recipe, f"output_dir={run}", *SAME, *batches, "--traceback"]
    done = accelerate_launch("zero3", *arguments)
    assert done.returncode == 0, done.stderr
    for stage in ("predictor", "report"):
        # The wrapper is recorded only if the weights are partitioned.
        assert (results(run)[stage]["processes"], results(run)[stage]["wrapper"]) == (2, "DeepSpeed ZeRO-3")
        assert_same(one_process, run, stage, "loss", ("loss", "report_loss", "ot_loss"))
        assert_same(one_process, run, stage, "eval_loss", ("eval_loss", "eval_report_loss"))
    one, two = (predictions(folder) for folder in (one_process, run))
    assert [(row["id"], row["report"]) for row in one] == [(row["id"], row["report"]) for row in two]

    checkpoint = run / "report" / "checkpoint-2"
    loaded, info = OTDRGForReportGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert loaded.has_lora and not info["missing_keys"] and not info["mismatched_keys"]
    published, info = OTDRGForReportGeneration.from_pretrained(run / "model", output_loading_info=True)
    assert not published.has_lora and not info["missing_keys"] and not info["unexpected_keys"]
    processor = OTDRGProcessor.from_pretrained(run / "model")
    inputs = processor(images=[torch.zeros(1, 112, 112, dtype=torch.uint8).numpy()[0]])
    assert published.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]

    unbroken, weights = lines(run, "report", "loss"), load_file(run / "model" / "model.safetensors")
    (run / "report" / "finished.json").unlink()
    shutil.rmtree(run / "report" / "checkpoint-4")
    done = accelerate_launch("zero3", *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"resuming from {checkpoint}" in done.stderr
    for before, again in zip(unbroken, lines(run, "report", "loss"), strict=True):
        assert again["loss"] == pytest.approx(before["loss"], abs=1e-5)
    again = load_file(run / "model" / "model.safetensors")
    assert all(torch.allclose(weights[name], again[name], atol=1e-6) for name in weights)


SHARDED = """
import sys
import torch
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.processing_otdrg import OTDRGProcessor
from otdrg.studies import load_studies
from otdrg.training.model import cast_backbones, set_trained_parts
from otdrg.training.callbacks import LossCallback
from otdrg.training.collation import ReportCollator
from otdrg.runtime.processes import is_sharded, open_methods
from otdrg.runtime.processes import fill, start_processes, weightless_copy, wrapper_name
from otdrg.inference.generation import generate_reports

folder, kind = sys.argv[1:]
assert start_processes().num_processes == 2
torch.manual_seed(0)
model = OTDRGForReportGeneration.from_pretrained(folder)
processor = OTDRGProcessor.from_pretrained(folder)
model.config.lora = {"r": 2, "target_modules": ["q_proj"]}
model.add_lora()
cast_backbones(model, "float32" if kind == "zero3" else "bfloat16")
set_trained_parts(model, vision="frozen", text="lora", predictor="frozen", joining=True)
studies = load_studies("phantom", train=0, validation=5, test=0, image_size=112, views=["frontal"])["validation"]
settings = (processor, studies, 1, {"num_beams": 2, "max_new_tokens": 10})
before = generate_reports(model, *settings)
weights = {name: weight.clone() for name, weight in model.state_dict().items()}
empty = weightless_copy(model)
if kind == "zero3":
    import deepspeed
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    wrapped = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    assert all(weight.numel() == 0 for weight in model.parameters())
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.language_model.model.layers:
        fully_shard(layer, mesh=mesh)
    wrapped = fully_shard(model, mesh=mesh)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
assert is_sharded(model)
# Five studies on two processes, reports of unequal length: none may wait for the other for ever.
assert generate_reports(model, *settings).reports == before.reports
if kind == "fsdp2":
    model.train()
    open_methods(model, "expand_finding_text")
    batch = model.expand_finding_text(**ReportCollator(processor, True, 10)(list(studies)))
    model(**batch).loss.backward()
    LossCallback().on_pre_optimizer_step(None, None, None, model=model)
whole = fill(empty, model)
assert not is_sharded(whole) and whole.config is model.config
assert all(torch.equal(weight, weights[name]) for name, weight in whole.state_dict().items())
assert generate_reports(whole, *settings).reports == before.reports
print(wrapper_name(wrapped))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param("zero3", "DeepSpeed ZeRO-3", marks=needs_deepspeed), ("fsdp2", "FSDP2")]
)
def test_fill_sharded_model_becomes_whole(trained_run, launch, kind, name):
    """FSDP2 by torch's own `fully_shard`: through accelerate it needs GPUs."""
    variables = {"ACCELERATE_USE_DEEPSPEED": "true"} if kind == "zero3" else {}
    outputs = launch(["-c", SHARDED, str(trained_run / "model"), kind], OMP_NUM_THREADS="1", **variables)
    assert [out.splitlines()[-1] for out in outputs] == [name] * 2
