"""Every block of CONTRIBUTING.md works: by dotted path, as an entry point of an installed package, and inside tva."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import small_edit
import torch
import yaml

import tva.data
import tva.search
from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.cli.main import main
from tva.plugins import installed

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
MODULES = dict(re.findall(r"```python\n# my_package/(\w+)\.py\n(.*?)```", PAGE, flags=re.DOTALL))
(POINTS,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)


def blocks(language, containing):
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return next(text for text in found if containing in text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with checkpoints, and the page's package on the path.

    Its modules stay loaded after the last test: help lists the subclasses there are, and imports them by name.
    """
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]
    package = tmp_path / "site/my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, text in MODULES.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    base = {"w": torch.randn(40, 3), "b": torch.randn(3)}
    save_weights(base, "base.safetensors")
    for name in "abc":
        save_weights({key: value + torch.randn_like(value) for key, value in base.items()}, f"{name}.safetensors")
    (tmp_path / "arrays").mkdir()
    for key, value in open_weights("a.safetensors").items():
        numpy.save(f"arrays/{key}.npy", value.numpy())
    names = {module: set(vars(module)) for module in (tva.search, tva.data)}
    installed.cache_clear()
    yield tmp_path
    installed.cache_clear()
    for module, before in names.items():
        for name in vars(module).keys() - before:
            delattr(module, name)


vectors = small_edit.vectors  # a fixture


@pytest.fixture
def package(folder):
    """The package, installed with the page's entry points."""
    information = folder / "site/my_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    lines = re.sub(r'^\s*(\[)project\.entry-points\."([\w.]+)"(\])', r"\1\2\3", POINTS, flags=re.MULTILINE)
    (information / "entry_points.txt").write_text(re.sub(r'^\s*(\w+ = )"(.*)"', r"\1\2", lines, flags=re.MULTILINE))
    installed.cache_clear()
    return folder


def run(block, *changes):
    """Run the lines of a shell block."""
    for old, new in changes:
        assert old in block
        block = block.replace(old, new)
    for line in block.replace("\\\n", " ").splitlines():
        main(shlex.split(line)[1:])


def assert_is_the_median():
    base, *tuned = (open_weights(f"{name}.safetensors") for name in ("base", "a", "b", "c"))
    deltas = torch.stack([weights["w"] - base["w"] for weights in tuned])
    assert torch.equal(open_weights("edited.safetensors")["w"], base["w"] + 0.5 * deltas.median(dim=0).values)


def edit(vectors, folder, *changes):
    """Run ``tva edit`` with what the page's YAML blocks add to a configuration."""
    added = blocks("yaml", "search:") + blocks("yaml", "maximize:")
    for old, new in changes:
        assert old in added
        added = added.replace(old, new)
    task = {"class_path": "small_models.Blobs", "init_args": {"seed": 1}}
    config = {"vectors": vectors, "recipe": "a", "targets": {"a": task}, "output": "out", **yaml.safe_load(added)}
    trainer = {"accelerator": "cpu", "logger": False}
    Path("edit.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "small_edit.Net"}, "trainer": trainer, **config})
    )
    main(["edit", "--config", "edit.yaml"])
    report = json.loads(Path("out/edit.json").read_text())
    tried = {e["coefficients"]["scaling_coef"] for e in report["evaluations"] if e["split"] == "val"}
    assert {1 / 2**step for step in range(6)} <= tried | {0.0}
    (metric,) = {e["metric"] for e in report["evaluations"] if "margin" in e["metric"]}
    assert report["edited"]["fingerprint"] == fingerprint(open_weights("out/edited.safetensors")).digest
    return metric


def test_each_thing_takes_twelve_lines():
    assert MODULES.keys() >= {"median", "halves", "margin", "count", "arrays", "halves_of_a_square"}
    for name, text in MODULES.items():
        assert sum(bool(line.strip()) for line in text.splitlines()) <= 12, name


def test_a_merge_method_by_its_path(folder):
    run(blocks("bash", "tva compose"))
    assert_is_the_median()


def test_a_merge_method_of_an_installed_package(package):
    run(blocks("bash", "tva compose"), ("my_package.median.Median", "median"))
    assert_is_the_median()


def test_a_search_and_a_metric_by_their_paths(folder, vectors):
    assert edit(vectors, folder) == "my_package.margin.margin"


def test_a_search_and_a_metric_of_an_installed_package(package, vectors):
    names = (("my_package.halves.Halves", "tva.search.Halves"), ("my_package.margin.margin", "margin"))
    assert edit(vectors, package, *names) == "margin"


def test_a_command_of_an_installed_package(package, capsys):
    run(blocks("bash", "tva count"))
    assert capsys.readouterr().out == "123 parameters\n123\n"
    main(["--help"])
    assert re.search(r"count +count the parameters of a checkpoint", capsys.readouterr().out)


def assert_reads_arrays():
    base, vector = open_weights("base.safetensors"), TaskVector.load("arrays.tv.safetensors")
    for name, delta in vector.deltas.items():
        assert torch.equal(delta, torch.from_numpy(numpy.load(f"arrays/{name}.npy")) - base[name])


def test_a_format_of_an_installed_package(package):
    run(blocks("bash", "tva extract"))
    assert_reads_arrays()


def fit(folder, *change):
    """Run ``tva fit`` on what the page's YAML block names."""
    from small_cli import fit_config

    config = fit_config(folder / "run") | yaml.safe_load(blocks("yaml", "data:").replace(*change))
    Path("fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "fit.yaml"])
    assert TaskVector.load("run/last.tv.safetensors").origin.step == 30


def test_a_data_set_by_its_path(folder):
    fit(folder, "", "")


def test_a_data_set_of_an_installed_package(package):
    fit(package, "my_package.halves_of_a_square", "tva.data")


FOLDERS = {"median": "merge/methods", "halves": "search", "count": "cli/commands", "arrays": "checkpoints/formats"}
INSIDE = """
import sys
import tva.search
from tva.cli.main import main

assert tva.__file__.startswith(sys.argv[1]), tva.__file__
assert tva.search.Halves().run
for line in sys.argv[2:]:
    main(line.split("|"))
"""


@pytest.mark.slow
def test_files_in_the_folders_of_tva(folder):
    shutil.copytree(ROOT / "tva", folder / "copy/tva")
    shutil.copytree(ROOT / "callbacks", folder / "copy/tva/callbacks")
    for name, where in FOLDERS.items():
        assert f"`tva/{where}/`" in PAGE
        (folder / f"copy/tva/{where}/{name}.py").write_text(MODULES[name])
    lines = [
        block.replace("\\\n", " ") for block in map(blocks, 3 * ["bash"], ["tva compose", "tva extract", "tva count"])
    ]
    lines = "".join(lines).replace("my_package.median.Median", "median").splitlines()
    words = ["|".join(shlex.split(line)[1:]) for line in lines]
    command = [sys.executable, "-c", INSIDE, str(folder / "copy"), *words]
    environment = {**os.environ, "PYTHONPATH": str(folder / "copy")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("123 parameters\n123\n")
    assert_is_the_median()
    assert_reads_arrays()
