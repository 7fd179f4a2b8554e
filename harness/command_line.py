"""How a command line is read: strictly, without abbreviations, and knowing which options were typed."""

import argparse
import os
import re
import sys


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring and adds the defaults."""


def file_or_folder(text):
    if not text.isprintable():  # bytes that are no UTF-8, as old archives unpack, or a line break
        raise argparse.ArgumentTypeError(f"{text!r} is not a name in UTF-8 that can be written down: rename it")
    return os.path.expanduser(text)  # bash leaves the ~ of --log_dir=~/logs to the program


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def not_negative(text):
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 4294967295")
    return value


def positive_number(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def pixels(text):
    value = int(text)
    if value < 32:
        raise argparse.ArgumentTypeError(f"{text} is too small: the network needs 32 pixels or more")
    return value


def parse_args(parser, argv=None):
    """Parse `argv`; `args.typed` is the set of option names that were given, not left at their defaults."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show must not end the script
            stream.reconfigure(errors="backslashreplace")
    if sys.getfilesystemencoding() != "utf-8":
        parser.error("names of files are not in UTF-8 here: type export PYTHONUTF8=1 first")
    if not os.getcwd().isprintable():
        parser.error(f"the name of the working directory, {os.getcwd()!r}, cannot be written down: rename it")
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:  # argparse's allow_abbrev=False leaves -t for -tbs alone
        if re.match("-[A-Za-z]", word) and word.split("=")[0] not in parser._option_string_actions:
            parser.error(f"unrecognized option {word}")
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions if action.dest != "help"})
    args = parser.parse_args(argv, namespace=blank)
    args.typed = {action.dest for action in parser._actions if getattr(args, action.dest, unset) is not unset}
    for name, value in vars(args).items():
        if value is unset:
            setattr(args, name, parser.get_default(name))
    if hasattr(args, "folds"):
        args.folds = sorted(set(args.folds))
    return args
