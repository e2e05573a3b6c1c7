"""Everything that is kept of a stage, from one call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ext.config.observe import ObserveConfig
from megatron_ext.observe.metrics import read_metrics
from megatron_ext.observe.observer import observe_stage
from megatron_ext.observe.stopwatch import Lap
from tests.support.health import SFT

TRACK = [(1, [Lap("data", 1.79e9, 1.79e9 + 1)])]


@pytest.mark.parametrize("timeline", [True, False])
def test_a_report_is_written_shown_and_exported_and_a_timeline_is_written_unless_it_is_not_wanted(
    timeline: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ObserveConfig(timeline=timeline, prometheus_file=tmp_path / "x.prom")
    with observe_stage(settings, "tiny", "sft", 2, tmp_path / "sft") as observer, observer.steps(0, ("loss", "loss")) as report:
        report(1, SFT)
        report(2, SFT)
        observer.trace([TRACK, TRACK])
        observer.trace_loop(2, TRACK[0][1])
    assert [record["step"] for record in read_metrics(tmp_path / "sft")] == [1, 2]
    assert "sft 2/2  loss 0.31" in capsys.readouterr().err
    assert 'megatron_ext_steps_done{run="tiny",stage="sft"} 2.0' in (tmp_path / "x.prom").read_text()
    file = tmp_path / "sft" / "timeline.json"
    assert file.exists() == timeline
    if timeline:
        assert [event["args"]["name"] for event in json.loads(file.read_text()) if event["ph"] == "M"] == ["tiny: sft", "rank 0", "rank 1", "loop"]
