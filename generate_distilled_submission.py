"""Step 4: the submission of the networks that step 3 trained on the soft labels.

  python generate_distilled_submission.py

Reads   LOG_DIR (what step 3 left: the best checkpoint of each fold, hparams.yaml) and DATA_DIR.
Writes  submission_distill.csv: each test photo, the mean of five networks x eight augmented views (TTA).
Expect  0.98422 public and 0.98135 private at Kaggle (published).
"""

from harness.console import parse_args
from utils import make_prediction_parser, output_name, write_submission

if __name__ == "__main__":  # before the imports that take seconds: a typo should not wait for them
    ARGS = parse_args(make_prediction_parser(__doc__, log_dir="logs_submit_distill"))

from dataset import read_test
from harness.console import say
from harness.files import check_writable
from inference import load_trained, predict_tta


def main(args):
    _, networks = load_trained(args)
    name = output_name("submission_distill.csv", args.limit, args.folds)
    check_writable(name)
    submission = predict_tta(args, networks, *read_test(args), keep_as="test")
    write_submission(name, submission)
    say(f"wrote {name}: {len(submission)} rows")


if __name__ == "__main__":
    main(ARGS)
