"""Write the quantised file: check everything, hand a job table to the C program, check the result.

The C program (`tools/apreqel-quantize.c`, installed as `apreqel/bin/apreqel-quantize`) runs in a
process of its own, so that a crash inside ggml ends that process and not the user's session. It
writes a temporary file, which is moved to its place when it has been checked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apreqel import artifacts
from apreqel.arrays import Floats
from apreqel.errors import (
    ApreqelError,
    CalibrationError,
    EngineError,
    Interrupted,
    ModelFileError,
    OutputError,
    UsageError,
    VerificationError,
    printable,
)
from apreqel.llama.library import ggml_base_path
from apreqel.llama.quants import read_values
from apreqel.model.inventory import Inventory, read_inventory, require_float_source
from apreqel.model.qtypes import QuantType, lookup
from apreqel.progress import Progress, silent

if TYPE_CHECKING:
    from apreqel.model.imatrix import Imatrix

# What an exit status of the C program (its enum failure) means, and what to do about it.
_USAGE, _IO, _INTERRUPTED = 2, 22, 26
_FAILURES: Mapping[int, tuple[type[ApreqelError], str]] = {
    20: (EngineError, "; the job table is wrong, which is a fault of apreqel: report it"),
    21: (ModelFileError, ""),
    _IO: (OutputError, ""),
    23: (ModelFileError, "; the model is damaged"),
    24: (EngineError, "; install llama-cpp-python again"),
    25: (EngineError, "; close other programs or use fewer threads"),
    _INTERRUPTED: (Interrupted, "; the output is as it was"),
}
_COMPARE_BLOCK_BYTES = 1 << 22
_ALIGNMENT = 32
# The types that the C program can round with second moments (layouts in tools/blocks.c).
ROUNDED_TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip


@dataclass(frozen=True)
class QuantizedModel:
    """The file as it was written and checked; `peak_rss_bytes` is the C program's own memory."""

    path: Path
    size_bytes: int
    seconds: float
    peak_rss_bytes: int


def quantize_model(
    inventory: Inventory,
    types: Mapping[str, str],
    output: Path,
    *,
    imatrix: Imatrix | None = None,
    extra_metadata: Sequence[bytes] = (),
    n_threads: int = 1,
    force: bool = False,
    allow_requantize: bool = False,
    moments: Mapping[str, Path] | None = None,
    progress: Progress = silent,
) -> QuantizedModel:
    """Write `output` with each tensor in its type from `types` (every tensor, exact names).

    Tensors in `moments` are rounded with the second moments of their activations (float32, row
    length x row length) from that file, in one of ROUNDED_TYPES; all others as ggml rounds them.

    Raises UsageError (the map), CalibrationError (a type lacks its imatrix), UnsupportedModelError
    (quantised source), OutputError, LockedError, ModelFileError (NaN, or the source cannot be
    read), EngineError (ggml, or out of memory), VerificationError, Interrupted. On any of them
    `output` is as it was. The progress is in bytes.
    """
    check_job(inventory, types, output, imatrix, force, allow_requantize)
    job = _job_of(inventory, types, imatrix, extra_metadata, n_threads, moments)
    size, started = inventory.output_size(types, extra_metadata), time.monotonic()
    with (
        artifacts.lock(artifacts.beside(output, ".lock"), remove=True) as held,
        artifacts.new_file(output, replace=force) as part,
        tempfile.TemporaryDirectory(prefix="apreqel-") as folder,
    ):
        artifacts.require_space(output.absolute().parent, size, "the quantised model")
        try:
            table = job.write(Path(folder), part)
        except OSError as error:
            raise artifacts.output_error(folder, error) from error
        try:
            report = _run(table, held, progress)
            check_written(inventory, types, part)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {output} is as it was") from None
    return QuantizedModel(output, size, time.monotonic() - started, int(report["peak_rss_bytes"]))


def rounded_rows(
    weights: Floats,
    qtypes: Sequence[QuantType],
    importance: Floats | None,
    moments: Path,
    folder: Path,
    n_threads: int,
) -> dict[str, Floats]:
    """`weights` [rows, row length] as they read back from each type, rounded with `moments`.

    Scratch files go into `folder`. Raises EngineError, OutputError, Interrupted.
    """
    n_rows, length = weights.shape
    sizes = [q.size_bytes((length, n_rows)) for q in qtypes]
    ends = list(accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))
    with tempfile.TemporaryDirectory(prefix="rounded-", dir=folder) as name:
        place = Path(name)
        weights.astype(np.float32).tofile(place / "rows")
        parts = [
            _Part(q.name, 0, 0, lookup("F32"), q, to, n_rows, 1, length, importance, moments)
            for q, to in zip(qtypes, [0, *ends], strict=False)
        ]
        job = _Job(
            [(place / "rows", weights.size * 4)], b"", ends[-1], _ALIGNMENT, parts, n_threads
        )
        _run(job.write(place, place / "packed"), None, silent)
        packed = np.fromfile(place / "packed", np.uint8)
    found = {}
    for q, start, size in zip(qtypes, [0, *ends], sizes, strict=False):
        found[q.name] = np.empty((n_rows, length), np.float32)
        read_values(packed[start : start + size], q, found[q.name])
    return found


# --- before --------------------------------------------------------------------------------------


def check_job(
    inventory: Inventory,
    types: Mapping[str, str],
    output: Path,
    imatrix: Imatrix | None,
    force: bool,
    allow_requantize: bool,
) -> None:
    """Raise what `quantize_model` would before any work."""
    check_map(inventory, types, imatrix)
    if any(t.qtype.is_quantized and types[t.name] != t.qtype.name for t in inventory.tensors):
        require_float_source(inventory, allow_requantize)
    check_output(inventory, output, force)


def check_map(inventory: Inventory, types: Mapping[str, str], imatrix: Imatrix | None) -> None:
    """Every tensor named once, in a type that it can hold, with the imatrix that the type needs."""
    if absent := [name for name in types if name not in inventory.by_name]:
        raise UsageError(
            f"{len(absent)} tensors of the map are not in the model, first "
            f"'{printable(absent[0])}'; the map belongs to another model"
        )
    if left_out := [t.name for t in inventory.tensors if t.name not in types]:
        raise UsageError(
            f"the map leaves out {len(left_out)} tensors, first {left_out[0]!r}; name every tensor"
        )
    for tensor in inventory.tensors:
        qtype, shown = lookup(types[tensor.name]), f"tensor {tensor.name}"
        if qtype == tensor.qtype:
            continue
        if tensor.keep_reason is not None:
            must = f"it must stay {tensor.qtype.name}: {tensor.keep_reason}"
            raise UsageError(f"{shown}: {qtype.name} asked, but {must}")
        if not qtype.holds_row(tensor.row_length) or not qtype.for_weights:
            raise UsageError(
                f"{shown}: {qtype.name} cannot hold rows of {tensor.row_length}; "
                f"it can be {', '.join(tensor.legal_types)}"
            )
        weights = imatrix.weights(tensor.name) if imatrix else None
        if qtype.needs_imatrix and weights is None:
            raise CalibrationError(
                f"{shown}: {qtype.name} needs an imatrix and there is none for it; "
                "run apreqel probe, or choose another type"
            )
        expected = tensor.row_length * tensor.n_experts
        if weights is not None and weights.size != expected:
            raise CalibrationError(
                f"{shown}: the imatrix has {weights.size} values, expected {expected}; "
                "it is another model's"
            )


def check_output(inventory: Inventory, output: Path, force: bool) -> None:
    """Refuse an output that is the input by any name, a folder, or there already."""
    for path in (output, *inventory.files):
        if any(c in str(path) for c in "\n\r"):
            raise OutputError(f"{printable(str(path))}: a path must not hold line breaks")
    for source in inventory.files:
        if output.exists() and source.exists() and output.samefile(source):
            raise OutputError(f"{output}: is the input {source}; choose another output")
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; give a file name")
    if output.exists() and not output.is_file():
        raise OutputError(f"{output}: is a device or a pipe; give a file name")
    if (output.exists() or output.is_symlink()) and not force:
        raise OutputError(f"{output}: exists; use --force to replace it, or choose another output")


def program_path() -> Path:
    """The installed C program. Raises EngineError."""
    path = Path(str(resources.files("apreqel") / "bin" / "apreqel-quantize"))
    if not path.exists():
        raise EngineError(f"{path}: the C quantiser is not there; run: pip install .")
    return path


def check_program() -> Path:
    """Start the C program without a job, to see that it runs here. Raises EngineError."""
    path, advice = program_path(), "install apreqel again: pip install --force-reinstall ."
    try:
        done = subprocess.run([path], capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"{path}: does not start ({error}); {advice}") from error
    if done.returncode != _USAGE or b"usage: " not in done.stderr:
        raise EngineError(f"{path}: ended with {done.returncode} where it tells its use; {advice}")
    return path


@dataclass(frozen=True)
class _Part:
    """A tensor of a job: where it is read, what it becomes, and what it is rounded with."""

    name: str
    source: int
    offset: int
    qtype: QuantType
    target: QuantType
    to: int
    n_rows: int
    n_matrices: int
    row_length: int
    importance: Floats | None = None
    moments: Path | None = None


@dataclass(frozen=True)
class _Job:
    """What the C program is to do: files (path, bytes) in, one file of `size` bytes out."""

    sources: Sequence[tuple[Path, int]]
    header: bytes
    size: int
    alignment: int
    parts: Sequence[_Part]
    n_threads: int

    def write(self, folder: Path, output: Path) -> Path:
        """The job table and what it points to, in `folder`; layout in the C program's header."""
        lines, n_floats = [], 0
        moments = list(dict.fromkeys(p.moments for p in self.parts if p.moments))
        lengths = {p.moments: p.row_length for p in self.parts}
        with open(folder / "imatrix", "wb") as importance:
            for p in self.parts:
                place = -1
                if p.importance is not None and p.target != p.qtype:
                    place, n_floats = n_floats, n_floats + p.importance.size
                    importance.write(np.ascontiguousarray(p.importance, np.float32).tobytes())
                lines.append(
                    f"tensor {p.source} {p.offset} {p.qtype.ggml_id} {p.to} {p.target.ggml_id} "
                    f"{p.n_rows} {p.n_rows // p.n_matrices} {p.row_length} {place} "
                    f"{moments.index(p.moments) if p.moments else -1} {printable(p.name)}"
                )
        (folder / "header").write_bytes(self.header)
        fields = [
            "apreqel-quantize 3",
            f"threads {max(1, min(self.n_threads, 256))}",
            f"alignment {self.alignment}",
            f"size {self.size}",
            f"ggml {ggml_base_path()}",
            f"header {folder / 'header'}",
            f"imatrix {folder / 'imatrix' if n_floats else '-'}",
            f"temp {output.absolute()}",
            *(f"source {size} {path.absolute()}" for path, size in self.sources),
            *(f"moments {lengths[path]} {path.absolute()}" for path in moments),
            *lines,
            "end\n",
        ]
        (folder / "job").write_bytes(os.fsencode("\n".join(fields)))
        return folder / "job"


def _job_of(
    inventory: Inventory,
    types: Mapping[str, str],
    imatrix: Imatrix | None,
    extra_metadata: Sequence[bytes] = (),
    n_threads: int = 1,
    moments: Mapping[str, Path] | None = None,
) -> _Job:
    header, offsets = inventory.output_header(types, extra_metadata)
    parts = [
        _Part(
            tensor.name,
            tensor.shard,
            tensor.offset,
            tensor.qtype,
            lookup(types[tensor.name]),
            offset,
            tensor.n_rows,
            tensor.n_experts,
            tensor.row_length,
            imatrix.weights(tensor.name) if imatrix else None,
            (moments or {}).get(tensor.name),
        )
        for tensor, offset in zip(inventory.tensors, offsets, strict=True)
    ]
    size = inventory.output_size(types, extra_metadata)
    sources = [(h.path, h.file_size) for h in inventory.headers]
    return _Job(sources, header, size, inventory.alignment, parts, n_threads)


# --- during --------------------------------------------------------------------------------------


def _run(job: Path, held: int | None, progress: Progress) -> dict[str, Any]:
    """Run the C program to its end; its last report. Raises what its failure means.

    It inherits a lock `held`, for it may outlive this process by a moment.
    """
    report: dict[str, Any] = {}
    tensor = ""
    # Its own session: Ctrl-C reaches only this process, which then stops the child in order.
    with subprocess.Popen(
        [program_path(), job],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        pass_fds=[] if held is None else [held],
        start_new_session=True,
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        try:
            for line in child.stdout:
                report = json.loads(line)
                if report["event"] == "progress":
                    tensor = report["tensor"]
                    progress("quantising", report["done_bytes"], report["total_bytes"])
            noise = child.stderr.read().strip()
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if code == 0 and report.get("event") == "done":
        return report
    if code in _FAILURES and report.get("event") == "error":
        raise _failure(code, report)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    reason = printable(noise.splitlines()[-1], 200) if noise else "no message"
    raise EngineError(f"the quantiser {how} near tensor {tensor!r}: {reason}")


def _failure(code: int, report: Mapping[str, Any]) -> ApreqelError:
    """What the C program's last report means."""
    where = [f"{field} {report[field]}" for field in ("tensor", "row", "line") if field in report]
    text = printable(": ".join([*where, report["message"]]), 400)
    meaning, advice = _FAILURES[code]
    if number := report.get("errno"):
        if code == _IO:
            return artifacts.output_error(text, OSError(number, os.strerror(number)))
        advice = f": {os.strerror(number)}{advice}"
    return meaning(text + advice)


# --- after ---------------------------------------------------------------------------------------


def check_written(inventory: Inventory, types: Mapping[str, str], path: Path) -> None:
    """Re-read the file: every tensor as planned, untouched ones bit-identical to the source.

    Raises VerificationError naming the first tensor that is not.
    """
    try:
        written = read_inventory(path)
    except ModelFileError as error:
        raise VerificationError(f"the written file does not read back: {error}") from error
    if len(written.tensors) != len(inventory.tensors):
        raise VerificationError(
            f"{path}: holds {len(written.tensors)} tensors, expected {len(inventory.tensors)}"
        )
    for source, result in zip(inventory.tensors, written.tensors, strict=True):
        found = result.name, result.shape, result.qtype.name
        expected = source.name, source.shape, lookup(types[source.name]).name
        if found != expected:
            raise VerificationError(f"{path}: found tensor {found}, expected {expected}")
        places = inventory.files[source.shard], source.offset, path, result.offset
        if result.qtype == source.qtype and not _same_bytes(*places, source.size_bytes):
            raise VerificationError(f"{path}: tensor {source.name} differs from the source")


def _same_bytes(a: Path, a_offset: int, b: Path, b_offset: int, size: int) -> bool:
    try:
        with open(a, "rb") as left, open(b, "rb") as right:
            left.seek(a_offset)
            right.seek(b_offset)
            starts = range(0, size, _COMPARE_BLOCK_BYTES)
            blocks = (min(_COMPARE_BLOCK_BYTES, size - start) for start in starts)
            return all(left.read(n) == right.read(n) for n in blocks)
    except OSError as error:
        raise VerificationError(f"{b}: not compared with {a}: {error.strerror}") from error
