"""Step 2: out-of-fold predictions and a first submission.

  python generate_soft_labels.py

Reads   LOG_DIR (what step 1 left: the best checkpoint of each fold, folds.csv, hparams.yaml) and DATA_DIR.
Writes  soft_labels.csv: each training photo, by the network that has not seen it, without augmentation;
        submission.csv: each test photo, the mean of five networks x eight augmented views (TTA).
Expect  the out-of-fold AUC; 0.97988 public and 0.98108 private at Kaggle for submission.csv (published).
"""

from dataset import read_test, read_train_csv
from models import load_networks, predict_out_of_fold, predict_test
from utils import (
    CLASSES,
    build_parser,
    column_aucs,
    go_on,
    mean_auc,
    parse_args,
    prepare_prediction,
    read_folds,
    say,
    stop_cleanly,
    write_csv,
)


def main(args):
    checkpoints = prepare_prediction(args)
    train = read_train_csv(args.data_dir)
    folds = read_folds(args.log_dir, train["image_id"])
    test = read_test(args)  # now, or what is wrong with it would be said after a long prediction
    networks = load_networks(args, checkpoints)

    soft_labels = predict_out_of_fold(args, train, folds, networks)
    write_csv("soft_labels.csv", soft_labels)
    known = train[train["image_id"].isin(soft_labels["image_id"])]
    compared = known[list(CLASSES)], soft_labels[list(CLASSES)]
    each = ", ".join(f"{name} {auc:.4f}" for name, auc in zip(CLASSES, column_aucs(*compared), strict=True))
    say(f"wrote soft_labels.csv: out-of-fold AUC {mean_auc(*compared):.5f} ({each})")

    submission = predict_test(args, networks, *test)
    write_csv("submission.csv", submission)
    say(f"wrote submission.csv: {len(submission)} rows")


if __name__ == "__main__":
    args = parse_args(build_parser(__doc__))
    with stop_cleanly(lambda: f"what is predicted is kept in {args.log_dir}; {go_on()}"):
        main(args)
