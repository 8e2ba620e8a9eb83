"""`inspect`, `profile`, `probe`: what there is to know before a plan."""

from __future__ import annotations

from pathlib import Path

from apreqel import arguments as arg
from apreqel.commands.given import as_gguf, calibration_texts, foretell, workspace
from apreqel.console.terminal import Reporter, answer, remark
from apreqel.errors import UsageError


def inspect(model: arg.Model, json: arg.Json = False) -> None:
    """What a model holds: roles, shapes, legal types, exact bytes.

    Reads only headers; a Hugging Face checkpoint is converted first.
    """
    from apreqel.console import inspect as view
    from apreqel.model.inventory import find_model, read_inventory

    file, _ = as_gguf(model, None, Reporter())
    answer(json, view.show, read_inventory(find_model(file)), data=view.as_json)


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
    reporter = Reporter(quiet)
    if model is not None and not word:
        model, workdir = as_gguf(model, workdir, reporter)
    if word or device is not None:
        measured, inventory = store.named_profile(device or name or "", None if word else model)
    else:
        measured, inventory = profile_model(model, workdir, threads, again, reporter)
    if export_to is not None:
        measured.save(export_to)
    answer(json, view.show, measured, inventory, data=view.as_json)


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
    wanted, chosen = effort_from(effort, minutes), calibration_texts(text)
    with workspace(model, workdir, threads, allow_requantize, quiet) as given:
        foretell(given, wanted, plain=False, whole=False)
        with pipeline.equalised(given, equalise) as space:
            probed = pipeline.probe(space, effort=wanted, texts=chosen, imatrix_file=imatrix)
            files = measured_files(probed).own
    answer(json, view.show, probed.sensitivity, files, data=view.as_json)
