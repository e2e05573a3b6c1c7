"""Megatron's top-k router with balancing losses that weigh the same in every layout.

Gradients are summed over micro-batches and ranks and divided once by the number of targets of the step. A balancing loss is a mean over a micro-batch's
tokens; so
that it weighs like the targets of its micro-batch, whatever the split, it is multiplied by their number, `weight_of_aux`. (Megatron multiplies by the
positions of a rank instead, prompt included, which inflates it by positions / targets.)
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, save_to_aux_losses_tracker
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """`weight_of_aux` is set by the model at every forward pass (`ModelInputs.aux_weight`)."""

    def __init__(self, config: Any, pg_collection: Any = None, **more: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **more)
        self.weight_of_aux: float = 1.0
        self.calculate_per_token_loss = True  # in Megatron's words: the balancing loss is multiplied by a number of tokens. Here, by ours.

    def attach_and_log_load_balancing_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().attach_and_log_load_balancing_loss(*args, **{**kwargs, "valid_token_count": self.weight_of_aux})

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """coeff * mean over all tokens of the micro-batch of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5), padding left out."""
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not (self.training and torch.is_grad_enabled()):
            return logits
        squares = torch.logsumexp(logits.float(), dim=-1).square()
        counted = torch.ones_like(squares) if padding_mask is None else (~padding_mask).float()
        total = counted.sum()
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(total, group=self.tp_cp_group)
        loss = (squares * counted).sum() / total.clamp(min=1)
        save_to_aux_losses_tracker("z_loss", loss, self.layer_number, self.config.num_layers, reduce_group=self.tp_cp_group)
        return MoEAuxLossAutoScaler.apply(logits, coeff * loss * self.weight_of_aux)
