"""What a fresh clone installs: tested versions, nothing local, nothing that only looks right."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
WANTED = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]


def test_every_pin_is_one_exact_public_version() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line), line
    assert PINS["torch"] == "2.13.0"


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_every_dependency_has_a_tested_version_in_its_range(wanted: Requirement) -> None:
    assert wanted.specifier.contains(PINS[wanted.name.lower()])


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_what_is_installed_is_in_range(wanted: Requirement) -> None:
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        pytest.fail(f"{wanted.name} is not installed: make setup")
    assert wanted.specifier.contains(Version(found).public)


@pytest.mark.parametrize("name", ["apex", "transformer-engine", "transformer_engine"])
def test_packages_that_break_the_installation_are_no_dependencies(name: str) -> None:
    assert name not in {wanted.name for wanted in WANTED}
    assert name not in PINS
