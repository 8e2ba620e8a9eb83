"""The C quantiser against llama_model_quantize, byte for byte, and against what can fail."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import models
import numpy as np
import pytest
from support import made_up_imatrix, tensor_bytes, uniform

from apreqel import artifacts, quantize
from apreqel.artifacts import lock
from apreqel.errors import (
    CalibrationError,
    Interrupted,
    LockedError,
    ModelFileError,
    OutputError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from apreqel.llama import engine, quants
from apreqel.llama.stock import stock_quantize
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.model.qtypes import registry

QUANT_TYPES = [q.name for q in registry().values() if q.is_quantized and q.for_weights]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def expect_same_as_llama(model: Path, kind: str, folder: Path, with_imatrix: bool = True) -> None:
    inventory = read_inventory(model)
    imatrix = made_up_imatrix(inventory) if with_imatrix else None
    types = uniform(inventory, kind)
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    quantize.quantize_model(inventory, types, ours, imatrix=imatrix, n_threads=2)
    kinds = registry()
    patterns = [(f"^{t.name}$", kinds[types[t.name]].ggml_id) for t in inventory.quantizable]
    weights = {n: imatrix.weights(n) for n in imatrix.entries} if imatrix else {}
    stock_quantize(model, theirs, "Q8_0", imatrix=weights, n_threads=2, tensor_types=patterns)
    assert tensor_bytes(ours) == tensor_bytes(theirs)
    assert ours.stat().st_size == inventory.output_size(types) == theirs.stat().st_size


@pytest.mark.parametrize("kind", QUANT_TYPES)
def test_bytes_equal_llama_cpps(kind: str, llama_model: Path, tmp_path: Path) -> None:
    if not quants.supports(registry()[kind]):
        pytest.skip(f"this llama.cpp has no {kind}")
    expect_same_as_llama(llama_model, kind, tmp_path)


@pytest.mark.parametrize("kind", ["Q4_K", "IQ3_S", "Q5_1", "IQ2_XS"])
def test_experts_have_their_own_imatrix(kind: str, moe_model: Path, tmp_path: Path) -> None:
    expect_same_as_llama(moe_model, kind, tmp_path)


@pytest.mark.parametrize("source", ["F32", "BF16"])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16"])
def test_other_sources(source: str, kind: str, tmp_path: Path) -> None:
    model = models.build(tmp_path / "source.gguf", kind=source)
    if kind == "F16" and source == "BF16":
        pytest.skip("F16 is not offered for a BF16 source")
    expect_same_as_llama(model, kind, tmp_path)


def test_without_imatrix(llama_model: Path, tmp_path: Path) -> None:
    expect_same_as_llama(llama_model, "Q4_K", tmp_path, with_imatrix=False)


def test_result_does_not_depend_on_threads_and_runs(rows_576_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(rows_576_model)
    types = uniform(inventory, "Q5_1") | {"blk.0.ffn_down.weight": "IQ3_XXS"}
    digests = set()
    for threads in (1, 2, 5):
        output = tmp_path / f"{threads}.gguf"
        quantize.quantize_model(
            inventory, types, output, imatrix=made_up_imatrix(inventory), n_threads=threads
        )
        digests.add(sha256(output))
    assert len(digests) == 1
    with engine.LoadedModel(output) as model, model.context(32, 1, 2) as context:
        logits = context.evaluate(*np.arange(64, dtype=np.int32).reshape(2, 1, 32) % 32)
        assert np.isfinite(logits).all()


def test_shards_become_one_file(split_model: list[Path], tmp_path: Path) -> None:
    whole = split_model[0].with_name("parts.gguf")
    for source, name in ((whole, "a.gguf"), (split_model[0], "b.gguf")):
        inventory = read_inventory(source)
        quantize.quantize_model(inventory, uniform(inventory, "Q4_0"), tmp_path / name, n_threads=2)
    assert tensor_bytes(tmp_path / "a.gguf") == tensor_bytes(tmp_path / "b.gguf")


# --- refused before anything is written ----------------------------------------------------------


def expect_refused(
    error: type[Exception],
    match: str,
    inventory: Inventory,
    types: dict[str, str],
    output: Path,
    **options: object,
) -> None:
    before = output.read_bytes() if output.is_file() else None
    with pytest.raises(error, match=match):
        quantize.quantize_model(inventory, types, output, **options)  # type: ignore[arg-type]
    assert (output.read_bytes() if output.is_file() else None) == before
    assert not list(output.parent.glob(".*.part"))


def test_maps_that_do_not_fit(llama_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(llama_model)
    own, output = inventory.types, tmp_path / "o.gguf"
    expect_refused(
        UsageError,
        "not in the model, first 'blk.9.x'",
        inventory,
        own | {"blk.9.x": "Q8_0"},
        output,
    )
    short = dict(own)
    del short["blk.1.ffn_up.weight"]
    expect_refused(
        UsageError, "leaves out 1 tensors, first 'blk.1.ffn_up.weight'", inventory, short, output
    )
    expect_refused(
        UsageError,
        "must stay F32: one-dimensional",
        inventory,
        own | {"output_norm.weight": "Q8_0"},
        output,
    )
    expect_refused(
        CalibrationError,
        "IQ2_XXS needs an imatrix",
        inventory,
        own | {"blk.0.ffn_up.weight": "IQ2_XXS"},
        output,
    )


def test_rows_too_odd_for_a_type(rows_576_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(rows_576_model)
    types = inventory.types | {"blk.0.attn_q.weight": "Q4_K"}
    expect_refused(
        UsageError,
        "cannot hold rows of 576; it can be .*Q5_1",
        inventory,
        types,
        tmp_path / "o.gguf",
    )


def test_output_that_exists_or_is_the_input(llama_model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(llama_model, tmp_path / "m.gguf"))
    inventory = read_inventory(source)
    types = uniform(inventory, "Q8_0")
    (tmp_path / "link.gguf").symlink_to(source)
    os.link(source, tmp_path / "hard.gguf")
    for name in ("m.gguf", "link.gguf", "hard.gguf"):
        expect_refused(OutputError, "is the input", inventory, types, tmp_path / name, force=True)
    there = tmp_path / "there.gguf"
    there.write_bytes(b"precious")
    expect_refused(OutputError, "exists; use --force", inventory, types, there)
    quantize.quantize_model(inventory, types, there, force=True)
    assert read_inventory(there).by_name["output.weight"].qtype.name == "Q8_0"
    expect_refused(OutputError, "is a folder", inventory, types, tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    expect_refused(OutputError, "is a device or a pipe", inventory, types, pipe, force=True)


def test_quantised_source_is_refused(tmp_path: Path) -> None:
    inventory = read_inventory(models.build(tmp_path / "q8.gguf", kind="Q8_0"))
    types = uniform(inventory, "Q4_0")
    expect_refused(
        UnsupportedModelError, "already quantised", inventory, types, tmp_path / "o.gguf"
    )
    quantize.quantize_model(inventory, types, tmp_path / "o.gguf", allow_requantize=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["Q4_0", "F16"])
def test_nan_names_tensor_and_row(bad: float, kind: str, llama_model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(llama_model, tmp_path / "m.gguf"))
    inventory = read_inventory(source)
    tensor = inventory.by_name["blk.1.ffn_down.weight"]
    values = np.memmap(source, np.float16, "r+", tensor.offset, (tensor.n_rows, tensor.row_length))
    values[137, 5] = bad
    values.flush()
    expect_refused(
        ModelFileError,
        r"tensor blk.1.ffn_down.weight: row 137: NaN or Inf",
        inventory,
        uniform(inventory, kind),
        tmp_path / "o.gguf",
    )


def test_source_cut_while_in_use(llama_model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(llama_model, tmp_path / "m.gguf"))
    inventory = read_inventory(source)
    os.truncate(source, source.stat().st_size // 2)
    expect_refused(
        ModelFileError,
        "changed while in use",
        inventory,
        uniform(inventory, "Q8_0"),
        tmp_path / "o.gguf",
    )


def test_no_space_is_found_before_the_start(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    inventory = read_inventory(llama_model)
    expect_refused(
        OutputError, "needs .* MB of disk", inventory, inventory.types, tmp_path / "o.gguf"
    )


def test_write_error_leaves_nothing(llama_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(llama_model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        expect_refused(
            OutputError,
            "cannot hold a file of this size",
            inventory,
            uniform(inventory, "Q8_0"),
            tmp_path / "o.gguf",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize(
    ("fault", "error"),
    [(VerificationError("wrong"), VerificationError), (KeyboardInterrupt(), Interrupted)],
)
@pytest.mark.parametrize("before", [None, b"precious"])
def test_a_file_that_is_not_checked_never_appears(
    fault: BaseException,
    error: type[Exception],
    before: bytes | None,
    llama_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inventory, output = read_inventory(llama_model), tmp_path / "o.gguf"
    if before is not None:
        output.write_bytes(before)

    def check(_: object, __: object, path: Path) -> None:
        assert path.exists() and path != output
        raise fault

    monkeypatch.setattr(quantize, "check_written", check)
    expect_refused(
        error, "wrong|stopped", inventory, uniform(inventory, "Q8_0"), output, force=True
    )
    assert list(tmp_path.iterdir()) == ([] if before is None else [output])


def without_links(*_: object) -> None:
    raise PermissionError(errno.EPERM, "a file system without hard links")


@pytest.mark.parametrize("has_links", [True, False])
def test_what_appears_meanwhile_is_kept(
    has_links: bool, llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory, output = read_inventory(llama_model), tmp_path / "o.gguf"
    types, check = uniform(inventory, "Q8_0"), quantize.check_written
    if not has_links:
        monkeypatch.setattr(os, "link", without_links)
    quantize.quantize_model(inventory, types, output)
    quantize.check_written(inventory, types, output)
    assert list(tmp_path.iterdir()) == [output]

    def meanwhile(*job: object) -> None:
        check(*job)  # type: ignore[arg-type]
        (tmp_path / "p.gguf").write_bytes(b"precious")

    monkeypatch.setattr(quantize, "check_written", meanwhile)
    with pytest.raises(OutputError, match="exists; use --force"):
        quantize.quantize_model(inventory, types, tmp_path / "p.gguf")
    assert (tmp_path / "p.gguf").read_bytes() == b"precious"
    quantize.quantize_model(inventory, types, tmp_path / "p.gguf", force=True)
    assert sha256(tmp_path / "p.gguf") == sha256(output)
    assert sorted(tmp_path.iterdir()) == [output, tmp_path / "p.gguf"]


def test_a_rename_that_fails_leaves_no_empty_file(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", without_links)
    monkeypatch.setattr(os, "replace", broken)
    inventory = read_inventory(llama_model)
    with pytest.raises(OutputError, match="Input/output error; check the disk"):
        quantize.quantize_model(inventory, inventory.types, tmp_path / "o.gguf")
    assert not list(tmp_path.iterdir())


def test_a_stale_or_planted_temporary_file_is_not_followed(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory, output = read_inventory(llama_model), tmp_path / "o.gguf"
    types, part = uniform(inventory, "Q8_0"), tmp_path / ".o.gguf.part"
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    part.symlink_to(victim)
    quantize.quantize_model(inventory, types, output)
    assert victim.read_bytes() == b"precious" and not output.is_symlink()
    part.write_bytes(b"of a run that was killed")
    quantize.quantize_model(inventory, types, output, force=True)
    assert sorted(tmp_path.iterdir()) == [output, victim]
    whole = sha256(output)
    monkeypatch.setattr(artifacts, "require_space", lambda *_: part.symlink_to(victim))
    with pytest.raises(OutputError, match=r"cannot make .*File exists"):
        quantize.quantize_model(inventory, types, output, force=True)
    assert victim.read_bytes() == b"precious" and sha256(output) == whole


def test_a_full_temporary_folder_or_a_lost_source_is_told(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copy(llama_model, tmp_path / "m.gguf"))
    inventory, output = read_inventory(source), tmp_path / "o.gguf"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(quantize._Job, "write", full)
        expect_refused(OutputError, "apreqel-.*: No space", inventory, inventory.types, output)
    run = quantize._run

    def then_lose_the_source(*arguments: object) -> object:
        report = run(*arguments)  # type: ignore[arg-type]
        source.unlink()
        return report

    monkeypatch.setattr(quantize, "_run", then_lose_the_source)
    expect_refused(VerificationError, r"m\.gguf: No such file", inventory, inventory.types, output)


def test_a_message_may_hold_a_long_path_in_any_script(llama_model: Path, tmp_path: Path) -> None:
    for start in ("", "a", "aa"):
        folder = tmp_path.joinpath(*[start + 80 * "語"] * 5)
        folder.mkdir(parents=True)
        source = Path(shutil.copy(llama_model, folder / "m.gguf"))
        inventory = read_inventory(source)
        os.truncate(source, source.stat().st_size - 1)
        expect_refused(
            ModelFileError,
            "changed while in use: .*語",
            inventory,
            uniform(inventory, "Q8_0"),
            tmp_path / "o.gguf",
        )


def test_a_path_that_is_not_utf8(llama_model: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe8"))
    folder.mkdir()
    inventory = read_inventory(Path(shutil.copy(llama_model, folder / "m.gguf")))
    types = uniform(inventory, "Q8_0")
    quantize.quantize_model(inventory, types, folder / "o.gguf")
    quantize.check_written(inventory, types, folder / "o.gguf")


def test_a_name_as_long_as_names_may_be(llama_model: Path, tmp_path: Path) -> None:
    inventory, name = read_inventory(llama_model), "ü" * 125 + ".gguf"
    quantize.quantize_model(inventory, inventory.types, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_second_run_on_one_output_stops(llama_model: Path, tmp_path: Path) -> None:
    inventory, output = read_inventory(llama_model), tmp_path / "o.gguf"
    code = (
        "import sys; from pathlib import Path; from apreqel.artifacts import lock\n"
        f"with lock(Path({str(output.with_name('.o.gguf.lock'))!r})): print('held', flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        expect_refused(LockedError, "another apreqel", inventory, inventory.types, output)
        holder.communicate()
    with lock(tmp_path / ".free"):
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.raises(OutputError, match="No locks available; this file system has no locks"),
        lock(tmp_path / ".lock"),
    ):
        pass


def test_a_lock_file_that_its_holder_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = tmp_path / ".lock", fcntl.flock

    def flock_after_the_holder(*arguments: object) -> None:
        path.unlink()
        flock(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock_after_the_holder)
    with pytest.raises(LockedError, match="another apreqel"), lock(path):
        pass


def a_program(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a shell script in the C program's place."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(quantize, "program_path", lambda: path)
    return path


def test_the_program_holds_the_lock_when_it_outlives_its_parent(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory, output = read_inventory(llama_model), tmp_path / "o.gguf"
    with monkeypatch.context() as patch:
        slow = a_program(tmp_path / "slow", f"echo > {tmp_path}/started; exec sleep 2", patch)
    script = (
        "import sys; from pathlib import Path; from apreqel import quantize\n"
        "from apreqel.model.inventory import read_inventory\n"
        "i = read_inventory(Path(sys.argv[1])); quantize.program_path = lambda: Path(sys.argv[3])\n"
        "quantize.quantize_model(i, i.types, Path(sys.argv[2]))"
    )
    with subprocess.Popen([sys.executable, "-c", script, llama_model, output, slow]) as parent:
        while not (tmp_path / "started").exists():
            assert parent.poll() is None
            time.sleep(0.01)
        parent.kill()
    expect_refused(LockedError, "another apreqel", inventory, inventory.types, output)
    time.sleep(2.5)
    quantize.quantize_model(inventory, inventory.types, output)


def test_the_program_is_ended_where_progress_raises(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = '{"event":"progress","done_bytes":1,"total_bytes":2,"tensor":"blk"}'
    a_program(tmp_path / "slow", f"echo '{report}'; exec sleep 60", monkeypatch)
    inventory, seen = read_inventory(llama_model), []

    def progress(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))
        raise BrokenPipeError

    started = time.monotonic()
    with pytest.raises(BrokenPipeError):
        quantize.quantize_model(inventory, inventory.types, tmp_path / "o.gguf", progress=progress)
    assert seen == [("quantising", 1, 2)] and time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == [tmp_path / "slow"]


def test_kill_leaves_the_old_file_or_the_new(rows_576_model: Path, tmp_path: Path) -> None:
    inventory, output = read_inventory(rows_576_model), tmp_path / "o.gguf"
    script = (
        "import sys; from pathlib import Path; from apreqel import quantize\n"
        "from apreqel.model.inventory import read_inventory\n"
        "i = read_inventory(Path(sys.argv[1]))\n"
        "t = {t.name: 'Q5_1' if t.keep_reason is None else t.qtype.name for t in i.tensors}\n"
        "print('go', flush=True); quantize.quantize_model(i, t, Path(sys.argv[2]), force=True)"
    )
    output.write_bytes(b"old")
    delays = random.Random(3)
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", script, rows_576_model, output],
            stdout=subprocess.PIPE,
            cwd=tmp_path,  # the installed package, not a checkout without the C program
        ) as child:
            assert child.stdout is not None and child.stdout.readline()
            time.sleep(delays.uniform(0, 0.5))
            child.send_signal(signal.SIGKILL)
        if output.read_bytes() != b"old":
            quantize.check_written(inventory, uniform(inventory, "Q5_1"), output)
    time.sleep(0.5)  # the orphaned C program ends by itself
    quantize.quantize_model(inventory, uniform(inventory, "Q5_1"), output, force=True)


def test_check_written_sees_a_wrong_byte(llama_model: Path, tmp_path: Path) -> None:
    inventory, output = read_inventory(llama_model), tmp_path / "o.gguf"
    types = uniform(inventory, "Q8_0") | {"output.weight": "F16"}
    quantize.quantize_model(inventory, types, output)
    with pytest.raises(VerificationError, match=r"expected .*'Q4_0'"):
        quantize.check_written(inventory, types | {"blk.0.attn_k.weight": "Q4_0"}, output)
    place = read_inventory(output).by_name["output.weight"].offset + 4321
    content = bytearray(output.read_bytes())
    content[place] ^= 1
    output.write_bytes(content)
    with pytest.raises(VerificationError, match=r"output.weight differs from the source"):
        quantize.check_written(inventory, types, output)
