"""After step 1 or 3: what the networks get wrong, where they looked, and which labels look wrong.

  python error_analysis.py
  python error_analysis.py --log_dir logs_submit_distill

Reads   LOG_DIR (checkpoints, records, folds.csv, metrics/, and in predictions/ the out-of-fold predictions, if step 2 has
        left them) and the labelled photos of DATA_DIR.
Writes  error_analysis.html: one page that works offline, with heat maps, suspect labels, curves and all photos;
        error_analysis.csv: one row per photo, predicted by the network of its fold, which has not seen it.
Expect  the out-of-fold AUC, the number of errors, suspects and near-duplicates.
"""

from harness.console import parse_args, positive
from utils import CLASSES, make_prediction_parser


def make_analysis_parser():
    """What error_analysis.py takes."""
    parser = make_prediction_parser(__doc__)
    group = parser.add_argument_group("error analysis")
    group.add_argument("--worst", type=positive, default=24, metavar="N", help="number of examples of each kind shown")
    return parser


if __name__ == "__main__":  # before the imports that take seconds: a typo should not wait for them
    ARGS = parse_args(make_analysis_parser())

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues
from joblib import cpu_count
from PIL import Image
from tqdm import tqdm

from analysis import figures
from analysis.heat_maps import count_cells, data_uri, mark_photo, shrink
from dataset import fit_photo, read_train
from harness.console import say
from harness.files import check_writable, write_csv
from harness.photos import photo_paths, read_photo
from harness.record import read_folds, read_own_csv
from inference import load_trained, predict, predict_out_of_fold, tta_views
from utils import column_aucs, decide, log_losses, mean_auc, name_labels, parse_labels

THUMBNAIL = 120  # longest side in pixels: there is one of every photo
CONFIDENT = 2  # right and most certain photos of each class that get heat maps
NEAR_DUPLICATE = 8  # bits of 64 in which the perceptual hashes of near-duplicates may differ

# ---------------------------------------------------------------------------------------------- out-of-fold predictions


def tabulate(train, folds, out_of_fold):
    """One row per photo: image_id, fold, label, predicted, wrong, loss (as of log_losses), probabilities.

    train: DataFrame of train.csv; folds: int (n,); out_of_fold: DataFrame with image_id and the probabilities of all or
    some of these photos, in the order of train.csv.
    """
    table = train[["image_id"]].assign(fold=folds, label=name_labels(train[list(CLASSES)]))
    table = table.merge(out_of_fold, on="image_id", validate="one_to_one")
    probabilities = table[list(CLASSES)].to_numpy()
    table.insert(3, "predicted", name_labels(decide(probabilities)))
    table.insert(4, "wrong", table["predicted"] != table["label"])
    table.insert(5, "loss", log_losses(parse_labels(table["label"]), probabilities))
    return table


# ---------------------------------------------------------------------------------------------- suspects


def find_suspects(labels, probabilities):
    """Row numbers of the labels that look wrong, most suspect first: confident learning (arXiv 1911.00068).

    labels: bool (n, k); probabilities: out-of-fold (n, k). How many there are is estimated from how often the networks
    are surer of another class than they usually are of it; the order is by that margin, adjusted for rare classes.
    """
    ranking = {"return_indices_ranked_by": "normalized_margin", "rank_by_kwargs": {"adjust_pred_probs": True}}
    several = bool((labels.sum(1) != 1).any())  # then each class is a question of its own
    given = [np.flatnonzero(row).tolist() for row in labels] if several else labels.argmax(1)
    how = {"filter_by": "low_normalized_margin", "n_jobs": 1, "multi_label": several}
    return find_label_issues(given, probabilities, **how, **ranking)


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
    probabilities, labels = table[list(CLASSES)].to_numpy(), parse_labels(table["label"])
    suspects = find_suspects(labels, probabilities)
    table["suspect"] = pd.Series(range(1, len(suspects) + 1), index=suspects, dtype="Int64")
    others = np.where(labels, -1, probabilities)
    table["suspected_label"] = np.where(table["suspect"].notna(), np.array(CLASSES)[others.argmax(1)], "")
    pairs = find_near_duplicates(hashes)
    twins = {row: [] for row in table.index}
    for i, j in pairs:
        twins[i].append(table["image_id"][j])
        twins[j].append(table["image_id"][i])
    table["near_duplicates"] = ["/".join(twins[row]) for row in table.index]  # no image_id holds this character
    return pairs


# ---------------------------------------------------------------------------------------------- the page


def look_at(path):
    """The thumbnail of a photo, a data URI, and its perceptual hashes, int8 (8, 64)."""
    photo = shrink(read_photo(path))
    return data_uri(shrink(photo, THUMBNAIL), 60), hash_photo(photo)


def choose_examples(table, worst):
    """Row numbers: the `worst` wrong photos of highest loss, and the most certain right ones of each class in turn."""
    wrong, right = table[table["wrong"]], table[~table["wrong"]]
    of_class = parse_labels(right["label"]).T
    confident = [right[chosen].nsmallest(CONFIDENT, "loss").index.tolist() for chosen in of_class]
    return wrong.nlargest(worst, "loss").index.tolist(), sum(confident, [])


def explain(path, entry, network, image_size):
    """A photo and its heat maps for its label and, if that is another one, the predicted class, as data URIs.

    entry: its row of the table; network: of its fold, which has not seen it. Returns a dict: photo; maps, a list of
    (class, whether it is a label, data URI).
    """
    label, predicted = parse_labels(entry[["label", "predicted"]])
    about = [*np.flatnonzero(label), *np.flatnonzero(predicted & ~label)]
    photo, *maps = map(data_uri, mark_photo(path, about, [network], image_size))
    return {"photo": photo, "maps": [(CLASSES[k], label[k], uri) for k, uri in zip(about, maps, strict=True)]}


def show_least_certain(args, table, paths, networks):
    """The photo of which its network is least certain, augmented, and its views of TTA: dict for the page.

    paths: the photos of the table; networks: dict of fold to LeafNet.
    """
    row = table[list(CLASSES)].max(axis=1).idxmin()
    fold, network = table["fold"][row], networks[table["fold"][row]]
    photo = fit_photo(read_photo(paths[row]), args.image_size)
    augmentations = [(title, data_uri(shrink(one))) for title, one in figures.augmentation_pictures(photo)]
    views, n_views = tta_views(args, [table["image_id"][row]], [photo])
    keys = [(fold, view, 0) for view in range(n_views)]
    probabilities = pd.DataFrame(predict({fold: network}, views, keys, args, "views"), columns=list(CLASSES))
    pictures = [data_uri(shrink(views[key]["image"].numpy())) for key in keys]
    page = {"least_certain": row, "augmentations": augmentations, "mean_of_views": probabilities.mean()}
    page["views"] = list(zip(pictures, probabilities.to_dict("records"), strict=True))
    return page | {"photo_as_seen": data_uri(shrink(photo)), "cells": count_cells(network, photo)}


def draw_charts(labels, probabilities, aucs, metrics, best):
    """All curves of the page, dict of name to SVG. Arguments as of figures.draw_roc and figures.draw_epochs."""
    return {
        "roc": figures.draw_roc(labels, probabilities, aucs),
        "reliability": figures.draw_reliability(labels, probabilities),
        "loss": figures.draw_epochs(metrics, "val_loss", "loss: validation, training (dashed)", dashed="train_loss"),
        "auc": figures.draw_epochs(metrics, "val_roc_auc", "validation AUC; dot: the epoch in use", best=best),
        "learning_rate": figures.draw_epochs(metrics, "lr", "learning rate"),
    }


def main(args):
    check_writable("error_analysis.html", "error_analysis.csv")
    checkpoints, networks = load_trained(args)
    names = ("epoch", "lr", "train_loss", "val_loss", "val_roc_auc")
    metrics = {fold: read_own_csv(Path(args.log_dir) / "metrics" / f"fold={fold}.csv", names) for fold in args.folds}
    train = read_train(args).reset_index(drop=True)
    folds = read_folds(args.log_dir, train["image_id"])
    table = tabulate(train, folds, predict_out_of_fold(args, train, folds, networks))
    labels, probabilities = parse_labels(table["label"]), table[list(CLASSES)].to_numpy()
    auc, aucs = mean_auc(labels, probabilities), column_aucs(labels, probabilities)

    paths = photo_paths(Path(args.data_dir) / "images", table["image_id"])
    with ThreadPoolExecutor(cpu_count()) as pool:
        looked = tqdm(pool.map(look_at, paths), "look at photos", len(paths), unit="photo")
        thumbnails, hashes = zip(*looked, strict=True)
    pairs = add_suspicions(table, np.array(hashes))
    contradicting = [(i, j) for i, j in pairs if table["label"][i] != table["label"][j]]
    leaking = [(i, j) for i, j in pairs if table["fold"][i] != table["fold"][j]]
    suspects = table["suspect"].dropna().sort_values().index.tolist()
    worst, confident = choose_examples(table, args.worst)
    pictures = {
        row: explain(paths[row], table.loc[row], networks[table["fold"][row]], args.image_size)
        for row in tqdm(worst + confident, "heat maps", unit="photo")
    }
    for row in {*suspects[: args.worst], *sum(contradicting[: args.worst] + leaking[: args.worst], ())} - set(pictures):
        pictures[row] = {"photo": data_uri(shrink(read_photo(paths[row])))}
    best = dict(zip(checkpoints["fold"], checkpoints["epoch"], strict=True))
    charts = draw_charts(labels, probabilities, aucs, metrics, best)
    page = show_least_certain(args, table, paths, networks) | {"args": args, "auc": auc, "aucs": aucs, "charts": charts}
    table = table.round(6)
    write_csv("error_analysis.csv", table)
    rows = table.assign(row=table.index, thumbnail=thumbnails).astype(object).replace({np.nan: None})
    page |= {"photos": rows.to_dict("records"), "pictures": pictures, "worst": worst, "confident": confident}
    page |= {"suspects": suspects, "pairs": pairs, "contradicting": contradicting, "leaking": leaking}
    page["confusion"] = labels.T.astype(int) @ decide(probabilities)
    figures.write_page("error_analysis.html", "error_analysis_page.html.jinja", page)
    say(
        f"wrote error_analysis.html and error_analysis.csv: {len(table)} photos, out-of-fold AUC {auc:.5f}, "
        f"{table['wrong'].sum()} wrong, {len(suspects)} suspect labels, {len(pairs)} pairs of near-duplicates "
        f"({len(contradicting)} of contradicting labels, {len(leaking)} in different folds)"
    )


if __name__ == "__main__":
    main(ARGS)
