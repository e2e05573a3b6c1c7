"""`expert_clusters.json`: the clusters of one checkpoint, written once by discovery and read strictly by everything after it.

    {"schema_version": 2, "model": {"num_layers", "num_experts"}, "checkpoint", "seed", "settings": {...}, "critical_z",
     "information_L": [L], "span_information": {"image": [L], "question": [L]},
     "skills": [{"skill", "status", "reason", "pairs": [...], ..., "causal": {...} or null, "mean_mass_LE": [L][E], "risk_difference_LE": [L][E]}]}

Layers are those with experts, in order.

A file of another schema, another model, or with a missing, unknown or impossible field is a UserError that names the field.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_ext.config.schema import DiscoverConfig, ModelConfig, RunConfig
from megatron_ext.config.sizes import expert_layers
from megatron_ext.durable import make_folder, write_text
from megatron_ext.earl.causal_effect import CausalEffect, Verdict
from megatron_ext.earl.clusters import ExpertClusters, PairEffect, SkillCluster
from megatron_ext.earl.verdicts import Status
from megatron_ext.errors import UserError

SCHEMA_VERSION = 2
_REMEDY = "run `discover` again"


def write_clusters(clusters: ExpertClusters, path: Path) -> None:
    """Writes the file whole or not at all."""
    skills = [
        {**asdict(found), "mean_mass_LE": clusters.mean_mass_XLE[index].tolist(), "risk_difference_LE": clusters.risk_difference_XLE[index].tolist()}
        for index, found in enumerate(clusters.skills)
    ]
    content = {
        "schema_version": SCHEMA_VERSION,
        "model": {"num_layers": clusters.num_layers, "num_experts": clusters.num_experts},
        "checkpoint": clusters.checkpoint,
        "seed": clusters.seed,
        "settings": clusters.settings.model_dump(mode="json"),
        "critical_z": clusters.critical_z,
        "information_L": clusters.information_L.tolist(),
        "span_information": {span: bits_L.tolist() for span, bits_L in clusters.span_information.items()},
        "skills": skills,
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    _File.model_validate_json(text)
    make_folder(path.parent)
    write_text(path, text)


def read_clusters(path: Path, model: ModelConfig) -> ExpertClusters:
    """Reads and checks the file against the model it is about to be used with."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(path), "there is no such file", "run `discover` first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read: {error}", _REMEDY) from None
    try:
        content = _File.model_validate_json(text)
    except ValidationError as error:
        raise _first_problem(path, error) from None
    for name, ours in (("num_layers", len(expert_layers(model))), ("num_experts", model.num_experts)):
        theirs = getattr(content.model, name)
        if ours != theirs:
            raise UserError(f"{path}: model.{name}", f"the clusters are of a model with {theirs}, this model has {ours}", f"{_REMEDY} for this model")
    return _clusters(content)


def read_paid_clusters(path: Path, config: RunConfig) -> ExpertClusters:
    """The same for whoever pays for them, or measures what is paid for: `earl.force_correlational` is obeyed."""
    found = read_clusters(path, config.model)
    return found.forced() if config.earl.force_correlational else found


def _first_problem(path: Path, error: ValidationError) -> UserError:
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return UserError(f"{path}: {field}" if field else str(path), first["msg"], _REMEDY)


def _clusters(content: _File) -> ExpertClusters:
    skills = tuple(
        SkillCluster(
            **{
                **skill.model_dump(exclude={"mean_mass_LE", "risk_difference_LE"}),
                "pairs": tuple(PairEffect(**pair.model_dump()) for pair in skill.pairs),
                "causal": None if skill.causal is None else CausalEffect(**skill.causal.model_dump()),
            }
        )
        for skill in content.skills
    )
    return ExpertClusters(
        num_layers=content.model.num_layers,
        num_experts=content.model.num_experts,
        skills=skills,
        mean_mass_XLE=np.array([skill.mean_mass_LE for skill in content.skills]),
        risk_difference_XLE=np.array([skill.risk_difference_LE for skill in content.skills]),
        information_L=np.array(content.information_L),
        critical_z=content.critical_z,
        settings=content.settings,
        seed=content.seed,
        checkpoint=content.checkpoint,
        span_information={span: np.array(bits) for span, bits in content.span_information.items()},
    )


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, le=1)]
Index = Annotated[int, Field(ge=0)]


class _Shape(_Strict):
    num_layers: int = Field(gt=0)
    num_experts: int = Field(gt=1)


class _Pair(_Strict):
    layer: Index
    expert: Index
    risk_difference: float
    lift: float
    z: float
    p: Share
    bootstrap_frequency: Share
    log_odds: float
    npmi: Annotated[float, Field(ge=-1, le=1)]
    uncontrolled_risk_difference: float
    uncontrolled_z: float
    controlled_log_odds: float
    controlled_npmi: Annotated[float, Field(ge=-2, le=2)]


class _Causal(_Strict):
    num_prompts: Annotated[int, Field(gt=0)]
    accuracy: Share
    drop_own: float
    drop_others: float
    drop_random: float
    random_drops: tuple[float, ...]
    beyond_others: tuple[float, float]
    beyond_random: tuple[float, float]
    cluster_mass: Share
    random_mass: Share
    random_overlap: Share
    verdict: Verdict
    reason: str


class _Skill(_Strict):
    skill: str
    status: Status
    reason: str
    num_prompts: Index
    pairs: tuple[_Pair, ...]
    sigma: Annotated[float, Field(gt=0)] | None
    auroc: Share
    transfer_auroc: Share | None
    jaccard: Share
    uncontrolled_pairs: tuple[tuple[Index, Index], ...] | None
    causal: _Causal | None
    mean_mass_LE: list[list[float]]
    risk_difference_LE: list[list[float]]


class _File(_Strict):
    schema_version: Literal[2]
    model: _Shape
    checkpoint: str
    seed: int
    settings: DiscoverConfig
    critical_z: float | None
    information_L: list[float]
    span_information: dict[str, list[float]]
    skills: list[_Skill] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_the_model(self) -> _File:
        layers, experts = self.model.num_layers, self.model.num_experts
        _demand(len(self.information_L) == layers, f"information_L has {len(self.information_L)} layers, model.num_layers is {layers}")
        for span, bits in self.span_information.items():
            _demand(len(bits) == layers, f"span_information.{span} has {len(bits)} layers, model.num_layers is {layers}")
        names = [skill.skill for skill in self.skills]
        _demand(len(set(names)) == len(names), "skills names a skill twice")
        for index, skill in enumerate(self.skills):
            where = f"skills.{index}"
            for name in ("mean_mass_LE", "risk_difference_LE"):
                table = getattr(skill, name)
                _demand(len(table) == layers and all(len(row) == experts for row in table), f"{where}.{name} is not {layers} x {experts} as model says")
            pairs = [(pair.layer, pair.expert) for pair in skill.pairs]
            _demand(all(layer < layers and expert < experts for layer, expert in pairs), f"{where}.pairs names a layer or expert that the model does not have")
            _demand(len(set(pairs)) == len(pairs), f"{where}.pairs names a pair twice")
            _demand((skill.status == "empty") == (not pairs), f"{where}.status is {skill.status} with {len(pairs)} pairs")
            _demand(bool(pairs) == (skill.sigma is not None), f"{where}.sigma must be given exactly when there are pairs")
        return self


def _demand(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
