"""The optimal readers of clusters: a transport problem with integer gains, by prices and flows.

Group g gains a_kg in 0..L for every unit of cluster k that it reads (0 where no pair is listed).
Every cluster must be read, and every group reads its quota. At group prices p, a cluster wants the
groups with the greatest a_kg - p_g; these pairs are tight. If a maximum flow over the tight pairs
serves all clusters, no plan is better. Otherwise it shows a set of groups that are wanted beyond
their quotas, and their prices rise until the first of their clusters prefers another group. Gains
are integers, so prices are, too.

    nodes     source, K clusters, G groups, anywhere, sink
    anywhere  leads to the cheapest groups, for clusters whose listed groups are all too expensive

Letters: L MoE layers, K clusters, G expert groups, n pairs.

Source: Kuhn 1955 (Hungarian method); Ford and Fulkerson 1957 (primal-dual transport).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from moce_dist.arrays import Float64, Int64

MAX_UNITS = 2**31 - 1
"""Flows are counted in 32 bits."""


class Pairs(NamedTuple):
    """(cluster, group) pairs, (n,) each, sorted by cluster; `value` is a gain or an amount."""

    cluster: Int64
    group: Int64
    value: Float64

    @property
    def first(self) -> Int64:
        """Position of every cluster's first pair."""
        return np.flatnonzero(np.diff(self.cluster, prepend=-1))


def transport(gains: Pairs, sizes: Int64, quotas: Int64, prices: Int64) -> tuple[Pairs, Int64]:
    """Assign readers to every cluster so that the gain, summed over units, is greatest.

    Every cluster has a pair in `gains`. `sizes` (K,) and `quotas` (G,) are integer units with equal
    sums of at most MAX_UNITS; `prices` (G,) are the start. Returns the units that groups read (0
    for the one reader of an empty cluster) and the final prices. Among equally good results the
    choice is arbitrary but deterministic.
    """
    assert sizes.sum() == quotas.sum() <= MAX_UNITS
    while True:
        tight, is_lost = _tight(gains, prices)
        network = _network(tight, is_lost, sizes, quotas, prices)
        flow = maximum_flow(network, 0, network.shape[0] - 1).flow
        if flow.data[: flow.indptr[1]].sum() == sizes.sum():
            return _with_empty(_amounts(flow, len(sizes), len(quotas)), gains, sizes), prices
        prices = _raise(gains, prices, *_overdemanded(network - flow, len(sizes), len(quotas)))


def _tight(gains: Pairs, prices: Int64) -> tuple[Pairs, NDArray[np.bool_]]:
    # the tight pairs at these prices, and the clusters for which a cheapest group is as good even
    # without a gain ("lost")
    reduced = gains.value - prices[gains.group]
    anywhere = -prices.min()
    best = np.maximum(np.maximum.reduceat(reduced, gains.first), anywhere)
    chosen = reduced == best[gains.cluster]
    return Pairs(*(column[chosen] for column in gains)), best == anywhere


def _network(
    tight: Pairs, is_lost: NDArray[np.bool_], sizes: Int64, quotas: Int64, prices: Int64
) -> csr_array:
    num_clusters, num_groups = len(sizes), len(quotas)
    clusters, groups = 1 + np.arange(num_clusters), 1 + num_clusters + np.arange(num_groups)
    anywhere, sink = 1 + num_clusters + num_groups, 2 + num_clusters + num_groups
    lost, cheapest = np.flatnonzero(is_lost), np.flatnonzero(prices == prices.min())
    edges = [
        (np.zeros_like(clusters), clusters, sizes),
        (clusters[tight.cluster], groups[tight.group], sizes[tight.cluster]),
        (clusters[lost], np.full_like(lost, anywhere), sizes[lost]),
        # of unlimited capacity: a saturated edge would hide that a cheapest group is wanted
        (np.full_like(cheapest, anywhere), groups[cheapest], np.full_like(cheapest, sizes.sum())),
        (groups, np.full_like(groups, sink), quotas),
    ]
    tails, heads, capacities = (
        np.concatenate(column).astype(np.int32) for column in zip(*edges, strict=True)
    )
    return csr_array((capacities, (tails, heads)), shape=(sink + 1, sink + 1))


def _overdemanded(
    residual: csr_array, num_clusters: int, num_groups: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    # what the source still reaches in the residual graph (a minimum cut): clusters that are not
    # fully served, and the groups that they want
    residual.eliminate_zeros()
    is_reached = np.zeros(residual.shape[0], bool)
    is_reached[breadth_first_order(residual, 0, return_predecessors=False)] = True
    return is_reached[1 : 1 + num_clusters], is_reached[1 + num_clusters :][:num_groups]


def _raise(
    gains: Pairs, prices: Int64, wants: NDArray[np.bool_], is_wanted: NDArray[np.bool_]
) -> Int64:
    reduced = gains.value - prices[gains.group]
    anywhere = -prices.min()
    best = np.maximum(np.maximum.reduceat(reduced, gains.first), anywhere)
    # the best value that a reached cluster would find in the groups not reached; prices rise by the
    # least loss, so that one more pair becomes tight
    elsewhere = np.where(is_wanted[gains.group], -np.inf, reduced)
    other = np.maximum(np.maximum.reduceat(elsewhere, gains.first), -prices[~is_wanted].min())
    step = int((best - other)[wants].min())
    assert step > 0
    return prices + step * is_wanted


def _amounts(flow: csr_array, num_clusters: int, num_groups: int) -> Pairs:
    edges = flow.tocoo()
    is_used = edges.data > 0
    tails, heads, units = (x[is_used].astype(np.int64) for x in (*edges.coords, edges.data))
    anywhere = 1 + num_clusters + num_groups
    direct = (tails > 0) & (tails <= num_clusters) & (heads < anywhere)
    into, out = heads == anywhere, tails == anywhere
    # units that flow through `anywhere` are matched in order: clusters that sent with groups that
    # received
    ends = np.cumsum(units[into]), np.cumsum(units[out])
    cuts = np.union1d(*ends)
    middles = cuts - 0.5
    cluster = np.concatenate([tails[direct], tails[into][np.searchsorted(ends[0], middles)]]) - 1
    group = np.concatenate([heads[direct], heads[out][np.searchsorted(ends[1], middles)]])
    value = np.concatenate([units[direct], np.diff(cuts, prepend=0)]).astype(float)
    order = np.lexsort((group, cluster))
    return Pairs(cluster[order], group[order] - 1 - num_clusters, value[order])


def _with_empty(amounts: Pairs, gains: Pairs, sizes: Int64) -> Pairs:
    # no flow reaches an empty cluster: its reader is the group with its greatest gain
    liked = np.lexsort((-gains.value, gains.cluster))[gains.first][sizes == 0]
    empty = gains.cluster[liked], gains.group[liked], np.zeros(len(liked))
    cluster, group, value = (np.concatenate(both) for both in zip(amounts, empty, strict=True))
    order = np.argsort(cluster, kind="stable")
    return Pairs(cluster[order], group[order], value[order])
