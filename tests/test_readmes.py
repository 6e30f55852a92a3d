"""The README files: their commands parse and their links lead to files."""

import re
import shlex
from pathlib import Path

import pytest

from ser_ray import api
from ser_ray.cli.main import VERBS, main
from ser_ray.tracking import database
from ser_ray.training.recipe import TrainConfig

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "jobs", "ser_ray/corpus", "ser_ray/training", "tests")
READMES = [ROOT / folder / "README.md" for folder in FOLDERS]
MAX_PICTURE_BYTES = 300_000


def commands_of(readme: Path) -> set[str]:
    """Every `ser-ray VERB ...` and `python jobs/VERB.py ...` of a file, with its arguments."""
    text = readme.read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = set()
    for line in (*blocks.splitlines(), *spans):
        if shown := re.search(r"(?:ser-ray |python jobs/)([a-z][-_a-z]*)(?:\.py)?( .*)?$", line):
            verb, arguments = shown[1].replace("_", "-"), (shown[2] or "").replace(" ...", "")
            if verb in VERBS:
                found.add(f"{verb}{arguments}")
    return found


COMMANDS = sorted({command for readme in READMES for command in commands_of(readme)})


def test_the_readmes_show_every_verb():
    shown = {command.split()[0] for command in COMMANDS}
    assert shown == set(VERBS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_a_readme_parses(command, capsys, monkeypatch):
    monkeypatch.setattr(api, "recipe_like", lambda run_id, uri: TrainConfig())
    monkeypatch.setattr(database, "require_database", lambda uri: None)  # models are looked up
    verb, *arguments = shlex.split(command, comments=True)
    named = {"predict": ["--model", "M"], "prepare": ["--corpus", "C", "--shards", "S"]}
    missing = [] if arguments else named.get(verb, ["M"] if verb in ("evaluate", "export") else [])
    assert main([verb, *arguments, *missing, "--dry-run"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_the_links_of_a_readme_lead_to_files_and_small_pictures(readme):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)|src=\"([^\"]+)\"", readme.read_text()):
        path = readme.parent / (target[0] or target[1])
        assert path.exists(), f"{readme}: {target}"
        if path.suffix == ".png":
            assert path.stat().st_size < MAX_PICTURE_BYTES


def test_the_first_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
