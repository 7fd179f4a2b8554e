"""Our augmentation against the statistics of the original's (tests/reference/augmentations.json).

The reference was taken on one photo, which is not ours to ship. What does not depend on the photo is compared
everywhere; the blurs' effect on its sharpness is computed from the photo's autocorrelation and our own kernels; and
where `../shared/photos` lies beside the repository, everything is measured on the photo itself too.
"""

import json
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from analysis.figures import augmentation_parts
from dataset import GaussianBlur3, LeafDataset, MotionBlur3, train_augmentation
from models import LeafNet

REFERENCE = Path(__file__).parent / "reference"
FIGURES = json.loads((REFERENCE / "augmentations.json").read_text())
PHOTO = Path(__file__).parents[2] / "shared" / "photos" / "Train_2.jpg"
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
needs_photo = pytest.mark.skipif(not PHOTO.exists(), reason=f"the reference photo is not at {PHOTO}")

augmentation = train_augmentation()
brightness_or_contrast, blur, vertical_flip, horizontal_flip, geometry = augmentation.transforms
TRANSFORMS = augmentation_parts(augmentation)


def draws(transform, image, n, seed=0):
    """What `transform`, applied with certainty, makes of `image` in n draws."""
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    probability, transform.p = transform.p, 1
    try:
        return [transform(image=image)["image"] for _ in range(n)]
    finally:
        transform.p = probability


def sharpness(image):
    return cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var()


def noise_image(size=(96, 128), seed=0):
    return np.random.default_rng(seed).integers(60, 196, (*size, 3), dtype=np.uint8)


@needs_photo
@pytest.mark.parametrize("name", TRANSFORMS)
def test_statistics_on_the_reference_photo(name):
    photo = cv2.resize(cv2.cvtColor(cv2.imread(str(PHOTO)), cv2.COLOR_BGR2RGB), (768, 480))
    assert photo.mean() == pytest.approx(FIGURES["base_mean"], abs=1e-3)
    results = draws(TRANSFORMS[name], photo, 300)
    base = sharpness(photo)
    measured = {
        "mean_shift": [float(image.mean() - photo.mean()) for image in results],
        "mean_abs_change": [float(cv2.absdiff(image, photo).mean()) for image in results],
        "laplacian_var_ratio": [sharpness(image) / base for image in results],
    }
    for statistic, values in measured.items():
        assert_same_distribution(values, FIGURES[name][statistic], statistic)


def assert_same_distribution(ours, expected, name, slack=0.0):
    """Each of the reference's inner quantiles lies between ours of 8 % less and 8 % more of the draws.

    The reference is a sample too, of some 200 draws by its extremes: a standard error of 3 %. `slack` widens the band
    by a share of the value, for what is computed rather than measured.
    """
    margin = (slack + 0.002) * np.abs(expected).max() + 1e-4
    for quantile, value in list(zip(QUANTILES, expected, strict=True))[1:-1]:
        low, high = np.percentile(ours, [max(quantile - 8, 0), min(quantile + 8, 100)])
        assert low - margin <= value <= high + margin, f"{name}, {quantile} % quantile: {low}…{high}, not {value}"


def test_brightness_shifts_by_a_tenth_of_the_range_and_contrast_by_a_tenth_of_the_mean():
    grey = np.full((8, 8, 3), 120, np.uint8)
    shifts = [image.mean() - 120 for image in draws(TRANSFORMS["brightness"], grey, 500)]
    assert min(shifts) == pytest.approx(FIGURES["brightness"]["mean_shift"][0], abs=1.01)
    assert max(shifts) == pytest.approx(25, abs=1.01)
    shifts = [image.mean() - 120 for image in draws(TRANSFORMS["contrast"], grey, 500)]
    share = FIGURES["contrast"]["mean_shift"][0] / FIGURES["base_mean"]
    assert min(shifts) == pytest.approx(share * 120, abs=1.2)  # a grey level, for the rounding
    assert max(shifts) == pytest.approx(-share * 120, abs=1.2)


def sharpness_ratio(kernel):
    """Sharpness of the reference photo after a blur, over before: from its autocorrelation and the blur's kernel."""
    photo = json.loads((REFERENCE / "photo_autocorrelation.json").read_text())
    correlation = np.array(photo["autocorrelation"]) * photo["variance"]
    # uint8 rounds three channels, then their grey mean; the Laplacian's kernel has energy 20
    rounding = 20 / 12 * (1 + 0.299**2 + 0.587**2 + 0.114**2)

    def variance(kernel):
        padded = cv2.copyMakeBorder(kernel, 3, 3, 3, 3, cv2.BORDER_CONSTANT)
        response = cv2.Laplacian(padded, cv2.CV_64F, borderType=cv2.BORDER_CONSTANT)
        offsets = range(-4, 5)
        own = [[(response * np.roll(response, (y, x), (0, 1))).sum() for x in offsets] for y in offsets]
        return (np.array(own) * correlation).sum()

    unit = np.zeros((3, 3))
    unit[1, 1] = 1
    return (variance(kernel) + rounding) / variance(unit)


def kernels(transform, n):
    """The kernels that a blur really applies, read off its response to a single bright pixel."""
    impulse = np.zeros((9, 9, 3), np.uint8)
    impulse[4, 4] = 240
    responses = [image[..., 0] / 240 for image in draws(transform, impulse, n)]
    assert all(response[3:6, 3:6].sum() == pytest.approx(response.sum()) == pytest.approx(1) for response in responses)
    return [response[3:6, 3:6] for response in responses]


@pytest.mark.parametrize("name, transform", [("gaussian_blur", GaussianBlur3(p=1)), ("motion_blur", MotionBlur3(p=1))])
def test_blurs_soften_the_reference_photo_as_the_originals_do(name, transform):
    ratios = [sharpness_ratio(kernel) for kernel in kernels(transform, 200)]
    expected = FIGURES[name]["laplacian_var_ratio"]
    assert_same_distribution(ratios, expected, name, slack=0.03)
    assert [min(ratios), max(ratios)] == pytest.approx([expected[0], expected[-1]], rel=0.03)


def test_the_gaussian_is_one_two_one_and_the_median_is_three_by_three():
    expected = np.outer([1, 2, 1], [1, 2, 1]) / 16
    np.testing.assert_allclose(kernels(TRANSFORMS["gaussian_blur"], 3), [expected] * 3, atol=1e-9)
    image = noise_image()
    for result in draws(TRANSFORMS["median_blur"], image, 5):
        np.testing.assert_array_equal(result, cv2.medianBlur(image, 3))


def test_motion_blur_averages_along_every_line_of_the_kernel_unlike_albumentations_2():
    seen = {tuple(np.round(kernel, 3).ravel()) for kernel in kernels(TRANSFORMS["motion_blur"], 600)}
    assert {np.count_nonzero(kernel) for kernel in seen} == {2, 3}
    assert any(np.reshape(kernel, (3, 3))[0].sum() > 0.99 for kernel in seen)  # an off-centre line: it also shifts


def test_flips_are_exact():
    image = noise_image()
    np.testing.assert_array_equal(draws(TRANSFORMS["vertical_flip"], image, 1)[0], image[::-1])
    np.testing.assert_array_equal(draws(TRANSFORMS["horizontal_flip"], image, 1)[0], image[:, ::-1])


def test_shift_scale_and_rotation_have_the_originals_ranges():
    """Read off a picture of coordinates: its value and slope in the middle are the inverse of the map applied."""
    height, width = 480, 768
    y, x = np.mgrid[:height, :width].astype(np.float32)
    coordinates = np.dstack([x / width, y / width, np.zeros_like(x)])
    middle_y, middle_x, step = height // 2, width // 2, 8
    found, anisotropy = [], []
    for image in draws(geometry, coordinates, 400):
        here = image[middle_y, middle_x, :2] * width
        slope = (image[middle_y, middle_x + step, :2] - image[middle_y, middle_x - step, :2]) * width / (2 * step)
        down = (image[middle_y + step, middle_x, :2] - image[middle_y - step, middle_x, :2]) * width / (2 * step)
        inverse = np.stack([slope, down], axis=1)
        determinant = np.linalg.det(inverse)
        if abs(determinant) < 0.5 or determinant < 0:  # a reflected border runs through the middle
            continue
        forward = np.linalg.inv(inverse)
        shift = -forward @ (here - [middle_x, middle_y])
        angle = np.degrees(np.arctan2(forward[1, 0], forward[0, 0]))
        anisotropy.append(np.linalg.norm(forward[:, 0]) / np.linalg.norm(forward[:, 1]))
        found.append([np.sqrt(np.linalg.det(forward)), angle, shift[0] / width, shift[1] / height])
    scale, rotation, shift_x, shift_y = np.array(found).T
    assert len(found) > 300
    for ours, name in [(scale, "scale"), (rotation, "rotation_deg"), (shift_x, "centre_x"), (shift_y, "centre_y")]:
        assert_same_distribution(ours, FIGURES["affine"][name], name)
    assert np.max(np.abs(np.array(anisotropy) - 1)) < 0.02  # one scale for both axes


def test_the_border_is_reflected():
    image = noise_image()
    assert min(result.min() for result in draws(geometry, image, 50)) >= image.min() - 1


def test_brightness_or_contrast_and_a_blur_are_each_applied_half_of_the_time():
    image = noise_image()
    for group in (brightness_or_contrast, blur):
        group.set_random_state(np.random.default_rng(1), random.Random(1))
        changed = np.mean([not np.array_equal(group(image=image)["image"], image) for _ in range(600)])
        assert changed == pytest.approx(FIGURES["one_of_brightness_contrast_applied"], abs=0.06)
    assert vertical_flip.p == horizontal_flip.p == 0.5 and geometry.p == 1


def test_normalisation_is_the_originals():
    """Linear, so that a channel's mean is enough: the reference photo's, recovered from the figure's own mean."""
    mean_colour = np.array([108.61, 147.09, 103.61])  # of the reference photo, 0…255
    images = torch.from_numpy(mean_colour.round().astype(np.uint8)).expand(2, 4, 6, 3)
    normalised = LeafNet().normalise(images)
    assert normalised.shape == (2, 3, 4, 6) and normalised.dtype == torch.float32
    step = 1 / 255 / np.array([0.229, 0.224, 0.225])  # one grey level
    np.testing.assert_array_less(np.abs(normalised[0, :, 0, 0].numpy() - FIGURES["normalize"]["mean"]), 0.5 * step)


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
