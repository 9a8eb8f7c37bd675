"""The transport against POT, geomloss, finite differences and the paper's own algorithm."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from otdrg import cost_matrix, sinkhorn
from otdrg.sinkhorn_otdrg import CHECK_EVERY, plan_entropy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # POT names the optional libraries it does not find
    import ot
    from geomloss import SamplesLoss

EXACT = {"max_iterations": 20_000, "tolerance": 1e-13}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_cost(batch, rows, columns, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, rows, 5, generator=generator, dtype=dtype)
    y = torch.randn(batch, columns, 5, generator=generator, dtype=dtype)
    return torch.cdist(x, y)


def pot_plan(cost, epsilon):
    rows, columns = cost.shape
    a, b = torch.full((rows,), 1 / rows, dtype=cost.dtype), torch.full((columns,), 1 / columns, dtype=cost.dtype)
    return ot.sinkhorn(a, b, cost, epsilon, method="sinkhorn_log", numItermax=20_000, stopThr=1e-13, warn=False)


# --- against other implementations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1.0, 0.1])
@pytest.mark.parametrize("shape", [(49, 14), (6, 14), (1, 5), (5, 1)])
def test_sinkhorn_plan_equals_pots(shape, epsilon):
    cost = random_cost(2, *shape)
    output = sinkhorn(cost, epsilon, **EXACT)
    for row in range(len(cost)):
        plan = pot_plan(cost[row], epsilon)
        assert torch.allclose(output.plan[row], plan, atol=1e-9)
        assert output.distance[row].item() == pytest.approx((plan * cost[row]).sum().item(), abs=1e-8)


@pytest.mark.parametrize("normalization", ["none", "unit"])
def test_sinkhorn_value_plan_and_gradient_equal_geomloss(normalization):
    epsilon, rows, columns = 0.5, 12, 7
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(columns, 5, generator=generator, dtype=torch.float64)
    if normalization == "unit":
        # geomloss normalises nothing itself
        a, b = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    else:
        a, b = x, y
    a, x = a.clone().requires_grad_(), x.clone().requires_grad_()
    options = {"p": 1, "blur": epsilon, "scaling": 0.998, "debias": False, "backend": "tensorized"}
    theirs = SamplesLoss("sinkhorn", **options)(a, b)
    f, g = SamplesLoss("sinkhorn", potentials=True, **options)(a, b)

    cost = cost_matrix(x[None], y[None], normalization)
    ours = sinkhorn(cost, epsilon, **EXACT)
    # geomloss penalises the divergence from the product of the marginals, which is a constant away from the entropy
    assert ours.regularized.item() + epsilon * math.log(rows * columns) == pytest.approx(theirs.item(), abs=1e-5)
    plan = ((f.reshape(-1, 1) + g.reshape(1, -1) - cost[0]) / epsilon).exp() / (rows * columns)
    assert torch.allclose(ours.plan[0], plan, atol=1e-4)
    (grad,) = torch.autograd.grad(ours.regularized.sum(), x)
    (their_grad,) = torch.autograd.grad(theirs, a)
    if normalization == "unit":
        unit = a.detach()
        tangent = their_grad - (their_grad * unit).sum(dim=1, keepdim=True) * unit
        their_grad = tangent / x.detach().norm(dim=1, keepdim=True)
    assert torch.allclose(grad, their_grad, atol=1e-4)


def verbatim_algorithm_1(x, y, epsilon, t):
    """Algorithm 1 of the paper as it is printed: projected features in, d_OT out."""
    cost = torch.cdist(x, y)
    kernel = torch.exp(-cost / epsilon)
    d_i, d_l = len(x), len(y)
    mu, nu = torch.ones(d_i) / d_i, torch.ones(d_l) / d_l
    alpha, beta = torch.ones(d_i) / d_i, torch.ones(d_l) / d_l
    for _ in range(t):
        alpha = mu / (kernel @ beta)
        beta = nu / (kernel.T @ alpha)
    plan = torch.diag(alpha) @ kernel @ torch.diag(beta)
    entropy = -(plan * plan.log()).sum()
    return (plan * cost).sum() - entropy, plan


def test_sinkhorn_large_cost_stays_finite_where_algorithm_1_gives_nan():
    torch.manual_seed(0)
    project_image, project_label = torch.nn.Linear(768, 4096), torch.nn.Linear(768, 4096)
    with torch.no_grad():
        x, y = project_image(torch.randn(49, 768)), project_label(torch.randn(14, 768))
    cost = cost_matrix(x[None], y[None])
    assert 40 < cost.mean() < 60
    distance, plan = verbatim_algorithm_1(x, y, epsilon=0.1, t=100)
    assert distance.isnan()
    assert plan.isnan().any()

    ours = sinkhorn(cost, epsilon=0.1, max_iterations=5_000)
    exact = pot_plan(cost[0].double(), 0.1)
    assert ours.distance.item() == pytest.approx((exact * cost[0]).sum().item(), rel=1e-4)
    assert torch.allclose(ours.plan[0].double(), exact, atol=1e-4)
    # Where nothing underflows, the printed algorithm and ours are one.
    small = cost / cost.mean()
    assert torch.allclose(
        verbatim_algorithm_1(x / cost.mean(), y / cost.mean(), 0.1, 100)[1],
        sinkhorn(small, 0.1, tolerance=0.0).plan[0],
        atol=1e-6,
    )


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["distance", "regularized"])
def test_sinkhorn_envelope_gradient_is_the_plan(value):
    cost = random_cost(3, 9, 4).requires_grad_()
    output = sinkhorn(cost, 0.1)
    (gradient,) = torch.autograd.grad(getattr(output, value).sum(), cost)
    assert torch.equal(gradient, output.plan)
    assert not output.plan.requires_grad


def test_sinkhorn_envelope_gradient_of_the_objective_is_exact():
    cost = random_cost(1, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sinkhorn(c, 0.3, **EXACT).regularized, cost, atol=1e-6)


@pytest.mark.parametrize("value", ["distance", "regularized", "plan"])
def test_sinkhorn_unrolled_gradient_equals_finite_differences(value):
    cost = random_cost(2, 4, 3).requires_grad_()

    def run(c):
        return getattr(sinkhorn(c, 0.3, max_iterations=30, tolerance=0.0, gradient="unroll"), value)

    assert torch.autograd.gradcheck(run, cost)


def test_sinkhorn_unrolled_gradient_equals_pots():
    cost = random_cost(1, 6, 4).requires_grad_()
    (ours,) = torch.autograd.grad(sinkhorn(cost, 0.2, gradient="unroll", **EXACT).distance.sum(), cost)
    (theirs,) = torch.autograd.grad((pot_plan(cost[0], 0.2) * cost[0]).sum(), cost)
    assert torch.allclose(ours, theirs, atol=1e-7)
    (envelope,) = torch.autograd.grad(sinkhorn(cost, 0.2, **EXACT).distance.sum(), cost)
    assert not torch.allclose(ours, envelope, atol=1e-3)


@pytest.mark.parametrize("value", ["distance", "regularized"])
@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
def test_sinkhorn_masked_or_underflowing_plan_has_finite_gradients(gradient, value):
    cost = (random_cost(3, 5, 4, torch.float32) * torch.tensor([1.0, 1e3, 1.0])[:, None, None]).requires_grad_()
    rows = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    columns = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    output = sinkhorn(cost, 0.1, row_mask=rows, column_mask=columns, gradient=gradient)
    (found,) = torch.autograd.grad(getattr(output, value).sum(), cost)
    assert found.isfinite().all()
    assert (found[~(rows[:, :, None] & columns[:, None, :])] == 0).all()
    assert found[0].abs().sum() > 0


# --- marginals, masks, batches ---------------------------------------------------------------------------------------


def test_sinkhorn_marginals_are_uniform():
    plan = sinkhorn(random_cost(4, 49, 14), 0.1, **EXACT).plan
    assert torch.allclose(plan.sum(dim=2), torch.full((4, 49), 1 / 49, dtype=plan.dtype), atol=1e-12)
    assert torch.allclose(plan.sum(dim=1), torch.full((4, 14), 1 / 14, dtype=plan.dtype), atol=1e-12)
    assert (plan > 0).all()


def test_sinkhorn_permuted_cost_permutes_the_plan():
    cost = random_cost(2, 8, 5)
    rows, columns = torch.randperm(8), torch.randperm(5)
    plan = sinkhorn(cost, 0.1, **EXACT).plan
    permuted = sinkhorn(cost[:, rows][:, :, columns], 0.1, **EXACT)
    assert torch.allclose(permuted.plan, plan[:, rows][:, :, columns], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_masked_problem_equals_the_reduced_one(dtype):
    cost = random_cost(3, 8, 6, dtype)
    cost[0, 0], cost[1, :, 5] = torch.nan, torch.inf  # what is masked may hold anything
    rows, columns = torch.rand(3, 8) < 0.6, torch.rand(3, 6) < 0.6
    rows[:, 1], columns[:, 1] = True, True
    rows[0, 0], columns[1, 5] = False, False
    output = sinkhorn(cost, 0.1, row_mask=rows, column_mask=columns)
    for b in range(3):
        alone = sinkhorn(cost[b, rows[b]][:, columns[b]][None], 0.1)
        atol = 1e-6 if dtype == torch.float32 else 1e-12
        assert torch.allclose(output.plan[b, rows[b]][:, columns[b]], alone.plan[0], atol=atol)
        assert torch.allclose(output.distance[b], alone.distance[0], atol=atol)
        assert torch.allclose(output.regularized[b], alone.regularized[0], atol=atol)
        assert output.iterations[b] == alone.iterations[0]
    assert (output.plan[~(rows[:, :, None] & columns[:, None, :])] == 0).all()


def test_sinkhorn_problem_without_mass_is_zero_and_changes_no_other():
    cost = random_cost(3, 5, 4).requires_grad_()
    rows = torch.ones(3, 5, dtype=torch.bool)
    columns = torch.ones(3, 4, dtype=torch.bool)
    rows[0], columns[1] = False, False
    output = sinkhorn(cost, 0.1, row_mask=rows, column_mask=columns)
    alone = sinkhorn(cost[2:], 0.1)
    for name in ("distance", "regularized", "marginal_error", "iterations"):
        assert getattr(output, name)[:2].tolist() == [0, 0], name
    assert (output.plan[:2] == 0).all()
    assert torch.equal(output.plan[2], alone.plan[0])
    (gradient,) = torch.autograd.grad(output.distance.sum(), cost)
    assert (gradient[:2] == 0).all()
    assert torch.equal(gradient[2], alone.plan[0])


@pytest.mark.parametrize("tolerance", [1e-3, 1e-7, 0.0])
def test_sinkhorn_batch_equals_the_loop(tolerance):
    cost = random_cost(6, 9, 5, torch.float32) * torch.tensor([0.1, 1, 3, 10, 100, 1e-3])[:, None, None]
    batch = sinkhorn(cost, 0.1, tolerance=tolerance)
    for row in range(len(cost)):
        alone = sinkhorn(cost[row : row + 1], 0.1, tolerance=tolerance)
        for name, value in alone._asdict().items():
            assert torch.equal(getattr(batch, name)[row], value[0]), name


def test_sinkhorn_stops_once_marginals_are_met():
    cost = random_cost(2, 9, 5) * torch.tensor([0.01, 1.0])[:, None, None]
    output = sinkhorn(cost, 0.1, tolerance=1e-6)
    assert output.iterations[0] < output.iterations[1] < 100
    assert (output.marginal_error <= 1e-6).all()
    row_error = (output.plan.sum(dim=2) - 1 / 9).abs().sum(dim=1)
    assert torch.allclose(output.marginal_error, row_error, atol=1e-15)
    fewer = sinkhorn(cost[1:], 0.1, tolerance=1e-6, max_iterations=int(output.iterations[1]) - CHECK_EVERY)
    assert fewer.marginal_error > 1e-6
    assert sinkhorn(cost, 0.1, tolerance=0.0, max_iterations=7).iterations.tolist() == [7, 7]


# --- scales and types ------------------------------------------------------------------------------------------------


def test_sinkhorn_small_epsilon_equals_pot_in_both_types():
    x, y = torch.randn(2, 2, 8, 16, dtype=torch.float64)
    cost = cost_matrix(x, y[:, :5], "unit")
    double, single = (sinkhorn(c, 0.01, max_iterations=20_000, tolerance=1e-8) for c in (cost, cost.float()))
    for row in range(2):
        exact = pot_plan(cost[row], 0.01)
        assert torch.allclose(double.plan[row], exact, atol=1e-6)
        assert torch.allclose(single.plan[row].double(), exact, atol=1e-4)
        assert single.distance[row].item() == pytest.approx((exact * cost[row]).sum().item(), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e3, 1e6, 1e20])
def test_sinkhorn_any_scale_of_cost_is_finite(scale):
    cost = (random_cost(2, 12, 5, torch.float32) * scale).requires_grad_()
    output = sinkhorn(cost, 0.1)
    (gradient,) = torch.autograd.grad(output.distance.sum(), cost)
    for name, value in [*output._asdict().items(), ("gradient", gradient)]:
        assert value.isfinite().all(), name
    if scale <= 1e3:  # beyond, costs differ by less than the resolution of float32
        # The columns are the last to be updated, so that their marginals hold whatever has converged.
        assert torch.allclose(output.plan.sum(dim=1), torch.full((2, 5), 0.2), atol=1e-3)


def test_sinkhorn_cost_of_a_thousand_equals_pot():
    cost = random_cost(1, 12, 5) * 300
    assert cost.max() > 1e3
    output = sinkhorn(cost.float(), 30.0, max_iterations=20_000, tolerance=1e-6)
    assert torch.allclose(output.plan[0].double(), pot_plan(cost[0], 30.0), atol=1e-5)
    # An epsilon next to nothing is optimal transport itself.
    uniform = torch.full((12,), 1 / 12, dtype=cost.dtype), torch.full((5,), 1 / 5, dtype=cost.dtype)
    unregularized = ot.emd2(*uniform, cost[0]).item()
    assert sinkhorn(cost, 1.0, 5_000, 1e-4).distance.item() == pytest.approx(unregularized, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sinkhorn_half_precision_is_computed_in_float32(dtype, autocast):
    cost = random_cost(2, 9, 5, torch.float32).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = sinkhorn(cost, 0.1)
    exact = sinkhorn(cost.detach().float(), 0.1)
    for name in ("distance", "regularized", "plan"):
        assert getattr(output, name).dtype == torch.float32, name
        assert torch.equal(getattr(output, name), getattr(exact, name)), name
    (gradient,) = torch.autograd.grad(output.distance.sum(), cost)
    assert gradient.dtype == dtype
    assert torch.allclose(gradient.float(), exact.plan, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cost_matrix_half_precision_features_have_a_float32_cost(dtype):
    x, y = torch.randn(1, 6, 64).to(dtype), torch.randn(1, 3, 64).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = cost_matrix(x, y)
    assert cost.dtype == torch.float32
    assert torch.allclose(cost.double(), torch.cdist(x.double(), y.double()), rtol=1e-6)


@pytest.mark.parametrize("normalization", ["none", "unit"])
def test_cost_matrix_coincident_points_have_no_cost_and_no_gradient(normalization):
    x = torch.randn(1, 4, 8)
    x[0, 1] = x[0, 0]
    y = x[:, :3].clone()
    x.requires_grad_(), y.requires_grad_()
    cost = cost_matrix(x, y, normalization)
    assert torch.allclose(cost[0].diagonal(), torch.zeros(3), atol=1e-6)
    assert cost[0, 0, 1] == cost[0, 1, 0] == 0
    sinkhorn(cost, 0.1).distance.sum().backward()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()

    alike = torch.ones(1, 4, 8, requires_grad=True)
    cost = cost_matrix(alike, torch.ones(1, 3, 8), normalization)
    output = sinkhorn(cost, 0.1)
    output.distance.sum().backward()
    assert output.distance.item() == 0
    assert (alike.grad == 0).all()
    assert torch.allclose(output.plan, torch.full((1, 4, 3), 1 / 12))


def test_cost_matrix_is_the_euclidean_distance_of_every_pair():
    x, y = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    assert torch.allclose(cost_matrix(x, y), (x[:, :, None] - y[:, None]).norm(dim=-1), atol=1e-6)
    x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    assert torch.allclose(cost_matrix(3 * x, 0.2 * y, "unit"), (x[:, :, None] - y[:, None]).norm(dim=-1), atol=1e-6)


def test_sinkhorn_objective_is_distance_minus_entropy():
    cost = random_cost(3, 6, 4)
    output = sinkhorn(cost, 0.2)
    entropy = -(output.plan * output.plan.log()).sum(dim=(1, 2))
    assert torch.allclose(plan_entropy(output.plan), entropy)
    assert torch.allclose(output.distance, (output.plan * cost).sum(dim=(1, 2)))
    assert torch.allclose(output.regularized, output.distance - 0.2 * entropy)
    assert plan_entropy(torch.full((1, 4, 3), 1 / 12)).item() == pytest.approx(math.log(12))
    assert plan_entropy(torch.eye(4)[None] / 4).item() == pytest.approx(math.log(4))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": torch.rand(4, 3)}, r"cost has shape \(4, 3\): expected \(batch, rows, columns\)"),
        ({"epsilon": 0.0}, r"epsilon is 0.0: expected a number above 0"),
        ({"epsilon": -1.0}, r"epsilon is -1.0: expected a number above 0"),
        ({"epsilon": math.nan}, r"epsilon is nan: expected a number above 0"),
        ({"gradient": "exact"}, r"gradient is 'exact': expected 'envelope' or 'unroll'"),
        ({"row_mask": torch.ones(2, 3)}, r"row_mask has shape \(2, 3\): expected \(2, 4\)"),
        ({"column_mask": torch.ones(3)}, r"column_mask has shape \(3,\): expected \(2, 3\)"),
    ],
)
def test_sinkhorn_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(**{"cost": torch.rand(2, 4, 3), **arguments})


# --- properties ------------------------------------------------------------------------------------------------------

COSTS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
    elements=st.floats(0, 2, allow_subnormal=False),
)
EPSILONS = st.floats(0.1, 2)
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@PROPERTY
@given(COSTS, EPSILONS)
def test_sinkhorn_every_plan_has_its_marginals(cost, epsilon):
    output = sinkhorn(torch.from_numpy(cost), epsilon, **EXACT)
    rows, columns = cost.shape[1:]
    assert (output.plan >= 0).all()
    np.testing.assert_allclose(output.plan.sum(dim=2), 1 / rows, atol=1e-9)
    np.testing.assert_allclose(output.plan.sum(dim=1), 1 / columns, atol=1e-9)


@PROPERTY
@given(COSTS, EPSILONS, st.floats(-1e3, 1e3))
def test_sinkhorn_constant_added_to_cost_keeps_the_plan(cost, epsilon, constant):
    before = sinkhorn(torch.from_numpy(cost), epsilon, **EXACT)
    after = sinkhorn(torch.from_numpy(cost) + constant, epsilon, **EXACT)
    np.testing.assert_allclose(after.plan, before.plan, atol=1e-9)
    np.testing.assert_allclose(after.distance, before.distance + constant, atol=1e-8)


@PROPERTY
@given(COSTS, EPSILONS, st.floats(1e-3, 1e3))
def test_sinkhorn_scaled_cost_and_epsilon_keep_the_plan(cost, epsilon, factor):
    before = sinkhorn(torch.from_numpy(cost), epsilon, **EXACT)
    after = sinkhorn(torch.from_numpy(cost) * factor, epsilon * factor, **EXACT)
    np.testing.assert_allclose(after.plan, before.plan, atol=1e-9)
    np.testing.assert_allclose(after.distance, before.distance * factor, rtol=1e-8, atol=1e-9)


@PROPERTY
@given(COSTS, EPSILONS)
def test_sinkhorn_plan_is_no_worse_than_the_product_plan(cost, epsilon):
    """The minimum lies between unregularised transport's bound and the objective of the product of the marginals."""
    output = sinkhorn(torch.from_numpy(cost), epsilon, **EXACT)
    cells = cost.shape[1] * cost.shape[2]
    product = cost.mean(axis=(1, 2)) - epsilon * math.log(cells)
    assert (output.regularized.numpy() <= product + 1e-9).all()
    assert (output.regularized.numpy() >= cost.min(axis=(1, 2)) - epsilon * math.log(cells) - 1e-9).all()
    assert (output.distance.numpy() <= cost.max(axis=(1, 2)) + 1e-9).all()


@PROPERTY
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.just(2), st.integers(1, 5), st.integers(1, 5)),
        elements=st.floats(0, 1e6, width=32, allow_subnormal=False),
    ),
    st.floats(1e-3, 10),
    st.data(),
)
def test_sinkhorn_random_cost_is_finite(cost, epsilon, data):
    masks = [torch.from_numpy(data.draw(hnp.arrays(bool, (2, size)))) for size in (cost.shape[1], cost.shape[2])]
    cost = torch.from_numpy(cost).requires_grad_()
    output = sinkhorn(cost, epsilon, row_mask=masks[0], column_mask=masks[1])
    (gradient,) = torch.autograd.grad(output.regularized.sum(), cost)
    assert all(value.isfinite().all() for value in (*output, gradient))
