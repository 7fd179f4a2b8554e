"""Photos: decoding, and a cache of all photos of a data set as the network sees them, decoded once."""

import io
import math
import os
import re
import shutil
import stat
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from joblib import cpu_count  # of those that a container or a job may use
from PIL import Image, ImageOps
from tqdm import tqdm

from harness.console import InputError, raise_all, say
from harness.files import atomic_write, lock_file, remove_leftovers
from harness.formats import (
    BEGINNINGS,
    FOREIGN_SUFFIXES,
    JPEG,
    PILLOW_ERRORS,
    SUFFIXES,
    WEAK_BEGINNINGS,
    foreign_format,
)
from harness.sources import definition_of

LARGEST = 2**30  # bytes of a file
# OpenCV is to be silent: we say ourselves what is wrong with a photo; the function has moved since 4.11
(getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel)(0)

# libjpeg's words, in simplejpeg's errors, for data that is lost or a decoder gone astray
JPEG_DAMAGE = re.compile(
    r"premature end|bad Huffman code|Unsupported (marker|JPEG process)|Bogus|Invalid JPEG file structure|Inconsistent"
    r"|instead of RST|\b\d{3,} extraneous bytes|extraneous bytes before marker 0x(?!d9)",
    re.I,
)
JPEG_WARNING = re.compile("Corrupt JPEG data|unknown JFIF|Unknown Adobe|Invalid SOS parameters")


class BadPhoto(ValueError):
    """What is wrong with a photo, without its name."""


def decode_photo(path):
    """Decode one photo, turned as its EXIF orientation says: uint8 (height, width, 3), RGB.

    Its content decides the format, not its name; grey, CMYK and 16-bit pictures become RGB of 8 bits, what is
    transparent becomes white. Raises BadPhoto if the file is missing, damaged, no picture, or in a foreign format.
    """
    path = Path(path)
    content = read_content(path)
    if not len(content):
        raise BadPhoto("is empty (0 bytes)")
    if name := foreign_format(path, content):
        raise BadPhoto(f"is a {name} file, which cannot be read: convert it to JPEG or PNG")
    check_jpeg(path, content)
    return decode(content)


def read_content(path, size=-1):
    """The bytes of a file, or the first `size` of them, uint8 (n,). Raises BadPhoto if it cannot be read."""
    try:
        found = os.stat(path)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # to read a pipe could take for ever
            raise BadPhoto("is no file")
        if size < 0 and found.st_size > LARGEST:
            raise BadPhoto(f"has {found.st_size / 1e9:.1f} GB, more than any photo")
        return np.fromfile(path, np.uint8, size)  # not imread: on Windows that fails for names beyond ASCII
    except FileNotFoundError as error:
        others = [path.with_name(path.stem + suffix) for suffix in (".JPG", ".jpeg", ".JPEG", ".png")]
        found = [f" (there is {other.name}: rename it)" for other in others if other.exists()]
        raise BadPhoto("is missing" + "".join(found[:1])) from error
    except OSError as error:
        raise BadPhoto(f"cannot be read: {error.strerror}") from error


def looks_like_photo(path):
    """Whether a file is meant to be a photo, readable or not: by its name, or by how it begins."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in FOREIGN_SUFFIXES:
        return True
    try:
        content = read_content(path, 4096)
        head = content[:12].tobytes()
        if foreign_format(path, content) or head.startswith(BEGINNINGS) or head[8:] in (b"WEBP", b"avif"):
            return True
        if head.startswith(WEAK_BEGINNINGS):  # as a text may begin, too: try it
            decode_photo(path)
            return True
    except BadPhoto:
        pass
    return False


def decode(content):
    """The picture that a file holds, uint8 (height, width, 3), RGB; content: its bytes, uint8 (n,). Raises BadPhoto."""
    head = content[:12].tobytes()
    if head[4:] == b"ftypavif":  # OpenCV would not turn it
        return lay_on_white(content)
    try:
        photo = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        limit = ": it has more than 2^30 pixels" if "MAX_IMAGE_PIXELS" in str(error) else ""
        raise BadPhoto(f"cannot be decoded as a photo{limit}") from error
    if photo is None:
        raise BadPhoto("cannot be decoded as a photo")
    return lay_on_white(content) if not head.startswith(JPEG) and is_transparent(content) else photo


def is_transparent(content):
    """Whether a picture that OpenCV can decode may have transparent parts, which hide any colour."""
    whole = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if whole is not None and whole.ndim == 3 and whole.shape[2] == 4:
        return whole[..., 3].min() < (np.iinfo(whole.dtype).max if whole.dtype.kind == "u" else 1)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return picture.has_transparency_data
    except PILLOW_ERRORS:  # it does not know the format
        return False


def lay_on_white(content):
    """A picture as Pillow decodes it, transparent parts on white: uint8 (height, width, 3), RGB. Raises BadPhoto."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
    except PILLOW_ERRORS as error:
        raise BadPhoto(f"cannot be decoded as a photo with transparent parts ({error}): convert it to JPEG") from error
    white = Image.new("RGBA", upright.size, "white")
    white.alpha_composite(upright)
    return np.array(white.convert("RGB"))


def read_photo(path):
    """`decode_photo`, but raises InputError, naming the file."""
    try:
        return decode_photo(path)
    except BadPhoto as problem:
        raise InputError(f"{path} {problem}") from problem


def check_jpeg(path, content):
    """Raise BadPhoto if `content`, uint8 (n,), is a JPEG that lacks a part, which OpenCV decodes to grey or shifted pixels.

    The grey eighth-size picture needs all of the file's data, but a fifth of the time. A few bytes too many before the
    end are worth a note only: some cameras leave them, and few damages do.
    """
    if content[:2].tobytes() != JPEG:
        return
    try:
        simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1, min_factor=8)
    except ValueError as warning:  # the first one; or simplejpeg does not know this kind of JPEG; then OpenCV decides
        if JPEG_DAMAGE.search(str(warning)):
            raise BadPhoto(f"is damaged ({warning})") from warning
        if not JPEG_WARNING.search(str(warning)):
            return
        try:  # a harmless warning hides what comes after it: a second opinion
            Image.open(io.BytesIO(content)).load()
        except PILLOW_ERRORS as error:
            raise BadPhoto(f"is damaged ({error})") from error
        say(f"note: {path.name} may be damaged ({warning}): look at it")


class CachedImages:
    """The resized photos of a data set as one memory-mapped uint8 array (n, height, width, 3), RGB.

    rows: those to take, if not all. All processes share the pages of one file; a copy sent to a spawned worker opens the
    file again.
    """

    def __init__(self, path, rows=None):
        self.path, self.rows = path, rows
        self.array = np.lib.format.open_memmap(path, mode="r")

    def __len__(self):
        return len(self.array if self.rows is None else self.rows)

    def __getitem__(self, row):
        return self.array[row if self.rows is None else self.rows[row]]

    def __reduce__(self):
        return CachedImages, (self.path, self.rows)


def digest_photos(images, rows):
    """SHA-256 of the pixels of some rows of `images`, as hexadecimal digits: the same whichever cache they come from."""
    pixels = sha256()
    for row in rows:
        pixels.update(images[row])
    return pixels.hexdigest()


def cache_images(name, image_ids, all_ids, data_dir, image_size, cache_dir, fit):
    """The photos `image_ids` of data_dir, decoded and resized once: CachedImages in the order of `image_ids`.

    all_ids: those of the whole data set; if all are in a cache already, it is used, else one of `image_ids` is made.
    fit: the recipe's function of a photo and image_size, uint8 (height, width, 3) of any size to one of image_size.
    The file is named after `name` ("train" or "test") and a key over the photos' names, sizes and times and over what
    `fit` does, so that a changed photo, list, size or `fit` is built anew; it replaces the one built before of the same
    folder and size. Raises InputError with all photos that are missing or cannot be decoded, or when the disk is full.
    """
    folder = Path(data_dir).resolve() / "images"
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: the photos should be there")
    image_ids, all_ids = list(image_ids), list(all_ids)
    if image_ids != all_ids:
        whole = open_cache(*locate_cache(name, all_ids, folder, image_size, cache_dir, fit)[:2])
        if whole is not None:
            rows = {image_id: row for row, image_id in enumerate(all_ids)}
            return CachedImages(whole.path, [rows[image_id] for image_id in image_ids])
        name = f"{name}-limit={len(image_ids)}"
    cache, shape, family = locate_cache(name, image_ids, folder, image_size, cache_dir, fit)
    images = open_cache(cache, shape)
    if images is not None:
        return images
    lock, hint = cache.parent / f".{family}.lock", "; name another folder with --cache_dir"
    with lock_file(lock, hint=hint):  # a second process waits here, then finds the file
        images = open_cache(cache, shape)
        if images is not None:
            return images
        if cache.exists():
            say(f"note: {cache} is damaged; it is built anew")
        remove_leftovers(cache.parent, f"{family}-*.npy")
        build_cache(cache, photo_paths(folder, image_ids), shape, fit, f"decode {name} photos")
        for stale in set(cache.parent.glob(f"{family}-????????????????.npy")) - {cache}:
            with suppress(PermissionError):  # Windows: a running process still reads it
                stale.unlink()
    return CachedImages(cache)


def photo_paths(folder, image_ids):
    """The file of each photo, list of Path. A name may be spelt in either Unicode form: zips of a Mac spell é as e and ´."""
    paths = []
    for image_id in image_ids:
        path = folder / f"{image_id}.jpg"
        if not image_id.isascii() and not path.exists():
            others = [folder / unicodedata.normalize(form, path.name) for form in ("NFC", "NFD")]
            path = next((other for other in others if other.exists()), path)
        paths.append(path)
    return paths


def locate_cache(name, image_ids, folder, image_size, cache_dir, fit):
    """Path and shape of the cache of these photos, and what its name begins with, as of all that it would replace."""
    key, paths = sha256(cv2.__version__.encode()), photo_paths(folder, image_ids)
    for path in paths:
        try:
            stat = path.stat()
            key.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        except OSError:  # no cache has this key; decoding the photos will tell what is wrong with them
            key.update(f"{path.name} cannot be found\n".encode())
    key.update(probe_fit(fit, paths[:: max(1, len(paths) // 2)], image_size))
    family = f"{sha256(str(folder).encode()).hexdigest()[:8]}-{name}-{image_size[0]}x{image_size[1]}"
    return Path(cache_dir) / f"{family}-{key.hexdigest()[:16]}.npy", (len(paths), *image_size, 3), family


def probe_fit(fit, paths, image_size):
    """What `fit` does, as bytes: its source, and what decoding and fitting make of some photos, as they are and turned.

    The source alone would miss a helper or a constant that was edited, the photos a case that is not among them.
    """
    key = sha256(definition_of(fit).encode())
    for path in paths:
        with suppress(BadPhoto, OSError):  # reported when the cache is built
            photo = decode(np.fromfile(path, np.uint8))
            for turned in (photo, np.ascontiguousarray(photo.transpose(1, 0, 2))):
                key.update(np.ascontiguousarray(fit(turned, tuple(image_size))).tobytes())
    return key.digest()


def open_cache(path, shape):
    """The cache `path` as CachedImages; None if it does not exist, or is not one whole array of uint8 and `shape`."""
    try:
        images = CachedImages(path)
        size = images.array.offset + images.array.nbytes
        whole = images.array.shape == shape and images.array.dtype == np.uint8 and path.stat().st_size == size
        return images if whole else None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no array, or less of it than its header says
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def build_cache(path, photos, shape, fit, title):
    """Decode `photos` (paths) into one array of `shape`, written whole or not at all, with a progress bar.

    Raises InputError with all photos that cannot be decoded, or when the disk is full, at once if that can be foreseen.
    """
    needed, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise InputError(
            f"cannot write {path}: it needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "name a folder on another disk with --cache_dir"
        )

    def attempt(photo):
        try:
            return fit(decode_photo(photo), shape[1:3])
        except BadPhoto as problem:
            return f"{photo.name} {problem}"

    problems, at_once = [], 16 * cpu_count()  # not all: before a slow disk they would pile up in memory
    with (
        atomic_write(path) as file,
        ThreadPoolExecutor(cpu_count()) as pool,
        tqdm(total=len(photos), desc=title, unit="photo") as bar,
    ):
        np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for start in range(0, len(photos), at_once):
            for decoded in pool.map(attempt, photos[start : start + at_once]):
                if isinstance(decoded, str):
                    problems.append(decoded)
                elif not problems:
                    file.write(decoded)
                bar.update()
        raise_all(photos[0].parent, problems, shown=None)
