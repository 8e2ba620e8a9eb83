"""`apreqel probe`: how much each tensor matters, and how well that is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apreqel.console.terminal import duration, span, table, write
from apreqel.sensitivity.damage import MeasuredFile, damage_model
from apreqel.sensitivity.measurement import Sensitivity
from apreqel.sensitivity.report import report

# What damage is, by metric, for whoever meets the word.
DAMAGE = {
    "kld": "damage: how far the model's predictions move from the original's when a tensor is "
    "quantised (KL divergence, nats per token)",
    "perplexity": "damage: how much worse than the original the model predicts a text when a "
    "tensor is quantised (change of the loss, nats per token)",
}

# What --json gives under the names that they have in a Sensitivity.
_FACTS = ("seconds", "self_kld_nats", "coverage", "excluded", "kernels")
_MOST_SHOWN = 12


def show(found: Sensitivity, files: Sequence[MeasuredFile]) -> None:
    """Also what `files`, plans along a ladder of sizes, measured."""
    told, model = report(found), damage_model(found)
    write(
        f"{found.n_probes} probes of {len(found.tensors)} tensors in {duration(found.seconds)} "
        f"({found.effort}); the original against itself: {found.self_kld_nats:.1e} nats"
    )
    if coverage := found.coverage:  # what the calibration text reached, and whether it is enough
        experts = f", {coverage.n_unseen_experts} of {coverage.n_experts} experts unseen"
        write(
            f"imatrix: {coverage.n_tensors} tensors, {coverage.n_zero_columns} zero columns "
            f"substituted{experts if coverage.n_experts else ''}\n"
            f"text: errors are {told.heldout_ratio - 1:+.1%} on text that the imatrix was not "
            f"fitted on; with an imatrix from half the text {told.half_text_ratio - 1:+.1%}"
        )
    rows = (
        (name, type_name, f"{damage.nats:.6f}", span(damage.interval, 6))
        for name, type_name, damage in told.most_sensitive[:_MOST_SHOWN]
    )
    columns = "most sensitive tensors", "probed as", "KL divergence, nats", "95% interval"
    write(table(*columns, rows=rows))
    write(DAMAGE["kld"])
    for key, loss in found.kernels.items():
        type_name, _, role = key.partition(" ")
        write(
            f"{role or 'all'} in {type_name}: {loss.dequantised_nats:.5f} nats dequantised, "
            f"{loss.real_nats:.5f} as its kernels run it"
        )
    correlations = ", ".join(f"{name} {value:.2f}" for name, value in told.correlations.items())
    if correlations:
        write(f"rank correlation with KL divergence: {correlations}")
    for file in files:
        if not file.is_rounded:  # what that gives is known to plans
            write(
                f"a plan as a real file: {file.kld.mean:.5f} nats; its tensors' damages sum to "
                f"{model.damage_sum(file.types):.5f}"
            )
    if told.n_unresolved:
        write(f"{told.n_unresolved} tensors' effects are below the noise: unresolved, not ranked")
    if not found.settled and found.effort != "thorough":
        write("more probes could still improve plans a little: --effort thorough")
    for pair, reason in found.excluded.items():
        write(f"left out: {pair}: {reason}")


def as_json(found: Sensitivity, files: Sequence[MeasuredFile]) -> dict[str, Any]:
    model = damage_model(found)
    return {
        "effort": found.effort,
        "settled": found.settled,
        "probes": found.n_probes,
        **{name: getattr(found, name) for name in _FACTS},
        "report": report(found),
        "files": files,
        "tensors": {
            name: {
                type_name: {
                    "damage_nats": damage.nats,
                    "interval": damage.interval,
                    "is_probed": damage.is_probed,
                    "is_resolved": damage.is_resolved,
                    "output_error": tensor.errors.weights[type_name],
                }
                for type_name, damage in model.table(name).items()
            }
            for name, tensor in found.tensors.items()
        },
    }
