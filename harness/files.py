"""Files that are whole or not there, locks, hashes."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from harness.console import InputError, refusing, say

LOCK_TIMEOUT = 60 * 60  # seconds: another process may decode all photos, from a slow disk


@contextmanager
def atomic_write(path, mode="wb", commit=True):
    """Open a temporary file beside `path` that takes its name only when the block succeeded: whole or not at all.

    Raises InputError, naming the file, if it cannot be written; an older version is then still there. commit: False to
    try only whether it could be.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # /dev/null would be replaced by a file
        raise InputError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no ordinary file'}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if commit:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save makes a RuntimeError of it
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror or cause}") from error


def check_writable(*paths):
    """Raise InputError if a file cannot be written later, when what it is to hold has been computed."""
    for path in paths:
        with atomic_write(path, commit=False):
            pass


def write_csv(path, frame):
    """Write a DataFrame as CSV, whole or not at all, without its index."""
    with atomic_write(path, "w") as file:
        frame.to_csv(file, index=False, lineterminator="\n")


def remove(path):
    """Delete a file if it is there. Raises InputError, naming it, if that is not possible."""
    with refusing(f"cannot delete {path}", OSError):
        Path(path).unlink(missing_ok=True)


def lock_file(path, wait=True, hint=""):
    """Hold a lock, for a `with` or until it is released or the process ends; None if it is taken and `wait` is False.

    Raises InputError if the lock's file cannot be made, with the `hint` what to type, or after LOCK_TIMEOUT.
    """
    lock = FileLock(path)
    with refusing(f"cannot lock {path}", OSError, advice=hint):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                return None
            say(f"waiting for another process, which holds {path}")
            lock.acquire(timeout=LOCK_TIMEOUT)
    return lock


def digest(content):
    """SHA-256 of a text, or of the content of a file (a Path), as hexadecimal digits."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode()).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
