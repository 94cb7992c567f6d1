"""Tests of tools/export_encoder.py: transformers computes the same, `open_encoder` reads it."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cap_pretrain import config as configs
from cap_pretrain import rules
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.commands import export_encoder
from cap_pretrain.convert import open_encoder
from cap_pretrain.convert.export import form
from cap_pretrain.convert.layouts import card, hub
from cap_pretrain.convert.layouts.base import vit_form
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer
from cap_pretrain.errors import UserError
from cap_pretrain.training.step import TrainState
from tests import tiny
from tests.models.test_positions import MODERN
from tests.parity import require

torch, transformers = require("torch"), require("transformers")

pytestmark = pytest.mark.parity


def make_run(workdir, tokenizer_path, learner="captioner", options=None, steps=(5,), **fields):
    """Write a run whose (averaged) parameters differ between checkpoints.

    `fields` are fields of the model section, `optim__ema` or `data__layout`. Return the config and
    the split learner with the parameters to be exported.
    """
    ema, layout = fields.pop("optim__ema", 0.0), fields.pop("data__layout", "square")
    c = tiny.config(learner, options, **fields)
    c.optim.ema, c.data.layout = ema, layout
    vocabulary = SentencePieceTokenizer(tokenizer_path, c.text.length).vocab_size
    graphdef, params, stats = tiny.split(c, vocab=vocabulary)
    checkpoints = Checkpoints(workdir, c)
    for step in steps:
        trained, averaged = (
            jax.tree.map(lambda p, n=n: p + np.float32(0.01 * n), params)
            for n in (step, step + 0.5 if ema else 0)
        )
        state = TrainState(
            step=jax.numpy.int32(step),
            params=trained,
            stats=stats,
            opt_state={"moment": jax.numpy.zeros(2)},
            counts={},
            ema=averaged if ema else None,
        )
        checkpoints.save(state)
    checkpoints.close()
    (workdir / "config.json").write_text(configs.to_json(c))
    (workdir / "tokenizer").mkdir()
    (workdir / "tokenizer" / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return c, (graphdef, state.variables[0], stats)


@pytest.fixture(scope="module")
def run(tokenizer_path, tmp_path_factory):
    """Return the workdir of a captioner, its config and its split learner."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, *make_run(workdir, tokenizer_path)


def export(workdir, out, *arguments):
    return export_encoder.main(["--checkpoint", str(workdir), "--out", str(out), *arguments])


def loaded(cls, folder):
    """Load a model with transformers and check that no weight is missing or unused."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("pool", ["gap", "map"])
def test_transformers_computes_the_same_and_the_folder_can_be_read(
    pool, run, tokenizer_path, tmp_path
):
    workdir, c, split = run
    if pool == "map":
        workdir = tmp_path / "run"
        c, split = make_run(workdir, tokenizer_path, pool="map")
    assert export(workdir, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "siglip").exists()
    model = loaded(transformers.SiglipVisionModel, tmp_path / "out")
    assert model.config.vision_use_head == (pool == "map")
    assert type(loaded(transformers.AutoModel, tmp_path / "out")) is type(model)

    images = tiny.images(4)
    ours = tiny.jitted(split, lambda learner, images: learner.encode(images))(images)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    out = model(**processor(images=list(images), return_tensors="pt"))
    np.testing.assert_allclose(out.last_hidden_state, ours.tokens, atol=1e-4)
    if pool == "map":
        np.testing.assert_allclose(out.pooler_output, ours.pooled, atol=1e-4)

    back = open_encoder(tmp_path / "out")
    assert (back.image_size, back.mean, back.std) == (tiny.SIDE, (0.5,) * 3, (0.5,) * 3)
    encoder = rules.flatten(split[1]["encoder"])
    for path, array in rules.flatten(back.params).items():
        assert array.tobytes() == np.asarray(encoder.pop(path)).tobytes(), path
    assert not encoder
    config = tiny.config(**back.model)
    assert config.model.to_dict() == c.model.to_dict() | {"name": "B/4", "decoder_depth": 2}


@pytest.mark.parametrize(
    ("contrast", "head", "pool"),
    [
        ("sigmoid", "linear", "gap"),
        pytest.param("softmax", "none", "gap", marks=pytest.mark.slow),
        pytest.param("softmax", "map", "map", marks=pytest.mark.slow),
    ],
)
def test_a_dual_encoder_gives_the_same_logits(contrast, head, pool, tokenizer_path, tmp_path):
    options = {"contrast": contrast, "head": head}
    c, split = make_run(tmp_path / "run", tokenizer_path, "dual_encoder", options, pool=pool)
    assert export(tmp_path / "run", tmp_path / "out") == 0
    folder = tmp_path / "out" / "siglip"
    texts = ["A red star.", "two circles; one blue", "a green ring " * 5, ""]
    images = tiny.images(3)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(
        images=list(images),
        text=texts,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    tokenizer = SentencePieceTokenizer(tokenizer_path, c.text.length)
    ids = np.stack([tokenizer.encode(text) for text in texts])
    np.testing.assert_array_equal(inputs["input_ids"], ids)

    def logits(learner, images, ids):
        return learner.logits(learner.embed_images(images), learner.embed_text(ids))

    out = loaded(transformers.SiglipModel, folder)(**inputs)
    ours = tiny.jitted(split, logits)(images, ids)
    np.testing.assert_allclose(out.logits_per_image, ours, atol=1e-4)
    # The encoder's own folder holds the same encoder without the projection.
    plain = loaded(transformers.SiglipVisionModel, tmp_path / "out")
    tokens = plain(inputs["pixel_values"]).last_hidden_state
    torch.testing.assert_close(out.vision_model_output.last_hidden_state, tokens)


def test_a_projection_after_a_map_head_is_not_exported_and_reported(
    tokenizer_path, tmp_path, capsys
):
    make_run(tmp_path / "run", tokenizer_path, "dual_encoder", pool="map")
    assert export(tmp_path / "run", tmp_path / "out") == 0
    message = "the projection of a vector pooled by model.pool=map cannot be expressed"
    assert message in capsys.readouterr().out
    assert message in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "config.json", "image_processing_cap.py", "model.safetensors"),
        "preprocessor_config.json",
    ]


def test_averaged_parameters_of_the_newest_valid_checkpoint(tokenizer_path, tmp_path, capsys):
    _, (_, newest, _) = make_run(tmp_path / "run", tokenizer_path, steps=(5, 6), optim__ema=0.9)
    checkpoints = tmp_path / "run" / "checkpoints"

    def scale(*arguments):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert export(tmp_path / "run", out, *arguments) == 0
        return open_encoder(out).params["norm"]["scale"]

    newest = np.asarray(newest["encoder"]["norm"]["scale"])
    assert scale().tobytes() == newest.tobytes()
    assert "averaged parameters" in capsys.readouterr().out
    np.testing.assert_allclose(scale("--step", "5"), newest - 0.01, atol=1e-6)
    (checkpoints / "6" / "manifest" / "metadata").write_text("{}")
    np.testing.assert_allclose(scale(), newest - 0.01, atol=1e-6)
    assert f"{checkpoints / '6'}: is corrupt" in capsys.readouterr().err

    for arguments, message in (
        (["--step", "7"], "has no checkpoint of step 7; there are 5, 6."),
        (["--step", "6"], "every requested checkpoint is corrupt"),
    ):
        assert export(tmp_path / "run", tmp_path / "no", *arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_the_folder_is_written_completely_or_not_at_all(run, tmp_path, capsys, monkeypatch):
    workdir, *_ = run
    with monkeypatch.context() as patch:

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device", "README.md")

        patch.setattr(card, "write_card", full)
        assert export(workdir, tmp_path / "out") == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == []
    assert export(workdir, tmp_path / "out") == 0
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert export(workdir, tmp_path / "out") == 2
    assert "already exists; name another" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    assert export(tmp_path / "nothing", tmp_path / "other") == 2


@pytest.mark.parametrize(
    "fields", [{"class_token": True}, {"pre_norm": True}, {"final_norm": "pooled"}]
)
def test_an_encoder_that_siglip_lacks_is_refused(fields):
    with pytest.raises(UserError, match="is not a SiglipVisionModel, and cannot be exported"):
        form(tiny.config(**fields))


@pytest.mark.parametrize("field", sorted(MODERN.keys() - {"activation"}))
def test_blocks_that_no_layout_has_are_refused(field):
    for library in ("transformers", "timm", "open_clip"):
        with pytest.raises(UserError, match=f"model.{field}: .* cannot be exported for {library}"):
            vit_form(tiny.config(**{field: MODERN[field]}), library)


def test_the_card_has_config_and_metrics_but_no_paths(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    c = json.loads(path.read_text())
    c["data"]["name"] = "/home/somebody/flickr8k:0.5+~/data/my_data:0.5"
    c["data"]["dir"] = c["text"]["tokenizer"] = "/home/somebody/tokenizer.model"
    c["optim"]["lr_rules"] = [["encoder/blocks/.*", 0.5]]
    del c["model"]["class_token"]  # like a run from before the field existed
    path.write_text(json.dumps(c))
    for step in (4, 5):
        result = {
            "step": step,
            "protocol": "R@1/5/10 of /mnt/x/pairs.json",
            "dataset": "/home/somebody/flickr8k",
            "split": "test",
            "recall": 0.25 * step / 4,
            "images": 1000,
            "samples": ["a dog"],
        }
        folder = tmp_path / "run" / "evals" / "retrieval"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{step}.json").write_text(json.dumps(result))
    lines = [
        {"step": 3, "train/loss": 9.0, "time/images_per_s": 1234.4},
        {"step": 5, "train/loss": 1.25},
        {"step": 6, "train/loss": 7.0},  # of a later start
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    assert export(tmp_path / "run", tmp_path / "out", "--licence=apache-2.0") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "up to step 5: training loss 1.25, images per second 1,234." in text
    assert text.startswith("---\nlibrary_name: transformers\n") and "license: apache-2.0" in text
    row = "| `retrieval` | flickr8k test | recall 0.3125 | images 1,000 | R@1/5/10 of pairs.json |"
    assert row in text
    assert '"name": "flickr8k:0.5+my_data:0.5"' in text and '"tokenizer.model"' in text
    assert "encoder/blocks/.*" in text and '"parallel_fraction": 0.0' in text
    for word in ("somebody", "/mnt", "~", str(tmp_path)):
        assert word not in text


class Hub:
    """Plays huggingface_hub.HfApi; keeps what it is asked."""

    CALLS: list = []

    def create_repo(self, repo, **options):
        self.CALLS.append((repo, options))
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        names = [name for name, _ in hub.listing(folder_path)]
        card = (folder_path / "README.md").read_text()
        self.CALLS.append((repo_id, names, "TODO: the licence of the weights." in card))


@pytest.fixture
def hub_calls(monkeypatch):
    """Put `Hub` in the place of the hub, and return its calls."""
    monkeypatch.setattr(Hub, "CALLS", [])
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub.CALLS


def test_a_dry_run_lists_what_the_upload_takes(run, hub_calls, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    arguments = ["--checkpoint", str(run[0]), "--layout=timm", "--to=hub", "--repo=me/vit"]
    assert export_encoder.main([*arguments, "--dry_run"]) == 0
    assert not hub_calls
    head, *lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines]
    assert head.startswith("would upload to the hub as me/vit: 3 files, ")
    assert export_encoder.main(arguments) == 0
    ((repo, options), (again, uploaded, noted)) = hub_calls
    assert repo == again == "me/vit" and options["private"] and uploaded == listed and noted
    out, err = capsys.readouterr()
    assert "uploaded 3 files to https://hub/me/vit" in out and "hf_secret" not in out + err
    # Without the hub it lists what would be written, and writes nothing.
    to = ["--checkpoint", str(run[0]), "--out", str(tmp_path / "out"), "--dry_run"]
    assert export_encoder.main(to) == 0
    assert "would write" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_hub_out_of_reach_is_one_line_without_the_token(monkeypatch, tmp_path):
    class OutOfReachError(Exception):  # of the HTTP client, as httpx.ConnectError
        pass

    def create_repo(*_, **__):
        raise OutOfReachError("request abc\nname resolution failed for hf_secret")

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(create_repo=create_repo))
    with pytest.raises(UserError) as raised:
        hub.upload(tmp_path, "me/vit")
    assert str(raised.value) == (
        "--repo: the hub did not take the files for 'me/vit': name resolution failed for …"
    )


def test_nothing_is_sent_without_a_token_and_a_name(run, hub_calls, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for arguments, message in (
        (["--to=hub"], "--repo: --to hub and --repo OWNER/NAME go together"),
        (["--to=hub", "--repo=a b"], "--repo: 'a b' is not a name on the hub"),
        (["--to=hub", "--repo=me/vit"], "--to: the hub needs a token with write access"),
        ([], "--out: is missing"),
    ):
        assert export_encoder.main(["--checkpoint", str(run[0]), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not hub_calls
