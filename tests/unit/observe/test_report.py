"""The report of a run: complete, partial, empty."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ext.observe.metrics import MetricsWriter
from megatron_ext.observe.report import write_report

SKILLS = ("count", "ocr")


class Page(HTMLParser):
    """The visible text, the sources of images, and whether tags close in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "img":
            self.sources.append(values["src"] or "")
        self.links += [value for name in ("href", "src") if (value := values.get(name))]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def evaluation(greedy: float) -> str:
    row = {"n": 200, "greedy": greedy, "greedy_se": 0.03, "mean@8": 0.4, "pass@8": 0.8, "blind": 0.1, "chance": 0.11, "cluster_mass": 0.4}
    return json.dumps({"checkpoint": "runs/x/sft/checkpoints", "split": "test", "skills": dict.fromkeys(SKILLS, row), "macro": row})


def cluster_file() -> str:
    skill = {"status": "ok", "reason": "2 experts pass every test", "num_prompts": 90, "auroc": 0.9, "jaccard": 0.8}
    skills = [
        {**skill, "skill": name, "pairs": [{"layer": 0, "expert": 1, "log_odds": 1.25, "npmi": 0.31}], "mean_mass_LE": [[0.2, 0.8], [0.5, 0.5]]}
        for name in SKILLS
    ]
    skills[1] |= {"status": "unstable", "reason": "overlap of 0.31 only"}
    masked = {"accuracy": 0.6, "drop_own": 0.4, "drop_others": 0.1, "drop_random": 0.2, "beyond_others": [0.1, 0.5], "beyond_random": [-0.07, 0.45]}
    skills[0] |= {"causal": {**masked, "random_overlap": 0.25, "verdict": "correlational"}}
    return json.dumps({"information_L": [0.1, 0.02], "span_information": {"image": [0.003, 0.004]}, "skills": skills})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "my-run"
    for folder in ("evaluate/sft", "discover", "tokenizer"):
        (root / folder).mkdir(parents=True)
    (root / "config.yaml").write_text("name: my-run  # default\n")
    mark = {"seconds": 301.2, "finished_at": "2026-01-02T03:04:05+00:00", "versions": {"megatron-ext": "0.1.0", "torch": "2.13.0"}}
    (root / "tokenizer" / "done.json").write_text(json.dumps(mark))
    rl = {"reward/mean": 0.4, "mismatch/logprob_abs_diff_max": 1e-6, "rollout/failed/reward_timeout": 2.0, "rollout/failed_count": 2.0}
    for stage, values in (("sft", {"loss": 0.5}), ("rl", rl)):
        with MetricsWriter(root / stage, tensorboard=False) as writer:
            for step in range(1, 30):
                writer.write(step, {**values, "reward/mean": float("nan")} if step == 3 else values)
    (root / "evaluate" / "sft.json").write_text(evaluation(0.5))
    (root / "evaluate" / "rl.json").write_text(evaluation(0.7))
    (root / "discover" / "expert_clusters.json").write_text(cluster_file())
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(root / "evaluate" / "sft" / "a.png")
    sample = {"skill": "ocr", "question": "which <b> digits?", "answer": "4 2", "response": "4 3", "correct": False, "image": "a.png"}
    (root / "evaluate" / "sft" / "samples.jsonl").write_text("\n".join(json.dumps(sample) for _ in range(5)))
    return root


def test_a_complete_run_shows_every_part(run: Path) -> None:
    bank = {"rows": [("groups trained on", "12")], "step": None, "groups": [], "problem": ""}
    page = Page(write_report(run, bank).read_text())
    for words in (
        "groups trained on",
        "my-run",
        "torch 2.13.0",
        "5 min 1 s",
        "0.50 ± 0.03",
        "0.70 ± 0.03",
        "overlap of 0.31 only",
        "-0.07 to +0.45",
        "image: layer 0: 0.003",
        "1.25 to 1.25 / 0.31 to 0.31",
        "which <b> digits?",
        "right: 4 2",
        "reward_timeout",
    ):
        assert words in page.text, words
    assert re.search(r"reward_timeout\s*58", page.text), "failures are counted over the run"
    assert len(page.sources) == 8, "accuracy, loss, reward, clusters, usage, mismatch, two samples"
    assert "Not there yet" not in page.text


def test_the_time_of_a_step_is_shown_by_phase_for_the_stages_that_know_it(run: Path) -> None:
    before = len(Page(write_report(run).read_text()).sources)
    with MetricsWriter(run / "pretrain", tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0, "timing_s/step": 1.0, "timing_s/data": 0.1, "timing_s/forward_backward": 0.8, "timing_s/optimizer": 0.1})
    page = Page(write_report(run).read_text())
    assert "Where a step's time goes" in page.text and "timeline.json" in page.text
    assert len(page.sources) == before + 1


def test_the_file_needs_nothing_beside_it(run: Path) -> None:
    page = Page(write_report(run).read_text())
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    assert all(link.startswith(("data:", "#")) for link in page.links)


def test_a_real_difference_is_coloured_and_one_within_two_standard_errors_is_not(run: Path) -> None:
    assert 'class="up">0.70' in write_report(run).read_text()
    (run / "evaluate" / "rl.json").write_text(evaluation(0.55))
    assert 'class="up">0.55' not in write_report(run).read_text()
    (run / "evaluate" / "rl.json").write_text(evaluation(0.3))
    assert 'class="down">0.30' in write_report(run).read_text()


def test_a_run_that_has_only_begun_says_what_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    page = Page(write_report(tmp_path).read_text())
    assert page.sources == []
    assert page.text.count("Not there yet") >= 5


@pytest.mark.parametrize("missing", ["evaluate/rl.json", "evaluate/sft.json", "discover/expert_clusters.json", "rl/metrics.jsonl", "evaluate/sft/a.png"])
def test_any_part_may_be_missing(run: Path, missing: str) -> None:
    (run / missing).unlink()
    Page(write_report(run).read_text())


def test_curves_of_one_kind_share_a_picture_and_are_named_by_what_tells_them_apart() -> None:
    from megatron_ext.observe.report_content import _short_names

    assert _short_names(["val/val/ocr/accuracy", "val/val/count/accuracy"]) == {"val/val/ocr/accuracy": "ocr", "val/val/count/accuracy": "count"}
    assert _short_names(["reward/mean"]) == {"reward/mean": "reward/mean"}


def test_many_experts_and_layers_still_fit_a_picture() -> None:
    from megatron_ext.observe.report_pictures import expert_heat_map

    mass_XLE = np.full((6, 16, 128), 1 / 128)
    assert expert_heat_map([f"skill{n}" for n in range(6)], mass_XLE, [[(3, 100)]] * 6, [True] * 6).startswith("data:image/png")
