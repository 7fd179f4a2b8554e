"""What goes in: labels and their mix, photos as the network sees them, augmentation, the data set, order, loaders."""

import os
import random
import zlib

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network for a newer version of itself

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from harness.files import read_table
from harness.photos import cache_images, read_photo
from utils import CLASSES, derive_seed, distribution, read_labels, read_test_ids

cv2.setNumThreads(0)  # OpenCV's threads would fight the loader's workers for the cores

# ---------------------------------------------------------------------------------------------- labels and photos


def read_train(args):
    """train.csv: DataFrame with image_id and one 0/1 column per class; with --limit a stratified part of its rows.

    Its index is the row number in train.csv.
    """
    train = read_labels(args.data_dir)
    if args.limit is None or args.limit >= len(train):
        return train
    # the same share of each class: first a photo of every one
    rank = train.groupby(list(CLASSES))["image_id"].cumcount()
    size = train.groupby(list(CLASSES))["image_id"].transform("size")
    return train.loc[(rank / size).sort_values(kind="stable").index[: args.limit].sort_values()]


def read_soft_labels(args, path, image_ids):
    """Soft labels, float64 (n, k), joined by image_id, not by row; with --limit the file may hold those of others, too."""
    how = {"rule": distribution, "wanted": image_ids, "may_hold_more": args.limit is not None}
    return read_table(path, ("image_id", *CLASSES), hint="run step 2 first", **how)[list(CLASSES)].to_numpy()


def mix_labels(hard, soft, soft_share):
    """(1 - soft_share) x hard + soft_share x soft labels: two (n, k) arrays in the same row order → float32 (n, k)."""
    return ((1 - soft_share) * hard + soft_share * soft).astype(np.float32)


def fit_photo(photo, image_size):
    """A photo as the network sees it: transposed if it alone is portrait, resized bilinearly to (height, width)."""
    if photo.shape[0] > photo.shape[1] and image_size[0] <= image_size[1]:
        photo = cv2.transpose(photo)
    return cv2.resize(photo, (image_size[1], image_size[0]), interpolation=cv2.INTER_LINEAR)


def load_photo(path, image_size):
    """One photo from disk as the network sees it: uint8 (height, width, 3), RGB. Raises InputError, naming the file."""
    return fit_photo(read_photo(path), image_size)


def cached_photos(args, name, image_ids):
    """The photos `image_ids` as the network sees them, decoded once: CachedImages. name: "train" or "test"."""
    name += "" if args.limit is None else f"-limit={args.limit}"
    return cache_images(name, image_ids, args.data_dir, args.image_size, args.cache_dir, fit_photo)


def read_test(args):
    """What there is to predict: the image_ids, Series in the row order of sample_submission.csv, and CachedImages."""
    image_ids = read_test_ids(args.data_dir)[: args.limit]
    return image_ids, cached_photos(args, "test", image_ids)


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
    """The training augmentation, also used for TTA, on uint8 (height, width, 3); the network normalises."""
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


# ---------------------------------------------------------------------------------------------- data set and loaders


class LeafDataset(Dataset):
    """Photos, and their labels if known. Its keys are (fold, draw, row): the draw is the epoch, or the pass of a TTA.

    images: indexable, row → uint8 (height, width, 3); labels: (n, k) float or None. With `augmentation`, what a photo
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
