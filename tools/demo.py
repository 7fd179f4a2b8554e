"""The whole pipeline on rendered leaves, on the CPU: what `make demo` runs.

  python -m tools.demo

Runs on the CPU, also where there are GPUs.
Writes  demo/: sample/ (the rendered data set), logs/, logs_submit_distill/, and the four CSV files.
Expect  every command as it is run, its progress, and in the end a table of AUCs; the sample's test labels are known.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from harness.console import Parser, parse_args
from utils import CLASSES, mean_auc

REPO = Path(__file__).parent.parent
FOLDER = REPO / "demo"
SAMPLE = "--out sample --n_train 200 --n_test 100"
SETTINGS = "--data_dir sample --weights none --image_size 64 96 --max_epochs 5 --train_batch_size 8"


def run(command):
    """Run a Python command in FOLDER, showing it as one would type it; end the demonstration if it fails."""
    print(f"\n$ python {command}", flush=True)
    done = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise SystemExit(f"error: that command ended with status {done.returncode}")


def read_columns(path, image_ids=None):
    """The four class columns of a CSV in FOLDER, (n, 4), in its own row order or that of `image_ids`."""
    frame = pd.read_csv(FOLDER / path).set_index("image_id")
    return frame.loc[frame.index if image_ids is None else image_ids, list(CLASSES)]


def auc_table():
    """What was reached, as lines of text: AUC of each fold, out of fold, and of the three submissions."""
    train, test = read_columns("sample/train.csv"), read_columns("sample/test_labels.csv")
    first = pd.read_csv(FOLDER / "logs" / "results.csv")
    second = pd.read_csv(FOLDER / "logs_submit_distill" / "results.csv")
    yield f"{'':34}{'step 1':>8}{'step 3':>8}"
    for fold, one, two in zip(first["fold"], first["val_roc_auc"], second["val_roc_auc"], strict=True):
        yield f"{f'fold {fold}, best epoch, validation':34}{one:8.4f}{two:8.4f}"
    yield f"{'out-of-fold, soft_labels.csv':34}{mean_auc(train, read_columns('soft_labels.csv', train.index)):8.4f}"
    yield "on the sample's test labels:"
    for name in ("submission.csv", "submission_distill.csv", "submission_mix.csv"):
        yield f"{name:34}{mean_auc(test, read_columns(name, test.index)):8.4f}"


def main():
    parse_args(Parser(__doc__))
    started = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    run(f"-m tools.generate_sample_data {SAMPLE}")
    run(f"../train.py {SETTINGS} --fresh")
    run("../generate_soft_labels.py")
    run(f"../train.py {SETTINGS} --fresh --soft_labels_filename soft_labels.csv --log_dir logs_submit_distill")
    run("../generate_distilled_submission.py")
    run("../blend.py")
    print(f"\nMean column-wise ROC AUC, after {(time.monotonic() - started) / 60:.1f} minutes:")
    print("\n".join(auc_table()))


if __name__ == "__main__":
    main()
