"""Work in chunks: every prompt in one of them, none twice, none lost; what a stop leaves is taken up, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.schema import DiscoverConfig, EvaluateConfig, ParallelConfig, RLConfig, RolloutConfig, RunConfig
from megatron_ext.errors import StoppedForRequeue
from megatron_ext.inference.chunks import NEVER, Chunks, answer_chunks, facts_of, in_order, open_chunks
from megatron_ext.parallel.stopping import StopRequest
from tests.support.stalling import STALL_AFTER, save_numbers

FACTS = {"rollout.temperature": 1.0, "the checkpoint": "0" * 64}


def config(ep: int = 1, batch_size: int = 2) -> RunConfig:
    """Two data-parallel ranks: two replicas, or one whose ranks share experts."""
    return RunConfig(rollout=RolloutConfig(batch_size=batch_size, replicas=2 // ep, parallel=ParallelConfig(num_ranks=ep, ep=ep)))


def opened(folder: Path, ep: int = 1, **facts: object) -> Chunks:
    """Ten prompts, two at a time: three rounds of two chunks."""
    return open_chunks("evaluate", folder / "chunks", 10, config(ep), {**FACTS, **facts})


@given(st.integers(0, 50), st.integers(1, 4), st.integers(1, 5))
def test_every_prompt_is_in_one_chunk_and_chunks_differ_by_one_prompt_at_most(num_prompts: int, rounds: int, dp: int) -> None:
    chunks = Chunks(Path(), num_prompts, rounds, dp, False)
    parts = [chunks.prompts_of(chunk, range(num_prompts)) for rank in range(dp) for chunk in chunks.left_to(rank)]
    assert sorted(prompt for part in parts for prompt in part) == list(range(num_prompts))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    by_chunk = [chunks.prompts_of(chunk, range(num_prompts)) for chunk in range(chunks.count)]
    assert list(in_order(by_chunk)) == list(range(num_prompts))


def test_a_chunk_has_no_more_prompts_than_a_replica_answers_side_by_side(tmp_path: Path) -> None:
    chunks = opened(tmp_path)
    assert (chunks.count, chunks.rounds) == (6, 3)
    assert [list(chunks.prompts_of(chunk, range(10))) for chunk in range(6)] == [[0, 6], [1, 7], [2, 8], [3, 9], [4], [5]]


def test_finished_chunks_are_not_done_again_but_by_ranks_that_share_experts_with_one_that_has_not_finished(tmp_path: Path) -> None:
    for chunk in (0, 1, 2, 5):
        opened(tmp_path).save(chunk, b"answers")
    assert [opened(tmp_path).left_to(rank) for rank in (0, 1)] == [[4], [3]]
    assert [opened(tmp_path, ep=2).left_to(rank) for rank in (0, 1)] == [[2, 4], [3, 5]]
    assert opened(tmp_path).num_answered() == 2 + 2 + 2 + 1


def test_a_chunk_that_was_being_written_is_not_taken_for_one(tmp_path: Path) -> None:
    chunks = opened(tmp_path)
    (chunks.folder / "0.draft").write_bytes(b"half of")
    assert opened(tmp_path).finished == frozenset() and opened(tmp_path).num_answered() == 0


def test_answers_that_depend_on_other_facts_are_discarded_and_it_is_said_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(tmp_path).save(0, b"answers")
    assert opened(tmp_path).finished == {0}
    assert capsys.readouterr().out == ""
    assert opened(tmp_path, **{"rollout.temperature": 0.5, "the checkpoint": "1" * 64}).finished == frozenset()
    said = capsys.readouterr().out
    assert said.startswith(f"evaluate: the answers in {tmp_path}/chunks are discarded: ")
    assert "rollout.temperature was 1.0, is now 0.5; the checkpoint was 000000000000, is now 111111111111" in said


def test_answers_depend_on_the_settings_that_decide_them_and_on_what_is_in_the_checkpoint_the_tokenizer_and_the_clusters(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    config = RunConfig(output_dir=tmp_path, name=".")

    def facts(clusters: str = "a", manifest: str = "a", tokenizer: str = "a", **changes: object) -> dict[str, object]:
        (tmp_path / "clusters").write_text(clusters)
        (tmp_path / "manifest.json").write_text(manifest)
        (tmp_path / "tokenizer" / "tokenizer.model").write_text(tokenizer)
        return facts_of(config.model_copy(update=changes), ["evaluate"], tmp_path, tmp_path / "clusters")

    def changed(**changes: object) -> list[str]:
        before, after = facts(), facts(**changes)
        return [name for name in before if before[name] != after[name]]

    assert changed(clusters="b") == ["the expert clusters"] and changed(manifest="b") == ["the checkpoint"] and changed(tokenizer="b") == ["the tokenizer"]
    assert changed(evaluate=EvaluateConfig(split="val")) == ["evaluate.split"] and changed(rollout=RolloutConfig(replicas=3)) == ["rollout.replicas"]
    assert changed(rl=RLConfig(steps=3), discover=DiscoverConfig(permutations=7)) == []


def test_answers_whose_facts_were_never_written_down_are_discarded(tmp_path: Path) -> None:
    opened(tmp_path).save(0, b"answers")
    (tmp_path / "chunks" / "begun.json").unlink()
    assert opened(tmp_path).finished == frozenset()


class OnceSaved(StopRequest):
    """Asked for when so many chunks are there."""

    def __init__(self, chunks: Chunks, count: int) -> None:
        super().__init__()
        self._chunks, self._count = chunks, count

    @property
    def asked(self) -> bool:
        return len(self._chunks.saved()) >= self._count


def test_a_stop_does_not_wait_for_ranks_and_the_next_run_does_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each rank saves one of its three chunks, and would sleep for ten minutes."""
    chunks = opened(tmp_path)
    monkeypatch.setenv(STALL_AFTER, "1")
    with pytest.raises(StoppedForRequeue, match="stopped with 4 of 10 prompts answered: run again to resume"):
        answer_chunks("evaluate", chunks, config(), save_numbers, stop=OnceSaved(chunks, 2))
    assert capsys.readouterr().err.endswith("evaluate 4/10\n")
    monkeypatch.delenv(STALL_AFTER)
    before = {path: path.stat().st_mtime_ns for path in chunks.folder.iterdir()}
    contents = answer_chunks("evaluate", opened(tmp_path), config(), save_numbers, stop=NEVER)
    assert list(contents) == [b"[0, 6]", b"[1, 7]", b"[2, 8]", b"[3, 9]", b"[4]", b"[5]"]
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert capsys.readouterr().err.endswith("evaluate 10/10\n")


def test_work_that_is_finished_starts_no_ranks(tmp_path: Path) -> None:
    for chunk in range(6):
        opened(tmp_path).save(chunk, b"%d" % chunk)
    assert list(answer_chunks("evaluate", opened(tmp_path), config(), None, stop=NEVER)) == [b"0", b"1", b"2", b"3", b"4", b"5"]
