"""The pictures of error_analysis.html: curves as SVG that takes the page's colours, augmented photos as arrays."""

import io
import random
import re

import matplotlib

matplotlib.use("Agg")  # draws into files: no screen is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, roc_curve

from dataset import LeafDataset, fit_photo, train_augmentation
from utils import CLASSES, column_aucs

# For classes and folds; the colour-blind can tell them apart.
COLOURS = ("#009e73", "#cc79a7", "#d55e00", "#0072b2", "#8a7a00")
INK = "#010203"  # stands for the page's own text colour, light or dark
STYLE = {f"{part}color": INK for part in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.", "grid.")}
STYLE |= {"grid.alpha": 0.2, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "leaves", "font.size": 11}
in_page_style = plt.rc_context(STYLE)  # a decorator


def as_svg(figure):
    """The figure as an SVG element for a page: transparent, in the page's text colour. Closes the figure."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="chart"', svg, count=1)


def pretty(name):
    """A class name as people write it."""
    return name.replace("_", " ")


@in_page_style
def draw_roc(labels, probabilities):
    """ROC curve of each class: labels int (n,), probabilities (n, 4) → SVG."""
    figure, axes = plt.subplots(figsize=(5, 4.6), layout="constrained")
    aucs = column_aucs(np.eye(len(CLASSES))[labels], probabilities)
    for k, (name, auc, colour) in enumerate(zip(CLASSES, aucs, COLOURS, strict=False)):
        if np.isnan(auc):
            axes.plot([], [], color=colour, label=f"{pretty(name)}: not defined")
            continue
        false, true, _ = roc_curve(labels == k, probabilities[:, k])
        axes.plot(false, true, color=colour, label=f"{pretty(name)}: {auc:.4f}")
    axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
    axes.set(xlabel="false alarms, share of the other photos", ylabel="found, share of the photos of this class")
    axes.legend(title="AUC", loc="lower right")
    return as_svg(figure)


@in_page_style
def draw_confusion(labels, predicted):
    """How often each label (row) got each prediction (column): two int (n,) → SVG."""
    counts = confusion_matrix(labels, predicted, labels=range(len(CLASSES)))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(5, 4.6), layout="constrained")
    for row, column in np.ndindex(counts.shape):
        axes.add_patch(
            plt.Rectangle((column - 0.5, row - 0.5), 1, 1, color=COLOURS[3], alpha=0.6 * shares[row, column])
        )
        axes.text(column, row, f"{counts[row, column]}\n{shares[row, column]:.0%}", ha="center", va="center")
    names = [pretty(name).replace(" ", "\n") for name in CLASSES]
    axes.set(xlim=(-0.5, 3.5), ylim=(3.5, -0.5), xlabel="predicted", ylabel="label", aspect="equal")
    axes.set_xticks(range(len(CLASSES)), names)
    axes.set_yticks(range(len(CLASSES)), names)
    axes.grid(visible=False)
    return as_svg(figure)


@in_page_style
def draw_reliability(labels, probabilities, bins=10):
    """How often the prediction is right against how sure the network is (arXiv 1706.04599): (n,), (n, 4) → SVG."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    share, mean = calibration_curve(right, confidence, n_bins=bins)
    figure, (axes, counts) = plt.subplots(
        2, 1, figsize=(5, 4.6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
    axes.plot(mean, share, "o-", color=COLOURS[2])
    axes.set(xlim=(0.2, 1.02), ylim=(0, 1.05), ylabel="share that is right")
    counts.hist(confidence, np.linspace(0, 1, bins + 1), color=COLOURS[3], alpha=0.7)
    counts.set(xlabel="probability of the predicted class", ylabel="photos")
    counts.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    return as_svg(figure)


@in_page_style
def draw_epochs(metrics, column, label, dashed=None, best=None):
    """A column of the metrics at each epoch, a line a fold → SVG.

    metrics: dict of fold to LOG_DIR/metrics/fold=K.csv; dashed: a second column, drawn so; best: dict of fold to the
    epoch that gets a dot. Lines of later folds are thinner, so that equal ones can be seen lying on each other.
    """
    figure, axes = plt.subplots(figsize=(5, 4.6), layout="constrained")
    for position, ((fold, rows), colour) in enumerate(zip(metrics.items(), COLOURS, strict=False)):
        if dashed is not None:
            axes.plot(rows["epoch"], rows[dashed], "--", color=colour, linewidth=1)
        width = 1.3 + 0.5 * (len(metrics) - 1 - position)
        axes.plot(rows["epoch"], rows[column], color=colour, label=f"fold {fold}", linewidth=width)
        if best is not None:
            axes.plot(best[fold], rows.set_index("epoch")[column][best[fold]], "o", color=colour, markersize=8)
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if column == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.legend()
    return as_svg(figure)


def augmentation_parts(augmentation):
    """The single operations of an augmentation, however it is composed: dict of name to transform, in their order."""
    parts, todo = {}, list(augmentation.transforms)
    while todo:
        transform = todo.pop(0)
        if hasattr(transform, "transforms"):  # OneOf, Sequential, …
            todo[:0] = transform.transforms
            continue
        name = re.sub("(?<=[a-z])(?=[A-Z])", " ", type(transform).__name__).lower()
        same = sum(other.split(" #")[0] == name for other in parts)
        parts[f"{name} #{same + 1}" if same else name] = transform
    return parts


def augmentation_pictures(photo):
    """One draw of each part of the training augmentation, and three of the whole: list of (title, uint8 (h, w, 3))."""
    whole = train_augmentation()
    parts = augmentation_parts(whole)
    pictures = [("the photo", photo)]
    for seed, (title, transform) in enumerate([*parts.items(), *[("all together", whole)] * 3]):
        transform.set_random_state(np.random.default_rng(seed + 1), random.Random(seed + 1))
        transform.p = 1
        pictures.append((title, transform(image=photo)["image"]))
    return pictures


def tta_views(photo, image_id, fold, args, image_size):
    """The data set of a photo's views under test-time augmentation, resized to `image_size`, and their keys."""
    views = LeafDataset([fit_photo(photo, image_size)], [image_id], augmentation=train_augmentation(), seed=args.seed)
    return views, [(fold, draw, 0) for draw in range(args.tta_draws)]
