"""Optional packages: one question, one error.

Presence is asked of the installed distributions, not of the import system: a folder on the path
that happens to share a package's name (our own ``datasets/``) must not look like an installed
package.
"""

from __future__ import annotations

from importlib import metadata

from t2i_align.errors import MissingDependencyError
from t2i_align.later import show


def version_of(dist: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(dist)
    except metadata.PackageNotFoundError:
        return None


def pip_line(extra: str) -> str:
    """The command that installs an extra of this package."""
    return f'pip install "t2i-align[{extra}]"'


def require(dist: str, extra: str, feature: str) -> None:
    """Make sure an optional distribution is installed, and can be imported from here on.

    Args:
        dist: name of the distribution, as pip knows it.
        extra: the extra of this package that installs it.
        feature: what needs it, the subject of the error's sentence.

    Raises:
        MissingDependencyError: it is not installed; the fix is the pip line.
    """
    if version_of(dist) is None:
        raise MissingDependencyError(
            f"{feature} needs the package '{dist}', which is not installed", pip_line(extra)
        )
    show(dist)
