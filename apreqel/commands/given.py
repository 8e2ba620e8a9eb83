"""From options to library values, for the commands."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from apreqel.console.terminal import Reporter, remark
from apreqel.errors import UsageError
from apreqel.plan.wishes import Wishes

if TYPE_CHECKING:
    from apreqel.evaluate.verify import VerifySettings
    from apreqel.plan.plan import Plan
    from apreqel.sensitivity.effort import Effort
    from apreqel.sensitivity.texts import Text
    from apreqel.workspace import Workspace

# Of timing, where all is to be quick.
_QUICK_REPETITIONS = 3


def workspace(
    model: str, workdir: Path | None, threads: int | None, allow_requantize: bool, quiet: bool
) -> AbstractContextManager[Workspace]:
    from apreqel import pipeline

    reporter = Reporter(quiet)
    file, folder = as_gguf(model, workdir, reporter)
    return pipeline.open_workspace(
        file,
        folder=folder,
        n_threads=threads,
        allow_requantize=allow_requantize,
        progress=reporter,
    )


def as_gguf(model: str, workdir: Path | None, reporter: Reporter) -> tuple[str, Path | None]:
    """MODEL and its work folder; of a checkpoint its GGUF, converted where it was not."""
    from apreqel.checkpoint.source import checkpoint_source

    source = checkpoint_source(model, workdir, reporter)
    if source is None:
        return model, workdir
    reporter.finish()
    for note in source.notes:
        remark(note)
    return str(source.file), source.workdir


def foretell(space: Workspace, effort: Effort, *, plain: bool, whole: bool) -> None:
    """Of a model that was not probed yet, how long it will take; `whole`: to a verified file."""
    from apreqel.console import forecast as view
    from apreqel.forecast import forecast_for, token_seconds
    from apreqel.sensitivity.effort import EFFORTS
    from apreqel.sensitivity.equalise import probed_at

    if probed_at(space.folder, True) or probed_at(space.folder, False):
        return
    token = token_seconds(space)
    coming = forecast_for(space, effort, token, plain=plain, whole=whole)
    quick = forecast_for(space, EFFORTS["quick"], token, plain=plain, whole=whole)
    view.show(coming, quick if quick.total_seconds < 0.9 * coming.total_seconds else None)


def without_own_type(wishes: Wishes, model: str) -> Wishes:
    """Of the demo: else the best of its size would be the demo itself."""
    from apreqel.model.inventory import DEMO, DEMO_TYPE

    if model != DEMO or wishes.only_types is not None:
        return wishes
    remark(f"the demo's own type, {DEMO_TYPE}, is left out: it would keep the demo as it is")
    excluded = [DEMO_TYPE] if wishes.exclude_types is None else [DEMO_TYPE, wishes.exclude_types]
    return replace(wishes, exclude_types=",".join(excluded))


def calibration_texts(paths: Sequence[Path] | None) -> list[Text]:
    from apreqel.sensitivity.texts import bundled_texts, read_text

    return [read_text(path) for path in paths] if paths else bundled_texts()


def text_to_verify(path: Path | None) -> Text:
    from apreqel.sensitivity.texts import heldout_text, read_text

    return read_text(path) if path else heldout_text()


def usual_settings(
    space: Workspace, tokens: int, *, with_speed: bool = True, quick: bool = False
) -> VerifySettings:
    """For commands that leave the context to us: no more than the model was trained for."""
    from apreqel.evaluate.verify import VerifySettings

    usual = VerifySettings(n_scored=tokens, with_speed=with_speed)
    return replace(
        usual,
        n_ctx=min(usual.n_ctx, space.inventory.context_length or usual.n_ctx),
        repetitions=_QUICK_REPETITIONS if quick else usual.repetitions,
    )


def expected_of(
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
