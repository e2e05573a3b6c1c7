"""A supervised stage as the command line runs it: ranks, data, metrics, checkpoints, a stop on request, and the resume that follows."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from megatron_ext.checkpoint.dist import latest_step
from megatron_ext.checkpoint.folder import read_manifest
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.schema import ClvrConfig, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig, VisionConfig
from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.tokenizer import train_tokenizer
from megatron_ext.errors import CheckpointError, StoppedForRequeue, UserError
from megatron_ext.observe.metrics import read_metrics
from megatron_ext.training.stage import run_supervised
from tests.support.shards import write_shard, write_shards
from tests.support.timelines import as_perfetto_reads, slices

STEPS = 6
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    head_dim=8,
    num_experts=4,
    expert_ffn_hidden_size=32,
    vision=VisionConfig(num_layers=1, hidden_size=32, num_attention_heads=2, ffn_hidden_size=32),
    clvr=ClvrConfig(taps=((0, 1),), head_dim=8),
)
STAGE = TrainConfig(steps=STEPS, global_batch=8, micro_batch=2, log_every=1, save_every=2, keep=3, optimizer=OptimizerConfig(warmup_steps=2))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on two data-parallel ranks whose tokenizer exists."""
    data = DataConfig(questions_per_image=2)
    run = RunConfig(
        name="run", output_dir=tmp_path_factory.mktemp("runs"), model=MODEL, data=data, parallel=ParallelConfig(num_ranks=2), pretrain=STAGE, sft=STAGE
    )
    train_tokenizer(data, run.run_dir / "tokenizer", run.seed)
    return run


@pytest.fixture(scope="module")
def straight(config: RunConfig) -> Path:
    """The stage, run through without a stop."""
    folder = config.run_dir / "straight"
    last = run_supervised(config, "pretrain", folder, None)
    assert last["step"] == STEPS
    return folder


def numbers(folder: Path) -> list[dict[str, float]]:
    """What was measured, without the clock."""
    timed = ("time", "timing_s/", "perf/")
    return [{name: value for name, value in record.items() if not name.startswith(timed)} for record in read_metrics(folder)]


def tensors(folder: Path, step: int) -> dict[str, str]:
    """Digests of the files that hold weights and moments."""
    manifest = read_manifest(folder / "checkpoints" / f"step_{step:06d}")
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".distcp")}


def test_a_stage_leaves_its_configuration_metrics_and_checkpoints(config: RunConfig, straight: Path) -> None:
    assert RunConfig(**yaml.safe_load((straight / "config.yaml").read_text())).pretrain.steps == STEPS
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["latest", "step_000002", "step_000004", "step_000006"]
    assert list(straight.glob("events.out.tfevents*"))
    records = read_metrics(straight)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    wanted = {"loss", "lr", "grad_norm", "moe/max_vio", "moe/load_entropy", "moe/aux_loss", "timing_s/step", "timing_s/data"}
    wanted |= {"timing_s/forward_backward", "timing_s/optimizer", "timing_s/save"}
    wanted |= {f"perf/{name}" for name in ("tokens_per_s", "tokens_per_s_per_gpu", "mfu", "peak_memory_bytes", "slowest_rank", "slowest_over_mean")}
    assert wanted <= records[-1].keys()
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["perf/tokens_per_s"] == pytest.approx(2 * records[-1]["perf/tokens_per_s_per_gpu"])


def test_a_stage_leaves_a_timeline_in_which_both_ranks_train_step_by_step(straight: Path) -> None:
    tracks = slices(as_perfetto_reads(straight))
    assert list(tracks) == ["rank 0", "rank 1"]
    for events in tracks.values():
        assert [name for name, *_ in events if name.startswith("step")] == [f"step {step}" for step in range(1, STEPS + 1)]
        assert Counter(name for name, *_ in events)["save"] == 3
        for name, start, end in events:
            steps = [event for event in events if event[0].startswith("step") and event[1] <= start and end <= event[2]]
            assert len(steps) == 1, f"{name} lies within one step"


def test_a_port_that_is_taken_ends_a_stage_before_it_has_begun(config: RunConfig) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        observe = ObserveConfig(prometheus_port=other.getsockname()[1])
        folder = config.run_dir / "no-port"
        with pytest.raises(UserError, match=r"observe\.prometheus_port: port \d+ of 127\.0\.0\.1 cannot be opened"):
            run_supervised(config.model_copy(update={"observe": observe}), "pretrain", folder, None)
    assert not (folder / "checkpoints").exists() and not (folder / "metrics.jsonl").exists()


def test_a_finished_stage_run_again_does_nothing(config: RunConfig, straight: Path) -> None:
    before = tensors(straight, STEPS)
    assert run_supervised(config, "pretrain", straight, None) == {"step": STEPS}
    assert tensors(straight, STEPS) == before
    assert len(read_metrics(straight)) == STEPS


def test_a_stage_set_back_to_an_earlier_checkpoint_ends_bit_for_bit_where_it_ended_before(config: RunConfig, straight: Path) -> None:
    before, measured = tensors(straight, STEPS), numbers(straight)
    (straight / "checkpoints" / "latest").write_text("step_000002\n")
    run_supervised(config, "pretrain", straight, None)
    assert tensors(straight, STEPS) == before
    assert numbers(straight) == measured


def test_a_signal_stops_after_a_step_with_a_checkpoint_and_the_next_run_ends_where_an_undisturbed_one_does(config: RunConfig, straight: Path) -> None:
    folder = config.run_dir / "stopped"

    def stop_once_training() -> None:
        """The event file appears just before the first step."""
        deadline = time.monotonic() + 60
        while not list(folder.glob("events.out.tfevents*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    unsaved = STAGE.model_copy(update={"save_every": 0})
    once = config.model_copy(update={"pretrain": unsaved})
    thread = threading.Thread(target=stop_once_training)
    thread.start()
    with pytest.raises(StoppedForRequeue, match=f"of {STEPS}: run again to resume") as caught:
        run_supervised(once, "pretrain", folder, None)
    thread.join()
    assert caught.value.exit_code == 75
    stopped_at = latest_step(folder / "checkpoints")
    assert stopped_at is not None and 1 <= stopped_at < STEPS
    run_supervised(once, "pretrain", folder, None)
    assert tensors(folder, STEPS) == tensors(straight, STEPS)
    assert numbers(folder) == numbers(straight)


def test_a_stage_starts_from_the_weights_of_another(config: RunConfig, straight: Path) -> None:
    trained, fresh = config.run_dir / "sft", config.run_dir / "fresh"
    short = config.model_copy(update={"sft": STAGE.model_copy(update={"steps": 1, "save_every": 0})})
    run_supervised(short, "sft", trained, straight / "checkpoints")
    run_supervised(short, "sft", fresh, None)
    assert read_metrics(trained)[0]["loss"] < read_metrics(fresh)[0]["loss"] - 0.05


def test_another_models_checkpoint_is_refused_by_the_ranks(config: RunConfig, straight: Path) -> None:
    wider = config.model_copy(update={"model": MODEL.model_copy(update={"num_experts": 8})})
    with pytest.raises(CheckpointError, match=r"model\.num_experts: checkpoint has 4, configuration has 8"):
        run_supervised(wider, "sft", config.run_dir / "wider", straight / "checkpoints")


def test_text_is_learnt_alike_on_one_rank_and_two(config: RunConfig, tmp_path: Path) -> None:
    """A language model alone, on rows of an indexed dataset."""
    words = [" ".join(["red", "blue", "green"][number % 3 : number % 3 + 1] * (number % 9 + 2)) for number in range(300)]
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in words))
    preprocess([tmp_path / "words.jsonl"], tmp_path / "words", config.tokenizer_dir)
    alone = MODEL.model_copy(update={"vision": VisionConfig(enabled=False), "clvr": ClvrConfig(enabled=False, taps=())})
    stage = STAGE.model_copy(update={"text": {str(tmp_path / "words"): 1.0}, "steps": 4})
    data = config.data.model_copy(update={"kind": "jsonl", "max_length": 48})
    two = config.model_copy(update={"model": alone, "pretrain": stage, "data": data})
    one = two.model_copy(update={"parallel": ParallelConfig()})
    run_supervised(two, "pretrain", tmp_path / "two", None)
    run_supervised(one, "pretrain", tmp_path / "one", None)
    losses = [[record["loss"] for record in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]
    assert read_metrics(tmp_path / "one")[0]["num_tokens"] == 8 * 47


def test_shards_packed_by_tokens_are_resumed_bit_for_bit_and_samples_left_out_are_counted(config: RunConfig, tmp_path: Path) -> None:
    """On two ranks that share experts; every epoch meets the broken samples again, but each rank counts them once."""
    shards = write_shards(tmp_path / "shards", 2, 8)
    write_shard(shards / "part-002.tar", {f"bad/{number}.json": b"{broken" for number in range(6)})
    data = config.data.model_copy(update={"kind": "webdataset", "path": shards, "index": tmp_path / "index", "max_bad_samples": 6})
    stage = STAGE.model_copy(update={"packed": True, "micro_batch_tokens": data.max_length, "steps": 4})
    run = config.model_copy(update={"data": data, "pretrain": stage, "parallel": ParallelConfig(num_ranks=2, ep=2)})
    run_supervised(run, "pretrain", tmp_path / "stage", None)
    before, records = tensors(tmp_path / "stage", 4), read_metrics(tmp_path / "stage")
    bad = [record["data/bad_samples"] for record in records]
    assert bad == sorted(bad) and 6 <= bad[-1] <= 12
    (tmp_path / "stage" / "checkpoints" / "latest").write_text("step_000002\n")
    run_supervised(run, "pretrain", tmp_path / "stage", None)
    assert tensors(tmp_path / "stage", 4) == before
    assert [record["loss"] for record in read_metrics(tmp_path / "stage")] == [record["loss"] for record in records]
