"""The tiny models, built once a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import models
import pytest

pytest.register_assert_rewrite("support")


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Device profiles of the tests go where the user's own are not."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def llama_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build(tmp_path_factory.mktemp("llama") / "llama.gguf")


@pytest.fixture(scope="session")
def rows_576_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build_576(tmp_path_factory.mktemp("rows") / "rows576.gguf")


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build_moe(tmp_path_factory.mktemp("moe") / "moe.gguf")


@pytest.fixture(scope="session")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return models.split(models.build(tmp_path_factory.mktemp("split") / "parts.gguf"), 3)
