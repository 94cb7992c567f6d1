"""Over all formats: every example of odd and damaged input is kept, or dropped and counted."""

import csv
import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from cap_pretrain.data.builders import FORMATS
from cap_pretrain.data.builders.formats.table import Columns, parts
from cap_pretrain.errors import UserError
from tests.data.test_question_formats import gqa_question, write_json
from tests.data.test_webdataset import sample, tar
from tests.tools.test_build_dataset import jpeg, read, report, run, write_files

IMAGES = 6  # the last of them is broken
TEXTS = (
    *("a cat", "half \ud83d", "", " ", "a\u2028b\x0b", '12" of "it"', "x" * 30_000, "\0", "=1"),
    *("caf\u00e9", "cafe\u0301", "\U0001f600" * 9, "a\tb\nc", "<b>", "$\\frac$", "\ufffd"),
)
NAMES = (
    "none.jpg",
    "../0.jpg",
    "n" * 300 + ".jpg",
    "\ud83d.jpg",
    "",
    "0.jpg/",
    "e\u0301.jpg",
    "9" * 400,
)


class Generated:
    """Examples in any format, with the options that read them."""

    def __init__(self, folder, seed):
        self.folder, self.rng = folder, random.Random(seed)
        self.count = self.rng.randint(3, 20)  # of examples
        stored = {f"{n}.jpg": jpeg(n) for n in range(IMAGES - 1)} | {f"{IMAGES - 1}.jpg": b"x"}
        self.images = write_files(folder / "images", stored)

    def text(self):
        return self.rng.choice(TEXTS) if self.rng.random() < 0.5 else "a dog"

    def name(self, number):
        is_odd = number and self.rng.random() < 0.3
        return self.rng.choice(NAMES) if is_odd else f"{number % IMAGES}.jpg"

    def json(self, content):
        return write_json(self.folder / "a.json", content)

    def captions_json(self):
        listed = [{"id": n, "file_name": self.name(n)} for n in range(self.count)]
        said = [{"image_id": n, "caption": self.text()} for n in range(self.count)]
        said.append({"image_id": 0, "caption": "a dog"})
        path = self.json({"images": listed, "annotations": said})
        return ("--annotations", path, "--images", self.images)

    vizwiz = captions_json

    def karpathy(self):
        listed = [
            {"split": "train", "filename": self.name(n), "imgid": n}
            | {"sentences": [{"raw": "a dog" if n == 0 else self.text()}]}
            for n in range(self.count)
        ]
        return ("--annotations", self.json({"images": listed}), "--images", self.images)

    def flickr(self):
        names = [f"{n}.jpg" for n in range(self.count)]
        lines = [f"{name}#0\ta dog" for name in names]
        path = self.folder / "a.token"
        path.write_bytes("\n".join(lines).encode() + b" \xff\x85\n")
        return ("--captions", path, "--images", self.images)

    def table(self):
        path = self.folder / "a.csv"
        with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            rows = csv.writer(file)
            rows.writerow(["key", "image", "caption"])
            for n in range(self.count):
                text = self.text().replace("\ud83d", "") or "a dog"
                rows.writerow([n, self.name(n).replace("\ud83d", ""), "a dog" if n == 0 else text])
        return ("--tables", path, "--images", self.images, "--id", "key")

    def webdataset(self):
        members = []
        for n in range(self.count):
            files = sample(f"{n:03}", jpeg(n), "a dog")
            text = self.text().encode("utf-8", "surrogatepass")
            odd = self.rng.choice(
                [files[1][1], b"[" * 100_000, b'{"width": ' + b"9" * 400 + b"}", b"\xff", b"[]"]
            )
            odd = {".json": odd, ".txt": text} if n else {}
            members += [(name, odd.get(name[3:], data)) for name, data in files]
        tar(self.folder / "a.tar", members)
        return ("--shards", self.folder / "a.tar")

    def cc3m(self):
        texts = [self.text().replace("\ud83d", "") or "a" for _ in range(self.count)]
        lines = [f"{' '.join(t.split(chr(10)))}\thttp://x/{n}" for n, t in enumerate(texts)]
        path = self.folder / "a.tsv"
        path.write_text("\n".join(["a dog\thttp://x/", *lines[1:]]), encoding="utf-8")
        return ("--lists", path, "--images", self.images)

    def cc12m(self):
        self.cc3m()
        path = self.folder / "a.tsv"
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")]
        text = "\n".join("\t".join(reversed(row)) for row in rows)
        path.write_text(text, encoding="utf-8")
        return ("--lists", path, "--images", self.images)

    def vqav2(self):
        asked = [
            {"question_id": n, "image_id": n % (IMAGES + 2), "question": self.text() or "?"}
            for n in range(self.count)
        ]
        given = [
            {"question_id": n, "answers": [{"answer": self.text()}, {"answer": "yes"}]}
            | {"answer_type": self.text()}
            for n in range(self.count)
        ]
        asked[0]["question"] = "?"
        answers = write_json(self.folder / "b.json", {"annotations": given})
        options = ("--questions", self.json({"questions": asked}), "--images", self.images)
        return (*options, "--annotations", answers)

    def gqa(self):
        content = {
            str(n): gqa_question(self.name(n).removesuffix(".jpg"), self.text(), self.text())
            for n in range(self.count)
        }
        content["0"] = gqa_question("0", "yes")
        return ("--questions", self.json(content), "--images", self.images)

    def nlvr2(self):
        lines = [
            {"sentence": self.text(), "identifier": f"{n}-0", "label": self.rng.choice("Tx")}
            for n in range(self.count)
        ]
        lines[0] = {"sentence": "?", "identifier": "0-0", "label": "True"}
        path = self.folder / "a.json"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        names = [f"{n}-img{k}.png" for n in range(3) for k in (0, 1)]
        photos = write_files(self.folder / "p", {name: jpeg(1, kind="PNG") for name in names})
        return ("--questions", path, "--images", photos)

    def box(self):
        odd = [[], None, [0, 0, -1, 2], [0, 0, 9**400, 1], [0, 0, "1", 1], [0, 0, 1e400, 1]]
        return self.rng.choice(odd) if self.rng.random() < 0.3 else [0, 0, 5, 5]

    def refcoco(self):
        listed = [
            {"id": n, "file_name": f"{n % IMAGES}.jpg", "width": 9, "height": 9}
            for n in range(self.count)
        ]
        boxes = [
            {"id": n, "image_id": n, "bbox": self.box() if n else [0, 0, 5, 5]}
            for n in range(self.count)
        ]
        refs = [
            {"image_id": n, "ann_id": n, "split": "train"}
            | {"sentences": [{"sent": self.text() if n else "a dog"}]}
            for n in range(self.count)
        ]
        instances = write_json(self.folder / "b.json", {"images": listed, "annotations": boxes})
        return ("--refs", self.json(refs), "--instances", instances, "--images", self.images)

    def visual_genome(self):
        def regions(n):
            box = self.box() if n else [0, 0, 5, 5]
            values = box if isinstance(box, list) and len(box) == 4 else [None] * 4
            sides = dict(zip(("x", "y", "width", "height"), values, strict=True))
            return [{"phrase": self.text() if n else "a dog", **sides}]

        sizes = [{"image_id": n, "width": 9, "height": 9} for n in range(self.count)]
        described = [{"id": n, "regions": regions(n)} for n in range(self.count)]
        data = write_json(self.folder / "b.json", sizes)
        return ("--regions", self.json(described), "--image_data", data, "--images", self.images)

    def image_folder(self):
        names = ["a", "b\udce9", "c\nd", "\udcff"]
        files = {
            f"{names[n % 4]}/{n}\udce9.jpg": b"x" if n % 5 == 4 else jpeg(n)
            for n in range(self.count)
        }
        return ("--images", write_files(self.folder / "f", files))

    def openimages(self):
        self.count = IMAGES
        (self.folder / "c.csv").write_text('/m/0,"a\nb"\n/m/1,caf\u00e9\n', encoding="utf-8")
        rows = [f"{n},x,/m/{self.rng.randint(0, 2) if n else 0},1" for n in range(20)]
        text = "\n".join(["ImageID,Source,LabelName,Confidence", *rows])
        (self.folder / "l.csv").write_text(text)
        options = ("--labels", self.folder / "l.csv", "--images", self.images)
        return (*options, "--classes", self.folder / "c.csv")


def check(folder, name, seed, capsys):
    """Build a dataset of random examples; check its counts against these and its records."""
    folder.mkdir()
    data = Generated(folder, seed)
    options = getattr(data, name)()
    code = run(name, "--name", "mine", "--out", folder / "out", *options)
    assert code == 0, (name, seed, capsys.readouterr().err)
    (split,) = report(folder / "out" / "mine")
    counts = report(folder / "out" / "mine")[split]
    dropped = sum(drop["count"] for drop in counts["dropped"].values())
    assert counts["candidates"] == counts["kept"] + dropped == data.count, (name, seed)
    assert len(read(folder / "out" / "mine", split)) == counts["kept"]
    lines = (folder / "out/mine/1.0.0/dropped.jsonl").read_text(encoding="utf-8").split("\n")
    assert len(lines) - 1 == dropped


@pytest.mark.parametrize("name", FORMATS)
def test_every_example_is_kept_or_counted(tmp_path, capsys, name):
    check(tmp_path / "0", name, 0, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_example_of_many_inputs_is_kept_or_counted(tmp_path, capsys, name):
    for seed in range(1, 31):
        check(tmp_path / str(seed), name, seed, capsys)


@pytest.mark.slow
def test_any_damaged_parquet_is_read_or_refused(tmp_path):
    """2,000 files with damaged bytes: they are read or refused, in little memory."""
    rng = random.Random(0)
    path = tmp_path / "t.parquet"
    rows = {"image": [{"bytes": jpeg(k), "path": f"{k}.jpg"} for k in range(9)]}
    rows["caption"] = [["a", "caf\u00e9"], None, [], *(["b"] for _ in range(6))]
    refused = []
    for number in range(2000):
        if number % 50 == 0:
            sink = pa.BufferOutputStream()
            compression = rng.choice(["none", "snappy", "gzip", "zstd"])
            parquet.write_table(pa.table(rows), sink, compression=compression)
            whole = sink.getvalue().to_pybytes()
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)
        try:
            (part,) = parts({"train": path}, {}, Columns(), "--tables")["train"]
            assert len(list(part.read())) <= 9
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(e.startswith(str(path)) and len(e.splitlines()) <= 2 for e in refused)
