#!/usr/bin/env python3
"""OpenQQ: many QQ accounts behind one small HTTP API, in one file, with nothing but Python.

    python openqq.py controller               many accounts, API on port 4000
    python openqq.py client --account NAME    one account alone, API on port 5000
    python openqq.py --help                   status, start, send …: commands that call the API

The API is that of Mojo-Webqq and its controller. As a library: openqq.Controller and openqq.Client.

Map of this file (a section uses only what stands above it):
     0  map, version, limits
     1  errors
     P  platform: what systems do differently
     2  tools: names, JSON, log, threads, timers
     3  settings
     4  flavours
     5  model: what an account knows
     6  files
     7  HTTP in
     8  HTTP out
     A  QR encoder
     B  pages
     C  OpenAPI
     9  events
    10  local network
    11  links
    12  client
    13  plugins
    14  controller
    15  command line

Threads: each account (Client) and each controller has one RLock; a comment beside it lists what it
guards. The threads of HTTP connections, the sender, the link's reader, the posters, and the one
thread for timers and signals take the lock, change state, release it, and do their I/O without it.
While a thread holds the lock it takes no other lock, waits for nothing, and does no network or
process I/O; it only writes files that must be there before the next step. The local network has
such a lock too. The reaper ends what takes too long. All threads of a process use one CPU
(share_cpu tells why).

Docstrings say where a behaviour comes from: 000 to 004 are the documents of the Perl programs (000,
002 the controller of Mojo-Webqq, 003, 004 its single account, 001 the controller of Mojo-Weixin),
CONTRACT joins them with what was measured on the wire, DESIGN is how this program is built.
"""
from __future__ import annotations

import base64
import bisect
import collections
import contextlib
import email.utils
import errno
import functools
import heapq
import hmac
import http.client
import itertools
import json
import logging
import math
import mimetypes
import operator
import os
import queue
import re
import selectors
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
import zlib
from concurrent.futures import Future, InvalidStateError, TimeoutError as FutureTimeout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import resource

# ------------------------------------------------------------------------------------------------
# 0. Map, version, limits
# ------------------------------------------------------------------------------------------------

VERSION = "1.0.0"

TYPE_CHECKING = False  # so that no process pays for the import of typing
if TYPE_CHECKING:
    from typing import (IO, Any, Callable, Container, Deque, Dict, Iterable, Iterator, List,
                        Mapping, NoReturn, Optional, Sequence, Set, Tuple, Type, Union)
    Json = Any                   # what the json module reads and writes
    Row = Dict[str, Any]         # a JSON object
    Fields = Dict[str, str]      # header fields, the names in lower case
    Params = Dict[str, str]      # the parameters of a call
    Wait = Callable[[Future[Any], float], Any]  # Request.wait
    Code = Union[str, bytes]     # a QR code: its text, or the picture that somebody else drew

# Limits of a request (RFC 9112). Without a limit for each part a caller could fill the memory, and
# without a total deadline it could hold a thread for ever by sending a byte now and then.
LINE_LIMIT = 8 * 1024            # request line; 414 beyond it
FIELD_LIMIT = 100                # header fields; 431
HEAD_LIMIT = 32 * 1024           # all header fields together; 431
BODY_LIMIT = 8 * 1024 * 1024     # body; 413
PARAM_LIMIT = 1_000              # parameters of a query or a form; 400
HEAD_SECONDS = 10.0              # from a head's first byte to its last
BODY_SECONDS = 30.0
IDLE_SECONDS = 60.0              # between two requests of a connection
WRITE_SECONDS = 30.0
REASON_LIMIT = 8                 # different refusals (403) of each rule that the log shows

SETTING_LIMIT = 4_096            # of a setting, or a property on the local network
CONTENT_LIMIT = 64 * 1024        # bytes of a message's text; QQ itself takes far less
MEDIA_LIMIT = 5 * 1024 * 1024    # bytes of a picture: in base64 it still fits into a body
BATCH_LIMIT = 1024 * 1024        # bytes that are handed on at once; a larger one goes alone
ANSWER_LIMIT = 8 * 1024 * 1024   # bytes of an answer of post_api, which may hold a picture
PROXY_SECONDS = 120.0            # without a byte from a client (CONTRACT 2)
EVENT_SECONDS = 30.0             # check_event's wait (000)
STREAM_SECONDS = 15.0            # of silence before a stream of events sends a sign of life
STREAM_LIMIT = 1_000             # events that a reader of a stream may be behind
STREAM_BYTES = 16 * 1024 * 1024  # and their size

POST_SECONDS = 30.0              # one try at post_api (DESIGN, "Nothing is lost")
POST_QUEUE_LIMIT = 10_000
POST_LANES = 4                   # conversations posted at once
POST_TRIES = 5                   # of an event that was sent, and not taken
POST_DAY = 86_400.0              # how long a receiver may be away
ECHO_SECONDS = 1.0               # how long a send waits for an answer that comes at once
READ_SECONDS = 0.1               # for callers to get their last answers before the process ends
SEND_SECONDS = 50.0              # how long a caller waits for a send; nginx waits 60
STOP_SECONDS = 3.0               # what stop_client promises, and time for the queue at a stop
KILL_SECONDS = 10.0              # between TERM and KILL
REPLACE_SECONDS = 10.0           # before a file that another program had open is written again
ORPHAN_SECONDS = 5.0             # within which a client ends when its controller is gone
START_TRIES = 7                  # starts without reaching running
TRIAL_SECONDS = 10.0             # a client that lives so long has accepted its new settings
SEEN_BYTES = 8 * 1024 * 1024     # of the newest messages, WAIT_LIMIT at most, for get_message
MEMORY_LIMIT = 1_000             # stopped clients whose settings are remembered

BRIDGE_LIMIT = 16 * 1024 * 1024  # bytes of one message of a OneBot bridge
BRIDGE_SECONDS = 30.0            # for an answer of it; silence before a sign of life is asked for
LOOKUP_SECONDS = 5.0             # how long a conversation waits for names that are looked up
LIST_SECONDS = 60.0              # for a list: NapCat asks for each friend's details in that call
DOUBT_SECONDS = 60.0             # how long a list that lost many must stay the same to be believed
REPEAT_SECONDS = 10.0            # within which a second notice of an entry is a repetition
LOGIN_SECONDS = 2.0              # between two looks at whether a bridge is logged in
DETAIL_SECONDS = 10.0            # get_group_info waits so long for members

TICKET_SECONDS = 120.0           # a login's QR code
COOKIE_SECONDS = 3 * 86_400.0
WAIT_LIMIT = 1_000               # messages that wait for one account on the local network
WAIT_BYTES = 64 * 1024 * 1024    # and their size, pictures included
POST_BYTES = 256 * 1024 * 1024   # of pictures in events that wait to be posted


# ------------------------------------------------------------------------------------------------
# 1. Errors
# ------------------------------------------------------------------------------------------------

class OpenQQError(Exception):
    """An error that is an answer: `code` and `status` as in CONTRACT 1, `http` of the status line,
    `extra` further members of the JSON. Errors that the original knows answer with HTTP 200."""
    code, status, http = 1, "failure", 200

    def __init__(self, status: Optional[str] = None, **extra: Any) -> None:
        super().__init__(status or self.status)
        self.status, self.extra = status or self.status, extra

    def answer(self) -> Row:
        """The JSON object that a caller gets."""
        return dict(self.extra, code=self.code, status=self.status)


def answering(code: int, status: str = OpenQQError.status, http: int = 200) -> Type[OpenQQError]:
    """A class of errors that differ in nothing but their answer."""
    return type("OpenQQError", (OpenQQError,), {"code": code, "status": status, "http": http})


AuthFailure = answering(-6, "auth failure", 403)  # the caller may not (DESIGN, "Who may call")
ApiNotFound = answering(-1, "api not found", 403)  # no such path, or not with this method
ClientMissing = answering(1, "client not found")  # the controller was given no `client` it knows
NoPort = answering(2, "no available port")        # nothing is free above backend_start_port
StartFailure = answering(3)                       # start_client: no process came of it
ClientDied = answering(4, "client pid not ok")    # … or died at once, or no template compiles
TooManyClients = answering(5, "max clients exceed")   # max_clients are alive
NotAllowed = answering(6, "not allowed", 400)     # a value that callers may not give
NotFound = answering(8, "not found", 404)         # /local/*: nothing of that name
QueueFull = answering(9, "send queue full", 503)  # one more message would be sent far too late
Declined = answering(201)                         # a bridge understood, and refused
NotRunning = answering(300, "client not running", 503)  # the call needs the state running
NoRoom = answering(507, "no room on the disk", 507)     # a file cannot be written
Hangup = answering(1)                             # the caller is gone: there is nobody to answer


class Unreachable(OpenQQError):
    """No connection, or one that broke before an answer was complete; `sent`: a part of the
    request may have been acted upon."""
    code, status, http = 7, "client not reachable", 502

    def __init__(self, status: Optional[str] = None, sent: bool = False) -> None:
        super().__init__(status)
        self.sent = sent


class TooSlow(Unreachable):
    """The other side took longer than it was given."""
    http = 504


class BadRequest(OpenQQError):
    """No valid request, or one that is not accepted; code and http are the same number."""

    def __init__(self, http: int, status: str) -> None:
        super().__init__(status)
        self.code = self.http = http


class Answer(OpenQQError):
    """A documented answer that ends a call; `row` has its members."""

    def __init__(self, row: Row) -> None:
        super().__init__(**row)
        self.code = row["code"]


class Refusal(OpenQQError):
    """Why the program does not start; the text says what to do. `exit` is the exit status."""

    def __init__(self, status: str, exit_status: int = 1) -> None:
        super().__init__(status)
        self.exit = exit_status


# ------------------------------------------------------------------------------------------------
# P. Platform: what systems do differently
# ------------------------------------------------------------------------------------------------

SYSTEM = {"win32": "MSWin32"}.get(sys.platform, sys.platform)  # as Perl calls it (000)
# The signals that ask a process to end, as far as the system has them; a second one makes it hurry.
# Service wrappers on Windows send BREAK.
END_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK")
               if hasattr(signal, name)]
# How many sockets a selector can watch: Windows has only select(), with a limit of 512.
MOST_WATCHED = 480 if sys.platform == "win32" else 1_000_000
SHARE_SIZE = 628                 # largest result of socket.share() on Windows, in bytes

# The variables that a client gets from the controller's environment; others could change a client.
# Without the second half Windows has no sockets, no temporary directory and no home.
KEPT_ENVIRONMENT = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|TERM|VIRTUAL_ENV|LD_LIBRARY_PATH|"
    r"SSL_CERT_(FILE|DIR)|PYTHONDONTWRITEBYTECODE|(https?|no|all)_proxy|(HTTPS?|NO|ALL)_PROXY|"
    r"SYSTEM(ROOT|DRIVE)|WINDIR|COMSPEC|PATHEXT|TE?MP|USER(NAME|PROFILE)|HOME(DRIVE|PATH)|"
    r"(LOCAL)?APPDATA|PROGRAMDATA")


def kernel32() -> Any:
    """The functions of Windows that Python has no names for."""
    import ctypes
    return getattr(ctypes, "WinDLL")("kernel32", use_last_error=True)


def patiently(function: Callable[..., Any], *args: Any,
              tries: int = 20 if sys.platform == "win32" else 1) -> Any:
    """What function(*args) returns, tried again for half a second: on Windows a file can be
    neither replaced nor opened while somebody else, a virus scanner say, has it open."""
    for _ in range(tries - 1):
        with contextlib.suppress(PermissionError):
            return function(*args)
        time.sleep(0.025)  # nothing tells when that is over
    return function(*args)


def is_held(error: OSError) -> bool:
    """Whether a file could not be replaced because another program has it open (Windows)."""
    return sys.platform == "win32" and isinstance(error, PermissionError)


def is_own_file(found: os.stat_result) -> bool:
    """Whether it is a regular file of ours (or root's) with one name; Windows has owner 0 only."""
    owner = getattr(os, "geteuid", int)()
    return stat.S_ISREG(found.st_mode) and found.st_uid in (0, owner) and found.st_nlink == 1


def own_opener(path: str, flags: int) -> int:
    """open()'s opener for directories where others may write, as /tmp. A new file gets mode 0600;
    OSError for a symlink, a FIFO, a device, a second link or another user's file."""
    for name in "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC":  # the second: no FIFO is waited for
        flags |= getattr(os, name, 0)
    handle: int = patiently(os.open, path, flags, 0o600)
    if is_own_file(os.fstat(handle)):
        return handle
    os.close(handle)
    raise OSError(errno.EPERM, "not a plain file of this user", path)


def lock_file(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; False if another process has."""
    try:
        if sys.platform == "win32":  # nobody else can read a locked byte: one far behind the end
            os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.lseek(file.fileno(), 0, os.SEEK_SET)


class PidFile:
    """A pid file, which is also a lock that ends with its process."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: Optional[IO[str]] = None

    def take(self, who: str) -> None:
        """Write our pid; Refusal, naming the holder, when another process has it."""
        while self._file is None:
            try:
                file = open(self.path, "r+", encoding="utf-8", errors="replace",
                            opener=lambda path, flags: own_opener(path, flags | os.O_CREAT))
            except OSError as error:
                raise Refusal(f"{who} cannot write its pid file {self.path}: {error.strerror}; "
                              "remove it, or give another --tmpdir") from None
            if not lock_file(file):
                with file:
                    raise Refusal(f"{who} is running already, with pid "
                                  f"{file.read(20).strip() or 'unknown'}; {self.path} says so")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.lstat(self.path)):
                    self._file = file
            if self._file is None:  # removed by its holder between our open and our lock
                file.close()
        self._file.truncate()
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def await_end(self) -> None:
        """Return when no living process has it."""
        with contextlib.suppress(OSError):  # there is none
            with open(self.path, opener=own_opener) as file:
                if sys.platform == "win32":
                    while not lock_file(file):
                        time.sleep(0.05)  # the system waits for no lock longer than ten seconds
                else:
                    fcntl.flock(file, fcntl.LOCK_SH)

    def drop(self) -> None:
        """Remove the file; harmless if it was never taken."""
        if self._file is not None:
            if sys.platform == "win32":
                self._file.close()    # it removes no open file
            with contextlib.suppress(OSError):
                os.unlink(self.path)  # before the lock ends: else somebody could have it by then
            self._file.close()
            self._file = None


def start_process(spawn_process: Callable[..., Any], title: str, words: Sequence[str],
                  environment: Mapping[str, str], **sockets: socket.socket) -> Any:
    """Start a Python process that ps shows as `title`, and that signals of the terminal do not
    reach. After receive_sockets() it finds the sockets' numbers in its environment. OSError,
    ValueError."""
    import subprocess
    python = os.environ.get("OPENQQ_PYTHON", sys.executable)
    argv = [os.path.join(os.path.dirname(python), title), "-S", *words]
    env = {**environment, "OPENQQ_PYTHON": python}
    if sys.platform != "win32":
        env.update((name, str(sock.fileno())) for name, sock in sockets.items())
        return spawn_process(
            argv, executable=python, stdin=subprocess.DEVNULL, start_new_session=True, env=env,
            pass_fds=[sock.fileno() for sock in sockets.values()])
    # There the python.exe of a virtual environment only starts another one, whose pid we need. No
    # socket is handed on with a start: a copy for the process is told through its standard input.
    process = spawn_process(
        argv, executable=getattr(sys, "_base_executable", python), stdin=subprocess.PIPE,
        stdout=None if sys.stdout else subprocess.DEVNULL,
        stderr=None if sys.stderr else subprocess.DEVNULL,
        creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,
        env={**env, "OPENQQ_SOCKETS": ",".join(sockets), "__PYVENV_LAUNCHER__": python})
    try:
        with process.stdin as pipe:
            for sock in sockets.values():
                pipe.write(sock.share(process.pid).ljust(SHARE_SIZE, b"\0"))
    except OSError:
        process.kill()
        raise
    return process


def receive_sockets() -> None:
    """Take the sockets that start_process() hands on."""
    if sys.platform == "win32":
        for name in os.environ.pop("OPENQQ_SOCKETS", "").split(","):
            data = sys.stdin.buffer.read(SHARE_SIZE)
            os.environ[name] = str(socket.fromshare(data).detach())


def tell_to_end(process: Any, life: socket.socket) -> None:
    """Ask a process of ours to end: by TERM, on Windows by closing the connection to it."""
    if sys.platform == "win32":
        with contextlib.suppress(OSError):
            life.shutdown(socket.SHUT_WR)
    else:
        process.terminate()


def begin_again(title: str, words: Sequence[str], **environment: str) -> None:
    """Run this file again as `title`, with secrets in the environment, where other users cannot see
    them. On Windows, where they cannot see a command line either, it returns."""
    if sys.platform != "win32":
        spelt: Dict[str, Any] = {name: value.encode("utf-8", "surrogateescape")
                                 for name, value in environment.items()}
        os.execve(sys.executable, [word.encode("utf-8", "surrogateescape")
                                   for word in (title, *words)], {**os.environ, **spelt})


CONSOLE_HANDLERS: List[Any] = []  # what Windows calls must not be garbage-collected


def on_closed_console(act: Callable[[], None]) -> None:
    """Have act() called when the console window is closed, or its user logs off: Windows ends the
    process when the handler returns, and after five seconds in any case."""
    if sys.platform == "win32":
        import ctypes

        def handle(event: int) -> bool:
            if event < 2:
                return False  # Ctrl-C and Ctrl-Break come as signals
            act()
            time.sleep(2 * ORPHAN_SECONDS)  # until other threads have ended the process
            return True

        CONSOLE_HANDLERS.append(ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(handle))
        kernel32().SetConsoleCtrlHandler(CONSOLE_HANDLERS[-1], True)


def take_no_signals() -> None:
    """Leave the signals of the process to its other threads."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def interrupt_reading(sock: socket.socket) -> None:
    """End a recv() in another thread, where shutdown() does not."""
    if sys.platform == "win32":
        import ctypes
        kernel32().CancelIoEx(ctypes.c_void_p(sock.fileno()), None)


def keep_alive(sock: socket.socket) -> None:
    """Notice within minutes that the other machine is gone, though nothing is sent."""
    if sys.platform == "win32":
        sock.ioctl(socket.SIO_KEEPALIVE_VALS, (1, 60_000, 10_000))
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle = getattr(socket, "TCP_KEEPIDLE", 0x10)  # macOS calls it TCP_KEEPALIVE
        sock.setsockopt(socket.IPPROTO_TCP, idle, 60)


def socket_pair() -> Tuple[socket.socket, socket.socket]:
    """Two connected sockets. Python before 3.12 on Windows does not check whether another program
    on this machine connected in between; this does."""
    while True:
        ours, theirs = socket.socketpair()
        if sys.platform != "win32" or (ours.getsockname() == theirs.getpeername()
                                       and theirs.getsockname() == ours.getpeername()):
            return ours, theirs
        ours.close()
        theirs.close()


def room_for_connections() -> int:
    """How many connections there may be at once, if each causes another one, within the limit of
    open files (Windows has none for sockets); a quarter is left for files and clients."""
    wanted = 65_536
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        infinity = resource.RLIM_INFINITY
        for most in wanted, 10_240:  # macOS has another limit below the one that it tells
            most = most if hard == infinity else min(most, hard)
            if soft != infinity and soft < most:
                with contextlib.suppress(OSError, ValueError):
                    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
                    soft = most
        if soft != infinity:
            return max(1, soft * 3 // 8)
    return wanted


CPUS: List[int] = []  # those that share_cpu() chooses from
if hasattr(os, "sched_getaffinity") and getattr(sys, "_is_gil_enabled", lambda: True)():
    with contextlib.suppress(OSError):  # the system need not tell us
        CPUS = sorted(os.sched_getaffinity(0))


def share_cpu(number: int, pid: int = 0) -> None:
    """Let a process that has no threads yet use only one of the CPUS. With the GIL its threads run
    one at a time anyway, and waking them on another CPU took most of the time (measured)."""
    if len(CPUS) > 1:
        with contextlib.suppress(OSError):  # it has just ended, or the system does not let us
            getattr(os, "sched_setaffinity")(pid, [CPUS[number % len(CPUS)]])


def is_console(file: Any) -> bool:
    """Whether a standard stream is a terminal; Windows says so of its null device as well."""
    try:
        return bool(file.isatty()) and os.get_terminal_size(file.fileno()) is not None
    except (AttributeError, OSError, ValueError):
        return False  # there is none


def write_stderr(data: bytes) -> None:
    """Write UTF-8 in one piece, also to a console of Windows, which a descriptor would not."""
    buffer: Any = sys.stderr.buffer
    getattr(buffer, "raw", buffer).write(data)  # it has none with PYTHONUNBUFFERED


def prepare_console() -> None:
    """On Windows let output be UTF-8 whatever the code page, and the console understand colours."""
    if sys.platform == "win32":
        import ctypes
        for stream in sys.stdout, sys.stderr:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            if is_console(stream):
                handle = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno()))
                if kernel32().SetConsoleMode(handle, 7):  # … virtual terminal processing
                    os.environ.setdefault("TERM", "xterm")


def has_own_window() -> bool:
    """Whether this file was double-clicked, so that the console window closes when we end."""
    if sys.platform == "win32":
        import ctypes
        count: int = kernel32().GetConsoleProcessList((ctypes.c_uint * 8)(), 8)
        return 0 < count <= 2  # we, and py.exe perhaps
    return False


# ------------------------------------------------------------------------------------------------
# 2. Tools: names, JSON, log, threads, timers
# ------------------------------------------------------------------------------------------------

NAME = re.compile(r"(?!\.)[A-Za-z0-9_.@\-\u3400-\u4dbf\u4e00-\u9fff]{1,64}")  # of an account
FORBIDDEN = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?|.*\.", re.I)  # by Windows
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
ID_KEY = re.compile(r"(?:.*_)?u?id|reply_to")
encode_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def no_number(name: str) -> None:
    """ValueError: NaN and Infinity are no JSON (RFC 8259)."""
    raise ValueError(f"{name} is no JSON")


decode_params = json.JSONDecoder(parse_float=str, parse_constant=no_number).decode


def to_bytes(value: Json) -> bytes:
    """JSON as every answer has it: sorted keys, no blanks, UTF-8 (CONTRACT 1). A lone surrogate,
    which JSON text can spell and UTF-8 cannot, becomes a question mark."""
    return encode_json(value).encode("utf-8", "replace")


def from_bytes(data: bytes) -> Json:
    """Parse JSON; ValueError, also for nesting that is too deep."""
    try:
        return json.loads(data.decode("utf-8-sig").strip())
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def object_in(data: bytes) -> Optional[Row]:
    """The JSON object in bytes; None if they hold anything else."""
    try:
        value = from_bytes(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_text(data: bytes, charset: str = "") -> str:
    """Decode text as UTF-8, else as GB18030, which Chinese consoles and old scripts write; with a
    `charset` in the other order, or as UTF-8 only. ValueError."""
    encodings = ["utf-8", "gb18030"]
    if charset.lower() in ("gb18030", "gbk", "gb2312", "cp936", "x-gbk"):
        encodings.reverse()
    elif charset.lower() not in ("", "utf-8", "utf8", "us-ascii", "ascii"):
        encodings.pop()
    for encoding in encodings:
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    raise ValueError("neither UTF-8 nor GB18030" if encodings[1:] else
                     f"in {charset}: write UTF-8 or GB18030")


def typed_text(word: str) -> str:
    """A word of the command line or environment; bytes that are not UTF-8 (PEP 383) are read as
    GB18030. ValueError."""
    return read_text(os.fsencode(word)) if re.search("[\ud800-\udfff]", word) else word


def check_name(name: str) -> str:
    """The name of an account, if it can be part of a file name on all systems; else NotAllowed."""
    if not NAME.fullmatch(name) or FORBIDDEN.fullmatch(name):
        raise NotAllowed("client name not allowed")
    return name


def new_secret() -> str:
    """A random text that nobody can guess: 32 hex digits."""
    return os.urandom(16).hex()


class MessageIds:
    """Ids for messages that the network gives none: each one higher than the last, the first from
    the clock, between 2^30 and 2^31, since clients in typed languages keep them in 31 bits."""
    LEAST = 2 ** 30

    def __init__(self, clock: Callable[[], float] = time.time,
                 taken: Callable[[int], bool] = lambda number: False) -> None:
        self._last, self._taken = self.LEAST + int(clock()) % 100_000 * 10_000, taken

    def next(self) -> int:
        """The next id that is not taken; after the highest comes the lowest."""
        while True:
            self._last = self.LEAST + (self._last - self.LEAST) % (self.LEAST - 1) + 1
            if not self._taken(self._last):
                return self._last


def numbered(value: Json) -> Json:
    """A copy with ids, uids and a message's time as numbers where they are digits (CONTRACT 1)."""
    if isinstance(value, list):
        return [numbered(item) for item in value]
    if isinstance(value, dict):
        return {key: int(item) if isinstance(item, str) and re.fullmatch("-?[0-9]+", item)
                and (key == "time" or ID_KEY.fullmatch(key)) else numbered(item)
                for key, item in value.items()}
    return value


def backoff(tries: int, most: float = 60.0) -> float:
    """Seconds to wait after so many tries in vain: 0, 1, 2, 4 …, `most` at most."""
    return 0.0 if tries < 1 else min(most, 2.0 ** min(tries - 1, 20))


def is_news(count: int) -> bool:
    """Whether to log what happens again and again: the 1st time, the 2nd, 4th, 8th …"""
    return count & (count - 1) == 0


def keep_newest(table: Dict[Any, Any], limit: int) -> None:
    """Remove the oldest entries of a dict, until it holds no more than `limit`."""
    while len(table) > limit:
        del table[next(iter(table))]


def python_words(*words: str) -> List[str]:
    """The words after `python` that run this file again, as a module: a script is compiled anew."""
    directory, name = os.path.split(os.path.abspath(__file__))
    module = name[:-3] if name.endswith(".py") else ""
    if not module.isidentifier():
        return ["-X", "utf8", os.path.join(directory, name), *words]
    # It replaces the current directory in sys.path, where others may have put modules; Python's
    # embeddable package for Windows does not have that there.
    code = (f"import sys; sys.path[:sys.path[0] == ''] = [{directory!r}]; import {module}; "
            f"{module}.command_line()")
    return ["-X", "utf8", "-c", code, *words]


def add_site_packages() -> None:
    """Let what is installed be imported: a controller's clients start without it (-S)."""
    if sys.flags.no_site and "site" not in sys.modules:
        import site
        site.main()


LEVELS = {"debug": 10, "info": 20, "msg": 25, "warn": 30, "error": 40, "fatal": 50}
COLORS = {10: "34", 25: "32", 30: "33", 40: "31", 50: "35"}


class LogHandler(logging.Handler):
    """Writes to a log file, which is opened again when it was moved away, never through a symlink;
    without a path to stderr. A record is one write, so that lines stay whole (form: CONTRACT 9).
    The WatchedFileHandler of logging.handlers would cost each client 0.5 MiB."""

    def __init__(self, path: str, encoding: str, head: str, colored: bool, level: int) -> None:
        super().__init__(level)
        self._path, self._encoding, self._head, self._colored = path, encoding, head, colored
        self._file: Any = open(path, "ab", 0, opener=own_opener) if path else None

    def format(self, record: logging.LogRecord) -> str:
        """Put `HEAD[yy/mm/dd HH:MM:SS] [level] ` before each line; escape control characters."""
        title, who = getattr(record, "message_of", ("", ""))
        level = next(name for name, number in LEVELS.items() if number >= record.levelno)
        when = time.strftime("%y/%m/%d %H:%M:%S", time.localtime(record.created))
        prefix = f"{self._head}[{when}] [{title or level}] {who}"
        text = CONTROLS.sub(lambda found: repr(found.group())[1:-1], record.getMessage())
        lines = "\n".join(prefix + line for line in text.split("\n"))
        color = COLORS.get(record.levelno) if self._colored else None
        return f"\x1b[{color}m{lines}\x1b[0m\n" if color else lines + "\n"

    def emit(self, record: logging.LogRecord) -> None:
        """A full disk or a closed stderr must not stop the program."""
        data = self.format(record).encode(self._encoding, "replace")
        with contextlib.suppress(AttributeError, OSError, ValueError):
            if self._file is None:
                return write_stderr(data)
            try:
                stays = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
            except (OSError, ValueError):
                stays = False
            if not stays:
                self._file.close()
                self._file = open(self._path, "ab", 0, opener=own_opener)
            self._file.write(data)


class Log(logging.Logger):
    """The log of a controller or client, with the levels of the documents (CONTRACT 9). `keep` gets
    the text of each warning or error, even if the level hides it."""
    warn = logging.Logger.warning  # as the documents call it; logging has deprecated the name

    def __init__(self, head: str = "", level: str = "info", path: Optional[str] = None,
                 encoding: str = "utf-8", console: bool = True, colored: bool = False) -> None:
        super().__init__("openqq", min(LEVELS[level], logging.WARNING))
        self.keep: Callable[[str], None] = lambda text: None
        if path:
            self.addHandler(LogHandler(path, encoding, head, False, LEVELS[level]))
        if console or not path:
            self.addHandler(LogHandler("", encoding, head, colored, LEVELS[level]))

    def handle(self, record: logging.LogRecord) -> None:
        """Write a record."""
        super().handle(record)
        if record.levelno >= logging.WARNING:
            self.keep(record.getMessage())

    def msg(self, title: str, who: str, text: str) -> None:
        """Log a chat message: its title takes the place of the level (CONTRACT 9)."""
        self.log(LEVELS["msg"], text, extra={"message_of": (title, who)})

    def failure(self, doing: str) -> None:
        """Log the exception being handled, with its traceback: a fault of this program."""
        self.error(f"{doing} failed, which is a fault of this program:\n"
                   + traceback.format_exc().rstrip())


def spawn(function: Callable[..., None], *args: Any, name: str = "openqq") -> threading.Thread:
    """Start a thread that does not keep the process alive."""
    thread = threading.Thread(target=function, args=args, name=name, daemon=True)
    thread.start()
    return thread


def settle(future: Future[Any], value: Any) -> None:
    """Set a future's result, or its exception, unless it is done already."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(value, Exception):
            future.set_exception(value)
        else:
            future.set_result(value)


def result_of(future: Future[Any], seconds: float) -> Any:
    """The result of a future; the built-in TimeoutError, which until 3.10 futures do not raise."""
    try:
        return future.result(seconds)
    except FutureTimeout:
        raise TimeoutError(f"nothing came within {seconds} s") from None


class ThreadPool:
    """At most `size` threads; one that is idle for `linger` seconds ends. The threads of
    concurrent.futures never end, and the process waits for their jobs when it ends."""

    def __init__(self, size: int, name: str, log: Log, linger: float = 10.0) -> None:
        self.size, self.name, self.log, self.linger = size, name, log, linger
        self._lock = threading.Lock()  # guards _free, _threads
        self._jobs: Any = queue.SimpleQueue()
        self._free = self._threads = 0  # _free: idle threads, less the jobs that wait

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Have function(*args) run by one of the threads, in the order of the calls."""
        with self._lock:
            self._free -= 1
            grow = self._free < 0 and self._threads < self.size
            self._threads += grow
        self._jobs.put((function, args))
        if grow:
            try:
                spawn(self._work, name=self.name)
            except RuntimeError as error:  # the job waits for another thread, or the next submit()
                with self._lock:
                    self._threads -= 1
                self.log.warn(f"no thread for {self.name}: {error}")

    def _work(self) -> None:
        with self._lock:
            self._free += 1
        while True:
            try:
                function, args = self._jobs.get(timeout=self.linger)
            except queue.Empty:
                with self._lock:
                    if self._free > 0:  # else a job is on its way to us
                        self._free -= 1
                        self._threads -= 1
                        return
                continue
            try:
                function(*args)
            except Exception:
                self.log.failure(f"a job of {self.name}")
            del function, args  # an idle thread must not keep their memory
            with self._lock:
                self._free += 1


class Timers:
    """One thread for timers, for signals, and for sockets that become readable. What it calls runs
    with the owner's `lock` held, so that a timer cancelled under the lock never runs. It must not
    block."""

    def __init__(self, lock: Any, log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        self.lock, self.log, self.clock = lock, log, clock
        # A heap of (when, count, [job]); the list is empty if it was cancelled. The lock guards it.
        self._calls: List[Tuple[float, int, List[Callable[[], Any]]]] = []
        self._count = itertools.count()
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket_pair()
        for sock in self._wake_reader, self._wake_writer:
            sock.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ,
                                lambda: self._wake_reader.recv(4096))
        self._ended = False
        self._signals: Dict[int, Any] = {}  # signals that are caught -> their former handlers
        self._caught: Deque[Callable[[], None]] = collections.deque()

    def later(self, seconds: float, function: Callable[..., Any], *args: Any) -> Callable[[], None]:
        """Have function(*args) called in `seconds`, with the lock held; returns what cancels it.
        From any thread."""
        job: List[Callable[[], Any]] = [functools.partial(function, *args)]
        with self.lock:
            heapq.heappush(self._calls, (self.clock() + seconds, next(self._count), job))
            is_first = self._calls[0][2] is job
        if is_first:
            self._wake()
        return job.clear

    def watch(self, sock: socket.socket, function: Callable[[], Any]) -> None:
        """Have function() called, with the lock held, whenever the socket can be read."""
        self._selector.register(sock, selectors.EVENT_READ, function)
        self._wake()  # some systems' selectors take no notice while they wait

    def unwatch(self, sock: socket.socket) -> None:
        """End a watch()."""
        self._selector.unregister(sock)

    def catch_signals(self, act: Callable[[int], None]) -> None:
        """Have act(number) called for END_SIGNALS, with the lock held, except for those that were
        ignored at the start (nohup). Only in the main thread, which has to call run()."""
        if threading.current_thread() is not threading.main_thread():
            return

        def catch(number: int, frame: Any = None) -> None:  # takes no lock: we may hold it
            self._caught.append(functools.partial(act, number))
            self._wake()

        # Without it a signal that comes just before the selector waits would be noticed much later.
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        for number in END_SIGNALS:
            former = signal.getsignal(number)
            if former is not signal.SIG_IGN:
                self._signals.setdefault(number, former)
                signal.signal(number, catch)
        on_closed_console(functools.partial(catch, END_SIGNALS[0]))

    def run(self) -> None:
        """Work until stop()."""
        while not self._ended:
            self.step()
        for number, former in self._signals.items():
            signal.set_wakeup_fd(-1)
            signal.signal(number, former)
        for closable in self._selector, self._wake_reader, self._wake_writer:
            closable.close()

    def step(self) -> None:
        """Wait until there is something to do, and do it."""
        with self.lock:
            wait = self._calls[0][0] - self.clock() if self._calls else POST_DAY
            wait = 0.0 if self._caught else min(POST_DAY, max(0.0, wait))  # epoll: 24 days
        ready = self._selector.select(wait)
        with self.lock:
            for key, _ in ready:
                with contextlib.suppress(KeyError, ValueError):  # it is watched no more, or closed
                    if self._selector.get_key(key.fileobj) == key:
                        self._call(key.data)
            while self._caught:
                self._call(self._caught.popleft())
            while self._calls and self._calls[0][0] <= self.clock():
                for job in heapq.heappop(self._calls)[2]:
                    self._call(job)

    def stop(self) -> None:
        """Let run() return after its present job. From any thread."""
        self._ended = True
        self._wake()

    def _call(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except Exception:
            self.log.failure("a timer")

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full, so it will wake; or closed
            self._wake_writer.send(b"!")


# ------------------------------------------------------------------------------------------------
# 3. Settings
# ------------------------------------------------------------------------------------------------

def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("must be 0 or 1")


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError("must be a whole number")
    return int(text)


def _port(text: str) -> int:
    if _whole(text) > 65_535:
        raise ValueError("must be a port, 0 to 65535")
    return int(text)


def _number(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError("must be a number of seconds")
    return float(text)


def _text(text: str) -> str:
    if re.search("[\ud800-\udfff\n]", text) or CONTROLS.search(text):
        raise ValueError("must not hold control characters, or half a character")
    return text


def _path(text: str) -> str:
    if not text:
        return text
    path = os.path.abspath(os.path.expanduser(_text(text)))
    with contextlib.suppress(OSError):  # there is nothing yet
        kind = os.stat(path).st_mode
        if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
            raise ValueError("must not be a device")  # root would replace it
    return path


def _words(text: str) -> List[str]:
    return [word for word in re.split(r"[\s,]+", _text(text)) if word]


def _hosts(text: str) -> List[str]:
    """Host names as browsers send them. No addresses: see Auth."""
    found = _words(text.lower())
    label = "[0-9a-z_](?:[0-9a-z_-]*[0-9a-z_])?"
    name = rf"(?=.{{1,253}}\Z)(?:{label}\.)*(?![0-9]+\Z|0x[0-9a-f]*\Z){label}"
    if not all([re.fullmatch(name, host) for host in found]):
        raise ValueError("must be host names such as bot.example.com, separated by commas, "
                         "without *, port or http://; other letters than a to z as xn--")
    return found


def _encoding(text: str) -> str:
    """A codec that can encode lines of any text: not idna, rot13, or one that writes a BOM."""
    with contextlib.suppress(LookupError, ValueError):
        if not text or ("[x] 1\n".encode(text) == b"[x] 1\n"
                        and "ä好😀\ud800\0".encode(text, "replace")):
            return text
    raise ValueError("must be an encoding of text that Python knows, such as utf-8 or gbk")


def _url(text: str, schemes: Sequence[str] = ("http", "https")) -> str:
    if not text:
        return text
    if re.search(r"\s", _text(text)):
        raise ValueError("must be one URL, without blanks")
    if re.search("[,;|](https?|wss?)://", text, re.I):
        raise ValueError("must be one URL, not several (a comma within one is spelt %2C)")
    try:
        parts = urllib.parse.urlsplit(text)
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from None
    if parts.scheme not in schemes or not parts.netloc:
        words = " or ".join(f"{scheme}://" for scheme in schemes)
        raise ValueError(f"must be an {words} URL")
    # User and password; a name, an IPv4 or an IPv6 address (with a zone: RFC 6874); a port.
    found = re.fullmatch(r"(?:[^@\\]*@)?(?:\[([0-9A-Fa-f:.]+)(?:%[\w.%~-]+)?\]|([\w.-]+))"
                         r"(?::([0-9]*))?", parts.netloc)
    address, name, port = found.groups() if found else ("", "", "")
    try:
        if not (socket.inet_pton(socket.AF_INET6, address) if address
                else 0 < len(name.encode("idna")) <= 253):
            raise ValueError
    except (OSError, ValueError):
        raise ValueError("must name a host, as example.com, 192.0.2.1 or [2001:db8::1]") from None
    if port and not 1 <= int(port) <= 65_535:
        raise ValueError("must have a port of 1 to 65535")
    return parts.scheme + text[len(parts.scheme):]


def _bridge_url(text: str) -> str:
    url = _url(text, ("http", "https", "ws", "wss"))
    if "@" in urllib.parse.urlsplit(url).netloc:  # the URL is shown, passwords must not be
        raise ValueError("must not hold a password; a bridge's token has a setting of its own")
    return url


def _choice(*words: str) -> Callable[[str], str]:
    def choose(text: str) -> str:
        if text not in words:
            raise ValueError("must be " + " or ".join(filter(None, words)))
        return text
    return choose


class Setting:
    """One row of the settings table. `whose` is "controller", "client" or "both"; `default` is None
    where the help text tells it; `read` parses a text or raises ValueError; `caller`: start_client
    accepts it; `plugin`: a client gets it under the API plugin's name (000); `between`: bounds of a
    number; `token`: the parameter of a URL that is a secret, and the setting that it belongs to.
    Without `help` it is `idle`: it has no effect any more."""

    def __init__(self, whose: str, name: str, default: Json, help: str = "", chinese: str = "",
                 read: Optional[Callable[[str], Json]] = None, *, caller: bool = True,
                 secret: bool = False, plugin: bool = False,
                 between: Optional[Tuple[int, int]] = None,
                 token: Tuple[str, str] = ("", "")) -> None:
        self.name, self.default, self.whose = name, default, whose
        self.read: Callable[[str], Json] = read or {
            bool: _flag, int: _whole, float: _number, str: _text}[type(default)]
        self.help, self.chinese, self.secret, self.idle = help, chinese, secret, not help
        self.caller = caller and whose != "controller"
        self.plugin, self.between, self.token = plugin, between, token

    def parse(self, text: str) -> Json:
        """The value that a text stands for; ValueError names the setting."""
        try:
            if len(text) > SETTING_LIMIT:
                raise ValueError(f"must not be longer than {SETTING_LIMIT} letters")
            found = self.read(text)
            if self.between and not self.between[0] <= found <= self.between[1]:
                raise ValueError("must be {} to {}".format(*self.between))
            return found
        except ValueError as error:
            shown = "" if self.secret else f" {re.sub('//[^/@]*@', '//', text)[:100]!r}"
            raise ValueError(f"{self.name}{shown} {error}") from None

    def text(self, value: Json) -> str:
        """A value of JSON or Python as the text that parse() takes."""
        if value is None:
            return ""
        if isinstance(value, (list, tuple)):
            return ",".join(map(str, value))
        return str(int(value) if isinstance(value, bool) else value)

    def shown(self) -> str:
        """The default, as help shows it."""
        is_float = isinstance(self.default, float)
        return f"{self.default:g}" if is_float else self.text(self.default)


_both, _controller, _client = (functools.partial(Setting, whose)
                               for whose in ("both", "controller", "client"))
_operator = functools.partial(Setting, "both", caller=False)  # a controller's clients follow it
SETTINGS = {setting.name: setting for setting in [
    _client("account", "default", "the account's name", "帐号名", caller=False),
    _operator("host", "0.0.0.0", "address to listen on", "监听地址"),
    _operator("port", None, "port to listen on: 4000 controller, 5000 client (weixin 2000, 3000); "
        "0: any", "监听端口，0 为任意", _port, plugin=True),
    _operator("flavor", "qq", "qq or weixin", "qq 或 weixin", _choice("qq", "weixin")),
    _operator("token", "", "what callers must know; also $OPENQQ_TOKEN", "调用者必须提供的口令", secret=True),
    _operator("allowed_hosts", [], "without a token: public names of a server on this machine, "
        "served by https, that passes calls on and asks who is there", "没有口令时，本机 https 代理的公开域名",
        _hosts),
    _operator("public_url", "", "how a phone reaches this server: http://127.0.0.1:PORT",
        "手机怎样访问本服务", _url),
    _operator("max_connections", 2048, "connections at once", "同时的连接数", between=(1, 1_000_000)),
    _both("http_max_message_size", BODY_LIMIT, "bytes of a request's body", "请求正文的字节数",
        between=(1, 1 << 30)),
    _operator("one_cpu", True, "each process on one CPU (Linux), which doubles its speed; 0: on "
        "all", "每个进程只用一个 CPU，快一倍"),
    _both("tmpdir", "", "directory of all files: the system's for such", "所有文件的目录，默认为系统的",
        _path),
    _both("log_path", "", "log file: none, the log goes to stderr", "日志文件，默认写到 stderr", _path),
    _both("log_encoding", "", "encoding of the log: utf-8", "日志编码", _encoding),
    _both("log_level", "info", " ".join(LEVELS), "日志级别", _choice(*LEVELS)),
    _both("log_head", None, "before each line: [wqc][PID] or [ACCOUNT][PID]", "每行日志的开头", _text),
    _both("log_console", False, "log to stderr besides log_path", "除 log_path 外也写到 stderr"),
    _both("disable_color", False, "no colours on a terminal", "终端不用颜色"),
    _both("http_debug", False, "log every call at level debug", "以 debug 级别记录每个调用"),
    _operator("world", "", "JSON file that the local network starts with", "本地网络起始的 JSON 文件",
        _path),
    _both("pid_path", "", "pid file: in tmpdir", "进程号文件", _path),
    _both("post_api", "", "URL that gets every message and event", "接收所有消息和事件的 URL", _url,
        plugin=True),
    _both("post_secret", "", "signs what is posted: X-Signature", "上报的签名密钥", secret=True),
    _both("poll_api", "", "URL of the heartbeat and tunnel", "心跳和反向通道的 URL", _url, plugin=True),
    _both("poll_interval", 5.0, "seconds between two heartbeats", "两次心跳相隔的秒数", plugin=True,
        between=(0, 1_000_000)),

    _controller("backend_start_port", None, "first port for clients: 5000 (weixin 3000)",
        "客户端的起始端口", _port),
    _controller("max_clients", 100, "clients alive at once", "同时运行的客户端数"),
    _controller("check_interval", 5.0, "without effect: the end of a client is noticed at once",
        "不起作用：客户端结束时立即得知", between=(0, 1_000_000)),
    _controller("template_path", "", "the script that clients run: in tmpdir", "客户端运行的脚本", _path),
    _controller("backend_path", "", "file with the clients: in tmpdir", "记录客户端的文件", _path),
    _controller("accounts", "", "JSON file, name to settings, started at boot",
        "启动时要启动的帐号的 JSON 文件", _path),
    _controller("resume", True, "start the clients that ran when it ended", "启动上次结束时在运行的客户端"),
    _controller("restart", "on-failure", "whether dead clients are started again: on-failure or "
        "never", "是否重启死掉的客户端", _choice("on-failure", "never")),

    _client("post_event", True, "post events besides messages", "除消息外也上报事件", plugin=True),
    _client("post_media_data", True, "post a picture's bytes too", "也上报图片数据", plugin=True),
    _client("post_stdout", False, "one JSON line per event on stdout", "每个事件在 stdout 输出一行 JSON"),
    _client("post_event_list", None, "events to post: login,stop,state_change,input_qrcode and "
        "new_ and lose_ of friend, group, group_member", "要上报的事件", _words),
    _client("check_event_list_max_size", 20, "events that check_event keeps", "check_event 保留的事件数",
        between=(0, 100_000)),
    _client("download_media", True, "weixin: keep received media as files", "微信：收到的媒体存为文件"),
    _client("call_action_all", False, "call_action may do what hands out the account or the "
        "machine", "允许 call_action 执行敏感动作", caller=False),
    _client("numeric_ids", False, "ids as JSON numbers", "id 用 JSON 数字"),
    _client("onebot_api", "", "real QQ: the OneBot bridge, ws://HOST:3001 or http://HOST:3000",
        "真实 QQ：OneBot 的地址，ws://主机:3001 或 http://主机:3000", _bridge_url,
        token=("access_token", "onebot_token")),
    _client("onebot_token", "", "the bridge's access token", "它的 access token", secret=True),
    _client("onebot_local", False, "the bridge reads files of this machine: media_path goes there "
        "as file://", "它与本程序读同一磁盘的文件"),
    _client("onebot_secret", "", "signs what the bridge posts to /onebot",
        "OneBot 向 /onebot 上报的签名密钥", secret=True),
    _client("milky_api", "", "real QQ: the Milky bridge, http://HOST:3000",
        "真实 QQ：Milky 的地址，http://主机:3000", _bridge_url, token=("access_token", "milky_token")),
    _client("milky_token", "", "its access token", "它的 access token", secret=True),
    _client("qrcode_file", "", "the picture, PNG or JPEG, that it makes of its QR code",
        "它写出的二维码图片", _path, caller=False),
    _client("onebot_login", "", "whose page has the QR code: napcat or llbot",
        "二维码来自谁的网页：napcat 或 llbot", _choice("", "napcat", "llbot")),
    _client("onebot_login_api", "", "that page: port 6099 (llbot 3080) of the bridge's host",
        "该网页的地址，默认同一主机的端口 6099（llbot 3080）", _url, token=("token", "onebot_login_token")),
    _client("onebot_login_token", "", "that page's token or password", "该网页的口令", secret=True),
    _client("link", "", "where messages come from: local, onebot or milky (QQ), ilink (WeChat); by "
        "itself as the address given says", "消息来自哪里：local 内置网络、onebot 或 milky（QQ）、ilink（微信）",
        _choice("", "local", "onebot", "milky", "ilink")),
    _client("ilink_api", "https://ilinkai.weixin.qq.com", "real WeChat: Tencent's bot API",
        "真实微信：腾讯的机器人接口", _url),
    _client("ilink_cdn", "https://novac2c.cdn.weixin.qq.com/c2c", "where WeChat keeps pictures",
        "微信存放图片的地址", _url),
    _client("cookie_path", "", "cookie file: in tmpdir", "cookie 文件", _path),
    _client("qrcode_path", "", "QR code file: in tmpdir", "二维码文件", _path),
    _client("state_path", "", "state file: in tmpdir", "状态文件", _path),
    _client("keep_cookie", True, "keep the login for the next start", "为下次启动保留登录"),
    _client("login_type", "qrlogin", "qrlogin: scan a code; login: with pwd, on the local network",
        "qrlogin 扫码；login 用 pwd 登录（仅内置网络）", _choice("qrlogin", "login")),
    _client("pwd", "", "password for login_type=login", "login_type=login 的密码", secret=True),
    _client("qrcode_count_max", 10, "QR codes shown before the client stops", "最多几个二维码"),
    _client("send_interval", None, "seconds between two messages: 3, on the local network 0",
        "两条消息相隔的秒数，默认 3，内置网络为 0", _number, between=(0, 86_400)),
    _client("send_queue_max_size", 1000, "messages that may wait to be sent; more are refused",
        "等待发送的消息数上限", between=(1, 1_000_000)),
    _client("msg_ttl", 3, "tries to send one message", "一条消息尝试发送的次数", between=(1, 1_000)),
    _client("mode", "online", "the account's own state", "帐号的在线状态",
        _choice("online", "away", "busy", "silent", "hidden", "offline", "callme")),
    _client("update_interval", 600.0, "seconds between two refreshes of friends, groups and "
        "discusses", "刷新好友、群、讨论组的间隔秒数", between=(0, 1_000_000)),
    _client("is_init_friend", True, "load friends at login", "登录时加载好友"),
    _client("is_init_group", True, "load groups at login", "登录时加载群"),
    _client("is_init_discuss", True, "load discusses at login", "登录时加载讨论组"),
    _client("is_update_user", False, "refresh the user too", "也刷新个人资料"),
    _client("is_update_friend", True, "refresh friends", "刷新好友"),
    _client("is_update_group", True, "refresh groups", "刷新群"),
    _client("is_update_discuss", True, "refresh discusses", "刷新讨论组"),
    _client("allow_message_sync", False, "report what the account sends from another device",
        "上报其他设备发出的消息"),
    _client("ignore_unknown_id", False, "drop messages from strangers", "丢弃陌生人的消息"),
    _client("ua_retry_times", 5),  # these are documented, and have no effect
    *(_client(name, "") for name in (
        "verifycode_path pic_dir ignore_retcode type check_account domain ignore_poll_http_code "
        "default_send_real_comp_sign model_update_timeout group_member_card_cut_length "
        "group_member_identify_callback ua_debug_req_body ua_debug_res_body ua_debug "
        "ua_connect_timeout ua_request_timeout ua_inactivity_timeout is_init_recent "
        "is_update_group_ext is_update_friend_ext security encrypt_method send_failure_count_max "
        "poll_failure_count_max ignore_send_retcode ignore_poll_retcode log_unicode "
        "group_member_card_ext_only group_member_card_cut group_member_use_fullcard").split()),
]}


def setting_named(name: str) -> Optional[Setting]:
    """The setting with a name as flags, the environment or callers spell it, or None:
    `plugin_openqq_post_event` is `post_event` everywhere (002)."""
    return SETTINGS.get(re.sub(r"^plugin_open(qq|wx)_", "", name.replace("-", "_")))


# The setting with the address of a network -> how the names of all its settings begin.
NETWORKS: Dict[str, Tuple[str, ...]] = {
    "onebot_api": ("onebot_",), "milky_api": ("milky_", "onebot_login"), "ilink_api": ("ilink_",)}
UNKEPT = ("pwd", "token")        # the secrets that no file keeps (DESIGN)


def link_of(given: Callable[[str], Json]) -> str:
    """Which link an account has, by the settings that were given."""
    return str(given("link") or next((url[:-4] for url in NETWORKS if given(url)), "local"))


def tokens_apart(given: Mapping[str, str]) -> Dict[str, str]:
    """Settings in which a token that came within a URL is moved to its own setting, so that it is
    treated as a secret. A token that is given by itself has priority."""
    found = dict(given)
    for name, text in given.items():
        parameter, owner = SETTINGS[name].token
        rest, mark, fragment = text.partition("#")
        path, _, query = rest.partition("?")
        kept, tokens = [], []
        for pair in query.split("&"):
            key, _, value = map(urllib.parse.unquote_plus, pair.partition("="))
            if key.lower() == parameter:
                tokens.append(value)
            else:
                kept.append(pair)
        if parameter and tokens:
            found[name] = path + ("?" + "&".join(kept) if kept else "") + mark + fragment
            if tokens[-1] and not given.get(owner):
                found[owner] = tokens[-1]
    return found


def texts_of(given: Mapping[str, Json], why_not: Callable[[Optional[Setting]], str]
             ) -> Dict[str, str]:
    """Given settings by their own names, as texts that parse() takes, or empty ones. ValueError for
    a bad value, and for a setting that `why_not(setting)` objects to (None: it is no setting)."""
    found = {}
    for name, value in given.items():
        setting = setting_named(name)
        wrong = why_not(setting)
        if wrong or setting is None:
            raise ValueError(f"{name[:100]} {wrong}")
        found[setting.name] = setting.text(value)
    found = tokens_apart(found)
    for name, text in found.items():
        if text:
            SETTINGS[name].parse(text)
    return found


def urls_of(name: str) -> List[str]:
    """The settings with the URLs that a secret is for; no other server may get it."""
    return [url for url, setting in SETTINGS.items() if setting.token[1] == name or (
        SETTINGS[name].secret and name.startswith(NETWORKS.get(url, "\0")))]


def renewed(former: Mapping[str, str], given: Mapping[str, str]) -> Dict[str, str]:
    """The settings after some were given anew: new ones win, an empty one removes, and another
    network removes the settings of all networks (names and secrets are for one server only)."""
    def value(name: str, settings: Mapping[str, str]) -> Json:
        return SETTINGS[name].parse(settings[name]) if settings.get(name) else None

    new = {name for name in given if value(name, given) != value(name, former)}
    moved = any(given[name] for name in new.intersection(NETWORKS))
    prefixes = tuple(itertools.chain(*NETWORKS.values()))
    kept = {name: value for name, value in former.items()
            if not (moved and name.startswith(prefixes)) and not new.intersection(urls_of(name))}
    kept.update((name, value) for name, value in given.items() if name in new or name not in kept)
    return {name: value for name, value in kept.items() if value}


class Settings:
    """One server's settings, each an attribute: given, else from the environment, else default.
    ValueError for an unknown name or a bad value."""

    def __init__(self, whose: str, given: Mapping[str, Json], environ: Mapping[str, str],
                 prefix: str) -> None:
        own = {name for name, setting in SETTINGS.items() if setting.whose in (whose, "both")}
        self._given: Row = {name: SETTINGS[name].parse(text) for name, text in
                            from_environment(environ, prefix).items() if name in own}
        self._take(given, own, f"is not a setting of a {whose}")

    def _take(self, given: Mapping[str, Json], own: Container[str], wrong: str) -> None:
        texts = texts_of({name: value for name, value in given.items() if value is not None},
                         lambda setting: "" if setting and setting.name in own else wrong)
        self._given.update((name, SETTINGS[name].parse(text)) for name, text in texts.items())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in SETTINGS:
            raise AttributeError(name)
        return self._given.get(name, SETTINGS[name].default)

    def given(self, name: str) -> Json:
        """The value that somebody gave, or None."""
        return self._given.get(name)

    def with_(self, given: Mapping[str, Json]) -> Settings:
        """A copy in which some are given anew; ValueError as above."""
        copy = Settings.__new__(Settings)
        copy._given = dict(self._given)
        copy._take(given, SETTINGS, "is not a setting")
        return copy

    def fill(self, **values: Json) -> None:
        """Set what nobody gave: defaults that are known only while running."""
        for name, value in values.items():
            if self._given.get(name) in (None, ""):
                self._given[name] = value

    def secrets(self) -> Row:
        """The secrets that are kept after the process: in the cookie file only (DESIGN)."""
        return {name: value for name, value in self._given.items()
                if SETTINGS[name].secret and name not in UNKEPT}


def from_environment(environ: Mapping[str, str], prefix: str) -> Dict[str, str]:
    """Settings in an environment: MOJO_WEBQQ_X and, with priority, MOJO_WEBQQ_PLUGIN_OPENQQ_X.
    Other names are ignored; an empty value counts as none."""
    found = {}
    for key in sorted(environ, key=lambda key: (key.startswith(prefix + "PLUGIN_"), key)):
        setting = setting_named(key[len(prefix):].lower()) if key.startswith(prefix) else None
        if setting and environ[key]:
            found[setting.name] = typed_text(environ[key])
    if environ.get("OPENQQ_TOKEN"):
        found["token"] = environ["OPENQQ_TOKEN"]
    return tokens_apart(found)


def to_environment(values: Mapping[str, str], prefix: str, plugin: str) -> Dict[str, str]:
    """What from_environment() reads back, under the names that templates expect (000)."""
    return {(f"{prefix}PLUGIN_{plugin.upper()}_" if SETTINGS[name].plugin else prefix)
            + name.upper(): value for name, value in values.items()}


def open_log(settings: Settings, head: str) -> Log:
    """The log that settings describe; Refusal if its file cannot be opened."""
    colored = not settings.disable_color and is_console(sys.stderr)
    try:
        return Log(head if settings.log_head is None else settings.log_head, settings.log_level,
                   settings.log_path or None, settings.log_encoding or "utf-8",
                   settings.log_console, colored)
    except OSError as error:
        raise Refusal(f"log_path {settings.log_path} cannot be used: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------
# 4. Flavours
# ------------------------------------------------------------------------------------------------

# The methods of routes. HEAD only where GET does nothing but read.
READ, READ_OR_POST, ACT = "GET|HEAD", "GET|HEAD|POST", "GET|POST"
PREFIXES = ("/openqq/", "/openwx/")  # of the API's paths; each server answers to both


class Verb:
    """One call of the API. Its route, its handler and its part of openapi.json are made from it.

    `takes` lists its parameters (PARAMS): ! is required, + a set of them (Flavour.keys). `gives` is
    the shape of the answer (SHAPES, Flavour.fields; * is a list); `codes` are the codes besides 0,
    and HTTP statuses after =; `example` has parameters that work on the local network. `on` is who
    serves it: client (a controller passes it on), controller, both, or nothing for a path whose
    section declares the route; `flavour` is the only one that has it, if not both. `link` is a
    method of Link and its arguments by name, in the order of the checks: Api.do_act() makes their
    values. `yes` and `no` are code and status of the answer, which repeats the parameters in
    `echo`. Without `link` a method of Api does it: `do_NAME`, or what `does` names."""

    def __init__(self, name: str, methods: str, about: str, takes: str = "",
                 gives: str = "answer", codes: str = "", example: str = "", link: str = "",
                 does: str = "", on: str = "client", flavour: str = "", any_state: bool = False,
                 yes: str = "0 success", no: str = "201 failure", echo: str = "") -> None:
        self.name, self.methods, self.about, self.takes = name, methods, about, takes
        self.gives, self.codes, self.example, self.link = gives, codes, example, link
        self.does, self.on, self.flavour, self.echo = does, on, flavour, echo
        self.any_state = any_state or on != "client"  # else the account must be running
        self.yes, self.no = yes, no


BRIDGES = ("/onebot", "/milky")  # where they post their events
# What can be done. A new call is a row here, and a method of Link or of Api.
VERBS = [
    Verb("start_client", ACT, "Start a client; answers before it has logged in.", "+settings",
         "child", "1 2 3 4 5", "log_level=info", on="controller"),
    Verb("update_client", ACT, "Change settings of a client, which begins anew with them: all or "
         "none, but no paths.", "+changes", "child", "1 4 5", on="controller"),
    Verb("stop_client", ACT, "Stop a client: a controller answers when it has stopped and can be "
         "started again, a client itself before it ends.", "", "stopped", "1", on="both"),
    Verb("delete_client", ACT, "Stop a client and forget its login, its state, its settings and "
         "what waits to be posted.", "", "child", "1", on="controller"),
    Verb("check_client", READ, "One client's state, or all clients'.", "", "states", "1",
         on="both"),
    Verb("get_qrcode", READ, "The picture to be scanned; 404 while there is none.", "", "image",
         "=404", on="both"),
    Verb("events", "GET", "A stream of one client's events and states, or of all clients'.",
         "since Last-Event-ID", "stream", "", "since=0", on="both"),
    Verb("relogin", ACT, "Drop the login and show a new QR code, in a moment.", "", "stopped",
         flavour="qq", any_state=True),
    Verb("get_client_info", READ_OR_POST, "The program, not the account.", "", "program",
         any_state=True),
    Verb("check_event", ACT, "The events since the last call, or the next one.", "since", "event*",
         "", "since=0", any_state=True),
    Verb("get_user_info", READ, "Oneself.", "", "user"),
    Verb("get_friend_info", READ, "All friends.", "", "friend*", does="list friend"),
    Verb("get_group_info", READ, "All groups with their members.", "", "group*", does="list group"),
    Verb("get_group_basic_info", READ, "All groups without their members.", "", "group*"),
    Verb("get_discuss_info", READ, "All discusses with their members.", "", "discuss*",
         flavour="qq", does="list discuss"),
    Verb("search_friend", READ_OR_POST, "Friends by any attributes.", "+friend_fields", "friend*",
         "100", "displayname=小冰", does="search friend"),
    Verb("search_group", READ_OR_POST, "Groups by any attributes.", "+group_fields", "group*",
         "100", "displayname=OpenQQ", does="search group"),
    Verb("send_friend_message", ACT, "To a friend, found by any of its keys.",
         "+friend content async cq reply_to at +media", "sent", "-5 -4 -3 -1 100",
         "displayname=小冰 content=hello", does="send_to friend"),
    Verb("send_group_message", ACT, "To a group, found by any of its keys.",
         "+group content async cq reply_to at +media", "sent", "-5 -4 -3 -1 100 101",
         "displayname=OpenQQ content=hello", does="send_to group"),
    Verb("send_discuss_message", ACT, "To a discuss, found by any of its keys.",
         "+discuss content async cq reply_to at +media", "sent", "-5 -4 -3 -1 100 102",
         "name=OpenQQ content=hello", flavour="qq", does="send_to discuss"),
    Verb("send_sess_message", ACT, "To a member, by id or uid, of a group (group_id, group_uid) or "
         "discuss (discuss_id).", "+place discuss_id id uid content async cq reply_to at +media",
         "sent", "-5 -4 -3 -1 103 104 105", "group_uid=20260001 uid=2854196302 content=hello",
         flavour="qq"),
    Verb("verify_code", ACT, "Give the digits that the phone shows after a scan, where WeChat asks "
         "for them.", "code!", "answer", "201", "code=123456", "verify_code code=digits",
         flavour="weixin", any_state=True),
    Verb("consult", ACT, "Send to a friend, and wait `timeout` (30) seconds for what it answers.",
         "+friend content timeout reply_to at +media", "consulted", "100",
         "displayname=小冰 content=hello", flavour="weixin"),
    Verb("revoke_message", ACT, "Take back a message by the id that its sending answered.", "id!",
         "answer", "-1", "id=57730001", "revoke id=id", yes="0 revoke success",
         no="0 revoke failure"),
    Verb("get_message", READ, "A message that was seen, as its event told it.", "id!",
         "object", "100", "id=57730001"),
    Verb("get_media", READ, "The bytes of a picture that came or went; 404 if there is none of "
         "that id.", "id!", "bytes", "=404", "id=1", any_state=True),
    Verb("upload_media", ACT, "Keep a picture for a later media_id.", "+media", "uploaded", "=507",
         "media_data=iVBORw0KGgo= media_name=a.png", flavour="weixin"),
    Verb("get_avatar", READ, "A picture of a friend, of a group or of somebody in it.",
         "+friend group_id", "image", "100", "displayname=小冰", flavour="weixin"),
    Verb("accept_friend_request", ACT, "Answer a friend_request by its ticket; accept=0 declines.",
         "ticket! accept markname", "accepted", "-1 201", "ticket=1",
         "answer_request ticket=ticket accept=accept markname=markname", no="-1 failure",
         echo="id displayname ticket"),
    Verb("accept_group_request", ACT, "Answer a group_request by its ticket; accept=0 declines, "
         "with a reason.", "ticket! accept reason", "accepted", "-1 201", "ticket=1",
         "answer_group_request ticket=ticket accept=accept reason=reason", flavour="qq",
         no="-1 failure", echo="ticket"),
    Verb("make_friend", ACT, "Ask somebody whom one shares a group with to be a friend.",
         "id! verify", "answer", "100 101 201", "id=filehelper",
         "make_friend uid=stranger verify=verify", flavour="weixin"),
    Verb("create_group", ACT, "Found a group with friends in it.", "friends! displayname",
         "founded", "100 200 201", "friends=filehelper displayname=家", flavour="weixin"),
    Verb("invite_friend", ACT, "Bring friends into a group.", "+place friends!", "answer",
         "100 200 201", "displayname=OpenQQ friends=filehelper", "invite group=group uids=friends",
         flavour="weixin"),
    Verb("kick_group_member", ACT, "Remove members from a group.", "+place +members", "answer",
         "100 200 201", "group_uid=20260001 member_uid=2854196302 displayname=OpenQQ "
         "members=filehelper", "kick group=group uids=members"),
    Verb("shutup_group_member", ACT, "Silence members of a group for `time` minutes, 0 lifts that; "
         "without members and with all=1 everybody, until time=0.",
         "+place +members time! all", "answer", "100 200 201 400",
         "group_uid=20260001 member_uid=2854196302 time=1", flavour="qq"),
    Verb("set_group_name", ACT, "Give a group another name.", "+place name!", "answer", "100 201",
         "group_uid=20260001 name=OpenQQ", "rename group=group name=name!", flavour="qq"),
    Verb("set_group_card", ACT, "What somebody is called in a group.", "+place +members card",
         "answer", "100 200 201", "group_uid=20260001 member_uid=2854196302 card=x",
         "set_card group=group uid=member card=card", flavour="qq"),
    Verb("set_group_admin", ACT, "Make a member an admin, or with enable=0 none.",
         "+place +members enable", "answer", "100 200 201",
         "group_uid=20260001 member_uid=2854196302 enable=1",
         "set_admin group=group uid=member on=enable", flavour="qq"),
    Verb("set_group_title", ACT, "Give a member a title; an empty one takes it away.",
         "+place +members title", "answer", "100 200 201",
         "group_uid=20260001 member_uid=2854196302 title=x",
         "set_title group=group uid=member title=title", flavour="qq"),
    Verb("leave_group", ACT, "Leave a group.", "+place", "answer", "100 201",
         "group_uid=20260001", "leave_group group=group", flavour="qq"),
    Verb("delete_friend", ACT, "End a friendship.", "uid id", "answer", "100 201",
         "uid=2854196301", "delete_friend uid=friend", flavour="qq"),
    Verb("poke", ACT, "Poke a friend (uid, id), or a member of a group.", "uid id +place +members",
         "answer", "100 200 201", "uid=2854196302", flavour="qq"),
    Verb("call_action", ACT, "Hand any other action to the bridge; what it answers is in `data`.",
         "action! params", "called", "201 400", "action=get_version_info"),
    Verb("set_group_displayname", ACT, "Give a group another name.", "+place new_displayname!",
         "answer", "100 201", "displayname=OpenQQ new_displayname=OpenQQ",
         "rename group=group name=new_displayname!", flavour="weixin"),
    *[Verb(name, ACT, "What one calls a friend, or with group_id somebody in a group.",
           "+friend group_id new_markname!", "answer", "100 201",
           "displayname=小冰 new_markname=小冰", "set_markname uid=person markname=new_markname",
           flavour="weixin") for name in ("set_friend_markname", "set_markname")],
    Verb("stick", ACT, "Put a friend or group on top of the list; there is no list here, so that "
         "is all.", "+friend op", "answer", "100 201", "displayname=小冰 op=1", flavour="weixin"),
    Verb("openapi.json", READ, "This document: OpenAPI 3.1.", "", "document", on=""),
    Verb("/local/login", ACT, "Log an account in as if somebody had scanned and pressed; answers "
         "when it runs.", "client!", "child", "=404", "client=alice", on=""),
    Verb("/local/say", ACT, "Let a resident speak to an account or a resident, or in a group or "
         "discuss.", "client from! content! type to reply_to at", "said", "=404",
         "from=小灰 to=小冰 content=hello", on=""),
    Verb("/local/change", ACT, "Change the world: every documented event can be made to happen.",
         "do! what! uid in name card role markname verify signature", "changed", "=404",
         "do=set what=person uid=小灰 signature=hello", on=""),
    Verb("/local/world", READ, "Who and what there is, as --world reads it.", "", "world", on=""),
    Verb("/local/scan", "GET", "The QR code's URL, opened by a phone: a page with a button.",
         "ticket!", "html", "=404", "ticket=1", on=""),
    Verb("/local/confirm", "POST", "The button.", "ticket!", "html", "=404", "ticket=1", on=""),
    *[Verb(path, "POST", "Take an event that a bridge posts.", "body", "object", "=403", on="")
      for path in BRIDGES],
    Verb("/healthz", READ, "Whether the server answers.", on=""),
    Verb("/metrics", READ, "Figures, as Prometheus reads them.", "", "metrics", on=""),
    Verb("/", READ, "The page that a browser sees.", "", "html", on="")]


def verbs_of(flavour: str) -> Dict[str, Verb]:
    """The calls by name that a flavour's clients serve."""
    return {verb.name: verb for verb in VERBS
            if verb.on in ("client", "both") and verb.flavour in ("", flavour)}


POSTED = ("login", "stop", "state_change", "input_qrcode", "new_group", "new_friend",
          "new_group_member", "lose_group", "lose_friend", "lose_group_member")  # by both (000)


def _rows(**lists: str) -> Dict[str, Tuple[str, ...]]:
    return {name: tuple(words.split()) for name, words in lists.items()}


class QQ:
    """The names of Mojo-Webqq: data only, all that flavours may differ in (000, 002 to 004,
    CONTRACT 3)."""

    name = "qq"
    prefix = "/openqq/"          # of the API's paths
    port, client_port = 4000, 5000  # a controller; a client alone, and the first under one
    file_prefix = "mojo_webqq_"
    environ = "MOJO_WEBQQ_"      # prefix of the settings in the environment
    program = "Mojo::Webqq"      # the Perl program, in plugin names
    plugin = "Openqq"            # the API plugin
    ps = "wq"                    # wqcontroller, wqclient(NAME)
    phone = "手机QQ"             # what one scans with
    qrcode_type = "image/png"
    apis = verbs_of("qq")        # the API of a client
    post_event_list = [*POSTED, "group_request", "group_shutup", "group_upload", "poke"]
    # Settings that the state file shows as 0 or 1.
    state_flags: Tuple[str, ...] = ("disable_color", "http_debug", "keep_cookie", "log_console")
    # Kind of thing -> members of its JSON object.
    fields = _rows(
        user="account allow birthday blood city client_type college constel country email face "
             "homepage id mobile name occupation personal phone province sex shengxiao signature "
             "state uid",
        friend="category client_type face flag id is_vip markname name state uid vip_level",
        group="code createtime id level markname max_admin max_member memo name owner_id owner_uid "
              "role uid",
        group_member="bad_record card city client_type country id join_time last_speak_time level "
                     "name province qage role sex state uid",
        discuss="id name owner_id",
        discuss_member="client_type id name state uid",
        friend_request="id name verify ticket",
        group_request="group group_uid uid name comment kind ticket",
        media="type url name size file_id")
    # Other names that a search may use for members (AUTOLOAD in Group.pm, Friend.pm).
    other_names: Dict[str, Dict[str, str]] = {
        "friend": {"qq": "uid", "nick": "name"},
        "group": {"gnumber": "uid", "number": "uid", "gtype": "role", "gname": "name",
                  "gid": "id", "gcode": "code"}}
    # Kind of thing -> the parameters that name it: for send_*; for the calls that manage groups.
    keys = _rows(
        friend="id uid name displayname", group="id uid name displayname", discuss="id name",
        place="group_id group_uid", members="member_id member_uid")
    unknown = "member {name} not found"  # the status when nobody of that name is in the group
    # Kind of thing -> the answer when send_* does not find it.
    missing: Dict[str, Row] = {
        "friend": {"code": 100, "id": None, "status": "friend not found"},
        "group": {"code": 101, "id": None, "status": "group not found"},
        "discuss": {"code": 102, "id": None, "status": "discuss not found"}}
    # Role in a message -> the members that tell of it (sender_id …).
    parts = _rows(
        sender="id uid", receiver="id uid", group="id uid", discuss="id")
    # Type of a message -> what ShowMsg calls it.
    titles = {"friend_message": "好友消息", "group_message": "群消息",
              "discuss_message": "讨论组消息", "sess_message": "群临时消息",
              "sess_message/discuss": "讨论组临时消息"}
    sent: Row = {"code": 0, "info": "发送正常", "status": "发送成功"}  # without its id
    not_sent = "发送失败"         # the status of a send that failed
    sent_id = "{id}"             # the id in the answer to one
    everybody = ""               # the id that means all friends
    text_format: Row = {}        # further members of a message of plain text
    media_members: Tuple[str, ...] = ("media",)  # further members of one with a picture
    media_content = "{content}{label}"           # and its content: or {either}
    ids = {"people": "{number}", "group": "{number}", "discuss": "{number}"}  # their shapes
    usual: Row = {               # members of things on the local network
        "category": "我的好友", "client_type": "pc", "face": "0", "flag": "0", "is_vip": "0",
        "vip_level": "0", "sex": "unknown", "country": "中国", "province": "", "city": "",
        "qage": "0", "bad_record": "0", "level": "0", "birthday": "", "blood": "0",
        "signature": "", "personal": "", "allow": "0", "college": "", "constel": "0", "email": "",
        "homepage": "", "mobile": "", "occupation": "", "phone": "", "shengxiao": "0",
        "last_speak_time": "0", "join_time": "0", "memo": "", "createtime": "0",
        "max_member": 2000, "max_admin": 10}
    world: Row = {               # who is there at the beginning
        "people": [{"uid": "2854196301", "name": "小冰", "echo": 1},
                   {"uid": "2854196302", "name": "小灰", "echo": 0}],
        "groups": [{"uid": "20260001", "name": "OpenQQ", "owner_uid": "",
                    "member": [{"uid": "2854196301"}, {"uid": "2854196302"}]}],
        "discuss": [{"uid": "30260001", "name": "OpenQQ", "owner_uid": "",
                     "member": ["2854196301", "2854196302"]}],
        "friends": [["2854196301", "2854196302"]]}


class Weixin(QQ):
    """Mojo-Weixin, where it differs (001, CONTRACT 10)."""

    name = "weixin"
    prefix = "/openwx/"
    port, client_port = 2000, 3000
    file_prefix = "mojo_weixin_"
    environ = "MOJO_WEIXIN_"
    program = "Mojo::Weixin"
    plugin = "Openwx"
    ps = "wx"
    phone = "手机微信"
    qrcode_type = "image/jpg"
    apis = verbs_of("weixin")
    post_event_list = [*POSTED, "friend_request"]
    state_flags = QQ.state_flags + ("download_media",)
    fields = _rows(
        user="account city display displayname id markname name province sex signature uid",
        friend="account category city display displayname id markname name province sex signature "
               "uid",
        group="displayname id name owner_uid uid",
        group_member="account city display displayname id markname name province role sex "
                     "signature uid",
        friend_request="id displayname verify ticket",
        media="type url name size file_id")
    other_names = {"friend": {}, "group": {}}
    keys = _rows(
        friend="id account displayname markname", group="id displayname", place="id displayname",
        members="members")
    unknown = "{what} id {name} not found"
    missing = dict.fromkeys(("friend", "group"),
                            {"code": 100, "id": None, "status": "object not found"})
    parts = _rows(
        sender="id uid account name markname category", receiver="id uid account name markname",
        group="id uid name")
    sent = {"code": 0, "status": "success"}
    not_sent = "failure"
    sent_id = "{id}:{target}"
    everybody = "@all"
    text_format = {"format": "text"}
    media_members = ("format", "media_code", "media_data", "media_ext", "media_id", "media_mime",
                     "media_mtime", "media_name", "media_path", "media_size")
    media_content = "{either}"
    ids = {"people": "@{hex}", "group": "@@{hex}"}
    usual = {**QQ.usual, "category": "好友", "sex": "0", "country": ""}
    world = {
        "people": [*QQ.world["people"],
                   {"uid": "2854196303", "name": "OpenQQ订阅号", "echo": 0, "category": "公众号"},
                   {"uid": "2854196304", "name": "文件传输助手", "echo": 0, "id": "filehelper",
                    "account": "filehelper", "category": "系统帐号"}],
        "groups": QQ.world["groups"], "discuss": [], "friends": QQ.world["friends"]}


Flavour = QQ                     # the type of both, in annotations
FLAVOURS: Dict[str, Type[Flavour]] = {flavour.name: flavour for flavour in (QQ, Weixin)}


def flavour_named(name: Optional[str]) -> Type[Flavour]:
    """The flavour of a name; without one that of a controller's child, else qq. Refusal."""
    name = name or os.environ.get("OPENQQ_FLAVOR") or "qq"
    if name not in FLAVOURS:
        raise Refusal(f"flavor {name!r} must be one of {' '.join(FLAVOURS)}", 2)
    return FLAVOURS[name]


# ------------------------------------------------------------------------------------------------
# 5. Model: what an account knows
# ------------------------------------------------------------------------------------------------

class Thing:
    """A contact, a group or a message: attributes here, outside a JSON object with the members that
    Flavour.fields lists for its `kind` (THINGS); what is not known is None."""
    kind = ""

    def __init__(self, values: Row) -> None:
        for name, value in values.items():  # one by one: update() would not share the keys
            if name != "displayname":       # which follows from others
                setattr(self, name, value)

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    @property
    def displayname(self) -> str:
        """How it is shown: its markname, else its card, else its name."""
        get = self.__dict__.get
        return get("markname") or get("card") or get("name") or ""

    def value(self, name: str) -> Any:
        """An attribute by its documented name, or None."""
        return self.displayname if name == "displayname" else self.__dict__.get(name)

    def to_json(self, fields: Mapping[str, Tuple[str, ...]]) -> Row:
        """The documented JSON object, without members of a group or discuss."""
        get = self.__dict__.get
        row = {name: get(name) for name in fields[self.kind]}
        if get("title"):
            row["title"] = get("title")  # which only bridges know, and no document
        if "displayname" in row:
            row["displayname"] = self.displayname
        return row

    def full_json(self, fields: Mapping[str, Tuple[str, ...]]) -> Row:
        """The documented JSON object, members included."""
        return self.to_json(fields)


class Circle(Thing):
    """A group or a discuss. `member` maps uids to its members. A link may tell them only when they
    are needed; until then the group is not `loaded`."""

    def __init__(self, values: Row) -> None:
        super().__init__(values)
        self.loaded = "member" in values
        self.member: Dict[str, Thing] = {
            member.uid: member for member in map(THINGS[self.kind + "_member"],
                                                 values.get("member") or [])}

    def full_json(self, fields: Mapping[str, Tuple[str, ...]]) -> Row:
        return dict(self.to_json(fields),
                    member=[member.to_json(fields) for member in self.member.values()])


# kind -> its class. Each kind has its own class, since the objects of one class share the keys of
# their dicts: that halves the memory of a roster (measured).
THINGS: Dict[str, Type[Any]] = {
    kind: type(kind, (Circle if kind in ("group", "discuss") else Thing,), {"kind": kind})
    for kind in ("user", "friend", "group", "group_member", "discuss", "discuss_member")}


class Message(Thing):
    """A message, received (`class` recv) or sent; its fields (CONTRACT 6) are attributes.
    `sender_thing` and so on are the objects behind the names; `answer` is how reply() sends."""
    kind = "message"
    HIDDEN = ("answer", "sender_thing", "receiver_thing", "circle", "peer_uid")

    def to_json(self, fields: Mapping[str, Tuple[str, ...]]) -> Row:
        """The documented JSON object; `fields` is not used, each message has its own members."""
        return {name: value for name, value in self.__dict__.items()
                if name not in self.HIDDEN}

    def conversation(self) -> str:
        """The friend, group or discuss that it belongs to: within it messages keep their order."""
        return f"{self.type}/{self.circle.uid if self.circle else ''}/{self.peer_uid or ''}"

    def reply(self, text: str, **more: Any) -> None:
        """Send text to where the message came from; does not wait. `more` as in Talk.send()."""
        self.answer(self, text, **more)


# ------------------------------------------------------------------------------------------------
# 6. Files
# ------------------------------------------------------------------------------------------------

def read_file(path: str, limit: Optional[int] = None) -> Optional[bytes]:
    """A file's bytes; None if there is no regular file of ours; OSError if it is too large."""
    try:
        with open(path, "rb", opener=own_opener) as file:
            data = file.read() if limit is None else file.read(limit + 1)
    except OSError:
        return None
    if limit is not None and len(data) > limit:
        raise OSError(errno.EFBIG, "too large to be read", path)
    return data


def read_json(path: str, log: Log) -> Row:
    """A state file's JSON object; {} if there is none. A file that cannot be read (the Perl
    programs wrote Storable) is renamed to `<path>.old`, and does not stop a start."""
    data = read_file(path)
    value = object_in(data) if data else {}
    if value is not None:
        return value
    set_aside(path, log)
    return {}


def set_aside(path: str, log: Log) -> None:
    """Rename a file that is not of this program to `<path>.old`, with a warning."""
    log.warn(f"{path} is not a file of this program; it is kept as {path}.old")
    try:
        os.replace(path, path + ".old")
    except OSError as error:
        log.warn(f"{path} could not be set aside: {error.strerror}")


def write_file(path: str, data: bytes) -> None:
    """Replace a file atomically: others see the old bytes or the new ones, never a part. Its mode
    is 0600 from the start; a symlink at `path` is replaced, not followed. OSError."""
    directory, name = os.path.split(path)
    handle, temporary = tempfile.mkstemp("", f".openqq_{name}_", directory)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        patiently(os.replace, temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def keep_file(path: str, data: bytes, log: Log) -> bool:
    """write_file(), with a warning if that fails. False if it should be tried again."""
    try:
        write_file(path, data)
    except OSError as error:
        log.warn(f"{path} cannot be written: {error.strerror}; going on without")
        return not is_held(error)
    return True


def remove_file(path: str) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def files_in(directory: str, pattern: str) -> List[str]:
    """The paths of the files in a directory whose names match; none if there is no directory."""
    with contextlib.suppress(OSError):
        return [os.path.join(directory, name) for name in os.listdir(directory)
                if re.fullmatch(pattern, name)]
    return []


def remove_leftovers(path: str) -> None:
    """Remove what a process that was killed in write_file() left behind: it may hold secrets."""
    directory, name = os.path.split(path)
    for left in files_in(directory, re.escape(f".openqq_{name}_") + "([0-9a-z_]{8}|[0-9a-f]{32})"):
        remove_file(left)


def check_tmpdir(path: str) -> str:
    """The directory for all files, made if needed; Refusal if it cannot be used."""
    path = path or tempfile.gettempdir()
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"can this be written?")
    except OSError as error:
        raise Refusal(f"tmpdir {path} cannot be used: {error.strerror}; "
                      "give another one with --tmpdir") from None
    return os.path.realpath(path)


def check_path(name: str, path: str, tmpdir: str, own_files: str, taken: Iterable[str]) -> None:
    """NotAllowed unless a caller's path is in the controller's tmpdir, is none of `taken` (empty
    ones do not count), and is no file of this program, except one that `own_files` matches."""
    real, room = [os.path.normcase(os.path.realpath(each)) for each in (path, tmpdir)]
    base = os.path.basename(os.path.realpath(path))  # the name that symlinks lead to
    foreign = (re.match("mojo_|[.]", base, re.I) or ":" in base) and not re.fullmatch(
        own_files, base)
    good = name == "tmpdir" and real == room or (
        real.startswith(os.path.join(room, "")) and not foreign and not FORBIDDEN.fullmatch(base))
    # Some file systems ignore case.
    if not good or real.lower() in {os.path.realpath(other).lower() for other in taken if other}:
        raise NotAllowed(f"{name} not allowed")


def check_usable(name: str, path: str, tmpdir: str) -> None:
    """NotAllowed unless a client could write there: a regular file of ours or a new one, in a
    directory that exists or will be made (`tmpdir`); a `tmpdir` itself is a directory or new."""
    is_tmpdir = name == "tmpdir"
    try:
        found = os.lstat(path)
        good = stat.S_ISDIR(found.st_mode) if is_tmpdir else is_own_file(found)
    except OSError as error:
        good = error.errno == errno.ENOENT
    place = path if is_tmpdir else os.path.dirname(path)
    while is_tmpdir and not os.path.lexists(place):
        place = os.path.dirname(place)  # missing directories are made
    if not good or place != tmpdir and not (os.path.isdir(place) and os.access(place, os.W_OK)):
        what = "a directory" if is_tmpdir else "a file in a directory that is there"
        raise NotAllowed(f"{name} not allowed: it must be {what}, which can be written")


def media_type(data: bytes, name: str) -> str:
    """The media type: by the first bytes of pictures, else by the ending of the name."""
    for begin, kind in ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif")):
        if data.startswith(begin):
            return "image/" + kind
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def unkept_media(data: bytes, name: str) -> Row:
    """What a MediaStore tells of media, for media that are not kept there."""
    return {**dict.fromkeys(("media_id", "media_path", "media_ext", "media_mtime", "media_code")),
            "media_name": name, "media_size": str(len(data)), "media_mime": media_type(data, name)}


class MediaStore:
    """The media of an account: files, each with an id (CONTRACT 10). A start removes week-old
    ones."""
    NAME = re.compile(r"[0-9a-f]{32}\.[a-z0-9]{1,8}")

    def __init__(self, start: str) -> None:
        self._start = start
        self._names: Dict[str, str] = {}  # id -> the name that its giver gave it
        self.clear(time.time() - 7 * 86_400)

    def clear(self, until: float = math.inf) -> None:
        """Remove all, or those from before a time."""
        for path in self._paths():
            with contextlib.suppress(OSError):  # somebody else was quicker
                if os.lstat(path).st_mtime < until:
                    os.unlink(path)

    def put(self, data: bytes, name: str) -> Row:
        """Keep bytes under a new id: the row that get() gives. OSError."""
        found = re.search(r"\.[a-z0-9]{1,8}$", name.lower())
        end = found.group() if found else mimetypes.guess_extension(media_type(data, name))
        key = new_secret()
        path = f"{self._start}{key}{end or '.dat'}"
        write_file(path, data)
        self._names[key] = name
        return self._row(key, path, data)

    def get(self, key: str) -> Optional[Row]:
        """What _row() tells of what is kept under an id; None if nothing is."""
        for path in self._paths():
            if path.startswith(f"{self._start}{key}."):
                with contextlib.suppress(OSError):  # it has just been cleared away
                    return self._row(key, path, read_file(path) or b"")
        return None

    def _paths(self) -> List[str]:
        directory, start = os.path.split(self._start)
        return files_in(directory, re.escape(start) + self.NAME.pattern)

    def _row(self, key: str, path: str, data: bytes) -> Row:
        row = unkept_media(data, self._names.get(key, os.path.basename(path)))
        codes = {"image": "3", "audio": "34", "video": "43"}  # the original's
        return {**row, "media_id": key, "media_path": path, "media_ext": path.rpartition(".")[2],
                "media_mtime": str(int(os.stat(path).st_mtime)),
                "media_code": codes.get(row["media_mime"].partition("/")[0], "49")}


class Journal:
    """A file of lines of JSON that are only appended; a torn last line is ignored.

    flush() is one system call, so a kill loses nothing that was written before. There is no fsync
    (36 µs against 0.5): a machine that loses power may lose the last moments. compact() replaces
    a file that has grown to twice the size of what last_lines() gave the last time.
    """
    COMPACT = 4 * 1024 * 1024    # a smaller file is not compacted

    def __init__(self, path: str, log: Log) -> None:
        self.path, self.log = path, log
        self.unwritten: List[Json] = []
        self._file: Any = None
        self._broken = False
        self._size = self._base = 0  # bytes: now, and after the last compact()

    def last_lines(self) -> List[Json]:
        """The lines that are still needed."""
        return []

    def read(self) -> Iterator[Json]:
        """The values, in order; lines that are not JSON are ignored."""
        for line in (read_file(self.path) or b"").split(b"\n"):
            with contextlib.suppress(ValueError):
                yield from_bytes(line)

    def flush(self) -> None:
        """Append what is `unwritten`; a full disk causes only a warning."""
        values, self.unwritten = self.unwritten, []
        if not values:
            return
        try:
            if self._file is None:
                self._file = open(self.path, "a+b", 0, opener=own_opener)
                self._size = os.fstat(self._file.fileno()).st_size
                self._file.seek(max(0, self._size - 1))
                if self._file.read() not in (b"", b"\n"):
                    self._file.write(b"\n")  # after a line that a kill cut off
            data = b"\n".join(map(to_bytes, values)) + b"\n"
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += len(data)
            if self._size > max(self.COMPACT, 2 * self._base):
                self.compact()
            self._broken = False
        except OSError as error:
            if not self._broken:
                self.log.warn(f"{self.path} cannot be written: {error.strerror}; going on without")
            self._broken = True
            self.release()

    def compact(self) -> None:
        """Replace the file by the lines that are still needed. OSError."""
        data = b"".join(to_bytes(line) + b"\n" for line in self.last_lines())
        self.release()
        write_file(self.path, data)
        self._size = self._base = len(data)

    def release(self) -> None:
        """Close the file; a later write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def bulk_of(item: Json) -> int:
    """The size of the picture in a queued event."""
    event = item.get("event") if isinstance(item, dict) else None
    return len(event.get("media_data") or "") if isinstance(event, dict) else 0


class DiskQueue(Journal):
    """A bounded queue on disk, with a mark: how far its source has been read. Not thread-safe.

    `pending` maps increasing keys to items, the oldest first. An item and its mark are one line, so
    that a kill neither loses nor doubles an item."""

    def __init__(self, path: str, limit: int, log: Log) -> None:
        super().__init__(path, log)
        self._limit, self._bytes = limit, 0
        self.pending: Dict[int, Json] = {}
        self.mark: Json = None
        self.last = 0            # the newest key ever given
        for line in self.read():
            row = line if isinstance(line, dict) else {}
            if all(isinstance(row.get(name, 0), int) for name in ("key", "done")):
                self._apply(row)

    def add(self, item: Json, mark: Json = None) -> int:
        """Queue an item, with the mark after it if its source has one; returns its key."""
        line = {"key": self.last + 1, "item": item}
        self._note(line if mark is None else {**line, "mark": mark})
        return self.last

    def advance(self, mark: Json) -> None:
        """Move the mark without an item."""
        self._note({"key": self.last, "mark": mark})

    def done(self, key: int) -> None:
        """Remove an item."""
        if key in self.pending:
            self._note({"done": key})

    def _note(self, line: Row) -> None:
        self._apply(line)
        self.unwritten.append(line)

    def _apply(self, line: Row) -> None:
        self.last = max(self.last, line.get("key", 0))
        if line.get("mark") is not None:
            self.mark = line["mark"]
        if "item" in line:
            self.pending[line.get("key", 0)] = line["item"]
            self._bytes += bulk_of(line["item"])
        if "done" in line and line["done"] in self.pending:
            self._bytes -= bulk_of(self.pending.pop(line["done"]))

    def excess(self) -> List[int]:
        """The keys that are over the limit, oldest first: their owner has to drop them."""
        over, size = len(self.pending) - self._limit, self._bytes - POST_BYTES
        keys: List[int] = []
        for key, item in self.pending.items():
            if len(keys) >= over and size <= 0:
                break
            keys.append(key)
            size -= bulk_of(item)
        return keys

    def close(self) -> None:
        """Flush, and close the file."""
        self.flush()
        self.release()

    def last_lines(self) -> List[Json]:
        return [{"key": self.last, "mark": self.mark},
                *({"key": key, "item": item} for key, item in self.pending.items())]


class Ledger(Journal):
    """A tree of JSON objects on disk: a file with all of it, and a journal of changes. Not
    thread-safe. commit() writes all that put() changed as one line: all of it survives, or none."""

    def __init__(self, path: str, journal_path: str, log: Log) -> None:
        super().__init__(journal_path, log)
        self._whole = path
        self.root: Row = read_json(path, log)
        self._changes: List[Json] = []
        for line in self.read():
            try:
                for change in line:
                    self.put(change[0], *change[1:])
            except (TypeError, IndexError, KeyError, AttributeError):
                log.warn(f"a line of {journal_path} is none of this program's: passed over")
        self._changes = []

    def put(self, value: Json, *path: str) -> None:
        """Set the value at a path, making objects on the way; None removes it."""
        node = self.root
        for step in path[:-1]:
            node = node.setdefault(step, {})
        if value is None:
            node.pop(path[-1], None)
        else:
            node[path[-1]] = value
        self._changes.append([value, *path])

    def table(self, *path: str) -> Row:
        """The object at a path, only to be read; an empty one if there is none."""
        node = self.root
        for step in path:
            node = node.get(step) or {}
        return node

    def commit(self) -> None:
        """Let the changes survive."""
        if self._changes:
            self.unwritten.append(self._changes)
            self._changes = []
            self.flush()

    def save(self) -> None:
        """Write everything into the one file and empty the journal."""
        self._changes = []
        try:
            self.compact()
        except OSError as error:
            self.log.warn(f"{self._whole} cannot be written: {error.strerror}")

    def compact(self) -> None:
        # Not sorted: the order of lists is the order in which things came.
        text = json.dumps(self.root, ensure_ascii=False, separators=(",", ":"))
        data = text.encode("utf-8", "replace")
        write_file(self._whole, data)
        super().compact()
        self._base = len(data)


# ------------------------------------------------------------------------------------------------
# 7. HTTP in
# ------------------------------------------------------------------------------------------------

REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) ((?:(?i:https?)://|/)[\x21-\x7e\x80-\xff]*|\*)"
                          rb" HTTP/1\.([01])")
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
CHUNK_LINE = re.compile(  # RFC 9112 7.1.1: an extension has a name, and may have a value
    rb"""([0-9A-Fa-f]{1,8})(?:[ \t]*;[ \t]*[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?:[ \t]*=[ \t]*(?:"""
    rb"""[!#$%&'*+\-.^_`|~0-9A-Za-z]+|"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"))?)*""")
LENGTH = re.compile(r"[0-9]{1,15}")
CHUNKED = -1  # instead of a length
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._\-]+)(?::([0-9]{1,5}))?")
CHARSET = re.compile(r"""(?i);\s*charset=["']?([\w.-]+)""")
BROKEN_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
CALLBACK = re.compile(r"(?=.{1,64}\Z)[A-Za-z_$][\w$]*(?:\.[A-Za-z_$][\w$]*)*", re.ASCII)
SINGLE = ("host", "content-length", "transfer-encoding", "authorization", "content-type",
          "origin", "expect")
# Fields in which a proxy says how it was called, and their values for https.
SECURE = {"x-forwarded-proto": "https", "x-forwarded-protocol": "https", "x-scheme": "https",
          "x-forwarded-scheme": "https", "x-url-scheme": "https", "x-forwarded-ssl": "on",
          "front-end-https": "on", "cf-visitor": '{"scheme":"https"}'}
FORWARDED = frozenset((
    *SECURE, "forwarded", "forwarded-for", "via", "x-forwarded", "x-forwarded-for",
    "x-forwarded-host", "x-forwarded-port", "x-forwarded-server", "x-forwarded-by",
    "x-original-host", "x-original-forwarded-for", "x-real-ip", "x-client-ip",
    "x-cluster-client-ip", "cf-connecting-ip", "true-client-ip", "fastly-client-ip"))
# A field of each request that fetches a picture: servers of this program answer it with pictures
# only. Callers on this machine are trusted, but not whoever gave the address of the picture.
MEDIA_MARK = "x-openqq-media"
NOT_KEYS = ("client", "access_token", "token", "datatype", "callback", "_")


class Reaper:
    """One thread that ends what takes too long, and tells a waiting handler when its caller hangs
    up. So reading and writing can block, and a deadline costs no lock and no system call."""

    def __init__(self) -> None:
        # Guards _timed, _selector's sockets and _started. A socket of theirs is only closed while
        # it is held: else the number could already belong to a new connection.
        self.lock = threading.RLock()
        self._timed: Set[Any] = set()  # objects with `until`, and expire(), which is called then
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket_pair()
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        # select() and poll() do not notice a socket that is added while they wait: so they wait
        # only for short. To wake them for each socket would take seconds for 500 callers.
        self._pause = math.inf if hasattr(self._selector, "fileno") else 0.25
        self._started = False
        self._looks_at = math.inf    # when the thread wakes by itself

    def add(self, timed: Any) -> None:
        """Call its expire() when its `until` has come, with the lock held, until remove()."""
        with self.lock:
            self._timed.add(timed)
            if not self._started:
                with contextlib.suppress(RuntimeError):  # no thread to be had: the next one tries
                    spawn(self._run, name="reaper")
                    self._started = True

    def remove(self, timed: Any) -> None:
        """End an add(), before its socket is closed."""
        with self.lock:
            self._timed.discard(timed)

    def watch(self, sock: socket.socket, gone: Callable[[], None]) -> None:
        """Have gone() called, with the lock held, if the peer closes; it must not block."""
        with self.lock:
            watched = len(self._selector.get_map())
            if watched >= MOST_WATCHED:
                return  # the system cannot watch more: then nobody is told
            with contextlib.suppress(KeyError, ValueError, OSError):  # it is closed
                self._selector.register(sock, selectors.EVENT_READ, gone)
        if watched == 1 and self._pause < math.inf:
            self.expect(0.0)

    def unwatch(self, sock: socket.socket) -> None:
        """End a watch()."""
        with self.lock, contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def expect(self, until: float) -> None:
        """Note that something has this `until` from now on."""
        if until < self._looks_at:
            with contextlib.suppress(OSError):  # full, so the thread wakes
                self._wake_writer.send(b"!")

    def _run(self) -> None:
        while True:
            self._looks_at = math.inf    # from here on expect() wakes us
            now = time.monotonic()
            with self.lock:
                for timed in [each for each in self._timed if each.until <= now]:
                    timed.expire()
                first = min([each.until for each in self._timed], default=math.inf)
                pause = self._pause if len(self._selector.get_map()) > 1 else math.inf
            self._looks_at = first
            try:
                ready = self._selector.select(
                    min(POST_DAY, pause, max(0.0, first - time.monotonic())))
            except OSError:
                continue  # on systems that have only select(): a socket was closed meanwhile
            for key, _ in ready:
                sock: Any = key.fileobj
                with self.lock, contextlib.suppress(KeyError, ValueError):  # it is closed by now
                    if key.data is None:
                        self._wake_reader.recv(4096)
                    elif self._selector.get_key(sock) == key:
                        self._selector.unregister(sock)
                        if has_ended(sock):  # else its next request has come
                            key.data()


REAPER = Reaper()


def is_readable(sock: socket.socket, seconds: float = 0.0) -> bool:
    """Whether data, or the end, comes within so many seconds."""
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
        try:  # neither of these selectors needs a descriptor
            selector.register(sock, selectors.EVENT_READ)
        except ValueError:
            return True  # another thread has closed it
        return bool(selector.select(seconds))


def has_ended(sock: socket.socket) -> bool:
    """Whether the peer has closed its side. One cannot peek into TLS, but there data that nobody
    asked for is the end as well."""
    try:
        return is_readable(sock) and (type(sock) is not socket.socket
                                      or not sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return True


class Stream:
    """A socket with a buffer and a deadline; close() this, not the socket."""

    __slots__ = ("sock", "buffer", "until", "cause")

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.buffer, self.until = sock, b"", math.inf
        self.cause: Optional[Exception] = None  # why we ended it, if the peer did not
        REAPER.add(self)

    def allow(self, seconds: float) -> None:
        """Set the deadline: all reading and writing from now on may take so long (TimeoutError)."""
        self.until = until = time.monotonic() + seconds
        REAPER.expect(until)

    def expire(self) -> None:
        """Called by the reaper: end reading now, and writing a second later, after an answer."""
        first, self.cause = self.cause is None, self.cause or TimeoutError()
        self.until = self.until + 1.0 if first else math.inf
        self.shut(socket.SHUT_RD if first else socket.SHUT_RDWR)

    def shut(self, how: int = socket.SHUT_RDWR) -> None:
        """Make a thread that reads (or writes) here stop. From any thread."""
        with contextlib.suppress(OSError):  # the other side was first
            self.sock.shutdown(how)
        if how != socket.SHUT_WR:
            interrupt_reading(self.sock)

    def close(self) -> None:
        """Hang up; a thread that reads here notices it."""
        REAPER.remove(self)
        self.shut()
        self.sock.close()

    def more(self) -> bytes:
        """What comes next from the socket; EOFError at its end, `cause`, OSError."""
        try:
            data = self.sock.recv(65_536)
        except OSError as error:
            raise self.cause or error from None
        if not data:
            raise self.cause or EOFError()
        return data

    def send(self, data: bytes) -> None:
        """Write all of it; `cause`, OSError."""
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise self.cause or error from None

    def head(self) -> Tuple[bytes, bytes]:
        """A message's first line, and its fields; EOFError; BadRequest as soon as it is wrong."""
        while True:
            head, is_whole, rest = self.buffer.partition(b"\r\n\r\n")
            line, has_fields, block = head.partition(b"\r\n")
            if len(line) > LINE_LIMIT:
                raise BadRequest(414, f"request line over {LINE_LIMIT} bytes")
            if len(block) > HEAD_LIMIT + (0 if is_whole else 3):  # three of its end, perhaps
                raise BadRequest(431, f"header fields over {HEAD_LIMIT} bytes")
            if is_whole:
                self.buffer = rest
                return line, block
            if not has_fields and b"\n" in line:
                raise BadRequest(400, "lines must end with CR LF")
            self.buffer += self.more()

    def line(self) -> bytes:
        """A line of the chunked coding, without CR LF."""
        while b"\r\n" not in self.buffer:
            if len(self.buffer) > 256:
                raise BadRequest(400, "chunk line too long")
            self.buffer += self.more()
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    def body(self, length: Optional[int]) -> Iterator[bytes]:
        """The pieces of a body of that length; CHUNKED: the trailer is read and dropped (RFC 9112
        7.1); None: all until the connection ends. EOFError, BadRequest."""
        left = sys.maxsize if length is None else length
        while left > 0:
            try:
                data = self.buffer or self.more()
            except EOFError:
                if length is None:
                    return
                raise
            self.buffer = data[left:]
            yield data[:left]
            left -= len(data)
        if length != CHUNKED:
            return
        while True:
            found = CHUNK_LINE.fullmatch(self.line())
            if not found:
                raise BadRequest(400, "broken chunk size")
            size = int(found.group(1), 16)
            if size == 0:
                break
            if size > BODY_LIMIT:
                raise BadRequest(413, "chunk too large")
            yield from self.body(size)
            while len(self.buffer) < 2:
                self.buffer += self.more()
            if self.buffer[:2] != b"\r\n":
                raise BadRequest(400, "chunk longer than its size")
            self.buffer = self.buffer[2:]
        for _ in range(FIELD_LIMIT):
            line = self.line()
            if not line:
                return
            if not FIELD.fullmatch(line):
                raise BadRequest(400, "broken trailer field")  # others may take it for a request
        raise BadRequest(431, "trailer too long")


def gather(pieces: Iterator[bytes], limit: int) -> bytes:
    """Join all pieces; stops when they are longer than `limit` bytes."""
    found, size = [], 0
    for piece in pieces:
        found.append(piece)
        size += len(piece)
        if size > limit:
            break
    return b"".join(found)


def head_of(lines: List[str]) -> bytes:
    """A message's head as bytes; ValueError for a line break in a field."""
    text = "\r\n".join(lines)
    if not text.count("\n") == len(lines) - 1 == text.count("\r"):  # no assert: -O drops those
        raise ValueError("a line break within a header field")
    return text.encode("latin-1", "replace") + b"\r\n\r\n"


@functools.lru_cache(maxsize=32)  # browsers repeat theirs; each may be of HEAD_LIMIT bytes
def parse_fields(block: bytes) -> Fields:
    """The header fields of a block, which must not be changed (cache); BadRequest."""
    fields: Fields = {}
    lines = block.split(b"\r\n") if block else []
    if len(lines) > FIELD_LIMIT:
        raise BadRequest(431, f"over {FIELD_LIMIT} header fields")
    for line in lines:
        found = FIELD.fullmatch(line)
        if not found:
            raise BadRequest(400, "broken header field")
        name = found.group(1).decode("ascii").lower()
        value = found.group(2).decode("latin-1").rstrip(" \t")
        if name in fields and name in SINGLE:  # two readers could take different ones
            raise BadRequest(400, f"two {name} fields")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def body_length(fields: Fields) -> int:
    """A body's length (RFC 9112 6.3), or CHUNKED; BadRequest if two readers could understand two
    lengths: that is how a second request is smuggled behind the first."""
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is not None and length is not None:
        raise BadRequest(400, "both content-length and transfer-encoding")
    if coding is not None and coding.lower() != "chunked":
        raise BadRequest(501, "transfer-encoding other than chunked")
    if length is not None and not LENGTH.fullmatch(length):
        raise BadRequest(400, "broken content-length")
    return int(length or 0) if coding is None else CHUNKED


def charset_of(kind: str) -> str:
    """The charset that a Content-Type names, or empty."""
    found = CHARSET.search(kind)
    return found.group(1) if found else ""


def _legible(name: str, data: bytes, charset: str = "") -> str:
    """The text of a parameter; BadRequest."""
    try:
        return read_text(data, charset)
    except ValueError as error:
        raise BadRequest(400, f"{name} is {error}") from None


def parse_form(text: str, charset: str = "") -> Params:
    """Parameters of a query or form; bytes that are not UTF-8 are surrogates (PEP 383). The last of
    a name counts. BadRequest. Each name and value is decoded by itself: a library may have written
    one in UTF-8, and a console another in GBK."""
    if text.count("&") > PARAM_LIMIT:
        raise BadRequest(400, f"over {PARAM_LIMIT} parameters")
    pairs = [pair.partition("=") for pair in text.split("&") if pair]
    if "%" not in text and "+" not in text and text.isascii():
        return {name: value for name, _, value in pairs}
    if BROKEN_PERCENT.search(text):
        raise BadRequest(400, "broken percent-encoding; a % itself is written %25")

    def read(name: str, text: str) -> str:
        text = text.replace("+", " ")
        if "%" not in text and text.isascii():
            return text
        data = urllib.parse.unquote_to_bytes(text.encode("utf-8", "surrogateescape"))
        return _legible(name, data, charset)

    params = {}
    for name, _, value in pairs:
        name = read("a name", name)
        params[name] = read(name, value)
    return params


def parse_multipart(kind: str, body: bytes) -> Params:
    """Parameters of a multipart/form-data body (RFC 7578); a file's bytes become base64."""
    found = re.search(r'(?i)(?:^|;)\s*boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))', kind)
    if not found:
        raise BadRequest(400, "multipart without a boundary")
    params = {}
    border = b"\r\n--" + re.escape((found.group(1) or found.group(2)).encode())
    pieces = re.split(border + rb"(?=(?:--)?[ \t]*(?:\r\n|\Z))", b"\r\n" + body)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise BadRequest(400, "broken multipart body")
    for piece in pieces[1:-1]:
        head, _, value = piece.partition(b"\r\n\r\n")
        said = {found.group(1).lower(): found.group(2) or found.group(3) or b"" for found in
                re.finditer(rb';\s*([\w*-]+)=(?:"([^"\r\n]*)"|([^\s";]+))', head)}
        if b"name" not in said:
            raise BadRequest(400, "multipart part without a name")
        key = _legible("a name", said[b"name"])
        if b"filename" in said:
            params[key] = base64.b64encode(value).decode()
            params[key + ".filename"] = _legible(key, said[b"filename"])
        else:
            params[key] = _legible(key, value, charset_of(head.decode("latin-1")))
    return params


def parse_json_params(body: bytes, charset: str = "") -> Params:
    """Parameters of a JSON object: scalars as text, lists joined by commas, null left out."""
    try:
        value = decode_params(read_text(body, charset).lstrip("\ufeff").strip())
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest(400, "JSON must be an object")
    params = {}
    for name, item in value.items():
        parts = item if isinstance(item, list) else [] if item is None else [item]
        if any(part is None or isinstance(part, (list, dict)) for part in parts):
            raise BadRequest(400, f"{name} must be text, a number or a list of them")
        if item is not None:
            params[_whole_text("a name", name)] = _whole_text(name, ",".join(
                [str(int(part) if isinstance(part, bool) else part) for part in parts]))
    return params


def _whole_text(name: str, text: str) -> str:
    """The text; BadRequest for half a character (surrogate), which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        name = name.encode("ascii", "replace").decode()
        raise BadRequest(400, f"half a character in {name}") from None
    return text


class Request:
    """A whole request; the path is decoded, the query is not; `old` means HTTP/1.0.

    A handler calls `wait(future, seconds)` for a result that may take long: it raises Hangup when
    the caller hangs up, TimeoutError after `seconds`, and returns None when the server ends.
    """

    def __init__(self, method: str, target: str, fields: Fields, body: bytes, peer: str,
                 sock: Optional[socket.socket] = None, old: bool = False,
                 wait: Wait = result_of) -> None:
        path, _, self.query = target.partition("?")
        self.method, self.fields, self.body, self.peer = method, fields, body, peer
        if not path.isascii():
            path = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        self.path = urllib.parse.unquote(path) if "%" in path else path
        self.target = target
        self.sock, self.old, self.wait = sock, old, wait

    @functools.cached_property
    def params(self) -> Params:
        """Query and body parameters, merged (CONTRACT 1); BadRequest if they cannot be read."""
        params = parse_form(self.query) if self.query else {}
        if self.body:
            kind = self.fields.get("content-type", "")
            plain = kind.partition(";")[0].strip().lower()
            if plain == "application/x-www-form-urlencoded":
                text = self.body.decode("utf-8", "surrogateescape").strip("\r\n")
                params.update(parse_form(text, charset_of(kind)))
            elif plain == "multipart/form-data":
                params.update(parse_multipart(kind, self.body))
            elif plain in ("application/json", "text/json"):
                params.update(parse_json_params(self.body, charset_of(kind)))
        for name, value in params.items():
            if "\0" in name or "\0" in value:
                raise BadRequest(400, f"NUL in {name!r}")
        return params

    def read_url_only(self) -> None:
        """Take parameters from the URL alone: the body is something else."""
        self.params = parse_form(self.query) if self.query else {}

    def keys(self) -> Params:
        """The parameters without those that are not about the thing that is looked for."""
        return {name: value for name, value in self.params.items() if name not in NOT_KEYS}


class Response:
    """An answer: the bytes of its body, or for a stream an iterator of pieces."""

    __slots__ = ("status", "kind", "body", "fields", "pieces")

    def __init__(self, body: bytes = b"", kind: str = "application/json", status: int = 200,
                 fields: Optional[Mapping[str, str]] = None,
                 pieces: Optional[Iterator[bytes]] = None) -> None:
        self.body, self.kind, self.status = body, kind, status
        self.fields = fields or {}
        self.pieces = pieces

    def head(self, connection: str, chunked: bool = False) -> bytes:
        """Status line and fields, with a Connection field unless `connection` is empty."""
        lines = [f"HTTP/1.1 {self.status} {http.client.responses.get(self.status, 'Status')}",
                 "Date: " + http_date(int(time.time()))]
        if self.kind:
            lines.append(f"Content-Type: {self.kind}")
        if self.pieces is None:
            lines.append(f"Content-Length: {len(self.body)}")
        elif chunked:
            lines.append("Transfer-Encoding: chunked")
        lines += map(": ".join, self.fields.items())
        if connection:
            lines.append("Connection: " + connection)
        return head_of(lines)


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """The value of the Date field, made once a second (RFC 9110 5.6.7)."""
    return email.utils.formatdate(second, usegmt=True)


def error_response(error: OpenQQError) -> Response:
    """An error as its answer."""
    return Response(to_bytes(error.answer()), status=error.http)


class Auth:
    """Who may call (DESIGN). Without a token: callers on this machine, and what a proxy on it
    passes on that was called by one of the names in `hosts` (allowed_hosts), since a page of
    another site cannot have that name."""

    def __init__(self, token: str = "", hosts: Iterable[str] = ()) -> None:
        self._token, self._hosts = token.encode(), frozenset(hosts)

    def check(self, request: Request) -> None:
        """AuthFailure, which says why and what helps, unless this caller may call."""
        peer, fields = request.peer, request.fields
        if self._token:
            scheme, _, given = fields.get("authorization", "").partition(" ")
            bears = scheme.lower() == "bearer"
            offers = [given.strip().encode("latin-1", "replace")] if bears else []
            with contextlib.suppress(BadRequest):  # parameters that cannot be read hold no token
                offers += [request.params[name].encode("utf-8", "replace")
                           for name in ("access_token", "token") if name in request.params]
            if not any([same_bytes(offer, self._token) for offer in offers]):
                raise AuthFailure()
            return
        if not is_loopback(peer):
            raise AuthFailure(reason=f"it comes from another machine, {peer}: set token, and let "
                                     "the caller give it")
        if "host" not in fields:
            raise AuthFailure(reason="it has no Host: let the caller give one, or set token and "
                                     "let it give that")
        host = fields["host"]
        name = host_name(host)
        if not is_own_host(name):
            if name not in self._hosts:
                raise AuthFailure(reason=(
                    f"its Host, {name[:100]}, is no name of this machine: set token; or "
                    "allowed_hosts, if it is your own server's, which asks who is there"))
            port = request.sock.getsockname()[1] if request.sock else 0
            if (host[len(name):] or ":80") == f":{port}":
                raise AuthFailure(reason=(
                    f"its Host, {name[:100]}, has our own port {port}: a browser found that name "
                    "here itself, and does not say which site asks; let the server in front call"))
        forwarded = FORWARDED.intersection(fields)
        if forwarded:
            host = fields.get("x-forwarded-host", "")
            if host_name(host) not in self._hosts:
                given = f"its X-Forwarded-Host is {host[:100]!a}" if host else "no X-Forwarded-Host"
                raise AuthFailure(reason=(
                    f"it came through a proxy ({', '.join(sorted(forwarded))}), {given}: set "
                    "token; or allowed_hosts to the one name that the proxy is called by and "
                    "passes on as X-Forwarded-Host"))
        if is_cross_site(fields, host):
            site = fields.get("origin", fields.get("sec-fetch-site", ""))
            raise AuthFailure(reason=f"a page of another site made it ({site[:100]!a}): set "
                                     "token, and let the page give it")
        if forwarded and came_by_http(fields):
            raise AuthFailure(reason=(
                "it came to the proxy by plain http, where browsers do not say which site asks: "
                "let that name be served by https only, or set token"))


def came_by_http(fields: Fields) -> bool:
    """Whether the proxy, or the browser, says that the proxy was not called by https."""
    said = [(part, good) for name, good in SECURE.items() if name in fields
            for part in fields[name].split(",")]
    said += [(part, "https") for part in re.findall(  # RFC 7239
        r'(?i)\bproto\s*=\s*"?([^;,"]*)', fields.get("forwarded", ""))]
    return (any([part.strip().lower() != good for part, good in said])
            or fields.get("origin", "").startswith("http:"))


def is_cross_site(fields: Fields, host: str) -> bool:
    """Whether the browser says that a page of another site made the request."""
    if fields.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return True
    if "origin" not in fields:
        return False
    scheme, _, place = fields["origin"].lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)  # default ports are left out
    return port is None or place not in (host.lower(), re.sub(port + r"\Z", "", host.lower()))


@functools.lru_cache(maxsize=256)
def host_name(host: str) -> str:
    """The name or address in a Host field or an authority, in lower case; "" if it is broken."""
    found = HOST.fullmatch(host)
    return found.group(1).lower() if found and int(found.group(2) or 0) < 65_536 else ""


@functools.lru_cache(maxsize=256)
def is_own_host(name: str) -> bool:
    """Whether a Host, in lower case and without port, can only mean this machine. 127.1, which the
    documents use, is accepted, other spellings are not: to 0.0.0.0, [::], [::ffff:7f00:1] and the
    like browsers send no Sec-Fetch fields (measured with Chromium and Firefox)."""
    if re.fullmatch(r"127(\.(0|[1-9][0-9]{0,7})){1,3}", name):  # no octal numbers
        return is_loopback(name)  # False if a number is too large
    return re.fullmatch(r"\[::1\]|([^.]+\.)*localhost\.?", name) is not None


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether a peer, or the host of a URL, is this machine; for Host see is_own_host()."""
    host = host.lower().strip("[]").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        if ":" in host:
            packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
            return packed == b"\0" * 15 + b"\1" or packed[:13] == b"\0" * 10 + b"\xff\xff\x7f"
        return re.fullmatch("[0-9a-fx.]+", host) is not None and socket.inet_aton(host)[0] == 127
    except OSError:
        return False


same_bytes = hmac.compare_digest  # its time does not tell where they differ


def bearer(token: str) -> str:
    """The Authorization field with a token; fields carry bytes as latin-1."""
    return "Bearer " + token.encode().decode("latin-1")


def signature(secret: str, body: bytes) -> str:
    """The X-Signature of a body: sha1=HEX, as in OneBot (DESIGN)."""
    return "sha1=" + hmac.new(secret.encode(), body, "sha1").hexdigest()


class Route:
    """A path of the API: `handler(request)` returns a Response or JSON; anybody may call an `open`
    one."""

    def __init__(self, path: str, methods: str, handler: Callable[[Request], Any],
                 open: bool = False) -> None:
        self.path, self.handler, self.open = path, handler, open
        self.methods = methods.split("|")


HEALTH = Route("/healthz", READ, lambda request: {"code": 0, "status": "success"}, open=True)


class Metrics:
    """The figures of GET /metrics, in the Prometheus text format 0.0.4."""

    BOUNDS = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0)  # seconds: the upper bounds of the buckets

    def __init__(self) -> None:
        self.paths: Set[str] = set()   # others count as "other": callers must not invent labels
        # Not summed up yet: a lock for each request would cost half as much as all the rest.
        self._news: Deque[Tuple[str, int, float]] = collections.deque()
        self._lock = threading.Lock()  # guards _rows
        # (path, status) -> sum of seconds, and number of answers in each bucket
        self._rows: Dict[Tuple[str, int], List[float]] = {}
        self._sources: List[Tuple[str, str, str, Callable[[], Mapping[str, float]]]] = []

    def count(self, path: str, status: int, seconds: float = 0.0) -> None:
        """Count an answer."""
        self._news.append((path, status, seconds))
        if len(self._news) >= 256:
            self._sum_up()

    def _sum_up(self) -> List[Tuple[str, int, List[float]]]:
        """Everything counted, sorted: path, status, row."""
        with self._lock:
            for _ in range(len(self._news)):
                path, status, seconds = self._news.popleft()
                key = path if path in self.paths else "other", status
                row = self._rows.setdefault(key, [0.0] * (2 + len(self.BOUNDS)))
                row[0] += seconds
                row[1 + bisect.bisect_left(self.BOUNDS, seconds)] += 1
            return sorted((*key, row[:]) for key, row in self._rows.items())

    def watch(self, name: str, kind: str, help: str,
              read: Callable[[], Mapping[str, float]]) -> None:
        """Show what read() returns: labels as text, or "" -> value."""
        self._sources.append(("openqq_" + name, kind, help, read))

    def show(self, request: Request) -> Response:
        """GET /metrics."""
        lines = ["# HELP openqq_requests_total Requests answered.",
                 "# TYPE openqq_requests_total counter"]
        by_path: Dict[str, List[float]] = {}
        for path, status, row in self._sum_up():
            lines.append(f'openqq_requests_total{{path="{path}",code="{status}"}} '
                         f"{sum(row[1:]):.0f}")
            by_path[path] = list(map(sum, zip(by_path.get(path, [0.0] * len(row)), row)))
        name = "openqq_request_seconds"
        lines += [f"# HELP {name} From a request's last byte to its answer.",
                  f"# TYPE {name} histogram"]
        for path, row in by_path.items():
            bounds = [*(f"{bound:g}" for bound in self.BOUNDS), "+Inf"]
            lines += [f'{name}_bucket{{path="{path}",le="{bound}"}} {count:.0f}'
                      for bound, count in zip(bounds, itertools.accumulate(row[1:]))]
            lines += [f'{name}_sum{{path="{path}"}} {row[0]:.6f}',
                      f'{name}_count{{path="{path}"}} {sum(row[1:]):.0f}']
        for name, kind, help, read in self._sources:
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{'{%s}' % labels if labels else ''} {float(value):.16g}"
                      for labels, value in read().items()]
        return Response(("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4")


class App:
    """The routes of a server, after auth; `fallback(request)` answers other requests. /metrics
    counts the routes and the paths in `known`."""

    def __init__(self, auth: Auth, log: Log, routes: Iterable[Route],
                 fallback: Callable[[Request], Any], known: Iterable[str] = ()) -> None:
        self.auth, self.log, self.fallback = auth, log, fallback
        self.metrics = Metrics()
        self.routes = {route.path: route for route in
                       [*routes, Route("/metrics", READ, self.metrics.show)]}
        self.metrics.paths.update(self.routes, known)
        self._lock = threading.Lock()    # guards _refused
        self._refused: Dict[str, Set[str]] = {}  # rule -> the reasons that were logged

    def answer(self, request: Request) -> Response:
        """The response to a request; raises nothing but Hangup."""
        route = self.routes.get(request.path)
        try:
            if (MEDIA_MARK in request.fields
                    and request.path not in ("/openqq/get_media", "/openwx/get_media")):
                raise NotAllowed("a picture's address that leads to this program not allowed")
            if request.method != "OPTIONS" and not (route and route.open):
                self.auth.check(request)
            if route and request.method in route.methods:
                value = route.handler(request)
            else:
                value = self.fallback(request)
            return value if isinstance(value, Response) else Response(to_bytes(value))
        except Hangup:
            raise
        except OpenQQError as error:
            if isinstance(error, AuthFailure):
                self._tell(error.extra.get("reason"))
            if MEDIA_MARK in request.fields:
                error = BadRequest(400, error.status)  # an answer of 200 would be a picture
            return error_response(error)
        except Exception:
            self.log.failure(f"{request.method} {request.path}")
            return error_response(BadRequest(500, "a fault of this program; its log says more"))

    def _tell(self, reason: Optional[str]) -> None:
        """Log each reason of a refusal once, and only a few of each rule."""
        if not reason:
            return
        with self._lock:
            told = self._refused.setdefault(re.split("[,:(]", reason)[0], set())
            if reason in told or len(told) >= REASON_LIMIT:
                return
            told.add(reason)
            more = "" if len(told) < REASON_LIMIT else "; others like it are not logged"
        self.log.warn(f"a call was refused: {reason}{more}")


class Connection(BaseHTTPRequestHandler):
    """A connection to a Server. Of the base class it uses handle() only: its parser lets smuggled
    requests pass, and is ten times slower."""

    server: Server

    def __init__(self, sock: socket.socket, address: Any, server: Server) -> None:
        """Serve the connection until it ends, as a job of the server's thread pool."""
        self.connection, self.client_address, self.server = sock, address, server
        self.stream = Stream(sock)
        try:
            # Without this each answer would wait 44 ms for an ACK (measured).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.handle()
        except (OpenQQError, EOFError, OSError):
            pass  # the caller hung up, or the answer that is passed on broke off
        except Exception:
            server.log.failure("a connection")
        finally:
            REAPER.remove(self.stream)
            server.connections.discard(sock)
            sock.close()

    def handle_one_request(self) -> None:
        """Read a request and answer it; `close_connection` says whether it was the last."""
        self.close_connection = True
        server = self.server
        try:
            request, keep = self._read()
        except BadRequest as error:
            return self._refuse(error)
        began = time.monotonic()
        response = server.app.answer(request)
        server.app.metrics.count(request.path, response.status, time.monotonic() - began)
        if server.debug is not None:
            server.debug(f"{request.peer} {request.method} {request.path} "
                         f"{response.status} {len(response.body)} bytes")
        keep = keep and not server.ending
        if response.pieces is None:
            head = response.head("close" if not keep else "keep-alive" if request.old else "")
            self._send(head if request.method == "HEAD" else head + response.body)
        else:
            keep = keep and not request.old  # nothing but chunks tells where it ends
            self._send(response.head("" if keep else "close", keep))
            for piece in response.pieces:
                if piece:
                    self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if keep else piece)
            if keep:
                self._send(b"0\r\n\r\n")
        self.close_connection = not keep

    def _read(self) -> Tuple[Request, bool]:
        """The next request, and whether another may follow; BadRequest, EOFError, OSError."""
        stream, server = self.stream, self.server
        if not stream.buffer:  # the first byte has a deadline of its own
            server.idle.add(stream)
            stream.allow(IDLE_SECONDS)
            try:
                if server.ending:
                    raise EOFError
                stream.buffer = stream.more()
            finally:
                server.idle.discard(stream)
        if b"\r\n\r\n" not in stream.buffer:
            stream.allow(HEAD_SECONDS)
        if stream.buffer.startswith(b"\r\n"):
            stream.buffer = stream.buffer[2:]  # RFC 9112 2.2: old clients' extra line
        try:
            line, block = stream.head()
        except TimeoutError:
            raise BadRequest(408, f"request head took over {HEAD_SECONDS:g} s") from None
        found = REQUEST_LINE.fullmatch(line)
        if not found:
            if re.fullmatch(rb"\S+ \S+ HTTP/(?!1)[0-9]\.[0-9]", line):
                raise BadRequest(505, "only HTTP/1.0 and HTTP/1.1")
            raise BadRequest(400, "broken request line")
        method, target, minor = found.groups()
        old, fields = minor == b"0", parse_fields(block)
        # Only HTTP/1.1 must have a Host (RFC 9112 3.2); health checks by HTTP/1.0 leave it out.
        if ("host" in fields or not old) and not host_name(fields.get("host", "")):
            raise BadRequest(400, "no host field, or a broken one")
        whole = None if target[:1] == b"/" else re.fullmatch(
            rb"[A-Za-z]+://([^/?]*)/?(.*)", target)
        if whole:  # its authority counts, whatever Host says (RFC 9112 3.2.2)
            fields = {**fields, "host": whole.group(1).decode("latin-1")}
            if not host_name(fields["host"]):
                raise BadRequest(400, "broken host in the request line")
            target = b"/" + whole.group(2)
        elif target == b"*" and method != b"OPTIONS":
            raise BadRequest(400, "only OPTIONS takes *")
        has_body = "content-length" in fields or "transfer-encoding" in fields
        body = self._read_body(fields, old) if has_body else b""
        stream.until = math.inf
        wish = fields.get("connection", "").lower()
        return Request(method.decode(), target.decode("utf-8", "surrogateescape"), fields, body,
                       self.client_address[0], self.connection, old, self._wait
                       ), "close" not in wish and (not old or "keep-alive" in wish)

    def _read_body(self, fields: Fields, old: bool) -> bytes:
        length, limit = body_length(fields), self.server.body_limit
        if length == 0:
            return b""
        if length == CHUNKED and old:
            raise BadRequest(400, "transfer-encoding in HTTP/1.0")
        if length > limit:
            raise BadRequest(413, f"body over {limit} bytes")
        if "expect" in fields and not old:
            if fields["expect"].lower() != "100-continue":
                raise BadRequest(417, "expect other than 100-continue")
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.stream.allow(BODY_SECONDS)
        try:
            body = gather(self.stream.body(length), limit)
        except TimeoutError:
            raise BadRequest(408, f"request body took over {BODY_SECONDS:g} s") from None
        if len(body) > limit:
            raise BadRequest(413, f"body over {limit} bytes")
        return body

    def _wait(self, future: Future[Any], seconds: float) -> Any:
        REAPER.watch(self.connection, lambda: settle(future, Hangup()))
        self.server.waiting.add(future)
        try:
            return None if self.server.ending else result_of(future, seconds)
        finally:
            self.server.waiting.discard(future)
            REAPER.unwatch(self.connection)

    def _send(self, data: bytes) -> None:
        self.stream.allow(WRITE_SECONDS)
        self.connection.sendall(data)
        self.stream.until = math.inf

    def _refuse(self, error: BadRequest) -> None:
        """Answer with an error, and let the caller read it before the connection ends."""
        response = error_response(error)
        self.server.app.metrics.count("", response.status)
        self.stream.allow(1.0)
        self.connection.sendall(response.head("close") + response.body)
        self.stream.shut(socket.SHUT_WR)
        for _ in range(256):
            self.stream.more()


class Server(ThreadingHTTPServer):
    """The HTTP server of a listening socket, which it owns, with a thread per connection.
    serve_forever() sleeps until a connection comes or shutdown() is called; that of the base class
    polls twice a second, which costs 1.5 % of a core for a hundred idle processes."""

    def __init__(self, listener: socket.socket, app: App, log: Log, max_connections: int,
                 body_limit: int = BODY_LIMIT) -> None:
        super().__init__(listener.getsockname(), Connection, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.socket.setblocking(False)
        self.app, self.log, self.body_limit, self.ending = app, log, body_limit, False
        self.debug: Optional[Callable[[str], None]] = None
        self.waiting: Set[Future[Any]] = set()  # callers wait for them; add and discard only
        self.idle: Set[Stream] = set()         # between two requests; add and discard only
        self._max = min(max_connections, room_for_connections())
        if self._max < max_connections:
            log.warn(f"{self._max} connections at once instead of {max_connections}: the system "
                     "allows no more open files (ulimit -n)")
        self._pool = ThreadPool(self._max, "http", log, linger=3.0)
        self.connections: Set[socket.socket] = set()  # add and discard only
        self._wake_reader, self._wake_writer = socket_pair()
        self._wake_writer.setblocking(False)

    def serve_forever(self, poll_interval: float = 0.0) -> None:
        """Take connections until shutdown(); `poll_interval` is of no use here."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while not self.ending:
                try:
                    sock, address = self.socket.accept()
                    if len(self.connections) < self._max:
                        sock.setblocking(True)  # on macOS it inherits the listener's mode
                        self.connections.add(sock)
                        self._pool.submit(Connection, sock, address, self)
                        continue
                    busy = error_response(BadRequest(503, "too many connections"))
                    self.app.metrics.count("", busy.status)
                    sock.setblocking(False)
                    with sock, contextlib.suppress(OSError):
                        sock.send(busy.head("close") + busy.body)
                except BlockingIOError:
                    with contextlib.suppress(OSError):  # the listener was closed just now
                        selector.select()
                except ConnectionAbortedError:
                    pass
                except OSError as error:
                    if not self.ending:
                        self.log.warn(f"a connection could not be taken: {error.strerror}")
                        time.sleep(0.1)  # no descriptors are left: the loop would spin

    def close_down(self) -> bool:
        """shutdown(); whether a caller is still to read an answer."""
        busy = len(self.connections) > len(self.idle)
        self.shutdown()
        return busy

    def shutdown(self) -> None:
        """Accept no more connections, answer callers who wait for events, end idle connections."""
        self.ending = True
        self._wake_writer.send(b"!")
        self.socket.close()
        for future in list(self.waiting):
            settle(future, None)
        for stream in list(self.idle):
            stream.shut(socket.SHUT_RD)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Refuse a port that is taken, but not one with connections in TIME_WAIT; on Windows
        # SO_REUSEADDR means something else.
        sock.setsockopt(socket.SOL_SOCKET,
                        getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
        sock.bind((host.strip("[]"), port))
        sock.listen(1024)  # with 128, a thousand callers who come at once would wait 7 s
    except BaseException:
        sock.close()
        raise
    return sock


# ------------------------------------------------------------------------------------------------
# 8. HTTP out
# ------------------------------------------------------------------------------------------------

LINE_SECONDS = 5.0               # how long; a new one on this machine costs 0.1 ms
CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 1.0           # before a proxied call watches its caller as well
# Where clouds tell machines their secrets; link-local addresses are refused as well (DESIGN).
METADATA = [socket.inet_aton("100.100.100.200"), socket.inet_aton("192.0.0.192"),
            socket.inet_aton("168.63.129.16"),
            socket.inet_pton(socket.AF_INET6, "fd00:42::42"),
            socket.inet_pton(socket.AF_INET6, "fd20:ce::254")]
METADATA_NET = socket.inet_pton(socket.AF_INET6, "fd00:ec2::")[:4]  # ::254, ::23 with pods' keys
V4_IN_V6 = [socket.inet_pton(socket.AF_INET6, prefix)[:12] for prefix in (
    "::ffff:0:0", "::", "::ffff:0:0:0", "64:ff9b::", "64:ff9b:1::")]  # an IPv4 address follows


def is_forbidden(address: str) -> bool:
    """Whether a numeric address, in any spelling, is link-local or a metadata service."""
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
        if packed[:12] in V4_IN_V6:
            packed = packed[12:]
        elif packed[:2] == b"\x20\x02":  # 6to4: 2002:v4::
            packed = packed[2:6]
    else:
        packed = socket.inet_aton(address)
    link_local = (packed[:2] == b"\xa9\xfe" if len(packed) == 4
                  else b"\xfe\x80" <= packed[:2] <= b"\xfe\xbf")
    return link_local or packed in METADATA or packed[:4] == METADATA_NET


@functools.lru_cache(maxsize=256)  # the same few are called all day
def split_origin(origin: str) -> Tuple[str, str, str]:
    """Scheme, host:port and Authorization of `http://user:secret@host:port`; ValueError."""
    scheme, host, _ = origin_of(origin)
    user, _, netloc = urllib.parse.urlsplit(origin).netloc.rpartition("@")
    if not host.isascii():  # the codec alone takes 0.4 MiB
        netloc = netloc.encode("idna").decode()
    if not user:
        return scheme, netloc, ""
    secret = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    return scheme, netloc, "Basic " + secret


def origin_of(url: str) -> Tuple[str, str, int]:
    """Scheme, host and port that a URL leads to; ValueError if it is none of http(s)."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http(s) URL")
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


def is_url(text: str) -> bool:
    """Whether a text begins like an http(s) URL."""
    return re.match("(?i)https?://", text) is not None


def with_params(url: str, **params: str) -> str:
    """A URL with parameters added to its query; those with the same name are replaced."""
    parts = urllib.parse.urlsplit(url)
    kept = [pair for pair in parts.query.split("&")
            if pair and pair.partition("=")[0] not in params]
    query = "&".join([*kept, urllib.parse.urlencode(params)])
    return urllib.parse.urlunsplit(parts._replace(query=query))


def beneath(url: str, path: str) -> str:
    """The URL of a path below another URL; the query stays."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(path=parts.path.rstrip("/") + path, fragment=""))


class Call(urllib.request.Request):
    """An outgoing request; arguments as for fetch(). ValueError if it is not an http(s) URL."""

    SAFE = "!#$%&'()*+,/:;=?@[]~|^`{}\"<>"
    PARTS = re.compile("([A-Za-z]+://[^/?#]*|)([^#]*)")  # origin, target
    PLAIN = re.compile(r"[\x21-\x7e]*")
    timeout: float                # set by the opener
    _tunnel_host: Optional[str]   # by urllib, for a proxy's sake

    def __init__(self, url: str, method: str, fields: Mapping[str, str], body: Optional[bytes],
                 caller: Optional[socket.socket], repeat: bool, patience: float) -> None:
        origin, target = self.PARTS.findall(url)[0]
        scheme, self.own_host, secret = split_origin(origin)
        if not self.PLAIN.fullmatch(target):
            target = urllib.parse.quote(target, safe=self.SAFE, errors="surrogateescape")
        # What Request.__init__ would set, which parses once more: 6 of a proxied call's 40 µs.
        self.type, self.host, self.origin_req_host = scheme, self.own_host, self.own_host
        self.selector = target if target.startswith("/") else "/" + target
        self._full_url = f"{scheme}://{self.own_host}{self.selector}"
        self.fragment = self._tunnel_host = None
        self.headers, self.unredirected_hdrs = {}, {}
        self._data, self.method, self.unverifiable = body, method, False
        self.fields = dict(fields)
        if secret:
            self.fields.setdefault("Authorization", secret)
        self.caller, self.repeat, self.patience = caller, repeat, patience

    def to_bytes(self) -> bytes:
        """Head and body; ValueError if a field would become two."""
        body = self._data or b""
        lines = [f"{self.method} {self.selector} HTTP/1.1",
                 f"Host: {self._tunnel_host or self.own_host}"]
        # The headers that urllib added are for a proxy: they must not go through a tunnel.
        fields = self.fields if self._tunnel_host else {**self.headers, **self.fields}
        lines += map(": ".join, fields.items())
        if body or self.method not in ("GET", "HEAD", "OPTIONS"):
            lines.append(f"Content-Length: {len(body)}")
        return head_of(lines) + body


class ConnectionPool:
    """Kept connections, for the next request to the same server; the last used one is taken first.
    They are closed after LINE_SECONDS: servers that end would leave sockets in CLOSE-WAIT."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        # By scheme, host and tunnel: since when, and the socket; the oldest first.
        self._idle: Dict[Tuple[Any, ...], List[Tuple[float, socket.socket]]] = {}
        self._count = self._most = 0
        self.until = math.inf          # when the oldest is to be closed

    def _remove(self, key: Tuple[Any, ...], at: int) -> Tuple[float, socket.socket]:
        found = self._idle[key].pop(at)
        if not self._idle[key]:
            del self._idle[key]
        self._count -= 1
        return found

    def take(self, key: Tuple[Any, ...], unseen: bool = False) -> Optional[socket.socket]:
        """A connection that seems alive, or None; with `unseen` that is not checked."""
        while True:
            with self._lock:
                if key not in self._idle:
                    return None
                since, sock = self._remove(key, -1)
            if time.monotonic() - since < LINE_SECONDS and (unseen or not has_ended(sock)):
                return sock
            sock.close()

    def give(self, key: Tuple[Any, ...], sock: socket.socket) -> None:
        """Keep a connection whose answer was read to its end."""
        now, oldest = time.monotonic(), None
        with self._lock:
            self._idle.setdefault(key, []).append((now, sock))
            self._count += 1
            # A sixth of all connections that there may be: the rest is for callers.
            self._most = self._most or max(1, room_for_connections() // 6)
            if len(self._idle[key]) > 64:
                oldest = self._remove(key, 0)[1]
            elif self._count > self._most:
                oldest = self._remove(min(self._idle, key=lambda key: self._idle[key][0][0]), 0)[1]
            begin = self.until == math.inf
            if begin:
                self.until = now + LINE_SECONDS
        if begin:
            REAPER.add(self)
            REAPER.expect(self.until)
        if oldest:
            oldest.close()

    def drop(self, host: str = "", due: float = math.inf) -> bool:
        """Close the connections to a server that has ended, or to all, that were last used before
        `due`; whether there were any."""
        gone = []
        with self._lock:
            for key in [key for key in self._idle if not host or key[1] == host]:
                while key in self._idle and self._idle[key][0][0] <= due:
                    gone.append(self._remove(key, 0)[1])
            self.until = LINE_SECONDS + min(
                [waiting[0][0] for waiting in self._idle.values()], default=math.inf)
        for sock in gone:
            sock.close()
        return bool(gone)

    def expire(self) -> None:
        """Called by the reaper."""
        self.drop(due=time.monotonic() - LINE_SECONDS)


class Reply(Stream):
    """An incoming answer, whose body is read once. If it takes longer than the call's `patience`,
    the caller is watched as well; that costs too much for each call."""

    status: int
    fields: Fields

    def __init__(self, sock: socket.socket, key: Tuple[Any, ...], call: Call) -> None:
        super().__init__(sock)
        self._key, self._call = key, call
        self._patience = call.patience if call.caller else math.inf  # inf: or is watched already
        self._idle: Optional[Tuple[float, Callable[[], None]]] = None  # see pieces()
        self._told: Optional[int] = None  # length as body() wants it
        self._keep = self._is_read = self._is_closed = False

    def expire(self) -> None:
        caller = self._call.caller
        if caller is None or self._patience == math.inf:
            return super().expire()
        self._patience = math.inf
        self.until += self._call.timeout
        REAPER.watch(caller, self._leave)

    def _leave(self) -> None:
        self.cause = self.cause or Hangup()
        self.shut()

    def more(self) -> bytes:
        if self._idle:
            seconds, idle = self._idle
            self.until = math.inf
            while not is_readable(self.sock, seconds):
                idle()
            self.allow(seconds)
        return super().more()

    def ask(self, data: bytes) -> "Reply":
        """Send the call, and return when the answer's head is there."""
        try:
            self.allow(min(self._call.timeout, self._patience))
            self.send(data)
            while True:  # after 1xx another head follows
                line, block = self.head()
                found = STATUS_LINE.fullmatch(line)
                if not found:
                    raise BadRequest(400, "the answer is not HTTP")
                self.status = int(found.group(2))
                if self.status >= 200 or (self.status == 101 and "Upgrade" in self._call.fields):
                    break
            self.fields = parse_fields(block)
            # Without a length, and not chunked, it ends with the connection (RFC 9112 6.3).
            if self._call.method == "HEAD" or self.status in (204, 304):
                self._told = 0
            elif self.status != 101 and ("content-length" in self.fields
                                         or "transfer-encoding" in self.fields):
                self._told = body_length(self.fields)
            wish = self.fields.get("connection", "").lower()
            self._keep = (self._told is not None and "close" not in wish
                          and (found.group(1) == b"1" or "keep-alive" in wish))
            if self._told == 0:
                self._is_read = True
                self.close()
            return self
        except BaseException as error:
            self.close()
            if isinstance(error, (EOFError, OSError, BadRequest)):
                raise _out_error(error, True) from None
            raise

    @property
    def length(self) -> Optional[int]:
        """The body's, if it was told."""
        return None if self._told == CHUNKED else self._told

    @property
    def kind(self) -> str:
        """The media type, without parameters."""
        return self.fields.get("content-type", "").partition(";")[0].strip().lower()

    def read(self, limit: int = ANSWER_LIMIT) -> bytes:
        """The body, at most `limit` bytes of it; Unreachable if it breaks off."""
        return gather(self.pieces(), limit)[:limit]

    def pieces(self, seconds: Optional[float] = None,
               idle: Optional[Callable[[], None]] = None) -> Iterator[bytes]:
        """The body as it comes. With `seconds` each piece may take so long, else all together;
        idle() is called after so much silence, and may raise. Unreachable, TooSlow, Hangup."""
        self._idle = (seconds, idle) if seconds and idle else None
        try:
            for piece in self.body(self._told):
                yield piece
                if seconds is not None:
                    self.allow(min(seconds, self._patience))
            self._is_read = True
        except (EOFError, OSError, BadRequest) as error:
            raise _out_error(error, True) from None
        finally:
            self.close()

    def close(self) -> None:
        """Keep the connection for the next call, if the answer was read to its end and the server
        keeps it too; else hang up. From any thread."""
        with REAPER.lock:
            if self._is_closed:
                return
            self._is_closed = True
            REAPER.remove(self)
            if self._call.caller is not None and self._patience == math.inf:
                REAPER.unwatch(self._call.caller)
        if self._is_read and self._keep and not self.buffer:
            TRANSPORT.pool.give(self._key, self.sock)
        else:
            super().close()


def _out_error(error: Exception, sent: bool) -> Unreachable:
    if isinstance(error, TimeoutError):
        return TooSlow("no answer in time", sent)
    if isinstance(error, EOFError):
        return Unreachable("the connection ended before the answer did", sent)
    if isinstance(error, socket.gaierror):
        return Unreachable("unknown host", sent)
    return Unreachable(getattr(error, "strerror", None) or str(error), sent)


class Transport(urllib.request.BaseHandler):
    """The opener's handler of http and https: kept connections, checked addresses, total deadlines.
    With urllib's own handler, which keeps none, 3,300 calls a second are proxied, not 15,400."""

    def __init__(self) -> None:
        self.pool = ConnectionPool()
        self._tls: Any = None

    def http_open(self, call: Call) -> Reply:
        """The answer to a call; Unreachable, TooSlow, Hangup. If a kept connection turns out to be
        dead, the call is repeated on a new one only if it reads, and no byte of an answer came: of
        others nobody knows whether they were done."""
        key = (call.type, call.host, call._tunnel_host)
        data = call.to_bytes()
        sock = self.pool.take(key, call.repeat)
        if sock is not None:
            reply = Reply(sock, key, call)
            try:
                return reply.ask(data)
            except TooSlow:
                raise
            except Unreachable:
                if not call.repeat or reply.buffer:
                    raise
        until = time.monotonic() + min(CONNECT_SECONDS, call.timeout)
        parts = urllib.parse.urlsplit("//" + call.host)
        if not parts.hostname:
            raise Unreachable("a URL without a host")
        port = parts.port or (443 if call.type == "https" else 80)
        try:
            try:
                sock = connect(parts.hostname, port, until)
            except OSError as error:
                if error.errno != errno.EMFILE or not self.pool.drop():
                    raise
                sock = connect(parts.hostname, port, until)  # without the kept connections
            if call.type == "https":
                sock = self._secure(sock, call, until)
        except OSError as error:
            raise _out_error(error, False) from None
        return Reply(sock, key, call).ask(data)

    https_open = http_open

    def _secure(self, sock: socket.socket, call: Call, until: float) -> socket.socket:
        """Start TLS, through a proxy's tunnel if there is one. OSError, Unreachable."""
        import ssl
        target = call._tunnel_host or call.host
        try:
            sock.settimeout(max(0.1, until - time.monotonic()))
            if call._tunnel_host:  # RFC 9110 9.3.6
                where = target if re.search(r":[0-9]+$", target) else target + ":443"
                secret = call.headers.get("Proxy-authorization")
                proof = f"Proxy-Authorization: {secret}\r\n" if secret else ""
                sock.sendall(f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n{proof}\r\n".encode(
                    "latin-1"))
                answer = b""
                while b"\r\n\r\n" not in answer and len(answer) < HEAD_LIMIT:
                    answer += sock.recv(1) or b"\r\n\r\n"
                if not re.match(rb"HTTP/1\.[01] 2", answer):
                    raise Unreachable("the proxy does not let through")
            self._tls = self._tls or ssl.create_default_context()
            name = urllib.parse.urlsplit("//" + target).hostname
            wrapped: socket.socket = self._tls.wrap_socket(sock, server_hostname=name)
            wrapped.settimeout(None)
            return wrapped
        except BaseException:
            sock.close()
            raise


def connect(host: str, port: int, until: float) -> socket.socket:
    """A socket connected to the first address that answers and is not forbidden. The name is looked
    up once only, so that the address checked is the one used. OSError, Unreachable."""
    failure: Exception = Unreachable("unknown host")
    for family, kind, protocol, _, address in socket.getaddrinfo(host.encode(), port, 0,
                                                                 socket.SOCK_STREAM):
        if is_forbidden(str(address[0])):
            failure = Unreachable("link-local and metadata addresses are not called")
            continue
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.1, until - time.monotonic()))
            sock.connect(address)
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)  # a heartbeat waits long
            return sock
        except OSError as error:
            sock.close()
            failure = TimeoutError() if isinstance(error, socket.timeout) else error
    raise failure


def addresses_of(host: str) -> List[str]:
    """The numeric addresses of a name; none if it is unknown."""
    try:
        name = host.encode() if host.isascii() else host.encode("idna")
        return [str(row[4][0]) for row in socket.getaddrinfo(name, 0, 0, socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []


def is_own(address: str) -> bool:
    """Whether a numeric address belongs to this machine: only then it can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


class Proxies(urllib.request.ProxyHandler):
    """The proxies of the environment, but never for calls to this machine."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> None:
        """Set the proxy in the request; Transport does the rest."""
        host = urllib.parse.urlsplit("//" + req.host).hostname or ""
        with contextlib.suppress(OSError):  # it is a name: the proxy looks it up
            if is_forbidden(host):
                return
        if not is_loopback(host):
            super().proxy_open(req, proxy, type)


TRANSPORT = Transport()
OPENER = urllib.request.OpenerDirector()
OPENER.add_handler(Proxies())
OPENER.add_handler(TRANSPORT)


def fetch(url: str, method: str = "GET", fields: Optional[Mapping[str, str]] = None,
          body: Optional[bytes] = None, seconds: float = 30.0,
          caller: Optional[socket.socket] = None, repeat: bool = False,
          patience: float = PATIENCE_SECONDS) -> Reply:
    """Call a URL: the answer, whatever its status; redirects are not followed. Unreachable (`sent`:
    the server may have acted); TooSlow.

    `seconds` limits all of it, the body included. Hangup is raised when the peer of the socket
    `caller` hangs up, which is noticed after `patience` seconds. `repeat`: the call only reads, and
    may be sent twice.
    """
    try:
        call = Call(url, method, fields or {}, body, caller, repeat, patience)
        reply: Reply = OPENER.open(call, timeout=seconds)
        return reply
    except ValueError as error:
        raise Unreachable(str(error)) from None


class WebSocket:
    """A WebSocket to a server (RFC 6455). run() gives each message to heard(data). When nothing
    comes it sends a ping and calls silence(), which may raise; after three LOOK_SECONDS it ends."""

    LOOK_SECONDS = BRIDGE_SECONDS / 2  # a connection that a router has dropped is silent, too
    PART, TEXT, CLOSE, PING, PONG = 0, 1, 8, 9, 10

    def __init__(self, url: str, fields: Mapping[str, str], heard: Callable[[bytes], None],
                 silence: Callable[[], None] = lambda: None) -> None:
        """Shake hands (4.1); Unreachable, AuthFailure."""
        self._heard, self._silence = heard, silence
        # Held while the connection is read or written: TLS allows only one thread.
        self._lock = threading.Lock()
        self._closing = False
        key = base64.b64encode(os.urandom(16)).decode()
        reply = fetch("http" + url[2:], "GET", {
            **fields, "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": key,
            "Sec-WebSocket-Version": "13"}, seconds=CONNECT_SECONDS, repeat=True)
        import hashlib
        digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        proof = reply.fields.get("sec-websocket-accept", "")
        if reply.status != 101 or proof != base64.b64encode(digest).decode():
            reply.close()
            raise (AuthFailure() if reply.status in (401, 403) else
                   Unreachable(f"no WebSocket there (it answers {reply.status})"))
        reply.until = math.inf
        self._line, self._buffer = reply, bytearray(reply.buffer)
        self._look, self._silent = 0.0, 0  # when to check again; how often there was nothing

    def run(self) -> None:
        """Work until the connection ends; always raises Unreachable, which says why."""
        farewell, parts, kind = 1000, bytearray(), self.PART
        self._look = time.monotonic() + self.LOOK_SECONDS
        try:
            while True:
                first, length = self._exactly(2)
                is_last, code = first & 0x80, first & 0x0f
                if first & 0x70 or length & 0x80 or code not in (0, 1, 2, 8, 9, 10):
                    raise BadRequest(400, "not a WebSocket frame of a server")
                if length >= 126:
                    length = int.from_bytes(self._exactly(2 if length == 126 else 8), "big")
                if code >= self.CLOSE and (length > 125 or not is_last):
                    raise BadRequest(400, "a control frame that is too long or in parts")
                if length + len(parts) > BRIDGE_LIMIT:
                    raise BadRequest(413, f"a message of over {BRIDGE_LIMIT} bytes")
                payload = self._exactly(length)
                if code == self.CLOSE:
                    why = " ".join(CONTROLS.sub(
                        " ", payload[2:].decode("utf-8", "replace")).split())
                    raise Unreachable("the other side closed the connection"
                                      + (f": {why}" if why else ""))
                if code > self.CLOSE:  # these may come between the parts of a message
                    self._silent = 0
                    if code == self.PING:
                        self.send(payload, self.PONG)
                    continue
                if (code == self.PART) != (kind != self.PART):
                    raise BadRequest(400, "parts of a message in the wrong order")
                kind = kind or code
                parts += payload
                if is_last:
                    self._silent = 0
                    self._heard(bytes(parts))
                    parts, kind = bytearray(), self.PART
        except BadRequest as error:
            farewell = 1009 if error.http == 413 else 1002
            raise Unreachable(error.status) from None
        finally:
            with contextlib.suppress(Unreachable):  # the connection may be gone
                self.send(struct.pack("!H", farewell), self.CLOSE)
            self._line.close()

    def _exactly(self, length: int) -> bytes:
        """Read so many bytes, however long that takes, while there are signs of life."""
        while len(self._buffer) < length:
            if time.monotonic() >= self._look:
                self._look, self._silent = self._look + self.LOOK_SECONDS, self._silent + 1
                if self._silent > 2:
                    raise TooSlow("no sign of life")
                if self._silent == 2:
                    self.send(b"", self.PING)
                    self._silence()
            if is_readable(self._line.sock, max(0.0, self._look - time.monotonic())):
                with self._lock:
                    try:
                        self._line.allow(BRIDGE_SECONDS)
                        data = self._line.more()
                    except EOFError:
                        raise Unreachable("the connection was closed" if self._closing else
                                          "the connection was ended by the other side") from None
                    except OSError as error:
                        raise _out_error(error, True) from None
                    self._line.until = math.inf
                if len(data) > 127:
                    self._silent = 0  # but half a frame may stand still: a pong is no sign of life
                self._buffer += data
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    def send(self, payload: bytes, code: int = TEXT) -> None:
        """Send a message, masked and in one part, from any thread. Unreachable."""
        length, first = len(payload), 0x80 | code
        if length < 126:
            head = bytes([first, 0x80 | length])
        elif length < 65_536:
            head = struct.pack("!BBH", first, 0x80 | 126, length)
        else:
            head = struct.pack("!BBQ", first, 0x80 | 127, length)
        mask = os.urandom(4)
        stream = (mask * (length // 4 + 1))[:length]
        masked = int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")
        with self._lock:
            try:
                self._line.allow(BRIDGE_SECONDS)
                self._line.send(head + mask + masked.to_bytes(length, "big"))
                self._line.until = math.inf
            except OSError as error:
                self._line.shut()  # so that run() ends
                raise _out_error(error, True) from None

    def close(self) -> None:
        """Let run() send a close frame and end. From any thread."""
        self._closing = True
        self._line.shut(socket.SHUT_RD)


# ------------------------------------------------------------------------------------------------
# A. QR encoder
# ------------------------------------------------------------------------------------------------

# Clauses, tables and figures are those of ISO/IEC 18004:2015. A symbol is a list of rows; a module
# is 1 for dark, 0 for light, and while it is drawn QR_FREE where data are still to come.
QR_FREE = 2

# Error correction level M, versions 1..40: how many bytes of text fit in (table 7); the number of
# check codewords in each block, and the number of blocks (table 9).
QR_ROOM = (
    14, 26, 42, 62, 84, 106, 122, 152, 180, 213, 251, 287, 331, 362, 412, 450, 504, 560, 624, 666,
    711, 779, 857, 911, 997, 1059, 1125, 1190, 1264, 1370, 1452, 1538, 1628, 1722, 1809, 1911,
    1989, 2099, 2213, 2331)
QR_CHECKS = bytes((
    10, 16, 26, 18, 24, 16, 18, 22, 22, 26, 30, 22, 22, 24, 24, 28, 28, 26, 26, 26,
    26, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28))
QR_BLOCKS = bytes((
    1, 1, 1, 2, 2, 4, 4, 4, 5, 5, 5, 8, 9, 9, 10, 10, 11, 13, 14, 16,
    17, 17, 18, 20, 21, 23, 25, 26, 28, 29, 31, 33, 35, 37, 38, 40, 43, 45, 47, 49))

QR_MASKS: List[Callable[[int, int], int]] = [  # table 10: what is 0 is flipped; row, column
    lambda i, j: (i + j) % 2,
    lambda i, j: i % 2,
    lambda i, j: j % 3,
    lambda i, j: (i + j) % 3,
    lambda i, j: (i // 2 + j // 3) % 2,
    lambda i, j: i * j % 2 + i * j % 3,
    lambda i, j: (i * j % 2 + i * j % 3) % 2,
    lambda i, j: ((i + j) % 2 + i * j % 3) % 2]

# What costs a mask points (7.8.3), in a row or column.
QR_RUN = re.compile(rb"\x00{5,}|\x01{5,}")
QR_SQUARES = re.compile(rb"\x00{2,}|\x02{2,}")  # in the sums of two rows
QR_FINDER = re.compile(rb"(?=\x01\x00\x01\x01\x01\x00\x01)(?:(?<=\x00{4})|(?=.{7}\x00{4}))", re.S)


def qr_matrix(text: str) -> List[bytearray]:
    """A text as a QR code without quiet zone, of the smallest version and in byte mode (clause 7).

    It is UTF-8 without an ECI header, though the standard's default is ISO 8859-1: scanners detect
    UTF-8, but not all know the header. ValueError: it exceeds 2331 bytes, or is no valid Unicode.
    """
    payload = text.encode("utf-8")
    if len(payload) > QR_ROOM[-1]:
        raise ValueError(f"text of {len(payload)} bytes does not fit into a QR code: "
                         f"shorten it to {QR_ROOM[-1]} bytes of UTF-8 or fewer")
    version = 1 + bisect.bisect_left(QR_ROOM, len(payload))
    grid = qr_patterns(version)
    side = len(grid)
    # Data go up and down in columns of two, from the right (7.7.3); the vertical timing pattern
    # in column 6 belongs to none of them.
    free = [(y, x) for turn, right in enumerate((*range(side - 1, 6, -2), 5, 3, 1))
            for y in (range(side) if turn % 2 else range(side - 1, -1, -1))
            for x in (right, right - 1) if grid[y][x] == QR_FREE]
    codewords = qr_codewords(payload, version)
    assert len(codewords) == len(free) // 8
    bits = "".join([f"{codeword:08b}" for codeword in codewords]).ljust(len(free), "0")
    drawn = []
    for number, mask in enumerate(QR_MASKS):
        candidate = [row[:] for row in grid]
        for (y, x), bit in zip(free, bits):
            candidate[y][x] = (bit == "1") ^ (mask(y, x) == 0)
        qr_draw_format(candidate, number)
        drawn.append(candidate)
    return min(drawn, key=qr_penalty)


def qr_codewords(payload: bytes, version: int) -> bytes:
    """The payload as codewords: data in blocks, then their checks (7.4 to 7.6)."""
    # Mode (4 bits), a count of 8 or 16, and terminator (4): no bit is left to align.
    count = f"{len(payload):0{2 if version < 10 else 4}x}"
    spare = QR_ROOM[version - 1] - len(payload)
    data = bytes.fromhex(f"4{count}{payload.hex()}0") + (b"\xec\x11" * spare)[:spare]
    # The field GF(256) modulo x^8 + x^4 + x^3 + x^2 + 1: the powers of 2, twice over so that a
    # sum of two logs needs no reduction, and the logs.
    powers = [1]
    for _ in range(509):
        powers.append(powers[-1] << 1 ^ (powers[-1] >> 7) * 0x11D)
    logs = {power: log for log, power in enumerate(powers[:255])}
    divisor = [1]                              # (x - 2^0) (x - 2^1) …, as many as checks
    for exponent in range(QR_CHECKS[version - 1]):
        divisor.append(0)
        for at in range(exponent + 1, 0, -1):
            divisor[at] ^= powers[logs[divisor[at - 1]] + exponent]
    terms = [logs[term] for term in divisor[1:]]

    blocks, checks = [], []
    for left in range(QR_BLOCKS[version - 1], 0, -1):
        size = len(data) // left               # so the last blocks are longer by one
        block, data = data[:size], data[size:]
        rest = bytearray(block) + bytes(len(terms))
        for at in range(size):
            if rest[at]:
                log = logs[rest[at]]
                for below, term in enumerate(terms, at + 1):
                    rest[below] ^= powers[log + term]
        blocks.append(block)
        checks.append(rest[size:])
    return bytes(block[at] for part in (blocks, checks) for at in range(len(part[-1]))
                 for block in part if at < len(block))


def qr_patterns(version: int) -> List[bytearray]:
    """A symbol with its function patterns only (6.3); the format is that of mask 0."""
    side = 17 + 4 * version
    grid = [bytearray([QR_FREE]) * side for _ in range(side)]
    for at in range(side):
        grid[6][at] = grid[at][6] = (at + 1) % 2
    # Concentric squares, innermost first: finders, and in a lattice the alignment patterns, whose
    # centres lie in even steps as short as reach the first gap (annex E).
    squares = [(y, x, "11010") for y, x in ((3, 3), (3, side - 4), (side - 4, 3))]
    if version > 1:
        gaps, last = version // 7 + 1, side - 7
        step = 26 if version == 32 else -(-(last - 6) // (2 * gaps)) * 2
        lattice = [6, *[last - step * gap for gap in range(gaps)]]
        squares += [(y, x, "101") for y in lattice for x in lattice
                    if (y, x) not in ((6, 6), (6, last), (last, 6))]
    for y, x, rings in squares:
        for i in range(max(0, y - len(rings) + 1), min(side, y + len(rings))):
            for j in range(max(0, x - len(rings) + 1), min(side, x + len(rings))):
                grid[i][j] = int(rings[max(abs(i - y), abs(j - x))])
    qr_draw_format(grid, 0)
    if version > 6:                            # its number (7.10), twice
        bits = qr_bch(version, 0x1F25)
        for at in range(18):
            i, j = at // 3, side - 11 + at % 3
            grid[i][j] = grid[j][i] = bits >> at & 1
    return grid


def qr_draw_format(grid: List[bytearray], mask: int) -> None:
    """Draw the number of a mask, for level M, and its copy (7.9, figure 25)."""
    bits, side = qr_bch(mask, 0x537) ^ 0x5412, len(grid)
    places = [(y, 8) for y in (0, 1, 2, 3, 4, 5, 7, 8)] + [(8, x) for x in (7, 5, 4, 3, 2, 1, 0)]
    copies = [(8, side - 1 - at) for at in range(8)] + [(side - 7 + at, 8) for at in range(7)]
    for at in range(15):
        for y, x in places[at], copies[at]:
            grid[y][x] = bits >> at & 1
    grid[side - 8][8] = 1


def qr_bch(value: int, divisor: int) -> int:
    """`value`, and behind it its remainder modulo `divisor`, over GF(2) (annexes C, D)."""
    degree = divisor.bit_length() - 1
    rest = value << degree
    while rest.bit_length() > degree:
        rest ^= divisor << rest.bit_length() - 1 - degree
    return value << degree | rest


def qr_penalty(grid: List[bytearray]) -> int:
    """What a masked symbol costs (7.8.3); the quiet zone does not count as light here."""
    cost = 0
    for line in map(bytes, (*grid, *zip(*grid))):
        cost += sum([len(run) - 2 for run in QR_RUN.findall(line)])
        cost += 40 * len(QR_FINDER.findall(line))
    for above, below in zip(grid, grid[1:]):   # 2 x 2 modules of one colour
        sums = bytes([upper + lower for upper, lower in zip(above, below)])
        cost += 3 * sum([len(run) - 1 for run in QR_SQUARES.findall(sums)])
    dark, total = sum(map(sum, grid)), len(grid) ** 2
    return cost + abs(20 * dark - 10 * total) // total * 10


def qr_png(matrix: List[bytearray], scale: int = 8, quiet: int = 4) -> bytes:
    """A symbol as a PNG file: greyscale, one bit per pixel, `scale` pixels per module, and a light
    border of `quiet` modules (clause 6.3.8 demands 4)."""
    rows = qr_bordered(matrix, quiet)
    width, lines = len(rows) * scale, []
    for row in rows:
        # Filter type 0, then eight pixels a byte. PNG counts light, QR counts dark.
        pixels = "".join(["01"[not dark] * scale for dark in row]).ljust(width + -width % 8, "0")
        lines += [b"\0" + int(pixels, 2).to_bytes(len(pixels) // 8, "big")] * scale
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", width, width, 1, 0, 0, 0, 0),
                  b"IDAT" + zlib.compress(b"".join(lines), 9), b"IEND"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png


def qr_unpng(png: bytes, scale: int = 8, quiet: int = 4) -> List[bytearray]:
    """Read a symbol back out of what `qr_png` made of it. ValueError: it is another picture."""
    width = int.from_bytes(png[16:20], "big")
    side, rest = divmod(width - 2 * quiet * scale, scale)
    start, end, stride = png.find(b"IDAT") + 4, png.rfind(b"IEND") - 8, 1 + (width + 7) // 8
    if rest or side not in range(21, 178, 4) or png[24:29] != b"\1\0\0\0\0" or start < 4:
        raise ValueError("not a QR code of this program")
    try:
        lines = zlib.decompressobj().decompress(png[start:end], width * stride)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(lines) != width * stride:
        raise ValueError("it is not whole")
    places = [(quiet + number) * scale for number in range(side)]
    return [bytearray(not lines[y * stride + 1 + x // 8] >> (7 - x % 8) & 1 for x in places)
            for y in places]


def qr_text(matrix: List[bytearray], quiet: int = 2) -> str:
    """A symbol for a terminal: lines of half blocks, each two rows of modules. Each sets black on
    white, or a dark theme would make a negative of it. A border of 2 is enough on a screen."""
    rows = qr_bordered(matrix, quiet)
    rows.append(bytearray(len(rows)))          # the number of rows is odd
    return "".join(["\x1b[30;47m" + "".join([" ▀▄█"[upper + 2 * lower]
                                             for upper, lower in zip(*pair)]) + "\x1b[0m\n"
                    for pair in zip(rows[::2], rows[1::2])])


def qr_bordered(matrix: List[bytearray], quiet: int) -> List[bytearray]:
    """The rows with `quiet` light modules on each of the four sides."""
    margin = [bytearray(len(matrix) + 2 * quiet) for _ in range(quiet)]
    return margin + [bytearray(quiet) + row + bytearray(quiet) for row in matrix] + margin


# ------------------------------------------------------------------------------------------------
# B. Pages
# ------------------------------------------------------------------------------------------------

PAGE_STYLE = """body{font:1.1em system-ui,sans-serif;max-width:40em;margin:2em auto;
padding:0 1em;color-scheme:light dark}button{font:inherit;padding:.6em 2em}
pre{overflow:auto;padding:1em;border:1px solid}"""

SCAN_BODY = """<h1>{account}</h1><p>登录确认 · Log in on this network as <b>{account}</b>?</p>
<form method="post" action="/local/confirm?client={client}">
<input type="hidden" name="ticket" value="{ticket}"><button>登录 · Log in</button></form>"""

SAY_BODY = "<h1>{title}</h1><p>{text}</p>"

INDEX_BODY = """<h1>OpenQQ</h1><p>{what} It serves the HTTP API below; the README has the rest.</p>
<pre>{lines}</pre>"""


HTML_CODES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})


def page(body: str, values: Mapping[str, str], status: int = 200) -> Response:
    """An HTML page that can load and run nothing; the values in its body are escaped."""
    safe = {name: value.translate(HTML_CODES) for name, value in values.items()}
    return html_response("zh", PAGE_STYLE, body.format(**safe), "form-action 'self'", status)


def dashboard(flavour: Type[Flavour], settings: Settings, account: str) -> Response:
    """The dashboard; `account` is that of a client alone, empty for a controller. It contains no
    secret, and gets all else from the API. Texts of others are only inserted as text; Trusted Types
    make sure of that."""
    config = to_bytes({
        "account": account, "controller": not account, "prefix": flavour.prefix,
        "guarded": bool(settings.token), "apis": list(flavour.apis),
        "settings": [[setting.name, setting.help, setting.shown(), setting.secret, setting.chinese]
                     for setting in SETTINGS.values() if setting.caller and not setting.idle]})
    data = config.decode().replace("<", "\\u003c")
    return html_response(
        "en", DASHBOARD_STYLE, f'{DASHBOARD_BODY}<script type="application/json" id="config">{data}'
        f'</script><script nonce="">{DASHBOARD_SCRIPT}</script>', "script-src 'nonce-'; "
        "connect-src 'self'; img-src blob:; form-action 'none'; require-trusted-types-for 'script'")


def html_response(lang: str, style: str, body: str, policy: str, status: int = 200) -> Response:
    """A page that nobody may frame, and that may only do what the policy lists. Each empty nonce
    attribute is filled in; values must not contain quotes."""
    nonce = base64.b64encode(os.urandom(12)).decode()
    text = ('<!doctype html><html lang="' + lang + '"><meta charset="utf-8"><meta name="viewport" '
            'content="width=device-width,initial-scale=1"><title>OpenQQ</title>'
            f'<style nonce="">{style}</style>{body}</html>')
    policy = (f"default-src 'none'; style-src 'nonce-'; {policy}; frame-ancestors 'none'; "
              "base-uri 'none'")
    return Response(
        text.replace('nonce=""', f'nonce="{nonce}"').encode(), "text/html; charset=utf-8", status,
        {"Content-Security-Policy": policy.replace("nonce-", "nonce-" + nonce),
         "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
         "Cache-Control": "no-store"})


DASHBOARD_STYLE = """
:root{color-scheme:light dark;scroll-padding-top:6rem;--soft:#5d6878;--line:#8886;--main:#1f5fbf;
--good:#187a3c;--wait:#96600a;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--soft:#98a4b5;--main:#78aaf5;--good:#62c987;
--wait:#e2b154;--bad:#f58b82}}
*{box-sizing:border-box}[hidden]{display:none!important}
body{max-width:76rem;margin:0 auto;padding:0 .75rem .75rem;background:Canvas;
font:15px/1.45 system-ui,"PingFang SC","Microsoft YaHei",sans-serif;overflow-wrap:anywhere}
header{position:sticky;top:0;z-index:1;padding:.75rem 0;background:Canvas;display:flex;
align-items:baseline;gap:0 .75rem;flex-wrap:wrap}
h1,h2,h3{font-size:1.05rem;margin:0}h2{margin-bottom:.6rem}ol,ul{padding:0}li{list-style:none}
main,.column,#accounts{display:grid;gap:.75rem;grid-template-columns:minmax(0,1fr)}
@media(min-width:60rem){main{grid-template-columns:minmax(0,5fr) minmax(0,6fr);align-items:start}}
.box,#talk,#talk li,.tag{border:1px solid var(--line);border-radius:9px}.box{padding:.9rem}
.box p,.box ul,.box ol{margin:.3rem 0}
.facts,small,time,.tag,.stop,.unknown{color:var(--soft)}
.facts,small,time,.tag,.state,.error,.small{font-size:.85rem}
.running,.on{color:var(--good)}.scaning,.confirming,.updating,.off{color:var(--wait)}
.error,.failed{color:var(--bad)}.state::before{content:"●";margin-right:.3em}
.row,#members li{display:flex;flex-wrap:wrap;gap:.45rem;align-items:center}
article h3{flex:1}.grow{flex:1 1 8rem;min-width:0}#chat form,#group{margin-top:.45rem}
.code{display:block;width:13rem;max-width:100%;image-rendering:pixelated}
button,input,select{font:inherit;color:inherit;border:1px solid var(--line);border-radius:7px;
padding:.35rem .7rem;background:none;max-width:100%}option{background:Canvas}
input,select{width:100%}.row .grow{width:0}.row #minutes{width:5rem}
button{cursor:pointer}button:disabled{opacity:.5}button.main{border-color:var(--main)}
button.main,summary{color:var(--main)}button.small{padding:.05rem .5rem}
label,label small,#events .text{display:block}label{margin:.45rem 0}summary{cursor:pointer}
#said{flex:1 1 16rem;margin:0}#said,#group .row{min-height:1.45em}
#events li{border-top:1px solid var(--line);padding:.4rem 0}.text,.error{white-space:pre-wrap}
#events,#members{max-height:32rem;overflow:auto}.tag{padding:0 .35em}
#talk{height:14rem;overflow:auto}.box #talk{padding:.5rem}#talk li{width:fit-content;
max-width:90%;padding:.25rem .6rem;margin-bottom:.4rem}#talk .text{display:block}
#talk li.mine{margin-left:auto;border-color:var(--main)}
"""

DASHBOARD_BODY = """
<header><h1>OpenQQ</h1><span id="live" class="state off" data-t>connecting</span>
<p id="said" role="status" aria-live="polite"></p></header>
<form id="lock" hidden><div class="box"><h2 data-t>Access</h2><p id="why"></p>
<div id="key" class="row"><input id="token" class="grow" type="password" autocomplete="off"
aria-label="token"><button class="main" data-t>Open</button></div></div></form>
<main id="main" hidden><div class="column">
<section class="box"><h2 data-t>Accounts</h2>
<p id="away" class="error" data-t hidden>The server does not answer: this is how it was.</p>
<div id="accounts"></div>
<p id="nobody" class="facts" data-t hidden>There is no account yet: start one below.</p></section>
<form id="begin" class="box" autocomplete="off"><h2 data-t>Start an account</h2>
<div class="row"><input id="name" class="grow" maxlength="64" required>
<button class="main" data-t>Start</button>
<button id="real" class="main" value="ilink" data-t hidden>Start with real WeChat</button></div>
<details><summary data-t>Real QQ, through a bridge</summary><div id="bridge"></div></details>
<details><summary data-t>Settings</summary><div id="settings"></div></details></form>
</div><div class="column">
<section class="box" id="chat"><h2 data-t>Chat</h2>
<div class="row"><label class="grow"><small data-t>I speak as</small><select id="speaker"></select>
</label><label class="grow"><small data-t>to</small><select id="peer"></select></label></div>
<ol id="talk"></ol><form id="say" class="row"><input id="content" class="grow" required
autocomplete="off"><button class="main" data-t>Send</button></form>
<div id="group" hidden><div class="row"><h3 data-t>Members</h3><label class="row" id="mute">
<small data-t>minutes to mute for</small>
<input id="minutes" type="number" min="1" value="10"></label></div>
<ul id="members"></ul></div></section>
<section class="box"><div class="row"><h2 class="grow" data-t>Messages and events</h2>
<input id="filter" type="search" class="grow"><button id="pause" type="button" data-t>Pause</button>
</div><ol id="events"></ol></section>
</div></main>
"""

DASHBOARD_SCRIPT = r"""
"use strict";
const $ = (id) => document.getElementById(id);
const config = JSON.parse($("config").textContent);
const chinese = /^zh\b/i.test(navigator.language);
const ZH = {
  "connecting": "正在连接", "live": "实时", "Access": "访问", "Open": "打开", "Accounts": "账号",
  "There is no account yet: start one below.": "还没有账号,请在下面启动一个。",
  "Start an account": "启动账号", "Start": "启动", "Stop": "停止", "Log in again": "重新登录",
  "Log in here": "在此登录", "Real QQ, through a bridge": "真实 QQ(通过 OneBot 或 Milky)",
  "Start with real WeChat": "启动真实微信", "Confirm": "确认",
  "The digits that the phone shows": "手机上显示的数字",
  "Settings": "设置", "Chat": "聊天", "I speak as": "身份", "to": "发给", "Send": "发送",
  "Members": "群成员", "minutes to mute for": "禁言分钟数", "Mute": "禁言", "Kick": "移出",
  "Messages and events": "消息与事件", "Pause": "暂停", "Resume": "继续", "Filter": "筛选",
  "Name of the account": "账号名称", "Message": "消息", "QR code": "二维码", "group": "群",
  "The token that this server was started with:": "请输入启动服务时设置的口令(token):",
  "That is not the token. Try again:": "口令不正确,请重试:",
  "This server answers only callers on its own machine. Start it with a token to open it.":
    "此服务只接受本机访问。需要从其他机器访问时,请用 --token 启动。",
  "init": "正在启动", "loading": "正在加载", "scaning": "等待扫码", "confirming": "等待确认",
  "updating": "正在更新", "running": "运行中", "stop": "已停止", "failed": "启动失败",
  "unknown": "未知",
  "The server does not answer: this is how it was.": "服务器没有响应,显示的是之前的状态。",
  "since {time}": "自 {time}", "port {port}": "端口 {port}", "restarts: {count}": "重启 {count} 次",
  "Scan the code with a phone; a new one comes by itself.": "请用手机扫码,二维码会自动更新。",
  "{name} started on port {port}.": "{name} 已启动,端口 {port}。",
  "{name} runs already.": "{name} 已在运行。", "{name} has stopped.": "{name} 已停止。",
  "{name} stops in a moment.": "{name} 即将停止。",
  "{name} shows a new QR code in a moment.": "{name} 稍后显示新的二维码。",
  "{name} is logged in.": "{name} 已登录。", "Sent.": "已发送。",
  "{name} is muted for {count} min.": "{name} 已被禁言 {count} 分钟。",
  "{name} is out of the group.": "{name} 已被移出群。",
  "It did not work: {why}": "操作失败:{why}", "the server does not answer": "服务器没有响应",
  "a new QR code": "新的二维码", "login": "登录",
  "state_change": "状态变化", "new_friend": "新好友", "lose_friend": "好友离开",
  "new_group": "新群", "lose_group": "退出群", "new_group_member": "新成员",
  "lose_group_member": "成员离开", "new_discuss": "新讨论组", "lose_discuss": "退出讨论组",
  "new_discuss_member": "讨论组新成员", "lose_discuss_member": "讨论组成员离开",
  "friend_request": "好友请求", "revoke_message": "撤回消息",
  "user_property_change": "本人资料变化", "friend_property_change": "好友资料变化",
  "group_property_change": "群资料变化", "group_member_property_change": "群成员资料变化",
  "discuss_property_change": "讨论组资料变化",
  "discuss_member_property_change": "讨论组成员资料变化",
  "input_qrcode": "二维码", "client_failed": "启动失败", "not sent": "未发送",
  "client_waiting": "无人扫码", "client_stopped": "账号停止", "client_deleted": "账号删除",
  "owner": "群主", "admin": "管理员", "member": "普通成员",
  "create": "群主", "manage": "管理员", "attend": "普通成员", "name": "名称", "card": "群名片",
  "markname": "备注", "role": "身份", "signature": "签名", "sex": "性别", "state": "状态",
  "and {count} more": "还有 {count} 人",
  // what the codes of answers mean
  "code -6": "没有访问权限", "code 1": "账号不存在", "code 2": "没有可用端口",
  "code 3": "进程无法启动", "code 4": "启动后立即退出", "code 5": "账号数量已达上限",
  "code 6": "名称或参数不可用", "code 7": "账号无响应", "code 8": "内置网络中没有或不允许",
  "code 9": "发送队列已满",
  "code 100": "找不到对象", "code 201": "没有权限或未完成", "code 300": "账号未运行",
  "code 400": "参数缺失或有误", "code 503": "服务器繁忙", "code 507": "磁盘空间不足",
  "group_request": "加群请求", "group_shutup": "禁言", "group_upload": "群文件", "poke": "戳一戳",
};
const EN = {                 // the words of the API that English says otherwise
  "init": "starting", "scaning": "waiting for a scan", "confirming": "waiting for the button",
  "stop": "stopped", "client_failed": "does not start", "client_waiting": "nobody scans",
  "client_stopped": "account stopped", "client_deleted": "account deleted",
  "input_qrcode": "QR code", "markname": "remark", "card": "name in the group",
};
const word = (table, text) => Object.hasOwn(table, text) && table[text];  // not "constructor"
const t = (text, values = {}) => (word(chinese ? ZH : EN, text)
  || (/^[a-z]+(_[a-z]+)+$/.test(text) ? text.replaceAll("_", " ") : text))
  .replace(/\{(\w+)\}/g, (_, name) => values[name]);
const api = (path) => config.prefix + path;
const when = (seconds) => new Date(seconds * 1000)
  .toLocaleString(navigator.language, {dateStyle: "short", timeStyle: "short"});
const nameOf = (thing) => String(thing.markname || thing.card || thing.displayname
  || thing.name || thing.uid || thing.id || "");

// Whatever others wrote becomes text nodes and properties, never markup.
function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
const bdi = (tag, text, className = "") => el(tag, {className}, el("bdi", {}, text));

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

function soon(work, milliseconds) {   // once for all that comes together
  let timer = 0;
  return () => { timer = timer || setTimeout(() => { timer = 0; work(); }, milliseconds); };
}

// -- calls

let token = sessionStorage.getItem("openqq-token") || "";
let locked = false;

function lock(refused) {
  locked = true;
  $("main").hidden = true;
  $("lock").hidden = false;
  $("key").hidden = !config.guarded;
  $("why").textContent = t(!config.guarded
    ? "This server answers only callers on its own machine. Start it with a token to open it."
    : refused ? "That is not the token. Try again:"
      : "The token that this server was started with:");
  $("token").focus();
}

$("lock").onsubmit = (event) => {
  event.preventDefault();
  token = $("token").value;
  sessionStorage.setItem("openqq-token", token);
  $("token").value = "";
  locked = false;
  refresh();
};

function headers(more = {}) {  // a header carries bytes: UTF-8, each as one character
  const bytes = new TextEncoder().encode("Bearer " + token);
  return token ? {...more, Authorization: String.fromCharCode(...bytes)} : more;
}

const get = (path, params = {}) => fetch(path + "?" + new URLSearchParams(params),
  {headers: headers(), cache: "no-store"});

async function answerOf(response) {
  const answer = await (await response).json();
  if (answer.code === -6) lock(Boolean(token));
  return answer;
}

const ask = (path, params) => answerOf(get(path, params));
const post = (path, params) => answerOf(
  fetch(path, {method: "POST", headers: headers(), body: new URLSearchParams(params)}));

function reason(answer) {
  const text = String(answer.info || answer.status);
  if (!chinese) return text.replace(/^[^\x00-\x7f]+(: |$)/, "") || t("not sent");
  const known = ZH["code " + answer.code];
  return known ? `${known}(${text})` : text;
}

// Do what a button is for, and say how it went: its words tell of a good answer.
async function act(button, work, words) {
  button.disabled = true;
  const answer = await work().catch(() => null);
  const done = answer !== null && answer.code === 0;
  const why = answer ? reason(answer) : t("the server does not answer");
  $("said").textContent = done ? words(answer) : t("It did not work: {why}", {why});
  $("said").className = done ? "" : "error";
  button.disabled = false;
  refresh();
  return done;
}

function button(text, work, words, className = "") {
  const made = el("button", {type: "button", textContent: t(text), className});
  made.onclick = () => act(made, work, words);
  return made;
}

// -- accounts

let accounts = new Map();    // name -> its row in check_client
const cards = new Map();     // name -> the row that was drawn, and what with
const stopped = new Map();   // name -> the settings to start it with again

async function startAccount(name, params) {
  const answer = await post(api("start_client"), {...params, client: name});
  if (answer.code === 0) stopped.delete(name);
  return answer;
}

const started = (answer) => t(answer.status === "client already exists" ? "{name} runs already."
  : "{name} started on port {port}.", {name: answer.client, port: answer.port});

async function stopAccount(name) {
  const answer = await post(api("stop_client"), {client: name});
  if (answer.code === 0 && config.controller) {
    stopped.set(name, Object.fromEntries(config.settings.filter(([key]) => key in answer)
      .map(([key]) => [key, answer[key]])));
  }
  return answer;
}

async function startAgain(name) {  // one that failed is still known, with its settings
  if (!stopped.has(name)) await stopAccount(name);
  return startAccount(name, stopped.get(name) || {});
}

function drawCard(row) {     // anew when something has changed; picture and digits stay
  const {account: name, state} = row, waits = ["scaning", "confirming"].includes(state);
  if (!cards.has(name)) {
    const image = el("img", {className: "code", alt: t("QR code")});
    cards.set(name, {node: el("article"), image, code: el("div", {hidden: true}, image,
      el("small", {}, t("Scan the code with a phone; a new one comes by itself."))),
    digits: el("input", {className: "grow", inputMode: "numeric", autocomplete: "off",
      placeholder: t("The digits that the phone shows")})});
  }
  const card = cards.get(name), drawn = JSON.stringify(row);
  showCode(card, name, waits).catch(() => {});
  if (card.drawn === drawn) return;
  Object.assign(card, {row, drawn});
  Object.assign(card.node.dataset, {account: name, state});
  const shown = row.failed ? "failed" : state;
  card.node.replaceChildren(
    el("div", {className: "row"}, bdi("h3", name),
      el("span", {className: "state " + shown}, t(shown))),
    el("p", {className: "facts"}, [row.since && t("since {time}", {time: when(row.since)}),
      row.port && t("port {port}", {port: row.port}),
      row.restarts && t("restarts: {count}", {count: row.restarts})].filter(Boolean).join(" · ")),
    el("p", {className: "error"}, row.error || ""),
    card.code,
    row.verify_code ? el("div", {className: "row"}, card.digits, button("Confirm",
      () => post(api("verify_code"), {client: name, code: card.digits.value}),
      () => t("Sent."))) : "",
    el("div", {className: "row"}, ...[
      state === "stop" && config.controller && button("Start", () => startAgain(name), started),
      waits && row.link === "local" && button("Log in here",
        () => post("/local/login", {client: name}), () => t("{name} is logged in.", {name})),
      state !== "stop" && !waits && config.apis.includes("relogin") && button("Log in again",
        () => post(api("relogin"), {client: name}),
        () => t("{name} shows a new QR code in a moment.", {name})),
      state !== "stop" && button("Stop", () => stopAccount(name), () => config.controller
        ? t("{name} has stopped.", {name}) : t("{name} stops in a moment.", {name}))
    ].filter(Boolean)));
}

async function showCode(card, name, waits) {
  const answer = waits && await get(api("get_qrcode"), {client: name});
  const bytes = answer && answer.ok ? await answer.arrayBuffer() : null;
  const text = bytes ? new Uint8Array(bytes).join() : "";
  card.code.hidden = !text;
  if (text === card.text) return;
  card.text = text;
  URL.revokeObjectURL(card.image.src);
  if (bytes) card.image.src = URL.createObjectURL(new Blob([bytes], {type: "image/png"}));
}

async function refresh() {
  if (locked) return;
  if (config.guarded && !token) return lock(false);
  const answer = await ask(api("check_client")).catch(() => null);
  $("away").hidden = answer !== null;
  if (!answer) {
    cards.forEach(({row}) => drawCard({...row, failed: false, state: "unknown"}));
  } else if (answer.code === 0) {
    $("lock").hidden = true;
    $("main").hidden = false;
    showAccounts(answer.client);
  }
}

const running = () => [...accounts.values()].filter((row) => row.state === "running")
  .map((row) => row.account).sort();

function showAccounts(rows) {
  const before = running().join();
  const gone = [...stopped.keys()].map((name) => ({account: name, state: "stop"}));
  accounts = new Map([...gone, ...rows].map((row) => [row.account, row]));
  accounts.forEach(drawCard);
  [...cards.keys()].filter((name) => !accounts.has(name)).forEach((name) => cards.delete(name));
  const nodes = [...cards.keys()].sort().map((name) => cards.get(name).node);
  if (nodes.some((node, at) => node !== $("accounts").children[at])
    || nodes.length !== $("accounts").childElementCount) $("accounts").replaceChildren(...nodes);
  $("nobody").hidden = accounts.size > 0;
  if (!world || before !== running().join()) loadWorld();
}

$("begin").onsubmit = async (event) => {
  event.preventDefault();
  const given = [...$("begin").querySelectorAll("label input")].filter((input) => input.value)
    .map((input) => [input.name, input.value]);
  if (event.submitter.value) given.push(["link", event.submitter.value]);
  if (await act(event.submitter,
    () => startAccount($("name").value.trim(), Object.fromEntries(given)), started)) {
    $("begin").reset();
  }
};

// -- messages and events

const events = [];           // by their time, the newest last
let paused = 0;              // 0: no; else one more than there are that wait

function describe(event) {
  if (event.post_type !== "event") {
    const place = event.group || event.discuss || event.receiver;
    const failed = event.code ? ` [${reason(event)}]` : "";
    return [`${event.sender} → ${place}`, event.content + failed];
  }
  const [one, two, ...values] = event.params;
  if (event.event === "state_change") return [t(event.event), `${t(one)} → ${t(two)}`];
  if (event.event === "input_qrcode") return [t(event.event), t("a new QR code")];
  if (event.event === "login") return [t(event.event), ""];
  const names = event.params.map((part) => part && typeof part === "object" ? nameOf(part)
    : part === null ? "" : String(part));
  if (event.event.endsWith("_property_change")) {
    const [old, fresh] = values.map((value) =>
      value === null || value === "" ? "–" : two === "role" ? t(value) : value);
    names.splice(1, 3, `${t(two)}: ${old} → ${fresh}`);
  }
  return [t(event.event), names.filter(Boolean).join(" · ")];
}

function wanted(event) {
  const text = [event.client, ...describe(event)].join(" ").toLowerCase();
  return $("filter").value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

function eventRow(event) {
  const [title, text] = describe(event);
  const at = new Date(event.at);
  const today = at.toDateString() === new Date().toDateString();
  const day = today ? "" : at.toLocaleDateString(navigator.language) + " ";
  return el("li", {}, el("time", {}, day + at.toLocaleTimeString(navigator.language)), " ",
    bdi("span", event.client, "tag"), " ", bdi("b", title),
    el("bdi", {className: "text"}, text));
}

function showEvents() {
  $("pause").textContent = t(paused ? "Resume" : "Pause") + (paused > 1 ? ` (${paused - 1})` : "");
  if (paused) return;
  $("events").replaceChildren(...events.filter(wanted).slice(-200).reverse().map(eventRow));
}

$("filter").oninput = showEvents;
$("pause").onclick = () => {
  paused = paused ? 0 : 1;
  showEvents();
};

const showEventsSoon = soon(showEvents, 50);
const showTalkSoon = soon(() => showTalk(true), 50);
const refreshSoon = soon(refresh, 500);
const loadWorldSoon = soon(loadWorld, 500);

function hear(event) {
  event.client = event.client || config.account;
  event.at = event.time ? event.time * 1000 : Date.now();
  events.splice(events.findLastIndex((other) => other.at <= event.at) + 1, 0, event);
  events.splice(0, events.length - 500);
  if (paused) paused += 1;
  showEventsSoon();
  if (event.event === "client_stopped") stopped.set(event.client, event.settings);
  if (event.event === "client_deleted") stopped.delete(event.client);
  if (inTalk(event)) showTalkSoon();
  if (event.post_type === "event") refreshSoon();
  if (/^(new|lose)_|_property_change$/.test(event.event)) loadWorldSoon();
}

function online(on) {
  $("live").className = "state " + (on ? "on" : "off");
  $("live").textContent = t(on ? "live" : "connecting");
}

let stream = new AbortController();

async function follow() {    // EventSource could not send the token
  for (let last = ""; ; await pause(1000)) {
    while (locked || $("main").hidden) await pause(100);
    stream = new AbortController();
    try {
      const answer = await fetch(api("events?since=0"), {signal: stream.signal,
        headers: headers(last ? {"Last-Event-ID": last} : {})});
      online(answer.ok);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", piece; !(piece = await reader.read()).done;) {
        const blocks = (rest + piece.value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) {
          const [, id, data] = /^(?:id: (\d+)\n)?data: (.*)$/s.exec(block) || [];
          last = id || last;
          if (data) hear(JSON.parse(data));
        }
      }
    } catch { /* it broke off: there is a next time */ }
    online(false);
  }
}

// -- chat: an account speaks through its own API, anybody else through the network inside

let world = null;
let speaker = null;          // {account, name} or {uid, name}, each with the key of its option
let peer = null;             // {kind, name, id, uid, account, key}
const overheard = [];        // what was said here and no account hears, each with its talk

async function loadWorld() {
  world = world || {people: [], groups: [], friends: []};
  const answer = await ask("/local/world").catch(() => ({}));
  if (answer.code === 0) world = answer;
  const own = running();
  const others = world.people.filter((person) => !own.includes(person.name));
  fill("speaker", [...own.map((name) => ({name, account: name, key: "account " + name})),
    ...others.map((person) => ({...person, key: "person " + person.uid}))]);
  await loadPeers();
}

function fill(id, things) {  // what is chosen stays so
  const before = $(id).value;
  $(id).replaceChildren(...things.map((thing) => el("option", {thing, value: thing.key,
    textContent: nameOf(thing) + (thing.kind === "group" ? ` (${t("group")})` : "")})));
  if (things.some((thing) => thing.key === before)) $(id).value = before;
}

const chosen = (id) => $(id).selectedOptions[0]?.thing || null;

async function loadPeers() {
  const asked = speaker = chosen("speaker");
  $("chat").hidden = !asked;
  if (!asked) return;
  const [friends, groups] = asked.account ? await rosterOf(asked) : seenBy(asked);
  if (asked !== speaker) return;
  fill("peer", [["friend", friends], ["group", groups]].flatMap(([kind, rows]) =>
    rows.map((row) => ({...row, kind, key: `${kind} ${row.uid}`}))));
  await choosePeer();
}

async function rosterOf(own) {
  const [friends, groups, user] = await Promise.all(
    ["get_friend_info", "get_group_basic_info", "get_user_info"].map(
      (path) => ask(api(path), {client: own.account}).catch(() => [])));
  own.uid = user.uid;
  return [friends, groups].map((rows) => Array.isArray(rows) ? rows : []);
}

function seenBy(person) {
  const local = running().filter((name) => accounts.get(name).link === "local");
  const known = new Set(world.friends.filter((pair) => pair.includes(person.uid)).flat());
  return [world.people.filter((one) => one.uid !== person.uid && known.has(one.uid))
    .map((one) => local.includes(one.name) ? {...one, account: one.name} : one),
  world.groups.filter((group) => group.member.some((member) => member.uid === person.uid))];
}

async function choosePeer() {
  const before = peer, asked = peer = chosen("peer");
  if (asked?.key !== before?.key) $("members").replaceChildren();  // ids are another's now
  showTalk(asked?.key === before?.key);
  $("group").hidden = !peer || peer.kind !== "group";
  if ($("group").hidden) return;
  let members = peer.member || [];
  if (speaker.account) {
    const found = await ask(api("search_group"), {client: speaker.account, id: peer.id});
    members = Array.isArray(found) ? found[0].member : [];
    if (asked !== peer) return;
  } else {
    const names = new Map(world.people.map((person) => [person.uid, person.name]));
    members = members.map((member) => ({...member, name: names.get(member.uid)}));
  }
  $("mute").hidden = !speaker.account || !config.apis.includes("shutup_group_member");
  $("members").replaceChildren(...members.slice(0, 200).map(memberRow));
  if (members.length > 200) {
    $("members").append(el("li", {}, t("and {count} more", {count: members.length - 200})));
  }
}

function memberRow(member) {
  const name = nameOf(member);
  const role = member.role && member.role !== "member" ? [el("small", {}, t(member.role))] : [];
  const node = el("li", {}, el("bdi", {className: "grow"}, name), ...role);
  node.dataset.member = name;
  if (!speaker.account || String(member.uid) === String(speaker.uid)) return node;
  const manage = (path, more) => post(api(path), {client: speaker.account, group_id: peer.id,
    member_id: member.id, id: peer.id, members: member.id, ...more});  // as each flavour says
  const count = () => $("minutes").value;
  if (!$("mute").hidden) {
    node.append(button("Mute", () => manage("shutup_group_member", {time: count()}),
      () => t("{name} is muted for {count} min.", {name, count: count()}), "small"));
  }
  node.append(button("Kick", () => manage("kick_group_member").finally(choosePeer),
    () => t("{name} is out of the group.", {name}), "small"));
  return node;
}

// Whose events tell of this talk: the account that speaks, is spoken to, or is in the group. Among
// residents there is nobody.
function witness() {
  const uids = (peer.member || []).map((member) => member.uid);
  return speaker.account || peer.account || world.people.filter((person) =>
    uids.includes(person.uid)).map((person) => person.name).find((name) =>
    running().includes(name));
}

function inTalk(event) {
  if (!peer || event.post_type === "event" || event.client !== witness()) return false;
  if (event.type !== peer.kind + "_message") return false;
  if (peer.kind === "group") return String(event.group_uid) === String(peer.uid);
  const uid = String(speaker.account ? peer.uid : speaker.uid);
  return [String(event.sender_uid), String(event.receiver_uid)].includes(uid);
}

const talk = () => peer.kind === "group" ? peer.uid : [speaker.uid, peer.uid].sort().join();

function showTalk(more = false) {  // who reads what was said before stays there
  const box = $("talk");
  const end = !more || box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  const heard = !peer ? [] : witness() ? events.filter(inTalk)
    : overheard.filter((row) => row.talk === talk());
  box.replaceChildren(...heard.slice(-100).map((event) => {
    const mine = speaker.account ? event.post_type === "send_message"
      : String(event.sender_uid) === String(speaker.uid);
    return el("li", {className: mine ? "mine" : ""}, bdi("small", event.sender),
      el("bdi", {className: "text"}, event.content));
  }));
  if (end) box.scrollTop = box.scrollHeight;
}

async function speak(content) {
  const type = peer.kind + "_message";
  const params = {client: speaker.account, id: peer.id, content};
  if (speaker.account) return post(api("send_" + type), params);
  const said = {sender: speaker.name, sender_uid: speaker.uid, content, talk: talk()};
  const unheard = !witness();
  const answer = await post("/local/say",
    {from: speaker.uid, content, to: peer.uid, type});
  if (unheard && answer.code === 0) {
    overheard.push(said, ...answer.answers.map((row) => ({...row, talk: said.talk})));
    overheard.splice(0, overheard.length - 500);
    showTalk();
  }
  return answer;
}

$("speaker").onchange = () => {
  fill("peer", []);
  choosePeer();
  loadPeers();
};
$("peer").onchange = choosePeer;
$("say").onsubmit = async (event) => {
  event.preventDefault();
  if (peer && await act(event.submitter, () => speak($("content").value), () => t("Sent."))) {
    $("content").value = "";
  }
  $("content").focus();
};

// -- the beginning

document.documentElement.lang = chinese ? "zh" : "en";
for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.textContent);
for (const [id, text] of [["name", "Name of the account"], ["content", "Message"],
  ["filter", "Filter"]]) {
  $(id).placeholder = $(id).ariaLabel = t(text);
}
$("begin").hidden = !config.controller;
$("real").hidden = !config.apis.includes("verify_code");
for (const [name, help, value, secret, zh] of config.settings) {
  $(/^(onebot|milky)_/.test(name) ? "bridge" : "settings").append(el("label", {}, name,
    el("input", {name, placeholder: value, autocomplete: "off",
      type: secret ? "password" : "text"}), el("small", {}, chinese ? zh : help)));
}
// A page that waits to be gone back to would hold one of the few connections to a server.
addEventListener("pagehide", () => stream.abort());
setInterval(() => document.hidden || refresh(), 3000);
refresh();
follow();
"""


# ------------------------------------------------------------------------------------------------
# C. OpenAPI
# ------------------------------------------------------------------------------------------------

# What parameters mean where the name does not tell it: a type or the possible values, if any, and a
# description. Those of settings are in SETTINGS. Texts, since few processes ever need them.
PARAMS = """
client | the account's name
id gid | the id, which changes with every scan; of a message the one that its sending answered
uid qq gnumber number | the number that stays
displayname | the markname, else the card, else the name
markname | what one calls a friend
async | 0/1 | 1 does not wait for the outcome
cq | 0/1 | 1 takes CQ codes in the content
reply_to | the id of a message, which is quoted
at | the uids of those who are mentioned, with commas, or all
media_path | a picture: a file within tmpdir, or its address
media_data | a picture in base64
media_url | a picture's address
media_id | a picture that upload_media kept, or that came
member_id members friends | ids, with commas
member_uid | uids, with commas
time | int | minutes
all | 0/1 | 1 means everybody
enable | 0/1 | 0 takes it away
title | what stands beside the name
reason | why not
comment | what comes with the request
action | the bridge's name for it
params | a JSON object
ticket | what the event or the QR code told
accept | 0/1 | 0 declines
since | int | only events after this seq, without taking them
Last-Event-ID | int | the id after which to go on, as browsers send it
timeout | int | seconds to wait for the answer
new_displayname | the group's name from now on
new_markname | the markname from now on
op | 0/1 | 1 puts it on top
verify | the words that come with the request
nick gname | the name
gcode | the code
role gtype | of oneself in a group: create, manage or attend; of others: owner, admin or member
from | who speaks, by name or uid
type | friend_message/group_message/discuss_message/sess_message | what sort of message
to | the group or discuss, by name, id or uid; the person, where no client is named
do | add/remove/set | what to do
what | person/friend/friend_request/group/discuss/group_member/discuss_member | with what
in | the group, the discuss, or the other person
card | somebody's name in a group
signature | somebody's own words
"""

# Answers: their members; ! marks those that are always there; the type comes after a colon.
SHAPES = """
answer | code! status! reason
child | account client code! pid port status!
stopped | account client code! pid port runtime starttime status!
states | client:state* code! status
state | account! cookie_path disable_color error failed:flag http_debug keep_cookie link
    log_console log_encoding log_level log_path mode os pid! pid_path plugin:object* port!
    post_error:object previous_state qrcode_count_max qrcode_path restarts:int since start_time
    state! state_path tmpdir ua_retry_times version warning
sent | code! id info media_id status!
consulted | code! id media_id reply reply_status status!
accepted | code! displayname id status! ticket
founded | code! group_id status!
called | code! data:any info retcode:any status!
program | account code! http_debug log_encoding log_level log_path os pid runtime starttime
    status! version
uploaded | code! media_code media_ext media_id media_mime media_mtime media_name media_path
    media_size status!
event | seq! post_type! time! event params:any class code content id info msg type sender
    sender_id sender_uid receiver receiver_id receiver_uid group group_id group_uid discuss
    discuss_id media:media* raw_message late:int
    reply_to at:any at_me:int
said | answers:object* code! id:int status!
changed | code! status! uid
world | code! people:object* groups:object* discuss:object* friends:any
document | openapi! info:object paths:object components:object
"""

CODES = """\
What can be read with GET can be asked for with HEAD as well. An answer's `code`: \
0 done; 1 no such client; 2 no port; 3 no process; 4 it died at once; 5 too many clients; \
6 not allowed; 7 the client is not reachable; 8 not found on the network inside; -1 no such call, \
or the data is wrong; -3 not sent; -4 sent, perhaps; -5 not sent in time; -6 the token is missing; \
9 too many messages wait to be sent; 100 to 105 who it is for is not known, or two are called so; \
200 nobody named; 201 it was not done, or it is "not with this link", which has no such thing; \
300 the account does not run; 400 a parameter is missing or wrong."""

# The types in JSON Schema; and the answers that are not JSON.
TYPES: Dict[str, Row] = {
    "any": {}, "object": {"type": "object"}, "flag": {"type": "boolean"},
    "int": {"type": "integer"}, "text": {"type": ["string", "null"]},
    "id": {"type": ["string", "integer", "null"]}}  # a number where numeric_ids is set
WHOLE = ("code", "pid", "port", "runtime", "starttime", "seq", "max_member", "max_admin")
KINDS = {"image": "image/*", "bytes": "*/*", "html": "text/html", "metrics": "text/plain",
         "stream": "text/event-stream"}


@functools.lru_cache(maxsize=2)
def cells_of(text: str) -> Dict[str, List[str]]:
    """Word of a line's first cell -> its other cells; a line that begins with a blank goes on."""
    rows = [[cell.strip() for cell in line.split("|")]
            for line in text.replace("\n ", " ").strip().splitlines()]
    return {name: row[1:] for row in rows for name in row[0].split()}


def schema_of(word: str) -> Row:
    """The schema of a shape by its name; with * of a list of them."""
    if word.endswith("*"):
        return {"type": "array", "items": schema_of(word[:-1])}
    return TYPES[word] if word in TYPES else {"$ref": "#/components/schemas/" + word}


def object_schema(properties: Row, required: List[str]) -> Row:
    """The schema of an object; an empty list of required members is left out."""
    row: Row = {"type": "object", "properties": properties}
    return {**row, "required": required} if required else row


def shape_of(words: Iterable[str]) -> Row:
    """The schema of an object with these members; without a type the name decides (CONTRACT 1)."""
    properties = {}
    for name, _, kind in (word.rstrip("!").partition(":") for word in words):
        properties[name] = schema_of(kind or (
            "int" if name in WHOLE else
            "id" if ID_KEY.fullmatch(name) or name == "time" else "text"))
    return object_schema(properties, [word[:-1] for word in words if word.endswith("!")])


def parameters_of(verb: Verb, flavour: Type[Flavour], is_controller: bool) -> List[Row]:
    """The parameters of a call; the only one of a set is required."""
    given = [row for row in SETTINGS.values() if row.caller and not row.idle]
    sets: Dict[str, Sequence[str]] = {
        "media": ("media_path", "media_data", "media_url", "media_id", "media_name"),
        "settings": [row.name for row in given],
        "changes": [row.name for row in given if row.read is not _path], **flavour.keys}
    sets.update({kind + "_fields": list(dict.fromkeys([
        *flavour.fields[kind], "displayname", *names]))
        for kind, names in flavour.other_names.items()})
    words: List[str] = []
    for word in verb.takes.replace("body", "").split():
        names = sets[word[1:]] if word[0] == "+" else [word]
        words += names if len(names) > 1 or names[0] == word else [names[0] + "!"]
    values = dict(word.partition("=")[::2] for word in verb.example.split())
    if is_controller and (verb.on or verb.name in BRIDGES):
        words.insert(0, "client" if verb.name in ("check_client", "events") else "client!")
        values["client"] = "alice"
    found = []
    for word in words:
        name = word.rstrip("!")
        *kinds, about = cells_of(PARAMS).get(name, ["the " + name.replace("_", " ")])
        if verb.takes in ("+settings", "+changes") and name in SETTINGS:
            kinds, about = [], SETTINGS[name].help
        is_number = kinds == ["int"]
        schema: Row = {"type": "integer", "minimum": 0} if is_number else {"type": "string"}
        if kinds and not is_number:
            schema["enum"] = kinds[0].split("/")
        found.append({"name": name, "required": word != name, "schema": schema,
                      "description": about})
        if name in values:
            found[-1]["example"] = int(values[name]) if is_number else values[name]
    return found


def responses_of(verb: Verb, flavour: Type[Flavour], is_passed: bool, statuses: Set[str]) -> Row:
    """The answers of a call by HTTP status: the given ones, and its own."""
    codes = {0, int(is_passed), *(int(word) for word in verb.codes.split() if word[0] != "=")}
    statuses = statuses | {word[1:] for word in verb.codes.split() if word[0] == "="}
    rows: Row = {status: {"$ref": f"#/components/responses/{status}"} for status in statuses}
    answer = schema_of("answer")
    if verb.gives in KINDS:
        content: Row = {KINDS[verb.gives]: {}}
        if len(codes) > 1:
            content["application/json"] = {"schema": answer}
        if "404" in rows:
            rows["404"] = {"description": "There is none."}
    else:
        schema = schema_of(verb.gives)
        if len(codes) > 1 and (verb.gives.endswith("*") or verb.gives in flavour.fields):
            schema = {"anyOf": [schema, answer]}
        content = {"application/json": {"schema": schema}}
    rows["200"] = {"description": "Codes: " + ", ".join(map(str, sorted(codes))),
                   "content": content}
    return rows


def operation(verb: Verb, route: Route, method: str, params: List[Row], responses: Row) -> Row:
    """One method of a path. A POST has a form or a JSON object, or a multipart form with a
    picture."""
    word = re.sub(r"\W+", "_", verb.name).strip("_") or "index"
    row: Row = {"operationId": word if method == "GET" else f"{method.lower()}_{word}",
                "summary": verb.about, "responses": responses}
    if route.open:
        row["security"] = []
    if verb.takes == "body":
        row["requestBody"] = {"content": {"application/json": {
            "schema": TYPES["object"], "example": {"post_type": "meta_event"}}}}
    elif method == "POST":
        schema = object_schema(
            {param["name"]: {**param["schema"], "description": param["description"]}
             for param in params}, [param["name"] for param in params if param["required"]])
        example = {param["name"]: param["example"] for param in params if "example" in param}
        content: Row = {kind: {"schema": schema, "example": example} for kind in (
            "application/x-www-form-urlencoded", "application/json")}
        if "media_data" in schema["properties"]:
            content["multipart/form-data"] = {"schema": schema}
        row["requestBody"] = {"content": content}
        return row
    if params:
        row["parameters"] = [{**param, "in": "header" if param["name"][0].isupper() else "query"}
                             for param in params]
    return row


def components(flavour: Type[Flavour]) -> Row:
    """What operations refer to: shapes, errors, and how to give the token."""
    schemas = {name: shape_of(cells[0].split()) for name, cells in cells_of(SHAPES).items()}
    for kind, names in flavour.fields.items():
        member = [f"member:{kind}_member*"] if kind + "_member" in flavour.fields else []
        schemas[kind] = shape_of([name + ("!" if name != "code" else ":text")
                                  for name in names] + member)
    about = {"400": ["code 400: a parameter is missing or wrong"]}
    for error in (AuthFailure, ApiNotFound, NotAllowed, NotFound, NotRunning, QueueFull,
                  Unreachable, TooSlow, NoRoom):
        about.setdefault(str(error.http), []).append(f"code {error.code}: {error.status}")
    answer = {"application/json": {"schema": schema_of("answer")}}
    return {"schemas": schemas, "securitySchemes": {
        "bearer": {"type": "http", "scheme": "bearer"},
        "access_token": {"type": "apiKey", "in": "query", "name": "access_token"}},
        "responses": {status: {"description": "; ".join(lines), "content": answer}
                      for status, lines in about.items()}}


def openapi_routes(flavour: Type[Flavour], has_token: bool, routes: List[Route],
                   is_controller: bool) -> List[Route]:
    """The routes of the document, which describes these routes, itself, and what a controller
    passes on; routes that VERBS does not name are left out."""
    def openapi_json(request: Request) -> Row:
        own_paths = {route.path for route in routes}
        passed = [Route(flavour.prefix + verb.name, verb.methods, openapi_json)
                  for verb in flavour.apis.values() if is_controller
                  and flavour.prefix + verb.name not in own_paths]
        verbs = {**{verb.name: verb for verb in VERBS}, **flavour.apis}
        paths = {}
        for route in [*routes, *own, Route("/metrics", READ, openapi_json), *passed]:
            verb = verbs.get(route.path.replace(flavour.prefix, "", 1))
            if not verb:
                continue
            params, is_passed = parameters_of(verb, flavour, is_controller), route in passed
            responses = responses_of(verb, flavour, is_passed, {status for status, holds in (
                ("400", params), ("403", not route.open), ("502", is_passed),
                ("503", not verb.any_state), ("504", is_passed)) if holds})
            paths[route.path] = {
                method.lower(): operation(verb, route, method, params, responses)
                for method in route.methods if method != "HEAD"}
        return {"openapi": "3.1.0", "paths": paths, "components": components(flavour),
                "info": {"title": "OpenQQ", "version": VERSION, "description": CODES},
                "security": [{"bearer": []}, {"access_token": []}] if has_token else []}

    own = [Route(prefix + "openapi.json", READ, openapi_json) for prefix in PREFIXES]
    return own


# ------------------------------------------------------------------------------------------------
# 9. Events
# ------------------------------------------------------------------------------------------------

def as_stream(rows: List[Tuple[int, bytes]]) -> Iterator[bytes]:
    """Rows (seq, JSON) as server-sent events, in pieces of about 8 KiB, which alone are copied for
    each reader. Removes the rows."""
    rows.reverse()
    while rows:
        piece = bytearray()
        while rows and len(piece) < 8 * 1024:
            seq, data = rows.pop()
            piece += b"id: %d\ndata: " % seq if seq else b"data: "
            piece += data
            piece += b"\n\n"
        yield bytes(piece)


class Subscriber:
    """A reader of a stream, and what is still to be sent to it; the store's lock guards it."""

    def __init__(self, rows: List[Tuple[int, bytes]]) -> None:
        self.rows, self.size = rows, 0   # (seq, JSON); seq 0: not kept, so nobody can resume there
        self.more: Future[bool] = Future()  # set when there is more


class EventStore:
    """The newest events, for check_event and streams (CONTRACT 6); `room` limits their bytes. `seq`
    starts at the clock's milliseconds, so that a number from before a restart is older than all
    that is kept. Calls without `since` share one mark; those with it, and streams, only read."""

    def __init__(self, size: int, clock: Callable[[], float] = time.time, room: int = 0) -> None:
        self._lock = threading.Lock()  # guards all below, and each Subscriber
        self._size, self._room = max(1, size), room
        self._ring: Deque[Tuple[int, bytes]] = collections.deque()
        self._bytes = 0                # in the ring
        self._seq = self._mark = int(clock() * 1000)
        self._waiting: Set[Future[bool]] = set()  # calls of check_event
        self._subscribers: Set[Subscriber] = set()
        self.relay: Optional[Callable[[int, bytes], None]] = None  # gets what each Subscriber gets

    def add(self, event: Union[Row, bytes]) -> None:
        """Keep an event, and wake who waits for one. It gets a seq, unless it is bytes."""
        with self._lock:
            self._seq += 1
            data = event if isinstance(event, bytes) else to_bytes({"seq": self._seq, **event})
            self._ring.append((self._seq, data))
            self._bytes += len(data)
            while len(self._ring) > self._size or (
                    0 < self._room < self._bytes and len(self._ring) > 1):
                self._bytes -= len(self._ring.popleft()[1])
            self._publish(self._seq, data)
            for future in self._waiting:
                settle(future, True)

    def tell(self, event: Union[Row, bytes]) -> None:
        """Send an event to the streams only; it is not kept."""
        with self._lock:
            if self._subscribers or self.relay:
                self._publish(0, event if isinstance(event, bytes) else to_bytes(event))

    def _publish(self, seq: int, data: bytes) -> None:
        """A reader that is too far behind is disconnected: it reconnects, and says its last seq."""
        for subscriber in list(self._subscribers):
            subscriber.rows.append((seq, data))
            subscriber.size += len(data)
            settle(subscriber.more, True)
            if len(subscriber.rows) > STREAM_LIMIT or subscriber.size > STREAM_BYTES:
                self._subscribers.discard(subscriber)
        if self.relay:
            self.relay(seq, data)

    def take(self, since: Optional[int], wait: Wait, seconds: float = EVENT_SECONDS) -> bytes:
        """A JSON list of the events after `since`; without it after the mark, which is moved.

        Waits up to `seconds` for the first one. After a Hangup, raised by `wait`, the next caller
        gets them.
        """
        future: Future[bool] = Future()
        with self._lock:
            mark = self._mark if since is None else since
            rows = self._after(mark)
            if not rows:
                self._waiting.add(future)
        try:
            if not rows:
                wait(future, seconds)
        except TimeoutError:
            pass
        finally:
            with self._lock:
                self._waiting.discard(future)
        with self._lock:
            rows = self._after(mark)
            if rows and since is None:
                self._mark = max(self._mark, rows[-1][0])
        return b"[" + b",".join([data for _, data in rows]) + b"]"

    def _after(self, seq: int) -> List[Tuple[int, bytes]]:
        """What is kept after a number; everything, if it is not one of ours."""
        found: List[Tuple[int, bytes]] = []
        for row in reversed(self._ring):
            if row[0] <= seq <= self._seq:
                break
            found.append(row)
        return found[::-1]

    def stream(self, request: Request) -> Response:
        """Server-sent events: first what is kept after Last-Event-ID, or else after `since`, if
        given; then a `retry` line; then new events, until the server ends or the reader hangs up.
        BadRequest."""
        since = seq_of(request.fields.get("last-event-id") or request.params.get("since"))
        mark = self._seq if since is None else since

        def pieces() -> Iterator[bytes]:
            with self._lock:
                subscriber = Subscriber(self._after(mark))
                self._subscribers.add(subscriber)
            sign, ended = b"retry: 1000\n\n", False
            try:
                while True:
                    with self._lock:
                        ended = ended or subscriber not in self._subscribers
                        rows, subscriber.rows, subscriber.size = subscriber.rows, [], 0
                        subscriber.more = Future()
                    yield from as_stream(rows)
                    yield sign
                    if ended:
                        return
                    sign = b""
                    try:
                        ended = request.wait(subscriber.more, STREAM_SECONDS) is None
                    except TimeoutError:
                        sign = b":\n\n"
            finally:
                with self._lock:
                    self._subscribers.discard(subscriber)

        return Response(b"", "text/event-stream", pieces=pieces(), fields={
            "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def event_row(event: str, params: List[Any], when: Optional[str] = None) -> Row:
    """An event as JSON object; `when` is its time in seconds, if its source tells it."""
    known = re.fullmatch("[1-9][0-9]{0,11}", when or "")
    return {"event": event, "params": params, "post_type": "event",
            "time": when if known else str(int(time.time()))}


def seq_of(text: Optional[str]) -> Optional[int]:
    """The seq that a caller gives, or None; BadRequest."""
    if text is not None and not re.fullmatch("[0-9]{1,18}", text):
        raise BadRequest(400, "since must be a seq, a whole number")
    return None if text is None else int(text)


class Lane:
    """The events of one conversation that wait to be posted, or are being posted."""

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self.keys = collections.deque(keys)    # in the queue on disk; the first is posted
        self.tries = 0                         # how often it was sent without success
        self.since: Optional[float] = None     # time of its first try
        self.next = 0.0                        # when it may be tried again


class Poster:
    """Posts events to post_api, through a queue on disk; the events of each conversation in their
    order. Without a URL nothing is posted.

    Each thread of a pool posts one event at a time, without a lock; the owner's `timers.lock`
    guards that queue and all state here. Another conversation is posted at the same time only if
    an answer takes longer than PATIENCE: so a slow answer delays one conversation only, and while
    the receiver is quick a kill can double one event at most, not four.

    `answered(event, answer)` gets each JSON object that the receiver answers, before the next event
    of that conversation is posted; `asking(event, True)` is called before a post, and with False
    after it; both without the lock. The timers call `failed()` when `error` has changed.
    """

    PATIENCE = 0.05

    def __init__(self, url: str, secret: str, disk_queue: DiskQueue, timers: Any, log: Log,
                 answered: Callable[[Row, Row], None], fetch: Callable[..., Reply] = fetch,
                 failed: Callable[[], None] = lambda: None,
                 clock: Callable[[], float] = time.time, numeric: bool = False,
                 asking: Callable[[Row, bool], None] = lambda event, on: None) -> None:
        self._url = url                           # empty after 410 Gone, too
        self._secret, self._disk_queue, self._timers = secret, disk_queue, timers
        self._log, self._answered, self._fetch = log, answered, fetch
        self._failed, self._clock, self._numeric = failed, clock, numeric
        self._asking = asking
        self._shown, self._pool = shown_url(url), ThreadPool(POST_LANES, "post", log)
        self.error: Row = {}                      # post_error: about the last event dropped
        self.counts = {"posted": 0, "retried": 0, "dropped": 0}
        self._lanes: Dict[str, Lane] = {}         # by conversation, in the order of posting
        self._flying: Dict[Lane, float] = {}      # those being posted -> when that began
        self._pause_until = 0.0                   # the receiver cannot be reached, or we end
        self._outage = 0                          # tries in a row that did not reach it
        self._redirected = False                  # it answered with a redirect to another server
        self._landed: Callable[[], Any] = lambda: None
        self._look_at = self._tell_at = 0.0       # when the timers call flush() and failed() next
        with timers.lock:
            for key, item in list(disk_queue.pending.items() if url else ()):
                if isinstance(item, dict) and {"id", "in", "event"} <= item.keys():
                    self._lanes.setdefault(str(item["in"]), Lane()).keys.append(key)
                else:
                    disk_queue.done(key)  # it is no event of ours

    def add(self, event: Row, conversation: str, mark: Json = None) -> None:
        """Queue an event, together with its source's mark (DiskQueue)."""
        with self._timers.lock:
            if not self._url:
                return self._disk_queue.advance(mark) if mark is not None else None
            id = f"{int(self._clock() * 1000):x}-{self._disk_queue.last + 1:x}"
            key = self._disk_queue.add({"id": id, "in": conversation, "event": event}, mark)
            self._lanes.setdefault(conversation, Lane()).keys.append(key)
            for old in self._disk_queue.excess():
                if old not in [lane.keys[0] for lane in self._flying]:
                    self._drop(old, "over the limit of the queue")

    def flush(self) -> None:
        """Write what was added to disk, then post it."""
        with self._timers.lock:
            flight = self._next()
            if flight:
                self._pool.submit(self._post, *flight)

    def drain(self, landed: Callable[[], Any]) -> None:
        """Have landed() called, with the lock held, after each post."""
        self._landed = landed
        self.flush()

    def hold(self) -> None:
        """Begin no further post."""
        self._pause_until = math.inf

    def waiting(self) -> int:
        """How many events are not delivered yet."""
        return len(self._disk_queue.pending) if self._url else 0

    def flying(self) -> int:
        """How many are being posted."""
        return len(self._flying)

    def _next(self) -> Optional[Tuple[Lane, Row]]:
        """The next event to be posted now, if any, which counts as flying from now on; after its
        answer, or PATIENCE, the next one follows."""
        self._disk_queue.flush()
        found, now = None, self._timers.clock()
        wait = max(self._flying.values(), default=now - self.PATIENCE) + self.PATIENCE - now
        if wait <= 0 and len(self._flying) < POST_LANES and now >= self._pause_until:
            for lane in self._lanes.values():
                if lane not in self._flying and lane.next <= now:
                    found = lane, self._disk_queue.pending[lane.keys[0]]
                    self._flying[lane], wait = now, self.PATIENCE
                    break
        if wait > 0 and now >= self._look_at and len(self._lanes) > len(self._flying):
            self._look_at = now + wait
            self._timers.later(wait, self.flush)
        return found

    def _post(self, lane: Lane, item: Row) -> None:
        """In a thread of the pool: post events until there is none that may be posted now."""
        flight: Optional[Tuple[Lane, Row]] = (lane, item)
        while flight:
            lane, item = flight
            status, failure = 0, None
            self._asking(item["event"], True)
            try:
                status = self._call(item)
            except Unreachable as error:
                failure = error
            except Exception as error:  # without an outcome the conversation would stop
                self._log.failure("posting an event")
                failure = Unreachable(repr(error), True)
            self._asking(item["event"], False)
            with self._timers.lock:
                del self._flying[lane]
                if self._url:  # else another answer said 410 meanwhile, and all is dropped
                    self._note(lane, status, failure)
                self._landed()
                flight = self._next()

    def _call(self, item: Row) -> int:
        """Post an event, follow redirects on the same server, and do what the answer says; its
        status. Unreachable, also for an answer that asks for another try."""
        event, queued = item["event"], re.match("[0-9a-f]{1,15}(?=-)", str(item["id"]))
        if self._numeric:            # the setting may have changed since it was queued
            event = numbered(event)
        if queued and self._clock() - int(queued.group(), 16) / 1000 > 600:
            event = {**event, "late": 1}
        url, body, until = self._url, to_bytes(event), self._timers.clock() + POST_SECONDS
        fields = {"Content-Type": "application/json", "X-Event-ID": item["id"],
                  "User-Agent": "openqq/" + VERSION}
        if self._secret:
            fields["X-Signature"] = signature(self._secret, body)
        for _ in range(4):
            reply = self._fetch(url, "POST", fields, body, max(0.1, until - self._timers.clock()))
            data = reply.read()
            target = redirect_of(url, reply)
            if not (target and same_origin(url, target)):
                break
            url = target
        if reply.status in (408, 425, 429) or reply.status >= 500:
            raise Unreachable(f"answered {reply.status}", True)
        answer = None
        if reply.status != 410 and reply.kind in ("application/json", "text/json"):
            with contextlib.suppress(ValueError):  # no text in any encoding that we know
                answer = object_in(read_text(data).encode())
        if answer is not None:
            try:
                self._answered(item["event"], answer)
            except Exception:
                self._log.failure("what an answer of post_api wants")
        return reply.status

    def _note(self, lane: Lane, status: int, failure: Optional[Unreachable]) -> None:
        """Decide, by the outcome of a post, when this event or the next one is posted."""
        now, key = self._timers.clock(), lane.keys[0]
        lane.since = now if lane.since is None else lane.since
        if status == 410:
            self._log.warn(f"{self._shown} answered 410 Gone: nothing more is posted to it")
            self._url = ""
            for other in list(self._disk_queue.pending):
                self._drop(other, "the receiver is gone")
        elif failure is None:
            if self._outage > 1:
                self._log.info(f"{self._shown} takes events again")
            if 300 <= status < 400 and not self._redirected:
                self._log.warn(f"{self._shown} answers with a redirect that is not followed: "
                               "give the URL that takes events")
            self._outage, self._redirected = 0, 300 <= status < 400
            self.counts["posted"] += 1
            self._forget(key)
        elif failure.sent and lane.tries + 1 >= POST_TRIES:
            self._drop(key, f"{failure.status}, {POST_TRIES} times")
        elif not failure.sent and now - lane.since > POST_DAY:
            self._drop(key, "nobody there for a day")
        elif failure.sent:  # it may crash the receiver: only a few tries
            self.counts["retried"] += 1
            lane.next = now + 2.0 ** lane.tries
            self._timers.later(2.0 ** lane.tries, self.flush)
            lane.tries += 1
        else:  # no connection: all conversations wait
            self.counts["retried"] += 1
            if now >= self._pause_until:
                if self._outage == 1:
                    self._log.warn(f"{self._shown} cannot be reached ({failure.status}); "
                                   "events wait for it")
                pause = backoff(self._outage, 15.0)
                self._outage += 1
                self._pause_until = now + pause
                self._timers.later(pause, self.flush)

    def _forget(self, key: int) -> None:
        """Remove an event; its conversation goes to the end of the line."""
        name = str(self._disk_queue.pending[key]["in"])
        lane = self._lanes.pop(name)
        if lane.keys[0] == key:
            lane = Lane(lane.keys)
        lane.keys.remove(key)
        if lane.keys:
            self._lanes[name] = lane
        self._disk_queue.done(key)

    def _drop(self, key: int, why: str) -> None:
        self._forget(key)
        self.counts["dropped"] += 1
        dropped = self.counts["dropped"]
        if is_news(dropped):
            self._log.warn(f"{dropped} event(s) dropped, not posted to {self._shown}: {why}")
        self.error = {"time": str(int(self._clock())), "error": why, "dropped": dropped}
        now = self._timers.clock()
        if now >= self._tell_at:  # not each time: it writes a file
            self._tell_at = now + 1.0
            self._timers.later(1.0, self._failed)


def watch_posting(metrics: Metrics, poster: Poster) -> None:
    """Add what is posted to /metrics."""
    metrics.watch("events_total", "counter", "Events for post_api by what became of them.",
                  lambda: {f'result="{name}"': count for name, count in poster.counts.items()})
    metrics.watch("post_queue_length", "gauge", "Events that wait to be posted.",
                  lambda: {"": poster.waiting()})


def shown_url(url: str) -> str:
    """A URL for the log, without a password or token in it."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2],
                                                  query="", fragment=""))


def redirect_of(url: str, reply: Reply) -> str:
    """The target of a redirect as an absolute URL; empty if it is no redirect."""
    location = reply.fields.get("location", "")
    if reply.status not in (301, 302, 303, 307, 308) or not location:
        return ""
    try:  # fields are bytes: PHP writes UTF-8
        return urllib.parse.urljoin(url, location.encode("latin-1").decode(
            "utf-8", "surrogateescape"))
    except ValueError:
        return "nowhere:"  # it cannot be read: a URL that is never followed


def same_origin(url: str, other: str) -> bool:
    """Whether two URLs belong to the same server."""
    try:
        return origin_of(url) == origin_of(other)
    except ValueError:
        return False


class Outlet:
    """Where an account's events go: the ring, post_api, stdout."""

    KEPT = re.compile("(new|lose)_")  # kept whatever post_event_list says (CONTRACT 6)
    KEPT_IF_LISTED = re.compile(".*_property_change|(friend|group)_request|revoke_message|"
                                "group_(shutup|upload)|poke|(onebot|milky)_event")
    NEWS = ("login", "stop", "state_change", "input_qrcode")  # for streams only, not kept

    def __init__(self, store: EventStore, poster: Poster, listed: Iterable[str],
                 stdout: bool, numeric: bool, bytes_too: bool) -> None:
        self.store, self.poster = store, poster
        self._listed, self._stdout, self._numeric = set(listed), stdout, numeric
        self._bytes_too = bytes_too

    def put(self, event: str, row: Row, conversation: str, mark: str) -> bool:
        """Pass an event on; whether it was queued on disk, together with its mark."""
        queued = row if self._bytes_too else {
            name: value for name, value in row.items() if name != "media_data"}
        row = numbered(queued) if self._numeric else queued
        message = row["post_type"] != "event"
        listed = event in self._listed
        if message or self.KEPT.match(event) or (listed and self.KEPT_IF_LISTED.match(event)):
            self.store.add(row)
        elif event in self.NEWS:
            self.store.tell(row)
        if not message and not listed:
            return False
        if self._stdout:
            try:
                os.write(1, to_bytes(row) + b"\n")
            except OSError:
                self._stdout = False  # nobody reads it any more
        self.poster.add(queued, conversation, mark or None)
        return True


class Heartbeat:
    """Calls poll_api again and again, and follows its redirects to our own API (CONTRACT 7): so a
    server outside can control it. `own`: port of a server of ours -> its URL."""

    HOPS = 7

    def __init__(self, url: str, interval: float, own: Dict[int, str], token: str, log: Log,
                 fetch: Callable[..., Reply] = fetch) -> None:
        self._url, self._interval, self._own, self._token = url, interval, own, token
        self._log, self._fetch = log, fetch
        self._started, self._ended = False, threading.Event()

    def start(self) -> None:
        """Call it until stop(); a second call does nothing."""
        if not self._started:
            self._started = True
            spawn(self._run, name="heartbeat")

    def stop(self) -> None:
        """No further beat."""
        self._ended.set()

    def _run(self) -> None:
        failed = False
        while not self._ended.is_set():
            try:
                self._beat()
                failed = False
            except Unreachable as error:
                if not failed:
                    self._log.warn(f"{shown_url(self._url)} (poll_api): {error.status}")
                failed = True
            except Exception:  # it goes on
                self._log.failure("a heartbeat")
            self._ended.wait(max(self._interval, float(failed)))  # at least 1 s after a failure

    def _beat(self) -> None:
        """Ask once, and follow where the answer leads. Unreachable."""
        url = self._url
        for _ in range(self.HOPS + 1):
            reply = self._fetch(url, seconds=86_400.0)  # a long poll
            reply.read()
            target = redirect_of(url, reply)
            if not target:
                return
            try:
                parts, (_, host, port) = urllib.parse.urlsplit(target), origin_of(target)
            except ValueError:
                host, port = "", 0
            if port in self._own and is_loopback(host) and (
                    re.match("/open(qq|wx)/", parts.path)):
                own = self._own[port] + urllib.parse.urlunsplit(
                    parts._replace(scheme="", netloc="", fragment=""))  # under our own address
                fields = {"Authorization": bearer(self._token)} if self._token else {}
                reply = self._fetch(own, fields=fields, seconds=PROXY_SECONDS)
                reply.read()
                return self._log.info(f"poll_api had us call {shown_url(own)}: {reply.status}")
            if not same_origin(self._url, target):
                return self._log.warn(f"poll_api leads to {shown_url(target)}, which is neither "
                                      "our own API nor its own server: not followed")
            url = target
        self._log.warn(f"poll_api leads on after {self.HOPS} redirects: given up")


# ------------------------------------------------------------------------------------------------
# 10. Local network
# ------------------------------------------------------------------------------------------------

ROLES = {"owner": "create", "admin": "manage", "member": "attend"}  # member's role -> group's
RANKS = {"owner": 3, "admin": 2, "member": 1}
SEGMENTS = {"image": "image", "audio": "record", "video": "video"}  # half a media type -> segment
UID = re.compile("[1-9][0-9]{0,17}")  # fits into 64 bits
PROPERTIES = {"role": "owner|admin|member", "echo": "[01]", "name": r"(?s)(?=.*\S).*",
              "muted": r"[0-9]{1,12}(\.[0-9]{1,9})?"}


def weight(row: Row) -> int:
    """About the size of a message or an event in bytes."""
    return len(to_bytes(row)) if "event" in row else (
        6 * len(row["content"]) + len((row.get("media") or {}).get("data", "")))


def name_to_uid(name: str) -> str:
    """A number for an account: its name if that is a number, else a hash of it."""
    if name.isascii() and name.isdigit():
        return name
    return str(1_000_000_000 + zlib.crc32(name.encode()))


def typed(name: str, value: Json) -> Json:
    """A property with its type by CONTRACT 1: text, or a number for the two that are numbers."""
    if value is None:
        return None
    text = str(int(value)) if isinstance(value, bool) else str(value)
    return int(text) if name in ("max_member", "max_admin") and LENGTH.fullmatch(text) else text


def require(there: Any, what: str) -> None:
    """NotFound unless `there` is true."""
    if not there:
        raise NotFound(f"{what} not found")


def check_properties(row: Row) -> None:
    """NotFound for a property that is too long, or that the network could not use."""
    for name, value in row.items():
        good = re.fullmatch(PROPERTIES.get(name, "(?s).*"), str(value))
        require(good and len(str(value)) <= SETTING_LIMIT, f"{name[:100]} {str(value)[:100]}")


def member_of(group: str, uid: str) -> Row:
    """A member of a group, in the params of an event."""
    return {"kind": "group_member", "uid": uid, "circle": group}


class Session:
    """What is known of an account only while the host runs."""

    def __init__(self) -> None:
        self.mode = "online"         # the state that others shall see
        self.online = False          # logged in
        self.running = False         # and its client has loaded the roster
        self.notes: List[Row] = []   # for its client, about the login: without number, not kept
        self.pull: Optional[Future[bool]] = None  # its client waits for news
        self.waiters: Set[Future[bool]] = set()   # of callers, until it is running


class World:
    """The people, groups and discusses of the local network, how each account sees them, and what
    waits for each account: tables in a ledger, by uid.

    people: uid -> row. friend: uid -> friend's uid -> how the first sees the second; mark: the
    same for members of groups. group and discuss: uid -> row; group_member and discuss_member:
    uid -> member's uid -> row. login: account -> uid, nonce, cookie, time. wait: account ->
    number -> item; seq: account -> its last number.
    """

    def __init__(self, path: str, world_file: str, flavour: Type[Flavour], log: Log,
                 clock: Callable[[], float]) -> None:
        self.flavour, self.log, self.clock = flavour, log, clock
        self.ledger = Ledger(path + ".json", path + ".jsonl", log)
        self.put, self.table = self.ledger.put, self.ledger.table
        self.sessions: Dict[str, Session] = collections.defaultdict(Session)  # by account
        self.sent: Dict[str, Row] = {}  # the newest messages, by id: uid, group, receivers
        self._dropped = 0
        data = read_file(os.path.realpath(world_file)) if world_file else to_bytes(flavour.world)
        digest = f"{zlib.crc32(data):08x}" if world_file and data else ""
        about: Any = self.table("about")
        if self.ledger.root and not (isinstance(about, dict) and about):
            set_aside(path + ".json", log)
            about = {}
        if not about or digest not in ("", about.get("world")):
            try:
                self._begin(from_bytes(data or b""), digest)
            except (ValueError, KeyError, TypeError, AttributeError, NotFound):
                raise Refusal(f"world file {world_file} cannot be read: there must be one, and it "
                              "must hold what /local/world shows") from None
        self.era = str(self.table("about").get("era", ""))  # numbers of another era do not count
        self.account_of = {row["uid"]: account for account, row in self.table("login").items()}

    def _begin(self, spec: Row, digest: str) -> None:
        """Begin with the content of a world file."""
        put, self.ledger.root = self.put, {}
        put(os.urandom(4).hex(), "about", "era")
        put(digest, "about", "world")
        for person in [*self.fixtures(), *spec["people"]]:
            uid = str(person["uid"])
            person = {**person, "name": str(person.get("name") or uid)}
            check_properties(person)
            put(person, "people", uid)
        for table, circles in ("group", "groups"), ("discuss", "discuss"):
            for circle in spec.get(circles, []) if table in self.flavour.fields else []:
                uid, owner = str(circle["uid"]), str(circle.get("owner_uid"))
                members = circle.pop("member")
                put(circle, table, uid)
                for row in members:
                    row = dict(row) if isinstance(row, dict) else {"uid": str(row)}
                    check_properties(row)
                    if str(row["uid"]) == owner:
                        row["role"] = "owner"
                    put(row, table + "_member", uid, str(row["uid"]))
        for one, other in spec.get("friends", []):
            put({}, "friend", str(one), str(other))
            put({}, "friend", str(other), str(one))
        remove_file(self.ledger.path)  # else a kill now would mix the old world with the new
        self.ledger.save()

    def fixtures(self) -> List[Row]:
        """The people of every world: those with a fixed id (filehelper)."""
        return [person for person in self.flavour.world["people"] if "id" in person]

    def dump(self) -> Row:
        """The content of a world file, and of /local/world."""
        table = self.table
        return {
            "people": list(table("people").values()),
            "groups": [dict(row, member=[
                {"uid": m, "role": member.get("role", "member"), "card": member.get("card")}
                for m, member in table("group_member", uid).items()])
                for uid, row in table("group").items()],
            "discuss": [dict(row, member=list(table("discuss_member", uid)))
                        for uid, row in table("discuss").items()],
            "friends": [[one, other] for one, others in table("friend").items()
                        for other in others if one < other]}

    # -- who is who

    def own_uid(self, account: str) -> str:
        """The uid of an account that has logged in once."""
        return str(self.table("login", account)["uid"])

    def find(self, table: str, who: str, viewer: str = "") -> str:
        """The uid of a person, group or discuss by uid, account, name or the viewer's id."""
        rows = self.table(table)
        login = self.table("login", who) if table == "people" else {}
        for uid in who, login.get("uid"):
            if uid and uid in rows:
                return str(uid)
        for uid, row in rows.items() if who else ():
            if row.get("name") == who or (viewer and self.id_for(viewer, uid, table) == who):
                return uid
        raise NotFound(f"{who[:100] or table} not found")

    def id_for(self, account: str, uid: str, table: str = "people") -> str:
        """The id of a uid for an account: it changes with each scan."""
        import hashlib
        fixed = self.table(table, uid).get("id")
        if fixed:
            return str(fixed)
        nonce = self.table("login", account).get("nonce", "")
        digest = hashlib.blake2b(f"{nonce}/{uid}".encode(), digest_size=16)
        number = 10 ** 14 + int.from_bytes(digest.digest()[:8], "big") % (9 * 10 ** 14)
        return self.flavour.ids[table].format(number=number, hex=digest.hexdigest())

    def role(self, group: str, uid: str) -> str:
        """owner, admin or member; empty if somebody is not in the group."""
        row = self.table("group_member", group).get(uid)
        return "" if row is None else str(row.get("role", "member"))

    def state_of(self, uid: str) -> str:
        """Residents are always online, accounts while they are logged in and not hidden."""
        account = self.account_of.get(uid)
        if account is None:
            return "online"
        session = self.sessions[account]
        return session.mode if session.online and session.mode != "hidden" else "offline"

    # -- how an account sees it

    def presence(self, account: str) -> Dict[str, str]:
        """uid -> state of all accounts, and of people who were given a state."""
        return {uid: str(row.get("state") or self.state_of(uid))
                for uid, row in self.table("people").items()
                if uid in self.account_of or "state" in row}

    def seen(self, kind: str, account: str, uid: str, circle: str = "",
             members: bool = True) -> Row:
        """The documented fields of a thing as an account sees it; for a member, `circle` is its
        group or discuss. A group or discuss comes with its members, or without."""
        me, is_circle = self.own_uid(account), kind in ("group", "discuss")
        row: Row = {**self.flavour.usual, "state": self.state_of(uid),
                    "account": self.account_of.get(uid, uid)}
        if is_circle:
            row.update(self.table(kind, uid))
            everybody, owner = self.table(kind + "_member", uid), str(row.get("owner_uid") or "")
            role = (everybody.get(me) or {}).get("role", "member")
            row.update(role=ROLES[role], owner_uid=owner or None, code=uid,
                       owner_id=self.id_for(account, owner) if owner else None)
        elif circle:
            row.update({**self.table("people", uid), "role": "member",
                        **self.table(kind, circle, uid), **self.table("mark", me, uid)})
        else:
            row.update({**self.table("people", uid),
                        **(self.table("friend", me, uid) if kind == "friend" else {})})
        row.update(uid=uid, id=self.id_for(account, uid, kind if is_circle else "people"),
                   display=row.get("card"))
        names = self.flavour.fields[kind] + (("title",) if row.get("title") else ())
        seen = {name: typed(name, row.get(name)) for name in names}
        if is_circle:
            seen["uid"] = uid  # also for a discuss, where it is not documented
            if members:
                seen["member"] = [self.seen(kind + "_member", account, member, uid)
                                  for member in everybody]
        return seen

    def roster(self, account: str) -> Row:
        """All that an account loads at login."""
        me, table = self.own_uid(account), self.table
        return {"user": self.seen("user", account, me),
                "friend": [self.seen("friend", account, uid) for uid in table("friend", me)],
                **{what: [self.seen(what, account, uid) for uid in table(what)
                          if me in table(what + "_member", uid)]
                   for what in ("group", "discuss")}}

    # -- what waits for an account, numbered, until it says that it has it

    def tell(self, uids: Iterable[str], event: str, parts: Row, of: Sequence[Any] = (),
             away: bool = False) -> None:
        """Send an event to those people who are accounts and online, or with `away` to all
        accounts. `of` are the arguments of seen() for the event's object, as each sees it."""
        for uid in uids:
            account = self.account_of.get(uid)
            if account is not None and (away or self.sessions[account].online):
                item = {"do": "event", "event": event, "time": str(int(self.clock())), **parts}
                if of:
                    item["object"] = self.seen(of[0], account, *of[1:])
                self.deliver(account, item)

    def deliver(self, account: str, item: Row) -> None:
        """Queue an item for an account; drop the oldest if there are too many, or too large
        ones."""
        number = int(self.table("seq").get(account, 0)) + 1
        self.put(number, "seq", account)
        self.put(item, "wait", account, str(number))
        waiting = self.table("wait", account)
        limit = POST_QUEUE_LIMIT if self.sessions[account].online else WAIT_LIMIT
        too_many = list(itertools.islice(waiting, max(0, len(waiting) - limit)))
        if item.get("media"):
            pictures = {key: weight(row) for key, row in waiting.items() if row.get("media")}
            excess = sum(pictures.values()) - WAIT_BYTES
            for key, size in pictures.items():
                if excess > 0:
                    too_many.append(key)
                    excess -= size
        for key in too_many:
            self.put(None, "wait", account, key)
            self._dropped += 1
            if is_news(self._dropped):
                self.log.warn(f"{self._dropped} message(s) dropped: too many wait")
        self.wake(account)

    def note(self, account: str, item: Row) -> None:
        """Tell an account's client something about its login."""
        self.sessions[account].notes.append(item)
        self.wake(account)

    def wake(self, account: str) -> None:
        """Wake an account's client; it gets the news when the lock is free, so all is on disk."""
        session = self.sessions[account]
        if session.pull:
            settle(session.pull, True)
            session.pull = None

    def take(self, account: str) -> List[Row]:
        """The notes and, once the client has loaded the roster, the queued items, oldest first,
        each with the mark that acknowledges it."""
        session = self.sessions[account]
        items, session.notes = session.notes, []
        size, waiting = 0, self.table("wait", account) if session.running else {}
        for number, item in itertools.islice(waiting.items(), 256):
            items.append(dict(item, mark=f"{self.era}:{number}"))
            size += weight(item)
            if size > BATCH_LIMIT:
                break
        return items

    def acknowledge(self, account: str, mark: str) -> None:
        """Remove what an account has received: all up to its mark, `ERA:NUMBER`."""
        era, _, number = mark.partition(":")
        if era == self.era and number.isdigit():
            for key in list(self.table("wait", account)):
                if int(key) > int(number):
                    break
                self.put(None, "wait", account, key)


class Society(World):
    """What people do with each other besides talking, and what may be changed from outside. Each
    change is told to the accounts that see it and are online.

    The methods in VERBS are those of Link, which describes delete_friend(), create_group(),
    rename(), kick(), mute(), mute_all(), set_admin(), set_title() and leave_group(). Each gets the
    uid of the account that acts (`me`), and raises NotFound, with nothing done, if it may not.
    """

    VERBS = ("revoke", "make_friend", "answer_request", "create_group", "invite", "rename",
             "set_markname", "kick", "mute", "mute_all", "set_card", "set_admin", "set_title",
             "leave_group", "delete_friend", "poke", "answer_group_request")

    def _tell_change(self, viewers: Iterable[str], kind: str, uid: str, row: Row,
                     **more: str) -> None:
        """Tell that properties of a thing of some kind have changed."""
        for name, value in row.items():
            self.tell(viewers, kind + "_property_change", {
                "uid": uid, "property": name, "value": typed(name, value), **more})

    def _set(self, row: Row, kind: str, viewers: Iterable[str], *path: str, **more: str) -> None:
        """Change properties of the thing at a path in the ledger, which ends with its uid."""
        self.put({**self.table(*path), **row}, *path)
        self._tell_change(viewers, kind, path[-1], row, **more)

    def _keep_request(self, table: str, request: Row) -> str:
        """Keep a request; returns the ticket by which it will be answered."""
        ticket, requests = new_secret(), self.table(table)
        if len(requests) >= WAIT_LIMIT:  # nobody answered the oldest
            self.put(None, table, next(iter(requests)))
        self.put(request, table, ticket)
        return ticket

    # -- friends

    def befriend(self, one: str, other: str, row: Optional[Row] = None) -> None:
        """Make two people friends; `row` is how `other` sees `one`."""
        self.put(row or {}, "friend", other, one)
        self.put(self.table("friend", one).get(other) or {}, "friend", one, other)
        for viewer, seen in (other, one), (one, other):
            self.tell([viewer], "new_friend", {}, ("friend", seen))

    def unfriend(self, one: str, other: str) -> None:
        """End a friendship."""
        for viewer, seen in (other, one), (one, other):
            self.tell([viewer], "lose_friend", {}, ("friend", seen))
            self.put(None, "friend", viewer, seen)

    def ask_friend(self, me: str, uid: str, verify: str) -> None:
        """Let somebody ask another to be a friend."""
        name, viewer = self.table("people", me).get("name") or me, self.account_of.get(uid, "")
        self.tell([uid], "friend_request", {"request": {
            "id": self.id_for(viewer, me), "name": name, "displayname": name, "verify": verify,
            "ticket": self._keep_request("request", {"from": me, "to": uid})}}, away=True)

    def make_friend(self, me: str, uid: str, verify: str) -> None:
        """Ask somebody to be a friend; residents accept at once."""
        require(uid in self.table("people"), uid)
        if uid in self.account_of:
            self.ask_friend(me, uid, verify)
        else:
            self.befriend(me, uid)

    def answer_request(self, me: str, ticket: str, accept: bool, markname: str) -> None:
        """Accept or decline a friend_request; a ticket is valid for one answer."""
        request = self.table("request", ticket)
        require(request.get("to") == me, "ticket")
        self.put(None, "request", ticket)
        if accept:
            self.befriend(request["from"], me, {"markname": markname} if markname else {})

    def delete_friend(self, me: str, uid: str) -> None:
        require(uid in self.table("friend", me), uid)
        self.unfriend(uid, me)

    def set_markname(self, me: str, uid: str, markname: str) -> None:
        """Give a friend or a member of a group a markname, which nobody else sees."""
        if uid in self.table("friend", me):
            self._set({"markname": markname}, "friend", [me], "friend", me, uid)
        self.put({"markname": markname}, "mark", me, uid)
        for group, members in self.table("group_member").items():
            if me in members and uid in members:
                self._tell_change([me], "group_member", uid, {"markname": markname}, circle=group)

    def poke(self, me: str, uid: str, group: str) -> None:
        """Poke a friend, or a member of a group, where all members see it."""
        members = self.table("group_member", group) if group else self.table("friend", me)
        require(uid in members, f"{uid} as a friend, or in the group,")
        pair = [member_of(group, one) if group else {"kind": "friend", "uid": one}
                for one in (me, uid)]
        self.tell(members if group else [me, uid], "poke", {
            "params": [*pair, {"kind": "group", "uid": group} if group else None]})

    def revoke(self, me: str, id: str) -> None:
        """Take back one's own message, or that of a member whom one may mute. Its receivers are
        told; for those who are offline it is just removed from the queue."""
        found = self.sent.get(id) or {}
        require(found and (found["uid"] == me or found["group"] and self._may(
            me, found["group"], "admin", found["uid"])), id)
        del self.sent[id]
        for uid in found["receivers"]:
            account = self.account_of.get(uid, "")
            for key, item in list(self.table("wait", account).items()):
                if item.get("id") == id and not self.sessions[account].online:
                    self.put(None, "wait", account, key)
        self.tell(found["receivers"], "revoke_message", {
            "params": [id, found["uid"], me, found["group"]]})

    # -- groups and discusses: `table` is either

    def _may(self, me: str, group: str, role: str, *uids: str) -> bool:
        """Whether somebody has this role in a group or a higher one, and one above the role of each
        of some other members: so owners may act on all, admins on plain members."""
        mine, *others = [RANKS.get(self.role(group, uid), 0) for uid in (me, *uids)]
        return mine >= RANKS[role] and all(0 < other < mine for other in others)

    def enter(self, table: str, circle: str, uid: str, row: Row, **facts: Json) -> None:
        """Add somebody to a group or discuss; the first account becomes its owner. `facts` are kind
        (approve, invite) and operator_uid."""
        if not self.table(table, circle).get("owner_uid") and uid in self.account_of:
            self.put(dict(self.table(table, circle), owner_uid=uid), table, circle)
            row = dict(row, role="owner")
        self.put(dict(row, uid=uid, join_time=str(int(self.clock()))), table + "_member",
                 circle, uid)
        self._tell_move("new_", table, circle, uid, facts)

    def leave(self, table: str, circle: str, uid: str, **facts: Json) -> None:
        """Remove somebody from a group or discuss; kind is leave or kick."""
        self._tell_move("lose_", table, circle, uid, facts)
        self.put(None, table + "_member", circle, uid)

    def _tell_move(self, way: str, table: str, circle: str, uid: str, facts: Row) -> None:
        members = table + "_member"
        self.tell([uid], way + table, {}, (table, circle, "", way == "new_"))
        others = [member for member in self.table(members, circle) if member != uid]
        self.tell(others, way + members, {**facts, "circle": circle}, (members, uid, circle))

    def set_member(self, group: str, uid: str, row: Row) -> None:
        """Set card, role or title of a member; one's own role is the `role` of the group, too."""
        members = self.table("group_member", group)
        owner = str(self.table("group", group).get("owner_uid") or "")
        if row.get("role") == "owner" and owner != uid:
            self._set({"owner_uid": uid}, "group", members, "group", group)
            if owner in members:
                self.set_member(group, owner, {"role": "member"})  # there is only one owner
        self._set(row, "group_member", members, "group_member", group, uid, circle=group)
        if "role" in row:
            self._tell_change([uid], "group", group, {"role": ROLES[row["role"]]})

    def create_group(self, me: str, uids: List[str], name: str) -> str:
        group = name_to_uid(f"{name}/{new_secret()}")
        self.put({"uid": group, "name": name, "owner_uid": ""}, "group", group)
        for uid in [me, *uids]:
            self.enter("group", group, uid, {})
        return group

    def invite(self, me: str, group: str, uids: List[str]) -> None:
        """Add friends to a group; those who are in it already stay."""
        require(self._may(me, group, "member"), group)
        for uid in uids:
            if not self.role(group, uid):
                self.enter("group", group, uid, {}, kind="invite", operator_uid=me)

    def rename(self, me: str, group: str, name: str) -> None:
        require(self._may(me, group, "member"), group)
        self._set({"name": name}, "group", self.table("group_member", group), "group", group)

    def kick(self, me: str, group: str, uids: List[str]) -> None:
        require(self._may(me, group, "admin", *uids), group)
        for uid in uids:
            self.leave("group", group, uid, kind="kick", operator_uid=me)

    def mute(self, me: str, group: str, uids: List[str], seconds: int) -> None:
        require(self._may(me, group, "admin", *uids), group)
        members = self.table("group_member", group)
        for uid in uids:
            self.put(dict(members[uid], muted=self.clock() + seconds), "group_member", group, uid)
            self._tell_shutup(me, group, member_of(group, uid), seconds)

    def mute_all(self, me: str, group: str, on: bool) -> None:
        require(self._may(me, group, "admin"), group)
        self.put({**self.table("group", group), "muted": on}, "group", group)
        self._tell_shutup(me, group, None, -1 if on else 0)

    def _tell_shutup(self, me: str, group: str, who: Optional[Row], seconds: int) -> None:
        self.tell(self.table("group_member", group), "group_shutup", {"params": [
            who, member_of(group, me), seconds, {"kind": "group", "uid": group}]})

    def set_card(self, me: str, group: str, uid: str, card: str) -> None:
        """Set the card of oneself, or of a member whom one may mute."""
        require(self._may(me, group, "member") if uid == me else
                self._may(me, group, "admin", uid), group)
        self.set_member(group, uid, {"card": card or None})

    def set_admin(self, me: str, group: str, uid: str, on: bool) -> None:
        require(self._may(me, group, "owner", uid), group)
        self.set_member(group, uid, {"role": "admin" if on else "member"})

    def set_title(self, me: str, group: str, uid: str, title: str) -> None:
        require(self._may(me, group, "owner") and self.role(group, uid), group)
        self.set_member(group, uid, {"title": title or None})

    def leave_group(self, me: str, group: str) -> None:
        require(self._may(me, group, "member"), group)
        self.leave("group", group, me, kind="leave", operator_uid=me)

    def ask_group(self, uid: str, group: str, inviter: str, comment: str) -> None:
        """Let somebody ask to join a group, or let a member invite somebody."""
        members, who = self.table("group_member", group), inviter or uid
        require(uid not in members, f"{uid} outside of {group}")
        require(not inviter or inviter in members, f"{inviter} in {group}")
        request = {"kind": "invite" if inviter else "join", "group_uid": group, "uid": uid,
                   "from": inviter}
        told = {**request, "ticket": self._keep_request("group_request", request), "uid": who,
                "comment": comment, "group": self.table("group", group).get("name"),
                "name": self.table("people", who).get("name") or who}
        self.tell([uid] if inviter else [one for one in members if self._may(one, group, "admin")],
                  "group_request", {"request": told}, away=True)

    def answer_group_request(self, me: str, ticket: str, accept: bool, reason: str) -> None:
        """Let somebody join who asked for it, or join a group that one was invited to."""
        request = self.table("group_request", ticket)
        group, uid, inviter = [request.get(name) or "" for name in ("group_uid", "uid", "from")]
        require(uid and (uid == me if inviter else self._may(me, group, "admin")), "ticket")
        self.put(None, "group_request", ticket)
        if accept and not self.role(group, uid):
            self.enter("group", group, uid, {}, kind="invite" if inviter else "approve",
                       operator_uid=inviter or me)

    # -- what may be changed from outside

    def change(self, params: Params) -> Row:
        """Do what /local/change says: {"uid": …}. NotFound."""
        row = dict(params)
        do, what, who, where = [row.pop(name, "") for name in ("do", "what", "uid", "in")]
        uid, place, circle = who, where, "group"
        if what.startswith("discuss") and "discuss" in self.flavour.fields:
            circle = "discuss"
        changes: Dict[str, Callable[[], Any]] = {
            "add person": lambda: self._add("people", uid, row),
            "set person": lambda: self._set_person(uid, row),
            "remove person": lambda: self._remove_person(uid),
            "add friend": lambda: self.befriend(uid, place, row),
            "set friend": lambda: self._set(row, "friend", [place], "friend", place, uid),
            "remove friend": lambda: self.unfriend(uid, place),
            "add friend_request": lambda: self.ask_friend(uid, place, str(row.get("verify", ""))),
            "add group_request": lambda: self.ask_group(
                uid, place, self.find("people", row["from"]) if row.get("from") else "",
                str(row.get("comment", ""))),
            "add poke": lambda: self.poke(uid, self.find("people", str(row.get("to", ""))), place),
            f"add {circle}": lambda: self._add(circle, uid, row),
            f"set {circle}": lambda: self._set_circle(circle, uid, row),
            f"remove {circle}": lambda: self._remove_circle(circle, uid),
            f"add {circle}_member": lambda: self.enter(circle, place, uid, row),
            "set group_member": lambda: self.set_member(place, uid, row),
            f"remove {circle}_member": lambda: self.leave(circle, place, uid)}
        if "group_request" not in self.flavour.fields:
            del changes["add group_request"]
        require(f"{do} {what}" in changes, f"do={do[:100]} what={what[:100]}")
        check_properties(row)
        within = {"friend": "people", "friend_request": "people", "group_request": "group",
                  circle + "_member": circle, "poke": "group" if place else ""}.get(what)
        if do != "add" or what not in ("person", circle):
            uid = self.find(circle if what == circle else "people", uid)
        place = self.find(within, place) if within else place
        require(do != "add" or uid != place or what not in ("friend", "friend_request"),
                "a friend other than oneself")
        if what.endswith("_member") or what == "friend" and do != "add":
            adds = do == "add"
            require(adds != (uid in self.table(what, place)), f"{who} outside of {where}" if adds
                    else f"{what.rpartition('_')[2]} {who}")
        return {"uid": changes[f"{do} {what}"]() or uid}

    def _add(self, table: str, uid: str, row: Row) -> str:
        """Add a person, or a group or discuss, with the owner in it that `owner_uid` names, if any.
        If only one of name and uid is given, the other is made from it."""
        name = str(row.get("name") or uid)
        uid = uid or (name_to_uid(("" if table == "people" else table) + name) if name else "")
        require(UID.fullmatch(uid), "uid as a number of 1 to 18 digits")
        require(uid not in self.table(table), f"uid {uid} is there already: a free one")
        row, owner = {**row, "uid": uid, "name": name}, ""
        if table != "people":
            owner = self.find("people", row["owner_uid"]) if row.get("owner_uid") else ""
            row["owner_uid"] = owner
        self.put(row, table, uid)
        if owner:
            self.enter(table, uid, owner, {"role": "owner"})
        return uid

    def _circles_of(self, uid: str) -> List[Tuple[str, str]]:
        """The groups and discusses that somebody is in: table and uid."""
        return [(table, circle) for table in ("group", "discuss") for circle in self.table(table)
                if uid in self.table(table + "_member", circle)]

    def _set_circle(self, table: str, uid: str, row: Row) -> None:
        members = self.table(table + "_member", uid)
        if "owner_uid" in row:
            row["owner_uid"] = self.find("people", str(row["owner_uid"]))
            require(row["owner_uid"] in members, "a member of that uid")
            if table == "group":  # there is only one owner
                self.set_member(uid, row.pop("owner_uid"), {"role": "owner"})
        self._set(row, table, members, table, uid)

    def _set_person(self, uid: str, row: Row) -> None:
        self._set(row, "user", [uid], "people", uid)
        self._tell_change(self.table("friend", uid), "friend", uid, row)
        for table, circle in self._circles_of(uid):
            self._tell_change(self.table(table + "_member", circle), table + "_member", uid, row,
                              circle=circle)

    def _remove_person(self, uid: str) -> None:
        for friend in list(self.table("friend", uid)):
            self.unfriend(uid, friend)
        for table, circle in self._circles_of(uid):
            self.leave(table, circle, uid)
        self.put(None, "people", uid)

    def _remove_circle(self, table: str, uid: str) -> None:
        self.tell(self.table(table + "_member", uid), "lose_" + table, {}, (table, uid, "", False))
        self.put(None, table + "_member", uid)
        self.put(None, table, uid)


class LocalNetwork(Society):
    """A small chat network inside the program (DESIGN): logins and messages.

    `known(account)` tells whether there is a client of that name; `url()`, which takes no lock,
    returns how a phone reaches the host.
    """

    # What a link may call besides Society.VERBS; each gets the account.
    CALLS = ("attach", "ticket", "ready", "logout", "roster", "presence", "send")

    def __init__(self, path: str, world_file: str, flavour: Type[Flavour], log: Log,
                 url: Callable[[], str], known: Callable[[str], bool] = lambda account: True,
                 clock: Callable[[], float] = time.time) -> None:
        super().__init__(path, world_file, flavour, log, clock)
        self.lock = threading.RLock()  # guards all state of World, Society and this class
        self.known, self._url, self.ended = known, url, False
        self.timer = time.monotonic    # the clock of tickets
        # Account -> ticket, which is in its QR code, and nobody can guess; when it expires.
        self._tickets: Dict[str, Tuple[str, float]] = {}
        waiting = {item.get("id") for items in self.table("wait").values()
                   for item in items.values()}
        self._ids = MessageIds(clock, lambda number: str(number) in self.sent
                               or str(number) in waiting)

    def stop(self) -> None:
        """Save everything; from now on all calls raise NotRunning."""
        with self.lock:
            self.ledger.save()
            self.ended = True

    def do(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call a function under the lock; what it changed is on disk before the lock is free."""
        with self.lock:
            if self.ended:
                raise NotRunning("stopping")
            try:
                return function(*args, **named)
            finally:
                self.ledger.commit()

    def call(self, account: str, verb: str, args: Sequence[Json], named: Row,
             wait: Wait = result_of) -> Json:
        """Do what the link of an account asks: a method of Link, with its arguments."""
        if verb == "pull":
            return self._pull(account, str(args[0]), wait)
        if verb in self.CALLS:
            return self.do(getattr(self, verb), account, *args, **named)
        require(verb in self.VERBS, verb)
        try:
            done = self.do(lambda: getattr(self, verb)(self.own_uid(account), *args, **named))
        except NotFound:
            return False
        return True if done is None else done

    def _pull(self, account: str, mark: str, wait: Wait) -> List[Row]:
        """What happened to an account, as soon as there is something after `mark`."""
        with self.lock:
            self.do(self.acknowledge, account, mark)
            items = self.take(account)
            if items:
                return items
            session = self.sessions[account]
            future: Future[bool] = Future()
            if session.pull:
                settle(session.pull, False)  # a former call of its client, which has gone
            session.pull = future
        woken = True
        try:
            woken = wait(future, 300.0)
        except TimeoutError:
            pass
        finally:
            with self.lock:
                if session.pull is future:
                    session.pull = None
        with self.lock:
            return self.take(account) if woken else []

    # -- logins

    def attach(self, account: str, mark: str, cookie: str, password: bool,
               mode: str = "online") -> Row:
        """An account's client has come. {"login": …} if it is logged in by that, else {}."""
        session = self.sessions[account]
        session.mode, session.notes = mode, []
        self.acknowledge(account, mark)
        row = self.table("login", account)
        age = self.clock() - float(row.get("time", 0))
        if not cookie or cookie != row.get("cookie") or not 0 <= age < COOKIE_SECONDS:
            cookie = ""
        if not cookie and not password:
            return {}
        return {"login": self._log_in(account, row.get("nonce") or new_secret(), cookie)}

    def ticket(self, account: str) -> None:
        """Make a new QR code; the former one becomes invalid. The client gets it as a note, so that
        it comes before later notes."""
        ticket = new_secret()
        self._tickets[account] = ticket, self.timer() + TICKET_SECONDS
        # A proxy in front of many controllers finds the right one by `client`.
        query = urllib.parse.urlencode({"client": account, "ticket": ticket})
        self.note(account, {"do": "qrcode", "seconds": TICKET_SECONDS,
                            "text": f"{self._url()}/local/scan?{query}"})
        if self.sessions[account].waiters:
            self.confirm(ticket)

    def scan(self, ticket: str) -> str:
        """Somebody opened the URL of the code: its account; NotFound if it is used or expired."""
        now = self.timer()
        account = {known: name for name, (known, end) in self._tickets.items() if now < end
                   }.get(ticket, "")
        require(account, "ticket")
        self.note(account, {"do": "scanned"})
        return account

    def confirm(self, ticket: str) -> str:
        """Somebody pressed the button: its account, or NotFound."""
        account = self.scan(ticket)
        del self._tickets[account]
        self.note(account, {"do": "confirmed", "login": self._log_in(account, new_secret())})
        return account

    def force_login(self, account: str) -> Future[bool]:
        """Log an account in, now or as soon as it shows a code; True when it is running."""
        future: Future[bool] = Future()
        if self.sessions[account].running:
            settle(future, True)
            return future
        self.sessions[account].waiters.add(future)
        ticket, end = self._tickets.get(account, ("", 0.0))
        if self.timer() < end:
            self.confirm(ticket)
        return future

    def ready(self, account: str) -> None:
        """An account's client is running."""
        session = self.sessions[account]
        session.running = True
        self.wake(account)
        for future in session.waiters:
            settle(future, True)
        session.waiters.clear()

    def detach(self, account: str) -> None:
        """An account's client is gone."""
        self._tickets.pop(account, None)
        self.sessions[account].running = self.sessions[account].online = False

    def logout(self, account: str) -> None:
        """The account is to be scanned again."""
        self.detach(account)
        row = self.table("login", account)
        if row:
            self.put(dict(row, cookie=""), "login", account)

    def delete(self, account: str) -> None:
        """Remove an account's login and its queue; the person stays in the world."""
        self.logout(account)
        self.put(None, "wait", account)

    def _log_in(self, account: str, nonce: str, cookie: str = "") -> Row:
        """A login by cookie keeps the cookie valid: a kill may come before a new one is written."""
        people, row = self.table("people"), self.table("login", account)
        uid = row.get("uid") or next((
            uid for uid, person in people.items()
            if person.get("name") == account and uid not in self.account_of), name_to_uid(account))
        while not row and uid in self.account_of:
            uid = str(int(uid) + 1)
        cookie = cookie or new_secret()
        self.put({"uid": uid, "nonce": nonce, "cookie": cookie, "time": self.clock()},
                 "login", account)
        self.account_of[uid] = account
        is_new = uid not in people  # if no world file has it, it becomes everybody's friend
        friends = list(people) if is_new else []
        if is_new:
            self.put({"uid": uid, "name": account}, "people", uid)
        elif not row:  # the very first login
            friends = [person["uid"] for person in self.fixtures()]
        for friend in friends:
            self.befriend(uid, friend)
        for table in ("group", "discuss") if is_new else ():
            for circle, about in list(self.table(table).items()):
                if about.get("name") == "OpenQQ":
                    self.enter(table, circle, uid, {})
        self.sessions[account].online = True  # only now: it will load these friends anyway
        return {"uid": uid, "cookie": cookie}

    # -- messages

    def send(self, account: str, messages: List[Row]) -> List[Row]:
        """Deliver messages, in order; for each {"code", "info", "id"} (CONTRACT 4), and `mark`,
        that of the answer, if somebody answered at once."""
        results: List[Row] = []
        for message in messages:
            before = self.table("seq").get(account)
            try:
                said = self.speak(self.own_uid(account), message)[0]
                results.append({"code": 0, "info": "发送正常", "id": said["id"]})
            except NotFound as error:
                results.append({"code": -4, "info": f"响应未知: {error.status}"})
            last = self.table("seq").get(account)
            if last != before:
                results[-1]["mark"] = f"{self.era}:{last}"
        return results

    def speak(self, uid: str, message: Row) -> List[Row]:
        """Let somebody say something: a message has type, content, and uid, group or discuss.
        Returns what was said, and after it the answers of residents, to which no resident answers
        again. NotFound if somebody may not speak there."""
        receivers = self._receivers(uid, message)
        said = [self._hand_out(uid, message, receivers)]
        alone = message["type"] in ("friend_message", "sess_message")
        answer = dict(message, uid=uid if alone else None, reply_to=None, at=[])
        for resident in receivers:  # only now, when all have received the message
            row = self.table("people", resident)
            if resident not in self.account_of and int(row.get("echo") or 0) and (
                    alone or row["name"] in message["content"]):  # called by its name
                with contextlib.suppress(NotFound):  # the resident is muted
                    said.append(self._hand_out(resident, answer,
                                               self._receivers(resident, answer)))
        return said

    def _receivers(self, uid: str, message: Row) -> List[str]:
        kind, target = message["type"], message.get("uid")
        if kind == "friend_message":
            require(target in self.table("friend", uid), "friend")
            return [str(target)]
        table = "group" if message.get("group") else "discuss"
        circle = str(message.get(table))
        members = self.table(table + "_member", circle)
        require(uid in members and (kind != "sess_message" or target in members), f"{table} member")
        if kind == "sess_message":
            return [str(target)]
        if float(members[uid].get("muted", 0)) > self.clock() or (
                self.table(table, circle).get("muted")
                and members[uid].get("role", "member") == "member"):
            raise NotFound("muted, not heard")
        members[uid]["last_speak_time"] = str(int(self.clock()))  # not worth a line of its own
        return [member for member in members if member != uid]

    def _hand_out(self, uid: str, message: Row, receivers: List[str]) -> Row:
        id, people, group = str(self._ids.next()), self.table("people"), message.get("group")
        at = [] if message.get("uid") else message.get("at") or []
        names = ["@%s " % ("全体成员" if one == "all" else people.get(one, {}).get("name", one))
                 for one in at]
        media = message.get("media")
        item = {"do": "message", "type": message["type"], "time": str(int(self.clock())), "id": id,
                "content": "".join([*names, message["content"]]),
                "uid": uid, "name": people[uid]["name"], "reply_to": message.get("reply_to"),
                "at": at, "group": group, "discuss": message.get("discuss"), "media": media}
        # For revoking: only the last WAIT_LIMIT messages.
        self.sent[id] = {"uid": uid, "group": group, "receivers": receivers}
        keep_newest(self.sent, WAIT_LIMIT)
        for receiver in receivers:
            account = self.account_of.get(receiver)
            if account is not None:
                self.deliver(account, dict(item, sender_id=self.id_for(account, uid)))
        if media and group and media.get("mime", "").partition("/")[0] not in SEGMENTS:
            size = str(len(media["data"]) * 3 // 4 - media["data"][-2:].count("="))
            self.tell(self.table("group_member", group), "group_upload", {"params": [
                member_of(group, uid), {"name": media["name"], "size": size, "id": id},
                {"kind": "group", "uid": group}]})
        return item


class LocalPages:
    """What the host of the network serves under /local/: for phones, scripts and clients."""

    def __init__(self, network: LocalNetwork) -> None:
        self._network = network
        self._keys: Dict[str, str] = {}  # key -> account; written by key_for only

    def routes(self) -> List[Route]:
        """The routes under /local/; those that are open are protected by a ticket or a key."""
        network = self._network
        return [Route("/local/scan", "GET", self.scan, open=True),
                Route("/local/confirm", "POST", self.scan, open=True),
                Route("/local/link", "POST", self.link, open=True),
                Route("/local/login", ACT, self.login),
                Route("/local/say", ACT, self.say),
                Route("/local/change", ACT, lambda request: {
                    **network.do(network.change, request.keys()), "code": 0, "status": "success"}),
                Route("/local/world", READ, lambda request: {
                    **network.do(network.dump), "code": 0})]

    def key_for(self, account: str) -> str:
        """A key by which a client proves that it speaks for its account."""
        key = new_secret()
        self._keys = {old: name for old, name in self._keys.items() if name != account}
        self._keys[key] = account
        return key

    def scan(self, request: Request) -> Response:
        """The URL of the QR code, opened by a phone: a page with a button; and what follows it."""
        network, ticket = self._network, request.params.get("ticket", "")
        confirms = request.path == "/local/confirm"
        try:
            account = network.do(network.confirm if confirms else network.scan, ticket)
        except NotFound:
            return page(SAY_BODY, {"title": "二维码已失效", "text": "This code is no longer valid: "
                        "it was used, or is too old. Scan the one that is shown now."}, 404)
        if confirms:
            return page(SAY_BODY, {"title": "✓ 登录成功",
                                   "text": "You are logged in; this page can be closed."})
        return page(SCAN_BODY, {"account": account, "ticket": ticket,
                                "client": urllib.parse.quote_plus(account)})

    def link(self, request: Request) -> Json:
        """The calls of a client's link; its key says for which account."""
        account = self._keys.get(request.fields.get("x-openqq-key", ""))
        if account is None:
            raise AuthFailure()
        try:
            call = from_bytes(request.body)
            verb, args, named = str(call["verb"]), list(call["args"]), dict(call["named"])
        except (ValueError, KeyError, TypeError):
            raise BadRequest(400, "not a link's call") from None
        return self._network.call(account, verb, args, named, request.wait)

    def login(self, request: Request) -> Row:
        """Log an account in as if somebody had scanned and pressed; answers when it runs."""
        network, account = self._network, check_name(request.params.get("client", ""))
        require(network.known(account), account)
        future = network.do(network.force_login, account)
        try:
            request.wait(future, 15.0)  # a client that was just started needs a moment
        except TimeoutError:
            raise NotFound(f"{account} not found waiting for a scan; "
                           "check_client says what it does") from None
        finally:
            network.do(network.sessions[account].waiters.discard, future)
        return {"account": account, "code": 0, "status": "success"}

    def say(self, request: Request) -> Row:
        """Let a resident speak to an account or a resident, or in a group or discuss."""
        said, *answers = self._network.do(self._say, request.params)
        return {"code": 0, "id": int(said["id"]), "status": "success", "answers": [
            {"content": row["content"], "id": row["id"], "sender": row["name"],
             "sender_uid": row["uid"], "time": row["time"], "type": row["type"]}
            for row in answers]}

    def _say(self, params: Params) -> List[Row]:
        network, to = self._network, params.get("to", "")
        who = network.find("people", params.get("from", ""))
        account, kind = params.get("client", ""), params.get("type", "friend_message")
        login = network.table("login", account) if account else {}
        require(login or to and not account and kind != "sess_message", account or "client")
        message = {"type": kind, "content": check_content(params), **check_quote(params)}
        require(kind in ("friend_message", "sess_message", "group_message", "discuss_message"),
                f"type {kind}")
        if kind in ("friend_message", "sess_message"):
            message["uid"] = login.get("uid") or network.find("people", to)
        if kind != "friend_message":
            table = "discuss" if kind == "discuss_message" else "group"
            message[table] = network.find(table, to, account)
        return network.speak(who, message)


MESSAGE_ID = re.compile("-?[0-9]{1,20}")


def check_quote(params: Params) -> Row:
    """What a call quotes, and whom it mentions: {"reply_to": id or None, "at": uids};
    BadRequest."""
    reply_to = params.get("reply_to", "").partition(":")[0] or None  # weixin's MSGID:TARGET
    if reply_to and not MESSAGE_ID.fullmatch(reply_to):
        raise BadRequest(400, "reply_to must be the id of a message, as an event tells it")
    at = list(filter(None, map(str.strip, params.get("at", "").split(","))))
    if not all(uid == "all" or UID.fullmatch(uid) for uid in at):
        raise BadRequest(400, "at must be uids with commas between them, or all")
    return {"reply_to": reply_to, "at": at}


def is_sendable(content: str) -> bool:
    """Whether the text of a message is not empty and not too long."""
    return 0 < len(content) and len(content.encode("utf-8", "replace")) <= CONTENT_LIMIT


def check_content(params: Params) -> str:
    """The text of a message; BadRequest if there is none, or if it is too long."""
    content = params.get("content", "")
    if not is_sendable(content):
        raise BadRequest(400, f"content over {CONTENT_LIMIT} bytes" if content
                         else "content missing")
    return content


# ------------------------------------------------------------------------------------------------
# 11. Links
# ------------------------------------------------------------------------------------------------

class Hooks:
    """The callbacks by which a link tells its client something; from any thread."""

    qrcode: Callable[[Code, float, str], None]  # a QR code, the seconds that it is valid, an error
    waiting: Callable[[str], None]         # not logged in, and there is no QR code: why
    scanned: Callable[[], None]
    confirmed: Callable[[str, bool], None]  # logged in: a cookie; whether ids may have changed
    lost: Callable[[str], None]            # the connection is lost: why; confirmed() may follow
    received: Callable[[List[Row]], str]   # new items -> the mark of the last one that is on disk
    known: Callable[[str, str, str], Any]  # kind, uid, circle -> a thing of the roster, or None
    certain: Callable[[str], bool]         # whether the list of a kind is complete, so that
                                           # somebody who is not on it must be new
    kept: Callable[[str], None]            # status() has changed; a cookie, unless it is empty
    ids_path: str                          # a file where a link may keep ids of messages

    def __init__(self, **hooks: Any) -> None:
        vars(self).update(hooks)


class Link:
    """Where an account's messages come from and go to: the interface of all links.

    All methods may block and are called without a lock; they raise Unreachable. Those that do
    something in a group, to a friend or with a request return False if the account may not do so.

    login(cookie, mark)   begin to log in, with the cookie of a former login, if any; hooks tell
                          the rest. renew() shows a new QR code; ready(): the account is running
    roster()              {"user": …, "friend": […], "group": […], "discuss": […]}; a link may
                          tell lists by list() instead, and a group's `member`, role by details()
    list(kind)            the friends or groups. Declined
    details(group, members)  the role in a group; with `members` also owner_id, owner_uid, member.
                          Declined if they cannot be had
    find_group(uid), find_member(group, uid)  one that is on no list, or None
    account()             the account's name on the network, by which two clients of it are noticed
    status()              further members of check_client
    presence()            uid -> state of those whose state no event tells
    send(messages)        of {type, content, cq, uid, group, discuss, reply_to (an id or None), at
                          (uids, or all), media}: for each {"code", "info", "id"}, and, if somebody
                          answered at once, `mark`: that of the answer, which hooks.received() will
                          get. `media` is {name, mime, data (base64), url, path}
    hear(row)             take an event that was posted to us; False if this link takes none
    find_message(id)      the item of a message, or None
    call(action, params)  the whole answer to any action of the bridge
    file_url(item)        the present URL of a file in an item's links, or empty
    kick(group, uids), mute(group, uids, seconds), mute_all(group, on), set_card(group, uid, card),
    set_admin(group, uid, on), set_title(group, uid, title), rename(group, name),
    leave_group(group), invite(group, uids), create_group(uids, name): the new group's uid;
    delete_friend(uid), make_friend(uid, verify), set_markname(uid, markname), poke(uid, group),
    which is empty for a friend; revoke(id), answer_request(ticket, accept, markname),
    answer_group_request(ticket, accept, reason)
    typing(uid, on)       show somebody that an answer is being written, or no longer
    verify_code(code)     the digits that a phone shows; False if nobody asks for them
    logout(), close()     end the login, so that the next one needs a scan; end the link
    """

    send_interval = 3.0          # seconds between two messages unless settings say otherwise
    batch = 1                    # messages that send() takes at once where there is no interval
    echoes = False               # an answer may come before send() has returned
    fetches = False              # takes the URL of a picture, and fetches it by itself
    real = False                 # a real network: a login may take days, a list may fail
    any_group = ""               # the number that means an unknown group, of temporary sessions
    lacks: Sequence[str] = ()    # calls of the API (VERBS) that this network does not have
    # What a link returns for the methods that it does not have.
    REFUSALS: Row = {
        **dict.fromkeys("ready find_group find_member find_message typing renew logout close"
                        .split()),
        **dict.fromkeys("hear revoke answer_request answer_group_request mute_all set_card invite "
                        "set_admin set_title leave_group delete_friend poke make_friend rename "
                        "set_markname verify_code".split(), False),
        **dict.fromkeys(("account", "file_url", "create_group"), ""), "status": {}, "presence": {}}

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if verb not in self.REFUSALS:
            raise AttributeError(verb)
        return lambda *args, **named: self.REFUSALS[verb]


class LocalLink(Link):
    """An account on the local network; `host(verb, …)` is LocalNetwork.call, or call_host().

    A thread asks for news, and is answered when there is something; the next question acknowledges
    what was stored.
    """

    send_interval = 0.0
    batch = 64
    echoes = True
    lacks = ("call_action",)

    def __init__(self, host: Callable[..., Json], hooks: Hooks, password: bool,
                 mode: str, log: Log) -> None:
        self._host, self._hooks, self._log = host, hooks, log
        self._password, self._mode = password, mode
        self._closed = threading.Event()
        self._mark = ""
        self._pulling = False
        self.renew = functools.partial(host, "ticket")
        for verb in ("ready", "roster", "presence", "send", "logout", *Society.VERBS):
            setattr(self, verb, functools.partial(host, verb))

    def login(self, cookie: str, mark: str) -> None:
        self._mark = mark
        answer = self._host("attach", mark, cookie, self._password, self._mode)
        if not self._pulling:
            self._pulling = True
            spawn(self._pull, name="link")
        if answer.get("login"):
            self._hooks.confirmed(answer["login"]["cookie"], False)
        else:
            self.renew()

    def close(self) -> None:
        self._closed.set()  # the host notices it

    def _pull(self) -> None:
        failures = 0
        while not self._closed.is_set():
            try:
                items = self._host("pull", self._mark)
                for item in items:
                    if item["do"] == "qrcode":
                        self._hooks.qrcode(item["text"], item["seconds"], "")
                    elif item["do"] == "scanned":
                        self._hooks.scanned()
                    elif item["do"] == "confirmed":
                        self._hooks.confirmed(item["login"]["cookie"], True)
                numbered_items = [item for item in items if "mark" in item]
                if numbered_items:
                    self._mark = self._hooks.received(numbered_items)
                failures = 0
            except NotRunning:
                return  # we stop, or the host does
            except Exception as error:  # the thread must go on
                if failures == 4 and not self._closed.is_set():  # after 7 s: a stop takes less
                    self._log.warn(f"local network: {error}")
                self._closed.wait(backoff(failures, 30.0))
                failures += 1


def call_host(url: str, key: str, verb: str, *args: Json, **named: Json) -> Json:
    """LocalNetwork.call in another process, for the account of the key. Unreachable, also for a
    refusal."""
    # pull waits long at the host; a list must not wait long for presence
    seconds = {"pull": 330.0, "presence": LOOKUP_SECONDS}.get(verb, 30.0)
    reply = fetch(url + "/local/link", "POST",
                  {"X-OpenQQ-Key": key, "Content-Type": "application/json"},
                  to_bytes({"verb": verb, "args": args, "named": named}), seconds)
    data = reply.read(4 * BODY_LIMIT)
    try:
        value = from_bytes(data)
    except ValueError:
        raise Unreachable("not an answer of a host", True) from None
    if reply.status != 200:
        raise Unreachable(str(value.get("status", reply.status)), True)
    return value


# -- what bridges say: values, messages, people (OneBot 11 and Milky spell nearly all alike)

CQ_CODE = re.compile(r"\[CQ:([A-Za-z0-9_.\-]+)((?:,[^,\[\]]*)*)\]")
CQ_ESCAPES = (("&", "&amp;"), ("[", "&#91;"), ("]", "&#93;"), (",", "&#44;"))
# Segments as text, with members of their data (|: or else) as far as there are any. What is empty
# then, or not listed, becomes [type].
LABELS = {"face": "[表情]", "bface": "[表情]", "sface": "[表情]",
          "image": "[图片]", "cardimage": "[图片]", "record": "[语音]", "video": "[视频]",
          "file": "[文件]{name|file_name|file}", "mface": "{summary}",
          "keyboard": "[按钮]", "node": "[聊天记录]", "forward": "[聊天记录]",
          "share": "[分享]{title|content} {url}", "music": "[音乐]{title} {url}",
          "location": "[位置]{title|name|content|address}",
          "contact": "[名片]{id}", "poke": "[戳一戳]", "shake": "[窗口抖动]",
          "dice": "[骰子]{result}", "rps": "[猜拳]", "redbag": "[红包]{title}", "gift": "[礼物]",
          "tts": "{text}", "miniapp": "[小程序]", "onlinefile": "[文件]", "flashtransfer": "[文件]"}
DETAIL_LIMIT = 500               # letters of such a member
AT_LIMIT = 8                     # names in a message that are looked up: each may take seconds
MEDIA = {**{segment: kind for kind, segment in SEGMENTS.items()}, "file": "file"}
# Actions that hand out the account or the machine.
SECRET_ACTION = re.compile("(?i)cookie|credential|csrf|key|token|exit|quit|restart|reboot|shutdown|"
                           "clean|logout")


def scalar(value: Json) -> Optional[str]:
    """A scalar as text, else None: bridges write ids as numbers or as strings."""
    if value is None or isinstance(value, (dict, list)):
        return None
    if isinstance(value, float) and not abs(value) < 1e300:
        return None                  # 1e999, which is valid JSON
    whole = isinstance(value, (bool, float)) and value == int(value)
    return str(int(value)) if whole else str(value)


def number_of(value: Json) -> str:
    """A QQ number as text; empty for null, 0, "0" and the like, which bridges send (ONEBOT.md)."""
    text = "" if isinstance(value, bool) else scalar(value) or ""
    return text if re.fullmatch("[1-9][0-9]{0,18}", text) else ""


def message_number(row: Row) -> str:
    """The bridge's number of a message, which may be negative; empty if there is none."""
    number = scalar(row.get("message_id")) or ""
    return "" if number in ("0", "None") else number


def detail(value: Json) -> str:
    """A text or number of a segment's data on one line; empty for anything else."""
    if isinstance(value, bool):
        return ""
    return " ".join(CONTROLS.sub(" ", scalar(value) or "").split())[:DETAIL_LIMIT]


def id_of(text: str) -> Json:
    """The id of a message for bridges and answers: a number, if JSON numbers can hold it."""
    return int(text) if re.fullmatch("-?[0-9]{1,15}", text) else text


def filled(row: Row) -> Row:
    """The members that are not null or empty texts."""
    return {name: value for name, value in row.items() if value not in (None, "")}


def object_of(value: Json) -> Row:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def rows_of(value: Json) -> List[Row]:
    """The objects in a list; none if it is no list."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def cq_escape(text: str, value: bool = False) -> str:
    """Text, or the value of a key, as CQ codes spell it."""
    for plain, code in CQ_ESCAPES if value else CQ_ESCAPES[:3]:
        text = text.replace(plain, code)
    return text


def cq_unescape(text: str) -> str:
    """Undo cq_escape(); `&` comes last, else it could make new codes."""
    for plain, code in reversed(CQ_ESCAPES):
        text = text.replace(code, plain)
    return text


def text_segments(text: str) -> List[Row]:
    """A text as segments; CQ codes in it are just text."""
    return [{"type": "text", "data": {"text": text}}] if text else []


def segments_of(message: Json) -> List[Row]:
    """A message of a bridge, with CQ codes or a list, as [{"type": word, "data": object}]."""
    found: List[Row] = []
    if isinstance(message, str):
        parts = [*CQ_CODE.split(message), "", ""]  # text, type, values, text, type, values …
        for text, kind, values in zip(parts[::3], parts[1::3], parts[2::3]):
            found += text_segments(cq_unescape(text))
            if kind:
                pairs = [pair.partition("=") for pair in values.split(",")[1:]]
                found.append({"type": kind, "data": {key: cq_unescape(value)
                                                     for key, _, value in pairs}})
        return found
    rows = [message] if message is not None else []
    while rows:
        row = rows.pop()
        if isinstance(row, list):
            rows += reversed(row)
        elif isinstance(row, dict):
            kind, data = detail(row.get("type")), row.get("data")
            if kind == "text" and isinstance(data, str):
                data = {"text": data}
            known = re.fullmatch(r"[A-Za-z0-9_.\-]{1,32}", kind)
            found.append({"type": kind if known else "?", "data": object_of(data)})
        else:
            text = row if isinstance(row, str) else detail(row)
            found += text_segments(text) or [{"type": "?", "data": {}}]
    return found


def cq_text(segments: Iterable[Row]) -> str:
    """Segments as one text with CQ codes."""
    parts = []
    for segment in segments:
        if segment["type"] == "text":
            text = segment["data"].get("text")
            parts.append(cq_escape(text if isinstance(text, str) else detail(text)))
        else:
            pairs = [f",{key}=" + cq_escape(
                value if isinstance(value, str) else to_bytes(value).decode(), True)
                for key, value in segment["data"].items() if value is not None]
            parts.append(f"[CQ:{segment['type']}{''.join(pairs)}]")
    return "".join(parts)


def check_sources(value: Json, check_url: Callable[[str], None], name: str = "",
                  in_code: bool = False) -> None:
    """NotAllowed if a message with CQ codes, or the parameters of an action, would make a bridge
    read a file of its machine; check_url() gets each URL that the bridge would fetch."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_sources(part, check_url, str(key).strip(), in_code)
    elif isinstance(value, list):
        for part in value:
            check_sources(part, check_url, name, in_code)
    elif isinstance(value, str):
        for segment in segments_of(value):
            if segment["type"] != "text":  # the content of a node has codes of its own
                check_sources(segment["data"], check_url, in_code=True)
        fetched = re.fullmatch("(?i)file|url|image|path|audio|cover|thumb|icon|.*ur[il]", name)
        source = value.strip() if fetched else ""
        if not re.match("(https?|base64)://", source) and re.search(
                r"[/\\:]|^\.\.?$", source) or in_code and re.search(r"(?i)\bfile:", value):
            where = " in a CQ code" if in_code else ""
            raise NotAllowed(f"{name}{where} not allowed: give http://… or base64://…")
        if is_url(source):
            check_url(source)


def readable(kind: str, data: Row) -> str:
    """A segment as text for a reader; `at` is done elsewhere."""
    if kind in ("text", "markdown"):  # unchanged, with its lines
        text = data.get("text" if kind == "text" else "content")
        return text if isinstance(text, str) else detail(text) or f"[{kind}]"
    if kind in ("json", "xml"):
        return card_text(kind, data.get("data")) or f"[{kind}]"
    summary = detail(data.get("summary"))
    if kind == "image" and re.fullmatch(r"\[[^\[\]]{1,20}\]", summary):  # NapCat: [动画表情]
        return summary
    if kind == "file" and re.search(r"[/\\]|^base64:", detail(data.get("file"))):
        data = {**data, "file": None}    # a path is not its name
    if kind == "forward":
        news = " ".join(detail(row.get("text")) for row in rows_of(data.get("news")))
        return summary or detail(news) or detail(data.get("prompt")) or LABELS[kind]
    if kind == "reply":
        return ""
    return re.sub(r"\{([a-z_|]+)\}", lambda found: next(filter(None, (
        detail(data.get(name)) for name in found.group(1).split("|"))), ""),
        LABELS.get(kind, "")).strip() or f"[{kind}]"


def card_text(kind: str, card: Json) -> str:
    """The title and the link of the card in a json or xml segment."""
    if kind == "xml":  # without an XML parser, which could be attacked
        import html
        text = card[:16_384] if isinstance(card, str) else ""
        *said, link = [detail(html.unescape(found.group(1))) if found else "" for found in (
            re.search(pattern, text) for pattern in (
                r"""\bbrief=["']([^"']*)""", r"<title\b[^>]{0,200}>([^<]*)",
                r"""\btitle=["']([^"']*)""", r"""\burl=["']([^"']*)"""))]
        links = [link]
    else:
        row = object_of(object_in(card.encode("utf-8", "replace")) if isinstance(card, str)
                        else card)
        parts = [row, *rows_of(list(object_of(row.get("meta")).values()))]
        said, links = [[detail(part.get(name)) for name in names for part in parts] for names in (
            ("prompt", "title", "desc"), ("jumpUrl", "qqdocurl", "jump_url", "url"))]
    title = next(filter(None, said), "")
    link = next((link for link in links if is_url(link) and len(link) < DETAIL_LIMIT), "")
    return f"{title} {link}".strip()


def media_link(kind: str, data: Row) -> Row:
    """The member `media` of an event with a picture or file."""
    url = scalar(data.get("url")) or scalar(data.get("file")) or ""
    link = {"type": MEDIA[kind], "url": url if re.match("https?://", url) else None,
            "name": scalar(data.get("name")) or scalar(data.get("file")),
            "size": scalar(data.get("file_size"))}
    if kind == "file" and data.get("file_id"):
        link["file_id"] = scalar(data["file_id"])
    return link


def friend_row(row: Row) -> Row:
    """A friend as a bridge tells it -> our row; NapCat tells the category."""
    uid = number_of(row.get("user_id"))
    category = row.get("categoryName") or row.get("category_name") or row.get("categroyName")
    return {"uid": uid, "id": uid, "name": scalar(row.get("nickname")) or uid,
            "markname": scalar(row.get("remark")) or None, "category": scalar(category),
            "sex": scalar(row.get("sex"))}


def group_row(row: Row) -> Row:
    """A group as a bridge tells it -> our row; callers do not see member_count."""
    uid = number_of(row.get("group_id"))
    return {"uid": uid, "id": uid, "name": scalar(row.get("group_name")) or uid,
            "markname": scalar(row.get("group_remark") or row.get("remark_name")) or None,
            "memo": scalar(row.get("group_memo")) or None,
            "createtime": number_of(row.get("group_create_time")) or None,
            "max_member": int(number_of(row.get("max_member_count")) or 0) or None,
            "member_count": scalar(row.get("member_count"))}


def member_row(row: Row) -> Row:
    """A member as a bridge tells it -> our row, without what is not known, to save memory."""
    uid = number_of(row.get("user_id"))
    known = {"sex": row.get("sex"), "join_time": row.get("join_time"), "level": row.get("level"),
             "last_speak_time": row.get("last_sent_time"), "province": row.get("area"),
             "title": row.get("title")}
    return {"uid": uid, "id": uid, "name": scalar(row.get("nickname")) or uid,
            "card": scalar(row.get("card")) or None, "role": scalar(row.get("role")) or "member",
            **{name: scalar(value) for name, value in filled(known).items()}}


def happened(event: str, **more: Any) -> Row:
    """An item for Hooks.received: an event."""
    return {"do": "event", "event": event, **more}


def changed(kind: str, group: str, uid: str, name: str, value: Json, **more: Any) -> Row:
    """An item for Hooks.received: a property has changed."""
    return happened(kind + "_property_change", circle=group, uid=uid, property=name, value=value,
                    **more)


# -- the connections to a bridge

class Bridge:
    """A connection to a bridge, for calls to it and events from it.

    open() connects. listen() gives events to `hear` until the connection is lost. ask(action,
    params, seconds) returns the bridge's answer, whatever it says. Unreachable; ask() also
    Declined.
    """

    open: Callable[[], None]
    listen: Callable[[], None]
    ask: Callable[[str, Row, float], Row]
    REFUSED = "the bridge refuses onebot_token"

    def __init__(self, url: str, token: str, log: Log, hear: Callable[[Row], None]) -> None:
        self._url, self._log, self._hear = url.rstrip("/"), log, hear
        self._fields = {"Authorization": bearer(token)} if token else {}
        self._line: Any = None       # what is to be closed: a Reply or a WebSocket
        self.closed = threading.Event()
        self.complaint = ""          # why it ends, in our words or the bridge's
        self.news = threading.Event()  # set when the login state must be checked
        self._odd = 0                # messages that were passed over

    def close(self, why: Union[str, Exception] = "the connection was closed") -> None:
        """End it, from any thread."""
        if isinstance(why, Exception) and not isinstance(why, OpenQQError):
            self._log.failure("the bridge's thread")
            why = repr(why)
        self.complaint = self.complaint or str(why)
        self.closed.set()
        self.news.set()
        if self._line:
            self._line.close()

    def _heard(self, data: bytes) -> None:
        """Take a message; one that is no JSON object, as a gateway's "ping", is passed over."""
        row = object_in(data)
        if row is not None:
            return self._take(row)
        self._odd += 1
        if is_news(self._odd):
            self._log.warn(f"{self._odd} message(s) of the bridge passed over: no JSON object")

    def _take(self, row: Row) -> None:
        self._hear(row)


class HttpBridge(Bridge):
    """Calls by POST; events by server-sent events if the bridge has them, else it posts them."""

    CALLS, EVENTS, ALIVE, HERE = "/", "/_events", "get_status", "/onebot"

    def open(self) -> None:
        with contextlib.suppress(TooSlow):  # LLBot does not answer at a path that it does not know
            reply = self._fetch(self.EVENTS, LOOKUP_SECONDS)
            if reply.status == 200 and reply.kind == "text/event-stream":
                self._line = reply
                return
            reply.close()
        self._log.info(f"the bridge has no stream of events; it must post them to {self.HERE}")

    def listen(self) -> None:
        if isinstance(self._line, WebSocket):
            self._line.run()
        while not self._line:
            self.closed.wait(BRIDGE_SECONDS)
            self._check()
        with contextlib.closing(self._line):
            for data in server_sent(self._line.pieces(BRIDGE_SECONDS, self._check)):
                self._heard(data)
        raise Unreachable("the bridge ended its stream of events")

    def _check(self) -> None:
        """When nothing comes, call the bridge: NapCat's stream has no signs of life."""
        if self.closed.is_set():
            raise Unreachable("the connection was closed")
        status: Json = None
        try:
            status = self.ask(self.ALIVE, {}, BRIDGE_SECONDS).get("data")
        except OpenQQError as error:  # any answer is a sign of life
            if isinstance(error, TooSlow) or not getattr(error, "sent", True):
                raise
        self._hear({"post_type": "meta_event", "meta_event_type": "heartbeat", "status": status})

    def ask(self, action: str, params: Row, seconds: float) -> Row:
        reply = self._fetch(self.CALLS + action, seconds, to_bytes(params),
                            action.startswith("get_"))
        data = reply.read(BRIDGE_LIMIT)
        if reply.status == 404:
            raise Declined(f"the bridge knows no {action}")
        if reply.status != 200:
            raise Unreachable(f"the bridge answers {reply.status}", True)
        row = object_in(data)
        if row is None:
            raise Unreachable("the bridge answers what is no JSON object", True)
        return row

    def _fetch(self, path: str, seconds: float, body: Optional[bytes] = None,
               repeat: bool = True) -> Reply:
        reply = fetch(beneath(self._url, path), "POST" if body else "GET",
                      {**self._fields, "Content-Type": "application/json"}, body, seconds,
                      repeat=repeat)
        if reply.status in (401, 403):
            reply.close()
            raise Unreachable(self.REFUSED)
        return reply


class SocketBridge(Bridge):
    """One forward WebSocket for calls and events."""

    def __init__(self, url: str, token: str, log: Log, hear: Callable[[Row], None]) -> None:
        super().__init__(url, token, log, hear)
        self._count = itertools.count(1)
        self._waiting: Dict[str, Future[Row]] = {}  # echo -> its answer

    def open(self) -> None:
        try:
            self._line = WebSocket(self._url, self._fields, self._heard)
        except AuthFailure:
            raise Unreachable(self.REFUSED) from None

    def listen(self) -> None:
        self._line.run()

    def close(self, why: Union[str, Exception] = "the connection was closed") -> None:
        super().close(why)
        for future in list(self._waiting.values()):
            settle(future, Unreachable("the connection to the bridge broke", True))

    def ask(self, action: str, params: Row, seconds: float) -> Row:
        echo = str(next(self._count))
        text = to_bytes({"action": action, "params": params, "echo": echo})
        future = self._waiting[echo] = Future()
        try:
            if self.closed.is_set() or not self._line:  # after that close() finds our future
                raise Unreachable("the bridge is not connected")
            self._line.send(text)
            answer: Row = result_of(future, seconds)
            return answer
        except TimeoutError:
            raise TooSlow(f"the bridge does not answer {action}", True) from None
        finally:
            self._waiting.pop(echo, None)

    def _take(self, row: Row) -> None:
        future = self._waiting.get(str(row.get("echo")))
        if future:
            settle(future, row)
        elif "post_type" in row:
            self._hear(row)
        elif row.get("status") == "failed" and row.get("echo") is None:  # NapCat refuses the token
            refused = scalar(row.get("retcode")) in ("1401", "1403")
            self.complaint = (f"{self.REFUSED}: " if refused else "") + wording(row)


def server_sent(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events, as they come. Unreachable if one is too long."""
    rest = b""
    for piece in pieces:
        *events, rest = (rest + piece.replace(b"\r", b"")).split(b"\n\n")
        if len(rest) > BRIDGE_LIMIT:
            raise Unreachable(f"an event of over {BRIDGE_LIMIT} bytes")
        for event in events:
            lines = [line[5:].lstrip(b" ") for line in event.split(b"\n")
                     if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(lines)


def is_refusal(row: Row) -> bool:
    """Whether a bridge's answer says no; retcode 1 means that it does it later."""
    return row.get("status") == "failed" or scalar(row.get("retcode")) not in ("0", "1", None)


def wording(row: Row) -> str:
    """Why a bridge did not do what it was asked."""
    return (scalar(row.get("wording")) or scalar(row.get("message")) or scalar(row.get("msg"))
            or f"retcode {row.get('retcode')}")[:500]


# -- the web page where a bridge shows its QR code

class LoginPage:
    """The web page of NapCat or LLBot with the QR code (ONEBOT.md, "Login QR"), by default on the
    bridge's host. A token that was refused is not sent again, since LLBot would lock the page."""

    PORTS = {"napcat": 6099, "llbot": 3080}

    def __init__(self, settings: Settings, bridge: str) -> None:
        import hashlib
        self._kind = settings.onebot_login
        secret = settings.onebot_login_token + (".napcat" if self._kind == "napcat" else "")
        self._digest = hashlib.sha256(secret.encode()).hexdigest()
        host = urllib.parse.urlsplit(bridge).hostname or ""
        host = f"[{host}]" if ":" in host else host
        url = settings.onebot_login_api or f"http://{host}:{self.PORTS[self._kind]}"
        self._url = url.rstrip("/")
        self._refused = self._credential = ""  # NapCat's credential is valid for an hour
        self._rest_until = 0.0

    def look(self) -> Tuple[bool, Code, str]:
        """Whether the bridge is logged in, the code to scan, an error. Unreachable."""
        if self._kind == "llbot":
            if self._ask("login-info").get("online"):
                return True, "", ""
            return False, scalar(self._ask("login-qrcode").get("qrcodeUrl")) or "", ""
        data = self._ask("CheckLoginStatus")
        offline = data.get("isOffline")
        if data.get("isLogin") and not offline:
            return True, "", ""
        text = scalar(data.get("qrcodeurl")) or scalar(self._ask("GetQQLoginQrcode").get("qrcode"))
        if offline and not text and time.monotonic() > self._rest_until:
            self._rest_until = time.monotonic() + BRIDGE_SECONDS
            # After QQ was kicked off there is none until we ask for it.
            text = scalar(self._ask("RefreshQRcode").get("qrcodeurl"))
        return False, text or "", scalar(data.get("loginError")) or ""

    def _ask(self, name: str) -> Row:
        if self._kind == "llbot":
            row = self._call("/api/" + name, {"X-Webui-Token": self._digest})
            return object_of(row.get("data"))
        fresh = not self._credential
        if fresh:
            if time.monotonic() < self._rest_until:
                raise Unreachable("the login page wants to be left alone for a while")
            row = self._call("/api/auth/login", {}, to_bytes({"hash": self._digest}))
            data, why = object_of(row.get("data")), scalar(row.get("message")) or ""
            if scalar(row.get("code")) == "0":
                self._credential = scalar(data.get("Credential")) or ""
            if not self._credential and "rate limit" in why:  # the token may be right
                self._rest_until = time.monotonic() + 2 * BRIDGE_SECONDS
                raise Unreachable(f"the login page: {why}")
            if not self._credential:
                raise self._refuse("two-factor login" if data.get("require2FA") else why)
        row = self._call("/api/QQLogin/" + name, {"Authorization": bearer(self._credential)}, b"{}")
        why = scalar(row.get("message")) or ""
        if scalar(row.get("code")) == "0":
            return object_of(row.get("data"))
        if not re.search("unauthor|credential|token", why, re.I):
            return {}
        self._credential = ""  # its hour is over
        if fresh:
            raise self._refuse(why)
        return self._ask(name)

    def _call(self, path: str, fields: Fields, body: Optional[bytes] = None) -> Row:
        if self._refused:
            raise Unreachable(self._refused)
        reply = fetch(beneath(self._url, path), "POST" if body else "GET",
                      {**fields, "Content-Type": "application/json"},
                      body, BRIDGE_SECONDS, repeat=not body)
        data = reply.read()
        if reply.status in (401, 403, 423, 429):
            raise self._refuse(f"it answers {reply.status}")
        row = object_in(data)
        if reply.status != 200 or row is None:
            raise Unreachable(f"the login page answers {reply.status}")
        return row

    def _refuse(self, why: str) -> Unreachable:
        self._refused = f"the login page refuses onebot_login_token ({why}); it is not asked again"
        return Unreachable(self._refused)


# -- OneBot

class EventQueue:
    """A queue of events, from the thread that reads them to act(rows).

    Until want(True) they wait, and beyond LIMIT the oldest are dropped; after it put() waits if too
    many wait. While act() looks up names, the events of that conversation wait; all others wait for
    PATIENCE seconds only. So quick look-ups do not change the order of events.
    """

    LIMIT = 10_000
    WORKERS = 16
    PATIENCE = 0.25

    def __init__(self, act: Callable[[List[Row]], None], log: Log) -> None:
        self._act, self._log = act, log
        self._dispatcher = ThreadPool(1, "events", log)
        self._workers = ThreadPool(self.WORKERS, "events", log)
        self._changed = threading.Condition()  # guards all below
        self._rows: Deque[Tuple[str, Row]] = collections.deque()  # (conversation, event)
        self._busy: Dict[str, List[Row]] = {}  # conversation that a worker is at -> what it has yet
        self._wanted = False

    def want(self, wanted: bool) -> None:
        """Begin to act upon events, or stop it."""
        with self._changed:
            if wanted and not self._wanted:
                self._dispatcher.submit(self._dispatch)
            self._wanted = wanted
            self._changed.notify_all()

    def put(self, conversation: str, row: Row) -> None:
        """Add an event. It waits for a limited time, since act() may need an answer of the bridge
        that the calling thread has to read."""
        with self._changed:
            if self._wanted:
                self._changed.wait_for(lambda: self.LIMIT > len(self._rows) + sum(
                    map(len, self._busy.values())), LOOKUP_SECONDS)
            elif len(self._rows) >= self.LIMIT:
                self._rows.popleft()
            self._rows.append((conversation, row))
            self._changed.notify_all()

    def _dispatch(self) -> None:
        with self._changed:
            while self._changed.wait_for(lambda: self._rows or not self._wanted) and self._wanted:
                name = self._rows[0][0]
                idle, rows = name not in self._busy, self._busy.setdefault(name, [])
                while self._rows and self._rows[0][0] == name:
                    rows.append(self._rows.popleft()[1])
                if idle:
                    self._workers.submit(self._work, name)
                    self._changed.wait_for(lambda: name not in self._busy, self.PATIENCE)

    def _work(self, name: str) -> None:
        rows: List[Row] = []
        while True:
            with self._changed:
                self._changed.notify_all()
                del self._busy[name][:len(rows)]
                rows = self._busy[name][:64]
                if not rows:
                    del self._busy[name]
                    return
            try:
                self._act(rows)
            except Exception:  # else nothing more would be heard of this conversation
                self._log.failure("events of the bridge")


class BoundedDict:
    """A dict with the newest entries."""

    def __init__(self, limit: int = WAIT_LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # guards notes
        self.notes: Dict[Any, Any] = {}

    def note(self, key: Any, value: Any) -> Any:
        """Set a value; returns the former one, or None."""
        with self._lock:
            before = self.notes.pop(key, None)
            self.notes[key] = value
            keep_newest(self.notes, self._limit)
        return before


class OneBotLink(Link):
    """A QQ account through a OneBot 11 bridge (ONEBOT.md): NapCatQQ, LLBot and the like.

    One thread reads from the connection, and never waits for an answer; another one connects and
    checks the login; those of EventQueue handle events; `_background` looks up what nobody waits
    for. The subclass for another protocol translates to and from OneBot's words, in `_get` and
    `_items`.
    """

    fetches = real = True
    any_group = "284840486"      # NapCat's, for a temporary session of an unknown group
    PROTOCOL, EXAMPLE, UNKNOWN = "OneBot", "ws://HOST:3001", "onebot_event"
    # A method of Link -> the action that does it, and its parameters, ours=theirs.
    ACTIONS = {
        "mute_all": "set_group_whole_ban group=group_id on=enable",
        "set_card": "set_group_card group=group_id uid=user_id card=card",
        "set_admin": "set_group_admin group=group_id uid=user_id on=enable",
        "set_title": "set_group_special_title group=group_id uid=user_id title=special_title",
        "rename": "set_group_name group=group_id name=group_name",
        "leave_group": "set_group_leave group=group_id",
        "delete_friend": "delete_friend uid=user_id",
        "answer_request": "set_friend_add_request ticket=flag accept=approve markname=remark"}
    # The topic of an event -> the numbers that it must have.
    NEEDS = {
        **dict.fromkeys(("message group", "request group", "group_increase", "group_card",
                         "group_admin", "group_upload", "notify title"), "group_id user_id"),
        **dict.fromkeys(("group_decrease", "group_dismiss", "group_ban", "notify group_name"),
                        "group_id"),
        **dict.fromkeys(("message private", "request friend", "friend_add"), "user_id"),
        "notify poke": "user_id target_id", "group_recall": "", "friend_recall": ""}

    def __init__(self, settings: Settings, hooks: Hooks, log: Log) -> None:
        name = self.PROTOCOL.lower()
        self._url = getattr(settings, name + "_api")
        self._token = getattr(settings, name + "_token")
        if not self._url:
            raise Refusal(f"link={name} needs the bridge's address: {name}_api={self.EXAMPLE}", 2)
        self._hooks, self._log = hooks, log
        self.echoes, self._shares_files = settings.allow_message_sync, settings.onebot_local
        self._look = LoginPage(settings, self._url).look if settings.onebot_login else None
        self.bridge = self._connect()        # the newest connection
        self.me = self._name = ""            # the account's own uid and name, once it is logged in
        self._closed = threading.Event()
        self._living = self._greeted = False
        self._shown: Code = ""               # the QR code shown since the last login
        self._thrown_out = ""                # why the login was lost
        self._queue = EventQueue(self._act, log)
        self._background = ThreadPool(2, "later", log)
        self._event = threading.local()      # `until`: the end of look-ups for the present event
        self._slow: Dict[str, float] = {}    # action that was too slow -> when it is used again
        self._marks = itertools.count(time.time_ns())
        self._ids = MessageIds()             # for messages without an id
        self._seen = BoundedDict()           # hashes of events
        self._told = BoundedDict()           # who -> what was told of them last, and when
        self._names = BoundedDict()          # (group, uid) -> their name in `at`

    # -- the connection

    def _connect(self) -> Bridge:
        way = SocketBridge if self._url.startswith("ws") else HttpBridge
        return way(self._url, self._token, self._log, self._hear)

    def login(self, cookie: str, mark: str) -> None:
        self.bridge.news.set()
        if not self._living:
            self._living = True
            spawn(self._live, name="link")

    def _live(self) -> None:
        """Connect, and wait for a login when there is none; 1 to 30 s after a loss again."""
        failures = 0
        while not self._closed.is_set():
            bridge = self.bridge = self._connect()
            try:
                self._await_page()
                bridge.open()
                spawn(self._read, bridge, name="bridge")
                while True:
                    bridge.news.clear()
                    if bridge.closed.is_set():
                        raise Unreachable(bridge.complaint)
                    bridge.news.wait(None if self._greet(bridge) else LOGIN_SECONDS)
            except Exception as error:  # the thread must go on
                bridge.close(error)
            failures = 1 if self._greeted else failures + 1
            self._greeted = False
            if not self._closed.is_set():
                wait = backoff(failures, 30.0)
                self._hooks.lost(f"the {self.PROTOCOL} bridge {shown_url(self._url)}: "
                                 f"{bridge.complaint}; trying again in {wait:g} s")
                self._closed.wait(wait)

    def _read(self, bridge: Bridge) -> None:
        try:
            bridge.listen()
        except Exception as error:
            bridge.close(error)

    def _await_page(self) -> None:
        """NapCat opens its OneBot ports only when QQ is logged in, but its web page before."""
        try:
            while not (self._closed.is_set() or self._logged_in()):
                self._closed.wait(LOGIN_SECONDS)
        except Unreachable as error:
            self._log.warn(f"the bridge's login page: {error.status}")

    def _logged_in(self) -> bool:
        """Whether the login page, if there is one, says so; if not, show its QR code."""
        if not self._look:
            return True
        logged_in, text, why = self._look()
        if isinstance(text, str) and len(text.encode()) > QR_ROOM[-1]:
            raise Unreachable("the bridge tells a code that is too long to be shown")
        if not logged_in and text and text != self._shown:
            self._shown = text
            self._hooks.qrcode(text, TICKET_SECONDS, self._thrown_out)
        elif not logged_in and not text:
            self._hooks.waiting((self._thrown_out or "the bridge is not logged in, and shows no "
                                 "code") + (f": {why}" if why else ""))
        return logged_in

    def _greet(self, bridge: Bridge) -> bool:
        """Whether the bridge is logged in; tells the hooks."""
        row: Row = {}
        with contextlib.suppress(Declined):
            row = object_of(self._get("get_login_info"))
        uid = number_of(row.get("user_id"))
        if not uid or self._look_up("get_status").get("online") is False:
            try:
                if self._logged_in() and not self._shown:
                    self._hooks.waiting(self._thrown_out or "the bridge is not logged in: scan the "
                                        "code that it shows")
            except Unreachable as error:
                self._hooks.waiting(error.status)
            return False
        self.me, self._name = uid, scalar(row.get("nickname")) or uid
        if bridge.news.is_set():
            return False
        fresh, self._greeted = bool(self._shown), True
        self._shown = self._thrown_out = ""
        if fresh:
            self._hooks.scanned()
        self._hooks.confirmed("", fresh)
        return True

    def _offline(self, why: str) -> None:
        self._greeted = False
        self._thrown_out = f"QQ is offline at the bridge: {why}"
        self._hooks.waiting(self._thrown_out)
        self.bridge.news.set()

    def logout(self) -> None:
        self._log.warn("only the phone or the bridge itself can log out there; asking it again")

    def close(self) -> None:
        self._closed.set()
        self._queue.want(False)
        self.bridge.close()

    # -- who is there

    def _get(self, action: str, seconds: float = 0.0, **params: Json) -> Json:
        """The data of an answer. Unreachable, Declined."""
        row = self.bridge.ask(action, params, seconds or BRIDGE_SECONDS)
        if is_refusal(row):
            raise Declined(wording(row))
        return row.get("data")

    def _look_up(self, action: str, **params: Json) -> Row:
        """The object that an action answers, or {}. All look-ups for one event together take at
        most LOOKUP_SECONDS, and an action that was just too slow is not used for another event."""
        now = time.monotonic()
        seconds = getattr(self._event, "until", now + LOOKUP_SECONDS) - now
        if seconds <= 0 or self._slow.get(action, 0.0) > now:
            return {}
        try:
            return filled(object_of(self._get(action, seconds, **params)))
        except OpenQQError as error:
            if isinstance(error, TooSlow):
                self._slow[action] = time.monotonic() + 2 * LOOKUP_SECONDS
            self._log.debug(f"the bridge, {action}: {error.status}")
            return {}

    def _person(self, uid: str, group: str = "") -> Row:
        """What the bridge tells of somebody; at least the number."""
        return {**self._look_up("get_group_member_info" if group else "get_stranger_info",
                                **filled({"group_id": group, "user_id": uid})), "user_id": uid}

    def account(self) -> str:
        return self.me

    def roster(self) -> Row:
        self._name = scalar(self._look_up("get_login_info").get("nickname")) or self._name
        return {"user": {"uid": self.me, "id": self.me, "account": self.me, "name": self._name},
                "discuss": []}

    def list(self, kind: str) -> List[Row]:
        return self._list(f"get_{kind}_list", friend_row if kind == "friend" else group_row,
                          self.any_group)

    def _list(self, action: str, make: Callable[[Row], Row], hidden: str = "", **params: Json
              ) -> List[Row]:
        """The rows of a list, but for a number that means nobody. Declined if it is no list: it
        would mean that all are gone."""
        told = self._get(action, LIST_SECONDS, **params)
        rows = [row for row in map(make, rows_of(told)) if row["uid"] not in ("", hidden)]
        if told not in (None, []) and not rows:
            raise Declined(f"its answer to {action} is no list, or names nobody")
        return rows

    def details(self, group: str, members: bool) -> Row:
        if not members:
            row = object_of(self._get("get_group_member_info", group_id=group, user_id=self.me))
            return {"role": ROLES.get(str(row.get("role")), "attend")}
        rows = self._list("get_group_member_list", member_row, group_id=group)
        if not rows:
            raise Declined("it names no members, not even ourselves")
        roles = {row["uid"]: row["role"] for row in rows}
        owner = next((uid for uid, role in roles.items() if role == "owner"), None)
        return {"role": ROLES.get(roles.get(self.me, ""), "attend"), "owner_id": owner,
                "owner_uid": owner, "member": rows}

    def find_group(self, uid: str) -> Optional[Row]:
        return self._found(uid, group_row, "get_group_info", group_id=uid)

    def find_member(self, group: str, uid: str) -> Optional[Row]:
        return self._found(uid, member_row, "get_group_member_info", group_id=group, user_id=uid)

    def _found(self, uid: str, make: Callable[[Row], Row], action: str, **params: str
               ) -> Optional[Row]:
        try:
            row = make(filled(object_of(self._get(action, LOOKUP_SECONDS, **params))))
        except Declined:
            return None
        return row if row["uid"] == uid else None

    # -- what it is to do

    def send(self, messages: List[Row]) -> List[Row]:
        [message] = messages  # `batch` is 1
        content, media = message["content"], message.get("media")
        segments = segments_of(content) if message.get("cq") else text_segments(content)
        for uid in reversed(message["at"]):
            segments[:0] = [{"type": "at", "data": {"qq": uid}}, *text_segments(" ")]
        if message["reply_to"]:
            segments.insert(0, {"type": "reply", "data": {"id": message["reply_to"]}})
        file = {}
        if media:
            source = media["url"] or "base64://" + str(media["data"])
            if media["path"] and not media["url"] and self._shares_files:
                source = "file://" + urllib.parse.quote(media["path"])
            file = {"file": source, "name": media["name"]}
            kind = SEGMENTS.get(media["mime"].partition("/")[0])
            if kind:
                segments.append({"type": kind, "data": file})
                file = {}
        to = "group" if message["type"] == "group_message" else "private"
        place = filled({"user_id": message["uid"], "group_id": message.get("group")})
        data: Json = None
        try:
            if segments:
                data = self._get(f"send_{to}_msg", message=segments, **place) or {}
            if file:  # neither picture, voice nor video
                self._get(f"upload_{to}_file", LIST_SECONDS, **file, **place)
        except Declined as error:
            return [{"code": -4, "info": error.status}]
        except Unreachable as error:
            error.sent = error.sent or data is not None  # another try would double the text
            raise
        return [{"code": 0, "info": "发送正常", "id": message_number(object_of(data)) or None}]

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if verb not in self.ACTIONS:
            return super().__getattr__(verb)
        action, *pairs = self.ACTIONS[verb].split()
        names = dict(pair.split("=") for pair in pairs)
        return lambda *args, **named: self._do(action, **{
            names[name]: value for name, value in {**dict(zip(names, args)), **named}.items()})

    def _do(self, action: str, **params: Json) -> bool:
        try:
            self._get(action, **params)
        except Declined as error:
            self._log.warn(f"the bridge declines {action}: {error.status}")
            return False
        return True

    def kick(self, group: str, uids: List[str]) -> bool:
        done = []
        for uid in uids:
            done.append(self._do("set_group_kick", group_id=group, user_id=uid,
                                 reject_add_request=False))
            if done[-1]:  # told at once: the bridge's own notice comes later
                self._act([{"post_type": "notice", "notice_type": "group_decrease",
                            "sub_type": "kick", "operator_id": self.me,
                            "group_id": group, "user_id": uid, "time": time.time()}])
        return all(done)

    def mute(self, group: str, uids: List[str], seconds: int) -> bool:
        return all([self._do("set_group_ban", group_id=group, user_id=uid, duration=seconds)
                    for uid in uids])

    def poke(self, uid: str, group: str) -> bool:
        return self._do("group_poke" if group else "friend_poke",
                        **filled({"group_id": group, "user_id": uid}))

    def answer_group_request(self, ticket: str, accept: bool, reason: str) -> bool:
        kind, _, flag = ticket.partition(":")
        return self._do("set_group_add_request", flag=flag, sub_type=kind, approve=accept,
                        reason=reason)

    def revoke(self, id: str) -> bool:
        return self._do("delete_msg", message_id=id_of(id))

    def call(self, action: str, params: Row) -> Row:
        return self.bridge.ask(action, params, BRIDGE_SECONDS)

    def file_url(self, item: Row) -> str:
        group = item.get("group")
        place = {"group_id": group} if group else {"user_id": item["uid"]}
        row = object_of(self._get(f"get_{'group' if group else 'private'}_file_url",
                                  LOOKUP_SECONDS, file_id=item["file_id"], **place))
        url = urllib.parse.quote(scalar(row.get("url")) or "", Call.SAFE, errors="replace")
        return url if is_url(url) else ""

    def find_message(self, id: str) -> Optional[Row]:
        try:
            row = object_of(self._get("get_msg", LOOKUP_SECONDS, message_id=id_of(id)))
        except (Declined, TooSlow):
            return None
        who = number_of(object_of(row.get("sender")).get("user_id") or row.get("user_id"))
        item = self._message({**row, "user_id": who, "message_id": id}) if who else {}
        return item if item.get("group") or item.get("uid") else None

    # -- what it tells

    def ready(self) -> None:
        self._queue.want(True)
        self._background.submit(self._ask_for_requests)

    def _hear(self, row: Row) -> None:
        """Take an event, in the thread that reads it."""
        if row.get("post_type") == "meta_event":
            if object_of(row.get("status")).get("online") is False and self._greeted:
                self._offline("it says so in its status")
        elif row.get("notice_type") == "bot_offline":
            self._offline(scalar(row.get("message")) or "the account was logged out")
        else:
            who = row.get("user_id") or row.get("target_id")
            self._queue.put(number_of(row.get("group_id")) or f"/{scalar(who)}", row)

    def hear(self, row: Row) -> bool:
        me, uid = self.me, scalar(row.get("self_id"))
        if me and uid and uid != me:
            self._log.warn(f"an event for {uid} was posted to us, who are {me}")
            if scalar(self._look_up("get_login_info").get("user_id")) != uid:
                return True
            self._queue.want(False)
            self._offline(f"another account, {uid}, is logged in there")
        self._hear(row)
        return True

    def _act(self, rows: List[Row]) -> None:
        items: List[Row] = []
        for row in rows:
            self._event.until = time.monotonic() + LOOKUP_SECONDS
            try:
                items += self._items(row)
            except Exception:  # the other events go on
                self._log.failure("an event of the bridge")
            finally:
                del self._event.until
            if row is rows[-1] or any(item["do"] == "event" for item in items):
                self._hand_on(items)  # it may change the roster, which the next event needs
                items = []

    def _hand_on(self, items: List[Row]) -> None:
        with contextlib.suppress(NotRunning):  # we stop
            if items:  # a bridge does not number them: each gets a mark here
                self._hooks.received([{**item, "mark": f"{next(self._marks)}:0"}
                                      for item in items])

    def _items(self, row: Row) -> List[Row]:
        """The items of an event, in order; none if it came before, or tells nothing."""
        key: Json = row
        if message_number(row) and "message_type" in row:
            key = [str(row.get(name)) for name in (
                "post_type", "message_type", "group_id", "user_id", "message_id", "time")]
        # a webhook may be repeated, or come as well as a stream; only hashes are kept
        if self._seen.note(hash(to_bytes(key)), True) is not None:
            return []
        post_type = str(row.get("post_type")).replace("_sent", "")
        topic = str(row.get(post_type + "_type"))
        if post_type == "message":
            topic = "message group" if topic == "group" else "message private"
        elif post_type != "notice":
            topic = f"{post_type} {topic}"
        elif topic == "notify":
            topic = f"notify {row.get('sub_type')}"
        elif " " in topic:
            topic = ""  # no notice_type is called so
        if topic not in self.NEEDS:
            return [happened(self.UNKNOWN, params=[row])] if post_type == "notice" else []
        for name in self.NEEDS[topic].split():
            if not number_of(row.get(name)):
                self._log.debug(f"an event of the bridge without {name}")
                return []
        items = self._said(row) if post_type == "message" else self._notice(
            topic, number_of(row.get("group_id")), number_of(row.get("user_id")), row)
        return [{"time": scalar(row.get("time")), **item} for item in items]

    def _was_told(self, seconds: float, what: str, *of: str) -> bool:
        """Note what is told of somebody; whether it was told last, within some seconds."""
        now = time.monotonic()
        before, when = self._told.note(of, (what, now)) or ("", 0.0)
        return before == what and now - when <= seconds

    # -- messages

    def _said(self, row: Row) -> List[Row]:
        """A message, and before it the changes that it tells of its sender."""
        known, sub_type = self._hooks.known, row.get("sub_type") or ""
        own = row.get("post_type") == "message_sent" or number_of(row.get("user_id")) == self.me
        if own and not self.echoes:
            return []
        item = self._message(row)
        group, uid = item["group"] or "", item["uid"]
        if own:
            return [item] if group or uid else []
        found = self._meet_group(group, row) if group else []
        if not group and sub_type in ("", "friend") and self._hooks.certain(
                "friend") and not known("friend", uid, ""):
            # whoever writes as a friend is one; more is looked up later
            found.append(happened("new_friend", object=item["sender"]))
            self._background.submit(self._look_later, "", uid)
        if sub_type not in ("anonymous", "notice"):
            in_group = item["type"] == "group_message"
            circle = known("group", group, "") if in_group else None
            if circle is not None and circle.loaded and uid not in circle.member:
                # one can only be new where all members are known
                self._was_told(0.0, "entry", group, uid)
                found.append(self._of_member("new_group_member", group, item["sender"]))
                self._background.submit(self._look_later, group, uid)
                in_group = False
            told = object_of(row.get("sender"))
            name = filled({"name": scalar(told.get("nickname"))})
            more = {name: told[name] or None for name in ("card", "title")  # empty: there is none
                    if isinstance(told.get(name), str)}
            if scalar(told.get("role")) in ROLES:
                more["role"] = told["role"]
            for kind, place, facts in (("group_member", group if in_group else "",
                                         {**name, **more}), ("friend", "", name)):
                thing = known(kind, uid, place)
                found += [changed(kind, place, uid, name, value) for name, value in facts.items()
                          if thing is not None and thing.value(name) != value]
        return [*found, item]

    def _message(self, row: Row) -> Row:
        """The item of a message."""
        uid, group = number_of(row.get("user_id")), number_of(row.get("group_id"))
        who = {**object_of(row.get("sender")), "user_id": uid}
        if isinstance(row.get("anonymous"), dict):
            who.update(nickname=row["anonymous"].get("name"), card=None)
        kind = "group_message"
        if row.get("message_type") != "group":
            # the group of a temporary session: at the top (NapCat), or in sender (LLBot)
            group = (group or number_of(who.get("group_id"))) if (
                row.get("sub_type") == "group") else ""
            kind = "sess_message" if group else "friend_message"
        raw = row.get("raw_message")
        parts = segments_of(raw if row.get("message") is None else row["message"])
        at = [detail(part["data"].get("qq")) for part in parts if part["type"] == "at"]
        quoted = [part["data"].get("id") for part in parts if part["type"] == "reply"]
        item = {"type": kind, "group": group or None,
                "id": message_number(row) or str(self._ids.next()),
                "reply_to": scalar(quoted[0]) if quoted else None,
                "at": [one for one in dict.fromkeys(at) if one == "all" or number_of(one)],
                "content": self._content(parts, group),
                "raw_message": raw if isinstance(raw, str) else cq_text(parts),
                "time": scalar(row.get("time")) or str(int(time.time())),
                "links": [media_link(part["type"], part["data"]) for part in parts
                          if part["type"] in MEDIA]}
        if uid == self.me or row.get("post_type") == "message_sent":
            target = None if kind == "group_message" else number_of(row.get("target_id"))
            return {**item, "do": "sent", "uid": target}
        sender = member_row(who) if group else friend_row(who)
        return {**item, "do": "message", "uid": uid, "sender_id": uid, "name": sender["name"],
                "sender": sender, "group_name": scalar(row.get("group_name"))}

    def _content(self, segments: List[Row], group: str) -> str:
        """The text for a reader, with one blank after a name."""
        parts: List[str] = []
        asked, after_name, room = 0, False, CONTENT_LIMIT // 4
        for kind, data in ((segment["type"], segment["data"]) for segment in segments):
            uid, text = detail(data.get("qq")), readable(kind, data)
            if kind == "at":
                thing = self._hooks.known("group_member", uid, group)
                name = detail(thing.displayname) if thing else detail(data.get("name")).lstrip("@")
                if uid == "all":
                    name = "全体成员"
                elif uid not in ("", "0") and not name:
                    name = self._names.notes.get((group, uid)) or ""
                    if not name and asked < AT_LIMIT:
                        asked += 1
                        row = self._person(uid, group) if group else {}
                        name = detail(row.get("card")) or detail(row.get("nickname")) or uid
                        self._names.note((group, uid), name)
                    name = name or uid
                text = f"@{name} " if name else text
            if kind != "text":
                room -= len(text)
                text = text if room > 0 else ""  # but texts are never cut
            parts.append(text.lstrip(" ") if after_name else text)
            after_name = kind == "at" or after_name and not parts[-1]
        return "".join(parts)

    # -- changes of the roster

    def _meet_group(self, uid: str, row: Row, sure: bool = False) -> List[Row]:
        """A group that is not listed is new, if the list is complete or a notice is `sure`."""
        if uid == self.any_group or self._hooks.known("group", uid, "") or not (
                sure or self._hooks.certain("group")):
            return []
        self._was_told(0.0, "entry", uid, self.me)
        if not scalar(row.get("group_name")):
            row = self._look_up("get_group_info", group_id=uid)
        return [happened("new_group", object=group_row({**row, "group_id": uid}))]

    def _of_member(self, event: str, group: str, member: Row, **facts: Json) -> Row:
        return happened(event, object=member, circle=group,
                        unlisted=not self._hooks.certain("group"), **facts)

    def _look_later(self, group: str, uid: str) -> None:
        """Look up somebody new; no event tells the result."""
        kind, make = ("group_member", member_row) if group else ("friend", friend_row)
        told = self._person(uid, group)
        self._hand_on([changed(kind, group, uid, name, value, quiet=True)
                       for name, value in make(told).items()
                       if value and name not in ("id", "uid", "name")
                       and (name != "role" or "role" in told)])

    def _notice(self, topic: str, group: str, uid: str, row: Row) -> List[Row]:
        known, sub_type, me = self._hooks.known, row.get("sub_type"), self.me
        facts = {"kind": scalar(sub_type),
                 "operator_uid": number_of(row.get("operator_id")) or None}
        if topic == "group_increase":
            # also of somebody who is listed: the notice of leaving may have been lost
            found = self._meet_group(group, row, sure=uid == me)
            if uid != me and not self._was_told(REPEAT_SECONDS, "entry", group, uid):
                found.append(self._of_member("new_group_member", group,
                                             member_row(self._person(uid, group)), **facts))
            return found
        if topic in ("group_dismiss", "group_decrease"):
            lost = topic == "group_dismiss" or uid == me or sub_type in ("kick_me", "disband")
            who = me if lost else uid
            if not who or self._was_told(60.0, "loss", group, who):  # kick() told it already
                return []
            if lost:
                return [happened("lose_group", object={"uid": group, "id": group, "name": group})]
            return [self._of_member("lose_group_member", group, {"uid": uid} if known(
                "group_member", uid, group) else member_row(self._person(uid)), **facts)]
        if topic == "friend_add":
            if known("friend", uid, "") or self._was_told(REPEAT_SECONDS, "friend", uid):
                return []
            return [happened("new_friend", object=friend_row(self._person(uid)))]
        if topic == "notify group_name":
            name = scalar(row.get("name_new")) or scalar(row.get("group_name"))
            return [changed("group", "", group, "name", name)] if name else []
        roles = ("admin", "member") if sub_type == "set" else ("member", "admin")
        changes: Dict[str, Tuple[str, Json, Json]] = {
            "group_card": ("card", row.get("card_new"), row.get("card_old")),
            "notify title": ("title", row.get("title"), None),
            "group_admin": ("role", *roles)}
        if topic not in changes:
            return self._telling(topic, group, uid, row)
        prop, new, old = changes[topic]
        found = [changed("group_member", group, uid, prop, scalar(new) or None, object={
            **member_row({"user_id": uid}), prop: scalar(old) or None})]
        if prop == "role" and uid == me:
            found.insert(0, changed("group", "", group, "role", ROLES[new]))
        return found

    def _telling(self, topic: str, group: str, uid: str, row: Row) -> List[Row]:
        """The items of a notice that does not change the roster."""
        operator, flag = number_of(row.get("operator_id")), scalar(row.get("flag"))
        place = {"kind": "group", "uid": group, "name": scalar(row.get("group_name")) or group}
        if topic.startswith("request "):
            if topic == "request group" and not flag or flag and self._was_told(
                    COOKIE_SECONDS, "request", "request", flag):
                return []
            name, comment = friend_row(self._person(uid))["name"], scalar(row.get("comment")) or ""
            if topic == "request friend":
                return [happened("friend_request", request={
                    "id": uid, "name": name, "displayname": name, "ticket": flag,
                    "verify": comment})]
            known, invited = self._hooks.known("group", group, ""), row.get("sub_type") == "invite"
            # the ticket contains the kind, which the answer needs
            return [happened("group_request", request={
                "group": scalar(row.get("group_name")) or (known.displayname if known else scalar(
                    self._look_up("get_group_info", group_id=group).get("group_name")) or group),
                "group_uid": group, "uid": uid, "name": name, "comment": comment,
                "kind": "invite" if invited else "join",
                "ticket": f"{'invite' if invited else 'add'}:{flag}"})]
        if topic.endswith("_recall"):
            message = scalar(row.get("message_id"))
            return [happened("revoke_message", params=[
                message, uid or None, operator or uid or None, group or None])] if message else []
        if topic == "group_ban":
            seconds = int(number_of(row.get("duration")) or 0) if uid else -1
            return [happened("group_shutup", params=[
                member_of(group, uid) if uid else None,
                member_of(group, operator) if operator else None,
                0 if row.get("sub_type") == "lift_ban" else seconds, place])]
        if topic == "group_upload":
            file = object_of(row.get("file"))
            return [happened("group_upload", params=[member_of(group, uid), {
                name: scalar(file.get(name)) for name in ("name", "size", "id")}, place])]
        return [happened("poke", params=[
            *[member_of(group, one) if group else {"kind": "friend", "uid": one}
              for one in (uid, number_of(row.get("target_id")))], place if group else None])]

    def _ask_for_requests(self) -> None:
        """Ask for requests that came while we were away, if the bridge can tell them."""
        told = self._look_up("get_group_system_msg")
        for name, sub_type, who in (("join_requests", "add", "requester_uin"),
                                    ("invited_requests", "invite", "invitor_uin"),
                                    ("InvitedRequest", "invite", "invitor_uin")):
            for row in rows_of(told.get(name)):
                group, uid = number_of(row.get("group_id")), number_of(row.get(who))
                if group and uid and not row.get("checked"):
                    self._hand_on(self._telling("request group", group, uid, {
                        **row, "sub_type": sub_type, "flag": row.get("request_id"),
                        "comment": row.get("message")}))


# -- Milky (MILKY.md): MilkyLink translates it to and from OneBot

class MessageBook(Journal):
    """Ids for the newest messages of a bridge that numbers them within each conversation (`place`:
    ACCOUNT/SCENE/PEER): a hash in the range of MessageIds. flush() is called after an event was
    handed on: a kill in between may double it, but does not lose it."""

    COMPACT = 1024 * 1024

    def __init__(self, path: str, log: Log) -> None:
        super().__init__(path, log)
        self._lock = threading.Lock()        # guards both below, and the file
        self._recent = BoundedDict(10_000)   # id -> id, place, seq, when
        self._rows: Dict[int, List[Any]] = self._recent.notes
        for line in self.read():
            if isinstance(line, list) and list(map(type, line)) == [int, str, int, int]:
                self._recent.note(line[0], line)

    def note(self, place: str, seq: int, when: float = 0.0) -> Tuple[int, bool]:
        """The id of a message, and whether it is new; `when` it came (negative: we sent it), or 0
        if it is only mentioned: it is still new when it comes."""
        least = MessageIds.LEAST
        number = least + zlib.crc32(f"{place}/{seq}".encode()) % least
        with self._lock:
            while number in self._rows and self._rows[number][1:3] != [place, seq]:
                number = least + (number + 1) % least
            if number in self._rows and (self._rows[number][3] or not when):
                return number, False
            row = [number, place, seq, int(when)]
            self._recent.note(number, row)
            self.unwritten.append(row)
            return number, True

    def find(self, number: Json) -> Tuple[str, int]:
        """The place and number of a message by its id. Declined."""
        row = self._rows.get(int(number_of(number) or 0))
        if not row:
            raise Declined(f"nothing is known any more of the message {number}")
        return row[1], row[2]

    def heard(self, account: str, since: float) -> Dict[str, int]:
        """The last 50 places where an account received something -> the last number there."""
        newest: Dict[str, int] = {}
        with self._lock:
            for _, place, seq, when in self._rows.values():
                if when > since and place.startswith(account + "/"):
                    newest[place] = max(seq, newest.pop(place, 0))
        return dict(list(newest.items())[:-51:-1])

    def flush(self) -> None:
        with self._lock:
            super().flush()

    def last_lines(self) -> List[Json]:
        return list(self._rows.values())


def is_true(value: Json) -> bool:
    """A flag, in any spelling of bridges and callers."""
    return (scalar(value) or "").lower() not in ("", "0", "false", "no", "off")


def renamed(row: Row, names: Sequence[str]) -> Row:
    """Members of an object under other names, given as `ours=theirs`."""
    return {ours: row.get(theirs) for ours, theirs in (pair.split("=") for pair in names)}


class MilkyCalls(HttpBridge):
    """Calls by POST, in strict types; events by WebSocket, else by SSE, else they are posted."""

    CALLS, EVENTS, ALIVE, HERE = "/api/", "/event", "get_login_info", "/milky"
    REFUSED = "the bridge refuses milky_token"
    NUMBERS = re.compile("(user|group|peer)_id|.*_seq|duration|limit|count|page_(index|size)")
    FLAGS = re.compile("is_.*|no_cache|reject_add_request")

    def open(self) -> None:
        # LLBot accepts a WebSocket without the right token, and then closes it: so ask before
        self.ask(self.ALIVE, {}, LOOKUP_SECONDS)
        try:
            self._line = WebSocket(beneath("ws" + self._url[4:], self.EVENTS), self._fields,
                                   self._heard, self._check)
        except (Unreachable, AuthFailure):
            super().open()

    def ask(self, action: str, params: Row, seconds: float) -> Row:
        row = super().ask(action, {
            name: int(value) if self.NUMBERS.fullmatch(name) and number_of(value) else
            is_true(value) if self.FLAGS.fullmatch(name) else value
            for name, value in params.items() if value is not None}, seconds)
        if row.get("status") == "failed" and scalar(row.get("retcode")) == "-403":
            self._hear({"event_type": "bot_offline", "data": {"reason": wording(row)}})
        return row


class MilkyLink(OneBotLink):
    """A QQ account, through a Milky bridge: Lagrange.Milky, Yogurt, LLBot."""

    PROTOCOL, EXAMPLE, UNKNOWN = "Milky", "http://HOST:3000", "milky_event"
    # A OneBot action -> Milky's call, and its parameters, theirs=ours; others have the same name
    CALLS = {
        "get_stranger_info": "get_user_profile", "set_group_kick": "kick_group_member",
        "set_group_ban": "set_group_member_mute", "set_group_leave": "quit_group",
        "set_group_whole_ban": "set_group_whole_mute is_mute=enable enable=",
        "set_group_card": "set_group_member_card", "group_poke": "send_group_nudge",
        "set_group_admin": "set_group_member_admin is_set=enable enable=",
        "set_group_special_title": "set_group_member_special_title",
        "set_group_name": "set_group_name new_group_name=group_name group_name=",
        "friend_poke": "send_friend_nudge", "get_group_file_url": "get_group_file_download_url",
        "get_private_file_url": "get_private_file_download_url",
        "upload_group_file": "upload_group_file file_uri=file file_name=name file= name=",
        "upload_private_file": "upload_private_file file_uri=file file_name=name file= name="}
    ENTITIES = {"get_friend_list": "friends", "get_group_list": "groups", "get_group_info": "group",
                "get_group_member_list": "members", "get_group_member_info": "member"}
    # A segment's type -> OneBot's, ours=theirs.
    SEGMENTS = {
        "mention": "at qq=user_id name=name", "mention_all": "at qq=all", "face": "face id=face_id",
        "reply": "reply id=id qq=sender_id", "record": "record file=resource_id url=temp_url",
        "image": "image file=resource_id url=temp_url summary=summary",
        "video": "video file=resource_id url=temp_url", "light_app": "json data=json_payload",
        "file": "file name=file_name file_id=file_id file_size=file_size",
        "forward": "forward id=forward_id summary=summary", "xml": "xml data=xml_payload",
        "market_face": "mface summary=summary url=url emoji_id=emoji_id"}
    # An event -> OneBot's, its sub_type (or a member, and that if it is true, or not), ours=theirs.
    NOTICES: Dict[str, Tuple[str, str, str]] = {
        "message_recall": ("notice {}_recall", "", "user_id=sender_id"),
        "friend_request": ("request friend", "", "user_id=initiator_id flag=initiator_uid"),
        "group_join_request": ("request group", "add", "flag=flag user_id=initiator_id"),
        "group_invited_join_request": (
            "request group", "add", "flag=flag user_id=target_user_id invitor=initiator_id"),
        "group_invitation": ("request group", "invite", "flag=flag user_id=initiator_id"),
        "friend_nudge": ("notice notify", "poke", "user_id=send target_id=receive"),
        "group_nudge": ("notice notify", "poke", "user_id=sender_id target_id=receiver_id"),
        "group_file_upload": ("notice group_upload", "", "file=file"),
        "group_admin_change": ("notice group_admin", "is_set set unset", ""),
        "group_member_increase": ("notice group_increase", "invitor_id invite approve", ""),
        "group_member_decrease": ("notice group_decrease", "operator_id kick leave", ""),
        "group_disband": ("notice group_dismiss", "", "user_id=operator_id"),
        "group_name_change": ("notice notify", "group_name", "name_new=new_group_name"),
        "group_mute": ("notice group_ban", "duration ban lift_ban", ""),
        "group_whole_mute": ("notice group_ban", "is_mute ban lift_ban", "")}

    def __init__(self, settings: Settings, hooks: Hooks, log: Log) -> None:
        super().__init__(settings, hooks, log)
        self._book = MessageBook(hooks.ids_path, log)
        self._hashes = BoundedDict()         # a private file's id -> its hash, for its URL
        self._picture = settings.qrcode_file
        self._look = self._look or self._look_at_picture

    def _connect(self) -> Bridge:
        self._url = re.sub("^ws", "http", self._url)
        return MilkyCalls(self._url, self._token, self._log, self._hear)

    def _await_page(self) -> None:
        self._queue.want(False)
        if self._look != self._look_at_picture:
            super()._await_page()
        elif self._look_at_picture()[1]:     # the bridge may not serve before it is logged in
            self._logged_in()

    def _look_at_picture(self) -> Tuple[bool, Code, str]:
        """As LoginPage.look(), for the picture that the bridge writes into its directory
        (Lagrange.Milky, Yogurt). An old one belongs to a former login."""
        path = self._picture
        with contextlib.suppress(OSError):   # there is none, or it is too large
            data = read_file(path, 2 ** 20) if time.time() - os.stat(path).st_mtime < 600 else None
            if data and media_type(data, "") in ("image/png", "image/jpeg"):
                return False, data, ""
        return False, "", "scan the code on its console, or in its qrcode.png" + (
            f" ({path} is none of now)" if path else "")

    def ready(self) -> None:
        spawn(self._catch_up, self.bridge, name="history")

    def _catch_up(self, bridge: Bridge) -> None:
        """Milky does not repeat events: ask for the messages after the last one in each place."""
        until = time.monotonic() + LIST_SECONDS
        try:
            for place, seq in self._book.heard(self.me, time.time() - 86_400).items():
                if not bridge.closed.is_set() and time.monotonic() < until:
                    self._act(self._missed(place, seq))
        except Exception:  # the account must go on
            self._log.failure("asking for what was missed")
        if bridge is self.bridge and self._greeted:
            super().ready()

    def _missed(self, place: str, newest: int) -> List[Row]:
        where, start = self._spelt(place), None
        found: Dict[int, Row] = {}
        try:
            for _ in range(10):
                data = object_of(self._get("get_history_messages", LOOKUP_SECONDS, **where,
                                           limit=30, start_message_seq=start))
                page = {int(number_of(row.get("message_seq")) or 0): {**where, **row}
                        for row in rows_of(data.get("messages"))}
                found.update(page)
                start = number_of(data.get("next_message_seq"))
                if not start or min(page, default=0) <= newest:
                    break
        except OpenQQError as error:
            self._log.warn(f"what was said in {place} cannot be had: {error.status}")
        return [{"event_type": "message_receive", "data": found[seq]} for seq in sorted(found)
                if seq > newest]

    # -- what it is asked

    def _get(self, action: str, seconds: float = 0.0, **params: Json) -> Json:
        if action in self.OURS:
            return self.OURS[action](self, seconds, **params)
        name, *names = self.CALLS.get(action, action).split()
        params.update(renamed(params, names))
        if action == "get_private_file_url":
            params["file_hash"] = self._hashes.notes.get(params["file_id"]) or ""
        elif action in ("get_friend_list", "get_group_list"):
            params["no_cache"] = True        # no event tells of a friend that is new, or gone
        data = super()._get(name, seconds, **params)
        member = self.ENTITIES.get(action)
        if not member:
            return {"url": data.get("download_url"), "user_id": data.get("uin"), **data
                    } if isinstance(data, dict) else data
        found = object_of(data).get(member)
        if isinstance(found, dict):
            return self._entity(found)
        if isinstance(found, list):
            return [self._entity(row) for row in rows_of(found)] or found
        raise Declined(f"its answer to {name} has no {member}")

    def _entity(self, row: Row) -> Row:
        """A friend, group or member, with OneBot's names added."""
        return {**row, "group_remark": row.get("remark"),
                "group_memo": scalar(row.get("announcement")) or row.get("description"),
                "group_create_time": row.get("created_time"),
                "category_name": object_of(row.get("category")).get("category_name")}

    def _place(self, data: Row) -> str:
        """The place of an event (MessageBook)."""
        scene = scalar(data.get("message_scene"))
        peer = next(filter(None, (number_of(data.get(name)) for name in (
            "peer_id", "group_id", "user_id", "initiator_id"))), "")
        return f"{self.me}/{scene if scene in ('friend', 'temp') else 'group'}/{peer}"

    def _spelt(self, place: str, seq: Optional[int] = None) -> Row:
        _, scene, peer = place.split("/")
        return {"message_scene": scene, "peer_id": int(peer or 0), "message_seq": seq}

    def _send(self, seconds: float, message: Json, user_id: str = "", group_id: str = "") -> Json:
        scene = "group" if not user_id else "temp" if group_id else "friend"
        place, found = f"{self.me}/{scene}/{user_id or group_id}", []
        for kind, data in ((part["type"], part["data"]) for part in segments_of(message)):
            at = scalar(data.get("qq"))
            there, quoted = self._book.find(data.get("id")) if kind == "reply" else (place, None)
            if there != place:
                raise Declined("a message of another conversation cannot be quoted")
            uri = next((source for source in map(scalar, (data.get("file"), data.get("url")))
                        if source and "://" in source), None)
            forms: Dict[str, Tuple[str, Row]] = {
                "text": ("text", {"text": scalar(data.get("text"))}),
                "at": ("mention_all", {}) if at == "all" else (
                    "mention", {"user_id": int(number_of(at) or 0) or None}),
                "face": ("face", {"face_id": scalar(data.get("id"))}),
                "json": ("light_app", {"json_payload": scalar(data.get("data"))}),
                "reply": ("reply", {"message_seq": quoted}),
                **dict.fromkeys(("image", "record", "video"), (kind, {"uri": uri}))}
            theirs, made = forms.get(kind, (kind, {"": None}))
            if None in made.values():
                raise Declined(f"Milky cannot send this segment: {kind}")
            found.append({"type": theirs, "data": made})
        to: Row = {"user_id": user_id} if user_id else {"group_id": group_id}
        data = object_of(self._get(f"send_{'private' if user_id else 'group'}_message",
                                   message=found, **to))
        seq = number_of(data.get("message_seq"))
        number = self._book.note(place, int(seq), -time.time())[0] if seq else None
        self._book.flush()
        return {"message_id": number}

    def _recall(self, seconds: float, message_id: Json) -> Json:
        scene, peer, seq = self._spelt(*self._book.find(message_id)).values()
        name, member = ("group", "group_id") if scene == "group" else ("private", "user_id")
        return self._get(f"recall_{name}_message", **{member: peer, "message_seq": seq})

    def _tell(self, seconds: float, message_id: Json) -> Json:
        where = self._spelt(*self._book.find(message_id))
        row = object_of(object_of(self._get("get_message", seconds, **where)).get("message"))
        return self._spoken({**row, **where}, message_id) if row else {}

    def _answer(self, seconds: float, flag: str, approve: bool, sub_type: Optional[str] = None,
                reason: Optional[str] = None, **more: Json) -> Json:
        verb = "accept" if approve else "reject"
        if sub_type is None:
            return self._get(verb + "_friend_request", initiator_uid=flag)
        kind, group, seq, is_filtered = (flag.split("/") + [""] * 4)[:4]
        if kind == "invitation":
            return self._get(verb + "_group_invitation", group_id=group, invitation_seq=seq)
        return self._get(verb + "_group_request", group_id=group, notification_seq=seq,
                         notification_type=kind, is_filtered=is_filtered,
                         reason=None if approve else reason)

    def _flag(self, kind: str, data: Row) -> str:
        """The ticket of a request of a group, for _answer()."""
        seq = number_of(data.get("invitation_seq")) or number_of(data.get("notification_seq"))
        return f"{kind}/{number_of(data.get('group_id'))}/{seq}/{is_true(data.get('is_filtered'))}"

    def _requests(self, seconds: float) -> Json:
        who = {"join_request": "initiator_id", "invited_join_request": "target_user_id"}
        rows = rows_of(object_of(self._get("get_group_notifications", seconds)).get(
            "notifications"))
        return {"join_requests": [{
            **row, "request_id": self._flag(kind, row), "requester_uin": row.get(uid),
            "message": row.get("comment"), "checked": row.get("state") != "pending"}
            for kind, uid in who.items() for row in rows if row.get("type") == kind]}

    OURS: Dict[str, Callable[..., Json]] = {
        "send_private_msg": _send, "send_group_msg": _send, "delete_msg": _recall, "get_msg": _tell,
        "set_friend_add_request": _answer, "set_group_add_request": _answer,
        "get_group_system_msg": _requests, "get_status": lambda self, seconds: {}}

    # -- what it tells

    def _hear(self, row: Row) -> None:
        if row.get("event_type") != "bot_offline":
            if "event_type" in row:
                self._queue.put(self._place(object_of(row.get("data"))), row)
        elif self._greeted:
            self._queue.want(False)
            self._offline(scalar(object_of(row.get("data")).get("reason")) or "it was logged out")

    def _act(self, rows: List[Row]) -> None:
        super()._act(rows)
        self._book.flush()

    def _items(self, row: Row) -> List[Row]:
        """Also for an event in OneBot's words."""
        kind, data = scalar(row.get("event_type")) or "", object_of(row.get("data"))
        place, seq = self._place(data), int(number_of(data.get("message_seq")) or 0)
        if kind == "message_receive":
            number, fresh = self._book.note(place, seq, int(number_of(
                data.get("time")) or time.time())) if seq else (None, True)
            found = []  # changes of the group or friend that it tells
            for circle, make, properties in (("group", group_row, ("name", "markname", "memo")),
                                             ("friend", friend_row, ("markname", "category"))):
                new = make(self._entity(object_of(data.get(circle))))
                thing = self._hooks.known(circle, new["uid"], "")
                found += [changed(circle, "", new["uid"], name, new[name]) for name in properties
                          if thing and "remark" in data[circle] and thing.value(name) != new[name]]
            return found + (super()._items(self._spoken(data, number)) if fresh else [])
        self._hashes.note(scalar(data.get("file_id")), scalar(data.get("file_hash")))
        if kind in self.NOTICES:
            what, sub_type, names = self.NOTICES[kind]
            in_group = data.get("message_scene") == "group"
            post_type, name = what.format("group" if in_group else "friend").split()
            if " " in sub_type:
                member, yes, no = sub_type.split()
                sub_type = yes if is_true(data.get(member)) else no
            known = {
                **row, **data, "flag": self._flag(kind.replace("group_", ""), data),
                "file": {name: data.get("file_" + name) for name in ("id", "name", "size")},
                **{way: self.me if is_true(data.get("is_self_" + way)) else data.get("user_id")
                   for way in ("send", "receive")}}
            row = {**row, **data, "post_type": post_type, post_type + "_type": name,
                   "sub_type": sub_type,
                   "message_id": self._book.note(place, seq)[0] if seq else None,
                   **({"group_id": data.get("peer_id")} if in_group else {}),
                   **renamed(known, names.split())}
        elif kind:
            row = {"post_type": "notice", "notice_type": self.UNKNOWN, **row}
        return super()._items(row)

    def _spoken(self, data: Row, number: Json) -> Row:
        """A message in OneBot's words."""
        place, group, segments = self._place(data), object_of(data.get("group")), []
        _, scene, peer = place.split("/")
        uid = number_of(data.get("sender_id"))
        circle = peer if scene == "group" else number_of(group.get("group_id"))
        for part in segments_of(data.get("segments")):
            kind, inner = part["type"], part["data"]
            seq = number_of(inner.get("message_seq")) if kind == "reply" else ""
            more = {"id": str(self._book.note(place, int(seq))[0])} if seq else {}
            self._hashes.note(scalar(inner.get("file_id")), scalar(inner.get("file_hash")))
            kind, *names = str(self.SEGMENTS.get(kind, kind)).split()
            segments.append({"type": kind, "data": renamed({**inner, **more, "all": "all"}, names)
                             if names else inner})
        return {"post_type": "message_sent" if uid == self.me else "message", "user_id": uid,
                "sub_type": {"group": "normal", "friend": "friend"}.get(
                    scene, "group" if circle else "other"),
                "message_type": "group" if scene == "group" else "private", "target_id": peer,
                "group_id": circle, "group_name": group.get("group_name"), "message_id": number,
                "sender": {**object_of(data.get("group_member" if scene == "group" else "friend")),
                           "user_id": uid},
                "time": data.get("time"), "message": segments}


@functools.lru_cache(maxsize=1)
def _aes_tables() -> Tuple[bytes, bytes]:
    """The S-box of AES, and all bytes times 2 in its field (FIPS 197, 4.2 and 5.1.1)."""
    double = bytes(value << 1 & 0xff ^ (0x1b if value > 0x7f else 0) for value in range(256))
    power = [1]                          # of 3: all of the field but 0
    while len(power) < 255:
        power.append(power[-1] ^ double[power[-1]])
    box = bytearray([0x63] * 256)
    for number, value in enumerate(power):
        inverse = power[-number % 255]
        spread = inverse ^ inverse << 1 ^ inverse << 2 ^ inverse << 3 ^ inverse << 4
        box[value] = (spread ^ spread >> 8) & 0xff ^ 0x63
    return bytes(box), double


def aes_128_ecb(key: bytes, data: bytes, encrypt: bool) -> bytes:
    """AES-128-ECB with PKCS7 padding, which the standard library does not have. ValueError if the
    data were not encrypted with this key. 1 MiB takes 0.1 s."""
    if encrypt:
        count = 16 - len(data) % 16
        data += bytes([count]) * count
    if len(key) != 16 or not data or len(data) % 16:
        raise ValueError("a key has 16 bytes, and encrypted data blocks of 16 bytes")
    box, double = _aes_tables()
    unbox, size = bytes(map(box.index, range(256))), len(data) // 16
    keys = bytearray(key)                # 16 for each round
    for number in range(4, 44):
        word = keys[-4:]
        if number % 4 == 0:
            word = (word[1:] + word[:1]).translate(box)
            word[0] ^= b"\x01\x02\x04\x08\x10\x20\x40\x80\x1b\x36"[number // 4 - 1]
        keys += bytes(map(operator.xor, word, keys[-16:-12]))

    def xor(*parts: bytes) -> bytes:
        numbers = (int.from_bytes(part, "big") for part in parts)
        return functools.reduce(operator.xor, numbers).to_bytes(size, "big")

    def with_key(state: List[bytes], number: int) -> List[bytes]:
        return [xor(part, bytes([byte]) * size)
                for part, byte in zip(state, keys[16 * number:16 * number + 16])]

    def mixed(state: List[bytes]) -> List[bytes]:
        found = []
        for number in range(16):
            a, b, c, d = (state[number & 12 | number + row & 3] for row in range(4))
            found.append(xor(xor(a, b).translate(double), b, c, d))
        return found

    # state[n] has byte n of all blocks, so that each step works on all blocks at once, in C.
    state = [data[number::16] for number in range(16)]
    if encrypt:
        state = with_key(state, 0)
        for number in range(1, 11):
            state = [state[5 * place % 16].translate(box) for place in range(16)]
            state = with_key(mixed(state) if number < 10 else state, number)
    else:
        for number in range(10, 0, -1):
            state = with_key(state, number)
            if number < 10:              # with this before it, mixing undoes itself
                state = mixed([xor(part, xor(part, state[place ^ 2]).translate(double).translate(
                    double)) for place, part in enumerate(state)])
            state = [state[13 * place % 16].translate(unbox) for place in range(16)]
        state = with_key(state, 0)
    out = bytearray(len(data))
    for number, part in enumerate(state):
        out[number::16] = part
    count = 0 if encrypt else out[-1]
    if not encrypt and (not 1 <= count <= 16 or out[-count:] != bytes([count]) * count):
        raise ValueError("not encrypted with this key")
    return bytes(out[:len(out) - count])


LoginEnded = answering(201)          # WeChat's -14: the token is invalid, a new scan is needed


class ILinkLink(Link):
    """A WeChat account through Tencent's own bot API (WEIXIN.md), for the person who scans it only.

    One thread logs in, by a QR code or the cookie, then polls. The cookie is JSON: token, base (the
    API's address after the login), me and owner (uids of account and person), and `people`: uid ->
    [context token, sends left, until when]. The mark of an item tells where to continue after it,
    and which messages since then are known already.
    """

    real = True
    send_interval = 0.0
    lacks = ("accept_friend_request", "accept_group_request", "call_action", "create_group",
             "delete_friend", "get_avatar", "invite_friend", "kick_group_member", "leave_group",
             "make_friend", "poke", "set_friend_markname", "set_group_admin", "set_group_card",
             "set_group_displayname", "set_group_name", "set_group_title", "set_markname",
             "shutup_group_member", "stick")
    APP = {"iLink-App-Id": "bot", "iLink-App-ClientVersion": "132105"}  # of Tencent's own 2.4.9
    BASE_INFO = {"channel_version": "2.4.9", "bot_agent": "OpenQQ/" + VERSION}
    # The type of an item -> the member with its data, its text, the ending of its file.
    PARTS: Dict[Optional[str], Tuple[str, str, str]] = {
        "1": ("text_item", "", ""), "2": ("image_item", "[图片]", ".jpg"),
        "3": ("voice_item", "[语音]", ".silk"), "4": ("file_item", "[文件]", ""),
        "5": ("video_item", "[视频]", ".mp4")}
    # A text in pieces of at most 4,000 characters, cut after a line, a sentence or a blank.
    PIECES = re.compile(r"(?s).{1,4000}\Z|.{2000,3999}\n|.{2000,3999}[。！？!?]|"
                        r".{2000,3999}[ ，,]|.{4000}")
    RULE = ("WeChat's rule: the person has to write first, then 10 messages may be sent to him "
            "within 24 hours")
    POLL_SECONDS = 40.0          # the server's own limit is 35
    CODE_SECONDS = 300.0         # a code that is not scanned is replaced

    def __init__(self, settings: Settings, hooks: Hooks, log: Log) -> None:
        self._hooks, self._log = hooks, log
        self._api, self._cdn = settings.ilink_api.rstrip("/"), settings.ilink_cdn.rstrip("/")
        self._login: Row = {}                # empty if it needs a scan
        self._people: Dict[str, List[Any]] = {}
        self._former: Row = {}               # a login that was given up, and may still be valid
        self._beginning = threading.Lock()   # for one login() at a time
        self._over = threading.Event()       # ends the thread of the newest login()
        self._digits: Optional[Future[str]] = None  # the digits on the phone, while asked for
        self._why = ""                       # why the login was lost
        self._pool = ThreadPool(1, "typing", log)
        self._cursor = ""
        self._seen: Deque[str] = collections.deque(maxlen=50)

    def login(self, cookie: str, mark: str) -> None:
        login = object_in(cookie.encode()) or {}
        with self._beginning:
            self.close()
            over = self._over = threading.Event()
            if login.get("token"):
                self._people = object_of(login.pop("people", None))
            self._login = login if login.get("token") else {}
        if not self._cursor and mark:
            try:
                self._cursor, seen = json.loads(base64.urlsafe_b64decode(mark.partition(":")[0]))
                self._seen.extend(seen)
            except (ValueError, TypeError):
                pass  # of another link
        spawn(self._live, over, name="link")

    def account(self) -> str:
        return str(self._login.get("me", ""))

    def status(self) -> Row:
        _, left, until = self._person(str(self._login.get("owner", "")))
        return {"sends_left": left if until > time.time() else 0, "sends_until": int(until),
                **({"verify_code": "wanted"} if self._digits else {})}

    def roster(self) -> Row:
        me, owner = self._friend(self._login["me"]), self._friend(self._login["owner"])
        helper = {**self._friend("filehelper"), "name": "文件传输助手"}
        return {"user": me, "friend": [owner, helper], "group": [], "discuss": []}

    def _friend(self, uid: str) -> Row:
        return {"uid": uid, "id": uid, "account": uid, "name": uid.partition("@")[0],
                "markname": None}

    def logout(self) -> None:
        self._former, self._login, self._why = self._login, {}, ""

    def close(self) -> None:
        self._over.set()
        self.verify_code("")

    def verify_code(self, code: str) -> bool:
        digits = self._digits
        if digits is None or digits.done():
            return False
        settle(digits, code)
        return True

    # -- the thread

    def _live(self, over: threading.Event) -> None:
        """Log in if needed, and poll; after a failure again in 2 s, from the third on in 30 s."""
        failures, confirmed = 0, False
        while not over.is_set():
            try:
                fresh = not self._login
                if fresh:
                    confirmed = False
                    self._scan(over)
                    if not self._login:
                        continue
                elif not confirmed:
                    with contextlib.suppress(Declined, LoginEnded):
                        self._call("msg/notifystart", {})
                    self._call("getconfig", {"ilink_user_id": self._login["owner"]})
                if not (confirmed or over.is_set()):
                    confirmed, self._why = True, ""
                    self._hooks.confirmed(self._cookie(), fresh)
                self._poll(over)
                failures = 0
            except NotRunning:
                return  # the client stops
            except LoginEnded as error:
                self._why = f"the login at WeChat has ended ({error.status}): scan a new code"
                self._log.warn(self._why)
                self._former, self._login = self._login, {}
                over.wait(1.0)  # a server that ends each login at once must not keep us busy
            except Exception as error:  # the thread must go on
                if not isinstance(error, OpenQQError):
                    self._log.failure("the link to WeChat")
                failures += 1
                wait = 2.0 if failures < 3 else 30.0
                if not over.is_set() and (failures >= 3 or not confirmed):
                    confirmed = False
                    self._hooks.lost(f"WeChat: {error}; trying again in {wait:g} s")
                over.wait(wait)

    def _scan(self, over: threading.Event) -> None:
        """Show a QR code until it is confirmed, which sets _login, or becomes invalid."""
        row = self._call("get_bot_qrcode?bot_type=3", {
            "local_token_list": [self._former["token"]] if self._former else []}, self._api)
        params, base = {"qrcode": scalar(row.get("qrcode")) or ""}, self._api
        text = scalar(row.get("qrcode_img_content")) or ""
        if not 0 < len(text.encode()) <= QR_ROOM[-1]:
            raise Unreachable("it tells no code that could be shown")
        self._hooks.qrcode(text, self.CODE_SECONDS, self._why)
        until = time.monotonic() + self.CODE_SECONDS
        while not over.is_set() and time.monotonic() < until:
            try:
                row = self._fetch(with_params(f"{base}/ilink/bot/get_qrcode_status", **params),
                                  self.APP, self.POLL_SECONDS)
            except Unreachable as error:  # also at the end of a long poll
                self._log.debug(f"WeChat, get_qrcode_status: {error.status}")
                row = {}
            status = row.get("status")
            if status == "confirmed":
                token, me, owner, url = [scalar(row.get(name)) or "" for name in (
                    "bot_token", "ilink_bot_id", "ilink_user_id", "baseurl")]
                if not (me and owner and re.fullmatch("[!-~]+", token)):
                    raise Unreachable("it confirms a login without a token")
                base = self._allowed(url if is_url(url) else base)
                if me != self._former.get("me"):
                    self._cursor = ""
                if owner != self._former.get("owner"):
                    self._people = {}
                self._login = {"token": token, "me": me, "owner": owner, "base": base}
                return
            if status == "binded_redirect":
                self._login = self._former
            if status in ("expired", "verify_code_blocked", "binded_redirect"):
                return
            if status in ("scaned", "need_verifycode"):
                self._hooks.scanned()
            if status == "need_verifycode":
                wrong = " (those before were wrong)" if "verify_code" in params else ""
                self._log.warn("WeChat asks for the digits that the phone shows: give them to "
                               f"verify_code?code=…{wrong}")
                digits = self._digits = Future()
                self._hooks.kept("")  # so that check_client tells it
                if over.is_set():
                    settle(digits, "")
                with contextlib.suppress(TimeoutError):
                    params["verify_code"] = result_of(digits, until - time.monotonic())
                self._digits = None
                self._hooks.kept("")
                continue
            host = scalar(row.get("redirect_host")) or ""
            if status == "scaned_but_redirect" and re.fullmatch("[A-Za-z0-9.-]+(:[0-9]+)?", host):
                base = self._allowed("https://" + host)
            over.wait(1.0)

    def _poll(self, over: threading.Event) -> None:
        """Ask for news, and hand it on; the next call acknowledges it."""
        began = time.monotonic()
        try:
            row = self._call("getupdates", {"get_updates_buf": self._cursor},
                             seconds=self.POLL_SECONDS)
        except TooSlow:
            return
        if over.is_set():
            return
        messages = rows_of(row.get("msgs"))
        if not messages and time.monotonic() - began < 1.0:
            over.wait(1.0)  # the server did not wait
        items, cursor = [], scalar(row.get("get_updates_buf")) or self._cursor
        for message in messages:
            number = (scalar(message.get("message_id")) or scalar(message.get("client_id"))
                      or os.urandom(8).hex())
            if (message.get("message_type") == 1 and number not in self._seen
                    and scalar(message.get("from_user_id"))):
                self._seen.append(number)
                try:
                    items.append({**self._understand(message, number),
                                  "mark": self._mark(self._cursor)})
                except Exception:  # the other messages go on
                    self._log.failure("a message from WeChat")
        if items:
            items[-1]["mark"] = self._mark(cursor)
            self._hooks.kept(self._cookie())  # it is needed for answers
            self._hooks.received(items)
        self._cursor = cursor

    def _mark(self, cursor: str) -> str:
        state = to_bytes([cursor, list(self._seen)])
        return base64.urlsafe_b64encode(state).decode() + ":0"

    def _understand(self, message: Row, number: str) -> Row:
        uid = scalar(message.get("from_user_id")) or ""
        token = scalar(message.get("context_token")) or self._person(uid)[0]
        self._people[uid] = [token, 10, time.time() + 86_400]  # as RULE says
        texts, reply_to = [], None
        media: Optional[Row] = None
        for part in rows_of(message.get("item_list")):
            name, label, ending = self.PARTS.get(scalar(part.get("type")), ("", "", ""))
            data, quoted = object_of(part.get(name)), object_of(part.get("ref_msg"))
            if quoted:
                reply_to = scalar(quoted.get("svr_id"))
                inner = object_of(object_of(quoted.get("message_item")).get("text_item"))
                title = scalar(quoted.get("title")) or scalar(inner.get("text")) or "…"
                texts.append(f"「{title}」\n")
            if label:
                texts.append(label + (scalar(data.get("file_name")) or ""))
                media = media or self._fetch_media(data, ending)
            texts.append(scalar(data.get("text")) or "")
        if media:
            labels = [label for _, label, _ in self.PARTS.values()]
            texts = [text for text in texts if text not in labels]
        sender = self._friend(uid)
        return {"do": "message", "type": "friend_message", "group": None, "uid": uid,
                "sender_id": uid, "name": sender["name"], "sender": sender, "id": number,
                "content": "".join(texts), "reply_to": reply_to,
                "time": number_of(message.get("create_time_ms"))[:-3] or str(int(time.time())),
                **({"media": media} if media else {})}

    def _fetch_media(self, data: Row, ending: str) -> Optional[Row]:
        media = object_of(data.get("media"))
        if not media:
            return None
        url = scalar(media.get("full_url")) or with_params(
            self._cdn + "/download",
            encrypted_query_param=scalar(media.get("encrypt_query_param")) or "")
        try:
            reply = fetch(self._allowed(url), seconds=DETAIL_SECONDS)  # messages wait for it
            body = reply.read(MEDIA_LIMIT + 16)
            if reply.status != 200:
                raise Unreachable(f"its server answers {reply.status}")
            told = scalar(data.get("aeskey")) or ""
            key = bytes.fromhex(told) if told else base64.b64decode(
                scalar(media.get("aes_key")) or "")
            if len(key) == 32:
                key = bytes.fromhex(key.decode("ascii"))
            if key or ending != ".jpg":  # a picture without a key is plain
                body = aes_128_ecb(key, body, False)
        except (OpenQQError, ValueError) as error:
            self._log.warn(f"what came with a message from WeChat cannot be had: {error}")
            return None
        return {"name": scalar(data.get("file_name")) or "wechat" + ending,
                "data": base64.b64encode(body).decode()}

    # -- what goes out

    def send(self, messages: List[Row]) -> List[Row]:
        [message] = messages  # `batch` is 1
        uid = self._login["owner"] if message["uid"] == "filehelper" else message["uid"]
        media, texts = message.get("media"), self.PIECES.findall(message["content"])
        number, sent = None, False
        try:
            if message["type"] != "friend_message":
                raise Declined("not with this link")
            token, left, until = self._person(uid)
            if not token or until < time.time() or left < len(texts) + bool(media):
                raise Declined(self.RULE + (f"; {left} are left" if token else ""))
            items = [{"type": 1, "text_item": {"text": text}} for text in texts]
            if media:
                items.append(self._upload(uid, media))
            for item in items:
                row = self._call("sendmessage", {"msg": {
                    "from_user_id": "", "to_user_id": uid, "client_id": os.urandom(8).hex(),
                    "message_type": 2, "message_state": 2, "context_token": token,
                    "item_list": [item]}})
                self._person(uid)[1] -= 1
                number, sent = scalar(row.get("message_id")), True
        except Declined as error:
            return [{"code": -3, "info": error.status}]
        except Unreachable as error:
            error.sent = error.sent or sent  # another try would double the first pieces
            raise
        self._hooks.kept(self._cookie())
        return [{"code": 0, "info": "发送正常", "id": number}]

    def _person(self, uid: str) -> List[Any]:
        return self._people.get(uid) or ["", 0, 0.0]

    def _cookie(self) -> str:
        return to_bytes({**self._login, "people": self._people}).decode()

    def _upload(self, uid: str, media: Row) -> Row:
        """Upload a file to WeChat; returns the item for the message."""
        import hashlib
        data, key, name = base64.b64decode(media["data"]), os.urandom(16), os.urandom(16).hex()
        body = aes_128_ecb(key, data, True)
        kind, type_, more = {
            "image": (1, 2, {"mid_size": len(body)}), "video": (2, 5, {"video_size": len(body)})
            }.get(media["mime"].partition("/")[0], (
                3, 4, {"file_name": media["name"], "len": str(len(data))}))
        row = self._call("getuploadurl", {
            "filekey": name, "media_type": kind, "to_user_id": uid, "rawsize": len(data),
            "rawfilemd5": hashlib.md5(data).hexdigest(), "filesize": len(body),
            "no_need_thumb": True, "aeskey": key.hex()})
        url, param = scalar(row.get("upload_full_url")), scalar(row.get("upload_param"))
        if param and not url:
            url = with_params(self._cdn + "/upload", encrypted_query_param=param, filekey=name)
        if not url:
            raise Declined("WeChat tells no address for the picture")
        for left in (2, 1, 0):
            try:
                reply = fetch(self._allowed(url), "POST",
                              {"Content-Type": "application/octet-stream"}, body, BRIDGE_SECONDS)
                reply.read()
                param = reply.fields.get("x-encrypted-param")
                if reply.status == 200 and param:
                    break
                why = reply.fields.get("x-error-message") or f"status {reply.status}"
                if 400 <= reply.status < 500 or not left:
                    raise Declined(f"WeChat does not take the picture: {why}")
            except Unreachable:
                if not left:
                    raise
        return {"type": type_, self.PARTS[str(type_)][0]: {**more, "media": {
            "encrypt_query_param": param, "encrypt_type": 1,
            "aes_key": base64.b64encode(key.hex().encode()).decode()}}}

    def typing(self, uid: str, on: bool) -> None:
        def show() -> None:
            try:
                ticket = self._call("getconfig", {
                    "ilink_user_id": uid,
                    "context_token": self._person(uid)[0]}).get("typing_ticket")
                if ticket:
                    self._call("sendtyping", {"ilink_user_id": uid, "typing_ticket": ticket,
                                              "status": 1 if on else 2})
            except OpenQQError as error:
                self._log.debug(f"WeChat, typing: {error.status}")

        self._pool.submit(show)

    def _call(self, name: str, body: Row, base: str = "", seconds: float = 15.0) -> Row:
        """The answer to a call. Unreachable; Declined with what WeChat says; LoginEnded."""
        login = self._login
        fields = {**self.APP, "Content-Type": "application/json",
                  "AuthorizationType": "ilink_bot_token",
                  "X-WECHAT-UIN": base64.b64encode(
                      str(int.from_bytes(os.urandom(4), "big")).encode()).decode()}
        if not base:
            if not login:  # another thread has ended it
                raise LoginEnded("it was given up")
            base, body = login["base"], {**body, "base_info": self.BASE_INFO}
            fields["Authorization"] = "Bearer " + login["token"]
        row = self._fetch(f"{base}/ilink/bot/{name}", fields, seconds, to_bytes(body))
        code, why = row.get("errcode") or row.get("ret") or 0, scalar(row.get("errmsg")) or ""
        if scalar(code) in ("-14", "-14.0"):
            raise LoginEnded(f"-14 {why}".strip())
        if code:
            raise Declined(f"{name}: {code} {why}".strip()
                           + (f"; {self.RULE}" if name == "sendmessage" else ""))
        return row

    def _fetch(self, url: str, fields: Fields, seconds: float, body: Optional[bytes] = None) -> Row:
        reply = fetch(url, "POST" if body else "GET", fields, body, seconds)
        row = object_in(reply.read())
        if reply.status != 200 or row is None:
            raise Unreachable(f"it answers {reply.status}", True)
        return row

    def _allowed(self, url: str) -> str:
        """The URL; Unreachable if Tencent's own server names one of somebody else."""
        parts = urllib.parse.urlsplit(url)
        under = ("." + (parts.hostname or "")).endswith(".weixin.qq.com")
        official = self._api == SETTINGS["ilink_api"].default
        if official and (parts.scheme != "https" or not under):
            raise Unreachable(f"it leads elsewhere, to {shown_url(url)}")
        return url.rstrip("/")


# The links to real networks.
LINKS: Dict[str, Callable[[Settings, Hooks, Log], Link]] = {
    "onebot": OneBotLink, "milky": MilkyLink, "ilink": ILinkLink}


# ------------------------------------------------------------------------------------------------
# 12. Client
# ------------------------------------------------------------------------------------------------

# The states (002), each with those that may follow it; `scaning` is the documents' spelling.
NEXT_STATES = {
    "": ("init",),
    "init": ("loading", "stop"),
    "loading": ("scaning", "updating", "stop"),
    "scaning": ("confirming", "updating", "stop"),
    "confirming": ("scaning", "updating", "stop"),
    "updating": ("running", "scaning", "stop"),
    "running": ("updating", "scaning", "stop"),
    "stop": (),
}
LOGGING_IN = ("scaning", "confirming")
CIRCLE_OF = {"group_message": "group", "discuss_message": "discuss"}  # a sess_message says `via`


class Parent:
    """What a client gets from its controller: a connection, a listening socket, a network.

    Up the connection go the client's states and warnings, as lines of JSON, and its events: `+` and
    an event that is kept, `-` and one for streams only. The client never waits for the controller:
    if that is too slow events are dropped, and it is told how many.
    """

    def __init__(self, life: socket.socket, listener: Optional[socket.socket], local: str,
                 key: str) -> None:
        self.life, self.listener, self.local, self.key = life, listener, local, key
        life.setblocking(False)
        self._lock = threading.Lock()  # guards what follows
        self._unsent = bytearray()
        self._lost = 0                 # events dropped since the last one that was sent
        self._waiting = False          # a thread waits until more can be sent

    @classmethod
    def find(cls) -> Optional[Parent]:
        """The parent of this process, or None; removes its variables from the environment."""
        life, listener, local, key = [os.environ.pop("OPENQQ_" + name, "")
                                      for name in ("LIFE", "LISTEN", "LOCAL", "KEY")]
        return cls(socket.socket(fileno=int(life)), socket.socket(fileno=int(listener)),
                   local, key) if life else None

    def tell(self, **news: str) -> None:
        """Send a state or a warning at once."""
        with self._lock:
            self._unsent += to_bytes(news) + b"\n"
        self.flush()

    def add(self, seq: int, event: bytes) -> None:
        """Queue an event, as JSON, for the next flush(); its `seq` is 0 if it is not kept."""
        if event.startswith(b'{"event":"state_change"'):
            return  # the controller tells these, also for clients that were killed
        with self._lock:
            if len(self._unsent) + len(event) > STREAM_BYTES:
                self._lost += 1
                return
            if self._lost:
                self._unsent += to_bytes({"lost": self._lost}) + b"\n"
                self._lost = 0
            self._unsent += (b"+" if seq else b"-") + event + b"\n"

    def flush(self) -> None:
        """Send what can be sent without waiting; a thread waits to send the rest."""
        with self._lock:
            try:
                while self._unsent and not self._waiting:
                    with memoryview(self._unsent) as data:
                        sent = self.life.send(data[:262_144])
                    del self._unsent[:sent]
            except BlockingIOError:
                with contextlib.suppress(RuntimeError):  # no thread: the next flush() sends it
                    spawn(self._wait, name="life line")
                    self._waiting = True
            except OSError:  # there is no controller any more
                self._unsent.clear()

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.life, selectors.EVENT_WRITE)
            selector.select()
        with self._lock:
            self._waiting = False
        self.flush()


class ClientFiles:
    """The files of a client (000); a failure to write one does not stop the client."""

    def __init__(self, settings: Settings, flavour: Type[Flavour], log: Log) -> None:
        self.settings, self.log = settings, log
        start = os.path.join(settings.tmpdir, flavour.file_prefix)
        account = settings.account
        settings.fill(cookie_path=f"{start}cookie_{account}.dat",
                      qrcode_path=f"{start}qrcode_{account}.jpg",
                      state_path=f"{start}state_{account}.json",
                      pid_path=f"{start}pid_{account}.pid")
        self.pid = PidFile(settings.pid_path)
        self.media_store = MediaStore(f"{start}media_{account}_")
        self.spool_path = f"{start}post_{account}.jsonl"
        self.ids_path = f"{start}ids_{account}.jsonl"
        self.claim_path = start + "account_{}.pid"
        self.local_path = f"{start}local_{account}"

    def state_row(self, client: Client) -> Row:
        """The state file's content (000, CONTRACT 8)."""
        settings, program = self.settings, client.flavour.program
        row: Row = {
            **{name: getattr(settings, name) for name in (
                "cookie_path", "log_level", "mode", "pid_path", "qrcode_path", "state_path",
                "tmpdir")},
            **{name: str(int(getattr(settings, name))) for name in (
                *client.flavour.state_flags, "qrcode_count_max", "ua_retry_times")},
            "account": client.account, "os": SYSTEM, "pid": os.getpid(),
            **{name: settings.given(name) or None for name in ("log_encoding", "log_path")},
            "previous_state": client.previous_state or None,
            "start_time": str(client.start_time), "state": client.state, "version": VERSION,
            "plugin": [{"name": ("" if plugin.name[0] == "+" else f"{program}::Plugin::")
                        + plugin.name, "priority": plugin.priority,
                        "auto_call": None if plugin.call_on_load else 1,
                        "call_on_load": int(plugin.call_on_load)}
                       for plugin in sorted(client.plugins, key=lambda p: p.name)],
            **client.link.status()}
        if client.warnings:
            row["warning"] = "; ".join(client.warnings.values())
        for outlet in client.outlets:
            if outlet.poster.error:
                row["post_error"] = outlet.poster.error
        return dict(row, error=client.error) if client.error else row

    def write_state(self, client: Client) -> None:
        """Write the state file; later if another program has it open."""
        data = to_bytes(self.state_row(client))
        if not keep_file(self.settings.state_path, data, self.log):
            client.plan("state file", REPLACE_SECONDS, self.write_state, client)

    def read_cookie(self) -> Row:
        """The cookie file of the last login; {} if there is none, or it is of another account."""
        row = read_json(self.settings.cookie_path, self.log)
        return row if row.get("account") == self.settings.account else {}

    def write_cookie(self, cookie: Optional[str] = None) -> None:
        """Keep a login, and the present secrets, which a resumed client needs (DESIGN).

        Without a `cookie`, or if none is to be kept, the one in the file stays.
        """
        old, secrets = self.read_cookie(), self.settings.secrets()
        if cookie is None or not self.settings.keep_cookie:
            if not secrets and not old.get("secrets"):
                return
            cookie = str(old.get("cookie", ""))
        keep_file(self.settings.cookie_path, to_bytes({
            "account": self.settings.account, "cookie": cookie, "time": int(time.time()),
            "secrets": secrets, "bridge": self._urls()}), self.log)

    def share_secrets(self) -> None:
        """Take the secrets of the former start, since a resumed client is given none, and keep
        those of this one. Not those that are to be forgotten, nor those for a bridge at another
        address."""
        row, now = self.read_cookie(), self._urls()
        forget = os.environ.pop("OPENQQ_FORGET", "").split(",")
        then, secrets = object_of(row.get("bridge")), object_of(row.get("secrets"))
        self.settings.fill(**{
            name: str(value) for name, value in secrets.items()
            if name in SETTINGS and name not in forget
            and all(then.get(url) == now[url] for url in urls_of(name))})
        self.write_cookie()

    def _urls(self) -> Dict[str, str]:
        return {name: getattr(self.settings, name) for name, setting in SETTINGS.items()
                if setting.token[0]}


class Roster:
    """Whom the account knows; `lock`, the client's, guards it. Methods that take it may be called
    from any thread."""

    def __init__(self, fields: Mapping[str, Tuple[str, ...]], lock: Any) -> None:
        self.fields, self.lock = fields, lock
        self.user = THINGS["user"]({})
        self.friend: Dict[str, Thing] = {}
        self.group: Dict[str, Circle] = {}
        self.discuss: Dict[str, Circle] = {}
        self.changes = 0              # number of changes by events
        self.touched: Dict[Tuple[str, str], int] = {}  # kind, uid -> the number of the last one

    def table(self, kind: str, circle: str = "") -> Dict[str, Any]:
        """The things of a kind by uid; for members those of one group or discuss."""
        if kind.endswith("_member"):
            place = self.table(kind[:-7]).get(circle)
            return place.member if place else {}
        table: Dict[str, Any] = getattr(self, kind)
        return table

    def rows(self, kind: str, members: bool = True, things: Optional[List[Any]] = None
             ) -> Iterator[List[Row]]:
        """The list of a kind, or of some `things` of it, as documented, in parts: other threads
        must not wait for the lock until a million members are read."""
        if things is None:
            with self.lock:
                things = list(self.table(kind).values())
        step = 1 if members and kind != "friend" else 64
        for at in range(0, len(things), step):
            with self.lock:
                rows = [(thing.full_json if members else thing.to_json)(self.fields)
                        for thing in things[at:at + step]]
            yield rows

    def search(self, where: Union[str, Circle], keys: Mapping[str, str]) -> List[Any]:
        """The things of a kind, or the members of a group or discuss, whose attributes, as text,
        are equal to all of the keys; none without keys."""
        with self.lock:
            things = (where.member if isinstance(where, Circle) else self.table(where)).values()
            found = list(things) if keys else []
            for name, wanted in keys.items():
                found = [thing for thing in found if thing.value(name) is not None
                         and str(thing.value(name)) == wanted]
            return found

    def find(self, kind: str, uid: str, circle: str) -> Optional[Any]:
        """A thing by its uid, and for a member that of its group or discuss; or None."""
        return self.table(kind, circle).get(uid)

    def is_newer(self, kind: str, uid: str, before: int) -> bool:
        """Whether an event has changed it since change number `before`."""
        return self.touched.get((kind, uid), 0) > before

    def load(self, row: Row, kinds: Iterable[str], before: int) -> None:
        """Take over what a link told of these kinds, except what events changed after `before`."""
        for kind in kinds:
            if kind == "user":
                self.user = THINGS["user"](row["user"])
                continue
            new = {item["uid"]: THINGS[kind](item) for item in row[kind]
                   if not self.is_newer(kind, item["uid"], before)}
            new.update({uid: thing for uid, thing in self.table(kind).items()
                        if self.is_newer(kind, uid, before)})
            setattr(self, kind, new)

    def show_states(self, states: Mapping[str, str]) -> None:
        """Take over the present states, which no event tells."""
        with self.lock:
            circles = *self.group.values(), *self.discuss.values()
            for table in (self.friend, *[circle.member for circle in circles]):
                for uid in states.keys() & table.keys():
                    table[uid].state = states[uid]

    def apply(self, item: Row) -> Optional[Tuple[str, List[Any]]]:
        """Apply an event of a link: its name and params, or None if nothing changed."""
        event = str(item["event"])
        if "params" in item:  # it changes nothing; people in it are replaced by those of the roster
            params: List[Any] = []
            for who in item["params"]:
                if isinstance(who, dict) and "kind" in who:
                    kind, uid = who["kind"], who["uid"]
                    who = self.user if uid == self.user.value("uid") else (
                        self.find(kind, uid, who.get("circle") or "") or THINGS[kind](
                            {"id": uid, "name": who.get("name") or uid, "uid": uid}))
                params.append(who)
            return event, params
        if "request" in item:
            return event, [{name: item["request"].get(name) for name in self.fields[event]}]
        kind = re.sub("(new|lose)_|_property_change", "", event)
        changes = event.endswith("_property_change")
        uid = item["uid"] if changes else item["object"]["uid"]
        of = kind[:-7] if kind.endswith("_member") else ""   # a member: of a group, or a discuss
        place = (of, item["circle"]) if of else (kind, uid)
        self.changes += 1
        self.touched.pop(place, None)
        self.touched[place] = self.changes
        keep_newest(self.touched, POST_QUEUE_LIMIT)
        table = {uid: self.user} if kind == "user" else self.table(kind, item.get("circle") or "")
        if changes:
            thing, name, value = table.get(uid), item["property"], item["value"]
            if thing is None and "object" in item:  # the members of the group are not loaded
                thing = THINGS[kind](item["object"])
            if name == "owner_uid" and isinstance(thing, Circle):  # the roster knows whose id
                owner = thing.member.get(value)
                thing.owner_id = owner.id if owner else None
            if thing is None or name not in (*self.fields[kind], "title") or (
                    name == "displayname"):  # which follows from others
                return None
            old = thing.value(name)
            setattr(thing, name, value)
            return (event, [thing, name, old, value]) if old != value else None
        circle = self.table(of).get(item["circle"]) if of else None
        if of and circle is None:
            if not item.get("unlisted"):
                return None
            circle = THINGS["group"]({name: item["circle"] for name in ("uid", "id", "name")})
        thing = THINGS[kind]({"role": "attend", **item["object"]} if event == "new_group"
                             else item["object"])
        if event.startswith("new_"):
            table[uid] = thing
        else:
            thing = table.pop(uid, thing)
        return event, [thing, circle] if circle else [thing]


def changes_of(kind: str, old: Mapping[str, Any], new: Mapping[str, Row], **place: str
               ) -> List[Row]:
    """The new_, lose_ and property_change events that lead from the known things to new rows.

    There are none for states of others: everybody would be told whenever somebody comes or goes.
    """
    found: List[Row] = []
    for uid, row in new.items():
        if uid not in old:
            found.append({"event": "new_" + kind, "object": row, **place})
            continue
        for name, value in row.items():
            if name == "member":
                found += changes_of(kind + "_member", old[uid].member,
                                    {member["uid"]: member for member in value}, circle=uid)
            elif old[uid].value(name) != value and (name != "state" or kind == "user"):
                found.append({"event": kind + "_property_change", "uid": uid, "property": name,
                              "value": value, **place})
    return found + [{"event": "lose_" + kind, "object": {"uid": uid}, **place}
                    for uid in old if uid not in new]


PLUGINS: Dict[str, Tuple[Callable[[Any, Row], None], int]] = {}  # name -> call, priority


class Plugin:
    """A plugin, which a client runs by `call(client, data)`, in the order of priority, the highest
    first. Refusal if there is none of that name."""

    def __init__(self, name: Any, data: Row, call_on_load: bool) -> None:
        self.name = name if isinstance(name, str) else "+" + getattr(name, "__name__", "plugin")
        self.data, self.call_on_load, module = data, call_on_load, name
        if not self.name.startswith("+"):
            if name not in PLUGINS:
                raise Refusal(f"there is no plugin {name}; there are "
                              f"{', '.join(sorted(PLUGINS))}, and +NAME for a module of your own")
            self.call, self.priority = PLUGINS[name]
            return
        if isinstance(name, str):
            try:
                import importlib
                add_site_packages()
                module = importlib.import_module(name[1:])
                module.call  # AttributeError, if it has none
            except (ImportError, AttributeError) as error:
                raise Refusal(f"plugin {name} cannot be loaded: {error}") from None
        self.call = getattr(module, "call", module)
        self.priority = getattr(module, "PRIORITY", 0)


class Listing:
    """The state of a list (friends, groups, members) that a link tells apart from the roster.

    A list that is empty, or lacks more than a third of those known, is doubted: bridges tell such
    lists while they start, or lose their login. If it stays the same for DOUBT_SECONDS it is true.
    """

    def __init__(self) -> None:
        self.loaded = False          # it was loaded once
        self.good = False            # and the last answer was good
        self.asking = False          # the link is being asked
        self.began = 0.0             # since then
        self.answers = 0             # number of answers and failures
        self.failures = 0            # failures since the last good answer
        self._doubted: Optional[Tuple[Set[str], float]] = None  # the doubted uids, since when

    def doubt(self, known: Iterable[str], told: Iterable[str]) -> str:
        """Why a list of uids is not believed; empty if it is."""
        old, new, now = set(known), set(told), time.monotonic()
        missing = len(old - new)
        if not new or 3 * missing > len(old):
            if not self._doubted or new != self._doubted[0]:
                self._doubted = new, now
            if now - self._doubted[1] < DOUBT_SECONDS:
                return f"lacks {missing} of {len(old)}" if old else "is empty"
        self._doubted = None
        return ""


class Details:
    """Loads what a link tells only when asked: lists of friends and groups, and members of groups.
    Differences to what is known become events."""

    def __init__(self, client: Client) -> None:
        self._client, self._roster = client, client.roster
        self._list_pool = ThreadPool(2, "lists", client.log)
        self._workers = ThreadPool(4, "details", client.log)
        self._loading: Set[Tuple[str, bool]] = set()  # group, with members?
        self._doubted: Dict[str, Listing] = {}        # group -> its members, as they were told
        self.forget()

    def forget(self) -> None:
        """Begin anew: another account, with other friends and groups, is logged in."""
        self.lists = {"friend": Listing(), "group": Listing()}
        self._roster.load({"friend": [], "group": []}, self.lists, self._roster.changes)

    def kinds(self, setting: str) -> List[str]:
        """The lists that are to be loaded by the settings is_init_… or is_update_…."""
        return [kind for kind in ("friend", "group", "discuss")
                if getattr(self._client.settings, setting + kind)]

    def compare(self, row: Row, before: int) -> None:
        """Turn the differences between the roster and what the link tells now into events, except
        for what events have changed since change number `before`: that is newer."""
        client, roster = self._client, self._roster
        kinds = [kind for kind in self.kinds("is_update_") if kind in row]
        if client.settings.is_update_user and "user" in row:
            kinds.insert(0, "user")
        with client.batch():
            for kind in kinds:
                new = {one["uid"]: one for one in ([row[kind]] if kind == "user" else row[kind])
                       if not roster.is_newer(kind, one["uid"], before)}
                old = dict.fromkeys(new, roster.user) if kind == "user" else {
                    uid: thing for uid, thing in roster.table(kind).items()
                    if not roster.is_newer(kind, uid, before)}
                for item in changes_of(kind, old, new):
                    client.talk.happen(item)
            for told in row["group"] if "group" in kinds else []:
                group, count = roster.group.get(told["uid"]), told.get("member_count")
                if group:
                    group.member_count = count  # for us only: no event tells it
                    if group.loaded and count not in (None, str(len(group.member))):
                        self._workers.submit(self._load, group.uid, True)  # a notice was lost
            self.report(kinds)

    def report(self, kinds: Iterable[str]) -> None:
        """Emit update_friend and the like, for lists that were loaded."""
        for kind in kinds:
            if kind != "discuss":
                self._client.emit("update_" + kind, [
                    self._roster.user.to_json(self._roster.fields) if kind == "user"
                    else list(itertools.chain(*self._roster.rows(kind, False)))])

    # -- lists

    def is_certain(self, kind: str) -> bool:
        """Whether the list of friends, or groups, is complete."""
        return (not self._client.link.real or self.lists[kind].good
                or kind not in self.kinds("is_init_"))

    def ask(self, kind: str, anew: bool = False) -> None:
        """Have a worker ask the link for a list, unless one does so now; `anew`: after a new
        login."""
        listing = self.lists[kind]
        self._client.unplan(kind)
        if anew:
            listing.loaded = listing.good = False
        if not listing.asking:
            listing.asking, listing.began = True, self._client.timers.clock()
            self._list_pool.submit(self._fetch, kind, listing)

    def _fetch(self, kind: str, listing: Listing) -> None:
        client, roster, before = self._client, self._roster, self._roster.changes
        rows, failure = [], ""  # type: List[Row], str
        try:
            rows = client.link.list(kind)
        except Exception as error:  # it is asked again
            failure = f"cannot be had: {getattr(error, 'status', repr(error))}"
        with client.lock:
            listing.asking = False
            if client.state == "stop" or listing is not self.lists[kind]:
                return  # the latter: another account is logged in
            listing.answers += 1
            client.changed.notify_all()
            why = failure or listing.doubt(roster.table(kind), [row["uid"] for row in rows])
            listing.good = not why
            client.warn(kind, why and f"the bridge's list of {kind}s {why}; what was known stays, "
                        "and it is asked again")
            if why:
                listing.failures += bool(failure)
                wait = backoff(listing.failures + 1, LIST_SECONDS)
                client.plan(kind, wait if failure else DOUBT_SECONDS / 4, self.ask, kind)
                return
            if listing.loaded:
                self.compare({kind: rows}, before)
            else:
                roster.load({kind: rows}, [kind], before)
                if client.state == "running":
                    self.report([kind])
            listing.loaded, listing.failures = True, 0

    def look_for(self, kind: str, uid: str) -> Optional[Thing]:
        """The receiver of a message who is not in the roster; None if there is none. From any
        thread.

        A good list may be old, so the link is asked; while a list is doubted any number is
        accepted.
        """
        client, listing = self._client, self.lists.get(kind)
        if listing is None or not client.link.real or not number_of(uid):
            return None
        stranger: Thing = THINGS[kind]({"uid": uid, "id": uid, "name": uid})
        if kind == "group" and listing.good:
            try:
                row = client.link.find_group(uid)
            except Unreachable:
                return stranger  # the bridge cannot tell
            if row:
                with client.lock:
                    client.talk.happen({"event": "new_group", "object": row})
        elif listing.good:
            with client.lock:
                answers = listing.answers
                if not listing.asking:  # but not again for each caller
                    wait = listing.began + LOGIN_SECONDS - client.timers.clock()
                    client.plan(kind, max(0.0, wait), self.ask, kind)
                if not client.changed.wait_for(lambda: listing.answers != answers, DETAIL_SECONDS):
                    listing.good = False  # until the answer comes
        return self._roster.table(kind).get(uid) or (None if listing.good else stranger)

    # -- members

    def wait(self, groups: Iterable[Circle], members: bool = True) -> None:
        """Load the members of groups, or only one's role in them, within DETAIL_SECONDS. Without
        lock."""
        wanted = {(str(group.uid), members) for group in groups
                  if not group.loaded and (members or group.value("role") is None)}
        with self._client.lock:
            for job in wanted - self._loading:
                self._loading.add(job)
                self._workers.submit(self._load, *job)
            if not self._client.changed.wait_for(lambda: not wanted & self._loading,
                                                 DETAIL_SECONDS):
                self._client.log.warn("the bridge is slow to tell the members of groups")

    def _load(self, uid: str, members: bool) -> None:
        """Ask the link; again if an event changed the group meanwhile."""
        client, roster = self._client, self._roster
        try:
            while True:
                before = roster.changes
                row = client.link.details(uid, members)
                with client.lock:
                    if not roster.is_newer("group", uid, before):
                        return self._learn(uid, members, row)
        except OpenQQError as error:
            client.log.debug(f"group {uid}: {error.status}")
        finally:  # wake those who wait
            with client.lock:
                self._loading.discard((uid, members))
                client.changed.notify_all()

    def _learn(self, uid: str, members: bool, row: Row) -> None:
        client, group = self._client, self._roster.group.get(uid)
        told = {item["uid"]: item for item in row.pop("member", ())}
        if group is None:
            return
        if not (members and group.loaded):
            group.__dict__.update(row)
            if told:  # it only counts as loaded if not too many are missing
                group.member = {uid: THINGS["group_member"](item) for uid, item in told.items()}
                count = int(number_of(group.value("member_count")) or 0)
                group.loaded = 3 * len(told) >= 2 * count
        elif str(len(told)) != group.value("member_count") and self._doubted.setdefault(
                uid, Listing()).doubt(group.member, told):
            client.timers.later(DOUBT_SECONDS / 4, self._workers.submit, self._load, uid, True)
        else:
            self._doubted.pop(uid, None)
            with client.batch():
                for event in changes_of("group_member", group.member, told, circle=uid):
                    client.talk.happen(event)


class Login:
    """Logs an account in, and keeps its roster up to date.

    The link's threads call the hooks, each of which leads to a state: `_show` and `_wait` to
    scaning, `_scanned` to confirming, `_confirmed` to updating, `_lost` back there. Workers ask the
    link for a login, then for the roster, after which the client is running, and for the roster
    again every update_interval.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._workers = ThreadPool(3, "login", client.log)
        self._known = False                      # the roster is that of this login
        self._turn = 0                           # number of the login; answers to others are void
        self._claim = PidFile("")                # a lock for the account's name on the network
        self._codes = self._tries = 0
        self.network: Optional[LocalNetwork] = None  # of a client alone
        settings, log = client.settings, client.log

        def hook(act: Callable[..., None]) -> Callable[..., None]:
            def call(*args: Any) -> None:
                with client.lock:
                    if client.state != "stop":
                        act(*args)
            return call

        hooks = Hooks(qrcode=hook(self._show), waiting=hook(self._wait),
                      scanned=hook(self._scanned), confirmed=hook(self._confirmed),
                      lost=hook(self._lost), received=client.talk.receive,
                      known=client.roster.find, certain=client.details.is_certain,
                      kept=hook(self._keep), ids_path=client.files.ids_path)
        self.link: Link
        kind = link_of(settings.given)
        if kind in LINKS:
            self.link = LINKS[kind](settings, hooks, log)
            return
        if client.parent:
            host: Callable[..., Json] = functools.partial(call_host, client.parent.local,
                                                          client.parent.key)
        else:
            network = self.network = LocalNetwork(
                client.files.local_path, settings.world, client.flavour, log,
                client.public_url, lambda account: account == client.account)
            host = lambda verb, *args, **named: network.call(  # noqa: E731
                client.account, verb, args, named)
        self.link = LocalLink(host, hooks, settings.login_type == "login", settings.mode, log)

    def _cancel(self) -> None:
        """Cancel what is planned for this login or its QR code."""
        self._client.unplan("code", "refresh", "friend", "group")
        self._turn += 1
        self._client.changed.notify_all()

    def _submit(self, step: Callable[..., None], *args: Any) -> None:
        """Have a worker do a step of the login; if it fails, log in again."""
        client = self._client

        def attempt() -> None:
            try:
                step(*args)
            except NotRunning:
                pass  # we stop
            except Exception as error:
                why = str(error) or repr(error)
                with client.lock:
                    if client.state != "stop":
                        client.log.warn(f"logging in failed: {why}; trying again")
                        client.enter(client.state, why)
                        client.timers.later(backoff(self._tries, 30.0), self.begin)
                        self._tries += 1
        self._workers.submit(attempt)

    def begin(self, anew: bool = False) -> None:
        """Log in, by the cookie if there is one, or `anew`: by a new scan."""
        def log_in() -> None:
            if anew:
                self.link.logout()
            cookie = self._client.files.read_cookie().get("cookie", "")
            self.link.login(str(cookie), str(self._client.disk_queue.mark or ""))
        self._submit(log_in)

    def anew(self) -> None:
        """Log out, and begin with a new QR code."""
        client = self._client
        with client.lock:
            if client.state != "stop":
                remove_file(client.settings.cookie_path)
                client.files.write_cookie()  # its secrets stay
                self._codes = 0
                self._known = False
                self._cancel()
                self.begin(anew=True)

    def _show(self, code: Code, seconds: float, error: str) -> None:
        """Show a QR code: write the file, then tell it."""
        client, path = self._client, self._client.settings.qrcode_path
        self._codes += 1
        if self._codes > client.settings.qrcode_count_max and not self.link.real:
            client.log.error(f"nobody scanned {self._codes - 1} QR codes: giving up")
            return client.stop()
        text, picture = ("", code) if isinstance(code, bytes) else (code, qr_png(qr_matrix(code)))
        keep_file(path, picture, client.log)
        client.log.info(f"二维码已下载到本地[ {path} ] (QR code)")
        client.log.info(f"等待{client.flavour.phone}扫描二维码... (waiting for a scan: {text or path})")
        client.enter("scaning", error)
        client.qrcode_text = text
        client.emit("input_qrcode", [path, base64.encodebytes(picture).decode(),
                                     client.api_url("get_qrcode")])
        self._cancel()

        def renew() -> None:
            client.log.info("登录二维码已失效,重新获取二维码 (the code expired: a new one)")
            self.link.renew()
        if not self.link.real:
            client.plan("code", seconds, self._submit, renew)

    def _wait(self, error: str) -> None:
        """Wait for a login without a QR code."""
        client = self._client
        if (client.state, client.error) != ("scaning", error):
            self._cancel()
            self._known = False
            remove_file(client.settings.qrcode_path)
            client.log.warn(error)
            client.enter("scaning", error)

    def _scanned(self) -> None:
        if self._client.state == "scaning":
            self._client.log.info(f"{self._client.flavour.phone}扫码成功,"
                                  "请在手机上点击[登录]按钮... (scanned)")
            self._client.enter("confirming")

    def _confirmed(self, cookie: str, fresh: bool) -> None:
        client = self._client
        self._cancel()
        self._codes = 0
        client.files.write_cookie(cookie)
        client.enter("updating")
        remove_file(client.settings.qrcode_path)
        self._submit(self._learn, fresh, self._turn)

    def _keep(self, cookie: str) -> None:
        if cookie:
            self._client.files.write_cookie(cookie)
        self._client.files.write_state(self._client)  # it contains link.status()

    def _lost(self, error: str) -> None:
        """The link has lost its connection; it tries again by itself."""
        client = self._client
        client.log.warn(error)
        state = {"running": "updating", "loading": "scaning"}.get(client.state, client.state)
        if state == "updating":
            self._cancel()
        client.enter(state, error)

    def _learn(self, fresh: bool, turn: int) -> None:
        """Load the roster, then be running, after LOOKUP_SECONDS even without the lists that the
        link tells apart; when running already, compare the roster."""
        client, roster, details = self._client, self._client.roster, self._client.details
        before = roster.changes
        row = self.link.roster()
        with client.lock:
            begins = client.state == "updating"
            if not begins and client.state != "running" or turn != self._turn:
                return
            self._tries = 0
            row["user"]["state"] = client.settings.mode
            wanted = details.kinds("is_init_" if begins else "is_update_")
            if begins and roster.user.value("uid") not in (None, row["user"]["uid"]):
                self._known = False  # another account is logged in at the bridge
                client.talk.give_up()
                details.forget()
            news = fresh or not self._known
            if news:
                roster.load(row, ["user", *(kind for kind in wanted if kind in row)], before)
            else:
                details.compare(row, before)
            self._claim_account()
            for kind in wanted:
                if kind not in row:
                    details.ask(kind, anew=news)
            if begins:
                client.changed.wait_for(lambda: turn != self._turn or not any(
                    listing.asking for listing in details.lists.values()), LOOKUP_SECONDS)
                if any(listing.failures for listing in details.lists.values()):
                    # the link may be lost, which it tells a moment after its lists have failed
                    client.changed.wait_for(lambda: turn != self._turn, 1.0)
                if client.state != "updating" or turn != self._turn:
                    return  # the link was lost meanwhile
                if news:
                    details.report(["user", "friend", "group"])
                client.enter("running")
                if news:
                    client.log.info(f"帐号({client.account})登录成功 (logged in)")
                    client.emit("login", [int(fresh)])
                self._known = True
            if client.settings.update_interval:
                client.plan("refresh", max(1.0, client.settings.update_interval), self._submit,
                            self._learn, False, turn)
        if begins:
            self.link.ready()

    def _claim_account(self) -> None:
        """Warn while another client has the same account: both would answer everything."""
        client, name = self._client, self.link.account()
        claim = PidFile(client.files.claim_path.format(name))
        if not name or client.state == "stop" or claim.path == self._claim.path:
            return
        self._claim.drop()  # another account is logged in
        self._claim = claim
        try:
            claim.take(f"another client of the account {name}")
            client.warn("claim", "")
        except Refusal as refusal:
            self._claim = PidFile("")
            client.warn("claim", f"{refusal.status}: both hear and answer the same; stop one")
            client.plan("claim", LIST_SECONDS, self._claim_account)  # it may stop

    def end(self) -> None:
        """The client stops. Without the lock."""
        with self._client.lock:
            self._cancel()
        self.link.close()
        self._claim.drop()
        if self.network:
            self.network.stop()


if TYPE_CHECKING:  # a message to be sent, its row for the link, the future of its outcome
    Job = Tuple[Message, Row, Future[Message]]


class Talk:
    """The messages that an account sends and receives. Methods need the client's lock, unless they
    say otherwise. For sending there is one queue (CONTRACT 4), and one thread."""

    # Further members of documented events: not in `params`, since callbacks rely on their number.
    FACTS = {"new_group_member": ("kind", "operator_uid"),
             "lose_group_member": ("kind", "operator_uid"),
             "group_member_property_change": ("group_uid",)}
    GIVEN_UP = {"code": -3, "info": "发送异常"}

    def __init__(self, client: Client) -> None:
        self._client, self._flavour = client, client.flavour
        self._jobs: Deque[Job] = collections.deque()
        self._sender = ThreadPool(1, "send", client.log)
        self.began = 0.0                          # when the link was called; 0 while it is not
        self._rests_until = 0.0
        self._seen: Dict[str, bytes] = {}         # the newest messages by id, as JSON
        self._seen_size = 0
        self._own: List[Row] = []                 # items that may be the message being sent
        # Sent messages whose answer, the item with this mark, is still to come.
        self._answered: List[Tuple[str, Future[Message], Message]] = []
        self._expected: Dict[str, List[Future[Any]]] = {}  # uid -> those who wait for it

    # -- messages, as they are reported

    def compose(self, item: Row, origin: str = "", media: Optional[Row] = None
                ) -> Optional[Message]:
        """The message of an item of the link, or None if it is to be ignored; or, with `origin`, a
        message that is to be sent, perhaps with media that are kept."""
        client, flavour, roster = self._client, self._flavour, self._client.roster
        own, uid = item["do"] == "sent", item["uid"]
        kind = CIRCLE_OF.get(item["type"]) or (
            "discuss" if item.get("discuss") else "group" if item.get("group") else "")
        message = Message({**{name: item[name] for name in ("type", "content", "id", "time")},
                           **flavour.text_format, "circle": None, "peer_uid": uid if own or (
                               not kind or item["type"] == "sess_message") else None,
                           "answer": lambda message, text, **more: self.reply(
                               message.to_json({}), text, "code", **more)})
        circle: Any = None
        if kind:  # it may be unlisted, if the bridge could not tell its groups
            number = str(item.get(kind) or "")
            circle = roster.table(kind).get(number) or THINGS[kind](
                {"uid": number, "id": number, "name": item.get("group_name") or number})
            message.__dict__.update({
                "circle": circle, kind: circle.displayname,
                **{f"{kind}_{part}": circle.value(part) for part in flavour.parts[kind]}})
        if message.type == "sess_message":
            message.via = kind
        thing: Any = roster.friend.get(uid)
        member = circle.member.get(uid) if circle else None
        if member and not (thing and thing.markname):  # it has priority over a card (CONTRACT 6)
            thing = member
        if own:
            self._name(message, "sender", roster.user, {})
            message.__dict__.update({
                "class": "send", "post_type": "send_message", "from": origin or "none",
                "source": "local" if origin else "outer", "ttl": client.settings.msg_ttl,
                "code": 0, "info": "发送正常", "msg": flavour.sent["status"]})
            if uid is not None:
                self._name(message, "receiver", thing, {"uid": uid})
        else:
            if thing is None and "sender" in item and (
                    circle and not circle.loaded or not client.is_certain("friend")):
                thing = THINGS["group_member" if circle else "friend"](item["sender"])
            if thing is None and client.settings.ignore_unknown_id:
                return None
            message.__dict__.update({"class": "recv", "post_type": "receive_message"})
            self._name(message, "receiver", roster.user, {})
            self._name(message, "sender", thing, {**item, "id": item.get("sender_id")})
        if item.get("media"):
            self._add_media(message, item["media"], media)
        if item.get("links"):
            message.media = [{**link, "url": link["url"] or (client.api_url(
                "get_media", id=f"{item['id']}.{number}") if link.get("file_id") else None)}
                for number, link in enumerate(item["links"])]
        if "raw_message" in item:
            message.raw_message = item["raw_message"]
        for name, nothing in ("reply_to", None), ("at", []):
            if item.get(name) or not origin:
                setattr(message, name, item.get(name) or nothing)
        if not origin:
            message.at_me = int(str(roster.user.uid) in message.at)
        return message

    def _name(self, message: Message, role: str, thing: Optional[Thing], row: Row) -> None:
        """Set the members for sender or receiver; `row` has those of somebody unknown."""
        message.__dict__.update({
            role: thing.displayname if thing else row.get("name"), role + "_thing": thing,
            **{f"{role}_{part}": thing.value(part) if thing else row.get(part)
               for part in self._flavour.parts[role]}})

    def _add_media(self, message: Message, picture: Row, media: Optional[Row]) -> None:
        """Set the members for a picture: `media` that are kept, or one that came, which may be put
        there."""
        if media is None:
            data, name = base64.b64decode(picture["data"]), str(picture["name"])
            media = unkept_media(data, name)
            if self._client.settings.download_media:
                try:
                    media = self._client.files.media_store.put(data, name)
                except OSError as error:
                    self._client.log.warn(f"a picture could not be kept: {error}")
        kind, key = media["media_mime"].partition("/")[0], media["media_id"]
        label = {"image": "[图片]", "audio": "[语音]", "video": "[视频]"}.get(kind, "[文件]")
        message.content = self._flavour.media_content.format(
            content=message.content, label=label,
            either=message.content or f"[media]({media['media_path'] or media['media_name']})")
        url = self._client.api_url("get_media", id=key) if key else media.get("url")
        shown = {**media, "format": "media", "media_data": picture["data"], "media": [{
            "type": kind, "url": url, "name": media["media_name"], "size": media["media_size"]}]}
        message.__dict__.update({name: shown[name] for name in self._flavour.media_members})

    def _report(self, message: Message, mark: str = "") -> None:
        """Tell a message to everybody, and keep it for get_message, but no bytes of pictures."""
        row = message.to_json({})
        if row["id"] is not None:
            data = to_bytes({**row, "media_data": None} if row.get("media_data") else row)
            self._seen_size += len(data) - len(self._seen.pop(row["id"], b""))
            self._seen[row["id"]] = data
            while len(self._seen) > WAIT_LIMIT or self._seen_size > SEEN_BYTES:
                self._seen_size -= len(self._seen.pop(next(iter(self._seen))))
        self._client.tell(message.post_type, row, message.conversation(), [message], mark)

    def remembered(self, id: str) -> Optional[Row]:
        """One of the newest messages, as it was reported. From any thread."""
        row = object_in(self._seen.get(id, b""))
        if row and row.get("media_path") and row["media_data"] is None:
            row["media_data"] = base64.b64encode(read_file(row["media_path"]) or b"").decode()
        return row

    # -- saying

    def waiting(self) -> int:
        """How many messages have not been tried yet."""
        return len(self._jobs)

    def is_full(self) -> bool:
        """Whether so many messages wait that no more are taken."""
        return len(self._jobs) >= int(self._client.settings.send_queue_max_size)

    def send(self, type: str, content: str, uid: Optional[str] = None, circle: str = "",
             origin: str = "api", via: str = "", media: Optional[Row] = None, cq: bool = False,
             reply_to: Optional[str] = None, at: Sequence[str] = ()) -> Future[Message]:
        """Queue a message to a uid, or to a group or discuss (`circle`, its uid). From any thread.

        `type` is a message's type, `via` group or discuss for a sess_message, `media` a row of the
        client's media store; with `cq` a bridge reads CQ codes in `content`; `reply_to` is the id
        of a message that is quoted, `at` the uids of those who are mentioned, or all. The future
        brings the Message, with id, code, info and msg set; a failed one has no id.
        """
        client, future = self._client, Future()  # type: Client, Future[Message]
        kind = CIRCLE_OF.get(type, via)
        row: Row = {"type": type, "content": content, "uid": uid, kind or "group": circle or None,
                    "cq": cq, "reply_to": reply_to, "at": [] if uid else list(at)}
        if media:
            row["media"] = {"name": media["media_name"], "mime": media["media_mime"],
                            "url": media.get("url"), "path": media.get("path"),
                            "data": media.get("data") or base64.b64encode(
                                read_file(media["media_path"] or "") or b"").decode()}
        with client.lock:
            if client.state != "running":
                future.set_exception(NotRunning(state=client.state))
                return future
            message = self.compose({**row, "do": "sent", "id": None, "time": str(int(
                time.time()))}, origin, media)
            assert message
            job = message, row, future
            if not is_sendable(message.content):
                self._sent([(job, {"code": -1, "info": "数据格式错误"})])
                return future
            if not self.began:  # else the sender takes it by itself; it may have had no thread
                self._sender.submit(self._work)
            self._jobs.append(job)
        return future

    def reply(self, row: Row, text: str, origin: str, media: Optional[Row] = None,
              **more: Any) -> None:
        """Send text, or media, to where a message (as JSON) came from or went to; `more`:
        send()."""
        if self.is_full():
            return self._client.log.warn("send queue full: a reply is not sent")
        uid = row.get("receiver_uid" if row["class"] == "send" else "sender_uid")
        kind = CIRCLE_OF.get(row["type"], str(row.get("via") or ""))
        circle = str(row["group_uid"]) if kind == "group" else ""
        if kind == "discuss":  # messages have no uid of it, but the id, which changes with a scan
            found = self._client.roster.search(kind, {"id": str(row["discuss_id"])})
            circle = str(found[0].uid) if found else ""
        alone = row["type"] in ("friend_message", "sess_message")
        self.send(row["type"], text, str(uid) if alone else None, circle, origin,
                  kind if alone else "", media, **more)

    def give_up(self) -> int:
        """Report all waiting messages as failed; returns their number."""
        jobs, self._jobs = self._jobs, collections.deque()
        self._sent([(job, self.GIVEN_UP) for job in jobs])
        return len(jobs)

    def _work(self) -> None:
        client, link, clock = self._client, self._client.link, self._client.timers.clock
        given: Optional[float] = client.settings.send_interval
        interval = link.send_interval if given is None else given
        while True:
            batch: List[Job] = []
            size, pause = 0, 0.0
            with client.lock:
                while self._jobs and clock() < self._rests_until:
                    client.changed.wait(self._rests_until - clock())
                jobs = self._jobs
                while jobs and len(batch) < (1 if interval else link.batch):
                    size += weight(jobs[0][1])
                    if batch and size > BATCH_LIMIT:
                        break
                    batch.append(jobs.popleft())
                if not batch:
                    return
                self.began = began = clock()
            try:
                results = link.send([row for _, row, _ in batch])
            except Exception as error:  # the queue must go on
                why = f"响应未知: {getattr(error, 'status', repr(error))}"
                results = [{"code": -4, "info": why}] * len(batch)
                if not getattr(error, "sent", True):  # until the tries are used up
                    results = [{"code": -5, "info": "TTL失效"}] * len(batch)
                    pause = clock() + backoff(client.settings.msg_ttl - batch[0][0].ttl)
                    for message, _, _ in batch:
                        message.ttl -= 1
            with client.lock:
                self.began, self._rests_until = 0.0, max(began + interval, pause)
                again = [job for job in batch if job[0].ttl > 0] if pause else []
                jobs.extendleft(reversed(again))  # no effect if give_up() was called meanwhile
                try:
                    self._sent([(job, result) for job, result in zip(batch, results)
                                if job not in again])
                    if jobs is not self._jobs:
                        self._sent([(job, self.GIVEN_UP) for job in again])
                except Exception:
                    client.log.failure("the outcome of a message")
                client.changed.notify_all()

    def _sent(self, outcomes: List[Tuple[Job, Row]]) -> None:
        """Report the outcome of messages. Those who wait for it get it when everything is on disk,
        also an answer that came at once."""
        with self._client.batch():
            for (message, _, _), result in outcomes:
                message.id, message.code = result.get("id"), result["code"]
                message.info = result["info"]
                if message.code:
                    message.msg = self._flavour.not_sent
                self._report(message)
            if self._own and not self.began:
                self._hear_own()
        for (message, _, future), result in outcomes:
            mark = result.get("mark", "")
            if mark and not self._is_old(mark):
                self._answered.append((mark, future, message))
                self._client.timers.later(ECHO_SECONDS, settle, future, message)
            else:
                settle(future, message)

    # -- hearing

    def receive(self, items: List[Row]) -> str:
        """Take items of the link; returns the mark of the last one that is on disk. NotRunning.
        Called by the link's thread. While a message is being sent it waits for the outcome, so that
        an answer is reported after the message that it answers."""
        client = self._client
        with client.lock:
            began = self.began
            if began:  # an item "sent" may be this message: its id is known after the send
                own = [item for item in items if item["do"] == "sent"]
                items = [item for item in items if item["do"] != "sent"]
                if own and not self._own:
                    client.plan("own", BRIDGE_SECONDS, self._hear_own)
                self._own += own
                if client.link.echoes:
                    left = began + ECHO_SECONDS - client.timers.clock()
                    client.changed.wait_for(lambda: self.began != began, max(0.0, left))
            if client.ended:
                raise NotRunning("stopping")
            with client.batch():
                for item in items:
                    mark = item["mark"]
                    if self._is_old(mark):
                        continue
                    try:
                        if item["do"] != "event":
                            self._hear(item, mark)
                        elif not self.happen(item, mark):
                            client.disk_queue.advance(mark)
                    except Exception:  # the other items go on
                        client.log.failure("an item of the link")
                        client.disk_queue.advance(mark)
            for mark, future, message in self._answered:
                if self._is_old(mark):
                    settle(future, message)
            self._answered = [entry for entry in self._answered if not entry[1].done()]
            return str(client.disk_queue.mark)

    def _is_old(self, mark: str) -> bool:
        """Whether an item came before: its acknowledgement was lost with a connection."""
        era, _, number = mark.partition(":")
        old_era, _, old_number = str(self._client.disk_queue.mark or "").partition(":")
        return era == old_era and int(number) <= int(old_number)

    def _hear_own(self) -> None:
        """Take the items that came while a message was being sent."""
        self._client.unplan("own")
        own, self._own = self._own, []
        with self._client.batch():
            for item in own:
                self._hear(item, "")

    def _hear(self, item: Row, mark: str) -> None:
        """Take a message that came, or that the account sent from another device."""
        client, own = self._client, item["do"] == "sent"
        message = None if own and item["id"] in self._seen else self.compose(item)
        if message is None:
            return client.disk_queue.advance(mark or None)
        for future in self._expected.pop(item["uid"], []) if not own and not message.circle else []:
            settle(future, message.content)
        self._report(message, mark)

    def happen(self, item: Row, mark: str = "") -> bool:
        """Apply an event of the link to the roster, and report it; False if nothing changed."""
        found = self._client.roster.apply(item)
        if item.get("quiet") or found is None:
            return False
        facts = {name: item.get("circle" if name == "group_uid" else name)
                 for name in self.FACTS.get(found[0], ())}
        self._client.emit(*found, mark, item.get("time"), facts)
        for future in self._expected.pop("group/" + str(item.get("object", {}).get("uid")), []):
            settle(future, found[1][0])
        return True

    def expect_group(self, uid: str) -> Future[Circle]:
        """A future of a group that was just founded: when the roster has it. From any thread."""
        with self._client.lock:
            future: Future[Circle] = self.expect("group/" + uid)
            if uid in self._client.roster.group:
                settle(future, self._client.roster.group[uid])
        return future

    def expect(self, uid: str) -> Future[Any]:
        """A future of the text of the next message from a friend. From any thread."""
        future: Future[Any] = Future()
        with self._client.lock:
            waiting = [one for one in self._expected.get(uid, []) if not one.cancelled()]
            self._expected[uid] = [*waiting, future]
        return future


class Client:
    """One account: its states, its roster, its messages; with the public methods of Mojo::Webqq.

    Settings are given as keyword arguments, else taken from the environment. run() blocks; the
    methods may be called from any thread. Refusal if it cannot start.
    """

    def __init__(self, **given: Any) -> None:
        self.flavour = flavour_named(given.get("flavor"))
        self.parent = parent = Parent.find()
        try:
            self.settings = Settings("client", given, os.environ, self.flavour.environ)
            self.account = check_name(self.settings.account)
        except (ValueError, NotAllowed) as error:
            raise Refusal(str(error), 2) from None
        self.settings.fill(tmpdir=check_tmpdir(self.settings.tmpdir))
        self.log = open_log(self.settings, f"[{self.account}][{os.getpid()}]")
        if parent:  # check_client shows the last warnings of a client that died
            self.log.keep = lambda text: parent.tell(log=text[-1000:])
        self.files = ClientFiles(self.settings, self.flavour, self.log)
        self.files.pid.take(f"client {self.account}")
        for path in self.settings.cookie_path, self.settings.state_path, self.settings.qrcode_path:
            remove_leftovers(path)
        self.files.share_secrets()
        self.start_time = int(time.time())
        # The lock guards all fields that change from here on, the roster, the queues, the posters
        # of outlets, and the fields of Login, Details and Talk. Whoever holds it does not wait for
        # a network, and does not call the local one.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # notified when something may be waited for
        self.timers = Timers(self.lock, self.log)
        self.state = self.previous_state = self.error = self.qrcode_text = ""
        self.warnings: Dict[str, str] = {}           # subject -> present trouble
        self.since = 0.0                             # in this state
        self.port = 0                                # of the API, once it is there
        self.ended = self._hurries = False
        self.roster = Roster(self.flavour.fields, self.lock)
        self.disk_queue = DiskQueue(self.files.spool_path, POST_QUEUE_LIMIT, self.log)
        self.outlets: List[Outlet] = []
        self.plugins: List[Plugin] = []
        self.closing: List[Callable[[], Any]] = []   # called at the end; True: wait a moment
        self._callbacks: Dict[str, List[Callable[..., Any]]] = {}
        self._pool = ThreadPool(1, "callbacks", self.log)
        self._batches = 0                            # batch() within batch()
        self._plans: Dict[str, Callable[[], None]] = {}  # name of a plan() -> what cancels it
        self.details = Details(self)
        self.look_for, self.is_certain = self.details.look_for, self.details.is_certain
        self.talk = Talk(self)
        self.send = self.talk.send                   # the four methods below call it
        self._login = Login(self)
        self.link = self._login.link
        self.enter("init")

    # -- the public face

    def on(self, event: str, callback: Callable[..., Any]) -> None:
        """Have callback(client, *params) called for an event, for receive_message and send_message
        callback(client, message); all in one thread of their own."""
        self._callbacks.setdefault(event, []).append(callback)

    def load(self, names: Any, data: Optional[Row] = None, call_on_load: bool = False) -> None:
        """Load a plugin, or a list of them: a built-in one by name, `+name` for a module of
        sys.path, a module with call(client, data), or such a function itself.

        With call_on_load it is called now, else when run() begins. Refusal if there is none.
        """
        for name in names if isinstance(names, (list, tuple)) else [names]:
            plugin = Plugin(name, data or {}, call_on_load)
            self.plugins.append(plugin)
            if call_on_load:
                self.timers.catch_signals(self._signalled)  # it may serve from now on
                self._call_plugin(plugin)

    def _call_plugin(self, plugin: Plugin) -> None:
        try:
            plugin.call(self, plugin.data)
        except BaseException:
            self.files.pid.drop()
            raise

    def run(self) -> int:
        """Log in and work until stop(); returns the exit status."""
        self.timers.catch_signals(self._signalled)
        if self.parent:
            self.timers.watch(self.parent.life, self._orphaned)
        with self.lock:
            if self.state != "stop":
                self.enter("loading")
        for plugin in sorted(self.plugins, key=lambda plugin: -plugin.priority):
            if not plugin.call_on_load:
                self._call_plugin(plugin)
        with self.lock:
            if self.state != "stop":
                for outlet in self.outlets:
                    outlet.poster.flush()  # what a former process left
                self._login.begin()
        self.timers.run()
        return 0

    def take_listener(self) -> Optional[socket.socket]:
        """The listening socket from the controller, once; else None."""
        if not self.parent:
            return None
        listener, self.parent.listener = self.parent.listener, None
        return listener

    def local_pages(self) -> Optional[LocalPages]:
        """The pages under /local/, if this client hosts the network."""
        return LocalPages(self._login.network) if self._login.network else None

    def stop(self) -> None:
        """End: report it, give the queue some time, remove pid file and QR code."""
        with self.lock:
            if self.state == "stop":
                return
            self.log.info("客户端停止运行 (stopping)")
            self.enter("stop")
            unsent = self.talk.give_up()
            if unsent:
                self.log.warn(f"{unsent} message(s) waited to be sent, and were not")
            self.emit("stop", [])
            try:
                spawn(self._wind_up, name="stop")
            except RuntimeError:  # there is no thread to be had
                self._wind_up()

    def relogin(self) -> None:
        """Log out, and show a new QR code."""
        self._login.anew()

    def send_friend_message(self, friend: Thing, content: str, **more: Any) -> Future[Message]:
        """Queue a message to a friend; `more` (reply_to, at, cq) as in Talk.send()."""
        return self.send("friend_message", content, friend.uid, origin="code", **more)

    def send_group_message(self, group: Circle, content: str, **more: Any) -> Future[Message]:
        """Queue a message to a group."""
        return self.send("group_message", content, circle=group.uid, origin="code", **more)

    def send_discuss_message(self, discuss: Circle, content: str, **more: Any) -> Future[Message]:
        """Queue a message to a discuss."""
        return self.send("discuss_message", content, circle=discuss.uid, origin="code", **more)

    def send_sess_message(self, member: Thing, circle: Circle, content: str) -> Future[Message]:
        """Queue a temporary session's message to a member of a group or discuss."""
        return self.send("sess_message", content, member.uid, circle.uid, "code", circle.kind)

    def public_url(self) -> str:
        """The URL of this server, or of its controller, for others."""
        return self.settings.public_url or f"http://127.0.0.1:{self.port}"

    def api_url(self, api: str, **params: str) -> str:
        """The URL of a call of the API for this account, for others."""
        if self.parent:
            params["client"] = self.account
        query = "?" + urllib.parse.urlencode(params) if params else ""
        return f"{self.public_url()}{self.flavour.prefix}{api}{query}"

    # -- the state, with the lock held

    def plan(self, what: str, seconds: float, act: Callable[..., None], *args: Any) -> None:
        """Call something later, instead of what was planned under the same name."""
        self.unplan(what)
        self._plans[what] = self.timers.later(seconds, act, *args)

    def unplan(self, *names: str) -> None:
        """Cancel plans."""
        for name in names:
            if name in self._plans:
                self._plans.pop(name)()

    def enter(self, state: str, error: str = "") -> None:
        """Change the state (only here): first in the file, then tell it."""
        if (state, error) == (self.state, self.error):
            return
        changes, self.error = state != self.state, error
        if changes:
            assert state in NEXT_STATES[self.state], f"{self.state} -> {state}"
            self.previous_state, self.state, self.since = self.state, state, time.time()
        self.files.write_state(self)
        if changes and self.parent:
            self.parent.tell(state=state)
        if changes and self.previous_state:
            self.emit("state_change", [self.previous_state, state])

    def warn(self, about: str, text: str) -> None:
        """Show a trouble in the log and in check_client; without a text it is over."""
        if text == self.warnings.get(about, ""):
            return
        if text:
            self.warnings[about] = text
            self.log.warn(text)
        else:
            del self.warnings[about]
        self.files.write_state(self)

    def _signalled(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and not os.isatty(0):
            self.log.warn("INT without a terminal is ignored; TERM stops this client")
        elif self.state == "stop":
            self._hurries = True  # it is the second one
            self.changed.notify_all()
        else:
            self.log.info(f"捕获到停止信号[{name[3:]}],准备停止... (signal)")
            self.stop()

    def _orphaned(self) -> None:
        parent = self.parent
        if parent and has_ended(parent.life):
            self.timers.unwatch(parent.life)
            self.parent = None
            self.log.warn("the controller is gone, or ends us: stopping")
            self.stop()

    def _wind_up(self) -> None:
        """In a thread of its own: wait a moment for what is to be posted, then for what is being
        posted, which would come twice without its answer. The rest waits for the next start."""
        with self.lock:
            posters = [outlet.poster for outlet in self.outlets]
            for poster in posters:
                poster.drain(self.changed.notify_all)
            self.changed.wait_for(lambda: self._hurries or not any(
                poster.waiting() for poster in posters), STOP_SECONDS)
            for poster in posters:
                poster.hold()
            self.changed.wait_for(lambda: self._hurries or not any(
                poster.flying() for poster in posters), 1.5)
            self.ended = True
            self.disk_queue.close()
        busy = [close() for close in self.closing]
        self._login.end()
        remove_file(self.settings.qrcode_path)
        self.files.pid.drop()
        self.timers.later(READ_SECONDS if any(busy) else 0.0, self.timers.stop)

    # -- events, with the lock held

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """All that is told within it is written to disk at its end, and then posted."""
        self._batches += 1
        try:
            yield
        finally:
            self._batches -= 1
            if not self._batches:
                self.disk_queue.flush()
                for outlet in self.outlets:
                    outlet.poster.flush()
                if self.parent:
                    self.parent.flush()

    def emit(self, event: str, params: List[Any], mark: str = "",
             when: Optional[str] = None, facts: Mapping[str, Json] = {}) -> None:
        """Tell an event to everybody; with mark and time of its source, and `facts` as members."""
        fields = self.flavour.fields
        shown = [thing.to_json(fields) if isinstance(thing, Thing) else thing for thing in params]
        if params and isinstance(params[0], Circle):
            shown[0] = params[0].full_json(fields)
        self.tell(event, {**event_row(event, shown, when), **facts}, "", params, mark)

    def tell(self, event: str, row: Row, conversation: str, params: List[Any], mark: str) -> None:
        """Tell `row` to everybody, in order within a conversation."""
        with self.batch():
            taken = [outlet.put(event, row, conversation, mark) for outlet in self.outlets]
            if mark and not any(taken):
                self.disk_queue.advance(mark)
            for callback in self._callbacks.get(event, ()):
                self._pool.submit(self._call_back, event, callback, params)

    def _call_back(self, event: str, callback: Callable[..., Any], params: List[Any]) -> None:
        try:
            callback(self, *params)
        except Exception:
            self.log.error(f"a callback of {event} failed:\n" + traceback.format_exc().rstrip())


# ------------------------------------------------------------------------------------------------
# 13. Plugins
# ------------------------------------------------------------------------------------------------

def show_msg(client: Client, data: Row) -> None:
    """ShowMsg: logs every message, in the form that tools parse (CONTRACT 9)."""
    def write(client: Client, message: Message) -> None:
        kind = message.type if message.value("via") != "discuss" else message.type + "/discuss"
        fields = message.to_json({})
        circle = fields.get("group") or fields.get("discuss")
        if fields["class"] == "send":
            who = f"我->{fields.get('receiver') or circle} : "
            failed = "" if message.code == 0 else f"[{message.msg}({message.info})]"
        else:
            thing = message.sender_thing
            category = thing.value("category") or "我的好友" if thing else "陌生人"
            who, failed = f"{message.sender}|{circle or category} : ", ""
        who = CONTROLS.sub(" ", who).replace("\n", " ")
        client.log.msg(client.flavour.titles[kind], who, message.content + failed)

    client.on("receive_message", write)
    client.on("send_message", write)


def upload_qrcode(client: Client, data: Row) -> None:
    """UploadQRcode: logs the URL of the picture; nothing needs to be uploaded."""
    client.on("input_qrcode", lambda client, path, picture, url: client.log.info(
        f"二维码图片地址[ {url} ]"))


def show_qrcode(client: Client, data: Row) -> None:
    """ShowQRcode: draws the code on a terminal."""
    if is_console(sys.stderr):
        client.on("input_qrcode", lambda client, *params: write_stderr(
            qr_text(qr_matrix(client.qrcode_text)).encode()) if client.qrcode_text else None)


def avatar(uid: str) -> bytes:
    """A small PNG made from the uid: a symmetric pattern of 5 by 5."""
    bits = zlib.crc32(uid.encode())
    rows = [bytearray(bits >> (3 * y + min(x, 4 - x)) & 1 for x in range(5)) for y in range(5)]
    return qr_png(rows, scale=16, quiet=1)


def wait_for(request: Request, future: Future[Any], seconds: float) -> Any:
    """The result of a future; the caller is only watched after 1 s. TimeoutError."""
    try:
        return result_of(future, min(1.0, seconds))
    except TimeoutError:
        if future.done():
            raise
        return request.wait(future, max(0.0, seconds - 1.0))


class Media:
    """The pictures that callers give: as a path, in base64, as a URL."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def take(self, params: Params, keep: bool = False) -> Optional[Row]:
        """The media store's row of the picture in the parameters, or None. If it cannot be kept its
        bytes are in `data`; with `keep` that is NoRoom. BadRequest, NotAllowed."""
        media_store = self.client.files.media_store
        if params.get("media_id"):
            row = media_store.get(params["media_id"])
            if row is None:
                raise BadRequest(400, "media_id not found")
            return row
        name = next(filter(params.get, ("media_path", "media_data", "media_url")), "")
        if not name:
            return None
        given, path, title = params[name], None, "picture"
        chosen = params.get("media_name")
        if name == "media_data":
            try:
                data = base64.b64decode(re.sub(r"\s", "", given), validate=True)
            except ValueError:
                raise BadRequest(400, "media_data is not base64") from None
        elif name == "media_url" or is_url(given):  # 001 has URLs in media_path, too
            try:
                fetched = self.client.link.fetches and not self.leads_here(given)
                data = b"" if fetched else self.read_url(given)
            except Unreachable as error:
                raise BadRequest(400, f"{name}: {error.status}") from None
            title = urllib.parse.urlsplit(given).path.rpartition("/")[2] or title
            if fetched:  # by the bridge
                row = unkept_media(data, chosen or title)
                if row["media_mime"].partition("/")[0] not in SEGMENTS:
                    row["media_mime"] = "image/jpeg"
                return {**row, "url": given, "media_size": None}
        else:
            data, path = self.read_path(given), os.path.realpath(given)
            title = os.path.basename(path)
        if len(data) > MEDIA_LIMIT:
            raise BadRequest(400, f"{name} over {MEDIA_LIMIT} bytes")
        title = chosen or params.get(name + ".filename") or title
        try:
            return {**media_store.put(data, title), "path": path}
        except OSError as error:
            self.client.log.warn(f"a picture could not be kept: {error}")
            if keep:
                raise NoRoom(f"the picture cannot be kept: {error.strerror}") from None
            return {**unkept_media(data, title), "data": base64.b64encode(data).decode(),
                    "path": path}

    def leads_here(self, url: str) -> bool:
        """Whether a URL leads to this machine, so that a bridge, whose requests have no MEDIA_MARK,
        must not fetch it. Unreachable."""
        try:
            host = origin_of(url)[1].rstrip(".")
        except ValueError as error:
            raise Unreachable(str(error)) from None
        # Others may read a backslash, a blank, or a percent sign in the host in another way.
        if re.search(r"[\\\s\x00-\x1f\x7f]", url) or not re.fullmatch("[A-Za-z0-9_.:-]+", host):
            raise Unreachable("a URL that could be read in two ways (other letters as xn--)")
        addresses = addresses_of(host)
        # For browsers and bridges a host that ends in a number is an address.
        if not addresses and re.fullmatch("[0-9]+|0[xX][0-9A-Fa-f]*", host.rpartition(".")[2]):
            raise Unreachable("a host that could be read in two ways")
        if any(map(is_forbidden, addresses)):
            raise Unreachable("link-local and metadata addresses are not called")
        return is_loopback(host) or any(map(is_own, addresses))

    def check_address(self, url: str) -> None:
        """BadRequest for a URL that a bridge would fetch and that leads to this program."""
        try:
            if self.client.link.fetches and self.leads_here(url):
                self.read_url(url)  # an error for us is one for the bridge
        except Unreachable as error:
            raise BadRequest(400, f"an address in a CQ code: {error.status}") from None

    def read_path(self, path: str) -> bytes:
        """A file in tmpdir; of this program's own files only media. NotAllowed, BadRequest."""
        settings = self.client.settings
        media = re.escape(f"{self.client.flavour.file_prefix}media_{self.client.account}_")
        try:
            check_path("media_path", path, settings.tmpdir, media + MediaStore.NAME.pattern,
                       (settings.cookie_path, settings.state_path, settings.pid_path,
                        settings.log_path))
            data = read_file(path, MEDIA_LIMIT)
        except NotAllowed as error:
            raise NotAllowed(f"{error.status}: put the file into {settings.tmpdir}, "
                             "or give media_data or media_url") from None
        except OSError:
            raise BadRequest(400, f"media_path over {MEDIA_LIMIT} bytes") from None
        if not data:
            raise BadRequest(400, "media_path cannot be read")
        return data

    def read_url(self, url: str) -> bytes:
        """A picture from a URL, but not from this program (MEDIA_MARK). Unreachable."""
        until = time.monotonic() + 30.0
        for _ in range(1 + 5):
            reply = fetch(url, fields={MEDIA_MARK: "1", "User-Agent": "openqq/" + VERSION},
                          seconds=max(0.1, until - time.monotonic()))
            url = redirect_of(url, reply)
            data = reply.read(MEDIA_LIMIT + 1)
            if not url:
                if reply.status != 200 or not data:
                    raise Unreachable(f"the server answers {reply.status}")
                return data
        raise Unreachable("over 5 redirects")


class Answers:
    """Does what a receiver of events asks for in its answer (003). A thread pool does what may take
    long, such as loading pictures."""

    MEDIA_LIMIT = 20             # pictures in one answer

    def __init__(self, client: Client, media: Media, post_api: str) -> None:
        self._client, self._media = client, media
        self._shares_files = is_loopback(urllib.parse.urlsplit(post_api).hostname or "")
        self._pool = ThreadPool(4, "media", client.log)

    def typing(self, row: Row, on: bool) -> None:
        """Show the writer of a message that an answer is being written, or no longer."""
        if row.get("class") == "recv" and row["type"] == "friend_message":
            self._client.link.typing(str(row["sender_uid"]), on)

    def answered(self, row: Row, answer: Row) -> None:
        """Do what it says (001, 003; names as in OneBot's quick operations), to a message: reply,
        with at_sender, quote, cq; media; to one that came also delete, kick, shutup or ban. To a
        request: approve, with reason."""
        if row["post_type"] == "event":
            if row["event"] in ("friend_request", "group_request") and "approve" in answer:
                verb, text = ("answer_request", "") if row["event"] == "friend_request" else (
                    "answer_group_request", self._text(answer, "reason"))
                self._do(verb, str(row["params"][0].get("ticket")),
                         self._is_set(answer, "approve"), text)
            return
        received, group = row["class"] == "recv", str(row.get("group_uid") or "")
        sender, text = str(row.get("sender_uid") or ""), self._text(answer, "reply")
        if text:
            more: Row = {"cq": self._is_set(answer, "cq")}
            if self._is_set(answer, "quote"):
                more["reply_to"] = row["id"]
            if self._is_set(answer, "at_sender") and received and sender:
                more["at"] = [sender]
            try:
                if more["cq"]:
                    check_sources(text, self._media.check_address)
                self._client.talk.reply(row, text, "api", **more)
            except OpenQQError as error:
                self._client.log.warn(f"reply in an answer of post_api: {error.status}")
        if answer.get("media"):
            self._pool.submit(self._send_media, row, answer["media"])
        if received and self._is_set(answer, "delete"):
            self._do("revoke", row["id"])
        if received and row["type"] == "group_message" and sender:
            for flag, length in ("shutup", "shutup_time"), ("ban", "ban_duration"):
                if self._is_set(answer, flag):
                    seconds = str(answer.get(length, 60))
                    if not re.fullmatch("[0-9]{1,9}", seconds):
                        self._warn(length, "a number of seconds")
                        seconds = "60"
                    self._do("mute", group, [sender], max(60, int(seconds)))
            if self._is_set(answer, "kick"):
                self._do("kick", group, [sender])

    def _warn(self, name: str, wanted: str) -> None:
        self._client.log.warn(f"{name} in an answer of post_api must be {wanted}")

    def _is_set(self, answer: Row, name: str) -> bool:
        """Whether a flag is 1, "1" or true."""
        value = answer.get(name)
        if value not in (None, 0, 1, "0", "1"):  # True is 1
            self._warn(name, "0 or 1")
        return value in (1, "1")

    def _text(self, answer: Row, name: str) -> str:
        value = answer.get(name)
        if isinstance(value, (bool, list, dict)):
            if value is not False:
                self._warn(name, "text")
            return ""
        return scalar(value) or ""

    def _do(self, verb: str, *args: Any) -> None:
        """Have a thread call the link; nobody waits for it."""
        def do() -> None:
            why = "no right to it, or it is too late"
            try:
                done = getattr(self._client.link, verb)(*args)
            except OpenQQError as error:
                done, why = False, error.status
            if not done:
                self._client.log.warn(f"{verb} {args[0]}, as an answer of post_api wants it, "
                                      f"failed: {why}")
        self._pool.submit(do)

    def _send_media(self, row: Row, media: Json) -> None:
        """Send media one after the other, after the reply."""
        items = media if isinstance(media, list) else [media]
        if len(items) > self.MEDIA_LIMIT:
            self._client.log.warn(f"{len(items)} media in an answer of post_api: the first "
                                  f"{self.MEDIA_LIMIT} are sent")
        for item in items[:self.MEDIA_LIMIT]:
            try:
                taken = self._media.take(self._named(item))
                if taken is None:
                    raise BadRequest(400, "it is empty")
                self._client.talk.reply(row, "", "api", taken)
            except OpenQQError as error:
                self._client.log.warn(f"media in an answer of post_api: {error.status}")

    def _named(self, item: Json) -> Params:
        """An item as the parameter that a caller would give. BadRequest, NotAllowed."""
        if not isinstance(item, str):
            raise BadRequest(400, "it must be text, or a list of texts")
        if "\0" in _whole_text("media", item):
            raise BadRequest(400, "NUL in media")
        if is_url(item):
            return {"media_url": item}
        if item.startswith("base64://"):
            return {"media_data": item[len("base64://"):]}
        if not self._shares_files:
            raise NotAllowed("a path not allowed, since post_api is on another machine: "
                             "give http://… or base64://…")
        return {"media_path": item}


class Api:
    """The API of a client. A row NAME of VERBS is done by the method do_NAME, by the one that
    `does` names, or, with `link`, by the link; the row has the answers for True and False."""

    FLAGS = ("accept", "enable")  # parameters that are true unless they are 0
    NOT_FOUND = {"code": 100, "status": "object not found"}
    FAILURE = {"code": 201, "status": "failure"}

    def __init__(self, client: Client, store: EventStore, numeric: bool) -> None:
        self.client, self.store, self.numeric = client, store, numeric
        self.flavour, self.media = client.flavour, Media(client)
        self._looking = threading.Lock()     # guards _looked
        self._looked = 0.0                   # until then the present states are known

    def handler(self, verb: Verb) -> Callable[[Request], Any]:
        """The handler of the route for a row of VERBS."""
        name, *args = ["act", verb.link] if verb.link else verb.does.split() or [verb.name]
        act = functools.partial(getattr(self, "do_" + name), *args)

        def handle(request: Request) -> Any:
            if not verb.any_state and self.client.state != "running":
                raise NotRunning(state=self.client.state)
            if not verb.any_state and verb.name in self.client.link.lacks:
                return Response(b"", "", 503) if verb.gives == "image" else {
                    "code": 201, "status": "not with this link"}
            done = act(request)
            if not isinstance(done, bool):
                return done
            code, _, status = (verb.yes if done else verb.no).partition(" ")
            return {**{name: request.params.get(name) for name in verb.echo.split()},
                    "code": int(code), "status": status}
        return handle

    # -- who is meant

    def show(self, value: Json) -> Json:
        """An answer, with ids as numbers if numeric_ids is set."""
        return numbered(value) if self.numeric else value

    def keys_of(self, kind: str, params: Params, names: Iterable[str] = ()) -> Dict[str, str]:
        """The parameters with these names (Flavour.keys) as keys for search()."""
        return {name.replace(kind + "_", ""): params[name]
                for name in names or self.flavour.keys[kind] if params.get(name)}

    def one(self, kind: str, params: Params, names: Sequence[str] = (),
            missing: Optional[Row] = None) -> Any:
        """The friend, group or discuss that a call names. Answer, if there is none, or more than
        one.

        If a name matches several, the one with that markname is meant. A number that is not listed
        may be known to the bridge.
        """
        given, missing = self.keys_of(kind, params, names), missing or self.flavour.missing[kind]
        said, found = set(given.values()), self.client.roster.search(kind, given)
        if len(found) > 1:
            found = [thing for thing in found if thing.value("markname") in said] or found
        if len(found) > 1:
            raise Answer({**missing, "code": 100, "status": f"{kind} not unique"})
        if not found and len(said) == 1 and all(name.endswith("id") for name in given):
            found = [self.client.look_for(kind, *said)]
        if not any(found):
            raise Answer(missing)
        return found[0]

    def members(self, circle: Circle, keys: Mapping[str, str]) -> List[Any]:
        """The members of a group or discuss that match; a bridge may know further ones."""
        link = self.client.link
        found = self.client.roster.search(circle, keys)
        if not found and len(keys) == 1 and link.real and circle.kind == "group":
            try:
                uid = number_of(*keys.values())
                row = link.find_member(circle.uid, uid) if uid else None
                return [THINGS["group_member"](row)] if row else []
            except Unreachable as error:
                self.client.log.debug(f"who {keys} is: {error.status}")
        return found

    # -- reading (CONTRACT 3)

    def do_get_user_info(self, request: Request) -> Json:
        roster = self.client.roster
        return self.show(roster.user.to_json(roster.fields))

    def look_who_is_there(self) -> None:
        """Update the states of all people, unless that was done a moment ago."""
        if "state" not in self.flavour.fields["friend"]:
            return
        # Callers who come while another one looks wait for it only if the last look is too old.
        if not self._looking.acquire(time.monotonic() > self._looked + 0.02):
            return
        try:
            if time.monotonic() < self._looked:
                return
            wait = 0.002
            try:
                self.client.roster.show_states(self.client.link.presence())
            except OpenQQError as error:
                self.client.log.debug(f"who is there: {error.status}")
                wait = 5.0               # the list is worth more
            self._looked = time.monotonic() + wait
        finally:
            self._looking.release()

    def do_list(self, kind: str, request: Request) -> Response:
        roster = self.client.roster
        if kind == "group":  # load members that are not known yet
            self.client.details.wait(list(roster.group.values()))
        self.look_who_is_there()
        parts = [to_bytes(self.show(rows))[1:-1] for rows in roster.rows(kind)]
        return Response(b"[%b]" % b",".join(parts))  # encoding all at once would stop all threads

    def do_get_group_basic_info(self, request: Request) -> Json:
        self.client.details.wait(list(self.client.roster.group.values()), members=False)
        return self.show(list(itertools.chain(*self.client.roster.rows("group", False))))

    def do_search(self, kind: str, request: Request) -> Json:
        client, names = self.client, self.flavour.other_names[kind]
        keys: Dict[str, str] = {}
        for given, value in request.keys().items():
            if keys.setdefault(names.get(given, given), value) != value:
                return self.NOT_FOUND  # one member, two values
        self.look_who_is_there()
        if kind == "group" and {"role", "owner_id", "owner_uid"} & keys.keys():
            client.details.wait(list(client.roster.group.values()), members="role" not in keys)
        found = client.roster.search(kind, keys)
        if kind == "group":
            client.details.wait(found)
        return self.show(list(itertools.chain(*client.roster.rows(kind, things=found)))
                         ) if found else self.NOT_FOUND

    def do_get_client_info(self, request: Request) -> Json:
        row = self.client.files.state_row(self.client)
        return {**{name: row[name] for name in ("account", "http_debug", "log_encoding",
                                                "log_level", "log_path", "os", "pid", "version")},
                "code": 0, "status": "success", "starttime": self.client.start_time,
                "runtime": int(time.time()) - self.client.start_time}

    def do_get_qrcode(self, request: Request) -> Response:
        return qrcode_response(read_file(self.client.settings.qrcode_path), self.flavour)

    def do_get_media(self, request: Request) -> Response:
        id, _, number = request.params.get("id", "").partition(".")
        seen = self.client.talk.remembered(id) or {}
        file = {str(place): file for place, file in enumerate(seen.get("media") or ())}.get(
            number, {})
        if file.get("file_id"):  # the bridge's URLs end, so it is asked now
            with contextlib.suppress(Declined):
                url = self.client.link.file_url({**file, "group": seen.get("group_uid"),
                                                 "uid": seen.get("sender_uid")})
                if url:
                    return Response(b"", "", 302, {"Location": url})
        else:
            row = self.client.files.media_store.get(id)
            data = read_file(row["media_path"]) if row else None
            if row and data is not None:
                return Response(data, row["media_mime"], fields={
                    "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"})
        return Response(b"", "", 404)

    def do_get_avatar(self, request: Request) -> Json:
        params, roster = request.params, self.client.roster
        found: List[Any]
        if params.get("group_id"):
            found = roster.search("group", self.keys_of("group", params, ["group_id"]))
            if found and params.get("id"):
                found = roster.search(found[0], {"id": params["id"]})
        elif params.get("id") == roster.user.id:
            found = [roster.user]
        else:
            found = [self.one("friend", params)]
        if not found:
            return self.flavour.missing["friend"]
        return Response(avatar(found[0].uid), "image/png",
                        fields={"Cache-Control": "max-age=3600"})

    # -- sending (CONTRACT 4)

    def do_send_to(self, kind: str, request: Request) -> Json:
        client, everybody = self.client, self.flavour.everybody
        if everybody and kind == "friend" and request.params.get("id") == everybody:
            content, media = self.what(request.params)
            if client.talk.is_full():
                raise QueueFull()
            for friend in list(client.roster.friend.values()):
                client.send("friend_message", content, friend.uid, media=media)
            return {"code": 0, "id": 0, "status": "request already executed"}
        target = self.one(kind, request.params)
        uid, circle = (target.uid, "") if kind == "friend" else (None, target.uid)
        return self.send(request, kind + "_message", target, uid, circle)

    def do_send_sess_message(self, request: Request) -> Json:
        client, params = self.client, request.params
        if params.get("group_id") or params.get("group_uid"):
            kind, code = "group", 103
        elif params.get("discuss_id"):
            kind, code = "discuss", 104
        else:
            return {"code": 105, "id": None,
                    "status": "discuss member or group member  not found"}
        keys = self.keys_of("member", params, ["id", "uid"])
        circles = client.roster.search(
            kind, self.keys_of(kind, params, [kind + "_id", kind + "_uid"]))
        for circle in circles:
            client.details.wait([circle])
            for member in self.members(circle, keys):
                return self.send(request, "sess_message", member, member.uid, circle.uid, kind)
        uid = number_of(keys.get("uid") or keys.get("id"))
        group = params.get("group_uid") or params.get("group_id") or ""
        unlisted = group == client.link.any_group or (
            not circles[0].loaded if circles else not client.is_certain("group"))
        if client.link.real and kind == "group" and number_of(group) and uid and unlisted:
            stranger = THINGS["group_member"]({"uid": uid, "id": uid, "name": uid})
            return self.send(request, "sess_message", stranger, uid, group, kind)
        return {"code": code, "id": None, "status": f"{kind} member not found"}

    def send(self, request: Request, type: str, target: Thing, uid: Optional[str],
             circle: str = "", via: str = "") -> Row:
        """Queue a message, and wait for the outcome, unless async=1."""
        content, media = self.what(request.params)
        cq = request.params.get("cq") == "1"
        if cq:
            check_sources(content, self.media.check_address)
        if self.client.talk.is_full():
            raise QueueFull()
        future = self.client.send(type, content, uid, circle, via=via, media=media, cq=cq,
                                  **check_quote(request.params))
        if request.params.get("async") == "1":
            return {"code": 0, "status": "request already in execution"}
        try:
            message: Optional[Message] = wait_for(request, future, SEND_SECONDS)
        except TimeoutError:  # it will be sent; after a failure the caller might send it again
            return {"code": 0, "id": None, "status": "request already in execution"}
        if message is None:
            raise NotRunning(state=self.client.state)
        row = {**self.flavour.sent, "code": message.code, "status": message.msg,
               "id": None if message.id is None else id_of(
                   self.flavour.sent_id.format(id=message.id, target=target.id))}
        if "info" in row:
            row["info"] = message.info
        if media and media["media_id"]:
            row["media_id"] = media["media_id"]  # by which it can be sent again
        return row

    def what(self, params: Params) -> Tuple[str, Optional[Row]]:
        """The text and the picture in a call, at least one of them."""
        media, content = self.media.take(params), params.get("content", "")
        return check_content(params) if content or not media else "", media

    def do_consult(self, request: Request) -> Json:
        friend = self.one("friend", request.params)
        seconds = request.params.get("timeout", "30")
        if not re.fullmatch("[0-9]{1,4}", seconds):
            raise BadRequest(400, "timeout must be a number of seconds")
        answer = self.client.talk.expect(friend.uid)
        self.client.link.typing(friend.uid, True)
        try:
            row = self.send(request, "friend_message", friend, friend.uid)
            return {**row, "reply": wait_for(request, answer, float(seconds))
                    if row["code"] == 0 else None}
        except TimeoutError:
            return {**row, "reply": None, "reply_status": "reply timeout"}
        finally:
            self.client.link.typing(friend.uid, False)
            answer.cancel()

    def do_upload_media(self, request: Request) -> Json:
        row = self.media.take(request.params, keep=True)
        if row is None:
            raise BadRequest(400, "media_path, media_data or media_url missing")
        about = {name: value for name, value in row.items() if name.startswith("media_")}
        return {**about, "code": 0, "status": "success"}

    # -- what the link does (CONTRACT 5 and 10)

    def do_act(self, what: str, request: Request) -> bool:
        """Have the link do what a row of VERBS says. For a word WORD there is a method the_WORD,
        which finds what the parameters mean, and may raise Answer; other words are names of
        parameters, with ! if they must not be empty."""
        method, *pairs = what.split()
        params = request.params
        given: Row = {}
        for name, _, word in [pair.partition("=") for pair in pairs]:
            find, key = getattr(self, "the_" + word, None), word.rstrip("!")
            given[name] = (find(params, given.get("group")) if find
                           else params.get(key, "1") != "0" if key in self.FLAGS
                           else params.get(key, ""))
            if key != word and not given[name]:
                raise Answer(self.FAILURE)
        return bool(getattr(self.client.link, method)(**{
            name: value.uid if isinstance(value, Thing) else value
            for name, value in given.items()}))

    def the_group(self, params: Params, group: Any = None) -> Any:
        return self.one("group", params, self.flavour.keys["place"], self.NOT_FOUND)

    def the_members(self, params: Params, group: Any) -> List[str]:
        """The uids of the members of a group that are named by id or uid."""
        names = self.flavour.keys["members"]
        name = next((name for name in names if params.get(name)), "")
        if name:
            self.client.details.wait([group])
        return self.uids(params.get(name, ""), "member", lambda person: self.members(
            group, {"uid" if name.endswith("uid") else "id": person}))

    def the_member(self, params: Params, group: Any) -> str:
        return self.the_members(params, group)[0]

    def the_friends(self, params: Params, group: Any = None) -> List[str]:
        return self.uids(params.get("friends", ""), "friend",
                         lambda person: self.client.roster.search("friend", {"id": person}))

    def uids(self, text: str, what: str, find: Callable[[str], List[Any]]) -> List[str]:
        """The uids of all who are named; Answer, if one is not found, or none is named."""
        uids = []
        for name in filter(None, text.split(",")):
            found = find(name)
            if not found:
                raise Answer({"code": 100, "status": self.flavour.unknown.format(
                    what=what, name=name)})
            uids.append(found[0].uid)
        if not uids:
            raise Answer({"code": 200, "status": f"{what} id empty"})
        return uids

    def the_friend(self, params: Params, group: Any = None) -> Any:
        return self.one("friend", params, ("uid", "id"), self.NOT_FOUND)

    def the_person(self, params: Params, group: Any) -> Any:
        """A friend, or with group_id somebody in a group."""
        if not params.get("group_id"):
            return self.one("friend", params, missing=self.NOT_FOUND)
        return self.somebody_in(self.client.roster.search(
            "group", self.keys_of("group", params, ["group_id"])), self.keys_of("friend", params))

    def the_stranger(self, params: Params, group: Any) -> Any:
        """Somebody, by id, in a group that one is in, who is no friend yet."""
        name, roster = params.get("id", ""), self.client.roster
        if name and name == roster.user.id:
            raise Answer({"code": 101, "status": "can not be yourself"})
        if roster.search("friend", {"id": name}):
            raise Answer({"code": 101, "status": "already a friend"})
        return self.somebody_in(list(roster.group.values()), {"id": name})

    def somebody_in(self, groups: List[Any], keys: Mapping[str, str]) -> Any:
        """The first member of these groups that matches; Answer, if there is none."""
        for group in groups:
            for member in self.client.roster.search(group, keys):
                return member
        raise Answer(self.NOT_FOUND)

    def the_id(self, params: Params, group: Any) -> str:
        """The id of a message; a bridge may know messages that we do not."""
        id = params.get("id", "").partition(":")[0]
        if not self.client.talk.remembered(id) and not (
                self.client.link.real and MESSAGE_ID.fullmatch(id)):
            raise Answer({"code": -1, "status": "msg id not found"})
        return id

    def the_digits(self, params: Params, group: Any) -> str:
        if not re.fullmatch("[0-9]{1,16}", params.get("code", "")):
            raise BadRequest(400, "code must be digits")
        return params["code"]

    def do_shutup_group_member(self, request: Request) -> Json:
        params, link = request.params, self.client.link
        group = self.the_group(params)
        if params.get("all") == "1" and not any(map(params.get, self.flavour.keys["members"])):
            return link.mute_all(group.uid, params.get("time") != "0")
        minutes = params.get("time", "")  # 003 is wrong: not seconds; 0 unmutes
        if not re.fullmatch("[0-9]+", minutes):
            raise Answer({"code": 400, "status": "shutup time missing or error"})
        return link.mute(group.uid, self.the_members(params, group), int(minutes[:9]) * 60)

    def do_poke(self, request: Request) -> Json:
        params, link = request.params, self.client.link
        if not any(map(params.get, self.flavour.keys["place"])):
            return link.poke(self.the_friend(params).uid, "")
        group = self.the_group(params)
        return link.poke(self.the_member(params, group), group.uid)

    def do_call_action(self, request: Request) -> Json:
        action, text = request.params.get("action", ""), request.params.get("params") or "{}"
        params = object_in(text.encode("utf-8", "replace"))
        if not re.fullmatch("[.A-Za-z0-9_]{1,64}", action) or params is None:
            raise BadRequest(400, "action must be a word, and params a JSON object")
        if SECRET_ACTION.search(action) and not self.client.settings.call_action_all:
            raise NotAllowed(f"{action} not allowed: it hands out the account or the machine "
                             "(setting call_action_all)")
        check_sources(params, self.media.check_address)
        try:
            row = self.client.link.call(action, params)
        except Declined as error:
            row = {"status": "failed", "wording": error.status}
        if is_refusal(row):
            return {**self.FAILURE, "retcode": row.get("retcode"), "info": wording(row)}
        return {"code": 0, "data": row.get("data"), "status": "success"}

    def do_get_message(self, request: Request) -> Json:
        id = request.params.get("id", "").partition(":")[0]
        row = self.client.talk.remembered(id)
        if row is None and MESSAGE_ID.fullmatch(id):
            item = self.client.link.find_message(id)
            with self.client.lock:
                message = self.client.talk.compose(item) if item else None
            row = message.to_json(self.flavour.fields) if message else None
        return self.NOT_FOUND if row is None else self.show(row)

    def do_create_group(self, request: Request) -> Json:
        uids = self.the_friends(request.params)
        uid = self.client.link.create_group(uids, request.params.get("displayname") or "群聊")
        if not uid:
            return self.FAILURE
        group = None
        with contextlib.suppress(TimeoutError):
            group = wait_for(request, self.client.talk.expect_group(uid), 10.0)
        if group is None:
            raise NotRunning(state=self.client.state)
        return {"code": 0, "group_id": group.id, "status": "success"}

    def do_stick(self, request: Request) -> Json:
        params = request.params
        if not any(self.client.roster.search(kind, self.keys_of(kind, params))
                   for kind in ("friend", "group")):
            return self.NOT_FOUND
        return params.get("op", "1") in ("0", "1")

    # -- events, life cycle (CONTRACT 6 and 8)

    def do_check_event(self, request: Request) -> Response:
        return Response(self.store.take(seq_of(request.params.get("since")), request.wait))

    def do_events(self, request: Request) -> Response:
        self.check_name(request)
        return self.store.stream(request)

    def check_name(self, request: Request) -> None:
        """ClientMissing if a call names another account: it must not stop this one."""
        if (request.params.get("client") or self.client.account) != self.client.account:
            raise ClientMissing("client not exists")

    def do_check_client(self, request: Request) -> Json:
        self.check_name(request)
        client = self.client
        return {"code": 0, "client": [{
            **client.files.state_row(client), "port": client.port, "restarts": 0,
            "since": str(int(client.since)),
            "link": link_of(client.settings.given)}]}

    def do_stop_client(self, request: Request) -> Json:
        return {**self.soon(request, "stop", self.client.stop),
                "runtime": int(time.time()) - self.client.start_time,
                "starttime": self.client.start_time, "pid": os.getpid()}

    def do_relogin(self, request: Request) -> Json:
        return self.soon(request, "relogin", self.client.relogin)

    def soon(self, request: Request, what: str, act: Callable[[], None]) -> Row:
        """Have something done in 3 seconds; the answer that says so."""
        self.check_name(request)
        self.client.timers.later(STOP_SECONDS, act)
        return {"account": self.client.account, "code": 0,
                "status": f"success, client({os.getpid()}) will {what} in 3 seconds"}


def qrcode_response(picture: Optional[bytes], flavour: Type[Flavour]) -> Response:
    """The answer of get_qrcode, on both servers (002)."""
    if picture is None:
        return Response(b"", "", 404)
    is_ours = media_type(picture, "") == "image/png"
    return Response(picture, flavour.qrcode_type if is_ours else "image/jpeg",
                    fields={"Cache-Control": "no-cache"})


def all_routes(flavour: Type[Flavour], settings: Settings, verbs: Iterable[Verb],
               handler: Callable[[Verb], Callable[[Request], Any]],
               index: Callable[[Request], Response], from_bridge: Callable[[Request], Any],
               pages: Optional[LocalPages], is_controller: bool) -> List[Route]:
    """The routes of a client or a controller: the API under both prefixes, and the others."""
    routes = [Route(prefix + verb.name, verb.methods, handler(verb))
              for prefix in PREFIXES for verb in verbs]
    routes += [HEALTH, Route("/", READ, index, open=True),
               *[Route(path, "POST", from_bridge, open=True) for path in BRIDGES],
               *(pages.routes() if pages else [])]
    return routes + openapi_routes(flavour, bool(settings.token), routes, is_controller)


class ClientApp(App):
    """The app of a client: CORS in every answer, JSONP if asked for (CONTRACT 1)."""

    def answer(self, request: Request) -> Response:
        """As App.answer; a bad callback is refused before anything is done."""
        name, params = "", {}
        try:
            if "jsonp" in request.query or b"jsonp" in request.body:
                try:
                    params = request.params
                except BadRequest:  # a body of another kind that contains the word
                    if "jsonp" in request.query:
                        raise
            if params.get("datatype") == "jsonp":
                name = params.get("callback") or f"jsoncallback{int(time.time())}"
                if not CALLBACK.fullmatch(name):
                    raise NotAllowed("callback not allowed")
            response = super().answer(request)
            if name and response.kind == "application/json":
                response = Response(name.encode() + b"(" + response.body + b")",
                                    "application/javascript", response.status,
                                    {"X-Content-Type-Options": "nosniff"})
        except (NotAllowed, BadRequest) as error:
            response = error_response(error)
        response.fields = {**response.fields, "Access-Control-Allow-Origin": "*"}
        return response


OPTIONS_FIELDS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "OPTIONS, HEAD, GET, POST",
    "Access-Control-Allow-Headers": "X-Requested-With, X-Auth-Token, Content-Type, "
                                    "Content-Length, Authorization"}


def client_fallback(request: Request) -> Response:
    """The answer of a client to unknown paths and methods."""
    if request.method == "OPTIONS":
        return Response(b"", "", fields=OPTIONS_FIELDS)
    return Response(b"api not found", "text/html;charset=UTF-8", 403)


def take_from_bridge(client: Client, auth: Auth, request: Request) -> Json:
    """/onebot and /milky, where a bridge posts its events (ONEBOT.md, MILKY.md). AuthFailure,
    BadRequest; ApiNotFound for an account on another link.

    A bridge needs a signature (NapCat signs with its token), or the bridge's token, or what other
    callers need; a Milky bridge without a token must be on this machine.
    """
    request.read_url_only()
    settings, fields, is_milky = client.settings, request.fields, request.path == "/milky"
    token, secret = (settings.milky_token, "") if is_milky else (settings.onebot_token,
                                                                 settings.onebot_secret)
    offer = fields.get("x-signature", "").lower().encode("latin-1", "replace")
    if "x-signature" in fields and (token or secret):
        if not any([same_bytes(offer, signature(key, request.body).encode())
                    for key in (secret, token) if key]):
            raise AuthFailure()
    elif secret or not token or not same_bytes(
            fields.get("authorization", "").encode("latin-1", "replace"),
            bearer(token).encode("latin-1", "replace")):
        if token if is_milky else secret and not settings.token:
            raise AuthFailure()
        try:
            (Auth() if is_milky else auth).check(request)
        except AuthFailure:
            raise AuthFailure() from None  # the advice for other callers does not help a bridge
    row = object_in(request.body)
    if row is None:
        raise BadRequest(400, "an event must be a JSON object")
    if link_of(settings.given) != request.path[1:] or not client.link.hear(row):
        raise ApiNotFound()
    return {}


def openqq_plugin(client: Client, data: Row) -> None:
    """Openqq: the HTTP API, post_api and poll_api.

    `data` may contain `listen`, a list of {"host", "port"}, which is replaced by the controller's
    socket, if any, and settings (003: post_api …), which replace those of the client. Refusal if it
    cannot listen there.
    """
    log, flavour, parent = client.log, client.flavour, client.parent
    settings = client.settings.with_(
        {name: value for name, value in data.items() if name != "listen"})
    settings.fill(port=flavour.client_port)
    store = EventStore(settings.check_event_list_max_size)
    if parent and not client.outlets:
        store.relay = parent.add
    api = Api(client, store, settings.numeric_ids)
    answers = Answers(client, api.media, settings.post_api)
    poster = Poster(
        settings.post_api, settings.post_secret, client.disk_queue, client.timers, log,
        answers.answered, asking=answers.typing, numeric=settings.numeric_ids,
        failed=lambda: client.files.write_state(client))
    listed = (flavour.post_event_list if settings.post_event_list is None
              else settings.post_event_list)
    client.outlets.append(Outlet(store, poster, listed if settings.post_event else [],
                                 settings.post_stdout, settings.numeric_ids,
                                 settings.post_media_data))

    auth = Auth(settings.token, settings.allowed_hosts)
    app = ClientApp(auth, log, all_routes(
        flavour, settings, flavour.apis.values(), api.handler,
        lambda request: client_page(client) if client.parent else dashboard(
            flavour, settings, client.account),
        functools.partial(take_from_bridge, client, auth), client.local_pages(), False),
        client_fallback)
    app.metrics.watch("clients", "gauge", "Clients by state.",
                      lambda: {f'state="{state}"': state == client.state
                               for state in NEXT_STATES if state})
    app.metrics.watch("send_queue_length", "gauge", "Messages that wait to be sent.",
                      lambda: {"": client.talk.waiting()})
    watch_posting(app.metrics, poster)
    listeners = [client.take_listener() or open_listener(address, settings)
                 for address in data.get("listen") or [{}]]
    client.port = client.port or listeners[0].getsockname()[1]
    client.closing += [server.close_down for server in serve(app, listeners, settings, log)]
    for listener in listeners:
        log.info(f"插件[{flavour.program}::Plugin::{flavour.plugin}]监听地址: "
                 f"[ http://{listener.getsockname()[0]}:{listener.getsockname()[1]} ]")
    if not parent:
        log.info(auth_hint(settings))

    if settings.poll_api:
        own = {client.port: f"http://127.0.0.1:{client.port}"}
        if parent and parent.local:
            own[origin_of(parent.local)[2]] = parent.local
        heartbeat = Heartbeat(settings.poll_api, settings.poll_interval, own, settings.token, log)
        client.on("login", lambda client, fresh: heartbeat.start())
        client.closing.append(heartbeat.stop)


def serve(app: App, listeners: Iterable[socket.socket], settings: Settings,
          log: Log) -> List[Server]:
    """Begin to serve at sockets, each in a thread of its own."""
    servers = [Server(listener, app, log, settings.max_connections,
                      settings.http_max_message_size) for listener in listeners]
    for server in servers:
        if settings.http_debug:
            server.debug = log.debug
        spawn(server.serve_forever, name="server")
    return servers


def auth_hint(settings: Settings) -> str:
    """Who is served, and how to change that, for the log."""
    if settings.token:
        return "callers need the token"
    if settings.allowed_hosts:
        return (f"only this machine is served, with what a server on it passes on that is called "
                f"{' or '.join(settings.allowed_hosts)}: by https, and it must ask who is there")
    return ("only callers on this machine are served, others get 403; "
            "to serve them as well, start with --token SECRET")


def open_listener(address: Row, settings: Settings) -> socket.socket:
    """A listening socket, as an item of `listen` says, or else the settings. Refusal."""
    host, port = [getattr(settings, name) if address.get(name) in (None, "") else address[name]
                  for name in ("host", "port")]
    try:
        return listen(str(host), int(port))
    except (OSError, ValueError, OverflowError) as error:  # ValueError: what is no name
        why = getattr(error, "strerror", "") or error
        raise Refusal(f"cannot listen on {host} port {port}: {why}; "
                      "give another with --host or --port") from None


def client_page(client: Client) -> Response:
    """The page at / of a controller's client."""
    base = client.public_url() + client.flavour.prefix
    lines = "\n".join(base + call for call in (
        "get_client_info", "get_qrcode", "get_friend_info",
        "send_friend_message?uid=…&content=hello", "check_event"))
    return page(INDEX_BODY, {"what": f"This is the client of the account {client.account}.",
                             "lines": lines})


PLUGINS.update({"ShowMsg": (show_msg, 100), "UploadQRcode": (upload_qrcode, 0),
                "ShowQRcode": (show_qrcode, 0), "Openqq": (openqq_plugin, 98),
                "Openwx": (openqq_plugin, 98)})


# ------------------------------------------------------------------------------------------------
# 14. Controller
# ------------------------------------------------------------------------------------------------

HOP_BY_HOP = ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te",
              "proxy-connection", "trailer", "transfer-encoding", "upgrade", "content-length",
              "expect", "host", "date")
ABOUT_THE_CALLER = re.compile("origin|authorization|cookie|forwarded|via|x-real-ip|"
                              "(sec-fetch|x-forwarded)-.*")
READS = re.compile("/open(qq|wx)/(get|search)_")
WAITS = re.compile("/open(qq|wx)/(check_event|consult)")
# The settings of the controller that its clients get, too.
SHARED = ("log_level", "tmpdir", "log_encoding", "public_url", "allowed_hosts", "disable_color",
          "http_debug", "http_max_message_size")


class Child:
    """A client as its controller sees it; the controller's lock guards it. `phase` says what the
    controller does with its process (Supervisor), `state` is what the client says (CONTRACT 8). One
    that is only remembered has no listener, and the port of the last time."""

    def __init__(self, name: str, given: Dict[str, str],
                 listener: Optional[socket.socket] = None, port: int = 0) -> None:
        self.name, self.given = name, given          # settings as text, secrets included
        self.pid, self.port = 0, listener.getsockname()[1] if listener else port
        self.listener: Any = listener                # also ours, so that nobody takes the port
        self.forget: Set[str] = set()                # secrets to be removed from its cookie file
        self.phase, self.state = "stopped", "init"
        self.lines: Deque[str] = collections.deque(maxlen=5)  # the last warnings of its log
        self.since = time.time()                     # in this state
        self.process: Any = None                     # subprocess.Popen while it lives
        self.life: Any = None                        # the connection to it (Parent)
        self.heard = bytearray()                     # the begin of a line that is not complete
        self.restarts = -1                           # starts after the first
        self.tries = 0                               # starts without reaching running
        self.running_since = 0.0
        self.trial = False                           # renew() waits whether it starts
        # What cancels the end of a pause, and client_waiting.
        self.no_pause: Callable[[], None] = lambda: None
        self.no_waiting: Callable[[], None] = lambda: None

    def alive(self) -> bool:
        """Whether it runs, or is being started."""
        return self.phase not in ("stopping", "stopped", "failed")

    def busy(self) -> bool:
        """Whether it has a process, or one is being made."""
        return self.phase in ("starting", "running", "renewing", "stopping")

    def seen(self) -> str:
        """Its state for others; `failed` if it died and is not started again."""
        return self.state if self.process else "init" if self.alive() else (
            "failed" if self.phase == "failed" else "stop")

    def open_settings(self) -> Dict[str, str]:
        """Its settings without secrets."""
        return {name: value for name, value in self.given.items() if not SETTINGS[name].secret}

    def shown(self) -> Row:
        """The answer of start_client and stop_client."""
        return {**self.open_settings(), "client": self.name, "code": 0, "pid": self.pid,
                "port": self.port, "status": "success"}


class Supervisor:
    """Starts, hears and ends the processes of clients. All methods need the controller's lock,
    except make(), and _await_end(), which runs in a thread for each process."""

    SILENT_SECONDS = 1.0         # until a process that has closed its connection is killed

    def __init__(self, owner: Controller, spawn_process: Any = None) -> None:
        import subprocess
        self._spawn = spawn_process or subprocess.Popen
        self._owner, self._timers, self._log = owner, owner.timers, owner.log
        self.children: Dict[str, Child] = {}
        self.ending = False
        self.restarts = 0                              # of clients that had died
        self._turn = itertools.count(os.getpid() + 1)  # numbers of CPUs; the first is not ours
        self._pool = ThreadPool(MOST_WATCHED, "children", self._log)

    # -- from one phase to the next

    def expect(self, child: Child) -> None:
        """Note that a child's process is about to be made."""
        self.children[child.name], child.phase = child, "starting"
        child.tries += 1
        child.restarts += 1
        self._enter(child, "init")

    def _begin(self, child: Child, anew: bool = False) -> None:
        if anew:                                     # with other settings: it had not died
            child.lines.clear()
            child.tries, child.restarts = 0, child.restarts - 1
        self.expect(child)
        self._pool.submit(self.make, child)

    def _ended(self, child: Child, status: int) -> None:
        """Decide what to do with a child whose process has ended, or could not be made."""
        child.process = None
        self._owner.settled.notify_all()
        if child.phase == "stopping" or self.ending:
            self._log.info(f"client {child.name} stopped")
            child.phase = "stopped"                  # stopping -> stopped
        elif child.phase == "renewing":
            self._begin(child, anew=True)            # renewing -> starting
        elif child.trial:
            child.phase = "failed"                   # starting -> failed: renew() goes on
        elif status == 0:
            self._log.info(f"client {child.name} ended by itself")
            child.phase = "stopped"                  # running -> stopped: somebody told it to
        else:
            how = f"exit status {status}" if status > 0 else f"signal {-status}"
            child.lines.append(f"client {child.name} died: {how}")
            if self._owner.settings.restart == "never" or child.tries >= START_TRIES:
                child.phase = "failed"               # starting, running -> failed
                self._log.error(f"client {child.name} died ({how}) and is not started again")
                self._owner.report(child, "client_failed", "\n".join(child.lines))
                return
            young = self._timers.clock() - child.running_since < 1.0
            wait = backoff(child.tries - 1) if child.tries else float(young)
            self._log.warn(f"client {child.name} died ({how}); starting it again"
                           + (f" in {wait:g} s" if wait else ""))
            self.restarts += 1
            child.phase = "backoff"                  # starting, running -> backoff -> starting
            child.no_pause = self._timers.later(wait, self._begin, child)

    # -- what others want of it

    def resume(self, child: Child, pid_file: PidFile) -> None:
        """Start a child of a former controller, when its former process has ended."""
        def begin() -> None:
            pid_file.await_end()
            with self._owner.lock:
                if child.phase == "waiting":         # else it was stopped meanwhile
                    self._begin(child)               # waiting -> starting

        self.children[child.name], child.phase = child, "waiting"
        self._pool.submit(begin)

    def renew(self, child: Child, given: Dict[str, str], forget: Set[str]) -> None:
        """Restart a child with other settings on its port, and wait until it runs; if it dies of
        them it is restarted with the former ones. ClientDied, NotRunning, TooSlow."""
        former, child.trial = (child.given, child.forget), True
        child.given, child.forget = given, forget
        self._log.info(f"client {child.name} begins anew with other settings")
        if child.phase != "waiting":                 # else it is started in a moment
            self.stop(child, "renewing")
        try:
            self.wait(lambda: child.phase not in ("waiting", "renewing"))
            self._owner.settled.wait_for(
                lambda: child.phase != "starting" or child.state != "init", TRIAL_SECONDS)
        finally:
            child.trial = False
        if self.ending:
            raise NotRunning("stopping")
        if child.phase == "failed":
            self._log.error(f"client {child.name} died of its new settings: it has those of before")
            died = ClientDied(reason="\n".join(child.lines))
            child.given, child.forget = former
            self._begin(child, anew=True)            # failed -> starting, as before
            raise died

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, at most as long as the end of a process takes. TooSlow."""
        if not self._owner.settled.wait_for(condition, KILL_SECONDS + 5.0):
            raise TooSlow()

    def stop(self, child: Child, phase: str = "stopping") -> None:
        """End a child; it is stopping until its process has ended, then stopped."""
        busy, child.phase = child.busy(), phase
        child.no_pause()
        if child.process:
            self._tell_to_end(child)                 # its end is heard of
        elif busy:
            pass                                     # make() ends it
        elif phase == "stopping":
            child.phase = "stopped"                  # waiting, backoff, failed -> stopped
            self._owner.settled.notify_all()
        else:
            self._begin(child, anew=True)            # backoff, stopped, failed -> starting

    def _tell_to_end(self, child: Child) -> None:
        """TERM, and KILL after a while."""
        if child.life:
            tell_to_end(child.process, child.life)
        self._timers.later(KILL_SECONDS, child.process.kill)

    def stop_all(self) -> None:
        """End all children at the same time; the second time kill them."""
        hurry, self.ending = self.ending, True
        for child in self.children.values():
            self.stop(child)
            if hurry and child.process:
                child.process.kill()

    def busy(self) -> bool:
        """Whether there is a process, or one is being made."""
        return any(child.busy() for child in self.children.values())

    def release(self, child: Child) -> None:
        """Give a child's port back."""
        if child.listener:
            self._hang_up_no_more(child)
            child.listener.close()
            child.listener = None

    def _hang_up_no_more(self, child: Child) -> None:
        with contextlib.suppress(KeyError):          # it never died
            self._timers.unwatch(child.listener)

    # -- processes

    def make(self, child: Child, first: bool = False) -> None:
        """Make a child's process; without the lock. StartFailure for the `first`; others are tried
        again."""
        owner = self._owner
        with owner.lock:
            environment = self._environment(child)
        try:
            ours, theirs = socket_pair()
            with theirs:
                process = start_process(
                    self._spawn, f"{owner.flavour.ps}client({child.name})",
                    python_words("--client"), environment,
                    OPENQQ_LIFE=theirs, OPENQQ_LISTEN=child.listener)
        except (OSError, ValueError) as error:
            with owner.lock:
                child.lines.append(f"cannot be started: {error}")
                if not first:
                    return self._ended(child, 127)
                self._log.error(f"client {child.name} cannot be started: {error}")
                del self.children[child.name]
                self.release(child)
                owner.settled.notify_all()
                raise StartFailure(reason=str(error)) from None
        ours.setblocking(False)
        if owner.settings.one_cpu:
            share_cpu(next(self._turn), process.pid)
        with owner.lock:
            child.process, child.pid, child.life = process, process.pid, ours
            child.heard.clear()
            self._hang_up_no_more(child)             # from now on the client serves callers
            self._timers.watch(ours, lambda: self.listen(child))
            self._log.info(f"client {child.name} started, pid {child.pid}, port {child.port}")
            if child.phase != "starting":
                self._tell_to_end(child)             # it was stopped meanwhile
            owner.changed()
        self._pool.submit(self._await_end, child)

    def _environment(self, child: Child) -> Dict[str, str]:
        """A client's environment, made from scratch."""
        kept = {name: value for name, value in os.environ.items()
                if KEPT_ENVIRONMENT.fullmatch(name)}
        flavour, settings = self._owner.flavour, self._owner.settings
        given = {**{name: SETTINGS[name].text(getattr(settings, name)) for name in SHARED},
                 **self._owner.inherited, **child.given,
                 "account": child.name, "port": str(child.port)}
        if not given.get("post_api") and settings.post_api:
            given["post_api"], given["post_secret"] = settings.post_api, settings.post_secret
        for name in "post_api", "poll_api":
            given[name] = with_params(given[name], client=child.name) if given.get(name) else ""
        return {**kept, **to_environment({name: value for name, value in given.items() if value},
                                         flavour.environ, flavour.plugin),
                **({"OPENQQ_TOKEN": settings.token} if settings.token else {}),
                "MALLOC_ARENA_MAX": "1",  # glibc: else each thread has a heap of its own
                "OPENQQ_FLAVOR": flavour.name, "OPENQQ_LOCAL": self._owner.url,
                "OPENQQ_KEY": self._owner.key_for(child.name),
                "OPENQQ_FORGET": ",".join(sorted(child.forget)),
                "OPENQQ_TEMPLATE": settings.template_path}

    def _await_end(self, child: Child) -> None:
        """In a thread of its own: wait for the end of a process."""
        def hang_up() -> None:  # nobody serves callers: they get 502 instead of waiting
            child.listener.setblocking(False)
            with contextlib.suppress(OSError):       # there is none any more
                while child.process is None:
                    child.listener.accept()[0].close()

        status = child.process.wait()
        TRANSPORT.pool.drop(f"127.0.0.1:{child.port}")
        network = self._owner.network
        network.do(network.detach, child.name)
        with self._owner.lock:
            while self.listen(child):
                pass
            if child.life:                           # a process of the client's still has it
                self._let_go(child)
            self._enter(child, "stop")
            self._timers.watch(child.listener, hang_up)
            self._ended(child, status)
            self._owner.changed()

    def _let_go(self, child: Child) -> None:
        self._timers.unwatch(child.life)
        child.life.close()
        child.life = None

    # -- what clients say

    def listen(self, child: Child) -> bool:
        """Read from a child's connection (Parent); whether there may be more."""
        try:
            data = child.life.recv(262_144) if child.life else None
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data == b"":
            self._let_go(child)
            self._timers.later(self.SILENT_SECONDS, child.process.kill)
        child.heard += data or b""
        if data and b"\n" in data:
            *lines, child.heard = child.heard.split(b"\n")
            for line in lines:
                self._hear(child, bytes(line))
        return bool(data)

    def _hear(self, child: Child, line: bytes) -> None:
        """Take a line of a child; events are passed on without parsing them."""
        if line.startswith((b"+", b"-")):
            put = self._owner.store.add if line.startswith(b"+") else self._owner.store.tell
            return put(b'{"client":' + to_bytes(child.name) + b"," + line[2:])
        try:
            news = from_bytes(line)
        except ValueError:
            return
        if "log" in news:
            child.lines.append(str(news["log"]))
        if "lost" in news:
            self._log.warn(f"client {child.name} says more than can be taken: {news['lost']} "
                           "event(s) are missing in the stream of all")
        if "state" in news:
            self._enter(child, str(news["state"]))
            if child.phase == "starting" and child.state == "running":
                child.phase, child.tries = "running", 0  # starting -> running
                child.running_since = self._timers.clock()
                child.lines.clear()

    def _enter(self, child: Child, state: str) -> None:
        if state == child.state:
            return
        old, child.state, child.since = child.state, state, time.time()
        self._owner.settled.notify_all()
        self._owner.tell(child, "state_change", [old, state])
        if state not in LOGGING_IN:
            child.no_waiting()
        elif old not in LOGGING_IN:                  # tell it if nobody scans
            child.no_waiting = self._timers.later(
                600, self._owner.report, child, "client_waiting")


def open_port(first: int, wish: int = 0) -> socket.socket:
    """A listening socket at the wished port, or else at the first free one. NoPort."""
    for port in itertools.chain([wish] if wish else [], range(first, 65_536)):
        try:
            return listen("127.0.0.1", port)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                break
    raise NoPort()


@functools.lru_cache(maxsize=256)
def is_passed_on(name: str) -> bool:
    """Whether a field of a call is passed on to the client."""
    return (name not in HOP_BY_HOP and name not in FORWARDED
            and not ABOUT_THE_CALLER.fullmatch(name))


def pass_on(request: Request, port: int, authorization: str = "", trusted: bool = True
            ) -> Response:
    """A client's answer to a call, which is written anew from the parsed request. For the client a
    call that is not `trusted` comes from another machine. Unreachable, TooSlow, Hangup."""
    fields = {name: value for name, value in request.fields.items() if is_passed_on(name)}
    if not trusted:
        fields["forwarded"] = "for=unknown"
    if authorization:
        fields["authorization"] = authorization
    reads = READS.match(request.path) is not None
    method = "GET" if request.method == "HEAD" and reads else request.method
    target = request.target.replace("#", "%23")  # else the rest would be a fragment
    try:
        reply = fetch(f"http://127.0.0.1:{port}{target}", method, fields, request.body or None,
                      PROXY_SECONDS, request.sock, reads,
                      0.0 if WAITS.match(request.path) else PATIENCE_SECONDS)
        fields = {name.title(): value for name, value in reply.fields.items()
                  if name not in HOP_BY_HOP and name != "content-type"}
        body, pieces = (b"", reply.pieces(PROXY_SECONDS)) if reply.length is None else (
            reply.read(reply.length), None)
        return Response(body, reply.fields.get("content-type", ""), reply.status, fields, pieces)
    except Unreachable as error:
        raise type(error)("client not reachable") from None


TEMPLATE = '''\
# What the controller's clients run. It may be edited: new clients then do what it says.
# The settings that start_client was given come in the environment ({environ}*).
import os
import openqq

client = openqq.Client(log_head="[%s][%s]" % (os.environ["{environ}ACCOUNT"], os.getpid()))
client.load(["ShowMsg", "UploadQRcode", "ShowQRcode"])
client.load("{plugin}", data={{
    "listen": [{{"host": "127.0.0.1",
                "port": os.environ["{environ}PLUGIN_{PLUGIN}_PORT"]}}],
    "post_api": os.environ.get("{environ}PLUGIN_{PLUGIN}_POST_API") or None,
    "post_event": os.environ.get("{environ}PLUGIN_{PLUGIN}_POST_EVENT", "1"),
    "post_media_data": os.environ.get("{environ}PLUGIN_{PLUGIN}_POST_MEDIA_DATA", "1"),
    "poll_api": os.environ.get("{environ}PLUGIN_{PLUGIN}_POLL_API") or None,
    "poll_interval": os.environ.get("{environ}PLUGIN_{PLUGIN}_POLL_INTERVAL"),
}}, call_on_load=True)
client.run()
'''


def default_template(flavour: Type[Flavour]) -> str:
    """The template as it is first written: it does what clients do without one."""
    return TEMPLATE.format(environ=flavour.environ, plugin=flavour.plugin,
                           PLUGIN=flavour.plugin.upper())


def check_params(params: Params, paths: bool = True) -> Dict[str, str]:
    """The parameters of start_client as settings; an empty one removes a remembered one. NotAllowed
    for those that callers may not give."""
    try:
        return texts_of(params, lambda setting: "" if setting and setting.caller and (
            paths or setting.read is not _path) else "not allowed")
    except ValueError as error:
        why = str(error)
        raise NotAllowed(why if why.endswith("not allowed") else why + ": not allowed") from None


def check_paths(given: Mapping[str, str], tmpdir: str, own_files: str,
                taken: Iterable[str]) -> None:
    """NotAllowed for a path that callers may not give, or that is given twice; `taken` and
    `own_files`, with the kind of file filled in, as for check_path()."""
    paths = {name: str(_path(value)) for name, value in given.items()
             if value and SETTINGS[name].read is _path}
    for name, path in paths.items():
        others = [other for key, other in paths.items() if key != name]
        check_path(name, path, tmpdir, own_files.format(name[:-len("_path")]), [*taken, *others])
        check_usable(name, path, paths.get("tmpdir", ""))


def cleared(given: Mapping[str, str]) -> Set[str]:
    """The secrets that are to be forgotten."""
    return {name for name, value in given.items() if SETTINGS[name].secret and not value}


def read_accounts(path: str, log: Log) -> Dict[str, Dict[str, str]]:
    """Read an accounts file: name -> settings as text. Errors are logged, and left out."""
    try:
        with open(path, "rb") as file:
            accounts = from_bytes(file.read())
        if not isinstance(accounts, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        log.error(f"accounts file {path} cannot be used: {error}; it must look like "
                  '{"alice": {"post_api": "http://…"}}')
        return {}
    found = {}
    for name, given in accounts.items():
        try:
            found[check_name(name)] = account_settings(given)
        except (OpenQQError, ValueError) as error:
            log.error(f"accounts file: {name!r}: {error}")
    return found


def account_settings(given: Json) -> Dict[str, str]:
    """The settings of one account, from any JSON scalars and lists; ValueError."""
    if not isinstance(given, dict):
        raise ValueError("its settings must be a JSON object")

    def why_not(setting: Optional[Setting]) -> str:
        if setting is None or setting.whose == "controller":
            return "is not a setting of a client"
        if not setting.caller and (setting.whose == "both" or setting.name == "account"):
            return "is the controller's to decide, for all its clients"
        return ""

    return texts_of(given, why_not)


class Controller:
    """Many accounts, one process each, behind one API (002). Settings are given as keyword
    arguments, else taken from the environment. Refusal if it cannot start. The thread of run() is
    that of the timers: it handles signals, timers and what clients tell."""

    FILES = {"state_path": "state_{}.json", "qrcode_path": "qrcode_{}.jpg",
             "pid_path": "pid_{}.pid", "cookie_path": "cookie_{}.dat",
             "spool_path": "post_{}.jsonl", "ids_path": "ids_{}.jsonl", "media": "media_{}_"}

    def __init__(self, listen: Optional[List[Row]] = None, **given: Any) -> None:
        self.flavour = flavour = flavour_named(given.get("flavor"))
        try:
            settings = Settings("controller", given, os.environ, flavour.environ)
        except ValueError as error:
            raise Refusal(str(error), 2) from None
        template = settings.given("template_path")
        if template:  # the operator may give a symlink; a file in tmpdir must not be one
            settings = settings.with_({"template_path": os.path.realpath(template)})
        settings.fill(tmpdir=check_tmpdir(settings.tmpdir), port=flavour.port,
                      backend_start_port=flavour.client_port)
        start = os.path.join(settings.tmpdir, flavour.file_prefix)
        settings.fill(pid_path=start + "controller_process.pid",
                      backend_path=start + "controller_backend.dat",
                      template_path=start + "controller_template.py")
        self.settings, self._start = settings, start
        self.inherited = {  # settings of clients in our environment: defaults for all of them
            name: value for name, value in from_environment(os.environ, flavour.environ).items()
            if SETTINGS[name].whose == "client" and name != "account"}
        self._addresses = listen or [{}]
        self.log = open_log(settings, f"[{flavour.ps}c][{os.getpid()}]")
        # Guards former, _turns, _dirty, the supervisor and its children. `settled` notifies those
        # who wait for the end of a child, of a trial, or of a turn().
        self.lock = threading.RLock()
        self.settled = threading.Condition(self.lock)
        self.timers = Timers(self.lock, self.log)
        self.pid = PidFile(settings.pid_path)
        self.auth = Auth(settings.token, settings.allowed_hosts)
        self.store = EventStore(STREAM_LIMIT, room=STREAM_BYTES)  # the events of all clients
        self.supervisor = Supervisor(self)
        self.former: Dict[str, Child] = {}    # remembered clients, which do not run
        self._turns: Set[str] = set()         # names of clients being started, stopped …
        self._dirty = False                   # the backend file must be written
        self._servers: List[Server] = []
        self._disk_queue = DiskQueue(start + "controller_post.jsonl", POST_QUEUE_LIMIT, self.log)
        self._poster = Poster(settings.post_api, settings.post_secret, self._disk_queue,
                              self.timers, self.log, lambda event, answer: None)
        self._closing: List[Callable[[], None]] = []

    def run(self) -> int:
        """Serve until stop() or a signal; returns the exit status."""
        self.pid.take("controller")
        for path in self.settings.backend_path, self.settings.template_path:
            remove_leftovers(path)
        try:
            self._open()
            self.timers.catch_signals(self._stop)
            self._begin()
            self.timers.run()
        finally:
            for close in self._closing:
                close()
            self.pid.drop()
        return 0

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the clients, then the controller."""
        self.timers.later(0.0, self._stop, number)

    # -- beginning

    def _open(self) -> None:
        """Make everything that clients need."""
        settings = self.settings
        self._listeners = [open_listener(address, settings) for address in self._addresses]
        host, port = self._listeners[0].getsockname()[:2]
        local = "127.0.0.1" if host == "0.0.0.0" else "[::1]" if host == "::" else (
            f"[{host}]" if ":" in host else host)
        self.url = f"http://{local}:{port}"
        settings.fill(public_url=f"http://127.0.0.1:{port}")
        self.network = LocalNetwork(
            self._start + "local", settings.world, self.flavour, self.log,
            lambda: str(settings.public_url), lambda name: name in self.supervisor.children)
        self._closing.append(self.network.stop)
        self.pages = LocalPages(self.network)
        self.key_for = self.pages.key_for
        if not read_file(settings.template_path):
            try:
                write_file(settings.template_path, default_template(self.flavour).encode())
            except OSError as error:
                raise Refusal(f"the template {settings.template_path} cannot be written: "
                              f"{error.strerror}") from None

    def _begin(self) -> None:
        """Begin posting and polling, start the clients, then serve: so callers find all of them."""
        settings, log = self.settings, self.log
        self._poster.flush()  # what a former process left
        if settings.poll_api:
            port = self._listeners[0].getsockname()[1]
            heartbeat = Heartbeat(settings.poll_api, settings.poll_interval, {port: self.url},
                                  settings.token, log)
            heartbeat.start()
            self._closing.append(heartbeat.stop)
        accounts = read_accounts(settings.accounts, log) if settings.accounts else {}
        for name, row in read_json(settings.backend_path, log).items():
            if isinstance(row, dict):
                self._recall(name, row, accounts.get(name, {}))
        for name, given in accounts.items():
            try:
                if name not in self.supervisor.children:
                    self.start_client(name, given)
            except OpenQQError as error:
                log.error(f"accounts file: {name} cannot be started: {error.status}")
        api = ControllerApi(self)
        app = App(self.auth, log, api.routes, api.proxy,
                  [prefix + path for prefix in PREFIXES for path in self.flavour.apis])
        children = self.supervisor.children
        app.metrics.watch("clients", "gauge", "Clients by state.", lambda: {
            f'state="{state}"': [child.seen() for child in list(children.values())].count(state)
            for state in (*NEXT_STATES, "failed") if state})
        app.metrics.watch("client_restarts_total", "counter", "Restarts of clients that had died.",
                          lambda: {"": self.supervisor.restarts})
        watch_posting(app.metrics, self._poster)
        log.info(f"OpenQQ {VERSION}, files in {settings.tmpdir}")
        self._servers += serve(app, self._listeners, settings, log)
        for listener in self._listeners:
            log.info("Listening at http://{}:{}".format(*listener.getsockname()))
        log.info(auth_hint(settings))
        log.info(f"start an account: {settings.public_url}{self.flavour.prefix}"
                 "start_client?client=NAME")

    def _recall(self, name: str, row: Row, anew: Dict[str, str]) -> None:
        """Remember a client of a former controller, and resume it if it ran; `anew` are its
        settings in the accounts file."""
        given: Dict[str, str] = {}
        for key, value in (row["given"] if isinstance(row.get("given"), dict) else {}).items():
            try:
                given.update(account_settings({key: value}))
            except ValueError as error:
                self.log.warn(f"client {name}: {error}; going on without")
        try:
            known = Child(check_name(name), renewed({}, given), port=_port(str(row.get("port"))))
            self.former[name] = known
            if self.settings.resume and row.get("run"):
                child = Child(name, renewed(known.given, anew),
                              open_port(self.settings.backend_start_port, known.port))
                child.forget = cleared(anew)
                with self.lock:
                    del self.former[name]
                    self.supervisor.resume(child, PidFile(self.path_of(child, "pid_path")))
        except (OpenQQError, ValueError) as error:
            self.log.warn(f"client {name} cannot be resumed: {error}")

    # -- clients; called within the client's turn(), without the lock

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Only one caller at a time starts, changes, stops or deletes a client."""
        with self.settled:
            self.settled.wait_for(lambda: name not in self._turns)
            self._turns.add(name)
        try:
            yield
        finally:
            with self.settled:
                self._turns.discard(name)
                self.settled.notify_all()

    def start_client(self, name: str, given: Dict[str, str]) -> Child:
        """Start a client that is not alive, with given and remembered settings. TooManyClients,
        NoPort, StartFailure, ClientDied, TooSlow."""
        supervisor = self.supervisor
        with self.lock:
            former = supervisor.children.get(name)
            supervisor.wait(lambda: not former or not former.busy())
            self.check_start()
            if any(other != name and other.lower() == name.lower() for other in (
                    *supervisor.children, *self.former)):
                raise NotAllowed("client name not allowed: it differs only in case from another")
            if former:
                self.remember(former)
            known = self.former[name].given if name in self.former else {}
            child = Child(name, renewed(known, given), open_port(
                self.settings.backend_start_port, former.port if former else 0))
            child.forget = cleared(given)
            supervisor.expect(child)
        supervisor.make(child, first=True)
        with self.lock:
            self.former.pop(name, None)
        return child

    def stop_client(self, child: Child, event: str = "client_stopped") -> None:
        """End a client, if it runs, and tell it to streams; check_client does not show it any more.
        Its settings are remembered, unless it is deleted."""
        with self.lock:
            self.supervisor.stop(child)
            self.changed()
            self.supervisor.wait(lambda: child.phase == "stopped")
            self.remember(child)
            if event == "client_deleted":
                del self.former[child.name]
            self._save()
        self.tell(child, event, [child.name], settings=child.open_settings())

    def remember(self, child: Child) -> None:
        """Keep the settings of a stopped client, until it is started again or deleted."""
        self.supervisor.children.pop(child.name, None)
        self.supervisor.release(child)
        for name in UNKEPT:
            child.given.pop(name, None)
        self.former.pop(child.name, None)  # the newest stands last
        self.former[child.name] = child
        keep_newest(self.former, MEMORY_LIMIT)

    def check_start(self, alive: bool = False) -> None:
        """NotRunning, TooManyClients or ClientDied, if no process may be made."""
        if self.supervisor.ending:
            raise NotRunning("stopping")
        children = self.supervisor.children
        if not alive and (len(children) >= MOST_WATCHED or self.settings.max_clients <= sum(
                child.alive() for child in children.values())):
            raise TooManyClients()
        data = read_file(self.settings.template_path) or b""
        try:
            compile(data, self.settings.template_path, "exec")
        except (SyntaxError, ValueError) as error:
            self.log.error(f"the template does not compile: {error}")
            raise ClientDied() from None

    def path_of(self, child: Child, setting: str) -> str:
        """The path of a client's file, or how the paths of its media begin."""
        given = child.given.get(setting)
        directory = _path(child.given.get("tmpdir", "")) or self.settings.tmpdir
        return str(_path(given)) if given else os.path.join(
            directory, self.flavour.file_prefix + self.FILES[setting].format(child.name))

    # -- telling others; with or without the lock

    def changed(self, seconds: float = 0.0) -> None:
        """Have the backend file written in so many seconds."""
        with self.lock:
            if not self._dirty:
                self._dirty = True
                self.timers.later(seconds, self._save)

    def _save(self) -> None:
        """Write the backend file: what the next controller resumes or remembers; no secrets."""
        self._dirty = False
        if self.supervisor.ending:
            return  # it says which clients ran when we were told to stop
        rows = {child.name: {"pid": child.pid, "port": child.port, "run": child.alive(),
                             "given": child.open_settings()}
                for child in [*self.former.values(), *self.supervisor.children.values()]}
        if not keep_file(self.settings.backend_path, to_bytes(rows), self.log):
            self.changed(REPLACE_SECONDS)

    def tell(self, child: Child, event: str, params: List[Json], **more: Json) -> Row:
        """Tell streams an event of a client, with ids as numbers if the client has numeric_ids."""
        given = {**self.inherited, **child.given}
        row = event_row(event, params)
        if SETTINGS["numeric_ids"].parse(given.get("numeric_ids", "0")):
            row = numbered(row)
        self.store.tell({**row, **more, "client": child.name})
        return row

    def report(self, child: Child, event: str, *params: Json) -> None:
        """Tell and post an event of a client; its first parameter is the client's name."""
        self._poster.add(self.tell(child, event, [child.name, *params]), "")
        self._poster.flush()

    # -- ending

    def _stop(self, number: int) -> None:
        def end(seconds: float) -> None:
            with self.settled:
                self.settled.wait_for(lambda: not self.supervisor.busy())
                self.log.info("stopped")
                self._disk_queue.close()
                self.timers.later(seconds, self.timers.stop)

        if not self.supervisor.ending:
            self.log.info(f"stopping ({signal.Signals(number).name})")
            self._save()
            busy = any([server.close_down() for server in self._servers])
            spawn(end, READ_SECONDS if busy else 0.0)  # callers must get their answers
        self.supervisor.stop_all()  # a second one hurries


class ControllerApi:
    """The controller's own API (CONTRACT 2), where do_NAME does the row NAME of VERBS, and the
    proxy to clients for all other calls."""

    def __init__(self, controller: Controller) -> None:
        self._controller, self._children = controller, controller.supervisor.children
        self._flavour, self._settings = controller.flavour, controller.settings
        verbs = [verb for verb in VERBS if verb.on in ("controller", "both")]
        self._own_paths = {prefix + verb.name for prefix in PREFIXES for verb in verbs}
        self.routes = all_routes(
            self._flavour, self._settings, verbs, lambda verb: getattr(self, "do_" + verb.name),
            lambda request: dashboard(self._flavour, self._settings, ""),
            self.from_bridge, controller.pages, True)

    def _name(self, request: Request) -> str:
        name = request.params.get("client", "")
        if not name:
            raise ClientMissing()
        return check_name(name)

    def _child(self, request: Request) -> Child:
        child = self._children.get(self._name(request))
        if child is None:
            raise ClientMissing("client not exists")
        return child

    def _pass_on(self, request: Request, trusted: bool = True, own: bool = False) -> Response:
        """A client's answer to a call, which is sent with our token, or with its `own` one."""
        child, token = self._child(request), self._settings.token
        if child.process is None:
            raise Unreachable()
        ours = bearer(token) if token else ""
        return pass_on(request, child.port,
                       request.fields.get("authorization", "") if own else ours, trusted)

    def do_start_client(self, request: Request) -> Row:
        """The answer contains the parameters as they were given, without secrets."""
        controller, name, settings = self._controller, self._name(request), self._settings
        given = check_params(request.keys())
        check_paths(given, settings.tmpdir,
                    rf"{self._flavour.file_prefix}{{}}_{re.escape(name)}\.\w+",
                    (settings.template_path, settings.backend_path, settings.pid_path,
                     settings.log_path, settings.accounts, settings.world))
        row: Row = {}
        for key, value in request.keys().items():
            setting = setting_named(key)
            if setting and not setting.secret:
                row[key] = tokens_apart({setting.name: value})[setting.name]
        with controller.turn(name):
            child = self._children.get(name)
            if child and child.alive():
                return {**row, **child.shown(), "account": name, "status": "client already exists"}
            return {**row, **controller.start_client(name, given).shown(), "account": name}

    def do_update_client(self, request: Request) -> Row:
        controller = self._controller
        with controller.turn(self._name(request)):
            child, given = self._child(request), check_params(request.keys(), paths=False)
            settings, forget = renewed(child.given, given), cleared(given)
            if settings != child.given or forget:
                with controller.lock:
                    controller.check_start(child.alive())
                    controller.changed()
                    controller.supervisor.renew(child, settings, forget | {
                        name for name in child.forget if name not in settings})
            return {**child.shown(), "account": child.name}

    def do_stop_client(self, request: Request) -> Row:
        with self._controller.turn(self._name(request)):
            child = self._child(request)
            self._controller.stop_client(child)
            return child.shown()

    def do_delete_client(self, request: Request) -> Row:
        """Also for a client that was stopped before."""
        controller, name = self._controller, self._name(request)
        with controller.turn(name):
            child = controller.former.get(name) or self._child(request)
            controller.stop_client(child, "client_deleted")
            controller.network.do(controller.network.delete, name)
            for setting in "cookie_path", "state_path", "spool_path", "qrcode_path", "ids_path":
                remove_file(controller.path_of(child, setting))
                remove_leftovers(controller.path_of(child, setting))
            MediaStore(controller.path_of(child, "media")).clear()
            return child.shown()

    def do_check_client(self, request: Request) -> Row:
        """What the state files say, but the state of a process that has ended."""
        rows = []
        for child in ([self._child(request)] if request.params.get("client") else
                      sorted(list(self._children.values()), key=lambda child: child.name)):
            row = read_json(self._controller.path_of(child, "state_path"), self._controller.log)
            with self._controller.lock:
                lives, seen = child.process and row.get("pid") == child.pid, child.seen()
            given = {**self._controller.inherited, **child.given}
            row.update(account=child.name, pid=child.pid, port=child.port, link=link_of(given.get),
                       restarts=max(0, child.restarts), since=str(int(child.since)))
            if not lives:
                row["state"] = seen
                if seen == "failed":
                    row.update(state="stop", failed=True)
                if child.lines:
                    row["error"] = "\n".join(child.lines)
            rows.append(row)
        return {"code": 0, "client": rows}

    def do_get_qrcode(self, request: Request) -> Response:
        child = self._child(request)
        path = self._controller.path_of(child, "qrcode_path")
        return qrcode_response(read_file(path) if child.process else None, self._flavour)

    def do_events(self, request: Request) -> Response:
        if request.params.get("client"):
            return self._pass_on(request)
        with self._controller.lock:  # first take what clients have told so far
            for child in self._children.values():
                self._controller.supervisor.listen(child)
        return self._controller.store.stream(request)

    def proxy(self, request: Request) -> Response:
        """Pass all other calls on to the client that is named."""
        if request.method == "OPTIONS":
            return Response(b"", "", fields=OPTIONS_FIELDS)
        if not re.match("/open(qq|wx)/.", request.path) or request.path in self._own_paths:
            raise ApiNotFound()                      # or with another method
        return self._pass_on(request)

    def from_bridge(self, request: Request) -> Response:
        """Pass a bridge's event on to its client, which checks it (ONEBOT.md, MILKY.md)."""
        request.read_url_only()
        child, is_milky = self._children.get(self._name(request)), request.path == "/milky"
        try:
            (Auth() if is_milky else self._controller.auth).check(request)
            trusted = True
        except AuthFailure:
            trusted = False
            if child is None or child.process is None:
                raise  # strangers must not learn which clients there are
        return self._pass_on(request, trusted, own=is_milky or not trusted)


# ------------------------------------------------------------------------------------------------
# 15. Command line
# ------------------------------------------------------------------------------------------------

def read_words(words: Sequence[str], stranger: str, flags: Mapping[str, str],
               plain: bool = False) -> Row:
    """Parse the words of a command line: a dict by the names of the flags, each with its action for
    argparse; with `plain`, `words` are the words that are no flags. Refusal on one line, which for
    an unknown flag ends with `stranger`."""
    import argparse  # 0.3 MiB that a controller's clients do not need

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            flag = message.partition(":")[0].replace("argument ", "")
            raise Refusal(
                f"{flag} takes no value" if "ignored" in message else
                f"{flag} needs a value; one that begins with -- is given as {flag}=VALUE", 2)

    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, action in flags.items():
        parser.add_argument("--" + name, action=action)
    if plain:
        parser.add_argument("words", nargs="*", default=[])
    try:  # with a NUL before it, a word with one dash is no flag for argparse
        texts = [re.sub("^-(?!-)", "\0-", typed_text(word)) for word in words]
    except ValueError as error:
        raise Refusal(f"a word is {error}", 2) from None
    found, strange = parser.parse_known_intermixed_args(texts)
    if strange:
        flag = strange[0].partition("=")[0].strip("\0")
        raise Refusal(f"{flag} {stranger}", 2)
    return {name: [word.strip("\0") for word in value] if isinstance(value, list) else
            value.strip("\0") if isinstance(value, str) else value
            for name, value in vars(found).items()}


def parse_flags(whose: str, words: Sequence[str]) -> Dict[str, str]:
    """Parse the flags of a controller or client: settings, under all of their names."""
    def flag(found: re.Match[str]) -> str:
        setting = setting_named(found.group(1))
        return "--" + (setting.name.replace("_", "-") if setting in settings else found.group(1))

    settings = [row for row in SETTINGS.values() if row.whose in (whose, "both")]
    return tokens_apart(read_words(
        [re.sub("^--([^=]+)", flag, word) for word in words],
        f"is not a setting of a {whose}; python openqq.py {whose} --help shows them",
        {row.name.replace("_", "-"): "store" for row in settings}))


def help_text(whose: str) -> str:
    """All settings of a controller or client, as --help shows them."""
    rows = [(f"  --{setting.name.replace('_', '-')} VALUE",
             f"{setting.help}{f' [{setting.shown()}]' if setting.shown() else ''}"
             f" | {setting.chinese}")
            for setting in SETTINGS.values()
            if setting.whose in (whose, "both") and not setting.idle]
    width = max(len(flag) for flag, _ in rows) + 2
    return (f"usage: python openqq.py {whose} [--setting value …]\n\n"
            "Each setting takes a value; booleans are 0 and 1, lists have commas. In the\n"
            "environment a setting is MOJO_WEBQQ_ and its name in capitals.\n"
            "每个设置带一个值；布尔值为 0 或 1，列表用逗号分隔。环境变量名为 MOJO_WEBQQ_ 加大写的设置名。\n\n"
            + "".join(f"{flag:{width}}{text}\n" for flag, text in rows))


# For glibc: one heap instead of one for each thread, and large buffers outside of it, so that
# memory goes back to the system after many callers came at once.
FRUGAL = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
          "MALLOC_TRIM_THRESHOLD_": "131072"}


def run_server(whose: str, given: Dict[str, str]) -> int:
    """Run a `controller`, or one account alone (`client`). First runs this file again without
    secrets in the command line, under a name for ps.

    All forms of ps show argv[0] only; it must keep the directory of Python, else a virtual
    environment would be lost.
    """
    flavour = flavour_named(given.get("flavor"))
    python = os.environ.pop("OPENQQ_PYTHON", "")
    if not python and sys.executable:
        account = given.get("account") or os.environ.get(flavour.environ + "ACCOUNT", "default")
        title = f"{flavour.ps}{whose}" + (f"({account})" if whose == "client" else "")
        environment = {name: value for name, value in FRUGAL.items() if name not in os.environ}
        environment.update({flavour.environ + name.upper(): value
                            for name, value in given.items() if SETTINGS[name].secret})
        if "token" in given:
            environment["OPENQQ_TOKEN"] = given["token"]
        flags = [f"--{name}={value}" for name, value in given.items() if not SETTINGS[name].secret]
        begin_again(os.path.join(os.path.dirname(sys.executable), title.replace("/", "_")),
                    ["-S", *python_words(whose, *flags)], OPENQQ_PYTHON=sys.executable,
                    **environment)
    sys.executable = python or sys.executable
    try:
        settings = Settings(whose, given, os.environ, flavour.environ)
    except ValueError as error:
        raise Refusal(str(error), 2) from None
    if settings.one_cpu:
        share_cpu(os.getpid())
    return Controller(None, **given).run() if whose == "controller" else run_client(**given)


def run_client(**given: str) -> int:
    """Run a client as the default template does."""
    client = Client(**given)
    client.load(["ShowMsg", "UploadQRcode", "ShowQRcode"])
    client.load(client.flavour.plugin, call_on_load=True)
    return client.run()


def run_child() -> int:
    """`--client`, which a controller starts: runs the template; the default one is built in, which
    is faster."""
    sys.executable = os.environ.pop("OPENQQ_PYTHON", sys.executable)
    sys.modules.setdefault("openqq", sys.modules[__name__])
    receive_sockets()
    life = os.environ.get("OPENQQ_LIFE", "")  # duplicated: the template may take the original
    line = socket.fromfd(int(life), socket.AF_INET, socket.SOCK_STREAM) if life else None
    path = os.environ.pop("OPENQQ_TEMPLATE", "")
    try:
        text = (read_file(path) or b"").decode("utf-8", "replace") if path else ""
        if text in ("", default_template(flavour_named(None))):
            return run_client()
        if line:
            spawn(end_with_controller, line)
        add_site_packages()
        exec(compile(text, path, "exec"), {"__name__": "__main__", "__file__": path})
        return 0
    except Exception as error:  # check_client shows why the client ends
        why = error.status if isinstance(error, OpenQQError) else f"{type(error).__name__}: {error}"
        if line:
            with contextlib.suppress(OSError):  # there is no controller any more
                line.send(to_bytes({"log": why[-1000:]}) + b"\n")
        raise


def end_with_controller(line: socket.socket) -> None:
    """End with the controller, even if the template never calls run()."""
    take_no_signals()
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        selector.select()
        time.sleep(ORPHAN_SECONDS - 1.0)  # run() needs less to end cleanly
        os._exit(1)


# -- the commands that call a server's API

def printable(text: str, is_json: bool = False) -> str:
    """Text that is safe for a terminal, since names and messages come from anybody. Control and
    formatting characters are escaped as in Python, in JSON as in JSON."""
    def spelt(sign: str) -> str:
        if sign.isprintable() or sign == ("\n" if is_json else "\u200d"):
            return sign
        if is_json:
            return json.dumps(sign)[1:-1]
        if sign.isspace() and sign not in "\t\n\r":
            return " "
        return sign.encode("unicode_escape").decode()

    return text if text.isprintable() else "".join(map(spelt, text))


def text_width(text: str) -> int:
    """The number of terminal columns of a text: two for a Chinese character."""
    import unicodedata  # 1 MiB that no server needs
    return sum(0 if unicodedata.category(sign) in ("Mn", "Me", "Cf") else
               2 if unicodedata.east_asian_width(sign) in ("W", "F") else 1 for sign in text)


def event_line(event: Row) -> Tuple[str, str]:
    """An event as one line of text, and its colour."""
    when = number_of(event.get("time"))
    clock = time.strftime("%H:%M:%S ", time.localtime(int(when))) if when else ""
    head = clock + str(event.get("client") or "")  # a client alone has but one account
    place = event.get("group") or event.get("discuss")
    content = event.get("content")
    if event.get("post_type") == "event":
        words = [param.get("displayname") or param.get("name") or param.get("id")
                 if isinstance(param, dict) else param for param in event.get("params") or []]
        return f"{head} · {' '.join(str(word)[:60] for word in [event.get('event'), *words])}", "36"
    if event.get("class") == "send":
        failed = "" if event.get("code") == 0 else f" [{event.get('msg')}]"
        return f"{head} → {event.get('receiver') or place}: {content}{failed}", "32"
    return f"{head} ← {event.get('sender')}{f'@{place}' if place else ''}: {content}", ""


class ApiAnswer:
    """An answer of the API: `value` is its JSON, or None, `row` the same if it is an object, `code`
    its code; `good`: it was done."""

    def __init__(self, reply: Reply) -> None:
        if reply.kind == "text/event-stream":
            raise Refusal("that is a stream without an end; the command events reads it", 2)
        self.status, self.kind, self.body = reply.status, reply.kind, reply.read(1 << 30)
        try:
            self.value = from_bytes(self.body) if self.kind == "application/json" else None
        except ValueError:
            self.value = None
        self.row = object_of(self.value)
        self.code = self.row["code"] if isinstance(self.row.get("code"), int) else 0
        self.good = self.status < 300 and self.code == 0

    def refusal(self) -> Refusal:
        """The Refusal for an answer that is not good: exit status 3 for a proxy's error, else 1."""
        if self.value is None and self.status in (502, 503, 504):
            return Refusal(f"nobody behind that URL: HTTP {self.status}", 3)
        if not self.row:  # a client alone says so in plain text
            text = self.body[:60].decode("utf-8", "replace")
            return Refusal(f"HTTP {self.status} {text}".strip())
        text = str(self.row.get("status") or self.row.get("reply_status") or "no")
        state = f", it is {self.row['state']}" if "state" in self.row else ""
        return Refusal(f"{text}{state} (code {self.code})")


class Terminal:
    """The commands in COMMANDS, each a method of that name, with the words of the command line as
    arguments. Refusal for errors, Unreachable if nobody answers."""

    WATCH_SECONDS = 1.0
    STATES = {"running": "32", "stop": "2", "failed": "31"}  # their colours; the others' is yellow
    # Calls that only read use GET; others are posted, so that logs do not contain them.
    READS = re.compile(r"(?:/open(?:qq|wx)/)?(?:get_|check_client|openapi|events)|"
                       r"/local/(?:world|scan)|/healthz|/metrics|/$")

    def __init__(self, url: str, token: str, is_raw: bool, watch: bool) -> None:
        try:
            origin_of(url)
        except ValueError as error:
            raise Refusal(f"--url: {error}; it looks like http://127.0.0.1:4000", 2) from None
        self._url, self._is_raw, self._watch = url.rstrip("/"), is_raw, watch
        self._fields = {"Authorization": bearer(token)} if token else {}
        self._is_console = is_console(sys.stdout)
        self._can_move = self._is_console and os.environ.get("TERM", "dumb") != "dumb"
        self._has_colors = self._can_move and not os.environ.get("NO_COLOR")

    def _open(self, api: str, params: Mapping[str, str]) -> Reply:
        """Call the API. `client` is always in the query, where proxies look for it."""
        url = self._url + (api if api.startswith("/") else "/openqq/" + api)
        reads, fields, body = self.READS.match(api) is not None, dict(self._fields), None
        query = {name: value for name, value in params.items() if reads or name == "client"}
        if not reads:
            fields["Content-Type"] = "application/x-www-form-urlencoded"
            body = urllib.parse.urlencode(
                {name: value for name, value in params.items() if name not in query}).encode()
        return fetch(url + ("?" + urllib.parse.urlencode(query) if query else ""),
                     "GET" if reads else "POST", fields, body, PROXY_SECONDS + KILL_SECONDS,
                     repeat=reads)

    def _ask(self, api: str, **params: str) -> ApiAnswer:
        return ApiAnswer(self._open(api, params))

    def _show_raw(self, said: ApiAnswer) -> None:
        is_json = said.kind == "application/json"
        if not self._is_console:
            sys.stdout.buffer.write(said.body + (b"\n" if is_json else b""))
        elif is_json:
            print(printable(said.body.decode("utf-8", "replace"), True))
        else:
            raise Refusal(f"{len(said.body)} bytes of {said.kind or 'nothing'}: "
                          "not for a terminal, write them to a file")

    def _color(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._has_colors and code else text

    def _finish(self, said: ApiAnswer, is_json: bool = True) -> bool:
        """Print the answer, with --json; else return True: it is still to be shown. Refusal if it
        is not good, or not from a server of ours."""
        if self._is_raw:
            self._show_raw(said)
        if not said.good:
            raise said.refusal()
        if is_json and not self._is_raw and not said.row:
            raise Refusal("what answers at that URL does not speak this API", 3)
        return not self._is_raw

    def _say(self, said: ApiAnswer, *names: str) -> None:
        """Print the status of an answer, and some of its members."""
        if self._finish(said):
            words = [f"{name} {said.row[name]}" for name in names if name in said.row]
            print(printable(", ".join([str(said.row.get("status")), *words])))

    def _check_account(self, name: str) -> None:
        """Refusal if there is no such account: a client alone ignores `client` in these calls,
        since bots may give any name."""
        said = self._ask("check_client", client=name)
        if said.code == ClientMissing.code:
            self._finish(said)

    def status(self, *names: str) -> None:
        """Print a table of the accounts; with --watch again and again, also after errors."""
        for turn in itertools.count():
            try:
                said = self._ask("check_client", **{"client": name for name in names})
                if self._finish(said):
                    clear = "\x1b[H\x1b[J" if self._watch and self._can_move else ""
                    print(clear + self._table(rows_of(said.row.get("client"))))
                sys.stdout.flush()
            except (Refusal, Unreachable) as error:
                if not turn:
                    raise
                print(f"openqq: {printable(error.status)}", file=sys.stderr)
            if not self._watch:
                return
            time.sleep(self.WATCH_SECONDS)  # nothing tells when states change

    def _table(self, accounts: List[Row]) -> str:
        """The answer of check_client as a table; empty columns are left out."""
        rows = [["ACCOUNT", "STATE", "PORT", "PID", "UP", "RESTARTS", "ERROR"]]
        for account in accounts:
            state = "failed" if account.get("failed") else account.get("state")
            since, up = number_of(account.get("start_time")), ""
            is_alive = state not in ("stop", "failed")
            if is_alive and since:
                seconds = max(0, int(time.time() - int(since)))
                parts = [(seconds // 86_400, "d"), (seconds // 3600 % 24, "h"),
                         (seconds // 60 % 60, "m"), (seconds % 60, "s")]
                up = " ".join([f"{count}{unit}" for count, unit in parts if count][:2]) or "0s"
            rows.append([printable(str(cell or "")) for cell in (
                account.get("account"), state, account.get("port"),
                is_alive and account.get("pid"), up, account.get("restarts"),
                account.get("error"))])
        if not accounts:
            return "no accounts; start NAME makes one"
        filled = [place for place, (_, *cells) in enumerate(zip(*rows)) if place < 2 or any(cells)]
        rows = [[cells[place] for place in filled] for cells in rows]
        widths = [max(map(text_width, column)) for column in zip(*rows)]
        columns = os.get_terminal_size(sys.stdout.fileno()).columns if self._is_console else 0
        room = columns - sum(widths[:-1]) - 2 * len(widths)  # for the last column
        lines = []
        for place, row in enumerate(rows):
            while columns and len(row[-1]) > 1 and text_width(row[-1]) > room:
                row[-1] = row[-1][:-2] + "…"
            cells = [cell + " " * (width - text_width(cell)) for cell, width in zip(row, widths)]
            if place:
                cells[1] = self._color(cells[1], self.STATES.get(row[1], "33"))
            line = "  ".join(cells).rstrip()
            lines.append(line if place else self._color(line, "1"))
        return "\n".join(lines)

    def start(self, name: str, *settings: str) -> None:
        """Start an account with settings of its own."""
        self._say(self._ask("start_client", **{**parse_pairs(settings), "client": name}),
                  "pid", "port")

    def stop(self, name: str) -> None:
        """Stop an account."""
        self._say(self._ask("stop_client", client=name), "pid", "port")

    def qrcode(self, name: str) -> None:
        """Draw the QR code of an account; without colours for a dark screen. It is read from the
        picture: its text, which lets anybody log in, must not be in answers."""
        self._check_account(name)
        said = self._ask("get_qrcode", client=name)
        if said.status == 404:
            raise Refusal(f"{name} has no QR code to scan; status says what it does")
        if self._finish(said, False):
            try:
                text = qr_text(qr_unpng(said.body))
            except ValueError as error:
                raise Refusal(f"the picture cannot be read: {error}") from None
            if not self._has_colors:
                text = re.sub("\x1b\\[[0-9;]*m", "", text).translate(str.maketrans(" ▀▄█", "█▄▀ "))
            print(text.rstrip("\n"))

    def send(self, name: str, kind: str, who: str, text: str) -> None:
        """Send a message to somebody by uid, id or name."""
        if kind not in ("friend", "group", "discuss"):
            raise Refusal(f"{kind!r} is not friend, group or discuss", 2)
        self._check_account(name)
        for key in "uid", "id", "name", "displayname":
            said = self._ask(f"send_{kind}_message",
                             **{"client": name, key: who, "content": text})
            if said.code not in (100, 101, 102):
                break
        self._say(said, "id")

    def events(self, *names: str) -> None:
        """Print the events of one account or of all as they come; first those that are kept."""
        client = {"client": name for name in names}
        reply = self._open("events", {"since": "0", **client})
        if reply.kind != "text/event-stream":
            raise ApiAnswer(reply).refusal()
        for data in server_sent(reply.pieces(PROXY_SECONDS)):
            event = {**client, **(object_in(data) or {})}
            if self._is_raw:
                text = to_bytes(event).decode()
                print(printable(text, True) if self._is_console else text, flush=True)
            else:
                text, color = event_line(event)
                print(self._color(printable(text), color), flush=True)
        raise Refusal("the stream of events has ended")

    def call(self, api: str, *pairs: str) -> None:
        """Call the API, and print the answer: indented, or with --json as it came."""
        said = self._ask(api, **parse_pairs(pairs))
        if self._finish(said, False):
            if said.value is None:
                return self._show_raw(said)
            text = json.dumps(said.value, ensure_ascii=False, indent=2)
            print(printable(text, True))


def parse_pairs(words: Sequence[str]) -> Dict[str, str]:
    """Words key=value as parameters; Refusal with exit status 2."""
    for word in words:
        if not word.partition("=")[1] or word.startswith("="):
            raise Refusal(f"{word!r} must be key=value", 2)
    return {name: value for name, _, value in (word.partition("=") for word in words)}


# command -> the words behind it, how many there may be, what it is for
COMMANDS: Dict[str, Tuple[str, int, int, str]] = {
    "status": ("[NAME] [--watch]", 0, 1, "the accounts, their states and errors  帐号、状态和错误"),
    "start": ("NAME [setting=value …]", 1, 99, "start an account  启动帐号"),
    "stop": ("NAME", 1, 1, "stop it  停止帐号"),
    "qrcode": ("NAME", 1, 1, "draw the code that it waits with  显示待扫的二维码"),
    "send": ("NAME friend|group|discuss WHO TEXT", 4, 4, "send to a uid, id or name  发送消息"),
    "events": ("[NAME]", 0, 1, "what accounts hear and send, as it comes  实时收发的消息和事件"),
    "call": ("API [key=value …]", 1, 99, "any call of the API  任意 API 调用"),
}

USAGE = """\
usage: python openqq.py controller [--setting value …]    many accounts, API on port 4000
       python openqq.py client [--account NAME] [--setting value …]    one account, port 5000
       python openqq.py controller --help                 all settings
       python openqq.py --version

These call the API of a controller, or of one account alone, that runs:
""" + "".join(f"  {name + ' ' + words:46} {what}\n"
              for name, (words, _, _, what) in COMMANDS.items()) + """
  --url URL      where it is, also in $OPENQQ_URL [http://127.0.0.1:4000]
  --token TOKEN  what it wants to know, also in $OPENQQ_TOKEN
  --json         print what came
  --             what follows is no flag, whatever it begins with
Exit status: 0, 1 when the API says no, 2 for a wrong call, 3 when nobody answers.
"""


def run_command(command: str, words: Sequence[str]) -> int:
    """Run a command that calls the API; its exit status. Refusal."""
    usage, least, most, _ = COMMANDS[command]
    url = os.environ.get("OPENQQ_URL") or f"http://127.0.0.1:{QQ.port}"
    try:
        flags = read_words(
            words, f"is not a flag of {command}; a text that begins so stands behind --",
            {"url": "store", "token": "store", "json": "store_true",
             **({"watch": "store_true"} if command == "status" else {})}, plain=True)
        plain, url = flags["words"], flags.get("url") or url
        if not least <= len(plain) <= most:
            raise Refusal(f"usage: python openqq.py {command} {usage}", 2)
        if "token" in flags and sys.executable:  # ps would show it to everybody
            again = [f"--url={url}", *(f"--{name}" for name in ("json", "watch") if name in flags)]
            begin_again(sys.executable, python_words(command, *again, "--", *plain),
                        OPENQQ_TOKEN=flags["token"])
        token = flags.get("token") or os.environ.get("OPENQQ_TOKEN", "")
        getattr(Terminal(url, token, "json" in flags, "watch" in flags), command)(*plain)
    except Unreachable as error:
        raise Refusal(printable(f"{url} is not reachable: {error.status}; does a controller run "
                                "there, or is --url another one?"), 3) from None
    except Refusal as refusal:  # it contains text of others
        raise Refusal(printable(refusal.status), refusal.exit) from None
    except KeyboardInterrupt:
        return 130
    return 0


def written(write: Callable[[], Optional[int]]) -> int:
    """Run what writes to standard output; its exit status. Refusal if it cannot be written."""
    out: Any = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    out.reconfigure(errors="backslashreplace")
    sys.stdout = out
    try:
        status = write() or 0
        out.flush()
        return status
    except OSError as error:  # of standard output: errors of servers are Unreachable
        # Python would write the rest of the buffer at the end: it goes to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if not isinstance(error, BrokenPipeError):
            raise Refusal(f"the output cannot be written: {error.strerror}") from None
        return 0  # the reader has ended


def main(words: Sequence[str]) -> int:
    """The program; exit status 0, 1 for a refusal, 2 for a wrong call, 3 if nobody answers."""
    prepare_console()
    if not words and has_own_window():
        try:
            if main(["controller"]) == 0:
                return 0
        except Exception:
            traceback.print_exc()
        input("[Enter]")  # else the window would close at once
        return 1
    command, rest = words[0] if words else "", words[1:]
    is_server = command in ("controller", "client")
    text = {"--version": f"OpenQQ {VERSION}\n", "--help": USAGE, "-h": USAGE}.get(command, "")
    if is_server and {"-h", "--help"} & set(rest):
        text = help_text(command)
    elif command in COMMANDS and rest in (["-h"], ["--help"]):
        text = USAGE
    try:
        if command == "--client":
            return run_child()
        if text:
            return written(lambda: print(text, end=""))
        if is_server:
            return run_server(command, parse_flags(command, rest))
        if command in COMMANDS:
            return written(lambda: run_command(command, rest))
        status, text = 2, f"openqq: there is no command {command!r}\n" if command else ""
        text += USAGE
    except Refusal as refusal:
        status, text = refusal.exit, f"openqq: {refusal.status}\n"
    with contextlib.suppress(AttributeError, OSError, ValueError):  # the exit status says it, too
        write_stderr(text.encode("utf-8", "backslashreplace"))
    return status


def command_line() -> None:
    """What runs the file."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    command_line()
