"""The Qwen3-style decoder as Megatron describes it: a `TransformerConfig` and layer specifications of our own."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ext.config.schema import ModelConfig
from megatron_ext.config.sizes import expert_layers
from megatron_ext.device import kernels
from megatron_ext.model.attention import CausalSelfAttention, SdpaCore
from megatron_ext.model.experts import GroupedExperts
from megatron_ext.model.norm import RMSNorm
from megatron_ext.model.router import Router
from megatron_ext.parallel.plan import Layout


def transformer_config(model: ModelConfig, layout: Layout) -> TransformerConfig:
    """Megatron's configuration of this decoder under this layout. The router computes in float32 whatever the model's dtype."""
    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        moe_ffn_hidden_size=model.expert_ffn_hidden_size if model.num_experts else None,
        num_moe_experts=model.num_experts or None,
        moe_router_topk=model.experts_per_token,
        moe_router_pre_softmax=not model.norm_topk_prob,
        moe_router_dtype="fp32",
        moe_router_score_function=model.moe_score_function,
        moe_router_load_balancing_type=model.moe_balancing,
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_z_loss_coeff=model.moe_z_loss_coeff,
        moe_expert_capacity_factor=model.moe_capacity_factor,
        moe_token_drop_policy=model.moe_drop_policy,
        moe_pad_expert_input_to_capacity=model.moe_pad_to_capacity,
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        init_method_std=model.init_std,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bf16",
        variable_seq_lengths=layout.pp > 1,  # micro-batches differ in rows and length, and the ViT's features ride along
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        # Interleaved, two neighbours exchange activations and gradients at once. In one batch they would be told apart by their order alone, which pp = 2
        # confuses.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.tp > 1,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )


def layer_specs(model: ModelConfig, layout: Layout) -> tuple[ModuleSpec, ...]:
    """Of every layer: pre-norm attention with per-head query and key norms, then a mixture of SwiGLU experts, or one SwiGLU."""
    dense = _layer(ModuleSpec(module=MLP, submodules=_MATRICES))
    sparse = _layer(_experts(model, layout)) if model.num_experts else dense
    with_experts = expert_layers(model)
    return tuple(sparse if layer in with_experts else dense for layer in range(model.num_layers))


_MATRICES = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _experts(model: ModelConfig, layout: Layout) -> ModuleSpec:
    router = partial(Router, expert_bias_rate=model.moe_expert_bias_rate if model.moe_expert_bias else None)
    sizes = model.hidden_size, model.expert_ffn_hidden_size // layout.etp
    kernel, _ = kernels.experts(model.experts_kernel, torch.cuda.is_available(), model.dtype == "bf16", *sizes)
    if kernel == "sequential":
        experts = ModuleSpec(module=SequentialMLP, submodules=_MATRICES)
    else:
        experts = ModuleSpec(module=GroupedExperts, submodules=_MATRICES, params={"grouped": kernel == "grouped_mm"})
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(router=router, experts=experts))


def _layer(feed_forward: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=CausalSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, core_attention=SdpaCore, linear_proj=RowParallelLinear, q_layernorm=RMSNorm, k_layernorm=RMSNorm
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=feed_forward,
            mlp_bda=get_bias_dropout_add,
        ),
    )
