"""Cluster methods other than `topm`: experts that work together are found without looking at skills, and each community then goes to a skill.

    contrast of the candidates [N, S] (pairs that are significant and strong for any skill), what templates explain taken off
      nmf       non-negative parts of groups of prompts: each expert goes to the part that explains most of it
      spectral  communities of the co-activation graph by its leading eigenvectors
      louvain   communities of the same graph by modularity; it chooses their number
    -> a community belongs to the skill for which the mean z of its experts is largest; a skill may have several

A skill's cluster is then what `topm` would take, restricted to the skill's communities. So whatever a method does, it adds no pair to those that pass the
tests of significance and effect, and makes no error that the test does not make; and no expert serves two skills.

S candidates, k communities, otherwise as in statistics.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_ext.config.rl_schema import DiscoverConfig
from megatron_ext.earl.resampling import Resamples
from megatron_ext.earl.sample import Survey
from megatron_ext.earl.statistics import Effects, effects

MOST_CANDIDATES = 512
"""Those with the largest z. It bounds memory, 4 bytes for each prompt and candidate; a skill's final cluster is much smaller."""
_GROUPS_OF_CELL = 32


def in_communities(
    survey: Survey, found: Effects, chosen_XLE: np.ndarray, resamples: Resamples, config: DiscoverConfig, seed: int, poll: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs are in communities of a skill, over all prompts, bool [X, L, E], and on each resample, [B, X, L, E]: found anew on halves and without a
    template; bootstraps keep those of all prompts."""
    best_LE = np.where(chosen_XLE, found.z_XLE, -np.inf).max(axis=0)
    num_candidates = min(MOST_CANDIDATES, int(np.isfinite(best_LE).sum()))
    flat = np.sort(np.argsort(-best_LE, axis=None, kind="stable")[:num_candidates])
    pairs = [divmod(int(index), survey.num_experts) for index in flat]
    contrast_NS = survey.contrasts(pairs).astype(np.float32)

    def table(rows: np.ndarray) -> np.ndarray:
        poll()
        mine_XLE = np.zeros(chosen_XLE.shape, dtype=bool)
        mine_XLE.reshape(len(mine_XLE), -1)[:, flat] = membership(
            contrast_NS[rows].astype(np.float64), survey.label_N[rows], survey.stratum_N[rows], survey.num_skills, config.method, seed
        )
        return mine_XLE

    whole_XLE = table(np.arange(survey.num_prompts))
    again_BXLE = np.repeat(whole_XLE[None], len(resamples.times_BN), axis=0)
    if num_candidates:
        for index in [*range(resamples.halves.start, resamples.halves.stop), *range(resamples.left_out.start, resamples.left_out.stop)]:
            again_BXLE[index] = table(np.flatnonzero(resamples.times_BN[index]))
    return whole_XLE, again_BXLE


def membership(contrast_NS: np.ndarray, label_N: np.ndarray, stratum_N: np.ndarray, num_skills: int, method: str, seed: int) -> np.ndarray:
    """bool [X, S]: the skill of each candidate's community."""
    num_candidates = contrast_NS.shape[1]
    if not num_candidates:
        return np.zeros((num_skills, 0), dtype=bool)
    scaled_NS = _scaled(contrast_NS, stratum_N)
    if num_candidates <= 2:
        community_S = np.arange(num_candidates)
    elif method == "nmf":
        community_S = _parts(_groups(scaled_NS, label_N, stratum_N), num_skills, seed)
    elif method == "spectral":
        community_S = _spectral(coactivation(scaled_NS), num_skills, seed)
    else:
        community_S = _louvain(coactivation(scaled_NS), seed)
    z_XS = effects(contrast_NS[:, None, :], label_N, stratum_N, num_skills).z_XLE[:, 0]
    member_kS = community_S == np.unique(community_S)[:, None]
    evidence_Xk = z_XS @ member_kS.T / member_kS.sum(axis=1)
    return np.asarray(evidence_Xk.argmax(axis=0)[member_kS.argmax(axis=0)] == np.arange(num_skills)[:, None])


def coactivation(scaled_NS: np.ndarray) -> np.ndarray:
    """float64 [S, S]: correlations over prompts between candidates, those that are not above what chance gives (2 / sqrt(N)) set to 0, as is the diagonal."""
    weight_SS = scaled_NS.T @ scaled_NS / len(scaled_NS)
    weight_SS = np.where(weight_SS > 2 / np.sqrt(len(scaled_NS)), weight_SS, 0.0)
    np.fill_diagonal(weight_SS, 0.0)
    return np.asarray((weight_SS + weight_SS.T) / 2)


def _scaled(contrast_NS: np.ndarray, stratum_N: np.ndarray) -> np.ndarray:
    """Centred within templates, with a deviation of 1."""
    centred_NS = contrast_NS.copy()
    for stratum in np.unique(stratum_N):
        centred_NS[stratum_N == stratum] -= centred_NS[stratum_N == stratum].mean(axis=0)
    return np.asarray(centred_NS / np.maximum(centred_NS.std(axis=0), 1e-12))


def _groups(scaled_NS: np.ndarray, label_N: np.ndarray, stratum_N: np.ndarray) -> np.ndarray:
    """[groups, S]: the prompts themselves where a (skill, template) has few, else the means of groups of them, so that any number of prompts is as fast."""
    rows = []
    for stratum in range(int(stratum_N.max()) + 1):
        cells = [np.flatnonzero((label_N == skill) & (stratum_N == stratum)) for skill in range(int(label_N.max()) + 1)]
        for cell in sorted((cell for cell in cells if len(cell)), key=lambda cell: int(cell[0])):  # not by label: names play no part
            groups = min(len(cell), _GROUPS_OF_CELL)
            rows += [scaled_NS[cell[group::groups]].mean(axis=0) for group in range(groups)]
    return np.stack(rows)


def _parts(groups_GS: np.ndarray, num_parts: int, seed: int) -> np.ndarray:
    """[S]: max(groups, 0) ~ W H with W, H >= 0 (Lee, Seung 1999): the part of each candidate that contributes most to it over all groups, H_k * |W_k|."""
    from sklearn.decomposition import NMF

    num_parts = min(num_parts, *groups_GS.shape)
    model = NMF(num_parts, init="nndsvda", random_state=seed, max_iter=1000, tol=1e-3)
    weight_Gk = model.fit_transform(np.maximum(groups_GS, 0.0))
    return np.asarray((model.components_ * np.linalg.norm(weight_Gk, axis=0)[:, None]).argmax(axis=0))


def _spectral(weight_SS: np.ndarray, num_communities: int, seed: int) -> np.ndarray:
    """[S]: k-means over the rows, of length 1, of the leading eigenvectors of D^-1/2 W D^-1/2, as many as there are skills (Ng, Jordan, Weiss 2001)."""
    from sklearn.cluster import KMeans

    num_communities = min(num_communities, len(weight_SS))
    weight_SS = weight_SS + 1e-6  # connected, so that a candidate without neighbours has a place
    root_S = 1 / np.sqrt(weight_SS.sum(axis=1))
    leading_Sk = np.linalg.eigh(weight_SS * root_S * root_S[:, None])[1][:, -num_communities:]
    leading_Sk = leading_Sk / np.maximum(np.linalg.norm(leading_Sk, axis=1, keepdims=True), 1e-12)
    return np.asarray(KMeans(num_communities, n_init=10, random_state=seed).fit_predict(leading_Sk))


def _louvain(weight_SS: np.ndarray, seed: int) -> np.ndarray:
    """[S]: communities of the largest modularity that merging neighbours finds (Blondel et al. 2008)."""
    import networkx

    graph = networkx.from_numpy_array(weight_SS)
    community_S = np.zeros(len(weight_SS), dtype=np.int64)
    for number, members in enumerate(networkx.community.louvain_communities(graph, seed=seed)):
        community_S[list(members)] = number
    return community_S
