"""python -m jaxrl_stable.report --workdir=DIR"""

from collections.abc import Sequence

from absl import app, flags

from jaxrl_stable.report import write_report

# Here, where only this program comes by: the training program has its own flag of the same name.
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run to report on", required=True)


def main(_: Sequence[str]) -> None:
    try:
        path = write_report(WORKDIR.value)
    except (OSError, ValueError) as error:
        raise SystemExit(f"report: {error}") from None
    print(path)


if __name__ == "__main__":
    app.run(main)
