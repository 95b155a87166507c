"""LangChain's image tool. It reads only `url` of a response and cannot ask for it: the server's `response_format` has to be `url`."""

import openai
import pytest
from checks import TALL, TOO_MANY, from_url
from langchain_community.tools.openai_dalle_image_generation import OpenAIDALLEImageGenerationTool
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper


def wrapper(server, **more) -> DallEAPIWrapper:
    return DallEAPIWrapper(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, **more)


def test_tool_returns_an_address(addresses):
    tool = OpenAIDALLEImageGenerationTool(api_wrapper=wrapper(addresses, model="coar", size="80x112"))
    from_url(tool.invoke("a red car"), TALL)


def test_defaults_of_the_wrapper(addresses):
    """Model dall-e-2, size 1024x1024."""
    from_url(wrapper(addresses).run("a red car"))


def test_two_images(addresses):
    urls = wrapper(addresses, model="dall-e-3", n=2, quality="hd").run("a red car").split("\n")
    assert len({from_url(url) for url in urls}) == 2


def test_errors_carry_the_message(addresses):
    with pytest.raises(openai.BadRequestError, match=TOO_MANY):
        wrapper(addresses, model="coar", n=11).run("a red car")
    with pytest.raises(openai.NotFoundError, match="gpt-image-9"):
        wrapper(addresses, model="gpt-image-9").run("a red car")


def test_without_addresses_the_tool_fails(server):
    """If this fails, the tool reads `b64_json`, and docs/howto/clients.md can do without `response_format`."""
    with pytest.raises(TypeError, match="NoneType"):
        wrapper(server, model="coar", size="96x96").run("a red car")
