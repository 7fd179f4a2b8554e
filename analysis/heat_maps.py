"""Where a network looked: class activation maps, laid over the photo. What error_analysis.py and predict.py share."""

import base64

import cv2
import numpy as np
import torch

from dataset import fit_photo
from harness.console import say
from harness.photos import read_photo

SHOWN = 360  # longest side of a photo that is shown, in pixels
HEAT = (230, 0, 160)  # magenta, which neither leaves nor spots have
STRENGTH = 0.6  # its opacity at the hottest place; cold ones leave the photo as it is


def cell_maps(network, images, classes):
    """Class activation maps (arXiv 1512.04150): float32 (n, rows, columns) of the cells of the last convolutional stage.

    network: LeafNet in evaluation mode; images: uint8 (n, height, width, 3); classes: n class numbers, what each map is
    about. Batch norm, pooling and linear layer are all linear: a logit is the mean of what each cell adds to it, divided
    by the L2 norm (one positive number per photo), plus the bias. The value of a cell is what it adds to the logit of the
    class, minus the mean over all classes (softmax ignores that), minus the mean over all cells; negative values become 0.
    """
    found = []
    with torch.inference_mode(), network.maps.register_forward_hook(lambda module, inputs, maps: found.append(maps)):
        network.logits(network.normalise(torch.from_numpy(np.ascontiguousarray(images)).to(network.mean.device)))
        maps = found[0].float()
        cells = network.bn(maps.flatten(2).transpose(1, 2).flatten(0, 1)).unflatten(0, (len(maps), -1))
        weights = (network.fc.weight - network.fc.weight.mean(0))[list(classes)]
        heat = torch.einsum("npf,nf->np", cells, weights)
        return (heat - heat.mean(1, keepdim=True)).relu().unflatten(1, maps.shape[2:]).cpu().numpy()


def heat_maps(network, images, classes):
    """`cell_maps` in the size of the images, each from 0 to 1: float32 (n, height, width)."""
    large = [cv2.resize(cells, images.shape[2:0:-1]) for cells in cell_maps(network, images, classes)]
    return np.stack([(heat - heat.min()) / max(np.ptp(heat), 1e-30) for heat in large])


def count_cells(network, image):
    """The rows and columns of a heat map of an image, uint8 (height, width, 3); a note says if they are too few."""
    rows, columns = cell_maps(network, image[None], [0]).shape[1:]
    if min(rows, columns) == 1:
        say(f"note: heat maps of {rows} x {columns} cells tell next to nothing: train with a larger --image_size")
    return rows, columns


def shrink(photo, longest=SHOWN):
    """The photo with its longest side at most `longest` pixels, its shape kept: uint8 (height, width, 3)."""
    factor = min(1, longest / max(photo.shape[:2]))
    size = [max(1, round(side * factor)) for side in photo.shape[1::-1]]
    return cv2.resize(photo, size, interpolation=cv2.INTER_AREA)


def overlay(photo, heat):
    """Lay a heat map, float (h, w) from 0 to 1, over its photo of any size: uint8 (height, width, 3), RGB."""
    heat = heat.T if photo.shape[0] > photo.shape[1] and heat.shape[0] <= heat.shape[1] else heat  # as fit_photo does
    heat = np.clip(cv2.resize(np.ascontiguousarray(heat), photo.shape[1::-1], interpolation=cv2.INTER_CUBIC), 0, 1)
    opacity = STRENGTH * heat[..., None]
    return (photo * (1 - opacity) + np.array(HEAT) * opacity).astype(np.uint8)


def mark_photo(path, classes, networks, image_size, longest=SHOWN):
    """A photo, then the photo with its heat map for each class number, the mean of the networks: list of uint8 (h, w, 3)."""
    photo = read_photo(path)
    images = np.stack([fit_photo(photo, image_size)] * len(classes))
    heats = np.mean([heat_maps(network, images, classes) for network in networks], axis=0)
    photo = shrink(photo, longest)
    return [photo, *(overlay(photo, heat) for heat in heats)]


def data_uri(picture, quality=80):
    """A picture, uint8 (height, width, 3), RGB, as an address that holds it as JPEG, for a page in one file."""
    jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
