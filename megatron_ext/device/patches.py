"""Every patch that a session applies, in order. The tests walk these tables: an entry that Megatron no longer needs fails them."""

from __future__ import annotations

from megatron_ext.device.patches_cuda import CUDA_PATCHES
from megatron_ext.device.patches_gloo import GLOO_PATCHES
from megatron_ext.device.patches_megatron import MEGATRON_PATCHES, NAME_PATCHES
from megatron_ext.device.patching import Patch

WITH_CUDA: tuple[Patch, ...] = NAME_PATCHES
WITHOUT_CUDA: tuple[Patch, ...] = (*NAME_PATCHES, *CUDA_PATCHES, *MEGATRON_PATCHES, *GLOO_PATCHES)
