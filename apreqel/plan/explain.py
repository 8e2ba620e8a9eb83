"""Why a tensor got its type: what each type would cost it, at the prices that the limits set.

At the optimum of the relaxed problem a limit has a price (what the objective falls by when it is
eased by one), and every tensor takes the type of least objective + prices x costs. How much dearer
the next type is, and at which price it would win, is the explanation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apreqel.errors import UsageError, printable

if TYPE_CHECKING:
    from apreqel.model.inventory import Inventory
    from apreqel.plan.options import Doubles
    from apreqel.plan.planner import Solved
    from apreqel.sensitivity.measure import Sensitivity


@dataclass(frozen=True)
class OptionPrice:
    """One type for one tensor. `regret` is how much dearer than the least, in the plan's unit."""

    type_name: str
    is_chosen: bool
    size_bytes: int
    kld_nats: float
    interval: tuple[float, float]  # of the damage, 95%
    is_probed: bool  # the damage was measured itself, not predicted
    decode_seconds: float | None
    prefill_seconds: float | None
    regret: float


@dataclass(frozen=True)
class Exchange:
    """Where a tensor would change: to which type, and by which factor of the limit's price."""

    tensor: str
    chosen: str
    other: str
    regret: float
    at_price: float | None  # times the present price of the limit that binds most


@dataclass(frozen=True)
class RoleShare:
    """All tensors of one role together."""

    role: str
    n_tensors: int
    size_bytes: int
    kld_nats: float
    types: Sequence[str]


def explain_tensor(solved: Solved, sensitivity: Sensitivity, name: str) -> list[OptionPrice]:
    """Every type that the tensor could have, smallest first. Raises UsageError."""
    if name not in solved.options.names:
        like = [n for n in solved.options.names if name in n][:5]
        hint = f"; did you mean {', '.join(like)}?" if like else ""
        raise UsageError(f"tensor {printable(name)}: is not in the plan{hint}")
    i = list(solved.options.names).index(name)
    regrets, timings = _regrets(solved, i), solved.options.timings
    known = sensitivity.model.table(name) if name in sensitivity.tensors else {}
    rows = [
        OptionPrice(
            kind,
            j == solved.solution.choice[i],
            int(solved.options.sizes[i][j]),
            float(solved.options.damages[i][j]),
            *(
                (known[kind].interval, known[kind].is_probed)
                if kind in known
                else ((float(solved.options.damages[i][j]),) * 2, True)  # its own type, or a cache
            ),
            float(timings.decode[i][j]) if timings else None,
            float(timings.prefill[i][j]) if timings else None,
            float(regrets[j]),
        )
        for j, kind in enumerate(solved.options.types[i])
    ]
    return sorted(rows, key=lambda row: (row.size_bytes, row.type_name))


def nearest_exchange(solved: Solved, i: int) -> Exchange | None:
    """The type that a tensor would take next as limits change; None where it has no other."""
    kinds, chosen = solved.options.types[i], solved.solution.choice[i]
    regrets = _regrets(solved, i)
    others = [j for j in range(len(kinds)) if j != chosen]
    if not others:
        return None
    best = min(others, key=lambda j: regrets[j])
    prices = [
        (price * limit.one_more[0], k)
        for k, (limit, price) in enumerate(zip(solved.limits, solved.solution.prices, strict=True))
        if price > 0
    ]
    factor = None
    if prices:
        k = max(prices)[1]
        price, row = solved.solution.prices[k], solved.limits[k].costs[i]
        # Regret is linear in this price: zero at price - regret / (row[best] - row[chosen]).
        step = float(row[best] - row[chosen])
        gap = float(regrets[best] - regrets[chosen])
        if step:
            factor = max(0.0, (price - gap / step) / price)
    return Exchange(
        solved.options.names[i], kinds[chosen], kinds[best], float(regrets[best]), factor
    )


def nearest_exchanges(solved: Solved, count: int) -> list[Exchange]:
    """The tensors whose choice was closest."""
    found = [nearest_exchange(solved, i) for i in range(len(solved.options.names))]
    return sorted((e for e in found if e), key=lambda e: e.regret)[:count]


def shares_by_role(solved: Solved, inventory: Inventory) -> list[RoleShare]:
    """What each role takes of the bytes and of the damage, most damage first."""
    rows: dict[str, list[tuple[str, int, float]]] = {}
    options = solved.options
    for i, name in enumerate(options.names):
        j = solved.solution.choice[i]
        role = inventory.by_name[name].role if name in inventory.by_name else "KV cache"
        rows.setdefault(role, []).append(
            (options.types[i][j], int(options.sizes[i][j]), float(options.damages[i][j]))
        )
    shares = [
        RoleShare(
            role,
            len(found),
            sum(size for _, size, _ in found),
            sum(damage for *_, damage in found),
            sorted({kind for kind, *_ in found}),
        )
        for role, found in rows.items()
    ]
    return sorted(shares, key=lambda share: -share.kld_nats)


def _regrets(solved: Solved, i: int) -> Doubles:
    """Objective + prices x costs of a tensor's options, above the least of them."""
    total = solved.costs[i] + sum(
        (
            price * limit.costs[i]
            for limit, price in zip(solved.limits, solved.solution.prices, strict=True)
        ),
        start=np.zeros(len(solved.costs[i])),
    )
    regrets: Doubles = total - total.min()
    return regrets
