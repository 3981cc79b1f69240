"""The promises of a controller and its clients on Windows, as a user runs them there.

OPENQQ_WINDOWS_PYTHON is the command that runs a Windows CPython, such as `wine Z:\\…\\python.exe`.
Where the tests of test_openqq.py need nothing but a running program they are run here by it, too.
"""
from __future__ import annotations

import inspect
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import test_openqq  # noqa: E402
from test_openqq import FILE, WAIT, Log, Program, eventually, heard, receive  # noqa: E402, F401

PYTHON = shlex.split(os.environ["OPENQQ_WINDOWS_PYTHON"].replace("\\", "\\\\"))
# A process has no console here, so nobody can press Ctrl-Break: the end of its standard input does.
BREAKING = """
import os, runpy, signal, sys, threading
def end():
    os.read(0, 1)
    signal.raise_signal(signal.SIGBREAK)
threading.Thread(target=end, daemon=True).start()
sys.argv[:1] = []
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DEVICES = ["con", "NUL", "aux.txt", "com1", "lpt9.a", "prn.", "bob.", "a:b", "..\\x", "x\\y"]

# Of the tests with two running accounts these need something besides.
NOT_HERE = {
    "test_whatever_comes_the_servers_live_on": "/proc",
    "test_a_links_calls_need_its_key_and_sense": "/proc",
    "test_clients_have_the_documented_names_in_ps": "no process of Windows has another name",
    "test_second_controller_and_second_client_name_the_holder_and_harm_nothing": "below",
}
WITH_A_PROGRAM = [
    "test_four_lines_of_curl_start_an_account_and_read_the_echo",
]


def windows_path(path):
    return "Z:" + str(path).replace("/", "\\")


def python(code, *words):
    """What a Windows Python prints that runs some code."""
    done = subprocess.run([*PYTHON, "-c", code, *map(str, words)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=3 * WAIT)
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


def kill(pid):
    """End a Windows process at once; this is TerminateProcess."""
    python("import os, signal, sys; os.kill(int(sys.argv[1]), signal.SIGTERM)", pid)


class Windows(Program):
    """openqq.py run by the Python of Windows; stop() is a Ctrl-Break."""

    def __init__(self, tmpdir, *words, env=None, typed=True, port=0):
        os.makedirs(str(tmpdir), exist_ok=True)
        self.tmpdir = str(tmpdir)
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith(("MOJO_", "OPENQQ_", "PYTHONDONTWRITE"))}
        self.process = subprocess.Popen(
            [*PYTHON, "-c", BREAKING, windows_path(FILE), *words, "--tmpdir",
             windows_path(self.tmpdir), "--port", str(port)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**environment, **(env or {})})
        self.log, self.out = Log(self.process.stderr), Log(self.process.stdout)
        self.port = 0

    @property
    def pid(self):
        with open(self.path("controller_process.pid"), encoding="ascii") as file:
            return int(file.read())

    def stop(self):
        self.process.stdin.close()
        return self.process.wait(2 * WAIT)


@pytest.fixture
def start(tmp_path):
    programs = []

    def begin(*words, tmpdir=tmp_path, **kwargs):
        programs.append(Windows(tmpdir, *words, **kwargs))
        return programs[-1].ready()

    yield begin
    for program in programs:
        if program.process.poll() is None:
            program.stop()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A controller with alice and bob, running, as test_openqq.py has it."""
    program = Windows(tmp_path_factory.mktemp("pair"), "controller")
    try:
        program.ready()
        program.login("alice")
        program.login("bob")
        yield program
    finally:
        status = program.stop()
    assert status == 0
    assert "Traceback" not in program.log.text()


def _borrow():
    for name, test in vars(test_openqq).items():
        if name.startswith("test_") and name not in NOT_HERE:
            names = set(inspect.signature(test).parameters)
            for mark in getattr(test, "pytestmark", []):
                if mark.name == "parametrize":
                    names -= set(re.split(r"\W+", mark.args[0]))
            if names == {"pair"} or name in WITH_A_PROGRAM:
                globals()[name] = test


_borrow()


# -- an account's life

def test_the_state_says_what_system_it_is(pair):
    assert pair.state("alice")["os"] == "MSWin32"
    with open(pair.path("state_alice.json"), encoding="utf-8") as file:
        assert json.load(file)["os"] == "MSWin32"


def test_two_accounts_chat_and_the_page_is_there(pair):
    sent = pair.call("send_friend_message", client="alice", name="bob", content="你好")
    assert sent["code"] == 0
    assert eventually(lambda: "你好" in [event.get("content") for event in pair.call(
        "check_event", client="bob", since=0)])
    with urllib.request.urlopen(pair.base + "/", timeout=WAIT) as page:
        assert b"<title>OpenQQ</title>" in page.read()
    status, out, _ = windows_command(pair.base, "status")
    assert status == 0 and "alice" in out and "running" in out
    assert windows_command(pair.base, "send", "alice", "friend", "小冰", "早上好")[0] == 0
    assert "早上好" in heard(pair)


def windows_command(base, *words):
    done = subprocess.run([*PYTHON, windows_path(FILE), *words, "--url", base],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=3 * WAIT)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_events_are_posted_and_answered(start, receive):  # noqa: F811
    receiver = receive(lambda event: (200, {}, {"reply": "pong"})
                       if event.get("content") == "ping" else None)
    controller = start("controller")
    controller.login("robot", post_api=receiver.url)
    controller.login("alice")
    controller.call("send_friend_message", client="alice", name="robot", content="ping")
    assert eventually(lambda: "pong" in [event.get("content") for event in controller.call(
        "check_event", client="alice", since=0)])


def test_a_stopped_client_leaves_at_once_and_cleanly(start):
    controller = start("controller")
    controller.login("carol")
    assert controller.call("stop_client", client="carol")["code"] == 0
    controller.log.wait("client carol stopped")
    assert not os.path.exists(controller.path("pid_carol.pid"))
    assert controller.call("start_client", client="carol")["code"] == 0
    assert eventually(lambda: controller.state("carol")["state"] == "running")  # without a scan
    assert controller.call("delete_client", client="carol")["code"] == 0
    assert not [name for name in os.listdir(controller.tmpdir) if "carol" in name]


# -- what must not happen, and what happens after it

def test_a_killed_client_comes_back(start):
    controller = start("controller")
    controller.login("alice")
    before = controller.state("alice")
    kill(before["pid"])
    assert eventually(lambda: controller.state("alice")["restarts"] == 1
                      and controller.state("alice")["state"] == "running")
    after = controller.state("alice")
    assert after["pid"] != before["pid"] and after["port"] == before["port"]
    assert controller.call("get_user_info", client="alice")["name"] == "alice"


def test_a_killed_controllers_clients_end_and_come_back_with_the_next_one(start, tmp_path):
    controller = start("controller")
    controller.login("alice")
    port, pid = controller.state("alice")["port"], controller.pid
    kill(pid)
    controller.process.wait(WAIT)

    def is_gone():
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            return True
        return False

    assert eventually(is_gone)
    again = start("controller")
    assert eventually(lambda: again.state("alice")["state"] == "running")
    assert again.stop() == 0


def test_a_second_controller_or_client_and_a_taken_port_are_refused_in_words(pair, tmp_path):
    state = pair.state("alice")
    for words, holder in [(["controller"], pair.pid), (["client", "--account", "alice"],
                                                       state["pid"])]:
        second = Windows(pair.tmpdir, *words)
        assert second.process.wait(WAIT) == 1
        second.log.wait(f"is running already, with pid {holder};")
    taken = Windows(tmp_path, "controller", port=pair.port)
    assert taken.process.wait(WAIT) == 1
    taken.log.wait(f"cannot listen on .* port {pair.port}")
    assert pair.state("alice") == state


def test_a_file_that_somebody_reads_breaks_no_writer(start):
    """For a moment it is waited for; and what is held longer is written later."""
    controller = start("controller")
    controller.login("alice")
    path = controller.path("state_alice.json")
    holder = subprocess.Popen(
        [*PYTHON, "-c", "import sys; file = open(sys.argv[1]); print('held', flush=True); "
         "sys.stdin.read()", windows_path(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    assert b"held" in holder.stdout.readline()
    controller.call("relogin", client="alice")
    controller.log.wait("state_alice.json cannot be written")
    assert controller.call("/local/login", client="alice")["code"] == 0
    assert controller.call("get_user_info", client="alice")["name"] == "alice"
    holder.stdin.close()
    holder.wait(WAIT)
    assert eventually(lambda: controller.state("alice")["state"] == "running")


def test_600_idle_connections_and_600_who_wait_leave_room_for_callers(pair):
    """More than select() takes, on both servers."""
    held = [socket.create_connection(("127.0.0.1", pair.port), WAIT) for _ in range(1200)]
    waiting = b"GET /openqq/check_event?client=bob HTTP/1.1\r\nHost: localhost\r\n\r\n"
    heard(pair, "bob")
    for number, sock in enumerate(held[600:]):
        sock.sendall(waiting)
        if number % 20 == 19:
            assert pair.call("get_user_info", client="alice")["name"] == "alice"
    assert pair.call("send_friend_message", client="alice", name="bob", content="wake")["code"] == 0
    assert b"wake" in held[-1].recv(65_536)
    for sock in held:
        sock.close()
    assert pair.call("get_user_info", client="alice")["name"] == "alice"


def test_names_that_windows_forbids_or_cannot_tell_apart_are_refused(pair):
    for name in [*DEVICES, "ALICE", "Bob"]:
        assert pair.call("start_client", client=name)["code"] == 6, name


# -- how it ends

def test_ctrl_break_ends_everything_cleanly(start):
    controller = start("controller")
    controller.login("alice")
    assert controller.stop() == 0
    controller.log.wait(r"stopping \(SIGBREAK\)")
    controller.log.wait("client alice stopped")
    assert not [name for name in os.listdir(controller.tmpdir) if name.endswith(".pid")]


class Console:
    """A console, which wine shows on a terminal of ours."""

    def __init__(self, *words, **env):
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith(("MOJO_", "OPENQQ_"))}
        self.pid, self.master = pty.fork()
        if not self.pid:
            os.execvpe(PYTHON[0], [*PYTHON, *words], {**environment, "TERM": "xterm", **env})
        self.text, self.ended = "", False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        while True:
            try:
                data = os.read(self.master, 65_536)
            except OSError:
                return
            self.text += re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", data.decode("utf-8", "replace"))

    def wait(self, pattern):
        assert eventually(lambda: re.search(pattern, self.text)), self.text
        return re.search(pattern, self.text)

    def press(self, keys):
        os.write(self.master, keys)

    def has_ended(self):
        self.ended = self.ended or os.waitpid(self.pid, os.WNOHANG) != (0, 0)
        return self.ended

    def stop(self):
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)


def test_a_console_shows_letters_and_the_code_and_ctrl_c_ends_it(tmp_path):
    console = Console(windows_path(FILE), "controller", "--port", "0", "--tmpdir",
                      windows_path(tmp_path))
    try:
        port = int(console.wait(r"Listening at http://[0-9.]+:(\d+)").group(1))
        test_openqq.call(f"http://127.0.0.1:{port}", "start_client", client="小明")
        console.wait("等待手机QQ扫描二维码")
        console.wait("█▀▀▀▀▀█")
        console.press(b"\x03")
        console.wait("client 小明 stopped")
        assert eventually(console.has_ended)
    finally:
        console.stop()


def test_a_double_click_starts_a_controller_and_an_error_keeps_the_window_open(tmp_path, pair):
    script = windows_path(FILE)
    console = Console(script, MOJO_WEBQQ_PORT="0", MOJO_WEBQQ_TMPDIR=windows_path(tmp_path))
    try:
        console.wait("Listening at ")
    finally:
        console.stop()
    console = Console(script, MOJO_WEBQQ_PORT="0", MOJO_WEBQQ_TMPDIR=windows_path(pair.tmpdir))
    try:
        console.wait("is running already")
        console.wait("Enter")
        time.sleep(0.5)
        assert not console.has_ended()
        console.press(b"\r\n")
        assert eventually(console.has_ended)
    finally:
        console.stop()


def test_a_closed_console_ends_it_cleanly():
    """What Windows calls then is called here by hand: wine's console ends its processes at once."""
    said = python("""
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import openqq
timers = openqq.Timers(threading.RLock(), openqq.Log(level="fatal"))
def act(number):
    print("ended by", number, flush=True)
    timers.stop()
timers.catch_signals(act)
threading.Thread(target=openqq.on_closed_console.handler, args=(2,), daemon=True).start()
timers.run()
""", windows_path(os.path.dirname(FILE)))
    assert "ended by" in said
