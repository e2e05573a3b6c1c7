"""Metrics of the stage that is running, for Prometheus: served at http://127.0.0.1:PORT/metrics, or written to a file for node_exporter's textfile collector.

    megatron_ext_loss{run="tiny",stage="sft"} 0.31                         every name of metrics.jsonl, as `exported` translates it
    megatron_ext_steps_done, megatron_ext_steps_planned                    how far the stage is
    megatron_ext_last_step_timestamp_seconds                               alert on time() minus this
    megatron_ext_rollout_failures_total{reason="reward_timeout"}           since this process started
    megatron_ext_ranks_alive{role="rollout"}, megatron_ext_ranks_known     of an RL fleet

Every sample carries the labels run and stage.
"""

from __future__ import annotations

import errno
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from megatron_ext.config.observe import ObserveConfig
from megatron_ext.errors import UserError
from megatron_ext.observe.fleet_watch import FleetWatch
from megatron_ext.observe.metrics_file import FAILED

PREFIX = "megatron_ext_"
_RULES = (
    (r"timing_s/(?P<phase>[^/]+)", "phase_seconds"),
    (r"perf/tokens_per_s", "tokens_per_second"),
    (r"perf/tokens_per_s_per_gpu", "tokens_per_second_per_rank"),
    (r"perf/(?P<name>.+)", "{name}"),
    (r"reward/skill/(?P<skill>[^/]+)/mean", "skill_reward_mean"),
    (r"earl/cluster_usage/(?P<skill>[^/]+)", "earl_cluster_usage"),
    (r"earl/true_usage/(?P<skill>[^/]+)", "earl_true_usage"),
    (r"val/(?P<set>[^/]+)/(?P<skill>[^/]+)/(?P<name>.+)", "validation_{name}"),
    (r"clvr/tap(?P<tap>\d+)/(?P<name>.+)", "clvr_{name}"),
    (r"(?P<name>.+)", "{name}"),
)
"""The first pattern that fits: named parts become labels, but for `name`, which is joined to the metric's own. Units are Prometheus's base units."""


def exported(name: str) -> tuple[str, dict[str, str]]:
    """What a metric of ours is called there, and its labels.

    >>> exported("timing_s/step"), exported("val/val/ocr/pass@8")
    (('megatron_ext_phase_seconds', {'phase': 'step'}), ('megatron_ext_validation_pass_8', {'set': 'val', 'skill': 'ocr'}))
    """
    found, pattern = next((found, new) for pattern, new in _RULES if (found := re.fullmatch(pattern, name)))
    labels = found.groupdict()
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", pattern.format(name=labels.pop("name", ""))), labels


class Exporter:
    """Holds the latest report; a prometheus_client collector. `total`: steps of the stage; `fleet`: whose ranks are counted, in RL. Made by `open_exporter`."""

    def __init__(self, run: str, stage: str, total: int, fleet: FleetWatch | None = None, file: Path | None = None) -> None:
        self._labels, self._total, self._fleet, self._file = {"run": run, "stage": stage}, total, fleet, file
        self._samples: list[tuple[str, dict[str, str], float]] = []
        self._failures: Counter[str] = Counter()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def publish(self, step: int, metrics: Mapping[str, float]) -> None:
        """From now on these are the latest."""
        self._failures.update({name.removeprefix(FAILED): int(value) for name, value in metrics.items() if name.startswith(FAILED)})
        samples = [(*exported(name), value) for name, value in metrics.items() if not name.startswith(FAILED)]
        for name, value in (("steps_done", step), ("steps_planned", self._total), ("last_step_timestamp_seconds", time.time())):
            samples.append((PREFIX + name, {}, float(value)))
        self._samples = samples
        if self._file is not None:
            write_to_textfile(str(self._file), self.registry)  # to a file beside it, which then takes its place

    def collect(self) -> Iterator[Metric]:
        """Called by a scrape, in a thread of its own."""
        families: dict[str, Metric] = {}
        for name, labels, value in [*self._samples, *self._ranks()]:
            keys = [*self._labels, *labels]
            family = families.setdefault(name, GaugeMetricFamily(name, f"{name.removeprefix(PREFIX)} of the latest step", labels=keys))
            family.add_sample(name, {**self._labels, **labels}, value)
        yield from families.values()
        failures = CounterMetricFamily(PREFIX + "rollout_failures", "rollouts that came to nothing", labels=[*self._labels, "reason"])
        for reason, count in dict(self._failures).items():
            failures.add_metric([*self._labels.values(), reason], count)
        yield failures

    def _ranks(self) -> Iterator[tuple[str, dict[str, str], float]]:
        for role, state in self._fleet.roles().items() if self._fleet is not None else ():
            yield PREFIX + "ranks_known", {"role": role}, state.known
            yield PREFIX + "ranks_alive", {"role": role}, state.alive
            yield PREFIX + "ranks_working", {"role": role}, state.working


@contextmanager
def open_exporter(settings: ObserveConfig, run: str, stage: str, total: int, fleet: FleetWatch | None = None) -> Iterator[Exporter]:
    """Serves and writes what the settings ask for, until the stage ends; the file stays. Opened before anything is trained: raises UserError naming the field
    where the port cannot be opened or the file not be written."""
    exporter = Exporter(run, stage, total, fleet, settings.prometheus_file)
    if settings.prometheus_file is not None:
        _try_file(settings.prometheus_file, exporter)
    if not settings.prometheus_port:
        yield exporter
        return
    server, thread = _serve(settings, exporter.registry)
    try:
        yield exporter
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _serve(settings: ObserveConfig, registry: CollectorRegistry) -> tuple[WSGIServer, Thread]:
    port, address = settings.prometheus_port, settings.prometheus_address
    try:
        return start_http_server(port, address, registry)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        field, remedy = ("port", "choose another, or 0 for none") if taken or port < 1024 else ("address", "give an address of this machine, such as 127.0.0.1")
        raise UserError(f"observe.prometheus_{field}", f"port {port} of {address} cannot be opened ({error.strerror})", remedy) from None


def _try_file(file: Path, exporter: Exporter) -> None:
    try:
        write_to_textfile(str(file), exporter.registry)
    except OSError as error:
        raise UserError("observe.prometheus_file", f"{file} cannot be written ({error.strerror})", "give a file in a folder that exists") from None
