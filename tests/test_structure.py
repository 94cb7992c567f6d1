"""The structure of the repository: layers of imports, no cycles, short files and functions."""

import ast
import graphlib
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
LINT = Path(sys.executable).with_name("lint-imports")
SOURCES = [p for d in ("cap_pretrain", "tools", "configs") for p in (ROOT / d).rglob("*.py")]


def lint_imports(folder):
    """Run import-linter with the contracts of pyproject.toml on the package in `folder`."""
    command = [LINT, "--no-cache", "--config", ROOT / "pyproject.toml"]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )


def test_imports_follow_the_layers():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("errors.py", "import cap_pretrain.files"),
        ("models/vit.py", "from cap_pretrain.learners import captioner"),
        ("cli/arguments.py", "from cap_pretrain.commands import caption"),
        ("training/step.py", "def f():\n    import cap_pretrain.train"),
        ("data/pipeline.py", "from cap_pretrain.data.builders import base"),
        ("a_new_module.py", ""),
    ],
)
def test_a_forbidden_import_is_found(module, forbidden, tmp_path):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "cap_pretrain", tmp_path / "cap_pretrain", ignore=ignore)
    with (tmp_path / "cap_pretrain" / module).open("a") as file:
        file.write(f"\n{forbidden}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1 and "BROKEN" in done.stdout + done.stderr, done.stdout


def test_no_modules_import_each_other():
    graph = grimp.build_graph("cap_pretrain", cache_dir=None)
    imports = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def test_the_root_of_the_package_is_small():
    assert len(list((ROOT / "cap_pretrain").glob("[!_]*.py"))) <= 12


@pytest.mark.parametrize("path", [*SOURCES, *(ROOT / "tests").rglob("*.py")], ids=str)
def test_files_have_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_functions_have_at_most_80_lines():
    long = [
        f"{path}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= 80
    ]
    assert not long


# Where the package makes a path of a text, and why that text is never the place of a run.
LOCAL_PATHS = {
    "api/images.py:_of_path": "images are files",
    "cli/captioning.py:_read": "images are files",
    "cli/captioning.py:file_images": "only the name of a file is used",
    "cli/captioning.py:image_paths": "images are files",
    "cli/config_files.py": "config files are imported",
    "checkpoints/local_copies.py:_folder": "disks of the hosts; URLs are refused",
    "checkpoints/local_copies.py:_root": "disks of the hosts; URLs are refused",
    "cli/processes.py": "this package, and /proc",
    "commands/rehearse_build.py": "/proc",
    "reports/journal.py:commit": "this package",
    "sweeps/runner.py": "this package",
    "telemetry/profiler.py:_end": "a temporary folder",
    "training/lease.py:_here": "/proc",
    "training/setup.py:facts": "folders of datasets, not URLs",
}


def test_paths_of_runs_are_made_in_one_place():
    """pathlib.Path would turn gs://bucket/run into a local folder called gs:."""
    package, found = ROOT / "cap_pretrain", set()
    folders = ("cli", "commands", "api", "reports", "sweeps", "checkpoints", "training")
    modules = [path for name in (*folders, "telemetry") for path in (package / name).rglob("*.py")]
    for path in [*modules, *package.glob("*.py")]:
        own = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            used = (call.func, *call.args, *(word.value for word in call.keywords))
            names = [
                ast.unparse(n) if isinstance(n, ast.Name | ast.Attribute) else "" for n in used
            ]
            if names[0] not in ("isinstance", "cast") and {"Path", "pathlib.Path"} & set(names):
                within = [f.name for f in functions if f.lineno <= call.lineno <= f.end_lineno]
                where = f"{own}:{within[-1]}" if within else own
                found.add(own if own in LOCAL_PATHS else where)
    assert found == LOCAL_PATHS.keys()


def imported(tree):
    """Return the names that the imports of a module bind."""
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    return {(a.asname or a.name).partition(".")[0] for node in imports for a in node.names}


def root_of(node):
    """Return the name that a chain of attributes begins with, as "a" of a.b.c, or None."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def changed_attributes(tree):
    """Return (line, name) of each attribute of an imported name that is assigned or deleted.

    Names that a function has as parameters are not imported ones.
    """
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.Lambda)]
    own = {arg.arg for f in functions for arg in ast.walk(f.args) if isinstance(arg, ast.arg)}
    names, found = imported(tree) - own, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            found.append((node.lineno, root_of(node)))
        elif isinstance(node, ast.Call) and root_of(node.func) == "setattr":
            found.append((node.lineno, root_of(node.args[0])))
    return sorted((line, name) for line, name in found if name in names)


def test_tests_change_no_module_for_good():
    """Processes run several tests, in any order: only `monkeypatch` changes a module."""
    files = {path: ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    found = {str(path): changed_attributes(tree) for path, tree in files.items()}
    found = {path: lines for path, lines in found.items() if lines}
    assert not found, f"use monkeypatch or an argument: {found}"


def test_a_changed_module_is_found():
    text = """import a.b, c as d
from e import f, g
a.b.x = 1
d.x, y = 1, 2
f.x += 1
del a.x
setattr(f, "x", 1)
def h(g): g.x = c.x = y.x = 2
"""
    expected = [(3, "a"), (4, "d"), (5, "f"), (6, "a"), (7, "f")]
    assert changed_attributes(ast.parse(text)) == expected
