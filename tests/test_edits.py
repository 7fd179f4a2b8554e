"""An edit takes effect or is refused by name: pixels, folds, augmentation, new files, the network; and what is recorded."""

import re
import shutil

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import QUICK, REPO, run_script

from analysis import figures
from dataset import load_photo
from harness.sources import definition, strip_comments
from utils import CLASSES, split_folds


@pytest.fixture
def repo(tmp_path):
    """A copy of the recipe and its rooms, to be edited."""
    folder = tmp_path / "repo"
    folder.mkdir()
    for path in REPO.glob("*.py"):
        shutil.copy(path, folder)
    for room in ("harness", "analysis"):
        shutil.copytree(REPO / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def edit(path, old, new):
    """Replace a text that stands in a file exactly once."""
    text = path.read_text()
    assert text.count(old) == 1, f"{path}: {old}"
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def done(sample, tmp_path_factory):
    """A folder in which two folds of a quick network were trained by the recipe as it stands."""
    folder = tmp_path_factory.mktemp("done")
    run_script("train.py", "--data_dir", sample, *QUICK, "--folds", 0, 1, cwd=folder)
    return folder


@pytest.fixture
def run(done, tmp_path):
    """A copy of that folder, for writing."""
    shutil.copytree(done, tmp_path / "run")
    return tmp_path / "run"


def train(repo, sample, cwd, *options, check=True):
    return run_script(
        str(repo / "train.py"), "--data_dir", sample, *QUICK, "--folds", 0, 1, *options, cwd=cwd, check=check
    )


def predict(repo, cwd, *options, check=True):
    options = ["--folds", 0, 1, "--num_workers", 0, *options]
    return run_script(str(repo / "generate_soft_labels.py"), *options, cwd=cwd, check=check)


def refused(done, *words):
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------- the five lies

FIT_EDITS = {  # how fit_photo is edited: the file, the old text and the new one
    "another interpolation": ("dataset.py", "interpolation=cv2.INTER_LINEAR)", "interpolation=cv2.INTER_AREA)"),
    "portrait photos only": ("dataset.py", "photo = cv2.transpose(photo)", "photo = cv2.rotate(photo, 0)"),
    "a helper": (
        "dataset.py",
        "photo, (image_size[1], image_size[0]), i",
        "sharpen(photo), (image_size[1], image_size[0]), i",
    ),
    "decoding": ("harness/photos.py", "(content) else photo\n", "(content) else cv2.blur(photo, (5, 5))\n"),
}
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
        edit(repo / file, old, new)
        file, old, new = "helpers.py", "    return photo\n", "    return 255 - photo\n"
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
        assert "keep what is there" not in done.stderr
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


def test_a_sixth_augmentation_reaches_the_page(repo, trained, tmp_path):
    edit(
        repo / "dataset.py",
        "            A.VerticalFlip(p=0.5),\n",
        "            A.VerticalFlip(p=0.5),\n            A.InvertImg(p=0.5),\n",
    )
    options = ["--log_dir", trained / "logs", "--cache_dir", tmp_path / "cache", "--folds", 0, "--num_workers", 0]
    run_script(str(repo / "error_analysis.py"), *options, "--worst", 1, cwd=tmp_path)
    assert "invert img" in (tmp_path / "error_analysis.html").read_text()


def test_a_new_file_of_the_user_counts_and_edits_of_the_prediction_do_not(repo, sample, tmp_path):
    (repo / "losses.py").write_text("SCALE = 1.0\n")
    edit(repo / "models.py", "import numpy as np\n", "import numpy as np\nimport losses\n")
    edit(repo / "models.py", "return F.cross_entropy(logits", "return losses.SCALE * F.cross_entropy(logits")
    train(repo, sample, tmp_path)
    edit(repo / "inference.py", "np.add.at(mean", "mean += 0\n    np.add.at(mean")
    (repo / "losses.py").write_text("# as it was\n\nSCALE = 1.0  # for now\n")
    assert train(repo, sample, tmp_path).stdout.count("is finished already") == 2
    (repo / "losses.py").write_text("SCALE = 2.0\n")
    done = train(repo, sample, tmp_path, check=False)
    refused(done, "losses.py: changed", "-SCALE = 1.0", "+SCALE = 2.0", "keep what is there with --accept_changes")


NETWORK_EDITS = {  # what is edited: the file, the old text and the new one, what is named
    "the forward pass": ("models.py", "maps.float().mean((2, 3))", "maps.float().amax((2, 3))", "LeafNet"),
    "a constant of it": ("models.py", "(0.485, 0.456, 0.406)", "(0.5, 0.5, 0.5)", "LeafNet"),
    "the fitting of photos": ("dataset.py", "cv2.INTER_LINEAR)", "cv2.INTER_AREA)", "fit_photo"),
}


@pytest.mark.parametrize("case", NETWORK_EDITS)
def test_a_prediction_by_another_network_than_the_trained_one_is_refused(case, repo, sample, run):
    file, old, new, name = NETWORK_EDITS[case]
    text = (repo / file).read_text()
    assert old in text
    (repo / file).write_text(text.replace(old, new, 1))
    refused(predict(repo, run, check=False), f"{name}: edited since", "--accept_changes", "+")
    assert not (run / "soft_labels.csv").exists()
    assert "in spite of edits" in predict(repo, run, "--accept_changes").stdout
    refused(train(repo, sample, run, "--accept_changes", check=False), name)  # folds of two networks never mix


def test_edits_of_the_training_alone_do_not_hinder_a_prediction(repo, run):
    edit(repo / "models.py", "reduction=reduction)", "reduction=reduction, label_smoothing=0.1)")
    edit(repo / "dataset.py", "A.HorizontalFlip(p=0.5)", "A.HorizontalFlip(p=0.4)")
    predict(repo, run)


# ---------------------------------------------------------------------------------------------- what is recorded


def test_the_recipe_is_kept_and_what_is_accepted_later_as_diffs(repo, sample, run):
    kept = run / "logs" / "source"
    for name in ("train.py", "models.py", "harness/run.py"):
        assert (kept / name).read_text() == (REPO / name).read_text()
    assert not (kept / "inference.py").exists()
    edit(repo / "models.py", "reduction=reduction)", "reduction=reduction, label_smoothing=0.1)")
    refused(train(repo, sample, run, check=False), "models.py: changed", "label_smoothing=0.1")
    train(repo, sample, run, "--accept_changes")
    train(repo, sample, run)  # accepted once is enough
    assert (
        "+        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=0.1)"
        in (kept / "accepted-1.diff").read_text()
    )
    assert (kept / "models.py").read_text() == (REPO / "models.py").read_text()
    assert len(list(kept.glob("*.diff"))) == 1


def test_a_log_directory_of_an_older_version_is_refused_in_one_line(repo, sample, run):
    path = run / "logs" / "hparams.yaml"
    record = yaml.safe_load(path.read_text())
    del record["format"]
    path.write_text(yaml.safe_dump(record))
    done = train(repo, sample, run, check=False)
    refused(done, "was begun by another version of this repository")
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "of another version of this repository" in predict(repo, run).stdout


def test_comments_and_blank_lines_are_no_source():
    text = 'A = "# no comment"  # one\n\n\n# two\ndef f():\n\n    return A  \n'
    assert strip_comments(text) == 'A = "# no comment"\ndef f():\n    return A\n'


def test_a_definition_holds_what_it_uses_and_nothing_else():
    network = definition("models.py", "LeafNet")
    assert "def count_feature_maps" in network and "IMAGENET_MEAN" in network and "CLASSES = (" in network
    assert "SCHEDULES" not in network and "cross_entropy" not in network
    assert "def fit_photo" in definition("dataset.py", "fit_photo")


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
    kept = np.load(next((tmp_path / "logs" / "predictions").glob("test-*.npz")))
    assert len(kept["probabilities"]) == 12 * 3 and "(0, 2, 11)" in str(kept["facts"])


def test_a_quick_look_takes_a_part_of_the_photos_and_overwrites_nothing(sample, tmp_path):
    (tmp_path / "submission.csv").write_text("of the full data\n")
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds", 0, 1]
    run_script(*train, "--limit", 30, "--log_dir", "quick", cwd=tmp_path)
    assert [path.name.split("-")[1] for path in (tmp_path / "image_cache").glob("*.npy")] == ["train"]
    run_script("generate_soft_labels.py", "--log_dir", "quick", "--folds", 0, 1, cwd=tmp_path)
    soft = pd.read_csv(tmp_path / "soft_labels-limit=30.csv")
    submission = pd.read_csv(tmp_path / "submission-limit=30.csv")
    labels = pd.read_csv(sample / "train.csv").set_index("image_id")
    chosen = pd.read_csv(tmp_path / "quick" / "folds.csv")["image_id"]
    assert len(chosen) == 30 and set(soft["image_id"]) <= set(chosen) and len(submission) == 12
    expected = labels.mean() * 30
    assert (np.abs(labels.loc[chosen].sum() - expected) <= 1).all()  # each class has its share
    assert (tmp_path / "submission.csv").read_text() == "of the full data\n" and not (
        tmp_path / "soft_labels.csv"
    ).exists()
    full = run_script(*train, "--log_dir", "quick", cwd=tmp_path, check=False)
    refused(full, "limit was 30, is None")
    shutil.copy(tmp_path / "submission-limit=30.csv", tmp_path / "submission_distill-limit=30.csv")
    run_script("blend.py", "--limit", 30, cwd=tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "submission_mix-limit=30.csv"), submission)


def test_a_quick_look_uses_the_cache_of_all_photos_and_leaves_it(done, sample, run):
    caches = {path.name: path.stat().st_mtime_ns for path in (run / "image_cache").glob("*-train-*.npy")}
    assert len(caches) == 1
    soft = pd.read_csv(sample / "train.csv")  # of all photos: those that are left out do not disturb
    soft.to_csv(run / "soft_labels.csv", index=False)
    options = ["--limit", 30, "--log_dir", "quick", "--soft_labels_filename", "soft_labels.csv"]
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds", 0, *options]
    run_script(*train, cwd=run)
    assert {path.name: path.stat().st_mtime_ns for path in (run / "image_cache").glob("*-train-*.npy")} == caches
    again = run_script(*train, "--cache_dir", "other", cwd=run)  # the same photos from a cache of their own
    assert "fold 0 is finished already" in again.stdout and len(list((run / "other").glob("*-limit=30-*.npy"))) == 1


# ---------------------------------------------------------------------------------------------- what a training says


def test_a_training_says_what_it_will_do_and_ends_with_its_out_of_fold_figures(sample, tmp_path):
    options = ["--folds", 0, 1, "--max_epochs", 3, "--accumulate_grad_batches", 2]
    said = run_script("train.py", "--data_dir", sample, *QUICK, *options, cwd=tmp_path).stdout
    assert re.search(r"11,1\d\d,\d{3} parameters; 41 photos, a fold validates on 8 of them; 3 epochs", said)
    assert "batches of 8 (2 parts x 4)" in said
    assert re.search(r"fold 0: \d+ s an epoch, done in about .*, all 2 folds in about", said)
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
    assert out_of_fold.set_index("image_id")["fold"].to_dict() == (
        folds[folds["fold"] < 2].set_index("image_id")["fold"].to_dict()
    )
    step_2 = run_script("generate_soft_labels.py", "--folds", 0, 1, "--precision", 32, cwd=tmp_path).stdout
    soft = pd.read_csv(tmp_path / "soft_labels.csv")
    out_of_fold = out_of_fold.set_index("image_id").loc[soft["image_id"]]
    np.testing.assert_allclose(out_of_fold[list(CLASSES)], soft[list(CLASSES)], atol=1e-5)
    auc = re.search(r"out-of-fold AUC of \d+ photos: ([\d.]+)", said).group(1)
    assert auc in step_2


def test_another_optimizer_goes_on_after_an_interruption(repo, sample, tmp_path):
    """RMSprop has no fused variant, which the resume point of Adam restores."""
    models, step = repo / "models.py", "    def training_step(self, batch, batch_idx):\n"
    edit(
        models,
        "torch.optim.Adam(parameters, lr=self.learning_rate, fused=True)",
        "torch.optim.RMSprop(parameters, lr=1e-4)",
    )
    edit(models, "import numpy as np\n", "import os\n\nimport numpy as np\n")
    once = "self.current_epoch == 1 and not os.path.exists('died')"
    edit(models, step, f"{step}        if {once}:\n            open('died', 'w').close()\n            os._exit(9)\n")
    edit(repo / "harness" / "callbacks.py", "RESUME_EVERY = 30", "RESUME_EVERY = 0")
    options = ["--folds", 0, "--max_epochs", 2]
    assert train(repo, sample, tmp_path, *options, check=False).returncode == 9
    assert "fold 0: going on after epoch 0" in train(repo, sample, tmp_path, *options).stdout
