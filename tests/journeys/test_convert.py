"""`convert` as a user types it: there, back, and what is said when it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.config.load import load_config
from tests.support import hf


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_ext.cli", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(tmp_path_factory.mktemp("convert") / "hf")


@pytest.mark.journey
def test_there_and_back(source: Path, tmp_path: Path) -> None:
    there = convert("--from", "hf", "--to", "megatron", source, tmp_path / "ours")
    assert there.returncode == 0, there.stderr
    assert "image token 5" in there.stdout and f"sft.init_from={tmp_path / 'ours'}" in there.stdout
    assert load_config(tmp_path / "ours" / "model.yaml", []).config.model.num_layers == 3
    back = convert("--from", "megatron", "--to", "hf", tmp_path / "ours", tmp_path / "back", "--like", source)
    assert back.returncode == 0, back.stderr
    before, after = hf.tensors(source), hf.tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(tensor.equal(after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "hf", "--to", "hf", "SRC", "out"], "--from hf --to hf converts nothing"),
        (["--from", "hf", "--to", "megatron", "absent", "out"], "SRC: there is no folder absent"),
        (["--from", "megatron", "--to", "hf", "SRC", "out"], "no checkpoint here"),
        (["--from", "megatron", "--to", "hf", "SRC", "out", "--max-shard-size", "big"], "--max-shard-size: 'big' is not a size; write for example 5GB"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(source: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = convert(*[str(source) if word == "SRC" else str(tmp_path / word) if word in ("out", "absent") else word for word in arguments])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words.replace("absent", str(tmp_path / "absent")) in done.stderr


@pytest.mark.parametrize(
    ("stage", "layout"), [("sft", "ep 8 x etp 1 x edp 1; recompute full"), ("rl", "8 = tp 2 x cp 1 x dp 2 x pp 2; experts: ep 4 x etp 1 x edp 1")]
)
def test_the_recipes_of_the_published_model_are_clean_once_their_files_are_there(source: Path, tmp_path: Path, stage: str, layout: str) -> None:
    """Files of the right names stand in for what cannot be downloaded; sizes and layout are those of the published model."""
    recipe = Path(__file__).parents[2] / "examples" / "internvl3_5_30b_a3b" / f"{stage}.yaml"
    (tmp_path / "mine.jsonl").write_text("{}")
    named = [f"data.path={tmp_path}/mine.jsonl", f"data.tokenizer={source}", f"{stage}.init_from={source}"]
    command = [sys.executable, "-m", "megatron_ext.cli", "run", str(recipe), "--dry-run"]
    missing = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert missing.returncode == 2 and "data.tokenizer: there is no InternVL3_5-30B-A3B-HF" in missing.stderr
    clean = subprocess.run([*command, *named], capture_output=True, text=True, timeout=100)
    assert clean.returncode == 0, clean.stderr
    assert layout in clean.stdout
    total = int(next(line for line in clean.stdout.splitlines() if line.startswith("parameters")).split()[1].replace(",", ""))
    assert total == pytest.approx(30.8e9, rel=0.02)
