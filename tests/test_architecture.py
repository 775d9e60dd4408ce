"""The rules of the tree: who may import what, and how large a file may be. Reads sources only."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raysl"
TESTS = ROOT / "tests"

# A room (a folder or a file of raysl/) may import from lower floors and from itself.
FLOORS = [
    ["errors"],
    ["config", "folder"],
    ["nn", "augment", "track"],
    ["methods", "sources", "optim", "weights"],
    ["data"],
    ["train", "evaluate", "encoder", "pack"],
    ["recipe", "exchange", "retrieval"],
    ["sweep"],
    ["report"],
    ["jobs"],
    ["runtime"],
    ["commands"],
    ["cli"],
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The entrances know every room and no room knows them.
ENTRANCES = {"__init__", "__main__"}

ONLY_IN = {"ray": "runtime/", "mlflow": "track/mlflow_", "yaml": "config/load.py"}
METHODS_DO_NOT_KNOW = {"ray", "mlflow", "logging", "torch.distributed", "torch.optim"}
NOT_A_NAME = {"utils", "util", "helpers", "helper", "common", "misc", "core", "tools"}

MAX_LINES = 400
MAX_TEST_LINES = 500
MAX_FUNCTION_LINES = 60


class Import(NamedTuple):
    module: str
    line: int


def sources(root: Path = PACKAGE) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, inside functions too, also by name and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (Import(f"{prefix}.{alias.name}", node.lineno) for alias in node.names)
    yield from by_name(path)


def by_name(path: Path) -> Iterator[Import]:
    """Yield what a file imports by a name that stands there: libraries that may be missing."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield Import(str(name.value), node.lineno)


def rooms_imported(path: Path) -> set[tuple[str, int]]:
    found = ((i.module.split("."), i.line) for i in imports(path))
    return {(parts[1], line) for parts, line in found if parts[0] == "raysl" and len(parts) > 1}


every_source = pytest.mark.parametrize("path", sources(), ids=relative)


def test_every_room_has_a_floor_and_every_floor_is_there() -> None:
    rooms = {room_of(path) for path in sources()} - ENTRANCES
    assert rooms <= set(FLOOR_OF), f"give {rooms - set(FLOOR_OF)} a floor"
    assert sum(map(len, FLOORS)) == len(FLOOR_OF)


@every_source
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    top = len(FLOORS)
    floor = top if room in ENTRANCES else FLOOR_OF[room]
    wrong = [
        f"{relative(path)}:{line} imports {other}"
        for other, line in sorted(rooms_imported(path))
        if other != room and FLOOR_OF.get(other, -1 if room in ENTRANCES else top) >= floor
    ]
    assert not wrong


@every_source
def test_imports_are_absolute(path: Path) -> None:
    assert [i for i in imports(path) if i.module.startswith(".")] == []


@every_source
def test_own_modules_are_not_imported_by_name(path: Path) -> None:
    """Such an import has no types; what must load late is imported inside a function."""
    assert [call.module for call in by_name(path) if call.module.startswith("raysl")] == []


@every_source
@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_known_in_one_place_only(path: Path, library: str) -> None:
    here = path.relative_to(PACKAGE).as_posix()
    if not here.startswith(ONLY_IN[library]):
        assert [i for i in imports(path) if i.module.split(".")[0] == library] == []


@pytest.mark.parametrize("path", sources(PACKAGE / "methods"), ids=relative)
def test_a_method_knows_no_cluster_no_tracker_no_optimizer_and_no_other_method(path: Path) -> None:
    for module, line in imports(path):
        assert not any(
            module == name or module.startswith(name + ".") for name in METHODS_DO_NOT_KNOW
        ), f"{relative(path)}:{line} imports {module}"
        if module.startswith("raysl.methods."):
            assert module.split(".")[2] == "base", f"{relative(path)}:{line} imports {module}"


@every_source
def test_a_room_or_file_is_named_for_what_it_is(path: Path) -> None:
    names = {part.removesuffix(".py").strip("_") for part in path.relative_to(PACKAGE).parts}
    assert names.isdisjoint(NOT_A_NAME)


@every_source
def test_no_exception_is_swallowed_whole(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{relative(path)}:{node.lineno}: a bare except"


@pytest.mark.parametrize("path", [*sources(), *sources(TESTS)], ids=relative)
def test_a_file_is_not_too_long(path: Path) -> None:
    limit = MAX_TEST_LINES if path.is_relative_to(TESTS) else MAX_LINES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@every_source
def test_a_function_is_not_too_long(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{relative(path)}: {node.name} has {lines} lines"


def test_tests_share_fixtures_and_no_module_of_helpers() -> None:
    names = {path.name for path in sources(TESTS)}
    # The latter is what other processes run: they could not find a fixture.
    allowed = {"conftest.py", "__init__.py", "two_ranks.py"}
    assert {name for name in names if not name.startswith("test_")} <= allowed
