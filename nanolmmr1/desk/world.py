"""The embedded data and model of the desk recipe: sums over real handwritten digits, and a small Qwen2.5-VL.

Everything is generated offline, in about two minutes on two cores, as ordinary files: `model/` is a Hugging Face
folder, `*.jsonl` are rows with images beside them. The rest of the code treats them like any other model and data.

A row is a sum of three digits, `a + b + c` or `a * b + c`. In text rows the digits are written; in image rows a and b
are handwriting from the UCI digits set (scikit-learn's copy, 1,797 images), and the caption names them in words.
Held-out rows use triples and handwriting that no training row uses.

Next: cold_start.py, its model.
"""

import json
from pathlib import Path

from nanolmmr1.desk.cold_start import Display, write_model
from nanolmmr1.desk.tasks import write_rows


def build(folder: Path, seed: int, display: Display) -> None:
    """Write model/, images/ and {text,image}_{train,test}.jsonl into an existing folder."""
    rows = write_rows(folder, seed)
    for name, split in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) for row in split)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_model(folder / "model", folder, rows, seed, display)
