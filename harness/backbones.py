"""The backbones: which there are, in pretrainedmodels and in timm, and how one is made without its classifier.

One of timm is called timm/NAME. timm is imported only when one is asked for: everything else works without it.
"""

import difflib
from functools import cache

import pretrainedmodels
import torch
from pretrainedmodels.models.torchvision_models import update_state_dict as rename_densenet
from torch import nn

from harness.console import InputError

TIMM = "timm/"  # what the name of a backbone of timm begins with
TIMM_TESTED = "1.0.31"


def import_timm(name):
    """The package timm. Raises InputError if it is not installed, or has no network called `name` (timm/NAME)."""
    try:
        import timm
    except ImportError as error:
        raise InputError(f"--backbone {name} needs timm ({error}): pip install timm=={TIMM_TESTED}") from error
    known = timm.list_models() + timm.list_models(include_tags=True)
    if name.removeprefix(TIMM) not in known:
        close = difflib.get_close_matches(name.removeprefix(TIMM), known, n=5)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise InputError(f"--backbone {name}: timm {timm.__version__} has no network of this name{hint}")
    return timm


def timm_config(name):
    """What timm knows about the pretrained weights of the backbone timm/NAME or timm/NAME.TAG, an object with fields."""
    return import_timm(name).get_pretrained_cfg(name.removeprefix(TIMM))


def create(name):
    """A network with weights drawn at random, as its library makes it. Raises InputError for a name that is unknown."""
    if name.startswith(TIMM):
        return import_timm(name).create_model(name.removeprefix(TIMM), num_classes=0, in_chans=3)
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
    if name.startswith(TIMM):
        return timm_config(name).input_size[1:]
    return next(iter(pretrainedmodels.pretrained_settings[name].values()))["input_size"][1:]


@cache
def sketch(name):
    """A backbone in evaluation mode on torch's meta device, where only shapes are computed."""
    with torch.device("meta"):
        return create(name).eval()


def sketch_maps(name, image_size):
    """What the sketch of a backbone makes of one image of (height, width)."""
    with torch.device("meta"):
        return compute_maps(sketch(name), torch.zeros(1, 3, *image_size))


@cache
def count_feature_maps(name):
    """How many maps a backbone ends in, found without computing.

    Raises InputError for a name that its library does not have, and for features that our head does not fit.
    """
    network = sketch(name)
    classifier = getattr(network, "last_linear", None)  # pretrainedmodels'
    expected = getattr(classifier, "in_features", None) or getattr(classifier, "in_channels", None)
    if name.startswith(TIMM):
        expected = network.num_features
    try:
        shape = tuple(sketch_maps(name, own_size(name)).shape)
    except (AttributeError, RuntimeError):  # no features(), or one that ends in layers of a fixed size; a list of maps
        shape = ()
    if len(shape) != 4 or shape[1] != expected:
        given = f": they are (n, {', '.join(map(str, shape[1:]))}), not (n, channels, height, width)" if shape else ""
        raise InputError(
            f"--backbone {name}: its features do not fit this head, which pools one map per channel{given}"
        )
    return expected


@cache
def unused_parts(name):
    """The names of the parts of a backbone that its maps do not depend on, such as its classifier."""
    children = dict(sketch(name).named_children())
    if not name.startswith(TIMM):
        return {"last_linear", "avg_pool", "avgpool", "dropout", "AuxLogits"} & children.keys()
    sketch_maps(name, own_size(name)).sum().backward()
    parameters = {part: list(module.parameters()) for part, module in children.items()}
    return {part for part, ours in parameters.items() if ours and all(parameter.grad is None for parameter in ours)}


def make_backbone(name):
    """A backbone with weights drawn at random, without what comes after its maps. Raises InputError as of the count.

    What is not used must go: processes that train together wait for the gradient of every parameter.
    """
    count_feature_maps(name)
    backbone = create(name)
    for part in unused_parts(name):
        setattr(backbone, part, nn.Identity())
    return backbone


def check_backbone(name, image_size):
    """Raise InputError if a backbone does not exist, does not fit the head, or cannot take photos of (height, width)."""
    count_feature_maps(name)
    try:
        sketch_maps(name, image_size)
    except (AssertionError, RuntimeError) as error:
        (height, width), (own_height, own_width) = image_size, own_size(name)
        reason = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
        raise InputError(
            f"--backbone {name} cannot take photos of {height}x{width}{reason}; it was made for "
            f"--image_size {own_height} {own_width}"
        ) from error


def own_normalisation(backbone):
    """Mean and standard deviation, a number a channel for photos from 0 to 1, that a backbone of timm was trained with.

    None for one of pretrainedmodels.
    """
    config = getattr(backbone, "pretrained_cfg", None)
    return config and (config["mean"], config["std"])


def own_weights(backbone, state):
    """The weights of a file that a backbone has, as it names them, without the classifier's: a state dict.

    state: the file's content, named as the backbone's library does. Raises RuntimeError, or what else comes of content
    that is no state dict, if it holds another network.
    """
    if own_normalisation(backbone) is None:
        state = rename_densenet(dict(state))  # its file has names of an older torchvision
        classifiers = ("last_linear.", "fc.", "classifier.", "AuxLogits.")
        return {name: value for name, value in state.items() if not name.startswith(classifiers)}
    import timm

    # timm's own loader knows the older names of its layers. It is strict about a whole network only, so it is given
    # one with the classifier that the file has: of so many classes, or none.
    config, state = backbone.pretrained_cfg, dict(state)
    if not state:
        raise ValueError("it is empty")  # timm would look for weights elsewhere
    names = config["classifier"] if isinstance(config["classifier"], tuple | list) else [config["classifier"]]
    n_classes = len(state.get(f"{names[0]}.weight", ()))
    file = {"state_dict": state, "num_classes": n_classes, "label_offset": 0}
    whole = timm.create_model(
        config["architecture"],
        pretrained=True,
        pretrained_cfg=config,
        pretrained_cfg_overlay=file,
        num_classes=n_classes,
        in_chans=3,
    ).state_dict()
    return {name: whole[name] for name in backbone.state_dict()}
