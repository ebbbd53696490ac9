"""The architecture holds: imports point one way, heavy libraries wait, every module says what is public.

Modules are parsed, not imported, but for one test that asks a fresh process what importing pulled in.
The same checks find every kind of violation in a package made to be bad.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dsv3_tools"

RANKS = {
    "cli": 5,
    "verify": 4,
    "quantize": 4,
    "conversion": 3,
    "model": 3,
    "formats": 2,
    "engines": 2,
    "kernels": 1,
    "checkpoint": 1,
    "errors": 0,
}
"""A module may import from its own part of the package and from parts of a lower rank."""

ALLOWED_ONLY_IN = {
    "click": ("cli/",),
    "rich": ("cli/",),
    "rich_click": ("cli/",),
    "triton": ("kernels/triton_",),
    "numba": ("kernels/",),
    "llvmlite": ("kernels/",),
    "plotly": ("verify/page/page.py",),
    "tokenizers": ("model/tokenizer.py",),
    # Test oracles and engines: nothing of the program may lean on them.
    "safetensors": (),
    "transformers": (),
    "compressed_tensors": (),
    "pickle": ("model/launch.py",),  # between the processes of one run, never from files
}

MAX_LINES = 320


@dataclass(frozen=True)
class Import:
    """One imported module, and whether importing the importer imports it at once."""

    target: str
    at_once: bool


@dataclass(frozen=True)
class Module:
    """One source file of the package under `root`."""

    root: Path
    path: Path

    @property
    def place(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @property
    def name(self) -> str:
        parts = [self.root.name, *self.path.relative_to(self.root).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def part(self) -> str:
        """The part of the package that it belongs to; empty for the package's own `__init__`."""
        return [*self.name.split("."), ""][1]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(), str(self.path))

    def imports(self) -> Iterator[Import]:
        yield from self._imports(self.tree.body, at_once=True)

    def _imports(self, body: list[ast.stmt], *, at_once: bool) -> Iterator[Import]:
        for node in body:
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, at_once) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.place}: relative import"
                assert node.module is not None
                yield from (Import(self._resolve(node.module, alias.name), at_once) for alias in node.names)
            else:
                now = at_once and not _is_deferred(node)
                inner = [child for child in ast.walk(node) if child is not node]
                yield from self._imports(
                    [c for c in inner if isinstance(c, (ast.Import, ast.ImportFrom))], at_once=now
                )

    def _resolve(self, module: str, name: str) -> str:
        """`from package import name`: a module if there is such a file, or else an attribute."""
        folder = self.root.parent.joinpath(*module.split("."))
        is_module = (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()
        return f"{module}.{name}" if is_module else module


def _is_deferred(node: ast.stmt) -> bool:
    """Whether imports in `node` wait: in a function, or for type checkers only."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return True
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def modules(root: Path) -> list[Module]:
    return [Module(root, path) for path in sorted(root.rglob("*.py"))]


def direction(module: Module) -> Iterator[str]:
    if not module.part:
        return  # the package's front door names its rooms, in strings and for type checkers
    for found in module.imports():
        if not found.target.startswith(f"{module.root.name}."):
            continue
        part = found.target.split(".")[1]
        if part != module.part and RANKS[part] >= RANKS[module.part]:
            yield f"{module.place} imports {found.target}"


def libraries(module: Module) -> Iterator[str]:
    for found in module.imports():
        top = found.target.split(".")[0]
        if top in ALLOWED_ONLY_IN and not module.place.startswith(ALLOWED_ONLY_IN[top]):
            yield f"{module.place} imports {top}"


def public_names(module: Module) -> Iterator[str]:
    """What `__all__` leaves out, or names without there being such a thing."""
    listed: list[str] | None = None
    known: set[str] = set()
    public: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= {alias.asname or alias.name for alias in node.names}
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
            if not node.name.startswith("_"):
                public.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {name.id for name in targets if isinstance(name, ast.Name)}
            known |= names
            if "__all__" in names:
                assert node.value is not None
                listed = ast.literal_eval(node.value)
    if listed is None:
        if public:
            yield f"{module.place} has no __all__"
        return
    yield from (f"{module.place}: {name} is not in __all__" for name in sorted(public - set(listed)))
    yield from (f"{module.place}: __all__ names {name}" for name in listed if name not in known)
    if len(set(listed)) < len(listed):
        yield f"{module.place}: __all__ names something twice"


def docstrings(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree) and module.path.stat().st_size:
        yield f"{module.place} has no docstring"
    for node in module.tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        members = node.body if isinstance(node, ast.ClassDef) else []
        methods = [m for m in members if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
        yield from (
            f"{module.place}: {found.name} has no docstring"
            for found in (node, *methods)
            if not ast.get_docstring(found)
        )


def length(module: Module) -> Iterator[str]:
    lines = len(module.path.read_text().splitlines())
    if lines > MAX_LINES and module.part != "kernels":
        yield f"{module.place} has {lines} lines"


def printing(module: Module) -> Iterator[str]:
    if module.place == "cli/output.py":
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{module.place}:{node.lineno} prints"


def cycles(root: Path) -> list[str]:
    """Returns every module that, at import, waits for itself."""
    graph = {m.name: {i.target for i in m.imports() if i.at_once} for m in modules(root)}

    def reaches(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name in graph and name not in seen:
                seen.add(name)
                waiting += graph[name]
        return seen

    return [f"{name} imports itself" for name in graph if name in reaches(name)]


CHECKS = (direction, libraries, public_names, docstrings, length, printing)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("module", modules(PACKAGE), ids=lambda module: module.place)
def test_module(check, module: Module) -> None:
    assert list(check(module)) == []


def test_no_module_imports_itself_in_a_circle() -> None:
    assert cycles(PACKAGE) == []


def test_every_part_has_a_rank() -> None:
    assert {module.part for module in modules(PACKAGE)} - {""} <= RANKS.keys()


BAD = {
    "checkpoint/reader.py": (
        '"""Bad."""\nfrom dsv3_tools.formats import Dense\nimport click\n__all__ = ["gone"]\n',
        {direction: "imports dsv3_tools.formats", libraries: "imports click", public_names: "names gone"},
    ),
    "conversion/plan.py": (
        '"""Bad."""\n\ndef late() -> None:\n    """Late."""\n    import numba.core\n'
        "    from dsv3_tools import verify\n    print(verify)\n",
        {
            direction: "imports dsv3_tools.verify",
            libraries: "imports numba",
            printing: ":7 prints",
            public_names: "has no __all__",
        },
    ),
    "kernels/cpu.py": (
        '__all__ = ["a", "a"]\n\ndef a():\n    import triton\n\ndef b():\n    """B."""\n',
        {docstrings: "a has no docstring", libraries: "imports triton", public_names: "b is not in __all__"},
    ),
    "kernels/nonfinite.py": ('"""."""\nimport dsv3_tools.checkpoint.names\n', {direction: "imports dsv3"}),
    "verify/tensors.py": (
        '"""."""\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n'
        "    from dsv3_tools.quantize.recipe import Recipe\n" + "x = 1\n" * 320,
        {direction: "imports dsv3_tools.quantize", length: "has 324 lines"},
    ),
    "verify/logits.py": (
        '"""."""\n__all__ = ["C"]\n\nclass C:\n    """C."""\n    def f(self):\n        pass\n',
        {docstrings: "f has no docstring"},
    ),
    "formats/a.py": ('"""."""\nfrom dsv3_tools.formats.b import x\n', {}),
    "formats/b.py": ('"""."""\nfrom dsv3_tools.formats import a\n', {}),
    "formats/c.py": (
        '"""."""\ndef f():\n    from dsv3_tools.formats import c\n',
        {public_names: "no __all__"},
    ),
}


@pytest.fixture
def bad_package(tmp_path: Path) -> Path:
    root = tmp_path / "dsv3_tools"
    for place, (text, _) in BAD.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(text)
        (root / place).with_name("__init__.py").touch()
    (root / "quantize").mkdir()
    return root


@pytest.mark.parametrize("place", BAD)
def test_negative_control_every_kind_of_violation_is_found(bad_package: Path, place: str) -> None:
    module = Module(bad_package, bad_package / place)
    for check, problem in BAD[place][1].items():
        assert any(problem in found for found in check(module)), (check.__name__, list(check(module)))


def test_negative_control_a_circle_is_found(bad_package: Path) -> None:
    assert cycles(bad_package) == [
        "dsv3_tools.formats.a imports itself",
        "dsv3_tools.formats.b imports itself",
    ]


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def light_modules() -> list[str]:
    parts = {"", "cli", "checkpoint", "formats", "verify", "errors"}
    return [module.name for module in modules(PACKAGE) if module.part in parts]


def test_importing_waits_for_heavy_libraries() -> None:
    loaded = loaded_after("\n".join(f"import {name}" for name in light_modules()))
    assert "rich_click" in loaded
    assert loaded & {"torch", "numba", "triton", "transformers", "safetensors", "plotly"} == set()


def test_the_front_door_imports_nothing_else() -> None:
    loaded = loaded_after("import dsv3_tools")
    assert loaded & {"torch", "numba", "triton", "numpy", "click", "rich", "rich_click"} == set()


def test_negative_control_kernels_do_import_torch() -> None:
    assert "torch" in loaded_after("import dsv3_tools.kernels.reference")
