"""llama.cpp's own quantiser: its presets, the files it writes and the types it would choose."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from apreqel.arrays import Floats
from apreqel.errors import EngineError, printable
from apreqel.llama.library import c_call, library, listen_to_log, reason

_DRY_RUN_NAME = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*\], type = +(\S+),")
_DRY_RUN_TYPE = re.compile(r"-> +[\d.]+ MiB \((\S+)\)")


def stock_presets() -> Mapping[str, int]:
    """The presets of llama_model_quantize by name, with their ftype number.

    Also by the short names that llama-quantize takes for the usual one of several.
    """
    prefix = "LLAMA_FTYPE_MOSTLY_"
    found = {k: int(v) for k, v in vars(library()).items() if k.startswith(prefix)}
    named = {k.removeprefix(prefix): found[k] for k in sorted(found, key=found.__getitem__)}
    return named | {name[:-2]: n for name, n in named.items() if re.fullmatch("Q[345]_K_M", name)}


def stock_quantize(
    source: Path,
    output: Path,
    preset: str,
    *,
    imatrix: Mapping[str, Floats],
    n_threads: int,
    tensor_types: Sequence[tuple[str, int]] = (),
    allow_requantize: bool = False,
    dry_run: bool = False,
) -> None:
    """Write `output` with `llama_model_quantize`, as `llama-quantize --imatrix` does.

    `tensor_types` are (regular expression, ggml type id) pairs, as in --tensor-type-file.
    Raises EngineError.
    """
    c = library()
    presets = stock_presets()
    if preset.upper() not in presets:
        raise EngineError(
            f"preset '{printable(preset)}' is unknown; there are {', '.join(presets)}"
        )
    params = c.llama_model_quantize_default_params()
    params.ftype, params.nthread = presets[preset.upper()], n_threads
    params.allow_requantize, params.dry_run = allow_requantize, dry_run
    entries = [(name.encode(), np.ascontiguousarray(v, np.float32)) for name, v in imatrix.items()]
    if entries:
        params.imatrix = table = (c.llama_model_imatrix_data * (len(entries) + 1))()
        for row, (name, values) in zip(table, entries, strict=False):
            row.name, row.size = name, values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if tensor_types:
        params.tt_overrides = table = (c.llama_model_tensor_override * (len(tensor_types) + 1))()
        for row, (pattern, ggml_id) in zip(table, tensor_types, strict=False):
            row.pattern, row.type = pattern.encode(), ggml_id
    with c_call():
        code = c.llama_model_quantize(
            os.fsencode(source), os.fsencode(output), ctypes.byref(params)
        )
    if code:
        raise EngineError(f"{source}: llama_model_quantize to {preset} failed: {reason()}")


def stock_types(
    source: Path, preset: str, *, has_imatrix_for: Sequence[str], n_threads: int = 1
) -> dict[str, str]:
    """The quant type of every tensor in a stock preset, from llama.cpp's own dry run.

    `has_imatrix_for` names the tensors with importance weights: presets choose otherwise without.
    Raises EngineError.
    """
    with listen_to_log() as lines:
        stock_quantize(
            source,
            source.with_name(source.name + ".dry-run"),
            preset,
            imatrix=dict.fromkeys(has_imatrix_for, np.ones(1, np.float32)),
            n_threads=n_threads,
            allow_requantize=True,
            dry_run=True,
        )
    types, name = dict[str, str](), ""
    for line in "".join(lines).splitlines():
        if found := _DRY_RUN_NAME.match(line):
            name = found[1]
            types[name] = found[2].upper()
        if name and (changed := _DRY_RUN_TYPE.search(line)):
            types[name] = changed[1].upper()
    if not types:
        raise EngineError(f"{source}: llama.cpp's dry run of {preset} listed no tensors")
    return types
