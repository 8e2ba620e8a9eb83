"""Equalising: channels rescaled so that they round better, in a model of exactly the same function.

What a norm, or the rows of a matrix, put out can be divided by s, channel by channel, and the
columns of what reads it multiplied by s (SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978).
Kernels round activations in blocks with one scale, and weights likewise; both lose less where a
block's channels are alike. The exponents of s are chosen site by site by what readers' outputs lose
on a text, weights and activations rounded together, in types of about 4.5 and 6.5 bits. The file is
an ordinary GGUF, and is measured against the original before it is kept.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from apreqel.arrays import Doubles, Floats, Reals, Tokens, Whole
from apreqel.artifacts import Provenance, Record, model_sha256, require_space, write_atomically
from apreqel.errors import EngineError, OutputError
from apreqel.llama.engine import LoadedModel
from apreqel.llama.quants import fake_quantize
from apreqel.model.gguf_header import STRING, encode_kv
from apreqel.model.imatrix import Imatrix
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.model.qtypes import QuantType, lookup, nearest
from apreqel.quantize import quantize_model
from apreqel.sensitivity.bench import (
    ReferenceRun,
    compared,
    context_for,
    evaluated,
    float_rows,
    read_weights,
)
from apreqel.sensitivity.measurement import SENSITIVITY_FILE
from apreqel.sensitivity.metrics import Reference
from apreqel.sensitivity.output_errors import (
    bias_weight,
    candidate_types,
    rounded,
    sample,
    squared_errors,
)
from apreqel.sensitivity.texts import TokenSet, bundled_texts, split_for_calibration
from apreqel.workspace import EQUALISED_FOLDER, HASH_FILE, Workspace, sweep

# s = (root mean square of the activations)^a / (of the weights' columns)^b.
_EXPONENTS = ((0.15, 0.25), (0.25, 0.25), (0.25, 0.5), (0.35, 0.25), (0.5, 0.25), (0.5, 0.5))
_BITS = 4.5, 6.5
# A site is left as it is where less than this part of the error would go.
_LEAST_GAIN = 0.02
_ROWS, _TOKENS = 48, 384
# Tokens at the start of a context, whose activations are huge and like no others.
_FIRST_TOKENS = 8
_LARGEST = 64.0
# What a model may differ from itself rewritten, in nats: on average, and at any position.
MEAN_NATS, MOST_NATS = 1e-5, 1e-3
_WRONG = 1e9  # stands for NaN
_SCALES_FILE = "scales.npz"  # by writer, what its channels were divided by
# Raised whenever another file comes of the same model.
VERSION = 1

_NORMS = {"attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"}
_AFTER = {"post_attention_norm", "post_ffw_norm", "attn_sinks"}
_QKV = ("attn_q", "attn_k", "attn_v")
_READ_FFN = (
    "ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_shexp",
    "ffn_up_shexp", "ffn_gate_inp_shexp",
)  # fmt: skip
_DOWN = {"ffn_down", "ffn_down_exps", "ffn_down_shexp"}
_KNOWN = {*_NORMS, *_AFTER, *_QKV, *_READ_FFN, *_DOWN, "attn_output"}


@dataclass(frozen=True)
class Site:
    """Channels that `writer` puts out and `readers` take in as columns.

    A norm's weight, or a matrix whose rows are the channels, and the bias that goes with it.
    `channels` tells which one each column is: several heads read the same values.
    """

    writer: str
    readers: tuple[str, ...]
    channels: Whole
    bias: str | None = None


def sites(inventory: Inventory) -> list[Site]:
    """Of the layers whose wiring is known by the roles of their tensors; of others none."""
    found: list[Site] = []
    needed = ("attn_norm", "ffn_norm", "attn_output", *_QKV)
    for layer in range(inventory.n_layers):
        start = f"blk.{layer}."
        names = {t.name for t in inventory.tensors if t.name.startswith(start)}
        roles = {name.removeprefix(start).rpartition(".")[0] for name in names}
        if roles <= _KNOWN and names.issuperset(f"{start}{role}.weight" for role in needed):
            found += _sites_of(inventory, start, names)
    return [site for site in found if _can_be_written(inventory, site)]


def _can_be_written(inventory: Inventory, site: Site) -> bool:
    """What must stay in its type can be rescaled in F32 and F16 only; BF16 is too coarse."""
    tensors = [inventory.by_name[n] for n in (site.writer, site.bias, *site.readers) if n]
    stay = [t.qtype.name for t in tensors if t.keep_reason is not None]
    return bool(site.readers) and {"F32", "F16"}.issuperset(stay)


def _sites_of(inventory: Inventory, start: str, names: set[str]) -> Iterator[Site]:
    def site(writer: str, roles: Sequence[str], channels: Whole | None = None) -> Site:
        readers = [f"{start}{role}.weight" for role in roles]
        bias = f"{start}{writer}.bias"
        n = inventory.by_name[readers[0]].row_length if readers else 0
        return Site(
            f"{start}{writer}.weight",
            tuple(name for name in readers if name in names),
            np.arange(n) if channels is None else channels,
            bias if bias in names else None,
        )

    yield site("attn_norm", _QKV)
    yield site("ffn_norm", [r for r in _READ_FFN if f"{start}{r}.weight" in names])
    if {f"{start}ffn_{r}.weight" for r in ("gate", "up", "down")} <= names:
        yield site("ffn_up", ["ffn_down"])
    shape = inventory.head_shape
    values, outputs = (inventory.by_name[f"{start}attn_{r}.weight"] for r in ("v", "output"))
    if shape is not None:
        _, length, n_heads, n_kv_heads = shape
        if n_kv_heads * length == values.n_rows and n_heads * length == outputs.row_length:
            heads = np.arange(n_heads) // (n_heads // n_kv_heads)
            channels = (heads[:, None] * length + np.arange(length)).reshape(-1)
            yield site("attn_v", ["attn_output"], channels)


@dataclass(frozen=True)
class Equalised(Record):
    """What was rescaled of a model, and how far the file then differs from it, in nats."""

    KIND = "equalised"

    n_rescaled: int
    n_sites: int
    mean_nats: float
    most_nats: float
    file_sha256: str  # empty where none is kept: it differed too much, or nothing was gained

    @property
    def why_not(self) -> str:
        """Why there is no such file; empty where there is."""
        if self.file_sha256:
            return ""
        if not self.n_rescaled:
            return "rescaling gains nothing"
        return f"rewritten it differs from itself by {self.mean_nats:.2g} nats"


def why_not(inventory: Inventory) -> str:
    """Why a model is not to be equalised, as far as its header tells; else empty."""
    if inventory.headers[0].get("apreqel.equalised"):
        return "its channels are rescaled already"
    if inventory.is_quantized_source:
        return "it is quantised already"
    if not sites(inventory):
        return f"the layers of {inventory.architecture!r} are not wired in a way that is known"
    return ""


def probed_at(folder: Path, equalised: bool) -> float:
    """When a model, as it is or equalised, was last probed in its work folder; 0 for never."""
    with suppress(FileNotFoundError):
        return (folder / (EQUALISED_FOLDER if equalised else "") / SENSITIVITY_FILE).stat().st_mtime
    return 0.0


def equalised_model(space: Workspace) -> tuple[Path | None, str]:
    """The model with its channels rescaled, in its work folder; written where it is not there.

    Or None, and why. Raises OutputError where there is no room, and what `quantize_model` raises.
    """
    if reason := why_not(space.inventory):
        return None, reason
    folder, path, record = _places(space)
    if path.exists() and not (record.exists() or (folder / _SCALES_FILE).exists()):
        raise OutputError(f"{path}: is not apreqel's, and would be lost; use another --workdir")
    sweep(folder)  # what a run that was killed left
    # On another machine, or by another llama.cpp, the file stays good.
    facts, known = _facts(space), _kept_record(space)
    if known is None or (known.file_sha256 and kept_model(space) is None):
        path.unlink(missing_ok=True)
        known = _equalised(space, path, facts)
        known.save(record)
    return (None, known.why_not) if known.why_not else (path, "")


def kept_model(space: Workspace) -> Path | None:
    """The model with its channels rescaled, as it was written and checked; None for none."""
    (folder, path, _), known = _places(space), _kept_record(space)
    if known is None or not known.file_sha256 or not (folder / _SCALES_FILE).exists():
        return None
    return path if known.file_sha256 == _sha256(path) else None


def _kept_record(space: Workspace) -> Equalised | None:
    """What is known of the model with its channels rescaled. Raises ArtifactError."""
    return Equalised.load_same(_places(space)[2], _facts(space))


def _facts(space: Workspace) -> Provenance:
    return Provenance(space.sha256, settings={"version": VERSION})


def _places(space: Workspace) -> tuple[Path, Path, Path]:
    """The folder of the rescaled model, its file, and its record."""
    folder = space.folder / EQUALISED_FOLDER
    return folder, folder / space.model.name, folder / "equalised.json"


def _sha256(path: Path) -> str:
    return model_sha256((path,), path.parent / HASH_FILE) if path.exists() else ""


def imatrix_of_original(space: Workspace, imatrix: Imatrix) -> Imatrix:
    """The imatrix of the model as the user has it, from that of the rescaled one."""
    if space.original is None:
        return imatrix
    entries = dict(imatrix.entries)
    with np.load(space.folder / _SCALES_FILE) as scales:
        for site in sites(space.original):
            for name in site.readers if site.writer in scales else ():
                if name in entries:
                    squares = np.square(scales[site.writer][site.channels])
                    sums = (entries[name].sums * squares).astype(np.float32)
                    entries[name] = replace(entries[name], sums=sums)
    return replace(imatrix, entries=entries, _cache={})


def _equalised(space: Workspace, path: Path, facts: Provenance) -> Equalised:
    places = sites(space.inventory)
    n_bytes = space.inventory.output_size(_types(space.inventory, places))
    require_space(path.parent, n_bytes, "the model with its channels rescaled (--no-equalise)")
    with LoadedModel(space.model, simulated=True) as model:
        split = split_for_calibration(model, bundled_texts(), fitting_chunks=4, check_chunks=2)
    scales = chosen_scales(space, places, split.fitting)
    if not scales:
        return Equalised(facts, 0, len(places), 0.0, 0.0, "")
    with TemporaryDirectory("", "scratch-", path.parent, ignore_cleanup_errors=True) as place:
        part = Path(place) / path.name
        _write(space, part, places, scales)
        most, mean = _difference(space, part, split.check)
        is_same = mean <= MEAN_NATS and most <= MOST_NATS
        if is_same:
            content, arrays = io.BytesIO(), dict[str, Any](scales)
            np.savez(content, **arrays)
            write_atomically(path.parent / _SCALES_FILE, content.getvalue())
            part.replace(path)
    sha256 = _sha256(path) if is_same else ""
    return Equalised(facts, len(scales), len(places), mean, most, sha256)


def _types(inventory: Inventory, places: Sequence[Site]) -> dict[str, str]:
    """Floats for what is rescaled."""
    touched = {name for s in places for name in (s.writer, s.bias, *s.readers)}
    return inventory.types | {
        t.name: "F16" if t.qtype.name == "F16" else "F32"
        for t in inventory.tensors
        if t.name in touched
    }


def _write(
    space: Workspace, path: Path, places: Sequence[Site], scales: Mapping[str, Floats]
) -> None:
    record = encode_kv("apreqel.equalised", STRING, f"{len(scales)} of {len(places)} sites")
    quantize_model(
        space.inventory,
        _types(space.inventory, places),
        path,
        extra_metadata=[record],
        n_threads=space.n_threads,
        allow_requantize=True,
    )
    _rescale(path, places, scales)


def _rescale(path: Path, places: Sequence[Site], scales: Mapping[str, Floats]) -> None:
    copy = read_inventory(path)
    stored = np.memmap(path, np.uint8, "r+")

    def multiply(name: str, by: Reals) -> None:
        rows = float_rows(stored, copy.by_name[name])
        rows[:] = (rows.astype(np.float32) * by).astype(rows.dtype)

    for site in places:
        s = scales.get(site.writer)
        if s is None:
            continue
        is_vector = copy.by_name[site.writer].n_rows == 1
        multiply(site.writer, (1 / s) if is_vector else (1 / s)[:, None])
        if site.bias is not None:
            multiply(site.bias, 1 / s)
        for name in site.readers:
            multiply(name, s[site.channels])
    stored.flush()


def _difference(space: Workspace, path: Path, text: TokenSet) -> tuple[float, float]:
    """(largest, mean) KL divergence of the file from the model, in nats."""
    n_threads = space.n_threads
    with ThreadPoolExecutor(n_threads) as pool:
        space.progress("comparing with the original", 0, 2)
        with LoadedModel(space.model) as model, context_for(model, text, n_threads) as context:
            logits = np.concatenate([found.copy() for _, found in evaluated(context, text)])
        if not np.isfinite(logits).all():
            raise EngineError(f"{space.model}: gives NaN or Inf logits")
        reference = ReferenceRun(text, Reference.of(logits, pool))
        space.progress("comparing with the original", 1, 2)
        with LoadedModel(path) as model, context_for(model, text, n_threads) as context:
            klds = compared(context, reference, pool).kld_nats
    klds = np.nan_to_num(klds, nan=_WRONG, posinf=_WRONG)
    return float(klds.max()), float(klds.mean())


# --- the choice ----------------------------------------------------------------------------------


def chosen_scales(space: Workspace, places: Sequence[Site], text: TokenSet) -> dict[str, Floats]:
    """By writer, the scales [channels] of the sites where they help."""
    by_reader = {s.readers[0]: s for s in places}
    left, found = dict(by_reader), dict[str, Floats]()
    candidates = candidate_types(space.inventory, None)

    def listen(name: str, values: Floats, experts: Tokens | None) -> None:
        site = left.pop(name, None) if experts is None else None
        if site is not None:
            space.progress("choosing scales", len(by_reader) - len(left), len(by_reader))
            x = values.reshape(-1, values.shape[-1])
            x = x[np.arange(len(x)) % text.n_ctx >= _FIRST_TOKENS]
            scales = _best_scales(space.inventory, site, candidates, x, pool)
            if scales is not None:
                found[site.writer] = scales

    with (
        ThreadPoolExecutor(space.n_threads) as pool,
        LoadedModel(space.model, patchable=True) as model,
        context_for(model, text, space.n_threads, listen) as context,
    ):
        for _ in evaluated(context, text):
            if not left:
                break
    return found


def _best_scales(
    inventory: Inventory,
    site: Site,
    candidates: Mapping[str, Sequence[QuantType]],
    x: Floats,
    pool: ThreadPoolExecutor,
) -> Floats | None:
    """None where nothing gains enough."""
    random = np.random.default_rng(0)
    fitted, held_out = x[::2], x[1::2]
    held_out = held_out[sample(random, len(held_out), _TOKENS)]
    squares = np.square(fitted, dtype=np.float64).mean(axis=0)
    readers = []
    for name in site.readers:
        tensor = inventory.by_name[name]
        rows = read_weights(inventory, name, sample(random, tensor.n_rows, _ROWS))
        names = [q.name for q in candidates.get(name, ())]
        qtypes = [lookup(nearest(names, bits)) for bits in _BITS] if names else []
        readers.append(_Reader(tensor.role, rows, qtypes))
    columns = np.concatenate([r.weights for r in readers])
    weights = np.square(columns, dtype=np.float64).mean(axis=0)
    n = int(site.channels.max()) + 1
    activity, size = (
        np.sqrt(np.bincount(site.channels, v, n) / np.bincount(site.channels, minlength=n))
        for v in (squares, weights)
    )
    if not (np.isfinite(activity).all() and activity.any() and size.any()):
        return None
    activity, size = (np.maximum(v, 1e-3 * np.median(v[v > 0])) for v in (activity, size))
    tried = [np.ones(n, np.float32), *(_scales(activity, size, a, b) for a, b in _EXPONENTS)]

    def loss(scales: Floats) -> float:
        s = scales[site.channels]
        return sum(r.loss(held_out, squares, s) for r in readers) / len(readers)

    losses = list(pool.map(loss, tried))
    best = int(np.argmin(losses))
    return tried[best] if losses[best] < losses[0] + np.log1p(-_LEAST_GAIN) else None


def _scales(activity: Doubles, size: Doubles, a: float, b: float) -> Floats:
    logs = a * np.log(activity) - b * np.log(size)
    logs = np.clip(logs - logs.mean(), -np.log(_LARGEST), np.log(_LARGEST))
    scales: Floats = np.exp(logs).astype(np.float32)
    return scales


@dataclass(frozen=True)
class _Reader:
    role: str
    weights: Floats  # [rows, row length]
    qtypes: Sequence[QuantType]

    def loss(self, x: Floats, squares: Doubles, s: Floats) -> float:
        """Mean over types of the logarithm of what outputs lose, all rounded as kernels do."""
        if not self.qtypes:
            return 0.0
        scaled, importance = self.weights * s, (squares / np.square(s)).astype(np.float32)
        importance = np.maximum(importance, importance[importance > 0].min())
        output, logs = x @ self.weights.T, []
        for q in self.qtypes:
            w = fake_quantize(np.ascontiguousarray(scaled), q, importance)
            wrong = (rounded((x / s).astype(np.float32), q.activation) @ w.T - output).T
            squared = squared_errors(wrong, bias_weight(self.role)).sum()
            logs.append(np.log(max(float(squared), 1e-30)))
        return float(np.mean(logs))
