#!/usr/bin/env python3
"""Runs ctest and tells where its time went: the slowest tests, and the labels that outgrew their budget.

    timed_ctest.py BUDGET --phases TEXT CTEST-ARGUMENT...

BUDGET is the name of a row of BUDGETS, TEXT says how long what came before took. The report comes before ctest's closing
summary, which stays last. The exit status is ctest's: a slow machine is no failure.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree

# Seconds of all tests of a label together, on two AVX2 cores.
BUDGETS = {
    "release": {"unit": 280, "ranks": 260, "system": 1550, "levels": 60},
    "asan": {"unit": 520, "ranks": 360},
    "fuzz": {"fuzz": 60},
    "soak": {},
}
SLOWEST = 20


def labels_of(arguments):
    """{name: labels} of the tests that these arguments of ctest select. (Its JUnit report has no labels.)"""
    listing = subprocess.run(["ctest", *arguments, "--show-only=json-v1"], capture_output=True, text=True, check=True)
    properties = {test["name"]: test.get("properties", []) for test in json.loads(listing.stdout)["tests"]}
    return {name: next((entry["value"] for entry in entries if entry["name"] == "LABELS"), [])
            for name, entries in properties.items()}


def times_of(report):
    """(seconds, name) of each test that ran, the slowest first, by ctest's JUnit report."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return sorted(((float(case.get("time")), case.get("name")) for case in cases), reverse=True)


def told(times, labels, budgets):
    yield f"The {min(SLOWEST, len(times))} slowest of {len(times)} tests:"
    for seconds, name in times[:SLOWEST]:
        yield f"  {seconds:7.1f} s  {name}"
    for label, budget in budgets.items():
        spent = sum(seconds for seconds, name in times if label in labels[name])
        warning = "WARNING: " if spent > budget else ""
        yield f"{warning}label {label} took {spent:.0f} s of its budget of {budget} s"


def main():
    budget, _, phases, *arguments = sys.argv[1:]
    begin = time.monotonic()
    summary = []
    with tempfile.TemporaryDirectory(prefix="regroup-") as folder:
        report = os.path.join(folder, "ctest.xml")
        with subprocess.Popen(["ctest", *arguments, "--output-junit", report], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, text=True, errors="replace") as ctest:
            for line in ctest.stdout:
                if summary or re.match(r"\d+% tests passed", line):
                    summary.append(line)
                else:
                    print(line, end="", flush=True)
        if os.path.exists(report):
            print(*told(times_of(report), labels_of(arguments), BUDGETS[budget]), sep="\n")
    seconds = round(time.monotonic() - begin)
    print(f"Time so far: {phases}these tests {seconds // 60}:{seconds % 60:02}\n")
    print("".join(summary), end="", flush=True)
    return ctest.returncode


if __name__ == "__main__":
    sys.exit(main())
