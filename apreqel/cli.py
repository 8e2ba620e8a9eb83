"""The `apreqel` command: its subcommands, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from apreqel import __version__, last_words
from apreqel import arguments as arg
from apreqel.commands.files import auto, compare, quantize, verify
from apreqel.commands.measuring import inspect, probe, profile
from apreqel.commands.planning import explain, plan, report
from apreqel.commands.publishing import doctor, export, run
from apreqel.console.terminal import write
from apreqel.errors import ApreqelError, Interrupted, Killed, UsageError, printable

# With more options than these --help shows them in groups.
_MANY_OPTIONS = 20


class Command(TyperCommand):
    """One whose --help groups its options, where there are many."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        if sum(p.param_type_name == "option" for p in self.params) <= _MANY_OPTIONS:
            super().format_options(ctx, formatter)
            return
        groups: dict[str, list[Any]] = {"Arguments": [], **{name: [] for name in arg.GROUPS}}
        group_of = {name: group for group, names in arg.GROUPS.items() for name in names}
        for parameter in self.get_params(ctx):
            is_option = parameter.param_type_name == "option"
            group = group_of.get(parameter.name or "", "Others") if is_option else "Arguments"
            if record := parameter.get_help_record(ctx):
                groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


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


for command in (
    inspect, profile, probe, plan, explain, quantize, verify, compare, auto, report, export, run,
    doctor,
):  # fmt: skip
    app.command(cls=Command)(command)


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
