"""What goes in: CSV files, soft labels joined by id, the image cache, portrait photos, sampling, workers."""

import csv
import io
import multiprocessing

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dataset import EpochSampler, LeafDataset, fit_photo, load_photo, make_loader, mix_labels, train_augmentation
from harness import photos as photos_room
from harness.console import InputError
from harness.files import write_csv
from harness.photos import cache_images
from harness.tables import read_probabilities, read_test_ids, read_train_csv
from utils import CLASSES, column_aucs, mean_auc, split_folds

HEADER = "image_id,healthy,multiple_diseases,rust,scab\n"


@pytest.fixture
def photos(tmp_path):
    """A data directory with six small photos."""
    (tmp_path / "images").mkdir()
    for i in range(6):
        photo = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"Train_{i}.jpg"), photo)
    return tmp_path


def build(folder, ids=range(6), size=(16, 24)):
    ids = [f"Train_{i}" for i in ids]
    return cache_images("train", ids, ids, folder, size, folder / "cache", fit_photo)


# ---- CSV files: what satisfies the contract is read, what does not is refused. By name in test_faults.py, here at random

random_tables = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENDS = "A-Za-z0-9_()éß叶"
ids = st.from_regex(rf"[{ENDS}](?:[{ENDS} ,;'\"%.-]{{0,8}}[{ENDS}])?", fullmatch=True)
ids = ids | st.sampled_from(["NA", "nan", "None", "null", "True", "007", "1e5", "image_id"])
tables = st.lists(st.tuples(ids, st.integers(0, 3)), min_size=1, max_size=9, unique_by=lambda row: row[0])


def encode(rows, line_end="\n", mark=b"", quoting=csv.QUOTE_MINIMAL, blank_after=()):
    """Rows of texts, the header first, as the bytes of a CSV file, with blank lines after some of them."""
    lines = []
    for number, row in enumerate(rows):
        text = io.StringIO()
        csv.writer(text, lineterminator=line_end, quoting=quoting).writerow(row)
        lines += [text.getvalue(), line_end if number in blank_after else ""]
    return mark + "".join(lines).encode()


def spell(table, spellings=(("0", "1"),)):
    """A table of ids and classes as rows of texts under a header; each number in one of `spellings`."""
    rows = [
        [image_id, *(spellings[(row + column) % len(spellings)][column == label] for column in range(4))]
        for row, (image_id, label) in enumerate(table)
    ]
    return [HEADER.strip().split(","), *rows]


@random_tables
@given(
    table=tables,
    spellings=st.permutations([("0", "1"), ("0.0", "1.0"), ("-0", " 1"), ("0e9", "+1."), (".0", "10e-1")]),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    blank_after=st.sets(st.integers(0, 9)),
)
def test_a_table_that_satisfies_the_contract_is_read_however_it_is_written(
    tmp_path, table, spellings, line_end, mark, quoting, blank_after
):
    (tmp_path / "train.csv").write_bytes(encode(spell(table, spellings), line_end, mark, quoting, blank_after))
    frame = read_train_csv(tmp_path, CLASSES)
    assert frame.columns.tolist() == ["image_id", *CLASSES]
    assert frame["image_id"].tolist() == [image_id for image_id, _ in table]
    np.testing.assert_array_equal(frame[list(CLASSES)].to_numpy(), np.eye(4)[[label for _, label in table]])


@random_tables
@given(table=tables, order=st.randoms(), weights=st.lists(st.floats(0, 1), min_size=36, max_size=36))
def test_what_write_csv_writes_is_read_to_the_bit_in_any_order(tmp_path, table, order, weights):
    values = np.array(weights).reshape(9, 4)[: len(table)] + [0, 0, 0, 1e-9]
    values /= values.sum(1, keepdims=True)
    written = pd.DataFrame(values, columns=CLASSES)
    written.insert(0, "image_id", [image_id for image_id, _ in table])
    rows = list(range(len(table)))
    order.shuffle(rows)
    write_csv(tmp_path / "soft.csv", written.iloc[rows])
    read = read_probabilities(tmp_path / "soft.csv", CLASSES, written["image_id"])
    assert read["image_id"].tolist() == written["image_id"].tolist()
    assert read[list(CLASSES)].to_numpy().tobytes() == values.tobytes()


def put(column, text):
    """A corruption: `text` in one cell of a row."""

    def corrupt(rows, row):
        rows[row][column] = text

    return corrupt


CORRUPTIONS = {  # of one row: what is done to it, and what is said of it
    "id missing": (put(0, ""), "has no image_id"),
    "id with a slash": (put(0, "a/b"), "not a plain file name"),
    "id with a backslash": (put(0, "a\\b"), "not a plain file name"),
    "id of the parent": (put(0, ".."), "not a plain file name"),
    "hidden id": (put(0, ".a"), "not a plain file name"),
    "id on a drive": (put(0, "C:a"), "not a plain file name"),
    "id with NUL": (put(0, "a\0b"), "not a plain file name"),
    "id on two lines": (put(0, "a\nb"), "not a plain file name"),
    "id with an escape sequence": (put(0, "a\x1b[2Jb"), "not a plain file name"),
    "id with a character that cannot be seen": (put(0, "a\u200bb"), "not a plain file name"),
    "id that a spreadsheet takes for a formula": (put(0, "=1+1"), "not a plain file name"),
    "id that begins with a minus": (put(0, "-1"), "not a plain file name"),
    "blank before an id": (put(0, " a"), "not a plain file name"),
    "blank after an id": (put(0, "a "), "not a plain file name"),
    "label missing": (put(1, ""), "has no value for healthy"),
    "label no number": (put(2, "yes"), "has multiple_diseases 'yes', not a number"),
    "label with an underscore": (put(2, "0_0"), "not a number"),
    "label in other digits": (put(2, "٠"), "not a number"),
    "label nan": (put(3, "nan"), "has rust 'nan', not a number"),
    "label infinite": (put(4, "-inf"), "has scab '-inf', not a number"),
    "label too large": (put(1, "2"), "is not one 1 and three 0"),
    "label between": (put(1, "0.5"), "is not one 1 and three 0"),
    "no label at all": (lambda rows, row: rows[row].__setitem__(slice(1, 5), "0000"), "is not one 1 and three 0"),
    "two labels": (lambda rows, row: rows[row].__setitem__(slice(1, 5), "0110"), "is not one 1 and three 0"),
    "value too many": (lambda rows, row: rows[row].append("0"), "has 6 values, its header 5 names"),
    "value too few": (lambda rows, row: rows[row].pop(), "has 4 values, its header 5 names"),
    "row twice": (lambda rows, row: rows.insert(row, list(rows[row])), "repeats image_id"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@settings(random_tables, max_examples=15)
@given(table=tables, row=st.integers(0, 8), blank_after=st.booleans())
def test_a_corrupted_row_is_refused_in_one_line_with_its_place(tmp_path, corruption, table, row, blank_after):
    corrupt, complaint = CORRUPTIONS[corruption]
    rows, row = spell(table), row % len(table) + 1
    corrupt(rows, row)
    (tmp_path / "train.csv").write_bytes(encode(rows, blank_after=[0] if blank_after else []))
    with pytest.raises(InputError) as error:
        read_train_csv(tmp_path, CLASSES)
    line = row + 1 + blank_after + (corruption == "row twice")
    said = str(error.value)
    assert said.startswith(f"error: {tmp_path / 'train.csv'}: line {line} ") and complaint in said
    assert said.isprintable() and "; line" not in said


@random_tables
@given(table=tables, name=st.sampled_from(HEADER.strip().split(",")), change=st.sampled_from(["drop", "add", "rename"]))
def test_corrupted_columns_are_refused_with_their_names(tmp_path, table, name, change):
    rows = spell(table)
    place = rows[0].index(name)
    for row in rows:
        if change == "rename":
            row[place] = "Scab " if row is rows[0] else row[place]
        elif change == "add":
            row.insert(place, row[place])
        else:
            del row[place]
    (tmp_path / "train.csv").write_bytes(encode(rows))
    with pytest.raises(InputError) as error:
        read_train_csv(tmp_path, CLASSES)
    lacks, added = f"lacks the column {name}", "has a column '{}' that does not belong there"
    said = {"drop": lacks, "add": added.format(name), "rename": f"{lacks}; {added.format('Scab ')}"}[change]
    assert str(error.value) == f"error: {tmp_path / 'train.csv'}: {said}"


def test_soft_labels_are_joined_by_image_id_not_by_row(tmp_path):
    """The original looked them up by row number inside the fold: 11 of 7,284 training rows got their own."""
    path = tmp_path / "soft_labels.csv"
    path.write_text(HEADER + "b,0.1,0.2,0.3,0.4\na,0.7,0.1,0.1,0.1\n")
    soft = read_probabilities(path, CLASSES, ["a", "b"])
    assert soft["image_id"].tolist() == ["a", "b"]
    mixed = mix_labels(np.eye(4)[[0, 3]], soft[list(CLASSES)].to_numpy(), 0.3)
    np.testing.assert_allclose(mixed, [[0.91, 0.03, 0.03, 0.03], [0.03, 0.06, 0.09, 0.82]], atol=1e-7)
    assert mixed.dtype == np.float32


def test_test_photos_come_in_the_row_order_of_sample_submission(tmp_path):
    (tmp_path / "sample_submission.csv").write_text(HEADER + "b,.25,.25,.25,.25\na,.25,.25,.25,.25\n")
    (tmp_path / "test.csv").write_text("image_id\na\nb\n")
    assert read_test_ids(tmp_path, CLASSES).tolist() == ["b", "a"]


# ---- photos


def test_the_cache_holds_the_pixels_of_a_fresh_decode(photos):
    images = build(photos)
    for i in range(6):
        np.testing.assert_array_equal(images[i], load_photo(photos / "images" / f"Train_{i}.jpg", (16, 24)))


def test_the_cache_is_built_once_and_anew_when_photo_list_or_size_changes(photos, monkeypatch):
    build(photos)
    decoded = []
    real = photos_room.decode_photo
    monkeypatch.setattr(photos_room, "decode_photo", lambda path: decoded.append(path.stem) or real(path))
    build(photos)
    assert not decoded
    cv2.imwrite(str(photos / "images" / "Train_3.jpg"), np.zeros((30, 40, 3), np.uint8))
    assert build(photos)[3].max() == 0 and len(decoded) == 6
    assert len(build(photos, range(5))) == 5 and len(decoded) == 11
    assert build(photos, range(5), (8, 8))[0].shape == (8, 8, 3) and len(decoded) == 16
    assert len(list((photos / "cache").glob("*.npy"))) == 2  # one a size: what was built before is replaced


def test_portrait_photos_are_transposed_and_others_only_resized(tmp_path):
    """Rows and columns exchanged, as the original did; but only portrait ones, it did so to all of unusual size."""
    corner = np.full((200, 300, 3), 60, np.uint8)
    corner[:100, 200:] = (0, 0, 255)  # BGR: red in the right upper corner
    cv2.imwrite(str(tmp_path / "landscape.png"), corner)
    cv2.imwrite(str(tmp_path / "portrait.png"), cv2.transpose(corner))
    landscape = load_photo(tmp_path / "landscape.png", (32, 48))
    np.testing.assert_array_equal(landscape, load_photo(tmp_path / "portrait.png", (32, 48)))
    assert landscape.shape == (32, 48, 3) and landscape[2, 45].tolist() == [255, 0, 0]
    assert landscape[2, 2].tolist() == [60, 60, 60]


# ---- sampling and workers


def test_an_epoch_is_a_permutation_in_whole_batches_that_depends_on_seed_fold_and_epoch():
    rows = np.arange(100, 137)

    def epoch(number, seed=1, fold=0):
        sampler = EpochSampler(rows, 8, seed, fold)
        sampler.set_epoch(number)
        assert len(sampler) == 32
        return list(sampler)

    keys = epoch(3)
    assert len(keys) == 32 and {(fold, draw) for fold, draw, _ in keys} == {(0, 3)}
    assert len({row for _, _, row in keys}) == 32 and {row for _, _, row in keys} <= set(rows)
    assert keys == epoch(3)
    order = [row for _, _, row in keys]
    for other in (epoch(4), epoch(3, seed=2), epoch(3, fold=1)):
        assert [row for _, _, row in other] != order


def test_two_processes_share_each_global_batch():
    whole = list(EpochSampler(np.arange(40), 8, 1, 0))
    halves = [list(EpochSampler(np.arange(40), 8, 1, 0, rank, 2)) for rank in (0, 1)]
    assert len(whole) == 40 and [len(half) for half in halves] == [20, 20]
    for start in range(0, 40, 8):
        half = start // 2
        assert halves[0][half : half + 4] + halves[1][half : half + 4] == whole[start : start + 8]


@pytest.mark.parametrize("workers, context", [(1, "fork"), (2, "fork"), (2, "spawn")])
def test_batches_do_not_depend_on_the_workers_forked_or_spawned(photos, workers, context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {context}")
    images = build(photos)
    data = LeafDataset(images, [f"Train_{i}" for i in range(6)], np.eye(4)[[0, 1, 2, 3, 0, 1]], train_augmentation(), 1)
    keys = [(3, draw, row) for draw in range(2) for row in range(6)]
    expected = list(make_loader(data, keys, 4, 0))
    found = list(DataLoader(data, 4, sampler=keys, num_workers=workers, multiprocessing_context=context))
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert expected[0]["image"].dtype == torch.uint8 and expected[0]["image"].shape == (4, 16, 24, 3)
    views = torch.cat([batch["image"] for batch in expected])
    assert not torch.equal(views[:6], views[6:])  # two epochs differ


# ---- folds and metric


def test_fewer_rows_than_folds_is_an_error():
    with pytest.raises(InputError, match="4 rows"):
        split_folds(4, 2020)


def test_auc_is_the_mean_over_the_classes_for_which_it_is_defined():
    labels = np.eye(4)[[0, 0, 2, 2, 3]]
    scores = np.array([[0.9, 0, 0.1, 0], [0.2, 0, 0.8, 0], [0.1, 0, 0.6, 0.3], [0.3, 0, 0.5, 0.2], [0, 0, 0, 1.0]])
    aucs = column_aucs(labels, scores)
    assert np.isnan(aucs[1])
    np.testing.assert_allclose(aucs[[0, 2, 3]], [5 / 6, 4 / 6, 1])
    assert mean_auc(labels, scores) == pytest.approx((5 / 6 + 4 / 6 + 1) / 3)
    with pytest.raises(InputError, match="undefined: all photos are of one class$"):
        mean_auc(labels[:2], scores[:2])
