"""Every patch of a device session is still needed: Megatron works with all of them, and fails in one thing without any single one."""

from __future__ import annotations

import pytest

from megatron_ext.device.patches import WITHOUT_CUDA
from megatron_ext.parallel.local import run_ranks
from tests.support.patch_probes import PROBES, run_probes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, str]]:
    return run_ranks(run_probes, 2, timeout_s=110)[0]


def test_every_patch_has_a_probe_and_a_reason() -> None:
    assert [patch.name for patch in WITHOUT_CUDA] == list(PROBES)
    assert all(patch.why for patch in WITHOUT_CUDA)


@pytest.mark.parametrize("name", PROBES)
def test_megatron_needs_the_patch_and_nothing_more(outcomes: dict[str, tuple[str, str]], name: str) -> None:
    with_all, without_it = outcomes[name]
    assert not with_all, f"fails although every patch is applied:\n{with_all}"
    assert without_it, f"works without the patch: Megatron no longer needs {name}, remove it"
