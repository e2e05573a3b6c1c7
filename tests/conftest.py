"""Fixtures for every test: a world of one rank in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from megatron_ext.parallel.groups import ParallelContext


ROOT = Path(__file__).parent

# Examples are not timed, because machines are busy; where CI is set they are the same in every run, so that a failure is the change's own.
settings.register_profile("here", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who runs beside whom where there are two workers (`--dist loadgroup`): a file's tests one after the other; and those that start ranks of their own never
    beside each other, since each takes the machine for itself and has a time limit."""
    for item in items:
        group = "ranks" if "parallel" in item.path.relative_to(ROOT).parts[:1] else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C, and so would everything they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParallelContext]:
    """One rank, for laws that need no second one. Closed at the end of the module, so that the next one may open another world."""
    from megatron_ext.config.schema import ParallelConfig
    from megatron_ext.device import session
    from megatron_ext.parallel.groups import open_parallel

    store = tmp_path_factory.mktemp("world") / "store"
    with session(), open_parallel(ParallelConfig(), 0, 1, f"file://{store}", seed=0) as opened:
        yield opened
