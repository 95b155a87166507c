"""The system under test: PostgreSQL, an S3 server, API processes and workers as real processes, a proxy on every link between them."""

import atexit
import glob
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time
import urllib.request

from proxy import Network, free_ports, wait_for_port

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BINARY = os.environ.get("COAR_BIN", str(ROOT / "target/debug/coar"))
LOG = os.environ.get("COAR_LOG", "info")


def postgres_bin() -> str:
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not found:
        raise SystemExit("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return found[-1]


class Process:
    """A process that can be killed, stopped, continued and restarted."""

    def __init__(self, name: str, folder: pathlib.Path, command: list[str], env: dict | None = None, user: str | None = None):
        self.name, self.command, self.env, self.user = name, command, env or {}, user
        self.log = folder / f"{name}.log"
        self.child: subprocess.Popen | None = None
        self.starts = 0
        self.lock = threading.RLock()

    def start(self) -> None:
        with self.lock:
            if self.alive():
                return
            self.starts += 1
            with open(self.log, "ab") as log:
                log.write(f"--- start {self.starts}\n".encode())
                self.child = subprocess.Popen(
                    self.command,
                    env={**os.environ, **self.env},
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    user=self.user,
                    cwd=str(self.log.parent),
                    start_new_session=True,
                )

    def alive(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def signal(self, number: int) -> None:
        with self.lock:
            if self.alive():
                self.child.send_signal(number)

    def kill(self) -> None:
        """Sends SIGKILL and waits for the process to exit."""
        with self.lock:
            self.signal(signal.SIGKILL)
            if self.child:
                self.child.wait()

    def terminate(self, seconds: float) -> float:
        """Sends SIGTERM, and SIGKILL after `seconds`; returns the time until the process exited."""
        begun = time.monotonic()
        self.signal(signal.SIGTERM)
        try:
            self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        return time.monotonic() - begun

    def facts(self) -> dict:
        """Resident KiB, threads and open files."""
        pid = self.child.pid
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        value = lambda key: int(next(line for line in status.splitlines() if line.startswith(key)).split()[1])
        return {"rss_kib": value("VmRSS"), "threads": value("Threads"), "files": len(os.listdir(f"/proc/{pid}/fd"))}


class Postgres(Process):
    """A PostgreSQL server; `kill` kills all of its processes."""

    def __init__(self, folder: pathlib.Path, port: int, fsync: bool = True):
        self.bin, self.data, self.port = postgres_bin(), folder / "postgres", port
        user = "postgres" if os.getuid() == 0 else None
        if user:
            shutil.chown(folder, user)
            folder.chmod(0o755)
        initdb = [f"{self.bin}/initdb", "-D", str(self.data), "-U", "coar", "--auth=trust", "--no-sync"]
        subprocess.run(initdb, check=True, user=user, stdout=subprocess.DEVNULL, cwd=folder)
        command = [f"{self.bin}/postgres", "-D", str(self.data), "-k", str(folder), "-p", str(port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", f"fsync={'on' if fsync else 'off'}", "-c", "max_connections=300"]
        super().__init__("postgres", folder, command, user=user)

    def kill(self) -> None:
        with self.lock:
            # Backends too: on their own they would notice the postmaster's death only a little later.
            children = subprocess.run(["pgrep", "-P", str(self.child.pid)], capture_output=True, text=True).stdout.split()
            self.child.send_signal(signal.SIGKILL)
            for child in children:
                try:
                    os.kill(int(child), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.child.wait()
            (self.data / "postmaster.pid").unlink(missing_ok=True)

    def ready(self, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        command = [f"{self.bin}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port), "-U", "coar"]
        while subprocess.run(command).returncode != 0:
            if not self.alive():
                # The shared memory of the killed server may still be held for a moment.
                self.start()
            if time.monotonic() > until:
                raise TimeoutError("PostgreSQL does not come up")
            time.sleep(0.1)

    def query(self, sql: str) -> list[dict]:
        """The rows of a SELECT."""
        command = [f"{self.bin}/psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "coar", "-d", "postgres", "-XqAt", "-v", "ON_ERROR_STOP=1"]
        wrapped = f"SELECT coalesce(json_agg(t), '[]') FROM ({sql}) t"
        done = subprocess.run([*command, "-c", wrapped], capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return json.loads(done.stdout)

    def execute(self, sql: str) -> None:
        command = [f"{self.bin}/psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "coar", "-d", "postgres", "-Xq", "-v", "ON_ERROR_STOP=1"]
        subprocess.run(command, input=sql, check=True, text=True, capture_output=True, timeout=600)


class Coar(Process):
    """An API process, a worker, or both in one."""

    def __init__(self, name, folder, role, port, *, via=None, data=None, env=None, more=()):
        self.role, self.port = role, port
        environment = {"COAR_LOG": LOG, "COAR_ROLE": role, "COAR_DATA": str(data or folder / name), **(env or {})}
        command = [BINARY, "serve", "--threads", "1", "--quota-requests-per-minute", "0", *more]
        if role == "worker":
            command += ["--worker-listen", f"127.0.0.1:{port}", "--advertise", f"http://127.0.0.1:{via or port}"]
        else:
            command += ["--listen", f"127.0.0.1:{port}"]
        super().__init__(name, folder, command, env=environment)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def wait_ready(self, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not self.ready():
            if not self.alive():
                raise RuntimeError(f"{self.name} has ended; see {self.log}")
            if time.monotonic() > until:
                raise TimeoutError(f"{self.name} is not ready; see {self.log}")
            time.sleep(0.1)


def run(command: list[str], env: dict) -> str:
    """Runs a coar command; returns its output."""
    done = subprocess.run([BINARY, *command], env={**os.environ, **env}, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"coar {' '.join(command)}: {done.stderr}")
    return done.stdout.strip()


class Cluster:
    """Two API processes, two workers, and some tenants. Without `links`, processes connect directly, without a proxy."""

    def __init__(
        self, folder: pathlib.Path, more_api=(), more_worker=(), apis=2, workers=2, tenants=("north", "south"), links=True
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.network = folder, Network()
        self.apis, self.workers = [], []
        count = 2 + 4 * (apis + workers)
        ports = free_ports(count)
        take = ports.pop
        self.postgres = Postgres(folder, take())
        self.postgres.start()
        self.postgres.ready()
        s3_port = take()
        self.s3 = Process("s3", folder, ["python3", str(HERE / "s3.py"), str(folder / "s3"), str(s3_port)])
        self.s3.port = s3_port
        self.s3.start()
        # No process is left running, even if the run fails.
        atexit.register(self.stop)
        wait_for_port(s3_port)
        self.links: dict = {}
        self.direct = self.environment(self.postgres.port, s3_port)
        self.keys = {
            tenant: run(["keys", "create", "--tenant", tenant, "--scopes", "read,generate,train"], self.direct)
            for tenant in tenants
        }
        for index in range(workers):
            name, port, via = f"worker{index + 1}", take(), take() if links else None
            env = self.linked(name, take(), take()) if links else self.direct
            if links:
                self.links[f"api-{name}"] = self.network.link(f"api-{name}", via, port)
            self.workers.append(Coar(name, folder, "worker", port, via=via, env=env, more=more_worker))
        for index in range(apis):
            name = f"api{index + 1}"
            env = self.linked(name, take(), take()) if links else self.direct
            self.apis.append(Coar(name, folder, "api", take(), env=env, more=more_api))

    def environment(self, database: int, blobs: int) -> dict:
        return {
            "COAR_DATABASE": f"postgres://coar@127.0.0.1:{database}/postgres",
            "COAR_BLOBS": "s3://coar/blobs",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{blobs}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }

    def linked(self, name: str, database: int, blobs: int) -> dict:
        """Environment of a process that connects to both stores over its own links."""
        self.links[f"{name}-postgres"] = self.network.link(f"{name}-postgres", database, self.postgres.port)
        self.links[f"{name}-s3"] = self.network.link(f"{name}-s3", blobs, self.s3.port)
        return self.environment(database, blobs)

    @property
    def processes(self) -> list[Coar]:
        return self.apis + self.workers

    def start(self) -> None:
        for process in self.workers + self.apis:
            process.start()
        for process in self.workers + self.apis:
            process.wait_ready()

    def s3_faults(self, **faults) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.s3.port}/-/faults", json.dumps(faults).encode(), method="POST")
        urllib.request.urlopen(request, timeout=5).close()

    def objects(self) -> dict[str, pathlib.Path]:
        """All objects by the last part of their keys, which is their hash."""
        folder = self.folder / "s3" / "objects"
        return {path.name.rsplit("%2F", 1)[-1]: path for path in folder.iterdir()}

    def stop(self) -> None:
        for process in self.processes:
            process.signal(signal.SIGCONT)
            process.kill()
        self.s3.kill()
        self.postgres.terminate(10)
