"""The whole model, or the part of it that one pipeline stage holds: vision encoder, projector, splice, CLVR, mixture-of-experts decoder.

    tiles -> InternViT -> features ---------------------------- CLVR keys and values --+
                             |                                                         |
                          projector -> splice into the text embeddings -> decoder layers with taps -> logits

`forward` serves training, on every stage; `generation.py` drives the same modules token by token. Which part a stage holds is in `parallel/stages.py`, what
travels between stages in `payload.py`, which positions a rank computes in `frame.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear, scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from megatron_ext.batch import NO_MARKERS, Markers
from megatron_ext.config.clvr_sizes import kv_shape, source_shape
from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.errors import UserError
from megatron_ext.model.clvr_block import Call, ClvrBlock
from megatron_ext.model.decode_step import decodes_whole
from megatron_ext.model.decoder import layer_specs, transformer_config
from megatron_ext.model.frame import Frame, frame_of
from megatron_ext.model.initialise import initialise
from megatron_ext.model.inputs import ModelInputs
from megatron_ext.model.other_picture import other_pictures
from megatron_ext.model.payload import Payload, pack, unpack
from megatron_ext.model.projector import Projector
from megatron_ext.model.rope import rope_angles
from megatron_ext.model.router import RouterCall, called
from megatron_ext.model.router_tap import RouterTap
from megatron_ext.model.sight import Sight, VisionMemory
from megatron_ext.model.splice import inject_at, order_of, splice, visible_from, visible_until
from megatron_ext.model.vision import InternViT
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.stages import Stage, pipeline_stages


class VisionLanguageModel(MegatronModule):
    """InternVL3.5-style model with CLVR, or its language model alone. Logits are split over the tensor-parallel group: [S, B, vocab / tp].

    `image_token`: the id of image positions; any negative number for a model without vision. `markers`: the tokenizer's, needed where CLVR looks in responses
    or at memory tokens alone.
    """

    def __init__(self, model: ModelConfig, image_token: int, context: ParallelContext, stage: Stage, markers: Markers = NO_MARKERS) -> None:
        config = transformer_config(model, context.layout)
        super().__init__(config)
        self.model_config, self.image_token, self.markers, self.stage = model, image_token, markers, stage
        self.tp_group, self.cp_group = context.pgs.tp, context.pgs.cp
        self.pre_process, self.post_process, self.share_embeddings_and_output_weights = stage.first, stage.last, model.tie_embeddings  # Megatron asks for these
        self.vision = InternViT(model.vision) if stage.runs_vision else None
        self.projector = Projector(model.vision, model.hidden_size) if stage.first and model.vision.enabled else None
        self.embedding = self._embedding(config) if stage.first else None
        self.decoder = ClvrBlock(config, layer_specs(model, context.layout), model, context.pgs, stage, context.parallel)
        self.output_layer = self._output_layer(config) if stage.last else None
        self.router_tap = RouterTap(self, context.pgs.tp)
        self.decodes_whole = decodes_whole(context.layout)
        self._received: torch.Tensor | None = None
        self.shown_instead: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.taps_see = True

    @property
    def never_said(self) -> tuple[int, ...]:
        """Tokens that answers cannot hold, because a cached answer and a pass over the whole conversation would compute something else: images, memory tokens,
        and where only responses look, the piece that begins a turn, from which on that pass would see a question."""
        looks_by_turn = self.model_config.clvr.enabled and self.model_config.clvr.inject == "response"
        turn = () if self.markers.turn is None or not looks_by_turn else (self.markers.turn,)
        return self.image_token, *self.markers.slots, *turn

    @contextmanager
    def taps_shown(self, instead: Callable[[torch.Tensor], torch.Tensor] | None) -> Iterator[None]:
        """While this lasts CLVR's taps look at `instead(tiles_ICHW)` in the place of the tiles, or (None) at nothing: keys and values of 0, hence no
        refinement. What the language model itself reads stays."""
        self.shown_instead, self.taps_see = instead, instead is not None
        try:
            yield
        finally:
            self.shown_instead, self.taps_see = None, True

    def set_input_tensor(self, received: torch.Tensor | list[torch.Tensor | None] | None) -> None:
        """Megatron's schedules hand over what the stage before sent, right before the forward pass that takes it."""
        self._received = received[0] if isinstance(received, list) else received

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Where embeddings are tied over pipeline stages, Megatron sums the gradients of the first stage's and the last one's copy."""
        module = self.embedding.word_embeddings if self.embedding is not None else self.output_layer
        return None if module is None else module.weight

    def frame(self, inputs: ModelInputs) -> Frame:
        """Which positions of these inputs this rank computes. Tensors that belong to the logits are cut with its `take`."""
        return frame_of(inputs.tokens_BS.shape[1], inputs.bounds, self.cp_group, inputs.tokens_BS.device, inputs.hidden_BS)

    def forward(self, inputs: ModelInputs) -> torch.Tensor:
        """On the last stage logits [S, B, vocab / tp] at this rank's positions, before it the payload for the next stage. The length of the rows, and of packed
        samples, divides by `Layout.length_multiple`."""
        frame = self.frame(inputs)
        payload = self.embed(inputs, frame) if self.stage.first else self._arrived(inputs, frame)
        memory, sight = self.look(inputs, frame, payload.sources_IVW)
        with called(self.decoder.routers(), self._router_call(inputs, frame)):
            hidden, waiting = self.decoder(payload.hidden_SBH, payload.waiting, Call(self.rope(frame), memory, sight, frame, self._padding(inputs, frame)))
        if self.stage.last:
            return self.logits(hidden)
        return pack(Payload(hidden, waiting, payload.sources_IVW), self.stage)

    def embed(self, inputs: ModelInputs, frame: Frame) -> Payload:
        """Embeds text, encodes images, splices. Batches without images still run the encoder, on zeros times zero: every rank must touch every parameter."""
        hidden_BSH = self.embed_tokens(frame.take(inputs.tokens_BS)).transpose(0, 1)
        if self.projector is None:
            return Payload(self.scatter(hidden_BSH.transpose(0, 1)), {}, None)
        features = self._features(inputs.tiles_ICHW, hidden_BSH)
        images = self.projector(features[..., : self.model_config.vision.hidden_size])
        if len(inputs.tiles_ICHW) == 0:
            hidden_BSH = hidden_BSH + 0.0 * images.sum()
        else:
            hidden_BSH = splice(hidden_BSH, images, inputs.row_tiles_BM, inputs.tokens_BS == self.image_token, frame.local_S)
        return Payload(self.scatter(hidden_BSH.transpose(0, 1)), {}, self._sources(inputs, features, images))

    def look(self, inputs: ModelInputs, frame: Frame, sources_IVW: torch.Tensor | None) -> tuple[VisionMemory | None, Sight | None]:
        """The vision memory of this stage's taps, and which positions may look at what."""
        if not self.stage.asks or sources_IVW is None or not self.taps_see:
            return None, None
        model = self.model_config
        is_image_BS = inputs.tokens_BS == self.image_token
        until_BS = visible_until(is_image_BS, tokens_per_tile(model.vision), kv_shape(model)[0])
        inject_BS = inject_at(model.clvr.inject, inputs.tokens_BS, is_image_BS, inputs.bounds, self.markers)
        image_BS = frame.take(order_of(is_image_BS)) if model.clvr.fusion == "addition" else None
        sight = Sight(frame.take(visible_from(until_BS, inputs.bounds)), frame.take(until_BS), frame.take(inject_BS), image_BS=image_BS)
        return self.decoder.remember(sources_IVW, inputs.row_tiles_BM, inputs.places_I5 if len(inputs.tiles_ICHW) else None), sight

    def embed_tokens(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """[S, B, H], whole on every rank."""
        assert self.embedding is not None
        return self.embedding(tokens_BS, position_ids=None)

    def scatter(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """This rank's slice of the first axis, zero-padded to divide."""
        if not self.config.sequence_parallel:
            return hidden_SBH
        padded = F.pad(hidden_SBH, (0, 0, 0, 0, 0, -hidden_SBH.shape[0] % self.tp_group.size()))
        return scatter_to_sequence_parallel_region(padded, group=self.tp_group)

    def rope(self, frame: Frame) -> tuple[torch.Tensor, torch.Tensor]:
        return rope_angles(frame.positions_S[:, None], self.model_config)

    def logits(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        assert self.output_layer is not None
        tied = self.model_config.tie_embeddings and self.embedding is not None
        return self.output_layer(hidden_SBH, weight=self.embedding.word_embeddings.weight if tied else None)[0]  # type: ignore[union-attr]

    def _arrived(self, inputs: ModelInputs, frame: Frame) -> Payload:
        """What the stage before sent; features that did not ride along are computed here from a frozen encoder."""
        received, self._received = self._received, None
        if received is None:
            raise RuntimeError(f"pipeline stage {self.stage.number} was run without what stage {self.stage.number - 1} sends")
        length = -(-len(frame.positions_S) // self.tp_group.size())
        payload = unpack(received, self.stage, length, max(1, len(inputs.tiles_ICHW)), *source_shape(self.model_config))
        if self.vision is None:
            return payload
        return Payload(payload.hidden_SBH, payload.waiting, self._sources(inputs, self._features(inputs.tiles_ICHW, payload.hidden_SBH), None))

    def _features(self, tiles_ICHW: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """ViT features [I, V, H_vit] of the last layer, behind them those of `kv_layers`; of one blank tile where the batch has no image."""
        assert self.vision is not None
        size, also = self.model_config.vision.image_size, self.model_config.clvr.kv_layers if self.model_config.clvr.enabled else ()
        if len(tiles_ICHW) == 0:
            return self.vision(like.new_zeros(1, 3, size, size), also)
        return self.vision(self._normalised(tiles_ICHW).to(like.dtype), also)

    def _sources(self, inputs: ModelInputs, features_IVH: torch.Tensor, images_INH: torch.Tensor | None) -> torch.Tensor:
        """What CLVR's taps look at, as `source_shape` says. `images_INH`: behind the projector, where this stage has it."""
        clvr, width = self.model_config.clvr, self.model_config.vision.hidden_size
        instead = other_pictures if clvr.memory == "shuffled" else self.shown_instead
        if clvr.active_taps and instead is not None and len(inputs.tiles_ICHW):
            features_IVH = self._features(instead(inputs.tiles_ICHW), features_IVH)
            images_INH = self.projector(features_IVH[..., :width]) if self.projector is not None and clvr.kv_tokens == "projected" else None
        if clvr.active_taps and clvr.kv_tokens == "projected":
            assert images_INH is not None
            return images_INH
        return features_IVH[..., width:] if clvr.active_taps and clvr.kv_layers else features_IVH

    def _normalised(self, tiles_ICHW: torch.Tensor) -> torch.Tensor:
        """From [-1, 1] to the mean and deviation that the encoder was trained with."""
        vision = self.model_config.vision
        if set(vision.image_mean) == set(vision.image_std) == {0.5}:
            return tiles_ICHW
        mean, std = (torch.tensor(values, device=tiles_ICHW.device)[:, None, None] for values in (vision.image_mean, vision.image_std))
        return ((tiles_ICHW + 1) / 2 - mean) / std

    def _padding(self, inputs: ModelInputs, frame: Frame) -> torch.Tensor | None:
        """Bool [B, S] of this rank's sequence slice, for the routers."""
        return None if inputs.padding_BS is None else self._sequence_slice(frame.take(inputs.padding_BS), fill=True)

    def _router_call(self, inputs: ModelInputs, frame: Frame) -> RouterCall:
        """What the routers know of this micro-batch: they may drop tokens where it is learnt from."""
        drops = self.training and torch.is_grad_enabled()
        if self.model_config.moe_balancing != "seq_aux_loss":
            return RouterCall(inputs.aux_weight, drops=drops)
        samples_BS = self._sequence_slice(frame.take(inputs.samples_BS()), fill=0)
        return RouterCall(inputs.aux_weight, samples_BS.transpose(0, 1).flatten(), inputs.num_samples, drops)

    def _sequence_slice(self, local_BS: torch.Tensor, fill: float) -> torch.Tensor:
        """What sequence parallelism leaves of this rank's positions."""
        if not self.config.sequence_parallel:
            return local_BS
        ranks = self.tp_group.size()
        return F.pad(local_BS, (0, -local_BS.shape[1] % ranks), value=fill).chunk(ranks, dim=1)[self.tp_group.rank()]

    def _embedding(self, config: object) -> LanguageModelEmbedding:
        model = self.model_config
        return LanguageModelEmbedding(config, model.vocab_size, model.max_positions, "rope", scatter_to_sequence_parallel=False, tp_group=self.tp_group)

    def _output_layer(self, config: object) -> ColumnParallelLinear:
        """Tied to the embedding it has no weight of its own, unless the embedding lives on another stage: then it has a copy, which Megatron keeps equal."""
        model = self.model_config
        layer = ColumnParallelLinear(
            model.hidden_size,
            model.vocab_size,
            config=config,
            init_method=self.config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=model.tie_embeddings and self.stage.first,
            tp_group=self.tp_group,
        )
        if model.tie_embeddings and not self.stage.first:
            layer.weight.shared = layer.weight.shared_embedding = True  # the gradient norm counts it once
        return layer


def build_chunks(
    model: ModelConfig, image_token: int, context: ParallelContext, seed: int = 0, vision_trains: bool = True, markers: Markers = NO_MARKERS
) -> list[VisionLanguageModel]:
    """This rank's parts of the model, in the order of the data, with weights drawn from `seed`, the same in every layout.

    A vision encoder that does not train is frozen, here and wherever a later stage has one of its own. Raises UserError where the tokenizer has not the memory
    tokens that the model asks for.
    """
    _require_slots(model, markers)
    layout = context.layout
    stages = pipeline_stages(model, layout.pp, layout.vpp, vision_trains)
    chunks = [VisionLanguageModel(model, image_token, context, stage, markers) for stage in stages[context.pp_rank :: layout.pp]]
    for vp, chunk in enumerate(chunks):
        chunk.vp_stage = vp if layout.vpp > 1 else None
        chunk.model_type = ModelType.encoder_or_decoder  # the schedules ask for both
        chunk.to(context.device, chunk.config.params_dtype)
        initialise(chunk, context, seed)
        if not vision_trains and chunk.vision is not None:
            chunk.vision.requires_grad_(False)
    return chunks


def build_model(model: ModelConfig, image_token: int, context: ParallelContext, seed: int = 0, markers: Markers = NO_MARKERS) -> VisionLanguageModel:
    """The whole model on this rank, for layouts without pipeline stages."""
    (whole,) = build_chunks(model, image_token, context, seed, markers=markers)
    if not (whole.stage.first and whole.stage.last):
        raise ValueError("build_model is for one pipeline stage: use build_chunks")
    return whole


def _require_slots(model: ModelConfig, markers: Markers) -> None:
    if model.clvr.slots not in (0, len(markers.slots)):
        problem = f"{model.clvr.slots} memory tokens, and the tokenizer that the model is built for has {len(markers.slots)}"
        raise UserError("model.clvr.num_slots", problem, "make the tokenizer with this configuration (the stage `tokenizer`), or use model.clvr.inject=text")
