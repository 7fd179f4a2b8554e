"""predict.py on photos of all kinds: the numbers, and what becomes of bad ones."""

import os
import re
import sys

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
    # EXIF is needed for that: a network that was trained on flipped photos may not mind, but the picture is another one
    plain, camera, unmarked = (
        load_photo(tmp_path / f, (64, 96)).astype(int) for f in ("plain.png", "camera.jpg", "unmarked.jpg")
    )
    assert np.abs(camera - plain).mean() < 1 and np.abs(unmarked - plain).mean() > 5
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
    assert "error: bare holds no photo" in done.stderr.splitlines() and "its name is not UTF-8" in done.stderr
    assert "note: 1 left out of orchard, as no photos: orchard/notes.txt\n" in done.stdout
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


def fill(folder, names):
    """Make a folder with empty files of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_in_a_folder_what_is_a_photo_is_taken_and_nothing_else(trained, tmp_path, capsys):
    """By its name or its content; not what systems leave, nor what begins with a dot; links are followed, loops end."""
    content = (trained / "leaves" / "images" / "Test_1.jpg").read_bytes()
    photos = ["a.JPG", "b.jfif", "c", "d.dat", "deep/er/e.jpg", "linked/f.jpg", "g.png.download", "h.HEIC", "i.nef"]
    fill(tmp_path / "in", ["notes.txt", "film.mov", ".ipynb_checkpoints/a.jpg", "._a.JPG", ".DS_Store", "Thumbs.db"])
    fill(tmp_path / "in", ["__MACOSX/x.jpg", "@eaDir/x.jpg", "deep/desktop.ini"])
    (tmp_path / "in" / "film.mov").write_bytes(b"\0\0\0\x14ftypqt  " + bytes(3000))
    (tmp_path / "in" / "tune.wav").write_bytes(b"RIFF\0\0\1\0WAVEfmt " + bytes(3000))
    (tmp_path / "in" / "BMW.txt").write_text("BM is how a bitmap begins, too.")
    (tmp_path / "in" / "scan.exr").write_bytes(b"v/1\1" + bytes(3000))
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9", "wb") as file:  # latin-1; OpenCV cannot be asked about it
        file.write(b"P5 is how a grey picture begins, too.")
    with open(tmp_path / "in" / "huge.bin", "wb") as file:
        file.write(b"BM")
        file.truncate(40 * 10**9)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "deep" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to("self")
    for name in photos:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    found, empty = find_photos([tmp_path / "in"])
    assert [str(path.relative_to(tmp_path / "in")) for path in found] == sorted(photos) and empty == 0
    said = capsys.readouterr().out
    assert re.search(r"note: \d+ left out of .*, as no photos: .*/BMW.txt, .*/film.mov, ", said)  # hidden ones last
    assert find_photos([tmp_path / "in" / ".ipynb_checkpoints" / "a.jpg"])[0]  # what is named is taken
    fill(tmp_path / "only", [".hidden.jpg", "notes.txt"])
    assert find_photos([tmp_path / "only"]) == ([], 1)


def test_photos_that_cannot_be_decoded_are_errors_that_say_what_to_do(trained, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes((trained / "leaves" / "images" / "Test_1.jpg").read_bytes())
    (tmp_path / "in" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(3000))
    (tmp_path / "in" / "IMG_2").write_bytes(b"\0\0\0\x18ftypheic" + bytes(3000))
    (tmp_path / "in" / "DSC_3.NEF").write_bytes(b"MM\0*" + bytes(3000))
    done, found = predict_photos("in", trained=trained, cwd=tmp_path, check=False)
    assert done.returncode == 1 and found.index.tolist() == ["in/a.jpg"] and "Traceback" not in done.stderr
    for name, kind in (("IMG_1.HEIC", "HEIC"), ("IMG_2", "HEIC"), ("DSC_3.NEF", "raw")):
        said = f"error: in/{name} is a {kind} file, which cannot be read: convert it to JPEG or PNG"
        assert said in done.stderr.splitlines()


def test_where_nothing_can_be_written_is_told_before_the_work(trained, tmp_path):
    (tmp_path / "a.jpg").write_bytes((trained / "leaves" / "images" / "Test_1.jpg").read_bytes())
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which would become a file
    for output, said in (
        ("a.jpg/x.csv", "cannot write a.jpg/x.csv (cannot make the folder a.jpg: File exists): start this in another"),
        ("pipe", "cannot write pipe: it is no ordinary file"),
        (".", "cannot write .: it is a folder"),
    ):
        options = ["--log_dir", trained / "logs", "--folds", 0, "--num_workers", 0, "--output", output]
        done = run_script("predict.py", "a.jpg", *options, cwd=tmp_path, check=False)
        assert done.returncode == 1 and f"error: {said}" in done.stderr and "photos x" not in done.stderr
    (tmp_path / "submission.csv").mkdir()
    options = ["--log_dir", trained / "logs", "--folds", 0, "--num_workers", 0, "--cache_dir", tmp_path / "cache"]
    for step in ("generate_soft_labels.py", "error_analysis.py"):
        done = run_script(step, *options, cwd=tmp_path, check=False)
        assert done.returncode == 1 and "error: cannot write " in done.stderr and "out-of-fold:" not in done.stderr
        (tmp_path / "error_analysis.csv").mkdir(exist_ok=True)


@pytest.mark.parametrize("name", ["=1+1.jpg", "two\nlines.jpg", "red\x1b[31m.jpg"])
def test_a_photo_whose_name_would_do_harm_in_a_table_is_refused(trained, tmp_path, name):
    content = (trained / "leaves" / "images" / "Test_1.jpg").read_bytes()
    for one in (name, "fine.jpg"):
        (tmp_path / one).write_bytes(content)
    done, found = predict_photos(name, "fine.jpg", trained=trained, cwd=tmp_path, check=False)
    assert done.returncode == 1 and found.index.tolist() == ["fine.jpg"] and "rename it" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are in UTF-8")
def test_a_locale_that_is_not_utf_8_is_told_with_what_to_type(tmp_path):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_script("blend.py", "--limit", 3, cwd=tmp_path, cold=True, check=False, **locale)
    assert done.returncode == 2 and "type export PYTHONUTF8=1 first" in done.stderr.splitlines()[-1]
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    done = run_script("blend.py", cwd=os.fsdecode(folder), cold=True, check=False)
    assert done.returncode == 2 and "working directory" in done.stderr.splitlines()[-1]


def test_results_come_before_heat_maps_and_long_names_are_shortened(trained, tmp_path):
    content = (trained / "leaves" / "images" / "Test_1.jpg").read_bytes()
    names = ["叶" * 78, "叶" * 78 + "二", "x" * 250]
    for name in names:
        (tmp_path / f"{name}.jpg").write_bytes(content)
    photos = [f"{name}.jpg" for name in names]
    _, found = predict_photos(*photos, "--heat_maps", "maps", trained=trained, cwd=tmp_path)
    assert found.index.tolist() == photos
    maps = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert len(maps) == 3 and maps[0].startswith("0001-叶叶") and maps[2].startswith("0003-xxx")
    (tmp_path / "predictions.csv").unlink()
    (tmp_path / "full" / "0001-photo-healthy.jpg").mkdir(parents=True)  # in the way of one of the four possible names
    (tmp_path / "photo.jpg").write_bytes(content)
    for name in CLASSES:
        (tmp_path / "full" / f"0001-photo-{name}.jpg").mkdir(exist_ok=True)
    done, found = predict_photos("photo.jpg", "--heat_maps", "full", trained=trained, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "error: cannot write full/0001-photo-" in done.stderr and len(found) == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_name_that_the_terminal_cannot_show_ends_nothing(trained, tmp_path, encoding):
    (tmp_path / "叶.jpg").write_bytes((trained / "leaves" / "images" / "Test_1.jpg").read_bytes())
    (tmp_path / "日志").symlink_to(trained / "logs")
    options = ["--log_dir", "日志", "--folds", 0, "--num_workers", 0]
    done = run_script("predict.py", "叶.jpg", *options, cwd=tmp_path, cold=True, PYTHONIOENCODING=encoding)
    assert pd.read_csv(tmp_path / "predictions.csv")["image"].tolist() == ["叶.jpg"]
    assert "\\u53f6.jpg" in done.stdout and "Traceback" not in done.stderr


def test_what_is_named_is_found_once_and_in_order(tmp_path):
    for name in ("b.jpg", "a.PNG", "below/c.tiff", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    found, empty = find_photos([tmp_path / "b.jpg", tmp_path, tmp_path / "notes.md", tmp_path / "empty"])
    assert found == [tmp_path / name for name in ("b.jpg", "a.PNG", "below/c.tiff", "gone.jpg", "notes.md")]
    assert empty == 1
