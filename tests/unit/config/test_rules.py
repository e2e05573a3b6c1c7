"""Rules between fields: each names its field, both numbers and what would work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.load import load_config
from megatron_ext.config.sizes import data_parallel
from megatron_ext.errors import ConfigError

BROKEN = [
    (["name=a/b"], "name", "'a/b' cannot name a folder"),
    (["data.image_size=48"], "data.image_size", "48 differs from model.vision.image_size = 32"),
    (["model.vision.patch_size=5"], "model.vision.patch_size", "5 does not divide model.vision.image_size = 32"),
    (["model.vision.downsample=3"], "model.vision.downsample", "3 does not divide the patches per side = 8"),
    (["model.vision.num_attention_heads=3"], "model.vision.num_attention_heads", "3 does not divide model.vision.hidden_size = 64"),
    (["model.vision.hidden_size=62", "model.vision.num_attention_heads=2"], "model.vision.hidden_size", "62 is not a multiple of 4"),
    (["model.num_query_groups=3"], "model.num_query_groups", "3 does not divide model.num_attention_heads = 4"),
    (["model.head_dim=15"], "model.head_dim", "15 is odd"),
    (["model.experts_per_token=9"], "model.experts_per_token", "9 is more than model.num_experts = 8"),
    (["model.experts_per_token=1"], "model.norm_topk_prob", "true with model.experts_per_token = 1"),
    (["model.moe_expert_bias=true"], "model.moe_expert_bias", "true with model.moe_score_function = softmax"),
    (
        ["model.moe_score_function=sigmoid", "model.norm_topk_prob=false"],
        "model.norm_topk_prob",
        "gates of model.experts_per_token = 2 by their sum",
    ),
    (["model.moe_pad_to_capacity=true"], "model.moe_pad_to_capacity", "true without a capacity to pad to"),
    (["model.moe_pad_to_capacity=true", "model.moe_capacity_factor=5"], "model.moe_capacity_factor", "(num_experts / experts_per_token = 4)"),
    (
        ["model.moe_pad_to_capacity=true", "model.moe_capacity_factor=2", "parallel.num_ranks=4", "parallel.ep=2"],
        "model.moe_pad_to_capacity",
        "true with parallel.ep = 2: the 4 data-parallel ranks",
    ),
    (["model.num_experts=1"], "model.num_experts", "1 expert has nothing to route to"),
    (["model.num_experts=0"], "earl.enabled", "true needs experts, and the model has none (model.num_experts = 0)"),
    (["model.num_experts=0", "model.moe_capacity_factor=1"], "model.moe_capacity_factor", "1.0 needs experts"),
    (["model.dense_layers=[3]"], "model.dense_layers", "3 is no layer among model.num_layers = 3"),
    (["model.num_experts=0", "model.dense_layers=[1]"], "model.dense_layers", "1 is no layer that could be dense"),
    (["model.dense_layers=[0, 1, 2]"], "model.dense_layers", "names all 3 layers"),
    (["model.vision.enabled=false"], "data.kind", "suite needs images, and the model has no vision"),
    (["model.vision.enabled=false"], "model.clvr.enabled", "true needs images, and the model has no vision"),
    (["model.vocab_size=257"], "model.vocab_size", "257 is not a multiple of 8"),
    (["data.vocab_size=300"], "data.vocab_size", "300 tokens does not fit model.vocab_size = 256"),
    (["model.clvr.taps=[[2, 1]]"], "model.clvr.taps", "(2, 1) is no pair of layers with source < target among model.num_layers = 3"),
    (["model.clvr.taps=[[1, 3]]"], "model.clvr.taps", "(1, 3) is no pair of layers"),
    (["model.clvr.taps=[[0, 1], [0, 1]]"], "model.clvr.taps", "names a pair twice"),
    (["model.clvr.taps=[]"], "model.clvr.taps", "is empty"),
    (["model.clvr.num_kv_heads=3"], "model.clvr.num_kv_heads", "3 does not divide model.clvr.num_heads = 4"),
    (["model.clvr.num_slots=8"], "model.clvr.num_slots", "8 would be ignored with model.clvr.inject = text"),
    (
        ["model.clvr.inject=slots", "model.clvr.fusion=addition", "model.clvr.kv_tokens=projected"],
        "model.clvr.inject",
        "slots would be ignored with fusion = addition: image tokens alone are added to",
    ),
    (
        ["model.clvr.inject=slots", "rollout.max_new_tokens=493"],
        "rollout.max_new_tokens",
        "493 after an image of 16 tokens and 4 memory tokens (model.clvr.num_slots) exceeds model.max_positions = 512",
    ),
    (
        ["model.clvr.inject=slots", "data.max_length=20"],
        "data.max_length",
        "takes 16 tokens and 4 memory tokens",
    ),
    (["model.clvr.taps=[[0, 2], [1, 2]]", "model.clvr.query_source=same_layer"], "model.clvr.taps", "two taps with one target, which are the same"),
    (["model.clvr.taps=[[0, 2], [1, 2]]", "model.clvr.query_source=input_embedding"], "model.clvr.taps", "two taps with one target"),
    (["model.clvr.kv_layers=[9]"], "model.clvr.kv_layers", "9 is none of model.vision.num_layers = 2 layers"),
    (["model.clvr.kv_layers=[0, 0]"], "model.clvr.kv_layers", "names a layer twice"),
    (["model.clvr.kv_layers=[0]", "model.clvr.kv_tokens=projected"], "model.clvr.kv_layers", "cannot be chosen with kv_tokens = projected"),
    (["model.clvr.kv_layers=[0]", "model.clvr.memory=learned"], "model.clvr.kv_layers", "would be ignored with memory = learned"),
    (["model.clvr.fusion=addition"], "model.clvr.kv_tokens", "raw with fusion = addition, which adds one vector to each image token"),
    (
        ["model.clvr.fusion=addition", "model.clvr.kv_tokens=unshuffled", "model.clvr.kv_layers=[0, 1]"],
        "model.clvr.kv_layers",
        "names 2 layers for 1 taps with fusion = addition",
    ),
    (["model.clvr.fusion=addition", "model.clvr.ffn_hidden=8"], "model.clvr.ffn_hidden", "8 would be ignored with fusion = addition"),
    (["evaluate.clvr=true", "model.clvr.enabled=false"], "evaluate.clvr", "the model has no taps"),
    (["sft.image_context_dropout=0.1", "model.clvr.enabled=false"], "sft.image_context_dropout", "hides image tokens that nothing else looks at"),
    (["data.kind=jsonl"], "data.path", "is missing"),
    (["data.kind=webdataset"], "data.path", "is missing, but data.kind = webdataset reads files"),
    (["data.kind=blend"], "data.path", "is missing, but data.kind = blend reads files"),
    (["data.kind=jsonl", "data.path=x.jsonl", "data.index=here"], "data.index", "'here' would be ignored: data.kind = jsonl has no shards"),
    (["data.path=x.jsonl"], "data.path", "'x.jsonl' would be ignored"),
    (["data.max_length=1024"], "data.max_length", "1024 is more than model.max_positions = 512"),
    (["data.max_length=16"], "data.max_length", "an image alone takes 16 tokens"),
    (["sft.micro_batch=24"], "sft.micro_batch", "24 does not divide the 64 conversations of a rank"),
    (["sft.micro_batch_tokens=512"], "sft.micro_batch_tokens", "512 counts the tokens of packed rows, but sft.packed = false"),
    (
        ["sft.micro_batch_tokens=200", "sft.packed=true"],
        "sft.micro_batch_tokens",
        "200 does not hold the longest conversation, data.max_length = 256",
    ),
    (
        ["sft.micro_batch_tokens=250", "sft.packed=true", "data.max_length=250", "parallel.num_ranks=2", "parallel.cp=2"],
        "sft.micro_batch_tokens",
        "250 does not hold the longest conversation, data.max_length = 250, as a multiple of 4 252",
    ),
    (
        ["sft.micro_batch_tokens=256", "sft.packed=true", "parallel.num_ranks=2", "parallel.pp=2", "parallel.vpp=2", "sft.global_batch=63"],
        "sft.global_batch",
        "63 gives a rank 63 conversations, of which parallel.vpp = 2 needs groups of parallel.pp = 2 micro-batches",
    ),
    (["parallel.num_ranks=3"], "pretrain.global_batch", "64 cannot be shared by 3 data-parallel ranks"),
    (
        ["parallel.num_ranks=2", "parallel.pp=2", "parallel.vpp=2", "sft.micro_batch=64"],
        "sft.micro_batch",
        "64 makes 1 micro-batches of a rank's 64 conversations, which parallel.vpp = 2 needs in groups of parallel.pp = 2",
    ),
    (
        ["parallel.num_ranks=2", "parallel.pp=2", "parallel.vpp=2", "rl.prompts_per_step=1", "rl.rollouts_per_prompt=2", "rl.minibatches=2"],
        "rl.prompts_per_step",
        "a rank gets 1 rollouts a minibatch, which parallel.vpp = 2 needs in at least parallel.pp = 2 parts",
    ),
    (["sft.mix.captoin=1"], "sft.mix.captoin", "is not a kind of conversation"),
    (["sft.mix={qa: 0}"], "sft.mix", "gives no kind of conversation a weight above 0"),
    (["sft.mix.qa=-1"], "sft.mix.qa", "the weight -1 is negative"),
    (["sft.optimizer.min_lr=1"], "sft.optimizer.min_lr", "1 is more than lr = 0.003"),
    (["sft.optimizer.beta2=1.0"], "sft.optimizer.beta2", "1 is not in [0, 1)"),
    (["rollout.max_new_tokens=500"], "rollout.max_new_tokens", "500 after an image of 16 tokens exceeds model.max_positions = 512"),
    (["rollout.temperature=0"], "rollout.temperature", "makes all rollouts of a prompt the same"),
    (["rollout.parallel.engine=deepspeed"], "rollout.parallel.engine", "deepspeed trains, and rollouts do not"),
    (["rollout.top_k=257"], "rollout.top_k", "257 is more than model.vocab_size = 256"),
    (["discover.committee_top=8"], "discover.committee_top", "8 of model.num_experts = 8 makes every expert a committee member"),
    (["discover.experts_per_layer=8"], "discover.experts_per_layer", "8 is not fewer than model.num_experts = 8"),
    (["discover.permutations=10"], "discover.permutations", "10 cannot show significance at discover.fwer = 0.05"),
    (["earl.warmup=0.8"], "earl.warmup", "0.8 and earl.cooldown = 0.3 are more than the whole run"),
    (["earl.follow=true"], "earl.follow", "true with earl.reestimate_every = 0"),
    (["earl.force_correlational=true", "discover.causal_gate=report"], "earl.force_correlational", "true, and discover.causal_gate = report holds no bonus"),
    (["earl.reestimate_every=5", "rl.environment=megatron_ext.rl.environments:zoom"], "earl.reestimate_every", "5 with rl.environment"),
    (
        ["discover.causal_gate=report", "discover.experts_per_layer=7"],
        "discover.experts_per_layer",
        "7 masked of model.num_experts = 8 leave fewer than experts_per_token = 2",
    ),
    (["earl.min_correct=9"], "earl.min_correct", "9 is more than rl.rollouts_per_prompt = 8"),
    (["rl.rollouts_per_prompt=1", "earl.enabled=false"], "rl.rollouts_per_prompt", "1 rollout has nothing to be compared with"),
    (["rl.minibatches=7"], "rl.prompts_per_step", "64 prompts x 8 rollouts do not divide into rl.minibatches = 7"),
    (["rl.clip_low=1.0"], "rl.clip_low", "1 would let a probability ratio fall to nothing"),
    (["rl.algorithm=cispo", "rl.clip_low=1.5"], "rl.clip_low", "1.5 makes the lower bound of ratios 1 - 1.5, below 0"),
    (["rl.kl_coeff=0.1", "rl.kl_estimator=k1"], "rl.kl_estimator", "k1 with rl.kl_placement = loss has a gradient of mean zero: rl.kl_coeff = 0.1"),
    (["rl.reward_weights.format=1"], "rl.reward_weights", "would be ignored: rl.advantage = grpo takes the total"),
    (["rl.advantage=gdpo"], "rl.reward_weights", "weighs no part of the reward"),
    (["rl.advantage=gdpo", "rl.reward_weights.format=1", "rl.overlong_share=0.1"], "rl.advantage", "gdpo takes named rewards, and rl.overlong_share = 0.1"),
    (["rl.icepop_band=[1.5, 5]"], "rl.icepop_band", "(1.5, 5) leaves out 1"),
    (["rl.sequence_band=[0.9, 1]"], "rl.sequence_band", "(0.9, 1) leaves out 1"),
    (["rl.max_staleness=2"], "rl.mismatch_correction", "none with rl.max_staleness = 2: rollouts of older weights would be learned from"),
    (["rl.partial_rollouts=true"], "rl.partial_rollouts", "true with rl.max_staleness = 0: no answer is under way"),
    (["rl.mismatch_correction=tis"], "rl.mismatch_correction", "tis cuts weights beyond a factor of 2, but rl.max_logprob_diff = 0.01 stops the run at 1.01"),
    (["rl.mismatch_correction=icepop"], "rl.mismatch_correction", "icepop cuts weights beyond a factor of 2"),
    (["rl.mismatch_correction=sequence_mask"], "rl.mismatch_correction", "sequence_mask cuts weights beyond a factor of 1.1"),
    (
        ["rl.algorithm=reinforce_pp", "rl.rollouts_per_prompt=1", "rl.dynamic_sampling=2", "earl.enabled=false"],
        "rl.rollouts_per_prompt",
        "1 rollout has nothing to be compared with",
    ),
    (["rollout.deterministic=true", "model.dtype=bf16"], "model.dtype", "bf16 with rollout.deterministic = true"),
    (
        ["rollout.deterministic=true", "parallel.num_ranks=2", "parallel.tp=2"],
        "rollout.parallel.tp",
        "1 with rollout.deterministic = true, and parallel.tp = 2",
    ),
    (
        [
            "rollout.deterministic=true",
            "parallel.tp=2",
            "rollout.parallel.tp=2",
            "rollout.parallel.ep=2",
            "parallel.num_ranks=2",
            "rollout.parallel.num_ranks=2",
        ],
        "rollout.parallel.etp",
        "1 with rollout.deterministic = true, and parallel.etp = 2",
    ),
    (["rollout.deterministic=true", "parallel.num_ranks=4", "parallel.tp=4"], "parallel.tp", "4 with rollout.deterministic = true: more than 2 partial sums"),
    (
        ["rollout.deterministic=true", "rollout.parallel.threads_per_rank=4"],
        "rollout.parallel.threads_per_rank",
        "4 with rollout.deterministic = true: threads",
    ),
    (
        ["rl.offload=true", "parallel.engine=deepspeed"],
        "rl.offload",
        "true with parallel.engine = deepspeed",
    ),
    (["data.image_root=pictures"], "data.image_root", "would be ignored with data.kind = suite: pictures are drawn"),
    (["rl.environment=mine"], "rl.environment", "'mine' is not of the form module:function"),
    (["rl.reward=mine"], "rl.reward", "'mine' is not of the form module:function"),
    (["evaluate.prompts_per_skill=10"], "evaluate.sampled_prompts_per_skill", "64 is more than evaluate.prompts_per_skill = 10"),
]


@pytest.mark.parametrize(("overrides", "field", "words"), BROKEN, ids=[field + " " + words[:12] for _, field, words in BROKEN])
def test_a_broken_rule_names_field_numbers_and_remedy(overrides: list[str], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    matching = [problem for problem in caught.value.problems if problem.where.split(" ")[0] == field and words in problem.problem]
    assert matching, str(caught.value)
    assert matching[0].remedy


def test_switched_off_parts_are_not_judged() -> None:
    load_config(None, ["model.clvr.enabled=false", "model.clvr.taps=[]"])
    load_config(None, ["earl.enabled=false", "earl.warmup=1.0"])
    load_config(None, ["rl.steps=0", "rollout.temperature=0"])
    load_config(None, ["sft.packed=true", "sft.micro_batch_tokens=256", "sft.global_batch=63"])
    load_config(None, ["rl.algorithm=reinforce_pp", "rl.rollouts_per_prompt=1", "earl.enabled=false"])
    load_config(None, ["rl.kl_estimator=k1", "rl.kl_placement=reward", "rl.kl_coeff=0.1"])
    load_config(None, ["rl.mismatch_correction=tis", "rl.max_logprob_diff=1"])
    load_config(None, ["rl.mismatch_correction=sequence_mask", "rl.max_staleness=1", "rl.partial_rollouts=true", "rollout.deterministic=true"])
    load_config(None, ["model.clvr.inject=slots", "model.clvr.num_slots=8", "rollout.max_new_tokens=487"])
    load_config(None, ["model.num_experts=0", "earl.enabled=false", "discover.committee_top=99"])
    load_config(None, ["model.vision.enabled=false", "model.clvr.enabled=false", "data.kind=jsonl", "data.path=x.jsonl", "model.vision.patch_size=5"])


@given(ranks=st.integers(1, 8), micro=st.integers(1, 16), repeats=st.integers(1, 4), tp=st.sampled_from([1, 2]))
def test_a_batch_that_every_rank_can_split_evenly_is_accepted(ranks: int, micro: int, repeats: int, tp: int) -> None:
    total = ranks * micro * repeats
    sizes = [f"{stage}.{name}" for stage in ("pretrain", "sft") for name in (f"global_batch={total}", f"micro_batch={micro}")]
    resolved = load_config(None, [*sizes, f"rl.prompts_per_step={ranks}", f"parallel.num_ranks={ranks * tp}", f"parallel.tp={tp}"])
    assert resolved.config.sft.global_batch % (data_parallel(resolved.config.parallel) * resolved.config.sft.micro_batch) == 0
