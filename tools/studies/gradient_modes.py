"""A policy so small that everything that can happen is enumerated: a router over five experts takes two of them, and these say one of four tokens.

    scores = x W_r [E] -> experts a (the top two, or an ordered draw of two) -> gates g = softmax over a -> logits = sum_{e in a} g_e U_e -> a token y

Token 0 is right. Experts 2 and 4 are the cluster; expert 4 is the planted one, which says token 0 loudest, and which the router, as it starts, does not choose.
Everything is float64. The gradients are those of the project's own loss functions, weighed by the probability of what they are losses of.

    PYTHONPATH=. python tools/studies/gradient_modes.py          the table of docs/studies/gradient_modes.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from statistics import median

import torch

from megatron_ext.rl.objective.loss import LossSettings, policy_loss
from megatron_ext.rl.objective.router import cluster_mass, pathwise_loss, route_logprob, route_loss

EXPERTS, CHOSEN, TOKENS = 5, 2, 4
CLUSTER = torch.tensor([False, False, True, False, True])
LAMBDA, CEILING = 0.3, 0.9
RIGHT = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
Bonus = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(log p [E], chosen experts [K]) -> what a right answer is paid besides."""


@dataclass(frozen=True)
class Bandit:
    """`router_HE`: the only parameters that learn; `state_H`: the one prompt; `says_ET`: what each expert adds to the logits."""

    router_HE: torch.Tensor
    state_H: torch.Tensor
    says_ET: torch.Tensor

    @classmethod
    def make(cls, seed: int = 0) -> Bandit:
        draw = torch.Generator().manual_seed(seed)
        router_HE = 0.1 * torch.randn(3, EXPERTS, generator=draw, dtype=torch.float64)
        state_H = torch.ones(3, dtype=torch.float64)
        router_HE[:, :] += (torch.tensor([1.2, 0.7, 0.9, 0.1, 0.3], dtype=torch.float64) - state_H @ router_HE) / 3
        says_ET = torch.randn(EXPERTS, TOKENS, generator=draw, dtype=torch.float64)
        says_ET[4] = torch.tensor([3.0, 0.0, 0.0, 0.0])
        return cls(router_HE.requires_grad_(), state_H, says_ET)

    def scores_E(self) -> torch.Tensor:
        return torch.log_softmax(self.state_H @ self.router_HE, -1)

    def tokens_T(self, experts_K: torch.Tensor) -> torch.Tensor:
        """Log-probs of the tokens, with these experts and live gates."""
        gates_K = torch.softmax(self.scores_E()[experts_K], -1)
        return torch.log_softmax(gates_K @ self.says_ET[experts_K], -1)

    def greedy(self) -> torch.Tensor:
        return self.scores_E().topk(CHOSEN).indices

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(value, self.router_HE)
        return found


def gate_mass(logprobs_E: torch.Tensor, experts_K: torch.Tensor) -> torch.Tensor:
    """What rollouts record, and the bonus pays for: the gates of the chosen ones that are in the cluster."""
    return (torch.softmax(logprobs_E[experts_K], -1) * CLUSTER[experts_K]).sum()


def capped_mass(logprobs_E: torch.Tensor, experts_K: torch.Tensor) -> torch.Tensor:
    """What `pathwise` pays for: min(p_C, q)."""
    return cluster_mass(logprobs_E[None], CLUSTER[None])[0].clamp(max=CEILING)


def chosen_share(logprobs_E: torch.Tensor, experts_K: torch.Tensor) -> torch.Tensor:
    """A bonus of the routes alone: which of the chosen ones are in the cluster."""
    return CLUSTER[experts_K].double().mean()


def exact(bandit: Bandit, bonus: Bonus, drawn: bool) -> torch.Tensor:
    """grad of J = E[r + lambda r b], by enumeration of all routes and tokens; `drawn`: routes are drawn, or the most likely ones."""
    scores_E = bandit.scores_E()
    value = torch.zeros((), dtype=torch.float64)
    for experts_K in _routes(bandit, drawn):
        chance = route_logprob(scores_E[None], experts_K[None])[0].exp() if drawn else torch.ones(())
        paid_T = RIGHT * (1 + LAMBDA * bonus(scores_E, experts_K))
        value = value + chance * (bandit.tokens_T(experts_K).exp() * paid_T).sum()
    return bandit.gradient(value)


def score(bandit: Bandit, bonus: Bonus, drawn: bool = False) -> torch.Tensor:
    """What `policy_loss` teaches in expectation, with r + lambda r b as the advantage."""
    loss = torch.zeros((), dtype=torch.float64)
    for experts_K, chance in _chances(bandit, drawn):
        logprobs_T = bandit.tokens_T(experts_K)
        paid_T = (RIGHT * (1 + LAMBDA * bonus(bandit.scores_E(), experts_K))).detach()
        for token in range(TOKENS):
            logprob_11 = logprobs_T[token].reshape(1, 1)
            ones_11 = torch.ones(1, 1, dtype=torch.bool)
            parts = policy_loss(logprob_11, logprob_11.detach(), logprob_11.detach(), paid_T[token].reshape(1), ones_11, LossSettings())
            loss = loss + chance * logprobs_T[token].exp().detach() * parts.loss_sum
    return -bandit.gradient(loss)


def pathwise(bandit: Bandit) -> torch.Tensor:
    """What `pathwise` adds, in expectation."""
    right = (bandit.tokens_T(bandit.greedy()).exp() * RIGHT).sum().detach()
    mass_n = cluster_mass(bandit.scores_E()[None], CLUSTER[None])
    return -bandit.gradient(LAMBDA * pathwise_loss(mass_n, torch.tensor([CEILING], dtype=torch.float64), right[None]))


def router_pg(bandit: Bandit, bonus: Bonus) -> torch.Tensor:
    """What the surrogate of the routes teaches beside `score`, in expectation, with weight 1."""
    loss = torch.zeros((), dtype=torch.float64)
    scores_E = bandit.scores_E()
    for experts_K, chance in _chances(bandit, drawn=True):
        logprob_n = route_logprob(scores_E[None], experts_K[None])
        paid_T = (RIGHT * (1 + LAMBDA * bonus(scores_E, experts_K))).detach()
        for token, likely in enumerate(bandit.tokens_T(experts_K).exp().detach()):
            loss = loss + route_loss(logprob_n, logprob_n, paid_T[token : token + 1], (chance * likely)[None], clip=0.1)
    return -bandit.gradient(loss)


def main() -> None:
    """Of 20 bandits: how far each mode's gradient is from the exact one, as a share of its norm, and what the planted expert's logit gets."""
    print("| b | routes | mode | error, median | error, most | planted expert's logit, median |\n|---|---|---|---|---|---|")
    bandits = [Bandit.make(seed) for seed in range(20)]
    for name, bonus, drawn in (
        ("min(p_C, q)", capped_mass, False),
        ("gate mass", gate_mass, False),
        ("share", chosen_share, True),
        ("gate mass", gate_mass, True),
    ):
        modes: dict[str, Callable[[Bandit], torch.Tensor]] = {
            "exact": partial(exact, bonus=bonus, drawn=drawn),
            "score": partial(score, bonus=bonus, drawn=drawn),
        }
        if drawn:
            modes["score + router_pg"] = partial(_score_and_routes, bonus=bonus)
        else:
            modes["score + pathwise"] = partial(_score_and_path, bonus=bonus)
        for mode, of in modes.items():
            found = [(of(bandit), modes["exact"](bandit), bandit) for bandit in bandits]
            errors = [float((ours - whole).norm() / whole.norm()) for ours, whole, _ in found]
            logits = [float(bandit.state_H @ ours[:, -1]) for ours, _, bandit in found]
            routes = "drawn" if drawn else "most likely"
            print(f"| {name} | {routes} | {mode} | {_told(median(errors))} | {_told(max(errors))} | {_told(median(logits), '+')} |")


def _told(value: float, sign: str = "") -> str:
    return "0" if abs(value) < 1e-12 else f"{value:{sign}.4f}"


def _score_and_path(bandit: Bandit, bonus: Bonus) -> torch.Tensor:
    return score(bandit, bonus) + pathwise(bandit)


def _score_and_routes(bandit: Bandit, bonus: Bonus) -> torch.Tensor:
    return score(bandit, bonus, drawn=True) + router_pg(bandit, bonus)


def _routes(bandit: Bandit, drawn: bool) -> list[torch.Tensor]:
    return [torch.tensor(order) for order in permutations(range(EXPERTS), CHOSEN)] if drawn else [bandit.greedy()]


def _chances(bandit: Bandit, drawn: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Routes and their probability, without gradient."""
    routes = _routes(bandit, drawn)
    if not drawn:
        return [(routes[0], torch.ones((), dtype=torch.float64))]
    return [(experts_K, route_logprob(bandit.scores_E()[None], experts_K[None])[0].exp().detach()) for experts_K in routes]


if __name__ == "__main__":
    main()
