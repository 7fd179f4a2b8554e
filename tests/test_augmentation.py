"""Our augmentation against the statistics of the original's, albumentations 0.4.5 (tests/reference/).

augmentations_rendered.json: each operation, 1,000 times on a leaf that our own tools draw, rendered_leaf.png.
augmentations.json: what was measured on a photo, which is not ours to ship, and does not depend on it.
"""

import json
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dataset import LeafDataset, train_augmentation
from models import LeafNet
from tools.generate_sample_data import render_leaf

REFERENCE = Path(__file__).parent / "reference"
FIGURES = json.loads((REFERENCE / "augmentations.json").read_text())
RENDERED = json.loads((REFERENCE / "augmentations_rendered.json").read_text())
LEAF = cv2.cvtColor(cv2.imread(str(REFERENCE / "rendered_leaf.png")), cv2.COLOR_BGR2RGB)
QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # of both files
ROUNDING = 1e-4  # of the figures

augmentation = train_augmentation()
brightness_or_contrast, blur, vertical_flip, horizontal_flip, geometry = augmentation.transforms
PARTS = [*brightness_or_contrast.transforms, *blur.transforms, vertical_flip, horizontal_flip, geometry]
NAMES = "brightness contrast motion_blur median_blur gaussian_blur vertical_flip horizontal_flip shift_scale_rotate"
TRANSFORMS = dict(zip(NAMES.split(), PARTS, strict=True))


def draws(transform, image, n, seed=0):
    """What `transform`, applied with certainty, makes of `image` in n draws, one after the other."""
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    probability, transform.p = transform.p, 1
    try:
        for _ in range(n):
            yield transform(image=image)["image"]
    finally:
        transform.p = probability


def average(image):
    return np.mean(cv2.mean(image)[:3])


def sharpness(image):
    laplacian = cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_16S)
    return cv2.meanStdDev(laplacian)[1].item() ** 2


def noise_image(size=(96, 128), seed=0):
    return np.random.default_rng(seed).integers(60, 196, (*size, 3), dtype=np.uint8)


def test_the_reference_leaf_is_what_our_tools_draw():
    drawn, _ = render_leaf("rust", 480, 768, np.random.default_rng(100))
    assert list(drawn.shape) == list(LEAF.shape) == RENDERED["photo_shape"]
    difference = cv2.absdiff(drawn, LEAF)
    # floating-point sums differ between processors: 3 of the 1,105,920 values do between two of ours
    assert difference.max() <= 1 and np.count_nonzero(difference) < 100
    assert average(LEAF) == pytest.approx(RENDERED["base_mean"], abs=1e-9)
    assert sharpness(LEAF) == pytest.approx(RENDERED["base_laplacian_var"], abs=1e-9)


def assert_same_distribution(ours, expected, error, name):
    """Each inner quantile of the reference lies where it should among ours, `error` % of the draws at most off.

    That is for the median, whose sampling error is the largest; for the others it is less, as it is for theirs.
    """
    for quantile, value in list(zip(QUANTILES, expected, strict=True))[1:-1]:
        off = error * np.sqrt(4 * quantile * (100 - quantile)) / 100
        low, high = np.percentile(ours, np.clip([quantile - off, quantile + off], 0, 100))
        text = f"{name}, {quantile} % quantile: {low}…{high}, not {value}"
        assert low - ROUNDING <= value <= high + ROUNDING, text


def assert_same_range(ours, expected, n_expected, name):
    """The extremes of the reference, of n_expected draws, are those of ours.

    More than seven in n_expected draws lie beyond them with a probability of e^-7. So wide a margin is left on the
    other side too.
    """
    share = 700 / n_expected
    low, high = np.percentile(ours, [share, 100 - share])
    text = f"{name}: {np.min(ours)}…{np.max(ours)}, not {expected[0]}…{expected[-1]}"
    assert 2 * np.min(ours) - low - ROUNDING <= expected[0] <= low + ROUNDING, text
    assert high - ROUNDING <= expected[-1] <= 2 * np.max(ours) - high + ROUNDING, text


@pytest.mark.parametrize("name", [name for name, figures in RENDERED.items() if isinstance(figures, dict)])
def test_an_augmentation_has_the_originals_statistics_on_the_reference_leaf(name):
    figures, base_mean, base_sharpness = (RENDERED[key] for key in (name, "base_mean", "base_laplacian_var"))
    always_the_same = all(low == high for low, *_, high in figures.values())
    n = 20 if always_the_same else 1500
    measured = {"mean_shift": [], "mean_abs_change": [], "laplacian_var_ratio": []}
    for image in draws(TRANSFORMS[name], LEAF, n):
        measured["mean_shift"].append(average(image) - base_mean)
        measured["mean_abs_change"].append(cv2.norm(image, LEAF, cv2.NORM_L1) / LEAF.size)
        measured["laplacian_var_ratio"].append(sharpness(image) / base_sharpness)
    assert measured.keys() == figures.keys()
    error = 3 * 50 * np.sqrt(1 / RENDERED["draws"] + 1 / n)  # three standard errors of both samples
    for statistic, expected in figures.items():
        if always_the_same:
            np.testing.assert_allclose(measured[statistic], expected[0], rtol=0, atol=ROUNDING, err_msg=statistic)
        else:
            assert_same_distribution(measured[statistic], expected, error, statistic)
            assert_same_range(measured[statistic], expected, RENDERED["draws"], statistic)


def kernels(transform, n):
    """The kernels that a blur really applies, read off its response to a single bright pixel."""
    impulse = np.zeros((9, 9, 3), np.uint8)
    impulse[4, 4] = 240
    responses = [image[..., 0] / 240 for image in draws(transform, impulse, n)]
    assert all(response[3:6, 3:6].sum() == pytest.approx(response.sum()) == pytest.approx(1) for response in responses)
    return [response[3:6, 3:6] for response in responses]


def test_the_gaussian_is_one_two_one_and_the_median_is_three_by_three():
    expected = np.outer([1, 2, 1], [1, 2, 1]) / 16
    np.testing.assert_allclose(kernels(TRANSFORMS["gaussian_blur"], 3), [expected] * 3, atol=1e-9)
    image = noise_image()
    for result in draws(TRANSFORMS["median_blur"], image, 5):
        np.testing.assert_array_equal(result, cv2.medianBlur(image, 3))


def test_motion_blur_averages_along_every_line_of_the_kernel_unlike_albumentations_2():
    seen = {tuple(np.round(kernel, 3).ravel()) for kernel in kernels(TRANSFORMS["motion_blur"], 600)}
    # a line is given by its two ends, and there are 36 pairs of nine places; OpenCV draws two pixels or three
    assert len(seen) == 36 and {np.count_nonzero(kernel) for kernel in seen} == {2, 3}
    assert any(np.reshape(kernel, (3, 3))[0].sum() > 0.99 for kernel in seen)  # an off-centre line: it also shifts


def test_shift_scale_and_rotation_have_the_originals_ranges_and_the_border_is_reflected():
    """The affine map of each draw is read off the middle part of a picture whose values are its own coordinates."""
    height, width = 240, 384
    y, x = np.mgrid[:height, :width].astype(np.float32)
    picture = np.dstack([x / width, y / height, np.zeros_like(x)])
    places = np.dstack([x - (width - 1) / 2, y - (height - 1) / 2, np.ones_like(x)])  # from the middle, and 1
    middle = np.s_[96:144, 154:230]
    solve = np.linalg.pinv(places[middle].reshape(-1, 3))
    measured = []
    for number, image in enumerate(draws(geometry, picture, 600)):
        coordinates = image[..., :2] * [width, height]  # in the picture, of each place
        found = solve @ coordinates[middle].reshape(-1, 2)  # (3, 2): from places to coordinates
        forward = np.linalg.inv(found[:2].T)
        shift = -forward @ (found[2] - [(width - 1) / 2, (height - 1) / 2])
        angle = np.degrees(np.arctan2(forward[1, 0], forward[0, 0]))
        measured.append([np.sqrt(np.linalg.det(forward)), angle, shift[0] / width, shift[1] / height])
        across, down = np.linalg.norm(forward, axis=0)
        assert abs(across / down - 1) < 0.002  # one scale for both axes
        if number < 50:
            last = np.array([width - 1, height - 1])
            unfolded = np.abs(places @ found) % (2 * last)
            np.testing.assert_allclose(coordinates, np.minimum(unfolded, 2 * last - unfolded), rtol=0, atol=0.1)
    limits = {"scale": (0.8, 1.2), "rotation_deg": (-20, 20), "centre_x": (-0.2, 0.2), "centre_y": (-0.2, 0.2)}
    for ours, (name, (low, high)) in zip(np.transpose(measured), limits.items(), strict=True):
        # the reference is a small sample, of some 100 draws by its extremes: 6 % is little more than a standard error
        assert_same_distribution(ours, FIGURES["affine"][name], 6, name)
        # of 600 draws; and a shift is in whole pixels, rounded towards 0
        assert [ours.min(), ours.max()] == pytest.approx([low, high], abs=0.015 * (high - low)), name


def shares(transform, image, outcomes, n=3000):
    """How often `transform`, as it stands, makes of `image` what each of `outcomes` recognises, the first that does.

    Each of the results must be one of these.
    """
    transform.set_random_state(np.random.default_rng(1), random.Random(1))
    counts = dict.fromkeys(outcomes, 0)
    for _ in range(n):
        result = transform(image=image)["image"]
        counts[next(name for name, recognises in outcomes.items() if recognises(result))] += 1
    return {name: count / n for name, count in counts.items()}


def equals(other):
    return lambda result: np.array_equal(result, other)


def test_every_part_is_applied_as_often_as_the_original_does_it():
    image = noise_image((24, 32))
    unchanged = {"unchanged": equals(image)}
    one_level = {"brightness": lambda result: len(np.unique(result.astype(int) - image)) == 1}
    found = shares(brightness_or_contrast, image, unchanged | one_level | {"contrast": lambda result: True})
    # 2 % of the brightnesses and contrasts are too small to change a pixel
    assert found == pytest.approx({"unchanged": 0.51, "brightness": 0.245, "contrast": 0.245}, abs=0.03)
    assert 1 - found["unchanged"] == pytest.approx(FIGURES["one_of_brightness_contrast_applied"], abs=0.03)

    known = {"median": equals(cv2.medianBlur(image, 3)), "gaussian": equals(cv2.GaussianBlur(image, (3, 3), 0))}
    found = shares(blur, image, unchanged | known | {"motion": lambda result: True})
    assert found == pytest.approx({"unchanged": 0.5, "median": 1 / 6, "gaussian": 1 / 6, "motion": 1 / 6}, abs=0.03)

    for flip, flipped in ((vertical_flip, image[::-1]), (horizontal_flip, image[:, ::-1])):
        found = shares(flip, image, unchanged | {"flipped": equals(flipped)})
        assert found == pytest.approx({"unchanged": 0.5, "flipped": 0.5}, abs=0.03)
    for always in (geometry, augmentation):
        assert shares(always, image, unchanged | {"changed": lambda result: True})["changed"] > 0.99


def test_normalisation_is_the_originals():
    """It is linear, so that a photo's mean and deviation are enough: those of the one that the original was run on."""
    mean_colour, deviation = np.array([108.6139, 147.0895, 103.6055]), np.array([69.8684, 44.1721, 63.6388])  # 0…255
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 4, 64, 1).expand(2, 4, 64, 3)
    normalised = LeafNet().normalise(levels)
    assert normalised.shape == (2, 3, 4, 64) and normalised.dtype == torch.float32
    lines = normalised[1].reshape(3, 256).numpy()
    slope = (lines[:, -1] - lines[:, 0]) / 255
    np.testing.assert_allclose(lines, lines[:, :1] + slope[:, None] * np.arange(256), atol=1e-5)
    np.testing.assert_allclose(lines[:, 0] + slope * mean_colour, FIGURES["normalize"]["mean"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(slope * deviation, FIGURES["normalize"]["std"], rtol=0, atol=5e-4)


def test_a_photo_is_augmented_by_seed_fold_epoch_and_id_alone():
    images = [noise_image(seed=i) for i in range(3)]

    def view(epoch, row, seed=1, fold=2, ids=("a", "b", "c"), before=()):
        dataset = LeafDataset(images, ids, augmentation=train_augmentation(), seed=seed)
        for key in before:
            dataset[key]
        return dataset[fold, epoch, row]["image"].numpy()

    same = view(4, 1)
    np.testing.assert_array_equal(same, view(4, 1, before=[(0, 0, 0), (2, 4, 2), (2, 4, 1)]))
    np.testing.assert_array_equal(same, view(4, 1, ids=("x", "b", "y")))
    for other in (view(5, 1), view(4, 1, seed=2), view(4, 1, fold=3), view(4, 1, ids=("a", "other", "c"))):
        assert not np.array_equal(same, other)
