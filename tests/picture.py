"""The picture of a terminal in the README, made from what a scan of the saved fleet prints.

`python tests/picture.py` writes it to tests/data/terminal.svg.
"""

import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "tests" / "data" / "terminal.svg"
COMMAND = "tagcheck.py scan --instances tests/data/fleet.json"
COLUMNS, LINE_HEIGHT, CHARACTER = 80, 19, 8.4
STYLE = (
    "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre;fill:#d6dde6}"
    ".new{fill:#ff7b72}.head{fill:#8b98a8}.prompt{fill:#7ee787}"
)


def scan() -> str:
    """Return what the scan prints in a terminal of 80 columns."""
    with tempfile.TemporaryDirectory() as directory:
        for name in ("tests/data/fleet.json", "policies/default.yaml", "tagcheck.py"):
            place = Path(directory, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place)
        words, environment = [sys.executable, *COMMAND.split()], {"COLUMNS": str(COLUMNS)}
        run = subprocess.run(
            words, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
    return run.stdout


def draw(text: str) -> str:
    """Return lines of a terminal as SVG, with the words in colour that a terminal shows so."""
    lines = [f"$ {COMMAND}", *text.splitlines()]
    width, height = round(CHARACTER * (COLUMNS + 3)), LINE_HEIGHT * (len(lines) + 1)
    rows = []
    for number, line in enumerate(lines, 1):
        shown = html.escape(line)
        shown = re.sub(r"^(NEW|Exit code 3 VIOLATIONS)", r'<tspan class="new">\1</tspan>', shown)
        shown = re.sub(r"^(STATUS .*|Account .*)", r'<tspan class="head">\1</tspan>', shown)
        shown = re.sub(r"^(\$)", r'<tspan class="prompt">\1</tspan>', shown)
        rows.append(f'<text x="12" y="{LINE_HEIGHT * number + 4}" xml:space="preserve">{shown}</text>')
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    background = f'<rect width="{width}" height="{height}" rx="8" fill="#161b22"/>'
    title = "<title>What a scan prints</title>"
    body = "\n".join([title, f"<style>{STYLE}</style>", background, *rows])
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>\n{body}\n</svg>\n'


if __name__ == "__main__":
    PICTURE.write_text(draw(scan()), encoding="utf-8")
