"""The first reading of all layers: effects, what permutations show, and what the mass itself does beside what is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_ext.earl.sample import Survey
from megatron_ext.earl.statistics import Effects, Null, excess_information, permutation_null

_INFORMATION_PERMUTATIONS = 100


@dataclass(frozen=True, eq=False)
class Look:
    """`found`: as skills are compared; `plain`: of the mass itself; each with what permutations show."""

    found: Effects
    null: Null
    plain: Effects
    plain_null: Null
    control_mean_XLE: np.ndarray | None
    information_L: np.ndarray
    count_X: np.ndarray


def first_look(survey: Survey, permuted_RN: np.ndarray, poll: Callable[[], None]) -> Look:
    looks = []
    for block in survey.blocks():
        found = block.effects()
        plain = block.plain() if block.controlled else found
        null = permutation_null(block.contrast_NLE, permuted_RN, block.stratum_N, found.z_XLE, poll)
        plain_null = permutation_null(block.mass_NLE, permuted_RN, block.stratum_N, plain.z_XLE, poll) if block.controlled else null
        control_XLE = block.mean_control() if block.controlled else None
        information_L = excess_information(block.mass_NLE, block.label_N, permuted_RN[:_INFORMATION_PERMUTATIONS], block.num_skills)
        looks.append((found, null, plain, plain_null, control_XLE, information_L))
    found, null, plain, plain_null, control, information = zip(*looks, strict=True)
    return Look(
        found=Effects.joined(found),
        null=Null.joined(null),
        plain=Effects.joined(plain),
        plain_null=Null.joined(plain_null),
        control_mean_XLE=np.concatenate(control, axis=1) if survey.controlled else None,
        information_L=np.concatenate(information),
        count_X=np.bincount(survey.label_N, minlength=survey.num_skills),
    )
