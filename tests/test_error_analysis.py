"""What error_analysis.py finds, on a really trained network: where it looks, which labels are wrong, what the page says."""

import json
import os
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import QUICK, copy_recipe, edit, run_script, shared_folder

from analysis import figures
from analysis.heat_maps import heat_maps, overlay
from dataset import fit_photo, load_photo
from error_analysis import choose_examples, find_near_duplicates, find_suspects, hash_photo, tabulate
from harness import prediction
from harness.photos import decode_photo
from harness.prediction import load_network
from models import LeafNet
from utils import CLASSES, mean_auc

COMMON = ["healthy", "rust", "scab"]
WORST, N_VIEWS = 5, 3
PAIRS = 7  # of near-duplicates, more than are shown


def load_trained(folder):
    checkpoint = pd.read_csv(folder / "logs" / "results.csv")["checkpoint"][0]
    return load_network(folder / "logs" / checkpoint, LeafNet())


def plant_mistakes(data, leaves, folds):
    """Labels as drawn, but for six planted mistakes in fold 0; seven photos of fold 1 become mirror images of others.

    Writes train.csv, wrong.csv (image_id, true_label) and twins.csv (original, twin): six of fold 1 and of the same label
    as the original, the last pair of other folds and other labels. folds: Series by image_id.
    """
    (data / "images").mkdir(parents=True)
    for photo in (leaves / "images").iterdir():
        (data / "images" / photo.name).symlink_to(photo)
    labels = pd.read_csv(leaves / "train.csv").set_index("image_id").idxmax(axis=1)
    drawn = pd.read_csv(leaves / "wrong_labels.csv").set_index("image_id")["true_label"]
    labels[drawn.index] = drawn
    rng = np.random.default_rng(3)
    zero, one = (labels[(folds[labels.index] == fold) & labels.isin(COMMON)] for fold in (0, 1))
    wrong = zero.sample(6, random_state=rng)
    for image_id, label in wrong.items():
        labels[image_id] = rng.choice([name for name in COMMON if name != label])
    alike = [ids for name in COMMON for ids in zip(*[iter(one.index[one == name][1:])] * 2, strict=False)]
    rest = zero.drop(wrong.index)
    pairs = [*alike[: PAIRS - 1], (rest.index[rest == "healthy"][0], one.index[one == "scab"][0])]
    for original, twin in pairs:
        mirrored = cv2.imread(str(data / "images" / f"{original}.jpg"))[:, ::-1]
        (data / "images" / f"{twin}.jpg").unlink()
        cv2.imwrite(str(data / "images" / f"{twin}.jpg"), mirrored, [cv2.IMWRITE_JPEG_QUALITY, 60])
    pd.get_dummies(labels)[list(CLASSES)].astype(int).rename_axis("image_id").to_csv(data / "train.csv")
    wrong.rename("true_label").to_csv(data / "wrong.csv")
    pd.DataFrame(pairs, columns=["original", "twin"]).to_csv(data / "twins.csv", index=False)


@pytest.fixture(scope="session")
def analysed(trained, tmp_path_factory):
    """A folder in which error_analysis.py ran on planted data with two folds, and stdout, what it printed.

    The second fold's network is that of the first: what counts here is only which photo is in which fold.
    """

    def analyse(folder):
        logs = shutil.copytree(trained / "logs", folder / "logs")
        folds = pd.read_csv(logs / "folds.csv").set_index("image_id")["fold"]
        plant_mistakes(folder / "data", trained / "leaves", folds)
        for place in ("fold=0", "fold=0.csv"):
            copy = shutil.copytree if (logs / "metrics" / place).is_dir() else shutil.copy
            copy(logs / "metrics" / place, logs / "metrics" / place.replace("0", "1"))
        path = logs / "metrics" / "fold=1" / "hparams.yaml"
        record = yaml.safe_load(path.read_text())
        checkpoint = record["result"]["checkpoint"]
        record["result"] |= {"fold": 1, "checkpoint": checkpoint.replace("fold=0", "fold=1")}
        path.write_text(yaml.safe_dump(record))
        shutil.copy(logs / checkpoint, logs / record["result"]["checkpoint"])
        options = ["--data_dir", "data", "--folds", 0, 1, "--worst", WORST, "--tta_draws", N_VIEWS, "--num_workers", 0]
        done = run_script("error_analysis.py", *options, cwd=folder, cold=True)
        (folder / "stdout").write_text(done.stdout)

    return shared_folder(tmp_path_factory, "analysed", analyse)


def read_table(folder):
    return pd.read_csv(folder / "error_analysis.csv", keep_default_na=False, dtype={"suspect": str})


def read_page(folder):
    return (folder / "error_analysis.html").read_text(encoding="utf-8")


def section(page, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', page, re.S).group(1)


def page_photos(page):
    return json.loads(re.search(r'<script type="application/json" id="photos">(.*?)</script>', page, re.S).group(1))


# ---------------------------------------------------------------------------------------------- heat maps


def test_heat_maps_of_rust_lie_on_the_spots_that_were_drawn(trained):
    leaves = trained / "leaves"
    labels, lesions = pd.read_csv(leaves / "test_labels.csv"), pd.read_csv(leaves / "lesions.csv")
    network, gains = load_trained(trained), []
    for image_id in labels["image_id"][labels["rust"] == 1]:  # test photos: no network has seen them
        photo = decode_photo(leaves / "images" / f"{image_id}.jpg")
        # the photo's own size, twice that of training: a map of 4 x 6 places, where 2 x 3 could hardly be wrong
        heat = heat_maps(network, fit_photo(photo, (128, 192))[None], [CLASSES.index("rust")])[0]
        heat, mask = heat.T if photo.shape[0] > photo.shape[1] else heat, np.zeros(photo.shape[:2], np.uint8)
        for spot in lesions[lesions["image_id"] == image_id].itertuples():
            cv2.circle(mask, (round(spot.x), round(spot.y)), round(spot.radius), 1, -1)
        gains.append(heat[mask > 0].sum() / heat.sum() / mask.mean())
    assert len(gains) > 20
    assert np.mean(gains) > 1.4  # 1 is chance
    assert np.mean(np.array(gains) > 1) > 0.75


class Redness(torch.nn.Module):
    """A backbone that sees no more than how red, and how blue, each place of 32 x 32 pixels is."""

    def features(self, images):
        return F.avg_pool2d(images[:, [0, 2]], 32)


@pytest.mark.parametrize("flips", ((), (0,), (1,), (0, 1)))
def test_a_heat_map_lies_where_the_network_looked_and_is_not_mirrored(flips):
    """What a training of minutes leaves is blurred; this network knows rust by its colour alone."""
    network = LeafNet("resnet18")
    network.backbone, network.bn, network.fc = Redness(), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, len(CLASSES))
    network.eval()
    with torch.no_grad():
        network.fc.weight.copy_(torch.tensor([[0.0, 1], [0, 0], [1, 0], [0, 0]]))
    image, spot = np.full((128, 192, 3), 128, np.uint8), np.zeros((128, 192), bool)
    spot[32:64, 128:160] = True
    image[spot] = (200, 100, 40)
    image, spot = np.flip(image, flips), np.flip(spot, flips)
    heat = heat_maps(network, image[None], [CLASSES.index("rust")])[0]
    assert spot.flat[heat.argmax()]
    near = cv2.dilate(spot.astype(np.uint8), np.ones((33, 33))).astype(bool)  # a map is drawn larger, and so smoother
    assert heat[near].sum() > 0.9 * heat.sum()


def test_heat_maps_are_grad_cam_with_the_batch_norm_before_the_pooling_and_do_not_depend_on_folding(
    trained, monkeypatch
):
    monkeypatch.setattr(prediction, "fold_batch_norm", lambda module: None)
    unfolded = load_trained(trained)
    monkeypatch.undo()
    names = pd.read_csv(trained / "leaves" / "test.csv")["image_id"][:4]
    images = np.stack([load_photo(trained / "leaves" / "images" / f"{name}.jpg", (64, 96)) for name in names])
    classes = [0, 1, 2, 3]
    maps = heat_maps(load_trained(trained), images, classes)
    assert maps.shape == (4, 64, 96) and maps.dtype == np.float32
    np.testing.assert_allclose(maps, heat_maps(unfolded, images, classes), atol=1e-4)

    with torch.no_grad():
        plain = unfolded(torch.from_numpy(images))
        features = unfolded.backbone.features(unfolded.normalise(torch.from_numpy(images)))
    head = unfolded.bn
    scale = (head.weight / (head.running_var + head.eps).sqrt())[:, None, None]
    early = ((features - head.running_mean[:, None, None]) * scale).detach().requires_grad_()
    logits = unfolded.fc(F.normalize(early.mean((2, 3)), dim=1))
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=0)
    logits[range(4), classes].sum().backward()
    expected = (early.grad.mean((2, 3), keepdim=True) * early).sum(1).relu().detach().numpy()
    for heat, cells in zip(maps, expected, strict=True):
        resized = cv2.resize((cells - cells.min()) / np.ptp(cells), (96, 64))
        np.testing.assert_allclose(heat, (resized - resized.min()) / np.ptp(resized), atol=1e-4)


def test_an_overlay_lies_as_the_photo_does():
    heat = np.zeros((4, 8), np.float32)
    heat[0, 7] = 1  # in a lying map top right; the portrait photo was transposed, so there it's bottom left
    for shape, corner in (((40, 80), (0, 79)), ((80, 40), (79, 0))):
        photo = np.full((*shape, 3), 100, np.uint8)
        changed = np.abs(overlay(photo, heat).astype(int) - 100).sum(2)
        assert changed[corner] == changed.max() > 50
        assert (changed == 0).mean() > 0.7


# ---------------------------------------------------------------------------------------------- suspects


def test_the_ranking_finds_planted_wrong_labels(analysed):
    table, wrong = (
        read_table(analysed),
        pd.read_csv(analysed / "data" / "wrong.csv").set_index("image_id")["true_label"],
    )
    suspects = table[table["suspect"] != ""].assign(rank=lambda rows: rows["suspect"].astype(int)).sort_values("rank")
    assert suspects["rank"].tolist() == list(range(1, len(suspects) + 1))
    assert (suspects["suspected_label"] != suspects["label"]).all()
    assert (table["suspected_label"] != "").tolist() == (table["suspect"] != "").tolist()
    first = suspects[suspects["fold"] == 0].head(10)  # the network has not seen these
    found = first[first["image_id"].isin(wrong.index)]
    assert len(found) >= 4  # of 6; 10 of these 32 photos drawn at random would hold 2
    assert (found["suspected_label"] == wrong[found["image_id"]].to_numpy()).mean() > 0.5


def test_suspects_of_good_probabilities_are_wrong_labels_only():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2, 3], [60, 12, 70, 60])
    probabilities = 0.8 * np.eye(4)[truth] + 0.2 * rng.dirichlet(np.ones(4), len(truth))
    labels = truth.copy()
    planted = [3, 20, 90, 150, 180]
    labels[planted] = (truth[planted] + 2) % 4
    assert len(find_suspects(labels, probabilities)) >= 3 and set(find_suspects(labels, probabilities)) <= set(planted)
    assert len(find_suspects(truth, probabilities)) == 0


def test_near_duplicates_are_found_mirrored_turned_and_recompressed_and_nothing_else(trained):
    paths = sorted((trained / "leaves" / "images").glob("Test_*.jpg"))[:30]
    photos = [decode_photo(path) for path in paths]
    source = photos[4]
    again = cv2.imdecode(cv2.imencode(".jpg", source, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR)
    changed = [source[::-1], np.rot90(source), cv2.resize(again, (96, 64)), cv2.convertScaleAbs(source, alpha=1.1)]
    square = cv2.resize(photos[7], (128, 128))
    turned = [square, *(np.rot90(square, k) for k in (1, 2, 3)), square.transpose(1, 0, 2), np.rot90(square)[:, ::-1]]
    hashes = np.array([hash_photo(np.ascontiguousarray(photo)) for photo in [*photos, *changed, *turned]])
    groups = [4, 30, 31, 32, 33], [7, 34, 35, 36, 37, 38, 39]
    pairs = find_near_duplicates(hashes)
    assert sorted(pairs) == sorted((i, j) for alike in groups for i in alike for j in alike if i < j)


def test_the_nearest_pairs_come_first():
    own = np.where(np.random.default_rng(0).random((5, 64)) < 0.5, -1, 1).astype(np.int8)
    for row, of, bits in ((1, 0, 6), (3, 2, 8), (4, 2, 9)):  # 8 bits may differ
        own[row] = own[of]
        own[row, :bits] *= -1
    hashes = np.where(np.random.default_rng(1).random((5, 8, 64)) < 0.5, -1, 1).astype(np.int8)
    hashes[:, 0] = own
    hashes[2, 5] = own[0]  # turned, the third shows what the first shows
    assert find_near_duplicates(hashes) == [(0, 2), (3, 4), (0, 1), (1, 2), (2, 3)]


def test_near_duplicates_are_listed_where_their_labels_contradict_or_their_folds_differ(analysed):
    table, twins = read_table(analysed).set_index("image_id"), pd.read_csv(analysed / "data" / "twins.csv")
    for original, twin in twins.itertuples(index=False):
        assert table.loc[original, "near_duplicates"] == twin and table.loc[twin, "near_duplicates"] == original
    assert (table["near_duplicates"] != "").sum() == 2 * PAIRS
    printed, page = (analysed / "stdout").read_text(), read_page(analysed)
    assert f"{PAIRS} pairs of near-duplicates (1 of contradicting labels, 1 in different folds)" in printed
    duplicates = section(page, "duplicates")
    assert "Contradicting labels: 1" in duplicates and "In different folds: 1" in duplicates
    assert all(name in duplicates for name in twins.iloc[-1])
    folds = pd.read_csv(analysed / "logs" / "folds.csv").set_index("image_id")["fold"]
    assert table["fold"].to_dict() == folds[folds <= 1].to_dict()


# ---------------------------------------------------------------------------------------------- the table and the page


def test_the_table_holds_the_predictions_for_photos_that_the_network_has_not_seen(analysed, trained):
    table, given = read_table(analysed), pd.read_csv(analysed / "data" / "train.csv")
    folds = pd.read_csv(analysed / "logs" / "folds.csv")["fold"]
    given = given[folds <= 1]
    assert table["image_id"].tolist() == given["image_id"].tolist()
    assert table["label"].tolist() == given[list(CLASSES)].idxmax(axis=1).tolist()
    probabilities = table[list(CLASSES)].to_numpy()
    images = [load_photo(analysed / "data" / "images" / f"{name}.jpg", (64, 96)) for name in table["image_id"]]
    with torch.no_grad():
        expected = load_trained(trained)(torch.from_numpy(np.stack(images))).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=2e-5)
    assert table["predicted"].tolist() == np.array(CLASSES)[expected.argmax(1)].tolist()
    assert table["wrong"].tolist() == (table["predicted"] != table["label"]).tolist()
    of_label = [row[row["label"]] for _, row in table.iterrows()]
    np.testing.assert_allclose(table["loss"], -np.log(of_label), atol=1e-3)


def test_the_numbers_of_the_page_are_those_of_the_csv(analysed):
    page, table = read_page(analysed), read_table(analysed)
    photos = page_photos(page)
    for name in ("image_id", "fold", "label", "predicted", "wrong", "loss", *CLASSES, "suspected_label"):
        assert [photo[name] for photo in photos] == table[name].tolist()
    assert ["" if photo["suspect"] is None else str(photo["suspect"]) for photo in photos] == table["suspect"].tolist()
    auc = mean_auc(pd.get_dummies(table["label"])[list(CLASSES)], table[list(CLASSES)])
    shown = dict(re.findall(r'<dd id="([\w-]+)">([\d.]+)</dd>', page))
    assert float(shown["auc"]) == pytest.approx(auc, abs=2e-4)
    assert f"AUC {shown['auc']}" in (analysed / "stdout").read_text()
    assert int(shown["n-wrong"]) == table["wrong"].sum() and int(shown["n-suspect"]) == (table["suspect"] != "").sum()
    for name, of_class in re.findall(r"<dt>AUC, (.*?)</dt><dd>([\d.]+)</dd>", page):  # the legend has the same digits
        assert f">{name}: {of_class}</text>" in page
    counts = pd.crosstab(table["label"], table["predicted"]).reindex(index=CLASSES, columns=CLASSES, fill_value=0)
    assert re.findall(r"<td style=[^>]*>(\d+)<br>", page) == [str(n) for n in counts.to_numpy().ravel()]
    # and nobody is told that errors on new leaves are not more
    assert "On new leaves expect somewhat more errors" in page
    assert "best on these same photos, and 1 pair of near-duplicates is in different folds" in page


def test_the_page_has_every_picture_and_needs_no_network(analysed):
    page, table = read_page(analysed), read_table(analysed)
    pictures, links = [], []

    class Collector(HTMLParser):
        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            pictures.extend(attributes[name] for name in ("src",) if name in attributes)
            links.extend(attributes[name] for name in ("href", "xlink:href") if name in attributes and tag != "use")

    Collector().feed(page)
    n_worst = min(WORST, table["wrong"].sum())
    n_confident = table[~table["wrong"]].groupby("label").size().clip(upper=2).sum()
    n_suspects = min(WORST, (table["suspect"] != "").sum())
    # two heat maps or one; a pair of near-duplicates, twice; all augmentations, three times together; the views
    assert len(pictures) == 3 * n_worst + 2 * n_confident + n_suspects + 2 * 2 + (1 + 8 + 3) + (1 + N_VIEWS)
    assert n_worst == WORST and page.count('class="card" id="heat-') == n_worst + n_confident
    pictures += [photo["thumbnail"] for photo in page_photos(page)]
    assert all(address.startswith("data:image/jpeg;base64,") for address in pictures)
    assert {"#all", "#top"} <= set(links) and all(address.startswith(("#", "data:")) for address in links)
    assert not re.search(r"@import|url\((?!#)|fetch\(|import\(|XMLHttpRequest|WebSocket", page)
    assert page.count("<svg") == 5  # ROC, reliability, loss, AUC, learning rate
    assert "affine" in page and page.count("<figcaption>view ") == N_VIEWS and f"{N_VIEWS} views" in page


def test_examples_are_the_worst_errors_and_the_surest_successes():
    train = pd.DataFrame(np.eye(4)[[0, 0, 0, 0, 3]].astype(int), columns=list(CLASSES))
    train.insert(0, "image_id", list("abcde"))
    probabilities = pd.DataFrame(
        [[0.9, 0.1, 0, 0], [0.7, 0.3, 0, 0], [0.2, 0.8, 0, 0], [0.1, 0.9, 0, 0], [0.6, 0, 0, 0.4]],
        columns=list(CLASSES),
    )
    table = tabulate(train, np.zeros(5, int), probabilities.assign(image_id=list("abcde")))
    assert choose_examples(table, 2) == ([3, 2], [0, 1])


# ---------------------------------------------------------------------------------------------- other data

OTHER = ("rust & <scab>", "$x$_y", "叶斑", "absent", "mildew", "ok")


def test_other_classes_other_folds_one_epoch_and_photos_too_small_for_heat_maps(sample, tmp_path):
    """Six classes, one of them without a photo, and two of seven folds; many near-duplicates, more than are shown."""
    repo, data = copy_recipe(tmp_path / "repo"), tmp_path / "data"
    edit(repo / "utils.py", f"CLASSES = {CLASSES!r}".replace("'", '"'), f"CLASSES = {OTHER!r}")
    edit(repo / "utils.py", "N_FOLDS = 5", "N_FOLDS = 7")
    names, rng = pd.read_csv(sample / "train.csv")["image_id"], np.random.default_rng(0)
    (data / "images").mkdir(parents=True)
    for name in names:  # leaves on one grey board: all pairs are alike
        photo = cv2.circle(np.full((64, 96, 3), 128, np.uint8), (48, 32), 20, (40, 160, 60), -1)
        cv2.imwrite(str(data / "images" / f"{name}.jpg"), photo)
    labels = pd.DataFrame(np.eye(6, dtype=int)[rng.permutation(np.arange(41) % 5 + (np.arange(41) % 5 > 2))], names)
    labels.set_axis(list(OTHER), axis=1).to_csv(data / "train.csv")
    options = [*QUICK, "--image_size", 32, 32, "--folds", 0, 6]
    run_script(str(repo / "train.py"), *options, cwd=tmp_path)
    options = ["--folds", 0, 6, "--worst", 3, "--num_workers", 0]
    done = run_script(str(repo / "error_analysis.py"), *options, cwd=tmp_path)
    assert "note: heat maps of 1 x 1 cells tell next to nothing" in done.stdout and "Warning" not in done.stderr
    page, table = read_page(tmp_path), pd.read_csv(tmp_path / "error_analysis.csv")
    assert "1 × 1 places" in page and 'class="warning"' in page
    assert [photo[OTHER[0]] for photo in page_photos(page)] == table[OTHER[0]].tolist()
    for k, name in enumerate(("rust &amp; &lt;scab&gt;", "$x$ y", "叶斑", "absent", "mildew", "ok")):
        assert len(re.findall(rf"\.tag\.c{k}::before, i\.c{k} {{ background: #[0-9a-f]{{6}}; }}", page)) == 1
        assert re.search(rf'<dt>{re.escape(name)}</dt><dd><i class="c{k}" style="width:\d', page)
        assert f'<th scope="row">{name}</th>' in page and re.search(f">{re.escape(name)}: (0|1|not defined)", page)
    assert page.count("<br>") == 36 and ">absent: not defined</text>" in page
    for fold in (0, 6):
        assert page.count(f">fold {fold}</text>") == 3 and f"<option>{fold}</option>" in page
    n = int(re.search(r"(\d+) pairs of near-duplicates \((\d+) of contradicting", done.stdout).group(2))
    duplicates = section(page, "duplicates")
    assert n > 20 and duplicates.count("<li") == 6 and f"{n - 3} more are in" in duplicates
    assert all(set(text.split("/")) < set(names) for text in table["near_duplicates"])
    (tmp_path / "logs" / "metrics" / "fold=6.csv").unlink()
    done = run_script(str(repo / "error_analysis.py"), *options, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "error: cannot read logs/metrics/fold=6.csv" in done.stderr.splitlines()[-1]


def test_every_fold_has_a_line_and_a_colour_of_its_own_and_one_epoch_is_a_point():
    for n in (2, 4, 5, 6, 12):
        rgb = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in figures.colours(n)])
        assert rgb.shape == (n, 3) and (np.abs(rgb[:, None] - rgb).sum(2) + 999 * np.eye(n)).min() > 60
    for epochs in (1, 3):
        metrics = {fold: pd.DataFrame({"epoch": range(epochs), "lr": 0.1 * fold}) for fold in range(12)}
        svg = figures.draw_epochs(metrics, "lr", "learning rate")
        assert [int(fold) for fold in re.findall(r">fold (\d+)</text>", svg)] == list(range(12))
        assert all(colour in svg for colour in figures.colours(12))
        drawn = set(re.findall(r"<use [^>]*style=\"fill: (#\w+)", svg))  # markers
        assert drawn == (set(figures.colours(12)) if epochs == 1 else set())


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium of 1280 x 900 pixels; skips where there is none, but for CI, which installs one."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs and not os.environ.get("CI"):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    flags += f"disable-component-update disable-sync user-data-dir={tmp_path_factory.mktemp('profile')}"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.implicitly_wait(0)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, analysed):
    """The page, freshly opened; afterwards its console must hold no error."""
    media = [{"name": "prefers-color-scheme", "value": "light"}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    screen = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get("about:blank")
    browser.get(Path(analysed / "error_analysis.html").as_uri())
    find(browser, "#more").click()
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def find(page, selector):
    return page.find_element("css selector", selector)


def listed(page):
    """The ids in the table, top to bottom."""
    if find(page, "#more").is_displayed():
        find(page, "#more").click()
    return [cell.text for cell in page.find_elements("css selector", "#rows td.id")]


def wait_until(condition):
    for _ in range(100):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited 5 seconds in vain")


def test_the_table_sorts_by_its_headers_with_the_keyboard_too(page, analysed):
    table = read_table(analysed)
    assert listed(page) == table.sort_values("loss", ascending=False, kind="stable")["image_id"].tolist()
    assert find(page, "th[data-key=loss]").get_attribute("aria-sort") == "descending"

    find(page, "th[data-key=loss] button").send_keys("\ue007")  # Enter
    assert listed(page) == table.sort_values("loss", kind="stable")["image_id"].tolist()
    assert find(page, "th[data-key=loss]").get_attribute("aria-sort") == "ascending"

    find(page, "th[data-key=image_id] button").click()
    assert listed(page) == sorted(table["image_id"], key=lambda name: int(name.split("_")[1]))  # 2 before 10
    assert find(page, "th[data-key=image_id]").get_attribute("aria-sort") == "ascending"
    assert find(page, "th[data-key=loss]").get_attribute("aria-sort") is None

    find(page, "#sort option[value=rust]").click()
    assert listed(page) == table.sort_values("rust", ascending=False, kind="stable")["image_id"].tolist()
    find(page, "#direction").click()
    assert listed(page) == table.sort_values("rust", kind="stable")["image_id"].tolist()

    find(page, "th[data-key=suspect] button").click()  # those without a rank come last
    suspects = table[table["suspect"] != ""].sort_values("suspect", key=lambda column: column.astype(int))
    assert listed(page)[: len(suspects)] == suspects["image_id"].tolist()


def test_the_table_filters_by_id_class_fold_errors_and_suspects(page, analysed):
    table = read_table(analysed)

    def shows(rows):
        expected = rows.sort_values("loss", ascending=False, kind="stable")["image_id"].tolist()
        assert expected and len(expected) < len(table)
        assert listed(page) == expected
        assert find(page, "#count").text == f"{len(expected)} of {len(table)} photos"
        find(page, "#clear").click()
        assert len(listed(page)) == len(table)

    find(page, "#search").send_keys("TRAIN_1")
    shows(table[table["image_id"].str.contains("Train_1")])
    find(page, "#class option[value=scab]").click()
    shows(table[table["label"] == "scab"])
    for fold in (0, 1):
        find(page, f"#fold option:nth-child({fold + 2})").click()  # the first one is "all"
        shows(table[table["fold"] == fold])
    find(page, "#wrong").send_keys(" ")
    shows(table[table["wrong"]])
    find(page, "#suspect").click()
    shows(table[table["suspect"] != ""])
    find(page, "#wrong").click()
    find(page, "#class option[value=healthy]").click()
    shows(table[table["wrong"] & (table["label"] == "healthy")])


def test_links_lead_from_a_suspect_to_its_row_and_from_there_to_its_heat_map(page, analysed):
    table = read_table(analysed)
    suspect = table.index[table["suspect"] == "1"][0]
    find(page, "#search").send_keys("nothing is called so")
    assert listed(page) == []
    find(page, f"#suspect-{suspect} h4 a").click()
    wait_until(lambda: page.switch_to.active_element.get_attribute("id") == f"photo-{suspect}")
    assert len(listed(page)) == len(table)  # the filter that hid it is gone
    worst = table[table["wrong"]]["loss"].idxmax()
    find(page, f"#photo-{worst} a[href='#heat-{worst}']").click()
    seen = "const box = arguments[0].getBoundingClientRect(); return box.top > -5 && box.top < innerHeight"
    wait_until(lambda: page.execute_script(seen, find(page, f"#heat-{worst}")))


def test_the_page_fits_a_phone_in_the_dark_and_every_picture_is_decoded(page, tmp_path):
    sizes = {}
    for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 375)):
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.execute_script(overflow) == 0
        path = tmp_path / f"{scheme}-{width}.png"
        page.save_screenshot(str(path))
        sizes[scheme, width] = cv2.imread(str(path)).mean()
        right = "return document.querySelector(arguments[0]).getBoundingClientRect().right"  # text is as wide as cards
        assert page.execute_script(right, "#errors p") == page.execute_script(right, "#errors .cards")
    assert sizes["light", 1280] > 150 > 80 > sizes["dark", 1280]
    page.execute_script("arguments[0].scrollIntoView()", find(page, "#augmentation"))
    find(page, "a.up").click()  # from anywhere
    wait_until(lambda: page.execute_script("return scrollY") < 50)
    broken = "return [...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert page.execute_script(broken) == 0
    assert page.execute_script("return document.images.length") > 40
    unnamed = "input, select, button"
    names = "return [...document.querySelectorAll(arguments[0])].filter(one => !one.labels?.length && !one.textContent)"
    assert page.execute_script(names, unnamed) == []
    assert page.execute_script("return document.querySelectorAll(arguments[0]).length", unnamed) > 10
