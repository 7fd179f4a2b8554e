"""Pages in one file, and their pictures: curves as SVG that takes the page's colours, augmented photos as arrays."""

import io
import random
import re
import warnings
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.ticker import MaxNLocator
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from dataset import train_augmentation
from harness.files import atomic_write
from utils import CLASSES

FEW_COLOURS = ("#009e73", "#cc79a7", "#d55e00", "#3a87c8", "#8a7a00")  # the colour-blind can tell them apart
INK = "#010203"  # stands for the page's own text colour, light or dark
STYLE = {f"{part}color": INK for part in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.", "grid.")}
STYLE |= {"grid.alpha": 0.2, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "leaves", "font.size": 11}
STYLE |= {"figure.figsize": (5, 4.6), "figure.constrained_layout.use": True, "text.parse_math": False}
warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has other fonts
in_page_style = plt.rc_context(STYLE)  # a decorator


def colours(n):
    """A colour for each of n classes or folds, list of texts like #009e73, for light and dark pages."""
    many = [to_hex(hsv_to_rgb((k / n, 0.9, (0.55, 0.85)[k % 2]))) for k in range(n)]
    return list(FEW_COLOURS[:n]) if n <= len(FEW_COLOURS) else many


def as_svg(figure):
    """The figure as an SVG element for a page: transparent, in the page's text colour. Closes the figure."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    svg = "<svg" + file.getvalue().split("<svg", 1)[1].replace(INK, "currentColor")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="chart"', svg, count=1)


@in_page_style
def draw_roc(labels, probabilities, aucs):
    """ROC curve of each class: labels bool (n, k), probabilities (n, k), AUCs float (k,), nan if not defined → SVG."""
    figure, axes = plt.subplots()
    for k, auc in enumerate(aucs):
        false, true, _ = ([], [], []) if np.isnan(auc) else roc_curve(labels[:, k], probabilities[:, k])
        shown = "not defined" if np.isnan(auc) else f"{auc:.4f}"
        axes.plot(false, true, color=colours(len(CLASSES))[k], label=f"{CLASSES[k]}: {shown}".replace("_", " "))
    axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
    axes.set(xlabel="false alarms, share of the other photos", ylabel="found, share of the photos of this class")
    axes.legend(title="AUC", loc="lower right", fontsize="medium" if len(CLASSES) < 7 else "small")
    return as_svg(figure)


@in_page_style
def draw_reliability(labels, probabilities, bins=10):
    """How often the likeliest class is right against how sure the network is (arXiv 1706.04599): two (n, k) → SVG."""
    confidence, right = probabilities.max(1), labels[np.arange(len(labels)), probabilities.argmax(1)]
    share, mean = calibration_curve(right, confidence, n_bins=bins)
    figure, (axes, counts) = plt.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
    axes.plot(mean, share, "o-", color=FEW_COLOURS[2])
    axes.set(xlim=(1 / len(CLASSES) - 0.05, 1.02), ylim=(0, 1.05), ylabel="share that is right")
    counts.hist(confidence, np.linspace(0, 1, bins + 1), color=FEW_COLOURS[3], alpha=0.7)
    counts.set(xlabel="probability of the predicted class", ylabel="photos")
    counts.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    return as_svg(figure)


@in_page_style
def draw_epochs(metrics, column, label, dashed=None, best=None):
    """A column of the metrics at each epoch, one line per fold, later ones thinner, so that equal ones are seen → SVG.

    metrics: dict of fold to DataFrame; dashed: a second column; best: dict of fold to the epoch that gets a dot.
    """
    figure, axes = plt.subplots()
    for position, (fold, rows) in enumerate(metrics.items()):
        style = {"color": colours(len(metrics))[position], "marker": "o" if len(rows) == 1 else None}
        if dashed is not None:
            axes.plot(rows["epoch"], rows[dashed], "--", linewidth=1, markerfacecolor="none", **style)
        width = 1.3 + 2 * (1 - position / len(metrics))
        axes.plot(rows["epoch"], rows[column], label=f"fold {fold}", linewidth=width, **style)
        if best is not None:
            axes.plot(best[fold], rows.set_index("epoch")[column][best[fold]], "o", color=style["color"], markersize=8)
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if column == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.legend()
    return as_svg(figure)


def write_page(path, template, page):
    """Fill a template of this folder with a dict, and write the page, which needs no network, whole or not at all."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    text = environment.get_template(template).render(classes=CLASSES, colours=colours(len(CLASSES)), **page)
    with atomic_write(path, "w") as file:
        file.write(text)


def single_operations(augmentation):
    """The operations of an augmentation, however it is composed (OneOf, Sequential, …), in their order."""
    for part in augmentation.transforms:
        yield from single_operations(part) if hasattr(part, "transforms") else [part]


def augmentation_pictures(photo):
    """One draw of each part of the training augmentation, and three of the whole: list of (title, uint8 (h, w, 3))."""
    whole, pictures, names = train_augmentation(), [("the photo", photo)], Counter()
    for seed, transform in enumerate([*single_operations(whole), *[whole] * 3], 1):
        name = re.sub("(?<=[a-z])(?=[A-Z])", " ", type(transform).__name__).lower()
        names[name] += 1
        title = "all together" if transform is whole else name + f" #{names[name]}" * (names[name] > 1)
        transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        transform.p = 1
        pictures.append((title, transform(image=photo)["image"]))
    return pictures
