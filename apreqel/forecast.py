"""How long everything will take here, and how much room: said before the first slow step.

From a few tokens of the model itself; the rest are proportions, as they were on SmolLM2-135M. About
as sure as a factor of one and a half: kernels, disks and neighbours differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

from apreqel.device.store import stored_profile
from apreqel.llama.engine import LoadedModel
from apreqel.sensitivity.bench import scratch_types
from apreqel.sensitivity.effort import Effort
from apreqel.sensitivity.equalise import why_not
from apreqel.sensitivity.measure import ProbeSettings
from apreqel.sensitivity.moments import READS_AS
from apreqel.workspace import Workspace

# Timed with so many tokens; of a model that takes long for the first few, with these alone.
_FEW_TOKENS, _TOKENS, _LONG_SECONDS = 16, 128, 4.0
# Seconds, of two cores at about 60 billion operations a second each.
_A_ROUND, _A_RUN_TOKENS, _RUNS_A_ROUND = 13.0, 480, 3
_AROUND_ROUNDS = 35.0  # tuning threads, tables of codebooks, memory
_ERRORS_A_TENSOR, _RATIOS_A_TENSOR, _USUAL_ROW = 0.17, 0.35, 750
_SCALES_A_TENSOR, _RESCALING_CHUNKS = 0.12, 8
# The copy that is probed, in F16, beside a quantised model as it is (Q4_1 0.5, Q8_0 0.6).
_COPY_OF_QUANTISED = 0.55
# Passes over the text, in evaluations of it without any listener.
_IMATRIX_PASSES, _MOMENT_PASSES = 1.15, 0.3
_WEIGHTS_A_SECOND, _ROUNDED_A_SECOND = 15e6, 6e6
_RIVALS, _LADDER_FILES = {"quick": 1}, {"quick": 0, "thorough": 6}


@dataclass(frozen=True)
class Forecast:
    """Seconds by step; bytes of disk and memory meanwhile."""

    seconds: Mapping[str, float]
    disk_bytes: int
    memory_bytes: int

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class TokenSeconds:
    """Of a token of a prompt, and of one that is generated."""

    prefill: float
    decode: float


def token_seconds(space: Workspace) -> TokenSeconds:
    """Timed in a few seconds. Raises EngineError."""
    space.progress("seeing how fast the model runs here", 0, 1)
    with (
        LoadedModel(space.model, patchable=True) as model,
        model.context(2 * _TOKENS, 1, space.n_threads) as context,
    ):
        context.seconds(1, 1)  # brings everything in
        prompt, answer = context.seconds(_FEW_TOKENS, 2)
        n = _FEW_TOKENS
        if prompt < _LONG_SECONDS:
            n, (prompt, answer) = _TOKENS, context.seconds(_TOKENS, 2)
    return TokenSeconds(prompt / n, answer / 2)


def forecast_for(
    space: Workspace, effort: Effort, token: TokenSeconds, *, plain: bool, whole: bool
) -> Forecast:
    """Of probing, or of the `whole` way to a verified file, of a model that was not probed yet."""
    inventory, settings = space.inventory, ProbeSettings()
    tensors, quick = inventory.quantizable, effort.name == "quick"
    text = settings.n_ctx * token.prefill  # of a chunk
    probed = text * (_COPY_OF_QUANTISED if inventory.is_quantized_source else 1)
    n_weights = sum(t.n_elements for t in tensors)
    row = mean(t.row_length for t in tensors) / _USUAL_ROW
    writing, rounding = n_weights / _WEIGHTS_A_SECOND, 0 if plain else n_weights / _ROUNDED_A_SECOND
    trying = writing + settings.check_chunks * text
    steps: dict[str, float] = {}
    if whole and not _is_profiled(space):
        runs = _RUNS_A_ROUND * (1.5 * _A_RUN_TOKENS * token.prefill + 72 * token.decode)
        steps["profile"] = (3 if quick else 5) * (_A_ROUND + runs) + _AROUND_ROUNDS
    if not why_not(inventory):
        steps["rescaling"] = _SCALES_A_TENSOR * row * len(tensors) + _RESCALING_CHUNKS * text
    passes = _IMATRIX_PASSES + (0 if plain else _MOMENT_PASSES)
    steps["imatrix"] = passes * settings.fitting_chunks * probed
    n_probes = (1 / effort.every_layer + effort.further_per_tensor) * len(tensors)
    errors = _ERRORS_A_TENSOR * row * len(tensors)
    steps["probes"] = errors + n_probes * effort.first_chunks * probed
    if effort.minutes is not None:
        steps["probes"] = min(steps["probes"], 60 * effort.minutes)
    if n_files := _LADDER_FILES.get(effort.name, 4):
        steps["files that tell totals"] = n_files * trying + settings.check_chunks * text
    if whole:
        ratios = 0 if plain else _RATIOS_A_TENSOR * row**2 * len(tensors) * (0.4 if quick else 1)
        rivals = _RIVALS.get(effort.name, 3)
        steps["plan"] = ratios + (1 + rivals) * trying + rounding
        steps["file"] = writing + rounding
        turns = 3 * (3 if quick else 5)
        steps["verification"] = 3 * 12 * text + turns * (256 * token.prefill + 40 * token.decode)
    scratch = inventory.output_size(scratch_types(inventory))
    dense = [t for t in tensors if t.n_experts == 1 and not plain]
    read = {(READS_AS.get(t.role, t.role), t.layer, t.row_length) for t in dense}
    moments = sum(4 * length**2 for *_, length in read)
    copy = 0 if why_not(inventory) else scratch
    return Forecast(steps, scratch + moments + copy, scratch)


def _is_profiled(space: Workspace) -> bool:
    known = stored_profile(space.n_threads)
    return known is not None and known.is_complete(space.inventory)
