"""The formats of RefCOCO and Visual Genome: regions with boxes in pixels."""

import numpy as np
import pytest

from cap_pretrain.commands import train_tokenizer
from cap_pretrain.data.sources.open import open_source
from tests.data.test_question_formats import build, lost, write_json
from tests.tools.test_build_dataset import jpeg, report, run, write_captions, write_files

NAMES = {k: f"COCO_train2014_{k:012d}.jpg" for k in range(1, 6)}


def ref(image, ann, split, *sentences):
    return {
        "ref_id": 10 * ann,
        "image_id": image,
        "ann_id": ann,
        "split": split,
        "sentences": [{"sent": s, "raw": s.upper(), "tokens": s.split()} for s in sentences],
    }


def annotation(number, image, *bbox):
    return {"id": number, "image_id": image, "bbox": list(bbox), "category_id": 1}


@pytest.fixture
def refcoco(tmp_path):
    """Five images; one is missing, one has only boxes that cannot be used, two have captions."""
    refs = [
        ref(1, 11, "train", "left dog", " the big dog "),
        ref(1, 12, "train", "cat"),
        ref(1, 13, "train", "beyond the image"),
        ref(2, 21, "val", "tree"),
        ref(2, 22, "val", "", "cut off"),
        ref(3, 31, "train", "upside down"),
        ref(4, 41, "train", "no file"),
        ref(5, 51, "testA", "man", "person"),
        ref(9, 91, "train", "not listed"),
    ]
    sizes = dict(width=200, height=100)
    instances = {
        "images": [{"id": k, "file_name": name, **sizes} for k, name in NAMES.items()],
        "annotations": [
            annotation(11, 1, 20, 10, 100, 50),
            annotation(12, 1, 0, 0, 200.0, 100),
            annotation(13, 1, 200, 0, 20, 30),
            annotation(21, 2, 50, 50, 50, 50),
            annotation(22, 2, 150, -50, 100, 100),
            annotation(31, 3, 50, 50, -20, 20),
            annotation(41, 4, 1, 1, 2, 2),
            annotation(51, 5, 100, 0, 50, 100),
        ],
    }
    captions = write_captions(
        tmp_path / "captions_train2014.json",
        {k: NAMES[k] for k in (1, 5)},
        [(1, "A dog and a cat."), (1, "Two animals."), (5, "A man.")],
    )
    files = {f"train2014/{NAMES[k]}": jpeg(k) for k in (1, 2, 3, 5)}
    return (
        *("--refs", write_json(tmp_path / "refs.json.gz", refs)),
        *("--instances", write_json(tmp_path / "instances.json", instances)),
        *("--images", write_files(tmp_path / "train2014.zip", files), "--captions", captions),
    )


@pytest.fixture
def visual_genome(tmp_path):
    """Three images in two folders; one of them is not in image_data.json."""
    region = {"region_id": 1, "image_id": 1, "x": 80, "y": 60, "width": 40, "height": 30}
    images = [
        {
            "id": 1,
            "regions": [region | {"phrase": "a clock"}, region | {"phrase": "sky", "x": -40}],
        },
        {"id": 2, "regions": [region | {"phrase": "a man"}, region | {"phrase": "b", "width": 0}]},
        {"id": 3, "regions": [region | {"phrase": "a tree"}]},
    ]
    sizes = [{"image_id": k, "width": 200, "height": 100, "url": ""} for k in (1, 2)]
    for k in (1, 2, 3):
        write_files(tmp_path / f"VG_100K_{1 + k % 2}", {f"{k}.jpg": jpeg(k)})
    return (
        *("--regions", write_json(tmp_path / "region_descriptions.json", images)),
        *("--image_data", write_json(tmp_path / "image_data.json", sizes)),
        *("--images", tmp_path / "VG_100K_1", tmp_path / "VG_100K_2"),
    )


def regions_of(folder, split):
    """Return the regions of the examples of a split, and their captions, by id."""
    source = open_source(str(folder), split, image_size=8)
    examples = {example["id"]: example for example in source}
    regions = {
        name: [(phrase, tuple(np.round(box, 4).tolist())) for phrase, box in example["regions"]]
        for name, example in examples.items()
    }
    return regions, {name: example["captions"] for name, example in examples.items()}


def test_refcoco_has_an_example_for_each_image(refcoco, tmp_path):
    folder = build(tmp_path, "refcoco", *refcoco)
    regions, captions = regions_of(folder, "train")
    dog, whole = (0.1, 0.1, 0.6, 0.6), (0.0, 0.0, 1.0, 1.0)
    assert regions == {"1": [("left dog", dog), ("the big dog", dog), ("cat", whole)]}
    assert captions == {"1": ["A dog and a cat.", "Two animals."]}
    cut = ("cut off", (0.75, 0.0, 1.0, 0.5))
    assert regions_of(folder, "val") == ({"2": [("tree", (0.25, 0.5, 0.5, 1.0)), cut]}, {"2": []})
    assert regions_of(folder, "testA")[0]["5"] == [
        (phrase, (0.5, 0.0, 0.75, 1.0)) for phrase in ("man", "person")
    ]
    assert lost(folder, "train") == {
        "without regions": ["3"],
        "missing": ["4"],
        "expressions of an image that is not listed": ["9"],
    }
    assert report(folder)["train"]["captions"]["dropped"] == {"box not valid": 1}


def test_visual_genome_has_all_regions_of_an_image(visual_genome, tmp_path):
    folder = build(tmp_path, "visual_genome", *visual_genome)
    regions, _ = regions_of(folder, "train")
    box = (0.4, 0.6, 0.6, 0.9)
    assert regions == {"1": [("a clock", box)], "2": [("a man", box)]}
    assert lost(folder, "train") == {"not in image_data.json": ["3"]}
    assert report(folder)["train"]["captions"]["dropped"] == {"box not valid": 2}
    words = ["--kind=words", "--min_count=1", f"--out={tmp_path / 'words'}"]
    assert train_tokenizer.main([f"--data={folder}", *words]) == 0
    assert "clock" in (tmp_path / "words" / "words.tsv").read_text()


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--refs", {"expressions": []}, "no list 'refs' in it"),
        ("--refs", [], "lists no expression"),
        ("--refs", [{"image_id": 1}], "lacks image_id or ann_id or split or sentences"),
        ("--refs", [ref(1, 11, "train", "a") | {"sentences": {}}], "'sentences' must be list"),
        ("--refs", [ref(1, 11, 3, "a")], "'split' must be str"),
        ("--refs", [ref([1], 11, "train", "a")], "'id' must be"),
        ("--instances", {"images": [], "annotations": {}}, "no list 'annotations'"),
        (
            "--instances",
            {"images": [{"id": 1, "file_name": "a", "width": 0, "height": 3}], "annotations": []},
            "'width' must be from 1 to",
        ),
        (
            "--instances",
            {"images": [{"id": 1, "file_name": "a", "width": float("nan"), "height": 3}]},
            "'width' must be from 1 to",
        ),
        ("--instances", {"images": [], "annotations": [7]}, "lacks id or image_id"),
    ],
)
def test_refcoco_of_another_form_is_refused(flag, content, message, refcoco, tmp_path, capsys):
    write_json(tmp_path / f"{flag.strip('-')}.json.gz", content)
    arguments = list(refcoco)
    arguments[arguments.index(flag) + 1] = tmp_path / f"{flag.strip('-')}.json.gz"
    assert run("refcoco", "--name", "x", "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--regions", {"id": 1}, "'content' must be list"),
        ("--regions", [{"id": 1, "regions": 3}], "'regions' must be list"),
        ("--regions", [{"id": 1, "regions": [{"phrase": "a"}]}], "lacks phrase or x"),
        ("--image_data", [{"image_id": 1, "width": "3", "height": 2}], "'width' must be int"),
        ("--image_data", [1], "lacks image_id"),
    ],
)
def test_visual_genome_of_another_form_is_refused(
    flag, content, message, visual_genome, tmp_path, capsys
):
    arguments = list(visual_genome)
    write_json(arguments[arguments.index(flag) + 1], content)
    assert run("visual_genome", "--name", "x", "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
