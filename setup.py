"""Puts what lies beside the package in a checkout, the jobs and the consortium's files, into what is built.

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    "jobs/*/meta.json",
    "jobs/*/app/config/*.json",
    "jobs/*/app/config/*.toml",
    "jobs/*/presets/*.toml",
    "provisioning/README.md",
    "provisioning/project.yml",
    "provisioning/policies/*.toml",
)
"""By name: a folder of kits that somebody made in provisioning holds private keys."""


class BuildWithJobs(build_py):
    """Copies them into ``histoflare/_shipped``; an editable install finds them in the checkout."""

    def run(self) -> None:
        """Copy the modules, then these files; none of an earlier build stays."""
        super().run()
        if not self.editable_mode:
            shutil.rmtree(self._target(), ignore_errors=True)
            for source in self._sources():
                (self._target() / source).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, self._target() / source)

    def get_source_files(self) -> list[str]:
        """Return what goes into the source distribution."""
        return [*super().get_source_files(), *self._sources()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return what is installed."""
        made = [] if self.editable_mode else [str(self._target() / source) for source in self._sources()]
        return [*super().get_outputs(include_bytecode), *made]

    def _sources(self) -> list[str]:
        root = Path()
        return sorted(path.as_posix() for pattern in SHIPPED for path in root.glob(pattern))

    def _target(self) -> Path:
        return Path(self.build_lib) / "histoflare" / "_shipped"


setup(cmdclass={"build_py": BuildWithJobs})
