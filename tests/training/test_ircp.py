"""Contrastive pre-training: the loss of eq. 2, its gathering across processes, and the stage as part of a run."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.train_hf import main
from otdrg.training.collation import ContrastiveCollator
from otdrg.training.ircp import ContrastivePretraining, IRCPArguments, info_nce
from otdrg.training.recipe import load_recipe
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
IRCP = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": None,
    "report_weight": 0.5,
    "projection_size": 8,
}
# With the running averages of batch normalisation, which are no parameters.
RESNET = {"architecture": "resnet10t", "model_args": {"channels": [4, 8, 8, 16], "stem_width": 4}}


# --- the loss --------------------------------------------------------------------------------------------------------


def loop_loss(anchors, positives, groups, keys, key_groups, temperature, similarity):
    """Eq. 2 as it is written, in float64."""

    def compare(one, other):
        if similarity == "cosine":
            return one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
        return -np.linalg.norm(one - other)

    losses = []
    for anchor, positive, group in zip(anchors, positives, groups, strict=True):
        true = math.exp(compare(anchor, positive) / temperature)
        false = 0.0
        for key, key_group in zip(keys, key_groups, strict=True):
            if key_group != group:
                false += math.exp(compare(anchor, key) / temperature)
        losses.append(-math.log(true / (true + false)))
    return losses


@settings(deadline=None, max_examples=60)
@given(
    anchors=st.integers(1, 7),
    keys=st.integers(1, 9),
    size=st.integers(1, 6),
    studies=st.integers(1, 5),
    similarity=st.sampled_from(["cosine", "euclidean"]),
    temperature=st.floats(0.1, 2),
    seed=st.integers(0, 2**16),
)
def test_info_nce_equals_equation_2(anchors, keys, size, studies, similarity, temperature, seed):
    rng = np.random.default_rng(seed)
    a, p, k = (rng.normal(size=(count, size)).astype(np.float32) for count in (anchors, anchors, keys))
    groups, key_groups = rng.integers(0, studies, anchors), rng.integers(0, studies, keys)
    tensors = [torch.from_numpy(values) for values in (a, p, groups, k, key_groups)]
    expected = loop_loss(*(values.astype(np.float64) for values in (a, p)), groups, k, key_groups, 0.5, similarity)
    assert info_nce(*tensors, 0.5, similarity).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    expected = loop_loss(a, p, groups, k, key_groups, temperature, similarity)
    assert info_nce(*tensors, temperature, similarity).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_info_nce_views_of_one_study_are_no_negatives():
    anchors = torch.randn(4, 5).requires_grad_()
    groups = torch.tensor([7, 7, 7, 9])
    losses = info_nce(anchors, anchors.detach(), groups, anchors.detach(), groups, 0.5, "cosine")
    alone = info_nce(anchors[:1], anchors[:1].detach(), groups[:1], anchors[3:].detach(), groups[3:], 0.5, "cosine")
    assert losses[0].item() == pytest.approx(alone[0].item())
    one_study = info_nce(anchors, anchors, torch.zeros(4), anchors, torch.zeros(4), 0.5, "cosine")
    assert one_study.tolist() == [0] * 4
    one_study.sum().backward()
    assert torch.equal(anchors.grad, torch.zeros(4, 5))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_info_nce_equal_positives_have_a_gradient(similarity):
    anchors = torch.randn(3, 4).requires_grad_()
    info_nce(anchors, anchors, torch.arange(3), anchors, torch.arange(3), 0.5, similarity).sum().backward()
    assert anchors.grad.isfinite().all() and anchors.grad.abs().sum() > 0


# --- a batch ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretraining(build_model):
    def build(**fields):
        model, processor = build_model()
        return ContrastivePretraining(model, IRCPArguments(**fields)), processor

    return build


@pytest.fixture
def rows(views):
    """Three studies of two, one and two views; the first and the last have the same report."""
    return [
        {"id": "a", "images": views[:2], "report": "The lungs are clear."},
        {"id": "b", "images": views[2:3], "report": "Small effusion on the left."},
        {"id": "c", "images": views[3:5], "report": "The  lungs are clear."},
    ]


@pytest.mark.parametrize("noise", ["normalized", "raw"])
def test_pretraining_without_noise_positives_equal_anchors(pretraining, rows, noise):
    module, processor = pretraining(sigma=0.0, noise=noise)
    batch = ContrastiveCollator(processor)(rows)
    outputs = module(**batch)
    assert outputs["alignment"] == 0
    features = module.encode(batch["pixel_values"], batch["view_mask"])
    assert features.shape == (5, 32)
    projected = torch.nn.functional.normalize(module.project(features)[0], dim=-1).detach().double()
    study, cosine = [0, 0, 1, 2, 2], projected @ projected.T
    # -log(e^2 / (e^2 + sum of e^(2 cos))) at temperature 0.5.
    expected = np.mean(
        [
            -2 + math.log(math.exp(2) + sum(math.exp(2 * cosine[i, k]) for k in range(5) if study[i] != study[k]))
            for i in range(5)
        ]
    )
    assert outputs["loss"].item() == outputs["contrastive_loss"].item() == pytest.approx(expected, rel=1e-5)
    squared = [2 - 2 * cosine[i, k] for i in range(5) for k in range(5) if study[i] != study[k]]
    assert outputs["uniformity"].item() == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(squared)))), rel=1e-4)


def test_pretraining_noise_is_added_to_encoder_features(pretraining):
    features = torch.randn(4000, 32) * 50
    for noise, similar in (("normalized", 1 / math.sqrt(1 + 0.1**2 * 32)), ("raw", 1.0)):
        module, _ = pretraining(sigma=0.1, noise=noise)
        module.image_head = torch.nn.Identity()
        for training in (True, False):
            anchors, positives = module.train(training).project(features)
            assert torch.cosine_similarity(anchors, positives).mean().item() == pytest.approx(similar, abs=0.01)
            assert torch.equal(positives, module.project(features)[1]) is not training


def test_pretraining_embedding_scale_does_not_matter(pretraining, rows):
    module, processor = pretraining(sigma=0.0, report_weight=1.0)
    batch = ContrastiveCollator(processor, max_report_tokens=20)(rows)
    with torch.no_grad():
        loss = module(**batch)["report_contrastive_loss"]
        module.model.get_input_embeddings().weight.mul_(0.1)
        assert module(**batch)["report_contrastive_loss"].item() == pytest.approx(loss.item(), rel=1e-3)


def test_pretraining_equal_reports_are_no_negatives(pretraining, rows):
    module, processor = pretraining(sigma=0.0, report_weight=0.5)
    batch = ContrastiveCollator(processor, max_report_tokens=3)(rows)
    assert batch["report_mask"].sum(dim=1).tolist() == [3, 3, 3]
    assert batch["report_keys"][0] == batch["report_keys"][2] != batch["report_keys"][1]
    assert len(set(batch["study_keys"].tolist())) == 3
    outputs = module(**batch)
    total = outputs["contrastive_loss"] + 0.5 * outputs["report_contrastive_loss"]
    assert outputs["loss"].item() == pytest.approx(total.item())
    # All of one wording, no negative is left.
    same = module(**{**batch, "report_keys": torch.zeros(3, dtype=torch.long)})
    assert same["report_contrastive_loss"] == 0 and same["contrastive_loss"] > 0
    outputs["loss"].backward()
    assert all(
        weight.grad is not None for weight in (*module.image_head.parameters(), *module.report_head.parameters())
    )


GATHER = """
import torch, torch.distributed as dist
from otdrg.training.ircp import global_mean, gather, gather_groups, info_nce
torch.manual_seed(0)
weight, inputs = torch.randn(5, 3), torch.randn(7, 5)
groups, wording = torch.tensor([0, 0, 1, 2, 3, 3, 2]), torch.tensor([5, 5, 6, 7, 5, 5, 7])
def loss(rows):
    own = weight.clone().requires_grad_()
    features = inputs[rows] @ own
    keys, key_groups = gather(features, groups[rows])
    one = info_nce(features, features + 0.1, groups[rows], keys, key_groups, 0.5, "cosine")
    two = info_nce(features, features + 0.2, wording[rows], keys, gather_groups(wording[rows]), 0.5, "euclidean")
    value = global_mean(one + two, len(keys))
    value.backward()
    return value.detach(), own.grad
expected = loss(slice(0, 7))
dist.init_process_group("gloo")
assert dist.get_world_size() == 2
# A study may be met on both processes, where samplers fill up: 2 here; and the processes differ in their views.
value, gradient = loss(slice(0, 4) if dist.get_rank() == 0 else slice(4, 7))
for joined, part in zip(expected, (value, gradient)):
    dist.all_reduce(part)
    torch.testing.assert_close(part / 2, joined)
print("equal", dist.get_rank())
dist.destroy_process_group()
"""


def test_pretraining_two_processes_equal_the_joined_batch(launch):
    assert launch(["-c", GATHER]) == ["equal 0\n", "equal 1\n"]


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def write_recipe(tiny_recipe):
    def write(folder, vision_config=None, **ircp):
        recipe = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
        recipe |= {
            "output_dir": str(folder / "run"),
            "stages": ["ircp", "predictor", "report"],
            "ircp": {**IRCP, **ircp},
        }
        recipe["studies"]["options"]["views"] = ["frontal", "lateral"]
        if vision_config is not None:
            recipe["model"]["overrides"] |= {"vision_config": vision_config, "image_size": 112}
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def whole_run(write_recipe, tmp_path_factory):
    path = write_recipe(tmp_path_factory.mktemp("whole"))
    assert main([str(path)]) == 0
    return path


def results(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def training_lines(run):
    return {line["step"]: line for line in results(run)["ircp"]["log_history"] if "loss" in line}


def test_run_recipe_three_stages_write_their_folders(whole_run):
    run = whole_run.parent / "run"
    assert {path.name for path in run.iterdir()} >= {"ircp", "predictor", "report", "model", "results.json"}
    for stage in ("ircp", "predictor", "report"):
        assert (run / stage / "finished.json").is_file()
    assert {name: results(run)[name]["steps"] for name in ("ircp", "predictor", "report")} == {
        "ircp": 4,
        "predictor": 2,
        "report": 4,
    }
    for line in training_lines(run).values():
        assert line.keys() >= {"contrastive_loss", "report_contrastive_loss", "alignment", "uniformity"}
        assert line["loss"] == pytest.approx(line["contrastive_loss"] + 0.5 * line["report_contrastive_loss"], abs=2e-4)
    weights = [path for path in run.rglob("*.safetensors") if path.parts[-2] != "features"]
    assert {path.stat().st_mode & 0o777 for path in weights} == {(run / "results.json").stat().st_mode & 0o777}
    (evaluation,) = [line for line in results(run)["ircp"]["log_history"] if "eval_loss" in line]
    assert evaluation["eval_contrastive_loss"] > 0 and evaluation["eval_uniformity"] < 0


def test_ircp_stage_measures_before_and_after(whole_run):
    stage = results(whole_run.parent / "run")["ircp"]
    for figures in (stage["before"], stage["after"]):
        assert (figures["studies"], figures["views"]) == (5, 10)
        assert figures["alignment"] > 0 and figures["uniformity"] < 0 and figures["encoder_uniformity"] < 0
        probe = figures["probe"]
        assert (probe["train_studies"], probe["validation_studies"], len(probe["findings"])) == (16, 5, 14)
        assert 0 <= probe["macro_auc"] <= 1 and probe["auc_findings"] > 0
    assert stage["before"] != stage["after"]


def test_ircp_stage_trains_the_encoder_only(whole_run):
    run = whole_run.parent / "run"
    after, handed_on = (load_file(run / stage / "model.safetensors") for stage in ("ircp", "predictor"))
    names = set(after)
    for name, weight in handed_on.items():
        assert torch.equal(weight, after[name]) == (not name.startswith("finding_predictor.")), name
    OTDRGForReportGeneration.from_pretrained(run / "ircp")
    assert not any("head" in name and "lm_head" not in name for name in names)
    checkpoint = load_file(run / "ircp" / "checkpoint-4" / "model.safetensors")
    for name, weight in checkpoint.items():
        assert name.startswith(("image_head.", "report_head.")) or torch.equal(weight, after[name[len("model.") :]])
    before = load_file(run / "ircp" / "checkpoint-2" / "model.safetensors")
    changed = {name.split(".")[0] for name in checkpoint if not torch.equal(checkpoint[name], before[name])}
    assert changed == {"model", "image_head", "report_head"}


@pytest.mark.parametrize("vision", ["dinov2", "resnet"])
def test_ircp_stage_resumed_equals_unbroken(write_recipe, tmp_path, vision, tiny_dinov2, caplog):
    path = write_recipe(tmp_path, {"dinov2": tiny_dinov2, "resnet": RESNET}[vision])
    run = tmp_path / "run"
    assert main([str(path), "stages=[ircp]"]) == 0
    unbroken, weights = training_lines(run), load_file(run / "ircp" / "model.safetensors")
    before = results(run)["ircp"]["before"]
    # Killed while writing checkpoint-4: Trainer writes its state last.
    (run / "ircp" / "finished.json").unlink()
    (run / "ircp" / "checkpoint-4" / "trainer_state.json").unlink()
    (run / "results.json").unlink()
    cut = run / "ircp" / "checkpoint-4" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    assert main([str(path), "stages=[ircp]", "--resume"]) == 0
    assert "missing keys" not in caplog.text
    assert f"resuming from {run / 'ircp' / 'checkpoint-2'}" in caplog.text
    resumed = training_lines(run)
    for step in (3, 4):
        assert resumed[step]["loss"] == pytest.approx(unbroken[step]["loss"], abs=1e-5)
    again = load_file(run / "ircp" / "model.safetensors")
    assert all(torch.allclose(weights[name], again[name], atol=1e-6) for name in weights)
    assert results(run)["ircp"]["before"] == before


def test_ircp_stage_checkpoint_of_another_recipe_is_refused(write_recipe, whole_run, tmp_path, capsys):
    shutil.copytree(whole_run.parent / "run" / "ircp", tmp_path / "run" / "ircp")
    (tmp_path / "run" / "ircp" / "finished.json").unlink()
    path = write_recipe(tmp_path, report_weight=0.0)
    assert main([str(path), "stages=[ircp]", "--resume"]) == 1
    assert "begun with another recipe: ircp.report_weight=0.5 then, 0.0 now" in capsys.readouterr().err
    # Without a record of the recipe, the weights decide.
    (tmp_path / "run" / "ircp" / "started.json").unlink()
    assert main([str(path), "stages=[ircp]", "--resume"]) == 1
    assert "does not fit the recipe, 4 weights such as report_head.0.bias" in capsys.readouterr().err


def test_ircp_stage_gradient_checkpointing_gives_the_same_losses(whole_run, tmp_path):
    arguments = [str(whole_run), "stages=[ircp]", f"output_dir={tmp_path / 'run'}", "ircp.probe_studies=0"]
    assert main([*arguments, "ircp.gradient_checkpointing=true"]) == 0
    plain, checkpointed = (training_lines(run) for run in (whole_run.parent / "run", tmp_path / "run"))
    for step, line in plain.items():
        assert checkpointed[step]["loss"] == pytest.approx(line["loss"], abs=1e-4)


@pytest.mark.slow
def test_ircp_stage_two_processes_equal_one(write_recipe, tmp_path, launch):
    path = write_recipe(tmp_path, sigma=0.0, probe_studies=0, eval_strategy="no", max_steps=3)
    vision = "model.overrides.vision_config.model_args.drop_path_rate=0.0"
    assert main([str(path), "stages=[ircp]", vision]) == 0
    other = tmp_path / "two"
    arguments = [
        "-m",
        "otdrg.train_hf",
        str(path),
        "stages=[ircp]",
        vision,
        "ircp.per_device_train_batch_size=2",
        f"output_dir={other}",
    ]
    launch(arguments, OMP_NUM_THREADS="1")
    one, two = training_lines(tmp_path / "run"), training_lines(other)
    for step in (1, 2, 3):
        for name in ("loss", "contrastive_loss", "report_contrastive_loss"):
            assert two[step][name] == pytest.approx(one[step][name], abs=2e-4), (step, name)


def test_ircp_stage_non_finite_loss_stops(write_recipe, tmp_path, capsys):
    path = write_recipe(tmp_path, sigma=1e30, noise="raw", similarity="euclidean")
    assert main([str(path), "stages=[ircp]", "ircp.probe_studies=0"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train_hf.py: error: step 1 of ") and "the loss is not finite" in error
    assert "contrastive_loss" in error and "no checkpoint was written before it" in error


def test_report_stage_predictor_without_the_new_encoder_is_refused(write_recipe, whole_run, tmp_path, capsys):
    path = write_recipe(tmp_path)
    assert main([str(path), "stages=[ircp,report]"]) == 1
    assert "stage report needs a trained predictor" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([str(whole_run), "stages=[ircp,report]"]) == 1
    assert "was trained without the encoder that stage ircp trains" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ircp.noise=gaussian", "ircp.noise='gaussian': expected one of normalized, raw"),
        ("ircp.similarity=dot", "ircp.similarity='dot': expected one of cosine, euclidean"),
        ("ircp.sigma=-0.1", "ircp.sigma=-0.1: expected a number of at least 0"),
        ("ircp.temperature=0", "ircp.temperature=0: expected a number above 0"),
        ("ircp.vision=frozen", "ircp.vision='frozen': expected full"),
        ("ircp.cache_features=true", "ircp.cache_features=True: expected false"),
        ("ircp.per_device_train_batch_size=1", "ircp.per_device_train_batch_size=1: expected at least 2"),
        ("ircp.report_weight=-1", "ircp.report_weight=-1: expected a number of at least 0"),
        ("ircp.projection_size=0", "ircp.projection_size=0: expected a number of at least 1"),
    ],
)
def test_ircp_arguments_wrong_field_is_one_line(tiny_recipe, override, message, capsys):
    with pytest.raises(ValueError, match="ircp"):
        load_recipe(tiny_recipe, [override])
    assert main([str(tiny_recipe), override]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
