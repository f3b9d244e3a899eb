"""The embedded world: a small Qwen2.5-VL, its tokenizer, and sums over real handwritten digits.

Everything is made here, offline, in about two minutes on two cores, as files that any other run could
use: `model/` is a Hugging Face folder, `*.jsonl` are rows with pictures beside them. From there on
nothing knows that the world is embedded.

A row is a sum of three digits, `a + b + c` or `a * b + c`. In text rows the digits are written; in
picture rows a and b are handwriting from the UCI digits set (scikit-learn's copy, 1,797 writings),
which the caption names in words. Held-out rows use triples, and writings, that no training row uses.

Next: tasks.py (rows and pictures), cold_start.py (model, tokenizer, a short supervised start).
"""

import json

from nanolmmr1.desk.cold_start import write_model
from nanolmmr1.desk.tasks import write_rows


def build(folder, seed, display):
    """Write the world into an existing folder: model/, images/, {text,image}_{train,test}.jsonl."""
    rows = write_rows(folder, seed)
    for name, part in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) for row in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_model(folder / "model", folder, rows, seed, display)
