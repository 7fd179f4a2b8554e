"""Draw the pictures of the docs from the rendered sample and the networks that `make demo` trained on it.

  python -m tools.make_figures

Reads   demo/: sample/, logs/ (run `make demo` first).
Writes  docs/schedule.png, docs/augmentations.png, docs/tta.png (docs/error_analysis.jpg is a browser's screenshot).
"""

import torch

from analysis.figures import augmentation_pictures, plt
from dataset import fit_photo
from harness.console import Parser, parse_args
from harness.files import read_table
from harness.photos import read_photo
from inference import load_trained, predict, tta_views
from models import SCHEDULES
from tools.demo import FOLDER, REPO
from utils import CLASSES, make_prediction_parser

DOCS = REPO / "docs"
SIZE = (256, 384)  # the sample's own, so that resizing blurs nothing


def draw_schedules(path, epochs=70, peak=1e-3):
    """The learning rate of each epoch, as an optimizer gets it that takes one step per epoch."""
    figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    for name, style in zip(SCHEDULES, ("o-", "o--"), strict=True):
        optimizer, rates = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=peak), []
        schedule = SCHEDULES[name](optimizer, peak, epochs)
        for _ in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        axes.plot(rates, style, markersize=3, linewidth=1.2, label=f"--lr_schedule {name}")
    axes.set(xlabel="epoch", ylabel="learning rate", xlim=(-1, epochs), ylim=(0, 1.05 * peak))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", framealpha=1, ncols=2, bbox_to_anchor=(1, 1.18))
    figure.savefig(path, dpi=110)


def draw_grid(path, pictures, columns, width):
    """Pictures with their titles, list of (title, uint8 (h, w, 3)), in rows of `columns`."""
    rows = -(-len(pictures) // columns)
    size = columns * width, rows * (width * 2 / 3 + 0.45)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", subplot_kw={"frame_on": False})
    plt.setp(axes, xticks=[], yticks=[])
    for axis, (title, picture) in zip(axes.flat, pictures, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=90)


def tta_pictures(image_id):
    """The views of a test photo, with what the network of fold 0 predicts for each and on average."""
    args = parse_args(make_prediction_parser(__doc__, str(FOLDER / "logs")), ["--folds", "0", "--num_workers", "0"])
    _, networks = load_trained(args)
    photo = read_photo(FOLDER / "sample" / "images" / f"{image_id}.jpg")
    (seen, n_views), (shown, _) = (
        tta_views(args, [image_id], [fit_photo(photo, size)]) for size in (args.image_size, SIZE)
    )
    keys = [(0, view, 0) for view in range(n_views)]
    of_views = predict(networks, seen, keys, args, "views")
    titles = ["mean of the views", *(f"view {view + 1}" for view in range(n_views))]
    pictures = [fit_photo(photo, SIZE), *(shown[key]["image"].numpy() for key in keys)]
    names = [name.split("_")[0] for name in CLASSES]
    for title, picture, values in zip(titles, pictures, [of_views.mean(0), *of_views], strict=True):
        yield f"{title}\n" + ", ".join(f"{n} {value:.2f}" for n, value in zip(names, values, strict=True)), picture


def main():
    parse_args(Parser(__doc__))
    train = read_table(FOLDER / "sample" / "train.csv", ("image_id", *CLASSES), hint="run make demo first")
    photo = read_photo(FOLDER / "sample" / "images" / f"{train['image_id'][train['rust'] == 1].iloc[0]}.jpg")
    draw_schedules(DOCS / "schedule.png")
    draw_grid(DOCS / "augmentations.png", augmentation_pictures(fit_photo(photo, SIZE)), columns=4, width=3)
    draw_grid(DOCS / "tta.png", list(tta_pictures("Test_4")), columns=3, width=4)


if __name__ == "__main__":
    main()
