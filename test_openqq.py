"""The promises of OpenQQ, each held by a test that is named after it.

    python -m pip install pytest && python -m pytest -q

Real processes and sockets wherever the behaviour is theirs. OPENQQ_SOAK=1 runs the long forms.
"""
from __future__ import annotations

import ast
import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import hmac
import http.client
import http.server
import itertools
import json
import os
import pty
import queue
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import symtable
import sys
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request

import pytest

import openqq

HERE = os.path.dirname(os.path.abspath(__file__))
FILE = os.path.join(HERE, "openqq.py")
WAIT = 20.0  # seconds within which whatever is waited for has come, also on a busy machine
SOAK = os.environ.get("OPENQQ_SOAK") == "1"


def proc(pid, name, pattern):
    """A number from a file of /proc/PID."""
    with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
        return int(re.search(pattern, file.read(), re.M).group(1))


def much(usual, soak):
    """How often: a little for every day, all of what is promised with OPENQQ_SOAK=1."""
    return soak if SOAK else usual


# ------------------------------------------------------------------------------------------------
# What the tests stand on
# ------------------------------------------------------------------------------------------------

class Log:
    """Lines of a process, as they come; wait() returns the match that a line holds."""

    def __init__(self, stream):
        self.lines, self._ended = [], False
        self._changed = threading.Condition()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream):
        for line in itertools.chain(stream, [None]):
            with self._changed:
                self._ended = line is None
                if not self._ended:
                    self.lines.append(line.decode("utf-8", "replace").rstrip("\n"))
                self._changed.notify_all()

    def wait(self, pattern, count=1, seconds=WAIT):
        """The count-th line that matches."""
        def found():
            matches = filter(None, (re.search(pattern, line) for line in self.lines))
            return next(itertools.islice(matches, count - 1, None), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, seconds)
            match = found()
        assert match, f"{pattern!r} did not come:\n" + "\n".join(self.lines[-40:])
        return match

    def text(self):
        with self._changed:
            return "\n".join(self.lines)


class Program:
    """openqq.py as somebody runs it, on a free port or a given one; `base` is where its API is.

    Not `typed` begins where the typed command gets to, after compiling the file and running it
    once more under another name: half a second sooner, on a slow machine.
    """

    def __init__(self, tmpdir, *words, env=None, python=sys.executable, typed=False, port=0):
        os.makedirs(str(tmpdir), exist_ok=True)
        self.tmpdir = str(tmpdir)
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith(("MOJO_", "OPENQQ_", "PYTHONDONTWRITE"))}
        environment.update(env or {})
        file = [FILE]
        if not typed:
            file = ["-S", *openqq.python_words()]
            environment["OPENQQ_PYTHON"] = python
        self.process = subprocess.Popen(
            [python, *file, *words, "--tmpdir", self.tmpdir, "--port", str(port)], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.pid, self.port = self.process.pid, 0
        self.log, self.out = Log(self.process.stderr), Log(self.process.stdout)

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

    close = stop


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


class Heard:
    """What came in, as (name, value) in `rows`; wait(name) gives each row once, in its order."""

    def __init__(self):
        self.rows = []
        self._given = set()  # places in rows; guarded by _changed, as rows are
        self._changed = threading.Condition()

    def add(self, name, value):
        with self._changed:
            self.rows.append((name, value))
            self._changed.notify_all()

    def _place(self, name, wanted):
        return next((place for place, row in enumerate(self.rows) if row[0] == name
                     and place not in self._given and wanted(row[1])), None)

    def wait(self, name, wanted=lambda value: True, seconds=WAIT):
        """The next value under this name that is wanted and was not yet given."""
        with self._changed:
            self._changed.wait_for(lambda: self._place(name, wanted) is not None, seconds)
            place = self._place(name, wanted)
            assert place is not None, f"{name!r} did not come: {self.rows[-20:]!r:.2000}"
            self._given.add(place)
            return self.rows[place][1]


def hang_up(sock):
    """End a connection under whoever reads from it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was quicker


class PeerHandler(http.server.BaseHTTPRequestHandler):
    """One connection to a Peer: path, query and body of each request are read for it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        self.path, _, query = self.path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query))
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.peer.handle(self)

    do_GET = do_POST

    def log_message(self, *args):
        pass


class PeerServer(http.server.ThreadingHTTPServer):
    """What listens for a Peer."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, peer):
        self.peer = peer
        super().__init__(("127.0.0.1", peer.port), PeerHandler)

    def get_request(self):
        sock, address = super().get_request()
        self.peer.accepted += 1
        self.peer.connections.add(sock)
        return sock, address

    def shutdown_request(self, sock):
        self.peer.connections.discard(sock)
        super().shutdown_request(sock)

    def handle_error(self, request, address):
        pass


class Peer:
    """An HTTP server of somebody else's on the loopback, whose connections can be cut.

    `handle(handler)` answers each request; it may keep the connection for as long as it likes.
    """

    def __init__(self, port=0):
        self.port, self.server, self.connections = port, None, set()
        self.accepted = 0  # connections that there have ever been
        self.start()

    def start(self):
        """Listen, after a stop() on the port of before."""
        self.server = PeerServer(self)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def drop(self):
        """Cut all connections at once; it goes on listening."""
        for sock in list(self.connections):
            hang_up(sock)

    def stop(self):
        """Be gone: connections are refused until start()."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
        self.drop()

    close = stop

    def be_gone_after(self, call):
        """Answer this call once, and then be gone."""
        usual = self.handle

        def handle(handler):
            if handler.path.endswith(call):
                handler.protocol_version = "HTTP/1.0"  # nothing follows on this connection
                self.connections.discard(handler.connection)
                self.stop()
            usual(handler)

        self.handle = handle

    @staticmethod
    def reply(handler, status, body, kind="application/json", fields=None):
        """Answer once: text as it is, anything else as JSON; `fields` instead of its kind."""
        if not isinstance(body, (str, bytes)):
            body = json.dumps(body, ensure_ascii=False)
        data = body.encode() if isinstance(body, str) else body
        handler.send_response(status)
        for name, value in ({"Content-Type": kind} if fields is None else fields).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


class Receiver(Peer):
    """A post_api: what it gets is in `events` (a queue of JSON); `answer(event)` is what it says:
    None, a status, or (status, headers, body)."""

    def __init__(self, answer=lambda event: None, port=0):
        self.events, self._answer = queue.Queue(), answer
        self.posts = []       # (path, headers, body, JSON) in the order of their coming
        super().__init__(port)
        self.url += "/post_message"

    def handle(self, handler):
        if handler.command == "GET":
            return self.reply(handler, 501, "")
        event = json.loads(handler.body)
        self.posts.append((handler.requestline.split()[1], handler.headers, handler.body, event))
        said = self._answer(event)
        status, fields, data = said if isinstance(said, tuple) else (said or 200, {}, b"")
        if isinstance(data, dict):
            data, fields = json.dumps(data), {"Content-Type": "application/json"}
        self.reply(handler, status, data, fields=fields)
        self.events.put(event)

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
        """Take no more connections; those that there are get answers, so that programs end soon."""
        self.server.shutdown()
        self.server.server_close()


CQ_CODES = {"&": "&amp;", "[": "&#91;", "]": "&#93;", ",": "&#44;"}


def cq_string(segments):
    """Segments as a string of CQ codes."""
    def escape(value, signs="[&\\[\\],]"):
        return re.sub(signs, lambda sign: CQ_CODES[sign.group()], str(value))

    return "".join(
        escape(row["data"]["text"], "[&\\[\\]]") if row["type"] == "text" else
        "[CQ:" + ",".join([row["type"], *(f"{key}={escape(value)}"
                                          for key, value in row["data"].items())]) + "]"
        for row in segments)


def cq_segments(text):
    """A string of CQ codes as segments."""
    def plain(text):
        for sign, code in reversed(CQ_CODES.items()):
            text = text.replace(code, sign)
        return text

    rows = []
    for part in re.split(r"(\[CQ:[^\[\]]+\])", text):
        if re.match(r"\[CQ:[^\[\]]+\]\Z", part):
            kind, *fields = part[4:-1].split(",")
            data = {key: plain(value) for key, _, value in (f.partition("=") for f in fields)}
            rows.append({"type": kind, "data": data})
        elif part:
            rows.append({"type": "text", "data": {"text": plain(part)}})
    return rows


def ws_frame(payload=b"", opcode=1, fin=True, mask=False, says=None):
    """One WebSocket frame, `says`: the length that it claims to have. A server does not mask."""
    data = payload.encode() if isinstance(payload, str) else payload
    length = len(data) if says is None else says
    short, more = length, b""
    if length > 125:
        short, form = (126, ">H") if length < 65536 else (127, ">Q")
        more = struct.pack(form, length)
    head = bytes([fin << 7 | opcode, mask << 7 | short]) + more
    return head + (b"\0\0\0\0" if mask else b"") + data  # the mask of zeros leaves all as it is


class Channel:
    """Where a Bridge's events go out: a WebSocket, or a stream of server-sent events."""

    def __init__(self, bridge, handler, sse=False):
        self.bridge, self.sse = bridge, sse
        self.sock, self.stream = handler.connection, handler.rfile
        self._sending = threading.Lock()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 20, 0))

    def raw(self, data):
        """Send bytes as they are (on a stream of events: as one chunk of it)."""
        if self.sse:
            data = b"%x\r\n%s\r\n" % (len(data), data)
        with self._sending:
            try:
                self.sock.sendall(data)
            except OSError:
                hang_up(self.sock)  # it has gone, or it does not read; our reader notices

    def send(self, row):
        """Send JSON as an event or an answer."""
        text = json.dumps(row, ensure_ascii=False).encode()
        if self.sse:
            return self.raw(self.bridge.event_name + b"data: " + text + b"\n\n")
        size = self.bridge.pieces or len(text)
        places = range(0, len(text), size)
        return self.raw(b"".join(
            ws_frame(text[place:place + size], 0 if place else 1, fin=place == places[-1])
            for place in places))

    def until_closed(self):
        """Wait until a stream of events is hung up on."""
        with contextlib.suppress(OSError):
            while self.stream.read(1):
                pass

    def read(self):
        """(opcode, payload, fin) of the client's next frame; an error when there is no more."""
        def exactly(count):
            data = self.stream.read(count)
            if len(data) < count:
                raise EOFError
            return data

        first, second = exactly(2)
        length = second & 127
        if length > 125:
            length = int.from_bytes(exactly(2 if length == 126 else 8), "big")
        if not second & 128 or first & 0x70:
            raise ValueError("a frame that is not masked, or has reserved bits")
        mask, data = exactly(4), exactly(length)
        data = bytes(byte ^ key for byte, key in zip(data, itertools.cycle(mask)))
        return first & 15, data, bool(first & 128)

    def texts(self):
        """The client's messages, put together; control frames are answered and noted."""
        whole = None
        while True:
            opcode, data, fin = self.read()
            if opcode >= 8:
                if not fin or len(data) > 125:
                    raise ValueError("a control frame that is too long or in pieces")
                self.bridge.controls.add(opcode, data)
                if opcode == 8:
                    self.raw(ws_frame(data[:2], 8))
                    return
                if opcode == 9 and "*" not in self.bridge.hanging:
                    self.raw(ws_frame(data, 10))
                continue
            if (opcode == 0) != (whole is not None) or opcode > 1:
                raise ValueError(f"opcode {opcode} out of place")
            whole = (whole or b"") + data
            if fin:
                yield whole.decode()
                whole = None


class Bridge(Peer):
    """A OneBot 11 bridge for one account: HTTP, SSE, webhook and WebSocket on one port.

    What it knows stands in plain attributes that a test may change whenever it likes: those that
    keywords set, and friends, groups (a row's `members` is a list, or a callable that makes it),
    strangers, logged_in, answers, hanging. A WebSocket at /api carries actions only, at any other
    path events too.

    calls: (action, params) in the order of their coming. faults: what a client did against the
    protocol; tests end with `assert not bridge.faults`.
    """

    uin, nickname = 10001, "阿猫"
    token = ""                 # what it demands
    refusal = (403, {"status": "failed", "retcode": 1403, "message": "token验证失败"})
    late_refusal = False       # a WebSocket is opened all the same and told so in JSON (NapCat)
    ids = int                  # or str: how ids are written
    message_format = "array"   # or "string"
    sse = True                 # or False (404), or 1404 (200 with that retcode, NapCat without it)
    post_to = secret = ""      # the URL that events are posted to, and what signs them
    unknown = 404              # or 200: how it answers to an action that it does not have
    handshake = b""            # more fields of its answer to a WebSocket's
    lifecycle = True           # whether a WebSocket begins with the event that tells of it
    event_name = b""           # what stands before an event of a stream
    pieces = 0                 # WebSocket texts go out in fragments of so many bytes
    OK = {"status": "ok", "retcode": 0, "data": None, "message": "", "wording": ""}
    IDS = {"user_id", "group_id", "self_id", "target_id", "operator_id", "sender_id", "message_id"}

    def __init__(self, port=0, **quirks):
        vars(self).update(quirks)
        self.friends = [{"user_id": 20001, "nickname": "小明", "remark": "老明"},
                        {"user_id": 20002, "nickname": "小红", "remark": ""}]
        self.strangers = []
        self.groups = [{"group_id": 30001, "group_name": "一家人", "members": [
            self.member(self.uin, "owner"), self.member(20001, "member", nickname="小明", card="爸"),
            self.member(40001, "admin", nickname="路人")]}]
        self.logged_in, self.faults = True, []
        self.answers = {}           # action: what is answered instead, see _answer
        self.hanging = set()        # actions that are never answered; "*": nothing is, no ping
        self.refused = 0            # requests with a wrong token or none
        self.posted = []            # what was answered to each event that was posted: a status
        self.controls = Heard()     # (opcode, payload) of the control frames that came
        self._heard, self._numbers = Heard(), itertools.count(7000001)
        self.calls, self.wait_call = self._heard.rows, self._heard.wait
        self._opened, self._channels = threading.Condition(), []  # that guards these
        super().__init__(port)

    @property
    def ws(self):
        """Its address as a WebSocket."""
        return f"ws://127.0.0.1:{self.port}"

    @staticmethod
    def member(user_id, role="member", **more):
        """A member's row."""
        return dict({"user_id": user_id, "nickname": f"网友{user_id}", "card": "", "sex": "unknown",
                     "area": "", "join_time": 1500000000, "last_sent_time": 1600000000,
                     "level": "1", "role": role, "title": ""}, **more)

    # What is known

    def _written(self, value):
        """The same with ids as this bridge writes them."""
        if isinstance(value, dict):
            return {key: self.ids(item) if key in self.IDS and str(item).lstrip("-").isdecimal()
                    else self._written(item) for key, item in value.items()}
        return [self._written(item) for item in value] if isinstance(value, list) else value

    @staticmethod
    def _members(group):
        members = group.get("members", [])
        return members() if callable(members) else members

    def _group_row(self, group):
        row = {"group_remark": "", "max_member_count": 2000,
               "member_count": len(self._members(group)), **group}
        return {name: value for name, value in row.items() if name != "members"}

    @staticmethod
    def _one(rows, key, value):
        return next((row for row in rows if str(row[key]) == str(value)), None)

    def _member_row(self, group_id, user_id):
        group = self._one(self.groups, "group_id", group_id)
        return group and self._one(self._members(group), "user_id", user_id)

    def _stranger(self, user_id):
        found = self._one([*self.friends, *self.strangers, *itertools.chain.from_iterable(
            map(self._members, self.groups))], "user_id", user_id)
        return found and {"user_id": user_id, "nickname": found.get("nickname", ""),
                          "sex": found.get("sex", "unknown"), "age": found.get("age", 0)}

    # Actions

    @classmethod
    def failed(cls, retcode=100, wording="失败了", **more):
        """An answer that says no."""
        return dict(cls.OK, status="failed", retcode=retcode, message=wording, wording=wording,
                    **more)

    def _data(self, action, params):
        """(data,) of an action that this bridge has, None for others; (None,) for nothing found."""
        group = self._one(self.groups, "group_id", params.get("group_id"))
        if action.startswith("send_"):
            return {"message_id": next(self._numbers)},
        found = {
            "get_login_info": lambda: {"user_id": self.uin, "nickname": self.nickname},
            "get_status": lambda: {"online": self.logged_in, "good": True, "stat": {}},
            "get_version_info": lambda: {"app_name": "TestBridge", "app_version": "1.0",
                                         "protocol_version": "v11"},
            "get_friend_list": lambda: list(self.friends),
            "get_stranger_info": lambda: self._stranger(params.get("user_id")),
            "get_group_list": lambda: [self._group_row(row) for row in list(self.groups)],
            "get_group_info": lambda: group and self._group_row(group),
            "get_group_member_list": lambda: group and [
                dict(row, group_id=group["group_id"]) for row in self._members(group)],
            "get_group_member_info": lambda: self._member_row(
                params.get("group_id"), params.get("user_id"))}.get(action)
        return found and (found(),)

    def _answer(self, action, params):
        """(status, row) of an action; answers[action] may be a row that is laid over one that says
        yes ({"retcode": 100, "wording": "…"}, {"data": …}), an HTTP status, text or a list to be
        answered as it stands, or callable(params) giving one of these, after as long as it likes.
        """
        own = self.answers.get(action)
        own = own(params) if callable(own) else own
        if own is None:
            return self._usual(action, params)
        if isinstance(own, int):
            return own, self.failed(1400, f"HTTP {own}")
        if not isinstance(own, dict):
            return 200, own
        status = {0: "ok", 1: "async"}.get(own.get("retcode", 0), "failed")
        return 200, self._written({**self.OK, "status": status, "message": own.get("wording", ""),
                                   **own})

    def _usual(self, action, params):
        if not self.logged_in and action not in ("get_status", "get_version_info"):
            return 200, self.failed(1400, "未登录")
        if re.match("delete_|set_(group|friend)_|upload_|(group|friend)_poke$", action):
            return 200, dict(self.OK)  # done, with nothing to tell
        data = self._data(action, params)
        if data is None:
            return self.unknown, self.failed(1404 if self.unknown == 404 else 200,
                                             f"不支持的Api {action}")
        if data[0] is None:
            return 200, self.failed(1200, "查无此人")
        return 200, dict(self.OK, data=self._written(data[0]))

    # Requests

    def handle(self, handler):
        """Answer one HTTP request, which may become a channel."""
        ws = handler.headers.get("Upgrade", "").lower() == "websocket"
        shown = handler.headers.get("Authorization", "").partition("Bearer ")[2]
        known = not self.token or self.token in (shown, handler.query.get("access_token"))
        self.refused += not known
        if not known and not (ws and self.late_refusal):
            status, body = self.refusal
            kind = "text/plain" if isinstance(body, str) else "application/json"
            self.reply(handler, status, body, kind)
        elif ws:
            self._serve_ws(handler, known)
        elif handler.command == "GET" and handler.path == "/_events":
            self._serve_sse(handler)
        elif handler.command == "GET":
            self.reply(handler, 200, {"message": "TestBridge"})
        else:
            self._serve_action(handler)

    def _serve_action(self, handler):
        action = handler.path.strip("/")
        kind = handler.headers.get("Content-Type", "").partition(";")[0]
        try:
            params = json.loads(handler.body)
            assert isinstance(params, dict) and kind == "application/json"
        except (ValueError, AssertionError):
            self.faults.append(f"{action}: {kind} {handler.body!r}")
            return self.reply(handler, 400, self.failed(1400, "no JSON object"))
        self._heard.add(action, params)
        if self.hanging & {action, "*"}:
            return Channel(self, handler).until_closed()
        self.reply(handler, *self._answer(action, params))

    def _serve_sse(self, handler):
        if "_events" in self.hanging:
            return Channel(self, handler).until_closed()
        if self.sse is not True:
            status, row = (404, "404 page not found") if not self.sse else (
                200, self.failed(1404, "不支持的Api _events", echo=None))
            return self.reply(handler, status, row)
        handler.close_connection = True
        handler.connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
            b"Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n")
        channel = Channel(self, handler, sse=True)
        self._open(channel)
        channel.until_closed()
        self._open(channel, False)

    def _serve_ws(self, handler, known):
        handler.close_connection = True
        key = handler.headers.get("Sec-WebSocket-Key", "")
        guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1((key + guid).encode()).digest())
        if len(key) != 24 or handler.headers.get("Sec-WebSocket-Version") != "13":
            self.faults.append(f"handshake: {dict(handler.headers)}")
        handler.connection.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            + self.handshake + b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        channel = Channel(self, handler)
        if not known:
            if self.refusal:  # Milky's has none to say
                channel.send(self.failed(1403, "token验证失败", echo=None))
            return channel.raw(ws_frame(struct.pack(">H", 1000 if self.refusal else 1008), 8))
        if handler.path.rstrip("/") != "/api":
            if self.lifecycle:
                channel.send(self._event(meta_event_type="lifecycle", sub_type="connect"))
            self._open(channel)
        try:
            for text in channel.texts():
                self._act(channel, text)
        except (OSError, EOFError):
            pass
        except (ValueError, TypeError, LookupError) as error:
            self.faults.append(repr(error))
            channel.raw(ws_frame(struct.pack(">H", 1002), 8))
        finally:
            self._open(channel, False)

    def _act(self, channel, text):
        """Carry out an action that came on a WebSocket."""
        said = json.loads(text)
        action, params = said["action"], said.get("params") or {}
        self._heard.add(action, params)

        def answer():
            row = self._answer(action, params)[1]
            if isinstance(row, str):
                channel.raw(ws_frame(row))
            else:
                channel.send({"echo": said.get("echo"), **row} if isinstance(row, dict) else row)

        if self.hanging & {action, "*"}:
            return
        if callable(self.answers.get(action)):
            threading.Thread(target=answer, daemon=True).start()  # it may wait; others need not
        else:
            answer()

    # Channels and events

    def _open(self, channel, there=True):
        with self._opened:
            self._channels[:] = [one for one in self._channels if one is not channel]
            self._channels += [channel] * there
            self._opened.notify_all()

    def connected(self, count=1, seconds=WAIT):
        """Wait until so many event channels (WebSocket or SSE) are open."""
        with self._opened:
            there = self._opened.wait_for(lambda: len(self._channels) >= count, seconds)
            assert there, f"{len(self._channels)} channels, {self.calls[-20:]!r:.2000}"

    def left(self, seconds=WAIT):
        """Wait until no event channel is open any more."""
        with self._opened:
            assert self._opened.wait_for(lambda: not self._channels, seconds)

    def drop(self):
        """Cut all connections at once; connected() then waits for new ones."""
        with self._opened:
            self._channels.clear()
        super().drop()

    def send_raw(self, data):
        """Send bytes as they are on each WebSocket (see ws_frame; text as a text frame), on SSE as
        a chunk."""
        sse = data.encode() if isinstance(data, str) else data
        for channel in list(self._channels):
            channel.raw(ws_frame(data) if isinstance(data, str) and not channel.sse else sse)

    def _event(self, **event):
        kind = next((kind for kind in ("message", "notice", "request", "meta_event")
                     if kind + "_type" in event), "message")
        return self._written(dict({"time": int(time.time()), "self_id": self.uin,
                                   "post_type": kind}, **event))

    def emit(self, **event):
        """Send an event on all channels, with what every event has filled in; returns it."""
        return self.tell(self._event(**event))

    def tell(self, event):
        """Send an event as it is on all channels; returns it."""
        for channel in list(self._channels):
            channel.send(event)
        if self.post_to:
            self.post(event)
        return event

    def post(self, event, **headers):
        """Post an event as a webhook, in chunks."""
        body = json.dumps(event, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json", "X-Self-ID": str(self.uin), **headers}
        if self.secret:
            sign = hmac.new(self.secret.encode(), body, "sha1").hexdigest()
            headers.setdefault("X-Signature", "sha1=" + sign)
        base, path = re.match("(http://[^/]+)(/.*)", self.post_to).groups()
        pieces = iter([body[:7], body[7:]])  # of no length known before, so it goes in chunks
        try:
            self.posted.append(request(base, path, "POST", pieces, headers, WAIT)[0])
        except (OSError, http.client.HTTPException):
            self.posted.append(None)

    def _message(self, message, **event):
        """A message event; the message may be a string of CQ codes or a list of segments."""
        rows = cq_segments(message) if isinstance(message, str) else message
        text = message if isinstance(message, str) else cq_string(message)
        said = {"message_id": next(self._numbers), "raw_message": text, "font": 14,
                "message": rows if self.message_format == "array" else text,
                "message_format": self.message_format}
        return self.emit(**dict(said, **event))

    def say_private(self, user_id, message, **more):
        """A friend speaks to the account; `more` goes over the event's fields."""
        friend = self._one(self.friends, "user_id", user_id) or {}
        sender = {"user_id": user_id, "nickname": friend.get("nickname", ""), "card": ""}
        return self._message(message, **dict(
            {"message_type": "private", "sub_type": "friend", "user_id": user_id,
             "sender": sender}, **more))

    def say_group(self, group_id, user_id, message, **more):
        """A member speaks in a group; `more` goes over the event's fields."""
        row = self._member_row(group_id, user_id) or {}
        sender = {"user_id": user_id, "nickname": row.get("nickname", ""),
                  "card": row.get("card", ""), "role": row.get("role", "member")}
        return self._message(message, **dict(
            {"message_type": "group", "sub_type": "normal", "group_id": group_id,
             "user_id": user_id, "sender": sender}, **more))


class MilkyBridge(Bridge):
    """A Milky bridge for one account: calls, WebSocket, SSE and webhook on one port.

    Knows who is there as a Bridge does. Types are as strict as LLBot's: what a call was given is in
    `calls`, what it must not be given in `faults`. Keywords, by which the implementations differ:

    ws, sse       whether /event takes a WebSocket, and streams server-sent events
    late_refusal  a WebSocket is opened all the same, then closed with 1008 (LLBot)
    own           whether what it sends itself comes as an event, too (Yogurt)
    fields        "1.2", or "1.0": entities as before there were remarks and creation times
    missing       calls that it has not: 404 (Lagrange.Milky)
    """

    CALLS = """get_login_info get_impl_info get_user_profile(user_id) get_friend_list get_group_list
        get_friend_info(user_id) get_group_info(group_id) get_group_member_list(group_id)
        get_group_member_info(group_id,user_id) send_private_message(user_id,message)
        send_group_message(group_id,message) recall_private_message(user_id,message_seq)
        recall_group_message(group_id,message_seq) get_resource_temp_url(resource_id)
        get_message(message_scene,peer_id,message_seq) get_history_messages(message_scene,peer_id)
        accept_friend_request(initiator_uid) reject_friend_request(initiator_uid)
        delete_friend(user_id) set_group_member_mute(group_id,user_id) quit_group(group_id)
        set_group_whole_mute(group_id) kick_group_member(group_id,user_id)
        set_group_name(group_id,new_group_name) set_group_member_card(group_id,user_id,card)
        set_group_member_special_title(group_id,user_id,special_title)
        set_group_member_admin(group_id,user_id) get_group_notifications
        accept_group_request(notification_seq,notification_type,group_id)
        reject_group_request(notification_seq,notification_type,group_id)
        accept_group_invitation(group_id,invitation_seq) send_group_nudge(group_id,user_id)
        reject_group_invitation(group_id,invitation_seq) send_friend_nudge(user_id)
        upload_private_file(user_id,file_uri,file_name) send_profile_like(user_id)
        upload_group_file(group_id,file_uri,file_name)
        get_private_file_download_url(user_id,file_id,file_hash)
        get_group_file_download_url(group_id,file_id)"""
    SEGMENTS = """text(text) mention(user_id) mention_all face(face_id) record(uri) image(uri)
        reply(message_seq) video(uri) forward(messages) light_app(json_payload)"""
    SCHEMAS, SEGMENTS = [{  # name: what it must have
        name: words.split(",") if words else [] for name, words in re.findall(
            r"(\w+)(?:\((.*?)\))?", text)} for text in (CALLS, SEGMENTS)]
    TYPES = {  # of what is no text
        **dict.fromkeys("user_id group_id peer_id limit duration count".split(), int),
        **dict.fromkeys("message_seq start_message_seq notification_seq invitation_seq "
                        "start_notification_seq".split(), int),
        **dict.fromkeys("no_cache is_filtered is_mute reject_add_request is_set is_self "
                        "is_large".split(), bool), "message": list, "messages": list}

    OK, refusal, event_name = {"status": "ok", "retcode": 0}, None, b"event: milky_event\n"

    def __init__(self, ws=True, own=False, fields="1.2", missing=(), **more):
        self.has_ws, self.own, self.fields, self.missing = ws, own, fields, missing
        self.said = {}               # (scene, peer): its messages, the oldest first
        self.requests = []           # what get_group_notifications tells
        self.shown = set()           # the tokens that came
        self.seqs = {}               # (scene, peer): the last message_seq
        super().__init__(lifecycle=False, **more)

    @classmethod
    def misfit(cls, schema, given):
        """What is wrong with what a call, or a segment, was given; None if nothing is."""
        for name in schema:
            if name not in given:
                return f"{name} is missing"
        for name, value in given.items():
            if type(value) is not cls.TYPES.get(name, str) or (
                    name in ("user_id", "group_id", "peer_id") and not 10001 <= value < 2 ** 32):
                return f"{name} is {value!r}"
        return next(filter(None, (cls.misfit(cls.SEGMENTS[row["type"]], row["data"])
                                  for row in given.get("message", []))), None)

    # Who is there, in Milky's words

    def friend(self, user_id):
        """A friend's entity."""
        row = self._one(self.friends, "user_id", user_id) or {}
        return {"user_id": int(user_id), "nickname": row.get("nickname") or "", "sex":
                row.get("sex", "unknown"), "qid": "", "remark": row.get("remark") or "",
                "category": {"category_id": 1, "category_name": row.get("category", "我的好友")}}

    def group(self, group_id):
        """A group's entity."""
        row = self._one(self.groups, "group_id", group_id) or {"group_id": group_id}
        new = {"remark": row.get("remark", ""), "created_time": row.get("created_time", 0),
               "description": row.get("description", ""), "question": "", "announcement": ""}
        return {"group_id": int(group_id), "group_name": row.get("group_name", ""),
                "member_count": len(self._members(row)), "max_member_count": 2000,
                **(new if self.fields != "1.0" else {})}

    def person(self, group_id, user_id):
        """A member's entity."""
        row = self._member_row(group_id, user_id) or {}
        return {"user_id": int(user_id), "group_id": int(group_id), "nickname":
                row.get("nickname", ""), "sex": "unknown", "card": row.get("card") or "",
                "title": row.get("title") or "", "level": 1, "role": row.get("role", "member"),
                "join_time": row.get("join_time", 0), "last_sent_time": 1600000000,
                "shut_up_end_time": None}

    def _data(self, action, params):
        group, user = params.get("group_id"), params.get("user_id")
        place = (params.get("message_scene"), params.get("peer_id"))
        last = params.get("start_message_seq") or 10 ** 9
        rows = [row for row in self.said.get(place, []) if row["message_seq"] <= last]
        page = rows[-params.get("limit", 20):]
        known = self._one(self.groups, "group_id", group)
        person = self._stranger(user)
        return {
            "get_login_info": lambda: {"uin": self.uin, "nickname": self.nickname},
            "get_impl_info": lambda: {
                "impl_name": "TestBridge", "impl_version": "1", "qq_protocol_version": "1",
                "qq_protocol_type": "linux", "milky_version": self.fields},
            "get_user_profile": lambda: person and {
                "nickname": person["nickname"], "sex": "unknown", "age": 0, "level": 1,
                **dict.fromkeys(("qid", "remark", "bio", "country", "city", "school"), "")},
            "get_friend_list": lambda: {
                "friends": [self.friend(row["user_id"]) for row in self.friends]},
            "get_friend_info": lambda: {"friend": self.friend(user)},
            "get_group_list": lambda: {
                "groups": [self.group(row["group_id"]) for row in self.groups]},
            "get_group_info": lambda: known and {"group": self.group(group)},
            "get_group_member_list": lambda: known and {"members": [
                self.person(group, row["user_id"]) for row in self._members(known)]},
            "get_group_member_info": lambda: self._member_row(group, user) and {
                "member": self.person(group, user)},
            "send_private_message": lambda: self.send(
                "friend" if self._one(self.friends, "user_id", user) else "temp", user, params),
            "send_group_message": lambda: self.send("group", group, params),
            "get_message": lambda: next(({"message": row} for row in self.said.get(place, [])
                                         if row["message_seq"] == params["message_seq"]), None),
            "get_history_messages": lambda: {"messages": page, "next_message_seq":
                                             page[0]["message_seq"] - 1 if page != rows else None},
            "get_group_notifications": lambda: {"notifications": self.requests,
                                                "next_notification_seq": None},
            "get_resource_temp_url": lambda: {"url": f"{self.url}/{params['resource_id']}"},
            **dict.fromkeys(("upload_private_file", "upload_group_file"),
                            lambda: {"file_id": "/F1"}),
            **dict.fromkeys(("get_private_file_download_url", "get_group_file_download_url"),
                            lambda: {"download_url": f"{self.url}/{params['file_id']}"}),
        }.get(action, dict)()

    def send(self, scene, peer, params):
        """Send what a call says; what the call answers."""
        row = self.say(scene, peer, self.uin, list(map(self.come_in, params["message"])),
                       tell=self.own)
        return {"message_seq": row["message_seq"], "time": row["time"]}

    @staticmethod
    def come_in(part):
        """A segment that was sent, as those who get it see it."""
        data = part["data"]
        more = {"mention": {"name": "谁"}, "reply": {"sender_id": 20001, "time": 1, "segments": []},
                "image": {"resource_id": "R", "temp_url": "http://h.example/", "width": 1,
                          "height": 1, "summary": "[图片]", "sub_type": "normal"},
                "face": {"is_large": False}}
        return {"type": part["type"], "data": {**data, **more.get(part["type"], {})}}

    # Calls

    def failed(self, retcode, message):
        """An answer that says no."""
        return {"status": "failed", "retcode": retcode, "message": message}

    def _usual(self, action, params):
        if action not in self.SCHEMAS or action in self.missing:
            return 404, "404 Not Found"
        wrong = self.misfit(self.SCHEMAS[action], params)
        if wrong:
            self.faults.append(f"{action}: {wrong}")
            return 200, self.failed(-400, wrong)
        if not self.logged_in:
            return 200, self.failed(-403, "Bot is not logged in")
        data = self._data(action, params)
        if data is None:
            return 200, self.failed(-404, "not found")
        return 200, {**self.OK, "data": data}

    def handle(self, handler):
        shown = handler.headers.get("Authorization", "").partition("Bearer ")[2]
        self.shown.add(shown)
        is_event = handler.path == "/event"
        ws = handler.headers.get("Upgrade", "").lower() == "websocket"
        known = not self.token or self.token == shown or (
            is_event and handler.query.get("access_token") == self.token)
        self.refused += not known
        if not known and not (ws and is_event and self.late_refusal):
            self.reply(handler, 401, "Unauthorized", "text/plain")
        elif is_event and ws and self.has_ws:
            self._serve_ws(handler, known)
        elif is_event and handler.command == "GET" and not ws:
            self._serve_sse(handler)
        elif handler.command == "POST" and handler.path.startswith("/api/"):
            handler.path = handler.path[4:]
            self._serve_action(handler)
        else:
            self.reply(handler, 404, "404 Not Found", "text/plain")

    # Events

    def emit(self, kind, **data):
        """Send an event on all channels; returns it."""
        return self.tell({"time": int(time.time()), "self_id": self.uin, "event_type": kind,
                          "data": data})

    def post(self, event):
        super().post(event, **({"Authorization": "Bearer " + self.token} if self.token else {}))

    def say(self, scene, peer, sender, segments, tell=True, **more):
        """Somebody speaks; `tell`: whether an event tells of it, or only the history."""
        seq = self.seqs[scene, peer] = self.seqs.get((scene, peer), 100) + 1
        if isinstance(segments, str):
            segments = [{"type": "text", "data": {"text": segments}}]
        row = {"message_scene": scene, "peer_id": peer, "message_seq": seq, "sender_id": sender,
               "time": int(time.time()), "segments": segments}
        if scene == "group":
            row.update(group=self.group(peer), group_member=self.person(peer, sender))
        elif scene == "friend":
            row["friend"] = self.friend(peer)
        row.update(more)
        self.said.setdefault((scene, peer), []).append(row)
        if tell:
            self.emit("message_receive", **row)
        return row

    def say_private(self, user_id, message, **more):
        return self.say("friend", user_id, user_id, message, **more)

    def say_group(self, group_id, user_id, message, **more):
        return self.say("group", group_id, user_id, message, **more)


class NapCatPage(Peer):
    """NapCat's WebUI, as far as logging in goes: change logged_in, offline, qrcode.

    calls: (path, JSON) in their order. refused: how often a wrong token came. next_qrcode: what a
    refresh puts in the place of qrcode. Kicked off line, it still takes itself for logged in and
    will not show a QR without a refresh. Its answers are all 200, whatever happened.
    """

    def __init__(self, token="napcat"):
        self.token, self.refused, self.calls = token, 0, []
        self.logged_in = self.offline = False
        self.qrcode = self.next_qrcode = "https://txz.qq.com/p?k=one&f=1600001604"
        self.expire()
        super().__init__()

    def expire(self):
        """What it has let in is let in no more."""
        self._credential = base64.b64encode(os.urandom(24)).decode()

    def handle(self, handler):
        said = json.loads(handler.body or b"{}")
        self.calls.append((handler.path, said))
        message, data = self._answer(handler, said)
        self.reply(handler, 200, {"code": -1 if message else 0, "message": message or "success",
                                  "data": data})

    def _answer(self, handler, said):
        """(what is wrong, data)"""
        call = handler.path.rpartition("/")[2]
        if call == "login":
            if said.get("hash") != hashlib.sha256((self.token + ".napcat").encode()).hexdigest():
                self.refused += 1
                return "token is invalid", None
            return "", {"Credential": self._credential}
        if handler.headers.get("Authorization", "")[7:] != self._credential:
            return "Unauthorized", None
        if call == "CheckLoginStatus":
            return "", {"isLogin": self.logged_in and not self.offline, "isOffline": self.offline,
                        "qrcodeurl": self.qrcode, "loginError": ""}
        if self.logged_in and not (call == "RefreshQRcode" and self.offline):
            return "QQ Is Logined", None
        if call == "RefreshQRcode":
            self.qrcode = self.next_qrcode
            return "", {"qrcodeurl": self.qrcode}
        return ("", {"qrcode": self.qrcode}) if self.qrcode else ("QRCode Get Error", None)


class LLBotPage(Peer):
    """LLBot's WebUI, as far as logging in goes: change logged_in, qrcode.

    refused: how often a wrong token came; the fourth would lock it for an hour.
    """

    def __init__(self, password):
        self.logged_in, self.refused, self.password = False, 0, password
        self.qrcode = "https://txz.qq.com/p?k=two&f=1600001604"
        super().__init__()

    def handle(self, handler):
        data = {"/api/login-qrcode": {"qrcodeUrl": self.qrcode, "expireTime": 120,
                                      "pngBase64QrcodeData": "data:image/png;base64,"},
                "/api/login-info": {"uin": "10001" if self.logged_in else "", "nick": "阿猫",
                                    "online": self.logged_in}}.get(handler.path)
        shown = hashlib.sha256(self.password.encode()).hexdigest()
        if handler.headers.get("X-Webui-Token") != shown:
            self.refused += 1
            self.reply(handler, 403, {"success": False, "message": "Token校验失败",
                                      "remainingAttempts": 4 - self.refused})
        else:
            self.reply(handler, 200 if data else 404, {"success": bool(data), "data": data})


class ILink(Peer):
    """Tencent's bot API and its store of pictures, as far as WEIXIN.md knows them.

    One person, `owner`, scans codes and speaks: scan(), confirm(), say(). `status` is what
    get_qrcode_status answers; `calls`: (name, JSON). `ill[name]` is answered instead of what is
    right: a row or a status. A poll is answered when there is news, or after `hold` s.
    """

    def __init__(self, port=0, hold=0.5):
        self.owner, self.me, self.hold = "o1@im.wechat", "b1@im.bot", hold
        self.status, self.code, self.token, self.digits = {"status": "wait"}, "", "", ""
        self.ill, self.media, self.left = {}, {}, 0
        self.messages = []               # all that were ever said, their cursor is the count
        self.sent = []                   # the msg of each sendmessage that was taken
        self.pollers = 0
        self._heard = Heard()
        self.calls, self.wait_call = self._heard.rows, self._heard.wait
        self._news = threading.Condition()
        super().__init__(port)

    def change(self, **status):
        with self._news:
            self.status = status
            self._news.notify_all()

    def scan(self):
        self.change(status="scaned")

    def confirm(self, **more):
        self.token = "token-" + os.urandom(4).hex()
        self.change(**{"status": "confirmed", "bot_token": self.token, "ilink_bot_id": self.me,
                       "ilink_user_id": self.owner, "baseurl": self.url, **more})

    def end(self):
        """The token is worth nothing any more."""
        self.token = ""
        self.change(status="wait")

    def say(self, *items):
        """Somebody says a text, or items; the message's id."""
        with self._news:
            number = str((1 << 63) + len(self.messages))
            parts = [item if isinstance(item, dict) else {"type": 1, "text_item": {"text": item}}
                     for item in items]
            self.messages.append({
                "seq": len(self.messages), "message_id": int(number), "message_type": 1,
                "message_state": 2, "from_user_id": self.owner, "to_user_id": self.me,
                "client_id": number, "create_time_ms": int(time.time() * 1000),
                "context_token": f"context-{number}", "item_list": parts})
            self.left = 10
            self._news.notify_all()
        return number

    def picture(self, data, way="hex"):
        """An item with a picture that is on the server, its key told in one of the known ways."""
        key, name = os.urandom(16), os.urandom(8).hex()
        self.media[name] = data if way == "plain" else openqq.aes_128_ecb(key, data, True)
        media, more = {"encrypt_query_param": name, "encrypt_type": 1}, {}
        if way == "hex":
            more["aeskey"] = key.hex()
        elif way != "plain":
            text = key.hex().encode() if way == "base64 of hex" else key
            media["aes_key"] = base64.b64encode(text).decode()
        if way == "url":
            media["full_url"] = f"{self.url}/download?encrypted_query_param={name}"
        return {"type": 2, "image_item": {"media": media, **more}}

    def handle(self, handler):
        name = handler.path.rpartition("/bot/")[2] if "/ilink/bot/" in handler.path else (
            handler.path.strip("/"))
        if name in ("download", "upload"):
            return self._store(handler, name)
        said = json.loads(handler.body or b"{}")
        self._heard.add(name, {**said, **handler.query})
        ill, bare = self.ill.get(name), name in ("get_bot_qrcode", "get_qrcode_status")
        if isinstance(ill, int):
            return self.reply(handler, ill, {})
        if ill is None and not bare and (
                handler.headers.get("Authorization") != f"Bearer {self.token}" or not self.token
                or handler.headers.get("AuthorizationType") != "ilink_bot_token"):
            ill = {"ret": -14, "errmsg": "session timeout"}
        own = getattr(self, "_" + name, lambda said, handler: {
            "ret": 0, "typing_ticket": "ticket"})
        self.reply(handler, 200, ill or own(said, handler))

    def _get_bot_qrcode(self, said, handler):
        self.code = os.urandom(8).hex()
        if self.status["status"] not in ("binded_redirect", "confirmed"):
            self.status = {"status": "wait"}
        return {"qrcode": self.code,
                "qrcode_img_content": f"https://liteapp.weixin.qq.com/q/{self.code}"}

    def _get_qrcode_status(self, said, handler):
        if handler.query.get("qrcode") != self.code:
            return {"status": "expired"}
        with self._news:
            before = self.status
            if before["status"] == "wait":
                self._news.wait_for(lambda: self.status is not before, self.hold)
            known = not self.digits or handler.query.get("verify_code") == self.digits
            return dict(self.status) if known or self.status["status"] != "confirmed" else {
                "status": "need_verifycode"}

    def _getupdates(self, said, handler):
        token, start = self.token, int(said["get_updates_buf"] or 0)
        with self._news:
            self.pollers += 1
            mine = self.pollers          # a newer poll ends the older one
            self._news.notify_all()
            self._news.wait_for(lambda: len(self.messages) > start or self.token != token
                                or self.pollers != mine, self.hold)
            if self.token != token:
                return {"ret": -14, "errmsg": "session timeout"}
            return {"ret": 0, "msgs": self.messages[start:],
                    "get_updates_buf": str(len(self.messages)) if self.messages[start:] else ""}

    def _sendmessage(self, said, handler):
        message = said["msg"]
        known = [row["context_token"] for row in self.messages]
        assert len(message["item_list"]) == 1 and message["message_type"] == 2
        if message["context_token"] not in known or not self.left:
            return {"ret": -2, "errmsg": "prepare failed"}
        self.left -= 1
        self.sent.append(message)
        return {"message_id": str((1 << 62) + len(self.sent))}

    def _getuploadurl(self, said, handler):
        self.upload = said
        return {"ret": 0, "upload_param": "up-" + said["filekey"]}

    def _store(self, handler, name):
        param = handler.query["encrypted_query_param"]
        if name == "download":
            data = self.media.get(param)
            self.reply(handler, 404 if data is None else 200, data or b"", fields={})
        elif "upload" in self.ill:
            self.reply(handler, self.ill["upload"], b"", fields={"x-error-message": "not today"})
        else:
            assert len(handler.body) == self.upload["filesize"]
            self.media["down-" + param] = handler.body
            self.reply(handler, 200, b"", fields={"x-encrypted-param": "down-" + param})

    def got(self, number):
        """The bytes of a picture that was sent, by the key that its message tells."""
        item = self.sent[number]["item_list"][0]
        (kind,) = [key for key in item if key.endswith("_item")]
        media = item[kind]["media"]
        key = bytes.fromhex(base64.b64decode(media["aes_key"]).decode())
        return openqq.aes_128_ecb(key, self.media[media["encrypt_query_param"]], False)


@pytest.fixture
def start(tmp_path, closing):
    """start("controller", …) and start("client", …): programs that end with the test."""
    return lambda *words, tmpdir=tmp_path, **kwargs: closing(
        Program(tmpdir, *words, **kwargs)).ready()


@pytest.fixture
def receive(closing):
    """receive(answer) makes a Receiver that ends with the test."""
    return lambda *args, **kwargs: closing(Receiver(*args, **kwargs))


@contextlib.contextmanager
def serving(directory, *words, **kwargs):
    """A program that serves, and ends well."""
    program = Program(directory, *words, **kwargs)
    try:
        yield program.ready()
    finally:
        status = program.stop()
    assert status == 0
    assert "Traceback" not in program.log.text()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A controller with alice and bob, running; for tests that leave it as it was."""
    with serving(tmp_path_factory.mktemp("pair"), "controller", typed=True) as program:
        program.login("alice")
        program.login("bob")
        yield program


# ------------------------------------------------------------------------------------------------
# HTTP in, HTTP out, who may call, bad input
# ------------------------------------------------------------------------------------------------


ICE = urllib.parse.quote("小冰")  # everybody's friend on the local network
INFO = b"GET /openqq/get_client_info HTTP/1.1\r\n"
HOST = b"Host: localhost\r\n"
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=----x1"
JSON = "application/json"


def until_closed(port, data, ending=False):
    """All that a server answers to some bytes; it must close the connection of its own accord.

    With `ending` we close our side first, so that it need not wait for more.
    """
    answer = b""
    with socket.create_connection(("127.0.0.1", port), WAIT) as sock:
        with contextlib.suppress(OSError):  # it has seen enough
            sock.sendall(data)
            if ending:
                sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            for piece in iter(lambda: sock.recv(65536), b""):
                answer += piece
    return answer


def split_answers(data, heads=()):
    """[(status, fields, body)] of a row of answers; those numbered in `heads` have no body."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:])
        length = 0 if len(found) in heads else int(fields.get("content-length", 0))
        found.append((int(lines[0].split()[1]), fields, data[:length]))
        data = data[length:]
    return found


def asking(*fields, line=INFO):
    return line + HOST + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def line_of(target, method="GET", version="1.1"):
    """A request line; `target` is text, or bytes as they are."""
    target = target if isinstance(target, bytes) else target.encode()
    return b"%b %b HTTP/%b\r\n" % (method.encode(), target, version.encode())


LAST = asking(b"Connection: close", line=line_of("/", "OPTIONS"))


def raw_call(port, target, *fields, kind=None, body=None, method="GET"):
    """(status, fields, body) of one call, whose target and body are text, or bytes as they are;
    a POST where there is a `kind` of body."""
    body = body.encode() if isinstance(body, str) else body or b""
    about = [f"Content-Type: {kind}".encode(), b"Content-Length: %d" % len(body)] if kind else []
    [answer] = split_answers(until_closed(port, asking(
        b"Connection: close", *about, *fields,
        line=line_of(target, "POST" if kind else method)) + body))
    return answer


def ports_of(program, name="alice", **params):
    """The two ways to an account's API: (port, what its query begins with)."""
    [row] = program.call("check_client", client=name, **params)["client"]
    return [(row["port"], ""), (program.port, f"client={name}&")]


def heard(program, name="alice"):
    """The contents that an account sent or got since the last time."""
    mark = os.urandom(8).hex()
    sent = program.call("send_friend_message", client=name, name="小冰", content=mark)
    assert sent["code"] == 0, sent
    contents = []
    while contents.count(mark) < 2:  # what was sent, and 小冰's echo of it
        contents += [event["content"] for event in program.call("check_event", client=name)
                     if "content" in event]
    return [content for content in contents if content != mark]


def eventually(check):
    """Wait for what no event tells of; the last value of check()."""
    end = time.monotonic() + WAIT
    while not check() and time.monotonic() < end:
        time.sleep(0.02)
    return check()


def chunked(body):
    return asking(b"Transfer-Encoding: chunked", b"Content-Type: " + FORM.encode(),
                  line=line_of("/openqq/search_friend", "POST")) + body


# Requests that could be read in two ways, or that are none, or too large, and how each is refused.
HOSTILE = [(status, asking(*fields)) for status, fields in [
    *((400, [b"Content-Length:" + length]) for length in (
        b" 5, 5| +4| -1| 1_0|| \xb2| 99999999999999999999").split(b"|")),
    *((501, [b"Transfer-Encoding:" + coding]) for coding in (
        b" gzip, chunked| chunked, chunked|| chunked;q=1| xchunked").split(b"|")),
    *((400, [field]) for field in (
        b"Transfer-Encoding: \x0bchunked", b"X: a\rContent-Length: 5", b"X: a\nContent-Length: 5",
        b"Content-Length : 5", b": 5", b"Content-Length 5", b"X(y): 5", b"X: a\0b")),
    *((400, fields) for fields in (
        [b"Content-Length: 0"] * 2, [b"Transfer-Encoding: chunked", b"Transfer-Encoding: x"],
        [b"Content-Length: 5", b"Transfer-Encoding: chunked", b"", b"0", b""],
        [b"X: a", b"\tContent-Length: 5"])),
    (431, [b"X-%d: 1" % n for n in range(100)]),
    (431, [b"X-%d: " % n + b"a" * 4000 for n in range(9)]),
    (413, [b"Content-Length: 999999999999"]),
    (413, [b"Expect: 100-continue", b"Content-Length: 8388609"]),
]] + [(400, asking(line=line + b"\r\n")) for line in (
    b"GET /\0 HTTP/1.1|GET / HTTP/1.10|get / HTTP/1.1|GET * HTTP/1.1|OPTIONS *x HTTP/1.1|"
    b"CONNECT localhost:80 HTTP/1.1|GET  / HTTP/1.1|GET / HTTP/1.1 |GET ftp://localhost/ HTTP/1.1|"
    b"GET http://a:b@localhost/ HTTP/1.1|GET http:///openqq/ HTTP/1.1|"
    b"GET http://localhost#/ HTTP/1.1|GET http://localhost:65536/ HTTP/1.1").split(b"|")
] + [(400, line + head + b"\r\n") for line, head in [
    *((INFO, b"Host:" + host + b"\r\n") for host in (
        b"| localhost/x| evil@localhost| localhost, evil.example| localhost:65536| localhost:http|"
        b" :4000| [::1%lo]| localhost\r\nHost: localhost").split(b"|")),
    (line_of("/", version="1.0"), b"Host: evil@localhost\r\n"),
    (line_of("/", version="1.0"), HOST + b"Transfer-Encoding: chunked\r\n"),
    (INFO, b""), (INFO[:-2] + b"\r", HOST), (INFO[:-2] + b"\n", HOST),
    (line_of("http://localhost/"), b""), (b"GET /openqq/get_client_info\r\n", b""),
    (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n", b""),
]] + [(400, chunked(line + b"\r\nname=\r\n0\r\n\r\n")) for line in (
    b"+5|0x5|5 ||5g|000000005|5;|5;=a|5;a=|5;a b|5;a=\"b|5;a\rb|5;a\nb|4|6").split(b"|")
] + [(400, chunked(b"5\r\nname=\r\n0" + trailer + b"\r\n\r\n")) for trailer in (
    b";", b"\r\nX: a\nb", b"\r\nX: a\r\n b", b"\r\nGET / HTTP/1.1")
] + [
    (400, asking().replace(b"\r\n", b"\n")), (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (400, chunked(b"5\nname=\r\n0\r\n\r\n")), (400, chunked(b"5;" + b"a" * 9000)),
    (413, chunked(b"7fffffff\r\nname=")), (413, chunked(b"fffff\r\n%b\r\n" % (b"a" * 0xfffff) * 9)),
    (414, asking(line=line_of(b"/" + b"a" * 8200))), (431, INFO + HOST + b"X: " + b"a" * 60_000),
]


def test_hostile_framing_is_refused_and_smuggles_nothing(pair):
    for port, query in ports_of(pair):
        second = asking(line=line_of(
            f"/openqq/send_friend_message?{query}name={ICE}&content=smuggled"))
        for status, data in HOSTILE:
            [(got, fields, body)] = split_answers(until_closed(port, data + second))
            assert (got, fields["connection"]) == (status, "close"), data[:200]
            assert json.loads(body)["code"] == status
        body = second  # no body is taken for the next request
        sized = asking(b"Content-Length: %d" % len(body)) + body
        pieces = asking(b"Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (
            len(body), body)
        nope = asking(b"Content-Length: %d" % len(body), line=line_of("/nope", "PUT")) + body
        found = split_answers(until_closed(port, sized + pieces + nope + LAST))
        assert [status for status, _, _ in found] == [200, 200, 403, 200]
    assert "smuggled" not in heard(pair)


def test_what_is_just_within_the_limits_is_served(pair):
    body = b"_=" + b"a" * (8 * 1024 * 1024 - 2)
    found = split_answers(until_closed(pair.state("alice")["port"], b"".join([
        asking(line=INFO.replace(b"info ", b"info?" + b"a" * 8150 + b" ")),
        asking(*[b"X-%d: 1" % n for n in range(99)]),
        asking(*[b"X-%d: " % n + b"a" * 4000 for n in range(8)]),
        asking(b"Content-Length: %d" % len(body), b"Content-Type: " + FORM.encode(),
               b"Connection: close", line=INFO.replace(b"GET", b"POST")), body])))
    assert [status for status, _, _ in found] == [200, 200, 200, 200]


def test_connections_beyond_the_limit_are_told_so(start):
    client = start("client", "--account", "alone", "--max_connections", "2")
    with contextlib.ExitStack() as stack:
        for _ in "12":
            stack.enter_context(socket.create_connection(("127.0.0.1", client.port), WAIT))
        [(status, _, body)] = split_answers(until_closed(client.port, b""))
        assert (status, json.loads(body)["status"]) == (503, "too many connections")
    assert eventually(lambda: b"HTTP/1.1 200" in until_closed(client.port, LAST))


def test_a_body_that_waits_for_leave_gets_it_and_one_may_come_in_chunks(pair):
    data = f"name={ICE}".encode()
    exts = [b'', b';some="ext"', b";a", b" ; a = b\t;c=\"\\\"; d\"", b';a="";b=1']
    pieces = [b"%X\r\n%b\r\n0\r\n\r\n" % (len(data), data), b"".join(
        b"01%b\r\n%c\r\n" % (exts[number % len(exts)], byte) for number, byte in enumerate(data)
    ) + b"000;last\r\nTrailer: one\r\nAnother: two\r\n\r\n"]
    for port, query in ports_of(pair):
        def head(*fields, version="1.1"):
            return asking(*fields, b"Content-Type: " + FORM.encode(), line=line_of(
                f"/openqq/search_friend?{query}", "POST", version))

        size = b"Content-Length: %d" % len(data)
        with socket.create_connection(("127.0.0.1", port), WAIT) as sock:
            sock.sendall(head(b"Expect: 100-Continue", size, b"Connection: close"))
            assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(data)
            found = b"".join(iter(lambda: sock.recv(65536), b""))
        for piece in pieces:
            found += until_closed(port, head(b"Transfer-Encoding: Chunked") + piece + LAST)
        # RFC 9110 10.1.1: a caller of HTTP/1.0 takes a 100 for its answer
        found += until_closed(port, head(b"Expect: 100-continue", size, version="1.0") + data)
        found += until_closed(port, head(b"Expect: 200-ok", size))
        found = [(status, body) for status, _, body in split_answers(found) if body]
        assert [status for status, _ in found] == [200, 200, 200, 200, 417]
        assert all(json.loads(body)[0]["name"] == "小冰" for _, body in found[:-1])


def test_a_whole_url_as_target_counts_and_its_host_instead_of_host(pair):
    for target, host, expected in [
            ("http://evil.example/healthz", "127.0.0.1", 200),
            ("HTTP://LocalHost/openqq/check_client", "evil.example", 200),
            ("https://[::1]:4000/openqq/check_client", "evil.example", 200),
            ("https://evil.example/openqq/check_client", "127.0.0.1", 403),
            ("http://[::ffff:7f00:1]:4000/openqq/check_client", "127.0.0.1", 403),
            ("http://evil.example?/../openqq/check_client", "127.0.0.1", 200),
            ("http://localhost", "localhost", 200),
            # HTTP/1.0 needs neither for what is open
            ("/healthz", "", 200), ("/", "", 200), ("/openqq/check_client", "", 403)]:
        asked = [line_of(target, version="1.0") + b"\r\n"]
        if host:
            asked.append(line_of(target) + f"Host: {host}\r\nConnection: close\r\n\r\n".encode())
        for data in asked:
            [(status, _, body)] = split_answers(until_closed(pair.port, data))
            assert status == expected, (target, body)
    for port, query in ports_of(pair):
        base = f"http://localhost:{port}"
        for origin, expected in [(base, 200), ("http://localhost", 403)]:
            status, _, body = raw_call(port, f"{base}/openqq/search_friend?{query}name={ICE}",
                                       b"Origin: " + origin.encode())
            assert (origin, status, b"\"name\"" in body) == (origin, expected, status == 200)


def test_http_1_0_needs_no_host_for_what_is_open(pair, guarded):
    def old(program, target, method="GET", fields=b""):
        data = line_of(target, method, "1.0") + fields + b"\r\n"
        [(status, _, body)] = split_answers(until_closed(program.port, data))
        return status, body

    for program in (pair, guarded):
        for method, target, expected in [
                ("GET", "/healthz", 200), ("GET", "/", 200), ("GET", "/openqq/check_client", 403),
                ("GET", "/openqq/nope", 403), ("GET", "/local/world", 403),
                # HAProxy's plain check asks for /
                *(("OPTIONS", target, 200) for target in ("/", "*", "/openqq/check_client"))]:
            assert (target, old(program, target, method)[0]) == (target, expected)
    assert "Host" in json.loads(old(pair, "/openqq/check_client")[1])["reason"]
    for token, expected in [(TOKEN, 200), (TOKEN + "x", 403)]:
        fields = b"Authorization: Bearer %b\r\n" % token.encode()
        assert old(guarded, "/openqq/check_client", fields=fields)[0] == expected


def test_requests_of_one_connection_are_answered_in_order_as_long_as_its_caller_wishes(pair):
    names = ["小冰", "nobody", "bob", "nobody", "小冰"] * 3
    last = asking(b"Connection: close")
    plain, kept = [asking(*more, line=INFO.replace(b"1.1", b"1.0")) for more in (
        [], [b"Connection: Keep-Alive"])]
    for port, query in ports_of(pair):
        data = b"\r\n".join(asking(line=line_of(f"/openqq/search_friend?{query}name=" + (
            urllib.parse.quote(name)))) for name in names)
        found = [json.loads(body) for _, _, body in split_answers(until_closed(port, data + last))]
        assert ["nobody" if "code" in row else row[0]["name"] for row in found[:-1]] == names
        # RFC 9112 C.2.2: else an HTTP/1.0 caller (ab -k) waits for the end of the connection
        for data, ways in [(asking() + last + last, [None, "close"]), (plain + plain, ["close"]),
                           (kept + kept + plain + plain, ["keep-alive", "keep-alive", "close"])]:
            found = split_answers(until_closed(port, data))
            assert [fields.get("connection") for _, fields, _ in found] == ways


def test_head_answers_as_get_without_the_body(pair):
    for port, query in ports_of(pair):
        for path in ("get_friend_info?", f"search_friend?name={ICE}&", "get_nothing?"):
            data = [asking(line=line_of(f"/openqq/{path}{query}", method))
                    for method in ("HEAD", "GET")]
            head, get, last = split_answers(until_closed(port, b"".join(data) + LAST), heads=[0])
            assert {**head[1], "date": ""} == {**get[1], "date": ""}
            assert head[0] == get[0] and get[2] and last[0] == 200


def test_a_client_answers_cors(pair):
    base = f"http://127.0.0.1:{pair.state('alice')['port']}"
    alien = {"Origin": "http://elsewhere.example", "Sec-Fetch-Site": "cross-site"}
    for path in ("*", "/", "http://a.example", "/openqq/send_friend_message", "/nowhere"):
        status, fields, body = request(base, path, "OPTIONS", headers=alien)
        assert (status, body) == (200, b"")
        assert [fields["access-control-allow-" + name] for name in (
            "origin", "methods", "headers")] == [
                "*", "OPTIONS, HEAD, GET, POST",
                "X-Requested-With, X-Auth-Token, Content-Type, Content-Length, Authorization"]
    for path in ("/openqq/get_user_info", "/openqq/nope", "/openqq/send_friend_message?name=%zz"):
        assert request(base, path)[1]["access-control-allow-origin"] == "*"


def test_jsonp_wraps_for_sound_names_only_and_nothing_is_done_for_others(pair):
    for port, query in ports_of(pair):
        path = f"/openqq/search_friend?{query}name={ICE}&"
        plain = raw_call(port, path + "callback=show")
        assert plain[1]["content-type"] == JSON
        for name, shown in [("&callback=" + name, re.escape(name)) for name in (
                "$", "jQuery311.cb_2", "a" * 64)] + [("", "jsoncallback1[0-9]{9}")]:
            status, fields, body = raw_call(port, f"{path}datatype=jsonp{name}")
            assert re.fullmatch(shown, body.decode().partition("(")[0])
            assert (status, body.partition(b"(")[2]) == (200, plain[2] + b")")
            assert fields["content-type"] == "application/javascript"
            assert fields["x-content-type-options"] == "nosniff"
        for name in ("alert(1)", "小冰", "a\r\nX: y", "a" * 65):
            status, fields, body = raw_call(
                port, f"/openqq/send_friend_message?{query}name={ICE}&content=half-done&"
                f"datatype=jsonp&callback={urllib.parse.quote(name)}")
            assert (name, status, json.loads(body)["code"]) == (name, 400, 6)
            assert fields["content-type"] == JSON
    assert "half-done" not in heard(pair)


def multipart(*parts, boundary="----x1"):
    return "".join(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
                   f"{value}\r\n" for name, value in parts) + f"--{boundary}--\r\n"


SPELLINGS = [  # query, type of the body, body; each means name=小冰
    *((query, None, None) for query in (
        f"name={ICE.lower()}", "%6Eame=小" + ICE[9:], f"name=nobody&name={ICE}",
        f"_=1&callback=x&access_token=y&token=z&datatype=json&name={ICE}")),
    ("", FORM + "; charset=UTF-8", "name=小冰"),
    ("name=nobody", FORM.upper(), f"name=nobody&name={ICE.lower()}\r\n"),
    ("name=nobody", MULTIPART, multipart(("name", "小冰"))),
    ("", 'multipart/form-data; boundary="a:b"', multipart(("name", "x"), ("name", "小冰"),
                                                          boundary="a:b")),
    ("", JSON + "; charset=utf-8", '\ufeff {"name":"x","name":"\\u5c0f\\u51b0"} \n'),
    ("name=nobody", JSON, '{"name":"小冰","uid":2854196301,"sex":null}')]


def test_parameters_are_read_however_they_come(pair):
    for port, prefix in ports_of(pair):
        for query, kind, body in SPELLINGS:
            answer = raw_call(port, f"/openqq/search_friend?{prefix}{query}", kind=kind, body=body)
            assert json.loads(answer[2])[0]["name"] == "小冰", (query, body)
        # A hash in a target reaches the client as it came.
        raw_call(port, f"/openqq/send_friend_message?{prefix}name={ICE}&content=a#b")
    assert [content for content in heard(pair) if content.startswith("a")] == ["a#b"] * 4
    for query, kind, body in [
            ("?client=bob&client=alice", None, None), ("", FORM, "client=alice"),
            ("", MULTIPART, multipart(("client", "alice"))),
            ("?client=bob", JSON, '{"client":"alice"}')]:
        answer = raw_call(pair.port, "/openqq/get_client_info" + query, kind=kind, body=body)
        assert json.loads(answer[2])["account"] == "alice"


NESTED = '{"name":' + "[" * 500 + "]" * 500 + "}"
PART = b'------x1\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n------x1--\r\n'
BAD_PARAMETERS = {  # what the answer says -> query, type of the body, body
    "": [
        *((query, None, None) for query in ("name=%zz", "name=%E5%B", "name=a%00", "na%00me=a")),
        ("", FORM, "name=100%"), ("", FORM, "name=a\0"),
        *(("", JSON, body) for body in (
            '{"name":', "[1]", '{"name":{"a":1}}', '{"name":"\\u0000"}', "[" * 100_000, NESTED)),
        ("", "multipart/form-data", multipart(("name", "a"))),
        ("", "multipart/form-data; boundary=other", multipart(("name", "a"))),
        ("", MULTIPART, multipart(("name", "a"))[:-8]),
        ("", MULTIPART, "------x1\r\n\r\na\r\n------x1--\r\n")],
    "neither UTF-8 nor GB18030": [
        ("content=%FF%FE", None, None), ("content=x&%FF=1", None, None),
        ("", FORM, b"content=\xff\xfe"), ("", MULTIPART, PART % (b"content", b"\xff")),
        ("", MULTIPART, PART % (b"\xff", b"x")), ("", JSON, b'{"content":"\xff"}'),
        ("", JSON + "; charset=gbk", b'{"content":"\xff"}'),
        ("", JSON, '{"content":"x"}'.encode("utf-16"))],
    "half a character": [("", JSON, body) for body in (  # which UTF-8 cannot spell
        '{"content":["a","\\udfff"]}', '{"\\udc80":"a"}')],
    "over": [("", FORM, "content=" + "小" * 30_000)]}


def test_parameters_that_cannot_be_read_or_are_too_much_are_refused(pair):
    heard(pair)  # what other tests left
    for port, prefix in ports_of(pair):
        path = f"/openqq/send_friend_message?{prefix}name={ICE}"
        for says, calls in BAD_PARAMETERS.items():
            for query, kind, body in calls:
                query = query if says else "content=read&" + query
                status, fields, answer = raw_call(port, f"{path}&{query}", kind=kind, body=body)
                assert (status, fields["content-type"]) == (400, JSON), (query, str(body)[:99])
                assert says in json.loads(answer)["status"] and b'"code":400' in answer, answer
        long = "小" * 20_000
        assert json.loads(raw_call(port, path, kind=FORM, body="content=" + long)[2])["code"] == 0
        assert heard(pair) == [long, long]


GB_CALLS = [  # query, type and body: how Chinese consoles and old scripts spell a name and a text
    ("name=%D0%A1%B1%F9&content=QUOTED", None, ""),
    (f"name={ICE}&content=TEXT", None, ""),  # a name by a library, a text by hand
    ("", FORM, "name=小冰&content=TEXT"), ("", FORM, "name=%D0%A1%B1%F9&content=QUOTED"),
    ("", MULTIPART, multipart(("name", "小冰"), ("content", "TEXT"))),
    ("", JSON + "; charset=GB2312", '{"name":"小冰","content":"TEXT"}')]


def test_bytes_that_are_no_utf_8_but_gb18030_are_read_as_that(pair):
    def spell(form, text, coding):
        quoted = urllib.parse.quote(text.encode(coding))
        return form.replace("TEXT", text).replace("QUOTED", quoted).encode(coding)

    heard(pair)  # what other tests left
    calls = [(call, f"联通，你好{random.random()}😀", "gb18030") for call in GB_CALLS]
    calls += [((f"name={ICE}&content=QUOTED", None, ""), text, "utf-8")
              for text in ("һ", "Ñ", "ҫɫ", "中文")]  # some of it GB18030 as well
    for port, prefix in ports_of(pair):
        for (query, kind, body), text, coding in calls:
            path = f"/openqq/send_friend_message?{prefix}".encode() + spell(query, text, coding)
            answer = raw_call(port, path, kind=kind, body=spell(body, text, coding))
            assert b'"code":0' in answer[2], answer
            assert heard(pair) == [text, text]
        # In a path, or a name that nobody reads, any byte is no fault.
        assert raw_call(port, b"/openqq/\xb0\xa1\xff?" + prefix.encode())[0] == 403


def test_unknown_paths_and_methods_are_answered_as_ever(pair):
    unknown = b'{"code":-1,"status":"api not found"}'
    for port, query in ports_of(pair):
        calls = [(method, path, b"api not found", "text/html;charset=UTF-8") for method, path in [
            ("GET", "/openqq/nope"), ("POST", "/openqq/get_friend_info"),
            ("PUT", "/openqq/send_friend_message"), ("GET", "/openqq/get_friend_info/"),
            ("GET", "/openqq/GET_friend_info"), ("GET", "/openqq/../openqq/get_friend_info")]]
        if port == pair.port:
            calls += [(method, path, unknown, JSON) for method, path in [
                ("GET", "/nope"), ("GET", "/openqq/"), ("DELETE", "/openqq/delete_client"),
                ("POST", "/openqq/check_client")]]
        for method, path, *wanted in calls:
            status, fields, body = request(f"http://127.0.0.1:{port}", f"{path}?{query}", method)
            assert [path, status, body, fields["content-type"]] == [path, 403, *wanted]
    assert pair.call("nope") == {"code": 1, "status": "client not found"}
    assert pair.call("nope", client="nobody") == {"code": 1, "status": "client not exists"}


# -- who may call

LOCAL_HOSTS = ["LocalHost:4000", "localhost.", "127.1", "127.0.1:1", "127.8.9.10", "127.1.65535",
               "127.16777215", "[::1]:4000", "a.b.LOCALHOST:65535"]
OTHER_HOSTS = ["localhost.evil.example:4000", "127.0.0.1.evil.example", "0.0.0.0", "[::]",
               "10.0.0.1", "[fe80::1]", "128.0.0.1", "mylocalhost", ".localhost", "localhost..",
               # spellings of this machine to which some browser says less of who asks
               "[::ffff:127.0.0.1]", "[::ffff:7f00:1]:4000", "[0:0:0:0:0:0:0:1]", "0x7f.0.0.1",
               "0177.0.0.1", "127.0.0.01", "2130706433", "127", "127.0.0.1.",
               "127.256.0.1", "127.1.2.3.4"]
OUTSIDERS = [("Forwarded", "for=1.2.3.4"), ("x-forwarded-host", "localhost"), ("X-Real-IP", ""),
             ("VIA", "1.1 proxy"), ("X-Forwarded-Proto", "https"), ("X-Forwarded-For", "127.0.0.1"),
             ("Origin", "http://evil.example"), ("Origin", "null"), ("Origin", ""),
             ("Origin", "http://127.0.0.1"), ("Sec-Fetch-Site", "cross-site"),
             ("Sec-Fetch-Site", "same-site"), ("Sec-Fetch-Site", "same-origin, cross-site")]
FAILURE = {"code": -6, "status": "auth failure"}
ALIEN = {"Host": "evil.example", "Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example",
         "X-Forwarded-For": "9.9.9.9", "Content-Type": FORM}


def without_reason(body):
    """A 403's answer, that says why, without its words."""
    answer = json.loads(body)
    assert answer.pop("reason")
    return answer


def test_without_a_token_only_this_machine_is_served(pair):
    for port, query in ports_of(pair):
        base, path = f"http://127.0.0.1:{port}", f"/openqq/get_client_info?{query}"
        assert call(f"http://127.1:{port}", path)["account"] == "alice"  # as the documents call it
        for name, value in [*(("Host", host) for host in LOCAL_HOSTS), ("Origin", base),
                            ("Sec-Fetch-Site", "none"), ("Sec-Fetch-Site", "same-origin"),
                            ("Referer", "http://evil.example")]:
            assert (value, request(base, path, headers={name: value})[0]) == (value, 200)
        for name, value in [*(("Host", host) for host in OTHER_HOSTS), *OUTSIDERS]:
            status, _, body = request(base, path, headers={name: value})
            assert (value, status, without_reason(body)) == (value, 403, FAILURE)


def test_strangers_and_heads_change_nothing_and_strangers_see_only_what_is_open(pair):
    calls = [(pair.port, path) for path in (
        "/openqq/start_client?client=alien", "/openqq/delete_client?client=alice",
        "/local/login?client=alice", f"/local/say?client=alice&from={ICE}&content=alien",
        "/local/change?do=add&what=person&uid=77&name=alien", "/nope")]
    for port, query in ports_of(pair):
        calls += [(port, f"/openqq/{path}{query}") for path in (
            f"send_friend_message?name={ICE}&content=alien&", "check_event?", "relogin?",
            "stop_client?", "nope?")]
    calls = [(403, port, path, method) for port, path in calls for method in ("GET", "HEAD")]
    calls += [(403, pair.port, "/local/world"), (403, pair.port, "/local/link", "POST", "{}"),
              (200, pair.port, "/"), (404, pair.port, "/local/scan?ticket=0"),
              (404, pair.port, "/local/confirm", "POST", "ticket=0")]
    for status, port, *asked in calls:
        for fields in [ALIEN] if "HEAD" not in asked else [ALIEN, {}]:
            got, _, body = request(f"http://127.0.0.1:{port}", *asked, headers=fields)
            assert (asked, got) == (asked, status)
            assert "HEAD" in asked or (b'"code":-6' in body) == (status == 403)
    assert "alien" not in heard(pair)
    assert "alien" not in json.dumps([pair.call("check_client"), pair.call("/local/world")])
    assert pair.state("alice")["state"] == "running"


def test_the_peer_must_be_this_machine_whatever_the_host():
    gate = openqq.Auth("", ["bot.example"])
    for host in "localhost", "bot.example":
        for peer in "127.3.2.1", "::1", "::ffff:127.0.0.1":
            gate.check(openqq.Request("GET", "/", {"host": host}, b"", peer))
        for peer in "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%lo", "":
            with pytest.raises(openqq.AuthFailure) as caught:
                gate.check(openqq.Request("GET", "/", {"host": host}, b"", peer))
            assert f"another machine, {peer}: set" in caught.value.answer()["reason"]


OURS, NAMED = "Host: bot.example", "X-Forwarded-Host: bot.example"
ALLOWED_CALLS = {  # what a 403's reason names, "" if it is served -> fields of such calls
    "": ["", OURS,
         # what a page may say that the name's server serves
         OURS + "|Origin: https://bot.example", OURS + "|Sec-Fetch-Site: same-origin",
         "Host: WWW.bot.EXAMPLE:8443|Origin: https://www.bot.example:8443",
         "Host: bot.example:80|Origin: http://bot.example",
         # what a proxy passes on
         f"{OURS}|{NAMED}", NAMED + "|X-Forwarded-For: 192.0.2.1|Via: 1.1 x",
         NAMED + "|X-Forwarded-Proto: HTTPS, https", NAMED + "|Forwarded: for=192.0.2.1",
         NAMED + '|Forwarded: for=192.0.2.1;Proto="https"',
         NAMED + "|Sec-Fetch-Site: same-origin",
         "X-Forwarded-Host: BOT.example:443|Origin: https://bot.example"],
    **{f"Host, {host},": [f"Host: {host}", f"Host: {host}|{NAMED}"] for host in (
        "bot.example.", "a.bot.example", "[::ffff:7f00:1]")},
    "https://bot.example": ["Host: bot.example:80|Origin: https://bot.example"],
    "another site": [
        "Host: bot.example:8443|Origin: https://bot.example", "Origin: https://bot.example",
        OURS + "|Origin: https://www.bot.example", NAMED + "|Origin: http://127.0.0.1:4000"],
    "null": [OURS + "|Origin: null"], "cross-site": [OURS + "|Sec-Fetch-Site: cross-site"],
    "same-site": [NAMED + "|Sec-Fetch-Site: same-site"],
    "no X-Forwarded-Host": [OURS + "|" + field for field in (
        "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Host: ", "X-Forwarded-Proto: https",
        "Forwarded: host=bot.example;proto=https")],
    **{f"({name.lower()})": [f"{OURS}|{name}: 192.0.2.1"] for name in (
        "Via", "X-Real-IP", "X-Client-IP", "CF-Connecting-IP", "X-Forwarded-Port")},
    **{f"'{name}'": [f"{OURS}|X-Forwarded-Host: {name}"] for name in (
        "localhost", "bot.example, evil.example", "x@bot.example")},
    "'\\x9b2J'": ["X-Forwarded-Host: \x9b2J"],
    "plain http": [f"{NAMED}|{said}" for said in (
        "X-Forwarded-Proto: https, http", "X-Forwarded-Proto: ", "X-Forwarded-Ssl: off",
        'Forwarded: proto=https, for=x;PROTO = "http"', "X-Scheme: http", "X-Url-Scheme: http",
        "Forwarded: proto=http|X-Forwarded-Proto: https", "X-Forwarded-Scheme: http",
        "Front-End-Https: off", 'Cf-Visitor: {"scheme":"http"}', "Origin: http://bot.example")],
}


def test_an_allowed_host_lets_its_own_servers_calls_in_and_no_others(start):
    hosted = start("controller", "--allowed-hosts", "Bot.example, www.bot.example")
    hosted.login("alice")
    for port, query in ports_of(hosted):
        # Where the name leads here without the server in front, no browser says which site asks.
        calls = [*ALLOWED_CALLS.items(), (f"port {port}", [f"Host: bot.example:{port}"]),
                 ("", [f"Host: localhost:{port}"]), ("x://", [f"Origin: x://127.0.0.1:{port}"])]
        for reason, text in [(reason, text) for reason, texts in calls for text in texts]:
            status, _, body = request(
                f"http://127.0.0.1:{port}", f"/openqq/get_client_info?{query}",
                headers=dict(field.split(": ", 1) for field in text.split("|") if field))
            if reason:
                assert (text, status, without_reason(body)) == (text, 403, FAILURE)
                assert reason in json.loads(body)["reason"], text
            else:
                assert (text, status, json.loads(body).get("account")) == (text, 200, "alice")
    hosted.log.wait("what a server on it passes on that is called bot.example or www.bot.example")


def test_allowed_hosts_are_names_and_nothing_else():
    for value in ("* *.example bot.example:443 http://bot.example u@bot.example a..b bot.example. "
                  "-a.example 127.0.0.1 0 0x7f.1 ::1 机器人.example a;b " + "a" * 254).split():
        with pytest.raises(ValueError, match="allowed_hosts .* must be host names such as"):
            openqq.SETTINGS["allowed_hosts"].parse("bot.example, " + value)


TOKEN = "s3cr3t&=%密"


def test_why_a_call_is_refused_is_logged_once_per_cause(start):
    program = start("controller", "--allowed-hosts", "bot.example")
    hosts = [f"h{number}.example" for number in range(300)]
    for host in ["evil.example"] * 5 + hosts:
        assert request(program.base, "/local/world", headers={"Host": host})[0] == 403
    program.log.wait("others like it are not logged")
    for _ in "12":  # what callers made up uses up no other rule's place in the log
        assert request(program.base, "/local/world", headers={"X-Real-IP": "192.0.2.1"})[0] == 403
    assert program.stop() == 0
    refused = [line for line in program.log.lines if "a call was refused" in line]
    assert len(refused) == openqq.REASON_LIMIT + 1 == len(set(refused))
    assert sum("Host, evil.example, is no name" in line for line in refused) == 1
    assert "x-real-ip" in refused[-1]


@pytest.fixture(scope="session")
def guarded(tmp_path_factory):
    """A controller with a token by its environment, that logs all it can, with files at places of
    its own; alice runs on it. To the HTTP proxy that it was told nothing comes."""
    tmpdir = tmp_path_factory.mktemp("guarded")
    proxy = Upstream([[]])
    words = ["--log_level", "debug", "--http_debug", "1", "--template_path",
             str(tmpdir / "ours.py"), "--backend_path", str(tmpdir / "ours.dat")]
    with serving(tmpdir, "controller", *words, env={"OPENQQ_TOKEN": TOKEN, **dict.fromkeys(
            ("http_proxy", "HTTP_PROXY", "all_proxy"), proxy.url)}) as program:
        assert program.call("start_client", client="alice", token=TOKEN)["code"] == 0
        assert program.call("/local/login", client="alice", token=TOKEN)["code"] == 0
        yield program
    proxy.close()
    assert proxy.seen == []


def ways_to_show(token):
    """(query, fields, type of the body, body) of each way to give a token."""
    quoted, raw = urllib.parse.quote(token, safe=""), token.encode()
    return [("", [b"Authorization: Bearer " + raw], None, None),
            ("", [b"authorization: bearer  " + raw], None, None),
            ("access_token=" + quoted, [], None, None), ("token=" + quoted, [], None, None),
            ("", [], FORM, "access_token=" + quoted), ("", [], JSON, json.dumps({"token": token})),
            ("", [], MULTIPART, multipart(("access_token", token)))]


def test_with_a_token_who_knows_it_is_served_from_anywhere_and_nobody_else(guarded):
    """And it shows in no answer and in no log."""
    raw, good, shown = TOKEN.encode(), ways_to_show(TOKEN), []
    alien = [b"Sec-Fetch-Site: cross-site", b"X-Real-IP: 9.9.9.9", b"Origin: http://evil.example",
             b"X-Forwarded-Host: evil.example", b"Via: 1.1 x"]
    bad = [("", [field], None, None) for field in (
        b"Authorization: " + raw, b"Authorization: Basic " + raw, b"X-Auth-Token: " + raw,
        b"Cookie: token=" + raw, b"Authorization: Bearer", b"X: y")]
    bad += [(good[3][0] + "%FF", [], None, None), ("tokens" + good[3][0][5:], [], None, None),
            ("", [], JSON, NESTED), ("", [], FORM, "%"), ("", [], "multipart/form-data", "x")]
    for token in "", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "null":
        bad += ways_to_show(token)
    calls = [(guarded.port, path, [], ("", [], None, None), 403) for path in (
        "/openqq/start_client?client=alien", "/openqq/check_client?", "/local/world?",
        "/local/login?client=alice", "/openqq/nope?", "/nope?")]
    for port, prefix in ports_of(guarded, token=TOKEN):
        path = f"/openqq/get_client_info?{prefix}"
        calls += [(port, path, [], way, 403) for way in bad]
        calls += [(port, path, [], way, 200) for way in good]
        calls += [(port, "http://evil.example" + path, alien, way, 200) for way in good]
    calls += [(guarded.port, "/openqq/start_client?client=alice&", [], way, 200) for way in good]
    for port, path, more, (query, fields, kind, body), wanted in calls:
        status, head, answer = raw_call(port, path + query, *fields, *more, kind=kind, body=body)
        assert (path, query, fields, body, status) == (path, query, fields, body, wanted)
        shown += [str(head), answer.decode()]
        answer = json.loads(answer)
        assert answer["account"] == "alice" if status == 200 else answer == FAILURE
    shown.append(guarded.log.text() + guarded.out.text())
    assert "get_client_info" in shown[-1]
    assert not re.search("|".join(map(re.escape, (TOKEN, good[3][0], "s3cr3t"))), "".join(shown))
    for path, status in ("/", 200), ("/local/scan?ticket=0", 404):
        assert request(guarded.base, path)[0] == status
    assert request(guarded.base, "/openqq/start_client", "OPTIONS")[0] == 200


# -- names and settings that callers may not give

def test_a_name_is_no_path(pair):
    for name in ("..", "../../x", "a/b", "a\\b", ".hidden", "a b", "a\nb", "a" * 65, "a*", "é",
                 "a\u202eb", "%2e%2e%2fx", "a\x7f", "con", "NUL", "aux.txt", "Lpt9.a.b", "bob."):
        for path in ("start_client", "stop_client", "delete_client", "check_client", "get_qrcode",
                     "get_friend_info", "/local/login"):
            answer = pair.call(path, client=name)
            assert (path, answer) == (path, {"code": 6, "status": "client name not allowed"})
    # Some file systems would take the files of both for one.
    assert pair.call("start_client", client="Alice") == {
        "code": 6, "status": "client name not allowed: it differs only in case from another"}


NOT_FOR_CALLERS = ["plugin_openqq_port=1", "plugin-openqq-token=x", "nonsense=1", "OPENQQ_TOKEN=x",
                   "MOJO_WEBQQ_PWD=x", "__class__=x", "template-path=x.py", "=x",
                   "post_api=http://x/\r\nA: b", "tmpdir={tmpdir}/../x", "tmpdir=/etc/x"]
BAD_PATHS = ["/etc/x", "{tmpdir}/../x", "{tmpdir}x/y", "{tmpdir}/out/x", "{tmpdir}/.x",
             "{tmpdir}/mojo_webqq_local.json", "{tmpdir}/mojo_webqq_cookie_alice.dat",
             "{tmpdir}/sub/../mojo_webqq_state_alice.json",
             "{tmpdir}/mojo_webqq_cookie_mallory.dat/../../x", "{tmpdir}/ours.py",
             "{tmpdir}/ours.dat", "{tmpdir}/in", "{tmpdir}/OURS.py", "{tmpdir}/Mojo_webqq_x.dat",
             "{tmpdir}/nul.txt", "{tmpdir}/out:x"]


def test_start_client_refuses_what_callers_may_not_set(guarded, tmp_path):
    os.symlink(str(tmp_path), os.path.join(guarded.tmpdir, "out"))
    os.symlink("ours.py", os.path.join(guarded.tmpdir, "in"))
    template = os.stat(os.path.join(guarded.tmpdir, "ours.py"))
    beside = sorted(os.listdir(os.path.dirname(guarded.tmpdir)))
    for given in NOT_FOR_CALLERS + [f"{name}={path}" for path in BAD_PATHS for name in (
            "log_path", "cookie_path", "state_path", "qrcode_path", "pid_path")]:
        name, _, value = given.format(tmpdir=guarded.tmpdir).partition("=")
        answer = guarded.call("start_client", token=TOKEN, client="mallory", **{name: value})
        assert (given, answer["code"]) == (given, 6) and "not allowed" in answer["status"]
    assert sorted(os.listdir(os.path.dirname(guarded.tmpdir))) == beside
    assert os.stat(os.path.join(guarded.tmpdir, "ours.py")).st_mtime == template.st_mtime
    assert not os.listdir(str(tmp_path)) and "mallory" not in [
        row["account"] for row in guarded.call("check_client", token=TOKEN)["client"]]


# -- HTTP out

class Upstream:
    """A server that answers as a script says: for each connection the answers to its requests.

    An answer is bytes, None for none, or a function that gets the socket; when a connection's
    answers are used up it is closed. `seen` are the requests, as (connection, bytes).
    """

    def __init__(self, script):
        self.seen, self.ended = [], threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, args=(script,), daemon=True).start()

    def _accept(self, script):
        with contextlib.suppress(OSError):
            for number, answers in enumerate(script):
                threading.Thread(target=self._serve, daemon=True, args=(
                    number, self.listener.accept()[0], answers)).start()

    def _serve(self, number, sock, answers):
        with sock, sock.makefile("rb") as stream, contextlib.suppress(OSError):
            for answer in answers:
                asked = b"".join(itertools.takewhile(lambda line: line != b"\r\n", stream))
                if not asked:
                    return
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)", asked)
                body = stream.read(min(int(length.group(1)), 65536)) if length else b""
                self.seen.append((number, asked + b"\r\n" + body))
                if callable(answer):
                    answer(sock)
                elif answer:
                    sock.sendall(answer)

    def close(self):
        self.ended.set()
        self.listener.close()


@pytest.fixture
def upstream(closing):
    """upstream([answer, …], …) makes an Upstream that ends with the test."""
    return lambda *script: closing(Upstream(script))


def good(body, *fields):
    return (b"HTTP/1.1 200 OK\r\n" + b"".join(field + b"\r\n" for field in fields)
            + b"Content-Length: %d\r\n\r\n" % len(body) + body)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = [
    (CHUNKED + b"3\r\none\r\n4;a=b\r\n two\r\n0\r\nTrailer: x\r\n\r\n", 200, b"one two"),
    (b"HTTP/1.1 200\r\n\r\nuntil the end", 200, b"until the end"),
    (b"HTTP/1.0 201 Made\r\nContent-Length: 3\r\n\r\none", 201, b"one"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + good(b"one"),
     200, b"one"),
    (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", 304, b""),
    (b"HTTP/1.1 500 \xe9\r\nContent-Length: 4\r\n\r\noops", 500, b"oops"),
    (b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n", 302, b"")]
GARBAGE = [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"", b"HTTP/1.1 20 OK\r\n\r\n",
           CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n", CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
           CHUNKED + b"3\r\nabc\r\n", b"\0" * 100_000,
           *(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\nabc" for fields in (
               b"Content-Length: 3\r\nContent-Length: 4", b"Content-Length: +3",
               b"Content-Length: 3\r\nTransfer-Encoding: chunked", b"Content-Length: 5",
               b"X: a\0b", b"X: y\r\n" * 9000, b"X: a\nb"))]


def test_answers_are_read_however_they_are_framed_and_those_that_are_none_are_an_error(upstream):
    for answer, status, body in ANSWERS:
        reply = openqq.fetch(upstream([answer]).url)
        assert (reply.status, reply.read()) == (status, body)
    long = upstream([good(b"x" * 300_000)])
    assert openqq.fetch(long.url).read(1000) == b"x" * 1000, "no more than its reader wants"
    for answer in GARBAGE:
        with pytest.raises(openqq.Unreachable) as caught:
            openqq.fetch(upstream([answer]).url).read()
        assert caught.value.sent, answer[:99]


def test_what_has_begun_to_answer_is_not_asked_again_and_an_ended_connection_not_used(upstream):
    for first, seen in [([good(b"one"), b"HTTP/1.1 200 OK\r\nCont"], [0, 0]), ([None], [0])]:
        server = upstream(first, [good(b"two")])
        for _ in first[1:]:
            assert openqq.fetch(server.url).read() == b"one"
        with pytest.raises(openqq.Unreachable) as caught:
            openqq.fetch(server.url, repeat=True)
        assert caught.value.sent and [number for number, _ in server.seen] == seen
    server = upstream([good(b"one")], [good(b"two")])
    assert openqq.fetch(server.url).read() == b"one"
    assert eventually(lambda: connections(server.port, ("08",), side=1))
    assert openqq.fetch(server.url, "POST", body=b"x").read() == b"two"


def test_what_takes_too_long_ends_at_the_deadline(upstream):
    def slow(begin, drip, body=b""):
        def answer(sock):
            sock.sendall(begin)
            while not server.ended.wait(0.05 if drip else 8.0):
                sock.sendall(drip)

        server = upstream([answer])
        with pytest.raises(openqq.TooSlow):
            openqq.fetch(server.url, "POST", body=body, seconds=0.4).read()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(slow, *row) for row in (
                (b"", b"H"), (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), (CHUNKED, b"1\r\nx\r\n"),
                (b"HTTP/1.1 200 OK\r\n\r\n", b"x"), (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
                (b"", b"", b"x" * (16 << 20)))]:
            done.result(WAIT)


def test_only_http_is_called_and_where_nobody_is_nothing_was_sent(upstream):
    gone = upstream()
    gone.close()
    for url in ("file:///etc/passwd", "data:,x", "//127.0.0.1/", "", "http:///x", "http://[::1/",
                "http://127.0.0.1:99999/", "http://" + "a" * 70 + ".example/", gone.url):
        with pytest.raises(openqq.Unreachable) as caught:
            openqq.fetch(url, seconds=1.0)
        assert not caught.value.sent, url


def test_a_call_goes_out_as_its_url_says(upstream):
    server = upstream([good(b"")] * 2)
    openqq.fetch(f"http://us%40er:p%2Fw@127.0.0.1:{server.port}/小?q=冰%20 x&y=%E5#part").read()
    asked = server.seen[0][1].decode()
    assert asked.startswith("GET /%E5%B0%8F?q=%E5%86%B0%20%20x&y=%E5 HTTP/1.1\r\n")
    assert f"\r\nHost: 127.0.0.1:{server.port}\r\n" in asked
    secret = base64.b64encode(b"us@er:p/w").decode()
    assert f"\r\nAuthorization: Basic {secret}\r\n" in asked
    with pytest.raises(openqq.Unreachable):
        openqq.fetch(server.url, fields={"X": "a\r\nY: b"})
    assert len(server.seen) == 1


def test_posts_are_not_redirected_to_others(guarded, receive):
    other = receive()
    for location, followed in (other.url, False), ("/moved", True):
        first = receive(lambda event: (307, {"Location": location}, b""))
        guarded.call("start_client", client="poster", token=TOKEN, post_api=first.url)
        first.next(lambda event: event.get("event") == "input_qrcode")
        assert guarded.call("delete_client", client="poster", token=TOKEN)["code"] == 0
        assert any(post[0] == "/moved" for post in first.posts) is followed
    assert other.posts == []


def test_the_environments_proxy_serves_others_only_and_its_secret_goes_no_further(
        upstream, tmp_path):
    context, inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(put(tmp_path / "tls.pem", TEST_PEM))

    def tunnel(sock):
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with context.wrap_socket(sock, server_side=True) as tls:
            inside.append(tls.recv(65536))
            tls.sendall(good(b"through"))
            tls.recv(1)

    server, proxy = upstream(*[[good(b"direct")]] * 2), upstream([good(b"by proxy")], [tunnel])
    code = ("import ssl, sys; import openqq\n"
            "ssl.create_default_context = ssl._create_unverified_context\n"
            "for url in sys.argv[1:]: print(openqq.fetch(url).read().decode())")
    done = subprocess.check_output(
        [sys.executable, "-c", code, server.url, f"http://localhost:{server.port}/",
         "http://bot.example/x?y", "https://bot.example/x?y"], cwd=HERE, timeout=WAIT, env={
             **os.environ, "no_proxy": "", "NO_PROXY": "", "http_proxy": proxy.url,
             "https_proxy": proxy.url.replace("//", "//me:secret@")})
    assert done.decode().splitlines() == ["direct", "direct", "by proxy", "through"]
    (_, plain), (_, secret) = proxy.seen
    assert plain.startswith(b"GET http://bot.example/x?y HTTP/1.1\r\nHost: bot.example\r\n")
    assert secret.startswith(b"CONNECT bot.example:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic bWU6c2VjcmV0" in secret
    assert inside[0].startswith(b"GET /x?y HTTP/1.1\r\nHost: bot.example\r\n")
    assert b"proxy" not in inside[0].lower()


# -- the proxy to the clients

def test_the_controller_gives_a_clients_answers_byte_for_byte(pair):
    (direct, _), (through, query) = ports_of(pair)
    for path, (prefix, method) in itertools.product(
            ["get_group_info?", "nope?", f"search_friend?name={ICE}&datatype=jsonp&callback=f",
             "search_friend?datatype=jsonp&callback=1", "send_sess_message?content=x",
             f"send_friend_message?name={ICE}"],
            [("openqq", "GET"), ("openwx", "GET"), ("openqq", "POST")]):
        one = request(f"http://127.0.0.1:{direct}", f"/{prefix}/{path}", method)
        two = request(f"http://127.0.0.1:{through}", f"/{prefix}/{path}&{query}", method)
        for _, fields, _ in one, two:
            fields.pop("date")
        assert one == two, path


def connections(port, states=("01",), side=0):
    """How many connections a server on this machine has: 01 established, 08 left by the peer.

    Of its own sockets, or, with side=1, of those of its callers.
    """
    with open("/proc/net/tcp") as file:
        rows = [line.split()[1:4] for line in file]
    return sum(row[side].endswith(":%04X" % port) and row[2] in states for row in rows)


def test_a_caller_who_leaves_frees_the_clients_waiter_and_takes_no_event_with_it(pair):
    port = pair.state("alice")["port"]
    for where in (port, pair.port):
        heard(pair)
        kept = connections(port)  # by the controller, which may use them for those who wait
        callers = [socket.create_connection(("127.0.0.1", where), WAIT) for _ in range(kept + 8)]
        for caller in callers:
            caller.sendall(asking(line=line_of("/openqq/check_event?client=alice")))
        assert eventually(lambda: connections(port) >= kept + 8)
        for caller in callers:
            caller.close()
        assert eventually(lambda: connections(port, ("01", "08")) <= kept)
        pair.call("send_friend_message", client="alice", name="小冰", content="after")
        assert "after" in [event["content"] for event in pair.call("check_event", client="alice")]


def test_connections_to_clients_that_nobody_calls_and_to_those_that_ended_end(start):
    # a port that is given back here must be taken by nobody else
    controller = start("controller", "--backend-start-port", "28000")
    for name in "abc":
        controller.login(name)
    for name in "abc":
        controller.call("get_friend_info", client=name)
    rows = controller.call("check_client")["client"]
    first, second, third = [functools.partial(connections, row["port"], ("01", "08"), side=1)
                            for row in rows]
    assert first() and second() and third()
    controller.call("stop_client", client="a")
    os.kill(rows[1]["pid"], signal.SIGKILL)
    assert eventually(lambda: controller.state("b")["pid"] != rows[1]["pid"])
    assert not first() and not second()
    assert eventually(lambda: not third())
    assert controller.call("get_friend_info", client="c")


def test_a_dead_client_is_a_502(start):
    controller = start("controller", "--restart", "never")
    pid = controller.login("alice")["pid"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiter = pool.submit(request, controller.base, "/openqq/check_event?client=alice")
        assert eventually(lambda: connections(controller.state("alice")["port"]))
        os.kill(pid, signal.SIGKILL)
    for status, _, body in [
            waiter.result(), request(controller.base, "/openqq/get_friend_info?client=alice"),
            request(controller.base, "/openqq/send_friend_message?client=alice", "POST")]:
        assert (status, json.loads(body)) == (502, {"code": 7, "status": "client not reachable"})
    assert "Traceback" not in controller.log.text()


@pytest.fixture
def gateway(upstream):
    """gateway(script …): an Upstream, and a server of ours that passes all on to it: its port."""
    with contextlib.ExitStack() as ends:
        def begin(*script):
            server, log = upstream(*script), openqq.Log("", "fatal")
            app = openqq.App(openqq.Auth(""), log, [],
                             lambda request: openqq.pass_on(request, server.port))
            gate = openqq.Server(openqq.listen("127.0.0.1", 0), app, log, 9)
            threading.Thread(target=gate.serve_forever, daemon=True).start()
            ends.callback(gate.shutdown)
            return server, types.SimpleNamespace(port=gate.server_address[1])

        yield begin


def test_the_proxy_passes_on_what_belongs_to_the_call_only(gateway):
    server, gate = gateway([good(b"\0\xff", b"Content-Type: image/x", b"X-Own: 1",
                                 b"Keep-Alive: timeout=5")])
    body, path = b"\xff\0a=b", "/openqq/x?a=%2f&b=+&c=%"
    status, fields, answer = raw_call(
        gate.port, path, b"X-Mine: 2", b"TE: trailers", b"Cookie: c",
        b"Sec-Fetch-Site: same-origin", kind="text/odd", body=body)
    assert (status, fields["content-type"], fields["x-own"], answer) == (
        200, "image/x", "1", b"\0\xff")
    assert "keep-alive" not in fields
    head, _, came = server.seen[0][1].partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert came == body and lines[0] == b"post " + path.encode() + b" http/1.1"
    assert b"content-type: text/odd" in lines and b"content-length: 5" in lines
    assert not [line for line in lines if re.match(b"te:|cookie|sec-|connection: close", line)]


# -- whatever comes

def test_whatever_comes_the_servers_live_on(pair):
    """Crosses between requests; a fixed seed, so that what fails once fails again."""
    chance, ports = random.Random(4000), [port for port, _ in ports_of(pair)]
    seeds = [data for _, data in HOSTILE if len(data) < 999]
    pids = [pair.pid, pair.state("alice")["pid"]]

    def burden():
        return [len(os.listdir(f"/proc/{pid}/{what}")) for pid in pids for what in ("fd", "task")]

    heard(pair)
    before = burden()
    for number in range(much(240, 10_000)):
        data = chance.choice(seeds)
        for _ in range(chance.randint(1, 6)):
            where, other = chance.randrange(len(data) + 1), chance.choice(seeds)
            put = other[where:where + chance.choice([0, 1, 9, 40])]
            data = data[:where] + put + data[where + chance.choice([0, 0, 1, 1, 4, 30]):]
        answer = until_closed(ports[number % 2], data * chance.choice([1, 1, 2]), ending=True)
        assert re.match(rb"HTTP/1\.1 (?!500)[1-5][0-9][0-9] |\Z", answer)
    heard(pair)
    assert eventually(lambda: all(now <= then for now, then in zip(burden(), before))), before
    assert "Traceback" not in pair.log.text()


# ------------------------------------------------------------------------------------------------
# The API, on a client alone and through a controller
# ------------------------------------------------------------------------------------------------

XIAOBING, XIAOHUI = "2854196301", "2854196302"   # 小冰, the echo, and 小灰
OPENQQ_GROUP = "20260001"
ALL_EVENTS = ",".join(
    "login stop state_change input_qrcode group_request group_shutup group_upload poke".split()
    + ["update_" + kind for kind in ("user", "friend", "group")]
    + [kind + "_property_change" for kind in ("user", "friend", "group", "group_member")]
    + [way + kind for way in ("new_", "lose_")
       for kind in ("friend", "group", "discuss", "group_member", "discuss_member")])
FIELDS = {
    "user": "account allow birthday blood city client_type college constel country email face "
            "homepage id mobile name occupation personal phone province sex shengxiao signature "
            "state uid",
    "friend": "category client_type face flag id is_vip markname name state uid vip_level",
    "group": "code createtime id level markname max_admin max_member memo name owner_id "
             "owner_uid role uid",
    "group_member": "bad_record card city client_type country id join_time last_speak_time level "
                    "name province qage role sex state uid",
    "discuss": "id name owner_id",
    "discuss_member": "client_type id name state uid",
}
STATES = ("online", "offline", "away", "hidden", "busy", "callme", "silent")
CLIENT_TYPES = ("pc", "mobile", "iphone", "web", "unknown")
NUMBERS = ("pid", "port", "runtime", "starttime", "max_member", "max_admin", "priority", "code",
           "call_on_load", "auto_call")


class Face:
    """One account's API: on its client, or on the controller with client=. `receiver` gets its
    events, `path` names one of its files."""

    def __init__(self, program, account, receiver=None, controlled=False):
        self.program, self.account, self.receiver = program, account, receiver
        self.base, self.path, self.controlled = program.base, program.path, controlled

    def raw(self, api, method="GET", timeout=60.0, **params):
        """(status, headers, body); a POST carries its parameters in a form."""
        path = api if api.startswith("/") else "/openqq/" + api
        if self.controlled and path.startswith("/open"):
            params["client"] = self.account
        query = urllib.parse.urlencode(params)
        if method == "GET":
            return request(self.base, f"{path}?{query}", timeout=timeout)
        return request(self.base, path, method, query, {"Content-Type": FORM}, timeout)

    def call(self, api, method="GET", **params):
        return json.loads(self.raw(api, method, **params)[2])

    def change(self, do, what, uid="", place="", **properties):
        """A change of the world, which must work."""
        answer = self.program.call("/local/change", **dict(
            properties, do=do, what=what, uid=uid, **({"in": place} if place else {})))
        assert answer["code"] == 0, answer
        return answer["uid"]

    def say(self, content, who=XIAOHUI, **params):
        """Let somebody of the world speak."""
        return self.program.call("/local/say", **dict(
            {"client": self.account, "content": content, "from": who}, **params))

    def friend(self, name):
        return self.call("search_friend", name=name)[0]

    def group(self, name="OpenQQ"):
        return self.call("search_group", name=name)[0]

    def discuss(self, name="OpenQQ"):
        return [row for row in self.call("get_discuss_info") if row["name"] == name][0]

    def event(self, name, wanted=lambda params: True):
        """The params of the next event of that name that is posted, and wanted."""
        row = self.receiver.next(lambda event: event.get("event") == name
                                 and wanted(event["params"]))
        assert set(row) - {"kind", "operator_uid", "group_uid"} == {
            "event", "params", "post_type", "time"}
        assert row["post_type"] == "event" and abs(int(row["time"]) - time.time()) < 600
        return row["params"]

    def sent(self, content):
        return self.receiver.next(lambda event: event.get("content") == content
                                  and event["post_type"] == "send_message")

    def both(self, content):
        """A message as it was sent, then its echo as it was received, as they are posted."""
        found = [self.receiver.next(lambda event: event.get("content") == content) for _ in "12"]
        assert [event["class"] for event in found] == ["send", "recv"]
        return found

    def mark(self):
        """The seq of the newest event; nothing is taken from anybody."""
        content = f"mark {time.monotonic_ns()}"
        assert self.say(content)["code"] == 0
        return self.since(0, content)[-1]["seq"]

    def forget(self):
        """Pass over all that was posted so far."""
        while not self.receiver.events.empty():
            self.receiver.events.get()

    def since(self, seq, content):
        """The events after seq, up to the message with this content."""
        found, contents = [], []
        while content not in contents:
            found += self.call("check_event", since=found[-1]["seq"] if found else seq)
            contents = [event.get("content") for event in found]
        return found[:contents.index(content) + 1]

    def state(self):
        if self.controlled:
            return self.program.state(self.account)
        with open(self.path(f"state_{self.account}.json"), encoding="utf-8") as file:
            return json.load(file)

    def ticket(self):
        """The ticket of the QR code that the account showed."""
        return self.program.log.wait(rf"\[{self.account}\].*ticket=(\w+)").group(1)


def begin_face(controlled, tmpdir, receiver, **settings):
    """alice, in a program of her own kind; she shows a QR code."""
    settings["post_api"] = receiver.url
    if controlled:
        program = Program(tmpdir, "controller").ready()
        assert program.call("start_client", client="alice", **settings)["code"] == 0
    else:
        words = [f"--{name}={value}" for name, value in settings.items()]
        program = Program(tmpdir, "client", "--account", "alice", *words).ready()
    return Face(program, "alice", receiver, controlled)


def logged_in(face):
    assert face.program.call("/local/login", client=face.account)["code"] == 0
    return face


@contextlib.contextmanager
def faces_of(directory, controlled, receivers):
    """alice, logged in and posting all events, of a program that ends well."""
    face = logged_in(begin_face(controlled, directory, receivers[0], post_event_list=ALL_EVENTS))
    yield face
    assert face.program.stop() == 0
    assert "Traceback" not in face.program.log.text()
    for receiver in receivers:
        receiver.close()


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """A client alone, alice running."""
    with faces_of(tmp_path_factory.mktemp("alone"), False, [Receiver()]) as face:
        yield face


@pytest.fixture(scope="session")
def together(tmp_path_factory):
    """A controller with alice (all events posted) and bob (the usual ones): their faces."""
    receivers = [Receiver(), Receiver()]
    with faces_of(tmp_path_factory.mktemp("together"), True, receivers) as alice:
        alice.program.login("bob", post_api=receivers[1].url)
        yield alice, Face(alice.program, "bob", receivers[1], True)


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """A controller for tests that have accounts of their own there, posting to house.receiver."""
    receiver = Receiver()
    program = Program(tmp_path_factory.mktemp("house"), "controller", "--post-api", receiver.url)
    program.receiver = receiver
    yield program.ready()
    assert program.stop() == 0
    assert "fault of this program" not in program.log.text()
    receiver.close()


@pytest.fixture(params=["alone", "controller"])
def face(request):
    """alice's API on a client alone and through a controller."""
    if request.param == "alone":
        return request.getfixturevalue("alone")
    return request.getfixturevalue("together")[0]


@pytest.fixture(params=["alone", "controller"])
def fresh(request, tmp_path, receive, closing):
    """fresh(**settings): alice of a new program, not logged in; again: of the same tmpdir."""
    def begin(**settings):
        face = begin_face(request.param == "controller", tmp_path, receive(), **settings)
        closing(face.program)
        return face

    return begin


def assert_object(row, kind, numeric=False):
    """A row has the documented members of a kind, and these are of the documented types."""
    members = row.get("member") if kind in ("group", "discuss") else None
    assert set(row) - {"member"} == set(FIELDS[kind].split()), kind
    for name, value in row.items():
        if name == "member" or value is None:
            continue
        is_id = re.fullmatch("(.*_)?u?id", name)
        wanted = int if name in NUMBERS and name != "code" or (numeric and is_id) else str
        assert type(value) is wanted, f"{kind} {name} {value!r}"
        assert not is_id or str(value).isdigit(), f"{kind} {name} {value!r}"
    assert row["id"] is not None and row["name"]
    for name, words in ("state", STATES), ("client_type", CLIENT_TYPES):
        assert row.get(name, words[0]) in words, f"{kind} {name}"
    for member in members or []:
        assert_object(member, kind + "_member", numeric)


# -- reading

LISTS = [("get_friend_info", "friend", None), ("get_group_info", "group", True),
         ("get_group_basic_info", "group", False), ("get_discuss_info", "discuss", True)]


def test_everything_that_is_read_has_the_documented_fields_and_types(face):
    user = face.call("get_user_info")
    assert_object(user, "user")
    assert (user["account"], user["name"], user["state"]) == ("alice", "alice", "online")
    for api, kind, with_members in LISTS:
        rows = face.call(api)
        assert rows, api
        for row in rows:
            assert_object(row, kind)
            assert bool(row.get("member")) == bool(with_members), api
    friends = face.call("get_friend_info")
    names = {row["name"] for row in friends}
    assert {"小冰", "小灰"} <= names and "alice" not in names
    assert all(row["uid"] != row["id"] for row in [user, *friends])


def test_the_first_account_owns_the_group_openqq_and_the_second_attends(alone, together):
    for face in alone, together[0]:
        group, user = face.group(), face.call("get_user_info")
        assert (group["owner_uid"], group["owner_id"], group["role"]) == (
            user["uid"], user["id"], "create")
        assert [row["role"] for row in group["member"] if row["name"] in ("alice", "小冰")] in (
            ["owner", "member"], ["member", "owner"])
        assert face.discuss()["owner_id"] == user["id"]
    seen = together[1].group()
    assert (seen["role"], seen["owner_uid"]) == ("attend", user["uid"])
    assert seen["id"] != group["id"]  # ids are the viewer's own


SEARCHES = [  # a kind, how many are found, by which attributes; the last are what the program's
    # objects answered to as well
    ("friend", 1, ["displayname=小冰", "id={friend[id]}", "qq={friend[uid]} nick=小冰",
                   "uid={friend[uid]} name=小冰 category=我的好友"]),
    ("friend", 0, ["uid={friend[uid]} name=小灰", "name=小", "", "nonsense=1", "markname=",
                   "markname=None", "uid={friend[uid]} nonsense=1", "qq={friend[uid]} uid=1",
                   "nick={friend[uid]}", "gnumber={friend[uid]}"]),
    ("group", 1, ["uid={group[uid]} role=create", "id={group[id]}", "max_member=2000 name=OpenQQ",
                  "gnumber={group[uid]}", "number={group[uid]}", "gid={group[id]}",
                  "gcode={group[code]}", "gtype=create gname=OpenQQ"]),
    ("group", 0, ["uid=1", "", "member=1", "gtype=attend gname=OpenQQ", "gid={group[uid]}",
                  "gnumber={group[uid]} number=1", "qq={group[uid]}"]),
]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_search_finds_what_equals_every_attribute(face, method):
    known = those_known(face, "小冰")
    for kind, count, searches in SEARCHES:
        for keys in searches:
            found = face.call("search_" + kind, method, **filled(keys, known))
            if not count:
                assert found == {"code": 100, "status": "object not found"}, keys
                continue
            assert len(found) == count, keys
            assert_object(found[0], kind)
            assert kind != "group" or found[0]["member"]
    about = {"client": "alice", "_": "1", "datatype": "json", "callback": "f", "token": "x",
             "access_token": "y"}  # the call, and are no search keys
    assert face.call("search_friend", method, uid=XIAOBING, **about) == [known["friend"]]
    assert face.call("search_friend", method, **about)["code"] == 100


def test_get_client_info_tells_about_the_program(face):
    for method in "GET", "POST":
        row = face.call("get_client_info", method)
        assert set(row) == set("account code http_debug log_encoding log_level log_path os pid "
                               "runtime starttime status version".split())
        known = {"account": "alice", "code": 0, "status": "success", "http_debug": "0",
                 "log_encoding": None, "log_path": None, "version": openqq.VERSION,
                 "os": sys.platform, "pid": face.state()["pid"]}
        assert known == {name: row[name] for name in known}
        assert type(row["runtime"]) is type(row["starttime"]) is int
        assert 0 <= row["runtime"] <= time.time() - row["starttime"] + 1


def test_numeric_ids_makes_numbers_of_all_ids_at_once(house, receive):
    face = Face(house, "ida", receive(), True)
    house.login("ida", numeric_ids=1, post_api=face.receiver.url)
    for kind, row in [("user", face.call("get_user_info")), *(
            (kind, row) for api, kind, _ in LISTS for row in face.call(api))]:
        assert_object(row, kind, True)
    friend = face.friend("小冰")
    sent = face.call("send_friend_message", id=friend["id"], content="数")
    own, echo = face.both("数")
    assert all(type(message[name]) is int for message in (echo, own) for name in (
        "id", "time", "sender_id", "sender_uid", "receiver_id", "receiver_uid"))
    assert (own["id"], echo["sender_id"], echo["sender_uid"]) == (
        sent["id"], friend["id"], friend["uid"])
    events = [event for _, _, _, event in face.receiver.posts if "event" in event]
    assert events and all(type(event["time"]) is int for event in events)


# -- sending

FOUND = {
    "friend": ["id={friend[id]}", "uid={friend[uid]}", "name=小灰", "displayname=小灰",
               "id= uid={friend[uid]} name=小灰"],
    "group": ["id={group[id]}", "uid={group[uid]}", "displayname=OpenQQ",
              "id={group[id]} name=OpenQQ"],
    "discuss": ["id={discuss[id]}", "name=OpenQQ"],
    "sess": ["group_id={group[id]} uid={friend[uid]}", "group_uid={group[uid]} id={friend[id]}",
             "group_id={group[id]} group_uid={group[uid]} id={friend[id]} uid={friend[uid]}",
             "discuss_id={discuss[id]} id={friend[id]}",
             "discuss_id={discuss[id]} uid={friend[uid]}"],
}
NOT_FOUND = {
    "friend 100 friend not found": [
        "", "uid={friend[id]}", "uid={friend[uid]} name=小冰", "category=我的好友", "uid={user[uid]}"],
    "group 101 group not found": ["", "uid=1", "uid={group[uid]} displayname=x", "role=create"],
    "discuss 102 discuss not found": ["", "id=1", "id={discuss[id]} name=x", "uid=30260001"],
    "sess 103 group member not found": [
        "group_id={group[id]}", "group_id=1 id={friend[id]}",
        "group_uid={group[uid]} uid={friend[uid]} id=1"],
    "sess 104 discuss member not found": [
        "discuss_id=1 id={friend[id]}", "discuss_id={discuss[id]} uid=1"],
    "sess 105 discuss member or group member  not found": ["", "id={friend[id]}"]}


def those_known(face, friend="小灰"):
    """What the tables name: oneself, a friend, the group and the discuss."""
    return {"user": face.call("get_user_info"), "friend": face.friend(friend),
            "group": face.group(), "discuss": face.discuss()}


def filled(keys, known):
    """A table's "name=value …" as parameters."""
    return dict(pair.split("=") for pair in keys.format(**known).split())


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_receiver_is_found_by_every_documented_key(face, method):
    known, ids = those_known(face), []
    for number, (kind, keys) in enumerate((kind, keys) for kind in FOUND for keys in FOUND[kind]):
        content = f"{method} {number} <{kind}> & 你好"
        sent = face.call(f"send_{kind}_message", method, content=content, **filled(keys, known))
        assert sent == {"code": 0, "id": sent["id"], "info": "发送正常", "status": "发送成功"}, keys
        assert type(sent["id"]) is int
        ids.append(sent["id"])
        message = face.sent(content)
        assert (message["type"], message["id"]) == (kind + "_message", str(sent["id"]))
        assert message.get("receiver", "小灰") == "小灰"
    assert ids == list(range(ids[0], ids[0] + len(ids)))


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_not_found_is_told_in_the_documented_words(face, method):
    known = those_known(face)
    for wanted, searches in NOT_FOUND.items():
        kind, code, status = wanted.split(" ", 2)
        for keys in [keys + more for keys in searches for more in ("", " async=1")]:
            answer = face.call(f"send_{kind}_message", method, content="x", **filled(keys, known))
            assert answer == {"code": int(code), "id": None, "status": status}, (kind, keys)


EACH_KIND = [
    ("friend", "uid={friend[uid]}"), ("group", "uid={group[uid]}"), ("discuss", "id={discuss[id]}"),
    ("sess", "group_uid={group[uid]} uid={friend[uid]}"),
    ("sess", "discuss_id={discuss[id]} uid={friend[uid]}"),
]


def test_async_answers_at_once_and_messages_of_all_kinds_go_out_in_the_order_of_their_coming(face):
    known, seq, contents = those_known(face), face.mark(), []
    for number, (kind, keys) in enumerate(EACH_KIND * 3):
        contents.append(f"order {number}")
        assert face.call(f"send_{kind}_message", content=contents[-1], **filled(
            keys + " async=1", known)) == {"code": 0, "status": "request already in execution"}
    events = face.since(seq, contents[-1])
    assert [event["content"] for event in events] == contents  # 小冰, who is not named, is silent
    assert {event["code"] for event in events} == {0}


def test_without_content_a_send_is_refused_at_once(face):
    known = those_known(face)
    for (kind, keys), more in itertools.product(EACH_KIND, ("", " content=", " async=1")):
        answer = face.raw(f"send_{kind}_message", **filled(keys + more, known))
        assert answer[::2] == (400, b'{"code":400,"status":"content missing"}'), (kind, more)


# -- messages

def test_messages_sent_and_their_echoes_after_them_have_exactly_the_documented_members(face):
    known = those_known(face, "小冰")
    def those(role, name, row):
        return {role: name, **{f"{role}_{key}": row[key] for key in ("id", "uid") if key in row}}

    for number, (kind, keys) in enumerate(EACH_KIND):
        via = next((via for via in ("group", "discuss") if via in keys), "")
        content, before = f"小冰 {number}", int(time.time())
        answer = face.call(f"send_{kind}_message", content=content, **filled(keys, known))
        sent, heard = face.both(content)
        both = {"content": content, "type": kind + "_message"}
        both.update(those(via, "OpenQQ", known[via]) if via else {})
        both.update({"via": via} if kind == "sess" else {})
        assert sent == {
            **both, **those("sender", "alice", known["user"]),
            **(those("receiver", "小冰", known["friend"]) if kind in ("friend", "sess") else {}),
            "class": "send", "code": 0, "from": "api", "info": "发送正常", "msg": "发送成功",
            "source": "local", "id": str(answer["id"]), "post_type": "send_message",
            "time": sent["time"], "ttl": sent["ttl"]}
        assert heard == {
            **both, **those("sender", "小冰", known["friend"]), "class": "recv",
            **those("receiver", "alice", known["user"]), "post_type": "receive_message", "at": [],
            "at_me": 0, "reply_to": None, "time": heard["time"], "id": heard["id"]}
        for message in sent, heard:
            assert before <= int(message["time"]) <= time.time()
            assert type(message["time"]) is type(message["id"]) is str
        assert type(sent["ttl"]) is int


def test_ids_stay_below_31_bits_whatever_the_clock_says_and_go_on_at_the_least():
    least, end = 2 ** 30, 2 ** 31
    for clock in 0, 1, 99_999, 100_000, 1_764_000_000, 1_764_099_999, 2 ** 40:
        ids = openqq.MessageIds(lambda: clock)
        numbers = [ids.next() for _ in range(3)]
        assert numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2]
        assert least < numbers[0] and numbers[-1] < end
        ids._last, ids._taken = end - 2, {least + 1, least + 2}.__contains__
        assert [ids.next() for _ in range(3)] == [end - 1, least + 3, least + 4]


def test_a_resident_speaks_in_every_kind_of_conversation(face):
    known = those_known(face)
    for number, (kind, keys) in enumerate([
            ("friend", ""), ("group", "to={group[uid]}"), ("group", "to=OpenQQ"),
            ("group", "to={group[id]}"), ("discuss", "to={discuss[id]}"), ("sess", "to=OpenQQ")]):
        keys += f" type={kind}_message" if keys else ""
        assert face.say(f"say {number}", "小灰", **filled(keys, known))["code"] == 0, keys
        message = face.receiver.message(f"say {number}")
        assert (message["type"], message["sender_uid"]) == (kind + "_message", XIAOHUI)
        assert [name for name in ("group", "discuss") if message.get(name) == "OpenQQ"] == (
            [] if kind == "friend" else [kind.replace("sess", "group")])


def test_what_the_network_does_not_know_is_code_8_with_its_name(face):
    for call in ("say client=nobody from=小灰 content=x", "say client=alice from=nobody content=x",
                 "say client=alice from=小灰 content=x type=group_message to=nobody",
                 "say client=alice from=小灰 content=x type=nobody", "change do=add what=nobody",
                 "change do=remove what=friend uid=nobody in=alice", "login client=nobody",
                 "change do=remove what=group_member uid=小灰 in=nobody"):
        api, _, params = call.partition(" ")
        status, _, body = face.raw("/local/" + api, **filled(params, {}))
        assert (status, b'"code":8' in body) == (404, True), (call, body)
        assert re.search("nobody .*not found$", json.loads(body)["status"]), body


def test_a_markname_is_shown_before_a_card_and_that_before_a_name(face):
    uid = face.change("add", "person", name="小名")
    for what, place, name in [("group_member", OPENQQ_GROUP, {"card": "名片"}),
                              ("friend", "alice", {"markname": "备注"})]:
        face.change("add", what, uid, place, **name)
        face.say("by " + what, uid, type="group_message", to=OPENQQ_GROUP)
        assert face.receiver.message("by " + what)["sender"] == [*name.values()][0]
    face.call("send_friend_message", displayname="备注", content="to the markname")
    assert face.sent("to the markname")["receiver"] == "备注"
    face.change("remove", "person", uid)
    assert face.event("lose_friend")[0]["uid"] == uid
    assert uid not in [row["uid"] for row in face.group()["member"]]


# -- events

STEPS = """\
add person 90001 - name=阿一
add friend 90001 alice markname=一号 -> new friend 阿一
set friend 90001 alice markname=二号 -> change friend 阿一 markname 一号 二号
set person 90001 - name=阿二 -> change friend 阿二 name 阿一 阿二
set person alice - signature=嗨 -> change user alice signature - 嗨
set person alice - signature= -> change user alice signature 嗨 -
add group 80001 - name=新群 owner_uid=2854196302 max_member=100
add group_member alice 80001 -> new group 新群
add group_member 90001 80001 card=旧片 -> new group_member 阿二 group 新群
set group_member 90001 80001 card=新片 -> change group_member 阿二 card 旧片 新片
set group_member alice 80001 role=admin -> change group 新群 role attend manage
set group 80001 - max_member=500 -> change group 新群 max_member 100 500
set group 80001 - name=老群 -> change group 老群 name 新群 老群
remove group_member 90001 80001 -> lose group_member 阿二 group 老群
remove group_member alice 80001 -> lose group 老群
add group_member alice 80001 -> new group 老群
remove group 80001 - -> lose group 老群
add discuss 70001 - name=闲聊 owner_uid=2854196302
add discuss_member alice 70001 -> new discuss 闲聊
add discuss_member 90001 70001 -> new discuss_member 阿二 discuss 闲聊
remove discuss_member 90001 70001 -> lose discuss_member 阿二 discuss 闲聊
remove discuss 70001 - -> lose discuss 闲聊
remove friend 90001 alice -> lose friend 阿二
remove person 90001 -"""
FACTS_OF = {"new_group_member": {"kind", "operator_uid"},
            "lose_group_member": {"kind", "operator_uid"},
            "group_member_property_change": {"group_uid"}}


def test_every_documented_event_can_be_made_to_happen_and_lists_follow_it(face):
    seq = face.mark()
    for line in STEPS.split("\n"):
        change, _, told = line.partition(" -> ")
        do, what, uid, place, *properties = change.split()
        face.change(do, what, uid, place.strip("-"), **filled(" ".join(properties), {}))
        if not told:
            continue
        way, kind, name, *others = told.split()
        event = f"{kind}_property_change" if way == "change" else f"{way}_{kind}"
        params = face.event(event, lambda params: params[0]["name"] == name)
        assert_object(params[0], kind)
        if way == "change":
            assert params[1:] == [int(text) if text.isdigit() else text.strip("-")
                                  for text in others]
        elif others:
            assert_object(params[1], others[0])
            assert [row["name"] for row in params[1:]] == others[1:]
        kept = face.call("check_event", since=seq)  # the same, and nothing else of that name
        seq = kept[-1]["seq"]
        (row,) = [row for row in kept if row["event"] == event and row["params"] == params]
        assert row["post_type"] == "event" and abs(int(row["time"]) - time.time()) < 600
        assert set(row) == {"event", "params", "post_type", "seq", "time",
                            *FACTS_OF.get(event, ())}
        if way != "change":
            rows = face.call(f"get_{kind.partition('_')[0]}_info")
            if others:
                [rows] = [row["member"] for row in rows if row["name"] == others[1]]
            assert (params[0]["id"] in [row["id"] for row in rows]) == (way == "new"), event


def test_check_event_answers_at_once_what_came_since_the_last_call(face):
    seq = face.mark()
    assert face.call("check_event")[-1]["content"].startswith("mark ")
    for content in "one", "two":
        assert face.say(content)["code"] == 0
    face.since(seq, "two")
    for _ in range(2):  # `since` only reads
        events = face.call("check_event", since=seq)
        assert [event["content"] for event in events] == ["one", "two"]
    assert events[1]["seq"] == events[0]["seq"] + 1 == seq + 2
    assert face.call("check_event", "POST") == events
    face.say("three")
    assert [event["content"] for event in face.call("check_event")] == ["three"]
    assert face.call("check_event", since=events[1]["seq"])[0]["content"] == "three"
    # it keeps the newest 20
    for number in range(23):
        face.say(f"many {number}")
    face.since(seq, "many 22")
    for since in 0, 10 ** 17:  # of another time: all that is kept
        events = face.call("check_event", since=since)
        assert [event["content"] for event in events] == [f"many {n}" for n in range(3, 23)]
    assert face.call("check_event") == events
    assert abs(events[0]["seq"] / 1000 - time.time()) < 600  # begins at the clock's milliseconds
    assert face.raw("check_event", since="x")[0] == 400


def test_every_waiting_caller_gets_the_event():
    store, waiting = openqq.EventStore(20), threading.Barrier(3)

    def wait(future, seconds):
        waiting.wait(WAIT)
        return openqq.result_of(future, seconds)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = [pool.submit(store.take, None, wait) for _ in "12"]
        waiting.wait(WAIT)
        store.add({"event": "new_friend"})
        one, other = [json.loads(answer.result(WAIT)) for answer in answers]
    assert one == other == [{"event": "new_friend", "seq": one[0]["seq"]}]
    assert store.take(None, openqq.result_of, 0.01) == b"[]"  # and it is told once only


# -- group control

CONTROL_REFUSED = [  # in the order in which they are checked
    (100, "object not found", ["", "group_id=1 member_id=1 time=x",
                               "group_uid={group[uid]} group_id=1"]),
    (200, "member id empty", ["group_uid={group[uid]}", "group_uid={group[uid]} member_uid=,,"]),
    (100, "member 1 not found", ["group_uid={group[uid]} member_uid={friend[uid]},1,8",
                                 "group_id={group[id]} member_id=1 member_uid={friend[uid]}"]),
    (100, "member {friend[uid]} not found", ["group_id={group[id]} member_id={friend[uid]}"]),
    (201, "failure", ["group_uid={group[uid]} member_uid={user[uid]}"]),
]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_group_control_checks_in_the_documented_order(face, method):
    known = those_known(face)
    for code, status, calls in CONTROL_REFUSED:
        wanted = {"code": code, "status": status.format(**known)}
        for params in [filled(params, known) for params in calls]:
            assert face.call("kick_group_member", method, **params) == wanted, params
            assert face.call("shutup_group_member", method, **{"time": "1", **params}) == wanted
            for bad in {}, {"time": ""}, {"time": "-1"}, {"time": "1.5"}, {"time": "²"}:
                # the time is looked at after the group, and before the members
                assert face.call("shutup_group_member", method, **{**params, **bad}) == (
                    wanted if status == "object not found" else
                    {"code": 400, "status": "shutup time missing or error"}), (params, bad)
    assert {"小冰", "小灰"} <= {row["name"] for row in face.group()["member"]}


def test_only_owner_and_admins_may_and_only_with_those_below_them(face):
    face.change("add", "group", "80002", name="规矩", owner_uid=XIAOHUI)
    uids = [face.change("add", "person", name=name) for name in ("甲", "乙", "丙")]
    for uid in ["alice", XIAOBING, *uids]:
        face.change("add", "group_member", uid, "80002",
                    role="admin" if uid == XIAOBING else "member")
    face.event("new_group_member", lambda params: params[0]["uid"] == uids[2])

    def may(uid):
        muted = face.call("shutup_group_member", group_uid="80002", member_uid=uid, time=1)
        kicked = face.call("kick_group_member", group_uid="80002", member_uid=uid)
        assert muted == kicked
        assert muted in ({"code": 0, "status": "success"}, {"code": 201, "status": "failure"})
        return muted["code"] == 0

    assert not may(uids[0])
    face.change("set", "group_member", "alice", "80002", role="admin")
    assert face.event("group_property_change")[3] == "manage"
    for uid in XIAOHUI, XIAOBING, face.call("get_user_info")["uid"], f"{uids[0]},{XIAOHUI}":
        assert not may(uid)  # of several all or none
    assert face.say("still here", uids[0], type="group_message", to="80002")["code"] == 0
    group = face.group("规矩")
    [last] = [row["id"] for row in group["member"] if row["uid"] == uids[2]]
    assert may(",".join(uids[:2]))
    assert face.call("kick_group_member", group_id=group["id"], member_id=last,
                     member_uid=XIAOBING)["code"] == 0  # member_id wins
    lost = [face.event("lose_group_member") for _ in uids]
    assert [[row["uid"] for row in params] for params in lost] == [[uid, "80002"] for uid in uids]
    assert face.say("gone", uids[0], type="group_message", to="80002")["code"] == 8
    assert {row["uid"] for row in face.group("规矩")["member"]} >= {XIAOHUI, XIAOBING}
    face.change("remove", "group", "80002")
    for uid in uids:
        face.change("remove", "person", uid)


# -- two accounts

def test_what_is_sent_while_somebody_is_away_arrives_once_and_in_order(together):
    alice, bob = together
    known, contents = those_known(alice, "bob"), [f"wait {number}" for number in range(13)]
    assert bob.call("stop_client")["code"] == 0
    bob.forget()
    for content, (kind, keys) in zip(contents, EACH_KIND * 3):
        assert alice.call(f"send_{kind}_message", content=content,
                          **filled(keys, known))["code"] == 0
    assert bob.call("start_client", post_api=bob.receiver.url)["code"] == 0
    events = bob.since(0, contents[-1])
    assert [event["content"] for event in events] == contents
    told = [bob.receiver.next(lambda event: "content" in event) for _ in contents]
    # conversations are posted side by side: in any order
    assert sorted(event["content"] for event in told) == sorted(contents)
    for kind, event in zip([kind for kind, _ in EACH_KIND * 3], events):
        assert event["type"] == kind + "_message"
        sender, receiver = bob.friend("alice"), bob.call("get_user_info")
        assert [event[name] for name in ("sender", "sender_id", "sender_uid", "receiver",
                                         "receiver_id")] == [
            "alice", sender["id"], sender["uid"], "bob", receiver["id"]]


def shown_states(face, name):
    """What the lists of an account say of somebody's state: one thing, but while he comes or
    goes."""
    rows = [face.friend(name), *face.group()["member"], *face.call("get_friend_info"),
            *(row for kind in ("group", "discuss") for circle in face.call(f"get_{kind}_info")
              for row in circle["member"])]
    return {row["state"] for row in rows if row["name"] == name}


def test_lists_show_who_is_there_as_accounts_come_and_go_and_no_event_does(start, receive):
    controller = start("controller")
    alice = Face(controller, "alice", receive(), True)
    controller.login("alice", post_api=alice.receiver.url, post_event_list=ALL_EVENTS,
                     update_interval="1")
    assert eventually(lambda: shown_states(alice, "小冰") == {"online"})
    for mode, shown in ("online", "online"), ("hidden", "offline"), ("busy", "busy"):
        controller.login("bob", mode=mode)
        assert eventually(lambda: shown_states(alice, "bob") == {shown})
        assert controller.call("get_user_info", client="bob")["state"] == mode
        if mode == "busy":
            os.kill(controller.state("bob")["pid"], signal.SIGKILL)
            assert eventually(lambda: controller.state("bob")["restarts"] == 1)
            assert eventually(lambda: shown_states(alice, "bob") == {"busy"})
        controller.call("stop_client", client="bob")
        assert eventually(lambda: shown_states(alice, "bob") == {"offline"})
        assert alice.call("search_friend", name="bob", state="online")["code"] == 100
    alice.event("update_friend")
    alice.event("update_friend")  # a refresh comes after all of that, and tells nothing of it
    assert not [event for _, _, _, event in alice.receiver.posts if re.search(
        "(friend|member)_property_change$", event.get("event", ""))]
    alice.change("set", "person", XIAOHUI, state="callme")  # that of a resident is an event
    assert alice.event("friend_property_change")[1:] == ["state", "online", "callme"]
    assert shown_states(alice, "小灰") == {"callme"}


def test_residents_speak_to_each_other_and_are_told_what_is_answered(face):
    def say(**params):
        return face.program.call("/local/say", **{"from": "小灰", "content": "小冰在吗", **params})

    for params in ({"to": "小冰"}, {"type": "group_message", "to": "OpenQQ"},
                   {"type": "discuss_message", "to": "OpenQQ", "client": "alice"}):
        said = say(**params)
        (answer,) = said["answers"]
        assert int(answer.pop("id")) > said["id"] and int(answer.pop("time")) > 1_600_000_000
        assert answer == {"content": "小冰在吗", "sender": "小冰", "sender_uid": XIAOBING,
                          "type": params.get("type", "friend_message")}
    assert say(**{"from": "小冰", "to": "小灰"})["answers"] == []
    assert say(to="alice", content="by name")["answers"] == []
    assert face.receiver.message("by name")["sender"] == "小灰"
    for params in {}, {"to": "nobody"}, {"to": "小灰"}, {"type": "sess_message", "to": "OpenQQ"}:
        assert say(**params)["code"] == 8, params


# -- the life cycle

RUNNING_ONLY = "get_user_info get_friend_info get_group_info get_group_basic_info " \
    "get_discuss_info search_friend search_group send_friend_message send_group_message " \
    "send_discuss_message send_sess_message kick_group_member shutup_group_member".split()
STATE_KEYS = "account cookie_path disable_color http_debug keep_cookie log_console log_encoding " \
    "log_level log_path mode os pid pid_path plugin previous_state qrcode_count_max qrcode_path " \
    "start_time state state_path tmpdir ua_retry_times version".split()
PLUGINS = [
    {"auto_call": None, "call_on_load": 1, "name": "Mojo::Webqq::Plugin::Openqq", "priority": 98},
    {"auto_call": 1, "call_on_load": 0, "name": "Mojo::Webqq::Plugin::ShowMsg", "priority": 100}]


def files(face):
    """Which of alice's files are there."""
    return {name.partition("_")[0] for name in left_files(face.program, "alice")} - {
        "post", "local"}


def assert_waiting_for_a_scan(face):
    """All that scaning promises, also of the state file or what check_client shows."""
    row = face.state()
    assert set(row) == set(STATE_KEYS + ["port", "restarts", "since", "link"] * face.controlled)
    for name in set(row) - {"plugin", "log_encoding", "log_path", "previous_state"}:
        assert type(row[name]) is (int if name in ("pid", "port", "restarts") else str), name
    known = {kind + "_path": face.path(f"{kind}_alice.{end}") for kind, end in (
        ("cookie", "dat"), ("pid", "pid"), ("qrcode", "jpg"), ("state", "json"))}
    known.update(account="alice", mode="online", os=sys.platform, version=openqq.VERSION,
                 log_encoding=None, log_path=None, tmpdir=face.program.tmpdir, state="scaning",
                 qrcode_count_max="10", keep_cookie="1", http_debug="0", previous_state="loading")
    assert known == {name: row[name] for name in known}
    assert [plugin for plugin in row["plugin"] if plugin in PLUGINS] == PLUGINS
    assert re.fullmatch("[0-9]{10}", row["start_time"])
    assert files(face) == {"pid", "qrcode", "state"}
    for api in RUNNING_ONLY:
        assert face.raw(api, content="x")[::2] == (
            503, b'{"code":300,"state":"scaning","status":"client not running"}'), api
    assert face.call("get_client_info")["code"] == 0
    path, picture, url = face.event("input_qrcode")
    with open(path, "rb") as file:
        data = file.read()
    assert path == face.path("qrcode_alice.jpg") and data.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture == base64.encodebytes(data).decode()
    status, headers, body = face.raw("get_qrcode")
    assert (status, body) == (200, data)
    assert (headers["content-type"], headers["cache-control"]) == ("image/png", "no-cache")
    assert url.startswith(face.base + "/") and request(face.base, url[len(face.base):])[2] == data


def confirm(face, ticket):
    """(status, page) of the button on a phone."""
    status, _, body = request(face.base, "/local/confirm", "POST", "ticket=" + ticket,
                              {"Content-Type": FORM})
    return status, body.decode()


def scan(face, ticket):
    """(status, page) of what a phone opens."""
    query = urllib.parse.urlencode({"ticket": ticket})
    status, headers, body = request(face.base, "/local/scan?" + query)
    assert headers["content-type"].lower().startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    return status, body.decode()


def test_a_whole_life_from_scan_to_stop_and_back_by_the_cookie(fresh):
    face = fresh()
    face.event("state_change", lambda params: params[1] == "scaning")
    ticket = face.ticket()
    assert_waiting_for_a_scan(face)
    for unknown in "", ticket[:-1], "<script>alert(1)</script>":
        for status, text in scan(face, unknown), confirm(face, unknown):
            assert status == 404 and "<script" not in text
    assert face.state()["state"] == "scaning"
    for _ in range(2):  # looking is free
        status, text = scan(face, ticket)
        assert status == 200 and "alice" in text and ticket in text and "<form" in text
    assert face.event("state_change") == ["scaning", "confirming"]
    assert face.state()["state"] == "confirming"
    assert face.raw("get_user_info")[0] == 503
    assert confirm(face, ticket)[0] == 200
    assert face.event("state_change") == ["confirming", "updating"]
    assert face.event("state_change") == ["updating", "running"]
    assert face.event("login") == [1]
    assert scan(face, ticket)[0] == confirm(face, ticket)[0] == 404, "once only"
    assert (face.state()["state"], face.state()["previous_state"]) == ("running", "updating")
    assert files(face) == {"pid", "cookie", "state"}
    assert face.raw("get_qrcode")[::2] == (404, b"")
    face.change("set", "friend", XIAOHUI, "alice", markname="记住")
    assert eventually(lambda: face.friend("小灰")["markname"] == "记住")
    ids = [face.call("get_user_info")["id"]] + face.call("get_friend_info")

    assert face.program.stop() == 0
    assert face.event("state_change") == ["running", "stop"]
    assert face.event("stop") == []
    assert files(face) == {"cookie", "state"}
    with open(face.path("state_alice.json"), encoding="utf-8") as file:
        assert json.load(file)["state"] == "stop"

    again = fresh()  # under a controller: started again before anybody asks for it
    again.receiver = again.receiver if not again.controlled else face.receiver
    assert again.event("login") == [0]
    assert files(again) == {"pid", "cookie", "state"}
    assert "ticket=" not in again.program.log.text()
    assert ids == [again.call("get_user_info")["id"]] + again.call("get_friend_info")


def test_relogin_and_stop_client_do_what_they_say_after_3_seconds(alone, together, house):
    before, ids, bases = time.time(), {}, {}
    for face in alone, together[0]:
        ids[face] = {row["id"] for row in face.call("get_friend_info")}
        pid = face.call("get_client_info")["pid"]
        assert face.call("relogin", "POST" if face.controlled else "GET") == {
            "account": "alice", "code": 0,
            "status": f"success, client({pid}) will relogin in 3 seconds"}
        assert face.call("get_user_info")["name"] == "alice"  # until then it works
    for method in "GET", "POST":  # in any state: nobody has scanned yet
        started = house.call("start_client", client="stopped" + method)
        bases[method] = f"http://127.0.0.1:{started['port']}"
        answer = json.loads(request(bases[method], "/openqq/stop_client", method)[2])
        assert type(answer.pop("runtime")) is int
        assert before - 1 <= answer.pop("starttime") <= time.time()
        assert answer == {
            "account": "stopped" + method, "code": 0, "pid": started["pid"],
            "status": f"success, client({started['pid']}) will stop in 3 seconds"}
    assert call(bases["POST"], "get_client_info")["code"] == 0  # until then it serves

    for face, old in ids.items():
        face.event("state_change", lambda params: params == ["running", "scaning"])
        assert not os.path.exists(face.path("cookie_alice.dat"))
        assert (face.raw("get_qrcode")[0], face.raw("get_friend_info")[0]) == (200, 503)
        logged_in(face)
        assert face.event("login") == [1]
        assert not old & {row["id"] for row in face.call("get_friend_info")}
        assert face.say("back")["code"] == 0
        assert face.receiver.message("back")["sender_id"] == face.friend("小灰")["id"]
    for name in "stoppedGET", "stoppedPOST":
        house.log.wait(f"client {name} ended by itself")
        assert left_files(house, f"_{name}.") == {f"state_{name}.json", f"post_{name}.jsonl"}


def test_lists_that_are_not_wanted_stay_empty(house):
    house.login("rosa", is_init_friend=0, is_init_group=0, is_init_discuss=0)
    assert [house.call(api, client="rosa") for api, _, _ in LISTS] == [[]] * 4
    assert house.call("get_user_info", client="rosa")["name"] == "rosa"


# -- the world

def everything(controller):
    return {name: rows for name, rows in controller.call("/local/world").items() if name != "code"}


def in_any_order(value):
    """A copy with all lists sorted."""
    if isinstance(value, dict):
        return {name: in_any_order(item) for name, item in value.items()}
    return sorted(map(in_any_order, value), key=repr) if isinstance(value, list) else value


def test_what_the_world_became_is_read_back_as_it_was_shown(start, tmp_path):
    def faces(program):
        for name in "alice", "bob":
            program.login(name)
            yield Face(program, name, controlled=True)

    first = start("controller")
    alice, bob = faces(first)
    uid = bob.call("get_user_info")["uid"]
    assert alice.call("kick_group_member", group_uid=OPENQQ_GROUP, member_uid=uid)["code"] == 0
    assert bob.call("check_event")[0]["event"] == "lose_group"
    alice.change("add", "person", "4711", name="老王", echo="1", sex="male")
    alice.change("add", "group", "4712", name="棋", owner_uid="4711")
    alice.change("add", "group_member", "alice", "棋", card="马", role="admin")
    alice.change("add", "discuss", "4713", name="茶", owner_uid="alice")
    alice.change("add", "friend", "4711", "alice")
    world = everything(first)
    path = put(tmp_path / "world.json", json.dumps(first.call("/local/world")))

    other = start("controller", "--world", path, tmpdir=tmp_path / "other")
    assert everything(other) == world
    alice, bob = faces(other)  # somebody it knows joins nothing anew
    assert {row["name"] for row in alice.call("get_friend_info")} == {"小冰", "小灰", "老王", "bob"}
    group = alice.group("棋")
    assert group["role"] == "manage"
    assert {(row["name"], row["role"], row["card"]) for row in group["member"]} == {
        ("老王", "owner", None), ("alice", "admin", "马")}
    assert bob.call("get_group_info") == []
    alice.call("send_friend_message", uid="4711", content="喂")
    assert eventually(lambda: [event["class"] for event in alice.call("check_event", since=0)] == [
        "send", "recv"])
    other.login("carol")  # new to that world: everybody's friend, in OpenQQ
    for kind, names in ("friend", {"小冰", "小灰", "老王", "alice", "bob"}), ("group", {"OpenQQ"}):
        assert {row["name"] for row in other.call(f"get_{kind}_info", client="carol")} == names


def test_a_group_of_2000_members_works_and_its_numbers_are_strings(start, tmp_path):
    """What is told in parts is whole and in order; and groups of others are not told of."""
    people = [{"uid": 500_000 + number, "name": f"人{number}", "is_vip": 1, "qage": 9}
              for number in range(2_000)]
    members = [{"uid": row["uid"]} for row in people]
    group = {"uid": 77, "name": "大群", "owner_uid": 500_000, "max_member": 2_000,
             "createtime": 1_500_000_000, "member": [*members, {"uid": "99077", "role": "admin"}]}
    others = [{"uid": 30_001 + number, "name": f"群{number}", "member": members[:1]}
              for number in range(70)]
    path = put(tmp_path / "world.json", json.dumps({
        "people": [*people, {"uid": "99077", "name": "alice"}], "groups": [*others, group],
        "discuss": [], "friends": [[row["uid"], "99077"] for row in people[:150]]}))
    face = logged_in(Face(start("client", "--account", "alice", "--world", path), "alice"))
    [group], friends = face.call("get_group_info"), face.call("get_friend_info")
    names = [row["name"] for row in people]
    assert [row["name"] for row in group["member"]] == [*names, "alice"]
    assert [row["name"] for row in friends] == names[:150]
    assert_object(group, "group")
    assert_object(friends[0], "friend")
    assert (group["owner_uid"], group["role"], group["createtime"]) == (
        "500000", "manage", "1500000000")
    assert face.call("send_group_message", name="大群", content="大家好")["code"] == 0
    assert face.say("好", "人1999", type="group_message", to="大群")["code"] == 0
    assert face.since(0, "好")[-1]["sender"] == "人1999"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        kicked = pool.submit(lambda: [face.call(
            "kick_group_member", group_uid=77, member_uid=500_001 + number)["code"]
            for number in range(100)])
        while not kicked.done():  # members that leave meanwhile break no answer
            assert len(face.group("大群")["member"]) > 1_900
    assert kicked.result() == [0] * 100
    assert eventually(lambda: len(face.group("大群")["member"]) == 1_901)


@pytest.fixture
def network(tmp_path):
    """A local network in this process, with a clock of its own: network.now[0] is the time."""
    now = [1_600_000_000.0]
    made = openqq.LocalNetwork(str(tmp_path / "net"), "", openqq.QQ, openqq.Log(),
                               lambda: "http://x", clock=lambda: now[0])
    made.now = now
    yield made
    made.stop()


@pytest.fixture
def enter(network):
    """enter(account) logs it in by a code: its row of the login."""
    def log_in(account):
        assert network.call(account, "attach", ["", "", False], {}) == {}
        network.do(network.force_login, account)
        for verb in "ticket", "ready":
            network.call(account, verb, [], {})
        return next(item["login"] for item in network.call(account, "pull", [""], {})
                    if item["do"] == "confirmed")
    return log_in


def test_a_cookie_spares_the_scan_for_3_days(network, enter):
    cookie = enter("alice")["cookie"]
    network.now[0] += 3 * 24 * 3600 - 1
    renewed = network.call("alice", "attach", ["", cookie, False], {})["login"]["cookie"]
    network.now[0] += 3 * 24 * 3600 + 1
    for cookie in "x", renewed:
        assert network.call("alice", "attach", ["", cookie, False], {}) == {}


def test_a_muted_member_speaks_again_when_the_time_is_up(network, enter):
    enter("alice")
    message = {"type": "group_message", "content": "x", "group": OPENQQ_GROUP}

    assert network.call("alice", "mute", [OPENQQ_GROUP, [XIAOHUI, XIAOBING], 60], {}) is True
    network.now[0] += 59
    with pytest.raises(openqq.NotFound):
        network.do(network.speak, XIAOHUI, message)
    # what a muted resident would have answered fails nobody's message
    (sent,) = network.call("alice", "send", [[{**message, "content": "小冰?"}]], {})
    assert sent["code"] == 0
    network.now[0] += 2
    assert [row["content"] for row in network.do(network.speak, XIAOHUI, message)] == ["x"]


def test_a_ticket_works_for_120_seconds_or_until_the_next(network):
    now = [0.0]
    network.timer = lambda: now[0]

    def ticket():
        network.ticket("alice")
        (item,) = network.call("alice", "pull", [""], {})
        return re.search("ticket=([^&]+)", item["text"]).group(1)

    first, second = ticket(), ticket()  # a new one ends the old one
    assert first != second and len(second) >= 32
    for now[0] in 0.0, 119.9:
        assert network.scan(second) == "alice"
    for now[0], worthless in (0.0, first), (120.0, second):
        with pytest.raises(openqq.NotFound):
            network.scan(worthless)


def test_a_thousand_messages_wait_for_somebody_who_is_away(network, enter):
    for account in "alice", "bob":
        uid = enter(account)["uid"]
    network.do(network.detach, "bob")
    messages = [{"type": "friend_message", "uid": uid, "content": str(number)}
                for number in range(1_003)]
    assert {row["code"] for row in network.call("alice", "send", [messages], {})} == {0}
    network.call("bob", "ready", [], {})
    heard, mark = [], ""
    while len(heard) < 1_000:
        items = network.call("bob", "pull", [mark], {})
        mark = items[-1]["mark"]
        heard += [item["content"] for item in items if item["do"] == "message"]
    assert heard == [str(number) for number in range(3, 1_003)]  # the oldest gave way


# ------------------------------------------------------------------------------------------------
# What is posted, and what its answer does
# ------------------------------------------------------------------------------------------------

class Poll(Peer):
    """A poll_api: lets each GET hang until the test says what it gets, by answer(). With several
    askers, `?for=WHO` in their URLs tells them apart."""

    def __init__(self):
        self.asked = queue.Queue()     # (path, headers) of each GET
        self._answers = {"": queue.Queue(), "hugo": queue.Queue()}
        super().__init__()

    def handle(self, handler):
        self.asked.put((handler.requestline.split()[1], handler.headers))
        status, location = self._answers[handler.query.get("for", "")].get()
        handler.close_connection = True
        if status:
            self.reply(handler, status, "", fields={
                "Connection": "close", **({"Location": location} if location else {})})

    def ask(self):
        """The path of the next GET, when it has come."""
        return self.asked.get(timeout=WAIT)[0]

    def answer(self, status=200, location="", who=""):
        """Answer the GET that hangs, or the next one; status 0 hangs up."""
        self._answers[who].put((status, location))


class Tower:
    """A controller with a post_api and a poll_api, its accounts gina and hugo running.

    gina came first, so the group OpenQQ is hers: she may silence. `says` maps (client, class,
    content) of a message to what the receiver answers to it.
    """

    def __init__(self, tmpdir):
        self.says = {}
        self.receiver = Receiver(lambda event: self.says.pop((
            event.get("receiver" if event.get("class") == "recv" else "sender"),
            event.get("class"), event.get("content")), None))
        self.poll = Poll()
        self.program = Program(
            tmpdir, "controller", "--post-api", self.receiver.url + "?key=a%20b",
            "--poll_api", self.poll.url + "/beat", "--poll-interval", "0").ready()
        self.call, self.log = self.program.call, self.program.log
        self.program.login("gina")
        self.program.login("hugo", poll_api=self.poll.url + "/beat?for=hugo", poll_interval="0",
                           post_api=self.receiver.url + "?client=old&key=a%20b",
                           post_secret="k3y")

    def say(self, content, name="gina", answer=None, **params):
        """Let 小灰 speak; the message as it was posted, once it was."""
        if answer is not None:
            self.says[name, "recv", content] = answer
        said = self.call("/local/say", client=name, content=content, **{"from": "小灰", **params})
        assert said["code"] == 0, said
        return self.posted(name, lambda event: event.get("content") == content
                           and event["class"] == "recv")

    def change(self, do, what, uid, **params):
        """/local/change; `place` is its `in`."""
        params = {"in" if name == "place" else name: value for name, value in params.items()}
        assert self.call("/local/change", do=do, what=what, uid=uid, **params)["code"] == 0

    def posts(self, name):
        """(path, headers, body, event) of all that was posted in a client's name so far."""
        return [post for post in list(self.receiver.posts)
                if query_of(post[0]).get("client") == [name]]

    def posted(self, name, wanted):
        """The first event of a client that is wanted (or has this content), once it was posted."""
        is_wanted = wanted if callable(wanted) else lambda event: event.get("content") == wanted
        end = time.monotonic() + WAIT
        while True:
            for _, _, _, event in self.posts(name):
                if is_wanted(event):
                    return event
            self.receiver.events.get(timeout=max(0.01, end - time.monotonic()))

    def close(self):
        status = self.program.stop()
        self.poll.close()
        self.receiver.close()
        assert status == 0 and "Traceback" not in self.log.text(), self.log.text()


def query_of(url):
    return urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """For tests that end what they start in it, and leave gina and hugo running."""
    found = Tower(tmp_path_factory.mktemp("tower"))
    yield found
    found.close()


def test_each_post_is_one_json_event_with_the_clients_name_in_the_url(tower):
    """Merged into the address of hugo's own post_api, with hugo's own secret to sign."""
    for name in "gina", "hugo":
        tower.say("一个", name)
        for path, headers, body, event in tower.posts(name):
            assert query_of(path) == {"client": [name], "key": ["a b"]}
            assert headers["Content-Type"] == "application/json"
            assert headers["X-Signature"] == (
                "sha1=" + hmac_sha1("k3y", body) if name == "hugo" else None)
            assert event["post_type"] in ("event", "receive_message", "send_message")
            assert body == json.dumps(event, ensure_ascii=False, sort_keys=True,
                                      separators=(",", ":")).encode()
    posts = tower.posts("gina")
    assert len({headers["X-Event-ID"] for _, headers, _, _ in posts}) == len(posts)
    told = {name: [event["params"] for _, _, _, event in posts if event.get("event") == name]
            for name in ("state_change", "login", "input_qrcode")}
    assert told["state_change"] == [
        ["init", "loading"], ["loading", "scaning"], ["scaning", "confirming"],
        ["confirming", "updating"], ["updating", "running"]]
    assert told["login"] == [[1]]
    [(path, picture, url)] = told["input_qrcode"]
    assert path == tower.program.path("qrcode_gina.jpg")
    assert url == tower.program.base + "/openqq/get_qrcode?client=gina"
    assert base64.decodebytes(picture.encode())[:4] == b"\x89PNG"
    assert max(map(len, picture.split("\n"))) == 76


def test_messages_are_always_posted_and_events_as_the_settings_say(tower):
    cases = {
        "ev0": ({}, {"login", "stop", "state_change", "input_qrcode", "new_group", "new_friend",
                     "new_group_member", "lose_group", "lose_friend", "lose_group_member"}),
        "ev1": ({"plugin_openqq_post_event": "0"}, set()),  # as the environment spells it
        "ev2": ({"post_event_list": "login,friend_property_change,new_discuss,update_user"},
                {"login", "friend_property_change", "new_discuss", "update_user"})}
    for name, (settings, _) in cases.items():
        tower.program.login(name, **settings)
    tower.change("add", "person", "777")
    tower.change("add", "group_member", "777", place="OpenQQ")
    for number, name in enumerate(cases):
        tower.change("add", "friend", "777", place=name)
        tower.change("set", "friend", "777", place=name, markname="新")
        tower.change("remove", "friend", "777", place=name)
        tower.change("add", "group", f"99{number}", owner_uid=name)
        tower.change("add", "discuss", f"88{number}", owner_uid=name)
        tower.change("remove", "group", f"99{number}")
    tower.change("remove", "person", "777")
    for name, (_, wanted) in cases.items():
        tower.say("消息 " + name, name)
        kept = [event.get("event", "") for event in tower.call("check_event", client=name)]
        assert any("property" in event for event in kept) == (name == "ev2")
        assert tower.call("stop_client", client=name)["code"] == 0   # waits for what is queued
        assert {event["event"] for _, _, _, event in tower.posts(name)
                if event["post_type"] == "event"} == wanted
        tower.call("delete_client", client=name)


JSON_TYPE = {"Content-Type": "application/json"}
POST_ANSWERS = [  # header fields, body, and whether %s in it is a reply
    ({"Content-Type": "application/json;charset=UTF-8"}, '{"reply":"%s","code":0}', True),
    (JSON_TYPE, '{"reply":"%s，国标"}'.encode("gbk"), True),
    ({"Content-Type": "text/json"}, ' {"reply": "%s", "shutup": 0}\n', True),
    ({"Content-Type": "Application/JSON"}, '{"reply":"%s"}', True),
    ({"Content-Type": "text/plain"}, "%s", False),
    *[(JSON_TYPE, body, False) for body in (
        '{"reply":"%s"', '["reply","%s"]', "", '{"reply":null,"x":"%s"}', "[" * 100_000)],
    ({"Location": "http://[bad"}, "", False),
]


def test_only_a_json_answer_with_a_reply_replies(tower):
    """All of it in one conversation, whose order is kept: the last reply comes after all others."""
    wanted, since = [], len(tower.posts("gina"))
    for number, (fields, body, replies) in enumerate(POST_ANSWERS):
        body = body if isinstance(body, bytes) else body.encode()
        tower.say(f"问{number}", answer=(302 if "Location" in fields else 200, fields,
                                        body.replace(b"%s", b"A%d" % number)))
        if replies:
            wanted.append(f"A{number}" + ("，国标" if b"\xa3\xac" in body else ""))
    tower.say("问完了", answer=(200, {}, {"reply": "答完了"}))
    tower.posted("gina", "答完了")
    assert [event["content"] for _, _, _, event in tower.posts("gina")[since:]
            if event["post_type"] == "send_message"] == wanted + ["答完了"]


def test_a_reply_goes_to_where_the_message_came_from_or_went(tower):
    """Also to a discuss's member, and to the receiver of a sent message that was reported."""
    for type, where in (("friend", {"receiver": "小灰"}), ("group", {"group": "OpenQQ"}),
                        ("discuss", {"discuss": "OpenQQ"}),
                        ("sess", {"receiver": "小灰", "group": "OpenQQ", "via": "group"})):
        tower.say("来自 " + type, type=type + "_message", answer=(200, {}, {"reply": "致 " + type}),
                  **({} if type == "friend" else {"to": "OpenQQ"}))
        wanted = {"type": type + "_message", "class": "send", "code": 0, **where}
        assert wanted.items() <= tower.posted("gina", "致 " + type).items()
    [discuss] = tower.call("get_discuss_info", client="hugo")[:1]
    [gina] = [row for row in discuss["member"] if row["name"] == "gina"]
    for side, type, params, name, wanted in (
            ("recv", "sess", {"client": "hugo", "discuss_id": discuss["id"], "id": gina["id"]},
             "hugo", {"type": "sess_message", "via": "discuss", "sender": "gina"}),
            ("send", "friend", {"client": "gina", "name": "小灰"},
             "gina", {"type": "friend_message", "receiver": "小灰"})):
        tower.says["gina", side, "问 " + side] = (200, {}, {"reply": "答 " + side})
        tower.call(f"send_{type}_message", content="问 " + side, **params)
        assert wanted.items() <= tower.posted(name, "答 " + side).items()


def test_media_in_the_answer_is_sent_after_the_reply_to_the_same_place(tower, gallery):
    """None of a port of this program, and no file of somebody else's."""
    def next_sent():
        """The next message with a picture that gina sent: its id, where to, and the bytes."""
        event = tower.posted("gina", lambda event: event.get("class") == "send"
                             and event.get("media") and event["id"] not in seen)
        seen.add(event["id"])
        url = urllib.parse.urlsplit(event["media"][0]["url"])
        return (int(event["id"]), event.get("group") or event.get("discuss") or event["receiver"],
                request(tower.program.base, f"{url.path}?{url.query}")[2])

    url, path, seen = gallery.url + "/cat.png", os.path.join(tower.program.tmpdir, "狗.png"), set()
    put(path, PNG)
    other = PNG + b"other"
    spelt = "base64://" + base64.b64encode(other).decode()
    own = tower.program.base + "/openqq/stop_client?client=hugo"
    refused = [own, gallery.to(own), "http://127.0.0.1:1/", "file:///etc/passwd", "/etc/passwd",
               tower.program.path("cookie_gina.dat"), "x", 7]
    cases = [(url, [PNG], "friend"), (gallery.to(url), [PNG], "discuss"), (spelt, [other], "sess"),
             ([spelt, *refused, None, path], [other, PNG], "group")]
    for number, (media, pictures, type) in enumerate(cases):
        params, place = ({}, "小灰") if type == "friend" else ({"to": "OpenQQ"}, "OpenQQ")
        tower.say(f"要图{number}", type=type + "_message", **params,
                  answer=(200, {}, {"reply": f"来了{number}", "media": media}))
        last = int(tower.posted("gina", f"来了{number}")["id"])
        for picture in pictures:
            id, where, body = next_sent()
            assert (where, body) == (place, picture) and id > last, "behind the reply"
    tower.say("只要图", answer=(200, {}, {"media": spelt}))
    assert next_sent()[1:] == ("小灰", other), "and nothing of what was refused"
    for said, count in ("media_url: ", 3), ("media_path", 4), ("it must be text", 1):
        tower.log.wait("media in an answer of post_api: " + said, count)
    assert tower.program.state("hugo")["state"] == "running"


def test_a_path_in_an_answer_counts_only_where_the_receiver_is_on_this_machine():
    for host in "127.0.0.1:9", "localhost", "[::1]:9", "bot.example", "192.0.2.9:80", "":
        client = types.SimpleNamespace(log=openqq.Log())
        answers = openqq.Answers(client, lambda params: None, host and f"http://{host}/x")
        if re.search("127|localhost|::1", host):
            assert answers._named("/tmp/x.png") == {"media_path": "/tmp/x.png"}
        else:
            with pytest.raises(openqq.NotAllowed, match="give http://"):
                answers._named("/tmp/x.png")
        assert answers._named("HTTPS://h/x.png") == {"media_url": "HTTPS://h/x.png"}


def test_events_that_wait_follow_numeric_ids_when_it_is_switched(workshop, receive):
    """The receiver is away while the account talks, and there when it is started anew."""
    edit_template(workshop, TEMPLATE.format("openqq.STOP_SECONDS = 0.0", ""))
    with reserve() as taken:
        port = taken.getsockname()[1]
        url = f"http://127.0.0.1:{port}/post_message"
        workshop.login("nina", post_api=url)
        workshop.call("send_friend_message", client="nina", name="小冰", content="它等着")
        workshop.call("stop_client", client="nina")
        receiver = receive(port=port)
    workshop.call("start_client", client="nina", post_api=url, numeric_ids="1")
    assert eventually(lambda: {"login", "state_change", None} <= {
        event.get("event") for *_, event in receiver.posts})
    for *_, event in receiver.posts:
        ids = [value for key, value in event.items()
               if re.fullmatch("(.*_)?u?id|time", key) and value is not None]
        assert ids and {type(value) for value in ids} == {int}, event


def test_shutup_in_the_answer_to_a_group_message_silences_the_sender_for_shutup_time(tower):
    for who, answer, seconds in (
            ("1000000", {"shutup": 1, "shutup_time": 1}, 60),  # at least
            ("1000001", {"shutup": "1", "shutup_time": "600", "reply": "安静"}, 600)):
        tower.change("add", "person", who)
        tower.change("add", "group_member", who, place="OpenQQ")
        group = {"type": "group_message", "to": "OpenQQ", "from": who}
        tower.say("吵 " + who, answer=(200, {}, answer), **group)
        told = tower.posted("gina", lambda event: event.get("event") == "group_shutup"
                            and event["params"][0]["uid"] == who)
        assert told["params"][2] == seconds
        assert tower.call("/local/say", client="gina", content="还吵", **group)["code"] == 8
        tower.change("remove", "person", who)
    tower.say("私下", answer=(200, {}, {"shutup": 1}))
    group["from"] = "小灰"
    for number, value in enumerate((0, "yes", [1])):
        tower.say(f"群里{number}", answer=(200, {}, {"shutup": value}), **group)
    tower.say("还能说话", **group)


def test_stdout_carries_the_events(start, receive):
    receiver = receive()
    client = start("client", "--account", "solo", "--post_api", receiver.url,
                   "--post-stdout", "1", "--login_type", "login", "--pwd", "x")
    client.out.wait('"login"')
    client.call("send_friend_message", name="小灰", content="问")
    client.out.wait('"post_type":"send_message"')
    assert client.stop() == 0
    client.out.wait('"event":"stop"')
    assert sorted(map(json.loads, client.out.lines), key=str) == sorted(  # lanes keep no one order
        [event for _, _, _, event in receiver.posts], key=str)


# ------------------------------------------------------------------------------------------------
# Heartbeat and tunnel
# ------------------------------------------------------------------------------------------------

def send_url(base, **params):
    return base + "/openqq/send_friend_message?" + urllib.parse.urlencode(params)


@pytest.fixture(scope="session")
def beater(tmp_path_factory):
    """A client alone, running, with a token and a poll_api that hangs."""
    poll = Poll()
    client = Program(tmp_path_factory.mktemp("beater"), "client", "--account", "tom",
                     "--poll-api", poll.url + "/beat", "--poll-interval", "0",
                     "--token", "s3cret").ready()
    client.log.wait("等待手机QQ扫描二维码")
    client.early = poll.asked.qsize()   # asked before it was running
    client.call("/local/login", client="tom", token="s3cret")
    yield client, poll
    poll.close()
    assert client.stop() == 0
    assert "Traceback" not in client.log.text() and "s3cret" not in client.log.text()


def test_poll_api_is_asked_once_running_and_again_whatever_came_of_it(beater):
    client, poll = beater
    assert client.early == 0
    path, headers = poll.asked.get(timeout=WAIT)
    assert path == "/beat" and poll.asked.empty(), "one request hangs, a second is not made"
    assert "Authorization" not in headers, "the token is for our own API only"
    for status in 200, 500, 0, 302:
        poll.answer(status)
        assert poll.ask() == "/beat"
    poll.answer()


def test_redirects_to_its_own_api_and_up_to_seven_within_a_server_are_followed(beater):
    """Its own API is called with its own token."""
    client, poll = beater
    assert poll.ask() == "/beat"
    poll.answer(302, send_url(f"http://localhost:{client.port}", name="小冰", content="一步"))
    client.log.wait("poll_api had us call http://.*/openqq/send_friend_message: 200")
    assert poll.ask() == "/beat"
    spelt = f"{client.base}/openqq/send_friend_message?name=小冰&content=中文"  # as PHP writes it
    poll.answer(302, spelt.encode().decode("latin-1"))
    client.log.wait("小冰.* : 中文")
    assert poll.ask() == "/beat"
    for end in send_url(client.base, name="小冰", content="七步"), "/hop8":
        for hop in range(1, 8):
            poll.answer(302, f"/hop{hop}" if hop % 2 else f"{poll.url}/hop{hop}?x=%20")
            assert poll.ask() == (f"/hop{hop}" if hop % 2 else f"/hop{hop}?x=%20")
        poll.answer(302, end)
        assert poll.ask() == "/beat"
    for said in "小冰.* : 一步", "小冰.* : 七步", "after 7 redirects: given up":
        client.log.wait(said)
    poll.answer()


def test_other_locations_are_logged_and_dropped(beater, closing):
    (client, poll), other = beater, closing(Poll())
    assert poll.ask() == "/beat"
    before = len(re.findall(r"\[warn\] .*poll_api", client.log.text()))
    for count, target in enumerate([
            other.url + "/openqq/get_user_info", client.base + "/local/login?client=tom",
            f"https://127.0.0.1:{poll.port}/beat", "file:///etc/passwd",
            f"http://127.0.0.1@example.invalid:{client.port}/openqq/get_user_info",
            "http://[bad", "http://127.0.0.1:x/"], before + 1):
        poll.answer(302, target)
        client.log.wait(r"\[warn\] .*poll_api", count)
        assert poll.ask() == "/beat", target
    assert other.asked.empty()
    poll.answer()


def test_after_an_answer_it_waits_for_poll_interval(tower, closing):
    poll = closing(Poll())
    tower.program.login("ida", poll_api=poll.url, poll_interval="0.3")
    poll.ask()
    answered = time.monotonic()
    poll.answer()
    poll.ask()
    assert time.monotonic() - answered >= 0.29
    tower.call("delete_client", client="ida")


def test_a_client_under_a_controller_asks_in_its_name_and_calls_the_controllers_api(tower):
    poll, asked = tower.poll, {"": "/beat", "hugo": "/beat?for=hugo&client=hugo"}
    assert {poll.ask(), poll.ask()} == set(asked.values())
    for who in asked:   # both, the controller and the client, may call the controller
        poll.answer(302, send_url(tower.program.base, client="hugo", name="小灰",
                                  content="绕道" + who), who)
        tower.posted("hugo", "绕道" + who)
        assert poll.ask() == asked[who]
    # Its own API, at the port that the controller gave it, is the client's to call only.
    own = send_url(f"http://127.0.0.1:{tower.program.state('hugo')['port']}", name="小灰",
                   content="直达")
    poll.answer(302, own)
    tower.log.wait(r"\[wqc\].* \[warn\] poll_api leads to .*not followed")
    poll.answer(302, own, "hugo")
    tower.posted("hugo", "直达")
    assert {poll.ask(), poll.ask()} == set(asked.values())
    # The controller's own heartbeat can start a client.
    poll.answer(302, tower.program.base + "/openqq/start_client?client=remote&log_level=warn")
    assert poll.ask() == "/beat"
    assert tower.program.state("remote")["account"] == "remote"
    tower.call("delete_client", client="remote")
    for who in asked:
        poll.answer(who=who)


# ------------------------------------------------------------------------------------------------
# The log
# ------------------------------------------------------------------------------------------------

STAMP = r"\[\d\d/\d\d/\d\d \d\d:\d\d:\d\d\]"
LOG_LINE = re.compile(r"\[(wqc|[\w.@-]+)\]\[(\d+)\]" + STAMP + r" \[(debug|info|warn|error|fatal|"
                      "好友消息|群消息|讨论组消息|群临时消息|讨论组临时消息)\\] .+")


def test_messages_are_shown_as_tools_parse_them(tower):
    """The kinds, `sender|category or group`, `我->receiver`; a prefix on each line of the text; a
    mark where a send failed: gina silences hugo."""
    discuss = tower.call("get_discuss_info", client="hugo")[0]
    group = tower.call("search_group", client="gina", name="OpenQQ")[0]
    rows = {row["name"]: row for row in group["member"]}
    tower.say("一\n二")
    for kind in "group", "discuss", "sess":
        tower.say("在 " + kind, type=kind + "_message", to="OpenQQ")
    for api, sender, params in (
            ("discuss_sess", "hugo", {"discuss_id": discuss["id"], "uid": rows["gina"]["uid"]}),
            ("friend", "gina", {"name": "小灰"}), ("group", "gina", {"name": "OpenQQ"}),
            ("discuss", "gina", {"name": "OpenQQ"}),
            ("sess", "gina", {"group_id": group["id"], "id": rows["小灰"]["id"]})):
        assert tower.call(f"send_{api.split('_')[-1]}_message", client=sender, content=api,
                          **params)["code"] == 0, api
    assert tower.call("shutup_group_member", client="gina", group_uid=group["uid"], time=1,
                      member_uid=rows["hugo"]["uid"])["code"] == 0
    failed = tower.call("send_group_message", client="hugo", uid=group["uid"], content="听不见")
    assert failed == {"code": -4, "id": None, "info": failed["info"], "status": "发送失败"}
    told = tower.posted("hugo", "听不见")
    assert (told["code"], told["msg"], told["info"], told["id"]) == (
        -4, "发送失败", failed["info"], None)
    for text in f"""gina[好友消息] 小灰|我的好友 : 一
gina[好友消息] 小灰|我的好友 : 二
gina[群消息] 小灰|OpenQQ : 在 group
gina[讨论组消息] 小灰|OpenQQ : 在 discuss
gina[群临时消息] 小灰|OpenQQ : 在 sess
gina[讨论组临时消息] hugo|OpenQQ : discuss_sess
gina[好友消息] 我->小灰 : friend
gina[群消息] 我->OpenQQ : group
gina[讨论组消息] 我->OpenQQ : discuss
gina[群临时消息] 我->小灰 : sess
hugo[讨论组临时消息] 我->gina : discuss_sess
hugo[群消息] 我->OpenQQ : 听不见[发送失败({failed['info']})]""".splitlines():
        tower.log.wait(rf"^\[{text[:4]}\]\[\d+\]{STAMP} {re.escape(text[4:])}$")


HOSTILE_NAME = "坏\n[gina][1][26/01/01 00:00:00] [群消息] 假|冒 : 钱\r\x1b[2J\x07\x9b31m\u2028尾"


def test_every_line_has_head_time_and_level_and_no_control_character_of_a_name_or_a_text(tower):
    tower.change("add", "person", "666", name=HOSTILE_NAME)
    tower.change("add", "friend", "666", place="gina")
    tower.change("add", "group", "6660", name=HOSTILE_NAME, owner_uid="gina")
    tower.change("add", "group_member", "666", card=HOSTILE_NAME, place="6660")
    since = len(tower.log.lines)
    tower.say("招呼", **{"from": "666"})
    tower.say("招呼\x1b[31m\r假", type="group_message", to="6660", **{"from": "666"})
    tower.call("send_friend_message", client="gina", uid="666", content="回")
    tower.call("send_group_message", client="gina", uid="6660", content="回群")
    tower.log.wait("我->坏.*回群")
    lines = [line for line in tower.log.lines[since:] if line.startswith("[gina]")]
    assert len(lines) == 4, "one line each, though the names hold line breaks"
    pids = {row["account"]: row["pid"] for row in tower.call("check_client")["client"]}
    pids["wqc"] = tower.program.pid
    for line in tower.log.lines:
        found = LOG_LINE.fullmatch(line)
        assert found and int(found.group(2)) == pids.get(found.group(1), int(found.group(2))), line
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", line), ascii(line)
    tower.change("remove", "group", "6660")
    tower.change("remove", "person", "666")


def test_a_clients_own_log_file_and_level_hold_for_it(tower):
    """A file is kept to itself unless console is wanted; a caller's level wins over the
    controller's."""
    for name, level, console, encoding in (
            ("quiet", "info", "0", "gbk"), ("loud", "debug", "1", ""), ("curt", "warn", "1", "")):
        path = os.path.join(tower.program.tmpdir, name + ".log")
        tower.program.login(name, log_path=path, log_console=console, log_encoding=encoding,
                            log_level=level, http_debug="1")
        tower.say("第一 " + name, name)
        read = lambda: content(path).decode(encoding or "utf-8")  # noqa: E731
        assert eventually(lambda: name == "curt" or "小灰|我的好友 : 第一 " + name in read())
        assert all(LOG_LINE.fullmatch(line) for line in read().splitlines())
        assert os.stat(path).st_mode & 0o777 == 0o600
        info = tower.call("get_client_info", client=name)
        assert (info["log_path"], info["log_encoding"], info["log_level"]) == (
            path, encoding or None, level)
        tower.call("delete_client", client=name)
    tower.log.wait(rf"^\[loud\]\[\d+\]{STAMP} \[好友消息\] 小灰\|我的好友 : 第一 loud$")
    tower.log.wait(rf"^\[loud\]\[\d+\]{STAMP} \[debug\] .*GET /openqq/get_client_info 200")
    assert "第一 quiet" not in tower.log.text() and "[quiet]" not in tower.log.text()
    assert not re.search(r"^\[curt\].*\] \[(debug|info|好友消息)\]", tower.log.text(), re.M)


# ------------------------------------------------------------------------------------------------
# Settings and the command line
# ------------------------------------------------------------------------------------------------

# Every attribute that Webqq.pod documents, and what the source of 2.1.4 takes besides (000:
# "other parameters that Mojo-Webqq's new supports").
DOCUMENTED_NEW = """
    security=1 mode=hidden http_debug=1 keep_cookie=0 disable_color=1 ignore_retcode=1202,100100
    log_console=1 log_level=debug log_path={tmpdir}/all.log log_encoding=utf8 tmpdir={tmpdir}
    pic_dir={tmpdir} verifycode_path={tmpdir}/verify.jpg qrcode_path={tmpdir}/all.png
    cookie_path={tmpdir}/all.dat pid_path={tmpdir}/all.pid state_path={tmpdir}/all.json
    is_init_friend=1 is_init_group=1 is_init_discuss=1 is_update_user=0 is_update_group=1
    is_update_friend=1 is_update_discuss=1 update_interval=600 msg_ttl=5 qrcode_count_max=10
    login_type=qrlogin pwd=x type=smartqq ua_debug=0 ua_debug_req_body=0 ua_debug_res_body=0
    log_head=[all][1] log_unicode=0 send_interval=3 check_account=0 ignore_poll_http_code=504,502
    ignore_unknown_id=1 default_send_real_comp_sign=0 group_member_card_cut_length=21
    group_member_card_ext_only=0 group_member_use_fullcard=0 group_member_identify_callback=x
    encrypt_method=perl ua_retry_times=5 send_failure_count_max=5 poll_failure_count_max=3
    model_update_timeout=15 domain=w.qq.com"""


def test_every_attribute_of_the_documented_new_is_taken(tower):
    params = dict(word.split("=") for word in DOCUMENTED_NEW.format(
        tmpdir=tower.program.tmpdir).split())
    started = tower.call("start_client", client="all", **params)
    assert (started["code"], started["status"], params.pop("pwd")) == (0, "success", "x")
    assert {name: started[name] for name in params} == params and "pwd" not in started
    assert tower.call("/local/login", client="all")["code"] == 0
    for end in "log", "dat", "pid", "json":
        assert os.path.exists(f"{tower.program.tmpdir}/all.{end}") == (end != "dat")
    assert {"mode": "hidden", "state": "running"}.items() <= tower.program.state("all").items()
    assert tower.call("delete_client", client="all")["code"] == 0


# A text that a setting takes and one that it does not, by the function that reads it.
SAMPLES = {"_flag": ("1", "maybe"), "_whole": ("7", "7.5"), "_port": ("65535", "65536"),
           "_number": ("0.5", "-1"), "_text": ("x y", "a\0b"), "_path": ("/tmp/x", "a\0b"),
           "_words": ("a, b", "a\0b"), "_hosts": ("a.example, b", "*.example"),
           "_encoding": ("gbk", "klingon"), "_url": ("http://h/a?b=1", "gopher://h/"),
           "_bridge_url": ("wss://h:3001/", "ftp://h/")}
CHOICES = {"flavor": "qq", "log_level": "fatal", "restart": "never", "login_type": "login",
           "mode": "busy", "onebot_login": "llbot", "link": "local"}


@pytest.mark.parametrize("whose", ["controller", "client"])
def test_each_setting_can_be_given_in_every_way_helped_with_and_refused_by_name(whose):
    done = run_quickly(whose, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [row for row in openqq.SETTINGS.values() if row.whose in (whose, "both")]
    assert len(rows) > 20
    make = functools.partial(openqq.Settings, whose)
    samples = {row: SAMPLES.get(row.read.__name__) or (CHOICES[row.name], "nonsense")
               for row in rows}
    for row, (good, bad) in samples.items():
        line = re.search(rf"^ *--{row.name.replace('_', '-')} .*", done.stdout, re.M)
        assert bool(line) != row.idle, row.name
        if line:
            assert row.help in line[0] and (not row.shown() or f"[{row.shown()}]" in line[0])
        names = ["MOJO_WEBQQ_" + row.name.upper()]
        names += ["MOJO_WEBQQ_PLUGIN_OPENQQ_" + row.name.upper()] if row.plugin else []
        wanted = row.parse(good)
        for given, environ in [({row.name: wanted}, {}), *[({}, {name: good}) for name in names]]:
            assert getattr(make(given, environ, "MOJO_WEBQQ_"), row.name) == wanted, row.name
        for given, environ in ({row.name: bad}, {}), ({}, {names[0]: bad}):
            with pytest.raises(ValueError, match=row.name):
                make(given, environ, "MOJO_WEBQQ_")
    for form, mark in ("--{0}\n{1}", "_"), ("--{0}={1}", "-"):
        words = [word for row, (good, _) in samples.items()
                 for word in form.format(row.name.replace("_", mark), good).split("\n")]
        assert openqq.parse_flags(whose, words) == {
            row.name: good for row, (good, _) in samples.items()}
    assert not re.search("[^ -~\n]{200}", done.stdout)


# What nobody means, for each way to read a setting; {tmpdir} has in it: file, dir, fifo, link (to
# file), twice (a second name of it).
LONG = "a" * 5_000
ODD_TEXTS = ["a\0b", "a\nb", "\x1b[31m", "\ud800", LONG, "\u2028", " ", "{}{0}%s", "';--",
             "\u202eabc", "ä" * 4_000, "😀", "a,,b", "=", "a\\"]
ODD_NUMBERS = [" 1", "9" * 5_000, *"nan inf -1 1e9 ² １２ +1 0x10 1_000 0 0007 0.5 5. 1,5".split()]
ODD_PATHS = ["a\0b", "\ud800", *("{tmpdir}/" + name for name in (
    LONG, "ä" * 200, *"dir fifo link twice file/x no/such ./ good dir/good "
    "mojo_webqq_cookie_odd.dat".split())), *"/dev/null / ~nobody x ../x {tmpdir}".split()]
ODD_URLS = ["{s}://a b/", " {s}://h/", "{s}://h:1/\ud800", "javascript:alert(1)",
            "{s}://" + "a" * 300 + "/", "{s}://" + "ü" * 80 + ".example/", "{s}://u:p%zz@h:1/",
            *r"""{s}://127.0.0.1:65536/ {s}://127.0.0.1:0/ {s}://h:x/ {s}://:80/ {s}://127.0.0.1:1/
    {s}://[::1 {s}://[::1]:1/ {s}://a..b/ {s}://a\b@h:1/ {s}://u@v@h:1/ {S}://127.0.0.1:1/
    {s}://h:1/,{s}://h:1/ {s}:/h/ //h/ h:80 file:///etc/passwd {s}:///x
    {s}://127.0.0.1:1/ä?ä#ä {s}://127.0.0.1:1?x {s}://127.0.0.1:1#x {s}://a%00b/""".split()]
ODD_ENCODINGS = ["a\0b", " ", LONG, *"undefined rot13 utf-16 ../../x klingon gbk UTF8 big5".split()]
ODD_FLAGS = [" 1", "\0", LONG, *"2 -1 01 maybe TRUE oN １ ² null 0.0 f [] no".split()]
ODD = {"_flag": ODD_FLAGS, "_whole": ODD_NUMBERS, "_number": ODD_NUMBERS,
       "_text": ODD_TEXTS, "_words": ODD_TEXTS, "_encoding": ODD_ENCODINGS, "_path": ODD_PATHS,
       "choose": ODD_TEXTS + ["INFO", "info ", "QRLOGIN", "Online"],
       "_url": [url.replace("{s}", "http").replace("{S}", "HTTPS") for url in ODD_URLS],
       "_bridge_url": [url.replace("{s}", scheme).replace("{S}", scheme.upper())
                       for url, scheme in zip(ODD_URLS, itertools.cycle(["ws", "http"]))]}
CALLERS_ROWS = [row for row in openqq.SETTINGS.values() if row.caller]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A controller, and what lies in the tmpdir for ODD_PATHS."""
    program = Program(tmp_path_factory.mktemp("odd"), "controller").ready()
    mine = [put(program.tmpdir + "/" + name, "mine") for name in ("file", "one")]
    os.mkdir(program.tmpdir + "/dir")
    os.mkfifo(program.tmpdir + "/fifo")
    os.symlink("file", program.tmpdir + "/link")
    os.link(program.tmpdir + "/one", program.tmpdir + "/twice")
    yield program
    assert program.stop() == 0
    assert [content(path) for path in mine] == [b"mine"] * 2
    assert not re.search("Traceback|fault of this program", program.log.text())


def told(program, path, **params):
    """(status, JSON) of a call with a JSON body, which can hold what no query can."""
    status, _, body = request(program.base, "/openqq/" + path, "POST", json.dumps(params),
                              JSON_TYPE)
    return status, json.loads(body)


def sorted_out(row, program):
    """(values that start_client takes, those that it does not); nothing is started for that."""
    taken, refused = [], []
    for value in ODD[row.read.__name__]:
        value = value.replace("{tmpdir}", program.tmpdir)
        try:
            given = openqq.check_params({row.name: value})
            openqq.check_paths(given, program.tmpdir, "mojo_webqq_{}_odd.dat", ())
            taken.append(value)
        except openqq.NotAllowed as error:
            assert error.status.startswith(row.name) and "not allowed" in error.status
            assert len(error.status) < 400
            refused.append(value)
    return taken, refused


def test_a_hostile_value_of_each_kind_is_refused_with_400_and_the_settings_name(odd):
    rows = {row.read.__name__: row for row in CALLERS_ROWS if not row.secret}
    assert set(rows) == set(ODD)
    for row in rows.values():
        for value in sorted_out(row, odd)[1]:
            status, answer = told(odd, "start_client", client="odd", **{row.name: value})
            if {"\0", "\ud800"} & set(value):  # no parameter holds that
                assert (status, answer["code"]) == (400, 400), answer
            else:
                assert (status, answer["code"], row.name in answer["status"]) == (400, 6, True)
    for row in [row for row in CALLERS_ROWS if "url" in row.read.__name__]:
        for value in "http://h:65536/", "http://h:0/x", "http://a,http://b", "http://a/;HTTP://b":
            with pytest.raises(openqq.NotAllowed, match="must (be one URL|have a port)"):
                openqq.check_params({row.name: value})
    assert not odd.call("check_client")["client"]


def test_no_hostile_value_is_taken_that_later_fails(odd):
    taken = {row.name: sorted_out(row, odd)[0] for row in CALLERS_ROWS if row.name != "login_type"}
    assert sum(map(len, taken.values())) > 300
    paths = ["cookie_path", "log_path", "state_path", "qrcode_path", "pid_path"]
    others = {"is_init_friend": "1", "qrcode_count_max": "9", **dict.fromkeys((
        "onebot_api", "milky_api", "onebot_login", "onebot_login_api", "link", "ilink_api",
        "ilink_cdn"), "")}

    def live(number):
        """A client with the number-th value of each setting."""
        name, own = f"odd{number}", {path: f"{odd.tmpdir}/{path}{number}" for path in paths}
        given = {**{key: values[number % len(values)] for key, values in taken.items() if values},
                 **own, **others}
        status, answer = told(odd, "start_client", client=name, **given)
        assert (status, answer["code"]) == (200, 0), (answer, given)
        assert odd.call("/local/login", client=name)["code"] == 0, given
        row = odd.state(name)
        assert (row["state"], row["restarts"], row.get("error")) == ("running", 0, None), given
        sent = odd.call("send_friend_message", client=name, name="小冰", content="hello")
        assert sent["code"] == 0, (sent, given)
        assert not re.search(rb"Traceback|fault of this program", content(own["log_path"]))

    count = max(len(values) for name, values in taken.items() if name not in (*others, *paths))
    with concurrent.futures.ThreadPoolExecutor(4) as crowd:
        assert list(crowd.map(live, range(count))) == [None] * count
    at_once(count, lambda number: odd.call("delete_client", client=f"odd{number}"))
    assert not [name for name in os.listdir(odd.tmpdir) if name.startswith("mojo_webqq_cookie")]


def test_a_bridges_url_that_is_taken_is_waited_for_in_words(odd):
    def live(url):
        name = "b" + hashlib.sha1(url.encode()).hexdigest()
        assert told(odd, "start_client", client=name, onebot_api=url)[1]["code"] == 0, url
        row = eventually(lambda: odd.state(name).get("error") and odd.state(name))
        assert row and (row["state"], row["restarts"]) == ("scaning", 0), (url, row)
        assert "fault" not in row["error"]
        odd.call("delete_client", client=name)

    with concurrent.futures.ThreadPoolExecutor(4) as crowd:
        assert len(list(crowd.map(live, sorted_out(openqq.SETTINGS["onebot_api"], odd)[0]))) > 5


def test_a_token_in_a_bridges_url_is_taken_out_of_it():
    for text, url, token in [
            ("HTTP://h/x?a=1&access_token=S%2B3+c&b=2#f", "HTTP://h/x?a=1&b=2#f", "S+3 c"),
            ("http://h?access_token=one&access_token=two", "http://h", "two"),
            ("http://h/?my_access_token=x", "http://h/?my_access_token=x", ""),
            ("http://h/#?access_token=x", "http://h/#?access_token=x", "")]:
        wanted = {"onebot_api": url, **({"onebot_token": token} if token else {})}
        assert openqq.parse_flags("client", ["--onebot-api", text]) == wanted
        assert openqq.from_environment({"MOJO_WEBQQ_ONEBOT_API": text}, "MOJO_WEBQQ_") == wanted
        assert openqq.account_settings({"onebot_api": text}) == wanted
        found = openqq.Settings("client", {"onebot_api": text}, {}, "MOJO_WEBQQ_")
        assert (found.onebot_api.lower(), found.onebot_token) == (url.lower(), token)
        # A token in a post_api is its own affair; one that is given besides wins.
        assert openqq.tokens_apart({"post_api": text}) == {"post_api": text}
        assert openqq.check_params({"onebot_api": text, "onebot-token": "mine"}) == {
            "onebot_api": url, "onebot_token": "mine"}


def test_the_plugins_name_is_stronger_than_the_plain_one_and_strangers_are_let_be():
    environ = {"MOJO_WEBQQ_POST_API": "http://a/", "MOJO_WEBQQ_PLUGIN_OPENQQ_POST_API": "http://b/",
               "MOJO_WEBQQ_NOTHING_KNOWN": "1", "MOJO_WEBQQ_LOG_LEVEL": "", "LOG_LEVEL": "fatal",
               "MOJO_WEIXIN_LOG_LEVEL": "fatal"}
    found = openqq.Settings("client", {}, environ, "MOJO_WEBQQ_")
    assert (found.post_api, found.log_level) == ("http://b/", "info")
    given = openqq.Settings("client", {"post_api": "http://c/"}, environ, "MOJO_WEBQQ_")
    assert given.post_api == "http://c/"


def begin_openqq(words, env, **how):
    """Python, with nothing of ours in its environment but what is given."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("MOJO_", "OPENQQ_"))}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen([sys.executable, *words], env={**environment, **env},
                            stdin=subprocess.DEVNULL, **how)


def ended(process):
    out, err = process.communicate(timeout=WAIT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


CALLS = [  # words, what the environment says, exit status, what is said
    ("--version", {}, 0, rf"OpenQQ {re.escape(openqq.VERSION)}\n\Z"),
    ("--help", {}, 0, re.escape(openqq.USAGE) + r"\Z"),
    ("", {}, 2, "usage: python openqq.py controller"),
    ("client --log-level", {}, 2, "--log-level needs a value"),
    ("client alice", {}, 2, "alice .*--help"),
    ("controller", {"MOJO_WEBQQ_PORT": "http"}, 2, "port 'http'"),
    ("client --account ../x", {}, 2, "name not allowed"),
    ("client --state-path /dev/null", {}, 2, "state_path .* not be a device"),
    ("client --onebot-api gopher://h/?access_token=S3C", {}, 2,
     r"\A(?!(.|\n)*S3C)(.|\n)*onebot_api"),
    ("client --port 0 --log-path {tmp}/file/x.log", {}, 1, "openqq: log_path .*cannot be used"),
    ("controller --port 0 --tmpdir {tmp}/own --template-path {tmp}/file/x.py", {}, 1,
     "openqq: the template .* cannot be written"),
    ("client --port 0 --tmpdir {tmp}/file/x", {}, 1, "openqq: .*{tmp}/file/x.*--tmpdir"),
    ("controller --port 0 --world {tmp}/file", {}, 1, "world file .*cannot be read"),
    ("client --port 0 --host 192.0.2.1", {}, 1,
     "openqq: cannot listen on 192.0.2.1 .*--host or --port"),
]


def test_a_call_that_starts_nothing_says_why_with_its_exit_status(tmp_path):
    """0 and stdout for what was asked for; 2 for a wrong call; 1 and one line for what cannot be
    had."""
    def run(case):
        words = openqq.python_words(*case[0].replace("{tmp}", str(tmp_path)).split())
        return ended(begin_openqq(words, {"TMPDIR": str(tmp_path), **case[1]}, encoding="utf-8"))

    put(tmp_path / "file", "")
    with concurrent.futures.ThreadPoolExecutor(4) as crowd:
        results = list(crowd.map(run, CALLS))
    for done, (words, _, status, said) in zip(results, CALLS):
        assert (done.returncode, "Traceback" in done.stderr) == (status, False), (words, done)
        text, other = (done.stderr, done.stdout) if status else (done.stdout, done.stderr)
        if status == 1:
            (text,) = [line for line in text.splitlines() if "[info]" not in line]
        assert other == "" and re.search(said.replace("{tmp}", str(tmp_path)), text), (words, done)


# ------------------------------------------------------------------------------------------------
# As a library
# ------------------------------------------------------------------------------------------------

class Script(Program):
    """A script that imports openqq, run as a process in its own directory."""

    def __init__(self, tmpdir, text):
        self.tmpdir, self.port = str(tmpdir), 0
        path = put(tmpdir / "script.py", "import openqq\n" + text.replace("{tmpdir}", self.tmpdir))
        self.process = begin_openqq([path], {"PYTHONPATH": HERE, "PYTHONUNBUFFERED": "1",
                                             "PYTHONIOENCODING": "utf-8"})
        self.pid = self.process.pid
        self.log, self.out = Log(self.process.stderr), Log(self.process.stdout)


@pytest.fixture
def script(tmp_path):
    """script(text) runs it until the test's end; `{tmpdir}` in it is a directory of its own."""
    with contextlib.ExitStack() as scripts:
        def begin(text):
            program = Script(tmp_path, text)
            scripts.callback(program.stop)
            return program

        yield begin


def test_the_documents_controller_script_works_in_python(script):
    controller = script("""
controller = openqq.Controller(
    listen=[{"host": "127.0.0.1", "port": 0}, {"host": "127.0.0.1", "port": 0}],
    backend_start_port=5000, post_api=None, poll_api=None, poll_interval=5, max_clients=1,
    tmpdir="{tmpdir}", check_interval=5, log_level="debug")
controller.run()
print("ended")
""").ready()
    second = controller.log.wait(r"Listening at (http://127\.0\.0\.1:\d+)", 2).group(1)
    assert second != controller.base and "0.0.0.0" not in controller.log.text()
    controller.login("a1")
    assert call(second, "check_client")["client"][0]["account"] == "a1"
    status, _, body = request(controller.base, "/openqq/start_client?client=a2")
    assert (status, json.loads(body)["code"], json.loads(body)["status"]) == (
        200, 5, "max clients exceed")
    controller.call("stop_client", client="a1")
    assert controller.call("start_client", client="a2")["code"] == 0
    assert controller.stop() == 0
    controller.out.wait("^ended$")


BOT = """
client = openqq.Client(account="bot", tmpdir="{tmpdir}", login_type="login", pwd="x")
client.load(["ShowMsg", "UploadQRcode"])
client.load("Openqq", data={"listen": [{"host": "127.0.0.1", "port": 0}],
                            "check_event_list_max_size": 3}, call_on_load=True)
client.load("+shout", data={"loud": 2})

def login(client, fresh):
    print("login", client.account, fresh)
    for friend in client.roster.search("friend", {"name": "小灰"}):
        print("sent", client.send_friend_message(friend, "我来了").result(10).code)

def receive(client, message):
    print("got", message.type, message.sender, message.content, message.receiver,
          message.post_type, message.id.isdigit())
    message.reply("你说：" + message.content)

client.on("state_change", lambda client, old, new: print("state", client.account, old, new))
client.on("login", login)
client.on("receive_message", lambda client, message: 1 / 0)
client.on("receive_message", receive)
client.on("send_message", lambda client, message: print(
    "told", message.type, message.content, message.info, getattr(message, "group", None)))
print("ended", client.run())
"""

SHOUT = """
PRIORITY = 50

def call(client, data):
    client.on("new_friend", lambda client, friend: print("SHOUT" * data["loud"], friend.name))
"""


def test_a_bot_hears_answers_and_sends_by_callbacks(script, tmp_path):
    (tmp_path / "shout.py").write_text(SHOUT)
    bot = script(BOT).ready()
    for line in ("state bot updating running", "login bot 0",  # not by a scan
                 "sent 0", "told friend_message 我来了 发送正常 None"):
        bot.out.wait(f"^{line}$")
    plugins = json.loads(content(bot.path("state_bot.json")))["plugin"]
    assert {row["name"]: (row["priority"], row["call_on_load"], row["auto_call"])
            for row in plugins} == {
        "Mojo::Webqq::Plugin::Openqq": (98, 1, None), "Mojo::Webqq::Plugin::ShowMsg": (100, 0, 1),
        "Mojo::Webqq::Plugin::UploadQRcode": (0, 0, 1), "+shout": (50, 0, 1)}
    bot.call("/local/say", client="bot", content="群", type="group_message", to="OpenQQ",
             **{"from": "小灰"})
    bot.out.wait("^got group_message 小灰 群 bot receive_message True$")
    bot.out.wait("^told group_message 你说：群 发送正常 OpenQQ$")
    bot.call("/local/change", do="add", what="person", uid="321", name="新人")
    bot.call("/local/change", do="add", what="friend", uid="321", **{"in": "bot"})
    bot.out.wait("^SHOUTSHOUT 新人$")
    assert len(bot.call("check_event")) == 3, "check_event_list_max_size came by data"
    bot.log.wait("a callback of receive_message failed")  # and the next was called all the same
    bot.log.wait("ZeroDivisionError")
    assert bot.stop() == 0
    bot.out.wait("^ended 0$")
    assert "fault of this program" not in bot.log.text()


MISTAKES = [  # a line of a script, what is said of it; the last is 003's own script, without
    # call_on_load, when the port is taken
    ('client.load("Nope")', "there is no plugin Nope"),
    ('client.load("+nope_nope")', r"plugin \+nope_nope cannot be loaded"),
    ('openqq.Controller(listen=[], port="x")', "port 'x' must be a whole number"),
    ('client.load("Openqq", data={"nope": 1}, call_on_load=True)', "nope is not a setting"),
    ('client.load("Openqq", data={"listen": [{"host": "127.0.0.1", "port": %d}]}); client.run()',
     "cannot listen on 127.0.0.1 port %d")]


def test_a_mistake_in_a_script_is_named(script):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        lines = [line.replace("%d", str(port)) for line, _ in MISTAKES]
        program = script('client = openqq.Client(account="a", tmpdir="{tmpdir}")\n' + "".join(
                             f"try: {line}\nexcept Exception as error: print(repr(error))\n"
                             for line in lines[:-1]) + lines[-1])
        assert program.process.wait(WAIT) == 1
        for _, said in MISTAKES[:-1]:
            program.out.wait(said)
        program.log.wait(MISTAKES[-1][1].replace("%d", str(port)))
        assert not os.path.exists(program.path("pid_a.pid"))


# ------------------------------------------------------------------------------------------------
# QR codes
# ------------------------------------------------------------------------------------------------

ZBAR = shutil.which("zbarimg")  # what reads them here is not ours
decoder_needed = pytest.mark.skipif(not ZBAR, reason="needs zbarimg (Debian: zbar-tools)")

# Version -> bytes that it holds (ISO/IEC 18004:2015, table 7, column M, byte mode), and the modules
# of the symbol that is drawn for so many: each change of the count's width, of block structure, and
# the ends. They were compared with the standard's tables and figures, module by module.
QR_VERSIONS = {
    1: (14, "31c40a1c4a19"), 2: (26, "131e45b35c16"), 4: (62, "3b261a43aa77"),
    6: (106, "6eec3e04d321"), 7: (122, "e5c4beed6234"), 9: (180, "6d8dab5c9531"),
    10: (213, "ee1f89f884d0"), 14: (362, "ad7a94465e79"), 21: (711, "e608949abce8"),
    27: (1125, "6a51a585dcb5"), 32: (1538, "e32a0ba8bbc0"), 40: (2331, "98b76079b884")}

QR_TEXTS = ["http://127.0.0.1:4000/local/scan?client=alice&ticket=3f2a91c07b",
            "https://example.org/a%20b?x=1&y=%E4%B8%AD#top", "http://127.0.0.1:4000/扫码?名=张三",
            "é ü ß Ångström", "登录😀🀄", "01234567", "HTTP://EXAMPLE.ORG/A", "\0tab\tline\nend\n", " "]


def read_file_by_zbar(data):
    """The text of the QR code in a PNG or PGM file."""
    # Without -Sbinary zbar guesses a charset and appends a newline; "-" is standard input.
    words = [ZBAR, "--nodbus", "--raw", "-q", "-Sdisable", "-Sqrcode.enable", "-Sbinary", "-"]
    return subprocess.run(words, input=data, stdout=subprocess.PIPE, check=True).stdout.decode()


def filler(version):
    """A text that fills a version to its edge."""
    size = QR_VERSIONS[version][0]
    return (f"a{version}." * size)[:size]


@decoder_needed
def test_every_text_is_read_back_from_its_qr_code():
    for text in [*QR_TEXTS, filler(1), filler(10), filler(40)]:
        picture = openqq.qr_png(openqq.qr_matrix(text))
        assert read_file_by_zbar(picture) == text


def test_qr_codes_are_drawn_as_the_standard_says_in_the_smallest_version():
    """Each module eight pixels wide, with a border of four of them."""
    for version, (_, wanted) in QR_VERSIONS.items():
        rows = openqq.qr_matrix(filler(version))
        assert (hashlib.sha256(b"".join(rows)).hexdigest()[:12], len(rows)) == (
            wanted, 17 + 4 * version)
        side = 8 * (len(rows) + 8)
        assert struct.unpack(">II", openqq.qr_png(rows)[16:24]) == (side, side)
        if version < 20:
            assert len(openqq.qr_matrix(filler(version) + "x")) == 17 + 4 * (version + 1)


def test_a_text_that_fits_into_no_qr_code_is_refused_with_the_remedy():
    for text, said in (("登" * 778, "2334 bytes .* shorten it to 2331 bytes"),
                       ("\ud83d", "surrogates not allowed")):
        with pytest.raises(ValueError, match=said):
            openqq.qr_matrix(text)


@decoder_needed
def test_a_qr_code_on_a_terminal_scans_on_any_background():
    """As a terminal shows it: each line is two rows of modules."""
    rows = []
    for line in openqq.qr_text(openqq.qr_matrix(QR_TEXTS[0])).splitlines():
        blocks = re.fullmatch("\x1b\\[30;47m([ ▀▄█]*)\x1b\\[0m", line).group(1)
        rows += [[block in filled for block in blocks] for filled in ("▀█", "▄█")]
    width = len(rows[0]) + 20
    for around in b"\x00", b"\xff":
        grey = [b"".join(b"\xff\x00"[dark:dark + 1] * 6 for dark in row) for row in rows]
        lines = [around * 60 + line + around * 60 for line in grey for _ in range(6)]
        margin = [around * 6 * width] * 60
        picture = b"P5 %d %d 255\n" % (6 * width, len(lines) + 120)
        assert read_file_by_zbar(picture + b"".join(margin + lines + margin)) == QR_TEXTS[0]


@decoder_needed
def test_a_clients_picture_holds_its_scan_url(tower):
    tower.call("start_client", client="phone")
    tower.posted("phone", is_qrcode)
    picture, base = content(tower.program.path("qrcode_phone.jpg")), tower.program.base
    url = read_file_by_zbar(picture)
    assert url.startswith(f"{base}/local/scan?client=phone&ticket=")
    _, fields, body = request(base, "/openqq/get_qrcode?client=phone")
    assert (fields["content-type"], body) == ("image/png", picture)
    status, _, body = request(base, url[len(base):])
    assert status == 200 and f'value="{query_of(url)["ticket"][0]}"' in body.decode()
    tower.call("delete_client", client="phone")


class Terminal(Program):
    """The program with a terminal as its stderr."""

    def __init__(self, tmpdir, *words):
        self.tmpdir, self.port = str(tmpdir), 0
        master, slave = pty.openpty()
        self.process = begin_openqq(
            ["-S", *openqq.python_words(*words, "--tmpdir", self.tmpdir, "--port", "0")],
            {"OPENQQ_PYTHON": sys.executable}, stderr=slave)
        os.close(slave)
        self.pid, self.log = self.process.pid, Log(self._lines(master))

    @staticmethod
    def _lines(master):
        with open(master, "rb") as stream, contextlib.suppress(OSError):
            yield from stream  # a terminal whose other side is closed says EIO


def test_on_a_terminal_the_qr_code_is_drawn_and_the_levels_have_colours(tmp_path):
    for setting, begins in ("0", "\x1b[32m[eye]"), ("1", "[eye]"):
        terminal = Terminal(tmp_path / setting, "client", "--account", "eye", "--disable-color",
                            setting)
        try:
            terminal.ready()
            url = terminal.log.wait(r"(http://[^)]*/local/scan\?[^)]*)\)").group(1)
            drawn = openqq.qr_text(openqq.qr_matrix(url)).replace("\n", "\r\n")
            terminal.log.wait("\x1b\\[30;47m", drawn.count("\n"))
            assert drawn.rstrip() in terminal.log.text()
            terminal.call("/local/login", client="eye")
            terminal.call("send_friend_message", name="小灰", content="绿")
            assert terminal.log.wait("^.*我->小灰 : 绿").group().startswith(begins)
        finally:
            assert terminal.stop() == 0


def test_without_a_terminal_neither_qr_code_nor_colour_is_written(beater):
    client, _ = beater
    assert not re.search("\x1b|[▀▄█]", client.log.text() + client.out.text())


# ------------------------------------------------------------------------------------------------
# The house
# ------------------------------------------------------------------------------------------------

with open(FILE, encoding="utf-8") as source:
    SOURCE = source.read()
LINES = SOURCE.split("\n")
TREE = ast.parse(SOURCE)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BANNERS = [(number, LINES[number - 1][2:]) for number in range(2, len(LINES))  # line, title
           if LINES[number - 2] == LINES[number] == "# " + "-" * 96]


def test_the_list_of_sections_in_the_docstring_is_that_of_the_banners():
    listed = re.findall(r"^ {4,5}([0-9ABCP]+ {2}\S.*)$", ast.get_docstring(TREE), re.M)
    assert [row.replace("  ", ". ").lower() for row in listed] == [
        title.lower() for _, title in BANNERS]
    assert len(listed) == 20


def test_a_section_uses_only_what_stands_above_it():
    section = lambda line: sum(start <= line for start, _ in BANNERS)  # noqa: E731
    home = {}
    for node in TREE.body:
        for name in [node.name] if isinstance(node, DEFINITIONS) else [
                leaf.id for leaf in ast.walk(node)
                if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)]:
            home.setdefault(name, section(node.lineno))
    assert len(home) > 200 and {"Client", "SETTINGS", "qr_png"} <= set(home)
    parts = [part for node in ast.walk(TREE) for part in (
        getattr(node, "annotation", None), getattr(node, "returns", None)) if part]
    uses = [(leaf.id, leaf.lineno) for part in parts for leaf in ast.walk(part)
            if isinstance(leaf, ast.Name)]
    tables = symtable.symtable(SOURCE, FILE, "exec").get_children()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        uses += [(symbol.get_name(), table.get_lineno()) for symbol in table.get_symbols()
                 if symbol.is_global() and symbol.is_referenced()]
    assert len(uses) > 2000
    assert not [use for use in uses if home.get(use[0], 0) > section(use[1])]


def test_every_public_class_and_function_has_a_docstring():
    nodes = [node for node in TREE.body if isinstance(node, DEFINITIONS)]
    assert len(nodes) > 200 and ast.get_docstring(TREE)
    assert not [node.name for node in nodes if not re.match("_", node.name)
                and not ast.get_docstring(node)]


def test_no_function_is_longer_than_60_lines_and_no_line_wider_than_100_columns():
    long = [f"line {node.lineno}: {node.name}" for node in ast.walk(TREE)
            if isinstance(node, DEFINITIONS[:2]) and node.end_lineno - node.lineno + 1 > 60]
    wide = [number for number, line in enumerate(LINES, 1) if len(line) > 100]
    assert (long, wide) == ([], [])
    assert not [number for number, line in enumerate(LINES, 1) if line != line.rstrip()]


def test_only_the_standard_library_is_imported():
    names = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import)
             for alias in node.names}
    names |= {node.module for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    assert {"json", "selectors", "urllib.request"} <= names
    wanted = ", ".join(names - {"msvcrt", "fcntl", "resource"})  # of Windows, and of all others
    subprocess.run([sys.executable, "-I", "-S", "-c", "import " + wanted], check=True)


WATCHED = """
import sys, threading
sys.path[0] = {here!r}
locks, real_lock = [], threading.RLock

class Lock(threading._PyRLock):
    def __init__(self):
        super().__init__()
        locks.append(self)

    def acquire(self, *how):
        if not self._is_owned():
            complain("a second lock")
        return super().acquire(*how)

    __enter__ = acquire

def complain(what):
    if any(lock._is_owned() for lock in locks):
        frame = sys._getframe(2)
        sys.stderr.write(f"UNDER A LOCK: {{what}} {{frame.f_code.co_name}} {{frame.f_lineno}}\\n")

def watch(owner, name):
    real = getattr(owner, name)
    def watched(*args, **named):
        if owner is not socket.socket or args[0].gettimeout() != 0:
            complain(name)
        return real(*args, **named)
    setattr(owner, name, watched)

threading.RLock = lambda: (Lock if type(sys._getframe(1).f_locals.get("self")).__name__ in (
    "Client", "Controller", "LocalNetwork") else real_lock)()
import socket, subprocess, time, openqq
for owner, names in ((socket.socket, "connect recv recv_into send sendall"),
                     (subprocess.Popen, "__init__ wait"), (time, "sleep")):
    for name in names.split():
        watch(owner, name)
openqq.command_line()
"""


def test_under_the_lock_of_an_account_or_a_controller_nothing_blocks(start, receive, tmp_path):
    script = put(tmp_path / "watched.py", WATCHED.format(here=HERE))
    python = put(tmp_path / "watching", f"""#!/bin/sh
while [ "$1" != controller ] && [ "$1" != --client ]; do shift; done
exec '{sys.executable}' -X utf8 '{script}' "$@"
""")
    os.chmod(python, 0o700)
    receiver = receive(lambda event: (200, {}, {"reply": "pong"})
                       if event.get("content") == "ping" else None)
    with contextlib.closing(Bridge()) as bridge:
        controller = start("controller", "--post-api", receiver.url, python=python)
        controller.login("alice", post_api=receiver.url)
        controller.call("start_client", client="qq", onebot_api=bridge.ws, send_interval=0)
        assert eventually(lambda: controller.state("qq")["state"] == "running")
        bridge.say_private(20001, "pong")
        for name, friend in ("alice", {"name": "小灰"}), ("qq", {"uid": "20001"}):
            controller.call("get_group_info", client=name)
            assert controller.call("send_friend_message", client=name, content="ping",
                                   **friend)["code"] == 0
            receiver.next(lambda event: event.get("content") == "pong"
                          and event["class"] == "send")
        os.kill(controller.state("alice")["pid"], signal.SIGKILL)
        assert eventually(lambda: controller.state("alice")["restarts"] == 1)
        controller.call("relogin", client="alice")
        assert controller.call("update_client", client="qq", msg_ttl=5)["code"] == 0
        controller.call("stop_client", client="qq")
        controller.call("delete_client", client="alice")
        assert controller.stop() == 0
        assert "UNDER A LOCK" not in controller.log.text(), controller.log.text()


# ------------------------------------------------------------------------------------------------
# Controller, processes and files
# ------------------------------------------------------------------------------------------------

def at_once(number, function):
    """What function(0) … function(number - 1) return, all called in the same moment."""
    gate = threading.Barrier(number)

    def work(index):
        gate.wait(WAIT)
        return function(index)

    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        return list(pool.map(work, range(number)))


def user(program, name):
    """Who an account is once it runs; its id is another one after each scan."""
    assert program.call("/local/login", client=name)["code"] == 0
    return program.call("get_user_info", client=name)


def is_login(event):
    return event.get("event") == "login"


def is_qrcode(event):
    return event.get("event") == "input_qrcode"


def all_gone(log, seconds=openqq.ORPHAN_SECONDS):
    """Wait for the end of every process that writes to a log: then its pipe ends."""
    with log._changed:
        return log._changed.wait_for(lambda: log._ended, seconds)


def left_files(program, name=""):
    """Names with `name` of what lies in its tmpdir, without the prefix that all of them must have;
    what is just being written, and renamed in a moment, is not counted."""
    names = [name for name in os.listdir(program.tmpdir) if not name.startswith(".openqq_")]
    assert all(name.startswith("mojo_webqq_") for name in names), names
    return {each[len("mojo_webqq_"):] for each in names if name in each}


def run_quickly(*words, **how):
    """The program, run to its end; with returncode, stdout, stderr."""
    return ended(begin_openqq(["-S", *openqq.python_words(*words)],
                              {"OPENQQ_PYTHON": sys.executable}, encoding="utf-8", **how))


def content(path):
    with open(str(path), "rb") as file:
        return file.read()


def put(path, data):
    with open(str(path), "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())
    return str(path)


def reserve():
    """A port at which nobody listens, and nobody else will: kept by a socket."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    return sock


def hmac_sha1(secret, body):
    return hmac.new(secret.encode(), body, "sha1").hexdigest()


def listed_names(controller):
    return [row["account"] for row in controller.call("check_client")["client"]]


def test_many_starts_in_the_same_moment_give_as_many_clients_and_one_term_ends_all(start, tmp_path):
    for turn in range(much(1, 20)):
        controller, number = start("controller", tmpdir=tmp_path / str(turn)), much(12, 100)
        started = at_once(number, lambda index: controller.call(
            "start_client", client=f"c{index:02}", login_type="login", pwd="x"))
        assert eventually(lambda: {row["state"] for row in controller.call(
            "check_client")["client"]} == {"running"})
        assert [(row["account"], row["pid"], row["port"]) for row in controller.call(
            "check_client")["client"]] == [
                (f"c{index:02}", row["pid"], row["port"]) for index, row in enumerate(started)]
        assert len({row["pid"] for row in started}) == number
        for index, row in enumerate(started):
            direct = call(f"http://127.0.0.1:{row['port']}", "get_user_info")
            assert (row["code"], direct["account"]) == (0, f"c{index:02}")
        assert controller.stop() == 0 and all_gone(controller.log)
        assert not re.search("KILL|Traceback", controller.log.text())


def test_a_client_that_lives_is_started_no_second_time_and_its_holder_is_named(pair):
    before, files = pair.state("alice"), left_files(pair)
    again = pair.call("start_client", client="alice", log_level="debug")
    assert (again["code"], again["status"], again["pid"], again["port"]) == (
        0, "client already exists", before["pid"], before["port"])
    done = run_quickly("client", "--account", "alice", "--tmpdir", pair.tmpdir, "--port", "0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(rf"\b{before['pid']}\b", done.stderr)
    assert before == pair.state("alice") and files <= left_files(pair)
    for api in "stop_client", "delete_client", "get_qrcode", "update_client":
        assert pair.call(api) == {"code": 1, "status": "client not found"}
        assert pair.call(api, client="nobody") == {"code": 1, "status": "client not exists"}


def test_deleted_client_leaves_nothing_and_must_be_scanned_again(house):
    """Also one that was stopped before, and one whose tmpdir is gone, or not yet there."""
    house.login("cora", msg_ttl="5", post_secret="S3CRET")
    who = user(house, "cora")
    deleted = house.call("delete_client", client="cora")
    assert (deleted["code"], deleted["client"], deleted["msg_ttl"]) == (0, "cora", "5")
    assert not left_files(house, "cora") and "cora" not in listed_names(house)
    assert "msg_ttl" not in house.call("start_client", client="cora")
    assert settings_of(house, "cora") == {"post_api": house.receiver.url + "?client=cora"}
    assert eventually(lambda: "qrcode_cora.jpg" in left_files(house))
    assert house.call("stop_client", client="cora")["code"] == 0
    assert not {"qrcode_cora.jpg", "pid_cora.pid"} & left_files(house)
    assert house.call("get_qrcode", client="cora")["status"] == "client not exists"
    house.login("cora")
    again = user(house, "cora")
    assert again["uid"] == who["uid"] and again["id"] != who["id"]
    house.call("stop_client", client="cora")
    assert house.call("delete_client", client="cora")["code"] == 0
    assert not left_files(house, "cora")
    own = os.path.join(house.tmpdir, "own")
    for path in own, own + "/not/yet":
        house.login("dora", tmpdir=path)
        shutil.rmtree(own)
        assert house.call("delete_client", client="dora")["code"] == 0
    assert "dora" not in listed_names(house)


# -- what a client was started with

def environment_of(pid):
    """The environment of the client whose process pid() tells, once it is a program of its own."""
    def read():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = dict(re.findall("([^=\0]+)=([^\0]*)", content(
                f"/proc/{pid()}/environ").decode()))
            return "OPENQQ_KEY" in found and found

    return eventually(read)


def settings_of(controller, name):
    """What the environment of a client's process says of the settings that tests give."""
    found = openqq.from_environment(
        environment_of(lambda: controller.state(name)["pid"]), "MOJO_WEBQQ_")
    return {key: value for key, value in found.items() if key in (
        "post_api", "post_secret", "msg_ttl", "pwd", "login_type", "post_event_list")}


def backend_of(controller):
    return json.loads(content(controller.path("controller_backend.dat")))


def test_a_stopped_client_comes_up_as_it_was_also_with_another_controller(start, receive):
    receiver, controller = receive(), start("controller")
    given = {"post_api": receiver.url, "msg_ttl": "5", "login_type": "login"}
    controller.login("alice", post_secret="S3CRET", pwd="S3CRET-pwd", **given)
    before, stopped = controller.state("alice"), controller.call("stop_client", client="alice")
    assert {"client": "alice", "code": 0, "status": "success", "msg_ttl": "5",
            "pid": before["pid"], "port": before["port"]}.items() <= stopped.items()
    state = json.loads(content(controller.path("state_alice.json")))
    assert (state["state"], state["previous_state"]) == ("stop", "running")
    assert controller.call("check_client", client="alice")["status"] == "client not exists"
    row = backend_of(controller)["alice"]
    assert row["run"] is False and row["given"] == given
    controller.process.kill()
    assert all_gone(controller.log, WAIT)
    controller = start("controller")
    assert controller.call("check_client") == {"client": [], "code": 0}
    answer = controller.call("start_client", client="alice")
    assert given.items() <= answer.items() and "S3CRET" not in json.dumps(answer)
    assert controller.call("/local/login", client="alice")["code"] == 0
    controller.call("/local/say", client="alice", content="again", **{"from": "小灰"})
    receiver.message("again")
    _, headers, body, _ = receiver.posts[-1]
    assert headers["X-Signature"] == "sha1=" + hmac_sha1("S3CRET", body)
    controller.call("stop_client", client="alice")
    controller.login("alice", post_secret="", msg_ttl="")  # what is empty is cleared
    assert not {"pwd", "msg_ttl"} & settings_of(controller, "alice").keys()
    assert b"S3CRET" not in content(controller.path("cookie_alice.dat"))


def test_what_holds_after_settings_are_given_anew():
    """The secrets of a bridge, or of its page, go with it; another one's are not told to it."""
    bridge = {"onebot_api": "ws://h", "onebot_token": "t"}
    page = {**bridge, "onebot_login_token": "u"}
    for former, given, wanted in [
            ({"msg_ttl": "5", "mode": "busy"}, {"msg_ttl": ""}, {"mode": "busy"}),
            ({"msg_ttl": "5", "post_secret": "s"}, {"msg_ttl": "6"},
             {"msg_ttl": "6", "post_secret": "s"}),
            ({"msg_ttl": "5"}, bridge, {"msg_ttl": "5", **bridge}),
            ({**page, "onebot_secret": "s", "msg_ttl": "5"},
             {"onebot_api": "ws://g", "onebot_secret": "r"},
             {"onebot_api": "ws://g", "onebot_secret": "r", "msg_ttl": "5"}),
            (bridge, {"onebot_api": "WS://h"}, bridge),
            (bridge, {**bridge, "onebot_api": "ws://g"}, {**bridge, "onebot_api": "ws://g"}),
            (bridge, {"onebot_api": ""}, {}),
            (page, {"onebot_login_api": "http://p"}, {**bridge, "onebot_login_api": "http://p"})]:
        assert openqq.renewed(former, given) == wanted, (former, given)


def test_a_token_within_a_bridges_url_works_and_no_other_bridge_hears_it(closing, start):
    """When the client starts again it comes from the cookie's file, and from nowhere else."""
    bridge, other = closing(Bridge(token="S3CRET")), closing(Bridge())
    controller = start("controller", "--http-debug", "1", "--log-level", "debug")
    me = Bridged(controller, "ws", bridge, onebot_token="",
                 onebot_api=bridge.ws + "/?access_token=S3CRET")
    answers = [me.started, me.running().state(), me.call("stop_client"), me.call("start_client")]
    assert me.started["onebot_api"] == bridge.ws + "/" and me.running()
    for name in left_files(controller):
        assert (b"S3CRET" in content(controller.path(name))) is (name == "cookie_ws.dat"), name
    me.call("stop_client")
    answers.append(me.call("start_client", onebot_api=other.ws))
    me.bridge = other
    me.running()
    assert b"S3CRET" not in content(controller.path("cookie_ws.dat"))
    assert "S3CRET" not in controller.log.text() + json.dumps(answers)
    assert not bridge.faults + other.faults


def test_the_accounts_file_wins_over_what_is_remembered(start, tmp_path):
    """For those that are resumed too; what it does not name stays, null clears. What is wrong
    with one account is said, and keeps none of the others away."""
    accounts = put(tmp_path / "accounts.json", json.dumps({
        "alice": {"msg_ttl": 7, "mode": None, "post_secret": None}, "bob": {"msg_ttl": 8},
        "../x": {}, "carol": ["post_api"], "dave": {"nonsense": 1},
        "erin": {"login_type": "login", "pwd": "x", "numeric_ids": True, "post_api": None,
                 "post_event_list": ["login", "stop"]}}))
    first = start("controller", tmpdir=tmp_path / "t")
    for name in "alice", "bob":
        first.login(name, msg_ttl="5", mode="busy", post_event_list="login", post_secret="S3")
    first.call("stop_client", client="bob")
    first.stop()
    second = start("controller", "--accounts", accounts, tmpdir=tmp_path / "t")
    for name, ttl, mode in ("alice", "7", "online"), ("bob", "8", "busy"):
        assert second.call("/local/login", client=name)["code"] == 0
        assert settings_of(second, name) == {"msg_ttl": ttl, "post_event_list": "login"}
        assert second.state(name)["mode"] == mode
        assert (b"S3" in content(second.path(f"cookie_{name}.dat"))) is (name == "bob")
    for wrong in r"\.\./x", "carol", "dave.*nonsense":
        second.log.wait(r"\[error\] accounts file: .*" + wrong)
    assert isinstance(user(second, "erin")["uid"], int)
    assert listed_names(second) == ["alice", "bob", "erin"]


def test_a_memory_that_is_no_good_stops_no_start(start, tmp_path):
    """Nor does an accounts file that cannot be read."""
    path, good = tmp_path / "mojo_webqq_controller_backend.dat", {"msg_ttl": "5"}
    put(path, json.dumps({
        "alice": {"run": False, "port": 0, "given": {**good, "mode": "asleep", "gone": 1,
                                                     "max_clients": "3", "post_api": ["x"]}},
        "bob": {"run": False, "port": 0, "given": "?"}, "frank": 1,
        "carol": {"port": 0, "given": good}, "../x": {"run": True, "port": 5000, "given": {}},
        "grace": {"run": True, "port": 99999999, "given": {}},
        "judy": {"run": True, "port": None, "given": []}}))
    for accounts in "[]", "{":
        controller = start("controller", "--accounts", put(tmp_path / "accounts", accounts))
        controller.log.wait("accounts file .* cannot be used: .*must look like")
        for name, wanted in ("alice", good), ("bob", {}), ("carol", good):
            assert controller.call("start_client", client=name)["code"] == 0
            assert accounts == "{" or settings_of(controller, name) == wanted, name
        assert not {"frank", "../x"} & set(listed_names(controller))
        assert controller.stop() == 0 and backend_of(controller)["bob"]["run"]
        assert "fault of this program" not in controller.log.text()
        put(path, "[]")


# -- update_client

def test_settings_of_a_running_client_are_changed_without_a_scan_and_outlive_a_kill(start, receive):
    first, second, controller = receive(), receive(), start("controller")
    before = controller.login("alice", post_api=first.url, post_secret="S3CRET", msg_ttl="5",
                              mode="busy")
    who = user(controller, "alice")
    answer = controller.call("update_client", client="alice", post_api=second.url, msg_ttl="")
    assert answer == {"account": "alice", "client": "alice", "code": 0, "port": before["port"],
                      "status": "success", "post_api": second.url, "mode": "busy",
                      "pid": controller.state("alice")["pid"]}
    for restarts in 0, 1:
        controller.call("/local/say", client="alice", content=str(restarts), **{"from": "小灰"})
        second.message(str(restarts))
        _, headers, body, _ = second.posts[-1]
        assert headers["X-Signature"] == "sha1=" + hmac_sha1("S3CRET", body)
        row = controller.state("alice")
        assert (row["state"], row["restarts"], row["port"]) == ("running", restarts, before["port"])
        assert user(controller, "alice")["id"] == who["id"] and row["pid"] != before["pid"]
        os.kill(row["pid"], signal.SIGKILL)
        assert second.next(is_login)["params"] == [0]
    assert backend_of(controller)["alice"]["given"] == {"post_api": second.url, "mode": "busy"}
    again = controller.call("update_client", client="alice", post_secret="")
    assert controller.call("/local/login", client="alice")["code"] == 0
    assert again["code"] == 0 and b"S3CRET" not in content(controller.path("cookie_alice.dat"))


def test_update_client_takes_all_or_nothing(house):
    before, status = house.login("emil", msg_ttl="5"), house.state("emil")
    for wrong in [{"mode": "asleep"}, {"port": "1"}, {"nonsense": "1"}, {"msg_ttl": "0"},
                  {"tmpdir": house.tmpdir}, {"log_path": house.tmpdir + "/x"},
                  {"cookie_path": ""}, {"state-path": "x"}, {"post_api": "http://a http://b"},
                  {"account": "bob"}, {"flavor": "weixin"}]:
        code, _, body = Face(house, "emil", controlled=True).raw(
            "update_client", "POST", post_secret="x", **wrong)
        answer = json.loads(body)
        assert (code, answer["code"]) == (400, 6) and next(iter(wrong)) in answer["status"], wrong
    for same in {}, {"msg_ttl": "5"}, {"msg_ttl": "05"}, {"mode": ""}:
        answer = house.call("update_client", client="emil", **same)
        assert (answer["code"], answer["pid"]) == (0, before["pid"]), same
    assert house.state("emil") == status
    house.call("stop_client", client="emil")
    assert house.call("update_client", client="emil", msg_ttl="6") == {
        "code": 1, "status": "client not exists"}
    again = house.call("start_client", client="emil")
    assert again["msg_ttl"] == "5"
    assert request(f"http://127.0.0.1:{again['port']}", "/openqq/update_client?msg_ttl=6")[::2] == (
        403, b"api not found")


def test_a_client_that_dies_of_its_new_settings_goes_on_with_those_of_before(workshop):
    """One that failed is put right by update_client."""
    edit_template(workshop, TEMPLATE.format(
        "assert os.environ.get('MOJO_WEBQQ_MSG_TTL') != '13', 'unlucky'", ""))
    before = workshop.login("anna", msg_ttl="5")
    answer = workshop.call("update_client", client="anna", msg_ttl="13", mode="busy")
    assert (answer["code"], answer["status"]) == (4, "client pid not ok")
    assert "unlucky" in answer["reason"]
    assert workshop.call("/local/login", client="anna")["code"] == 0
    row = workshop.state("anna")
    assert (row["state"], row["mode"], row["restarts"], row["port"]) == (
        "running", "online", 0, before["port"])
    assert backend_of(workshop)["anna"]["given"] == {"msg_ttl": "5"}
    assert workshop.call("start_client", client="bert", msg_ttl="13")["code"] == 0
    assert eventually(lambda: workshop.state("bert").get("failed"))
    assert workshop.call("update_client", client="bert", msg_ttl="5")["code"] == 0
    assert workshop.call("/local/login", client="bert")["code"] == 0
    assert "failed" not in workshop.state("bert")


def test_a_send_that_waits_gets_an_answer_when_settings_change(house):
    port = house.login("fred", send_interval="60")["port"]
    send = functools.partial(Face(house, "fred", controlled=True).raw, "send_friend_message",
                             name="小冰", content="x")
    assert send()[0] == 200
    waiting = concurrent.futures.ThreadPoolExecutor(1).submit(send)
    assert eventually(lambda: metrics_of(f"http://127.0.0.1:{port}")["openqq_send_queue_length"])
    assert house.call("update_client", client="fred", mode="busy")["code"] == 0
    status, _, body = waiting.result(WAIT)
    assert (status, json.loads(body)["code"]) in ((200, -3), (503, 300), (502, 7))


def test_calls_of_one_name_at_once_neither_block_nor_leave_two_processes(start):
    controller = start("controller")
    for number in range(much(2, 30)):
        calls = ["start_client", "stop_client", "update_client", "delete_client"] * 4
        random.Random(number).shuffle(calls)
        answers = at_once(len(calls), lambda number: controller.call(
            calls[number], client="alice", **({"msg_ttl": str(number + 1)}
                                              if calls[number][0] in "su" else {})))
        assert all(answer and answer["code"] in (0, 1) for answer in answers), answers
        controller.login("alice")
        row = controller.state("alice")
        assert (row["state"], row["restarts"]) == ("running", 0)
        alive = subprocess.check_output(["pgrep", "-P", str(controller.pid)])
        assert alive.split() == [str(row["pid"]).encode()]
    assert not re.search("Traceback|fault of this program", controller.log.text())


def test_no_port_left_is_code_2(start):
    with socket.socket() as sock:
        with contextlib.suppress(OSError):  # somebody else who has it is as good
            sock.bind(("127.0.0.1", 65535))
            sock.listen(1)
        controller = start("controller", "--backend-start-port", "65535")
        answer = controller.call("start_client", client="alice")
    assert (answer["code"], answer["status"]) == (2, "no available port")
    assert listed_names(controller) == []


def test_new_controller_waits_for_the_clients_of_a_killed_one(start):
    """A stopped process stands for one that takes long to end: it keeps its pid file."""
    controller = start("controller")
    pid = controller.login("alice")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        controller.process.kill()
        controller.process.wait(WAIT)
        second = start("controller")
        assert second.state("alice")["state"] != "running"
        assert "client alice started" not in second.log.text()
    finally:
        os.kill(pid, signal.SIGCONT)
    second.log.wait("client alice started")
    assert "running already" not in second.log.text()


@pytest.mark.parametrize("whose", ["controller", "client"])
def test_a_program_ends_cleanly_at_a_signal_and_resumes_unless_told_otherwise(start, whose):
    """INT without a terminal is none for a client; HUP is none if it was ignored, as by nohup.
    Also right after the first line; of two signals that came HUP would be seen first."""
    for number in signal.SIGTERM, signal.SIGHUP, signal.SIGINT:
        program = start(whose, *["--account", "alice"] * (whose == "client"))
        if whose == "controller" and number == signal.SIGTERM:
            program.call("start_client", client="alice")
        assert eventually(lambda: {"pid_alice.pid", "qrcode_alice.jpg"} <= left_files(program))
        if whose == "client" and number == signal.SIGINT:
            program.process.send_signal(number)
            program.log.wait(r"\[warn\] .*INT")
            assert program.call("get_client_info")["account"] == "alice"
            number = signal.SIGTERM
        assert program.stop(number) == 0 and all_gone(program.log)
        assert not [name for name in left_files(program) if "pid" in name or "qrcode" in name]
        assert json.loads(content(program.path("state_alice.json")))["state"] == "stop"
        assert "Traceback" not in program.log.text()
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = start(whose, *["--resume", "0"] * (whose == "controller"))
    finally:
        signal.signal(signal.SIGHUP, former)
    program.process.send_signal(signal.SIGHUP)
    assert program.stop() == 0
    assert not re.search("HUP|alice started", program.log.text())


def test_int_at_a_terminal_ends_a_client(tmp_path):
    master, slave = os.openpty()
    with subprocess.Popen(
            [sys.executable, *openqq.python_words("client", "--tmpdir", str(tmp_path), "--port=0")],
            stdin=slave, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as client:
        os.close(slave)
        try:
            Log(client.stderr).wait("等待手机QQ扫描二维码")
            client.send_signal(signal.SIGINT)
            assert client.wait(WAIT) == 0
        finally:
            client.kill()
            os.close(master)


# What a crash, a full disk or another program may leave in a file that only grows.
GARBAGE_LINES = (b'\n\x00\xff\xfe\n1\n"x"\nnull\n[]\n{}\n[[]]\n[[1,2]]\n[[1,"a"],[1,"a","b"]]\n'
                 b'{"key":"x","item":1}\n{"done":[]}\n{"key":3,"item":{"id":"x","event":{}}}\n'
                 b'{"key":4,"item":{"id":"x-1","in":"","eve')


def test_what_others_left_in_the_place_of_files_stops_nobody(start, receive, tmp_path):
    """Garbage in queues and journals; pid files without a living holder; Storable files of the
    Perl programs, which are set aside."""
    receiver = receive()
    pids = {"pid_a": b"\xff\xfe", "pid_b": b"2147483647\n", "pid_c": b"%d\n" % os.getpid(),
            "controller_process": b""}
    storable = b"pst0\x05\x0b\x0412345678\x04\x08\x08\x03\x00\x00\x00\xff\xfe"
    olds = {"controller_backend.dat": storable, "cookie_alice.dat": storable,
            "local.json": b'{"login":1,"about":5,"people":[]}'}
    for name, data in {**olds, **{name + ".pid": pids[name] for name in pids},
                       **dict.fromkeys(("post_alice.jsonl", "local.jsonl", "controller_post.jsonl"),
                                       GARBAGE_LINES)}.items():
        put(tmp_path / ("mojo_webqq_" + name), data)
    controller = start("controller", "--post-api", receiver.url)
    assert content(controller.path("controller_process.pid")) == f"{controller.pid}\n".encode()
    controller.login("alice")
    for name in olds:
        controller.log.wait(r"\[warn\].*" + re.escape(name))
        assert content(controller.path(name + ".old")) == olds[name]
        assert json.loads(content(controller.path(name)))
    controller.call("/local/say", **{"from": "小灰", "client": "alice", "content": "hello"})
    assert receiver.message("hello")["sender"] == "小灰"
    for name in "abc":
        started = controller.call("start_client", client=name)
        receiver.next(is_qrcode)
        assert content(controller.path(f"pid_{name}.pid")) == f"{started['pid']}\n".encode()
    assert controller.stop() == 0
    assert "fault of this program" not in controller.log.text()


def test_clients_environment_is_built_from_scratch(start):
    controller = start("controller", env={
        "PYTHONSTARTUP": "/x", "LD_PRELOAD": "", "BASH_ENV": "/x", "AWS_SECRET_ACCESS_KEY": "s",
        "OPENQQ_TOKEN": "t0ken", "MOJO_WEBQQ_MSG_TTL": "7", "MOJO_WEBQQ_ACCOUNT": "mallory"})
    body = request(controller.base, "/openqq/start_client?client=alice&mode=away",
                   headers={"Authorization": "Bearer t0ken"})[2]
    environment = environment_of(lambda: json.loads(body)["pid"])
    assert not [name for name in environment if not re.match(
        "MOJO_WEBQQ_|OPENQQ_|LC_|(?i:.*_proxy$)|(PATH|HOME|USER|LOGNAME|LANG|TZ|TMPDIR|TERM|"
        "VIRTUAL_ENV|LD_LIBRARY_PATH|SSL_CERT_(FILE|DIR)|PYTHONDONTWRITEBYTECODE|"
        "MALLOC_ARENA_MAX)$", name)]
    assert [environment["MOJO_WEBQQ_" + name] for name in ("ACCOUNT", "MODE", "MSG_TTL")] == [
        "alice", "away", "7"]


def test_secrets_stand_in_no_file_answer_or_log_but_the_cookie(start, receive):
    """And all files that there are are documented, and nobody else's to read."""
    receiver, other = receive(), receive()
    controller = start("controller", "--token", "S3CRET-token", "--post-api", receiver.url,
                       "--post-secret", "S3CRET-own", typed=True)
    alice = "/openqq/start_client?" + urllib.parse.urlencode({
        "client": "alice", "pwd": "S3CRET-pwd", "login_type": "login",
        "post_secret": "S3CRET-post", "post_api": receiver.url})
    token = {"Authorization": "Bearer S3CRET-token"}
    answers = [request(controller.base, path, headers=token)[2] for path in (
        alice, "/local/login?client=alice", "/openqq/start_client?client=bob", alice,
        "/openqq/start_client?client=carol&post_api=" + other.url, "/openqq/check_client",
        "/local/world", "/openqq/get_client_info?client=alice")]
    other.next(is_qrcode)
    assert eventually(lambda: {
        path.partition("?")[2] for path, _, _, event in receiver.posts
        if is_login(event) or is_qrcode(event)} == {"client=alice", "client=bob"})
    for path, headers, body, _ in receiver.posts + other.posts:
        secret = {"client=alice": "S3CRET-post", "client=bob": "S3CRET-own"}.get(
            path.partition("?")[2])  # the controller's own goes to its own post_api only
        assert headers["X-Signature"] == (secret and "sha1=" + hmac_sha1(secret, body))
    found = left_files(controller)
    assert not [name for name in found if not re.fullmatch(
        r"(cookie_N\.dat|pid_N\.pid|qrcode_N\.jpg|state_N\.json|post_N\.jsonl|controller_process"
        r"\.pid|controller_backend\.dat|controller_template\.py|controller_post\.jsonl|"
        r"local\.jsonl?)".replace("N", "(alice|bob|carol)"), name)]
    assert {"cookie_alice.dat", "qrcode_bob.jpg", "post_alice.jsonl", "local.json"} <= found
    for name in found:
        assert os.stat(controller.path(name)).st_mode & 0o777 == 0o600, name
        own = {"cookie_alice.dat": b"S3CRET-post", "cookie_bob.dat": b"S3CRET-own"}.get(name, b"-")
        answers.append(content(controller.path(name)).replace(own, b""))
    answers.append(subprocess.check_output(["ps", "-o", "args=", "-p", str(controller.pid)]))
    answers.append(request(controller.base, "/openqq/stop_client?client=alice", headers=token)[2])
    assert b"S3CRET" not in b"".join(answers) and "S3CRET" not in controller.log.text()


def test_chinese_names_and_texts_work_in_the_c_locale(start, receive):
    """Also in ps, where each process has its documented name."""
    receiver, locale = receive(), {"LANG": "C", "LC_ALL": "C"}
    controller = start("controller", env=locale, typed=True)
    started = controller.login("小明", post_api=receiver.url)
    for pid, name in (controller.pid, "wqcontroller"), (started["pid"], "wqclient(小明)"):
        shown = subprocess.check_output(["ps", "-ww", "-o", "args=", "-p", str(pid)],
                                        env={**os.environ, "LC_ALL": "C.UTF-8"}).decode()
        assert os.path.basename(shown.split()[0]) == name
    controller.call("send_friend_message", client="小明", name="小冰", content="你好🐧")
    assert receiver.message("你好🐧")["receiver"] == "小明"
    controller.log.wait(r"\[好友消息\] 小冰\|我的好友 : 你好🐧")
    assert {"state_小明.json", "cookie_小明.dat"} <= left_files(controller)
    assert controller.stop() == 0
    assert user(start("controller", env=locale), "小明")["account"] == "小明"


MEDIA_ID = "0" * 32
OWN_FILES = ["cookie_alice.dat", "state_alice.json", "qrcode_alice.jpg", "post_alice.jsonl"]
PLANTED = {"controller": ["controller_backend.dat", "controller_template.py", "local.json",
                          "controller_post.jsonl", "local.jsonl", *OWN_FILES],
           "client": ["local_alice.json", "local_alice.jsonl", "cookie_alice.dat.old",
                      f"media_alice_{MEDIA_ID}.png", *OWN_FILES]}


@pytest.mark.parametrize("there", ["link to a file", "link to nothing", "fifo"])
@pytest.mark.parametrize("whose", PLANTED)
def test_planted_links_lead_nowhere_and_fifos_hold_nobody_up(
        start, receive, tmp_path, whose, there):
    outside, tmpdir, receiver = tmp_path / "outside", tmp_path / "tmp", receive()
    outside.mkdir()
    tmpdir.mkdir()
    os.chmod(str(tmpdir), 0o1777)
    precious = json.dumps({
        "mallory": {"run": True, "port": 0, "given": {}}, "account": "alice", "precious": "MINE",
        "cookie": "MINE", "people": {"1": {"name": "MINE"}}})
    for name in PLANTED[whose]:
        path = str(tmpdir / ("mojo_webqq_" + name))
        if there == "link to a file":
            put(outside / name, precious)
        if there == "fifo":
            os.mkfifo(path)
        else:
            os.symlink(str(outside / name), path)
    program = start(whose, *["--account", "alice"] * (whose == "client"), "--post-api",
                    receiver.url, tmpdir=tmpdir)
    if whose == "controller":
        program.call("start_client", client="alice")
    receiver.next(is_qrcode)
    send = f"openqq/send_friend_message?client=alice&uid={XIAOBING}&"
    answers = [request(program.base, "/" + path)[2] for path in (
        "openqq/get_qrcode?client=alice", "openqq/check_client", "local/world",
        "openqq/get_client_info?client=alice", "local/login?client=alice",
        f"openqq/get_media?client=alice&id={MEDIA_ID}", f"{send}media_id={MEDIA_ID}",
        send + "content=x")]
    receiver.message("x")
    assert program.call("stop_client", client="alice")["code"] == 0
    assert program.stop() == 0
    assert b"MINE" not in b"".join(answers + [body for _, _, body, _ in receiver.posts])
    assert "mallory" not in program.log.text()
    assert {name: content(outside / name).decode() for name in os.listdir(str(outside))} == (
        dict.fromkeys(PLANTED[whose], precious) if there == "link to a file" else {})


def test_what_stands_in_the_way_of_a_start_is_a_clear_refusal(tmp_path):
    """A planted link at a pid or log file, a port that is taken: exit status 1, with the remedy,
    and no pid file is left."""
    precious = put(tmp_path / "precious", "1\n")
    with reserve() as sock:
        sock.listen(1)
        port = str(sock.getsockname()[1])
        for words, said, name, plant in [
                ("controller", "{path}", "controller_process.pid", os.symlink),
                ("client --account alice", "{path}", "pid_alice.pid", os.link),
                ("client --log-path {path}", "{path}", "log", os.symlink),
                ("controller --port " + port, port + ".*--port", "", None),
                ("client --port " + port, port + ".*--port", "", None)]:
            path = str(tmp_path / ("mojo_webqq_" + name))
            if plant:
                plant(precious, path)
            whose, *words = words.format(path=path).split()
            done = run_quickly(whose, "--tmpdir", str(tmp_path), "--port", "0", "--host",
                               "127.0.0.1", *words)
            assert done.returncode == 1 and "Traceback" not in done.stderr, words
            assert re.search(said.format(path=re.escape(path)), done.stderr, re.DOTALL), words
            if plant:
                os.remove(path)
            assert content(precious) == b"1\n" and not list(tmp_path.glob("*.pid"))


@pytest.mark.skipif(len(openqq.CPUS) < 2, reason="needs a choice of CPUs")
def test_each_process_keeps_to_one_cpu_and_clients_take_turns(pair, alone, start):
    """All threads of it, once it runs; on all CPUs where the operator says so."""
    def cpus(pid):
        found = set()
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
                found |= os.sched_getaffinity(int(task))
        return found

    alice, bob = [pair.state(name)["pid"] for name in ("alice", "bob")]
    assert eventually(lambda: [len(cpus(pid)) for pid in (
        pair.pid, alice, bob, alone.program.pid)] == [1] * 4)
    assert cpus(alice) != cpus(bob)
    free = start("controller", "--one-cpu", "0")
    for pid in free.pid, free.login("carol")["pid"]:
        assert cpus(pid) == set(openqq.CPUS)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux")
def test_runs_where_the_system_tells_nothing_of_cpus():
    """Under a filter of system calls that answers EPERM."""
    script = ("import os\n"
              "def refuse(*args): raise PermissionError(1, 'Operation not permitted')\n"
              "os.sched_getaffinity = os.sched_setaffinity = refuse\n"
              "import openqq; assert openqq.CPUS == []; openqq.share_cpu(0)\n")
    subprocess.run([sys.executable, "-c", script], cwd=HERE, check=True, timeout=WAIT)


# ------------------------------------------------------------------------------------------------
# Nothing is lost
# ------------------------------------------------------------------------------------------------

def test_a_socket_that_is_watched_no_more_is_not_told_of_though_it_was_ready():
    """As when a client is stopped while somebody calls at its port."""
    bench, called, pairs = Bench(), [], [openqq.socket_pair() for _ in range(2)]
    for (sock, peer), (away, _) in (pairs, pairs[::-1]):
        bench.loop.watch(sock, lambda away=away: (called.append(away), bench.loop.unwatch(away)))
        peer.send(b"!")
    bench.move(0)
    for sock in itertools.chain(*pairs):
        sock.close()
    assert len(called) == 1


class Bench:
    """A loop that the test turns, with a clock that stands still unless the test moves it."""

    def __init__(self):
        self.now, self.warnings = 1000.0, []
        self.log = openqq.Log(level="fatal")
        self.log.keep = self.warnings.append
        self.loop = openqq.Timers(threading.RLock(), self.log, lambda: self.now)

    def move(self, seconds):
        """Let time go by, and do all that can be done then, without waiting."""
        self.now += seconds
        self.loop.later(0, int)
        self.loop.step()

    def until(self, condition, pace=0.0):
        """Turn until something has come true by what other threads do; each turn takes `pace`."""
        end = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < end, self.warnings
            self.move(0)
            time.sleep(0.002)
            self.now += pace


class Far(Bench):
    """A Poster, and what its fetch finds: the test says when, and what it answers."""

    def __init__(self, path, secret=""):
        super().__init__()
        self.posts = []          # (content, X-Event-ID, header fields, body) of every try
        self.said = {}           # content -> the statuses to come, or exceptions; then 200
        self.gates = {}          # content -> Event to wait for
        self.told = []           # for each call of failed(): the error that is shown
        self.spool = openqq.DiskQueue(str(path), 1000, self.log)
        self.poster = openqq.Poster(
            "http://127.0.0.1:1/x", secret, self.spool, self.loop, self.log,
            lambda event, answer: None, self.fetch, clock=lambda: self.now,
            failed=lambda: self.told.append(dict(self.poster.error)))

    def fetch(self, url, method, fields, body, seconds):
        what = json.loads(body)["content"]
        self.posts.append((what, fields["X-Event-ID"], fields, body))
        if what in self.gates:
            self.gates[what].wait(WAIT)
        said = self.said.get(what) or [200]
        answer = said.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return types.SimpleNamespace(status=answer, kind="", fields={}, read=lambda: b"")

    def add(self, *contents, chat="c"):
        for what in contents:
            self.poster.add({"content": what}, chat)
        self.poster.flush()

    def tried(self):
        return [row[0] for row in self.posts]

    def settle(self, tries, pace=0.0):
        """Until so many tries were made, and their outcome is known."""
        self.until(lambda: len(self.posts) >= tries and not self.poster.flying(), pace)

    def end(self, pace=0.0):
        """Until nothing waits any more: what came of it all."""
        self.until(lambda: not self.poster.waiting(), pace)
        return self.poster.counts


@pytest.fixture
def far(tmp_path):
    return Far(tmp_path / "post.jsonl")


def test_answer_later_and_none_are_tried_five_times_under_one_id_and_dropped(tmp_path):
    """None: too late, or a connection that its receiver breaks; others are not held up. Any other
    answer is a delivery."""
    for number, later in enumerate([408, 425, 429, 500, 599, openqq.TooSlow("", sent=True),
                                    openqq.Unreachable("broken", sent=True)]):
        far = Far(tmp_path / str(number))
        far.said = {"a": [later] * 9, "b": [400], "other": [404]}
        far.add("a", "b")
        far.add("other", chat="d")
        far.settle(2)
        for tries, wait in enumerate([1, 2, 4, 8], 2):
            far.move(wait - 0.01)
            assert far.tried().count("a") == tries - 1, "too early"
            far.move(0.01)
            far.settle(tries + 1 if tries < 5 else 7)
        assert far.tried() == ["a", "other"] + ["a"] * 4 + ["b"]
        assert len({row[1] for row in far.posts}) == 3
        assert far.end() == {"posted": 2, "retried": 4, "dropped": 1}
        assert "dropped" in far.warnings[0]
        far.move(1)
        [error] = far.told
        assert (error["dropped"], error["time"]) == (1, "1015") and "5 times" in error["error"]


def test_what_is_posted_over_ten_minutes_late_says_so_and_is_signed_as_it_is_sent(tmp_path):
    """Also what waited on disk for the next process; the clock is that of the queueing."""
    for age, late in (600, {}), (601, {"late": 1}):
        former = Far(tmp_path / str(age))
        former.poster.add({"content": "a"}, "c")
        former.spool.close()  # and no flush: the process ends here
        again = Far(tmp_path / str(age), "s3cret")
        again.now += age
        again.add()
        again.end()
        [(_, _, headers, body)] = again.posts
        assert json.loads(body) == {"content": "a", **late}
        assert headers["X-Signature"] == "sha1=" + hmac_sha1("s3cret", body)
        again.spool.close()
        assert not Far(tmp_path / str(age)).spool.pending


def test_check_client_names_what_could_not_be_posted(house, start, receive):
    """post_error: when, what, how many; by the controller and by a client alone."""
    receiver = receive(lambda event: 410 if event.get("content") == "x" else 200)
    house.login("nora", post_api=receiver.url)
    alone = start("client", "--account", "nora", "--post-api", receiver.url)
    alone.call("/local/login", client="nora")
    for program in house, alone:
        assert "post_error" not in program.state("nora")
        program.call("/local/say", client="nora", content="x", **{"from": "小灰"})
        found = eventually(lambda: program.state("nora").get("post_error"))
        assert set(found) == {"time", "error", "dropped"} and found["dropped"] >= 1
        assert abs(int(found["time"]) - time.time()) < WAIT and "is gone" in found["error"]


def test_answer_410_ends_the_posting(far):
    far.said["a"], far.said["c"] = [500], [410]
    far.add("a", "b")
    far.settle(1)
    far.add("c", "d", chat="other")
    far.settle(2)
    far.add("e")
    far.move(100)
    far.move(100)
    assert far.tried() == ["a", "c"] and far.poster.waiting() == 0
    said = " ".join(far.warnings)
    assert "410" in said and "fault of this program" not in said


def test_without_connection_tries_come_after_0_1_2_4_to_15_seconds_for_a_day_and_cost_no_try(far):
    """A connection that does not come in time is nobody there as well."""
    nobody = [openqq.Unreachable("refused"), openqq.TooSlow("no answer in time")] * 1000
    far.said = {"a": nobody[:30] + [500] * 4, "b": nobody}
    far.add("a", "b")
    far.settle(2)
    for wait in [1, 2, 4, 8, 15, 15]:
        tries = len(far.posts)
        far.move(wait - 0.01)
        assert len(far.posts) == tries, "too early"
        far.move(0.01)
        far.settle(tries + 1)
    far.settle(36, pace=15)
    assert far.poster.counts["posted"] == 1 and far.poster.waiting() == 1
    assert far.tried()[:35] == ["a"] * 35 and len({row[1] for row in far.posts[:35]}) == 1
    far.move(openqq.POST_DAY)
    assert far.end()["dropped"] == 1


def test_slow_answer_holds_up_its_own_conversation_only_and_four_go_at_once(far):
    far.gates = {what: threading.Event() for what in ("a1", "b1", "c1", "d1")}
    for chat in "abcdef":
        far.add(chat + "1", chat + "2", chat=chat)
    for lanes in 1, 2, 3, 4:
        far.until(lambda: len(far.posts) == lanes)
        far.move(1)
    far.move(1)
    assert sorted(far.tried()) == ["a1", "b1", "c1", "d1"], "four at once"
    far.gates["d1"].set()
    far.until(lambda: len(far.posts) == 9, pace=0.1)
    assert sorted(far.tried()[4:]) == ["d2", "e1", "e2", "f1", "f2"]
    for gate in far.gates.values():
        gate.set()
    far.end(pace=0.1)
    for chat in "abcdef":
        assert [what for what in far.tried() if what[0] == chat] == [chat + "1", chat + "2"]


def test_queue_over_its_limit_drops_the_oldest_and_tells_of_them_once_a_second(far):
    far.spool._limit = 3
    far.said["a"] = [500]
    far.add("a", chat="x")
    far.settle(1)
    far.gates["b"] = threading.Event()
    far.add("b", chat="y")
    far.until(lambda: len(far.posts) == 2)
    for what in "cdef":
        far.add(what, chat="y")
    far.add("g", chat="x")
    far.move(0.9)
    assert not far.told
    far.move(10)  # when the first would have been tried again
    far.gates["b"].set()
    assert far.end(pace=0.1)["dropped"] == 3
    assert sorted(far.tried()) == ["a", "b", "e", "f", "g"]
    assert [(row["dropped"], row["error"]) for row in far.told] == [
        (3, "over the limit of the queue")]
    assert "fault of this program" not in " ".join(far.warnings)


def test_messages_for_a_receiver_that_is_away_come_all_in_order_whatever_is_killed(
        start, receive):
    """The port is closed while they arrive, and before the last ten come the client is killed."""
    with reserve() as sock:
        port = sock.getsockname()[1]
        controller = start("controller", "--post-api", f"http://127.0.0.1:{port}/")
        pid = controller.login("alice")["pid"]
        expected = [f"m{number}" for number in range(much(50, 500))]
        for what in expected:
            if what == expected[-10]:
                os.kill(pid, signal.SIGKILL)
            assert controller.call("/local/say", client="alice", content=what,
                                   **{"from": "小灰"})["code"] == 0
        receiver = receive(port=port)
        receiver.message(expected[-1])
        assert [event["content"] for _, _, _, event in receiver.posts
                if "content" in event] == expected


def test_a_world_file_that_cannot_be_read_leaves_the_world_as_it_was(tmp_path):
    def network(world):
        return openqq.LocalNetwork(str(tmp_path / "net"), world, openqq.QQ,
                                   openqq.Log(level="fatal"), lambda: "http://x")

    first = network("")
    first.do(first.change, {"do": "add", "what": "person", "name": "老王"})
    first.stop()
    member = ('{"people": [{"uid": "7", "name": "x"}], "groups": [{"uid": "8", "name": "g", '
              '"owner_uid": "", "member": [{"uid": "7", %s}]}]}')
    for wrong in "{}", member % '"role": "king"', member % '"muted": "1.2.3"':
        with pytest.raises(openqq.Refusal, match="cannot be read"):
            network(put(tmp_path / "world", wrong))
    assert network("").dump() == first.dump()


def test_disk_that_takes_no_more_is_a_warning_and_the_api_goes_on(start, receive):
    """And costs no descriptors."""
    def open_files(pid):
        shown = subprocess.check_output(["ls", "-l", f"/proc/{pid}/fd"])
        return shown.decode().count(controller.tmpdir)

    def pass_on(what):
        controller.call("/local/say", client="alice", content=what, **{"from": "小灰"})
        assert receiver.message(what)["sender"] == "小灰"

    receiver = receive()
    controller = start("controller", "--post-api", receiver.url)
    pids = [controller.pid, controller.login("alice")["pid"]]
    receiver.next(is_login)
    before = list(map(open_files, pids))
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    for what in "one", "two", "three":
        pass_on(what)
    sent = controller.call("send_friend_message", client="alice", name="小冰", content="x")
    assert sent["code"] == controller.call("start_client", client="bob")["code"] == 0
    for whose, name in ("alice", "post_alice.jsonl"), ("wqc", "local.jsonl"), (
            "wqc", "controller_backend.dat"):
        controller.log.wait(rf"^\[{whose}\].*\[warn\].*{name} cannot be written")
    for pid, files in zip(pids, before):
        assert open_files(pid) <= files
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    pass_on("four")
    assert b"four" in content(controller.path("local.jsonl"))
    assert controller.stop() == 0
    assert not [name for name in os.listdir(controller.tmpdir) if name.startswith(".")]
    assert "Traceback" not in controller.log.text()


def test_spool_survives_a_kill_at_any_byte(tmp_path):
    """Cut off anywhere, what was written before is there, and the mark fits to it."""
    path, log = str(tmp_path / "spool"), Bench().log
    spool = openqq.DiskQueue(path, 100, log)
    for number in range(1, 6):
        spool.add(f"item {number}", f"era:{number}")
        spool.flush()
    spool.done(2)
    spool.close()
    whole = content(path)
    for end in range(len(whole) + 1):
        put(path, whole[:end])
        cut = openqq.DiskQueue(path, 100, log)
        lines = whole[:end + (whole[end:end + 1] == b"\n")].count(b"\n")
        items = [f"item {number}" for number in range(1, 6)[:lines] if (number, lines) != (2, 6)]
        assert list(cut.pending.values()) == items
        assert cut.mark == (f"era:{min(lines, 5)}" if lines else None)
        cut.add("next", "era:9")
        cut.close()
        assert list(openqq.DiskQueue(path, 100, log).pending.values()) == items + ["next"]


def test_spool_grows_no_longer_than_what_it_holds(tmp_path):
    path, log = str(tmp_path / "spool"), Bench().log
    spool = openqq.DiskQueue(path, 100, log)
    for number in range(5000):
        key = spool.add("x" * 2000, f"era:{number}")
        if number != 7:
            spool.done(key)
        spool.flush()
    spool.close()
    assert os.path.getsize(path) < openqq.Journal.COMPACT + 5000
    again = openqq.DiskQueue(path, 100, log)
    assert (len(again.pending), again.mark, again.last) == (1, "era:4999", 5000)


def test_what_somebody_holds_is_tried_again_and_given_up_after_a_while():
    def held(tries):
        if next(tries) < 3:
            raise PermissionError("held")
        return "free"

    assert openqq.patiently(held, itertools.count(), tries=4) == "free"
    with pytest.raises(PermissionError):
        openqq.patiently(held, itertools.count(), tries=3)


def test_the_reaper_survives_a_socket_that_is_closed_while_it_is_told_of_it():
    reaper, gone = openqq.Reaper(), threading.Event()
    (closed, its_peer), (other, peer) = [socket.socketpair() for _ in range(2)]
    reaper.add(openqq.Stream(other))       # so that it runs; for ever, as far as this one goes
    time.sleep(0.1)                        # it waits for its sockets
    with reaper.lock:
        reaper.watch(closed, lambda: None)
        its_peer.close()
        time.sleep(0.1)                    # it has heard of that, and waits for the lock
        reaper.unwatch(closed)
        closed.close()
    reaper.watch(other, gone.set)
    peer.close()
    assert gone.wait(WAIT)


def test_messages_go_send_interval_apart_and_the_unsent_are_tried_msg_ttl_times(tmp_path):
    """The first goes at once."""
    client = openqq.Client(tmpdir=str(tmp_path), log_level="fatal", send_interval=3.0, msg_ttl=2)
    now, sends, failures = [0.0], [], {"2": openqq.Unreachable("refused"),
                                       "3": openqq.Unreachable("reset", sent=True)}

    def send(rows):
        sends.append((now[0], rows[0]["content"]))
        if rows[0]["content"] in failures:
            raise failures[rows[0]["content"]]
        return [{"code": 0, "info": ""}]

    def later(seconds, wanted):
        with client.lock:
            now[0] += seconds
            client.changed.notify_all()
        assert eventually(lambda: len(sends) >= wanted and not client.talk.began)

    client.timers.clock, client.link.send, client.state = lambda: now[0], send, "running"
    with client.lock:
        futures = [client.send("friend_message", what, XIAOBING) for what in "123"]
    later(0, 1)
    for wanted in 2, 3, 4:
        later(2.75, wanted - 1)
        time.sleep(0.05)  # what would come too early has the time to
        later(0.25, wanted)
    assert sends == [(0, "1"), (3, "2"), (6, "2"), (9, "3")]
    assert [(row.code, row.info) for row in (future.result(WAIT) for future in futures)] == [
        (0, ""), (-5, "TTL失效"), (-4, "响应未知: reset")]


# ------------------------------------------------------------------------------------------------
# Clients that die, and the template
# ------------------------------------------------------------------------------------------------

class Nursery(openqq.Controller):
    """A controller that serves nobody and has one client: a real but cheap process instead, and a
    clock of its own."""

    def __init__(self, tmp_path, program):
        super().__init__(tmpdir=str(tmp_path), log_level="fatal")
        self.now, self.program = 1000.0, program
        self.starts, self.reports, self.processes, self.warnings = [], [], [], []
        self.url, self.log.keep, self.timers.clock = "", self.warnings.append, lambda: self.now
        self.network = types.SimpleNamespace(do=lambda *args: None, detach=None)
        self.key_for, self.tell = lambda name: "key", lambda *args: None
        self.report = lambda child, event, *params: self.reports.append((self.now, event, *params))
        self.supervisor = openqq.Supervisor(self, self._spawn)
        self.child = openqq.Child("alice", {}, openqq.listen("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.timers.run, daemon=True)
        self.thread.start()

    def _spawn(self, words, executable, **kwargs):
        self.processes.append(subprocess.Popen(
            [sys.executable, "-ISc", "import os, signal, sys, time\n"
             "say = lambda text: os.write(int(os.environ['OPENQQ_LIFE']), text.encode())\n"
             + self.program], **kwargs))
        self.starts.append(self.now - 1000.0)
        return self.processes[-1]

    def begin(self, state=""):
        """Start the child, and wait until it says that it is in this state."""
        self.call("expect", self.child)
        self.supervisor.make(self.child, first=True)
        self.until(lambda: not state or self.child.state == state)
        return self

    def call(self, method, *args):
        """What a method of the supervisor returns that is to be called with the lock held."""
        with self.lock:
            return getattr(self.supervisor, method)(*args)

    def renew(self, mode):
        """Begin a change of settings: a future with why it was refused, or None."""
        future = concurrent.futures.ThreadPoolExecutor(1).submit(
            self.call, "renew", self.child, {"mode": mode}, set())
        self.until(lambda: self.child.phase == "renewing" or future.done())
        return future

    def until(self, condition, pace=0.0):
        """Wait for what other threads and processes do; meanwhile the clock runs at a `pace`."""
        def check():
            self.move(pace)
            return condition()

        assert eventually(check)

    def move(self, seconds):
        """Let time go by, and what is due happen."""
        done = threading.Event()
        with self.lock:
            self.now += seconds
            self.timers.later(0.0, done.set)
        self.timers._wake()  # the clock wakes nobody here
        assert done.wait(WAIT)

    def close(self):
        self.timers.stop()
        self.thread.join(WAIT)
        for process in self.processes:
            process.kill()
            process.wait()
        self.child.listener.close()


@pytest.fixture
def nursery(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda program: stack.enter_context(contextlib.closing(Nursery(tmp_path, program)))


def test_client_that_dies_at_once_is_started_seven_times_ever_later_then_reported(nursery):
    home = nursery("say('{\"log\":\"the reason\"}\\n'); sys.exit(3)").begin()
    for starts, wait in enumerate([1, 2, 4, 8, 16], 2):
        home.until(lambda: len(home.starts) == starts and home.child.phase == "backoff")
        home.move(wait - 0.01)
        home.move(0.01)
        home.until(lambda: len(home.starts) == starts + 1)
    home.until(lambda: home.child.phase == "failed")
    assert [round(when, 3) for when in home.starts] == [0, 0, 1, 3, 7, 15, 31]
    (_, event, error), = home.reports
    assert event == "client_failed" and re.search("the reason\n.*exit status 3", error)


def test_client_that_was_running_for_a_while_starts_again_at_once_any_number_of_times(nursery):
    home = nursery("say('{\"state\":\"running\"}\\n'); time.sleep(60)").begin()
    for number in range(1, 10):
        home.until(lambda: home.child.state == "running")
        home.move(100)
        home.processes[-1].kill()
        home.until(lambda: len(home.starts) == number + 1)
        assert home.starts[-1] == number * 100
    assert not home.reports


def test_client_that_nobody_scans_for_ten_minutes_is_reported_once(nursery):
    for is_scanned in False, True:
        home = nursery("signal.signal(signal.SIGUSR1, lambda *_: say('{\"state\":\"running\"}\\n'))"
                       "\nsay('{\"state\":\"scaning\"}\\n')\nwhile 1: signal.pause()")
        home.begin("scaning")
        home.move(599.9)
        assert not home.reports
        if is_scanned:
            home.processes[0].send_signal(signal.SIGUSR1)
            home.until(lambda: home.child.state == "running")
        home.move(600)
        assert home.reports == ([] if is_scanned else [(2199.9, "client_waiting")])


def test_new_settings_begin_when_the_former_process_is_gone_and_a_second_stop_kills(nursery):
    """One that does not heed TERM is killed after a while; it had not died, so it is no restart."""
    home = nursery("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                   "say('{\"state\":\"running\"}\\n')\nwhile 1: signal.pause()").begin("running")
    refused = home.renew("busy")
    home.move(openqq.KILL_SECONDS - 0.1)
    time.sleep(0.05)  # what would come too early has the time to
    assert len(home.starts) == 1, "the former process lives"
    home.move(0.1)
    assert refused.exception(WAIT) is None and home.child.given == {"mode": "busy"}
    home.until(lambda: home.child.state == "running")
    assert home.child.restarts == 0 and home.supervisor.restarts == 0 and not home.reports
    refused, now = home.renew("away"), home.now
    home.call("stop_all")
    home.call("stop_all")
    assert isinstance(refused.exception(WAIT), openqq.NotRunning)
    home.until(lambda: not home.supervisor.busy())
    assert home.processes[1].returncode == -signal.SIGKILL
    assert (len(home.starts), home.now) == (2, now)


def test_client_that_says_nothing_has_taken_its_new_settings_after_a_while(nursery, monkeypatch):
    """A template may not come to run(); its end is one like any other then."""
    monkeypatch.setattr(openqq, "TRIAL_SECONDS", 0.1)
    home = nursery("time.sleep(60)").begin()
    assert home.renew("busy").exception(WAIT) is None and len(home.starts) == 2
    home.processes[-1].kill()
    home.until(lambda: len(home.starts) == 3, pace=0.5)
    assert home.child.given == {"mode": "busy"} and home.supervisor.restarts == 1


def test_client_that_lets_go_of_its_life_line_is_killed(nursery):
    home = nursery("os.close(int(os.environ['OPENQQ_LIFE']))\nwhile 1: signal.pause()").begin()
    home.until(lambda: home.child.life is None)
    home.move(home.supervisor.SILENT_SECONDS)
    home.until(lambda: len(home.starts) > 1)
    assert home.processes[0].returncode == -signal.SIGKILL


def test_events_of_a_client_are_passed_on_with_its_name_and_lost_ones_are_counted(nursery):
    home = nursery("""say('+{"content":"a","seq":7}\\n{"lost":3}\\n')
say('nonsense\\n-{"event":"lo'); time.sleep(0.2)  # so that it is read in two pieces
say('gin"}\\n{"state":"running"}\\n+{"content":"tor'); os._exit(1)""")
    pieces = home.store.stream(openqq.Request("GET", "/", {}, b"", "127.0.0.1")).pieces
    next(pieces)
    home.begin("stop")
    assert re.findall(b"\ndata: (.*)", b"\n" + next(pieces)) == [
        b'{"client":"alice","content":"a","seq":7}', b'{"client":"alice","event":"login"}']
    assert [row["content"] for row in json.loads(home.store.take(0, None))] == ["a"]
    assert re.search(r"alice.*\b3 event", home.warnings[0])


def edit_template(controller, text):
    put(controller.path("controller_template.py"), text)


TEMPLATE = """
import os, sys, openqq
{}
client = openqq.Client()
client.load(["ShowMsg"])
client.load("Openqq", data={{"listen": [{{"host": "127.0.0.1",
            "port": os.environ["MOJO_WEBQQ_PLUGIN_OPENQQ_PORT"]}}]}}, call_on_load=True)
{}
client.run()
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A controller for tests that write a template and have accounts of their own there."""
    program = Program(tmp_path_factory.mktemp("workshop"), "controller", "--restart", "never",
                      "--check-interval", "1")
    yield program.ready()
    assert program.stop() == 0


def test_edited_template_is_what_new_clients_run_and_one_that_does_not_compile_is_code_4(
        workshop, house):
    """It may import what is installed, though clients run without site-packages."""
    written = content(house.path("controller_template.py"))
    assert written.decode() == openqq.default_template(openqq.QQ)
    edit_template(workshop, written)
    workshop.login("plain")
    edit_template(workshop, TEMPLATE.format("import pytest", "client.log.info('edited')"))
    workshop.login("other")
    assert [row["name"] for row in workshop.state("other")["plugin"]] == [
        "Mojo::Webqq::Plugin::Openqq", "Mojo::Webqq::Plugin::ShowMsg"]
    workshop.log.wait(r"^\[other\].*edited")
    assert len(workshop.state("plain")["plugin"]) > 2, "it is as it was"
    for bad in "def (:\n", "\0":
        edit_template(workshop, bad)
        answer = workshop.call("start_client", client="carol")
        assert (answer["code"], answer["status"]) == (4, "client pid not ok"), bad
    workshop.log.wait(r"\[error\].*template")
    assert "carol" not in listed_names(workshop)


def test_template_that_fails_is_told_by_log_check_client_metrics_and_post_api(start, receive):
    said = [503]
    receiver = receive(lambda event: said[0])
    controller = start("controller", "--restart", "never", "--post-api", receiver.url)
    edit_template(controller, "import openqq\nraise RuntimeError('no such thing')\n")
    assert controller.call("start_client", client="alice")["code"] == 0
    failed = receiver.next(lambda event: event.get("event") == "client_failed")
    assert failed["post_type"] == "event" and failed["params"][0] == "alice"
    assert eventually(lambda: metrics_of(controller.base)['openqq_events_total{result="retried"}'])
    shown = metrics_of(controller.base)
    assert shown['openqq_clients{state="failed"}'] == shown["openqq_post_queue_length"] == 1
    said[0] = 200
    state = controller.state("alice")
    assert (state["state"], state["failed"]) == ("stop", True)
    for text in state["error"], failed["params"][1], controller.log.text():
        assert "no such thing" in text
    edit_template(controller, "")
    assert controller.login("alice")["status"] == "success"
    assert "failed" not in controller.state("alice")


def test_second_term_hurries_a_client_that_still_has_something_to_post(workshop):
    """By the template the client would wait an hour for its receiver."""
    edit_template(workshop, TEMPLATE.format("openqq.STOP_SECONDS = 3600.0", ""))
    with reserve() as sock:
        pid = workshop.login(
            "hasty", post_api=f"http://127.0.0.1:{sock.getsockname()[1]}/")["pid"]
        for said in r"^\[hasty\].*停止信号\[TERM\]", "client hasty ended by itself":
            os.kill(pid, signal.SIGTERM)
            workshop.log.wait(said)
        assert workshop.state("hasty")["state"] == "stop"
    posts = content(workshop.path("post_hasty.jsonl")).splitlines()
    assert b'"stop"' in posts[-1], "and what was not posted waits for the next start"


def test_signal_that_another_thread_gets_ends_a_client_too(workshop):
    """As one does that comes just before the main thread falls asleep: nothing interrupts that."""
    edit_template(workshop, TEMPLATE.format("""
import signal, threading
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
def relay():
    signal.sigwait([signal.SIGUSR1])
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=relay, daemon=True).start()
""", ""))
    os.kill(workshop.login("relayed")["pid"], signal.SIGUSR1)
    workshop.log.wait("client relayed ended by itself")


# ------------------------------------------------------------------------------------------------
# The weixin flavour, and media in both
# ------------------------------------------------------------------------------------------------

WX_LISTED = ("login,stop,state_change,input_qrcode,new_friend,lose_friend,new_group,lose_group,"
             "new_group_member,lose_group_member,friend_request,revoke_message,"
             "friend_property_change,group_property_change,group_member_property_change")
OK, FAILED = {"code": 0, "status": "success"}, {"code": 201, "status": "failure"}
LOST = {"code": 100, "status": "object not found"}
LOST_WITH_ID = {"code": 100, "id": None, "status": "object not found"}
PNG = openqq.avatar("a picture")
PNG_TEXT = base64.b64encode(PNG).decode()
LARGE = (PNG + os.urandom(1 << 20) * 6)[:openqq.MEDIA_LIMIT]
ALICE, BOB = openqq.name_to_uid("alice"), openqq.name_to_uid("bob")


class Voice(Face):
    """The same in either flavour, on its own port or through the controller, and what it hears."""

    def __init__(self, program, name, prefix, by_controller=False):
        super().__init__(program, name, controlled=by_controller)
        self.prefix, self.seq, self.about = prefix, 0, {"client": name} if by_controller else {}
        if not by_controller:
            port = call(program.base, "check_client", client=name)["client"][0]["port"]
            self.base = f"http://127.0.0.1:{port}"

    def now(self):
        """Itself, deaf to all that came before."""
        mark = os.urandom(8).hex()
        self.call("send_friend_message", displayname="小灰", content=mark)
        self.next(lambda event: event.get("content") == mark)
        return self

    def target(self, api, **params):
        return f"{self.prefix}{api}?" + urllib.parse.urlencode({**self.about, **params})

    def raw(self, api, method="GET", **params):
        return request(self.base, self.target(api, **params), method)

    def post(self, api, **params):
        """As a form, where bytes are a file: for what is too long for a request line."""
        body = b"".join(
            b"--edge\r\nContent-Disposition: form-data; name=\"%b\"%b\r\n\r\n%b\r\n" % (
                name.encode(), b"; filename=\"cat.png\"" * isinstance(value, bytes),
                value if isinstance(value, bytes) else value.encode())
            for name, value in {**self.about, **params}.items()) + b"--edge--\r\n"
        return json.loads(request(self.base, self.prefix + api, "POST", body, {
            "Content-Type": "multipart/form-data; boundary=edge"})[2])

    def next(self, wanted):
        """The next event since the last one that was returned here, passing over the others."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            for event in self.call("check_event", since=self.seq):
                self.seq = event["seq"]
                if wanted(event):
                    return event
        raise AssertionError(f"{self.account} heard nothing of it")

    def heard(self, content):
        return self.next(lambda event: event.get("content") == content
                         and event["class"] == "recv")

    def event(self, name, wanted=lambda params: True):
        return self.next(lambda event: event.get("event") == name
                         and wanted(event["params"]))["params"]

    def members(self, group="OpenQQ"):
        return {member["name"]: member for member in self.group(group)["member"]}


@pytest.fixture(scope="session")
def weixin_pair(tmp_path_factory):
    """A weixin controller with alice and bob; tests leave them friends, and in OpenQQ."""
    words = "controller", "--flavor", "weixin"
    with serving(tmp_path_factory.mktemp("weixin"), *words) as program:
        for name in "alice", "bob":
            program.login(name, post_event_list=WX_LISTED)
        yield program


@pytest.fixture
def voices(weixin_pair):
    """alice through the controller, bob on his own port."""
    return [Voice(weixin_pair, name, "/openwx/", name == "alice").now()
            for name in ("alice", "bob")]


@pytest.fixture(params=["qq", "weixin"])
def media_pair(request, pair, weixin_pair):
    """(alice, bob, whether weixin) of each flavour."""
    program = weixin_pair if request.param == "weixin" else pair
    prefix = "/openwx/" if request.param == "weixin" else "/openqq/"
    return [Voice(program, name, prefix, True).now() for name in ("alice", "bob")] + [
        request.param == "weixin"]


# -- one table, nothing else

def test_no_code_outside_the_flavour_table_asks_which_flavour_it_is():
    asked = [ast.dump(node) for node in ast.walk(TREE) if isinstance(node, ast.Compare) or (
        getattr(getattr(node, "func", None), "id", "") in ("isinstance", "issubclass"))]
    assert not [text for text in asked if re.search(
        r"value='(qq|weixin)'|id='(QQ|Weixin)'|flavour', ctx=Load\(\)\), attr='name'", text)]


def test_weixin_is_the_system_of_its_document(start):
    program, name = start("controller", "--flavor", "weixin", typed=True), "weixin_client_01"
    assert (openqq.Weixin.port, openqq.Weixin.client_port) == (2000, 3000)
    ask = functools.partial(call, program.base, client=name)
    started = ask("/openwx/start_client", log_level="debug", post_media_data=0)
    assert {**started, "pid": 0, "port": 0} == {
        "account": name, "client": name, "code": 0,
        "log_level": "debug", "pid": 0, "port": 0, "post_media_data": "0", "status": "success"}
    assert 3000 <= started["port"] < 4000
    path = "/openwx/get_qrcode?client=" + name
    assert eventually(lambda: request(program.base, path)[0] == 200)
    for base in program.base, f"http://127.0.0.1:{started['port']}":
        _, fields, body = request(base, path)
        assert (fields["content-type"], fields["cache-control"], body[:4]) == (
            "image/jpg", "no-cache", b"\x89PNG")
    [row] = ask("/openwx/check_client")["client"]
    start_of = os.path.join(os.path.realpath(program.tmpdir), "mojo_weixin_")
    assert {"state": "scaning", "download_media": "1", **{
        f"{what}_path": f"{start_of}{what}_{name}.{end}" for what, end in (
            ("cookie", "dat"), ("pid", "pid"), ("qrcode", "jpg"), ("state", "json"))
    }}.items() <= row.items()
    assert {plugin["name"] for plugin in row["plugin"] if plugin["priority"] in (98, 100)} == {
        "Mojo::Weixin::Plugin::Openwx", "Mojo::Weixin::Plugin::ShowMsg"}
    assert ask("/local/login")["code"] == 0
    for pid, shown in (program.pid, "wxcontroller"), (started["pid"], f"wxclient({name})"):
        assert shown in subprocess.check_output(["ps", "-o", "args=", "-p", str(pid)]).decode()
    assert ask("/openwx/stop_client") == {
        key: started[key] for key in started if key != "account"}
    left = os.listdir(program.tmpdir)
    assert all(each.startswith(("mojo_weixin_", ".openqq_mojo_weixin_")) for each in left), left
    assert {"mojo_weixin_controller_process.pid", "mojo_weixin_controller_backend.dat"} <= set(left)
    template = content(start_of + "controller_template.py")
    assert b"MOJO_WEIXIN_PLUGIN_OPENWX_POST_API" in template and b"WEBQQ" not in template


def test_weixin_settings_come_from_its_own_environment_and_every_world_has_filehelper(
        start, tmp_path):
    world = {"people": [{"uid": "7001", "name": "alone"}, {"uid": "7002", "name": "dora"}],
             "groups": [], "discuss": [], "friends": [["7001", "7002"]]}
    client = start("client", "--flavor", "weixin", env={
        "MOJO_WEIXIN_ACCOUNT": "alone", "MOJO_WEBQQ_ACCOUNT": "other",
        "MOJO_WEIXIN_WORLD": put(tmp_path / "world", json.dumps(world)),
        "MOJO_WEIXIN_LOGIN_TYPE": "login", "MOJO_WEIXIN_PWD": "x"})
    client.log.wait("logged in")
    assert client.call("/openwx/get_client_info")["account"] == "alone"
    assert {friend["name"] for friend in client.call("/openwx/get_friend_info")} == {
        "dora", "文件传输助手"}
    for key in "id", "account":
        sent = client.call("/openwx/send_friend_message", content="hello", **{key: "filehelper"})
        assert (sent["code"], sent["id"].partition(":")[2]) == (0, "filehelper")
    assert client.stop() == 0
    assert "mojo_weixin_state_alone.json" in os.listdir(client.tmpdir)


def test_both_flavours_share_a_tmpdir_and_nothing_else(start):
    voices = []
    for name, words in ("openqq", ()), ("openwx", ("--flavor", "weixin")):
        program = start("controller", *words)
        program.login("alice")
        voices.append(Voice(program, "alice", f"/{name}/", True))
        assert voices[-1].call("get_user_info")["uid"] == ALICE, "the same name in two worlds"
        voices[-1].call("send_friend_message", displayname="小冰", content=name)
        assert voices[-1].heard(name)
    for voice in voices:
        assert {f"/{event['content']}/" for event in voice.call("check_event", since=0)
                if "content" in event} == {voice.prefix}
    assert voices[0].program.stop() == 0
    assert voices[1].friend("小冰")
    listed = [name for name in os.listdir(program.tmpdir) if "weixin" not in name]
    assert listed and all(name.startswith("mojo_webqq_") for name in listed)


# -- reading

WX_PERSON = {"account", "city", "display", "displayname", "id", "markname", "name", "province",
             "sex", "signature", "uid"}
WX_GROUP = {"displayname", "id", "name", "owner_uid", "uid"}


def test_weixin_objects_have_their_documented_members(voices):
    alice, _ = voices
    assert WX_PERSON <= set(alice.call("get_user_info"))
    friends = alice.call("get_friend_info")
    assert all(WX_PERSON | {"category"} == set(friend) for friend in friends)
    assert {friend["name"]: friend["category"] for friend in friends} == {
        **dict.fromkeys(("小冰", "小灰", "bob"), "好友"), "OpenQQ订阅号": "公众号",
        "文件传输助手": "系统帐号"}
    helper, group = alice.friend("文件传输助手"), alice.group()
    assert (helper["id"], helper["account"]) == ("filehelper", "filehelper")
    assert re.fullmatch("@[0-9a-f]{32}", alice.friend("小冰")["id"])
    assert set(group) == WX_GROUP | {"member"} and re.fullmatch("@@[0-9a-f]{32}", group["id"])
    assert all(WX_PERSON <= set(member) for member in group["member"])
    assert {"alice", "bob", "小冰"} <= set(alice.members()) and group in alice.call("get_group_info")
    assert WX_GROUP in map(set, alice.call("get_group_basic_info"))
    assert alice.call("search_friend", account="filehelper") == [helper]
    assert alice.call("search_friend", name="nobody") == alice.call("search_group") == LOST
    assert alice.call("search_group", displayname="OpenQQ") == [group]
    assert {"account": "alice", **OK}.items() <= alice.call("get_client_info").items()


LACKS = {  # by whether it is weixin
    True: ["relogin", "get_discuss_info", "send_discuss_message", "send_sess_message",
           "shutup_group_member"],
    False: ["consult", "create_group", "invite_friend", "set_group_displayname", "stick",
            "set_friend_markname", "set_markname", "make_friend", "get_avatar", "upload_media"]}


def test_what_a_flavour_lacks_is_an_unknown_path(media_pair):
    alice, _, weixin = media_pair
    for base in alice.base, Voice(alice.program, "alice", alice.prefix).base:
        for api, prefix in itertools.product(LACKS[weixin], ("/openqq/", "/openwx/")):
            status, fields, body = request(base, f"{prefix}{api}?client=alice&id=1")
            assert (api, status, body) == (api, 403, b"api not found")
            assert fields["content-type"] == "text/html;charset=UTF-8"
    if not weixin:
        assert alice.call("send_friend_message", id="@all", content="to all") == {
            "code": 100, "id": None, "status": "friend not found"}
    assert alice.program.state("alice")["state"] == "running"


# -- sending

def test_weixin_friends_and_groups_are_found_by_any_key_and_tell_who_they_are(voices):
    alice, bob = voices
    target, group = alice.friend("bob"), alice.group()
    common = {"class": "recv", "format": "text", "post_type": "receive_message",
              **dict.fromkeys(("receiver", "receiver_account", "receiver_name"), "bob"),
              "receiver_uid": BOB, "receiver_id": bob.call("get_user_info")["id"],
              **dict.fromkeys(("sender", "sender_account", "sender_name"), "alice"),
              "sender_uid": ALICE}
    friend = {"type": "friend_message", "sender_category": "好友", "sender_markname": None,
              "sender_id": bob.friend("alice")["id"]}
    there = {"type": "group_message", "group": "OpenQQ", "group_name": "OpenQQ",
             "group_uid": group["uid"], "group_id": bob.group()["id"]}
    for api, place, keys, told in (
            ("send_friend_message", target, ("id", "account", "displayname"), friend),
            ("send_group_message", group, ("id", "displayname"), there)):
        for key in keys:
            text = f"by {key} {os.urandom(3).hex()}"
            sent = alice.call(api, content=text, **{key: place[key]})
            assert sent == {"code": 0, "id": sent["id"], "status": "success"}
            assert re.fullmatch(r"[0-9]+:" + place["id"], sent["id"])
            assert {**common, **told}.items() <= bob.heard(text).items()
            report = alice.next(lambda event: event.get("content") == text)
            assert (report["class"], report["format"]) == ("send", "text")
            assert told is there or report["receiver_account"] == "bob"
        for keys in ({}, {"id": "nobody"}, {"id": target["id"], "account": "alice"}):
            assert alice.call(api, content="x", **keys) == LOST_WITH_ID
    status, _, body = alice.raw("send_friend_message", id=target["id"])
    assert (status, json.loads(body)["status"]) == (400, "content missing")
    assert alice.call("send_friend_message", id="filehelper", content="later", **{"async": 1}
                      ) == {"code": 0, "status": "request already in execution"}


def test_weixin_at_all_reaches_all_friends(voices):
    alice, bob = voices
    text, answer = os.urandom(4).hex(), {"code": 0, "id": 0, "status": "request already executed"}
    assert alice.call("send_friend_message", id="@all", content=text) == answer
    assert bob.heard(text) and alice.heard(text)["sender"] == "小冰"
    assert alice.post("send_friend_message", id="@all", media_data=PNG, content=text) == answer
    arrives(bob, True, text)


def test_consult_waits_for_the_answer(voices):
    alice, bob = voices
    ice = alice.friend("小冰")["id"]
    answer = alice.call("consult", id=ice, content="what now")
    assert {**answer, "id": ""} == {"code": 0, "id": "", "reply": "what now", "status": "success"}
    silent = alice.call("consult", account=alice.friend("小灰")["account"], content="x", timeout=0)
    assert (silent["code"], silent["reply"], silent["reply_status"]) == (0, None, "reply timeout")
    assert alice.call("consult", id="nobody", content="x") == LOST_WITH_ID
    for bad in {"content": "x", "timeout": "soon"}, {}:
        assert alice.raw("consult", id=ice, **bad)[0] == 400
    with concurrent.futures.ThreadPoolExecutor(1) as crew:
        answer = crew.submit(alice.call, "consult", displayname="bob", content="well?", timeout=20)
        bob.heard("well?")
        bob.call("send_friend_message", displayname="alice", content="indeed")
        assert answer.result(WAIT)["reply"] == "indeed"


@pytest.mark.parametrize("flavor", ["qq", "weixin"])
def test_a_picture_goes_and_comes_though_nothing_can_be_written(start, receive, flavor):
    """From memory, with the text; what has to be kept is 507."""
    receiver, program = receive(), start("controller", "--flavor", flavor)
    own, weixin = os.path.join(program.tmpdir, "own"), flavor == "weixin"
    for name in "alice", "bob":
        program.login(name, post_api=receiver.url + "?", post_event="0", tmpdir=own)
    alice = Voice(program, "alice", "/openwx/" if weixin else "/openqq/", True).now()
    pids = [row["pid"] for row in program.call("check_client")["client"]]

    for text, limit in ("disk full", 0), ("tmpdir lost", resource.RLIM_INFINITY):
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if limit:
            os.rename(own, own + "-lost")
        assert alice.call("send_friend_message", displayname="bob", content=text,
                          media_data=PNG_TEXT)["code"] == 0
        events = [receiver.next(lambda event: text in event["content"]) for _ in range(2)]
        assert {event["post_type"] for event in events} == {"send_message", "receive_message"}
        for event in events:
            if weixin:
                assert base64.b64decode(event["media_data"]) == PNG
                assert (event["media_id"], event["media_path"]) == (None, None)
            else:
                assert event["content"] == text + "[图片]"
                [medium] = event["media"]
                assert (medium["url"], medium["size"]) == (None, str(len(PNG)))
        if weixin:
            status, _, body = alice.raw("upload_media", media_data=PNG_TEXT)
            assert (status, json.loads(body)["code"]) == (507, 507)
            assert json.loads(body)["status"].startswith("the picture cannot be kept: ")
    assert "fault of this program" not in program.log.text()


# -- groups and friends

def test_a_weixin_group_is_made_renamed_and_left(voices):
    alice, bob = voices
    ids = {name: alice.friend(name)["id"] for name in ("bob", "小冰", "小灰")}
    name = "群 " + os.urandom(3).hex()
    made = alice.call("create_group", friends=f"{ids['bob']},{ids['小冰']}", displayname=name)
    group = alice.group(name)
    assert made == {"code": 0, "group_id": group["id"], "status": "success"}
    assert bob.event("new_group", lambda params: params[0]["name"] == name)
    assert group["owner_uid"] == ALICE and set(alice.members(name)) == {"alice", "bob", "小冰"}
    for api, named, place in (("create_group", "friend", {}),
                              ("invite_friend", "friend", {"id": group["id"]}),
                              ("kick_group_member", "member", {"id": group["id"]})):
        for given, code, status in (({}, 200, f"{named} id empty"),
                                    ({named + "s": "@no"}, 100, f"{named} id @no not found")):
            assert alice.call(api, **place, **given) == {"code": code, "status": status}
        if place:
            assert alice.call(api, id="@@no", **{named + "s": ids["小灰"]}) == LOST

    assert alice.call("invite_friend", displayname=name, friends=ids["小灰"]) == OK
    assert bob.event("new_group_member", lambda params: params[0]["name"] == "小灰")
    for id, new, answer in (("@@no", {"new_displayname": "x"}, LOST), (group["id"], {}, FAILED),
                            (group["id"], {"new_displayname": name + "!"}, OK)):
        assert alice.call("set_group_displayname", id=id, **new) == answer
    assert bob.event("group_property_change")[1:] == ["name", name, name + "!"]
    name += "!"
    assert bob.group(name)["displayname"] == name

    assert bob.call("kick_group_member", displayname=name,
                    members=bob.members(name)["小冰"]["id"]) == FAILED
    known = {who: member["id"] for who, member in alice.members(name).items()}
    for key, who, event, lost in (
            ({"displayname": name}, ["小冰", "小灰"], "lose_group_member", "小冰"),
            ({"id": group["id"]}, ["bob"], "lose_group", name)):
        assert alice.call("kick_group_member", **key,
                          members=",".join(known[each] for each in who)) == OK
        assert bob.event(event)[0]["name"] == lost
    assert bob.call("search_group", name=name) == LOST


def test_weixin_names_and_places_can_be_changed(voices):
    alice, _ = voices
    target, group, member = alice.friend("bob"), alice.group(), alice.members()["小冰"]
    for api in "set_friend_markname", "set_markname":
        mark = "mark" + os.urandom(2).hex()
        assert alice.call(api, id=target["id"], new_markname=mark) == OK
        assert alice.event("friend_property_change")[1:] == ["markname", target["markname"], mark]
        target = alice.friend("bob")
        assert (target["markname"], target["displayname"]) == (mark, mark)
        assert alice.call("send_friend_message", markname=mark, content="x")["code"] == 0
        for keys in {"id": "@no"}, {"id": "@no", "group_id": group["id"]}, {
                "id": member["id"], "group_id": "@@no"}:
            assert alice.call(api, new_markname="x", **keys) == LOST
    keys = {"group_id": group["id"], "id": member["id"]}
    for old, new in (None, "冰"), ("冰", ""):
        assert alice.call("set_markname", new_markname=new, **keys) == OK
        alice.event("group_member_property_change", lambda params: params[2:] == [old, new])
        member = alice.members()["小冰"]
        assert (member["markname"] or "", member["displayname"]) == (new, new or "小冰")
    assert alice.call("set_markname", id=target["id"], new_markname="") == OK
    for keys, expected in (({"id": target["id"], "op": 1}, OK), ({"id": group["id"], "op": 0}, OK),
                           ({"id": group["id"], "op": 7}, FAILED), ({"id": "@no"}, LOST)):
        assert alice.call("stick", **keys) == expected


def test_weixin_strangers_become_friends_by_request(voices):
    alice, bob = voices
    me, target = alice.call("get_user_info")["id"], alice.friend("bob")["id"]
    for id, status in (me, "can not be yourself"), (target, "already a friend"):
        assert alice.call("make_friend", id=id) == {"code": 101, "status": status}
    assert alice.call("make_friend", id="@no") == alice.call("make_friend") == LOST
    bob.change("remove", "friend", "alice", "bob")
    alice.event("lose_friend")
    tickets, said = [], {"id": bob.members()["alice"]["id"], "displayname": "alice"}
    for _ in range(2):
        assert alice.call("make_friend", id=target, verify="it is me") == OK
        [asked] = bob.event("friend_request")
        tickets.append(asked.pop("ticket"))
        assert asked == {**said, "verify": "it is me"}
    wrong = bob.call("accept_friend_request", ticket="no", **said)
    assert (wrong["code"], wrong["ticket"]) == (-1, "no")
    assert alice.call("accept_friend_request", ticket=tickets[1])["code"] == -1, "not alice's"
    for accept, ticket in enumerate(tickets):
        assert bob.call("search_friend", name="alice") == LOST
        assert bob.call("accept_friend_request", ticket=ticket, accept=accept, **said) == {
            **OK, "ticket": ticket, **said}
    for voice, name in (alice, "bob"), (bob, "alice"):
        assert voice.event("new_friend")[0]["name"] == name
    assert bob.call("accept_friend_request", ticket=tickets[1])["code"] == -1, "used"
    bob.change("add", "person", "321", name="新人")  # a resident, who says yes
    bob.change("add", "group_member", "321", "OpenQQ")
    member = bob.event("new_group_member", lambda params: params[0]["name"] == "新人")[0]
    assert bob.call("make_friend", id=member["id"]) == OK
    assert bob.event("new_friend", lambda params: params[0]["uid"] == "321")
    bob.change("remove", "person", "321")


def test_weixin_avatars_are_small_pictures(voices):
    alice, _ = voices
    group, gray, found = alice.group()["id"], alice.friend("小灰"), []
    for keys in ({"id": alice.friend("bob")["id"]}, {"id": alice.call("get_user_info")["id"]},
                 {"group_id": group}, {"group_id": group, "id": alice.members()["小灰"]["id"]},
                 {"displayname": "小灰"}, {"account": gray["account"]}):
        status, fields, body = alice.raw("get_avatar", **keys)
        assert (status, fields["content-type"], fields["cache-control"], body[:8]) == (
            200, "image/png", "max-age=3600", b"\x89PNG\r\n\x1a\n")
        found.append(body)
    assert len(set(found)) == 4 and len(set(found[3:])) == 1 and max(map(len, found)) < 4096
    for keys in {}, {"id": "@no"}, {"group_id": "@@no"}, {"group_id": group, "id": "@no"}:
        assert alice.call("get_avatar", **keys) == LOST_WITH_ID


def test_friend_requests_are_answered_in_qq_too(house, receive):
    receiver = receive()
    house.login("frieda", post_api=receiver.url, post_event_list="friend_request,new_friend")
    face = Face(house, "frieda", receiver, True)
    names = [name + os.urandom(3).hex() for name in ("dora", "nora")]
    for accept, name in zip("01", names):
        uid = face.change("add", "person", name=name)
        face.change("add", "friend_request", uid, "frieda", verify="hello")
        [asked] = face.event("friend_request")
        id, ticket = asked["id"], asked["ticket"]
        assert asked == {"id": id, "name": name, "verify": "hello", "ticket": ticket}
        assert face.call("accept_friend_request", accept=accept, ticket=ticket, markname="D",
                         id=id) == {**OK, "displayname": None, "id": id, "ticket": ticket}
    [friend] = face.event("new_friend", lambda params: params[0]["name"] == names[1])
    assert (friend["markname"], friend["id"]) == ("D", id)
    assert face.call("search_friend", name=names[0])["code"] == 100
    for name in names:
        face.change("remove", "person", name)
    house.call("delete_client", client="frieda")


def test_messages_are_taken_back_once_by_their_sender(media_pair):
    alice, bob, weixin = media_pair
    done, failed = [{"code": 0, "status": "revoke " + end} for end in ("success", "failure")]
    for kind, name in [("friend", "bob"), ("group", "OpenQQ")][:1 + weixin]:
        text = os.urandom(4).hex()
        sent = alice.call(f"send_{kind}_message", content=text, displayname=name)["id"]
        got = bob.heard(text)
        assert str(sent).partition(":")[0] == got["id"]
        assert bob.call("revoke_message", id=got["id"]) == failed, "not bob's"
        assert alice.call("revoke_message", id=sent) == done
        if weixin:  # in nobody's default list, and `pair` has the default
            assert bob.event("revoke_message") == [got["id"], ALICE, ALICE, got.get("group_uid")]
        assert alice.call("revoke_message", id=sent) == failed
    for unknown in {}, {"id": "1:@x"}, {"id": ""}:
        assert alice.call("revoke_message", **unknown) == {
            "code": -1, "status": "msg id not found"}


# -- media

MEDIA = {"media_code", "media_ext", "media_id", "media_mime", "media_mtime", "media_name",
         "media_path", "media_size"}


def arrives(bob, weixin, content, data=PNG):
    """The event of a picture that comes with this text; its bytes are checked."""
    want = content if weixin else content + "[图片]"
    got = bob.next(lambda event: event.get("content") == want and event["class"] == "recv")
    if weixin:
        assert MEDIA <= set(got) and base64.b64decode(got["media_data"]) == data
        assert (got["format"], got["media_mime"], got["media_size"]) == (
            "media", "image/png", str(len(data)))
        with open(got["media_path"], "rb") as file:
            assert file.read() == data
    else:
        [medium] = got["media"]
        assert (medium["type"], medium["size"]) == ("image", str(len(data)))
        _, fields, body = request(medium["url"], medium["url"][medium["url"].index("/", 7):])
        assert (fields["content-type"], body) == ("image/png", data)
    return got


def test_a_picture_reaches_the_other_whichever_way_it_is_given(media_pair, gallery):
    """An address may stand in media_path, too, and may lead elsewhere; what was fetched has an id
    by which it is sent again."""
    alice, bob, weixin = media_pair
    path, url = os.path.join(alice.program.tmpdir, "cat.png"), gallery.url + "/cat.png"
    put(path, PNG)

    def send(given, kind="friend", where="bob", data=PNG):
        """The answer, and the event, of a picture that is sent as a form."""
        text = os.urandom(4).hex()
        answer = alice.post(f"send_{kind}_message", displayname=where, content=text, **given)
        assert answer["code"] == 0
        return answer, arrives(bob, weixin, text, data)

    send({"media_data": LARGE}, data=LARGE)
    _, first = send({"media_data": PNG_TEXT})
    _, got = send({"media_path": path})
    os.remove(path)
    assert (got["media_name"] if weixin else got["media"][0]["name"]) == "cat.png"
    send({"media_data": PNG})
    send({"media_url": alice.program.base + (
        bob.target("get_media", id=first["media_id"]) if weixin else urllib.parse.urlsplit(
            first["media"][0]["url"])._replace(scheme="", netloc="").geturl())})
    for there in ("friend", "bob"), ("group", "OpenQQ"):
        for given in ({"media_path": url}, {"media_path": url.replace("http", "HTTP")},
                      {"media_url": url}, {"media_path": gallery.to(gallery.to(url))},
                      {"media_url": gallery.to("/cat.png")}):
            id = send(given, *there)[0]["media_id"]
            assert send({"media_id": id}, *there)[0]["media_id"] == id
            _, fields, body = alice.raw("get_media", id=id)
            assert (fields["content-type"], body) == ("image/png", PNG)
    for more in {}, {"media_path": url, "async": 1}:
        assert "media_id" not in alice.call("send_friend_message", displayname="bob",
                                            content="x", **more)
    alice.post("send_friend_message", displayname="bob", media_data=PNG_TEXT)
    for voice in alice, bob:
        event = voice.next(lambda event: event.get("content", "").startswith(
            "[media](" if weixin else "[图片]"))
        assert not weixin or event["content"] == f"[media]({event['media_path']})"


def test_uploaded_media_is_sent_by_its_id_and_harmless_whatever_it_is(voices, gallery):
    alice, bob = voices
    for given in {"media_data": PNG_TEXT}, {"media_data": PNG}, {
            "media_path": gallery.url + "/cat.png"}:
        row = alice.post("upload_media", **given)
        assert {"code", "status", *MEDIA} == set(row)
        assert (row["code"], row["media_ext"], row["media_mime"], row["media_size"]) == (
            0, "png", "image/png", str(len(PNG)))
        assert row["media_name"] == "cat.png" or given == {"media_data": PNG_TEXT}
        for key in "media_id", "media_path":
            alice.call("send_friend_message", content=row["media_id"] + key, displayname="bob",
                       **{key: row[key]})
            arrives(bob, True, row["media_id"] + key)
    assert alice.raw("upload_media")[0] == 400
    page = b"<script>alert(1)</script>"
    start_of = os.path.join(os.path.realpath(alice.program.tmpdir), "mojo_weixin_media_alice_")
    for name in "../../etc/page.html", "\npage.html\"":
        row = alice.post("upload_media", media_data=page, media_name=name)
        assert re.fullmatch(re.escape(start_of) + r"[0-9a-f]{32}\.[a-z]+", row["media_path"])
        assert os.stat(row["media_path"]).st_mode & 0o777 == 0o600
        _, fields, body = alice.raw("get_media", id=row["media_id"])
        assert (body, fields["content-security-policy"], fields["x-content-type-options"]) == (
            page, "sandbox", "nosniff")


def test_bad_media_is_refused_and_nothing_is_sent(media_pair, tmp_path, gallery):
    alice, bob, _ = media_pair
    tmpdir, outside = alice.program.tmpdir, put(tmp_path / "cat.png", PNG)
    own = [os.path.join(tmpdir, name) for name in os.listdir(tmpdir)
           if name.startswith("mojo_") and "_media_alice_" not in name]
    [cookie] = [name for name in own if "cookie_alice" in name]
    odd = link, cookie_link, fifo, large = [
        os.path.join(tmpdir, name + ".png") for name in ("link", "cookie", "fifo", "large")]
    os.symlink(outside, link)
    os.symlink(cookie, cookie_link)
    os.mkfifo(fifo)
    put(large, LARGE + b"!")

    def refused(**params):
        status, _, body = alice.raw("send_friend_message", displayname="bob", content="bad",
                                    **params)
        assert (params, status) == (params, 400)
        return json.loads(body)

    for path in [outside, "/etc/passwd", link, cookie_link, *own, os.path.join(
            tmpdir, "..", os.path.basename(str(tmp_path)), "cat.png"), "cat.png"]:
        assert refused(media_path=path) == {
            "code": 6, "status": "media_path not allowed: put the file into "
            f"{os.path.realpath(tmpdir)}, or give media_data or media_url"}
    for bad in ("media_path=" + fifo, "media_path=" + large, "media_path=" + tmpdir,
                f"media_path={tmpdir}/none.png", "media_data=%%%", "media_id=" + "0" * 32,
                "media_id=../../etc/passwd", "media_url=file:///etc/passwd", "media_url=data:,x",
                "media_url=http://127.0.0.1:1/", "media_url=nowhere",
                *(f"media_url={gallery.url}{path}" for path in (
                    "/round", "/empty", "/to?file:///etc/passwd", "/to?http://[bad",
                    f"/to?{bob.base}/healthz", "/to?http://127.0.0.1:70000/"))):
        name, _, value = bad.partition("=")
        assert refused(**{name: value})["code"] in (6, 400)
    assert refused(**{f"p{number}": "" for number in range(1_001)})["code"] == 400
    for path in odd:
        os.remove(path)
    for text, data in ("bad" * 30_000, PNG), ("bad", LARGE + b"!"):
        assert alice.post("send_friend_message", displayname="bob", media_data=data,
                          content=text)["code"] == 400
    mark = os.urandom(4).hex()
    assert alice.call("send_friend_message", displayname="bob", content=mark)["code"] == 0
    bob.heard(mark)  # nothing that was sent before comes after it
    assert not [event for event in bob.call("check_event", since=0)
                if event.get("content", "").startswith("bad")]
    assert alice.raw("get_media", id="0" * 32)[0] == alice.raw("get_media")[0] == 404


class Gallery(Peer):
    """A server of pictures: /cat.png is one, /to?URL leads there, /round to itself, /empty has
    nothing."""

    def handle(self, handler):
        path, _, target = handler.requestline.split(" ")[1].partition("?")
        if path in ("/to", "/round"):
            where = urllib.parse.unquote(target) or "/round"
            self.reply(handler, 302, "", fields={"Location": where})
        else:
            self.reply(handler, 200, b"" if path == "/empty" else PNG, "image/png")

    def to(self, url):
        """An address here that leads to another one."""
        return f"{self.url}/to?{urllib.parse.quote(url, safe='')}"


@pytest.fixture(scope="session")
def gallery():
    """One for all tests."""
    found = Gallery()
    yield found
    found.close()


def ways_into(program, port):
    """Addresses of a server of this program, by all the names that lead to it."""
    names = ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0", "0.0.0.0"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))   # nothing is sent; that is how we are called outside
            names.append(probe.getsockname()[0])
    paths = ["/", "/healthz", "/local/scan?ticket=1", "/openqq/get_user_info?client=bob",
             "/openwx/stop_client?client=bob", "/openqq/nope/get_media",
             "/openqq/get_media?client=nobody&id=x", "/openqq/get_media?client=bob&id=x"]
    return [f"http://127.0.0.1:{port}{path}" for path in paths] + [
        f"http://{name}:{port}/openqq/stop_client?client=bob" for name in names]


def test_what_media_a_caller_names_is_never_a_secret_of_another_place(start):
    """cookie_path and its like may lie in tmpdir under any name (start_client takes them)."""
    program = start("controller", "--flavor", "weixin")
    paths = {name: os.path.join(program.tmpdir, name + ".png")
             for name in ("cookie_path", "state_path")}
    program.login("anna", post_secret="hush", **paths)
    program.login("anna_b")
    anna, other = [Voice(program, name, "/openwx/", True) for name in ("anna", "anna_b")]
    for path in [*paths.values(), other.post("upload_media", media_data=PNG)["media_path"]]:
        assert os.path.exists(path)
        assert anna.raw("upload_media", media_path=path)[0] == 400, path


def test_post_media_data_0_leaves_the_bytes_out(start, receive):
    receiver, program = receive(), start("controller", "--flavor", "weixin")
    for name, settings in (("alice", {}), ("bob", {"post_api": receiver.url, "post_media_data": 0}),
                           ("carol", {"download_media": 0})):
        program.login(name, **settings)
    alice, bob, carol = [Voice(program, name, "/openwx/", True)
                         for name in ("alice", "bob", "carol")]
    assert alice.post("send_group_message", displayname="OpenQQ", media_data=PNG,
                      content="look")["code"] == 0
    for event in receiver.message("look"), bob.heard("look"):
        assert "media_data" not in event and event["media_size"] == str(len(PNG))
        assert content(event["media_path"]) == PNG
        assert bob.raw("get_media", id=event["media_id"])[2] == PNG
    got = carol.heard("look")
    assert (got["media_path"], got["media_id"]) == (None, None)
    assert base64.b64decode(got["media_data"]) == PNG
    assert bob.call("delete_client")["code"] == 0
    assert not re.search("media_carol|_bob", " ".join(os.listdir(program.tmpdir))), (
        "of a deleted account stays nothing, its pictures least of all")


# -- pictures that wait

def test_pictures_wait_for_an_account_that_is_away_and_survive_a_kill_of_the_host(start, receive):
    """As the world and the login do."""
    def run():
        program = start("controller", "--flavor", "weixin")
        return [program] + [Voice(program, name, "/openwx/", True) for name in ("alice", "bob")]

    receiver, (program, alice, bob) = receive(), run()
    program.login("alice")
    program.login("bob", post_api=receiver.url)
    ids = [voice.call("get_user_info")["id"] for voice in (alice, bob)]
    assert bob.call("stop_client")["code"] == 0
    pictures = {"waits 0": LARGE, "waits 1": PNG, "waits 2": PNG}
    for text, data in pictures.items():
        assert alice.post("send_friend_message", displayname="bob", content=text,
                          media_data=data)["code"] == 0
    world = in_any_order(everything(program))
    program.process.kill()
    assert all_gone(program.log, WAIT)
    program, alice, bob = run()
    assert in_any_order(everything(program)) == world
    assert bob.call("start_client", post_api=receiver.url)["code"] == 0
    for text, data in pictures.items():
        got = receiver.next(lambda event: event.get("class") == "recv")
        assert (got["content"], base64.b64decode(got["media_data"])) == (text, data), "in order"
    user(program, "alice")
    assert [voice.call("get_user_info")["id"] for voice in (alice, bob)] == ids


def test_more_pictures_than_64_mib_wait_to_be_posted_without_harm(tmp_path):
    begin = functools.partial(openqq.DiskQueue, str(tmp_path / "c"), 10_000, openqq.Log())
    spool = begin()
    for _ in range(10):
        spool.add({"event": "a" * 7_000_000})
    spool.close()
    assert len(begin().pending) == 10


def test_too_many_pictures_that_wait_cost_no_text(network, tmp_path):
    """1,000 messages wait (DESIGN); pictures that are too much for that go, texts stay; also when
    the host starts again."""
    network.ready("bob")
    picture = {"name": "cat.png", "data": "a" * 7_000_000}
    for number in range(15):
        network.deliver("bob", {"do": "message", "content": str(number),
                                "media": picture if number >= 3 else None})
    network.stop()
    again = openqq.LocalNetwork(str(tmp_path / "net"), "", openqq.QQ, openqq.Log(),
                                lambda: "http://x", clock=lambda: network.now[0])
    again.ready("bob")
    found = []
    for items in iter(lambda: again.take("bob"), []):
        found += [int(item["content"]) for item in items]
        again.acknowledge("bob", items[-1]["mark"])
    assert found[:3] == [0, 1, 2] and found[-1] == 14 and found == sorted(found)


def test_weixin_lists_are_compared_again_and_again_and_displaynames_follow(start, receive):
    """A displayname is made of others: neither a refresh nor /local/change sets it."""
    receiver, program = receive(), start("controller", "--flavor", "weixin")
    program.login("walt", update_interval=1, post_api=receiver.url, is_update_friend=1,
                  post_event_list="update_friend")
    walt = Voice(program, "walt", "/openwx/", True)
    for name in "displayname", "__class__", "__dict__", "to_json", "kind":
        walt.change("set", "person", XIAOBING, **{name: "changed"})
    for _ in range(2):
        assert receiver.next()["event"] == "update_friend"
    for name in "小雪", "小冰":
        walt.change("set", "person", XIAOBING, name=name)
        assert eventually(lambda: walt.call("search_friend", displayname=name) != LOST)
    assert "fault of this program" not in program.log.text()


# ------------------------------------------------------------------------------------------------
# What an outsider found
# ------------------------------------------------------------------------------------------------

def test_code_that_expires_is_followed_by_a_new_one_and_the_last_by_the_end(script, receive):
    """With codes of half a second; one is scanned, but never confirmed."""
    receiver = receive()
    client = script(f"""
openqq.TICKET_SECONDS = 0.5
client = openqq.Client(account="alice", tmpdir="{{tmpdir}}", qrcode_count_max=3,
                       post_api={receiver.url!r})
client.load("Openqq", data={{"listen": [{{"host": "127.0.0.1", "port": 0}}]}}, call_on_load=True)
raise SystemExit(client.run())
""")
    for count in 1, 2, 3:  # a code may expire before it is scanned
        url = client.log.wait(r"http://[^ ]*/local/scan[^ )]*", count).group()
        with contextlib.suppress(urllib.error.URLError):
            if urllib.request.urlopen(url).status == 200:
                break
    assert client.process.wait(WAIT) == 0
    told = [receiver.next()]
    while told[-1].get("params", [""])[-1] != "stop":
        told.append(receiver.next())
    assert len({event["params"][1] for event in told if is_qrcode(event)}) == 3
    states = [event["params"][1] for event in told if event["event"] == "state_change"]
    assert [state for state in states if state != "scaning"] == ["loading", "confirming", "stop"]
    client.log.wait(r"\[error\] nobody scanned 3 QR codes")
    assert not os.path.exists(client.path("qrcode_alice.jpg"))


# A key and a certificate for 127.0.0.1 that nobody else trusts, good for a hundred years.
TEST_PEM = """\
-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIDG5S2xpKJGcHX+hbAD2nj/BHEoLj8tsNWZ0pr5VVHNK
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBPzCB8qADAgECAhR2HTiJfWaiG+BnoKnuOfEbBxGG7zAFBgMrZXAwDDEKMAgGA1UEAwwBdDAgFw0yNjExMjgwOTMxNDVa
GA8yMTI2MTEwNDA5MzE0NVowDDEKMAgGA1UEAwwBdDAqMAUGAytlcAMhAHAijmH3NJZlbd/Ms+u6lXzdRu9sh5NRtfTlMwsD
PT8Lo2QwYjAdBgNVHQ4EFgQU1rkg8to9D4aFAay5A3JW1/n86sYwHwYDVR0jBBgwFoAU1rkg8to9D4aFAay5A3JW1/n86sYw
DwYDVR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAUGAytlcANBAGVPZYmdkOdduh7k9Pe9L4faaxSnlD/NSR1obG4/
Hhg/C2M+tolbg1ksTh+pO75Nf/o8LMdlrb8NMDdb7BwlGQc=
-----END CERTIFICATE-----
"""


def seal(peer, pem):
    """Put a Peer on 127.0.0.1 behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    peer.server.socket = context.wrap_socket(peer.server.socket, server_side=True)


def test_post_api_over_tls_gets_one_event_after_the_other_on_one_connection(
        start, receive, tmp_path):
    pem, receiver = put(tmp_path / "tls.pem", TEST_PEM), receive()
    seal(receiver, pem)
    client = start("client", "--account", "alice", "--post-api",
                   receiver.url.replace("http", "https"), env={"SSL_CERT_FILE": pem})
    face = Face(client, "alice", receiver)
    client.call("/local/login", client="alice")
    for number in range(5):
        face.say(number)
    heard = [receiver.next(lambda event: "content" in event)["content"] for _ in range(5)]
    assert heard == ["0", "1", "2", "3", "4"]
    assert client.stop() == 0
    assert "Traceback" not in client.log.text()
    assert receiver.accepted < 3, "each post on a connection of its own"


def test_a_links_calls_need_its_key_and_sense(pair):
    key = {"X-OpenQQ-Key": environment_of(lambda: pair.state("alice")["pid"])["OPENQQ_KEY"]}
    good = b'{"verb":"ready","args":[],"named":{}}'
    for body, fields, status in [
            (good, {}, 403), (good, {"X-OpenQQ-Key": "0" * 32}, 403), (good, key, 200),
            (good.replace(b"ready", b"settle"), key, 404), *((bad, key, 400) for bad in (
                b"", b"{", b"[]", b'{"args":[]}', b"\xff", good.replace(b"[]", b"5"),
                b'{"verb":"ready","args":[]}'))]:
        assert (body, request(pair.base, "/local/link", "POST", body, fields)[0]) == (body, status)


ODD_WORDS = ["", " ", "0", "-1", "²", "１２", "1" * 30, "x" * 100_000, "\t", "\u202e", "*", "{}",
             "小冰", "2854196301", "filehelper", "discuss", "sess_message", "null", "__class__"]
LOCAL_WORDS = {  # what each parameter means, or nothing that makes sense
    "do": ["add", "set", "remove"], "in": ["OpenQQ", "alice", "小灰"], "from": ["小灰", "alice"],
    "what": ["person", "friend", "friend_request", "group", "discuss", "group_member",
             "discuss_member"], "uid": ["alice", "小灰", "77"], "to": ["OpenQQ", "小灰"],
    "type": ["group_message", "discuss_message", "sess_message"], "client": ["alice"],
    "content": ["hello"], "muted": ["1.2.3", ".", "1e5"], "role": ["owner"], "echo": ["1"],
    **dict.fromkeys("name card owner_uid verify id account join_time ticket".split(), [])}


@pytest.mark.parametrize("flavor", ["qq", "weixin"])
def test_whatever_local_calls_are_given_is_answered_and_breaks_no_later_one(start, flavor):
    """8 or 400 for nonsense, never 500."""
    program = start("controller", "--flavor", flavor)
    program.login("alice", numeric_ids="1", check_event_list_max_size="5")
    spin = random.Random(12)
    for _ in range(much(1_000, 20_000)):
        path = spin.choice(["change"] * 6 + ["say"] * 4 + ["scan", "world", "confirm"])
        given = {name: spin.choice(good if good and spin.random() < 0.8 else ODD_WORDS)
                 for name, good in LOCAL_WORDS.items() if spin.random() < (0.9 if good else 0.2)}
        status, _, body = request(program.base, "/local/" + path, "POST", json.dumps(given),
                                  {"Content-Type": "application/json"})
        assert status in (200, 400, 403, 404), (path, given, body)
    program.call("stop_client", client="alice")
    program.login("alice")
    face = Face(program, "alice", controlled=True)
    face.change("add", "person", "4711", name="新人")
    face.change("add", "friend", "4711", "alice")
    assert face.say("a", "4711")["code"] == 0
    assert "fault of this program" not in program.log.text()


NO_CHANGE = [
    {"uid": "小灰", "name": ""}, {"what": "group", "uid": "OpenQQ", "name": " "},
    {"do": "add", "name": ""}, {"do": "add"}, {"do": "add", "uid": "7" * 19},
    {"do": "add", "uid": "²"}, {"do": "add", "uid": "2854196301", "name": "again"},
    {"do": "add", "what": "group", "uid": "20260001", "name": "again"}, {"signature": "x"},
    {"do": "remove"}, {"do": "remove", "what": "group", "uid": ""},
    {"uid": "小灰", "signature": "x" * 5_000}, {"uid": "小灰", "role": "king"},
    {"uid": "小灰", "echo": "yes"}, {"uid": "小灰", "muted": "1.2.3"}]


def test_what_the_network_cannot_read_changes_nothing_and_hits_nobody(start):
    program = start("controller")
    for given in NO_CHANGE:
        answer = program.call("/local/change", **{"do": "set", "what": "person", **given})
        assert answer["code"] == 8, given
        for name in {"role", "echo", "muted"} & set(given):
            assert answer["status"] == f"{name} {given[name]} not found"
    world = program.call("/local/world")
    assert [row["name"] for row in world["people"] + world["groups"]] == ["小冰", "小灰", "OpenQQ"]
    program.login("alice")
    Face(program, "alice").change("remove", "person", "alice")
    program.call("stop_client", client="alice")
    program.login("alice")
    assert program.call("get_user_info", client="alice")["name"] == "alice", "back with the login"
    assert {row["name"] for row in program.call("get_friend_info", client="alice")} == {
        "小冰", "小灰"}


def test_weixin_has_no_discuss_to_change_or_to_speak_in(start, tmp_path):
    """Nor when a world file of the other flavour names one."""
    world = {**openqq.Weixin.world, "discuss": openqq.QQ.world["discuss"]}
    path = put(tmp_path / "world.json", json.dumps(world))
    program = start("controller", "--flavor", "weixin", "--world", path, tmpdir=tmp_path / "t")
    program.login("alice")
    face, there = Face(program, "alice"), {"in": "30260001"}
    for do, kind in itertools.product(("add", "set", "remove"), ("discuss", "discuss_member")):
        assert program.call("/local/change", do=do, what=kind, uid="30260001", name="x",
                            **there)["code"] == 8
    for to in "OpenQQ", "30260001", "":
        assert face.say("x", type="discuss_message", to=to)["code"] == 8


def test_client_whose_own_child_holds_its_life_line_is_seen_to_die(workshop):
    """A plugin may fork: then the end of the line does not tell of the process's end."""
    edit_template(workshop, TEMPLATE.format("""
import time
fork = os.fork()
if fork == 0:
    time.sleep(600)
    os._exit(0)
print("fork", fork, flush=True)
""", ""))
    pid = workshop.login("parent")["pid"]
    child = int(workshop.out.wait(r"fork (\d+)").group(1))
    os.kill(pid, signal.SIGKILL)
    try:
        workshop.log.wait(r"client parent died \(signal 9\)")
    finally:
        os.kill(child, signal.SIGKILL)


def test_client_that_never_comes_to_run_ends_with_its_controller(start):
    controller = start("controller")
    edit_template(controller, "import openqq, time\nopenqq.ORPHAN_SECONDS = 1.5\n"
                              "print('caught', flush=True)\ntime.sleep(600)\n")
    assert controller.call("start_client", client="alice")["code"] == 0
    controller.out.wait("caught")
    controller.process.kill()
    assert all_gone(controller.out), "it outlived its controller"


# ------------------------------------------------------------------------------------------------
# What only few ever do
# ------------------------------------------------------------------------------------------------

def test_a_script_sends_to_groups_discusses_and_strangers(script):
    bot = script("""
client = openqq.Client(account="bot", tmpdir="{tmpdir}", login_type="login", pwd="x")
client.load("Openqq", data={"listen": [{"host": "127.0.0.1", "port": 0}]}, call_on_load=True)

def send(client, fresh):
    group, discuss = [client.roster.search(kind, {"name": "OpenQQ"})[0]
                      for kind in ("group", "discuss")]
    [member] = client.roster.search(group, {"name": "小灰"})
    for sent in (client.send_group_message(group, "a"), client.send_discuss_message(discuss, "b"),
                 client.send_sess_message(member, group, "c"),
                 client.send_group_message(group, "x" * 65537)):
        message = sent.result(10)
        print("sent", message.type, message.code, message.info)

client.on("login", send)
client.run()
""")
    for line in ("group_message 0 发送正常", "discuss_message 0 发送正常", "sess_message 0 发送正常",
                 "group_message -1 数据格式错误"):
        bot.out.wait(f"^sent {line}$")


def test_messages_of_strangers_can_be_ignored(harried):
    bridge, program = harried("--ignore-unknown-id", "1")
    bridge.say_private(50009, "谁", sub_type="other")
    bridge.say_private(20001, "我")
    assert program.receiver.next(lambda event: "content" in event)["content"] == "我"


def test_a_group_has_one_owner_also_when_that_changes(house):
    house.login("first")
    face = Face(house, "first", controlled=True)
    me = face.call("get_user_info")["uid"]
    face.change("add", "group", "777001", owner_uid=me)
    face.change("add", "group_member", XIAOHUI, "777001")
    face.change("set", "group_member", XIAOHUI, "777001", role="owner")
    wanted = (XIAOHUI, "attend", {me: "member", XIAOHUI: "owner"})

    def roles():
        [group] = face.call("search_group", uid="777001")
        return (group["owner_uid"], group["role"],
                {row["uid"]: row["role"] for row in group["member"]})

    assert eventually(lambda: roles() == wanted), roles()


def test_what_cannot_be_so_is_refused_by_the_network_inside(house, weixin_pair):
    house.login("self")
    change = functools.partial(house.call, "/local/change")
    for what in "friend", "friend_request":
        assert change(do="add", what=what, uid="self", **{"in": "self"})["code"] == 8
    assert change(do="set", what="person", uid="self", owner_uid="1")["code"] == 0
    answer = change(do="remove", what="group_member", uid="self", **{"in": change(
        do="add", what="group", name="empty")["uid"]})
    assert (answer["code"], answer["status"]) == (8, "member self not found")
    assert weixin_pair.call("/local/change", do="add", what="group_request", uid="alice",
                            **{"in": "OpenQQ"})["code"] == 8
    for table in "group", "discuss":
        assert change(do="set", what=table, uid="OpenQQ", owner_uid="")["code"] == 8
        assert change(do="set", what=table, uid="OpenQQ", owner_uid="self")["code"] == 0
        [row] = [row for row in house.call(f"get_{table}_info", client="self")
                 if row["name"] == "OpenQQ"]
        mine = house.call("get_user_info", client="self")
        assert row.get("owner_uid", mine["uid"]) == mine["uid"] and row["owner_id"] == mine["id"]


def test_what_is_taken_back_while_its_receiver_is_away_never_comes(house):
    for name in "here", "away":
        house.login(name)
    face = Face(house, "here", controlled=True)
    house.call("stop_client", client="away")
    first, _ = [face.call("send_friend_message", name="away", content=text)
                for text in ("gone", "there")]
    assert face.call("revoke_message", id=first["id"])["code"] == 0
    house.call("start_client", client="away")
    event = house.receiver.next(lambda event: event.get("class") == "recv"
                                and event["sender"] == "here")
    assert event["content"] == "there"


def test_a_full_queue_takes_no_reply_and_nothing_for_all(start, receive):
    full = threading.Event()
    receiver = receive(lambda event: full.wait(WAIT) and (200, {}, {"reply": "ja"}))
    controller = start("controller", "--flavor", "weixin")
    controller.login("alice", post_api=receiver.url, send_interval=600, send_queue_max_size=1)
    for text in "ab":
        controller.call(TO_FRIEND, client="alice", id="filehelper", content=text, **{"async": "1"})
    full.set()
    assert controller.call(TO_FRIEND, client="alice", id="@all", content="c")["code"] == 9
    controller.log.wait("send queue full: a reply is not sent")


def test_what_an_answer_wants_and_cannot_have_is_said_in_the_log(start, receive):
    wish = {"ban": 1, "ban_duration": "x", "kick": "1", "media": ["base64://!"] * 21}
    receiver = receive(lambda event: (200, {}, wish) if event.get("content") == "!" else None)
    controller = start("controller")
    controller.login("owner")
    controller.login("alice", post_api=receiver.url)
    Face(controller, "alice").say("!", type="group_message", to="OpenQQ")
    for said in ("ban_duration in an answer of post_api must be a number of seconds",
                 "mute 20260001, .* failed: no right to it", "kick 20260001, .* failed",
                 "21 media in an answer of post_api: the first 20 are sent",
                 "media in an answer of post_api: media_data is not base64"):
        controller.log.wait(said)


def test_a_table_that_is_watched_outlives_its_server(closing):
    peer = closing(Peer())
    peer.handle = lambda handler: peer.reply(handler, 200, {"code": 0, "client": []})
    with begin_command(peer.url, "status", "--watch") as process:
        out = Log(process.stdout)
        out.wait("no accounts")
        peer.stop()
        Log(process.stderr).wait("^openqq: ")
        before = out.text().count("no accounts")
        peer.start()
        out.wait("no accounts", before + 1)
        process.terminate()


def test_the_page_of_a_controllers_client_says_whose_it_is(pair):
    port = pair.state("alice")["port"]
    status, _, body = request(f"http://127.0.0.1:{port}", "/")
    assert status == 200 and "account alice" in body.decode()
    assert raw_call(port, "/openqq/get_client_info", kind=JSON, body='["jsonp"]')[0] == 200


# ------------------------------------------------------------------------------------------------
# Real QQ: ways in, the mapping, login pages (ONEBOT.md)
# ------------------------------------------------------------------------------------------------

# An account for each way to a bridge; between them every spelling of ids and of messages.
ONEBOT_WAYS = {"ws": {"ids": int, "message_format": "array", "pieces": 5},
               "sse": {"ids": str, "message_format": "string"},
               "webhook": {"ids": str, "message_format": "array", "sse": False, "secret": "s"},
               "ws-too": {"ids": int, "message_format": "string", "unknown": 200, "sse": 1404}}
ONEBOT_EVENTS = ",".join([
    "new_friend", "lose_friend", "new_group", "lose_group", "new_group_member",
    "lose_group_member", "friend_property_change", "group_property_change",
    "group_member_property_change", "friend_request", "revoke_message", "group_request",
    "group_shutup", "group_upload", "poke", "onebot_event", "milky_event"])


class Bridged:
    """An account of a controller on a bridge of its own; on OneBot by a WebSocket where its name
    begins with ws, and sync is on for those only."""

    def __init__(self, program, name, bridge, page=None, **settings):
        self.program, self.name, self.bridge, self.seq = program, name, bridge, 0
        if page:  # that logs it in
            kind = "napcat" if isinstance(page, NapCatPage) else "llbot"
            settings = {"onebot_login": kind, "onebot_login_api": page.url,
                        "onebot_login_token": kind, **settings}
        link, ws = "milky" if isinstance(bridge, MilkyBridge) else "onebot", name.startswith("ws")
        self.hears = bridge.has_ws or bridge.sse if link == "milky" else ws or bridge.sse is True
        self.sync = link == "milky" or ws
        given = {"onebot_secret": bridge.secret, "send_interval": "0",
                 "check_event_list_max_size": "1000", "allow_message_sync": str(int(self.sync)),
                 "post_event_list": ONEBOT_EVENTS, link + "_token": bridge.token,
                 link + "_api": bridge.ws if ws else bridge.url, **settings}
        self.started = program.call("start_client", client=name, **{
            key: value for key, value in given.items() if value})
        if not self.hears:
            bridge.post_to = f"{program.base}/{link}?client={name}"

    def call(self, path, **params):
        return self.program.call(path, client=self.name, **params)

    def state(self):
        return self.call("check_client")["client"][0]

    def until(self, state, error=""):
        """Wait for a state, with this pattern in its error; the state file's row."""
        found = []

        def there():
            row = self.state()
            if row["state"] == state and re.search(error, row.get("error", "")):
                found.append(row)
            return found
        assert eventually(there), (state, error, self.state(), self.program.log.text()[-3000:])
        return found[0]

    def running(self):
        self.until("running")
        if self.hears:
            self.bridge.connected()
        return self

    def up_to_a_word(self):
        """What was reported since the last time, up to a word that a friend says now; one that does
        not come is a failure in words."""
        word, found, end = os.urandom(6).hex(), [], time.monotonic() + WAIT
        self.bridge.say_private(20001, word)
        while word not in [event.get("content") for event in found]:
            assert time.monotonic() < end, (self.state(), found, self.program.log.text()[-3000:])
            for event in self.call("check_event", since=self.seq, timeout=1):
                self.seq = event["seq"]
                found.append(event)
        assert not self.bridge.faults
        return found[:-1]

    def said(self):
        """The messages among these."""
        return [event["content"] for event in self.up_to_a_word() if "content" in event]

    def events_of(self, *acts):
        """What is reported of what the bridge tells in each act."""
        self.up_to_a_word()
        for act in acts:
            act(self.bridge)
        return self.up_to_a_word()


@contextlib.contextmanager
def on_bridges(program, bridges):
    """An account of this controller for each bridge, running, by name."""
    with contextlib.ExitStack() as stack:
        for bridge in bridges.values():
            stack.callback(bridge.close)
        accounts = {name: Bridged(program, name, bridge) for name, bridge in bridges.items()}
        for account in accounts.values():
            account.running()
        yield accounts


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """A controller for accounts on bridges."""
    with serving(tmp_path_factory.mktemp("exchanged"), "controller") as program:
        yield program


@pytest.fixture
def another(exchanged):
    """another(bridge, name, settings…) makes an account with that controller, which ends with the
    test, as its bridge does."""
    accounts = []

    def begin(bridge, name="", **settings):
        accounts.append(Bridged(exchanged, name or "m" + os.urandom(4).hex(), bridge, **settings))
        return accounts[-1]

    yield begin
    for account in accounts:
        account.call("delete_client")
        account.bridge.close()


@pytest.fixture
def closing():
    """closing(peer): the same, and it is closed when the test is over."""
    with contextlib.ExitStack() as stack:
        yield lambda peer: stack.enter_context(contextlib.closing(peer))


@pytest.fixture(scope="module")
def bridged(exchanged):
    """An account for each way, running; for tests that leave it as it was."""
    bridges = {name: Bridge(token="t0ken", **quirks) for name, quirks in ONEBOT_WAYS.items()}
    for bridge in bridges.values():
        bridge.friends.append({"user_id": "20003", "nickname": "", "remark": None,
                               "categoryName": "同事", "sex": "male"})
        bridge.groups += [
            {"group_id": 30002, "group_name": "二群", "group_remark": "备注", "members": [
                bridge.member(10001, "admin"), bridge.member(40002, "owner", card="群主")]},
            {"group_id": 30003, "group_name": "三群", "max_member_count": "500",
             "members": [bridge.member(10001), bridge.member(40002, "owner")]}]
    with on_bridges(exchanged, bridges) as accounts:
        yield accounts


@pytest.fixture(params=["ws", "sse"])
def qq(request, bridged):
    """Two of these accounts, which differ in all that the others do: the others are for a look."""
    return bridged[request.param]


@pytest.fixture(params=list(ONEBOT_WAYS))
def each_way(request, bridged):
    """Each of these accounts."""
    return bridged[request.param]


def test_who_is_there_on_qq_is_told_in_the_documented_words(each_way):
    qq = each_way
    user = qq.call("get_user_info")
    assert (user["id"], user["uid"], user["account"], user["name"], user["state"]) == (
        "10001", "10001", "10001", "阿猫", "online")
    shown = ("id", "uid", "name", "markname", "category")
    assert [tuple(row[name] for name in shown) for row in qq.call("get_friend_info")] == [
        ("20001", "20001", "小明", "老明", None), ("20002", "20002", "小红", None, None),
        ("20003", "20003", "20003", None, "同事")]
    shown = ("id", "uid", "name", "markname", "role", "max_member")
    groups = [("30001", "30001", "一家人", None, "create", 2000),
              ("30002", "30002", "二群", "备注", "manage", 2000),
              ("30003", "30003", "三群", None, "attend", 500)]
    for path in "get_group_basic_info", "get_group_info":
        assert [tuple(row[name] for name in shown) for row in qq.call(path)] == groups
    family, second, _ = qq.call("get_group_info")
    assert (family["owner_id"], family["owner_uid"], second["owner_id"]) == (
        "10001", "10001", "40002")
    shown = ("id", "uid", "name", "card", "role", "join_time", "last_speak_time")
    assert [tuple(row[name] for name in shown) for row in family["member"]] == [
        ("10001", "10001", "网友10001", None, "owner", "1500000000", "1600000000"),
        ("20001", "20001", "小明", "爸", "member", "1500000000", "1600000000"),
        ("40001", "40001", "路人", None, "admin", "1500000000", "1600000000")]
    assert qq.call("get_discuss_info") == []


def private(user_id, text="好", **more):
    return lambda bridge: bridge.say_private(user_id, text, **more)


def in_group(group_id, user_id, text="好", **more):
    return lambda bridge: bridge.say_group(group_id, user_id, text, **more)


IN_FAMILY = {"type": "group_message", "group": "一家人", "group_id": "30001", "group_uid": "30001"}
BY_PASSER = {"sender": "路人", "sender_id": "40001", "sender_uid": "40001"}
SESSION = dict(IN_FAMILY, **BY_PASSER, type="sess_message", via="group")
QQ_MESSAGES = [  # and what tells of them
    (private(20001), {"type": "friend_message", "sender": "老明", "sender_id": "20001",
                      "sender_uid": "20001"}),
    (private(50009, sub_type="other", sender={"user_id": 50009, "nickname": "谁"}),
     {"type": "friend_message", "sender": "谁", "sender_id": "50009"}),
    (private(50008, sub_type="other", sender={}), {"sender": "50008", "sender_uid": "50008"}),
    (in_group(30001, 40001), {**IN_FAMILY, **BY_PASSER}),
    (in_group(30002, 40002), {"group": "备注", "group_id": "30002", "sender": "群主"}),
    (in_group(30001, 20001), {**IN_FAMILY, "sender": "老明"}),
    (in_group(30001, 80000000, sub_type="anonymous", anonymous={
        "id": 7, "name": "大力", "flag": "f"}), {**IN_FAMILY, "sender": "大力"}),
    # temporary sessions, of NapCat's and of LLBot's
    (private(40001, sub_type="group", group_id=30001), SESSION),
    (private(40001, sub_type="group", sender={"user_id": 40001, "nickname": "路人",
                                              "group_id": 30001}), SESSION),
    (private(20001, group_id=0), {"type": "friend_message"})]


def test_messages_on_qq_say_where_they_come_from_and_who_wrote_them(each_way):
    each_way.call("get_group_info")
    for act, wanted in QQ_MESSAGES:
        [event] = each_way.events_of(act)
        shown = {"post_type": "receive_message", "class": "recv", "receiver": "阿猫",
                 "content": "好", "receiver_id": "10001", "receiver_uid": "10001",
                 "raw_message": "好", **wanted}
        assert {name: event.get(name) for name in shown} == shown
        assert ("group" in event, "via" in event) == (
            event["type"] != "friend_message", event["type"] == "sess_message"), wanted
        assert re.fullmatch("[0-9]+", event["id"]) and abs(int(event["time"]) - time.time()) < WAIT


def segment(kind, **data):
    return {"type": kind, "data": data}


def text_of(text):
    return [segment("text", text=text)]


PICTURE = "http://127.0.0.1:9/a.png?x=1&y=[2],3"
NEWS_CARD = {"title": "标题", "desc": "说明", "jumpUrl": "https://h.example/a?b=1&c=2"}


def card_of(**row):
    return [segment("json", data=json.dumps(row, ensure_ascii=False))]


CARD_OF_XML = ('<?xml version="1.0"?><msg brief="[分享] 甲 &amp; 乙" '
               'url="http://h.example/?a=1&amp;b=2"><title>题</title></msg>')
QQ_SEGMENTS = [  # codes or segments, and how they read
    ("a&amp;b&#91;c&#93;,d=e", "a&b[c],d=e"),
    ("&#91;CQ:at,qq=1&#93;&amp;amp;&amp;#91;", "[CQ:at,qq=1]&amp;&#91;"),
    ("[CQ:at,qq=40001]来", "@路人 来"), ("[CQ:at,qq=20001][CQ:at,qq=99999]", "@爸 @99999 "),
    ("[CQ:at,qq=99998,name=老友]", "@老友 "), ("[CQ:at,qq=40001]\n来", "@路人 \n来"),
    ([segment("at", qq="all"), *text_of("  "), *text_of(" 来 吗")], "@全体成员 来 吗"),
    ("[CQ:at,qq=40001][CQ:at,qq=20001] 来", "@路人 @爸 来"),
    ([*text_of("看"), segment("image", file="A.png", url=PICTURE)], "看[图片]"),
    ("[CQ:face,id=14][CQ:record,file=A.amr][CQ:video,file=A.mp4]", "[表情][语音][视频]"),
    ("[CQ:file,file=A.doc]", "[文件]A.doc"), ("[CQ:reply,id=-7]对", "对"),
    (card_of(prompt="[分享]标题", meta={"news": NEWS_CARD}),
     "[分享]标题 https://h.example/a?b=1&c=2"),
    (card_of(meta={"x": {"desc": "说明", "url": "m.qq.com/a"}}), "说明"),
    (card_of(prompt="[QQ小程序]视频", meta={"detail_1": {
        "url": "m.q.qq.com/a", "qqdocurl": "https://b23.example/x"}}),
     "[QQ小程序]视频 https://b23.example/x"),
    (card_of(meta=[1], prompt=5, title=None) + card_of(prompt=None)
     + [segment("json", data="{"), segment("json", data="[1]")], "5[json][json][json]"),
    ([segment("xml", data=CARD_OF_XML)], "[分享] 甲 & 乙 http://h.example/?a=1&b=2"),
    ("[CQ:xml,data=<msg><title size='3'>题</title></msg>][CQ:xml,data=<title<title]", "题[xml]"),
    ("[CQ:forward,id=F1,summary=查看3条转发消息][CQ:markdown,content=# 一\n二]",
     "查看3条转发消息# 一\n二"),
    ("[CQ:mface,summary=&#91;汪汪&#93;,emoji_id=1][CQ:image,file=A,summary=&#91;动画表情&#93;]",
     "[汪汪][动画表情]"),
    ("[CQ:image,file=A,summary=][CQ:file,name=甲\n乙.doc,file_id=1]", "[图片][文件]甲 乙.doc"),
    ("[CQ:share,title=题,url=http://h][CQ:music,type=qq,id=1][CQ:location,lat=1,lon=2,title=家]"
     "[CQ:contact,type=qq,id=5][CQ:poke,type=1,id=1][CQ:dice,result=4]",
     "[分享]题 http://h[音乐][位置]家[名片]5[戳一戳][骰子]4"),
    ([segment(kind) for kind in ("rps", "node", "at", "face", "image", "file", "json", "xml",
                                 "forward", "markdown", "mface", "share", "strange")],
     "[猜拳][聊天记录][at][表情][图片][文件][json][xml][聊天记录][markdown][mface][分享][strange]")]


def test_segments_become_readable_text_and_the_codes_are_told_besides(qq):
    for said, text in QQ_SEGMENTS:
        rows = cq_segments(said) if isinstance(said, str) else said
        [event] = qq.events_of(in_group(30001, 40001, rows))
        assert (event["content"], event["raw_message"]) == (text, cq_string(rows))


def test_pictures_that_come_are_told_with_the_bridges_url_and_raw_message_is_made(qq):
    rows = [segment("image", file="A.png", url=PICTURE, file_size="512"),
            segment("record", file="B.amr"), segment("video", url="https://h/v.mp4", name="v"),
            segment("file", file="C.doc", url="file:///etc/passwd")]
    [event] = qq.events_of(private(20001, rows, raw_message=None))
    assert event["content"] == "[图片][语音][视频][文件]C.doc"
    assert event["raw_message"] == cq_string(rows)
    assert event["media"] == [
        {"type": "image", "url": PICTURE, "name": "A.png", "size": "512"},
        {"type": "audio", "url": None, "name": "B.amr", "size": None},
        {"type": "video", "url": "https://h/v.mp4", "name": "v", "size": None},
        {"type": "file", "url": None, "name": "C.doc", "size": None}]


ODD_MESSAGES = [
    (None, ""), (5, "5"), (True, "[?]"), ({"type": "at", "data": {"qq": "all"}}, "@全体成员 "),
    ([["一", [text_of("二")]], 3, None, False, {"type": "text"}], "一二3[?][?][text]"),
    ([{"type": "at", "data": data} for data in (None, [1], "x", True)], "[at]" * 4),
    ([segment("text", text=text) for text in (5, None, True, [1], {"a": 1})], "5" + "[text]" * 4),
    ([segment("at", qq=qq) for qq in (None, 0, True, [1], {"a": None})], "[at]" * 5),
    ([segment("at", qq=99997.0)], "@99997 "),
    ([{"type": kind, "data": {}} for kind in (None, 5, True, [], {}, "a]b", "x" * 99, "")] + [{}],
     "[?][5][?][?][?][?][?][?][?]"),
    ([segment("file", name=None), segment("file", name=True), segment("mface", summary={"a": 1}),
      segment("forward", summary=[None], news=[None, {"text": None}, {"text": "甲: 乙"}]),
      segment("json", data={"prompt": "对象"}), segment("json", data=None),
      segment("xml", data=5), segment("share", title={"a": 1}, url=None)],
     "[文件][文件][mface]甲: 乙对象[json][xml][分享]"),
    ("[CQ:at][CQ:at,qq][CQ:at,qq=]好[CQ:strange,a=1]", "[at][at][at]好[strange]"),
    ([segment("file", name="\x1b[2J\r\n甲")], "[文件][2J 甲"),
    ([segment("strange", deep=json.loads("[" * 200 + "]" * 200))], "[strange]")]


def test_whatever_stands_in_a_message_reads_as_text_or_a_label_and_no_python(bridged):
    for message, text in ODD_MESSAGES:
        [event] = bridged["ws"].events_of(notice(
            message_type="group", sub_type="normal", group_id=30001, user_id=40001,
            sender={"user_id": 40001, "nickname": "路人"}, message=message))
        assert event["content"] == text, message
        assert not re.search("None|True|False|{'", event["content"] + event["raw_message"]), message


def test_ten_thousand_segments_are_read_at_once_and_ask_for_few_names(bridged):
    me = bridged["ws"]
    count = len(me.bridge.calls)
    rows = [segment("at", qq=str(900000 + number)) for number in range(10_000)]
    me.up_to_a_word()
    me.bridge.say_group(30001, 40001, rows)
    found = []  # it takes longer than the word in another conversation
    assert eventually(lambda: found.extend(me.up_to_a_word()) or found)
    [event] = found
    assert event["content"].startswith("@900000 @900001 ")
    assert len(event["content"].encode()) <= openqq.CONTENT_LIMIT
    asked_for = [action for action, _ in me.bridge.calls[count:]]
    assert asked_for.count("get_group_member_info") == openqq.AT_LIMIT
    nested = {}
    for _ in range(200):
        nested = {"deep": nested}
    [event] = me.events_of(private(20001, [segment("strange", deep=nested)], raw_message=None))
    assert event["content"] == "[strange]"


def test_the_time_of_an_event_is_the_bridges_where_it_tells_one(bridged):
    before = int(time.time())
    for told, known in ((1600000123, "1600000123"), ("1600000124", "1600000124"),
                        (0, None), ("soon", None), (None, None), (1e999, None)):
        [event] = bridged["ws"].events_of(notice(
            notice_type="friend_recall", user_id=20001, time=told, message_id=next(TIMES)))
        assert event["time"] == known or not known and before <= int(event["time"]) <= time.time()


OWN_MESSAGES = [
    ({"message_type": "private", "target_id": 20001},
     {"type": "friend_message", "receiver": "老明", "receiver_id": "20001"}),
    ({"message_type": "group", "group_id": 30001}, {**IN_FAMILY, "receiver": None}),
    ({"message_type": "group", "group_id": 30001, "post_type": "message"}, IN_FAMILY),  # LLBot's
    ({"message_type": "private", "sub_type": "group", "group_id": 30001, "target_id": 40001},
     {"type": "sess_message", "via": "group", "receiver": "路人", "receiver_id": "40001",
      "group_id": "30001"})]


def test_messages_of_ones_own_from_elsewhere_are_told_where_sync_is_on(qq):
    qq.call("get_group_info")  # so that the member is known
    for more, wanted in OWN_MESSAGES:
        events = qq.events_of(lambda bridge: bridge._message("出门", **dict({
            "post_type": "message_sent", "sub_type": "friend", "user_id": 10001,
            "sender": {"user_id": 10001, "nickname": "阿猫"}}, **more)))
        assert len(events) == int(qq.sync), events
        for event in events:
            shown = {"post_type": "send_message", "class": "send", "source": "outer", "code": 0,
                     "sender": "阿猫", "sender_id": "10001", "content": "出门", "msg": "发送成功",
                     **wanted}
            assert {name: event.get(name) for name in shown} == shown


TIMES = itertools.count(1600000000)  # events that are alike but for their time are two


def notice(**event):
    event.setdefault("time", next(TIMES))
    return lambda bridge: bridge.emit(**event)


def asked(event):
    """An event as (name, what tells of each of its params), a message as (sender, content)."""
    def short(value):
        if isinstance(value, dict) and "ticket" in value:
            return tuple(value[name] for name in ("id", "name", "verify", "ticket"))
        return value["uid"] if isinstance(value, dict) else value
    return ((event["event"], *map(short, event["params"])) if "event" in event else
            (event["sender"], event["content"]))


def comes(group_id, user_id, **more):
    return notice(**dict({"notice_type": "group_increase", "sub_type": "approve",
                          "group_id": group_id, "user_id": user_id, "operator_id": 40001}, **more))


def goes(group_id, user_id, sub_type, **more):
    return notice(notice_type="group_decrease", sub_type=sub_type, group_id=group_id,
                  user_id=user_id, operator_id=40001, **more)


def card(new, old):
    return notice(notice_type="group_card", group_id=30001, user_id=40001, card_new=new,
                  card_old=old)


def admin(group_id, user_id, sub_type):
    return notice(notice_type="group_admin", sub_type=sub_type, group_id=group_id,
                  user_id=user_id)


MEMBER_MOVES = [("new_group_member", "50001", "30001"), ("lose_group_member", "50001", "30001")]
GROUP_MOVES = [("new_group", "30009"), ("lose_group", "30009")]
QQ_NOTICES = [  # each changes something and changes it back; and what they are told as
    ([comes(30001, 50001), goes(30001, 50001, "leave")], MEMBER_MOVES),
    ([comes(30001, 50001, sub_type="invite"), goes(30001, 50001, "kick")], MEMBER_MOVES),
    *(([comes(30009, 10001), goes(30009, who, how)], GROUP_MOVES) for who, how in (
        (10001, "leave"), (10001, "kick_me"), (40001, "disband"))),
    ([card("新", ""), card("", "新")], [
        ("group_member_property_change", "40001", "card", None, "新"),
        ("group_member_property_change", "40001", "card", "新", None)]),
    ([admin(30001, 20001, "set"), admin(30001, 20001, "unset")], [
        ("group_member_property_change", "20001", "role", "member", "admin"),
        ("group_member_property_change", "20001", "role", "admin", "member")]),
    ([admin(30003, 10001, "set"), admin(30003, 10001, "unset")], [
        ("group_property_change", "30003", "role", "attend", "manage"),
        ("group_member_property_change", "10001", "role", "member", "admin"),
        ("group_property_change", "30003", "role", "manage", "attend"),
        ("group_member_property_change", "10001", "role", "admin", "member")]),
    ([notice(notice_type="notify", sub_type="group_name", group_id=30003, user_id=40002,
             name_new=name) for name in ("新名", "三群")], [
        ("group_property_change", "30003", "name", "三群", "新名"),
        ("group_property_change", "30003", "name", "新名", "三群")]),
    ([notice(request_type="friend", user_id=50007, comment="我是", flag="F-1")],
     [("friend_request", ("50007", "新友", "我是", "F-1"))]),
    ([notice(notice_type="group_recall", group_id=30001, user_id=20001, operator_id=40001,
             message_id=-77)], [("revoke_message", "-77", "20001", "40001", "30001")]),
    ([notice(notice_type="friend_recall", user_id=20001, message_id=78)],
     [("revoke_message", "78", "20001", "20001", None)]),
    ([notice(meta_event_type="heartbeat", status={"online": True, "good": True}, interval=5),
      notice(notice_type="group_card"), notice(notice_type="notify", sub_type="group_name"),
      notice(request_type="group", sub_type="add", group_id=30001, user_id=20001),
      notice(request_type="else", user_id=20001), notice(post_type="else")], [])]


def test_notices_and_requests_become_the_documented_events(each_way):
    each_way.call("get_group_info")
    each_way.bridge.strangers = [{"user_id": 50007, "nickname": "新友"}]
    before = each_way.call("get_group_info")
    for acts, wanted in QQ_NOTICES:
        assert [asked(event) for event in each_way.events_of(*acts)] == wanted
        assert each_way.call("get_group_info") == before, wanted


def test_who_is_new_is_told_once_and_before_what_was_written(qq):
    names = {50006: "小强", 50005: "小刚", 50004: "新人"}
    qq.bridge.strangers = [{"user_id": uid, "nickname": name} for uid, name in names.items()]
    qq.bridge.answers["get_group_member_info"] = {"retcode": 1200}  # so the message counts
    qq.call("get_group_info")

    def twice(act, *place):
        said = {"user_id": place[-1], "nickname": names[place[-1]], "role": "admin"}
        return [act(*place, str(number), sender=said) for number in range(2)]

    added = notice(notice_type="friend_add", user_id=50006)
    events = qq.events_of(added, added, private(50006, "在吗"), *twice(private, 50005),
                          *twice(in_group, 30003, 50004), *twice(in_group, 30008, 50004))
    assert [asked(event) for event in events] == [
        ("new_friend", "50006"), ("小强", "在吗"),
        ("new_friend", "50005"), ("小刚", "0"), ("小刚", "1"),
        ("new_group_member", "50004", "30003"), ("新人", "0"), ("新人", "1"),
        ("new_group", "30008"), ("新人", "0"), ("新人", "1")]
    assert [params for action, params in qq.bridge.calls if action == "get_stranger_info"
            ].count({"user_id": "50006"}) == 1
    assert qq.call("search_friend", id="50006")[0]["name"] == "小强"
    qq.bridge.wait_call("get_group_member_info", lambda got: got["user_id"] == "50004")
    assert len(qq.events_of(twice(in_group, 30003, 50004)[0])) == 1  # who has this role still
    qq.bridge.answers.clear()
    qq.events_of(goes(30003, 50004, "leave"), goes(30008, 10001, "leave"))


def test_before_members_are_loaded_events_tell_who_it_is_and_load_none(another):
    me = another(Bridge(ids=str), "ws-early").running()
    two = [in_group(30001, 40001, [segment("at", qq="20001"), segment("text", text=text)],
                    sender={"user_id": 40001, "nickname": "路人", "card": "过客"})
           for text in "12"]
    events = me.events_of(
        *two, card("新", "过客"), comes(30001, 50001), goes(30001, 20001, "leave"),
        admin(30001, 40001, "unset"), private(40001, sub_type="group", group_id=30001))
    assert [asked(event) for event in events] == [
        ("过客", "@爸 1"), ("过客", "@爸 2"),
        ("group_member_property_change", "40001", "card", "过客", "新"),
        ("new_group_member", "50001", "30001"), ("lose_group_member", "20001", "30001"),
        ("group_member_property_change", "40001", "role", "admin", "member"), ("40001", "好")]
    actions = [action for action, _ in me.bridge.calls]
    assert "get_group_member_list" not in actions
    assert actions.count("get_group_member_info") == 2  # for the name after @, for who came


TO_FRIEND, TO_GROUP = "send_friend_message", "send_group_message"
PERSON_THERE, GROUP_THERE = {"user_id": "20001"}, {"group_id": "30001"}
QQ_CALLS = [  # a call and its params, the action that it asks for and the action's
    (TO_FRIEND, {"displayname": "老明", "content": "[CQ:at,qq=all]&amp;<>"}, "send_private_msg",
     {**PERSON_THERE, "message": text_of("[CQ:at,qq=all]&amp;<>")}),
    (TO_GROUP, {"uid": "30001", "content": "hi"}, "send_group_msg",
     {**GROUP_THERE, "message": text_of("hi")}),
    (TO_GROUP, {"id": "30001", "cq": "1", "content":
                "a[CQ:at,qq=20001]&#91;[CQ:image,file=http://h/p.png?a&amp;b&#44;c]"},
     "send_group_msg", {**GROUP_THERE, "message": [
         *text_of("a"), segment("at", qq="20001"), *text_of("["),
         segment("image", file="http://h/p.png?a&b,c")]}),
    ("send_sess_message", {"group_id": "30001", "id": "40001", "content": "hi"},
     "send_private_msg", {**GROUP_THERE, "user_id": "40001", "message": text_of("hi")}),
    *((TO_FRIEND, {"id": "20001", name: "http://h/p.png"}, "send_private_msg", {
        **PERSON_THERE, "message": [segment("image", file="http://h/p.png", name="p.png")]})
      for name in ("media_url", "media_path")),
    (TO_GROUP, {"id": "30001", "content": "看", "media_data": PNG_TEXT, "media_name": "猫.png"},
     "send_group_msg", {**GROUP_THERE, "message": [
         *text_of("看"), segment("image", file="base64://" + PNG_TEXT, name="猫.png")]}),
    *(("shutup_group_member", {"group_id": "30001", "member_id": members, "time": "2"},
       "set_group_ban", {**GROUP_THERE, "user_id": "40001", "duration": 120})
      for members in ("40001", "20001,40001")),
    ("kick_group_member", {"group_uid": "30001", "member_uid": "40001"}, "set_group_kick",
     {**GROUP_THERE, "user_id": "40001", "reject_add_request": False}),
    *(("accept_friend_request", {"ticket": "F-" + accept, "accept": accept, "markname": "老友"},
       "set_friend_add_request", {"flag": "F-" + accept, "approve": accept == "1",
                                  "remark": "老友"}) for accept in "10")]


def test_each_call_asks_the_bridge_for_the_action_of_the_table_which_may_decline(each_way):
    bridge = each_way.bridge
    for path, params, action, wanted in QQ_CALLS:
        if not action.startswith("send_"):
            bridge.answers[action] = {"retcode": 100, "wording": "没有权限"}
            assert each_way.call(path, **params)["code"] == (-1 if "ticket" in params else 201)
            del bridge.answers[action]
        assert each_way.call(path, **params)["code"] == 0, params
        bridge.wait_call(action, lambda got, wanted=wanted: got == wanted)
    each_way.events_of(comes(30001, 40001))  # who was kicked


def test_a_picture_on_this_machine_is_fetched_by_us_and_never_by_the_bridge(qq, gallery):
    path = put(os.path.join(qq.program.tmpdir, f"图 片-{qq.name}.png"), PNG)
    for given in ({"media_path": path}, {"media_url": gallery.url + "/cat.png"},
                  {"media_path": gallery.url.replace("127.0.0.1", "localhost") + "/cat.png"}):
        assert qq.call(TO_FRIEND, id="20001", **given)["code"] == 0
        [url] = given.values()
        qq.bridge.wait_call("send_private_msg", lambda got: got["message"] == [segment(
            "image", file="base64://" + PNG_TEXT, name=os.path.basename(url))])
    code = f"[CQ:image,file={gallery.url}/cat.png]"  # somebody else's server is no such thing
    assert qq.call(TO_GROUP, id="30001", content=code, cq="1")["code"] == 0
    qq.bridge.wait_call("send_group_msg", lambda got: got["message"] == [
        segment("image", file=gallery.url + "/cat.png")])


def cq_value(text):
    return openqq.cq_escape(text, True)


LOCAL_FILES = ["[CQ:image,file=/etc/passwd]", "[CQ:image,file=\\\\host\\share\\x.png]",
               "[CQ:record,file=FILE:///etc/passwd]", "[CQ:image,file=C:\\x.png]",
               "[CQ:image,file=x.png,url=file:///etc/passwd]", "[CQ:image,url=ftp://h/x]",
               "hi [CQ:file,path=/etc/passwd]", "[CQ:video,cover=..\\x]", "[CQ:image,file=FILE:x]",
               "[CQ:node,name=a,uin=1,content=&#91;CQ:image&#44;file=file:///etc/passwd&#93;]"]


# Addresses of this program, as others might read them.
AMBIGUOUS = ["http://127.0.0.1.:{port}/x", "http://%31%32%37.0.0.1:{port}/x",
             "http://127.0.0.1:{port}\\@h.invalid/x", "http://127.0.0.1:{port}\t@h.invalid/x",
             "http://0177.0.0.1.:{port}/x", "http://localhost%2e:{port}/x", "http://0x:{port}/x",
             "http://x.localhost:{port}/x", "http://127.0x.1:{port}/x",
             "http://\U0001fbf1\U0001fbf2\U0001fbf7.0.0.1:{port}/x"]


def test_nothing_makes_a_bridge_call_this_program_or_read_a_file_of_its_machine(qq, gallery):
    count, port = len(qq.bridge.calls), qq.program.port
    own, odd = ways_into(qq.program, port), [url.format(port=port) for url in AMBIGUOUS]
    refused = [{"media_url": url} for url in own + odd[::2]]
    refused += [{"media_path": gallery.to(url)} for url in own]
    codes = LOCAL_FILES + [f"[CQ:image, File={odd[0]}]"] + [f"[CQ:image,file={u}]" for u in odd]
    for url in [*own, "http://169.254.169.254/x"]:
        codes += [f"[CQ:image,file={cq_value(url)}]", f"[CQ:record,url={cq_value(url)}]",
                  f"[CQ:node,content={cq_value(f'[CQ:image,file={cq_value(url)}]')}]",
                  f"[CQ:image,file={cq_value(gallery.to(url))}]"]
    for params in refused + [{"content": code, "cq": "1"} for code in codes]:
        answer = qq.call(TO_FRIEND, id="20001", **params)
        assert answer["code"] in (400, 6), (params, answer)
        if params.get("content") in LOCAL_FILES:
            assert (answer["code"], "not allowed" in answer["status"]) == (6, True), params
    assert "send_private_msg" not in [action for action, _ in qq.bridge.calls[count:]]


QQ_OUTCOMES = [
    ({}, 0, "发送正常"), ({"retcode": 1}, 0, "发送正常"),
    ({"retcode": "1404", "wording": "风控"}, -4, "风控"),
    ({"retcode": 0, "status": "failed", "wording": "不"}, -4, "不"),
    ({"retcode": 100, "wording": "", "message": ""}, -4, "retcode 100"),
    ({"retcode": 100, "wording": "", "message": "消息"}, -4, "消息")]


def test_what_the_bridge_answers_to_a_message_is_its_outcome_and_is_final(qq):
    for row, code, info in QQ_OUTCOMES:
        qq.bridge.answers["send_group_msg"] = row
        count = len(qq.bridge.calls)
        answer = qq.call(TO_GROUP, id="30001", content="试")
        del qq.bridge.answers["send_group_msg"]
        assert (answer["code"], answer["info"]) == (code, info), row
        assert [action for action, _ in qq.bridge.calls[count:]].count("send_group_msg") == 1


def test_messages_sent_and_received_are_taken_back_by_their_numbers(qq):
    sent = qq.call(TO_FRIEND, id="20001", content="错")
    [came] = qq.events_of(in_group(30001, 40001))[-1:]
    for name in sent["id"], came["id"]:
        assert qq.call("revoke_message", id=name) == {"code": 0, "status": "revoke success"}
        number = qq.bridge.wait_call("delete_msg")["message_id"]
        assert re.fullmatch("70[0-9]+", str(number)) and str(number) == str(name)
    for unknown in "", "x", "1.5":
        assert qq.call("revoke_message", id=unknown)["code"] == -1
    qq.bridge.answers["delete_msg"] = {"retcode": 100, "wording": "没有权限"}
    assert qq.call("revoke_message", id=sent["id"]) == {"code": 0, "status": "revoke failure"}
    del qq.bridge.answers["delete_msg"]


def test_no_answer_but_a_hang_up_ends_a_message_once_and_the_account_comes_back(qq):
    qq.bridge.hanging |= {"send_private_msg"}
    outcome = queue.Queue()
    threading.Thread(target=lambda: outcome.put(qq.call(TO_FRIEND, id="20002", content="断")),
                     daemon=True).start()
    wanted = {"user_id": "20002", "message": text_of("断")}
    qq.bridge.wait_call("send_private_msg", lambda got: got == wanted)
    qq.bridge.drop()
    qq.bridge.hanging.clear()
    answer = outcome.get(timeout=WAIT)
    assert (answer["code"], answer["info"][:5]) == (-4, "响应未知:")
    qq.until("updating", "the OneBot bridge .*127.0.0.1")
    qq.running()
    assert "error" not in qq.state() and qq.state()["link"] == "onebot"
    assert [params for _, params in qq.bridge.calls].count(wanted) == 1
    events = qq.events_of(in_group(30001, 40001, "好了"))
    assert [event["content"] for event in events if event.get("class") == "recv"] == ["好了"]


def test_a_message_to_a_bridge_that_is_away_is_tried_msg_ttl_times(another):
    bridge, outcome = Bridge(sse=False), queue.Queue()
    me = another(bridge, msg_ttl="2").running()
    bridge.stop()
    assert (me.call(TO_FRIEND, id="20001", content="没")["code"],
            me.state()["state"]) == (-5, "running")
    threading.Thread(target=lambda: outcome.put(me.call(TO_FRIEND, id="20001", content="迟")),
                     daemon=True).start()
    bridge.start()
    assert outcome.get(timeout=WAIT)["code"] == 0
    assert [params["message"] for action, params in bridge.calls
            if action == "send_private_msg"] == [text_of("迟")]


REFUSALS = [  # the bridge, whether it is called by HTTP
    (Bridge, {}, False), (Bridge, {}, True), (Bridge, {"refusal": (401, "Unauthorized")}, True),
    (Bridge, {"refusal": (403, "token verify failed!")}, False),
    (Bridge, {"late_refusal": True}, False), (MilkyBridge, {}, True),
    (MilkyBridge, {"late_refusal": True}, True), (MilkyBridge, {"ws": False}, True)]


def test_a_wrong_token_is_said_in_check_client_and_the_right_one_opens(another):
    accounts = []
    for number, (kind, quirks, by_http) in enumerate(REFUSALS):
        link = "milky" if kind is MilkyBridge else "onebot"
        name = f"{'http' if by_http else 'ws'}{number}"
        accounts.append(another(kind(token="right", **quirks), name, **{link + "_token": "wr0ng"}))
        accounts[-1].wanted = f"the bridge refuses {link}_token"
    for account in accounts:
        assert "wr0ng" not in json.dumps(account.until("scaning", account.wanted))
        account.bridge.token = "wr0ng"
    for account in accounts:
        account.until("running")
        assert account.call("get_user_info")["id"] == "10001"
    assert "wr0ng" not in account.program.log.text()


def signed(secret):
    """What makes the signature of a body."""
    return lambda body: "sha1=" + hmac.new(secret.encode(), body, "sha1").hexdigest()


FAR_AWAY = {"X-Forwarded-For": "192.0.2.1"}  # so it does not count as on this machine
EVIL_PAGE = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
T0KEN, WRONG = {"Authorization": "Bearer t0ken"}, {"Authorization": "Bearer x"}
WEBHOOKS = {  # the bridge of an account: fields of posts that are let in, and of others
    "secret": (
        [{"X-Signature": signed("s")}, {"X-Signature": signed("s"), **FAR_AWAY},
         {"X-Signature": signed("s"), **EVIL_PAGE},
         {"X-Signature": lambda body: "sha1=" + signed("s")(body)[5:].upper()}],
        [{}, {"X-Signature": ""}, {"X-Signature": "sha1="}, {"X-Signature": "\u00e9"},
         {"X-Signature": signed("x")}, {"X-Signature": lambda body: signed("s")(body + b" ")}]),
    "token": (
        [{"X-Signature": signed("t0ken"), **FAR_AWAY}, {**T0KEN, **FAR_AWAY},
         {**T0KEN, **EVIL_PAGE}],
        [{"X-Signature": signed("x")}, {**WRONG, **FAR_AWAY}, {**WRONG, **EVIL_PAGE}]),
    "secret token": ([{"X-Signature": signed("s")}], [T0KEN]),
    "open": ([{}, {"X-Signature": signed("x")}],
             [FAR_AWAY, EVIL_PAGE, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}]),
    "milky token": ([T0KEN, {**T0KEN, **FAR_AWAY}], [{}, WRONG]),
    "milky": ([{}, WRONG], [FAR_AWAY, {**WRONG, **FAR_AWAY}])}


def hook(name):
    """The bridge of that name, which has no other way for its events."""
    kind, more = (MilkyBridge, {"ws": False}) if "milky" in name else (Bridge, {})
    return kind(sse=False, token="t0ken" if "token" in name else "",
                secret="s" if "secret" in name else "", **more)


def test_a_webhook_is_let_in_by_its_signature_or_the_token(exchanged):
    with on_bridges(exchanged, {name.replace(" ", "-"): hook(name) for name in WEBHOOKS}) as hooks:
        for account, posts in zip(hooks.values(), WEBHOOKS.values()):
            milky, account.bridge.post_to = account.name.startswith("milky"), ""
            paths = [f"/{link}?client={account.name}" for link in ("onebot", "milky")]
            bases = exchanged.base, f"http://127.0.0.1:{account.state()['port']}"

            def post(base, path, fields, body):
                status, _, answer = request(base, path, "POST", iter([body[:9], body[9:]]), {
                    "Content-Type": "application/json", **{
                        name: value(body) if callable(value) else value
                        for name, value in fields.items()}})
                return status, json.loads(answer)

            for base, let_in, fields in [(base, let_in, fields) for base in bases for let_in, rows
                                         in zip((True, False), posts) for fields in rows]:
                said = os.urandom(6).hex()
                event = account.bridge.say_private(20001, said)
                if milky:
                    event = {"self_id": 10001, "event_type": "message_receive", "data": event}
                got = post(base, paths[milky], fields, json.dumps(event).encode())
                assert (account.name, fields, *got) == (account.name, fields, *(
                    (200, {}) if let_in else (403, {"code": -6, "status": "auth failure"})))
                assert not let_in or eventually(lambda: said in [
                    row.get("content") for row in account.call("check_event", since="0")])
            for body in b"", b"{", b"[]", b"5", b"\xff":
                status, answer = post(bases[0], paths[milky], posts[0][0], body)
                assert (status, answer["code"]) == (400, 400), answer
            for base in bases:
                status, answer = post(base, paths[not milky], {}, b"{}")
                assert (status, answer["status"]) == (403, "api not found")
            account.call("delete_client")
    assert "t0ken" not in exchanged.log.text()


def test_events_of_another_account_are_not_ours(bridged):
    assert bridged["webhook"].events_of(private(20001, self_id=10009)) == []
    bridged["webhook"].program.log.wait("an event for 10009 was posted to us, who are 10001")


@pytest.mark.parametrize("path", ["/onebot?client=", "/milky?client="])
def test_a_webhook_knows_no_account_without_a_bridge_and_tells_strangers_of_none(pair, path):
    post = {"method": "POST", "body": b'{"post_type":"else"}',
            "headers": {"Content-Type": "application/json"}}
    assert request(pair.base, path + "alice", **post)[0] == 403
    assert json.loads(request(pair.base, path + "nobody", **post)[2]) == {
        "code": 1, "status": "client not exists"}
    post["headers"].update(FAR_AWAY)
    assert {request(pair.base, path + name, **post)[0] for name in ("alice", "nobody")} == {403}


def test_a_controllers_token_in_the_url_lets_a_webhook_in(start, closing):
    controller, key = start("controller", env={"OPENQQ_TOKEN": TOKEN}), {"access_token": TOKEN}
    body, shown = '{"event_type":"peer_pin_change","self_id":10001,"data":{}}', "access_token="
    known = shown + urllib.parse.quote(TOKEN)
    for name, link, posts in (
            ("open", "onebot", [(known, 200), ("", 403), (shown + "x", 403)]),
            ("milky", "milky", [("", 200)]), ("milky-token", "milky", [("", 403)])):
        bridge = closing(hook(name))
        port = controller.call("start_client", client=name, **key, **{
            link + "_api": bridge.url, link + "_token": bridge.token})["port"]
        assert eventually(lambda: controller.call("check_client", client=name, **key)["client"][0][
            "state"] == "running")
        for base in controller.base, f"http://127.0.0.1:{port}":
            for query, wanted in posts:
                path = f"/{link}?client={name}&{query}"
                status = request(base, path, "POST", body, {"Content-Type": "application/json"})[0]
                assert (path, status) == (path, wanted)


@pytest.mark.parametrize("scheme", ["wss", "https"])
def test_a_bridge_behind_tls_is_reached_and_its_certificate_is_checked(
        start, tmp_path, scheme, closing):
    pem, bridge = put(tmp_path / "tls.pem", TEST_PEM), closing(Bridge(token="t"))
    seal(bridge, pem)
    words = ["client", "--account", "me", "--onebot-api", f"{scheme}://127.0.0.1:{bridge.port}",
             "--onebot-token", "t", "--send-interval", "0"]
    trusting = start(*words, env={"SSL_CERT_FILE": pem})
    trusting.log.wait("logged in")
    bridge.connected()
    bridge.say_private(20001, "密" * 100_000)
    [event] = trusting.call("check_event", since="0")
    assert event["content"] == "密" * 100_000
    body = json.dumps({"id": "20001", "content": "封" * 20_000})
    assert b'"code":0' in request(trusting.base, "/openqq/send_friend_message", "POST", body,
                                  {"Content-Type": "application/json"})[2]
    assert bridge.wait_call("send_private_msg")["message"] == text_of("封" * 20_000)
    assert trusting.stop() == 0
    wary = start(*words)
    wary.log.wait(r"\[warn\] .*certificate")
    assert wary.stop() == 0


def test_a_bridge_that_shares_this_machines_files_is_given_a_path(harried, tmp_path):
    bridge, program = harried("--onebot-local", "1")
    path = put(tmp_path / "a b.png", PNG)
    assert program.call(TO_FRIEND, id="20001", media_path=path)["code"] == 0
    assert bridge.wait_call("send_private_msg")["message"] == [
        segment("image", file="file://" + urllib.parse.quote(path), name="a b.png")]


# -- login pages

def login_page(kind, link="onebot"):
    """(page, a bridge that is not logged in)"""
    page = {"napcat": NapCatPage, "llbot": LLBotPage}[kind](kind)
    bridge = MilkyBridge() if link == "milky" else Bridge()
    bridge.logged_in = False
    return page, bridge


def log_in(page, bridge):
    bridge.logged_in = True
    page.logged_in = True


def shows(receiver, text):
    """Wait until this is the QR code."""
    picture = openqq.qr_png(openqq.qr_matrix(text))
    receiver.next(lambda event: is_qrcode(event)
                  and base64.b64decode(event["params"][1]) == picture)
    return picture


def test_the_code_of_a_login_page_is_shown_everywhere_and_the_states_follow(
        another, receive, closing):
    rows = []
    for kind, name in ("napcat", "ws-n"), ("llbot", "ws-l"), ("llbot", "milky"):
        page, bridge = map(closing, login_page(kind, name))
        receiver = receive()
        rows.append((page, receiver, another(bridge, name, page=page, post_api=receiver.url,
                                             post_event_list="")))
    for page, receiver, me in rows:
        picture = shows(receiver, page.qrcode)
        path = f"/openqq/get_qrcode?client={me.name}"
        status, fields, body = request(me.program.base, path)
        assert (status, fields["content-type"], body) == (200, "image/png", picture)
        assert content(me.until("scaning")["qrcode_path"]) == picture
        me.program.log.wait(re.escape(f"waiting for a scan: {page.qrcode}"))
        page.qrcode += "&again"  # it lasts two minutes there
    rows[0][0].expire()
    for page, receiver, me in rows:
        shows(receiver, page.qrcode)
        log_in(page, me.bridge)
    for page, receiver, me in rows:
        assert receiver.next(is_login)["params"] == [1]
        assert [event["params"][1] for *_, event in receiver.posts
                if event.get("event") == "state_change"] == [
            "loading", "scaning", "confirming", "updating", "running"]
        path = f"/openqq/get_qrcode?client={me.name}"
        assert request(me.program.base, path)[0] == 404
        assert page.refused == 0 and "error" not in me.running().state()


def test_an_account_logged_off_by_qq_is_scaning_again_with_a_code_and_comes_back(
        another, receive, closing):
    receiver, page, bridge = receive(), closing(NapCatPage()), Bridge()
    page.logged_in = True
    me = another(bridge, "ws-off", page=page, post_api=receiver.url, post_event_list="").running()
    assert receiver.next(is_login)["params"] == [0]
    page.offline, page.qrcode, page.next_qrcode = True, "", "https://txz.qq.com/p?k=again"
    bridge.logged_in = False
    logins = len([1 for action, _ in bridge.calls if action == "get_group_list"])
    for tag in "KickedOffLine", "BotOffline":  # as NapCat says it
        for _ in range(10):
            bridge.emit(notice_type="bot_offline", user_id=10001, tag=tag, message="被踢下线\x1b[2J")
    shows(receiver, page.next_qrcode)
    me.until("scaning", "被踢下线")  # the code takes nothing away from the reason
    assert me.call("get_user_info") == {"code": 300, "state": "scaning",
                                        "status": "client not running"}
    me.program.log.wait(r"\[warn\] .*被踢下线")
    page.offline, bridge.logged_in = False, True
    bridge.say_private(20001, "你还在吗")  # before anybody knows that the account is back
    assert receiver.next(is_login)["params"] == [1]
    me.running()
    assert eventually(lambda: [event.get("content") for *_, event in receiver.posts
                               ].count("你还在吗") == 1)
    me.call("get_group_basic_info")
    assert len([1 for action, _ in bridge.calls if action == "get_group_list"]) == logins + 1
    assert "\x1b" not in me.program.log.text()
    assert me.call("relogin")["code"] == 0
    receiver.next(is_login)
    assert me.running().events_of(private(20002, "还在"))[-1]["content"] == "还在"


NO_CODES = [  # a name, the kind of the login page, and what is said
    *((way + "-none", "", "the bridge is not logged in") for way in ("ws", "http")),
    ("ws-napcat", "napcat", "the login page refuses onebot_login_token"),
    ("ws-llbot", "llbot", "the login page refuses onebot_login_token"),
    ("ws-rest", "napcat", "wants to be left alone for a while"),
    ("ws-long", "llbot", "too long to be shown")]


def test_without_a_code_to_show_an_account_waits_until_the_bridge_is_logged_in(another, closing):
    """A token that a login page refuses is not repeated; a page that is off is not needed."""
    gone, rows = NapCatPage(), []
    gone.close()
    another(Bridge(), "ws-gone", page=gone).running()
    for name, kind, said in NO_CODES:
        page, bridge = map(closing, login_page(kind or "napcat"))
        given = {"onebot_login_token": "wr0ng"} if "refuses" in said else {}
        if name == "ws-rest":
            page.handle = lambda handler, page=page: page.reply(
                handler, 200, {"code": 0, "message": "login rate limit", "data": {}})
        elif name == "ws-long":
            page.qrcode = "x" * 5000
        rows.append((page, another(bridge, name, page=kind and page, **given), said))
    for page, me, said in rows:
        me.until("scaning", said)
        assert request(me.program.base, f"/openqq/get_qrcode?client={me.name}")[0] == 404
    for bridge, count in [(me.bridge, len(me.bridge.calls)) for _, me, _ in rows]:
        assert eventually(lambda: len(bridge.calls) > count)  # it is asked on and on
    for page, me, _ in rows:
        log_in(page, me.bridge)
    for page, me, said in rows:
        assert "error" not in me.until("running")
        assert page.refused == int("refuses" in said)
    assert not re.search("wr0ng|Traceback", me.program.log.text())


def test_a_real_account_shows_codes_as_its_bridge_has_them_and_never_ends(harried, closing):
    page, bridge = login_page("napcat")
    _, program = harried("--onebot-login", "napcat", "--onebot-login-api", closing(page).url,
                         "--onebot-login-token", "napcat", "--qrcode-count-max", "2", bridge=bridge,
                         running=False, TICKET_SECONDS=0.05)

    def codes():
        return len([1 for *_, event in program.receiver.posts if is_qrcode(event)])

    def looks():
        return [path for path, _ in page.calls].count("/api/QQLogin/CheckLoginStatus")

    for number in range(12):
        page.qrcode = f"https://txz.qq.com/p?k={number}"
        shows(program.receiver, page.qrcode)
    shown, asked = codes(), looks()
    assert eventually(lambda: looks() > asked + 5)
    assert codes() == shown
    assert "/api/QQLogin/RefreshQRcode" not in [path for path, _ in page.calls]
    log_in(page, bridge)
    until_running(program)


def test_an_account_on_a_bridge_survives_its_controller_and_keeps_its_secrets_secret(
        start, closing):
    """What a caller gave is shown again, but not what is secret; a resumed account has it all."""
    bridge = closing(Bridge(token="S3CRET-t", secret="S3CRET-s", sse=False))
    page = closing(NapCatPage("S3CRET-l"))
    page.logged_in, first = True, start("controller")
    me = Bridged(first, "http", bridge, page, onebot_login_token="S3CRET-l").running()
    again = me.call("start_client")
    assert (again["status"], again["onebot_api"]) == ("client already exists", bridge.url)
    texts = [json.dumps([me.started, again, me.state(), me.call("get_client_info")])]
    assert first.stop() == 0
    texts += [content(first.path(name)).decode() for name in left_files(first)
              if name != "cookie_http.dat"]
    me.program = start("controller")
    bridge.post_to = f"{me.program.base}/onebot?client=http"
    assert me.running().events_of(private(20002, "回来"))[-1]["content"] == "回来"
    assert bridge.refused == page.refused == 0
    assert me.call("delete_client")["code"] == 0
    assert not [name for name in left_files(me.program) if "_http." in name]
    assert "S3CRET" not in "".join(texts) + first.log.text() + me.program.log.text()


# -- hostile bridges, hostile callers, big rosters

HURRY = {"BRIDGE_SECONDS": 1.0, "LOOKUP_SECONDS": 0.5, "LOGIN_SECONDS": 0.1, "DETAIL_SECONDS": 2.0,
         "LIST_SECONDS": 1.0, "DOUBT_SECONDS": 0.4}


@contextlib.contextmanager
def in_a_hurry(directory):
    """begin(words…, X_SECONDS=…): (bridge, program), a running client with little patience for
    its bridge; what it posts comes to program.receiver."""
    with contextlib.ExitStack() as stack:
        def begin(*words, bridge=None, way="ws", running=True, **seconds):
            seconds = {**HURRY, **seconds}
            code = (f"import sys; sys.path[0] = {HERE!r}; import openqq; vars(openqq).update("
                    f"{seconds!r}); openqq.WebSocket.LOOK_SECONDS = "
                    f"{seconds['BRIDGE_SECONDS'] / 2}; openqq.command_line()")
            python = put(os.path.join(str(directory), "python-in-a-hurry"),
                         '#!/bin/sh\nwhile [ "$1" != client ]; do shift; done\n'
                         f"exec '{sys.executable}' -X utf8 -c \"{code}\" \"$@\"\n")
            os.chmod(python, 0o700)
            bridge, receiver = bridge or Bridge(), Receiver()
            program = Program(
                directory, "client", "--onebot-api", getattr(bridge, way), "--send-interval", "0",
                "--post-event-list", ONEBOT_EVENTS + ",login,state_change,input_qrcode",
                "--post-api", receiver.url, *words, python=python)
            for end in program.stop, receiver.close, bridge.stop:
                stack.callback(end)
            program.receiver, program.way = receiver, way
            program.ready()
            if running:
                until_running(program)
            return bridge, program

        yield begin


@pytest.fixture
def harried(tmp_path):
    """Begins one, or some, for this test."""
    with in_a_hurry(tmp_path) as begin:
        yield begin


@pytest.fixture(scope="module", params=["ws", "url"])
def hurried(request, tmp_path_factory):
    """One for each way, for tests that leave it as it was."""
    with in_a_hurry(tmp_path_factory.mktemp("hurried")) as begin:
        yield begin(way=request.param)


def link_state(program):
    """The state file of a client alone: what check_client shows."""
    return json.loads(content(program.path("state_default.json")))


def until_running(program):
    reached = []  # it may leave the state again before eventually() looks a last time
    eventually(lambda: reached or (link_state(program)["state"] == "running"
                                   and reached.append(True)))
    assert reached, link_state(program)


def told_before(bridge, program):
    """The events that were posted until a message that comes now."""
    word, found = os.urandom(6).hex(), []
    bridge.say_private(20001, word)
    program.receiver.next(lambda event: event.get("content") == word or found.append(event))
    return found


def ear(url, look=15.0):
    """A WebSocket of ours to a bridge: what it hears, and the future of what it ends with."""
    texts = []
    web = openqq.WebSocket(url, {}, texts.append)
    web.LOOK_SECONDS = look
    return texts, concurrent.futures.ThreadPoolExecutor(1).submit(web.run)


FATAL_FRAMES = [
    (ws_frame(b"x" * 1000, says=100_000_000), "a message of over 16777216 bytes"),
    (b"\x81\x7f" + b"\xff" * 8, "a message of over 16777216 bytes"),
    (ws_frame("{}", mask=True), "not a WebSocket frame of a server"),
    (b"\xf1\x02{}", "not a WebSocket frame of a server"),
    (b"\x83\x02{}", "not a WebSocket frame of a server"),
    (ws_frame(b"x" * 200, 9), "a control frame that is too long or in parts"),
    (ws_frame(b"", 9, fin=False), "a control frame that is too long or in parts"),
    (ws_frame(b"x", 0), "parts of a message in the wrong order"),
    (ws_frame(b"x", 1, fin=False) * 2, "parts of a message in the wrong order"),
    (ws_frame(b"x", 8), "the other side closed the connection"),
    (ws_frame(b"\x03\xf0weg\x1b[31m\r\n[x] line", 8),
     "the other side closed the connection: weg [31m [x] line")]


def test_frames_that_cannot_be_end_a_websocket_in_plain_words(closing):
    """Nothing is left of it then, nor is it ever anybody else's connection."""
    bridge = closing(Bridge(handshake=b"Content-Length: 0\r\n"))
    for data, why in FATAL_FRAMES:
        texts, ended = ear(bridge.ws)
        bridge.connected()
        assert openqq.TRANSPORT.pool.take(("http", f"127.0.0.1:{bridge.port}", None)) is None
        bridge.send_raw(ws_frame('{"n":1}') + data)
        assert str(ended.exception(WAIT)) == why
        assert texts[1:] == [b'{"n":1}']
        bridge.left()
    bridge.token = "T"
    with pytest.raises(openqq.AuthFailure):
        openqq.WebSocket(bridge.ws, {}, print)
    assert eventually(lambda: not bridge.connections)


def test_frames_that_may_be_are_put_together_and_pings_answered(closing):
    bridge = closing(Bridge(lifecycle=False))
    texts, ended = ear(bridge.ws)
    bridge.connected()
    whole = ws_frame(b"", 10) + ws_frame("a", 1, fin=False) + ws_frame(b"hi", 9) + ws_frame(
        b"", 0, fin=False) + ws_frame("b" * 70_000, 0) + ws_frame(b"c", 2)
    for place in range(0, len(whole), 9973):
        bridge.send_raw(whole[place:place + 9973])
    assert bridge.controls.wait(10) == b"hi"
    assert eventually(lambda: len(texts) == 2)
    assert texts == [b"a" + b"b" * 70_000, b"c"]
    bridge.drop()
    assert str(ended.exception(WAIT)) == "the connection was ended by the other side"
    _, ended = ear(bridge.ws, look=0.1)
    bridge.connected()
    bridge.send_raw(ws_frame(b"x", says=5000))
    assert str(ended.exception(WAIT)) == "no sign of life", "half a frame is none"


ILL_LOGINS = [
    *(("get_login_info", {"data": data}) for data in (
        [1], "text", {"user_id": []}, {"user_id": float("inf")})), ("get_status", {"data": 5}),
    ("get_status", {"data": [None]}), ("get_status", 500), ("get_status", {"retcode": 1404})]


def test_rubbish_at_login_only_delays_it_and_no_status_is_needed(hurried):
    bridge, program = hurried
    before = program.log.text().count("trying again")
    for action, ill in ILL_LOGINS:
        count, bridge.answers = len(bridge.calls), {action: ill}
        bridge.emit(notice_type="bot_offline", message="weg")
        assert eventually(lambda: (action, {}) in bridge.calls[count:])
        if action == "get_login_info":
            bridge.answers = {}
        program.receiver.next(is_login)
        bridge.connected()
        bridge.say_private(20001, "end")
        program.receiver.message("end")
    bridge.answers = {}
    assert program.log.text().count("trying again") == before
    assert "fault of this program" not in program.log.text()
    assert not bridge.faults


def test_what_is_no_json_object_is_passed_over_and_what_ends_a_connection_is_told(hurried):
    bridge, program = hurried
    connections = bridge.accepted
    for word in "ping", "", "[1]":
        bridge.send_raw(word if program.way == "ws" else f"data: {word}\n\n")
    bridge.say_private(20001, "again")
    program.receiver.message("again")
    program.log.wait(r"\[warn\] 2 message\(s\) of the bridge passed over: no JSON object")
    assert program.way != "ws" or bridge.accepted == connections
    bridge.hanging |= {"*"}
    if program.way == "ws":
        bridge.drop()
    program.log.wait("(no answer in time|does not answer|no sign of life)")
    assert eventually(lambda: link_state(program).get("error"))
    bridge.hanging.clear()
    until_running(program)


def test_a_message_that_went_out_in_part_is_not_sent_again(harried):
    bridge, program = harried(way="url")
    bridge.be_gone_after("send_group_msg")
    answer = json.loads(request(program.base, "/openqq/send_group_message", "POST", json.dumps({
        "uid": 30001, "content": "看", "media_name": "a.zip", "media_data": "UEsDBA=="}),
        {"Content-Type": "application/json"})[2])
    assert answer["code"] == -4
    assert [name for name, _ in bridge.calls].count("send_group_msg") == 1


def test_a_storm_is_told_whole_once_and_in_order_while_a_send_and_members_wait(harried):
    count = much(3_000, 50_000)
    bridge, program = harried("--allow-message-sync", "1", "--post-api", "", BRIDGE_SECONDS=15.0)
    bridge.hanging |= {"send_group_msg", "get_group_member_list"}
    ended = []
    for api, params in ((TO_GROUP, {"uid": "30001", "content": "x"}), ("get_group_info", {})):
        threading.Thread(target=lambda api=api, params=params: ended.append(
            (api, program.call(api, **params))), daemon=True).start()
    bridge.wait_call("send_group_msg")
    [channel] = bridge._channels
    for first in range(0, count, 500):
        channel.raw(b"".join(ws_frame(json.dumps(bridge._event(
            message_type="private", sub_type="friend", user_id=20001, message_id=number,
            message=text_of(f"storm {number}")))) for number in range(
                first, min(first + 500, count))))
    program.log.wait(f" : storm {count - 1}$", seconds=WAIT * 3)
    assert TO_GROUP not in dict(ended)
    numbers = re.findall(r" : storm (\d+)$", program.log.text(), re.M)
    assert numbers == [str(number) for number in range(count)]


STRANGE = [{name: odd} for odd in (None, [], {}, "", "x", 1e999) for name in (
    "user_id", "message", "sender", "time", "message_id", "message_type", "sub_type", "post_type",
    "raw_message", "self_id")] + [
    {"sender": {"nickname": {}, "card": []}}, {"post_type": "meta_event", "status": 5},
    *({"message_type": "group", "group_id": odd} for odd in (None, [], 1e999)),
    {"anonymous": 5, "message_type": "group", "group_id": 30001},
    {"message_type": "group", "group_id": 30001, "sender": {"user_id": 20001, "role": []}},
    {"post_type": "notice", "notice_type": []}, {"post_type": "request"},
    {"post_type": "notice", "notice_type": "group_decrease", "group_id": []},
    {"post_type": "notice", "notice_type": "notify", "sub_type": "group_name"},
    {"post_type": "notice", "notice_type": "group_ban", "group_id": 30001, "duration": "x"},
    {"post_type": "notice", "notice_type": "group_upload", "group_id": 30001, "file": []},
    {"post_type": "request", "request_type": "group", "group_id": 30001, "flag": {}}]
NOBODIES = [None, 0, "0", "", -5, True, "abc", 1.5, [], {}, "12 3"]


def test_what_is_no_number_is_nobody_and_strange_events_harm_no_other(harried):
    bridge = Bridge()
    bridge.friends += [{"nickname": "without"}, *({"user_id": value} for value in NOBODIES)]
    bridge.groups += [{"group_id": value, "members": []} for value in (284840486, *NOBODIES)]
    bridge.groups[0]["members"] += [dict(bridge.member(1), user_id=value) for value in NOBODIES]
    bridge.answers["get_stranger_info"] = {"data": {"user_id": None, "nickname": None}}
    _, program = harried(bridge=bridge)
    bridge.connected()
    assert lists_of(program) == (["20001", "20002"], ["30001"])
    assert [row["uid"] for row in program.call("get_group_info")[0]["member"]] == [
        "10001", "20001", "40001"]
    for number, strange in enumerate(STRANGE):
        bridge.emit(**{"message_type": "private", "sub_type": "friend", "user_id": 20001,
                       "message_id": number, "message": f"strange {number}", **strange})
    for value in NOBODIES:
        bridge.emit(message_type="private", sub_type="friend", user_id=value, message_id=1,
                    message="x", sender={"user_id": value, "nickname": "x"})
        for kind in "group_increase", "group_decrease":
            bridge.emit(notice_type=kind, group_id=30001, user_id=value, sub_type="leave")
            bridge.emit(notice_type=kind, group_id=value, user_id=20001, sub_type="leave")
        bridge.emit(notice_type="friend_add", user_id=value)
        bridge.emit(request_type="friend", user_id=value, flag=f"F{value}")
        bridge.emit(notice_type="group_card", group_id=30001, user_id=value, card_new="x")
    bridge.emit(notice_type="friend_add", user_id=50001)
    for number, value in enumerate([0, "0", "", None, [], 0]):  # messages without a number
        bridge.say_private(20001, f"n{number}", message_id=value)
    ids = [event["id"] for event in told_before(bridge, program)
           if re.fullmatch("n[0-5]", event.get("content", ""))]
    assert len(ids) == len(set(ids)) == 6
    assert all(re.fullmatch("[1-9][0-9]*", name) for name in ids)
    assert eventually(lambda: [(event["event"], event["params"][0]["uid"])
                               for *_, event in list(program.receiver.posts) if re.match(
        "new_|lose_|.*_property", event.get("event", ""))]) == [("new_friend", "50001")]
    until_running(program)
    assert lists_of(program) == (["20001", "20002", "50001"], ["30001"])
    assert "fault of this program" not in program.log.text()


# -- a bridge that fails or lies

def lists_of(program):
    return ([row["uid"] for row in program.call("get_friend_info")],
            [row["uid"] for row in program.call("get_group_basic_info")])


def warning(program):
    return program.call("check_client")["client"][0].get("warning", "")


def moves(events):
    """Who came and who went, of events."""
    return sorted((event["event"], event["params"][0]["uid"]) for event in events
                  if str(event.get("event")).startswith(("new_", "lose_")))


def next_moves(program, count):
    return moves([program.receiver.next(lambda event: moves([event])) for _ in range(count)])


ILL_LISTS = [  # the way, and what is answered instead of the list of friends, and of groups
    ("ws", {"retcode": 1200}, {"data": [1, None, "x", {"user_id": None, "group_id": 0}]}),
    ("url", "hang", 500), ("ws", "late", "late")]


@pytest.mark.parametrize("way, friends, groups", ILL_LISTS)
def test_a_list_that_a_bridge_cannot_tell_keeps_no_account_from_running(
        harried, way, friends, groups):
    bridge, free = Bridge(), threading.Event()
    for action, ill in ("get_friend_list", friends), ("get_group_list", groups):
        if ill == "hang":
            bridge.hanging.add(action)
        else:
            bridge.answers[action] = (lambda params: free.wait(WAIT) and None
                                      ) if ill == "late" else ill
    _, program = harried(bridge=bridge, way=way, LIST_SECONDS=WAIT if ill == "late" else 1.0)
    try:
        bridge.connected()
        bridge.say_private(20001, "heard")
        assert program.receiver.message("heard")["sender"] == "小明"
        bridge.say_group(30001, 40001, "in the group")
        assert program.receiver.message("in the group")["group_uid"] == "30001"
        for kind in "increase", "decrease":  # notices count before the list is there
            bridge.emit(notice_type="group_" + kind, group_id=30005, user_id=10001)
        assert next_moves(program, 2) == [("lose_group", "30005"), ("new_group", "30005")]
        for path, uid in (TO_FRIEND, "20001"), (TO_FRIEND, "99999"), (TO_GROUP, "30001"):
            assert program.call(path, uid=uid, content="x")["code"] == 0
        if ill != "late":
            assert eventually(lambda: "friends" in warning(program)
                              and "groups" in warning(program))
    finally:
        free.set()
        bridge.hanging.clear()
        bridge.answers = {}
    assert eventually(lambda: lists_of(program) == (["20001", "20002"], ["30001"]))
    assert eventually(lambda: not warning(program))
    assert not moves(told_before(bridge, program))
    assert program.call(TO_FRIEND, uid="99999", content="x")["code"] == 100


def test_a_list_that_shrinks_is_believed_once_it_has_said_the_same_for_a_while(harried):
    bridge = Bridge()
    bridge.friends += [{"user_id": 20003 + number, "nickname": "x"} for number in range(4)]
    everybody = list(bridge.friends)
    _, program = harried("--update-interval", "1", bridge=bridge, DOUBT_SECONDS=2.0)
    bridge.friends[:] = []
    assert eventually(lambda: "lacks 6 of 6" in warning(program))
    assert len(program.call("get_friend_info")) == 6
    bridge.friends[:] = everybody
    assert eventually(lambda: not warning(program))
    assert not moves(told_before(bridge, program))
    bridge.friends[:] = everybody[:3]
    assert next_moves(program, 3) == [("lose_friend", f"2000{number}") for number in (4, 5, 6)]
    assert lists_of(program)[0] == ["20001", "20002", "20003"]
    assert eventually(lambda: not warning(program))


def test_members_and_groups_that_a_list_suddenly_lacks_stay_but_what_a_notice_says_counts(harried):
    bridge = Bridge()
    bridge.groups += [{"group_id": 30002 + number, "group_name": "x", "members": []}
                      for number in range(3)]
    groups, members = list(bridge.groups), bridge.groups[0]["members"]
    members += [bridge.member(50001 + number) for number in range(6)]
    _, program = harried("--update-interval", "1", bridge=bridge, DOUBT_SECONDS=600.0)
    assert len(program.call("search_group", uid="30001")[0]["member"]) == 9
    members[1:], groups[0]["member_count"] = [], 10
    for _ in "123":
        bridge.wait_call("get_group_member_list", lambda got: got["group_id"] == "30001")
        bridge.wait_call("get_group_list")
    assert len(program.call("search_group", uid="30001")[0]["member"]) == 9
    bridge.groups[:] = []
    assert eventually(lambda: "groups" in warning(program))
    for again in range(2):  # told twice, it is one event
        bridge.emit(notice_type="group_decrease", group_id=30002, time=1000 + again,
                    sub_type="kick_me", user_id=10001)
        bridge.emit(notice_type="group_dismiss", group_id=30003, time=1000 + again, user_id=40001)
    assert next_moves(program, 2) == [("lose_group", "30002"), ("lose_group", "30003")]
    assert not moves(told_before(bridge, program))
    assert lists_of(program)[1] == ["30001", "30004"]
    bridge.groups[:] = [groups[0], groups[3]]
    assert eventually(lambda: not warning(program))


def test_a_busy_account_is_refreshed_and_learns_what_no_notice_told(harried):
    bridge, program = harried("--update-interval", "1")
    assert len(program.call("get_group_info")[0]["member"]) == 3
    bridge.answers = {"get_friend_list": {"data": [{"user_id": 284840486}]},  # that is nobody
                      "get_group_member_list": {"data": []}}
    bridge.groups[0]["member_count"] = 9
    for _ in "123":
        bridge.wait_call("get_friend_list")
    program.log.wait("list of friends cannot be had")
    assert not moves(told_before(bridge, program)), "an answer that is none loses nobody"
    bridge.answers = {}
    del bridge.groups[0]["member_count"]
    bridge.groups[0]["members"][2:] = [bridge.member(50001), bridge.member(50002)]
    bridge.friends.pop()
    assert next_moves(program, 4) == [
        ("lose_friend", "20002"), ("lose_group_member", "40001"), ("new_group_member", "50001"),
        ("new_group_member", "50002")]
    count = itertools.count()

    def busy(params):
        text = f"busy {next(count)}"
        bridge.say_private(20001, text)
        program.log.wait(f" : {text}$")
        return {"data": [{"group_id": 30001, "group_name": "new name", "member_count": 4}]}

    bridge.answers["get_group_list"] = busy
    event = program.receiver.next(lambda event: event.get("event") == "group_property_change")
    assert event["params"][1:] == ["name", "一家人", "new name"]


def test_what_happens_while_a_bridge_is_asked_is_not_undone_by_its_answer(harried):
    bridge, program = harried(DETAIL_SECONDS=15.0)

    def members(params):
        rows = list(bridge.groups[0]["members"])
        bridge.answers = {}
        bridge.groups[0]["members"][2:] = [bridge.member(50001)]
        for kind, uid in (("group_decrease", 40001), ("group_increase", 50001)):
            bridge.emit(notice_type=kind, sub_type="leave", group_id=30001, user_id=uid)
        bridge.say_private(20001, "told")
        program.log.wait(" : told$")
        return {"data": rows}

    bridge.answers["get_group_member_list"] = members
    [group] = program.call("get_group_info")
    assert [row["id"] for row in group["member"]] == ["10001", "20001", "50001"]
    before, told = list(bridge.friends), threading.Event()

    def friends(params):
        bridge.emit(notice_type="friend_add", user_id=40001)
        program.receiver.next(lambda event: event.get("event") == "new_friend")
        told.set()
        return {"data": before}

    bridge.answers["get_friend_list"] = friends
    bridge.drop()
    assert told.wait(WAIT)
    until_running(program)
    assert "40001" in lists_of(program)[0]


def test_is_init_group_0_leaves_groups_to_what_they_say(harried):
    bridge, program = harried("--is-init-group", "0", "--is-update-group", "0")
    assert program.call("get_group_info") == []
    bridge.say_group(30001, 40001, "hey")
    assert program.receiver.message("hey")["group"] == "一家人"
    assert [row["id"] for row in program.call("get_group_info")] == ["30001"]


def test_a_number_that_no_list_told_is_asked_for_before_a_call_for_it_fails(hurried):
    bridge, program = hurried

    def code(path, **params):
        return program.call(path, **params)["code"]

    def sent():
        return code(TO_FRIEND, uid="20009", content="x"), code(TO_GROUP, id="30009", content="x")

    program.call("get_group_info")
    assert sent() == (100, 101)
    bridge.friends.append({"user_id": 20009, "nickname": "新友", "remark": ""})
    bridge.groups.append({"group_id": 30009, "group_name": "新群", "members": [
        bridge.member(10001, "owner"), bridge.member(40013)]})
    bridge.groups[0]["members"].append(bridge.member(40011))
    assert sent() == (0, 0)
    assert next_moves(program, 2) == [("new_friend", "20009"), ("new_group", "30009")]
    mute = {"path": "shutup_group_member", "time": "1", "group_uid": "30001"}
    assert code(**mute, member_uid="40011") == 0
    assert code("send_sess_message", group_uid="30001", uid="40011", content="x") == 0
    assert code(**mute, member_uid="49999") == 100
    assert code("kick_group_member", group_uid="30009", member_uid="40013") == 0


def test_look_ups_that_a_bridge_does_not_answer_hold_up_their_own_conversation_only(harried):
    bridge, free = Bridge(), threading.Event()
    bridge.groups.append({"group_id": 30002, "group_name": "二群", "members": [
        bridge.member(10001), bridge.member(40002)]})
    _, program = harried(bridge=bridge, LOOKUP_SECONDS=WAIT)
    bridge.answers["get_group_member_info"] = lambda params: free.wait(WAIT) and None
    try:
        bridge.say_group(30001, 40001, [segment("at", qq="50001"), *text_of("slow")])
        bridge.wait_call("get_group_member_info")
        bridge.say_group(30001, 40001, "behind it")
        for number in range(3):
            bridge.say_group(30002, 40002, f"quick {number}")
            bridge.say_private(20001, f"friend {number}")
            program.receiver.message(f"quick {number}")
            program.receiver.message(f"friend {number}")
        assert not [1 for *_, event in program.receiver.posts
                    if event.get("content") == "behind it"]
    finally:
        free.set()
    assert "slow" in program.receiver.next(lambda event: "content" in event)["content"]
    program.receiver.message("behind it")
    program.call("get_group_info")
    bridge.hanging |= {"get_group_member_info", "get_stranger_info", "get_group_info"}
    said = {"nickname": "友", "card": "卡"}  # who writes first is known from that, looked up later
    bridge.say_private(51100, "p", sender=said)
    bridge.say_group(30001, 51000, "g", sender=said)
    assert program.receiver.message("g")["sender"] == "卡"
    assert "友" in [row["name"] for row in program.call("get_friend_info")]


SAID_OF_SOMEBODY = [  # what a sender's block says now -> what he is called, the property changes
    ({"nickname": "路人", "card": "新卡", "role": "admin"}, "新卡", [("card", None, "新卡")]),
    ({"nickname": "路人乙", "card": "", "role": "member", "title": "元老"}, "路人乙", [
        ("name", "路人", "路人乙"), ("card", "新卡", None), ("role", "admin", "member"),
        ("title", None, "元老")]),
    ({"nickname": "", "card": None, "role": "god", "title": 5}, "路人乙", []),
    ({"nickname": "路人", "card": "", "role": "admin", "title": ""}, "路人",
     [("name", "路人乙", "路人"), ("role", "member", "admin"), ("title", "元老", None)])]


def test_look_ups_in_vain_hold_up_no_queue_of_others(harried):
    bridge, program = harried(LOOKUP_SECONDS=2.0)
    bridge.hanging |= {"get_stranger_info", "get_group_member_info"}
    for number in range(64):
        bridge.emit(request_type="friend", user_id=51000 + number, flag=f"F{number}", comment="x")
    bridge.say_group(30001, 40001, [segment("at", qq=str(52000 + number)) for number in range(8)])
    bridge.say_private(20002, "still?")
    program.receiver.message("still?")
    asked = [params for action, params in bridge.calls if action == "get_stranger_info"]
    assert len(asked) <= openqq.EventQueue.WORKERS


def test_what_a_sender_says_of_himself_is_told_as_a_change(qq):
    qq.call("get_group_info")
    for sender, name, wanted in SAID_OF_SOMEBODY:
        *changes, said = qq.events_of(in_group(30001, 40001, "x",
                                               sender={"user_id": 40001, **sender}))
        assert sorted(event["params"][1] for event in changes) == sorted(row[0] for row in wanted)
        assert {tuple(event["params"][1:]) for event in changes} == set(wanted)
        assert {(event["event"], event["params"][0]["uid"]) for event in changes} <= {
            ("group_member_property_change", "40001")}
        assert said["sender"] == name
    for old, new in ("小红", "改名"), ("改名", "小红"):
        [change, said] = qq.events_of(private(20002, sender={"user_id": 20002, "nickname": new}))
        assert (change["params"][1:], said["sender"]) == (["name", old, new], new)


def test_what_a_bridge_repeats_or_tells_of_our_own_acts_is_one_event(qq):
    qq.call("get_group_info")
    again = comes(30001, 20001)
    assert [asked(event) for event in qq.events_of(again, again)] == [
        ("new_group_member", "20001", "30001")]
    qq.events_of(comes(30001, 50011))
    [event] = qq.events_of(
        lambda bridge: qq.call("kick_group_member", group_id="30001", member_id="50011"),
        goes(30001, 50011, "kick"), goes(30001, 50011, "kick"))
    assert asked(event) == ("lose_group_member", "50011", "30001")
    assert "50011" not in [row["uid"] for row in qq.call("get_group_info")[0]["member"]]
    assert [event["content"] for event in qq.events_of(
        lambda bridge: bridge.tell(bridge.say_private(20002, "一")))] == ["一"]
    request = {"request_type": "friend", "user_id": 50031, "flag": "50031"}  # somebody's number
    assert [event["event"] for event in qq.events_of(
        notice(**request), notice(notice_type="friend_add", user_id=50031), notice(**request))] == [
            "friend_request", "new_friend"]


def test_a_temporary_session_of_an_unknown_group_can_be_answered(qq):
    [event] = qq.events_of(private(50013, "在吗", sub_type="group", group_id=284840486,
                                   sender={"user_id": 50013, "nickname": "生人"}))
    assert (event["type"], event["group_uid"], event["sender_uid"], event["sender"]) == (
        "sess_message", "284840486", "50013", "生人")
    assert qq.call("send_sess_message", group_uid="284840486", uid="50013",
                   content="在")["code"] == 0
    assert qq.bridge.wait_call("send_private_msg", lambda got: got["message"] == text_of("在"))[
        "user_id"] == "50013"
    assert "284840486" not in [row["uid"] for row in qq.call("get_group_basic_info")]


def test_two_clients_of_one_account_are_told_of(another):
    first = another(Bridge(uin=10077), "ws-first").running()
    second = another(Bridge(uin=10077), "ws-second").running()
    assert eventually(lambda: "another client of the account 10077" in second.state().get(
        "warning", ""))
    second.program.log.wait(r"\[warn\] another client of the account 10077 is running already")
    assert "warning" not in first.state()


def test_messages_that_wait_long_are_not_called_failed_and_a_full_queue_refuses_at_once(harried):
    bridge, program = harried("--send-queue-max-size", "3", SEND_SECONDS=0.3, BRIDGE_SECONDS=WAIT)
    free = threading.Event()
    bridge.answers["send_private_msg"] = lambda params: free.wait(WAIT) and None

    def send(text, **more):
        query = urllib.parse.urlencode({"uid": "20001", "content": text, **more})
        status, _, body = request(program.base, f"/openqq/{TO_FRIEND}?{query}")
        return status, json.loads(body)

    def sent():
        event = program.receiver.next(lambda event: event.get("class") == "send")
        return event["content"], event["code"]

    assert send("0") == (200, {"code": 0, "id": None, "status": "request already in execution"})
    bridge.wait_call("send_private_msg")
    for text in "123":
        assert send(text, **{"async": "1"})[1]["code"] == 0
    for more in {}, {"async": "1"}:
        assert send("x", **more) == (503, {"code": 9, "status": "send queue full"})
    free.set()
    assert [sent() for _ in "0123"] == [(text, 0) for text in "0123"]
    free.clear()
    for text in "abc":
        assert send(text, **{"async": "1"})[1]["code"] == 0
    bridge.wait_call("send_private_msg", lambda got: got["message"] == text_of("a"))
    bridge.uin = 10009
    bridge.emit(notice_type="bot_offline", message="weg")
    assert eventually(lambda: program.call("get_user_info").get("uid") == "10009")
    free.set()
    told = [sent() for _ in "abc"]
    assert [row for row in told if row[1]] == [("b", -3), ("c", -3)]
    assert [action for action, _ in bridge.calls].count("send_private_msg") == 5


def test_of_two_that_a_name_fits_the_remark_wins_and_equal_ones_are_refused(harried):
    bridge = Bridge()
    bridge.friends = [{"user_id": 20001 + number, "nickname": name, "remark": remark}
                      for number, (name, remark) in enumerate([
                          ("甲", ""), ("乙", "甲"), ("丙", ""), ("丙", "")])]
    bridge.groups = [{"group_id": 30001 + number, "group_name": name, "group_remark": remark,
                      "members": []} for number, (name, remark) in enumerate([
                          ("家", ""), ("家", ""), ("友", "家人"), ("家人", "")])]
    _, program = harried(bridge=bridge)
    assert program.call(TO_FRIEND, displayname="甲", content="x")["code"] == 0
    assert bridge.wait_call("send_private_msg")["user_id"] == "20002"
    assert program.call(TO_GROUP, displayname="家人", content="x")["code"] == 0
    assert bridge.wait_call("send_group_msg")["group_id"] == "30003"
    for key in "name", "displayname":
        for path, name, kind in (TO_FRIEND, "丙", "friend"), (TO_GROUP, "家", "group"):
            assert program.call(path, **{key: name}, content="x") == {
                "code": 100, "id": None, "status": f"{kind} not unique"}
    assert program.call(TO_FRIEND, name="丙", uid="20004", content="x")["code"] == 0


def test_the_bridges_other_account_is_noticed_and_has_friends_of_its_own(harried):
    """By events that a webhook brings, while a list of the former one is still to come; there is
    no stream, nor an answer to the question for one."""
    bridge, free = Bridge(), threading.Event()
    bridge.hanging.add("_events")
    _, program = harried("--update-interval", "1", bridge=bridge, way="url", LIST_SECONDS=WAIT,
                         DOUBT_SECONDS=600.0)
    bridge.post_to, former = f"{program.base}/onebot", list(bridge.friends)
    bridge.answers["get_friend_list"] = lambda params: free.wait(WAIT) and {"data": former}
    for _ in "12":
        bridge.wait_call("get_friend_list")
    bridge.answers = {}
    bridge.uin, bridge.friends = 10009, [{"user_id": 20101, "nickname": "新", "remark": ""}]
    bridge.say_private(20101, "who")
    program.receiver.message("who")
    assert eventually(lambda: program.call("get_user_info").get("uid") == "10009")
    free.set()
    assert eventually(lambda: lists_of(program)[0] == ["20101"])


def test_an_account_whose_bridge_is_lost_while_it_loads_is_not_called_running(harried):
    bridge = Bridge()
    bridge.hanging |= {"get_friend_list", "get_group_list"}
    _, program = harried(bridge=bridge, running=False, LOOKUP_SECONDS=WAIT, LIST_SECONDS=WAIT)
    bridge.wait_call("get_friend_list")
    bridge.stop()
    program.log.wait("trying again in")
    program.log.wait("trying again in 2 s")
    assert link_state(program)["state"] != "running" and link_state(program)["error"]
    assert "running" not in [event["params"][1] for *_, event in program.receiver.posts
                             if event.get("event") == "state_change"]
    bridge.hanging.clear()
    bridge.start()
    until_running(program)


def test_echoes_that_come_before_the_answers_make_no_second_messages(harried):
    bridge, program = harried("--allow-message-sync", "1", BRIDGE_SECONDS=WAIT)
    numbers, free = itertools.count(7800), threading.Event()

    def send(params):
        number = next(numbers)
        bridge._message("echo", message_type="private", post_type="message_sent", user_id=10001,
                        target_id=20001, sender={"user_id": 10001}, message_id=number)
        if params["message"] == text_of("late"):
            free.wait(WAIT)
        return {"data": {"message_id": number}}

    bridge.answers["send_private_msg"] = send
    for text, later in ("echo", "0"), ("echo", "0"), ("late", "1"):
        program.call(TO_FRIEND, uid="20001", content=text, **{"async": later})
    bridge.wait_call("send_private_msg", lambda got: got["message"] == text_of("late"))
    for text in "meanwhile", "end":
        bridge.say_private(20001, text)
        program.receiver.message(text)
        free.set()
    assert eventually(lambda: [
        event["source"] for *_, event in list(program.receiver.posts)
        if event.get("class") == "send"] == ["local"] * 3)


def test_what_a_stop_leaves_unsent_is_told_as_failed(start, receive):
    receiver, controller = receive(), start("controller")
    controller.login("alice", post_api=receiver.url, send_interval="600")
    for text in "abc":
        assert controller.call(TO_FRIEND, client="alice", name="小灰", content=text,
                               **{"async": "1"})["code"] == 0
    assert receiver.next(lambda event: event.get("class") == "send")["code"] == 0
    assert controller.call("stop_client", client="alice")["code"] == 0
    for text in "bc":
        event = receiver.next(lambda event: event.get("class") == "send")
        assert (event["content"], event["code"], event["info"]) == (text, -3, "发送异常")
    controller.log.wait(r"2 message\(s\) waited to be sent, and were not")


def test_bodies_are_read_as_they_say_and_numbers_stay_as_they_were_written(pair):
    def part(about, value, kind=b""):
        return b"--X\r\nContent-Disposition: form-data; %b\r\n%b\r\n%b\r\n" % (about, kind, value)

    path, uid = "/openqq/send_friend_message?client=alice", part(b"name=uid", b"2854196301")
    edge, said = "a\r\n--X--more\r\n--Xmore", "一模".encode("gbk")  # which is UTF-8, too
    for body, text in [
            (uid + part(b'name="content"', edge.encode()), edge),
            (part(b'filename="a; name=z"; name="media_data"', PNG) + uid
             + part(b"name=content", b"b"), "b[图片]"),
            (uid + part(b"name=content", said, b"Content-Type: text/plain; charset=gbk\r\n"),
             "一模"), ('{"name":"小冰","content":1e999}', "1e999")]:
        heard(pair)
        body, kind = (body, JSON) if isinstance(body, str) else (
            body + b"--X--\r\n", "multipart/form-data; xboundary=Q; boundary=X")
        assert raw_call(pair.port, path, kind=kind, body=body)[0] == 200
        assert heard(pair)[0] == text
    for kind, body, said in ((JSON, '{"name":"x","content":["a",NaN]}', ""),
                             (FORM + "; charset=big5", "uid=2854196301&content=%A7A%A6n", "big5")):
        status, _, answer = raw_call(pair.port, path, kind=kind, body=body)
        assert status == json.loads(answer)["code"] == 400 and said in answer.decode()


def test_a_stop_waits_for_what_it_has_sent_so_that_nothing_comes_twice(start, receive):
    # a receiver that takes its time: something is always on its way
    receiver, controller = receive(lambda event: time.sleep(0.05)), start("controller")
    controller.login("alice", post_api=receiver.url)
    for number in range(20):
        controller.call("/local/say", client="alice", content=f"n{number}", **{"from": "小灰"})
        if number == 10:
            assert controller.call("update_client", client="alice", msg_ttl="3")["code"] == 0
    receiver.message("n19")
    said = [event["content"] for *_, event in receiver.posts if event.get("class") == "recv"]
    assert said == [f"n{number}" for number in range(20)]


def test_a_stop_of_all_while_events_wait_is_nothing_to_warn_of(start, receive):
    answers = threading.Event()
    receiver, controller = receive(lambda event: answers.wait(WAIT) and None), start("controller")
    controller.login("alice", post_api=receiver.url)
    assert controller.stop() == 0
    answers.set()
    assert "[warn]" not in controller.log.text()


def test_what_a_kill_leaves_of_a_file_is_removed_with_it(start, tmp_path):
    left = [put(os.path.join(str(tmp_path), f".openqq_mojo_webqq_{name}_{'0' * 32}"), b"S3CRET")
            for name in ("cookie_alice.dat", "state_alice.json", "controller_backend.dat")]
    controller = start("controller")
    assert not os.path.exists(left[2])
    controller.login("alice")
    assert not [path for path in left if os.path.exists(path)]
    put(left[0], b"S3CRET")
    assert controller.call("delete_client", client="alice")["code"] == 0
    assert not os.path.exists(left[0])


def test_an_accounts_file_does_not_decide_for_the_controller(start, tmp_path):
    bad = {name: {name: "x"} for name in ("token", "host", "account", "flavor", "world")}
    path = put(tmp_path / "accounts.json", json.dumps({**bad, "good": {}}))
    controller = start("controller", "--accounts", path)
    assert [row["account"] for row in controller.call("check_client")["client"]] == ["good"]
    for name in bad:
        controller.log.wait(f"{name} is the controller's to decide")


# ------------------------------------------------------------------------------------------------
# What a bot writer reaches for: on the network inside, and on a bridge
# ------------------------------------------------------------------------------------------------

def test_no_metadata_service_is_taken_for_a_bridge(exchanged):
    for number, url in enumerate(("ws://169.254.169.254", "http://169.254.169.254/latest",
                                  "ws://[::ffff:169.254.169.254]:80", "http://100.100.100.200")):
        exchanged.call("start_client", client=f"bad{number}", onebot_api=url)
        exchanged.log.wait(rf"\[bad{number}\].*link-local and metadata addresses are not called")
        exchanged.call("delete_client", client=f"bad{number}")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_the_controllers_memory_stays_small_after_many_starts_and_readers(start):
    """Behind the typed command, whose environment tells glibc not to keep what it needed once."""
    controller = start("controller", typed=True)

    def churn(number):
        for turn in range(much(2, 347)):
            name = f"churn{number}x{turn % 4}"
            assert controller.call("start_client", client=name, login_type="login",
                                   pwd="x")["code"] == 0
            assert eventually(lambda: controller.state(name)["state"] == "running")
            assert controller.call("delete_client", client=name)["code"] == 0

    with concurrent.futures.ThreadPoolExecutor(8) as crowd:
        list(crowd.map(churn, range(8)))
    for _ in range(much(10, 380)):  # fifty who open the stream of all events, and leave
        with contextlib.ExitStack() as crowd:
            socks = [crowd.enter_context(socket.create_connection(
                ("127.0.0.1", controller.port), WAIT)) for _ in range(50)]
            for sock in socks:
                sock.sendall(asking(line=b"GET /openqq/events?since=0 HTTP/1.1\r\n"))
            assert {sock.recv(12) for sock in socks} == {b"HTTP/1.1 200"}
    assert eventually(lambda: proc(controller.pid, "status", r"^VmRSS:\s+(\d+)") < 80 * 1024)
    with open(f"/proc/{controller.pid}/environ", "rb") as file:
        environment = file.read().split(b"\0")
    assert {b"MALLOC_ARENA_MAX=1", b"MALLOC_MMAP_THRESHOLD_=65536",
            b"MALLOC_TRIM_THRESHOLD_=131072"} <= set(environment)


def test_an_answer_an_event_and_a_quote_name_a_message_by_one_id(face):
    uid, words = those_known(face)["user"]["uid"], os.urandom(4).hex()

    def heard(**more):
        said = face.say("看", type="group_message", to="OpenQQ", **more)
        return face.receiver.next(lambda event: event.get("id") == str(said["id"]))

    sent = face.call("send_group_message", uid=OPENQQ_GROUP, content=f"小冰 {words}",
                     at=f"{XIAOHUI},{XIAOBING}")
    told = face.sent(f"小冰 {words}")
    echo, other = heard(reply_to=sent["id"], at=f"{uid},all"), heard(at="all")
    answer = face.call("send_friend_message", uid=XIAOHUI, content=words, reply_to=other["id"])
    last = face.sent(words)
    assert (told["id"], told["at"]) == (str(sent["id"]), [XIAOHUI, XIAOBING])
    assert (echo["content"], echo["reply_to"]) == ("@alice @全体成员 看", str(sent["id"]))
    assert (echo["at"], echo["at_me"]) == ([uid, "all"], 1)
    assert (other["at"], other["at_me"], other["reply_to"]) == (["all"], 0, None)
    assert (last["reply_to"], last["id"]) == (other["id"], str(answer["id"]))
    for seen in told, echo, other, last:
        assert face.call("get_message", id=seen["id"]) == seen
    for unknown in {}, {"id": ""}, {"id": "5"}, {"id": "../1"}:
        assert face.call("get_message", **unknown) == {"code": 100, "status": "object not found"}
    for bad in {"reply_to": "1;2"}, {"at": "me"}, {"at": "1,,x"}, {"at": "0"}:
        assert face.call("send_friend_message", uid=XIAOHUI, content="x", **bad)["code"] == 400
    assert face.call("call_action", action="get_status") == {
        "code": 201, "status": "not with this link"}


def test_a_bridges_ids_quotes_and_mentions_are_ours(qq):
    sent = qq.call(TO_GROUP, uid="30001", content="看这里", reply_to=7000001, at="40001,all")
    qq.bridge.wait_call("send_group_msg", lambda got: got["message"] == [
        segment("reply", id="7000001"), segment("at", qq="40001"), *text_of(" "),
        segment("at", qq="all"), *text_of(" "), *text_of("看这里")])
    assert qq.call(TO_FRIEND, uid="20001", content="x", reply_to="-5", at="20001")["code"] == 0
    qq.bridge.wait_call("send_private_msg", lambda got: got["message"] == [
        segment("reply", id="-5"), *text_of("x")])
    number = "-2147483647"
    quote, negative, gone = qq.events_of(
        in_group(30001, 40001, [
            segment("reply", id=str(sent["id"])), segment("at", qq="10001"), *text_of("嗯"),
            segment("at", qq="all"), segment("at", qq="0")]),
        private(20001, "负", message_id=int(number)),
        notice(notice_type="friend_recall", user_id=20001, message_id=int(number)))
    assert (quote["reply_to"], quote["at"], quote["at_me"]) == (
        str(sent["id"]), ["10001", "all"], 1)
    assert "嗯@全体成员" in quote["content"]
    assert qq.call("get_message", id=quote["id"])["content"] == quote["content"]
    assert (negative["id"], negative["at_me"], negative["reply_to"]) == (number, 0, None)
    assert gone["params"][0] == number
    assert qq.call("revoke_message", id=number)["code"] == 0
    assert qq.bridge.wait_call("delete_msg", lambda got: got["message_id"] == int(number))


def test_a_message_that_is_not_remembered_is_asked_of_the_bridge(qq):
    told = {"message_id": 123456, "message_type": "group", "group_id": 30001, "time": 1600000000,
            "message": [segment("text", text="早")]}
    for sender, wanted in (
            ({"user_id": 40001, "nickname": "路人"}, {
                "id": "123456", "content": "早", "sender": "路人", "group": "一家人",
                "time": "1600000000"}),
            ({"user_id": 10001}, {"class": "send", "code": 0, "content": "早", "msg": "发送成功"})):
        qq.bridge.answers["get_msg"] = {"data": {**told, "sender": sender}}
        assert wanted.items() <= qq.call("get_message", id="123456").items()
    for rubbish in ({"data": None}, {"data": []}, {"data": {"sender": 5}}, {"retcode": 100},
                    {"data": {"sender": {"user_id": 1}, "message": {"x": [1]}}}):
        qq.bridge.answers["get_msg"] = rubbish
        assert qq.call("get_message", id="123457").get("code", 0) in (0, 7, 100), rubbish
    del qq.bridge.answers["get_msg"]
    assert not qq.events_of()


def test_an_answer_quotes_and_mentions_where_it_says_so(tower):
    def answered(reply, **answer):
        """A message and the answer to it, as they were posted."""
        heard = tower.say("问" + reply, type="group_message", to="OpenQQ",
                          answer=(200, {}, {"reply": reply, **answer}))
        return heard, tower.posted("gina", reply)

    for number, yes in enumerate((1, "1", True)):
        heard, sent = answered(f"引用{number}", quote=yes, at_sender=yes)
        assert (sent["reply_to"], sent["at"]) == (heard["id"], [XIAOHUI])
    for number, more in enumerate((
            {"quote": 0, "at_sender": False}, {"quote": "yes", "at_sender": [1], "shutup": "2",
                                               "nonsense": {"a": 1}})):
        _, sent = answered(f"平{number}", **more)
        assert "reply_to" not in sent and "at" not in sent
    for number, reply in enumerate((True, float("nan"), float("inf"))):
        tower.say(f"没词{number}", answer=(200, {}, {"reply": reply}))
    tower.say("怪图", answer=(200, {}, {"reply": 12.0, "media": [
        "x\0y", "\ud800", "base64://", "", 5, None, "base64://" + PNG_TEXT]}))
    for said in "12", "[图片]":
        assert tower.posted("gina", lambda event: said in event.get("content", ""))["code"] == 0
    assert "fault of this program" not in tower.log.text()
    for said in "quote .*must be 0 or 1", "at_sender .*must be 0 or 1", "reply .*must be text":
        tower.log.wait(said.replace(" ", " in an answer of post_api ", 1))


def test_an_answer_does_on_a_bridge_what_it_wants(another, receive):
    wants = {"引": {"reply": "[CQ:face,id=1]好", "cq": 1, "quote": 1, "at_sender": 1},
             "坏": {"reply": "[CQ:image,file=file:///etc/passwd]", "cq": 1},
             "删": {"delete": 1, "kick": "1", "ban": True, "ban_duration": 120},
             "group": {"approve": "1", "reason": "好"}, "friend": {"approve": 0}}
    receiver = receive(lambda event: (200, {}, wants.get(
        event.get("content") or event.get("event", "").partition("_request")[0], {})))
    bridge = Bridge(sse=False)
    bot = another(bridge, post_api=receiver.url).running()
    bridge.say_group(30001, 40001, "引")
    message = bridge.wait_call("send_group_msg")["message"]
    assert [row["type"] for row in message] == ["reply", "at", "text", "face", "text"]
    bridge.say_group(30001, 40001, "坏")
    bot.program.log.wait("file in a CQ code not allowed")
    event = bridge.say_group(30001, 40001, "删")
    assert str(bridge.wait_call("delete_msg")["message_id"]) == str(event["message_id"])
    assert bridge.wait_call("set_group_ban")["duration"] == 120
    assert bridge.wait_call("set_group_kick")["user_id"] == "40001"
    bridge.emit(request_type="group", sub_type="add", group_id=30001, user_id=50001, flag="f1",
                comment="芝麻开门")
    assert bridge.wait_call("set_group_add_request") == {
        "flag": "f1", "sub_type": "add", "approve": True, "reason": "好"}
    bridge.emit(request_type="friend", user_id=50001, flag="f2", comment="")
    assert bridge.wait_call("set_friend_add_request")["approve"] is False


def test_somebody_who_asks_to_join_a_group_is_let_in_or_not_and_an_invitation_leads_in(together):
    alice, bob = together
    uid, me = alice.change("add", "person", name="求进"), alice.call("get_user_info")["uid"]
    for accept, reason in ("0", "满了"), ("1", ""):
        alice.change("add", "group_request", uid, OPENQQ_GROUP, comment="芝麻开门")
        [row] = alice.event("group_request", lambda params: params[0]["uid"] == uid)
        asked = {"ticket": row.pop("ticket"), "accept": accept, "reason": reason}
        assert row == {"group": "OpenQQ", "group_uid": OPENQQ_GROUP, "uid": uid, "name": "求进",
                       "comment": "芝麻开门", "kind": "join"}
        assert bob.call("accept_group_request", **asked)["code"] == -1, "who owns nothing there"
        assert alice.call("accept_group_request", **asked) == {**OK, "ticket": asked["ticket"]}
        assert alice.call("accept_group_request", **asked)["code"] == -1, "one answer only"
    event = alice.receiver.next(lambda event: event.get("event") == "new_group_member")
    assert (event["params"][0]["uid"], event["kind"], event["operator_uid"]) == (
        uid, "approve", me)
    alice.change("remove", "person", uid)
    group = alice.change("add", "group", name=f"新群{os.urandom(3).hex()}", owner_uid=XIAOHUI)
    alice.change("add", "group_request", me, group, **{"from": XIAOHUI})
    [row] = alice.event("group_request", lambda params: params[0]["group_uid"] == group)
    assert (row["kind"], row["uid"], row["name"]) == ("invite", XIAOHUI, "小灰")
    assert alice.call("accept_group_request", ticket=row["ticket"])["code"] == 0
    assert alice.event("new_group")[0]["uid"] == group
    assert alice.call("leave_group", group_uid=group) == OK
    assert alice.event("lose_group")[0]["uid"] == group
    alice.change("remove", "group", group)


def test_requests_on_a_bridge_are_told_and_answered_also_those_of_before(bridged):
    qq = bridged["ws"]
    [event] = qq.events_of(lambda bridge: bridge.emit(
        request_type="group", sub_type="add", group_id=30001, user_id=50001, flag="g:1",
        comment="问题:答案"))
    assert event["params"] == [{
        "group": "一家人", "group_uid": "30001", "uid": "50001", "name": "50001",
        "comment": "问题:答案", "kind": "join", "ticket": "add:g:1"}]
    assert qq.call("accept_group_request", ticket="add:g:1", accept=0, reason="满")["code"] == 0
    qq.bridge.wait_call("set_group_add_request", lambda got: got == {
        "flag": "g:1", "sub_type": "add", "approve": False, "reason": "满"})
    waiting = {"join_requests": [
        {"request_id": 71, "requester_uin": 50002, "message": "嗨", "group_id": 30001,
         "group_name": "一家人", "checked": False},
        {"request_id": 72, "requester_uin": 50003, "group_id": 30001, "checked": True}, None, 5],
        "InvitedRequest": [{"request_id": 73, "invitor_uin": 20001, "group_id": 39999,
                            "group_name": "外群", "checked": False}]}
    for told in [], waiting:
        asked = threading.Event()
        qq.bridge.answers["get_group_system_msg"] = lambda params: asked.set() or {"data": told}
        qq.bridge.drop()
        assert asked.wait(WAIT)

    def requests():
        return [event["params"][0] for event in qq.call("check_event", since=qq.seq)
                if event.get("event") == "group_request"]

    assert eventually(lambda: len(requests()) == 2)
    del qq.bridge.answers["get_group_system_msg"]
    assert [(row["kind"], row["uid"], row["group"], row["ticket"]) for row in requests()] == [
        ("join", "50002", "一家人", "add:71"), ("invite", "20001", "外群", "invite:73")]
    qq.running()


BRIDGE_ACTS = [  # whether of a member, what is called, what the bridge gets besides the place
    (1, "shutup_group_member", {"time": 0}, "set_group_ban", {"duration": 0}),
    (0, "shutup_group_member", {"all": 1}, "set_group_whole_ban", {"enable": True}),
    (0, "shutup_group_member", {"all": 1, "time": 0}, "set_group_whole_ban", {"enable": False}),
    (1, "set_group_card", {"card": "新"}, "set_group_card", {"card": "新"}),
    (1, "set_group_card", {}, "set_group_card", {"card": ""}),
    (1, "set_group_admin", {}, "set_group_admin", {"enable": True}),
    (1, "set_group_admin", {"enable": 0}, "set_group_admin", {"enable": False}),
    (1, "set_group_title", {"title": "元老"}, "set_group_special_title", {"special_title": "元老"}),
    (0, "set_group_name", {"name": "新名"}, "set_group_name", {"group_name": "新名"}),
    (0, "leave_group", {}, "set_group_leave", {}), (1, "poke", {}, "group_poke", {})]


def test_moderation_reaches_the_bridge(qq):
    for member, name, params, action, wanted in BRIDGE_ACTS:
        wanted = {"group_id": "30001", **wanted, **({"user_id": "40001"} if member else {})}
        for key in "id", "uid":
            given = {**params, **({"member_" + key: 40001} if member else {})}
            assert qq.call(name, **{"group_" + key: 30001}, **given) == OK, name
            qq.bridge.wait_call(action, lambda got: got == wanted)
        qq.bridge.answers[action] = {"retcode": 100, "wording": "无权限"}
        assert qq.call(name, group_uid=30001, **given) == FAILED
        del qq.bridge.answers[action]
        qq.bridge.wait_call(action)
        assert qq.call(name, group_uid=1, **given)["code"] == 100
    for name, code in (("set_group_card", 200), ("set_group_admin", 200), ("poke", 200),
                       ("set_group_title", 200), ("set_group_name", 201)):
        assert qq.call(name, group_uid=30001)["code"] == code
    for name, action in ("delete_friend", "delete_friend"), ("poke", "friend_poke"):
        assert qq.call(name, uid=20002)["code"] == 0
        qq.bridge.wait_call(action, lambda got: got == {"user_id": "20002"})
        assert qq.call(name)["code"] == 100


def test_moderation_files_and_mentions_work_on_the_network_inside(together):
    alice, bob = together
    alice.forget(), bob.forget()
    uid = bob.call("get_user_info")["uid"]
    group, named = {"group_uid": OPENQQ_GROUP}, {"group_uid": OPENQQ_GROUP, "member_uid": uid}

    def says(face, content="x", **more):
        return face.call("send_group_message", uid=OPENQQ_GROUP, content=content, **more)

    card = f"小鲍{time.monotonic_ns()}"  # what others left on its way comes before it
    assert alice.call("set_group_card", card=card, **named) == OK
    changed = alice.receiver.next(lambda event: card in event.get("params", ()))
    assert (changed["event"], changed["params"][1], changed["group_uid"]) == (
        "group_member_property_change", "card", OPENQQ_GROUP)
    for api, given, change in (("title", {"title": "元老"}, ["title", None, "元老"]),
                               ("admin", {"enable": 1}, ["role", "member", "admin"]),
                               ("admin", {"enable": 0}, ["role", "admin", "member"])):
        assert alice.call("set_group_" + api, **given, **named) == OK
        assert alice.event("group_member_property_change")[1:] == change
    assert [row["title"] for row in bob.group()["member"] if row["uid"] == uid] == ["元老"]
    assert bob.call("set_group_title", title="x", **named) == FAILED
    assert bob.call("shutup_group_member", all=1, **group) == FAILED
    for how, seconds, code in ({}, -1, -4), ({"time": 0}, 0, 0):
        assert alice.call("shutup_group_member", all=1, **how, **group) == OK
        who, by, *rest = bob.event("group_shutup")
        assert (who, by["name"], rest[0], rest[1]["uid"]) == (
            None, "alice", seconds, OPENQQ_GROUP)
        assert (says(bob)["code"], says(alice)["code"]) == (code, 0)
    for place, where in ({"uid": uid}, None), (named, "OpenQQ"):
        assert alice.call("poke", **place) == OK
        assert [row and row["name"] for row in bob.event("poke")] == ["alice", "bob", where]
    for old, new in ("OpenQQ", "改名"), ("改名", "OpenQQ"):
        assert alice.call("set_group_name", name=new, **group) == OK
        assert alice.event("group_property_change")[1:] == ["name", old, new]
    for api in "card", "title":
        alice.call("set_group_" + api, **{api: ""}, **named)
    person = alice.change("add", "person", name="将别")
    alice.change("add", "friend", person, "alice")
    # Before that the client knows no such.
    assert alice.event("new_friend", lambda params: params[0]["uid"] == person)
    assert alice.call("delete_friend", uid=person)["code"] == 0
    assert alice.event("lose_friend")[0]["uid"] == person
    alice.change("remove", "person", person)
    bob.forget()
    sent = says(alice, "", media_name="a.zip", media_data=base64.b64encode(b"PK\3\4").decode())
    who, file, where = bob.event("group_upload")
    assert (who["name"], where["name"]) == ("alice", "OpenQQ")
    assert file == {"name": "a.zip", "size": "4", "id": str(sent["id"])}
    says(alice, "对吗", at=uid, reply_to=sent["id"])
    heard = bob.receiver.message("@bob 对吗")
    assert (heard["at"], heard["at_me"], heard["reply_to"]) == ([uid], 1, str(sent["id"]))


def test_what_happens_in_groups_on_a_bridge_is_told(qq):
    def told(event, **row):
        """What an event has, members by their uid, of a notice that is one event."""
        [found] = qq.events_of(notice(**row))
        assert found["event"] == event
        return [part.get("uid", part) if isinstance(part, dict) else part
                for part in found["params"]], found.get("kind"), found.get("operator_uid")

    ban = {"notice_type": "group_ban", "group_id": 30001, "operator_id": 10001}
    for user_id, seconds in (40001, 600), (40001, 0), (0, -1), (0, 0):
        assert told("group_shutup", **ban, sub_type="ban" if seconds else "lift_ban",
                    user_id=user_id, duration=seconds)[0] == [
                        str(user_id) if user_id else None, "10001", seconds, "30001"]
    poke = {"notice_type": "notify", "sub_type": "poke", "target_id": 10001}
    assert told("poke", **poke, group_id=30001, user_id=40001)[0] == ["40001", "10001", "30001"]
    assert told("poke", **poke, user_id=20001)[0] == ["20001", "10001", None]
    file = {"id": "/f", "name": "a.zip", "size": 7}
    assert told("group_upload", notice_type="group_upload", group_id=30001, user_id=40001,
                file={**file, "busid": 1})[0] == ["40001", {**file, "size": "7"}, "30001"]
    [[row], _, _] = told("onebot_event", notice_type="essence", group_id=30001, message_id=5,
                         sub_type="add", strange={"deep": [1]})
    assert (row["notice_type"], row["strange"]) == ("essence", {"deep": [1]})
    for sub_type in "group_card", "group_decrease", "friend_recall":  # no notices of notify
        told("onebot_event", notice_type="notify", sub_type=sub_type, group_id=30001, user_id=40001,
             message_id=5)
    told("onebot_event", notice_type="poke", user_id=40001, target_id=10001)  # only of notify
    for kind in "invite", "approve":
        event = qq.events_of(notice(notice_type="group_increase", sub_type=kind, group_id=30001,
                                    user_id=50077, operator_id=40001))[-1]
        assert (event["event"], event["kind"], event["operator_uid"]) == (
            "new_group_member", kind, "40001")
        assert told("lose_group_member", notice_type="group_decrease", sub_type="leave",
                    group_id=30001, user_id=50077, operator_id=50077)[1] == "leave"


def test_a_file_goes_out_as_a_file_and_one_that_comes_is_had_when_it_is_wanted(qq, gallery):
    data = {"media_data": base64.b64encode(b"PK\3\4").decode(), "media_name": "a.zip"}
    for api, uid, action, place in ((TO_GROUP, 30001, "upload_group_file", "group_id"),
                                    (TO_FRIEND, 20001, "upload_private_file", "user_id")):
        answer = qq.call(api, uid=uid, **data)
        assert (answer["code"], answer["id"]) == (0, None)
        assert qq.bridge.wait_call(action) == {
            "file": "base64://" + data["media_data"], "name": "a.zip", place: str(uid)}
    assert qq.call(TO_GROUP, uid=30001, content="看", **data)["id"]
    qq.bridge.wait_call("send_group_msg", lambda got: got["message"] == text_of("看"))
    assert qq.bridge.wait_call("upload_group_file")
    [event] = qq.events_of(in_group(30001, 40001, [segment(
        "file", file="b.zip", file_id="/abc", file_size="9")]))
    [file] = event["media"]
    assert (file["type"], file["name"], file["size"]) == ("file", "b.zip", "9")
    path = "/openqq/" + file["url"].partition("/openqq/")[2]
    for told, answer in (({"data": {"url": gallery.url + "/b.zip"}}, (302, gallery.url + "/b.zip")),
                         ({"data": {"url": gallery.url + "/b\r\nX: y"}},
                          (302, gallery.url + "/b%0D%0AX:%20y")),
                         ({"data": {"url": "file:///etc/passwd"}}, (404, None)),
                         ({"data": None}, (404, None)), ({"retcode": 100}, (404, None))):
        qq.bridge.answers["get_group_file_url"] = told
        status, headers, _ = request(qq.program.base, path)
        assert (status, headers.get("location")) == answer
        assert qq.bridge.wait_call("get_group_file_url") == {
            "group_id": "30001", "file_id": "/abc"}
    del qq.bridge.answers["get_group_file_url"]
    for number in "²", "1", "9" * 5000, "-1", "x":  # none of that message's files
        query = urllib.parse.urlencode({"id": f"{event['id']}.{number}", "client": qq.name})
        assert request(qq.program.base, "/openqq/get_media?" + query)[0] == 404, number


CALL_REFUSED = [
    {"file": "/etc/passwd"}, {"file": "file:///etc/passwd"}, {"a": [{"url": "C:\\x"}]},
    {"message": [{"type": "image", "data": {"file": "FILE:///x"}}]}, {"path": ".."},
    {"message": "[CQ:image,file=file:///etc/passwd]"}, {"image_uri": "/x"},
    {"operation": {"reply": "[CQ:record,url=/etc/passwd]"}}, {"uri": "ftp://h/x"},
    {"messages": [{"type": "node", "data": {"content": [{"type": "video", "data": {
        "file": "/x"}}]}}]}]


def test_any_other_action_is_handed_to_the_bridge_and_nothing_of_this_machine(qq):
    def act(action, params):
        return qq.call("call_action", action=action, params=params if isinstance(
            params, str) else json.dumps(params))

    given = {"number": 30001, "file": "a.png"}
    for told, wanted in (
            (lambda params: {"data": [params]}, {**OK, "data": [given]}),
            ({"retcode": 1200, "wording": "不行"}, {**FAILED, "retcode": 1200, "info": "不行"})):
        qq.bridge.answers["get_essence_msg_list"] = told
        assert act("get_essence_msg_list", given) == wanted
    del qq.bridge.answers["get_essence_msg_list"]
    assert qq.call("call_action", action="no_such_thing")["code"] == 201
    count = len(qq.bridge.calls)
    own = f"http://127.0.0.1:{qq.program.port}/openqq/stop_client?client={qq.name}"
    for code, refused in {
            6: [*((name, {}) for name in (
                "get_cookies", "get_csrf_token", "get_credentials", "set_restart", "clean_cache",
                "bot_exit", "nc_get_rkey", "get_clientkey", "get_cookies_async", "SET_RESTART",
                ".get_cookies")), *(("send_msg", params) for params in CALL_REFUSED)],
            400: [*((name, {}) for name in (
                "", "a/b", "../x", "a b", "x" * 65, "动作", "a?b=1", "a%2fb")),
                *(("get_status", text) for text in ("[]", "5", "{", '"x"', '{"a":1e999}' * 2)),
                ("send_msg", {"url": own}),
                ("send_msg", {"message": f"[CQ:image,file={cq_value(own)}]"})]}.items():
        for action, params in refused:
            assert act(action, params)["code"] == code, (action, params)
    assert len(qq.bridge.calls) == count
    assert qq.call("update_client", call_action_all=1)["code"] in (6, 400), "not for callers"


# ------------------------------------------------------------------------------------------------
# Real QQ by Milky (MILKY.md)
# ------------------------------------------------------------------------------------------------

# An account for each way that events come, each on a bridge with the ways of an implementation.
MILKY_WAYS = {"llbot": {"late_refusal": True},
              "lagrange": {"ws": False, "missing": {"accept_friend_request"}},
              "yogurt": {"own": True, "pieces": 5},
              "posts": {"ws": False, "sse": False, "fields": "1.0"}}


@pytest.fixture(scope="module")
def milked(exchanged):
    """An account for each way, running; for tests that leave it as it was."""
    bridges = {name: MilkyBridge(token="t0ken", **quirks) for name, quirks in MILKY_WAYS.items()}
    for bridge in bridges.values():
        bridge.groups.append({
            "group_id": 30002, "group_name": "二群", "remark": "备注", "description": "说明",
            "created_time": 1500000000, "members": [
                bridge.member(10001, "admin"), bridge.member(40002, "owner", card="群主")]})
    with on_bridges(exchanged, bridges) as accounts:
        yield accounts


@pytest.fixture(params=list(MILKY_WAYS))
def milky(request, milked):
    """Each of these accounts."""
    return milked[request.param]


def test_an_account_runs_on_a_milky_bridge_and_check_client_says_which_link(milky):
    row = milky.state()
    assert (row["state"], row["link"]) == ("running", "milky")
    assert "t0ken" not in json.dumps([milky.started, row, milky.program.log.text()])
    user = milky.call("get_user_info")
    assert (user["uid"], user["name"]) == ("10001", "阿猫")
    shown = ("uid", "name", "markname", "category")
    assert [tuple(row[name] for name in shown) for row in milky.call("get_friend_info")] == [
        ("20001", "小明", "老明", "我的好友"), ("20002", "小红", None, "我的好友")]
    [second] = milky.call("search_group", uid="30002")
    new = milky.bridge.fields != "1.0"
    shown = ("uid", "name", "markname", "memo", "createtime", "role", "owner_uid", "max_member")
    assert [second[name] for name in shown] == [
        "30002", "二群", "备注" if new else None, "说明" if new else None,
        "1500000000" if new else None, "manage", "40002", 2000]
    assert [(row["uid"], row["card"], row["role"]) for row in second["member"]] == [
        ("10001", None, "admin"), ("40002", "群主", "owner")]


MILKY_SAID = [  # (a segment's type and data, what is read)
    ("text", {"text": "[CQ:at,qq=1]&"}, "[CQ:at,qq=1]&"),
    ("mention", {"user_id": 40001, "name": "谁"}, "@路人 "), ("mention_all", {}, "@全体成员 "),
    ("face", {"face_id": "14", "is_large": False}, "[表情]"),
    ("image", {"resource_id": "R", "temp_url": "http://h.example/a", "width": 1, "height": 1,
               "summary": "[动画表情]", "sub_type": "sticker"}, "[动画表情]"),
    ("forward", {"forward_id": "F", "title": "聊天", "preview": ["a"], "summary": "查看3条"},
     "查看3条"),
    ("market_face", {"emoji_package_id": 1, "emoji_id": "1", "key": "k", "summary": "[汪汪]",
                     "url": "http://h"}, "[汪汪]"),
    ("light_app", {"app_name": "x", "json_payload": '{"prompt":"[分享]题"}'}, "[分享]题"),
    ("xml", {"service_id": 1, "xml_payload": "<msg brief='题'/>"}, "题"),
    ("markdown", {"content": "# 一"}, "# 一"), ("new_thing", {"x": [1]}, "[new_thing]")]


def test_what_is_said_by_milky_reads_as_on_any_bridge(milked):
    milky = milked["llbot"]
    milky.call("get_group_info")
    said = [[segment(kind, **data)] for kind, data, _ in MILKY_SAID]
    said.append([5, None, {"type": 7}, {"type": "mention", "data": "x"}])
    events = milky.events_of(*(in_group(30001, 40001, segments) for segments in said))
    assert [event["content"] for event in events] == [
        *(text for _, _, text in MILKY_SAID), "5[?][7][at]"]
    for event in events:
        shown = {**IN_FAMILY, **BY_PASSER, "receiver_uid": "10001"}
        assert {name: event[name] for name in shown} == shown
        assert 2 ** 30 <= int(event["id"]) < 2 ** 31
    assert len({event["id"] for event in events}) == len(events)


def test_messages_come_by_each_way_once_and_say_where_they_come_from(milky):
    events = milky.events_of(
        private(20001, "一"), in_group(30001, 40001, "二"),
        lambda bridge: bridge.say("temp", 40001, 40001, "三", group=bridge.group(30001)),
        lambda bridge: bridge.say("temp", 50001, 50001, "四", group=None),
        lambda bridge: bridge.emit(
            "message_receive", message_scene="friend", peer_id="20001", message_seq="90001",
            sender_id="20001", time="1700000000", segments=text_of("五")))  # numbers as text
    assert [(event["content"], event["type"], event.get("group"), event["sender_uid"])
            for event in events] == [
        ("一", "friend_message", None, "20001"), ("二", "group_message", "一家人", "40001"),
        ("三", "sess_message", "一家人", "40001"), ("四", "friend_message", None, "50001"),
        ("五", "friend_message", None, "20001")]
    again = milky.bridge.said["friend", 20001][-1]
    assert milky.events_of(lambda bridge: bridge.emit("message_receive", **again)) == []


def test_what_is_sent_by_milky_has_its_types_and_comes_once(milky):
    milky.up_to_a_word()
    for kind, where, place, wanted in (
            ("friend", {"uid": "20001"}, ("friend", 20001), {"user_id": 20001}),
            ("group", {"uid": "30001"}, ("group", 30001), {"group_id": 30001}),
            ("sess", {"uid": "40001", "group_uid": "30001"}, ("temp", 40001), {"user_id": 40001})):
        text, name = os.urandom(6).hex() + "[CQ:at,qq=1]", "group" if kind == "group" else "private"
        sent = milky.call(f"send_{kind}_message", content=text, **where)
        assert sent["code"] == 0, sent
        milky.bridge.wait_call(f"send_{name}_message", lambda got: got == {
            **wanted, "message": text_of(text)})
        assert [(event["content"], event["id"]) for event in milky.up_to_a_word()
                if event.get("class") == "send"] == [(text, str(sent["id"]))]
        assert milky.call("revoke_message", id=sent["id"])["code"] == 0
        got = milky.bridge.wait_call(f"recall_{name}_message")
        if kind != "friend":  # there the word that ends the list came after it
            assert got == {**wanted, "message_seq": milky.bridge.seqs[place]}
    assert not milky.bridge.faults


def test_codes_and_pictures_go_out_in_milkys_segments(milked):
    milky = milked["yogurt"]
    [event] = milky.events_of(in_group(30001, 40001, "引用我"))
    row = milky.bridge.said["group", 30001][-1]
    [quote] = milky.events_of(in_group(30001, 20001, [segment(
        "reply", message_seq=row["message_seq"], sender_id=40001, time=row["time"], segments=[]),
        *text_of("后")]))
    assert (quote["reply_to"], quote["content"]) == (event["id"], "后")
    assert milky.call("get_message", id=event["id"])["content"] == "引用我"
    sent = milky.call(TO_GROUP, uid="30001", reply_to=event["id"], at="40001,all", cq="1",
                      content="看[CQ:face,id=14][CQ:image,file=http://h.example/a]",
                      media_data=PNG_TEXT)
    assert sent["code"] == 0, sent
    got = milky.bridge.wait_call("send_group_message", lambda got: len(got["message"]) > 5)
    assert [(part["type"], *part["data"].values()) for part in got["message"]] == [
        ("reply", row["message_seq"]), ("mention", 40001), ("text", " "), ("mention_all",),
        ("text", " "), ("text", "看"), ("face", "14"), ("image", "http://h.example/a"),
        ("image", "base64://" + PNG_TEXT)]
    for more, said in (({"content": "[CQ:poke,id=1]", "cq": "1"}, "cannot send this segment"),
                       ({"content": "[CQ:image,file=x]", "cq": "1"}, "cannot send this segment"),
                       ({"content": "x", "reply_to": event["id"]}, "another conversation"),
                       ({"content": "x", "reply_to": "5"}, "nothing is known any more")):
        sent = milky.call(TO_FRIEND, uid="20001", **more)
        assert sent["code"] != 0 and said in json.dumps(sent), sent
    milky.up_to_a_word()


def test_a_quoted_message_that_never_came_is_had_from_milky(milked):
    milky = milked["lagrange"]
    said = milky.bridge.say("group", 30001, 40001, "早", tell=False)
    [event] = milky.events_of(in_group(30001, 20001, [segment(
        "reply", message_seq=said["message_seq"], sender_id=40001, time=said["time"],
        segments=[])]))
    found = milky.call("get_message", id=event["reply_to"])
    assert (found["content"], found["sender_uid"]) == ("早", "40001"), found


NUDGE = {"display_action": "", "display_suffix": "", "display_action_img_url": ""}
MILKY_TOLD = {
    "message_recall": (dict(message_scene="group", peer_id=30001, message_seq=7, sender_id=40001,
                            operator_id=10001, display_suffix=""), "revoke_message"),
    "friend_request": (dict(initiator_id=50001, initiator_uid="u_x", comment="我", via=""),
                       "friend_request"),
    "group_join_request": (dict(group_id=30001, notification_seq=5, is_filtered=True,
                                initiator_id=50001, comment="我"), "group_request"),
    "group_invited_join_request": (dict(group_id=30001, notification_seq=6, initiator_id=40001,
                                        target_user_id=50002), "group_request"),
    "group_invitation": (dict(group_id=30009, invitation_seq=8, initiator_id=50001),
                         "group_request"),
    "friend_nudge": (dict(user_id=20001, is_self_send=False, is_self_receive=True, **NUDGE),
                     "poke"),
    "group_nudge": (dict(group_id=30001, sender_id=40001, receiver_id=10001, **NUDGE), "poke"),
    "group_file_upload": (dict(group_id=30001, user_id=40001, file_id="/F", file_name="a.zip",
                               file_size=7), "group_upload"),
    "group_mute": (dict(group_id=30001, user_id=40001, operator_id=10001, duration=60),
                   "group_shutup"),
    "group_whole_mute": (dict(group_id=30001, operator_id=10001, is_mute=True), "group_shutup"),
    "group_message_reaction": (dict(group_id=30001, user_id=40001, message_seq=7, face_id="1",
                                    reaction_type="face", is_add=True), "milky_event"),
    "peer_pin_change": (dict(message_scene="friend", peer_id=20001, is_pinned=True),
                        "milky_event"),
    "friend_file_upload": (dict(user_id=20001, file_id="/F", file_name="a.zip", file_size=7,
                                file_hash="H", is_self=False), "milky_event")}


def test_each_event_of_milkys_is_told_once_and_in_the_documented_words(milky):
    bridge, found = milky.bridge, {}
    for kind, (data, name) in MILKY_TOLD.items():
        [event] = milky.events_of(lambda bridge, kind=kind, data=data: bridge.emit(kind, **data))
        assert event["event"] == name, (kind, event)
        found[kind] = event["params"]
    assert found["message_recall"][1:] == ["40001", "10001", "30001"]
    assert [found[kind][2] for kind in ("group_mute", "group_whole_mute")] == [60, -1]
    assert [who["uid"] for who in found["friend_nudge"][:2]] == ["20001", "10001"]
    assert [who["uid"] for who in found["group_nudge"][:2]] == ["40001", "10001"]
    assert found["group_file_upload"][1] == {"id": "/F", "name": "a.zip", "size": "7"}
    assert found["peer_pin_change"][0]["data"] == MILKY_TOLD["peer_pin_change"][0]
    assert found["friend_request"][0]["ticket"] == "u_x"
    place = {"group_id": 30001}
    for kind, asked_for, call, wanted in (
            ("group_join_request", ("join", "50001"), "group_request", dict(
                notification_seq=5, notification_type="join_request", is_filtered=True, **place)),
            ("group_invited_join_request", ("join", "50002"), "group_request", dict(
                notification_seq=6, notification_type="invited_join_request", is_filtered=False,
                **place)),
            ("group_invitation", ("invite", "50001"), "group_invitation", dict(
                group_id=30009, invitation_seq=8))):
        row = found[kind][0]
        assert (row["kind"], row["uid"]) == asked_for
        for accept, verb in ("1", "accept_"), ("0", "reject_"):
            assert milky.call("accept_group_request", ticket=row["ticket"],
                              accept=accept)["code"] == 0
            got = bridge.wait_call(verb + call)
            assert {key: got[key] for key in wanted} == wanted
    for accept, call in ("1", "accept_friend_request"), ("0", "reject_friend_request"):
        said = milky.call("accept_friend_request", ticket="u_x", accept=accept)
        assert (said["code"] == 0) == (call not in bridge.missing)
        if call in bridge.missing:
            milky.program.log.wait("knows no " + call)
        else:
            assert bridge.wait_call(call) == {"initiator_uid": "u_x"}
    assert not bridge.faults


def test_a_groups_new_name_that_comes_with_ones_own_message_counts(another):
    me = another(MilkyBridge(own=True), "milky-echo").running()
    for number in range(8):
        me.bridge.groups[0]["group_name"] = f"名{number}"
        assert me.call("send_group_message", id=30001, content="x")["code"] == 0
        assert eventually(lambda: me.call("search_group", id=30001)[0]["name"] == f"名{number}")


def test_requests_of_before_are_told_by_milky_too(another):
    bridge = MilkyBridge()
    row = {"type": "join_request", "group_id": 30001, "notification_seq": 5, "is_filtered": True,
           "initiator_id": 50001, "state": "pending", "operator_id": None, "comment": "我"}
    bridge.requests = [row, {**row, "notification_seq": 6, "state": "accepted"}, {
        "type": "quit", "group_id": 30001, "notification_seq": 7, "target_user_id": 40001}]
    me = another(bridge).running()
    [told] = eventually(lambda: [event["params"][0] for event in me.call("check_event", since=0)
                                 if event.get("event") == "group_request"])
    assert (told["uid"], told["comment"]) == ("50001", "我")
    assert me.call("accept_group_request", ticket=told["ticket"])["code"] == 0
    assert bridge.wait_call("accept_group_request").items() <= row.items() | {
        "notification_type": "join_request"}.items()
    assert not bridge.faults


def test_groups_are_governed_in_milkys_words(milked):
    milky = milked["llbot"]
    place, muted = ({"group_uid": "30001", "member_uid": "40001"},
                    {"group_id": 30001, "user_id": 40001})
    for path, params, call, wanted in (
            ("shutup_group_member", {"time": "2", **place}, "set_group_member_mute",
             {**muted, "duration": 120}),
            ("shutup_group_member", {"time": "0", **place}, "set_group_member_mute",
             {**muted, "duration": 0}),
            ("call_action", {"action": "send_profile_like", "params": '{"user_id":"20001"}'},
             "send_profile_like", {"user_id": 20001})):
        said = milky.call(path, **params)
        assert said["code"] == 0, said
        assert milky.bridge.wait_call(call) == wanted
    assert not milky.bridge.faults


def test_entities_in_messages_keep_the_roster_fresh(milked):
    milky = milked["yogurt"]
    milky.call("get_group_info")
    member = {**milky.bridge.person(30001, 40001), "card": "新片", "title": "新衔"}
    events = milky.events_of(
        lambda bridge: bridge.say("group", 30001, 40001, "好", group_member=member,
                                  group={**bridge.group(30001), "group_name": "新名",
                                         "remark": "新备注"}),
        lambda bridge: bridge.say("friend", 20002, 20002, "好", friend={
            **bridge.friend(20002), "remark": "老红", "category": {
                "category_id": 2, "category_name": "同事"}}))
    told = {(event["event"], event["params"][1]): event["params"][3]
            for event in events if "event" in event}
    assert told == {
        ("group_property_change", "name"): "新名", ("group_property_change", "markname"): "新备注",
        ("group_member_property_change", "card"): "新片",
        ("group_member_property_change", "title"): "新衔",
        ("friend_property_change", "markname"): "老红",
        ("friend_property_change", "category"): "同事"}
    milky.events_of(lambda bridge: bridge.say_group(30001, 40001, "好"),
                    lambda bridge: bridge.say_private(20002, "好"))
    [friend] = milky.call("search_friend", uid="20002")
    assert (friend["markname"], friend["category"]) == (None, "我的好友")


def test_media_come_with_where_they_are_and_files_go_up(milked):
    milky = milked["llbot"]
    [event] = milky.events_of(private(20001, [segment(
        "image", resource_id="R", temp_url="http://h.example/a", width=1, height=1, summary="",
        sub_type="normal"), segment("file", file_id="/F", file_name="a.zip", file_size=7,
                                    file_hash="H")]))
    assert event["content"] == "[图片][文件]a.zip"
    assert [(row["type"], row["url"], row["name"]) for row in event["media"]] == [
        ("image", "http://h.example/a", "R"), ("file", event["media"][1]["url"], "a.zip")]
    request(milky.program.base, f"/openqq/get_media?client=llbot&id={event['id']}.1")
    assert milky.bridge.wait_call("get_private_file_download_url") == {
        "user_id": 20001, "file_id": "/F", "file_hash": "H"}
    sent = milky.call(TO_GROUP, uid="30001", media_name="b.zip", media_data="emlw")
    assert sent["code"] == 0, sent
    assert milky.bridge.wait_call("upload_group_file") == {
        "group_id": 30001, "file_uri": "base64://emlw", "file_name": "b.zip"}
    assert not milky.bridge.faults


@pytest.mark.parametrize("way", ["llbot", "lagrange"])
def test_what_was_said_while_the_stream_was_lost_is_told_once_and_in_order(milked, way):
    me = milked[way]
    me.up_to_a_word()
    me.bridge.say_private(20001, "一")
    me.bridge.say_group(30001, 40001, "壹")
    assert me.said() == ["一", "壹"]
    me.bridge.drop()
    for number in range(70):  # more than a page, said before it hears again
        me.bridge.say_private(20001, f"失{number}", tell=False)
    me.bridge.say_group(30001, 40001, "贰", tell=False)
    me.bridge.connected()
    assert me.call(TO_FRIEND, uid="20001", content="我")["code"] in (0, 300)
    me.bridge.say_private(20001, "活")
    eventually(lambda: "活" in [event.get("content") for event in me.call(
        "check_event", since=me.seq)])
    said = me.said()
    assert [text for text in said if text[0] in "失活"] == [
        *(f"失{number}" for number in range(70)), "活"]
    assert said.count("贰") == 1 and not {"一", "壹"} & set(said)


def test_ids_are_turned_back_after_a_restart_and_what_was_said_meanwhile_comes(milked):
    me = milked["yogurt"]
    [event] = me.events_of(private(20001, "先"))
    row = me.bridge.said["friend", 20001][-2]  # the last but the word that ended the list
    me.up_to_a_word()  # so that what came before stands in its book
    pid = me.state()["pid"]
    os.kill(pid, signal.SIGKILL)
    me.bridge.left()
    me.bridge.say_private(20001, "中", tell=False)
    assert eventually(lambda: me.state()["pid"] != pid)
    me.running()
    assert [text for text in me.said() if text in ("先", "中")] == ["中"]
    sent = me.call(TO_FRIEND, uid="20001", content="答", reply_to=event["id"])
    assert sent["code"] == 0, sent
    me.bridge.wait_call("send_private_message", lambda got: got["message"][0] == segment(
        "reply", message_seq=row["message_seq"]))


def test_a_bridge_that_is_not_logged_in_says_where_to_look_and_runs_afterwards(another):
    bridge = MilkyBridge()
    bridge.logged_in = False
    me = another(bridge)
    me.until("scaning", "its console, or in its qrcode.png")
    bridge.logged_in = True
    me.running()
    bridge.emit("bot_offline", reason="被挤下线")
    bridge.logged_in = False
    me.until("scaning", "QQ is offline at the bridge: 被挤下线: scan")
    bridge.logged_in = True
    me.running()
    bridge.logged_in = False    # without a word
    assert "not logged in" in str(me.call("call_action", action="get_friend_list"))
    me.until("scaning", "not logged in")


def test_a_picture_of_the_bridges_with_its_code_is_shown_and_renewed(
        start, receive, tmp_path, closing):
    png, jpeg = openqq.qr_png(openqq.qr_matrix("first")), b"\xff\xd8\xffsecond"
    bridge, receiver, picture = closing(MilkyBridge()), receive(), put(tmp_path / "picture", png)
    bridge.logged_in = False
    bridge.stop()  # it serves nobody before that
    controller = start("controller", "--accounts", put(tmp_path / "accounts.json", json.dumps({
        "me": {"milky_api": bridge.url, "qrcode_file": picture, "post_api": receiver.url}})))
    for data, kind in (png, "image/png"), (jpeg, "image/jpeg"):
        put(picture, data)
        assert base64.b64decode(receiver.next(is_qrcode)["params"][1]) == data
        path = "/openqq/get_qrcode?client=me"
        assert eventually(lambda: request(controller.base, path)[2] == data)
        assert request(controller.base, path)[1]["content-type"] == kind
    bridge.start()
    for data in b"<html>", b"\x89PNG\r\n\x1a\n" + bytes(1024 * 1024):
        put(picture, data)
        assert eventually(lambda: "is none of now" in controller.state("me").get("error", ""))
    bridge.logged_in = True
    assert eventually(lambda: controller.state("me")["state"] == "running")
    said = controller.call("start_client", client="x", milky_api=bridge.url, qrcode_file="/x")
    assert said["code"] == 6 and "qrcode_file" in said["status"]


MILKY_LIES = [
    "<html>busy</html>", "null", 500, {"data": "x"},
    {"data": {"friends": "x", "groups": 7, "members": {}, "messages": "x"}},
    {"data": {"friends": [None, 7, {}], "groups": [[], {"group_id": {}}],
              "members": [{"user_id": "x"}], "messages": [3, {"message_seq": []}]}},
    {"data": {"friends": ["x" * 99] * 99_999}}]


def test_a_milky_bridge_that_lies_harms_nothing(another):
    names = [name for name in MilkyBridge.SCHEMAS if re.match("get_(?!login)|send_private", name)]
    accounts = [(another(MilkyBridge()), lie) for lie in MILKY_LIES]
    for me, lie in accounts:
        me.running().up_to_a_word()
        me.bridge.answers = dict.fromkeys(names, lie)
        me.bridge.drop()
    for me, lie in accounts:
        me.bridge.connected()
        me.until("running")
        me.bridge.say_private(20001, "中")
        assert "中" in me.said(), lie
        me.call(TO_FRIEND, uid="20001", content="x")
        me.call("get_group_info")
        assert {row["uid"] for row in me.call("get_friend_info")} >= {"20001", "20002"}, lie
        me.bridge.answers = {}
        assert me.call(TO_FRIEND, uid="20001", content="y")["code"] == 0, lie
    assert not re.search("Traceback|fault of this program", me.program.log.text())


MILKY_RUBBISH = [
    {"event_type": "message_receive"}, {"event_type": 7, "data": {}},
    {"event_type": ["x"], "data": {"peer_id": {}}},
    {"event_type": "message_receive", "data": {
        "message_scene": ["x"], "peer_id": "20001/x", "message_seq": 1e999, "sender_id": None,
        "segments": {"a": 1}, "time": "x", "group": 7, "friend": [], "group_member": "x"}},
    {"event_type": "message_receive", "self_id": "10001", "data": {
        "message_scene": "group", "peer_id": "30001", "message_seq": True, "sender_id": "40001",
        "segments": [{"type": "reply", "data": {"message_seq": {}}}], "group": {"remark": [1]}}},
    *({"event_type": kind, "data": data} for kind in openqq.MilkyLink.NOTICES
      for data in ({}, [], {"group_id": "x", "user_id": [], "message_seq": "x", "file_size": {}},
                   {"group_id": 30001, "user_id": 40001.5, "is_set": "false", "duration": "∞"}))]


def test_rubbish_among_milkys_events_harms_no_other(milky):
    for row in MILKY_RUBBISH:
        milky.bridge.tell(row)
    milky.bridge.say_group(30001, 40001, "好")  # it is there after all, though told to be gone
    assert "好" in milky.said()
    assert milky.state()["state"] == "running"
    assert not re.search("Traceback|fault of this program", milky.program.log.text())


# ------------------------------------------------------------------------------------------------
# Real WeChat (WEIXIN.md)
# ------------------------------------------------------------------------------------------------

def test_what_one_bridge_is_told_no_other_is(another, closing):
    first, second = MilkyBridge(token="s3cret"), closing(MilkyBridge(token=""))
    me = another(first).running()
    assert me.call("update_client", milky_api=second.url)["code"] == 0
    second.connected()
    me.until("running")
    with open(f"/proc/{me.state()['pid']}/environ", "rb") as file:
        assert b"s3cret" not in file.read()
    assert "s3cret" not in second.shown


class OnWeChat(Bridged):
    """An account of a controller, on a WeChat server of its own."""

    def __init__(self, program, name="", **settings):
        self.program, self.server, self.name = program, ILink(), name or "w" + os.urandom(4).hex()
        assert self.call("start_client", ilink_api=self.server.url, ilink_cdn=self.server.url,
                         check_event_list_max_size=1000, **settings)["code"] == 0
        self.server.wait_call("get_qrcode_status")

    def call(self, path, **params):
        return self.program.call("/openwx/" + path, client=self.name, **params)

    def log_in(self):
        self.server.scan()
        self.until("confirming")
        self.server.confirm()
        self.until("running")
        return self

    def hear(self, *items):
        """What the account reports of what is said."""
        number = self.server.say(*items)
        return self.find(lambda event: event.get("id") == number)

    def find(self, wanted):
        return eventually(lambda: list(filter(wanted, self.call("check_event", since=0))))[0]

    def send(self, **params):
        """Send to the person; the answer."""
        return self.call("send_friend_message", id=self.server.owner, **params)


@pytest.fixture(scope="module")
def weixin(tmp_path_factory):
    """A controller in the weixin flavour."""
    with serving(tmp_path_factory.mktemp("weixin"), "controller", "--flavor", "weixin") as program:
        yield program


@pytest.fixture(scope="module")
def mine(weixin):
    """An account that is logged in, for tests that leave it so."""
    account = OnWeChat(weixin, "mine").log_in()
    yield account
    account.server.stop()


@pytest.fixture
def wechat(weixin):
    """wechat(…) makes an account with that controller, that waits for a scan; it ends with the
    test."""
    accounts = []

    def begin(program=weixin, **settings):
        accounts.append(OnWeChat(program, **settings))
        return accounts[-1]

    yield begin
    for account in accounts:
        account.server.stop()
        if account.program is weixin:
            account.call("delete_client")


def test_a_scan_leads_to_a_running_wechat_account_and_a_restart_needs_none(wechat, start):
    """Also after a kill, by which nothing that is said is lost or told twice."""
    controller = start("controller", "--flavor", "weixin")
    accounts = [wechat(program=controller) for _ in range(2)]
    for account in accounts:
        shown = f"https://liteapp.weixin.qq.com/q/{account.server.code}"
        account.until("scaning")
        picture = request(controller.base, f"/openwx/get_qrcode?client={account.name}")[2]
        assert picture == openqq.qr_png(openqq.qr_matrix(shown))
        server = account.log_in().server
        assert account.state()["link"] == "ilink"
        assert [row["id"] for row in account.call("get_friend_info")] == [
            server.owner, "filehelper"]
        assert account.call("get_user_info")["id"] == server.me
        cookie = os.path.join(controller.tmpdir, f"mojo_weixin_cookie_{account.name}.dat")
        assert os.stat(cookie).st_mode & 0o777 == 0o600
        assert account.hear(account.name)["content"] == account.name
        server.wait_call("getupdates", lambda said: said["get_updates_buf"] == "1")
    controller.process.kill()
    assert all_gone(controller.log, WAIT)
    for account in accounts:
        account.server.say("早")
    controller = start("controller", "--flavor", "weixin")
    for account in accounts:
        account.program, server = controller, account.server
        account.until("running")
        assert [name for name, _ in server.calls].count("get_bot_qrcode") == 1
        assert account.find(lambda event: "content" in event)["content"] == "早"
        assert account.send(content="晚")["code"] == 0
        assert server.sent[-1]["context_token"] == server.messages[-1]["context_token"]


NO_LOGINS = [  # what is answered instead of a confirmation, and how many codes are shown after that
    ({"status": "expired"}, 1), ({"status": "verify_code_blocked"}, 1), (500, 0),
    ({"status": "thinking"}, 0), ({"status": "confirmed"}, 1),
    ({"status": "confirmed", "bot_token": "x\r\ny", "ilink_bot_id": "b", "ilink_user_id": "o"}, 1)]


def test_a_code_that_came_to_nothing_is_followed_by_another(wechat):
    accounts = [(wechat(), ill, codes) for ill, codes in NO_LOGINS]
    for account, ill, _ in accounts:
        account.server.wait_call("get_bot_qrcode")
        account.server.ill["get_qrcode_status"] = ill
        account.server.change(status="wait")
    for account, ill, codes in accounts:
        account.server.wait_call("get_qrcode_status")
        for _ in range(codes):
            account.server.wait_call("get_bot_qrcode")
        if ill == {"status": "confirmed"}:
            account.program.log.wait(rf"\[{account.name}\].*without a token")
        account.server.ill.clear()
        account.server.confirm(baseurl="file:///etc/passwd")  # no address: that of before serves
    for account, _, _ in accounts:
        account.until("running")


def test_the_digits_that_the_phone_shows_are_given_by_a_call(wechat):
    account = wechat()
    server = account.server
    for code in "", "12a", "１２", "1" * 17:
        assert account.call("verify_code", code=code) == {
            "code": 400, "status": "code must be digits"}
    assert account.call("verify_code", code="1") == {"code": 201, "status": "failure"}
    server.digits = "4711"
    server.confirm()
    for code in "1234", "4711":
        assert eventually(lambda: account.state().get("verify_code") == "wanted")
        assert account.call("verify_code", code=code) == {"code": 0, "status": "success"}
        server.wait_call("get_qrcode_status", lambda row: row.get("verify_code") == code)
    account.until("running")
    assert "verify_code" not in account.state()
    assert account.call("verify_code", code="4711")["code"] == 201


def test_what_wechat_has_not_is_said(mine):
    owner = mine.server.owner
    for name, params in {
            "create_group": {"friends": owner}, "set_markname": {"new_markname": "x"},
            "set_friend_markname": {"new_markname": "x"}, "stick": {}, "make_friend": {},
            "accept_friend_request": {"ticket": "x"}, "invite_friend": {"friends": owner},
            "kick_group_member": {"members": owner},
            "set_group_displayname": {"new_displayname": "y"}}.items():
        assert mine.call(name, id=owner, **params) == {
            "code": 201, "status": "not with this link"}, name
    assert mine.call("get_group_info") == mine.call("get_group_basic_info") == []
    assert mine.call("search_group", displayname="x")["code"] == 100
    assert mine.call("send_group_message", id="x", content="y")["code"] == 100
    assert request(mine.program.base, f"/openwx/get_avatar?client=mine&id={owner}")[::2] == (
        503, b"")


def test_a_login_may_lead_to_another_server_by_tls(wechat, start, tmp_path, closing):
    pem, other = put(tmp_path / "tls.pem", TEST_PEM), closing(ILink())
    seal(other, pem)
    account = wechat(program=start("controller", "--flavor", "weixin", env={"SSL_CERT_FILE": pem}))
    other.code, other.status = account.server.code, {"status": "wait"}
    account.server.change(status="scaned_but_redirect", redirect_host=f"127.0.0.1:{other.port}")
    other.wait_call("get_qrcode_status")
    other.confirm(baseurl=account.server.url)
    account.server.token = other.token
    account.until("running")


def test_an_ended_login_shows_a_new_code_says_why_and_who_scans_it_has_to_write_first(wechat):
    account = wechat().log_in()
    server = account.server
    account.hear("在")
    assert account.state()["sends_left"] == 10
    for server.owner in "o2@im.wechat", "o1@im.wechat":
        server.end()
        account.until("scaning", "-14")
        server.confirm()
        assert "error" not in account.until("running")
        assert account.state()["sends_left"] == 0, server.owner
    assert account.send(content="答")["code"] == -3 and not server.sent
    token = server.token
    server.end()
    server.wait_call("get_bot_qrcode", lambda row: row["local_token_list"] == [token])
    account.until("scaning")
    server.token = token  # it was good after all
    server.change(status="binded_redirect")
    account.until("running")


SPOKEN = [  # what the person sends, and what the account reports
    ("你好", "你好"), ({"type": 3, "voice_item": {"text": "说的话", "playtime": 900}}, "[语音]说的话"),
    ({"type": 1, "text_item": {"text": "对"}, "ref_msg": {
        "title": "问题", "svr_id": 18446744073709551615}}, "「问题」\n对"),
    ({"type": 1, "text_item": {"text": "对"}, "ref_msg": {"message_item": {
        "text_item": {"text": "原文"}}}}, "「原文」\n对"), ({"type": 99}, ""),
    ({"type": 1, "text_item": None}, ""), ({"type": "x"}, ""), ({"text_item": 5}, "")]


def test_what_a_person_sends_on_wechat_is_reported(mine):
    for item, text in SPOKEN:
        event = mine.hear(item)
        shown = {"post_type": "receive_message", "type": "friend_message", "content": text,
                 "sender_id": mine.server.owner}
        assert {name: event[name] for name in shown} == shown
        assert abs(int(event["time"]) - time.time()) < WAIT


def test_pictures_of_wechat_are_decrypted_however_their_key_is_told(mine):
    server = mine.server
    for way in "hex", "base64", "base64 of hex", "url", "plain":
        event = mine.hear(server.picture(PNG, way))
        assert content(event["media_path"]) == PNG and event["media_mime"] == "image/png", way
    for kind, part, name in (4, "file_item", "说明.txt"), (5, "video_item", None):
        item = server.picture(b"1234", "base64")
        event = mine.hear({"type": kind, part: {**item["image_item"], "file_name": name}})
        assert content(event["media_path"]) == b"1234" and (name or ".mp4") in event["media_name"]
    wrong, short = server.picture(PNG), server.picture(PNG)
    wrong["image_item"]["aeskey"], short["image_item"]["aeskey"] = "00" * 16, "00"
    for broken in ({"type": 2}, {"type": 2, "image_item": {"media": {"encrypt_query_param": "x"}}},
                   {"type": 4, "file_item": {"file_name": "a.txt", "media": {"aes_key": "!"}}},
                   wrong, short):
        assert re.match(r"\[(图片|文件)\]", mine.hear(broken)["content"])
    assert mine.hear("还在")["content"] == "还在"


def test_what_is_sent_arrives_on_wechat_in_pieces_that_it_takes(mine):
    server = mine.server
    mine.hear("在吗")
    before = len(server.sent) + 2
    for receiver in server.owner, "filehelper":
        answer = mine.call("send_friend_message", id=receiver, content="你好")
        assert answer["code"] == 0 and re.fullmatch(r"\d+:" + re.escape(receiver), answer["id"])
        assert server.sent[-1]["to_user_id"] == server.owner
    text = "一二三四五六七八九\n" * 500 + "一" * 5_500 + "。" + "二" * 2_000
    body = json.dumps({"client": mine.name, "id": server.owner, "content": text})
    request(mine.program.base, "/openwx/send_friend_message", "POST", body,
            {"Content-Type": "application/json"})
    pieces = [row["item_list"][0]["text_item"]["text"] for row in server.sent[before:]]
    assert "".join(pieces) == text
    assert [(len(piece), piece[-1]) for piece in pieces] == [
        (4000, "\n"), (4000, "一"), (2501, "。"), (2000, "二")]
    assert mine.send(content="看", media_data=PNG_TEXT)["code"] == 0
    assert [row["item_list"][0]["type"] for row in server.sent[-2:]] == [1, 2]
    assert server.got(-1) == PNG
    mine.hear("再来")
    for name, kind in ("a.txt", "file_item"), ("a.mp4", "video_item"):
        assert mine.send(media_name=name, media_data="MTIzNA==")["code"] == 0
        item = server.sent[-1]["item_list"][0]
        assert kind in item and server.got(-1) == b"1234", item
    assert item["video_item"]["video_size"] == 16
    server.ill["upload"] = 400
    assert mine.send(media_data=PNG_TEXT)["code"] == -3
    server.ill.clear()
    assert mine.find(lambda event: "not today" in event.get("info", ""))
    assert mine.call("revoke_message", id=answer["id"]) == {
        "code": 0, "status": "revoke failure"}


def test_a_text_whose_first_piece_went_out_is_not_sent_to_wechat_again(wechat):
    account = wechat().log_in()
    account.hear("在")
    account.server.be_gone_after("sendmessage")
    body = json.dumps({"client": account.name, "id": account.server.owner, "content": "一" * 5_000})
    answer = json.loads(request(account.program.base, "/openwx/send_friend_message", "POST", body,
                                {"Content-Type": "application/json"})[2])
    assert answer["code"] == -4 and len(account.server.sent) == 1


def test_wechats_rule_is_counted_and_said(wechat):
    account = wechat().log_in()
    assert account.send(content="你好")["code"] == -3 and not account.server.sent
    event = account.find(lambda event: event["post_type"] == "send_message")
    assert "write first" in event["info"]
    account.hear("在")
    assert abs(account.state()["sends_until"] - time.time() - 86_400) < WAIT
    for left in range(10, 0, -1):
        assert account.state()["sends_left"] == left
        assert account.send(content="答")["code"] == 0
    assert account.send(content="答")["code"] == -3
    assert len(account.server.sent) == 10
    account.hear("再来")
    account.server.left = 0  # it counts in another way than we do
    assert account.send(content="答")["code"] == -3
    assert account.find(lambda event: "-2 prepare failed" in event.get("info", ""))


def test_a_receivers_answer_and_its_picture_go_out_on_wechat(wechat, receive):
    receiver = receive(lambda event: (200, {}, {"reply": "答", "media": "base64://" + PNG_TEXT})
                       if event.get("content") == "问" else None)
    account = wechat(post_api=receiver.url).log_in()
    server = account.server
    server.say("问")
    assert eventually(lambda: len(server.sent) == 2)
    assert server.got(1) == PNG
    typing = [server.wait_call("sendtyping") for _ in range(2)]
    assert [(row["status"], row["ilink_user_id"]) for row in typing] == [
        (1, server.owner), (2, server.owner)]
    consulted = queue.Queue()
    threading.Thread(target=lambda: consulted.put(account.call(
        "consult", id=server.owner, content="几点", timeout=20))).start()
    assert eventually(lambda: len(server.sent) == 3)
    server.say("八点")
    assert consulted.get(timeout=WAIT)["reply"] == "八点"


def test_aes_is_that_of_fips_197():
    key, plain = bytes(range(16)), bytes.fromhex("00112233445566778899aabbccddeeff")
    assert openqq.aes_128_ecb(key, plain, True)[:16].hex() == "69c4e0d86a7b0430d8cdb78070b4c55a"
    for data in [os.urandom(size) for size in (0, 15, 16, 5000)]:
        closed = openqq.aes_128_ecb(key, data, True)
        assert len(closed) == (len(data) // 16 + 1) * 16
        assert openqq.aes_128_ecb(key, closed, False) == data


LYING_UPDATES = [
    {"msgs": {}}, {"ret": -3}, {"errcode": "x"}, {"ret": {}}, {"get_updates_buf": {}, "msgs": [
        None, 5, {}, {"message_type": 1, "from_user_id": {"a": 1}, "message_id": [1]},
        {"message_type": 1, "from_user_id": "x", "message_id": 1, "context_token": ["a"],
         "create_time_ms": "abc", "item_list": [{"type": 2, "image_item": {"media": {
             "full_url": "http://169.254.169.254/", "aes_key": "!!"}}}]},
        {"message_type": 1, "from_user_id": "x", "message_id": 2, "create_time_ms": -5,
         "item_list": [{"type": ["a"], "ref_msg": 5}, {"type": 3, "voice_item": {"text": {}}}]}]}]


def test_a_wechat_server_that_lies_harms_nothing(mine):
    server = mine.server
    mine.hear("在吗")
    for lie in LYING_UPDATES:
        server.ill["getupdates"] = lie
        server.say("so that the poll under way ends")
        server.wait_call("getupdates")
    for lie, code in ({"message_id": {"a": 1}}, 0), ({"ret": {"a": 1}}, -3), (500, -4):
        server.ill["sendmessage"] = lie
        assert mine.send(content="x")["code"] == code, lie
    server.ill.clear()
    assert mine.hear("still here")["content"] == "still here"
    assert "fault of this program" not in mine.program.log.text()


def test_tencents_servers_lead_to_no_others():
    link = openqq.ILinkLink(openqq.Settings("client", {"link": "ilink"}, {}, "X_"), None, None)
    for url in "https://ilinkai.weixin.qq.com", "https://szidc.weixin.qq.com/x":
        assert link._allowed(url) == url
    for url in ("http://a.weixin.qq.com", "https://weixin.qq.com.evil.example",
                "https://evilweixin.qq.com", "https://a.weixin.qq.com@evil.example/",
                "https://127.0.0.1"):
        with pytest.raises(openqq.Unreachable):
            link._allowed(url)


# ------------------------------------------------------------------------------------------------
# Hostile callers, dying processes, an ill machine
# ------------------------------------------------------------------------------------------------

def test_kills_lose_and_double_nothing_that_is_said_on_wechat(wechat, receive):
    receiver = receive()
    account = wechat(post_api=receiver.url).log_in()
    said, over = [], threading.Event()

    def speak():
        while not over.is_set():
            said.append(f"m{len(said)}")
            account.server.say(said[-1])
            over.wait(0.02)  # a person who is in a hurry

    speaker = threading.Thread(target=speak)
    speaker.start()
    for _ in range(much(2, 100)):
        receiver.message(said[-1])
        pid = account.state()["pid"]
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: account.state()["pid"] != pid)
        account.until("running")
    over.set()
    speaker.join()
    said.append("the last")
    account.server.say(said[-1])
    receiver.message(said[-1])
    posts = {headers["X-Event-ID"]: event["content"] for _, headers, _, event in receiver.posts
             if event.get("class") == "recv"}
    assert list(posts.values()) == said


def test_the_setting_for_a_bodys_size_holds_on_both_servers(start):
    controller = start("controller", "--http-max-message-size", "1000")
    controller.login("alice")
    for (port, query), size in itertools.product(ports_of(controller), (1000, 1001)):
        for length, body in ((b"Content-Length: %d" % size, b"a" * size),
                             (b"Transfer-Encoding: chunked",
                              b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"a" * size))):
            [answer, *_] = split_answers(until_closed(port, asking(
                length, b"Connection: close",
                line=line_of("/openqq/get_client_info?" + query, "POST")) + body))
            assert answer[0] == (200 if size == 1000 else 413), (port, length, answer)


def metrics_of(base):
    """What /metrics shows: name and labels -> value; each line must be one of its format."""
    status, fields, body = request(base, "/metrics")
    assert (status, fields["content-type"]) == (200, "text/plain; version=0.0.4"), body
    found, typed = {}, set()
    for line in re.findall("(.*)\n", body.decode()):
        kind = re.match(r"# TYPE (\w+) ", line)
        if kind:
            assert kind.group(1) not in typed, "one TYPE for each name, before its samples"
            typed.add(kind.group(1))
        elif not line.startswith("# HELP "):
            name, labels, value = re.fullmatch(
                r'([a-z_]+)(\{[a-z]+="[^"\\]*"(?:,[a-z]+="[^"\\]*")*\}|) (\S+)', line).groups()
            assert typed & {name, re.sub("_(bucket|sum|count)$", "", name)}, line
            assert name + labels not in found, line
            found[name + labels] = float(value)
    return found


def test_metrics_count_requests_and_their_time_by_path_and_code_on_both_servers(pair):
    for port, query in ports_of(pair):
        base = f"http://127.0.0.1:{port}"
        before = metrics_of(base)
        for path, times in [("get_friend_info?", 3), ("nope?", 2), ("search_friend?name=%zz&", 1),
                            ("get_nothing/../../x?", 1), ("get_friend_info%22,x=%22?", 1)]:
            for _ in range(times):
                request(base, f"/openqq/{path}{query}")
        at_once(6, lambda index: [
            request(base, f"/openqq/get_user_info?{query}") for _ in range(20)])
        until_closed(port, b"nonsense\r\n\r\n")
        until_closed(port, asking(line=b"GET /openqq/get_user_info?a\x01b HTTP/1.1\r\n"))
        after = metrics_of(base)
        for path, code, times in (
                ("/openqq/get_friend_info", 200, 3), ("/openqq/get_user_info", 200, 120),
                ("/openqq/search_friend", 400, 1), ("other", 403, 4), ("other", 400, 2),
                ("/metrics", 200, 1)):  # the one before
            name = f'openqq_requests_total{{path="{path}",code="{code}"}}'
            assert after[name] - before.get(name, 0) == times, name
        paths = set(re.findall('path="([^"]*)"', "".join(after)))
        assert all(re.fullmatch("/|other|/[a-z_/]+", path) for path in paths), paths
        label = 'path="/openqq/get_user_info"'
        buckets = [value for name, value in after.items()
                   if name.startswith(f"openqq_request_seconds_bucket{{{label},")]
        count = after[f"openqq_request_seconds_count{{{label}}}"]
        assert count >= 120 and buckets == sorted(buckets) and buckets[-1] == count
        assert 0 < after[f"openqq_request_seconds_sum{{{label}}}"] < WAIT * count


def test_metrics_tell_of_clients_restarts_and_events(start, receive):
    tries = iter([503])
    receiver = receive(lambda event: next(tries, 200) if event.get("content") == "slow" else 200)
    controller = start("controller", "--post-api", receiver.url)

    def shows(base=controller.base, **wanted):
        """Wait until these are shown: of a name with labels, the label's value is behind __."""
        return eventually(lambda: wanted.items() <= {
            re.sub(r'openqq_(\w+?)(?:\{\w+="(.*)"\})?$', r"\1__\2", name).rstrip("_"): value
            for name, value in metrics_of(base).items()}.items())

    assert shows(clients__running=0, client_restarts_total=0)
    pid = controller.login("alice")["pid"]
    controller.call("start_client", client="bob")
    assert shows(clients__scaning=1, clients__running=1)
    controller.call("/local/say", client="alice", content="slow", **{"from": "小灰"})
    receiver.message("slow")
    client = f"http://127.0.0.1:{controller.state('alice')['port']}"
    assert shows(client, events_total__retried=1, post_queue_length=0, events_total__dropped=0,
                 clients__running=1, send_queue_length=0)
    assert metrics_of(client)['openqq_events_total{result="posted"}'] >= 2
    os.kill(pid, signal.SIGKILL)
    assert shows(client_restarts_total=1)
    controller.call("stop_client", client="bob")
    assert shows(clients__scaning=0)


@pytest.fixture
def impatient(monkeypatch):
    """A server of this process whose deadlines are short, so that a test need not wait for them."""
    for name in "HEAD_SECONDS", "BODY_SECONDS", "IDLE_SECONDS":
        monkeypatch.setattr(openqq, name, 0.7)
    log = openqq.Log("", "fatal")
    app = openqq.App(openqq.Auth(""), log, [openqq.HEALTH], openqq.client_fallback)
    server = openqq.Server(openqq.listen("127.0.0.1", 0), app, log, 2048)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_drips_and_idle_connections_end_at_the_deadline_and_hold_up_nobody(impatient):
    line, address = line_of("/healthz", "POST"), impatient.server_address
    with contextlib.ExitStack() as stack:
        def connect(begin):
            sock = stack.enter_context(socket.create_connection(address, WAIT))
            sock.sendall(begin)
            return sock

        left = [(connect(begin), iter(drip)) for begin, drip in 8 * [
            (b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: "), (b"", b"\r\n" * 2000),
            (asking(b"Content-Length: 4000000", line=line), b""),
            (asking(b"Transfer-Encoding: chunked", line=line), b"1\r\na\r\n" * 3000)]]
        mute, served = connect(b""), connect(asking(line=line_of("/healthz")))
        assert served.recv(65536).startswith(b"HTTP/1.1 200")
        end = time.monotonic() + WAIT
        while left:
            assert time.monotonic() < end, f"{len(left)} are still there"
            for sock, drip in list(left):
                try:
                    sock.sendall(bytes([next(drip, 97)]))
                    ended = openqq.has_ended(sock)
                except OSError:
                    ended = True
                if ended:
                    left.remove((sock, drip))
            assert request("http://127.0.0.1:%d" % address[1], "/healthz")[0] == 200
        assert mute.recv(1) == served.recv(1) == b""
    assert eventually(lambda: not impatient.connections)


def run_with_files(soft, hard, tmpdir, whose="client"):
    """A program that may open so many files, as (process, its log, its port)."""
    process = subprocess.Popen(
        ["sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh", sys.executable,
         FILE, whose, "--tmpdir", str(tmpdir), "--port", "0"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = Log(process.stderr)
    return process, log, int(log.wait(
        r"(?:Listening at |监听地址: \[ )http://[0-9.]+:(\d+)").group(1))


def test_the_limit_of_open_files_is_raised_and_what_it_forbids_is_told_at_once(tmp_path):
    process, log, port = run_with_files(64, 200, tmp_path)
    try:
        assert proc(process.pid, "limits", r"Max open files +(200) +200") == 200
        room = int(log.wait(r"\[warn\] (\d+) connections at once instead of 2048").group(1))
        assert room > 50
        with contextlib.ExitStack() as stack:
            for _ in range(room):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), WAIT))
            sock.sendall(asking())
            assert b"HTTP/1.1 200" in sock.recv(65536)
            for _ in range(3):
                [(status, _, body)] = split_answers(until_closed(port, b""))
                assert (status, json.loads(body)["status"]) == (503, "too many connections")
        assert eventually(lambda: b"HTTP/1.1 200" in until_closed(
            port, asking(b"Connection: close")))
        assert "could not be taken" not in log.text()
    finally:
        process.terminate()
        assert process.wait(WAIT) == 0


def test_what_we_send_cannot_carry_a_line_break():
    """Not even where Python leaves assertions out."""
    code = ("import openqq\n"
            "for fields, kind in [({'X': 'a\\r\\nY: b'}, ''), ({'X': 'a\\nb'}, ''),\n"
            "                     ({'X\\r': 'a'}, ''), ({}, 'text/x\\r\\nY: b')]:\n"
            "    try: openqq.Response(b'', kind, fields=fields).head('')\n"
            "    except Exception: pass\n"
            "    else: print('sent', fields, kind)\n")
    assert subprocess.check_output([sys.executable, "-OO", "-c", code], cwd=HERE) == b""


def test_what_may_have_been_done_is_not_repeated_through_a_controller_and_what_reads_is(gateway):
    for api, method, status, seen in [("get_user_info", "GET", 200, [0, 0, 1]),
                                      ("send_friend_message", "GET", 502, [0, 0]),
                                      ("send_friend_message", "POST", 502, [0, 0])]:
        server, gate = gateway([good(b"one"), None], [good(b"two")])
        base = f"http://127.0.0.1:{gate.port}"
        assert request(base, "/openqq/get_user_info")[2] == b"one"
        assert request(base, "/openqq/" + api, method)[0] == status
        assert [number for number, _ in server.seen] == seen


def test_no_url_spells_a_forbidden_address_so_that_it_is_connected():
    whole = int.from_bytes(socket.inet_aton("168.63.129.16"), "big")
    for host in ("168.63.129.16", whole, hex(whole), f"0{whole:o}", "0xa8.0x3f.0x8110",
                 "[::ffff:168.63.129.16]", "[64:ff9b::a83f:8110]", "169.254.170.2",
                 "１６９.２５４.１６９.２５４", "169。254。169。254",  # IDNA makes digits and dots
                 "[fd00:ec2::23]", "[fd00:42::42]", "[2002:a9fe:a9fe::]",
                 "[64:ff9b:1::a9fe:a9fe]", "[::ffff:0:169.254.169.254]"):
        with pytest.raises(openqq.Unreachable, match="link-local and metadata") as caught:
            openqq.fetch(f"http://user@{host}:80/latest/meta-data/", seconds=0.3)
        assert not caught.value.sent, host


def test_names_that_lead_to_forbidden_addresses_are_never_connected(monkeypatch, upstream):
    server, found = upstream([good(b"sound")]), []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *args: [
        (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "",
         (address, port, *([0, 2] if ":" in address else []))) for address in found])
    for found in (["169.254.169.254"], ["::ffff:169.254.169.254"], ["fe80::1%2"],
                  ["100.100.100.200", "fd00:ec2::254"]):
        with pytest.raises(openqq.Unreachable, match="link-local and metadata"):
            openqq.fetch(f"http://rebind.example:{server.port}/", seconds=0.3)
    found = ["169.254.169.254", "127.0.0.1"]
    assert openqq.fetch(f"http://rebind.example:{server.port}/", seconds=5.0).read() == b"sound"


def test_kills_at_random_moments_lose_nothing(start, receive):
    """Clients and controllers are killed while messages come: each is posted, those that were on
    their way once more under the same number; no process is left over."""
    chance, receiver = random.Random(7), receive()
    kills, names, said = much(4, 200), ["alice", "bob"], []
    controller = start("controller", "--post-api", receiver.url)
    for name in names:
        controller.login(name)
    for kill in range(kills):
        for number in range(chance.randrange(1, 8)):
            said.append(f"{kill}.{number}")
            assert controller.call("/local/say", client=chance.choice(names), content=said[-1],
                                   **{"from": "小灰"})["code"] == 0
        time.sleep(chance.random() * 0.05)  # the moment is the chance's
        if kill % 4 != 3:
            with contextlib.suppress(ProcessLookupError):  # it is just starting again
                os.kill(controller.state(chance.choice(names))["pid"], signal.SIGKILL)
        else:
            controller.process.kill()
            assert all_gone(controller.log), "a client outlived its controller"
            assert "Traceback" not in controller.log.text()
            controller = start("controller", "--post-api", receiver.url)
        for name in names:
            user(controller, name)
    assert eventually(lambda: set(said) <= {
        event.get("content") for *_, event in list(receiver.posts)})
    posts = [(headers["X-Event-ID"], event["content"]) for _, headers, _, event in receiver.posts
             if event.get("content") in said]
    assert len(set(posts)) == len(said), "a repeated event has its old number"
    assert len(posts) - len(said) <= kills
    children = subprocess.check_output(["ps", "-o", "stat=", "--ppid", str(controller.pid)])
    assert len(children.split()) == len(names) and b"Z" not in children
    assert controller.stop() == 0 and all_gone(controller.log)
    assert "Traceback" not in controller.log.text()


@pytest.mark.parametrize("whose", ["controller", "client"])
def test_a_full_disk_at_the_start_is_a_clear_refusal(tmp_path, whose):
    done = run_quickly(
        whose, "--tmpdir", str(tmp_path), "--port", "0",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    assert done.returncode == 1 and str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr


def test_a_clock_that_jumps_an_hour_restarts_and_floods_nothing(tmp_path, script, receive):
    """The processes see the clock of a file that the test writes."""
    receiver, path = receive(), put(tmp_path / "offset", "0")
    clock = "import time\n_time = time.time\n" \
            f"time.time = lambda: _time() + float(open({path!r}).read())\n"
    put(tmp_path / "mojo_webqq_controller_template.py", clock + openqq.default_template(openqq.QQ))
    program = script(clock + f"""
openqq.Controller(tmpdir="{{tmpdir}}", port=0, poll_api={receiver.url!r}, poll_interval=600,
                  post_api={receiver.url!r}).run()""").ready()
    ask = functools.partial(program.call, client="alice")
    assert ask("start_client")["code"] == ask("/local/login")["code"] == 0
    first, seqs, ids = ask("get_client_info"), [], []
    for number, offset in enumerate([0, 3600, 0, -3600, 0]):
        os.replace(put(path + ".new", str(offset)), path)
        ask("/local/say", content=f"m{number}", **{"from": "小灰"})
        receiver.message(f"m{number}")
        ids.append(ask("send_friend_message", name="小冰", content="x")["id"])
        seqs += [event["seq"] for event in ask("check_event")]
        info = ask("get_client_info")
        assert (info["pid"], info["status"]) == (first["pid"], first["status"])
    assert seqs == sorted(set(seqs)) and ids == sorted(set(ids))
    assert ask("check_client")["client"][0]["state"] == "running"
    assert len(program.log.lines) < 60 and "[warn]" not in program.log.text(), program.log.text()
    events = [headers["X-Event-ID"] for _, headers, _, _ in receiver.posts]
    assert len(events) == len(set(events)) < 40
    assert program.stop() == 0


def test_of_many_controllers_started_at_once_one_runs(tmp_path):
    programs = [Program(tmp_path, "controller") for _ in range(much(6, 50))]
    assert eventually(lambda: sum(each.process.poll() is None for each in programs) == 1)
    [winner] = [each for each in programs if each.process.poll() is None]
    assert content(winner.path("controller_process.pid")) == f"{winner.ready().pid}\n".encode()
    for each in programs:
        if each is not winner:
            assert each.process.returncode == 1
            each.log.wait(f"with pid {winner.pid}")
    assert winner.stop() == 0 and not os.path.exists(winner.path("controller_process.pid"))


def test_a_log_file_that_is_rotated_again_and_again_loses_no_line(start, tmp_path):
    path, said, ended = str(tmp_path / "client.log"), [], threading.Event()
    turns = much(30, 200)
    client = start("client", "--account", "alice", "--log-path", path, "--log-console", "1")
    client.call("/local/login", client="alice")

    def talk():
        while not ended.is_set():
            said.append(f"line {len(said)}.")
            client.call("/local/say", client="alice", content=said[-1], **{"from": "小灰"})

    talker = threading.Thread(target=talk)
    talker.start()
    for turn in range(turns):
        assert eventually(lambda: os.path.exists(path) and os.path.getsize(path))
        os.rename(path, f"{path}.{turn}")
    ended.set()
    talker.join(WAIT)
    client.log.wait(re.escape(said[-1]))
    assert client.stop() == 0
    text = b"".join(content(each) for each in [
        *(f"{path}.{turn}" for turn in range(turns)), *[path] * os.path.exists(path)]).decode()
    assert re.findall(r" : (line \d+\.)", text) == said, "each line once, and in order"


# ------------------------------------------------------------------------------------------------
# Events as a stream
# ------------------------------------------------------------------------------------------------

class Follower:
    """A stream of server-sent events, read as a test asks for it: `rows` are the (id, event) that
    it has read, of which wait() gives each once."""

    def __init__(self, base, path="/openqq/events", **fields):
        parts = urllib.parse.urlsplit(base)
        self.connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=WAIT)
        self.connection.request("GET", path, headers={
            name.replace("_", "-"): value for name, value in fields.items()})
        self.answer = self.connection.getresponse()
        assert (self.answer.status, self.answer.headers["Content-Type"]) == (
            200, "text/event-stream")
        self.rows, self.given = [], set()
        self.coming = self._read()
        while not next(self.coming):
            pass

    def _read(self):
        """Read on; yields after each event, and True where the present begins."""
        fields = {}
        with contextlib.suppress(ConnectionError, http.client.IncompleteRead):  # it is cut
            for line in self.answer:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                fields[name] = value
                if not name:
                    if "data" in fields:
                        self.rows.append((fields.get("id"), json.loads(fields["data"])))
                    yield "retry" in fields
                    fields = {}

    def wait(self, **wanted):
        """The next event that has all these members and was not yet given."""
        end = time.monotonic() + WAIT  # its signs of life let a wait without an end go on
        for place in itertools.count():
            while place == len(self.rows):
                assert time.monotonic() < end and next(self.coming, None) is not None, (
                    f"{wanted} did not come: {self.rows}")
            if place not in self.given and wanted.items() <= self.rows[place][1].items():
                self.given.add(place)
                return self.rows[place]

    def news(self, event, **wanted):
        """The params of the next event of this name."""
        return self.wait(event=event, **wanted)[1]["params"]

    def contents(self):
        """What the messages said that were read so far."""
        return {event.get("content") for _, event in self.rows}

    def close(self):
        self.answer.close()
        self.connection.close()


@pytest.fixture
def follow(closing):
    """follow(base, path, **fields) makes a Follower that ends with the test."""
    return lambda *args, **fields: closing(Follower(*args, **fields))


def test_a_stream_takes_nothing_from_check_event_and_goes_on_after_the_last_event_id(face, follow):
    face.call("send_friend_message", name="小灰", content="before the stream")
    path, said = "/openqq/events?client=alice", f"what comes {random.random()}"
    stream = follow(face.base, path)
    face.call("send_friend_message", name="小冰", content=said)
    number, sent = stream.wait(content=said, post_type="send_message")
    later, received = stream.wait(content=said, post_type="receive_message")
    assert [int(number), int(later)] == [sent["seq"], received["seq"]]
    kept = face.call("check_event")
    assert kept[-2:] == [sent, received] and kept[-3]["content"] == "before the stream"
    assert "before the stream" not in stream.contents()
    first = str(kept[-3]["seq"])
    for fields, since in [({"Last_Event_ID": first}, 0), ({}, first)]:  # that wins over since
        stream = follow(face.base, f"{path}&since={since}", **fields)
        assert [stream.wait()[1], stream.wait()[1]] == [sent, received]
    for bad in "x", "-1", "1" * 19, "%EF%BC%91":
        status, _, body = request(face.base, f"{path}&since={bad}")
        assert (status, json.loads(body)["code"]) == (400, 400)
    assert request(face.base, path, "HEAD")[0] == 403


def test_a_stream_answers_in_any_state_tells_each_change_and_ends_with_the_client(fresh, follow):
    face = fresh()
    assert eventually(lambda: face.program.state("alice")["state"] == "scaning")
    stream = follow(face.base, "/openqq/events?client=alice")
    assert confirm(face, face.ticket())[0] == 200
    changes = [stream.news("state_change")[1]]
    while changes[-1] != "running":
        changes.append(stream.news("state_change")[1])
    assert changes[-3:] == ["confirming", "updating", "running"]
    assert stream.news("login") == [1]
    assert not any(number for number, _ in stream.rows)  # nothing to resume from
    face.call("send_friend_message", name="小灰", content="kept")
    assert [event.get("content") for event in face.call("check_event", since=0)] == ["kept"]
    assert face.program.stop() == 0
    assert stream.news("state_change") == ["running", "stop"] and stream.news("stop") == []
    assert True not in stream.coming, "which ends"


def test_the_controllers_own_events_have_their_time_as_the_accounts_have_it(start, follow, receive):
    receiver, before = receive(), int(time.time())
    controller = start("controller", "--post-api", receiver.url, "--restart", "never")
    stream = follow(controller.base)
    for numeric, kind in ("0", str), ("1", int):
        pid = controller.login("alice", numeric_ids=numeric)["pid"]
        os.kill(pid, signal.SIGKILL)
        told = [receiver.next(lambda event: event.get("event") == "client_failed")]
        controller.login("alice", numeric_ids=numeric)
        for end in "stop_client", "delete_client":
            assert controller.call(end, client="alice")["code"] == 0
        for name in ("state_change", "login", "client_failed", "client_stopped",
                     "client_deleted"):
            told.append(stream.wait(event=name)[1])
            assert type(told[-1]["time"]) is kind, name
        assert all(before <= int(event["time"]) <= time.time() for event in told)
        stream.given.update(range(len(stream.rows)))


def test_the_controllers_stream_joins_all_accounts_also_those_to_come(start, follow):
    controller = start("controller")
    for name in "alice", "bob":
        controller.login(name)
        controller.call("send_friend_message", client=name, name="小灰", content="early " + name)
    stream = follow(controller.base, "/openqq/events?since=0")  # of all, though nobody looked
    for name in "alice", "bob":
        assert stream.wait(content="early " + name)[1]["client"] == name
    stream = follow(controller.base)
    for name in "alice", "bob":
        controller.call("send_friend_message", client=name, name="小灰", content="from " + name)
        number, event = stream.wait(content="from " + name)
        assert (event["client"], event["class"]) == (name, "send")
        assert event["seq"] in [row["seq"] for row in controller.call(
            "check_event", client=name, since=0)]
    for name in "carol", "dave":
        controller.login(name)
        row = controller.state(name)
        assert time.time() - WAIT < int(row["since"]) <= time.time() and row["link"] == "local"
        assert stream.news("state_change", client=name) == ["init", "loading"]
        stream.news("login", client=name)
    os.kill(controller.state("carol")["pid"], signal.SIGKILL)
    while stream.news("state_change", client="carol")[1] != "stop":
        pass  # a dead client cannot tell of it
    controller.call("stop_client", client="dave")
    assert re.fullmatch("[0-9]+", stream.wait(event="client_stopped", client="dave")[1]["time"])
    assert not stream.contents() & {"early alice", "early bob"}
    ids = [int(each) for each, _ in stream.rows if each]
    assert ids == sorted(set(ids))
    controller.call("send_friend_message", client="alice", name="小灰", content="while away")
    back = follow(controller.base, Last_Event_ID=number)
    back.wait(content="while away")
    assert not back.contents() & {"from alice", "from bob"}
    assert controller.stop() == 0
    assert True not in back.coming, "which ends"


def test_who_leaves_a_stream_leaves_nothing_behind(pair, follow):
    def held():
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]

    pids = [pair.pid, pair.state("alice")["pid"]]
    before = held()
    for path in "/openqq/events?client=alice", "/openqq/events":
        for stream in [follow(pair.base, path) for _ in range(8)]:
            stream.close()
    assert eventually(lambda: all(now <= then for now, then in zip(held(), before))), (
        before, held())


# ------------------------------------------------------------------------------------------------
# The dashboard
# ------------------------------------------------------------------------------------------------

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome")


def test_a_silent_stream_says_that_it_lives_and_one_too_far_behind_ends_with_what_it_has():
    def silence(future, seconds):
        assert seconds == openqq.STREAM_SECONDS <= 30
        raise TimeoutError

    def begin():
        """A store, and a stream from it."""
        store = openqq.EventStore(2000)
        asked = openqq.Request("GET", "/openqq/events", {"host": "localhost"}, b"", "127.0.0.1")
        asked.wait = silence
        pieces = store.stream(asked).pieces
        assert [next(pieces) for _ in "123"] == [b"retry: 1000\n\n", b":\n\n", b":\n\n"]
        return store, pieces

    (store, pieces), (wide, others) = begin(), begin()
    for number in range(openqq.STREAM_LIMIT + 1):
        store.add({"number": number})
    for _ in range(17):
        wide.add({"picture": "x" * 1024 * 1024})
    for stream, counts in (pieces, [openqq.STREAM_LIMIT + 1]), (others, [16, 17]):
        assert b"".join(itertools.islice(stream, 9999)).count(b"data: ") in counts
        assert next(stream, None) is None, "it ends"


class Browser:
    """Chromium without a window, through chromedriver's HTTP protocol (W3C WebDriver)."""

    def __init__(self, tmpdir):
        port = None
        while not port:  # the one that it finds free for IPv6 may be taken for IPv4: it ends then
            self.driver = subprocess.Popen([DRIVER, "--port=0"], stdin=subprocess.DEVNULL,
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            port = Log(self.driver.stdout).wait(
                r"successfully on port (\d+)|port not available").group(1)
        self.base, self.session = f"http://127.0.0.1:{port}", ""
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 f"--user-data-dir={tmpdir}", "--lang=en",
                 "--host-resolver-rules=MAP *.example 127.0.0.1"]
        self.session = "/session/" + self.do("POST", "/session", capabilities={"alwaysMatch": {
            "browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"binary": CHROMIUM, "args": words}}})["sessionId"]

    def do(self, method, path, **body):
        """One command's value."""
        data = json.dumps(body).encode() if method == "POST" else None
        status, _, answer = request(self.base, self.session + path, method, data,
                                    {"Content-Type": "application/json"})
        value = json.loads(answer)["value"]
        assert status == 200, f"{path}: {value['message']}"
        return value

    def open(self, url):
        self.do("POST", "/url", url=url)

    def run(self, script, *args):
        """What a function body returns on the page."""
        return self.do("POST", "/execute/sync", script=script, args=list(args))

    def show(self, width=1280, height=900, language="en-US"):
        """The screen that it has, and what it would like, in words of the DevTools protocol."""
        for command, params in [
                ("setDeviceMetricsOverride", {"width": width, "height": height,
                                              "deviceScaleFactor": 1, "mobile": width < 500}),
                ("setUserAgentOverride", {"acceptLanguage": language,
                                          "userAgent": self.run("return navigator.userAgent")})]:
            self.do("POST", "/goog/cdp/execute", cmd="Emulation." + command, params=params)

    def act(self, css, text="", script="", *args):
        """Do something with the first `node` that can be seen, with this text if one is given,
        once it is there."""
        assert self.run("""
            const [css, text, seconds, ...more] = arguments, end = Date.now() + 1000 * seconds;
            return new Promise((done) => (function look() {
              const node = [...document.querySelectorAll(css)].find((node) => !node.disabled &&
                (node.closest("select") || node).checkVisibility() &&
                [node.textContent, ""].includes(text));
              if (!node && Date.now() < end) return setTimeout(look, 20);
              if (node) { %s }
              done(Boolean(node)); })());""" % script, css, text, WAIT, *args), (
                  f"{css!r} {text!r} is not on the page:\n" + self.text())

    find = act

    def account(self, name, state):
        """Wait until the page shows an account in this state."""
        self.find(f"[data-account={name}][data-state={state}]")

    def click(self, css, text=""):
        """Press a button, once nothing covers it."""
        self.act(css, text, """
            node.scrollIntoView({block: "center"});
            const {x, y, width, height} = node.getBoundingClientRect();
            if (!node.contains(document.elementFromPoint(x + width / 2, y + height / 2)))
              return setTimeout(look, 20);
            node.click();""")

    def type(self, css, text):
        self.act(css, "", "node.value = more[0]; node.dispatchEvent(new Event('input'))", text)

    def choose(self, css, label):
        self.act(css + " option", label, "const select = node.closest('select');"
                 "if (select.value !== node.value) { select.value = node.value;"
                 "select.dispatchEvent(new Event('change')); }")

    def talk(self, speaker, peer, content):
        """Say something in the chat."""
        self.choose("#speaker", speaker)
        self.choose("#peer", peer)
        self.type("#content", content)
        self.click("#say button")

    def text(self, css="body"):
        """All that can be read there."""
        return self.run("return document.querySelector(arguments[0]).innerText", css)

    def reads(self, css, *texts):
        """Wait until these can be read there, in this order; each a regular expression."""
        assert eventually(lambda: re.search(".*".join(texts), self.text(css), re.S)), (
            texts, self.text(css))

    def shows_code(self, account, text):
        """Wait until an account's QR code on the page is that of a text, dot for dot."""
        picture = openqq.qr_png(openqq.qr_matrix(text))
        assert eventually(lambda: self.run("""
            const code = document.querySelector(arguments[0]);
            const dots = (image, width, height) => {
              const canvas = Object.assign(document.createElement("canvas"), {width, height});
              canvas.getContext("2d").drawImage(image, 0, 0);
              return canvas.toDataURL(); };
            return createImageBitmap(new Blob([new Uint8Array(arguments[1])])).then((wanted) =>
              code && code.checkVisibility() && code.naturalWidth === wanted.width &&
              dots(code, wanted.width, wanted.height) === dots(wanted, wanted.width, wanted.height))
            """, f"[data-account={account}] img", list(picture))), text

    def close(self):
        try:
            self.do("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """One browser for all tests."""
    if not (DRIVER and CHROMIUM):
        pytest.skip("no browser here: chromium and chromedriver (Debian: chromium-driver) needed")
    with contextlib.closing(Browser(tmp_path_factory.mktemp("chromium"))) as found:
        yield found


@pytest.fixture
def browser(chromium):
    """That browser, on a desk, in English; whatever a test let happen, no script complained."""
    chromium.show()
    yield chromium
    assert [row["message"] for row in chromium.do("POST", "/se/log", type="browser")
            if row["level"] == "SEVERE" and row["source"] != "network"] == []
    chromium.open("about:blank")


@pytest.fixture(scope="session")
def board(tmp_path_factory):
    """A controller with alice and bob for the browser's tests; alice owns the group."""
    with serving(tmp_path_factory.mktemp("board"), "controller") as program:
        program.login("alice")
        program.login("bob")
        yield program


@pytest.fixture
def page(board, browser):
    """The browser with the page of `board` open, which has its stream of events."""
    browser.open(board.base + "/")
    browser.reads("#live", "live")
    return browser


SELVES = ["127.0.0.1", "127.1", "127.8.9.10", "0x7f.0.0.1", "017700000001", "2130706433", "0",
          "%31%32%37.0.0.1", "１２７.０.０.１", "127。0。0。1", "localhost", "LOCALHOST.", "a.b.localhost",
          "ｌｏｃａｌｈｏｓｔ", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::FFFF:7F00:0001]",
          "[::ffff:0.0.0.0]", "rebound.example"]


ASK_AND_SAY = """const [hosts, port] = arguments;
return Promise.all(hosts.flatMap((host, number) => [
    new Promise((done) => {
        const image = new Image();
        image.onload = image.onerror = done;
        image.src = `http://${host}:${port}/openqq/start_client?client=image${number}`; }),
    fetch(`http://${host}:${port}/openqq/start_client`, {method: "POST", mode: "no-cors",
          body: new URLSearchParams({client: "form" + number})}).catch(() => 0)]))
    .then(() => true)"""


def test_a_page_of_another_site_opens_no_door_however_it_spells_this_machine(browser, tmp_path,
                                                                             upstream):
    other = upstream(*[[good(b"", b"Content-Type: text/html")] * 20] * 20)
    program = Program(tmp_path, "controller", "--host",
                      "::" if socket.has_dualstack_ipv6() else "0.0.0.0")
    program.port = program.log.wait(r"Listening at http://.*:(\d+)").group(1)
    program.base = f"http://127.0.0.1:{program.port}"
    for site in "evil.example", "rebound.example", "evil.localhost", "127.0.0.1", "localhost":
        browser.open(f"http://{site}:{other.port}/")
        assert browser.run(ASK_AND_SAY, SELVES, program.port)
    shown = metrics_of(program.base)
    start = 'openqq_requests_total{path="/openqq/start_client",code="%d"}'
    assert shown[start % 403] >= 100, "few of these spellings have come here at all"
    assert start % 200 not in shown
    browser.open(program.base + "/")
    assert browser.run("return fetch('/openqq/start_client', {method: 'POST', body: "
                       "new URLSearchParams({client: 'own'})}).then(() => true)"), "its own may"
    assert [row["account"] for row in program.call("check_client")["client"]] == ["own"]
    assert program.stop() == 0


def test_an_account_is_started_scanned_spoken_with_and_stopped_on_the_page(board, page):
    page.type("#name", "carol")
    page.click("#begin details:last-of-type summary")
    page.type("input[name=check_event_list_max_size]", "7")
    page.click("#begin button.main")
    page.reads("#said", "carol started on port ")
    url = board.log.wait(r"(http://\S+/local/scan\?client=carol&ticket=\w+)").group(1)
    page.shows_code("carol", url)
    page.open(url)  # as a phone has it
    page.click("button")
    page.reads("body", "登录成功")
    page.open(board.base + "/")
    page.account("carol", "running")
    assert not page.run("return document.querySelector('[data-account=carol] img')"
                        ".checkVisibility()")
    page.talk("carol", "小冰", "hello from the page")
    page.reads("#talk", "carol\nhello from the page\n小冰\nhello from the page")
    page.reads("#events", "carol → 小冰\nhello from the page")
    page.click("[data-account=carol] button", "Stop")
    page.reads("#said", "carol has stopped.")
    page.account("carol", "stop")
    page.click("[data-account=carol] button", "Start")
    page.account("carol", "running")  # by the cookie
    started = board.call("start_client", client="carol")
    assert (started["status"], started["check_event_list_max_size"]) == (
        "client already exists", "7")
    board.call("delete_client", client="carol")


def test_residents_speak_to_each_other_and_the_owner_mutes_and_kicks_on_the_page(board, page):
    page.talk("小灰", "小冰", "one to another")
    page.reads("#talk", "小灰\none to another\n小冰\none to another")
    page.talk("alice", "OpenQQ (group)", "小冰, are you there?")
    page.reads("#talk", "小冰\n小冰, are you there?")
    assert "one to another" not in page.text("#talk")
    page.type("#minutes", "3")
    for name in "小冰", "bob":
        page.click(f"[data-member={name}] button", "Mute")
        page.reads("#said", name + " is muted for 3 min.")
    page.talk("bob", "OpenQQ (group)", "muted")
    page.reads("#said", "It did not work: muted, not heard")
    page.click("[data-member=小灰] button", "Kick")
    page.reads("#said", "It did not work: failure")
    page.choose("#speaker", "alice")
    page.choose("#peer", "OpenQQ (group)")
    page.click("[data-member=小灰] button", "Kick")
    page.reads("#said", "小灰 is out of the group.")
    assert eventually(lambda: not page.run("return document.querySelector('[data-member=小灰]')"))


def test_what_others_do_with_accounts_is_seen_on_the_page_and_can_be_gone_on_with(board, page):
    board.call("start_client", client="dave", msg_ttl="5")
    board.call("start_client", client="erin", onebot_api="ws://127.0.0.1:9")
    page.find("[data-account=dave][data-state=scaning] img")
    page.click("[data-account=dave] button", "Log in here")  # on the network inside only
    page.reads("#said", "dave is logged in.")
    page.account("dave", "running")
    page.account("erin", "scaning")
    page.reads("[data-account=erin] .error", "refused")
    assert "Log in here" not in page.text("[data-account=erin]")
    board.call("stop_client", client="dave")
    page.account("dave", "stop")
    page.click("[data-account=dave] button", "Start")
    page.account("dave", "running")
    os.kill(board.state("dave")["pid"], signal.SIGKILL)
    page.reads("[data-account=dave] .facts", " · restarts: 1")
    assert board.call("start_client", client="dave")["msg_ttl"] == "5"
    for words in "waiting for a scan → waiting for the button", "account stopped":
        page.reads("#events", words)
    assert not re.search("scaning|state_change|client_stopped|input_qrcode|null|undefined|"
                         "Invalid Date", page.text("body"))
    for name in "dave", "erin":
        board.call("delete_client", client=name)
    assert eventually(lambda: not page.run(
        "return document.querySelector('[data-account=dave], [data-account=erin]')"))


def test_while_the_controller_is_away_the_page_says_that_it_knows_nothing(start, browser):
    def sees(css):
        return browser.run("return document.querySelector(arguments[0]).checkVisibility()", css)

    controller = start("controller")
    controller.login("alice")
    controller.call("start_client", client="bob")
    browser.open(controller.base + "/")
    browser.account("alice", "running")
    browser.find("[data-account=bob] img")
    controller.stop()
    browser.account("alice", "unknown")
    browser.reads("[data-account=alice]", "unknown")
    assert not sees("[data-account=bob] img")  # its code lets nobody in now
    browser.reads("#away", "The server does not answer")
    start("controller", port=controller.port)
    browser.account("alice", "running")
    assert not sees("#away")
    browser.find("[data-account=bob][data-state=scaning] img")


def test_the_qr_code_on_the_page_is_renewed_by_itself(closing, board, page):
    web, bridge = map(closing, login_page("napcat"))
    me = Bridged(board, "ws-code", bridge, web)
    for more in "", "&again":  # it lasts two minutes there
        web.qrcode += more
        page.shows_code(me.name, web.qrcode)
    board.call("delete_client", client=me.name)


def test_a_real_wechat_account_is_started_on_the_page_with_the_digits_of_the_phone(
        closing, start, browser):
    server = closing(ILink())
    program = start("controller", "--flavor", "weixin")
    browser.open(program.base + "/")
    browser.type("#name", "me")
    browser.run("""for (const name of ["ilink_api", "ilink_cdn"])
                       document.querySelector(`[name=${name}]`).value = arguments[0];""",
                server.url)
    browser.click("#real")
    server.wait_call("get_qrcode_status")
    browser.shows_code("me", f"https://liteapp.weixin.qq.com/q/{server.code}")
    server.digits = "4711"
    server.confirm()
    browser.type("[data-account=me] input", "4711")
    browser.click("[data-account=me] button", "Confirm")
    browser.account("me", "running")
    assert call(program.base, "/openwx/check_client", client="me")["client"][0]["link"] == "ilink"


HOSTILE_TEXTS = [
    "<script>window.hurt=1</script>", "<img src=x onerror=window.hurt=1>", "${window.hurt=1}",
    "\"><svg onload=window.hurt=1>", "'-window.hurt=1-'", "</script><script>window.hurt=1",
    "{name}<b onclick=window.hurt=1>", "<style>*{display:none}</style>", "<plaintext>",
    "__proto__", "&lt;script&gt;window.hurt=1", "\\u003cscript>window.hurt=1", "constructor",
    "\u202ewindow.hurt=1", "$&$`$'", "id: 9\ndata: {}", "\u2028x", "W" * 300]


def test_hostile_names_and_messages_run_nothing(board, page):
    for uid, text in enumerate(HOSTILE_TEXTS, 9000):
        for change in ({"what": "person", "name": text}, {"what": "friend", "in": "bob"},
                       {"what": "group_member", "in": "OpenQQ"}):
            assert board.call("/local/change", do="add", uid=uid, **change)["code"] == 0
        said = board.call("/local/say", client="bob", **{"from": uid}, content=text)
        assert said["code"] == 0, text
    page.choose("#speaker", "bob")
    page.choose("#peer", "OpenQQ (group)")
    page.type("#filter", "→ bob")
    for place in "#events .text", "#members bdi", "#peer option":
        assert eventually(lambda: set(HOSTILE_TEXTS) <= set(page.run(
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)",
            place))), place
    assert page.run("return [window.hurt, Object.prototype.code]") == [None, None]
    assert page.run(
        "const own = new Set('HTML HEAD META TITLE STYLE BODY HEADER H1 SPAN P FORM DIV H2 INPUT "
        "BUTTON MAIN SECTION ARTICLE H3 BDI IMG DETAILS SUMMARY LABEL SMALL SELECT OPTION OL UL "
        "LI TIME B SCRIPT'.split(' '));"
        "return [...document.querySelectorAll('*')].filter((one) => !own.has(one.tagName) || "
        "[...one.attributes].some((a) => a.name.startsWith('on'))).map((one) => one.outerHTML)"
        ) == []
    assert page.run("return document.scripts.length") == 2
    page.show(width=320)
    assert page.run("return document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize("language, said, words", [
    ("en-US", "It did not work: client name not allowed", {
        "#begin": "Start an account", "[data-account=bob]": "running",
        "#settings": "tries to send one message"}),
    ("zh-CN", "操作失败:名称或参数不可用(client name not allowed)", {
        "#begin": "启动账号", "[data-account=bob]": "运行中", "#settings": "要上报的事件",
        "#bridge": "它的 access token",
        "[data-account=bob] .facts": r"自 \d{4}/\d+/\d+ \d+:\d+ · 端口"}),
    ("fr", "It did not work: client name not allowed", {"#begin": "Start an account"})])
def test_the_page_fits_every_window_and_speaks_the_browsers_language(
        board, browser, language, said, words):
    for width in 320, 1600:
        browser.show(width, 600, language)
        browser.open(board.base + "/")
        browser.account("bob", "running")
        browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
        for css, text in words.items():
            browser.reads(css, text)
        assert browser.run("const page = document.documentElement;"
                           "return page.scrollWidth <= page.clientWidth && innerWidth") == width
        assert browser.run(
            "return [...document.querySelectorAll('button, input, select, h2')].filter((one) => {"
            "const box = one.getBoundingClientRect();"
            "return one.checkVisibility() && (box.left < 0 || box.right > innerWidth)})"
            ".map((one) => one.outerHTML)") == []
        browser.type("#name", "no/name")
        browser.click("#begin button.main")
        browser.reads("#said", re.escape(said))
        assert browser.run("const one = document.querySelector('#said').getBoundingClientRect();"
                           "return one.top >= 0 && one.bottom <= innerHeight"), "wherever one is"
    assert browser.run("return document.documentElement.lang") == (
        "zh" if language == "zh-CN" else "en")


def test_every_word_of_the_page_has_its_chinese():
    script, body = openqq.DASHBOARD_SCRIPT, openqq.DASHBOARD_BODY
    table = script[script.index("const ZH"):script.index("};")]
    known = {json.loads(f'"{word}"') for word in re.findall(r'"([^"]+)":\s+"', table)}
    used = {*re.findall(r' data-t[^>]*>([^<]+)<', body),
            *re.findall(r'\b(?:t|button)\("([^"]+)"', script)}
    states = set(openqq.NEXT_STATES) - {""}
    english = script[script.index("const EN"):script.index("const word")]
    assert states - set(re.findall(r'"(\w+)": "', english)) <= {
        "loading", "updating", "running"}, "which are said as they are called"
    errors = {f"code {error.code}" for error in openqq.OpenQQError.__subclasses__()}
    events = {event for event in ALL_EVENTS.split(",") if not event.startswith("update_")}
    assert len(used) > 30 and len(errors) > 9
    assert used | states | events | {"friend_request", "revoke_message", *openqq.Outlet.NEWS} | (
        errors - {"code -1"}) <= known  # of which no page asks for what there is not


def test_messages_are_filtered_wait_while_the_page_is_paused_and_move_no_reader(board, page):
    def speak(content):
        board.call("/local/say", client="alice", **{"from": "小冰"}, content=content)

    speak("apple")
    speak("pear")
    page.reads("#events", "pear", "apple")  # the newest first
    page.type("#filter", "小冰 APPLE")
    assert eventually(lambda: "pear" not in page.text("#events"))
    assert "apple" in page.text("#events")
    page.click("#pause")
    speak("apple the second")
    page.reads("#pause", r"Resume \(1\)")
    assert "second" not in page.text("#events")
    page.click("#pause")
    page.reads("#events", "apple the second")
    for number in range(60):  # and as many echoes
        board.call("send_friend_message", client="alice", name="小冰", content=f"many {number}",
                   **{"async": 1})
    page.talk("alice", "小冰", "so that it is seen")
    page.reads("#talk", "小冰\nmany 59")
    page.run("document.querySelector('#talk').scrollTop = 9")
    speak("one more")
    page.reads("#talk", "小冰\none more")
    assert page.run("return document.querySelector('#talk').scrollTop") == 9


def test_the_page_shows_when_events_were_and_sorts_them_by_that(closing, start, browser):
    controller = start("controller")
    controller.login("alice")
    me = Bridged(controller, "ws-when", closing(Bridge())).running()
    controller.call("send_friend_message", client="alice", name="小灰", content="alice's own")
    me.events_of(*[private(20001, text, time=when) for text, when in (
        ("of 2010", 1262304000), ("of the future", 4102444800), ("of long ago", 964000000))])
    browser.open(controller.base + "/")
    browser.reads("#events", "of the future", "alice's own", "of 2010", "of long ago")
    told = browser.run("return [...document.querySelectorAll('#events li')].find((one) => "
                       "one.innerText.includes('of 2010')).querySelector('time').textContent")
    assert re.search(r"\b(1|12|31)/(1|12|31)/(2010|2009)\b", told), told
    me.events_of(private(20001, "late", time=1262304000 + 86400))  # into its place
    browser.reads("#events", "alice's own", "late", "of 2010")


def test_the_page_asks_once_for_the_token_and_keeps_it_for_the_tab(guarded, browser):
    source = request(guarded.base, "/")[2].decode()
    assert TOKEN not in source and "alice" not in source
    browser.open(guarded.base + "/")
    for word, said in ("wrong", "The token that this"), (TOKEN, "That is not the token"):
        browser.reads("#lock", said)
        assert "alice" not in browser.text()
        browser.type("#token", word)
        browser.click("#lock button")
    browser.account("alice", "running")
    browser.talk("alice", "小冰", "behind a token")
    browser.reads("#talk", "小冰\nbehind a token")
    browser.reads("#live", "live")
    browser.open(guarded.base + "/?again")
    browser.account("alice", "running")
    assert browser.run("return [Object.values(sessionStorage), location.href + document.cookie + "
                       "JSON.stringify(localStorage)]") == [[TOKEN], guarded.base + "/?again{}"]


def test_the_page_of_a_client_alone_is_about_its_account(alone, browser):
    browser.open(alone.program.base + "/")
    browser.account("alice", "running")
    assert "Start an account" not in browser.text()
    browser.talk("alice", "小冰", "on my own")
    browser.reads("#talk", "小冰\non my own")


def test_the_page_loads_nothing_from_elsewhere_and_runs_only_its_own_script(pair, alone):
    seen = set()
    for base in [pair.base, alone.program.base] * 2:
        status, fields, body = request(base, "/")
        policy = fields["content-security-policy"]
        text, nonce = body.decode(), re.search("script-src 'nonce-([^']{16,})'", policy).group(1)
        assert status == 200 and "unsafe" not in policy
        for rule in "default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'":
            assert rule in policy
        assert text.count(f'nonce="{nonce}"') == text.count("<script") == 2
        assert not re.search(r"https?://(?!127)[^ ]*\.(js|css|png|woff)", text)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
        seen.add(nonce)
    assert len(seen) == 4


def test_the_form_offers_exactly_what_callers_may_set(pair):
    text = request(pair.base, "/")[2].decode()
    config = json.loads(re.search(r'id="config">(.*?)</script>', text).group(1))
    offered = {row[0]: row for row in config["settings"]}
    assert set(offered) == {setting.name for setting in openqq.SETTINGS.values()
                            if setting.caller and not setting.idle}
    assert [name for name, row in offered.items() if row[3]] == [
        name for name in offered if openqq.SETTINGS[name].secret]
    assert offered["msg_ttl"][1:4] == ["tries to send one message", "3", False]
    assert all(re.search(r"[^\x00-\x7f]", row[4]) for row in offered.values()), "in Chinese too"


# ------------------------------------------------------------------------------------------------
# The commands that call the API, and its description
# ------------------------------------------------------------------------------------------------

GEHEIM = {"OPENQQ_TOKEN": "geheim"}


def begin_command(base, *words, out=subprocess.PIPE, err=subprocess.PIPE, **env):
    """A command that begins, without compiling the file each time."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("MOJO_", "OPENQQ_")) and name != "NO_COLOR"}
    return subprocess.Popen(
        [sys.executable, *openqq.python_words(*words)], stdout=out, stderr=err,
        stdin=subprocess.DEVNULL, env={**environment, "OPENQQ_URL": base, **env})


def command(base, *words, **env):
    """A command run to its end, its output in a pipe: (status, stdout, stderr)."""
    with begin_command(base, *words, **env) as process:
        out, err = process.communicate(timeout=3 * WAIT)
    return process.returncode, out.decode(), err.decode()


class Session:
    """A command with a terminal as its output; `log` has its lines."""

    def __init__(self, base, *words, **env):
        master, slave = pty.openpty()
        self.process = begin_command(base, *words, out=slave, err=slave, **{"TERM": "xterm", **env})
        os.close(slave)
        self.log = Log(Terminal._lines(master))

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(WAIT)

    def text(self):
        """All that it wrote to the terminal, when it is over."""
        assert all_gone(self.log, WAIT)
        self.process.wait(WAIT)
        return self.log.text().replace("\r", "")


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    """A controller with a token; in it alice and 小明, running, and `waits`, which shows a code."""
    with serving(tmp_path_factory.mktemp("office"), "controller", env=GEHEIM) as program:
        program.call = functools.partial(program.call, token="geheim")
        program.login("alice")
        program.login("小明")
        program.call("start_client", client="waits")
        assert eventually(lambda: program.state("waits")["state"] == "scaning")
        yield program


@pytest.fixture
def ask(office):
    """ask(words …) runs a command against the office, with its token."""
    return lambda *words, **env: command(office.base, *words, **{**GEHEIM, **env})


def shown_code(office, name):
    """The picture that an account waits with, and what a terminal draws of it."""
    path = f"/openqq/get_qrcode?client={name}&token=geheim"
    assert eventually(lambda: request(office.base, path)[0] == 200)
    picture = request(office.base, path)[2]
    return picture, openqq.qr_text(openqq.qr_unpng(picture))


def test_commands_lead_an_account_through_its_life(ask, office):
    done = r"success, pid \d+, port \d+\n"
    status, out, _ = ask("start", "robot", "post_event=0", "post_secret=x=y")
    assert status == 0 and re.fullmatch(done, out)
    _, drawn = shown_code(office, "robot")
    assert "scaning" in ask("status", "robot")[1]
    inverted = re.sub("\x1b[^m]*m", "", drawn).translate(str.maketrans(" ▀▄█", "█▄▀ "))
    assert ask("qrcode", "robot")[:2] == (0, inverted)
    assert ask("call", "/local/login", "client=robot")[0] == 0
    status, _, said = ask("qrcode", "robot")
    assert status == 1 and "no QR code" in said
    status, out, _ = ask("stop", "robot")
    assert status == 0 and re.fullmatch(done, out)
    assert "robot" not in ask("status")[1]


def test_a_message_is_sent_to_a_uid_an_id_or_a_name(ask, office):
    friend = office.call("search_friend", client="alice", name="小冰")[0]
    seen = office.call("check_event", client="alice", since=0)[-1]["seq"]
    words = [("friend", friend["uid"]), ("friend", friend["id"]), ("friend", "小冰"),
             ("group", OPENQQ_GROUP), ("discuss", "OpenQQ")]
    for number, (kind, who) in enumerate(words):
        status, out, _ = ask("send", "alice", kind, who, "--", f"--text & {number}%+")
        assert status == 0 and re.fullmatch(r"发送成功, id \d+\n", out), who
    assert [(event["type"], event["content"])
            for event in office.call("check_event", client="alice", since=seen)
            if event["class"] == "send"] == [(f"{kind}_message", f"--text & {number}%+")
                                             for number, (kind, _) in enumerate(words)]


REFUSED = [
    (["status"], {"OPENQQ_TOKEN": "wrong"}, 1, r"auth failure \(code -6\)"),
    (["call", "nope", "client=alice"], {}, 1, "HTTP 403 api not found"),
    (["call", "get_user_info", "client=waits"], {}, 1,
     r"client not running, it is \w+ \(code 300\)"),
    (["call", "events", "client=alice"], {}, 2, "the command events"),
    (["send", "alice", "friend", "小冰"], {}, 2, "usage: .* send NAME friend"),
    (["send", "alice", "robot", "x", "y"], {}, 2, "'robot' is not friend"),
    (["start", "alice", "=1"], {}, 2, "'=1' must be key=value"),
    (["status", "--url"], {}, 2, "--url needs a value"),
    (["events", "--watch"], {}, 2, "--watch is not a flag of events"),
    (["status", "--url", "4000"], {}, 2, "--url: .*http://127.0.0.1:4000"),
    (["send", "alice", "friend", "x", b"\xff\xfe"], {}, 2, "neither UTF-8 nor GB18030"),
    (["events", "--url=http://127.0.0.1:9"], {}, 3, "not reachable: .*refused"),
    (["stop", "x", "--url=http://nowhere.invalid"], {}, 3, "not reachable")]


def test_a_command_that_fails_says_why_on_one_line_and_in_its_exit_status(ask):
    for words, env, code, said in REFUSED:
        status, out, err = ask(*words, **env)
        assert (status, out) == (code, ""), words
        assert re.match(f"openqq: .*{said}", err) and err.count("\n") == 1, (words, err)


def test_what_is_no_answer_of_the_api_is_no_success(closing):
    peer, row = closing(Peer()), []
    peer.handle = lambda handler: peer.reply(handler, *row)
    for words, *row, code in ((["stop", "x"], 502, "<html>Bad Gateway</html>", "text/html", 3),
                              (["stop", "x"], 200, "{", "application/json", 3),
                              (["status"], 200, "[]", "application/json", 3),
                              (["status"], 301, "", "text/plain", 1)):
        status, out, error = command(peer.url, *words)
        assert (status, out) == (code, "") and re.fullmatch("openqq: .*\n", error), row


def test_json_prints_what_came_to_the_byte(ask, office):
    for words, path, code in (
            (["status"], "check_client?", 0), (["stop", "nobody"], "stop_client?client=nobody&", 1),
            (["call", "get_friend_info", "client=alice"], "get_friend_info?client=alice&", 0)):
        body = request(office.base, f"/openqq/{path}token=geheim")[2].decode()
        assert ask(*words, "--json")[:2] == (code, body + "\n")
    assert json.loads(ask(*words)[1]) == json.loads(body)


@pytest.mark.parametrize("env", [{"LC_ALL": "C.UTF-8"}, {
    "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["UTF-8", "as it was before UTF-8"])
def test_words_of_a_gb18030_console_are_read_as_that(office, env):
    me, friend, text = (word.encode("gbk") for word in ("小明", "小冰", "一二三，国标"))
    for name, words, secret in (
            ("小明", ["send", me, "friend", friend, text], GEHEIM),
            ("alice", ["call", "send_friend_message", "client=alice", b"name=" + friend,
                       b"content=" + text, "--token", "geheim"], {})):
        status, out, error = command(office.base, *words, **env, **secret)
        assert (status, error) == (0, ""), out
        assert [event["content"] for event in office.call("check_event", client=name, since=0)
                if "content" in event][-2:] == ["一二三，国标"] * 2, name


def test_events_tell_what_is_kept_and_then_what_comes_of_each_account(office):
    office.call("send_group_message", client="alice", name="OpenQQ", content="one")
    with begin_command(office.base, "events", **GEHEIM) as process:
        log = Log(process.stdout)
        log.wait("alice → OpenQQ: one")
        office.call("send_group_message", client="alice", name="OpenQQ", content="two")
        for text, line in itertools.product(("one", "two"), (
                "alice → OpenQQ: {}", "小明 ← alice@OpenQQ: {}")):
            log.wait(rf"^\d\d:\d\d:\d\d {line.format(text)}$")
        for what, more in ("person", {"name": "客"}), ("friend", {"in": "alice"}):
            office.call("/local/change", do="add", what=what, uid="700", **more)
        log.wait(r"^\d\d:\d\d:\d\d alice · new_friend 客$")
        for text in "one", "two":
            assert log.text().count(f"alice → OpenQQ: {text}") == 1
        process.terminate()


def test_the_table_has_straight_columns_though_chinese_letters_take_two(ask):
    head, *rows = ask("status")[1].splitlines()
    rows = [row for row in rows if "running" in row]
    assert head.split()[:5] == ["ACCOUNT", "STATE", "PORT", "PID", "UP"] and len(rows) == 2
    places = [[match.start() for match in re.finditer(r"\S+", re.sub("([一-龥])", r"\1_", line))][:5]
              for line in [head, *rows]]
    assert places[1:] == places[:1] * 2


def test_a_terminal_gets_colours_if_it_wants_them_codes_to_scan_tables_anew_and_no_bytes(
        office, ask):
    for env, colored in (({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True),
                         ({"TERM": "dumb"}, False)):
        text = Session(office.base, "status", **GEHEIM, **env).text()
        assert ("\x1b[32mrunning\x1b[0m" in text) == colored == ("\x1b" in text), env
        assert re.search("^alice .*running", text, re.M)
    assert "\x1b" not in ask("status")[1]
    picture, drawn = shown_code(office, "waits")
    assert Session(office.base, "qrcode", "waits", **GEHEIM).text() + "\n" == drawn
    words = ["call", "get_qrcode", "client=waits"]
    text = Session(office.base, *words, **GEHEIM).text()
    assert "bytes of image/png: not for a terminal" in text
    with begin_command(office.base, *words, **GEHEIM) as process:
        assert process.communicate(timeout=WAIT) == (picture, b"")
    session = Session(office.base, "status", "--watch", **GEHEIM)
    session.log.wait(r"\x1b\[H\x1b\[J.*ACCOUNT", count=2)
    assert session.interrupt() == 130


STEERING = "\x1b]0;mine\x07\x1b[2J\x9b31m\u202egnp\u2066\x7f\x00\x85 \u3000客"


def test_no_name_or_message_of_the_network_steers_a_terminal(closing, office):
    name = STEERING.replace("\x00", "")
    for what, more in ("person", {"name": name}), ("friend", {"in": "alice"}):
        office.call("/local/change", do="add", what=what, uid="666", **more)
    said = office.call("/local/say", client="alice", content=name + "\nend", **{"from": "666"})
    assert said["code"] == 0
    peer = closing(Peer())
    peer.handle = lambda handler: peer.reply(handler, 200, {"code": 0, "client": [{}, {
        "account": "a", "state": "stop", "error": STEERING + "\nTraceback\u2028"}]})
    for words in (["call", "get_friend_info", "client=alice"], ["events", "alice"],
                  ["call", "get_friend_info", "client=alice", "--json"],
                  ["events", "alice", "--json"], ["status", "--url", peer.url],
                  ["send", "alice", "friend", "x", "y", "--url=http://\x9b31m/"]):
        session = Session(office.base, *words, **GEHEIM, NO_COLOR="1")
        if words[0] == "events":
            session.log.wait(r"\\nend")
            session.interrupt()
        text = session.text()
        assert "gnp" in text or "send" in words, words
        assert text.replace("\n", "").isprintable(), (words, text)
        assert words[0] != "call" or name in [row["name"] for row in json.loads(text)]
        assert words[0] != "status" or text.endswith(r"客\nTraceback")


def test_a_token_on_the_command_line_is_gone_before_anybody_is_called(office):
    with begin_command(office.base, "events", "alice", "--token", "geheim", "--json") as process:
        assert json.loads(process.stdout.readline())["client"] == "alice"
        shown = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(process.pid)],
                               stdout=subprocess.PIPE, check=True).stdout
        assert b"events" in shown and b"alice" in shown and b"geheim" not in shown
        process.terminate()


def test_commands_name_the_client_in_the_query_and_nothing_secret(closing):
    seen, peer = [], closing(Peer())

    def answer(handler):
        seen.append((handler.command, handler.path, handler.body.count(b"hush")))
        assert handler.query == {"client": "小明"} and b"client" not in handler.body
        assert handler.headers["Authorization"].encode("latin-1").decode() == "Bearer Ω"
        peer.reply(handler, 200, {"code": 0, "status": "success", "client": []})

    peer.handle = answer
    for words in (["start", "小明", "onebot_token=hush"], ["stop", "小明"],
                  ["send", "小明", "friend", "7", "hush"], ["status", "小明"],
                  ["call", "consult", "client=小明", "content=hush"]):
        assert command(peer.url + "/under/", *words, OPENQQ_TOKEN="Ω")[0] == 0
    assert seen == [(method, "/under/openqq/" + name, hushed) for method, name, hushed in (
        ("POST", "start_client", 1), ("POST", "stop_client", 0), ("GET", "check_client", 0),
        ("POST", "send_friend_message", 1), ("GET", "check_client", 0), ("POST", "consult", 1))]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_a_full_output_is_told_on_one_line_and_a_reader_who_has_enough_ends_a_command(office):
    office.call("send_friend_message", client="alice", name="小冰", content="x")
    for words in (["status", "--watch"], ["events", "alice"], ["controller", "--help"]):
        with open("/dev/full", "wb") as full, begin_command(
                office.base, *words, out=full, **GEHEIM) as process:
            error = process.communicate(timeout=3 * WAIT)[1]
        assert process.returncode == 1, words
        assert re.fullmatch(b"openqq: the output cannot be written: .*\n", error), words
    with begin_command(office.base, "status", **GEHEIM) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(WAIT)) == (b"", 0)


def test_what_only_reads_is_called_by_its_name_or_its_path(ask):
    for api in "/openwx/get_friend_info", "/metrics", "/local/world", "openapi.json":
        assert ask("call", api, "client=alice")[0] == 0, api


def test_commands_drive_one_account_alone_and_none_that_it_is_not(start):
    client = start("client", "--account", "solo")
    for words in (["status", "other"], ["events", "other"], ["stop", "other"],
                  ["send", "other", "friend", "小冰", "hello"]):
        assert command(client.base, *words)[::2] == (
            1, "openqq: client not exists (code 1)\n"), words
    assert client.call("relogin", client="other")["code"] == 1
    assert "solo" in command(client.base, "status", "solo")[1]
    assert command(client.base, "qrcode", "solo")[0] == 0
    assert user(client, "solo")["account"] == "solo"
    session = Session(client.base, "events", "solo", TERM="dumb")
    assert command(client.base, "send", "solo", "friend", "小冰", "hello")[0] == 0
    session.log.wait("solo ← 小冰: hello")
    assert command(client.base, "stop", "solo")[0] == client.stop() == 0
    assert session.process.wait(WAIT) in (1, 3)


def test_a_qr_code_is_read_back_out_of_its_picture():
    rows = openqq.qr_matrix("汉" * 700)
    picture = openqq.qr_png(rows)
    assert openqq.qr_unpng(picture) == rows
    for other in b"\x89PNG", picture[:60], openqq.avatar("1"), picture.replace(b"IDAT", b"IDAX"):
        with pytest.raises(ValueError):
            openqq.qr_unpng(other)


# -- its description

def resolve(document, schema):
    """A schema or response, followed to what it refers to."""
    while "$ref" in schema:
        part = document
        for step in schema["$ref"].split("/")[1:]:
            part = part[step]
        schema = part
    return schema


JSON_TYPES = {str: "string", bool: "boolean", dict: "object", list: "array", int: "integer",
              float: "number", type(None): "null"}


def misfits(document, schema, value, where="answer"):
    """What in a value is not as its JSON Schema says: as much of it as is used."""
    schema, kind = resolve(document, schema), JSON_TYPES[type(value)]
    assert set(schema) <= {"type", "properties", "required", "items", "anyOf", "enum", "minimum",
                           "description"}, schema
    variants = [list(misfits(document, part, value, where)) for part in schema.get("anyOf", [])]
    yield from variants[0] if all(variants) and variants else []
    types = schema.get("type", kind)
    if kind not in ([types] if isinstance(types, str) else types):
        yield f"{where} is {value!r:.60} and not {types}"
    if value not in schema.get("enum", [value]):
        yield f"{where} is {value!r} and not one of {schema['enum']}"
    for part in value if kind == "array" else []:
        yield from misfits(document, schema.get("items", {}), part, where + "[]")
    for name, part in value.items() if kind == "object" else []:
        yield from misfits(document, schema.get("properties", {}).get(name, {}), part,
                           f"{where}.{name}")
    if kind == "object" and set(schema.get("required", [])) - set(value):
        yield f"{where} has not all of {schema['required']}"


LATE = ["kick_group_member", "leave_group", "delete_friend", "relogin", "stop_client",
        "start_client", "delete_client"]
NEEDS_A_TICKET = {  # what the examples cannot know, and the answer is another one than yes
    "verify_code": (200, 201), "call_action": (200, 201), "get_message": (200, 100),
    "accept_group_request": (200, -1),
    "accept_friend_request": (200, -1), "revoke_message": (200, -1), "make_friend": (200, 101),
    "get_media": (404, None), "get_qrcode": (404, None), "scan": (404, None),
    "confirm": (404, None), "onebot": (403, -1), "milky": (403, -1)}


@pytest.mark.parametrize("words, prefix", [
    (["controller"], "/openqq/"), (["client", "--account", "alice"], "/openqq/"),
    (["controller", "--flavor", "weixin"], "/openwx/")],
    ids=["controller", "client", "weixin"])
def test_openapi_describes_what_is_there_and_every_example_works(start, words, prefix):
    server = start(*words)
    if words[0] == "controller":
        assert server.call(prefix + "start_client", client="alice")["code"] == 0
    assert server.call("/local/login", client="alice")["code"] == 0
    server.call("/local/say", client="alice", **{"from": "小灰"}, content="for check_event")
    document = server.call(prefix + "openapi.json")
    assert document["openapi"] == "3.1.0" and document["info"]["version"] == openqq.VERSION
    flavour = openqq.flavour_named("weixin" if "weixin" in words else "qq")
    assert {prefix + name for name in flavour.apis} <= set(document["paths"])
    assert (prefix + "start_client" in document["paths"]) == (words[0] == "controller")
    operations = [(path, path.rpartition("/")[2], method, operation)
                  for path, methods in document["paths"].items()
                  for method, operation in methods.items()]
    ids = [operation["operationId"] for *_, operation in operations]
    assert len(ids) == len(set(ids))
    for path, name, method, operation in sorted(operations, key=lambda row: (
            LATE.index(row[1]) + 1 if row[1] in LATE else 0, *row[:3])):
        responses, answers = operation["responses"], set()
        if name == "events":  # has no end
            assert "text/event-stream" in responses["200"]["content"]
            continue
        target = path + "?" + urllib.parse.urlencode({
            row["name"]: row["example"] for row in operation.get("parameters", [])
            if "example" in row})
        calls = [({}, None)] if "requestBody" not in operation else [
            ({"Content-Type": kind},
             (json.dumps if "json" in kind else urllib.parse.urlencode)(row["example"]))
            for kind, row in operation["requestBody"]["content"].items() if "example" in row]
        for fields, body in calls:
            status, fields, data = request(server.base, target, method.upper(), body, fields)
            where = f"{method} {target} {body}: {status} {data[:200]}"
            told = resolve(document, responses[str(status)]).get("content", {})
            kind = fields.get("content-type", "").partition(";")[0]
            value = json.loads(data) if kind == "application/json" else None
            if kind in told:
                found = list(misfits(document, told[kind].get("schema", {}), value))
                assert not found, (where, found)
            else:
                assert not data or not told or {"*/*", kind.partition("/")[0] + "/*"} & set(told)
            code = value.get("code", 0) if isinstance(value, dict) else None if status > 299 else 0
            if "content" in responses.get("200", {}) and status == 200:
                assert str(code) in re.findall(r"-?\d+", responses["200"]["description"])
            answers.add((status, code))
        assert answers, (method, path)
        if (name not in LATE or method == "get") and name != "kick_group_member":
            assert answers == {NEEDS_A_TICKET.get(name, (200, 0))}, (method, path)


def test_openapi_tells_of_every_route_but_a_clients_own_way():
    told = {verb.name for verb in openqq.VERBS}
    paths = set(re.findall(r'Route\("(/[^"]*)"', "\n".join(LINES)))
    assert len(paths) > 9 and paths - told == {"/local/link"}


def test_openapi_tells_what_needs_the_token_a_client_s_name_and_a_running_account(office):
    document = office.call("openapi.json")
    paths, schemes = document["paths"], document["components"]["securitySchemes"]
    assert {name for row in document["security"] for name in row} == set(schemes) == {
        "bearer", "access_token"}
    assert paths["/healthz"]["get"]["security"] == []
    for name, required in ("get_user_info", True), ("check_client", False):
        rows = paths["/openqq/" + name]["get"]["parameters"]
        assert [row["required"] for row in rows if row["name"] == "client"] == [required]
    office.call("start_client", client="idle")
    for path, operations in paths.items():
        told = set(operations.get("get", {}).get("responses", {}))
        if told and path not in openqq.BRIDGES:
            assert (request(office.base, path)[0] == 403) == ("403" in told), path
        name = path.rpartition("/")[2]
        if told and path.startswith("/openqq/") and name not in [*LATE, "check_event", "events"]:
            status = request(office.base, path + "?client=idle&token=geheim")[0]
            assert (status == 503) == ("503" in told), path
    office.call("delete_client", client="idle")


# ------------------------------------------------------------------------------------------------
# The README
# ------------------------------------------------------------------------------------------------

with open(os.path.join(HERE, "README.md"), encoding="utf-8") as _readme:
    README = _readme.read()


ENGLISH, CHINESE, REFERENCE = re.split("^(?=# 中文|# Reference)", README, flags=re.M)


def blocks(kind, text=README):
    """The fenced blocks of a kind in the README, in their order."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_readme_has_two_equal_halves():
    assert blocks("sh", ENGLISH) == blocks("sh", CHINESE) != []
    for part in r"^#+ ", r"^- ", r"^\d\. ":
        counts = [len(re.findall(part, half, re.M)) for half in (ENGLISH, CHINESE)]
        assert counts[0] == counts[1] > 0, part
    names = [set(re.findall(r"`([a-z_]+)`", half)) for half in (ENGLISH, CHINESE)]
    assert names[0] == names[1]
    assert len(README.splitlines()) < 450
    for whose in "controller", "client":
        assert README.count(f"`python openqq.py {whose} --help`") == 2


def test_readme_table_of_calls_is_what_there_is():
    there = {verb.name for verb in openqq.VERBS if "/" not in verb.name} - {"openapi.json"}
    rows = re.findall(r"^\| (`[a-z_` ]+`) \| [^|]+ \| [^|]+ \|$", REFERENCE, re.M)
    assert set(re.findall(r"\w+", " ".join(rows))) == there


def type_in(line, ports):
    """What a shell prints for a line of the README, with other ports."""
    for plain, port in ports.items():
        line = line.replace(f":{plain}/", f":{port}/")
    return subprocess.run(["sh", "-c", line], cwd=HERE, stdout=subprocess.PIPE, timeout=60,
                          check=True).stdout.decode()


def test_readme_commands_do_what_the_readme_says(script, start):
    (program, first_minute, *_), (bot_lines,) = blocks("sh", ENGLISH), blocks("sh", REFERENCE)
    assert program == "python openqq.py controller\n"
    controller = start("controller", typed=True)
    with reserve() as free:
        ports = {4000: controller.port, 8000: free.getsockname()[1]}

    def typed(text):
        *beginning, events = text.splitlines()
        for line in beginning:
            assert json.loads(type_in(line, ports))["code"] == 0
        return lambda: [event.get("content") for event in json.loads(type_in(events, ports))]

    assert typed(first_minute)()[-1] == "hello"
    script(next(block for block in blocks("python") if "class Bot" in block).replace(
        "8000", str(ports[8000])))
    events = typed(bot_lines)
    while "pong" not in events():
        pass
    controller.stop()  # while there is somebody who takes its last events


def test_readme_three_steps_bring_a_real_account(closing, start, tmp_path):
    alone, again = [" ".join(re.search(r"`(python openqq.py client --account me [^`]+)`", half)
                             .group(1).split()) for half in (ENGLISH, CHINESE)]
    assert alone == again
    page, bridges = closing(NapCatPage("WEBUI_TOKEN")), [
        closing(Bridge(token="TOKEN")) for _ in "12"]
    page.logged_in = True
    controller = start("controller")
    line = blocks("sh", ENGLISH)[2].replace("ws://127.0.0.1:3001", bridges[0].ws).replace(
        "onebot_login=", f"onebot_login_api={page.url}&onebot_login=")
    assert json.loads(type_in(line, {4000: controller.port}))["code"] == 0
    assert eventually(lambda: controller.state("me")["state"] == "running")
    assert controller.call("get_user_info", client="me")["uid"] == "10001"
    words = alone.replace("ws://127.0.0.1:3001", bridges[1].ws).split()[2:]
    client = start(*words, "--onebot-login-api", page.url, tmpdir=tmp_path / "alone")
    client.log.wait("logged in")
    assert client.call("get_user_info")["uid"] == "10001"
    assert not bridges[0].faults and not bridges[1].faults


def test_readme_two_steps_bring_a_real_wechat_account(closing, start):
    begin, account = blocks("sh", ENGLISH)[3].splitlines()
    server = closing(ILink())
    controller = start(*begin.split()[2:])
    line = account.replace("&link", f"&ilink_cdn={server.url}&ilink_api={server.url}&link")
    assert json.loads(type_in(line, {2000: controller.port}))["code"] == 0
    server.wait_call("get_qrcode_status")
    server.confirm()
    server.wait_call("getupdates")
    server.say("你好")
    assert eventually(lambda: "你好" in [event.get("content") for event in controller.call(
        "/openwx/check_event", client="wx", since=0) if isinstance(event, dict)])


def test_readme_library_example_runs(script):
    code = next(block for block in blocks("python") if "openqq.Client" in block)
    program = script(code.replace("5000", "0").replace(
        'account="alice"', 'account="alice", tmpdir="{tmpdir}"')).ready()
    for path, more in ("login", {}), ("say", {"from": "小灰", "content": "hi"}):
        assert program.call("/local/" + path, client="alice", **more)["code"] == 0
    program.log.wait(r"\[好友消息\] 我->小灰 : you said hi")
    assert program.stop() == 0


def test_readme_commands_for_the_terminal_do_their_work(start):
    controller = start("controller")
    lines = [line.split() for line in "".join(blocks("console")).splitlines()]
    shown = {"status": "^alice ", "events": r"alice ← 小冰: hello", "call": '"name": "小冰"',
             "send": "^发送成功", "start": "^success", "stop": "^success", "qrcode": "▀"}
    assert {line[2] for line in lines} == set(openqq.COMMANDS) == set(shown)
    for python, file, *words in lines:
        assert (python, file) == ("python", "openqq.py")
        if words[0] == "qrcode":
            assert eventually(lambda: request(
                controller.base, "/openqq/get_qrcode?client=alice")[0] == 200)
        session = Session(controller.base, *words, TERM="dumb")
        session.log.wait(shown[words[0]])
        if words[0] == "events" or "--watch" in words:
            assert session.interrupt() == 130
        assert session.process.wait(WAIT) in (0, 130), words
        if words[0] == "qrcode":
            assert controller.call("/local/login", client="alice")["code"] == 0


def test_every_line_of_how_do_i_does_what_it_says_and_every_file_is_named(start, receive):
    controller = start("controller")
    controller.login("alice", post_api=receive().url)
    rows = re.findall(r"^\| (.+?) \| `(curl .+)` \|$", README, re.M)
    assert len(rows) >= 20
    for want, line in rows:
        if "events" in line:  # has no end
            line = line.replace("curl ", "curl -m 0.3 ", 1) + " || true"
        answer = type_in(line.replace("curl ", "curl -s ", 1), {4000: controller.port})
        if "get_qrcode" in line or "events" in line:
            continue
        answer = json.loads(answer)
        if "call_action" in line:
            assert answer["status"] == "not with this link"
        elif "ID" in line or "TICKET" in line:
            assert answer["code"] in (-1, 0, 100, 400), (want, answer)
        else:
            assert answer and (isinstance(answer, list) or answer.get("code", 0) == 0), want
    for name in os.listdir(controller.tmpdir):
        plain = re.sub("_[0-9a-f]{32}[.].*", "_ID.*", name.replace("alice", "NAME"))
        named = f"`{plain}`" in README or plain.endswith(".jsonl") and f"`{plain[:-1]}`" in README
        assert named, name
