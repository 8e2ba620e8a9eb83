"""The command as people use it: exit codes, exact lines, JSON, the whole way on a tiny model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import psutil
import pytest
from support import COMMAND, apreqel, expect, uniform

from apreqel import arguments as arg
from apreqel import cli, errors
from apreqel.__main__ import obituary, watched
from apreqel.arrays import Floats
from apreqel.commands.given import usual_settings
from apreqel.model.inventory import read_inventory
from apreqel.plan.request import size_from
from apreqel.workspace import Workspace

README = Path(__file__).parent.parent / "README.md"
PROFILES = Path(__file__).parent.parent / "device_profiles"


def test_help_and_version() -> None:
    for command in (
        [],
        ["inspect"],
        ["profile"],
        ["probe"],
        ["plan"],
        ["explain"],
        ["quantize"],
        ["verify"],
        ["compare"],
        ["report"],
        ["auto"],
        ["export"],
        ["run"],
        ["doctor"],
    ):
        done = apreqel(*command, "--help")
        assert done.returncode == 0 and "Usage:" in done.stdout, command
    assert apreqel("--version").stdout.startswith("apreqel ")
    # Where there are many options they are in groups, and none falls out of them.
    grouped = apreqel("plan", "--help").stdout
    positions = [grouped.index(f"\n{group}:\n") for group in arg.GROUPS]
    assert positions == sorted(positions) and "\nOptions:\n" not in grouped
    assert set(arg.WISHES) <= {n for names in arg.GROUPS.values() for n in names}
    assert "\nOptions:\n" in apreqel("explain", "--help").stdout


def test_each_failure_has_its_code_and_line(llama_model: Path, tmp_path: Path) -> None:
    missing, page = tmp_path / "none.gguf", tmp_path / "page.gguf"
    page.write_text("<!DOCTYPE html><html><body>404</body></html>")
    quantised = models.build(tmp_path / "q8.gguf", kind="Q8_0")
    expect(2, "No such command", "frobnicate")
    expect(
        2,
        "--prefer 'speed': choose one of memory, latency",
        "plan",
        llama_model,
        "--prefer",
        "speed",
        "--workdir",
        tmp_path / "w",
    )
    expect(3, f"{missing}: no such file", "inspect", missing)
    expect(3, "an HTML page (a failed download), not a GGUF file", "inspect", page)
    expect(4, "already quantised (Q8_0)", "probe", quantised)
    future = tmp_path / "future.gguf"
    content = llama_model.read_bytes().replace(
        b"\x05" + bytes(7) + b"llama", b"\x05" + bytes(7) + b"LLAMA"
    )
    future.write_bytes(content)
    expect(4, "unknown model architecture: 'LLAMA'", "probe", future)
    latin = tmp_path / "latin1.txt"
    latin.write_bytes("déjà".encode("latin-1"))
    expect(
        5,
        "not UTF-8 at byte 1 (line 1, value 0xe9)",
        "probe",
        llama_model,
        "--text",
        latin,
        "--workdir",
        tmp_path / "w",
    )
    expect(10, "no such plan file", "quantize", tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{}")
    expect(10, "field kind is None, expected 'apreqel plan'", "quantize", tmp_path / "plan.json")


def test_codes_are_distinct_and_in_the_readme() -> None:
    text = README.read_text()
    codes = [error.exit_code for error in errors.all_errors()]
    assert len(codes) == len(set(codes))
    for error in errors.all_errors():
        assert f"| {error.exit_code} | {error.meaning} |" in text, error


def test_readme_shows_the_real_help() -> None:
    listed = apreqel("--help").stdout.split("Commands:\n")[1].rstrip()
    assert listed in README.read_text()


def test_inspect(rows_576_model: Path, split_model: list[Path]) -> None:
    shown = apreqel("inspect", rows_576_model).stdout
    assert "tied: the output head is the token embedding" in shown
    assert "rows of 576: no K- or IQ-types but IQ4_NL" in shown
    assert "kept: one-dimensional" in shown
    data = json.loads(apreqel("inspect", rows_576_model, "--json").stdout)
    inventory = read_inventory(rows_576_model)
    assert data["size_bytes"] == rows_576_model.stat().st_size
    assert len(data["tensors"]) == len(inventory.tensors)
    types = uniform(inventory, "Q8_0")
    assert data["bytes_by_type"]["Q8_0"]["file_bytes"] == inventory.output_size(types)
    assert "split into 3 files" in apreqel("inspect", split_model[0]).stdout


def test_a_reader_that_leaves_is_no_failure_of_ours(rows_576_model: Path) -> None:
    for arguments in (["inspect", rows_576_model], ["inspect", rows_576_model, "--json"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run([*COMMAND, *arguments], stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
    for option in ("--help", "--version"):
        shell = f"{shlex.join(COMMAND)} {option} | true"
        done = subprocess.run(["bash", "-c", shell], stderr=subprocess.PIPE)
        assert done.stderr == b""
    shell = f"{shlex.join([*COMMAND, 'inspect', str(rows_576_model)])} >&-"
    done = subprocess.run(["bash", "-c", shell], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_whole_way_and_nothing_twice(rows_576_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(rows_576_model, tmp_path / "tiny.gguf"))
    command = ["auto", model, "--target-bpw", "6", "--tokens", "300", "--json"]
    done = apreqel(*command)
    assert done.returncode == 0, done.stderr
    assert "probing" in done.stderr and "timing" in done.stderr
    result = json.loads(done.stdout)
    output = Path(result["output"])
    assert output == tmp_path / "tiny-apreqel-accuracy.gguf"
    assert output.stat().st_size == result["plan"]["size_bytes"]
    labels = [row["label"] for row in result["report"]["files"]]
    assert labels == ["original", "apreqel", "stock Q5_K_S"]  # the preset nearest in size
    written = read_inventory(output).types
    assert written == result["plan"]["types"]
    # Again: nothing is measured anew, the result is the same.
    changed = output.stat().st_mtime_ns
    again = apreqel(*command)
    assert json.loads(again.stdout)["report"] == result["report"]
    assert "probing" not in again.stderr and "timing" not in again.stderr
    assert output.stat().st_mtime_ns == changed
    # Another size needs no new probe, and replaces apreqel's own file.
    other = apreqel("auto", model, "--target-bpw", "7", "--tokens", "300")
    assert other.returncode == 0 and str(output) in other.stdout.replace("\n", "")
    assert "evaluating" in other.stderr and "probing" not in other.stderr
    assert output.stat().st_mtime_ns != changed
    for path in (tmp_path / "tiny.gguf.apreqel").rglob("*.json"):
        assert json.loads(path.read_text())["kind"].startswith("apreqel ")
    probed = apreqel("probe", model, "--quiet").stdout
    assert "zero columns substituted\n" in probed  # a dense model has no experts to speak of
    assert probed.count("damage: how far the model's predictions move") == 1
    # The steps by hand, on the same measurements.
    folder = tmp_path / "tiny.gguf.apreqel" / "equalised"
    done = apreqel("plan", model, "--prefer", "memory", "--max-kld", "0.5", "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    by_hand = tmp_path / "by-hand.gguf"
    done = apreqel("quantize", folder / "plan.json", "-o", by_hand)
    assert done.returncode == 0 and "every tensor re-read and as planned" in done.stdout
    expect(7, "exists; use --force", "quantize", folder / "plan.json", "-o", by_hand)
    done = apreqel(
        "verify",
        by_hand,
        "--plan",
        folder / "plan.json",
        "--tokens",
        "300",
        "--no-speed",
        "--against",
        "Q8_0",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versus"][0]["rival"] == "stock Q8_0"
    expect(11, "the plan says", "verify", output, "--plan", folder / "plan.json", "--no-speed")
    expect(
        2,
        "--against 'Q4_X': there is no such preset",
        "verify",
        by_hand,
        "--model",
        model,
        "--against",
        "Q4_X",
        "--no-speed",
    )
    expect(
        6,
        "--max-size 100000 bytes (0.10 MB): cannot be met; the nearest",
        "plan",
        model,
        "--max-size",
        "100KB",
    )
    wishes = ["--min-decode-tps", "1", "--max-ram", "2GB", "--ctx", "512", "--max-kld", "1"]
    done = apreqel("plan", model, "--prefer", "latency", *wishes)
    assert done.returncode == 0, done.stderr
    assert "predicted memory with a context of 512" in done.stdout
    assert "predicted on" in done.stdout and "tokens/s (95%)" in done.stdout
    expect(6, "the nearest possible is", "plan", model, "--min-decode-tps", "1e9")
    expect(2, "--workload '5': give tokens of prompt and answer", "plan", model, "--workload", "5")
    expect(2, "device 'nowhere': no such profile", "plan", model, "--device", "nowhere")
    # What was measured can be listed, carried away and taken up.
    (name,) = {row["name"] for row in json.loads(apreqel("profile", "list", "--json").stdout)} - {
        path.stem for path in PROFILES.glob("*.json")
    }
    shown = apreqel("profile", "show", name, "--export", tmp_path / "p.json")
    assert shown.returncode == 0 and name in shown.stdout and "█" in shown.stdout
    assert apreqel("profile", "--import", tmp_path / "p.json").returncode == 0
    (tmp_path / "p.json").write_text("{}")
    expect(10, "field kind is None", "profile", "--import", tmp_path / "p.json")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])  # a closed terminal is the same
def test_second_run_in_a_folder_and_ctrl_c(
    llama_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [*COMMAND, "probe", llama_model, "--workdir", tmp_path / "w"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for line in first.stderr:
            if "imatrix" in line:
                break
        expect(
            8, "another apreqel is at work here", "probe", llama_model, "--workdir", tmp_path / "w"
        )
        first.send_signal(number)
        rest = first.stderr.read()
        assert first.wait() == 130
        assert "apreqel: stopped" in rest and "Traceback" not in rest
    assert not list((tmp_path / "w").rglob("scratch-*"))


@contextmanager
def a_probe(model: Path, folder: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command while it collects the imatrix."""
    command = [*COMMAND, "probe", model, "--workdir", folder]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options) as process:
        assert process.stderr is not None
        assert any("imatrix" in line for line in process.stderr)
        yield process


def test_what_the_system_kills_is_told_and_leaves_nothing(
    llama_model: Path, tmp_path: Path
) -> None:
    with a_probe(llama_model, tmp_path / "w") as process:
        (child,) = psutil.Process(process.pid).children()
        assert list((tmp_path / "w").rglob("scratch-*"))
        child.kill()
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]
        assert process.wait() == errors.Killed.exit_code
    assert f"{llama_model}: killed while collecting the imatrix" in last and "memory" in last
    assert not list((tmp_path / "w").glob("scratch-*"))


def test_no_command_outlives_the_one_that_was_killed(llama_model: Path, tmp_path: Path) -> None:
    with a_probe(llama_model, tmp_path / "w") as process:
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running()


def test_nohup_is_respected(llama_model: Path, tmp_path: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with a_probe(llama_model, tmp_path / "w", preexec_fn=ignore) as process:
        process.send_signal(signal.SIGHUP)
        (child,) = psutil.Process(process.pid).children()
        child.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 130


@pytest.mark.parametrize(
    "death, number, told",
    [
        (
            "ggml().ggml_abort(b'/src/ggml.c', 7, b'GGML_ASSERT(x) failed')",
            signal.SIGABRT,
            "model.gguf: llama.cpp died of SIGABRT while trying 2 threads: "
            "ggml.c:7: GGML_ASSERT(x) failed",
        ),
        ("signal.raise_signal(signal.SIGILL)", signal.SIGILL, "was built for another CPU"),
        ("signal.raise_signal(signal.SIGBUS)", signal.SIGBUS, "a file was cut short"),
        ("signal.raise_signal(signal.SIGSEGV)", signal.SIGSEGV, "it gave no reason"),
    ],
)
def test_llama_cpp_dies_with_a_reason(
    death: str, number: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apreqel.last_words.STOPPING", ())
    code = (
        "import signal\nfrom apreqel import last_words\nfrom apreqel.llama import library\n"
        "def ggml(): library._PROTOTYPES['ggml_abort'] = None, None; return library.ggml()\n"
        "last_words.begin(); library.library()\n"
        "last_words.note(model='model.gguf', step='trying 2 threads', call='loading')\n"
        f"last_words.note(call='')\n{death}"
    )
    died_of, said = watched([sys.executable, "-c", code])
    assert died_of == -number
    assert told in obituary(number, said)


def test_what_users_type_in_the_first_hour(llama_model: Path, tmp_path: Path) -> None:
    assert apreqel("plan", "-h").stdout == apreqel("plan", "--help").stdout != ""
    expect(2, "https://host/a/b.gguf: an address; download", "inspect", "https://host/a/b.gguf")
    asked = "verify", "https://host/a/b.gguf", "--model", llama_model, "--workdir", tmp_path / "w"
    expect(2, "https://host/a/b.gguf: an address", *asked)
    sizes = {size_from(name, read_inventory(llama_model)) for name in ("Q4_K", "q4_k_m")}
    assert len(sizes) == 1
    # Shells know ~ only where a word begins.
    home = os.path.expanduser("~")
    assert cli._with_home("--output=~/x.gguf") == f"--output={home}/x.gguf"
    for other in ("--output=~nobody-here/x", "~/x", "a=~/x", "--pin=a~=Q8_0"):
        assert cli._with_home(other) == other


def test_a_file_of_another_model_is_asked_about(llama_model: Path, tmp_path: Path) -> None:
    def louder(name: str, values: Floats) -> Floats:
        return values * (40 if name == "output.weight" else 1)

    other = models.build(tmp_path / "other.gguf", change=louder)
    asked = "--model", llama_model, "--tokens", 64, "--no-speed", "-q", "--workdir", tmp_path / "w"
    done = apreqel("verify", other, *asked)
    assert done.returncode == 0
    assert f"nats a token from {llama_model}: is it a file of that model?" in done.stderr
    assert "is it a file" not in apreqel("verify", llama_model, *asked).stderr


def test_demo_needs_its_package(tmp_path: Path) -> None:
    done = apreqel("inspect", "demo", cwd=tmp_path)
    if done.returncode:
        assert done.returncode == 2 and "pip install 'apreqel[demo]'" in done.stderr
    else:
        assert "The source is quantised already" in done.stdout
    assert os.listdir(tmp_path) == []


def test_wishes_that_contradict_each_other(llama_model: Path) -> None:
    for options, message in (
        (["--refine", "--unchecked"], "--refine compares real files of one plan by KL divergence"),
        (["--refine", "--front"], "--refine compares real files of one plan by KL divergence"),
        (["--refine", "--prefer", "balanced"], "not with --prefer balanced or --weights"),
        (["--metric", "loss"], "--metric 'loss': choose one of kld, perplexity"),
        (["--metric", "perplexity", "--max-kld", "0.1"], "--max-kld limits KL divergence"),
    ):
        expect(2, message, "plan", llama_model, *options)


def test_no_limit_is_beyond_all_numbers(llama_model: Path, tmp_path: Path) -> None:
    for option in ("--max-kld", "--target-bpw", "--min-decode-tps", "--min-prefill-tps"):
        for value in ("inf", "nan", "1e300"):
            expect(2, option, "plan", llama_model, "--workdir", tmp_path, option, value)
    for value in ("inf", "nan"):
        expect(2, "--minutes", "plan", llama_model, "--workdir", tmp_path, "--minutes", value)


def test_an_empty_option_is_no_limit_left_out(llama_model: Path, tmp_path: Path) -> None:
    for option in (
        "--max-size",
        "--max-ram",
        "--max-degradation",
        "--weights",
        "--only-types",
        "--exclude-types",
    ):
        expect(2, f"{option} '': ", "plan", llama_model, "--workdir", tmp_path, option, "")


def test_a_plan_replaces_only_plans(llama_model: Path, tmp_path: Path) -> None:
    notes, model = tmp_path / "notes.txt", tmp_path / "model.gguf"
    notes.write_text("mine")
    model.write_bytes(llama_model.read_bytes())
    for path in (notes, model):
        before = path.read_bytes()
        expect(7, "exists and is no plan file", "plan", llama_model, "-o", path)
        expect(7, "exists and is no device-profile file", "profile", "--export", path)
        assert path.read_bytes() == before
    expect(10, "is a GGUF model, expected a plan file", "quantize", model)
    assert model.exists()


def test_slips_are_told_before_hours_of_probing(llama_model: Path, tmp_path: Path) -> None:
    for option, value, message in (
        ("--pin", "attn_v=Q8_0", "--pin attn_v: matches no tensor"),
        ("--device", "nosuch", "device 'nosuch': no such profile"),
    ):
        expect(2, message, "plan", llama_model, "--workdir", tmp_path, option, value)
    assert not (tmp_path / "sensitivity.json").exists()


def test_names_in_a_model_reach_no_terminal_as_commands(llama_model: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.gguf"
    length = (5).to_bytes(8, "little")
    content = llama_model.read_bytes()
    hostile.write_bytes(content.replace(length + b"llama", length + b"\x1b[31m", 1))
    shown = apreqel("inspect", hostile).stdout
    assert r"\x1b[31m" in shown and "\x1b" not in shown


def test_an_imatrix_of_another_tool_is_kept(llama_model: Path, tmp_path: Path) -> None:
    for name in ("imatrix.gguf", "plan.json", "verification.json"):
        theirs = tmp_path / name
        theirs.write_bytes(b"GGUF days of work of another tool")
        expect(7, "is not apreqel's", "probe", llama_model, "--workdir", tmp_path)
        assert os.listdir(tmp_path) == [name]
        theirs.unlink()
    missing = tmp_path / "none.gguf"
    work = tmp_path / "w"
    expect(3, f"{missing}: ", "probe", llama_model, "--workdir", work, "--imatrix", missing)


def test_a_full_disk_behind_stdout_is_told(rows_576_model: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "inspect", rows_576_model], stdout=full, stderr=-1)
    assert done.returncode == 7
    assert done.stderr.startswith(b"apreqel: <stdout>: No space left on device")


def test_auto_verifies_within_the_context_that_the_model_was_trained_for(tmp_path: Path) -> None:
    for trained, used in ((128, 128), (2048, 512)):
        inventory = read_inventory(models.build(tmp_path / f"{trained}.gguf", context=trained))
        assert usual_settings(Workspace(inventory, "", tmp_path), 64).n_ctx == used
