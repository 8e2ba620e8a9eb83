"""What several test files need: the command, maps of types, quick measurements, made-up profiles.

`models` builds the models themselves. Test files import nothing from one another.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apreqel import from_plan, pipeline
from apreqel.artifacts import Provenance
from apreqel.device.machine import Device
from apreqel.device.profile import DeviceProfile, Kernel, Overhead, Reading
from apreqel.device.shapes import shapes_of
from apreqel.evaluate.verify import Trial, VerificationReport, VerifySettings
from apreqel.llama.engine import LoadedModel
from apreqel.model.imatrix import Imatrix, ImatrixEntry
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.model.qtypes import lookup
from apreqel.plan.planner import Planner
from apreqel.plan.request import PlanRequest
from apreqel.progress import Progress, silent
from apreqel.sensitivity import measure as sensitivity
from apreqel.sensitivity.damage import damage_model
from apreqel.sensitivity.effort import Effort
from apreqel.sensitivity.measure import ProbeSettings
from apreqel.sensitivity.measurement import ProbedModel, Sensitivity, TensorSensitivity
from apreqel.sensitivity.texts import Text, TokenSet, bundled_texts, heldout_text
from apreqel.workspace import Workspace

# --- the command ---------------------------------------------------------------------------------

_SCRIPT = Path(sys.executable).with_name("apreqel")
COMMAND = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-m", "apreqel"]


def apreqel(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
    )


def expect(code: int, message: str, *arguments: object) -> None:
    """The command ends with `code` and says `message` in its one line, with nothing on stdout."""
    done = apreqel(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("apreqel: ")]
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert "Traceback" not in done.stderr


# --- maps of types and what files hold -----------------------------------------------------------


def uniform(inventory: Inventory, type_name: str) -> dict[str, str]:
    """`type_name` for every tensor that may be quantised to it, the source's own elsewhere."""
    fitting = [t.name for t in inventory.quantizable if type_name in t.legal_types]
    return inventory.types | dict.fromkeys(fitting, type_name)


def data_bytes(inventory: Inventory, types: Mapping[str, str]) -> int:
    """Of all tensors in these types, without header and padding."""
    return sum(lookup(types[t.name]).size_bytes(t.shape) for t in inventory.tensors)


def tensor_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and raw bytes of each tensor in the one file `path`."""
    content = path.read_bytes()
    return {
        t.name: (t.qtype.name, content[t.offset : t.offset + t.size_bytes])
        for t in read_inventory(path).tensors
    }


def made_up_imatrix(inventory: Inventory) -> Imatrix:
    generator = np.random.default_rng(7)
    entries = {}
    for tensor in inventory.quantizable:
        sums = np.exp(generator.normal(0, 2, (tensor.n_experts, tensor.row_length)))
        counts = np.full(tensor.n_experts, 16, np.float32)
        entries[tensor.name] = ImatrixEntry(sums.astype(np.float32), counts)
    return Imatrix(entries)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Of each token, by the definition in double precision: [rows, vocabulary]."""
    x = logits.astype(np.float64)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))


def divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL divergence of each row of log probabilities, in nats."""
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def divergences_of_files(
    original: Path, other: Path, text: TokenSet, overrides: dict[str, int] | None = None
) -> np.ndarray:
    """KL divergence in nats of `other`, by the definition: [chunks, scored tokens]."""
    rows = []
    with (
        LoadedModel(original) as a,
        LoadedModel(other, overrides=overrides) as b,
        a.context(text.n_ctx, 1, 2) as p_context,
        b.context(text.n_ctx, 1, 2) as q_context,
    ):
        for i in range(text.n_chunks):
            chunk = text.part(slice(i, i + 1))
            p = log_probabilities(p_context.evaluate(chunk.tokens, chunk.positions))
            q = log_probabilities(q_context.evaluate(chunk.tokens, chunk.positions))
            rows.append(divergences(p, q))
    return np.stack(rows)


# --- quick measurements --------------------------------------------------------------------------

SHA = "0" * 64
SHORT = ProbeSettings(fitting_chunks=4, probe_chunks=4, check_chunks=2, n_ctx=128)
LITTLE = Effort("normal", 2, 0.5)


def texts() -> list[Text]:
    return bundled_texts()


def workspace(inventory: Inventory, folder: Path, progress: Progress = silent) -> Workspace:
    return Workspace(inventory, SHA, folder, n_threads=2, allow_requantize=True, progress=progress)


def measure(
    inventory: Inventory,
    folder: Path,
    effort: Effort = LITTLE,
    settings: ProbeSettings = SHORT,
    progress: Progress = silent,
) -> ProbedModel:
    """The tensors' sensitivities, measured on little text."""
    space = workspace(inventory, folder, progress)
    return sensitivity.measure(space, texts=texts(), settings=settings, effort=effort)


def planner_of(probed: ProbedModel, **options: Any) -> Planner:
    """With what probing alone tells."""
    return Planner(probed, damage_model(probed.sensitivity), **options)


def made_up_model(inventory: Inventory, tensors: Mapping[str, TensorSensitivity]) -> ProbedModel:
    """Measured only in the test's words, with no imatrix and no folder."""
    found = Sensitivity(Provenance(SHA), tensors, effort="normal")
    return ProbedModel(workspace(inventory, Path("nowhere")), found, Imatrix({}))


# --- made-up device profiles ---------------------------------------------------------------------


def made_up(inventory: Inventory, seconds: Mapping[str, tuple[float, float]]) -> DeviceProfile:
    """A profile where a product takes `seconds[type]` (decode, prefill) per million weights."""
    kernels = {
        type_name: {
            shape.key: Kernel(
                Reading(decode * shape.weights_read / 1e6, 0.0, 5),
                Reading(prefill * shape.weights_read / 1e6, 0.0, 5),
                "CPU",
            )
            for shape in shapes_of(inventory)
        }
        for type_name, (decode, prefill) in seconds.items()
    }
    overhead = Overhead("m", 2.0, 0.5, 0.0, 3.0, 0.25, 0.0, 0.001, 0.0, {})
    return DeviceProfile(
        Provenance(""),
        "made-up",
        Device("cpu", "x", "Linux", 1, 1, None, 1, 1, None, None),
        "f" * 16,
        1,
        512,
        kernels,
        {inventory.shape_digest: overhead},
    )


def attention(seconds: Mapping[str, float]) -> dict[str, dict[str, Kernel]]:
    """Timings for heads of 64: each cache takes `seconds`, of a prompt's token a tenth of it."""
    return {
        f"{k}/{v}": {
            "64/64 9/3": Kernel(Reading(a + b, 0.0, 5), Reading((a + b) / 10, 0.0, 5), "CPU")
        }
        for k, a in seconds.items()
        for v, b in seconds.items()
        if "Q8_0" in (k, v) or k == v == "F16"
    }


# --- a file with its plan and its verification ---------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """What `auto` leaves behind, made in few seconds: little text, as ggml rounds."""

    model: Path
    file: Path
    plan: Path
    report: VerificationReport


def finished(model: Path, request: PlanRequest) -> Finished:
    """`model` probed, planned, quantised and verified, beside it and in its work folder."""
    asked = {"folder": None, "allow_requantize": True, "progress": silent}
    with pipeline.open_workspace(str(model), n_threads=2, **asked) as space:
        probed = sensitivity.measure(
            space, texts=texts(), settings=SHORT, effort=LITTLE, with_moments=False
        )
        made, path = pipeline.plan(probed, request, None, check=False)
        output = from_plan.default_output(space, made.prefer)
        from_plan.run_plan(
            path, output=output, n_threads=2, force=False, allow_requantize=True, progress=silent
        )
        settings = VerifySettings(n_ctx=128, n_scored=256, n_prompt=32, repetitions=2)
        trial = Trial(heldout_text(), ["Q4_K_M"], settings)
        return Finished(model, output, path, pipeline.verify(space, output, trial, made))
