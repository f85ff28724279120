"""Starts the command line from a checkout; installed, it is `robustbench-deq`."""

from robustbench_deq.commands.start import start

if __name__ == "__main__":
    start()
