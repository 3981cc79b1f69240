"""The tests' WeChat server, by clients that others wrote for Tencent's own.

Run by .ci/run, which installs weixin-ilink, openilink-sdk-python and wechatbot-sdk; and our AES
against pycryptodome's.
"""
from __future__ import annotations

import asyncio
import os
import sys
import threading

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from test_openqq import PNG, ILink, openqq  # noqa: E402


@pytest.fixture
def tencent():
    server = ILink(hold=0.5)
    yield server
    server.stop()


def phone(server):
    """What the person does: scan, confirm, say something, send a picture."""
    server.wait_call("get_qrcode_status")
    server.scan()
    server.wait_call("get_qrcode_status")
    server.confirm()
    server.say("你好")
    server.say(server.picture(PNG, "base64 of hex"))


def with_phone(server):
    threading.Thread(target=phone, args=(server,), daemon=True).start()


def test_weixin_ilink_logs_in_receives_sends_and_fetches_a_picture(tencent, tmp_path):
    from weixin_ilink import ILinkClient, login_with_qr
    with_phone(tencent)
    shown = []
    login = login_with_qr(shown.append, base_url=tencent.url)
    assert shown == [f"https://liteapp.weixin.qq.com/q/{tencent.code}"]
    client = ILinkClient(login.base_url, login.bot_token, cdn_base_url=tencent.url)
    messages = []
    while len(messages) < 2:
        messages += client.poll()["msgs"]
    assert client.extract_text(messages[0]) == "你好"
    assert client.download_media_item(messages[1]["item_list"][0]) == PNG
    (tmp_path / "a.png").write_bytes(PNG)
    token = messages[1]["context_token"]
    client.send_text(tencent.owner, "你也好", token)
    client.send_image(tencent.owner, tmp_path / "a.png", token)
    assert tencent.sent[0]["item_list"] == [{"type": 1, "text_item": {"text": "你也好"}}]
    assert tencent.got(1) == PNG


def test_openilink_logs_in_receives_and_sends(tencent):
    from openilink import Client
    from openilink.auth import login_with_qr
    with_phone(tencent)
    client = Client(base_url=tencent.url, cdn_base_url=tencent.url)
    assert login_with_qr(client).connected
    updates = client.get_updates()
    while len(updates.msgs) < 2:
        updates.msgs += client.get_updates(updates.get_updates_buf).msgs
    assert updates.msgs[0].item_list[0].text_item.text == "你好"
    client.send_text(tencent.owner, "你也好", updates.msgs[0].context_token)
    assert tencent.sent[0]["item_list"][0]["text_item"] == {"text": "你也好"}


def test_wechatbot_logs_in_receives_sends_and_fetches_a_picture(tencent, tmp_path, monkeypatch):
    import wechatbot.auth
    from wechatbot import WeChatBot
    monkeypatch.setattr(wechatbot.auth, "FIXED_QR_BASE_URL", tencent.url)
    bot = WeChatBot(cred_path=str(tmp_path / "login.json"), on_qr_url=lambda url: None)
    got = []

    @bot.on_message
    async def hear(message):
        got.append(message.text)
        if message.images:
            got.append((await bot.download_raw(message.images[0].media)))
            bot.stop()
        else:
            await bot.reply(message, "你也好")

    async def live():
        await bot.login()
        bot._base_url = tencent.url
        await asyncio.wait_for(bot.start(), 20)

    with_phone(tencent)
    import wechatbot.client
    for module in (wechatbot.client, sys.modules["wechatbot.protocol"]):
        for name in dir(module):
            if name.endswith("CDN_BASE_URL"):
                monkeypatch.setattr(module, name, tencent.url)
    asyncio.run(live())
    assert got[0] == "你好" and PNG in got
    assert tencent.sent[0]["item_list"][0]["text_item"] == {"text": "你也好"}


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4095, 100_000])
def test_our_aes_is_that_of_others(size):
    from Crypto.Cipher import AES
    from Crypto.Util.Padding import pad
    key, data = os.urandom(16), os.urandom(size)
    wanted = AES.new(key, AES.MODE_ECB).encrypt(pad(data, 16))
    assert openqq.aes_128_ecb(key, data, True) == wanted
    assert openqq.aes_128_ecb(key, wanted, False) == data
