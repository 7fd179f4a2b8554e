"""What each diff in experiments/ changes, asserted of the recipe in the folder that PYTHONPATH names.

Run by test_experiments.py, once with the diff and once without:  python effects.py NAME
It ends with an AssertionError where the recipe is as it stands. The working directory is for its files.
"""

import itertools
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import blend
import dataset
import inference
import train
from harness.console import parse_args
from models import SCHEDULES, LeafModule, LeafNet
from utils import CLASSES, decide, make_training_parser, split_folds

ALONE = SimpleNamespace(global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu")))


def read_data(labels, *options, test=0):
    """(args, TrainingData) as train.py reads them, but for the photos. labels: int (n,); test: number of test photos."""
    folder = Path(tempfile.mkdtemp(dir="."))
    write(folder / "train.csv", names("Train", len(labels)), np.eye(4, dtype=int)[labels])
    write(folder / "sample_submission.csv", names("Test", test), np.full((test, 4), 0.25))
    pd.DataFrame({"image_id": names("Test", test)}).to_csv(folder / "test.csv", index=False)

    def no_photos(args, name, image_ids):
        return np.zeros((len(image_ids), 2, 3, 3), np.uint8) + (name == "test")

    dataset.cached_photos = train.cached_photos = no_photos
    args = parse_args(make_training_parser(""), ["--data_dir", str(folder), "--num_workers", "0", *options])
    return args, train.read_training_data(args, SimpleNamespace(check=lambda folds, labels: None, inputs={}))


def names(name, n):
    return [f"{name}_{i}" for i in range(n)]


def write(path, image_ids, values):
    pd.DataFrame(values, pd.Index(image_ids, name="image_id"), list(CLASSES)).to_csv(path)


def classes_of_the_competition():
    return np.random.default_rng(0).permutation(np.repeat(range(4), (516, 91, 622, 592)))


def distributions(n, seed):
    return np.random.default_rng(seed).dirichlet(np.ones(4), n)


class Seen(torch.nn.Module):
    """A network that keeps what it was given and answers with logits that depend on its own weights alone."""

    probabilities = LeafNet.probabilities

    def __init__(self, n):
        super().__init__()
        self.answer = torch.nn.Parameter(torch.from_numpy(np.random.default_rng(n).normal(size=(n, 4))).float())

    def forward(self, images):
        self.images = images
        return self.answer


def make_module(n):
    """A LeafModule of `Seen`, a batch of n photos with hard labels, and a list that its losses will be added to."""
    module = LeafModule(Seen(n), "cosine", 1e-3, 0)
    module.log = lambda *_, **__: None
    module.optimizers = lambda: torch.optim.SGD([torch.zeros(1)], lr=0)
    losses, loss = [], module.loss

    def watch(logits, labels, **options):
        losses.append((labels, loss(logits, labels, **options)))
        return losses[-1][1]

    module.loss = watch
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (n, 4, 6, 3), dtype=np.uint8))
    return module, {"image": images, "label": torch.eye(4)[torch.arange(n) % 4], "row": torch.arange(n)}, losses


def close(one, other):
    assert torch.allclose(one, other, atol=1e-6), (one, other)


def validation_is_as_it_was(module, batch, losses):
    """The validation loss is the plain one on the labels as they are."""
    module.validation_step(batch, 0)
    close(losses[-1][1], F.cross_entropy(module.network.answer, batch["label"], reduction="none"))


def soft_labels_by_row():
    labels = classes_of_the_competition()
    number = np.arange(1821) / 2000  # stands for the soft label of a row
    write("soft_labels.csv", names("Train", 1821), np.stack([number, 1 - number, *[0 * number] * 2], 1))
    args, data = read_data(labels, "--soft_labels_filename", "soft_labels.csv", "--soft_share", "0.5")
    own = total = 0
    for fold in range(5):
        training, validation = train.make_loaders(args, fold, data, ALONE)
        rows = np.flatnonzero(data.folds != fold)
        mixed = training.dataset.labels[rows]
        soft = np.rint((2 * mixed - np.eye(4)[labels[rows]])[:, 0] * 2000).astype(int)
        assert soft.tolist() == list(range(len(rows)))
        own, total = own + (soft == rows).sum(), total + len(rows)
        assert (validation.dataset.labels == np.eye(4)[labels]).all()
    assert (own, total) == (11, 7284)  # as it was measured of the original
    hard_args, hard = read_data(labels)  # step 1
    assert (train.make_loaders(hard_args, 0, hard, ALONE)[0].dataset.labels == np.eye(4)[labels]).all()


def stratified_folds():
    labels = classes_of_the_competition()
    counts = [np.bincount(labels[read_data(labels)[1].folds == fold], minlength=4) for fold in range(5)]
    assert (np.ptp(counts, axis=0) <= 1).all() and np.sum(counts, axis=0).tolist() == [516, 91, 622, 592]
    assert (read_data(labels)[1].folds != read_data(labels, "--fold_seed", "1")[1].folds).any()


def grouped_folds():
    labels, ids = np.arange(200) % 4, np.array(names("Train", 200))
    groups = [*np.arange(60).reshape(20, 3), np.arange(60, 67)]  # three that are all near, and a chain of seven
    near = {image_id: [] for image_id in ids}
    pairs = [pair for group in groups[:20] for pair in itertools.combinations(ids[group], 2)]
    for one, other in [*pairs, *itertools.pairwise(ids[groups[20]])]:
        near[one].append(other)
        near[other].append(one)
    table = pd.DataFrame({"image_id": ids, "near_duplicates": map("/".join, near.values())})
    table.to_csv("error_analysis.csv", index=False)
    folds = read_data(labels)[1].folds
    assert all(len(set(folds[group])) == 1 for group in groups)
    assert np.ptp(np.bincount(folds, minlength=5)) <= 15
    table.assign(near_duplicates="").to_csv("error_analysis.csv", index=False)
    assert read_data(labels)[1].folds.tolist() == split_folds(200, 2020).tolist()
    table.iloc[1:].to_csv("error_analysis.csv", index=False)
    try:
        read_data(labels)
    except KeyError:
        return
    raise AssertionError("a photo that error_analysis.csv does not know is grouped with nothing")


def pseudo_labels():
    pseudo = distributions(30, 1)
    write("submission.csv", names("Test", 30)[::-1], pseudo[::-1])  # joined by image_id
    args, data = read_data(np.arange(40) % 4, "--train_batch_size", "2", test=30)
    assert data.folds.tolist() == [*split_folds(40, 2020), *[-1] * 30]
    for fold in range(5):
        training, validation = train.make_loaders(args, fold, data, ALONE)
        trained = {row for _, _, row in training.sampler}
        assert trained == {*np.flatnonzero(data.folds[:40] != fold), *range(40, 70)}
        assert {row for _, _, row in validation.sampler} == {*np.flatnonzero(data.folds[:40] == fold)}
        assert (data.image_ids.iloc[sorted(trained)[-30:]] == names("Test", 30)).all()
        np.testing.assert_allclose(training.dataset.labels[40:], pseudo, atol=1e-6)
        assert {int(training.dataset.images[row].max()) for row in range(40, 70)} == {1}


def label_smoothing():
    module, batch, losses = make_module(8)
    module.training_step(batch, 0)
    close(losses[-1][1], F.cross_entropy(module.network.answer, batch["label"], label_smoothing=0.1))
    validation_is_as_it_was(module, batch, losses)


def rare_class_weight():
    module, batch, losses = make_module(8)
    module.training_step(batch, 0)
    each = F.cross_entropy(module.network.answer, batch["label"], reduction="none")
    close(
        losses[-1][1], (each * torch.where(batch["label"][:, CLASSES.index("multiple_diseases")] == 1, 3.0, 1.0)).mean()
    )
    validation_is_as_it_was(module, batch, losses)


def plant_pathology_2021():
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    module, _, _ = make_module(2)
    logits = module.network.answer
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
    close(module.loss(logits, labels), each.mean())
    close(module.loss(logits, labels, reduction="none"), each)
    close(module.network.probabilities(logits), 1 / (1 + torch.exp(-logits)))
    assert decide(np.array([[0.7, 0.2, 0.5], [0.1, 0.3, 0.2]])).tolist() == [[True, False, True], [False, True, False]]


def mixup():
    (module, batch, losses), shares = make_module(8), []
    for seed in (0, 1, 1):
        torch.manual_seed(seed)
        module.training_step(batch, 0)
        labels = losses[-1][0]
        share = float(labels[0, 0])
        close(labels, share * batch["label"] + (1 - share) * batch["label"].roll(1, 0))
        close(module.network.images / 255, (share * batch["image"] + (1 - share) * batch["image"].roll(1, 0)) / 255)
        shares.append(share)
    assert shares[0] != shares[1] == shares[2] and 0 < min(shares) < 1
    validation_is_as_it_was(module, batch, losses)
    assert torch.equal(module.network.images, batch["image"])


def no_restarts():
    assert "one_cosine" in SCHEDULES
    for n in (1, 5, 70):
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
        schedule, rates = SCHEDULES["one_cosine"](optimizer, 1e-3, n), []
        for _ in range(n):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        expected = 1e-5 + (1e-3 - 1e-5) / 2 * (1 + np.cos(np.pi * np.arange(n) / n))
        np.testing.assert_allclose(rates, expected, atol=1e-9)
        assert (np.diff(rates) < 0).all()


def gem_pooling():
    torch.manual_seed(0)
    network, kept = LeafNet("resnet18"), []
    network.maps.register_forward_hook(lambda module, inputs, maps: kept.append(maps))
    logits = network(torch.randint(0, 256, (4, 64, 96, 3), dtype=torch.uint8))
    pooled = kept[0].float().clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
    assert torch.allclose(logits, network.fc(F.normalize(network.bn(pooled), dim=1)), atol=1e-3)
    logits.square().sum().backward()
    assert network.p.grad.abs() > 0 and "p" in network.state_dict()


def weights_average():
    module, batch, losses = make_module(8)
    optimizer, average = torch.optim.SGD(module.network.parameters(), lr=1.0), None

    def closure():
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        return losses[-1][1]

    for step in range(4):
        module.optimizer_step(0, step, optimizer, closure)
        now = module.network.answer.detach().clone()
        average = now if average is None else 0.99 * average + 0.01 * now
    assert not torch.allclose(average, now, atol=1e-3)
    module.validation_step(batch, 0)
    close(module.validated[-1][1], average.softmax(1))
    module.last_validation = (np.arange(8), average.softmax(1).numpy())
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    assert list(checkpoint["state_dict"]) == ["network.answer"]  # what LeafNet holds and no more
    close(checkpoint["state_dict"]["network.answer"], average)
    resumed = make_module(8)[0]
    resumed.load_state_dict(module.state_dict())  # as the point from which a fold continues has it
    close(resumed.averaged.module.answer, average)
    close(resumed.network.answer, now)
    assert int(resumed.averaged.n_averaged) == 4


def rank_blend():
    ids, one, two = names("Test", 50), distributions(50, 1), distributions(50, 2)
    write("one.csv", ids, one)
    write("two.csv", ids[::-1], two[::-1])
    blend.main(Namespace(submissions=["one.csv", "two.csv"], output="mix.csv", limit=None))
    mix, ranks = pd.read_csv("mix.csv"), [(of[:, None] >= of).sum(1) / 50 for of in (one, two)]
    values = mix[list(CLASSES)].to_numpy()
    assert mix["image_id"].tolist() == ids
    assert np.allclose(values, (ranks[0] + ranks[1]) / 2), "not the mean of the ranks"
    assert 0 < values.min() and values.max() <= 1


def flip_tta():
    photos, seen = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8), {}

    def look(networks, dataset, keys, *others):
        seen.update({key: dataset[key]["image"].numpy() for key in keys})
        return np.full((len(keys), 4), 0.25, np.float32)

    inference.predict = look
    args = Namespace(seed=2020, tta_draws=8, val_batch_size=8)
    frame = inference.predict_tta(args, {0: None, 3: None}, pd.Series(["Test_0", "Test_1"]), photos)
    assert len(seen) == 2 * 2 * 4 and np.allclose(frame[list(CLASSES)], 0.25)
    for fold, row in itertools.product((0, 3), (0, 1)):
        photo = photos[row]
        for draw, expected in enumerate([photo, photo[::-1], photo[:, ::-1], photo[::-1, ::-1]]):
            assert np.array_equal(seen[fold, draw, row], expected), (fold, draw, row)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
