"""What `plan` refuses, training refuses in the same words: the table of broken layouts again, written into configurations."""

from __future__ import annotations

import pytest

from megatron_ext.cli.options import layout_problems
from megatron_ext.config.load import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.planner.layout_names import parse_name
from tests.unit.parallel.planner.test_search import REFUSED, SFT

OF_RULES = {name: broken for name, broken in REFUSED.items() if broken[2].startswith(("parallel.", "sft.", "model.", "which parallel."))}
"""Memory is no rule: training finds out."""


@pytest.mark.parametrize("name", OF_RULES)
def test_a_configuration_with_a_layout_that_plan_refuses_is_refused_in_the_same_words(name: str) -> None:
    gpus, overrides, sentence = OF_RULES[name]
    named = parse_name(name)
    asked = {"parallel.ep": 1, **dict(word.split("=") for word in overrides), "parallel.num_ranks": gpus}
    asked |= {f"parallel.{axis}": size for axis, size in named.axes.items() if axis != "dp"}
    asked |= {"sft.micro_batch": named.micro_rows} if named.micro_rows else {}
    with pytest.raises(ConfigError) as caught:
        load_config(SFT, [f"{field}={value}" for field, value in asked.items()], [layout_problems])
    problems = caught.value.problems
    told = [f"{one.where.partition(' (')[0]}: {one.problem}; {one.remedy}" for one in problems if one.remedy]  # without the origin of the value
    assert any(sentence in text for text in told), told


def test_there_are_enough_of_them() -> None:
    assert len(OF_RULES) >= 20
    assert len(REFUSED) >= 25
