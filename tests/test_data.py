"""What goes in: CSV files, soft labels joined by id, the image cache, portrait photos, sampling, workers."""

import multiprocessing

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import dataset
from dataset import (
    EpochSampler,
    LeafDataset,
    cache_images,
    load_photo,
    make_loader,
    mix_labels,
    read_probabilities,
    read_test_ids,
    read_train_csv,
    train_augmentation,
)
from utils import CLASSES, InputError, column_aucs, mean_auc, split_folds

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
    return cache_images("train", [f"Train_{i}" for i in ids], folder, size, folder / "cache")


# ---- CSV files


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("", "cannot be read as CSV"),
        (HEADER, "has no rows"),
        (
            "image_id,healthy,rust,scab,multiple_diseases\na,1,0,0,0\n",
            r"its columns are \['image_id', 'healthy', 'rust'",
        ),
        (HEADER + "a,1,0,0,0\nb,1,0,0,1\n", r"row 3 \(b\) is not one 1 and three 0"),
        (HEADER + "a,0.5,0.5,0,0\n", r"row 2 \(a\) is not one 1"),
        (HEADER + "a,1,0,0,0\na,1,0,0,0\n", "row 3 repeats image_id a"),
        (HEADER + "a,1,0,,0\n", "row 2: rust is empty, not a number"),
        (HEADER + "a,1,0,x,0\n", "row 2: rust is x, not a number"),
        (HEADER + "../a,1,0,0,0\n", "is not a plain file name"),
        (HEADER + ",1,0,0,0\n", "row 2 has no image_id"),
        (HEADER + "a,1,0,0,0,\nb,1,0,0,0,\n", "more values than its header"),
        (HEADER + "NA,nan,0,0,1\n", "row 2: healthy is nan, not a number"),
    ],
)
def test_a_bad_train_csv_is_refused_in_one_line(tmp_path, content, complaint):
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(InputError, match=complaint) as error:
        read_train_csv(tmp_path)
    assert "train.csv" in str(error.value) and "\n" not in str(error.value)


def test_all_problems_are_reported_at_once(tmp_path):
    (tmp_path / "train.csv").write_text(HEADER + "a,1,0,0,0\nb,2,0,0,0\na,1,0,0,0\nc,x,0,0,0\n")
    with pytest.raises(InputError, match="row 4 repeats image_id a.*row 5: healthy is x"):
        read_train_csv(tmp_path)


def test_byte_order_mark_and_crlf_are_fine(tmp_path):
    (tmp_path / "train.csv").write_bytes(
        b"\xef\xbb\xbf" + (HEADER + "a,1,0,0,0\n007,0,0,1,0\n").replace("\n", "\r\n").encode()
    )
    assert read_train_csv(tmp_path)["image_id"].tolist() == ["a", "007"]


def test_a_missing_csv_is_named(tmp_path):
    with pytest.raises(InputError, match=r"train\.csv does not exist"):
        read_train_csv(tmp_path)


def test_soft_labels_are_joined_by_image_id_not_by_row(tmp_path):
    """The original looked them up by row number inside the fold: 11 of 7,284 training rows got their own."""
    path = tmp_path / "soft_labels.csv"
    path.write_text(HEADER + "b,0.1,0.2,0.3,0.4\na,0.7,0.1,0.1,0.1\n")
    soft = read_probabilities(path, ["a", "b"])
    assert soft["image_id"].tolist() == ["a", "b"]
    mixed = mix_labels(np.eye(4)[[0, 3]], soft[list(CLASSES)].to_numpy())
    np.testing.assert_allclose(mixed, [[0.91, 0.03, 0.03, 0.03], [0.03, 0.06, 0.09, 0.82]], atol=1e-7)
    assert mixed.dtype == np.float32


@pytest.mark.parametrize(
    "rows, complaint",
    [
        ("a,1,0,0,0\n", "has no row for b"),
        ("a,1,0,0,0\nb,1,0,0,0\nc,1,0,0,0\n", "has a row for c, which is not wanted"),
        ("a,1,0,0,0\nb,1,0,0,0\nb,1,0,0,0\n", "repeats image_id b"),
        ("a,1,0,0,0\nb,0.5,0.2,0.2,0.2\n", r"row 3 \(b\) is no probability distribution"),
        ("a,1,0,0,0\nb,1.2,-0.2,0,0\n", r"row 3 \(b\) is no probability distribution"),
        ("a,1,0,0,0\nb,,0,0,1\n", "row 3: healthy is empty"),
    ],
)
def test_soft_labels_that_do_not_fit_are_refused(tmp_path, rows, complaint):
    (tmp_path / "soft.csv").write_text(HEADER + rows)
    with pytest.raises(InputError, match=complaint):
        read_probabilities(tmp_path / "soft.csv", ["a", "b"])


def test_test_photos_come_in_the_row_order_of_sample_submission(tmp_path):
    (tmp_path / "sample_submission.csv").write_text(HEADER + "b,.25,.25,.25,.25\na,.25,.25,.25,.25\n")
    (tmp_path / "test.csv").write_text("image_id\na\nb\n")
    assert read_test_ids(tmp_path).tolist() == ["b", "a"]
    (tmp_path / "test.csv").write_text("image_id\na\nc\n")
    with pytest.raises(InputError, match="test.csv: has no row for b; has a row for c"):
        read_test_ids(tmp_path)


# ---- photos


def test_the_cache_holds_the_pixels_of_a_fresh_decode(photos):
    images = build(photos)
    for i in range(6):
        np.testing.assert_array_equal(images[i], load_photo(photos / "images" / f"Train_{i}.jpg", (16, 24)))


def test_the_cache_is_built_once_and_anew_when_photo_list_or_size_changes(photos, monkeypatch):
    build(photos)
    decoded = []
    real = dataset.load_photo
    monkeypatch.setattr(dataset, "load_photo", lambda path, size: decoded.append(path.stem) or real(path, size))
    build(photos)
    assert not decoded
    cv2.imwrite(str(photos / "images" / "Train_3.jpg"), np.zeros((30, 40, 3), np.uint8))
    assert build(photos)[3].max() == 0 and len(decoded) == 6
    assert len(build(photos, range(5))) == 5 and len(decoded) == 11
    assert build(photos, range(5), (8, 8))[0].shape == (8, 8, 3) and len(decoded) == 16
    assert len(list((photos / "cache").glob("*.npy"))) == 2  # one a size: what was built before is replaced


def test_an_interrupted_build_leaves_nothing(photos, monkeypatch):
    real = dataset.load_photo

    def dies(path, size):
        if path.stem == "Train_4":
            raise KeyboardInterrupt
        return real(path, size)

    monkeypatch.setattr(dataset, "load_photo", dies)
    with pytest.raises(KeyboardInterrupt):
        build(photos)
    assert not [path.name for path in (photos / "cache").iterdir() if "lock" not in path.name]
    monkeypatch.setattr(dataset, "load_photo", real)
    assert len(build(photos)) == 6


def test_missing_and_unreadable_photos_are_named(photos):
    with pytest.raises(InputError, match="Train_6.jpg is missing; Train_7.jpg is missing"):
        build(photos, range(8))
    (photos / "images" / "Train_2.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match="Train_2.jpg cannot be decoded"):
        build(photos)


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
    with pytest.raises(InputError, match="one class only|of one class"):
        mean_auc(labels[:2], scores[:2])
