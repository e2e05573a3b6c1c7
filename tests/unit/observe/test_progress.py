"""Progress: a bar for a terminal, plain lines for a file."""

from __future__ import annotations

import io

from megatron_ext.observe.progress import short_number, stage_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_plain_lines_without_control_characters() -> None:
    stream = io.StringIO()
    with stage_progress("sft", total=3, stream=stream, every_s=0) as progress:
        for step in (1, 2, 3):
            progress.update(step, {"loss": 0.5 / step})
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("sft 1/3  loss 0.5  0m00s left")
    assert lines[-1] == "sft 3/3  loss 0.167"
    assert "\x1b" not in stream.getvalue()


def test_lines_are_rare_and_the_last_state_is_always_printed() -> None:
    stream = io.StringIO()
    with stage_progress("rl", total=1000, start=500, stream=stream, every_s=3600) as progress:
        for step in range(501, 700):
            progress.update(step)
    assert stream.getvalue().splitlines() == ["rl 699/1000"]


def test_an_interrupted_stage_still_says_how_far_it_came() -> None:
    stream = io.StringIO()
    try:
        with stage_progress("rl", total=10, stream=stream, every_s=3600) as progress:
            progress.update(4, {"reward": 0.25})
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert stream.getvalue() == "rl 4/10  reward 0.25\n"


def test_a_terminal_gets_a_bar_with_the_numbers_beside_it() -> None:
    stream = Terminal()
    with stage_progress("pretrain", total=4, start=2, stream=stream) as progress:
        progress.update(4, {"loss": 1.5})
    assert "4/4" in stream.getvalue()
    assert "loss 1.5" in stream.getvalue()


def test_numbers_are_short() -> None:
    assert [short_number(value) for value in (0.0, 1234567.0, -2500, float("nan"))] == ["0", "1.2M", "-2.5k", "nan"]
