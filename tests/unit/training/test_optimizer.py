"""What is trained, how fast, and with how much decay."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.config.schema import OptimizerConfig
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.megatron_engine import MegatronEngine, build_engine
from tests.support.models import IMAGE, open_gates, small_config
from tests.support.training import run_steps, same, start, weights


def rates(state: MegatronEngine, steps: int) -> list[float]:
    """The rate of each update, without making it."""
    found = []
    for _ in range(steps):
        state.scheduler.step(1)
        found.append(state.lr)
    return found


def test_linear_schedule_by_hand(context: ParallelContext) -> None:
    """Two steps of warm-up to 1.0, then eight equal steps down to 0.2: minus 0.1 each."""
    state = start(context, optimizer=OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=2, schedule="linear"))
    assert rates(state, 10) == pytest.approx([0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_cosine_schedule_by_hand(context: ParallelContext) -> None:
    """Half-way between warm-up (2) and the end (10) the cosine is 0: the rate is the mean of lr and min_lr."""
    found = rates(start(context, optimizer=OptimizerConfig(lr=1.0, min_lr=0.2, warmup_steps=2, schedule="cosine")), 10)
    assert found[:2] == pytest.approx([0.5, 1.0])
    assert found[3] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
    assert found[5] == pytest.approx(0.6)
    assert found[9] == pytest.approx(0.2)


def test_constant_schedule_stays_up_after_warm_up(context: ParallelContext) -> None:
    state = start(context, optimizer=OptimizerConfig(lr=1.0, warmup_steps=4, schedule="constant"))
    assert rates(state, 10) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def test_a_run_shorter_than_its_warm_up_only_warms_up(context: ParallelContext) -> None:
    state = start(context, optimizer=OptimizerConfig(lr=1.0, warmup_steps=20, schedule="cosine"))
    assert rates(state, 10) == pytest.approx([step / 20 for step in range(1, 11)])


def test_matrices_decay_and_vectors_do_not_from_the_first_update_on(context: ParallelContext) -> None:
    """With no gradient in it, an update is decay alone: w (1 - lr wd) = w (1 - 0.1 * 0.5)."""
    model = build_model(small_config(), IMAGE, context)
    open_gates(model)  # a gate at 0 would not show that it decays
    state = build_engine([model], OptimizerConfig(lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5), 10, context)
    before = weights(state)
    state.begin()
    state.update(state.gradient_norm())
    after = weights(state)
    for name in before:
        factor = 0.95 if before[name].dim() > 1 else 1.0
        torch.testing.assert_close(after[name], before[name] * factor, msg=name)


def test_routers_learn_slower_by_their_scale(context: ParallelContext) -> None:
    """Adam's first update moves every weight by the rate, whatever the gradient: 1e-3 elsewhere, 1e-4 in routers."""
    adam = OptimizerConfig(lr=1e-3, min_lr=0.0, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_grad=0.0, eps=1e-12)
    state = start(context, optimizer=adam, router_lr_scale=0.1)
    before = weights(state)
    run_steps(state, 0, 1, 8, context)
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in weights(state).items()}
    routers = {name for name in moved if ".router." in name}
    assert len(routers) == 3
    for name in routers:
        assert moved[name] == pytest.approx(1e-4, rel=0.02)
    assert moved["output_layer.weight"] == pytest.approx(1e-3, rel=0.02)


def test_a_scale_of_zero_freezes_routers_and_prefixes_freeze_what_they_name(context: ParallelContext) -> None:
    state = start(context, router_lr_scale=0.0, frozen=("vision.", "projector."))
    before = weights(state)
    run_steps(state, 0, 2, 8, context)
    after = weights(state)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if ".router." in name or name.startswith(("vision.", "projector."))} == still


def test_a_prefix_that_names_nothing_is_refused(context: ParallelContext) -> None:
    with pytest.raises(ValueError, match="'visoin'"):
        start(context, frozen=("visoin",))


def test_two_runs_from_the_same_seed_are_the_same_bit_for_bit(context: ParallelContext) -> None:
    states = [start(context), start(context)]
    metrics = [run_steps(state, 0, 3, 4, context) for state in states]
    assert metrics[0] == metrics[1]
    assert same(weights(states[0]), weights(states[1]))
