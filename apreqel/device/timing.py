"""Measure a device profile: products and attention in ggml, and a few real runs to tie them to.

Machines drift: a neighbour, heat, a governor. Everything is therefore measured in rounds (see
`rounds`), each taking every (type, shape) pair and every real run once. A reading that was
disturbed (see `machine.Watch`) is taken again.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from apreqel import __version__
from apreqel.artifacts import Provenance
from apreqel.device import real_runs
from apreqel.device.machine import Device, Watch, pinned, this_device
from apreqel.device.memory import measure_rest
from apreqel.device.profile import Anchor, DeviceProfile, Kernel, Overhead, default_name
from apreqel.device.rounds import Rounds, fit_overhead
from apreqel.device.shapes import Shape, timed_shapes, write_shapes
from apreqel.llama.graphs import CACHED_TOKENS, HeadShape, MatrixShape
from apreqel.llama.kernels import KernelBench
from apreqel.llama.library import build_info
from apreqel.model.qtypes import lookup

if TYPE_CHECKING:
    from apreqel.device.real_runs import RealRun
    from apreqel.llama.kernels import TimedRun
    from apreqel.model.inventory import Inventory
    from apreqel.workspace import Workspace

# Accepted at this coefficient of variation; otherwise measured in further rounds, then flagged.
_ACCEPTED_VARIATION = 0.03
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 8
_QUICK_ROUNDS = 3
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

_DISTURBED_TRIES, _COOL_DOWN_SECONDS = 3, 5.0
_DISTURBED_IN_ALL = 30  # on a machine that is always busy the flags must do
# Anchors hold zeros; in these types that is a scale of 2^-127, and denormal numbers are slow.
_SLOW_AT_ZERO = {"MXFP4"}

Result = TypeVar("Result")


def measure_profile(
    space: Workspace,
    *,
    known: DeviceProfile | None = None,
    types: Sequence[str] | None = None,
    also: Mapping[str, Path] | None = None,
    also_runs: dict[str, RealRun] | None = None,
    quick: bool = False,
) -> DeviceProfile:
    """Time every type that this llama.cpp has, on the shapes of the model.

    `known` is an earlier profile of this device: only what it lacks is measured. `also` names files
    to be run in the same rounds; their median runs are put into `also_runs`. `quick`: in fewer
    rounds, however unsteady. Raises EngineError.
    """
    device, fingerprint = this_device()
    with tempfile.TemporaryDirectory(prefix="profile-", dir=space.folder) as folder:
        space = replace(space, folder=Path(folder))
        known = known or DeviceProfile(
            Provenance("", build_info(), fingerprint, {"n_prompt": real_runs.PROMPT_TOKENS}),
            default_name(device, space.n_threads, fingerprint),
            device,
            fingerprint,
            space.n_threads,
            real_runs.PROMPT_TOKENS,
            {},
        )
        n_prompt = real_runs.prompt_tokens(space.inventory)
        run = _Measurement(space, device, also or {}, n_prompt, quick)
        with pinned(space.n_threads):
            measured = run.measure(known, types)
        if also_runs is not None:
            also_runs.update({label: run.real(label) for label in run.also})
    return measured


def was_quick(profile: DeviceProfile, inventory: Inventory) -> bool:
    """Whether the model's products were read in fewer rounds than usual."""
    return 0 < profile.n_rounds(inventory) < _LEAST_ROUNDS


@dataclass
class _Measurement:
    """One measurement of one model's shapes, with files in the folder of `space`."""

    space: Workspace
    device: Device
    also: Mapping[str, Path]
    n_prompt: int
    quick: bool
    decode: Rounds = field(default_factory=Rounds)
    prefill: Rounds = field(default_factory=Rounds)
    layouts: dict[tuple[str, str], str] = field(default_factory=dict)
    tokens: dict[tuple[str, str], int] = field(default_factory=dict)  # of a prompt's product
    anchors: dict[str, Mapping[str, str]] = field(default_factory=dict)  # types by label
    sampling: list[float] = field(default_factory=list)
    patience: int = _DISTURBED_IN_ALL

    def measure(self, known: DeviceProfile, types: Sequence[str] | None) -> DeviceProfile:
        inventory, progress = self.space.inventory, self.space.progress
        missing = everything = self._missing(known, types)
        started, without_also = time.monotonic(), 0.0
        least = _QUICK_ROUNDS if self.quick else _LEAST_ROUNDS
        for i in range(least if self.quick else _MOST_ROUNDS):
            began = time.monotonic()
            progress(f"timing, round {i + 1}", i, max(least, i + 1))
            self.decode.start()
            self.prefill.start()
            self._round(missing)
            if not self.anchors:
                self._choose_anchors(self._with_kernels(known, everything))
            for label in self.anchors:
                self._real_run(label, self._anchor_file(label))
            seconds = time.monotonic() - began
            without_also += seconds
            for label, path in self.also.items():
                self._real_run(label, path)
            if i + 1 >= (least if everything else _ROUNDS_OF_RUNS_ALONE):
                missing = {
                    name: shapes
                    for name, shapes in missing.items()
                    if any("unsteady" in self._kernel(name, shape).flags for shape in shapes)
                }
                if not missing or without_also + seconds > _FURTHER_ROUNDS_SECONDS:
                    break
        progress("timing", 1, 1)
        profile = self._with_kernels(known, everything)
        overheads = {**profile.overheads, inventory.shape_digest: self._overhead(profile)}
        fastest, slowest = min(self.decode.factors()), max(self.decode.factors())
        note = (
            f"{inventory.name}: {self.decode.count} rounds in "
            f"{time.monotonic() - started:.0f} s, the slowest {slowest / fastest:.2f} times the "
            f"fastest (apreqel {__version__})"
        )
        return replace(profile, overheads=overheads, notes=[*profile.notes, note])

    # -- products --

    def _missing(self, known: DeviceProfile, types: Sequence[str] | None) -> dict[str, list[Shape]]:
        """What was not timed yet, by type."""
        timed = {**known.kernels, **known.attention}
        wanted = timed_shapes(self.space.inventory, types).items()
        left = {n: [s for s in shapes if s.key not in timed.get(n, {})] for n, shapes in wanted}
        return {name: shapes for name, shapes in left.items() if shapes}

    def _round(self, missing: Mapping[str, Sequence[Shape]]) -> None:
        """Every pair once. The order changes, so that no type always follows the same one."""
        order = list(missing)
        random.Random(self.decode.count).shuffle(order)
        cache = max(_LEAST_CACHE_BYTES, self.device.cache_bytes or _UNKNOWN_CACHE_BYTES)
        total = min(_CACHES_FULL * cache, self.device.available_bytes // 4)
        with KernelBench(self.space.n_threads) as bench:
            for i, name in enumerate(order):
                what = f"timing, round {self.decode.count}: {name}"
                self.space.progress(what, (self.decode.count - 1) * len(order) + i, 0)
                with _ready(bench, name, missing[name], total) as runs:
                    self._read(name, runs)

    def _read(self, name: str, runs: Mapping[Shape, TimedRun]) -> None:
        cycles, wanted = (_DECODE_CYCLES, _PREFILL_CYCLES), _PREFILL_SECONDS
        if "/" in name:
            cycles, wanted = _ATTENTION_CYCLES, _ATTENTION_SECONDS / CACHED_TOKENS
        prompts = [(r, self._prefill_tokens(name, shape, r, wanted)) for shape, r in runs.items()]
        for run, n_tokens in prompts:  # brings everything in
            run.seconds(n_tokens, 1)
            run.seconds(1)

        def read() -> tuple[list[list[float]], list[list[float]]]:
            """Cycles through all shapes."""
            decode = [[run.seconds(1) for run in runs.values()] for _ in range(cycles[0])]
            return decode, [[run.seconds(n, 1) / n for run, n in prompts] for _ in range(cycles[1])]

        readings, reasons = self._undisturbed(read)
        columns = (map(median, zip(*rows, strict=True)) for rows in readings)
        for (shape, run), decode, prefill in zip(runs.items(), *columns, strict=True):
            self.layouts[name, shape.key] = run.layout
            self.decode.add((name, shape.key), decode, reasons)
            self.prefill.add((name, shape.key), prefill, reasons)

    def _undisturbed(self, read: Callable[[], Result]) -> tuple[Result, Sequence[str]]:
        """A reading and what disturbed it. Such are taken again, with patience each and in all."""
        for attempt in range(1, _DISTURBED_TRIES + 1):
            with Watch() as watch:
                result = read()
            if not watch.reasons or attempt == _DISTURBED_TRIES or self.patience <= 0:
                break
            self.patience -= 1
            time.sleep(_COOL_DOWN_SECONDS if "throttled" in watch.reasons else 0.2)
        return result, watch.reasons

    def _prefill_tokens(self, name: str, shape: Shape, run: TimedRun, seconds: float) -> int:
        """So many that one product takes about `seconds`, in all rounds; at most a whole prompt."""
        pair = name, shape.key
        if pair not in self.tokens and self.n_prompt <= _LEAST_PREFILL_TOKENS:
            self.tokens[pair] = self.n_prompt
        elif pair not in self.tokens:
            run.seconds(_LEAST_PREFILL_TOKENS, 1)
            times = int(seconds / run.seconds(_LEAST_PREFILL_TOKENS, 1))
            tokens = max(_LEAST_PREFILL_TOKENS, times * _LEAST_PREFILL_TOKENS)
            self.tokens[pair] = min(self.n_prompt, tokens)
        return self.tokens[pair]

    def _kernel(self, name: str, shape: Shape) -> Kernel:
        """As it was read in the rounds so far."""
        pair = name, shape.key
        decode, prefill = self.decode.level(pair), self.prefill.level(pair)
        flags = self.decode.flags[pair] | self.prefill.flags[pair]
        if max(decode.variation, prefill.variation) > _ACCEPTED_VARIATION:
            flags = flags | {"unsteady"}
        return Kernel(decode, prefill, self.layouts[pair], sorted(flags))

    def _with_kernels(
        self, known: DeviceProfile, timed: Mapping[str, Sequence[Shape]]
    ) -> DeviceProfile:
        rows = {name: {s.key: self._kernel(name, s) for s in timed[name]} for name in timed}
        attention = {name: rows.pop(name) for name in timed if "/" in name}
        return known.merged(replace(known, kernels=rows, attention=attention))

    # -- real runs --

    def _choose_anchors(self, profile: DeviceProfile) -> None:
        """Files in one type (nearly): those slowest and fastest to decode, slowest in a prompt."""
        inventory = self.space.inventory
        found = {
            name: types
            for name in profile.kernels.keys() - _SLOW_AT_ZERO
            if (types := profile.nearest_types(inventory, name))
        }
        fullest = max(share for _, share in found.values())
        sums = {
            name: [seconds for seconds, _ in profile.kernel_seconds(inventory, types)]
            for name, (types, share) in found.items()
            if share == fullest
        }
        decode, prefill = (lambda name: sums[name][0]), (lambda name: sums[name][1])
        for name in sorted({max(sums, key=decode), min(sums, key=decode), max(sums, key=prefill)}):
            self.anchors[name], _ = found[name]
            write_shapes(inventory, self.anchors[name], self._anchor_file(name))

    def _anchor_file(self, label: str) -> Path:
        return self.space.folder / f"anchor-{label}.gguf"

    def _real_run(self, label: str, path: Path) -> None:
        self.space.progress(f"timing, round {self.decode.count}: llama.cpp with {label}", 0, 0)
        timed = partial(real_runs.time_file, path, self.space.n_threads, self.n_prompt)
        (run, sampling), reasons = self._undisturbed(timed)
        self.sampling.append(sampling)
        self.decode.add(("run", label), run.decode, reasons)
        self.decode.add(("run at depth", label), run.decode_at_depth, reasons)
        self.prefill.add(("run", label), run.prefill, reasons)

    def real(self, label: str) -> RealRun:
        """The median run of a file that was run in the rounds."""
        prefill = self.prefill.level(("run", label))
        decode, deep = (self.decode.level((what, label)) for what in ("run", "run at depth"))
        return real_runs.RealRun(prefill.seconds, decode.seconds, deep.seconds)

    def _overhead(self, profile: DeviceProfile) -> Overhead:
        inventory, anchors = self.space.inventory, dict[str, Anchor]()
        for label, types in self.anchors.items():
            run = self.real(label)
            sums = (seconds for seconds, _ in profile.kernel_seconds(inventory, types))
            anchors[label] = Anchor(run.decode, run.decode_at_depth, run.prefill, *sums)
        rows = list(anchors.values())
        deeper = max(1, self.n_prompt - real_runs.FIRST_TOKENS)
        attention = max(0.0, median((a.decode_at_depth - a.decode) / deeper for a in rows))
        decode = fit_overhead([a.decode_kernels for a in rows], [a.decode for a in rows])
        half_generated = real_runs.FIRST_TOKENS + real_runs.GENERATED_TOKENS / 2
        rest = max(0.0, decode[1] - attention * half_generated)
        prefill = fit_overhead([a.prefill_kernels for a in rows], [a.prefill for a in rows])
        fits = decode[0], rest, decode[2], *prefill
        fastest = min(anchors, key=lambda label: anchors[label].prefill)
        path, sampling = self._anchor_file(fastest), median(self.sampling)
        types = self.anchors[fastest]
        memory = measure_rest(profile, inventory, types, path, self.space.progress, self.quick)
        return Overhead(inventory.name, *fits, attention, sampling, anchors, *memory)


@contextmanager
def _ready(
    bench: KernelBench, name: str, shapes: Sequence[Shape], total_bytes: int
) -> Iterator[dict[Shape, TimedRun]]:
    """What a type's products, or attention over a pair of types, are timed with."""
    if isinstance(heads := shapes[0], HeadShape):
        k, v = map(lookup, name.split("/"))
        with bench.attention(heads, (k, v), total_bytes) as run:
            yield {heads: run}
    else:
        matrices = [shape for shape in shapes if isinstance(shape, MatrixShape)]
        with bench.weights(lookup(name), matrices, total_bytes) as runs:
            yield dict(runs.items())
