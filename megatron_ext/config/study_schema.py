"""The configuration of a study: one recipe, arms that change it, seeds, and what will be concluded from them. Validating it never imports torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_ext.config.section import Section

SharedStage = Literal["", "tokenizer", "pretrain", "sft", "mpo", "discover", "evaluate-sft"]
LastStage = Literal["evaluate-sft", "evaluate-rl"]
ENDPOINT = re.compile(r"(greedy|mean@[1-9]\d*|pass@[1-9]\d*)(?:/([\w-]+))?")
SHARED, LOGS = "shared", "logs"
"""Folders of a study beside those of its arms."""
OWN_FIELDS = ("name", "output_dir", "seed")
"""Of a run, which the study sets itself."""


class StudyConfig(Section):
    """Arms x seeds of one recipe. What is compared, and how, is registered before the first run starts."""

    name: str
    output_dir: Path = Path("runs")
    """The study lives in output_dir/name, a run folder for every arm and seed."""
    recipe: Path
    """Configuration of a run, such as examples/tiny.yaml."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Values of the recipe that all arms change alike, by dotted name."""
    shared: SharedStage = ""
    """The last stage that is done once for each seed and then handed, as hard links, to all arms that do not change it. Empty: every arm does
    its own."""
    until: LastStage = "evaluate-rl"
    """The stage that ends a run, and is compared."""
    ends: dict[str, LastStage] = Field(default_factory=dict)
    """Arms that end elsewhere than at `until`."""
    arms: dict[str, dict[str, Any]] = Field(min_length=2)
    """What each arm changes in the recipe, by dotted name. {shared} in a text stands for the folder of the seed's shared stages."""
    baseline: str
    """The arm that others are compared with."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Each arm is run once for each. Arms of a seed see the same data, prompts and sampling seeds. Five at least, if anything is to be concluded."""
    endpoint: str
    """What decides: greedy, mean@k or pass@k on the evaluation's split, averaged over skills; `greedy/count` is that of one skill."""
    secondary: tuple[str, ...] = ()
    """Further endpoints, for exploration: estimates without a verdict, and not corrected for their number."""
    hypotheses: tuple[tuple[str, str], ...] = ()
    """Pairs (arm, other arm) that get a verdict. Empty: every arm against the baseline. The more there are, the more each has to show."""
    explored: tuple[tuple[str, str], ...] = ()
    """Pairs that are compared by the same endpoint without a verdict, and without making those of the hypotheses harder to reach."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Of all intervals of the verdicts together; 1 - confidence is the chance of any wrong `better` or `worse` in the study."""
    smallest_effect: float = Field(gt=0)
    """Smallest difference of the endpoint that anybody would care about: an interval within it is `no effect` of this size."""
    bootstraps: int = Field(10000, gt=0)
    """Resamples of the bootstrap intervals, which accompany the verdicts."""
    jobs: int = Field(0, ge=0)
    """Runs side by side. 0: as many as the machine has cores for, by `parallel.num_ranks`."""

    @property
    def study_dir(self) -> Path:
        return self.output_dir / self.name

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every hypothesis: (arm, other arm)."""
        return self.hypotheses or tuple((arm, self.baseline) for arm in self.arms if arm != self.baseline)

    def ends_at(self, arm: str) -> LastStage:
        return self.ends.get(arm, self.until)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The one that decides first."""
        return (self.endpoint, *self.secondary)


def split_endpoint(endpoint: str) -> tuple[str, str | None]:
    """Its measure and its skill, None for the mean over skills.

    >>> split_endpoint("mean@8"), split_endpoint("greedy/count")
    (('mean@8', None), ('greedy', 'count'))
    """
    found = ENDPOINT.fullmatch(endpoint)
    assert found is not None, endpoint
    return found[1], found[2]
