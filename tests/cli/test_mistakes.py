"""Mistakes on the command line: status 2, no traceback, nothing written, and words that say what to do."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small_cli
import torch
from safetensors.torch import save_file

from tva import TaskVector, open_weights, save_weights
from tva.checkpoints import atomic_path
from tva.cli.explain import explain
from tva.cli.main import main
from tva.compose.apply import compose
from tva.compose.recipe import Recipe

BASE, VECTOR = "base.safetensors", "digits.tv.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a fine-tuned model and its vector, and files that are none."""
    folder = tmp_path_factory.mktemp("made")
    base = {"layers.0.w": torch.randn(6, 5), "layers.1.w": torch.randn(4)}
    save_weights(base, folder / BASE)
    finetuned = {name: value + 0.1 for name, value in base.items()}
    save_weights(finetuned, folder / "finetuned.safetensors")
    TaskVector.between(base, finetuned).save(folder / VECTOR)
    broken = {**finetuned, "layers.1.w": torch.full((4,), float("nan"))}
    save_weights(broken, folder / "broken.safetensors")
    save_weights({"layers.0.w": torch.randn(6, 9), "layers.1.w": torch.randn(4)}, folder / "wider.safetensors")
    (folder / "page.ckpt").write_text("<html>404 not found</html>")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    (folder / "notes.safetensors").write_text("remember the milk\n" * 9)
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A folder of one's own with those files."""
    for file in made.iterdir():
        Path(file.name).write_bytes(file.read_bytes())
    return tmp_path


def run(capsys, *words):
    """Run a command; gives its status and what it said on the standard error."""
    return small_cli.run(*words), capsys.readouterr().err


COMPOSE = ("compose", "--base", BASE, "--vectors.digits", VECTOR)


def test_a_recipe_and_numbers_may_begin_with_a_minus(place, capsys):
    status, text = run(
        capsys, *COMPOSE, "--recipe", "-digits", "--scaling_coef", "-1e-1", "--output", "out.safetensors"
    )
    assert (status, text) == (0, "")
    vector = TaskVector.load(VECTOR)
    expected = (-vector).apply_to(open_weights(BASE), -0.1)
    assert torch.equal(open_weights("out.safetensors")["layers.0.w"], expected["layers.0.w"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recpie", "digits"], r"no option --recpie. Did you mean --recipe\? 'tva compose --help' lists"),
        (["digits"], "'digits' is unexpected: every value follows its option"),
        (["--scaling_coef", "many"], "--scaling_coef must be a number; found 'many'."),
        (["--coefs.s", "many"], r"--coefs.s must be float \| Mapping\[.*\]; found 'many'."),
        (["--vectors", VECTOR], "--vectors must be names with values, as in --vectors.NAME VALUE"),
        (["--key_map", "x"], "--key_map must be names with values"),
        (["--keep_undo", "maybe"], "--keep_undo must be true or false or 'with_vectors'; found 'maybe'."),
        (["--recipe"], "--recipe must be followed by a value."),
        ([], "--recipe must be given; usage: tva compose --base BASE --vectors.NAME VECTORS "),
        (["--recipe", "digits", "--scaling_coef", ".inf"], "scaling_coef must be a finite number; found inf"),
        (["--recipe", "digits", "--config", "none.yaml"], "--config: there is no file"),
        (["--recipe", "digits", "--base", "bsae.safetensors"], r"\(. holds 'base.safetensors' and others"),
        (["--recipe", "digits", "--base", "nowhere/b.safetensors"], "nowhere does not exist"),
        (["--recipe", "digits", "--base", "pointer.safetensors"], "pointer of Git LFS.*git lfs pull"),
        (["--recipe", "digits", "--base", "notes.safetensors"], "it is text that begins with 'remember the milk"),
        (["--recipe", "digits", "--vectors.digits", "page.ckpt"], "not a PyTorch checkpoint .*begins with '<html>404"),
        (["--recipe", "digits", "--vectors.digits", "wider.safetensors"], r"differ: 'layers.0.w \[6, 5\] and \[6, 9"),
        (["--recipe", "digits", "--vectors.digits", "broken.safetensors"], "'layers.1.w' .*: broken.safetensors, the"),
        (["--recipe", "digits", "--scaling_coef", "1e39"], "too large for torch.float32. Give a smaller"),
        (["--recipe", "digits", "--vectors.digits", BASE], "is zero.* read: digits is base.safetensors"),
        (["--recipe", "digits", "--scaling_coef", "1e-30"], "vanishes in rounding to the output's dtype. Use a larger"),
        (["--recipe", "s * digits"], "If it is a coefficient, give its value: --coefs.s NUMBER"),
        (["--recipe", " + ".join(["digits"] * 4000)], "must not nest hundreds of levels deep"),
        (["--recipe", "digits", "--output", "base.safetensors/out.safetensors"], "cannot be written: .*in a folder"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_mistakes_say_what_is_wrong_and_what_to_do(place, capsys, words, message):
    before = {file.name for file in place.iterdir()}
    words = words if "--output" in words else [*words, "--output", "out.safetensors"]
    status, text = run(capsys, *COMPOSE, *words)
    assert (status, text.startswith("tva: error: ")) == (2, True), text
    assert re.search(message, text), text
    assert "Traceback" not in text
    assert len(text) < 800
    assert {file.name for file in place.iterdir()} == before, "something was left behind"


@pytest.mark.parametrize("output", [BASE, VECTOR, "./base.safetensors"])
def test_an_input_is_never_overwritten(place, capsys, output):
    before = Path(output).read_bytes()
    status, text = run(capsys, *COMPOSE, "--recipe", "digits", "--output", output)
    assert (status, "would replace it. Give another output" in text) == (2, True)
    assert Path(output).read_bytes() == before


def test_a_folder_may_be_base_and_hold_the_edit_but_keeps_its_weights(place):
    Path("model").mkdir()
    Path(BASE).rename("model/model.safetensors")
    vectors = {"digits": VECTOR}
    for _ in range(2):  # once more over the first
        compose("model", vectors, "digits", "model/edited.safetensors")
    with pytest.raises(ValueError, match="is what is given as base, model, or a file of it, and would replace it"):
        compose("model", vectors, "digits", "model/model.safetensors")


def test_statistics_files_and_edits_that_are_reverted_are_inputs_too(place, capsys):
    save_file({name: torch.ones_like(value) for name, value in open_weights(BASE).items()}, "f.safetensors")
    status, text = run(
        capsys, *COMPOSE, "--recipe", "fisher(digits, files=('f.safetensors',))", "--output", "f.safetensors"
    )
    assert (status, "would replace it" in text) == (2, True)
    assert run(capsys, *COMPOSE, "--recipe", "digits", "--output", "out.safetensors", "--keep_undo")[0] == 0
    for output in ("out.safetensors", "out.undo.safetensors"):
        status, text = run(capsys, "revert", "out.safetensors", "--output", output)
        assert (status, "would replace it" in text) == (2, True)
    assert run(capsys, "revert", "out.safetensors", "--output", "back.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["extract", BASE, "finetuned.safetensors"], "usage: tva extract --base BASE --fine"),
        (["inspect"], "--path must be given; usage: tva inspect PATH "),
        (["inspect", VECTOR, "--by", "color"], "--by must be 'group', 'layer' or 'tensor'; found"),
        (["compare", VECTOR, VECTOR], "was given more than once. Leave it out"),
        (["compress", VECTOR, "--outptu", "x"], r"no option --outptu. Did you mean --output\?"),
        (["extract", "--base", BASE, "--finetuned", "finetuned.safetensors", "--output",
          "base.safetensors/x.tv.safetensors"], "cannot be written: .*Give an output in a folder"),
        (["extract", "--base", BASE, "--finetuned", "broken.safetensors", "--output", "x.safetensors"],
         "broken.safetensors against the base base.safetensors: A task vector must be finite"),
        ([*COMPOSE, "--recipe", "digits", "--output", "x.safetensors", f"--scaling_coef={'9' * 400}"],
         "A number among the options is too large"),
        ([*COMPOSE, "--recipe", "digits", "--output", "x.safetensors", "--key_map", r'{"\\d": "2"}'],
         "would both be called 'layers.2.w' by key_map"),
    ],
)  # fmt: skip
def test_mistakes_in_commands_on_files(place, capsys, words, message):
    status, text = run(capsys, *words)
    assert (status, text.startswith("tva: error: ")) == (2, True), text
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be an expression of task vectors, such as 'a . b'; found nothing"),
        ("a +", r"This is not an expression .*\n  a \+\n     \^"),
        ("1e400 * a", "beyond what float32 can hold"),
        ("ties(a, density='0.2')", "density must be a number; found '0.2'"),
        ("ties(a, density=many)", "found many"),
        ("ties(a, trim=3)", "trim must be a text in quotes; found 3"),
        ("dare(a, seed=0.5)", "seed must be a whole number; found 0.5"),
        ("breadcrumbs(a, rows='yes')", "rows must be True or False; found 'yes'"),
        ("ties(a, weights=('1',))", r"weights must be numbers, such as \(1, 0.5\)"),
        ("fisher(a, files=(1,))", "files must be texts in quotes"),
        ("ties(a, density={[]: 1})", "An option must be a number, a text in quotes or"),
        ("tall(a, task='a')", "task must be a whole number; found 'a'"),
    ],
)
def test_recipes_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        Recipe(text, ["a"])


def test_coefficients_are_finite():
    with pytest.raises(ValueError, match="The coefficient 's' must be a finite number; found inf"):
        Recipe("s * a", ["a"], {"s": float("inf")})


def test_the_caret_of_a_long_recipe_stays_in_sight():
    with pytest.raises(ValueError, match=r"'b' is unknown") as error:
        Recipe("0.5 * (" + " + ".join(["a"] * 100) + " + b + " + " + ".join(["a"] * 100) + ")", ["a"])
    _, shown, caret = str(error.value).split("\n")
    assert max(len(shown), len(caret)) < 250
    assert shown[len(caret) - 1] == "b"


def test_a_choice_of_a_list_that_does_not_exist_is_named_with_the_nearest(place, capsys):
    words = ["--vectors.a", VECTOR, "--recipe", "a", "--baselines", "[rando]"]
    status, text = run(capsys, "edit", *words)
    assert status == 2
    assert re.search(r"--baselines must be a list of .*random.*; found .*rando.* Did you mean 'random'\?", text)
    assert "NoneType" not in text


def test_a_parsers_words_that_are_not_known_stay():
    assert explain("something else", "compose", []) == "something else"
    assert explain('Parser key "x": something else', "compose", []) == 'Parser key "x": something else'


def test_a_disk_that_is_full_is_not_called_a_wrong_folder():
    with pytest.raises(OSError, match="no room"), atomic_path(Path("x")):
        raise OSError(28, "no room")


@pytest.mark.parametrize("command", ["compose", "inspect"])
def test_an_interrupted_command_says_so_in_one_line(place, capsys, monkeypatch, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    words = [*COMPOSE, "--recipe", "digits", "--output", "out.safetensors"]
    if command == "compose":
        monkeypatch.setattr("tva.compose.apply.Composer.run", interrupted)
    else:
        monkeypatch.setattr(importlib.import_module("tva.vectors.inspect"), "open_weights", interrupted)
        words = ["inspect", VECTOR]
    status, text = run(capsys, *words)
    assert (status, text.startswith("tva: interrupted.")) == (130, True)
    assert ("the same command with --resume continues" in text) == (command == "compose")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect digits.tv.safetensors", "inspect digits.tv.safetensors --json"])
def test_a_reader_that_goes_away_is_no_error(place, command):
    words = [sys.executable, "-c", f"from tva.cli.main import main; main({command.split()})"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_json_of_an_edit_by_zero_or_of_a_base_of_zeros_is_json(place, capsys):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    zeros = {name: torch.zeros_like(value) for name, value in open_weights(BASE).items()}
    save_weights(zeros, "zeros.safetensors")
    options = ["--recipe", "digits", "--output", "out.safetensors", "--json"]
    for more, change in ((["--scaling_coef", "0"], 0), (["--base", "zeros.safetensors", "--allow_other_base"], None)):
        main([*COMPOSE, *more, *options])
        effects = json.loads(capsys.readouterr().out, parse_constant=refuse)["effects"]
        assert {effect["relative_change"] for effect in effects.values()} == {change}
