"""The CSV files that come from outside, read strictly: all that is wrong with a file is told at once, by line and id."""

import numpy as np
import pandas as pd

from harness.console import InputError, raise_all, refusing

PLAIN_NAME = r"(?![.=+@-])(?![A-Za-z]:)[^/\\]+"  # what begins with = + - @ a spreadsheet would take for a formula


def read_table(
    path, columns, rule=None, wanted=None, may_hold_more=False, hint="see the README for how to get the data"
):
    """Read a CSV file whose columns are `columns`: image_id, unique names of files, then numbers.

    rule: function of the numbers, float (n, k), to n texts: what is wrong with each row, "" where nothing is; wanted: the
    ids that must be there, in any order, and, unless may_hold_more, no others; hint: what to do if the file does not
    exist. Returns a DataFrame with image_id (str) and floats, in the order of `wanted` or else of the file. Raises
    InputError naming the file and all that is wrong with it.
    """
    text = {"header": None, "dtype": str, "keep_default_na": False, "skip_blank_lines": False, "encoding": "utf-8-sig"}
    with (  # ValueError: no UTF-8, no rows, too many values in a line, a quote that does not end
        refusing(f"{path} cannot be read as CSV in UTF-8", ValueError),
        refusing(f"{path} cannot be read", OSError),
        refusing(f"{path} does not exist", FileNotFoundError, advice=f"; {hint}"),
    ):
        frame = pd.read_csv(path, **text)
    header = frame.iloc[0].tolist()
    if ";" in header[0]:
        raise InputError(f"{path}: its columns are separated by semicolons: save it with commas")
    complaints = [f"lacks the column {name}" for name in columns if name not in header]
    complaints += [f"has a column {name!r} that does not belong there" for name in header if name not in columns]
    complaints += [f"has the column {name} twice" for name in columns if header.count(name) > 1]
    raise_all(path, complaints)
    frame = frame.iloc[1:].set_axis(header, axis=1)[list(columns)]
    frame = frame[(frame != "").any(axis=1)]  # blank lines
    if frame.empty:
        raise InputError(f"{path}: has no rows")

    ids, numbers = frame["image_id"], frame[list(columns[1:])].map(to_number)
    plain = ids.str.fullmatch(PLAIN_NAME) & ids.map(str.isprintable) & (ids == ids.str.strip())
    wrong = {
        "has no image_id": ids == "",
        "has an image_id that is no plain file name (nor may it begin with . = + - @)": ~plain & (ids != ""),
        "repeats an image_id": ids.duplicated() & (ids != ""),
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
    table = numbers.astype(float)
    table.insert(0, "image_id", ids)
    if wanted is not None:
        table = table.set_index("image_id").loc[list(wanted)].reset_index()
    return table.reset_index(drop=True)


def to_number(text):
    """The float that `text` spells in ASCII, nearest to it; nan if it spells none."""
    try:
        return float(text) if text.isascii() and "_" not in text else np.nan  # float("1_0") is 10
    except ValueError:
        return np.nan
