"""Memory that a rank gives up for a while and takes back in place: tensors, and all views of them, stay what they are, only their storage is empty meanwhile.

    lent = Lent(tensors, keep=True); lent.give(); ...; lent.take_back()

Whoever reads an empty tensor reads nothing that is there: callers see to it that nobody does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch


class Lent:
    """The storages of some tensors. `keep`: their bytes wait in host memory, pinned where they come from a GPU, which is kept from one time to the next;
    otherwise they are lost, and undefined afterwards."""

    def __init__(self, tensors: Iterable[torch.Tensor], keep: bool) -> None:
        storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors) if storage.nbytes()}
        self._storages, self._keep = list(storages.values()), keep
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._host: list[torch.Tensor] = []
        self.given = False

    @property
    def num_bytes(self) -> int:
        """Of all storages, whether they are here or not."""
        return sum(self._sizes)

    @torch.no_grad()
    def give(self) -> None:
        """Empties the storages. Does nothing where they are empty."""
        if self.given:
            return
        if self._keep:
            self._host = self._host or [torch.empty(len(here), dtype=torch.uint8, pin_memory=here.is_cuda) for here in self._bytes()]
            for host, here in zip(self._host, self._bytes(), strict=True):
                host.copy_(here, non_blocking=True)
        self._wait()
        for storage in self._storages:
            storage.resize_(0)
        self.given = True
        return_free_memory()

    @torch.no_grad()
    def take_back(self) -> None:
        """Undoes `give`. Does nothing where nothing was given."""
        if not self.given:
            return
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        if self._keep:
            for host, here in zip(self._host, self._bytes(), strict=True):
                here.copy_(host, non_blocking=True)
            self._wait()
        self.given = False

    def _bytes(self) -> list[torch.Tensor]:
        return [torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage) for storage in self._storages]

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    @property
    def _on_gpu(self) -> bool:
        return any(storage.is_cuda for storage in self._storages)


def return_free_memory() -> None:
    """What allocators keep for this process's next request goes to the other processes of the GPU, or of the machine (with the GNU C library)."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
