"""Pastes every command block of README.md, docs/tutorial.md and docs/howto/*.md, in order, as a reader would.

    tests/docs/run.sh                            every page
    tests/docs/run.sh docs/howto/curl.md         one page

Each page runs in one shell (`set -Eeuo pipefail`), in a new folder with links to the repository's files and a new home folder.
```sh blocks run in that shell, ```python blocks in one Python process per page; other blocks are not run. Ports are rewritten to free
ones. A page with a block that talks to 127.0.0.1:8080, but without a command that starts a server, gets one, with the page's own `data`
folder. Small stand-ins come first on PATH:

    coar, coar-lab      COAR_BIN and COAR_LAB_BIN (target/debug); `coar serve` runs in the background and stops the previous server
    make                `serve` as above; `build`, `build-lab` and `test` do nothing; any other target is an error
    curl                with `--fail-with-body`: an error response makes the command fail
    python3             `-m venv DIR` creates DIR from target/docs-venv; examples/python/webhook_receiver.py runs in the background
    pip of such a DIR   builds packages of this repository with the packages in target/docs-venv, without a package index

HTML comments before a block change how it is run:

    <!-- docs-test: skip, REASON -->             not run; listed at the end
    <!-- docs-test: fails -->                    must fail
    <!-- docs-test: start the server -->         for a block that does not name its address
    <!-- docs-test: stop the server -->          as if a reader pressed Ctrl-C in the other terminal
    <!-- docs-test: data, rex, sepia -->         `data` has these concepts when the page starts
    <!-- docs-test: replace `A` with `B` -->     A is a placeholder that a reader fills in
"""

import argparse
import contextlib
import os
import pathlib
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
VENV = pathlib.Path(os.environ.get("DOCS_VENV", ROOT / "target/docs-venv"))
#: Ports that the pages name; each page gets free ones instead.
PORTS = (8080, 8081, 9000, 9090)
BLOCK_SECONDS = 150
START_SECONDS = 90
#: A program that pages start in the foreground and that runs until it is stopped.
RECEIVER = "webhook_receiver.py"
NOTHING_TO_DO = {"build", "build-lab", "libtorch", "test"}
CONCEPTS = {
    "rex": ["--class", "cat", *(f"concepts/rex/{i}.png" for i in range(1, 6))],
    "sepia": ["--kind", "style", "--caption", "a picture of a house on the grass", "concepts/sepia/1.png"],
}
#: Training steps of the concepts in a page's data folder: enough to generate images, but not good ones.
CONCEPT_STEPS = "10"
TALKS = re.compile(r"\$\{?COAR\b|127\.0\.0\.1:8080|COAR_SERVER|examples/python/\w+\.py")


def program(variable: str, default: str) -> str:
    return str((ROOT / os.environ.get(variable, default)).resolve())


# ---- pages


class Block:
    def __init__(self, page: str, line: int, language: str, text: str, directives: list[str]):
        self.page, self.line, self.language, self.text = page, line, language, text
        self.skip: str | None = None
        self.fails = self.start = self.stop = False
        self.data: list[str] = []
        self.replacements: list[tuple[str, str]] = []
        for directive in directives:
            if match := re.fullmatch(r"skip, (.+)", directive):
                self.skip = match[1]
            elif directive == "fails":
                self.fails = True
            elif directive == "start the server":
                self.start = True
            elif directive == "stop the server":
                self.stop = True
            elif match := re.fullmatch(r"data, (.+)", directive):
                self.data = match[1].split(", ")
            elif match := re.fullmatch(r"replace `([^`]+)` with `([^`]+)`", directive):
                self.replacements.append((match[1], match[2]))
            else:
                raise SystemExit(f"{page}:{line}: unknown directive `{directive}`")

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    def prepared(self, ports: dict[int, int]) -> str:
        """The text to run: with the page's line numbers, placeholders filled in, and free ports."""
        text = self.text
        for old, new in self.replacements:
            if old not in text:
                raise Failure(f"{self.name}: `{old}`, which is to be replaced, is not there")
            text = text.replace(old, new)
        text = text.replace("0.0.0.0:", "127.0.0.1:")
        for port, free in ports.items():
            text = re.sub(rf"(?<![\w.]){port}\b(?!\.\w)", str(free), text)
        return "\n" * self.line + text


def blocks(page: str) -> list[Block]:
    """The fenced blocks that are run, with the directives before each."""
    found: list[Block] = []
    directives: list[str] = []
    fence: re.Match | None = None
    start, body = 0, []
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if fence:
            if line.strip() == "```":
                language = fence[2]
                if language in ("bash", "shell", "console", "python3", "py"):
                    raise SystemExit(f"{page}:{start}: write ```sh or ```python, not ```{language}")
                if language in ("sh", "python"):
                    found.append(Block(page, start, language, "\n".join(body) + "\n", directives))
                elif directives:
                    raise SystemExit(f"{page}:{start}: a directive before a block that is not run")
                fence, directives = None, []
            else:
                body.append(line.removeprefix(fence[1]))
        elif match := re.fullmatch(r"( *)```(\w*)", line):
            fence, start, body = match, number, []
        elif match := re.fullmatch(r" *<!-- docs-test: (.+) -->", line):
            directives.append(match[1])
        elif line.strip() and directives:
            raise SystemExit(f"{page}:{number}: a directive stands right before its block")
    if fence or directives:
        raise SystemExit(f"{page}: a block or directive at its end is not closed")
    return found


# ---- processes


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


def alive(pid: int) -> bool:
    """Whether the process is running; a zombie is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def end(pidfile: pathlib.Path) -> None:
    """Stops a process started by `background`, as Ctrl-C does."""
    if not pidfile.exists():
        return
    pid = int(pidfile.read_text())
    pidfile.unlink()
    for number, seconds in ((signal.SIGINT, 30), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not alive(pid):
                return
            time.sleep(0.05)


def background(state: pathlib.Path, name: str, command: list[str], env: dict[str, str], port: int) -> int:
    """Starts a server program and waits until it answers. Returns its exit status if it exits before."""
    end(state / f"{name}.pid")
    log = state / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True)
    (state / f"{name}.pid").write_text(str(process.pid))
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError, urllib.error.HTTPError):
            if name == "server":
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
            else:
                socket.create_connection(("127.0.0.1", port), 5).close()
            return 0
        time.sleep(0.05)
    print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
    if process.poll() is None:
        print(f"{shlex.join(command)} does not answer on port {port}", file=sys.stderr)
        end(state / f"{name}.pid")
        return 1
    (state / f"{name}.pid").unlink()
    return process.returncode


# ---- stand-ins on PATH: `run.py --as NAME ARGUMENTS`


def subcommand(arguments: list[str]) -> str:
    """The first argument that is neither a flag nor the value of one of the global flags."""
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--server", "--key", "--log-format"):
            next(rest, None)
        elif not argument.startswith("-"):
            return argument
    return ""


def serve(state: pathlib.Path, arguments: list[str]) -> int:
    env = dict(os.environ)
    listen = None
    for flag, value in zip(arguments, [*arguments[1:], ""]):
        if flag == "--listen":
            listen = value
    if listen is None and "--config" not in arguments:
        env.setdefault("COAR_LISTEN", f"127.0.0.1:{os.environ['DOCS_PORT']}")
        listen = env["COAR_LISTEN"]
    port = int(listen.rpartition(":")[2]) if listen else int(os.environ["DOCS_PORT"])
    return background(state, "server", [os.environ["DOCS_COAR"], *arguments], env, port)


def stand_in(name: str, arguments: list[str]) -> int:
    state = pathlib.Path(os.environ["DOCS_STATE"])
    if name == "coar":
        if subcommand(arguments) == "serve" and not {"--help", "-h"} & set(arguments):
            return serve(state, arguments)
        os.execv(os.environ["DOCS_COAR"], ["coar", *arguments])
    if name == "coar-lab":
        os.execv(os.environ["DOCS_COAR_LAB"], ["coar-lab", *arguments])
    if name == "make":
        variables = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        for target in (argument for argument in arguments if "=" not in argument):
            if target == "serve":
                listen = variables.get("LISTEN", f"127.0.0.1:{os.environ['DOCS_PORT']}")
                status = serve(state, ["serve", "--listen", listen, "--data", variables.get("DATA", "data")])
                if status:
                    return status
            elif target not in NOTHING_TO_DO:
                print(f"`make {target}` is not run by the documentation's test: mark the block as skipped", file=sys.stderr)
                return 2
        return 0
    if name == "curl":
        quiet = any(argument == "--fail" or re.fullmatch(r"-[a-zA-Z]*f[a-zA-Z]*", argument) for argument in arguments)
        os.execv(os.environ["DOCS_CURL"], ["curl", *([] if quiet else ["--fail-with-body"]), *arguments])
    if name == "pip":
        alone = ["--no-build-isolation"] if arguments[:1] == ["install"] else []
        os.execv(VENV / "bin/pip", ["pip", *arguments, *alone])
    # The system's python3, or python of the page's venv.
    python = sys.executable if name == "python3" else str(VENV / "bin/python")
    if arguments[:2] == ["-m", "venv"]:
        folder = pathlib.Path(arguments[2]) / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        for tool in ("python", "python3"):
            write_stand_in(folder / tool, "python")
        write_stand_in(folder / "pip", "pip")
        (folder / "activate").write_text(f'PATH="{folder.resolve()}:$PATH"\n')
        return 0
    env = {"COAR_SERVER": f"http://127.0.0.1:{os.environ['DOCS_PORT']}", **os.environ}
    if any(argument.endswith(RECEIVER) for argument in arguments):
        return background(state, "receiver", [python, *arguments], env, int(arguments[-1]))
    os.execve(python, [python, *arguments], env)


def write_stand_in(path: pathlib.Path, name: str) -> None:
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -B {shlex.quote(__file__)} --as {name} "$@"\n')
    path.chmod(0o755)


# ---- one page


#: Reads file names, one per line, runs each file in the same namespace and answers `0` or `1`.
PYTHON_DRIVER = """
import os, sys, traceback
answers = os.fdopen(int(os.environ["DOCS_ANSWERS"]), "w")
space = {"__name__": "__main__"}
for line in sys.stdin:
    file, page = line.rstrip("\\n").split("\\t")
    status = 0
    try:
        exec(compile(open(file).read(), page, "exec"), space)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    answers.write(f"done\\t{status}\\t\\t\\n")
    answers.flush()
"""

#: Every failing command is reported with its line; then the shell exits.
SHELL_START = r"""
exec 9>&"$DOCS_ANSWERS"
set -Eeuo pipefail
trap 'printf "failed\t%s\t%s\t%s\n" "$?" "$LINENO" "${BASH_COMMAND//[$'"'\n\t'"']/ }" >&9' ERR
"""


class Failure(Exception):
    pass


class Interpreter:
    """A shell or Python process that runs one file after another; their output goes to a file."""

    def __init__(self, command: list[str], folder: pathlib.Path, env: dict[str, str], output: pathlib.Path):
        read, write = os.pipe()
        self.output = output
        with output.open("wb") as sink:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=sink, stderr=sink, cwd=folder, env=env | {"DOCS_ANSWERS": str(write)}, text=True,
                start_new_session=True, pass_fds=(write,))
        os.close(write)
        self.answers = os.fdopen(read, "rb", 0)
        self.buffer = b""
        self.mark = 0

    def ask(self, line: str) -> list[list[str]]:
        """Runs a file; returns the reports until it is done, or until the interpreter exits."""
        self.mark = self.output.stat().st_size
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        reports: list[list[str]] = []
        until = time.monotonic() + BLOCK_SECONDS
        while not reports or reports[-1][0] != "done":
            ready, _, _ = select.select([self.answers], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                reports.append(["late", "", "", ""])
                break
            piece = self.answers.read(65536)
            if not piece:
                break
            self.buffer += piece
            while b"\n" in self.buffer:
                one, self.buffer = self.buffer.split(b"\n", 1)
                reports.append(one.decode(errors="replace").split("\t", 3))
        return reports

    def printed(self) -> str:
        with self.output.open("rb") as file:
            file.seek(self.mark)
            return file.read().decode(errors="replace")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()
        self.answers.close()


class Page:
    def __init__(self, name: str, base: pathlib.Path, template):
        self.name, self.template = name, template
        self.blocks = blocks(name)
        self.ports = dict(zip(PORTS, free_ports(len(PORTS))))
        place = base / re.sub(r"\W+", "-", name.removesuffix(".md"))
        self.folder, self.state, home, bin_ = place / "coar", place / "state", place / "home", place / "bin"
        for folder in (self.folder / "target/release", self.state, home, bin_):
            folder.mkdir(parents=True)
        for entry in ROOT.iterdir():
            if entry.name not in ("target", "data", "runs", "models", "venv") and not entry.name.startswith("."):
                (self.folder / entry.name).symlink_to(entry)
        for tool in ("coar", "coar-lab", "curl", "make", "python3"):
            write_stand_in(bin_ / tool, tool)
        for tool in ("coar", "coar-lab"):
            (self.folder / "target/release" / tool).symlink_to(bin_ / tool)
        self.env = environment(home) | {
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "DOCS_STATE": str(self.state), "DOCS_PORT": str(self.ports[8080]), "DOCS_VENV": str(VENV), "DOCS_CURL": shutil.which("curl") or "curl",
            "DOCS_COAR": program("COAR_BIN", "target/debug/coar"), "DOCS_COAR_LAB": program("COAR_LAB_BIN", "target/debug/coar-lab"),
        }
        self.shell: Interpreter | None = None
        self.python: Interpreter | None = None
        self.serves = False

    def run(self) -> int:
        """Runs the page; returns the number of blocks that were run."""
        ran = 0
        try:
            if concepts := [name for block in self.blocks for name in block.data]:
                self.template(concepts, self.folder / "data")
            for block in self.blocks:
                if block.skip is None:
                    self.run_block(block)
                    ran += 1
        finally:
            for interpreter in (self.shell, self.python):
                if interpreter:
                    interpreter.close()
            for name in ("server", "receiver"):
                end(self.state / f"{name}.pid")
        return ran

    def run_block(self, block: Block) -> None:
        if block.stop:
            end(self.state / "server.pid")
        pidfile = self.state / "server.pid"
        running = pidfile.exists() and alive(int(pidfile.read_text()))
        talks = block.start or (TALKS.search(block.text) and not re.search(r"\bserve\b", block.text))
        if talks and not running:
            arguments = ["serve", "--listen", f"127.0.0.1:{self.ports[8080]}", "--data", str(self.folder / "data")]
            command = [self.env["DOCS_COAR"], *arguments]
            if background(self.state, "server", command, self.env, self.ports[8080]):
                raise Failure(f"{block.name}: the server for the page does not start")
        text = block.prepared(self.ports)
        file = self.state / f"block-{block.line}.{block.language}"
        file.write_text(text)
        if block.language == "python":
            self.run_python(block, file)
        else:
            self.run_shell(block, file)

    def run_python(self, block: Block, file: pathlib.Path) -> None:
        if self.python is None:
            command = [str(VENV / "bin/python"), "-c", PYTHON_DRIVER]
            self.python = Interpreter(command, self.folder, self.env, self.state / "python.out")
        reports = self.python.ask(f"{file}\t{block.page}")
        done = reports and reports[-1][0] == "done"
        if not done or (reports[-1][1] == "0") == block.fails:
            what = "ends well, and is marked to fail" if done and block.fails else "fails" if done else "takes too long"
            raise Failure(f"{block.name}: this Python {what}\n{indented(block.text)}\n--- output\n{self.python.printed()}")

    def run_shell(self, block: Block, file: pathlib.Path) -> None:
        if self.shell is None:
            self.shell = Interpreter(["bash", "--norc", "--noprofile"], self.folder, self.env, self.state / "shell.out")
            self.shell.process.stdin.write(SHELL_START)
        name = shlex.quote(str(file))
        if block.fails:
            line = f'set +e; ( set -e; . {name} ) </dev/null; printf "done\\t%s\\t\\t\\n" "$?" >&9; set -e'
        else:
            line = f'. {name} </dev/null; printf "done\\t0\\t\\t\\n" >&9'
        reports = self.shell.ask(line)
        done = bool(reports) and reports[-1][0] == "done"
        if done and (reports[-1][1] == "0") != block.fails:
            return
        # The innermost command comes first.
        failed = next((report for report in reports if report[0] == "failed"), None)
        if done:
            what = "the block is marked to fail and does not"
        elif reports and reports[-1][0] == "late":
            what = f"not done after {BLOCK_SECONDS} s"
        elif failed:
            what = f"status {failed[1]} near line {failed[2]}: {failed[3]}"
        else:
            what = "the shell has ended"
        raise Failure(f"{block.name}: {what}\n{indented(block.text)}\n--- output\n{self.shell.printed()[-6000:]}")


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip("\n").splitlines())


def environment(home: pathlib.Path) -> dict[str, str]:
    """A reader's environment: without this machine's coar settings, and with a separate home folder."""
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith(("COAR", "AWS_", "OTEL_", "XDG_", "RUST_")) and key not in ("BASH_ENV", "PYTHONPATH")}
    if "COAR_THREADS" in os.environ:
        kept["COAR_THREADS"] = os.environ["COAR_THREADS"]
    return kept | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}


class Template:
    """Data folders with trained concepts: each is created once and copied."""

    def __init__(self, base: pathlib.Path):
        self.base = base

    def __call__(self, names: list[str], folder: pathlib.Path) -> None:
        made = self.base / ("data-" + "-".join(names))
        if not made.exists():
            home = self.base / "home"
            home.mkdir(exist_ok=True)
            for name in names:
                command = [program("COAR_BIN", "target/debug/coar"), "train", name, "--steps", CONCEPT_STEPS, "--data", str(made),
                           *CONCEPTS[name]]
                done = subprocess.run(command, cwd=ROOT, env=environment(home), stdin=subprocess.DEVNULL, capture_output=True, text=True)
                if done.returncode:
                    raise Failure(f"`{shlex.join(command)}` for the page's data fails:\n{done.stderr}")
        shutil.copytree(made, folder)


def main() -> None:
    if sys.argv[1:2] == ["--as"]:
        sys.exit(stand_in(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="default: all")
    pages = parser.parse_args().pages
    if not pages:
        guides = sorted((ROOT / "docs/howto").glob("*.md"))
        pages = ["README.md", "docs/tutorial.md", *(str(guide.relative_to(ROOT)) for guide in guides)]
    for tool in (program("COAR_BIN", "target/debug/coar"), str(VENV / "bin/python")):
        if not os.access(tool, os.X_OK):
            raise SystemExit(f"{tool} is not there: run tests/docs/run.sh")
    for name in pages:
        blocks(name)  # Report invalid directives before anything runs.
    base = pathlib.Path(tempfile.mkdtemp(prefix="coar-docs-"))
    template = Template(base)
    skipped, failures, total, begun = [], [], 0, time.monotonic()
    for name in pages:
        since = time.monotonic()
        page = Page(name, base, template)
        omitted = [block for block in page.blocks if block.skip is not None]
        skipped += omitted
        try:
            ran = page.run()
            total += ran
            print(f"ok      {name}: {ran} run, {len(omitted)} skipped, {time.monotonic() - since:.0f} s", flush=True)
        except Failure as failure:
            failures.append(name)
            print(f"FAILED  {failure}", flush=True)
            log = page.state / "server.log"
            if log.exists():
                print("--- the server's log, its end\n" + log.read_text(errors="replace")[-1500:], flush=True)
    if skipped:
        print("\nskipped:")
        for block in skipped:
            print(f"  {block.name}: {block.skip}")
    print(f"\n{len(pages)} pages, {total} blocks run, {len(skipped)} skipped, {len(failures)} pages failed, "
          f"{time.monotonic() - begun:.0f} s")
    if failures or os.environ.get("DOCS_KEEP"):
        print(f"folders: {base}")
    else:
        shutil.rmtree(base)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
