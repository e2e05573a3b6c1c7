"""New tokens a second, against transformers' `generate`: `python tools/bench/generation.py [--rounds 5]`, results in docs/benchmarks/generation.md.

One process, one thread, float32. Both sides hold the same weights (a random Hugging Face checkpoint, converted), answer the same prompts greedily with the same
number of tokens, and must say the same. The peer is the faster of its static and dynamic cache, with its fastest experts (grouped_mm). Runs are interleaved;
times are CPU times of the process (the machine may be shared), medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleave import machine, medians

from megatron_ext.batch import NO_TILES, Prompt, Rollout, Tiles
from megatron_ext.checkpoint.dist import load_checkpoint
from megatron_ext.checkpoint.hf.to_megatron import hf_to_megatron
from megatron_ext.config.schema import ParallelConfig, RolloutConfig
from megatron_ext.device import session
from megatron_ext.inference.engine import Engine
from megatron_ext.model.assembly import build_model
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext, open_parallel

VOCABULARY, IMAGE, TILE_TOKENS, PROMPT, NEW = 4096, 5, 16, 96, 64
LANGUAGE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
}
EXPERTS = {16: 512, 64: 128}
"""Experts and the size of one."""


@dataclass(frozen=True)
class Case:
    """`prompts` x `samples` rows of `PROMPT` tokens, of which an image takes `TILE_TOKENS` where there are images."""

    name: str
    experts: int
    prompts: int
    samples: int = 1
    image: bool = False


CASES = [
    *(Case(f"{experts} experts, {rows}", experts, int(rows.split()[0])) for experts in EXPERTS for rows in ("1 prompt", "8 prompts", "32 prompts")),
    Case("16 experts, 8 prompts x 8, an image each", 16, 8, 8, image=True),
]


class Words:
    """A vocabulary whose end never comes: it is beyond what may be sampled."""

    eos_id, vocab_size = VOCABULARY - 1, VOCABULARY - 1

    def decode(self, ids: list[int]) -> str:
        return ""


def checkpoint(case: Case, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, InternVLConfig, InternVLForConditionalGeneration

    language = {**LANGUAGE, "num_experts": case.experts, "moe_intermediate_size": EXPERTS[case.experts]}
    torch.manual_seed(0)
    if case.image:
        vision = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512, "image_size": [64, 64], "patch_size": [8, 8]}
        config = InternVLConfig(vision_config=vision, text_config=language, image_token_id=IMAGE, downsample_ratio=0.5, image_seq_length=TILE_TOKENS)
        model = InternVLForConditionalGeneration(config)
    else:
        config = AutoConfig.for_model(language.pop("model_type"), **language)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.06)  # larger than at the start of training, so that answers differ
    model.save_pretrained(folder)
    return folder


def prompts_of(case: Case) -> list[Prompt]:
    rng = np.random.default_rng(1)
    found = []
    for number in range(case.prompts):
        tokens = rng.integers(8, VOCABULARY - 8, size=PROMPT).astype(np.int32)
        tiles = Tiles.whole(rng.integers(0, 256, size=(1, 64, 64, 3), dtype=np.uint8)) if case.image else NO_TILES
        tokens[: TILE_TOKENS * len(tiles)] = IMAGE
        found.append(Prompt(str(number), "none", tokens, tiles, ""))
    return found


def ours(case: Case, source: Path, folder: Path, context: ParallelContext) -> Callable[[], list[list[int]]]:
    with redirect_stdout(StringIO()):
        described = hf_to_megatron(source, folder)
    model = build_model(described.model, IMAGE if case.image else -1, context)
    load_checkpoint(folder, model, context=context, model_config=described.model)
    store_for_generation(model)
    engine = Engine(model, context, Words(), RolloutConfig(max_new_tokens=NEW, batch_size=case.prompts * case.samples))
    prompts = prompts_of(case)

    def answer() -> list[list[int]]:
        rollouts: list[Rollout] = engine.generate(prompts, case.samples, seeds=lambda *_: 0, version=0, greedy=True)
        return [rollout.response_T.tolist() for rollout in rollouts]

    return answer


def theirs(case: Case, source: Path, cache: str) -> Callable[[], list[list[int]]]:
    from transformers import AutoModelForCausalLM, InternVLForConditionalGeneration

    kind: Any = InternVLForConditionalGeneration if case.image else AutoModelForCausalLM
    experts = {} if case.image else {"experts_implementation": "grouped_mm"}  # InternVL's class refuses the setting; its language model takes its default
    model = kind.from_pretrained(source, attn_implementation="sdpa", **experts).eval()
    prompts = prompts_of(case)
    tokens = torch.from_numpy(np.stack([prompt.tokens_S for prompt in prompts])).long()
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if case.image:
        pixels = torch.from_numpy(np.concatenate([prompt.tiles.pixels_IHWC for prompt in prompts])).permute(0, 3, 1, 2).float() / 127.5 - 1
        inputs["pixel_values"] = pixels
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "suppress_tokens": [IMAGE, VOCABULARY - 1]}

    @torch.no_grad()
    def answer() -> list[list[int]]:
        if case.samples == 1:
            found = model.generate(**inputs, **settings, cache_implementation=cache)
        else:  # greedy answers of a prompt are equal, and it forbids num_return_sequences: the same work with sampling switched on and all mass on one token
            found = model.generate(**inputs, **{**settings, "do_sample": True, "top_k": 1}, num_return_sequences=case.samples, cache_implementation=cache)
        return [row[PROMPT:].tolist() for row in found]

    return answer


def measure(case: Case, rounds: int, context: ParallelContext) -> dict[str, float]:
    """New tokens a CPU second of each side."""
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint(case, Path(folder) / "hf")
        sides = {"ours": ours(case, source, Path(folder) / "ours", context)}
        sides |= {f"transformers, {cache}": theirs(case, source, cache) for cache in ("dynamic", "static")}
        seconds = medians(sides, rounds, agree)
    new = case.prompts * case.samples * NEW
    return {name: new / value for name, value in seconds.items()}


def agree(said: dict[str, list[list[int]]]) -> None:
    """Greedy answers are equal until rounding turns a near tie: most of their first tokens must be."""
    mine, *others = said.values()
    for other in others:
        same = np.mean([a[:8] == b[:8] for a, b in zip(mine, other, strict=True)])
        assert same > 0.8, f"only {same:.0%} of the answers begin alike"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, float32, {PROMPT} prompt tokens, {NEW} new ones, median of {options.rounds}\n")
    print("| case | ours, tokens/s | transformers dynamic | static | ours / the faster |\n|---|---|---|---|---|")
    found = {}
    with tempfile.TemporaryDirectory() as folder, session(), open_parallel(ParallelConfig(), 0, 1, f"file://{Path(folder) / 'store'}", 0) as context:
        for case in CASES:
            if options.only not in case.name:
                continue
            found[case.name] = rates = measure(case, options.rounds, context)
            mine, *peers = rates.values()
            print(f"| {case.name} | {mine:.0f} | {' | '.join(f'{peer:.0f}' for peer in peers)} | {mine / max(peers):.2f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
