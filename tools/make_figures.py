"""Draw the pictures of the docs from the rendered sample and the networks that `make demo` trained on it.

  python -m tools.make_figures

Reads   demo/: sample/, logs/ (run `make demo` first).
Writes  docs/augmentations.png, docs/tta.png.
"""

from analysis.figures import augmentation_pictures, plt
from dataset import fit_photo
from harness.console import Parser, parse_args
from harness.files import read_table
from harness.photos import read_photo
from inference import load_trained, predict, tta_views
from tools.demo import FOLDER, REPO
from utils import CLASSES, make_prediction_parser

DOCS = REPO / "docs"
SIZE = (256, 384)  # the sample's own, so that resizing blurs nothing


def draw_grid(path, pictures, columns, width):
    """Pictures with their titles, list of (title, uint8 (h, w, 3)), in rows of `columns`; width: of one, in inches."""
    rows = -(-len(pictures) // columns)
    figure = plt.figure(figsize=(columns * width, rows * (width * 2 / 3 + 0.45)), layout="constrained")
    for number, (title, picture) in enumerate(pictures, 1):
        axes = figure.add_subplot(rows, columns, number, xticks=[], yticks=[], frame_on=False)
        axes.imshow(picture)
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=90)


def tta_pictures(image_id):
    """The views of a test photo, with what the network of fold 0 predicts on average and for each: (title, picture)."""
    args = parse_args(make_prediction_parser(__doc__, str(FOLDER / "logs")), ["--folds", "0", "--num_workers", "0"])
    _, networks = load_trained(args)
    photo = read_photo(FOLDER / "sample" / "images" / f"{image_id}.jpg")
    (seen, n), (shown, _) = (tta_views(args, [image_id], [fit_photo(photo, size)]) for size in (args.image_size, SIZE))
    keys = [(0, view, 0) for view in range(n)]
    of_views = predict(networks, seen, keys, args, "views")
    titles = ["mean of the views", *(f"view {view + 1}" for view in range(n))]
    pictures = [fit_photo(photo, SIZE), *(shown[key]["image"].numpy() for key in keys)]
    for title, picture, values in zip(titles, pictures, [of_views.mean(0), *of_views], strict=True):
        predicted = (f"{name.split('_')[0]} {value:.2f}" for name, value in zip(CLASSES, values, strict=True))
        yield f"{title}\n{', '.join(predicted)}", picture


def main():
    parse_args(Parser(__doc__))
    train = read_table(FOLDER / "sample" / "train.csv", ("image_id", *CLASSES), hint="run make demo first")
    photo = read_photo(FOLDER / "sample" / "images" / f"{train['image_id'][train['rust'] == 1].iloc[0]}.jpg")
    draw_grid(DOCS / "augmentations.png", augmentation_pictures(fit_photo(photo, SIZE)), columns=4, width=3)
    draw_grid(DOCS / "tta.png", list(tta_pictures("Test_4")), columns=3, width=4)


if __name__ == "__main__":
    main()
