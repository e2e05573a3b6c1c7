"""The bank: what was put is there, each group is trained on exactly once, everything is accounted for."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.batch import FailedRollout
from megatron_ext.errors import StorageError
from megatron_ext.rl.bank.bank import open_bank
from tests.support.rollouts import draws, group, prompt, same, scored


@settings(max_examples=60)
@given(draws(), st.integers(0, 4), st.booleans())
def test_what_was_put_is_drawn_again_in_the_order_put_whole_and_bit_for_bit(drawn, parts, reopened):
    answers, failures = drawn
    with tempfile.TemporaryDirectory() as folder:
        bank = open_bank(Path(folder) / "rollouts")
        bank.put(7, answers[:parts], [])
        bank.put(7, answers[parts:], failures)
        bank.put(8, [scored(prompt("another draw"), 0)], [])
        if reopened:
            bank = open_bank(Path(folder) / "rollouts")
        found = bank.drawn(7)
        assert same(list(found.scored), list(answers)) and same(list(found.failed), list(failures))


def test_nothing_is_drawn_where_nothing_was_put(tmp_path):
    found = open_bank(tmp_path).drawn(0)
    assert list(found.scored) == [] and list(found.failed) == []


def test_the_answers_of_a_prompt_share_it_and_its_routes_and_images_are_on_disk_once(tmp_path):
    of = prompt("long", length=4000, images=1, pixels=64)

    def size(samples):
        bank = open_bank(tmp_path / str(samples))
        bank.put(0, [scored(of, sample) for sample in range(samples)], [])
        found = bank.drawn(0).scored
        assert len({id(answer.rollout.prompt) for answer in found}) == 1
        return sum(path.stat().st_size for path in (tmp_path / str(samples)).rglob("*") if path.is_file())

    one, many = size(1), size(16)
    shared = 4000 * 2 * 3 * 3 + 64 * 64 * 3
    assert one > 0.8 * shared and many - one < 15 * 1000, "a further answer takes what it says, not what it was asked"


def test_pages_have_checksums(tmp_path):
    bank = open_bank(tmp_path)
    bank.put(0, group("a"), [])
    (path,) = (tmp_path / "answers").iterdir()
    damaged = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(17)
    damaged[start.dictionary_page_offset + start.total_compressed_size - 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


def test_a_group_is_trained_on_by_one_step_whatever_happens_in_between(tmp_path):
    bank = open_bank(tmp_path)
    bank.put(0, group("a") + group("b") + group("c"), [])
    assert bank.waiting() == ((0, "a"), (0, "b"), (0, "c")) and bank.trained(0) is None
    bank.train(0, [(0, "b"), (0, "a")])
    bank.train(0, [(0, "b"), (0, "a")])
    bank = open_bank(tmp_path)
    assert bank.trained(0) == ((0, "b"), (0, "a")) and bank.waiting() == ((0, "c"),)
    bank.train(0, [(0, "b"), (0, "a")])
    with pytest.raises(StorageError, match="step 1 cannot train on a of draw 0: step 0 has, and a group is trained on once"):
        bank.train(1, [(0, "c"), (0, "a")])
    with pytest.raises(StorageError, match="step 0 has trained on b of draw 0 and 1 more; it cannot be repeated on c of draw 0"):
        bank.train(0, [(0, "c")])
    with pytest.raises(StorageError, match="a group twice"):
        bank.train(1, [(0, "c"), (0, "c")])
    with pytest.raises(StorageError, match=r"d of draw 0: it was dropped, or nothing scored of it is stored"):
        bank.train(1, [(0, "d")])
    assert bank.waiting() == ((0, "c"),) and len((tmp_path / "journal.jsonl").read_text().splitlines()) == 2


def test_the_groups_of_a_step_are_restored_in_the_order_of_the_ledger_from_however_many_files(tmp_path):
    bank = open_bank(tmp_path)
    first, second, third = group("a"), group("b"), group("c")
    bank.put(0, [*first[:2], *second], [])
    bank.put(0, [first[2]], [])
    bank.put(1, third, [])
    bank.train(0, [(1, "c"), (0, "a")])
    assert same(bank.groups(bank.trained(0)), [*third, *first])
    assert same(bank.groups(open_bank(tmp_path).trained(0)), [*third, *first])
    with pytest.raises(StorageError, match="nothing scored of x of draw 0 is stored"):
        bank.groups([(0, "x")])


def test_the_same_prompt_in_another_draw_is_another_group(tmp_path):
    bank = open_bank(tmp_path)
    bank.put(0, group("a"), [])
    bank.put(5, group("a", seed=1), [])
    bank.train(0, [(0, "a")])
    bank.train(1, [(5, "a")])
    assert same(bank.groups(bank.trained(1)), group("a", seed=1))


def test_an_answer_cannot_be_put_twice_but_one_that_failed_may_be_scored_later(tmp_path):
    bank = open_bank(tmp_path)
    answers = group("a")
    bank.put(0, answers[:1], [FailedRollout(answers[0].rollout.prompt, 1, "reward_timeout", "")])
    with pytest.raises(ValueError, match="sample 0 of a in draw 0 is in the bank already"):
        bank.put(0, answers, [])
    bank.put(0, answers[1:], [])
    assert same(list(bank.drawn(0).scored), answers) and len(bank.drawn(0).failed) == 1


def test_every_group_is_in_one_place_of_the_account(tmp_path):
    bank = open_bank(tmp_path)
    lone = prompt("f")
    failures = [FailedRollout(lone, 0, "reward_timeout", "no result"), FailedRollout(lone, 1, "prompt_too_long", "")]
    bank.put(0, [answer for key in "abcd" for answer in group(key)], failures)
    bank.put(1, group("e"), [])
    bank.train(0, [(0, "a")])
    bank.drop([(0, "b"), (0, "c")], "stale")
    bank.drop([(0, "c")], "replaced")
    (tmp_path / "answers" / "draw_000001_000001.parquet").unlink()
    for account in (bank.account(), open_bank(tmp_path).account()):
        assert account.trained == {(0, "a"): 0} and account.dropped == {(0, "b"): "stale", (0, "c"): "stale"}
        assert account.failed == ((0, "f"),) and account.failures == {"reward_timeout": 1, "prompt_too_long": 1}
    assert account.waiting == ((0, "d"),) and account.lost == ((1, "e"),)
    with pytest.raises(StorageError, match=r"a of draw 0 cannot be dropped \(stale\): step 0 has trained on it"):
        bank.drop([(0, "d"), (0, "a")], "stale")
    with pytest.raises(StorageError, match="dropped"):
        bank.train(1, [(0, "b")])
    bank = open_bank(tmp_path)
    bank.put(1, group("e"), [])
    assert bank.waiting() == ((0, "d"), (1, "e")) and bank.account().lost == ()


def test_meta_that_json_would_change_is_refused_before_anything_is_written(tmp_path):
    bank = open_bank(tmp_path)
    (answer,) = group("a", samples=1)
    pair = replace(answer.rollout, prompt=replace(answer.rollout.prompt, meta={"box": (1, 2)}))
    with pytest.raises(ValueError, match="the meta of a is not made of JSON values"):
        bank.put(0, [replace(answer, rollout=pair)], [])
    assert list((tmp_path / "answers").iterdir()) == [] and bank.account().waiting == ()


def test_a_failure_may_say_what_no_file_can(tmp_path):
    bank = open_bank(tmp_path)
    bank.put(0, [], [FailedRollout(prompt("a"), 0, "reward_raised", "half a pair: \ud800")])
    assert bank.drawn(0).failed[0].detail == "half a pair: \\ud800"


def test_a_line_of_the_journal_is_json_that_names_what_came_to_count(tmp_path):
    bank = open_bank(tmp_path)
    bank.put(3, group("a", samples=2), [])
    bank.train(3, [(3, "a")])
    put, train = map(json.loads, (tmp_path / "journal.jsonl").read_text().splitlines())
    assert put["kind"] == "put" and put["scored"] == {"a": [0, 1]} and put["file"] == "draw_000003_000000.parquet"
    assert (train["kind"], train["step"], train["groups"]) == ("train", 3, [[3, "a"]])
