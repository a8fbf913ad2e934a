"""docs/quickstart.md, read as a user reads it: headings, and the commands below them."""

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "quickstart.md"


def paths() -> Mapping[str, list[str]]:
    """The commands, one a line, of each section with a number."""
    sections = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]
    return {section.splitlines()[0]: _commands(section) for section in sections if section[0].isdigit()}


def setup() -> list[str]:
    """The commands that come before the first section."""
    return _commands(DOCUMENT.read_text().partition("\n## ")[0])


def _commands(text: str) -> list[str]:
    return [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
