"""Photos as people have them, damaged ones, and the cache of all photos of a data set."""

import errno
import io
import multiprocessing
import os
import pickle
import re
import signal
import struct
import unicodedata
from argparse import Namespace
from hashlib import sha256
from operator import attrgetter

import cv2
import numpy as np
import pytest
from conftest import file_size_limit, refusal, run_script, start_script, wait_until, without_root
from PIL import Image

from dataset import fit_photo, load_photo
from harness import photos as photos_room
from harness.photos import cache_images


def draw_photo():
    """A smooth picture of 96 x 144 pixels without symmetry, uint8 RGB."""
    y, x = np.mgrid[:96, :144]
    photo = np.stack([x * 1.5, y * 2.2, 120 + 60 * np.sin(x / 20)], -1).astype(np.uint8)
    photo[10:40, 15:60] = (220, 200, 40)
    return photo


PHOTO = Image.fromarray(draw_photo())
TURNS = {  # how a camera stores a picture, by its EXIF orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def save(picture=PHOTO, kind="JPEG", **options):
    """A Pillow picture as the bytes of a file; JPEG in best quality."""
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def turn(held, picture=PHOTO, kind="JPEG", **options):
    """`picture` as a camera held in another way stores it, with the EXIF orientation that says how it was held."""
    exif, stored = Image.Exif(), TURNS[held]
    exif[0x0112] = held
    return save(picture if stored is None else picture.transpose(stored), kind, exif=exif, **options)


def as_phone(picture=PHOTO):
    """A HEIC as phones write it: turned pixels, the turn in the container, and EXIF that says it once more."""
    import pillow_heif

    exif = Image.Exif()
    exif[0x0112] = 6
    heif = pillow_heif.from_pillow(picture.transpose(Image.Transpose.ROTATE_90))
    heif.info["exif"] = exif.tobytes()
    file = io.BytesIO()
    heif.save(file, quality=95)
    assert b"irot" in file.getvalue()
    return file.getvalue()


def insert_segment(content, payload, marker=0xE1):
    """A JPEG with one more segment, of a kind that decoders skip, after its first two bytes."""
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + content[2:]


def hide_colours(picture=PHOTO):
    """A picture whose left half is transparent, with a loud colour hidden there: RGBA."""
    pixels = np.asarray(picture.convert("RGBA")).copy()
    pixels[:, : picture.width // 2] = (0, 255, 0, 0)
    return Image.fromarray(pixels)


def on_white(picture):
    """What the eye sees of a picture with transparent parts on a white page."""
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return white.convert("RGB")


def reopen(content):
    return Image.open(io.BytesIO(content))


def lose_a_restart_interval(content):
    """A JPEG with restart markers that lacks what is between two of them."""
    start = content.index(b"\xff\xd3", len(content) // 2)
    return content[:start] + content[content.index(b"\xff\xd4", start) :]


def flip_a_byte(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :]


JPEG = save()
ROUGH = np.random.default_rng(0).integers(0, 60, (480, 720, 3), dtype=np.uint8)
LARGE = Image.fromarray(np.asarray(PHOTO.resize((720, 480))) // 2 + ROUGH)  # as much to code everywhere as in a leaf
LARGE, RESTARTED = save(LARGE), save(LARGE, restart_marker_rows=1)
DEEP = np.asarray(PHOTO)[:, :, ::-1].astype(np.uint16) * 257
BAD_ICC = b"ICC_PROFILE\0" + bytes([5, 2]) + b"x" * 20  # a piece of a colour profile that lacks the others: harmless
GREYS = Image.fromarray((np.asarray(PHOTO.convert("L")) // 64 * 64).astype(np.uint8))
HALF = Image.merge("RGBA", [*PHOTO.split(), Image.new("L", PHOTO.size, 128)])
PALETTE = save(PHOTO.quantize(256), "PNG", transparency=7)
CUT = r"is damaged \(Premature end of JPEG file\)"

REFUSED = {  # what is wrong: the file's bytes (None: no such file), what is said
    "missing": (None, "photo.jpg is missing$"),
    "a folder": ("folder", r"photo.jpg cannot be read \(Is a directory\)"),
    "named .JPG": ("upper", r"photo.jpg is missing \(there is photo.JPG: rename it\)"),
    "empty": (b"", r"photo.jpg is empty \(0 bytes\)"),
    "a web page": (b"<html>404</html>", r"photo.jpg cannot be decoded as a photo \(it is of no format"),
    "the first bytes only": (JPEG[:300], "photo.jpg cannot be decoded as a photo"),
    "cut in the middle": (JPEG[: len(JPEG) // 2], CUT),
    "cut by a byte": (JPEG[:-1], CUT),
    "cut, then filled with zeros": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), r"photo.jpg is damaged \("),
    "a cut progressive JPEG": (save(progressive=True)[:-900], CUT),
    "zeros in the middle": (LARGE[:90_000] + bytes(512) + LARGE[90_512:], r"is damaged \(Corrupt JPEG data: "),
    "a block lost in the middle": (LARGE[:90_000] + LARGE[90_512:], r"photo.jpg is damaged \(Corrupt JPEG data: "),
    "data lost between restart markers": (lose_a_restart_interval(RESTARTED), r"is damaged \(.*instead of RST3\)"),
    "stray bytes between restart markers": (
        RESTARTED.replace(b"\xff\xd1", b"\1\2\3\xff\xd1", 1),
        r"is damaged \(.*3 extraneous bytes before marker 0xd1\)",
    ),
    "cut, behind a harmless fault": (insert_segment(LARGE, BAD_ICC, 0xE2)[:-20_000], r"\(image file is truncated"),
    "a PNG with a byte changed": (flip_a_byte(save(kind="PNG")), "photo.jpg cannot be decoded as a photo"),
    **{
        f"a cut {kind}": (save(kind=kind)[:-100], "photo.jpg cannot be decoded as a photo")
        for kind in ("PNG", "GIF", "WEBP", "TIFF", "AVIF", "HEIF", "BMP")
    },
    "raw, with a thumbnail first": (save(kind="TIFF", tiffinfo={254: 1}), "is a camera's raw file: convert it to"),
    "raw, a DNG": (save(kind="TIFF", tiffinfo={50706: b"\1\4\0\0"}), "is a camera's raw file"),
    "measurements": (
        cv2.imencode(".tiff", (DEEP / 65535)[..., 0].astype(np.float32))[1].tobytes(),
        "holds measurements",
    ),
    "larger than memory": (b"P6\n40000 40000\n255\n" + bytes(99), "photo.jpg cannot be decoded as a photo"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_faulty_photo_is_refused(tmp_path, fault):
    content, said = REFUSED[fault]
    path = tmp_path / "photo.jpg"
    if content == "folder":
        path.mkdir()
    elif content == "upper":
        (tmp_path / "photo.JPG").write_bytes(JPEG)
    elif content is not None:
        path.write_bytes(content)
    assert re.search(said, refusal(load_photo, path, (32, 48)))


FINE = {  # what is unusual: the file's bytes, the picture that it shows, the error allowed (of 255, on average)
    "plain": (JPEG, PHOTO, 2),
    "progressive": (save(progressive=True), PHOTO, 2),
    "restart markers": (save(restart_marker_rows=1), PHOTO, 2),
    "bytes after the end marker": (JPEG + b"\0" * 40 + b"trailer", PHOTO, 2),
    "bytes before the end marker, as some cameras leave": (JPEG[:-2] + b"\1\2\3" + JPEG[-2:], PHOTO, 2),
    "an embedded thumbnail": (insert_segment(JPEG, b"Exif\0\0" + save(PHOTO.resize((24, 16)))), PHOTO, 2),
    "a second picture behind the first, as phones write": (JPEG + save(PHOTO.rotate(180)), PHOTO, 2),
    "an embedded end marker": (insert_segment(JPEG, b"\xff\xd9\xff\xd9", 0xFE), PHOTO, 2),
    "a JPEG with a piece of a colour profile": (insert_segment(JPEG, BAD_ICC, 0xE2), PHOTO, 2),
    "grey": (save(PHOTO.convert("L")), PHOTO.convert("L"), 2),
    "CMYK": (save(PHOTO.convert("CMYK")), PHOTO, 2),
    "a HEIC, as phones write": (as_phone(), PHOTO, 3),
    "an AVIF, EXIF orientation 6": (turn(6, kind="AVIF", quality=95), PHOTO, 3),
    "a WebP, EXIF orientation 6": (turn(6, kind="WEBP", quality=95), PHOTO, 3),
    "a TIFF, EXIF orientation 6": (turn(6, kind="TIFF"), PHOTO, 0),
    "a PNG, EXIF orientation 6": (turn(6, kind="PNG"), PHOTO, 0),
    "a BMP": (save(kind="BMP"), PHOTO, 0),
    "a JPEG 2000": (save(kind="JPEG2000"), PHOTO, 0),
    "a PNG of 16 bits": (cv2.imencode(".png", DEEP)[1].tobytes(), PHOTO, 0),
    "a TIFF of 16 bits": (cv2.imencode(".tiff", DEEP)[1].tobytes(), PHOTO, 0),
    "a grey PNG of 16 bits": (cv2.imencode(".png", DEEP[..., 1])[1].tobytes(), PHOTO.getchannel(1), 0),
    "a PNG with a palette": (save(PHOTO.quantize(256), "PNG"), PHOTO.quantize(256).convert("RGB"), 0),
    "a PNG with an opaque alpha channel": (save(PHOTO.convert("RGBA"), "PNG"), PHOTO, 0),
    "a PNG with transparent parts": (save(hide_colours(), "PNG"), on_white(hide_colours()), 0),
    "a PNG that is half transparent everywhere": (save(HALF, "PNG"), on_white(HALF), 1),
    "a grey PNG with transparent parts": (
        save(hide_colours().convert("LA"), "PNG"),
        on_white(hide_colours().convert("LA")),
        1,
    ),
    "a PNG with a transparent colour in its palette": (PALETTE, on_white(reopen(PALETTE)), 0),
    "a grey PNG with a transparent grey": (
        save(GREYS, "PNG", transparency=64),
        Image.fromarray(np.where(np.asarray(GREYS) == 64, 255, GREYS).astype(np.uint8)),
        0,
    ),
    "a grey TIFF with transparent parts": (
        save(hide_colours().convert("LA"), "TIFF"),
        on_white(hide_colours().convert("LA")),
        1,
    ),
    "a WebP with transparent parts": (save(hide_colours(), "WEBP", lossless=True), on_white(hide_colours()), 1),
    "an animated GIF: its first picture": (
        save(PHOTO.quantize(256), "GIF", save_all=True, append_images=[PHOTO.rotate(180).quantize(256)]),
        PHOTO.quantize(256),
        0,
    ),
    "a line of 1 x 5000": (save(PHOTO.resize((5000, 1)), "PNG"), PHOTO.resize((5000, 1)), 0),
    "48 million pixels": (save(PHOTO.resize((8000, 6000))), PHOTO.resize((8000, 6000)), 2),
    **{f"EXIF orientation {n}": (turn(n), PHOTO, 2) for n in TURNS},
    **{
        f"portrait, EXIF {n}": (turn(n, PHOTO.rotate(90, expand=True)), PHOTO.rotate(90, expand=True), 2) for n in TURNS
    },
}


@pytest.mark.parametrize("case", FINE)
def test_an_unusual_photo_shows_what_the_eye_sees(tmp_path, case):
    content, picture, error = FINE[case]
    path, size = tmp_path / "photo.jpg", (32, 48)
    path.write_bytes(content)
    loaded = load_photo(path, size)
    upright = np.asarray(picture.convert("RGB"))
    landscape = upright.transpose(1, 0, 2) if picture.height > picture.width else upright
    expected = cv2.resize(np.ascontiguousarray(landscape), size[::-1], interpolation=cv2.INTER_LINEAR)
    assert loaded.shape == (*size, 3) and loaded.dtype == np.uint8
    assert np.abs(loaded.astype(int) - expected).mean() <= error
    if case == "grey":
        assert (loaded == loaded[:, :, :1]).all()


def test_the_pixels_of_a_jpeg_are_opencvs_and_stray_bytes_are_worth_a_note(tmp_path, capsys):
    """What the checks let pass is decoded as ever, to the bit."""
    (tmp_path / "photo.jpg").write_bytes(LARGE)
    plain = cv2.cvtColor(cv2.resize(cv2.imread(str(tmp_path / "photo.jpg")), (48, 32)), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(load_photo(tmp_path / "photo.jpg", (32, 48)), plain)
    assert not capsys.readouterr().out
    (tmp_path / "photo.jpg").write_bytes(JPEG[:-2] + b"\1\2\3" + JPEG[-2:])
    load_photo(tmp_path / "photo.jpg", (32, 48))
    assert "note: photo.jpg may be damaged (Corrupt JPEG data: 3 extraneous bytes" in capsys.readouterr().out


def test_portrait_photos_are_transposed_and_others_only_resized(tmp_path):
    """Rows and columns exchanged, as the original did; but only portrait ones, it did so to all of unusual size."""
    corner = np.full((200, 300, 3), 60, np.uint8)
    corner[:100, 200:] = (0, 0, 255)  # BGR: red in the right upper corner
    cv2.imwrite(str(tmp_path / "landscape.png"), corner)
    cv2.imwrite(str(tmp_path / "portrait.png"), cv2.transpose(corner))
    landscape = load_photo(tmp_path / "landscape.png", (32, 48))
    np.testing.assert_array_equal(landscape, load_photo(tmp_path / "portrait.png", (32, 48)))
    assert landscape[2, 45].tolist() == [255, 0, 0] and landscape[2, 2].tolist() == [60, 60, 60]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other permissions")
def test_a_photo_without_permission_is_named_a_link_followed_and_a_pipe_not_waited_for(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    (tmp_path / "link.jpg").symlink_to("photo.jpg")
    assert load_photo(tmp_path / "link.jpg", (8, 8)).any()
    (tmp_path / "photo.jpg").chmod(0)
    with without_root():
        said = refusal(load_photo, tmp_path / "photo.jpg", (8, 8))
    assert said == f"error: {tmp_path / 'photo.jpg'} cannot be read (Permission denied)"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert refusal(load_photo, tmp_path / "pipe.jpg", (8, 8)).endswith("pipe.jpg is no file")


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
    image_id = unicodedata.normalize(in_csv, "feuille_é")
    name = unicodedata.normalize(on_disk, "feuille_é.jpg")
    assert name != f"{image_id}.jpg"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(JPEG)
    images = cache_images("train", [image_id], tmp_path, (16, 24), tmp_path / "cache", fit_photo)
    np.testing.assert_array_equal(images[0], load_photo(tmp_path / "images" / name, (16, 24)))


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
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "train.csv").write_bytes((sample / "train.csv").read_bytes())
    for i in range(41):
        if i % 4 or i > 30:
            content = (sample / "images" / f"Train_{i}.jpg").read_bytes()
            (data / "images" / f"Train_{i}.jpg").write_bytes(content)
    for i, content in enumerate([b"", JPEG[:900], b"<html>", b"GIF89a"]):
        (data / "images" / f"Train_{i + 32}.jpg").write_bytes(content)
    train = ["train.py", "--data_dir", data, "--image_size", 32, 64, "--weights", "none"]
    done = run_script(*train, cwd=tmp_path, check=False)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and said.startswith(f"error: {data / 'images'}: Train_0.jpg is missing; Train_4.jpg is")
    assert said.count("Train_") == 12 and "Traceback" not in done.stderr
    for words in (
        "32.jpg is empty",
        "33.jpg is damaged (Premature end",
        "34.jpg cannot be decoded",
        "35.jpg cannot be",
    ):
        assert f"Train_{words}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "image_cache"]
    assert not names(tmp_path / "image_cache")


def test_a_bad_photo_leaves_the_caches_as_they_are_and_a_missing_folder_is_named(photos, tmp_path):
    build(photos, n=5)
    before = {path.name: path.read_bytes() for path in (photos / "cache").iterdir()}
    (photos / "images" / "Train_2.jpg").write_bytes(JPEG[:-20])
    (photos / "images" / "Train_3.jpg").unlink()
    said = refusal(build, photos)
    assert "Train_2.jpg is damaged (Premature end of JPEG file); Train_3.jpg is missing" in said
    assert {path.name: path.read_bytes() for path in (photos / "cache").iterdir()} == before
    assert f"{tmp_path / 'none' / 'images'} is not a folder" in refusal(build, tmp_path / "none")


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
ids = ["Train_%d" % i for i in range(6)]
images = photos.cache_images("train", ids, folder, (16, 24), folder + "/cache", fit_photo)
print(len(decoded), photos.sha256(images.array.tobytes()).hexdigest(), flush=True)
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
    answers = [script.stdout.splitlines()[-1].split() for script in scripts]
    assert sorted(int(count) for count, _ in answers) == [0, N_PHOTOS]
    assert answers[0][1] == answers[1][1] == sha256(build(photos).array.tobytes()).hexdigest()
    assert_right(build(photos), photos)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_build_that_is_killed_is_never_used_and_the_next_one_removes_its_rest(photos):
    (photos / "go").touch()
    script = start_builder(photos, stop="Train_4")
    wait_until(lambda: "half" in script.stdout, script)
    script.kill_group()
    assert script.wait() == -signal.SIGKILL
    assert [name for name in names(photos / "cache") if name.startswith(".")] == names(photos / "cache") != []
    assert_right(build(photos), photos)
    assert len(names(photos / "cache")) == 1 and not names(photos / "cache")[0].startswith(".")


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
    path.write_bytes(CACHE_DAMAGE[damage](path.read_bytes()))
    assert_right(build(photos), photos)
    assert names(photos / "cache") == [path.name]


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
        said = refusal(build, photos, cache=cache)
        assert said.startswith(f"error: cannot lock {cache}") and said.endswith(
            "; name another folder with --cache_dir"
        )


def fail(error):
    def call(*_, **__):
        raise OSError(error, os.strerror(error))

    return call


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
    monkeypatch.setattr(photos_room.np.lib.format, "open_memmap", fail(errno.ENODEV))
    assert "another --cache_dir may help" in refusal(build, photos, (8, 8), cache=small_disk)


def test_a_cache_is_built_by_as_many_threads_as_there_are_cores_to_use(photos, monkeypatch):
    """os.cpu_count() tells those of the machine, not of the container or job; photos in work would fill the memory."""
    seen, pool = [], photos_room.ThreadPoolExecutor
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(photos_room, "ThreadPoolExecutor", lambda threads: seen.append(threads) or pool(threads))
    build(photos)
    assert seen == [len(os.sched_getaffinity(0))] if hasattr(os, "sched_getaffinity") else seen[0] < 64
