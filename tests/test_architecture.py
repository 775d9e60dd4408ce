"""The rules of the tree: who may import what, and how large a file may be. Reads sources only."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raysl"
TESTS = ROOT / "tests"

# A room (a folder or a file of raysl/) may import from lower floors and from itself.
FLOORS = [
    ["errors"],
    ["config", "folder"],
    ["nn", "augment", "track"],
    ["methods", "sources", "optim"],
    ["data", "store"],
    ["train", "encoder"],
    ["evaluate", "exchange", "report"],
    ["run"],
    ["pack"],
    ["embed"],
    ["downstream", "sweep", "benchmark"],
    ["config_reference"],
    ["cli"],
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The entrances know every room and no room knows them.
ENTRANCES = {"__init__", "__main__"}
# A command stands below cli, whatever its room: it may use every room, only commands use it.
COMMAND = "command"
COMMAND_FLOOR = FLOOR_OF["cli"]

ONLY_IN = {"ray": "*/ray_*.py", "mlflow": "track/mlflow_*.py", "yaml": "config/yaml_text.py"}
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


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Every part of a file; each file is read once, whatever number of rules looks at it."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports(path: Path) -> list[Import]:
    """Every import of a file, inside functions too, also by name and under TYPE_CHECKING."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[Import]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (Import(f"{prefix}.{alias.name}", node.lineno) for alias in node.names)
    yield from by_name(path)


def by_name(path: Path) -> Iterator[Import]:
    """Yield what a file imports by a name that stands there: libraries that may be missing."""
    for node in nodes(path):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield Import(str(name.value), node.lineno)


def is_command(name: str) -> bool:
    return name == COMMAND or name.endswith(f"_{COMMAND}")


def floor_of(path: Path) -> int:
    """The floor that a file stands on: its room's, or the commands'."""
    room = room_of(path)
    if room in ENTRANCES:
        return len(FLOORS)
    return COMMAND_FLOOR if is_command(path.stem) else FLOOR_OF[room]


def own_imports(path: Path) -> set[tuple[str, str, int]]:
    """What a file imports of raysl: room, module (or name) in the room, line."""
    parts = ((i.module.split("."), i.line) for i in imports(path))
    return {
        (words[1], words[2] if len(words) > 2 else "", line)
        for words, line in parts
        if words[0] == "raysl" and len(words) > 1
    }


def test_there_are_sources_to_look_at() -> None:
    for root in (PACKAGE, PACKAGE / "methods", TESTS):
        assert len(sources(root)) > 20
    assert sum(len(imports(path)) for path in sources()) > len(sources())


def test_every_room_has_a_floor_and_every_floor_is_there() -> None:
    rooms = {room_of(path) for path in sources()} - ENTRANCES
    assert rooms <= set(FLOOR_OF), f"give {rooms - set(FLOOR_OF)} a floor"
    assert sum(map(len, FLOORS)) == len(FLOOR_OF)


def test_imports_point_down() -> None:
    top = len(FLOORS)
    wrong = []
    for path in sources():
        room, floor = room_of(path), floor_of(path)
        for other, module, line in sorted(own_imports(path)):
            known = FLOOR_OF.get(other, -1 if room in ENTRANCES else top)
            if is_command(module):
                down = is_command(path.stem) or room in ENTRANCES
            else:
                down = other == room or known < floor
            if not down:
                wrong.append(f"{relative(path)}:{line} imports {other}.{module}")
    assert not wrong


def test_imports_are_absolute() -> None:
    assert not [
        f"{relative(path)}:{line} imports {module}"
        for path in sources()
        for module, line in imports(path)
        if module.startswith(".")
    ]


def test_own_modules_are_not_imported_by_name() -> None:
    """Such an import has no types; what must load late is imported inside a function."""
    assert not [
        f"{relative(path)}:{call.line} imports {call.module} by name"
        for path in sources()
        for call in by_name(path)
        if call.module.startswith("raysl")
    ]


def test_a_library_is_known_in_one_place_only() -> None:
    wrong = []
    for path in sources():
        here = path.relative_to(PACKAGE).as_posix()
        elsewhere = {library for library, place in ONLY_IN.items() if not fnmatch(here, place)}
        wrong += [
            f"{relative(path)}:{line} imports {module}"
            for module, line in imports(path)
            if module.split(".")[0] in elsewhere
        ]
    assert not wrong


def test_a_method_knows_no_cluster_no_tracker_no_optimizer_and_no_other_method() -> None:
    wrong = []
    for path in sources(PACKAGE / "methods"):
        for module, line in imports(path):
            unknown = any(
                module == name or module.startswith(name + ".") for name in METHODS_DO_NOT_KNOW
            )
            other = module.startswith("raysl.methods.") and module.split(".")[2] != "base"
            if unknown or other:
                wrong.append(f"{relative(path)}:{line} imports {module}")
    assert not wrong


def test_a_room_or_file_is_named_for_what_it_is() -> None:
    for path in sources():
        names = {part.removesuffix(".py").strip("_") for part in path.relative_to(PACKAGE).parts}
        assert names.isdisjoint(NOT_A_NAME), relative(path)


def test_no_exception_is_swallowed_whole() -> None:
    assert not [
        f"{relative(path)}:{node.lineno}: a bare except"
        for path in sources()
        for node in nodes(path)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


def test_a_file_is_not_too_long() -> None:
    limits = {path: MAX_LINES for path in sources()} | {
        path: MAX_TEST_LINES for path in sources(TESTS)
    }
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in limits}
    assert not [
        f"{relative(path)} has {lengths[path]} lines, at most {limit}"
        for path, limit in limits.items()
        if lengths[path] > limit
    ]


def test_a_function_is_not_too_long() -> None:
    wrong = []
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    wrong.append(f"{relative(path)}:{node.lineno}: {node.name} has {lines} lines")
    assert not wrong


def test_tests_share_fixtures_and_no_module_of_helpers() -> None:
    names = {path.name for path in sources(TESTS)}
    # The latter is what other processes run: they could not find a fixture.
    allowed = {"conftest.py", "__init__.py", "two_ranks.py"}
    assert {name for name in names if not name.startswith("test_")} <= allowed
