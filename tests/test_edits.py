"""An edit takes effect or is refused by name: folds, augmentation, new files, the network; and what is recorded."""

import re

import albumentations as A
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import QUICK, REPO, edit, refused, run_script

from analysis import figures
from harness.record import source_files
from utils import CLASSES, mean_auc, split_folds


def train(repo, sample, cwd, *options, check=True):
    options = ["--data_dir", sample, *QUICK, "--folds", 0, 1, *options]
    return run_script(str(repo / "train.py"), *options, cwd=cwd, check=check)


def predict(repo, cwd, *options, check=True):
    options = ["--folds", 0, 1, "--num_workers", 0, "--tta_draws", 1, *options]
    return run_script(str(repo / "generate_soft_labels.py"), *options, cwd=cwd, check=check)


def test_another_split_is_never_accepted_beside_finished_folds(repo, sample, run):
    folds = (run / "logs" / "folds.csv").read_bytes()
    edit(repo / "utils.py", "shuffle=True, random_state=seed).split", "shuffle=True, random_state=seed + 1).split")
    for options in ([], ["--accept_changes"]):
        done = train(repo, sample, run, *options, check=False)
        refused(done, "the folds: changed", "utils.py: changed")
        assert "--accept_changes" not in done.stderr
    assert (run / "logs" / "folds.csv").read_bytes() == folds


def test_any_augmentation_can_be_shown(monkeypatch):
    usual = figures.train_augmentation().transforms
    added = A.Sequential([A.InvertImg(p=0.1), A.Transpose()])
    monkeypatch.setattr(figures, "train_augmentation", lambda: A.Compose([*usual, added, A.VerticalFlip(p=0.5)]))
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    pictures = figures.augmentation_pictures(photo)
    titles = [title for title, _ in pictures]
    assert {"invert img", "transpose", "vertical flip", "vertical flip #2", "affine"} <= set(titles)
    shown = dict(pictures)
    np.testing.assert_array_equal(shown["invert img"], 255 - photo)
    np.testing.assert_array_equal(shown["transpose"], photo.transpose(1, 0, 2))
    assert len(titles) == 1 + 8 + 3 + 3


def test_a_new_file_of_the_user_counts_and_comments_and_edits_of_the_prediction_do_not(repo, sample, tmp_path):
    (repo / "losses").mkdir()
    focal = repo / "losses" / "focal.py"
    focal.write_text("SCALE = 1.0\n")
    scaled = "from losses import focal\n\n        return focal.SCALE * F.cross_entropy(logits"
    edit(repo / "models.py", "return F.cross_entropy(logits", scaled)  # imported where it is used
    train(repo, sample, tmp_path)
    edit(repo / "inference.py", "np.add.at(mean", "mean += 0\n    np.add.at(mean")
    focal.write_text("# as it was\n\nSCALE = 1.0  # for now\n")
    assert train(repo, sample, tmp_path).stdout.count("is finished already") == 2
    focal.write_text("SCALE = 2.0\n")
    done = train(repo, sample, tmp_path, check=False)
    refused(done, "losses/focal.py: changed", "or keep the finished folds with --accept_changes")
    (kept,) = re.findall(r"diff -r (\S+)", done.stderr)
    assert (tmp_path / kept / "losses" / "focal.py").read_text().endswith("SCALE = 1.0  # for now\n")


def test_two_networks_are_never_pooled_though_no_source_is_known_to_have_changed(repo, sample, tmp_path):
    pooling = repo / "pooling.py"
    pooling.write_text("def pool(maps):\n    return maps.float().mean((2, 3))\n")
    edit(repo / "models.py", "import numpy as np\n", "import importlib\n\nimport numpy as np\n")
    edit(repo / "models.py", "maps.float().mean((2, 3))", 'importlib.import_module("pooling").pool(maps)')
    train(repo, sample, tmp_path)
    edit(pooling, "mean", "amax")
    edited = "since fold 0 of logs was trained, LeafNet was edited"
    refused(predict(repo, tmp_path, check=False), edited, "--accept_changes")
    refused(train(repo, sample, tmp_path, "--folds", 0, 1, 2, "--accept_changes", check=False), edited)
    assert f"in spite of this: {edited}" in predict(repo, tmp_path, "--accept_changes").stdout


NETWORK_EDITS = {  # what is edited: the file, the old text and the new one, what is named
    "the forward pass": ("models.py", "maps.float().mean((2, 3))", "maps.float().amax((2, 3))", "LeafNet"),
    "a constant of it": ("models.py", 'config["mean"]) * 255', 'config["mean"]) * 200', "LeafNet"),
    "the softmax": ("models.py", "logits.softmax(1)", "logits.sigmoid()", "LeafNet"),
    "the fitting of photos": ("dataset.py", "cv2.INTER_LINEAR)", "cv2.INTER_AREA)", "fit_photo"),
    "the fitting of portrait photos": ("dataset.py", "cv2.transpose(photo)", "cv2.rotate(photo, 0)", "fit_photo"),
}


@pytest.mark.parametrize("case", NETWORK_EDITS)
def test_an_edit_of_what_predicts_is_refused(case, repo, sample, run):
    file, old, new, name = NETWORK_EDITS[case]
    edit(repo / file, old, new)
    refused(predict(repo, run, check=False), f"since fold 0 of logs was trained, {name} was edited", "--accept_changes")
    assert not list(run.glob("soft_labels*.csv"))
    done = train(repo, sample, run, "--accept_changes", check=False)  # folds of two networks never mix
    refused(done, "the photos: changed" if "fitting" in case else "LeafNet was edited")


def test_edits_that_change_nothing_or_the_training_alone_do_not_hinder_a_prediction(repo, run):
    edit(repo / "models.py", "reduction=reduction)", "reduction=reduction, label_smoothing=0.1)")
    edit(repo / "dataset.py", "A.HorizontalFlip(p=0.5)", "A.HorizontalFlip(p=0.4)")
    edit(repo / "models.py", "self.bn(maps.float().mean((2, 3)))", "self.bn(maps.float().mean(3).mean(2))")
    edit(repo / "dataset.py", "photo.shape[0] > photo.shape[1]", "len(photo) > photo.shape[1]")
    predict(repo, run, "--precision", "bf16")  # the comparison is in float32 all the same


@pytest.mark.parametrize("classes", ['("rust")', '("rust", "rust")', '("label", "fold")', '("a|b", "c;d")'])
def test_class_names_that_cannot_be_are_refused(classes, repo, tmp_path):
    edit(repo / "utils.py", f"CLASSES = {CLASSES}".replace("'", '"'), f"CLASSES = {classes}")
    done = run_script(str(repo / "blend.py"), cwd=tmp_path, check=False)
    refused(done, "CLASSES in utils.py: two or more different names")


def test_a_prediction_under_other_class_names_or_with_fewer_folds_is_refused(repo, sample, run):
    edit(repo / "utils.py", repr(CLASSES).replace("'", '"'), '("oak", "ash", "elm", "fir")')
    for words in (["generate_soft_labels.py"], ["predict.py", sample / "images" / "Test_0.jpg"]):
        done = run_script(str(repo / words[0]), *words[1:], "--folds", 0, cwd=run, check=False)
        refused(done, f"logs was trained with CLASSES = {CLASSES}")
    edit(repo / "utils.py", '("oak", "ash", "elm", "fir")', repr(CLASSES))
    edit(repo / "utils.py", "N_FOLDS = 5", "N_FOLDS = 4")
    refused(predict(repo, run, check=False), " and N_FOLDS = 5, utils.py has other ones")


def test_kept_behaviour_that_is_lost_is_no_licence(repo, run):
    path = run / "logs" / "metrics" / "fold=1" / "behaviour.npz"
    path.write_bytes(path.read_bytes()[:-100])
    refused(predict(repo, run, check=False), "behaviour.npz is missing or damaged", "edits cannot be told")


# ---------------------------------------------------------------------------------------------- what is recorded


def test_each_fold_says_what_trained_it_and_what_is_pooled_says_where_folds_differ(repo, sample, run):
    edit(repo / "models.py", "reduction=reduction)", "reduction=reduction, label_smoothing=0.1)")
    options = ["--learning_rate", "1e-5", "--folds", 0, 1, 2]
    refused(train(repo, sample, run, *options, check=False), "models.py: changed", "learning_rate was 0.001, is 1e-05")
    said = train(repo, sample, run, *options, "--accept_changes").stdout
    assert said.count("is finished already") == 2 and "note: keeping the finished folds of logs in spite of: " in said
    differs = "note: in logs fold 2 was trained differently from fold 0: learning_rate was 0.001, is 1e-05"
    assert differs in said
    records = [yaml.safe_load((run / f"logs/metrics/fold={fold}/hparams.yaml").read_text()) for fold in range(3)]
    assert [record["options"]["learning_rate"] for record in records] == [1e-3, 1e-3, 1e-5]
    assert records[0]["source"] == records[1]["source"] != records[2]["source"]
    for record, files in ((records[0], REPO), (records[2], repo)):
        for name in ("train.py", "models.py", "harness/run.py"):
            assert (run / "logs" / "source" / record["source"] / name).read_text() == (files / name).read_text()
        assert not (run / "logs" / "source" / record["source"] / "inference.py").exists()
    assert differs in predict(repo, run, "--folds", 0, 2).stdout
    run_script(str(repo / "error_analysis.py"), "--folds", 0, 2, "--num_workers", 0, "--worst", 1, cwd=run)
    assert differs.removeprefix("note: ") in (run / "error_analysis.html").read_text()
    assert "differently" not in predict(repo, run, "--folds", 0, 1).stdout


def test_a_log_directory_of_an_older_version_is_refused_in_one_line(repo, sample, run):
    for path in [run / "logs" / "hparams.yaml", *run.glob("logs/metrics/*/hparams.yaml")]:
        path.write_text(path.read_text().replace("format: 4", "format: 3"))
    for done in (train(repo, sample, run, check=False), predict(repo, run, check=False)):
        refused(done, "is of another version of this repository")


def test_a_training_depends_on_what_it_imports_and_on_nothing_else():
    names = set(source_files("train.py"))
    assert {"train.py", "dataset.py", "models.py", "utils.py", "harness/run.py"} <= names
    assert not {name for name in names if name.split("/")[0] in ("analysis", "tests", "tools", ".venv")}
    assert "inference.py" not in names and "blend.py" not in names
    assert "inference.py" in source_files("inference.py") and "train.py" not in source_files("inference.py")


def test_a_metric_of_some_folds_or_epochs_only_is_kept_and_empty_in_the_others(repo, sample, tmp_path):
    """Fold 0 holds no photo of multiple_diseases."""
    more = """self.log("val_rare", float(labels[:, 1].sum()) or float("nan"))
        self.current_epoch % 2 or self.log("val_even", float(self.current_epoch))
        """
    edit(repo / "models.py", 'self.log("val_roc_auc"', f'{more}self.log("val_roc_auc"')
    said = train(repo, sample, tmp_path, "--max_epochs", 4).stdout
    metrics = [pd.read_csv(tmp_path / "logs" / "metrics" / f"fold={fold}.csv")["val_even"] for fold in (0, 1)]
    assert all(of.tolist()[::2] == [0, 2] and of[1::2].isna().all() for of in metrics)
    results = pd.read_csv(tmp_path / "logs" / "results.csv")
    assert results["val_rare"].isna().tolist() == [True, False]
    even = results["epoch"] % 2 == 0
    assert (results["val_even"][even] == results["epoch"][even]).all() and results["val_even"][~even].isna().all()
    for name, n in (("val_rare", 1), ("val_even", even.sum()), ("val_loss", 2)):
        assert f"{name} of {n} folds: " in said
    predict(repo, tmp_path)


# ---------------------------------------------------------------------------------------------- options, and a quick look


def test_options_change_what_they_say_and_are_recorded(sample, tmp_path):
    options = "--learning_rate 3e-4 --keep_checkpoints 2 --max_epochs 3 --seed 7 --fold_seed 2020".split()
    run_script("train.py", "--data_dir", sample, *QUICK, "--folds", 0, *options, cwd=tmp_path)
    recorded = yaml.safe_load((tmp_path / "logs" / "hparams.yaml").read_text())["options"]
    assert [recorded[name] for name in ("learning_rate", "keep_checkpoints", "fold_seed")] == [3e-4, 2, 2020]
    assert pd.read_csv(tmp_path / "logs" / "metrics" / "fold=0.csv")["lr"][0] == 3e-4
    assert len(list((tmp_path / "logs").glob("fold=0-epoch*.ckpt"))) == 2
    assert pd.read_csv(tmp_path / "logs" / "folds.csv")["fold"].tolist() == split_folds(41, 2020).tolist()
    run_script("generate_distilled_submission.py", "--log_dir", "logs", "--folds", 0, "--tta_draws", 3, cwd=tmp_path)
    kept = np.load(next((tmp_path / "logs" / "predictions").glob("test-*.npy")))
    assert kept.shape == (12 * 3, 4) and len(pd.read_csv(tmp_path / "submission_distill-folds=0.csv")) == 12


def test_a_part_of_the_photos_or_of_the_folds_overwrites_no_full_result(sample, tmp_path):
    full = [tmp_path / name for name in ("submission.csv", "soft_labels.csv", "submission_mix.csv")]
    for path in full:
        path.write_text("of the full data\n")
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds", *range(5), "--log_dir", "quick"]
    run_script(*train, "--limit", 30, cwd=tmp_path)
    run_script("generate_soft_labels.py", "--log_dir", "quick", "--tta_draws", 1, cwd=tmp_path)
    run_script("generate_soft_labels.py", "--log_dir", "quick", "--tta_draws", 1, "--folds", 0, 3, cwd=tmp_path)
    soft = pd.read_csv(tmp_path / "soft_labels-limit=30.csv")
    submission = pd.read_csv(tmp_path / "submission-limit=30.csv")
    labels = pd.read_csv(sample / "train.csv").set_index("image_id")
    chosen = pd.read_csv(tmp_path / "quick" / "folds.csv")
    assert len(chosen) == 30 and set(soft["image_id"]) == set(chosen["image_id"]) and len(submission) == 12
    assert (np.abs(labels.loc[chosen["image_id"]].sum() - labels.mean() * 30) <= 1).all()  # each class has its share
    part = pd.read_csv(tmp_path / "soft_labels-limit=30-folds=0,3.csv")
    assert set(part["image_id"]) == set(chosen["image_id"][chosen["fold"].isin([0, 3])])
    done = run_script("blend.py", "--submissions", *["submission-limit=30.csv"] * 2, cwd=tmp_path, check=False)
    refused(done, "submission-limit=30.csv is of a part", "name another --output than submission_mix.csv")
    assert {path.read_text() for path in full} == {"of the full data\n"}
    refused(run_script(*train, cwd=tmp_path, check=False), "limit was 30, is None")
    labels_of_all = ["--soft_labels_filename", sample / "train.csv", "--limit", 30]  # more than needed: no error
    run_script(*train, *labels_of_all, "--log_dir", "distill", "--folds", 0, cwd=tmp_path)


def test_what_a_notebook_or_a_cluster_hands_down_disturbs_nothing(sample, tmp_path):
    """matplotlib's backend of a notebook, which is not installed here; a temporary folder too long for a socket's name."""
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    run_script("-c", "import harness.console, matplotlib.pyplot", cwd=tmp_path, cold=True, **notebook)
    long = tmp_path / ("long" * 25)
    long.mkdir()
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds", 0, "--num_workers", 1]
    run_script(*train, cwd=tmp_path, TMPDIR=str(long))


# ---------------------------------------------------------------------------------------------- what a training says


def test_a_training_says_what_it_will_do_and_ends_with_its_out_of_fold_figures(sample, tmp_path):
    options = ["--folds", 0, 1, "--max_epochs", 3, "--accumulate_grad_batches", 2]
    said = run_script("train.py", "--data_dir", sample, *QUICK, *options, cwd=tmp_path).stdout
    assert re.search(r"squeezenet1_1, 72\d,\d{3} parameters, from scratch, on 1 x cpu, 32\n", said)
    assert "41 photos, 41 in 5 folds; 3 epochs per fold\n" in said
    assert re.search(
        r"fold 1, 3 of 3 epochs: epoch 2, lr \S+, train_loss [\d.]+, val_loss .*, val_roc_auc .*, sec", said
    )
    results = pd.read_csv(tmp_path / "logs" / "results.csv")
    best, last = results["val_roc_auc"], results["last_val_roc_auc"]
    for values in (best, last):
        assert f"{values.mean():.4f} ± {values.std(ddof=0):.4f}" in said
    for fold in (0, 1):
        rows = pd.read_csv(tmp_path / "logs" / "metrics" / f"fold={fold}.csv")
        assert last[fold] == rows["val_roc_auc"].iloc[-1] and best[fold] == rows["val_roc_auc"].max()

    out_of_fold = pd.read_csv(tmp_path / "logs" / "out_of_fold.csv")
    folds = pd.read_csv(tmp_path / "logs" / "folds.csv")
    assert list(out_of_fold.columns) == ["image_id", "fold", "label", *CLASSES]
    truth = pd.read_csv(sample / "train.csv").set_index("image_id")[list(CLASSES)].idxmax(axis=1)
    assert out_of_fold["label"].tolist() == truth[out_of_fold["image_id"]].tolist()
    of_folds = folds[folds["fold"] < 2].set_index("image_id")["fold"].to_dict()
    assert out_of_fold.set_index("image_id")["fold"].to_dict() == of_folds
    one_hot = [[name == label for name in CLASSES] for label in out_of_fold["label"]]
    assert f"out-of-fold AUC of 17 photos: {mean_auc(one_hot, out_of_fold[list(CLASSES)]):.5f} " in said
