"""`doctor`: what is installed, what is missing, the packages that look right and are not, and which kernels will run. Suspects are judged by their metadata,
never imported."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution, requires
from pathlib import Path
from shutil import which

from packaging.requirements import Requirement

from megatron_ext import __version__
from megatron_ext.cli.doctor_machine import machine
from megatron_ext.cli.findings import Finding
from megatron_ext.errors import EXIT_OK, EXIT_USER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where runs are written, for the disk's room (default: here)")
    parser.epilog = "Exit code 0 when everything needed is there, 2 when something is missing or wrong."


def run(args: argparse.Namespace) -> int:
    accelerators = [apex(), transformer_engine()]
    findings = [
        _python(),
        *_required(),
        *accelerators,
        *_devices(),
        *machine(args.folder, all(finding.verdict != "wrong" for finding in accelerators)),
        slurm(),
    ]
    findings += kernel_families(*(finding.verdict == "ok" for finding in accelerators))
    width = max(len(finding.name) for finding in findings)
    print(f"megatron-ext {__version__}")
    for finding in findings:
        print(f"  {finding.verdict:<5}  {finding.name:<{width}}  {finding.text}")
    return EXIT_USER if any(finding.verdict == "wrong" for finding in findings) else EXIT_OK


def apex() -> Finding:
    """NVIDIA Apex is an optional accelerator. The package of that name on PyPI is a toolkit for the Pyramid web framework."""
    found = _find("apex")
    if found is None:
        return Finding("note", "apex", "not installed; optional, used by Megatron on GPUs; install it from github.com/NVIDIA/apex, never from PyPI")
    if "pyramid" in (found.metadata["Summary"] or "").lower() or "velruse" in (found.metadata["Summary"] or "").lower():
        return Finding("wrong", "apex", f"{found.version} is the web toolkit from PyPI, not NVIDIA Apex: `pip uninstall apex`")
    return Finding("ok", "apex", f"{found.version}")


def transformer_engine() -> Finding:
    """The bare `transformer-engine` package is empty; importing it raises, and with it the import of Megatron's layer specifications."""
    found = _find("transformer-engine")
    if found is None:
        return Finding("note", "transformer-engine", "not installed; optional, Megatron would take its Adam and the product of the router")
    if not any(_find(f"transformer-engine-{core}") for core in ("cu12", "cu13")):
        return Finding(
            "wrong", "transformer-engine", f"{found.version} has no CUDA core and breaks the import of megatron.core: `pip uninstall transformer-engine`"
        )
    return Finding("ok", "transformer-engine", f"{found.version}")


def kernel_families(has_apex: bool, has_transformer_engine: bool) -> list[Finding]:
    """Which implementation of every kernel will run here, why, and what is lost."""
    if _find("torch") is None:
        return []
    import torch

    from megatron_ext.device.kernels import report

    choices = report(torch.cuda.is_available(), has_transformer_engine, has_apex)
    return [
        Finding("note" if choice.lost else "ok", name, f"{choice.kernel} ({choice.reason})" + (f"; lost: {choice.lost}" if choice.lost else ""))
        for name, choice in choices.items()
    ]


def slurm() -> Finding:
    """Whether jobs can be submitted from here."""
    if which("sbatch") is None:
        return Finding(
            "note", "slurm", "no sbatch here: `submit --dry-run` writes jobs, a login node submits them; tools/slurm_local/ is a cluster to try them on"
        )
    version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    up = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, check=False)
    if up.returncode != 0:
        reason = (up.stderr.strip().splitlines() or ["no answer"])[-1]
        return Finding("note", "slurm", f"{version or 'sbatch is here'}, but its controller does not answer ({reason}): set SLURM_CONF, or start it")
    return Finding("ok", "slurm", version)


def _python() -> Finding:
    return Finding("ok" if sys.version_info >= (3, 11) else "wrong", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _required() -> list[Finding]:
    """Every dependency of this package with the version found, against the range asked for."""
    try:
        wanted = [Requirement(text) for text in requires("megatron-ext") or ()]
    except PackageNotFoundError:
        return [Finding("wrong", "megatron-ext", "is not installed: `pip install -c constraints.txt -e .`")]
    needed = [item for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})]
    return [_judge(item) for item in sorted(needed, key=lambda item: item.name.lower())]


def _judge(wanted: Requirement) -> Finding:
    found = _find(wanted.name)
    if found is None:
        return Finding("wrong", wanted.name, f"missing: `pip install '{wanted}'`")
    if not wanted.specifier.contains(found.version, prereleases=True):
        return Finding("wrong", wanted.name, f"{found.version} is not {wanted.specifier}: `pip install '{wanted}'`")
    return Finding("ok", wanted.name, found.version)


def _devices() -> list[Finding]:
    cores = Finding("ok", "cpu", f"{len(os.sched_getaffinity(0))} cores for this process")
    if _find("torch") is None:
        return [cores]
    import torch

    if not torch.cuda.is_available():
        return [cores, Finding("note", "gpu", "none: everything runs on the CPU over gloo")]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [cores, Finding("ok", "gpu", ", ".join(names))]


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
