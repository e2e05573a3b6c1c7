"""Constants that are fitted to runs whose times are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config.load import explain, load_config
from megatron_ext.errors import UserError
from megatron_ext.parallel.planner.calibrate import calibrate, fit, read_runs
from megatron_ext.parallel.planner.hardware import find_gpu, read_gpus

GPU = find_gpu("cpu-core", read_gpus())
TWO = "parallel.num_ranks=2"
LAYOUTS = {"one": [], "more": ["pretrain.micro_batch=4"], "tp": [TWO, "parallel.tp=2"], "dp": [TWO], "ep": [TWO, "parallel.ep=2"], "pp": [TWO, "parallel.pp=2"]}


def run_folder(folder: Path, overrides: list[str], seconds: list[float], **metrics: float) -> Path:
    micro = [] if any(text.startswith("pretrain.micro_batch") for text in overrides) else ["pretrain.micro_batch=8"]
    resolved = load_config(None, [f"name={folder.name}", "pretrain.global_batch=16", *micro, *overrides])
    (folder / "pretrain").mkdir(parents=True)
    (folder / "config.yaml").write_text(explain(resolved))
    values = {"data/positions_per_row": 160.0, "data/tiles_per_row": 1.0, **metrics}
    lines = [json.dumps({"step": step, "time": 0.0, "timing_s/step": second, **values}) for step, second in enumerate(seconds, start=1)]
    (folder / "pretrain" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_constants_that_made_the_times_are_found_again(tmp_path: Path) -> None:
    true = GPU.model_copy(
        update={"mfu": 0.2, "link_efficiency": 0.05, "layer_overhead_s": 0.004, "step_overhead_s": 0.03, "node_latency_s": 0.002, "network_latency_s": 0.002}
    )
    runs = [run for name, overrides in LAYOUTS.items() for run in read_runs(run_folder(tmp_path / name, overrides, [9.0, 1.0, 1.0]), GPU)]
    runs = [replace(run, measured_s=run.predicted_s(true)) for run in runs]
    fitted = fit(runs, GPU)
    for run in fitted.runs:
        assert run.predicted_s == pytest.approx(run.measured_s, rel=0.02)
        assert run.held_out_s == pytest.approx(run.measured_s, rel=0.2)
    assert fitted.gpu.mfu == pytest.approx(0.2, rel=0.05)
    assert fitted.gpu.node_latency_s == pytest.approx(0.002, rel=0.1)
    assert f"mfu: {fitted.gpu.mfu:.6g}" in fitted.yaml()


def test_a_layout_is_predicted_from_the_others_whatever_its_batches(tmp_path: Path) -> None:
    """Tensor parallelism that takes ten times as long as anything explains shows where it is held out, in both of its runs."""
    asked = {"one": [], "more": ["pretrain.micro_batch=4"], "tp": [TWO, "parallel.tp=2"], "tp more": [TWO, "parallel.tp=2", "pretrain.micro_batch=4"]}
    seconds = {"one": 1.0, "more": 1.1, "tp": 10.0, "tp more": 20.0}
    folders = [run_folder(tmp_path / name.replace(" ", "-"), overrides, [9.0, seconds[name], seconds[name]]) for name, overrides in asked.items()]
    runs = {run.name.split("/")[0]: run for run in calibrate(folders, GPU).runs}
    assert all(runs[name].held_out_s < 2.0 for name in ("tp", "tp-more"))
    assert runs["tp-more"].predicted_s > 5.0, "fitted to it, latency explains it"
    assert calibrate(folders[:2], GPU).runs[0].held_out_s is None, "one layout leaves nothing to predict it from"


def test_the_warm_up_is_left_out_and_the_middle_counts(tmp_path: Path) -> None:
    (run,) = read_runs(run_folder(tmp_path / "r", [], [100.0, 1.0, 1.2, 1.1]), GPU)
    assert run.measured_s == 1.1
    assert run.search.work.mean_row_tokens == 160.0


def test_one_run_fits_one_constant(tmp_path: Path) -> None:
    fitted = calibrate([run_folder(tmp_path / "r", [], [9.0, 2.0, 2.0])], GPU)
    assert len(fitted.constants) == 1
    assert fitted.runs[0].predicted_s == pytest.approx(2.0, rel=1e-6)


def test_a_run_of_an_older_version_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", [], [1.0, 1.0])
    lines = (folder / "pretrain" / "metrics.jsonl").read_text().replace("data/positions_per_row", "data/something_else")
    (folder / "pretrain" / "metrics.jsonl").write_text(lines)
    with pytest.raises(UserError, match="does not say data/positions_per_row; run the stage again with this version"):
        calibrate([folder], GPU)
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        calibrate([tmp_path], GPU)
