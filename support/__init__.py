"""What stands below the algorithms and knows neither of them: files, runs, drawing."""

import sys


def one_line_interrupts():
    """For a program, before it imports what is slow: Ctrl-C that nothing catches is one line."""
    def hook(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
