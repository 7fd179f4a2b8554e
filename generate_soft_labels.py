"""Step 2: out-of-fold predictions and a first submission.

  python generate_soft_labels.py

Reads   LOG_DIR (what step 1 left: the best checkpoint of each fold, folds.csv, hparams.yaml) and DATA_DIR.
Writes  soft_labels.csv: each training photo, by the network that has not seen it, without augmentation;
        submission.csv: each test photo, the mean of five networks x eight augmented views (TTA).
Expect  the out-of-fold AUC; 0.97988 public and 0.98108 private at Kaggle for submission.csv (published).
"""

from utils import CLASSES, N_FOLDS, column_aucs, make_parser, mean_auc, parse_args

if __name__ == "__main__":  # before the imports that take seconds: a typo should not wait for them
    ARGS = parse_args(make_parser(__doc__))

from dataset import read_test
from harness.console import say
from harness.files import write_csv
from harness.log_dir import read_folds
from harness.prediction import prepare_prediction, stopping_cleanly
from harness.tables import read_train_csv
from inference import load_networks, predict_out_of_fold, predict_test


def main(args):
    checkpoints = prepare_prediction(args, N_FOLDS)
    train = read_train_csv(args.data_dir, CLASSES)
    folds = read_folds(args.log_dir, train["image_id"])
    test = read_test(args)  # now, or what is wrong with it would be said after a long prediction
    networks = load_networks(args, checkpoints)

    soft_labels = predict_out_of_fold(args, train, folds, networks)
    write_csv("soft_labels.csv", soft_labels)
    known = train[train["image_id"].isin(soft_labels["image_id"])]
    compared = known[list(CLASSES)], soft_labels[list(CLASSES)]
    columns = ", ".join(f"{name} {auc:.4f}" for name, auc in zip(CLASSES, column_aucs(*compared), strict=True))
    say(f"wrote soft_labels.csv: out-of-fold AUC {mean_auc(*compared):.5f} ({columns})")

    submission = predict_test(args, networks, *test)
    write_csv("submission.csv", submission)
    say(f"wrote submission.csv: {len(submission)} rows")


if __name__ == "__main__":
    with stopping_cleanly(ARGS):
        main(ARGS)
