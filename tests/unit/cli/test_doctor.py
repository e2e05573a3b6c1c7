"""doctor: wrong packages are known by their metadata and never imported."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ext.cli import doctor, doctor_machine
from megatron_ext.cli.findings import Finding
from megatron_ext.cli.main import main


@pytest.fixture
def install(tmp_path: Path, monkeypatch):
    """Puts the metadata of a package on the path, and a module that refuses to be imported."""

    def install(name: str, version: str, summary: str = "") -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")
        (tmp_path / f"{name.replace('-', '_')}.py").write_text("raise RuntimeError('imported')\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_the_apex_of_pypi_is_recognised_as_another_package(install) -> None:
    install("apex", "0.9.10.dev0", "Pyramid toolkit to add Velruse, Flash Messages, CSRF")
    found = doctor.apex()
    assert found.verdict == "wrong"
    assert "pip uninstall apex" in found.text
    assert "apex" not in sys.modules


def test_the_real_apex_is_fine_and_a_missing_one_is_only_noted(install) -> None:
    assert doctor.apex().verdict == "note"
    install("apex", "0.1", "PyTorch Extensions written by NVIDIA")
    assert doctor.apex() == Finding("ok", "apex", "0.1")


def test_an_empty_transformer_engine_is_called_what_it_is(install) -> None:
    assert doctor.transformer_engine().verdict == "note"
    install("transformer-engine", "2.20.2")
    assert doctor.transformer_engine().verdict == "wrong"
    install("transformer-engine-cu12", "2.20.2")
    assert doctor.transformer_engine().verdict == "ok"


def test_every_family_of_kernels_has_a_line_that_says_what_runs_why_and_what_is_lost() -> None:
    found = {finding.name: finding for finding in doctor.kernel_families(False, False)}
    assert list(found) == ["attention", "packed attention", "experts", "cross entropy", "Adam", "norms", "weight gradients"]
    assert found["Adam"].verdict == "note" and "neither Transformer Engine nor NVIDIA Apex is installed" in found["Adam"].text
    assert "gradient accumulation is not fused into the weight GEMM" in found["weight gradients"].text
    assert all(("lost: " in finding.text) == (finding.verdict == "note") for finding in found.values())


def test_an_accelerator_that_is_there_is_named_and_a_wrong_one_is_as_good_as_none(install, capsys) -> None:
    assert doctor.kernel_families(True, False)[4].text.startswith("NVIDIA Apex's FusedAdam")
    assert doctor.kernel_families(True, True)[4].text.startswith("Transformer Engine's FusedAdam")
    install("apex", "0.9.10.dev0", "Pyramid toolkit")
    main(["doctor"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "Adam"]
    assert "torch's AdamW" in line and "apex" not in sys.modules


def test_it_says_whether_jobs_can_be_submitted_from_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.slurm().verdict == "note" and "no sbatch here" in doctor.slurm().text
    for name, words in (("sbatch", "echo slurm-wlm 24.11.5"), ("sinfo", "echo error: no controller >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{words}\n")
        (tmp_path / name).chmod(0o755)
    assert doctor.slurm().text == "slurm-wlm 24.11.5, but its controller does not answer (error: no controller): set SLURM_CONF, or start it"
    (tmp_path / "sinfo").write_text("#!/bin/sh\n")
    assert doctor.slurm() == Finding("ok", "slurm", "slurm-wlm 24.11.5")


def test_a_package_that_is_missing_or_too_old_is_told_with_the_command_that_mends_it(install) -> None:
    from packaging.requirements import Requirement

    install("somepackage", "1.0")
    assert doctor._judge(Requirement("somepackage>=1")).verdict == "ok"
    assert doctor._judge(Requirement("somepackage>=2")).text == "1.0 is not >=2: `pip install 'somepackage>=2'`"
    assert doctor._judge(Requirement("no-such-package>=2")).text == "missing: `pip install 'no-such-package>=2'`"


def test_doctor_prints_one_line_a_finding_and_fails_when_something_is_wrong(install, capsys) -> None:
    install("apex", "0.9.10.dev0", "Pyramid toolkit")
    assert main(["doctor"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["wrong", "apex"] for line in lines)
    assert any(line.split()[:2] == ["ok", "python"] for line in lines)


def test_the_machine_is_tried_and_each_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.name: finding for finding in doctor_machine.machine(tmp_path, imports=True)}
    assert list(found)[:3] == ["memory", "disk", "ports"] and found["ports"].verdict == "ok"
    assert found["ranks"].verdict == "ok" and "GB/s" in found["ranks"].text
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9, total=2**20))
    assert doctor_machine.disk(tmp_path).verdict == "note" and "18 bytes a parameter" in doctor_machine.disk(tmp_path).text
    assert "--shm-size" in doctor_machine.memory().text


def test_gpus_that_are_not_all_joined_by_nvlink_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nvidia-smi topo --matrix` of two pairs."""
    table = "        GPU0    GPU1    GPU2    GPU3    CPU Affinity\nGPU0     X      NV12    SYS     SYS     0-31\nGPU1    NV12     X      SYS     SYS     0-31\n"
    table += "GPU2    SYS     SYS      X      NV12    32-63\nGPU3    SYS     SYS     NV12     X      32-63\n"
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{table}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (finding,) = doctor_machine.links()
    assert finding == Finding("note", "gpu links", "4 GPUs joined by NV12, SYS: keep tensor parallelism among those joined by NV")
