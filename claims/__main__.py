"""python -m claims run NAME...: do the missing runs; python -m claims page: write CLAIMS.md."""

import argparse
import re
import sys
import time

from claims.definitions import CLAIMS, Claim
from claims.page import write_page
from claims.results import do_run, read_runs


def missing(claim: Claim, seeds: int) -> list[tuple[str, int]]:
    """Return the (options, seed) of a claim that are not in the results, seed by seed."""
    done = read_runs()
    wanted = [(options, seed) for seed in range(seeds)
              for alternatives in claim.arms.values() for options in alternatives]
    return [each for each in wanted if each not in done]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m claims", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the missing runs of claims")
    run.add_argument("names", nargs="+", choices=[*CLAIMS, "all"], metavar="NAME",
                     help=f"{', '.join(CLAIMS)}, or all")
    run.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 [5]")
    run.add_argument("--only", default="", help="regular expression for the command lines to run")
    run.add_argument("--dry_run", action="store_true", help="list the runs and stop")
    commands.add_parser("page", help="write CLAIMS.md from results.jsonl")
    found = parser.parse_args(arguments)
    if found.command == "page":
        write_page()
        return 0
    names = CLAIMS if "all" in found.names else found.names
    for name in names:
        for options, seed in missing(CLAIMS[name], found.seeds):
            if not re.search(found.only, options):
                continue
            print(f"{name}: {options} --seed {seed}", flush=True)
            if not found.dry_run:
                started = time.perf_counter()
                do_run(options, seed)
                print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, OSError, ValueError, re.error) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
