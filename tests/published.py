"""Data sets as they are published, small: invented rows of shared/notes/schemas.json, with real pictures."""

import csv
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet

SHARED = Path(__file__).resolve().parents[2] / "shared"
SCHEMAS = SHARED / "notes" / "schemas.json"
SOURCES = json.loads(SCHEMAS.read_text())["sources"] if SCHEMAS.is_file() else {}
QUESTIONS = {  # a text of the invented row, which is made different in every row
    "mathvista": "Which bar is the tallest?", "mathvista_free_form": "How long is the rope?",
    "mathverse": "A square has side 3.", "mathverse_vision_only": "Reason about the question",
    "mathvision": "How many triangles are", "mathvision_free": "How much heavier is", "olympiadbench": "In the figure",
    "mmstar": "What shape is shown?", "mmmu": "What is the total?", "math500": "Compute", "gpqa": "Invented question?",
    "gsm8k": "Tom has 3 boxes", "wemath": "What is the area?", "logicvista": "Which figure comes next?",
    "dynamath": "What is the slope?", "geometry3k_hiyouga": "Find x.", "geometry3k_original": "Find x.",
    "deepscaler": "Find the sum", "virl39k": "What is angle A", "virl39k_hub_copy": "Which?",
    "lmm_r1_message_jsonl": "Which shape is larger?", "lmm_r1_text_jsonl": "1+1=?", "lmm_r1_sokoban_jsonl": "Plan the",
    "mm_eureka_jsonl": "Find x.", "mathv360k": "How many?", "llava_conversations": "Which is larger?",
    "verl_parquet": "Find x.", "easyr1": "Find x.", "math_hendrycks": "Compute"}  # fmt: skip
JSON_LIST = ("deepscaler", "mathv360k", "wemath")
KEYED = ("logicvista", "dynamath")
TREES = ("geometry3k_original", "math_hendrycks")
ZIPPED = ("virl39k", "mathv360k")
TARRED = ("lmm_r1_message_jsonl", "lmm_r1_sokoban_jsonl")


def pictures():
    """Bytes of the real pictures, in a fixed order."""
    return [path.read_bytes() for path in sorted((SHARED / "data" / "mathvision" / "images").iterdir())]


def _filled(value, picture):
    if isinstance(value, dict):
        return picture if "__bytes__" in value else {key: _filled(each, picture) for key, each in value.items()}
    return [_filled(each, picture) for each in value] if isinstance(value, list) else value


def _paths(value):
    """Paths of pictures in a record, also inside of JSON texts."""
    if isinstance(value, dict):
        return [path for each in value.values() for path in _paths(each)]
    if isinstance(value, list):
        return [path for each in value for path in _paths(each)]
    if isinstance(value, str) and value[:1] == "[" and "role" in value:
        return _paths(json.loads(value))
    return [value] if isinstance(value, str) and value.endswith((".png", ".jpg")) else []


def publish(name, folder, count=4):
    """Write `count` rows of a source as it is published; returns what a user names as the source."""
    text, question = json.dumps(SOURCES[name]["row"], ensure_ascii=False), QUESTIONS[name]
    return write(name, folder, [json.loads(text.replace(question, f"{question} Case {number}."))
                                for number in range(count)], pictures())  # fmt: skip


def write(name, folder, rows, real):
    """Write rows as a source is published, as parquet if SOURCES lacks it, each with its own pictures of `real`."""
    folder.mkdir(parents=True, exist_ok=True)
    records, files = [], {}
    for number, row in enumerate(rows):
        text = json.dumps(row, ensure_ascii=False)
        for path in sorted(set(_paths(row))):
            own = path.replace(".", f"-{number}.")
            text = text.replace(path, own)
            files[own.removeprefix("file:///data/")] = real[(len(files) * 7) % len(real)]
        records.append(_filled(json.loads(text), real[(number * 7 + 3) % len(real)]))
    _write_pictures(name, folder, files)
    return _write_rows(name, folder, records, real)


def _write_pictures(name, folder, files):
    if name in ZIPPED and files:
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for path, data in files.items():
                archive.writestr(path, data)
    elif name in TARRED and files:
        with tarfile.open(folder / "images.tar", "w") as archive:
            for path, data in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)


def _write_rows(name, folder, records, real):
    if name in TREES:
        for number, record in enumerate(records):
            home = folder / "train" / (str(number) if "geometry" in name else "algebra")
            home.mkdir(parents=True, exist_ok=True)
            if "geometry" in name:
                (home / "img_diagram.png").write_bytes(real[number])
            file = home / ("data.json" if "geometry" in name else f"{number}.json")
            file.write_text(json.dumps(record, indent=1))
        return str(folder / "train")
    if name == "gpqa":
        with open(folder / "gpqa.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        return str(folder / "gpqa.csv")
    container = SOURCES[name]["container"] if name in SOURCES else "parquet"
    if "parquet" in container or "as math" in container:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "train.parquet")
        return str(folder / "train.parquet")
    whole = json.dumps({str(i): r for i, r in enumerate(records)} if name in KEYED else records, ensure_ascii=False)
    if name in KEYED or name in JSON_LIST:
        (folder / "rows.json").write_text(whole)
        return str(folder / "rows.json")
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / "rows.jsonl")
