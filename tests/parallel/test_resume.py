"""A run that was stopped goes on as if it had not been: bit for bit in the layout that it had, within rounding in any other.

What a step trains on depends on its number alone (tests/unit/data/test_stream.py), so the step is all of the data's position.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.local import run_ranks
from tests.support.layouts import Case
from tests.support.resume import go_on, stop_and_resume


def layout(ranks: int, **parallel: Any) -> ParallelConfig:
    return ParallelConfig(num_ranks=ranks, **parallel)


ONE, PP2, VPP2 = layout(1), layout(2, pp=2), layout(2, pp=2, vpp=2)
TP2_EP2, CP2 = layout(2, tp=2, ep=2), layout(2, cp=2)
TIED = {"tie_embeddings": True}
CASES = {
    "TP2 EP2": Case(TP2_EP2),
    "PP2, tied embeddings": Case(PP2, changes=TIED),
    "PP2 VPP2, frozen ViT, packed": Case(VPP2, train_vision=False, packed=True),
    "CP2": Case(CP2),
    "EP2, packed": Case(layout(2, ep=2), packed=True),
    "DP2, gradients reduced and weights gathered on the way": Case(layout(2, overlap_grad_reduce=True, overlap_param_gather=True)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_in_the_same_layout_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(case: Case, tmp_path: Path) -> None:
    for rank in run_ranks(stop_and_resume, case.parallel.num_ranks, case, tmp_path / "checkpoints", timeout_s=100):
        assert rank["resumed"] == rank["expected"] and len(rank["expected"]) == 1
        straight, resumed = rank["weights"]
        assert straight == resumed


CHAINS = {
    "through every layout": (Case(ONE), [ONE, PP2, TP2_EP2, VPP2, CP2, ONE]),
    "frozen ViT, tied embeddings, packed": (Case(ONE, packed=True, train_vision=False, changes=TIED), [PP2, VPP2, TP2_EP2]),
}


@pytest.mark.parametrize(
    ("case", "chain"), [pytest.param(*chain, id=name, marks=[pytest.mark.journey] * name.startswith("through")) for name, chain in CHAINS.items()]
)
def test_a_run_that_changes_its_layout_at_every_step_has_the_losses_of_one_rank(case: Case, chain: list[ParallelConfig], tmp_path: Path) -> None:
    """Every hop loads what another layout saved: weights, moments, schedule. A moment that is off shows in the loss of the hop after."""
    expected = run_ranks(go_on, 1, case, tmp_path / "straight", len(chain), timeout_s=100)[0]
    for last, parallel in enumerate(chain, start=1):
        for curve in run_ranks(go_on, parallel.num_ranks, replace(case, parallel=parallel), tmp_path / "chain", last, timeout_s=100):
            (ours,), theirs = curve, expected[last - 1]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["lr"] == theirs["lr"]
            assert ours["num_tokens"] == theirs["num_tokens"]
