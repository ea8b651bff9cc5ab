"""The layout holds: who imports whom, links that lead somewhere, no paths of one machine."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STANDARD = set(sys.stdlib_module_names)

# What each folder may import beside the standard library and itself.
ALLOWED = {
    "aadl": {"torch"},
    "data_loaders": {"torch", "numpy", "scipy", "h5py", "PIL", "tqdm"},
    "experiments": {
        *("aadl", "data_loaders", "torch", "numpy", "scipy", "matplotlib", "tqdm", "yaml", "h5py", "mpi4py", "pydantic")
    },
    "jobs": {"experiments", "data_loaders", "yaml", "numpy", "matplotlib", "pydantic"},
}
# Where in these folders a package may be imported at all.
CONFINED = {
    "mpi4py": ("experiments/distributed/mpi.py",),
    "yaml": ("experiments/settings/yaml_file.py", "jobs/"),
    "h5py": ("experiments/records/", "experiments/distributed/doctor/", "data_loaders/"),
}
LAZY = {"mpi4py"}  # inside a function only


def imports_of(tree):
    """(imported top-level module, is it imported when the file is) of every import; "" for a relative one."""
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["" if node.level else str(node.module)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        for name in names:
            yield name.split(".")[0], id(node) not in lazy


def wrong_imports(root):
    for folder, allowed in ALLOWED.items():
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            for module, at_import in imports_of(ast.parse(path.read_text("utf-8"))):
                if module not in allowed | STANDARD | {"", folder}:
                    yield f"{name} imports {module}"
                elif not name.startswith(CONFINED.get(module, "")):
                    yield f"{name} imports {module}, which belongs in {' or '.join(CONFINED[module])}"
                elif module in LAZY and at_import:
                    yield f"{name} imports {module} outside a function"


def test_imports_run_one_way():
    assert list((ROOT / "aadl").glob("*.py")) and list((ROOT / "experiments").glob("*.py"))
    assert not list(wrong_imports(ROOT))


@pytest.mark.parametrize(
    ("path", "code", "found"),
    [
        ("aadl/mixing.py", "import math, torch\nfrom . import history\nfrom aadl import flat", []),
        ("aadl/mixing.py", "def f():\n    from numpy.linalg import qr", ["aadl/mixing.py imports numpy"]),
        ("aadl/mixing.py", "import experiments.training.train", ["aadl/mixing.py imports experiments"]),
        ("aadl/mixing.py", "import importlib\nimportlib.import_module('h5py')", ["aadl/mixing.py imports h5py"]),
        ("data_loaders/a.py", "import aadl", ["data_loaders/a.py imports aadl"]),
        ("experiments/models/mlp.py", "import jobs.submit", ["experiments/models/mlp.py imports jobs"]),
        ("experiments/distributed/mpi.py", "def f():\n    from mpi4py import MPI", []),
        (
            "experiments/distributed/mpi.py",
            "import mpi4py",
            ["experiments/distributed/mpi.py imports mpi4py outside a function"],
        ),
        (
            "experiments/a.py",
            "import yaml",
            ["experiments/a.py imports yaml, which belongs in experiments/settings/yaml_file.py or jobs/"],
        ),
        ("jobs/submit.py", "import yaml, experiments.catalog", []),
        ("jobs/submit.py", "import torch", ["jobs/submit.py imports torch"]),
    ],
)
def test_a_wrong_import_is_found(tmp_path, path, code, found):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(code)
    assert list(wrong_imports(tmp_path)) == found


# The rooms of experiments/, lower ones first: each imports only from those above it in this list, and those of one line
# do not import each other.
ROOMS = (
    ("settings", "models"),
    ("distributed",),
    ("training",),
    ("records",),
    ("runs",),
    ("admissions", "pinn", "images"),
    ("catalog",),
    ("commands",),
    ("__main__",),
)


def places_of(root):
    """Room -> its place in the order; a package with a file experiment.py is one more experiment."""
    places = {room: place for place, rooms in enumerate(ROOMS) for room in rooms}
    found = {path.parent.name for path in (root / "experiments").glob("*/experiment.py")}
    return dict.fromkeys(found, places["admissions"]) | places


def upward_imports(root):
    """Imports between rooms of experiments/ that do not lead downwards, wherever in a file they stand."""
    places = places_of(root)
    for path in sorted((root / "experiments").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        room = name.removeprefix("experiments/").partition("/")[0].removesuffix(".py")
        if room == "__init__":
            continue
        if room not in places:
            yield f"{name} is in no room"
            continue
        for module in modules_of(ast.parse(path.read_text("utf-8"))):
            package, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if package == "experiments" and other != room and not places.get(other, len(ROOMS)) < places[room]:
                yield f"{name} imports {module}"


def modules_of(tree):
    """The full names of all imported modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "experiments":
            yield from (f"experiments.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_the_rooms_of_the_experiments_import_downwards():
    assert not list(upward_imports(ROOT))


@pytest.mark.parametrize(
    ("path", "code", "found"),
    [
        ("pinn/compare.py", "from experiments.runs.config import load_config", []),
        ("pinn/compare.py", "import experiments.images.tables", ["imports experiments.images.tables"]),
        ("settings/a.py", "def f():\n    from experiments import catalog", ["imports experiments.catalog"]),
        ("models/a.py", "import experiments.settings.schema", ["imports experiments.settings.schema"]),
        ("training/train.py", "from experiments.training import steps\nimport aadl", []),
        ("other/a.py", "", ["is in no room"]),
        ("other/experiment.py", "import experiments.runs.experiment, experiments.other.problem", []),
        ("other/experiment.py", "import experiments.images.tables", ["imports experiments.images.tables"]),
    ],
)
def test_an_upward_import_is_found(tmp_path, path, code, found):
    (tmp_path / "experiments" / path).parent.mkdir(parents=True)
    (tmp_path / "experiments" / path).write_text(code)
    assert list(upward_imports(tmp_path)) == [f"experiments/{path} {text}" for text in found]


def test_the_library_neither_prints_nor_opens_files_nor_reads_the_environment():
    names = {
        (path.name, ast.unparse(node))
        for path in (ROOT / "aadl").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Name | ast.Attribute)
    }
    assert not {(file, name) for file, name in names if name in ("print", "open", "os.environ", "os.getenv")}


def test_the_library_works_with_torch_alone(tmp_path):
    script = """
        import sys
        from importlib.machinery import PathFinder

        class Finder(PathFinder):  # finds what is installed, but for these
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                hidden = "numpy h5py yaml matplotlib scipy tqdm PIL mpi4py pydantic pytest experiments data_loaders"
                return None if name.split(".")[0] in hidden.split() else super().find_spec(name, path, target)

        sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
        try:
            import numpy
        except ImportError:
            pass
        else:
            raise AssertionError("numpy was not hidden")

        import torch
        import aadl

        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = aadl.accelerate(torch.optim.SGD([parameter], lr=0.1), wait_iterations=1, frequency=1)
        for _ in range(20):
            optimizer.zero_grad()
            (parameter * parameter * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
            optimizer.step()
        assert aadl.accelerator_of(optimizer).statistics["accepted"] > 0
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("experiments.settings.kinds, experiments.settings.yaml_file", "torch numpy"),
        ("jobs.submit, jobs.scaling", "mpi4py"),
    ],
)
def test_a_command_line_does_not_wait_for_what_it_does_not_use(modules, heavy):
    code = f"import sys, {modules}; sys.exit(bool(set({heavy.split()}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


OF_OTHERS = {"_replace", "_fields", "_version", "_hooks"}  # of named tuples and of torch, whose tests read them


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in OF_OTHERS


def private_names(root):
    """Names with one underscore that the product gives to functions, classes, attributes and variables of modules."""
    for folder in (*ALLOWED, "benchmarks"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    yield node.name
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    yield node.attr
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id


def private_uses(root):
    """Uses of these names by tests: attributes of others than `self`, imports, and what `monkeypatch` is given."""
    private = set(filter(is_private, private_names(root)))
    for path in sorted((root / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                names = node.value.split(".")
            yield from (f"{path.relative_to(root).as_posix()}: {name}" for name in names if name in private)


def test_tests_use_what_the_product_makes_public():
    assert not list(private_uses(ROOT))


def test_a_use_of_something_private_is_found(tmp_path):
    (tmp_path / "aadl").mkdir()
    (tmp_path / "aadl" / "a.py").write_text("_lid = 3\nclass A:\n    def __init__(self):\n        self._nut = 0\n")
    (tmp_path / "tests").mkdir()
    uses = ["from aadl.a import _lid", "a.A()._nut", "monkeypatch.setattr(a.A, '_nut', 1)", "'aadl.a._lid'"]
    fine = ["self._nut", "a.__name__", "torch._foreach_copy_", "_own = 'no _nut here'", "from aadl.a import A"]
    (tmp_path / "tests" / "test_a.py").write_text("\n".join(uses + fine))
    found = ["_lid", "_nut", "_nut", "_lid"]
    assert sorted(private_uses(tmp_path)) == sorted(f"tests/test_a.py: {name}" for name in found)


def test_files_of_tests_are_short():
    """Longer ones guard several things, and are divided by them."""
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert not {str(path): length for path, length in lengths.items() if length > 500}


def documents():
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def broken_links(document):
    """Relative links of a Markdown file whose file or heading does not exist."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text("utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
        if re.match(r"[a-z]+:", link):  # http:, https:, mailto:
            continue
        name, _, heading = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (heading and heading not in anchors(target)):
            yield link


def anchors(document):
    """The names that GitHub gives to the headings of a Markdown file."""
    text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
    for heading in re.findall(r"^#+\s+(.*?)\s*$", text, flags=re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    assert not list(broken_links(document))


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# The *one* idea: `x_k`\n")
    document = tmp_path / "a.md"
    document.write_text(
        "## Here\n[a](b.md) [b](b.md#the-one-idea-x_k) [c](#here) ![d](none.png) [e](b.md#there) [f](#nowhere)"
        ' <img src="lost.svg"> [g](https://example.org/none) `[h](code.md)`\n```\n[i](code.md)\n```\n'
    )
    assert list(broken_links(document)) == ["none.png", "b.md#there", "#nowhere", "lost.svg"]


def test_the_files_that_the_guide_to_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    paths = [path for path in re.findall(r"`([\w.]+/[\w./-]*)`", text) if not path.startswith((".venv", "site/"))]
    assert len(paths) > 15 and not [path for path in paths if not (ROOT / path).exists()]


# Written in two parts, so that this file does not hold them.
LOCAL_PATHS = ["/wor" + "k/", "/tm" + "p/", "/opt/" + "venv", "/opt/" + "wheels", "/opt/" + "pypi", "/ro" + "ot/"]
BESIDE_CHECKOUT = "../" + "shared"  # of the test machine: named by .ci/run and by tests that look for it


def test_no_file_names_a_path_of_one_machine():
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout to list the files of the repository")
    found = []
    for name in filter(None, listing.split("\0")):
        path = ROOT / name
        text = path.read_bytes().decode(errors="ignore") if path.is_file() else ""
        outside = [] if name.startswith((".ci/", "tests/")) else [BESIDE_CHECKOUT]
        found += [(name, local) for local in LOCAL_PATHS + outside if re.search(rf"(?<![\w.]){re.escape(local)}", text)]
    assert not found
