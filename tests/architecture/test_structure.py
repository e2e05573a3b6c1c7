"""The shape of the code: who may know what, how long things are, and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_ext"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 400, 100
LIGHT = ("errors", "shapes", "durable", "config", "batch", "earl", "study", "parallel/plan.py", "parallel/stages.py", "cli")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, wherever it stands in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(prefix: str) -> list[str]:
    return [name(path) for path in FILES if any(found == prefix or found.startswith(prefix + ".") for found in imports(path))]


def test_only_the_ray_files_of_rl_know_ray() -> None:
    assert all(path.startswith("megatron_ext/rl/hosts/ray_") for path in importers("ray")), importers("ray")


def test_only_parallel_groups_touches_megatron_s_global_groups() -> None:
    assert [path for path in importers("megatron.core.parallel_state") if path != "megatron_ext/parallel/groups.py"] == []


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=name)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or node.lineno) - node.lineno < MOST_FUNCTION_LINES, f"{name(path)}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", [path for path in FILES if path.read_text(encoding="utf-8").strip()], ids=name)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_the_light_floors_import_without_torch_ray_and_megatron() -> None:
    light = [module(path) for path in FILES if path.relative_to(PACKAGE).as_posix().startswith(LIGHT) and path.name != "__main__.py"]
    code = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module(name)
heavy = {{"torch", "ray", "megatron", "deepspeed", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_importing_every_module_leaves_torch_and_the_process_as_they_were() -> None:
    """Our modules change no attribute of torch and Megatron, no environment variable and no signal handler, and open no process group."""
    modules = [module(path) for path in FILES if path.name != "__main__.py"]
    code = f"""
import importlib, os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed, torch.cuda, megatron.core, ray
import megatron.core.parallel_state, megatron.core.tensor_parallel.random, megatron.core.tensor_parallel.mappings
import megatron.core.transformer.moe.moe_utils, megatron.core.transformer.moe.router, megatron.core.transformer.moe.token_dispatcher
import megatron.core.optimizer, megatron.core.distributed, megatron.core.dist_checkpointing

megatron = [sys.modules[name] for name in list(sys.modules) if name.startswith("megatron.core.")]
watched = [torch, torch.Tensor, torch.cuda, torch.distributed, torch.nn.Module, *megatron]
look = lambda: [{{k: id(v) for k, v in vars(thing).items() if not k.startswith("__")}} for thing in watched]
handlers = lambda: [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
state = lambda: (dict(os.environ), handlers(), torch.get_num_threads(), torch.get_default_dtype())
before, process = look(), state()
for name in {modules!r}:
    importlib.import_module(name)
for thing, old, new in zip(watched, before, look()):
    changed = [k for k in old if new.get(k) != old[k]]
    assert not changed, (thing, changed)
assert state() == process
assert not torch.distributed.is_initialized() and not ray.is_initialized() and not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
