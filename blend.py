"""Step 5: the mean of both submissions.

  python blend.py

Reads   submission.csv (step 2) and submission_distill.csv (step 4).
Writes  submission_mix.csv, in the row order of the first.
Expect  0.98354 public and 0.98253 private at Kaggle (published).
"""

from harness.console import InputError, Parser, file_or_folder, parse_args, positive, say
from harness.files import read_table
from utils import CLASSES, distribution, output_name, write_submission


def main(args):
    columns, classes = ("image_id", *CLASSES), list(CLASSES)
    parts = [path for path in args.submissions if "-folds=" in path or "-limit=" in path]
    if parts and "output" not in args.typed:
        raise InputError(f"{parts[0]} is of a part of the folds or photos: name another --output than {args.output}")
    *submissions, output = [output_name(name, args.limit) for name in [*args.submissions, args.output]]
    mix, tables = None, []
    for path in submissions:
        wanted = None if mix is None else mix["image_id"]
        table = read_table(path, columns, wanted=wanted, hint="run the step that writes it first")
        mix = table if mix is None else mix
        tables.append(table[classes])
        if problems := list(filter(None, distribution(tables[-1].to_numpy()))):
            what = f"note: {path}: {len(problems)} rows, where the first {problems[0]}"
            say(f"{what}; blended all the same: for an AUC only the order counts, and the larger scale decides")
    mix[classes] = sum(table / len(tables) for table in tables)
    write_submission(output, mix)
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
    main(parse_args(parser))
