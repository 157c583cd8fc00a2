"""docs/results.md, from benchmarks/results.csv."""
