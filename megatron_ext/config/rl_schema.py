"""The sections `rollout`, `discover`, `earl` and `rl`: how answers are sampled, and what is learned from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config.algorithms import Advantage, Aggregation, Algorithm, Correction, KlEstimator, KlPlacement, Surrogate
from megatron_ext.config.section import Section
from megatron_ext.config.training_schema import OptimizerConfig, ParallelConfig

Placement = Literal["colocated", "disaggregated"]


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
    """Rollout worlds; each has `parallel.num_ranks` processes. They may become fewer: one that is lost is replaced, and given up after `restarts`."""
    retries: int = Field(3, ge=0)
    """How often an answer is begun again on another replica because its own was lost; then it is counted as failed, and never trained on."""
    restarts: int = Field(3, ge=0)
    """How often a replica is started anew without having answered anything in between. The run ends when none is left."""
    parallel: ParallelConfig = ParallelConfig()


class DiscoverConfig(Section):
    prompts_per_skill: int = Field(96, gt=1)
    survey_dtype: Literal["float64", "float32", "float16"] = "float64"
    """How the survey stores a mass, of which there is one for each answer, layer and expert: 100 000 answers of 48 layers with 128 experts are 4.9, 2.5 or
    1.2 GB, once for the answer, once for the prompt, once for token control. float64 is exact; float16 is off by up to 0.05 %, which is nothing beside the
    differences between prompts."""
    method: Literal["topm", "nmf", "spectral", "louvain"] = "topm"
    """Which of the significant experts are a skill's cluster. `topm`: all of them, up to the numbers below. The others keep those that work together (parts of
    a non-negative factorisation, communities of the co-activation graph) and give each community to one skill: no expert serves two. They never add one,
    take up to 4 bytes for each of 512 experts and each answer, and find communities anew on halves and without each template."""
    permutations: int = Field(1000, gt=0)
    correction: Literal["fwer", "bh"] = "fwer"
    """Among very many pairs of layer and expert: `fwer` keeps the chance of ANY false one at `fwer`; `bh` (Benjamini-Hochberg) keeps the expected SHARE of
    false ones there. With R permutations no p is below 1 / (1 + R), so that `bh` finds nothing or at least pairs / (fwer * R) pairs at once: on large models
    it wants many permutations."""
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
    transfer_auroc: float = Field(0.8, ge=0, le=1)
    """A cluster found without one template must tell its skill's prompts from others on that template at least so well, or the skill has no cluster: what was
    found is the template's and not the skill's. Not asked where no template can be left out. 0: not asked at all."""
    bootstrap_frequency: float = Field(0.8, ge=0, le=1)
    bootstraps: int = Field(200, gt=0)
    causal_gate: Literal["off", "report", "enforce"] = "off"
    """Whether masking a cluster in the router must hurt its skill, more than it hurts other skills and more than masking random experts does
    (`earl/causal.py`). `report`: what it does is measured and said; `enforce`: a cluster that does not is correlational, and gets no bonus. Costs one greedy
    answer to each of `causal_prompts` prompts of every skill for nothing masked, for every cluster, and for every one of `causal_masks`:
    docs/studies/causal_gate.md."""
    causal_prompts: int = Field(96, gt=1)
    """Prompts of every skill, of the validation split."""
    causal_masks: int = Field(8, gt=0)
    """Random masks for each cluster."""


Control = Literal["none", "random", "shuffled"]


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
    force_correlational: bool = False
    """Clusters that `discover.causal_gate = enforce` found correlational get the bonus all the same."""
    reestimate_every: int = Field(0, ge=0)
    """Steps after which clusters are looked for again, in the correct answers of these steps, and compared with those that get the bonus: how stale they have
    become is in `earl/drift/*`, `earl/cluster_stale` and drift.jsonl. Costs no answer: the steps' rollouts are read back, and discovery runs on them. 0: never.
    """
    follow: bool = False
    """Clusters that are found again take the place of the old ones in the bonus, their sigma too, from the next step on. False: they are reported only."""
    mode: Literal["score", "pathwise", "router_pg"] = "score"
    """What teaches the router beside the answers' advantages (docs/studies/gradient_modes.md). `score`: nothing, the bonus is a reward. `pathwise`: the
    gradient of the cluster's softmax mass on correct answers, which reaches experts that were not chosen. `router_pg`: routes of answers are sampled on the
    clusters' layers and reinforced as actions; where answers are evaluated they stay greedy. Either costs a few operations on the router's scores."""
    pathwise_weight: float = Field(0.03, gt=0)
    """lambda_p of `pathwise`; 0.01 to 0.1 is usual."""
    router_weight: float = Field(0.2, gt=0)
    """Weight of the routes' surrogate in `router_pg`; 0.1 to 0.3 is usual."""
    router_clip: float = Field(0.1, gt=0, lt=1)
    """Bounds of a route's probability ratio in `router_pg`: within 1 +- this."""
    combine: Literal["bounded", "add", "gdpo"] = "bounded"
    """How bonus and task meet. `bounded`: as a share of the task's advantage, on correct answers alone. `add`: reward + lambda mass, before answers are
    compared; `gdpo`: both compared within the group, then summed. These two pay wrong answers too, and may turn an advantage's sign: for comparison."""
    control: Control = "none"
    """Which clusters are paid for. `random`: other experts, as many and with nearly the same mass. `shuffled`: the next skill's cluster. Usage of paid
    (`earl/cluster_usage`) and of true clusters (`earl/true_usage`) is logged apart: that usage goes up is no success."""
    router_kl: float = Field(0.0, ge=0)
    """Weight of the routers' KL to those that RL started from, on the clusters' layers of answers. `earl/router_kl` is logged whatever it is."""


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
    """A name for parts of the objective, the fields from here to `sequence_band`: `config/load.py` fills in what it stands for (`config/algorithms.py`), and a
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
    """Weight of a token by its probability in the learner over that at rollout, which another engine or older weights have changed: cut at `tis_cap`; or 0
    outside `icepop_band`; or (`sequence_mask`) cut at `tis_cap`, and 0 for whole answers whose geometric mean of it is outside `sequence_band`."""
    tis_cap: float = Field(2.0, ge=1)
    icepop_band: tuple[float, float] = (0.5, 5.0)
    sequence_band: tuple[float, float] = (0.9, 1.1)
    """For engines that differ by rounding alone 0.999 to 1.001 is usual; how far a step moves the weights is in `staleness/*`."""
    router_lr_scale: float = Field(0.1, ge=0)
    """The router learns this many times slower; 0 freezes it."""
    replay_routes: bool = True
    train_vision: bool = True
    reward: str = "megatron_ext.rl.rewards:skill_reward"
    """Dotted path `module:function` of the task reward. Evaluation and discovery ask it, too, which answers are right: those whose part "correct" is 1, or,
    without such a part, whose reward reaches `earl.correct_threshold`."""
    reward_workers: int = Field(2, gt=0)
    """Processes that reward answers, side by side."""
    reward_timeout_s: float = Field(10.0, gt=0)
    """The longest that one answer may take. What takes longer, or dies, is tried once more in a new process; then it has failed, which is no reward of 0."""
    reward_memory_gib: float | None = Field(8.0, gt=0)
    """Addresses that a reward's process may take: beyond, it sees a MemoryError, which costs that answer alone. Processes that it starts count for themselves.
    Null: no limit."""
    environment: str = ""
    """Dotted path `module:function` of what goes on with a conversation after each turn of the model, under the limits of rewards (docs/environments.md), such
    as megatron_ext.rl.environments:zoom. Empty: an answer has one turn."""
    max_turns: int = Field(4, gt=1)
    """With an environment: turns of the model in one conversation. Each may have `rollout.max_new_tokens`, and all together fit `model.max_positions`."""
    max_logprob_diff: float = Field(1e-2, gt=0)
    """The run stops when rollout and learner log-probs differ by more than this under the same weights."""
    probe: bool = True
    """After every publication the learner and all rollouts compute the log-probs of one prompt, fixed for the run, with their new weights. Where they differ by
    more than `max_logprob_diff`, with `rollout.deterministic` by anything, the run stops before an answer is generated. Costs a forward pass of a few hundred
    tokens on either side."""
    offload: bool = False
    """Learner and rollouts leave the device to each other in turn, for ranks that share one. While answers are generated the learner has no gradient
    buffers, and on a GPU its weights and its optimizer's state wait in pinned host memory; while it learns the rollouts have no weights on the device, and no
    keys and values. Costs the copies out and back in every step, and as much host memory, of which torch pins powers of two."""
    fleet: Literal["ray", "local"] = "ray"
    placement: Placement = "colocated"
    """`colocated`: learner and rollouts share all GPUs, and what a rank leaves idle another can use. `disaggregated`: every rank has a GPU of its own, so that
    answers are written while the learner learns; it takes as many GPUs as there are ranks."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4, warmup_steps=5, schedule="constant", weight_decay=0.0)
    save_every: int = Field(0, ge=0)
    keep: int = Field(2, gt=0)
    async_save: bool = True
    """As in the supervised stages: the learner's checkpoints are written beside the next steps."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluations on the validation split; 0 evaluates only before and after."""
    max_staleness: int = Field(0, ge=0)
    """How many steps older than the learner's the weights may be that a step's answers were begun with. 0: each step waits for its answers; 1: the next answers
    are written while the learner learns from these; more: slow answers have so many steps' time. Above 0 tokens are weighed by `mismatch_correction`, and
    the bounds of `max_logprob_diff` and `rollout.deterministic` hold for answers of the present weights alone."""
    partial_rollouts: bool = False
    """New weights are loaded in the middle of answers, which go on under them; each token knows its weights' version. False: answers are ended first."""
    silence_s: float = Field(30.0, gt=0)
    """A rank that gives no sign of life for so long, which it does every second whatever it is at, is lost: it is ended and started anew."""
    restarts: int = Field(3, ge=0)
    """How often a learner of which a rank was lost is started again from its latest checkpoint without having got further. Steps since then are repeated with
    the answers of the bank."""
    init_from: Path | None = None
