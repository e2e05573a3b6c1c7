"""Evaluation and discovery, stopped in the middle and run again, leave the files of an undisturbed run, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.cli.launched import Launch
from megatron_ext.cli.main import main
from megatron_ext.cli.run_folder import RunFolder
from megatron_ext.cli.stages import STAGES
from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.earl.statistics import permuted_labels
from megatron_ext.errors import EXIT_OK, EXIT_REQUEUE, StoppedForRequeue
from tests.support.rl_run import prepare, rl_config, save_clusters
from tests.support.stalling import STALL_AFTER

TWO_REPLICAS = {"replicas": 2}
EP2 = {"replicas": 1, "parallel": ParallelConfig(num_ranks=2, ep=2)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Prompts of which half are answered right, in chunks of three or four."""
    config = rl_config(tmp_path_factory.mktemp("run"), reward="tests.support.stalling:stalling_vowels")
    parts = {
        "evaluate": config.evaluate.model_copy(update={"prompts_per_skill": 3, "samples": 2, "sampled_prompts_per_skill": 1}),
        "discover": config.discover.model_copy(update={"prompts_per_skill": 4, "permutations": 20, "bootstraps": 3, "committee_top": 2}),
        "earl": config.earl.model_copy(update={"correct_threshold": 0.15}),
        "rl": config.rl.model_copy(update={"init_from": prepare(config)}),
    }
    return config.model_copy(update=parts)


def laid_out(config: RunConfig, layout: dict[str, Any]) -> RunConfig:
    """Three rounds of two chunks."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"batch_size": 4, **layout})})


def files(folder: Path) -> dict[str, bytes]:
    """TensorBoard's say when they were written."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith("events.")}


def once_saved(folder: Path, action: Callable[[], object]) -> None:
    """Acts, in a thread, as soon as a chunk is there."""

    def wait() -> None:
        while not any(path.name.isdigit() for path in folder.glob("*")):
            time.sleep(0.01)
        action()

    threading.Thread(target=wait, daemon=True).start()


def test_an_evaluation_by_ranks_that_share_experts(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is typed: a signal, exit code 75, the same command again."""
    config = laid_out(run, EP2)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))  # JSON is YAML
    save_clusters(config, RunFolder(config.run_dir).clusters)

    def evaluate(name: str) -> int:
        where = ["--checkpoint", str(config.rl.init_from), "--out", str(tmp_path / name / "sft.json")]
        return main(["evaluate", str(tmp_path / "run.yaml"), *where])

    assert evaluate("straight") == EXIT_OK
    with monkeypatch.context() as patch:
        patch.setenv(STALL_AFTER, "12")  # each rank finishes its first chunk, and not all of its second
        once_saved(tmp_path / "stopped" / "sft" / "chunks", lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert evaluate("stopped") == EXIT_REQUEUE
    assert "of 18 prompts answered: run again to resume. The same command resumes it." in capsys.readouterr().err
    assert set(files(tmp_path / "stopped")) <= {f"sft/chunks/{name}" for name in ("begun.json", "0", "1", "0.draft", "1.draft", "traces.json")}
    assert evaluate("stopped") == EXIT_OK
    assert files(tmp_path / "stopped") == files(tmp_path / "straight")
    assert {"sft.json", "sft/samples.jsonl"} <= set(files(tmp_path / "stopped")) and not (tmp_path / "stopped" / "sft" / "chunks").exists()


@pytest.mark.journey
def test_a_discovery_by_two_replicas(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a launcher's file while prompts are answered, and again while clusters are looked for."""
    config = laid_out(run, TWO_REPLICAS)

    def discover(name: str, stop_file: Path | None = None) -> None:
        STAGES["discover"].execute(config, RunFolder(tmp_path / name), Launch(stop_file=stop_file))

    discover("straight")
    stop = tmp_path / "STOP"
    folder = tmp_path / "stopped" / "discover"
    with monkeypatch.context() as patch:
        patch.setenv(STALL_AFTER, "5")
        once_saved(folder / "chunks", stop.touch)
        with pytest.raises(StoppedForRequeue, match=r"stopped with \d+ of 24 prompts answered"):
            discover("stopped", stop)
    assert list(files(folder)) and not (folder / "survey.npz").exists()
    stop.unlink()

    def permuted_and_stopped(*arguments: Any) -> Any:
        stop.touch()
        return permuted_labels(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("megatron_ext.earl.clusters.permuted_labels", permuted_and_stopped)
        with pytest.raises(StoppedForRequeue, match="stopped after the last answer"):
            discover("stopped", stop)
    stop.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("megatron_ext.inference.survey.answer_chunks", None)
        discover("stopped")
    assert files(folder) == files(tmp_path / "straight" / "discover")
    assert set(files(folder)) == {"survey.npz", "mass.npy", "prompt_mass.npy", "image_mass.npy", "question_mass.npy", "control.npy", "expert_clusters.json"}
