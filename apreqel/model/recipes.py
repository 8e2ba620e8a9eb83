"""Maps of types in the formats of other tools, to read and to write.

llama-quantize's `--tensor-type-file` and the recipes of GGUF-Tool-Suite hold one `regex=type` a
line (`#` starts a comment), ik_llama.cpp's `--custom-q` the same joined by commas. The first
pattern that is found in a tensor's name decides (llama-quant.cpp: tensor_type_patterns).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from apreqel.errors import UsageError, printable
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.model.qtypes import lookup


def tensor_type_lines(types: Mapping[str, str], inventory: Inventory) -> str:
    """One anchored, escaped, lower-case line a tensor.

    llama-quantize lower-cases the pattern and searches it as a regular expression.
    """
    lines = (f"^{re.escape(t.name)}$={types[t.name]}\n".lower() for t in inventory.quantizable)
    return "".join(lines)


def custom_q(types: Mapping[str, str], inventory: Inventory) -> str:
    """The same as one argument of ik_llama.cpp's `--custom-q`."""
    return tensor_type_lines(types, inventory).rstrip("\n").replace("\n", ",") + "\n"


def read_recipe(path: Path, inventory: Inventory) -> dict[str, str]:
    """The type of every tensor that a recipe names; tensors it leaves out are not in the result.

    Raises UsageError with the line that is not understood, names no tensor, or no type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: no readable recipe ({error})") from error
    names, found = [t.name for t in inventory.quantizable], dict[str, str]()
    for number, line in enumerate(text.splitlines(), 1):
        content = line.split("#")[0].strip()
        # A comma may also stand in a pattern: it joins rules where there are several.
        for rule in content.split(",") if content.count("=") > 1 else [content]:
            if not rule.strip():
                continue
            pattern, _, kind = rule.strip().rpartition("=")
            if not pattern:
                raise UsageError(f"{path}, line {number}: {printable(rule)}: give pattern=type")
            try:  # llama-quantize takes capitals as small letters, too
                matches, type_name = re.compile(pattern, re.IGNORECASE).search, lookup(kind.strip())
            except (re.error, UsageError) as error:
                raise UsageError(f"{path}, line {number}: {printable(rule)}: {error}") from error
            if not any(map(matches, inventory.by_name)):
                raise UsageError(
                    f"{path}, line {number}: {printable(rule)}: names no tensor of "
                    f"{inventory.name}; take it out, or give the recipe's own model"
                )
            for name in filter(matches, names):
                found.setdefault(name, type_name.name)
    if not found:
        raise UsageError(f"{path}: names no tensor of {inventory.name} that can be quantised")
    return {name: found[name] for name in names if name in found}


def types_of_file(path: Path, inventory: Inventory) -> dict[str, str]:
    """The types that another file of the same model has, for tensors quantised there.

    Raises ModelFileError, UsageError where its tensors are not this model's.
    """
    other = read_inventory(path)
    for tensor in inventory.quantizable:
        found = other.by_name.get(tensor.name)
        if found is None or found.shape != tensor.shape:
            shape = "absent" if found is None else "x".join(map(str, found.shape))
            raise UsageError(f"{path}: tensor {tensor.name} is {shape} there; it is another model")
    return {t.name: other.by_name[t.name].qtype.name for t in inventory.quantizable}
