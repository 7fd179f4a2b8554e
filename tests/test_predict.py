"""predict.py on photos of all kinds: the numbers, and what becomes of bad ones."""

import os

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import run_script
from PIL import Image

import generate_soft_labels
from analysis.heat_maps import heat_maps
from dataset import load_photo, read_test
from harness.command_line import parse_args
from harness.log_dir import read_folds
from harness.tables import read_train_csv
from inference import load_trained, predict_out_of_fold, predict_test
from predict import find_photos
from utils import CLASSES, make_prediction_parser


def predict_photos(*photos, trained, cwd, check=True, cold=False):
    """Run predict.py with the trained fold: what it printed, and predictions.csv by image."""
    options = ["--log_dir", trained / "logs", "--folds", 0, "--num_workers", 0]
    done = run_script("predict.py", *photos, *options, cwd=cwd, check=check, cold=cold)
    return done, pd.read_csv(cwd / "predictions.csv").set_index("image")


@pytest.fixture
def run_of_fold_0(trained, tmp_path):
    """The arguments and networks that steps 2 and 4 would have of the trained fold."""
    options = ["--log_dir", str(trained / "logs"), "--cache_dir", str(tmp_path / "cache"), "--folds", "0"]
    args = parse_args(make_prediction_parser(generate_soft_labels.__doc__), [*options, "--num_workers", "0"])
    return args, load_trained(args)[1]


def test_a_training_photo_gets_its_out_of_fold_prediction(run_of_fold_0, trained, tmp_path):
    args, networks = run_of_fold_0
    train = read_train_csv(args.data_dir, CLASSES)
    expected = predict_out_of_fold(args, train, read_folds(args.log_dir, train["image_id"]), networks)
    expected = expected.set_index("image_id")
    assert len(expected) == 32
    photos = [trained / "leaves" / "images" / f"{name}.jpg" for name in expected.index[:5]]
    done, found = predict_photos(*photos, trained=trained, cwd=tmp_path, cold=True)
    assert found.index.tolist() == [str(photo) for photo in photos] and list(found.columns) == list(CLASSES)
    np.testing.assert_allclose(found, expected.iloc[:5], atol=1e-5)
    table = found.assign(prediction=found.idxmax(axis=1))[["prediction", *CLASSES]]
    for name, row in table.iterrows():
        shown = [name, row["prediction"], *(f"{probability:.3f}" for probability in row[list(CLASSES)])]
        assert shown in [line.split() for line in done.stdout.splitlines()]
    assert "wrote predictions.csv: 5 photos" in done.stdout


def test_with_tta_a_test_photo_gets_the_prediction_of_the_submission(run_of_fold_0, trained, tmp_path):
    args, networks = run_of_fold_0
    expected = predict_test(args, networks, *read_test(args)).set_index("image_id").loc[["Test_7", "Test_0"]]
    photos = [trained / "leaves" / "images" / f"{name}.jpg" for name in expected.index]
    _, found = predict_photos(*photos, "--tta", trained=trained, cwd=tmp_path)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    _, plain = predict_photos(*photos, trained=trained, cwd=tmp_path)
    assert np.abs(plain - found).to_numpy().max() > 1e-4


def test_size_orientation_and_format_do_not_matter_and_exif_is_respected(trained, tmp_path):
    photo = Image.open(trained / "leaves" / "images" / "Test_1.jpg").convert("RGB")
    assert photo.width > photo.height
    photo.save(tmp_path / "plain.png")
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise when it is shown
    turned.save(tmp_path / "camera.jpg", exif=exif, quality=100, subsampling=0)
    turned.save(tmp_path / "unmarked.jpg", quality=100, subsampling=0)
    photo.transpose(Image.Transpose.TRANSPOSE).save(tmp_path / "portrait.png")
    photo.resize((photo.width * 3, photo.height * 3), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    photo.convert("L").save(tmp_path / "grey.png")
    photo.convert("L").convert("RGB").save(tmp_path / "grey in colour.png")
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    _, found = predict_photos(tmp_path, trained=trained, cwd=tmp_path)
    of = {
        name: found.loc[str(tmp_path / name)].to_numpy() for name in map(lambda path: path.split("/")[-1], found.index)
    }
    assert len(of) == 8
    for name, tolerance in (("portrait.png", 0), ("alpha.png", 0), ("camera.jpg", 0.002), ("large.png", 0.01)):
        np.testing.assert_allclose(of[name], of["plain.png"], atol=tolerance + 1e-6)
    np.testing.assert_allclose(of["grey.png"], of["grey in colour.png"], atol=1e-6)
    # other pictures give other probabilities: a turned one, and one without colours
    assert np.abs(of["unmarked.jpg"] - of["plain.png"]).max() > 0.005
    assert np.abs(of["grey.png"] - of["plain.png"]).max() > 0.05


def test_bad_photos_are_reported_and_skipped_and_equal_names_stay_apart(trained, tmp_path):
    images = trained / "leaves" / "images"
    for folder, source in (("north", "Test_2"), ("south", "Test_3")):
        (tmp_path / "orchard" / folder).mkdir(parents=True)
        (tmp_path / "orchard" / folder / "leaf.jpg").write_bytes((images / f"{source}.jpg").read_bytes())
    (tmp_path / "orchard" / "south" / "broken.JPG").write_bytes(b"no photo")
    (tmp_path / "orchard" / "empty.png").touch()
    (tmp_path / "orchard" / "notes.txt").write_text("aphids\n")
    (tmp_path / "bare").mkdir()
    with open(os.fsencode(tmp_path / "orchard") + b"/bl\xe4tt.jpg", "wb") as file:  # latin-1, as old archives unpack
        file.write((images / "Test_2.jpg").read_bytes())
    options = ["--heat_maps", "maps"]
    done, found = predict_photos("orchard", "bare", "gone.jpg", *options, trained=trained, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for line in (
        "error: orchard/south/broken.JPG cannot be decoded as a photo",
        "error: orchard/empty.png is empty (0 bytes)",
        "error: gone.jpg is missing",
        "error: 4 of 6 photos could not be read, 1 folders held none, see above",
    ):
        assert line in done.stderr.splitlines()
    assert "error: bare holds no photo" in done.stderr and "its name is not UTF-8: rename it" in done.stderr
    assert "note: left out of orchard, as no photos: orchard/notes.txt\n" in done.stdout
    assert found.index.tolist() == ["orchard/north/leaf.jpg", "orchard/south/leaf.jpg"]
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    assert np.abs(found.iloc[0] - found.iloc[1]).max() > 1e-3
    predicted = found.idxmax(axis=1).tolist()
    pictures = sorted((tmp_path / "maps").iterdir())
    assert [path.name for path in pictures] == [f"0001-leaf-{predicted[0]}.jpg", f"0002-leaf-{predicted[1]}.jpg"]
    for path, source in zip(pictures, ("Test_2", "Test_3"), strict=True):
        photo = cv2.imread(str(images / f"{source}.jpg")).astype(int)
        assert np.abs(cv2.imread(str(path))[:, : photo.shape[1]] - photo).mean() < 6

    written = (tmp_path / "predictions.csv").read_bytes()
    done, _ = predict_photos("gone.jpg", trained=trained, cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "error: no photo could be read, nothing is written"
    assert (tmp_path / "predictions.csv").read_bytes() == written


def test_a_heat_map_is_laid_over_the_photo_as_it_was_taken(run_of_fold_0, trained, tmp_path):
    source = cv2.imread(str(trained / "leaves" / "images" / "Test_4.jpg"))
    portrait = cv2.transpose(source) if source.shape[0] < source.shape[1] else source
    cv2.imwrite(str(tmp_path / "tall.png"), portrait)
    _, found = predict_photos("tall.png", "--heat_maps", "maps", trained=trained, cwd=tmp_path)
    (path,) = (tmp_path / "maps").iterdir()
    drawn = cv2.imread(str(path))
    height, width = portrait.shape[:2]
    assert drawn.shape == (height, 2 * width, 3)
    left, right = drawn[:, :width].astype(int), drawn[:, width:].astype(int)
    assert np.abs(left - portrait).mean() < 6
    magenta = (right - left) @ [1, -2, 1]  # red and blue rise, green falls
    assert magenta.max() > 100 and np.percentile(np.abs(magenta), 5) < 40

    lying = load_photo(tmp_path / "tall.png", (64, 96))
    heat = heat_maps(run_of_fold_0[1][0], lying[None], [found.to_numpy().argmax()])[0]
    heat = cv2.resize(cv2.transpose(heat), (width, height))  # as the photo was taken: upright
    assert np.corrcoef(heat.ravel(), magenta.ravel())[0, 1] > 0.9


def test_what_is_named_is_found_once_and_in_order(tmp_path):
    for name in ("b.jpg", "a.PNG", "below/c.tiff", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    found, empty = find_photos([tmp_path / "b.jpg", tmp_path, tmp_path / "notes.md", tmp_path / "empty"])
    assert found == [tmp_path / name for name in ("b.jpg", "a.PNG", "below/c.tiff", "gone.jpg", "notes.md")]
    assert empty == 1
