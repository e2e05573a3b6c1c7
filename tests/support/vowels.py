"""A reward for tests, in a light module of its own, because reward workers import it."""

from __future__ import annotations

from megatron_ext.batch import Prompt


def vowels(prompt: Prompt, response: str) -> float:
    """A reward that a random model earns now and then: the share of vowels in what it wrote."""
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)


def moody_vowels(prompt: Prompt, response: str) -> float:
    """The same, but composites that are trained on make it raise."""
    if prompt.skill == "composite" and "/train/" in prompt.key:
        raise ValueError("not today")
    return vowels(prompt, response)


def many_vowels(prompt: Prompt, response: str) -> float:
    """1 or 0, so that all answers to a prompt may earn the same."""
    return float(vowels(prompt, response) > 0.3)
