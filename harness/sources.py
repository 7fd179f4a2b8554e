"""The source files that a result depends on: which they are, whether they were edited since, and what was changed."""

import ast
import difflib
import hashlib
import inspect
import io
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOWN_LINES = 12  # of a diff in an error message

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
    """The files that a training runs."""
    return imported_files("train.py")


def prediction_sources():
    """The files that a prediction runs."""
    return imported_files("inference.py")


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
    """The source of a function, class or constant of a file at the root, and of all of this repository that it uses.

    The harness is left out: it computes nothing that a network or a photo depends on. Raises KeyError for a name that
    is not defined there.
    """
    parts, todo = {}, [(ROOT / file, name)]
    while todo:
        path, name = todo.pop()
        if (path, name) in parts or path.parent != ROOT:
            continue
        text = read_source(path)
        tree = ast.parse(text)
        defined, imported = {}, {}
        for node in tree.body:
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                for leaf in ast.walk(target) if target is not None else ():
                    if isinstance(leaf, ast.Name):
                        defined.setdefault(leaf.id, []).append(node)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.setdefault(node.name, []).append(node)
            for module, module_file in own_imports(node, path):
                for alias in node.names:
                    imported[alias.asname or alias.name] = (
                        module_file,
                        alias.name if module == node_module(node) else "",
                    )
        if name == "":  # a whole module: what is used of it is not followed further
            parts[path, name] = text
            continue
        if name not in defined:
            continue
        segments = [ast.get_source_segment(text, node) for node in defined[name]]
        parts[path, name] = "\n".join(segments)
        for node in defined[name]:
            for leaf in ast.walk(node):
                if isinstance(leaf, ast.Name) and leaf.id in imported:
                    todo.append(imported[leaf.id])
                elif isinstance(leaf, ast.Name) and leaf.id in defined:
                    todo.append((path, leaf.id))
    return "\n".join(strip_comments(parts[key]) for key in sorted(parts, key=str))


def definition_of(thing):
    """`definition` of a function or class; its name alone if it is defined elsewhere, as in a test."""
    path = Path(inspect.getsourcefile(thing) or "").resolve()
    if path.parent != ROOT:
        return thing.__qualname__
    return definition(path.name, thing.__name__)


def node_module(node):
    """The module that a `from … import` names."""
    return getattr(node, "module", None)


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
