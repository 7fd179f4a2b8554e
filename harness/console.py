"""What a user types and sees: the command line, lines with the time of day, errors of one line."""

import argparse
import difflib
import io
import logging
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, suppress

os.environ["MPLBACKEND"] = "agg"  # a notebook's is inherited, and torchmetrics imports matplotlib
tempfile.tempdir = "/tmp" if len(os.environ.get("TMPDIR", "")) > 70 else None  # sockets' names are limited
PREFIX = os.environ.get("PLANT_PATHOLOGY_PREFIX")  # set where train.py has started a process: what its lines begin with
MAIN_PROCESS = os.getpid()  # loaders' workers are forked from it
GO_ON = "the same command (without --fresh) goes on from what was kept last"
# what Lightning and torch say about settings that we made on purpose, and about each other
HARMLESS = "many workers|in eval mode|Checkpoint directory|LeafSpec|sync_dist=True|lr_scheduler.step.. before"
HARMLESS += "|parameter 'pretrained'"


class InputError(SystemExit):
    """Something the user can put right: one clear line on stderr and exit status 1, no traceback."""

    def __init__(self, message):
        super().__init__(f"{PREFIX or ''}error: {message}")
        self.message = message


@contextmanager
def refusing(what, *errors, advice=""):
    """Within the block, make an InputError of one of these kinds of errors: `what` is wrong, the reason, the advice."""
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{what} ({reason}){advice}") from error


def raise_all(path, problems, shown=10):
    """Raise one InputError with the `problems` of a file or folder, if there are any: the first `shown`, None for all."""
    if problems:
        more = f" … and {len(problems) - shown} more" if shown and len(problems) > shown else ""
        raise InputError(f"{path}: " + "; ".join(problems[:shown]) + more)


class Stream(io.TextIOWrapper):
    """Standard output or error: what cannot be printed (a full disk, a closed pipe) is lost, and the work goes on."""

    def write(self, text):
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self):
        with suppress(OSError):
            super().flush()


def is_first_process():
    """Whether this is the process that writes: the first of those that torchrun (RANK) or srun has started, if any."""
    return os.environ.get("RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_PROCID", "0") == "0"


def is_interactive():
    """Whether somebody watches a progress bar; elsewhere one line per epoch is easier to read."""
    return PREFIX is None and sys.stdout.isatty()


def say(message):
    """Print at once, with the time of day: what a log of hours is read by. Only the first process speaks."""
    if is_first_process():
        print(f"{PREFIX or ''}[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def stop(number, frame=None):
    """Signal handler of Ctrl-C: one line, then what a kill does, as all that is written is whole."""
    if PREFIX is None and os.getpid() == MAIN_PROCESS:  # otherwise the process that has started this one says it
        say(f"stopped: what is written is whole; {GO_ON}")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def quiet_libraries():
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=f".*({HARMLESS}|weight enum or .None.)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring and adds the defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A strict command line: no abbreviations, errors of one line. doc: the script's docstring."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
        self.needs = {}  # options that do nothing without another one: dict of both names

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help lists all options\n")


def number(kind, least, most, words):
    """A type for argparse: an int or a float (`kind`) from `least` to `most`, `words` for what it must be."""

    def parse(text):
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive = number(int, 1, 2**63, "1 or more")
not_negative = number(int, 0, 2**32 - 1, "between 0 and 4294967295")
positive_number = number(float, math.ulp(0), sys.float_info.max, "a positive number")
share = number(float, 0, 1, "between 0 and 1")
pixels = number(int, 32, 2**31, "32 pixels or more, which the network needs")


def file_or_folder(text):
    if not (text and text.isprintable()) or "::" in text or "://" in text:  # no UTF-8; Lightning's signs of a URL
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name of a file or folder: rename it")
    return os.path.expanduser(text)  # bash leaves the ~ of --log_dir=~/logs to the program


def parse_args(parser, argv=None):
    """Parse `argv`; `args.typed` is the set of option names that were given, not left at their defaults."""
    if argv is None:
        signal.signal(signal.SIGINT, stop)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name) or open(os.devnull, "w")  # closed by the shell: >&-
            if isinstance(stream, io.TextIOWrapper):  # a notebook's is not
                setattr(sys, name, Stream(stream.detach(), stream.encoding, "backslashreplace", line_buffering=True))
    argv, known = list(sys.argv[1:] if argv is None else argv), parser._option_string_actions
    words = {word.split("=")[0] for word in argv[: argv.index("--") if "--" in argv else None]}
    for option in sorted(words - set(known)):
        if re.fullmatch(r"--?[A-Za-z]\S*", option):  # allow_abbrev=False leaves -t for -tbs
            close = [name for name in known if option.strip("-") in name] or difflib.get_close_matches(option, known)
            parser.error(f"unrecognized option {option}" + f", did you mean {' or '.join(close)}?" * bool(close))
    args = parser.parse_args(argv)
    args.typed = {known[option].dest for option in words & set(known)}
    for name, other in parser.needs.items():
        if name in args.typed and not getattr(args, other):
            raise InputError(f"--{name} does nothing without --{other}: type both")
    if hasattr(args, "folds"):
        args.folds = sorted(set(args.folds))
    return args
