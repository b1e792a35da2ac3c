"""The real `openai` package as the client: whole answers, streams, errors, many at once."""

import asyncio

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="the extra `interop` is not installed")

GREEDY = {"temperature": 0, "max_tokens": 16}
USER = [{"role": "user", "content": "Once upon a time"}]


def connect(client, kind=openai.OpenAI):
    return kind(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="any", max_retries=0)


def test_whole_answers_and_streams_of_chats_and_texts_agree(client):
    with connect(client) as api:
        assert "stories+mine" in [model.id for model in api.models.list()]
        whole = api.chat.completions.create(model="mine", messages=USER, **GREEDY)
        usage = {"include_usage": True}
        chunks = list(
            api.chat.completions.create(
                model="mine", messages=USER, stream=True, stream_options=usage, **GREEDY
            )
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage
        assert all("usage" in chunk.model_fields_set for chunk in chunks)
        assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
        assert whole.system_fingerprint.startswith("ivl_jax-")
        assert whole.choices[0].finish_reason == "length"
        text = api.completions.create(model="mine", prompt="Lily said", logprobs=1, **GREEDY)
        assert len(text.choices[0].logprobs.tokens) == 16
        stream = api.completions.create(model="mine", prompt="Lily said", stream=True, **GREEDY)
        assert "".join(one.choices[0].text for one in stream) == text.choices[0].text


def test_a_strength_per_request_changes_the_text_and_zero_is_the_base(client):
    def text(model, **strengths):
        answer = api.chat.completions.create(
            model=model, messages=USER, extra_body={"strengths": strengths}, **GREEDY
        )
        return answer.choices[0].message.content

    with connect(client) as api:
        assert text("stories", mine=0.3) == text("mine")
        assert text("mine", mine=0) == text("stories")
        assert len({text("mine"), text("mine", mine=1.0), text("mine", mine=-1.0)}) == 3


def test_errors_are_the_packages_own_classes(client):
    with connect(client) as api:
        with pytest.raises(openai.NotFoundError, match="'nobody' does not exist") as missing:
            api.chat.completions.create(model="nobody", messages=USER)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError, match="presence_penalty is not supported"):
            api.completions.create(model="mine", prompt="A", presence_penalty=1.0)
        with pytest.raises(openai.BadRequestError, match="token ids outside") as unknown:
            api.completions.create(model="mine", prompt="A", logit_bias={"512": 1})
        assert unknown.value.param == "logit_bias"
        long = "word " * 600
        for prompt, name in [(long, "prompt"), (["A", long], r"prompt\[1\]")]:
            message = f"- {name}: .* more than the context"
            with pytest.raises(openai.BadRequestError, match=message) as refused:
                api.completions.create(model="mine", prompt=prompt)
            found = refused.value
            assert (found.param, found.code) == ("prompt", "context_length_exceeded")


def test_a_logit_bias_forces_a_token_in_its_own_request_alone(client):
    asked = {"model": "mine", "prompt": "Lily said", "logprobs": 0, **GREEDY}
    bias = {"402": 100}  # "ch"
    with connect(client) as api:
        plain = api.completions.create(**asked).choices[0]
        forced = api.completions.create(**asked, logit_bias=bias).choices[0]
        assert forced.text == "ch" * 16
        assert forced.text != plain.text
        # The log-probabilities are those of the models, not those of the bias.
        assert min(forced.logprobs.token_logprobs) < -1
        chat = {"model": "mine", "messages": USER, "logit_bias": bias, **GREEDY}
        answer = api.chat.completions.create(**chat).choices[0].message.content
        stream = api.chat.completions.create(**chat, stream=True)
        pieces = [one.choices[0].delta.content or "" for one in stream]
        assert answer == "".join(pieces) == "ch" * 16
        assert api.completions.create(**asked).choices[0].text == plain.text


def test_the_package_does_not_repeat_what_cannot_succeed(client, monkeypatch, tmp_path):
    monkeypatch.setattr(client.prepared.service.values, "_root", tmp_path)
    conflicts = 'ivl_requests_total{path="/v1/values",status="409"}'
    before = client.figures().get(conflicts, 0)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="any") as api:
        assert api.max_retries > 0
        with pytest.raises(openai.ConflictError, match="mine is the name of a model already"):
            api.post("/values", body={"name": "mine", "folder": "x"}, cast_to=object)
    assert client.figures()[conflicts] == before + 1


def test_many_clients_at_once_get_what_each_gets_alone(client):
    asked = [
        {"model": model, "messages": [{"role": "user", "content": text}], **GREEDY}
        for text in ("Once", "The big dog", "Lily said")
        for model in ("stories", "mine", "other")
    ]

    async def ask(api, one):
        if one["model"] == "mine":
            stream = await api.chat.completions.create(**one, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return (await api.chat.completions.create(**one)).choices[0].message.content

    async def ask_all():
        async with connect(client, openai.AsyncOpenAI) as api:
            together = await asyncio.gather(*[ask(api, one) for one in asked])
            return together, [await ask(api, one) for one in asked]

    together, in_turn = asyncio.run(ask_all())
    assert together == in_turn
    assert len(set(together)) > 3
