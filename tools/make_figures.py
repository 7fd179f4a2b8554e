"""Draw the README's pictures from the rendered sample and the networks that `make demo` trained on it.

  python -m tools.make_figures

Reads   demo/: sample/, logs/ (run `make demo` first).
Writes  docs/schedule.png, docs/augmentations.png, docs/tta.png (docs/error_analysis.jpg is a browser's screenshot).
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from analysis.figures import augmentation_pictures, tta_views
from dataset import fit_photo, load_photo
from harness.console import Parser, parse_args
from harness.photos import decode_photo
from harness.prediction import load_network
from harness.record import read_record, read_results
from harness.tables import read_test_ids
from models import SCHEDULES, LeafNet
from tools.demo import FOLDER, REPO
from utils import CLASSES

DOCS = REPO / "docs"
SIZE = (256, 384)  # the sample's own, so that nothing is blurred by resizing


def draw_schedule(path, epochs=70):
    """The learning rate of each epoch, both schedules, read off an optimizer that takes a step an epoch."""
    figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    for name, style in (("cosine", "-"), ("triangular", "--")):
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
        schedule, rates = SCHEDULES[name](optimizer, 1e-3, epochs), []
        for _ in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        label = f"--lr_schedule {name}" + (" (default)" if name == "cosine" else "")
        axes.plot(range(epochs), rates, style, marker="o", markersize=3, linewidth=1.2, label=label)
    axes.set(xlabel="epoch", ylabel="learning rate", xlim=(-1, epochs), ylim=(0, 1.05e-3))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", framealpha=1, ncols=2, bbox_to_anchor=(1, 1.18))
    figure.savefig(path, dpi=110)


def draw_grid(path, pictures, columns, width=3.0):
    """Pictures with a title each, (title, uint8 (h, w, 3)), in rows of `columns`."""
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * width, rows * (width * 2 / 3 + 0.45)), layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, picture) in zip(axes.flat, pictures, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=90)


def tta_pictures():
    """The eight views of a test photo, with what the network of fold 0 makes of each and of their mean."""
    log_dir = FOLDER / "logs"
    options = read_record(log_dir / "hparams.yaml")["options"]
    args = argparse.Namespace(seed=options["seed"], tta_draws=8)
    image_id = read_test_ids(FOLDER / "sample", CLASSES)[4]
    path = FOLDER / "sample" / "images" / f"{image_id}.jpg"
    photo = decode_photo(path)
    seen, keys = tta_views(photo, image_id, 0, args, options["image_size"])
    shown, _ = tta_views(photo, image_id, 0, args, SIZE)
    network = load_network(log_dir / read_results(log_dir, [0])["checkpoint"][0], LeafNet(options["backbone"]))
    with torch.no_grad():
        views = torch.stack([seen[key]["image"] for key in keys])
        probabilities = network(views).softmax(1).numpy()

    def caption(values):
        return ", ".join(f"{name.split('_')[0]} {value:.2f}" for name, value in zip(CLASSES, values, strict=True))

    pictures = [(f"{image_id}: mean of the eight\n{caption(probabilities.mean(0))}", fit_photo(photo, SIZE))]
    for draw, key in enumerate(keys):
        pictures.append((f"view {draw + 1}\n{caption(probabilities[draw])}", shown[key]["image"].numpy()))
    return pictures


def main():
    parse_args(Parser(__doc__))
    DOCS.mkdir(exist_ok=True)
    draw_schedule(DOCS / "schedule.png")
    train = read_train_csv(FOLDER / "sample", CLASSES)
    image_id = train.loc[train["rust"] == 1, "image_id"].iloc[0]
    photo = load_photo(FOLDER / "sample" / "images" / f"{image_id}.jpg", SIZE)
    draw_grid(DOCS / "augmentations.png", augmentation_pictures(photo), columns=4)
    draw_grid(DOCS / "tta.png", tta_pictures(), columns=3, width=4.0)


if __name__ == "__main__":
    main()
