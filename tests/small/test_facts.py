"""Tests of measuring a dataset and finding the devices."""

import json
from pathlib import Path

import jax
import pytest

from cap_pretrain import inputs
from cap_pretrain.errors import UserError
from cap_pretrain.small import config, facts
from cap_pretrain.telemetry import console
from tests.tools.test_build_dataset import jpeg, run, write_captions, write_files


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Return the folder of 40 images of 24 to 32 pixels with two captions each, one split."""
    root = tmp_path_factory.mktemp("small")
    names = {n: f"{n}.jpg" for n in range(40)}
    texts = [(n, f"{word} {n % 4} on the left") for n in names for word in ("jpeg", "picture")]
    photos = write_files(
        root / "photos", {f: jpeg(n, size=24 + 8 * (n % 2)) for n, f in names.items()}
    )
    table = write_captions(root / "captions.json", names, texts)
    flags = ("--annotations", table, "--images", photos)
    assert run("captions_json", "--name", "mine", "--out", root / "built", *flags) == 0
    return root / "built" / "mine"


def test_facts_of_a_dataset(dataset):
    found = facts.measure(str(dataset))
    assert (found.images, found.held_out, found.captions) == (36, 4, 2.0)
    assert found.words == 36 * 2 * 5 and found.sided == 1.0
    assert found.side in (24, 28, 32) and 5 <= found.tokens <= 20
    assert found == facts.measure(str(dataset))
    both = facts.measure(f"{dataset}+{dataset}:0.5")
    assert (both.images, both.held_out) == (76, 4)  # only of the first


def test_the_run_holds_out_as_many_as_the_facts_say(dataset, capsys):
    with console.used():
        c = config.get_config(f"data={dataset},devices=cpu-2")
    found = facts.measure(str(dataset))
    assert len(inputs.open_data(c, "train")) == found.images
    assert len(inputs.open_data(c, "val")) == found.held_out
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"Settings for {dataset} on cpu-2:" and len(printed) > 6
    again = config.get_config(f"data={dataset},devices=cpu-2")
    assert json.dumps(c.to_dict()) == json.dumps(again.to_dict())


def test_devices_are_named_or_found_without_starting_any(monkeypatch):
    assert str(facts.devices_of("gpu-3")) == "gpu-3" and facts.devices_of("gpu-3").parts == 3
    assert facts.devices_of("cpu-16").parts == 1
    for wrong in ("gpu", "cpu-0", "npu-1", "cpu-2-2", ""):
        with pytest.raises(UserError, match="devices="):
            facts.devices_of(wrong)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert str(facts.devices_of("auto")) == "cpu-6"
    monkeypatch.setattr("cap_pretrain.distributed.gpu.will_be_used", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert str(facts.devices_of("auto")) == "gpu-2"


def test_tpus_are_found(monkeypatch):
    monkeypatch.setattr(type(jax.config), "values", {"jax_platforms": None})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr("cap_pretrain.distributed.gpu.will_be_used", lambda: False)
    monkeypatch.setattr(
        Path, "glob", lambda self, pattern: iter("0123" if "vfio" in str(self) else "")
    )
    assert str(facts.devices_of("auto")) == "tpu-4"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert facts.devices_of("auto").kind == "cpu"


def test_a_dataset_without_captions_is_refused(tmp_path):
    files = {f"{kind}/{n}.jpg": jpeg(n) for n in range(2) for kind in "ab"}
    images = write_files(tmp_path / "photos", files)
    assert run("image_folder", "--name", "classes", "--out", tmp_path, "--images", images) == 0
    with pytest.raises(UserError, match="has no captions"):
        facts.measure(str(tmp_path / "classes"))
