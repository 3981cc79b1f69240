"""The promises of a controller and its clients on Windows, as a user runs them there.

OPENQQ_WINDOWS_PYTHON is the command that runs a Windows CPython, such as `wine C:\\…\\python.exe`.
"""
import json
import os
import pathlib
import shlex
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pytest

HERE = pathlib.Path(__file__).resolve().parents[1]
PYTHON = shlex.split(os.environ["OPENQQ_WINDOWS_PYTHON"])
WAIT = 60.0


def windows_path(path):
    return "Z:" + str(path).replace("/", "\\")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def eventually(check):
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        found = check()
        if found:
            return found
        time.sleep(0.1)
    return check()


class Program:
    """`python.exe openqq.py WORDS` with a tmpdir; what it says goes into a file."""

    def __init__(self, tmpdir, *words, port=0):
        self.tmpdir, self.port = tmpdir, port or free_port()
        self.log = tmpdir / f"said{self.port}.txt"
        self.process = subprocess.Popen(
            [*PYTHON, windows_path(HERE / "openqq.py"), *words, "--tmpdir", windows_path(tmpdir), "--port",
             str(self.port)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        with open(self.log, "wb") as said:  # without a pipe there are no standard handles
            subprocess.Popen(["cat"], stdin=self.process.stdout, stdout=said)

    def call(self, path, **params):
        path = path if path.startswith("/") else "/openqq/" + path
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(params)}"
        try:
            with urllib.request.urlopen(url, timeout=WAIT) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def ready(self):
        def answers():
            try:
                return self.call("/healthz")["code"] == 0
            except OSError:
                return False
        assert eventually(answers), self.text()
        return self

    def text(self):
        return self.log.read_bytes().decode()

    def state(self, name):
        return self.call("check_client", client=name)["client"][0]

    def login(self, name):
        assert self.call("start_client", client=name)["code"] == 0
        assert self.call("/local/login", client=name)["code"] == 0, self.text()


def python(code, *words):
    """What a Windows Python prints that runs some code."""
    return subprocess.run([*PYTHON, "-c", code, *map(str, words)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=WAIT).stdout.decode()


def kill(pid):
    """End a Windows process at once."""
    python("import os, signal, sys; os.kill(int(sys.argv[1]), signal.SIGTERM)", pid)


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    program = Program(tmp_path_factory.mktemp("windows"), "controller").ready()
    program.pid = int((program.tmpdir / "mojo_webqq_controller_process.pid").read_text())
    program.login("alice")
    program.login("bob")
    yield program
    kill(program.pid)
    program.process.wait(WAIT)


def test_accounts_start_log_in_and_speak(controller):
    sent = controller.call("send_friend_message", client="alice", name="bob", content="你好")
    assert sent["code"] == 0
    heard = controller.call("check_event", client="bob", since=0)
    assert [event["id"] for event in heard if event.get("content") == "你好"] == [str(sent["id"])]
    assert controller.state("alice")["os"] == "MSWin32"
    with urllib.request.urlopen(f"http://127.0.0.1:{controller.port}/", timeout=WAIT) as page:
        assert b"<title>OpenQQ</title>" in page.read()
    assert "Traceback" not in controller.text()


def test_a_client_that_died_comes_back(controller):
    before = controller.state("bob")
    kill(before["pid"])
    assert eventually(lambda: controller.state("bob")["restarts"] == 1
                      and controller.state("bob")["state"] == "running"), controller.text()
    assert controller.state("bob")["pid"] != before["pid"]
    assert controller.call("get_user_info", client="bob")["name"] == "bob"


def test_a_second_controller_or_client_is_refused_and_a_port_is_ours_alone(controller, tmp_path):
    second = Program(controller.tmpdir, "controller")
    assert second.process.wait(WAIT) == 1
    assert f"is running already, with pid {controller.pid}" in second.text()
    client = Program(controller.tmpdir, "client", "--account", "alice")
    assert client.process.wait(WAIT) == 1 and "is running already" in client.text()
    taken = Program(tmp_path, "controller", port=controller.port)
    assert taken.process.wait(WAIT) == 1 and "cannot listen" in taken.text()


def test_a_file_that_somebody_reads_is_replaced_all_the_same(controller):
    """A Windows program holds it open for a moment, and the account changes its state."""
    path = controller.tmpdir / "mojo_webqq_state_alice.json"
    holder = subprocess.Popen(
        [*PYTHON, "-c", "import sys, time; file = open(sys.argv[1]); time.sleep(1)",
         windows_path(path)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    controller.call("relogin", client="alice")
    assert eventually(lambda: controller.state("alice")["state"] == "scaning")
    assert controller.call("/local/login", client="alice")["code"] == 0
    holder.wait(WAIT)
    assert json.loads(path.read_text(encoding="utf-8"))["state"] == "running"
    assert "cannot be written" not in controller.text()


def test_600_idle_connections_leave_room_for_callers(controller):
    idle = [socket.create_connection(("127.0.0.1", controller.port), WAIT) for _ in range(600)]
    assert controller.call("get_user_info", client="alice")["name"] == "alice"
    for sock in idle:
        sock.close()


def test_a_client_is_stopped_cleanly_and_forgotten(controller):
    controller.login("carol")
    answer = controller.call("stop_client", client="carol")
    assert (answer["code"], answer["status"]) == (0, "success")
    assert "client carol stopped" in controller.text()
    assert not (controller.tmpdir / "mojo_webqq_pid_carol.pid").exists()
    assert controller.call("delete_client", client="carol")["code"] in (0, 1)


def test_clients_end_within_five_seconds_of_a_controller_that_was_killed(tmp_path):
    program = Program(tmp_path, "controller").ready()
    program.login("dora")
    port = program.state("dora")["port"]
    kill(int((tmp_path / "mojo_webqq_controller_process.pid").read_text()))
    program.process.wait(WAIT)

    def is_gone():
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            return True
        return False

    end = time.monotonic() + 5.0
    while not is_gone() and time.monotonic() < end:
        time.sleep(0.1)
    assert is_gone(), program.text()
    again = Program(tmp_path, "controller").ready()
    assert eventually(lambda: again.state("dora")["state"] == "running"), again.text()
    kill(int((tmp_path / "mojo_webqq_controller_process.pid").read_text()))
    again.process.wait(WAIT)


@pytest.mark.parametrize("name", ["SIGBREAK", "SIGINT"])
def test_ctrl_break_and_ctrl_c_end_everything_cleanly(tmp_path, name):
    """Raised within: wine has no console here from which another process could send them."""
    said = python("""
import signal, sys, threading, urllib.request
sys.path.insert(0, sys.argv[1])
import openqq
base = "http://127.0.0.1:" + sys.argv[3]

def use():
    for path in "/healthz", "/openqq/start_client?client=alice", "/local/login?client=alice":
        reply = urllib.request.urlopen(base + path, timeout=30).read()
    print(reply.decode(), flush=True)
    signal.raise_signal(getattr(signal, sys.argv[4]))

timer = threading.Timer(2.0, use)
timer.daemon = True
timer.start()
print("status", openqq.main(["controller", "--tmpdir", sys.argv[2], "--port", sys.argv[3]]))
""", windows_path(HERE), windows_path(tmp_path), free_port(), name)
    assert '"code":0' in said and "client alice stopped" in said and "status 0" in said, said
    assert "Traceback" not in said


def test_names_that_windows_forbids_are_refused(controller):
    for name in ("con", "NUL", "aux.txt", "com1", "lpt9.a", "bob.", "a:b", "ALICE"):
        assert controller.call("start_client", client=name)["code"] == 6, name
