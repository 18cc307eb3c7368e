#!/usr/bin/env python3
"""`trainer --doctor` under the launcher: a healthy job passes; what would make a run slow or fragile is found, with its
fix, and exit code 2; the run directory is left as it was."""

import os
import shutil
import signal
import subprocess
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import harness
import slurm_test
from slurm_cluster import Cluster

CORES = len(os.sched_getaffinity(0))
SECONDS = 120
HUNG = 76


class DoctorTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="regroup-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def doctor(self, *arguments, ranks=1, code=0, threads=None):
        threads = threads or max(CORES // ranks, 1)
        outcome = harness.run(["--doctor", "--threads", threads, *arguments], ranks, SECONDS)
        self.assertEqual(outcome.code, code, outcome)
        return outcome.stdout

    def assert_bad(self, report, subject, found, fix):
        """A bad finding on the subject, and its fix on the lines below."""
        self.assertRegex(report, rf"(?m)^BAD +{subject} +.*{found}.*\n +costs: .*\n +fix: .*{fix}")
        self.assertRegex(report, r"(?m)^a run would suffer: ")

    def script(self, text):
        """A program that stands in for the trainer, and calls it as $TRAINER."""
        path = self.folder / "script"
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        environment = mock.patch.dict(os.environ, {"TRAINER": harness.options.trainer})
        trainer = mock.patch.object(harness.options, "trainer", str(path))
        for patch in (environment, trainer):
            patch.start()
            self.addCleanup(patch.stop)


class HealthyTest(DoctorTest):
    def test_one_rank(self):
        report = self.doctor()
        self.assertRegex(report, r"(?m)^ok +launcher +none")
        self.assertRegex(report, r"(?m)^ok +signals +SIGUSR1 to this process reaches the rank")
        self.assertRegex(report, r"(?m)^note +directory +not tested")
        self.assertIn("nothing found that a run would suffer from", report)

    @unittest.skipIf(CORES < 2, "two ranks need two cores")
    def test_two_ranks(self):
        run = self.folder / "run"
        run.mkdir()
        (run / "mine").write_text("kept")
        report = self.doctor("--run", run, ranks=2)
        self.assertRegex(report, r"(?m)^ok +launcher +mpirun, PMIx \d")
        self.assertRegex(report, r"(?m)^ok +map +2 ranks on 1 node")
        self.assertRegex(report, r"(?m)^ok +signals +SIGUSR1 to \S+ \(process \d+\) reaches every rank")
        self.assertRegex(report, r"(?m)^ok +directory +\S+/run.*/s written and flushed")
        self.assertRegex(report, r"(?m)^ok +device +processors: level \w+: \w+ .*GFLOP/s.*GB/s for sums of 64 MiB over 2 ranks")
        self.assertEqual(os.listdir(run), ["mine"])

    def test_missing_directory_stays_missing(self):
        self.doctor("--run", self.folder / "a" / "b", "--model", "tiny")
        self.assertEqual(os.listdir(self.folder), [])


class CoresTest(DoctorTest):
    def test_threads_on_one_core(self):
        flags = harness.options.mpiexec.replace("--bind-to none", "--bind-to core:overload-allowed")
        with mock.patch.object(harness.options, "mpiexec", flags):
            report = self.doctor(ranks=2, threads=4, code=harness.USER_ERROR)
        self.assert_bad(report, "cores", "4 threads on 1 core", r"mpirun --map-by ppr:2:node:PE=\d+ --bind-to core")

    def test_idle_cores(self):
        if CORES < 2:
            self.skipTest("one core is never idle")
        self.assert_bad(self.doctor(threads=1, code=harness.USER_ERROR), "cores", f"1 thread on {CORES} cores",
                        f"--threads {CORES}")


class LauncherTest(DoctorTest):
    def test_ranks_that_are_alone(self):
        step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
        with mock.patch.dict(os.environ, step):
            self.assert_bad(self.doctor(code=harness.USER_ERROR), "launcher", "srun started 4 tasks, but each is alone",
                            "srun --mpi=pmix")
        with mock.patch.dict(os.environ, {**step, "SLURM_PROCID": "2"}):
            self.assertEqual(self.doctor(code=harness.USER_ERROR), "")  # one of them tells
        with mock.patch.dict(os.environ, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}):
            self.assert_bad(self.doctor(code=harness.USER_ERROR), "launcher", "one rank alone in Slurm job 7",
                            "srun --mpi=pmix trainer ..., or mpirun")

    def test_script_that_the_signal_would_end(self):
        self.script('"$TRAINER" "$@"\nexit $?')
        report = self.doctor(ranks=2, code=harness.USER_ERROR)
        self.assert_bad(report, "signals", r"SIGUSR1 would end script \(process \d+\)", "exec")

    def test_script_that_replaces_itself(self):
        self.script('exec "$TRAINER" "$@"')
        self.assertRegex(self.doctor(ranks=2, code=0 if CORES > 1 else harness.USER_ERROR),
                         r"(?m)^ok +signals +SIGUSR1 to \S+ \(process \d+\) reaches every rank")


class HangTest(DoctorTest):
    def test_stopped_rank(self):
        arguments = ["--doctor", "--threads", 1, "--run", self.folder / "run", "--hang-timeout", 4]
        # Where the watchdogs leave what they agreed on.
        with mock.patch.dict(os.environ, {"TMPDIR": str(self.folder)}), harness.Job(arguments, ranks=2) as job:
            self.assertTrue(job.wait_for(lambda: "signals ..." in job.output(job.stderr)), job.output(job.stderr))
            stopped = job.rank_pids()[1]
            job.kill(stopped, signal.SIGSTOP)
            outcome = job.finish(SECONDS)
        self.assertEqual(outcome.code, HUNG, outcome)
        self.assertRegex(outcome.stderr, rf"rank 1 .*{stopped}")


class SlurmTest(DoctorTest):
    @classmethod
    def setUpClass(cls):
        if reason := slurm_test.reason_to_skip():
            if "CI" in os.environ and os.geteuid() == 0:
                raise AssertionError(reason)
            raise unittest.SkipTest(reason)
        home = tempfile.mkdtemp(prefix="regroup-")
        cls.addClassCleanup(shutil.rmtree, home, ignore_errors=True)
        os.chmod(home, 0o755)
        cls.cluster = Cluster(Path(home) / "slurm")
        cls.addClassCleanup(cls.cluster.stop)
        cls.cluster.start()

    def srun(self, *arguments):
        """Exit code and report of a job step."""
        environment = {**slurm_test.ENVIRONMENT, **self.cluster.environment}
        outcome = subprocess.run(["srun", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                 timeout=SECONDS, check=False, cwd=self.folder,
                                 env={name: str(value) for name, value in environment.items()})
        return outcome.returncode, outcome.stdout + outcome.stderr

    @unittest.skipIf(CORES < 2, "two ranks need two cores")
    def test_ranks_of_two_nodes(self):
        code, report = self.srun("--nodes=2", "--ntasks=2", "--mpi=pmix", harness.options.trainer, "--doctor",
                                 "--threads", str(CORES // 2), "--run", str(self.folder / "run"))
        self.assertEqual(code, 0, report)
        self.assertRegex(report, r"(?m)^ok +launcher +srun, PMIx \d\S*, Slurm job \d+")
        self.assertRegex(report, r"(?m)^ok +signals +SIGUSR1 to step \d+\.0 \(scancel\) reaches every rank")
        self.assertEqual(os.listdir(self.folder), [])

    def test_rank_without_launcher(self):
        code, report = self.srun("--nodes=2", "--ntasks-per-node=1", "bash", "-c",
                                 f'[[ $SLURM_PROCID == 1 ]] || exec env -u SLURM_STEP_ID "{harness.options.trainer}" '
                                 "--doctor")
        self.assertNotEqual(code, 0, report)
        self.assert_bad(report, "launcher", r"one rank alone in Slurm job \d+, which has 2 tasks", "mpirun trainer")


class DirectoryTest(DoctorTest):
    def test_where_nothing_can_be_written(self):
        (self.folder / "file").write_text("mine")
        for run in (self.folder / "file", self.folder / "file" / "run", Path("/proc/regroup-run")):
            with self.subTest(run.name):
                report = self.doctor("--run", run, ranks=2, code=harness.USER_ERROR)
                self.assert_bad(report, "directory", run.name, "--run")
        self.assertEqual((self.folder / "file").read_text(), "mine")

    @unittest.skipIf(os.geteuid() == 0, "root may write anywhere")
    def test_read_only(self):
        run = self.folder / "run"
        run.mkdir(mode=0o555)
        report = self.doctor("--run", run, code=harness.USER_ERROR)
        self.assert_bad(report, "directory", "cannot write into .*Permission denied", "--run")


class LimitsTest(DoctorTest):
    def test_open_files(self):
        self.script('ulimit -n 100\nexec "$TRAINER" "$@"')
        self.assert_bad(self.doctor(code=harness.USER_ERROR), "limits", "rank 0 may open 100 files", "ulimit -n")

    def test_file_size(self):
        self.script('ulimit -f 400000\nexec "$TRAINER" "$@"')
        self.assert_bad(self.doctor("--model", "base", code=harness.USER_ERROR), "limits", "files of 410 MB at most",
                        "ulimit -f unlimited")


if __name__ == "__main__":
    harness.main()
