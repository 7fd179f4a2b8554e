"""ImageNet weights: where they come from, in which order, and what is said when they cannot be had."""

import hashlib
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pretrainedmodels
import pytest
import torch

from harness import backbones
from harness.backbones import find_weights, load_backbone_weights
from harness.console import InputError
from models import LeafNet

BACKBONE = "se_resnext50_32x4d"
CONTENT = b"stands for a hundred megabytes of weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()[:8]


class Host(BaseHTTPRequestHandler):
    """Serves /good/…, half of it under /truncated/…, other bytes under /wrong/…, and 404 for all else."""

    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        folder = self.path.split("/")[1]
        if folder not in ("good", "truncated", "wrong"):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        body = {"good": CONTENT, "truncated": CONTENT[: len(CONTENT) // 2], "wrong": CONTENT[::-1]}[folder]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A local HTTP server; returns a function that makes its folders the sources of the weights, in that order."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    Host.requests = []

    def serve(*folders, port=server.server_port):
        urls = [f"http://127.0.0.1:{port}/{folder}/net{i}-{DIGEST}.pth" for i, folder in enumerate(folders)]
        monkeypatch.setattr(backbones, "own_config", lambda network, name: {"url": urls[0]})
        monkeypatch.setattr(backbones, "MIRRORS", {BACKBONE: urls[1:]})
        monkeypatch.setattr(backbones, "sketch", lambda name: (None, None))

    yield serve
    server.shutdown()
    server.server_close()


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "torch" / "hub" / "checkpoints").glob("*"))


def test_the_first_source_is_the_old_home_and_the_second_the_mirror():
    first, (second,) = backbones.own_config(None, BACKBONE)["url"], backbones.MIRRORS[BACKBONE]
    assert first == "http://data.lip6.fr/cadene/pretrainedmodels/se_resnext50_32x4d-a260b3a4.pth"
    assert second.startswith("https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/")
    assert second.endswith("/legacy_se_resnext50_32x4d-f3651bad.pth")


def test_the_first_host_down_the_second_answers(host, tmp_path):
    host("absent", "good")
    path = find_weights("imagenet", BACKBONE)
    assert path.read_bytes() == CONTENT and path.name == f"net1-{DIGEST}.pth"
    assert len(Host.requests) == 2
    assert find_weights("imagenet", BACKBONE) == path  # now from the cache
    assert len(Host.requests) == 2


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
def test_a_first_host_that_refuses_or_hangs_does_not_keep_the_second_from_answering(host, monkeypatch, fault):
    host("good", "good")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if fault == "hangs":
            silent.listen()  # takes the connection and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/net0-{DIGEST}.pth"
        monkeypatch.setattr(backbones, "own_config", lambda network, name: {"url": url})
        monkeypatch.setattr(backbones, "DOWNLOAD_TIMEOUT", 0.5)
        assert find_weights("imagenet", BACKBONE).name == f"net1-{DIGEST}.pth"
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("fault", ["wrong", "truncated"])
def test_a_download_that_is_not_what_its_name_promises_is_thrown_away(host, tmp_path, fault):
    host(fault, "good")
    assert find_weights("imagenet", BACKBONE).read_bytes() == CONTENT
    assert cached(tmp_path) == [f"net1-{DIGEST}.pth"]
    host(fault)
    (tmp_path / "torch" / "hub" / "checkpoints" / f"net1-{DIGEST}.pth").unlink()
    with pytest.raises(InputError, match="hash"):
        find_weights("imagenet", BACKBONE)
    assert cached(tmp_path) == []


def test_nothing_reachable_says_which_file_to_put_where(host, tmp_path):
    host("good", "good", port=9)  # nothing listens there
    with pytest.raises(InputError) as error:
        find_weights("imagenet", BACKBONE)
    for hint in (
        f"net0-{DIGEST}.pth",
        f"net1-{DIGEST}.pth",
        str(tmp_path / "torch"),
        "--weights FILE",
        "--weights none",
    ):
        assert hint in str(error.value)
    assert cached(tmp_path) == []


def test_a_damaged_file_in_the_cache_is_named(host, tmp_path):
    host("good")
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"net0-{DIGEST}.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(InputError, match="is damaged.*delete it"):
        find_weights("imagenet", BACKBONE)
    assert not Host.requests


def test_none_is_from_scratch_and_a_missing_file_is_an_error(host, tmp_path):
    host("good")
    assert find_weights("none", BACKBONE) is None
    with pytest.raises(InputError, match="imagnet: no such file"):
        find_weights("imagnet", BACKBONE)
    assert not Host.requests


def test_a_file_given_by_hand_fills_the_backbone_and_leaves_the_head(tmp_path):
    torch.manual_seed(1)
    original = pretrainedmodels.se_resnext50_32x4d(num_classes=1000, pretrained=None)
    torch.save(original.state_dict(), tmp_path / "given.pth")
    network = LeafNet()
    head = network.fc.weight.clone()
    load_backbone_weights(network.backbone, find_weights(str(tmp_path / "given.pth"), BACKBONE))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.eval().backbone.features(images), original.eval().features(images))
    torch.testing.assert_close(network.fc.weight, head)

    for backbone in ("densenet121", "inceptionv3"):  # other names for the classifier, and older ones for the layers
        theirs = pretrainedmodels.__dict__[backbone](num_classes=1000, pretrained=None)
        classifier = "classifier" if backbone == "densenet121" else "fc"
        state = {name.replace("last_linear", classifier): value for name, value in theirs.state_dict().items()}
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value for name, value in state.items()}
        torch.save(state, tmp_path / "other.pth")
        network = LeafNet(backbone)
        load_backbone_weights(network.backbone, tmp_path / "other.pth")
        for name, value in network.backbone.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=0)

    incomplete = dict(list(original.state_dict().items())[5:])
    torch.save(incomplete, tmp_path / "incomplete.pth")
    with pytest.raises(InputError, match="does not hold weights of this backbone"):
        load_backbone_weights(LeafNet().backbone, tmp_path / "incomplete.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="does not hold weights of this backbone"):
        load_backbone_weights(LeafNet().backbone, tmp_path / "list.pth")
    (tmp_path / "noise.pth").write_bytes(CONTENT)
    with pytest.raises(InputError, match="does not hold weights of this backbone"):
        load_backbone_weights(LeafNet().backbone, tmp_path / "noise.pth")
