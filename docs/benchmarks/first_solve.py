"""What a user waits for at first: CPU seconds of import, first and second solve, in a process of its own.

    python docs/benchmarks/first_solve.py [--repeats 3]

Digits, 1,200 rows of 64 features, ten classes, softmax, 64 neurons; the second solve has another key. Once with nothing
kept on disk, once with JAX's compilation cache filled by the process before. Prints medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

ALONE = """
import json, time
start = time.process_time()
import cronos_flax as cf
seconds = [time.process_time() - start]
import jax
from sklearn.datasets import load_digits
X, y = load_digits(return_X_y=True)
X, y = X[:1200].astype("float32") / 16, y[:1200]
for seed in range(2):
    key = jax.random.key(seed) if seed else None  # None as most callers: of the first solve all is counted
    start = time.process_time()
    float(cf.Cronos(loss="softmax").solve(X, y, hidden=64, key=key).stats.objective)
    seconds.append(time.process_time() - start)
print(json.dumps(seconds))
"""


def alone(directory: str | None) -> list[float]:
    """Import, first solve and second solve in a new process, with programs kept in a directory, if one is given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    if directory is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": directory,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    run = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def main() -> None:
    """Print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=3)
    repeats = made.parse_args().repeats
    with tempfile.TemporaryDirectory() as directory:
        alone(directory)  # fills it
        kept = [alone(directory) for _ in range(repeats)]
    for name, rows in (("nothing kept", [alone(None) for _ in range(repeats)]), ("programs kept", kept)):
        medians = map(statistics.median, zip(*rows, strict=True))
        print(
            name, *(f"{what} {value:.2f}" for what, value in zip(("import", "first", "second"), medians, strict=True))
        )


if __name__ == "__main__":
    main()
