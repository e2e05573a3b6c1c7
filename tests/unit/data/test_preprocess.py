"""Text becomes an indexed dataset: every document once, in order, whoever made which part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.tokenizer import load_tokenizer, tokenizer_digest, train_tokenizer
from megatron_ext.errors import DataError

ROOT = Path(__file__).parents[3]
WORDS = ("red", "blue", "green", "circle", "square")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DataConfig(), folder, seed=0)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=int(rng.integers(1, 30)))) for _ in range(count)]


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def read(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert np.array_equal(dataset.document_indices, np.arange(len(dataset) + 1))
    return [dataset[number].tolist() for number in range(len(dataset))]


@pytest.mark.parametrize(("block_bytes", "workers"), [(1000, 1), (2000, 2)])
def test_documents_are_there_once_and_in_order_however_they_are_cut(folder: Path, tmp_path: Path, block_bytes: int, workers: int) -> None:
    first, second = texts(23), texts(9, seed=1)
    sources = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)]
    tally = preprocess(sources, tmp_path / "out", folder, workers=workers, block_bytes=block_bytes)
    tokenizer = load_tokenizer(folder)
    found = read(tmp_path / "out")
    assert found == [[*tokenizer.encode(text), tokenizer.eos_id] for text in first + second]
    assert (tally.documents, tally.tokens) == (32, sum(map(len, found)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out.bin", "out.idx", "out.json"]
    assert json.loads((tmp_path / "out.json").read_text())["tokenizer"] == tokenizer_digest(folder)


def test_an_interrupted_run_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(40))

    def interrupt(done: int, total: int, _: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess([source], tmp_path / "out", folder, block_bytes=1000, progress=interrupt)
    assert len(list((tmp_path / "out.parts").glob("part_*.json"))) == 2 and not (tmp_path / "out.idx").exists()
    counts: list[tuple[int, int]] = []
    tally = preprocess([source], tmp_path / "out", folder, block_bytes=1000, progress=lambda done, total, _: counts.append((done, total)))
    assert tally.documents == 40 and 0 < len(counts) < counts[-1][1] == counts[-1][0]
    assert len(read(tmp_path / "out")) == 40


def test_bad_lines_are_named_counted_and_only_left_out_within_what_is_allowed(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "red"}\n{"text": 3}\n\n{"text": "  "}\nnot json\n{"other": "blue"}\n{"text": "blue"}')
    with pytest.raises(DataError, match=r"a\.jsonl:2: cannot be read, nor can 2 other lines so far; mend them, or allow more than 2 bad lines"):
        preprocess([source], tmp_path / "out", folder, max_bad=2)
    tally = preprocess([source], tmp_path / "out", folder, max_bad=3)
    assert (tally.documents, tally.empty, tally.bad) == (2, 1, 3)
    assert tally.named == tuple(f"{source}:{line}" for line in (2, 5, 6))


def test_what_is_missing_or_there_already_is_named(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(3))
    with pytest.raises(DataError, match="there is no such file"):
        preprocess([tmp_path / "absent.jsonl"], tmp_path / "out", folder)
    with pytest.raises(DataError, match="holds no text in the field 'body'"):
        preprocess([source], tmp_path / "out", folder, key="body", max_bad=3)
    preprocess([source], tmp_path / "out", folder)
    with pytest.raises(DataError, match="is a dataset already"):
        preprocess([source], tmp_path / "out", folder)


def test_the_tool_says_what_it_wrote_and_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(5))
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source), "--tokenizer", str(folder), "--workers", "1", "--output"]
    done = subprocess.run([*command, str(tmp_path / "new" / "out")], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "5 documents" in done.stdout
    again = subprocess.run([*command, str(tmp_path / "new" / "out")], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "is a dataset already" in again.stderr
