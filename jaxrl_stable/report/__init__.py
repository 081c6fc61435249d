"""The report of a run: one self-contained HTML file, and its plots as PNG files.

    python -m jaxrl_stable.report --workdir=DIR

Reads the files of a run (`run`), draws its curves (`curves`), explains each metric and whether it
is healthy (`explanations`), shows sampled responses token by token (`samples`), and puts all of it
on a page (`page`). Writes report.html and plots/*.png to the directory of the run.

The page of a study (`jaxrl_stable.study`) also uses `layout`, `drawing`, `text` and `samples`.

The page contains text from a language model. All of this text is escaped, the page has no scripts,
and a content security policy forbids loading or running anything.
"""

from jaxrl_stable.report.page import write_report
from jaxrl_stable.report.run import Run, read_run

__all__ = ["Run", "read_run", "write_report"]
