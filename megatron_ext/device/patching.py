"""How one attribute is replaced for a while: what a patch is, and the context manager that applies a list of them and takes them back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils._device import _device_constructors

_MISSING = object()


@dataclass(frozen=True)
class Patch:
    """One attribute replaced: `owner` is "module" or "module:Class", `make` turns the original (None where there is none) into the stand-in."""

    owner: str
    attribute: str
    why: str
    make: Callable[[Any], Any]

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.attribute}"


@contextmanager
def applied(patches: Sequence[Patch]) -> Iterator[None]:
    """Applies the patches in order; on the way out, also after an exception, every owner's own attributes are what they were.

    All owners are imported first: what a module computes as it loads (torch's compiler lists torch's functions, for one) must come from the originals.
    """
    owners = [_resolve(patch.owner) for patch in patches]
    _device_constructors()  # torch lists the functions that `with torch.device(...)` reaches when it is first asked, for good: it must find the originals
    undo: list[tuple[Any, str, Any]] = []
    try:
        for patch, owner in zip(patches, owners, strict=True):
            undo.append((owner, patch.attribute, vars(owner).get(patch.attribute, _MISSING)))
            setattr(owner, patch.attribute, patch.make(getattr(owner, patch.attribute, None)))
        yield
    finally:
        for owner, attribute, own in reversed(undo):
            if own is not _MISSING:
                setattr(owner, attribute, own)
            elif attribute in vars(owner):
                delattr(owner, attribute)


def _resolve(owner: str) -> Any:
    module, _, class_name = owner.partition(":")
    found = importlib.import_module(module)
    return getattr(found, class_name) if class_name else found
