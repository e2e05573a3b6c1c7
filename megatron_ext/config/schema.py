"""The one configuration of a run: frozen, typed, strict. Validating it never imports torch.

    RunConfig
      model        what is trained            (a preset plus overrides)
      parallel     how it is laid out         (the learner; `rollout.parallel` for the rollout fleet)
      data         what it learns from
      pretrain, sft                           (two stages of one kind)
      mpo          which of two answers is better
      rollout      how answers are sampled
      discover     how expert clusters are found
      earl, rl     the bonus and the reinforcement learning
      evaluate     how accuracy is measured
      observe      what is shown while it runs

Rules that relate two fields live in `config/rules.py`; reading YAML and overrides in `config/load.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_ext.config.clvr_schema import ClvrConfig as ClvrConfig
from megatron_ext.config.data_schema import DataConfig as DataConfig
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.rl_schema import DiscoverConfig as DiscoverConfig
from megatron_ext.config.rl_schema import EarlConfig as EarlConfig
from megatron_ext.config.rl_schema import RLConfig as RLConfig
from megatron_ext.config.rl_schema import RolloutConfig as RolloutConfig
from megatron_ext.config.section import Section as Section
from megatron_ext.config.training_schema import MpoConfig as MpoConfig
from megatron_ext.config.training_schema import OptimizerConfig as OptimizerConfig
from megatron_ext.config.training_schema import ParallelConfig as ParallelConfig
from megatron_ext.config.training_schema import StageConfig as StageConfig
from megatron_ext.config.training_schema import TrainConfig as TrainConfig


class VisionConfig(Section):
    enabled: bool = True
    """False: a language model alone, without vision encoder and projector."""
    image_size: int = Field(32, gt=0)
    """Height and width of a tile in pixels."""
    patch_size: int = Field(4, gt=0)
    """Height and width of a patch in pixels; divides `image_size`."""
    num_layers: int = Field(2, gt=0)
    hidden_size: int = Field(64, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    ffn_hidden_size: int = Field(128, gt=0)
    qk_norm: bool = False
    """RMSNorm of queries and keys over the full width (InternViT-6B: true, InternViT-300M: false)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    qkv_bias: bool = True
    layer_scale_init: float = Field(0.1, gt=0)
    """Initial value of the two layer-scale vectors of a layer."""
    norm_eps: float = 1e-6
    downsample: int = Field(2, gt=0)
    """Pixel unshuffle: this many by this many ViT tokens become one image token."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Pixels, red green blue from 0 to 1, become (pixel - mean) / std. InternVL: ImageNet's (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225)."""


class RopeScaling(Section):
    """Rotary positions stretched to rows longer than those of pretraining."""

    kind: Literal["linear", "yarn"]
    """`linear`: every position counts as 1 / factor. `yarn`: arXiv 2309.00071."""
    factor: float = Field(gt=0)
    original_positions: int = Field(32768, gt=0)
    """With `yarn`: positions of pretraining."""
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    """With `yarn`: pairs that turn more often than `beta_fast` within the original positions keep their frequency, those below `beta_slow` are slowed by the
    factor."""
    attention_factor: float | None = Field(None, gt=0)
    """With `yarn`: queries and keys are multiplied by it. Unset: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """With `yarn`: the ramp between the two begins and ends at whole pairs."""


class ModelConfig(Section):
    """A Qwen3-style decoder, of experts or dense, behind an InternViT encoder. `preset` names the defaults; every other field overrides it."""

    preset: str = "tiny"
    vocab_size: int = Field(256, gt=0)
    """Rows of the embedding, a multiple of 8 and at least the tokenizer's size."""
    num_layers: int = Field(3, gt=0)
    hidden_size: int = Field(64, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    num_query_groups: int = Field(2, gt=0)
    """KV heads."""
    head_dim: int = Field(16, gt=0)
    num_experts: int = Field(8, ge=0)
    """Experts of a layer. 0: a dense model, each of whose layers has one SwiGLU of `ffn_hidden_size` instead."""
    experts_per_token: int = Field(2, gt=0)
    expert_ffn_hidden_size: int = Field(64, gt=0)
    dense_layers: tuple[int, ...] = ()
    """Layers, from 0, with one SwiGLU of `ffn_hidden_size` in place of experts."""
    ffn_hidden_size: int = Field(128, gt=0)
    """Of layers without experts."""
    norm_topk_prob: bool = True
    """Softmax over the chosen logits (true: gates sum to 1) or over all of them (false)."""
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = Field(0.02, gt=0)
    max_positions: int = Field(512, gt=0)
    moe_balancing: Literal["aux_loss", "seq_aux_loss", "none"] = "aux_loss"
    """What the load-balancing loss spreads evenly over the experts: the tokens of a micro-batch (`aux_loss`), or those of every sample by itself, padded or
    packed (`seq_aux_loss`). All of these settings are for the supervised stages: RL neither balances nor drops, and leaves the expert bias as it found it."""
    moe_aux_loss_coeff: float = Field(0.01, ge=0)
    """Weight of the load-balancing loss per MoE layer (Megatron's convention). Without effect where `moe_balancing` is none."""
    moe_z_loss_coeff: float = Field(0.0, ge=0)
    """Weight of the mean square of the router's log-partition, which keeps its logits small (ST-MoE uses 0.001)."""
    moe_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores. `sigmoid` (DeepSeek-V3) scores every expert by itself; the chosen ones are divided by their sum."""
    moe_expert_bias: bool = False
    """Balancing without a loss: a bias per expert, added to the scores where experts are chosen but not to the gates, follows the load (arXiv 2408.15664)."""
    moe_expert_bias_rate: float = Field(0.001, ge=0)
    """How far the bias of an expert with more (fewer) tokens than the mean goes down (up) in a step; 0 holds it."""
    moe_capacity_factor: float | None = Field(None, gt=0)
    """In training an expert takes at most this many times its even share of the positions that a rank sees in a micro-batch, and drops the rest. A rank sees a
    slice under tensor or context parallelism, so what is dropped there depends on the layout. Unset: nothing is dropped."""
    moe_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens a full expert keeps: those with the largest gates, or those that come first."""
    moe_pad_to_capacity: bool = False
    """Fill every expert to its capacity with zeros, so that shapes do not depend on the routes. Costs their computation."""
    experts_kernel: Literal["auto", "sequential", "in_place", "grouped_mm"] = "auto"
    """How the experts of a layer are computed; `megatron-ext doctor` says what `auto` takes here. All compute the same, but for rounding."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    vision: VisionConfig = VisionConfig()
    clvr: ClvrConfig = ClvrConfig()


class EvaluateConfig(Section):
    split: Literal["train", "val", "test"] = "test"
    prompts_per_skill: int = Field(200, gt=0)
    samples: int = Field(8, ge=0)
    """Sampled answers per prompt for mean@k and pass@k, besides the greedy one; 0 skips sampling."""
    sampled_prompts_per_skill: int = Field(64, gt=0)
    blind: bool = True
    """Also answer with the image replaced by noise: must be near chance."""
    clvr: bool = False
    """Also measure what CLVR's taps look at (`inference/looks.py`), and answer twice more: with their keys and values 0, and with those of another prompt's
    picture."""


class RunConfig(Section):
    """A whole recipe: every stage of one run."""

    name: str = "tiny"
    output_dir: Path = Path("runs")
    """The run lives in output_dir/name, a folder per stage."""
    seed: int = 0
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    pretrain: TrainConfig = TrainConfig()
    sft: TrainConfig = TrainConfig()
    mpo: MpoConfig = MpoConfig()
    rollout: RolloutConfig = RolloutConfig()
    discover: DiscoverConfig = DiscoverConfig()
    earl: EarlConfig = EarlConfig()
    rl: RLConfig = RLConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name

    @property
    def tokenizer_dir(self) -> Path:
        return self.run_dir / "tokenizer"
