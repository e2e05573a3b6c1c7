"""A session lends Megatron its stand-ins and takes every one back: torch is, attribute by attribute, what it was."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_ext.device import backend, device, session
from megatron_ext.device.patches import WITH_CUDA, WITHOUT_CUDA
from megatron_ext.device.patching import Patch, _resolve, applied

needs_cpu_machine = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for machines without CUDA")


def attributes() -> dict[str, dict[str, Any]]:
    """Every attribute of every module and class that a session touches."""
    return {owner: dict(vars(_resolve(owner))) for owner in {patch.owner for patch in WITHOUT_CUDA}}


def differences(before: dict[str, dict[str, Any]]) -> set[str]:
    after = attributes()
    missing = object()
    return {
        f"{owner}.{name}"
        for owner in before
        for name in before[owner] | after[owner]
        if before[owner].get(name, missing) is not after[owner].get(name, missing)
    }


@needs_cpu_machine
def test_inside_a_session_exactly_the_table_is_different() -> None:
    before = attributes()
    with session():
        assert differences(before) == {patch.name for patch in WITHOUT_CUDA}
    assert differences(before) == set()


@needs_cpu_machine
def test_an_exception_restores_everything_too() -> None:
    before = attributes()
    with pytest.raises(ZeroDivisionError), session():
        raise ZeroDivisionError
    assert differences(before) == set()


@needs_cpu_machine
def test_sessions_nest_and_the_outermost_takes_back() -> None:
    before = attributes()
    with session():
        with session():
            pass
        assert torch.zeros(2, device="cuda").device.type == "cpu", "the inner session's end is not the outer one's"
    assert differences(before) == set()


def test_a_patch_that_cannot_be_made_leaves_no_others_behind() -> None:
    def fails(_: Any) -> Any:
        raise ValueError("no stand-in")

    before = torch.cuda.current_device
    table = [Patch("torch.cuda", "current_device", "", lambda _: None), Patch("torch.cuda", "nothing_of_this_name", "", fails)]
    with pytest.raises(ValueError, match="no stand-in"), applied(table):
        pass
    assert torch.cuda.current_device is before
    assert not hasattr(torch.cuda, "nothing_of_this_name")


@needs_cpu_machine
def test_megatrons_way_of_naming_the_device_means_the_cpu() -> None:
    with session():
        assert torch.zeros(2, device="cuda").device == torch.tensor(1.0, device="cuda").device == torch.device("cpu")
        assert torch.ones(2, device=torch.cuda.current_device()).cuda().device == torch.device("cpu")
        assert torch.zeros(2, dtype=torch.bfloat16, device="meta").device.type == "meta", "other devices stay"


@needs_cpu_machine
def test_types_are_named_as_on_cuda_to_megatrons_optimizer_alone() -> None:
    ask = "def ask(tensor): return tensor.type()"
    optimizer: dict[str, Any] = {"__name__": "megatron.core.optimizer.distrib_optimizer"}
    user: dict[str, Any] = {"__name__": "somebody.else"}
    exec(ask, optimizer)
    exec(ask, user)
    with session():
        assert optimizer["ask"](torch.zeros(1)) == "torch.cuda.FloatTensor"
        assert optimizer["ask"](torch.zeros(1).bfloat16()) == "torch.cuda.BFloat16Tensor"
        assert user["ask"](torch.zeros(1)) == "torch.FloatTensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64


@needs_cpu_machine
def test_who_asks_whether_there_is_cuda_is_told_the_truth() -> None:
    with session():
        assert not torch.cuda.is_available()
    assert (device().type, backend()) == ("cpu", "gloo")


def test_on_a_machine_with_cuda_a_session_supplies_the_missing_name_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = attributes()
    with session():
        assert differences(before) <= {patch.name for patch in WITH_CUDA}
        assert [patch.attribute for patch in WITH_CUDA] == ["te_general_gemm"]
    assert differences(before) == set()
    assert backend() == "nccl"


def test_importing_the_package_imports_no_torch() -> None:
    assert subprocess.run([sys.executable, "-c", "import sys, megatron_ext.device; sys.exit('torch' in sys.modules)"], check=False).returncode == 0


def test_the_device_of_a_block_is_respected_inside_a_session_and_after_it() -> None:
    """In a process of its own: torch notes once, for good, which functions such a block reaches. Models that are built on the meta device depend on it."""
    code = """
import torch
from megatron_ext.device import session
with session():
    with torch.device("meta"):
        inside = [torch.zeros(1).device.type, torch.tensor([1.0]).device.type]
with torch.device("meta"):
    after = [torch.zeros(1).device.type, torch.tensor([1.0]).device.type]
assert inside == after == ["meta", "meta"], (inside, after)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
