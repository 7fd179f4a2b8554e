"""Photos as people have them, damaged ones, and the cache of all photos of a data set."""

import errno
import io
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import unicodedata
from argparse import Namespace
from hashlib import sha256
from operator import attrgetter
from unittest.mock import patch

import cv2
import numpy as np
import pillow_heif
import pytest
from conftest import file_size_limit, refusal, run_script, start_script, wait_until, without_root
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
    return save(picture.transpose(TURNS[held]) if held > 1 else picture, kind, exif=exif, **options)


def as_phone():
    """A HEIC as phones write it: turned pixels, the turn in the container, and EXIF that says it once more."""
    heif, exif, file = pillow_heif.from_pillow(PHOTO.transpose(TURNS[6])), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    heif.info["exif"] = exif.tobytes()
    heif.save(file, quality=95)
    assert b"irot" in file.getvalue()
    return file.getvalue()


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
GREYS = (np.asarray(PHOTO.convert("L")) // 64 * 64).astype(np.uint8)
GREYS_ON_WHITE = Image.fromarray(np.where(GREYS == 64, 255, GREYS).astype(np.uint8))
HALF = Image.merge("RGBA", [*PHOTO.split(), Image.new("L", PHOTO.size, 128)])
HIDDEN = np.asarray(PHOTO.convert("RGBA")).copy()
HIDDEN[:, :72] = (0, 255, 0, 0)  # the left half is transparent, with a loud colour hidden there
HIDDEN = Image.fromarray(HIDDEN)
HIDDEN_GREY, COLOURS = HIDDEN.convert("LA"), PHOTO.quantize(256)
PALETTE, FLIPPED = save(COLOURS, "PNG", transparency=7), bytearray(save(kind="PNG"))
FLIPPED[len(FLIPPED) // 2] ^= 0x55
ANIMATION = save(COLOURS, "GIF", save_all=True, append_images=[COLOURS.rotate(180)])
CUT, NO_PHOTO = r"is damaged \(Premature end of JPEG file\)", "photo.jpg cannot be decoded as a photo"

REFUSED = {  # what is wrong: the file's bytes (None: no such file), what is said
    "missing": (None, "photo.jpg is missing$"),
    "a folder": ("folder", r"photo.jpg cannot be read \(Is a directory\)"),
    "named .JPG": ("upper", r"photo.jpg is missing \(there is photo.JPG: rename it\)"),
    "empty": (b"", r"photo.jpg is empty \(0 bytes\)"),
    "a web page": (b"<html>404</html>", rf"{NO_PHOTO} \(it is of no format"),
    "the first bytes only": (JPEG[:300], NO_PHOTO),
    "cut in the middle": (JPEG[: len(JPEG) // 2], CUT),
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
    "larger than memory": (b"P6\n40000 40000\n255\n" + bytes(99), NO_PHOTO),
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
    "bytes after the end marker": (JPEG + b"\0" * 40 + b"trailer", PHOTO, 2),
    "bytes before the end marker, as some cameras leave": (STRAY_AT_END, PHOTO, 2),
    "an embedded thumbnail": (insert_segment(JPEG, b"Exif\0\0" + save(PHOTO.resize((24, 16)))), PHOTO, 2),
    "a second picture behind the first, as phones write": (JPEG + save(PHOTO.rotate(180)), PHOTO, 2),
    "an embedded end marker": (insert_segment(JPEG, b"\xff\xd9\xff\xd9", 0xFE), PHOTO, 2),
    "a JPEG with a piece of a colour profile": (insert_segment(JPEG, BAD_ICC, 0xE2), PHOTO, 2),
    "grey": (save(PHOTO.convert("L")), PHOTO.convert("L"), 2),
    "CMYK": (save(PHOTO.convert("CMYK")), PHOTO, 2),
    "a HEIC, as phones write": (as_phone(), PHOTO, 3),
    **{f"{kind}, EXIF orientation 6": (turn(6, kind=kind, quality=95), PHOTO, 3) for kind in ("AVIF", "WEBP")},
    **{f"{kind}, EXIF orientation 6": (turn(6, kind=kind), PHOTO, 0) for kind in ("TIFF", "PNG")},
    **{kind: (save(kind=kind), PHOTO, 0) for kind in ("BMP", "JPEG2000")},
    **{f"{kind} of 16 bits": (encode(kind, DEEP), PHOTO, 0) for kind in (".png", ".tiff")},
    "a portrait PNG": (save(PORTRAIT, "PNG"), PORTRAIT, 0),
    "a grey PNG of 16 bits": (encode(".png", DEEP[..., 1]), PHOTO.getchannel(1), 0),
    "a PNG with a palette": (save(COLOURS, "PNG"), COLOURS, 0),
    "a PNG with an opaque alpha channel": (save(PHOTO.convert("RGBA"), "PNG"), PHOTO, 0),
    "a PNG with transparent parts": (save(HIDDEN, "PNG"), on_white(HIDDEN), 0),
    "a PNG that is half transparent everywhere": (save(HALF, "PNG"), on_white(HALF), 1),
    "a grey PNG with transparent parts": (save(HIDDEN_GREY, "PNG"), on_white(HIDDEN_GREY), 1),
    "a PNG with a transparent colour in its palette": (PALETTE, on_white(Image.open(io.BytesIO(PALETTE))), 0),
    "a grey PNG with a transparent grey": (save(Image.fromarray(GREYS), "PNG", transparency=64), GREYS_ON_WHITE, 0),
    "a grey TIFF with transparent parts": (save(HIDDEN_GREY, "TIFF"), on_white(HIDDEN_GREY), 1),
    "a WebP with transparent parts": (save(HIDDEN, "WEBP", lossless=True), on_white(HIDDEN), 1),
    "an animated GIF: its first picture": (ANIMATION, COLOURS, 0),
    "a line of 1 x 5000": (save(PHOTO.resize((5000, 1)), "PNG"), PHOTO.resize((5000, 1)), 0),
    "48 million pixels": (save(PHOTO.resize((8000, 6000))), PHOTO.resize((8000, 6000)), 2),
    **{f"EXIF orientation {n}": (turn(n), PHOTO, 2) for n in (1, *TURNS)},
    **{f"portrait, EXIF {n}": (turn(n, PORTRAIT), PORTRAIT, 2) for n in (1, *TURNS)},
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


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other permissions")
def test_a_photo_without_permission_is_named_a_link_followed_and_a_pipe_not_waited_for(tmp_path):
    path, link, pipe = (tmp_path / f"{name}.jpg" for name in ("photo", "link", "pipe"))
    path.write_bytes(JPEG)
    link.symlink_to("photo.jpg")
    assert load_photo(link, (8, 8)).any()
    path.chmod(0)
    with without_root():
        assert refusal(load_photo, path, (8, 8)) == f"error: {path} cannot be read (Permission denied)"
    os.mkfifo(pipe)
    assert refusal(load_photo, pipe, (8, 8)).endswith("pipe.jpg is no file")


# ---------------------------------------------------------------------------------------------- the image cache

N_PHOTOS = 6


@pytest.fixture
def photos(tmp_path):
    """A data directory with six photos."""
    (tmp_path / "images").mkdir()
    for i in range(N_PHOTOS):
        (tmp_path / "images" / f"Train_{i}.jpg").write_bytes(save(PHOTO.rotate(7 * i)))
    return tmp_path


def build(folder, size=(16, 24), n=N_PHOTOS, cache=None):
    return cache_images("train", [f"Train_{i}" for i in range(n)], folder, size, cache or folder / "cache", fit_photo)


def assert_right(images, folder, size=(16, 24)):
    for i in range(N_PHOTOS):
        np.testing.assert_array_equal(images[i], load_photo(folder / "images" / f"Train_{i}.jpg", size))


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


def test_the_cache_is_built_once_and_anew_when_photo_list_or_size_changes(photos, monkeypatch):
    assert_right(build(photos), photos)
    built, real = [], photos_room.build_cache
    monkeypatch.setattr(photos_room, "build_cache", lambda *arguments: built.append(arguments[1]) or real(*arguments))
    assert_right(build(photos), photos)
    assert not built
    (photos / "images" / "Train_3.jpg").write_bytes(save(Image.new("RGB", (40, 30))))
    assert build(photos)[3].max() == 0 and len(built) == 1
    assert len(build(photos, n=5)) == 5 and len(build(photos, (8, 8), n=5)) == 5 and len(built) == 3
    assert len(names(photos / "cache")) == 2  # one for each size: what was built before is replaced


def test_all_bad_photos_are_reported_before_anything_is_trained_or_written(sample, tmp_path):
    """A real start of train.py on a data set in which twelve of 41 photos are bad in three ways."""
    images = shutil.copytree(sample, tmp_path / "data") / "images"
    for i in range(0, 32, 4):
        (images / f"Train_{i}.jpg").unlink()
    for i, content in enumerate([b"", JPEG[:900], b"<html>", b"GIF89a"], 32):
        (images / f"Train_{i}.jpg").write_bytes(content)
    options = ["--data_dir", "data", "--image_size", 32, 64, "--weights", "none"]
    done = run_script("train.py", *options, cwd=tmp_path, check=False)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and said.startswith(f"error: {images}: Train_0.jpg is missing; Train_4.jpg is")
    assert said.count("Train_") == 12 and "Traceback" not in done.stderr
    for words in ("2.jpg is empty", "3.jpg is damaged (Premature end", "4.jpg cannot be decoded", "5.jpg cannot be"):
        assert f"Train_3{words}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "image_cache"]
    assert not names(tmp_path / "image_cache")


def test_a_bad_photo_leaves_the_caches_as_they_are_and_a_missing_folder_is_named(photos):
    build(photos, n=5)
    before = {path.name: path.read_bytes() for path in (photos / "cache").iterdir()}
    (photos / "images" / "Train_2.jpg").write_bytes(JPEG[:-20])
    (photos / "images" / "Train_3.jpg").unlink()
    said = refusal(build, photos)
    assert "Train_2.jpg is damaged (Premature end of JPEG file); Train_3.jpg is missing" in said
    assert {path.name: path.read_bytes() for path in (photos / "cache").iterdir()} == before
    assert f"{photos / 'none' / 'images'} is not a folder" in refusal(build, photos / "none")


BUILDER = """
import sys, time
from harness import photos
from dataset import fit_photo
folder, stop = sys.argv[1:]
decoded, real = [], photos.read_photo
def read_photo(path):
    if path.stem == stop and decoded:
        print("half", flush=True)
        time.sleep(600)
    time.sleep(0.05)
    decoded.append(path)
    return real(path)
print("ready", flush=True)
while not photos.Path("go").exists():
    time.sleep(0.01)
build = photos.build_cache
def build_cache(*arguments):
    photos.read_photo = read_photo
    build(*arguments)
photos.build_cache = build_cache
images = photos.cache_images("train", [f"Train_{i}" for i in range(6)], folder, (16, 24), folder + "/cache", fit_photo)
print(len(decoded), photos.sha256(images.array).hexdigest())
"""


def start_builder(photos, stop=""):
    """A process that builds the image cache once there is a file "go"; at the photo `stop` it says half and waits."""
    script = start_script("-c", BUILDER, photos, stop, cwd=photos)
    wait_until(lambda: "ready" in script.stdout, script)
    return script


def test_two_processes_build_the_cache_once_and_both_use_it(photos):
    scripts = [start_builder(photos) for _ in range(2)]
    (photos / "go").touch()
    assert [script.wait() for script in scripts] == [0, 0]
    digest = sha256(build(photos).array).hexdigest()
    assert sorted(script.stdout.splitlines()[-1] for script in scripts) == [f"0 {digest}", f"{N_PHOTOS} {digest}"]
    assert_right(build(photos), photos)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_build_that_is_killed_is_never_used_and_the_next_one_removes_its_rest(photos):
    (photos / "go").touch()
    script = start_builder(photos, stop="Train_4")
    wait_until(lambda: "half" in script.stdout, script)
    script.kill_group()
    assert script.wait() == -signal.SIGKILL
    left = names(photos / "cache")
    assert left and all(name.startswith(".") for name in left)
    images = build(photos)
    assert_right(images, photos)
    assert names(photos / "cache") == [images.path.name]


def as_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


CACHE_DAMAGE = {  # what is done to a cache file by hand, always: it is noticed, and built anew
    "cut": lambda content: content[:-1],
    "cut within its header": lambda content: content[:20],
    "emptied": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "an array of another size": lambda content: as_npy(np.zeros((6, 8, 8, 3), np.uint8)),
    "an array of another type": lambda content: as_npy(np.zeros((6, 16, 24, 3), np.int8)),
    "a pickle": lambda content: as_npy(np.array([None])),
    "a header of nonsense": lambda content: content[:10] + b"(" * 30 + content[40:],
}


@pytest.mark.parametrize("damage", CACHE_DAMAGE)
def test_a_cache_that_is_damaged_is_built_anew(photos, damage):
    path = build(photos).path
    whole = path.read_bytes()
    path.write_bytes(CACHE_DAMAGE[damage](whole))
    assert_right(build(photos), photos)
    assert path.read_bytes() == whole and names(photos / "cache") == [path.name]


def test_workers_share_the_cache_and_do_not_hold_it(photos):
    """What is sent to a spawned worker is the file's name, not the pixels; there it is a memory-mapped file again."""
    images = build(photos, (200, 300))
    assert type(images.array) is np.memmap and len(pickle.dumps(images)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(attrgetter("array.__class__.__name__"), [images]) == "memmap"
        assert pool.apply(attrgetter("array.nbytes"), [images]) == images.array.nbytes == N_PHOTOS * 200 * 300 * 3


def test_a_cache_dir_that_cannot_be_one_is_named_with_what_to_type(photos):
    (photos / "file").write_text("a file")
    for cache in (photos / "file", photos / "file" / "cache"):
        said = rf"error: cannot lock {re.escape(str(cache))}.*; name another folder with --cache_dir"
        assert re.fullmatch(said, refusal(build, photos, cache=cache))


def test_a_cache_that_has_no_room_is_refused_before_the_work_or_leaves_nothing(photos, small_disk, monkeypatch):
    build(photos, (8, 8), cache=small_disk)
    before = names(small_disk)
    said = refusal(build, photos, (200, 300), cache=small_disk)
    assert re.search(r"cannot write .*npy: it needs 0.00\d* GB, 0.00\d* GB are free; name .* with --cache_dir$", said)
    monkeypatch.setattr(photos_room.shutil, "disk_usage", lambda folder: Namespace(free=10**12))
    assert refusal(build, photos, (200, 300), cache=small_disk).endswith("npy: No space left on device")
    with file_size_limit(300_000):
        assert refusal(build, photos, (200, 300)).endswith("npy: File too large")
    assert names(small_disk) == before and not names(photos / "cache")
    assert_right(build(photos, (8, 8), cache=small_disk), photos, (8, 8))
    with patch.object(np.lib.format, "open_memmap", side_effect=OSError(errno.ENODEV, "No such device")):
        assert "another --cache_dir may help" in refusal(build, photos, (8, 8), cache=small_disk)
    decoded = []
    monkeypatch.setattr(photos_room, "read_photo", lambda path: decoded.append(path))
    with patch.object(np, "memmap", side_effect=OSError(errno.ENODEV, "No such device")):  # told before the work
        said = refusal(photos_room.build_cache, photos / "other.npy", [photos / "a.jpg"], (1, 8, 8, 3), None, "decode")
    assert "into memory (No such device); name another folder with --cache_dir" in said and not decoded


def test_a_cache_is_built_by_as_many_threads_as_there_are_cores_to_use(photos, monkeypatch):
    """os.cpu_count() tells those of the machine, not of the container or job; photos in work would fill the memory."""
    seen, pool = [], photos_room.ThreadPoolExecutor
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(photos_room, "ThreadPoolExecutor", lambda threads: seen.append(threads) or pool(threads))
    build(photos)
    assert seen == [len(os.sched_getaffinity(0))] if hasattr(os, "sched_getaffinity") else seen[0] < 64
