"""The house rules that a machine can check: who imports what, sizes, and what never appears in this code base.

Every checker is a pure function from a parsed file to the list of its problems; `test_checker_can_fail` at the end feeds
each of them a bad snippet.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent

LIBRARY = {
    *("core", "methods", "guards", "paths", "sources", "data", "models", "users", "scorers"),
    *("training", "evaluation", "testbed", "inference", "labelling", "locations"),
}
# A package or top-level module of diffpref, and the others it may import. Its own files and `import diffpref` (the version
# string) are free, except that methods do not import each other.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "locations": set(),
    "core": set(),
    "methods": {"core"},
    "guards": {"core"},
    "paths": {"core"},
    "models": {"core", "locations"},
    "scorers": {"core", "locations"},
    "data": {"core", "locations"},
    "users": {"core", "locations"},
    "sources": {"core", "paths", "data"},
    "evaluation": {"core", "data", "locations"},
    "inference": {"core", "data", "paths", "models", "users", "scorers", "evaluation", "locations"},
    "labelling": {"core", "data", "evaluation", "inference", "locations"},
    "training": LIBRARY - {"testbed"},
    "testbed": LIBRARY,
    "cli": LIBRARY,
    "api": LIBRARY,
}
MATHS = {"core", "methods", "guards", "paths"}  # torch and the standard library only: their tests start in a second
OUTSIDE = {"scripts", "pipelines", "tests", "benchmarks"}  # what the library and the scripts never import
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

FILE_LINES = 400
METHOD_LINES = 120
FUNCTION_LINES = 50
NESTING = 4

# Folders that exist on somebody's machine only. Written so that this line does not match itself.
MACHINE_PATH = re.compile(
    r"""(?:^|[\s"'`=(\[,:])(?:/(?:home|Users|root|work|workspace|mnt|media|opt|srv|scratch|tmp)/\w|[A-Z]:\\+Users)""", re.MULTILINE
)
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".html", ".sh", ".txt"}

Checker = Callable[[str, str], list[str]]  # (source text, path relative to the root) -> problems, "line: what"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def component(path: str) -> str:
    """The package or top-level module of diffpref that a file belongs to: "core" for diffpref/core/types.py."""
    parts = Path(path).with_suffix("").parts
    return parts[1] if parts[0] == "diffpref" else ""


def imports(source: str, path: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported, also inside functions, relatively or by a literal name."""
    package = Path(path).parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join((*base, node.module) if node.module else base)
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def functions(source: str) -> Iterator[Function]:
    """Every function and method of a file, nested ones too."""
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def check_layers(source: str, path: str) -> list[str]:
    """Imports inside diffpref follow MAY_IMPORT."""
    own, problems = component(path), []
    for line, name in imports(source, path):
        top, *rest = name.split(".")
        target = rest[0] if rest and rest[0] in MAY_IMPORT else "__init__"
        if top != "diffpref" or target in {own, "__init__"}:
            continue
        if target not in MAY_IMPORT[own]:
            problems.append(f"{line}: {own} must not import {name}")
    return problems


def check_methods_stand_alone(source: str, path: str) -> list[str]:
    """A method file imports no other method; shared mathematics goes to core."""
    if component(path) != "methods" or path.endswith("__init__.py"):
        return []
    found = imports(source, path)
    return [f"{line}: a method imports {name}; move what they share to core" for line, name in found if name.startswith("diffpref.methods")]


def check_maths_imports(source: str, path: str) -> list[str]:
    """core, methods, guards and paths import torch and the standard library only."""
    if component(path) not in MATHS:
        return []
    allowed = sys.stdlib_module_names | {"torch", "diffpref"}
    found = imports(source, path)
    return [f"{line}: {component(path)} must not import {name}" for line, name in found if name.split(".")[0] not in allowed]


def check_outside(source: str, path: str) -> list[str]:
    """The library, scripts and pipelines import none of scripts, pipelines, tests and benchmarks."""
    if Path(path).parts[0] in {"tests", "benchmarks"}:
        return []
    return [f"{line}: imports {name}" for line, name in imports(source, path) if name.split(".")[0] in OUTSIDE]


def check_file_size(source: str, path: str) -> list[str]:
    """A file stays under the limit of its kind."""
    limit = METHOD_LINES if component(path) == "methods" else FILE_LINES
    lines = len(source.splitlines())
    return [f"{lines}: {lines} lines, at most {limit}"] if lines > limit else []


def check_function_size(source: str, path: str) -> list[str]:
    """A function, docstring included, fits on a screen."""
    sizes = [(node, node.end_lineno - node.lineno + 1) for node in functions(source) if node.end_lineno]
    return [f"{node.lineno}: {node.name} has {size} lines, at most {FUNCTION_LINES}" for node, size in sizes if size > FUNCTION_LINES]


def depth(node: ast.AST) -> int:
    """Levels of blocks below a statement; a nested function or class starts again, `elif` does not add one."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        is_block = isinstance(
            child, ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.TryStar | ast.Match
        )
        deepest = max(deepest, depth(child) + (is_block and not is_elif))
    return deepest


def check_nesting(source: str, path: str) -> list[str]:
    """Blocks inside a function nest at most NESTING deep."""
    deep = [(node, depth(node)) for node in functions(source)]
    return [f"{node.lineno}: {node.name} nests {levels} blocks, at most {NESTING}" for node, levels in deep if levels > NESTING]


def check_docstrings(source: str, path: str) -> list[str]:
    """Every public class and module-level function of the library says what it is."""
    if not path.startswith("diffpref/"):
        return []
    nodes = [node for node in ast.parse(source).body if isinstance(node, Function | ast.ClassDef)]
    bare = [node for node in nodes if not node.name.startswith("_") and not ast.get_docstring(node)]
    return [f"{node.lineno}: {node.name} has no docstring" for node in bare]


def is_true(node: ast.expr | None) -> bool:
    """Whether an expression is the literal True."""
    return isinstance(node, ast.Constant) and node.value is True


def check_unsafe_loading(source: str, path: str) -> list[str]:
    """No torch.load without weights_only=True, no pickle, no allow_pickle=True."""
    found = list(imports(source, path))
    problems = [f"{line}: imports {name}" for line, name in found if name.split(".")[0] in PICKLES]
    problems += [f"{line}: import torch, then torch.load" for line, name in found if name == "torch.load"]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if ast.unparse(node.func) == "torch.load" and not is_true(keywords.get("weights_only")):
            problems.append(f"{node.lineno}: torch.load without weights_only=True")
        if is_true(keywords.get("allow_pickle")):
            problems.append(f"{node.lineno}: allow_pickle=True")
    return problems


def check_remote_code(source: str, path: str) -> list[str]:
    """Code from a hub is never run: trust_remote_code=True appears neither as an argument nor in a dictionary."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and is_true(node.value):
            lines.append(node.lineno)
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            lines += [v.lineno for k, v in pairs if isinstance(k, ast.Constant) and k.value == "trust_remote_code" and is_true(v)]
    return [f"{line}: trust_remote_code=True" for line in lines]


def check_bare_except(source: str, path: str) -> list[str]:
    """Every handler names what it catches."""
    nodes = ast.walk(ast.parse(source))
    return [
        f"{node.lineno}: except without an exception type" for node in nodes if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


def check_machine_paths(source: str, path: str) -> list[str]:
    """No path of one person's machine."""
    return [
        f"{source.count(chr(10), 0, m.end()) + 1}: {m.group().strip()}..., a path of one machine" for m in MACHINE_PATH.finditer(source)
    ]


def python_files() -> list[Path]:
    """Every Python file of the project."""
    folders = ("diffpref", *sorted(OUTSIDE))
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def text_files() -> list[Path]:
    """Python, and what is written for people and for tools: pages, configuration, shell."""
    folders = ("assets", "configs", "docs", ".github")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in TEXT_SUFFIXES]
    top = [path for path in ROOT.iterdir() if path.suffix in TEXT_SUFFIXES]
    return sorted({*python_files(), *found, *top, ROOT / ".ci" / "run"})


LIBRARY_CHECKS: list[Checker] = [check_layers, check_methods_stand_alone, check_maths_imports]
PYTHON_CHECKS: list[Checker] = [
    *(check_outside, check_file_size, check_function_size, check_nesting, check_docstrings),
    *(check_unsafe_loading, check_remote_code, check_bare_except),
]


def problems_in(check: Checker, files: list[Path]) -> list[str]:
    """All problems a checker finds, as "path:line: what"."""
    assert files, "no files to check: the test looks in the wrong place"
    named = [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files]
    return [f"{name}:{problem}" for name, source in named for problem in check(source, name)]


@pytest.mark.parametrize("check", LIBRARY_CHECKS, ids=lambda check: check.__name__)
def test_library(check: Checker) -> None:
    problems = problems_in(check, sorted((ROOT / "diffpref").rglob("*.py")))
    assert not problems, "\n".join(problems)


@pytest.mark.reliability("S1", "S3")
@pytest.mark.parametrize("check", PYTHON_CHECKS, ids=lambda check: check.__name__)
def test_all_python(check: Checker) -> None:
    problems = problems_in(check, python_files())
    assert not problems, "\n".join(problems)


def test_no_machine_paths() -> None:
    problems = problems_in(check_machine_paths, text_files())
    assert not problems, "\n".join(problems)


def test_every_part_of_the_library_has_its_rule() -> None:
    parts = {component(path.relative_to(ROOT).as_posix()) for path in (ROOT / "diffpref").rglob("*.py")}
    assert parts <= MAY_IMPORT.keys(), f"add to MAY_IMPORT: {sorted(parts - MAY_IMPORT.keys())}"


def test_every_package_is_in_the_wheel() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        packed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "diffpref").rglob("*.py")}
    wanted = {".".join(folder.parts) for folder in folders} | {"diffpref._assets", "diffpref._configs"}
    assert packed == wanted, f"pyproject.toml, tool.setuptools.packages: add {sorted(wanted - packed)}, remove {sorted(packed - wanted)}"


def test_every_config_parses() -> None:
    files = sorted(path for path in (ROOT / "configs").rglob("*") if path.suffix in {".yaml", ".yml"})
    assert files, "configs/ holds no YAML file: the test looks in the wrong place"
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), f"{path.relative_to(ROOT)} is not a mapping"


CORE, METHOD, MODEL = "diffpref/core/x.py", "diffpref/methods/x.py", "diffpref/models/x.py"
DEEP = "def f():\n" + "".join(f"{' ' * (i + 1)}if {i}:\n" for i in range(5)) + " " * 6 + "pass"
ELIFS = "def f():\n if 0:\n  pass\n" + "".join(f" elif {i}:\n  pass\n" for i in range(1, 8))
BAD: list[tuple[Checker, str, str]] = [
    (check_layers, CORE, "from diffpref.methods import METHODS"),
    (check_layers, CORE, "from ..paths.forward import ForwardNoising"),
    (check_layers, CORE, "from .. import locations"),
    (check_layers, MODEL, "from diffpref import scorers"),
    (check_layers, MODEL, "def f():\n    import diffpref.training.loop"),
    (check_layers, MODEL, "import importlib\nimportlib.import_module('diffpref.data')"),
    (check_layers, "diffpref/training/x.py", "from diffpref.testbed.world import render"),
    (check_layers, "diffpref/testbed/x.py", "from diffpref.cli import main"),
    (check_methods_stand_alone, METHOD, "from diffpref.methods.diffusion_dpo import DiffusionDPO"),
    (check_methods_stand_alone, METHOD, "from .diffusion_dpo import DiffusionDPO"),
    (check_maths_imports, METHOD, "import diffusers"),
    (check_maths_imports, "diffpref/paths/x.py", "from accelerate.utils import reduce"),
    (check_outside, MODEL, "from tests.helpers import tiny"),
    (check_outside, "scripts/x.py", "import scripts.train"),
    (check_file_size, MODEL, "\n" * 401),
    (check_file_size, METHOD, "\n" * 121),
    (check_function_size, MODEL, "def f():\n" + "    pass\n" * 50),
    (check_nesting, MODEL, DEEP),
    (check_docstrings, MODEL, "def f():\n    pass"),
    (check_docstrings, MODEL, "class Backbone:\n    x: int"),
    (check_unsafe_loading, MODEL, "import pickle"),
    (check_unsafe_loading, MODEL, "import torch\ntorch.load('x')"),
    (check_unsafe_loading, MODEL, "import torch\ntorch.load('x', weights_only=False)"),
    (check_unsafe_loading, MODEL, "from torch import load"),
    (check_unsafe_loading, MODEL, "np.load('x', allow_pickle=True)"),
    (check_remote_code, MODEL, "load('x', trust_remote_code=True)"),
    (check_remote_code, MODEL, "load('x', **{'trust_remote_code': True})"),
    (check_bare_except, MODEL, "try:\n    pass\nexcept:\n    pass"),
    (check_machine_paths, MODEL, "data = '/" + "home/someone/data'"),
    (check_machine_paths, "README.md", "`/" + "tmp/run`"),
]
GOOD: list[tuple[Checker, str, str]] = [
    (check_layers, CORE, "from .types import PathStep\nfrom diffpref.core import random"),
    (check_layers, "diffpref/training/x.py", "from diffpref import __version__, scorers"),
    (check_methods_stand_alone, "diffpref/methods/__init__.py", "from diffpref.methods.mapo import MaPO"),
    (check_maths_imports, METHOD, "import math\nfrom torch import Tensor\nfrom diffpref.core.rewards import implicit_reward"),
    (check_nesting, MODEL, ELIFS),
    (check_nesting, MODEL, "def f():\n for a in b:\n  with c:\n   if d:\n    if e:\n     pass"),
    (check_function_size, MODEL, "def f():\n" + "    pass\n" * 49),
    (check_docstrings, MODEL, "def _f():\n    pass\ndef g():\n    'Says what.'"),
    (check_unsafe_loading, MODEL, "import torch\ntorch.load('x', weights_only=True)"),
    (check_remote_code, MODEL, "load('x', trust_remote_code=False)"),
    (check_machine_paths, MODEL, "url = 'https://example.org/home/x'; relative = './work/x'"),
]


@pytest.mark.parametrize(("check", "path", "source"), BAD)
def test_checker_can_fail(check: Checker, path: str, source: str) -> None:
    assert check(source, path)


@pytest.mark.parametrize(("check", "path", "source"), GOOD)
def test_checker_lets_good_code_pass(check: Checker, path: str, source: str) -> None:
    assert not check(source, path)


def test_no_checker_goes_without_a_bad_snippet() -> None:
    assert {check for check, _, _ in BAD} == {*LIBRARY_CHECKS, *PYTHON_CHECKS, check_machine_paths}
