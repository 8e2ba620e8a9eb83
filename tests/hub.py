"""A hub on this machine, as far as huggingface_hub asks: one repository, with its faults."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `folder` as `repository`.

    `cut`: files whose first answer is broken off half-way; `stalled`: those that stop there.
    """

    daemon_threads = True

    def __init__(self, folder: Path, repository: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.repository = folder, repository
        self.commit, self.is_gated, self.is_private = COMMIT, False, False
        self.cut: set[str] = set()
        self.stalled: set[str] = set()
        self.is_stalling, self.is_closing = threading.Event(), threading.Event()
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.tokens: set[str | None] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self, name: str) -> list[str | None]:
        """The range of each request for the file, None for all of it."""
        return [
            span for how, path, span in self.asked if how == "GET" and path.endswith(f"/{name}")
        ]


@contextmanager
def serving(folder: Path, repository: str) -> Iterator[Hub]:
    with Hub(folder, repository) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            hub.is_closing.set()
            hub.shutdown()
            thread.join()


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        hub.tokens.add(self.headers.get("Authorization"))
        name = re.escape(hub.repository)
        if not re.match(rf"/(api/models/)?{name}(/|$)", path) or hub.is_private:
            self._refuse(401, "RepoNotFound")
        elif match := re.fullmatch(rf"/api/models/{name}(?:/revision/([^/]+))?", path):
            known = match[1] in (None, "main", hub.commit)
            self._json(self._info()) if known else self._refuse(404, "RevisionNotFound")
        elif re.fullmatch(rf"/api/models/{name}/tree/{hub.commit}", path):
            self._json([{"type": "file", "path": f["rfilename"], **self._entry(f)}
                        for f in self._info()["siblings"]])  # fmt: skip
        elif match := re.fullmatch(rf"/{name}/resolve/{hub.commit}/([^/]+)", path):
            self._file(hub.folder / match[1])
        else:
            self._refuse(404, "EntryNotFound")

    @staticmethod
    def _entry(sibling: dict[str, Any]) -> dict[str, Any]:
        entry = {"oid": sibling["blobId"], "size": sibling["size"]}
        if "lfs" in sibling:
            lfs = sibling["lfs"]
            entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 130}
        return entry

    def _info(self) -> dict[str, Any]:
        siblings = []
        for path in sorted(self.server.folder.iterdir()):
            size = path.stat().st_size
            found = {"rfilename": path.name, "size": size, "blobId": _digest(path)[:40]}
            if path.suffix == ".safetensors":
                found["lfs"] = {"sha256": _digest(path), "size": size, "pointerSize": 130}
            siblings.append(found)
        gated = "manual" if self.server.is_gated else False
        return {"id": self.server.repository, "sha": self.server.commit, "private": False,
                "gated": gated, "siblings": siblings, "tags": [], "downloads": 0,
                "likes": 0}  # fmt: skip

    def _file(self, path: Path) -> None:
        if self.server.is_gated:
            return self._refuse(403, "GatedRepo")
        if not path.exists():
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(span[1]) if span else 0
        self.send_response(206 if start else 200)
        digest = _digest(path) if path.suffix == ".safetensors" else _digest(path)[:40]
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            size = len(content)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            part = content[start:]
            if path.name in self.server.cut:
                self.server.cut.remove(path.name)
                part, self.close_connection = part[: len(part) // 2], True
            if path.name in self.server.stalled:
                self.wfile.write(part[: len(part) // 2])
                self.server.is_stalling.set()
                self.server.is_closing.wait()
                return None
            self.wfile.write(part)
        return None

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: int, word: str) -> None:
        self._send(code, b"{}", {"X-Error-Code": word, "X-Error-Message": word})

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
