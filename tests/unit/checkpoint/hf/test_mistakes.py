"""What is wrong with a Hugging Face checkpoint is said before a byte is written, and nothing is touched."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from megatron_ext.checkpoint.folder import latest_step
from megatron_ext.checkpoint.hf.configuration import read_config
from megatron_ext.checkpoint.hf.from_megatron import megatron_to_hf
from megatron_ext.checkpoint.hf.to_megatron import hf_to_megatron
from megatron_ext.errors import CheckpointError
from tests.support import hf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(tmp_path_factory.mktemp("hf") / "whole", max_shard_size="50KB")


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "source"))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def drop_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def wrong_shape(folder: Path) -> None:
    path = first_shard(folder)
    tensors = safetensors.torch.load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name] = torch.zeros(3, 3)
    safetensors.torch.save_file(tensors, path)


def lying_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(index["weight_map"])
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][names[0]] = next(file for file in files if file != index["weight_map"][names[0]])
    path.write_text(json.dumps(index))


def escaping_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][sorted(index["weight_map"])[0]] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))


def missing_tensor(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["language_model.model.norm.weight"]
    path.write_text(json.dumps(index))


def extra_tensor(folder: Path) -> None:
    path = first_shard(folder)
    safetensors.torch.save_file({**safetensors.torch.load_file(path), "language_model.model.layers.0.mlp.shared_expert.weight": torch.zeros(2)}, path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["language_model.model.layers.0.mlp.shared_expert.weight"] = path.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edited(**changes: object) -> Callable[[Path], None]:
    """`config.json` with other values; a name with a dot reaches into a section, None removes it."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            section = values
            *way, last = name.split("__")
            for step in way:
                section = section[step]
            if value is None:
                del section[last]
            else:
                section[last] = value
        (folder / "config.json").write_text(json.dumps(values))

    return edit


DAMAGES = {
    "a truncated shard": (truncate, r"has \d+ bytes, its header describes \d+; the file was cut off"),
    "a missing shard": (drop_shard, "is missing; copy the whole checkpoint"),
    "a wrong shape": (wrong_shape, r"has shape \(3, 3\), config.json makes \("),
    "an index that lies": (lying_index, "holds no tensor .*, which model.safetensors.index.json places there"),
    "an index that points outside": (escaping_index, "outside the folder"),
    "a missing tensor": (missing_tensor, "holds no tensor language_model.model.norm.weight"),
    "a tensor too many": (extra_tensor, "shared_expert.weight: is not a tensor of the model"),
    "an unknown architecture": (edited(architectures=["LlamaForCausalLM"]), "'LlamaForCausalLM' is not an architecture this version converts"),
    "an unknown key": (edited(text_config__mystery=3), "config.json.text_config.mystery: is not a key this version understands"),
    "a missing key": (edited(text_config__head_dim=None), "config.json.text_config.head_dim: is missing"),
    "an unknown norm": (edited(vision_config__norm_type="batch_norm"), "config.json.vision_config.norm_type: is 'batch_norm', which is not supported"),
    "a missing width of the encoder": (edited(vision_config__intermediate_size=None), "config.json.vision_config.intermediate_size: is missing"),
    "an unsupported value": (edited(text_config__attention_bias=True), "attention_bias: is True, which is not supported"),
    "another language model": (edited(text_config__model_type="llama"), "model_type: is 'llama', which is not converted; converted: 'qwen3_moe', 'qwen3'"),
    "GPT-OSS": (edited(text_config__model_type="gpt_oss"), "is 'gpt_oss', whose attention sinks, .* and MXFP4 weights are missing here"),
    "GPT-OSS alone": (edited(architectures=["GptOssForCausalLM"], model_type="gpt_oss"), "is 'gpt_oss', whose attention sinks, .* are missing here"),
    "a layer that is not there": (edited(text_config__mlp_only_layers=[1]), "holds no tensor language_model.model.layers.1.mlp.gate_proj.weight"),
    "another rope": (edited(text_config__rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "rope_type: is 'longrope'"),
    "half a rope": (edited(text_config__rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_parameters.factor: is missing"),
    "a rope that knows more": (
        edited(text_config__rope_parameters={"rope_type": "linear", "factor": 2.0, "mscale": 0.7}),
        "rope_parameters.mscale: is not a key this version understands",
    ),
    "another size than the weights": (edited(text_config__num_hidden_layers=4), "holds no tensor language_model.model.layers.3"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_named_and_nothing_is_written(source: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(source)
    before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    with pytest.raises(CheckpointError, match=message):
        hf_to_megatron(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert {path.name: path.stat().st_mtime_ns for path in source.iterdir()} == before


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """The operating system refuses what goes beyond, as it does on a full disk or over a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_on_the_way_is_one_error_and_the_next_attempt_goes_on(source: Path, tmp_path: Path) -> None:
    with no_file_above(12_000), pytest.raises(CheckpointError, match=r"ours: cannot be written: .*File too large.*; free some space and run"):
        hf_to_megatron(source, tmp_path / "ours")
    assert latest_step(tmp_path / "ours") is None
    hf_to_megatron(source, tmp_path / "ours")
    with no_file_above(12_000), pytest.raises(CheckpointError, match=r"back: cannot be written: .*; free some space and run"):
        megatron_to_hf(tmp_path / "ours", tmp_path / "back", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]
    megatron_to_hf(tmp_path / "ours", tmp_path / "back", source)
    before, after = hf.tensors(source), hf.tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(tensor.equal(after[name]) for name, tensor in before.items())


def test_too_little_room_is_told_before_a_byte_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_to_megatron(source, tmp_path / "ours")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for convert, start, end in ((hf_to_megatron, source, "again"), (megatron_to_hf, tmp_path / "ours", "back")):
        with pytest.raises(CheckpointError, match=rf"{end}: needs 0\.00 GB, and 0\.00 GB are free there"):
            convert(start, tmp_path / end)
        assert not (tmp_path / end).exists()


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_config(tmp_path)


def test_a_destination_that_holds_a_checkpoint_is_left_alone(source: Path, tmp_path: Path) -> None:
    hf_to_megatron(source, tmp_path / "ours")
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "ours").rglob("*"))
    with pytest.raises(CheckpointError, match="holds a converted checkpoint already"):
        hf_to_megatron(source, tmp_path / "ours")
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "ours").rglob("*")) == before
