"""What OpenQQ costs, measured: python .ci/bench.py [--quick]

What is measured is in processes of its own, and so is what loads it (`bench.py load|watch|naive
JSON`). N is a naive ThreadingHTTPServer that answers the same JSON, NP a naive controller in front
of it; both as they come from the standard library, but for a longer backlog: with that of 5 their
figures would tell of lost SYNs. Prints one table; each figure goes to stderr as it comes.
"""
from __future__ import annotations

import http.client
import http.server
import itertools
import json
import os
import platform
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
if sys.argv[1:2] not in (["load"], ["watch"], ["naive"]):  # those have to start quickly
    from test_openqq import Program, call, eventually

SLICE = 1.0              # seconds that one measurement of a rate takes
ROUNDS = 5
SENDS, POSTS, QUEUED, CROWD = 6_000, 4_000, 9_900, 1_000


def load(port, path, callers, count=0, fresh=False):
    """Call a path from so many callers, without pause; `{n}` in it becomes a number.

    For `count` calls or SLICE seconds; `fresh` is a new connection each time, as ab does it. One
    thread and poll(): 25 µs a call, well below what answers them.
    """
    begun, durations, callings = time.monotonic(), [], {}
    end = begun + (60.0 if count else SLICE)
    form = f"GET {path} HTTP/1.{int(not fresh)}\r\nHost: 127.0.0.1\r\n\r\n"
    numbers = iter(range(count)) if count else itertools.count()
    poll = select.poll()

    def ask(sock):
        number = next(numbers, None)
        if number is not None:
            callings[sock.fileno()] = [sock, time.monotonic(), b""]
            sock.send(form.replace("{n}", str(number)).encode())

    def connect():
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect_ex(("127.0.0.1", port))
        callings[sock.fileno()] = [sock, time.monotonic(), None]
        poll.register(sock, select.POLLOUT)

    def answered(calling, data):
        assert data.startswith(b"HTTP/1.") and data[8:13] == b" 200 ", data[:500]
        now = time.monotonic()
        durations.append(now - calling[1])
        if fresh:
            connect()
        elif now < end:
            ask(calling[0])

    for _ in range(callers):
        connect()
    while time.monotonic() < end and not 0 < count <= len(durations):
        for number, _ in poll.poll(1000):
            sock, _, had = calling = callings[number]
            if had is None:
                poll.modify(sock, select.POLLIN)
                ask(sock)
                continue
            data = sock.recv(1_000_000)
            calling[2] = had + data
            if fresh and not data:
                poll.unregister(sock)
                sock.close()
                answered(calling, had)
            elif not fresh and is_whole(calling[2]):
                answered(calling, calling[2])
    durations.sort()
    return {"rate": len(durations) / (time.monotonic() - begun), "begun": begun,
            "p99": durations[len(durations) * 99 // 100]}


def is_whole(data):
    """Whether an answer with a Content-Length has come to its end."""
    head, blank, body = data.partition(b"\r\n\r\n")
    at = head.find(b"Content-Length: ")
    return bool(blank) and len(body) >= int(head[at + 16:].split(b"\r\n", 1)[0])


def watch(port, account, mark, count):
    """Read an account's event stream until so many messages with a mark have come."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    seen, since = set(), 0
    while len(seen) < count:
        connection.request("GET", f"/openqq/check_event?client={account}&since={since}")
        data = connection.getresponse().read()
        seen.update(re.findall(rb'"class":"recv","content":"%b(\d+)"' % mark.encode(), data))
        since = int(re.findall(rb'"seq":(\d+)', data)[-1])
    return {"ended": time.monotonic(), "seen": len(seen)}


def naive(friends, behind=0):
    """N, or NP when it is given N's port: says its own port and serves until it is ended."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if behind:
                body = urllib.request.urlopen(f"http://127.0.0.1:{behind}{self.path}").read()
            else:
                body = json.dumps(friends, ensure_ascii=False).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    http.server.ThreadingHTTPServer.request_queue_size = 1024
    http.server.ThreadingHTTPServer.handle_error = lambda *args: None  # whom we hang up on
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


class Helper:
    """load(), watch() or naive() in a process of its own; finish() is what it returned."""

    def __init__(self, role, **params):
        self.process = subprocess.Popen([sys.executable, __file__, role, json.dumps(params)],
                                        stdout=subprocess.PIPE)

    def finish(self):
        data, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0
        return json.loads(data)

    def port(self):
        return int(self.process.stdout.readline())

    def end(self):
        self.process.kill()
        self.process.communicate()


class Sink:
    """A post_api that keeps up: when each content came is in `times`. Contents that begin with
    "hold" are answered when `open` is set."""

    def __init__(self):
        self.times, self.open = {}, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            sock, _ = self._listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        data = more = b""
        while True:
            while not (b"\r\n\r\n" in data and is_whole(data)):
                more = sock.recv(1_000_000)
                if not more:
                    return sock.close()
                data += more
            now = time.monotonic()
            content = re.search(rb'"content":"([^"]*)"', data)
            if content:
                self.times[content.group(1).decode()] = now
                if content.group(1).startswith(b"hold"):
                    self.open.wait(60)
            data = b""
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def wait(self, *contents, seconds=60):
        """When the last of these came."""
        end = time.monotonic() + seconds
        while not all(content in self.times for content in contents):
            assert time.monotonic() < end, f"{len(self.times)} events came"
            time.sleep(0.0005)
        return max(self.times[content] for content in contents)


def proc(pid, name, pattern):
    """A number in a file of /proc, summed up where it stands there several times."""
    with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
        return sum(map(int, re.findall(pattern, file.read(), re.M)))


def pss(*pids):
    """MiB that processes have for themselves, with their part of what they share."""
    return sum(proc(pid, "smaps_rollup", r"^Pss: +(\d+)") for pid in pids) / 1024


def busy(*pids):
    """Seconds of CPU that processes have taken, threads that have ended included."""
    return sum(proc(pid, "stat", r"\) \S (?:\S+ ){10}(\d+)")
               + proc(pid, "stat", r"\) \S (?:\S+ ){11}(\d+)")
               for pid in pids) / os.sysconf("SC_CLK_TCK")


def lasts(function):
    """Seconds that it takes."""
    begun = time.monotonic()
    function()
    return time.monotonic() - begun


class Benchmark:
    """Figures by name, one of each from each round; report() makes the table of their medians."""

    NEEDED = {"login_type": "login", "pwd": "x"}

    def __init__(self, tmpdir, rounds):
        self.tmpdir, self.rounds, self.figures, self.sink = tmpdir, rounds, {}, Sink()
        self.round, self.programs, self.helpers = 0, [], []

    def program(self, name, *words, **kwargs):
        self.programs.append(Program(os.path.join(self.tmpdir, name), *words, **kwargs))
        return self.programs[-1].ready()

    def put(self, name, value):
        self.figures.setdefault(name, []).append(value)
        print(f"{name:28} {value:.6g}", file=sys.stderr, flush=True)

    def get(self, name):
        found = sorted(self.figures.get(name, ()))
        return found[len(found) // 2] if found else float("nan")

    def run(self):
        try:
            self.begin()
            for self.round in range(self.rounds):
                self.rates()
                self.sends()
                self.posts()
                self.crowd()
                self.lists()
                self.clients(f"{self.round}-100", 100)
                self.starts()
            self.clients("10", 10)
            self.clients("300", 300)
        finally:
            for program in self.programs:
                program.stop()
            for helper in self.helpers:
                helper.end()

    def begin(self):
        """Five friends for alice; the first start compiles, as a user's first one does."""
        self.main = self.program("main", "controller")
        for name, settings in {"alice": {}, "bob": {"check_event_list_max_size": 20_000},
                               "carol": {"post_api": self.sink.url}, "dave": {}}.items():
            self.main.call("start_client", client=name, **self.NEEDED, **settings)
        self.await_running(self.main, 4)
        self.pids = {row["account"]: row["pid"]
                     for row in self.main.call("check_client")["client"]}
        self.alice = self.main.state("alice")["port"]
        eventually(lambda: len(self.friends()) == 5)
        n = Helper("naive", friends=self.friends())
        self.n = n.port()
        np = Helper("naive", friends=[], behind=self.n)
        self.np = np.port()
        self.helpers = [n, np]
        many = self.program("many", "controller", "--world", self.world())
        for name in "10001", "20001":
            many.call("start_client", client=name, **self.NEEDED)
        self.await_running(many, 2)
        self.large, self.wide = [row["port"] for row in many.call("check_client")["client"]]

    def friends(self):
        return self.main.call("get_friend_info", client="alice")

    def world(self):
        """A group of 2,000 people with 10001 among them, and 500 groups with 20001."""
        people = [{"uid": str(10_001 + number), "name": f"人{number}"} for number in range(2_000)]
        people.append({"uid": "20001", "name": "老王"})
        members = [{"uid": row["uid"]} for row in people]
        path = os.path.join(self.tmpdir, "world.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"people": people, "groups": [
                {"uid": str(70_000 + number), "name": f"群{number}",
                 "owner_uid": "10001" if number == 500 else "20001",
                 "member": members[:-1] if number == 500 else members[-1:]}
                for number in range(501)],
                "discuss": [], "friends": []}, file)
        return path

    def await_running(self, program, count):
        while [row["state"] for row in program.call("check_client")["client"]
               ].count("running") < count:
            time.sleep(0.03)

    def rates(self):
        path, proxied = "/openqq/get_friend_info", "/openqq/get_friend_info?client=alice"
        for name, port, path, callers, fresh in (
                ("N", self.n, path, 32, True), ("NP", self.np, path, 32, True),
                ("NP one", self.np, path, 1, True),
                ("client", self.alice, path, 32, False),
                ("controller", self.main.port, proxied, 32, False),
                ("controller one", self.main.port, proxied, 1, False),
                ("client fresh", self.alice, path, 32, True),
                ("controller fresh", self.main.port, proxied, 32, True)):
            found = Helper("load", port=port, path=path, callers=callers, fresh=fresh).finish()
            self.put(name, found["rate"])
            self.put(name + " p99", found["p99"] * 1000)
        if shutil.which("wrk"):
            for name, port, path in (("client wrk", self.alice, path),
                                     ("controller wrk", self.main.port, proxied)):
                text = subprocess.run(["wrk", "-t1", "-c32", "-d1", f"http://127.0.0.1:{port}"
                                       + path], stdout=subprocess.PIPE, check=True).stdout
                self.put(name, float(re.search(rb"Requests/sec: +([\d.]+)", text).group(1)))

    def sends(self):
        mark = f"r{self.round}m"
        seen = Helper("watch", port=self.main.port, account="bob", mark=mark, count=SENDS)
        found = Helper("load", port=self.main.port, callers=16, count=SENDS, path="/openqq/"
                       f"send_friend_message?client=alice&name=bob&content={mark}{{n}}").finish()
        self.put("sends", SENDS / (seen.finish()["ended"] - found["begun"]))

    def say(self, content, who):
        return (f"/local/say?client=carol&from={urllib.parse.quote(who)}"
                f"&content={content}")

    def said(self, mark, who, count):
        found = Helper("load", port=self.main.port, callers=16, count=count,
                       path=self.say(mark + "{n}", who)).finish()
        return found["begun"], [f"{mark}{number}" for number in range(count)]

    def post_latency(self, mark, who):
        durations = []
        connection = http.client.HTTPConnection("127.0.0.1", self.main.port, timeout=60)
        for number in range(100):
            begun = time.monotonic()
            connection.request("GET", self.say(f"{mark}{number}", who))
            connection.getresponse().read()
            durations.append(self.sink.wait(f"{mark}{number}") - begun)
        return sorted(durations)[50] * 1000

    def posts(self):
        """Posting as it comes; then with a conversation's queue held up behind its first event."""
        mark, sink = f"r{self.round}", self.sink
        sink.open.clear()
        self.put("post", self.post_latency(mark + "a", "小灰"))
        begun, contents = self.said(mark + "b", "小灰", POSTS)
        self.put("posts", POSTS / (sink.wait(*contents) - begun))
        _, held = self.said(f"hold{mark}", "小冰", QUEUED)
        self.put("post queued", self.post_latency(mark + "c", "小灰"))
        begun = time.monotonic()
        sink.open.set()
        self.put("posts queued", QUEUED / (sink.wait(*held) - begun))

    def crowd(self):
        path, body = b"GET /openqq/check_event?client=dave HTTP/1.1\r\nHost: localhost\r\n\r\n", ""
        pids = self.main.pid, self.pids["dave"]
        call(self.main.base, "/local/say", client="dave", **{"from": "小灰"}, content="before")
        while "before" not in body:
            body = json.dumps(self.main.call("check_event", client="dave"))
        before, begun, poll, waiting = pss(*pids), time.monotonic(), select.poll(), {}
        for _ in range(CROWD):
            sock = socket.create_connection(("127.0.0.1", self.main.port))
            sock.sendall(path)
            poll.register(sock, select.POLLIN)
            waiting[sock.fileno()] = sock
        while len(os.listdir(f"/proc/{pids[1]}/task")) < CROWD:
            time.sleep(0.005)
        self.put("crowd connected", time.monotonic() - begun)
        time.sleep(0.5)
        self.put("crowd memory", pss(*pids) - before)
        begun = time.monotonic()
        call(self.main.base, "/local/say", client="dave", **{"from": "小灰"}, content="now")
        while waiting:
            for number, _ in poll.poll(10_000):
                assert b'"content":"now"' in waiting[number].recv(65_536)
                poll.unregister(number)
                waiting.pop(number).close()
        self.put("crowd answered", time.monotonic() - begun)
        time.sleep(4.0)
        self.put("crowd kept", pss(*pids) - before)

    def lists(self):
        for name, port, path in (
                ("groups", self.large, "get_group_info"),
                ("search", self.wide, "search_group?name=" + urllib.parse.quote("群499"))):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

            def get():
                connection.request("GET", "/openqq/" + path)
                assert connection.getresponse().read()[:2] == b"[{"
            get()
            self.put(name, sorted(lasts(get) for _ in range(21))[10] * 1000)

    def clients(self, name, count):
        program = self.program(name, "controller", "--max-clients", "300")
        begun, before = time.monotonic(), busy(program.pid)
        for number in range(count):
            program.call("start_client", client=f"c{number}", **self.NEEDED)
        self.await_running(program, count)
        self.put(f"clients {count}", time.monotonic() - begun)
        pids = [row["pid"] for row in program.call("check_client")["client"]]
        self.put(f"clients cpu {count}", (busy(program.pid, *pids) - before) / count * 1000)
        if count == 100:
            time.sleep(12.0)  # until threads that linger have left
            before, begun = busy(program.pid, *pids), time.monotonic()
            time.sleep(5.0)
            self.put("idle", (busy(program.pid, *pids) - before) / 5 * 100)
            self.put("threads", max(len(os.listdir(f"/proc/{pid}/task")) for pid in pids))
            self.put("pss", pss(*pids) / count)
        program.stop()

    def starts(self):
        def begin(typed):
            program = self.program(f"start{self.round}{typed}", "controller", typed=typed)
            assert program.call("/healthz")["code"] == 0
        for name, typed in (("start", True), ("start pyc", False)):
            self.put(name, lasts(lambda: begin(typed)) * 1000)
            self.programs[-1].stop()

    def report(self):
        """The table for the README."""
        g = self.get
        rows = [
            ("client server, get_friend_info with 5 friends, 32 callers",
             f"{g('client'):,.0f}/s, p99 {g('client p99'):.1f} ms; wrk {g('client wrk'):,.0f}/s",
             f"N {g('N'):,.0f}/s", g("client") / g("N"), "5 (7), p99 ≤ 15 ms"),
            ("through the controller, 32 callers",
             f"{g('controller'):,.0f}/s, p99 {g('controller p99'):.1f} ms; "
             f"wrk {g('controller wrk'):,.0f}/s",
             f"NP {g('NP'):,.0f}/s", g("controller") / g("NP"), "5 (8), p99 ≤ 15 ms"),
            ("the same, one caller", f"{g('controller one'):,.0f}/s",
             f"NP {g('NP one'):,.0f}/s", g("controller one") / g("NP one"), "5 (9)"),
            ("client server, a new connection each time, 32 callers",
             f"{g('client fresh'):,.0f}/s", f"N {g('N'):,.0f}/s", g("client fresh") / g("N"), "4"),
            ("through the controller, a new connection each time",
             f"{g('controller fresh'):,.0f}/s", f"NP {g('NP'):,.0f}/s",
             g("controller fresh") / g("NP"), "4"),
            ("send_friend_message through the controller, 16 callers, until all are seen in the "
             "receiver's check_event", f"{g('sends'):,.0f}/s", "", 0, "3,000/s (6,000/s)"),
            ("message in → post_api called", f"{g('post'):.2f} ms, {g('posts'):,.0f}/s", "", 0,
             "≤ 3 ms, 1,000/s"),
            (f"the same with {QUEUED:,} events waiting", f"{g('post queued'):.2f} ms, "
             f"{g('posts queued'):,.0f}/s", "", 0, "≤ 3 ms, 1,000/s"),
            (f"{CROWD:,} callers waiting in check_event through the controller",
             f"connected in {g('crowd connected'):.2f} s, answered in "
             f"{g('crowd answered'):.2f} s; {g('crowd memory'):.0f} MiB more, "
             f"{g('crowd kept'):.0f} after 4 s", "", 0,
             "≤ 1 s, ≤ 0.4 s; ≤ 100 MiB, given back"),
            ("client process, 100 running", f"{g('pss'):.1f} MiB PSS, {g('threads')} threads", "",
             0, "≤ 9 MiB (7), ≤ 8"),
            ("100 clients from nothing to running", f"{g('clients 100'):.1f} s; CPU per client at "
             f"10, 100, 300: {g('clients cpu 10'):.0f}, {g('clients cpu 100'):.0f}, "
             f"{g('clients cpu 300'):.0f} ms", "", 0, "≤ 5 s (2.5 s), the same"),
            ("controller and 100 idle clients", f"{g('idle'):.2f} % of a core", "", 0, "≤ 0.3 %"),
            ("`python openqq.py controller` until it answers", f"{g('start'):.0f} ms "
             f"({g('start pyc'):.0f} ms of it after compiling the script)", "", 0, "≤ 200 ms"),
            ("get_group_info with 2,000 members", f"{g('groups'):.1f} ms", "", 0, "≤ 10 ms"),
            ("search_group among 500 groups", f"{g('search'):.2f} ms", "", 0, "≤ 1 ms")]
        lines = [machine(self.rounds), "", "| what | measured | reference | ratio | goal |",
                 "|---|---|---|---|---|"]
        return "\n".join(lines + [
            f"| {what} | {measured} | {reference} | {f'{ratio:.1f}' if ratio else ''} | {goal} |"
            for what, measured, reference, ratio, goal in rows])


def machine(rounds):
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = (re.findall(r"model name\s*: (.*)", file.read()) or [model])[0]
    return (f"`python .ci/bench.py`, medians of {rounds}, {time.strftime('%Y-%m-%d')}: "
            f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, "
            f"{platform.system()} {platform.release()}.")


def bench(words):
    """Print the table; each figure goes to stderr as it comes."""
    bench = Benchmark(tempfile.mkdtemp(prefix="openqq-bench-"), 1 if "--quick" in words else ROUNDS)
    try:
        bench.run()
        print(bench.report())
    finally:
        shutil.rmtree(bench.tmpdir, ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("load", "watch", "naive"):
        result = {"load": load, "watch": watch, "naive": naive}[sys.argv[1]](
            **json.loads(sys.argv[2]))
        print(json.dumps(result))
    elif sys.argv[1:] in ([], ["--quick"]):
        bench(sys.argv[1:])
    else:
        sys.exit("usage: python .ci/bench.py [--quick]")
