"""What the site adds to mkdocs: links to files beside docs/, and a check that the public interface has docstrings."""

import re
from pathlib import Path

import griffe
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(((?:\.\./)+(?:examples|experiments|jobs|benchmarks|tests)/[^)#]*)\)")

CELL = re.compile(r"<td>.*?</td>", flags=re.DOTALL)
UNBROKEN = re.compile(r"\[[^\[\]<>]+ \.\. [^\[\]<>]+\]|\b\d+(?:\.\d+)?e-\d+")


def repository() -> str:
    """The address of the repository, which stands once, in pyproject.toml."""
    found = re.search(r'^Repository = "([^"]+)"', (ROOT / "pyproject.toml").read_text("utf-8"), flags=re.MULTILINE)
    if found is None:
        raise Abort("pyproject.toml has no Repository under [project.urls]")
    return found[1]


def undocumented() -> list[str]:
    """Public names of aadl, and public members of its public classes, without a docstring."""
    package = griffe.load("aadl", search_paths=[str(ROOT)])
    missing = []
    for name in sorted(package.exports or []):
        target = package[str(name)]
        target = target.final_target if target.is_alias else target
        members = (
            [target, *(m for m in target.members.values() if not m.name.startswith("_"))]
            if target.is_class
            else [target]
        )
        missing += [m.path for m in members if not m.is_attribute and not m.docstring]
    return missing


def on_config(config):
    config.repo_url = repository()
    config.repo_name = "repository"
    config.edit_uri = ""
    return config


def on_pre_build(config):
    missing = undocumented()
    if missing:
        raise Abort(f"these have no docstring: {', '.join(missing)}")


def on_page_markdown(markdown, page, config, files):
    """Links to files of the repository become links to its address; one that leads nowhere ends the build."""

    def absolute(match):
        target = (Path(page.file.abs_src_path).parent / match[1]).resolve()
        if not target.exists():
            raise Abort(f"{page.file.src_uri}: {match[1]} does not exist")
        return f"]({config.repo_url}/blob/main/{target.relative_to(ROOT).as_posix()})"

    return OUTSIDE.sub(absolute, markdown)


def on_page_content(html, page, config, files):
    """A range such as [1.2e-3 .. 4] and a number with an exponent stay on one line in a table."""
    unbroken = r'<span class="unbroken">\g<0></span>'
    return CELL.sub(lambda cell: UNBROKEN.sub(unbroken, cell[0]), html)
