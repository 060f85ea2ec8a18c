"""What a newcomer meets: templates, completion, and mistakes in a YAML file, named with file and line at once."""

import logging
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from tva.cli.commands.init import TEMPLATES
from tva.cli.config_files import with_place
from tva.cli.main import list_commands, main

KINDS = sorted(path.stem for path in TEMPLATES.iterdir())


def message(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_init_writes_a_commented_file_that_names_its_command(kind, capsys):
    main(["init", kind, "--output", "mine.yaml"])
    text = Path("mine.yaml").read_text()
    command = text.splitlines()[0].removeprefix("# ")
    assert f"then run {command}" in capsys.readouterr().out
    assert command.endswith(" --config mine.yaml")
    assert text.count("CHANGE") >= 4
    assert all(len(line) <= 120 for line in text.splitlines())
    assert yaml.safe_load(text)


def test_init_replaces_nothing(capsys):
    Path("forget.yaml").write_text("mine")
    assert "forget.yaml is there already and is not replaced" in message(capsys, "init", "forget")
    assert Path("forget.yaml").read_text() == "mine"


def test_a_template_of_an_edit_takes_the_vector_that_the_template_of_a_fit_writes():
    fit = yaml.safe_load((TEMPLATES / "fit.yaml").read_text())
    forget = yaml.safe_load((TEMPLATES / "forget.yaml").read_text())
    checkpoints = fit["trainer"]["callbacks"][1]["init_args"]
    assert forget["vectors"]["digits"] == f"{checkpoints['dirpath']}/{checkpoints['filename']}.tv.safetensors"


MISTAKES = {
    "recipe: -digits +": "line 9: This is not an expression",
    "recipe: -digits * digits": "line 9: Two task vectors cannot be multiplied",
    "recpie: -digits": "line 9: there is no option 'recpie'. Did you mean 'recipe'?",
    "recipe: [-digits": "line 10: not YAML that can be read: did not find expected",
    "rule: largest": "line 11: 'rule' is given twice, first in line 9. Keep one.",
    "recipe:\n\t-digits": "line 10: not YAML that can be read: a tab is where only spaces may be.",
    "recipe: -digits\n x: 1": "line 10: not YAML that can be read: mapping values are not allowed in this context. ",
    "recipe: -digits # as it is": "line 8: digits: A checkpoint was expected at runs/digits/last.tv.safetensors",
}


EACH = """
import sys; from tva.cli.main import main
loaded = []  # when something is first said
write, sys.stderr.write = sys.stderr.write, lambda text: loaded.append(set(sys.modules)) or write(text)
for words in (*(['--config', it] for it in sys.argv[1:]), ['--devices=2'], ['--recpie', '-a'], ['--trainr.devices=2']):
    try: main(['edit', *words])
    except SystemExit as end: assert end.code == 2
    else: raise AssertionError(words)
    assert not {'torch', 'lightning'} & set(sys.modules)
assert not {'numpy', 'jsonargparse', 'tva.checkpoints'} & loaded[0]
"""


def test_mistakes_in_a_config_are_named_with_their_line_before_lightning_is_imported():
    text = (TEMPLATES / "forget.yaml").read_text()
    for number, wrong in enumerate(MISTAKES):
        Path(f"{number}.yaml").write_text(text.replace("recipe: -digits", wrong))
    Path("forget.yaml").write_text(text)
    files = [*(f"{number}.yaml" for number in range(len(MISTAKES))), "forgte.yaml"]
    done = subprocess.run([sys.executable, "-c", EACH, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("tva edit: loading …\n")
    found = re.findall(r"tva: error: .*(?:\n(?!tva: error).*)*", done.stderr)
    for number, message in enumerate(MISTAKES.values()):
        assert f"tva: error: {number}.yaml, {message}" in found[number]
    assert [re.search(r"Did you mean (\S+)\?", message)[1] for message in found[-3:]] == [
        "--trainer.devices",
        "--recipe",
        "--trainer.devices",
    ]
    assert (
        found[-4].splitlines()[0] == "tva: error: --config: there is no file 'forgte.yaml'. Did you mean 'forget.yaml'?"
    )
    assert "TVA_DEBUG" not in done.stderr


def test_a_value_of_the_wrong_type_is_named_with_its_line(capsys):
    text = (TEMPLATES / "forget.yaml").read_text().replace("confidence: 0.95", "confidence: high")
    Path("forget.yaml").write_text(text.replace("runs/digits/last.tv.safetensors", "forget.yaml"))
    assert "forget.yaml, line 13: --confidence must be a number; found 'high'" in message(
        capsys, "edit", "--config", "forget.yaml"
    )


def test_a_line_is_named_by_what_a_message_quotes_if_no_other_line_holds_it():
    Path("a.yaml").write_text("confidence: 95\nx:\n- a/b >= 0.9 * base\ny: [a, a]\nz: a\n")
    words = ["--config", "a.yaml"]
    assert with_place("The constraint 'a/b >= 0.9 * base' is", words).startswith("a.yaml, line 3: The constraint")
    assert with_place("confidence must be in [0.5, 1)", words).startswith("a.yaml, line 1: confidence must")
    for given in (["--confidence=7"], ["--confidence", "7"]):  # what the command line says stands in no file
        assert with_place("confidence must be in [0.5, 1)", [*words, *given]) == "confidence must be in [0.5, 1)"
    message = "The constraint 'a/b >= 0.9 * base' is"
    assert with_place(message, [*words, "--subject_to", "a/b >= 0.9 * base"]) == message
    for message in ("The task 'acc' is", "a 'b' is", "Nothing is quoted"):
        assert with_place(message, words) == message


def test_an_error_is_broken_between_words_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    lines = message(capsys, "init", "forgte").splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 60
    assert " ".join(lines).endswith("Did you mean 'forget'?")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("report x --csv x.tex", "--csv must be a file that ends in .csv; found 'x.tex'"),
        ("report x --charts fit.yaml", "--charts must be a folder, and fit.yaml is a file"),
        ("push x forgetful", "named OWNER/NAME, as in me/forgetful; found 'forgetful'"),
        ("fit-many --seeds 3", "--seeds must be a list; found '3'. Write --seeds='[3]'"),
        ("fit-many --config fit.yaml", "there is no option 'trainer'. Put options of the fits below 'shared'."),
        ("vectors ls fit.yaml", "A folder was expected at fit.yaml, but a file is there"),
    ],
)
def test_mistakes_of_the_first_hour(words, found, capsys):
    Path("fit.yaml").write_text((TEMPLATES / "fit.yaml").read_text())
    assert found in message(capsys, *words.split())
    assert [path.name for path in Path().iterdir()] == ["fit.yaml"]


def test_choices_are_listed_and_a_shortened_option_has_the_nearest_named(capsys):
    assert "usage: tva init fit|forget|add|analogy|merge [options]" in message(capsys, "init")
    assert "or 'merge'; found 'forgte'. Did you mean 'forget'?" in message(capsys, "init", "forgte")
    found = message(capsys, "fit", "--model=ClipClassifier", "--model.lora.rank=4")
    assert "--model.lora.rank: Lora has r, alpha, target_modules, dropout; found '4'." in found
    assert "no option --trainer.device. Did you mean --trainer.devices?" in message(capsys, "fit", "--trainer.device=2")


def test_configs_of_other_commands_are_checked_too(capsys):
    Path("merge.yaml").write_text((TEMPLATES / "merge.yaml").read_text().replace("ties(a", "tise(a"))
    found = message(capsys, "compose", "--config", "merge.yaml")
    assert "merge.yaml, line 9: There is no function 'tise'" in found
    Path("merge.yaml").write_text("base: a\nvectros: {}\n")
    assert "merge.yaml, line 2: there is no option 'vectros'. Did you mean 'vectors'?" in message(
        capsys, "compose", "--config", "merge.yaml"
    )


@pytest.mark.parametrize(("word", "meant"), [("merge", "compose"), ("mrege", "compose"), ("extrct", "extract")])
def test_another_tools_word_for_a_command_names_ours(word, meant, capsys):
    assert f"Did you mean '{meant}'?" in message(capsys, word)


def complete(script, *words):
    """Return what bash would offer for the last of some words."""
    line = " ".join(f"'{word}'" for word in words)
    code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _tva; "
    code += "printf '%s\\n' \"${COMPREPLY[@]@Q}\""
    return shlex.split(subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout)


def test_completion_in_bash_offers_commands_and_their_options(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("SHELL", "/bin/bash")
    main(["--install-completion"])
    script = folder / ".local/share/bash-completion/completions/tva"
    assert str(script) in capsys.readouterr().out.replace("\n", "")
    assert set(complete(script, "tva", "")) == {name.split()[0] for name in list_commands()}
    assert complete(script, "tva", "compose", "--rec") == ["--recipe"]
    assert complete(script, "tva", "edit", "--trainer.dev") == ["--trainer.devices", "--trainer.devices+"]
    assert set(complete(script, "tva", "vectors", "")) == {"ls", "match"}
    assert "--key_map" in complete(script, "tva", "vectors", "match", "--")
    assert complete(script, "tva", "--in") == ["--install-completion"]
    assert complete(script, "tva", "init", "a") == ["add", "analogy"]
    assert complete(script, "tva", "data", "") == ["check", "ls"]
    Path("my run").mkdir()
    assert complete(script, "tva", "report", "m") == ["my run"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_for_other_shells_names_every_command(shell, capsys):
    main(["completion", shell])
    shown = capsys.readouterr().out
    assert all(name.split()[-1] in shown for name in list_commands())


def test_fish_offers_commands_and_options(folder, monkeypatch):
    if shutil.which("fish") is None:
        pytest.skip("no fish")
    monkeypatch.setenv("HOME", str(folder))
    main(["completion", "fish", "--install"])
    code = "source .config/fish/completions/tva.fish; complete -C $argv[1]"
    for typed, offered in {
        "tva edi": "edit",
        "tva --ins": "--install-completion",
        "tva init a": "add\nanalogy",
    }.items():
        done = subprocess.run(["fish", "-c", code, typed], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == offered


def test_the_file_for_zsh_answers_the_tab_that_loads_it(capsys):
    main(["completion", "zsh"])
    assert capsys.readouterr().out.endswith("\n_bash_complete -o filenames -F _tva\n")


def test_completion_of_an_unknown_shell_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert "Completion is made for 'bash', 'zsh', 'fish'; found 'tcsh'." in message(capsys, "completion")


def test_lightnings_advertisements_are_silent_and_its_messages_are_not(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SystemExit):
            main(["fit", "--print_config", "--model", "tva.models.ClipClassifier"])
        warnings.warn("Checkpoint directory runs exists and is not empty.", UserWarning, stacklevel=1)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    shown = [
        logger.filter(logging.LogRecord("x", 20, "", 0, text, None, None))
        for text in ("💡 Tip: For seamless cloud logging, try installing", "GPU available: False")
    ]
    assert list(map(bool, shown)) == [False, True]
