"""Prints the table of faults after the tests of it have run."""

from collections import Counter

import pytest

_COHORTS = "cohorts"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each fault: how it was noticed, and how it went with each cohort."""
    rows: dict[str, dict[str, str]] = {}
    noticed: dict[str, str] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            facts = dict(report.user_properties)
            if "fault" in facts and report.when == "call":
                rows.setdefault(facts["fault"], {})[facts["cohort"]] = "holds" if outcome == "passed" else "FAILS"
                noticed[facts["fault"]] = facts.get("noticed", noticed.get(facts["fault"], ""))
    if not rows:
        return
    cohorts = sorted({cohort for row in rows.values() for cohort in row})
    terminalreporter.section(f"{len(rows)} faults")
    width = max(map(len, rows)) + 2
    terminalreporter.write_line(f"{'fault':{width}}" + "".join(f"{cohort:>9}" for cohort in cohorts) + "  noticed as")
    for fault, row in rows.items():
        cells = "".join(f"{row.get(cohort, '-'):>9}" for cohort in cohorts)
        terminalreporter.write_line(f"{fault:{width}}{cells}  {noticed[fault]}")
    counts = Counter(result for row in rows.values() for result in row.values())
    terminalreporter.write_line(", ".join(f"{number} {result}" for result, number in counts.items()))
