"""llama-cpp-python's own server, which speaks OpenAI's protocol, on a file as it was planned for.

It runs in this process and takes nothing from the environment: its settings are also read from
variables as common as HOST, PORT, MODEL and CACHE, which may mean something else here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apreqel.errors import EngineError, UsageError
from apreqel.llama.library import library, reason

# Read by the server wherever it is started.
_ITS_OTHER_VARIABLES = ("CONFIG_FILE", "HOST", "PORT")


def serve(
    path: Path,
    keywords: Mapping[str, int | bool],
    host: str,
    port: int,
    announce: Callable[[int], None],
) -> None:
    """Serve `path` until the process is stopped; `announce` is told the port once it is loaded.

    `keywords` are those of `llama_cpp.Llama`; port 0 takes a free one. Raises UsageError where
    the address cannot be had, EngineError where the server is missing or the model cannot be
    loaded.
    """
    uvicorn, app, settings = _server()
    library()
    _clear_environment(settings.Settings.model_fields)
    with _listening(host, port) as listener:
        bound = int(listener.getsockname()[1])
        model = settings.ModelSettings(
            model=str(path),
            model_alias=path.name,
            # All logits would be kept otherwise: vocabulary times context, which was not planned.
            logits_all=False,
            verbose=False,
            **keywords,
        )
        try:
            application = app.create_app(
                server_settings=settings.ServerSettings(host=host, port=bound),
                model_settings=[model],
            )
        except ValueError as error:  # what llama_cpp.Llama raises
            raise EngineError(f"{path}: the server cannot load it: {reason()}") from error
        try:
            announce(bound)
            configuration = uvicorn.Config(application, log_level="warning")
            uvicorn.Server(configuration).run(sockets=[listener])
        finally:
            # Freed by Python's own end it would call our log, which is gone by then.
            app._llama_proxy.free()


def _server() -> tuple[Any, Any, Any]:
    """uvicorn, and the server's application and settings. Raises EngineError."""
    try:
        import uvicorn
        from llama_cpp.server import app, settings
    except ImportError as error:
        raise EngineError(
            f"the server is not installed ({error}); run: pip install 'apreqel[server]'"
        ) from error
    return uvicorn, app, settings


def _clear_environment(fields: Mapping[str, object]) -> None:
    """Without regard to capitals, as pydantic-settings looks for them."""
    names = {name.lower() for name in (*fields, *_ITS_OTHER_VARIABLES)}
    for variable in [v for v in os.environ if v.lower() in names]:
        del os.environ[variable]


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{host}:{port}: {why}; choose another --port, or --port 0 for a free one"
        ) from error
