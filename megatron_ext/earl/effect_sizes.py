"""How much more a skill uses an expert, in two scales that do not grow with the number of prompts: log-odds with a prior, and normalised pointwise mutual
information. Significance is the business of `statistics.py`.

In one layer a prompt's mass sums to 1 over experts, so n prompts are n (fractional) words of a vocabulary of E experts.
"""

from __future__ import annotations

import numpy as np

PRIOR_PROMPTS = 20.0
"""alpha_0 of `log_odds`: the prior weighs as much as this many prompts, the same as token control's default kappa weighs in tokens."""


def log_odds(mean_mass_XLE: np.ndarray, count_X: np.ndarray) -> np.ndarray:
    """float64 [X, L, E], in nats: the log-odds ratio of expert e between a skill's prompts and all others, under an informative Dirichlet prior.

        delta_xe = logit((y_xe + a_e) / (n_x + a_0)) - logit((y_re + a_e) / (n_r + a_0)),    a_e = a_0 * p(e)

    Monroe, Colaresi, Quinn 2008 ("Fightin' Words"), equations 14 to 16, with y_xe their count of word e in corpus x. Here y_xe is the summed gate mass of
    the skill's n_x prompts, y_re and n_r those of the rest, p(e) the mean mass over all prompts (the informative prior), a_0 = PRIOR_PROMPTS. Their
    variance of delta takes words as independent; tokens of a prompt are not, so it is left out, and permutations of prompts decide what is significant.
    0 for an expert that no prompt uses, or that is alone in its layer.
    """
    count_X11 = np.asarray(count_X, dtype=np.float64)[:, None, None]
    mass_XLE = mean_mass_XLE * count_X11
    all_LE, total = mass_XLE.sum(axis=0), float(count_X11.sum())
    prior_LE = PRIOR_PROMPTS * all_LE / total

    def logit(mass: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.log(mass + prior_LE) - np.log(prompts + PRIOR_PROMPTS - mass - prior_LE))

    with np.errstate(invalid="ignore"):
        delta_XLE = logit(mass_XLE, count_X11) - logit(all_LE - mass_XLE, total - count_X11)
    return np.where((all_LE > 0) & (all_LE < total * (1 - 1e-12)), delta_XLE, 0.0)


def npmi(mean_mass_XLE: np.ndarray, count_X: np.ndarray) -> np.ndarray:
    """float64 [X, L, E] in [-1, 1]: ln(p(x, e) / (p(x) p(e))) / -ln p(x, e), in each layer (Bouma 2009).

    p(x, e): the share of all prompts' mass that is skill x's and went to expert e; p(x) the share of prompts, p(e) of mass, so that the first logarithm is
    that of `lift`. -1: never together. 0: independent, and for an expert that no prompt uses. 1: only together.
    """
    share_X11 = np.asarray(count_X, dtype=np.float64)[:, None, None] / np.sum(count_X)
    joint_XLE = share_X11 * mean_mass_XLE
    independent_XLE = share_X11 * joint_XLE.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value_XLE = np.log(joint_XLE / independent_XLE) / -np.log(joint_XLE)
    value_XLE = np.where(joint_XLE > 0, value_XLE, -1.0)
    value_XLE = np.where(joint_XLE < 1, value_XLE, 1.0)
    return np.clip(np.where(independent_XLE > 0, value_XLE, 0.0), -1.0, 1.0)
