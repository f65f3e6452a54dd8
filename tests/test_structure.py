"""What the layout promises: imports without circles, arrows that point one way, no use of another's private names."""

from __future__ import annotations

import ast
import graphlib
import inspect
import sys
from pathlib import Path

import pytest

import smart_fast
from smart_fast import options

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "smart_fast"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = {name_of(path.parent / "__init__.py") for path in PACKAGE.rglob("__init__.py")}


def at_import(tree: ast.AST) -> list[ast.stmt]:
    """Statements that run when a module is imported: not those of functions, nor those for type checkers alone."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        found += [node, *at_import(node)]
    return found


def imports(name: str, nodes: list[ast.stmt]) -> dict[str, set[str]]:
    """The package's modules that ``nodes`` of module ``name`` import, and the names they take from each."""
    found: dict[str, set[str]] = {}
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = name.split(".")
        base = base[: len(base) - node.level + (name in PACKAGES)]
        source = ".".join([*base, *(node.module.split(".") if node.module else [])])
        for each in node.names:
            if f"{source}.{each.name}" in MODULES:
                found.setdefault(f"{source}.{each.name}", set())
            elif source in MODULES:
                found.setdefault(source, set()).add(each.name)
    return found


GRAPH = {name: set(imports(name, at_import(tree))) for name, tree in MODULES.items()}


def test_the_graph_is_there() -> None:
    assert "smart_fast.backends" in GRAPH["smart_fast.ascent.climb"]
    assert "smart_fast.ascent.modes" in GRAPH["smart_fast.prepared"]
    assert sum(map(len, GRAPH.values())) > 100


def test_no_circle_of_imports() -> None:
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError
    assert len(order) == len(MODULES)


@pytest.mark.parametrize(
    ("room", "knows_nothing_of"),
    [
        ("ascent", ("smart", "prepared", "perturbing", "layers", "methods", "integrations", "diagnostics")),
        (
            "backends",
            ("smart", "prepared", "options", "ascent", "methods", "integrations", "autograd", "losses.logits"),
        ),
        ("losses.divergences", ("backends", "autograd", "ascent", "smart")),
        ("autograd", ("smart", "options", "ascent", "methods", "losses.logits", "losses.linear")),
    ],
)
def test_arrows_point_one_way(room: str, knows_nothing_of: tuple[str, ...]) -> None:
    """Type checkers may look, and functions that are called late."""
    for name, sources in GRAPH.items():
        if f"{name}.".startswith(f"smart_fast.{room}."):
            wrong = [s for s in sources for each in knows_nothing_of if f"{s}.".startswith(f"smart_fast.{each}.")]
            assert not wrong, f"{name} imports {wrong}"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module makes: functions, classes, variables, fields and attributes of ``self``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {each for each in found if private(each)}


DEFINED = {name: defined(tree) for name, tree in MODULES.items()}


def reaches(name: str, tree: ast.AST) -> list[str]:
    """Private names of other modules of this package that a module imports or reads."""
    taken = [
        f"from {source} import {each}"
        for source, names in imports(name, list(ast.walk(tree))).items()
        for each in sorted(names)
        if private(each)
    ]
    others = set().union(*(names for module, names in DEFINED.items() if module != name)) - defined(tree)
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in others]
    return taken + [ast.unparse(node) for node in read if not ast.unparse(node).startswith(("torch.", "super()."))]


@pytest.mark.parametrize("name", MODULES)
def test_nobody_reaches_into_private_names(name: str) -> None:
    assert not reaches(name, MODULES[name])


def test_what_reaching_in_looks_like() -> None:
    code = "from .smart import _hidden\nfrom . import smart\ndef f(x): return x._prepared, self._own\nself._own = 1"
    assert reaches("smart_fast.other", ast.parse(code)) == ["from smart_fast.smart import _hidden", "x._prepared"]


def test_kernels_import_kernels() -> None:
    """The kernels stand by themselves: Triton and the standard library, no torch and nothing of smart_fast."""
    allowed = {"triton", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {each.name.split(".")[0] for each in node.names} <= allowed, path.name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in allowed, path.name


def test_smart_loss_is_one_screen() -> None:
    assert len((PACKAGE / "smart.py").read_text().splitlines()) <= 150


def test_every_option_is_in_the_signature_and_an_attribute() -> None:
    parameters = inspect.signature(smart_fast.SMARTLoss).parameters
    assert list(parameters) == ["eval_fn", "loss_fn", "loss_last_fn", *options.NAMES]
    smart = smart_fast.SMARTLoss(lambda x: x, smart_fast.kl_loss)
    assert all(getattr(smart, name) is parameters[name].default for name in options.NAMES)
    for name in options.NAMES:
        assert f"    {name}" in inspect.getdoc(options.Options) or f", {name}" in inspect.getdoc(options.Options)


def test_an_unknown_option_is_one_of_smart_loss() -> None:
    with pytest.raises(TypeError, match=r"^SMARTLoss.__init__\(\) got an unexpected keyword argument 'steps'$"):
        smart_fast.SMARTLoss(lambda x: x, smart_fast.kl_loss, steps=2)
