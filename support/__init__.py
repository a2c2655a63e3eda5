"""What stands below the algorithms and knows neither of them: files, runs, drawing."""

import sys


def _excepthook(kind, error, trace):
    """One line for Ctrl-C where no run is there to be saved, as while modules are imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _excepthook
