"""Measure how truthful a model is: benchmarks, the built-in world, tables and the report."""

from evaluation.benchmarks import chair, mmhal, pope
from evaluation.blind import blind_baselines
from evaluation.builtin import compare_runs, measure_world, read_scenes
from evaluation.memory import SHAPES, memory_estimate, memory_table
from evaluation.metrics import (
    columns, comparison, read_results, table, with_intervals, write_results,
)
from evaluation.preview import show_rows
from evaluation.report import save_pairs, write_report

__all__ = [
    "SHAPES", "blind_baselines", "chair", "columns", "compare_runs", "comparison", "measure_world",
    "memory_estimate", "memory_table", "mmhal", "pope", "read_results", "read_scenes", "save_pairs",
    "show_rows", "table", "with_intervals", "write_report", "write_results",
]
