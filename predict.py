"""Classify new photos with the networks of a training.

  python predict.py leaf.jpg orchard/ --log_dir logs_submit_distill
  python predict.py orchard/ --tta --heat_maps heat_maps

Reads   the photos, and those in the folders and below, of any size; LOG_DIR (checkpoints, hparams.yaml).
Writes  predictions.csv: each photo as it was named, and the mean probabilities of the folds' networks;
        with --heat_maps a picture for each row of it: the photo, and where the networks saw the predicted class.
Expect  the same as a table. A photo that cannot be read is named on stderr and left out; the exit status is then 1.
"""

import os

from harness.console import file_or_folder, parse_args

from utils import CLASSES, make_prediction_parser


def make_photo_parser():
    """What predict.py takes."""
    parser = make_prediction_parser(__doc__)
    parser.add_argument("photos", type=os.path.expanduser, nargs="+", metavar="PHOTO|FOLDER", help="what to classify")
    group = parser.add_argument_group("new photos")
    group.add_argument(
        "--tta", action="store_true", help="mean of augmented views, as in steps 2 and 4: slower, a little better"
    )
    group.add_argument(
        "--heat_maps", type=file_or_folder, metavar="FOLDER", help="write where the networks looked, a picture a photo"
    )
    group.add_argument(
        "--output", type=file_or_folder, default="predictions.csv", metavar="CSV", help="where the probabilities go"
    )
    return parser


if __name__ == "__main__":  # before the imports that take seconds: a typo should not wait for them
    ARGS = parse_args(make_photo_parser())

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import cpu_count
from tqdm import tqdm

from dataset import LeafDataset, fit_photo, load_photo, train_augmentation
from harness.console import InputError, say
from harness.files import atomic_write, check_writable, write_csv
from harness.photos import looks_like_photo, read_photo
from harness.prediction import predict
from inference import load_trained

AT_ONCE = 256  # photos in memory
LONGEST_NAME = 150  # bytes of a photo's name that go into the name of its heat map: file systems take 255 in all
OF_SYSTEMS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}


def report(problem):
    """Print what is wrong, in one write: several threads do so at once."""
    sys.stderr.write(f"error: {problem}\n")


def find_photos(names):
    """The photos of files and folders, in that order, list of Path, none twice, and how many folders gave none.

    A file that is named is taken whatever it is; in folders, and those below or linked there, what looks like a photo.
    """
    paths, empty = [], 0
    for name in map(Path, names):
        if not name.is_dir():
            paths.append(name)
            continue
        photos, others, problems = search_folder(name)
        for problem in problems or [f"{name} holds no photo"] * (not photos):
            report(problem)
            empty += 1
        if others:
            shown = ", ".join(os.fsencode(path).decode(errors="backslashreplace") for path in others[:5])
            say(f"note: {len(others)} left out of {name}, as no photos: {shown}{' …' * (len(others) > 5)}")
        paths += photos
    return list(dict.fromkeys(paths)), empty


def is_hidden(name):
    """Whether a file or folder is hidden, or one that systems leave beside photos."""
    return name.startswith(".") or name.lower() in OF_SYSTEMS


def search_folder(folder):
    """The files below a folder, links followed, no folder twice: those that look like photos, all others, and problems.

    What begins with a dot, or what systems leave beside photos, is among the others without being looked at.
    """
    photos, others, problems, seen = [], [], [], set()
    for parent, folders, files in os.walk(folder, onerror=problems.append, followlinks=True):
        place = os.stat(parent)
        hidden = list(filter(is_hidden, folders + files))
        if (place.st_dev, place.st_ino) in seen:  # a link leads here again, perhaps in a circle
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = sorted(set(folders) - set(hidden))
        others += [Path(parent) / name for name in hidden]
        for path in sorted(Path(parent) / name for name in set(files) - set(hidden)):
            (photos if looks_like_photo(path) else others).append(path)
    problems = [f"the folder {problem.filename} cannot be read: {problem.strerror}" for problem in problems]
    others.sort(key=lambda path: (is_hidden(path.name), path))  # what one may have meant as a photo comes first
    return sorted(photos), others, problems


def load_or_report(path, image_size):
    """The photo as the networks see it, or None if it cannot be used: the reason then goes to stderr."""
    if not str(path).isprintable():
        return report(
            f"{str(path)!r} cannot be written down, its name is not UTF-8 or holds signs that none sees: rename it"
        )
    if str(path)[0] in "=+-@":
        return report(f"{path} begins as a formula does, for which a spreadsheet would take it: rename it")
    try:
        return load_photo(path, image_size)
    except InputError as error:
        report(str(error).removeprefix("error: "))


def classify(args, networks, images, names):
    """Mean probabilities over folds, and over eight augmented views with --tta: float64 (n, 4).

    images: list of uint8 (height, width, 3). `names` seed the views as image_ids do, so that a test photo sees the same
    ones as in steps 2 and 4.
    """
    draws = args.tta_draws if args.tta else 1
    data = LeafDataset(images, names, augmentation=train_augmentation() if args.tta else None, seed=args.seed)
    keys = [(fold, draw, row) for fold in networks for row in range(len(images)) for draw in range(draws)]
    probabilities = predict(networks, data, keys, args, f"{len(images)} photos x {draws} x {len(networks)}")
    return probabilities.astype(np.float64).reshape(len(networks), len(images), draws, -1).mean((0, 2))


def write_heat_map(path, photo, image, predicted, networks):
    """Write the photo beside its heat map for the class `predicted`, the mean of the networks' maps, as JPEG."""
    from analysis.heat_maps import SHOWN, encode_jpeg, heat_maps, overlay, shrink  # seconds, for whoever wants maps

    heat = np.mean([heat_maps(network, image[None], [predicted])[0] for network in networks.values()], axis=0)
    photo = shrink(photo, 2 * SHOWN)
    with atomic_write(path) as file:
        file.write(encode_jpeg(np.hstack([photo, overlay(photo, heat)]), 90))


def draw_heat_maps(folder, paths, predicted, args, networks):
    """Write a heat map of each photo for its predicted class, int (n,), into a folder, under a name that it can have."""
    for number, (path, k) in enumerate(
        tqdm(zip(paths, predicted, strict=True), "heat maps", len(paths), unit="photo"), 1
    ):
        photo = read_photo(path)
        stem = path.stem.encode()[:LONGEST_NAME].decode(errors="ignore")
        name = Path(folder) / f"{number:04d}-{stem}-{CLASSES[k]}.jpg"
        write_heat_map(name, photo, fit_photo(photo, args.image_size), k, networks)


def main(args):
    check_writable(args.output)
    paths, empty = find_photos(args.photos)
    _, networks = load_trained(args)
    if args.heat_maps is not None:
        make_folder(args.heat_maps)

    parts, done = [], []
    for start in range(0, len(paths), AT_ONCE):
        some = paths[start : start + AT_ONCE]
        with ThreadPoolExecutor(cpu_count()) as pool:
            images = list(pool.map(lambda path: load_or_report(path, args.image_size), some))
        good = [(path, image) for path, image in zip(some, images, strict=True) if image is not None]
        if good:
            some, images = zip(*good, strict=True)
            parts.append(classify(args, networks, images, [path.stem for path in some]))
            done += some
    if not done:
        raise InputError("no photo could be read, nothing is written")

    predictions = pd.DataFrame(np.concatenate(parts), columns=list(CLASSES))
    predictions.insert(0, "image", [str(path) for path in done])
    write_csv(args.output, predictions)
    predicted = predictions[list(CLASSES)].to_numpy().argmax(1)
    table = predictions.assign(prediction=np.array(CLASSES)[predicted])[["image", "prediction", *CLASSES]]
    print(table.to_string(index=False, float_format="{:.3f}".format), flush=True)
    say(f"wrote {args.output}: {len(predictions)} photos")
    if args.heat_maps is not None:
        draw_heat_maps(args.heat_maps, done, predicted, args, networks)
    bad = len(paths) - len(predictions)
    if bad or empty:
        raise InputError(f"{bad} of {len(paths)} photos could not be read, {empty} folders held none, see above")


if __name__ == "__main__":
    main(ARGS)
