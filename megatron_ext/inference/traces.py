"""The traces that an evaluation leaves: a few greedy answers of every skill, for people to look at in the report. `evaluate/<of>/traces.json`.

Their prompts are answered once more, together, before the first chunk is, so that a stop finds them whole or not begun. They are judged with the evaluation's
own verdicts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.batch import Prompt
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.durable import write_text
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.trace import Clusters, trace_answer

TRACES = "traces.json"
TRACES_PER_SKILL, MOST_TRACES = 4, 24


def traced_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompts of every skill, skill by skill: TRACES_PER_SKILL, fewer where there are many skills, at least one."""
    skills = list(dict.fromkeys(prompt.skill for prompt in prompts))
    chosen = first_of_each_skill(prompts, max(1, min(TRACES_PER_SKILL, MOST_TRACES // max(1, len(skills)))))
    return sorted(chosen, key=lambda prompt: skills.index(prompt.skill))


def first_of_each_skill(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """In the order of the prompts."""
    taken: Counter[str] = Counter()
    chosen = []
    for prompt in prompts:
        taken[prompt.skill] += 1
        if taken[prompt.skill] <= count:
            chosen.append(prompt)
    return chosen


def write_traces(path: Path, engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Prompt], checkpoint: Path, clusters: Clusters) -> None:
    """Answers the prompts greedily, traces the answers and writes them. Every rank of the expert group takes part; the first of all writes."""
    rollouts = engine.generate(prompts, 1, seeds=lambda index, sample: 0, version=0, greedy=True)
    traces = [trace_answer(engine, tokenizer, rollout, checkpoint, clusters) for rollout in rollouts]
    if engine.context.rank == 0:
        write_text(path, json.dumps([trace.to_json() for trace in traces]))


def with_verdicts(traces: Sequence[dict[str, Any]], verdicts: Mapping[str, tuple[str, bool]]) -> list[dict[str, Any]]:
    """The traces' JSON with what the evaluation found of the same answers: (text, whether it is right) by prompt. Of another answer nothing is said."""
    found = [(trace, *verdicts[trace["key"]]) for trace in traces]
    return [{**trace, "correct": right if trace["text"] == text else None} for trace, text, right in found]
