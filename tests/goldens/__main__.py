"""`python -m tests.goldens DIR [--slug S] [--strict]`: runs every golden case below DIR.

Prints a line a case, `slug/case error tolerance ok|FAIL` (the error is the worst output's largest deviation over the
golden's standard deviation), and ends with `N passed, M failed`. A case whose slug has no adapter counts as failed
only with `--strict`. Exits with 1 if any failed.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from tests.goldens.runner import run_cases


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.goldens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, metavar="DIR", help="holds <slug>/<case>.safetensors or .json")
    parser.add_argument("--slug", help="only this paper's cases")
    parser.add_argument("--strict", action="store_true", help="a case without an adapter has failed")
    arguments = parser.parse_args()
    passed = failed = 0
    try:
        for outcome in run_cases(arguments.folder, arguments.slug):
            print(outcome, flush=True)
            passed += outcome.passed
            failed += not outcome.passed and (outcome.has_adapter or arguments.strict)
    except ValueError as error:
        parser.error(str(error))
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
