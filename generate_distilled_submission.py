"""Step 4: the submission of the networks that step 3 trained on the soft labels.

  python generate_distilled_submission.py

Reads   LOG_DIR (what step 3 left: the best checkpoint of each fold, hparams.yaml) and DATA_DIR.
Writes  submission_distill.csv: each test photo, the mean of five networks x eight augmented views (TTA).
Expect  0.98422 public and 0.98135 private at Kaggle (published).
"""

from utils import N_FOLDS, make_parser, parse_args

if __name__ == "__main__":  # before the imports that take seconds: a typo should not wait for them
    ARGS = parse_args(make_parser(__doc__, log_dir="logs_submit_distill"))

from dataset import read_test
from harness.console import say
from harness.files import write_csv
from harness.prediction import prepare_prediction, stopping_cleanly
from inference import load_networks, predict_test


def main(args):
    checkpoints = prepare_prediction(args, N_FOLDS)
    submission = predict_test(args, load_networks(args, checkpoints), *read_test(args))
    write_csv("submission_distill.csv", submission)
    say(f"wrote submission_distill.csv: {len(submission)} rows")


if __name__ == "__main__":
    with stopping_cleanly(ARGS):
        main(ARGS)
