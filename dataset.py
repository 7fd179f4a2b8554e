"""What goes in: the CSV files, the photos (decoded and resized once), augmentation, loaders."""

import csv
import io
import math
import os
import random
import re
import shutil
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network for a newer version of itself

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import simplejpeg
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from utils import CLASSES, InputError, atomic_write, derive_seed, lock_file, remove_leftovers, say

cv2.setNumThreads(0)  # OpenCV's threads would fight the loader's workers for the cores
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HARD_SHARE = 0.7  # of the mixed label in step 3, the rest is the soft label
# libjpeg's words, in simplejpeg's errors, for data that is lost or a decoder gone astray
JPEG_DAMAGE = re.compile(
    r"premature end|bad Huffman code|Unsupported (marker|JPEG process)|Bogus|Invalid JPEG file structure|Inconsistent"
    r"|\b\d{3,} extraneous bytes",
    re.I,
)

# ---------------------------------------------------------------------------------------------- the CSV files


def read_csv(path, columns, hint="see the README for how to get the data", rule=None, wanted=None):
    """Read a CSV file whose columns are exactly `columns`, the first of them a unique image_id, the others numbers.

    hint: what to do if the file does not exist; rule: function of a row's numbers, float (n,), that returns what is
    wrong with them, or None; wanted: the ids that must be there, no more and no less, in any order.
    Returns a DataFrame with image_id (str) and floats, in the file's order. Raises InputError naming the file and all
    that is wrong with it, by line.
    """
    header, rows, problems = parse_csv(path, hint)
    complaints = compare_columns(header, columns) if header else []
    if not rows and not problems:
        complaints.append("has no rows")
    unread, first_line = bool(problems), {}
    for line, cells in rows:
        row = dict(zip(header, cells, strict=True))
        problems += [(line, what) for what in check_row(row, columns, rule)]
        image_id = row.get("image_id")
        if image_id in first_line:
            problems.append((line, f"repeats image_id {quote(image_id)} of line {first_line[image_id]}"))
        elif image_id:
            first_line[image_id] = line
    complaints += [f"line {line} {what}" for line, what in sorted(problems, key=lambda problem: problem[0])]
    if wanted is not None and first_line and not unread:
        complaints += compare_ids(first_line, wanted)
    raise_all(path, complaints)
    values = list(zip(*(cells for _, cells in rows), strict=True))
    numbers = {name: [to_number(cell) for cell in cells] for name, cells in zip(columns[1:], values[1:], strict=True)}
    return pd.DataFrame({"image_id": values[0], **numbers})


def parse_csv(path, hint):
    """Split a CSV file, UTF-8 with or without a byte order mark, any line ends, into its header, rows and problems.

    Returns the header's names; the rows, each with the line of the file where it begins; and (line, what) for rows of
    another length than the header. Blank lines are skipped. Raises InputError for what cannot be split.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; {hint}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if b"\0" in content.split(b"\n")[0]:
        raise InputError(f"{path} is not encoded as UTF-8 but perhaps as UTF-16: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} is not encoded as UTF-8 (line {line}): save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, rows, problems, line = [], [], [], 1
    try:
        for cells in reader:
            if cells and not header:
                header = cells
            elif cells and len(cells) != len(header):
                problems.append((line, f"has {len(cells)} values, its header {len(header)} names"))
            elif cells:
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        problems.append((line, f"cannot be read as CSV, nor what follows: {error}"))
    if not header and not problems:
        raise InputError(f"{path} is empty")
    return header, rows, problems


def compare_columns(header, columns):
    """How a file's header differs from `columns`, as texts."""
    missing, extra = Counter(columns) - Counter(header), Counter(header) - Counter(columns)
    complaints = [f"lacks the column {name}" for name in missing]
    complaints += [f"has a column {quote(name)} that does not belong there" for name in extra]
    if not complaints and header != list(columns):
        complaints = [f"its columns are {','.join(header)}; put them in the order {','.join(columns)}"]
    return complaints


def check_row(row, columns, rule):
    """What is wrong with a row, dict of column to text, as texts; rule: as of read_csv."""
    image_id = row.get("image_id")
    if image_id == "":
        yield "has no image_id"
    elif image_id is not None and not is_plain_name(image_id):
        yield f"has the image_id {quote(image_id)}, which is not a plain file name"
    numbers = {name: to_number(row[name]) for name in columns[1:] if name in row}
    for name, number in numbers.items():
        if not np.isfinite(number):
            yield f"has {name} {quote(row[name])}, not a number" if row[name] else f"has no value for {name}"
    values = np.array(list(numbers.values()))
    if rule and len(values) == len(columns) - 1 and np.isfinite(values).all() and (what := rule(values)):
        yield f"({quote(image_id)}) {what}" if image_id else what


def is_plain_name(image_id):
    """Whether an image_id names a file of images/ and none elsewhere, on any system, in characters that can be seen."""
    elsewhere = re.search(r"[/\\]|^\.|^[A-Za-z]:", image_id)
    return not elsewhere and image_id.isprintable() and image_id == image_id.strip()


def quote(text):
    """`text` in quotes, on one line and not too long to be read."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def to_number(text):
    """The float that `text` spells in ASCII, nearest to it; nan if it spells none."""
    try:
        return float(text) if text.isascii() and "_" not in text else np.nan  # float("1_0") is 10
    except ValueError:
        return np.nan


def raise_all(path, problems):
    """Raise one InputError with all `problems` of a file (the first ten of them in full), if there are any."""
    if problems:
        more = f" … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(f"{path}: " + "; ".join(problems[:10]) + more)


def compare_ids(found, wanted):
    """What ids are missing in `found` or not wanted, as texts; their order is free."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    return [f"has no row for {name}" for name in missing] + [
        f"has a row for {quote(name)}, which is not wanted" for name in extra
    ]


def not_one_hot(values):
    """What is wrong with the labels of one photo, float (4,), or None."""
    return None if sorted(values) == [0, 0, 0, 1] else "is not one 1 and three 0"


def not_a_distribution(values):
    """What is wrong with the class probabilities of one photo, float (4,), or None; 0.001 is left for rounding."""
    if values.min() < 0 or values.max() > 1:
        return "is no probability distribution: it holds a value outside 0…1"
    return None if abs(values.sum() - 1) <= 1e-3 else f"is no probability distribution: it sums to {values.sum():.4g}"


def read_train_csv(data_dir):
    """train.csv: DataFrame with image_id (str) and the four one-hot class columns (float). Raises InputError."""
    return read_csv(Path(data_dir) / "train.csv", ("image_id", *CLASSES), rule=not_one_hot)


def read_test_ids(data_dir):
    """The image_ids to predict, Series of str, in the row order of sample_submission.csv.

    Raises InputError unless test.csv has just the same ids.
    """
    image_ids = read_csv(Path(data_dir) / "sample_submission.csv", ("image_id", *CLASSES))["image_id"]
    read_csv(Path(data_dir) / "test.csv", ("image_id",), wanted=image_ids)
    return image_ids


def read_probabilities(path, image_ids=None):
    """A CSV of class probabilities, DataFrame with image_id and four columns (float), joined to `image_ids` if given.

    Raises InputError for values outside 0…1, rows that do not sum to 1, and ids that are missing or extra.
    """
    hint = "run the step that writes it first"
    frame = read_csv(path, ("image_id", *CLASSES), hint, rule=not_a_distribution, wanted=image_ids)
    return frame if image_ids is None else frame.set_index("image_id").loc[list(image_ids)].reset_index()


def mix_labels(hard, soft):
    """0.7 x hard + 0.3 x soft labels: two (n, 4) arrays in the same row order → float32 (n, 4)."""
    return (HARD_SHARE * hard + (1 - HARD_SHARE) * soft).astype(np.float32)


# ---------------------------------------------------------------------------------------------- the photos


class BadPhoto(ValueError):
    """What is wrong with a photo, without its name."""


def decode_photo(path):
    """Decode one photo, turned as its EXIF orientation says: uint8 (height, width, 3), RGB.

    Its content decides the format, not its name; grey, CMYK, 16-bit and transparent pictures become RGB of 8 bits.
    Raises BadPhoto if the file is missing, damaged or no picture.
    """
    path = Path(path)
    try:
        content = np.fromfile(path, np.uint8)  # not imread: on Windows that fails for names beyond ASCII
    except FileNotFoundError as error:
        others = [path.with_name(path.stem + suffix) for suffix in (".JPG", ".jpeg", ".JPEG", ".png")]
        found = [f" (there is {other.name}: rename it)" for other in others if other.exists()]
        raise BadPhoto("is missing" + "".join(found[:1])) from error
    except OSError as error:
        raise BadPhoto(f"cannot be read: {error.strerror}") from error
    if not len(content):
        raise BadPhoto("is empty (0 bytes)")
    check_jpeg(path, content)
    try:
        photo = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        limit = "MAX_IMAGE_PIXELS" in str(error)
        reason = "it has more than 2^30 pixels" if limit else str(error).splitlines()[0]
        raise BadPhoto(f"cannot be decoded as a photo: {reason}") from error
    if photo is None:
        raise BadPhoto("cannot be decoded as a photo")
    return photo


def read_photo(path):
    """`decode_photo`, but raises InputError, naming the file."""
    try:
        return decode_photo(path)
    except BadPhoto as problem:
        raise InputError(f"{path} {problem}") from problem


def fit_photo(photo, image_size):
    """A photo as the network sees it: transposed if it is portrait, resized bilinearly to (height, width)."""
    if photo.shape[0] > photo.shape[1]:
        photo = cv2.transpose(photo)
    return cv2.resize(photo, (image_size[1], image_size[0]), interpolation=cv2.INTER_LINEAR)


def load_photo(path, image_size):
    """`fit_photo` of `read_photo`: uint8 (height, width, 3), RGB. Raises InputError as that does."""
    return fit_photo(read_photo(path), image_size)


def check_jpeg(path, content):
    """Raise BadPhoto if `content`, uint8 (n,), is a JPEG that lacks a part, which OpenCV decodes to grey or shifted pixels.

    The grey eighth-size picture needs all of the file's data, but a fifth of the time. Less than 100 bytes too many are
    worth a note only: some cameras leave a few before a marker, and few damages do.
    """
    if content[:2].tobytes() != b"\xff\xd8":
        return
    try:
        simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1, min_factor=8)
    except ValueError as warning:  # or simplejpeg does not know this kind of JPEG; then OpenCV decides
        if JPEG_DAMAGE.search(str(warning)):
            raise BadPhoto(f"is damaged ({warning})") from warning
        if "Corrupt JPEG data" in str(warning):
            say(f"note: {path.name} may be damaged ({warning}): look at it")


class CachedImages:
    """The resized photos of a data set as one memory-mapped uint8 array (n, height, width, 3), RGB.

    All processes share the pages of one file; a copy sent to a spawned worker opens the file again.
    """

    def __init__(self, path):
        self.path = path
        self.array = np.lib.format.open_memmap(path, mode="r")

    def __len__(self):
        return len(self.array)

    def __getitem__(self, row):
        return self.array[row]

    def __reduce__(self):
        return CachedImages, (self.path,)


def cache_images(name, image_ids, data_dir, image_size, cache_dir):
    """The photos `image_ids` of data_dir, decoded and resized once: CachedImages in the order of `image_ids`.

    The file is named after `name` ("train" or "test") and a key over the photos' names, sizes and times, so that a
    changed photo, list or image size is built anew; it replaces the one built before of the same folder and size.
    Raises InputError with all photos that are missing or cannot be decoded, or when the disk is full.
    """
    folder = Path(data_dir).resolve() / "images"
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: the photos should be there")
    paths = [folder / f"{image_id}.jpg" for image_id in image_ids]
    key = sha256(cv2.__version__.encode())
    for path in paths:
        try:
            stat = path.stat()
            key.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        except OSError:  # no cache has this key; decoding the photos will tell what is wrong with them
            key.update(f"{path.name} cannot be found\n".encode())
    family = f"{sha256(str(folder).encode()).hexdigest()[:8]}-{name}-{image_size[0]}x{image_size[1]}"
    cache = Path(cache_dir) / f"{family}-{key.hexdigest()[:16]}.npy"
    shape = (len(paths), *image_size, 3)
    images = open_cache(cache, shape)
    if images is not None:
        return images
    with lock_file(cache.parent / f".{family}.lock"):  # a second process waits here, then finds the file
        images = open_cache(cache, shape)
        if images is not None:
            return images
        if cache.exists():
            say(f"note: {cache} is damaged; it is built anew")
        remove_leftovers(cache.parent, f"{family}-*.npy")
        build_cache(cache, paths, shape, f"decode {name} photos")
        for stale in set(cache.parent.glob(f"{family}-*.npy")) - {cache}:
            with suppress(PermissionError):  # Windows: a running process still reads it
                stale.unlink()
    return CachedImages(cache)


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


def build_cache(path, photos, shape, title):
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
            return fit_photo(decode_photo(photo), shape[1:3])
        except BadPhoto as problem:
            return f"{photo.name} {problem}"

    problems, at_once = [], 16 * os.cpu_count()  # not all: before a slow disk they would pile up in memory
    with (
        atomic_write(path) as file,
        ThreadPoolExecutor(os.cpu_count()) as pool,
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
        raise_all(photos[0].parent, problems)


def read_test(args):
    """What there is to predict: the image_ids, Series in the row order of sample_submission.csv, and CachedImages."""
    image_ids = read_test_ids(args.data_dir)
    return image_ids, cache_images("test", image_ids, args.data_dir, args.image_size, args.cache_dir)


# ---------------------------------------------------------------------------------------------- augmentation


class MotionBlur3(A.ImageOnlyTransform):
    """Average along a random line in a 3x3 kernel, off centre too, drawn as albumentations 0.4.5 did.

    The columns of the line's ends are drawn first; only if they coincide must the rows differ.
    """

    def get_params(self):
        columns = [self.py_random.randrange(3) for _ in range(2)]
        one_column = columns[0] == columns[1]
        rows = self.py_random.sample(range(3), 2) if one_column else [self.py_random.randrange(3) for _ in range(2)]
        kernel = np.zeros((3, 3), np.uint8)
        cv2.line(kernel, (columns[0], rows[0]), (columns[1], rows[1]), 1)
        return {"kernel": kernel.astype(np.float32) / kernel.sum()}

    def apply(self, img, kernel, **params):
        return cv2.filter2D(img, -1, kernel)


class GaussianBlur3(A.ImageOnlyTransform):
    """OpenCV's fixed 3x3 Gaussian, 1-2-1, as albumentations 0.4.5 had it; that of 2.0.8 draws another width each time."""

    def apply(self, img, **params):
        return cv2.GaussianBlur(img, (3, 3), 0)


def train_augmentation():
    """The training augmentation, also used for TTA, on uint8 (height, width, 3); normalisation happens on the device."""
    return A.Compose(
        [
            A.OneOf(
                [
                    A.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0, p=1),
                    A.RandomBrightnessContrast(brightness_limit=0, contrast_limit=0.1, p=1),
                ],
                p=0.5,
            ),
            A.OneOf([MotionBlur3(p=1), A.MedianBlur(blur_limit=(3, 3), p=1), GaussianBlur3(p=1)], p=0.5),
            A.VerticalFlip(p=0.5),
            A.HorizontalFlip(p=0.5),
            # not ShiftScaleRotate: that of 2.0.8 draws another scale for each axis
            A.Affine(
                scale=(0.8, 1.2),
                keep_ratio=True,
                translate_percent=(-0.2, 0.2),
                rotate=(-20, 20),
                interpolation=cv2.INTER_LINEAR,
                border_mode=cv2.BORDER_REFLECT_101,
                p=1,
            ),
        ]
    )


def augmentation_parts(augmentation):
    """The single operations of `train_augmentation()`, dict of name to transform."""
    tone, blur, vertical_flip, horizontal_flip, geometry = augmentation.transforms
    return {
        "brightness": tone.transforms[0],
        "contrast": tone.transforms[1],
        "motion_blur": blur.transforms[0],
        "median_blur": blur.transforms[1],
        "gaussian_blur": blur.transforms[2],
        "vertical_flip": vertical_flip,
        "horizontal_flip": horizontal_flip,
        "shift_scale_rotate": geometry,
    }


def normalise(images):
    """ImageNet normalisation on the images' own device: uint8 (n, h, w, 3) → float32 (n, 3, h, w), channels last."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).mul_(255)
    std = torch.tensor(IMAGENET_STD, device=images.device).mul_(255)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------- data set and loaders


class LeafDataset(Dataset):
    """Photos, and their labels if known. Its keys are (fold, draw, row): the draw is the epoch, or the pass of a TTA.

    images: indexable, row → uint8 (height, width, 3); labels: (n, 4) float or None. With `augmentation`, what a photo
    looks like depends on seed, fold, draw and image_id alone: not on the workers, nor on what was drawn before.
    """

    def __init__(self, images, image_ids, labels=None, augmentation=None, seed=0):
        self.images, self.labels = images, labels
        self.image_keys = [zlib.crc32(image_id.encode()) for image_id in image_ids]
        self.augmentation, self.seed = augmentation, seed

    def __len__(self):
        return len(self.image_keys)

    def __getitem__(self, key):
        fold, draw, row = key
        image = self.images[row]
        if self.augmentation is not None:
            seed = derive_seed(self.seed, fold, draw, self.image_keys[row])
            self.augmentation.set_random_state(np.random.default_rng(seed), random.Random(seed))
            image = self.augmentation(image=image)["image"]
        sample = {"image": torch.from_numpy(np.require(image, requirements=["C", "W", "E"])), "fold": fold, "row": row}
        if self.labels is not None:
            sample["label"] = torch.from_numpy(self.labels[row].astype(np.float32))
        return sample


class EpochSampler(Sampler):
    """The keys (fold, epoch, row) of one epoch, shuffled by seed, fold and epoch, whole global batches only.

    rows: the fold's training rows; batch_size: the global one. Each of `world_size` processes gets its share of every
    global batch. Lightning calls set_epoch.
    """

    def __init__(self, rows, batch_size, seed, fold, rank=0, world_size=1):
        self.rows, self.batch_size, self.seed, self.fold = np.asarray(rows), batch_size, seed, fold
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.rows) // self.batch_size * self.batch_size // self.world_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.fold, self.epoch)).permutation(self.rows)
        whole = order[: len(order) // self.batch_size * self.batch_size]
        share = whole.reshape(-1, self.world_size, self.batch_size // self.world_size)[:, self.rank]
        return iter([(self.fold, self.epoch, int(row)) for row in share.ravel()])


def make_loader(dataset, keys, batch_size, num_workers, pin_memory=False):
    """A DataLoader over `keys`, a sampler or a list of (fold, draw, row), that neither shuffles nor drops."""
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    return DataLoader(dataset, batch_size, sampler=keys, pin_memory=pin_memory, **workers)
