"""What langchain-openai does with the server: chat, streams, tools, structured output, completions, embeddings."""

from __future__ import annotations

import asyncio
import os

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

PLACE = {"base_url": os.environ["URL"], "api_key": os.environ["KEY"], "max_retries": 0}
CHAT = os.environ["CHAT"]


class City(BaseModel):
    """A city and how many people live in it."""

    name: str
    population: int


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"Sun in {city}"


def main() -> None:
    model = ChatOpenAI(model=CHAT, temperature=0, max_tokens=60, **PLACE)
    answer = model.invoke("What is the capital of France?")
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(model.stream("What is the capital of France?"))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    assert [one.content for one in model.batch(["Say hi.", "Say ho."])]
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(City, method=method).invoke("Paris has 2 million people.")
        assert isinstance(found, City), method
    bound = model.bind_tools([weather], tool_choice="weather")
    call = bound.invoke("The weather in Rome?").tool_calls[0]
    assert call["name"] == "weather"
    assert weather.invoke(call).content.startswith("Sun in")
    conversation = ChatOpenAI(model=CHAT, temperature=0, max_tokens=16, use_responses_api=True, **PLACE)
    first = conversation.invoke("What is the capital of France?")
    assert "Paris" in first.text
    again = conversation.invoke("And of Italy?", previous_response_id=first.response_metadata["id"])
    assert again.text
    assert "Paris" in OpenAI(model=CHAT, temperature=0, max_tokens=4, **PLACE).invoke("The capital of France is")
    embeddings = OpenAIEmbeddings(model=os.environ["EMBED"], check_embedding_ctx_length=False, **PLACE)
    one, two = embeddings.embed_documents(["A cat.", "Stocks."])
    assert len(one) == len(two) == len(embeddings.embed_query("A cat.")) == 384

    async def streamed() -> str:
        return "".join([chunk.content async for chunk in model.astream("What is the capital of France?")])

    assert asyncio.run(streamed()) == answer.content
    print("langchain-openai")


if __name__ == "__main__":
    main()
