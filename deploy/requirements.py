"""Prints what an extra of pyproject.toml asks for: `python deploy/requirements.py EXTRA [NAME...]`, one a line.

With names, only these packages. An image installs its dependencies from here in a layer of their own, which stays
in the cache while only code changes. Standard library only: nothing is installed yet when it runs.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def requirements_of(project: dict[str, Any], extra: str) -> Iterator[str]:
    """The requirements of an extra; an extra of the project itself that it names is replaced by its own."""
    for requirement in project["optional-dependencies"][extra]:
        ours = re.fullmatch(rf"{re.escape(project['name'])}\[(.+)\]", requirement)
        if not ours:
            yield requirement
            continue
        for named in ours[1].split(","):
            yield from requirements_of(project, named)


def name_of(requirement: str) -> str:
    """The package that a requirement is about."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def main() -> None:
    """Print them. Status 1 if a name is not in the extra."""
    extra, *names = sys.argv[1:]
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    found = [*project["dependencies"], *requirements_of(project, extra)]
    chosen = [requirement for requirement in found if not names or name_of(requirement) in names]
    missing = set(names) - {name_of(requirement) for requirement in chosen}
    if missing:
        sys.exit(f"not in the extra {extra}: {', '.join(sorted(missing))}")
    print("\n".join(dict.fromkeys(chosen)))


if __name__ == "__main__":
    main()
