"""Where a network looked: Grad-CAM maps, laid over the photo. What error_analysis.py and predict.py share."""

import base64

import cv2
import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

SHOWN = 360  # longest side of a photo that is shown, in pixels
HEAT = (230, 0, 160)  # magenta, which neither leaves nor spots have
STRENGTH = 0.6  # its opacity at the hottest place; cold ones leave the photo as it is


class OfNormalised(torch.nn.Module):
    """A network as a function of normalised images, float (n, 3, height, width), which is what Grad-CAM reads sizes off."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, normalised):
        return self.network.logits(normalised)


class CentredGradCAM(GradCAM):
    """Grad-CAM of the activations less their running means.

    The head's batch norm may as well stand before the average pooling: the logits are the same, and it subtracts these
    means there. Without that, L2 normalisation leaves every map with an offset, often below 0 at all places at once.
    """

    def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
        centred = activations - self.model.network.bn.running_mean.cpu().numpy()[:, None, None]
        return super().get_cam_image(input_tensor, target_layer, targets, centred, grads, eigen_smooth)


def heat_maps(network, images, classes):
    """Grad-CAM (arXiv 1610.02391) on the last convolutional stage, float32 (n, height, width), each from 0 to 1.

    network: LeafNet in evaluation mode; images: uint8 (n, height, width, 3); classes: n class numbers, what each map is
    about. 0 is what speaks for the class no more than an average place. Always in float32, on the network's device.
    """
    network.requires_grad_(False)
    # the graph starts at the maps, so that nothing is computed backwards through the backbone
    start = network.maps.register_forward_pre_hook(lambda module, inputs: inputs[0].detach().requires_grad_())
    cam = CentredGradCAM(OfNormalised(network), [network.maps])
    try:
        batch = network.normalise(torch.from_numpy(np.ascontiguousarray(images)).to(cam.device))
        return cam(batch, [ClassifierOutputTarget(int(k)) for k in classes]).astype(np.float32)
    finally:
        cam.activations_and_grads.release()
        start.remove()


def shrink(photo, longest=SHOWN):
    """The photo with its longest side at most `longest` pixels, its shape kept: uint8 (height, width, 3)."""
    scale = min(1, longest / max(photo.shape[:2]))
    size = [max(1, round(side * scale)) for side in photo.shape[1::-1]]
    return cv2.resize(photo, size, interpolation=cv2.INTER_AREA)


def overlay(photo, heat):
    """Lay a heat map over the photo it is about, of any size: uint8 (height, width, 3), RGB.

    heat: float (h, w) from 0 to 1, lying as the network saw the photo, so a portrait photo's map is turned back.
    """
    heat = heat.T if photo.shape[0] > photo.shape[1] else heat
    heat = np.clip(cv2.resize(np.ascontiguousarray(heat), photo.shape[1::-1], interpolation=cv2.INTER_CUBIC), 0, 1)
    opacity = STRENGTH * heat[..., None]
    return (photo * (1 - opacity) + np.array(HEAT) * opacity).astype(np.uint8)


def encode_jpeg(picture, quality=80):
    """uint8 (height, width, 3), RGB, as the bytes of a JPEG file."""
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def data_uri(picture, quality=80):
    """A picture as an address that holds the picture itself, for a page in one file."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(picture, quality)).decode()
