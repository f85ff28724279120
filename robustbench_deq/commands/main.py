"""The command line: what the commands are, and how they fail. Each is a module of this package.

Exit codes: 0 done, 1 a run failed, 2 wrong usage. Results go to standard output, progress and errors to standard error,
and an error is one line.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import traceback
from typing import Any

import click

from robustbench_deq.errors import MAX_MESSAGE, RunError, UsageError, shortened
from robustbench_deq.memory import keep_freed_memory
from robustbench_deq.quiet import ignore_torch_deprecations

DEBUG_VARIABLE = "ROBUSTBENCH_DEQ_DEBUG"
COMMANDS = {
    "attack": "attack",
    "attacks": "listings",
    "bench": "bench",
    "check": "check",
    "datasets": "listings",
    "models": "models",
    "report": "report",
    "train": "train",
}
"""The module of each, imported when the command is asked for: torch takes seconds to import, and not all need it."""


class Commands(click.Group):
    """A group that imports a command when it is asked for, and turns every failure into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"{__package__}.{COMMANDS[name]}"), name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:  # of a truncated file; click would take it for the end of a terminal's input
            raise _unexpected(error) from error

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        ignore_torch_deprecations()
        try:
            return super().main(*args, standalone_mode=False, **kwargs)
        except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except (UsageError, click.UsageError) as error:
            _show_cause(error)
            _fail(2, str(error) if isinstance(error, UsageError) else error.format_message())
        except (KeyboardInterrupt, click.Abort):
            _fail(1, "interrupted")
        except RunError as error:
            _show_cause(error)
            _fail(1, str(error))
        except click.ClickException as error:
            _fail(1, error.format_message())
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            _fail(1, str(_unexpected(error)))


def _show_cause(error: Exception) -> None:
    """Where the debug variable is set, the traceback of what the error was raised from."""
    if os.environ.get(DEBUG_VARIABLE) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)


def _unexpected(error: BaseException) -> RunError:
    reason = " ".join(str(error).split())[:300] or "no message"
    return RunError(f"the run failed with {type(error).__name__}: {reason}; set {DEBUG_VARIABLE}=1 for the traceback")


def _fail(code: int, message: str) -> None:
    """End with one line, of a length that can be read, without what a terminal would take for commands."""
    shown = "".join(letter if letter.isprintable() else " " for letter in shortened(message, MAX_MESSAGE))
    click.echo(f"Error: {' '.join(shown.split())}", err=True)
    sys.exit(code)


def _version() -> str:
    try:
        return importlib.metadata.version("robustbench-deq")
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout that is not installed"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="robustbench-deq")
def main() -> None:
    """Adversarial robustness of deep equilibrium models: attack, train, report."""
    keep_freed_memory()
