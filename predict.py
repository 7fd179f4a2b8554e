"""Classify new photos with the networks of a training.

  python predict.py leaf.jpg orchard/ --log_dir logs_submit_distill
  python predict.py orchard/ --tta --heat_maps heat_maps

Reads   the photos, and those in the folders and below, of any size; LOG_DIR (checkpoints, hparams.yaml).
Writes  predictions.csv: each photo as it was named, and the mean probabilities of the folds' networks;
        with --heat_maps a picture for each row of it: the photo, and where the networks saw the predicted class.
Expect  the same as a table. A photo that cannot be read is named on stderr and left out; the exit status is then 1.
"""

from harness.command_line import file_or_folder, parse_args
from utils import CLASSES, make_prediction_parser


def make_photo_parser():
    """What predict.py takes."""
    parser = make_prediction_parser(__doc__)
    parser.add_argument("photos", type=file_or_folder, nargs="+", metavar="PHOTO|FOLDER", help="what to classify")
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
from tqdm import tqdm

from dataset import LeafDataset, load_photo, train_augmentation
from harness.console import InputError, say, stop_cleanly
from harness.files import atomic_write, make_folder, write_csv
from harness.photos import read_photo
from harness.prediction import predict
from inference import load_trained

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".jp2"}  # what is a photo in a folder
AT_ONCE = 256  # photos in memory


def find_photos(names):
    """The photos of files and folders, in that order, list of Path, none twice, and the number of folders without one.

    A file that is named is taken whatever its suffix.
    """
    paths, empty = [], 0
    for name in map(Path, names):
        if not name.is_dir():
            paths.append(name)
            continue
        files = sorted(path for path in name.rglob("*") if path.is_file() or path.is_symlink())
        photos = [path for path in files if path.suffix.lower() in SUFFIXES]
        if len(photos) < len(files):
            others = [str(path) for path in files if path.suffix.lower() not in SUFFIXES]
            say(f"note: left out of {name}, as no photos: {', '.join(others[:3])}{' …' * (len(others) > 3)}")
        if not photos:
            print(f"error: {name} holds no photo ({', '.join(sorted(SUFFIXES))})", file=sys.stderr, flush=True)
            empty += 1
        paths += photos
    return list(dict.fromkeys(paths)), empty


def load_or_report(path, image_size):
    """The photo as the networks see it, or None if it cannot be used: the reason then goes to stderr.

    In one write each: several threads do so at once.
    """
    try:
        str(path).encode()
        return load_photo(path, image_size)
    except UnicodeEncodeError:
        sys.stderr.write(f"error: {path} cannot be written down, its name is not UTF-8: rename it\n")
        return None
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return None


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


def main(args):
    if Path(args.output).is_dir():
        raise InputError(f"--output {args.output} is a folder: name a file")
    paths, empty = find_photos(args.photos)
    _, networks = load_trained(args)
    if args.heat_maps is not None:
        make_folder(args.heat_maps)

    parts, done = [], 0
    for start in range(0, len(paths), AT_ONCE):
        some = paths[start : start + AT_ONCE]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda path: load_or_report(path, args.image_size), some))
        good = [(path, image) for path, image in zip(some, images, strict=True) if image is not None]
        if not good:
            continue
        some, images = zip(*good, strict=True)
        probabilities = classify(args, networks, images, [path.stem for path in some])
        parts.append(pd.DataFrame(probabilities, columns=list(CLASSES)).assign(image=[str(path) for path in some]))
        if args.heat_maps is not None:
            rows = zip(some, images, probabilities.argmax(1), strict=True)
            for number, (path, image, k) in enumerate(tqdm(rows, "heat maps", len(some), unit="photo"), done + 1):
                name = Path(args.heat_maps) / f"{number:04d}-{path.stem}-{CLASSES[k]}.jpg"
                write_heat_map(name, read_photo(path), image, k, networks)
        done += len(some)
    if not parts:
        raise InputError("no photo could be read, nothing is written")

    predictions = pd.concat(parts, ignore_index=True)[["image", *CLASSES]]
    write_csv(args.output, predictions)
    predicted = np.array(CLASSES)[predictions[list(CLASSES)].to_numpy().argmax(1)]
    table = predictions.assign(prediction=predicted)[["image", "prediction", *CLASSES]]
    print(table.to_string(index=False, float_format="{:.3f}".format), flush=True)
    say(f"wrote {args.output}: {len(predictions)} photos")
    bad = len(paths) - len(predictions)
    if bad or empty:
        raise InputError(f"{bad} of {len(paths)} photos could not be read, {empty} folders held none, see above")


if __name__ == "__main__":
    with stop_cleanly(lambda: "nothing is written yet"):
        main(ARGS)
