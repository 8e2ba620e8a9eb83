"""`apreqel explain`: what each role takes, which choices were close, one tensor in every type."""

from __future__ import annotations

from collections.abc import Sequence

from apreqel.console.plan import show_binding
from apreqel.console.probe import DAMAGE
from apreqel.console.terminal import size, span, table, write
from apreqel.plan.explain import NextType, OptionPrice, RoleShare
from apreqel.plan.plan import Plan


def show(shares: Sequence[RoleShare], closest: Sequence[NextType], plan: Plan) -> None:
    """What each role takes, which limits bind, and which choices were close."""
    total = sum(share.damage_nats for share in shares) or 1.0
    rows = (_share_cells(share, total) for share in shares)
    columns = "role", "tensors", "size", "damage, nats", "of all", "decode us", "prefill us"
    write(table(*columns, "types", rows=rows))
    write(DAMAGE[plan.metric])
    show_binding(plan)
    choices = map(_choice_cells, closest)
    write(table("closest choices", "has", "next", "dearer by", "changes at", rows=choices))
    write("apreqel explain PLAN TENSOR shows one tensor in every type.")


def _share_cells(share: RoleShare, total: float) -> Sequence[str]:
    damage = f"{share.damage_nats:.5f}", f"{share.damage_nats / total:.0%}"
    seconds = share.decode_seconds, share.prefill_seconds
    times = ["-" if s is None else f"{1e6 * s:.1f}" for s in seconds]
    kinds = ", ".join(share.types)
    return share.role, str(share.n_tensors), size(share.size_bytes), *damage, *times, kinds


def _choice_cells(e: NextType) -> Sequence[str]:
    at = "-" if e.at_price is None else f"{e.at_price:.2f} x the price"
    return e.tensor, e.chosen, e.other, f"{e.regret:.2e}", at


def _price_cells(price: OptionPrice) -> Sequence[str]:
    mark, unsure = "> " if price.is_chosen else "  ", "" if price.is_probed else " (not probed)"
    seconds = (price.decode_seconds, 1), (price.prefill_seconds, 2)
    return (
        mark + price.type_name,
        f"{price.size_bytes:,}",
        f"{price.damage_nats:.6f}",
        span(price.interval, 6) + unsure,
        *("-" if s is None else f"{1e6 * s:.{digits}f}" for s, digits in seconds),
        f"{price.regret:.2e}",
    )


def show_tensor(prices: Sequence[OptionPrice], following: NextType | None, plan: Plan) -> None:
    """One tensor in every type, and when it would change."""
    columns = "type", "bytes", "damage, nats", "95% interval", "decode us", "prefill us", "dearer"
    write(table(*columns, rows=map(_price_cells, prices)))
    write(DAMAGE[plan.metric])
    show_binding(plan)
    if following and following.at_price is not None:
        write(
            f"{following.tensor} would change from {following.chosen} to {following.other} at "
            f"{following.at_price:.2f} times that price"
        )
