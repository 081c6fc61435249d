"""The results of a study: what its records say, and how they are shown.

Reads the files that a study left in its directory, without any code that runs a study.

    analysis.py    curves, bands, collapse, one outcome per run
    survival.py    time to collapse
    comparison.py  paired tests between cells
    claims.py      the paper's claims as data
    verdicts.py    the rule, and the verdict on each claim
    evidence.py    evidence.json: what replay does to the mismatch in the first rollouts
    page.py        report.html, from panels.py (plots) and tables.py
    markdown.py    claims.md
"""
