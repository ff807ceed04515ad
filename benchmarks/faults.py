"""Runs the tests that docs/reliability.md names beside its promises, the long ones too, and counts what they did.

    python benchmarks/faults.py            # all; hours
    python benchmarks/faults.py 7 16       # two promises
    python benchmarks/faults.py --write    # and put the counts into the page, with the revision they were counted at

The page says which tests show a promise, the tests say what they did (`record_property("flips", 1200)`): numbers of one
name are added up over the tests of a promise. Tests marked `gpu` are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import ROOT, describe_machine, table

PAGE = ROOT / "docs" / "reliability.md"
_ROW = re.compile(r"\| *(\d+) *\|([^|]*)\|([^|]*)\|([^|]*)\|([^|\n]*)\|")
_OUTCOMES = ("failed", "skipped", "passed")


@dataclass
class Promise:
    """A row of the page's table and what was counted for it."""

    number: int
    text: str
    tests: list[str]
    outcomes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def holds(self, test: str) -> bool:
        return any(re.fullmatch(rf"{re.escape(own)}(::.*|\[.*)?", test) for own in self.tests)

    def measured(self) -> str:
        outcomes = [f"{self.outcomes[name]:,} {name}" for name in _OUTCOMES if self.outcomes[name]]
        counts = [f"{number:,} {name.replace('_', ' ')}" for name, number in self.counts.items()]
        return "; ".join([", ".join(outcomes) or "no test", *counts])


def read_promises() -> list[Promise]:
    rows = _ROW.findall(PAGE.read_text())
    return [
        Promise(int(number), text.strip(), [f"tests/{test}" for test in re.findall(r"`([^`]+)`", tests)])
        for number, text, _, tests, _ in rows
    ]


def run_tests(tests: Sequence[str], report: Path) -> None:
    options = ["-m", "not gpu", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    code = subprocess.run([sys.executable, "-m", "pytest", "-n0", *options, *tests], cwd=ROOT).returncode
    if code > 1:
        raise SystemExit(f"pytest ended with code {code}: {PAGE} names tests that there are not, or it was interrupted")


def count(promises: Sequence[Promise], report: Path) -> None:
    for case in ElementTree.parse(report).iter("testcase"):
        test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        outcome = next((found for tag, found in _OUTCOME_OF.items() if case.find(tag) is not None), "passed")
        for promise in promises:
            if promise.holds(test):
                promise.outcomes[outcome] += 1
                promise.seconds += float(case.get("time", 0))
                for entry in case.iter("property"):
                    promise.counts[entry.get("name", "")] += int(entry.get("value", 0))


_OUTCOME_OF = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def write(promises: Sequence[Promise]) -> None:
    """Put what was counted, and at which revision, into the last column of the page's table."""
    git = ["git", "describe", "--always", "--exclude=*"]
    revision = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    measured = {promise.number: f"{promise.measured()} ({revision})" for promise in promises}

    def renew(row: re.Match[str]) -> str:
        number, *cells, old = row.groups()
        return f"| {number} |{'|'.join(cells)}| {measured.get(int(number), old.strip())} |"

    PAGE.write_text(_ROW.sub(renew, PAGE.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("promises", nargs="*", type=int, help="numbers of promises; all without any")
    parser.add_argument("--write", action="store_true", help="put the counts into docs/reliability.md")
    options = parser.parse_args()
    describe_machine("h5py", "anndata", "safetensors")
    promises = [p for p in read_promises() if p.number in options.promises or not options.promises]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run_tests(sorted({test for promise in promises for test in promise.tests}), report)
        count(promises, report)
    for promise in promises:
        result = {"promise": promise.number, **promise.outcomes, **promise.counts, "seconds": round(promise.seconds)}
        print(json.dumps(result), flush=True)
    rows = [(p.number, p.text, f"{p.seconds:,.0f} s", p.measured()) for p in promises]
    print("\n" + table(("#", "promise", "took", "measured"), rows))
    if options.write:
        write(promises)
    sys.exit(any(promise.outcomes["failed"] for promise in promises))


if __name__ == "__main__":
    main()
