"""`plan`, `explain` and `report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from apreqel import arguments as arg
from apreqel.commands.given import calibration_texts, foretell, without_own_type, workspace
from apreqel.console.terminal import Reporter, answer
from apreqel.plan.wishes import Wishes


@arg.asking(*arg.WISHES)
def plan(
    model: arg.Model,
    wishes: Wishes,
    output: arg.PlanOutput = None,
    workdir: arg.Workdir = None,
    threads: arg.Threads = None,
    allow_requantize: arg.Requantize = False,
    equalise: arg.Equalise = None,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Choose a quant type for every tensor; probes and profiles first where that is missing."""
    from apreqel import pipeline
    from apreqel.console import plan as view
    from apreqel.device.profiling import profile_for
    from apreqel.plan.plan import Plan
    from apreqel.plan.request import request_of, require_compatible
    from apreqel.sensitivity.effort import effort_from
    from apreqel.sensitivity.measurement import probed_model

    show: Callable[..., None]
    found: tuple[Any, ...]
    effort, check = effort_from(wishes.effort, wishes.minutes), not wishes.unchecked
    require_compatible(wishes)
    if output is not None:
        Plan.check_output(output)
    metric, refine = wishes.metric, wishes.refine
    with workspace(model, workdir, threads, allow_requantize, quiet) as given:
        request = request_of(without_own_type(wishes, model), given.inventory)
        foretell(given, effort, plain=wishes.plain, whole=False)
        with pipeline.equalised(given, equalise) as space:
            profile = profile_for(space, wishes.device, needed=request.uses_profile)
            probed = probed_model(space) or pipeline.probe(
                space, effort=effort, texts=calibration_texts(None), plain=wishes.plain
            )
            asked = probed, request, profile
            if wishes.front:
                show, found = view.show_front, (pipeline.front(*asked, metric),)
            elif wishes.ladder:
                made = pipeline.ladder(*asked, wishes.ladder, check=check, metric=metric)
                show, found = view.show_ladder, tuple(zip(*made, strict=True))
            else:
                found = pipeline.plan(
                    *asked, output=output, check=check, refine=refine, metric=metric
                )
                show = view.show
    answer(json, show, *found)


def explain(plan: arg.PlanFile, tensor: arg.TensorName = None, json: arg.Json = False) -> None:
    """Why tensors got their types: damage, bytes and seconds in each type, and close choices."""
    from apreqel import pipeline
    from apreqel.console import explain as view
    from apreqel.plan import explain as reasons

    solved, made, inventory = pipeline.explained(plan)
    if tensor is None:
        shares = reasons.shares_by_role(solved.options, solved.solution.choice, inventory)
        closest = reasons.closest_choices(solved, 12)
        told = {"roles": shares, "closest": closest, "binding": made.binding}
        answer(json, view.show, shares, closest, made, data=lambda *_: told)
        return
    prices = reasons.explain_tensor(solved, tensor)
    following = reasons.next_type(solved, list(solved.options.names).index(tensor))
    told = {"types": prices, "next": following, "binding": made.binding}
    answer(json, view.show_tensor, prices, following, made, data=lambda *_: told)


def report(
    model: arg.ModelOrPlan,
    output: arg.ReportOutput = Path("report.html"),
    workdir: arg.Workdir = None,
    force: arg.Force = False,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """One page to keep or to send: the plan, what was measured, the device. Measures nothing."""
    from apreqel.console import report as view
    from apreqel.report.page import require_extra, written

    require_extra()
    found = written(model, workdir, output, force, Reporter(quiet))
    answer(json, view.show, found, output)
