"""LlamaIndex's image tool. It knows OpenAI's models and sizes only, and takes the base URL from the environment."""

import pathlib

import openai
import pytest
from checks import TOO_MANY, decoded, from_url
from llama_index.tools.openai import OpenAIImageGenerationToolSpec


@pytest.fixture
def spec(fixed, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", f"{fixed.url}/v1")
    return OpenAIImageGenerationToolSpec(api_key=fixed.key, cache_dir=str(tmp_path / "images"))


def test_address(spec):
    from_url(spec.image_generation("a red car"))


def test_file(spec):
    answer = spec.image_generation("a red car", model="dall-e-2", size="256x256", download=True)
    path = answer[0] if isinstance(answer, tuple) else answer
    decoded(pathlib.Path(path).read_bytes())


def test_as_a_tool_of_an_agent(spec):
    (tool,) = spec.to_tool_list()
    from_url(tool.call("a red car").raw_output)


def test_errors_carry_the_message(spec):
    with pytest.raises(openai.BadRequestError, match=TOO_MANY):
        spec.image_generation("a red car", num_images=11)
