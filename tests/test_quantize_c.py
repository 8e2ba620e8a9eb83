"""The C program alone: no warnings, no sanitizer findings, no job table that it believes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from support import made_up_imatrix, tensor_bytes, uniform

from apreqel import quantize
from apreqel.model.imatrix import Imatrix
from apreqel.model.inventory import read_inventory

SOURCE = Path(__file__).parent.parent / "tools" / "apreqel-quantize.c"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("c") / "apreqel-quantize"
    command = [str(COMPILER), "-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = subprocess.run(
        [*command, "-o", program, SOURCE, "-lpthread", "-ldl"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, job: Path) -> subprocess.CompletedProcess[str]:
    # ggml keeps its tables and dlopen its library until the process ends: no leaks of ours.
    options = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, job], capture_output=True, text=True, env=options, timeout=120)


def job_table(model: Path, folder: Path, kind: str, imatrix: Imatrix | None = None) -> Path:
    inventory = read_inventory(model)
    types = uniform(inventory, kind)
    size = inventory.output_size(types)
    return quantize._write_job(
        folder, inventory, types, folder / "o.gguf", imatrix, (), size, 3, True
    )


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "IQ3_S", "Q5_1"])
def test_a_whole_job_under_sanitizers(
    kind: str, sanitized: Path, moe_model: Path, tmp_path: Path
) -> None:
    inventory = read_inventory(moe_model)
    imatrix = made_up_imatrix(inventory)
    done = run(sanitized, job_table(moe_model, tmp_path, kind, imatrix))
    assert (done.returncode, done.stderr) == (0, "")
    expected = tmp_path / "expected.gguf"
    quantize.quantize_model(inventory, uniform(inventory, kind), expected, imatrix=imatrix)
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
            f"{line.split(' ')[0]} {tmp_path}/{line.split(' ')[0]}.gguf"
            if line.startswith(("temp ", "output "))
            else line
            for line in lines
        )
        job.write_text(text)
        done = run(sanitized, job)
        assert done.returncode in {0, *range(20, 26)}, (done.returncode, done.stderr, text)
        assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr
        if done.returncode:
            refused += 1
            assert '"event":"error"' in done.stdout
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
    import re

    job = job_table(llama_model, tmp_path, "Q4_0")
    lines = [
        f"{field} {value}" if line.startswith(field + " ") else line
        for line in job.read_text().split("\n")
    ]
    job.write_text("\n".join(lines))
    done = run(sanitized, job)
    assert 20 <= done.returncode <= 25 and re.search(reason, done.stdout), done.stdout
    assert not (tmp_path / "o.gguf").exists()
