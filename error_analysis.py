"""After step 2 or 4: what the networks get wrong, where they looked, and which labels look wrong.

  python error_analysis.py
  python error_analysis.py --log_dir logs_submit_distill

Reads   LOG_DIR (checkpoints, folds.csv, hparams.yaml, metrics/, and the out-of-fold predictions if step 2 has left them
        in predictions/) and the labelled photos of DATA_DIR.
Writes  error_analysis.html: one page that needs no network, with heat maps, suspect labels, curves and all photos;
        error_analysis.csv: a row a photo, with what its own fold's network, which has not seen it, makes of it.
Expect  the out-of-fold AUC, the number of errors, suspects and near-duplicates.
"""

from harness.console import parse_args, positive

from utils import CLASSES, column_aucs, make_prediction_parser, mean_auc


def make_analysis_parser():
    """What error_analysis.py takes."""
    parser = make_prediction_parser(__doc__)
    group = parser.add_argument_group("error analysis")
    group.add_argument(
        "--worst",
        type=positive,
        default=24,
        metavar="N",
        help="wrong photos, suspects and pairs of near-duplicates that are shown",
    )
    return parser


if __name__ == "__main__":  # before the imports that take seconds: a typo should not wait for them
    ARGS = parse_args(make_analysis_parser())

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues
from jinja2 import Environment, FileSystemLoader
from joblib import cpu_count
from PIL import Image
from tqdm import tqdm

from analysis import figures
from analysis.heat_maps import data_uri, heat_maps, overlay, shrink
from dataset import fit_photo, read_train
from harness.console import InputError, say
from harness.files import atomic_write, check_writable, write_csv
from harness.photos import photo_paths, read_photo
from harness.prediction import predict
from harness.record import read_folds, read_own_csv
from inference import load_trained, predict_out_of_fold

THUMBNAIL = 120  # longest side in pixels: there is one of every photo
CONFIDENT = 2  # right and most certain photos of each class that get heat maps
NEAR_DUPLICATE = 8  # bits of 64 in which the perceptual hashes of near-duplicates may differ

# ---------------------------------------------------------------------------------------------- out-of-fold predictions


def tabulate(train, folds, out_of_fold):
    """A row a photo: image_id, fold, label, predicted, wrong, loss (-log of the label's probability), probabilities.

    train: DataFrame of train.csv; folds: int (n,); out_of_fold: DataFrame with image_id and the four probabilities of
    all or some of these photos, in the order of train.csv.
    """
    names, classes = np.array(CLASSES), list(CLASSES)
    table = train[["image_id"]].assign(fold=folds, label=names[train[classes].to_numpy().argmax(1)])
    table = table.merge(out_of_fold, on="image_id", validate="one_to_one")
    probabilities = table[classes].to_numpy()
    table.insert(3, "predicted", names[probabilities.argmax(1)])
    table.insert(4, "wrong", table["predicted"] != table["label"])
    of_label = probabilities[np.arange(len(table)), class_numbers(table["label"])]
    table.insert(5, "loss", -np.log(np.maximum(of_label, np.finfo(np.float32).tiny)))
    return table


def class_numbers(names):
    """The class numbers, int (n,), of n class names."""
    return np.array([CLASSES.index(name) for name in names])


# ---------------------------------------------------------------------------------------------- suspects


def find_suspects(labels, probabilities):
    """Row numbers of the labels that look wrong, most suspect first: confident learning (arXiv 1911.00068).

    labels: int (n,); probabilities: out-of-fold (n, 4). How many there are is estimated from how often the networks
    are surer of another class than they usually are of it; the order is by that margin, adjusted for rare classes.
    """
    return find_label_issues(
        labels,
        probabilities,
        filter_by="low_normalized_margin",
        return_indices_ranked_by="normalized_margin",
        rank_by_kwargs={"adjust_pred_probs": True},
        n_jobs=1,
    )


def hash_photo(photo):
    """64-bit perceptual hashes of a photo as it is, mirrored and turned in all eight ways: int8 (8, 64) of -1 and 1."""
    square = fit_photo(photo, (128, 128))
    ways = [way[::up, ::left] for way in (square, square.transpose(1, 0, 2)) for up in (1, -1) for left in (1, -1)]
    bits = [imagehash.phash(Image.fromarray(np.ascontiguousarray(one))).hash.ravel() for one in ways]
    return np.where(bits, 1, -1).astype(np.int8)


def find_near_duplicates(hashes):
    """Pairs (i, j), i < j, of photos that show nearly the same, however mirrored or turned, the nearest first.

    hashes: int8 (n, 8, 64).
    """
    own, found = hashes[:, 0].astype(np.float32), []
    for start in range(0, len(own), 500):  # a block of rows at a time: n x n would not fit for large n
        agreement = np.einsum("ib,jmb->ijm", own[start : start + 500], hashes.astype(np.float32), optimize=True)
        distance = (64 - agreement.max(2)) / 2
        close = np.argwhere(distance <= NEAR_DUPLICATE)
        found += [(distance[i, j], int(i) + start, int(j)) for i, j in close if i + start < j]
    return [(i, j) for _, i, j in sorted(found)]


def add_suspicions(table, hashes):
    """Add the columns suspect (rank from 1, or empty), suspected_label and near_duplicates. Returns the pairs."""
    probabilities, labels = table[list(CLASSES)].to_numpy(), class_numbers(table["label"])
    suspects = find_suspects(labels, probabilities)
    rank = pd.Series(range(1, len(suspects) + 1), index=suspects, dtype="Int64")
    table["suspect"] = rank.reindex(table.index)
    others = np.where(np.eye(len(CLASSES), dtype=bool)[labels], -1, probabilities)
    table["suspected_label"] = np.where(table["suspect"].notna(), np.array(CLASSES)[others.argmax(1)], "")
    pairs = find_near_duplicates(hashes)
    twins = {row: [] for row in table.index}
    for i, j in pairs:
        twins[i].append(table["image_id"][j])
        twins[j].append(table["image_id"][i])
    table["near_duplicates"] = ["/".join(twins[row]) for row in table.index]  # no image_id holds this character
    return pairs


# ---------------------------------------------------------------------------------------------- heat maps


class Photos:
    """The labelled photos of a table, by row number, decoded when they are needed."""

    def __init__(self, table, args):
        self.table, self.args = table, args
        self.paths = photo_paths(Path(args.data_dir) / "images", table["image_id"])

    def decode(self, row):
        return read_photo(self.paths[row])

    def __getitem__(self, row):
        """As its network sees it: uint8 (height, width, 3)."""
        return fit_photo(self.decode(row), self.args.image_size)

    def show(self, row):
        """Small, for the page, lying as in training: uint8 (height, width, 3)."""
        photo = shrink(self.decode(row))
        return fit_photo(photo, sorted(photo.shape[:2]))

    def look(self):
        """A thumbnail of each, list of data URIs, and their perceptual hashes, int8 (n, 8, 64)."""

        def look_at(row):
            photo = shrink(self.decode(row))
            return data_uri(shrink(photo, THUMBNAIL), 60), hash_photo(photo)

        with ThreadPoolExecutor(cpu_count()) as pool:
            looked = pool.map(look_at, self.table.index)
            thumbnails, hashes = zip(*tqdm(looked, "look at photos", len(self.table), unit="photo"), strict=True)
        return list(thumbnails), np.array(hashes)

    def explain(self, rows, networks):
        """Dict of row to {"photo", "label", "predicted"}: the photo and its heat maps for those classes, data URIs.

        The maps are made by the network of the photo's fold, which has not seen it; "predicted" is left out if right.
        """
        pictures = {}
        for row in tqdm(rows, "heat maps", unit="photo"):
            entry = self.table.loc[row]
            about = ["label", "predicted"] if entry["wrong"] else ["label"]
            images = np.stack([self[row]] * len(about))
            maps = heat_maps(networks[entry["fold"]], images, [CLASSES.index(entry[which]) for which in about])
            photo = shrink(self.decode(row))
            pictures[row] = {"photo": data_uri(photo)}
            pictures[row] |= {which: data_uri(overlay(photo, heat)) for which, heat in zip(about, maps, strict=True)}
        return pictures


def choose_examples(table, worst):
    """Row numbers: the `worst` wrong photos of highest loss, and dict of class to its most certain right ones."""
    wrong = table[table["wrong"]].nlargest(worst, "loss").index.tolist()
    right = table[~table["wrong"]]
    return wrong, {name: right[right["label"] == name].nsmallest(CONFIDENT, "loss").index.tolist() for name in CLASSES}


# ---------------------------------------------------------------------------------------------- the page


def read_metrics(log_dir, folds):
    """What train.py recorded of each epoch, dict of fold to DataFrame. Raises InputError if a file is missing."""
    paths = {fold: Path(log_dir) / "metrics" / f"fold={fold}.csv" for fold in folds}
    for path in paths.values():
        if not path.is_file():
            raise InputError(f"{path} is missing: it belongs to the log directory as train.py left it")
    return {
        fold: read_own_csv(path, ("epoch", "lr", "train_loss", "val_loss", "val_roc_auc"))
        for fold, path in paths.items()
    }


def draw_charts(table, metrics, best):
    """All curves of the page, dict of name to SVG. best: dict of fold to the epoch in use."""
    labels, probabilities = class_numbers(table["label"]), table[list(CLASSES)].to_numpy()
    return {
        "roc": figures.draw_roc(labels, probabilities),
        "confusion": figures.draw_confusion(labels, probabilities.argmax(1)),
        "reliability": figures.draw_reliability(labels, probabilities),
        "loss": figures.draw_epochs(metrics, "val_loss", "loss: validation, training (dashed)", dashed="train_loss"),
        "auc": figures.draw_epochs(metrics, "val_roc_auc", "validation AUC; dot: the epoch in use", best=best),
        "learning_rate": figures.draw_epochs(metrics, "lr", "learning rate"),
    }


def show_tta(args, photos, networks):
    """The photo that its network is least certain of in its TTA views: dict for the page."""
    row = int(photos.table[list(CLASSES)].max(axis=1).idxmin())
    entry, small = photos.table.loc[row], photos.show(row)
    name, fold = entry["image_id"], entry["fold"]
    data, keys = figures.tta_views(photos.decode(row), name, fold, args, args.image_size)
    probabilities = predict({fold: networks[fold]}, data, keys, args, "views")
    shown, _ = figures.tta_views(small, name, fold, args, small.shape[:2])
    views = [
        {"picture": data_uri(shown[key]["image"].numpy()), "probabilities": values.tolist()}
        for key, values in zip(keys, probabilities, strict=True)
    ]
    return {"row": row, "photo": data_uri(small), "views": views, "mean": probabilities.mean(0).tolist()}


def write_page(path, **content):
    """Fill the page's template, error_analysis_page.html.jinja, and write it whole or not at all."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "analysis"), autoescape=True, trim_blocks=True
    )
    environment.filters["pretty"] = figures.pretty
    template = environment.get_template("error_analysis_page.html.jinja")
    with atomic_write(path, "w") as file:
        file.write(template.render(classes=CLASSES, **content))


def main(args):
    check_writable("error_analysis.html", "error_analysis.csv")
    checkpoints, networks = load_trained(args)
    metrics = read_metrics(args.log_dir, args.folds)
    train = read_train(args).reset_index(drop=True)
    folds = read_folds(args.log_dir, train["image_id"])

    table = tabulate(train, folds, predict_out_of_fold(args, train, folds, networks))
    labels, probabilities = np.eye(len(CLASSES))[class_numbers(table["label"])], table[list(CLASSES)]
    auc, aucs = mean_auc(labels, probabilities), column_aucs(labels, probabilities)

    photos = Photos(table, args)
    worst, confident = choose_examples(table, args.worst)
    explained = worst + [row for rows in confident.values() for row in rows]
    thumbnails, hashes = photos.look()
    pairs = add_suspicions(table, hashes)
    contradicting = [(i, j) for i, j in pairs if table["label"][i] != table["label"][j]]
    leaking = [(i, j) for i, j in pairs if table["fold"][i] != table["fold"][j]]
    suspects = table["suspect"].dropna().sort_values().index.tolist()
    pictures = photos.explain(explained, networks)
    pairs_shown = [*contradicting[: args.worst], *leaking[: args.worst]]
    for row in {*suspects[: args.worst], *(row for pair in pairs_shown for row in pair)} - set(pictures):
        pictures[row] = {"photo": data_uri(shrink(photos.decode(row)))}

    table = table.round(6)
    write_csv("error_analysis.csv", table)
    write_page(
        "error_analysis.html",
        args=args,
        checkpoints=checkpoints.to_dict("records"),
        auc=auc,
        aucs=dict(zip(CLASSES, aucs, strict=True)),
        photos=table.assign(row=table.index, thumbnail=thumbnails)
        .astype(object)
        .replace({np.nan: None})
        .to_dict("records"),
        pictures=pictures,
        worst=worst,
        confident=confident,
        suspects=suspects,
        pairs=pairs,
        contradicting=contradicting,
        leaking=leaking,
        charts=draw_charts(table, metrics, dict(zip(checkpoints["fold"], checkpoints["epoch"], strict=True))),
        augmentations=[
            (title, data_uri(one)) for title, one in figures.augmentation_pictures(photos.show(explained[-1]))
        ],
        tta=show_tta(args, photos, networks),
    )
    say(
        f"wrote error_analysis.html and error_analysis.csv: {len(table)} photos, out-of-fold AUC {auc:.5f}, "
        f"{table['wrong'].sum()} wrong, {len(suspects)} suspect labels, {len(pairs)} pairs of near-duplicates "
        f"({len(contradicting)} of contradicting labels, {len(leaking)} in different folds)"
    )


if __name__ == "__main__":
    main(ARGS)
