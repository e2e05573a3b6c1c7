"""The mathematics of mixed preference optimisation: by hand, by finite differences of plain formulas, and against TRL's DPOTrainer; to 1e-6."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DPOTrainer

from megatron_ext.training.losses import masked_nll
from megatron_ext.training.preference import RunningMean, bco_pair, dpo
from tests.support.trl_trainers import alone

BETA, WEIGHTS, PAIRS, LENGTH = 0.1, (0.8, 0.2, 1.0), 3, 6
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def test_worked_by_hand():
    """Rewards 2 and -1: sigmoid(3) = 0.952574; against a mean of 0.5, sigmoid(1.5) = 0.817574 for both."""
    chosen, rejected = torch.tensor([2.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    assert dpo(chosen, rejected).item() == pytest.approx(-math.log(0.952574), abs=1e-6)
    assert bco_pair(chosen, rejected, 0.5).item() == pytest.approx(-2 * math.log(0.817574), abs=1e-5)
    nothing = torch.zeros(1, dtype=torch.float64)
    assert dpo(nothing, nothing).item() == pytest.approx(math.log(2)) and bco_pair(nothing, nothing, 0.0).item() == pytest.approx(2 * math.log(2))


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-2, 2))
def test_gradients_are_those_of_the_formulas(chosen, rejected, delta):
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    for loss, plain in (
        (lambda c, r: dpo(c, r), lambda c, r: -math.log(sigmoid(c - r))),
        (lambda c, r: bco_pair(c, r, delta), lambda c, r: -math.log(sigmoid(c - delta)) - math.log(sigmoid(-(r - delta)))),
    ):
        both = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
        value = loss(*both)
        value.backward()
        assert value.item() == pytest.approx(plain(chosen, rejected), abs=1e-6)
        slopes = [(plain(chosen + h, rejected) - plain(chosen - h, rejected)) / (2 * h) for h in (1e-5,)]
        slopes += [(plain(chosen, rejected + h) - plain(chosen, rejected - h)) / (2 * h) for h in (1e-5,)]
        assert [x.grad.item() for x in both] == pytest.approx(slopes, abs=1e-6)


def test_only_the_quality_loss_minds_when_both_rewards_fall():
    before, after = torch.tensor([1.0]), torch.tensor([-3.0])
    assert dpo(before, before - 1) == dpo(after, after - 1)
    assert bco_pair(after, after - 1, 0.0) > bco_pair(before, before - 1, 0.0)


@given(st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=5), min_size=1, max_size=8))
def test_a_running_mean_is_the_mean_of_everything(parts):
    running = RunningMean()
    for part in parts:
        running = running.joined(sum(part) / len(part), len(part))
    everything = [value for part in parts for value in part]
    assert running.count == len(everything) and running.mean == pytest.approx(sum(everything) / len(everything), abs=1e-9)


def case(seed):
    """Log-probs of tokens [2 P, S], right answers first, and the mask of their answers; log-probs of the answers under the reference [2 P]."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(2 * PAIRS, LENGTH, dtype=torch.long)
    for row in range(2 * PAIRS):
        start = int(torch.randint(0, LENGTH - 1, (), generator=generator))
        mask[row, start : int(torch.randint(start + 1, LENGTH + 1, (), generator=generator))] = 1
    logprobs = -torch.rand(2 * PAIRS, LENGTH, generator=generator, dtype=torch.float64)
    return logprobs, mask, (logprobs * mask).sum(1) + torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64)


def theirs(logprobs, mask, reference):
    nothing = torch.zeros_like(logprobs)
    outputs = SimpleNamespace(log_probs=logprobs * mask, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=alone(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid", "bco_pair", "sft"],
        loss_weights=list(WEIGHTS),
        beta=BETA,
        use_weighting=False,
        label_smoothing=0.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    whole = torch.nn.functional.pad(mask, (1, 0))
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "completion_mask": whole}
    inputs |= {"ref_chosen_logps": reference[:PAIRS], "ref_rejected_logps": reference[PAIRS:]}
    loss = DPOTrainer._compute_loss(stand_in, lambda **_: outputs, inputs, False)
    return loss, {name: values[0] for name, values in stand_in._metrics["train"].items() if name.startswith("rewards/")}


@pytest.mark.parametrize("seed", range(3))
def test_loss_gradient_and_rewards_are_those_of_trl(seed):
    """TRL's quality loss compares with 0."""
    logprobs, mask, reference = case(seed)
    live, plain = (logprobs.clone().requires_grad_() for _ in range(2))
    expected, metrics = theirs(plain, mask, reference)
    expected.backward()
    chosen, rejected = (BETA * ((live * mask).sum(1) - reference)).split(PAIRS)
    nll, tokens = masked_nll(live[:PAIRS], mask[:PAIRS])
    loss = (WEIGHTS[0] * dpo(chosen, rejected) + WEIGHTS[1] * bco_pair(chosen, rejected, 0.0)).mean() + WEIGHTS[2] * nll / tokens
    loss.backward()
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(live.grad, plain.grad, **TOLERANCE)
    mine = {"chosen": chosen.mean(), "rejected": rejected.mean(), "margins": (chosen - rejected).mean(), "accuracies": (chosen > rejected).double().mean()}
    assert {name: value.item() for name, value in mine.items()} == pytest.approx({name.split("/")[1]: value for name, value in metrics.items()}, abs=1e-6)
