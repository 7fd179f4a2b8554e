"""The five steps as a user types them, in real processes, with the full-size network on small photos."""

import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import QUICK, REPO, SMALL, run_script, shared_folder
from filelock import FileLock

from dataset import LeafDataset, load_photo, train_augmentation
from harness.record import record_path
from models import load_network
from tools import demo
from utils import CLASSES, column_aucs, mean_auc, split_folds

OUTPUTS = ("soft_labels.csv", "submission.csv", "submission_distill.csv", "submission_mix.csv")


def five_steps(folder, sample):
    """Run the pipeline in `folder`; returns what each script printed."""
    distill = ["--soft_labels_filename", "soft_labels.csv", "--log_dir", "logs_submit_distill"]
    return [
        run_script("train.py", "--data_dir", sample, *SMALL, cwd=folder).stdout,
        run_script("generate_soft_labels.py", cwd=folder).stdout,
        run_script("train.py", "--data_dir", sample, *SMALL, *distill, cwd=folder).stdout,
        run_script("generate_distilled_submission.py", cwd=folder).stdout,
        run_script("blend.py", cwd=folder).stdout,
    ]


@pytest.fixture(scope="session")
def done(sample, tmp_path_factory):
    """A folder in which the five steps were run, and what each of them printed."""

    def fill(folder):
        for step, said in enumerate(five_steps(folder, sample), 1):
            (folder / f"step {step}.txt").write_text(said)

    folder = shared_folder(tmp_path_factory, "pipeline", fill)
    return folder, [(folder / f"step {step}.txt").read_text() for step in range(1, 6)]


def read(path):
    return pd.read_csv(path)[list(CLASSES)].to_numpy()


@pytest.mark.long
def test_every_step_writes_what_the_readme_promises(done, sample):
    folder, _ = done
    for log_dir in ("logs", "logs_submit_distill"):
        results = pd.read_csv(folder / log_dir / "results.csv")
        assert results["fold"].tolist() == [0, 1, 2, 3, 4]
        for _, row in results.iterrows():
            loss, auc = row[["val_loss", "val_roc_auc"]]
            assert row["checkpoint"] == f"fold={row['fold']}-epoch=0-val_loss={loss:.4f}-val_roc_auc={auc:.4f}.ckpt"
            checkpoint = torch.load(folder / log_dir / row["checkpoint"], weights_only=True)
            assert "optimizer_states" not in checkpoint
            metrics = pd.read_csv(folder / log_dir / "metrics" / f"fold={row['fold']}.csv")
            assert metrics.loc[0, ["lr", "val_loss", "val_roc_auc"]].tolist() == [1e-3, loss, auc]
            assert list((folder / log_dir / "metrics" / f"fold={row['fold']}").glob("events.*"))
        folds = pd.read_csv(folder / log_dir / "folds.csv")
        assert folds["fold"].tolist() == split_folds(41, 2020).tolist()
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
    assert not [path.name for path in folder.rglob(".*") if not path.name.endswith(".lock")]


def test_soft_labels_come_from_the_network_that_has_not_seen_the_photo(done, sample):
    folder, printed = done
    results = pd.read_csv(folder / "logs" / "results.csv")
    soft = pd.read_csv(folder / "soft_labels.csv")
    folds = split_folds(41, 2020)
    for row in (0, 7, 40):
        checkpoint = results.set_index("fold").loc[folds[row], "checkpoint"]
        photo = load_photo(sample / "images" / f"{soft['image_id'][row]}.jpg", (32, 64))
        with torch.no_grad():
            network = load_network(folder / "logs" / checkpoint, "se_resnext50_32x4d")
            expected = network(torch.from_numpy(photo)[None]).softmax(1)[0].numpy()
            other = results.set_index("fold").loc[(folds[row] + 1) % 5, "checkpoint"]
            network = load_network(folder / "logs" / other, "se_resnext50_32x4d")
            wrong = network(torch.from_numpy(photo)[None]).softmax(1)[0].numpy()
        assert np.abs(wrong - expected).max() > 1e-3
        np.testing.assert_allclose(soft.loc[row, list(CLASSES)].to_numpy(float), expected, atol=2e-5)
        assert checkpoint in printed[1]  # it says which it used


def test_the_validation_auc_is_that_of_the_soft_labels(done, sample):
    folder, printed = done
    labels, soft, folds = read(sample / "train.csv"), read(folder / "soft_labels.csv"), split_folds(41, 2020)
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
        data = LeafDataset([photo], [image_id], augmentation=train_augmentation(), seed=2020)
        views = torch.stack([data[fold, draw, 0]["image"] for draw in range(8)])
        assert len({view.numpy().tobytes() for view in views}) == 8
        with torch.no_grad():
            network = load_network(folder / "logs" / checkpoint, "se_resnext50_32x4d")
            total.append(network(views).softmax(1).mean(0).numpy())
    assert len(test_ids) == 12
    np.testing.assert_allclose(read(folder / "submission.csv")[3], np.mean(total, axis=0), atol=2e-5)


def test_the_blend_is_the_mean_of_both_submissions(done):
    folder, _ = done
    assert np.abs(read(folder / "submission.csv") - read(folder / "submission_distill.csv")).max() > 1e-5
    expected = (read(folder / "submission.csv") + read(folder / "submission_distill.csv")) / 2
    np.testing.assert_allclose(read(folder / "submission_mix.csv"), expected, atol=1e-15)


def test_the_same_commands_give_the_same_bytes_whatever_the_workers(done, sample, tmp_path):
    """One fold by a new interpreter, then step 2 with all five; steps 3 and 4 are the same code as 1 and 2."""
    run_script("train.py", "--data_dir", sample, *SMALL, "--num_workers", 2, "--folds", 0, cwd=tmp_path, cold=True)
    assert (tmp_path / "logs" / "folds.csv").read_bytes() == (done[0] / "logs" / "folds.csv").read_bytes()
    for name in ("results.csv", "out_of_fold.csv"):
        (header, *rows), of_all = ((folder / "logs" / name).read_text().splitlines() for folder in (tmp_path, done[0]))
        assert [header, *rows] == of_all[: len(rows) + 1], name
    shutil.copytree(done[0] / "logs", tmp_path / "logs", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "logs" / "predictions")
    run_script("generate_soft_labels.py", "--num_workers", 2, cwd=tmp_path)
    for name in ("soft_labels.csv", "submission.csv"):
        assert (tmp_path / name).read_bytes() == (done[0] / name).read_bytes(), name


def test_a_rerun_skips_finished_folds_and_refuses_what_has_changed(done, sample, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done[0], folder)
    train = ["train.py", "--data_dir", sample, *SMALL]
    again = run_script(*train, "--folds", 1, 3, cwd=folder).stdout
    finished = [line.split("] ")[-1] for line in again.splitlines() if "finished" in line]
    assert finished == ["fold 1 is finished already", "fold 3 is finished already"]

    before = sorted(path.name for path in (folder / "logs").glob("*"))
    for changed in (["--seed", 1], ["--seed", 1, "--fresh", "--folds", 0]):  # refused before anything is deleted
        refused = run_script(*train, *changed, cwd=folder, check=False)
        assert refused.returncode == 1 and "seed was 2020, is 1" in refused.stderr and "--fresh" in refused.stderr
        assert sorted(path.name for path in (folder / "logs").glob("*")) == before

    other = tmp_path / "sample"
    shutil.copytree(sample, other)
    shutil.copy(other / "images" / "Test_0.jpg", other / "images" / "Train_0.jpg")
    refused = run_script("train.py", "--data_dir", other, *SMALL, cwd=folder, check=False)
    assert refused.returncode == 1 and "the photos: changed" in refused.stderr


def test_a_fold_in_training_cannot_be_started_again_nor_mixed_with_other_options(run, sample):
    """As the process that trains fold 1 holds its lock, when its result is not yet there."""
    train = ["train.py", "--data_dir", sample, *QUICK]
    path = record_path(run / "logs", 1)
    path.write_text(path.read_text().split("result:")[0])
    with FileLock(run / "logs" / ".fold=1.lock"):
        for folds, options, words in (
            ([1], [], "another process is training fold 1"),
            ([0, 2], ["--seed", 1], "seed was 2020, is 1"),
        ):
            done = run_script(*train, "--folds", *folds, *options, cwd=run, check=False)
            assert done.returncode == 1 and words in done.stderr
        run_script(*train, "--folds", 2, cwd=run)
    assert pd.read_csv(run / "logs" / "results.csv")["fold"].tolist() == [0, 2]


def test_fresh_trains_the_named_folds_anew_and_lost_results_come_back(done, sample, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done[0], folder)
    (folder / "logs" / "results.csv").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "logs").glob("*.ckpt")}
    run_script("train.py", "--data_dir", sample, *SMALL, "--fresh", "--folds", 4, cwd=folder)
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "logs").glob("*.ckpt")}
    assert before.keys() == after.keys()
    assert [name[:6] for name in before if before[name] != after[name]] == ["fold=4"]
    assert (folder / "logs" / "results.csv").read_bytes() == (done[0] / "logs" / "results.csv").read_bytes()


def test_prediction_refuses_what_contradicts_the_training(done, sample, tmp_path):
    folder, _ = done
    for option, hint in [
        (["--image_size", 64, 64], "was trained with --image_size 32 64"),
        (["--backbone", "resnet18"], "was trained with --backbone se_resnext50_32x4d"),
        (["--log_dir", "elsewhere"], "elsewhere/hparams.yaml is missing: name the --log_dir of a training"),
    ]:
        refused = run_script("generate_soft_labels.py", *option, cwd=folder, check=False)
        assert refused.returncode == 1 and hint in refused.stderr
        assert "Traceback" not in refused.stderr
    other = tmp_path / "other"
    run_script("tools.generate_sample_data", "--out", other, "--n_train", 42, "--photo_size", 96, 144, cwd=tmp_path)
    refused = run_script("generate_soft_labels.py", "--data_dir", other, cwd=folder, check=False)
    assert refused.returncode == 1 and "about other photos" in refused.stderr


def test_a_missing_fold_is_named(done, tmp_path):
    shutil.copytree(done[0] / "logs", tmp_path / "logs")
    next((tmp_path / "logs").glob("fold=3-*.ckpt")).unlink()
    refused = run_script("generate_distilled_submission.py", "--log_dir", "logs", cwd=tmp_path, check=False)
    assert refused.returncode == 1 and "fold 3 has no result or checkpoint" in refused.stderr
    assert not (tmp_path / "submission_distill.csv").exists()


def test_blend_refuses_submissions_that_do_not_match(done, tmp_path):
    folder, _ = done
    first = pd.read_csv(folder / "submission.csv")
    first.to_csv(tmp_path / "submission.csv", index=False)
    first.iloc[1:].to_csv(tmp_path / "submission_distill.csv", index=False)
    refused = run_script("blend.py", cwd=tmp_path, check=False)
    assert refused.returncode == 1 and f"has no row for {first['image_id'][0]}" in refused.stderr
    assert not (tmp_path / "submission_mix.csv").exists()


def test_the_demonstrations_aucs_are_those_of_the_files(done, sample, tmp_path, monkeypatch):
    shutil.copytree(done[0], tmp_path / "demo")
    shutil.copytree(sample, tmp_path / "demo" / "sample")
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")
    labels = pd.read_csv(sample / "test_labels.csv").set_index("image_id")
    for name in OUTPUTS[1:]:
        predicted = pd.read_csv(done[0] / name).set_index("image_id").loc[labels.index]
        assert demo.auc_of(labels, name) == pytest.approx(np.nanmean(column_aucs(labels, predicted)))


def test_data_and_logs_stay_out_of_version_control_but_for_what_explains_them():
    listed = subprocess.run(["git", "ls-files", "data", "logs"], cwd=REPO, text=True, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert listed.stdout.split() == ["data/README.md", "logs/README.md"]
    probe = "data/train.csv data/images/Train_0.jpg logs/fold=0.ckpt logs_submit_distill/x.ckpt submission.csv".split()
    ignored = subprocess.run(["git", "check-ignore", *probe], cwd=REPO, text=True, capture_output=True).stdout.split()
    assert ignored == probe
