"""Where a process of the command line starts, with next to no imports: Ctrl-C is one line from the first moment."""

from __future__ import annotations

from robustbench_deq.commands.interrupts import ending_at_once


def start() -> None:
    with ending_at_once():
        from robustbench_deq.commands.main import main
    main()
