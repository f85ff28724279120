"""The command line: where it starts and how it fails.

Exit codes: 0 done, 1 a run failed, 2 wrong usage. Results go to standard output, progress and errors to standard error,
and an error is one line.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

import robustbench_deq
from robustbench_deq.commands.options import COMMANDS
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import is_disk_full
from robustbench_deq.memory import keep_freed_memory
from robustbench_deq.quiet import ignore_torch_deprecations

DEBUG_VARIABLE = "ROBUSTBENCH_DEQ_DEBUG"


class Commands(click.Group):
    """A group that turns every failure into one line and an exit code."""

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


@click.group(cls=Commands, commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(robustbench_deq.__version__, prog_name="robustbench-deq")
def main() -> None:
    """Adversarial robustness of deep equilibrium models: attack, train, report."""
    keep_freed_memory()
