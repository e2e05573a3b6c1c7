"""Rewards that raise, hang, return nonsense and kill their process, for real: each costs its own rollout and nothing else."""

import os
import time

import numpy as np
import pytest

from megatron_ext.batch import FailedRollout, Prompt, Rollout, RouteTrace, ScoredRollout, Tiles
from megatron_ext.errors import UserError
from megatron_ext.rl.scoring.pool import RewardPool

SOURCE = """
import os, sys, time

def reward(prompt, text):
    if text == "raise":
        raise RuntimeError("no such answer")
    if text == "exit":
        sys.exit(3)
    if text == "hang":
        time.sleep(600)
    if text == "spin":
        while True:
            pass
    if text == "nan":
        return {"reward": 1.0, "style": float("nan")}
    if text == "type":
        return "good"
    if text == "die":
        os._exit(7)
    if text == "pid":
        return float(os.getpid())
    if text == "torch":
        return float("torch" in sys.modules)
    if text == "allocate":
        return float(len(bytearray(4 << 30)))
    return {"reward": float(text), "images": prompt.tiles.pixels_IHWC.size}
"""


def rollouts_of(texts_by_prompt: dict[str, list[str]]) -> list[Rollout]:
    routes = RouteTrace(np.zeros((1, 1, 1), np.uint8), np.ones((1, 1, 1), np.float16))
    rollouts = []
    for key, texts in texts_by_prompt.items():
        prompt = Prompt(key, "count", np.zeros(1, np.int32), Tiles.whole(np.zeros((1, 2, 2, 3), np.uint8)), "3")
        rollouts += [
            Rollout(prompt, sample, 0, np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), "stop", text, routes)
            for sample, text in enumerate(texts)
        ]
    return rollouts


@pytest.fixture
def reward_path(tmp_path, monkeypatch):
    (tmp_path / "pool_reward.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "pool_reward:reward"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_failure_costs_its_own_rollout_and_order_is_kept(reward_path):
    texts = {"p0": ["0.5", "raise", "1", "nan", "exit", "2"], "p1": ["3", "die", "4", "type", "5"], "p2": ["6", "hang", "7"], "p3": ["8"], "p4": ["spin", "9"]}
    rollouts = rollouts_of(texts)
    with RewardPool(reward_path, workers=2, timeout_s=0.5) as pool:
        start = time.monotonic()
        outcomes = pool.score(rollouts)
        assert time.monotonic() - start < 10
        assert len(pool.pids) == 2 and all(alive(pid) for pid in pool.pids)
        assert [outcome.reward for outcome in pool.score(rollouts_of({"again": ["1", "2"]}))] == [1.0, 2.0]
    reasons = {"raise": "reward_raised", "exit": "reward_raised", "nan": "reward_not_finite", "type": "reward_wrong_type", "die": "reward_worker_died"}
    reasons |= {"hang": "reward_timeout", "spin": "reward_timeout"}
    for rollout, outcome in zip(rollouts, outcomes, strict=True):
        if rollout.text in reasons:
            assert isinstance(outcome, FailedRollout)
            assert (outcome.prompt.key, outcome.sample, outcome.reason) == (rollout.prompt.key, rollout.sample, reasons[rollout.text])
        else:
            assert isinstance(outcome, ScoredRollout) and outcome.rollout is rollout
            assert (outcome.reward, outcome.rewards) == (float(rollout.text), {"images": 12.0})
    details = {rollout.text: outcome.detail for rollout, outcome in zip(rollouts, outcomes, strict=True) if isinstance(outcome, FailedRollout)}
    assert "no such answer" in details["raise"] and "line 6" in details["raise"]
    assert details["die"] == "exit code 7" and details["hang"] == "no result within 0.5 s"
    assert details["nan"] == "the part 'style' is nan" and details["type"] == "the reward is a str: 'good'"


def test_workers_persist_know_no_torch_and_end_with_the_pool(reward_path):
    with RewardPool(reward_path, workers=1, timeout_s=5) as pool:
        pids = [outcome.reward for outcome in pool.score(rollouts_of({"p": ["pid", "pid"], "q": ["pid"]}))]
        assert pids == [float(pool.pids[0])] * 3
        assert [outcome.reward for outcome in pool.score(rollouts_of({"p": ["torch"]}))] == [0.0]
        assert pool.score([]) == []
        pid = pool.pids[0]
    assert not alive(pid)


def test_a_hung_worker_is_replaced_by_another_process(reward_path):
    with RewardPool(reward_path, workers=1, timeout_s=0.3) as pool:
        before = pool.pids[0]
        outcomes = pool.score(rollouts_of({"p": ["hang", "pid"]}))
        assert isinstance(outcomes[0], FailedRollout) and outcomes[1].reward == float(pool.pids[0]) != float(before)
        assert not alive(before)


def test_a_worker_that_was_killed_while_idle_is_replaced(reward_path):
    with RewardPool(reward_path, workers=1, timeout_s=5) as pool:
        os.kill(pool.pids[0], 9)
        time.sleep(0.1)
        assert [outcome.reward for outcome in pool.score(rollouts_of({"p": ["1", "2"]}))] == [1.0, 2.0]


def test_a_memory_limit_turns_a_greedy_reward_into_a_failed_rollout(reward_path):
    with RewardPool(reward_path, workers=1, timeout_s=5, memory_bytes=2 << 30) as pool:
        outcomes = pool.score(rollouts_of({"p": ["allocate", "1"]}))
    assert outcomes[0].reason == "reward_raised" and "MemoryError" in outcomes[0].detail
    assert outcomes[1].reward == 1.0


def test_a_reward_that_cannot_be_loaded_is_a_users_mistake_at_once(reward_path):
    with pytest.raises(UserError, match=r"rl.reward: module 'pool_reward' has no 'rewrd'; did you mean 'reward'\?"):
        RewardPool("pool_reward:rewrd", workers=1, timeout_s=1)
