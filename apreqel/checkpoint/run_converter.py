"""llama.cpp's converter as it is, in a process of its own, with the code of checkpoints shut out.

    python run_converter.py CONVERTER ARGUMENTS...

In places the converter lets transformers run Python that comes with a tokenizer
(trust_remote_code=True). Whoever downloads weights has not agreed to that. Where transformers has
a class of its own it is taken, else the conversion fails.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn


def shut_out_code() -> None:
    """Before transformers' other modules take these functions from here."""
    from transformers import dynamic_module_utils as code

    resolve = code.resolve_trust_remote_code

    def distrust(_trusted: Any, *arguments: Any, **options: Any) -> Any:
        options.pop("trust_remote_code", None)
        return resolve(False, *arguments, **options)

    def refuse(*_arguments: Any, **_options: Any) -> NoReturn:
        raise NotImplementedError("the checkpoint needs custom code of its own, which is not run")

    for name, taken in (
        ("resolve_trust_remote_code", distrust),
        ("get_class_from_dynamic_module", refuse),
        ("get_class_in_module", refuse),
    ):
        getattr(code, name)  # a transformers without it would have to be looked at
        setattr(code, name, taken)


if __name__ == "__main__":
    script = Path(sys.argv[1])
    sys.path[0] = str(script.parent)
    shut_out_code()
    sys.argv = sys.argv[1:]
    runpy.run_path(str(script), run_name="__main__")
