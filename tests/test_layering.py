"""The arrows between the layers, read from the imports themselves: they point down, and through a package's face."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

_BASE = {"errors", "units"}
_DATA = _BASE | {"records", "sizeclass", "layout"}
_KEPT = {"journal"}  # for the layers that keep private records
# layer: what it may import. `heapd_client` and what lies in `heapd` by its name there.
ARROWS: dict[str, set[str]] = {
    "units": set(),
    "errors": {"units"},
    "records": _BASE,
    "sizeclass": _BASE,
    "layout": _BASE | {"records", "sizeclass"},
    "journal": _BASE,
    "mutex": _BASE | {"records", "sizeclass"},
    "arena": _DATA | _KEPT | {"mutex"},
    "heap": _DATA | _KEPT | {"mutex", "arena"},
    "wire": _DATA - {"sizeclass"},
    "manager": _DATA | _KEPT | {"mutex", "arena", "heap"},
    "service": _DATA | {"mutex", "arena", "heap", "manager", "wire"},
    "server": _DATA | {"mutex", "arena", "heap", "manager", "wire", "service"},
    "cli": _DATA | {"mutex", "arena", "heap", "manager", "wire", "service", "server"},
    "__main__": {"cli"},
    "heapd_client": _DATA | {"mutex", "wire"},
    "workloads": _DATA,
}

# Exceptions, each with its reason.
ARROWS["manager"].add("wire")  # its operations are the requests: one dispatch table instead of two vocabularies
ARROWS["cli"] |= {"heapd_client", "workloads"}  # the commands that list, and the demo, are clients
ARROWS["workloads"] |= {"heapd_client", "wire"}  # programs that use heapd, and start private daemons

# What is imported past the package's face.
OPEN = (
    "heapd.wire.messages",  # the requests: too many for the face to repeat
    "heapd.workloads",  # programs that have little to do with each other; a face would load all of them for one
)

# Imported nowhere but in one file, because it hides what is dangerous about them.
SOLE_IMPORTERS = {"multiprocessing.shared_memory": "heapd/arena/segment.py"}
# Extras: never imported by a module as it loads.
EXTRAS = {"numpy", "matplotlib", "prometheus_client"}


def layer_of(module: str) -> str | None:
    """The layer of a dotted name, None if it is not ours or is `heapd` itself (its version, which all may read)."""
    parts = module.split(".")
    if parts[0] == "heapd":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] == "heapd_client" else None


def is_submodule(package: str, name: str) -> bool:
    """Whether `from package import name` gives a file or folder of the package, not something its face exports."""
    if layer_of(package) is None and package != "heapd":
        return False
    folder = ROOT.joinpath("client" if package.startswith("heapd_client") else ".", *package.split("."))
    face = folder / "__init__.py"
    if not face.is_file() or not ((folder / name).is_dir() or (folder / f"{name}.py").is_file()):
        return False
    exported = {
        alias.asname or alias.name
        for node in ast.parse(face.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return name not in exported


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each module that `tree` imports; `package` is where it lies."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            submodules = {f"{base}.{alias.name}" for alias in node.names if is_submodule(base, alias.name)}
            yield from ((node.lineno, name) for name in sorted(submodules) or [base])


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of `module`."""
    package = module if is_package else module.rpartition(".")[0]
    layer = layer_of(module)
    found = []
    for line, name in imported(ast.parse(source), package):
        target = layer_of(name)
        if target is None or layer is None or target == layer:
            continue
        if target not in ARROWS[layer]:
            found.append(f"{module}:{line}: {layer} must not import {target} ({name})")
        elif name.count(".") > (target != "heapd_client") and not name.startswith(OPEN):
            found.append(f"{module}:{line}: {name} is a file of another package; import from the package's face")
    return found


def sources() -> Iterator[tuple[Path, str]]:
    """(file, dotted name) of every module of both packages."""
    for top in (ROOT / "heapd", ROOT / "client" / "heapd_client"):
        for path in sorted(top.rglob("*.py")):
            yield path, ".".join(path.relative_to(top.parent).with_suffix("").parts).removesuffix(".__init__")


def test_every_import_points_down_and_through_the_face() -> None:
    """No module imports a layer it is not drawn above, nor a file of another package."""
    found = [
        line
        for path, module in sources()
        for line in violations(path.read_text(), module, is_package=path.name == "__init__.py")
    ]
    assert not found, "\n" + "\n".join(found)


def test_every_module_is_in_a_layer() -> None:
    """A new module or package has to be given its place among the arrows."""
    layers = {layer for _, module in sources() if (layer := layer_of(module))}
    assert layers <= ARROWS.keys()


def test_the_arrows_have_no_cycle() -> None:
    """The table itself is layered: there is an order in which each layer comes after all it imports."""
    placed: set[str] = set()
    while len(placed) < len(ARROWS):
        ready = {layer for layer, below in ARROWS.items() if below <= placed} - placed
        assert ready, f"a cycle among {ARROWS.keys() - placed}"
        placed |= ready


@pytest.mark.parametrize(("name", "file"), SOLE_IMPORTERS.items())
def test_what_is_dangerous_is_imported_in_one_file(name: str, file: str) -> None:
    """Modules with a sole importer are not imported elsewhere."""
    parent, _, last = name.rpartition(".")
    importers = set()
    for path, _ in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            else:
                continue
            if name in names:
                importers.add(path.relative_to(ROOT).as_posix())
    assert importers <= {file}, f"{last} of {parent}"


def test_pthread_is_called_in_one_file() -> None:
    """Only heapd/mutex.py names a pthread function of the C library."""
    users = {
        path.relative_to(ROOT).as_posix()
        for path, _ in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr.startswith("pthread_mutex"))
        or (isinstance(node, ast.Constant) and str(node.value).startswith("pthread_mutex"))
    }
    assert users <= {"heapd/mutex.py"}


def test_extras_are_not_needed_to_import() -> None:
    """numpy and the other optional packages are imported only inside functions or for type checkers."""
    found = []
    for path, module in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                found += [f"{module}:{node.lineno}: {name}" for name in names if name.split(".")[0] in EXTRAS]
    assert not found


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("heapd.heap.slab", "from heapd.manager import HeapManager", "must not import manager"),
        ("heapd.heap.slab", "import heapd.server", "must not import server"),
        ("heapd.heap.slab", "from ..manager import sessions", "must not import manager"),
        ("heapd.heap.slab", "def f():\n    from heapd.wire import codec", "must not import wire"),
        ("heapd.heap.slab", "from heapd import wire", "must not import wire"),
        ("heapd.heap.slab", "from heapd.arena.segment import Segment", "face"),
        ("heapd.heap.slab", "from heapd.arena import segment", "face"),
        ("heapd_client.block", "from heapd.arena import Arena", "must not import arena"),
        ("heapd.service.service", "import heapd_client", "must not import heapd_client"),
        ("heapd.cli.walk", "from heapd_client.block import Block", "face"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, complaint: str) -> None:
    """The check sees every form of import, also inside functions."""
    [found] = violations(source, module)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "heapd.heap.slab",
            "from heapd.arena import Arena\nfrom heapd.units import KIB\nfrom heapd.heap.space import Space",
        ),
        ("heapd.heap.slab", "from heapd import __version__\nimport heapd\nimport os.path"),
        ("heapd.service.service", "from heapd.wire.messages import Hello\nfrom heapd.wire import messages"),
        ("heapd.cli.walk", "import heapd_client as hc\nfrom heapd_client import connect"),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    """Downward imports through the face, and those of the package's own files, are fine."""
    assert violations(source, module) == []
