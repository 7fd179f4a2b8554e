"""CSV files: what satisfies the contract is read, what does not is refused in one line, all of it, by line and id."""

import csv
import io
from argparse import Namespace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blend
from dataset import mix_labels, read_test_ids
from harness.files import read_table, write_csv
from harness.record import read_own_csv
from utils import CLASSES, distribution, one_hot

COLUMNS = ("image_id", *CLASSES)
HEADER = b"image_id,healthy,multiple_diseases,rust,scab\n"
read_labels = partial(read_table, columns=COLUMNS, rule=one_hot)
read_soft_labels = partial(read_table, columns=COLUMNS, rule=distribution, hint="run step 2 first")

# ---------------------------------------------------------------------------------------------- at random

random_tables = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENDS = "A-Za-z0-9_()éß叶"
ids = st.from_regex(rf"[{ENDS}](?:[{ENDS} ,'\"%.-]{{0,8}}[{ENDS}])?", fullmatch=True)
ids = ids | st.sampled_from(["NA", "nan", "None", "null", "True", "007", "1e5", "image_id"])
tables = st.lists(st.tuples(ids, st.integers(0, 3)), min_size=1, max_size=9, unique_by=lambda row: row[0])


def encode(rows, line_end="\n", mark=b"", quoting=csv.QUOTE_MINIMAL, blank_after=()):
    """Rows of texts, the header first, as the bytes of a CSV file, with blank lines after some of them."""
    text = io.StringIO()
    for number, row in enumerate(rows):
        csv.writer(text, lineterminator=line_end, quoting=quoting).writerow(row)
        text.write(line_end if number in blank_after else "")
    return mark + text.getvalue().encode()


def spell(table, spellings=(("0", "1"),)):
    """A table of ids and classes as rows of texts under a header; each number in one of `spellings`."""
    rows = [list(COLUMNS)]
    for row, (image_id, label) in enumerate(table):
        rows.append([image_id, *(spellings[(row + k) % len(spellings)][k == label] for k in range(4))])
    return rows


@random_tables
@given(
    table=tables,
    spellings=st.permutations([("0", "1"), ("0.0", "1.0"), ("-0", " 1"), ("0e9", "+1."), (".0", "10e-1")]),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    blank_after=st.sets(st.integers(0, 9)),
    order=st.permutations(range(5)),
)
def test_a_table_that_satisfies_the_contract_is_read_however_it_is_written(
    tmp_path, table, spellings, line_end, mark, quoting, blank_after, order
):
    rows = [[row[column] for column in order] for row in spell(table, spellings)]
    (tmp_path / "train.csv").write_bytes(encode(rows, line_end, mark, quoting, blank_after))
    frame = read_labels(tmp_path / "train.csv")
    assert frame.columns.tolist() == list(COLUMNS) and frame.index.tolist() == list(range(len(table)))
    assert frame["image_id"].tolist() == [image_id for image_id, _ in table]
    np.testing.assert_array_equal(frame[list(CLASSES)].to_numpy(), np.eye(4)[[label for _, label in table]])


@random_tables
@given(table=tables, order=st.randoms(), weights=st.lists(st.floats(0, 1), min_size=36, max_size=36))
def test_what_write_csv_writes_is_read_to_the_bit_in_any_order(tmp_path, table, order, weights):
    values = np.array(weights).reshape(9, 4)[: len(table)] + [0, 0, 0, 1e-9]
    values /= values.sum(1, keepdims=True)
    wanted = pd.Index([image_id for image_id, _ in table], name="image_id")
    rows = pd.DataFrame(values, wanted, CLASSES).reset_index()
    write_csv(tmp_path / "soft.csv", rows.iloc[order.sample(range(len(rows)), len(rows))])
    read = read_soft_labels(tmp_path / "soft.csv", wanted=wanted)
    assert read["image_id"].tolist() == wanted.tolist()
    assert read[list(CLASSES)].to_numpy().tobytes() == values.tobytes()


def put(place, text):
    """A corruption: `text` in one cell of a row, or its characters in several."""
    return lambda rows, row: rows[row].__setitem__(place, text)


PLAIN, HOT = "no plain file name", "is not one 1 and 3 times 0"
# among them a drive, an escape sequence, a character that cannot be seen, and what a spreadsheet takes for a formula
NO_IDS = ["a/b", "a\\b", "..", "C:a", "a\0b", "a\nb", "a\x1b[2Jb", "a\u200bb", "=1+1", "-1", " a", "a "]
NO_NUMBERS = {"": 1, "yes": 2, "0_0": 2, "٠": 2, "nan": 3, "-inf": 4}  # and the column where they stand
CORRUPTIONS = {  # of one row: what is done to it, and what is said of it
    "id missing": (put(0, ""), "has no image_id"),
    **{f"id {text!r}": (put(0, text), PLAIN) for text in NO_IDS},
    **{f"label {text!r}": (put(n, text), f"has no number for {COLUMNS[n]}") for text, n in NO_NUMBERS.items()},
    "label between": (put(1, "0.5"), HOT),
    "no label at all": (put(slice(1, 5), "0000"), HOT),
    "two labels": (put(slice(1, 5), "0110"), HOT),
    "value too few": (lambda rows, row: rows[row].pop(), "has no number for scab"),
    "row twice": (lambda rows, row: rows.insert(row, list(rows[row])), "repeats an image_id"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@settings(random_tables, max_examples=12)
@given(table=tables, row=st.integers(0, 8), blank_after=st.booleans())
def test_a_corrupted_row_is_refused_in_one_line_with_its_place(tmp_path, corruption, table, row, blank_after):
    corrupt, complaint = CORRUPTIONS[corruption]
    rows, row = spell(table), row % len(table) + 1
    corrupt(rows, row)
    (tmp_path / "train.csv").write_bytes(encode(rows, blank_after=[0] if blank_after else []))
    said = refusal(read_labels, tmp_path / "train.csv")
    line = row + 1 + blank_after + (corruption == "row twice")
    assert said.startswith(f"error: {tmp_path / 'train.csv'}: line {line} (") and complaint in said
    assert "; line" not in said


# ---------------------------------------------------------------------------------------------- by name

REFUSED = {  # what is wrong: its bytes (None: no such file), what is said
    "missing": (None, ["train.csv does not exist (No such file or directory); see the README"]),
    "a folder": ("folder", ["train.csv cannot be read as CSV in UTF-8 (Is a directory)"]),
    "empty": (b"", ["cannot be read as CSV in UTF-8"]),
    "only a header": (HEADER, ["train.csv: has no rows"]),
    "a column missing": (b"image_id,healthy,rust,scab\na,1,0,0\n", ["train.csv: lacks the column multiple_diseases"]),
    "a column too many": (HEADER[:-1] + b",id\na,1,0,0,0,0\n", ["has a column 'id' that does not belong"]),
    "a column twice": (HEADER[:-1] + b",scab\na,1,0,0,0,0\n", ["has the column scab twice"]),
    "an index column, as pandas writes it": (b"," + HEADER + b"0,a,1,0,0,0\n", ["has a column '' that does not"]),
    "semicolons": (HEADER.replace(b",", b";"), ["separated by semicolons or tabs: save it with commas"]),
    "tabs": (HEADER.replace(b",", b"\t") + b"a\t1\t0\t0\t0\n", ["semicolons or tabs: save it with commas"]),
    "other classes": (b"image_id,oak\na,1\n", ["has a column 'oak'", "; the classes are CLASSES in utils.py"]),
    "Latin-1": (HEADER + "é,1,0,0,0\n".encode("latin-1"), ["cannot be read as CSV in UTF-8"]),
    "a web page": (b"<!DOCTYPE html>\n<html>404</html>\n", ["has a column '<!DOCTYPE html>' that does not belong"]),
    "a row too long": (HEADER + b"a,1,0,0,0\nb,1,0,0,0,\n", ["Expected 5 fields in line 3, saw 6"]),
    "a quote that does not end": (HEADER + b'a,1,0,0,0\n"c,1,0,0,0\n', ["EOF inside string starting at row 2"]),
    "several at once": (
        HEADER + b"a,1,0,0,0\n../b,2,0,0,0\na,1,0,0,1\nc,x,0,0,\nd,1\n",
        [f"line 3 ('../b') has an image_id that is {PLAIN}", f"line 3 ('../b') {HOT}", f"line 4 ('a') {HOT}"]
        + ["line 4 ('a') repeats an image_id", "line 5 ('c') has no number for healthy", "line 6 ('d') has no number"],
    ),
    "more than ten at once": (HEADER + b"a,1,0,0,0\n" * 14, ["line 12 ('a') repeats", " … and 3 more"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_faulty_file_is_refused(tmp_path, fault):
    content, words = REFUSED[fault]
    path = tmp_path / "train.csv"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    said = refusal(read_labels, path)
    assert all(word in said for word in words), said


# ---------------------------------------------------------------------------- soft labels and submissions, for a and b

NOT_MATCHING = {  # what is wrong: the rows, what is said; the soft labels are refused, the submissions not blended
    "another data set": (b"a,1,0,0,0\nc,1,0,0,0\n", ["has no row for b; has a row for 'c', which is not wanted"]),
    "an id twice": (b"a,1,0,0,0\nb,1,0,0,0\nb,1,0,0,0\n", ["line 4 ('b') repeats an image_id"]),
    "NaN": (b"a,1,0,0,0\nb,nan,0,0,1\n", ["line 3 ('b') has no number for healthy"]),
    "cut short": (b"a,1,0,0,0\nb,0.5,0.", ["line 3 ('b') has no number for rust"]),
}
NO_DISTRIBUTIONS = {  # what is refused as soft labels, but blended with a note: the rows, what is said
    "a sum that is not 1": ([[1, 0, 0, 0], [0.5, 0.2, 0.2, 0.2]], "1 rows", "it sums to 1.1"),
    "ranks of 1,821 photos": ([[1821, 3.5, 17, 900], [2, 8, 1, 4]], "2 rows", "it holds a value outside 0…1"),
    "logits": ([[1, 0, 0, 0], [1.2, -0.2, 0, 0]], "1 rows", "it holds a value outside 0…1"),
}


def write(folder, **tables):
    """Write CSV files, each with the header of the labels and the rows that are given, bytes."""
    for name, rows in tables.items():
        (folder / f"{name}.csv").write_bytes(HEADER + rows)


def blend_two(folder, first, second):
    """Blend two files of a folder into mix.csv there."""
    names = [str(folder / f"{name}.csv") for name in (first, second)]
    blend.main(Namespace(submissions=names, output=str(folder / "mix.csv"), limit=None))
    return pd.read_csv(folder / "mix.csv")


@pytest.mark.parametrize("fault", NOT_MATCHING)
def test_files_that_do_not_match_are_neither_learned_from_nor_blended(tmp_path, fault):
    rows, words = NOT_MATCHING[fault]
    write(tmp_path, first=b"a,1,0,0,0\nb,1,0,0,0\n", other=rows)
    (tmp_path / "mix.csv").write_text("older")
    learned = refusal(read_soft_labels, tmp_path / "other.csv", wanted=["a", "b"])
    for said in (learned, refusal(blend_two, tmp_path, "first", "other")):
        assert "other.csv: " in said and all(word in said for word in words), said
    missing = "none.csv does not exist (No such file or directory); run the step"
    assert missing in refusal(blend_two, tmp_path, "first", "none")
    assert (tmp_path / "mix.csv").read_text() == "older"


@pytest.mark.parametrize("case", NO_DISTRIBUTIONS)
def test_what_is_no_distribution_is_not_learned_from_and_blended_with_a_note(tmp_path, capsys, case):
    values, rows, said = NO_DISTRIBUTIONS[case]
    write(tmp_path, first=b"a,1,0,0,0\nb,0,0,0,1\n")
    pd.DataFrame(values, ["a", "b"], CLASSES).to_csv(tmp_path / "other.csv", index_label="image_id")
    assert f"('b') is no probability distribution: {said}" in refusal(read_soft_labels, tmp_path / "other.csv")
    mix = blend_two(tmp_path, "first", "other")[list(CLASSES)].to_numpy()
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "note: " in line]
    assert all(word in note for word in ("other.csv", rows, "blended all the same"))
    np.testing.assert_allclose(mix, (np.array(values) + [[1, 0, 0, 0], [0, 0, 0, 1]]) / 2)


@pytest.mark.parametrize("digits", [2, 3, 4, 6])
def test_honest_probabilities_are_taken_however_they_were_rounded(tmp_path, digits, capsys):
    rounded = np.random.default_rng(0).dirichlet([0.5] * 4, 1821).round(digits)
    assert digits > 3 or (abs(rounded.sum(axis=1) - 1) > 10.0**-digits / 2).sum() > 300
    ids = [f"Test_{i}" for i in range(1821)]
    pd.DataFrame(rounded, ids, CLASSES).to_csv(tmp_path / "rounded.csv", index_label="image_id")
    np.testing.assert_array_equal(read_soft_labels(tmp_path / "rounded.csv")[list(CLASSES)], rounded)
    blend_two(tmp_path, "rounded", "rounded")
    assert "note" not in capsys.readouterr().out


def test_submissions_in_another_order_and_the_same_one_twice_are_blended(tmp_path):
    write(tmp_path, first=b"a,1,0,0,0\nb,.5,.5,0,0\n", second=b"b,0,0,.5,.5\na,0,0,0,1\n")
    for second, expected in (("second", [[0.5, 0, 0, 0.5], [0.25] * 4]), ("first", [[1, 0, 0, 0], [0.5, 0.5, 0, 0]])):
        mix = blend_two(tmp_path, "first", second)
        assert mix["image_id"].tolist() == ["a", "b"]
        np.testing.assert_array_equal(mix[list(CLASSES)].to_numpy(), expected)


def test_soft_labels_are_joined_by_image_id_not_by_row(tmp_path):
    """The original looked them up by row number inside the fold: 11 of 7,284 training rows got their own."""
    write(tmp_path, soft=b"b,0.1,0.2,0.3,0.4\na,0.7,0.1,0.1,0.1\nc,0,0,0,1\n")
    soft = read_soft_labels(tmp_path / "soft.csv", wanted=["a", "b"], may_hold_more=True)
    assert soft["image_id"].tolist() == ["a", "b"]
    mixed = mix_labels(np.eye(4)[[0, 3]], soft[list(CLASSES)].to_numpy(), 0.3)
    np.testing.assert_allclose(mixed, [[0.91, 0.03, 0.03, 0.03], [0.03, 0.06, 0.09, 0.82]], atol=1e-7)
    assert mixed.dtype == np.float32


def test_test_photos_come_in_the_row_order_of_sample_submission_and_test_csv_must_have_the_same_ids(tmp_path):
    write(tmp_path, sample_submission=b"b,.25,.25,.25,.25\na,.25,.25,.25,.25\n")
    (tmp_path / "test.csv").write_text("image_id\na\nb\n")
    assert read_test_ids(tmp_path).tolist() == ["b", "a"]
    (tmp_path / "test.csv").write_text("image_id\na\nc\n")
    said = refusal(read_test_ids, tmp_path)
    assert said.endswith("test.csv: has no row for b; has a row for 'c', which is not wanted")


# ---------------------------------------------------------------------------------------------- of our own making


@pytest.mark.parametrize("content", [b"", b"image_id,fold\n", b"\xff\xfe\0\1" * 100, b"image_id,other\na,1\n"])
def test_a_damaged_own_csv_is_named(tmp_path, content):
    (tmp_path / "folds.csv").write_bytes(content)
    assert "folds.csv is damaged (" in refusal(read_own_csv, tmp_path / "folds.csv", ["image_id", "fold"])
    assert "(Is a directory)" in refusal(read_own_csv, tmp_path, ["image_id"])


def test_own_csv_files_are_read_as_they_were_written(tmp_path):
    values = [0.1 + 0.2, 1 / 3, np.nan]
    frame = pd.DataFrame({"image_id": ["NA", "007", "nan"], "fold": [0, 1, 2], "val_loss": values})
    write_csv(tmp_path / "own.csv", frame)
    pd.testing.assert_frame_equal(read_own_csv(tmp_path / "own.csv", ["fold"]), frame, check_exact=True)
