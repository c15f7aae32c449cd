"""The laboratory: suites of configs, trained under one budget, read with their uncertainty.

suite     a list of (name, config diff) -> runs
parts     what the runs share and do not train: tokenizer, language models, a small CLIP
queue     runs on the devices at hand, one process each
worker    one run
results   results.jsonl: all that was found, a line a run or measurement
speeds    training and sampling of every row, timed in turns
readings  numbers with intervals: over seeds, at equal steps, at equal FLOPs
claims    what the paper says, and which readings speak of it
report    docs/study.md of results.jsonl
full      the published runs: steps, device-hours, commands
"""
