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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apreqel import artifacts
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
from apreqel.model.inventory import Inventory, read_inventory, require_float_source
from apreqel.model.qtypes import lookup
from apreqel.progress import Progress, silent

if TYPE_CHECKING:
    from apreqel.model.imatrix import Imatrix

# What an exit status of the C program (its enum failure) means, and what to do about it.
_IO, _INTERRUPTED = 22, 26
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
    progress: Progress = silent,
) -> QuantizedModel:
    """Write `output` with each tensor in its type from `types` (every tensor, exact names).

    Raises UsageError (the map), CalibrationError (a type lacks its imatrix), UnsupportedModelError
    (quantised source), OutputError, LockedError, ModelFileError (NaN, or the source cannot be
    read), EngineError (ggml, or out of memory), VerificationError, Interrupted. On any of them
    `output` is as it was. The progress is in bytes.
    """
    check_job(inventory, types, output, imatrix, force, allow_requantize)
    job = _Job(inventory, types, imatrix, extra_metadata, n_threads)
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


@dataclass(frozen=True)
class _Job:
    """What the C program is to do."""

    inventory: Inventory
    types: Mapping[str, str]
    imatrix: Imatrix | None
    extra_metadata: Sequence[bytes]
    n_threads: int

    def write(self, folder: Path, part: Path) -> Path:
        """The job table and what it points to, in `folder`; layout in the C program's header."""
        header, offsets = self.inventory.output_header(self.types, self.extra_metadata)
        lines, n_floats = [], 0
        with open(folder / "imatrix", "wb") as importance:
            for tensor, offset in zip(self.inventory.tensors, offsets, strict=True):
                weights = self.imatrix.weights(tensor.name) if self.imatrix else None
                target = lookup(self.types[tensor.name])
                place = -1
                if weights is not None and target != tensor.qtype:
                    place, n_floats = n_floats, n_floats + weights.size
                    importance.write(np.ascontiguousarray(weights, np.float32).tobytes())
                lines.append(
                    f"tensor {tensor.shard} {tensor.offset} {tensor.qtype.ggml_id} {offset} "
                    f"{target.ggml_id} {tensor.n_rows} {tensor.n_rows // tensor.n_experts} "
                    f"{tensor.row_length} {place} {printable(tensor.name)}"
                )
        (folder / "header").write_bytes(header)
        fields = [
            "apreqel-quantize 2",
            f"threads {max(1, min(self.n_threads, 256))}",
            f"alignment {self.inventory.alignment}",
            f"size {self.inventory.output_size(self.types, self.extra_metadata)}",
            f"ggml {ggml_base_path()}",
            f"header {folder / 'header'}",
            f"imatrix {folder / 'imatrix' if n_floats else '-'}",
            f"temp {part.absolute()}",
            *(f"source {h.file_size} {h.path.absolute()}" for h in self.inventory.headers),
            *lines,
            "end\n",
        ]
        (folder / "job").write_bytes(os.fsencode("\n".join(fields)))
        return folder / "job"


# --- during --------------------------------------------------------------------------------------


def _run(job: Path, held: int, progress: Progress) -> dict[str, Any]:
    """Run the C program to its end; its last report. Raises what its failure means.

    It inherits the lock `held`, for it may outlive this process by a moment.
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
        pass_fds=[held],
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
