"""`export`, `run`, `doctor`: a written file published, served, and what is amiss."""

from __future__ import annotations

from typer import Exit

from apreqel import arguments as arg
from apreqel.commands.given import text_to_verify, usual_settings, workspace
from apreqel.console.terminal import answer
from apreqel.errors import ApreqelError


def export(
    gguf: arg.FileOrModel,
    to: arg.To,
    plan: arg.Expected = None,
    ladder: arg.AsLadder = False,
    name: arg.PublicName = None,
    base_model: arg.BaseModel = None,
    quantized_by: arg.QuantizedBy = None,
    verify_text: arg.VerifyText = None,
    tokens: arg.Scored = 3060,
    no_speed: arg.NoSpeed = False,
    workdir: arg.Workdir = None,
    threads: arg.Threads = None,
    force: arg.Force = False,
    allow_requantize: arg.Requantize = False,
    json: arg.Json = False,
    quiet: arg.Quiet = False,
) -> None:
    """Make a folder to publish: the file, a model card, a Modelfile, all that remakes it."""
    from apreqel import pipeline
    from apreqel.console import publishing as view
    from apreqel.evaluate.verify import Trial
    from apreqel.model.inventory import find_model
    from apreqel.publish import folder
    from apreqel.publish.ladder import export_ladder
    from apreqel.publish.records import planned_file

    asked = folder.Publishing(to, name, base_model, quantized_by, force)
    if not ladder:
        found = planned_file(find_model(gguf), plan, workdir)
        answer(json, view.show_exported, folder.export(found, asked))
        return
    with (
        workspace(gguf, workdir, threads, allow_requantize, quiet) as given,
        pipeline.equalised(given, pipeline.was_equalised(given)) as space,
    ):
        settings = usual_settings(space, tokens, with_speed=not no_speed)
        trial = Trial(text_to_verify(verify_text), [], settings)
        done = export_ladder(space, asked, trial)
    answer(json, view.show_exported, done)


def run(
    gguf: arg.FileToRun,
    show: arg.ShowOnly = False,
    host: arg.Host = "127.0.0.1",
    port: arg.Port = 8000,
    workdir: arg.Workdir = None,
    threads: arg.Threads = None,
    json: arg.Json = False,
) -> None:
    """Serve a file as it was planned for (OpenAI's protocol), or show how to run it."""
    from apreqel import running
    from apreqel.console import publishing as view
    from apreqel.model.inventory import find_model

    found = running.run_of(find_model(gguf), workdir, threads)
    if show:
        answer(json, view.show_run, found, data=view.run_json)
        return
    running.run(found, host, port, lambda bound: view.show_serving(found, host, bound))


def doctor(
    model: arg.MaybeModel = None,
    workdir: arg.Workdir = None,
    json: arg.Json = False,
) -> None:
    """What of this machine, the installation and a model's folder is in order."""
    from apreqel.console import publishing as view
    from apreqel.doctor import examine

    found = examine(model, workdir)
    answer(json, view.show_findings, found, data=view.findings_json)
    if not all(finding.ok for finding in found):
        raise Exit(ApreqelError.exit_code)
