"""Compare speed and memory with the usual tools; one table per machine.

    python kernels/bench.py                          the loss head (bench_head.py)
    python kernels/bench.py --frozen                 no gradient for the vocabulary matrix (LoRA)
    python kernels/bench.py --step                   a whole DDPO step (bench_step.py)
    python kernels/bench.py --generate --random      generation (bench_generate.py)
    python kernels/bench.py --gpu --out gpu.json     all that a GPU decides (bench_gpu.py)

`--help` after any of them lists its options.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages, read at import
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from kernels import bench_generate, bench_gpu, bench_head, bench_step  # noqa: E402

COMMANDS = {"--step": bench_step.main, "--generate": bench_generate.main,
            "--gpu": bench_gpu.main}


def main(argv: list[str]) -> None:
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        bench_head.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
