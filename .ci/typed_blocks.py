"""Writes the Python code of README and docs into files, so that type checkers can read it as users would write it.

`typed_blocks.py FOLDER` writes one module for each block, with its text at the line where it stands in the document.
"""

import json
import re
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
SETTINGS = {
    "typeCheckingMode": "strict",
    "pythonVersion": "3.11",
    # pandas and Django have no types of their own.
    "reportMissingTypeStubs": False,
    "reportUnknownArgumentType": False,
}
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for old in folder.glob("*.py"):
    old.unlink()
(folder / "pyrightconfig.json").write_text(json.dumps(SETTINGS))
for document in [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]:
    text = document.read_text()
    for number, block in enumerate(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL), 1):
        name = f"{document.stem.lower().replace('-', '_')}_{number}.py"
        (folder / name).write_text("\n" * text.count("\n", 0, block.start(1)) + block[1])
