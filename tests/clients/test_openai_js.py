"""OpenAI's JavaScript package."""

import node_tests


def test_openai_js(server, rex, tmp_path):
    assert node_tests.run("openai.test.mjs", server, rex, tmp_path) == [
        *("b64-0.png", "b64-1.png"),
        *("partial-0.png", "partial-1.png", "partial-2.png"),
        *("url-0.png", "url-1.png"),
    ]
