"""Runs the notebooks of this folder in earnest, and keeps in them what they print: `make notebooks`.

What a run says on stderr and of the machine's folders is left out.
"""

import json
import sys
import tempfile
from pathlib import Path

import papermill

HERE = Path(__file__).resolve().parent


def main(*names: str) -> None:
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            done = Path(folder) / path.name
            papermill.execute_notebook(path, done, kernel_name="python3", cwd=folder, progress_bar=False)
            notebook = json.loads(done.read_text(encoding="utf-8"))
        notebook["metadata"].pop("papermill")
        for cell in notebook["cells"]:
            cell["metadata"] = {"tags": cell["metadata"]["tags"]} if cell["metadata"].get("tags") else {}
            if "outputs" in cell:
                cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
