"""How a model looks again at its image, and what that is compared with: every ablation of CLVR is a value here.

    taps  query_source          who asks, and where the answer enters      tap | same_layer (Flamingo, Llama 3.2 Vision) | input_embedding (no feedback)
    memory  kv_tokens  kv_layers           what is looked at               image | learned (no vision) | shuffled (another picture)
    gate  gate_kind  inject  num_slots     how much of the answer enters, and at which tokens
    fusion                                 attention | addition (DeepStack: no query, image tokens alone)

Which values go together is in `config/clvr_rules.py`, what they cost in `config/clvr_sizes.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_ext.config.section import Section


class ClvrConfig(Section):
    """Cross-layer vision refinement: see `model/clvr.py` for the mathematics."""

    enabled: bool = True
    taps: tuple[tuple[int, int], ...] = ((1, 2),)
    """Pairs (source, target) of 0-based decoder layers, source < target: the query is the output of `source`, the refinement enters before `target`."""
    num_heads: int = Field(4, gt=0)
    num_kv_heads: int = Field(2, gt=0)
    head_dim: int = Field(16, gt=0)
    gate: Literal["zero_out", "tanh_gate"] = "zero_out"
    """`zero_out`: W_o starts at 0, the gate open. `tanh_gate`: W_o random, gate tanh(g) with g = 0. Both leave the outputs unchanged at step 0 and have a
    gradient there; a gate and a W_o that both start at 0 would never learn, and no combination says so."""
    gate_kind: Literal["scalar", "channel", "dynamic"] = "scalar"
    """One gate a tap (with `zero_out` fixed at 1), one a channel of the hidden state, or one a token made from its hidden state ("when to look")."""
    inject: Literal["text", "response", "slots", "all"] = "text"
    """Where the refinement is added: text tokens after an image, those of the assistant's turns alone (from the template's header on, so that the first token
    of the answer is decided with it), every token after an image, or `slots`: memory tokens behind every question, from which later tokens read by
    self-attention what was seen."""
    num_slots: int = Field(4, gt=0, le=64)
    """With `slots`: memory tokens a question, each with an embedding of its own. The tokenizer of the run carries them (`<vmem0>`, `<vmem1>`, ...), and every
    question is that much longer."""
    query_source: Literal["tap", "same_layer", "input_embedding"] = "tap"
    """What asks: the output of the tap's source layer; the input of its target layer, without feedback over layers; the token's embedding, before all layers.
    The last two are ablations, and leave the source without a meaning; a tap (j - 1, j) asks with the input of its target layer anyway."""
    inner_iterations: int = Field(1, gt=0)
    """How often a tap looks: each time after the first it asks with the hidden state that its last answer has refined. Costs the tap's computation again."""
    ffn_hidden: int = Field(0, ge=0)
    """Width of an MLP behind the attention, whose output starts at 0; 0: none. Adds 2 x hidden x this many parameters a tap."""
    fusion: Literal["attention", "addition"] = "attention"
    """`addition`: no query; the projected vision tokens are added at the image's own positions before the target layer (DeepStack, arXiv 2406.04334)."""
    memory: Literal["image", "learned", "shuffled"] = "image"
    """What is looked at. `learned`: trained vectors in the place of every tile's features, as many as a tile has, so that masks, places and costs stay.
    `shuffled`: another picture, see `model/other_picture.py`; costs the encoder once more. Both are ablations."""
    kv_tokens: Literal["raw", "unshuffled", "projected"] = "raw"
    """Which features: of the ViT; after pixel unshuffle, downsample^2 times fewer and wider; behind the projector, as the language model reads them."""
    kv_layers: tuple[int, ...] = ()
    """ViT layers, from 0, whose features are summed with learned weights after a low-rank map of each (for `addition`: that of each tap). Empty: the last."""

    @property
    def active_taps(self) -> tuple[tuple[int, int], ...]:
        """(the layer whose output asks, the layer before which the answer enters) of every tap; -1: the embeddings. None where CLVR is switched off."""
        if not self.enabled:
            return ()
        if self.query_source == "input_embedding":
            return tuple((-1, target) for _, target in self.taps)
        if self.query_source == "same_layer" or self.fusion == "addition":
            return tuple((target - 1, target) for _, target in self.taps)
        return self.taps

    @property
    def slots(self) -> int:
        """Memory tokens behind every question."""
        return self.num_slots if self.enabled and self.inject == "slots" else 0

    @property
    def answers_look(self) -> bool:
        """Whether the tokens of an answer ask, so that generation keeps what taps look at; else all is seen once the prompt is read."""
        return self.fusion == "attention" and self.inject != "slots"

    @property
    def has_gate(self) -> bool:
        """Whether a tap has gate parameters."""
        return self.gate == "tanh_gate" or self.gate_kind != "scalar"
