"""Photos: decoding, and a cache of all photos of a data set as the network sees them, decoded once."""

import glob
import inspect
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from unicodedata import normalize

import cv2
import numpy as np
import pillow_heif
import simplejpeg
from joblib import cpu_count  # of those that a container or a job may use
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from harness.console import InputError, raise_all, refusing, say
from harness.files import atomic_write, lock_file, remove

# What Pillow may read: formats that hold photos. It would also take others, from vector graphics to scientific data.
FORMATS = ("PNG", "TIFF", "WEBP", "BMP", "GIF", "AVIF", "HEIF", "JPEG2000", "PPM", "JPEG")
REDUCED, DNG_VERSION = 254, 50706  # TIFF tags: that the picture is a smaller copy of another, and what only a DNG has
# libjpeg's words, in simplejpeg's errors, for data that is lost or a decoder gone astray; then for what is harmless
JPEG_DAMAGE = (
    r"premature end|bad Huffman code|Unsupported (marker|JPEG process)|Bogus|Invalid JPEG file structure|Inconsistent"
    r"|instead of RST|\b\d{3,} extraneous bytes|extraneous bytes before marker 0x(?!d9)"
)
JPEG_WARNING = "Corrupt JPEG data|unknown JFIF|Unknown Adobe|Invalid SOS parameters"

pillow_heif.register_heif_opener()
# OpenCV is to be silent: we say ourselves what is wrong with a photo; the function has moved since 4.11
(getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel)(0)


def read_photo(path):
    """Decode one photo, turned as its EXIF orientation says: uint8 (height, width, 3), RGB.

    Its content decides the format; what is transparent becomes white. Raises InputError for a missing or damaged photo.
    """
    path, photo = Path(path), None
    with refusing(f"{path} cannot be read", OSError):
        if not path.exists():
            others = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
            there = "".join(f" (there is {other.name}: rename it)" for other in others[:1] if other != path)
            raise InputError(f"{path} is missing{there}")
        if not (content := path.read_bytes()):
            raise InputError(f"{path} is empty (0 bytes)")
    if content.startswith(b"\xff\xd8"):
        check_jpeg(path, content)
        photo = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    return decode_with_pillow(path) if photo is None else photo


def check_jpeg(path, content):
    """Raise InputError if a JPEG lacks a part, which OpenCV decodes to grey or shifted pixels."""
    try:  # the grey eighth-size picture needs all of the file's data, but a fifth of the time
        simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1, min_factor=8)
    except ValueError as warning:  # the first one; or simplejpeg does not know this kind of JPEG; then others decide
        if re.search(JPEG_DAMAGE, str(warning), re.I):
            raise InputError(f"{path} is damaged ({warning})") from warning
        if re.search(JPEG_WARNING, str(warning)):
            decode_with_pillow(path)  # a harmless warning hides what comes after it: a second opinion
            say(f"note: {path.name} may be damaged ({warning}): look at it")  # some cameras leave bytes too many


def decode_with_pillow(path):
    """The picture that a file holds, upright, transparent parts on white: uint8 (height, width, 3), RGB."""
    with refusing(f"{path} cannot be decoded as a photo", Exception):  # reading any file may raise anything
        open_with_pillow(path).verify()  # the checksums of a PNG
        picture = ImageOps.exif_transpose(open_with_pillow(path))
        if picture.mode.startswith("I;16"):  # grey of 16 bits, which Pillow would cut off at 255
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        if picture.mode in ("I", "F"):
            raise ValueError("it holds measurements, no colours: convert it to JPEG or PNG")
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture.convert("RGBA"))
            picture = white
        return np.array(picture.convert("RGB"))


def open_with_pillow(path):
    """A picture of Pillow, not yet decoded. Raises whatever Pillow raises, or ValueError."""
    try:
        picture = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError("it is of no format that is read here") from error
    tags = getattr(picture, "tag_v2", {})  # a camera's raw file is a TIFF that begins with a thumbnail
    if tags.get(REDUCED, 0) & 1 or DNG_VERSION in tags:
        raise ValueError("it is a camera's raw file: convert it to JPEG or PNG")
    return picture


class CachedImages:
    """The resized photos of a data set: a memory-mapped uint8 array (n, height, width, 3), RGB, that processes share."""

    def __init__(self, path):
        self.path, self.array = path, np.lib.format.open_memmap(path, mode="r")

    def __len__(self):
        return len(self.array)

    def __getitem__(self, row):
        return self.array[row]

    def __reduce__(self):  # a copy sent to a spawned worker opens the file again
        return CachedImages, (self.path,)


def cache_images(name, image_ids, data_dir, image_size, cache_dir, fit):
    """The photos `image_ids` of data_dir, decoded and resized once: CachedImages in their order.

    name: "train" or "test"; fit: fit_photo. Built anew if something changed. Raises InputError for bad photos or a full disk.
    """
    folder = Path(data_dir).resolve() / "images"
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: the photos should be there")
    photos, shape = photo_paths(folder, image_ids), (len(image_ids), *image_size, 3)
    family = f"{sha256(str(folder).encode()).hexdigest()[:8]}-{name}-{image_size[0]}x{image_size[1]}"
    cache = Path(cache_dir) / f"{family}-{cache_key(photos, image_size, fit)}.npy"
    if images := open_cache(cache, shape):
        return images
    with lock_file(cache.parent / f".{family}.lock", hint="; name another folder with --cache_dir"):
        if images := open_cache(cache, shape):  # another process has built it meanwhile
            return images
        for leftover in cache.parent.glob(f".{family}-*.part"):  # of a process that was killed
            remove(leftover)
        build_cache(cache, photos, shape, fit, f"decode {name} photos")
        for stale in set(cache.parent.glob(f"{family}-????????????????.npy")) - {cache}:
            with suppress(PermissionError):  # Windows: a running process still reads it
                stale.unlink()
    return open_cache(cache, shape)


def photo_paths(folder, image_ids):
    """The file of each photo, list of Path. A name may be spelt in either Unicode form: zips of a Mac spell é as e and ´."""
    forms = ([image_id, *(normalize(form, image_id) for form in ("NFC", "NFD"))] for image_id in image_ids)
    spelt = ([folder / f"{name}.jpg" for name in dict.fromkeys(names)] for names in forms)
    return [next((path for path in paths if paths[1:] and path.exists()), paths[0]) for paths in spelt]


def cache_key(photos, image_size, fit):
    """A digest of the names, sizes and times of photos (paths), and of what `fit` makes of them, 16 hexadecimal digits."""
    # the source alone would miss a helper that was edited, the photos a case that is not among them
    key = sha256(cv2.__version__.encode() + inspect.getsource(fit).encode())
    for path in photos:
        with suppress(OSError):  # a cache without it is never written: decoding it will tell what is wrong
            key.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    for path in photos[:: max(1, len(photos) // 2)]:
        with suppress(InputError):  # the same
            photo = read_photo(path)
            for turned in (photo, photo.transpose(1, 0, 2)):
                key.update(fit(np.ascontiguousarray(turned), tuple(image_size)).tobytes())
    return key.hexdigest()[:16]


def open_cache(path, shape):
    """The cache `path` as CachedImages; None if it does not exist, or is not one whole array of uint8 and `shape`."""
    with refusing(f"cannot read {path}", OSError, advice="; another --cache_dir may help"):
        try:
            images = CachedImages(path)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # or no array, or less of it than its header says
            return None
    return images if (images.array.shape, images.array.dtype) == (shape, np.uint8) else None


def build_cache(path, photos, shape, fit, title):
    """Decode `photos` (paths) into one array of `shape`, written whole or not at all, with a progress bar."""
    needed, free = np.prod(shape) / 1e9, shutil.disk_usage(path.parent).free / 1e9
    if needed > free:
        room = f"it needs {needed:.2f} GB, {free:.2f} GB are free"
        raise InputError(f"cannot write {path}: {room}; name another folder with --cache_dir")

    def attempt(photo):
        try:
            return fit(read_photo(photo), shape[1:3])
        except InputError as error:
            return error.message.removeprefix(f"{photo.parent}/")

    problems, at_once = [], 16 * cpu_count()  # not all: before a slow disk they would pile up in memory
    bar = tqdm(total=len(photos), desc=title, unit="photo")
    with atomic_write(path) as file, ThreadPoolExecutor(cpu_count()) as pool, bar:
        np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for start in range(0, len(photos), at_once):
            for decoded in pool.map(attempt, photos[start : start + at_once]):
                bar.update()
                if isinstance(decoded, str):
                    problems.append(decoded)
                elif not problems:
                    file.write(decoded)
        raise_all(photos[0].parent, problems, shown=None)
