"""Saves that go wrong on one of several ranks, killed in the middle or refused by the operating system: the former checkpoint is whole, the run goes on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_ext.checkpoint.folder import check_file, find_checkpoint, latest_step, read_manifest
from megatron_ext.config.schema import DataConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_ext.data.tokenizer import train_tokenizer
from megatron_ext.errors import RankFailed
from megatron_ext.parallel.local import run_ranks
from megatron_ext.training.stage import run_supervised
from tests.parallel.test_training_stage import MODEL, tensors
from tests.support.saving import fail_alone, save_on_a_full_disk, train_until_killed

STEPS = 7
STAGE = TrainConfig(steps=STEPS, global_batch=8, micro_batch=2, log_every=1, save_every=1, keep=STEPS, optimizer=OptimizerConfig(warmup_steps=2))
MOMENTS = [(0, ""), (1, "__1_0.distcp"), (0, "manifest.json")]
"""Who is killed, and which file of the draft must be there."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two data-parallel ranks that save after every step, beside the next one."""
    data = DataConfig(questions_per_image=2)
    run = RunConfig(name="run", output_dir=tmp_path_factory.mktemp("runs"), model=MODEL, data=data, parallel=ParallelConfig(num_ranks=2), pretrain=STAGE)
    train_tokenizer(data, run.run_dir / "tokenizer", run.seed)
    return run


@pytest.fixture(scope="module")
def straight(config: RunConfig) -> Path:
    folder = config.run_dir / "straight"
    run_supervised(config, "pretrain", folder, None)
    return folder


def test_a_rank_killed_in_the_middle_of_a_save_leaves_the_former_checkpoint_and_the_next_run_goes_on(config: RunConfig, straight: Path) -> None:
    """SIGKILL at three moments of a save, up to 20 ms after the sign of each. Every checkpoint that is left is whole, and that of an undisturbed run."""
    folder, delays = config.run_dir / "killed", random.Random(0)
    interrupted = 0
    for victim, sign in MOMENTS:
        reached = latest_step(folder / "checkpoints") or 0
        step = reached + 2
        with pytest.raises(RankFailed, match=rf"rank {victim} of 2: .*killed by SIGKILL"):
            run_ranks(train_until_killed, 2, config, folder, victim, step, sign, delays.uniform(0, 0.02), timeout_s=100)
        left = latest_step(folder / "checkpoints")
        assert left is not None and step - 1 <= left <= step
        interrupted += left < step
        checkpoint = find_checkpoint(folder / "checkpoints")
        assert [problem for name, entry in read_manifest(checkpoint).items() if (problem := check_file(checkpoint, name, entry))] == []
        assert tensors(folder, left) == tensors(straight, left)
    assert interrupted >= 1
    assert run_supervised(config, "pretrain", folder, None)["step"] == STEPS
    assert tensors(folder, STEPS) == tensors(straight, STEPS)
    assert not list((folder / "checkpoints").glob("*.tmp"))


def test_a_full_disk_on_one_rank_is_told_on_every_rank_and_the_former_checkpoint_stays(tmp_path: Path) -> None:
    """Training goes on until it is told, and may save again once there is room."""
    for report in run_ranks(save_on_a_full_disk, 2, tmp_path, timeout_s=100):
        assert "the checkpoint of step 2 could not be saved (rank 1: [Errno 27] File too large" in report["told"]
        assert "it resumes from step 1, whose checkpoint is whole" in report["told"]
        assert report["names"] == ["latest", "step_000001"]
        assert report["loaded"] == 1
        assert report["latest"] == 3


def test_a_rank_that_fails_without_telling_the_others_stops_them_all_the_same(tmp_path: Path) -> None:
    """The one that waits hears of it at a step, or as the other leaves: long before the half hour that a slow disk is given."""
    waiting, failing = run_ranks(fail_alone, 2, tmp_path, timeout_s=100)
    assert "checkpoint of step 1" in waiting
    assert failing.startswith(f"the checkpoint of step 1 in {tmp_path} could not be saved") and "ZeroDivisionError" in failing
