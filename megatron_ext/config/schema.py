"""The one configuration of a run: frozen, typed, strict. Validating it never imports torch.

    RunConfig
      model        what is trained            (a preset plus overrides)
      parallel     how it is laid out         (the learner; `rollout.parallel` for the rollout fleet)
      data         what it learns from
      pretrain, sft                           (two stages of one kind)
      rollout      how answers are sampled
      discover     how expert clusters are found
      earl, rl     the bonus and the reinforcement learning
      evaluate     how accuracy is measured
      observe      what is shown while it runs

Rules that relate two fields live in `config/rules.py`; reading YAML and overrides in `config/load.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config.algorithms import Advantage, Aggregation, Algorithm, Correction, KlEstimator, KlPlacement, Surrogate
from megatron_ext.config.data_schema import DataConfig as DataConfig
from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.section import Section as Section


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


class ClvrConfig(Section):
    """Cross-layer vision refinement: see `model/clvr.py` for the mathematics."""

    enabled: bool = True
    taps: tuple[tuple[int, int], ...] = ((1, 2),)
    """Pairs (source, target) of 0-based decoder layers, source < target: the query is the output of `source`, the refinement enters before `target`."""
    num_heads: int = Field(4, gt=0)
    num_kv_heads: int = Field(2, gt=0)
    head_dim: int = Field(16, gt=0)
    gate: Literal["zero_out", "tanh_gate"] = "zero_out"
    """`zero_out`: W_o starts at 0, gate fixed at 1. `tanh_gate`: W_o random, gate tanh(g) with g = 0. Both leave the outputs unchanged at step 0."""
    inject: Literal["text", "all"] = "text"
    """Where the refinement is added: text tokens after an image, or every token after an image."""

    @property
    def active_taps(self) -> tuple[tuple[int, int], ...]:
        """None where CLVR is switched off."""
        return self.taps if self.enabled else ()


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


class ParallelConfig(Section):
    """One grid of ranks. Ranks = tp * pp * cp * dp; experts are split over ep of the dp ranks (and over etp)."""

    num_ranks: int = Field(1, gt=0)
    """Processes. dp follows: num_ranks / (tp * pp * cp)."""
    tp: int = Field(1, gt=0)
    """Tensor parallel. Above 1, sequence parallelism is always on."""
    pp: int = Field(1, gt=0)
    """Pipeline parallel: consecutive decoder layers on consecutive stages."""
    vpp: int = Field(1, gt=0)
    """Model chunks per pipeline rank (interleaved schedule): a smaller bubble for more communication. Micro-batches per step must divide by pp."""
    cp: int = Field(1, gt=0)
    """Context parallel: a sequence is shared by this many ranks, each taking an early and a late part of it."""
    ep: int = Field(1, gt=0)
    """Expert parallel; divides num_ranks / (etp * pp)."""
    etp: int | None = None
    """Expert tensor parallel. Unset: 1 when ep > 1, else tp."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass instead of kept: none; self-attention (`selective`); whole decoder layers (`full`)."""
    recompute_layers: int = Field(1, gt=0)
    """Layers between two kept activations when recompute is `full`: more saves memory, and holds more at once while a block is computed again."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients while the backward pass runs. Unset: on GPUs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass runs; needs overlap_grad_reduce."""
    threads_per_rank: int = Field(1, gt=0)
    engine: Literal["megatron", "deepspeed"] = "megatron"
    """Who shards the training state over data-parallel ranks: `megatron` (default, every layout) or `deepspeed` (ZeRO 1-3 and offload for few GPUs; pp = 1)."""
    deepspeed: Path | None = None
    """DeepSpeed's JSON file (`deepspeed_configs/`); needed by engine `deepspeed`. Its "auto" values come from this configuration."""


class OptimizerConfig(Section):
    lr: float = Field(3e-3, gt=0)
    min_lr: float = Field(1e-5, ge=0)
    warmup_steps: int = Field(20, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip_grad: float = Field(1.0, ge=0)
    """Global gradient norm; 0 leaves gradients as they are."""


class TrainConfig(Section):
    """A supervised stage: `pretrain` (captions and questions) or `sft` (the instruction format)."""

    steps: int = Field(100, ge=0)
    global_batch: int = Field(64, gt=0)
    """Conversations per step over all data-parallel ranks."""
    micro_batch: int = Field(32, gt=0)
    """Conversations per forward pass of one rank."""
    micro_batch_tokens: int = Field(0, ge=0)
    """With `packed`, in place of `micro_batch`: a rank's conversations of a step are spread evenly over micro-batches of at most this many tokens each. All
    data-parallel ranks run equally many, as many as the one with the most text needs. 0: `micro_batch` conversations each; giving both is refused."""
    mix: dict[str, float] = Field(default_factory=lambda: {"caption": 1.0, "qa": 1.0})
    """Weights of the kinds of conversation: `caption`, `qa` (single skills), `composite`."""
    text: dict[str, float] = Field(default_factory=dict)
    """Plain text instead of conversations: datasets in Megatron's indexed format (`tools/preprocess_data.py`), by path without .bin and .idx, and how much of
    each. Documents are joined end to end and cut into rows of `data.max_length` tokens, all of which are learnt."""
    optimizer: OptimizerConfig = OptimizerConfig()
    save_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = Field(2, gt=0)
    """Checkpoints kept."""
    async_save: bool = True
    """Checkpoints are written beside training, which waits for a copy only. Costs host memory for weights and optimizer state of every rank, and some speed
    while a save is under way. A failed save is told at the next step."""
    log_every: int = Field(10, gt=0)
    packed: bool = False
    """The conversations of a micro-batch stand one after another in one row instead of padded side by side. None sees another; results are the same."""
    train_vision: bool = True
    """False freezes the vision encoder; under pipeline parallelism later stages then run it themselves instead of receiving its features."""
    init_from: Path | None = None
    """Checkpoint to start from; unset: the stage before, or random weights for the first stage."""


class RolloutConfig(Section):
    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0 keeps every token."""
    max_new_tokens: int = Field(24, gt=0)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts with which an answer ends, besides its end token; it keeps them. `stop=["</answer>"]`."""
    batch_size: int = Field(256, gt=0)
    """Answers written side by side by one replica. As some end, others take their places."""
    prefill_tokens: int = Field(16384, gt=0)
    """Positions of prompts that are read in one forward pass, padding included; what it takes of memory grows with it. A longer prompt is read in parts."""
    cache_gib: float | None = Field(None, gt=0)
    """Memory on a rank for the keys and values of prompts and answers. Fewer answers are written side by side where more would not fit; where those that are
    begun outgrow it, the youngest are begun again later, and say the same. Unset: whatever `batch_size` answers take."""
    deterministic: bool = False
    """Rollouts and learner compute the same log-probs in every bit, whatever batch a token is in, and RL stops at the first that differs. On CPUs, in fp32,
    with equal tp on both sides; what it costs in time: docs/benchmarks/exactness.md. False: they agree to rounding."""
    replicas: int = Field(2, gt=0)
    """Rollout worlds; each has `parallel.num_ranks` processes."""
    parallel: ParallelConfig = ParallelConfig()


class DiscoverConfig(Section):
    prompts_per_skill: int = Field(96, gt=1)
    permutations: int = Field(1000, gt=0)
    fwer: float = Field(0.05, gt=0, lt=1)
    min_risk_difference: float = Field(0.02, ge=0)
    min_lift: float = Field(1.5, ge=0)
    experts_per_layer: int = Field(2, gt=0)
    """At most this many experts of a layer in one skill's cluster."""
    max_layers: int = Field(16, gt=0)
    committee_top: int = Field(8, ge=0)
    """An expert among the top this-many of EVERY skill in a layer is a standing committee member and joins no cluster. Must stay below num_experts."""
    token_control_kappa: float = Field(20.0, ge=0)
    stability_jaccard: float = Field(0.6, ge=0, le=1)
    bootstrap_frequency: float = Field(0.8, ge=0, le=1)
    bootstraps: int = Field(200, gt=0)


class EarlConfig(Section):
    enabled: bool = True
    bonus: float = Field(0.3, ge=0)
    """lambda: weight of the bonus."""
    max_share: float = Field(0.5, ge=0, lt=1)
    """rho: the bonus never exceeds this share of |task advantage|, so it can never change its sign."""
    warmup: float = Field(0.1, ge=0, le=1)
    cooldown: float = Field(0.3, ge=0, le=1)
    """Shares of the run over which lambda rises linearly and falls to 0 along a cosine."""
    correct_threshold: float = 1.0
    """tau: the task reward from which a rollout counts as correct."""
    min_correct: int = Field(2, gt=0)
    """Groups with fewer correct rollouts get no bonus."""
    subtask: Literal["prompt", "tags"] = "prompt"
    """The span whose routes are scored: the whole response as the prompt's skill, or every `<skill>..</skill>` span as its own."""


class RLConfig(Section):
    steps: int = Field(60, ge=0)
    prompts_per_step: int = Field(64, gt=0)
    rollouts_per_prompt: int = Field(8, gt=0)
    """G."""
    micro_batch: int = Field(128, gt=0)
    """Rollouts per forward pass of one learner rank."""
    minibatches: int = Field(1, gt=0)
    """Optimizer steps per batch of rollouts."""
    mix: dict[str, float] = Field(default_factory=lambda: {"qa": 1.0, "composite": 1.0})
    """Weights of the suite's kinds of question. A JSONL file is asked from as it is."""
    algorithm: Algorithm = "grpo"
    """A name for parts of the objective, the fields from here to `icepop_band`: `config/load.py` fills in what it stands for (`config/algorithms.py`), and a
    part that is set by itself wins."""
    advantage: Advantage = "grpo"
    """How rewards become advantages: within the group (`grpo`: over its spread; `dr_grpo`; `rloo`: against the mean of the others), over the whole batch
    (`reinforce_pp`; `reinforce_pp_baseline` takes the group's mean off first), or each named reward by itself (`gdpo`)."""
    reward_weights: dict[str, float] = Field(default_factory=dict)
    """With `gdpo`: the named parts of the reward and their weights."""
    overlong_share: float = Field(0.0, ge=0, lt=1)
    """An answer that reaches into the last this share of `rollout.max_new_tokens` loses reward, linearly; correctness stays what it is. 0: none does."""
    overlong_penalty: float = Field(1.0, gt=0)
    """What an answer loses that is as long as allowed."""
    dynamic_sampling: int = Field(0, ge=0)
    """Groups whose answers all earn the same are set aside, and further prompts are asked in their place until there are `prompts_per_step` groups: at most
    this many batches of prompts a step, which generation pays for (1: no further ones). 0: every group is trained on."""
    surrogate: Surrogate = "clip"
    """What is weighed by advantages: the clipped ratio of each token, of the whole answer (`gspo`), or log-probs by a clipped ratio (`cispo`)."""
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0)
    """A ratio counts within [1 - clip_low, 1 + clip_high]. With `cispo`, clip_low = 1 is no lower bound."""
    dual_clip: float = Field(3.0, gt=1)
    """With `clip`: the largest ratio that counts for an answer worse than the others."""
    aggregation: Aggregation = "token_mean"
    """How the losses of tokens become one: mean over all tokens; or mean over answers of each answer's mean, of its sum, or of its sum over
    `rollout.max_new_tokens`."""
    kl_coeff: float = Field(0.0, ge=0)
    """Weight of the KL to the model that RL started from; 0 keeps no such model. Its memory and one more forward pass a step otherwise."""
    kl_estimator: KlEstimator = "k3"
    """Of log-ratios d of the sampled tokens: d, d^2 / 2, or exp(-d) + d - 1."""
    kl_placement: KlPlacement = "loss"
    """A term of the loss, or a penalty on the reward of each answer."""
    mismatch_correction: Correction = "none"
    """Weight of a token by its probability in the learner over that at rollout: cut at `tis_cap`, or 0 outside `icepop_band`."""
    tis_cap: float = Field(2.0, ge=1)
    icepop_band: tuple[float, float] = (0.5, 5.0)
    router_lr_scale: float = Field(0.1, ge=0)
    """The router learns this many times slower; 0 freezes it."""
    replay_routes: bool = True
    train_vision: bool = True
    reward: str = "megatron_ext.rl.rewards:skill_reward"
    """Dotted path `module:function` of the task reward. Evaluation and discovery ask it, too, which answers are right: those whose part "correct" is 1, or,
    without such a part, whose reward reaches `earl.correct_threshold`."""
    reward_timeout_s: float = Field(10.0, gt=0)
    max_logprob_diff: float = Field(1e-2, gt=0)
    """The run stops when rollout and learner log-probs differ by more than this under the same weights."""
    fleet: Literal["ray", "local"] = "ray"
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4, warmup_steps=5, schedule="constant", weight_decay=0.0)
    save_every: int = Field(0, ge=0)
    keep: int = Field(2, gt=0)
    async_save: bool = True
    """As in the supervised stages: the learner's checkpoints are written beside the next steps."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluations on the validation split; 0 evaluates only before and after."""
    init_from: Path | None = None


class EvaluateConfig(Section):
    split: Literal["train", "val", "test"] = "test"
    prompts_per_skill: int = Field(200, gt=0)
    samples: int = Field(8, ge=0)
    """Sampled answers per prompt for mean@k and pass@k, besides the greedy one; 0 skips sampling."""
    sampled_prompts_per_skill: int = Field(64, gt=0)
    blind: bool = True
    """Also answer with the image replaced by noise: must be near chance."""


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
