"""The papers' claims, tested on the built-in world; CLAIMS.md shows the results.

    definitions   the statements, the runs that test each, and the rule by which it holds
    results       the numbers of every run, in results.jsonl, and statistics over seeds
    page          CLAIMS.md and its figures, from these numbers alone

    python -m claims run methods --seeds 3    does the missing runs, one after another
    python -m claims page                     writes CLAIMS.md
"""
