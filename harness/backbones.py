"""The backbones of pretrainedmodels and timm (timm/NAME, if installed), without classifiers; weights; checkpoints."""

import re
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlparse

import pretrainedmodels
import torch
from pretrainedmodels.models.torchvision_models import update_state_dict as rename_densenet
from torch import nn

from harness.console import InputError, refusing, say
from harness.files import digest

TIMM_TESTED = "1.0.31"
# The file's old home is in pretrainedmodels' settings; its certificate lapsed in 2022 and the host is often down.
MIRROR = "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/"
MIRRORS = {"se_resnext50_32x4d": (f"{MIRROR}legacy_se_resnext50_32x4d-f3651bad.pth",)}
DOWNLOAD_TIMEOUT = 30  # seconds without an answer until the next source is tried
BY_HAND = "; name a file with --weights FILE; --weights none trains from scratch, far less accurately"


def create(name):
    """A network with weights drawn at random, as its library makes it. Raises InputError for a name that is unknown."""
    if name.startswith("timm/"):
        with refusing(f"--backbone {name} needs timm", ImportError, advice=f": pip install timm=={TIMM_TESTED}"):
            import timm
        name = name.removeprefix("timm/")
        if name not in timm.list_models() + timm.list_models(include_tags=True):
            raise InputError(f"--backbone timm/{name}: timm {timm.__version__} has none such (timm.list_models())")
        return timm.create_model(name, num_classes=0, in_chans=3)
    if name not in pretrainedmodels.model_names:
        raise InputError(f"--backbone {name}: pretrainedmodels has {', '.join(sorted(pretrainedmodels.model_names))}")
    network = pretrainedmodels.__dict__[name](num_classes=1000, pretrained=None)
    if own_config(network, name)["input_space"] != "RGB":
        raise InputError(f"--backbone {name} was made for BGR photos, which LeafNet.normalise does not make")
    network.aux_logits = False  # only Inception v3 has it: a second classifier, which we leave out
    return network


def own_config(network, name):
    """What a network's library knows about its pretrained weights: dict with input_size, mean and std."""
    of_timm = getattr(network, "pretrained_cfg", None)
    return of_timm or next(iter(pretrainedmodels.pretrained_settings[name].values()))


def compute_maps(backbone, images):
    """float (n, 3, height, width) → what the last convolutional stage gives, float (n, maps, h, w)."""
    of_timm = hasattr(backbone, "forward_features")
    return backbone.forward_features(images) if of_timm else backbone.features(images)


@cache
def sketch(name, image_size=None):
    """A backbone and its maps of an image of (height, width), or its own size, on the meta device. Raises InputError."""
    with torch.device("meta"), torch.enable_grad():
        network = create(name).eval()
        own_size = own_config(network, name)["input_size"][1:]
        height, width = image_size or own_size
        what = f"--backbone {name} does not fit photos of {height}x{width}, or our head (one map per channel)"
        made_for = f"; it was made for --image_size {own_size[0]} {own_size[1]}"
        with refusing(what, AttributeError, AssertionError, RuntimeError, advice=made_for):
            maps = compute_maps(network, torch.zeros(1, 3, height, width))
            n_features = getattr(network, "num_features", maps.shape[1])  # timm's, whose maps may be (n, h, w, c)
            if maps.ndim != 4 or maps.shape[1] != n_features:
                raise RuntimeError(f"its features are {tuple(maps.shape[1:])} per photo")
    return network, maps


def make_backbone(name):
    """A backbone with weights drawn at random, without what comes after its maps."""
    # what is not used must go: processes that train together wait for the gradient of every parameter
    backbone, (network, maps) = create(name), sketch(name)
    with torch.enable_grad():
        gradients = torch.autograd.grad(maps.sum(), list(network.parameters()), allow_unused=True, retain_graph=True)
    used = {id(part) for part, gradient in zip(network.parameters(), gradients, strict=True) if gradient is not None}
    for part, module in network.named_children():
        own = {id(parameter) for parameter in module.parameters()}
        if own and not own & used:
            setattr(backbone, part, nn.Identity())
    return backbone


def find_weights(weights, backbone):
    """The file that a training starts from: a Path, or None for `weights` "none" (from scratch, only when asked).

    "imagenet": the Hugging Face hub (timm), torch hub's cache or a download. Raises InputError if missing or damaged.
    """
    if weights == "none":
        return None
    if weights != "imagenet":
        if not Path(weights).is_file():
            raise InputError(f"--weights {weights}: no such file (or type imagenet, or none to train from scratch)")
        return check_hash(Path(weights))
    config = own_config(sketch(backbone)[0], backbone)
    if config.get("hf_hub_id"):
        import huggingface_hub  # timm brings it

        place = (config["hf_hub_id"], config.get("hf_hub_filename") or "model.safetensors")
        advice = "; or fetch https://huggingface.co/{}/resolve/main/{} elsewhere".format(*place) + BY_HAND
        with refusing(f"no pretrained weights for {backbone}", Exception, advice=advice):
            cached = huggingface_hub.try_to_load_from_cache(*place)
            return Path(cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(*place))
    if not config.get("url"):
        raise InputError(f"--backbone {backbone} has no ImageNet weights{BY_HAND}")
    folder, failures = Path(torch.hub.get_dir()) / "checkpoints", []
    paths = {folder / Path(urlparse(url).path).name: url for url in (config["url"], *MIRRORS.get(backbone, ()))}
    for path in filter(Path.is_file, paths):
        return check_hash(path)
    folder.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    for path, url in paths.items():
        say(f"download {url}")
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
            return path
        except (OSError, RuntimeError) as error:  # unreachable, or RuntimeError: not the promised hash
            failures.append(f"{url}: {error}")
        finally:
            socket.setdefaulttimeout(None)
    raise InputError(f"no ImageNet weights ({'; '.join(failures)}). Put {path.name} into {folder}{BY_HAND}")


def check_hash(path):
    """The path. Raises InputError if its name carries the start of its SHA-256 (name-0123abcd.pth) and that is another."""
    claimed = re.search(r"-(?!\d{8}\.)([0-9a-f]{8,})\.pth$", path.name)  # eight digits are a date
    if claimed and not digest(path).startswith(claimed.group(1)):
        raise InputError(f"{path} is damaged (its SHA-256 is not that in its name): delete it and try again")
    return path


def load_backbone_weights(backbone, path):
    """Load a state dict file into `backbone`, but for a classifier. Raises InputError if it does not hold this backbone."""
    with refusing(f"{path} does not hold weights of this backbone", Exception):  # reading any file may raise anything
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # timm brings it

            state = load_file(path)
        else:
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
        backbone.load_state_dict(own_weights(backbone, state))


def own_weights(backbone, state):
    """Of a file's state dict, named as the backbone's library does, what the backbone has, as it names it."""
    config = getattr(backbone, "pretrained_cfg", None)
    if config is None:
        classifiers = ("last_linear.", "fc.", "classifier.", "AuxLogits.")
        state = rename_densenet(state)  # its file has names of an older torchvision
        return {name: value for name, value in state.items() if not name.startswith(classifiers)}
    import timm

    if not state:
        raise ValueError("it is empty")  # timm would look for weights elsewhere
    # timm's own loader knows the older names of its layers. It is strict about a whole network only, so it is given
    # one with the classifier that the file has: of so many classes, or none.
    names = config["classifier"] if isinstance(config["classifier"], tuple | list) else [config["classifier"]]
    n_classes = len(state.get(f"{names[0]}.weight", ()))
    file = {"state_dict": state, "num_classes": n_classes, "label_offset": 0}
    given = {"pretrained": True, "pretrained_cfg": config, "pretrained_cfg_overlay": file}
    whole = timm.create_model(config["architecture"], num_classes=n_classes, in_chans=3, **given).state_dict()
    return {name: whole[name] for name in backbone.state_dict()}


def load_checkpoint(path):
    """A checkpoint that train.py wrote, dict. Raises InputError if it is damaged or would run code (weights_only)."""
    with refusing(f"{path} cannot be loaded as a checkpoint", Exception, advice=": train its fold anew with --fresh"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"]
    return checkpoint
