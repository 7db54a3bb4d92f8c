# SPDX-License-Identifier: Apache-2.0
"""Where code lives and who knows whom is as docs/architecture.md draws it."""

import ast
import re
from importlib.util import resolve_name
from pathlib import Path

import fixed_size_kv_cache

ROOT = Path(__file__).resolve().parents[2]
OURS = "fixed_size_kv_cache"
DOCUMENT = (ROOT / "docs/architecture.md").read_text()


def section(title: str) -> str:
    """The text under a heading, up to the next."""
    _, found, after = DOCUMENT.partition(f"\n## {title}\n")
    assert found, title
    return after.partition("\n## ")[0]


# ---- Python ----------------------------------------------------------------------------------------------------------


def read_modules() -> dict[str, ast.Module]:
    """All modules by names such as ``layer/slots``. An ``__init__`` that only says what its room is for is none."""
    found = {}
    for path in sorted((ROOT / "python" / OURS).rglob("*.py")):
        tree = ast.parse(path.read_text())
        if len(tree.body) > 1 or ast.get_docstring(tree) is None:
            found[path.relative_to(ROOT / "python" / OURS).with_suffix("").as_posix()] = tree
    return found


MODULES = read_modules()
ROWS = re.findall(r"^\| `([\w/]+)` \|", section("The Python package"), re.MULTILINE)
FLOORS = [line.split() for line in re.findall(r"^ {4}(.+)", section("The Python package"), re.MULTILINE)]


def room_of(module: str) -> str:
    room, inside, _ = module.partition("/")
    return room + inside


def find_imports(module: str) -> set[str]:
    """What a module imports, inside functions too, as full names; ``a.b.name`` for ``from a.b import name``."""
    found = set()
    package = ".".join([OURS, *module.split("/")[:-1]])
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{source}.{alias.name}" for alias in node.names}
    if module == "__init__":  # the public names, loaded by name
        found |= {f"{OURS}.{place}" for place in fixed_size_kv_cache._HUGGING_FACE.values()}
    return found


def known_by(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    found = set()
    for name in find_imports(module) - {f"{OURS}._C"}:  # the compiled part
        first, *parts = name.split(".")
        if first == OURS:
            places = ["/".join([*parts[:n], *last]) for n in range(len(parts), -1, -1) for last in ([], ["__init__"])]
            found.add(next(place for place in places if place in MODULES))
    return found


def test_the_table_names_every_module_once():
    assert sorted(ROWS) == sorted(MODULES)


def test_the_drawing_names_every_room_once():
    assert sorted(room for floor in FLOORS for room in floor) == sorted({room_of(module) for module in MODULES})


def test_imports_lead_down():
    """So there is no circle either."""
    known = {module: known_by(module) for module in MODULES}
    assert "huggingface/measuring" in known["cli/perplexity"]  # not at the top of a file
    assert "huggingface/enabling" in known["__init__"]
    floor_of = {room: at for at, floor in enumerate(FLOORS) for room in floor}
    wrong = [
        f"{module} imports {other}"
        for module, others in known.items()
        for other in others
        if ROWS.index(other) <= ROWS.index(module)
        or (room_of(other) != room_of(module) and floor_of[room_of(other)] <= floor_of[room_of(module)])
    ]
    assert wrong == []


def test_the_rooms_that_know_transformers():
    rooms = re.search(r"^Only ([^.]*) import transformers", section("The Python package"), re.MULTILINE)[1]
    known = {module: {name.partition(".")[0] for name in find_imports(module)} for module in MODULES}
    assert set(re.findall(r"`(.+?)`", rooms)) == {room_of(x) for x, names in known.items() if "transformers" in names}
    assert {room_of(x) for x, names in known.items() if names & {"rich", "typer"}} == {"cli/"}
    assert {room_of(x) for x, names in known.items() if "vllm" in names} == {"vllm/"}


# ---- C++ and CUDA ----------------------------------------------------------------------------------------------------


def includes(folder: str) -> list[tuple[str, str]]:
    """Every file of a folder with each of its includes; those of our own as paths from the root."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.*")):
        for name in re.findall(r'^ *#include ["<](.+?)[">]', path.read_text(), re.MULTILINE):
            beside = (path.parent / name).resolve()
            name = beside.relative_to(ROOT).as_posix() if beside.exists() else name
            found.append((path.relative_to(ROOT).as_posix(), name))
    assert found
    return found


def test_kernels_know_neither_torch_nor_python_nor_each_other():
    others = ("torch/", "ATen/", "c10/", "csrc/", "pybind11/", "Python.h")
    assert [pair for pair in includes("kernels") if pair[1].startswith(others)] == []
    assert [pair for pair in includes("kernels/cpu") if pair[1].startswith(("kernels/cuda/", "cuda"))] == []
    assert [pair for pair in includes("kernels/cuda") if pair[1].startswith("kernels/cpu/")] == []
    contracts = [pair for pair in includes("kernels") if pair[0].count("/") == 1]
    assert [pair for pair in contracts if pair[1].startswith(("kernels/cpu/", "kernels/cuda/"))] == []


def test_the_glue_knows_kernels_through_their_contracts():
    doors = re.findall(r"`(kernels/\w+/\w+\.h)`", section("Who may know whom"))
    used = {name for _, name in includes("csrc") if name.startswith("kernels/") and name.count("/") > 1}
    assert used == set(doors)
    assert {file for file, name in includes("csrc") if name.startswith("pybind11/")} == {"csrc/module.cpp"}
