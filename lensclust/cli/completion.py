"""Completion of the command in bash and zsh: a script made from the installed studies."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from lensclust.errors import InputError

SHELLS = ("bash", "zsh")


def completion(shell: str, commands: Mapping[str, Any], studies: Mapping[str, Any]) -> str:
    """A completion script for a shell: ``eval "$(lensclust completion bash)"``.

    It contains the words of every command, study, preset and option, so that the tab key starts no
    Python; if no word matches, files are offered.

    Args:
        shell: ``bash`` or ``zsh``.
        commands: name -> the dataclass of its options, or None if it has none.
        studies: name -> study class.

    Raises:
        InputError: if there is no completion for the shell.
    """
    if shell not in SHELLS:
        raise InputError(f"completion: shell {shell!r}, expected one of {', '.join(SHELLS)}")
    cases = [_case(f"{name}:*", _options(kind)) for name, kind in commands.items() if name != "run"]
    run = _options(commands["run"])
    for name, study in studies.items():
        cases.append(_case(f"run:{name}:--preset", list(study.presets)))
        cases.append(_case(f"run:{name}:*", [*run, *_options(study)]))
    cases.insert(0, _case("run::*", list(studies)))
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return head + _SCRIPT.replace("COMMANDS", _words(commands)).replace("CASES", "\n".join(cases))


def _options(kind: Any) -> list[str]:
    """Long options of a dataclass, as on the command line."""
    if kind is None:
        return ["--help"]
    names = [f"--{each.name.replace('_', '-')}" for each in fields(kind)]
    return ["--help", *names]


def _case(pattern: str, words: Sequence[str]) -> str:
    return f"    {pattern}) words={_words(words)} ;;"


def _words(words: Sequence[str] | Mapping[str, Any]) -> str:
    return shlex.quote(" ".join(words))


_SCRIPT = """_lensclust() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} words=''
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W COMMANDS -- "$current"))
    return
  fi
  local study=${COMP_WORDS[2]}
  if [ "$COMP_CWORD" -eq 2 ]; then study=''; fi
  case "${COMP_WORDS[1]}:$study:$previous" in
CASES
  esac
  case "$previous" in
    --out | --data | --model | --tasks) words='' ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _lensclust lensclust
"""
