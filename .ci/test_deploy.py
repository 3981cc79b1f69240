"""The README's ways to run OpenQQ for good, with the programs that they are for.

Run by .ci/run where nginx, openssl, logrotate and systemd-analyze are installed.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from test_openqq import (FILE, WAIT, Log, blocks, closing, command,  # noqa: E402,F401
                         eventually, start)

TOKEN = {"OPENQQ_TOKEN": "geheim"}
NAMES = ["小明", "e-f.g@h", *(f"account{number}" for number in range(40))]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Front:
    """nginx as the README has it, before two controllers on other ports."""

    def __init__(self, directory, backends):
        self.port = free_port()
        key, self.certificate = str(directory / "key.pem"), str(directory / "cert.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                        "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
                        "-keyout", key, "-out", self.certificate], check=True,
                       stderr=subprocess.DEVNULL)
        (text,) = blocks("nginx")
        for old, new in [("10.0.0.1:4000", f"127.0.0.1:{backends[0]}"),
                         ("10.0.0.2:4000", f"127.0.0.1:{backends[1]}"),
                         ("listen 443 ssl", f"listen 127.0.0.1:{self.port} ssl"),
                         ("/etc/ssl/openqq.crt", self.certificate), ("/etc/ssl/openqq.key", key)]:
            assert old in text
            text = text.replace(old, new)
        paths = "\n".join(f"{kind}_temp_path {directory}/{kind};" for kind in (
            "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (directory / "nginx.conf").write_text(
            f"daemon off; pid {directory}/nginx.pid; error_log stderr notice; events {{}}\n"
            f"http {{ access_log off; {paths}\n{text} }}", encoding="utf-8")
        self.process = subprocess.Popen(["nginx", "-p", str(directory), "-c", "nginx.conf"],
                                        stderr=subprocess.PIPE)
        self.log = Log(self.process.stderr)
        self.base = f"https://127.0.0.1:{self.port}"
        self._context = ssl.create_default_context(cafile=self.certificate)

    def call(self, path, token="geheim"):
        """(status, JSON) of a call; paths are under /openqq/."""
        head = {"Authorization": "Bearer " + token} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.base + path, headers=head),
                                        timeout=WAIT, context=self._context) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                data = error.read()
                kind = error.headers.get("Content-Type", "")
                return error.code, json.loads(data) if "json" in kind else None

    def api(self, name, client, **params):
        query = urllib.parse.urlencode({"client": client, **params})
        return self.call(f"/openqq/{name}?{query}" if name[0] != "/" else f"{name}?{query}")

    def command(self, *words):
        return command(self.base, *words, SSL_CERT_FILE=self.certificate, **TOKEN)

    def settle(self, controllers, login=True):
        """Start and log in accounts until there is one at each controller at least; all names."""
        for count, name in enumerate(NAMES, 1):
            assert self.api("start_client", name)[1]["code"] == 0
            assert not login or self.api("/local/login", name)[1]["code"] == 0
            if count > 3 and all(map(accounts_of, controllers)):
                return NAMES[:count]
        raise AssertionError("all accounts are at one controller")

    def browse(self, path, form=None):
        """The page that a phone sees, which has no token."""
        data = urllib.parse.urlencode(form).encode() if form else None
        with urllib.request.urlopen(self.base + path, data, WAIT, context=self._context) as reply:
            return reply.read().decode()

    def stop(self):
        self.process.terminate()
        self.process.wait(WAIT)


def accounts_of(controller):
    """The accounts that live at one controller, asked without nginx."""
    states = json.loads(command(controller.base, "status", "--json", **TOKEN)[1])["client"]
    return {row["account"] for row in states}


@pytest.fixture
def site(tmp_path, start):  # noqa: F811
    """Two controllers and nginx before them."""
    controllers = [start("controller", tmpdir=tmp_path / name, env=TOKEN)
                   for name in ("one", "two")]
    (tmp_path / "nginx").mkdir()
    front = Front(tmp_path / "nginx", [controller.port for controller in controllers])
    try:
        front.log.wait("start worker process")
        yield front, controllers
    finally:
        front.stop()


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_nginx_sends_each_account_to_the_controller_where_it_lives(site):
    front, controllers = site
    assert front.call("/openqq/check_client", token="") == (
        403, {"code": -6, "status": "auth failure"})
    names = front.settle(controllers)
    homes = [accounts_of(controller) for controller in controllers]
    assert not homes[0] & homes[1] and homes[0] | homes[1] == set(names)
    for name in names:
        assert front.api("get_user_info", name)[1]["account"] == name
        assert front.command("send", name, "friend", "小冰", "你好")[:1] == (0,)
        heard = front.api("check_event", name)[1]
        assert [event["content"] for event in heard if "content" in event][-1:] == ["你好"]


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_a_phone_that_scans_a_code_comes_through_nginx_to_the_machine_that_shows_it(site):
    front, controllers = site
    front.settle(controllers, login=False)
    for controller in controllers:
        for name in accounts_of(controller):
            path = controller.log.wait(rf"\[{re.escape(name)}\].*http://[^/]*(/local/scan\S*\w)")
            page = front.browse(path.group(1))
            action, ticket = [re.search(pattern, page).group(1) for pattern in (
                'action="([^"]*)"', 'value="([^"]*)"')]
            assert "登录成功" in front.browse(action, {"ticket": ticket})
            assert eventually(lambda: front.api("get_user_info", name)[0] == 200)


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_while_a_machine_is_away_its_accounts_are_not_begun_elsewhere(site, tmp_path):
    front, (one, two) = site
    front.settle([one, two])
    away, here = accounts_of(two), accounts_of(one)
    assert two.stop() == 0
    for _ in range(3):
        for name in away:
            status, _, said = front.command("start", name)
            assert (status, said) == (3, "openqq: nobody behind that URL: HTTP 502\n")
        for name in here:
            assert front.api("get_user_info", name)[0] == 200
    assert accounts_of(one) == here
    back = subprocess.Popen(
        [sys.executable, FILE, "controller", "--tmpdir", two.tmpdir, "--port", str(two.port)],
        env={**os.environ, **TOKEN})
    try:
        for name in away:
            assert eventually(lambda: front.api("get_user_info", name)[0] == 200)
    finally:
        back.terminate()
        assert back.wait(WAIT) == 0


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_unit_is_one_and_what_it_starts_serves(tmp_path):
    (text,) = blocks("ini")
    (line,) = re.findall("^ExecStart=(.*)$", text, re.M)
    unit = tmp_path / "openqq.service"
    unit.write_text(text.replace(line, line.replace("/usr/bin/python3", sys.executable)
                                 .replace("/opt/openqq/openqq.py", FILE))
                    .replace("User=openqq", "User=root"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, check=False)
    assert not [line for line in done.stdout.decode().splitlines() if "openqq" in line]
    words = line.split()[2:]
    words = [word.replace("/var/lib/openqq", str(tmp_path))
             .replace("/var/log/openqq", str(tmp_path)) for word in words]
    serves_and_ends(words, tmp_path / "controller.log")


def test_the_image_runs_a_command_that_serves(tmp_path):
    (text,) = blocks("dockerfile")
    (line,) = re.findall("^CMD (.*)$", text, re.M)
    words = json.loads(line)[2:]
    assert words[-1] == "/data"
    serves_and_ends([*words[:-1], str(tmp_path), "--log-path", str(tmp_path / "x.log")],
                    tmp_path / "x.log")


def serves_and_ends(words, log):
    """Run a controller with these words, on another port, and end it as systemd would."""
    port = free_port()
    process = subprocess.Popen([sys.executable, FILE, *words, "--port", str(port)])
    try:
        assert eventually(lambda: command(f"http://127.0.0.1:{port}", "status")[0] == 0)
    finally:
        process.terminate()
        assert process.wait(WAIT) == 0
    assert "Listening at" in log.read_text(encoding="utf-8")
