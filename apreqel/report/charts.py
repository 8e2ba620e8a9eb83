"""The plots: Vega-Lite specifications of the facts, drawn as SVG by vl-convert.

SVG that is drawn here needs no script in the page. Colours are CSS variables, so that light and
dark are the page's matter; what tells things apart is shape or place as well as colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apreqel.device.memory import MemoryUse
from apreqel.report.facts import (
    Kernels,
    MeasuredOnCheck,
    PlanParts,
    PredictedFile,
    TensorFacts,
    Verified,
)

Spec = dict[str, Any]
# The specification of a plot at a width.
Plotter = Callable[[int], Spec]

# Inner widths in pixels at which each plot is drawn: of a phone of 360, and of a desk.
NARROW, WIDE, HALF = 328, 980, 470

# A font that vl-convert brings itself: the same bytes on every machine.
_FONT = "Roboto, system-ui, sans-serif"
_INK = {"labelColor": "var(--ink)", "titleColor": "var(--ink)"}
_CONFIG: Spec = {
    "background": None,
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        **_INK,
        "gridColor": "var(--grid)",
        "domainColor": "var(--muted)",
        "tickColor": "var(--muted)",
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "text": {"fontSize": 10},
}

WHOSE = {"apreqel": "ours", "stock preset": "stock", "one type": "uniform", "other": "other"}
# Forms in a plot, and in the words around it.
_HOW = {
    "predicted": ("circle", "○"),
    "measured on check text": ("square", "■"),
    "measured": ("square", "■"),
    "verified on held-out text": ("diamond", "◆"),
}
_LINES = ("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"), ("cross", "✚")
_KINDS = {
    **dict.fromkeys(("plan", "ours", "closest", "fast"), "apreqel"),
    "stock": "stock preset",
    "uniform": "one type",
}
# Cividis (Nuñez et al. 2018): in order also for the colour-blind, and in grey.
_CIVIDIS = (
    "#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369",
    "#e1cc55", "#fee838",
)  # fmt: skip
_DARK_STEPS = 5  # of these need white letters
# No two look alike to the colour-blind (Okabe & Ito 2008), in light and dark of the page.
_SERIES = ("ours", "stock", "uniform", "other", "fifth")
_CELL = 26  # pixels that a type's name needs
_LANDSCAPE_LAYERS = 36
_PART_SHOWN = 0.75  # of the tokens: how near the nearest ones are is in the table
_FLOOR_NATS = 1e-9  # logarithms need more than zero


@dataclass(frozen=True)
class Key:
    """What a colour or a form stands for. `colour` is one of CSS."""

    form: str
    colour: str
    name: str


@dataclass(frozen=True)
class Drawing:
    """A specification for each width, and the keys to read it by."""

    spec: Plotter
    keys: Sequence[Key] = ()


@dataclass(frozen=True)
class Plot:
    """What is drawn, with what is read out in its place."""

    title: str
    description: str
    drawing: Drawing
    width: int = WIDE


def drawn(spec: Spec) -> str:
    """The plot as SVG. Texts in it are escaped."""
    import vl_convert

    return str(vl_convert.vegalite_to_svg(spec, allowed_base_urls=[], show_warnings=False))


def _chart(width: int, height: int, **rest: Any) -> Spec:
    # The axes' labels are part of the width that is given.
    size = {"width": width, "height": height, "autosize": {"type": "fit", "contains": "padding"}}
    # Browsers without the font may take a wider one.
    padding = {"left": 14, "right": 6, "top": 4, "bottom": 2}
    return {**size, "padding": padding, "config": _CONFIG, **rest}


def _palette(domain: Sequence[str], names: Sequence[str]) -> Spec:
    """Colours without a legend: keys stand in the page, where there is room for them."""
    colours = [f"var(--{name})" for name in names]
    return {"scale": {"domain": list(domain), "range": colours}, "legend": None}


def _keys(domain: Sequence[str], names: Sequence[str], forms: Sequence[str] = "■■■■■") -> list[Key]:
    rows = zip(domain, names, forms, strict=False)
    return [Key(form, f"var(--{name})", label) for label, name, form in rows]


def _q(field: str, title: str, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, **more}


# --- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """A file in a plot over size: value and interval, whose it is, how it is known."""

    label: str
    whose: str
    how: str
    size_bytes: int
    value: float
    low: float
    high: float
    text: str  # what is shown of it under the pointer,
    name: str = ""  # and beside it

    @property
    def row(self) -> dict[str, Any]:
        facts = {"whose": self.whose, "how": self.how, "text": self.text, "name": self.name}
        place = {"mb": self.size_bytes / 1e6, "value": self.value}
        return {**facts, **place, "low": self.low, "high": self.high}


def whose(kind: str) -> str:
    return _KINDS.get(kind, "other")


def over_size(
    dots: Sequence[Dot], line: Sequence[Dot], title: str, *, is_logarithmic: bool
) -> Drawing:
    """Files by size, their values with intervals; `line` joins those of the front."""
    kind: Spec = {"type": "log"} if is_logarithmic else {"zero": False}
    scale: Spec = {**kind, "nice": False, "padding": 10}
    shown = sorted({d.whose for d in dots}, key=list(WHOSE).index)
    ways = sorted({d.how for d in dots}, key=list(_HOW).index)

    named = sorted((d for d in dots if d.name), key=lambda d: d.size_bytes)
    # Sizes of presets come in pairs, S and M; the last has no room to its right.
    plan = [d for d in named if d.whose == "apreqel"]
    presets = [d for d in named if d not in plan]
    left = [d for d in presets if d.name.endswith("_S") or d is presets[-1]]
    right = [d for d in presets if d not in left]
    beside = ("right", -8, -7, left), ("left", 8, -7, right), ("left", 7, 13, plan)
    keys = _keys(shown, [WHOSE[w] for w in shown], "■■■■")
    keys += [Key(_HOW[way][1], "var(--ink)", way) for way in ways]

    def spec(width: int) -> Spec:
        axis = {"tickCount": width // 80}
        place = {"zero": False, "nice": False, "padding": 16}
        x = _q("mb", "file size, MB", scale=place, axis=axis)
        y = _q("value", title, scale=scale)
        colour = {"field": "whose", **_palette(shown, [WHOSE[w] for w in shown])}
        forms = {"domain": ways, "range": [_HOW[w][0] for w in ways]}
        shape = {"field": "how", "scale": forms, "legend": None}
        layers: list[Spec] = []
        if line:
            front = {"type": "line", "strokeWidth": 1.5, "aria": False, "color": "var(--ours)"}
            data = {"values": [d.row for d in line]}
            layers.append({"data": data, "mark": front, "encoding": {"x": x, "y": y}})
        bars = {"y": _q("low", title, scale=scale), "y2": {"field": "high"}, "color": colour}
        rule = {"type": "rule", "strokeWidth": 1.5, "opacity": 0.5, "aria": False}
        layers.append({"mark": rule, "encoding": {"x": x, **bars}})
        # Hollow where predicted.
        hollow = {"test": "datum.how === 'predicted'", "value": "var(--paper)"}
        marks = {"stroke": colour, "fill": {**colour, "condition": hollow}, "shape": shape,
                 "description": {"field": "text"}}  # fmt: skip
        point = {"type": "point", "filled": True, "strokeWidth": 1.5, "size": 60, "opacity": 1}
        layers.append({"mark": point, "encoding": {"x": x, "y": y, **marks}})
        for side, across, down, some in beside:
            mark = {"type": "text", "align": side, "dx": across, "dy": down, "aria": False}
            names = {"x": x, "y": y, "text": {"field": "name"}, "color": colour}
            data = {"values": [d.row for d in some]}
            layers.append({"data": data, "mark": mark, "encoding": names})
        height = 300 if width <= NARROW else 350
        return _chart(width, height, data={"values": [d.row for d in dots]}, layer=layers)

    return Drawing(spec, keys)


def predicted_dot(file: PredictedFile, text: str) -> Dot:
    place = file.size_bytes, file.nats, *file.interval
    return Dot(file.label, whose(file.kind), "predicted", *place, text, name_of(file))


def name_of(file: PredictedFile) -> str:
    """What is written beside it."""
    return file.label if file.kind in ("stock", "plan") else ""


def checked_dot(file: MeasuredOnCheck, text: str) -> Dot:
    low, high = file.kld.interval
    place = file.size_bytes, file.kld.mean, max(low, least(file.kld.mean)), high
    return Dot(file.label, whose(file.kind), "measured on check text", *place, text)


def least(value: float) -> float:
    """Where an interval reaches zero, its end on a logarithmic axis."""
    return max(value / 10, _FLOOR_NATS)


# --- the map -------------------------------------------------------------------------------------


def colours_of(types: Mapping[str, float]) -> dict[str, tuple[str, str]]:
    """(fill, letters) by type, from few to many bits; `types` are bits per weight by name."""
    names = sorted(types, key=lambda name: (types[name], name))
    found = {}
    for i, name in enumerate(names):
        step = round((len(_CIVIDIS) - 1) * (i / max(1, len(names) - 1)))
        found[name] = _CIVIDIS[step], "#fff" if step < _DARK_STEPS else "#000"
    return found


def tensor_map(parts: PlanParts, text: Callable[[TensorFacts], str]) -> Drawing:
    """Layers by roles, coloured and lettered by type."""
    colours = colours_of({t.type_name: t.bits_per_weight for t in parts.tensors})
    layers = sorted({t.layer for t in parts.tensors if t.layer is not None})
    order = ["-", *map(str, layers)]
    roles = list(dict.fromkeys(t.role for t in parts.tensors))
    rows = [
        {
            "layer": "-" if t.layer is None else str(t.layer),
            "role": t.role,
            "type": t.type_name,
            "ink": colours[t.type_name][1],
            "text": text(t),
        }
        for t in parts.tensors
    ]
    outside = any(t.layer is None for t in parts.tensors)
    order = order if outside else order[1:]

    def spec(width: int) -> Spec:
        is_wide = width > NARROW and len(layers) <= _LANDSCAPE_LAYERS
        down, across = (roles, order) if is_wide else (order, roles)
        along: Spec = {"field": "layer", "title": "layer", "sort": order}
        by_role: Spec = {"field": "role", "title": None, "sort": roles}
        x, y = (along, by_role) if is_wide else (by_role, along)
        x = {**x, "type": "nominal", "axis": {"orient": "top", "labelAngle": 0 if is_wide else -90}}
        y = {**y, "type": "nominal", "axis": {}}
        scale = {"domain": list(colours), "range": [fill for fill, _ in colours.values()]}
        colour = {"field": "type", "type": "nominal", "scale": scale, "legend": None}
        cells = {"mark": {"type": "rect", "stroke": "var(--paper)"},
                 "encoding": {"color": colour, "description": {"field": "text"}}}  # fmt: skip
        marks: list[Spec] = [cells]
        if (width - 110) / max(1, len(across)) >= _CELL:
            ink = {"field": "ink", "type": "nominal", "scale": None}
            letters = {"text": {"field": "type"}, "color": ink}
            marks.append({"mark": {"type": "text", "fontSize": 9, "aria": False},
                          "encoding": letters})  # fmt: skip
        height = 90 + len(down) * (26 if is_wide else 17)
        encoding = {"x": x, "y": y}
        return _chart(width, height, data={"values": rows}, layer=marks, encoding=encoding)

    return Drawing(spec, [Key("■", fill, name) for name, (fill, _) in colours.items()])


# --- shares, tails, kernels, memory --------------------------------------------------------------


def shares(rows: Sequence[tuple[str, str, float, str]]) -> Drawing:
    """(role, measure, part of all, text): bars side by side."""
    values = [dict(zip(("role", "of", "part", "text"), row, strict=True)) for row in rows]
    roles = list(dict.fromkeys(row[0] for row in rows))
    measures = list(dict.fromkeys(row[1] for row in rows))

    def spec(width: int) -> Spec:
        y = {"field": "role", "type": "nominal", "title": None, "sort": roles}
        offset = {"field": "of", "sort": measures}
        x = _q("part", "part of all", axis={"format": ".0%", "tickCount": 4}, scale={"nice": False})
        colour = {"field": "of", **_palette(measures, _SERIES)}
        encoding = {"x": x, "y": y, "yOffset": offset, "color": colour,
                    "description": {"field": "text"}}  # fmt: skip
        height = 50 + len(roles) * (12 * len(measures) + 6)
        return _chart(width, height, data={"values": values}, mark="bar", encoding=encoding)

    return Drawing(spec, _keys(measures, _SERIES))


def tails(found: Verified, parts: Sequence[float]) -> Drawing:
    """Each file's divergence against the part of the tokens that are farther off."""
    files = [file.label for file in found.quantised]
    values = [
        {
            "file": file.label,
            "farther": 1 - part,
            "nats": max(nats, _FLOOR_NATS),
            "text": f"{file.label}: {1 - part:.1%} of the tokens are farther than {nats:.3g} nats",
        }
        for file in found.quantised
        for part, nats in zip(parts, file.kld_quantiles, strict=True)
        if 1 - part <= _PART_SHOWN
    ]
    names = [_SERIES[i % len(_SERIES)] for i in range(len(files))]
    forms = [_LINES[i % len(_LINES)] for i in range(len(files))]

    def spec(width: int) -> Spec:
        ticks = [0.5, 0.1, 0.05, 0.01, 0.001]
        axis = {"values": ticks, "format": "~%", "grid": True}
        scale = {"type": "log", "domain": [_PART_SHOWN + 0.05, 0.0009]}
        x = _q("farther", "tokens that are farther off", axis=axis, scale=scale)
        y = _q("nats", "KL divergence, nats", scale={"type": "log"})
        colour = {"field": "file", **_palette(files, names)}
        shape = {"field": "file", "legend": None,
                 "scale": {"domain": files, "range": [f for f, _ in forms]}}  # fmt: skip
        line = {"mark": {"type": "line", "aria": False}, "encoding": {"color": colour}}
        point = {"type": "point", "filled": True, "size": 50, "opacity": 1}
        marks = {"color": colour, "shape": shape, "description": {"field": "text"}}
        encoding = {"x": x, "y": y}
        layer = [line, {"mark": point, "encoding": marks}]
        return _chart(width, 300, data={"values": values}, layer=layer, encoding=encoding)

    return Drawing(spec, _keys(files, names, [sign for _, sign in forms]))


def kernels(found: Kernels, decode: bool, text: Callable[[int], str]) -> Drawing:
    """Tokens/s of the whole model in each type, with intervals; dominated types are pale."""
    values = []
    for i, kernel in enumerate(found.types):
        speed = kernel.speed.decode if decode else kernel.speed.prefill
        values.append(
            {
                "type": f"{kernel.type_name} ({kernel.bits_per_weight:.2f})",
                "value": speed.value,
                "low": speed.low,
                "high": speed.high,
                "pale": 0.25 if kernel.dominated_by else 0.65,
                "text": text(i),
            }
        )

    def spec(width: int) -> Spec:
        y = {"field": "type", "type": "nominal", "title": None, "sort": None}
        what = "decode" if decode else "prefill"
        x = _q("value", f"{what}, tokens/s", axis={"tickCount": 5}, scale={"nice": False})
        opacity = {"field": "pale", "type": "quantitative", "scale": None, "legend": None}
        bar = {"x": x, "opacity": opacity, "description": {"field": "text"}}
        rule = {"x": {**x, "field": "low"}, "x2": {"field": "high"}}
        line = {"type": "rule", "opacity": 0.7, "aria": False}
        layer = [
            {"mark": {"type": "bar", "color": "var(--ours)"}, "encoding": bar},
            {"mark": {**line, "color": "var(--ink)"}, "encoding": rule},
        ]
        height = 60 + 18 * len(values)
        return _chart(width, height, data={"values": values}, layer=layer, encoding={"y": y})

    return Drawing(spec)


MEMORY_PARTS = ("the file", "repacked copies", "KV cache", "buffers")


def memory_parts(use: MemoryUse) -> tuple[int, int, int, int]:
    """Bytes in the order of `MEMORY_PARTS`."""
    return use.file_bytes, use.copied_bytes, use.kv_bytes, use.rest_bytes


def memory(uses: Sequence[MemoryUse]) -> Drawing:
    """What a run takes with its whole context filled, by context."""
    values = [
        {
            "context": f"{use.n_ctx:,}",
            "part": part,
            "order": i,
            "mb": n_bytes / 1e6,
            "text": f"context of {use.n_ctx:,} tokens: {part} {n_bytes / 1e6:.1f} MB of "
            f"{use.total_bytes / 1e6:.1f} MB",
        }
        for use in uses
        for i, (part, n_bytes) in enumerate(zip(MEMORY_PARTS, memory_parts(use), strict=True))
    ]

    def spec(width: int) -> Spec:
        axis = {"labelAngle": -45 if width <= NARROW else 0}
        x = {"field": "context", "type": "nominal", "title": "tokens of context", "sort": None,
             "axis": axis}  # fmt: skip
        y = _q("mb", "memory, MB")
        colour = {"field": "part", **_palette(MEMORY_PARTS, _SERIES)}
        encoding = {"x": x, "y": y, "color": colour, "order": {"field": "order"},
                    "description": {"field": "text"}}  # fmt: skip
        return _chart(width, 300, data={"values": values}, mark="bar", encoding=encoding)

    return Drawing(spec, _keys(MEMORY_PARTS, _SERIES))
