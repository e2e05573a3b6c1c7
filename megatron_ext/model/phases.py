"""What the parts of the model are called in a profile, in training and in generation."""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_ext.model import decode_step
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.model.attention import CausalSelfAttention
from megatron_ext.model.clvr import ClvrTap
from megatron_ext.model.clvr_addition import AdditionTap
from megatron_ext.model.clvr_block import ClvrBlock, Injection
from megatron_ext.model.router import Router
from megatron_ext.model.vision import InternViT
from megatron_ext.observe.phases import Phase

MODEL = (
    Phase("embedding", VisionLanguageModel, "embed"),
    Phase("embedding", VisionLanguageModel, "embed_tokens"),
    Phase("vision", InternViT, "forward"),
    Phase("norms and dense parts", ClvrBlock, "walk"),
    Phase("attention", CausalSelfAttention, "forward"),
    Phase("attention", decode_step, "_attention"),
    Phase("router", Router, "forward"),
    Phase("router", Router, "choose"),
    Phase("experts", MoELayer, "forward"),
    Phase("experts", decode_step, "_experts"),
    Phase("CLVR", ClvrBlock, "remember"),
    Phase("CLVR", ClvrTap, "forward"),
    Phase("CLVR", AdditionTap, "forward"),
    Phase("CLVR", Injection, "forward"),
    Phase("head", VisionLanguageModel, "logits"),
)
