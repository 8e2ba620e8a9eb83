"""The C program alone: no warnings, no sanitizer findings, no job table that it believes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import made_up_imatrix, tensor_bytes, uniform

from apreqel import quantize
from apreqel.errors import ApreqelError, EngineError, ModelFileError, OutputError
from apreqel.model.imatrix import Imatrix
from apreqel.model.inventory import read_inventory

SOURCES = sorted((Path(__file__).parent.parent / "tools").glob("*.c"))
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("c") / "apreqel-quantize"
    command = [str(COMPILER), "-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = subprocess.run(
        [*command, "-o", program, *SOURCES, "-lpthread", "-ldl"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, job: Path) -> subprocess.CompletedProcess[str]:
    # ggml keeps its tables and dlopen its library until the process ends: no leaks of ours.
    options = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, job], capture_output=True, text=True, env=options, timeout=120)


def job_table(model: Path, folder: Path, kind: str, imatrix: Imatrix | None = None) -> Path:
    inventory, types = read_inventory(model), uniform(read_inventory(model), kind)
    job = quantize._job_of(inventory, types, imatrix, (), 3, second_moments(model, kind, folder))
    return job.write(folder, folder / "o.gguf")


def second_moments(model: Path, kind: str, folder: Path) -> dict[str, Path]:
    """Of all tensors that can be rounded by them in `kind`, made up."""
    found, types = {}, uniform(read_inventory(model), kind)
    for tensor in read_inventory(model).quantizable:
        if types[tensor.name] in quantize.ROUNDED_TYPES:
            path = found[tensor.name] = folder / f"moments-{tensor.row_length}"
            x = np.random.default_rng(0).normal(size=(256, tensor.row_length))
            (x.T @ x + np.eye(tensor.row_length)).astype(np.float32).tofile(path)
    return found


@pytest.mark.parametrize("kind", [*quantize.ROUNDED_TYPES, "IQ3_S"])
def test_a_whole_job_under_sanitizers(
    kind: str, sanitized: Path, moe_model: Path, tmp_path: Path
) -> None:
    inventory = read_inventory(moe_model)
    imatrix = made_up_imatrix(inventory)
    done = run(sanitized, job_table(moe_model, tmp_path, kind, imatrix))
    assert (done.returncode, done.stderr) == (0, "")
    expected = tmp_path / "expected.gguf"
    moments = second_moments(moe_model, kind, tmp_path)
    assert moments or kind == "IQ3_S"
    quantize.quantize_model(
        inventory, uniform(inventory, kind), expected, imatrix=imatrix, moments=moments
    )
    assert tensor_bytes(tmp_path / "o.gguf") == tensor_bytes(expected)


def test_mutated_job_tables(sanitized: Path, llama_model: Path, tmp_path: Path) -> None:
    """Random damage to a good table: done or refused, never a crash, never a torn output."""
    job = job_table(llama_model, tmp_path, "Q4_0", made_up_imatrix(read_inventory(llama_model)))
    good = job.read_text().split("\n")
    dice = random.Random(11)
    numbers = [
        "0",
        "1",
        "-1",
        "31",
        "255",
        "256",
        "4096",
        "2147483648",
        str(2**62),
        str(2**63),
        "x",
    ]
    refused = 0
    for _ in range(120):
        lines = list(good)
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(lines))
            words = lines[at].split(" ")
            kind = dice.randrange(4)
            if kind == 0 and len(words) > 1:
                words[dice.randrange(1, len(words))] = dice.choice(numbers)
                lines[at] = " ".join(words)
            elif kind == 1:
                del lines[at]
            elif kind == 2:
                lines[at] = lines[at][: dice.randint(0, len(lines[at]))]
            else:
                lines.insert(at, dice.choice(good))
        # What a mutated table may write stays in this folder.
        text = "\n".join(
            f"temp {tmp_path}/temp.gguf" if line.startswith("temp ") else line for line in lines
        )
        job.write_text(text)
        (tmp_path / "temp.gguf").unlink(missing_ok=True)  # of a table that was still good
        done = run(sanitized, job)
        assert done.returncode in {0, *range(20, 27)}, (done.returncode, done.stderr, text)
        assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr
        if done.returncode:
            refused += 1
            assert json.loads(done.stdout.splitlines()[-1])["event"] == "error"
            assert not (tmp_path / "temp.gguf").exists()
    assert refused > 60


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("ggml", "/nowhere/libggml-base.so", "nowhere"),
        ("header", "/nowhere/header", "cannot be opened|open"),
        ("size", "64", "header|extent|end"),
        ("threads", "0", "bad threads"),
        ("alignment", "48", "not complete"),
    ],
)
def test_single_faults(
    field: str, value: str, reason: str, sanitized: Path, llama_model: Path, tmp_path: Path
) -> None:
    job = job_table(llama_model, tmp_path, "Q4_0")
    lines = [
        f"{field} {value}" if line.startswith(field + " ") else line
        for line in job.read_text().split("\n")
    ]
    job.write_text("\n".join(lines))
    done = run(sanitized, job)
    assert 20 <= done.returncode <= 26 and re.search(reason, done.stdout), done.stdout
    assert not (tmp_path / "o.gguf").exists()


def test_a_fault_is_told_with_its_place(sanitized: Path, llama_model: Path, tmp_path: Path) -> None:
    job = job_table(llama_model, tmp_path, "Q4_0")
    good = job.read_text()

    def report(old: str, new: str) -> dict[str, object]:
        damaged = re.sub(old, new, good, count=1, flags=re.MULTILINE)
        assert damaged != good
        job.write_text(damaged)
        return dict(json.loads(run(sanitized, job).stdout))

    error = {"event": "error", "code": 20}
    assert report("^threads .*", "threads 0") == error | {"line": 2, "message": "bad threads"}
    message = "its extent does not fit the files"
    beyond = report(r"^tensor 0 \d+", f"tensor 0 {2**40}")
    assert beyond == error | {"message": message, "tensor": "token_embd.weight"}
    nowhere = report("^header .*", "header /nowhere/h")
    assert nowhere == {**error, "code": 22, "message": "cannot open /nowhere/h", "errno": 2}


@pytest.mark.parametrize("start", ["", "a", "aa", "aaa"])
@pytest.mark.parametrize("character", ["é", "語", "𝕏", '"', "\x01"])
def test_long_names_are_cut_between_characters(
    start: str, character: str, sanitized: Path, llama_model: Path, tmp_path: Path
) -> None:
    name = start + 2000 * character
    job = job_table(llama_model, tmp_path, "Q4_0")
    good = job.read_text()
    job.write_text(
        re.sub(r"(?m)^(tensor 0) \d+ (.*) \S+$", rf"\1 {2**40} \2 {name}", good, count=1)
    )
    told = json.loads(run(sanitized, job).stdout)["tensor"]
    assert name.startswith(told) and len(told.encode()) >= 240 / 6
    job.write_text(good.replace(f"ggml {quantize.ggml_base_path()}", f"ggml /{name}"))
    message = json.loads(run(sanitized, job).stdout)["message"]
    assert f"/{start}{character}" in message


def test_text_that_is_not_utf8_cannot_break_the_report(
    sanitized: Path, llama_model: Path, tmp_path: Path
) -> None:
    job = job_table(llama_model, tmp_path, "Q4_0")
    good = job.read_bytes()
    for raw in (b"\xff\xfe", b'\xe8"\\', b'\xf0\x9f"', b"\x80\x80", b"a\xe8\xaa"):
        job.write_bytes(good.replace(b"\nggml /", b"\nggml /" + raw))
        done = subprocess.run([sanitized, job], capture_output=True)
        assert json.loads(done.stdout.decode("utf-8", "replace"))["code"] == 24, done


# --- what only a broken machine does -------------------------------------------------------------

FAULTS = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);

static int wanted(const char *fault, int number) {
    const char *asked = getenv("FAULT");
    errno = number;
    return asked && !strcmp(asked, fault);
}

/* The job's own files are read, and the header is written, from their start. */
ssize_t pread64(int fd, void *to, size_t n, off64_t at) {
    return at && wanted("pread", EIO) ? -1 : syscall(SYS_pread64, fd, to, n, at);
}

ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
    if (at && wanted("crash", 0)) {
        abort();
    }
    return at && wanted("pwrite", ENOSPC) ? -1 : syscall(SYS_pwrite64, fd, from, n, at);
}

int fsync(int fd) { return wanted("fsync", EIO) ? -1 : (int)syscall(SYS_fsync, fd); }

void *malloc(size_t n) { return n > 100000 && wanted("malloc", ENOMEM) ? NULL : __libc_malloc(n); }
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that goes before the C library and fails as the environment says."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.c").write_text(FAULTS)
    command = [str(COMPILER), "-shared", "-fPIC", "-O1", "-o", "faults.so", "faults.c"]
    if sys.platform != "linux" or subprocess.run(command, cwd=folder).returncode:
        pytest.skip("needs Linux with glibc")
    return folder / "faults.so"


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("pread", ModelFileError, r"cannot read .*\.gguf: Input/output error"),
        ("pwrite", OutputError, "cannot write .*: No space left on device; free some space"),
        ("fsync", OutputError, "cannot sync .*: Input/output error; check the disk"),
        ("malloc", EngineError, "^out of memory for .*; close other programs or use fewer threads"),
        ("crash", EngineError, "was ended by SIGABRT near tensor"),
    ],
)
def test_a_broken_machine_leaves_the_output_as_it_was(
    fault: str,
    error: type[ApreqelError],
    message: str,
    faults: Path,
    llama_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inventory, output = read_inventory(llama_model), tmp_path / "o.gguf"
    output.write_bytes(b"precious")
    monkeypatch.setenv("LD_PRELOAD", str(faults))
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(error, match=message):
        quantize.quantize_model(inventory, uniform(inventory, "Q4_0"), output, force=True)
    assert output.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [output]
