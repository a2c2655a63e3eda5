"""Flags from the fields of a config dataclass, their ranges, and errors of one line.

A config is a dataclass whose fields are made by `option`; `parser` gives each of them a flag, and
`check_ranges` refuses values out of range. Errors end the program with exit code 2.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys

RANGES = {
    "positive": lambda x: 0 < x < math.inf, "at least 0": lambda x: 0 <= x < math.inf,
    "at least 2": lambda x: x >= 2, "in (0, 1)": lambda x: 0 < x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1, "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "positive sizes such as 128,128": lambda x: len(x) and 0 < min(x) and max(x) <= 10**6,
    "different numbers from 0, such as 0,1": lambda x: len(set(x)) == len(x)
    and min(x, default=0) >= 0}
POSITIVE, NOT_NEGATIVE, SIZES = "positive", "at least 0", "positive sizes such as 128,128"
INDICES = "different numbers from 0, such as 0,1"
MOST, MOST_SEEDS = 10**9, 10_000        # of a count or seed; of seeds in one command


def option(default, help, allowed=None):
    """A field of a config dataclass, from which `parser` makes a flag.

    help: meaning and published value. allowed: a tuple of choices, which the flag alone checks, or
    a key of RANGES, which `check_ranges` checks.
    """
    return dataclasses.field(default=default, metadata={
        "help": help, "choices": allowed if isinstance(allowed, tuple) else None,
        "range": allowed if isinstance(allowed, str) else None})


def check_types(config_class, values):
    """ValueError unless values {name: value} are the fields of a config, each of its default's
    type; a float may be an integer, a tuple a list."""
    names = {field.name for field in dataclasses.fields(config_class)}
    if odd := values.keys() ^ names:
        raise ValueError(f"{'no' if min(odd) in names else 'unknown'} field {min(odd)!r:.60}; this "
                         "is of another version, or damaged")
    for field in dataclasses.fields(config_class):
        what, test = TYPES[type(field.default)]
        if not test(values[field.name]):
            raise ValueError(f"{flag_of(field.name)} must be {what}, not "
                             f"{values[field.name]!r:.60}")


def _is_integer(x):
    return isinstance(x, int) and not isinstance(x, bool)


TYPES = {bool: ("true or false", lambda x: isinstance(x, bool)), int: ("an integer", _is_integer),
         float: ("a finite number", lambda x: (_is_integer(x) or isinstance(x, float))
                 and abs(x) <= sys.float_info.max),
         str: ("a text", lambda x: isinstance(x, str)),
         tuple: ("a list of integers", lambda x: isinstance(x, (tuple, list))
                 and all(map(_is_integer, x)))}


def check_ranges(config):
    """ValueError unless each field of a config is of its default's type and has one of its choices,
    or lies in its range; integers are at most MOST.

    Environments are left out: those registered later are no choices, and `envs.make` knows them.
    """
    check_types(type(config), dataclasses.asdict(config))
    for field in dataclasses.fields(config):
        choices, within = field.metadata["choices"], field.metadata["range"]
        if choices and field.name != "env":
            require(config, lambda x: x in choices, "one of " + ", ".join(choices), field.name)
        if within:
            require(config, RANGES[within], within, field.name)
        if isinstance(getattr(config, field.name), int):
            require(config, lambda x: x <= MOST, f"at most {MOST}", field.name)


def refuse_unused(config, plain, unused):
    """ValueError if a field differs from that of `plain`, the config without the flags given,
    although it has no effect. unused: {field: with which flag, or False where it has one}."""
    for name, reason in unused.items():
        if reason and getattr(config, name) != getattr(plain, name):
            raise ValueError(f"{flag_of(name)} has no effect with {reason}")


def filled(text):
    """A text that is not empty; an empty one is what an unset variable of a shell leaves."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def sizes(text):
    """"128,128" -> (128, 128); "none" -> ()."""
    try:
        return tuple(int(x) for x in text.split(",")) if text != "none" else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers as in 128,128, not {text!r}") from None


def seed_range(text):
    """"3" -> [3]; "0-4" -> [0, 1, 2, 3, 4]; "1,5" -> [1, 5].

    ValueError: anything else, a seed twice, or more than MOST_SEEDS."""
    seeds = []
    for part in text.replace(" ", "").split(","):
        ends = part.split("-")
        if len(ends) > 2 or not all(re.fullmatch(r"\d{1,9}", x, re.ASCII) for x in ends) or (
                int(ends[0]) > int(ends[-1])):
            raise ValueError(f"seeds are A-B or A,B,C, not {text[:60]!r}")
        seeds += range(int(ends[0]), int(ends[-1]) + 1)[:MOST_SEEDS + 1]
    if len(set(seeds)) < len(seeds) or len(seeds) > MOST_SEEDS:
        raise ValueError(f"seeds are each once and at most {MOST_SEEDS:,}, not {text[:60]!r}")
    return seeds


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one short line and name what was perhaps meant."""

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            known = [flag for action in self._actions for flag in action.option_strings]
            wrong = [word for word in message.split()[2:] if word.startswith("-")]
            message += "".join(perhaps(word.split("=")[0], known) for word in wrong[:1])
        exit_with_error(message, self.prog)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            names = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"invalid choice {value!r}{perhaps(value, action.choices)}; "
                + (f"choose from {names}" if len(names) < 100 else "--help lists all"))


def perhaps(word, known):
    """" (did you mean X?)" for the nearest of the known words, "" if none is near."""
    near = difflib.get_close_matches(str(word), known)
    return f" (did you mean {near[0]}?)" if near else ""


def require(config, test, what, *names):
    """ValueError unless test(value) holds for each named field of config; what: the test in words,
    such as "positive"."""
    for name in names:
        if not test(getattr(config, name)):
            value = str(getattr(config, name))[:60]
            raise ValueError(f"{flag_of(name)} must be {what}, not {value}")


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
    p = Parser(prog=prog, usage="%(prog)s [flags]", description=description, allow_abbrev=False,
               argument_default=argparse.SUPPRESS,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    group = p.add_argument_group("this run")
    group.add_argument("--out", metavar="DIR", type=filled,
                       help="folder of the run (default: runs/...)")
    group.add_argument("--quick", action="store_true", help="the whole path in seconds, pictures "
                       "included; success is not promised")
    group.add_argument("--seeds", metavar="A-B", type=filled,
                       help="several seeds, each a process of its own")
    group.add_argument("--jobs", type=int, metavar="N", help="processes at once, with --seeds "
                       "(default 1)")
    group.add_argument("--resume", metavar="DIR", type=filled,
                       help="go on with an interrupted run")
    group.add_argument("--eval", metavar="DIR", type=filled,
                       help="evaluate the checkpoint of a run")
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
                               type={tuple: sizes, str: filled}.get(kind, kind))
    return p


def text_of(value):
    """A value as it is typed after its flag: (64, 64) -> "64,64"; "none" for () and no text."""
    return (",".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "none"
