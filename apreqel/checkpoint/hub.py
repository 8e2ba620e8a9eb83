"""A repository of the Hugging Face hub, downloaded into huggingface_hub's own cache.

That library knows the user's endpoint, token, proxy and cache, and what is there already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from apreqel import artifacts
from apreqel.checkpoint.process import Ended, require_packages, run_python
from apreqel.checkpoint.weights import CONFIG, READ_FILES, WEIGHT_FILES
from apreqel.errors import DownloadError, ModelFileError, OutputError, UsageError, printable
from apreqel.progress import Progress

# One slash, and nothing that files end with.
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w][\w./-]*))?", re.ASCII)
_OF_FILES = (".gguf", ".safetensors", ".bin", ".json")
_ELSEWHERE = "free some, or move its cache with HF_HOME"


@dataclass(frozen=True)
class Repository:
    """`revision` is a branch, tag or commit; None for the default branch."""

    name: str
    revision: str | None = None

    @property
    def title(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def short_name(self) -> str:
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class Found:
    """What the hub, or offline the cache, has of a repository.

    `files`: the bytes of each file that the converter reads, and the name of its copy in `cache`.
    """

    commit: str
    cache: Path
    files: Mapping[str, tuple[int, str]]
    is_offline: bool

    @property
    def size_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @property
    def weight_bytes(self) -> int:
        return sum(size for name, (size, _) in self.files.items() if fnmatch(name, WEIGHT_FILES))

    def bytes_at_hand(self) -> int:
        """Of them, those of whole files and parts of files."""
        at_hand = 0
        blobs = self.cache / "blobs"
        for size, blob in self.files.values():
            parts = [blobs / blob, *blobs.glob(f"{blob}*.incomplete")]
            sizes = [path.stat().st_size for path in parts if path.exists()]
            at_hand += min(size, max(sizes, default=0))
        return at_hand


def repository_named(text: str) -> Repository | None:
    """What `org/name[@revision]` asks for; None where that is not what it says."""
    match = _NAME.fullmatch(text)
    if match is None or text.lower().endswith(_OF_FILES):
        return None
    return Repository(match[1], match[2])


def look_up(repository: Repository, progress: Progress) -> Found:
    """Which commit it is at, and what that holds. Raises DownloadError, ModelFileError."""
    require_packages("huggingface_hub")
    progress(f"looking up {repository.title}", 0, 1)
    answer = _answer(repository, "look")
    found = Found(
        commit=str(answer["commit"]),
        cache=Path(answer["cache"]),
        files={
            str(name): (int(size), str(blob))
            for name, size, blob in answer.get("files", [])
            if "/" not in name and any(fnmatch(name, pattern) for pattern in READ_FILES)
        },
        is_offline=bool(answer.get("offline")),
    )
    if not found.is_offline:
        _require_checkpoint(repository, [str(name) for name, *_ in answer["files"]])
    return found


def _require_checkpoint(repository: Repository, names: list[str]) -> None:
    """Raise ModelFileError before anything is downloaded that could not be converted."""
    weights = [name for name in names if fnmatch(name, WEIGHT_FILES) and "/" not in name]
    if CONFIG in names and weights:
        return
    title = f"{repository.title} on the hub"
    for ending, advice in (
        (".gguf", "holds GGUF files; download one and give its path: {}"),
        (".bin", "its weights are pickles only ({}), which may run code when they are read; take "
                 "a repository with safetensors"),
    ):  # fmt: skip
        if named := [name for name in names if name.endswith(ending)]:
            raise ModelFileError(f"{title}: {advice.format(printable(named[0]))}")
    missing = WEIGHT_FILES if CONFIG in names else CONFIG
    raise ModelFileError(f"{title}: holds no {missing}; is it a language model?")


def download(repository: Repository, found: Found, progress: Progress) -> tuple[Path, str]:
    """The folder of a whole copy, and the commit that it is of. Whole files are not fetched again.

    Raises DownloadError, OutputError.
    """
    what, total = f"downloading {repository.title}", found.size_bytes
    folder = found.cache.parent
    if missing := total - found.bytes_at_hand():
        artifacts.require_space(folder, missing, what, _ELSEWHERE)
    folder.mkdir(parents=True, exist_ok=True)
    before = _parts(found)

    def watch() -> None:
        if total:
            progress(what, min(found.bytes_at_hand(), total - 1), total)

    at_hand = found.bytes_at_hand()
    try:
        while True:
            try:
                answer = _answer(repository, "take", *READ_FILES, watch=watch)
                break
            except DownloadError:
                # Older versions give up on a connection that breaks, with what they have kept.
                if (now := found.bytes_at_hand()) <= at_hand:
                    raise
                at_hand = now
    except BaseException:
        # Since version 2 the library never takes up a part of a file, whose name is chosen anew.
        for path in _parts(found) - before:
            path.unlink(missing_ok=True)
        raise
    return Path(answer["folder"]), str(answer["commit"])


def _parts(found: Found) -> set[Path]:
    blobs = found.cache / "blobs"
    return {
        p for _, blob in found.files.values() for p in blobs.glob(f"{blob}.????????.incomplete")
    }


def _answer(
    repository: Repository, step: str, *patterns: str, watch: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    done = run_python(
        "huggingface_hub",
        *(Path(__file__).with_name("run_hub.py"), step, repository.name),
        *(repository.revision or "", *patterns),
        folder=Path.cwd(),
        environment={"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        watch=watch,
    )
    answer = _last_json(done)
    if "error" in answer:
        raise _failure(repository, answer)
    return answer


def _last_json(done: Ended) -> dict[str, Any]:
    try:
        answer = json.loads(done.out.strip().splitlines()[-1])
        if isinstance(answer, dict):
            return answer
    except (ValueError, IndexError):
        pass
    raise DownloadError(f"huggingface_hub failed: {done.last_words()}")


def _failure(repository: Repository, answer: Mapping[str, Any]) -> Exception:
    title, kind = repository.title, answer["error"]
    token = {
        "none": "no token is set (HF_TOKEN, or: hf auth login)",
        "stored": "the token of the stored login was used",
    }.get(answer["token"], f"the token in {answer['token']} was used")
    detail = printable(" ".join(str(answer["detail"]).split()), 300)
    if kind == "name":
        return UsageError(f"{title}: no such file, and no name of a repository on the hub")
    if kind == "disk":
        return OutputError(f"{title}: cannot be downloaded: {detail}")
    return DownloadError(
        {
            "gated": f"{title}: gated; ask for access on its page on the hub; {token}",
            "not found": f"{title}: neither a file here nor a repository on the hub, or a private "
            f"one; {token}",
            "refused": f"{title}: the hub refuses access; {token}",
            "revision": f"{repository.name}: no revision {repository.revision} on the hub",
            "offline": f"{title}: no whole copy is cached, and the hub cannot be reached: {detail}",
        }.get(kind, f"{title}: cannot be downloaded: {detail}; what is whole is kept, try again")
    )
