"""From a published data set to training rows: what is kept, what is dropped and why, and that a kill costs nothing."""

import io
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import published
import pytest
from PIL import Image

from nanolmmr1.data.rows import load_rows
from nanolmmr1.errors import UserError
from nanolmmr1.prepare import __main__ as command
from nanolmmr1.prepare.__main__ import main


def picture(seed=0, size=(60, 40), kind="PNG"):
    """A drawing of its own: lines from random points."""
    rng, image = random.Random(seed), Image.new("RGB", size, "white")
    for _ in range(200):
        image.putpixel((rng.randrange(size[0]), rng.randrange(size[1])), (0, 0, rng.randrange(256)))
    image = image.resize((size[0] * 4, size[1] * 4), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def report(out):
    return json.loads(Path(f"{out}.report.json").read_text())


LONG = ("A train leaves the station of a small town at seven in the morning and drives at fifty kilometres per hour; "
        "how far from the town is it at {} in the afternoon if it never stops?")  # fmt: skip


def test_every_reason_to_drop_a_row_is_counted_with_its_first_rows(tmp_path, capsys):
    for name, data in dict(a=picture(1), b=picture(2), again=picture(1, kind="BMP"), broken=b"x").items():
        (tmp_path / f"in/{name}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.png").write_bytes(data)
    find = dict(problem="<image>Find x.", answer="3", rate=0.5)
    source = write(
        tmp_path / "in/rows.jsonl",
        find | dict(id="first", images=["a.png"]), find | dict(id="other picture", images=["b.png"]),
        find | dict(id="same pixels", images=["again.png"]),
        find | dict(id="same, wider", problem="<image>Find  x.", answer="#### 3", images=["a.png"]),
        find | dict(id="other case", problem="<image>Find X.", images=["a.png"]),
        find | dict(id="contradiction", answer="4", images=["a.png"]),
        find | dict(id="broken", images=["broken.png"]), find | dict(id="gone", images=["gone.png"]),
        find | dict(id="easy", images=["b.png"], rate=1.0), find | dict(id="unmeasured", images=["b.png"], rate=None),
        dict(id="prose", problem="Why?", answer="Because it is so " * 5, rate=0.5),
        dict(id="text", problem="1+1?", answer="#### 2", rate=0.5),
        dict(id="leak", problem="Hint: think. " + LONG.format(3), answer="400 km", rate=0.5),
        dict(id="near", problem=LONG.format(4), answer="450 km", rate=0.5))  # fmt: skip
    bench = write(tmp_path / "bench.jsonl", dict(id="b7", problem=LONG.format(3), answer="400"))
    out = tmp_path / "out" / "rows.jsonl"
    main(["auto", source, str(out), "defaults.data_filter={rate: [0.1, 0.9]}", "--against", bench])
    made = report(out)
    assert made["dropped"] == {
        "picture missing": 1, "duplicate": 2, "duplicate with another answer": 1, "picture broken": 1,
        "rate outside of [0.1, 0.9]": 1, "no number in rate": 1, made_reason(made): 1, "in a benchmark": 1}
    assert (made["read"], made["kept"]) == (14, 5)
    assert [row.id for row in load_rows(str(out)).rows] == ["first", "other picture", "other case", "text", "near"]
    assert made["first"]["in a benchmark"] == [f"leak: {bench} b7"]
    assert made["first"]["duplicate"][0].startswith("same pixels: an earlier row has the same problem")
    hits = {hit["id"]: hit for hit in made["hits"]}
    assert hits["leak"]["dropped"] and hits["leak"]["benchmark_id"] == "b7" and hits["leak"]["same_answer"]
    assert not hits["near"]["dropped"] and hits["near"]["overlap"] > 0.5, "the same words with another answer: reported"
    said = capsys.readouterr().out
    assert "rows read" in said and "1 of them are in 1 rows, which were dropped; 1 rows were kept that look" in said
    pictures = sorted(path.name for path in next(path for path in out.parent.iterdir() if path.is_dir()).iterdir())
    assert len(pictures) == 2 and all(name.endswith(".png") for name in pictures)


def made_reason(made):
    """The judge's words for an answer in prose."""
    (reason,) = [why for why in made["dropped"] if "gold" in why or "prose" in why]
    return reason


def test_prompts_over_the_limit_are_dropped_where_a_model_is_given(tmp_path, tiny):
    source = write(tmp_path / "in.jsonl", dict(problem="1+1?", answer="2"), dict(problem="word " * 300, answer="2"))
    main(["auto", source, str(tmp_path / "out.jsonl"), f"model={tiny}", "defaults.max_prompt_tokens=100"])
    assert report(tmp_path / "out.jsonl")["dropped"] == {"prompt too long": 1}


def test_a_finished_command_does_nothing_and_a_changed_one_starts_anew(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", dict(problem="1+1?", answer="2"), dict(problem="2+2?", answer="4"))
    out = tmp_path / "out.jsonl"
    main(["auto", source, str(out)])
    before, said = out.stat(), capsys.readouterr().out
    main(["auto", source, str(out)])
    assert out.stat().st_mtime_ns == before.st_mtime_ns
    assert capsys.readouterr().out.splitlines()[-3:] == said.splitlines()[-3:]
    write(Path(source), dict(problem="3+3?", answer="6"))
    main(["auto", source, str(out)])
    assert [row.answer for row in load_rows(str(out)).rows] == ["6"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.report.json"]


def test_a_run_that_keeps_no_row_leaves_the_output_and_its_owner_known(tmp_path):
    source = write(tmp_path / "in.jsonl", dict(problem="1+1?", answer="2", level=3))
    out = tmp_path / "out.jsonl"
    main(["auto", source, str(out)])
    with pytest.raises(UserError, match="no row is left"):
        main(["auto", source, str(out), "defaults.data_filter={level: [50, 60]}"])
    main(["auto", source, str(out), "defaults.data_filter={level: [0, 60]}"])
    assert report(out)["kept"] == 1 and len(load_rows(str(out)).rows) == 1


def test_prompts_are_measured_one_after_the_other(tmp_path, tiny):
    """A tokenizer that is told to take special tokens as text does so for all threads."""
    (tmp_path / "x.png").write_bytes(picture())
    rows = [dict(problem=f"{i}?" + " <|im_end|>" * (i % 5 == 0) + "<image>" * (i % 5 > 0), answer="2",
                 images=["x.png"] * (i % 5 > 0)) for i in range(300)]  # fmt: skip
    main(["auto", write(tmp_path / "in.jsonl", *rows), str(tmp_path / "out.jsonl"), f"model={tiny}"])
    assert report(tmp_path / "out.jsonl")["dropped"] == {}


def test_what_cannot_be_prepared_is_refused_before_any_work(tmp_path):
    source = write(tmp_path / "in.jsonl", dict(problem="1+1?", answer="2"))
    mine = tmp_path / "mine.jsonl"
    mine.write_text("my notes\n")
    out = str(tmp_path / "out.jsonl")
    for args, words in [
        ([source, str(mine)], "mine.jsonl is there, and is not as this command left it"),
        ([source, source], "is, or lies in"),
        ([source, str(tmp_path / "out.csv")], "a .csv file is not written"),
        (["gone.jsonl", out], "gone.jsonl does not exist"), ([source, out, "prompt.colums={}"], "prompt.columns"),
        ([source, out, "--against", "gone"], "'gone' is no benchmark"),
        ([str(tmp_path), str(tmp_path / "x.jsonl")], "is, or lies in"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            main(["auto", *args])
    assert mine.read_text() == "my notes\n"
    with pytest.raises(SystemExit):
        main(["no_schema", source, out])
    write(tmp_path / "set/rows.jsonl", dict(problem="1+1?", answer="2"))
    (tmp_path / "set/deep").mkdir()
    with pytest.raises(UserError, match="is, or lies in"):
        main(["auto", source, str(tmp_path / "set/deep/er/out.jsonl"), "--against", str(tmp_path / "set")])
    with pytest.raises(UserError, match="its pictures would be written to .*set, where .*set/rows.jsonl is"):
        main(["auto", str(tmp_path / "set/rows.jsonl"), str(tmp_path / "set.jsonl")])


def test_files_of_the_user_beside_the_output_are_left_alone(tmp_path):
    source = write(tmp_path / "in.jsonl", dict(problem="1+1?", answer="2"))
    main(["auto", source, str(tmp_path / "a/rows.jsonl")])
    (tmp_path / "a/rows.parquet").write_text("mine")  # of the same name but for the suffix
    write(tmp_path / "b/rows.jsonl.report.json", dict(mine=1))
    (tmp_path / "c/rows.parquet.pictures").mkdir(parents=True)
    (tmp_path / "d/rows").mkdir(parents=True)
    for out in ("a/rows.parquet", "b/rows.jsonl", "c/rows.parquet", "d/rows.jsonl"):
        with pytest.raises(UserError, match="is there, and is not as this command left it"):
            main(["auto", source, str(tmp_path / out)])
    assert (tmp_path / "a/rows.parquet").read_text() == "mine" and (tmp_path / "c/rows.parquet.pictures").is_dir()
    with open(tmp_path / "a/rows.jsonl", "a") as file:  # rows of one's own
        file.write(json.dumps(dict(problem="3+3?", answer="6")) + "\n")
    for keys in ([], ["reward.option_value=false"]):
        with pytest.raises(UserError, match="rows.jsonl is there, and is not as"):
            main(["auto", source, str(tmp_path / "a/rows.jsonl"), *keys])
    (tmp_path / "e").mkdir()
    main(["auto", source, str(tmp_path / "e/rows.parquet")])
    write(tmp_path / "e/rows.parquet.pictures/mine.txt", {})
    with pytest.raises(UserError, match="rows.parquet.pictures is there"):
        main(["auto", source, str(tmp_path / "e/rows.parquet"), "reward.option_value=false"])
    assert (tmp_path / "e/rows.parquet.pictures/mine.txt").exists()
    (tmp_path / "a/rows.jsonl").unlink()
    main(["auto", source, str(tmp_path / "a/rows.jsonl")])
    assert len(load_rows(str(tmp_path / "a/rows.jsonl")).rows) == 1, "a file that is gone is written again"


def test_parquet_holds_its_pictures_and_leaves_none_beside_it(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    source = write(tmp_path / "in.jsonl", dict(problem="<image>1?", answer="2", images=["x.png"]))
    main(["auto", source, str(tmp_path / "out/rows.parquet")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rows.parquet", "rows.parquet.report.json"]
    (found,) = load_rows(str(tmp_path / "out/rows.parquet")).rows
    assert found.images == [picture()]


def test_a_picture_that_came_is_taken_in(tmp_path):
    source = write(tmp_path / "in.jsonl", dict(problem="<image>1?", answer="2", images=["x.png"]),
                   dict(problem="1+1?", answer="2"))  # fmt: skip
    main(["auto", source, str(tmp_path / "out/rows.jsonl")])
    assert report(tmp_path / "out/rows.jsonl")["dropped"] == {"picture missing": 1}
    (tmp_path / "x.png").write_bytes(picture())
    main(["auto", source, str(tmp_path / "out/rows.jsonl")])
    assert report(tmp_path / "out/rows.jsonl")["kept"] == 2


def test_a_journal_is_of_the_rows_that_it_was_begun_with(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "CHUNK", 1)
    (tmp_path / "x.png").write_bytes(picture())
    rows = [dict(problem=f"<image>{n}?", answer="2", images=["x.png"]) for n in range(3)]
    source, out = write(tmp_path / "in.jsonl", *rows), tmp_path / "out/rows.jsonl"

    def stop(chunk):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "write_rows", lambda *_: stop(_))
        with pytest.raises(KeyboardInterrupt):
            main(["auto", source, str(out)])
    write(tmp_path / "in.jsonl", *rows[::-1])
    with pytest.raises(UserError, match="holds work with rows="):
        main(["auto", source, str(out)])
    write(tmp_path / "in.jsonl", *rows)
    for path in (tmp_path / "out/rows").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="names the picture rows/.*png, which is gone: delete the journal"):
        main(["auto", source, str(out)])


def test_when_no_row_is_left_the_report_says_why(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", dict(problem="1+1?", answer="Because of this and that " * 5))
    with pytest.raises(UserError, match="no row is left; the table above says why"):
        main(["auto", source, str(tmp_path / "out.jsonl")])
    assert "dropped:" in capsys.readouterr().out and not (tmp_path / "out.jsonl").exists()


def test_a_hub_id_is_downloaded_as_the_files_that_it_consists_of(tmp_path, monkeypatch):
    import huggingface_hub

    write(tmp_path / "hub/main/train-00000.jsonl", dict(question="1+1?", answer="#### 2"))
    write(tmp_path / "hub/main/test-00000.jsonl", dict(question="2+2?", answer="#### 4"))
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, repo_type: asked.append((name, repo_type)) or str(tmp_path / "hub"))  # fmt: skip
    main(["gsm8k", "openai/gsm8k:main@train", str(tmp_path / "out.jsonl")])
    assert asked == [("openai/gsm8k", "dataset")]
    assert [row.answer for row in load_rows(str(tmp_path / "out.jsonl")).rows] == ["#### 2"]


@pytest.mark.parametrize("source, file", [
    ("a/b:gpqa_diamond@train", "gpqa_diamond.csv"), ("a/b:testmini@testmini", "testmini.jsonl"),
    ("a/b:OE_MM@train", "OE_MM/OE_MM.jsonl"), ("a/b@testmini", "data/testmini-00000-of-00001.jsonl"),
    ("a/b:main@test", "main/test-0.jsonl")])
def test_a_configuration_is_found_as_a_folder_or_as_a_file(tmp_path, monkeypatch, source, file):
    import huggingface_hub

    for name in (file, "other_config.jsonl", "data/other-00000-of-00001.jsonl", "main/train-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("question,answer\n1+1?,2\n" if name.endswith("csv") else
                                     json.dumps({"question": "1+1?", "answer": name}) + "\n")  # fmt: skip
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, repo_type: str(tmp_path))
    if file.endswith("csv"):
        (tmp_path / "other_config.jsonl").unlink()
        shutil.rmtree(tmp_path / "data")
    (row,) = load_rows(command.fetch(source)).rows
    assert row.answer == ("2" if file.endswith("csv") else file)
    with pytest.raises(UserError, match="no files of this configuration and split"):
        command.fetch("a/b:none@none")


@pytest.mark.skipif(not published.SOURCES, reason="needs the shared data folder")
def test_real_rows_hold_themselves_and_not_each_other(shared, tmp_path):
    gsm8k, mathvision = str(shared / "data/gsm8k/test.jsonl"), str(shared / "data/mathvision")
    for source, against, dropped in ((gsm8k, gsm8k, 300), (gsm8k, mathvision, 0), (mathvision, gsm8k, 0)):
        out = tmp_path / f"{Path(source).stem}-{Path(against).stem}.jsonl"
        try:
            main(["auto", source, str(out), "--against", against])
        except UserError as error:
            assert "no row is left" in str(error) and dropped == 300
        found = report(out)
        print(f"{source} against {against}: {found['dropped']}, {len(found['hits'])} hits")
        assert found["dropped"].get("in a benchmark", 0) == dropped
        assert found["kept"] == 300 - dropped


@pytest.mark.skipif(not published.SOURCES, reason="needs the shared data folder")
def test_a_command_that_was_killed_goes_on_and_its_output_is_the_same(shared, tmp_path, monkeypatch, capsys):
    """Killed for real, as its own process, five times wherever it is."""
    monkeypatch.setattr(command, "CHUNK", 8)
    source, rng = str(shared / "data/mathvision"), random.Random(0)

    def files(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
                if path.is_file() and not path.name.endswith(".report.json")}  # fmt: skip

    def prepare(folder):
        main(["auto", source, str(tmp_path / folder / "out.jsonl"), "--against", str(shared / "data/gsm8k/test.jsonl")])

    prepare("whole")
    journal, done = tmp_path / "killed/out.jsonl.journal", []
    for kill in range(5):
        if not (child := os.fork()):
            prepare("killed")
            os._exit(0)
        while not journal.exists() or journal.read_bytes().count(b"\n") < 1 + 7 * kill:  # of 39 lines
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it was not done yet"
        done.append(journal.read_bytes().count(b"\n"))
    prepare("killed")
    print(f"lines of the journal after each kill: {done}")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
