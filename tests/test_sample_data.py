"""The drawn data set: reproducible, in the competition's layout, true to its lesions, and no colour card."""

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import run_script
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tools.generate_sample_data import main, render_leaf, true_labels, with_mistakes, write_photo
from utils import CLASSES

TINY = ["--n_train", "12", "--n_test", "8", "--photo_size", "64", "96"]
KINDS = {"healthy": set(), "multiple_diseases": {"rust", "scab"}, "rust": {"rust"}, "scab": {"scab"}}


def contents(folder):
    """Every file below the folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A data set of 200 + 100 photos of 128 x 192 pixels."""
    out = tmp_path_factory.mktemp("sample") / "data"
    main(["--out", str(out), "--n_train", "200", "--n_test", "100", "--photo_size", "128", "192"])
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of tiny data sets that differ in one argument each."""
    root = tmp_path_factory.mktemp("tiny")
    changes = {
        "one": ["--threads", "1"],
        "two": ["--threads", "3"],
        "seed": ["--seed", "7"],
        "more": ["--n_train", "30"],
    }
    for name, change in changes.items():
        main(["--out", str(root / name), *TINY, *change])
    return root


def read_labels(path):
    """image_id -> class name from a one-hot CSV."""
    frame = pd.read_csv(path, index_col="image_id")
    assert list(frame.columns) == list(CLASSES)
    assert (frame.sum(axis=1) == 1).all() and frame.isin([0, 1]).all(axis=None)
    return frame.idxmax(axis=1)


def all_true_labels(sample):
    """True labels of the training and the test photos."""
    labels = read_labels(sample / "train.csv")
    labels.update(pd.read_csv(sample / "wrong_labels.csv", index_col="image_id").true_label)
    return pd.concat([labels, read_labels(sample / "test_labels.csv")])


def test_same_arguments_same_bytes(tiny):
    one = contents(tiny / "one")
    assert len(one) == 27  # 20 photos, six CSV files, sample.json
    assert one == contents(tiny / "two")  # whatever the number of threads


def test_another_seed_differs(tiny):
    one, other = contents(tiny / "one"), contents(tiny / "seed")
    photos = [name for name in one if name.endswith(".jpg")]
    assert len(photos) == 20 and all(one[name] != other[name] for name in photos)


def test_photo_does_not_depend_on_the_number_of_photos(tiny):
    one, more = contents(tiny / "one"), contents(tiny / "more")
    labels = [all_true_labels(tiny / name) for name in ("one", "more")]
    same = [image_id for image_id in labels[0].index if labels[0][image_id] == labels[1][image_id]]
    assert len(same) >= 3
    for image_id in same:
        assert one[f"images/{image_id}.jpg"] == more[f"images/{image_id}.jpg"]


def test_splits_and_neighbours_are_different_photos(tmp_path):
    """Of one class, as drawn for the data set: by the seed, the split and the number."""
    (tmp_path / "images").mkdir()
    for split in (0, 1):
        for index in (0, 1):
            write_photo((split, index, "rust"), tmp_path, (64, 96), 1)
    photos = contents(tmp_path / "images")
    assert sorted(photos) == ["Test_0.jpg", "Test_1.jpg", "Train_0.jpg", "Train_1.jpg"]
    assert len(set(photos.values())) == 4


def test_layout(sample):
    rows = {"Train": 200, "Test": 100}
    ids = {split: [f"{split}_{index}" for index in range(n)] for split, n in rows.items()}
    assert list(pd.read_csv(sample / "train.csv").image_id) == ids["Train"]
    assert list(pd.read_csv(sample / "test_labels.csv").image_id) == ids["Test"]
    assert (sample / "test.csv").read_text().split() == ["image_id", *ids["Test"]]
    submission = pd.read_csv(sample / "sample_submission.csv")
    assert list(submission.columns) == ["image_id", *CLASSES] and list(submission.image_id) == ids["Test"]
    assert (submission[list(CLASSES)] == 0.25).all(axis=None)
    assert {path.stem for path in (sample / "images").iterdir()} == {*ids["Train"], *ids["Test"]}
    assert (sample / "train.csv").read_text().startswith("image_id,healthy,multiple_diseases,rust,scab\nTrain_0,")
    sizes = [cv2.imread(str(path)).shape for path in (sample / "images").iterdir()]
    portraits = sizes.count((192, 128, 3))
    assert sizes.count((128, 192, 3)) == 300 - portraits and 1 <= portraits <= 30


def test_class_mix(sample):
    labels = all_true_labels(sample)
    train = labels[labels.index.str.startswith("Train")].value_counts().to_dict()
    test = labels[labels.index.str.startswith("Test")].value_counts().to_dict()
    assert train == {"healthy": 57, "multiple_diseases": 10, "rust": 68, "scab": 65}
    assert test == {"healthy": 28, "multiple_diseases": 5, "rust": 34, "scab": 33}
    assert set(true_labels(8, np.random.default_rng(0))) == set(CLASSES)
    assert true_labels(50, np.random.default_rng(0)) != true_labels(50, np.random.default_rng(1))


def test_wrong_labels(sample):
    wrong = pd.read_csv(sample / "wrong_labels.csv", index_col="image_id")
    assert len(wrong) == 5 and (wrong.label != wrong.true_label).all()
    assert {*wrong.label, *wrong.true_label} <= {"healthy", "rust", "scab"}
    assert (read_labels(sample / "train.csv")[wrong.index] == wrong.label).all()
    true = true_labels(24, np.random.default_rng(0))
    given = with_mistakes(true, np.random.default_rng(0))
    assert sum(a != b for a, b in zip(true, given, strict=True)) == 2  # the least there are


def test_lesions_agree_with_the_true_labels(sample):
    lesions = pd.read_csv(sample / "lesions.csv")
    assert list(lesions.columns) == ["image_id", "kind", "x", "y", "radius"]
    found = lesions.groupby("image_id").kind.agg(set).to_dict()
    labels = all_true_labels(sample)
    assert {image_id: found.get(image_id, set()) for image_id in labels.index} == labels.map(KINDS).to_dict()
    counts = lesions.groupby(["kind", "image_id"]).size()
    assert counts["rust"].between(5, 14).all() and counts["scab"].between(4, 10).all()


@pytest.mark.parametrize("label", ["rust", "scab", "multiple_diseases"])
@pytest.mark.parametrize("seed", range(4))
def test_spots_are_where_the_list_says_and_survive_downsampling(label, seed):
    """Against the same leaf drawn healthy, exactly the listed places differ, in the colour of their kind."""
    ill, spots = render_leaf(label, 256, 384, np.random.default_rng(seed))
    well, none = render_leaf("healthy", 256, 384, np.random.default_rng(seed))
    assert none == [] and {kind for kind, *_ in spots} == KINDS[label]
    y, x = np.mgrid[:256, :384]
    far = np.min([np.hypot(x - a, y - b) / radius for _, a, b, radius in spots], axis=0)
    assert np.array_equal(ill[far > 2.2], well[far > 2.2])

    small = [cv2.resize(photo, (144, 96), interpolation=cv2.INTER_AREA).astype(int) for photo in (ill, well)]
    assert (np.abs(small[0] - small[1]).sum(axis=2) > 40).sum() > 10 * len(spots)  # more than 10 pixels each
    for kind, a, b, _ in spots:
        at = int(b * 96 / 256), int(a * 144 / 384)
        (red, green, blue), before = small[0][at], small[1][at]
        if kind == "rust":
            assert red - green > before[0] - before[1] + 25 and red - blue > before[0] - before[2] + 25
        else:
            assert red + green + blue < 0.8 * before.sum()


def test_size_and_type():
    photo, spots = render_leaf("multiple_diseases", 150, 100, np.random.default_rng(5))
    assert photo.shape == (150, 100, 3) and photo.dtype == np.uint8
    assert len(spots) >= 9  # five of rust and four of scab
    assert all(0 < x < 100 and 0 < y < 150 and radius > 0 for _, x, y, radius in spots)


def test_lesions_are_in_pixels_of_the_written_photo(tmp_path):
    """Also on a portrait photo, whose width and height are exchanged."""
    (tmp_path / "images").mkdir()
    index = next(k for k in range(1000) if np.random.default_rng([3, 0, k]).random() < 0.04)
    rows = write_photo((0, index, "rust"), tmp_path, (96, 144), 3)
    photo = cv2.imread(str(tmp_path / "images" / f"Train_{index}.jpg"))[..., ::-1].astype(int)
    assert photo.shape == (144, 96, 3)
    orange = photo[..., 0] - photo[..., 2]
    assert np.mean([orange[int(y), int(x)] for _, _, x, y, _ in rows]) > np.median(orange) + 60


def test_mean_colour_does_not_give_the_label_away(sample):
    """A model of nothing but each photo's channel means and deviations must stay weak."""
    labels = all_true_labels(sample)
    features = [
        np.concatenate(cv2.meanStdDev(cv2.imread(str(sample / "images" / f"{image_id}.jpg")))).ravel()
        for image_id in labels.index
    ]
    truth = labels.map(CLASSES.index).to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    guess = cross_val_predict(model, np.array(features), truth, cv=folds, method="predict_proba")
    auc = np.mean([roc_auc_score(truth == k, guess[:, k]) for k in range(len(CLASSES))])
    assert 0.5 < auc <= 0.80, f"{auc:.3f}"


def test_existing_folders(tiny):
    """As the user sees it: a finished data set is kept, anything else is refused in one line."""

    def run(*options):
        return run_script("tools.generate_sample_data", *TINY, *options, cwd=tiny, check=False)

    before = contents(tiny / "one")
    again = run("--out", str(tiny / "one"))
    assert again.returncode == 0 and "already there" in again.stdout
    other = run("--out", str(tiny / "one"), "--seed", "8")
    assert other.returncode == 1 and other.stdout == "" and other.stderr.count("\n") == 1
    assert "--out" in other.stderr and "delete" in other.stderr
    assert contents(tiny / "one") == before


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "train.csv").write_text("the real competition's\n")
    with pytest.raises(SystemExit, match="delete"):
        main(["--out", str(tmp_path), *TINY])
    assert contents(tmp_path) == {"train.csv": b"the real competition's\n"}


def test_interrupted_run_can_be_repeated(tiny):
    folder = tiny / "two"
    before = contents(folder)
    for name in ("train.csv", "test.csv", "images/Train_3.jpg"):
        (folder / name).unlink()
    with pytest.raises(SystemExit, match="delete"):
        main(["--out", str(folder), *TINY, "--seed", "8"])  # would mix two data sets
    main(["--out", str(folder), *TINY])
    assert contents(folder) == before


def test_train_csv_comes_last(tmp_path, monkeypatch):
    """So that a run that stops anywhere leaves a folder that no later step takes for a data set."""
    written = []

    def watch(path, frame):
        written.append((path.name, len(list((tmp_path / "images").iterdir()))))

    monkeypatch.setattr("tools.generate_sample_data.write_csv", watch)
    main(["--out", str(tmp_path), *TINY])
    assert len(written) == 6 and written[-1] == ("train.csv", 20)
