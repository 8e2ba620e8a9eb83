"""Everything that apreqel can refuse to do, each class with its own exit code.

A message is one line: the file, the field or tensor, the value found, and what to do.
The table of codes in README.md is generated from this module and a test holds the two equal.
"""

from __future__ import annotations


class ApreqelError(Exception):
    """An expected failure. `exit_code` is what the `apreqel` command ends with."""

    exit_code = 1
    meaning = "an expected failure that has no code of its own"


class UsageError(ApreqelError):
    exit_code = 2
    meaning = "the command line is not understood"


class ModelFileError(ApreqelError):
    exit_code = 3
    meaning = "a model's file or checkpoint is damaged, incomplete or none"


class UnsupportedModelError(ApreqelError):
    exit_code = 4
    meaning = "the model is sound, but this cannot be done with it"


class CalibrationError(ApreqelError):
    exit_code = 5
    meaning = "a text or an imatrix cannot be used"


class InfeasiblePlanError(ApreqelError):
    exit_code = 6
    meaning = "no plan meets the limits"


class OutputError(ApreqelError):
    exit_code = 7
    meaning = "the output cannot be written, or exists already"


class LockedError(ApreqelError):
    exit_code = 8
    meaning = "another apreqel works on the same files"


class EngineError(ApreqelError):
    exit_code = 9
    meaning = "llama.cpp failed or is missing"


class ArtifactError(ApreqelError):
    exit_code = 10
    meaning = "a work file is damaged, of an unknown version or of another model"


class VerificationError(ApreqelError):
    exit_code = 11
    meaning = "the file that was written is not the file that was planned"


class DownloadError(ApreqelError):
    exit_code = 12
    meaning = "a checkpoint or the converter cannot be downloaded"


class Interrupted(ApreqelError):
    exit_code = 130
    message = "stopped; finished measurements are kept"
    meaning = "stopped by Ctrl-C; finished measurements are kept"


class Killed(ApreqelError):
    exit_code = 137
    meaning = "killed by the system, mostly for lack of memory; finished measurements are kept"


def all_errors() -> list[type[ApreqelError]]:
    """The whole tree, by exit code."""
    return sorted({ApreqelError, *ApreqelError.__subclasses__()}, key=lambda e: e.exit_code)


def printable(text: str, limit: int = 80) -> str:
    """`text` with control characters escaped and cut to `limit`, safe on any terminal."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
