"""House rules: where files live, which way imports run, what no file may hold, and that `kernels` is not our name."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
PACKAGE = sorted((ROOT / "nanolmmr1").rglob("*.py"))
SOURCES = [ROOT / "train.py", *PACKAGE, *KERNELS]
BENCHES = sorted((ROOT / "bench").rglob("*.py"))
EVERYTHING = [*SOURCES, *BENCHES, *sorted((ROOT / "tests").rglob("*.py"))]

every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
every_file = pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"nanolmmr1.{name}" if path in KERNELS else name  # nanolmmr1/kernels is a link to kernels/


MODULES = {module_name(path): path for path in SOURCES}


def imports(path, nodes=None):
    """Modules that a file imports, ours by full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            found |= members & MODULES.keys() or {base}
    return found


def roots(path):
    return {name.split(".")[0] for name in imports(path)}


def test_the_kernels_folder_is_no_package():
    assert KERNELS and not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", [path for path in KERNELS if path.stem[0] != "_"], ids=lambda path: path.stem)
def test_every_kernel_has_a_test_and_a_bench_of_its_name(path):
    assert (ROOT / "tests" / f"test_{path.name}").is_file()
    assert (ROOT / "bench" / path.name).is_file()


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_nothing_but_torch_triton_and_each_other(path):
    ours = {name for name in imports(path) if name.startswith("nanolmmr1")}
    assert all(name.startswith("nanolmmr1.kernels.") for name in ours)
    # Liger's and flash-attn's are providers of an op, imported where they are asked for.
    assert roots(path) - {"nanolmmr1"} <= {"torch", "triton", "liger_kernel", "flash_attn"} | sys.stdlib_module_names
    assert "from nanolmmr1" not in path.read_text()  # relatively, so that the folder can be lifted out


def room(name):
    """The room of a module: a folder of the package, or the module itself."""
    parts = name.split(".")
    return name if parts[0] != "nanolmmr1" or len(parts) == 1 else parts[1]


# Lowest floor first. A room imports from lower floors and from itself, inside functions too.
FLOORS = [
    {"nanolmmr1"},
    {"errors", "files", "terminal", "kernels", "schema"},
    {"config", "data", "model", "reward"},
    {"benchmarks", "parallel"},
    {"update"},
    {"rollout"},
    {"report", "desk", "sokoban"},
    {"run"},
    {"prepare"},
    {"caption", "doctor", "evaluate", "passrate", "train"},
]
FLOOR = {name: floor for floor, rooms in enumerate(FLOORS) for name in rooms}


@every_source
def test_imports_run_down_the_floors(path):
    here = room(module_name(path))
    for name in imports(path) & MODULES.keys():
        assert room(name) == here or FLOOR[room(name)] < FLOOR[here], f"{here} must not import {name}"


def test_no_circle_of_files():
    graph = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@pytest.mark.parametrize(
    ("here", "allowed"),
    [
        ("data", {"errors", "schema", "terminal"}),
        ("model", {"errors", "kernels"}),
        ("reward", {"errors", "schema"}),
        ("parallel", {"errors", "model"}),
        ("update", {"data", "errors", "kernels", "model", "parallel", "schema"}),
        ("rollout", {"config", "data", "errors", "kernels", "model", "parallel", "schema", "terminal", "update"}),
        ("benchmarks", {"data", "errors", "reward"}),
        ("sokoban", {"data", "errors", "files", "terminal"}),
        ("report", {"benchmarks", "data", "errors", "files", "parallel", "rollout", "schema", "terminal", "update"}),
    ],
)
def test_a_room_imports_no_more_of_the_house_than_it_needs(here, allowed):
    files = [path for name, path in MODULES.items() if room(name) == here]
    assert {room(name) for path in files for name in imports(path) & MODULES.keys()} <= allowed | {here}


def test_the_package_itself_imports_nothing():
    assert not imports(MODULES["nanolmmr1"])


@every_source
def test_a_library_stays_in_the_file_that_owns_it(path):
    name = module_name(path)
    assert "transformers" not in roots(path) or name == "nanolmmr1.data.prompt"
    # One file for the engine in this process, one for weights that go to an engine elsewhere.
    assert "vllm" not in roots(path) or name in ("nanolmmr1.rollout.vllm", "nanolmmr1.rollout.weight_transfer")
    assert not roots(path) & {"bench", "tests"}
    assert "train" not in imports(path)
    assert "torch" not in roots(path) or (room(name) != "reward" and name != "nanolmmr1.data.rows")


@pytest.mark.parametrize("path", [*SOURCES, *BENCHES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_enough_to_be_read(path):
    assert len(path.read_text().splitlines()) <= 500


BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.match_case, ast.comprehension)


@every_source
def test_functions_are_short_and_annotated(path):
    for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
        where = f"{function.name}, line {function.lineno}"
        assert function.end_lineno - function.lineno < 60, where
        assert sum(isinstance(node, BRANCHES) for node in ast.walk(function)) <= 15, where
        if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
            continue  # Triton reads annotations as types of its own
        args = function.args
        given = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [args.vararg, args.kwarg])]
        bare = [arg.arg for arg in given if arg.annotation is None and arg.arg not in ("self", "cls")]
        assert not bare, f"{where}: {bare}"
        assert function.returns is not None, where


def next_files(path):
    """The files that the last paragraph of a module docstring sends the reader to."""
    _, _, text = (ast.get_docstring(ast.parse(path.read_text())) or "").rpartition("Next:")
    for name in re.findall(r"[\w/.]+\.py", text):
        target = (path.parent / name).resolve()
        assert target.is_file(), f"{path}: Next: {name}"
        yield target


def test_the_tour_reaches_every_file_from_train_py():
    seen, todo = set(), [ROOT / "train.py"]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += next_files(path)
    assert {path for path in SOURCES if path.name != "__init__.py"} <= seen


@every_file
def test_nothing_runs_code_from_data_or_hides_errors(path):
    if path == Path(__file__):
        return
    assert not roots(path) & {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except, line {node.lineno}"
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert "trust_remote_code" not in keywords, f"line {node.lineno}"
            if ast.unparse(node.func) == "torch.load":
                assert keywords.get("weights_only") == "True", f"line {node.lineno}"


def run_python(code, cwd, *paths):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_our_kernels_are_imported_as_part_of_the_package(tmp_path):
    code = "import nanolmmr1.kernels.linear_loss as k; print(k.__name__, k.__file__)"
    for cwd, paths in ((ROOT, []), (tmp_path, [ROOT])):
        name, file = run_python(code, cwd, *paths)
        assert name == "nanolmmr1.kernels.linear_loss" and Path(file).resolve() == ROOT / "kernels" / "linear_loss.py"


BESIDE = """
import kernels, nanolmmr1.kernels.attention as ours
from transformers import Qwen2_5_VLConfig
print(kernels.__file__, ours.__file__, Qwen2_5_VLConfig.model_type)
"""


def test_a_package_of_that_name_works_beside_ours(tmp_path):
    theirs = tmp_path / "kernels" / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("__version__ = '0.0.1'\n")
    # An empty path entry is the current folder, the repository, as in `python train.py`.
    found, ours, model_type = run_python(BESIDE, ROOT, "", tmp_path)
    assert Path(found) == theirs
    assert Path(ours).resolve() == ROOT / "kernels" / "attention.py"
    assert model_type == "qwen2_5_vl"


def test_hugging_faces_kernels_package_works_beside_ours():
    try:
        version("kernels")
    except PackageNotFoundError:
        pytest.skip("needs Hugging Face's `kernels` package")
    found, ours, _ = run_python(BESIDE, ROOT)
    assert "site-packages" in found and Path(ours).resolve() == ROOT / "kernels" / "attention.py"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_say_what_masked_loads_give_and_add_nothing_in_random_order(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            keywords = {keyword.arg for keyword in node.keywords}
            # The interpreter fills in zeros, a GPU whatever was there.
            assert "mask" not in keywords or "other" in keywords, f"line {node.lineno}"
        assert "atomic" not in getattr(node, "attr", ""), f"line {node.lineno}"
