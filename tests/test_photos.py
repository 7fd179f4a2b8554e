"""Photos as people have them, damaged ones, and the cache of all photos of a data set."""

import io
import multiprocessing
import pickle
import re
import shutil
import struct
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import QUICK, refusal, refused, run_script
from PIL import Image

from dataset import fit_photo, load_photo
from harness import photos as photos_room
from harness.photos import cache_images

y, x = np.mgrid[:96, :144]
PHOTO = np.stack([x * 1.5, y * 2.2, 120 + 60 * np.sin(x / 20)], -1).astype(np.uint8)  # smooth, without symmetry
PHOTO[10:40, 15:60] = (220, 200, 40)
PHOTO = Image.fromarray(PHOTO)
PORTRAIT = PHOTO.rotate(90, expand=True)
# how a camera stores a picture, by its EXIF orientation; from 2 on, as 1 is upright
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"
TURNS = {held: Image.Transpose[name] for held, name in enumerate(TURNS.split(), 2)}


def save(picture=PHOTO, kind="JPEG", **options):
    """A Pillow picture as the bytes of a file; JPEG in best quality."""
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def turn(held, picture=PHOTO, kind="JPEG", **options):
    """`picture` as a camera held in another way stores it, with the EXIF orientation that says how it was held."""
    exif = Image.Exif()
    exif[0x0112] = held
    return save(picture.transpose(TURNS[held]) if held > 1 else picture, kind, exif=exif.tobytes(), **options)


def encode(kind, pixels):
    """Pixels as OpenCV has them, BGR, as the bytes of a file."""
    return cv2.imencode(kind, pixels)[1].tobytes()


def insert_segment(content, payload, marker=0xE1):
    """A JPEG with one more segment, of a kind that decoders skip, after its first two bytes."""
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + content[2:]


def on_white(picture):
    """What the eye sees of a picture with transparent parts on a white page."""
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return white.convert("RGB")


JPEG = save()
ROUGH = np.random.default_rng(0).integers(0, 60, (480, 720, 3), dtype=np.uint8)
LARGE = Image.fromarray(np.asarray(PHOTO.resize((720, 480))) // 2 + ROUGH)  # as much to code everywhere as in a leaf
LARGE, RESTARTED = save(LARGE), save(LARGE, restart_marker_rows=1)
START = RESTARTED.index(b"\xff\xd3", len(RESTARTED) // 2)  # of an interval between restart markers
LOST = RESTARTED[:START] + RESTARTED[RESTARTED.index(b"\xff\xd4", START) :]
STRAY, STRAY_AT_END = RESTARTED.replace(b"\xff\xd1", b"\1\2\3\xff\xd1", 1), JPEG[:-2] + b"\1\2\3" + JPEG[-2:]
DEEP = np.asarray(PHOTO)[:, :, ::-1].astype(np.uint16) * 257
BAD_ICC = b"ICC_PROFILE\0" + bytes([5, 2]) + b"x" * 20  # a piece of a colour profile that lacks the others: harmless
HIDDEN = np.asarray(PHOTO.convert("RGBA")).copy()
HIDDEN[:, :72] = (0, 255, 0, 0)  # the left half is transparent, with a loud colour hidden there
HIDDEN = Image.fromarray(HIDDEN)
PALETTE, FLIPPED = save(PHOTO.quantize(256), "PNG", transparency=7), bytearray(save(kind="PNG"))
FLIPPED[len(FLIPPED) // 2] ^= 0x55
CUT, NO_PHOTO = r"is damaged \(Premature end of JPEG file\)", "photo.jpg cannot be decoded as a photo"

REFUSED = {  # what is wrong: the file's bytes (None: no such file), what is said
    "missing": (None, "photo.jpg is missing$"),
    "a folder": ("folder", r"photo.jpg cannot be read \(Is a directory\)"),
    "named .JPG": ("upper", r"photo.jpg is missing \(there is photo.JPG: rename it\)"),
    "empty": (b"", r"photo.jpg is empty \(0 bytes\)"),
    "a web page": (b"<html>404</html>", rf"{NO_PHOTO} \(it is of no format"),
    "cut by a byte": (JPEG[:-1], CUT),
    "cut, then filled with zeros": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), r"photo.jpg is damaged \("),
    "a cut progressive JPEG": (save(progressive=True)[:-900], CUT),
    "zeros in the middle": (LARGE[:90_000] + bytes(512) + LARGE[90_512:], r"is damaged \(Corrupt JPEG data: "),
    "a block lost in the middle": (LARGE[:90_000] + LARGE[90_512:], r"photo.jpg is damaged \(Corrupt JPEG data: "),
    "data lost between restart markers": (LOST, r"is damaged \(.*instead of RST3\)"),
    "stray bytes between restart markers": (STRAY, r"is damaged \(.*3 extraneous bytes before marker 0xd1\)"),
    "cut, behind a harmless fault": (insert_segment(LARGE, BAD_ICC, 0xE2)[:-20_000], r"\(image file is truncated"),
    "a PNG with a byte changed": (FLIPPED, NO_PHOTO),
    **{f"a cut {kind}": (save(kind=kind)[:-100], NO_PHOTO) for kind in "PNG GIF WEBP TIFF AVIF HEIF BMP".split()},
    "raw, with a thumbnail first": (save(kind="TIFF", tiffinfo={254: 1}), "is a camera's raw file: convert it to"),
    "raw, a DNG": (save(kind="TIFF", tiffinfo={50706: b"\1\4\0\0"}), "is a camera's raw file"),
    "measurements": (encode(".tiff", (DEEP / 65535)[..., 0].astype(np.float32)), "holds measurements"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_faulty_photo_is_refused(tmp_path, fault):
    content, said = REFUSED[fault]
    path = tmp_path / "photo.jpg"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.with_suffix(".JPG" if content == "upper" else ".jpg").write_bytes(JPEG if content == "upper" else content)
    assert re.search(said, refusal(load_photo, path, (32, 48)))


BY_OPENCV = Image.fromarray(cv2.cvtColor(cv2.imdecode(np.frombuffer(LARGE, np.uint8), 1), cv2.COLOR_BGR2RGB))
FINE = {  # what is unusual: the file's bytes, the picture that it shows, the error allowed (of 255, on average)
    "plain": (JPEG, PHOTO, 2),
    "plain and large: what the checks let pass is decoded by OpenCV, to the bit": (LARGE, BY_OPENCV, 0),
    "progressive": (save(progressive=True), PHOTO, 2),
    "restart markers": (save(restart_marker_rows=1), PHOTO, 2),
    "bytes before the end marker, as some cameras leave": (STRAY_AT_END, PHOTO, 2),
    "an embedded thumbnail": (insert_segment(JPEG, b"Exif\0\0" + save(PHOTO.resize((24, 16)))), PHOTO, 2),
    "a second picture behind the first, as phones write": (JPEG + save(PHOTO.rotate(180)), PHOTO, 2),
    "a JPEG with a piece of a colour profile": (insert_segment(JPEG, BAD_ICC, 0xE2), PHOTO, 2),
    "grey": (save(PHOTO.convert("L")), PHOTO.convert("L"), 2),
    **{f"{kind}, EXIF orientation 6": (turn(6, kind=kind, quality=95), PHOTO, 3) for kind in ("HEIF", "AVIF", "WEBP")},
    **{f"{kind}, EXIF orientation 6": (turn(6, kind=kind), PHOTO, 0) for kind in ("TIFF", "PNG")},
    **{kind: (save(kind=kind), PHOTO, 0) for kind in ("BMP", "JPEG2000")},
    **{f"{kind} of 16 bits": (encode(kind, DEEP), PHOTO, 0) for kind in (".png", ".tiff")},
    "a portrait of a camera held upright": (turn(6, PORTRAIT), PORTRAIT, 2),
    "a grey PNG of 16 bits": (encode(".png", DEEP[..., 1]), PHOTO.getchannel(1), 0),
    "a PNG with transparent parts": (save(HIDDEN, "PNG"), on_white(HIDDEN), 0),
    "a PNG with a transparent colour in its palette": (PALETTE, on_white(Image.open(io.BytesIO(PALETTE))), 0),
    **{f"EXIF orientation {n}": (turn(n), PHOTO, 2) for n in (1, *TURNS)},
}
NOTED = {  # what of these is worth a note
    "bytes before the end marker, as some cameras leave": "Corrupt JPEG data: 3 extraneous bytes",
    "a JPEG with a piece of a colour profile": "Corrupt JPEG data: bad ICC marker",
}


@pytest.mark.parametrize("case", FINE)
def test_an_unusual_photo_shows_what_the_eye_sees(tmp_path, case, capsys):
    content, picture, error = FINE[case]
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    loaded = load_photo(path, (32, 48))
    expected = np.asarray(picture.convert("RGB"))
    if picture.height > picture.width:  # rows and columns exchanged, as the original did to all of unusual size
        expected = np.ascontiguousarray(expected.transpose(1, 0, 2))
    expected = cv2.resize(expected, (48, 32), interpolation=cv2.INTER_LINEAR)
    assert loaded.shape == (32, 48, 3) and loaded.dtype == np.uint8
    assert np.abs(loaded.astype(int) - expected).mean() <= error
    assert picture.mode != "L" or (loaded == loaded[:, :, :1]).all()
    said = capsys.readouterr().out
    assert f"note: photo.jpg may be damaged ({NOTED[case]}" in said if case in NOTED else not said


def test_a_portrait_photo_stays_upright_where_the_network_sees_portraits():
    upright = np.asarray(PORTRAIT)
    expected = cv2.resize(upright, (32, 48), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(fit_photo(upright, (48, 32)), expected)


# ---------------------------------------------------------------------------------------------- the image cache

N_PHOTOS = 6


@pytest.fixture
def photos(tmp_path):
    """A data directory with six photos."""
    (tmp_path / "images").mkdir()
    for i in range(N_PHOTOS):
        (tmp_path / "images" / f"Train_{i}.jpg").write_bytes(save(PHOTO.rotate(7 * i)))
    return tmp_path


@pytest.fixture
def built(monkeypatch):
    """The caches that are built, list of paths; each takes a while."""
    built, real = [], photos_room.build_cache

    def build_cache(path, *arguments):
        built.append(path)
        time.sleep(0.1)
        real(path, *arguments)

    monkeypatch.setattr(photos_room, "build_cache", build_cache)
    return built


def sharpen(photo):
    return photo


def fit(photo, image_size):
    return sharpen(fit_photo(photo, image_size))


def build(folder, size=(16, 24), n=N_PHOTOS, cache=None, fit=fit):
    return cache_images("train", [f"Train_{i}" for i in range(n)], folder, size, cache or folder / "cache", fit)


def assert_right(images, folder):
    for i in range(N_PHOTOS):
        np.testing.assert_array_equal(images[i], load_photo(folder / "images" / f"Train_{i}.jpg", (16, 24)))


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("in_csv, on_disk", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_with_accents_is_found_in_either_spelling(tmp_path, in_csv, on_disk):
    """A zip of a Mac spells é as e and an accent; one sees no difference."""
    image_id, name = (unicodedata.normalize(form, "feuille_é") for form in (in_csv, on_disk))
    assert name != image_id
    path = tmp_path / "images" / f"{name}.jpg"
    path.parent.mkdir()
    path.write_bytes(JPEG)
    images = cache_images("train", [image_id], tmp_path, (16, 24), tmp_path / "cache", fit_photo)
    np.testing.assert_array_equal(images[0], load_photo(path, (16, 24)))


def test_the_cache_is_built_once_and_anew_when_photo_list_or_size_changes(photos, built):
    for _ in range(2):
        assert_right(build(photos), photos)
    assert len(built) == 1
    (photos / "images" / "Train_3.jpg").write_bytes(save(Image.new("RGB", (40, 30))))
    assert build(photos)[3].max() == 0 and len(built) == 2
    assert len(build(photos, n=5)) == 5 and len(build(photos, (8, 8), n=5)) == 5 and len(built) == 4
    assert len(names(photos / "cache")) == 2  # one for each size: what was built before is replaced


def test_an_edit_of_what_makes_the_pixels_makes_a_new_cache(photos, built, monkeypatch):
    assert_right(build(photos), photos)
    assert_right(build(photos, fit=fit_photo), photos)  # other source
    assert len(built) == 2
    monkeypatch.setitem(globals(), "sharpen", lambda photo: 255 - photo)  # a helper, by what it makes of photos
    assert (build(photos)[0] == 255 - load_photo(photos / "images" / "Train_0.jpg", (16, 24))).all()
    monkeypatch.setattr(photos_room, "read_photo", lambda path: np.zeros((30, 40, 3), np.uint8))  # decoding
    assert build(photos)[0].min() == 255
    assert len(built) == 4 and len(names(photos / "cache")) == 1


def test_all_bad_photos_are_named_before_anything_is_trained_or_written(sample, tmp_path):
    images = shutil.copytree(sample, tmp_path / "data") / "images"
    for i in range(11):
        (images / f"Train_{i}.jpg").unlink()
    (images / "Train_11.jpg").write_bytes(JPEG[:-20])
    done = run_script("train.py", "--data_dir", "data", *QUICK, cwd=tmp_path, check=False)
    said = refused(done, f"error: {images}: Train_0.jpg is missing; Train_1.jpg is missing")
    assert said.endswith("; Train_10.jpg is missing; Train_11.jpg is damaged (Premature end of JPEG file)")
    assert names(tmp_path) == ["data", "image_cache"] and not names(tmp_path / "image_cache")


def test_two_at_once_build_the_cache_once_and_both_use_it(photos, built):
    with ThreadPoolExecutor(2) as pool:
        for images in pool.map(build, [photos] * 2):
            assert_right(images, photos)
    assert len(built) == 1


def test_a_cache_that_is_cut_or_no_array_of_photos_is_built_anew(photos):
    path = build(photos).path
    whole, other = path.read_bytes(), io.BytesIO()
    np.save(other, np.zeros((6, 8, 8, 3), np.uint8))
    for content in (whole[:-1], whole[:20], b"", other.getvalue()):
        path.write_bytes(content)
        assert_right(build(photos), photos)
        assert path.read_bytes() == whole


def test_workers_share_the_cache_and_do_not_hold_it(photos):
    """What is sent to a spawned worker is the file's name, not the pixels; there it is a memory-mapped file again."""
    images = build(photos, (200, 300))
    assert type(images.array) is np.memmap and len(pickle.dumps(images)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(attrgetter("array.__class__.__name__"), [images]) == "memmap"


def test_a_cache_that_can_be_nowhere_is_refused_with_what_to_type(photos, monkeypatch):
    assert f"{photos / 'none' / 'images'} is not a folder" in refusal(build, photos / "none")
    (photos / "file").write_text("a file")
    for cache in (photos / "file", photos / "file" / "cache"):
        said = rf"error: cannot lock {re.escape(str(cache))}.*; name another folder with --cache_dir"
        assert re.fullmatch(said, refusal(build, photos, cache=cache))
    monkeypatch.setattr(photos_room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    said = refusal(build, photos, (2000, 3000))
    assert re.search(r"cannot write .*npy: it needs 0.11 GB, 0.00 GB are free; name .* with --cache_dir$", said)
