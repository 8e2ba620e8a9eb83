"""`apreqel explain`: what each role takes, which choices were close, one tensor in every type."""

from __future__ import annotations

from collections.abc import Sequence

from apreqel.console.plan import show_binding
from apreqel.console.probe import DAMAGE
from apreqel.console.terminal import size, table, write
from apreqel.plan.explain import NextType, OptionPrice, RoleShare
from apreqel.plan.plan import Plan


def show(shares: Sequence[RoleShare], closest: Sequence[NextType], plan: Plan) -> None:
    """What each role takes, which limits bind, and which choices were close."""
    rows = table("role", "tensors", "size", "damage, nats", "of all", "types")
    total = sum(share.damage_nats for share in shares) or 1.0
    for share in shares:
        rows.add_row(
            share.role,
            str(share.n_tensors),
            size(share.size_bytes),
            f"{share.damage_nats:.5f}",
            f"{share.damage_nats / total:.0%}",
            ", ".join(share.types),
        )
    write(rows)
    write(DAMAGE[plan.metric])
    show_binding(plan)
    rows = table("closest choices", "has", "next", "dearer by", "changes at")
    for e in closest:
        at = f"{e.at_price:.2f} x the price" if e.at_price is not None else "-"
        rows.add_row(e.tensor, e.chosen, e.other, f"{e.regret:.2e}", at)
    write(rows)
    write("apreqel explain PLAN TENSOR shows one tensor in every type.")


def show_tensor(prices: Sequence[OptionPrice], following: NextType | None, plan: Plan) -> None:
    """One tensor in every type, and when it would change."""
    rows = table(
        "type", "bytes", "damage, nats", "95% interval", "decode us", "prefill us", "dearer"
    )
    for price in prices:
        low, high = price.interval
        measured = f"{low:.6f} to {high:.6f}{'' if price.is_probed else ' (not probed)'}"
        rows.add_row(
            ("> " if price.is_chosen else "  ") + price.type_name,
            f"{price.size_bytes:,}",
            f"{price.damage_nats:.6f}",
            measured,
            f"{1e6 * price.decode_seconds:.1f}" if price.decode_seconds is not None else "-",
            f"{1e6 * price.prefill_seconds:.2f}" if price.prefill_seconds is not None else "-",
            f"{price.regret:.2e}",
        )
    write(rows)
    write(DAMAGE[plan.metric])
    show_binding(plan)
    if following and following.at_price is not None:
        write(
            f"{following.tensor} would change from {following.chosen} to {following.other} at "
            f"{following.at_price:.2f} times that price"
        )
