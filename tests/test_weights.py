"""ImageNet weights: where they come from, in which order, and what is said when they cannot be had."""

import hashlib
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pretrainedmodels
import pytest
import torch
from conftest import refusal

from harness import backbones
from harness.backbones import find_weights, load_backbone_weights
from models import LeafNet

BACKBONE = "se_resnext50_32x4d"
CONTENT = b"stands for a hundred megabytes of weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()[:8]


class Host(BaseHTTPRequestHandler):
    """Serves /good/…, half of it under /cut/…, and 404 for all else."""

    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        body = {"good": CONTENT, "cut": CONTENT[: len(CONTENT) // 2]}.get(self.path.split("/")[1])
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A local HTTP server; returns a function that makes its folders the sources of the weights, in that order.

    Nothing listens behind "refuses", and what listens behind "hangs" never answers.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(backbones, "DOWNLOAD_TIMEOUT", 1)
    Host.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    with server, socket.create_server(("127.0.0.1", 0)) as hangs, socket.socket() as refuses:
        refuses.bind(("127.0.0.1", 0))
        silent = {"hangs": hangs.getsockname()[1], "refuses": refuses.getsockname()[1]}

        def serve(*folders):
            places = [f"127.0.0.1:{silent.get(folder, server.server_port)}/{folder}" for folder in folders]
            urls = [f"http://{place}/net{i}-{DIGEST}.pth" for i, place in enumerate(places)]
            monkeypatch.setattr(backbones, "own_config", lambda network, name: {"url": urls[0]})
            monkeypatch.setattr(backbones, "MIRRORS", {BACKBONE: urls[1:]})
            monkeypatch.setattr(backbones, "sketch", lambda name: (None, None))

        yield serve
        server.shutdown()


@pytest.fixture
def cache(tmp_path):
    """Where downloads go; not yet there."""
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("fault", ["absent", "cut", "refuses", "hangs"])
def test_a_faulty_source_leaves_nothing_and_the_next_one_is_asked_or_it_is_said_what_to_do(host, cache, fault):
    host(fault)
    said = refusal(find_weights, "imagenet", BACKBONE)
    assert not list(cache.iterdir()) and ("hash" in said or fault != "cut")
    assert all(hint in said for hint in (f"Put net0-{DIGEST}.pth into {cache}", "--weights FILE", "--weights none"))
    host(fault, "good")
    Host.requests = []
    for _ in ("downloaded", "from the cache"):
        path = find_weights("imagenet", BACKBONE)
        assert path.read_bytes() == CONTENT and list(cache.iterdir()) == [path] == [cache / f"net1-{DIGEST}.pth"]
        assert len(Host.requests) == (1 if fault in ("refuses", "hangs") else 2)
    assert socket.getdefaulttimeout() is None


def test_none_is_from_scratch_a_missing_file_is_an_error_and_a_damaged_one_in_the_cache_is_named(host, cache):
    host("good")
    assert find_weights("none", BACKBONE) is None
    assert "imagnet: no such file" in refusal(find_weights, "imagnet", BACKBONE)
    cache.mkdir(parents=True)
    (cache / f"net0-{DIGEST}.pth").write_bytes(CONTENT[:-1])
    assert re.search(rf"net0-{DIGEST}.pth is damaged.*delete it", refusal(find_weights, "imagenet", BACKBONE))
    assert not Host.requests


@pytest.mark.parametrize(
    "backbone, classifier", [(BACKBONE, "last_linear"), ("densenet121", "classifier"), ("inceptionv3", "fc")]
)
def test_a_file_given_by_hand_fills_the_backbone_and_leaves_the_head(backbone, classifier, tmp_path):
    """Without counters, with whatever name its library had for the classifier, and older names of the layers."""
    theirs = pretrainedmodels.__dict__[backbone](num_classes=1000, pretrained=None).state_dict()
    theirs = {name: value for name, value in theirs.items() if not name.endswith("num_batches_tracked")}
    state = {name.replace("last_linear", classifier): value for name, value in theirs.items()}
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value for name, value in state.items()}
    torch.save(state, tmp_path / "given.pth")
    network = LeafNet(backbone)
    head = network.fc.weight.clone()
    load_backbone_weights(network.backbone, find_weights(str(tmp_path / "given.pth"), backbone))
    for name, value in network.backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)
    torch.testing.assert_close(network.fc.weight, head)


def test_a_file_that_does_not_hold_this_backbone_is_refused(tmp_path):
    network = LeafNet("resnet18")
    torch.save(dict(list(network.backbone.state_dict().items())[5:]), tmp_path / "incomplete.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "noise.pth").write_bytes(CONTENT)
    for name in ("incomplete", "list", "noise"):
        said = refusal(load_backbone_weights, network.backbone, tmp_path / f"{name}.pth")
        assert "does not hold weights of this backbone" in said
