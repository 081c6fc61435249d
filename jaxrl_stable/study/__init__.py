"""A study: a grid of cells, each run with many seeds, in as few programs as possible.

    config.py      Study, Grid, Cell, ColdStart, Collapse: the configuration that gin binds
    runs.py        one run as a pure function, built from the library's rollout, score and update
    choice.py      several objectives in one program
    programs.py    what is compiled, and when
    runner.py      groups of runs, spread over devices
    records.py     results.jsonl and study.json, and checks that they match the study
    samples.py     sampled responses for the report, token by token
    tabular.py     gradient estimators measured exactly, by enumeration
    results/       what the records say: collapse, tests, claims, report

Running a study imports nothing from `results`.
"""
