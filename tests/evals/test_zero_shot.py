"""Zero-shot classification: ensembles and captioners' rules against NumPy, ties, files."""

import json

import jax
import numpy as np
import pytest

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.errors import UserError
from cap_pretrain.evals import zero_shot
from cap_pretrain.evals.inference.classes import ensemble
from cap_pretrain.evals.zero_shot import ZeroShot
from tests import tiny
from tests.evals import stubs

CLASSES = [str(k) for k in range(10)]


def measured(learner, labels, names=CLASSES, broken=(), **options):
    pictures = stubs.Pictures(labels=labels, classes=names, broken=broken)
    context, variables = stubs.context(learner, pictures)
    return ZeroShot(context, ZeroShot.Options(**options))(variables)


@pytest.fixture
def templates(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("{}\n\n{} 3\n")
    return str(path)


def test_an_oracle_is_always_right_and_a_constant_guesses(templates):
    labels = list(range(10))
    assert measured(stubs.Oracle, labels, templates=templates, batch_size=3).metrics == {
        "top1": 1.0,
        "top5": 1.0,
        "mean_per_class": 1.0,
    }
    assert measured(stubs.Constant, labels, templates=templates).metrics == pytest.approx(
        {"top1": 0.1, "top5": 0.5, "mean_per_class": 0.1}
    )
    assert set(measured(stubs.Diverged, labels, templates=templates).metrics.values()) == {0.0}


def test_the_mean_per_class_counts_classes_and_top1_images(templates):
    # The oracle names the image: wrong for images 1 and 2, of class 0.
    result = measured(stubs.Oracle, [0, 0, 0, 3, 4], templates=templates)
    assert result.metrics["top1"] == pytest.approx(3 / 5 + 2 / 5 * 0)
    assert result.metrics["mean_per_class"] == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert result.details["images"] == 5


def test_broken_images_and_those_without_label_do_not_count(templates):
    result = measured(stubs.Oracle, [0, 0, 2, -1, 4], broken=[1], templates=templates, batch_size=2)
    assert result.details["images"] == 3 and result.metrics["top1"] == 1.0


def test_a_limit_takes_images_of_all_classes(templates):
    pictures = stubs.Pictures(labels=[0] * 16 + [1] * 16, classes=CLASSES)
    context, variables = stubs.context(stubs.Constant, pictures)
    whole = ZeroShot(context, ZeroShot.Options(templates=templates))
    part = ZeroShot(context, ZeroShot.Options(templates=templates, limit=8))
    assert whole(variables).details["images"] == 32 and part(variables).details["images"] == 8
    read = [part._source[i]["label"] for i in range(8)]
    assert set(read) == {0, 1}


def accuracy(scores, label):
    """Return top-1 and top-5 of scores [n, K] without ties."""
    order = np.argsort(-scores, axis=1)
    return [(order[:, :k] == label[:, None]).any(1).mean() for k in (1, 5)]


@pytest.fixture(scope="module", params=["captioner", "dual_encoder"])
def small(request, tokenizer_path):
    return request.param, *stubs.small(request.param, tokenizer_path)


def test_metrics_are_those_of_numpy_whatever_the_batch_size(small):
    kind, context, variables = small
    split = (context.graphdef, *variables)
    source = context.source()
    images = np.stack([source[i]["image"] for i in range(13)])
    label = np.array([source[i]["label"] for i in range(13)])
    encode = context.tokenizer.encode
    tokens = np.stack(
        [
            [encode(template.replace("{}", name)) for template in source.class_templates]
            for name in source.class_captions
        ]
    )  # [K, templates, T]
    flat = tokens.reshape(-1, tokens.shape[-1])
    if kind == "dual_encoder":
        embed = tiny.jitted(split, lambda x, i, t: (x.embed_images(i), x.embed_text(t)))
        i, t = jax.device_get(embed(images, flat))
        classes = t.reshape(*tokens.shape[:2], -1).mean(1)
        scores = {"": i @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T}
    else:
        score = tiny.jitted(split, lambda x, i, t: x.score(i, t))
        blank = np.full((1, *images.shape[1:]), 128, np.uint8)
        every = np.broadcast_to(flat, (14, *flat.shape))
        every = np.asarray(score(np.concatenate([images, blank]), every))
        found, prior = every[:13], every[13]
        rules = {"": found, "_over_prior": found - prior, "_per_token": found / (flat > 0).sum(1)}
        scores = {s: x.reshape(13, *tokens.shape[:2]).mean(2) for s, x in rules.items()}
    results = [
        ZeroShot(context, ZeroShot.Options(batch_size=size, pairs=pairs))(variables)
        for size, pairs in ((4, 16), (13, 1000))
    ]
    assert results[0].metrics == results[1].metrics
    metrics = results[0].metrics
    assert len(metrics) == 3 * len(scores)
    for suffix, expected in scores.items():
        top = [metrics[f"top{k}{suffix}"] for k in (1, 5)]
        np.testing.assert_allclose(top, accuracy(expected, label))
    assert results[0].details["classes"][0] == "a circle"


def test_an_ensemble_is_the_unit_vector_along_the_mean():
    vectors = np.array([[[1, 0], [0, 1]], [[0.6, 0.8], [0.6, 0.8]]], np.float32)
    expected = [[0.5**0.5, 0.5**0.5], [0.6, 0.8]]
    np.testing.assert_allclose(ensemble(vectors), expected, rtol=1e-6)


def test_names_and_templates_come_from_files(tmp_path):
    plain = stubs.Pictures(labels=[0], classes=["n01", "n02"])
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["tench", "English springer"]))
    lines = tmp_path / "templates.txt"
    lines.write_text("une photo de {}\n")
    found = zero_shot.prompts(plain, str(names), str(lines))
    assert found == (("tench", "English springer"), ("une photo de {}",))
    assert zero_shot.prompts(plain, "", "") == (("n01", "n02"), zero_shot.TEMPLATES)
    scenes = Scenes("val", 16, label="colour")
    classes, templates = zero_shot.prompts(scenes, "", "")
    assert classes[0] == "a red shape" and classes[5] == "an orange shape" and "{}" in templates


def test_mistakes_are_the_users(tmp_path, templates):
    plain = stubs.Pictures(labels=[0], classes=["n01", "n02"])
    file = tmp_path / "file.json"
    for content, told in (
        ('["one"]', "has 1 names, but pictures has 2 classes"),
        ('{"a": 1}', "not a JSON list"),
        ("[", "cannot read"),
        ("[]", "is empty"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=told):
            zero_shot.prompts(plain, str(file), "")
    file.write_text('["a photo"]')
    with pytest.raises(UserError, match="'a photo'; put {} where"):
        zero_shot.prompts(plain, "", str(file))
    with pytest.raises(UserError, match="cannot read .*nowhere"):
        zero_shot.prompts(plain, str(tmp_path / "nowhere"), "")
    file.write_text('["1", "2"]')
    with pytest.raises(UserError, match="has the label 2, but there are 2 names"):
        measured(stubs.Oracle, [0, 1, 2], names=[], classes=str(file), templates=templates)
    with pytest.raises(UserError, match="has no class names"):
        zero_shot.prompts(stubs.Pictures(labels=[0]), "", "")
    numbers = stubs.Pictures(labels=[0], classes=["n01440764", "n02102040"])
    with pytest.raises(
        UserError, match="are WordNet ids such as n01440764; give their names in words"
    ):
        zero_shot.prompts(numbers, "", "")


def test_classes_with_the_same_tokens_are_counted_and_told(templates):
    long = "1 2 3 4 5 6 7"  # the tokenizer keeps seven numbers
    names = [f"{long} 8", f"{long} 9", "3", "3", "4"]
    result = measured(stubs.Constant, [0, 1, 2, 3, 4], names=names, templates=templates)
    assert result.details["tied_classes"] == 4
    assert result.lines == (
        f"4 classes tie, since others have the same tokens, such as '{long} 8 (0)' and "
        f"'{long} 9 (1)'; text.length is 7",
    )
    apart = measured(stubs.Constant, [0, 1], names=["1", "2"], templates=templates)
    assert apart.details["tied_classes"] == 0 and not apart.lines


def test_lists_are_read_as_people_and_their_editors_write_them(tmp_path):
    expected = ["tench", "English springer", "a\u200bb", "chain saw"]
    text = "tench\nEnglish  springer\n\na\u200bb\nchain\u2028saw\n"
    for ending in ("\n", "\r\n", "\r"):
        for mark in (b"", b"\xef\xbb\xbf"):
            path = tmp_path / "names.txt"
            path.write_bytes(mark + text.replace("\n", ending).encode())
            assert zero_shot.read_list("classes", str(path)) == expected
            path = tmp_path / "names.json"
            names = ["tench", f"English{ending}springer", "a\u200bb", "chain saw "]
            path.write_bytes(mark + json.dumps(names).encode())
            assert zero_shot.read_list("classes", str(path)) == expected


@pytest.mark.parametrize(
    "content", [b"caf\xe9", b'["\\ud800"]', b"[" * 10**5, b'["a", " "]', b'["a", 1]', b"\xff\xfe["]
)
def test_lists_that_cannot_be_used_are_refused(content, tmp_path):
    path = tmp_path / "names.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="zero_shot.classes: ") as error:
        zero_shot.read_list("classes", str(path))
    assert len(str(error.value).splitlines()) == 1
