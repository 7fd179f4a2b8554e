"""Prediction: out-of-fold, and test-time augmentation. Used by steps 2 and 4 and the error analysis, not by the training."""

from pathlib import Path

import numpy as np
import pandas as pd

from dataset import LeafDataset, cached_photos, fit_photo, train_augmentation
from harness.prediction import check_networks, keep_predictions, load_network, predict, prepare_prediction
from models import LeafNet
from utils import CLASSES, N_FOLDS


def load_trained(args):
    """What every prediction begins with: the best checkpoints, DataFrame with fold and checkpoint, and their networks.

    Takes from LOG_DIR what was not typed, sets args.devices, args.precision and args.fingerprint. The networks are a dict
    of fold to LeafNet. Raises InputError if a fold is missing, or if LeafNet or fit_photo was edited since.
    """
    checkpoints = prepare_prediction(args, N_FOLDS)
    networks = {}
    for fold, name in zip(checkpoints["fold"], checkpoints["checkpoint"], strict=True):
        networks[fold] = load_network(Path(args.log_dir) / name, LeafNet(args.backbone), args.compile)
    check_networks(args, networks, fit_photo)
    return checkpoints, networks


def tta_views(args, image_ids, images):
    """The views of photos for test-time augmentation: a data set with the keys (fold, view, row), and the views of each.

    The one place where they are made: for steps 2 and 4, for predict.py --tta and for the error analysis.
    images: indexable, row → uint8 (height, width, 3).
    """
    return LeafDataset(images, image_ids, augmentation=train_augmentation(), seed=args.seed), args.tta_draws


def predict_tta(args, networks, image_ids, images, keep_as=None):
    """Mean softmax of all views and folds: DataFrame with image_id and four columns, in the order of `image_ids`.

    networks: dict of fold to LeafNet; images: as of tta_views; keep_as: a name, to go on after an interruption.
    """
    views, n_views = tta_views(args, image_ids, images)
    n = len(image_ids)
    keys = [(fold, view, row) for fold in networks for row in range(n) for view in range(n_views)]
    kept = keep_predictions(args, keep_as, images, keys, len(CLASSES)) if keep_as else None
    probabilities = predict(networks, views, keys, args, f"{n} photos x {n_views} x {len(networks)}", kept)
    mean = np.zeros((n, len(CLASSES)))
    np.add.at(mean, [row for _, _, row in keys], probabilities)
    mean /= len(networks) * n_views
    return pd.DataFrame(mean, columns=list(CLASSES)).assign(image_id=list(image_ids))[["image_id", *CLASSES]]


def predict_out_of_fold(args, train, folds, networks):
    """Softmax of every training photo by the network that has not seen it, without augmentation.

    train: DataFrame of train.csv; folds: int (n,), the fold of each row; networks: dict of fold to LeafNet.
    Returns a DataFrame with image_id and four columns, the rows of those folds in the order of train.csv.
    """
    images = cached_photos(args, "train", train["image_id"])
    keys = [(fold, 0, int(row)) for fold in networks for row in np.flatnonzero(folds == fold)]
    kept = keep_predictions(args, "out-of-fold", images, keys, len(CLASSES))
    probabilities = predict(networks, LeafDataset(images, train["image_id"]), keys, args, "out-of-fold", kept)
    rows = [row for _, _, row in keys]
    soft_labels = pd.DataFrame(probabilities.astype(np.float64), columns=list(CLASSES), index=rows)
    soft_labels["image_id"] = train["image_id"].to_numpy()[rows]
    return soft_labels.sort_index()[["image_id", *CLASSES]]
