"""Clusters in use against clusters found again, with overlaps worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ext.earl.drift import drift, followed, stale_share
from tests.unit.earl.test_causal import clusters


def fresh(ocr: int = 10, count: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Answers that put 0.7 on expert 1 (ocr) or on expert 2."""
    rows = [[0.1, 0.7, 0.1, 0.1]] * ocr + [[0.1, 0.1, 0.7, 0.1]] * count
    return np.array(rows)[:, None], np.array(["ocr"] * ocr + ["count"] * count)


def test_overlap_and_mass_by_hand() -> None:
    """ocr had experts 0 and 1 and has 1 and 2 now: one of three in common; 0.1 + 0.7 of its mass is on the old ones. count is as it was."""
    ocr, count = drift(clusters(ocr=(0, 1), count=(2,)), clusters(count=(2,), ocr=(1, 2)), *fresh())
    assert ocr.jaccard == pytest.approx(1 / 3) and ocr.mass == pytest.approx(0.8) and ocr.mass_before == pytest.approx(0.5)
    assert count.jaccard == 1 and count.mass == pytest.approx(0.7)
    assert stale_share((ocr, count), 0.6) == 0.5 and stale_share((), 0.6) is None


def test_a_skill_with_too_few_answers_is_not_compared_and_one_without_a_cluster_is_left_out() -> None:
    few, none = drift(clusters(ocr=(1,), count=(2,), color=()), clusters(ocr=(1,)), *fresh(ocr=7, count=0))
    assert (few.skill, few.num_prompts, few.status, few.jaccard) == ("ocr", 7, "ok", None)
    assert (none.skill, none.num_prompts, none.status, none.mass) == ("count", 0, None, None)


def test_a_cluster_that_is_not_found_again_overlaps_by_nothing() -> None:
    assert drift(clusters(ocr=(1,)), clusters(ocr=(), count=(2,)), *fresh())[0].jaccard == 0


def test_what_is_found_again_is_followed_and_nothing_else() -> None:
    old, new = clusters(ocr=(0, 1), count=(2,), color=()), clusters(color=(3,), ocr=(1, 2), count=())
    now = followed(old, new)
    assert [now.pairs(skill) for skill in ("ocr", "count", "color")] == [((0, 1), (0, 2)), ((0, 2),), ()]
    assert [found.skill for found in now.skills] == ["ocr", "count", "color"]
