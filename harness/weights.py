"""Files of weights: ImageNet's, found or downloaded, and the checkpoints of a training."""

import re
import socket
from pathlib import Path
from urllib.parse import urlparse

import pretrainedmodels
import torch

from harness.backbones import TIMM, own_weights, timm_config
from harness.console import InputError, say
from harness.files import make_folder, sha256

# The file's old home is in pretrainedmodels' settings; its certificate lapsed in 2022 and the host is often down.
MIRRORS = {
    "se_resnext50_32x4d": (
        "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/legacy_se_resnext50_32x4d-f3651bad.pth",
    )
}
DOWNLOAD_TIMEOUT = 30  # seconds without an answer until the next source is tried


def weight_sources(backbone):
    """URLs of a backbone's ImageNet weights, in the order in which they are tried."""
    if backbone.startswith(TIMM):
        urls = [timm_config(backbone).url or None]
    else:
        urls = [pretrainedmodels.pretrained_settings.get(backbone, {}).get("imagenet", {}).get("url")]
    if urls == [None]:
        raise InputError(
            f"--backbone {backbone} has no ImageNet weights; give a file with --weights FILE, or type --weights none"
        )
    return [*urls, *MIRRORS.get(backbone, ())]


def fetch_from_hub(backbone, config):
    """The file of pretrained weights of a backbone of timm from the Hugging Face hub, or from the hub's cache: a Path.

    config: timm's, with hf_hub_id. Raises InputError if it is in neither.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # timm brings it

    place = (config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
    cached = try_to_load_from_cache(*place)
    if isinstance(cached, str):
        return Path(cached)
    url = "https://huggingface.co/{}/resolve/main/{}".format(*place)
    say(f"download {url}")
    try:
        return Path(hf_hub_download(*place))
    except Exception as error:  # of the hub, of what it asks over the network, or of the disk
        raise InputError(
            f"no pretrained weights for {backbone} ({' '.join(str(error).split())[:300]}). Fetch {url} on another machine "
            "and name it with --weights FILE; --weights none trains from scratch, far less accurately"
        ) from error


def check_hash(path):
    """Raise InputError if the file's name carries the start of its SHA-256 (name-0123abcd.pth) and that is another."""
    claimed = re.search(r"-([0-9a-f]{8,})\.pth$", Path(path).name)
    if claimed and not sha256(path).startswith(claimed.group(1)):
        raise InputError(
            f"{path} is damaged: its SHA-256 does not begin with {claimed.group(1)}; delete it and try again"
        )


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
        check_hash(weights)
        return Path(weights)
    if backbone.startswith(TIMM) and (config := timm_config(backbone)).hf_hub_id:
        return fetch_from_hub(backbone, config)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    urls = weight_sources(backbone)
    paths = [folder / Path(urlparse(url).path).name for url in urls]
    for path in paths:
        if path.is_file():
            check_hash(path)
            return path
    make_folder(folder)
    failures = []
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        for url, path in zip(urls, paths, strict=True):
            say(f"download {url}")
            try:
                torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1], progress=True)
                return path
            except (OSError, RuntimeError) as error:  # unreachable, or RuntimeError: not the promised hash
                failures.append(f"{url}: {error}")
                say(f"  failed: {error}")
    finally:
        socket.setdefaulttimeout(timeout)
    raise InputError(
        f"no ImageNet weights for {backbone} ({'; '.join(failures)}). Put one of {', '.join(p.name for p in paths)} into {folder}, "
        "or name it with --weights FILE; --weights none trains from scratch, far less accurately"
    )


def load_backbone_weights(backbone, path):
    """Load a state dict as the backbone's library names it into `backbone`; its classifier, if any, is left out.

    Raises InputError if the file cannot be read safely or does not hold this backbone.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors") from error
    except Exception as error:
        raise InputError(f"{path} cannot be loaded as weights: {str(error).splitlines()[0]}") from error
    try:
        backbone.load_state_dict(own_weights(backbone, state))
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise InputError(f"{path} does not hold this backbone: {' '.join(str(error).split())[:300]}") from error


def load_checkpoint(path):
    """A checkpoint that train.py wrote, dict. Raises InputError if it is damaged or would run code (weights_only)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"]
    except Exception as error:
        raise InputError(
            f"{path} cannot be loaded as a checkpoint ({str(error).splitlines()[0]}): train its fold anew with --fresh"
        ) from error
    return checkpoint
