"""What goes in: the order of an epoch, workers, folds, the metric; and files that are whole or not there."""

import errno
import multiprocessing
import os
from argparse import Namespace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import file_size_limit, refusal
from torch.utils.data import DataLoader

from dataset import EpochSampler, LeafDataset, make_loader, read_train, train_augmentation
from harness.console import InputError
from harness.files import atomic_write, check_writable, write_csv
from utils import CLASSES, column_aucs, mean_auc, split_folds

# ---- sampling and workers


def test_an_epoch_is_a_permutation_in_whole_batches_that_depends_on_seed_fold_and_epoch():
    rows = np.arange(100, 137)

    def order(epoch, seed=1, fold=0):
        sampler = EpochSampler(rows, 8, seed, fold)
        sampler.set_epoch(epoch)
        folds, epochs, drawn = zip(*sampler, strict=True)
        assert len(sampler) == len(drawn) == len(set(drawn)) == 32 and set(drawn) <= set(rows)
        assert set(folds) == {fold} and set(epochs) == {epoch}
        return drawn

    assert order(3) == order(3)
    assert order(3) not in (order(4), order(3, seed=2), order(3, fold=1))


def test_two_processes_share_each_global_batch():
    whole = list(EpochSampler(np.arange(40), 8, 1, 0))
    halves = [list(EpochSampler(np.arange(40), 8, 1, 0, rank, 2)) for rank in (0, 1)]
    assert len(whole) == 40 and [len(half) for half in halves] == [20, 20]
    for batch in range(5):
        shares = [half[4 * batch : 4 * batch + 4] for half in halves]
        assert shares[0] + shares[1] == whole[8 * batch : 8 * batch + 8]


@pytest.mark.parametrize("workers, context", [(1, "fork"), (2, "fork"), (2, "spawn")])
def test_batches_do_not_depend_on_the_workers_forked_or_spawned(workers, context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {context}")
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), dtype=np.uint8)
    data = LeafDataset(images, [f"Train_{i}" for i in range(6)], np.eye(4)[[0, 1, 2, 3, 0, 1]], train_augmentation(), 1)
    keys = [(3, draw, row) for draw in range(2) for row in range(6)]
    expected = list(make_loader(data, keys, 4, 0))
    found = list(DataLoader(data, 4, sampler=keys, num_workers=workers, multiprocessing_context=context))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert expected[0]["image"].dtype == torch.uint8 and expected[0]["image"].shape == (4, 16, 24, 3)
    views = torch.cat([batch["image"] for batch in expected])
    assert not torch.equal(views[:6], views[6:])  # two epochs differ


# ---- folds, a part of the photos, and metric


def test_a_limit_takes_a_photo_of_each_class_and_the_same_share_of_all(tmp_path):
    labels = np.repeat(np.eye(4, dtype=int), [200, 3, 100, 60], axis=0)
    table = pd.DataFrame(labels, columns=CLASSES).assign(image_id=[f"Train_{i}" for i in range(363)])
    write_csv(tmp_path / "train.csv", table[["image_id", *CLASSES]])
    chosen = read_train(Namespace(data_dir=tmp_path, limit=36))
    assert chosen[list(CLASSES)].sum().tolist() == [19, 1, 10, 6]


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


# ---- files that are whole or not there


def write_table(path):
    write_csv(path, pd.DataFrame({"image_id": [f"Train_{i}" for i in range(100_000)]}))


def write_checkpoint(path):
    """As train.py does; torch.save makes a RuntimeError of the disk's error."""
    with atomic_write(path) as file:
        torch.save({"weights": torch.zeros(1_000_000)}, file)


@pytest.mark.parametrize("write", [write_table, write_checkpoint])
def test_when_a_file_finds_no_room_the_older_one_is_still_there(write, tmp_path, small_disk):
    (tmp_path / "older").write_text("older")
    with file_size_limit(100_000):
        assert refusal(write, tmp_path / "older") == f"error: cannot write {tmp_path / 'older'}: File too large"
    (small_disk / "older").write_text("older")
    assert refusal(write, small_disk / "older").endswith("older: No space left on device")
    for moment in ("fsync", "replace"):  # after the last byte
        for number in (errno.ENOSPC, errno.EIO):
            with patch.object(os, moment, side_effect=OSError(number, os.strerror(number))):
                assert refusal(write, tmp_path / "older").endswith(f"older: {os.strerror(number)}")
    for folder in (tmp_path, small_disk):
        assert (folder / "older").read_text() == "older"
    assert os.listdir(small_disk) == ["older"] and sorted(os.listdir(tmp_path)) == ["disk", "older"]


def test_what_cannot_be_written_is_told_before_and_what_is_no_error_of_the_disk_stays_what_it_is(tmp_path):
    (tmp_path / "older").write_text("older")
    check_writable(tmp_path / "older", tmp_path / "new" / "file.csv")
    assert (tmp_path / "older").read_text() == "older" and not os.listdir(tmp_path / "new")
    assert "it is a folder" in refusal(check_writable, tmp_path)
    assert "it is no ordinary file" in refusal(check_writable, "/dev/null")
    assert "File exists" in refusal(check_writable, tmp_path / "older" / "file.csv")
    with pytest.raises(RuntimeError, match="another"), atomic_write(tmp_path / "file"):
        raise RuntimeError("another")
    assert sorted(os.listdir(tmp_path)) == ["new", "older"]
