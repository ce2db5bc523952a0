"""Compare speed and memory with the usual tools; one table per machine.

    python kernels/bench.py                          the loss head (bench_head.py)
    python kernels/bench.py --step                   a whole DDPO step (bench_step.py)
    python kernels/bench.py --generate --random      generation (bench_generate.py)
    python kernels/bench.py --gpu --out gpu.json     all that needs a GPU (bench_gpu.py)

`--help` after any of them lists its options.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages, read at import
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from config import add_options, from_options  # noqa: E402
from kernels import bench_generate, bench_gpu, bench_head, bench_step  # noqa: E402

BENCHES = {"": bench_head, "--step": bench_step, "--generate": bench_generate, "--gpu": bench_gpu}


def main(argv: list[str]) -> None:
    flag = argv[0] if argv and argv[0] in BENCHES else ""
    bench = BENCHES[flag]
    parser = argparse.ArgumentParser(
        f"bench.py {flag or '[--step | --generate | --gpu]'}", description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, bench.Options)
    bench.main(from_options(bench.Options, parser.parse_args(argv[bool(flag) :])))


if __name__ == "__main__":
    main(sys.argv[1:])
