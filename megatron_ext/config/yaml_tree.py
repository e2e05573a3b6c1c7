"""YAML with a memory: every value knows the line it stands on, a key may stand only once, and numbers are read as people write them.

PyYAML follows YAML 1.1, where `3e-4` is a string, `012` is ten, `1:30` is ninety and `no` is false. Here scalars follow the YAML 1.2 core schema: null,
true/false, decimal numbers with or without an exponent; all else is a string.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import yaml

from megatron_ext.errors import ConfigError, UserError

_RESOLVERS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]),
    ("int", re.compile(r"^[-+]?[0-9]+$"), [*"-+0123456789"]),
    ("float", re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+\.?[0-9]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"), [*"-+.0123456789"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML declares it so)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML declares it so)


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(cast(yaml.ScalarNode, node)))
)  # decimal, whatever it starts with


@dataclass(frozen=True)
class Located:
    """A value and where it was read: `origin` is `file.yaml:12` or `command line`. Mappings hold `Located` values."""

    value: Any
    origin: str

    def plain(self) -> Any:
        """The value as ordinary Python."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value


def read_yaml(path: Path) -> Located:
    """The mapping in a file. Raises ConfigError for a missing or malformed file, or a key that stands twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([UserError(str(path), "there is no such file", _similar_files(path))]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([UserError(str(path), f"cannot be read: {error}", "give a YAML file")]) from None
    return _parse(text, str(path))


def _parse(text: str, path: str) -> Located:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Located({}, f"{path}:1")
        located = _locate(loader, node, path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([UserError(f"{path}:{line}", f"is not valid YAML: {error.problem}", "check the indentation, the colons and the quotes")]) from None
    finally:
        loader.dispose()
    if not isinstance(located.value, dict):
        raise ConfigError([UserError(f"{path}:1", "holds no `key: value` lines", "start from examples/tiny.yaml")])
    return located


def parse_scalar(text: str) -> Any:
    """The value of a command-line override: any YAML. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def dump_inline(value: Any) -> str:
    """One value on one line, read back as the same value by `read_yaml`."""
    text = _dumped(value, allow_unicode=True)
    return text if not set(text) & _OTHER_LINE_ENDS else _dumped(value, allow_unicode=False)


_OTHER_LINE_ENDS = {"\x85", "\u2028", "\u2029"}
"""Which PyYAML writes as they are and reads back as spaces, unless they are escaped."""


def _dumped(value: Any, allow_unicode: bool) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**9, allow_unicode=allow_unicode)
    return text.removesuffix("\n").removesuffix("\n...")


def _locate(loader: _Loader, node: yaml.Node, path: str) -> Located:
    """Mappings become dictionaries of located values; lists and scalars are leaves."""
    origin = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        return Located(loader.construct_object(node, deep=True), origin)
    items: dict[str, Located] = {}
    for key_node, value_node in node.value:
        key, line = str(loader.construct_object(key_node)), key_node.start_mark.line + 1
        if key in items:
            raise ConfigError([UserError(f"{path}:{line}", f"`{key}` stands here and before it ({items[key].origin})", "keep one of the two")])
        items[key] = Located(_locate(loader, value_node, path).value, f"{path}:{line}")
    return Located(items, origin)


def _similar_files(path: Path) -> str:
    candidates = [str(found) for found in _yaml_files(path.parent)]
    close = get_close_matches(str(path), candidates, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "give the path of a YAML file, such as examples/tiny.yaml"


def _yaml_files(folder: Path) -> Iterator[Path]:
    return (found for pattern in ("*.yaml", "*.yml") for found in sorted(folder.glob(pattern)))
