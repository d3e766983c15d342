from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import (
    AdapterFileError,
    ModelError,
    QueueFullError,
    RequestError,
    ServeError,
    StateError,
    UnknownAdapterError,
)
from lorakit.serve.engine import Engine
from lorakit.serve.kv_cache import Bucket, PromptCache
from lorakit.serve.request import EngineOptions, GenerateRequest, TokenEvent
from serving import Reply, ask, byte_llama, byte_tokenizer, prompts, running, save_learned


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(3):
        spec = LoraSpec(r=2 + i, alpha=7.5, targets="all-linear")
        save_learned(byte_llama(), spec, tmp_path / f"a{i}", seed=i)
    return tmp_path


def test_answers_end_at_the_limit_the_end_token_or_a_stop_string() -> None:
    model = byte_llama()
    prompt = prompts([6])[0]
    with running(model) as engine:
        free = ask(engine, prompt, max_tokens=12, ignore_eos=True).wait()
        assert free.reason == "length"
        assert len(free.tokens) == free.ended.num_generated_tokens == 12
        assert free.ended.num_prompt_tokens == 6
        assert free.ended.timings.total_s >= free.ended.timings.first_token_s > 0
        stop = free.text[4:6]
        cut = ask(engine, prompt, max_tokens=12, ignore_eos=True, stop=(stop,)).wait()
        assert (cut.reason, cut.ended.stop_text) == ("stop", stop)
        assert cut.text == free.text[: free.text.index(stop)]
    # The most likely first token is made the end token: the answer is empty.
    model.generation_config.eos_token_id = free.tokens[0]
    with running(model) as engine:
        ended = ask(engine, prompt, max_tokens=12).wait()
    assert (ended.reason, ended.tokens, ended.text) == ("stop", [], "")
    assert ended.ended.num_generated_tokens == 1


def test_an_answer_ends_where_the_context_does() -> None:
    with running(byte_llama(context=20)) as engine:
        reply = ask(engine, prompts([15])[0], max_tokens=50, ignore_eos=True).wait()
        assert (reply.reason, len(reply.tokens)) == ("length", 5)
        with pytest.raises(RequestError, match="context"):
            ask(engine, prompts([20])[0])


def test_rows_grow_out_of_their_bucket() -> None:
    model = byte_llama()
    prompt = prompts([60])[0]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=80, min_new_tokens=80, do_sample=False
    )[0, 60:].tolist()
    with running(model) as engine:
        replies = [ask(engine, prompt[:n], max_tokens=80, ignore_eos=True) for n in (60, 7, 60, 30)]
        assert replies[0].wait().tokens == replies[2].wait().tokens == expected
        assert engine.stats().kv_tokens > 0 or all(r.done.is_set() for r in replies)
    assert engine._reserved == 0


@pytest.mark.parametrize("stop", [(), ("zq",)])
def test_events_add_up(stop: tuple[str, ...]) -> None:
    tokenizer = byte_tokenizer()
    with running(byte_llama(), tokenizer) as engine:
        reply = ask(engine, prompts([5])[0], max_tokens=30, ignore_eos=True, logprobs=1, stop=stop)
        reply.wait()
    assert len(reply.logprobs) == len(reply.tokens) == 30
    assert [found.token_id for found in reply.logprobs] == reply.tokens
    assert "".join(reply.pieces) == reply.text
    assert reply.text == tokenizer.decode(reply.tokens, skip_special_tokens=True)
    assert all(len(found.top) == 1 and found.top[0].logprob <= 0 for found in reply.logprobs)


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


def test_json_schemas_hold_beside_free_rows(root: Path) -> None:
    with running(byte_llama(), adapters_dir=root) as engine:
        free = ask(engine, prompts([9])[0], "a1", max_tokens=20, ignore_eos=True)
        answers = [
            ask(
                engine, prompts([4])[0], name, max_tokens=90, json_schema=SCHEMA,
                temperature=heat, seed=1,
            )
            for name, heat in [(None, 0.0), ("a0", 0.0), ("a1", 0.8)]
        ]  # fmt: skip
        whole = [reply for reply in answers if reply.wait().reason == "stop"]
        for reply in answers:
            assert reply.text.lstrip().startswith("{")
        for reply in whole:
            found = json.loads(reply.text)
            assert isinstance(found["n"], int)
            assert isinstance(found["ok"], bool)
        assert free.wait().reason == "length"
        with pytest.raises(RequestError, match="schema"):
            ask(engine, [5], json_schema={"type": "nonsense"})


def test_bad_requests_are_refused_at_once(root: Path) -> None:
    with running(byte_llama(), adapters_dir=root, max_total_tokens=256) as engine:
        for prompt, match in (([], "no tokens"), ([5, 9999], "does not know")):
            with pytest.raises(RequestError, match=match):
                ask(engine, prompt)
        with pytest.raises(RequestError, match="cache"):
            ask(engine, prompts([200])[0], max_tokens=200)
        with pytest.raises(UnknownAdapterError):
            ask(engine, [5], "nobody")
        ask(engine, [5], name="same", max_tokens=100, ignore_eos=True)
        with pytest.raises(RequestError, match="under way"):
            ask(engine, [5], name="same", max_tokens=9)


def test_a_full_queue_refuses_and_recovers() -> None:
    model = byte_llama()
    engine = Engine(model, byte_tokenizer(), options=EngineOptions(max_queue=3, max_batch=2))
    replies = [ask(engine, [5, 6], max_tokens=3, ignore_eos=True) for _ in range(3)]
    with pytest.raises(QueueFullError) as caught:
        ask(engine, [5, 6])
    assert caught.value.remedy
    engine.start()
    assert all(reply.wait().reason == "length" for reply in replies)
    assert ask(engine, [5], max_tokens=2, ignore_eos=True).wait().reason == "length"
    engine.stop()
    with pytest.raises(QueueFullError, match="shutting down"):
        ask(engine, [5])


def test_cancelled_waiting_and_running_rows_end_with_abort() -> None:
    with running(byte_llama(), max_batch=2) as engine:
        replies = [
            ask(engine, [5, 6, i + 3], name=f"c{i}", max_tokens=400, ignore_eos=True)
            for i in range(4)
        ]
        while not replies[0].tokens:
            time.sleep(0.001)
        engine.cancel("c3")
        engine.cancel("c0")
        engine.cancel("unknown")
        assert replies[3].wait().reason == replies[0].wait().reason == "abort"
        assert 0 < len(replies[0].tokens) < 400
        assert replies[3].tokens == []
        assert replies[1].wait().reason == replies[2].wait().reason == "length"
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_tokens) == (0, 0, 0)


def test_a_listener_that_fails_cancels_its_own_request_only(caplog) -> None:
    with running(byte_llama()) as engine:
        other = ask(engine, [5, 6], max_tokens=30, ignore_eos=True)

        def broken(event: object) -> None:
            raise OSError("the connection is gone")

        engine.submit(GenerateRequest(id="gone", prompt_ids=(5,)), broken)
        assert other.wait().reason == "length"
        assert engine.drain(10)
    assert "listener of request gone failed" in caplog.text


def test_draining_finishes_what_is_under_way() -> None:
    model = byte_llama()
    with running(model) as engine:
        reply = ask(engine, [5, 6], max_tokens=40, ignore_eos=True)
        assert engine.drain(30)
        assert reply.reason == "length"
        with pytest.raises(QueueFullError, match="shutting down"):
            ask(engine, [5])
    with running(model) as engine:
        reply = ask(engine, [5, 6], max_tokens=490, ignore_eos=True)
        assert not engine.drain(0.0)
    assert reply.wait().reason == "abort"


def test_a_failed_forward_fails_its_batch_only(monkeypatch, caplog) -> None:
    model = byte_llama()
    with running(model, max_batch=2) as engine:
        expected = ask(engine, [5, 6], max_tokens=8, ignore_eos=True).wait()
        forward, fail = model.model.layers[1].forward, threading.Event()

        def sometimes(*args: object, **given: object) -> object:
            if fail.is_set():
                fail.clear()
                raise RuntimeError("out of something")
            return forward(*args, **given)

        monkeypatch.setattr(model.model.layers[1], "forward", sometimes)
        rows = [ask(engine, [5, 6], max_tokens=300, ignore_eos=True) for _ in range(2)]
        behind = ask(engine, [5, 6], max_tokens=8, ignore_eos=True)
        while not rows[1].tokens:
            time.sleep(0.001)
        fail.set()
        for row in rows:
            assert row.wait().reason == "error"
            assert "out of something" in str(row.ended.error)
        assert behind.wait().tokens == expected.tokens
        assert engine.stats().kv_tokens == 0
    assert "a forward pass failed" in caplog.text


def test_a_bucket_that_cannot_grow_fails_its_batch_and_leaves_nothing_half_done(
    monkeypatch, caplog
) -> None:
    model = byte_llama()
    with running(model, max_batch=2) as engine:
        expected = ask(engine, [5, 6], max_tokens=8, ignore_eos=True).wait()
        make_room, left = Bucket._make_room, [True]

        def once_too_large(self: Bucket, num_rows: int, like: PromptCache) -> None:
            if left:
                left.clear()
                # Memory runs out at the second layer's keys.
                first = next(iter(like.keys))
                make_room(self, num_rows, replace(like, keys={first: like.keys[first]}, values={}))
                raise RuntimeError("out of memory")
            make_room(self, num_rows, like)

        monkeypatch.setattr(Bucket, "_make_room", once_too_large)
        failed = ask(engine, [5, 6], max_tokens=8, ignore_eos=True).wait()
        assert "out of memory" in str(failed.ended.error)
        again = ask(engine, [5, 6], max_tokens=8, ignore_eos=True).wait()
        assert again.tokens == expected.tokens
        assert engine.stats().kv_tokens == engine.stats().running == 0
    assert "a forward pass failed" in caplog.text


def test_an_engine_that_fails_itself_says_so_and_keeps_nobody_waiting(monkeypatch, caplog) -> None:
    with running(byte_llama()) as engine:
        long = ask(engine, [5, 6], max_tokens=400, ignore_eos=True)

        def broken(_: object) -> None:
            raise KeyError("a defect")

        monkeypatch.setattr(engine._queue, "take", broken)
        assert "a defect" in str(long.wait().ended.error)
        while engine.failure is None:
            time.sleep(0.001)
        with pytest.raises(ServeError, match="start the server again"):
            ask(engine, [5, 6])
    assert "the engine has stopped" in caplog.text


def test_a_corrupt_adapter_fails_its_requests_while_everyone_is_served(root: Path) -> None:
    file = root / "a1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    with running(byte_llama(), adapters_dir=root) as engine:
        choices = ["a0", "a1", None, "a1", "a2", {"a0": 1.0, "a1": 0.5}]
        replies = [ask(engine, [5, 6], c, max_tokens=10, ignore_eos=True) for c in choices]
        reasons = [reply.wait().reason for reply in replies]
        assert reasons == ["length", "error", "length", "error", "length", "error"]
        assert isinstance(replies[1].ended.error, AdapterFileError)
        assert "corrupt" in str(replies[1].ended.error)
        assert engine.pool.info("a0").state == "ram"


def test_many_adapters_through_few_places(root: Path) -> None:
    model = byte_llama()
    for i in range(3, 9):
        spec = LoraSpec(r=1 + i % 4, alpha=7.5, targets="qv")
        save_learned(model, spec, root / f"a{i}", seed=i)
    options = {"adapters_dir": root, "max_adapters_ram": 2, "max_batch": 4}
    with running(model, **options) as engine:
        names = [f"a{i % 9}" for i in range(27)]
        replies = [ask(engine, [5, 6, 7], name, max_tokens=3, ignore_eos=True) for name in names]
        for reply in replies:
            assert reply.wait().reason == "length"
        by_name = {}
        for name, reply in zip(names, replies, strict=True):
            assert by_name.setdefault(name, reply.tokens) == reply.tokens
        assert engine.stats().adapters_ram <= 2


def test_a_name_that_is_loaded_again_under_way_keeps_its_old_row(root: Path) -> None:
    model = byte_llama()
    with running(model, adapters_dir=root) as engine:
        short = {"max_tokens": 5, "ignore_eos": True, "logprobs": 0}
        before = ask(engine, [5, 6], "a0", **short).wait()
        old = ask(engine, [5, 6], "a0", max_tokens=200, ignore_eos=True, logprobs=0)
        while not old.tokens:
            time.sleep(0.001)
        save_learned(byte_llama(), LoraSpec(r=5, targets="mlp"), root / "a0", seed=50, size=0.6)
        engine.pool.load("a0")
        new = ask(engine, [5, 6], "a0", **short).wait()
        assert not old.done.is_set() or len(old.tokens) == 200
        assert [p.logprob for p in new.logprobs] != [p.logprob for p in before.logprobs]
        old.wait()
        first = [p.logprob for p in old.logprobs[:5]]
        assert first == pytest.approx([p.logprob for p in before.logprobs], abs=1e-5)


def test_statistics_name_the_adapters(root: Path) -> None:
    engine = Engine(
        byte_llama(), byte_tokenizer(), options=EngineOptions(adapters_dir=root, max_batch=2)
    )
    replies = [
        ask(engine, [5], name, max_tokens=20, ignore_eos=True) for name in ("a0", "a0", None)
    ]
    stats = engine.stats()
    assert stats.waiting_adapters == {"a0": 2, "": 1}
    assert stats.running == 0
    engine.start()
    for reply in replies:
        reply.wait()
    stats = engine.stats()
    assert (stats.num_generated_tokens, stats.num_prompt_tokens) == (60, 3)
    assert stats.tokens_per_s > 0
    assert stats.max_batch == 2
    engine.stop()


def test_requests_from_many_threads(root: Path) -> None:
    with running(byte_llama(), adapters_dir=root, max_batch=4) as engine:
        replies: list[Reply] = []

        def client(i: int) -> None:
            for j in range(4):
                name = f"a{(i + j) % 3}"
                replies.append(ask(engine, [5 + i], name, max_tokens=4, ignore_eos=True).wait())

        threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(replies) == 24
    assert {reply.reason for reply in replies} == {"length"}


def test_what_cannot_be_served_at_all() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    tiny = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ModelError, match="answers"):
        Engine(BertForSequenceClassification(tiny), byte_tokenizer())
    model = byte_llama()
    attach(model, LoraSpec(r=2), name="one")
    with pytest.raises(StateError, match="attached"):
        Engine(model, byte_tokenizer())


def test_an_engine_starts_once_and_gives_the_model_back(root: Path) -> None:
    model = byte_llama()
    before = {name: id(module) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    with running(model, adapters_dir=root) as engine:
        ask(engine, [5], "a0", max_tokens=2).wait()
        with pytest.raises(StateError):
            engine.start()
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == attention


def test_events_carry_no_empty_pieces_but_the_last() -> None:
    events: list[object] = []
    done = threading.Event()

    def on_event(event: object) -> None:
        events.append(event)
        if not isinstance(event, TokenEvent):
            done.set()

    with running(byte_llama()) as engine:
        engine.submit(GenerateRequest(id="x", prompt_ids=(5, 6)), on_event)  # type: ignore[arg-type]
        assert done.wait(60)
    shown = [event for event in events if isinstance(event, TokenEvent)]
    assert all(event.text for event in shown[:-1])
