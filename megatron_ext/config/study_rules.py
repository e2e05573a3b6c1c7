"""Rules between the fields of a study. Each broken rule names its field, what stands there and what would work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import PurePath

from megatron_ext.config.study_schema import ENDPOINT, LOGS, OWN_FIELDS, SHARED, StudyConfig
from megatron_ext.errors import UserError

Problems = Iterator[UserError]


def check_study(config: StudyConfig) -> list[UserError]:
    """Every rule that `config` breaks."""
    rules: tuple[Callable[[StudyConfig], Problems], ...] = (_names, _arms, _seeds, _hypotheses, _endpoints)
    return [problem for rule in rules for problem in rule(config)]


def _names(config: StudyConfig) -> Problems:
    if not config.name or PurePath(config.name).name != config.name or config.name.startswith("."):
        yield UserError("name", f"{config.name!r} cannot name a folder", "use letters, digits, - and _")
    for arm in config.arms:
        if not re.fullmatch(r"\w[\w.-]*", arm) or arm in (SHARED, LOGS):
            yield UserError(f"arms.{arm}", "cannot name the folder of an arm", f"use letters, digits, - and _, and neither {SHARED} nor {LOGS}")


def _arms(config: StudyConfig) -> Problems:
    yield from _known(config, "baseline", config.baseline)
    for arm in config.ends:
        yield from _known(config, f"ends.{arm}", arm)
    for field, values in [("overrides", config.overrides), *((f"arms.{arm}", values) for arm, values in config.arms.items())]:
        for own in OWN_FIELDS:
            if own in values:
                remedy = "leave it out: the study has seeds" if own == "seed" else f"leave it out: the study has its own {own}"
                yield UserError(f"{field}.{own}", "is set by the study, run by run", remedy)
    seen: dict[str, str] = {}
    for arm, values in config.arms.items():
        said = repr((sorted(values.items(), key=str), config.ends_at(arm)))
        if said in seen:
            yield UserError(f"arms.{arm}", f"changes the same as {seen[said]}", "arms must differ: leave one of the two out")
        seen[said] = arm


def _seeds(config: StudyConfig) -> Problems:
    twice = sorted({seed for seed in config.seeds if config.seeds.count(seed) > 1})
    if twice:
        yield UserError("seeds", f"holds {', '.join(map(str, twice))} twice", "every seed counts once")


def _hypotheses(config: StudyConfig) -> Problems:
    pairs = [*config.hypotheses, *config.explored]
    for number, (arm, other) in enumerate(pairs):
        field = f"hypotheses.{number}" if number < len(config.hypotheses) else f"explored.{number - len(config.hypotheses)}"
        yield from _known(config, field, arm)
        yield from _known(config, field, other)
        if arm == other:
            yield UserError(field, f"compares {arm} with itself", "give two arms")
        if {arm, other} in [set(before) for before in pairs[:number]]:
            yield UserError(field, f"{arm} and {other} are compared before", "keep one of the two")


def _endpoints(config: StudyConfig) -> Problems:
    for field, endpoint in [("endpoint", config.endpoint), *((f"secondary.{number}", text) for number, text in enumerate(config.secondary))]:
        if not ENDPOINT.fullmatch(endpoint):
            yield UserError(field, f"{endpoint!r} is not an endpoint", "use greedy, mean@k or pass@k, or with a skill, as in mean@8/count")
    if len(set(config.endpoints)) < len(config.endpoints):
        yield UserError("secondary", "names an endpoint twice, or that of the verdicts", "name each once")


def _known(config: StudyConfig, field: str, arm: str) -> Problems:
    if arm not in config.arms:
        close = get_close_matches(arm, list(config.arms), n=1)
        yield UserError(field, f"there is no arm {arm!r}", f"did you mean {close[0]}?" if close else f"there are: {', '.join(config.arms)}")
