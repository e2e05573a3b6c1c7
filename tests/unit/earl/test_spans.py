"""Positions of the sub-tasks that an answer's tags mark."""

import numpy as np
import pytest

from megatron_ext.earl.spans import Span, tag_spans

TAGS = {"ocr": (100, 101), "count": (110, 111)}


def test_tag_tokens_are_excluded():
    # prompt of 10 tokens, so row 9 decides the first; answer <ocr> 3 </ocr> <count> 4 5 </count> 7: "3" is token 11, decided at row 10
    response = np.array([100, 3, 101, 110, 4, 5, 111, 7])
    assert tag_spans(response, 9, TAGS) == [Span("ocr", 10, 11), Span("count", 13, 15)]


@pytest.mark.parametrize(
    "response",
    [[], [3, 4], [100, 3], [100, 101], [100, 3, 111], [101, 3, 100], [3, 101]],
    ids=["nothing", "no tags", "not closed", "empty span", "closed by another tag", "wrong way round", "never opened"],
)
def test_malformed_tags_give_no_span(response):
    assert tag_spans(np.array(response, dtype=np.int64), 5, TAGS) == []


def test_a_tag_that_opens_inside_another_starts_over():
    assert tag_spans(np.array([100, 3, 110, 4, 111, 5, 101]), 0, TAGS) == [Span("count", 3, 4)]


def test_an_empty_span_is_refused():
    with pytest.raises(ValueError, match="empty or negative"):
        Span("ocr", 4, 4)
