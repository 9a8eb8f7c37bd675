import logging
from types import SimpleNamespace

import pytest
import torch
from otdrg.training.callbacks import NonFiniteLossError, SinkhornLossCallback


def outputs(**values):
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def test_sinkhorn_callback_lambda_warms_up_linearly():
    callback = SinkhornLossCallback(ot_weight_warmup=0.2)
    assert [callback.ot_weight(progress, 0.1) for progress in (0.0, 0.1, 0.2, 1.0)] == pytest.approx(
        [0, 0.05, 0.1, 0.1]
    )
    assert SinkhornLossCallback().ot_weight(0.0, 0.1) == 0.1


def test_sinkhorn_callback_epsilon_anneals_geometrically():
    callback = SinkhornLossCallback(ot_epsilon_start=1.0, ot_epsilon_annealing=0.5)
    values = [callback.ot_epsilon(progress, 0.01) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert values == pytest.approx([1.0, 0.1, 0.01, 0.01])
    assert SinkhornLossCallback().ot_epsilon(0.0, 0.01) == 0.01


def test_sinkhorn_callback_schedules_change_the_model_only():
    callback = SinkhornLossCallback(ot_weight_warmup=0.5, ot_epsilon_start=1.0)
    model = SimpleNamespace(config=SimpleNamespace(ot_weight=0.1, ot_epsilon=0.01), ot_weight=None, ot_epsilon=None)
    callback.on_step_begin(None, SimpleNamespace(global_step=1, max_steps=4), None, model=model)
    assert (model.ot_weight, model.ot_epsilon) == pytest.approx((0.05, 0.1))
    callback.on_train_end(None, None, None, model=model)
    assert (model.ot_weight, model.ot_epsilon) == (0.1, 0.01)
    assert (model.config.ot_weight, model.config.ot_epsilon) == (0.1, 0.01)


def test_loss_callback_figures_are_means_since_the_last_call():
    callback = SinkhornLossCallback()
    callback.observe(outputs(loss=3, report_loss=1, ot_loss=2))
    callback.observe(outputs(loss=3, report_loss=3))
    assert callback.figures() == {"report_loss": 2.0, "ot_loss": 2.0}
    callback.observe(outputs(loss=1, report_loss=5))
    assert callback.figures() == {"report_loss": 5.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_callback_non_finite_loss_raises(value):
    with pytest.raises(
        NonFiniteLossError, match=r"loss is not finite \(loss (nan|inf), report_loss 1, ot_loss (nan|inf)"
    ):
        SinkhornLossCallback().observe(outputs(loss=value, report_loss=1, ot_loss=value))


def test_loss_callback_non_finite_gradient_raises():
    layer = torch.nn.Linear(2, 2)
    callback = SinkhornLossCallback()
    args = SimpleNamespace(fp16=False)
    callback.on_pre_optimizer_step(args, None, None, model=layer)
    layer.weight.grad = torch.zeros(2, 2)
    callback.on_pre_optimizer_step(args, None, None, model=layer)
    layer.weight.grad[0, 1] = float("nan")
    with pytest.raises(NonFiniteLossError, match="a gradient is not finite"):
        callback.on_pre_optimizer_step(args, None, None, model=layer)
    # The gradient scaler of fp16 skips such a step.
    callback.on_pre_optimizer_step(SimpleNamespace(fp16=True), None, None, model=layer)


def test_sinkhorn_callback_collapse_is_warned_of_once(caplog):
    callback, state = SinkhornLossCallback(), SimpleNamespace(global_step=7)
    with caplog.at_level(logging.WARNING):
        callback.on_log(None, state, None, logs={"label_spread": 0.9, "plan_entropy": 0.9})
        assert not caplog.records
        for _ in range(2):
            callback.on_log(
                None, state, None, logs={"label_spread": 0.001, "plan_entropy": 0.999, "epsilon_to_cost": 0.1}
            )
    assert len(caplog.records) == 2
    assert "step 7: the label features have collapsed" in caplog.records[0].message
    assert "almost uniform" in caplog.records[1].message
