"""The `apreqel` command: parse, call one library function, show. Imports stay inside the commands,
so that --help answers at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from apreqel import __version__
from apreqel.errors import ApreqelError, Interrupted, UsageError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from apreqel.pipeline import Workspace
    from apreqel.plan.request import PlanRequest
    from apreqel.sensitivity.calibration import Text
    from apreqel.sensitivity.measure import Effort

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
MaxRam = Annotated[
    str | None, typer.Option(help="Most memory of a run with --ctx filled: 500MB, 2GiB.")
]
RunCtx = Annotated[
    str | None,
    typer.Option("--ctx", help="Tokens of context to reckon memory with [4096], or max."),
]
MinDecode = Annotated[
    float | None, typer.Option("--min-decode-tps", min=0.01, help="Least tokens/s generated.")
]
MinPrefill = Annotated[
    float | None, typer.Option("--min-prefill-tps", min=0.01, help="Least tokens/s of a prompt.")
]
Workload = Annotated[
    str, typer.Option(help="Tokens of prompt:answer, what --prefer latency makes fast.")
]
Weights = Annotated[
    str | None,
    typer.Option(help="memory=1,latency=1,accuracy=1 instead of --prefer: numbers for each."),
]
Fit = Annotated[
    bool, typer.Option("--fit", help="Fit into the memory that is free here now, less a tenth.")
]
MaxDegradation = Annotated[str | None, typer.Option(help="Most predicted gain in perplexity: 1%.")]
Pin = Annotated[
    list[str] | None,
    typer.Option(help="'pattern=TYPE' for tensors by name, as in 'blk.0.*=Q8_0'; repeatable."),
]
OnlyTypes = Annotated[str | None, typer.Option(help="Use these types only: Q4_0,Q8_0.")]
ExcludeTypes = Annotated[str | None, typer.Option(help="Leave these types out: Q5_1,Q4_1.")]
MaxTypeChanges = Annotated[
    int | None, typer.Option(min=0, help="Most tensors in another type than in stock Q4_K_M.")
]
Experts = Annotated[
    int | None, typer.Option(help="Active experts a token instead of the model's own count.")
]
Device = Annotated[
    str | None, typer.Option(help="Plan for another device: a name of 'profile list', or a file.")
]
Calibration = Annotated[
    list[Path] | None, typer.Option("--text", help="Calibration text instead of apreqel's own.")
]
VerifyText = Annotated[
    Path | None, typer.Option("--verify-text", help="Verification text instead of apreqel's own.")
]
Against = Annotated[
    list[str] | None, typer.Option(help="A stock preset to compare with; repeat for more.")
]
EffortName = Annotated[
    str, typer.Option("--effort", help="Of probing, where it is not done: quick, normal, thorough.")
]
Minutes = Annotated[
    float | None, typer.Option(min=0.1, help="Stop probing after this, whatever is left.")
]
Metric = Annotated[str, typer.Option(help="What damage is: kld or perplexity.")]
Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Do not measure the plan and its rivals as real files.")
]
Refine = Annotated[
    bool | None,
    typer.Option(
        help="Probe exchanges around the plan, and plan again.  [default: below 4 bits per weight]"
    ),
]
Feedback = Annotated[
    bool,
    typer.Option("--feedback", help="Move weights against rounding (GPTQ): closer, takes longer."),
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
    from apreqel.model.inventory import find_model, read_inventory

    inventory = read_inventory(find_model(model))
    if json:
        console.write_json(console.inventory_json(inventory))
    else:
        console.show_inventory(inventory)


@app.command()
def profile(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL|list|show]", help="A GGUF; 'list'; or 'show' NAME."),
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="For 'show'.")] = None,
    workdir: Workdir = None,
    threads: Threads = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew.")] = False,
    device: Device = None,
    export_to: Annotated[
        Path | None, typer.Option("--export", help="Write the profile to this file.")
    ] = None,
    import_from: Annotated[
        Path | None, typer.Option("--import", help="Take up another device's profile.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time every quant type on this device and predict a model's tokens/s in each.

    Without MODEL, for the shapes of common small models. The number of threads is tuned, unless
    given.
    """
    from apreqel import console, pipeline

    if import_from is not None:
        console.show_profiles([pipeline.import_profile(import_from)])
        return
    if model == "list" and not Path(model).exists():
        found = pipeline.list_profiles()
        if json:
            console.write_json([{"name": n, "path": str(p)} for n, p in found])
        else:
            console.show_profiles(found)
        return
    shown = model == "show" and not Path(model).exists()
    if shown and name is None:
        raise UsageError("profile show: which one? apreqel profile list names them")
    if shown or device is not None:
        measured, inventory = pipeline.named_profile(device or name or "", None if shown else model)
    else:
        measured, inventory = pipeline.profile_model(
            model, workdir, threads, again=again, on_progress=_reporter(quiet)
        )
    if export_to is not None:
        measured.save(export_to)
    if json:
        console.write_json(console.profile_json(measured, inventory))
    else:
        console.show_profile(measured, inventory)


@app.command()
def probe(
    model: Model,
    workdir: Workdir = None,
    threads: Threads = None,
    text: Calibration = None,
    imatrix: ImatrixFile = None,
    effort: EffortName = "normal",
    minutes: Minutes = None,
    allow_requantize: Requantize = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Collect the imatrix and measure how much each tensor matters. Resumes where it stopped."""
    from apreqel import console, pipeline

    with _workspace(model, workdir, threads, allow_requantize, quiet) as space:
        state, _ = pipeline.probe(
            space, effort=_effort(effort, minutes), texts=_texts(text), imatrix_file=imatrix
        )
    if json:
        console.write_json(console.sensitivity_json(state))
    else:
        console.show_sensitivity(state)


@app.command()
def plan(
    model: Model,
    prefer: Prefer = "accuracy",
    weights: Weights = None,
    max_size: MaxSize = None,
    target_bpw: TargetBpw = None,
    max_kld: MaxKld = None,
    max_degradation: MaxDegradation = None,
    max_ram: MaxRam = None,
    fit: Fit = False,
    ctx: RunCtx = None,
    min_decode: MinDecode = None,
    min_prefill: MinPrefill = None,
    workload: Workload = "512:128",
    pin: Pin = None,
    only_types: OnlyTypes = None,
    exclude_types: ExcludeTypes = None,
    max_type_changes: MaxTypeChanges = None,
    experts: Experts = None,
    like: Annotated[Path | None, typer.Option(help="Copy the types of this GGUF.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Types from a --tensor-type-file, --custom-q or recipe.")
    ] = None,
    front: Annotated[
        bool, typer.Option("--front", help="Show all that can be had instead of one plan.")
    ] = False,
    ladder: Annotated[
        int | None, typer.Option(min=2, max=100, help="Write this many plans, small to large.")
    ] = None,
    device: Device = None,
    effort: EffortName = "normal",
    minutes: Minutes = None,
    metric: Metric = "kld",
    feedback: Feedback = False,
    unchecked: Unchecked = False,
    refine: Refine = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="[plan.json]")] = None,
    workdir: Workdir = None,
    threads: Threads = None,
    allow_requantize: Requantize = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose a quant type for every tensor; probes and profiles first where that is missing."""
    from apreqel import console, pipeline

    wishes, wanted = dict(locals()), _effort(effort, minutes)
    _check_together(wishes)
    with _workspace(model, workdir, threads, allow_requantize, quiet) as space:
        request = _request(space, wishes)
        known = pipeline.measured(space)
        if known is None:
            known = pipeline.probe(space, effort=wanted, texts=_texts(None))
        pipeline.use_metric(known[0], metric)
        timed = pipeline.profile_for(space, request, device)
        if front:
            found = pipeline.front(space, request, *known, timed)
        elif ladder:
            steps = pipeline.ladder(space, request, *known, timed, ladder, not unchecked)
        else:
            made, path = pipeline.plan(space, request, *known, timed, output, not unchecked, refine)
    if front:
        console.write_json(found) if json else console.show_front(found)
    elif ladder:
        console.write_json([p for p, _ in steps]) if json else console.show_ladder(steps)
    else:
        console.write_json(made) if json else console.show_plan(made, path)


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    tensor: Annotated[str | None, typer.Argument(metavar="[TENSOR]")] = None,
    json: Json = False,
) -> None:
    """Why tensors got their types: damage, bytes and seconds in each type, and close choices."""
    from apreqel import console, pipeline
    from apreqel.plan.explain import (
        explain_tensor,
        nearest_exchange,
        nearest_exchanges,
        shares_by_role,
    )

    solved, state, made, inventory = pipeline.explained(plan)
    if tensor is not None:
        rows = explain_tensor(solved, state, tensor)
        exchange = nearest_exchange(solved, list(solved.options.names).index(tensor))
        if json:
            console.write_json({"types": rows, "exchange": exchange, "binding": made.binding})
        else:
            console.show_explained_tensor(made, tensor, rows, exchange)
        return
    shares, exchanges = shares_by_role(solved, inventory), nearest_exchanges(solved, 12)
    if json:
        console.write_json({"roles": shares, "exchanges": exchanges, "binding": made.binding})
    else:
        console.show_explained(made, shares, exchanges)


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
        n_threads=threads or pipeline.usual_threads(),
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
    from apreqel.evaluate.verify import VerifySettings
    from apreqel.model.inventory import find_model

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
def compare(
    model: Model,
    max_size: MaxSize = "Q4_K_M",
    verify_text: VerifyText = None,
    tokens: Scored = 3060,
    no_speed: NoSpeed = False,
    workdir: Workdir = None,
    threads: Threads = None,
    allow_requantize: Requantize = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Other ways to choose types at the same size: uniform, stock, by error, by score, ours."""
    from apreqel import console, pipeline
    from apreqel.evaluate.verify import VerifySettings
    from apreqel.plan.request import size_from

    with _workspace(model, workdir, threads, allow_requantize, quiet) as space:
        report = pipeline.compare(
            space,
            size_from(max_size or "Q4_K_M", space.inventory),
            text=_verify_text(verify_text),
            settings=VerifySettings(n_scored=tokens, with_speed=not no_speed),
        )
    if json:
        console.write_json(report)
    else:
        console.show_verification(report)


@app.command()
def auto(
    model: Model,
    prefer: Prefer = "accuracy",
    weights: Weights = None,
    max_size: MaxSize = None,
    target_bpw: TargetBpw = None,
    max_kld: MaxKld = None,
    max_degradation: MaxDegradation = None,
    max_ram: MaxRam = None,
    fit: Fit = False,
    ctx: RunCtx = None,
    min_decode: MinDecode = None,
    min_prefill: MinPrefill = None,
    workload: Workload = "512:128",
    pin: Pin = None,
    only_types: OnlyTypes = None,
    exclude_types: ExcludeTypes = None,
    max_type_changes: MaxTypeChanges = None,
    experts: Experts = None,
    device: Device = None,
    feedback: Feedback = False,
    effort: EffortName = "normal",
    minutes: Minutes = None,
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
    from apreqel.evaluate.verify import VerifySettings

    wishes = dict(locals())
    with _workspace(model, workdir, threads, allow_requantize, quiet) as space:
        result = pipeline.auto(
            space,
            _request(space, wishes),
            device=device,
            effort=_effort(effort, minutes),
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
        n_threads=threads,
        allow_requantize=allow_requantize,
        on_progress=_reporter(quiet),
    )


def _reporter(quiet: bool) -> Any:
    import atexit

    from apreqel.console import Reporter

    reporter = Reporter(quiet)
    atexit.register(reporter.finish)
    return reporter


def _effort(name: str, minutes: float | None) -> Effort:
    from apreqel.sensitivity.measure import effort_from

    return effort_from(name, minutes)


def _check_together(wishes: Mapping[str, Any]) -> None:
    """Raise UsageError for options of `plan` that contradict each other, before any work."""
    from apreqel.sensitivity.damage import METRICS

    metric = wishes["metric"]
    if metric not in METRICS:
        raise UsageError(f"--metric {metric!r}: choose one of {', '.join(METRICS)}")
    if metric != "kld" and wishes["max_kld"] is not None:
        raise UsageError("--max-kld limits KL divergence; with --metric perplexity leave it out")
    many = wishes["front"] or wishes["ladder"]
    if wishes["refine"] and (wishes["unchecked"] or many or metric != "kld"):
        raise UsageError(
            "--refine compares real files of one plan by KL divergence: not with --unchecked, "
            "--front, --ladder or --metric perplexity"
        )
    if wishes["refine"] and (wishes["weights"] or wishes["prefer"] == "balanced"):
        raise UsageError(
            "--refine compares plans by size, speed or closeness: not with --prefer balanced or "
            "--weights"
        )


def _texts(paths: Sequence[Path] | None) -> list[Text]:
    from apreqel.sensitivity import calibration

    return [calibration.read_text(p) for p in paths] if paths else calibration.bundled_texts()


def _verify_text(path: Path | None) -> Text:
    from apreqel.sensitivity import calibration

    return calibration.read_text(path) if path else calibration.heldout_text()


def _request(space: Workspace, wishes: Mapping[str, Any]) -> PlanRequest:
    """The options of `plan` and `auto`, by their names there. Raises UsageError."""
    from apreqel.plan import request
    from apreqel.plan.options import parse_constraints
    from apreqel.sensitivity.experts import require_count

    prefer, limit, ram = wishes["prefer"], wishes["max_size"], wishes["max_ram"]
    if prefer not in request.PRIORITIES:
        raise UsageError(f"--prefer {prefer!r}: choose one of {', '.join(request.PRIORITIES)}")
    if wishes["experts"] is not None:
        require_count(space.inventory, wishes["experts"])
    constraints = parse_constraints(
        wishes["pin"] or [], wishes["only_types"], wishes["exclude_types"]
    )
    copied = request.copied_pins(space.inventory, wishes.get("like"), wishes.get("recipe"))
    size = request.size_from(limit, space.inventory) if limit else None
    if copied and size is None:
        size = request.any_size(space.inventory)
    klds = [wishes["max_kld"]]
    if wishes["max_degradation"]:
        klds.append(request.parse_degradation(wishes["max_degradation"]))
    rams = [request.parse_size(ram, "--max-ram")] if ram else []
    if wishes["fit"]:
        rams.append(request.free_memory())
    return request.PlanRequest(
        prefer,
        max_size_bytes=size,
        target_bpw=wishes["target_bpw"],
        max_kld_nats=min((kld for kld in klds if kld is not None), default=None),
        max_ram_bytes=min(rams, default=None),
        n_ctx=request.parse_context(wishes["ctx"]),
        longest_context=wishes["ctx"] == "max",
        min_decode_tps=wishes["min_decode"],
        min_prefill_tps=wishes["min_prefill"],
        workload=request.parse_workload(wishes["workload"]),
        weights=request.parse_weights(wishes["weights"]) if wishes["weights"] else {},
        max_type_changes=wishes["max_type_changes"],
        experts_used=wishes["experts"],
        feedback=wishes["feedback"],
        constraints=replace(constraints, pins=[*copied, *constraints.pins]),
    )


def _expected(gguf: Path, model: str | None, plan: Path | None) -> tuple[Any, str]:
    """The plan to check against, if any, and the original model."""
    from apreqel.plan.plan import Plan

    expected = Plan.load(plan) if plan else None
    original = model or (expected.model_files[0] if expected else None)
    if original is None:
        raise UsageError(f"{gguf}: what is its original? give --model ORIGINAL or --plan PLAN")
    return expected, original


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
