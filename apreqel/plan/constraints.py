"""What the user rules out or in by hand: pinned tensors, and types to use or to leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from apreqel.errors import UsageError, printable
from apreqel.model.inventory import Inventory, Tensor
from apreqel.model.qtypes import lookup


@dataclass(frozen=True)
class Constraints:
    """Patterns are those of a shell: 'blk.0.*', '*attn_v*'.

    The last pin that matches a tensor holds.
    """

    pins: Sequence[tuple[str, str]] = ()  # (pattern, type)
    only_types: Sequence[str] = ()
    exclude_types: Sequence[str] = ()

    def allowed(self, tensor: Tensor, types: Sequence[str]) -> list[str]:
        """Of `types`, what is left for the tensor. Raises UsageError where nothing is."""
        pins = [t for pattern, t in self.pins if fnmatchcase(tensor.name, pattern)]
        if pins:
            pin = pins[-1]
            if pin not in types:
                raise UsageError(
                    f"--pin {tensor.name}={pin}: it can be {', '.join(types)}; rows of "
                    f"{tensor.row_length} hold no other type, or it was not probed"
                )
            return [pin]
        wanted = set(self.only_types or types) - set(self.exclude_types)
        left = [t for t in types if t in wanted]
        if not left:
            raise UsageError(
                f"--only-types, --exclude-types: leave nothing for tensor {tensor.name}, which can "
                f"be {', '.join(types)}"
            )
        return left

    def check(self, inventory: Inventory) -> None:
        """Raise UsageError where a pattern matches nothing that can be quantised."""
        for pattern, _ in self.pins:
            if not any(fnmatchcase(t.name, pattern) for t in inventory.quantizable):
                raise UsageError(
                    f"--pin {printable(pattern)}: matches no tensor that can be quantised; "
                    "apreqel inspect MODEL --json names them"
                )


def parse_constraints(pins: Sequence[str], only: str | None, exclude: str | None) -> Constraints:
    """From the command line: 'pattern=TYPE' and lists with commas. Raises UsageError."""
    pairs = []
    for pin in pins:
        pattern, equals, type_name = pin.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--pin {printable(pin)}: give pattern=TYPE, as in 'blk.0.*=Q8_0'")
        pairs.append((pattern, lookup(type_name).name))
    lists = _types("--only-types", only), _types("--exclude-types", exclude)
    return Constraints(pairs, *lists)


def _types(option: str, text: str | None) -> list[str]:
    names = [lookup(part.strip()).name for part in (text or "").split(",") if part.strip()]
    if text is not None and not names:
        raise UsageError(f"{option} {text!r}: name at least one type, as in Q4_0,Q8_0")
    return names
