"""Stock presets' files, made by llama.cpp itself with the same imatrix, to compare with."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from apreqel import artifacts
from apreqel.llama.library import build_info
from apreqel.llama.stock import stock_quantize
from apreqel.model.imatrix import Imatrix
from apreqel.sensitivity.equalise import imatrix_of_original
from apreqel.workspace import Workspace


def build_preset(space: Workspace, preset: str, imatrix: Imatrix) -> Path:
    """The stock preset's file of the model as it was given, made by llama.cpp, and kept.

    Its name tells what it was made from; one of the same preset made from anything else goes.
    """
    imatrix = imatrix_of_original(space, imatrix)
    weights = {name: w for name in imatrix.entries if (w := imatrix.weights(name)) is not None}
    made_from = hashlib.sha256(f"{space.sha256} {build_info()}".encode())
    for name, values in sorted(weights.items()):
        made_from.update(name.encode() + values.tobytes())
    stem = f"stock-{preset.upper()}"
    path = space.folder / f"{stem}-{made_from.hexdigest()[:12]}.gguf"
    if path.exists():
        return path
    for old in space.folder.iterdir():
        if re.fullmatch(rf"\.?{re.escape(stem)}(-[0-9a-f]{{12}})?(\.gguf)?(\.part)?", old.name):
            old.unlink()
    artifacts.require_space(space.folder, space.inventory.size_bytes, f"the stock {preset} file")
    with artifacts.new_file(path) as part:
        stock_quantize(
            space.given.files[0],
            part,
            preset,
            imatrix=weights,
            n_threads=space.n_threads,
            allow_requantize=True,
        )
    return path
