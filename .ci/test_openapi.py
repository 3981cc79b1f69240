"""The API's description, judged by openapi-spec-validator. Run by .ci/run, which installs it."""
from __future__ import annotations

import os
import sys

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from test_openqq import call, closing, start  # noqa: E402,F401


@pytest.mark.parametrize("words", [
    ["controller"], ["client"], ["controller", "--flavor", "weixin"],
    ["client", "--flavor", "weixin"], ["controller", "--token", "geheim"]], ids=" ".join)
def test_the_description_is_openapi_3_1(start, words):  # noqa: F811
    server = start(*words)
    prefix = "/openwx/" if "weixin" in words else "/openqq/"
    document = call(server.base, prefix + "openapi.json", token="geheim")
    assert len(document["paths"]) > 25
    OpenAPIV31SpecValidator(document).validate()
