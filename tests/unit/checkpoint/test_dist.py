"""Saving and loading on one rank: everything comes back, and what cannot be loaded changes nothing. Other layouts: tests/parallel/test_training.py."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.checkpoint.dist import latest_step, load_checkpoint, save_checkpoint
from megatron_ext.checkpoint.folder import describe_file, read_manifest, write_manifest
from megatron_ext.checkpoint.torch_dist import read_metadata
from megatron_ext.config.schema import ModelConfig, OptimizerConfig
from megatron_ext.errors import CheckpointError
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.megatron_engine import MegatronEngine, build_engine
from tests.support.models import IMAGE, small_config
from tests.support.training import ADAM, run_steps, same, start, weights

MODEL = small_config()


def save(folder: Path, step: int, state: MegatronEngine, context: ParallelContext, model: ModelConfig = MODEL, **extra: object) -> Path:
    return save_checkpoint(folder, step, state.chunks, state.optimizer_state, dict(extra), context, model, keep=2)


def load(path: Path, state: MegatronEngine, context: ParallelContext, model: ModelConfig = MODEL) -> dict:
    return load_checkpoint(path, state.chunks, state.optimizer_state, context=context, model_config=model)


def other(context: ParallelContext, optimizer: OptimizerConfig = ADAM, **options: object) -> MegatronEngine:
    """The same model with other weights."""
    return build_engine([build_model(MODEL, IMAGE, context, seed=9)], optimizer, 10, context, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def saved(context: ParallelContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two steps, for tests that only read."""
    folder = tmp_path_factory.mktemp("saved")
    state = start(context)
    run_steps(state, 0, 2, 4, context)
    save(folder, 2, state, context, note="here")
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(context: ParallelContext, tmp_path: Path, dtype: str) -> None:
    """In bfloat16 too, where Adam keeps float32 master weights that the model's own weights do not determine."""
    model = small_config(dtype=dtype)

    def built(seed: int) -> MegatronEngine:
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        return build_engine([build_model(model, IMAGE, context, seed).to(kind)], ADAM, 10, context)

    straight = built(0)
    run_steps(straight, 0, 3, 4, context)
    save(tmp_path, 3, straight, context, model, note="here")
    expected = run_steps(straight, 3, 6, 4, context)

    resumed = built(9)
    assert load(tmp_path, resumed, context, model) == {"note": "here", "step": 3}
    assert resumed.step == 3
    assert run_steps(resumed, 3, 6, 4, context) == expected
    assert same(weights(straight), weights(resumed))


def test_saving_changes_nothing(context: ParallelContext, tmp_path: Path) -> None:
    quiet, saving = start(context), start(context)
    for step in range(3):
        expected = run_steps(quiet, step, step + 1, 4, context)
        assert run_steps(saving, step, step + 1, 4, context) == expected
        save(tmp_path, step, saving, context)
    assert same(weights(quiet), weights(saving))


def test_a_checkpoint_may_be_saved_and_loaded_before_the_first_update(context: ParallelContext, tmp_path: Path) -> None:
    first, second = start(context), other(context)
    save(tmp_path, 0, first, context)
    load(tmp_path, second, context)
    assert run_steps(first, 0, 2, 4, context) == run_steps(second, 0, 2, 4, context)


def test_weights_alone_start_a_new_stage(context: ParallelContext, saved: Path) -> None:
    model = build_model(MODEL, IMAGE, context, seed=9)
    assert load_checkpoint(saved / "step_000002", model, context=context, model_config=MODEL)["step"] == 2
    state = build_engine([model], ADAM, 10, context)
    trained = other(context)
    load(saved, trained, context)
    assert same(weights(state), weights(trained))
    assert state.step == 0


def test_how_experts_are_computed_may_change_and_an_older_checkpoint_has_the_defaults_of_newer_fields(context: ParallelContext, copy: Path) -> None:
    path = copy / "step_000002" / "state.json"
    record = json.loads(path.read_text())
    for name in [name for name in record["model"] if name.startswith("moe_") and name != "moe_aux_loss_coeff"]:
        del record["model"][name]
    path.write_text(json.dumps(record))
    write_manifest(path.parent, {**read_manifest(path.parent), "state.json": describe_file(path)})
    config = MODEL.model_copy(update={"experts_kernel": "sequential"})
    assert load_checkpoint(copy, build_model(config, IMAGE, context), context=context, model_config=config)["step"] == 2
    scored = MODEL.model_copy(update={"moe_score_function": "sigmoid"})
    with pytest.raises(CheckpointError, match="moe_score_function: checkpoint has softmax, configuration has sigmoid"):
        load_checkpoint(copy, build_model(scored, IMAGE, context), context=context, model_config=scored)


def test_random_states_return(context: ParallelContext, tmp_path: Path) -> None:
    state = start(context)
    save(tmp_path, 1, state, context)

    def draw() -> list[float]:
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(2).tolist()
        return inside + torch.rand(2).tolist()

    expected = draw()
    assert draw() != expected
    load(tmp_path, state, context)
    assert draw() == expected


def test_hyperparameters_are_those_of_the_configuration_that_loads(context: ParallelContext, saved: Path) -> None:
    """Half the rate, and a schedule that goes on from the saved step."""
    state = other(context, OptimizerConfig(lr=5e-3, warmup_steps=4, weight_decay=0.0))
    load(saved, state, context)
    assert state.lr == pytest.approx(5e-3 * 2 / 4)
    assert {group["weight_decay"] for group in state.optimizer.param_groups} == {0.0}


def test_groups_that_differ_in_their_rate_alone_stay_apart(context: ParallelContext, tmp_path: Path) -> None:
    first, second = start(context, router_lr_scale=0.1), other(context, router_lr_scale=0.1)
    run_steps(first, 0, 2, 4, context)
    save(tmp_path, 2, first, context)
    load(tmp_path, second, context)
    assert run_steps(first, 2, 4, 4, context) == run_steps(second, 2, 4, 4, context)
    assert same(weights(first), weights(second))


def unchanged(state: MegatronEngine, before: dict[str, torch.Tensor], context: ParallelContext) -> bool:
    return same(before, weights(state)) and state.step == 0


def test_another_model_is_refused_field_by_field(context: ParallelContext, saved: Path) -> None:
    state = other(context)
    before = weights(state)
    changed = MODEL.model_copy(update={"num_experts": 16, "rope_theta": 5e4})
    with pytest.raises(CheckpointError) as caught:
        load(saved, state, context, changed)
    assert "model.num_experts: checkpoint has 8, configuration has 16" in str(caught.value)
    assert "model.rope_theta: checkpoint has 10000.0, configuration has 50000.0" in str(caught.value)
    assert unchanged(state, before, context)


FILES = ["__0_0.distcp", ".metadata", "common.pt", "metadata.json", "state.json", "rng_0000.safetensors"]


def test_these_are_all_files_of_a_checkpoint(saved: Path) -> None:
    assert sorted(path.name for path in (saved / "step_000002").iterdir()) == sorted([*FILES, "manifest.json"])


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("where", [0.02, 0.5, 0.98])
def test_a_flipped_bit_is_found_and_its_file_named_and_nothing_changes(context: ParallelContext, copy: Path, name: str, where: float) -> None:
    path = copy / "step_000002" / name
    contents = bytearray(path.read_bytes())
    contents[int(where * len(contents))] ^= 1
    path.write_bytes(bytes(contents))
    state = other(context)
    before = weights(state)
    with pytest.raises(CheckpointError, match=f"{name}: (has|is not)"):
        load(copy, state, context)
    assert unchanged(state, before, context)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_and_nothing_changes(context: ParallelContext, copy: Path, name: str) -> None:
    path = copy / "step_000002" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    state = other(context)
    before = weights(state)
    with pytest.raises(CheckpointError, match=f"{name}: has "):
        load(copy, state, context)
    assert unchanged(state, before, context)
    assert latest_step(copy) == 2


def test_a_missing_checkpoint_is_named_and_nothing_changes(context: ParallelContext, tmp_path: Path) -> None:
    state = other(context)
    before = weights(state)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load(tmp_path, state, context)
    assert unchanged(state, before, context)


def test_weights_without_optimizer_state_cannot_resume_a_run(context: ParallelContext, tmp_path: Path) -> None:
    state = start(context)
    save_checkpoint(tmp_path, 1, state.chunks, None, {}, context, MODEL, keep=1)
    with pytest.raises(CheckpointError, match="holds no optimizer state"):
        load(tmp_path, state, context)
    load_checkpoint(tmp_path, state.chunks, context=context, model_config=MODEL)


def test_a_checkpoint_with_other_parameters_frozen_is_refused_and_nothing_changes(context: ParallelContext, tmp_path: Path) -> None:
    save(tmp_path, 1, start(context, frozen=("vision.",)), context)
    state = other(context)
    before = weights(state)
    with pytest.raises(CheckpointError, match=r"has no tensor optimizer\.state\..*vision.*frozen"):
        load(tmp_path, state, context)
    assert unchanged(state, before, context)


class Evil:
    """Unpickled without restraint, it runs code."""

    def __reduce__(self) -> tuple:
        return eval, ("1 / 0",)


def forge(checkpoint: Path, name: str) -> None:
    """Replaces a file by a pickle that runs code, and its digest in the manifest by one that fits."""
    torch.save(Evil(), checkpoint / name) if name == "common.pt" else (checkpoint / name).write_bytes(pickle.dumps(Evil()))
    write_manifest(checkpoint, {**read_manifest(checkpoint), name: describe_file(checkpoint / name)})


def test_what_megatron_pickles_is_never_opened(context: ParallelContext, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch is told about pickles in general."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    forge(copy / "step_000002", "common.pt")
    with pytest.raises(ZeroDivisionError):
        torch.load(copy / "step_000002" / "common.pt")
    assert load(copy, other(context), context)["step"] == 2


def test_tensors_that_would_run_code_are_refused(context: ParallelContext, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle in the place of the first tensor, with a manifest that fits."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    checkpoint = copy / "step_000002"
    evil = io.BytesIO()
    torch.save(Evil(), evil, _use_new_zipfile_serialization=False)
    place = next(iter(read_metadata(checkpoint).storage_data.values()))
    path = checkpoint / place.relative_path
    contents = bytearray(path.read_bytes())
    contents[place.offset : place.offset + len(evil.getvalue())] = evil.getvalue()
    path.write_bytes(bytes(contents))
    write_manifest(checkpoint, {**read_manifest(checkpoint), path.name: describe_file(path)})
    with pytest.raises(CheckpointException, match=r"weights_only|Weights only"):
        load(copy, other(context), context)


def test_metadata_that_would_run_code_is_refused(context: ParallelContext, copy: Path) -> None:
    """A forged pickle with a forged manifest: it names a builtin that runs code, and must not reach it."""
    forge(copy / "step_000002", ".metadata")
    state = other(context)
    before = weights(state)
    with pytest.raises(CheckpointError, match=r"builtins\.eval has no place"):
        load(copy, state, context)
    assert unchanged(state, before, context)


def test_every_moment_is_stored_under_the_name_and_shape_of_its_parameter(saved: Path) -> None:
    """Which is what lets another layout read them."""
    tensors = read_metadata(saved / "step_000002").state_dict_metadata
    names = [name for name in tensors if not name.startswith("optimizer.")]
    assert names
    for name in names:
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert tensors[f"optimizer.state.{kind}.{name}"].size == tensors[name].size
