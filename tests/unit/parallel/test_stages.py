"""What each pipeline stage holds: worked examples, and the laws that nothing is lost between stages."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.schema import ClvrConfig, ModelConfig
from megatron_ext.parallel.stages import pipeline_stages


def model(layers: int, *taps: tuple[int, int]) -> ModelConfig:
    return ModelConfig(num_layers=layers, clvr=ClvrConfig(taps=taps))


def test_a_tap_that_crosses_stages_asks_where_its_source_is_and_travels_to_its_target() -> None:
    """Six layers on three stages; the tap (1, 4) asks on stage 0, passes stage 1 and enters on stage 2."""
    first, second, third = pipeline_stages(model(6, (1, 4)), pp=3)
    assert [list(stage.layers) for stage in (first, second, third)] == [[0, 1], [2, 3], [4, 5]]
    assert (first.asks, first.sends) == ((0,), (0,))
    assert (second.receives, second.sends) == ((0,), (0,))
    assert (third.receives, third.sends) == ((0,), ())


def test_features_of_a_vit_that_trains_ride_to_the_last_stage_that_asks_and_no_further() -> None:
    stages = pipeline_stages(model(6, (0, 1), (2, 3)), pp=3)
    assert [stage.sends_features for stage in stages] == [True, False, False]
    assert [stage.receives_features for stage in stages] == [False, True, False]
    assert [stage.runs_vision for stage in stages] == [True, False, False]


def test_a_frozen_vit_runs_again_where_a_tap_asks_and_nothing_rides() -> None:
    stages = pipeline_stages(model(6, (0, 1), (4, 5)), pp=3, vision_trains=False)
    assert [stage.runs_vision for stage in stages] == [True, False, True]
    assert not any(stage.sends_features or stage.receives_features for stage in stages)


def test_projected_features_ride_even_from_a_frozen_vit() -> None:
    """The projector is on the first stage alone."""
    config = ModelConfig(num_layers=6, clvr=ClvrConfig(taps=((2, 3),), kv_tokens="projected"))
    stages = pipeline_stages(config, pp=3, vision_trains=False)
    assert [stage.sends_features for stage in stages] == [True, False, False]
    assert [stage.runs_vision for stage in stages] == [True, False, False]


def test_embeddings_ask_on_the_first_stage_and_the_input_of_a_layer_where_the_layer_before_it_is() -> None:
    embeddings, same = (ModelConfig(num_layers=6, clvr=ClvrConfig(taps=((1, 4),), query_source=source)) for source in ("input_embedding", "same_layer"))
    assert [stage.asks for stage in pipeline_stages(embeddings, pp=3)] == [(0,), (), ()]
    assert [stage.receives for stage in pipeline_stages(embeddings, pp=3)] == [(), (0,), (0,)]
    assert [stage.asks for stage in pipeline_stages(same, pp=3)] == [(), (0,), ()]
    assert [stage.receives for stage in pipeline_stages(same, pp=3)] == [(), (), (0,)]


def test_without_clvr_only_hidden_states_travel() -> None:
    plain = ModelConfig(num_layers=4, clvr=ClvrConfig(enabled=False))
    assert all(not (stage.asks or stage.sends or stage.sends_features) for stage in pipeline_stages(plain, pp=2, vpp=2))


@given(st.data())
def test_every_layer_and_tap_lives_on_one_stage_and_what_is_sent_is_what_is_received(data: st.DataObject) -> None:
    layers = data.draw(st.integers(2, 12))
    count = data.draw(st.integers(1, layers))
    pairs = st.tuples(st.integers(0, layers - 1), st.integers(0, layers - 1)).filter(lambda pair: pair[0] < pair[1])
    taps = tuple(data.draw(st.lists(pairs, min_size=1, max_size=4)))
    trains = data.draw(st.booleans())
    stages = pipeline_stages(model(layers, *taps), pp=count, vision_trains=trains)
    assert [number for stage in stages for number in stage.layers] == list(range(layers))
    assert sorted(tap for stage in stages for tap in stage.asks) == list(range(len(taps)))
    assert stages[0].first and stages[-1].last and not stages[0].receives and not stages[-1].sends and not stages[-1].sends_features
    for before, after in pairwise(stages):
        assert before.sends == after.receives and before.sends_features == after.receives_features
    for stage in stages:
        assert len(stage.layers) >= 1
        assert not stage.asks or stage.runs_vision or stage.receives_features
        for tap, (source, target) in enumerate(taps):
            has_it = tap in stage.asks or tap in stage.receives
            assert (tap in stage.sends) == (has_it and target >= stage.layers.stop)
            assert not (target in stage.layers and source not in stage.layers) or tap in stage.receives
