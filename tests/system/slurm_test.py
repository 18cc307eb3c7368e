#!/usr/bin/env python3
"""slurm/*.sbatch on a real Slurm of three nodes: whatever happens to a job, the run ends as if nothing had happened."""

import os
import re
import signal
import unittest
from pathlib import Path

import harness
from harness import DATA, MODEL, PARENT_STEPS, SystemTest, step_directory
from slurm_cluster import NODES, BatchJob, Cluster, kill, missing_programs

REPOSITORY = Path(__file__).resolve().parents[2]
ALPHA = 8
STEPS = PARENT_STEPS * (1 + ALPHA)
TRAINING = [*DATA, "--precision", "fp32", "--warmup", 10, "--learning-rate", 0.1, "--evaluate-every", 100]
UPTRAINING = [*TRAINING, "--alpha", ALPHA, "--save-every", 50, "--progress-every", 50]
ENDLESS = [*MODEL[2:], *TRAINING, "--steps", 10**7, "--save-every", 10**6, "--progress-every", 10**4]
LAUNCHERS = {
    "srun": {"LAUNCHER": "srun", "LAUNCHER_FLAGS": "--wait=5"},  # where the others do not notice that a rank is gone
    "mpirun": {"LAUNCHER": "mpirun"},
}
# Both nodes are this machine, where Open MPI need not look for a network.
ENVIRONMENT = {**harness.ENVIRONMENT, "OMPI_MCA_btl_tcp_if_include": "lo", "OMPI_MCA_oob_tcp_if_include": "lo",
               "REGROUP_HOME": REPOSITORY, "DEVICE": "cpu"}
SECONDS = harness.SECONDS_TO_TRAIN


def reason_to_skip():
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root, which this is not"
    if missing := missing_programs():
        return f"Slurm is not installed (Debian: slurm-wlm munge): no {', '.join(missing)}"
    return None


class SlurmTest(SystemTest):
    @classmethod
    def setUpClass(cls):
        if reason := reason_to_skip():
            if "CI" in os.environ and os.geteuid() == 0:
                raise AssertionError(reason)
            raise unittest.SkipTest(reason)
        super().setUpClass()
        cls.home.chmod(0o755)
        cls.cluster = Cluster(cls.home / "slurm")
        cls.addClassCleanup(cls.cluster.stop)
        cls.cluster.start()
        # Fails five times, which takes a while.
        cls.hopeless = BatchJob(cls.cluster, ["--nodes=1", REPOSITORY / "slurm" / "uptrain.sbatch"], {
            **ENVIRONMENT, "CORPUS": "none", "PARENT": "none", "RUN": "none", "TRAINER": "false"}, cls.home)
        cls.parent = harness.trained_parent(cls.corpus)
        cls.undisturbed, _ = harness.trained("undisturbed", [
            "--uptrain", "--config", REPOSITORY / "configs" / "recipes" / "uptrain.cfg", "--init-from", cls.parent,
            "--kv-groups", 2, "--corpus", cls.corpus, *UPTRAINING])

    def setUp(self):
        super().setUp()
        self.jobs = []
        self.addCleanup(self.cancel_all)

    def cancel_all(self):
        for job in self.jobs:
            self.cluster.call("scancel", job.id, check=False)

    def submit(self, script, arguments=(), environment=None, nodes=2, flags=()):
        folder = self.folder / f"job-{len(self.jobs)}"
        folder.mkdir()
        job = BatchJob(self.cluster, [f"--nodes={nodes}", "--ntasks-per-node=1", *flags,
                                      REPOSITORY / "slurm" / script, *arguments],
                       {**ENVIRONMENT, "TRAINER": harness.options.trainer, **(environment or {})}, folder)
        job.run = folder / "run"
        self.jobs.append(job)
        return job

    def uptrain(self, launcher=None, flags=(), **environment):
        return self.submit("uptrain.sbatch", UPTRAINING, {
            "CORPUS": self.corpus, "PARENT": self.parent, "RUN": "run", "KV_GROUPS": 2,
            **(LAUNCHERS[launcher] if launcher else {}), **environment}, flags=flags)

    def uptrain_by_each_launcher(self, **how):
        return [self.uptrain(launcher, **how) for launcher in LAUNCHERS]

    def pretrain(self, arguments, launcher=None, flags=()):
        return self.submit("pretrain.sbatch", arguments, {
            "CORPUS": self.corpus, "RUN": "run", "MODEL": "tiny",
            **(LAUNCHERS[launcher] if launcher else {})}, flags=flags)

    def hold(self, jobs, begun=harness.saved_steps):
        """Stops the ranks of each job as soon as begun(its run), by default once it has a checkpoint, so that no job ends
        before something happens to it; the ranks of each."""
        ranks = {}

        def all_held():
            for job in jobs:
                if job not in ranks and begun(job.run):
                    ranks[job] = job.processes(harness.options.trainer)
                    for pid in ranks[job]:
                        kill(pid, signal.SIGSTOP)
            return len(ranks) == len(jobs)

        jobs[-1].wait_until(all_held, "all save", SECONDS)
        return ranks

    @staticmethod
    def release(ranks):
        for pid in sum(ranks.values(), []):
            kill(pid, signal.SIGCONT)

    def assert_ends_undisturbed(self, job, starts):
        self.assertEqual(job.wait_for_end(SECONDS), "COMPLETED", job.log())
        log = job.log()
        self.assertEqual(re.findall(r"\] Start (\d+) on node\S+: 2 ranks of 1 threads", log),
                         [str(start) for start in range(1, starts + 1)], log)
        self.assertIn("2 ranks = 2 data-parallel", log)
        self.assertEqual(len(re.findall(r"resuming .* at step", log)), starts - 1, log)
        self.assert_complete(job.run)
        for file in ("model.safetensors", "optimizer.safetensors"):
            self.assertEqual(harness.digest(step_directory(job.run, STEPS) / file),
                             harness.digest(step_directory(self.undisturbed, STEPS) / file), f"{file}\n{log}")
        for kind in ("train", "evaluation"):
            self.assertEqual(harness.metrics(job.run, kind), harness.metrics(self.undisturbed, kind))
        self.assertEqual(list(job.cwd.glob("*.failures")), [])

    def test_completion(self):
        for job in self.uptrain_by_each_launcher():
            self.assert_ends_undisturbed(job, starts=1)

    def test_signals_to_the_script(self):
        jobs = [(job, name) for name in ("USR1", "TERM") for job in self.uptrain_by_each_launcher()]
        ranks = self.hold([job for job, _ in jobs])
        for job, name in jobs:
            job.signal(name)
        self.release(ranks)
        for job, name in jobs:
            self.assert_ends_undisturbed(job, starts=2)
            self.assertRegex(job.log(), rf"Got SIG{name}(?s:.)*saved at step \d+(?s:.)*Exit code 75 after")

    def test_killed_rank(self):
        jobs = self.uptrain_by_each_launcher()
        ranks = self.hold(jobs)
        for job, rank in zip(jobs, (1, 0)):
            kill(ranks[job][rank])
        self.release(ranks)
        for job in jobs:
            self.assert_ends_undisturbed(job, starts=2)

    def test_failed_node(self):
        # Of one job the second node, and of the other the one that its script runs on.
        failing = NODES[1]
        jobs = [self.uptrain(launcher, flags=[f"--nodelist={','.join(nodes)}"])
                for launcher, nodes in zip(LAUNCHERS, (NODES[:2], NODES[1:]))]
        ranks = self.hold(jobs)
        self.cluster.fail_node(failing)
        self.release(ranks)
        for job in jobs:
            job.wait_until(lambda job=job: job.field("JobState") == "PENDING", "it waits for the node", SECONDS)
        self.cluster.start_node(failing)
        for job in jobs:
            self.assert_ends_undisturbed(job, starts=2)

    def test_cancellation_and_time_limit(self):
        # Slurm looks after limits every 30 seconds, and signals up to a minute earlier than told.
        jobs = [self.pretrain(ENDLESS, launcher, ["--time=1", "--signal=B:USR1@30"]) for launcher in LAUNCHERS]
        # They train for nothing until then: their ranks are stopped.
        ranks = self.hold(jobs, lambda run: harness.size_of(run / "metrics.jsonl"))
        for job in jobs:
            job.wait_until(lambda job=job: "Got SIGUSR1" in job.log(), "it is signalled before the time limit", SECONDS)
        self.release(ranks)
        for job in jobs:
            job.wait_until(lambda job=job: job.field("Restarts") == "1", "it is put back at the time limit", SECONDS)
            self.assertRegex(job.log(), r"Got SIGUSR1(?s:.)*saved at step \d+(?s:.)*Exit code 75 after")
        for job in jobs:
            size = harness.size_of(job.run / "metrics.jsonl")
            job.wait_until(lambda job=job, size=size: harness.size_of(job.run / "metrics.jsonl") > size, "it goes on",
                           SECONDS)
            self.cluster.call("scancel", job.id)
        for job in jobs:
            self.assertEqual(job.wait_for_end(SECONDS), "CANCELLED", job.log())
            self.assertEqual(job.field("Restarts"), "1")
            self.assertEqual(job.processes(harness.options.trainer), [])

    def test_wrong_input(self):
        told = r"nowhere.*\n(?s:.)*Not put back into the queue: put right what is said above"
        jobs = [(job, told) for job in self.uptrain_by_each_launcher(PARENT="nowhere")]
        jobs += [(self.uptrain(**{name: value}), told) for name, value, told in (
            ("TRAINER", "nowhere", "There is no program nowhere: set TRAINER"),
            ("LAUNCHER", "nowhere", "LAUNCHER is 'nowhere': srun, mpirun"),
            ("REGROUP_HOME", "nowhere", "nowhere is no checkout of Regroup: set REGROUP_HOME"),
            ("DEVICE", "", "has no GPUs: submit it with --gpus-per-node=8, or with DEVICE=cpu"))]
        for job, told in jobs:
            self.assertEqual(job.wait_for_end(SECONDS), "FAILED", job.log())
            self.assertEqual(job.field("Restarts"), "0", job.log())
            self.assertEqual(job.field("ExitCode"), f"{harness.USER_ERROR}:0", job.log())
            self.assertRegex(job.log(), told)

    def test_endless_failure(self):
        self.assertEqual(self.hopeless.wait_for_end(SECONDS), "FAILED")
        self.assertEqual(self.hopeless.field("Restarts"), "4")
        self.assertIn("Not put back into the queue: 5 failures in a row", self.hopeless.log())

    def test_pretraining(self):
        job = self.pretrain([*MODEL[2:], *TRAINING, "--steps", PARENT_STEPS])
        self.assertEqual(job.wait_for_end(SECONDS), "COMPLETED", job.log())
        self.assertEqual(job.field("Restarts"), "0", job.log() + self.cluster.logs())
        self.assertEqual(harness.losses(job.run), harness.losses(self.parent))

    def test_preparing_data(self):
        for _ in range(2):  # the second finds it complete
            job = self.submit("prepare.sbatch", ["--heldout-fraction", 0.1], {
                "INPUT": self.data / "text.jsonl", "TOKENIZER": self.data / "tokenizer.model",
                "CORPUS": self.folder / "corpus"})
            self.assertEqual(job.wait_for_end(SECONDS), "COMPLETED", job.log())
            self.assertEqual(job.field("Restarts"), "0", job.log() + self.cluster.logs())
            self.assertEqual(harness.tree(self.folder / "corpus"), harness.tree(self.corpus))
        self.assertIn("is complete already", job.log())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: exit(1))  # so that the cluster is taken down
    harness.main()
