"""The report of a run: one HTML file that needs nothing else, and its plots as PNG files.

    python -m jaxrl_stable.report --workdir=DIR

Reads what a run wrote to its directory (`run`), draws its curves (`curves`), says what each metric
means and whether it is healthy (`explanations`), shows sampled responses token by token (`samples`)
and puts them on a page (`page`). Writes report.html and plots/*.png to the same directory.

`layout`, `drawing`, `text` and `samples` serve the page of a study (`jaxrl_stable.study`) as well.

The page holds what a language model wrote. All of it is escaped, there is no script, and a content
security policy forbids the page to load or run anything.
"""

from jaxrl_stable.report.page import write_report
from jaxrl_stable.report.run import Run, read_run

__all__ = ["Run", "read_run", "write_report"]
