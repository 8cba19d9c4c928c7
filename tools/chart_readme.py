"""Write the README of the Helm chart from the comments of its values: `python -m tools.chart_readme`.

The comments follow the convention of helm-docs: `# -- ` begins the description of the value below, other comment
lines continue it, and `# @default -- ` replaces the default that is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parent.parent / "charts" / "ociregistry"
_BEGIN = "# -- "
_DEFAULT = "# @default -- "
_LONGEST = 60
"""Characters of a default that the table shows."""

_HEAD = """# ociregistry

{description}

```sh
kubectl create namespace ociregistry
helm install ociregistry ociregistry-chart-{version}.tgz --namespace ociregistry
```

The image has to be on the nodes, or in a registry that they reach. docs/kubernetes.md in the project has the first
start, the values by need, the node configurer, and what happens when a node is lost.

(`python -m tools.chart_readme` makes this page from values.yaml.)

## Values

| key | type | default | meaning |
|---|---|---|---|
"""


def page() -> str:
    """Return the text of the README."""
    about = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    head = _HEAD.format(description=about["description"], version=about["version"])
    return head + "".join(rows((CHART / "values.yaml").read_text(encoding="utf-8")))


def rows(text: str) -> Iterator[str]:
    """Yield a row of the table for each value that has a description.

    Raises:
        ValueError: a value has none.
    """
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    yield from _rows(root, "", text.splitlines())


def _rows(mapping: yaml.MappingNode, above: str, lines: Sequence[str]) -> Iterator[str]:
    for key, value in mapping.value:
        path = f"{above}{key.value}"
        comment = _comment(lines, key.start_mark.line)
        if comment is None and isinstance(value, yaml.MappingNode):
            yield from _rows(value, f"{path}.", lines)
            continue
        if comment is None:
            raise ValueError(
                f"{path}: has no description: a comment that begins with {_BEGIN!r} is expected above it"
            )
        meaning, default = comment
        content = yaml.safe_load(yaml.serialize(value))
        if default is None:
            shown = json.dumps(content, ensure_ascii=False)
            default = f"`{shown}`" if len(shown) <= _LONGEST else "see values.yaml"
        yield f"| `{path}` | {_type(content)} | {_cell(default)} | {_cell(meaning)} |\n"


def _comment(lines: Sequence[str], number: int) -> tuple[str, str | None] | None:
    """Return the description of the value in a line, and the default to show, if it gives one."""
    begin = number
    while begin > 0 and lines[begin - 1].lstrip().startswith("# "):
        begin -= 1
    block = [line.strip() for line in lines[begin:number]]
    if not block or not block[0].startswith(_BEGIN):
        return None
    defaults = [line.removeprefix(_DEFAULT) for line in block if line.startswith(_DEFAULT)]
    words = [line.removeprefix(_BEGIN).removeprefix("# ") for line in block if not line.startswith(_DEFAULT)]
    return " ".join(words), defaults[0] if defaults else None


def _type(content: object) -> str:
    names = {bool: "bool", int: "int", str: "string", list: "list", dict: "object"}
    return names[type(content)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    (CHART / "README.md").write_text(page(), encoding="utf-8")
