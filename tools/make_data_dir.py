"""Make a data directory in the competition's layout of your own photos, one folder for each class.

  python -m tools.make_data_dir orchard --test new_photos --out data_orchard

Reads   orchard/CLASS/: the photos of each class, of any format that predict.py reads, also in folders below;
        new_photos/: photos without a label, for steps 2 and 4.
Writes  data_orchard/: train.csv, test.csv, sample_submission.csv; images/: links to the photos, or copies where the disk
        has no links. An image_id is the photo's path with - for / and without its suffix. In images/ every photo is
        called image_id.jpg, whatever it is: its content says how to read it.
Expect  the number of photos of each class.
"""

import json
import os
import re
import shutil
from itertools import count
from pathlib import Path

import pandas as pd

from harness.console import InputError, Parser, file_or_folder, parse_args, refusing, say
from harness.files import write_csv
from predict import OF_SYSTEMS, find_photos
from utils import CLASSES


def check_classes(folder):
    """Raise InputError if the folders in `folder` are not the classes."""
    with refusing(f"{folder} cannot be read", OSError):
        inside = sorted(
            path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in OF_SYSTEMS
        )
    found = [path.name for path in inside if path.is_dir()]
    if loose := [path.name for path in inside if not path.is_dir()]:
        say(f"note: {len(loose)} left out of {folder}, as in no class: {', '.join(loose[:5])}")
    if len(found) < 2:
        raise InputError(f"{folder} holds {len(found)} folders: one for each class is needed, two or more")
    if found != sorted(CLASSES):
        names = ", ".join(json.dumps(name, ensure_ascii=False) for name in found)
        raise InputError(f"{folder} holds other classes than utils.py: edit its line to CLASSES = ({names})")


def name_photos(folder, taken):
    """The photos in a folder and those below it: dict of image_id to Path. taken: set of image_ids, to which it adds."""
    names, folder = {}, Path(os.path.abspath(folder))
    photos, empty = find_photos([folder])
    if empty or not folder.is_dir():
        raise InputError(f"{folder} is no folder of photos")
    for path in photos:
        stem = re.sub(r"^\W+|[^\w. -]+", "_", "-".join(path.relative_to(folder.parent).with_suffix("").parts))
        spelt = (f"{stem}--{n}" if n else stem for n in count())
        name = next(name for name in spelt if name.casefold() not in taken)  # some disks do not tell a from A
        taken.add(name.casefold())
        names[name] = path
    return names


def link_or_copy(path, link):
    """Make a link to a photo, or a copy of it where the disk has no links."""
    try:
        os.symlink(path, link)
    except OSError:
        with open(path, "rb") as photo, open(link, "xb") as copy:  # x: never through a link into a photo
            shutil.copyfileobj(photo, copy)


def main():
    parser, path = Parser(__doc__), {"type": file_or_folder}
    parser.add_argument("folder", **path, metavar="FOLDER", help="holds one folder for each class")
    parser.add_argument("--test", **path, metavar="FOLDER", help="photos without a label")
    parser.add_argument("--out", **path, default="data_own", help="folder to write")
    args = parse_args(parser)
    out = Path(args.out)
    if out.exists():
        raise InputError(f"{out} exists: delete it, or name another --out")
    folder, others = Path(args.folder).resolve(), [Path(path).resolve() for path in (args.test, args.out) if path]
    if any(folder in other.parents for other in others):
        raise InputError(f"--test and --out must not be in {args.folder}, which holds the classes")
    check_classes(Path(args.folder))
    taken = set()
    of_class = {name: name_photos(Path(args.folder, name), taken) for name in CLASSES}
    test = name_photos(args.test, taken) if args.test else {}
    with refusing(f"cannot write {out}", OSError):
        (out / "images").mkdir(parents=True)
        for photos in (*of_class.values(), test):
            for image_id, path in photos.items():
                link_or_copy(path, out / "images" / f"{image_id}.jpg")
    labels = pd.Series({image_id: name for name, photos in of_class.items() for image_id in photos}, dtype=object)
    one_hot = pd.get_dummies(labels, dtype=int)[list(CLASSES)]
    write_csv(out / "train.csv", one_hot.rename_axis("image_id").reset_index())
    if test:
        table = pd.DataFrame({"image_id": list(test)})
        write_csv(out / "test.csv", table)
        write_csv(out / "sample_submission.csv", table.assign(**dict.fromkeys(CLASSES, 1 / len(CLASSES))))
    counts = ", ".join(f"{name} {len(photos)}" for name, photos in of_class.items())
    say(f"wrote {out}: {len(labels)} labelled photos ({counts}), {len(test)} without a label")


if __name__ == "__main__":
    main()
