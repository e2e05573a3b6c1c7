"""Which of a step's groups are trained on. Dynamic sampling, DAPO (arXiv 2503.14476, section 3.2); verl `DAPO`, slime `dynamic_sampling_filters.py`.

    all scored rollouts of the step -> groups whose task rewards differ, the first `wanted` of them -> kept; everything else -> set aside

A group whose answers all earn the same has no advantage: it fills the batch and teaches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.batch import ScoredRollout


@dataclass(frozen=True)
class Choice:
    """`enough`: whether no further prompts are needed."""

    kept: Sequence[ScoredRollout]
    set_aside: Sequence[ScoredRollout]
    enough: bool


def keep_all(scored: Sequence[ScoredRollout]) -> Choice:
    return Choice(scored, [], True)


def keep_differing(scored: Sequence[ScoredRollout], wanted: int) -> Choice:
    """The first `wanted` groups that differ. Where none does, the first `wanted` of all: a step that teaches nothing is still a step."""
    groups = groups_of(scored)
    differing = [key for key, rewards in groups.items() if differs(rewards)]
    kept = set((differing or list(groups))[:wanted])
    chosen = [answer.rollout.prompt.key in kept for answer in scored]
    return Choice(
        [answer for answer, keep in zip(scored, chosen, strict=True) if keep],
        [answer for answer, keep in zip(scored, chosen, strict=True) if not keep],
        len(differing) >= wanted,
    )


def differs(rewards: Sequence[float]) -> bool:
    return len(set(rewards)) > 1


def groups_of(scored: Sequence[ScoredRollout]) -> dict[str, list[float]]:
    """Task rewards by prompt, in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for answer in scored:
        groups.setdefault(answer.rollout.prompt.key, []).append(answer.reward)
    return groups
