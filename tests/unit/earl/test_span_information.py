"""Information of spans: none where experts do not know the skill, a bit where they tell two apart; prompts without the span take no part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.earl.masses import MassArray
from megatron_ext.earl.span_information import with_spans
from tests.unit.earl.test_causal import clusters


def test_spans_are_judged_apart_and_only_by_prompts_that_have_them() -> None:
    """Question: each skill has an expert of its own: one bit of two skills, less what labels at random would show. Image: experts are drawn alike."""
    rng = np.random.default_rng(0)
    skill_N, template_N = np.array(["ocr", "count"] * 40), np.array(["a"] * 80)
    question_NLE = np.eye(4)[[0, 1] * 40][:, None]
    image_NLE = rng.dirichlet(np.ones(4), size=(80, 1))
    image_NLE[:10] = np.nan
    none_NLE = np.full((80, 1, 4), np.nan)
    masses = {span: MassArray(mass_NLE) for span, mass_NLE in (("image", image_NLE), ("question", question_NLE), ("sound", none_NLE))}
    found = with_spans(clusters(ocr=(1,), count=(2,)), masses, skill_N.tolist(), template_N.tolist())
    assert set(found.span_information) == {"image", "question"}
    assert found.span_information["question"][0] == pytest.approx(1, abs=0.05) and abs(found.span_information["image"][0]) < 0.02
    assert replace(found, span_information={}).skills == clusters(ocr=(1,), count=(2,)).skills
