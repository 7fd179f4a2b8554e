"""What TTA is worth: each labelled photo, by the network that has not seen it, predicted with TTA. Typed by run.sh.

  PYTHONPATH=RECIPE python results/leaves/tta_out_of_fold.py --log_dir LOG_DIR

Reads   LOG_DIR and DATA_DIR, as step 2 does.
Writes  tta_out_of_fold.csv: image_id and the probability of each class.
"""

import numpy as np
import pandas as pd
from torch.utils.data import Subset

from dataset import cached_photos, read_train
from harness.console import parse_args, say
from harness.files import write_csv
from harness.record import read_folds
from inference import load_trained, predict_tta
from utils import make_prediction_parser

if __name__ == "__main__":
    args = parse_args(make_prediction_parser(__doc__))
    _, networks = load_trained(args)
    image_ids = read_train(args)["image_id"]
    folds, images, parts = read_folds(args.log_dir, image_ids), cached_photos(args, "train", image_ids), []
    for fold, network in networks.items():
        rows = np.flatnonzero(folds == fold)
        parts.append(predict_tta(args, {fold: network}, image_ids.iloc[rows], Subset(images, rows)))
    write_csv("tta_out_of_fold.csv", pd.concat(parts))
    say("wrote tta_out_of_fold.csv")
