"""Fail unless the suites that need servers have run: `python .ci/required.py JUNIT_XML`."""

import sys
from xml.etree import ElementTree

SERVERS = {"postgresql": 20, "redis": 1}
"""Part of a test's name → fewest tests of that kind that must have passed."""


def passed(report: str) -> list[str]:
    """Names of the tests that ran to their end."""
    cases = ElementTree.parse(report).iter("testcase")
    return [f"{case.get('classname')}.{case.get('name')}".lower() for case in cases if case.find("skipped") is None]


def main(report: str) -> int:
    """Exit code 1 where a server's suite was skipped."""
    names = passed(report)
    counts = {server: sum(server in name for name in names) for server in SERVERS}
    missing = [server for server, fewest in SERVERS.items() if counts[server] < fewest]
    sys.stdout.write(f"tests by server: {counts}\n")
    if missing:
        sys.stderr.write(f"these suites were skipped: {', '.join(missing)}\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
