"""The package: its map, imports that run one way, sizes, and how it installs, from a wheel and from a checkout."""

import ast
import functools
import os
import re
import subprocess
import sys
import sysconfig
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from tva import TaskVector, open_weights, save_weights

ROOT = Path(__file__).parent.parent

# A room may import rooms of rows above its own, and of its own row where that makes no circle.
FLOORS = [
    {
        "tva.errors",
        "tva._torch",
        "tva.console",
        "tva.patterns",
        "tva.plugins",
        "tva.sizes",
        "tva.version",
        "tva.executors",
    },
    {"tva.arithmetic", "tva.layers", "tva.data"},
    {"tva.checkpoints"},
    {"tva.merge", "tva.report"},
    {"tva.vectors", "tva.evaluation"},
    {"tva.compose", "tva.models", "tva.callbacks", "tva.search"},
    {"tva.edit"},
    {"tva.paper"},
    {"tva.cli", "tva.__main__", "tva.weights"},
]
ON_FILES = ("tva._torch", "tva.arithmetic", "tva.layers", "tva.checkpoints", "tva.merge", "tva.vectors", "tva.compose")
LIGHT = {
    "torch",
    "numpy",
    "safetensors",
    "xxhash",
    "huggingface_hub",
    "tva",
    "__future__",
    "backports",
    "compression",
    "gguf",
}
IMPORTERS = {
    "huggingface_hub": {"tva.checkpoints", "tva.report"},
    "gguf": {"tva.checkpoints.formats"},
    "numba": {"tva.merge.kernels"},
    "jsonargparse": {"tva.cli"},
    "open_clip": {"tva.models", "tva.data"},  # tva.data: its ImageNet class names only
    "timm": {"tva.models"},
    "peft": {"tva.models", "tva.callbacks"},
    "deepspeed": {"tva.callbacks"},
    "transformers": {"tva.models", "tva.evaluation.lm_eval"},  # the latter: a tokenizer for the harness
    "sentence_transformers": {"tva.models"},
    "datasets": {"tva.data"},
    "matplotlib": {"tva.cli", "tva.data", "tva.callbacks"},
    "optuna": {"tva.search"},
    "ray": {"tva.executors"},
    "scipy": {"tva.evaluation"},
    "rich": {"tva.cli", "tva.console", "tva.report"},
    "jinja2": {"tva.report"},
    "IPython": {"tva.report"},
    "vl_convert": {"tva.report"},
    "backports": {"tva.compose", "tva.models.tiny"},
    "compression": {"tva.compose", "tva.models.tiny"},
    "nicegui": {"tva.edit.play"},
    "gradio": {"tva.edit.play"},
    "detoxify": {"tva.data"},
    "lm_eval": {"tva.evaluation"},
}


PAGE = (ROOT / "docs/reference/architecture.md").read_text()
TREE = re.search(r"```\n(.*?)```", PAGE, flags=re.DOTALL)[1]

MOST_LINES = {"file": 430, "function": 60}
LONGER = {  # with the reason
    "tva.vectors.task_vector": "one class with its operators, each of a few lines and documented",
    "tva.report.curves._curves": "a chart, described from top to bottom",
    "tva.report.tradeoffs._plane": "a chart",
    "tva.report.model_card._body": "a page of text",
    "tva.compose.apply.compose": "the steps of a compose",
    "tva.cli.commands.forget.run": "its options with their help, and two configurations",
    "tva.compose.engine": "one class: how chunks are read, combined and written",
    "tva.compose.recipe": "the recipe on tensors and on chunks",
    "tva.evaluation.evaluate.evaluate": "one pass and what it is made of",
    "tva.evaluation.recorder.recording": "the hooks of one pass, which share their state",
    "tva.vectors.match.match": "one fit and what it says",
    "tva.merge.kernels": "what numba compiles together",
}


def modules():
    for folder, package in ((ROOT / "tva", "tva"), (ROOT / "callbacks", "tva.callbacks")):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), file


@functools.cache
def nodes(file):
    """Imports, functions and lines of text alone in a file, of which all that is asked here is made."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.Expr
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]


@functools.cache
def imports(file):
    found = []
    for node in nodes(file):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def is_in(name, rooms):
    return any(name == room or name.startswith(room + ".") for room in rooms)


@functools.cache
def room_of(name):
    """Return the position of a module's floor and its room; None outside of tva."""
    found = [(floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms if is_in(name, {room})]
    return found[0] if found else None


def test_imports_run_one_way():
    arrows = {}
    for name, file in modules():
        if name == "tva":
            continue
        own = room_of(name)
        assert own is not None, f"{name} is in no row of FLOORS"
        for imported in imports(file):
            other = room_of(imported)
            if other is not None and other[1] != own[1]:
                assert other[0] <= own[0], f"{name} must not import {imported}"
                arrows.setdefault(own[1], set()).add(other[1])
    list(TopologicalSorter(arrows).static_order())  # raises where rooms of one row make a circle


def test_modules_of_a_room_make_no_circle():
    files = dict(modules())
    for room in {room for rooms in FLOORS for room in rooms}:
        inside = {name: file for name, file in files.items() if is_in(name, {room}) and file.name != "__init__.py"}
        arrows = {name: {other for other in imports(file) if other in inside} for name, file in inside.items()}
        list(TopologicalSorter(arrows).static_order())


def test_heavy_dependencies_are_imported_in_one_place():
    for name, file in modules():
        for imported in imports(file):
            top = imported.split(".")[0]
            if top in IMPORTERS:
                assert is_in(name, IMPORTERS[top]), f"{name} must not import {top}"
            if is_in(name, ON_FILES):
                foreign = {"yaml"} if name in ("tva.compose.mergekit", "tva.checkpoints.foreign_yaml") else set()
                assert top in LIGHT | sys.stdlib_module_names | {"numba"} | foreign, f"{name} must not import {top}"


def test_every_package_is_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text()
    for name, file in modules():
        if file.name == "__init__.py":
            assert f'"{name}"' in text, f"{name} is missing from packages in pyproject.toml"


def test_every_path_that_the_page_names_is_there():
    named = re.findall(r"`([\w/]+(?:/|\.py))`", PAGE) + re.findall(r"\]\(([\w./]+)\)", PAGE)
    assert len(named) > 30
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "docs/reference" / path).exists(), path


def test_the_tree_describes_every_room_and_names_only_what_is_in_it():
    described = {}
    for line in TREE.splitlines()[1:]:
        indented, name, rest = re.fullmatch(r"( *)(\S+)(.*)", line).groups()
        folder = ROOT / "tva" / name if indented else ROOT / name
        if name.endswith("/"):
            described[name.rstrip("/")] = rest.strip()
            files = re.findall(r"(?<![\w/])([a-z_]+\.py|[a-z_]+/)(?![\w*])", rest)
            assert all((folder / file).exists() or (ROOT / file).exists() for file in files), line
        else:
            assert all((ROOT / "tva" / file).exists() for file in re.findall(r"[a-z_]+\.py", line)), line
    rooms = {path.name for path in (ROOT / "tva").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= described.keys()
    assert all(described.values())


def test_the_floors_of_the_page_are_those_of_the_import_test():
    rows = re.findall(r"^\| (\d) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert [set(re.findall(r"`([\w.]+)`", rooms)) for _, rooms in rows] == FLOORS
    assert [int(floor) for floor, _ in rows] == list(range(1, len(FLOORS) + 1))


def sizes():
    """Lines of every file, and of every function without its docstring, by name."""
    for name, file in modules():
        yield name, "file", len(file.read_text().splitlines())
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef):
                documented = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
                yield f"{name}.{node.name}", "function", node.end_lineno - node.lineno + 1 - documented


def test_files_and_functions_are_short():
    longer = {name: lines for name, kind, lines in sizes() if lines > MOST_LINES[kind]}
    assert longer.keys() <= LONGER.keys(), longer


def statements(file):
    """The lines of a file without docstrings, comments, imports and signatures, with their numbers."""
    text, other = file.read_text(), set()
    for node in nodes(file):
        if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Expr) and is_text(node.value)):
            other.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.FunctionDef):
            other.update(range(node.lineno, node.body[0].lineno))
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return [(number, line) for number, line in lines if line and line[0] != "#" and number not in other]


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_no_six_lines_are_there_twice():
    seen = {}
    for name, file in modules():
        lines = statements(file)
        for six in zip(*(lines[start:] for start in range(6)), strict=False):
            if sum(len(line) > 3 for _, line in six) == 6:  # brackets that close are no repetition
                place, text = f"{name}:{six[0][0]}", tuple(line for _, line in six)
                assert seen.setdefault(text, place) == place, (place, text)


def run_python(code, *options, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_tva_loads_torch_and_no_more():
    code = "import sys, tva; tva.TaskVector, tva.open_weights; print(*{m.split('.')[0] for m in sys.modules})"
    assert "torch" not in run_python(code.replace("tva.TaskVector, ", ""))
    assert not {"lightning", "open_clip", "datasets", "timm", "sklearn", "rich"} & set(run_python(code))


ON_FILES = """
import sys
from tva.cli.main import main

for line in sys.argv[1].splitlines():
    main(line.split())
    heavy = {'lightning', 'open_clip', 'datasets', 'timm', 'transformers', 'matplotlib', 'scipy.stats'}
    loaded = heavy & sys.modules.keys()
    assert not loaded, (line, loaded)
"""


@pytest.mark.slow
def test_commands_on_files_never_load_lightning(tmp_path):
    for name, value in (("base", 1.0), ("a", 2.0), ("b", 4.0)):
        save_weights({"w": torch.full((3, 2), value)}, tmp_path / f"{name}.safetensors")
    commands = """extract --base base.safetensors --finetuned a.safetensors --output v/a.tv.safetensors
        inspect v/a.tv.safetensors
        inspect base.safetensors
        compare v/a.tv.safetensors b.safetensors --base base.safetensors --json
        vectors ls v
        vectors match b.safetensors v/a.tv.safetensors --base base.safetensors
        compress v/a.tv.safetensors --output c.tv.safetensors --encoding int8
        compose --base base.safetensors --vectors.c c.tv.safetensors --recipe=-c --output out.safetensors --keep_undo
        verify out.safetensors
        revert out.safetensors --output again.safetensors"""
    done = subprocess.run([sys.executable, "-c", ON_FILES, commands], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NO_TORCH = """
import os, sys
from tva.cli.main import main

commands = sys.stdin.readlines()
for folder in sys.argv[1:]:
    os.chdir(folder)
    for line in commands:
        main(line.split())
        assert 'torch' not in sys.modules, (folder, line)
"""


def test_sums_and_selections_of_safetensors_never_load_torch(tmp_path):
    """Nor do plans and checks of them; loading it would take longer than the arithmetic."""
    folders = [tmp_path / str(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for folder in folders:
        write_safetensors(folder, getattr(torch, folder.name.partition(".")[2]))
    call = "compose --base base.safetensors --vectors.a a.safetensors --vectors.b b.safetensors --recipe="
    call_on_vector = "compose --base base.safetensors --vectors.v v.tv.safetensors --output v.safetensors --recipe="
    commands = f"""{call}0.5*(a+b) --output sum.safetensors
        {call}0.5*(a+b) --output sum.safetensors --plan
        {call}ties(a,b) --output folder
        {call}ties(a,b,trim="tensor")-dare(a)/3 --output ties.safetensors --json
        {call}magnitude(mean(a,b),density=0.3) --output some.safetensors
        {call}s*analogy(a,b,a) --coefs={{"s":{{"l.0":2,".*":0.5}}}} --output analogy.safetensors
        {call_on_vector}-v
        verify sum.safetensors"""
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *folders], input=commands, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def write_safetensors(folder, dtype):
    folder.mkdir()
    state = {"l.0.w": torch.randn(40, 30), "l.1.w": torch.randn(300), "empty": torch.zeros(0), "one": torch.ones(())}
    state = {name: tensor.to(dtype) for name, tensor in state.items()} | {"steps": torch.tensor(3)}
    save_weights(state, folder / "base.safetensors")
    for name, like in (("a", state), ("b", state)):
        moved = {key: torch.randn_like(x) if x.is_floating_point() and key != "one" else x for key, x in like.items()}
        save_weights(moved, folder / f"{name}.safetensors")
    vector = TaskVector.between(open_weights(folder / "base.safetensors"), open_weights(folder / "b.safetensors"))
    vector.save(folder / "v.tv.safetensors")


@pytest.mark.slow
def test_a_checkout_imports_without_installation():
    code = "import tva, tva.callbacks; print(tva.__file__, tva.callbacks.__file__)"
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    files = run_python(code, "-S", PYTHONPATH=path)  # -S: no .pth file, so no editable install
    assert files == [str(ROOT / "tva/__init__.py"), str(ROOT / "callbacks/__init__.py")]


def test_the_installed_package_is_found_here():
    code = "from importlib.util import find_spec as find; print(find('tva').origin, find('tva.callbacks').origin)"
    assert run_python(code)[1].endswith("callbacks/__init__.py")


@pytest.mark.slow
def test_wheel_installs_and_imports_in_a_fresh_environment(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("tva-*.whl")
    assert wheel.stat().st_size < 6 * 1024**2
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    site = next((venv / "lib").glob("python*/site-packages"))
    assert not (site / "callbacks").exists()
    # the dependencies come from this environment, without its editable install
    environment = {"PYTHONPATH": sysconfig.get_path("purelib"), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    code = (
        "import tva, tva.callbacks; from tva.models.tiny import load; load();"
        "print(tva.__file__, tva.callbacks.__file__)"
    )
    done = subprocess.run([python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / "tva/__init__.py"), str(site / "tva/callbacks/__init__.py")]
    done = subprocess.run(
        [venv / "bin/tva", "--version"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.startswith("tva "), done.stderr


def test_callbacks_docstrings_run():
    import doctest

    import tva.callbacks.task_vector as module

    results = doctest.testmod(module, extraglobs={"L": __import__("lightning")})
    assert results.attempted > 0
    assert results.failed == 0
