"""The section `observe` of the configuration."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megatron_ext.config.section import Section


class ObserveConfig(Section):
    """What an operator sees of a stage while it runs, besides `metrics.jsonl`."""

    timeline: bool = True
    """Writes `timeline.json` into the folders of pretrain, sft and rl: when each rank was in which phase, for ui.perfetto.dev. At most about 8 MB each."""
    profile: int = Field(0, ge=0, le=20)
    """Steps that torch's profiler records, `--profile STEPS` for short: where the time goes, by phase and by operator, into `profile/` of the stage's folder.
    Of the first rank of every pipeline stage, and in RL of one that generates. It slows these steps. 0: none."""
    prometheus_port: int = Field(0, ge=0, le=65535)
    """Serves the latest metrics of the stage that is running to Prometheus, at /metrics of this port, on the machine of rank 0 (in RL of the driver). 0: does
    not."""
    prometheus_address: str = "127.0.0.1"
    """Where the port is opened. There is no authentication: give another address, such as 0.0.0.0, only in a network that you trust."""
    prometheus_file: Path | None = None
    """Writes the same to this file at every report, for the textfile collector of a node_exporter: its name must end in .prom."""
