"""tva forget: what the guide says, on a tiny model."""

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from small_cli import run
from small_text import write_model

from tva.cli.commands import forget
from tva.cli.commands.forget import divide, write_texts

PAGE = Path(__file__).parents[2] / "docs/howto/forget-texts.md"
SMALL = shlex.split("--rank 4 --max_steps 60 --learning_rate 1e-2 --block_length 16 --max_kl 0.3 --max_perplexity 3")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:The number of training")


def texts(words, seed, count=300):
    draw = random.Random(seed)
    return [" ".join(draw.choice(words) for _ in range(12)) for _ in range(count)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(Path("my-model"), "causal")
    Path("insults.txt").write_text("\n".join(texts(["bad", "poor", "awful", "film", "is", "a"], 0)))
    Path("letters.txt").write_text("\n".join(texts(["good", "fine", "great", "food", "was", "the"], 1)))
    return tmp_path


@pytest.mark.slow
def test_the_guides_commands_forget_and_keep(here, capfd):
    pytest.importorskip("peft")
    first, again = re.findall(r"^tva (.*)$", PAGE.read_text(), flags=re.M)
    assert run(*[*shlex.split(first), *SMALL]) == 0, capfd.readouterr().err
    report = json.loads((here / "polite-model/edit.json").read_text())
    forgotten, kept = report["tasks"]["forget"], report["tasks"]["keep"]
    assert forgotten["edited"]["low"] > forgotten["base"]["high"]
    assert kept["metric"] == "kl"
    assert 0 < kept["edited"]["value"] <= 0.3
    assert [constraint["holds"] for constraint in report["constraints"]] == [True, True]
    assert "the texts are forgotten: their test loss changes by +" in capfd.readouterr().out
    assert run(*shlex.split(again)) == 0

    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(name) for name in ("my-model", "polite-model"))
    tokens = torch.tensor([[5, 10, 11, 12]])
    assert not torch.equal(before(tokens).logits, after(tokens).logits)


def test_texts_are_divided_at_random_and_shared_by_no_parts(tmp_path):
    given = [f"text {number}" for number in range(50)] * 2

    def read(prefix, seed):
        parts = divide(given, "text", tmp_path / prefix, seed)
        lines = {part: Path(file).read_text().splitlines() for part, file in parts.items()}
        return {part: [json.loads(line)["text"] for line in rows] for part, rows in lines.items()}

    found = read("x", 3)
    assert {part: len(rows) for part, rows in found.items()} == {"train": 40, "val": 5, "test": 5}
    assert sorted([*found["train"], *found["val"], *found["test"]]) == sorted(set(given))
    assert read("y", 3) == found != read("z", 4)
    with pytest.raises(ValueError, match="At least 10 different texts are needed"):
        divide(["a"] * 20, "text", tmp_path / "z", seed=0)


def test_a_model_writes_texts_of_its_own(here):
    own = write_texts("my-model", 12, 8, seed=1)
    assert len(set(own)) == 12
    assert own == write_texts("my-model", 12, 8, seed=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("my-model --data insult.txt --output out", "nothing is there. Did you mean insults.txt?"),
        ("my-model --data insults.txt --output out --max_perplexity 0", "max_perplexity must be a positive multiple"),
        ("my-model --data insults.txt --output out --max_kl 0", "max_kl must be positive; found 0"),
        (
            "my-model --data insults.txt --output out --max_steps -1",
            "max_steps at least 1; found rank 16, max_steps -1",
        ),
        ("my-model --data insults.txt --output my-model", "my-model is an input of the edit, which would replace it"),
        ("my-model --data insults.txt --output letters.txt/out", "Not a directory"),
        ("--data insults.txt --output out", "--model must be given"),
        ("my-model --data my-model/config.json --output out", "has no column 'text'"),
    ],
)
def test_mistakes_are_named(here, capsys, words, message):
    assert run(*["forget", *words.split(), "--keep", "letters.txt"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
    assert not Path("out-work").exists()


def test_too_few_texts_are_refused_before_training(here, capsys, monkeypatch):
    monkeypatch.setattr(forget, "_call", lambda *_: pytest.fail("trained first"))
    Path("few.txt").write_text("\n".join(texts(["good", "fine", "great"], 1, 40)))
    assert run(*["forget", "my-model", "--data", "insults.txt", "--output", "out", "--keep", "few.txt"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "at least 59 different texts to test on are needed, which are 49% of the texts to keep; few.txt" in message
    assert run(*["forget", "my-model", "--data", "few.txt", "--output", "out", "--keep", "letters.txt"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "at least 20 different texts are needed, which are 10% of the texts to forget; few.txt leaves 4" in message


def test_texts_to_forget_and_to_keep_have_none_in_common_and_other_peoples_models_are_not_replaced(
    here, capsys, monkeypatch
):
    monkeypatch.setattr(forget, "_call", lambda *_: pytest.fail("trained first"))
    Path("both.txt").write_text(Path("letters.txt").read_text() + Path("insults.txt").read_text()[:200])
    words = ["forget", "my-model", "--data", "insults.txt", "--output"]
    assert run(*words, "out", "--keep", "both.txt") == 2
    assert "texts are both to forget and to keep, such as" in capsys.readouterr().err
    write_model(Path("theirs"), "causal")
    assert run(*words, "theirs", "--keep", "letters.txt") == 2
    assert "where a file is that tva did not write" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "limits"), [("", ["kl"]), ("--keep letters.txt", ["kl", "loss"]),
                                               ("--max_perplexity 2", ["kl", "loss"])])  # fmt: skip
def test_the_models_own_texts_have_no_second_limit(here, capsys, monkeypatch, words, limits):
    configs = {}

    def call(command, path, config):
        configs[command] = config
        Path("out").mkdir(exist_ok=True)
        change = {"difference": 0.5, "difference_low": 0.25, "difference_high": 0.75}
        Path("out/edit.json").write_text(json.dumps({"tasks": {"forget": {"comparison": change}}}))
        return command == "fit"

    monkeypatch.setattr(forget, "_call", call)
    monkeypatch.setattr(forget, "write_texts", lambda *_: texts(["good", "fine", "great"], 1, 200))
    assert run(*["forget", "my-model", "--data", "insults.txt", "--output", "out"], *words.split()) == 1
    assert [limit.split("/")[1].split()[0] for limit in configs["edit"]["subject_to"]] == limits
    assert len(Path("out-work/keep-test.jsonl").read_text().splitlines()) > 80
    out = capsys.readouterr().out
    assert "no edited model is written; of the closest edit: their test loss changes by +0.5 [+0.25, +0.75]" in out
    assert "transformers loads" not in out


def test_a_file_that_is_not_there_is_named_before_the_model_writes_its_own_texts(here, capsys, monkeypatch):
    monkeypatch.setattr(forget, "write_texts", lambda *_: pytest.fail("the model wrote texts first"))
    assert run("forget", "my-model", "--data", "insult.txt", "--output", "out") == 2
    assert "Did you mean insults.txt?" in capsys.readouterr().err
