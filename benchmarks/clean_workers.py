"""Cleaning by an array job of 1, 2 and 4 workers: how much faster it gets, and what the stage's own process costs.

    python benchmarks/clean_workers.py                      sbatch is played by a program that starts the tasks here
    python benchmarks/clean_workers.py --slurm              the Slurm that is there, at most its default partition
    python benchmarks/clean_workers.py --workers 8 16 --copies 20

The corpus is that of benchmarks/corpus.py, with every filter and near duplicates. A machine cannot be faster with more
workers than it has cores: the last line says how many there are. All outputs must be equal.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests/helpers")]

from clean_stage import run_clean  # noqa: E402
from corpus import corpus  # noqa: E402
from fake_array import write_programs  # noqa: E402


def measure(folder: Path, sources: dict[str, Path], workers: int) -> dict[str, float]:
    """MB per second of an array job, and CPU seconds of the stage's own process per GB of text."""
    size = sum(path.stat().st_size for path in sources.values()) / 1e6
    cost, published = run_clean(folder / f"{workers}", sources, workers, executor="slurm", unit_bytes=2**20)
    digest = json.loads((published / "manifest.json").read_text())["digest"]
    figures = {"workers": workers, "seconds": cost.wall, "mb_per_s": size / cost.wall, "own_cpu": cost.cpu, "mb": size}
    print(
        f"{workers} workers: {size:.1f} MB in {cost.wall:.1f} s, {size / cost.wall:.2f} MB/s, own {cost.cpu:.1f} CPU-s"
    )
    return figures | {"digest": digest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--copies", type=int, default=1, help="how much text: the corpus, and copies of it, shuffled")
    parser.add_argument("--rows", type=int, help="only the first rows of each language, to try this program")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the corpus and the runs go; all nodes must see it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if not arguments.slurm:
            write_programs(folder / "bin")
            os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        files = corpus(folder / "corpus", arguments.copies)
        sources = {language: files[language] for language in ("en", "zh")}
        for path in sources.values() if arguments.rows else ():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[: arguments.rows]), encoding="utf-8")
        results = []
        for workers in arguments.workers:
            (folder / "bin/pids").unlink(missing_ok=True)
            results.append(measure(folder, sources, workers))
            shutil.rmtree(folder / f"{workers}")
    if len({result.pop("digest") for result in results}) != 1:
        raise SystemExit("the outputs of these runs differ")
    print(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()[0], "results": results}))


if __name__ == "__main__":
    main()
