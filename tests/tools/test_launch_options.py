"""Tests of the options of all launchers: no value runs a command or changes what surrounds it."""

import functools
import random
import re
import shlex
import subprocess

import pytest
import yaml

from tests.tools.launchers import PROGRAM_FLAGS, ROOT

REQUIRED = {
    "launch_gke.sh": [
        *("--name=cap", "--image=i:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4"),
        "--mount=h:/s",
    ],
    "launch_slurm.sbatch": [],
    "launch_tpu.sh": ["--name=pod", "--zone=z", "--type=v5litepod-16", "--version=v2-alpha"],
}
CLOUDS = ("gcloud", "kubectl", "srun", "scontrol", "touch")
RUN = "touch PWNED"
INJECTIONS = [
    *(f"name[$({RUN})0]", f"$({RUN})", f"`{RUN}`", f"x;{RUN};", f"x\n{RUN}\n", f"' ;{RUN}; '"),
    *(f"$(( name[$({RUN})] ))", f'"; {RUN}; "', f"x || {RUN}", f"--x|{RUN}", "--help", "-", "~"),
    *("name", "08", "1e9", "99999999999999999999", "-1", "0x10", "1\n", "4x4\n  evil: 1", "*"),
    *("a: b", "'", '"', "{a: b}", "x\u2028evil: 1", "x\x85evil: 1", "x\x1b]0;evil\a", "M\udce4rz"),
    *(f"h:/$({RUN})", f"h:/x' `{RUN}`", "h:/\u2028", "h:/s # x", "gs://b\nevil: 1", f"gs://{RUN}"),
    "\u00e9t\u00e9 \U0001f600 $HOME ${HOME} $$ \\n %s",
]
FEW = [INJECTIONS[0], INJECTIONS[5], "4x4\n  evil: 1", INJECTIONS[-1]]
PIECES = [
    *INJECTIONS,
    "$(",
    ")",
    "`",
    "'",
    '"',
    "\n",
    "\\",
    "--",
    "=",
    " ",
    "a",
    "1",
    "[",
    "]",
    "é",
]


def options_of(script):
    """Return the options of a launcher as {name: kind}, from its own table."""
    text = (ROOT / "tools" / script).read_text()
    (table,) = re.findall(r"read_options '([^']+)'", text)
    return dict(option.split(":") for option in table.split())


CASES = [(script, option) for script in REQUIRED for option in [*options_of(script), "--"]]


def launch(bench, script, option, value, *more):
    """Run a launcher with a value for an option, or for a flag of the program ("--")."""
    program = [*PROGRAM_FLAGS, f"--config.x={value}"] if option == "--" else PROGRAM_FLAGS
    own = [] if option == "--" else [f"--{option}={value}"]
    if option == "env":
        own = [f"--env=A={value}"]
    command = ["bash", ROOT / "tools" / script, *REQUIRED[script], *own, *more, "--", *program]
    folder = bench.fake / "work"
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [str(word).encode("utf-8", "surrogateescape") for word in command],
        **dict(cwd=folder, env=bench.env, capture_output=True, timeout=60),
    )


def paths(tree, at=()):
    """Yield (path, leaf) of a parsed YAML document; a list of flags is one leaf."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from paths(value, (*at, key))
    elif isinstance(tree, list) and at[-1] not in ("args", "values"):
        for number, value in enumerate(tree):
            yield from paths(value, (*at, number))
    else:
        yield at, tree


@functools.cache
def usual_paths():
    """Return the paths in a manifest of harmless options."""
    command = ["bash", ROOT / "tools/launch_gke.sh", *REQUIRED["launch_gke.sh"], "--dry_run"]
    printed = subprocess.run([*command, "--", "--config=a"], check=True, capture_output=True)
    return dict(paths(yaml.safe_load(printed.stdout))).keys()


def words_of(script, printed):
    """Return the words of the commands that a dry run prints, and those of commands in them."""
    found = []
    for line in printed.splitlines():
        if not line.startswith("#"):
            found += shlex.split(line)
    remote = [w.removeprefix("--command=") for w in found if "launch_tpu_worker.sh" in w]
    return found + [word for command in remote for word in shlex.split(command)]


def check(bench, script, option, value):
    """Assert that a value is refused in one line, or arrives as it is, and that nothing runs."""
    done = launch(bench, script, option, value, "--dry_run")
    what = f"{script} --{option}={value!r}: {done}"
    assert done.returncode in (0, 2), what
    assert not any((bench.fake / "work").iterdir()), what
    err, out = done.stderr.decode(), done.stdout.decode()
    assert len(err.splitlines()) == (done.returncode == 2), what
    assert all(c.isprintable() for c in err.rstrip("\n")), what
    if done.returncode:
        return False
    if script == "launch_gke.sh":
        leaves = dict(paths(yaml.safe_load(out)))
        flags = [leaf for leaf in leaves.values() if isinstance(leaf, list)]
        arrived = [*flags[-1], *map(str, leaves.values())] if flags else []
        arrived = [word.replace("$$", "$") for word in arrived]
        if option == "mount":
            arrived.append(value)
            volume = {path[-1]: leaf for path, leaf in leaves.items() if path[-2:-1] == ("nfs",)}
            assert not volume or f"{volume['server']}:{volume['path']}" == value, what
        elif option == "env":
            variable = [leaves.pop(path) for path in list(leaves) if "env" in path]
            assert [str(word).replace("$$", "$") for word in variable] == ["A", value], what
            assert leaves.keys() == usual_paths(), what
        else:
            assert leaves.keys() == usual_paths(), what
    else:
        arrived = words_of(script, out)
    given = f"--config.x={value}" if option == "--" else value
    if option == "env" and script != "launch_gke.sh":
        given = f"A={value}"
    if options_of(script).get(option) not in ("number", "count", "seconds", "topology"):
        assert any(given == word.partition("=")[2] or given == word for word in arrived), what
    return True


@pytest.mark.parametrize(("script", "option"), CASES)
def test_a_value_is_refused_or_arrives_as_it_is(bench, script, option):
    bench.record(*CLOUDS)
    for value in FEW:
        check(bench, script, option, value)
    assert not any(bench.calls(name) for name in CLOUDS)


@pytest.mark.slow
def test_every_value_is_refused_or_arrives_as_it_is(bench):
    bench.record(*CLOUDS)
    draw = random.Random(0)
    for script, option in CASES:
        for value in INJECTIONS:
            check(bench, script, option, value)
    for _ in range(1000):
        value = "".join(draw.choices(PIECES, k=draw.randint(1, 4)))
        check(bench, *draw.choice(CASES), value)
    assert not any(bench.calls(name) for name in CLOUDS)


def test_commands_of_a_dry_run_pass_texts_on_as_they_are(bench):
    bench.record("gcloud", "tar", "env")
    texts = [value for value in INJECTIONS if value.isprintable()]
    flags = [f"--create_flag=--labels={text}" for text in texts]
    given = [f"--config.x={text}" for text in texts]
    command = ["bash", ROOT / "tools/launch_tpu.sh", *REQUIRED["launch_tpu.sh"], *flags]
    options = dict(cwd=bench.fake, env=bench.env, check=True, timeout=60, text=True)
    printed = subprocess.run([*command, "--dry_run", "--", *given], stdout=-1, **options).stdout
    subprocess.run(["bash", "-euc", printed], **options)
    calls = bench.calls("gcloud")
    (create,) = [call for call in calls if "create" in call]
    assert {f"--labels={text}" for text in texts} <= set(create)
    (start,) = [word for call in calls for word in call if "worker.sh start" in word]
    line = start.removeprefix("--command=bash ")
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], stdout=-1, **options).stdout
    assert words.splitlines()[2:] == ["--", *given]
    assert not (bench.fake / "PWNED").exists()


@pytest.mark.parametrize("script", REQUIRED)
def test_the_name_of_a_variable_is_checked(bench, script):
    bench.record(*CLOUDS)
    for name in ("1A", "A B", f"$({RUN})", "A", ""):
        text = name if name == "A" else f"{name}=x"
        done = launch(bench, script, "--", "x", f"--env={text}", "--dry_run")
        assert done.returncode == 2 and b"must be NAME=VALUE" in done.stderr, done
    assert not any((bench.fake / "work").iterdir())


def test_a_crash_of_a_slurm_job_evaluates_nothing(bench):
    bench.record("srun", code=1)
    for option in ("max_failures", "quick"):
        done = launch(bench, "launch_slurm.sbatch", option, f"a[$({RUN})0]", "--pause=0")
        assert done.returncode == 2
    assert bench.calls("srun") == [] and not any((bench.fake / "work").iterdir())


@pytest.mark.parametrize("value", [f"h:/$({RUN})", f"h:/a b' `{RUN}`", f"gs://b;{RUN}", "-o"])
def test_a_worker_mounts_what_is_given_or_refuses_it(bench, value):
    bench.record("sudo", "mount.nfs", "gcsfuse", "uv")
    bench.record("mountpoint", code=1)
    script = bench.fake / "repository/tools/launch_tpu_worker.sh"
    done = subprocess.run(
        ["bash", script, "install", value],
        **dict(cwd=bench.fake, env=bench.env, capture_output=True, timeout=60),
    )
    mounted = value.startswith("h:/")
    assert done.returncode == (0 if mounted else 2), done
    assert any(value in call for call in bench.calls("sudo")) == mounted
    assert not list(bench.fake.rglob("PWNED"))


def test_what_workers_report_is_not_evaluated(bench):
    text = (bench.bin / "gcloud").read_text()
    lie = "if 'worker.sh ended' in str(argv): print('ended 1 9+a[$(touch${IFS}PWNED)0]')\n"
    bench.put("gcloud", text.replace('if verb == "describe"', f'{lie}if verb == "describe"', 1))
    (bench.fake / "statuses").write_text("1")
    with bench.start("--max_failures=1", stdout=-1, stderr=-1, cwd=bench.fake) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and b"crashed 1 times in a row (1)" in err
    assert not (bench.fake / "PWNED").exists()
