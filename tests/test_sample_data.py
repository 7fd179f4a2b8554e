"""The drawn data set: reproducible, in the competition's layout, true to its lesions, and no colour card."""

import json
import re
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import QUICK, REPO, copy_recipe, edit, refusal, run_script, shared_folder
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tools.generate_sample_data import main, render_leaf, true_labels, with_mistakes, write_photo
from utils import CLASSES

KINDS = {"healthy": set(), "multiple_diseases": {"rust", "scab"}, "rust": {"rust"}, "scab": {"scab"}}


def draw(out, options=""):
    main(["--out", str(out), *"--n_train 12 --n_test 8 --photo_size 64 96".split(), *options.split()])
    return contents(out)


def contents(folder):
    """Every file below the folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """200 + 100 photos of 128 x 192 pixels."""
    size = "--n_train 200 --n_test 100 --photo_size 128 192"
    return shared_folder(tmp_path_factory, "drawn", lambda folder: draw(folder / "data", size)) / "data"


def read_labels(path):
    """image_id -> class name from a one-hot CSV."""
    frame = pd.read_csv(path, index_col="image_id")
    assert list(frame.columns) == list(CLASSES)
    assert (frame.sum(axis=1) == 1).all() and frame.isin([0, 1]).all(axis=None)
    return frame.idxmax(axis=1)


def all_true_labels(folder):
    """True labels of the training and the test photos."""
    labels = read_labels(folder / "train.csv")
    labels.update(pd.read_csv(folder / "wrong_labels.csv", index_col="image_id").true_label)
    return pd.concat([labels, read_labels(folder / "test_labels.csv")])


def test_the_same_options_draw_the_same_bytes_and_each_photo_is_one_of_its_own(tmp_path):
    one, other = draw(tmp_path / "one", "--threads 1"), draw(tmp_path / "seed", "--seed 7")
    assert len(one) == 27  # 20 photos, six CSV files, sample.json
    assert one == draw(tmp_path / "two", "--threads 3")
    photos = [name for name in one if name.endswith(".jpg")]
    assert len(photos) == 20 and all(one[name] != other[name] for name in photos)
    more = draw(tmp_path / "more", "--n_train 30")  # a photo does not depend on the number of photos
    labels, labels_of_more = all_true_labels(tmp_path / "one"), all_true_labels(tmp_path / "more")
    same = [f"images/{image_id}.jpg" for image_id, label in labels.items() if label == labels_of_more[image_id]]
    assert len(same) >= 3 and all(one[name] == more[name] for name in same)
    (tmp_path / "images").mkdir()
    for split, index in ((0, 0), (0, 1), (1, 0), (1, 1)):  # of one class, as drawn for the data set
        write_photo((split, index, "rust"), tmp_path, (64, 96), 1)
    assert len(set(contents(tmp_path / "images").values())) == 4


def test_layout(drawn):
    train, test = ([f"{split}_{index}" for index in range(n)] for split, n in (("Train", 200), ("Test", 100)))
    assert (drawn / "train.csv").read_text().startswith("image_id,healthy,multiple_diseases,rust,scab\nTrain_0,")
    assert list(pd.read_csv(drawn / "train.csv").image_id) == train
    assert list(pd.read_csv(drawn / "test_labels.csv").image_id) == test
    assert (drawn / "test.csv").read_text().split() == ["image_id", *test]
    quarters = [f"{image_id},0.25,0.25,0.25,0.25" for image_id in test]
    assert (drawn / "sample_submission.csv").read_text().split() == [",".join(["image_id", *CLASSES]), *quarters]
    assert {path.stem for path in (drawn / "images").iterdir()} == {*train, *test}
    sizes = [cv2.imread(str(path)).shape for path in (drawn / "images").iterdir()]
    portraits = sizes.count((192, 128, 3))
    assert sizes.count((128, 192, 3)) == 300 - portraits and 1 <= portraits <= 30


def test_labels_are_mixed_as_the_competitions_and_some_are_wrong(drawn):
    labels = all_true_labels(drawn)
    mixed = {"Train": (57, 10, 68, 65), "Test": (28, 5, 34, 33)}
    for split, counts in mixed.items():
        found = labels[labels.index.str.startswith(split)].value_counts().to_dict()
        assert found == dict(zip(CLASSES, counts, strict=True))
    assert set(true_labels(8, np.random.default_rng(0))) == set(CLASSES)
    assert true_labels(50, np.random.default_rng(0)) != true_labels(50, np.random.default_rng(1))
    wrong = pd.read_csv(drawn / "wrong_labels.csv", index_col="image_id")
    assert len(wrong) == 5 and (wrong.label != wrong.true_label).all()
    assert {*wrong.label, *wrong.true_label} <= {"healthy", "rust", "scab"}
    assert (read_labels(drawn / "train.csv")[wrong.index] == wrong.label).all()
    true = true_labels(24, np.random.default_rng(0))
    given = with_mistakes(true, np.random.default_rng(0))
    assert sum(a != b for a, b in zip(true, given, strict=True)) == 2  # the least there are


def test_lesions_agree_with_the_true_labels(drawn):
    lesions, labels = pd.read_csv(drawn / "lesions.csv"), all_true_labels(drawn)
    assert list(lesions.columns) == ["image_id", "kind", "x", "y", "radius"]
    found = lesions.groupby("image_id").kind.agg(set).to_dict()
    assert {image_id: found.get(image_id, set()) for image_id in labels.index} == labels.map(KINDS).to_dict()
    counts = lesions.groupby(["kind", "image_id"]).size()
    assert counts["rust"].between(5, 14).all() and counts["scab"].between(4, 10).all()


@pytest.mark.parametrize("label", ["rust", "scab", "multiple_diseases"])
@pytest.mark.parametrize("seed", range(4))
def test_spots_are_where_the_list_says_and_survive_downsampling(label, seed):
    """Against the same leaf drawn healthy, exactly the listed places differ, in the colour of their kind."""
    ill, spots = render_leaf(label, 256, 384, np.random.default_rng(seed))
    well, none = render_leaf("healthy", 256, 384, np.random.default_rng(seed))
    assert ill.shape == (256, 384, 3) and ill.dtype == np.uint8
    assert none == [] and {kind for kind, *_ in spots} == KINDS[label]
    assert all(0 < x < 384 and 0 < y < 256 and radius > 0 for _, x, y, radius in spots)
    y, x = np.mgrid[:256, :384]
    far = np.min([np.hypot(x - a, y - b) / radius for _, a, b, radius in spots], axis=0)
    assert np.array_equal(ill[far > 2.2], well[far > 2.2])

    ill, well = (cv2.resize(photo, (144, 96), interpolation=cv2.INTER_AREA).astype(int) for photo in (ill, well))
    assert (np.abs(ill - well).sum(axis=2) > 40).sum() > 10 * len(spots)  # more than 10 pixels each
    for kind, a, b, _ in spots:
        now, before = (photo[int(b * 96 / 256), int(a * 144 / 384)] for photo in (ill, well))
        if kind == "rust":
            assert ((now[0] - now[1:]) > (before[0] - before[1:]) + 25).all()  # more red than green, and than blue
        else:
            assert now.sum() < 0.8 * before.sum()


def test_lesions_are_in_pixels_of_the_written_photo(tmp_path):
    """Also on a portrait photo, whose width and height are exchanged."""
    (tmp_path / "images").mkdir()
    index = next(k for k in range(1000) if np.random.default_rng([3, 0, k]).random() < 0.04)
    rows = write_photo((0, index, "rust"), tmp_path, (96, 144), 3)
    photo = cv2.imread(str(tmp_path / "images" / f"Train_{index}.jpg"))[..., ::-1].astype(int)
    assert photo.shape == (144, 96, 3)
    orange = photo[..., 0] - photo[..., 2]
    assert np.mean([orange[int(y), int(x)] for _, _, x, y, _ in rows]) > np.median(orange) + 60


def test_mean_colour_does_not_give_the_label_away(drawn):
    """A model of nothing but each photo's channel means and deviations must stay weak."""
    labels = all_true_labels(drawn)
    photos = (cv2.imread(str(drawn / "images" / f"{image_id}.jpg")) for image_id in labels.index)
    features = np.array([np.concatenate(cv2.meanStdDev(photo)).ravel() for photo in photos])
    truth = labels.map(CLASSES.index).to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    guess = cross_val_predict(model, features, truth, cv=folds, method="predict_proba")
    auc = np.mean([roc_auc_score(truth == k, guess[:, k]) for k in range(len(CLASSES))])
    assert 0.5 < auc <= 0.80, f"{auc:.3f}"


def test_what_is_there_is_kept_finished_or_refused(tmp_path, capsys, monkeypatch):
    before = draw(tmp_path / "one")
    assert draw(tmp_path / "one") == before and "already there" in capsys.readouterr().out
    for name in ("train.csv", "test.csv", "images/Train_3.jpg"):  # as after an interruption
        (tmp_path / "one" / name).unlink()
    said = refusal(draw, tmp_path / "one", "--seed 8")  # would mix two data sets
    assert "--out" in said and "delete" in said
    written = []

    def watch(path, frame):
        written.append((path.name, len(list((tmp_path / "one" / "images").iterdir()))))
        frame.to_csv(path, index=False, lineterminator="\n")

    monkeypatch.setattr("tools.generate_sample_data.write_csv", watch)
    assert draw(tmp_path / "one") == before
    assert len(written) == 6 and written[-1] == ("train.csv", 20)  # or a later step would take a part for the whole
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train.csv").write_text("the real competition's\n")
    assert "delete" in refusal(draw, tmp_path / "foreign")
    assert contents(tmp_path / "foreign") == {"train.csv": b"the real competition's\n"}


@pytest.mark.slow
def test_a_folder_of_photos_goes_through_all_steps_after_the_edit_that_the_error_says(sample, tmp_path):
    """Three classes, one with a blank in its name; a PNG, equal names, a name that no image_id may have."""
    repo, own, new = copy_recipe(tmp_path / "repo"), tmp_path / "orchard", tmp_path / "rust"
    shutil.copytree(REPO / "tools", repo / "tools")
    labels = pd.read_csv(sample / "train.csv").set_index("image_id").idxmax(axis=1)
    for image_id, label in labels.replace({"multiple_diseases": "rust", "scab": "powdery mildew"}).items():
        (own / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(sample / "images" / f"{image_id}.jpg", own / label)
    (own / "rust" / "below").mkdir()
    for number in range(10):
        one = new / f"Test_{number}.jpg" if number else new / "=Test.jpg"
        one.parent.mkdir(exist_ok=True)
        shutil.copy(sample / "images" / f"Test_{number}.jpg", one)
    photo = next((own / "rust").glob("*.jpg"))
    cv2.imwrite(str(photo.with_suffix(".png")), cv2.imread(str(photo))[:, ::-1])
    shutil.move(photo.with_suffix(".png"), own / "rust" / "below")
    shutil.copy(photo, own / "rust" / f"below-{photo.name}")
    shutil.copy(photo, new / photo.name)  # as rust-Train_N, which is taken
    before = {path: path.read_bytes() for folder in (own, new) for path in folder.rglob("*.*")}

    def run(*words, status=0):
        done = run_script(*words, cwd=tmp_path, check=False, PYTHONPATH=str(repo))
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    for words, complaint in (
        (["rust"], "rust holds 0 folders: one for each class is needed"),
        (["orchard", "--test", "orchard/rust"], "--test and --out must not be in orchard"),
        (["orchard", "--out", "orchard/rust/data"], "--test and --out must not be in orchard"),
        (["nowhere"], "nowhere cannot be read (No such file"),
        (["orchard", "--test", "nowhere"], "orchard holds other classes"),
    ):
        assert complaint in run("tools.make_data_dir", *words, status=1)
    refused = run("tools.make_data_dir", "orchard", "--test", "rust", status=1)
    (line,) = re.findall(r"edit its line to (CLASSES = .*)\n$", refused)
    edit(repo / "utils.py", f"CLASSES = {json.dumps(CLASSES)[1:-1].join('()')}", line)
    assert "nowhere is no folder of photos" in run("tools.make_data_dir", "orchard", "--test", "nowhere", status=1)
    (own / "loose.jpg").write_bytes(photo.read_bytes())
    said = run("tools.make_data_dir", "orchard", "--test", "rust", "--out", "data")
    assert "note: 1 left out of orchard, as in no class: loose.jpg" in said
    (own / "loose.jpg").unlink()
    assert "43 labelled photos (healthy " in said and ", 11 without a label" in said
    data = tmp_path / "data"
    train, test = (pd.read_csv(data / f"{name}.csv") for name in ("train", "test"))
    assert list(train) == ["image_id", "healthy", "powdery mildew", "rust"]
    ids = [*train["image_id"], *test["image_id"]]
    assert len({image_id.casefold() for image_id in ids}) == len(ids) == 54
    assert sorted(f"{image_id}.jpg" for image_id in ids) == sorted(path.name for path in (data / "images").iterdir())
    for row in train.itertuples(index=False):
        kept = (data / "images" / f"{row[0]}.jpg").read_bytes()
        assert kept in [
            content for path, content in before.items() if own / train.columns[1:][np.argmax(row[1:])] in path.parents
        ]

    quick = ["--data_dir", "data", *QUICK, "--max_epochs", 2]
    run(str(repo / "train.py"), *quick)
    run(str(repo / "generate_soft_labels.py"), "--num_workers", 0)
    run(str(repo / "train.py"), *quick, "--soft_labels_filename", "soft_labels.csv", "--log_dir", "logs_submit_distill")
    run(str(repo / "generate_distilled_submission.py"), "--num_workers", 0)
    run(str(repo / "blend.py"))
    assert pd.read_csv(tmp_path / "submission_mix.csv")["image_id"].tolist() == test["image_id"].tolist()
    assert "AUC of" in run(str(repo / "compare.py"), "submission.csv", "--against", "submission_mix.csv")
    assert "powdery mildew" in run(str(repo / "compare.py"), "logs", "logs_submit_distill")
    run(str(repo / "error_analysis.py"), "--num_workers", 0, "--worst", 2)
    assert "powdery mildew" in run(str(repo / "predict.py"), "rust", "--num_workers", 0)
    assert before == {path: path.read_bytes() for folder in (own, new) for path in folder.rglob("*.*")}
    assert "data exists" in run("tools.make_data_dir", "orchard", "--out", "data", status=1)
