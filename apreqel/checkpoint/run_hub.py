"""The hub through huggingface_hub, in a process of its own, which can be stopped at any time.

    python run_hub.py look|take NAME REVISION PATTERNS...

Answers with one line of JSON: what was asked, or the `error` in a word and its `detail`. An empty
REVISION is the default branch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Each file that is cut off has to be fetched from its start: few at a time.
_FILES_AT_ONCE = 2
_SECONDS_FOR_AN_ANSWER = 30.0


def look(name: str, revision: str | None, _patterns: list[str]) -> dict[str, Any]:
    """The commit, and size and cached name of each file; offline the commit that is cached."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    try:
        info = HfApi().model_info(
            name, revision=revision, files_metadata=True, timeout=_SECONDS_FOR_AN_ANSWER
        )
    except Exception as error:
        known = try_to_load_from_cache(name, "config.json", revision=revision)
        if kind_of(error) != "offline" or not isinstance(known, str):
            raise
        return {"commit": Path(known).parent.name, "cache": str(cache), "offline": True}
    files = [
        (f.rfilename, f.size or 0, f.lfs["sha256"] if f.lfs else f.blob_id or "")
        for f in info.siblings or []
    ]
    return {"commit": info.sha, "cache": str(cache), "files": files}


def take(name: str, revision: str | None, patterns: list[str]) -> dict[str, Any]:
    """Download what is missing."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*",
        max_workers=_FILES_AT_ONCE,
    )  # fmt: skip
    return {"folder": folder, "commit": Path(folder).name}


def kind_of(error: BaseException) -> str:
    """The error in a word, whatever it was raised from."""
    from huggingface_hub import errors

    asked: BaseException | None = error
    while asked is not None:
        for kind, word in (
            (errors.GatedRepoError, "gated"),
            (errors.RepositoryNotFoundError, "not found"),
            (errors.RevisionNotFoundError, "revision"),
            (errors.HFValidationError, "name"),
            (errors.OfflineModeIsEnabled, "offline"),
        ):
            if isinstance(asked, kind):
                return word
        status = getattr(getattr(asked, "response", None), "status_code", None)
        if status is not None:
            return "refused" if status in (401, 403) else "answer"
        # httpx, httpx2 and requests: their errors have no base in common.
        if type(asked).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            return "offline"
        asked = asked.__cause__ or asked.__context__
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "offline"
    return "disk" if isinstance(error, OSError) and error.errno else "other"


def token_used() -> str:
    """Where the token comes from; never the token."""
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "none"
    names = [n for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(n)]
    return names[0] if names else "stored" if get_token() else "none"


def main(step: str, name: str, revision: str, *patterns: str) -> dict[str, Any]:
    from huggingface_hub import get_token

    try:
        return {"look": look, "take": take}[step](name, revision or None, list(patterns))
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if token := get_token():
            told = told.replace(token, "***")
        return {"error": kind_of(error), "detail": told, "token": token_used()}


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its names are not meant
    print(json.dumps(main(*sys.argv[1:])))
