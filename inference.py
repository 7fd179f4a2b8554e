"""Prediction: out-of-fold, and test-time augmentation. Used by steps 2 and 4 and the error analysis, not by the training."""

from pathlib import Path

import numpy as np
import pandas as pd

from dataset import LeafDataset, cached_photos, fit_photo, train_augmentation
from harness.prediction import KeptPredictions, load_network, predict, prepare_prediction
from models import LeafNet
from utils import CLASSES, N_FOLDS


def load_trained(args):
    """What every prediction begins with: the best checkpoints, DataFrame with fold and checkpoint, and their networks.

    Takes from LOG_DIR what was not typed, sets args.devices, args.precision and args.fingerprint. The networks are a dict
    of fold to LeafNet. Raises InputError if a fold is missing, or if LeafNet or fit_photo was edited since.
    """
    checkpoints = prepare_prediction(args, N_FOLDS, predicts_with=(fit_photo, LeafNet))
    pairs = zip(checkpoints["fold"], checkpoints["checkpoint"], strict=True)
    return checkpoints, {fold: load_network(Path(args.log_dir) / name, LeafNet(args.backbone)) for fold, name in pairs}


def predict_test(args, networks, image_ids, images):
    """Test predictions with TTA: each fold's network sees every test photo --tta_draws times under the training augmentation.

    networks: dict of fold to LeafNet; image_ids, images: as of read_test. Returns a DataFrame with image_id and the
    mean softmax of all draws and folds, in the row order of sample_submission.csv.
    """
    dataset = LeafDataset(images, image_ids, augmentation=train_augmentation(), seed=args.seed)
    # as many photos as fill a batch; all networks see them before the next ones are read
    at_once = max(1, args.val_batch_size // args.tta_draws)
    keys = [
        (fold, draw, row)
        for start in range(0, len(image_ids), at_once)
        for fold in networks
        for row in range(start, min(start + at_once, len(image_ids)))
        for draw in range(args.tta_draws)
    ]
    kept = KeptPredictions(args, "test", images, keys)
    probabilities = predict(networks, dataset, keys, args, f"test photos x {args.tta_draws} x {len(networks)}", kept)
    mean = np.zeros((len(image_ids), len(CLASSES)))
    np.add.at(mean, [row for _, _, row in keys], probabilities)
    mean /= len(networks) * args.tta_draws
    return pd.DataFrame(mean, columns=list(CLASSES)).assign(image_id=image_ids)[["image_id", *CLASSES]]


def predict_out_of_fold(args, train, folds, networks):
    """Softmax of every training photo by the network that has not seen it, without augmentation.

    train: DataFrame of train.csv; folds: int (n,), the fold of each row; networks: dict of fold to LeafNet.
    Returns a DataFrame with image_id and four columns, the rows of those folds in the order of train.csv.
    """
    images = cached_photos(args, "train", train["image_id"])
    keys = [(fold, 0, int(row)) for fold in networks for row in np.flatnonzero(folds == fold)]
    dataset = LeafDataset(images, train["image_id"])
    kept = KeptPredictions(args, "out-of-fold", images, keys)
    probabilities = predict(networks, dataset, keys, args, "out-of-fold", kept)
    soft_labels = pd.DataFrame(
        probabilities.astype(np.float64), columns=list(CLASSES), index=[row for _, _, row in keys]
    )
    soft_labels["image_id"] = train["image_id"].to_numpy()[soft_labels.index]
    return soft_labels.sort_index()[["image_id", *CLASSES]]
