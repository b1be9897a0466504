"Training templates, the property that every dialogue is exact or refused, and `kat template check`."

import json
import warnings
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import CHANGES, judge, mutated, tokenizer_for, trl_templates

from kat.core.calls import call_format, parse_reply
from kat.core.chat import prepared_messages, render
from kat.core.endings import try_template
from kat.core.logs import Conversation
from kat.core.template_cases import CASES, case_tools
from kat.core.template_check import check_template, exact_segments, load_template, verdict_on
from kat.core.training_templates import (
    TEMPLATE_FAMILIES,
    fit_of,
    shown_by,
    training_data,
    training_template,
    with_template,
)

ROOT = Path(__file__).parents[2]
TRL = trl_templates()
real = pytest.mark.skipif(not TRL, reason="trl, whose templates these are, is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:chat template")


@cache
def own(family):
    return tokenizer_for(training_template(family))


@cache
def known(name):
    return own(name) if name in TEMPLATE_FAMILIES else tokenizer_for(TRL[name])


# --- the property: exact or refused


@real
@pytest.mark.parametrize("name", TRL)
def test_every_template_is_exact_or_refused(name):
    tok = known(name)
    for messages in CASES.values():
        tools = case_tools(messages)
        try:
            segments = exact_segments(tok, messages, tools)
        except ValueError as e:
            assert len(str(e)) > 20
            continue
        judge(tok, messages, tools, segments)


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_training_templates_are_exact_or_refuse_by_themselves(family):
    for case, messages in CASES.items():
        verdict = verdict_on(own(family), case)
        assert verdict.kind in ("keeps", "forbids"), verdict
        if verdict.kind == "keeps":
            judge(
                own(family), messages, case_tools(messages), exact_segments(own(family), messages, case_tools(messages))
            )


KEPT = dict(qwen3=20, glm4=20, nemotron_3=20, nemotron_3_ultra=20, kimi_k2_thinking=20, gemma3=5, llama3=6)


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_what_a_family_has_no_place_for_is_little(family):
    forbidden = [case for case in CASES if verdict_on(own(family), case).kind == "forbids"]
    assert len(CASES) - len(forbidden) >= KEPT.get(family, 16), forbidden


mutations = st.tuples(
    st.lists(st.integers(0, 999), min_size=1, max_size=2),
    st.lists(st.sampled_from(list(CHANGES)), min_size=2, max_size=2),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([*TEMPLATE_FAMILIES, *TRL]), st.sampled_from(list(CASES)), mutations)
def test_mutated_templates_are_exact_or_refused(name, case, mutation):
    messages, tools = CASES[case], case_tools(CASES[case])
    tok = with_template(known(name), mutated(known(name).chat_template, *mutation))
    try:
        segments = exact_segments(tok, messages, tools)
    except ValueError:
        return
    judge(tok, messages, tools, segments)


def test_the_judge_sees_what_is_lost():
    tok, said = own("qwen3"), CASES["reasoning with a call"]
    segments = exact_segments(tok, said, case_tools(said))
    judge(tok, said, case_tools(said), segments)
    for i, change in [(0, dict(content='Why?')), (1, dict(reasoning_content='')), (1, dict(content='More.')),
                      (2, dict(content='other')), (3, dict(content='It adds.'))]:  # fmt: skip
        with pytest.raises(AssertionError):
            judge(tok, [m | change if i == k else m for k, m in enumerate(said)], case_tools(said), segments)
    untrained = [s for s in segments if s.turn == 0 or not s.trainable]
    with pytest.raises(AssertionError):
        judge(tok, said, case_tools(said), untrained)


# --- equal to the families' own


def keeps_history(tok, messages, tools):
    "The text of a dialogue where a template has all of it, and each beginning is a beginning; None otherwise."
    full, at = try_template(tok, messages, tools), 0
    if full is None:
        return None
    for m in messages:
        parts = [
            m.get("reasoning_content", ""),
            m["content"],
            *(c["function"]["name"] for c in m.get("tool_calls", ())),
        ]
        for part in filter(None, (x.strip() for x in parts)):
            found = [full.find(x, at) for x in (part, json.dumps(part, ensure_ascii=False)[1:-1])]
            if max(found) < 0:
                return None
            at = min(x for x in found if x >= 0) + len(part)
    kept = all(
        keeps_answer(tok, messages[: i + 1], tools, full) for i, m in enumerate(messages) if m["role"] == "assistant"
    )
    return full if kept else None


def keeps_answer(tok, messages, tools, full):
    "Is a dialogue that ends with this answer a beginning of the whole, and are its calls read back?"
    alone = try_template(tok, messages, tools)
    befores = [try_template(tok, messages[:-1], tools, gen) for gen in (True, False)]
    before = next((x for x in befores if x and alone and alone.startswith(x)), None)
    if before is None or not full.startswith(alone):
        return False
    calls = [c["function"] for c in messages[-1].get("tool_calls", ())]
    said = alone[len(before) :].strip()
    closing = next((x for x in tok.all_special_tokens if said.endswith(x) and x != "</tool_call>"), "")
    said = said.removesuffix(closing)
    return len(calls) == len(parse_reply(said, tools or [], call_format(tok.chat_template)).calls)


def as_text(messages):
    "Arguments as JSON text, for templates that want them so."
    text = lambda function: function | dict(arguments=json.dumps(function["arguments"], ensure_ascii=False))
    call = lambda c: c | dict(function=text(c["function"]))
    return [m | dict(tool_calls=[call(c) for c in m["tool_calls"]]) if m.get("tool_calls") else m for m in messages]


EQUAL = dict(qwen2_5=17, qwen3=6, qwen3_instruct_2507=17, qwen3_5_think=16, qwen3_5_nothink=16, qwen3_6=16, llama3=6,
             llama3_1=15, llama3_2=15, gemma3=5, gptoss=13, glm4moe=17, deepseekv3=15, nemotron_3_nano=19,
             nemotron_3_super=19, nemotron_3_ultra=19, nemotron_3_5_lightning=19)  # fmt: skip


@real
@pytest.mark.parametrize("name", EQUAL)
def test_ours_is_theirs_where_theirs_keeps_history(name):
    tok, equal = known(name), 0
    ours = with_template(tok, training_template(fit_of(TRL[name]).family))
    for case, said in CASES.items():
        messages, tools = prepared_messages(said, case_tools(said))
        theirs = keeps_history(tok, messages, tools) or keeps_history(tok, as_text(messages), tools)
        if theirs is None:
            continue
        mine = try_template(ours, messages, tools)
        if mine is None:
            assert verdict_on(ours, case).kind == "forbids"
            continue
        mine = mine.replace("<|user|><|system|>", "<|system|>")  # GLM's answers close themselves, whatever follows
        assert mine.startswith(theirs) and mine[len(theirs) :] in ("", "<|user|>"), case
        equal += 1
    assert equal >= EQUAL[name], equal


@real
@pytest.mark.parametrize("name", [x for x in TRL if x.endswith("_training")])
def test_ours_is_trls_training_text_where_that_is_exact(name):
    if not (fit := fit_of(TRL[name])):
        return
    tok = known(name)
    ours = with_template(tok, training_template(fit.family))
    for case, said in CASES.items():
        if verdict_on(tok, case).kind == "keeps":
            messages, tools = prepared_messages(said, case_tools(said))
            assert try_template(ours, messages, tools) == try_template(tok, messages, tools), case


@real
@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_trl_takes_training_templates_as_they_are(family):
    from trl.chat_template_utils import (
        get_training_chat_template,
        is_chat_template_prefix_preserving,
        is_chat_template_stop_token_trained,
    )

    assert is_chat_template_stop_token_trained(own(family)) and get_training_chat_template(own(family)) is None
    assert family in ("gemma3", "llama3") or is_chat_template_prefix_preserving(own(family))  # these two call nothing


# --- which family, and data for training


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_a_family_is_recognised_by_what_it_writes(family):
    text = training_template(family)
    assert fit_of(text).family == family and fit_of(text).equal == fit_of(text).kept
    assert fit_of("{# qwen3 <tool_call> #}" + text).family == family  # words change nothing
    markers = (
        ("im_start", "turn_open"),
        ("start_header_id", "open"),
        ("｜Assistant｜", "｜A｜"),
        ("<|assistant|>", "<|A|>"),
    )
    markers += (
        ("start_of_turn", "open"),
        ("<|start|>", "<|s|>"),
        ("im_assistant", "A"),
        ("]~b]", "]b]"),
        ("[INST]", "[I]"),
    )
    other = text
    for old, new in markers:
        other = other.replace(old, new).replace(old.replace("INST", "/INST"), new.replace("[I]", "[/I]"))
    assert fit_of(other) is None


@real
@pytest.mark.parametrize(
    'name, family',
    [('qwen3', 'qwen3'), ('qwen2_5', 'qwen2_5'), ('qwen3_instruct_2507', 'qwen3_2507'), ('qwen3_5_think', 'qwen3_5'),
     ('qwen3_6', 'qwen3_6'), ('glm4moe', 'glm4'), ('llama3', 'llama3'), ('llama3_1', 'llama3_1'), ('gemma3', 'gemma3'),
     ('llama3_2', 'llama3_2'), ('gptoss', 'gpt_oss'), ('deepseekv3', 'deepseek_v3'), ('nemotron_3_nano', 'nemotron_3'),
     ('nemotron_3_ultra', 'nemotron_3_ultra'), ('phi3', None), ('cohere2', None), ('gemma4', None), ('qwen3_8', None),
     ('deepseek_r1_distill', 'deepseek_v3')],
)  # fmt: skip
def test_real_templates_find_their_family(name, family):
    fit = fit_of(TRL[name])
    assert (fit.family if fit else None) == family


def test_a_template_without_calls_is_of_a_family_only_to_the_letter():
    silent = training_template("smollm3").replace("m.tool_calls or []", "[]")
    assert fit_of(silent).family == "smollm3" and fit_of(silent).calls == "hermes"
    assert fit_of(silent.replace("## Metadata", "## Data")) is None
    assert fit_of(training_template("qwen2_5").replace("You are Qwen", "You are Q")).calls == ""
    assert not fit_of(training_template("llama3")).calls
    log = Conversation("t", CASES["a call"][:1], [CASES["a call"][:2]])
    with pytest.warns(UserWarning, match="calls in the format hermes, though it writes none"):
        training_data([log], tokenizer_for(silent))


def test_no_template_is_of_no_family():
    assert fit_of(None) is None and fit_of("{{ raise_exception('no') }}") is None
    assert fit_of(dict(default="", tool_use=training_template("glm4"))).family == "glm4"
    with pytest.raises(ValueError, match="'qwen4'; one of deepseek_v3, .*qwen3"):
        training_template("qwen4")


TALK = [dict(role='user', content='a?'), dict(role='assistant', content='b', reasoning_content='hm'),
        dict(role='user', content='c?'), dict(role='assistant', content='d', reasoning_content='so')]  # fmt: skip
FORGETS = training_template("qwen3").replace("thought.strip('\\n')", "(thought.strip('\\n') if loop.last else '')")


def test_training_data_of_a_template_that_forgets():
    tok = tokenizer_for(FORGETS)
    log, short = Conversation("t", TALK[:1], [TALK[:2], TALK]), Conversation("s", TALK[:1], [TALK[:2]])
    learnt = lambda data: [tok.decode([i for s in t.segments if s.trainable for i in s.ids]) for t in data]
    both = "<think>\nhm\n</think>\n\nb<|im_end|>", "<think>\nso\n</think>\n\nd<|im_end|>"
    says = r"training template of qwen3 \(as the model's own in 6 of 6 probes\), for .* drops the reasoning of earlier"
    with pytest.warns(UserWarning, match=says):
        assert learnt(training_data([short, log], tok)) == [both[0], "".join(both)]
    assert tok.chat_template == FORGETS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert learnt(training_data([short], tok)) == [both[0]]  # its own can
        assert learnt(training_data([log], tok, family="qwen3")) == ["".join(both)]
    with pytest.raises(ValueError, match="drops the reasoning.*No training template fits"):
        training_data([log], tokenizer_for(FORGETS.replace("im_start", "begin")))


def test_a_mistake_in_the_data_is_not_the_templates():
    bad = Conversation("t", TALK[:1], [[TALK[0], dict(role="assistant", content="a<|im_end|>b")]])
    with pytest.raises(ValueError, match="spells the end token"), warnings.catch_warnings():
        warnings.simplefilter("error")
        training_data([bad], tokenizer_for(FORGETS))


# --- the context


PLAIN = training_template("qwen3_2507")
LOSES = [
    ("(text(first.content) ~ '\\n\\n' if first) ~", '', 'a call', 'leaves out messages.0. .system.'),
    ("~ text(m.content) ~ '\\n</tool_response>'", "~ '</tool_response>'", 'a call', 'leaves out messages.3. .tool.'),
    ("text(m.content) ~ '\\n</tool_response>'", "text(m.content) | replace('def', 'fed') ~ '</tool_response>'",
     'a call', 'changes the text of messages.3.'),
    ("{%- elif m.role == 'tool' -%}", "{%- elif m.role == 'tool' and not m.content -%}\n{%- elif m.role == 'tool' -%}",
     'an empty result', 'leaves out messages.3. .tool.'),
]  # fmt: skip


@pytest.mark.parametrize("old, new, case, says", LOSES)
def test_context_that_is_lost_is_an_error(old, new, case, says):
    assert old in PLAIN
    system = [dict(role="system", content="Be brief."), *CASES[case]]
    tools = case_tools(system)
    tok = tokenizer_for(PLAIN.replace(old, new))
    with pytest.raises(ValueError, match=says):
        render(tok, system, tools)
    assert render(tokenizer_for(PLAIN), system, tools)
    assert render(tok, system, tools, whole=())


def test_later_messages_that_come_earlier_are_an_error():
    early = "{%- for x in messages if x.role == 'system' and not first -%}{{- x.content -}}{%- endfor -%}"
    moved = PLAIN.replace("{%- for m in messages -%}", early + "{%- for m in messages -%}")
    moved = moved.replace(
        "m.role in ['user', 'system', 'developer']", "m.role == 'system' -%}{%- elif m.role == 'user'"
    )
    with pytest.raises(ValueError, match="puts messages.2. .system. in another place.*turn 1"):
        render(tokenizer_for(moved), CASES["system in the middle"], whole=[1])


# --- the command


def test_check_prints_what_is_lost_and_ends_with_one(cli, tmp_path):
    (tmp_path / "forgets.jinja").write_text(FORGETS)
    (tmp_path / "good.json").write_text(json.dumps(dict(chat_template=training_template("qwen3"))))
    code, out, err = cli("template", "check", "forgets.jinja")
    assert (code, err) == (1, "") and "train with: training_template('qwen3'), which keeps 20" in out
    assert "drops     reasoning in old turns" in out and "keeps     a call " in out and "calls: hermes; " in out
    code, out, err = cli("template", "check", "good.json", "--json")
    found = json.loads(out)
    assert (code, err, found["lossy"], found["kept"], found["family"]) == (0, "", False, 20, "qwen3")
    assert cli("template", "show", "qwen3") == (0, training_template("qwen3"), "")


def test_check_reads_folders_with_and_without_a_tokenizer(tmp_path):
    tok = own("glm4")
    tok.save_pretrained(tmp_path / "model")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "chat_template.jinja").write_text(tok.chat_template)
    reports = [check_template(load_template(tmp_path / folder)) for folder in ("model", "bare")]
    assert reports[0] == reports[1] and reports[0].kept == 20 and not reports[0].lossy


@pytest.mark.parametrize(
    'args, parts',
    [('check nowhere', ['nowhere: no such file or folder']), ('check empty', ['neither tokenizer.json nor chat_']),
     ('check bad.json', ['bad.json', 'text expected']), ('check none', ['no chat template']), ('check', ['MODEL']),
     ('show qwen4', ["'qwen4'", 'qwen3_coder'])],
)  # fmt: skip
def test_mistakes_are_one_line(cli, tmp_path, args, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    tok = tokenizer_for("")
    tok.chat_template = None
    tok.save_pretrained(tmp_path / "none")
    code, out, err = cli("template", *args.split())
    assert (code, out) == (2, "") and err.count("\n") == 1 and all(part in err for part in parts), err


# --- the files


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_each_file_names_its_source_and_licence_and_is_in_the_wheel(family):
    head = training_template(family).partition("-#}")[0]
    assert "kat's training template for" in head and "Source: " in head and "(" in head.partition("Source: ")[2]
    assert "'kat.core': ['templates/*.jinja']" in (ROOT / "setup.py").read_text()


def test_formats_of_calls_that_need_an_id_or_close_with_the_next_message():
    assert call_format(training_template("glm4")) == "glm"
    numbered = (
        "call.id if call.id and call.id.startswith('functions.' ~ name ~ ':') else 'functions.' ~ name ~ ':' ~ number"
    )
    assert numbered in training_template("kimi_k2")
    strict = training_template("kimi_k2").replace(numbered, "call.id")
    assert call_format(strict) == "kimi" and shown_by(strict, CASES["one answer"])


@real
def test_the_table_is_that_of_the_installed_templates():
    found = json.loads((ROOT / "figures" / "templates.json").read_text())
    from importlib.metadata import version

    if found["trl"] != version("trl"):
        pytest.skip(f"the table is of trl {found['trl']}: make templates")
    assert set(found["templates"]) == set(TRL) and set(found["training"]) == set(TEMPLATE_FAMILIES)
    for name in ("qwen3", "glm4moe", "gptoss", "llama3_2"):
        report = check_template(tokenizer_for(TRL[name]))
        assert [v.kind == "keeps" for v in report.verdicts] == [x == "k" for x in found["templates"][name]["verdicts"]]
