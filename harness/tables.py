"""The CSV files that come from outside, read strictly: all that is wrong with a file is told at once, by line."""

import csv
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from harness.console import InputError, raise_all, say


def read_csv(path, columns, hint="see the README for how to get the data", rule=None, wanted=None, may_hold_more=False):
    """Read a CSV file whose columns are exactly `columns`, the first of them a unique image_id, the others numbers.

    hint: what to do if the file does not exist; rule: function of a row's numbers, float (n,), that returns what is
    wrong with them, or None; wanted: the ids that must be there, in any order, and, unless may_hold_more, no others.
    Returns a DataFrame with image_id (str) and floats, in the file's order. Raises InputError naming the file and all
    that is wrong with it, by line.
    """
    header, rows, problems = parse_csv(path, hint)
    complaints = compare_columns(header, columns) if header else []
    if not rows and not problems:
        complaints.append("has no rows")
    unread, first_line = bool(problems), {}
    for line, cells in rows:
        row = dict(zip(header, cells, strict=True))
        problems += [(line, what) for what in check_row(row, columns, rule)]
        image_id = row.get("image_id")
        if image_id in first_line:
            problems.append((line, f"repeats image_id {quote(image_id)} of line {first_line[image_id]}"))
        elif image_id:
            first_line[image_id] = line
    complaints += [f"line {line} {what}" for line, what in sorted(problems, key=lambda problem: problem[0])]
    if wanted is not None and first_line and not unread:
        complaints += compare_ids(first_line.keys() & set(wanted) if may_hold_more else first_line, wanted)
    raise_all(path, complaints)
    values = list(zip(*(cells for _, cells in rows), strict=True))
    numbers = {name: [to_number(cell) for cell in cells] for name, cells in zip(columns[1:], values[1:], strict=True)}
    return pd.DataFrame({"image_id": values[0], **numbers})


def parse_csv(path, hint):
    """Split a CSV file, UTF-8 with or without a byte order mark, any line ends, into its header, rows and problems.

    Returns the header's names; the rows, each with the line of the file where it begins; and (line, what) for rows of
    another length than the header. Blank lines are skipped. Raises InputError for what cannot be split.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; {hint}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if b"\0" in content.split(b"\n")[0]:
        raise InputError(f"{path} is not encoded as UTF-8 but perhaps as UTF-16: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} is not encoded as UTF-8 (line {line}): save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, rows, problems, line = [], [], [], 1
    try:
        for cells in reader:
            if cells and not header:
                header = cells
            elif cells and len(cells) != len(header):
                problems.append((line, f"has {len(cells)} values, its header {len(header)} names"))
            elif cells:
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        problems.append((line, f"cannot be read as CSV, nor what follows: {error}"))
    if not header and not problems:
        raise InputError(f"{path} is empty")
    return header, rows, problems


def compare_columns(header, columns):
    """How a file's header differs from `columns`, as texts."""
    missing, extra = Counter(columns) - Counter(header), Counter(header) - Counter(columns)
    complaints = [f"lacks the column {name}" for name in missing]
    complaints += [f"has a column {quote(name)} that does not belong there" for name in extra]
    if not complaints and header != list(columns):
        complaints = [f"its columns are {','.join(header)}; put them in the order {','.join(columns)}"]
    return complaints


def check_row(row, columns, rule):
    """What is wrong with a row, dict of column to text, as texts; rule: as of read_csv."""
    image_id = row.get("image_id")
    if image_id == "":
        yield "has no image_id"
    elif image_id is not None and not is_plain_name(image_id):
        yield f"has the image_id {quote(image_id)}, which is not a plain file name (nor may it begin with . = + - @)"
    numbers = {name: to_number(row[name]) for name in columns[1:] if name in row}
    for name, number in numbers.items():
        if not np.isfinite(number):
            yield f"has {name} {quote(row[name])}, not a number" if row[name] else f"has no value for {name}"
    values = np.array(list(numbers.values()))
    if rule and len(values) == len(columns) - 1 and np.isfinite(values).all() and (what := rule(values)):
        yield f"({quote(image_id)}) {what}" if image_id else what


def is_plain_name(image_id):
    """Whether an image_id names a file of images/ and none elsewhere, on any system, in characters that can be seen.

    What begins with = + - or @ is left out too: a spreadsheet would take it for a formula.
    """
    elsewhere = re.search(r"[/\\]|^[.=+@-]|^[A-Za-z]:", image_id)
    return not elsewhere and image_id.isprintable() and image_id == image_id.strip()


def quote(text):
    """`text` in quotes, on one line and not too long to be read."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def to_number(text):
    """The float that `text` spells in ASCII, nearest to it; nan if it spells none."""
    try:
        return float(text) if text.isascii() and "_" not in text else np.nan  # float("1_0") is 10
    except ValueError:
        return np.nan


def compare_ids(found, wanted):
    """What ids are missing in `found` or not wanted, as texts; their order is free."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    return [f"has no row for {name}" for name in missing] + [
        f"has a row for {quote(name)}, which is not wanted" for name in extra
    ]


def not_one_hot(values):
    """What is wrong with the labels of one photo, float (k,), or None."""
    others = len(values) - 1
    words = {1: "one", 2: "two", 3: "three"}.get(others, others)
    return None if sorted(values) == [0] * others + [1] else f"is not one 1 and {words} 0"


def not_a_distribution(values):
    """What is wrong with the class probabilities of one photo, float (k,), or None.

    The sum may differ from 1 by what rounding each value to its digits can make of it: with two digits 0.005 a value.
    """
    if values.min() < 0 or values.max() > 1:
        return "is no probability distribution: it holds a value outside 0…1"
    digits = next((digits for digits in (2, 3) if (np.round(values, digits) == values).all()), 4)
    allowed = max(1e-3, len(values) * 0.5 * 10**-digits) + 1e-9
    if abs(values.sum() - 1) > allowed:
        return f"is no probability distribution: it sums to {values.sum():.4g}"


def read_train_csv(data_dir, classes):
    """train.csv: DataFrame with image_id (str) and the one-hot columns `classes` (float). Raises InputError."""
    return read_csv(Path(data_dir) / "train.csv", ("image_id", *classes), rule=not_one_hot)


def read_test_ids(data_dir, classes):
    """The image_ids to predict, Series of str, in the row order of sample_submission.csv.

    Raises InputError unless test.csv has just the same ids.
    """
    image_ids = read_csv(Path(data_dir) / "sample_submission.csv", ("image_id", *classes))["image_id"]
    read_csv(Path(data_dir) / "test.csv", ("image_id",), wanted=image_ids)
    return image_ids


def read_probabilities(path, classes, image_ids=None, may_hold_more=False):
    """A CSV of class probabilities, DataFrame with image_id and `classes` (float), joined to `image_ids` if given.

    may_hold_more: rows of other ids are no error then, but left out.

    Raises InputError for values outside 0…1, rows that do not sum to 1, and ids that are missing or extra.
    """
    return read_scores(path, classes, image_ids, may_hold_more, rule=not_a_distribution)


def read_scores(path, classes, image_ids=None, may_hold_more=False, rule=None):
    """As read_probabilities, but of any finite numbers, by which photos can be ranked; rule: as of read_csv."""
    hint = "run the step that writes it first"
    frame = read_csv(path, ("image_id", *classes), hint, rule, wanted=image_ids, may_hold_more=may_hold_more)
    return frame if image_ids is None else frame.set_index("image_id").loc[list(image_ids)].reset_index()


def note_no_distributions(path, values):
    """Say how many rows of `values`, float (n, k), are no probability distribution, if any are."""
    problems = [problem for problem in map(not_a_distribution, values) if problem]
    if problems:
        say(
            f"note: {path}: {len(problems)} of {len(values)} rows are no probability distributions (the first of them "
            f"{problems[0].split(': ')[1]}); blended all the same: an AUC asks for the order only, but where scales "
            "differ the larger one decides"
        )
