"""The test suite's Milky bridge, judged by programs of others.

Run by .ci/run in an environment that has milky-python-sdk, with the folder of an npm install of
@saltify/milky-types in MILKY_TYPES: its zod schemas say what calls take, and answers and events are.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from test_openqq import (MILKY_SAID, MILKY_TOLD, MilkyBridge, closing,  # noqa: E402,F401
                         receive, start)

JUDGE = """\
import * as milky from "@saltify/milky-types";
import { readFileSync } from "fs";
const apis = Object.assign({}, ...Object.values(milky.zodApiCategories).map((row) => row.apis));
const wrong = [];
for (const [what, name, value] of JSON.parse(readFileSync(0, "utf8"))) {
  const schema = what === "event" ? milky.Event :
    apis[name] && apis[name][what === "call" ? "requestSchema" : "responseSchema"];
  if (schema === undefined) wrong.push([what, name, "there is none"]);
  const result = schema && schema.safeParse(value);
  if (result && !result.success) wrong.push([what, name, result.error.issues]);
}
console.log(JSON.stringify(wrong));
"""


def misfits(rows):
    """What the schemas say against (call, answer or event; name; value)."""
    file = os.path.join(os.environ["MILKY_TYPES"], "judge.mjs")
    with open(file, "w", encoding="utf-8") as out:
        out.write(JUDGE)
    done = subprocess.run(["node", file], input=json.dumps(rows).encode(), stdout=subprocess.PIPE,
                          check=True)
    return json.loads(done.stdout)


@pytest.fixture
def bridge():
    one = MilkyBridge(token="t0ken")
    yield one
    one.close()


def test_the_judge_sees_what_is_wrong():
    assert len(misfits([["event", "", {}], ["answer", "get_login_info", {"uin": "10001"}],
                        ["call", "send_group_message", {"group_id": "30001", "message": []}],
                        ["call", "get_nothing", {}]])) == 4


def test_another_client_of_milkys_gets_on_with_the_bridge_of_the_tests(bridge):
    from milky import MilkyClient
    from milky.models import MessageScene
    with MilkyClient(bridge.url, "t0ken") as client:
        assert client.get_login_info().uin == 10001
        assert client.get_impl_info().impl_name == "TestBridge"
        assert [friend.remark for friend in client.get_friend_list()] == ["老明", ""]
        assert client.get_group_list()[0].group_name == "一家人"
        assert [row.card for row in client.get_group_member_list(30001)] == ["", "爸", ""]
        assert client.get_user_profile(20001).nickname == "小明"
        bridge.say_group(30001, 40001, "喂")
        [said], _ = client.get_history_messages(MessageScene.GROUP, 30001)
        assert said.segments[0].data.text == "喂"
        assert client.get_message(MessageScene.GROUP, 30001, said.message_seq).sender_id == 40001
        heard = []

        def listen():
            for event in client.events_sse():
                heard.append(event)
                return

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        bridge.connected()
        bridge.say_private(20001, "你好")
        thread.join(20)
        assert heard[0]["data"]["segments"][0]["data"]["text"] == "你好"
    assert not bridge.faults


def test_what_the_bridge_of_the_tests_tells_fits_the_schemas(bridge):
    rows = [["event", kind, bridge.emit(kind, **data)] for kind, (data, _) in MILKY_TOLD.items()]
    for kind, data, _ in MILKY_SAID:
        if kind not in ("new_thing", "markdown"):  # markdown is of 1.3
            bridge.say_group(30001, 40001, [{"type": kind, "data": data}])
    bridge.say_private(20001, "好")
    bridge.say("temp", 50001, 50001, "好", group=None)
    rows += [["event", "", {"time": 1, "self_id": 10001, "event_type": "message_receive",
                            "data": row}] for said in bridge.said.values() for row in said]
    seq = bridge.seqs["friend", 20001]
    for name, params in {
            "get_login_info": {}, "get_impl_info": {}, "get_friend_list": {}, "get_group_list": {},
            "get_friend_info": {"user_id": 20001}, "get_user_profile": {"user_id": 20001},
            "get_group_info": {"group_id": 30001}, "get_group_member_list": {"group_id": 30001},
            "get_group_member_info": {"group_id": 30001, "user_id": 40001},
            "send_group_message": {"group_id": 30001, "message": []},
            "get_message": {"message_scene": "friend", "peer_id": 20001, "message_seq": seq},
            "get_history_messages": {"message_scene": "group", "peer_id": 30001},
            "get_group_notifications": {}, "upload_private_file": {
                "user_id": 20001, "file_uri": "base64://", "file_name": "a"},
            "get_resource_temp_url": {"resource_id": "R"}}.items():
        status, row = bridge._answer(name, params)
        assert (status, row["status"]) == (200, "ok"), row
        rows += [["call", name, params], ["answer", name, row["data"]]]
    assert misfits(rows) == []


def test_what_an_account_asks_of_a_bridge_fits_the_schemas(start, receive, bridge):  # noqa: F811
    bot = receive()
    client = start("client", "--account", "me", "--milky-api", bridge.url, "--milky-token", "t0ken",
                   "--post-api", bot.url, "--send-interval", "0", "--post-event-list",
                   "friend_request,group_request")
    client.log.wait("logged in")
    bridge.connected()
    bridge.say_group(30001, 40001, "喂")
    said = bot.message("喂")
    client.call("get_group_info")
    place = {"group_uid": "30001", "member_uid": "40001"}
    for path, params in (
            ("send_group_message", {"uid": "30001", "content": "看[CQ:face,id=14]", "cq": "1",
                                    "reply_to": said["id"], "at": "40001,all", "media_url":
                                    "http://h.example/a.png"}),
            ("send_friend_message", {"uid": "20001", "content": "好"}),
            ("shutup_group_member", {"time": "1", **place}), ("get_message", {"id": said["id"]}),
            ("shutup_group_member", {"time": "0", **place}), ("revoke_message", {"id": said["id"]}),
            ("set_group_card", {"card": "片", **place}), ("set_group_title", {"title": "衔", **place}),
            ("set_group_admin", {"admin": "1", **place}), ("poke", {"uid": "20001"}),
            ("kick_group_member", place)):
        client.call(path, **params)
    for kind in ("friend_request", "group_join_request", "group_invitation"):
        bridge.emit(kind, **MILKY_TOLD[kind][0])
        event = bot.next(lambda row: row.get("event") in ("friend_request", "group_request"))
        for accept in "1", "0":
            answer = client.call("accept_" + event["event"], ticket=event["params"][0]["ticket"],
                                 accept=accept)
            assert answer["code"] == 0, answer
    assert len({name for name, _ in bridge.calls}) > 18, bridge.calls
    assert misfits([["call", name, params] for name, params in bridge.calls]) == []
    assert not bridge.faults
