"""The folder of checkpoints: whole or not at all, the newest kept, damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ext.checkpoint import folder as files
from megatron_ext.errors import CheckpointError


def publish(folder: Path, step: int, keep: int = 2, text: str = "weights") -> Path:
    draft = files.prepare(folder, step)
    (draft / "data").write_text(text)
    return files.publish(folder, step, draft, {"data": files.describe_file(draft / "data")}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        publish(tmp_path, step)
    assert names(tmp_path) == ["latest", "step_000010", "step_000100"]
    assert (tmp_path / "latest").read_text() == "step_000100\n"
    assert files.latest_step(tmp_path) == 100


def test_the_checkpoint_just_written_is_kept_even_when_later_steps_stand_beside_it(tmp_path: Path) -> None:
    """A run that was set back to step 5 and saves at 6 must not lose what it saved."""
    publish(tmp_path, 10)
    publish(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["latest", "step_000006"]


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    publish(tmp_path, 5, text="old")
    publish(tmp_path, 5, text="new")
    assert names(tmp_path) == ["latest", "step_000005"]
    assert (tmp_path / "step_000005" / "data").read_text() == "new"


def test_a_save_that_never_finished_is_not_seen_and_gets_replaced(tmp_path: Path) -> None:
    publish(tmp_path, 5)
    (files.prepare(tmp_path, 10) / "half").write_text("...")
    assert files.latest_step(tmp_path) == 5
    assert files.find_checkpoint(tmp_path).name == "step_000005"
    publish(tmp_path, 10)
    assert names(tmp_path / "step_000010") == ["data", "manifest.json"]


def test_drafts_of_other_steps_are_removed_by_the_next_save(tmp_path: Path) -> None:
    (files.prepare(tmp_path, 10) / "half").write_text("...")
    publish(tmp_path, 12)
    assert names(tmp_path) == ["latest", "step_000012"]


def test_a_step_that_was_being_saved_again_when_everything_ended_is_still_there(tmp_path: Path) -> None:
    """Between the two renames the old checkpoint stands under another name; the next save puts it back."""
    publish(tmp_path, 5)
    (tmp_path / "step_000005").rename(tmp_path / "step_000005.old")
    assert files.find_checkpoint(tmp_path).name == "step_000005.old"
    files.prepare(tmp_path, 7)
    assert files.find_checkpoint(tmp_path).name == "step_000005"


def test_the_newest_are_those_of_the_highest_steps_whatever_their_length(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        publish(tmp_path, step)
    assert names(tmp_path) == ["latest", "step_1000000", "step_1000001"]


def test_a_manifest_that_was_changed_has_another_digest(tmp_path: Path) -> None:
    path = publish(tmp_path, 5) / "manifest.json"
    path.write_text(path.read_text().replace('"bytes": 7', '"bytes": 8'))
    with pytest.raises(CheckpointError, match=r"manifest\.json: has the digest"):
        files.read_manifest(path.parent)


def test_nothing_saved_means_no_latest_step(tmp_path: Path) -> None:
    assert files.latest_step(tmp_path) is None
    assert files.latest_step(tmp_path / "absent") is None


@pytest.mark.parametrize("path", ["absent", "empty"])
def test_a_missing_checkpoint_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"{path}: no checkpoint here"):
        files.find_checkpoint(tmp_path / path)


def test_a_latest_that_names_a_removed_folder_or_nonsense_is_an_error(tmp_path: Path) -> None:
    publish(tmp_path, 5)
    (tmp_path / "latest").write_text("step_000007")
    with pytest.raises(CheckpointError, match=r"step_000007: named by .*latest"):
        files.find_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("the last one")
    with pytest.raises(CheckpointError, match="'the last one'"):
        files.latest_step(tmp_path)


def damage_shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[0] ^= 1
    path.write_bytes(bytes(contents))


@pytest.mark.parametrize(
    ("damage", "words"),
    [(damage_shorter, "has 6 bytes, was saved with 7"), (damage_bit, "other contents"), (Path.unlink, "is missing")],
    ids=["shorter", "bit", "gone"],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, damage: object, words: str) -> None:
    checkpoint = publish(tmp_path, 5)
    entry = files.read_manifest(checkpoint)["data"]
    assert files.check_file(checkpoint, "data", entry) is None
    damage(checkpoint / "data")  # type: ignore[operator]
    assert words in str(files.check_file(checkpoint, "data", entry))


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"files": {"data": 3}}), json.dumps({"files": {"data": {"bytes": "x", "sha256": ""}}})])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    checkpoint = publish(tmp_path, 5)
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is not a manifest"):
        files.read_manifest(checkpoint)
