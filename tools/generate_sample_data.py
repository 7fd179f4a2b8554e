"""Draw a small data set of apple leaves in the layout of Kaggle's Plant Pathology 2020.

  python -m tools.generate_sample_data --out data_sample --n_train 240 --n_test 120

Writes  OUT: images/, train.csv, test.csv and sample_submission.csv as in the competition, and what only a drawn data set
        can know: test_labels.csv, wrong_labels.csv (the training labels that are wrong on purpose), lesions.csv (kind,
        centre and radius in pixels of every spot); sample.json holds the options.
Expect  15 s for 360 photos of 256x384. The same options give the same bytes on the same machine. The drawings exercise
        the pipeline; scores on them say nothing about real leaves.
"""

import colorsys
import json
import math
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from joblib import cpu_count
from tqdm import tqdm

from harness.console import InputError, Parser, file_or_folder, not_negative, number, parse_args, say
from harness.files import write_csv
from utils import CLASSES

RENDERER_VERSION = 3  # raise it with every change of the drawing
COMPETITION_COUNTS = {"healthy": 516, "multiple_diseases": 91, "rust": 622, "scab": 592}
SPLITS = ("Train", "Test")
BACKGROUNDS = (  # lowest and highest (hue, saturation, value)
    ((65, 0.2, 0.15), (135, 0.7, 0.75)),  # foliage
    ((20, 0.2, 0.20), (42, 0.6, 0.70)),  # soil, bark
    ((18, 0.6, 0.40), (40, 0.9, 0.85)),  # dry leaves: orange doesn't mean rust
    ((190, 0.0, 0.45), (240, 0.25, 1.0)),  # sky, stone
    ((60, 0.1, 0.03), (140, 0.5, 0.15)),  # shadow
)
SPOT_COUNTS = {"rust": (5, 14), "scab": (4, 10)}  # lowest and highest number on a leaf
SPOT_RADII = {"rust": (0.03, 0.05), "scab": (0.035, 0.06)}  # in leaf lengths


def hsv(hue, saturation, value):
    """Colour from hue in degrees, saturation and value in 0..1: float32 RGB, shape (3,)."""
    return np.array(colorsys.hsv_to_rgb(hue / 360, saturation, value), np.float32)


def noise(rng, height, width, cells):
    """Smooth random field, about -1..1, `cells` bumps along the short side: float32 (height, width)."""
    scale = cells / min(height, width)
    grid = rng.uniform(-1, 1, (max(2, round(height * scale)), max(2, round(width * scale)))).astype(np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def mix(image, colour, alpha):
    """Blend colour (3,) or (H, W, 3) over image (H, W, 3) with opacity alpha (H, W)."""
    return image + (colour - image) * alpha[..., None]


def smoothstep(low, high, x):
    """0 where x <= low, 1 where x >= high, smooth in between (low > high falls instead of rising)."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class Leaf:
    """Place (pixels) and shape of a leaf that fills most of a photo, mostly along the photo's long side.

    Leaf coordinates: u from 0 (base) to 1 (tip), v across it (0 on the midrib), both in leaf lengths.
    """

    def __init__(self, height, width, rng):
        self.angle = rng.normal(0, 0.55) + (math.pi / 2 if height > width else 0) + math.pi * rng.integers(2)
        room = min(width / abs(math.cos(self.angle)), height / abs(math.sin(self.angle)), 1.4 * min(height, width))
        self.length = room * rng.uniform(0.82, 1.02)
        self.x, self.y = width * rng.uniform(0.44, 0.56), height * rng.uniform(0.44, 0.56)  # its middle
        self.half_width, self.bend = rng.uniform(0.26, 0.35), rng.uniform(-0.22, 0.22)
        self.base, self.tip = rng.uniform(0.5, 0.65), rng.uniform(0.85, 1.1)  # exponents: round base, sharp tip
        self.teeth, self.veins = int(rng.integers(18, 34)), int(rng.integers(8, 13))

    def to_leaf(self, x, y):
        """Pixels x, y -> leaf coordinates u, v (any shapes that broadcast)."""
        cos, sin = math.cos(self.angle) / self.length, math.sin(self.angle) / self.length
        u = (x - self.x) * cos + (y - self.y) * sin + 0.5
        return u, (y - self.y) * cos - (x - self.x) * sin - self.bend * (u - 0.5) ** 2

    def to_photo(self, u, v):
        """Leaf coordinates u, v -> pixels x, y (the inverse of to_leaf)."""
        along, across = (u - 0.5) * self.length, (v + self.bend * (u - 0.5) ** 2) * self.length
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return self.x + along * cos - across * sin, self.y + along * sin + across * cos

    def width_at(self, u):
        """Half width of the leaf without its teeth at u, and its slope there (0 width outside 0..1)."""
        u = np.clip(u, 1e-4, 1 - 1e-4)
        widest = self.base / (self.base + self.tip)
        peak = widest**self.base * (1 - widest) ** self.tip
        width = self.half_width / peak * u**self.base * (1 - u) ** self.tip
        return width, width * (self.base / u - self.tip / (1 - u))


def draw_background(height, width, rng):
    """Out-of-focus foliage, ground, sky and shadow: float32 RGB in 0..1, (height, width, 3)."""
    small_h, small_w = (round(side * 120 / min(height, width)) for side in (height, width))
    shares = rng.dirichlet([1.6, 0.7, 0.5, 0.6, 0.7])  # uneven: each photo has surroundings of its own

    def colour():
        low, high = BACKGROUNDS[rng.choice(len(BACKGROUNDS), p=shares)]
        return hsv(*rng.uniform(low, high))

    image = np.full((small_h, small_w, 3), colour())
    for _ in range(3):
        image = mix(image, colour(), smoothstep(-0.3, 0.5, noise(rng, small_h, small_w, rng.integers(2, 6))))
    for sigma in (9, 4):  # far things first, then nearer ones that are less blurred
        for _ in range(rng.integers(8, 22)):
            centre = int(rng.integers(small_w)), int(rng.integers(small_h))
            axes = int(rng.integers(8, 34)), int(rng.integers(5, 18))
            shade = tuple(float(c) for c in colour())
            cv2.ellipse(image, centre, axes, float(rng.uniform(0, 180)), 0, 360, shade, -1)
        image = cv2.GaussianBlur(image, (0, 0), sigma * rng.uniform(0.7, 1.3))
    return np.clip(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def draw_leaf(leaf, height, width, rng):
    """A leaf without any disease: its colours, float32 RGB (height, width, 3), and opacity (height, width)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = leaf.to_leaf(x, y)
    side, right = np.abs(v), (v > 0).astype(np.float32)
    edge, slope = leaf.width_at(u)
    tooth = (u * leaf.teeth + 0.5 * right) % 1
    edge = edge + rng.uniform(0.006, 0.016) * (tooth - 0.6) * np.minimum(1, edge / 0.12)
    edge = edge * (1 + 0.03 * np.sin(u * rng.uniform(8, 16) + 2 * right))
    inside = np.clip((edge - side) * leaf.length / np.sqrt(1 + slope * slope) + 0.5, 0, 1)
    inside[(u <= 0) | (u >= 1)] = 0
    stalk = np.clip((rng.uniform(0.009, 0.013) - side) * leaf.length + 0.5, 0, 1) * ((u < 0.1) & (u > -0.3))

    base = hsv(rng.uniform(78, 128), rng.uniform(0.35, 0.68), rng.uniform(0.42, 0.72))
    texture = sum(noise(rng, height, width, cells) * part for cells, part in ((3, 0.10), (9, 0.05), (300, 0.05)))
    for cells in (50, 110):  # ridges of a smooth field look like the net of the finest veins
        texture += 0.05 * (0.5 - smoothstep(0, 0.35, np.abs(noise(rng, height, width, cells))))
    phase = (u - 0.75 * side + 0.5 * v * v) * leaf.veins + 0.45 * right + 0.12 * noise(rng, height, width, 6)
    between = np.abs(phase - np.round(phase))  # 0 on a side vein, 0.5 half way to the next one
    texture += rng.uniform(0.05, 0.14) * (between - 0.25) * 2
    texture += rng.uniform(-0.14, 0.14) * np.tanh(v / 0.02)  # the two halves face the light differently
    texture -= 0.12 * smoothstep(0.03, 0.0, edge - side)
    image = base * (1 + texture[..., None])

    pale = base * 0.55 + hsv(75, 0.25, 0.85) * 0.45
    image = mix(image, pale, smoothstep(0.35, 0.9, noise(rng, height, width, 5)) * rng.uniform(0, 0.4))
    side_veins = np.exp(-((between / leaf.veins / 0.0035) ** 2)) * smoothstep(0, 0.06, edge - side)
    midrib = np.exp(-((side / (0.011 - 0.007 * np.clip(u, 0, 1))) ** 2))
    image = mix(image, pale, np.maximum(side_veins * rng.uniform(0.25, 0.55), midrib * rng.uniform(0.6, 0.9)))
    image = mix(image, pale * 0.9, stalk * (1 - inside))
    dust = smoothstep(0.88, 1.0, noise(rng, height, width, 100)) * rng.uniform(0, 0.5)
    return mix(image, hsv(50, 0.08, 0.85), dust), np.maximum(inside, stalk)


def place_spots(kinds, leaf, height, width, rng):
    """Random spots of the given kinds on the leaf and in the photo: list of (kind, x, y, radius), pixels."""
    spots = []
    for kind in kinds:
        for _ in range(rng.integers(*SPOT_COUNTS[kind], endpoint=True)):
            apart = 1.0
            while True:
                radius = rng.uniform(*SPOT_RADII[kind])
                u = rng.uniform(0.06, 0.92)
                room = float(leaf.width_at(u)[0]) - 0.9 * radius
                x, y = leaf.to_photo(u, rng.uniform(-1, 1) * max(room, 0))
                radius *= leaf.length
                free = all(math.hypot(x - a, y - b) > apart * (radius + r) for _, a, b, r in spots)
                if free and room > 0 and radius < x < width - radius and radius < y < height - radius:
                    break
                apart *= 0.99  # on a crowded leaf let spots touch rather than search for ever
            spots.append((kind, float(x), float(y), float(radius)))
    return spots


def draw_spot(image, kind, x, y, radius, rng):
    """Draw one rust spot or scab blotch into image (float32 RGB, H x W x 3), in place."""
    top, left = max(0, int(y - 2 * radius)), max(0, int(x - 2 * radius))
    window = image[top : int(y + 2 * radius) + 1, left : int(x + 2 * radius) + 1]
    rows, columns = np.mgrid[: window.shape[0], : window.shape[1]].astype(np.float32)
    dy, dx = rows + top - y, columns + left - x
    turn = np.arctan2(dy, dx)
    rough = 0.06 if kind == "rust" else 0.12
    wobble = 1 + sum(rng.uniform(-rough, rough) * np.cos(k * turn + rng.uniform(0, 6.3)) for k in (2, 3, 4))
    far = np.hypot(dx, dy) / (radius * wobble)  # 1 on the spot's outline
    grain = noise(rng, *far.shape, 13)
    if kind == "rust":
        window[:] = mix(window, hsv(rng.uniform(51, 57), 0.8, 0.92), smoothstep(1.35, 0.8, far) * 0.9)
        core = hsv(rng.uniform(20, 27), 0.95, rng.uniform(0.86, 0.98)) * (1 + 0.1 * grain[..., None])
        window[:] = mix(window, core, smoothstep(0.95, 0.6, far + 0.08 * grain))
        dots = smoothstep(0.3, 0.7, grain) * smoothstep(0.55, 0.25, far)
        window[:] = mix(window, hsv(12, 0.9, 0.35), 0.6 * dots)  # the fungus' dark dots
    else:
        velvet = hsv(rng.uniform(50, 66), 0.5, rng.uniform(0.15, 0.2)) * (1 + 0.35 * grain[..., None])
        ragged = far + 0.25 * noise(rng, *far.shape, 7) + 0.15 * grain
        window[:] = mix(window, velvet, smoothstep(1.25, 0.6, ragged) * 0.95)


def render_leaf(label, height, width, rng):
    """One photo of a leaf of the class `label`: uint8 RGB (height, width, 3), and its spots as place_spots gives them.

    The same rng state gives the same leaf and surroundings for every label.
    """
    spot_rng, rng, sensor_rng = rng.spawn(3)
    leaf = Leaf(height, width, rng)
    image = draw_background(height, width, rng)
    surface, opacity = draw_leaf(leaf, height, width, rng)
    kinds = {"healthy": (), "multiple_diseases": ("rust", "scab")}.get(label, (label,))
    spots = place_spots(kinds, leaf, height, width, spot_rng)
    for kind, x, y, radius in spots:
        draw_spot(surface, kind, x, y, radius, spot_rng)
    gloss = smoothstep(0.45, 1.0, noise(rng, height, width, 7)) * rng.uniform(0, 0.35)
    surface = mix(surface, hsv(210, 0.05, 0.95), gloss)

    small = cv2.resize(opacity, None, fx=96 / min(height, width), fy=96 / min(height, width))
    shift = np.float32([[1, 0, rng.uniform(-6, 6)], [0, 1, rng.uniform(-6, 6)]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(small, shift, small.shape[::-1]), (0, 0), 4)
    image *= 1 - rng.uniform(0.2, 0.7) * cv2.resize(shadow, (width, height))[..., None]
    image = mix(image, surface, opacity)

    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    across = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0, 0.25) * (x * math.cos(across) + y * math.sin(across))
    light += rng.uniform(0, 0.2) * noise(rng, height, width, 3)
    balance = np.exp(rng.normal(0, [0.10, 0.04, 0.12])) * np.exp(rng.uniform(-0.35, 0.25))
    image *= light[..., None] * balance.astype(np.float32)
    image = np.clip(image, 0, 1) ** np.float32(rng.uniform(0.85, 1.2))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.7) * (min(height, width) / 256) ** 0.4)
    image += rng.uniform(0.005, 0.02) * sensor_rng.standard_normal(image.shape, np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), spots


def true_labels(n, rng):
    """n class names in random order, in the competition's proportions (largest remainder, none missing)."""
    exact = np.array([COMPETITION_COUNTS[name] for name in CLASSES]) / sum(COMPETITION_COUNTS.values()) * n
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: n - counts.sum()]] += 1
    for missing in np.flatnonzero(counts == 0):
        counts[counts.argmax()] -= 1
        counts[missing] = 1
    return rng.permutation(np.repeat(CLASSES, counts)).tolist()


def with_mistakes(labels, rng):
    """A copy of the labels with 2.5 % (at least 2) wrong, as in the competition; none of the rare multiple_diseases."""
    labels, common = list(labels), [name for name in CLASSES if name != "multiple_diseases"]
    rows = [row for row, label in enumerate(labels) if label in common]
    for row in rng.choice(rows, max(2, round(0.025 * len(labels))), replace=False):
        labels[row] = str(rng.choice([name for name in common if name != labels[row]]))
    return labels


def write_photo(job, out, photo_size, seed):
    """Draw and write one photo; job is (split 0 or 1, index, label). Returns its rows of lesions.csv."""
    split, index, label = job
    rng = np.random.default_rng([seed, split, index])
    height, width = photo_size if rng.random() >= 0.04 else photo_size[::-1]  # a few are portraits
    photo, spots = render_leaf(label, height, width, rng)
    image_id = f"{SPLITS[split]}_{index}"
    _, data = cv2.imencode(".jpg", photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    (out / "images" / f"{image_id}.jpg").write_bytes(data.tobytes())
    return [(image_id, kind, *(round(number, 2) for number in place)) for kind, *place in spots]


def one_hot(split, labels):
    """DataFrame with image_id and one 0/1 column per class, as in train.csv."""
    table = {"image_id": [f"{SPLITS[split]}_{index}" for index in range(len(labels))]}
    return pd.DataFrame(table | {name: [int(label == name) for label in labels] for name in CLASSES})


def generate(out, n_train, n_test, photo_size, seed):
    """Write the whole data set into the folder `out` (Path); photo_size is (height, width) in pixels."""
    # Photos are seeded with [seed, split, index]. A 0 at the end doesn't count: [seed, 0] would be Train_0's seed.
    label_rng = np.random.default_rng([seed, len(SPLITS)])
    labels = [true_labels(n, label_rng) for n in (n_train, n_test)]
    given = with_mistakes(labels[0], label_rng)
    (out / "images").mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)  # the pool already uses the cores
    jobs = [(split, index, label) for split in (0, 1) for index, label in enumerate(labels[split])]
    with ThreadPool(min(8, cpu_count())) as pool:  # numpy and OpenCV let go of the interpreter's lock while they draw
        photos = pool.imap(lambda job: write_photo(job, out, photo_size, seed), jobs)
        rows = [row for photo in tqdm(photos, "photos", len(jobs)) for row in photo]
    train, test = one_hot(0, given), one_hot(1, labels[1])
    wrong = pd.DataFrame({"image_id": train.image_id, "label": given, "true_label": labels[0]})
    write_csv(out / "lesions.csv", pd.DataFrame(rows, columns=["image_id", "kind", "x", "y", "radius"]))
    write_csv(out / "wrong_labels.csv", wrong[wrong.label != wrong.true_label])
    write_csv(out / "test_labels.csv", test)
    write_csv(out / "sample_submission.csv", test.assign(**dict.fromkeys(CLASSES, 0.25)))
    write_csv(out / "test.csv", test[["image_id"]])
    write_csv(out / "train.csv", train)  # last: its presence says that the data set is complete


def main(argv=None):
    parser, size = Parser(__doc__), {"type": number(int, 64, 2**14, "64 or more"), "nargs": 2, "metavar": ("H", "W")}
    parser.add_argument("--out", type=file_or_folder, default="data_sample", help="folder to write")
    n_photos = number(int, 8, 2**31, "8 or more")
    parser.add_argument("--n_train", type=n_photos, default=240, help="number of training photos")
    parser.add_argument("--n_test", type=n_photos, default=120, help="number of test photos")
    parser.add_argument("--photo_size", **size, default=[256, 384], help="height and width, in pixels")
    parser.add_argument("--seed", type=not_negative, default=2020, help="another seed draws other leaves")
    args = parse_args(parser, argv)
    out, options = Path(args.out), {name: getattr(args, name) for name in ("n_train", "n_test", "photo_size", "seed")}
    record, sample = out / "sample.json", json.dumps({"renderer_version": RENDERER_VERSION, **options}) + "\n"
    if not record.is_file() or record.read_text() != sample:
        if any((out / name).exists() for name in ("train.csv", "images", "sample.json")):
            raise InputError(f"{out} holds other data: choose another --out, or delete that folder")
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(sample)  # first, so that an interrupted run can be repeated
    elif (out / "train.csv").is_file():
        return say(f"{out}: already there")
    generate(out, **options)
    say(f"{out}: {args.n_train} training and {args.n_test} test photos")


if __name__ == "__main__":
    main()
