"""An edit takes effect or is refused by name: pixels, folds, augmentation, new files, the network; and what is recorded."""

import re
import shutil

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import QUICK, REPO, edit, run_script

from analysis import figures
from dataset import load_photo
from harness.record import digest_sources, source_files
from utils import CLASSES, split_folds


def train(repo, sample, cwd, *options, check=True):
    options = ["--data_dir", sample, *QUICK, "--folds", 0, 1, *options]
    return run_script(str(repo / "train.py"), *options, cwd=cwd, check=check)


def predict(repo, cwd, *options, check=True):
    options = ["--folds", 0, 1, "--num_workers", 0, "--tta_draws", 1, *options]
    return run_script(str(repo / "generate_soft_labels.py"), *options, cwd=cwd, check=check)


def refused(done, *words):
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert said.startswith("error: ") and all(word in said for word in words), said


# ---------------------------------------------------------------------------------------------- the five lies

FIT_EDITS = {  # how fit_photo is edited: the file, the old text and the new one
    "another interpolation": ("dataset.py", "interpolation=cv2.INTER_LINEAR)", "interpolation=cv2.INTER_AREA)"),
    "portrait photos only": ("dataset.py", "photo = cv2.transpose(photo)", "photo = cv2.rotate(photo, 0)"),
    "a helper": ("helpers.py", "    return photo\n", "    return 255 - photo\n"),
    "decoding": ("harness/photos.py", "is None else photo\n", "is None else cv2.blur(photo, (5, 5))\n"),
}
HELPER = "photo, (image_size[1], image_size[0]), i", "sharpen(photo), (image_size[1], image_size[0]), i"
LOAD = """
import sys
import numpy as np
from argparse import Namespace
from dataset import cached_photos
args = Namespace(data_dir=sys.argv[1], cache_dir=sys.argv[2], image_size=[32, 64], limit=None)
images = cached_photos(args, "train", [f"Train_{i}" for i in range(12)])
np.save(sys.argv[3], np.stack([images[i] for i in range(12)]))
"""


@pytest.mark.parametrize("case", FIT_EDITS)
def test_an_edit_of_what_makes_the_pixels_makes_a_new_cache(case, repo, sample, tmp_path):
    file, old, new = FIT_EDITS[case]

    def load(name):
        run_script("-c", LOAD, sample, tmp_path / "cache", tmp_path / name, cwd=repo, PYTHONPATH=str(repo))
        return np.load(tmp_path / f"{name}.npy")

    if case == "a helper":
        (repo / "helpers.py").write_text("def sharpen(photo):\n    return photo\n")
        edit(repo / "dataset.py", "import cv2\n", "import cv2\nfrom helpers import sharpen\n")
        edit(repo / "dataset.py", *HELPER)
    before = load("before")
    np.testing.assert_array_equal(before[3], load_photo(sample / "images" / "Train_3.jpg", (32, 64)))
    edit(repo / file, old, new)
    after = load("after")
    portrait = [cv2.imread(str(sample / "images" / f"Train_{i}.jpg")).shape[0] == 144 for i in range(12)]
    changed = [not np.array_equal(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == (portrait if case == "portrait photos only" else [True] * 12)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


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


def test_a_new_file_of_the_user_counts_and_edits_of_the_prediction_do_not(repo, sample, tmp_path):
    """A file that is imported where it is used; with a byte order mark, as some editors write it."""
    (repo / "losses").mkdir()
    focal = repo / "losses" / "focal.py"
    focal.write_text("\ufeffSCALE = 1.0\n", encoding="utf-8")
    edit(
        repo / "models.py",
        "return F.cross_entropy(logits",
        "from losses import focal\n\n        return focal.SCALE * F.cross_entropy(logits",
    )
    train(repo, sample, tmp_path)
    edit(repo / "inference.py", "np.add.at(mean", "mean += 0\n    np.add.at(mean")
    focal.write_text("# as it was\n\nSCALE = 1.0  # for now\n")
    assert train(repo, sample, tmp_path).stdout.count("is finished already") == 2
    focal.write_text("SCALE = 2.0\n")
    done = train(repo, sample, tmp_path, check=False)
    refused(done, "losses/focal.py: changed", "or keep the finished folds with --accept_changes")
    (kept,) = re.findall(r"diff -r (\S+)", done.stderr)
    assert (tmp_path / kept / "losses" / "focal.py").read_text().endswith("SCALE = 1.0  # for now\n")


POOLING = "def pool(maps):\n    return maps.float().mean((2, 3))\n"
WAYS = {  # how a file is reached: what stands at the top of models.py, what before its use, how it is used
    "import": ("import pooling\n", "", "pooling.pool(maps)"),
    "in a function": ("", "            from pooling import pool\n\n", "pool(maps)"),
    "try": ("try:\n    from pooling import pool\nexcept ImportError:\n    pool = None\n", "", "pool(maps)"),
    "star": ("from pooling import *\n", "", "pool(maps)"),
    "by name": ("import importlib\n\n", "", 'importlib.import_module("pooling").pool(maps)'),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_prediction_by_another_network_is_refused_however_the_edit_is_reached(way, repo, sample, tmp_path):
    """And two networks are never pooled, whatever is accepted."""
    top, inside, use = WAYS[way]
    (repo / "pooling.py").write_text(POOLING)
    edit(repo / "models.py", "IMAGENET_MEAN, IMAGENET_STD =", f"{top}IMAGENET_MEAN, IMAGENET_STD =")
    edit(
        repo / "models.py",
        "            pooled = self.bn(maps.float().mean((2, 3)))\n",
        f"{inside}            pooled = self.bn({use})\n",
    )
    train(repo, sample, tmp_path)
    (repo / "pooling.py").write_text(POOLING.replace("mean", "amax"))
    edited = "since fold 0 of logs was trained, LeafNet was edited"
    refused(predict(repo, tmp_path, check=False), edited, "--accept_chan")
    assert not (tmp_path / "soft_labels-folds=0,1.csv").exists()
    if way == "by name":  # a file that is not known as a source, nor as changed: folds would be mixed without a word
        refused(train(repo, sample, tmp_path, "--folds", 0, 1, 2, check=False), edited)
    if way == "import":
        assert f"in spite of this: {edited}" in predict(repo, tmp_path, "--accept_changes").stdout
        refused(train(repo, sample, tmp_path, "--accept_changes", check=False), edited)


NETWORK_EDITS = {  # what is edited: the file, the old text and the new one, what is named
    "the forward pass": ("models.py", "maps.float().mean((2, 3))", "maps.float().amax((2, 3))", "LeafNet"),
    "a constant of it": ("models.py", "(0.485, 0.456, 0.406)", "(0.5, 0.5, 0.5)", "LeafNet"),
    "how backbones are computed": ("harness/backbones.py", "backbone.features(", "-backbone.features(", "LeafNet"),
    "the softmax": ("models.py", "logits.softmax(1)", "logits.sigmoid()", "LeafNet"),
    "the fitting of photos": ("dataset.py", "cv2.INTER_LINEAR)", "cv2.INTER_AREA)", "fit_photo"),
    "the fitting of portrait photos": ("dataset.py", "cv2.transpose(photo)", "cv2.rotate(photo, 0)", "fit_photo"),
}


@pytest.mark.parametrize("case", NETWORK_EDITS)
def test_an_edit_of_what_predicts_is_refused(case, repo, sample, run):
    file, old, new, name = NETWORK_EDITS[case]
    text = (repo / file).read_text()
    assert old in text
    (repo / file).write_text(text.replace(old, new, 1))
    refused(predict(repo, run, check=False), f"since fold 0 of logs was trained, {name} was edited", "--accept_changes")
    assert not list(run.glob("soft_labels*.csv"))
    done = train(repo, sample, run, "--accept_changes", check=False)  # folds of two networks never mix
    refused(done, "the photos: changed" if "fitting" in case else "LeafNet was edited")


def test_edits_that_change_nothing_or_the_training_alone_do_not_hinder_a_prediction(repo, run):
    edit(repo / "models.py", "reduction=reduction)", "reduction=reduction, label_smoothing=0.1)")
    edit(repo / "dataset.py", "A.HorizontalFlip(p=0.5)", "A.HorizontalFlip(p=0.4)")
    models = (repo / "models.py").read_text()
    assert "pooled" in models
    (repo / "models.py").write_text(models.replace("pooled", "average") + "# a comment\n")
    (repo / "dataset.py").write_text((repo / "dataset.py").read_text().replace("photo.shape[0]", "len(photo)"))
    predict(repo, run, "--precision", "bf16")  # the comparison is in float32 all the same


@pytest.mark.parametrize(
    "script, classes",
    [
        ("train.py", '("rust")'),
        ("blend.py", '("rust",)'),
        ("compare.py", '("rust", "rust")'),
        ("train.py", '("label", "fold")'),
        ("predict.py", '("a|b", "c")'),
        ("generate_soft_labels.py", '("none", "rust")'),
    ],
)
def test_class_names_that_cannot_be_are_refused_by_every_script(script, classes, repo, tmp_path):
    edit(repo / "utils.py", f"CLASSES = {CLASSES}".replace("'", '"'), f"CLASSES = {classes}")
    refused(
        run_script(str(repo / script), cwd=tmp_path, check=False), "CLASSES in utils.py: two or more different names"
    )


@pytest.mark.parametrize("classes", [("scab", *CLASSES[1:3], "healthy"), ("oak", "ash", "elm", "fir")])
def test_a_prediction_under_other_class_names_is_refused(classes, repo, sample, run):
    edit(repo / "utils.py", repr(CLASSES).replace("'", '"'), repr(classes))
    refused(predict(repo, run, check=False), f"logs was trained with CLASSES = {CLASSES}")
    words = [str(repo / "predict.py"), sample / "images" / "Test_0.jpg", "--folds", 0]
    refused(run_script(*words, cwd=run, check=False), f"logs was trained with CLASSES = {CLASSES}")


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


def test_comments_and_blank_lines_are_no_source(tmp_path, monkeypatch):
    digests = []
    for text in (
        'A = "# no comment"  # one\n\n\n# two\ndef f():\n\n    return A  \n',
        'A = "# no comment"\ndef f():\n    return A\n',
    ):
        (tmp_path / "one.py").write_text(text)
        monkeypatch.setattr("harness.record.ROOT", tmp_path)
        source_files.cache_clear()
        digests.append(digest_sources("one.py"))
    source_files.cache_clear()
    assert digests[0] == digests[1] and set(digests[0]) == {"one.py"}


def test_one_more_metric_is_kept_also_where_a_fold_does_not_have_it(repo, sample, tmp_path):
    """Fold 0 holds no photo of multiple_diseases."""
    more = 'self.log("val_rare", float(labels[:, 1].sum()) or float("nan"))'
    edit(repo / "models.py", '        self.log("val_roc_auc"', f'        {more}\n        self.log("val_roc_auc"')
    said = train(repo, sample, tmp_path).stdout
    assert "val_rare of 1 folds: " in said and "out-of-fold AUC of 17 photos" in said
    assert pd.read_csv(tmp_path / "logs" / "results.csv")["val_rare"].isna().tolist() == [True, False]
    predict(repo, tmp_path)


def test_a_metric_of_some_epochs_only_is_empty_in_the_others(repo, sample, tmp_path):
    more = 'self.current_epoch % 2 or self.log("val_even", float(self.current_epoch))'
    edit(repo / "models.py", '        self.log("val_roc_auc"', f'        {more}\n        self.log("val_roc_auc"')
    said = train(repo, sample, tmp_path, "--max_epochs", 4).stdout
    metrics = [pd.read_csv(tmp_path / "logs" / "metrics" / f"fold={fold}.csv")["val_even"] for fold in (0, 1)]
    assert all(of.tolist()[::2] == [0, 2] and of[1::2].isna().all() for of in metrics)
    results = pd.read_csv(tmp_path / "logs" / "results.csv")
    even = results["epoch"] % 2 == 0
    assert (results["val_even"][even] == results["epoch"][even]).all() and results["val_even"][~even].isna().all()
    assert f"val_even of {even.sum()} folds: " in said and "val_loss of 2 folds: " in said


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
    full_names = ["submission.csv", "soft_labels.csv", "submission_mix.csv"]
    for name in full_names:
        (tmp_path / name).write_text("of the full data\n")
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
    for name in full_names:
        assert (tmp_path / name).read_text() == "of the full data\n"
    refused(run_script(*train, cwd=tmp_path, check=False), "limit was 30, is None")
    full = pd.read_csv(sample / "train.csv")  # soft labels of all photos: those that are left out do not disturb
    full.to_csv(tmp_path / "all.csv", index=False)
    distill = ["--soft_labels_filename", "all.csv", "--limit", 30, "--log_dir", "distill", "--folds", 0]
    run_script(*train, *distill, cwd=tmp_path)
    shutil.copy(tmp_path / "submission-limit=30.csv", tmp_path / "submission_distill-limit=30.csv")
    run_script("blend.py", "--limit", 30, cwd=tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "submission_mix-limit=30.csv"), submission)


@pytest.mark.parametrize(
    "script, option, other",
    [
        ("train.py", ["--soft_share", 0.5], "--soft_labels_filename"),
        ("predict.py", ["x.jpg", "--tta_draws", 4], "--tta"),
    ],
)
def test_an_option_that_does_nothing_is_an_error(script, option, other, tmp_path):
    refused(
        run_script(script, *option, cwd=tmp_path, check=False), f"{option[-2]} does nothing without {other}: type both"
    )


def test_what_predict_py_does_not_read_is_no_option_of_it(tmp_path):
    for option in ("--data_dir", "--cache_dir"):
        done = run_script("predict.py", "x.jpg", option, "y", cwd=tmp_path, check=False)
        assert done.returncode == 2 and f"unrecognized option {option}" in done.stderr


def test_what_a_notebook_or_a_cluster_hands_down_disturbs_nothing(sample, tmp_path):
    """matplotlib's backend of a notebook, which is not installed here; a temporary folder too long for a socket's name."""
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    run_script("-c", "import harness.console, matplotlib.pyplot", cwd=tmp_path, cold=True, **notebook)
    (tmp_path / ("long" * 25)).mkdir()
    run_script(
        "train.py",
        "--data_dir",
        sample,
        *QUICK,
        "--folds",
        0,
        "--num_workers",
        1,
        cwd=tmp_path,
        TMPDIR=str(tmp_path / ("long" * 25)),
    )


# ---------------------------------------------------------------------------------------------- what a training says


def test_a_training_says_what_it_will_do_and_ends_with_its_out_of_fold_figures(sample, tmp_path):
    options = ["--folds", 0, 1, "--max_epochs", 3, "--accumulate_grad_batches", 2]
    said = run_script("train.py", "--data_dir", sample, *QUICK, *options, cwd=tmp_path).stdout
    assert re.search(r"squeezenet1_1, 72\d,\d{3} parameters, from scratch, on 1 x cpu, 32\n", said)
    assert "41 photos, 41 in 5 folds; 3 epochs per fold\n" in said
    assert re.search(
        r"fold 1, 3 of 3 epochs: epoch 2, lr \S+, train_loss [\d.]+, val_loss .*, val_roc_auc .*, seconds ", said
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
    step_2 = run_script("generate_soft_labels.py", "--folds", 0, 1, "--tta_draws", 1, cwd=tmp_path).stdout
    soft = pd.read_csv(tmp_path / "soft_labels-folds=0,1.csv")
    out_of_fold = out_of_fold.set_index("image_id").loc[soft["image_id"]]
    np.testing.assert_allclose(out_of_fold[list(CLASSES)], soft[list(CLASSES)], atol=1e-5)
    assert re.search(r"out-of-fold AUC of \d+ photos: ([\d.]+)", said).group(1) in step_2
