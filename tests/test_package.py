"""The package as it is installed: from a wheel, from a checkout, and its imports, which run one way."""

import ast
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tva import TaskVector, open_weights, save_weights

ROOT = Path(__file__).parent.parent

# Each module may import modules of its own layer's row or of rows above it, never below.
LAYERS = [
    {"tva.later"},
    {"tva.state_dict", "tva.console", "tva.version", "tva.steps", "tva.parsing", "tva.memory"},
    {"tva.kernels"},
    {"tva.weights", "tva.groups", "tva.kinds"},
    {"tva.page"},
    {"tva.terminal"},
    {"tva.merge"},
    {"tva.encoding", "tva.expression", "tva.origin"},
    {"tva.encoder"},
    {"tva.task_vector"},
    {"tva.recipe", "tva.geometry", "tva.emission", "tva.information"},
    {"tva.sources", "tva.record"},
    {"tva.vectors", "tva.extract"},
    {"tva.look", "tva.registry"},
    {"tva.match"},
    {"tva.plan", "tva.pieces"},
    {"tva.undo"},
    {"tva.composer"},
    {"tva.compose"},
    {"tva.compress", "tva.verify", "tva.revert"},
    {"tva.callbacks", "tva.data"},
    {"tva.models"},
    {"tva.statistics", "tva.batches", "tva.ranks"},
    {"tva.report", "tva.validate", "tva.tables"},
    {"tva.revisit", "tva.composed"},
    {"tva.push"},
    {"tva.search", "tva.evaluations"},
    {"tva.locks"},
    {"tva.jobs"},
    {"tva.fit_many"},
    {"tva.editor"},
    {"tva.finished"},
    {"tva.baselines", "tva.diagnose"},
    {"tva.edit"},
    {"tva.trainer"},
    {"tva.cli"},
    {"tva.demo", "tva.__main__", "tva.play"},
    {"tva.playground"},
]
TORCH_ONLY = {
    "tva.later",
    "tva.state_dict",
    "tva.steps",
    "tva.fused",
    "tva.groups",
    "tva.information",
    "tva.kinds",
    "tva.weights",
    "tva.task_vector",
    "tva.merge",
    "tva.recipe",
    "tva.sources",
    "tva.record",
    "tva.plan",
    "tva.pieces",
    "tva.compose",
    "tva.composer",
    "tva.memory",
    "tva.compress",
    "tva.encoding",
    "tva.encoder",
    "tva.expression",
    "tva.origin",
    "tva.verify",
    "tva.revert",
    "tva.undo",
    "tva.geometry",
    "tva.emission",
    "tva.vectors",
    "tva.extract",
    "tva.look",
    "tva.registry",
    "tva.match",
}
DOORS = {
    "huggingface_hub": {"tva.weights", "tva.page"},
    "numba": {"tva.kernels"},
    "jsonargparse": {"tva.cli"},
    "open_clip": {"tva.models", "tva.data"},  # tva.data: its ImageNet class names alone
    "timm": {"tva.models"},
    "peft": {"tva.models", "tva.callbacks"},
    "deepspeed": {"tva.callbacks"},
    "transformers": {"tva.models"},
    "datasets": {"tva.data"},
    "matplotlib": {"tva.tables", "tva.demo", "tva.data", "tva.callbacks"},
    "optuna": {"tva.search"},
    "scipy": {"tva.statistics"},
    "rich": {
        "tva.composed",
        "tva.console",
        "tva.terminal",
        "tva.tables",
        "tva.revisit",
        "tva.demo",
        "tva.fit_many",
        "tva.data",
    },
    "jinja2": {"tva.page"},
    "IPython": {"tva.report"},
    "vl_convert": {"tva.page"},
    "backports": {"tva.undo"},
    "compression": {"tva.undo"},
    "nicegui": {"tva.playground"},
}


def modules():
    for folder, package in ((ROOT / "tva", "tva"), (ROOT / "callbacks", "tva.callbacks")):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), file


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name):
    for position, layer in enumerate(LAYERS):
        for known in layer:
            if name == known or name.startswith(known + "."):
                return position, known
    return None


def test_imports_run_one_way():
    for name, file in modules():
        if name == "tva":
            continue
        own = layer_of(name)
        assert own is not None, f"{name} has no layer; add it to LAYERS"
        for imported in imports(file):
            other = layer_of(imported)
            if other is not None:
                assert other[0] < own[0] or other[1] == own[1], f"{name} must not import {imported}"


def test_each_heavy_dependency_has_one_door():
    for name, file in modules():
        own = layer_of(name)
        for imported in imports(file):
            top = imported.split(".")[0]
            if top in DOORS:
                assert own[1] in DOORS[top], f"{name} must not import {top}"
            if own is not None and own[1] in TORCH_ONLY:
                light = {"torch", "numpy", "safetensors", "xxhash", "huggingface_hub", "tva", "__future__"}
                light |= {"backports", "compression"}
                assert top in light | sys.stdlib_module_names, f"{name} must not import {top}"


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
from tva.cli import main

for line in sys.argv[1].splitlines():
    main(line.split())
    heavy = {'lightning', 'open_clip', 'datasets', 'timm', 'transformers', 'matplotlib', 'scipy.stats'}
    loaded = heavy & sys.modules.keys()
    assert not loaded, (line, loaded)
"""


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
import sys
from tva.cli import main

for line in sys.stdin:
    main(line.split())
    assert 'torch' not in sys.modules, line
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_and_selections_of_safetensors_never_load_torch(tmp_path, dtype):
    """Nor do plans and checks of them; loading it would take longer than the arithmetic."""
    state = {"l.0.w": torch.randn(40, 30), "l.1.w": torch.randn(300), "empty": torch.zeros(0), "one": torch.ones(())}
    state = {name: tensor.to(dtype) for name, tensor in state.items()} | {"steps": torch.tensor(3)}
    save_weights(state, tmp_path / "base.safetensors")
    for name, like in (("a", state), ("b", state)):
        moved = {key: torch.randn_like(x) if x.is_floating_point() and key != "one" else x for key, x in like.items()}
        save_weights(moved, tmp_path / f"{name}.safetensors")
    vector = TaskVector.between(open_weights(tmp_path / "base.safetensors"), open_weights(tmp_path / "b.safetensors"))
    vector.save(tmp_path / "v.tv.safetensors")
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
    run = [sys.executable, "-c", NO_TORCH]
    done = subprocess.run(run, input=commands, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_checkout_imports_without_installation():
    code = "import tva, tva.callbacks; print(tva.__file__, tva.callbacks.__file__)"
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    files = run_python(code, "-S", PYTHONPATH=path)  # -S: no .pth file, so no editable install
    assert files == [str(ROOT / "tva/__init__.py"), str(ROOT / "callbacks/__init__.py")]


@pytest.mark.slow
def test_the_installed_package_imports_here():
    files = run_python("import tva, tva.callbacks.task_vector as t; print(tva.__file__, t.__file__)")
    assert files[1].endswith("callbacks/task_vector.py")


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
