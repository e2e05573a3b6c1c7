"""Recording for real: a small network under torch's profiler, how much of it is kept, and that nothing is left behind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_ext.observe.phases import Phase
from megatron_ext.observe.profile_table import Spent, Table
from megatron_ext.observe.profiler import LET_GO, Profiler
from megatron_ext.observe.profiles import Profile, as_text, read_profiles


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.attend(x))


PHASES = (Phase("attention", Network, "attend"), Phase("head", Network, "forward"))


def work(profiler: Profiler, steps: int) -> Network:
    network = Network()
    for _ in range(steps):
        with profiler.step():
            network(torch.ones(8, 64)).sum().backward()
    return network


def test_some_steps_after_the_first_ones_are_recorded(tmp_path: Path) -> None:
    work(Profiler(tmp_path, "rank 0", 3, 9, PHASES), 9)
    (found,) = read_profiles(tmp_path)
    assert (found.rank, found.complete, found.table.steps) == ("rank 0", True, 3)
    assert {"attention", "head", "gradients"} <= found.table.phases.keys()
    assert found.table.phases["attention"].backward_s > 0
    assert sum(spent.host_s for spent in found.table.phases.values()) == pytest.approx(found.table.recorded_s, rel=1e-3)
    with gzip.open(tmp_path / "profile" / "rank-0.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"] == "phase/attention" for event in events) == 3
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-0.json", "rank-0.trace.json.gz"]


def test_a_stage_shorter_than_that_is_recorded_as_far_as_it_goes(tmp_path: Path) -> None:
    assert LET_GO == 2
    work(Profiler(tmp_path, "rank 0", 3, 4, PHASES), 4)
    work(Profiler(tmp_path, "rank 1", 3, 2, PHASES), 2)
    assert [profile.table.steps for profile in read_profiles(tmp_path)] == [3, 2]


def test_functions_have_no_names_before_and_after(tmp_path: Path) -> None:
    plain, inherited = Network.forward, Phase("call", Network, "zero_grad")
    profiler = Profiler(tmp_path, "rank 0", 1, 1, (*PHASES, inherited))
    profiler.begin()
    assert Network.forward is not plain and "zero_grad" in vars(Network)
    Network()(torch.ones(8, 64))
    profiler.end()
    assert Network.forward is plain and "zero_grad" not in vars(Network)
    work(Profiler(tmp_path / "none", "rank 0", 0, 9, PHASES), 2)
    assert not (tmp_path / "none").exists()


def test_a_long_step_is_recorded_up_to_a_number_of_calls(tmp_path: Path) -> None:
    plain = Network.forward
    profiler, network = Profiler(tmp_path, "rank 0", 1, 1, PHASES, most_phases=10), Network()
    with profiler.step():
        for _ in range(50):
            network(torch.ones(8, 64))
        assert Network.forward is plain, "it has ended within the step"
    (found,) = read_profiles(tmp_path)
    assert not found.complete and found.title.startswith("rank 0: the beginning of step 1, ")
    with gzip.open(tmp_path / "profile" / "rank-0.trace.json.gz") as file:
        assert sum(event["name"] == "phase/head" for event in json.load(file)["traceEvents"]) == 5


def test_what_is_recorded_when_a_stage_is_stopped_is_written(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, "rank 0", 5, 100, PHASES)
    work(profiler, LET_GO + 1)
    assert read_profiles(tmp_path) == []
    profiler.close()
    assert read_profiles(tmp_path)[0].table.steps == 1


def test_a_run_goes_on_where_its_profile_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("in the way")
    plain = Network.forward
    network = work(Profiler(tmp_path, "rank 0", 1, 3, PHASES), 3)
    assert network.first.weight.grad is not None and Network.forward is plain
    assert "profile of rank 0 given up: FileExistsError" in capsys.readouterr().err


def test_a_run_goes_on_where_a_function_has_another_name_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = Network.forward
    work(Profiler(tmp_path, "rank 0", 1, 3, (*PHASES, Phase("gone", Network, "gone"))), 3)
    assert Network.forward is plain
    assert "profile of rank 0 given up: AttributeError" in capsys.readouterr().err


def test_the_text_says_what_took_how_long() -> None:
    phases = {"experts": Spent(host_s=1.5, backward_s=1.0, python_s=0.25), "other": Spent(host_s=0.5)}
    profile = Profile("rank 0", True, Table(2.0, 3, phases, {"aten::mm": Spent(host_s=1.0, calls=30)}))
    assert as_text(profile).splitlines() == [
        "rank 0: 3 steps, 2.00 s",
        "  phase    seconds  share  backward  in Python",
        "  experts    1.500  75.0%     1.000      0.250",
        "  other      0.500  25.0%     0.000      0.000",
        "",
        "  operator  calls  seconds  share",
        "  aten::mm     30    1.000  50.0%",
    ]
