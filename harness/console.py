"""What a user sees: lines with the time of day, one-line errors, and a clean end at Ctrl-C and SIGTERM."""

import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress

PATIENCE = 10  # seconds that a signal waits for the main thread, which may wait in C for another process or device


class InputError(SystemExit):
    """Something the user can put right: one clear line on stderr and exit status 1, no traceback."""

    def __init__(self, message):
        super().__init__(f"error: {message}")


def raise_all(path, problems, shown=10):
    """Raise one InputError with the `problems` of a file or folder, if there are any: the first `shown`, None for all."""
    if problems:
        more = f" … and {len(problems) - shown} more" if shown and len(problems) > shown else ""
        raise InputError(f"{path}: " + "; ".join(problems[:shown]) + more)


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

    A second Ctrl-C always ends it at once, and so does the first signal if the main thread does not answer in PATIENCE
    seconds. Loader workers forked meanwhile ignore both signals: the process that started them ends them.
    """
    received, tidying = [], threading.Event()
    owner, before = os.getpid(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number, frame):
        if os.getpid() == owner and not received:
            tidying.set()
            if hasattr(
                signal, "SIGCHLD"
            ):  # torch's handler raises an error for a worker that the same signal has ended
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            received.append(number)
            raise Stopped(128 + number)

    with end_in_time(tidying):
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


@contextmanager
def end_in_time(tidying):
    """Within the block a thread hears of every signal, also while the main thread, which handles them, waits in C.

    It ends the process at a second Ctrl-C, or if `tidying` (threading.Event) is not set in PATIENCE seconds.
    """
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)

    def listen():
        first = None
        while True:
            try:
                number = next(iter(ear.recv(1)), None)
            except TimeoutError:
                if not tidying.is_set():
                    leave(first)
                ear.settimeout(None)
                continue
            if number is None:  # the block is over
                return
            if first is None and number in (signal.SIGINT, signal.SIGTERM):
                first = number
                ear.settimeout(PATIENCE)
            elif number == signal.SIGINT:
                leave(number)

    def leave(number):
        with suppress(OSError):
            os.write(2, b"ended at once: what was written before is whole, and is kept\n")
        os._exit(128 + number)

    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        mouth.close()
        thread.join()
        ear.close()


if hasattr(os, "register_at_fork"):  # or a loader's worker would report its signals to the thread of its parent
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


@contextmanager
def default_signals():
    """Within the block, which waits in C, where no Python handler runs, Ctrl-C and SIGTERM end the process at once."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
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
