"""What is read from disk or network never runs: no pickles but between processes of one run, no code of others, no shells. docs/threat-model.md says why."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "megatron_ext").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
UNPICKLES = re.compile(
    r"(pickle|cPickle|cloudpickle|dill|marshal|shelve|joblib|jsonpickle|pd|pandas)\.(load|loads|open|read_pickle)|(pickle|_pickle)?\.?Unpickler|"
    r"torch\.(load|jit\.load|package\..*)|dist_checkpointing\.load.*|yaml\.(load|unsafe_load|full_load)|"
    r"(torch\.)?hub\.load|runpy\..*|eval|exec|compile|__import__|os\.(system|popen)|sympy\.(sympify|parse_expr)|sympify|parse_expr"
)
ALLOWED = {
    ("megatron_ext/parallel/rank_process.py", "pickle.loads"): "what a rank and its parent say to each other through a pipe that nobody else has",
    ("megatron_ext/rl/hosts/local_host.py", "pickle.loads"): "a verb's arguments and its answer, through a pipe between the driver and a rank that it forked",
    ("megatron_ext/rl/hosts/line.py", "pickle.loads"): "the driver's end of that pipe",
    ("megatron_ext/rl/hosts/ray_actor.py", "pickle.loads"): "a verb's arguments, which came in a Ray call: Ray has asked for the cluster's token",
    ("megatron_ext/config/yaml_tree.py", "yaml.load"): "with a loader of plain values, made from yaml's safe one",
    ("megatron_ext/checkpoint/dist.py", "dist_checkpointing.load"): "with strategies of our own, which unpickle nothing (checkpoint/torch_dist.py)",
}
"""Everything else that unpickles or evaluates is refused. `_MetadataUnpickler` (checkpoint/torch_dist.py) lets a list of names through and is tested there."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))


def keyword(call: ast.Call, wanted: str) -> str | None:
    return next((ast.unparse(given.value) for given in call.keywords if given.arg == wanted), None)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_unpickles_evaluates_or_runs_shells(path: Path) -> None:
    for call in calls(path):
        function = ast.unparse(call.func)
        assert not UNPICKLES.fullmatch(function) or (name(path), function) in ALLOWED, f"{name(path)}:{call.lineno} {function}"
        assert keyword(call, "weights_only") in (None, "True") and keyword(call, "shell") in (None, "False"), f"{name(path)}:{call.lineno}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_arrays_are_read_without_pickles(path: Path) -> None:
    for call in calls(path):
        if ast.unparse(call.func) in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") == "False", f"{name(path)}:{call.lineno}: say allow_pickle=False"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_code_of_a_checkpoint_is_run(path: Path) -> None:
    """`trust_remote_code` is never on, and nothing is fetched by name: what `from_pretrained` reads is a folder of this machine."""
    for call in calls(path):
        function = ast.unparse(call.func)
        assert keyword(call, "trust_remote_code") in (None, "False"), f"{name(path)}:{call.lineno}"
        if re.fullmatch(r"Auto\w+\.from_pretrained", function) and name(path).startswith("megatron_ext/"):
            said = (keyword(call, "trust_remote_code"), keyword(call, "local_files_only"))
            assert said == ("False", "True"), f"{name(path)}:{call.lineno}: say trust_remote_code=False, local_files_only=True"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_archives_are_read_and_never_unpacked(path: Path) -> None:
    for call in calls(path):
        function = ast.unparse(call.func)
        assert not re.fullmatch(r"(tar|tarfile|zip|archive|shutil)\w*\.(extract|extractall|unpack_archive)", function), f"{name(path)}:{call.lineno} {function}"


def test_every_exception_still_exists() -> None:
    for file, function in ALLOWED:
        assert any(ast.unparse(call.func) == function for call in calls(ROOT / file)), (file, function)
