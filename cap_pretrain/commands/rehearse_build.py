"""Check that a build of web data counts drops exactly, survives kills, and uses constant memory.

    cap rehearse_build --images 20000 --kills 5 --folder rehearsal

Writes tars like img2dataset's, of `scenes` at 500 x 375 pixels, with planted faults: truncated
images, other files, empty captions, copies of the same or another quality, and a truncated last
tar. Builds them with perceptual deduplication in FOLDER/straight; a tenth of them in FOLDER/tenth;
and in FOLDER/killed, with SIGKILL at random moments of each start, until there were enough kills. A
build that ends before its kill is compared, deleted, and begun again. Prints dropped examples by
reason, seconds, and the peak memory (VmHWM) of the main process and of its workers. Exit status: 0
all counts equal the planted ones, and all datasets have the same bytes, reports included; 1 they
differ; 2 the user's mistake.
"""

import collections
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from cap_pretrain.cli import arguments
from cap_pretrain.cli.processes import ROOT
from cap_pretrain.data.scenes.source import Scenes

SIZE = 500, 375
PER_TAR = 1000
POLL = 0.05  # seconds between two looks at the memory of processes
FAULTS = {1: "broken", 2: "broken", 3: "without captions"}  # by the last digit of examples
COPIES = {4: "duplicate image", 5: "near-duplicate image"}


def photograph(number: int, quality: int = 90, size: tuple[int, int] = SIZE) -> bytes:
    """Return a JPEG of a scene under a unique pattern of large spots, with grain."""
    width, height = size
    scene = Scenes("train", image_size=max(size))[number]["image"][:height]
    rng = np.random.default_rng(number)
    spots = rng.integers(0, 256, (10, 10, 3), np.uint8)
    spots = cv2.resize(spots, size, interpolation=cv2.INTER_CUBIC)
    grain = rng.integers(-9, 10, (height, width, 1), np.int16)
    pixels = cv2.addWeighted(np.ascontiguousarray(scene), 0.5, spots, 0.5, 0).astype(np.int16)
    pixels = np.clip(pixels + grain, 0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="420")


def example(number: int, size: tuple[int, int]) -> tuple[bytes, str, str]:
    """Return the image and caption of an example and the reason it will be dropped, or ""."""
    kind, reason = number % 10, FAULTS.get(number % 10, "")
    if kind in COPIES and number >= 10:
        reason = COPIES[kind]
        ten = number // 10
        quality = 90 if kind == 4 else 60 + ten % 2  # so that no two copies are equal
        image = photograph(ten // 2 * 10, quality, size)
    elif kind == 2:
        image = b"<html>404 Not Found</html>"
    else:
        image = photograph(number, size=size)
    caption = Scenes("train")[number]["captions"][0]
    return image[: len(image) // 2] if kind == 1 else image, " " if kind == 3 else caption, reason


def write_tar(path: Path, numbers: range, size: tuple[int, int], cut: bool = False) -> list[str]:
    """Write examples (with `cut`, half, and half a header); return why each is dropped, or ""."""
    reasons = []
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number in numbers[: len(numbers) // 2] if cut else numbers:
            image, caption, reason = example(number, size)
            metadata = json.dumps({"caption": caption, "key": f"{number:09}", "status": "success"})
            for suffix, data in (("jpg", image), ("json", metadata), ("txt", caption)):
                data = data if isinstance(data, bytes) else data.encode()
                info = tarfile.TarInfo(f"{number:09}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            reasons.append(reason)
        end = tar.offset
    if cut:
        os.truncate(path, end)
        reasons.append("rest of a tar that is cut off")
    return reasons


def write_tars(
    folder: Path, images: int, per_tar: int = PER_TAR, size: tuple[int, int] = SIZE
) -> tuple[dict[str, int], int]:
    """Write the tars and return the number of drops by reason, and the number of candidates."""
    folder.mkdir(parents=True)
    starts = range(0, images, per_tar)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(
                write_tar,
                folder / f"{shard:05}.tar",
                range(start, min(start + per_tar, images)),
                size,
                cut=start == starts[-1],
            )
            for shard, start in enumerate(starts)
        ]
        reasons = [reason for job in jobs for reason in job.result()]
    return dict(collections.Counter(filter(None, reasons))), len(reasons)


class Build:
    """A run of tools/build_dataset.py from tars in `shards` to `out`, with `workers` processes.

    `process` is the main process, and `peaks` has the peak memory in KiB by process id.
    """

    def __init__(self, shards: Path, out: Path, workers: int):
        arguments = ["webdataset", "--name", "mine", "--out", out, "--shards", shards]
        arguments += ["--dedup", "perceptual", "--workers", workers]
        command = [sys.executable, "-m", "cap_pretrain.commands.build_dataset", *arguments]
        self.peaks: dict[int, int] = {}  # KiB by process
        self._begun = time.monotonic()
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def run(self, seconds: float = float("inf")) -> bool:
        """Return whether it was killed after `seconds`; raises CalledProcessError if it failed."""
        while self.process.poll() is None:
            if self.seconds > seconds:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()
                return True
            for pid in _family(self.process.pid):
                self.peaks[pid] = max(self.peaks.get(pid, 0), _peak(pid))
            time.sleep(POLL)
        if self.process.returncode:
            raise subprocess.CalledProcessError(self.process.returncode, "build_dataset.py")
        return False

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begun

    def memory(self) -> tuple[float, float]:
        """Return the peak memory of the main process and the largest of a worker, in MiB."""
        main = self.peaks.pop(self.process.pid)
        return main / 1024, max(self.peaks.values(), default=0) / 1024


def _family(pid: int) -> Iterator[int]:
    """Yield a process id and those of its descendants."""
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))
    except OSError:
        return  # it has exited


def _peak(pid: int) -> int:
    """Return VmHWM, proc(5), in KiB; 0 for a process that has exited."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines() if line.startswith("VmHWM"))
    return next((int(line[1]) for line in lines), 0)


def reported(dataset: Path) -> tuple[dict[str, int], int, int]:
    """Return the drops by reason, the candidates and the kept examples that a build reports."""
    report = json.loads((dataset / "1.0.0" / "report.json").read_text())["splits"]["train"]
    dropped = {reason: drop["count"] for reason, drop in report["dropped"].items()}
    return dropped, report["candidates"], report["kept"]


def contents(dataset: Path) -> dict[str, bytes]:
    """Return every file of a dataset, reports included, by name."""
    return {path.name: path.read_bytes() for path in (dataset / "1.0.0").iterdir()}


def straight(shards: Path, out: Path, workers: int, planted: tuple[dict[str, int], int]) -> float:
    """Build without kills; return the seconds. Exits if counts are not the planted ones."""
    build = Build(shards, out, workers)
    build.run()
    seconds = build.seconds
    dropped, candidates, kept = reported(out / "mine")
    main_peak, worker_peak = build.memory()
    print(f"{candidates} candidates, {kept} kept, {workers} workers: {seconds:.0f} s", end="; ")
    print(f"peak memory {main_peak:.0f} MiB, of a worker {worker_peak:.0f} MiB", flush=True)
    for reason, count in sorted(dropped.items()):
        print(f"    {count:6} {reason}")
    if (dropped, candidates) != planted or kept != candidates - sum(dropped.values()):
        sys.exit(f"the planted counts are {planted}")
    return seconds


def killed(folder: Path, workers: int, kills: int, took: float, draw: random.Random) -> int:
    """Kill builds at random moments of the `took` seconds of one; return the exit status."""
    out, done, ended = folder / "killed", 0, 0
    while True:
        left: list[str] = []  # after a kill, anything may be left
        seconds = draw.uniform(0.02, 1) * took if done < kills else float("inf")
        build = Build(folder / "straight_tars", out, workers)
        if build.run(seconds):
            done += 1
            units = len(list((out / ".mine.building" / "units").glob("*.unit")))
            print(f"kill {done} after {seconds:.1f} s, {units} units are done", flush=True)
            if not (out / "mine" / "1.0.0").exists():
                continue
        else:
            left = [path.name for path in out.iterdir() if path.name != "mine"]
        ended += 1
        same = contents(out / "mine") == contents(folder / "straight" / "mine")
        print(f"ended after {build.seconds:.0f} s:", "the same bytes" if same else "OTHER BYTES")
        if left or not same:
            print(f"left over: {left}")
            return 1
        if done == kills:
            print(f"{done} kills and {ended} finished builds")
            return 0
        shutil.rmtree(out)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--images", type=int, default=20_000, help="default: 20000")
    parser.add_argument("--kills", type=int, default=5, help="default: 5")
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument("--folder", type=arguments.local_path, required=True, help="must not exist")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of kills")
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"--folder {args.folder}: already exists; name another.")
    begun = time.monotonic()
    planted = {
        name: write_tars(args.folder / f"{name}_tars", count)
        for name, count in (("tenth", args.images // 10), ("straight", args.images))
    }
    size = sum(path.stat().st_size for path in (args.folder / "straight_tars").iterdir())
    print(f"{size / 1e6:.0f} MB of tars written in {time.monotonic() - begun:.0f} s", flush=True)
    for name, counts in planted.items():
        out = args.folder / name
        took = straight(args.folder / f"{name}_tars", out, args.workers, counts)

    draw = random.Random(args.seed)
    return killed(args.folder, args.workers, args.kills, took, draw)


if __name__ == "__main__":
    sys.exit(main())
