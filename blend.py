"""Step 5: the mean of both submissions.

  python blend.py

Reads   submission.csv (step 2) and submission_distill.csv (step 4).
Writes  submission_mix.csv, in the row order of the first.
Expect  0.98354 public and 0.98253 private at Kaggle (published).
"""

from harness.console import Parser, file_or_folder, parse_args, positive, say
from harness.files import write_csv
from harness.tables import note_no_distributions, read_table
from utils import CLASSES, N_FOLDS, output_name


def main(args):
    columns, classes = ("image_id", *CLASSES), list(CLASSES)
    *submissions, output = [output_name(name, args) for name in [*args.submissions, args.output]]
    mix = read_table(submissions[0], columns, hint="run the step that writes it first")
    tables = [mix[classes]]
    for path in submissions[1:]:
        table = read_table(path, columns, wanted=mix["image_id"], hint="run the step that writes it first")
        tables.append(table[classes])
    for path, table in zip(submissions, tables, strict=True):
        note_no_distributions(path, table.to_numpy())
    mix[classes] = sum(table / len(tables) for table in tables)
    write_csv(output, mix)
    say(f"wrote {output}: the mean of {' and '.join(submissions)}, {len(mix)} rows")


if __name__ == "__main__":
    parser = Parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--submissions",
        type=file_or_folder,
        nargs="+",
        default=["submission.csv", "submission_distill.csv"],
        metavar="CSV",
        help="what to average",
    )
    files.add_argument("--limit", type=positive, metavar="N", help="blend what steps 2 and 4 wrote after --limit N")
    files.add_argument(
        "--output", type=file_or_folder, default="submission_mix.csv", metavar="CSV", help="where the mean goes"
    )
    parser.set_defaults(folds=list(range(N_FOLDS)))
    main(parse_args(parser))
