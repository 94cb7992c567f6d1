"""The command line: exit codes, mistakes in one or two lines, plans."""

import errno
import json
import signal
import subprocess
import sys

import pytest
from absl import flags

from cap_pretrain import main
from tests import toy

QUICKSTART = f"--config={toy.CONFIGS / 'quickstart.py'}"
PRETRAIN = f"--config={toy.CONFIGS / 'pretrain.py'}"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the program in this process; returns (exit code, stdout, stderr)."""
    known = set(flags.FLAGS)

    def forget():
        """A process parses its flags once; the fields of its config become flags too."""
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        for name in ("config", "workdir", "allow_changes", "dry_run"):
            flags.FLAGS[name].unparse()

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["cap_pretrain", *map(str, args)])
        forget()
        return main.entry(), *capsys.readouterr()

    yield run
    forget()
    flags.FLAGS.mark_as_parsed()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([QUICKSTART, "--config.optm.lr=1"], """no field 'optm'. Did you mean "optim\""""),
        ([QUICKSTART, "--config.optim.rl=1"], "no field 'rl'"),
        ([QUICKSTART, "--config.image_size=64"], "'image_size'. The field is data.image_size."),
        ([QUICKSTART, "--config.learner.averge=token"], '''Did you mean "average"'''),
        ([QUICKSTART, "--config.evals.val.limt=1"], '''Did you mean "limit"'''),
        ([QUICKSTART, "--config.total_steps=many"], "--config.total_steps=many: invalid"),
        (
            [QUICKSTART, "--config.optim.lr_rules=('a',)", "--config.data.scenes.length_train=200"],
            "optim.lr_rules: 'a' is not a pair",
        ),
        ([QUICKSTART, "--dryrun"], "--dryrun: there is no such flag. Did you mean 'dry_run'?"),
        ([QUICKSTART, "config.seed=1"], "'config.seed=1' is not a flag"),
        ([QUICKSTART + ":data=coco"], "takes 0 positional arguments"),
        ([PRETRAIN + ":objective=capa"], "objective='capa' is unknown. Did you mean 'cappa'?"),
        ([PRETRAIN + ":objectiv=cap"], "no argument 'objectiv' in 'objectiv=cap'. Did you mean"),
        ([PRETRAIN + ":model=X/16"], "model.name: no size 'X'"),
        ([PRETRAIN + ":data=no_such_data"], "no_such_data"),
        ([PRETRAIN + ":data=/no/such/folder"], "/no/such/folder"),
        ([PRETRAIN, "--config.data.split=tset"], "no split 'tset'. Did you mean 'test'?"),
        ([PRETRAIN, "--config.data.image_size=100"], "data.image_size: 100 is not a multiple"),
        ([PRETRAIN, "--config.total_steps=0"], "total_steps: the length of the run is not set"),
        ([PRETRAIN, "--config.text.tokenizer=no.model"], "text.tokenizer: there is no file"),
        ([QUICKSTART, "--config.mesh.data=3"], "mesh.data=3"),
        ([QUICKSTART, "--config.batch_size=9", "--config.accumulate=2"], "accumulate: 2 parts"),
        (["--config=configs/quickstar.py"], "there is no file 'configs/quickstar.py'"),
        ([], "--config is missing; give --config=configs/NAME.py --workdir=DIR."),
    ],
)
def test_mistakes_are_told_in_a_line_or_two(args, said, command, tmp_path):
    code, _, stderr = command(*args, f"--workdir={tmp_path}")
    assert code == 2
    assert said in stderr
    assert len(stderr.strip().splitlines()) <= 2 and "Traceback" not in stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--config", str(toy.CONFIGS / "quickstart.py")],
        ["--config", "quickstart"],
        [f"-config={toy.CONFIGS / 'quickstart.py'}"],
    ],
)
def test_the_config_flag_in_other_forms(words, command, tmp_path):
    code, _, stderr = command(*words, "--config.image_size=3", f"--workdir={tmp_path}")
    assert code == 2 and "The field is data.image_size." in stderr


def test_a_wrong_field_makes_the_config_once(command, tmp_path):
    own = tmp_path / "own.py"
    made = tmp_path / "made"
    own.write_text(
        "from cap_pretrain import config\n"
        f"def get_config():\n    open({str(made)!r}, 'a').write('x')\n    return config.default()\n"
    )
    code, _, stderr = command(f"--config={own}", "--config.image_size=3", f"--workdir={tmp_path}")
    assert code == 2 and "data.image_size" in stderr and made.read_text() == "x"


def test_help_lists_flags_and_configs(command):
    code, stdout, _ = command("--help")
    assert code == 0 and "--allow_changes" in stdout
    assert all(f"  {path.stem} " in stdout for path in toy.CONFIGS.glob("*.py"))


def test_a_workdir_must_be_named_and_be_one(command, tmp_path):
    code, _, stderr = command(QUICKSTART)
    assert code == 2 and "--workdir is missing" in stderr
    (tmp_path / "file").write_text("")
    code, _, stderr = command(QUICKSTART, f"--workdir={tmp_path / 'file'}")
    assert code == 2 and "--workdir: cannot write to" in stderr


def test_a_tokenizer_file_that_is_none(command, tmp_path):
    (tmp_path / "bad.model").write_text("this is no model")
    code, _, stderr = command(
        QUICKSTART, f"--workdir={tmp_path}", f"--config.text.tokenizer={tmp_path / 'bad.model'}"
    )
    assert code == 2 and "bad.model" in stderr and len(stderr.strip().splitlines()) <= 2


def test_bugs_keep_their_traceback(command, tmp_path, monkeypatch):
    from cap_pretrain import train

    def run(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(train, "run", run)
    with pytest.raises(ZeroDivisionError):
        command(QUICKSTART, f"--workdir={tmp_path}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_was_stopped_says_by_what(number, code, command, tmp_path, monkeypatch):
    from cap_pretrain import train
    from cap_pretrain.training import watch

    def run(config, workdir, allow_changes, given):
        assert config.total_steps == 7 and workdir == tmp_path
        assert allow_changes == ["seed", "optim"] and given == ("total_steps",)
        request = watch.StopRequest()
        request.signal = number
        raise watch.Stopped(request, 5)

    monkeypatch.setattr(train, "run", run)
    args = (f"--workdir={tmp_path}", "--config.total_steps=7", "--allow_changes=seed,optim")
    found, _, stderr = command(QUICKSTART, *args)
    assert found == code and f"{number.name}: stopped after step 5, which is saved" in stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.jsonl"), "x.jsonl: No space left"),
        (OSError(errno.EROFS, "Read-only file system"), "cap_pretrain: Read-only file system"),
    ],
)
def test_a_full_or_forbidden_disk_is_the_users(error, said, command, tmp_path, monkeypatch):
    from cap_pretrain import train

    def run(*_):
        raise error

    monkeypatch.setattr(train, "run", run)
    code, _, stderr = command(QUICKSTART, f"--workdir={tmp_path}")
    assert code == 2 and said in stderr and len(stderr.splitlines()) == 1
    assert "intact" not in stderr  # there are no checkpoints
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert "the checkpoints are intact" in command(QUICKSTART, f"--workdir={tmp_path}")[2]


def test_a_bucket_that_is_out_of_reach_asks_for_another_start(command, tmp_path, monkeypatch):
    from cap_pretrain import train

    def run(*_):
        raise OSError(errno.EIO, "Cannot connect to host", "gs://bucket/run/metrics.jsonl")

    monkeypatch.setattr(train, "run", run)
    code, _, stderr = command(QUICKSTART, f"--workdir={tmp_path}")
    said = "gs://bucket/run/metrics.jsonl: Cannot connect to host; start again when"
    assert code == 75 and said in stderr and len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("objective", "model", "millions"),
    [("cappa", "L/14", 570.2), pytest.param("clip", "B/16", 196.7, marks=pytest.mark.slow)],
)
def test_a_dry_run_plans_without_building(objective, model, millions, command, tmp_path):
    code, stdout, _ = command(
        f"{PRETRAIN}:objective={objective},model={model}", f"--workdir={tmp_path}", "--dry_run"
    )
    assert code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    plan = json.loads((tmp_path / "plan.json").read_text())
    total = plan["parameters"]["total"]
    assert round(total / 1e6, 1) == millions and f"{millions}M" in stdout
    parts = {k: v for k, v in plan["parameters"].items() if k != "total"}
    assert sum(parts.values()) == total and "encoder" in parts
    assert plan["batch_per_device"] == plan["batch_size"] / plan["mesh"]["data"] == 8192
    assert plan["total_steps"] == 366_500
    forward, training = (plan["flops_per_example"][k] for k in ("forward", "training"))
    assert 2.5 < training / forward < 3.5
    sizes = plan["bytes_per_device"]
    assert sizes["parameters"] == sizes["gradients"] == 4 * total
    # Adafactor: a first moment in two bytes, and rows and columns of a second.
    assert 2 * total < sizes["optimizer"] < 2.2 * total


def test_a_plan_for_more_devices_than_there_are(command, tmp_path):
    args = (f"--workdir={tmp_path}", "--dry_run", "--config.mesh.data=2", "--config.mesh.fsdp=8")
    code, _, _ = command(PRETRAIN, *args)
    assert code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["devices"] == 16 and plan["batch_per_device"] == 512
    sizes, total = plan["bytes_per_device"], 4 * plan["parameters"]["total"]
    assert total / 8 <= sizes["parameters"] < 1.05 * total / 8


def test_the_program_says_a_mistake_and_exits_2(tmp_path):
    """And imports no TensorFlow on the way, up to where a run begins."""
    program = (
        "import sys\n"
        "from cap_pretrain import main, train\n"
        "code = main.entry()\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] == 'tensorflow'))\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, QUICKSTART, f"--workdir={tmp_path}", "--config.sed=1"],
        capture_output=True,
        text=True,
        cwd=toy.CONFIGS.parent,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        """cap_pretrain: --config: no field 'sed'. Did you mean "seed" instead of "sed"?"""
    ]
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_a_run_imports_neither_tensorflow_nor_torch(tmp_path):
    program = (
        "import sys\n"
        "from cap_pretrain import main\n"
        "code = main.entry()\n"
        "assert not {'tensorflow', 'torch'} & {m.split('.')[0] for m in sys.modules}\n"
        "sys.exit(code)\n"
    )
    small = ("--config.total_steps=1", "--config.batch_size=4", "--config.model.depth=1")
    data = ("--config.data.image_size=24", "--config.data.scenes.length_train=200")
    counts = ("scenes.count=4", "samples.count=4", "val.limit=4")
    done = subprocess.run(
        [
            *(sys.executable, "-c", program, QUICKSTART, f"--workdir={tmp_path}", *small, *data),
            *(f"--config.evals.{count}" for count in counts),
        ],
        capture_output=True,
        text=True,
        cwd=toy.CONFIGS.parent,
    )
    assert done.returncode == 0, done.stderr
