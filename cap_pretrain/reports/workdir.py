"""Read what a report shows of a run from its workdir, whose files may be missing or damaged."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from cap_pretrain import files, untrusted
from cap_pretrain.checkpoints.warm_start import which_run
from cap_pretrain.errors import UserError
from cap_pretrain.evals import exhibits, suite
from cap_pretrain.telemetry.metrics import read_metrics

FOLDER, FACTS = exhibits.FOLDER, "facts.json"
SPIKE = "spike/loss"
BROKEN_SHOWN = 10  # examples of broken.jsonl that are listed
EARLIER = 4  # evaluations before the newest whose captions are shown


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of a run, as far as they could be read.

    Attributes:
        name: Short name, different from that of other runs in the report.
        folder: The workdir.
        config: Content of config.json.
        evaluators: Their sections of the config, {} for one that only has results.
        metrics: Lines of metrics.jsonl, in order.
        facts: Content of report/facts.json; {} for a run before there were such files.
        plan: Content of plan.json, which only a dry run writes; or {}.
        results: The newest result of each evaluator.
        shown: The newest examples of each evaluator, see `evals.exhibits`.
        earlier: Captions of some earlier evaluations: evaluator -> step -> id of image -> caption.
        broken: Number of lines of broken.jsonl, and the first of them.
        builds: Content of report.json of each dataset that was built here, by name.
        problems: Lines about files that could not be read.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    evaluators: dict[str, dict[str, Any]]
    metrics: list[dict[str, Any]]
    facts: dict[str, Any]
    plan: dict[str, Any]
    results: dict[str, dict[str, Any]]
    shown: dict[str, dict[str, Any]]
    earlier: dict[str, dict[int, dict[str, str]]]
    broken: tuple[int, list[dict[str, Any]]]
    builds: dict[str, dict[str, Any]]
    problems: list[str]

    @property
    def step(self) -> int:
        """The last step in the metrics; 0 without any."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def total(self) -> int:
        """Steps of the whole run; 0 if that is not known."""
        return whole(section(self.facts, "schedule").get("total") or self.plan.get("total_steps"))

    @property
    def batches(self) -> list[tuple[int, int]]:
        """Batch sizes, (step, examples a step from there on)."""
        found = self.facts.get("batches")
        with contextlib.suppress(TypeError, ValueError):
            if found:
                return [(whole(step), whole(size)) for step, size in found]
        return [(0, whole(self.config.get("batch_size")))]

    @property
    def examples(self) -> int:
        """Examples shown up to the last step, repeated ones counted again."""
        return self.shown_by(self.step)

    def shown_by(self, step: int) -> int:
        """Return how many of these were shown by a step."""
        step = min(step, self.step)
        ends = [first for first, _ in self.batches[1:]] + [step]
        pairs = zip(self.batches, ends, strict=True)
        return sum(size * max(0, min(end, step) - first) for (first, size), end in pairs)


def section(values: Any, name: str) -> dict[str, Any]:
    """Return `values[name]` if both are dicts, else {}."""
    found = values.get(name) if isinstance(values, dict) else None
    return found if isinstance(found, dict) else {}


def entries(values: Any, name: str) -> list[dict[str, Any]]:
    """Return those parts of the list `values[name]` that are dicts; [] if it is no list."""
    found = values.get(name) if isinstance(values, dict) else None
    return [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []


def finite(value: Any) -> float | None:
    """Return a number from a file, or None if it is none, not finite or beyond any use."""
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return value if usable and abs(value) < 1e300 else None


def whole(value: Any) -> int:
    """Return a number from a file as an integer, or 0 if it is none."""
    found = finite(value) or 0
    return int(found) if abs(found) < 2**63 else 0


def read_all(paths: Sequence[Path]) -> list[Run]:
    """Read runs, and give them names that differ; raise UserError if one is not a run."""
    folders = list(dict.fromkeys(folder_of(path) for path in paths))
    return [read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def folder_of(path: Path) -> Path:
    """Return the workdir that a path names, itself or with checkpoints/STEP; or raise UserError."""
    folder, _ = which_run(path)
    if (folder / "config.json").is_file() or (folder / "metrics.jsonl").is_file():
        return folder.resolve()
    raise UserError(
        f"{path}: is not the workdir of a run (it has no config.json); name a --workdir."
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of paths, as many as make them differ."""
    for parts in range(1, 1 + max((len(folder.parts) for folder in folders), default=0)):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read(folder: Path, name: str) -> Run:
    """Read the workdir of a run."""
    problems: list[str] = []

    def attempt(path: Path, kind: type, load: Callable[[Path], Any] = files.read_json) -> Any:
        """Load a file that may be missing, and check its type."""
        if not path.is_file():
            return kind()
        try:
            return untrusted.checked(load(path), "content", kind, path)
        except (UserError, OSError, RecursionError) as error:
            problems.append(str(error))
            return kind()

    config = attempt(folder / "config.json", dict)
    results, shown, earlier = {}, {}, {}
    evaluators = _evaluators(folder, config)
    for evaluator in evaluators:
        try:
            results[evaluator] = suite.newest_result(folder, evaluator)[1]
        except (UserError, OSError, RecursionError) as error:
            problems.append(str(error))
        shown[evaluator] = attempt(exhibits.path(folder, evaluator), dict, exhibits.read)
        if isinstance(results.get(evaluator, {}).get("samples"), list):
            paths = _spread(files.numbered(folder / "evals" / evaluator, ".json"))
            earlier[evaluator] = {n: _captions(attempt(path, dict)) for n, path in paths.items()}
    lines = attempt(folder / "broken.jsonl", list, files.read_json_lines)
    broken = [line for line in lines if isinstance(line, dict)]
    facts = attempt(folder / FOLDER / FACTS, dict)
    return Run(
        name=name,
        folder=folder,
        config=config,
        evaluators=evaluators,
        metrics=read_metrics(folder),
        facts=facts,
        plan=attempt(folder / "plan.json", dict),
        results={k: v for k, v in results.items() if v},
        shown={k: v for k, v in shown.items() if v},
        earlier=earlier,
        broken=(len(broken), broken[:BROKEN_SHOWN]),
        builds=_builds(section(config, "data"), facts, attempt),
        problems=problems,
    )


def _evaluators(folder: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sections of evaluators in the config, and {} for others that have results."""
    found = {name: section(section(config, "evals"), name) for name in section(config, "evals")}
    results = folder / "evals"
    folders = sorted(path.name for path in results.iterdir()) if results.is_dir() else []
    found |= {name: {} for name in folders if name not in found and (results / name).is_dir()}
    # A name is part of paths, and a config may come from anywhere.
    return {name: own for name, own in found.items() if PurePath(name).name == name}


def _spread(paths: dict[int, Path]) -> dict[int, Path]:
    """Return up to EARLIER files by step, evenly spread and without the newest."""
    steps = sorted(paths)[:-1]
    count = min(EARLIER, len(steps))
    chosen = [steps[k * (len(steps) - 1) // max(1, count - 1)] for k in range(count)]
    return {step: paths[step] for step in chosen}


def _captions(result: dict[str, Any]) -> dict[str, str]:
    """Return the captions of a result of the evaluator `captions`, by the image's id."""
    samples = entries(result, "samples")
    return {str(sample.get("id")): str(sample.get("caption")) for sample in samples}


def _builds(data: dict[str, Any], facts: dict[str, Any], attempt: Callable) -> dict[str, Any]:
    """Return report.json of the datasets of a run that were built and are on this machine."""
    name = data.get("name")  # of a run without facts.json, as the folder is called from here
    folders = section(facts, "folders") if "folders" in facts else {str(name): name}
    found = {}
    for name, folder in folders.items():
        if not isinstance(folder, str) or not folder or files.is_url(folder) or "\0" in folder:
            continue
        own = files.place(folder)
        for path in (*own.glob("report.json"), *sorted(own.glob("*/report.json"))):
            if content := attempt(path, dict):
                found[name] = content
    return found
