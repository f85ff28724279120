"""Starts the command line from a checkout; installed, it is `robustbench-deq`."""

from robustbench_deq.commands.main import main

if __name__ == "__main__":
    main()
