"""DeepSpeed's JSON files: those that come along are in order, every mistake has a message that names its key, and no "auto" reaches DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.deepspeed import fill_deepspeed, read_deepspeed, stage_of
from megatron_ext.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.plan import check_layout

CONFIGS = Path(__file__).parents[3] / "deepspeed_configs"
FILES = sorted(CONFIGS.glob("*.json"))
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """zero2.json (or another file) with some values changed, by dotted key; None removes one."""

    def write(changes: dict[str, Any], base: str = "zero2") -> Path:
        settings = json.loads((CONFIGS / f"{base}.json").read_text())
        for dotted, value in changes.items():
            *path, last = dotted.split(".")
            section = settings
            for key in path:
                section = section.setdefault(key, {})
            section.pop(last, None)
            if value is not None:
                section[last] = value
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(settings))
        return file

    return write


def problems(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read_deepspeed(file)
    return [str(problem).replace(f" ({file})", "") for problem in error.value.problems]


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [tree]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_that_come_along_are_in_order(file: Path) -> None:
    assert stage_of(read_deepspeed(file)) == int(file.stem[4])


def test_every_file_is_named_in_the_readme_beside_them() -> None:
    readme = (CONFIGS / "README.md").read_text()
    assert [file.name for file in FILES if f"`{file.name}`" not in readme] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_values_come_from_the_run_and_no_auto_is_left(file: Path) -> None:
    filled = fill_deepspeed(read_deepspeed(file), OptimizerConfig(lr=3e-4, beta1=0.8, beta2=0.9, eps=1e-7, weight_decay=0.2, clip_grad=0.7), "bf16")
    assert "auto" not in leaves(filled)
    assert filled["gradient_clipping"] == 0.7
    assert filled["bf16"] == {"enabled": True}
    params = {key: value for key, value in filled["optimizer"]["params"].items() if key != "torch_adam"}
    assert params == {"lr": 3e-4, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.2}


REFUSED = [
    ({"zero_optimisation": {}}, "zero_optimisation: is not a key that engine deepspeed takes; did you mean zero_optimization?"),
    ({"zero_optimization.reduce_bucketsize": 1}, "zero_optimization.reduce_bucketsize: is not a key that engine deepspeed takes; did you mean"),
    ({"zero_optimization.stage": 0}, "zero_optimization.stage: is 0: without ZeRO, DeepSpeed clips the experts of every rank by another norm; use 1, 2 or 3"),
    ({"zero_optimization.stage": "auto"}, 'zero_optimization.stage: is "auto", which nothing here fills'),
    ({"zero_optimization.reduce_bucket_size": "auto"}, 'zero_optimization.reduce_bucket_size: is "auto", which nothing here fills'),
    ({"zero_optimization": None}, "zero_optimization.stage: is missing"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: is 4: Megatron's schedule counts micro-batches"),
    ({"managed_gradient_accumulation": True}, "managed_gradient_accumulation: is true: Megatron's schedule drives the micro-batches"),
    ({"managed_gradient_accumulation": None}, "managed_gradient_accumulation: is missing: Megatron's schedule drives the micro-batches"),
    ({"communication_data_type": None}, "communication_data_type: is missing: gradients summed over ranks in bf16"),
    ({"data_types.grad_accum_dtype": "bf16"}, 'data_types.grad_accum_dtype: is "bf16": gradients accumulated in bf16'),
    ({"gradient_clipping": 1.0}, 'gradient_clipping: is 1.0, but its value comes from optimizer.clip_grad of the stage; write "auto" here and the value there'),
    ({"optimizer.params.lr": 1e-3}, "optimizer.params.lr: is 0.001, but its value comes from optimizer.lr of the stage"),
    ({"bf16.enabled": True}, "bf16.enabled: is true, but its value comes from model.dtype"),
    ({"optimizer.type": "Muon"}, 'optimizer.type: is "Muon": other optimizers have not been compared'),
    ({"optimizer": None}, 'optimizer.type: is missing: other optimizers have not been compared with engine megatron; write "AdamW"'),
    ({"optimizer": "AdamW"}, 'optimizer: is "AdamW", but it is a section; write an object'),
    ({"fp16.enabled": True}, "fp16: has no place here: train in bf16 or fp32 (model.dtype); remove it"),
    ({"scheduler": {}}, "scheduler: would be a second learning-rate schedule"),
    ({"train_batch_size": 8}, "train_batch_size: is the stage's global_batch"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel: is AutoTP"),
    ({"expert_parallel": {}}, "expert_parallel: is AutoEP"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size: is Ulysses"),
    ({"pipeline": {}}, "pipeline: is DeepSpeed's own pipeline"),
    ({"hybrid_engine": {}}, "hybrid_engine: generates with HuggingFace models only"),
    ({"compile": {"deepcompile": True}}, "compile: is DeepCompile"),
    ({"checkpoint": {}}, "checkpoint: is DeepSpeed's own, which loses experts"),
    ({"activation_checkpointing": {}}, "activation_checkpointing: is parallel.recompute"),
    ({"zero_optimization.zero_hpz_partition_size": 2}, "zero_optimization.zero_hpz_partition_size: takes consecutive ranks for one node"),
    ({"zero_optimization.zero_quantized_weights": True}, "zero_optimization.zero_quantized_weights: (qwZ) has not been compared"),
    ({"zero_optimization.zero_quantized_gradients": True}, "zero_optimization.zero_quantized_gradients: (qgZ) has not been compared"),
    ({"zero_optimization.zenflow": {}}, "zero_optimization.zenflow: was seen to change the model before the first update"),
    ({"zero_optimization.mics_shard_size": 2}, "zero_optimization.mics_shard_size: shards over consecutive ranks"),
    ({"zero_optimization.reduce_scatter": False}, "zero_optimization.reduce_scatter: is false: DeepSpeed shards the gradients of experts in no other way"),
    ({"zero_optimization.contiguous_gradients": False}, "zero_optimization.contiguous_gradients: is false"),
    ({"zero_optimization.stage": 1, "zero_optimization.overlap_comm": True}, "zero_optimization.overlap_comm: is true, which stage 1 cannot do"),
    ({"zero_optimization.stage": 3}, "zero_optimization.memory_efficient_linear: is missing, which would replace torch.nn.functional.linear"),
    ({"zero_optimization.offload_optimizer": {"device": "nvme"}}, 'zero_optimization.offload_optimizer.device: is "nvme", which has not been tried; use "cpu"'),
    (
        {"zero_optimization.offload_optimizer": {"device": "cpu", "super_offload": True}},
        "zero_optimization.offload_optimizer.super_offload: has not been tried with experts",
    ),
    ({"zero_optimization.stage": 1, "zero_optimization.offload_optimizer": {"device": "cpu"}}, "zero_optimization.offload_optimizer: is for stage 2 and 3"),
    ({"zero_optimization.offload_param": {"device": "cpu"}}, "zero_optimization.offload_param: is for stage 3, this is stage 2; use stage 3"),
    ({"zero_optimization.offload_param": {"device": "cpu"}}, "zero_optimization.offload_param: stands without offload_optimizer"),
    ({"optimizer.params.torch_adam": None}, "optimizer.params.torch_adam: is missing: DeepSpeed's own Adam for GPUs has not been compared"),
    ({"zero_optimization.offload_optimizer": {"device": "cpu"}}, "optimizer.params.torch_adam: is true, but an offloaded optimizer runs DeepSpeed's own Adam"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_what_would_train_otherwise_is_refused_by_its_key(changes: dict[str, Any], message: str, write: Write) -> None:
    assert any(problem.startswith(message) for problem in problems(write(changes))), problems(write(changes))


def test_all_mistakes_are_told_at_once(write: Write) -> None:
    assert len(problems(write({"fp16": {}, "scheduler": {}, "gradient_accumulation_steps": 2}))) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "holds no JSON object"), ('{"optimizer": {}, "optimizer": {}}', "the key 'optimizer' stands twice")],
)
def test_a_file_that_is_not_such_a_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    assert message in problems(file)[0]


LAYOUTS = [
    ({"num_ranks": 2, "pp": 2}, "parallel.pp: 2 pipeline stages, which parallel.engine = deepspeed does not have; use 1, or engine=megatron"),
    ({"num_ranks": 2, "pp": 2, "vpp": 2}, "parallel.pp: 2 pipeline stages"),
    ({"overlap_grad_reduce": True, "overlap_param_gather": True}, "parallel.overlap_param_gather: is a setting of Megatron's data parallelism"),
    ({"overlap_grad_reduce": True}, "parallel.overlap_grad_reduce: is a setting of Megatron's data parallelism"),
    ({"num_ranks": 4, "tp": 2, "etp": 1}, "parallel.etp: experts split 1 ways over a tensor-parallel group of 2"),
    ({"num_ranks": 4, "tp": 2, "ep": 2, "etp": 2}, "parallel.etp: 2 with ep = 2 under ZeRO-3"),
    ({"deepspeed": None}, "parallel.deepspeed: is missing, but parallel.engine = deepspeed needs its JSON file"),
    ({"deepspeed": Path("nowhere.json")}, "nowhere.json: cannot be read (No such file or directory)"),
    ({"engine": "megatron"}, "would be ignored by parallel.engine = megatron"),
]


@pytest.mark.parametrize(("changes", "message"), LAYOUTS, ids=[message.split(":")[0] + str(number) for number, (_, message) in enumerate(LAYOUTS)])
def test_a_layout_that_the_engine_cannot_have_is_refused(changes: dict[str, Any], message: str) -> None:
    parallel = ParallelConfig(**{"engine": "deepspeed", "deepspeed": CONFIGS / "zero3.json", **changes})
    found = [str(problem) for problem in check_layout(ModelConfig(num_layers=4), parallel)]
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize("layout", [{}, {"num_ranks": 2, "tp": 2}, {"num_ranks": 4, "tp": 2, "ep": 2}, {"num_ranks": 2, "cp": 2}])
def test_layouts_that_the_engine_can_have_pass(layout: dict[str, int]) -> None:
    assert check_layout(ModelConfig(), ParallelConfig(engine="deepspeed", deepspeed=CONFIGS / "zero3.json", **layout)) == []
