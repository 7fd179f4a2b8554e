"""Prediction: out-of-fold, and test-time augmentation. Used by steps 2 and 4 and the error analysis, not by the training."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import LeafDataset, cached_photos, fit_photo, train_augmentation
from harness.console import InputError, say
from harness.devices import autocast, enough_memory
from harness.prediction import check_networks, keep_predictions, prepare_prediction
from models import load_network
from utils import CLASSES, N_FOLDS

KEEP_EVERY = 60  # seconds: how much of a prediction is lost with an interruption


def load_trained(args):
    """What every prediction begins with: the best checkpoints, DataFrame with fold and checkpoint, and their networks.

    Takes from LOG_DIR what was not typed, sets devices, precision, fingerprint, notes of args. The networks are a dict
    of fold to LeafNet. Raises InputError if a fold is missing, or if LeafNet or fit_photo was edited since.
    """
    checkpoints = prepare_prediction(args, N_FOLDS, CLASSES)
    networks = {}
    for fold, name in zip(checkpoints["fold"], checkpoints["checkpoint"], strict=True):
        networks[fold] = load_network(Path(args.log_dir) / name, args.backbone)
    check_networks(args.log_dir, networks, fit_photo, args.accept_changes)
    for network in networks.values() if args.compile else ():
        network.compile(options={"freezing": True})
    return checkpoints, networks


def tta_views(args, image_ids, images):
    """The views of photos for test-time augmentation: a data set with the keys (fold, view, row), and the views of each.

    The one place where they are made: for steps 2 and 4, for predict.py --tta and for the error analysis.
    images: indexable, row → uint8 (height, width, 3).
    """
    return LeafDataset(images, image_ids, augmentation=train_augmentation(), seed=args.seed), args.tta_draws


def predict_tta(args, networks, image_ids, images, keep_as=None):
    """Mean softmax of all views and folds: DataFrame with image_id and a column per class, in the order of `image_ids`.

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
    Returns a DataFrame with image_id and a column per class, the rows of those folds in the order of train.csv.
    """
    images = cached_photos(args, "train", train["image_id"])
    keys = [(fold, 0, int(row)) for fold in networks for row in np.flatnonzero(folds == fold)]
    kept = keep_predictions(args, "out-of-fold", images, keys, len(CLASSES))
    probabilities = predict(networks, LeafDataset(images, train["image_id"]), keys, args, "out-of-fold", kept)
    rows = [row for _, _, row in keys]
    soft_labels = pd.DataFrame(probabilities.astype(np.float64), columns=list(CLASSES), index=rows)
    soft_labels["image_id"] = train["image_id"].to_numpy()[rows]
    return soft_labels.sort_index()[["image_id", *CLASSES]]


def predict(networks, dataset, keys, args, title, kept=None):
    """Probabilities of each key (fold, draw, row) by the network of its fold: float32 (n, k). The one place that predicts.

    networks: dict of fold to LeafNet, in evaluation mode; kept: as of keep_predictions, for what takes long. A batch is
    of one fold. The folds take turns, so that all read a photo while it is in memory, and are spread over args.devices:
    nothing waits for a device before the end, so that several compute at once. Raises InputError if a network predicts
    nan.
    """
    of_fold = [[i for i, key in enumerate(keys) if key[0] == fold] for fold in networks]
    starts = range(0, max(map(len, of_fold)), args.val_batch_size)
    batches = [rows[start : start + args.val_batch_size] for start in starts for rows in of_fold if rows[start:]]
    values = np.full((len(keys), len(CLASSES)), np.nan, np.float32) if kept is None else kept
    todo = [rows for rows in batches if np.isnan(values[rows]).any()]
    if not todo:
        say(f"{title}: predicted already")
    devices = {fold: args.devices[i % len(args.devices)] for i, fold in enumerate(networks)}
    advice = f"type a smaller --val_batch_size than {args.val_batch_size}"
    with enough_memory(advice):
        networks = {fold: network.to(devices[fold]) for fold, network in networks.items()}
    kind, parts, written = args.devices[0].type, [], time.monotonic()
    workers = {"num_workers": args.num_workers, "pin_memory": kind == "cuda"}
    loader = DataLoader(dataset, batch_sampler=[[keys[i] for i in rows] for rows in todo], **workers)
    bar = tqdm(loader, title, initial=len(batches) - len(todo), total=len(batches), unit="batch", mininterval=1)
    with enough_memory(advice), torch.inference_mode(), autocast(kind, args.precision):
        for rows, batch in zip(todo, bar, strict=True):
            fold = keys[rows[0]][0]
            logits = networks[fold](batch["image"].to(devices[fold], non_blocking=True))
            parts.append((rows, networks[fold].probabilities(logits)))
            if rows is todo[-1] or kept is not None and time.monotonic() > written + KEEP_EVERY:
                for of_part, part in parts:
                    values[of_part] = part.cpu().numpy()
                parts, written = [], time.monotonic()
    if bad := sorted({keys[i][0] for i in np.flatnonzero(np.isnan(values).any(1))}):
        raise InputError(
            f"the network of fold {' '.join(map(str, bad))} predicts nan, so nothing is written: its training has "
            "diverged; train it anew with --fresh, perhaps with a smaller --learning_rate"
        )
    return np.array(values)
