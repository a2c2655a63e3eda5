"""Flags from the fields of a config dataclass, their ranges, and errors of one line.

A config is a dataclass whose fields are made by `option`; `parser` gives each of them a flag, and
`check_ranges` refuses values out of range. Errors end the program with exit code 2.
"""

import argparse
import dataclasses
import difflib
import math
import os
import sys

RANGES = {
    "positive": lambda x: 0 < x < math.inf, "at least 0": lambda x: 0 <= x < math.inf,
    "at least 2": lambda x: x >= 2, "in (0, 1)": lambda x: 0 < x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1, "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "positive sizes such as 128,128": lambda x: len(x) and min(x) > 0}
POSITIVE, NOT_NEGATIVE, SIZES = "positive", "at least 0", "positive sizes such as 128,128"


def option(default, help, allowed=None):
    """A field of a config dataclass, from which `parser` makes a flag.

    help: meaning and published value. allowed: a tuple of choices, which the flag alone checks, or
    a key of RANGES, which `check_ranges` checks.
    """
    return dataclasses.field(default=default, metadata={
        "help": help, "choices": allowed if isinstance(allowed, tuple) else None,
        "range": allowed if isinstance(allowed, str) else None})


def check_ranges(config):
    """ValueError unless each field of a config has one of its choices, or lies in its range.

    Environments are left out: those registered later are no choices, and `envs.make` knows them.
    """
    for field in dataclasses.fields(config):
        choices, within = field.metadata["choices"], field.metadata["range"]
        if choices and field.name != "env":
            require(config, lambda x: x in choices, "one of " + ", ".join(choices), field.name)
        if within:
            require(config, RANGES[within], within, field.name)


def sizes(text):
    """"128,128" -> (128, 128); ValueError if these are no integers."""
    return tuple(int(x) for x in text.split(","))


def seed_range(text):
    """"3" -> [3]; "0-4" -> [0, 1, 2, 3, 4]; "1,5" -> [1, 5]. ValueError: none, or one twice."""
    seeds = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are A-B or A,B,C, each once, not {text!r}")
    return seeds


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and name the flag that was perhaps meant."""

    def error(self, message):
        for word in message.replace("unrecognized arguments:", "").split():
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(word.split("=")[0], known, 1)
            if "unrecognized" in message and word.startswith("-") and near:
                message += f" (did you mean {near[0]}?)"
                break
        exit_with_error(message, self.prog)


def require(config, test, what, *names):
    """ValueError unless test(value) holds for each named field of config; what: the test in words,
    such as "positive"."""
    for name in names:
        if not test(getattr(config, name)):
            raise ValueError(f"{flag_of(name)} must be {what}, not {getattr(config, name)}")


def exit_with_error(message, prog=None):
    """Print one line on stderr, "prog: error: message"; exit with code 2."""
    prog = prog or os.path.basename(sys.argv[0])
    print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def flag_of(name):
    """"eval_interval" -> "--eval-interval"."""
    return "--" + name.replace("_", "-")


def parser(config_class, description, prog=None):
    """A `Parser` with a flag for each field of a config dataclass and those of every program; what
    it parses holds only the flags that were given."""
    p = Parser(prog=prog or os.path.basename(sys.argv[0]), usage="%(prog)s [flags]",
               description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    group = p.add_argument_group("this run")
    group.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/...)")
    group.add_argument("--quick", action="store_true", help="the whole path in seconds, pictures "
                       "included; success is not promised")
    group.add_argument("--seeds", metavar="A-B", help="several seeds, each a process of its own")
    group.add_argument("--jobs", type=int, metavar="N", help="processes at once (default 1)")
    group.add_argument("--resume", metavar="DIR", help="go on with an interrupted run")
    group.add_argument("--eval", metavar="DIR", help="evaluate the checkpoint of a run")
    group = p.add_argument_group("the algorithm and its task (environments change some defaults; "
                                 "config.json has what a run used)")
    for field in dataclasses.fields(config_class):
        kind, flag = type(field.default), flag_of(field.name)
        text = f"{field.metadata['help']} (default {text_of(field.default)})".replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag, help=text, choices=field.metadata["choices"],
                               metavar=None if field.metadata["choices"] else kind.__name__.upper()
                               if kind is not tuple else "N,N,...",
                               type=sizes if kind is tuple else kind)
    return p


def text_of(value):
    """A value as it is typed after its flag: (64, 64) -> "64,64"; for the empty text "none"."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value) or "none"
