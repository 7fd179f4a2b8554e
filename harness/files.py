"""Files that are written whole or not at all, folders, locks, hashes."""

import hashlib
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from harness.console import InputError, say

WAIT = 60 * 60  # seconds for another process: decoding all photos, from a slow disk, may take that long


@contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside `path` that takes its name only when the block succeeded: whole or not at all.

    Raises InputError, naming the file, if it cannot be written; an older version is then still there.
    """
    path = Path(path)
    temporary = None
    if path.exists() and not path.is_file() and not path.is_dir():  # /dev/null would be replaced by a file
        raise InputError(f"cannot write {path}: it is no ordinary file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with os.fdopen(descriptor, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    except RuntimeError as error:  # what torch.save makes of an OSError of the file that it writes to
        if not isinstance(error.__context__, OSError):
            raise
        raise InputError(f"cannot write {path}: {error.__context__.strerror}") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def remove_leftovers(folder, names):
    """Delete what killed processes left of files that atomic_write was writing; names: pattern of the files' names.

    Only for files whose writers hold a lock that is held now.
    """
    for leftover in Path(folder).glob(f".{names}.????????"):  # as tempfile names them
        remove(leftover)


def remove(path):
    """Delete a file if it is there. Raises InputError, naming it, if that is not possible."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot delete {path}: {error.strerror}") from error


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_csv(path, frame):
    """Write a DataFrame as CSV, whole or not at all, without its index."""
    with atomic_write(path, "w") as file:
        frame.to_csv(file, index=False, lineterminator="\n")


def check_writable(*paths):
    """Raise InputError if a file cannot be written later, when what it is to hold has been computed."""
    for path in map(Path, paths):
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no ordinary file'}")
        if problem := why_not_writable(path.parent):
            raise InputError(f"cannot write {path} ({problem}): start this in another folder, or name another one")


def why_not_writable(folder):
    """Why no file can be written in a folder, which is made if need be, as text, or None."""
    try:
        make_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except InputError as error:
        return str(error).removeprefix("error: ")
    except OSError as error:
        return f"cannot write in {folder}: {error.strerror}"


def sha256(path):
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_file(path, wait=True, hint=""):
    """Hold a lock, for a `with` or until it is released or the process ends; None if it is taken and `wait` is False.

    Raises InputError if the lock's file cannot be made, with the `hint` what to type, or if another process holds it for
    longer than WAIT seconds.
    """
    make_folder(Path(path).parent, hint)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=min(10, WAIT) if wait else 0)
        except Timeout:
            if not wait:
                return None
            say(f"another process is at work in {Path(path).parent}: waiting for it, {WAIT / 60:.0f} minutes at most")
            lock.acquire(timeout=WAIT)
    except Timeout as error:
        raise InputError(
            f"another process has held {path} for {WAIT / 60:.0f} minutes: end it, or use another folder"
        ) from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}{hint}") from error
    return lock


def make_folder(path, hint=""):
    """Make a folder and those above it. Raises InputError, with the `hint` what to type, if that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}{hint}") from error
