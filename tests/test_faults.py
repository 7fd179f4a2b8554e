"""Every fault of the input that was tried, and what happens: each row of a table is a test.

The tables, in this order: train.csv, soft labels and submissions, photos, the image cache, the disk. A fault is refused
with one line before anything is trained or written; what is unusual but legitimate works and gives the right values.
"""

import errno
import io
import multiprocessing
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import unicodedata
from argparse import Namespace
from contextlib import contextmanager
from hashlib import sha256
from operator import attrgetter

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_script, start_script, wait_until
from PIL import Image

import blend
from dataset import fit_photo, load_photo
from harness import files
from harness import photos as photos_room
from harness.console import InputError
from harness.files import atomic_write, write_csv
from harness.log_dir import read_own_csv
from harness.photos import cache_images
from harness.tables import read_probabilities, read_test_ids, read_train_csv
from utils import CLASSES

HEADER = b"image_id,healthy,multiple_diseases,rust,scab\n"
ROWS = b"a,1,0,0,0\nb,0,0,1,0\n"


def refusal(call, *arguments):
    """What is said when `call` refuses its input: one line."""
    with pytest.raises(InputError) as stop:
        call(*arguments)
    said = str(stop.value)
    assert said.startswith("error: ") and said.isprintable(), said
    return said


# ---------------------------------------------------------------------------------------------- train.csv

TRAIN_CSV_REFUSED = {  # what is wrong: its bytes (None: no such file), what is said
    "missing": (None, "train.csv does not exist; see the README"),
    "a folder": ("folder", "train.csv cannot be read: Is a directory"),
    "empty": (b"", "train.csv is empty"),
    "only a byte order mark": (b"\xef\xbb\xbf", "train.csv is empty"),
    "only blank lines": (b"\n\r\n\n", "train.csv is empty"),
    "only a header": (HEADER, "train.csv: has no rows"),
    "no header": (ROWS, "lacks the column image_id; .*has a column 'a' that does not belong there"),
    "a column missing": (b"image_id,healthy,rust,scab\na,1,0,0\n", "train.csv: lacks the column multiple_diseases$"),
    "a column too many": (HEADER[:-1] + b",id\na,1,0,0,0,0\n", "train.csv: has a column 'id' that does not belong"),
    "a column twice": (HEADER[:-1] + b",scab\na,1,0,0,0,0\n", "has a column 'scab' that does not belong there"),
    "a column misspelt": (HEADER.replace(b"scab", b"Scab") + ROWS, "lacks the column scab; has a column 'Scab'"),
    "columns in another order": (
        b"image_id,healthy,rust,scab,multiple_diseases\na,1,0,0,0\n",
        "its columns are image_id,healthy,rust,scab,multiple_diseases; put them in the order image_id,healthy,multiple",
    ),
    "an index column, as pandas writes it": (
        b"," + HEADER + b"0,a,1,0,0,0\n",
        "has a column '' that does not belong there",
    ),
    "semicolons": ((HEADER + ROWS).replace(b",", b";"), "has a column 'image_id;healthy;multiple_diseases;rust;scab'"),
    "UTF-16": (
        (HEADER + ROWS).decode().encode("utf-16"),
        "not encoded as UTF-8 but perhaps as UTF-16: save it as UTF-8",
    ),
    "UTF-16 without a mark": ((HEADER + ROWS).decode().encode("utf-16-be"), "perhaps as UTF-16: save it as UTF-8"),
    "Latin-1": (HEADER + ROWS + "é,1,0,0,0\n".encode("latin-1"), r"not encoded as UTF-8 \(line 4\): save it as UTF-8"),
    "a photo": (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1", "is not encoded as UTF-8"),
    "a web page": (b"<!DOCTYPE html>\n<html>404</html>\n", "has a column '<!DOCTYPE html>' that does not belong there"),
    "a row too short": (HEADER + ROWS + b"c,1,0\n", "train.csv: line 4 has 3 values, its header 5 names$"),
    "a row too long": (HEADER + b"a,1,0,0,0,\n", "line 2 has 6 values, its header 5 names"),
    "a quote that does not end": (HEADER + ROWS + b'"c,1,0,0,0\n', "line 4 cannot be read as CSV, nor what follows"),
    "text after a quote": (HEADER + b'"a"x,1,0,0,0\n', "line 2 cannot be read as CSV"),
    "an id twice": (HEADER + ROWS + b"a,1,0,0,0\n", "line 4 repeats image_id 'a' of line 2"),
    "no id": (HEADER + b",1,0,0,0\n", "line 2 has no image_id"),
    "an id in another folder": (HEADER + b"../a,1,0,0,0\n", r"line 2 has the image_id '\.\./a', which is not a plain"),
    "an absolute id": (HEADER + b"/etc/a,1,0,0,0\n", "image_id '/etc/a', which is not a plain file name"),
    "two 1": (HEADER + ROWS + b"c,1,0,0,1\n", r"line 4 \('c'\) is not one 1 and three 0"),
    "no 1": (HEADER + b"a,0,0,0,0\n", r"line 2 \('a'\) is not one 1 and three 0"),
    "soft labels in its place": (HEADER + b"a,0.5,0.5,0,0\n", r"line 2 \('a'\) is not one 1 and three 0"),
    "a value missing": (HEADER + b"a,1,0,,0\n", "line 2 has no value for rust"),
    "a word for a value": (HEADER + b"a,1,0,x,0\n", "line 2 has rust 'x', not a number"),
    "NaN": (HEADER + b"a,nan,0,0,1\n", "line 2 has healthy 'nan', not a number"),
    "infinity": (HEADER + b"a,inf,0,0,1\n", "line 2 has healthy 'inf', not a number"),
    "blank lines before the fault": (HEADER + b"\n\n" + ROWS + b"\nc,2,0,0,0\n", r"line 7 \('c'\) is not one 1"),
    "line breaks in quotes before the fault": (
        HEADER + b'"a\nb",1,0,0,0\nc,2,0,0,0\n',
        r"line 2 has the image_id 'a\\nb'.*; line 4 \('c'\) is not one 1",
    ),
    "several at once": (
        HEADER + b"a,1,0,0,0\n../b,2,0,0,0\na,1,0,0,1\nc,x,0,0,\nd,1\n",
        r"line 3 has the image_id '\.\./b'.*; line 3 .* is not one 1.*; line 4 .*not one 1.*; line 4 repeats image_id 'a'"
        r".*; line 5 has healthy 'x'.*; line 5 has no value for scab; line 6 has 2 values",
    ),
    "more than ten at once": (HEADER + b"a,1,0,0,0\n" * 14, "line 12 repeats image_id 'a' of line 2 … and 3 more$"),
}


@pytest.mark.parametrize("fault", TRAIN_CSV_REFUSED)
def test_a_faulty_train_csv_is_refused(tmp_path, fault):
    content, said = TRAIN_CSV_REFUSED[fault]
    if content == "folder":
        (tmp_path / "train.csv").mkdir()
    elif content is not None:
        (tmp_path / "train.csv").write_bytes(content)
    assert re.search(said, refusal(read_train_csv, tmp_path, CLASSES))


TRAIN_CSV_FINE = {  # what is unusual: its bytes, the ids that are read; all rows are healthy
    "rows in any order": (HEADER + b"b,1,0,0,0\na,1,0,0,0\n", ["b", "a"]),
    "Windows line ends": ((HEADER + b"a,1,0,0,0\n").replace(b"\n", b"\r\n"), ["a"]),
    "old Mac line ends": ((HEADER + b"a,1,0,0,0\n").replace(b"\n", b"\r"), ["a"]),
    "a byte order mark": (b"\xef\xbb\xbf" + HEADER + b"a,1,0,0,0\n", ["a"]),
    "no line end at the end": (HEADER + b"a,1,0,0,0", ["a"]),
    "blank lines at the end": (HEADER + b"a,1,0,0,0\n\n\r\n\n", ["a"]),
    "quotes": (HEADER.replace(b"rust", b'"rust"') + b'"a","1","0","0","0"\n', ["a"]),
    "decimals": (HEADER + b"a,1.0,0.0,0.,.0\n", ["a"]),
    "blanks before numbers": (HEADER + b"a, 1, 0, 0, 0\n", ["a"]),
    "ids that look like numbers": (HEADER + b"007,1,0,0,0\n7,1,0,0,0\n1e3,1,0,0,0\n", ["007", "7", "1e3"]),
    "ids that look like nothing": (HEADER + b"NA,1,0,0,0\nnan,1,0,0,0\nNone,1,0,0,0\n", ["NA", "nan", "None"]),
    "ids in any script": (HEADER + "é 1,1,0,0,0\n叶_(2),1,0,0,0\na..b,1,0,0,0\n".encode(), ["é 1", "叶_(2)", "a..b"]),
    "ids with comma and quote": (HEADER + b'"a,b",1,0,0,0\n"c""d",1,0,0,0\n', ["a,b", 'c"d']),
}


@pytest.mark.parametrize("case", TRAIN_CSV_FINE)
def test_an_unusual_train_csv_is_read(tmp_path, case):
    content, ids = TRAIN_CSV_FINE[case]
    (tmp_path / "train.csv").write_bytes(content)
    frame = read_train_csv(tmp_path, CLASSES)
    assert frame["image_id"].tolist() == ids and frame.columns.tolist() == ["image_id", *CLASSES]
    np.testing.assert_array_equal(frame[list(CLASSES)].to_numpy(), [[1, 0, 0, 0]] * len(ids))


@contextmanager
def without_root():
    """Be nobody for a while, if the tests are run by root, who may read everything."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other permissions")
def test_a_csv_file_without_permission_is_named(tmp_path):
    (tmp_path / "train.csv").write_bytes(HEADER + ROWS)
    (tmp_path / "train.csv").chmod(0)
    with without_root():
        said = refusal(read_train_csv, tmp_path, CLASSES)
    assert said == f"error: {tmp_path / 'train.csv'} cannot be read: Permission denied"


# ---------------------------------------------------------------------------- soft labels and submissions, for a and b

PROBABILITIES_REFUSED = {  # what is wrong: the rows, what is said
    "an id missing": (b"a,1,0,0,0\n", "soft.csv: has no row for b$"),
    "an id of another data set": (b"a,1,0,0,0\nb,1,0,0,0\nc,1,0,0,0\n", "has a row for 'c', which is not wanted$"),
    "another data set": (b"c,1,0,0,0\nd,1,0,0,0\n", "no row for a; has no row for b; has a row for 'c'.*; has .*'d'"),
    "an id twice": (b"a,1,0,0,0\nb,1,0,0,0\nb,1,0,0,0\n", "line 4 repeats image_id 'b' of line 3$"),
    "a sum that is not 1": (
        b"a,1,0,0,0\nb,.5,.2,.2,.2\n",
        r"line 3 \('b'\) is no probability distribution: it sums to 1.1",
    ),
    "logits": (b"a,1,0,0,0\nb,1.2,-0.2,0,0\n", r"line 3 \('b'\) is no probability .*: it holds a value outside 0…1$"),
    "NaN": (b"a,1,0,0,0\nb,nan,0,0,1\n", "line 3 has healthy 'nan', not a number"),
    "a value missing": (b"a,1,0,0,0\nb,,0,0,1\n", "line 3 has no value for healthy"),
    "several at once": (
        b"a,2,0,0,0\nc,0,0,0,.4\n",
        r"line 2 .*outside.*; line 3 .*sums to 0.4; has no row for b; .* 'c'",
    ),
    "cut short": (b"a,1,0,0,0\nb,0.5,0.", r"soft.csv: line 3 has 3 values, its header 5 names$"),
}


@pytest.mark.parametrize("fault", PROBABILITIES_REFUSED)
def test_faulty_soft_labels_are_refused(tmp_path, fault):
    rows, said = PROBABILITIES_REFUSED[fault]
    (tmp_path / "soft.csv").write_bytes(HEADER + rows)
    assert re.search(said, refusal(read_probabilities, tmp_path / "soft.csv", CLASSES, ["a", "b"]))


BLENDED_ALL_THE_SAME = {"a sum that is not 1", "logits"}  # the AUC asks for the order only


@pytest.mark.parametrize("fault", [fault for fault in PROBABILITIES_REFUSED if fault not in BLENDED_ALL_THE_SAME])
def test_submissions_that_do_not_match_are_not_blended(tmp_path, fault):
    rows, said = PROBABILITIES_REFUSED[fault]
    said = "has no row for b; .* 'c'" if fault == "several at once" else said
    (tmp_path / "first.csv").write_bytes(HEADER + b"a,1,0,0,0\nb,1,0,0,0\n")
    (tmp_path / "soft.csv").write_bytes(HEADER + rows)
    (tmp_path / "mix.csv").write_text("older")
    options = Namespace(
        limit=None, submissions=[str(tmp_path / "first.csv"), str(tmp_path / "soft.csv")], output=tmp_path / "mix.csv"
    )
    assert re.search(said, refusal(blend.main, options))
    assert (tmp_path / "mix.csv").read_text() == "older"


NO_DISTRIBUTIONS = {  # what is blended with a note: the rows of a and b, what is said
    "a sum that is not 1": ([[1, 0, 0, 0], [0.5, 0.2, 0.2, 0.2]], "1 of 2 rows .*it sums to 1.1"),
    "averaged ranks": ([[0.25, 0.75, 1.0, 0.5], [0.75, 0.25, 0.5, 1.0]], "2 of 2 rows .*it sums to 2.5"),
    "ranks of 1,821 photos": ([[1821, 3.5, 17, 900], [2, 8, 1, 4]], "2 of 2 rows .*holds a value outside"),
    "logits": ([[1, 0, 0, 0], [1.2, -0.2, 0, 0]], "1 of 2 rows .*holds a value outside"),
}


@pytest.mark.parametrize("case", NO_DISTRIBUTIONS)
def test_what_is_no_distribution_is_blended_with_a_note(tmp_path, capsys, case):
    values, said = NO_DISTRIBUTIONS[case]
    (tmp_path / "first.csv").write_bytes(HEADER + b"a,1,0,0,0\nb,0,0,0,1\n")
    pd.DataFrame(values, columns=list(CLASSES)).assign(image_id=["a", "b"])[["image_id", *CLASSES]].to_csv(
        tmp_path / "other.csv", index=False
    )
    names = [str(tmp_path / "first.csv"), str(tmp_path / "other.csv")]
    blend.main(Namespace(limit=None, submissions=names, output=str(tmp_path / "mix.csv")))
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "note: " in line]
    assert re.search(f"other.csv: {said}.*blended all the same", note)
    mix = pd.read_csv(tmp_path / "mix.csv")[list(CLASSES)].to_numpy()
    np.testing.assert_allclose(mix, (np.array(values) + [[1, 0, 0, 0], [0, 0, 0, 1]]) / 2)


@pytest.mark.parametrize("digits", [2, 3, 4, 6])
def test_honest_probabilities_are_taken_however_they_were_rounded(tmp_path, digits, capsys):
    exact = np.random.default_rng(0).dirichlet([0.5] * 4, 1821)
    rows = pd.DataFrame(exact.round(digits), columns=list(CLASSES))
    assert digits > 3 or (abs(rows.sum(axis=1) - 1) > 10.0**-digits / 2).sum() > 300
    rows.insert(0, "image_id", [f"Test_{i}" for i in range(1821)])
    rows.to_csv(tmp_path / "rounded.csv", index=False)
    np.testing.assert_array_equal(
        read_probabilities(tmp_path / "rounded.csv", CLASSES)[list(CLASSES)], exact.round(digits)
    )
    blend.main(Namespace(limit=None, submissions=[str(tmp_path / "rounded.csv")] * 2, output=str(tmp_path / "mix.csv")))
    assert "note" not in capsys.readouterr().out


def test_numbers_of_any_size_are_blended(tmp_path):
    (tmp_path / "large.csv").write_bytes(HEADER + b"a,1e308,0,0,0\n")
    blend.main(Namespace(limit=None, submissions=[str(tmp_path / "large.csv")] * 2, output=str(tmp_path / "mix.csv")))
    assert pd.read_csv(tmp_path / "mix.csv")["healthy"].tolist() == [1e308]


def test_a_submission_that_is_missing_or_a_folder_is_named(tmp_path):
    (tmp_path / "first.csv").write_bytes(HEADER + b"a,1,0,0,0\n")
    for name, said in (("none.csv", "none.csv does not exist; run the step"), ("", "cannot be read: Is a directory")):
        options = Namespace(
            limit=None, submissions=[str(tmp_path / "first.csv"), str(tmp_path / name)], output=tmp_path / "mix.csv"
        )
        assert said in refusal(blend.main, options)


def test_submissions_in_another_order_and_the_same_one_twice_are_blended(tmp_path):
    (tmp_path / "first.csv").write_bytes(HEADER + b"a,1,0,0,0\nb,.5,.5,0,0\n")
    (tmp_path / "second.csv").write_bytes(HEADER + b"b,0,0,.5,.5\na,0,0,0,1\n")
    for second, expected in (("second", [[0.5, 0, 0, 0.5], [0.25] * 4]), ("first", [[1, 0, 0, 0], [0.5, 0.5, 0, 0]])):
        names = [str(tmp_path / f"{name}.csv") for name in ("first", second)]
        blend.main(Namespace(limit=None, submissions=names, output=str(tmp_path / "mix.csv")))
        mix = read_probabilities(tmp_path / "mix.csv", CLASSES)
        assert mix["image_id"].tolist() == ["a", "b"]
        np.testing.assert_array_equal(mix[list(CLASSES)].to_numpy(), expected)


def test_test_csv_and_sample_submission_must_have_the_same_ids(tmp_path):
    (tmp_path / "sample_submission.csv").write_bytes(HEADER + b"b,.25,.25,.25,.25\na,.25,.25,.25,.25\n")
    (tmp_path / "test.csv").write_bytes(b"image_id\na\nc\n")
    said = refusal(read_test_ids, tmp_path, CLASSES)
    assert said.endswith("test.csv: has no row for b; has a row for 'c', which is not wanted")


# ---------------------------------------------------------------------------------------------- photos


def draw_photo():
    """A smooth picture of 96 x 144 pixels without symmetry, uint8 RGB."""
    y, x = np.mgrid[:96, :144]
    photo = np.stack([x * 1.5, y * 2.2, 120 + 60 * np.sin(x / 20)], -1).astype(np.uint8)
    photo[10:40, 15:60] = (220, 200, 40)
    return photo


PHOTO = Image.fromarray(draw_photo())


def save(picture=PHOTO, kind="JPEG", **options):
    """A Pillow picture as the bytes of a file; JPEG in best quality."""
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def turn(held, picture=PHOTO):
    """`picture` as a camera held in another way stores it, with the EXIF orientation that says how it was held."""
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[held]
    return save(picture if stored is None else picture.transpose(stored), exif=orientation(held))


def insert_segment(content, payload, marker=0xE1):
    """A JPEG with one more segment, of a kind that decoders skip, after its first two bytes."""
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + content[2:]


def hide_colours(picture=PHOTO):
    """A picture whose left half is transparent, with a loud colour hidden there: RGBA."""
    pixels = np.asarray(picture.convert("RGBA")).copy()
    pixels[:, : picture.width // 2] = (0, 255, 0, 0)
    return Image.fromarray(pixels)


def on_white(picture):
    """What the eye sees of a picture with transparent parts on a white page."""
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return white.convert("RGB")


def lose_a_restart_interval(content):
    """A JPEG with restart markers that lacks what is between two of them."""
    start = content.index(b"\xff\xd3", len(content) // 2)
    return content[:start] + content[content.index(b"\xff\xd4", start) :]


def flip_a_byte(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :]


def box(brand):
    """How files of the HEIF family begin."""
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"mif1" + bytes(2000)


def raw_like(**tags):
    """A TIFF that OpenCV can decode, with further tags, as cameras begin their raw files with a thumbnail."""
    return save(
        PHOTO.resize((24, 16)), "TIFF", tiffinfo={int(number.strip("_")): value for number, value in tags.items()}
    )


GREYS = Image.fromarray((np.asarray(PHOTO.convert("L")) // 64 * 64).astype(np.uint8))
JPEG = save()
ROUGH = np.asarray(PHOTO.resize((720, 480))) // 2 + np.random.default_rng(0).integers(
    0, 60, (480, 720, 3), dtype=np.uint8
)
LARGE = save(Image.fromarray(ROUGH))  # with as much to code everywhere as in a leaf
DEEP = cv2.imencode(".png", np.asarray(PHOTO)[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes()
SMALL = Image.fromarray(np.full((1, 1, 3), (200, 100, 50), np.uint8))

RESTARTED = save(Image.fromarray(ROUGH), restart_marker_rows=1)
BAD_ICC = b"ICC_PROFILE\0" + bytes([5, 2]) + b"x" * 20  # a piece of a colour profile that lacks the others: harmless

PHOTO_REFUSED = {  # what is wrong: the file's bytes (None: no such file), what is said
    "missing": (None, "photo.jpg is missing$"),
    "a folder": ("folder", "photo.jpg cannot be read: Is a directory"),
    "a link to nothing": ("link", "photo.jpg is missing$"),
    "named .JPG": ("upper", r"photo.jpg is missing \(there is photo.JPG: rename it\)"),
    "empty": (b"", r"photo.jpg is empty \(0 bytes\)"),
    "a web page": (b"<html>404</html>", "photo.jpg cannot be decoded as a photo$"),
    "the first bytes only": (JPEG[:300], "photo.jpg cannot be decoded as a photo$"),
    "cut in the middle": (JPEG[: len(JPEG) // 2], r"photo.jpg is damaged \(Premature end of JPEG file\)"),
    "cut by a byte": (JPEG[:-1], r"photo.jpg is damaged \(Premature end of JPEG file\)"),
    "cut, then filled with zeros": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), r"photo.jpg is damaged \("),
    "a cut progressive JPEG": (save(progressive=True)[:-900], r"photo.jpg is damaged \(Premature end of JPEG file\)"),
    "zeros in the middle": (
        LARGE[:90_000] + bytes(512) + LARGE[90_512:],
        r"photo.jpg is damaged \(Corrupt JPEG data: ",
    ),
    "a block lost in the middle": (LARGE[:90_000] + LARGE[90_512:], r"photo.jpg is damaged \(Corrupt JPEG data: "),
    "data lost between restart markers": (lose_a_restart_interval(RESTARTED), r"is damaged \(.*instead of RST3\)"),
    "stray bytes between restart markers": (
        RESTARTED.replace(b"\xff\xd1", b"\1\2\3\xff\xd1", 1),
        r"is damaged \(.*3 extraneous bytes before marker 0xd1\)",
    ),
    "cut, behind a harmless fault": (
        insert_segment(LARGE, BAD_ICC, 0xE2)[:-20_000],
        r"is damaged \(image file is trunc",
    ),
    "a PNG with a byte changed": (
        flip_a_byte(save(kind="PNG")),
        "photo.jpg cannot be decoded as a photo$",
    ),
    "HEIC, as phones write": (
        box(b"heic"),
        "photo.jpg is a HEIC file, which cannot be read: convert it to JPEG or PNG$",
    ),
    "HEIC of several pictures": (box(b"msf1"), "photo.jpg is a HEIC file"),
    "JPEG XL": (b"\xff\x0a" + bytes(99), "photo.jpg is a JPEG XL file"),
    "Photoshop": (b"8BPS\0\1" + bytes(99), "photo.jpg is a Photoshop file"),
    "raw, Canon's new one": (box(b"crx "), "photo.jpg is a raw file, which cannot be read: convert it to JPEG or PNG$"),
    "raw, Canon's old one": (b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "photo.jpg is a raw file"),
    "raw, Fujifilm's": (b"FUJIFILMCCD-RAW 0201" + bytes(99), "photo.jpg is a raw file"),
    "raw, with a thumbnail first": (raw_like(_254=1), "photo.jpg is a raw file"),
    "raw, a DNG": (raw_like(_50706=b"\1\4\0\0"), "photo.jpg is a raw file"),
    "larger than any photo": ("huge", "photo.jpg has 3.0 GB, more than any photo$"),
    "OpenEXR": (b"v/1\1" + bytes(99), "photo.jpg cannot be decoded as a photo$"),
    "a cut PNG": (save(kind="PNG")[:-30], "photo.jpg cannot be decoded as a photo$"),
    "a cut GIF": (save(kind="GIF")[:-900], "photo.jpg cannot be decoded as a photo$"),
    "too large for OpenCV": (
        b"P6\n40000 40000\n255\n" + bytes(99),
        r"decoded as a photo: it has more than 2\^30 pixels$",
    ),
}


@pytest.mark.parametrize("fault", PHOTO_REFUSED)
def test_a_faulty_photo_is_refused(tmp_path, fault):
    content, said = PHOTO_REFUSED[fault]
    path = tmp_path / "photo.jpg"
    if content == "folder":
        path.mkdir()
    elif content == "link":
        path.symlink_to("nothing")
    elif content == "huge":
        with open(path, "wb") as file:
            file.write(JPEG)
            file.truncate(3 * 10**9)
    elif content == "upper":
        (tmp_path / "photo.JPG").write_bytes(JPEG)
        if path.exists():
            pytest.skip("here .JPG and .jpg are the same")
    elif content is not None:
        path.write_bytes(content)
    assert re.search(said, refusal(load_photo, path, (32, 48)))


PHOTO_FINE = {  # what is unusual: the file's bytes, the picture that it shows, the error allowed (of 255, on average)
    "plain": (JPEG, PHOTO, 2),
    "progressive": (save(progressive=True), PHOTO, 2),
    "restart markers": (save(restart_marker_rows=1), PHOTO, 2),
    "bytes after the end marker": (JPEG + b"\0" * 40 + b"trailer", PHOTO, 2),
    "bytes before the end marker, as some cameras leave": (JPEG[:-2] + b"\1\2\3" + JPEG[-2:], PHOTO, 2),
    "an embedded thumbnail": (insert_segment(JPEG, b"Exif\0\0" + save(PHOTO.resize((24, 16)))), PHOTO, 2),
    "a second picture behind the first, as phones write": (JPEG + save(PHOTO.rotate(180)), PHOTO, 2),
    "an embedded end marker": (insert_segment(JPEG, b"\xff\xd9\xff\xd9", 0xFE), PHOTO, 2),
    "grey": (save(PHOTO.convert("L")), PHOTO.convert("L").convert("RGB"), 2),
    "CMYK": (save(PHOTO.convert("CMYK")), PHOTO, 2),
    "a PNG named .jpg": (save(kind="PNG"), PHOTO, 0),
    "a PNG of 16 bits a channel": (DEEP, PHOTO, 0),
    "a PNG with transparency": (save(PHOTO.convert("RGBA"), "PNG"), PHOTO, 0),
    "a PNG with transparent parts": (save(hide_colours(), "PNG"), on_white(hide_colours()), 0),
    "a PNG that is half transparent everywhere": (
        save(Image.merge("RGBA", [*PHOTO.split(), Image.new("L", PHOTO.size, 128)]), "PNG"),
        on_white(Image.merge("RGBA", [*PHOTO.split(), Image.new("L", PHOTO.size, 128)])),
        1,
    ),
    "a grey PNG with transparent parts": (
        save(hide_colours().convert("LA"), "PNG"),
        on_white(hide_colours().convert("LA")),
        1,
    ),
    "a PNG with a transparent colour in its palette": (
        save(PHOTO.quantize(256), "PNG", transparency=7),
        on_white(Image.open(io.BytesIO(save(PHOTO.quantize(256), "PNG", transparency=7)))),
        0,
    ),
    "a grey PNG with a transparent grey": (
        save(GREYS, "PNG", transparency=64),
        Image.fromarray(np.where(np.asarray(GREYS) == 64, 255, GREYS).astype(np.uint8)).convert("RGB"),
        0,
    ),
    "a grey TIFF with transparent parts": (
        save(hide_colours().convert("LA"), "TIFF"),
        on_white(hide_colours().convert("LA")),
        1,
    ),
    "an AVIF, EXIF orientation 6": (
        save(PHOTO.transpose(Image.Transpose.ROTATE_90), "AVIF", quality=95, exif=orientation(6)),
        PHOTO,
        3,
    ),
    "a WebP with transparent parts": (save(hide_colours(), "WEBP", lossless=True), on_white(hide_colours()), 1),
    "a JPEG with a piece of a colour profile": (insert_segment(JPEG, BAD_ICC, 0xE2), PHOTO, 2),
    "an AVIF": (save(kind="AVIF", quality=95), PHOTO, 3),
    "a TIFF that says that it is whole": (save(kind="TIFF", tiffinfo={254: 0}), PHOTO, 0),
    "a PNG with a palette": (save(PHOTO.quantize(256), "PNG"), PHOTO.quantize(256).convert("RGB"), 0),
    "a BMP": (save(kind="BMP"), PHOTO, 0),
    "a TIFF": (save(kind="TIFF"), PHOTO, 0),
    "a WebP": (save(kind="WEBP", quality=95), PHOTO, 3),
    "an animated GIF: its first picture": (
        save(PHOTO.quantize(256), "GIF", save_all=True, append_images=[PHOTO.rotate(180).quantize(256)]),
        PHOTO.quantize(256).convert("RGB"),
        0,
    ),
    "1 x 1": (save(SMALL, "PNG"), SMALL, 0),
    "a line of 1 x 5000": (save(SMALL.resize((5000, 1)), "PNG"), SMALL.resize((5000, 1)), 0),
    "48 million pixels": (save(PHOTO.resize((8000, 6000))), PHOTO.resize((8000, 6000)), 2),
    **{f"EXIF orientation {n}": (turn(n), PHOTO, 2) for n in range(1, 9)},
    **{
        f"portrait, EXIF orientation {n}": (turn(n, PHOTO.rotate(90, expand=True)), PHOTO.rotate(90, expand=True), 2)
        for n in range(1, 9)
    },
}


@pytest.mark.parametrize("case", PHOTO_FINE)
def test_an_unusual_photo_shows_what_the_eye_sees(tmp_path, case):
    content, picture, error = PHOTO_FINE[case]
    path, size = tmp_path / "photo.jpg", (32, 48)
    path.write_bytes(content)
    loaded = load_photo(path, size)
    upright = np.asarray(picture)
    landscape = upright.transpose(1, 0, 2) if picture.height > picture.width else upright
    expected = cv2.resize(np.ascontiguousarray(landscape), size[::-1], interpolation=cv2.INTER_LINEAR)
    assert loaded.shape == (*size, 3) and loaded.dtype == np.uint8
    found_error = np.abs(loaded.astype(int) - expected).mean()
    assert found_error <= error
    if case == "grey":
        assert (loaded == loaded[:, :, :1]).all()


def test_the_pixels_of_a_photo_are_opencvs(tmp_path):
    """What the checks let pass is decoded as ever, to the bit."""
    (tmp_path / "photo.jpg").write_bytes(LARGE)
    plain = cv2.cvtColor(cv2.resize(cv2.imread(str(tmp_path / "photo.jpg")), (48, 32)), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(load_photo(tmp_path / "photo.jpg", (32, 48)), plain)


def test_bytes_that_do_not_belong_there_are_worth_a_note(tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(JPEG[:-2] + b"\1\2\3" + JPEG[-2:])
    load_photo(tmp_path / "photo.jpg", (32, 48))
    said = capsys.readouterr().out
    assert (
        "note: photo.jpg may be damaged (Corrupt JPEG data: 3 extraneous bytes before marker 0xd9): look at it" in said
    )


def test_a_name_that_says_raw_or_heic_is_believed_unless_the_content_is_a_jpeg(tmp_path):
    """OpenCV would decode the thumbnail of many a raw file."""
    for name in ("IMG_1.NEF", "IMG_1.arw", "IMG_1.dng"):
        (tmp_path / name).write_bytes(save(kind="TIFF"))
        assert refusal(load_photo, tmp_path / name, (8, 8)).endswith(
            f"{name} is a raw file, which cannot be read: convert it to JPEG or PNG"
        )
    (tmp_path / "IMG_2.HEIC").write_bytes(bytes(500))
    assert "IMG_2.HEIC is a HEIC file" in refusal(load_photo, tmp_path / "IMG_2.HEIC", (8, 8))
    (tmp_path / "IMG_3.HEIC").write_bytes(JPEG)  # a phone that was told to write JPEG
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    np.testing.assert_array_equal(
        load_photo(tmp_path / "IMG_3.HEIC", (8, 8)), load_photo(tmp_path / "photo.jpg", (8, 8))
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    assert refusal(load_photo, tmp_path / "photo.jpg", (8, 8)).endswith("photo.jpg is no file")


@pytest.mark.parametrize("in_csv, on_disk", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_with_accents_is_found_in_either_spelling(tmp_path, in_csv, on_disk):
    """A zip of a Mac spells é as e and an accent; one sees no difference."""
    image_id = unicodedata.normalize(in_csv, "feuille_é")
    name = unicodedata.normalize(on_disk, "feuille_é.jpg")
    assert name != f"{image_id}.jpg"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(JPEG)
    images = cache_images("train", [image_id], [image_id], tmp_path, (16, 24), tmp_path / "cache", fit_photo)
    np.testing.assert_array_equal(images[0], load_photo(tmp_path / "images" / name, (16, 24)))


def test_a_link_to_a_photo_is_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(JPEG)
    (tmp_path / "photo.jpg").symlink_to("elsewhere")
    np.testing.assert_array_equal(
        load_photo(tmp_path / "photo.jpg", (8, 8)), load_photo(tmp_path / "elsewhere", (8, 8))
    )


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other permissions")
def test_a_photo_without_permission_is_named(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    (tmp_path / "photo.jpg").chmod(0)
    with without_root():
        said = refusal(load_photo, tmp_path / "photo.jpg", (8, 8))
    assert said == f"error: {tmp_path / 'photo.jpg'} cannot be read: Permission denied"


# ---------------------------------------------------------------------------------------------- the image cache

N_PHOTOS = 6


@pytest.fixture
def photos(tmp_path):
    """A data directory with six photos."""
    (tmp_path / "images").mkdir()
    for i in range(N_PHOTOS):
        (tmp_path / "images" / f"Train_{i}.jpg").write_bytes(save(PHOTO.rotate(7 * i)))
    return tmp_path


def build(folder, size=(16, 24), n=N_PHOTOS, cache=None):
    ids = [f"Train_{i}" for i in range(n)]
    return cache_images("train", ids, ids, folder, size, cache or folder / "cache", fit_photo)


def assert_right(images, folder, size=(16, 24)):
    for i in range(N_PHOTOS):
        np.testing.assert_array_equal(images[i], load_photo(folder / "images" / f"Train_{i}.jpg", size))


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_all_bad_photos_are_reported_before_anything_is_trained_or_written(sample, tmp_path):
    """A real start of train.py on a data set in which twelve of 41 photos are bad in three ways."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "train.csv").write_bytes((sample / "train.csv").read_bytes())
    for i in range(41):
        if i % 4 or i > 30:
            content = (sample / "images" / f"Train_{i}.jpg").read_bytes()
            (data / "images" / f"Train_{i}.jpg").write_bytes(content)
    for i, content in enumerate([b"", JPEG[:900], b"<html>", b"GIF89a"]):
        (data / "images" / f"Train_{i + 32}.jpg").write_bytes(content)
    done = run_script(
        "train.py", "--data_dir", data, "--image_size", 32, 64, "--weights", "none", cwd=tmp_path, check=False
    )
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and said.startswith(f"error: {data / 'images'}: Train_0.jpg is missing; Train_4.jpg is")
    assert said.endswith(
        "Train_32.jpg is empty (0 bytes); Train_33.jpg is damaged (Premature end of JPEG file); Train_34.jpg cannot be "
        "decoded as a photo; Train_35.jpg cannot be decoded as a photo"
    )
    assert said.count("Train_") == 12
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "image_cache"]
    assert not names(tmp_path / "image_cache")


def test_a_bad_photo_leaves_the_caches_as_they_are(photos):
    build(photos, n=5)
    before = {path.name: path.read_bytes() for path in (photos / "cache").iterdir()}
    (photos / "images" / "Train_2.jpg").write_bytes(JPEG[:-20])
    (photos / "images" / "Train_3.jpg").unlink()
    said = refusal(build, photos)
    assert "Train_2.jpg is damaged (Premature end of JPEG file); Train_3.jpg is missing" in said
    assert {path.name: path.read_bytes() for path in (photos / "cache").iterdir()} == before


def test_a_folder_of_photos_that_is_missing_is_named(tmp_path):
    assert f"{tmp_path / 'images'} is not a folder" in refusal(build, tmp_path)


BUILDER = """
import sys, time
from harness import photos
from dataset import fit_photo
folder, stop = sys.argv[1:]
decoded, real = [], photos.decode_photo
def decode_photo(path):
    if path.stem == stop:
        print("half", flush=True)
        time.sleep(600)
    time.sleep(0.05)
    decoded.append(path)
    return real(path)
photos.decode_photo = decode_photo
print("ready", flush=True)
while not photos.Path("go").exists():
    time.sleep(0.01)
ids = ["Train_%d" % i for i in range(6)]
images = photos.cache_images("train", ids, ids, folder, (16, 24), folder + "/cache", fit_photo)
print(len(decoded), photos.sha256(images.array.tobytes()).hexdigest(), flush=True)
"""


def start_builder(photos, stop=""):
    """A process that builds the image cache once there is a file "go"; at the photo `stop` it says half and waits."""
    script = start_script("-c", BUILDER, photos, stop, cwd=photos)
    wait_until(lambda: "ready" in script.stdout, script)
    return script


def test_two_processes_build_the_cache_once_and_both_use_it(photos):
    scripts = [start_builder(photos) for _ in range(2)]
    (photos / "go").touch()
    assert [script.wait() for script in scripts] == [0, 0]
    answers = [script.stdout.splitlines()[-1].split() for script in scripts]
    assert sorted(int(count) for count, _ in answers) == [0, N_PHOTOS]
    assert answers[0][1] == answers[1][1] == sha256(build(photos).array.tobytes()).hexdigest()
    assert_right(build(photos), photos)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_build_that_is_killed_is_never_used_and_the_next_one_removes_its_rest(photos):
    (photos / "go").touch()
    script = start_builder(photos, stop="Train_4")
    wait_until(lambda: "half" in script.stdout, script)
    script.kill_group()
    assert script.wait() == -signal.SIGKILL
    assert [name for name in names(photos / "cache") if name.startswith(".")] == names(photos / "cache") != []
    assert_right(build(photos), photos)
    assert len(names(photos / "cache")) == 1 and not names(photos / "cache")[0].startswith(".")


def test_an_interrupted_build_leaves_nothing(photos, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(photos_room, "decode_photo", interrupt)
        build(photos)
    assert not names(photos / "cache")
    assert_right(build(photos), photos)


CACHE_DAMAGE = {  # what is done to a cache file by hand, always: it is noticed, and built anew
    "cut": lambda content: content[:-1],
    "cut within its header": lambda content: content[:20],
    "emptied": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "a text": lambda content: b"hello\n" * 100,
    "an array of another size": lambda content: as_npy(np.zeros((6, 8, 8, 3), np.uint8)),
    "an array of another type": lambda content: as_npy(np.zeros((6, 16, 24, 3), np.int8)),
    "zeros": lambda content: bytes(len(content)),
    "a pickle": lambda content: as_npy(np.array([None])),
    "a header of nonsense": lambda content: content[:10] + b"(" * 30 + content[40:],
}


def as_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("damage", CACHE_DAMAGE)
def test_a_cache_that_is_damaged_is_built_anew(photos, damage, capsys):
    path = build(photos).path
    path.write_bytes(CACHE_DAMAGE[damage](path.read_bytes()))
    assert_right(build(photos), photos)
    assert f"note: {path} is damaged; it is built anew" in capsys.readouterr().out
    assert names(photos / "cache") == [path.name]


def test_workers_share_the_cache_and_do_not_hold_it(photos):
    """What is sent to a spawned worker is the file's name, not the pixels; there it is a memory-mapped file again."""
    images = build(photos, (200, 300))
    assert type(images.array) is np.memmap and len(pickle.dumps(images)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(attrgetter("array.__class__.__name__"), [images]) == "memmap"
        assert pool.apply(attrgetter("array.nbytes"), [images]) == images.array.nbytes == N_PHOTOS * 200 * 300 * 3


CACHE_DIR_REFUSED = {  # what --cache_dir is: how it is made, what is said
    "a file": (lambda path: path.write_text("a file"), "cannot make the folder .*cache: File exists; .* --cache_dir$"),
    "in a file": (
        lambda path: path.parent.joinpath("file").write_text(""),
        "cannot make the folder .*: Not a directory",
    ),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "cannot make the folder .*cache: File exists"),
}


@pytest.mark.parametrize("fault", CACHE_DIR_REFUSED)
def test_a_cache_dir_that_cannot_be_one_is_named(photos, fault):
    make, said = CACHE_DIR_REFUSED[fault]
    make(photos / "cache")
    cache = photos / "file" / "cache" if fault == "in a file" else photos / "cache"
    assert re.search(said, refusal(build, photos, (16, 24), N_PHOTOS, cache))


# ---------------------------------------------------------------------------------------------- the disk


@contextmanager
def file_size_limit(size):
    """Let no file grow beyond `size` bytes, as a full disk would not."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a real disk of 256 KiB; only root can mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fail(error):
    def call(*arguments):
        raise OSError(error, os.strerror(error))

    return call


def write_table(path):
    write_csv(path, pd.DataFrame({"image_id": [f"Train_{i}" for i in range(100_000)]}))


def write_checkpoint(path):
    """As train.py does; torch.save makes a RuntimeError of the disk's error."""
    with atomic_write(path) as file:
        torch.save({"weights": torch.zeros(1_000_000)}, file)


@pytest.mark.parametrize("write", [write_table, write_checkpoint])
def test_when_a_file_finds_no_room_the_older_one_is_still_there(tmp_path, write):
    (tmp_path / "older").write_text("older")
    with file_size_limit(100_000):
        assert refusal(write, tmp_path / "older") == f"error: cannot write {tmp_path / 'older'}: File too large"
    assert names(tmp_path) == ["older"] and (tmp_path / "older").read_text() == "older"


@pytest.mark.parametrize("write", [write_table, write_checkpoint])
def test_when_the_disk_is_full_the_older_file_is_still_there(small_disk, write):
    (small_disk / "older").write_text("older")
    assert refusal(write, small_disk / "older").endswith("older: No space left on device")
    assert names(small_disk) == ["older"] and (small_disk / "older").read_text() == "older"


@pytest.mark.parametrize("moment", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_error_after_the_last_byte_is_an_error_too(tmp_path, monkeypatch, moment, error):
    (tmp_path / "older").write_text("older")
    with monkeypatch.context() as patched:
        patched.setattr(files.os, moment, fail(error))
        assert refusal(write_table, tmp_path / "older").endswith(f"older: {os.strerror(error)}")
    assert names(tmp_path) == ["older"] and (tmp_path / "older").read_text() == "older"


def test_what_is_no_error_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="another"), atomic_write(tmp_path / "file"):
        raise RuntimeError("another")
    assert not names(tmp_path)


@pytest.mark.parametrize("how", ["small disk", "reported as small"])
def test_a_cache_that_has_no_room_is_refused_before_a_photo_is_decoded(photos, how, request, monkeypatch):
    cache = request.getfixturevalue("small_disk") if how == "small disk" else photos / "cache"
    build(photos, (8, 8), cache=cache)
    before = names(cache)
    with monkeypatch.context() as patched:
        patched.setattr(photos_room, "decode_photo", fail(errno.EIO))
        if how == "reported as small":
            patched.setattr(photos_room.shutil, "disk_usage", lambda folder: Namespace(free=6 * 200 * 300 * 3 - 1))
        said = refusal(build, photos, (200, 300), N_PHOTOS, cache)
    assert re.search(r"cannot write .*npy: it needs 0.00\d* GB, 0.00\d* GB are free; name .* with --cache_dir$", said)
    assert names(cache) == before


def test_a_cache_is_built_by_as_many_threads_as_there_are_cores_to_use(photos, monkeypatch):
    """os.cpu_count() tells those of the machine, not of the container or job; photos in work would fill the memory."""
    seen = []
    pool = photos_room.ThreadPoolExecutor
    monkeypatch.setattr(photos_room.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(photos_room, "ThreadPoolExecutor", lambda threads: seen.append(threads) or pool(threads))
    build(photos)
    assert seen == [len(os.sched_getaffinity(0))] if hasattr(os, "sched_getaffinity") else seen[0] < 64


@pytest.mark.parametrize("how", ["full disk", "file size limit"])
def test_a_cache_that_finds_no_room_after_all_leaves_nothing(photos, how, request, monkeypatch):
    cache = request.getfixturevalue("small_disk") if how == "full disk" else photos / "cache"
    build(photos, (8, 8), cache=cache)
    before = names(cache)
    with monkeypatch.context() as patched:
        patched.setattr(photos_room.shutil, "disk_usage", lambda folder: Namespace(free=10**12))
        with file_size_limit(300_000):
            said = refusal(build, photos, (200, 300), N_PHOTOS, cache)
    assert re.search(r"cannot write .*npy: (No space left on device|File too large)$", said)
    assert names(cache) == before
    assert_right(build(photos, (8, 8), cache=cache), photos, (8, 8))


# ---------------------------------------------------------------------------------------------- what train.py wrote itself

OWN_CSV_REFUSED = {  # what happened to folds.csv: its bytes, what is said
    "emptied": (b"", "folds.csv is damaged"),
    "only its header": (b"image_id,fold\n", r"folds.csv is damaged \(it has no rows\)"),
    "binary": (b"\xff\xfe\0\1" * 100, "folds.csv is damaged"),
    "a folder": ("folder", "cannot read .*folds.csv: Is a directory"),
}


@pytest.mark.parametrize("fault", OWN_CSV_REFUSED)
def test_a_damaged_own_csv_is_named(tmp_path, fault):
    content, said = OWN_CSV_REFUSED[fault]
    if content == "folder":
        (tmp_path / "folds.csv").mkdir()
    else:
        (tmp_path / "folds.csv").write_bytes(content)
    assert re.search(said, refusal(read_own_csv, tmp_path / "folds.csv"))


def test_own_csv_files_are_read_as_they_were_written(tmp_path):
    frame = pd.DataFrame({"image_id": ["NA", "007", "nan"], "fold": [0, 1, 2], "val_loss": [0.1 + 0.2, 1 / 3, 1e-310]})
    write_csv(tmp_path / "own.csv", frame)
    pd.testing.assert_frame_equal(read_own_csv(tmp_path / "own.csv"), frame, check_exact=True)
