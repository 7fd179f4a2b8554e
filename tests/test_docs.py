"""README and docs: links lead somewhere, named files exist, every typed command is one that its script accepts."""

import re
import shlex
import unicodedata

import pytest
from conftest import QUICK, REPO, run_script, start_script

PAGES = sorted(
    [
        *REPO.glob("README*.md"),
        *REPO.glob("docs/*.md"),
        *REPO.glob("results/*/README.md"),
        *REPO.glob("[dl]*/README.md"),
    ]
)
WRITTEN = (
    "soft_labels submission submission_distill submission_mix predictions error_analysis train test sample_submission"
)
WRITTEN = {f"{name}.csv" for name in f"{WRITTEN} folds results out_of_fold".split()} | {"hparams.yaml", "behaviour.npz"}
WRITTEN |= {"error_analysis.html", "predictions.html", "gpu_check.json", "run.py", "kernel-metadata.json"}


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    letters = (
        "".join(c for c in text.lower() if c in " -_" or unicodedata.category(c)[0] in "LN") for text in headings
    )
    return {text.replace(" ", "-") for text in letters}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            path = (page.parent / name) if name else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_files_that_are_named_exist_or_are_written_by_a_step(page):
    for name in re.findall(
        r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|txt|yml|yaml|csv|html|json|diff|png|jpg|sh|npz))`", page.read_text()
    ):
        if name == "checkpoint_connector.py":  # Lightning's
            continue
        places = [page.parent, REPO, *(REPO / room for room in ("harness", "analysis", "tests", "tools", "docs"))]
        assert name.split("/")[-1] in WRITTEN or any((place / name).exists() for place in places), name


def blocks(page):
    """The blocks of code of a page: list of (language, text without comments)."""
    found = re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.S)
    return [(language, re.sub(r" *#.*", "", text)) for language, text in found]


def test_the_english_and_the_chinese_page_have_the_same_commands_links_headings_and_rows():
    english, chinese = REPO / "README.md", REPO / "README.zh-CN.md"
    assert blocks(english) == blocks(chinese)
    for pattern in (r"\]\(([^)\s]+)\)", r"(?m)^(#+ |\||- |\*\*)", r"(?<![\w-])--[a-z]\w+", r"\d[\d.,]*\d"):
        found = [sorted(re.findall(pattern, page.read_text())) for page in (english, chinese)]
        found = [[text for text in texts if not text.startswith("README")] for texts in found]  # each names the other
        assert found[0] == found[1], pattern


@pytest.mark.slow
def test_the_quick_look_of_the_readme_can_be_typed(sample, tmp_path):
    """All five lines, with a small network in place of $T; that step 3 takes the limit from its soft labels' name."""
    settings = shlex.join(map(str, ["--data_dir", sample, *QUICK, "--folds", *range(5)]))
    (lines,) = (text for _, text in blocks(REPO / "README.md") if "--limit" in text)
    for line in lines.splitlines():
        run_script(*shlex.split(line.replace("$T", settings))[1:], cwd=tmp_path)
    names = "soft_labels submission submission_distill submission_mix".split()
    assert {path.name for path in tmp_path.glob("*.csv")} == {f"{name}-limit=100.csv" for name in names}


def typed(page):
    """The commands in a page's blocks and lines of code that begin with python: lists of words, from the script on."""
    text = page.read_text()
    lines = [
        line for language, block in blocks(page) if language == "sh" for line in block.replace("\\\n", " ").splitlines()
    ]
    for line in lines + re.findall(r"`(python [^`\n]+)`", text):
        if found := re.match(r"\s*(?:\S+/)?python3? (.*)", line):
            yield shlex.split(found[1], comments=True)


@pytest.mark.slow
def test_every_typed_command_and_every_option_that_is_named_exists(tmp_path):
    scripts = [path.name for path in REPO.glob("*.py") if path.stem not in ("dataset", "models", "inference", "utils")]
    scripts += [f"tools.{path.stem}" for path in REPO.glob("tools/[!_]*.py")]
    started = {script: start_script(script, "--help", cwd=tmp_path) for script in scripts}
    assert all(script.wait() == 0 for script in started.values())
    known = {name: set(re.findall(r"(?<![\w-])--?\w+", script.stdout)) for name, script in started.items()}
    seen, anywhere = set(), set().union(*known.values())
    # of patch, docker, torchrun, tensorboard, sbatch, pip
    others = "dry shm nnodes node_rank nproc_per_node master_addr master_port logdir array nodes kill wrap requeue cpus"
    anywhere |= {f"--{name}" for name in f"{others} ntasks index".split()}
    for page in PAGES:
        for words in typed(page):
            module = words[0] == "-m"
            script = words[module].removeprefix("../")
            if script in known:
                options = {word.split("=")[0] for word in words[1 + module :] if re.match("--?[a-zA-Z]", word)}
                assert options <= known[script], f"{page.name}: {' '.join(words)}"
                seen.add(script)
        named = set(re.findall(r"(?<![\w-])--[a-z]\w+", page.read_text()))
        assert named <= anywhere, f"{page.name}: {named - anywhere}"
    assert {"train.py", "generate_soft_labels.py", "blend.py", "compare.py", "predict.py", "tools.kaggle"} <= seen
