"""The `apreqel` command: parse, call one library function, show. Imports stay inside the commands,
so that --help answers at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from apreqel import __version__
from apreqel.errors import ApreqelError, Interrupted, UsageError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from apreqel.calibration import Text
    from apreqel.pipeline import Workspace
    from apreqel.plan import PlanRequest
    from apreqel.sensitivity import ProbeSettings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Measure a device and a GGUF model, then plan and write the best quantisation for both.",
)

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A GGUF file (of a split model the first), or 'demo'."),
]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Workdir = Annotated[
    Path | None, typer.Option(help="Where measurements are kept [MODEL.apreqel beside the model].")
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, max=256, help="[one per physical core]")
]
Requantize = Annotated[
    bool, typer.Option("--allow-requantize", help="Accept a model that is quantised already.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Prefer = Annotated[str, typer.Option(help="memory, latency, accuracy or balanced.")]
MaxSize = Annotated[
    str | None,
    typer.Option(help="Largest file: 95MB, 1.5GiB, bytes, or a stock preset's size: Q4_K_M."),
]
TargetBpw = Annotated[float | None, typer.Option(min=1.0, max=32.0, help="Bits per weight.")]
MaxKld = Annotated[float | None, typer.Option(min=0.0, help="Largest predicted KLD, in nats.")]
Calibration = Annotated[
    list[Path] | None, typer.Option("--text", help="Calibration text instead of apreqel's own.")
]
VerifyText = Annotated[
    Path | None, typer.Option("--verify-text", help="Verification text instead of apreqel's own.")
]
Against = Annotated[
    list[str] | None, typer.Option(help="A stock preset to compare with; repeat for more.")
]
ImatrixFile = Annotated[Path | None, typer.Option("--imatrix", help="Use this imatrix GGUF.")]
Scored = Annotated[int, typer.Option("--tokens", min=64, help="Tokens to score.")]
Ctx = Annotated[int, typer.Option("--ctx", min=32, help="Tokens per chunk.")]
NoSpeed = Annotated[bool, typer.Option("--no-speed", help="Do not measure tokens/s.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        print(f"apreqel {__version__}")
        raise typer.Exit


@app.command()
def inspect(model: Model, json: Json = False) -> None:
    """What a model holds: roles, shapes, legal types, exact bytes. Reads only headers."""
    from apreqel import console
    from apreqel.inventory import find_model, read_inventory

    inventory = read_inventory(find_model(model))
    if json:
        console.write_json(console.inventory_json(inventory))
    else:
        console.show_inventory(inventory)


@app.command()
def profile(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]")] = None,
    workdir: Workdir = None,
    threads: Threads = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tokens/s of every quant type on this device, for the model's shapes or standard ones."""
    from apreqel import console, pipeline

    if model is None:
        measured = _standard_profile(threads, quiet)
    else:
        with _workspace(model, workdir, threads, True, quiet) as space:
            measured = pipeline.profile(space, again=again)
    if json:
        console.write_json(measured)
    else:
        console.show_profile(measured)


@app.command()
def probe(
    model: Model,
    workdir: Workdir = None,
    threads: Threads = None,
    text: Calibration = None,
    imatrix: ImatrixFile = None,
    more: Annotated[int, typer.Option(min=0, help="Further probes where plans are decided.")] = 48,
    allow_requantize: Requantize = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Collect the imatrix and measure how much each tensor matters. Resumes where it stopped."""
    from apreqel import console, pipeline

    with _workspace(model, workdir, threads, allow_requantize, quiet) as space:
        state, _ = pipeline.probe(
            space, settings=_settings(more), texts=_texts(text), imatrix_file=imatrix
        )
    if json:
        console.write_json(console.sensitivity_json(state))
    else:
        console.show_sensitivity(state)


@app.command()
def plan(
    model: Model,
    prefer: Prefer = "accuracy",
    max_size: MaxSize = None,
    target_bpw: TargetBpw = None,
    max_kld: MaxKld = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="[plan.json]")] = None,
    workdir: Workdir = None,
    threads: Threads = None,
    allow_requantize: Requantize = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose a quant type for every tensor; probes and profiles first where that is missing."""
    from apreqel import console, pipeline

    with _workspace(model, workdir, threads, allow_requantize, quiet) as space:
        request = _request(space, prefer, max_size, target_bpw, max_kld)
        known = pipeline.measured(space)
        if known is None:
            known = pipeline.probe(space, settings=_settings(), texts=_texts(None))
        timed = pipeline.profile(space) if prefer == "latency" else pipeline.saved_profile(space)
        made, path = pipeline.plan(space, request, *known, timed, output)
    if json:
        console.write_json(made)
    else:
        console.show_plan(made, path)


@app.command()
def quantize(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The GGUF to write.")
    ] = None,
    threads: Threads = None,
    force: Force = False,
    allow_requantize: Requantize = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the GGUF of a plan, then re-read it and check every tensor."""
    from apreqel import console, pipeline

    result = pipeline.run_plan(
        plan,
        output=output,
        n_threads=_threads(threads),
        force=force,
        allow_requantize=allow_requantize,
        on_progress=_reporter(quiet),
    )
    if json:
        console.write_json(result)
    else:
        console.show_quantized(result)


@app.command()
def verify(
    gguf: Annotated[Path, typer.Argument(metavar="GGUF", help="The quantised file.")],
    model: Annotated[str | None, typer.Option(help="The original [that of the plan].")] = None,
    plan: Annotated[Path | None, typer.Option(help="Check the file against this plan.")] = None,
    against: Against = None,
    verify_text: VerifyText = None,
    tokens: Scored = 3060,
    ctx: Ctx = 512,
    no_speed: NoSpeed = False,
    workdir: Workdir = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a file beside the original and stock presets, on text that calibration never saw."""
    from apreqel import console, pipeline
    from apreqel.inventory import find_model
    from apreqel.verify import VerifySettings

    expected, original = _expected(gguf, model, plan)
    settings = VerifySettings(n_ctx=ctx, n_scored=tokens, with_speed=not no_speed)
    folder = workdir or (Path(expected.workdir) if expected else None)
    with _workspace(original, folder, threads, True, quiet) as space:
        report = pipeline.verify(
            space,
            find_model(str(gguf)),
            text=_verify_text(verify_text),
            against=against or [],
            settings=settings,
            expected=expected,
        )
    if json:
        console.write_json(report)
    else:
        console.show_verification(report)


@app.command()
def auto(
    model: Model,
    prefer: Prefer = "accuracy",
    max_size: MaxSize = None,
    target_bpw: TargetBpw = None,
    max_kld: MaxKld = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The GGUF to write.")
    ] = None,
    against: Against = None,
    text: Calibration = None,
    verify_text: VerifyText = None,
    tokens: Scored = 3060,
    workdir: Workdir = None,
    threads: Threads = None,
    force: Force = False,
    allow_requantize: Requantize = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Profile, probe, plan, quantise and verify, running only what is missing or stale."""
    from apreqel import console, pipeline
    from apreqel.verify import VerifySettings

    with _workspace(model, workdir, threads, allow_requantize, quiet) as space:
        result = pipeline.auto(
            space,
            _request(space, prefer, max_size, target_bpw, max_kld),
            settings=_settings(),
            texts=_texts(text),
            text=_verify_text(verify_text),
            against=against if against is not None else ["Q4_K_M"],
            verify_settings=VerifySettings(n_scored=tokens),
            output=output,
            force=force,
        )
    if json:
        console.write_json(result)
    else:
        console.show_everything(result)


# --- from options to library values --------------------------------------------------------------


def _workspace(
    model: str, workdir: Path | None, threads: int | None, allow_requantize: bool, quiet: bool
) -> AbstractContextManager[Workspace]:
    from apreqel import pipeline

    return pipeline.open_workspace(
        model,
        workdir=workdir,
        n_threads=_threads(threads),
        allow_requantize=allow_requantize,
        on_progress=_reporter(quiet),
    )


def _reporter(quiet: bool) -> Any:
    import atexit

    from apreqel.console import Reporter

    reporter = Reporter(quiet)
    atexit.register(reporter.finish)
    return reporter


def _threads(threads: int | None) -> int:
    from apreqel.device import default_threads

    return threads or default_threads()


def _settings(more: int = 48) -> ProbeSettings:
    from apreqel.sensitivity import ProbeSettings

    return ProbeSettings(further_probes=more)


def _texts(paths: Sequence[Path] | None) -> list[Text]:
    from apreqel import calibration

    return [calibration.read_text(p) for p in paths] if paths else calibration.bundled_texts()


def _verify_text(path: Path | None) -> Text:
    from apreqel import calibration

    return calibration.read_text(path) if path else calibration.heldout_text()


def _request(
    space: Workspace,
    prefer: str,
    max_size: str | None,
    target_bpw: float | None,
    max_kld: float | None,
) -> PlanRequest:
    from apreqel.plan import PRIORITIES, PlanRequest, size_from

    if prefer not in PRIORITIES:
        raise UsageError(f"--prefer {prefer!r}: choose one of {', '.join(PRIORITIES)}")
    limit = size_from(max_size, space.inventory) if max_size else None
    return PlanRequest(prefer, limit, target_bpw, max_kld)


def _expected(gguf: Path, model: str | None, plan: Path | None) -> tuple[Any, str]:
    """The plan to check against, if any, and the original model."""
    from apreqel.plan import Plan

    expected = Plan.load(plan) if plan else None
    original = model or (expected.model_files[0] if expected else None)
    if original is None:
        raise UsageError(f"{gguf}: what is its original? give --model ORIGINAL or --plan PLAN")
    return expected, original


def _standard_profile(threads: int | None, quiet: bool) -> Any:
    import tempfile

    from apreqel.profile import measure_profile

    with tempfile.TemporaryDirectory(prefix="apreqel-") as folder:
        return measure_profile(
            None, "", Path(folder), n_threads=_threads(threads), on_progress=_reporter(quiet)
        )


def main() -> NoReturn:
    """Run the command; one line on stderr and the class's exit code for an expected failure."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except ApreqelError as error:
        print(f"apreqel: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("apreqel: stopped; finished measurements are kept", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click's usage errors
            message = error.format_message()  # the help itself where nothing at all was asked
            message = message if message.startswith("Usage:") else f"apreqel: {message}"
            print(message, file=sys.stderr)
            sys.exit(UsageError.exit_code)
        raise


if __name__ == "__main__":
    main()
