"""From a study's file to a `StudyConfig`: as strict as the configuration of a run, and like it with an origin for every value.

file.yaml <- field=value, overrides.section.field=value, arms.NAME.section.field=value  ->  strict validation  ->  rules between fields
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_ext.config.load import COMMAND_LINE
from megatron_ext.config.messages import plain_words
from megatron_ext.config.study_rules import check_study
from megatron_ext.config.study_schema import StudyConfig
from megatron_ext.config.yaml_tree import dump_inline, parse_scalar, read_yaml
from megatron_ext.errors import ConfigError, UserError


@dataclass(frozen=True)
class Study:
    """A valid study. `origins` maps every field to `default`, `<file>:<line>` or `command line`."""

    config: StudyConfig
    origins: dict[str, str]


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Reads, merges and validates. Raises ConfigError with every problem."""
    located = read_yaml(path)
    tree: dict[str, Any] = {key: item.plain() for key, item in located.value.items()}
    origins = {key: item.origin for key, item in located.value.items()}
    problems = _override(tree, origins, overrides)
    for key in tree:
        if key not in StudyConfig.model_fields:
            close = get_close_matches(key, list(StudyConfig.model_fields), n=1)
            remedy = f"did you mean {close[0]}?" if close else f"there are: {', '.join(StudyConfig.model_fields)}"
            problems.append(UserError(f"{key} ({origins[key]})", "is not a key of a study", remedy))
    for key, field in StudyConfig.model_fields.items():
        if field.is_required() and tree.get(key) is None:
            problems.append(UserError(key, f"is missing in {path}", "docs/studies/README.md shows a study's file"))
    if problems:
        raise ConfigError(problems)
    defaults = {key: field.get_default(call_default_factory=True) for key, field in StudyConfig.model_fields.items() if not field.is_required()}
    try:
        config = StudyConfig.model_validate_json(json.dumps({**defaults, **tree}, default=str), strict=True)
    except ValidationError as error:
        found = plain_words(error, lambda dotted: _value(tree, dotted), StudyConfig)
        raise ConfigError([UserError(_where(dotted, origins), problem, remedy) for dotted, problem, remedy in found]) from None
    if broken := check_study(config):
        raise ConfigError([UserError(_where(item.where, origins), item.problem, item.remedy) for item in broken])
    return Study(config, {key: origins.get(key, "default") for key in StudyConfig.model_fields})


def explain_study(study: Study) -> str:
    """Every value of the study's file and where it comes from; read back, it gives the same study."""
    rows: list[tuple[str, str]] = []
    for key, value in study.config.model_dump(mode="json").items():
        if isinstance(value, dict) and value:
            rows += [(f"{key}:", study.origins[key]), *((f"  {dump_inline(name)}: {dump_inline(item)}", "") for name, item in value.items())]
        else:
            rows.append((f"{key}: {dump_inline(value)}", study.origins[key]))
    width = min(max(len(text) for text, origin in rows if origin), 64)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in rows) + "\n"


def as_overrides(values: dict[str, Any]) -> list[str]:
    """Dotted values as they are typed behind the recipe's file."""
    return [f"{dotted}={dump_inline(value)}" for dotted, value in values.items()]


def _override(tree: dict[str, Any], origins: dict[str, str], overrides: Sequence[str]) -> list[UserError]:
    """Sets what the command line says; what is wrong with it."""
    problems = []
    for text in overrides:
        dotted, equals, value = text.partition("=")
        key, _, inner = dotted.partition(".")
        arm, _, field = inner.partition(".")
        try:
            parsed = parse_scalar(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not dotted or (inner and key not in ("overrides", "arms", "ends")) or (key == "arms" and inner and not field):
            remedy = "write field=value, overrides.section.field=value or arms.NAME.section.field=value"
            problems.append(UserError(f"{text} ({COMMAND_LINE})", "is no override of a study", remedy))
        elif key == "arms" and inner:
            arms = tree.get("arms") or {}
            tree["arms"] = {**arms, arm: {**(arms.get(arm) or {}), field: parsed}}
        elif inner:
            tree[key] = {**(tree.get(key) or {}), inner: parsed}
        else:
            tree[key] = parsed
        origins[key] = COMMAND_LINE
    return problems


def _value(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree[int(key)] if isinstance(tree, list) and key.isdigit() and int(key) < len(tree) else tree.get(key) if isinstance(tree, dict) else None
    return tree


def _where(dotted: str, origins: dict[str, str]) -> str:
    origin = origins.get(dotted.partition(".")[0], "")
    return f"{dotted} ({origin})" if origin else dotted
