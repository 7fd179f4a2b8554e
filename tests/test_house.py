"""The house: who imports whom, what a start imports, and which files a result is said to depend on."""

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import REPO, run_script

from harness.record import source_files

RECIPE = {"train", "generate_soft_labels", "generate_distilled_submission", "blend", "dataset", "models", "inference"}
RECIPE |= {"utils", "error_analysis", "predict", "compare"}
ROOMS = {"harness", "analysis", "tools"}


def own_imports(path):
    """The modules of this repository that a file imports, by their dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in RECIPE | ROOMS}


def modules():
    """Dotted name and path of every module of the recipe and the rooms."""
    paths = [path for room in ROOMS for path in (REPO / room).rglob("*.py")] + list(REPO.glob("*.py"))
    return {".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def test_every_file_of_the_recipe_is_known_here():
    assert {path.stem for path in REPO.glob("*.py")} == RECIPE


@pytest.mark.parametrize("room, may_import", [("harness", {"harness"}), ("analysis", {"analysis", "harness", *RECIPE})])
def test_rooms_import_in_one_direction(room, may_import):
    paths = list((REPO / room).glob("*.py"))
    assert len(paths) > 2
    for path in paths:
        assert {name.split(".")[0] for name in own_imports(path)} <= may_import, path


def test_no_imports_go_in_circles():
    known = modules()
    graph = {name: own_imports(path) & known.keys() - {name} for name, path in known.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("harness.console") < order.index("utils") < order.index("train")


@pytest.mark.parametrize("script", sorted(RECIPE - {"dataset", "models", "inference", "utils"}))
def test_help_and_typos_import_neither_torch_nor_other_heavy_packages(script, tmp_path):
    """In an environment where these packages cannot be imported, a cold start each."""
    for name in "torch pytorch_lightning albumentations cv2 sklearn matplotlib pretrainedmodels timm".split():
        (tmp_path / f"{name}.py").write_text("raise ImportError('too early')")
    environment = {"PYTHONPATH": str(tmp_path)}
    run_script(f"{script}.py", "--help", cwd=tmp_path, cold=True, **environment)
    typo = run_script(f"{script}.py", "--max_epoch", "3", cwd=tmp_path, cold=True, check=False, **environment)
    assert typo.returncode == 2 and "Traceback" not in typo.stderr


def test_blend_runs_without_torch(tmp_path):
    for name in ("torch", "albumentations", "cv2", "sklearn"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not needed')")
    (tmp_path / "one.csv").write_text("image_id,healthy,multiple_diseases,rust,scab\na,1,0,0,0\n")
    run_script("blend.py", "--submissions", "one.csv", "one.csv", cwd=tmp_path, cold=True, PYTHONPATH=str(tmp_path))
    assert (tmp_path / "submission_mix.csv").exists()


@pytest.mark.parametrize("script", ["train.py", "generate_soft_labels.py", "generate_distilled_submission.py"])
def test_the_five_steps_import_nothing_of_the_analysis(script):
    imported = set()
    for path in source_files(script).values():
        for node in ast.walk(ast.parse(path.read_text())):
            imported |= {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
            imported |= {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
    assert {"torch", "pandas", "cv2"} <= imported
    assert not imported & {"matplotlib", "cleanlab", "imagehash", "jinja2"}
