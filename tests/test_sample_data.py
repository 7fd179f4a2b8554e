"""The drawn data set: reproducible, in the competition's layout, true to its lesions, and no colour card."""

import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import QUICK, REPO, edit, refusal, run_script, shared_folder
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from harness.files import write_csv
from tools.generate_sample_data import main, render_leaf, true_labels, write_photo
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


def true_labels_of(folder):
    """True labels of the training and the test photos: Series by image_id."""
    tables = [pd.read_csv(folder / f"{name}.csv", index_col="image_id") for name in ("train", "test_labels")]
    assert all(list(table) == list(CLASSES) for table in tables)
    labels = pd.from_dummies(pd.concat(tables)).squeeze()  # ValueError if they are not one-hot
    labels.update(pd.read_csv(folder / "wrong_labels.csv", index_col="image_id").true_label)
    return labels


def test_the_same_options_draw_the_same_bytes_and_each_photo_is_one_of_its_own(tmp_path):
    one, other = draw(tmp_path / "one"), draw(tmp_path / "seed", "--seed 7")
    assert len(one) == 27  # 20 photos, six CSV files, sample.json
    assert one == draw(tmp_path / "two")
    photos = [name for name in one if name.endswith(".jpg")]
    assert len(photos) == 20 and all(one[name] != other[name] for name in photos)
    more = draw(tmp_path / "more", "--n_train 30")  # a photo does not depend on the number of photos
    labels, labels_of_more = true_labels_of(tmp_path / "one"), true_labels_of(tmp_path / "more")
    same = [f"images/{image_id}.jpg" for image_id, label in labels.items() if label == labels_of_more[image_id]]
    assert len(same) >= 3 and all(one[name] == more[name] for name in same)
    (tmp_path / "images").mkdir()
    for split, index in ((0, 0), (0, 1), (1, 0), (1, 1)):  # of one class, as drawn for the data set
        write_photo((split, index, "rust"), tmp_path, (64, 96), 1)
    assert len(set(contents(tmp_path / "images").values())) == 4


def test_labels_are_mixed_as_the_competitions_and_some_are_wrong(drawn):
    labels = true_labels_of(drawn)
    for split, counts in {"Train": (57, 10, 68, 65), "Test": (28, 5, 34, 33)}.items():
        found = labels[[f"{split}_{index}" for index in range(sum(counts))]].value_counts().to_dict()
        assert found == dict(zip(CLASSES, counts, strict=True))
    assert set(true_labels(8, np.random.default_rng(0))) == set(CLASSES)
    assert true_labels(50, np.random.default_rng(0)) != true_labels(50, np.random.default_rng(1))
    wrong = pd.read_csv(drawn / "wrong_labels.csv", index_col="image_id")
    assert len(wrong) == 5 and (wrong.label != wrong.true_label).all()
    assert {*wrong.label, *wrong.true_label} <= {"healthy", "rust", "scab"}
    given = pd.from_dummies(pd.read_csv(drawn / "train.csv", index_col="image_id")).squeeze()
    assert (given[wrong.index] == wrong.label).all()


def test_lesions_agree_with_the_true_labels(drawn):
    lesions, labels = pd.read_csv(drawn / "lesions.csv"), true_labels_of(drawn)
    found = lesions.groupby("image_id").kind.agg(set).to_dict()
    assert {image_id: found.get(image_id, set()) for image_id in labels.index} == labels.map(KINDS).to_dict()


@pytest.mark.parametrize("label", ["rust", "scab", "multiple_diseases"])
@pytest.mark.parametrize("seed", range(4))
def test_spots_are_where_the_list_says_and_survive_downsampling(label, seed):
    """Against the same leaf drawn healthy, exactly the listed places differ, in the colour of their kind."""
    ill, spots = render_leaf(label, 256, 384, np.random.default_rng(seed))
    well, none = render_leaf("healthy", 256, 384, np.random.default_rng(seed))
    assert ill.shape == (256, 384, 3) and ill.dtype == np.uint8
    assert none == []
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


def test_some_photos_are_portraits_and_lesions_are_in_pixels_of_the_written_photo(drawn):
    photos = {path.stem: cv2.imread(str(path))[..., ::-1].astype(int) for path in (drawn / "images").iterdir()}
    portraits = [name for name, photo in photos.items() if photo.shape == (192, 128, 3)]
    assert len(photos) == 300 and 1 <= len(portraits) <= 30
    assert all(photos[name].shape == (128, 192, 3) for name in photos.keys() - portraits)
    lesions = pd.read_csv(drawn / "lesions.csv")
    of_rust = lesions[lesions.image_id.isin(portraits) & (lesions.kind == "rust")].groupby("image_id")
    assert len(of_rust) > 0
    for image_id, spots in of_rust:
        orange = photos[image_id][..., 0] - photos[image_id][..., 2]
        found = np.mean([orange[int(spot.y), int(spot.x)] for spot in spots.itertuples()])
        assert found > np.median(orange) + 60


def test_mean_colour_does_not_give_the_label_away(drawn):
    """A model of nothing but each photo's channel means and deviations must stay weak."""
    labels = true_labels_of(drawn)
    photos = (cv2.imread(str(drawn / "images" / f"{image_id}.jpg")) for image_id in labels.index)
    features = np.array([np.concatenate(cv2.meanStdDev(photo)).ravel() for photo in photos])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    guess = cross_val_predict(model, features, labels, method="predict_proba")
    assert 0.5 < roc_auc_score(labels, guess, multi_class="ovr") <= 0.80


def test_what_is_there_is_kept_finished_or_refused(tmp_path, capsys, monkeypatch):
    def interrupted(path, frame):
        assert path.name != "train.csv", "interrupted"
        write_csv(path, frame)

    with monkeypatch.context() as patched, pytest.raises(AssertionError, match="interrupted"):
        patched.setattr("tools.generate_sample_data.write_csv", interrupted)
        draw(tmp_path / "one")
    # train.csv is the last to be written, or a later step would take a part for the whole
    assert len(contents(tmp_path / "one")) == 26
    said = refusal(draw, tmp_path / "one", "--seed 8")  # would mix two data sets
    assert "--out" in said and "delete" in said
    assert draw(tmp_path / "one") == draw(tmp_path / "two")
    assert "already there" not in capsys.readouterr().out
    draw(tmp_path / "one")
    assert "already there" in capsys.readouterr().out
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train.csv").write_text("the real competition's\n")
    assert "delete" in refusal(draw, tmp_path / "foreign")
    assert contents(tmp_path / "foreign") == {"train.csv": b"the real competition's\n"}


@pytest.mark.slow
def test_a_folder_of_photos_goes_through_all_steps_after_the_edit_that_the_error_says(repo, sample, tmp_path):
    """Three classes, one with a blank in its name; a PNG, equal names, a name that no image_id may have."""
    own, new = tmp_path / "orchard", tmp_path / "rust"
    shutil.copytree(REPO / "tools", repo / "tools")
    labels = pd.from_dummies(pd.read_csv(sample / "train.csv", index_col="image_id")).squeeze()
    for image_id, label in labels.replace({"multiple_diseases": "rust", "scab": "powdery mildew"}).items():
        (own / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(sample / "images" / f"{image_id}.jpg", own / label)
    new.mkdir()
    for number, name in enumerate(["=Test", *(f"Test_{number}" for number in range(1, 10))]):
        shutil.copy(sample / "images" / f"Test_{number}.jpg", new / f"{name}.jpg")
    photo = next((own / "rust").glob("*.jpg"))
    (own / "rust" / "below").mkdir()
    cv2.imwrite(str(own / "rust" / "below" / f"{photo.stem}.png"), cv2.imread(str(photo))[:, ::-1])
    shutil.copy(photo, own / "rust" / f"below-{photo.name}")
    shutil.copy(photo, new / photo.name)  # as rust-Train_N, which is taken
    before = contents(own) | contents(new)

    def run(*words, status=0):
        done = run_script(*words, cwd=tmp_path, check=False, PYTHONPATH=str(repo))
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    for words, complaint in (
        (["rust"], "rust holds 0 folders: one for each class is needed"),
        (["orchard", "--test", "orchard/rust"], "--test and --out must not be in orchard"),
        (["orchard", "--out", "orchard/rust/data"], "--test and --out must not be in orchard"),
        (["nowhere"], "nowhere cannot be read (No such file"),
        (["orchard"], "orchard holds other classes than utils.py: edit its line to CLASSES = "),
    ):
        said = run("tools.make_data_dir", *words, status=1)
        assert complaint in said
    edit(repo / "utils.py", f"CLASSES = {json.dumps(CLASSES)[1:-1].join('()')}", said.split("its line to ")[1].strip())
    assert "nowhere is no folder of photos" in run("tools.make_data_dir", "orchard", "--test", "nowhere", status=1)
    (own / "loose.jpg").write_bytes(photo.read_bytes())
    said = run("tools.make_data_dir", "orchard", "--test", "rust", "--out", "data")
    assert "note: 1 left out of orchard, as in no class: loose.jpg" in said
    (own / "loose.jpg").unlink()
    assert "43 labelled photos (healthy " in said and ", 11 without a label" in said
    train, test = (pd.read_csv(tmp_path / "data" / f"{name}.csv", index_col="image_id") for name in ("train", "test"))
    ids, linked = [*train.index, *test.index], contents(tmp_path / "data" / "images")
    assert list(train) == ["healthy", "powdery mildew", "rust"]
    assert len({image_id.casefold() for image_id in ids}) == len(ids) == 54
    assert {f"{image_id}.jpg" for image_id in ids} == linked.keys()
    for image_id, label in pd.from_dummies(train).squeeze().items():
        assert linked[f"{image_id}.jpg"] in contents(own / label).values()

    quick = ["train.py", "--data_dir", "data", *QUICK, "--max_epochs", 2]
    again, one = ["--soft_labels_filename", "soft_labels.csv", "--log_dir", "logs_submit_distill"], ["--num_workers", 0]
    steps = (quick, ["generate_soft_labels.py", *one], [*quick, *again], ["generate_distilled_submission.py", *one])
    for script, *options in (*steps, ["blend.py"], ["error_analysis.py", *one, "--worst", 2]):
        run(str(repo / script), *options)
    assert pd.read_csv(tmp_path / "submission_mix.csv")["image_id"].tolist() == test.index.tolist()
    assert "AUC of" in run(str(repo / "compare.py"), "submission.csv", "--against", "submission_mix.csv")
    assert "powdery mildew" in run(str(repo / "compare.py"), "logs", "logs_submit_distill")
    assert "powdery mildew" in run(str(repo / "predict.py"), "rust", *one)
    assert before == contents(own) | contents(new)
    assert "data exists" in run("tools.make_data_dir", "orchard", "--out", "data", status=1)
