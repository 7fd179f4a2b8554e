"""Step 4: the submission of the networks that step 3 trained on the soft labels.

  python generate_distilled_submission.py

Reads   LOG_DIR (what step 3 left: the best checkpoint of each fold, hparams.yaml) and DATA_DIR.
Writes  submission_distill.csv: each test photo, the mean of five networks x eight augmented views (TTA).
Expect  0.98422 public and 0.98135 private at Kaggle (published).
"""

from dataset import read_test
from models import load_networks, predict_test
from utils import build_parser, go_on, parse_args, prepare_prediction, say, stop_cleanly, write_csv


def main(args):
    checkpoints = prepare_prediction(args)
    submission = predict_test(args, load_networks(args, checkpoints), *read_test(args))
    write_csv("submission_distill.csv", submission)
    say(f"wrote submission_distill.csv: {len(submission)} rows")


if __name__ == "__main__":
    args = parse_args(build_parser(__doc__, log_dir="logs_submit_distill"))
    with stop_cleanly(lambda: f"what is predicted is kept in {args.log_dir}; {go_on()}"):
        main(args)
