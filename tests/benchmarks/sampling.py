"""What a way of training costs in LR@1: short runs of one recipe that differ in a few flags, over some seeds.

    python tests/benchmarks/sampling.py --shards DIR --queries DIR --out DIR [--seeds 0 1 2] [--jobs 2]
        [--variants FILE.json] [--json FILE]

`--shards` is a data set (for example `preprocessing/build_shards.py --image-size 64` of a city that
`preprocessing/make_city.py --blocks 3 --years 4 --size 128` rendered), `--queries` its test queries. Each variant is
the recipe with flags of its own: those of the stream mode's K and W, or a JSON object of name to list of flags.
Each run has one torch thread. A run whose result is in `--out` is not repeated, one that was cut is resumed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """--preset quickstart --image-size 32 --colour-jitter 0 --ema 0 --iterations-per-epoch 200 --epochs 4
    --cpu --threads 1 --tracker none --keep 1""".split()  # noqa: SIM905
STREAM: dict[str, list[str]] = {"indexed": []} | {
    f"K={run} W={window}": ["--read", "stream", "--stream-run", str(run), "--stream-window", str(window)]
    for run, window in ((32, 65536), (32, 4096), (8, 65536))
}


def measure(name: str, flags: list[str], seed: int, places: argparse.Namespace) -> dict[str, float]:
    """LR@N in percent of one run, trained from random weights."""
    run = places.out / f"{name.replace(' ', '_')}-seed-{seed}"
    results = run / "evaluation" / "results.json"
    if not results.exists():
        where = ["--shards", places.shards, "--out", run, "--seed", seed]
        _call("training/train.py", *RECIPE, *flags, *where, *(["--resume"] if run.exists() else []))
        _call(
            "evaluation/evaluate.py",
            "--checkpoints",
            run,
            "--queries",
            places.queries,
            "--out",
            results.parent,
            "--no-report",
        )
    (row,) = json.loads(results.read_text())["rows"]
    return {"LR@1": row["lr_at_1"], "LR@5": row["lr_at_5"]}


def _call(script: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="data set to train on")
    parser.add_argument("--queries", type=Path, required=True, help="folder of test queries")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--variants", type=Path, help="JSON object of name to list of flags (default: K and W)")
    parser.add_argument("--json", type=Path, help="write the rows as JSON to this file")
    places = parser.parse_args()
    variants = json.loads(places.variants.read_text()) if places.variants else STREAM
    work = list(product(places.seeds, variants))
    with ThreadPoolExecutor(places.jobs) as pool:
        done = list(pool.map(lambda w: measure(w[1], variants[w[1]], w[0], places), work))
    by_variant = {name: [r for (_, n), r in zip(work, done, strict=True) if n == name] for name in variants}
    print(f"{'':24}{'LR@1':>7}{'spread':>8}{'LR@5':>7}{'spread':>8}   LR@1 by seed")
    for name, results in by_variant.items():
        cells = ""
        for n, wide in (("LR@1", 7), ("LR@5", 7)):
            values = [r[n] for r in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells += f"{statistics.mean(values):{wide}.1f}{spread:8.1f}"
        print(f"{name:24}{cells}   {', '.join(format(r['LR@1'], '.1f') for r in results)}")
    if places.json:
        places.json.write_text(json.dumps(by_variant, indent=2) + "\n")


if __name__ == "__main__":
    main()
