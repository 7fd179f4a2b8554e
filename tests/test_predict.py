"""predict.py on photos of all kinds: the numbers, and what becomes of bad ones."""

import argparse
import base64
import os
import re
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import refusal, run_script

import error_analysis
import generate_soft_labels
import predict
from analysis.heat_maps import heat_maps
from dataset import load_photo, read_test
from harness.console import InputError, parse_args
from inference import load_trained, predict_tta
from predict import find_photos
from utils import CLASSES, make_prediction_parser


@pytest.fixture(scope="module")
def run_of_fold_0(trained, tmp_path_factory):
    """The arguments and networks that steps 2 and 4 would have of the trained fold."""
    files = {"log_dir": trained / "logs", "data_dir": trained / "leaves", "cache_dir": tmp_path_factory.mktemp("cache")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    args = parse_args(make_prediction_parser(""), [*words, "--folds", "0", "--num_workers", "0"])
    return args, load_trained(args)[1]


@pytest.fixture
def classify(run_of_fold_0, tmp_path, monkeypatch, capsys):
    """A function that classifies photos in tmp_path by predict.py's main: what it prints, and predictions.csv by image."""
    of_fold_0, networks = run_of_fold_0

    def load_once(args):
        vars(args).update({name: value for name, value in vars(of_fold_0).items() if name not in args.typed})
        return None, networks

    def run(*words, refused=False):
        said = ""
        try:
            predict.main(parse_args(predict.make_photo_parser(), [str(word) for word in words]))
        except InputError as error:
            said = str(error)
        assert bool(said) == refused, said
        table = pd.read_csv("predictions.csv").set_index("image") if os.path.exists("predictions.csv") else None
        out, err = capsys.readouterr()
        return SimpleNamespace(stdout=out, errors=[*err.splitlines(), said], table=table)

    monkeypatch.setattr(predict, "load_trained", load_once)
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def leaf(trained):
    """The content of one photo."""
    return (trained / "leaves" / "images" / "Test_1.jpg").read_bytes()


def fill(folder, contents):
    """Write files below a folder: dict of name to content."""
    for name, content in contents.items():
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_a_training_photo_gets_its_out_of_fold_prediction(trained, tmp_path):
    """In a terminal that can show neither the photo's name nor the log directory's."""
    expected = pd.read_csv(trained / "logs" / "out_of_fold.csv").set_index("image_id")[list(CLASSES)]
    photos = [trained / "leaves" / "images" / f"{name}.jpg" for name in expected.index[:5]]
    (tmp_path / "叶.jpg").write_bytes(photos[0].read_bytes())
    (tmp_path / "日志").symlink_to(trained / "logs")
    options = ["--log_dir", "日志", "--folds", 0, "--num_workers", 0]
    done = run_script("predict.py", *photos, "叶.jpg", *options, cwd=tmp_path, PYTHONIOENCODING="ascii")
    found = pd.read_csv(tmp_path / "predictions.csv").set_index("image")
    assert found.index.tolist() == [*map(str, photos), "叶.jpg"] and list(found) == list(CLASSES)
    np.testing.assert_allclose(found, expected.iloc[[0, 1, 2, 3, 4, 0]], atol=1e-4)
    lines = [line.split() for line in done.stdout.splitlines()]
    for name, row in found.iterrows():
        assert [name.replace("叶", "\\u53f6"), row.idxmax(), *(f"{value:.3f}" for value in row)] in lines
    assert "wrote predictions.csv: 6 photos" in done.stdout and "Traceback" not in done.stderr


def test_with_tta_a_test_photo_gets_the_prediction_of_the_submission(classify, run_of_fold_0, trained):
    args, networks = argparse.Namespace(**vars(run_of_fold_0[0]) | {"limit": 8}), run_of_fold_0[1]
    expected = predict_tta(args, networks, *read_test(args)).set_index("image_id").loc[["Test_7", "Test_0"]]
    photos = [trained / "leaves" / "images" / f"{name}.jpg" for name in expected.index]
    with_tta = classify(*photos, "--tta").table
    np.testing.assert_allclose(with_tta, expected, atol=1e-5)
    for others in (["--tta", "--tta_draws", 2], []):
        assert np.abs(classify(*photos, *others).table - with_tta).to_numpy().max() > 1e-4


def test_bad_photos_and_names_are_reported_and_skipped_and_equal_names_stay_apart(classify, leaf, trained, tmp_path):
    north = (trained / "leaves" / "images" / "Test_2.jpg").read_bytes()
    contents = {"north/leaf.jpg": north, "south/leaf.jpg": leaf, "south/broken.JPG": b"no photo", "notes.txt": b"ants"}
    fill(tmp_path / "orchard", contents | {b"bl\xe4tt.jpg": leaf})  # latin-1, as old archives unpack
    harmful = ["=1+1.jpg", "two\nlines.jpg", "red\x1b[31m.jpg", "-leaf.jpg"]  # in a table or a terminal
    fill(tmp_path, dict.fromkeys(harmful, leaf))
    (tmp_path / "bare").mkdir()
    done = classify("orchard", "bare", "gone.jpg", *harmful[:-1], "--", harmful[-1], refused=True)
    found, errors = done.table, "\n".join(done.errors)
    for line in (
        "orchard/south/broken.JPG cannot be decoded as a photo",
        "gone.jpg is missing",
        "bare holds no photo",
        "5 of 9 photos could not be read, 1 folders held none, see above",
    ):
        assert f"error: {line}" in errors
    assert errors.count("no UTF-8, or invisible signs): rename it") == 3
    assert "note: 1 left out of orchard, as no photos: orchard/notes.txt\n" in done.stdout
    assert "\x1b" not in done.stdout + errors
    names = ["orchard/north/leaf.jpg", "orchard/south/leaf.jpg", "./=1+1.jpg", "./-leaf.jpg"]
    assert found.index.tolist() == names  # for a spreadsheet, no formulas
    assert np.abs(found.iloc[0] - found.iloc[1]).max() > 1e-3
    written = (tmp_path / "predictions.csv").read_bytes()
    assert classify("gone.jpg", refused=True).errors[-1] == "error: no photo could be read, nothing is written"
    said = classify("orchard/north/leaf.jpg", "--output", "orchard/north/leaf.jpg", refused=True).errors[-1]
    assert "is one of the photos" in said and (tmp_path / "orchard/north/leaf.jpg").read_bytes() == north
    assert (tmp_path / "predictions.csv").read_bytes() == written


def test_a_heat_map_is_laid_over_the_photo_as_it_was_taken(classify, run_of_fold_0, leaf, tmp_path):
    portrait = cv2.transpose(cv2.imdecode(np.frombuffer(leaf, np.uint8), cv2.IMREAD_COLOR))
    height, width = portrait.shape[:2]
    assert height > width and cv2.imwrite("tall.png", portrait)
    found = classify("tall.png", "--heat_maps", "maps").table
    drawn = cv2.imread(str(next((tmp_path / "maps").iterdir()))).astype(int)
    assert drawn.shape == (height, 2 * width, 3)
    left, right = drawn[:, :width], drawn[:, width:]
    assert np.abs(left - portrait).mean() < 6
    magenta = (right - left) @ [1, -2, 1]  # red and blue rise, green falls
    assert magenta.max() > 100 and np.percentile(np.abs(magenta), 5) < 40
    heat = heat_maps(run_of_fold_0[1][0], load_photo("tall.png", (64, 96))[None], [found.to_numpy().argmax()])[0]
    heat = cv2.resize(cv2.transpose(heat), (width, height))  # as the photo was taken: upright
    assert np.corrcoef(heat.ravel(), magenta.ravel())[0, 1] > 0.9


def test_results_come_before_heat_maps_which_are_no_photos_and_long_names_are_shortened(classify, leaf, tmp_path):
    fill(tmp_path, {"in/leaf.jpg": leaf})
    for options in (["--heat_maps", "in/maps"], ["--heat_maps", "in"], []):
        assert classify("in", *options).table.index.tolist() == ["in/leaf.jpg"]
    (name,) = os.listdir("in/maps")
    assert classify(f"in/maps/{name}").table.index.tolist() == [f"in/maps/{name}"]  # what is named is taken

    photos = [f"{name}.jpg" for name in ("叶" * 78, "叶" * 78 + "二", "x" * 250, "one/photo", "two/photo")]
    fill(tmp_path, dict.fromkeys(photos, leaf))
    found = classify(*photos, "--heat_maps", "maps").table
    stems = ["叶" * 50, "叶" * 50, "x" * 150, "photo", "photo"]
    maps = [f"000{k}-{stem}-{name}.jpg" for k, stem, name in zip(range(1, 6), stems, found.idxmax(axis=1), strict=True)]
    assert found.index.tolist() == photos and sorted(os.listdir("maps")) == maps
    for name in CLASSES:  # in the way, whatever is predicted
        (tmp_path / "full" / f"0001-photo-{name}.jpg").mkdir(parents=True)
    done = classify("one/photo.jpg", "--heat_maps", "full", refused=True)
    assert "error: cannot write full/0001-photo-" in done.errors[-1] and done.table.index.tolist() == ["one/photo.jpg"]


def test_in_a_folder_what_is_a_photo_is_taken_and_nothing_else(leaf, tmp_path, capsys):
    """By its name or its content; not what systems leave, nor what begins with a dot; links are followed, loops end."""
    photos = ["a.JPG", "b.jfif", "c", "d.dat", "deep/er/e.jpg", "linked/f.jpg", "g.png.download", "h.HEIC", "i.nef"]
    others = ["notes.txt", ".ipynb_checkpoints/a.jpg", "._a.JPG", "Thumbs.db", "__MACOSX/x.jpg", "deep/desktop.ini"]
    contents = dict.fromkeys(photos, leaf) | dict.fromkeys(others, b"")
    contents |= {"film.mov": b"\0\0\0\x14ftypqt  " + bytes(3000), "BMW.txt": b"BM is how a bitmap begins, too."}
    contents |= {"huge.bin": b"BM", b"caf\xe9": b"P5 is how a grey picture begins, too."}  # latin-1
    folder = tmp_path / "in"
    for place in (tmp_path / "elsewhere", folder / "deep"):
        place.mkdir(parents=True)
    for link, target in {"linked": tmp_path / "elsewhere", "deep/loop": folder, "self": "self"}.items():
        (folder / link).symlink_to(target)
    os.mkfifo(folder / "pipe")  # to read it would take for ever
    fill(folder, contents)
    os.truncate(folder / "huge.bin", 40 * 10**9)
    found, empty = find_photos([folder])
    assert [str(path.relative_to(folder)) for path in found] == sorted(photos) and empty == 0
    said = capsys.readouterr().out
    assert re.search(r"note: \d+ left out of .*, as no photos: .*/BMW.txt, .*/film.mov, ", said)  # hidden ones last
    fill(tmp_path / "only", {".hidden.jpg": leaf})
    assert find_photos([tmp_path / "only"]) == ([], 1)
    (folder / "deep" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    named = [folder / name for name in ("deep/er/e.jpg", "deep", ".ipynb_checkpoints/a.jpg", "notes.txt")]
    found = [path.name for path in find_photos(named)[0]]  # once, in order; what is named is taken
    assert found[:2] == ["e.jpg", "gone.jpg"] and found.count("e.jpg") == 1 and found[-2:] == ["a.jpg", "notes.txt"]


def test_where_nothing_can_be_written_is_told_before_the_work(classify, run_of_fold_0, leaf, tmp_path, monkeypatch):
    fill(tmp_path, {"a.jpg": leaf})
    for option in ("--output", "--heat_maps", "--page"):
        done = classify("a.jpg", option, "a.jpg/x", refused=True)
        assert "error: cannot write a.jpg/x" in done.errors[-1] and "photos x" not in "".join(done.errors)
    monkeypatch.setattr(generate_soft_labels, "load_trained", lambda args: run_of_fold_0)
    for script, name in ((generate_soft_labels, "submission-folds=0.csv"), (error_analysis, "error_analysis.csv")):
        (tmp_path / name).mkdir()
        assert f"cannot write {name}: it is a folder" in refusal(script.main, run_of_fold_0[0])


def test_the_page_shows_each_photo_its_probabilities_and_where_the_networks_looked(classify, leaf, trained, tmp_path):
    """It asks for nothing beside itself. How it is in a browser is tested in test_error_analysis.py."""
    photos = {f"<b>{k}.jpg": (trained / "leaves" / "images" / f"Test_{k}.jpg").read_bytes() for k in range(6)}
    fill(tmp_path / "in", photos)
    done = classify("in", "--page", "page.html", "--heat_maps", "maps")
    text, found = (tmp_path / "page.html").read_text(), done.table
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text) and "url(" not in text
    assert "<b>0.jpg" not in text and text.count("&lt;b&gt;") == 3 * 6
    shown = [base64.b64decode(uri) for uri in re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', text)]
    shown = [cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR) for picture in shown]
    for *both, path in zip(shown[::2], shown[1::2], sorted((tmp_path / "maps").iterdir()), strict=True):
        both = np.hstack(both)  # photo and map, as in the picture on disk
        assert np.abs(both.astype(int) - cv2.resize(cv2.imread(str(path)), both.shape[1::-1])).mean() < 6
    for (_, row), name in zip(found.iterrows(), found.idxmax(axis=1), strict=True):
        assert f"what speaks for <b>{name.replace('_', ' ')}</b>, {100 * row[name]:.0f}&nbsp;%" in text
