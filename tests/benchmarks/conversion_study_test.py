#!/usr/bin/env python3
"""What conversion_study.py decides without training: steps, cases, table, goals and plots of a made-up study."""

import json
import tempfile
import unittest
import xml.dom.minidom
from fractions import Fraction
from pathlib import Path

import conversion_study
import conversion_table

PARENT_STEPS = 400
ALPHAS = {"0.0125": 5, "0.05": 20}


def write_run(folder, losses, first="converted"):
    """Losses at alpha 0 and at each of ALPHAS."""
    folder.mkdir(parents=True)
    records = [("parent", PARENT_STEPS, 4.0), (first, PARENT_STEPS, losses[0]),
               *(("held-out", PARENT_STEPS + steps, loss) for steps, loss in zip(ALPHAS.values(), losses[1:]))]
    lines = [json.dumps({"kind": "evaluation", "name": name, "step": step, "loss": loss})
             for name, step, loss in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr', encoding="utf-8")


class EvaluationGridTest(unittest.TestCase):
    def test_hits_every_alpha_where_the_parent_allows_it(self):
        alphas = [Fraction(text) for text in ("0.005", "0.0125", "0.025", "0.05", "0.1")]
        every, points = conversion_study.evaluation_grid(20000, alphas)
        self.assertEqual(every, 50)
        self.assertEqual(list(points.values()), [100, 250, 500, 1000, 2000])

    def test_takes_the_nearest_step_that_is_evaluated(self):
        every, points = conversion_study.evaluation_grid(1050, [Fraction("0.01"), Fraction("0.1")])
        self.assertEqual(every, 10)
        self.assertEqual(list(points.values()), [10, 110])

    def test_refuses_what_would_not_be_measured_or_take_for_ever(self):
        for parent_steps, alpha in ((99, "0.01"), (10007, "0.1")):
            with self.assertRaises(conversion_study.StudyError):
                conversion_study.evaluation_grid(parent_steps, [Fraction(alpha)])


class CasesTest(unittest.TestCase):
    def test_one_group_is_neither_chosen_nor_uneven(self):
        found = list(conversion_study.cases(["unconverted", "mean", "mean+similarity"], [1, 2], [7], 8))
        self.assertEqual(found, [("unconverted", 8, 7), ("mean", 1, 7), ("mean", 2, 7), ("mean+similarity", 2, 7)])

    def test_options_of_a_method(self):
        self.assertEqual(conversion_study.pooling_options("calibrated+similarity+uneven", 4),
                         ["--pooling", "calibrated", "--grouping", "similarity", "--kv-budget", "uneven",
                          "--calibration-batches", 4])
        for wrong in ("median", "mean+luck"):
            with self.assertRaises(conversion_study.StudyError):
                conversion_study.pooling_options(wrong, None)


class TableTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.work = Path(folder.name)
        settings = {"parent_steps": PARENT_STEPS, "heads": 8, "alphas": ALPHAS, "evaluation_samples": 64}
        (self.work / "study.json").write_text(json.dumps(settings), encoding="utf-8")

    def write(self, *methods, seeds=(1, 2)):
        return conversion_table.write(self.work, list(methods), [1], list(seeds), conversion_study.cases)

    def run_folder(self, method, seed):
        return self.work / "runs" / conversion_table.run_name(method, 1, seed)

    def test_means_deviations_and_goals(self):
        write_run(self.work / "control", [4.0, 3.99, 3.9], first="held-out")
        for seed, shift in ((1, -0.01), (2, 0.01)):
            write_run(self.run_folder("mean", seed), [6.0 + shift, 5.0, 4.2])
            write_run(self.run_folder("calibrated", seed), [4.1 + shift, 4.03, 4.0])
        text = self.write("mean", "calibrated")
        self.assertIn("| calibrated | 4.1000 +- 0.0141 | 4.0300 +- 0.0000 | 4.0000 +- 0.0000 | 95.0% |", text)
        self.assertIn("| *parent, trained on* | 4.0000 | 3.9900 | 3.9000 | |", text)
        self.assertIn("HOLDS: calibrated at alpha 0 closes 95.00%", text)
        self.assertIn("HOLDS: calibrated at alpha 0 (4.1000) is better than mean at alpha 0.05 (4.2000)", text)
        self.assertIn("DOES NOT HOLD: calibrated at alpha 0.0125 recovers 98.50%", text)
        self.assertIn("98.01% of that to the parent trained on for as long", text)
        self.assertNotIn("Missing", text)
        results = json.loads((self.work / "results.json").read_text(encoding="utf-8"))
        self.assertEqual(results["runs"][0]["losses"], {"0.0125": 5.0, "0.05": 4.2, "0": 5.99})
        for name in ("loss.svg", "loss-zoom.svg"):
            drawing = xml.dom.minidom.parse(str(self.work / name))
            self.assertEqual(len(drawing.getElementsByTagName("polyline")), 3)

    def test_says_what_is_missing(self):
        write_run(self.run_folder("mean", 1), [6.0, 5.0])
        text = self.write("mean", "calibrated")
        self.assertIn("| mean | 6.0000 | 5.0000 | - | 0.0% |", text)
        self.assertIn("| calibrated | - | - | - | - |", text)
        self.assertIn("cannot be judged: calibrated or mean at alpha 0 is missing", text)
        self.assertIn("(5 runs): control, mean-g1-s1, calibrated-g1-s1, mean-g1-s2, calibrated-g1-s2.", text)

    def test_of_nothing(self):
        self.assertIn("Missing", self.write("mean"))
        self.assertIn("no data", (self.work / "loss.svg").read_text(encoding="utf-8"))
        (self.work / "study.json").unlink()
        with self.assertRaises(conversion_table.NoStudy):
            self.write("mean")


if __name__ == "__main__":
    unittest.main()
