"""Benchmarks are alike: the same flags, a page with results, and bars that name what is there."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BENCH, PAGES = ROOT / "tools" / "bench", ROOT / "docs" / "benchmarks"
SCRIPTS = sorted(path for path in BENCH.glob("*.py") if path.stem not in ("all", "bars", "interleave"))


def loaded(name: str) -> ModuleType:
    """A script that is light to import."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCH))


def flags(path: Path) -> set[str]:
    """What the script's parser knows."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return {ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func).endswith("add_argument")}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_has_the_same_flags_and_a_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert {"--rounds", "--json"} <= flags(path)
    assert "description=__doc__" in text, "--help says what it measures"
    assert (PAGES / f"{path.stem}.md").exists()


def test_every_page_has_a_benchmark() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} <= {path.stem for path in SCRIPTS}


def test_the_bars_find_their_sides() -> None:
    bars = loaded("bars")
    assert doctest.testmod(bars).failed == 0
    found = {"16 experts, 8 prompts": {"ours": 300.0, "transformers, dynamic": 100.0, "transformers, static": 200.0}}
    (verdict,) = bars.verdicts("generation", found)
    assert verdict.row == "| generation | 16 experts, 8 prompts | ours / transformers* | 1.5 | >= 1.8 | missed |"
    (cost,) = bars.verdicts("clvr", {"a training step": {"none": 1.0, "three taps": 1.07}})
    assert cost.row.endswith("| 1.07 | <= 1.08 | reached |")
    assert bars.verdicts("generation", {"something else": {"ours": 1.0}}) == []


def test_one_command_knows_them_all_and_says_so() -> None:
    said = subprocess.run([sys.executable, str(BENCH / "all.py"), "--help"], capture_output=True, text=True, check=True).stdout
    assert all(path.stem in said for path in SCRIPTS)
    unknown = subprocess.run([sys.executable, str(BENCH / "all.py"), "--only", "nothing"], capture_output=True, text=True)
    assert unknown.returncode == 1 and "there is no such benchmark" in unknown.stderr


def test_a_benchmark_that_fails_is_said_so_and_the_rest_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    everything = loaded("all")
    assert doctest.testmod(everything).failed == 0
    folder = tmp_path / "tools" / "bench"
    folder.mkdir(parents=True)
    (folder / "broken.py").write_text("raise ValueError('of a kind')")
    (folder / "lonely.py").write_text("import there_is_no_such_peer")
    numbers = {"1 rank(s)": {"asynchronous save: stall": 0.05, "synchronous save": 1.0}}
    (folder / "checkpoint.py").write_text(f"import json, sys\njson.dump({numbers!r}, open(sys.argv[-1], 'w'))")
    monkeypatch.setattr(everything, "HERE", folder)
    monkeypatch.setattr(sys, "argv", ["all.py", "--to", str(tmp_path / "numbers")])
    with pytest.raises(SystemExit) as ended:
        everything.main()
    said = capfd.readouterr().out
    assert ended.value.code == 1
    assert "| broken | failed with exit code 1: ValueError: of a kind |" in said
    assert "| lonely | there_is_no_such_peer is not installed |" in said
    assert "| checkpoint | 1 rank(s) | asynchronous save: stall / synchronous save | 0.05 | <= 0.1 | reached |" in said
