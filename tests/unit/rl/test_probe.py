"""The probe: what it is made of, and when two ranks disagree about it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.batch import NO_TILES, Prompt, Tiles
from megatron_ext.errors import ProbeMismatch
from megatron_ext.rl.probe import Probed, check_probes, string_together

IMAGE, EOS, PAD = 9, 2, 0


class Letters:
    """A tokenizer whose tokens are digits."""

    image_id, eos_id, pad_id, placeholders = IMAGE, EOS, PAD, (IMAGE,)

    def encode(self, text: str) -> list[int]:
        return [int(letter) for letter in text]


def prompt(tokens: str, answer: str, images: int = 0) -> Prompt:
    tiles = Tiles.whole(np.zeros((images, 4, 4, 3), np.uint8)) if images else NO_TILES
    return Prompt(tokens, "ocr", np.array([int(letter) for letter in tokens], np.int32), tiles, answer)


def probed(*logprobs: float, version: int = 3) -> Probed:
    return Probed(version, np.array(logprobs, np.float32), np.zeros((len(logprobs), 1, 2), np.int16))


def test_it_is_prompts_with_their_answers_padded_those_with_images_first() -> None:
    probe = string_together([prompt("34", "5"), prompt("4996", "77", images=1)], Letters(), most_tokens=16, multiple=4)
    assert probe.tokens_S.tolist() == [4, 9, 9, 6, 7, 7, EOS, 3, 4, 5, EOS, PAD] and len(probe.tiles) == 1


def test_image_places_and_padding_are_not_compared_and_nor_is_what_nothing_decides() -> None:
    """A position decides the token after it."""
    probe = string_together([prompt("4996", "7", images=1)], Letters(), most_tokens=16, multiple=4)
    assert probe.tokens_S.tolist() == [4, 9, 9, 6, 7, EOS, PAD, PAD]
    assert probe.compared_S.tolist() == [False, False, True, True, True, False, False, False]


def test_memory_tokens_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "placeholders", (IMAGE, 7, 8))
    probe = string_together([prompt("4996785", "3", images=1)], Letters(), most_tokens=16, multiple=4)
    assert probe.tokens_S.tolist() == [4, 9, 9, 6, 7, 8, 5, 3, EOS, PAD, PAD, PAD]
    assert probe.compared_S.tolist() == [False, False, True, False, False, True, True, True, False, False, False, False]


def test_a_prompt_that_does_not_fit_is_left_out_and_where_none_fits_the_text_of_the_first_is_cut() -> None:
    long, short = prompt("99999345678", "1", images=1), prompt("34", "5")
    assert string_together([long, short], Letters(), most_tokens=8, multiple=4).tokens_S.tolist() == [3, 4, 5, EOS]
    alone = string_together([long], Letters(), most_tokens=4, multiple=4)
    assert alone.tokens_S.tolist() == [3, 4, 5, 6] and len(alone.tiles) == 0


def test_the_largest_difference_of_any_rank_is_what_is_reported() -> None:
    learner = probed(-1.0, -2.0)
    rollouts = {"replica 0": probed(-1.0, -2.0), "replica 1": probed(-1.0, -2.25)}
    assert check_probes(learner, rollouts, 0.5, exact=False) == 0.25


def test_a_difference_beyond_the_limit_names_the_rank_the_version_both_numbers_and_what_helps() -> None:
    with pytest.raises(ProbeMismatch) as error:
        check_probes(probed(-1.0, -2.0), {"replica 0": probed(-1.0, -2.0), "replica 1": probed(-1.0, -2.5)}, 0.25, exact=False)
    for part in (
        "version 3",
        "replica 1 gives token 2",
        "log-prob -2.5, the learner -2;",
        "rl.max_logprob_diff allows 0.25",
        "resume",
        "raise rl.max_logprob_diff",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_never_agrees(number: float) -> None:
    for learner, rollout in ((-1.0, number), (number, -1.0), (number, number)):
        with pytest.raises(ProbeMismatch):
            check_probes(probed(learner), {"replica 0": probed(rollout)}, 10.0, exact=False)


def test_the_deterministic_mode_allows_not_even_the_last_bit() -> None:
    next_to_one = float(np.nextafter(np.float32(-1), np.float32(-2)))
    assert check_probes(probed(-1.0), {"replica 0": probed(next_to_one)}, 1e-2, exact=False) == 2**-23
    with pytest.raises(ProbeMismatch, match=r"rollout.deterministic allows no difference\. .* set rollout.deterministic=false"):
        check_probes(probed(-1.0), {"replica 0": probed(next_to_one)}, 1e-2, exact=True)


def test_weights_of_another_version_never_agree() -> None:
    with pytest.raises(ProbeMismatch, match="replica 0 holds weights of version 2, and the learner of version 3"):
        check_probes(probed(-1.0), {"replica 0": replace(probed(-1.0), version=2)}, 10.0, exact=False)
