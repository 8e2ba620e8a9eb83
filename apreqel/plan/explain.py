"""Why a tensor got its type: what each type would cost it, at the prices that the limits set.

At the optimum of the relaxed problem a limit has a price (what the objective falls by when it is
eased by one), and every tensor takes the type of least objective + prices x costs. How much dearer
the next type is, and at which price it would win, is the explanation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apreqel.arrays import Doubles
from apreqel.errors import UsageError, printable
from apreqel.model.inventory import Inventory
from apreqel.plan.cache_types import CACHES
from apreqel.plan.options import Options
from apreqel.plan.solve import Solved
from apreqel.sensitivity.damage import Damage
from apreqel.solver.knapsack import priced


@dataclass(frozen=True)
class OptionPrice:
    """One type for one tensor. `regret` is how much dearer than the least, in the plan's unit."""

    type_name: str
    is_chosen: bool
    size_bytes: int
    damage_nats: float
    interval: tuple[float, float]  # of the damage, 95%
    is_probed: bool  # the damage was measured itself, not predicted
    decode_seconds: float | None
    prefill_seconds: float | None
    regret: float


@dataclass(frozen=True)
class NextType:
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
    damage_nats: float
    decode_seconds: float | None  # per token; None without timings
    prefill_seconds: float | None
    types: Sequence[str]


def explain_tensor(solved: Solved, name: str) -> list[OptionPrice]:
    """Every type that the tensor could have, smallest first. Raises UsageError."""
    options, timings = solved.options, solved.options.timings
    if name not in options.names:
        like = ", ".join([n for n in options.names if name in n][:5])
        hint = f"; did you mean {like}?" if like else ""
        raise UsageError(f"tensor {printable(name)}: is not in the plan{hint}")
    i = list(options.names).index(name)
    regrets = _regrets(solved, i)
    known = options.damage.table(name) if name in options.damage.tensors else {}

    def price(j: int, type_name: str) -> OptionPrice:
        nats = float(options.damages[i][j])
        # Its own type, or a cache's, is sure.
        damage = known.get(type_name, Damage(nats, 0.0, True))
        return OptionPrice(
            type_name,
            j == solved.solution.choice[i],
            int(options.sizes[i][j]),
            nats,
            damage.interval,
            damage.is_probed,
            float(timings.decode[i][j]) if timings else None,
            float(timings.prefill[i][j]) if timings else None,
            float(regrets[j]),
        )

    prices = [price(j, t) for j, t in enumerate(options.types[i])]
    return sorted(prices, key=lambda price: (price.size_bytes, price.type_name))


def next_type(solved: Solved, i: int) -> NextType | None:
    """The type that a tensor would take next as limits change; None where it has no other."""
    types, chosen = solved.options.types[i], solved.solution.choice[i]
    if len(types) == 1:
        return None
    regrets = _regrets(solved, i)
    best = min((j for j in range(len(types)) if j != chosen), key=lambda j: regrets[j])
    regret, factor = float(regrets[best]), None
    pairs = zip(solved.solution.prices, solved.limits, strict=True)
    binding = [(price, limit) for price, limit in pairs if price > 0]
    if binding:
        price, limit = max(binding, key=lambda pair: pair[0] * pair[1].one_more[0])
        # Regret is linear in this price: zero at price - regret / (cost of best - of chosen).
        step = float(limit.costs[i][best] - limit.costs[i][chosen])
        if step:
            factor = max(0.0, (price - (regret - float(regrets[chosen])) / step) / price)
    return NextType(solved.options.names[i], types[chosen], types[best], regret, factor)


def closest_choices(solved: Solved, count: int) -> list[NextType]:
    """The tensors whose choice was closest."""
    found = [next_type(solved, i) for i in range(len(solved.options.names))]
    return sorted((e for e in found if e), key=lambda e: e.regret)[:count]


def shares_by_role(
    options: Options, choice: Sequence[int], inventory: Inventory
) -> list[RoleShare]:
    """What each role takes of the bytes, the damage and the seconds, most damage first."""
    by_role = dict[str, list[tuple[int, int]]]()
    for i, (name, j) in enumerate(zip(options.names, choice, strict=True)):
        role = inventory.by_name[name].role if name in inventory.by_name else CACHES
        by_role.setdefault(role, []).append((i, j))

    def taken(rows: Sequence[Doubles], found: Sequence[tuple[int, int]]) -> float:
        return sum(float(rows[i][j]) for i, j in found)

    timings = options.timings
    shares = [
        RoleShare(
            role,
            len(found),
            int(taken(options.sizes, found)),
            taken(options.damages, found),
            taken(timings.decode, found) if timings else None,
            taken(timings.prefill, found) if timings else None,
            sorted({options.types[i][j] for i, j in found}),
        )
        for role, found in by_role.items()
    ]
    return sorted(shares, key=lambda share: -share.damage_nats)


def _regrets(solved: Solved, i: int) -> Doubles:
    """Objective + prices x costs of a tensor's options, above the least of them."""
    cost = priced(i, solved.costs, solved.limits, solved.solution)
    regrets: Doubles = cost - cost.min()
    return regrets
