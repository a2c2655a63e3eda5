"""Flags from the fields of a config dataclass, their ranges, and wrong flags in one line.

A config is a dataclass whose fields are made by `option`. `parse` gives each of them a flag;
`check_config` refuses values of a wrong type or out of range.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys

POSITIVE, NOT_NEGATIVE, AT_LEAST_2 = "positive", "at least 0", "at least 2"
OPEN, UP_TO_1, BELOW_1, SHARE = "in (0, 1)", "in (0, 1]", "in [0, 1)", "in [0, 1]"
SIZES = "positive sizes such as 128,128"
INDICES = "different numbers from 0, such as 0,1"
RANGES = {
    POSITIVE: lambda x: 0 < x < math.inf, NOT_NEGATIVE: lambda x: 0 <= x < math.inf,
    AT_LEAST_2: lambda x: x >= 2,
    OPEN: lambda x: 0 < x < 1, UP_TO_1: lambda x: 0 < x <= 1, BELOW_1: lambda x: 0 <= x < 1,
    SHARE: lambda x: 0 <= x <= 1,
    SIZES: lambda x: len(x) > 0 and 0 < min(x) and max(x) <= 10**6,
    INDICES: lambda x: len(set(x)) == len(x) and min(x, default=0) >= 0}
MOST, MOST_SEEDS = 10**9, 10_000        # of a count or seed; of seeds in one command


def option(default, help, allowed=None):
    """A field of a config dataclass, from which `parse` makes a flag.

    help: "meaning | published value". allowed: a tuple of choices, or a key of RANGES.
    """
    return dataclasses.field(default=default, metadata={
        "help": help, "choices": allowed if isinstance(allowed, tuple) else None,
        "range": allowed if isinstance(allowed, str) else None})


# ------------------------------------------------------------------------------ the command line


def parse(program, doc, words):
    """The flags in sys.argv -> given {field: value}, call (out, resume, eval, seeds, jobs).

    program: a `support.runs.Program`; doc: the module's docstring, None by python -OO; words:
    {name: help} of further flags without a value, such as quick, which are in `given` if they were
    typed. A wrong flag or value ends the program: one line on stderr, exit code 2.
    """
    p = Parser(prog=program.name.removeprefix("-m "), usage="%(prog)s [flags]", allow_abbrev=False,
               description=(doc or "").split("\n\n")[0]
               + "\n\nTags such as [D1]: docs/deviations.md.",
               argument_default=argparse.SUPPRESS,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    group = p.add_argument_group("this run")
    for name, meta, text in (
            ("out", "DIR", "folder of the run (default: runs/...)"),
            ("resume", "DIR", "go on with an interrupted run, as if it had never stopped"),
            ("eval", "DIR", "evaluate the checkpoint of a run"),
            ("seeds", "A-B", "several seeds, each a process of its own")):
        group.add_argument(f"--{name}", metavar=meta, type=filled, default=None, help=text)
    group.add_argument("--jobs", type=int, metavar="N", default=None,
                       help="processes at once, with --seeds (default 1)")
    for name, text in words.items():
        group.add_argument(flag_of(name), action="store_true", help=text)
    group = p.add_argument_group("the algorithm and its task (environments change some defaults; "
                                 "config.json has what a run used)")
    for field in dataclasses.fields(program.config_class):
        add_flag(group, field)
    given = vars(p.parse_args())
    call = argparse.Namespace(**{x: given.pop(x) for x in ("out", "resume", "eval", "seeds",
                                                           "jobs")})
    if (call.resume or call.eval) and (given or call.out or call.seeds
                                       or (call.resume and call.eval)):
        p.error("--resume and --eval take the flags of the run itself; give no other")
    if call.jobs is not None and not call.seeds:
        p.error("--jobs is for --seeds")
    if call.jobs is not None and call.jobs < 1:
        p.error(f"--jobs must be at least 1, not {call.jobs}")
    if call.seeds and "seed" in given:
        p.error("give --seed or --seeds, not both")
    return given, call


def add_flag(group, field):
    """The flag of one field of a config."""
    kind, flag, choices = type(field.default), flag_of(field.name), field.metadata["choices"]
    meaning, _, published = field.metadata["help"].partition(" | ")
    text = f"{meaning} (default {text_of(field.default)}" + f", published {published}" * bool(
        published) + ")"
    text = text.replace("%", "%%")
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    meta = "N,N,..." if kind is tuple else kind.__name__.upper()
    group.add_argument(flag, help=text, choices=choices, metavar=None if choices else meta,
                       type={tuple: sizes, str: filled}.get(kind, kind))


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


def exit_with_error(message, prog=None, code=2):
    """Print one line on stderr, "prog: error: message"; exit."""
    prog = prog or os.path.basename(sys.argv[0])
    print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def perhaps(word, known):
    """" (did you mean X?)" for the nearest of the known words, "" if none is near."""
    near = difflib.get_close_matches(str(word), known)
    return f" (did you mean {near[0]}?)" if near else ""


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


def flag_of(name):
    """"eval_interval" -> "--eval-interval"."""
    return "--" + name.replace("_", "-")


def text_of(value):
    """A value as it is typed after its flag: (64, 64) -> "64,64"; "none" for () and no text."""
    return (",".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "none"


def words_of(given):
    """{field: value} as words of a command line: {"steps": 9} -> ["--steps=9"]."""
    words = []
    for name, value in given.items():
        flag = flag_of(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words.append(f"{flag}={text_of(value)}")
    return words


# ------------------------------------------------------------------------------------- configs


def is_integer(x):
    return isinstance(x, int) and not isinstance(x, bool)


def is_number(x):
    return (is_integer(x) or isinstance(x, float)) and abs(x) <= sys.float_info.max


TYPES = {bool: ("true or false", lambda x: isinstance(x, bool)), int: ("an integer", is_integer),
         float: ("a finite number", is_number), str: ("a text", lambda x: isinstance(x, str)),
         tuple: ("a list of integers", lambda x: isinstance(x, (tuple, list))
                 and all(map(is_integer, x)))}


def make_config(config_class, values):
    """A config of {field: value}; what is missing has its default. ValueError: an unknown field,
    or what `check_config` refuses."""
    names = [field.name for field in dataclasses.fields(config_class)]
    if unknown := values.keys() - set(names):
        word = min(unknown)
        raise ValueError(f"there is no setting {word!r:.60}{perhaps(word, names)}")
    config = config_class(**{name: tuple(x) if isinstance(x, list) else x
                             for name, x in values.items()})
    check_config(config)
    return config


def check_config(config):
    """ValueError unless each field of a config is of its default's type and has one of its choices,
    or lies in its range; integers are at most MOST.

    Environments are left out: those registered later are no choices, and `envs.make` knows them.
    """
    for field in dataclasses.fields(config):
        choices, within = field.metadata["choices"], field.metadata["range"]
        what, test = TYPES[type(field.default)]
        require(config, test, what, field.name)
        if choices and field.name != "env":
            require(config, lambda x: x in choices, "one of " + ", ".join(choices), field.name)
        if within:
            require(config, RANGES[within], within, field.name)
        if is_integer(getattr(config, field.name)):
            require(config, lambda x: x <= MOST, f"at most {MOST}", field.name)


def require(config, test, what, *names):
    """ValueError unless test(value) holds for each named field of config; what: the test in words,
    such as "positive"."""
    for name in names:
        value = getattr(config, name)
        if not test(value):
            raise ValueError(f"{flag_of(name)} must be {what}, not {value!r:.60}")


def refuse_unused(config, plain, unused):
    """ValueError if a field differs from that of `plain`, the config without the flags given,
    although it has no effect. unused: {field: with which flag, or False where it has one}."""
    for name, reason in unused.items():
        if reason and getattr(config, name) != getattr(plain, name):
            raise ValueError(f"{flag_of(name)} has no effect with {reason}")
