"""Write the manual pages and the completion of bash and zsh: `python -m tools.generate FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from ociregistry import __version__
from tools import completion, manual
from tools.commandline import commands, common, former

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "debian" / "man"
EXAMPLE = ROOT / "etc" / "ociregistry.yaml"


def generated() -> dict[str, str]:
    """Return the text of each file by its name."""
    known, all_commands = common(), commands()
    example = EXAMPLE.read_text(encoding="utf-8")
    parts = {
        "VERSION": __version__,
        "OPTIONS": manual.options_text(known),
        "FORMER": manual.options_text(former()),
        "COMMANDS": manual.commands_text(all_commands),
        "INTRODUCTION": manual.introduction(example),
        "SETTINGS": manual.settings_text(example),
    }
    pages = {
        path.stem: manual.filled(path.read_text(encoding="utf-8"), parts) for path in sorted(TEMPLATES.glob("*.in"))
    }
    return {
        **pages,
        "ociregistry.bash": completion.bash(known, all_commands),
        "_ociregistry": completion.zsh(known, all_commands),
    }


def main(folder: Path) -> None:
    """Write all files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in generated().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
