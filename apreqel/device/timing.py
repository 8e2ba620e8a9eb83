"""Measure a device profile: products and attention in ggml, and a few real runs to tie them to.

Machines drift: a neighbour, heat, a governor. Everything is therefore measured in rounds, each
taking every (type, shape) pair and every real run once; what a whole round was slower than usual is
divided out, and a value is the median over rounds. A reading that was disturbed (see
`device.Watch`) is taken again.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from apreqel import __version__, llama
from apreqel.artifacts import Provenance
from apreqel.device.machine import Device, Watch, default_threads, pinned, usable_cores
from apreqel.device.profile import (
    Anchor,
    DeviceProfile,
    Kernel,
    Overhead,
    Reading,
    default_name,
    head_shape,
    merged,
    nearest_types,
    shapes_of,
    share_of,
    signature,
    this_device,
    timed_caches,
)
from apreqel.errors import EngineError
from apreqel.llama.footprint import measure_footprint
from apreqel.llama.kernels import CACHED_TOKENS, HeadShape, KernelBench, MatrixShape
from apreqel.model.gguf_header import ARRAY, STRING, UINT32, TensorRecord, encode_header, encode_kv
from apreqel.model.inventory import read_inventory
from apreqel.model.qtypes import lookup, registry

if TYPE_CHECKING:
    from apreqel.llama.kernels import TimedRun
    from apreqel.model.inventory import Inventory
    from apreqel.model.qtypes import QuantType

# Accepted at this coefficient of variation; otherwise measured in further rounds, then flagged.
_ACCEPTED_VARIATION = 0.03
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 8
# Further rounds for unsteady readings are over by then: where a machine is always noisy (here 90 of
# 90 readings were above 3% after eight rounds) flags serve better than minutes.
_FURTHER_ROUNDS_SECONDS = 190.0
_ROUNDS_OF_RUNS_ALONE = 3  # where all products are known, for a model's overhead
# Through all shapes of a type within one reading, which is the median.
_DECODE_CYCLES, _PREFILL_CYCLES = 7, 3
_ATTENTION_CYCLES = 1, 2

# Weights that a type's shapes take together: their last use must have left the cache.
_CACHES_FULL = 3
_LEAST_CACHE_BYTES, _UNKNOWN_CACHE_BYTES = 16 << 20, 32 << 20

# A prompt's product is timed with as many of its tokens as take about this long.
_PREFILL_SECONDS = 0.04
_ATTENTION_SECONDS = 0.015  # the same for attention, of which there are many pairs of types
_LEAST_PREFILL_TOKENS = 64

# Prompt and answer fill two whole pages of 256 cells: threads share them, not the cells in use.
_PROMPT_TOKENS, _GENERATED_TOKENS, _FIRST_TOKENS = 480, 32, 8
_DISTURBED_TRIES, _COOL_DOWN_SECONDS = 3, 5.0
_DISTURBED_IN_ALL = 30  # on a machine that is always busy the flags must do
# Files larger than this stay where they are in memory: reading them again takes too long.
_FORGOTTEN_BYTES = 1 << 30
# Anchors hold zeros; in these types that is a scale of 2^-127, and denormal numbers are slow.
_SLOW_AT_ZERO = {"MXFP4"}
# Tuning: fewer threads win where more are not this much faster.
_THREADS_GAIN = 1.03
# How far a real run's products may be from the timed ones (prior of the fit), and its own noise.
_SCALE_PRIOR, _RUN_NOISE = 0.10, 0.02

# Shapes for a device without a model: those of small models that people run.
_STANDARD = {"n_embd": 1024, "n_ff": 3072, "n_layer": 8, "n_head": 16, "n_vocab": 16384}

Progress = Callable[[str, int, int], None]
Pair = tuple[str, str]  # type name (of caches: K/V), shape key
Shape = MatrixShape | HeadShape


@dataclass(frozen=True)
class RealRun:
    """Seconds per token in llama.cpp itself: of a prompt, after a short one, after the prompt."""

    prefill: float
    decode: float
    decode_at_depth: float


@dataclass
class _Rounds:
    """Readings by what was read: one value a round, None where it was not read."""

    values: dict[Any, list[float | None]] = field(default_factory=dict)
    flags: dict[Any, set[str]] = field(default_factory=dict)
    count: int = 0

    def start(self) -> None:
        self.count += 1

    def add(self, key: Any, value: float, reasons: Sequence[str] = ()) -> None:
        row = self.values.setdefault(key, [])
        row += [None] * (self.count - len(row))
        row[-1] = value
        self.flags.setdefault(key, set()).update(reasons)

    def factors(self) -> list[float]:
        """How much slower each round was than usual: the median over everything read in it."""
        usual = {k: median(v for v in row if v is not None) for k, row in self.values.items()}
        result = []
        for i in range(self.count):
            ratios = [
                value / usual[key]
                for key, row in self.values.items()
                if i < len(row) and (value := row[i]) is not None
            ]
            result.append(median(ratios) if ratios else 1.0)
        return result

    def level(self, key: Any) -> Reading:
        factors = self.factors()
        values = [v / factors[i] for i, v in enumerate(self.values[key]) if v is not None]
        return Reading(median(values), _variation(values), len(values))


def _variation(values: Sequence[float]) -> float:
    return stdev(values) / mean(values) if len(values) > 1 else 0.0


# --- the whole measurement -----------------------------------------------------------------------


def measure_profile(
    inventory: Inventory | None,
    folder: Path,
    *,
    n_threads: int | None = None,
    known: DeviceProfile | None = None,
    types: Sequence[str] | None = None,
    also: Mapping[str, Path] | None = None,
    real_runs: dict[str, RealRun] | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> DeviceProfile:
    """Time every type that this llama.cpp has, on the shapes of the model or on standard ones.

    `known` is an earlier profile of this device: only what it lacks is measured. `n_threads` None
    tunes their number. `also` names files to be run in the same rounds; their median runs are put
    into `real_runs`. Raises EngineError.
    """
    device, fingerprint = this_device()
    with tempfile.TemporaryDirectory(prefix="profile-", dir=folder) as name:
        place = Path(name)
        model = inventory or standard_model(place / "standard.gguf")
        threads_seconds: dict[str, Sequence[float]] = {}
        if n_threads is None:
            n_threads, threads_seconds = tune_threads(model, place, on_progress)
        empty = DeviceProfile(
            Provenance("", llama.build_info(), fingerprint, {"n_prompt": _PROMPT_TOKENS}),
            default_name(device, n_threads, fingerprint),
            device,
            fingerprint,
            n_threads,
            _PROMPT_TOKENS,
            {},
            thread_seconds=threads_seconds,
        )
        run = _Run(model, place, device, n_threads, on_progress, dict(also or {}))
        with pinned(n_threads):
            measured = run.measure(known or empty, types)
            if real_runs is not None:
                real_runs.update({label: run.real(label) for label in run.also})
    return measured if known is None else merged(known, measured)


@dataclass
class _Run:
    """One measurement of one model's shapes."""

    inventory: Inventory
    place: Path
    device: Device
    n_threads: int
    on_progress: Progress
    also: Mapping[str, Path]
    decode: _Rounds = field(default_factory=_Rounds)
    prefill: _Rounds = field(default_factory=_Rounds)
    layouts: dict[Pair, str] = field(default_factory=dict)
    anchors: dict[str, Path] = field(default_factory=dict)
    anchor_types: dict[str, Mapping[str, str]] = field(default_factory=dict)
    sampling: list[float] = field(default_factory=list)
    n_prompt: int = _PROMPT_TOKENS
    patience: int = _DISTURBED_IN_ALL

    def measure(self, known: DeviceProfile, types: Sequence[str] | None) -> DeviceProfile:
        room = (self.inventory.context_length or 4096) - _GENERATED_TOKENS - 1
        self.n_prompt = max(_FIRST_TOKENS, min(_PROMPT_TOKENS, room))
        missing = self._missing(known, types)
        everything, started, without_also = dict(missing), time.monotonic(), 0.0
        for i in range(_MOST_ROUNDS):
            began = time.monotonic()
            self.on_progress(f"timing, round {i + 1}", i, max(_LEAST_ROUNDS, i + 1))
            self.decode.start()
            self.prefill.start()
            self._round(missing)
            profile = self._with_kernels(known, everything)
            if not self.anchors:
                self._choose_anchors(profile)
            for label, path in self.anchors.items():
                self._real_run(label, path)
            seconds = time.monotonic() - began
            without_also += seconds
            for label, path in self.also.items():
                self._real_run(label, path)
            if i + 1 >= (_LEAST_ROUNDS if everything else _ROUNDS_OF_RUNS_ALONE):
                missing = self._unsteady(missing)
                if not missing or without_also + seconds > _FURTHER_ROUNDS_SECONDS:
                    break
        self.on_progress("timing", 1, 1)
        profile = self._with_kernels(known, everything)
        overhead = self._overhead(profile)
        fastest, slowest = min(self.decode.factors()), max(self.decode.factors())
        notes = [
            f"{self.inventory.name}: {self.decode.count} rounds in "
            f"{time.monotonic() - started:.0f} s, the slowest {slowest / fastest:.2f} times the "
            f"fastest (apreqel {__version__})"
        ]
        return replace(
            profile,
            overheads={**profile.overheads, signature(self.inventory): overhead},
            notes=[*profile.notes, *notes],
        )

    # -- products --

    def _missing(self, known: DeviceProfile, types: Sequence[str] | None) -> dict[str, list[Shape]]:
        """By type, the shapes that can hold it and were not timed yet; attention by K/V."""
        result: dict[str, list[Shape]] = {}
        for qtype in timed_types(self.inventory, types):
            timed = known.kernels.get(qtype.name, {})
            shapes: list[Shape] = [
                shape
                for shape, tensors in shapes_of(self.inventory).items()
                if shape.key not in timed and any(qtype.name in t.legal_types for t in tensors)
            ]
            if shapes:
                result[qtype.name] = shapes
        if (heads := head_shape(self.inventory)) is not None:
            for k, v in timed_caches(heads):
                asked = types is None or {k, v} <= set(types)
                if asked and heads.key not in known.attention.get(f"{k}/{v}", {}):
                    result[f"{k}/{v}"] = [heads]
        return result

    def _round(self, missing: Mapping[str, Sequence[Shape]]) -> None:
        """Every pair once. The order changes, so that no type always follows the same one."""
        order = list(missing)
        random.Random(self.decode.count).shuffle(order)
        cache = max(_LEAST_CACHE_BYTES, self.device.cache_bytes or _UNKNOWN_CACHE_BYTES)
        total = min(_CACHES_FULL * cache, self.device.available_bytes // 4)
        with KernelBench(self.n_threads) as bench:
            for i, name in enumerate(order):
                what = f"timing, round {self.decode.count}: {name}"
                self.on_progress(what, (self.decode.count - 1) * len(order) + i, 0)
                with self._ready(bench, name, missing[name], total) as runs:
                    self._read(name, runs)

    @contextmanager
    def _ready(
        self, bench: KernelBench, name: str, shapes: Sequence[Shape], total_bytes: int
    ) -> Iterator[dict[Shape, TimedRun]]:
        """What a type's products, or attention over a pair of types, are timed with."""
        with ExitStack() as stack:
            matrices = [shape for shape in shapes if isinstance(shape, MatrixShape)]
            ready: dict[Shape, TimedRun] = {}
            if matrices:
                of_type = bench.weights(lookup(name), matrices, total_bytes)
                for shape, run in stack.enter_context(of_type).items():
                    ready[shape] = run
            for heads in shapes:
                if isinstance(heads, HeadShape):
                    k, v = map(lookup, name.split("/"))
                    over = bench.attention(heads, (k, v), total_bytes)
                    ready[heads] = stack.enter_context(over)
            yield ready

    def _read(self, name: str, runs: Mapping[Shape, TimedRun]) -> None:
        is_attention = any(isinstance(shape, HeadShape) for shape in runs)
        cycles = _ATTENTION_CYCLES if is_attention else (_DECODE_CYCLES, _PREFILL_CYCLES)
        wanted = _ATTENTION_SECONDS / CACHED_TOKENS if is_attention else _PREFILL_SECONDS
        tokens = {shape: self._prefill_tokens(run, wanted) for shape, run in runs.items()}
        for run in runs.values():
            run.seconds(1)
        for attempt in range(_DISTURBED_TRIES):
            decode: dict[Shape, list[float]] = {shape: [] for shape in runs}
            prefill: dict[Shape, list[float]] = {shape: [] for shape in runs}
            with Watch() as watch:
                for _ in range(cycles[0]):
                    for shape, run in runs.items():
                        decode[shape].append(run.seconds(1))
                for _ in range(cycles[1]):
                    for shape, run in runs.items():
                        prefill[shape].append(run.seconds(tokens[shape], 1) / tokens[shape])
            if not self._try_again(watch.reasons, attempt):
                break
            time.sleep(_COOL_DOWN_SECONDS if "throttled" in watch.reasons else 0.2)
        for shape, run in runs.items():
            pair = name, shape.key
            self.layouts[pair] = run.layout
            self.decode.add(pair, median(decode[shape]), watch.reasons)
            self.prefill.add(pair, median(prefill[shape]), watch.reasons)

    def _try_again(self, reasons: Sequence[str], attempt: int) -> bool:
        """Whether a disturbed reading is taken once more: some patience each, and in all."""
        again = bool(reasons) and attempt + 1 < _DISTURBED_TRIES and self.patience > 0
        self.patience -= again
        return again

    def _prefill_tokens(self, run: TimedRun, seconds: float) -> int:
        """So many that one product takes about `seconds`; at most a whole prompt."""
        if self.n_prompt <= _LEAST_PREFILL_TOKENS:
            return self.n_prompt
        run.seconds(_LEAST_PREFILL_TOKENS, 1)
        once = run.seconds(_LEAST_PREFILL_TOKENS, 1)
        wanted = int(seconds / once) * _LEAST_PREFILL_TOKENS
        tokens = max(_LEAST_PREFILL_TOKENS, min(self.n_prompt, wanted))
        run.seconds(tokens, 1)
        return tokens

    def _unsteady(self, missing: Mapping[str, Sequence[Shape]]) -> dict[str, list[Shape]]:
        """Types with a reading that still varies too much, with all their shapes."""
        result = {}
        for name, shapes in missing.items():
            readings = [
                rounds.level((name, shape.key))
                for shape in shapes
                for rounds in (self.decode, self.prefill)
            ]
            if any(r.variation > _ACCEPTED_VARIATION for r in readings):
                result[name] = list(shapes)
        return result

    def _with_kernels(
        self, known: DeviceProfile, timed: Mapping[str, Sequence[Shape]]
    ) -> DeviceProfile:
        """The profile as it stands after the rounds so far."""
        kernels = {kind: dict(shapes) for kind, shapes in known.kernels.items()}
        attention = {kind: dict(shapes) for kind, shapes in known.attention.items()}
        for name, shapes in timed.items():
            for shape in shapes:
                pair = name, shape.key
                decode, prefill = self.decode.level(pair), self.prefill.level(pair)
                flags = self.decode.flags[pair] | self.prefill.flags[pair]
                if max(decode.variation, prefill.variation) > _ACCEPTED_VARIATION:
                    flags = flags | {"unsteady"}
                rows = attention if isinstance(shape, HeadShape) else kernels
                rows.setdefault(name, {})[shape.key] = Kernel(
                    decode, prefill, self.layouts[pair], sorted(flags)
                )
        return replace(known, kernels=kernels, attention=attention)

    # -- real runs --

    def _choose_anchors(self, profile: DeviceProfile) -> None:
        """Files in one type (nearly): those slowest and fastest to decode, slowest in a prompt."""
        sums = {}
        for kind in profile.kernels.keys() - _SLOW_AT_ZERO:
            types = nearest_types(profile, self.inventory, kind)
            if types and (share := share_of(self.inventory, types, kind)):
                seconds = [
                    profile.kernel_seconds(self.inventory, types, decode=d)[0]
                    for d in (True, False)
                ]
                sums[kind] = types, seconds, share
        fullest = max(share for *_, share in sums.values())
        sums = {kind: row for kind, row in sums.items() if row[2] == fullest}
        chosen = {
            max(sums, key=lambda k: sums[k][1][0]),
            min(sums, key=lambda k: sums[k][1][0]),
            max(sums, key=lambda k: sums[k][1][1]),
        }
        for kind in sorted(chosen):
            path = self.place / f"anchor-{kind}.gguf"
            self.anchor_types[kind] = sums[kind][0]
            write_shapes(self.inventory, sums[kind][0], path)
            self.anchors[kind] = path

    def _real_run(self, label: str, path: Path) -> None:
        self.on_progress(f"timing, round {self.decode.count}: llama.cpp with {label}", 0, 0)
        for attempt in range(_DISTURBED_TRIES):
            with Watch() as watch:
                run, sampling = time_file(path, self.n_threads, self.n_prompt)
            if not self._try_again(watch.reasons, attempt):
                break
        self.sampling.append(sampling)
        self.decode.add(("run", label), run.decode, watch.reasons)
        self.decode.add(("run at depth", label), run.decode_at_depth, watch.reasons)
        self.prefill.add(("run", label), run.prefill, watch.reasons)

    def real(self, label: str) -> RealRun:
        """The median run of a file that was run in the rounds."""
        return RealRun(
            self.prefill.level(("run", label)).seconds,
            self.decode.level(("run", label)).seconds,
            self.decode.level(("run at depth", label)).seconds,
        )

    def _overhead(self, profile: DeviceProfile) -> Overhead:
        anchors = {}
        for label, types in self.anchor_types.items():
            run = self.real(label)
            sums = [
                profile.kernel_seconds(self.inventory, types, decode=d)[0] for d in (True, False)
            ]
            anchors[label] = Anchor(run.decode, run.decode_at_depth, run.prefill, *sums)
        rows = list(anchors.values())
        deeper = self.n_prompt - _FIRST_TOKENS
        attention = median([(a.decode_at_depth - a.decode) / max(1, deeper) for a in rows])
        decode = fit_overhead([a.decode_kernels for a in rows], [a.decode for a in rows])
        prefill = fit_overhead([a.prefill_kernels for a in rows], [a.prefill for a in rows])
        attention = max(0.0, attention)
        half_generated = _FIRST_TOKENS + _GENERATED_TOKENS / 2
        rest = max(0.0, decode[1] - attention * half_generated)
        memory = self._memory()
        return Overhead(
            self.inventory.name,
            decode[0],
            rest,
            decode[2],
            *prefill,
            attention,
            median(self.sampling),
            anchors,
            *memory,
        )

    def _memory(self) -> tuple[float, float]:
        """(bytes, bytes per token of context) that a run takes beside weights and KV cache."""
        label, path = next(iter(self.anchors.items()))
        weights = path.stat().st_size + self._copied_bytes(label)
        longest = self.inventory.context_length or 4096
        contexts = sorted({min(512, longest), min(4096, longest)})

        def rest(n_ctx: int, kind: str) -> int:
            self.on_progress(f"measuring memory at context {n_ctx}", 0, 0)
            cache = llama.memory_accounting(path, n_ctx, lookup(kind), lookup(kind))["kv"]
            used = measure_footprint(path, n_ctx, n_ctx, self.n_threads, (kind, kind))
            return used.run_bytes - weights - cache

        rests = [rest(n_ctx, "F16") for n_ctx in contexts]
        # A quantised cache needs some room to work in; where heads hold none, it is not offered.
        with suppress(EngineError):
            more = max(0, rest(contexts[0], "Q8_0") - rests[0])
            rests = [value + more for value in rests]
        slope = (rests[-1] - rests[0]) / max(1, contexts[-1] - contexts[0])
        return float(rests[0] - slope * contexts[0]), float(slope)

    def _copied_bytes(self, label: str) -> int:
        types = self.anchor_types[label]
        copied = 0
        for shape, tensors in shapes_of(self.inventory).items():
            for tensor in tensors:
                kind = types[tensor.name]
                if self.layouts.get((kind, shape.key), "CPU") != "CPU":
                    copied += lookup(kind).size_bytes(tensor.shape)
        return copied


def fit_overhead(kernels: Sequence[float], runs: Sequence[float]) -> tuple[float, float, float]:
    """(scale, rest, relative error) of run = scale x kernels + rest, by weighted least squares.

    The scale is 1 but for `_SCALE_PRIOR` unless the runs say otherwise; the rest is not negative.
    """
    k, t = np.asarray(kernels), np.asarray(runs)
    weight = 1 / (_RUN_NOISE * t)
    rows = np.vstack([np.stack([k * weight, weight], axis=1), [1 / _SCALE_PRIOR, 0.0]])
    wanted = np.append(t * weight, 1 / _SCALE_PRIOR)
    (scale, rest), *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    if rest < 0:
        rest = 0.0
        scale = float((rows[:, 0] @ wanted) / (rows[:, 0] @ rows[:, 0]))
    off = (scale * k + rest) / t - 1
    freedom = max(1, len(t) - 1)
    return float(scale), float(rest), float(np.sqrt((off**2).sum() / freedom))


def forget_pages(path: Path) -> None:
    """Drop a file from the page cache, so that it comes to lie elsewhere in memory.

    Where its pages happen to lie changes decode by several percent here (five copies of one file:
    7.8 to 9.2 ms a token, steadily): a new place for every run makes that luck average out.
    """
    if path.stat().st_size > _FORGOTTEN_BYTES or not hasattr(os, "posix_fadvise"):
        return
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_file(path: Path, n_threads: int, n_prompt: int) -> tuple[RealRun, float]:
    """(one real run, seconds to pick a token)."""
    forget_pages(path)
    with (
        llama.LoadedModel(path, offload=True) as model,
        model.context(n_prompt + _GENERATED_TOKENS, 1, n_threads, as_users_run=True) as context,
    ):
        context.seconds(_FIRST_TOKENS, 2)  # brings everything in
        _, decode = context.seconds(_FIRST_TOKENS, _GENERATED_TOKENS)
        prefill, deep = context.seconds(n_prompt, _GENERATED_TOKENS)
        sampling = context.sampling_seconds()
    run = RealRun(prefill / n_prompt, decode / _GENERATED_TOKENS, deep / _GENERATED_TOKENS)
    return run, sampling


def tune_threads(
    inventory: Inventory, place: Path, on_progress: Progress
) -> tuple[int, dict[str, Sequence[float]]]:
    """The number of threads that decodes fastest here, and (decode, prefill) seconds of each."""
    most = usable_cores()
    candidates = sorted({1, max(1, most // 2), default_threads(), most})
    kinds = [q.name for q in timed_types(inventory, None)]
    kind = next((k for k in ("Q4_0", "Q8_0") if k in kinds), kinds[0])
    types = inventory.types
    types |= {t.name: kind for t in inventory.quantizable if kind in t.legal_types}
    path = place / "threads.gguf"
    write_shapes(inventory, types, path)
    room = (inventory.context_length or 4096) - _GENERATED_TOKENS - 1
    seconds: dict[int, list[RealRun]] = {n: [] for n in candidates}
    for i in range(3 if len(candidates) > 1 else 0):
        for n in candidates:
            on_progress(f"trying {n} threads", i, 3)
            with pinned(n):
                seconds[n].append(time_file(path, n, max(_FIRST_TOKENS, min(128, room)))[0])
    path.unlink()
    table = {
        str(n): [median(r.decode for r in runs), median(r.prefill for r in runs)]
        for n, runs in seconds.items()
        if runs
    }
    best = candidates[0]
    for n in candidates[1:]:
        if table[str(best)][0] > _THREADS_GAIN * table[str(n)][0]:
            best = n
    return best, {n: tuple(row) for n, row in table.items()}


def timed_types(inventory: Inventory, types: Sequence[str] | None) -> Iterator[QuantType]:
    """Types that some tensor can hold and this llama.cpp knows, largest first."""
    holdable = {t for tensor in inventory.quantizable for t in tensor.legal_types}
    for qtype in sorted(registry().values(), key=lambda q: -q.bits_per_weight):
        asked = types is None or qtype.name in types
        if asked and qtype.name in holdable and llama.supports(qtype):
            yield qtype


def write_shapes(inventory: Inventory, types: Mapping[str, str], path: Path) -> None:
    """A loadable file of these types whose weights are all zero; it takes no disk space."""
    header, _ = inventory.output_header(types)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(inventory.output_size(types))


def standard_model(path: Path) -> Inventory:
    """A llama-shaped model of common sizes, without a vocabulary, all zero."""
    s = _STANDARD
    entries: list[tuple[str, int, Any]] = [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "standard shapes"),
        ("llama.block_count", UINT32, s["n_layer"]),
        ("llama.context_length", UINT32, 4096),
        ("llama.embedding_length", UINT32, s["n_embd"]),
        ("llama.feed_forward_length", UINT32, s["n_ff"]),
        ("llama.attention.head_count", UINT32, s["n_head"]),
        ("llama.attention.head_count_kv", UINT32, s["n_head"] // 4),
        ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
        ("llama.vocab_size", UINT32, s["n_vocab"]),
        ("tokenizer.ggml.model", STRING, "none"),
        ("general.tags", ARRAY, ["apreqel"]),
    ]
    kv = s["n_embd"] // 4
    f16, f32 = lookup("F16"), lookup("F32")
    shapes: list[tuple[str, tuple[int, ...], QuantType]] = [
        ("token_embd.weight", (s["n_embd"], s["n_vocab"]), f16),
        ("output_norm.weight", (s["n_embd"],), f32),
    ]
    for i in range(s["n_layer"]):
        shapes += [
            (f"blk.{i}.attn_norm.weight", (s["n_embd"],), f32),
            (f"blk.{i}.attn_q.weight", (s["n_embd"], s["n_embd"]), f16),
            (f"blk.{i}.attn_k.weight", (s["n_embd"], kv), f16),
            (f"blk.{i}.attn_v.weight", (s["n_embd"], kv), f16),
            (f"blk.{i}.attn_output.weight", (s["n_embd"], s["n_embd"]), f16),
            (f"blk.{i}.ffn_norm.weight", (s["n_embd"],), f32),
            (f"blk.{i}.ffn_gate.weight", (s["n_embd"], s["n_ff"]), f16),
            (f"blk.{i}.ffn_up.weight", (s["n_embd"], s["n_ff"]), f16),
            (f"blk.{i}.ffn_down.weight", (s["n_ff"], s["n_embd"]), f16),
        ]
    records, offset = [], 0
    for name, shape, qtype in shapes:
        records.append(TensorRecord(name, shape, qtype.ggml_id, offset))
        offset += -(-qtype.size_bytes(shape) // 32) * 32
    header = encode_header([encode_kv(k, t, v) for k, t, v in entries], records, 32)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + offset)
    return read_inventory(path)
