"""Writes the source of Python's library: a language that Hastings knows little, on every machine.

    python -m preparation.python_library                    # or --output_dir=data/other

texts.jsonl           the modules, one a line
conversations.jsonl   questions about what a function does, answered by its docstring's first line
"""

import ast
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from common.files import atomic_file
from common.settings import config_from_constants, run_script
from preparation.demo_data import library_sources

output_dir = "data/python"  # folder for the two files


def questions(module: str, source: str) -> Iterator[dict[str, str]]:
    """{"question", "answer"} of each public function with a docstring; none if it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in old modules
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if summary := (ast.get_docstring(node) or "").partition("\n")[0].strip():
                yield {"question": f"What does {module}.{node.name} do?", "answer": summary}


def main(argv: list[str] | None = None) -> None:
    config = config_from_constants(globals(), argv)
    sources = list(library_sources())
    contents = {
        "texts.jsonl": [{"text": source} for _, source in sources if source.strip()],
        "conversations.jsonl": [line for pair in sources for line in questions(*pair)],
    }
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in contents.items():
        with atomic_file(folder / name) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        print(f"wrote {folder / name}: {len(lines):,} lines")


if __name__ == "__main__":
    run_script(main)
