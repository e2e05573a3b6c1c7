"""Rewards that raise, hang, return nonsense and kill their process, for real: each costs its own rollout and nothing else."""

import os
import time

import numpy as np
import pytest

from megatron_ext.batch import FailedRollout, Prompt, Rollout, RouteTrace, ScoredRollout, Tiles
from megatron_ext.errors import UserError
from megatron_ext.rl.scoring.pool import RewardPool

SOURCE = """
import os, signal, subprocess, sys, time

def first_time(place):
    try:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def child(place, *, leaves):
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(place, "w") as file:
        file.write(str(started.pid))
    if leaves:
        os._exit(7)
    return 1.0

def reward(prompt, text):
    do, _, place = text.partition(" ")
    if do == "stop" and first_time(place):
        os.kill(os.getpid(), signal.SIGSTOP)
    if do == "kill" and first_time(place):
        os.kill(os.getpid(), signal.SIGKILL)
    if do in ("stop", "kill"):
        return 1.0
    if do == "child":
        return child(place, leaves=False)
    if do == "orphan":
        return child(place, leaves=True)
    if do == "fork":
        return 1.0 if os.fork() else 2.0
    if do == "hold":  # a child keeps the connection open while its parent dies
        if os.fork() == 0:
            time.sleep(600)
        os._exit(9)
    if do == "print":
        for _ in range(64):
            print("x" * (1 << 16))
        return 1.0
    if do == "last":
        print("my last words")
        os.abort()
    if do == "slow":
        time.sleep(0.5)
        return 1.0
    if do == "keyless":
        return {"score": 1.0}
    if do == "list":
        return [1.0, 1.0]
    if do == "inf":
        return float("inf")
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
        assert time.monotonic() - start < 20
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
    assert "no such answer" in details["raise"] and "pool_reward.py" in details["raise"]
    assert details["die"] == "twice: exit code 7" and details["hang"] == "twice: no result within 0.5 s"
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
        assert isinstance(outcomes[0], FailedRollout) and outcomes[1].reward not in (float(before), float(os.getpid()))
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


def score(path: str, *texts: str, **limits) -> list:
    with RewardPool(path, workers=1, **{"timeout_s": 30, **limits}) as pool:
        return pool.score(rollouts_of({"p": list(texts)}))


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("keyless", "reward_wrong_type", "a dict without the key 'reward': its keys are ['score']"),
        ("type", "reward_wrong_type", "the reward is a str: 'good'"),
        ("list", "reward_wrong_type", "the reward is a list: [1.0, 1.0]"),
        ("nan", "reward_not_finite", "the part 'style' is nan"),
        ("inf", "reward_not_finite", "the reward is inf"),
    ],
)
def test_a_lie_is_no_reward(reward_path, text, reason, detail):
    lie, honest = score(reward_path, text, "0.5")
    assert isinstance(lie, FailedRollout) and (lie.reason, lie.detail) == (reason, detail)
    assert honest.reward == 0.5


@pytest.mark.parametrize(("do", "limit_s"), [("stop", 1), ("kill", 30)])
def test_a_worker_that_is_stopped_or_killed_from_outside_costs_nothing(reward_path, tmp_path, do, limit_s):
    """SIGSTOP, SIGKILL: the machine's doing, so that the answer is scored by another worker."""
    outcomes = score(reward_path, f"{do} {tmp_path / 'first'}", "2", timeout_s=limit_s)
    assert [outcome.reward for outcome in outcomes] == [1.0, 2.0]


def test_a_reward_that_hangs_on_everything_is_not_tried_again_for_ever(reward_path, monkeypatch):
    monkeypatch.setattr("megatron_ext.rl.scoring.pool.MOST_RETRIES", 1)
    details = [outcome.detail for outcome in score(reward_path, "hang", "hang", "hang", timeout_s=0.2)]
    assert sorted(details) == ["no result within 0.2 s"] * 2 + ["twice: no result within 0.2 s"]


def test_the_time_limit_is_of_one_answer_not_of_all(reward_path):
    assert [outcome.reward for outcome in score(reward_path, *["slow"] * 5, timeout_s=2.4)] == [1.0] * 5


@pytest.mark.parametrize(("do", "last"), [("child", 1.0), ("orphan", None)])
def test_processes_that_a_reward_leaves_behind_end_with_its_worker(reward_path, tmp_path, do, last):
    """Whether the worker ends with the pool or by itself."""
    (outcome,) = score(reward_path, f"{do} {tmp_path / 'pid'}")
    assert (outcome.reward if last else outcome.reason) == (last or "reward_worker_died")
    assert ended(int((tmp_path / "pid").read_text()))


def ended(pid: int) -> bool:
    """Whether the process is gone, or its parent need only look."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_child_that_comes_back_from_the_reward_does_not_answer_again(reward_path):
    assert [outcome.reward for outcome in score(reward_path, "fork", "5", "fork", "6")] == [1.0, 5.0, 1.0, 6.0]


def test_a_death_is_noticed_at_once_where_a_child_holds_the_connection(reward_path):
    start = time.monotonic()
    outcomes = score(reward_path, "hold", "3", timeout_s=100)
    assert time.monotonic() - start < 60
    assert outcomes[0].reason == "reward_worker_died" and outcomes[0].detail == "twice: exit code 9" and outcomes[1].reward == 3.0


def test_megabytes_of_prints_are_cut_short_and_nobody_waits(reward_path, capfd):
    assert [outcome.reward for outcome in score(reward_path, "print", "4")] == [1.0, 4.0]
    printed = capfd.readouterr()
    assert 1 << 16 <= len(printed.err) < 1 << 17 and "is dropped" in printed.err and not printed.out


def test_the_last_that_a_worker_printed_is_told_with_its_end(reward_path):
    (outcome,) = score(reward_path, "last words")
    assert outcome.reason == "reward_worker_died" and outcome.detail == "twice: killed by SIGABRT; the last it printed: my last words"
