"""The command line: finds the verb, parses its arguments, turns errors into exit codes.

Each verb lives in a module of its own and imports what is heavy when it runs.

0 done      1 our failure, with a traceback      2 the user's mistake, with one message      75 stopped on request, resume with the same command
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from megatron_ext import __version__
from megatron_ext.cli.task_record import TaskRecord
from megatron_ext.errors import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE, EXIT_USER, ConfigError, LeaderEnded, StoppedForRequeue, UserError

PROGRAM = "megatron-ext"
EXIT_INTERRUPTED = 130

_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("Transformer Engine and Apex are not installed", UserWarning),
    ("Apex is not installed", UserWarning),
    ("full scope is deprecated", UserWarning),
    ("The .grad attribute of a Tensor that is not a leaf Tensor", UserWarning),
    ("`torch.distributed.", FutureWarning),
    ("Please use DTensor instead", FutureWarning),
)
"""The beginnings of what Megatron 0.16.1 says under torch 2.13 in every process: accelerators that `doctor` reports once, and old names that still work."""

VERBS = {
    "run": ("run", "every stage of a recipe in turn; finished ones are skipped"),
    "tokenizer": ("stage_verb", "train the tokenizer"),
    "pretrain": ("stage_verb", "pretrain the vision-language model"),
    "sft": ("stage_verb", "fine-tune it on instructions"),
    "mpo": ("stage_verb", "teach it which of two answers is better (mixed preference optimisation)"),
    "discover": ("stage_verb", "find the expert cluster of every skill"),
    "rl": ("stage_verb", "reinforcement learning with the EARL bonus"),
    "evaluate": ("evaluate", "measure accuracy by skill"),
    "generate": ("generate", "answer one question about one image"),
    "study": ("study", "compare arms of a recipe over seeds: registered, paired, with a verdict in words"),
    "plan": ("plan", "say which layouts fit a number of GPUs, and how fast each would be"),
    "convert": ("convert", "take checkpoints from Hugging Face, and back"),
    "submit": ("submit", "write the SLURM job of a stage, or of each, and submit it"),
    "postmortem": ("postmortem", "say which rank of a SLURM job failed first, and its last lines"),
    "report": ("report", "write the HTML report of a run"),
    "doctor": ("doctor", "say what is installed, what is missing, what is wrong"),
}

_EPILOG = """examples:
  megatron-ext run examples/tiny.yaml                     the whole recipe, end to end
  megatron-ext run examples/tiny.yaml --until sft         its first stages
  megatron-ext rl examples/tiny.yaml rl.steps=20          one stage, one value changed
  megatron-ext run examples/tiny.yaml --explain           every value and where it comes from
  megatron-ext run examples/tiny.yaml --dry-run           check it, show sizes and layout, train nothing
  megatron-ext study examples/earl_study.yaml --dry-run   the runs of a study, and whether all of them are valid
  megatron-ext plan examples/internvl3_5_30b_a3b/sft.yaml --gpus 64      layouts ranked by predicted memory and time, without a GPU

`megatron-ext VERB --help` tells more. Exit codes: 0 done, 1 a failure of the program, 2 a mistake in what was asked, 75 stopped on request."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Failures of our own travel on as exceptions."""
    _quieten_megatron()
    record = TaskRecord(os.environ)
    try:
        code = _run(argv)
    except BaseException:
        record.write(EXIT_FAILURE)
        raise
    record.write(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(error_text(error), file=sys.stderr)
        return error.exit_code
    except StoppedForRequeue as stopped:
        print(f"stopped: {stopped}. The same command resumes it.", file=sys.stderr)
        return EXIT_REQUEUE
    except LeaderEnded as ended:
        print(ended, file=sys.stderr)
        return ended.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def error_text(error: UserError) -> str:
    """One message, whether one thing is wrong or several."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return "\n".join([f"error: {len(error.problems)} problems", *(f"  {problem}" for problem in error.problems)])
    return f"error: {error}"


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return EXIT_OK if argv else EXIT_USER
    if argv[0] in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return EXIT_OK
    verb = argv[0]
    if verb not in VERBS:
        close = get_close_matches(verb, list(VERBS), n=1, cutoff=0.5)
        raise UserError(verb, "is not a verb", f"did you mean {close[0]}?" if close else f"there are: {', '.join(VERBS)}")
    module_name, summary = VERBS[verb]
    module = import_module(f"megatron_ext.cli.{module_name}")
    parser = _Parser(prog=f"{PROGRAM} {verb}", description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(verb=verb)
    module.add_arguments(parser)
    code: int = module.run(parser.parse_intermixed_args(argv[1:]))
    return code


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    usage = f"usage: {PROGRAM} VERB [...] | --version | --help"
    about = "Mixture-of-experts vision-language models that look again (CLVR) and reason through the right experts (EARL)."
    return f"{usage}\n\n{about}\n\nverbs:\n{verbs}\n\n{_EPILOG}"


def _quieten_megatron() -> None:
    """Hides the known warnings, in this process and in those it starts."""
    for text, category in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(text), category=category)
    ours = [f"ignore:{text}:{category.__name__}" for text, category in _KNOWN_WARNINGS]
    given = os.environ.get("PYTHONWARNINGS", "").split(",")
    os.environ["PYTHONWARNINGS"] = ",".join([text for text in given if text and text not in ours] + ours)


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are the user's mistake like any other: one message, no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UserError(self.prog, message, f"see `{self.prog} --help`")
