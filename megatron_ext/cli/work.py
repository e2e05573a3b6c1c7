"""Brings stages of a run to their end, one after the other, however the command was started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from megatron_ext.cli.execute import Executor, open_run
from megatron_ext.cli.launched import launched
from megatron_ext.cli.run_folder import RunFolder
from megatron_ext.cli.stages import Stage
from megatron_ext.config.load import Resolved


def work(resolved: Resolved, stages: Sequence[Stage], force: bool) -> RunFolder | None:
    """Executes the stages. The folder of the run; None where another process, rank 0 or node 0, is the one to go on with it."""
    with ExitStack() as stack:
        launch = stack.enter_context(launched(os.environ))
        if launch is None:
            return None
        folder = RunFolder(resolved.config.run_dir)

        def opened() -> bool:
            stack.enter_context(folder.locked())
            open_run(resolved)
            return True

        launch.ranks.agree("open", opened)
        executor = Executor(resolved.config, folder, force, launch)
        for number, stage in enumerate(stages, start=1):
            executor.execute(stage, f"[{number}/{len(stages)}] " if len(stages) > 1 else "")
        launch.ranks.agree("done", lambda: True)
        return folder if launch.ranks.lead else None
