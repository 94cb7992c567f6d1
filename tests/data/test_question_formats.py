"""The formats of Karpathy's splits, VQAv2, GQA and NLVR2."""

import gzip
import json

import numpy as np
import pytest

from cap_pretrain.data import images
from cap_pretrain.data.builders.files import Finder, open_files
from cap_pretrain.data.builders.formats.nlvr2 import side_by_side
from cap_pretrain.data.sources.open import open_source
from tests.tools.test_build_dataset import jpeg, read, report, run, write_files


def write_json(path, content):
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def build(tmp_path, name, *arguments):
    """Build a dataset, which must succeed; return its folder."""
    assert run(name, "--name", "mine", "--out", tmp_path / "out", *arguments) == 0
    return tmp_path / "out" / "mine"


def lost(folder, split):
    """Return the ids that were dropped, by reason."""
    dropped = report(folder)[split]["dropped"]
    return {reason: [e["id"] for e in drop["examples"]] for reason, drop in dropped.items()}


# Karpathy


def coco_image(number, split, folder, captions=2, **more):
    name = f"COCO_{folder}_{number:012d}.jpg"
    sentences = [
        {
            "tokens": ["caption", str(k)],
            "raw": f" Caption {number} {k}.",
            "imgid": number - 100,
            "sentid": 10 * number + k,
        }
        for k in range(captions)
    ]
    where = {"filepath": folder, "filename": name, "split": split, "imgid": number - 100}
    return where | {"sentids": [], "sentences": sentences, "cocoid": number} | more


@pytest.fixture
def karpathy(tmp_path):
    """COCO's file and two zips; one image is missing, one corrupt, one without captions."""
    listed = [
        coco_image(101, "train", "train2014"),
        coco_image(102, "val", "val2014"),
        coco_image(103, "test", "val2014"),
        coco_image(104, "restval", "val2014"),
        coco_image(105, "restval", "val2014", captions=0),
        coco_image(106, "train", "train2014"),
        coco_image(107, "train", "train2014"),
    ]
    archives = []
    for folder in ("train2014", "val2014"):
        data = {
            f"{folder}/{e['filename']}": b"x" if e["cocoid"] == 107 else jpeg(e["cocoid"])
            for e in listed
            if e["filepath"] == folder and e["cocoid"] != 106
        }
        archives.append(write_files(tmp_path / f"{folder}.zip", data))
    annotations = write_json(
        tmp_path / "dataset_coco.json.gz", {"images": listed, "dataset": "coco"}
    )
    return ["--annotations", annotations, "--images", *archives]


def test_karpathys_splits_of_coco(tmp_path, karpathy):
    folder = build(tmp_path, "karpathy", *karpathy)
    ids = {split: set(read(folder, split)) for split in ("train", "val", "test")}
    assert ids == {"train": {"101", "104"}, "val": {"102"}, "test": {"103"}}
    example = read(folder, "train")["104"]
    assert example["image"] == jpeg(104)
    assert example["captions"] == ["Caption 104 0.", "Caption 104 1."]
    assert example["question"] == "" and example["label"] == -1
    assert lost(folder, "train") == {
        "without captions": ["105"],
        "missing": ["106"],
        "broken": ["107"],
    }


def test_restval_may_be_a_split_of_its_own(tmp_path, karpathy):
    folder = build(tmp_path, "karpathy", *karpathy, "--restval", "more")
    assert set(read(folder, "train")) == {"101"} and set(read(folder, "more")) == {"104"}


def test_karpathys_splits_of_flickr(tmp_path):
    listed = [
        {
            "filename": f"{number}_{letter}.jpg",
            "imgid": number,
            "split": split,
            "sentids": [number],
            "sentences": [{"raw": f"A {letter}.", "tokens": [], "imgid": number, "sentid": 1}],
        }
        for number, (letter, split) in enumerate(zip("abc", ("train", "val", "test"), strict=True))
    ]
    photos = {f"Flicker8k_Dataset/{e['filename']}": jpeg(e["imgid"]) for e in listed}
    content = {"images": listed, "dataset": "flickr8k"}
    arguments = ("--annotations", write_json(tmp_path / "dataset_flickr8k.json", content))
    arguments += ("--images", write_files(tmp_path / "photos", photos))
    folder = build(tmp_path, "karpathy", *arguments)
    for number, split in enumerate(("train", "val", "test")):
        ((image_id, example),) = read(folder, split).items()
        assert image_id == str(number) and example["image"] == jpeg(number)
        assert example["captions"] == [f"A {'abc'[number]}."]


# VQAv2

KINDS = {"yes/no": ["yes"] * 9 + ["no"], "number": ["2"] * 10, "other": ["net", "a net"] * 5}


def vqa_files(tmp_path, split, numbers, answered=True):
    """Return (questions, annotations) of VQAv2 with a question of each type about each image."""
    asked, given = [], []
    for number in numbers:
        for k, (kind, answers) in enumerate(KINDS.items()):
            common = {"image_id": number, "question_id": 1000 * number + k}
            asked.append(common | {"question": f"What about {number} {k}?"})
            given.append(
                common
                | {
                    "question_type": "what",
                    "multiple_choice_answer": answers[0],
                    "answer_type": kind,
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                        for i, answer in enumerate(answers)
                    ],
                }
            )
    about = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": split}
    questions = {"task_type": "Open-Ended", "questions": asked} | about
    found = [write_json(tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json", questions)]
    if answered:
        annotations = {"annotations": given} | about
        found.append(write_json(tmp_path / f"v2_mscoco_{split}_annotations.json.gz", annotations))
    return found


def coco_photos(tmp_path, split, numbers):
    names = {f"{split}/COCO_{split}_{n:012d}.jpg": jpeg(n) for n in numbers}
    return write_files(tmp_path / f"{split}.zip", names | {f"__MACOSX/{split}/._1.jpg": b"x"})


@pytest.fixture
def vqav2(tmp_path):
    """Return options for two splits, and for one whose answers are secret."""
    train, train_answers = vqa_files(tmp_path, "train2014", (9, 12))
    val, val_answers = vqa_files(tmp_path, "val2014", (13,))
    (test,) = vqa_files(tmp_path, "test-dev2015", (14,), answered=False)
    photos = {
        split: coco_photos(tmp_path, folder, numbers)
        for split, folder, numbers in (
            ("train", "train2014", (9, 12)),
            ("val", "val2014", (13,)),
            ("test", "test2015", (14,)),
        )
    }
    return [
        *("--questions", f"train={train}", f"val={val}", f"test={test}"),
        *("--annotations", f"train={train_answers}", f"val={val_answers}"),
        *("--images", *(f"{split}={path}" for split, path in photos.items())),
    ]


def test_vqav2_is_an_example_a_question_with_all_ten_answers(tmp_path, vqav2):
    folder = build(tmp_path, "vqav2", *vqav2)
    examples = read(folder, "train")
    assert set(examples) == {f"{n}00{k}" for n in (9, 12) for k in range(3)}
    source = open_source(str(folder), "val", image_size=8)
    assert source.class_names == ["number", "other", "yes/no"]
    for example in source:
        k = int(example["id"][-1])
        kind = list(KINDS)[k]
        assert example == {
            "image": jpeg(13),
            "question": f"What about 13 {k}?",
            "captions": KINDS[kind],
            "label": source.class_names.index(kind),
            "id": f"1300{k}",
        }
    secret = read(folder, "test")
    assert len(secret) == 3
    assert all(e["captions"] == [] and e["label"] == -1 for e in secret.values())
    assert secret["14001"]["image"] == jpeg(14) and secret["14001"]["question"]
    assert not any(split["dropped"] for split in report(folder).values())


def test_what_is_wrong_with_questions_is_counted(tmp_path):
    questions, annotations = vqa_files(tmp_path, "train2014", (1, 2, 3))
    content = json.loads(questions.read_text())
    content["questions"] = content["questions"][:-1]  # 3002
    content["questions"][1]["question"] = " "
    write_json(questions, content)
    content = json.loads(gzip.decompress(annotations.read_bytes()))
    del content["annotations"][3]  # 2000
    content["annotations"][3]["answers"] = [{"answer": " "}]  # 2001
    write_json(annotations, content)
    photos = coco_photos(tmp_path, "train2014", (1, 2))
    paths = ("--questions", questions, "--annotations", annotations, "--images", photos)
    folder = build(tmp_path, "vqav2", *paths)
    assert lost(folder, "train") == {
        "without question": ["1001"],
        "without answer": ["2000", "2001"],
        "missing": ["3000", "3001"],
        "answered but not asked": ["3002"],
    }
    assert set(read(folder, "train")) == {"1000", "1002", "2002"}


# GQA


def gqa_question(image, answer=None, structural="query"):
    asked = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "apple (1)"}],
        "entailed": [],
        "equivalent": [],
        "question": f"What is in {image}?",
        "imageId": image,
        "isBalanced": True,
        "types": {"detailed": "x", "semantic": "obj", "structural": structural},
    }
    return asked | ({} if answer is None else {"answer": answer, "fullAnswer": f"It is {answer}."})


def test_gqa_has_one_answer_and_structural_types(tmp_path):
    train = tmp_path / "train_all_questions"
    train.mkdir()
    write_json(train / "train_all_questions_0.json", {"02930152": gqa_question("n16", "apple")})
    write_json(
        train / "train_all_questions_1.json", {"07333408": gqa_question("235", "yes", "verify")}
    )
    test = write_json(tmp_path / "test.json.gz", {"1": gqa_question("235"), "2": {"question": "?"}})
    photos = write_files(tmp_path / "images", {"n16.jpg": jpeg(1), "235.jpg": jpeg(2)})
    paths = ("--questions", f"train={train}", f"test={test}", "--images", photos)
    assert run("gqa", "--name", "mine", "--out", tmp_path / "out", *paths) == 2  # no imageId
    write_json(test, {"1": gqa_question("235"), "2": gqa_question("999")})
    folder = build(tmp_path, "gqa", *paths)
    source = open_source(str(folder), "train", image_size=8)
    assert source.class_names == ["query", "verify"]
    found = {e["id"]: (e["image"], e["question"], e["captions"], e["label"]) for e in source}
    assert found == {
        "02930152": (jpeg(1), "What is in n16?", ["apple"], 0),
        "07333408": (jpeg(2), "What is in 235?", ["yes"], 1),
    }
    assert {key: e["captions"] for key, e in read(folder, "test").items()} == {"1": []}
    assert lost(folder, "test") == {"missing": ["2"]}


# NLVR2


def test_nlvr2_is_two_images_side_by_side(tmp_path):
    lines = [
        {
            "sentence": f"The left image shows {k} dogs.",
            "identifier": f"dev-85{k}-0-0",
            "label": label,
            "left_url": "https://example.org/l.jpg",
            "right_url": "https://example.org/r.jpg",
            "synset": "dog",
            "writer": 1,
        }
        for k, label in enumerate(("True", "False", "True", "True", None))
    ]
    path = tmp_path / "dev.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    photos = {}
    for k in range(5):
        photos[f"dev/dev-85{k}-0-img0.png"] = jpeg(2 * k, kind="PNG", size=16)
        photos[f"dev/dev-85{k}-0-img1.png"] = jpeg(2 * k + 1, kind="PNG", size=24)
    del photos["dev/dev-852-0-img1.png"]
    photos["dev/dev-853-0-img0.png"] = b"not an image"
    paths = ("--questions", f"dev={path}", "--images", write_files(tmp_path / "p.zip", photos))
    folder = build(tmp_path, "nlvr2", *paths)
    examples = read(folder, "dev")
    assert {key: e["captions"] for key, e in examples.items()} == {
        "dev-850-0-0": ["true"],
        "dev-851-0-0": ["false"],
    }
    assert examples["dev-851-0-0"]["question"] == "The left image shows 1 dogs."
    pixels = images.decode(examples["dev-851-0-0"]["image"]).astype(int)
    assert pixels.shape == (16, 32, 3)
    left = images.decode(photos["dev/dev-851-0-img0.png"]).astype(int)
    assert np.abs(pixels[:, :16] - left).mean() < 10
    right = images.resize(images.decode(photos["dev/dev-851-0-img1.png"]), 16).astype(int)
    assert np.abs(pixels[:, 16:] - right).mean() < 12 < np.abs(pixels[:, 16:] - left).mean()
    assert lost(folder, "dev") == {
        "missing": ["dev-852-0-0"],
        "broken": ["dev-853-0-0"],
        "without answer": ["dev-854-0-0"],
    }


def test_two_images_of_other_shapes_have_halves_of_one_size():
    tall, wide = np.full((40, 10, 3), 255, np.uint8), np.zeros((12, 30, 3), np.uint8)

    def png(pixels):
        import cv2

        return cv2.imencode(".png", pixels)[1].tobytes()

    pixels = images.decode(side_by_side(png(tall), png(wide)))
    assert pixels.shape == (12, 20, 3)
    assert pixels[:, :9].min() > 240 and pixels[:, 11:].max() < 15


# Mistakes


def test_an_ambiguous_base_name_matches_no_file(tmp_path):
    files = open_files(
        write_files(tmp_path / "p", {"a/1.jpg": b"1", "b/1.jpg": b"2", "2.jpg": b"3"})
    )
    finder = Finder([files])
    assert finder.read("b/1.jpg") == b"2" and finder.read("elsewhere/2.jpg") == b"3"
    with pytest.raises(FileNotFoundError):
        finder.read("1.jpg")


MISTAKES = [
    ("karpathy --annotations list.json --images photos", "no list 'images' in it (found: list)"),
    ("karpathy --annotations boxes.json --images photos", "lacks split or filename or sentences"),
    ("karpathy --annotations empty.json --images photos", "lists no image"),
    ("vqav2 --questions empty.json --images photos", "no list 'questions' in it (found: images)"),
    ("vqav2 --questions asked.json --images photos", "lacks question_id or image_id or question"),
    ("vqav2 --questions good.json --annotations boxes.json --images photos", "'annotations'"),
    ("vqav2 --questions good.json --annotations v=a.json --images photos", "none for split 'v'"),
    ("vqav2 --questions good.json --images val=photos", "--images: none for split 'train'"),
    ("vqav2 --questions good.json --annotations null.json --images photos", "lacks answer"),
    ("gqa --questions list.json --images photos", "no object of questions by id; is it one of GQA"),
    ("gqa --questions boxes.json --images photos", "lacks imageId or question"),
    ("nlvr2 --questions text.json --images photos", "text.json: is not JSON"),
    ("nlvr2 --questions list.json --images photos", "an entry of 'lines' lacks identifier"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_mistakes_are_reported_in_one_line(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "photos", {"1.jpg": jpeg(1)})
    contents = {
        "list": [1],
        "boxes": {"images": [{"bbox": []}]},
        "empty": {"images": []},
        "asked": {"questions": [{"question": "?"}]},
        "null": {"annotations": [{"question_id": 1, "answers": None}]},
        "good": {"questions": [{"question": "?", "question_id": 1, "image_id": 1}]},
    }
    for name, content in contents.items():
        write_json(tmp_path / f"{name}.json", content)
    (tmp_path / "text.json").write_text("no json")
    name, *arguments = command.split()
    assert run(name, "--name", "mine", "--out", "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
