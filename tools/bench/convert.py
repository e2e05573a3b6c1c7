"""How fast a checkpoint is converted, and in how much memory: `python -m tools.bench.convert`, from the root of the repository.

    each round:  copy the files and fsync them, Hugging Face -> ours, ours -> Hugging Face

A random checkpoint in the names and shapes of InternVL with Qwen3-MoE is written first. Each conversion runs in a process of its own, whose peak memory is
compared with that of a process that has only imported what it needs. All in one run, interleaved; medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_TEXT = {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "moe_intermediate_size": 256}
_VISION = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024, "image_size": [112, 112], "patch_size": [14, 14]}
_CHILD = """
import sys, time
from pathlib import Path
from megatron_ext.checkpoint.hf.from_megatron import megatron_to_hf
from megatron_ext.checkpoint.hf.to_megatron import hf_to_megatron

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

what, source, destination, like, shard = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
began = time.perf_counter()
hf_to_megatron(source, destination) if what == "in" else megatron_to_hf(source, destination, like, max_shard_bytes=shard)
print(time.perf_counter() - began, memory("VmHWM") - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--experts", type=int, default=128, help="experts of a layer, which set the size (default 128: 0.9 GB in bfloat16)")
    parser.add_argument("--shard-mb", type=int, default=200, help="largest weight file in MB (default 200)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="where to write the medians, in seconds and bytes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        layer_bytes = write_checkpoint(folder / "hf", arguments.experts, arguments.shard_mb * 10**6)
        rounds = [one_round(folder, arguments.shard_mb * 10**6) for _ in range(arguments.rounds)]
        files = sorted((folder / "hf").glob("*.safetensors"))
        sizes = {
            "bytes": sum(file.stat().st_size for file in files),
            "largest_shard_bytes": max(file.stat().st_size for file in files),
            "layer_bytes": layer_bytes,
        }
    print(table(rounds, sizes))
    if arguments.json:
        middle = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        arguments.json.write_text(json.dumps({"a checkpoint": {**middle, **sizes}}, indent=1) + "\n")


def write_checkpoint(folder: Path, experts: int, shard_bytes: int) -> int:
    """Returns the bytes of one decoder layer."""
    import safetensors.torch
    import torch

    from megatron_ext.checkpoint.hf.configuration import describe
    from megatron_ext.checkpoint.hf.names import entries
    from megatron_ext.checkpoint.hf.shapes import full_shape
    from megatron_ext.checkpoint.hf.transforms import part_shapes

    text = {**_TEXT, "model_type": "qwen3_moe", "num_experts": experts, "num_experts_per_tok": 8, "norm_topk_prob": True, "rope_theta": 1e6}
    text |= {"vocab_size": 32000, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096}
    vision = {**_VISION, "model_type": "internvl_vision", "norm_type": "layer_norm", "attention_bias": True, "layer_norm_eps": 1e-6}
    config = {"architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "text_config": text, "vision_config": vision}
    config |= {"downsample_ratio": 0.5, "image_token_id": 5, "tie_word_embeddings": False}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = describe(config).model
    shards: list[dict[str, torch.Tensor]] = [{}]
    held, layer_bytes = 0, 0
    for entry in entries(model, "transformers"):
        for name, shape in zip(entry.parts, part_shapes(entry, full_shape(entry.ours, model), model), strict=True):
            tensor = torch.randn(shape, dtype=torch.bfloat16)
            layer_bytes += tensor.nbytes if entry.ours.startswith("decoder.layers.0.") else 0
            if held + tensor.nbytes > shard_bytes:
                shards, held = [*shards, {}], 0
            shards[-1][name] = tensor
            held += tensor.nbytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        safetensors.torch.save_file(shard, folder / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return layer_bytes


def one_round(folder: Path, shard_bytes: int) -> dict[str, float]:
    for name in ("copy", "ours", "back"):
        shutil.rmtree(folder / name, ignore_errors=True)
    began = time.perf_counter()
    shutil.copytree(folder / "hf", folder / "copy")
    for file in (folder / "copy").iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    copied = time.perf_counter() - began
    there_s, there_bytes = child("in", folder / "hf", folder / "ours", folder, shard_bytes)
    back_s, back_bytes = child("out", folder / "ours", folder / "back", folder / "hf", shard_bytes)
    return {"copy_s": copied, "in_s": there_s, "out_s": back_s, "in_peak_bytes": there_bytes, "out_peak_bytes": back_bytes}


def child(what: str, source: Path, destination: Path, like: Path, shard_bytes: int) -> tuple[float, float]:
    """(seconds, peak memory in bytes above that of the imports)."""
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, what, str(source), str(destination), str(like), str(shard_bytes)]
    seconds, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), float(peak)


def table(rounds: list[dict[str, float]], sizes: dict[str, Any]) -> str:
    middle = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    allowed = 1.5 * sizes["largest_shard_bytes"] + sizes["layer_bytes"]
    mega = {name: f"{value / 1e6:.0f} MB" for name, value in sizes.items()}
    lines = [
        f"{mega['bytes']}, largest shard {mega['largest_shard_bytes']}, a layer {mega['layer_bytes']}; {len(rounds)} rounds",
        "",
        "| | median | of copying | peak memory | of 1.5 shards + a layer |",
        "|---|---|---|---|---|",
        f"| copy and fsync | {middle['copy_s']:.2f} s | 1.00 | | |",
    ]
    for title, name in (("Hugging Face to ours", "in"), ("ours to Hugging Face", "out")):
        seconds, peak = middle[f"{name}_s"], max(each[f"{name}_peak_bytes"] for each in rounds)
        lines.append(f"| {title} | {seconds:.2f} s | {seconds / middle['copy_s']:.2f} | {peak / 1e6:.0f} MB | {peak / allowed:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
