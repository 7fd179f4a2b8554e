"""What error_analysis.py finds, on a really trained network: where it looks, which labels are wrong, what the page says."""

import json
import os
import re
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK, copy_recipe, edit, run_script, shared_folder
from matplotlib.colors import to_rgb
from selenium import webdriver
from selenium.webdriver.support.ui import Select, WebDriverWait

from analysis import figures
from analysis.heat_maps import heat_maps, overlay
from error_analysis import find_near_duplicates, find_suspects, hash_photo
from harness.photos import read_photo
from models import LeafNet
from utils import CLASSES, mean_auc

WORST, N_VIEWS = 5, 3
OTHER = ("rust & <scab>", "$x$_y", "叶斑", "absent", "mildew", "ok")


@pytest.fixture(scope="session")
def analysed(trained, tmp_path_factory):
    """A folder in which error_analysis.py ran with fold 0 on data/, the leaves, but for mistakes.

    Six labels of fold 0 are wrong, and one photo there is the mirror image of another (twins.csv).
    """

    def analyse(folder):
        shutil.copytree(trained / "leaves", folder / "data")
        labels = pd.read_csv(folder / "data" / "train.csv", index_col="image_id").idxmax(axis=1)
        of_fold_0 = pd.read_csv(trained / "logs" / "out_of_fold.csv", index_col="image_id")["label"]
        wrong = of_fold_0[of_fold_0 != "multiple_diseases"].sample(6, random_state=0)
        labels.update(wrong.map({"healthy": "rust", "rust": "scab", "scab": "healthy"}))
        pd.get_dummies(labels)[list(CLASSES)].astype(int).to_csv(folder / "data" / "train.csv")
        rest = of_fold_0.drop(wrong.index)
        original, twin = rest.index[rest == "healthy"][0], rest.index[rest == "scab"][0]
        mirrored = cv2.imread(str(folder / "data" / "images" / f"{original}.jpg"))[:, ::-1]
        cv2.imwrite(str(folder / "data" / "images" / f"{twin}.jpg"), mirrored, [cv2.IMWRITE_JPEG_QUALITY, 60])
        (folder / "twins.csv").write_text(f"{original},{twin}")
        options = ["--data_dir", "data", "--folds", 0, "--worst", WORST, "--tta_draws", N_VIEWS, "--num_workers", 0]
        done = run_script("error_analysis.py", *options, "--log_dir", trained / "logs", cwd=folder)
        (folder / "stdout").write_text(done.stdout)

    return shared_folder(tmp_path_factory, "analysed", analyse)


@pytest.fixture(scope="session")
def other(sample, tmp_path_factory):
    """A folder in which error_analysis.py ran on six other classes, one without a photo, and two of seven folds.

    One epoch on photos of 32 x 32 pixels, all nearly the same; and the views of TTA are made otherwise.
    """

    def analyse(folder):
        repo = copy_recipe(folder / "repo")
        edit(repo / "utils.py", f"CLASSES = {CLASSES!r}".replace("'", '"'), f"CLASSES = {OTHER!r}")
        edit(repo / "utils.py", "N_FOLDS = 5", "N_FOLDS = 7")
        edit(repo / "inference.py", "seed=args.seed), args.tta_draws", "seed=args.seed), 2")
        numbers = np.random.default_rng(0).permutation(np.array([0, 1, 2, 4, 5]).repeat(9)[:41])
        labels = pd.DataFrame(np.eye(6, dtype=int)[numbers], pd.read_csv(sample / "train.csv")["image_id"], list(OTHER))
        (folder / "data" / "images").mkdir(parents=True)
        for name in labels.index:
            photo = cv2.circle(np.full((64, 96, 3), 128, np.uint8), (48, 32), 20, (40, 160, 60), -1)
            cv2.imwrite(str(folder / "data" / "images" / f"{name}.jpg"), photo)
        labels.to_csv(folder / "data" / "train.csv")
        run_script(str(repo / "train.py"), *QUICK, "--image_size", 32, 32, "--folds", 0, 6, cwd=folder)
        done = run_script(str(repo / "error_analysis.py"), "--folds", 0, 6, "--worst", 3, cwd=folder)
        (folder / "stdout").write_text(done.stdout + done.stderr)

    return shared_folder(tmp_path_factory, "other", analyse)


def read_run(folder):
    """error_analysis.csv, error_analysis.html and what was printed."""
    table = pd.read_csv(folder / "error_analysis.csv", keep_default_na=False, dtype={"suspect": str})
    return table, (folder / "error_analysis.html").read_text(encoding="utf-8"), (folder / "stdout").read_text()


def section(page, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', page, re.S).group(1)


class Redness(torch.nn.Module):
    """A backbone that sees no more than how red, and how blue, each place of 32 x 32 pixels is."""

    def features(self, images):
        return F.avg_pool2d(images[:, [0, 2]], 32)


def test_a_heat_map_lies_upright_over_a_portrait_photo_that_the_network_saw_upright_or_transposed():
    upright = np.zeros((6, 4))
    upright[2, 0] = 1
    for heat in (upright, upright.T):
        lit = overlay(np.full((96, 64, 3), 255, np.uint8), heat)[..., 1] < 200
        assert lit[40, 8] and not lit[8, 40]


def test_a_heat_map_lies_where_the_network_looked_and_is_not_mirrored():
    """This network knows rust by its colour alone. That its maps are class activation maps is tested in test_timm.py."""
    network = LeafNet("resnet18")
    network.backbone, network.bn, network.fc = Redness(), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, len(CLASSES))
    network.eval().fc.weight.data = torch.tensor([[0.0, 1], [0, 0], [1, 0], [0, 0]])
    image, spot = np.full((128, 192, 3), 128, np.uint8), np.zeros((128, 192), bool)
    spot[32:64, 128:160] = True
    image[spot] = (200, 100, 40)
    near = cv2.dilate(spot.astype(np.uint8), np.ones((33, 33))).astype(bool)  # a map is drawn larger, and so smoother
    for flips in ((), (0,), (1,), (0, 1)):
        heat = np.flip(heat_maps(network, np.flip(image, flips)[None], [CLASSES.index("rust")])[0], flips)
        assert spot.flat[heat.argmax()] and heat[near].sum() > 0.9 * heat.sum()


def test_suspects_are_ranked_and_near_duplicates_with_contradicting_labels_are_listed(analysed):
    (table, page, printed), (original, twin) = read_run(analysed), (analysed / "twins.csv").read_text().split(",")
    labels = pd.get_dummies(table["label"])[list(CLASSES)].to_numpy()
    rows = find_suspects(labels, table[list(CLASSES)].to_numpy())
    assert len(rows) > 2 and table["suspect"][rows].tolist() == [str(rank) for rank in range(1, len(rows) + 1)]
    others = table[list(CLASSES)].mask(labels).idxmax(axis=1)  # the likeliest class but for the label
    assert table["suspected_label"].tolist() == others.where(table.index.isin(rows), "").tolist()

    near, duplicates = table.set_index("image_id")["near_duplicates"], section(page, "duplicates")
    assert near[near != ""].to_dict() == {original: twin, twin: original}
    assert "1 pairs of near-duplicates (1 of contradicting labels, 0 in different folds)" in printed
    assert original in duplicates and twin in duplicates and "Contradicting labels: 1" in duplicates


def test_suspects_of_good_probabilities_are_wrong_labels_only():
    rng = np.random.default_rng(0)
    truth, planted = np.repeat([0, 1, 2, 3], [60, 12, 70, 60]), [3, 20, 90, 150, 180]
    probabilities, labels = 0.8 * np.eye(4)[truth] + 0.2 * rng.dirichlet(np.ones(4), len(truth)), truth.copy()
    labels[planted] = (truth[planted] + 2) % 4
    found, none = (find_suspects(np.eye(4, dtype=bool)[given], probabilities) for given in (labels, truth))
    assert len(found) >= 3 and set(found) <= set(planted) and len(none) == 0


def test_near_duplicates_are_found_mirrored_turned_and_recompressed_and_nothing_else(trained):
    photos = [read_photo(path) for path in sorted((trained / "leaves" / "images").glob("Test_*.jpg"))[:30]]
    source, square = photos[4], cv2.resize(photos[7], (128, 128))
    again = cv2.imdecode(cv2.imencode(".jpg", source, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR)
    changed = [source[::-1], np.rot90(source), cv2.resize(again, (96, 64)), cv2.convertScaleAbs(source, alpha=1.1)]
    turned = [square, *(np.rot90(square, k) for k in (1, 2, 3)), square.transpose(1, 0, 2), np.rot90(square)[:, ::-1]]
    hashes = np.array([hash_photo(np.ascontiguousarray(photo)) for photo in [*photos, *changed, *turned]])
    groups = [4, 30, 31, 32, 33], [7, 34, 35, 36, 37, 38, 39]
    assert sorted(find_near_duplicates(hashes)) == sorted((i, j) for of in groups for i in of for j in of if i < j)


def test_the_nearest_pairs_come_first():
    own = np.where(np.random.default_rng(0).random((5, 64)) < 0.5, -1, 1).astype(np.int8)
    for row, of, bits in ((1, 0, 6), (3, 2, 8), (4, 2, 9)):  # 8 bits may differ
        own[row] = np.where(np.arange(64) < bits, -own[of], own[of])
    hashes = np.where(np.random.default_rng(1).random((5, 8, 64)) < 0.5, -1, 1).astype(np.int8)
    hashes[:, 0] = own
    hashes[2, 5] = own[0]  # turned, the third shows what the first shows
    assert find_near_duplicates(hashes) == [(0, 2), (3, 4), (0, 1), (1, 2), (2, 3)]


def test_the_table_holds_the_predictions_for_photos_not_seen_and_the_page_has_its_numbers(analysed, trained):
    table, page, printed = read_run(analysed)
    validated = pd.read_csv(trained / "logs" / "out_of_fold.csv")
    pd.testing.assert_frame_equal(table[["image_id", "fold"]], validated[["image_id", "fold"]])
    labels = pd.read_csv(analysed / "data" / "train.csv", index_col="image_id").idxmax(axis=1)
    assert table["label"].tolist() == labels[table["image_id"]].tolist()
    same = table["image_id"] != (analysed / "twins.csv").read_text().split(",")[1]
    np.testing.assert_allclose(table[list(CLASSES)][same], validated[list(CLASSES)][same], atol=1e-4)
    assert table["predicted"].tolist() == table[list(CLASSES)].idxmax(axis=1).tolist()
    assert table["wrong"].tolist() == (table["predicted"] != table["label"]).tolist()
    np.testing.assert_allclose(table["loss"], [-np.log(row[row["label"]]) for _, row in table.iterrows()], atol=1e-3)

    photos = pd.DataFrame(json.loads(re.search(r'id="photos">(.*?)</script>', page, re.S).group(1)))
    photos["suspect"] = ["" if np.isnan(rank) else f"{rank:.0f}" for rank in photos["suspect"]]
    pd.testing.assert_frame_equal(photos[list(table)], table)
    assert photos["thumbnail"].str.startswith("data:image/jpeg;base64,").all()
    auc = mean_auc(pd.get_dummies(table["label"])[list(CLASSES)], table[list(CLASSES)])
    shown = dict(re.findall(r'<dd id="([\w-]+)">([\d.]+)</dd>', page))
    assert float(shown["auc"]) == pytest.approx(auc, abs=2e-4) and f"AUC {shown['auc']}" in printed
    assert int(shown["n-wrong"]) == table["wrong"].sum() and int(shown["n-suspect"]) == (table["suspect"] != "").sum()
    for name, of_class in re.findall(r"<dt>AUC, (.*?)</dt><dd>([\d.]+)</dd>", page):  # the legend has the same digits
        assert f">{name}: {of_class}</text>" in page
    counts = pd.crosstab(table["label"], table["predicted"]).reindex(index=CLASSES, columns=CLASSES, fill_value=0)
    assert re.findall(r"<td style=[^>]*>(\d+)<br>", page) == [str(n) for n in counts.to_numpy().ravel()]


def test_the_page_has_every_picture_the_worst_errors_and_the_surest_successes_and_needs_no_network(analysed):
    table, page, _ = read_run(analysed)
    worst = table[table["wrong"]].nlargest(WORST, "loss").index.tolist()
    right = table[~table["wrong"]].sort_values("loss", kind="stable")
    confident = [row for name in CLASSES for row in right.index[right["label"] == name][:2]]
    assert len(worst) == WORST and len(confident) > 4
    assert re.findall(r'class="card" id="heat-(\d+)"', page) == [str(row) for row in worst + confident]
    n_suspects = min(WORST, (table["suspect"] != "").sum())
    # with two heat maps or one; a pair of near-duplicates; all augmentations, three times together; the views
    n_pictures = 3 * len(worst) + 2 * len(confident) + n_suspects + 2 + (1 + 8 + 3) + (1 + N_VIEWS)
    assert len(re.findall('<img src="data:image/jpeg;base64,', page)) == n_pictures
    outside = r"""[\s:](src|href)=["'](?!data:|#)|@import|url\((?!#)|fetch\(|import\(|XMLHttp|WebSocket"""
    assert not re.search(outside, page)
    assert page.count("<svg") == 5  # ROC, reliability, loss, AUC, learning rate
    assert "affine" in page and page.count("<figcaption>view ") == N_VIEWS and f"{N_VIEWS} views" in page


def test_other_classes_and_folds_are_shown_like_the_usual_ones_and_of_many_near_duplicates_the_nearest(other):
    table, page, printed = read_run(other)
    assert "note: heat maps of 1 x 1 cells tell next to nothing" in printed and "Warning" not in printed
    assert "1 × 1 places" in page and 'class="warning"' in page
    assert "2 views" in page and page.count("<figcaption>view ") == 2  # of one function, for all who need them
    for k, name in enumerate(("rust &amp; &lt;scab&gt;", "$x$ y", "叶斑", "absent", "mildew", "ok")):
        assert len(re.findall(rf"\.tag\.c{k}::before, i\.c{k} {{ background: #[0-9a-f]{{6}}; }}", page)) == 1
        assert re.search(rf'<dt>{re.escape(name)}</dt><dd><i class="c{k}" style="width:\d', page)
        assert f'<th scope="row">{name}</th>' in page and re.search(f">{re.escape(name)}: (0|1|not defined)", page)
    assert ">absent: not defined</text>" in page
    assert all(page.count(f">fold {fold}</text>") == 3 and f"<option>{fold}</option>" in page for fold in (0, 6))
    folds = pd.read_csv(other / "logs" / "folds.csv", index_col="image_id")["fold"]
    assert table.set_index("image_id")["fold"].to_dict() == folds[folds.isin([0, 6])].to_dict()

    n, duplicates = len(table), section(page, "duplicates")
    leaks, contradictions = ((of[:, None] != of).sum() // 2 for of in table[["fold", "label"]].to_numpy().T)
    counts = f"{n * (n - 1) // 2} pairs of near-duplicates ({contradictions} of contradicting labels, {leaks} in differ"
    assert counts in printed and f"and {leaks} pairs of near-duplicates are in different folds" in page
    assert duplicates.count("<li") == 2 * 3  # the rest is counted
    assert all(f"{n - 3} more are in" in duplicates for n in (leaks, contradictions))
    assert table["near_duplicates"].str.split("/").map(len).tolist() == [n - 1] * n


def test_every_fold_has_a_line_and_a_colour_of_its_own_and_one_epoch_is_a_point():
    for n in (2, 4, 5, 6, 12):
        rgb = np.array([to_rgb(colour) for colour in figures.colours(n)])
        assert rgb.shape == (n, 3) and (np.abs(rgb[:, None] - rgb).sum(2) + np.eye(n)).min() > 0.23
    for epochs in (1, 3):
        metrics = {fold: pd.DataFrame({"epoch": range(epochs), "lr": 0.1 * fold}) for fold in range(12)}
        svg = figures.draw_epochs(metrics, "lr", "learning rate")
        assert re.findall(r">fold (\d+)</text>", svg) == [str(fold) for fold in range(12)]
        assert all(colour in svg for colour in figures.colours(12))
        markers = set(re.findall(r"<use [^>]*style=\"fill: (#\w+)", svg))
        assert markers == (set(figures.colours(12)) if epochs == 1 else set())


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skips where there is none, but for CI, which installs one."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs and not os.environ.get("CI"):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def set_screen(browser, width, scheme):
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


@pytest.fixture
def page(browser, analysed):
    """A browser with the page, freshly opened; afterwards its console must hold no error."""
    set_screen(browser, 1280, "light")
    browser.get("about:blank")
    browser.get((analysed / "error_analysis.html").as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def find(page, selector):
    return page.find_element("css selector", selector)


def listed(page):
    """The ids in the table, top to bottom."""
    return [cell.text for cell in page.find_elements("css selector", "#rows td.id")]


def test_the_table_sorts_by_any_column(page, analysed):
    table = read_run(analysed)[0].assign(number=lambda rows: rows["image_id"].str.split("_").str[1].astype(int))
    for selector, column, ascending in (
        ("h1", "loss", False),  # as it is opened
        ("th[data-key=loss] button", "loss", True),
        ("th[data-key=image_id] button", "number", True),  # 2 before 10
        ("#sort option[value=rust]", "rust", False),
        ("#direction", "rust", True),
    ):
        find(page, selector).click()
        assert listed(page) == table.sort_values(column, ascending=ascending, kind="stable")["image_id"].tolist()
    find(page, "th[data-key=suspect] button").click()  # those without a rank come last
    suspects = table[table["suspect"] != ""].sort_values("suspect", key=lambda column: column.astype(int))
    assert listed(page)[: len(suspects)] == suspects["image_id"].tolist()
    assert find(page, "th[aria-sort=ascending]").get_attribute("data-key") == "suspect"


def test_the_table_filters_by_id_class_errors_suspects_and_fold(page, analysed, other):
    table, others = read_run(analysed)[0], read_run(other)[0]
    find(page, "#search").send_keys("TRAIN_1")
    chosen = {"": table["image_id"].str.contains("Train_1"), "#class option[value=scab]": table["label"] == "scab"}
    chosen |= {"#wrong": table["wrong"], "#suspect": table["suspect"] != ""}
    chosen |= {"#class option[value=healthy], #wrong": table["wrong"] & (table["label"] == "healthy")}
    chosen |= {f"#fold option:nth-child({place})": others["fold"] == fold for place, fold in ((2, 0), (3, 6))}
    for selectors, rule in chosen.items():
        if selectors == "#fold option:nth-child(2)":  # the first one is "all"
            table = others
            page.get((other / "error_analysis.html").as_uri())
        for selector in filter(None, selectors.split(", ")):
            find(page, selector).click()
        rows = table[rule].sort_values("loss", ascending=False, kind="stable")
        assert listed(page) == rows["image_id"].tolist() and 0 < len(rows) < len(table)
        assert find(page, "#count").text == f"{len(rows)} of {len(table)} photos"
        find(page, "#clear").click()
        assert len(listed(page)) == len(table)


def test_links_lead_from_a_suspect_to_its_row_and_from_there_to_its_heat_map(page, analysed):
    table = read_run(analysed)[0]
    suspect, worst = table.index[table["suspect"] == "1"][0], table[table["wrong"]]["loss"].idxmax()
    find(page, "#search").send_keys("nothing is called so")
    assert listed(page) == []
    find(page, f"#suspect-{suspect} h4 a").click()
    WebDriverWait(page, 5).until(lambda _: page.switch_to.active_element.get_attribute("id") == f"photo-{suspect}")
    assert len(listed(page)) == len(table)  # the filter that hid it is gone
    find(page, f"#photo-{worst} a[href='#heat-{worst}']").click()
    seen = "const box = arguments[0].getBoundingClientRect(); return box.top > -5 && box.top < innerHeight"
    WebDriverWait(page, 5).until(lambda _: page.execute_script(seen, find(page, f"#heat-{worst}")))


def test_the_page_fits_a_phone_in_the_dark_and_every_picture_is_decoded(page, tmp_path):
    brightness, run = {}, page.execute_script
    for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 375)):
        set_screen(page, width, scheme)
        assert run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        page.save_screenshot(str(tmp_path / "page.png"))
        brightness[scheme] = cv2.imread(str(tmp_path / "page.png")).mean()
    assert brightness["light"] > 150 > 80 > brightness["dark"]
    assert run("return [...document.images].filter(image => !image.complete || !image.naturalWidth).length") == 0
    fields = "[...document.querySelectorAll('input, select, button')]"
    assert run(f"return {fields}.filter(one => !one.labels?.length && !one.textContent)") == []


def test_the_page_of_predictions_is_sorted_and_filtered_and_fits_a_phone(page, trained, tmp_path):
    photos = [trained / "leaves" / "images" / f"Test_{k}.jpg" for k in range(12)]
    run_script("predict.py", *photos, "--page", "page.html", "--log_dir", trained / "logs", "--folds", 0, cwd=tmp_path)
    found = pd.read_csv(tmp_path / "predictions.csv").set_index("image")
    set_screen(page, 390, "dark")
    page.get((tmp_path / "page.html").as_uri())

    def shown(field, value):
        Select(find(page, f"#{field}")).select_by_value(value)
        cards = "[...document.querySelectorAll('#cards > .card:not([hidden])')]"
        return page.execute_script(f"return {cards}.map(card => card.dataset.name)")

    assert page.execute_script("return document.documentElement.scrollWidth") == 390
    rust = found["rust"].sort_values(ascending=False, kind="stable").index.tolist()
    assert shown("sort", str(CLASSES.index("rust"))) == rust
    assert shown("sort", "certain") == found.max(axis=1).sort_values(kind="stable").index.tolist()
    names = found.idxmax(axis=1)
    find(page, "#search").send_keys("test_1")
    assert find(page, "#count").text == "3 of 12 photos"
    expected = names.index[(names == names.iloc[1]) & names.index.str.contains("Test_1")]
    assert set(shown("class", names.iloc[1])) == set(expected)
