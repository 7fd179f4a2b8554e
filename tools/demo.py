"""The whole pipeline on rendered leaves, on the CPU: what `make demo` runs.

  python -m tools.demo

Writes  demo/: sample/ (the rendered data set), logs/, logs_submit_distill/, and the four CSV files of the steps.
Expect  each command and its progress, and in the end a table of AUCs: the sample's test labels are known.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from harness.console import Parser, parse_args
from utils import CLASSES, mean_auc

REPO = Path(__file__).parent.parent
FOLDER = REPO / "demo"
SAMPLE = "-m tools.generate_sample_data --out sample --n_train 200 --n_test 100"
SMALL = "--data_dir sample --weights none --image_size 64 96 --max_epochs 5 --train_batch_size 8 --keep_checkpoints 1"
TRAIN = f"../train.py {SMALL} --fresh"
DISTILL = f"{TRAIN} --soft_labels_filename soft_labels.csv --log_dir logs_submit_distill"
STEPS = (TRAIN, "../generate_soft_labels.py", DISTILL, "../generate_distilled_submission.py", "../blend.py")


def auc_of(truth, path):
    """The mean column-wise AUC of a CSV in FOLDER. truth: DataFrame of labels with the image_ids as its index."""
    return mean_auc(truth, pd.read_csv(FOLDER / path, index_col="image_id").loc[truth.index, list(CLASSES)])


def main():
    parse_args(Parser(__doc__))
    started, environment = time.monotonic(), {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    FOLDER.mkdir(exist_ok=True)
    for command in (SAMPLE, *STEPS):
        print(f"\n$ python {command}", flush=True)
        if status := subprocess.call([sys.executable, *command.split()], cwd=FOLDER, env=environment):
            raise SystemExit(f"error: that command ended with status {status}")
    minutes = (time.monotonic() - started) / 60
    print(f"\nMean column-wise ROC AUC, after {minutes:.1f} minutes:")
    train, test = (pd.read_csv(FOLDER / "sample" / name, index_col=0) for name in ("train.csv", "test_labels.csv"))
    print(f"{'out-of-fold, soft_labels.csv':34}{auc_of(train, 'soft_labels.csv'):8.4f}\non the sample's test labels:")
    for name in ("submission.csv", "submission_distill.csv", "submission_mix.csv"):
        print(f"{name:34}{auc_of(test, name):8.4f}")


if __name__ == "__main__":
    main()
