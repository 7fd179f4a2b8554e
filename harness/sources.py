"""Which files of this repository a script runs: what its result depends on beside data and options."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def imported_files(script):
    """The script and every file below the repository's root that it imports, directly or not: dict of name to path.

    Found without running anything; libraries are left out. script: its path relative to the root.
    """
    found, todo = {}, [ROOT / script]
    while todo:
        path = todo.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in found or not path.is_file():
            continue
        found[name] = path
        package = path.relative_to(ROOT).parent.parts
        for node in ast.walk(ast.parse(path.read_bytes(), name)):
            if isinstance(node, ast.Import):
                modules = [alias.name.split(".") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else ()
                base = [*above, *(node.module.split(".") if node.module else [])]
                modules = [base, *([*base, alias.name] for alias in node.names)]
            else:
                continue
            for module in modules:
                for end in range(1, len(module) + 1):  # a package's __init__.py is run too
                    place = ROOT.joinpath(*module[:end])
                    todo += [place / "__init__.py", place.with_name(place.name + ".py")]
    return dict(sorted(found.items()))


def training_sources():
    """The files that a training runs."""
    return imported_files("train.py")


def prediction_sources():
    """The files that a prediction runs."""
    return imported_files("inference.py")
