"""Completion of the command line for bash and zsh."""

from __future__ import annotations

from collections.abc import Iterable

from ociregistry.commands.help import Option
from tools.commandline import VALUES, Command


def bash(common: Iterable[Option], commands: Iterable[Command]) -> str:
    """Return the completion file for bash. Values without a fixed set are completed as paths."""
    common, commands = tuple(common), tuple(commands)
    everything = [*common, *(option for command in commands for option in command.options)]
    names = [command.name for command in commands]
    by_command = "".join(
        f"        {command.name}) words='{_spelled(command.options)}' ;;\n" for command in commands if command.options
    )
    few = "".join(
        f"        --{name}) COMPREPLY=($(compgen -W '{' '.join(words)}' -- \"$current\")); return ;;\n"
        for name, words in VALUES.items()
    )
    valued = [option for option in everything if option.takes_value and option.name not in VALUES]
    paths = "|".join(sorted({spelling for option in valued for spelling in option.spellings}))
    return f"""# Completion of ociregistry's command line for bash.
# shellcheck shell=bash disable=SC2207
_ociregistry() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} command='' word words
    local common='{_spelled(common)}'
    # bash takes the = of --option=value for a word.
    if [ "$current" = = ]; then
        current=''
    elif [ "$previous" = = ]; then
        previous=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    COMPREPLY=()
    case $previous in
{few}        {paths}) return ;;
    esac
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case $word in {"|".join(names)}) command=$word; break ;; esac
    done
    case $command in
{by_command}        '') words='{" ".join(names)}' ;;
        *) words='' ;;
    esac
    if [ -z "$command" ] || [ "${{current#-}}" != "$current" ]; then
        COMPREPLY=($(compgen -W "$common $words" -- "$current"))
    fi
}}
complete -o default -F _ociregistry ociregistry
"""


def zsh(common: Iterable[Option], commands: Iterable[Command]) -> str:
    """Return the completion file for zsh."""
    commands = tuple(commands)
    described = "".join(f"        {_quoted(f'{command.name}:{command.help}')}\n" for command in commands)
    by_command = "".join(
        f"        {command.name})\n            _arguments -S $common \\\n{_specs(command.options, 16)}"
        "                '*:file:_files'\n            ;;\n"
        for command in commands
    )
    return f"""#compdef ociregistry
# Completion of ociregistry's command line for zsh.
_ociregistry() {{
    local curcontext=$curcontext state line
    local -a common commands
    common=(
{_specs(common, 8, end="")}    )
    commands=(
{described}    )
    _arguments -C -S $common '1:command:->command' '*::argument:->argument' && return
    case $state in
    command)
        _describe command commands
        ;;
    argument)
        case $line[1] in
{by_command}        esac
        ;;
    esac
}}
_ociregistry "$@"
"""


def _spelled(options: Iterable[Option]) -> str:
    return " ".join(f"--{option.name}" for option in options)


def _specs(options: Iterable[Option], indent: int, end: str = " \\") -> str:
    specs = (_spec(option, spelling) for option in options for spelling in option.spellings)
    return "".join(f"{' ' * indent}{_quoted(spec)}{end}\n" for spec in specs)


def _spec(option: Option, spelling: str) -> str:
    """Format an option for zsh's _arguments; each may be repeated after a command."""
    text = option.help
    for special in "\\[]:":
        text = text.replace(special, f"\\{special}")
    if not option.takes_value:
        return f"*{spelling}[{text}]"
    action = f"({' '.join(VALUES[option.name])})" if option.name in VALUES else "_files"
    joined = "=" if spelling.startswith("--") else "+"
    return f"*{spelling}{joined}[{text}]:{option.name}:{action}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
