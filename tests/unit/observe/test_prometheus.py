"""What Prometheus reads: names, labels, values, over HTTP and from a file."""

from __future__ import annotations

import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_ext.config.load import load_config
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.errors import ConfigError, UserError
from megatron_ext.observe.fleet_watch import FleetWatch
from megatron_ext.observe.prometheus import exported, open_exporter

METRICS = {
    "loss": 0.5,
    "perf/tokens_per_s": 5200.0,
    "perf/mfu": 0.34,
    "perf/peak_memory_bytes": 6.5e10,
    "timing_s/step": 2.0,
    "timing_s/forward_backward": 1.5,
    "reward/skill/ocr/mean": 0.25,
    "reward/mean": 0.4,
    "clvr/tap1/update_ratio": 0.02,
    "val/val/ocr/accuracy": 0.75,
    "rollout/failed_count": 3.0,
    "rollout/failed/reward_timeout": 2.0,
    "rollout/failed/prompt_too_long": 1.0,
    "moe/max_vio": float("nan"),
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def read(text: str) -> dict[tuple[str, ...], float]:
    """Every sample as Prometheus's own parser sees it, by its name and its labels other than run and stage."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert (sample.labels.pop("run"), sample.labels.pop("stage")) == ("tiny", "rl")
            found[(sample.name, *sample.labels.values())] = sample.value
    return found


def test_a_scrape_finds_the_latest_report_and_counts_failures_over_all() -> None:
    settings = ObserveConfig(prometheus_port=free_port())
    with open_exporter(settings, "tiny", "rl", 600) as exporter:
        exporter.publish(10, METRICS)
        exporter.publish(20, {**METRICS, "loss": 0.25})
        with urllib.request.urlopen(f"http://127.0.0.1:{settings.prometheus_port}/metrics") as answer:
            samples = read(answer.read().decode())
    assert samples["megatron_ext_loss",] == 0.25
    assert samples["megatron_ext_steps_done",] == 20 and samples["megatron_ext_steps_planned",] == 600
    assert time.time() - samples["megatron_ext_last_step_timestamp_seconds",] < 60
    assert samples["megatron_ext_rollout_failures_total", "reward_timeout"] == 4 and samples["megatron_ext_rollout_failures_total", "prompt_too_long"] == 2
    assert samples["megatron_ext_phase_seconds", "forward_backward"] == 1.5 and samples["megatron_ext_phase_seconds", "step"] == 2.0
    assert samples["megatron_ext_skill_reward_mean", "ocr"] == 0.25 and samples["megatron_ext_clvr_update_ratio", "1"] == 0.02
    assert samples["megatron_ext_validation_accuracy", "val", "ocr"] == 0.75
    assert samples["megatron_ext_peak_memory_bytes",] == 6.5e10 and samples["megatron_ext_tokens_per_second",] == 5200


@pytest.mark.parametrize("name", [*METRICS, "perf/tokens_per_s_per_gpu", "val/a b/c-d/pass@8", "reward/1st part/mean", "weird: name/ü"])
def test_every_name_is_one_that_prometheus_allows(name: str) -> None:
    metric, labels = exported(name)
    assert re.fullmatch(r"megatron_ext_[a-zA-Z0-9_]+", metric)
    assert all(re.fullmatch(r"[a-z_]+", label) for label in labels)


def test_ranks_are_counted_by_role_and_a_lost_one_is_not_alive() -> None:
    fleet = FleetWatch()
    settings = ObserveConfig(prometheus_port=free_port())
    with open_exporter(settings, "tiny", "rl", 1, fleet) as exporter:
        for rank in ("learner rank 0", "rollout replica 0 rank 0", "rollout replica 1 rank 0"):
            fleet.began(rank, "generate")
        fleet.ended("rollout replica 1 rank 0")
        fleet.lost("rollout replica 1 rank 0")
        exporter.publish(1, {})
        with urllib.request.urlopen(f"http://127.0.0.1:{settings.prometheus_port}/metrics") as answer:
            samples = read(answer.read().decode())
    assert samples["megatron_ext_ranks_known", "rollout"] == 2 and samples["megatron_ext_ranks_alive", "rollout"] == 1
    assert samples["megatron_ext_ranks_working", "rollout"] == 1 and samples["megatron_ext_ranks_alive", "learner"] == 1


def test_a_file_for_the_textfile_collector_is_whole_at_every_report(tmp_path: Path) -> None:
    file = tmp_path / "megatron_ext.prom"
    with open_exporter(ObserveConfig(prometheus_file=file), "tiny", "rl", 600) as exporter:
        assert file.exists(), "whether it can be written is known before training"
        exporter.publish(10, METRICS)
        assert read(file.read_text())["megatron_ext_steps_done",] == 10
        exporter.publish(20, METRICS)
    assert read(file.read_text())["megatron_ext_steps_done",] == 20
    assert list(tmp_path.iterdir()) == [file]


def test_a_port_that_is_taken_is_said_with_its_field_before_anything_is_trained() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = rf"observe\.prometheus_port: port {port} of 127\.0\.0\.1 cannot be opened \(Address already in use\); choose another"
        with pytest.raises(UserError, match=words), open_exporter(ObserveConfig(prometheus_port=port), "tiny", "rl", 1):
            pytest.fail("it was opened")


def test_an_address_that_is_not_of_this_machine_is_said_with_its_field() -> None:
    settings = ObserveConfig(prometheus_port=free_port(), prometheus_address="192.0.2.1")
    with pytest.raises(UserError, match=r"observe\.prometheus_address: .*192\.0\.2\.1"), open_exporter(settings, "tiny", "rl", 1):
        pytest.fail("it was opened")


def test_a_file_in_a_folder_that_is_not_there_is_said_with_its_field(tmp_path: Path) -> None:
    settings = ObserveConfig(prometheus_file=tmp_path / "nowhere" / "x.prom")
    with pytest.raises(UserError, match=r"observe\.prometheus_file: .*cannot be written .*folder that exists"), open_exporter(settings, "tiny", "rl", 1):
        pytest.fail("it was opened")


def test_a_file_that_the_collector_would_overlook_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"observe\.prometheus_file .*'metrics\.txt' would not be read .*; use a name that ends in \.prom"):
        load_config(None, ["observe.prometheus_file=metrics.txt"])


def test_the_port_is_free_again_for_the_next_stage() -> None:
    settings = ObserveConfig(prometheus_port=free_port())
    for _ in range(2):
        with open_exporter(settings, "tiny", "rl", 1):
            pass
