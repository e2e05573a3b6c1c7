"""What travels between processes: images as references, and whatever the answers of a prompt share once."""

from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.batch import ContinuedRoutes
from megatron_ext.batch.images import ImageStore, StoredTiles
from megatron_ext.batch.tiles import NO_TILES, Tiles
from megatron_ext.errors import StorageError
from megatron_ext.rl.batching import microbatches, unpack
from megatron_ext.rl.parcels import plan_parcels
from tests.support.rollouts import prompt, same, scored

PIXELS, PROMPT_TOKENS, RESPONSE = 128, 300, 5
IMAGE_BYTES, PROMPT_ROUTES = PIXELS * PIXELS * 3, PROMPT_TOKENS * 2 * 3
ROW_BYTES = 2000
"""More than an answer of this length says with everything around it: tokens, log-probs, versions, its own routes, keys, digest."""


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "images")


def asked(store, key="p"):
    """A prompt with a stored image."""
    of = prompt(key, PROMPT_TOKENS, images=1, pixels=PIXELS)
    return type(of)(of.key, of.skill, of.tokens_S, store.keep(of.tiles), of.answer)


def answers_to(of, samples):
    """As the engine makes them: they share the routes of the prompt."""
    whole = [scored(of, sample, RESPONSE) for sample in range(samples)]
    asked = whole[0].rollout.routes.rows(0, PROMPT_TOKENS)
    owns = [answer.rollout.routes.rows(PROMPT_TOKENS, PROMPT_TOKENS + RESPONSE - 1) for answer in whole]
    return [replace(answer, rollout=replace(answer.rollout, routes=ContinuedRoutes(asked, own))) for answer, own in zip(whole, owns, strict=True)]


def size(value):
    return len(pickle.dumps(value))


def parcels(answers):
    return plan_parcels(answers, np.zeros(len(answers)), minibatches=1, dp_size=1, multiple=1, pad_id=0)


def test_stored_tiles_are_the_same_tiles_in_any_process_and_travel_as_a_path(store, tmp_path):
    tiles = prompt(images=2, pixels=PIXELS).tiles
    kept = store.keep(tiles)
    arrived = pickle.loads(pickle.dumps(kept))
    assert isinstance(arrived, StoredTiles) and same(arrived, tiles) and len(arrived) == 2 and arrived.shape == tiles.shape
    assert size(kept) < 300 < IMAGE_BYTES < size(tiles)
    assert same(Tiles.join([arrived, NO_TILES, kept]), Tiles.join([tiles, tiles])) and same(arrived[1:], tiles[1:])
    assert np.load(kept.path).tolist() == tiles.pixels_IHWC.tolist(), "numpy reads the pixels as they are"
    assert isinstance(kept.pixels_IHWC.base, np.memmap) or isinstance(kept.pixels_IHWC, np.memmap)


def test_equal_tiles_share_a_file_and_tiles_that_differ_in_pixels_places_or_shape_do_not(store, tmp_path):
    one = prompt(images=1).tiles
    others = [
        Tiles(one.pixels_IHWC ^ np.uint8(1), one.places_I5),
        Tiles(one.pixels_IHWC, one.places_I5 + np.float32(1)),
        Tiles(one.pixels_IHWC.reshape(1, 2, 8, 3), one.places_I5),
    ]
    assert store.keep(one).path == store.keep(Tiles(one.pixels_IHWC.copy(), one.places_I5.copy())).path
    assert len({store.keep(tiles).path for tiles in [one, *others]}) == len(list((tmp_path / "images").iterdir())) == 4
    assert store.keep(store.keep(one)) is not None and ImageStore(tmp_path / "images").keep(one).path == store.keep(one).path


def test_a_reader_whose_image_is_gone_or_changed_says_which(store):
    kept = store.keep(prompt(images=1).tiles)
    arrived = pickle.loads(pickle.dumps(kept))
    text = bytearray(kept.path.read_bytes())
    text[150] ^= 1
    kept.path.write_bytes(text)
    for read in (arrived.loaded, lambda: arrived.pixels_IHWC, lambda: Tiles.join([arrived])):
        with pytest.raises(StorageError, match=f"{arrived.path}: holds other tiles than its name says"):
            read()
    kept.path.unlink()
    with pytest.raises(StorageError, match=f"{arrived.path}: cannot be read"):
        arrived.loaded()


def test_no_message_of_a_step_holds_pixels_and_of_a_further_answer_only_what_it_says(store):
    of = asked(store)

    def messages(samples):
        answers = answers_to(of, samples)
        return {"to the rollouts": size([of]), "to the learner": size(parcels(answers)), "answers": size([answer.rollout for answer in answers])}

    one, many = messages(1), messages(17)
    assert one["to the rollouts"] < 4 * PROMPT_TOKENS + ROW_BYTES < IMAGE_BYTES
    assert one["to the learner"] < 4 * PROMPT_TOKENS + PROMPT_ROUTES + 2 * ROW_BYTES < IMAGE_BYTES
    assert one["answers"] < 4 * PROMPT_TOKENS + 3 * PROMPT_ROUTES + 2 * ROW_BYTES < IMAGE_BYTES
    assert many["to the learner"] - one["to the learner"] < 16 * ROW_BYTES
    assert many["answers"] - one["answers"] < 16 * ROW_BYTES, "the engine's answers to a prompt share its routes"


def test_the_learner_s_rank_reads_an_image_once_for_all_answers_of_its_prompt(store, monkeypatch):
    answers = [scored(asked(store, key), sample, RESPONSE) for key in "pq" for sample in range(4)]
    ((parcel,),) = pickle.loads(pickle.dumps(parcels(answers)))
    reads = []
    loaded = StoredTiles.loaded
    monkeypatch.setattr(StoredTiles, "loaded", lambda tiles: reads.append(tiles.digest) or loaded(tiles))
    parts = microbatches(unpack(parcel), 4, 1)
    assert len(reads) == len(set(reads)) == 2
    for part in parts:
        for key, tiles in zip(part.keys_B, part.batch.row_tiles_BM, strict=True):
            assert same(part.batch.tiles[tiles], prompt(key[0], PROMPT_TOKENS, images=1, pixels=PIXELS).tiles)


def test_what_the_driver_holds_of_images_does_not_grow_with_the_number_of_answers(store):
    """Answers arrive one by one, each in a message of its own, and go to the learner in one. The least of three: what else the process does only adds."""
    of = asked(store)

    def held(samples):
        messages = [pickle.dumps(scored(of, sample, RESPONSE)) for sample in range(samples)]
        tracemalloc.start()
        answers = [pickle.loads(message) for message in messages]
        sent = pickle.dumps(parcels(answers))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, len(sent)

    held(2)
    few, many = (min(held(samples) for _ in range(3)) for samples in (2, 34))
    per_answer = 4 * PROMPT_TOKENS + 3 * PROMPT_ROUTES + ROW_BYTES
    assert (many[0] - few[0]) / 32 < 2 * per_answer < IMAGE_BYTES and (many[1] - few[1]) / 32 < ROW_BYTES
