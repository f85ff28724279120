"""The command line: what the commands are, and how they fail. Each is a module of this package.

Exit codes: 0 done, 1 a run failed, 2 wrong usage. Results go to standard output, progress and errors to standard error,
and an error is one line.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from typing import Any

import click

from robustbench_deq.commands.interrupts import ending_at_once
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import is_disk_full
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
        with ending_at_once():
            module = importlib.import_module(f"{__package__}.{COMMANDS[name]}")
        return getattr(module, name)

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        ignore_torch_deprecations()
        try:
            return super().main(*args, standalone_mode=False, **kwargs)
        except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except (UsageError, click.UsageError) as error:
            _fail(2, str(error) if isinstance(error, UsageError) else error.format_message())
        except (KeyboardInterrupt, click.Abort):
            _fail(1, "interrupted")
        except RunError as error:
            _fail(1, str(error))
        except click.ClickException as error:
            _fail(1, error.format_message())
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            if is_disk_full(error):
                _fail(1, "no space left on the disk; make room, and run the command again")
            reason = " ".join(str(error).split())[:300] or "no message"
            _fail(1, f"the run failed with {type(error).__name__}: {reason}; set {DEBUG_VARIABLE}=1 for the traceback")


def _fail(code: int, message: str) -> None:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
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
