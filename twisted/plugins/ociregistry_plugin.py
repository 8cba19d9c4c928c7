"""How twistd finds the daemon."""

from __future__ import annotations

from typing import Any

from twisted.application.service import ServiceMaker

from ociregistry.process import let_interrupts_end_the_process


class _Maker(ServiceMaker):
    @property
    def options(self) -> Any:
        """The parser of the options; twistd asks for it when it is to run this plugin, not another one."""
        # Before the imports that take long.
        let_interrupts_end_the_process()
        return super().options


ociregistry = _Maker("ociregistry", "ociregistry.tap", "A pull-through caching OCI registry server", "ociregistry")
