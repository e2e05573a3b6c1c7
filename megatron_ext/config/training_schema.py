"""The sections `parallel`, `pretrain`, `sft` and `mpo`: how ranks are laid out, and how stages learn from what is given."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from megatron_ext.config.section import Section


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


class StageConfig(Section):
    """What stages that learn from given examples have in common: conversations, or pairs of answers."""

    rows_each: ClassVar[int] = 1
    """Rows of tokens that an example makes."""

    steps: int = Field(100, ge=0)
    global_batch: int = Field(64, gt=0)
    """Examples per step over all data-parallel ranks."""
    micro_batch: int = Field(32, gt=0)
    """Examples per forward pass of one rank."""
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


class TrainConfig(StageConfig):
    """A supervised stage: `pretrain` (captions and questions) or `sft` (the instruction format)."""

    global_batch: int = Field(64, gt=0)
    """Conversations per step over all data-parallel ranks."""
    micro_batch: int = Field(32, gt=0)
    """Conversations per forward pass of one rank."""
    micro_batch_tokens: int = Field(0, ge=0)
    """With `packed`, in place of `micro_batch`: a rank's conversations of a step are spread evenly over micro-batches of at most this many tokens each. All
    data-parallel ranks run equally many, as many as the one with the most text needs. 0: `micro_batch` conversations each; giving both is refused."""
    mix: dict[str, float] = Field(default_factory=lambda: {"caption": 1.0, "qa": 1.0})
    """Weights of the kinds of conversation: `caption`, `qa` (single skills), `composite`."""
    image_context_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the image tokens that are hidden from self-attention while it learns, so that what they show is looked for by CLVR's taps (0.1 where base and
    adapter learn together). Attention then runs with a mask of all pairs of positions, which is slower and takes their memory."""
    text: dict[str, float] = Field(default_factory=dict)
    """Plain text instead of conversations: datasets in Megatron's indexed format (`tools/preprocess_data.py`), by path without .bin and .idx, and how much of
    each. Documents are joined end to end and cut into rows of `data.max_length` tokens, all of which are learnt."""


class MpoConfig(StageConfig):
    """Mixed preference optimisation: from a right and a wrong answer to the same question. The defaults are those of InternVL."""

    rows_each: ClassVar[int] = 2

    steps: int = Field(0, ge=0)
    """0: the recipe has no such stage. Otherwise discovery, evaluation and RL start from its result."""
    global_batch: int = Field(256, gt=0)
    """Pairs per step over all data-parallel ranks."""
    micro_batch: int = Field(16, gt=0)
    """Pairs per forward pass of one rank; the two answers of a pair are never parted."""
    pairs: Path | None = None
    """JSONL file of pairs, one object a line: {"image": ..., "question": ..., "chosen": ..., "rejected": ...}. Unset: questions of the suite."""
    mix: dict[str, float] = Field(default_factory=lambda: {"qa": 1.0, "composite": 1.0})
    """Without `pairs`: weights of the suite's kinds of question."""
    beta: float = Field(0.1, gt=0)
    """How much a log-ratio to the reference, the checkpoint that the stage starts from, counts. The reference costs its memory and a forward pass a step."""
    dpo_weight: float = Field(0.8, ge=0)
    """Of the preference loss: the right answer against the wrong one."""
    bco_weight: float = Field(0.2, ge=0)
    """Of the quality loss: each answer against the mean of those before."""
    sft_weight: float = Field(1.0, ge=0)
    """Of the generation loss: the cross entropy of right answers, which keeps them likely."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-7, min_lr=0.0, weight_decay=0.05)
