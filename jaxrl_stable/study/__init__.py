"""A study: a grid of settings, each run with many seeds, in few programs; and what came of it.

Running it:

    config.py      Study, Grid, Cell, ColdStart: what gin binds
    runs.py        one run as a pure function, of the library's own rollout, score and update
    choice.py      several objectives in one program
    programs.py    what is compiled, and when
    runner.py      lots of runs over devices
    records.py     results.jsonl and study.json, and whether they belong to the study
    viewer.py      samples, token by token
    replay.py      what replay does to the mismatch in the first rollouts

Reading it:

    analysis.py    curves, bands, collapse, one outcome a run
    survival.py    time to collapse
    comparison.py  paired tests between cells
    claims.py      the paper's claims as data
    verdicts.py    the rule, and each claim by it
    page.py        report.html, of panels.py and tables.py; markdown.py: claims.md
"""
