"""What pyproject.toml cannot say: the version follows the tags of git, and the README links to the repository.

The commit with the tag v0.2.0 has the version 0.2.0. Other commits lead to the next release, aadl.__version__, and have
versions such as 0.2.0.dev448+gf348cfb9a. An archive without git has the version aadl.__version__.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def constant(name, file):
    """The text that a file assigns to a name. A build has neither torch nor, on Python 3.10, a reader of TOML."""
    return re.search(rf'^{name} = "([^"]+)"', (ROOT / file).read_text("utf-8"), flags=re.MULTILINE)[1]


NEXT_RELEASE = constant("__version__", "aadl/__init__.py")


def version_of(commit):
    """The version scheme of setuptools-scm."""
    return str(commit.tag) if commit.exact else f"{NEXT_RELEASE}.dev{commit.distance}"


def readme_of_the_package():
    """README.md with absolute links, because a page of a package index has no files beside it."""
    address = constant("Repository", "pyproject.toml")
    relative_link = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?://|#)")
    return relative_link.sub(
        lambda link: f"{link[0]}{address}/{'raw' if link[1] else 'blob'}/main/", (ROOT / "README.md").read_text("utf-8")
    )


setup(
    use_scm_version={"version_scheme": version_of, "fallback_version": NEXT_RELEASE},
    long_description=readme_of_the_package(),
    long_description_content_type="text/markdown",
)
