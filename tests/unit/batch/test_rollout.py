"""A rollout knows which weights sampled each of its tokens."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ext.batch import NO_TILES, Prompt, Rollout, RouteTrace

PROMPT = Prompt("p", "ocr", np.array([1, 2], np.int32), NO_TILES, "")


def rollout(*versions: int, tokens: int = 3) -> Rollout:
    experts = np.zeros((1 + tokens, 1, 1), np.uint8)
    routes = RouteTrace(experts, np.ones(experts.shape, np.float16))
    return Rollout(PROMPT, 0, 0, np.zeros(tokens, np.int32), np.zeros(tokens, np.float32), np.array(versions, np.int32), "stop", "", routes)


def test_its_version_is_the_oldest_and_it_is_on_policy_where_all_tokens_are() -> None:
    mixed, pure = rollout(4, 4, 6), rollout(6, 6, 6)
    assert (mixed.version, mixed.newest, pure.version, pure.newest) == (4, 6, 6, 6)
    assert pure.on_policy(6) and not pure.on_policy(7) and not mixed.on_policy(6) and not mixed.on_policy(4)


def test_every_token_has_a_version() -> None:
    with pytest.raises(ValueError, match="versions_T"):
        rollout(4, 4)
