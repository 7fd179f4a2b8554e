"""The source files that a result depends on: which they are, whether they were edited since, and what was changed."""

import ast
import difflib
import hashlib
import inspect
import io
import tokenize
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOWN_LINES = 12  # of a diff in an error message
NETWORKS = {"harness/backbones.py"}  # the room of the harness on which a network depends

# ---------------------------------------------------------------------------------------------- which files


@cache
def imported_files(script):
    """The script and every file below the repository's root that it imports, directly or not: dict of name to path.

    Found without running anything; libraries are left out. script: its path relative to the root.
    """
    found, todo = {}, [ROOT / script]
    while todo:
        path = todo.pop()
        name = path.relative_to(ROOT).as_posix()
        if name not in found and path.is_file():
            found[name] = path
            for node in ast.walk(ast.parse(path.read_bytes(), name)):
                todo += [file for _, file in own_imports(node, path)]
    return dict(sorted(found.items()))


def own_imports(node, path):
    """The files of this repository that an import statement of the file `path` may run: list of (dotted name, path)."""
    if isinstance(node, ast.Import):
        modules = [alias.name.split(".") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = path.relative_to(ROOT).parent.parts
        above = package[: len(package) - node.level + 1] if node.level else ()
        base = [*above, *(node.module.split(".") if node.module else [])]
        modules = [base, *([*base, alias.name] for alias in node.names)]
    else:
        return []
    places = {
        (".".join(module[:end]), ROOT.joinpath(*module[:end]))
        for module in modules
        for end in range(1, len(module) + 1)
    }
    files = [
        (name, file) for name, place in places for file in (place / "__init__.py", place.with_name(place.name + ".py"))
    ]
    return [(name, file) for name, file in files if file.is_file()]


def training_sources():
    """The files that a training runs, as they are now: dict of name to text."""
    return {name: read_source(path) for name, path in imported_files("train.py").items()}


def prediction_sources():
    """The files that a prediction runs, as they are now: dict of name to text."""
    return {name: read_source(path) for name, path in imported_files("inference.py").items()}


# ---------------------------------------------------------------------------------------------- what they say


def strip_comments(text):
    """Python source without its comments, blank lines and blanks at line ends."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "".join(line.rstrip() + "\n" for line in lines if line.strip())


def digest(text):
    """SHA-256 of a source text, its comments and blank lines left out."""
    return hashlib.sha256(strip_comments(text).encode()).hexdigest()


def read_source(path):
    return Path(path).read_text(encoding="utf-8")


def definition(file, name):
    """The source of a function, class or constant of a file of the recipe, and of all of the recipe that it uses.

    Found without running anything, by the names in it. The harness is left out, but for NETWORKS: no network and no
    photo depends on it.
    """
    parts, todo = {}, [(file, name)]
    while todo:
        file, name = todo.pop()
        text, defined, imported = top_level(file)
        if (file, name) in parts:
            continue
        parts[file, name] = (
            text if name is None else "\n".join(map(partial(ast.get_source_segment, text), defined[name]))
        )
        for node in defined.get(name, ()):
            used = {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)}
            todo += [(file, other) for other in used & defined.keys()]
            todo += [imported[other] for other in used & imported.keys()]
    return "\n".join(strip_comments(parts[key]) for key in sorted(parts, key=str))


@cache
def top_level(file):
    """What a file defines and imports: its text, dict of name to statements, dict of name to (file, name there).

    file: relative to the root. Of imports only those of the recipe and NETWORKS; one of a whole module has None for the
    name there.
    """
    text = read_source(ROOT / file)
    defined, imported = {}, {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for leaf in (leaf for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)):
                defined.setdefault(leaf.id, []).append(node)
        files = {module: path.relative_to(ROOT).as_posix() for module, path in own_imports(node, ROOT / file)}
        for alias in node.names if files else ():
            if isinstance(node, ast.Import):
                module, name, there = alias.name, alias.name.split(".")[0], None
            elif f"{node.module}.{alias.name}" in files:
                module, name, there = f"{node.module}.{alias.name}", alias.name, None
            else:
                module, name, there = node.module, alias.name, alias.name
            if module in files and (not files[module].startswith("harness/") or files[module] in NETWORKS):
                imported[alias.asname or name] = (files[module], there)
    return text, defined, imported


def digest_definitions(things):
    """What functions and classes of the recipe do: dict of their names to the digests of their definitions."""
    return {thing.__name__: digest(definition_of(thing)) for thing in things}


def definition_of(thing):
    """`definition` of a function or class of the recipe; of one that is defined elsewhere, as in a test, its name."""
    path = Path(inspect.getsourcefile(thing)).resolve()
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] == "tests":
        return thing.__qualname__
    return definition(path.relative_to(ROOT).as_posix(), thing.__name__)


# ---------------------------------------------------------------------------------------------- what was changed


def show_changes(before, after, names):
    """A short diff of those source files among `names`, on lines of its own; before, after: dict of name to text."""
    lines = []
    for name in sorted(set(names) & (before.keys() | after.keys())):
        old, new = (strip_comments(texts.get(name, "")).splitlines() for texts in (before, after))
        lines += [line for line in difflib.unified_diff(old, new, name, name, n=0, lineterm="") if line[:3] != "---"]
    more = [f"… and {len(lines) - SHOWN_LINES} lines more"] if len(lines) > SHOWN_LINES else []
    return "".join(f"\n  {line}" for line in lines[:SHOWN_LINES] + more)


def whole_diff(before, after):
    """A unified diff of source files, as text; before and after: dict of name to text."""
    parts = []
    for name in sorted(before.keys() | after.keys()):
        old, new = (texts.get(name, "").splitlines(keepends=True) for texts in (before, after))
        parts += difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")
    return "".join(parts)
