"""Evaluation results: reading the file, the table on the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ext.errors import DataError
from megatron_ext.observe.results import read_evaluation
from megatron_ext.observe.summary import print_evaluation, print_summary

ROW = {"n": 200, "greedy": 0.5, "greedy_se": 0.035, "mean@4": 0.45, "mean@4_se": 0.02, "pass@4": 0.8, "blind": 0.1, "chance": 0.11, "cluster_mass": 0.4}


def write(path: Path, greedy: float = 0.5, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {**ROW, "greedy": greedy, **changes}
    path.write_text(json.dumps({"checkpoint": "c", "split": "test", "skills": {"count": row, "ocr": row}, "macro": row}))
    return path


def printed(show, *args: object) -> str:
    stream = io.StringIO()
    show(*args, Console(file=stream, width=140))
    return stream.getvalue()


def test_every_number_is_read_with_the_k_of_its_samples(tmp_path: Path) -> None:
    found = read_evaluation(write(tmp_path / "sft.json"))
    assert found is not None
    assert (found.split, found.samples, list(found.skills)) == ("test", 4, ["count", "ocr"])
    count = found.skills["count"]
    assert (count.n, count.greedy, count.greedy_se, count.mean_at_k, count.mean_at_k_se, count.pass_at_k) == (200, 0.5, 0.035, 0.45, 0.02, 0.8)
    assert (count.blind, count.chance, count.cluster_mass) == (0.1, 0.11, 0.4)


def test_what_was_not_measured_is_none(tmp_path: Path) -> None:
    path = tmp_path / "sft.json"
    path.write_text('{"checkpoint": "c", "split": "val", "skills": {"ocr": {"n": 3, "greedy": 1.0, "greedy_se": NaN, "blind": null}}, "macro": {}}')
    found = read_evaluation(path)
    assert found is not None
    assert found.samples is None
    row = found.skills["ocr"]
    assert (row.greedy, row.greedy_se, row.blind, row.mean_at_k) == (1.0, None, None, None)
    assert read_evaluation(tmp_path / "absent.json") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checkpoint": "c", "split": "t", "skills": {"a": {"greedy": "high"}}, "macro": {}}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sft.json"
    path.write_text(text)
    with pytest.raises(DataError, match="is not the result of an evaluation"):
        read_evaluation(path)


def test_the_table_shows_before_and_after_side_by_side(tmp_path: Path) -> None:
    write(tmp_path / "evaluate" / "sft.json", 0.5)
    write(tmp_path / "evaluate" / "rl.json", 0.61, cluster_mass=0.44)
    text = printed(print_summary, tmp_path)
    assert "0.50+-0.04 -> 0.61+-0.04" in text
    assert "0.40 -> 0.44" in text
    assert "mean@4" in text
    assert "before -> after reinforcement learning" in text


def test_the_table_shows_what_there_is(tmp_path: Path) -> None:
    assert printed(print_summary, tmp_path) == ""
    path = write(tmp_path / "evaluate" / "sft.json", cluster_mass=None)
    assert "->" not in printed(print_summary, tmp_path)
    assert "0.50+-0.04" in printed(print_evaluation, path)
