"""The site builds without a warning, and every block of README and docs/ does what it says.

Blocks of a page run in their order, in a folder of files with the names that the pages use:

- ``bash``: every line that begins with ``tva`` is a command; other programs must be ones that pages may name.
- ``python``: is executed, with the names that earlier blocks of the page left.
- ``yaml``: is a part of a configuration; one that begins with ``# NAME.yaml`` is written there.
- no language, ``text``, ``toml``: output and the like, not run.

``<!-- not run: REASON -->`` above a block leaves it out.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_edit
import small_text
import torch
import yaml
from small_cli import run

from tva import TaskVector, fingerprint, save_weights

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "commands"} & set(path.parts))
BLOCK = re.compile(r"(<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.M | re.S)
OUTPUT = {"", "text", "toml"}
OTHER_PROGRAMS = {"pip", "make", "python", "ray", "hf", "cd", "git"}
SLOW = {
    "tutorials/first-edits.md",
    "tutorials/hugging-face.md",
    "howto/better-vectors.md",
    "howto/curvature-penalty.md",
    "howto/compose.md",
    "howto/paper.md",
}
ELSEWHERE = {  # tests of their own
    "tutorials/own-project.md": "tests/test_howto.py",
    "howto/any-model.md": "tests/test_howto.py",
    "howto/any-table.md": "tests/test_howto.py",
    "howto/edit-hugging-face.md": "tests/test_howto.py",
    "tutorials/your-method.md": "tests/merge/test_find.py",
    "howto/paper.md": "tests/paper/test_suite.py",
    "howto/forget-texts.md": "tests/cli/test_forget.py",
    "howto/score-texts.md": "tests/data/test_generation_task.py",
    "howto/several-devices.md": "tests/edit/test_sharded.py",
}
FEWER = {  # what a page's commands are given besides, so that they take seconds
    "fit": ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"],
    "fit-many": ["--plan"],
    "edit": ["--search=tva.search.Grid", "--search.num=2"],
}


def blocks(page):
    return list(BLOCK.finditer(page.read_text()))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with the files that pages name: checkpoints, vectors, a project, fits and finished edits."""
    folder = tmp_path_factory.mktemp("world")
    base = {f"layers.{layer}.mlp.w": torch.randn(128, 256) for layer in range(2)} | {"out.b": torch.randn(6)}
    save_weights(base, folder / "base.safetensors")
    save_weights(base, folder / "pretrained.safetensors")
    for name in ("a", "mnist"):
        torch.save({"state_dict": moved(base)}, folder / f"{name}.ckpt")
    for name in ("b", "svhn", "digits"):
        TaskVector.between(base, moved(base)).save(folder / f"{name}.tv.safetensors")
    fitted = {key: value.clone() for key, value in small_edit.Net().state_dict().items()}
    vectors = {}
    for name in ("digits", "letters", "textures"):
        checkpoints = folder / f"runs/demo/{name}/seed=0/checkpoints"
        state, vectors[name] = moved(fitted), str(checkpoints / "last.tv.safetensors")
        checkpoints.mkdir(parents=True)
        save_weights(fitted, checkpoints / f"base-{fingerprint(fitted).digest}.safetensors")
        torch.save({"state_dict": state}, checkpoints / "last.ckpt")
        TaskVector.between(fitted, state).save(vectors[name])
    edits = tmp_path_factory.mktemp("edits")
    tasks = {"digits": small_edit.Task(1), "letters": small_edit.Task(2)}
    small_edit.edit(vectors, folder=edits, recipe="digits + letters", targets=tasks)
    for name in ("add", "forget"):
        shutil.copytree(edits / "out", folder / f"runs/demo/{name}/seed=0")
    for link in ("configs", "examples", "benchmarks"):
        (folder / link).symlink_to(ROOT / link)
    classes = "\nNet = LinearNet\n\n\nclass Data(Blobs):\n    def __init__(self):\n        super().__init__(1)\n"
    (folder / "my_project.py").write_text((ROOT / "tests/small_models.py").read_text() + classes)
    return folder


def moved(state):
    return {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    """A copy of the world, in which a page's blocks run."""
    shutil.copytree(world, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))  # for what completes commands
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.setenv("D", "runs/demo")
    monkeypatch.setenv("C", "seed=0/checkpoints")
    (base,) = Path("runs/demo/digits/seed=0/checkpoints").glob("base-*")
    monkeypatch.setenv("B", str(base))
    yield tmp_path / "here"
    for name in ("digits", "main", "my_project"):
        sys.modules.pop(name, None)


def names_of(page):
    """Return the names that a page's Python blocks take as given."""
    import lightning as L

    task = {"digits": small_edit.Task(1)}, {"objects": small_edit.Task(3)}
    given = {
        "howto/report.md": {"targets": task[0], "controls": task[1]},
        "howto/merge-statistics.md": {"model": small_edit.LinearNet(), "data": small_edit.Blobs(1)},
        "howto/better-vectors.md": {"L": L},
    }.get(page, {})
    if page == "howto/report.md":
        model = given["model"] = small_edit.Net()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        TaskVector.between(state, {key: value + 0.01 for key, value in state.items()}).save("small.tv.safetensors")
        given["vectors"] = {"digits": "small.tv.safetensors"}
    return {"__name__": "page", **given}


def run_shell(text):
    """Run the lines of a shell block that are commands of tva; the shell itself expands their words."""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        expand = f'show() {{ for word in "$@"; do printf "%s\\0" "$word"; done; }}; show {line}'
        program, *words = subprocess.run(
            ["bash", "-c", expand], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
        if program != "tva":
            assert program in OTHER_PROGRAMS, line
            continue
        command = words[0]
        if "configs/demo" in line:
            run_by_the_demo(words)
            continue
        status = run(*[*words, *FEWER.get(command, ())])
        assert status in ({0, 1} if command == "edit" else {0}), line


def run_by_the_demo(words):
    """Check that a command is one of the demo's, which tests/test_demo.py runs with these configurations."""
    configs = [Path(word) for word in words if word.startswith("configs/")]
    assert words == [words[0], *(word for config in configs for word in ("--config", str(config)))]
    assert [config.parent.name for config in configs] == [words[0]] * len(configs)
    assert all(config.exists() for config in configs)
    if words[0] == "fit":
        assert configs[0].name == "common.yaml"


def run_block(language, text, scope):
    """Run one block, or write it where its first line is a file's name."""
    name = re.match(r"# (\w+\.(?:yaml|py))\n", text)
    if name:
        Path(name[1]).write_text(text)
    if language == "bash":
        run_shell(text)
    elif language == "yaml":
        assert yaml.safe_load(text) is not None
    elif language == "python":
        exec(compile(text, "block", "exec"), scope)
    else:
        assert language in OUTPUT, language


def page_name(page):
    return page.relative_to(DOCS).as_posix()


RUN = [
    pytest.param(page, id=page_name(page), marks=[pytest.mark.slow] if page_name(page) in SLOW else [])
    for page in PAGES
    if page_name(page) not in ELSEWHERE and blocks(page)
]


@pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:The number of training")
@pytest.mark.parametrize("page", RUN)
def test_every_block_of_a_page_runs(page, folder, capsys):
    scope = names_of(page_name(page))
    if page_name(page) == "tutorials/hugging-face.md":
        local = small_text.write_model(folder / "bert")
    for block in blocks(page):
        if block["reason"] is None:
            text = block["text"]
            if page_name(page) == "tutorials/hugging-face.md":
                text = text.replace("google/bert_uncased_L-2_H-128_A-2", str(local))
            run_block(block["language"], text, scope)


def test_few_blocks_are_not_run():
    reasons = [f"{page_name(page)}: {block['reason']}" for page in PAGES for block in blocks(page) if block["reason"]]
    assert len(reasons) <= 5, reasons
    for page, test in ELSEWHERE.items():
        assert (ROOT / test).exists()
        assert page_name(DOCS / page).split("/")[-1] in (ROOT / test).read_text()


def test_guides_are_short_and_pages_say_what_they_are_for():
    for page in PAGES:
        lines = page.read_text().splitlines()
        assert len(lines) <= 80 or page.parent.name != "howto", f"{page}: {len(lines)} lines"
        if page.stem not in ("index", "contributing", "changelog") and page.parent.name != "notebook":
            first = " ".join(lines[2:5])
            assert re.match(r"(After this (page|tutorial)|Look up|Read here|Compare here)", first), f"{page}: {first}"


def test_pages_name_no_place_that_readers_do_not_have():
    here = f"{ROOT.parent}/" if len(ROOT.parts) > 2 else f"{ROOT}/"  # whichever machine the tests run on
    for path in [*PAGES, ROOT / "README.md", *(ROOT / "configs").rglob("*.yaml")]:
        assert not re.search(r"shared/(data|models)|TVA_MODELS", path.read_text()), path
        assert here not in path.read_text(), path
        assert path.suffix == ".md" or "$" not in path.read_text(), path


def anchors(page):
    """Return the fragments by which links name the headings of a page, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", found) for found in re.findall(r"^#+ (.*)$", text, re.M))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_to_files_and_headings():
    broken = []
    for page in [*PAGES, *ROOT.glob("*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, fragment = link.partition("#")
            target = page.parent / path if path else page
            if re.match(r"\w+:", link) or "commands" in target.parts:  # outside; or written when the site is built
                continue
            if not target.exists() or (fragment and target.suffix == ".md" and fragment not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


@pytest.mark.slow
def test_the_site_builds_without_a_warning():
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "docs", "docs/_build/html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    index = (ROOT / "docs/_build/html/searchindex.js").read_text()
    assert "taskvectorcallback" in index.lower()
    page = (ROOT / "docs/_build/html/reference/commands/compose.html").read_text()
    assert "--max_memory" in page
    for built in (ROOT / "docs/_build/html").rglob("*.html"):  # nothing comes from a network
        loaded = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*>", built.read_text())
        outside = [tag for tag in loaded if re.search(r"(?:src|href)=[\"'](?:https?:)?//", tag)]
        assert not outside, (built, outside)
    for style in (ROOT / "docs/_build/html").rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text()), style
