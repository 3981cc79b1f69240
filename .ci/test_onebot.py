"""The OneBot link and the test suite's own bridge, judged by programs of others.

Run by .ci/run in an environment that has ncatbot (whose NapCat mock server is a bridge that nobody
here wrote) and nonebot-adapter-onebot (whose models say what a bridge may send).
"""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from test_openqq import (Bridge, Log, closing, cq_segments, cq_string,  # noqa: E402,F401
                         receive, start)

MOCK = """\
import asyncio, json, sys
from ncatbot.utils.testing.mock_server import NapCatMockServer, ScenarioBuilder

async def main(port, token=None):
    data = (ScenarioBuilder(bot_id="10001", bot_name="阿猫").add_friend("20001", "小明", "老明")
            .add_group("30001", "一家人", bot_role="owner")
            .add_group_member("30001", "20001", "小明").build())
    server = NapCatMockServer(host="127.0.0.1", port=int(port), token=token, initial_data=data)
    await server.start()
    print("ready", file=sys.stderr, flush=True)
    loop = asyncio.get_running_loop()
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        order = json.loads(line or '{"quit": 1}')
        if "quit" in order:
            return
        if "inject" in order:
            await server.inject_event(order["inject"])
        calls = json.dumps(server.get_call_history(), ensure_ascii=False)
        print("calls", calls, file=sys.stderr, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


class Mock:
    """ncatbot's NapCat, in a process of its own."""

    def __init__(self, *token):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.url = f"ws://127.0.0.1:{sock.getsockname()[1]}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", MOCK, self.url.rpartition(":")[2], *token],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            cwd=tempfile.mkdtemp())  # it writes its logs wherever it stands
        self.log = Log(self.process.stderr)
        self.log.wait("^ready")
        self.orders = 0

    def order(self, **words):
        """Let it do something; the actions that it has been asked for so far."""
        self.orders += 1
        self.process.stdin.write(json.dumps(words).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.log.wait("^calls (.*)", self.orders).group(1))

    def stop(self):
        self.process.kill()  # its own end waits ten seconds for each connection
        self.process.wait()


@pytest.fixture
def mock():
    mocks = []

    def begin(*token):
        mocks.append(Mock(*token))
        return mocks[-1]

    yield begin
    for one in mocks:
        one.stop()


def test_an_account_works_on_a_bridge_that_others_wrote(mock, start, receive):  # noqa: F811
    bridge, bot = mock(), receive()
    client = start("client", "--account", "me", "--onebot-api", bridge.url, "--post-api", bot.url,
                   "--send-interval", "0")
    client.log.wait("logged in")
    assert client.call("get_user_info")["uid"] == "10001"
    [friend] = client.call("get_friend_info")
    assert (friend["uid"], friend["name"], friend["markname"]) == ("20001", "小明", "老明")
    [group] = client.call("get_group_info")
    assert (group["name"], group["role"]) == ("一家人", "create")
    assert {member["uid"] for member in group["member"]} == {"10001", "20001"}
    for api, params in (("send_friend_message", {"uid": "20001"}),
                        ("send_group_message", {"uid": "30001"})):
        sent = client.call(api, content="a [CQ:at,qq=1] b", **params)
        assert (sent["code"], sent["info"]) == (0, "发送正常"), sent
        assert client.call("revoke_message", id=sent["id"])["status"] == "revoke success"
    assert client.call("shutup_group_member", group_uid="30001", member_uid="20001",
                       time=2)["code"] == 0
    assert client.call("kick_group_member", group_uid="30001", member_uid="20001")["code"] == 0
    calls = {call["action"]: call["params"] for call in bridge.order()}
    assert calls["send_group_msg"]["message"] == [
        {"type": "text", "data": {"text": "a [CQ:at,qq=1] b"}}]
    assert calls["set_group_ban"]["duration"] == 120
    assert calls["set_group_kick"]["user_id"] == "20001"
    bridge.order(inject={
        "post_type": "message", "message_type": "private", "sub_type": "friend", "time": 1,
        "self_id": 10001, "user_id": 20001, "message_id": "5", "raw_message": "hi", "font": 0,
        "message": [{"type": "text", "data": {"text": "hi"}}],
        "sender": {"user_id": 20001, "nickname": "小明"}})
    assert bot.message("hi")["sender"] == "老明"


def test_a_refusal_after_the_handshake_is_said_in_words(mock, start):  # noqa: F811
    bridge = mock("secret")
    client = start("client", "--account", "me", "--onebot-api", bridge.url)
    client.log.wait("refuses onebot_token: Token 验证失败")


# -- what a bridge may send, by NoneBot's models

def models_of(row):
    """The model of NoneBot's that a row fits, by name; the most special one comes first."""
    from nonebot.adapters.onebot.v11 import Adapter
    for model in Adapter.get_event_model(row):
        try:
            return type(model(**row)).__name__
        except ValueError:
            pass
    return None


EVENTS = {
    "PrivateMessageEvent": lambda bridge: bridge.say_private(20001, "a&amp;b[CQ:at,qq=1]"),
    "GroupMessageEvent": lambda bridge: bridge.say_group(
        30001, 20001, [{"type": "text", "data": {"text": "[喂],"}}]),
    "GroupIncreaseNoticeEvent": lambda bridge: bridge.emit(
        notice_type="group_increase", sub_type="approve", group_id=30001, user_id=9,
        operator_id=10001),
    "GroupDecreaseNoticeEvent": lambda bridge: bridge.emit(
        notice_type="group_decrease", sub_type="kick", group_id=30001, user_id=9,
        operator_id=10001),
    "GroupAdminNoticeEvent": lambda bridge: bridge.emit(
        notice_type="group_admin", sub_type="set", group_id=30001, user_id=9),
    "FriendAddNoticeEvent": lambda bridge: bridge.emit(notice_type="friend_add", user_id=9),
    "GroupRecallNoticeEvent": lambda bridge: bridge.emit(
        notice_type="group_recall", group_id=30001, user_id=9, operator_id=9, message_id=7),
    "FriendRecallNoticeEvent": lambda bridge: bridge.emit(
        notice_type="friend_recall", user_id=9, message_id=7),
    "FriendRequestEvent": lambda bridge: bridge.emit(
        request_type="friend", user_id=9, comment="hi", flag="f"),
    "HeartbeatMetaEvent": lambda bridge: bridge.emit(
        meta_event_type="heartbeat", interval=30000, status={"online": True, "good": True}),
    "LifecycleMetaEvent": lambda bridge: bridge.emit(
        meta_event_type="lifecycle", sub_type="connect"),
}


@pytest.mark.parametrize("ids", [int, str])
@pytest.mark.parametrize("name", EVENTS)
def test_the_bridge_of_the_tests_sends_what_a_bridge_may_send(name, ids):
    bridge = Bridge(ids=ids)
    try:
        assert models_of(EVENTS[name](bridge)) == name
    finally:
        bridge.stop()


@pytest.mark.parametrize("text", [
    "a&amp;b[CQ:at,qq=1] c", "[CQ:image,file=a&#44;b=c&#91;&amp;&#93;,url=http://x/?a=1]", "[x]",
    "&#91;CQ:at&#44;qq=all&#93;", "[CQ:shake]", "a&#44;b", "[CQ:face,id=1][CQ:face,id=2]"])
def test_cq_codes_are_read_as_others_read_them(text):
    import openqq
    from nonebot.adapters.onebot.v11 import Message
    theirs = [{"type": part.type, "data": part.data} for part in Message(text)]
    assert openqq.segments_of(text) == cq_segments(text) == theirs
    assert openqq.segments_of(openqq.cq_text(theirs)) == openqq.segments_of(cq_string(theirs))
