"""What every script shares: the classes, the one command line, seeds, the fold split, the metric."""

import argparse
import os
import re

import numpy as np

from harness.console import InputError, Parser, file_or_folder, not_negative, pixels, positive, positive_number, share

CLASSES = ("healthy", "multiple_diseases", "rust", "scab")
N_FOLDS = 5
TAKEN = "image_id image fold label prediction predicted wrong loss suspect suspected_label near_duplicates none".split()
FREE = {name for name in CLASSES if name not in TAKEN and "|" not in name and ";" not in name}
if isinstance(CLASSES, str) or len(FREE) < max(2, len(CLASSES)):
    raise InputError(f"CLASSES in utils.py: two or more different names, without | or ; and none of {', '.join(TAKEN)}")

# ---------------------------------------------------------------------------------------------- command line


def make_parser(doc, log_dir="logs", with_data=True):
    """What all scripts but blend.py and compare.py take; `doc` is the script's docstring; with_data: all but predict.py."""
    from joblib import cpu_count  # knows what a container or a job may use; blend.py need not wait for it

    parser = Parser(doc)

    add = parser.add_argument_group("files").add_argument
    path, about = {"type": file_or_folder}, "train.csv, test.csv, sample_submission.csv and images/"
    add("--log_dir", **path, default=log_dir, help="checkpoints, metrics and options of one training")
    if with_data:
        add("--data_dir", **path, default="data", help=about)
        add("--cache_dir", **path, default="image_cache", help="the photos, decoded and resized once")

    add = parser.add_argument_group("which networks").add_argument
    add("-backbone", "--backbone", default="se_resnext50_32x4d", help="a classifier of pretrainedmodels, or timm/NAME")
    size = {"type": pixels, "nargs": 2, "metavar": ("H", "W")}
    add("--image_size", **size, default=[480, 768], help="height and width, in pixels")
    folds = {"type": int, "nargs": "+", "choices": range(N_FOLDS), "metavar": "FOLD"}
    add("--folds", **folds, default=list(range(N_FOLDS)), help="numbers of the folds to train, or to predict with")

    hardware = parser.add_argument_group("hardware")
    add, either = hardware.add_argument, hardware.add_mutually_exclusive_group().add_argument
    gpus = {"type": not_negative, "nargs": "+", "metavar": "GPU"}
    either("--gpus", **gpus, help="for example 0 1; without it all GPUs there are, else the CPU")
    either("--cpu_processes", type=positive, metavar="N", help="N processes on the CPU instead of GPUs")
    about = "default: 32 for predictions; for training the fast one, 16 on GPUs, bf16 or 32 on CPUs"
    add("--precision", choices=("16", "32", "bf16"), help=about)
    add("-vbs", "--val_batch_size", type=positive, default=16, help="photos per batch in validation and prediction")
    workers = min(8, cpu_count())
    add("--num_workers", type=not_negative, default=workers, help="processes per device that load photos")
    add("--compile", action="store_true", help="torch.compile the networks: a minute at first, then faster")
    return parser


class SoftLabels(argparse.Action):
    """The file of the soft labels; --limit follows from its name, which output_name made, where it is not typed."""

    def __call__(self, parser, args, path, option_string=None):
        found = re.search(r"-limit=(\d+)", os.path.basename(path))
        args.soft_labels_filename, args.limit = path, args.limit or (int(found[1]) if found else None)


def make_training_parser(doc):
    """What train.py takes."""
    parser = make_parser(doc)

    add = parser.add_argument_group("training data").add_argument
    about = "initial weights of the backbone: imagenet, none (from scratch) or a file"
    add("--weights", type=file_or_folder, default="imagenet", help=about)
    about = "soft labels to mix in; -limit=N in the name sets --limit"
    add("--soft_labels_filename", type=file_or_folder, action=SoftLabels, metavar="CSV", help=about)
    add("--soft_share", type=share, default=0.3, help="share of the soft labels in that mix")
    parser.needs["soft_share"] = "soft_labels_filename"
    add("--limit", type=positive, metavar="N", help="for a quick look: only N labelled and N test photos")
    about = "seed of the folds, the head, the order and the augmentation"
    add("--seed", type=not_negative, default=2020, help=about)
    add("--fold_seed", type=not_negative, help="seed of the folds, if not --seed")

    add = parser.add_argument_group("training").add_argument
    add("--max_epochs", type=positive, default=70, help="epochs per fold")
    add("-tbs", "--train_batch_size", type=positive, default=32, help="photos per step, on all devices together")
    add("--accumulate_grad_batches", type=positive, default=1, metavar="N", help="compute each batch in N parts")
    about = "peak learning rate; the minimum is 1/100 of it"
    add("--learning_rate", type=positive_number, default=1e-3, help=about)
    add("--lr_schedule", default="cosine", metavar="NAME", help="cosine (with restarts) or triangular (cyclic)")
    add("--gradient_clip_val", type=positive_number, default=1.0, help="clip the norm of the gradient at this value")
    add("--keep_checkpoints", type=positive, default=6, metavar="N", help="number of best checkpoints kept per fold")
    add("--parallel_folds", action="store_true", help="train several folds at once, one per device")

    add = parser.add_argument_group("a log directory that exists").add_argument
    add("--fresh", action="store_true", help="start over: delete what LOG_DIR holds of these folds")
    about = "keep finished folds though options or source files have changed"
    add("--accept_changes", action="store_true", help=about)
    return parser


def make_prediction_parser(doc, log_dir="logs", with_data=True):
    """What steps 2 and 4, predict.py and error_analysis.py take."""
    parser = make_parser(doc, log_dir, with_data)
    add = parser.add_argument_group("prediction").add_argument
    add("--tta_draws", type=positive, default=8, metavar="N", help="augmented views per test photo (TTA)")
    about = "predict though the network or fit_photo was edited since"
    add("--accept_changes", action="store_true", help=about)
    parser.set_defaults(limit=None, backbone=None, image_size=None)  # as the training had it
    return parser


def output_name(name, limit, folds=range(N_FOLDS)):
    """The name of a CSV file that a step writes: another one for a part of the photos (--limit) or of the folds."""
    part = "" if limit is None else f"-limit={limit}"
    part += "" if len(folds) == N_FOLDS else f"-folds={','.join(map(str, folds))}"
    stem, suffix = os.path.splitext(name)
    return stem + part + suffix


# ---------------------------------------------------------------------------------------------- what a label is


def read_labels(data_dir):
    """train.csv: DataFrame with image_id and one 0/1 column per class."""
    from harness.files import read_table  # half a second that --help need not wait for

    return read_table(f"{data_dir}/train.csv", ("image_id", *CLASSES), rule=one_hot)


def read_test_ids(data_dir):
    """The image_ids to predict, Series of str, in the row order of sample_submission.csv; test.csv must have the same."""
    from harness.files import read_table

    hint = "it lists the photos to predict: image_id, and any number for each class, as in the competition's data"
    image_ids = read_table(f"{data_dir}/sample_submission.csv", ("image_id", *CLASSES), hint=hint)["image_id"]
    read_table(f"{data_dir}/test.csv", ("image_id",), wanted=image_ids)
    return image_ids


def write_submission(path, submission):
    """Write what steps 2, 4 and 5 submit: DataFrame with image_id and the probabilities, one column per class."""
    from harness.files import write_csv

    write_csv(path, submission)


def one_hot(values):
    """A rule for hard labels, for read_table: float (n, k) → n texts, "" for a row that is one 1 and else 0."""
    good = np.isin(values, (0, 1)).all(1) & (values.sum(1) == 1)
    return np.where(good, "", f"is not one 1 and {values.shape[1] - 1} times 0")


def distribution(values):
    """A rule for soft labels, for read_table: float (n, k) → n texts, "" for a row that is a probability distribution.

    A sum may differ from 1 by what rounding each value to its digits makes of it: with two digits 0.005 a value.
    """
    digits = np.select([(values.round(digits) == values).all(1) for digits in (2, 3)], [2, 3], 4)
    allowed, sums = np.maximum(1e-3, values.shape[1] * 0.5 * 10.0**-digits) + 1e-9, values.sum(1)
    texts = [f"is no probability distribution: it sums to {total:.4g}" for total in sums]
    texts = np.where(np.abs(sums - 1) <= allowed, "", texts)
    outside = (values < 0).any(1) | (values > 1).any(1)
    return np.where(outside, "is no probability distribution: it holds a value outside 0…1", texts)


def decide(probabilities):
    """The labels that probabilities decide for: float (n, k) → bool (n, k), the most probable class."""
    return np.eye(len(CLASSES), dtype=bool)[np.argmax(probabilities, axis=1)]


def log_losses(labels, probabilities):
    """-log of the label's probability: labels 0/1 (n, k), probabilities (n, k) → float (n,)."""
    return -np.log(np.maximum((labels * probabilities).sum(1), np.finfo(np.float32).tiny))


def name_labels(labels):
    """0/1 labels (n, k) as n texts: the names of the classes, with | between several; "none" without any."""
    return ["|".join(np.array(CLASSES)[row]) or "none" for row in np.asarray(labels, bool)]


def parse_labels(names):
    """What name_labels wrote, as bool (n, k)."""
    return np.array([[name in text.split("|") for name in CLASSES] for text in names], bool).reshape(-1, len(CLASSES))


# ---------------------------------------------------------------------------------------------- seeds and folds


def derive_seed(*numbers):
    """A 64-bit seed that depends on every one of `numbers` (non-negative ints) and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def split_folds(n, seed, labels=None):
    """Fold number of each of `n` rows of train.csv, int array (n,): KFold(5, shuffle=True, random_state=seed).

    labels: the class number of each row, int (n,); KFold does not look at them, StratifiedKFold in its place would.
    Raises InputError if that cannot be done.
    """
    from sklearn.model_selection import KFold  # a second that --help and blend.py need not wait for

    if not 2 <= N_FOLDS <= n:
        raise InputError(f"the {n} rows of train.csv cannot be split into {N_FOLDS} folds")
    folds = np.empty(n, dtype=np.int64)
    splits = KFold(N_FOLDS, shuffle=True, random_state=seed).split(np.zeros(n), labels)
    for fold, (_, validation) in enumerate(splits):
        folds[validation] = fold
    return folds


# ---------------------------------------------------------------------------------------------- the metric


def column_aucs(labels, probabilities):
    """ROC AUC of each class, float array (k,), nan where a class has only positives or only negatives.

    labels: 0/1 (n, k); probabilities: (n, k).
    """
    from sklearn.metrics import roc_auc_score

    labels, scores = np.asarray(labels) > 0.5, np.asarray(probabilities)
    known = [0 < n < len(labels) for n in labels.sum(0)]
    return np.array([roc_auc_score(labels[:, k], scores[:, k]) if known[k] else np.nan for k in range(len(known))])


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
