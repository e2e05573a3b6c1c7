"""Which ways of EARL cannot be together."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ext.config.rules import check_rules
from megatron_ext.config.schema import RunConfig


def broken(**sections: dict[str, Any]) -> list[str]:
    return [str(problem) for problem in check_rules(RunConfig(**sections))]


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"earl": {"combine": "add"}, "rl": {"advantage": "gdpo", "reward_weights": {"correct": 1.0}}}, "earl.combine: add"),
        ({"earl": {"combine": "gdpo"}, "rl": {"advantage": "dr_grpo"}}, "earl.combine: gdpo"),
        ({"earl": {"mode": "pathwise"}, "model": {"moe_score_function": "sigmoid", "moe_expert_bias": True}}, "model.moe_score_function: sigmoid"),
        ({"earl": {"router_kl": 0.1}, "model": {"moe_score_function": "sigmoid"}}, "model.moe_score_function: sigmoid"),
        ({"earl": {"mode": "router_pg"}, "rl": {"replay_routes": False}}, "rl.replay_routes: false"),
        ({"earl": {"mode": "pathwise"}, "rl": {"router_lr_scale": 0}}, "rl.router_lr_scale: 0"),
        ({"earl": {"mode": "router_pg", "subtask": "tags"}}, "earl.subtask: tags"),
        ({"earl": {"mode": "router_pg"}, "rl": {"max_staleness": 1, "mismatch_correction": "tis"}}, "rl.max_staleness: 1"),
        ({"earl": {"mode": "router_pg"}, "rl": {"environment": "megatron_ext.rl.environments:zoom"}}, "rl.environment"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(sections: dict[str, Any], field: str) -> None:
    assert any(field in problem for problem in broken(**sections)), broken(**sections)


@pytest.mark.parametrize("mode", ["score", "pathwise", "router_pg"])
def test_every_mode_fits_the_defaults_and_none_is_looked_at_without_earl(mode: str) -> None:
    before = broken()
    assert broken(earl={"mode": mode}) == before
    assert broken(earl={"enabled": False, "mode": mode}, rl={"replay_routes": False}) == broken(earl={"enabled": False}, rl={"replay_routes": False})
