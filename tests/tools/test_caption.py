"""Tests of tools/caption.py: every file gets one line with its caption or an error."""

import io
import json
from dataclasses import fields, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cap_pretrain.checkpoints.load import load_learner
from cap_pretrain.commands import caption
from cap_pretrain.data import views
from cap_pretrain.data.builders import files
from cap_pretrain.evals.inference.captioning import Caption
from cap_pretrain.models.decoding import Decoding, write_all, write_captions
from tests import toy


@pytest.fixture(scope="module")
def run(tokenizer_path, tmp_path_factory):
    """Return the workdir of a captioner whose captions differ between images."""
    workdir = tmp_path_factory.mktemp("run")
    c = toy.config(model__depth=1, text__length=8, data__image_size=16)
    toy.saved_run(c, workdir, tokenizer_path, 3)
    return workdir


GREEDY = Decoding()
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def awkward_files():
    """Return {name: (content, reason it cannot be captioned or None)} of unusual files."""
    rgb = Image.fromarray(PIXELS)
    turned = Image.Exif()
    turned[0x0112] = 6
    whole = encoded(rgb, "JPEG")
    frames = [rgb, Image.fromarray(255 - PIXELS)]
    return {
        "grey.jpg": (encoded(rgb.convert("L"), "JPEG"), None),
        "cmyk.jpg": (encoded(rgb.convert("CMYK"), "JPEG"), None),
        "16bit.png": (
            encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
            None,
        ),
        "alpha.png": (encoded(rgb.convert("RGBA"), "PNG"), None),
        "turned.jpg": (encoded(rgb, "JPEG", exif=turned), None),
        "1x1.png": (encoded(Image.new("RGB", (1, 1), "red"), "PNG"), None),
        "wide.png": (encoded(Image.new("RGB", (12_000, 10), "blue"), "PNG"), None),
        "moving.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "picture.webp": (encoded(rgb, "WEBP"), None),
        "truncated.jpg": (whole[: len(whole) // 2], "broken or truncated JPEG"),
        "text.jpg": (b"To whom it may concern", "not an image"),
        "empty.jpg": (b"", "empty file"),
    }


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """Return {path: reason it cannot be captioned or None} of the unusual files."""
    folder = tmp_path_factory.mktemp("awkward")
    paths = {}
    for name, (content, reason) in awkward_files().items():
        (folder / name).write_bytes(content)
        paths[str(folder / name)] = reason
    return paths


def expected(run, paths, how=GREEDY, question=""):
    """Return the captions of the files in `paths`."""
    config, tokenizer, graphdef, variables = load_learner(run)
    learner = nnx.merge(graphdef, *variables)
    length, eos = config.text.length, tokenizer.eos_id
    images = np.stack([views.square(Path(p).read_bytes(), 16, "none") for p in paths])
    prompt = np.zeros((len(paths), length), np.int32)
    ids = tokenizer.encode(question)[: length // 2] if question else ()
    prompt[:, : len(ids)] = ids
    given = len(ids)
    write = jax.jit(
        lambda images: write_captions(learner, images, how, length=length, eos=eos, prompt=prompt)
    )
    return [tokenizer.decode(row[given:]) for row in np.asarray(write(images))]


def test_twelve_awkward_files(run, awkward, capsys):
    assert len(awkward) == 12
    status = caption.main(["--checkpoint", str(run), "--batch_size", "5", *awkward])
    lines = capsys.readouterr().out.splitlines()
    assert status == 1
    fine = [path for path, reason in awkward.items() if not reason]
    captions = dict(zip(fine, expected(run, fine), strict=True))
    assert len(set(captions.values())) > 3
    for line, (path, reason) in zip(lines, awkward.items(), strict=True):
        if reason:
            assert line.startswith(f"{path}: not captioned: {reason}")
        else:
            assert line == f"{path}: {captions[path]}"


@pytest.mark.slow
def test_a_folder_of_images_and_a_checkpoint_by_its_path(run, awkward, capsys):
    paths = sorted(awkward)
    folder, one = Path(paths[0]).parent, next(path for path in awkward if not awkward[path])
    for given in ([str(folder), one], [*paths, one]):
        caption.main(["--checkpoint", str(run), *given])
    checkpoint = next(path for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    assert caption.main(["--checkpoint", str(checkpoint), one]) == 0
    lines = capsys.readouterr().out.splitlines()
    pictures = [path for path in paths if Path(path).suffix in files.IMAGE_SUFFIXES]
    assert [line.partition(": ")[0] for line in lines[: len(pictures) + 1]] == [*pictures, one]
    assert lines[-1] == lines[len(pictures)] == lines[-2]
    (folder.parent / "empty").mkdir(exist_ok=True)
    assert caption.main(["--checkpoint", str(run), str(folder.parent / "empty")]) == 2
    assert "no images in it" in capsys.readouterr().err


@pytest.mark.slow
def test_json_and_the_other_decodings(run, awkward, capsys):
    fine = [path for path, reason in awkward.items() if not reason]
    paths = [*fine, fine[0], f"{fine[0]}.gone"]
    how = Decoding(method="beam", beams=2, length_norm=0.5)
    options = ["--method", "beam", "--beams", "2", "--length_norm", "0.5", "--json"]
    assert caption.main(["--checkpoint", str(run), *options, *paths]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    captions = expected(run, fine, how)
    assert found[:-1] == [
        {"image": path, "caption": text}
        for path, text in zip([*fine, fine[0]], [*captions, captions[0]], strict=True)
    ]
    assert found[-1] == {"image": paths[-1], "error": "No such file or directory"}
    assert captions != expected(run, fine, replace(how, method="greedy"))

    sampled = []
    for seed, batch_size in ((0, 3), (0, 10), (1, 10)):
        options = ["--method", "sample", "--seed", str(seed), "--batch_size", str(batch_size)]
        assert caption.main(["--checkpoint", str(run), *options, *fine, fine[0]]) == 0
        sampled.append(capsys.readouterr().out.splitlines())
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0][0] != sampled[0][-1]  # the same image, sampled twice


@pytest.mark.slow
def test_a_question_is_answered(run, awkward, capsys):
    fine = [path for path, reason in awkward.items() if not reason]
    question = "Is there a red circle in it?"  # more than four tokens
    options = ["--question", question, "--batch_size", "5", "--json"]
    assert caption.main(["--checkpoint", str(run), *options, *fine]) == 0
    found = [json.loads(line)["caption"] for line in capsys.readouterr().out.splitlines()]
    assert found == expected(run, fine, question=question)
    assert found != expected(run, fine) and len(set(found)) > 1


def test_error_messages(run, tokenizer_path, tmp_path, capsys):
    def error(*arguments):
        assert caption.main([*arguments, "a.jpg"]) == 2
        captured = capsys.readouterr()
        assert not captured.out and len(captured.err.splitlines()) <= 2
        return captured.err

    assert "is not the folder of a run" in error("--checkpoint", str(tmp_path / "none"))
    assert "has no checkpoint of step 4; there are 3" in error(
        "--checkpoint", str(run), "--step", "4"
    )
    assert "no decoding method 'bean'" in error("--checkpoint", str(run), "--method", "bean")
    c = toy.config("dual_encoder", model__depth=1)
    toy.saved_run(c, tmp_path / "clip", tokenizer_path, 1)
    assert "a dual_encoder cannot write captions" in error("--checkpoint", str(tmp_path / "clip"))


def test_a_blank_answer_is_an_error(monkeypatch, run, awkward, capsys):
    fine = [path for path, reason in awkward.items() if not reason][:2]
    answers = [[Caption("", -1.0, 1)], [Caption("yes", -2.0, 2)]]
    monkeypatch.setattr(caption, "scored_captioner", lambda *_: lambda pixels: answers)
    options = ["--checkpoint", str(run), "--question", "Is it red?"]
    assert caption.main([*options, *fine]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == f"{fine[0]}: not captioned: {caption.BLANK}" and lines[1] == f"{fine[1]}: yes"
    )


def test_help_documents_every_option_of_decoding(capsys):
    with pytest.raises(SystemExit) as ended:
        caption.main(["--help"])
    assert not ended.value.code
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(Decoding):
        assert f"--{field.name} {field.name.upper()} " in shown
    assert "Default: 0.5." in shown and "nats" in shown


@pytest.mark.slow
def test_several_captions_come_with_their_scores(run, awkward, capsys):
    paths = [path for path, reason in awkward.items() if not reason][:3]
    options = ["--checkpoint", str(run), "--method", "beam", "--beams", "4", "--captions", "3"]
    assert caption.main([*options, "--json", *paths]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    config, tokenizer, graphdef, variables = load_learner(run)
    learner, how = nnx.merge(graphdef, *variables), Decoding("beam", captions=3)
    images = np.stack([views.square(Path(path).read_bytes(), 16, "none") for path in paths])
    options_of = dict(length=config.text.length, eos=tokenizer.eos_id)
    written = jax.jit(lambda images: write_all(learner, images, how, **options_of))(images)
    for row, (result, path) in enumerate(zip(found, paths, strict=True)):
        assert result["image"] == path and result["caption"] == result["captions"][0]["caption"]
        assert len(result["captions"]) == 3
        for rank, one in enumerate(result["captions"]):
            assert one["caption"] == tokenizer.decode(np.asarray(written.tokens[row, rank]))
            assert one["log_prob"] == pytest.approx(float(written.log_p[row, rank]), rel=1e-4)
            assert one["log_prob"] == pytest.approx(one["tokens"] * one["log_prob_per_token"])
    assert caption.main([*options, *paths[:1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, one in zip(lines, found[0]["captions"], strict=True):
        log_p, mean = one["log_prob"], one["log_prob_per_token"]
        text = f"{paths[0]}: {one['caption']}  (log p {log_p:.2f}, {mean:.2f} per token)"
        assert line == text
