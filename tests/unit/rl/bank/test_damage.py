"""The bank against the world: kills, full disks, damaged files. What `put` returned for is there; nothing else counts; an error names what and what to do."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys

import pytest

from megatron_ext.batch import NO_TILES
from megatron_ext.errors import StorageError
from megatron_ext.rl.bank import bank as banks
from megatron_ext.rl.bank.bank import open_bank
from megatron_ext.rl.bank.journal import Journal
from tests.support.bank_writer import KEYS, answers_of
from tests.support.rollouts import group, same


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def writer(folder, samples, *more):
    command = [sys.executable, "-m", "tests.support.bank_writer", str(folder), str(samples), *map(str, more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("puts", [1, 7, 20])
def test_after_sigkill_everything_that_was_put_is_there_and_nothing_that_is_half_there_counts(tmp_path, puts):
    with writer(tmp_path, 2) as process:
        said = [int(line) for line in itertools.islice(process.stdout, puts)]
        os.kill(process.pid, signal.SIGKILL)
        said += [int(line) for line in process.stdout]
    assert said == list(range(len(said))) and len(said) >= puts
    bank = open_bank(tmp_path)
    stored = {draw for draw, _ in bank.waiting()}
    assert stored - set(said) <= {len(said)}, "at most the put that was under way, which then counts wholly"
    for draw in sorted(stored | set(said)):
        assert same(list(bank.drawn(draw).scored), answers_of(draw, 2))
    assert len(list((tmp_path / "answers").iterdir())) == len(stored), "no drafts and no segments that do not count"


@pytest.mark.parametrize("moment", ["write_segment", "append"])
def test_a_put_that_ends_in_the_middle_never_happened(tmp_path, monkeypatch, moment):
    """What a kill leaves at either side of the moment when the segment has its name."""
    bank = open_bank(tmp_path)
    bank.put(0, group("a"), [])

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((banks, moment) if moment == "write_segment" else (Journal, moment)), killed)
        with pytest.raises(KeyboardInterrupt):
            bank.put(1, group("b"), [])
    for again in (bank, open_bank(tmp_path)):
        assert again.waiting() == ((0, "a"),) and list(again.drawn(1).scored) == []
    assert len(list((tmp_path / "answers").iterdir())) == 1
    bank = open_bank(tmp_path)
    bank.put(1, group("b"), [])
    assert same(list(open_bank(tmp_path).drawn(1).scored), group("b"))


def test_a_last_line_that_was_not_finished_is_cut_off_and_said(tmp_path, capsys):
    bank = open_bank(tmp_path)
    bank.put(0, group("a"), [])
    bank.train(0, [(0, "a")])
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    bank = open_bank(tmp_path)
    assert "a last line that was not finished" in capsys.readouterr().out
    assert bank.trained(0) is None and bank.waiting() == ((0, "a"),)
    bank.train(0, [(0, "a")])
    assert open_bank(tmp_path).trained(0) == ((0, "a"),) and capsys.readouterr().out == ""


def test_a_line_of_the_journal_that_was_changed_lost_or_moved_is_named(tmp_path):
    bank = open_bank(tmp_path)
    for draw in range(3):
        bank.put(draw, group("a"), [])
    journal = tmp_path / "journal.jsonl"
    one, two, three = journal.read_text().splitlines()
    for lines, place in (
        ([one, two.replace('"draw": 1', '"draw": 4'), three], ":2: or"),
        ([one, three], ":2: or"),
        ([two, one, three], ":1: or"),
        ([one, "{}", three], ":2: is not a line of the journal"),
        ([one, two[:-9], three], ":2: is not a line of the journal"),
    ):
        journal.write_text("\n".join(lines) + "\n")
        with pytest.raises(StorageError, match="journal.jsonl" + place):
            open_bank(tmp_path)


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text[:400] + bytes([text[400] ^ 1]) + text[401:]], ids=["cut", "a bit"])
def test_a_damaged_segment_is_named_with_the_groups_it_held_and_deleting_it_makes_room_for_others(tmp_path, damage):
    bank = open_bank(tmp_path)
    bank.put(0, group("a"), [])
    bank.put(1, [answer for key in "bcdefg" for answer in group(key, 1)], [])
    bank.train(0, [(0, "a")])
    path = tmp_path / "answers" / "draw_000001_000001.parquet"
    path.write_bytes(damage(path.read_bytes()))
    for look in (lambda: bank.drawn(1), lambda: open_bank(tmp_path)):
        with pytest.raises(StorageError, match=r"draw_000001_000001.parquet: .* holds 6 groups of draw 1: b, c, d, e and 2 more; .* delete it and run again"):
            look()
    path.unlink()
    bank = open_bank(tmp_path)
    assert list(bank.drawn(1).scored) == [] and len(bank.account().lost) == 6
    bank.put(1, group("b"), [])
    assert bank.waiting() == ((1, "b"),)


def test_a_damaged_segment_that_nobody_needs_does_not_keep_a_run_from_going_on(tmp_path):
    bank = open_bank(tmp_path)
    bank.put(0, group("a"), [])
    bank.train(0, [(0, "a")])
    (path,) = (tmp_path / "answers").iterdir()
    text = bytearray(path.read_bytes())
    text[300] ^= 1
    path.write_bytes(text)
    bank = open_bank(tmp_path)
    with pytest.raises(StorageError, match="has other contents than were written"):
        bank.groups(bank.trained(0))
    path.unlink()
    with pytest.raises(StorageError, match="a step that trained on it cannot be repeated"):
        open_bank(tmp_path).groups([(0, "a")])


def test_a_damaged_or_missing_image_is_named_and_mended_by_storing_it_again(tmp_path):
    bank = open_bank(tmp_path)
    bank.put(0, group("a"), [])
    (image,) = (tmp_path / "images").iterdir()
    whole = image.read_bytes()
    for text in (whole[:-1], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], None):
        image.unlink()
        if text is not None:
            image.write_bytes(text)
        with pytest.raises(StorageError, match=f"{image.name}: (cannot be read|holds other tiles)"):
            bank.drawn(0)
        bank.images.keep(group("a")[0].rollout.prompt.tiles)
        assert same(list(bank.drawn(0).scored), group("a")) and image.read_bytes() == whole
    assert bank.images.keep(NO_TILES) is NO_TILES


def test_a_file_that_may_not_grow_is_one_clear_error_and_nothing_half_written_counts(tmp_path):
    """First the journal outgrows 4 KiB, which no segment does; then a segment does."""
    with writer(tmp_path, 1, 4096) as process:
        *said, error = process.stdout.read().splitlines()
    assert f"{tmp_path}/answers/draw_000000_000000.parquet: could not be written: File too large; " in error
    assert said == [] and "bytes are free there; make room and run again" in error
    assert list((tmp_path / "answers").iterdir()) == [] and open_bank(tmp_path).waiting() == ()
    with writer(tmp_path, 1, 20000) as process:
        *said, error = process.stdout.read().splitlines()
    assert f"{tmp_path}/journal.jsonl: could not be written: File too large; " in error
    assert len(said) > 9 and open_bank(tmp_path).waiting() == tuple((int(draw), f"{key}{draw}") for draw in said for key in KEYS)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a file system cannot be mounted here: {made.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_one_clear_error_and_with_room_the_run_goes_on(small_disk):
    folder, ballast = small_disk / "rollouts", small_disk / "ballast"
    ballast.write_bytes(bytes(60_000))
    bank, put = open_bank(folder), 0

    def fill():
        nonlocal put
        while True:
            bank.put(put, answers_of(put, 2), [])
            put += 1

    with pytest.raises(StorageError, match=r"rollouts/.*: could not be written: No space left on device; \d+ bytes are free there; make room and run again"):
        fill()
    assert put > 2
    before = files(folder)
    with pytest.raises(StorageError, match="No space left"):
        bank.put(put, answers_of(put, 60), [])
    assert {path for path in files(folder) if path.suffix != ".npy"} == {path for path in before if path.suffix != ".npy"}, "the draft is removed"
    ballast.unlink()
    for reopened in (False, True):
        bank = open_bank(folder) if reopened else bank
        assert bank.waiting() == tuple((draw, f"{key}{draw}") for draw in range(put) for key in KEYS)
        bank.put(put, answers_of(put, 2), [])
        put += 1
    assert same(list(open_bank(folder).drawn(put - 1).scored), answers_of(put - 1, 2))
