"""The report of a run: complete, partial, empty."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_ext.observe import report_clvr
from megatron_ext.observe.metrics import MetricsWriter
from megatron_ext.observe.report import write_report
from megatron_ext.observe.report_clusters import drift_shown, heat_map
from tests.support.traces import small_trace

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
        if self.open[-1:] not in (["style"], ["script"]):
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
        "1.25 to 1.25 / 0.31 to 0.31",
        "which <b> digits?",
        "right: 4 2",
        "reward_timeout",
    ):
        assert words in page.text, words
    assert re.search(r"image\s*0\.003\s*0\.004", page.text), "bits by layer"
    assert re.search(r"reward_timeout\s*58", page.text), "failures are counted over the run"
    assert len(page.sources) == 11, "accuracy, loss, reward, clusters, usage, mismatch, five samples"
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


def test_a_stage_that_the_configuration_does_not_ask_for_is_not_listed_unless_it_ran(tmp_path: Path) -> None:
    def stages(config: str) -> str:
        (tmp_path / "config.yaml").write_text(config)
        return Page(write_report(tmp_path).read_text()).text.split("Accuracy by skill")[0]

    assert "mpo" not in stages("name: x\n")
    assert "mponot there yet" in stages("mpo:\n  steps: 20  # tiny.yaml\n")
    (tmp_path / "sft").mkdir()
    listed = stages("mpo: {steps: 0}\nrl: {init_from: elsewhere}\nmodel: {num_experts: 0}\n")
    assert [name in listed for name in ("pretrain", "discover", "sft")] == [False, False, True]


def test_what_looking_is_worth_is_shown_where_the_evaluation_measured_it(tmp_path: Path) -> None:
    worth = {"n": 60, "greedy": 0.6, "zeroed": 0.5, "zeroed_drop": 0.1, "zeroed_drop_se": 0.02, "other": 0.4, "other_drop": 0.2, "other_drop_se": None}
    worth |= {"taps": [{"attention_entropy": 0.9, "pointing": 0.31}], "pointing_chance": 0.12, "divergence": []}
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "sft.json").write_text(evaluation(0.6))
    (tmp_path / "evaluate" / "rl.json").write_text(json.dumps({**json.loads(evaluation(0.6)), "clvr": worth}))
    (row,) = report_clvr.looks_shown(tmp_path)
    assert (row["label"], row["zeroed"], row["other"]) == ("after RL", "0.50 (0.10 ± 0.02)", "0.40 (0.20)")
    assert (row["pointing"], row["chance"], row["entropy"], row["divergence"]) == ("0.31", "0.12", "0.90", "-")
    assert "taps see nothing" in Page(write_report(tmp_path).read_text()).text


def test_pointing_is_shown_of_all_prompts_where_an_evaluation_measured_it(tmp_path: Path) -> None:
    """Rather than of the few traced answers; prompts without boxes do not count, and a skill that has no others has no bars."""
    keep_answers(tmp_path / "evaluate" / "sft", [small_trace("k0").to_json()])
    drops = {"zeroed": 0.5, "zeroed_drop": 0.1, "zeroed_drop_se": 0.02, "other": 0.4, "other_drop": 0.2, "other_drop_se": 0.02, "divergence": []}
    pointed = {"n": 40, "greedy": 0.6, **drops, "taps": [{"attention_entropy": 0.9, "pointing": 0.31}], "pointing_n": 38, "pointing_chance": 0.12}
    text = {"n": 20, "greedy": 0.6, **drops, "taps": [{"attention_entropy": 0.9}], "pointing_n": 0, "pointing_chance": None}
    worth = {**pointed, "n": 60, "skills": {"ocr": pointed, "text": text}}
    (tmp_path / "evaluate" / "sft.json").write_text(json.dumps({**json.loads(evaluation(0.6)), "clvr": worth}))
    assert [(row["label"], row["n"]) for row in report_clvr.looks_shown(tmp_path)] == [("after fine-tuning", 60), ("ocr", 40), ("text", 20)]
    assert "Over the 38 prompts with known places of the evaluation after fine-tuning" in Page(write_report(tmp_path).read_text()).text
    (tmp_path / "evaluate" / "sft.json").write_text(evaluation(0.6))
    assert "Over the 1 answers" in Page(write_report(tmp_path).read_text()).text


def keep_answers(folder: Path, traces: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True)
    samples = [{"key": f"k{n}", "skill": "ocr", "question": "q", "answer": "1", "response": "1", "correct": True, "image": ""} for n in range(5)]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    (folder / "traces.json").write_text(json.dumps(traces))


def test_sampled_answers_lead_to_their_traces_and_the_rest_is_folded(tmp_path: Path) -> None:
    keep_answers(tmp_path / "evaluate" / "sft", [small_trace(f"k{n}").to_json() for n in range(3)])
    page = Page(write_report(tmp_path).read_text())
    assert [link for link in page.links if "trace=" in link] == ["#trace=0&token=0", "#trace=1&token=0"]
    assert "3 more" in page.text and "Over the 2 answers" in page.text, "pointing, of the traced answers"


def test_traces_that_are_too_many_bytes_lose_their_heads_first_then_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = [small_trace(f"k{n}", skill=f"skill{n}").to_json() for n in range(4)]
    keep_answers(tmp_path / "evaluate" / "rl", traces)
    assert [len(trace["taps"][0]["peaks"][0]) for trace in report_clvr.traces_shown(tmp_path, 2)] == [3] * 4
    monkeypatch.setattr(report_clvr, "MOST_BYTES", 3 * len(json.dumps(traces[0])))
    assert [len(trace["taps"][0]["peaks"][0]) for trace in report_clvr.traces_shown(tmp_path, 2)] == [1] * 3


def test_a_measure_of_clvr_has_a_picture_with_all_stages_that_wrote_it() -> None:
    rows = [{"step": step, "clvr/tap0/gate": 0.1, "clvr/tap1/gate": 0.2, "clvr/tap0/update_ratio": 0.3} for step in range(1, 12)]
    assert len(report_clvr.training_shown({"pretrain": [], "sft": rows, "rl": rows})) == 2
    assert report_clvr.training_shown({"sft": [{"step": 1, "loss": 1.0}]}) == []


def test_drift_is_shown_from_metrics_and_files_as_far_as_there_are_any(tmp_path: Path) -> None:
    """Overlap, mass and staleness; the map needs two looks, of which discovery's is one."""
    found = json.loads(cluster_file())
    rl = [{"step": 50, "earl/drift/ocr/jaccard": 0.5, "earl/drift/ocr/mass": 0.4, "earl/cluster_stale": 1.0}]
    assert drift_shown([{"step": 1, "reward/mean": 0.1}], tmp_path, found) is None
    (tmp_path / "drift").mkdir()
    (tmp_path / "drift" / "step_000050.json").write_text(cluster_file())
    skill = {"skill": "ocr", "num_prompts": 3, "status": None, "reason": None, "jaccard": None, "mass": None, "mass_before": 0.41}
    (tmp_path / "drift.jsonl").write_text(json.dumps({"step": 50, "skills": [skill]}) + "\n")
    shown = drift_shown(rl, tmp_path, found)
    assert shown is not None and len(shown["pictures"]) == 3 and shown["members"].startswith("data:image/png")
    assert (shown["step"], shown["rows"][0]["mass"], shown["rows"][0]["reason"]) == (50, "0.41 -> -", "too few fresh answers")


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
    skill = {"status": "ok", "pairs": [{"layer": 40, "expert": 100}], "mean_mass_LE": np.full((48, 128), 1 / 128).tolist()}
    drawn = heat_map({"skills": [{**skill, "skill": f"skill{n}"} for n in range(2)]})
    assert drawn.startswith("data:image/png") and len(drawn) < 400_000, "a panel per skill, 48 layers of 128 experts"
