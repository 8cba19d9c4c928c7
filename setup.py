"""The package and its dependencies. The tools are configured in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """Read the version without importing the package: its dependencies are not installed yet."""
    text = (HERE / "ociregistry" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit("ociregistry/__init__.py has no __version__")
    return found[1]


setup(
    name="ociregistry",
    version=version(),
    description="A pull-only, pull-through, caching OCI registry server for bad links",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The lower bounds are the versions of Debian 12; `make test-debian` runs on exactly those.
    install_requires=[
        "twisted[tls]>=22.4",
        "treq>=22.2",
        "pyopenssl>=23.0",
        "service-identity",
        "cachetools>=5.2",
        "pyyaml",
        "prometheus-client>=0.16",
        "tqdm",
        "zstandard",
    ],
    extras_require={
        "test": [
            "pytest>=7.2",
            "pytest-twisted",
            "pytest-xdist",
            "hypothesis",
            "cryptography",
            "selenium",
            # New releases of these report new faults in old code, so each is adopted deliberately.
            "mypy~=2.4.0",
            "mypy-zope",
            "ruff~=0.17.0",
            "types-PyYAML",
            "types-tqdm",
        ],
        "docs": ["mkdocs~=1.6.1"],
    },
    entry_points={"console_scripts": ["ociregistry = ociregistry.script:main"]},
    # twisted.plugins is Twisted's own folder, into which we install one file: an __init__.py in ours would hide it.
    packages=[*find_packages(include=["ociregistry", "ociregistry.*"]), "twisted.plugins"],
    package_data={"ociregistry": ["py.typed"], "ociregistry.web": ["static/*"]},
    # Twisted looks for plugins among files, not inside a zip.
    zip_safe=False,
)
