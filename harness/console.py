"""What a user sees: lines with the time of day, one-line errors, and a clean end at Ctrl-C and SIGTERM."""

import logging
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager


class InputError(SystemExit):
    """Something the user can put right: one clear line on stderr and exit status 1, no traceback."""

    def __init__(self, message):
        super().__init__(f"error: {message}")


def raise_all(path, problems):
    """Raise one InputError with all `problems` of a file (the first ten of them in full), if there are any."""
    if problems:
        more = f" … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(f"{path}: " + "; ".join(problems[:10]) + more)


def is_first_process():
    """Whether this is the process that writes: the first of those that torchrun (RANK) or srun has started, if any."""
    return os.environ.get("RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_PROCID", "0") == "0"


def say(message):
    """Print at once, with the time of day: what a log of hours is read by. Only the first process speaks."""
    if is_first_process():
        print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def how_to_go_on():
    """What to type after an interruption, as text."""
    return "the same command" + (", without --fresh," if "--fresh" in sys.argv else "") + " goes on from there"


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM, as an exception that ends the process with status 130 or 143."""


@contextmanager
def stop_cleanly(kept):
    """Within the block Ctrl-C and SIGTERM raise Stopped; before the process ends it prints what is kept: `kept()`.

    Loader workers forked meanwhile ignore both signals: the process that started them ends them.
    """
    received = []
    owner, before = os.getpid(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number, frame):
        if os.getpid() == owner:
            for handled in before:  # a second one would cut the tidying short
                signal.signal(handled, signal.SIG_IGN)
            if hasattr(
                signal, "SIGCHLD"
            ):  # torch's handler raises an error for a worker that the same signal has ended
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            received.append(number)
            raise Stopped(128 + number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except BaseException as error:  # torch.save, interrupted, makes a RuntimeError of it
        if not received and not isinstance(error, Stopped):
            raise
        if text := kept():
            say(f"stopped: {text}")
        raise Stopped(128 + received[0] if received else error.code) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def quiet_libraries():
    """Silence what Lightning says about settings that we made on purpose."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")  # it holds folds
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own affair with torch
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what we log is the same on all devices
    warnings.filterwarnings("ignore", message=".*`lr_scheduler.step.. before `optimizer.step.*")
