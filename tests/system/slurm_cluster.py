"""A Slurm of three nodes on this machine: munge, slurmctld and three slurmd, with all they have in one folder."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "srun"]
NODES = ["node1", "node2", "node3"]
SECONDS_TO_START = 60

# Nodes have more processors than the machine, so that several jobs can run at once. cred_expire is also how long a
# requeued job waits, and cannot be less than 5 seconds.
CONFIGURATION = """
ClusterName=regroup
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
MessageTimeout=10
SlurmdTimeout=8
KillWait=3
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs():
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """Started by start(), ended with all its jobs by stop(), which may be called at any time."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.daemons = {}
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.environment["PATH"] += os.pathsep + "/usr/sbin"

    def start(self):
        munge = self.folder / "munge"
        for path in [munge, self.folder / "state", *(self.folder / f"{kind}-{node}" for node in NODES
                                                     for kind in ("spool", "tmp"))]:
            path.mkdir(parents=True)
        for path in (self.folder, munge):  # munge wants its socket to be within everybody's reach
            path.chmod(0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        controller_port, *ports = free_ports(1 + len(NODES))
        nodes = "\n".join(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8"
                          for node, port in zip(NODES, ports))
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(
            folder=self.folder, host=host, controller_port=controller_port, nodes=nodes))

        # --force: complaints about the folders above are warnings.
        self.start_daemon("munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
                          f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
                          "--num-threads=10")
        self.wait_until(lambda: (munge / "socket").exists(), "munged makes its socket")
        self.start_daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_until(lambda: all(self.node_state(node) == "idle" for node in NODES), "all nodes are idle")

    # --pdeathsig: it ends with the test, even where the test is killed.
    def start_daemon(self, name, *arguments, key=None):
        with open(self.folder / f"{key or name}.out", "ab") as output:
            self.daemons[key or name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", name, *arguments], stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, env=self.environment, cwd=self.folder, start_new_session=True)

    def start_node(self, node):
        self.start_daemon("slurmd", "-D", "-N", node, key=node)

    def node_state(self, node):
        return self.call("sinfo", "--noheader", f"--nodes={node}", "--format=%T", check=False).strip()

    def call(self, *command, check=True, **how):
        """Runs one of Slurm's commands; what it printed."""
        outcome = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                                 env={**self.environment, **how.pop("env", {})}, check=False, **how)
        if check and outcome.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {outcome.stdout}{outcome.stderr}\n{self.logs()}")
        return outcome.stdout

    def wait_until(self, condition, what, seconds=SECONDS_TO_START):
        end = time.monotonic() + seconds
        while not condition():
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    raise AssertionError(f"{name} has ended\n{self.logs()}")
            if time.monotonic() > end:
                raise AssertionError(f"in {seconds} s it did not happen that {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self):
        """The ends of the daemons' logs, for a message."""
        files = sorted(self.folder.glob("*.out"))
        return "".join(f"---- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    # Pids and environments of the processes of this cluster's jobs.
    def job_processes(self):
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        own = {daemon.pid for daemon in self.daemons.values()} | {os.getpid()}
        for path in Path("/proc").glob("[0-9]*/environ"):
            pid = int(path.parent.name)
            try:
                variables = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in variables and pid not in own:
                yield pid, variables

    def fail_node(self, node):
        """As if its power failed: slurmd and everything of the node is killed."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()
        mark = f"SLURMD_NODENAME={node}".encode()
        tasks = [pid for pid, variables in self.job_processes() if mark in variables]
        steps = {parent_of(pid) for pid in tasks}
        for pid in [*(step for step in steps if name_of(step) == "slurmstepd"), *tasks]:
            kill(pid)

    def stop(self):
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        self.daemons.clear()
        # Those that a dying process has just started are found the next time.
        while left := [pid for pid, _ in self.job_processes()]:
            for pid in left:
                kill(pid)
            time.sleep(0.05)


def status_of(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def parent_of(pid):
    match = re.search(r"^PPid:\s*(\d+)", status_of(pid), re.MULTILINE)
    return int(match.group(1)) if match else 0


def name_of(pid):
    match = re.search(r"^Name:\s*(.*)", status_of(pid), re.MULTILINE)
    return match.group(1) if match else ""


def kill(pid, number=signal.SIGKILL):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


class BatchJob:
    """A job that was submitted to a cluster."""

    def __init__(self, cluster, words, environment, cwd):
        self.cluster = cluster
        self.cwd = Path(cwd)
        self.id = cluster.call("sbatch", "--parsable", "--output=%j.log", *map(str, words), cwd=cwd,
                               env={name: str(value) for name, value in environment.items()}).strip()

    def field(self, name):
        """A field of `scontrol show job`."""
        text = self.cluster.call("scontrol", "--oneliner", "show", "job", self.id)
        return re.search(rf"\b{name}=(\S*)", text).group(1)

    def log(self):
        path = self.cwd / f"{self.id}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_until(self, condition, what, seconds):
        try:
            self.cluster.wait_until(condition, what, seconds)
        except AssertionError as error:
            text = self.cluster.call("scontrol", "show", "job", self.id, check=False)
            raise AssertionError(f"job {self.id}: {error}\n---- job\n{text}---- its log\n{self.log()}") from None

    def wait_for_end(self, seconds):
        """The state in which the job ended, once Slurm has cleaned up after it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        self.wait_until(lambda: self.field("JobState") in ended, "it ends", seconds)
        return self.field("JobState")

    def signal(self, name):
        """To the batch script alone, as --signal=B: does it."""
        self.cluster.call("scancel", f"--signal={name}", "--batch", self.id)

    def processes(self, program):
        """Pids of the job's processes that run a program."""
        mark = f"SLURM_JOB_ID={self.id}".encode()
        pids = [pid for pid, variables in self.cluster.job_processes() if mark in variables]
        return sorted(pid for pid in pids if executable_of(pid) == Path(program).resolve())


def executable_of(pid):
    try:
        return Path(f"/proc/{pid}/exe").resolve()
    except OSError:
        return None
