"""What discovery looks at: all prompts with their labels (`Survey`), and some layers of them in memory (`Sample`), one after the other.

Nothing that is computed of one layer depends on another but sums and maxima, so blocks of layers give what all layers at once would: the sums over
layers differ in the last bits, everything else does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.earl.masses import MassSource
from megatron_ext.earl.statistics import Effects, effects

BLOCK_BYTES = 1 << 27
"""Of float64 masses that are in memory at once. Working on them takes about five times as much. A block has at least one layer."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Prompts with integer labels, and `layers` of their routes. `mass` is what the router did; `contrast` is what is compared between skills: the mass, or
    the mass minus token control."""

    mass_NLE: np.ndarray
    contrast_NLE: np.ndarray
    label_N: np.ndarray
    stratum_N: np.ndarray
    num_skills: int
    layers: slice

    @property
    def controlled(self) -> bool:
        return self.contrast_NLE is not self.mass_NLE

    def plain(self) -> Effects:
        """Effects of the mass itself."""
        return effects(self.mass_NLE, self.label_N, self.stratum_N, self.num_skills)

    def effects(self) -> Effects:
        """Risk difference and z of the contrast; mean mass and lift of the mass itself."""
        compared = effects(self.contrast_NLE, self.label_N, self.stratum_N, self.num_skills)
        plain = self.plain() if self.controlled else compared
        return Effects(plain.mean_mass_XLE, compared.risk_difference_XLE, plain.lift_XLE, compared.z_XLE)

    def mean_control(self) -> np.ndarray:
        """float64 [X, L, E]: the mean mass that token ids explain in each skill's prompts."""
        control_NLE = np.maximum(self.mass_NLE - self.contrast_NLE, 0.0)
        return effects(control_NLE, self.label_N, self.stratum_N, self.num_skills).mean_mass_XLE


class Survey:
    """All prompts, in an order that depends on their contents alone; a skill's label is its place in `skills`, which are sorted."""

    def __init__(self, mass: MassSource, control: MassSource | None, skill_N: Sequence[str], template_N: Sequence[str], block_bytes: int = BLOCK_BYTES) -> None:
        self._mass, self._control = mass, control
        self.skills = sorted(set(skill_N))
        self.num_prompts, self.num_layers, self.num_experts = mass.shape
        self._layers_at_once = max(1, block_bytes // (8 * self.num_prompts * self.num_experts))
        self._order = _content_order(mass, skill_N, template_N)
        label_of = {skill: label for label, skill in enumerate(self.skills)}
        strata: dict[str, int] = {}
        self.label_N = np.array([label_of[skill_N[row]] for row in self._order])
        self.stratum_N = np.array([strata.setdefault(template_N[row], len(strata)) for row in self._order])

    @property
    def num_skills(self) -> int:
        return len(self.skills)

    @property
    def controlled(self) -> bool:
        return self._control is not None

    def blocks(self) -> Iterator[Sample]:
        """Blocks of layers, from the first on. Raises ValueError for a mass that cannot be."""
        for start in range(0, self.num_layers, self._layers_at_once):
            yield self.block(start, min(start + self._layers_at_once, self.num_layers))

    def block(self, start: int, stop: int) -> Sample:
        mass_NLE = self._mass.layers(start, stop)[self._order]
        if not np.isfinite(mass_NLE).all() or (mass_NLE < 0).any():
            raise ValueError("mass_NLE holds a negative or non-finite gate mass")
        contrast_NLE = mass_NLE if self._control is None else mass_NLE - self._control.layers(start, stop)[self._order]
        return Sample(mass_NLE, contrast_NLE, self.label_N, self.stratum_N, self.num_skills, slice(start, stop))

    def contrasts(self, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """float64 [N, pairs]: the contrast of some (layer, expert) pairs, in their order. Pairs must be sorted."""
        columns = [np.empty((self.num_prompts, 0))]
        for layer in sorted({layer for layer, _ in pairs}):
            columns.append(self.block(layer, layer + 1).contrast_NLE[:, 0, [expert for of, expert in pairs if of == layer]])
        return np.concatenate(columns, axis=1)


def _content_order(mass: MassSource, skill_N: Sequence[str], template_N: Sequence[str]) -> np.ndarray:
    """Rows by the bytes of their masses, then by template and skill. Layers are read only until no two prompts are alike."""
    place = [0] * mass.shape[0]
    for layer in range(mass.shape[1]):
        content = [(before, row.tobytes()) for before, row in zip(place, mass.layers(layer, layer + 1), strict=True)]
        distinct = {key: number for number, key in enumerate(sorted(set(content)))}
        place = [distinct[key] for key in content]
        if len(distinct) == len(place):
            break
    return np.array(sorted(range(len(place)), key=lambda row: (place[row], template_N[row], skill_N[row])))
