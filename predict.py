"""Classify new photos with the networks of a training.

  python predict.py leaf.jpg orchard/ --log_dir logs_submit_distill
  python predict.py orchard/ --tta --page predictions.html

Reads   the photos, of any size, also those in folders and in the folders below them; LOG_DIR.
Writes  predictions.csv: each photo as you named it, and its probabilities, the mean of the folds' networks;
        with --page also a page to look at: each photo, its probabilities, and where the networks saw the predicted class;
        with --heat_maps the same pictures as files, one per photo.
Expect  the same as a table. A photo that cannot be read is named and left out; the exit status is then 1.
"""

import os

from harness.console import file_or_folder, parse_args
from utils import CLASSES, decide, make_prediction_parser, name_labels


def make_photo_parser():
    """What predict.py takes."""
    parser = make_prediction_parser(__doc__, with_data=False)
    parser.add_argument(
        "photos", type=os.path.expanduser, nargs="+", metavar="PHOTO|FOLDER", help="what to classify; comes first"
    )
    group, path = parser.add_argument_group("new photos"), {"type": file_or_folder}
    group.add_argument("--tta", action="store_true", help="predict the mean of augmented views, as steps 2 and 4 do")
    group.add_argument("--page", **path, metavar="HTML", help="also write a page with photos, probabilities, heat maps")
    group.add_argument("--heat_maps", **path, metavar="FOLDER", help="also write pictures of where the networks looked")
    group.add_argument("--output", **path, default="predictions.csv", metavar="CSV", help="file for the probabilities")
    parser.needs["tta_draws"] = "tta"
    return parser


if __name__ == "__main__":  # before the imports that take seconds: a typo should not wait for them
    ARGS = parse_args(make_photo_parser())

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import cpu_count
from PIL import Image
from tqdm import tqdm

from analysis.figures import write_page
from analysis.heat_maps import SHOWN, count_cells, data_uri, mark_photo, shrink
from dataset import LeafDataset, load_photo
from harness.console import InputError, say
from harness.files import atomic_write, check_writable, write_csv
from harness.photos import open_with_pillow
from inference import load_trained, predict, predict_tta

AT_ONCE = 256  # photos in memory
LONGEST_NAME = 150  # bytes of a photo's name that go into the name of its heat map: file systems take 255 in all
HEAT_MAP = b"heat map of predict.py"  # stands in these JPEG files, so that a folder's search knows them
SUFFIXES = ".jpg .jpeg .jpe .jfif .png .tif .tiff .webp .bmp .gif .avif .heic .heif .jp2".split()
OF_SYSTEMS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}


def find_photos(names):
    """The photos of files and folders, in that order, list of Path, none twice, and how many folders gave none.

    A file that is named is taken whatever it is; in folders, and those below or linked there, what looks like a photo.
    """
    paths, empty = [], 0
    for name in map(Path, names):
        photos, others, problems = search_folder(name) if name.is_dir() else ([name], [], [])
        for problem in problems or [f"{name} holds no photo"] * (not photos):
            sys.stderr.write(f"error: {problem}\n")
            empty += 1
        if others:
            shown = ", ".join(repr(str(path))[1:-1] for path in others[:5])  # a name may hold what does not print
            say(f"note: {len(others)} left out of {name}, as no photos: {shown}{' …' * (len(others) > 5)}")
        paths += photos
    return list(dict.fromkeys(paths)), empty


def looks_like_photo(path):
    """Whether a file is meant to be a photo, readable or not: by its name or its content. Not what --heat_maps wrote."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                if HEAT_MAP in file.read(100):
                    return False
        return path.suffix.lower() in SUFFIXES or path.is_file() and bool(open_with_pillow(path))
    except Exception as error:  # reading any file may raise anything
        return path.suffix.lower() in SUFFIXES or "raw file" in str(error)


def search_folder(folder):
    """The files below a folder, links followed, no folder twice: those that look like photos, all others, and problems.

    What begins with a dot, or what systems leave beside photos, is among the others without being looked at.
    """
    photos, others, hidden, errors, seen = [], [], [], [], set()
    for parent, folders, files in os.walk(folder, onerror=errors.append, followlinks=True):
        if (place := os.path.realpath(parent)) in seen:  # a link leads here again, perhaps in a circle
            folders.clear()
            continue
        seen.add(place)
        left_out = {name for name in folders + files if name.startswith(".") or name.lower() in OF_SYSTEMS}
        hidden += [Path(parent) / name for name in left_out]
        folders[:] = sorted(set(folders) - left_out)
        for path in (Path(parent) / name for name in set(files) - left_out):
            (photos if looks_like_photo(path) else others).append(path)
    problems = [f"the folder {error.filename} cannot be read: {error.strerror}" for error in errors]
    return sorted(photos), sorted(others) + sorted(hidden), problems


def load_or_report(path, image_size):
    """The photo as the networks see it, or None if it cannot be used: the reason then goes to stderr."""
    try:
        if not str(path).isprintable():
            raise InputError(f"{str(path)!r} cannot be written in a table (no UTF-8, or invisible signs): rename it")
        return load_photo(path, image_size)
    except InputError as error:
        sys.stderr.write(f"{error}\n")  # in one write: several threads do so at once


def classify(args, networks, images, names):
    """Mean probabilities of the folds, with --tta of their augmented views, float (n, k).

    images: list of uint8 (height, width, 3). `names` seed the views as image_ids do, so that a test photo gets the same
    ones as in steps 2 and 4.
    """
    if args.tta:
        return predict_tta(args, networks, names, images)[list(CLASSES)].to_numpy()
    views, keys = LeafDataset(images, names), [(fold, 0, row) for fold in networks for row in range(len(images))]
    probabilities = predict(networks, views, keys, args, f"{len(images)} photos x {len(networks)}")
    return probabilities.astype(np.float64).reshape(len(networks), len(images), -1).mean(0)


def show_heat_maps(args, networks, done, predictions, names):
    """Write the pictures and the page. done: list of Path; predictions: DataFrame; names: the decided labels, texts."""
    count_cells(networks[args.folds[0]], load_photo(done[0], args.image_size))
    probabilities, photos = predictions[list(CLASSES)], []
    for row, path in enumerate(tqdm(done, "heat maps", unit="photo")):
        k = probabilities.iloc[row].argmax()
        pictures = mark_photo(path, [k], networks.values(), args.image_size, longest=2 * SHOWN)
        if args.heat_maps:
            stem = path.stem.encode()[:LONGEST_NAME].decode(errors="ignore")
            name = f"{row + 1:04d}-{stem}-{CLASSES[k]}.jpg".replace("/", "_")
            with atomic_write(Path(args.heat_maps) / name) as file:
                Image.fromarray(np.hstack(pictures)).save(file, "JPEG", quality=90, comment=HEAT_MAP)
        if args.page:
            entry = {"name": predictions["image"][row], "decided": names[row], "class": CLASSES[k]}
            entry |= zip(("picture", "heat_map"), (data_uri(shrink(picture)) for picture in pictures), strict=True)
            photos.append(entry | {"probabilities": probabilities.iloc[row].to_dict()})
    if args.page:
        write_page(args.page, "predictions_page.html.jinja", {"args": args, "photos": photos})
        say(f"wrote {args.page}")


def main(args):
    check_writable(args.output, *filter(None, [args.page, args.heat_maps and f"{args.heat_maps}/map.jpg"]))
    paths, empty = find_photos(args.photos)
    if Path(args.output).resolve() in {path.resolve() for path in paths}:
        raise InputError(f"--output {args.output} is one of the photos: name another file")
    _, networks = load_trained(args)

    parts, done = [], []
    for start in range(0, len(paths), AT_ONCE):
        some = paths[start : start + AT_ONCE]
        with ThreadPoolExecutor(cpu_count()) as pool:
            images = pool.map(lambda path: load_or_report(path, args.image_size), some)
        good = {path: image for path, image in zip(some, images, strict=True) if image is not None}
        if good:
            parts.append(classify(args, networks, list(good.values()), [path.stem for path in good]))
            done += good
    if not done:
        raise InputError("no photo could be read, nothing is written")

    predictions = pd.DataFrame(np.concatenate(parts), columns=list(CLASSES))
    # a spreadsheet would take a name that begins so for a formula
    predictions.insert(0, "image", [f"./{path}" if str(path)[0] in "=+-@" else str(path) for path in done])
    write_csv(args.output, predictions)
    names = name_labels(decide(predictions[list(CLASSES)].to_numpy()))
    table = predictions.assign(prediction=names)[["image", "prediction", *CLASSES]]
    print(table.to_string(index=False, float_format="{:.3f}".format), flush=True)
    say(f"wrote {args.output}: {len(predictions)} photos")
    if args.heat_maps or args.page:
        show_heat_maps(args, networks, done, predictions, names)
    bad = len(paths) - len(predictions)
    if bad or empty:
        raise InputError(f"{bad} of {len(paths)} photos could not be read, {empty} folders held none, see above")


if __name__ == "__main__":
    main(ARGS)
