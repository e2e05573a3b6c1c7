"""From a YAML file and overrides to one `RunConfig`, with the origin of every value.

    defaults <- preset <- algorithm <- file.yaml <- a.b.c=value         each layer overwrites single values, not whole sections
        -> strict validation -> rules between fields -> Resolved

Everything that is wrong is reported at once: unknown keys with what was probably meant, wrong types, broken rules, each with field, place and remedy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_ext.config.algorithms import ALGORITHMS
from megatron_ext.config.messages import plain_words
from megatron_ext.config.presets import PRESETS
from megatron_ext.config.rules import check_rules
from megatron_ext.config.schema import RunConfig, TrainConfig
from megatron_ext.config.yaml_tree import Located, dump_inline, parse_scalar, read_yaml
from megatron_ext.errors import ConfigError, UserError

COMMAND_LINE = "command line"
Check = Callable[[RunConfig], list[UserError]]


@dataclass(frozen=True)
class Resolved:
    """A valid configuration. `origins` maps every dotted field to `default`, `preset <name>`, `algorithm <name>`, `run folder`,
    `<file>:<line>` or `command line`."""

    config: RunConfig
    origins: dict[str, str]


def load_config(path: Path | str | None, overrides: Sequence[str] = (), checks: Sequence[Check] = ()) -> Resolved:
    """Reads, merges and validates. `checks` are further rules, such as those of a parallel layout, reported together with our own.

    Raises ConfigError with every problem. Without a path the defaults and the preset alone are the file.
    """
    builder = _Builder()
    located = read_yaml(Path(path)) if path is not None else Located({}, "default")
    given = builder.parse_overrides(overrides)
    builder.apply_preset(_named(located, given, "model", "preset", "tiny"))
    builder.apply_algorithm(_named(located, given, "rl", "algorithm", "grpo"))
    builder.merge(located, RunConfig, "")
    for dotted, value in given.items():
        builder.override(dotted, value)
    return builder.resolve(checks)


def explain(resolved: Resolved) -> str:
    """The whole configuration as YAML with the origin of each value as a comment, aligned. Reading it back gives the same configuration."""
    rows = list(_rows(resolved.config.model_dump(mode="json"), RunConfig, "", resolved.origins))
    width = min(max(len(text) for text, _ in rows), 64)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in rows) + "\n"


def _rows(tree: dict[str, Any], section: type[BaseModel], prefix: str, origins: dict[str, str]) -> Iterator[tuple[str, str]]:
    indent = "  " * prefix.count(".")
    for key, value in tree.items():
        inner = _section(section, key)
        if inner is None:
            yield f"{indent}{key}: {dump_inline(value)}", origins[prefix + key]
        else:
            yield f"{indent}{key}:", ""
            yield from _rows(value, inner, f"{prefix}{key}.", origins)


class _Builder:
    """The tree of values under construction, the origin of each leaf, and the problems met so far."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = RunConfig().model_dump(mode="json")
        self.origins = dict.fromkeys(leaves(self.tree), "default")
        self.problems: list[UserError] = []

    def parse_overrides(self, overrides: Sequence[str]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for text in overrides:
            dotted, equals, value = text.partition("=")
            if not equals or not dotted:
                self._problem(text, COMMAND_LINE, "is not an override", "write section.field=value, for example rl.steps=10")
            elif dotted in given:
                self._problem(dotted, COMMAND_LINE, "is given twice", "keep one of the two")
            else:
                try:
                    given[dotted] = parse_scalar(value)
                except yaml.YAMLError:
                    self._problem(dotted, COMMAND_LINE, f"cannot read the value {value!r}", "put it in quotes")
        return given

    def apply_preset(self, chosen: Located) -> None:
        preset = PRESETS.get(chosen.value) if isinstance(chosen.value, str) else None
        if preset is None:
            remedy = _did_you_mean(str(chosen.value), list(PRESETS), cutoff=0.4) or f"there are: {', '.join(PRESETS)}"
            self._problem("model.preset", chosen.origin, f"there is no preset {chosen.value!r}", remedy)
        else:
            self.merge(_located(preset, f"preset {chosen.value}"), RunConfig, "")

    def apply_algorithm(self, chosen: Located) -> None:
        """A name that does not exist is left to the validation, which knows those that do."""
        parts = ALGORITHMS.get(chosen.value, {}) if isinstance(chosen.value, str) else {}
        self.merge(_located({"rl": parts}, f"algorithm {chosen.value}"), RunConfig, "")

    def merge(self, located: Located, section: type[BaseModel], prefix: str) -> None:
        for key, item in located.value.items():
            dotted = prefix + key
            if key not in section.model_fields:
                self._unknown(dotted, item.origin)
                continue
            inner = _section(section, key)
            if inner is None:
                self._set(dotted, item.plain(), item.origin)
            elif isinstance(item.value, dict):
                self.merge(item, inner, dotted + ".")
            elif item.value is not None:
                self._not_a_section(dotted, item.value, inner, item.origin)

    def override(self, dotted: str, value: Any) -> None:
        section: type[BaseModel] = RunConfig
        *path, last = dotted.split(".")
        for depth, key in enumerate(path):
            inner = _section(section, key)
            if inner is None:
                free = ".".join(path[: depth + 1])
                if depth == len(path) - 1 and isinstance(self._get(free), dict):
                    return self._set(free, {**self._get(free), last: value}, COMMAND_LINE)
                return self._unknown(dotted, COMMAND_LINE)
            section = inner
        if last not in section.model_fields:
            return self._unknown(dotted, COMMAND_LINE)
        inner = _section(section, last)
        if inner is None:
            return self._set(dotted, value, COMMAND_LINE)
        if isinstance(value, dict):
            return self.merge(_located(value, COMMAND_LINE), inner, dotted + ".")
        return self._not_a_section(dotted, value, inner, COMMAND_LINE)

    def resolve(self, checks: Sequence[Check]) -> Resolved:
        self._place_index()
        self._choose_micro_batches()
        config = None
        try:
            config = RunConfig.model_validate_json(json.dumps(self.tree), strict=True)
        except ValidationError as error:
            for dotted, problem, remedy in plain_words(error, self._get, RunConfig):
                self._problem(dotted, self._origin(dotted), problem, remedy)
        for dotted, value in leaves(self.tree).items():
            if isinstance(value, float) and not math.isfinite(value):
                self._problem(dotted, self._origin(dotted), f"{value} is not a finite number", "write an ordinary number")
        if config is not None and not self.problems:
            broken = [problem for check in (check_rules, *checks) for problem in check(config)]
            self.problems = [UserError(self._where(p.where, self._origin(p.where)), p.problem, p.remedy) for p in broken]
        if self.problems or config is None:
            raise ConfigError(self.problems)
        return Resolved(config, {dotted: self._origin(dotted) for dotted in leaves(config.model_dump(mode="json"))})

    def _place_index(self) -> None:
        """Beside the run, where there are shards and nobody says otherwise."""
        if self._get("data.kind") in ("webdataset", "blend") and self._get("data.index") is None:
            self._set("data.index", str(Path(str(self._get("output_dir"))) / str(self._get("name")) / "shards"), "run folder")

    def _choose_micro_batches(self) -> None:
        """Rows or tokens. A budget on the command line replaces the rows of a file; otherwise giving both is a mistake. A file that states the default besides,
        as a resolved configuration does, gives one."""
        for stage in ("pretrain", "sft"):
            rows, budget = f"{stage}.micro_batch", f"{stage}.micro_batch_tokens"
            default = TrainConfig().micro_batch
            if not self._get(budget) or self._get(rows) == default:
                continue
            if self.origins[budget] == COMMAND_LINE != self.origins[rows]:
                self._set(rows, default, "default")
            else:
                problem = f"{self._get(rows)} has no effect beside {budget} = {self._get(budget)} ({self.origins[budget]})"
                self._problem(rows, self.origins[rows], problem, f"leave one of the two out; {budget}=0 counts rows again")

    def _get(self, dotted: str) -> Any:
        value: Any = self.tree
        for key in dotted.split("."):
            if isinstance(value, list) and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                return None
        return value

    def _set(self, dotted: str, value: Any, origin: str) -> None:
        *path, last = dotted.split(".")
        section = self.tree
        for key in path:
            section = section[key]
        section[last] = value
        self.origins[dotted] = origin

    def _origin(self, dotted: str) -> str:
        """The origin of a field; for an element of a list or a free mapping, that of the whole; for a section, unknown."""
        while dotted and dotted not in self.origins:
            dotted = dotted.rpartition(".")[0]
        return self.origins.get(dotted, "")

    def _unknown(self, dotted: str, origin: str) -> None:
        self._problem(dotted, origin, "is not a key of the configuration", _did_you_mean_key(dotted) or "`--explain` prints every key")

    def _not_a_section(self, dotted: str, value: Any, inner: type[BaseModel], origin: str) -> None:
        keys = ", ".join(list(inner.model_fields)[:4])
        self._problem(dotted, origin, f"is a section, but a value stands there: {value!r}", f"put its keys below it ({keys}, ...)")

    def _problem(self, dotted: str, origin: str, problem: str, remedy: str) -> None:
        self.problems.append(UserError(self._where(dotted, origin), problem, remedy))

    @staticmethod
    def _where(dotted: str, origin: str) -> str:
        return f"{dotted} ({origin})" if origin else dotted


def leaves(tree: dict[str, Any], section: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Every field that is not a section, by its dotted name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _section(section, key)
        found.update({prefix + key: value} if inner is None else leaves(value, inner, f"{prefix}{key}."))
    return found


def _section(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The class of a field that is itself a section, else None."""
    field = section.model_fields.get(key)
    annotation = field.annotation if field is not None else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _located(value: Any, origin: str) -> Located:
    return Located({key: _located(item, origin) for key, item in value.items()} if isinstance(value, dict) else value, origin)


def _named(located: Located, given: dict[str, Any], section: str, field: str, default: str) -> Located:
    """What the command line, the file or nobody says about a field that names further values."""
    if f"{section}.{field}" in given:
        return Located(given[f"{section}.{field}"], COMMAND_LINE)
    inside = located.value.get(section)
    if inside is not None and isinstance(inside.value, dict) and field in inside.value:
        return Located(inside.value[field].value, inside.value[field].origin)
    return Located(default, "default")


def _did_you_mean(word: str, words: list[str], cutoff: float = 0.6) -> str:
    close = get_close_matches(word, words, n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""


def _did_you_mean_key(dotted: str) -> str:
    """A key that looks like this one; or one of the same name in a section of it (`sft.lr` -> `sft.optimizer.lr`)."""
    known = list(leaves(RunConfig().model_dump(mode="json")))
    sections = sorted({name.rpartition(".")[0] for name in known if "." in name})
    close = get_close_matches(dotted, known + sections, n=1, cutoff=0.8)
    section, _, last = dotted.rpartition(".")
    siblings = [name for name in known if name.startswith(section) and name.endswith(f".{last}")]
    return f"did you mean {(siblings or close)[0]}?" if siblings or close else _did_you_mean(dotted, known + sections)
