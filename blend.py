"""Step 5: the mean of both submissions.

  python blend.py

Reads   submission.csv (step 2) and submission_distill.csv (step 4).
Writes  submission_mix.csv, in the row order of the first.
Expect  0.98354 public and 0.98253 private at Kaggle (published).
"""

import argparse

from harness.command_line import HelpFormatter, file_or_folder, parse_args, positive
from harness.console import say
from harness.files import write_csv
from harness.tables import note_no_distributions, read_scores
from utils import CLASSES, output_name


def main(args):
    classes = list(CLASSES)
    *submissions, output = [output_name(name, args.limit) for name in [*args.submissions, args.output]]
    mix = read_scores(submissions[0], CLASSES)
    tables = [mix[classes], *(read_scores(path, CLASSES, mix["image_id"])[classes] for path in submissions[1:])]
    for path, table in zip(submissions, tables, strict=True):
        note_no_distributions(path, table.to_numpy())
    mix[classes] = sum(table / len(tables) for table in tables)
    write_csv(output, mix)
    say(f"wrote {output}: the mean of {' and '.join(submissions)}, {len(mix)} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    group = parser.add_argument_group("files")
    group.add_argument(
        "--submissions",
        type=file_or_folder,
        nargs="+",
        default=["submission.csv", "submission_distill.csv"],
        metavar="CSV",
        help="what to average",
    )
    group.add_argument("--limit", type=positive, metavar="N", help="blend what steps 2 and 4 wrote after --limit N")
    group.add_argument(
        "--output", type=file_or_folder, default="submission_mix.csv", metavar="CSV", help="where the mean goes"
    )
    main(parse_args(parser))
