"""What a plan and a device are made of, in a report: tensors, roles, quant types, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from apreqel.device.memory import MemoryUse
from apreqel.report import charts
from apreqel.report.charts import HALF, Plot
from apreqel.report.facts import Kernels, Missing, ModelReport, PlanParts, TensorFacts
from apreqel.report.sections import Section, Table, between, number, ranged


def parts(found: PlanParts | Missing) -> Iterator[Section]:
    titles = "The map of types", "Where bytes, damage and seconds go"
    if isinstance(found, Missing):
        for title in titles:
            yield Section(title, missing=[found])
        return
    doubt = (
        []
        if found.is_of_plan
        else [
            "What the plan was chosen from was measured anew since, or is gone: damages here are "
            "as they are known now. apreqel plan makes a plan from these."
        ]
    )
    text = (
        "Each tensor that may be quantised, in the type that the plan gives it. Damage: how far "
        "the model's predictions move where this tensor alone is in that type, in nats per token, "
        "with its interval of 95%."
    )
    plot = Plot(
        "Types by layer and role",
        f"{len(found.tensors)} tensors by layer and role, coloured by quant type from few bits "
        "(dark) to many (bright). The table below has each with its type, bytes and damage.",
        charts.tensor_map(found, _tensor_text),
    )
    yield Section(titles[0], [text, *doubt], [plot], [_tensor_table(found.tensors)])
    yield _shares(titles[1], found, doubt)


def _tensor_text(t: TensorFacts) -> str:
    return (
        f"{t.name}: {t.type_name} ({t.bits_per_weight:.2f} bits), {t.size_bytes:,} bytes, damage "
        f"{number(t.damage_nats)} nats ({between(t.interval)}), "
        f"{'probed' if t.is_probed else 'predicted'}"
    )


def _tensor_table(tensors: Sequence[TensorFacts]) -> Table:
    rows = [
        (
            t.name,
            t.type_name,
            f"{t.bits_per_weight:.2f}",
            f"{t.size_bytes:,}",
            number(t.damage_nats),
            between(t.interval),
            "probed" if t.is_probed else "predicted",
        )
        for t in tensors
    ]
    columns = "tensor", "type", "bits", "bytes", "damage, nats", "95%", "how known"
    return Table("Tensors", columns, rows)


def _shares(title: str, parts: PlanParts, doubt: Sequence[str]) -> Section:
    found = parts.shares
    measures: dict[str, list[float | None]] = {
        "bytes": [float(s.size_bytes) for s in found],
        "damage": [s.damage_nats for s in found],
        "decode seconds": [s.decode_seconds for s in found],
        "prefill seconds": [s.prefill_seconds for s in found],
    }
    rows, bars = [], []
    for i, share in enumerate(found):
        cells = [share.role, str(share.n_tensors), f"{share.size_bytes:,}"]
        cells += [number(share.damage_nats)]
        for name, values in measures.items():
            known = [v for v in values if v is not None]
            value = values[i]
            if value is None:
                cells += ["-"] if "seconds" in name else []
                continue
            part = value / (sum(known) or 1.0)
            bars.append((share.role, name, part, f"{share.role}: {part:.1%} of the {name}"))
            cells += [f"{1e6 * value:.4g}"] if "seconds" in name else []
        rows.append((*cells, ", ".join(share.types)))
    columns = (
        *("role", "tensors", "bytes", "damage, nats", "decode, µs a token"),
        *("prefill, µs a token", "types"),
    )
    plot = Plot(
        "Parts by role",
        f"For each of {len(found)} roles its part of the plan's bytes, damage, and seconds in "
        "decode and in prefill, as bars. The table below has the values.",
        charts.shares(bars),
    )
    text = [
        "By role, as parts of all tensors that may be quantised. Seconds are those of their "
        "products, as predicted; what else a token takes does not depend on types."
    ]
    if not any(s.decode_seconds is not None for s in found):
        text.append("Seconds are not known without a device profile.")
    return Section(title, [*text, *doubt], [plot], [Table("By role", columns, rows)])


# --- the device ----------------------------------------------------------------------------------


def kernels(found: Kernels | Missing) -> Section:
    title = "Quant types on this device"
    if isinstance(found, Missing):
        return Section(title, missing=[found])

    def described(i: int) -> str:
        k = found.types[i]
        beaten = f"; dominated by {k.dominated_by}" if k.dominated_by else ""
        return (
            f"{k.type_name}: decode {ranged(k.speed.decode)}, prefill {ranged(k.speed.prefill)} "
            f"tokens/s{beaten}"
        )

    plots = [
        Plot(
            f"{name.capitalize()} speed by type",
            f"Tokens per second in {name} with the whole model in each of {len(found.types)} quant "
            "types, from few bits to many, with 95% intervals. Dominated types are pale.",
            charts.kernels(found, name == "decode", described),
            HALF,
        )
        for name in ("decode", "prefill")
    ]
    rows = [
        (
            k.type_name,
            f"{k.bits_per_weight:.2f}",
            ranged(k.speed.decode),
            ranged(k.speed.prefill),
            f"{number(k.nats)} ({between(k.interval)})"
            if k.nats is not None and k.interval
            else "-",
            k.dominated_by or "",
            f"{k.share:.0%}",
            "varies by more than 3%" if k.is_unsteady else "",
        )
        for k in found.types
    ]
    columns = (
        *("type", "bits", "decode t/s (95%)", "prefill t/s (95%)", "KLD, nats (95%)"),
        *("dominated by", "weights it holds", "readings"),
    )
    closeness = (
        "predicted KL divergence of the whole model in it"
        if found.is_by_damage
        else "error of normally distributed weights"
    )
    text = [
        "The whole model in one type, as the profile predicts it: an empty context, prompts of "
        f"{found.n_prompt} tokens, where rows do not fit a type the nearest one. Products were "
        f"timed at least {found.n_readings} times each.",
        "A type is dominated, and drawn pale, where another one is at least as close to the "
        f"original (by the {closeness}), as small and as fast. Only types that hold all weights "
        "are compared.",
    ]
    beaten = [f"{k.type_name} by {k.dominated_by}" for k in found.types if k.dominated_by]
    text.append(f"Dominated: {', '.join(beaten)}." if beaten else "None is dominated.")
    return Section(title, text, plots, [Table("By type", columns, rows)])


def memory(report: ModelReport) -> Section:
    title, found = "Memory by context", report.memory
    if isinstance(found, Missing):
        return Section(title, missing=[found])
    plot = Plot(
        "Memory of a run",
        f"Memory in MB of a run of the planned file for {len(found)} lengths of context, stacked "
        "from the file, repacked copies, KV cache and buffers. The table below has the values.",
        charts.memory(found),
    )
    text = [
        "What a run of the planned file takes with its whole context filled, as predicted, the KV "
        f"cache in {'/'.join(report.cache_types)}. With --no-mmap repacked copies are not held "
        "beside the file."
    ]
    return Section(title, text, [plot], [_memory_table(found)])


def _memory_table(uses: Sequence[MemoryUse]) -> Table:
    rows = [
        (
            f"{use.n_ctx:,}",
            *(f"{n:,}" for n in charts.memory_parts(use)),
            f"{use.total_bytes:,}",
            f"{use.without_map_bytes:,}",
        )
        for use in uses
    ]
    columns = "context", *charts.MEMORY_PARTS, "in all", "with --no-mmap"
    return Table("Bytes by context", columns, rows)
