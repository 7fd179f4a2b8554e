"""Backbones of timm: the same logits, their own normalisation and weights, the whole way through, and what is refused."""

import re
import shutil
import sys

import cv2
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import QUICK, REPO, SMALL, refusal, run_script, shared_folder
from safetensors.torch import load_file, save_file
from test_resume import outcome, train_and_die

from analysis.heat_maps import heat_maps
from dataset import load_photo
from harness import backbones
from harness.backbones import compute_maps, find_weights, load_backbone_weights, sketch
from models import IMAGENET_MEAN, IMAGENET_STD, LeafNet, load_network
from utils import CLASSES

# Small, of a mean that is not ImageNet's, with batch norm that carries its activation, and a convolution after the pooling.
SMALL_NET = "timm/tf_mobilenetv3_small_minimal_100"
TINY = "timm/test_resnet"
OPTIONS = ["--max_epochs", 2, "--folds", 0, 1, "--image_size", 64, 96, "--backbone", SMALL_NET]


def draw(network, seed=0):
    """Fill a network with numbers that leave nothing at its start value, the running statistics neither; returns it."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            continue
        if value.ndim > 1:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            value.copy_(1 + 0.1 * noise.abs())
        else:
            value.copy_(0.05 * noise + (1 if name.endswith("weight") else 0))
    return network


@pytest.fixture
def photos():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 96, 160, 3), dtype=np.uint8))


# ---------------------------------------------------------------------------------------------- the network


def test_timms_legacy_network_gives_the_logits_of_ours(photos):
    ours, theirs = draw(LeafNet()).eval(), LeafNet("timm/legacy_seresnext50_32x4d").eval()
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    with torch.no_grad():
        expected, logits = ours(photos), theirs(photos)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # of these photos, not of the bias alone
    assert logits.dtype == torch.float32 and (logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "backbone, mean, std",
    [
        (SMALL_NET, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("timm/test_efficientnet", IMAGENET_MEAN, IMAGENET_STD),
        ("resnet18", IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_photos_are_normalised_as_the_pretrained_weights_expect_it(backbone, mean, std, photos):
    expected = ((photos / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    torch.testing.assert_close(LeafNet(backbone).normalise(photos), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["efficientnet", "convnext"])
def test_every_parameter_is_trained(family, photos):
    """Processes that train together would wait for the gradient of one that is not used."""
    network = LeafNet(f"timm/test_{family}").train()
    network(photos).square().sum().backward()
    untrained = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert untrained == []


def test_the_convolution_after_the_pooling_is_left_out():
    assert timm.create_model(SMALL_NET.removeprefix("timm/")).conv_head.weight.shape == (1024, 576, 1, 1)
    network = LeafNet(SMALL_NET)
    assert network.fc.in_features == 576
    assert not [name for name in network.state_dict() if "conv_head" in name or "classifier" in name]


def test_a_seed_draws_the_same_network_whether_or_not_it_was_made_before():
    drawn = []
    for forget in (True, False):
        if forget:
            backbones.sketch.cache_clear()
        torch.manual_seed(3)
        drawn.append(LeafNet(SMALL_NET).state_dict())
    for name, value in drawn[0].items():
        torch.testing.assert_close(value, drawn[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("backbone", [SMALL_NET, "timm/test_efficientnet", "timm/legacy_seresnet18"])
def test_a_network_loaded_for_prediction_gives_the_same_logits(backbone, photos, tmp_path):
    network = draw(LeafNet(backbone)).eval()
    torch.save({"state_dict": {f"network.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "one.ckpt")
    with torch.no_grad():
        expected = network(photos)
        torch.testing.assert_close(load_network(tmp_path / "one.ckpt", backbone)(photos), expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-4


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "backbone, words",
    [
        ("test_vit", "its features are \\(101, 64\\) per photo"),  # tokens
        ("swin_tiny_patch4_window7_224", "its features are \\(7, 7, 768\\) per photo"),  # channels last
        ("mixer_s32_224", "its features are \\(49, 512\\) per photo"),
        ("efficientvim_m1", "our head, which pools one map per channel"),  # a list
        ("resnet5", "has none such \\(timm.list_models"),
        ("resnet18.a1_in1", "has none such"),
        ("hf-hub:timm/resnet18.a1_in1k", "has none such"),
        ("", "has none such"),
    ],
)
def test_what_has_no_maps_or_does_not_exist_is_refused_in_one_line(backbone, words):
    text = refusal(LeafNet, f"timm/{backbone}")
    assert f"--backbone timm/{backbone}" in text and re.search(words, text), text


def test_photos_of_a_size_that_a_network_does_not_take_are_refused_with_its_own():
    for backbone, height, width in (("timm/test_maxvit", 160, 160), ("timm/test_coatnet", 160, 160)):
        sketch(backbone, (height, width))
        text = refusal(sketch, backbone, (480, 768))
        assert "does not fit photos of 480x768" in text and text.endswith(
            f"it was made for --image_size {height} {width}"
        )
    sketch(TINY, (480, 768))
    assert "it was made for --image_size 299 299" in refusal(sketch, "inceptionv3", (32, 64))


def test_a_network_without_maps_is_refused_before_anything_is_written(sample, tmp_path):
    options = ["--data_dir", sample, *SMALL, "--weights", "imagenet", "--backbone", "timm/test_vit"]
    done = run_script("train.py", *options, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: --backbone timm/test_vit does not fit photos of 32x64, or our head"
    )
    assert not list(tmp_path.iterdir())


def test_without_timm_one_line_says_what_to_install_and_pretrainedmodels_goes_on(sample, tmp_path):
    """In an environment where timm cannot be imported."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "timm.py").write_text("raise ImportError('No module named timm')")
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds", 0]
    environment = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "broken")}
    done = run_script(*train, "--backbone", TINY, check=False, **environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"pip install timm=={backbones.TIMM_TESTED}")
    assert f"timm=={backbones.TIMM_TESTED} " in (REPO / "requirements-dev.txt").read_text()

    (tmp_path / "broken" / "timm.py").write_text("raise SystemExit('timm was imported')")
    run_script(*train, **environment)
    run_script("generate_soft_labels.py", "--folds", 0, "--tta_draws", 1, **environment)


# ---------------------------------------------------------------------------------------------- weights


def write_weights(path, backbone, n_classes, seed=1):
    """Write a drawn network of timm with its classifier as a file: the network."""
    network = draw(timm.create_model(backbone.removeprefix("timm/"), num_classes=n_classes), seed)
    state = network.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return network


@pytest.mark.parametrize("suffix, n_classes", [(".safetensors", 1000), (".safetensors", 0), (".pth", 7)])
@pytest.mark.parametrize("backbone", [SMALL_NET, "timm/test_convnext", TINY])
def test_a_file_of_any_classifier_fills_the_backbone_and_leaves_the_head(backbone, suffix, n_classes, tmp_path):
    path = tmp_path / f"given{suffix}"
    theirs = write_weights(path, backbone, n_classes).eval()
    network = LeafNet(backbone).eval()
    head = network.fc.weight.clone()
    load_backbone_weights(network.backbone, find_weights(str(path), backbone))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs.forward_features(images)
        torch.testing.assert_close(compute_maps(network.backbone, images), expected, rtol=0, atol=0)
    torch.testing.assert_close(network.fc.weight, head, rtol=0, atol=0)


def test_the_names_of_layers_that_timm_knows_from_elsewhere_are_understood(tmp_path):
    """torchvision's file of this network calls norm1 of a layer norm.1, and timm's loader knows that."""
    theirs = draw(timm.create_model("densenet121")).state_dict()
    state = {re.sub(r"(layer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value for name, value in theirs.items()}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    save_file(state, tmp_path / "torchvision.safetensors")
    network = LeafNet("timm/densenet121")
    load_backbone_weights(network.backbone, tmp_path / "torchvision.safetensors")
    for name, value in network.backbone.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)


def test_a_safetensors_file_fills_a_backbone_of_pretrainedmodels_too(tmp_path):
    theirs = draw(LeafNet("resnet18")).backbone.state_dict()
    save_file(theirs | {"last_linear.weight": torch.zeros(1000, 512)}, tmp_path / "given.safetensors")
    network = LeafNet("resnet18")
    load_backbone_weights(network.backbone, tmp_path / "given.safetensors")
    for name, value in network.backbone.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)


def test_a_file_that_holds_something_else_is_refused(tmp_path, monkeypatch):
    network, path = LeafNet(TINY), tmp_path / "given.safetensors"
    before = {name: value.clone() for name, value in network.state_dict().items()}
    whole = write_weights(path, TINY, 1000).state_dict()
    another = write_weights(tmp_path / "another.safetensors", "timm/test_efficientnet", 1000)
    contents = {
        "another network": another.state_dict(),
        "a part is missing": dict(list(whole.items())[1:]),
        "there is more": whole | {"layer5.weight": torch.zeros(3)},
        "empty": {},
    }
    for content in contents.values():
        save_file(content, path)
        assert "given.safetensors does not hold weights of this backbone (" in refusal(
            load_backbone_weights, network.backbone, path
        )
    torch.save([1, 2], tmp_path / "list.pth")
    assert "does not hold weights of this backbone" in refusal(
        load_backbone_weights, network.backbone, tmp_path / "list.pth"
    )
    path.write_bytes(b"noise" * 100)
    assert "does not hold weights of this backbone" in refusal(load_backbone_weights, network.backbone, path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "import of safetensors.torch halted" in refusal(load_backbone_weights, network.backbone, path)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hugging Face hub without a network: its empty cache, a folder; and the list of what was asked of it."""
    asked = []

    def download(repo_id, filename, **_):
        asked.append((repo_id, filename))
        raise huggingface_hub.errors.LocalEntryNotFoundError("An error happened.\nPlease check your connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub", asked


def test_pretrained_weights_come_from_the_hub(hub, monkeypatch, tmp_path):
    path = tmp_path / "model.safetensors"
    theirs = write_weights(path, TINY, 1000).eval()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *place: hub[1].append(place) or str(path))
    assert find_weights("imagenet", TINY) == path
    assert find_weights("imagenet", "timm/resnet18.fb_swsl_ig1b_ft_in1k") == path
    files = [("timm/test_resnet.r160_in1k", "model.safetensors")]
    files += [("timm/resnet18.fb_swsl_ig1b_ft_in1k", "model.safetensors")]
    assert hub[1] == files
    network = LeafNet(TINY).eval()
    load_backbone_weights(network.backbone, path)
    with torch.no_grad():
        images = torch.rand(1, 3, 64, 96)
        torch.testing.assert_close(compute_maps(network.backbone, images), theirs.forward_features(images))


def test_what_the_hubs_cache_holds_is_taken_from_there(hub):
    cache, asked = hub
    folder = cache / "models--timm--test_resnet.r160_in1k"
    for name, content in (("refs/main", "abc"), ("snapshots/abc/model.safetensors", "weights")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(content)
    assert find_weights("imagenet", TINY) == folder / "snapshots/abc/model.safetensors"
    assert asked == []


def test_without_a_network_it_is_said_which_file_to_fetch(hub):
    text = refusal(find_weights, "imagenet", TINY)
    assert "https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors" in text
    assert "Please check your connection" in text and "--weights FILE" in text and "--weights none" in text
    assert hub[1] == [("timm/test_resnet.r160_in1k", "model.safetensors")]


def test_a_network_without_pretrained_weights_says_so_and_others_have_an_address(hub):
    text = refusal(find_weights, "imagenet", "timm/nfnet_f0")
    assert "has no ImageNet weights; name a file with --weights FILE; --weights none trains" in text
    assert find_weights("none", "timm/nfnet_f0") is None and hub[1] == []
    name = "timm/legacy_seresnext50_32x4d"
    url = backbones.own_config(backbones.sketch(name)[0], name)["url"]
    assert url.endswith("/v0.1-weights/legacy_se_resnext50_32x4d-f3651bad.pth")  # the mirror of ours


# ---------------------------------------------------------------------------------------------- the whole way


@pytest.fixture(scope="session")
def trained(sample, tmp_path_factory):
    """A folder with two folds of a small network of timm, two epochs from a .safetensors file; and its options."""

    def fill(folder):
        write_weights(folder / "start.safetensors", SMALL_NET, 1000)
        train_and_die("never", sample, folder, [*OPTIONS, "--weights", folder / "start.safetensors"])

    folder = shared_folder(tmp_path_factory, "of_timm", fill)
    return folder, [*OPTIONS, "--weights", folder / "start.safetensors"]


def test_step_2_predicts_what_the_training_saw(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    record = yaml.safe_load((folder / "logs" / "hparams.yaml").read_text())
    assert record["options"]["backbone"] == SMALL_NET
    run_script("generate_soft_labels.py", "--folds", 0, 1, "--tta_draws", 1, "--num_workers", 0, cwd=folder)
    soft = pd.read_csv(folder / "soft_labels-folds=0,1.csv").set_index("image_id")
    seen = pd.read_csv(folder / "logs" / "out_of_fold.csv").set_index("image_id").loc[soft.index]
    np.testing.assert_allclose(soft[list(CLASSES)], seen[list(CLASSES)], atol=1e-5)
    assert soft[list(CLASSES)].std().min() > 1e-4  # the photos are told apart at all
    assert len(pd.read_csv(folder / "submission-folds=0,1.csv")) == 12
    checkpoints = {path.name.split("-val")[0]: path for path in (folder / "logs").glob("*.ckpt")}
    assert checkpoints.keys() == {f"fold={fold}-epoch={epoch}" for fold in (0, 1) for epoch in (0, 1)}
    after = torch.load(checkpoints["fold=1-epoch=0"], weights_only=True)["state_dict"][
        "network.backbone.conv_stem.weight"
    ]
    before = load_file(folder / "start.safetensors")["conv_stem.weight"]
    assert before.std() > 0.2  # of He's draw, which Adam has moved by less than 0.001 a step
    torch.testing.assert_close(after, before, atol=0.02, rtol=0)


def test_an_interrupted_training_ends_with_the_same_bytes(trained, sample, tmp_path):
    whole, options = trained
    train_and_die("epoch:1", sample, tmp_path, options)
    assert "fold 0: going on after epoch 0" in train_and_die("never", sample, tmp_path, options)
    assert outcome(tmp_path) == outcome(whole)


def test_heat_maps_are_those_of_the_networks_own_maps(trained, sample):
    """Grad-CAM with the head's batch norm before the pooling, computed once more from the network's parts."""
    checkpoint = next((trained[0] / "logs").glob("fold=0-epoch=1*.ckpt"))
    network = load_network(checkpoint, SMALL_NET)
    names = pd.read_csv(sample / "test.csv")["image_id"][:4]
    images = np.stack([load_photo(sample / "images" / f"{name}.jpg", (64, 96)) for name in names])
    found = heat_maps(network, images, [0, 1, 2, 3])
    with torch.no_grad():
        features = compute_maps(network.backbone, network.normalise(torch.from_numpy(images)))
    assert features.shape == (4, 576, 2, 3)
    early = (features - network.bn.running_mean[:, None, None]).detach().requires_grad_()
    scale = network.bn.weight / (network.bn.running_var + network.bn.eps).sqrt()
    logits = network.fc(F.normalize(early.mean((2, 3)) * scale, dim=1))
    logits[range(4), range(4)].sum().backward()
    cells = (early.grad.mean((2, 3), keepdim=True) * early).sum(1).relu().detach().numpy()
    assert found.shape == (4, 64, 96) and np.ptp(cells, axis=(1, 2)).min() > 0
    for heat, cell in zip(found, cells, strict=True):
        resized = cv2.resize((cell - cell.min()) / np.ptp(cell), (96, 64))
        np.testing.assert_allclose(heat, (resized - resized.min()) / np.ptp(resized), atol=1e-4)
