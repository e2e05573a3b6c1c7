"""Fixtures for every test: a world of one rank in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from megatron_ext.parallel.groups import ParallelContext


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParallelContext]:
    """One rank, for laws that need no second one. Closed at the end of the module, so that the next one may open another world."""
    from megatron_ext.config.schema import ParallelConfig
    from megatron_ext.device import session
    from megatron_ext.parallel.groups import open_parallel

    store = tmp_path_factory.mktemp("world") / "store"
    with session(), open_parallel(ParallelConfig(), 0, 1, f"file://{store}", seed=0) as opened:
        yield opened
