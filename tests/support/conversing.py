"""A conversing fleet over a function that answers at once."""

from __future__ import annotations

from megatron_ext.rl.conversing import ConversingFleet
from megatron_ext.rl.roles import Ask


class AtOnce:
    """A fleet whose turn answers all that was asked since, by `generate(prompts, samples, step)`."""

    def __init__(self, generate):
        self._generate, self._asks = generate, []

    @property
    def idle(self):
        return not self._asks

    def ask(self, asks):
        self._asks += asks

    def turn(self, beside_update=False):
        asks, self._asks = self._asks, []
        return list(self._generate([ask.prompt for ask in asks], len(asks[0].samples), asks[0].step))


def converse(generate, act, prompts, samples, step, rules):
    """`samples` conversations about every prompt, to their end."""
    inner = AtOnce(generate)
    fleet, ended = ConversingFleet(inner, act, rules), []
    fleet.ask([Ask(prompt, tuple(range(samples)), step) for prompt in prompts])
    while not inner.idle:
        ended += fleet.turn()
    return ended
