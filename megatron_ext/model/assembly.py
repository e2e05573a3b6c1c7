"""The whole model: vision encoder, projector, splice, CLVR, mixture-of-experts decoder.

    tiles -> InternViT -> features ---------------------------- CLVR keys and values --+
                             |                                                         |
                          projector -> splice into the text embeddings -> decoder layers with taps -> logits

`forward` serves training; `prefill` and `decode` serve generation with the same modules and a `Memory` that holds keys, values and vision memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear, scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from megatron_ext.config.schema import ModelConfig
from megatron_ext.model.attention import KVCache
from megatron_ext.model.clvr import Sight, VisionMemory
from megatron_ext.model.clvr_block import ClvrBlock
from megatron_ext.model.decoder import layer_spec, transformer_config
from megatron_ext.model.initialise import initialise
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.model.projector import Projector
from megatron_ext.model.rope import rope_angles
from megatron_ext.model.router_tap import RouterTap
from megatron_ext.model.splice import splice, visible_until
from megatron_ext.model.vision import InternViT
from megatron_ext.parallel.groups import ParallelContext


@dataclass(frozen=True)
class Memory:
    """What generation keeps of its rows: self-attention cache, vision memory, and how much of it the next token sees."""

    cache: KVCache
    vision: VisionMemory | None
    until_B: torch.Tensor

    def select(self, rows: torch.Tensor) -> Memory:
        """The memory of the given rows, repeated or dropped as asked. Changes the cache in place."""
        self.cache.select(rows)
        return replace(self, vision=None if self.vision is None else self.vision.select(rows), until_B=self.until_B[rows])


class VisionLanguageModel(MegatronModule):
    """InternVL3.5-style model with CLVR. Logits are split over the tensor-parallel group: [S, B, vocab / tp]."""

    def __init__(self, model: ModelConfig, image_token: int, context: ParallelContext) -> None:
        config = transformer_config(model, context.layout)
        super().__init__(config)
        self.model_config, self.image_token, self.tp_group = model, image_token, context.pgs.tp
        self.vision = InternViT(model.vision)
        self.projector = Projector(model.vision, model.hidden_size)
        self.embedding = LanguageModelEmbedding(
            config, model.vocab_size, model.max_positions, "rope", scatter_to_sequence_parallel=False, tp_group=context.pgs.tp
        )
        self.decoder = ClvrBlock(config, layer_spec(), model.clvr, model.vision.hidden_size, context.pgs)
        self.output_layer = ColumnParallelLinear(
            model.hidden_size,
            model.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=model.tie_embeddings,
            tp_group=context.pgs.tp,
        )
        self.router_tap = RouterTap(self, context.pgs.tp)

    def set_input_tensor(self, _: torch.Tensor | list[torch.Tensor | None] | None) -> None:
        """Megatron's schedules call this on every model; without pipeline stages there is nothing to receive."""

    def forward(self, inputs: ModelInputs) -> torch.Tensor:
        """Logits [S, B, vocab / tp] at every position. S divides by the tensor-parallel size."""
        hidden, memory, sight, _ = self._read(inputs)
        hidden = self.decoder(hidden, self._rope(inputs.tokens_BS.shape[1], hidden.device), memory, sight, cache=None)
        return self._logits(hidden)

    def prefill(self, inputs: ModelInputs, lengths_B: torch.Tensor, capacity: int) -> tuple[torch.Tensor, Memory]:
        """Reads prompts of the given lengths. Returns the logits [B, vocab / tp] after each row's last token, and the memory to decode from."""
        hidden, memory, sight, until_BS = self._read(inputs)
        cache = KVCache(capacity)
        hidden = self.decoder(hidden, self._rope(inputs.tokens_BS.shape[1], hidden.device), memory, sight, cache)
        cache.start_decode(lengths_B)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.tp_group)
        rows = torch.arange(len(lengths_B), device=hidden.device)
        last_B1H = hidden[lengths_B - 1, rows][:, None]
        return self._logits(self._scatter(last_B1H))[: len(rows), 0], Memory(cache, memory, until_BS[rows, lengths_B - 1])

    def decode(self, tokens_B: torch.Tensor, memory: Memory) -> torch.Tensor:
        """One new token per row -> logits [B, vocab / tp] after it. The rows stand on the first axis, which sequence parallelism splits."""
        positions_B = memory.cache.lengths_B
        hidden = self._scatter(self._embed(tokens_B[:, None]).transpose(0, 1))
        cos, sin = rope_angles(F.pad(positions_B, (0, -len(positions_B) % self._ranks))[:, None], self.model_config.head_dim, self.model_config.rope_theta)
        sight = Sight(memory.until_B[:, None], torch.ones_like(memory.until_B, dtype=torch.bool)[:, None], decoding=True)
        hidden = self.decoder(hidden, (cos, sin), memory.vision, sight, memory.cache)
        memory.cache.advance()
        return self._logits(hidden)[: len(tokens_B), 0]

    @property
    def _ranks(self) -> int:
        return int(self.tp_group.size())

    def _read(self, inputs: ModelInputs) -> tuple[torch.Tensor, VisionMemory | None, Sight | None, torch.Tensor]:
        """Embeds text, encodes images, splices. Batches without images still run the encoder, on zeros times zero: every rank must touch every parameter."""
        tokens_BS = inputs.tokens_BS
        hidden_BSH = self._embed(tokens_BS).transpose(0, 1)
        is_image_BS = tokens_BS == self.image_token
        without_images = len(inputs.tiles_ICHW) == 0
        features = self.vision(self._blank_tile(hidden_BSH) if without_images else inputs.tiles_ICHW.to(hidden_BSH.dtype))
        images = self.projector(features)
        memory = self.decoder.remember(features, inputs.row_tiles_BM)
        if without_images:
            hidden_BSH = hidden_BSH + 0.0 * images.sum()
        else:
            hidden_BSH = splice(hidden_BSH, images, inputs.row_tiles_BM, is_image_BS)
        until_BS = visible_until(is_image_BS, images.shape[1], features.shape[1])
        inject_BS = torch.ones_like(is_image_BS) if self.model_config.clvr.inject == "all" else ~is_image_BS
        return self._scatter(hidden_BSH.transpose(0, 1)), memory, Sight(until_BS, inject_BS), until_BS

    def _blank_tile(self, like: torch.Tensor) -> torch.Tensor:
        size = self.model_config.vision.image_size
        return like.new_zeros(1, 3, size, size)

    def _embed(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[S, B, H], whole on every rank."""
        return self.embedding(tokens_BS, position_ids=None)

    def _scatter(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """This rank's slice of the first axis, zero-padded to divide."""
        if not self.config.sequence_parallel:
            return hidden_SBH
        padded = F.pad(hidden_SBH, (0, 0, 0, 0, 0, -hidden_SBH.shape[0] % self._ranks))
        return scatter_to_sequence_parallel_region(padded, group=self.tp_group)

    def _rope(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return rope_angles(torch.arange(length, device=device)[:, None], self.model_config.head_dim, self.model_config.rope_theta)

    def _logits(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        shared = self.embedding.word_embeddings.weight if self.model_config.tie_embeddings else None
        return self.output_layer(hidden_SBH, weight=shared)[0]


def build_model(model: ModelConfig, image_token: int, context: ParallelContext, seed: int = 0) -> VisionLanguageModel:
    """The model with weights drawn from `seed`, the same in every layout."""
    built = VisionLanguageModel(model, image_token, context)
    built.to(context.device, built.config.params_dtype)
    initialise(built, context, seed)
    return built
