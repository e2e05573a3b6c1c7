"""`plan --emit DIR`: the layout as a configuration that every verb takes, and a batch script for SLURM."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.cli.options import layout_problems
from megatron_ext.config.load import Resolved, explain, load_config
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.fleet import FleetFound
from megatron_ext.parallel.layout_names import AXES
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.search import Found, Search

CONFIG, SBATCH = "config.yaml", "run.sbatch"


def emit(folder: Path, source: Path, overrides: Sequence[str], config: RunConfig, search: Search, found: Found | FleetFound) -> list[Path]:
    """Writes both files; the paths. Raises UserError where they are there already, and ConfigError where the layout does not suit another stage."""
    paths = [folder / CONFIG, folder / SBATCH]
    if existing := [path for path in paths if path.exists()]:
        raise UserError("--emit", f"{existing[0]} is there already", "name another folder, or remove it")
    changes = _fleet_changes(found) if isinstance(found, FleetFound) else _learner_changes(found, search.work.stage)
    learner = found.learner if isinstance(found, FleetFound) else found
    changes |= _other_batches(config, search.work.stage, learner.layout)
    resolved = load_config(source, [*overrides, *(f"{name}={value}" for name, value in changes.items())], [layout_problems])
    origins = {name: "plan" if name in changes else origin for name, origin in resolved.origins.items()}
    folder.mkdir(parents=True, exist_ok=True)
    header = f"# Of {source}, laid out by `megatron-ext plan` for {search.cluster.gpus} x {search.cluster.gpu.name}; what it changed has the origin `plan`."
    paths[0].write_text(f"{header}\n{explain(Resolved(resolved.config, origins))}", encoding="utf-8")
    nodes = -(-search.cluster.gpus // search.cluster.per_node)
    paths[1].write_text(render_sbatch(paths[0], nodes, min(search.cluster.gpus, search.cluster.per_node)), encoding="utf-8")
    return paths


def render_sbatch(config: Path, nodes: int, gpus_per_node: int) -> str:
    """A SLURM script that runs the recipe of a configuration: one task a node, which starts the ranks of its devices."""
    return (
        "#!/bin/bash\n"
        f"#SBATCH --nodes={nodes}\n"
        "#SBATCH --ntasks-per-node=1\n"
        f"#SBATCH --gpus-per-node={gpus_per_node}\n"
        "#SBATCH --exclusive\n"
        "set -euo pipefail\n"
        f"srun megatron-ext run {shlex.quote(str(config))}\n"
    )


def _learner_changes(found: Found, stage: str) -> dict[str, Any]:
    sizes = {f"parallel.{axis}": getattr(found.layout, axis) for axis in AXES}
    return {"parallel.num_ranks": found.layout.num_ranks, **sizes, "parallel.recompute": found.recompute, f"{stage}.micro_batch": found.micro_rows}


def _fleet_changes(found: FleetFound) -> dict[str, Any]:
    rollout = found.rollout
    sizes = {f"rollout.parallel.{axis}": getattr(rollout.layout, axis) for axis in ("num_ranks", "tp", "ep", "etp")}
    return {**_learner_changes(found.learner, "rl"), **sizes, "rollout.replicas": rollout.replicas, "rollout.batch_size": rollout.batch}


def _other_batches(config: RunConfig, planned: str, layout: Layout) -> dict[str, Any]:
    """Batches of the supervised stages that are not planned, so that the whole file stays valid: the next global batch that data parallelism divides, and the
    largest micro-batch below the given one that its share allows."""
    changes: dict[str, Any] = {}
    for name in {"pretrain", "sft"} - {planned}:
        stage = getattr(config, name)
        rows = -(-stage.global_batch // layout.dp) * layout.dp
        share = rows // layout.dp
        if layout.vpp > 1 and share % layout.pp:
            rows, share = layout.dp * layout.pp, layout.pp
        fitting = [
            size for size in range(1, share + 1) if share % size == 0 and size <= stage.micro_batch and (layout.vpp == 1 or share // size % layout.pp == 0)
        ]
        changes |= {f"{name}.global_batch": rows} if rows != stage.global_batch else {}
        changes |= {f"{name}.micro_batch": fitting[-1]} if fitting[-1] != stage.micro_batch else {}
    return changes
