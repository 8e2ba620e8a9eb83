"""Choices next to a given one, for the knapsack: up to four items move to other options at once.

Only the moves of least reduced cost are considered (the core of a knapsack, Pisinger 1995). They
are split in two halves; for every pair of the one half, the pairs of the other are looked up that
use up just what it leaves of the limits (meeting in the middle, Horowitz & Sahni 1974).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial import cKDTree

from apreqel.arrays import Doubles, Whole

# Pairs looked up for a pair: of the nearest, some use a little too much of a limit.
_PARTNERS = 8
_MOST_FOUND = 10


def neighbours(
    choice: Whole,
    reduced: Doubles,
    uses: Doubles,
    left: Doubles,
    prices: Doubles,
    core: int,
    gain: float,
) -> Iterator[Whole]:
    """Choices within the limits, best first, that the `core` nearest moves lead to.

    `reduced[item, option]` is cost + prices x uses (inf: not to be chosen), `uses[limit, item,
    option]` what an option uses of a limit, `left[limit]` what `choice` leaves of it, or lacks.
    What a choice adds in reduced cost, and what it leaves at `prices`, must be less than `gain`.
    """
    change = reduced - np.take_along_axis(reduced, choice[:, None], 1)
    np.put_along_axis(change, choice[:, None], np.inf, 1)
    nearest = np.argsort(change, axis=None, kind="stable")[:core]
    item, option = np.unravel_index(nearest[np.isfinite(change.flat[nearest])], change.shape)
    # Items alternate between the halves in the order of their nearest move.
    _, first, of = np.unique(item, return_index=True, return_inverse=True)
    half = first.argsort().argsort()[of] % 2
    # The last move of the list is none at all.
    none = len(item)
    use = np.zeros((len(left), none + 1))
    use[:, :none] = uses[:, item, option] - uses[:, item, choice[item]]
    added = np.append(change[item, option], 0.0)
    item, option = np.append(item, len(choice)), np.append(option, 0)
    one, other = (_pairs(np.append(np.flatnonzero(half == h), none), item) for h in (0, 1))
    least = float(added[other].sum(axis=0).min())
    one = one[:, added[one].sum(axis=0) + least < gain]
    if not one.size:
        return
    one_added, other_added = added[one].sum(axis=0), added[other].sum(axis=0)
    room, other_use = left[:, None] - use[:, one].sum(axis=1), use[:, other].sum(axis=1)
    # Each axis in units of the objective: the distance is what the two together add to it.
    tree = cKDTree(np.vstack([other_use * prices[:, None], other_added]).T)
    distance, partner = tree.query(
        np.vstack([room * prices[:, None], np.full(len(one_added), least)]).T,
        k=range(1, _PARTNERS + 1),
        p=1,
        distance_upper_bound=gain - least - float(one_added.min()),
    )
    a, nth = np.nonzero(np.isfinite(distance))
    b = partner[a, nth]
    fits = (other_use[:, b] <= room[:, a]).all(axis=0)
    a, b, total = a[fits], b[fits], (one_added[a] + distance[a, nth])[fits]
    for k in np.argsort(total, kind="stable")[:_MOST_FOUND]:
        found = np.append(choice, 0)
        made = np.concatenate([one[:, a[k]], other[:, b[k]]])
        found[item[made]] = option[made]
        yield found[:-1]


def _pairs(moves: Whole, item: Whole) -> Whole:
    """Two of the moves, of different items; the last, which is none, may come twice."""
    pairs: Whole = moves[np.array(np.triu_indices(len(moves)))]
    return pairs[:, (item[pairs[0]] != item[pairs[1]]) | (pairs[0] == moves[-1])]
