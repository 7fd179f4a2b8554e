"""The five steps as a user types them, in real processes, with the full-size network on small photos."""

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import REPO, SMALL, run_script

from dataset import LeafDataset, load_photo, train_augmentation
from models import load_network, normalise
from utils import CLASSES, column_aucs, mean_auc, split_folds

OUTPUTS = ("soft_labels.csv", "submission.csv", "submission_distill.csv", "submission_mix.csv")


def five_steps(folder, sample, *options):
    """Run the pipeline in `folder`; returns what each script printed."""
    distill = ["--soft_labels_filename", "soft_labels.csv", "--log_dir", "logs_submit_distill"]
    return [
        run_script("train.py", "--data_dir", sample, *SMALL, *options, cwd=folder).stdout,
        run_script("generate_soft_labels.py", *options, cwd=folder).stdout,
        run_script("train.py", "--data_dir", sample, *SMALL, *distill, *options, cwd=folder).stdout,
        run_script("generate_distilled_submission.py", *options, cwd=folder).stdout,
        run_script("blend.py", cwd=folder).stdout,
    ]


@pytest.fixture(scope="module")
def done(sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, five_steps(folder, sample)


def read(path):
    return pd.read_csv(path)[list(CLASSES)].to_numpy()


def test_every_step_writes_what_the_readme_promises(done, sample):
    folder, _ = done
    for log_dir in ("logs", "logs_submit_distill"):
        results = pd.read_csv(folder / log_dir / "results.csv")
        assert results["fold"].tolist() == [0, 1, 2, 3, 4]
        for _, row in results.iterrows():
            name = row["checkpoint"]
            assert (
                name
                == f"fold={row['fold']}-epoch=0-val_loss={row['val_loss']:.4f}-val_roc_auc={row['val_roc_auc']:.4f}.ckpt"
            )
            checkpoint = torch.load(folder / log_dir / name, weights_only=True)
            assert "optimizer_states" not in checkpoint
            metrics = pd.read_csv(folder / log_dir / "metrics" / f"fold={row['fold']}.csv")
            assert metrics.loc[0, ["lr", "val_loss", "val_roc_auc"]].tolist() == [
                1e-3,
                row["val_loss"],
                row["val_roc_auc"],
            ]
            assert list((folder / log_dir / "metrics" / f"fold={row['fold']}").glob("events.*"))
        folds = pd.read_csv(folder / log_dir / "folds.csv")
        assert folds["fold"].tolist() == split_folds(40, 2020).tolist()
        record = yaml.safe_load((folder / log_dir / "hparams.yaml").read_text())
        assert record["options"]["image_size"] == [32, 64] and len(record["fingerprints"]["train.csv"]) == 64
    assert record["options"]["soft_labels_filename"] == "soft_labels.csv" and "soft labels" in record["fingerprints"]

    order = pd.read_csv(sample / "sample_submission.csv")["image_id"].tolist()
    for name in OUTPUTS:
        frame = pd.read_csv(folder / name)
        assert list(frame.columns) == ["image_id", *CLASSES]
        expected = pd.read_csv(sample / "train.csv")["image_id"].tolist() if name == "soft_labels.csv" else order
        assert frame["image_id"].tolist() == expected
        values = read(folder / name)
        assert ((values > 0) & (values < 1)).all()
        np.testing.assert_allclose(values.sum(1), 1, atol=1e-5)
    leftovers = [
        path.name for path in folder.rglob("*") if path.name.startswith(".") and not path.name.endswith(".lock")
    ]
    assert not leftovers


def test_soft_labels_come_from_the_network_that_has_not_seen_the_photo(done, sample):
    folder, printed = done
    results = pd.read_csv(folder / "logs" / "results.csv")
    soft = pd.read_csv(folder / "soft_labels.csv")
    folds = split_folds(40, 2020)
    for row in (0, 7, 39):
        checkpoint = results.set_index("fold").loc[folds[row], "checkpoint"]
        photo = load_photo(sample / "images" / f"{soft['image_id'][row]}.jpg", (32, 64))
        with torch.no_grad():
            network = load_network(folder / "logs" / checkpoint, "se_resnext50_32x4d")
            expected = network(normalise(torch.from_numpy(photo)[None])).softmax(1)[0].numpy()
        np.testing.assert_allclose(soft.loc[row, list(CLASSES)].to_numpy(float), expected, atol=2e-5)
        assert checkpoint in printed[1]  # it says which it used


def test_the_validation_auc_is_that_of_the_soft_labels(done, sample):
    folder, printed = done
    labels, soft, folds = read(sample / "train.csv"), read(folder / "soft_labels.csv"), split_folds(40, 2020)
    results = pd.read_csv(folder / "logs" / "results.csv").set_index("fold")
    for fold in range(5):
        rows = folds == fold
        assert mean_auc(labels[rows], soft[rows]) == pytest.approx(results.loc[fold, "val_roc_auc"], abs=0.02)
        loss = -np.log(soft[rows][labels[rows] == 1]).mean()
        assert loss == pytest.approx(results.loc[fold, "val_loss"], abs=1e-3)
    assert f"{np.nanmean(column_aucs(labels, soft)):.5f}" in printed[1]


def test_a_submission_is_the_mean_of_five_networks_times_eight_augmented_views(done, sample):
    folder, _ = done
    test_ids = pd.read_csv(sample / "test.csv")["image_id"]
    image_id = pd.read_csv(folder / "submission.csv")["image_id"][3]
    photo = load_photo(sample / "images" / f"{image_id}.jpg", (32, 64))
    total = []
    for fold, checkpoint in enumerate(pd.read_csv(folder / "logs" / "results.csv")["checkpoint"]):
        data = LeafDataset([photo], [image_id], augmentation=train_augmentation(), seed=2020, fold=fold)
        views = torch.stack([data[draw, 0]["image"] for draw in range(8)])
        assert len({view.numpy().tobytes() for view in views}) == 8
        with torch.no_grad():
            network = load_network(folder / "logs" / checkpoint, "se_resnext50_32x4d")
            total.append(network(normalise(views)).softmax(1).mean(0).numpy())
    assert len(test_ids) == 12
    np.testing.assert_allclose(read(folder / "submission.csv")[3], np.mean(total, axis=0), atol=2e-5)


def test_the_blend_is_the_mean_of_both_submissions(done):
    folder, _ = done
    expected = (read(folder / "submission.csv") + read(folder / "submission_distill.csv")) / 2
    np.testing.assert_allclose(read(folder / "submission_mix.csv"), expected, atol=1e-15)


def test_the_same_commands_give_the_same_bytes_whatever_the_workers(done, sample, tmp_path):
    folder, _ = done
    five_steps(tmp_path, sample, "--num_workers", 2)
    for name in (*OUTPUTS, "logs/results.csv", "logs/folds.csv", "logs_submit_distill/results.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_rerun_skips_finished_folds_and_refuses_other_options(done, sample):
    folder, _ = done
    before = (folder / "logs" / "results.csv").stat().st_mtime_ns
    again = run_script("train.py", "--data_dir", sample, *SMALL, "--folds", 1, 3, cwd=folder).stdout
    assert "fold 1 is finished already" in again and "fold 0" not in again
    refused = run_script("train.py", "--data_dir", sample, *SMALL, "--seed", 1, cwd=folder, check=False)
    assert refused.returncode == 1 and "seed was 2020, is 1" in refused.stderr and "--fresh" in refused.stderr
    assert (folder / "logs" / "results.csv").stat().st_mtime_ns == before


def test_prediction_refuses_what_contradicts_the_training(done, sample, tmp_path):
    folder, _ = done
    for option, hint in [
        (["--image_size", 64, 64], "was trained with [32, 64]"),
        (["--backbone", "resnet18"], "was trained with se_resnext50_32x4d"),
        (["--log_dir", "elsewhere"], "train first"),
    ]:
        refused = run_script("generate_soft_labels.py", *option, cwd=folder, check=False)
        assert refused.returncode == 1 and hint in refused.stderr
        assert "Traceback" not in refused.stderr
    other = tmp_path / "other"
    run_script("tools.generate_sample_data", "--out", other, "--n_train", 41, "--photo_size", 96, 144, cwd=tmp_path)
    refused = run_script("generate_soft_labels.py", "--data_dir", other, cwd=folder, check=False)
    assert refused.returncode == 1 and "about other photos" in refused.stderr


def test_a_missing_fold_is_named(done, tmp_path):
    folder, _ = done
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "hparams.yaml").write_bytes((folder / "logs" / "hparams.yaml").read_bytes())
    results = pd.read_csv(folder / "logs" / "results.csv")
    results[results["fold"] != 3].to_csv(tmp_path / "logs" / "results.csv", index=False)
    refused = run_script("generate_distilled_submission.py", "--log_dir", "logs", cwd=tmp_path, check=False)
    assert refused.returncode == 1 and "no result of fold 3" in refused.stderr
    assert not (tmp_path / "submission_distill.csv").exists()


def test_blend_refuses_submissions_that_do_not_match(done, tmp_path):
    folder, _ = done
    first = pd.read_csv(folder / "submission.csv")
    first.to_csv(tmp_path / "submission.csv", index=False)
    first.iloc[1:].to_csv(tmp_path / "submission_distill.csv", index=False)
    refused = run_script("blend.py", cwd=tmp_path, check=False)
    assert refused.returncode == 1 and f"has no row for {first['image_id'][0]}" in refused.stderr
    assert not (tmp_path / "submission_mix.csv").exists()


def test_two_processes_train_as_gpus_0_1_would(sample, tmp_path):
    """DDP over gloo: both folds in one command, and the same validation rows, each once."""
    options = ["--folds", 0, 1, "--cpu_processes", 2]
    run_script("train.py", "--data_dir", sample, *SMALL, *options, cwd=tmp_path)
    results = pd.read_csv(tmp_path / "logs" / "results.csv")
    assert results["fold"].tolist() == [0, 1]
    folds, labels = split_folds(40, 2020), read(sample / "train.csv")
    ids = pd.read_csv(sample / "train.csv")["image_id"]
    for _, row in results.iterrows():
        rows = np.flatnonzero(folds == row["fold"])
        photos = np.stack([load_photo(sample / "images" / f"{ids[i]}.jpg", (32, 64)) for i in rows])
        with torch.no_grad():
            network = load_network(tmp_path / "logs" / row["checkpoint"], "se_resnext50_32x4d")
            softmax = network(normalise(torch.from_numpy(photos))).softmax(1).numpy()
        assert -np.log(softmax[labels[rows] == 1]).mean() == pytest.approx(row["val_loss"], abs=1e-4)


def test_accumulation_takes_the_same_photos_a_step(sample, tmp_path):
    options = ["--folds", 2, "--accumulate_grad_batches", 2]
    run_script("train.py", "--data_dir", sample, *SMALL, *options, cwd=tmp_path)
    checkpoint = next((tmp_path / "logs").glob("fold=2-*.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 32 // 8
    refused = run_script(
        "train.py", "--data_dir", sample, *SMALL, "--accumulate_grad_batches", 3, cwd=tmp_path, check=False
    )
    assert refused.returncode == 1 and "cannot be split into 3 equal parts" in refused.stderr


def test_the_repository_stays_clean():
    ignored = (REPO / ".gitignore").read_text()
    assert "/data/*" in ignored and "/logs/*" in ignored
