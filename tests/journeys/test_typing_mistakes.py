"""What a user meets who types something wrong: exit code 2, one message with field, value and remedy, no traceback, and nothing heavy is imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_TORCH = (
    "import sys; from megatron_ext.cli.main import main; code = main(sys.argv[1:]);"
    "heavy = {'torch', 'ray', 'megatron', 'numpy', 'matplotlib'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
)


def megatron_ext(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(f"output_dir: {tmp_path}/runs\nrl:\n  steps: 3\n")
    return str(path)


MISTAKES = [
    (["rnu", "CONFIG"], ["rnu: is not a verb", "did you mean run?"]),
    (["run"], ["run: needs a configuration file", "examples/tiny.yaml"]),
    (["run", "rl.steps=3"], ["stands where the configuration file is expected"]),
    (["run", "absent.yaml"], ["absent.yaml: there is no such file"]),
    (["run", "CONFIG", "--untill", "sft"], ["--untill", "--help"]),
    (["run", "CONFIG", "--until", "stf"], ["--until: there is no stage 'stf'", "did you mean sft?"]),
    (["run", "CONFIG", "rl.stpes=3"], ["rl.stpes (command line): is not a key", "did you mean rl.steps?"]),
    (["rl", "CONFIG", "rl.steps=many"], ["rl.steps (command line): 'many' is not a whole number", "write it without quotes"]),
    (["sft", "CONFIG", "sft.optimizer.lr=-1"], ["sft.optimizer.lr (command line): -1 must be greater than 0"]),
    (["pretrain", "CONFIG", "parallel.num_ranks=4", "parallel.tp=3"], ["parallel.num_ranks", "4 ranks do not divide by", "use"]),
    (["run", "CONFIG", "parallel.num_ranks=8", "parallel.tp=8"], ["parallel.tp", "8 does not divide model.num_attention_heads = 4", "use 1, 2 or 4"]),
    (["run", "CONFIG", "rollout.parallel.num_ranks=3", "rollout.parallel.ep=3"], ["rollout.parallel.ep", "3 does not divide model.num_experts = 8"]),
    (["run", "CONFIG", "rollout.parallel.num_ranks=2", "rollout.parallel.pp=2"], ["rollout.parallel.pp", "would wait for each other at every token", "use 1"]),
    (["run", "CONFIG", "parallel.num_ranks=4", "parallel.pp=4"], ["parallel.pp", "4 pipeline stages do not fit model.num_layers = 3", "at most 3"]),
    (["discover", "CONFIG", "discover.committee_top=8"], ["discover.committee_top", "model.num_experts = 8", "use less than 8"]),
    (["run", "CONFIG", "--dry-run", "data.kind=jsonl", "data.path=absent.jsonl"], ["data.path: there is no absent.jsonl"]),
    (["run", "CONFIG", "--dry-run", "rl.reward=my_rewards:score"], ["rl.reward: there is no module my_rewards"]),
    (["rl", "CONFIG"], ["rl: needs `sft`, which is not done", "--until sft"]),
    (["evaluate", "CONFIG"], ["what to evaluate is not clear", "--of sft"]),
    (["report", "absent"], ["absent: is not the folder of a run"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(arguments)[:40] for arguments, _ in MISTAKES])
def test_a_mistake_is_answered_with_one_message_and_exit_code_2(config: str, arguments: list[str], words: list[str]) -> None:
    done = megatron_ext(*(config if argument == "CONFIG" else argument for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_every_mistake_of_a_file_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("model:\n  hiden_size: 64\nrl:\n  steps: many\nrollout:\n  top_p: 2\n")
    done = megatron_ext("run", str(path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: 3 problems"
    for line, words in ((2, "did you mean model.hidden_size?"), (4, "'many' is not a whole number"), (6, "2 must be at most 1")):
        assert f"{path}:{line}): " in done.stderr
        assert words in done.stderr


def test_explain_prints_every_value_and_where_it_comes_from(config: str) -> None:
    done = megatron_ext("rl", config, "rl.micro_batch=64", "--explain")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split(":")[0].strip(): line for line in done.stdout.splitlines()}
    assert lines["prompts_per_step"].endswith("# default")
    assert any(line.strip().startswith("steps: 3 ") and line.endswith(f"# {config}:3") for line in done.stdout.splitlines())
    assert any(line.strip().startswith("micro_batch: 64 ") and line.endswith("# command line") for line in done.stdout.splitlines())


def test_a_dry_run_shows_sizes_and_layout_and_leaves_nothing_behind(config: str, tmp_path: Path) -> None:
    done = megatron_ext("run", "--dry-run", config, "parallel.num_ranks=4", "parallel.tp=2", "parallel.ep=2")
    assert done.returncode == 0, done.stderr
    assert "4 = tp 2 x cp 1 x dp 2 x pp 1; experts: ep 2 x etp 1 x edp 2" in done.stdout
    assert "8 x 8 = 64 ViT tokens -> 4 x 4 = 16 image tokens" in done.stdout
    assert "Nothing was trained." in done.stdout
    assert not (tmp_path / "runs").exists()


def test_help_and_version_answer_without_a_configuration() -> None:
    assert megatron_ext("--version").stdout.startswith("megatron-ext 0.")
    assert "examples:" in megatron_ext("--help").stdout
    assert megatron_ext().returncode == 2
    for verb in ("run", "tokenizer", "pretrain", "sft", "discover", "rl", "evaluate", "generate", "submit", "postmortem", "report", "doctor"):
        done = megatron_ext(verb, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: megatron-ext {verb}")


def test_output_that_nobody_reads_to_the_end_is_no_failure(config: str) -> None:
    command = f"set -o pipefail; '{sys.executable}' -m megatron_ext.cli run '{config}' --explain | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.startswith("name: tiny")
