"""Records as JSON files and back, and the folder that a model's records are kept in."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from gguf import GGUFWriter

from apreqel import artifacts, workspace
from apreqel.artifacts import Provenance, Record, from_json, plain
from apreqel.errors import ArtifactError, LockedError, UnsupportedModelError, UsageError
from apreqel.model.inventory import DEMO
from apreqel.workspace import opened

SHA = "0" * 64


@pytest.fixture(autouse=True)
def schema_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(artifacts.SCHEMA_VERSIONS, "experiment", 7)


@dataclass(frozen=True)
class Reading:
    seconds: float
    interval: tuple[float, float]
    note: str | None = None


@dataclass(frozen=True)
class Part:
    name: str
    readings: Mapping[str, Reading]
    first: Reading | None = None


@dataclass(frozen=True)
class Measured(Record):
    KIND = "experiment"

    count: int
    is_whole: bool
    parts: Sequence[Part]
    shape: tuple[int, ...] = ()
    scales: Mapping[str, Sequence[float]] = field(default_factory=dict)
    best: Reading | None = None
    settings: Any = None


def measured() -> Measured:
    reading = Reading(0.25, (0.125, 0.5), "warm")
    return Measured(
        Provenance(SHA, "b1", "f00d", {"n_ctx": 64}, 3),
        count=2,
        is_whole=False,
        parts=[
            Part("a", {"Q8_0": reading, "Q4_0": Reading(1.5, (1.0, 2.0))}, first=reading),
            Part("b", {}),
        ],
        shape=(3, 4, 5),
        scales={"x": [1.0, 2.5], "y": []},
        best=None,
        settings={"any": ["thing", None, 1]},
    )


def damaged(path: Path, at: Sequence[str | int], **change: object) -> None:
    """Set fields of the saved record's data below `at`; a field set to `...` is taken out."""
    document = json.loads(path.read_text())
    place = document["data"]
    for key in at:
        place = place[key]
    for name, value in change.items():
        if value is ...:
            del place[name]
        else:
            place[name] = value
    path.write_text(json.dumps(document))


# --- there and back ------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path, made = tmp_path / "folder" / "r.json", measured()
    made.save(path)
    found = Measured.load(path, SHA)
    assert found == made
    assert type(found) is Measured and type(found.provenance) is Provenance
    part = found.parts[0]
    assert type(part) is Part and type(part.readings["Q4_0"]) is Reading
    assert type(part.first) is Reading and type(part.first.interval) is tuple
    assert type(found.shape) is tuple and found.parts[1].first is None
    # The file is the documented one, with every field under its own name.
    document = json.loads(path.read_text())
    assert document["kind"] == "apreqel experiment"
    assert document["schema_version"] == 7
    assert document["provenance"]["seed"] == 3
    assert set(document["data"]) == {f.name for f in fields(Measured)} - {"provenance"}
    assert document["data"]["parts"][0]["readings"]["Q8_0"] == {
        "seconds": 0.25,
        "interval": [0.125, 0.5],
        "note": "warm",
    }


def test_fields_with_a_default_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    measured().save(path)
    damaged(path, [], shape=..., scales=..., settings=...)
    damaged(path, ["parts", 0], first=...)
    found = Measured.load(path)
    assert (found.shape, found.scales, found.settings) == ((), {}, None)
    assert found.parts[0].first is None and found.parts[0].name == "a"


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    """As other programs write 2.0; but no number is a truth value, and no 2.5 is a count."""
    path = tmp_path / "r.json"
    measured().save(path)
    damaged(path, ["parts", 0, "first"], seconds=2, interval=[1, 3])
    first = Measured.load(path).parts[0].first
    assert first is not None and (first.seconds, first.interval) == (2.0, (1.0, 3.0))
    for kind, value in ((int, 2.5), (int, 2.0), (float, True), (int, True), (bool, 1)):
        with pytest.raises(TypeError, match=r"^x is "):
            from_json(kind, value, "x")


def test_plain_is_json(tmp_path: Path) -> None:
    made = {"at": tmp_path, 8: (1, 2), "r": Reading(1.0, (0.5, 2.0))}
    assert plain(made) == {
        "at": str(tmp_path),
        "8": [1, 2],
        "r": {"seconds": 1.0, "interval": [0.5, 2.0], "note": None},
    }
    assert plain(Reading) is Reading  # a class is no record


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "change", "named"),
    [
        ([], {"count": ...}, "'count'"),
        ([], {"more": 1}, "'more'"),
        ([], {"count": "2"}, "count is '2'"),
        ([], {"count": 2.5}, "count is 2.5"),
        ([], {"is_whole": 1}, "is_whole is 1"),
        ([], {"parts": {"a": 1}}, "parts is {'a': 1}"),
        ([], {"parts": [7]}, "parts is 7"),
        ([], {"shape": [3, "4"]}, "shape is '4'"),
        ([], {"scales": [1.0]}, "scales is [1.0]"),
        ([], {"scales": {"x": [1.0, None]}}, "scales.x is None"),
        ([], {"best": "fast"}, "best is 'fast'"),
        (["parts", 0], {"name": ...}, "'name'"),
        (["parts", 0], {"name": None}, "parts.name is None"),
        (["parts", 0, "readings", "Q8_0"], {"seconds": ...}, "'seconds'"),
        (["parts", 0, "readings", "Q8_0"], {"bias": 0.5}, "'bias'"),
        (["parts", 0, "readings", "Q8_0"], {"seconds": "1"}, "parts.readings.Q8_0.seconds is '1'"),
        (["parts", 0, "readings", "Q8_0"], {"note": 4}, "parts.readings.Q8_0.note is 4"),
        (["parts", 0, "readings", "Q8_0"], {"interval": [1, "2"]}, "Q8_0.interval is '2'"),
    ],
)
def test_a_damaged_field_is_named(
    at: list[str | int], change: dict[str, object], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    measured().save(path)
    damaged(path, at, **change)
    with pytest.raises(ArtifactError) as caught:
        Measured.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: experiment is damaged (") and message.endswith("delete it")
    assert named in message


def test_an_interval_of_three_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    measured().save(path)
    damaged(path, ["parts", 0, "first"], interval=[1.0, 2.0, 3.0])
    with pytest.raises(ArtifactError, match="experiment is damaged"):
        Measured.load(path)


def test_another_files_record_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "r.json", "1" * 64
    with pytest.raises(ArtifactError, match="no such experiment file"):
        Measured.load(path)
    measured().save(path)
    with pytest.raises(ArtifactError, match="made for the model with SHA-256 000000000000, this"):
        Measured.load(path, other)
    good = json.loads(path.read_text())
    for change, message in (
        ({"kind": "apreqel plan"}, "field kind is 'apreqel plan', expected 'apreqel experiment'"),
        ({"schema_version": 0}, "schema_version 0; this apreqel reads 7"),
        ({"provenance": {"seed": 1}}, "provenance or data is damaged .*model_sha256"),
        ({"data": [1]}, "experiment is damaged"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ArtifactError, match=message):
            Measured.load(path)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="not a readable experiment file"):
        Measured.load(path)


# --- the folder ----------------------------------------------------------------------------------


@pytest.fixture
def model(llama_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(llama_model, tmp_path / "tiny.gguf"))


def test_the_folder_is_beside_the_model_or_where_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(str(model), None, allow_requantize=False) as space:
        assert space.folder == tmp_path / "tiny.gguf.apreqel" and space.folder.is_dir()
        assert space.model == space.inventory.files[0] == model
        assert not space.allow_requantize and not space.tune_threads
    asked = tmp_path / "a" / "b"
    said: list[str] = []
    with opened(
        str(model), asked, allow_requantize=True, progress=lambda what, *_: said.append(what)
    ) as space:
        assert space.folder == asked and space.allow_requantize
        space.progress("weighing", 1, 2)
    assert said == ["weighing"]
    # The demo's model lies in an installed package, so its folder is where one works.
    monkeypatch.setattr(workspace, "find_model", lambda name: model)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with opened(DEMO, None, allow_requantize=False) as space:
        assert space.folder == tmp_path / "work" / "tiny.gguf.apreqel"


def test_one_at_a_time_in_a_folder(model: Path, tmp_path: Path) -> None:
    with opened(str(model), None, allow_requantize=False):
        with (
            pytest.raises(LockedError, match=r"tiny\.gguf\.apreqel/\.lock: another apreqel"),
            opened(str(model), None, allow_requantize=False),
        ):
            pass
        with opened(str(model), tmp_path / "other", allow_requantize=False):
            pass
    with pytest.raises(ZeroDivisionError), opened(str(model), None, allow_requantize=False):
        _ = 1 / 0
    with opened(str(model), None, allow_requantize=False):  # free again, after an error too
        pass


def test_the_hash_is_kept_until_the_file_changes(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sha256() -> str:
        with opened(str(model), None, allow_requantize=False) as space:
            return space.sha256

    first = sha256()
    assert first == hashlib.sha256(model.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "file_sha256", lambda path: pytest.fail("hashed again"))
        assert sha256() == first
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    assert sha256() == hashlib.sha256(content).hexdigest() != first
    # A kept hash that cannot be read is made anew.
    (model.parent / "tiny.gguf.apreqel" / "model-hash.json").write_text("{}")
    assert sha256() == hashlib.sha256(content).hexdigest()


def test_shards_have_one_hash(split_model: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copy(path, tmp_path)) for path in split_model]
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in copies)
    with opened(str(copies[0]), None, allow_requantize=False) as space:
        assert space.sha256 == hashlib.sha256(digests.encode()).hexdigest()
        assert space.folder.name == f"{copies[0].name}.apreqel"


def test_what_cannot_be_worked_on_leaves_no_folder(tmp_path: Path) -> None:
    quantised = models.build(tmp_path / "q8.gguf", kind="Q8_0", n_layer=1)
    with (
        pytest.raises(UnsupportedModelError, match="already quantised"),
        opened(str(quantised), None, allow_requantize=False),
    ):
        pass
    bare = tmp_path / "bare.gguf"
    writer = GGUFWriter(str(bare), "llama")
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (
        pytest.raises(UsageError, match="no tensor that can be quantised"),
        opened(str(bare), None, allow_requantize=False),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.gguf", "q8.gguf"]
    with opened(str(quantised), None, allow_requantize=True) as space:
        assert space.inventory.is_quantized_source
