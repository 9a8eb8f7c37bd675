import numpy as np
import pytest
import torch
from otdrg.evaluation.probe import ViewFeatures, alignment, linear_probe, uniformity
from otdrg.findings_otdrg import POSITIVE


def made_studies(rng, count, size=6):
    """One to three views a study; the first two findings show in the features, the third is never positive."""
    states = rng.integers(0, 4, (count, 14))
    states[:, 2] = 0
    study = np.repeat(np.arange(count), rng.integers(1, 4, count))
    views = rng.normal(size=(len(study), size))
    views[:, :2] += 2 * (states[study, :2] == POSITIVE)
    return ViewFeatures(torch.from_numpy(views * np.geomspace(0.1, 30, size)).float(), torch.from_numpy(study), states)


def test_linear_probe_finds_only_what_features_show():
    rng = np.random.default_rng(1)
    train, validation = made_studies(rng, 300), made_studies(rng, 200)
    assert torch.allclose(train.by_study()[7], train.views[train.study == 7].mean(dim=0))
    probe = linear_probe(train, validation)
    areas = [row["auc"] for row in probe["findings"].values()]
    assert min(areas[:2]) > 0.8 and areas[2] is None
    assert np.mean(areas[3:]) == pytest.approx(0.5, abs=0.06)
    assert probe["auc_findings"] == 13 and probe["macro_auc"] == pytest.approx(np.mean([*areas[:2], *areas[3:]]))


def test_alignment_and_uniformity_equal_their_definitions():
    torch.manual_seed(0)
    one, other = torch.randn(6, 4) * 5, torch.randn(6, 4)
    unit, others = (part / part.norm(dim=1, keepdim=True) for part in (one, other))
    assert alignment(one, other).item() == pytest.approx((unit - others).norm(dim=1).square().mean().item(), rel=1e-5)
    squared = torch.pdist(unit).square()
    different = torch.arange(6)
    # Each pair is met twice, which does not change its mean.
    expected = squared.mul(-2).exp().mean().log().item()
    assert uniformity(one, different, one, different).item() == pytest.approx(expected, rel=1e-5)
    assert uniformity(one, different * 0, one, different * 0) is None
    assert uniformity(one[:2], torch.tensor([0, 1]), one[:1].repeat(2, 1), torch.tensor([2, 2])).item() <= 0
