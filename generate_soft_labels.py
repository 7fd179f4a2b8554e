"""Step 2: out-of-fold predictions and a first submission.

  python generate_soft_labels.py

Reads   LOG_DIR (what step 1 left: the best checkpoint of each fold, folds.csv, hparams.yaml) and DATA_DIR.
Writes  soft_labels.csv: each training photo, by the network that has not seen it, without augmentation;
        submission.csv: each test photo, the mean of five networks x eight augmented views (TTA).
Expect  the out-of-fold AUC; 0.97988 public and 0.98108 private at Kaggle for submission.csv (published).
"""

from harness.console import parse_args
from utils import CLASSES, describe_aucs, make_prediction_parser, output_name, write_submission

if __name__ == "__main__":  # before the imports that take seconds: a typo should not wait for them
    ARGS = parse_args(make_prediction_parser(__doc__))

from dataset import read_test, read_train
from harness.console import say
from harness.files import check_writable, write_csv
from harness.record import read_folds
from inference import load_trained, predict_out_of_fold, predict_tta


def main(args):
    _, networks = load_trained(args)
    train = read_train(args)
    folds = read_folds(args.log_dir, train["image_id"])
    names = [output_name(name, args.limit, args.folds) for name in ("soft_labels.csv", "submission.csv")]
    check_writable(*names)
    test = read_test(args)  # now, or what is wrong with it would be said after a long prediction

    soft_labels = predict_out_of_fold(args, train, folds, networks)
    write_csv(names[0], soft_labels)
    known = train[train["image_id"].isin(soft_labels["image_id"])]
    aucs = describe_aucs(known[list(CLASSES)], soft_labels[list(CLASSES)])
    say(f"wrote {names[0]}: out-of-fold AUC {aucs}")

    submission = predict_tta(args, networks, *test, keep_as="test")
    write_submission(names[1], submission)
    say(f"wrote {names[1]}: {len(submission)} rows")


if __name__ == "__main__":
    main(ARGS)
