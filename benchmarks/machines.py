"""Results of several machines side by side: figures of one never stand under the name of another.

What depends on the machine lies in ``results/<machine>/``, a folder for each kind; documents have a chapter for each.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path

from edgetrain.hostinfo import host_facts

_FACTS = ("architecture", "cpu", "cores", "simd", "ram_mib")


def facts() -> dict:
    """Return what kind of machine this is; nothing that names it."""
    known = host_facts()
    return {key: known[key] for key in _FACTS}


def results_file(name: str) -> Path:
    """Return where the results of this kind of machine belong."""
    kind = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", str(facts()["cpu"]).lower())).strip("-")
    return Path(__file__).parent / "results" / kind / name


def stored(file: Path) -> list[dict]:
    """Return the results of all machines that have a file of that name beside this one's folder."""
    return [json.loads(path.read_text()) for path in sorted(file.parent.parent.glob(f"*/{file.name}"))]


def write(file: Path, results: dict) -> None:
    """Write results; an interrupted write leaves the former ones."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(file)


def today() -> str:
    """Return the date for a result."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def described(machine: dict) -> str:
    """Return a machine in words."""
    return f"{machine['cpu']} ({machine['architecture']}, {machine['simd']}), {machine['cores']} processors"


def chapter(machine: dict, dates: set[str], text: str) -> str:
    """Return a machine's part of a document: who measured when, and ``text`` with its headings a level down."""
    span = " to ".join(dict.fromkeys([min(dates), max(dates)])) if dates else "never"
    return f"## {described(machine)}\n\nMeasured: {span}.\n\n" + re.sub(r"^#", "##", text, flags=re.MULTILINE)
