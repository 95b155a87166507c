"""The server under attack: one process with SQLite, or a cluster; what it takes of memory and disk."""

import os
import pathlib
import shlex
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/faults"))

from cluster import Cluster, Coar, run  # noqa: E402
from proxy import free_ports  # noqa: E402

MIB = 1 << 20
# One image at a time. On a CPU a step takes longer the more rows it has: with the default of 64 an image beside another tenant's takes
# as long as a full batch, and no figure says whether turns are taken fairly.
SERVE = shlex.split(os.environ.get("SERVE", "--rows 2"))
# The attacker's webhooks go to a receiver on this machine.
OPTIONS = ("--webhook-allow-private", *SERVE)


def size(folder: pathlib.Path) -> int:
    """Bytes of all files; some may be removed meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                pass
    return total


class Single:
    """One process, SQLite and a folder. Without `keys`, one that lets in every caller on this machine."""

    def __init__(self, folder: pathlib.Path, keys: bool = True, more=OPTIONS):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.server = Coar("server", folder, "all", free_ports(1)[0], more=more)
        self.keys = {}
        if keys:
            environment = {"COAR_DATA": str(folder / "server")}
            for tenant in ("attacker", "neighbour"):
                self.keys[tenant] = run(["keys", "create", "--tenant", tenant, "--scopes", "read,generate,train"], environment)

    @property
    def processes(self) -> list[Coar]:
        return [self.server]

    @property
    def ports(self) -> list[int]:
        return [self.server.port]

    def start(self) -> None:
        self.server.start()
        self.server.wait_ready()

    def disk(self) -> int:
        return size(self.folder / "server")

    def stop(self) -> None:
        self.server.kill()


class Limited:
    """Gives a worker half a core, by a control group. A worker that trains uses all that it gets, and in production has a machine of
    its own; on two cores API processes, database and object store would compete with two workers for every cycle."""

    ROOT = pathlib.Path("/sys/fs/cgroup")

    def __init__(self, worker: Coar):
        legacy = self.ROOT / "cpu"
        self.group = (legacy if legacy.is_dir() else self.ROOT) / f"coar-neighbours-{worker.child.pid}"
        # A period of 10 ms: a generation takes many of them.
        files = {"cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": "5000"} if legacy.is_dir() else {"cpu.max": "5000 10000"}
        try:
            self.group.mkdir()
            for name, value in files.items():
                (self.group / name).write_text(value)
            (self.group / "cgroup.procs").write_text(str(worker.child.pid))
        except OSError as error:
            print(f"note: {worker.name} cannot be limited to half a core ({error}): the limits may be exceeded", flush=True)
            self.remove()

    def remove(self) -> None:
        try:
            self.group.rmdir()
        except OSError:
            pass


class Many:
    """Two API processes and two workers, PostgreSQL and S3."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.cluster = Cluster(folder, more_api=OPTIONS, more_worker=OPTIONS, links=False)
        self.keys = {"attacker": self.cluster.keys["south"], "neighbour": self.cluster.keys["north"]}
        self.limited = []
        # A core for each worker, as its device: otherwise one worker alone has the cores of both.
        if taskset := shutil.which("taskset"):
            cores = sorted(os.sched_getaffinity(0))
            for number, worker in enumerate(self.cluster.workers):
                worker.command = [taskset, "-c", str(cores[number % len(cores)]), *worker.command]

    @property
    def processes(self) -> list[Coar]:
        return self.cluster.processes

    @property
    def ports(self) -> list[int]:
        return [api.port for api in self.cluster.apis]

    def start(self) -> None:
        self.cluster.start()
        self.limited = [Limited(worker) for worker in self.cluster.workers] if os.cpu_count() < 4 else []

    def disk(self) -> int:
        rows = self.cluster.postgres.query("SELECT pg_database_size('postgres') AS size")
        return rows[0]["size"] + size(self.folder / "s3")

    def stop(self) -> None:
        self.cluster.stop()
        for limited in self.limited:
            limited.remove()


def lower_session(process: int, nice: int) -> None:
    """Lowers the priority of a process's whole session, where the kernel groups processes by session (autogroups)."""
    try:
        pathlib.Path(f"/proc/{process}/autogroup").write_text(str(nice))
    except OSError:
        pass


def make(mode: str) -> "Single | Many":
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"coar-neighbours-{mode}-"))
    return Single(folder) if mode == "sqlite" else Many(folder)


def remove(system) -> None:
    system.stop()
    if not os.environ.get("KEEP"):
        shutil.rmtree(system.folder, ignore_errors=True)


class Memory:
    """Resident memory of processes between two moments. The kernel keeps the peak; it can be told to forget an older one."""

    def __init__(self, processes: list[Coar], usual: dict[str, dict] | None = None):
        """`usual`: an earlier result; what it took is not growth."""
        self.processes = processes
        for process in processes:
            try:
                pathlib.Path(f"/proc/{process.child.pid}/clear_refs").write_text("5")
            except OSError:
                pass
        self.before = {process.name: self.read(process, "VmRSS") for process in processes}
        for name, entry in (usual or {}).items():
            self.before[name] = max(self.before[name], entry["peak"])

    @staticmethod
    def read(process: Coar, key: str) -> int:
        """Bytes; 0 for a process that has ended."""
        try:
            status = pathlib.Path(f"/proc/{process.child.pid}/status").read_text()
            return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) << 10
        except (OSError, StopIteration):
            return 0

    def after(self) -> dict[str, dict]:
        """Peak and growth to the peak, of each process."""
        found = {}
        for process in self.processes:
            peak = self.read(process, "VmHWM")
            found[process.name] = {"peak": peak, "growth": max(0, peak - self.before[process.name])}
        return found


def ended(system) -> list[str]:
    """Processes that are gone though nothing has stopped them."""
    return [f"{process.name} ended with {process.child.returncode}" for process in system.processes if not process.alive()]


def settings() -> dict[str, object]:
    """What `coar config show` says of the binary under test, without a TOML reader: numbers are all that is asked for."""
    found = {}
    for line in run(["config", "show", *SERVE], {}).splitlines():
        name, _, value = line.partition(" = ")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found[name.strip()] = value.strip('"')
    return found
