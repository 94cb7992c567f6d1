"""When evaluators run, and where their results are written."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from cap_pretrain import evals
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Result
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.suite import Budget, Suite
from cap_pretrain.telemetry import console


class Fake:
    built = 0

    @dataclasses.dataclass(frozen=True)
    class Options:
        scale: float = 2.0

    def __init__(self, context, options):
        Fake.built += 1
        self._options = options

    def __call__(self, variables):
        return Result({"score": variables * self._options.scale}, {"words": ["é"]}, ("a line",))


@pytest.fixture
def suite(monkeypatch, tmp_path):
    monkeypatch.setattr(Fake, "built", 0)
    monkeypatch.setattr(evals, "evaluator_class", lambda name: Fake)

    def make(also="end", **kwargs):
        entries = ConfigDict(
            {"often": evals.defaults("fake"), "last": evals.defaults("fake", scale=3.0, when=also)}
        )
        context = SimpleNamespace(config=SimpleNamespace(evals=entries))
        return Suite(context, tmp_path, **kwargs)

    return make


def test_each_runs_in_its_turn_and_is_built_once(suite):
    s = suite()
    assert Fake.built == 0
    assert dict(s.run(10, 1.0, when="always")).keys() == {"often"}
    assert dict(s.run(20, 1.0, when="always"))["often"].metrics == {"score": 2.0}
    assert Fake.built == 1
    assert dict(s.run(30, 1.0, when="end"))["last"].metrics == {"score": 3.0}
    assert Fake.built == 2
    assert not dict(s.run(30, 1.0, when="end", done={"last", "loss"}))
    assert dict(s.run(40, 1.0, when="always", done={"often"})).keys() == {"often"}  # not there


def test_other_weights_are_judged_anew(suite, tmp_path):
    def judged(weights):
        s = suite(also="always", weights=weights)
        ran = s.run(0, 1.0, when="always", done={"often", "last"})
        return sorted(name for name, _ in ran)

    assert judged("step 300 of a") == ["last", "often"]
    assert judged("step 300 of a") == []
    assert judged("step 600 of a") == ["last", "often"]
    found = json.loads((tmp_path / "evals/often/0.json").read_text(encoding="utf-8"))
    assert found["weights"] == "step 600 of a"


def test_each_result_is_there_before_the_next_is_begun(suite, tmp_path):
    results = suite(also="always").run(30, 1.0, when="always")
    assert Fake.built == 0 and next(results)[0] == "last"
    assert (tmp_path / "evals/last/30.json").exists() and Fake.built == 1


def test_results_are_json_where_scripts_look(suite, tmp_path):
    s = suite()
    list(s.run(30, 1.0, when="always")), list(s.run(30, 1.0, when="end"))
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"evals/often/30.json", "evals/last/30.json"}
    assert json.loads((tmp_path / "evals/last/30.json").read_text(encoding="utf-8")) == {
        "step": 30,
        "options": {"evaluator": "fake", "when": "end", "scale": 3.0},
        "score": 3.0,
        "words": ["é"],
    }


def test_other_hosts_measure_and_write_nothing(suite, tmp_path):
    assert dict(suite(write=False, also="always").run(30, 1.0, when="always")).keys() == {
        "often",
        "last",
    }
    assert not list(tmp_path.iterdir())


def test_mistakes_are_the_users():
    with pytest.raises(UserError, match="evals: no evaluator 'los'. Did you mean 'loss'?"):
        evals.defaults("los")
    section = evals.defaults("loss", when="sometimes")
    with pytest.raises(UserError, match="evals.val.when: 'sometimes'"):
        evals.options("val", section)


@pytest.mark.parametrize(
    ("evaluator", "field"), [("captions", "count"), ("loss", "batch_size"), ("retrieval", "pairs")]
)
def test_counts_are_positive(evaluator, field):
    section = evals.defaults(evaluator, **{field: 0})
    with pytest.raises(UserError, match=f"evals.mine.{field}: 0 must be at least 1"):
        evals.options("mine", section)
    section = evals.defaults("retrieval", limit=-1)
    with pytest.raises(UserError, match="evals.mine.limit: -1 must be at least 0"):
        evals.options("mine", section)


def test_an_evaluator_that_fewer_examples_do_not_suffice_reads_all(monkeypatch, tmp_path, capsys):
    class Probe(Fake):
        @dataclasses.dataclass(frozen=True)
        class Options:
            limit: int = 0

        def __init__(self, context, options):
            if options.limit:
                raise UserError("too few examples for 300 classes.")

        def __call__(self, variables):
            return Result({"score": 1.0})

        def work(self):
            return Work(500)

    monkeypatch.setattr(evals, "evaluator_class", lambda name: Probe)
    entries = ConfigDict({"probe": evals.defaults("fake", when="always")})
    context = SimpleNamespace(config=SimpleNamespace(evals=entries))
    s = Suite(context, tmp_path, budget=Budget({"always": 100.0}))
    with console.used():
        assert dict(s.run(1, 1.0, when="always"))["probe"].metrics == {"score": 1.0}
    assert json.loads((tmp_path / "evals/probe/1.json").read_text())["options"]["limit"] == 0
    assert capsys.readouterr().out.count("reads all 500 examples, since fewer do not suffice") == 1
