"""From scored rollouts to microbatches: nothing is lost, nothing is invented, padding is never trained on."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.batch import NO_TILES, Prompt, Rollout, RouteTrace, ScoredRollout, Tiles, route_digest
from megatron_ext.rl.batching import FILLER_KEY, microbatches, unpack
from megatron_ext.rl.parcels import BatchForm, Parcel, plan_parcels, rows_of

PAD = 0
LAYERS_TOPK = (2, 3)


def scored(key, sample, prompt_length, response_length, num_images=1, observed=0):
    """Tokens, log-probs, versions and routes are drawn from the row's name, so that every row differs from every other."""
    rng = np.random.default_rng([*key.encode(), sample])
    pixels = [np.full((1, 2, 2, 3), sum(key.encode()) + index, np.uint8) for index in range(num_images)]
    tiles = Tiles.join([Tiles(each, np.full((1, 5), each[0, 0, 0, 0] / 256, np.float32)) for each in pixels])
    prompt = Prompt(key, "count", rng.integers(1, 99, prompt_length).astype(np.int32), tiles, "3")
    experts = rng.integers(0, 8, (prompt_length + response_length - 1, *LAYERS_TOPK)).astype(np.uint8)
    routes = RouteTrace(experts, np.full(experts.shape, 1 / 3, np.float16))
    response = rng.integers(1, 99, response_length)
    logprobs, versions = rng.normal(size=response_length).astype(np.float32), np.sort(rng.integers(3, 6, response_length)).astype(np.int32)
    versions[1 : 1 + observed] = -1
    further = Tiles(np.full((1, 2, 2, 3), 200 + sample, np.uint8), np.full((1, 5), 0.5, np.float32)) if observed else NO_TILES
    return ScoredRollout(Rollout(prompt, sample, 0, response, logprobs, versions, "stop", "", routes, further), 1.0, {})


@st.composite
def steps(draw):
    """The scored rollouts of a step: groups of unequal sizes (some rollouts have failed), prompts with none to two images."""
    answers = []
    for index in range(draw(st.integers(1, 6))):
        prompt_length, num_images = draw(st.integers(1, 5)), draw(st.integers(0, 2))
        for sample in range(draw(st.integers(1, 4))):
            length = draw(st.integers(1, 6))
            answers.append(scored(f"p{index}", sample, prompt_length, length, num_images, draw(st.integers(0, max(0, length - 2)))))
    return answers


def plan(answers, minibatches=1, dp_size=2, multiple=1):
    parcels = plan_parcels(answers, np.arange(len(answers)) + 1.0, minibatches=minibatches, dp_size=dp_size, multiple=multiple, pad_id=PAD)
    return [[unpack(parcel) for parcel in own] for own in parcels]


def join(answers, advantages, rows, multiple=1):
    return unpack(Parcel(tuple(rows_of(answers, advantages)), rows, BatchForm.of(answers, multiple, PAD)))


def rows(shard):
    """key -> what the learner sees of the row, up to its length."""
    batch, seen = shard.batch, {}
    for row, key in enumerate(shard.keys_B):
        if key == FILLER_KEY:
            assert batch.response_mask_BS[row].sum() == 0 and batch.advantages_B[row] == 0 and (batch.row_tiles_BM[row] == -1).all()
            continue
        length = shard.lengths_B[row]
        assert batch.response_mask_BS[row, length:].sum() == 0, "padding is never trained on"
        assert (batch.tokens_BS[row, length:] == PAD).all() and (batch.experts_BSLK[row, length - 1 :] == -1).all()
        tiles = [(batch.tiles.pixels_IHWC[tile].tolist(), batch.tiles.places_I5[tile].tolist()) for tile in batch.row_tiles_BM[row] if tile >= 0]
        arrays = (batch.tokens_BS, batch.response_mask_BS, batch.logprobs_BS, batch.versions_BS, batch.experts_BSLK)
        seen[key] = ([array[row, :length].tolist() for array in arrays], float(batch.advantages_B[row]), tiles, shard.digests_B[row])
    return seen


def test_a_row_holds_the_prompt_then_the_response_and_only_the_response_is_trained_on():
    answer = scored("p", 0, 3, 2)
    batch = join([answer], np.array([0.5]), 1, 4).batch
    assert batch.tokens_BS.tolist() == [[*answer.rollout.prompt.tokens_S, *answer.rollout.response_T, PAD, PAD, PAD]]
    assert batch.response_mask_BS.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]]
    assert batch.logprobs_BS[0, 3:5].tolist() == answer.rollout.logprobs_T.tolist()
    assert (batch.experts_BSLK[0, :4] == answer.rollout.routes.experts_SLK).all() and (batch.experts_BSLK[0, 4:] == -1).all()
    assert batch.versions_BS.tolist() == [[-1, -1, -1, *answer.rollout.versions_T, -1, -1, -1]]


def test_what_was_observed_is_read_and_not_trained_on_and_its_tiles_follow_those_of_the_prompt():
    answers = [scored("p", sample, 3, 4, observed=2) for sample in range(2)]
    batch = join(answers, np.array([0.5, -0.5]), 2, 4).batch
    assert batch.response_mask_BS.tolist() == [[0, 0, 0, 1, 0, 0, 1, 0]] * 2
    assert batch.tokens_BS[0, 3:7].tolist() == answers[0].rollout.response_T.tolist()
    assert batch.row_tiles_BM.tolist() == [[0, 1], [0, 2]]
    assert batch.tiles.pixels_IHWC[:, 0, 0, 0].tolist() == [112, 200, 201]


def test_the_rollouts_of_a_prompt_share_its_image():
    shard = plan([scored("p", sample, 3, 2) for sample in range(4)] + [scored("q", 0, 3, 2)], dp_size=1)[0][0]
    assert len(shard.batch.tiles) == 2
    assert sorted(shard.batch.row_tiles_BM[:, 0].tolist()) in ([0, 0, 0, 0, 1], [0, 1, 1, 1, 1])


@settings(max_examples=60, deadline=None)
@given(steps(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_split_over_minibatches_ranks_and_microbatches_every_row_is_there_exactly_once_and_unchanged(answers, minibatches, dp_size, micro_batch, multiple):
    whole = rows(join(answers, np.arange(len(answers)) + 1.0, len(answers), multiple))
    parts = [rows(part) for own in plan(answers, minibatches, dp_size, multiple) for shard in own for part in microbatches(shard, micro_batch, multiple)]
    assert sum(len(part) for part in parts) == len(answers)
    assert {key: row for part in parts for key, row in part.items()} == whole


@settings(max_examples=60, deadline=None)
@given(steps(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_every_rank_runs_equally_many_microbatches_of_every_minibatch(answers, minibatches, dp_size, micro_batch):
    counts = [[len(microbatches(shard, micro_batch, 1)) for shard in own] for own in plan(answers, minibatches, dp_size)]
    assert all(count == counts[0] for count in counts)


@settings(max_examples=60, deadline=None)
@given(steps(), st.integers(1, 3), st.integers(1, 3))
def test_a_group_is_never_split_over_minibatches_or_ranks(answers, minibatches, dp_size):
    homes: dict[str, set[tuple[int, int]]] = {}
    for rank, own in enumerate(plan(answers, minibatches, dp_size)):
        for number, shard in enumerate(own):
            for key in filter(None, shard.keys_B):
                homes.setdefault(key.split("#")[0], set()).add((rank, number))
    assert all(len(home) == 1 for home in homes.values())


def test_microbatches_are_sorted_by_length_and_as_short_as_their_longest_row():
    answers = [scored(f"p{length}", 0, 1, length) for length in (9, 1, 5, 3)]
    parts = microbatches(plan(answers, dp_size=1)[0][0], 2, 1)
    assert [part.lengths_B.tolist() for part in parts] == [[2, 4], [6, 10]]
    assert [part.batch.tokens_BS.shape[1] for part in parts] == [4, 10]
    assert [len(part.batch.tiles) for part in parts] == [2, 2]


def test_ranks_get_groups_of_like_lengths():
    answers = [scored(f"p{length}", 0, 1, length) for length in (8, 7, 2, 1)]
    tokens = [int(own[0].lengths_B.sum()) for own in plan(answers)]
    assert tokens == [11, 11]


def test_digests_identify_the_routes_that_each_rollout_recorded():
    answer = scored("p", 0, 3, 2)
    assert join([answer], np.zeros(1), 1).digests_B == (route_digest(answer.rollout.routes.experts_SLK),)
