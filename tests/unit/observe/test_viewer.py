"""The pages in a real browser, opened from disk: no complaint, no fetch, and the gaze follows the token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ext.observe.report import write_report
from megatron_ext.observe.trace import write_trace_page
from tests.support.browser import ABSENT, BROWSER, open_page
from tests.support.traces import WORDS, small_trace

pytestmark = pytest.mark.skipif(BROWSER is None, reason=ABSENT)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "trace.html"
    write_trace_page(path, [small_trace(), small_trace("suite/test/ocr/0/1", seed=1)])
    return path


def test_the_page_of_a_trace_opens_without_a_complaint_at_the_first_token(page: Path) -> None:
    """Texts that look like markup are shown as they are, and the gaze of the first token lies on the first cell."""
    shown = open_page(page)
    assert shown.complaints == []
    assert shown.weights() == [1.0] + [0.0] * 15
    assert "which digit &amp; &lt;b&gt;letter&lt;/b&gt;?" in shown.dom and "most in row 1, column 1: 100 %" in shown.dom
    assert shown.dom.count('class="v-token"') == len(WORDS)


@pytest.mark.parametrize("token", [1, 4])
def test_stepping_to_a_token_moves_the_gaze_to_the_cell_it_looked_at(page: Path, token: int) -> None:
    shown = open_page(page, f"#token={token}")
    assert shown.complaints == [] and f'data-token="{token}"' in shown.dom
    assert shown.weights() == [float(cell == token) for cell in range(16)]
    assert f"token {token + 1} of 5" in shown.dom and "40 % on what the answer rests on (dashed; their area: 13 %)" in shown.dom


def test_arrow_keys_step_through_tokens_and_heads_and_a_letter_through_taps(page: Path) -> None:
    """Right, right, right, left; down; t: token 2 of tap 1, head 0."""
    keys = "".join(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}));" for key in ("ArrowRight",) * 3 + ("ArrowLeft", "ArrowDown", "t"))
    pressed = page.with_name("pressed.html")
    pressed.write_text(page.read_text().replace("</body>", f"<script>{keys}</script></body>"))
    shown = open_page(pressed)
    assert shown.complaints == [] and 'data-token="2"' in shown.dom and "tap 1, head 0" in shown.dom


def test_another_tap_and_head_show_other_weights_which_sum_to_one(page: Path) -> None:
    shown = open_page(page, "#trace=1&token=2&tap=1&head=2")
    assert shown.complaints == []
    assert sum(shown.weights()) == pytest.approx(1.0, abs=0.02) and max(shown.weights()) < 1
    assert "tap 1, head 1" in shown.dom


def test_a_report_shows_the_traces_of_its_evaluation_and_steps_through_them(tmp_path: Path) -> None:
    (tmp_path / "evaluate" / "rl").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "evaluate" / "rl" / "traces.json").write_text(json.dumps([small_trace().to_json()]))
    shown = open_page(write_report(tmp_path), "#token=3")
    assert shown.complaints == []
    assert shown.weights() == [float(cell == 3) for cell in range(16)]
