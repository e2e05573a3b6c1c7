"""Discovery over many prompts, masses read from disk: `python tools/bench/discovery.py`, results in docs/benchmarks/discovery.md.

For each number of prompts a file of float16 masses with planted clusters is made, and a fresh process discovers the clusters in it: its CPU seconds, elapsed
seconds, and the most memory that it ever held (VmHWM, which counts numpy and all else). The smallest of several sizes is also done in memory, and
must find the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_ext.config.rl_schema import DiscoverConfig
from megatron_ext.earl.clusters import ExpertClusters, discover
from megatron_ext.earl.masses import MassFile

SKILLS, TEMPLATES, EVERY, EXPERTS_OF_SKILL, BOOST = 5, 3, 3, 2, 2.0


def labels(prompts: int) -> tuple[list[str], list[str]]:
    return [f"skill {row % SKILLS}" for row in range(prompts)], [f"template {row // SKILLS % TEMPLATES}" for row in range(prompts)]


def make(path: Path, prompts: int, layers: int, experts: int) -> None:
    """Gamma draws, two experts of each skill doubled in every third layer, divided by their sum: layer by layer, as the file has them."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": (layers, prompts, experts), "fortran_order": False, "descr": "<f2"})
        for layer in range(layers):
            mass_NE = rng.standard_gamma(1.0, size=(prompts, experts), dtype=np.float32)
            for skill in range(SKILLS * (layer % EVERY == 0)):
                mass_NE[skill::SKILLS, skill * EXPERTS_OF_SKILL : (skill + 1) * EXPERTS_OF_SKILL] *= BOOST
            (mass_NE / mass_NE.sum(axis=1, keepdims=True)).astype(np.float16).tofile(file)


def settings(options: argparse.Namespace) -> DiscoverConfig:
    """Effects of one expert among 128 are small beside the default of `min_risk_difference`."""
    return DiscoverConfig(permutations=options.permutations, method=options.method, min_risk_difference=0.002)


def search(path: Path, config: DiscoverConfig, in_memory: bool = False) -> ExpertClusters:
    masses = MassFile(path)
    whole = np.load(path, allow_pickle=False).transpose(1, 0, 2).astype(np.float64) if in_memory else masses
    return discover(whole, *labels(masses.shape[0]), config, seed=0, block_bytes=1 << 40 if in_memory else 1 << 27)


def report(path: Path, options: argparse.Namespace, in_memory: bool) -> None:
    """What a process of its own prints."""
    began = time.perf_counter()
    clusters = search(path, settings(options), in_memory)
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    pairs = {found.skill: clusters.pairs(found.skill) for found in clusters.skills}
    right = sum(layer % EVERY == 0 and expert // EXPERTS_OF_SKILL == int(skill[-1]) for skill, own in pairs.items() for layer, expert in own)
    told = {"cpu_s": time.process_time(), "elapsed_s": time.perf_counter() - began, "peak_mib": int(line.split()[1]) / 1024}
    print(json.dumps({**told, "pairs": sum(map(len, pairs.values())), "right": right, "found": pairs}))


def measure(path: Path, options: argparse.Namespace, in_memory: bool = False) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(path), "--permutations", str(options.permutations), "--method", options.method]
    told = subprocess.run([*command, *["--in-memory"] * in_memory], check=True, capture_output=True, text=True).stdout
    return dict(json.loads(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each size; the median of CPU seconds is shown (%(default)s)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2000, 10000, 100000], help="sizes (%(default)s)")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--method", default="topm", help="discover.method (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the files go, one at a time (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        report(options.one, options, options.in_memory)
        return
    found: dict[str, dict[str, float]] = {}
    print(f"{options.layers} layers of {options.experts} experts, {SKILLS} skills, {options.permutations} permutations, {options.method}\n")
    print("| prompts | masses | file, MiB | CPU, s | elapsed, s | peak memory, MiB | pairs found | of them planted |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "mass.npy"
        for prompts in sorted(options.prompts):
            make(path, prompts, options.layers, options.experts)
            for where in ("on disk", "in memory")[: 2 if prompts == min(options.prompts) and len(options.prompts) > 1 else 1]:
                runs = sorted((measure(path, options, where == "in memory") for _ in range(options.rounds)), key=lambda run: run["cpu_s"])
                run = found[f"{prompts} prompts, {where}"] = runs[len(runs) // 2]
                sizes = f"{path.stat().st_size / 2**20:.0f} | {run['cpu_s']:.0f} | {run['elapsed_s']:.0f} | {run['peak_mib']:.0f}"
                print(f"| {prompts} | {where} | {sizes} | {run['pairs']} | {run['right']} |", flush=True)
    if len({json.dumps(run["found"]) for name, run in found.items() if name.startswith(f"{min(options.prompts)} ")}) > 1:
        sys.exit("what was found on disk is not what was found in memory")
    if options.json:
        options.json.write_text(json.dumps({name: {key: value for key, value in run.items() if key != "found"} for name, run in found.items()}, indent=1))


if __name__ == "__main__":
    main()
