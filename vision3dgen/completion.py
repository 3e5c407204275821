"""What the Tab key offers: a script for bash, zsh or fish, made from the parser, so that it never lags behind it."""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

SHELLS = ("bash", "zsh", "fish")


class Command(NamedTuple):
    """The words that choose a command, what may follow as next words, and its options with their help."""

    words: tuple[str, ...]
    following: tuple[str, ...]
    options: dict[str, str]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """A completion script to be sourced. Raises ValueError for another shell."""
    if shell not in SHELLS:
        raise ValueError(f"shell must be one of {', '.join(SHELLS)}, got {shell!r}")
    commands = list(_commands(parser, ()))
    return _fish(parser.prog, commands) if shell == "fish" else _bash(parser.prog, commands, zsh=shell == "zsh")


def _commands(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> Iterator[Command]:
    options: dict[str, str] = {}
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
        help_ = "" if action.help in (None, argparse.SUPPRESS) else str(action.help)
        options |= {name: help_ for name in action.option_strings if name.startswith("--")}
    yield Command(words, tuple(below), options)
    for name, own in below.items():
        yield from _commands(own, (*words, name))


def _bash(program: str, commands: Sequence[Command], *, zsh: bool) -> str:
    cases = "\n".join(
        f'    "{" ".join(c.words)}") words="{" ".join(c.following)}"; options="{" ".join(c.options)}" ;;'
        for c in commands
    )
    known = " ".join(f'"{" ".join(c.words)}"' for c in commands if c.words)
    name = f"_{program}_complete"
    start = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    return f"""{start}{name}() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" chosen="" words="" options="" next known
  for next in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    for known in {known}; do
      if [ "${{chosen:+$chosen }}$next" = "$known" ]; then chosen="$known"; break; fi
    done
  done
  case "$chosen" in
{cases}
  esac
  case "$current" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$current")) ;;
    *) if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$current")); else COMPREPLY=(); fi ;;
  esac
}}
complete -o default -F {name} {program}
"""


def _fish(program: str, commands: Sequence[Command]) -> str:
    lines = []
    for command in commands:
        seen = [f"__fish_seen_subcommand_from {word}" for word in command.words]
        chosen = "; and ".join(seen) or "__fish_use_subcommand"
        not_yet = "".join(f"; and not __fish_seen_subcommand_from {word}" for word in command.following)
        where = chosen + (not_yet if command.words else "")
        lines += [f"complete -c {program} -f -n '{where}' -a {word}" for word in command.following]
        for option, text in command.options.items():
            told = text.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"complete -c {program} -n '{chosen}' -l {option.removeprefix('--')} -d '{told}'")
    return "\n".join(lines) + "\n"
