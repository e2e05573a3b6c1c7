"""`plan CONFIG --gpus N`: which layouts a stage can have on a number of devices, what each needs and takes, and why others cannot be. Never imports torch."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.cli.plan_emit import emit
from megatron_ext.cli.plan_tables import Printer
from megatron_ext.config.load import Resolved, load_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.errors import EXIT_OK, ConfigError, UserError
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.calibrate import Fitted, calibrate
from megatron_ext.parallel.planner.fleet import FleetFound, FleetPlans, FleetSearch
from megatron_ext.parallel.planner.hardware import Cluster, find_gpu, read_gpus
from megatron_ext.parallel.planner.layout_names import AXES, RECOMPUTE, Named, parse_name
from megatron_ext.parallel.planner.rollouts import answers_of
from megatron_ext.parallel.planner.search import Found, Plans, Search
from megatron_ext.parallel.planner.workload import Assumed, StageName, prompt_tokens, tiles_of_a_row, workload

_EPILOG = """Nothing is trained and no GPU is needed: memory and times are predicted by formula; docs/plans.md says what was checked against what.
A layout is written as TP4xPP2xEP8; what it does not name is 1. Recompute and rows of a micro-batch may follow: TP4xEP8-full-mb2.

examples:
  megatron-ext plan examples/internvl3_5_30b_a3b/sft.yaml --gpus 64
  megatron-ext plan examples/internvl3_5_30b_a3b/sft.yaml --gpus 64 --gpu h200 sft.train_vision=false
  megatron-ext plan examples/internvl3_5_30b_a3b/sft.yaml --gpus 64 --why TP2xPP2xEP8
  megatron-ext plan examples/internvl3_5_30b_a3b/rl.yaml --gpus 64 --gpu h200 --response-tokens 1500
  megatron-ext plan examples/internvl3_5_30b_a3b/sft.yaml --gpus 64 --only tp=1 --emit plans/tp1
  megatron-ext plan examples/tiny.yaml --gpus 2 --gpu cpu-core --gpus-per-node 2 --calibrate runs/tiny"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as examples/internvl3_5_30b_a3b/sft.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those of the file, such as sft.train_vision=false")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="devices")
    parser.add_argument(
        "--gpu", default="h100-80gb", metavar="TYPE", help="their type (default h100-80gb): a name of megatron_ext/parallel/planner/gpus.yaml, or its start"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="devices of a node (default 8)")
    parser.add_argument("--gpus-file", type=Path, metavar="FILE", help="more types, or other numbers, in the form of megatron_ext/parallel/planner/gpus.yaml")
    parser.add_argument("--stage", choices=("pretrain", "sft", "rl"), help="default: rl where the file says something of it, else sft, else pretrain")
    parser.add_argument("--only", nargs="+", default=[], metavar="AXIS=N", help="keep axes fixed: tp, cp, pp, vpp, ep, etp")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="default: the least that fits")
    parser.add_argument("--row-tokens", type=float, metavar="N", help="mean length of a row, for times (default: data.max_length)")
    parser.add_argument("--row-tiles", type=int, metavar="N", help="image tiles of a row (default: one picture of the most tiles)")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="rl: length of a prompt with its images (default: its images and as much text)")
    parser.add_argument("--response-tokens", type=float, metavar="N", help="rl: mean length of a response (default: rollout.max_new_tokens)")
    parser.add_argument("--price", type=float, metavar="X", help="of a device and hour: adds the cost of a step")
    parser.add_argument("--why", metavar="LAYOUT", help="one layout: memory and time by part, its rank and what costs it, or the rules that refuse it")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="layouts to show (default 12)")
    parser.add_argument("--refused", action="store_true", help="show every family that is refused")
    parser.add_argument("--calibrate", type=Path, nargs="+", default=[], metavar="RUN_DIR", help="fit the free constants of the type to finished runs first")
    parser.add_argument("--emit", type=Path, metavar="DIR", help="write config.yaml and run.sbatch for the best layout, or for that of --why")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.epilog = _EPILOG


@dataclass(frozen=True)
class Asked:
    """The question, ready to be answered."""

    resolved: Resolved
    search: Search
    fleet: FleetSearch | None
    fitted: Fitted | None


def run(args: argparse.Namespace) -> int:
    asked = _asked(args)
    printer = Printer(asked.search, asked.fleet, args.price)
    if args.why:
        return _why(args, asked, printer)
    with _without_collector():
        plans = asked.fleet.run() if asked.fleet else asked.search.run()
    if args.json:
        print(json.dumps(_json(asked, plans, args.top, args.price), indent=1))
    else:
        printer.assumptions(asked.fitted)
        printer.plans(plans, args.top, args.refused)
    if not plans.found:
        raise UserError(f"--gpus {args.gpus}", f"no layout fits {asked.search.cluster.gpu.name}", "the refusals above say what is missing")
    if args.emit:
        _emit(args, asked, plans.found[0])
    return EXIT_OK


@contextmanager
def _without_collector() -> Iterator[None]:
    """A search makes many small values and no cycles: looking for some takes a fifth of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _asked(args: argparse.Namespace) -> Asked:
    for flag in ("gpus", "gpus_per_node"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}", f"{getattr(args, flag)} is not a number of devices", "use at least 1")
    resolved = load_config(Path(args.config), args.overrides)
    config, gpu = resolved.config, find_gpu(args.gpu, read_gpus(args.gpus_file))
    if config.parallel.engine != "megatron":
        raise UserError("parallel.engine", f"{config.parallel.engine} is not planned: only the layouts of engine megatron are counted", "use engine=megatron")
    fitted = calibrate(args.calibrate, gpu) if args.calibrate else None
    cluster = Cluster(fitted.gpu if fitted else gpu, args.gpus, args.gpus_per_node)
    assumed = Assumed(args.row_tokens, args.row_tiles, args.response_tokens, args.prompt_tokens)
    work = workload(config, args.stage or _stage(resolved), assumed)
    search = Search(config, work, cluster, _axes(args.only), (args.recompute,) if args.recompute else RECOMPUTE)
    tiles = tiles_of_a_row(config, assumed)
    fleet = FleetSearch(search, answers_of(config, prompt_tokens(config, assumed), args.response_tokens, tiles)) if work.stage == "rl" else None
    return Asked(resolved, search, fleet, fitted)


def _stage(resolved: Resolved) -> StageName:
    """What the file is about: the last stage of which it says something."""
    said = {name.split(".")[0] for name, origin in resolved.origins.items() if origin != "default" and not origin.startswith("preset")}
    return "rl" if said & {"rl", "rollout"} else "sft" if "sft" in said or "pretrain" not in said else "pretrain"


def _axes(words: Sequence[str]) -> dict[str, int]:
    axes = {}
    for word in words:
        axis, _, size = word.partition("=")
        if axis not in AXES or not size.isdigit() or int(size) < 1:
            raise UserError("--only", f"{word!r} is no axis with a size", "write for example tp=2 pp=4")
        axes[axis] = int(size)
    return axes


def _why(args: argparse.Namespace, asked: Asked, printer: Printer) -> int:
    """One layout of the learner."""
    named = parse_name(args.why)
    layout = layout_of(named, asked.search.cluster.gpus)
    judged = asked.search.judge(layout, named.recompute, named.micro_rows)
    if isinstance(judged, list):
        raise ConfigError(judged) if judged else UserError("--why", f"{args.why} is refused", "")
    plans = asked.search.run()
    if args.json:
        print(json.dumps(_found(judged, args.price), indent=1))
    else:
        printer.assumptions(asked.fitted)
        printer.why(judged, plans)
    if args.emit:
        if asked.fleet is not None:
            raise UserError("--emit", "with --why writes supervised stages only: a layout of rl is that of learner and rollouts together", "use --only")
        _emit(args, asked, judged)
    return EXIT_OK


def layout_of(named: Named, gpus: int) -> Layout:
    """The layout that a name means on a number of devices; data parallelism takes what is left. Raises UserError where nothing whole is left."""
    sizes = {axis: named.axes.get(axis, 1) for axis in ("tp", "cp", "pp", "vpp", "ep")}
    dense = sizes["tp"] * sizes["cp"] * sizes["pp"]
    if gpus % dense:
        raise UserError("--why", f"--gpus {gpus} do not divide by tp * cp * pp = {dense}", f"use a multiple of {dense} devices, or another layout")
    dp = gpus // dense
    if named.axes.get("dp", dp) != dp:
        raise UserError("--why", f"DP{named.axes['dp']} is not what --gpus {gpus} leave over tp * cp * pp = {dense}", f"leave it out, or write DP{dp}")
    return Layout.of(ParallelConfig(num_ranks=gpus, etp=named.axes.get("etp"), **sizes))


def _emit(args: argparse.Namespace, asked: Asked, found: Found | FleetFound) -> None:
    paths = emit(args.emit, Path(args.config), args.overrides, asked.resolved.config, asked.search, found)
    print("\n".join(f"written: {path}" for path in paths), file=sys.stderr if args.json else sys.stdout)


def _json(asked: Asked, plans: Plans | FleetPlans, top: int, price: float | None) -> dict[str, Any]:
    refused = [{"family": one.family, "layouts": one.layouts, "error": str(one.error)} for one in plans.refused]
    return {
        "stage": asked.search.work.stage,
        "workload": asdict(asked.search.work),
        "gpus": asked.search.cluster.gpus,
        "gpus_per_node": asked.search.cluster.per_node,
        "gpu": asked.search.cluster.gpu.model_dump(),
        "measured": [asdict(run) for run in asked.fitted.runs] if asked.fitted else [],
        "num_found": len(plans.found),
        "found": [_found(one, price) for one in plans.found[:top]],
        "refused": refused,
    }


def _found(one: Found | FleetFound, price: float | None = None) -> dict[str, Any]:
    if isinstance(one, Found):
        totals = {"name": one.name, "memory_bytes": one.memory.total_bytes, "step_s": one.times.total_s}
        return {**totals, **_cost(one.times.total_s, one.layout.num_ranks, price), "tokens_per_s": one.tokens_per_s, **asdict(one)}
    rollout = {"name": one.rollout.name, "memory_bytes": one.rollout.memory.total_bytes, **asdict(one.rollout)}
    totals = {"step_s": one.step_s, "overlapped_s": one.overlapped_s, "tokens_per_s": one.tokens_per_s, "refit_s": one.refit_s}
    shares = {"colocated": one.colocated, "learner_gpus": one.learner_gpus, "rollout_gpus": one.rollout_gpus}
    return {**shares, **totals, **_cost(one.step_s, one.gpus, price), "learner": _found(one.learner), "rollout": rollout}


def _cost(step_s: float, gpus: int, price: float | None) -> dict[str, float]:
    """Of a step."""
    hours = step_s * gpus / 3600
    return {"gpu_hours": hours} if price is None else {"gpu_hours": hours, "cost": hours * price}
