"""The versions of a trainer that an adapter works with; checked before the trainer is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from packaging.version import Version


class Versions(NamedTuple):
    """A package from its `oldest` version up to, but without, `too_new`."""

    package: str
    oldest: str
    too_new: str

    @property
    def remedy(self) -> str:
        """The command that installs such a version."""
        return f"pip install '{self.package}>={self.oldest},<{self.too_new}'"

    @property
    def installed(self) -> str | None:
        """The version that is installed, if any."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def check(self, found: str | None) -> None:
        """Raise ImportError, with the remedy, unless this version will do."""
        if found is None or not Version(self.oldest) <= Version(found) < Version(self.too_new):
            got = "it is not installed" if found is None else f"got {found}"
            raise ImportError(
                f"oisd.integrations.{self.package}: needs {self.package} >= {self.oldest}, < "
                f"{self.too_new}, {got}; {self.remedy}"
            )

    def refuse(self, moved: list[str]) -> None:
        """Raise ImportError if this version no longer has what the adapter relies on."""
        if moved:
            raise ImportError(
                f"oisd.integrations.{self.package}: {self.package} {self.installed} has moved "
                f"what it relies on: {'; '.join(moved)}; {self.remedy}, in its oldest version"
            )
