"""Files that are whole or not there, the CSV files that come from outside, locks, hashes."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from harness.console import InputError, raise_all, refusing, say

LOCK_TIMEOUT = 60 * 60  # seconds: another process may decode all photos, from a slow disk
PLAIN_NAME = r"(?![.=+@-])(?![A-Za-z]:)[^/\\]+"  # what begins with = + - @ a spreadsheet would take for a formula


@contextmanager
def atomic_write(path, mode="wb", commit=True):
    """Open a temporary file beside `path` that takes its name only when the block succeeded: whole or not at all.

    commit: False only tries. Raises InputError, naming the file, if it cannot be written; what was there is still there.
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
    """Take a lock, for a `with` block; None if another process holds it, unless `wait`. Raises InputError."""
    lock = FileLock(path)
    with refusing(f"cannot lock {path}", OSError, advice=hint):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                return None
            say(f"waiting for another process, which holds {path}")
            return lock.acquire(timeout=LOCK_TIMEOUT)


def digest(content):
    """SHA-256 of a text, or of the content of a file (a Path), as hexadecimal digits."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode()).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_table(path, columns, rule=None, wanted=None, may_hold_more=False, texts=(), hint="see the README"):
    """Read a CSV file whose columns are `columns`: unique names of files, then numbers, or texts; returns a DataFrame.

    rule: function of the numbers, float (n, k), to n texts: what is wrong with each row, or ""; wanted: the ids that must
    be there, in this order, and no others unless may_hold_more. Raises InputError with all that is wrong with the file.
    """
    text = {"header": None, "dtype": str, "keep_default_na": False, "skip_blank_lines": False, "encoding": "utf-8-sig"}
    with refusing(f"{path} cannot be read as CSV in UTF-8", ValueError, OSError):  # ValueError: also a line too long
        with refusing(f"{path} does not exist", FileNotFoundError, advice=f"; {hint}"):
            with open(path, encoding="utf-8-sig") as file:
                separated = set(";\t") & set(file.readline())
        raise_all(path, ["its columns are separated by semicolons or tabs: save it with commas"] * bool(separated))
        frame = pd.read_csv(path, **text)
    header = frame.iloc[0].tolist()
    complaints = [f"lacks the column {name}" for name in columns if name not in header]
    complaints += [f"has a column {name!r} that does not belong there" for name in header if name not in columns]
    complaints += ["the classes are CLASSES in utils.py"] * bool(set(columns[1:]) - set(header))
    complaints += [f"has the column {name} twice" for name in columns if header.count(name) > 1]
    raise_all(path, complaints)
    frame = frame.iloc[1:].set_axis(header, axis=1)[list(columns)]
    frame = frame[(frame != "").any(axis=1)]  # blank lines
    raise_all(path, ["has no rows"] * frame.empty)

    ids, numbers = frame[columns[0]], frame[[name for name in columns[1:] if name not in texts]].map(to_number)
    plain = ids.str.fullmatch(PLAIN_NAME) & ids.map(str.isprintable) & (ids == ids.str.strip())
    wrong = {
        **{f"has no {name}": frame[name] == "" for name in (columns[0], *texts)},
        f"has an {ids.name} that is no plain file name (nor may it begin with . = + - @)": ~plain & (ids != ""),
        f"repeats an {ids.name}": ids.duplicated() & (ids != ""),
        **{f"has no number for {name}": ~np.isfinite(numbers[name]) for name in numbers},
    }
    problems = [(row, what) for what, rows in wrong.items() for row in ids.index[rows]]
    if rule:
        sound = numbers[np.isfinite(numbers).all(axis=1)]
        problems += [(row, what) for row, what in zip(sound.index, rule(sound.to_numpy()), strict=True) if what]
    complaints = [f"line {row + 1} ({ids[row]!r:.60}) {what}" for row, what in sorted(problems)]
    if wanted is not None:
        complaints += [f"has no row for {name}" for name in sorted(set(wanted) - set(ids))]
        extra = sorted(set(ids) - set(wanted)) if not may_hold_more else []
        complaints += [f"has a row for {name!r}, which is not wanted" for name in extra]
    raise_all(path, complaints)
    table = numbers.astype(float).join(frame[list(texts)]).set_index(ids)
    return (table if wanted is None else table.loc[list(wanted)]).reset_index()


def to_number(text):
    """The float that `text` spells in ASCII, nearest to it; nan if it spells none."""
    try:
        return float(text) if text.isascii() and "_" not in text else np.nan  # float("1_0") is 10
    except ValueError:
        return np.nan
