"""`quantize`, `verify`, `compare`, `auto`: real files."""

from __future__ import annotations

from apreqel import arguments as arg
from apreqel.commands.given import (
    calibration_texts,
    expected_of,
    foretell,
    text_to_verify,
    usual_settings,
    without_own_type,
    workspace,
)
from apreqel.console.terminal import Reporter, answer, remark
from apreqel.plan.wishes import Wishes

# A file that says less than nothing of its original.
_ANOTHER_MODEL_NATS = 3.0


def quantize(
    plan: arg.PlanFile,
    output: arg.Output = None,
    threads: arg.Threads = None,
    force: arg.Force = False,
    allow_requantize: arg.Requantize = False,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Write the GGUF of a plan, then re-read it and check every tensor."""
    from apreqel.console import verify as view
    from apreqel.device.threads import default_threads
    from apreqel.from_plan import run_plan

    result = run_plan(
        plan,
        output=output,
        n_threads=threads or default_threads(),
        force=force,
        allow_requantize=allow_requantize,
        progress=Reporter(quiet),
    )
    answer(json, view.show_quantized, result)


def verify(
    gguf: arg.QuantisedFile,
    model: arg.Original = None,
    plan: arg.Expected = None,
    against: arg.Against = None,
    verify_text: arg.VerifyText = None,
    tokens: arg.Scored = 3060,
    ctx: arg.Ctx = 512,
    no_speed: arg.NoSpeed = False,
    workdir: arg.Workdir = None,
    threads: arg.Threads = None,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Measure a file beside the original and stock presets, on text that calibration never saw."""
    from apreqel import pipeline
    from apreqel.console import verify as view
    from apreqel.evaluate.verify import Trial, VerifySettings
    from apreqel.model.inventory import find_model

    expected, original, folder = expected_of(gguf, model, plan)
    with (
        workspace(original, workdir or folder, threads, True, quiet) as given,
        pipeline.equalised(
            given, expected.is_equalised if expected else pipeline.was_equalised(given)
        ) as space,
    ):
        settings = VerifySettings(n_ctx=ctx, n_scored=tokens, with_speed=not no_speed)
        trial = Trial(text_to_verify(verify_text), against or [], settings)
        report = pipeline.verify(space, find_model(str(gguf)), trial, expected)
    if (far := report.files[1].kld.mean) > _ANOTHER_MODEL_NATS:
        remark(f"{gguf}: {far:.1f} nats a token from {original}: is it a file of that model?")
    answer(json, view.show, report)


def compare(
    model: arg.Model,
    max_size: arg.MaxSize = None,
    verify_text: arg.VerifyText = None,
    tokens: arg.Scored = 3060,
    no_speed: arg.NoSpeed = False,
    workdir: arg.Workdir = None,
    threads: arg.Threads = None,
    allow_requantize: arg.Requantize = False,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Other ways to choose types at the same size: uniform, stock, by error, by score, ours."""
    from apreqel import pipeline
    from apreqel.console import verify as view
    from apreqel.evaluate.strategies import compare_strategies
    from apreqel.plan.request import size_from

    with (
        workspace(model, workdir, threads, allow_requantize, quiet) as given,
        pipeline.equalised(given, pipeline.was_equalised(given)) as space,
    ):
        report = compare_strategies(
            space,
            None if max_size is None else size_from(max_size, space.inventory),
            text=text_to_verify(verify_text),
            settings=usual_settings(space, tokens, with_speed=not no_speed),
        )
    answer(json, view.show, report)


@arg.asking(*arg.LIMITS, "device", "plain", "effort", "minutes")
def auto(
    model: arg.Model,
    wishes: Wishes,
    output: arg.Output = None,
    against: arg.Against = None,
    text: arg.Calibration = None,
    verify_text: arg.VerifyText = None,
    tokens: arg.Scored = 3060,
    workdir: arg.Workdir = None,
    threads: arg.Threads = None,
    force: arg.Force = False,
    allow_requantize: arg.Requantize = False,
    equalise: arg.Equalise = None,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Profile, probe, plan, quantise and verify, running only what is missing or stale."""
    from apreqel import pipeline
    from apreqel.console import verify as view
    from apreqel.evaluate.verify import Trial
    from apreqel.plan.request import request_of
    from apreqel.sensitivity.effort import effort_from

    effort, calibration = effort_from(wishes.effort, wishes.minutes), calibration_texts(text)
    with workspace(model, workdir, threads, allow_requantize, quiet) as given:
        request = request_of(without_own_type(wishes, model), given.inventory)
        settings = usual_settings(given, tokens, quick=effort.name == "quick")
        trial = Trial(text_to_verify(verify_text), against or [], settings)
        foretell(given, effort, plain=wishes.plain, whole=True)
        with pipeline.equalised(given, equalise) as space:
            result = pipeline.auto(
                space,
                request,
                device=wishes.device,
                effort=effort,
                texts=calibration,
                trial=trial,
                output=output,
                force=force,
            )
    answer(json, view.show_everything, result)
