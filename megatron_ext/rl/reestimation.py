"""Staleness of expert clusters: every `earl.reestimate_every` steps they are looked for again in what the policy has answered since.

    steps of the window -> bank: their draws -> one correct answer of each prompt, of one version of the weights, the newest first
      -> survey table -> discover(), with the settings of discovery -> drift against the clusters in use (earl/drift.py)

    stage_dir/drift.jsonl              a line each time: what `earl/drift/*` say, and more of every skill
    stage_dir/drift/step_000050.json   the clusters that were found, as expert_clusters.json

No answer is generated for it. What was found after a step holds from the next step on; a run that repeats the step, or goes on after it, reads it back. With
`earl.follow` these clusters take the place of those that the bonus had.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ext.batch import ScoredRollout
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.prompts import skills_of
from megatron_ext.data.rewards import is_right
from megatron_ext.durable import make_folder, write_text
from megatron_ext.earl.clusters import ExpertClusters, discover
from megatron_ext.earl.drift import drift, followed, stale_share
from megatron_ext.earl.files import read_clusters, write_clusters
from megatron_ext.earl.verdicts import MIN_PROMPTS
from megatron_ext.inference.survey import Correct, survey_table
from megatron_ext.rl.credit import Credit
from megatron_ext.rl.earl_credit import EarlCredit
from megatron_ext.rl.goals import Goals
from megatron_ext.rl.roles import Metrics

DRIFT = "drift"


class Answers(Protocol):
    """What is asked of the bank."""

    def trained(self, step: int) -> tuple[tuple[int, str], ...] | None: ...
    def drawn(self, draw: int) -> Any: ...


@dataclass(frozen=True)
class Window:
    """The steps [first, stop) whose answers are looked at."""

    first: int
    stop: int


class ClusterWatch:
    """The clusters in use, step by step. `clusters`: those that RL starts with; `image_id`: the token of images."""

    def __init__(self, config: RunConfig, clusters: ExpertClusters, bank: Answers, stage_dir: Path, image_id: int) -> None:
        self._config, self._bank, self._image_id = config, bank, image_id
        self._file, self._folder = stage_dir / f"{DRIFT}.jsonl", stage_dir / DRIFT
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        self._records: dict[int, dict[str, Any]] = {record["step"]: record for record in map(json.loads, lines)}
        self._in_use = {0: clusters}

    def in_use(self, step: int) -> ExpertClusters:
        """The clusters that step `step` pays for. The same object as long as they are the same."""
        every = self._config.earl.reestimate_every
        finished = step - step % every
        if not self._config.earl.follow or finished == 0:
            return self._in_use[0]
        if finished not in self._in_use:
            before, _ = self.in_use(finished - 1), self.after(finished - 1)
            found = read_clusters(self._path(finished), self._config.model) if self._records[finished]["found"] else None
            self._in_use[finished] = before if found is None else followed(before, found)
        return self._in_use[finished]

    def after(self, step: int) -> Metrics:
        """Looks again if it is time to, or reads back what was found; its metrics."""
        every, finished = self._config.earl.reestimate_every, step + 1
        if finished % every:
            return {}
        if finished not in self._records:
            self._reestimate(Window(finished - every, finished))
        return _metrics(self._records[finished])

    def _reestimate(self, window: Window) -> None:
        answers = list(fresh_answers(self._bank, window, self._config))
        table = survey_table(answers, self._config, self._image_id) if answers else None
        found = self._discovered(table, window)
        old = self.in_use(window.stop - 1)
        none_NLE, none_N = np.zeros((0, old.num_layers, old.num_experts)), np.zeros(0, dtype=str)
        drifts = drift(old, found, *((none_NLE, none_N) if table is None else (table["mass_NLE"], table["skill_N"])))
        if found is not None:
            make_folder(self._folder)
            write_clusters(found, self._path(window.stop))
        self._records[window.stop] = {
            "step": window.stop,
            "answers": len(answers),
            "found": found is not None,
            "stale": stale_share(drifts, self._config.discover.stability_jaccard),
            "information_L": None if found is None else found.information_L.tolist(),
            "information_before_L": old.information_L.tolist(),
            "skills": [asdict(one) for one in drifts],
        }
        write_text(self._file, "".join(json.dumps(self._records[at]) + "\n" for at in sorted(self._records)))

    def _discovered(self, table: dict[str, np.ndarray] | None, window: Window) -> ExpertClusters | None:
        """None where fewer than two skills have enough answers."""
        counts = Counter([] if table is None else table["skill_N"].tolist())
        if table is None or sum(count >= MIN_PROMPTS for count in counts.values()) < 2:
            return None
        return discover(
            table["mass_NLE"],
            table["skill_N"].tolist(),
            table["template_N"].tolist(),
            self._config.discover,
            self._config.seed + window.stop,
            control_NLE=table["control_NLE"],
            checkpoint=f"answers of RL steps {window.first + 1} to {window.stop}",
        )

    def _path(self, finished: int) -> Path:
        return self._folder / f"step_{finished:06d}.json"


class WatchedCredit:
    """The credit of a run whose clusters are watched. `credit_of` makes the credit that pays for given clusters."""

    def __init__(self, credit_of: Callable[[ExpertClusters], Credit], watch: ClusterWatch) -> None:
        self._credit_of, self._watch = credit_of, watch
        self._clusters = watch.in_use(0)
        self._current = credit_of(self._clusters)

    @property
    def earl(self) -> EarlCredit | None:
        """Of the clusters that are paid for now."""
        return self._current.earl

    def goals(self, scored: Sequence[ScoredRollout]) -> Goals:
        """See `credit.Credit`."""
        return self._current.goals(scored)

    def __call__(self, scored: Sequence[ScoredRollout], step: int) -> tuple[np.ndarray, Metrics]:
        clusters = self._watch.in_use(step)
        if self._clusters is not clusters:
            self._clusters, self._current = clusters, self._credit_of(clusters)
        advantages_R, metrics = self._current(scored, step)
        return advantages_R, metrics | self._watch.after(step)


def fresh_answers(bank: Answers, window: Window, config: RunConfig) -> Iterator[Correct]:
    """Correct answers of the draws that the steps of the window trained on, one a prompt, at most `discover.prompts_per_skill` of a skill, the newest first:
    no further is read back than that takes."""
    most, threshold = config.discover.prompts_per_skill, config.earl.correct_threshold
    counts: dict[str, int] = {}
    seen: set[tuple[int, str]] = set()
    for step in reversed(range(window.first, window.stop)):
        if all(counts.get(skill) == most for skill in skills_of(config.data)):
            return
        for draw in sorted({draw for draw, _ in bank.trained(step) or ()}):
            for answer in sorted(bank.drawn(draw).scored, key=lambda answer: (answer.rollout.prompt.key, answer.rollout.sample)):
                rollout, skill, group = answer.rollout, answer.rollout.prompt.skill, (draw, answer.rollout.prompt.key)
                right = is_right(answer.reward, answer.rewards, threshold)
                if not right or group in seen or counts.get(skill, 0) == most or rollout.version != rollout.newest:
                    continue
                seen.add(group)
                counts[skill] = counts.get(skill, 0) + 1
                correct = Correct.of(rollout)
                yield replace(correct, key=f"{draw}/{correct.key}")  # files are asked again, epoch after epoch


def _metrics(record: dict[str, Any]) -> Metrics:
    metrics = {f"earl/drift/{one['skill']}/{name}": one[name] for one in record["skills"] for name in ("jaccard", "mass") if one[name] is not None}
    if record["stale"] is not None:
        metrics["earl/cluster_stale"] = record["stale"]
    if record["information_L"] is not None:
        metrics["earl/drift/information"] = float(np.mean(record["information_L"]))
    return metrics
