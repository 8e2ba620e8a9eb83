"""What may be written after each command: options, their flags, their lines of --help."""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Argument, Option

from apreqel.plan.wishes import Wishes

# How the command line shows the `Wishes`, in the order of --help.
WISHES: dict[str, Any] = {
    "prefer": Option(help="memory, latency, accuracy or balanced."),
    "weights": Option(help="memory=1,latency=1,accuracy=1 instead of --prefer: numbers for each."),
    "max_size": Option(help="Largest file: 95MB, 1.5GiB, bytes, or a stock preset's size: Q4_K_M."),
    "target_bpw": Option(min=1.0, max=32.0, help="Bits per weight."),
    "max_kld": Option(min=0.0, help="Largest predicted KLD, in nats."),
    "max_degradation": Option(help="Most predicted gain in perplexity: 1%."),
    "max_ram": Option(help="Most memory of a run with --ctx filled: 500MB, 2GiB."),
    "fit": Option("--fit", help="Fit into the memory that is free here now, less a tenth."),
    "ctx": Option(help="Tokens of context to reckon memory with [4096], or max."),
    "min_decode": Option("--min-decode-tps", min=0.01, help="Least tokens/s generated."),
    "min_prefill": Option("--min-prefill-tps", min=0.01, help="Least tokens/s of a prompt."),
    "any_speed": Option(
        "--any-speed",
        help="Be slower than the stock preset of that size where that is closer.",
    ),
    "workload": Option(help="Tokens of prompt:answer, what --prefer latency makes fast."),
    "pin": Option(help="'pattern=TYPE' for tensors by name, as in 'blk.0.*=Q8_0'; repeatable."),
    "only_types": Option(help="Use these types only: Q4_0,Q8_0."),
    "exclude_types": Option(help="Leave these types out: Q5_1,Q4_1."),
    "max_type_changes": Option(min=0, help="Most tensors not in the type of the stock preset."),
    "experts": Option(help="Active experts a token instead of the model's own count."),
    "like": Option(help="Copy the types of this GGUF."),
    "recipe": Option(help="Types from a --tensor-type-file, --custom-q or recipe."),
    "front": Option("--front", help="Show all that can be had instead of one plan."),
    "ladder": Option(min=2, max=100, help="Write this many plans, small to large."),
    "device": Option(help="Plan for another device: a name of 'profile list', or a file."),
    "effort": Option(help="Of probing, where it is not done: quick, normal, thorough."),
    "minutes": Option(min=0.1, help="Stop probing after this, whatever is left."),
    "metric": Option(help="How damage to the model's predictions is measured: kld or perplexity."),
    "plain": Option("--plain", help="Write weights as ggml rounds them: quicker, less close."),
    "unchecked": Option(
        "--unchecked", help="Do not measure the plan and its rivals as real files."
    ),
    "refine": Option(
        help="Probe swaps of single types around the plan, and plan again.  [default: below 4 bits "
        "per weight]"
    ),
}
# How --help groups them, and what stands beside them, where there are many; the rest comes last.
GROUPS = {
    "What you want": ("prefer", "weights", "any_speed", "workload", "metric", "front", "ladder"),
    "Limits": ("max_size", "target_bpw", "max_kld", "max_degradation", "max_ram", "fit", "ctx",
               "min_decode", "min_prefill"),
    "By hand": ("pin", "only_types", "exclude_types", "max_type_changes", "experts", "like",
                "recipe"),
    "How long, how sure": ("effort", "minutes", "plain", "equalise", "unchecked", "refine", "text",
                           "against", "verify_text", "tokens"),
    "Device and files": ("device", "threads", "output", "workdir", "force", "allow_requantize"),
}  # fmt: skip
# What `plan` and `auto` both begin with.
LIMITS = tuple(WISHES)[: list(WISHES).index("experts") + 1]


def asking(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these `Wishes` where its parameter `wishes` stands."""
    types = get_type_hints(Wishes)

    def option(place: Parameter, name: str) -> Parameter:
        annotation, default = Annotated[types[name], WISHES[name]], getattr(Wishes, name)
        return place.replace(name=name, annotation=annotation, default=default)

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(wishes=Wishes(**{name: given.pop(name) for name in names}), **given)

        written = signature(command, eval_str=True)
        parameters: list[Parameter] = []
        for p in written.parameters.values():
            parameters += [option(p, name) for name in names] if p.name == "wishes" else [p]
        run.__signature__ = written.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return with_options


# --- options of several commands -----------------------------------------------------------------

Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A GGUF file (of a split model the first), a Hugging Face checkpoint's folder or "
        "org/name[@revision], or 'demo'.",
    ),
]
ModelOrPlan = Annotated[
    str, Argument(metavar="MODEL|PLAN", help="The original GGUF, or a plan.json made for it.")
]
PlanFile = Annotated[Path, Argument(metavar="PLAN", help="A plan.json.")]
Json = Annotated[bool, Option("--json", help="Results as JSON on stdout.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress on stderr.")]
Workdir = Annotated[
    Path | None, Option(help="Where measurements are kept [MODEL.apreqel beside the model].")
]
Threads = Annotated[
    int | None,
    Option(
        "--threads", "-t", min=1, max=256, help="[as tuned on this device, or one a physical core]"
    ),
]
Requantize = Annotated[
    bool, Option("--allow-requantize", help="Accept a model that is quantised already.")
]
Equalise = Annotated[
    bool | None,
    Option(
        help="Rescale channels first; the model's function stays the same.  [default: where the "
        "model's wiring is known]"
    ),
]
Force = Annotated[bool, Option("--force", help="Replace an output that exists.")]
Output = Annotated[Path | None, Option("--output", "-o", help="The GGUF to write.")]
Calibration = Annotated[
    list[Path] | None, Option("--text", help="Calibration text instead of apreqel's own.")
]
VerifyText = Annotated[
    Path | None, Option("--verify-text", help="Verification text instead of apreqel's own.")
]
Against = Annotated[
    list[str] | None, Option(help="A stock preset to compare with; repeat for more.")
]
Scored = Annotated[int, Option("--tokens", min=64, help="Tokens to score.")]
NoSpeed = Annotated[bool, Option("--no-speed", help="Do not measure tokens/s.")]
Device = Annotated[str | None, WISHES["device"]]
Effort = Annotated[str, WISHES["effort"]]
MaxSize = Annotated[str | None, WISHES["max_size"]]
Minutes = Annotated[float | None, WISHES["minutes"]]

# --- options of one command ----------------------------------------------------------------------

Version = Annotated[bool, Option("--version", help="Show the version.")]
ModelOrWord = Annotated[
    str | None, Argument(metavar="[MODEL|list|show]", help="A model; 'list'; or 'show' NAME.")
]
ProfileName = Annotated[str | None, Argument(metavar="[NAME]", help="For 'show'.")]
Again = Annotated[bool, Option("--again", help="Measure anew.")]
ExportTo = Annotated[Path | None, Option("--export", help="Write the profile to this file.")]
ImportFrom = Annotated[Path | None, Option("--import", help="Take up another device's profile.")]
ImatrixFile = Annotated[Path | None, Option("--imatrix", help="Use this imatrix, GGUF or .dat.")]
PlanOutput = Annotated[Path | None, Option("--output", "-o", help="[plan.json]")]
ReportOutput = Annotated[Path, Option("--output", "-o", help="The HTML file to write.")]
TensorName = Annotated[str | None, Argument(metavar="[TENSOR]")]
QuantisedFile = Annotated[Path, Argument(metavar="GGUF", help="The quantised file.")]
Original = Annotated[str | None, Option(help="The original [that of the plan].")]
Expected = Annotated[Path | None, Option(help="Check the file against this plan.")]
Ctx = Annotated[int, Option("--ctx", min=32, help="Tokens per chunk.")]
FileOrModel = Annotated[
    str, Argument(metavar="GGUF", help="A file that apreqel wrote; with --ladder the model.")
]
To = Annotated[Path, Option("--to", help="The folder to make.")]
AsLadder = Annotated[
    bool,
    Option("--ladder", help="The plans of plan --ladder, as one folder; missing files are made."),
]
PublicName = Annotated[
    str | None, Option("--name", help="What the files are called after [as the model says].")
]
BaseModel = Annotated[
    str | None, Option(help="For the card: ORGANISATION/NAME it was made from [as the file says].")
]
QuantizedBy = Annotated[str | None, Option(help="For the card: who made it.")]
MaybeModel = Annotated[str | None, Argument(metavar="[MODEL]", help="Look at this one, too.")]
FileToRun = Annotated[str, Argument(metavar="GGUF", help="The file to run.")]
ShowOnly = Annotated[
    bool, Option("--show", help="Only the commands, for llama-server, llama-cli, Ollama, Python.")
]
Host = Annotated[str, Option(help="Who may reach it; 0.0.0.0: the whole network.")]
Port = Annotated[int, Option(min=0, max=65535, help="0 takes a free one.")]
