"""`plan --emit DIR`: the layout as a configuration that every verb takes, and the job that `submit` writes of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.cli.options import layout_problems
from megatron_ext.config.load import Resolved, explain, load_config
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.fleet import FleetFound
from megatron_ext.parallel.planner.layout_names import sizes_of
from megatron_ext.parallel.planner.search import Found, Search

CONFIG, SBATCH = "config.yaml", "run.sbatch"


def emit(folder: Path, source: Path, overrides: Sequence[str], config: RunConfig, search: Search, found: Found | FleetFound) -> list[Path]:
    """Writes both files; the paths. Raises UserError where they are there already, and ConfigError where the layout does not suit another stage."""
    paths = [folder / CONFIG, folder / SBATCH]
    if existing := [path for path in paths if path.exists()]:
        raise UserError("--emit", f"{existing[0]} is there already", "name another folder, or remove it")
    changes = _fleet_changes(found) if isinstance(found, FleetFound) else _learner_changes(found, search.work.stage, by_rows=not search.work.micro_tokens)
    learner = found.learner if isinstance(found, FleetFound) else found
    changes |= _other_batches(config, search.work.stage, learner.layout)
    resolved = load_config(source, [*overrides, *(f"{name}={'null' if value is None else value}" for name, value in changes.items())], [layout_problems])
    origins = {name: "plan" if name in changes else origin for name, origin in resolved.origins.items()}
    folder.mkdir(parents=True, exist_ok=True)
    header = f"# Of {source}, laid out by `megatron-ext plan` for {search.cluster.gpus} x {search.cluster.gpu.name}; what it changed has the origin `plan`."
    paths[0].write_text(f"{header}\n{explain(Resolved(resolved.config, origins))}", encoding="utf-8")
    paths[1].write_text(_job(paths[0], resolved.config, search), encoding="utf-8")
    return paths


def _job(config: Path, resolved: RunConfig, search: Search) -> str:
    """The job that `submit` would hand to SLURM for the planned stage on these devices."""
    from megatron_ext.cli import submit  # brings jinja2, which planning does not need

    parser = argparse.ArgumentParser()
    submit.add_arguments(parser)
    cluster, stage = search.cluster, search.work.stage
    nodes, gpus = -(-cluster.gpus // cluster.per_node), min(cluster.gpus, cluster.per_node)
    args = parser.parse_args([str(config), "--until", stage, "--nodes", str(nodes), "--gpus-per-node", str(gpus)])
    return submit.render(resolved, stage, args)


def _learner_changes(found: Found, stage: str, by_rows: bool = True) -> dict[str, Any]:
    sizes = {f"parallel.{axis}": size for axis, size in sizes_of(found.layout).items()}
    rows = {f"{stage}.micro_batch": found.micro_rows} if by_rows else {}
    return {"parallel.num_ranks": found.layout.num_ranks, **sizes, "parallel.recompute": found.recompute, **rows}


def _fleet_changes(found: FleetFound) -> dict[str, Any]:
    rollout = found.rollout
    axes = sizes_of(rollout.layout)
    sizes = {"rollout.parallel.num_ranks": rollout.layout.num_ranks, **{f"rollout.parallel.{axis}": axes[axis] for axis in ("tp", "ep", "etp")}}
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
        changes |= {f"{name}.micro_batch": fitting[-1]} if not stage.micro_batch_tokens and fitting[-1] != stage.micro_batch else {}
    return changes
