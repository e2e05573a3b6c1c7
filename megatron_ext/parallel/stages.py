"""Which part of the model each pipeline stage holds: pure arithmetic, without torch.

    stage 0: vision, embedding, layers 0..  ->  stage 1: layers ..  ->  ...  ->  last stage: layers .., final norm, output layer

With interleaving (vpp chunks a rank) stage n is chunk n // pp of pipeline rank n % pp. A CLVR tap's adapter lives where its source layer is. What it answers
travels on with the hidden states where its target lies on a later stage, so that no layout changes the model. The ViT features that later adapters need come in
one of two ways:

    the ViT is frozen     a later stage that asks runs the ViT itself: no communication
    the ViT is trained    its features ride along with the hidden states, and the gradient comes back the same way
                          (so do projected ones, whatever trains: the projector is on the first stage alone)
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.schema import ModelConfig


@dataclass(frozen=True)
class Stage:
    """One chunk of the model. Taps are named by their index in `model.clvr.taps`."""

    number: int
    count: int
    layers: range
    asks: tuple[int, ...]
    """Taps whose source layer, and so whose adapter, is here."""
    receives: tuple[int, ...]
    """Taps whose refinement arrives with the hidden states."""
    sends: tuple[int, ...]
    """Taps whose refinement leaves with the hidden states."""
    runs_vision: bool
    receives_features: bool
    sends_features: bool

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.count - 1


def pipeline_stages(model: ModelConfig, pp: int, vpp: int = 1, vision_trains: bool = True) -> tuple[Stage, ...]:
    """All stages in the order of the data. Layers are shared out evenly; where they do not divide, earlier stages hold one more.

    >>> [list(stage.layers) for stage in pipeline_stages(ModelConfig(num_layers=5), pp=2)]
    [[0, 1, 2], [3, 4]]
    """
    count = pp * vpp
    share, more = divmod(model.num_layers, count)
    starts = [number * share + min(number, more) for number in range(count + 1)]
    layers = [range(starts[number], starts[number + 1]) for number in range(count)]
    taps = model.clvr.active_taps
    asks = [tuple(index for index, (source, _) in enumerate(taps) if max(source, 0) in own) for own in layers]
    crosses = [
        tuple(index for index, (source, target) in enumerate(taps) if max(source, 0) < own.start <= target) for own in layers
    ]  # refinements on their way into each stage
    last_asking = max((number for number in range(count) if asks[number]), default=0)

    rides = vision_trains or model.clvr.kv_tokens == "projected"

    def stage(number: int) -> Stage:
        riding = rides and number <= last_asking
        return Stage(
            number,
            count,
            layers[number],
            asks[number],
            receives=crosses[number],
            sends=crosses[number + 1] if number + 1 < count else (),
            runs_vision=model.vision.enabled and (number == 0 or (not rides and bool(asks[number]))),
            receives_features=riding and number > 0,
            sends_features=riding and number < last_asking,
        )

    return tuple(stage(number) for number in range(count))
