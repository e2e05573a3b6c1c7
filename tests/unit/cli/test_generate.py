"""What `generate` refuses before anything is loaded."""

from __future__ import annotations

import pytest

from megatron_ext.cli.main import main
from megatron_ext.errors import EXIT_USER


@pytest.mark.parametrize("options", [["--out", "a.html"], ["--trace", "--out", "a.json"]])
def test_a_place_for_a_page_needs_a_trace_and_a_name_of_a_page(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "examples/tiny.yaml", "--example", "ocr", *options]) == EXIT_USER
    assert "give --trace --out FILE.html" in capsys.readouterr().err
