"""The command line: where it starts and how it fails.

Exit codes: 0 done, 1 a run failed, 2 wrong usage. Results go to standard output, progress and errors to standard error,
and an error is one line.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import click

import robustbench_deq
from robustbench_deq.commands.options import COMMANDS
from robustbench_deq.errors import MAX_MESSAGE, RunError, UsageError, place_of, shortened
from robustbench_deq.files import is_disk_full
from robustbench_deq.memory import keep_freed_memory
from robustbench_deq.quiet import ignore_torch_deprecations

DEBUG_VARIABLE = "ROBUSTBENCH_DEQ_DEBUG"


class Commands(click.Group):
    """A group that turns every failure into one line and an exit code."""

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
            if is_disk_full(error):
                _fail(1, "no space left on the disk; make room, and run the command again")
            _fail(1, str(_unexpected(error)))


def _show_cause(error: Exception) -> None:
    """Where the debug variable is set, the traceback of what the error was raised from."""
    if os.environ.get(DEBUG_VARIABLE) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)


def _unexpected(error: BaseException) -> RunError:
    told = f"{type(error).__name__}: {shortened(' '.join(str(error).split())) or 'no message'}{place_of(error)}"
    return RunError(f"the run failed with {told}; set {DEBUG_VARIABLE}=1 for the traceback")


def _fail(code: int, message: str) -> None:
    """End with one line, of a length that can be read, without what a terminal would take for commands."""
    shown = "".join(letter if letter.isprintable() else " " for letter in shortened(message, MAX_MESSAGE))
    click.echo(f"Error: {' '.join(shown.split())}", err=True)
    sys.exit(code)


@click.group(cls=Commands, commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(robustbench_deq.__version__, prog_name="robustbench-deq")
def main() -> None:
    """Adversarial robustness of deep equilibrium models: attack, train, report."""
    keep_freed_memory()
