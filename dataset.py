"""What goes in: the CSV files, the photos (decoded and resized once), augmentation, loaders."""

import os
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network for a newer version of itself

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from utils import CLASSES, InputError, atomic_write, derive_seed, lock_file

cv2.setNumThreads(0)  # OpenCV's threads would fight the loader's workers for the cores
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HARD_SHARE = 0.7  # of the mixed label in step 3, the rest is the soft label

# ---------------------------------------------------------------------------------------------- the CSV files


def read_csv(path, columns, hint="see the README for how to get the data"):
    """Read a CSV file whose columns must be exactly `columns`, the first of them a unique image_id.

    Raises InputError naming the file and what is wrong with it; `hint`: what to do if it does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; {hint}")
    try:
        frame = pd.read_csv(path, dtype={"image_id": str}, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise InputError(f"{path} cannot be read as CSV: {error}") from error
    if list(frame.columns) != list(columns):
        raise InputError(f"{path}: its columns are {list(frame.columns)}, not {list(columns)}")
    if not isinstance(frame.index, pd.RangeIndex):
        raise InputError(f"{path}: its rows have more values than its header has names")
    if frame.empty:
        raise InputError(f"{path} has no rows")
    problems = [f"row {row + 2} has no image_id" for row in np.flatnonzero(frame["image_id"] == "")]
    ids = frame["image_id"]
    problems += [f"row {row + 2} repeats image_id {ids[row]}" for row in np.flatnonzero(ids.duplicated() & (ids != ""))]
    problems += [
        f"row {row + 2}: image_id {ids[row]!r} is not a plain file name"
        for row in np.flatnonzero(ids.str.contains(r"[/\\\x00]|^\.", regex=True))
    ]
    for name in columns[1:]:
        values = pd.to_numeric(frame[name], errors="coerce")
        problems += [
            f"row {row + 2}: {name} is {frame[name][row] or 'empty'}, not a number"
            for row in np.flatnonzero(~np.isfinite(values))
        ]
        frame[name] = values
    raise_all(path, problems)
    return frame


def raise_all(path, problems):
    """Raise one InputError with all `problems` of a file (the first ten of them in full), if there are any."""
    if problems:
        more = f" … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(f"{path}: " + "; ".join(problems[:10]) + more)


def check_ids(path, found, wanted):
    """Raise InputError, naming them, for ids of a file that are missing or not wanted; their order is free."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    raise_all(
        path,
        [f"has no row for {name}" for name in missing]
        + [f"has a row for {name}, which is not wanted" for name in extra],
    )


def read_train_csv(data_dir):
    """train.csv: DataFrame with image_id (str) and the four one-hot class columns (float). Raises InputError."""
    path = Path(data_dir) / "train.csv"
    frame = read_csv(path, ("image_id", *CLASSES))
    labels = frame[list(CLASSES)].to_numpy()
    wrong = ~(np.isin(labels, (0, 1)).all(1) & (labels.sum(1) == 1))
    raise_all(
        path, [f"row {row + 2} ({frame['image_id'][row]}) is not one 1 and three 0" for row in np.flatnonzero(wrong)]
    )
    return frame


def read_test_ids(data_dir):
    """The image_ids to predict, Series of str, in the row order of sample_submission.csv.

    Raises InputError unless test.csv has just the same ids.
    """
    test = Path(data_dir) / "test.csv"
    image_ids = read_csv(Path(data_dir) / "sample_submission.csv", ("image_id", *CLASSES))["image_id"]
    check_ids(test, read_csv(test, ("image_id",))["image_id"], image_ids)
    return image_ids


def read_probabilities(path, image_ids=None):
    """A CSV of class probabilities, DataFrame with image_id and four columns (float), joined to `image_ids` if given.

    Raises InputError for values outside 0…1, rows that do not sum to 1, and ids that are missing or extra.
    """
    frame = read_csv(path, ("image_id", *CLASSES), hint="run the step that writes it first")
    values = frame[list(CLASSES)].to_numpy()
    wrong = ((values < 0) | (values > 1)).any(1) | (np.abs(values.sum(1) - 1) > 1e-3)
    raise_all(
        path,
        [f"row {row + 2} ({frame['image_id'][row]}) is no probability distribution" for row in np.flatnonzero(wrong)],
    )
    if image_ids is None:
        return frame
    check_ids(path, frame["image_id"], image_ids)
    return frame.set_index("image_id").loc[list(image_ids)].reset_index()


def mix_labels(hard, soft):
    """0.7 x hard + 0.3 x soft labels: two (n, 4) arrays in the same row order → float32 (n, 4)."""
    return (HARD_SHARE * hard + (1 - HARD_SHARE) * soft).astype(np.float32)


# ---------------------------------------------------------------------------------------------- the photos


def decode_photo(path):
    """Decode one photo, turned as its EXIF orientation says: uint8 (height, width, 3), RGB.

    Raises InputError if the file is missing or no picture.
    """
    try:
        content = np.fromfile(path, np.uint8)  # not imread: on Windows that fails for names beyond ASCII
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    photo = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB) if len(content) else None
    if photo is None:
        raise InputError(f"{path} cannot be decoded as a photo")
    return photo


def fit_photo(photo, image_size):
    """A photo as the network sees it: transposed if it is portrait, resized bilinearly to (height, width)."""
    if photo.shape[0] > photo.shape[1]:
        photo = cv2.transpose(photo)
    return cv2.resize(photo, (image_size[1], image_size[0]), interpolation=cv2.INTER_LINEAR)


def load_photo(path, image_size):
    """`fit_photo` of `decode_photo`: uint8 (height, width, 3), RGB. Raises InputError as that does."""
    return fit_photo(decode_photo(path), image_size)


class CachedImages:
    """The resized photos of a data set as one memory-mapped uint8 array (n, height, width, 3), RGB.

    All processes share the pages of one file; a copy sent to a spawned worker opens the file again.
    """

    def __init__(self, path):
        self.path = path
        self.array = np.load(path, mmap_mode="r")

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
    Raises InputError for missing or unreadable photos, or when the disk is full.
    """
    images = Path(data_dir).resolve() / "images"
    paths = [images / f"{image_id}.jpg" for image_id in image_ids]
    raise_all(images, [f"{path.name} is missing" for path in paths if not path.is_file()])
    key = sha256(cv2.__version__.encode())
    for path in paths:
        stat = path.stat()
        key.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    height, width = image_size
    family = f"{sha256(str(images).encode()).hexdigest()[:8]}-{name}-{height}x{width}"
    cache = Path(cache_dir) / f"{family}-{key.hexdigest()[:16]}.npy"
    with lock_file(cache.parent / f".{family}.lock"):  # a second process waits here, then finds the file
        if not cache.exists():
            with atomic_write(cache) as file, ThreadPoolExecutor(os.cpu_count()) as pool:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), height, width, 3)}
                np.lib.format.write_array_header_2_0(file, header)
                photos = pool.map(lambda path: load_photo(path, image_size), paths)
                for photo in tqdm(photos, total=len(paths), desc=f"decode {name} photos", unit="photo"):
                    file.write(photo)
            for stale in set(cache.parent.glob(f"{family}-*.npy")) - {cache}:
                with suppress(PermissionError):  # Windows: a running process still reads it
                    stale.unlink()
    return CachedImages(cache)


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
