"""The command that asks for a plan again, from what the plan recorded of the request."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from apreqel.plan.plan import Plan
from apreqel.plan.request import PlanRequest, request_from

# More pins than this were copied from a file or a recipe, and are in the recipe that is published.
_MOST_PINS = 12


def command_of(made: Plan, model: str, recipe: str) -> str:
    """`apreqel auto` or `plan` with the options that the plan was made with.

    `recipe` is what its list of types is called, in which many pins are looked up. Raises
    ArtifactError.
    """
    request = request_from(made.provenance.settings)
    copied = len(request.constraints.pins) > _MOST_PINS
    options = [f"--recipe={recipe}"] if copied else list(_limits(request))
    options += [] if made.is_equalised else ["--no-equalise"]
    options += ["--plain"] if request.plain else []
    options += [] if made.metric == "kld" else [f"--metric={made.metric}"]
    verb = "plan" if copied or made.metric != "kld" else "auto"
    return shlex.join(["apreqel", verb, model, *options])


def _limits(asked: PlanRequest) -> Iterator[str]:
    if asked.weights:
        yield "--weights=" + ",".join(f"{name}={w:g}" for name, w in asked.weights.items())
    elif asked.prefer != "accuracy":
        yield f"--prefer={asked.prefer}"
    for option, value in (
        ("--max-size", asked.max_size_bytes),
        ("--target-bpw", asked.target_bpw),
        ("--max-kld", asked.max_kld_nats),
        ("--max-ram", asked.max_ram_bytes),
        ("--ctx", "max" if asked.longest_context else asked.n_ctx),
        ("--min-decode-tps", asked.min_decode_tps),
        ("--min-prefill-tps", asked.min_prefill_tps),
        ("--max-type-changes", asked.max_type_changes),
        ("--experts", asked.experts_used),
        ("--only-types", ",".join(asked.constraints.only_types) or None),
        ("--exclude-types", ",".join(asked.constraints.exclude_types) or None),
    ):
        if value is not None:
            yield f"{option}={value}"
    yield from (f"--pin={pattern}={type_name}" for pattern, type_name in asked.constraints.pins)
    if asked.any_speed:
        yield "--any-speed"
    if asked.workload != PlanRequest.workload:
        yield "--workload={}:{}".format(*asked.workload)
