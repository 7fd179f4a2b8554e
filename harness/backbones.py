"""The backbones of pretrainedmodels and timm (timm/NAME) without their classifiers; pretrained weights; checkpoints.

timm is imported only when one of its networks is asked for: everything else works without it.
"""

import re
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlparse

import pretrainedmodels
import torch
from pretrainedmodels.models.torchvision_models import update_state_dict as rename_densenet
from torch import nn

from harness.console import InputError, say
from harness.files import sha256

TIMM_TESTED = "1.0.31"
# The file's old home is in pretrainedmodels' settings; its certificate lapsed in 2022 and the host is often down.
MIRROR = "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/"
MIRRORS = {"se_resnext50_32x4d": (f"{MIRROR}legacy_se_resnext50_32x4d-f3651bad.pth",)}
DOWNLOAD_TIMEOUT = 30  # seconds without an answer until the next source is tried
WITHOUT = "name a file with --weights FILE; --weights none trains from scratch, far less accurately"

# ---------------------------------------------------------------------------------------------- networks


def timm_name(name):
    """NAME of a backbone timm/NAME, else None. Raises InputError if timm is not installed or has no such network."""
    if not name.startswith("timm/"):
        return None
    try:
        import timm
    except ImportError as error:
        raise InputError(f"--backbone {name} needs timm ({error}): pip install timm=={TIMM_TESTED}") from error
    if name.removeprefix("timm/") not in timm.list_models() + timm.list_models(include_tags=True):
        raise InputError(f"--backbone {name}: timm {timm.__version__} has no network of this name (timm.list_models())")
    return name.removeprefix("timm/")


def timm_config(name):
    """What timm knows about the pretrained weights of the backbone timm/NAME or timm/NAME.TAG, an object with fields."""
    import timm

    return timm.get_pretrained_cfg(timm_name(name))


def create(name):
    """A network with weights drawn at random, as its library makes it. Raises InputError for a name that is unknown."""
    if timm_name(name):
        import timm

        return timm.create_model(timm_name(name), num_classes=0, in_chans=3)
    if name not in pretrainedmodels.model_names:
        raise InputError(f"--backbone {name}: pretrainedmodels has {', '.join(sorted(pretrainedmodels.model_names))}")
    network = pretrainedmodels.__dict__[name](num_classes=1000, pretrained=None)
    network.aux_logits = False  # only Inception v3 has it: a second classifier, which we leave out
    return network


def compute_maps(backbone, images):
    """float (n, 3, height, width) → what the last convolutional stage gives, float (n, maps, h, w)."""
    of_timm = hasattr(backbone, "forward_features")
    return backbone.forward_features(images) if of_timm else backbone.features(images)


def own_size(name):
    """Height and width of the images that the pretrained weights of a backbone are meant for."""
    if timm_name(name):
        return timm_config(name).input_size[1:]
    return next(iter(pretrainedmodels.pretrained_settings[name].values()))["input_size"][1:]


def own_normalisation(backbone):
    """Mean and standard deviation, for photos from 0 to 1, that a backbone of timm was trained with; else None."""
    config = getattr(backbone, "pretrained_cfg", None)
    return config and (config["mean"], config["std"])


@cache
def sketch(name):
    """A backbone in evaluation mode on torch's meta device, where only shapes are computed."""
    with torch.device("meta"):
        return create(name).eval()


@cache
def count_feature_maps(name, image_size=None):
    """How many maps a backbone ends in, for photos of (height, width), by default of those it was made for.

    Raises InputError if it does not exist, cannot take such photos, or has features that our head does not fit.
    """
    network, size = sketch(name), image_size or own_size(name)
    try:
        with torch.device("meta"):
            shape = tuple(compute_maps(network, torch.zeros(1, 3, *size)).shape)
    except (AssertionError, AttributeError, RuntimeError) as error:
        if image_size and count_feature_maps(name):
            reason = f"{' '.join(str(error).split())[:200]}; it was made for --image_size {own_size(name)[0]} {own_size(name)[1]}"
            raise InputError(f"--backbone {name} cannot take photos of {size[0]}x{size[1]} ({reason})") from error
        shape = ()  # no features(), or one that ends in layers of a fixed size; a list of maps
    if len(shape) != 4 or shape[1] != getattr(
        sketch(name), "num_features", shape[1]
    ):  # timm's last are (n, h, w, maps)
        given = f" ({', '.join(map(str, shape[1:]))} per photo)" * bool(shape)
        raise InputError(
            f"--backbone {name}: its features{given} do not fit this head, which pools one map per channel"
        )
    return shape[1]


@cache
def unused_parts(name):
    """The names of the parts of a backbone that its maps do not depend on, such as its classifier."""
    with torch.device("meta"), torch.enable_grad():
        compute_maps(sketch(name), torch.zeros(1, 3, *own_size(name))).sum().backward()
    parts = {part: list(module.parameters()) for part, module in sketch(name).named_children()}
    return {part for part, own in parts.items() if own and all(parameter.grad is None for parameter in own)}


def make_backbone(name):
    """A backbone with weights drawn at random, without what comes after its maps. Raises InputError as of the count.

    What is not used must go: processes that train together wait for the gradient of every parameter.
    """
    count_feature_maps(name)
    backbone = create(name)
    for part in unused_parts(name):
        setattr(backbone, part, nn.Identity())
    return backbone


# ---------------------------------------------------------------------------------------------- weights


def find_weights(weights, backbone):
    """The file that a training starts from: a Path, or None for `weights` "none" (from scratch, only when asked).

    In this order: a file given by hand; the Hugging Face hub, where timm has its weights there; torch hub's cache; the
    sources of `weight_sources`, downloaded into that cache and checked against the hash in their name. Raises
    InputError if there is none.
    """
    if weights == "none":
        return None
    if weights != "imagenet":
        if not Path(weights).is_file():
            raise InputError(f"--weights {weights}: no such file (or type imagenet, or none to train from scratch)")
        return check_hash(Path(weights))
    if timm_name(backbone) and timm_config(backbone).hf_hub_id:
        return fetch_from_hub(backbone)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    paths = {folder / Path(urlparse(url).path).name: url for url in weight_sources(backbone)}
    for path in paths:
        if path.is_file():
            return check_hash(path)
    failures, timeout = [], socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, url in paths.items():
            say(f"download {url}")
            try:
                torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
                return path
            except (OSError, RuntimeError) as error:  # unreachable, or RuntimeError: not the promised hash
                failures.append(f"{url}: {error}")
    finally:
        socket.setdefaulttimeout(timeout)
    names = ", ".join(path.name for path in paths)
    raise InputError(f"no ImageNet weights ({'; '.join(failures)}). Put one of {names} into {folder}, or {WITHOUT}")


def weight_sources(backbone):
    """URLs of a backbone's ImageNet weights, in the order in which they are tried."""
    if timm_name(backbone):
        url = timm_config(backbone).url
    else:
        url = pretrainedmodels.pretrained_settings.get(backbone, {}).get("imagenet", {}).get("url")
    if not url:
        raise InputError(f"--backbone {backbone} has no ImageNet weights; {WITHOUT}")
    return [url, *MIRRORS.get(backbone, ())]


def fetch_from_hub(backbone):
    """The file of pretrained weights of a backbone of timm, a Path, from the Hugging Face hub or the hub's cache."""
    import huggingface_hub  # timm brings it

    place = (timm_config(backbone).hf_hub_id, timm_config(backbone).hf_hub_filename or "model.safetensors")
    try:
        cached = huggingface_hub.try_to_load_from_cache(*place)
        return Path(cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(*place))
    except Exception as error:  # of the hub, of what it asks over the network, or of the disk
        url, reason = "https://huggingface.co/{}/resolve/main/{}".format(*place), " ".join(str(error).split())[:300]
        raise InputError(
            f"no pretrained weights for {backbone} ({reason}). Fetch {url} elsewhere, and {WITHOUT}"
        ) from error


def check_hash(path):
    """The path. Raises InputError if its name carries the start of its SHA-256 (name-0123abcd.pth) and that is another."""
    claimed = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
    if claimed and not sha256(path).startswith(claimed.group(1)):
        raise InputError(
            f"{path} is damaged: its SHA-256 does not begin with {claimed.group(1)}; delete it and try again"
        )
    return path


def load_backbone_weights(backbone, path):
    """Load a state dict as the backbone's library names it into `backbone`; its classifier, if any, is left out.

    Raises InputError if the file cannot be read safely (weights_only) or does not hold this backbone.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # timm brings it

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        backbone.load_state_dict(own_weights(backbone, dict(state)))
    except Exception as error:  # what reading a file of any content raises
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} does not hold weights of this backbone ({type(error).__name__}: {reason})") from error


def own_weights(backbone, state):
    """Of a file's state dict, named as the backbone's library does, what the backbone has, as it names it."""
    if own_normalisation(backbone) is None:
        classifiers = ("last_linear.", "fc.", "classifier.", "AuxLogits.")
        state = rename_densenet(state)  # its file has names of an older torchvision
        return {name: value for name, value in state.items() if not name.startswith(classifiers)}
    import timm

    # timm's own loader knows the older names of its layers. It is strict about a whole network only, so it is given
    # one with the classifier that the file has: of so many classes, or none.
    if not state:
        raise ValueError("it is empty")  # timm would look for weights elsewhere
    config = backbone.pretrained_cfg
    names = config["classifier"] if isinstance(config["classifier"], tuple | list) else [config["classifier"]]
    n_classes = len(state.get(f"{names[0]}.weight", ()))
    file = {"state_dict": state, "num_classes": n_classes, "label_offset": 0}
    given = {"pretrained": True, "pretrained_cfg": config, "pretrained_cfg_overlay": file}
    whole = timm.create_model(config["architecture"], num_classes=n_classes, in_chans=3, **given).state_dict()
    return {name: whole[name] for name in backbone.state_dict()}


def load_checkpoint(path):
    """A checkpoint that train.py wrote, dict. Raises InputError if it is damaged or would run code (weights_only)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"]
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} cannot be loaded as a checkpoint ({reason}): train its fold anew with --fresh"
        ) from error
    return checkpoint
