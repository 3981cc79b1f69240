"""The promises of OpenQQ, each held by a test that is named after it.

    python -m pip install pytest && python -m pytest -q

Real processes and sockets wherever the behaviour is theirs. OPENQQ_SOAK=1 runs the long forms.
"""
from __future__ import annotations

import ast
import base64
import http.client
import http.server
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib

import pytest

import openqq

HERE = os.path.dirname(os.path.abspath(__file__))
FILE = os.path.join(HERE, "openqq.py")
WAIT = 20.0  # seconds within which whatever is waited for has come, also on a busy machine


# ------------------------------------------------------------------------------------------------
# What the tests stand on
# ------------------------------------------------------------------------------------------------

class Log:
    """Lines of a process, as they come; wait() returns the match that a line holds."""

    def __init__(self, stream):
        self.lines = []
        self._changed = threading.Condition()
        self._stream = stream
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._stream:
            with self._changed:
                self.lines.append(line.decode("utf-8", "replace").rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _find(self, pattern, count):
        found = [match for line in self.lines for match in [re.search(pattern, line)] if match]
        return found[count - 1] if len(found) >= count else None

    def wait(self, pattern, count=1, seconds=WAIT):
        """The count-th line that matches."""
        with self._changed:
            self._changed.wait_for(lambda: self._find(pattern, count) or self._ended, seconds)
            found = self._find(pattern, count)
        assert found, f"{pattern!r} did not come:\n" + "\n".join(self.lines[-40:])
        return found

    def text(self):
        with self._changed:
            return "\n".join(self.lines)


class Program:
    """openqq.py as somebody runs it, on free ports; `base` is where its API is."""

    def __init__(self, tmpdir, *words, env=None, python=sys.executable):
        os.makedirs(str(tmpdir), exist_ok=True)
        self.tmpdir = str(tmpdir)
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith(("MOJO_", "OPENQQ_"))}
        environment.update(env or {})
        self.process = subprocess.Popen(
            [python, FILE, *words, "--tmpdir", self.tmpdir, "--port", "0"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment)
        self.pid = self.process.pid
        self.log = Log(self.process.stderr)
        self.out = Log(self.process.stdout)
        self.port = 0

    def ready(self):
        """Wait until it serves."""
        self.port = int(self.log.wait(r"(?:Listening at |监听地址: \[ )http://[0-9.]+:(\d+)").group(1))
        self.base = f"http://127.0.0.1:{self.port}"
        return self

    def call(self, path, **params):
        """The JSON that the API answers; paths without a slash are under /openqq/."""
        return call(self.base, path, **params)

    def login(self, name, **settings):
        """Start an account and log it in; returns when it is running."""
        started = self.call("start_client", client=name, **settings)
        assert started["code"] == 0, started
        assert self.call("/local/login", client=name)["code"] == 0
        return started

    def state(self, name):
        return self.call("check_client", client=name)["client"][0]

    def path(self, name):
        return os.path.join(self.tmpdir, "mojo_webqq_" + name)

    def stop(self, number=signal.SIGTERM):
        """End it; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def request(base, path, method="GET", body=None, headers=None, timeout=60.0):
    """(status, headers, body bytes) of one call on a connection of its own."""
    parts = urllib.parse.urlsplit(base)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        reply = connection.getresponse()
        return reply.status, dict((k.lower(), v) for k, v in reply.getheaders()), reply.read()
    finally:
        connection.close()


def call(base, path, **params):
    """The JSON that a GET answers, whatever its status."""
    path = path if path.startswith("/") else "/openqq/" + path
    query = urllib.parse.urlencode(params)
    return json.loads(request(base, path + ("?" + query if query else ""))[2])


def exchange(port, data, seconds=WAIT):
    """All bytes that a server answers to some bytes, until it closes or is silent."""
    with socket.create_connection(("127.0.0.1", port), seconds) as sock:
        sock.sendall(data)
        answer = b""
        while True:
            try:
                piece = sock.recv(65536)
            except (socket.timeout, ConnectionResetError):
                return answer
            if not piece:
                return answer
            answer += piece


class Receiver:
    """A post_api: what it gets is in `events` (a queue of JSON); `answer(event)` is what it says:
    None, a status, or (status, headers, body)."""

    def __init__(self, answer=lambda event: None, port=0):
        self.events = queue.Queue()
        self.posts = []       # (path, headers, body, JSON) in the order of their coming
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                event = json.loads(body)
                receiver.posts.append((self.path, self.headers, body, event))
                said = answer(event)
                status, headers, data = (said if isinstance(said, tuple)
                                         else (said or 200, {}, b""))
                if isinstance(data, dict):
                    data, headers = json.dumps(data).encode(), {"Content-Type": "application/json"}
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                receiver.events.put(event)

            def log_message(self, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, address):
                pass

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/post_message"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def next(self, wanted=lambda event: True, seconds=WAIT):
        """The next event that is wanted; others are passed over."""
        end = time.monotonic() + seconds
        while True:
            event = self.events.get(timeout=max(0.01, end - time.monotonic()))
            if wanted(event):
                return event

    def message(self, content):
        """The next received message with this content."""
        return self.next(lambda event: event.get("content") == content
                         and event["post_type"] == "receive_message")

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def start(tmp_path):
    """start("controller", …) and start("client", …): programs that end with the test."""
    programs = []

    def begin(*words, tmpdir=tmp_path, **kwargs):
        programs.append(Program(tmpdir, *words, **kwargs))
        return programs[-1].ready()

    yield begin
    for program in programs:
        program.stop()


@pytest.fixture
def receive():
    """receive(answer) makes a Receiver that ends with the test."""
    receivers = []

    def begin(*args, **kwargs):
        receivers.append(Receiver(*args, **kwargs))
        return receivers[-1]

    yield begin
    for receiver in receivers:
        receiver.close()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A controller with alice and bob, running; for tests that leave it as it was."""
    program = Program(tmp_path_factory.mktemp("pair"), "controller")
    try:
        program.ready()
        program.login("alice")
        program.login("bob")
        yield program
    finally:
        status = program.stop()
    assert status == 0
    assert "Traceback" not in program.log.text()


# ------------------------------------------------------------------------------------------------
# The first minute
# ------------------------------------------------------------------------------------------------

def test_four_lines_of_curl_start_an_account_and_read_the_echo(start):
    controller = start("controller")
    assert controller.call("start_client", client="alice")["code"] == 0
    assert controller.call("/local/login", client="alice")["code"] == 0
    sent = controller.call("send_friend_message", client="alice", name="小冰", content="你好")
    assert (sent["code"], sent["status"], sent["info"]) == (0, "发送成功", "发送正常")
    echo = controller.call("check_event", client="alice")[-1]
    assert (echo["class"], echo["content"], echo["sender"]) == ("recv", "你好", "小冰")
    assert controller.stop() == 0


# ------------------------------------------------------------------------------------------------
# The README
# ------------------------------------------------------------------------------------------------

with open(os.path.join(HERE, "README.md"), encoding="utf-8") as _readme:
    README = _readme.read()


def blocks(kind):
    """The fenced blocks of a kind in the README, in their order."""
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def type_in(line, ports):
    """What a shell prints for a line of the README, with other ports."""
    for plain, port in ports.items():
        line = line.replace(f":{plain}/", f":{port}/")
    return subprocess.run(["sh", "-c", line], cwd=HERE, stdout=subprocess.PIPE, timeout=60,
                          check=True).stdout.decode()


def test_readme_commands_do_what_the_readme_says(start, tmp_path):
    """All shell blocks: the program, the first four lines, the tests, the bot's four lines."""
    program, first_minute, tests, bot_lines = blocks("sh")
    assert program == "python openqq.py controller\n"
    assert tests == "python -m pip install pytest && python -m pytest -q\n"
    controller = start("controller")
    ports = {4000: controller.port}
    *beginning, events = first_minute.splitlines()
    for line in beginning:
        assert json.loads(type_in(line, ports))["code"] == 0
    assert json.loads(type_in(events, ports))[-1]["content"] == "hello"

    with socket.create_server(("127.0.0.1", 0)) as free:
        ports[8000] = free.getsockname()[1]
    code = next(block for block in blocks("python") if "class Bot" in block)
    (tmp_path / "bot.py").write_text(code.replace("8000", str(ports[8000])), encoding="utf-8")
    bot = subprocess.Popen([sys.executable, str(tmp_path / "bot.py")], stderr=subprocess.DEVNULL)
    try:
        *beginning, events = bot_lines.splitlines()
        for line in beginning:
            assert json.loads(type_in(line, ports))["code"] == 0
        answers = []
        while "pong" not in [event.get("content") for event in answers]:
            answers += json.loads(type_in(events, ports))
    finally:
        bot.terminate()
        bot.wait()


def test_readme_library_example_runs(tmp_path, start):
    code = next(block for block in blocks("python") if "openqq.Client" in block)
    script = tmp_path / "example.py"
    script.write_text(code.replace("5000", "0").replace(
        'account="alice"', f"account=\"alice\", tmpdir={str(tmp_path)!r}"), encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE,
                               stdin=subprocess.DEVNULL, env=dict(os.environ, PYTHONPATH=HERE))
    log = Log(process.stderr)
    try:
        base = log.wait(r"监听地址: \[ (http://[0-9.:]+)").group(1)
        assert call(base, "/local/login", client="alice")["code"] == 0
        said = call(base, "/local/say", client="alice", **{"from": "小灰"}, content="hi")
        assert said["code"] == 0
        log.wait(r"\[好友消息\] 我->小灰 : you said hi")
    finally:
        process.terminate()
        assert process.wait(WAIT) == 0


def test_readme_settings_table_is_the_settings_table():
    rows = [f"| {setting.name} | {setting.shown()} | {setting.whose} | "
            f"{'yes' if setting.caller else ''} | {setting.help} |"
            for setting in openqq.SETTINGS.values() if not setting.idle]
    head = "| setting | default | whose | caller | what |\n|---|---|---|---|---|\n"
    assert head + "\n".join(rows) + "\n\n" in README


@pytest.mark.parametrize("words", [["controller", "--help"], ["client", "--help"]])
def test_readme_help_shows_every_setting(words):
    assert f"`python openqq.py {' '.join(words)}`" in README
    text = subprocess.run([sys.executable, FILE, *words], stdout=subprocess.PIPE,
                          check=True).stdout.decode()
    for setting in openqq.SETTINGS.values():
        if setting.whose in (words[0], "both") and not setting.idle:
            assert "--" + setting.name.replace("_", "-") in text


def test_readme_names_every_file_of_a_life(start):
    """What lies in tmpdir while a controller and a client run is in the README's table."""
    controller = start("controller")
    controller.login("alice", post_api="http://127.0.0.1:9/")
    for name in os.listdir(controller.tmpdir):
        plain = name.replace("alice", "NAME")
        named = f"`{plain}`" in README or plain.endswith(".jsonl") and f"`{plain[:-1]}`" in README
        assert named, name
