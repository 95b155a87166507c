"""LangChain's image tool for JavaScript."""

import node_tests


def test_langchain_js(server, rex, tmp_path):
    names = node_tests.run("langchain.test.mjs", server, rex, tmp_path)
    assert names == ["b64.png", "two-0.png", "two-1.png", "url.png"]
