"Chat templates that trl brings, and a judge of whether a dialogue under a template is trained on exactly."

import json
import re
from pathlib import Path

from kat.core.calls import call_format, in_thinking, parse_reply
from kat.core.messages import normalise, without_nulls
from kat.core.template_check import template_tokenizer as tokenizer_for  # noqa: F401, for the tests


def trl_templates():
    "The templates of real models by name; none where trl is not installed."
    from importlib.util import find_spec

    if (spec := find_spec("trl")) is None:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return {p.stem: p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.jinja"))}


def judge(tok, messages, tools, segments):
    """Assert that these segments train every answer whole. Written without kat.core.chat: from the decoded text alone.

    Every answer: its calls, text and reasoning come back from its trained tokens, which end with one closing token.
    Everything else: between the answers where it belongs. And a dialogue that stops after an answer is a beginning."""
    messages = normalise(without_nulls(messages, tools) if tools else messages)
    write = lambda some: tok.apply_chat_template(some, tools=tools, tokenize=False)
    full = write(messages)
    assert tok.decode([i for s in segments for i in s.ids]) == full
    runs, text, turn = [], "", None
    for s in segments:
        if s.trainable:
            if s.turn != turn:
                runs.append([len(text), 0])
            turn, runs[-1][1] = s.turn, len(text) + len(tok.decode(s.ids))
        text += tok.decode(s.ids)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(runs) == len(answers)
    form, special = call_format(tok.chat_template), tok.all_special_tokens
    for i, (start, end) in zip(answers, runs):
        closing = next(t for t in special if full[start:end].endswith(t))
        said = full[start : end - len(closing)]
        assert said.count(closing) == 0
        calls = [c["function"] for c in messages[i].get("tool_calls", ())]
        reply = parse_reply(said, tools if calls else [], form, in_thinking(full[:start]))
        assert not reply.malformed and [c["function"] for c in reply.calls] == calls
        assert json.dumps([c["function"] for c in reply.calls]) == json.dumps(calls)
        assert reply.content.strip() == messages[i]["content"].strip()
        assert reply.reasoning.strip() == messages[i].get("reasoning_content", "").strip()
        assert write(messages[: i + 1])[: end - len(closing)] == full[: end - len(closing)]
    edges = [0, *(x for run in runs for x in run), len(full)]
    gaps, done = [full[a:b] for a, b in zip(edges[::2], edges[1::2])], 0
    for i, m in enumerate(messages[: answers[-1]]):
        if m["role"] == "assistant":
            done = 0
            continue
        gap = gaps[sum(k < i for k in answers)]
        forms = {m["content"], json.dumps(m["content"], ensure_ascii=False)[1:-1], json.dumps(m["content"])[1:-1]}
        place, size = max((gap.find(x.strip(), done), len(x.strip())) for x in forms)
        assert place >= 0, m
        done = place + size


OUTPUT = re.compile(r"\{\{-?(.*?)-?\}\}", re.S)
CHANGES = {
    "leave out": '""',
    "upper": "(({}) | upper)",
    "trim": "(({}) | trim)",
    "cut": "({})[:-1]",
    "cut more": "({})[3:]",
    "replace": "(({}) | replace('e', ''))",
    "twice": "(({}) ~ ({}))",
    "when last": "(({}) if loop is undefined or loop.last)",
    "when not last": "(({}) if loop is undefined or not loop.last)",
    "when first": "(({}) if loop is undefined or loop.first)",
    "when long": "(({}) if messages | length > 3)",
    "without calls": "(({}) if m is undefined or not m.tool_calls)",
}


def mutated(template, places, changes):
    "A template with some of its outputs changed: left out, cut, written twice, written only sometimes."
    found = list(OUTPUT.finditer(template))
    for k, change in sorted({p % len(found): c for p, c in zip(places, changes)}.items(), reverse=True):
        expression = found[k][1]
        if "raise_exception" in expression:
            continue
        new = CHANGES[change].replace("{}", expression)
        template = template[: found[k].start()] + "{{- " + new + " -}}" + template[found[k].end() :]
    return template
