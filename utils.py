"""What every script shares: the classes, the one command line, seeds, the fold split, the metric."""

import argparse
import os
import re
import sys

import numpy as np

from harness.console import InputError

CLASSES = ("healthy", "multiple_diseases", "rust", "scab")
N_FOLDS = 5

# ---------------------------------------------------------------------------------------------- command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring and adds the defaults."""


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def not_negative(text):
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 4294967295")
    return value


def positive_number(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def pixels(text):
    value = int(text)
    if value < 32:
        raise argparse.ArgumentTypeError(f"{text} is too small: the network needs 32 pixels or more")
    return value


def make_parser(doc, log_dir="logs"):
    """What all scripts but blend.py take; `doc` is the script's docstring, `log_dir` its default log directory."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    size = {"type": pixels, "nargs": 2, "metavar": ("H", "W")}
    folds = {"type": int, "nargs": "+", "choices": range(N_FOLDS)}
    gpus = {"type": not_negative, "nargs": "+", "metavar": "GPU"}
    workers = min(8, os.cpu_count())

    add = parser.add_argument_group("files").add_argument
    add("--data_dir", default="data", help="train.csv, test.csv, sample_submission.csv and images/")
    add("--log_dir", default=log_dir, help="checkpoints, metrics and options of one training of all folds")
    add("--cache_dir", default="image_cache", help="for the photos, decoded and resized once")

    add = parser.add_argument_group("which networks").add_argument
    add("-backbone", "--backbone", default="se_resnext50_32x4d", help="a classifier of pretrainedmodels")
    add("--image_size", **size, default=[480, 768], help="height and width, in pixels")
    add("--folds", **folds, default=list(range(N_FOLDS)), help="the folds to train, or to predict with")

    group = parser.add_argument_group("what it runs on")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--gpus", **gpus, help="for example 0 1; without it all GPUs there are, else the CPU")
    either.add_argument("--cpu_processes", type=positive, metavar="N", help="N processes of the CPU instead of GPUs")
    add = group.add_argument
    add(
        "--precision",
        choices=("16", "32", "bf16"),
        help="without it 32 to predict, to train what is fast: 16 on GPUs, bf16 or 32 on CPUs",
    )
    add("-vbs", "--val_batch_size", type=positive, default=16, help="photos a batch in validation and prediction")
    add("--num_workers", type=not_negative, default=workers, help="processes that load photos")
    return parser


def make_training_parser(doc):
    """What train.py takes."""
    parser = make_parser(doc)

    add = parser.add_argument_group("what is trained").add_argument
    add("--weights", default="imagenet", help="where the backbone starts: imagenet, none (from scratch) or a file")
    add("--soft_labels_filename", metavar="CSV", help="train on hard labels mixed with these soft labels")
    add("--limit", type=positive, metavar="N", help="a quick look: N labelled photos and N test photos only")
    add("--soft_share", type=share, default=0.3, help="of the soft labels in the mix, the rest is the hard label's")
    add("--seed", type=not_negative, default=2020, help="of folds, head, order and augmentation")
    add(
        "--fold_seed",
        type=not_negative,
        help="of the folds, where it is to differ from --seed: other seeds, same folds",
    )

    add = parser.add_argument_group("how it is trained").add_argument
    add("--max_epochs", type=positive, default=70, help="epochs a fold")
    add("-tbs", "--train_batch_size", type=positive, default=32, help="photos a step, over all devices together")
    add("--accumulate_grad_batches", type=positive, default=1, metavar="N", help="split each batch into N parts")
    add("--learning_rate", type=positive_number, default=1e-3, help="the highest; the lowest is a hundredth of it")
    add(
        "--lr_schedule", default="cosine", metavar="NAME", help="cosine (restarts) or triangular (the write-up's cycle)"
    )
    add("--gradient_clip_val", type=positive_number, default=1.0, help="the longest gradient")
    add("--keep_checkpoints", type=positive, default=6, metavar="N", help="the best so many epochs of each fold")

    add = parser.add_argument_group("several devices").add_argument
    add("--num_nodes", type=positive, default=1, metavar="N", help="machines that torchrun or srun has started this on")
    add("--parallel_folds", action="store_true", help="a fold a device, several at once, not one after the other")

    add = parser.add_argument_group("what is there already").add_argument
    add("--fresh", action="store_true", help="start over: delete what the named folds left in LOG_DIR")
    add("--accept_changes", action="store_true", help="go on in LOG_DIR though options or source files have changed")
    return parser


def make_prediction_parser(doc, log_dir="logs"):
    """What steps 2 and 4, predict.py and error_analysis.py take."""
    parser = make_parser(doc, log_dir)
    add = parser.add_argument_group("how it is predicted").add_argument
    add("--tta_draws", type=positive, default=8, metavar="N", help="augmented views of each test photo (TTA)")
    add("--accept_changes", action="store_true", help="predict though the network or fit_photo was edited since")
    parser.set_defaults(limit=None)  # as the training had it
    return parser


def parse_args(parser, argv=None):
    """Parse `argv`; `args.typed` is the set of option names that were given, not left at their defaults."""
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:  # argparse's allow_abbrev=False leaves -t for -tbs alone
        if re.match("-[A-Za-z]", word) and word.split("=")[0] not in parser._option_string_actions:
            parser.error(f"unrecognized option {word}")
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions if action.dest != "help"})
    args = parser.parse_args(argv, namespace=blank)
    args.typed = {action.dest for action in parser._actions if getattr(args, action.dest, unset) is not unset}
    for name, value in vars(args).items():
        if value is unset:
            setattr(args, name, parser.get_default(name))
    if hasattr(args, "folds"):
        args.folds = sorted(set(args.folds))
    return args


def output_name(name, limit):
    """The name of a CSV file that a step writes: with --limit another one, so that no full result is overwritten."""
    return name if limit is None else name.replace(".csv", f"-limit={limit}.csv")


# ---------------------------------------------------------------------------------------------- seeds and folds


def derive_seed(*numbers):
    """A 64-bit seed that depends on every one of `numbers` (non-negative ints) and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def split_folds(n, seed):
    """Fold number of each of `n` rows of train.csv, int array (n,): KFold(5, shuffle=True, random_state=seed).

    Raises InputError if there are fewer rows than folds.
    """
    from sklearn.model_selection import KFold  # a second that --help and blend.py need not wait for

    if n < N_FOLDS:
        raise InputError(f"train.csv has {n} rows, too few for {N_FOLDS} folds")
    folds = np.empty(n, dtype=np.int64)
    for fold, (_, validation) in enumerate(KFold(N_FOLDS, shuffle=True, random_state=seed).split(np.zeros(n))):
        folds[validation] = fold
    return folds


# ---------------------------------------------------------------------------------------------- the metric


def column_aucs(labels, probabilities):
    """ROC AUC of each class, float array (4,), nan where a class has only positives or only negatives.

    labels: (n, 4) one-hot; probabilities: (n, 4).
    """
    from sklearn.metrics import roc_auc_score

    labels = np.asarray(labels) > 0.5
    return np.array(
        [
            roc_auc_score(truth, score) if 0 < truth.sum() < len(truth) else np.nan
            for truth, score in zip(labels.T, np.asarray(probabilities).T, strict=True)
        ]
    )


def describe_aucs(labels, probabilities):
    """The mean column-wise AUC and those of the classes, as text; arguments as of mean_auc."""
    columns = zip(CLASSES, column_aucs(labels, probabilities), strict=True)
    return f"{mean_auc(labels, probabilities):.5f} ({', '.join(f'{name} {auc:.4f}' for name, auc in columns)})"


def mean_auc(labels, probabilities):
    """Mean column-wise ROC AUC, the competition's metric, over the classes for which it is defined.

    Raises InputError if it is defined for none (one class only, there is nothing to rank), or if there is a nan.
    """
    if not np.isfinite(np.asarray(probabilities)).all():
        raise InputError("the network predicts nan: its training has diverged; a smaller --gradient_clip_val may help")
    aucs = column_aucs(labels, probabilities)
    if np.isnan(aucs).all():
        raise InputError("the ROC AUC is undefined: all photos are of one class")
    return float(np.nanmean(aucs))
