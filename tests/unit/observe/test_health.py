"""Health in words: what an operator reads, and what worries them."""

from __future__ import annotations

import io
from collections import deque

from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from megatron_ext.observe.fleet_watch import FleetWatch, RoleState
from megatron_ext.observe.health import Health, phases_of, sparkline
from megatron_ext.observe.panel import panel, stage_health
from tests.support.health import RL, SFT

LOSS, REWARD = ("loss", "loss"), ("reward/mean", "reward")
SLOW = {"perf/slowest_rank": 5.0, "perf/slowest_over_mean": 1.31}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(health: Health, fleet: FleetWatch | None = None) -> str:
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(panel(health, fleet))
    return console.export_text()


def test_a_healthy_supervised_stage_in_six_rows() -> None:
    health = Health(LOSS)
    for step, loss in ((10, 2.0), (20, 1.0), (30, 0.31)):
        assert health.update(step, {**SFT, "loss": loss}) == []
    assert dict(health.rows()) == {
        "loss": "0.31  █▄▁",
        "speed": "5.2k tokens/s, 650 a rank; MFU 34.3%; 1.24 s a step",
        "seconds": "data 0.02  forward_backward 1.1  optimizer 0.12",
        "memory": "61.50 GiB at most, on rank 3, 78% of its GPU",
        "ranks": "slowest: rank 5, 1.04 times the mean",
        "experts": "fullest expert 2.30 times the mean; busiest EP rank 1.08 times",
    }


def test_an_rl_step_shows_its_phases_failures_by_reason_and_the_policy() -> None:
    health = Health(REWARD)
    health.update(1, {**RL, "rollout/failed/reward_timeout": 2.0})
    health.update(2, {**RL, "rollout/failed/reward_timeout": 1.0, "rollout/failed/prompt_too_long": 1.0})
    rows = dict(health.rows())
    assert rows["seconds"] == "generate 3  reward 0.1  update 1.9", "what the learner times is a part of its update"
    assert rows["rollouts"] == "12.4 tokens an answer; failed so far: reward_timeout 3, prompt_too_long 1"
    assert rows["policy"] == "mismatch 1e-06  KL of the update 0.0001"
    assert rows["ranks"].startswith("slowest: learner rank 0") and "MFU 5.0% of the learner as it learns" in rows["speed"]
    assert rows["memory"] == "2.00 GiB at most, on learner rank 1"


def test_warnings_come_once_and_stay_with_the_steps_at_which_they_were_seen() -> None:
    health = Health(LOSS)
    assert health.update(10, {**SFT, **SLOW}) == ["rank 5 needs 1.31 times as long as the mean rank, and all wait for it"]
    assert health.update(20, {**SFT, **SLOW, "perf/peak_memory_share": 0.97}) == ["rank 3 has filled 97% of its GPU's memory"]
    health.update(30, SFT)
    assert [str(warned) for warned in health.warnings.values()] == [
        "rank 5 needs 1.31 times as long as the mean rank, and all wait for it (2 reports, steps 10 to 20)",
        "rank 3 has filled 97% of its GPU's memory (step 20)",
    ]


def test_samples_that_were_left_out_are_a_warning_with_their_latest_number() -> None:
    health = Health(LOSS)
    assert health.update(10, {**SFT, "loss": 1.0, "data/bad_samples": 0.0}) == []
    assert health.update(20, {**SFT, "loss": 1.0, "data/bad_samples": 2.0}) == ["conversations that could not be read were left out: 2 so far, named above"]
    assert health.update(30, {**SFT, "loss": 1.0, "data/bad_samples": 3.0}) == []
    assert str(health.warnings["bad samples"]) == "conversations that could not be read were left out: 3 so far, named above (2 reports, steps 20 to 30)"


def test_a_line_says_what_matters() -> None:
    health = Health(LOSS)
    assert health.line() == ""
    health.update(1, SFT)
    assert health.line() == "loss 0.31  tokens/s 5.2k  mfu 34%"
    health.update(2, {**SFT, **SLOW})
    assert health.line() == "loss 0.31  tokens/s 5.2k  mfu 34%  slowest rank 5 (1.31x)"
    health = Health(REWARD)
    health.update(1, RL)
    assert health.line() == "reward 0.4  tokens/s 900", "on CPUs the MFU says little"


def test_the_panel_holds_rows_warnings_and_the_fleet() -> None:
    fleet = FleetWatch()
    fleet.began("learner rank 0", "update")
    fleet.ended("learner rank 0")
    for replica in (0, 1):
        fleet.began(f"rollout replica {replica} rank 0", "load_weights")
    health = Health(REWARD)
    assert "learner ranks: 1 of 1 alive, 0 working; rollout ranks: 2 of 2 alive, 2 working" in drawn(health, fleet)
    health.update(1, {**RL, **SLOW})
    text = drawn(health, fleet)
    assert "load weights, for 0 s" in text and "reward" in text
    assert "learner rank 5 needs 1.31 times as long" in text and "(step 1)" in text


def test_before_the_first_report_there_is_no_panel() -> None:
    assert drawn(Health(LOSS)).strip() == ""


def test_a_terminal_gets_bar_and_panel() -> None:
    stream = Terminal()
    with stage_health("sft", 30, 10, goal=LOSS, stream=stream) as show:
        show(20, {**SFT, **SLOW})
        show(30, SFT)
    text = stream.getvalue()
    assert "30/30" in text and "61.50 GiB" in text and "warning" in text


def test_a_log_file_gets_plain_lines_and_each_warning_when_it_comes_up_and_at_the_end() -> None:
    stream = io.StringIO()
    with stage_health("sft", 30, goal=LOSS, stream=stream, every_s=3600) as show:
        for step in (10, 20, 30):
            show(step, {**SFT, **SLOW} if step < 30 else SFT)
    assert stream.getvalue().splitlines() == [
        "sft 10/30  warning: rank 5 needs 1.31 times as long as the mean rank, and all wait for it",
        "sft 30/30  loss 0.31  tokens/s 5.2k  mfu 34%",
        "sft: warned: rank 5 needs 1.31 times as long as the mean rank, and all wait for it (2 reports, steps 10 to 20)",
    ]


@example([6.7e299, -1.7976931348623157e308])
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30))
def test_a_trend_of_any_numbers_is_drawn(values: list[float]) -> None:
    assert len(sparkline(deque(values))) <= len(values)


def test_phases_that_took_no_time_are_not_shown() -> None:
    assert list(phases_of(SFT)) == ["data", "forward_backward", "optimizer"]


def test_a_fleet_knows_who_works_who_is_lost_and_what_everybody_did() -> None:
    spans: list[tuple[str, str]] = []
    fleet = FleetWatch(lambda rank, verb, start_s, end_s: spans.append((rank, verb)))
    assert fleet.now() is None and fleet.roles() == {}
    fleet.began("rollout replica 0 rank 0", "generate")
    fleet.began("rollout replica 1 rank 0", "generate")
    now = fleet.now()
    assert now is not None and now[0] == "generate"
    fleet.ended("rollout replica 0 rank 0")
    fleet.lost("rollout replica 0 rank 0")
    assert fleet.roles() == {"rollout": RoleState(known=2, alive=1, working=1)}
    assert spans == [("rollout replica 0 rank 0", "generate")]
