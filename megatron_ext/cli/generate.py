"""`generate CONFIG`: one question, answered: about a picture in a file or about none, or one of the data's own. With `--trace`, where the model looked and
which experts it went through, in the terminal, on a page and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.cli.options import add_config_arguments, resolve
from megatron_ext.cli.run_folder import RunFolder
from megatron_ext.config.schema import RunConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.errors import EXIT_OK, UserError

if TYPE_CHECKING:
    from megatron_ext.batch import Prompt
    from megatron_ext.observe.trace import AnswerTrace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the run's RL checkpoint, else its SFT checkpoint")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture; without it the question is text alone")
    parser.add_argument("--prompt", metavar="TEXT", help="the question")
    parser.add_argument("--example", metavar="SKILL", help="instead of --image and --prompt: a question of the data's test split")
    parser.add_argument("--index", type=int, default=0, metavar="N", help="which question of --example (default 0)")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="sampled answers besides the most likely one (default 0)")
    parser.add_argument("--trace", action="store_true", help="show where CLVR looked and which experts were used, token by token; write a page and JSON of it")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="where the page of --trace goes; its JSON goes beside it (default: generate/ of the run)")
    parser.epilog = (
        "examples:\n  megatron-ext generate examples/tiny.yaml --example composite --index 3\n"
        "  megatron-ext generate examples/tiny.yaml --image scene.png --prompt 'how many circles?' --samples 4\n"
        "  megatron-ext generate examples/tiny.yaml --example ocr --trace\n"
        "  megatron-ext generate examples/tiny.yaml --image scene.png --prompt 'what color is the star?' --trace --out star.html\n\n"
        "The page of --trace needs nothing beside it and opens from disk: arrow keys step through the answer. It also holds the traces of --samples."
    )


def run(args: argparse.Namespace) -> int:
    if (args.example is None) == (args.prompt is None) or (args.image is not None and args.prompt is None):
        raise UserError("generate", "what to answer is not clear", "give --prompt TEXT, with --image FILE if it is about one, or --example SKILL")
    if args.out is not None and (not args.trace or args.out.suffix != ".html"):
        raise UserError("--out", f"{args.out} is for the page of --trace", "give --trace --out FILE.html")
    resolved = resolve(args)
    if resolved is None:
        return EXIT_OK
    config, folder = resolved.config, RunFolder(resolved.config.run_dir)
    checkpoint = args.checkpoint or _newest(folder, config)
    prompt = _example(config, folder, args.example, args.index) if args.example else _question(config, folder, args.image, args.prompt)
    from megatron_ext.inference.ask import MOST_LIKELY, answers

    print(f"checkpoint: {checkpoint}")
    rollouts, traces = answers(config, checkpoint, prompt, args.samples, _clusters(folder, config) if args.trace else None)
    for rollout in rollouts:
        said = "answer" if rollout.sample == MOST_LIKELY else "sample"
        print(f"{said}: {rollout.text}" + ("" if rollout.finish == "stop" else " ... (cut at rollout.max_new_tokens)"))
    if args.trace:
        named = f"{args.example}-{args.index}" if args.example else "trace"
        _show(traces, args.out or folder.root / "generate" / f"{named}.html")
    return EXIT_OK


def _show(traces: list[AnswerTrace], page: Path) -> None:
    """The first trace in the terminal, all of them on the page."""
    import json

    from megatron_ext.observe.summary import wide_console
    from megatron_ext.observe.trace import write_trace_page
    from megatron_ext.observe.trace_text import print_trace

    print_trace(traces[0], wide_console())
    page.parent.mkdir(parents=True, exist_ok=True)
    write_trace_page(page, traces)
    page.with_suffix(".json").write_text(json.dumps([trace.to_json() for trace in traces]), encoding="utf-8")
    print(f"trace: {page} (open it in a browser), {page.with_suffix('.json')}")


def _clusters(folder: RunFolder, config: RunConfig) -> dict[str, list[tuple[int, int]]]:
    """The experts of every skill, where they were looked for."""
    if not config.model.num_experts or not folder.clusters.exists():
        return {}
    from megatron_ext.earl.files import read_clusters
    from megatron_ext.inference.trace import pairs_by_skill

    return pairs_by_skill(read_clusters(folder.clusters, config.model))


def _newest(folder: RunFolder, config: RunConfig) -> Path:
    for path in (folder.checkpoints("rl"), folder.start_of_rl(config)):
        if path.exists():
            return path
    raise UserError(str(folder.root), "holds no checkpoint of an instruction-tuned model", "first `megatron-ext run CONFIG --until sft`, or give --checkpoint")


def _question(config: RunConfig, folder: RunFolder, image: Path | None, text: str) -> Prompt:
    from megatron_ext.batch import NO_TILES, Prompt
    from megatron_ext.data.chat import IMAGE, check_placeholders, encode_prompt
    from megatron_ext.data.images import load_tiles
    from megatron_ext.data.tokenizer import load_tokenizer

    vision = config.model.vision
    if image is not None and not vision.enabled:
        raise UserError("--image", f"{image} is shown to a model without vision (model.vision.enabled = false)", "ask with --prompt alone")
    turn = (text if IMAGE in text or image is None else f"{IMAGE}\n{text}", "")
    check_placeholders([turn], 0 if image is None else 1, "--prompt")
    tiles = NO_TILES if image is None else load_tiles(image, config.data)
    tokens_S = encode_prompt(turn[0], load_tokenizer(folder.tokenizer), tokens_per_tile(vision), tiles=[len(tiles)])
    return Prompt("generate", "none", tokens_S, tiles, "")


def _example(config: RunConfig, folder: RunFolder, skill: str, index: int) -> Prompt:
    """The question, its right answer, and its picture as a file, shown to the reader."""
    from PIL import Image

    from megatron_ext.data.chat import question_text
    from megatron_ext.data.prompts import draw_skills, skills_of
    from megatron_ext.data.tokenizer import load_tokenizer

    known = skills_of(config.data)
    if skill not in known:
        raise UserError("--example", f"there is no skill {skill!r}", f"use {', '.join(known)}")
    tokenizer = load_tokenizer(folder.tokenizer)
    prompts = draw_skills("test", index + 1, config.seed, config.data, tokenizer, config.model.vision, [skill])
    if len(prompts) <= index:
        raise UserError("--index", f"{index} is beyond the {len(prompts)} test prompts of skill {skill}", "count from 0")
    prompt = prompts[index]
    if len(prompt.tiles):
        path = folder.root / "generate" / f"{skill}-{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(prompt.tiles.pixels_IHWC[-1]).resize((256, 256), Image.Resampling.NEAREST).save(path)
        print(f"picture: {path}")
    print(f"question: {question_text(prompt.tokens_S, tokenizer)}\nright answer: {prompt.answer}")
    return prompt
