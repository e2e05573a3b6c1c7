"""Fixtures for every test: a world of one rank in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from megatron_ext.parallel.groups import ParallelContext


# Examples are not timed, because machines are busy; where CI is set they are the same in every run, so that a failure is the change's own.
settings.register_profile("here", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("here")


class ByFile(LoadScopeScheduling):
    """A file's tests run one after the other on the same worker; and those that start ranks of their own never beside each other, since each takes the machine
    for itself and has a time limit."""

    def _split_scope(self, nodeid: str) -> str:
        return "ranks" if nodeid.startswith("tests/parallel/") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


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
