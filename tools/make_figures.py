"""Draw the pictures of the docs from the rendered sample and the networks that `make demo` trained on it.

  python -m tools.make_figures

Reads   demo/: sample/, logs/, logs_submit_distill/ (run `make demo` first).
Writes  docs/prediction.png, docs/augmentations.png, docs/tta.png.
"""

from analysis.figures import augmentation_pictures, plt
from analysis.heat_maps import mark_photo
from dataset import LeafDataset, fit_photo
from harness.console import Parser, parse_args
from harness.files import read_table
from harness.photos import read_photo
from inference import load_trained, predict, tta_views
from tools.demo import FOLDER, REPO
from utils import CLASSES, make_prediction_parser

DOCS = REPO / "docs"
MAP_SIZE = (128, 192)  # twice that of the training: a heat map of 4 x 6 cells, not 2 x 3
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


def load_fold_0(log_dir="logs"):
    """The arguments of a prediction by the network of fold 0, and that network: dict of fold to LeafNet."""
    args = parse_args(make_prediction_parser(__doc__, str(FOLDER / log_dir)), ["--folds", "0", "--num_workers", "0"])
    return args, load_trained(args)[1]


def describe(title, values):
    """A title, and below it the probability of each class."""
    parts = (f"{name.split('_')[0]} {value:.2f}" for name, value in zip(CLASSES, values, strict=True))
    return f"{title}\n{', '.join(parts)}"


def prediction_pictures(image_id):
    """A test photo, and after each round its probabilities and what speaks for the likeliest class: (title, picture)."""
    path = FOLDER / "sample" / "images" / f"{image_id}.jpg"
    photo = read_photo(path)
    pictures = [("a photo\n", fit_photo(photo, SIZE))]
    for log_dir, when in (("logs", "after step 1"), ("logs_submit_distill", "after step 3")):
        args, networks = load_fold_0(log_dir)
        image = fit_photo(photo, args.image_size)[None]
        values = predict(networks, LeafDataset(image, [image_id]), [(0, 0, 0)], args, image_id)[0]
        _, marked = mark_photo(path, [int(values.argmax())], networks.values(), MAP_SIZE)
        pictures.append((describe(f"{when}: what speaks for {CLASSES[values.argmax()]}", values), marked))
    return pictures


def tta_pictures(image_id, args, networks):
    """The views of a test photo, with what the network of fold 0 predicts on average and for each: (title, picture)."""
    photo = read_photo(FOLDER / "sample" / "images" / f"{image_id}.jpg")
    (seen, n), (shown, _) = (tta_views(args, [image_id], [fit_photo(photo, size)]) for size in (args.image_size, SIZE))
    keys = [(0, view, 0) for view in range(n)]
    of_views = predict(networks, seen, keys, args, "views")
    titles = ["mean of the views", *(f"view {view + 1}" for view in range(n))]
    pictures = [fit_photo(photo, SIZE), *(shown[key]["image"].numpy() for key in keys)]
    for title, picture, values in zip(titles, pictures, [of_views.mean(0), *of_views], strict=True):
        yield describe(title, values), picture


def main():
    parse_args(Parser(__doc__))
    train = read_table(FOLDER / "sample" / "train.csv", ("image_id", *CLASSES), hint="run make demo first")
    photo = read_photo(FOLDER / "sample" / "images" / f"{train['image_id'][train['rust'] == 1].iloc[0]}.jpg")
    draw_grid(DOCS / "augmentations.png", augmentation_pictures(fit_photo(photo, SIZE)), columns=4, width=3)
    draw_grid(DOCS / "prediction.png", prediction_pictures("Test_32"), columns=3, width=4)
    draw_grid(DOCS / "tta.png", list(tta_pictures("Test_4", *load_fold_0())), columns=3, width=4)


if __name__ == "__main__":
    main()
