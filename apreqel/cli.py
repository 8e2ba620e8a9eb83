"""The `apreqel` command: parse, call one library function, show. Imports stay inside the commands,
so that --help answers at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from apreqel import __version__, last_words
from apreqel import arguments as arg
from apreqel.console.terminal import Reporter, answer, remark, write
from apreqel.errors import ApreqelError, Interrupted, Killed, UsageError, printable
from apreqel.plan.wishes import Wishes

if TYPE_CHECKING:
    from apreqel.evaluate.verify import VerifySettings
    from apreqel.plan.plan import Plan
    from apreqel.sensitivity.texts import Text
    from apreqel.workspace import Workspace

# A file that says less than nothing of its original.
_ANOTHER_MODEL_NATS = 3.0

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure a device and a GGUF model, then plan and write the best quantisation for both.",
)


@app.callback(invoke_without_command=True)
def root(version: arg.Version = False) -> None:
    if version:
        write(f"apreqel {__version__}")
        raise typer.Exit


@app.command()
def inspect(model: arg.Model, json: arg.Json = False) -> None:
    """What a model holds: roles, shapes, legal types, exact bytes. Reads only headers."""
    from apreqel.console import inspect as view
    from apreqel.model.inventory import find_model, read_inventory

    answer(json, view.show, read_inventory(find_model(model)), data=view.as_json)


@app.command()
def profile(
    model: arg.ModelOrWord = None,
    name: arg.ProfileName = None,
    workdir: arg.Workdir = None,
    threads: arg.Threads = None,
    again: arg.Again = False,
    device: arg.Device = None,
    export_to: arg.ExportTo = None,
    import_from: arg.ImportFrom = None,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Time every quant type on this device and predict a model's tokens/s in each.

    Without MODEL, for the shapes of common small models. The number of threads is tuned, unless
    given.
    """
    from apreqel.console import profile as view
    from apreqel.device import store
    from apreqel.device.profile import DeviceProfile
    from apreqel.device.profiling import profile_model

    if export_to is not None:
        DeviceProfile.check_output(export_to)
    word = model if model in ("list", "show") and not Path(model).exists() else None
    if import_from is not None or word == "list":
        found = [store.import_profile(import_from)] if import_from else store.list_profiles()
        answer(json, view.show_list, found, data=view.list_json)
        return
    if word and name is None:
        raise UsageError("profile show: which one? apreqel profile list names them")
    if word or device is not None:
        measured, inventory = store.named_profile(device or name or "", None if word else model)
    else:
        measured, inventory = profile_model(model, workdir, threads, again, Reporter(quiet))
    if export_to is not None:
        measured.save(export_to)
    answer(json, view.show, measured, inventory, data=view.as_json)


@app.command()
def probe(
    model: arg.Model,
    workdir: arg.Workdir = None,
    threads: arg.Threads = None,
    text: arg.Calibration = None,
    imatrix: arg.ImatrixFile = None,
    effort: arg.Effort = "normal",
    minutes: arg.Minutes = None,
    allow_requantize: arg.Requantize = False,
    equalise: arg.Equalise = None,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Collect the imatrix and measure how much each tensor matters. Resumes where it stopped."""
    from apreqel import pipeline
    from apreqel.console import probe as view
    from apreqel.evaluate.real_files import measured_files
    from apreqel.model.imatrix import is_legacy
    from apreqel.sensitivity.effort import effort_from

    if imatrix is not None and equalise:
        raise UsageError("--imatrix: is of the model as it was; leave it out with --equalise")
    equalise = False if imatrix is not None else equalise
    if imatrix is not None and is_legacy(imatrix):
        remark(f"{imatrix}: a legacy imatrix; llama.cpp now writes GGUF")
    wanted, chosen = effort_from(effort, minutes), _texts(text)
    with (
        _workspace(model, workdir, threads, allow_requantize, quiet) as given,
        pipeline.equalised(given, equalise) as space,
    ):
        probed = pipeline.probe(space, effort=wanted, texts=chosen, imatrix_file=imatrix)
        files = measured_files(probed).own
    answer(json, view.show, probed.sensitivity, files, data=view.as_json)


@app.command()
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
    with _workspace(model, workdir, threads, allow_requantize, quiet) as given:
        request = request_of(_without_own_type(wishes, model), given.inventory)
        with pipeline.equalised(given, equalise) as space:
            profile = profile_for(space, wishes.device, needed=request.uses_profile)
            probed = probed_model(space) or pipeline.probe(
                space, effort=effort, texts=_texts(None), plain=wishes.plain
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


@app.command()
def explain(plan: arg.PlanFile, tensor: arg.TensorName = None, json: arg.Json = False) -> None:
    """Why tensors got their types: damage, bytes and seconds in each type, and close choices."""
    from apreqel import pipeline
    from apreqel.console import explain as view
    from apreqel.plan import explain as reasons

    solved, made, inventory = pipeline.explained(plan)
    if tensor is None:
        shares = reasons.shares_by_role(solved, inventory)
        closest = reasons.closest_choices(solved, 12)
        told = {"roles": shares, "closest": closest, "binding": made.binding}
        answer(json, view.show, shares, closest, made, data=lambda *_: told)
        return
    prices = reasons.explain_tensor(solved, tensor)
    following = reasons.next_type(solved, list(solved.options.names).index(tensor))
    told = {"types": prices, "next": following, "binding": made.binding}
    answer(json, view.show_tensor, prices, following, made, data=lambda *_: told)


@app.command()
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
    from apreqel import pipeline
    from apreqel.console import verify as view
    from apreqel.device.threads import default_threads

    result = pipeline.run_plan(
        plan,
        output=output,
        n_threads=threads or default_threads(),
        force=force,
        allow_requantize=allow_requantize,
        progress=Reporter(quiet),
    )
    answer(json, view.show_quantized, result)


@app.command()
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

    expected, original, folder = _expected(gguf, model, plan)
    with (
        _workspace(original, workdir or folder, threads, True, quiet) as given,
        pipeline.equalised(
            given, expected.is_equalised if expected else pipeline.was_equalised(given)
        ) as space,
    ):
        settings = VerifySettings(n_ctx=ctx, n_scored=tokens, with_speed=not no_speed)
        trial = Trial(_verify_text(verify_text), against or [], settings)
        report = pipeline.verify(space, find_model(str(gguf)), trial, expected)
    if (far := report.files[1].kld.mean) > _ANOTHER_MODEL_NATS:
        remark(f"{gguf}: {far:.1f} nats a token from {original}: is it a file of that model?")
    answer(json, view.show, report)


@app.command()
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
        _workspace(model, workdir, threads, allow_requantize, quiet) as given,
        pipeline.equalised(given, pipeline.was_equalised(given)) as space,
    ):
        report = compare_strategies(
            space,
            None if max_size is None else size_from(max_size, space.inventory),
            text=_verify_text(verify_text),
            settings=_settings(space, tokens, with_speed=not no_speed),
        )
    answer(json, view.show, report)


@app.command()
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

    effort, calibration = effort_from(wishes.effort, wishes.minutes), _texts(text)
    with _workspace(model, workdir, threads, allow_requantize, quiet) as given:
        request = request_of(_without_own_type(wishes, model), given.inventory)
        trial = Trial(_verify_text(verify_text), against or [], _settings(given, tokens))
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


# --- from options to library values --------------------------------------------------------------


def _workspace(
    model: str, workdir: Path | None, threads: int | None, allow_requantize: bool, quiet: bool
) -> AbstractContextManager[Workspace]:
    from apreqel import pipeline

    return pipeline.open_workspace(
        model,
        folder=workdir,
        n_threads=threads,
        allow_requantize=allow_requantize,
        progress=Reporter(quiet),
    )


def _without_own_type(wishes: Wishes, model: str) -> Wishes:
    """Of the demo: else the best of its size would be the demo itself."""
    from apreqel.model.inventory import DEMO, DEMO_TYPE

    if model != DEMO or wishes.only_types is not None:
        return wishes
    remark(f"the demo's own type, {DEMO_TYPE}, is left out: it would keep the demo as it is")
    excluded = [DEMO_TYPE] if wishes.exclude_types is None else [DEMO_TYPE, wishes.exclude_types]
    return replace(wishes, exclude_types=",".join(excluded))


def _texts(paths: Sequence[Path] | None) -> list[Text]:
    from apreqel.sensitivity.texts import bundled_texts, read_text

    return [read_text(path) for path in paths] if paths else bundled_texts()


def _verify_text(path: Path | None) -> Text:
    from apreqel.sensitivity.texts import heldout_text, read_text

    return read_text(path) if path else heldout_text()


def _settings(space: Workspace, tokens: int, with_speed: bool = True) -> VerifySettings:
    """For commands that leave the context to us: no more than the model was trained for."""
    from apreqel.evaluate.verify import VerifySettings

    n_ctx = min(VerifySettings.n_ctx, space.inventory.context_length or VerifySettings.n_ctx)
    return VerifySettings(n_ctx=n_ctx, n_scored=tokens, with_speed=with_speed)


def _expected(
    gguf: Path, model: str | None, plan: Path | None
) -> tuple[Plan | None, str, Path | None]:
    """The plan to check against, if any, the original model and its work folder."""
    from apreqel.plan.plan import Plan

    expected = Plan.load(plan) if plan else None
    if expected is None:
        if model is None:
            raise UsageError(f"{gguf}: what is its original? give --model ORIGINAL or --plan PLAN")
        return None, model, None
    folder = Path(expected.workdir)
    original = (*expected.original_files, *expected.model_files)[0]
    return expected, model or original, folder.parent if expected.original_files else folder


def _stop(_number: int, _frame: object) -> NoReturn:
    """Any of them is as Ctrl-C. Once: a terminal and whoever watches may both send it."""
    for number in last_words.STOPPING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _with_home(argument: str) -> str:
    """`--output=~/x` as it is meant: shells know ~ only where a word begins."""
    option, _, value = argument.partition("=")
    home = option.startswith("--") and value.startswith("~")
    return f"{option}={os.path.expanduser(value)}" if home else argument  # noqa: PTH111


def main() -> NoReturn:
    """Run the command; one line on stderr and the class's exit code for an expected failure."""
    last_words.begin()
    for number in last_words.heeded():
        signal.signal(number, _stop)
    try:
        sys.exit(app(list(map(_with_home, sys.argv[1:])), standalone_mode=False) or 0)
    except ApreqelError as error:
        print(f"apreqel: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print(f"apreqel: {Interrupted.message}", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    except OSError as error:  # where nobody knew what it means
        where = ": ".join(str(name) for name in (error.filename, error.filename2) if name)
        told = f"{where or 'a file'}: {error.strerror or error}"
        print(f"apreqel: {printable(told, 500)}", file=sys.stderr)
        sys.exit(ApreqelError.exit_code)
    except MemoryError:
        print("apreqel: memory ran out; close other programs or use less", file=sys.stderr)
        sys.exit(Killed.exit_code)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click's usage errors
            message = error.format_message()  # the help itself where nothing at all was asked
            message = message if message.startswith("Usage:") else f"apreqel: {message}"
            print(message, file=sys.stderr)
            sys.exit(UsageError.exit_code)
        raise
