"""The command line itself: help, exit codes, completion, and what it prints where nobody watches."""

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vision3dgen import cli
from vision3dgen.completion import script
from vision3dgen.engine.log import Log
from vision3dgen.experiment import environment
from vision3dgen.parallel import tracked

ROOT = Path(__file__).parents[1]


def leaves(parser: argparse.ArgumentParser, words=()):
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield words, parser
    for name, own in below[0].choices.items() if below else ():
        yield from leaves(own, (*words, name))


COMMANDS = dict(leaves(cli._parser()))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_each_command_has_an_example_that_parses(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    (example,) = re.findall(r"^example: (.*)$", text, re.MULTILINE)
    example = re.sub(r'^eval "\$\((.*)\)"$', r"\1", example)
    assert example.split()[: 1 + len(words)] == ["vision3dgen", *words]
    options, rest = cli._parser().parse_known_args(example.split()[1:])
    assert callable(options.run)
    assert all("=" in word for word in rest)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_is_explained(words):
    for action in COMMANDS[words]._actions:
        named_by_itself = action.dest in ("config", "run_folder", "root", "source_folder", "seed", "metric")
        counts = action.dest in ("shapes_per_category", "scenes", "n")
        assert action.help or named_by_itself or counts, f"{' '.join(words)}: {action.dest}"


def test_exit_codes_are_told_and_kept(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    assert "exit codes: 0 done; 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["no-such-command"])
    assert ended.value.code == 2
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    (tmp_path / "meshes").mkdir()
    (tmp_path / "meshes" / "bad.obj").write_text("v 1 2\n")
    arguments = [str(tmp_path / "meshes"), str(tmp_path / "data"), "--views", "1", "--points", "10"]
    assert cli.main(["prepare", "meshes", *arguments]) in (1, 2)
    assert "bad.obj" in "".join(capsys.readouterr())


def test_training_prints_plain_lines_into_a_pipe(tmp_path, capsys):
    """Exit codes of signals are in tests/test_engine.py and tests/test_checkpoint.py."""
    with Log(tmp_path, 0, 40) as log:
        log.advance(10)
        log.write({"step": 10, "loss": 0.25})
    shown = capsys.readouterr().out
    assert re.fullmatch(r"step 10/40  loss 0\.25  ETA \d+:\d\d\n", shown)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10, "loss": 0.25}


def test_a_bar_is_for_terminals_alone(capsys):
    assert list(tracked([1, 2, 3], title="counting")) == [1, 2, 3]
    assert list(tracked(iter("ab"), title="counting", total=2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_a_run_knows_the_revision_of_its_source():
    known = environment()
    assert json.loads(json.dumps(known)) == known
    if (ROOT / ".git").exists() and shutil.which("git"):
        told = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert known["revision"].rstrip("+") == told.stdout.strip()


# -------------------------------------------------------------------------------------------------- completion


def completed(*words: str) -> list[str]:
    """What bash offers for the last word."""
    given = " ".join(f"'{word}'" for word in words)
    test = f"{script(cli._parser(), 'bash')}\nCOMP_WORDS=({given}); COMP_CWORD={len(words) - 1}\n"
    test += "_vision3dgen_complete; printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", test], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_commands_and_options():
    assert set(completed("vision3dgen", "")) == {words[0] for words in COMMANDS}
    assert completed("vision3dgen", "rep") == ["report"]
    assert completed("vision3dgen", "prepare", "") == ["procedural", "meshes", "shapenet", "scenes"]
    assert completed("vision3dgen", "prepare", "scenes", "data", "--s") == ["--scenes", "--sentences", "--seed"]
    assert completed("vision3dgen", "report", "runs/x", "--out", "report", "--it") == ["--items"]
    assert completed("vision3dgen", "train", "configs/") == []  # file names are the shell's to complete


def test_other_shells():
    assert "bashcompinit" in script(cli._parser(), "zsh")
    fish = script(cli._parser(), "fish").splitlines()
    assert "complete -c vision3dgen -f -n '__fish_use_subcommand' -a report" in fish
    assert any("__fish_seen_subcommand_from report' -l items" in line for line in fish)
    assert all(line.count("'") % 2 == line.count("\\'") % 2 for line in fish)


def test_an_unknown_shell_is_an_error(capsys):
    assert cli.main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
