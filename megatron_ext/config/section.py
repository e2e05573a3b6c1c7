"""What every section of the configuration is: frozen, typed, strict."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section whose unknown keys are errors. `config/load.py` also refuses numbers written as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def meaning_of(section: type[BaseModel], field: str) -> str:
    """The docstring below a field, in one line; empty where there is none. Read from the source when somebody asks: pydantic's own way costs every start a
    tenth of a second."""
    owner = next((owner for owner in section.__mro__ if field in inspect.get_annotations(owner)), None)
    if owner is None:
        return ""
    (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(owner))).body if isinstance(node, ast.ClassDef))
    for line, below in pairwise(body):
        if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == field:
            return " ".join(str(below.value.value).split()) if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
    return ""
