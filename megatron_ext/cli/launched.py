"""What a launcher says to the command it starts, through the environment (`slurm.sbatch.j2` sets it). What the command says back: `task_record.py`.

    MEGATRON_EXT_TASKS       ranks: every task of the srun step is a rank of the learner      nodes: task 0 runs the command, the others hold Ray for it
    MEGATRON_EXT_ADDRESSES   of the nodes, in the order of the tasks or of their nodes; the first is where everybody meets
    MEGATRON_EXT_PORT        the port there
    MEGATRON_EXT_LOGS        a folder that all nodes see: STOP in it asks for a stop, token is the Ray cluster's, rank-NNNN.json says how a task ended
    SLURM_PROCID, SLURM_NTASKS, SLURMD_NODENAME

Without MEGATRON_EXT_TASKS the command starts its ranks itself, on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.errors import UserError
from megatron_ext.parallel.launch import LocalRanks, Ranks

if TYPE_CHECKING:
    from megatron_ext.rl.hosts.ray_node import Nodes

Environment = Mapping[str, str]
NEEDED = ("MEGATRON_EXT_ADDRESSES", "MEGATRON_EXT_PORT", "MEGATRON_EXT_LOGS", "SLURM_PROCID", "SLURM_NTASKS")
STOP, TOKEN = "STOP", "token"


@dataclass(frozen=True)
class Launch:
    """How the ranks of this command are started, and which file asks it to stop."""

    ranks: Ranks = field(default_factory=LocalRanks)
    stop_file: Path | None = None
    nodes: Nodes | None = None

    @property
    def stop_asked(self) -> bool:
        return self.stop_file is not None and self.stop_file.exists()


@contextmanager
def launched(environment: Environment) -> Iterator[Launch | None]:
    """The launch that the environment describes. None to a task that has held Ray for the command meanwhile: it has nothing left to do."""
    tasks = environment.get("MEGATRON_EXT_TASKS")
    if tasks is None:
        yield Launch()
        return
    if missing := [name for name in NEEDED if name not in environment]:
        raise UserError("MEGATRON_EXT_TASKS", f"is set, but not {', '.join(missing)}", "start the command with srun from a script that `submit` writes")
    addresses, port = tuple(environment["MEGATRON_EXT_ADDRESSES"].split()), int(environment["MEGATRON_EXT_PORT"])
    number, count, logs = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]), Path(environment["MEGATRON_EXT_LOGS"])
    if tasks == "ranks":
        from megatron_ext.parallel.started_rank import meet

        yield Launch(meet(number, count, addresses[0], port), logs / STOP)
    elif count == 1:
        yield Launch(stop_file=logs / STOP)
    elif number == 0:
        from megatron_ext.rl.hosts.ray_node import Nodes, open_desk
        from megatron_ext.rl.hosts.ray_private import read_token

        read_token(logs / TOKEN)
        with open_desk(addresses[0], port, count) as desk:
            yield Launch(stop_file=logs / STOP, nodes=Nodes(addresses, logs / TOKEN, desk))
    else:
        from megatron_ext.rl.hosts.ray_node import serve_node

        serve_node(addresses, number, port, logs / TOKEN)
        yield None
