"""Write the quantised file: check everything, hand a job table to the C program, check the result.

The C program (`tools/apreqel-quantize.c`, installed as `apreqel/bin/apreqel-quantize`) runs in a
process of its own, so that a crash inside ggml ends that process and not the user's session.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
from apreqel.llama import ggml_base_path
from apreqel.model.inventory import Inventory, Tensor, read_inventory, require_float_source
from apreqel.model.qtypes import lookup

if TYPE_CHECKING:
    from apreqel.model.imatrix import Imatrix

# enum failure in the C program
_JOB, _IO, _DATA, _GGML, _EXISTS, _INTERRUPTED = range(20, 26)
_COMPARE_BLOCK_BYTES = 1 << 22

# (bytes written, bytes in all, tensor)
Progress = Callable[[int, int, str], None]


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
    on_progress: Progress | None = None,
) -> QuantizedModel:
    """Write `output` with each tensor in its type from `types` (every tensor, exact names).

    Raises UsageError (the map), CalibrationError (a type lacks its imatrix), UnsupportedModelError
    (quantised source), OutputError, LockedError, ModelFileError (NaN), EngineError,
    VerificationError, Interrupted. On any of them `output` is as it was.
    """
    check_job(inventory, types, output, imatrix, force, allow_requantize)
    size = inventory.output_size(types, extra_metadata)
    artifacts.require_space(output.absolute().parent, size, "the quantised model")
    started = time.monotonic()
    with (
        artifacts.lock(output.with_name(f".{output.name}.lock")),
        tempfile.TemporaryDirectory(prefix="apreqel-") as folder,
    ):
        try:
            job = _write_job(
                Path(folder),
                inventory,
                types,
                output,
                imatrix,
                extra_metadata,
                size,
                n_threads,
                force,
            )
            report = _run(job, output, on_progress)
            check_written(inventory, types, output)
        finally:
            output.with_name(f".{output.name}.lock").unlink(missing_ok=True)
    seconds = time.monotonic() - started
    return QuantizedModel(output, size, seconds, int(report["peak_rss_bytes"]))


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
    changed = any(t.qtype.is_quantized and types[t.name] != t.qtype.name for t in inventory.tensors)
    if changed:
        require_float_source(inventory, allow_requantize)
    check_output(inventory, output, force)


def check_map(inventory: Inventory, types: Mapping[str, str], imatrix: Imatrix | None) -> None:
    """Every tensor named once, in a type that it can hold, with the imatrix that the type needs."""
    absent = [name for name in types if name not in inventory.by_name]
    if absent:
        raise UsageError(
            f"{len(absent)} tensors of the map are not in the model, first "
            f"'{printable(absent[0])}'; the map belongs to another model"
        )
    left_out = [t.name for t in inventory.tensors if t.name not in types]
    if left_out:
        raise UsageError(
            f"the map leaves out {len(left_out)} tensors, first {left_out[0]!r}; name every tensor"
        )
    for tensor in inventory.tensors:
        qtype = lookup(types[tensor.name])
        if qtype == tensor.qtype:
            continue
        if tensor.keep_reason is not None:
            raise UsageError(
                f"tensor {tensor.name}: {qtype.name} asked, but it must stay {tensor.qtype.name}: "
                f"{tensor.keep_reason}"
            )
        if not qtype.holds_row(tensor.row_length) or not qtype.for_weights:
            raise UsageError(
                f"tensor {tensor.name}: {qtype.name} cannot hold rows of {tensor.row_length}; "
                f"it can be {', '.join(tensor.legal_types)}"
            )
        weights = imatrix.weights(tensor.name) if imatrix else None
        if qtype.needs_imatrix and weights is None:
            raise CalibrationError(
                f"tensor {tensor.name}: {qtype.name} needs an imatrix and there is none for it; "
                "run apreqel probe, or choose another type"
            )
        if weights is not None and weights.size != tensor.row_length * tensor.n_experts:
            raise CalibrationError(
                f"tensor {tensor.name}: the imatrix has {weights.size} values, expected "
                f"{tensor.row_length * tensor.n_experts}; it is another model's"
            )


def check_output(inventory: Inventory, output: Path, force: bool) -> None:
    """Refuse an output that is the input by any name, a folder, or there already."""
    if any(c in str(output) for c in "\n\r"):
        raise OutputError(f"{printable(str(output))}: a path must not hold line breaks")
    for source in inventory.files:
        if output.exists() and source.exists() and output.samefile(source):
            raise OutputError(f"{output}: is the input {source}; choose another output")
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; give a file name")
    if (output.exists() or output.is_symlink()) and not force:
        raise OutputError(f"{output}: exists; use --force to replace it, or choose another output")


def program_path() -> Path:
    """The installed C program. Raises EngineError."""
    path = Path(str(resources.files("apreqel") / "bin" / "apreqel-quantize"))
    if not path.exists():
        raise EngineError(f"{path}: the C quantiser is not there; run: pip install .")
    return path


def _write_job(
    folder: Path,
    inventory: Inventory,
    types: Mapping[str, str],
    output: Path,
    imatrix: Imatrix | None,
    extra_metadata: Sequence[bytes],
    size: int,
    n_threads: int,
    force: bool,
) -> Path:
    """The job table and what it points to, in `folder`; layout in the C program's header."""
    header, offsets = inventory.output_header(types, extra_metadata)
    (folder / "header").write_bytes(header)
    lines, n_floats = [], 0
    with open(folder / "imatrix", "wb") as importance:
        for tensor, offset in zip(inventory.tensors, offsets, strict=True):
            weights = imatrix.weights(tensor.name) if imatrix else None
            target = lookup(types[tensor.name])
            place = -1
            if weights is not None and target != tensor.qtype:
                place, n_floats = n_floats, n_floats + weights.size
                importance.write(np.ascontiguousarray(weights, np.float32).tobytes())
            lines.append(_tensor_line(tensor, target.ggml_id, offset, place))
    output = output.absolute()
    fields = [
        "apreqel-quantize 1",
        f"threads {max(1, min(n_threads, 256))}",
        f"alignment {inventory.alignment}",
        f"size {size}",
        f"force {int(force)}",
        f"ggml {ggml_base_path()}",
        f"header {folder / 'header'}",
        f"imatrix {folder / 'imatrix' if n_floats else '-'}",
        f"temp {output.with_name(f'.{output.name}.part')}",
        f"output {output}",
        *(f"source {h.file_size} {h.path.absolute()}" for h in inventory.headers),
        *lines,
        "end",
    ]
    job = folder / "job"
    job.write_text("\n".join(fields) + "\n")
    return job


def _tensor_line(tensor: Tensor, to_type: int, to: int, imatrix: int) -> str:
    matrix_rows = tensor.n_rows // tensor.n_experts
    return (
        f"tensor {tensor.shard} {tensor.offset} {tensor.qtype.ggml_id} {to} {to_type} "
        f"{tensor.n_rows} {matrix_rows} {tensor.row_length} {imatrix} {tensor.name}"
    )


# --- during --------------------------------------------------------------------------------------


def _run(job: Path, output: Path, on_progress: Progress | None) -> dict[str, Any]:
    """Run the C program to its end; its last report. Raises what its failure means."""
    report: dict[str, Any] = {}
    tensor = ""
    # Its own session: Ctrl-C reaches only this process, which then stops the child in order.
    with subprocess.Popen(
        [program_path(), job],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        try:
            for line in child.stdout:
                report = json.loads(line)
                if report.get("event") == "progress":
                    tensor = report["tensor"]
                    if on_progress:
                        on_progress(report["done_bytes"], report["total_bytes"], tensor)
            noise = child.stderr.read().decode("utf-8", "replace")
            code = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise Interrupted(f"stopped; {output} is as it was") from None
    if code == 0 and report.get("event") == "done":
        return report
    raise _failure(code, report, noise, tensor, output)


def _failure(
    code: int, report: Mapping[str, Any], noise: str, tensor: str, output: Path
) -> ApreqelError:
    message = printable(str(report.get("message", "")), 400)
    where = f"tensor {report['tensor']}: " if report.get("tensor") else ""
    if code < 0:
        output.with_name(f".{output.name}.part").unlink(missing_ok=True)
        reason = printable(noise.strip().splitlines()[-1], 200) if noise.strip() else "no message"
        name = signal.Signals(-code).name
        return EngineError(f"the quantiser was ended by {name} near tensor {tensor!r}: {reason}")
    if code == _DATA:
        return ModelFileError(f"{where}row {report['row']}: {message}; the model is damaged")
    if code == _IO:
        number = int(report.get("row", -1))
        if number > 0:
            return artifacts.output_error(Path(message), OSError(number, os.strerror(number)))
        return ModelFileError(message)
    if code == _EXISTS:
        return OutputError(f"{message}; use --force to replace it")
    if code == _INTERRUPTED:
        return Interrupted(f"stopped; {output} is as it was")
    return EngineError(f"{where}the quantiser failed (status {code}): {message or noise.strip()}")


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
        if result.qtype == source.qtype:
            origin = inventory.files[source.shard]
            if not _same_bytes(origin, source.offset, path, result.offset, source.size_bytes):
                raise VerificationError(f"{path}: tensor {source.name} differs from the source")


def _same_bytes(a: Path, a_offset: int, b: Path, b_offset: int, size: int) -> bool:
    with open(a, "rb") as left, open(b, "rb") as right:
        left.seek(a_offset)
        right.seek(b_offset)
        while size:
            n = min(size, _COMPARE_BLOCK_BYTES)
            if left.read(n) != right.read(n):
                return False
            size -= n
    return True
