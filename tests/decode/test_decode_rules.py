"""The thinking budget's rules, token for token against the plain-Python reference.

The compiled loop runs over a stand-in for the network whose logits are a table, indexed by row, position and last
token, so that the reference sees the very same numbers; the rest is the real program. Tests named `test_edge_NN_...`
pin one known way to get a thinking budget wrong each.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import decode_reference as ref
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_judge import chooser, outcome, reference_row
from hypothesis import Phase, given, settings

from qwen3_jax.config import ModelConfig
from qwen3_jax.decode import Request, Result, ThinkingTokens, check_request
from qwen3_jax.decode import opening as bud
from qwen3_jax.decode.batch import results
from qwen3_jax.decode.loop import DecodeState, Rows, begin, decode, last_place, read_prompts
from qwen3_jax.decode.pack import Packed, pack_markers
from qwen3_jax.decode.pack import pack as pack_requests
from qwen3_jax.decode.schedule import round_up
from qwen3_jax.text.tokenizer import unfinished_bytes

V, NUM_TOKENS = 24, 22  # ids 22 and 23 decode to nothing
THINK, END, EOS, EOS_2, TOOL, END_TOOL, BREAK, GEN = range(14, 22)
BLOCK = (THINK, BREAK, END, BREAK)
STOP = (BREAK, 1, 2, 3, END, BREAK)
PROMPT = (5, EOS, GEN)
OPEN = (*PROMPT, THINK)
ROWS, WRITE, PERIOD = 8, 48, 80  # batch, most tokens written, positions of a table
ENDLESS = 1152  # most tokens written in the one test of a large budget
UNLIMITED = np.int32(bud.UNLIMITED)
# What the ids spell: some end a line, some begin, continue or end a character of several bytes.
TEXT = [b"a", b"b", b"c ", b"d", b"e.", b"f", b"g", b"h", b"i", b".\n", b"\xe2", b"\x82", b"\x82\xac", b"j\xf0\x9f"]
TEXT += [b"<think>", b"</think>", b"<eos>", b"<eos2>", b"<tool>", b"</tool>", b"\n\n", b"<gen>"]

CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=2,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=2,
    intermediate_size=2,
    max_position_embeddings=4096,
    rope_theta=1e4,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row: its request, the logits [PERIOD, V, V] by position and last token, and its stop text."""

    request: Request
    table: np.ndarray
    stop: tuple[int, ...] = STOP

    @property
    def tokens(self) -> ThinkingTokens:
        return ThinkingTokens(
            think=THINK,
            end_think=END,
            eos=(EOS, EOS_2),
            stop_ids=self.stop,
            empty_block=BLOCK,
            tool_call=TOOL,
            end_tool_call=END_TOOL,
            num_tokens=NUM_TOKENS,
            newlines=frozenset(i for i, piece in enumerate(TEXT) if piece.endswith(b"\n")),
            unfinished={i: unfinished_bytes(piece) for i, piece in enumerate(TEXT)},
        )


def case(
    script: Sequence[int] = (), *, prompt: Sequence[int] = PROMPT, stop: tuple[int, ...] = STOP, **fields: Any
) -> Case:
    """A row whose model wants to write `script` after the prompt, each token at its own position, then 0 for ever."""
    table = np.zeros((PERIOD, V, V), np.float32)
    table[:, :, 0] = 1.0
    for k, token in enumerate(script):
        table[len(prompt) - 1 + k, :, token] = 5.0
    return Case(Request(prompt, **{"max_new_tokens": WRITE, **fields}), table, stop)


@functools.cache
def random_table(seed: int) -> np.ndarray:
    """Random logits, many of them equal, in which markers, ends and dead ids are likely; four tempers by seed."""
    rng = np.random.default_rng(seed)
    table = np.round(2 * rng.normal(size=(PERIOD, V, V))) / 2
    tempers = [(0.5, 0.0, 0.0, 0.5, 1.5), (0.0, -3.0, -3.0, -3.0, 0.0), (2.0, -1.0, 1.5, 1.0, 0.5), (0, 1, 1, 0, 1)]
    table[:, :, [THINK, END, EOS, TOOL, END_TOOL]] += tempers[seed % 4]
    table[:, :, NUM_TOKENS:] += 3
    table[:, GEN, THINK] += 2
    return table.astype(np.float32)


@functools.cache
def rambling_table(seed: int) -> np.ndarray:
    """Random logits of a model that always opens a thought, never ends anything and leaves no character unfinished."""
    table = np.array(random_table(seed))
    table[:, :, [END, EOS, EOS_2, TOOL, 10, 13]] = -50
    table[:, GEN, THINK] = 50
    return table


# Every compilation of the loop appends here.
traces: list[str] = []


def forward(tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, cache: dict[str, jax.Array]) -> Any:
    """The stand-in for the network: looks logits up, and notes in its cache which token it saw at which position."""
    traces.append(f"forward over {tokens_BT.shape[1]}")
    rows = jnp.arange(tokens_BT.shape[0])
    slots_BT = jnp.where(segments_BT > 0, positions_BT, cache["seen"].shape[1])
    seen = cache["seen"].at[rows[:, None], slots_BT].set(tokens_BT, mode="drop")
    times = cache["times"].at[rows[:, None], slots_BT].add(1, mode="drop")
    last_B = last_place(segments_BT)
    logits_BV = cache["table"][rows, positions_BT[rows, last_B] % PERIOD, tokens_BT[rows, last_B]]
    return logits_BV, {**cache, "seen": seen, "times": times}


MARKERS = jax.tree.map(jnp.asarray, pack_markers(Case(Request(PROMPT), np.zeros(0)).tokens, V))


@functools.partial(jax.jit, static_argnames="write")
def _begin(packed: Packed, table: Any, max_steps: Any, write: int) -> DecodeState:
    seen = jnp.zeros((ROWS, packed.prompt_BP.shape[1] + write), jnp.int32)
    cache = {"table": table, "seen": seen, "times": seen}
    prompts = read_prompts(forward, packed.prompt_BP, packed.there_BP, cache)
    state = begin(prompts, packed.rows, packed.budget, MARKERS, write)
    return decode(forward, state, packed.rows, MARKERS, max_steps)


@jax.jit
def _go_on(state: DecodeState, rows: Rows, max_steps: Any) -> DecodeState:
    return decode(forward, state, rows, MARKERS, max_steps)


def pack(cases: Sequence[Case]) -> tuple[Packed, np.ndarray]:
    """Arrays of exactly ROWS rows, each packed by itself, so that each brings its own stop text."""
    cases = [*cases, *[case(max_new_tokens=1)] * (ROWS - len(cases))]
    slots = round_up(max(len(each.request.prompt_ids) for each in cases))
    packed = [
        pack_requests(
            [each.request],
            [check_request(each.request, CONFIG, each.tokens)],
            CONFIG,
            each.tokens,
            prompt_slots=slots,
        )
        for each in cases
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *packed), np.stack([each.table for each in cases])


def run(cases: Sequence[Case], write: int = WRITE) -> list[Result]:
    """Results of the compiled loop."""
    return results(_begin(*pack(cases), UNLIMITED, write=write))[: len(cases)]


def run_one(*args: Any, **fields: Any) -> Result:
    """The result of one scripted row."""
    return run([case(*args, **fields)])[0]


def reference_ids(each: Case) -> ref.Ids:
    return ref.Ids(THINK, END, (EOS, EOS_2), TOOL, END_TOOL, NUM_TOKENS, each.stop, BLOCK, tuple(TEXT))


def reference(each: Case) -> ref.Outcome:
    """What the plain-Python rules make of the same row."""

    def next_logits(tokens: list[int]) -> list[float]:
        return each.table[(len(tokens) - 1) % PERIOD, tokens[-1]].tolist()

    request = each.request
    return ref.decode_row(next_logits, reference_row(request), reference_ids(each), chooser(request))


def assert_as_reference(cases: Sequence[Case], results: Sequence[Result]) -> None:
    for each, result in zip(cases, results, strict=True):
        assert outcome(result) == reference(each), each.request


# Any batch of rows ---------------------------------------------------------------------------------------------------

PLAIN = st.integers(0, 13)
ANY = st.integers(0, NUM_TOKENS - 1)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[tuple[int, ...], bool]:
    """A prompt, and whether it ends inside an open thought."""
    user = tuple(draw(st.lists(ANY, max_size=5)))
    thought = tuple(draw(st.lists(st.one_of(PLAIN, st.sampled_from([THINK, TOOL, END_TOOL])), max_size=6)))
    kind = draw(st.sampled_from(["new", "new", "new", "open", "open", "empty", "closed"]))
    end = {"new": (), "open": (THINK, *thought), "empty": BLOCK, "closed": (THINK, *thought, END_TOOL, END, BREAK)}
    return (*user, EOS, GEN, *end[kind]), kind == "open"


@st.composite
def any_rows(draw: st.DrawFn) -> tuple[Request, int, tuple[int, ...]]:
    """Any request at all, as long as its fields are of the right kind; the seed of a random table; a stop text."""
    prompt, is_open = draw(prompts())
    before = draw(st.lists(ANY, max_size=20))
    stop = (*before, END, *draw(st.lists(ANY, max_size=11)))
    if draw(st.booleans()):
        stop = STOP
    sampled = {
        "temperature": draw(st.sampled_from([0.3, 0.7, 1.0, 2.0])),
        "top_p": draw(st.sampled_from([1.0, 0.95, 0.5])),
        "top_k": draw(st.sampled_from([0, 1, 5, 20])),
        "min_p": draw(st.sampled_from([0.0, 0.05, 0.5])),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "sample": draw(st.integers(0, 7)),
    }
    budgets = [None, -1, 0, 1, 1, 2, 3, 4, 5, 6, 8, 12, 24, 1024, 2**31 - 1, *["auto"] * 5]
    budget = draw(st.sampled_from(budgets))
    automatic = {
        "auto_threshold": draw(st.sampled_from([0.01, 0.05, 0.2, None])),
        "auto_cap": draw(st.sampled_from([None, 3, 9])),
    }
    request = Request(
        prompt,
        thinking_budget=budget,
        **(automatic if budget == "auto" else {}),
        grace=draw(st.sampled_from([0, 0, 0, 1, 4, 2**30])),
        count_think_marker=draw(st.booleans()),
        allow_empty_answer=draw(st.booleans()),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
        thinking=is_open or draw(st.sampled_from([True, True, True, False])),
        max_new_tokens=draw(st.integers(1, WRITE)),
        answer_reserve=draw(st.integers(0, 6)),
        eos_while_thinking=draw(st.sampled_from(["close", "stop"])),
        **(sampled if draw(st.booleans()) else {}),
    )
    return request, draw(st.integers(0, 11)), stop


def test_every_row_is_the_references() -> None:
    """Hundreds of rows, eight to a batch, greedy and sampled: each token and each count. Then that all was met."""
    met: collections.Counter[tuple[str, str]] = collections.Counter()
    refused = collections.Counter[bool]()

    @settings(max_examples=200, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(st.lists(any_rows(), min_size=ROWS, max_size=ROWS))
    def compare(rows: list[tuple[Request, int, tuple[int, ...]]]) -> None:
        served = []
        for request, seed, stop in rows:
            each = Case(request, random_table(seed), stop)
            fits = ref.fits(reference_row(each.request), reference_ids(each))
            refused[not fits] += 1
            if fits:
                served.append(each)
            else:
                with pytest.raises(ValueError, match="max_new_tokens"):
                    check_request(each.request, CONFIG, each.tokens)
        results = run(served)
        assert_as_reference(served, results)
        met.update((result.thinking_end, result.finish_reason) for result in results)

    compare()
    assert refused[False] > 250
    assert refused[True] > 10
    expected = {(end, finish) for end in ("natural", "budget", "off", "none", "eos") for finish in ("eos", "length")}
    assert met.keys() >= expected | {("length", "length"), ("auto", "eos")}, met


# Counting and the boundary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_edge_01_at_most_budget_tokens_lie_before_the_first_forced_one(temperature: float) -> None:
    """Off by one either way is the commonest bug; the model here never stops thinking by itself."""
    budgets = [1, 2, 23, 24, 25, 1024]
    cases = [
        Case(
            Request(PROMPT, thinking_budget=b, max_new_tokens=b + 40, temperature=temperature, seed=b),
            rambling_table(b % 4),
        )
        for b in budgets
    ]
    results = run(cases, write=ENDLESS)
    for budget, result in zip(budgets, results, strict=True):
        assert result.token_ids[0] == THINK
        assert result.forced.index(True) - 1 == budget == result.thinking_tokens
        assert result.token_ids[budget + 1 : budget + 1 + len(STOP)] == list(STOP)
    assert_as_reference(cases, results)


def test_edge_03_a_natural_close_equals_the_unlimited_run() -> None:
    cases = [case([THINK, 3, 4, END, 6, EOS], thinking_budget=b) for b in (3, 2, None)]
    results = run(cases)
    assert [r.token_ids for r in results] == [[THINK, 3, 4, END, 6, EOS]] * 3
    assert {(r.injected_tokens, r.thinking_end, r.thinking_tokens) for r in results} == {(0, "natural", 2)}


def test_edge_03_a_budget_that_is_not_reached_is_no_budget() -> None:
    """Whatever the rows and however finite: fixed, with grace, automatic at a probability that is never reached."""
    free = {"max_new_tokens": WRITE, "temperature": 0.8}
    rows = [Case(Request(PROMPT, **free, seed=i), random_table(i)) for i in range(ROWS)]
    unlimited = run(rows)
    spare = [r.thinking_tokens + len(STOP) + 8 < WRITE and r.thinking_end in ("natural", "none") for r in unlimited]
    assert sum(spare) >= ROWS // 2
    for fields in (
        {"thinking_budget": 2**31 - 2},
        {"thinking_budget": WRITE},
        {"thinking_budget": max(r.thinking_tokens for r in unlimited) + 1, "grace": 3},
        {"thinking_budget": "auto", "auto_threshold": 1.0},
    ):
        limited = run([dataclasses.replace(c, request=dataclasses.replace(c.request, **fields)) for c in rows])
        assert all(one == other for one, other, kept in zip(unlimited, limited, spare, strict=True) if kept)


@pytest.mark.parametrize("temperature", [0.0, 0.05])
def test_edge_04_a_close_right_after_the_last_allowed_token_is_natural(temperature: float) -> None:
    """The step after the budget-th token is sampled: `</think>` stands, anything else is discarded."""
    for token, end in ((END, "natural"), (7, "budget")):
        result = run_one([THINK, 3, 4, token, 6, EOS], thinking_budget=2, temperature=temperature)
        assert (result.thinking_end, result.thinking_tokens) == (end, 2)
        assert result.token_ids[3] == (END if end == "natural" else STOP[0])
        assert 7 not in result.token_ids


def test_edge_02_the_marker_is_not_counted_and_the_newline_after_it_is() -> None:
    """`count_think_marker` makes the first B tokens, `<think>` among them, all that comes before the cut: the recipe
    in two calls, whose first call writes at most B tokens."""
    result, other = run([case([THINK, BREAK, 3, 4], thinking_budget=2, count_think_marker=c) for c in (False, True)])
    assert result.token_ids[: 3 + len(STOP)] == [THINK, BREAK, 3, *STOP]
    assert other.token_ids[: 2 + len(STOP)] == [THINK, BREAK, *STOP]
    assert (result.thinking_tokens, other.thinking_tokens) == (2, 1)
    unlimited = run_one([THINK, 3, END], thinking_budget=None, count_think_marker=True)
    assert unlimited.thinking_end == "natural"


def test_edge_05_a_prompt_ending_in_an_open_thought_starts_with_the_tokens_after_the_marker() -> None:
    """Thinking-2507's prompt ends in `<think>` and a newline: the newline is the first thinking token."""
    result = run_one(prompt=(*OPEN, BREAK), thinking_budget=3)
    assert result.forced.index(True) == 2
    assert result.thinking_tokens == 3
    assert run_one(prompt=OPEN, thinking_budget=3).forced.index(True) == 3


@pytest.mark.parametrize("held", [0, 1, 3])
def test_edge_06_a_prefix_of_thinking_tokens_leaves_the_rest_of_the_budget(held: int) -> None:
    result = run_one(prompt=(*OPEN, *[4] * held), thinking_budget=5)
    assert result.forced.index(True) == 5 - held
    assert result.thinking_tokens == 5


@pytest.mark.parametrize("held", [3, 4, 7])
def test_edge_06_a_prefix_that_spent_the_budget_injects_at_the_first_step(held: int) -> None:
    """Nothing is sampled first, so not even a `</think>` the model wants comes before the stop text."""
    result = run_one([END, 9, EOS], prompt=(*OPEN, *[4] * held), thinking_budget=3)
    assert result.token_ids[: len(STOP)] == list(STOP)
    assert all(result.forced[: len(STOP)])
    assert (result.thinking_tokens, result.thinking_end) == (held, "budget")


def test_edge_06_a_row_continued_from_its_own_prefix_goes_on_as_before() -> None:
    """Counters read off a prompt equal counters carried: cut the row anywhere in its thought and continue it."""
    compared = 0
    for table in range(8):
        request = Request(PROMPT, thinking_budget=6, max_new_tokens=WRITE)
        whole = run([Case(request, random_table(table))])[0]
        thought = whole.token_ids.index(END) if END in whole.token_ids else len(whole.token_ids)
        first_forced = whole.forced.index(True) if True in whole.forced else len(whole.token_ids)
        cuts = range(1, min(thought, first_forced, ROWS))
        prompts = [(*PROMPT, *whole.token_ids[:cut]) for cut in cuts]
        cases = [
            Case(Request(p, thinking_budget=6, max_new_tokens=WRITE - cut), random_table(table))
            for cut, p in zip(cuts, prompts, strict=True)
        ]
        for cut, result in zip(cuts, run(cases), strict=True):
            assert result.token_ids == whole.token_ids[cut:]
            assert (result.thinking_tokens, result.thinking_end) == (whole.thinking_tokens, whole.thinking_end)
            compared += 1
    assert compared > 20


def test_edge_06_a_prompts_second_thought_counts_from_its_own_marker() -> None:
    """What a closed thought held is spent; so is it where a caller says that a thought is open without a marker."""
    for end, told in (((THINK, 5), None), ((), True)):
        result = run_one(prompt=(*OPEN, 3, 4, END, BREAK, *end), start_in_think=told, thinking_budget=2)
        assert result.forced.index(True) == 2 - len(end[1:])
        assert result.thinking_tokens == 2


def test_edge_07_unlimited_in_three_spellings_never_triggers() -> None:
    cases = [Case(Request(PROMPT, thinking_budget=b, max_new_tokens=WRITE), rambling_table(1)) for b in (None, -1)]
    cases += [Case(Request(OPEN, thinking_budget=2**31 - 1, max_new_tokens=WRITE), rambling_table(1))]
    for result in run(cases):
        assert (result.injected_tokens, result.thinking_end, len(result.token_ids)) == (0, "length", WRITE)


def test_edge_09_a_row_that_never_opens_a_thought_is_never_cut() -> None:
    result = run_one([7, 8, THINK, 9, END], thinking_budget=2)
    assert result.token_ids == [7, 8, 0, 9, END] + [0] * (WRITE - 5)
    assert (result.injected_tokens, result.thinking_tokens, result.thinking_end) == (0, 0, "none")
    assert result.answer_tokens == len(result.token_ids) == WRITE


# Injection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [BREAK, 0, 12])
def test_edge_11_the_stop_text_is_appended_as_ids(last: int) -> None:
    """24 ids, whatever the thought ends in, `BREAK` (with which they begin) among it."""
    stop = (BREAK, *range(13), 3, 1, 2, 8, 9, 3, 7, 5, END, BREAK)
    assert len(stop) == 24
    result = run_one([THINK, 4, last], thinking_budget=2, stop=stop)
    assert result.token_ids[:27] == [THINK, 4, last, *stop]
    assert [i for i, forced in enumerate(result.forced) if forced] == list(range(3, 27))


def test_edge_13_all_see_the_same_ids_in_the_same_order_across_the_cut() -> None:
    """The token buffer, and what the model was fed at which position; once each, without a gap."""
    each = case([THINK, 3, 4, 5], thinking_budget=2, max_new_tokens=20)
    state = _begin(*pack([each]), UNLIMITED, write=WRITE)
    written = results(state)[0].token_ids
    assert written[:9] == [THINK, 3, 4, *STOP]
    sequence = [*each.request.prompt_ids, *written]
    assert np.asarray(state.cache["seen"])[0, : len(sequence) - 1].tolist() == sequence[:-1]
    assert np.asarray(state.cache["times"])[0, : len(sequence)].tolist() == [1] * (len(sequence) - 1) + [0]


def test_edge_14_a_cut_row_leaves_every_other_row_alone() -> None:
    """In any position and order, greedy and sampled."""
    table = [
        Case(Request(PROMPT, max_new_tokens=WRITE, temperature=i % 2, seed=i), random_table(i)) for i in range(ROWS)
    ]
    before = run(table)
    for cut in range(0, ROWS, 3):
        cases = list(table)
        cases[cut] = dataclasses.replace(table[cut], request=dataclasses.replace(table[cut].request, thinking_budget=1))
        order = np.random.default_rng(cut).permutation(ROWS)
        after = run([cases[i] for i in order])
        assert all(r == before[i] for i, r in zip(order, after, strict=True) if i != cut)


def test_edge_15_rows_in_every_phase_coexist_in_one_step() -> None:
    """Stepped token by token: thinking, at three places of the stop text, answering and done, at the same moment."""
    cases = [case(prompt=(*OPEN, 3), thinking_budget=b) for b in (1, 2, 3, 30)]
    cases += [case([7, EOS]), case([THINK, 3, END, 4]), case([THINK, 3, END, EOS])]
    packed, table = pack(cases)
    state = _begin(packed, table, np.int32(0), write=WRITE)
    met = []
    while state.budget.active_B.any():
        state = _go_on(state, packed.rows, np.int32(1))
        stopping = np.asarray(state.budget.phase_B) == bud.STOP
        met.append(
            (set(np.asarray(state.budget.phase_B).tolist()), set(np.asarray(state.budget.forced_at_B)[stopping]))
        )
    assert any(len(at) >= 3 and phases == {bud.THINK, bud.STOP, bud.ANSWER, bud.DONE} for phases, at in met)
    assert_as_reference(cases, results(state)[: len(cases)])


def test_edge_16_a_thought_ending_in_the_stop_texts_first_words_gets_the_whole_text() -> None:
    result = run_one([THINK, 7, *STOP[:3]], thinking_budget=4)
    assert result.token_ids[: 5 + len(STOP)] == [THINK, 7, *STOP[:3], *STOP]
    assert result.injected_tokens == len(STOP)


def test_edge_17_the_machinery_never_doubles_the_close() -> None:
    """A model that wants `</think>` all through the injection gets one; one that closed by itself gets no other."""
    result = run_one([THINK, 7, 8, *[END] * (len(STOP) - 1)], thinking_budget=1)
    assert result.token_ids[: 2 + len(STOP)] == [THINK, 7, *STOP]
    assert result.token_ids.count(END) == 1
    for budget in (1, 2, 3):
        result = run_one([THINK, 7, END, 9], thinking_budget=budget)
        assert (result.token_ids.count(END), result.injected_tokens) == (1, 0)
    for prompt in ((*PROMPT, *BLOCK), (*OPEN, 7, END, BREAK), (*OPEN, 7, END, BREAK, 4)):
        for fields in ({"thinking_budget": 0}, {"thinking": False}, {"thinking_budget": 1}):
            assert run_one([9, EOS], prompt=prompt, **fields).token_ids == [9, EOS]


def test_edge_18_a_stop_text_that_goes_on_after_the_close_is_delivered_whole() -> None:
    stop = (BREAK, 1, END, BREAK, 5, 6, 7)
    result = run_one([THINK, 3, 9, 9], thinking_budget=1, stop=stop)
    assert result.token_ids[: 2 + len(stop)] == [THINK, 3, *stop]
    assert result.forced[: 2 + len(stop)] == [False] * 2 + [True] * len(stop)
    assert result.injected_tokens == len(stop)


def test_edge_19_a_stop_text_of_any_length_needs_no_new_program() -> None:
    run([case()])
    before = len(traces)
    for length in range(1, 33):
        stop = tuple(range(length))[:12] + (3,) * max(0, length - 13) + (END,) * (length > 12)
        stop = (*stop[: length - 1], END)
        result = run_one([THINK, 7], thinking_budget=1, stop=stop)
        assert result.token_ids[2 : 2 + length] == list(stop)
        assert (result.injected_tokens, result.answer_tokens) == (length, WRITE - 2 - length)
    assert len(traces) == before


@pytest.mark.parametrize(
    ("thought", "waited"),
    [
        ([3, 10, 11, 11, 4], 2),  # a character of three bytes, one a token
        ([3, 10, 12, 4], 1),  # its last two bytes in one token
        ([3, 13, 12, 4], 1),  # of four bytes, begun in the middle of a token
        ([3, 13, 11, 11, 4], 2),
        ([3, 10, 10, 10, 10, 10], 3),  # never whole: three tokens are waited for, not more
        ([3, 12, 4], 0),  # stray continuation bytes begin nothing
        ([3, 10, 4], 1),  # nor does a character that something else interrupts stay begun
    ],
)
def test_edge_20_a_cut_waits_until_a_character_is_whole(thought: list[int], waited: int) -> None:
    """With the budget in the middle of the character."""
    result = run_one([THINK, *thought, 5, 5], thinking_budget=2)
    assert result.token_ids[: 3 + waited + len(STOP)] == [THINK, *thought[: 2 + waited], *STOP]
    assert result.thinking_tokens == 2 + waited
    spelled = b"".join(TEXT[token] for token in thought[: 2 + waited])
    if waited < 3 and thought not in ([3, 12, 4], [3, 10, 4]):
        spelled.decode()


@pytest.mark.parametrize(("room", "kept"), [(1, 1), (2, 1), (3, 1), (4, 4), (5, 5)])
def test_edge_20_what_cannot_become_whole_in_the_room_left_is_not_begun(room: int, kept: int) -> None:
    """Room for so many thinking tokens, and a character of three after the first: kept whole, or cut before it."""
    thought = [3, 10, 11, 11, 5]
    result = run_one([THINK, *thought, 5], thinking_budget=99, max_new_tokens=1 + room + len(STOP) + 1)
    assert result.token_ids == [THINK, *thought[:kept], *STOP, *[0] * (1 + room - kept)]


def test_edge_20_a_prompts_half_character_is_waited_for() -> None:
    result = run_one([11, 11, 5], prompt=(*OPEN, 3, 10), thinking_budget=1)
    assert result.token_ids[: 2 + len(STOP)] == [11, 11, *STOP]
    assert result.thinking_tokens == 4


def test_edge_21_nothing_that_shapes_the_distribution_touches_a_forced_token() -> None:
    """Temperature, top-k, top-p, min-p, penalties, and the mask of ids that decode to nothing."""
    stop = (BREAK, NUM_TOKENS, 1, END, NUM_TOKENS + 1)
    shapes = {"temperature": 2.0, "top_k": 1, "top_p": 0.1, "min_p": 1.0, "presence_penalty": 2.0}
    result = run_one([THINK, 3, BREAK, 1, 1, 1], thinking_budget=2, stop=stop, frequency_penalty=2.0, **shapes)
    assert result.token_ids[: 3 + len(stop)] == [THINK, 3, BREAK, *stop]


def test_edge_22_forced_tokens_count_in_no_penalty() -> None:
    """Nor does the prompt; sampled tokens do, in the thought and in the answer, once for presence and each time for
    frequency."""
    table = np.zeros((PERIOD, V, V), np.float32)
    table[:, :, [1, 2]] = [1.0, 0.9]  # 1 and 2 are both in the stop text, 1 in the prompt too
    table[len(PROMPT) - 1, :, THINK] = 5
    request = Request((1, *PROMPT), thinking_budget=1, max_new_tokens=14, presence_penalty=0.5)
    table = np.roll(table, 1, axis=0)
    result = run([Case(request, table)])[0]
    # <think> and 1 are sampled; after the stop text 1 has 0.5 against the 0.9 of 2, then 2 has 0.4.
    assert result.token_ids == [THINK, 1, *STOP, 2, 1, 1, 1, 1, 1]
    often = dataclasses.replace(request, presence_penalty=0.0, frequency_penalty=0.25)
    assert run([Case(often, table)])[0].token_ids == [THINK, 1, *STOP, 2, 1, 2, 1, 2, 1]
    neither = dataclasses.replace(request, presence_penalty=0.0)
    assert run([Case(neither, table)])[0].token_ids == [THINK, 1, *STOP, 1, 1, 1, 1, 1, 1]


def test_edge_23_forced_tokens_keep_the_models_own_logprobs_and_say_so() -> None:
    """Of the logits before mask, temperature and forcing: a forced token of a confident model has a low one."""
    each = Case(
        Request(PROMPT, thinking_budget=2, max_new_tokens=20, temperature=0.3, top_k=2, seed=1), rambling_table(2)
    )
    result = run([each])[0]
    assert sum(result.forced) == len(STOP)
    tokens = list(each.request.prompt_ids)
    for token, logprob in zip(result.token_ids, result.logprobs, strict=True):
        logits = each.table[len(tokens) - 1, tokens[-1]].astype(np.float64)
        assert logprob == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=1e-5)
        tokens.append(token)


def test_edge_24_draws_do_not_depend_on_forcing() -> None:
    """The same answer as the recipe in two calls: think, then ask again with the stop text in the prompt."""
    for seed in range(4):
        one = Case(
            Request(PROMPT, thinking_budget=4, max_new_tokens=WRITE, temperature=1.0, seed=seed), rambling_table(3)
        )
        result = run([one])[0]
        cut = result.forced.index(True) + len(STOP)
        prompt = (*PROMPT, *result.token_ids[:cut])
        again = Case(Request(prompt, max_new_tokens=WRITE - cut, temperature=1.0, seed=seed), rambling_table(3))
        assert run([again])[0].token_ids == result.token_ids[cut:]


@pytest.mark.parametrize("grace", [0, 1, 3, 5, 1000])
def test_edge_25_grace_lets_the_line_end(grace: int) -> None:
    """Id 9 ends a line, as the fifth thinking token: after it where the grace period reaches that far, at its last
    token otherwise. A line that ends within the budget ends nothing."""
    result = run_one([THINK, 9, 3, 4, 5, 9, 6, 6, 6, 6, 6, 6], thinking_budget=2, grace=grace)
    assert result.thinking_tokens == min(2 + grace, 5)
    assert result.token_ids[: 1 + result.thinking_tokens] == [THINK, 9, 3, 4, 5, 9][: 1 + result.thinking_tokens]
    assert result.token_ids[1 + result.thinking_tokens :][: len(STOP)] == list(STOP)
    closed = run_one([THINK, 3, 3, 3, END, 6], thinking_budget=2, grace=grace)
    assert closed.thinking_end == ("budget" if grace == 0 else "natural")


def test_edge_25_grace_in_a_prompts_thought() -> None:
    """A prompt may stand in its grace period, or at the end of it, or just behind a line's end."""
    for held, first in (([3, 3, 3], 2), ([3, 3, 3, 3, 3], 0), ([3, 3, 3, 9], 0), ([3, 3], 3)):
        result = run_one([4, 4, 4, 4], prompt=(*OPEN, *held), thinking_budget=2, grace=3)
        assert result.forced.index(True) == first


# Automatic budgets ---------------------------------------------------------------------------------------------------


def unsure(probability: float) -> np.ndarray:
    """A table that never samples `</think>` and gives it this probability at the fourth thinking token."""
    table = np.zeros((PERIOD, V, V), np.float32)
    table[:, :, 4] = 20.0
    table[:, :, END] = -20.0
    table[len(PROMPT) - 1, :, THINK] = 40.0
    table[len(PROMPT) + 3, :, END] = 20.0 + np.log(probability / (1 - probability))
    return table


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_an_automatic_budget_closes_when_the_model_is_ready(temperature: float) -> None:
    """At the threshold, not below it, whatever is sampled; with what of the stop text is from `</think>` on."""
    fields = {"thinking_budget": "auto", "max_new_tokens": 20, "temperature": temperature}
    request = Request(PROMPT, auto_threshold=0.3, **fields)
    ready, not_ready = run([Case(request, unsure(0.31)), Case(request, unsure(0.29))])
    assert ready.token_ids[:7] == [THINK, 4, 4, 4, END, BREAK, 4]
    assert (ready.thinking_end, ready.thinking_tokens, ready.injected_tokens) == ("auto", 3, 2)
    assert ready.forced[4:6] == [True, True]
    # Not ready: an automatic budget is finite all the same, and leaves an answer.
    assert (not_ready.thinking_end, not_ready.answer_tokens) == ("room", 1)


def test_an_automatic_budget_has_a_hard_cap() -> None:
    request = Request(PROMPT, thinking_budget="auto", auto_threshold=0.5, auto_cap=2, max_new_tokens=20)
    result = run([Case(request, unsure(0.9))])[0]
    assert (result.thinking_tokens, result.thinking_end) == (2, "budget")
    for name, value in (("auto_cap", 2), ("auto_threshold", 0.5)):
        with pytest.raises(ValueError, match=rf"^{name}: {value}, but thinking_budget is not 'auto'; leave it out$"):
            Request(PROMPT, thinking_budget=9, **{name: value})


# Modes and flags -----------------------------------------------------------------------------------------------------


def test_edge_26_27_budget_zero_and_no_think_give_the_empty_block_and_no_stop_text() -> None:
    """And then go on as if the block had stood in the prompt, as the template puts it for `enable_thinking=False`."""
    off = [{"thinking_budget": 0}, {"thinking": False}, {"thinking": False, "thinking_budget": 3}]
    for i in range(4):
        fields = {"max_new_tokens": 30, "temperature": i / 2, "seed": i}
        results = run([Case(Request(PROMPT, **fields, **mode), random_table(i)) for mode in off])
        fields["max_new_tokens"] -= len(BLOCK)
        templated = run([Case(Request((*PROMPT, *BLOCK), **fields, **mode), random_table(i)) for mode in off])
        for result, rest in zip(results, templated, strict=True):
            assert result.token_ids == [*BLOCK, *rest.token_ids]
            assert result.forced == [True] * 4 + [False] * len(rest.token_ids)
            assert (result.thinking_tokens, result.thinking_end, rest.thinking_end) == (0, "off", "off")
            assert (result.injected_tokens, rest.injected_tokens) == (4, 0)
            assert result.answer_tokens == rest.answer_tokens == len(rest.token_ids)


def test_edge_34_mixed_modes_in_one_call_equal_each_alone() -> None:
    modes = [{"thinking_budget": b} for b in (1, 7, 0, None)] + [{"thinking": False}]
    cases = [
        Case(Request(PROMPT, **mode, max_new_tokens=WRITE, temperature=i % 2, seed=9), random_table(i))
        for i, mode in enumerate(modes)
    ]
    assert run(cases) == [run([each])[0] for each in cases]


def test_edge_35_sampling_settings_are_each_rows_own() -> None:
    """Thinking and non-thinking rows with their own temperatures, filters and penalties, in one program."""
    kinds = [
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5, "thinking": False},
        {"temperature": 0.0},
        {"temperature": 1.3, "min_p": 0.2, "frequency_penalty": 0.3},
    ]
    cases = [
        Case(Request(PROMPT, **kind, thinking_budget=6, max_new_tokens=WRITE, seed=i), random_table(i))
        for i, kind in enumerate(kinds * 2)
    ]
    together = run(cases)
    assert together == [run([each])[0] for each in cases]
    assert_as_reference(cases, together)
    shuffled = [
        dataclasses.replace(each, request=dataclasses.replace(each.request, **{"temperature": 0.0})) for each in cases
    ]
    assert sum(one.token_ids != other.token_ids for one, other in zip(together, run(shuffled), strict=True)) >= 4


# State machine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [[THINK, 7, END], [THINK, 7, 8, 9]])
def test_edge_36_no_second_thought_after_either_close(script: list[int]) -> None:
    """The model would open thoughts for ever; inside a thought `<think>` is a token like any other."""
    result = run_one(script + [THINK] * (WRITE - len(script)), thinking_budget=2)
    close = result.token_ids.index(END)
    assert THINK not in result.token_ids[close:]
    assert result.thinking_tokens <= 2
    assert run_one([THINK] * WRITE, thinking_budget=3).token_ids[:5] == [THINK] * 4 + [STOP[0]]


def test_edge_37_38_a_tool_call_suspends_the_budget() -> None:
    """Nothing is forced, counted or read as a marker up to `</tool_call>`; then the budget is back."""
    call = [TOOL, 7, THINK, 8, END, 9, 9, 9, END_TOOL]
    for budget, after in ((2, 0), (3, 1)):
        result = run_one([THINK, 3, 4, *call, 5, 6], thinking_budget=budget)
        head = [THINK, 3, 4] if budget == 2 else [THINK, 3, 4, *call, 5]
        assert result.token_ids[: len(head) + len(STOP)] == [*head, *STOP]
        assert result.thinking_tokens == budget == 2 + after
    result = run_one([THINK, 3, *call, 4, 5], thinking_budget=2)  # one token left when the call begins
    assert result.token_ids[:12] == [THINK, 3, *call, 4]
    assert result.forced.index(True) == 12
    result = run_one([THINK, 3, TOOL, *[7] * 40], thinking_budget=2, max_new_tokens=20)  # a call that never ends
    assert (result.injected_tokens, result.thinking_tokens, result.thinking_end) == (0, 1, "length")
    for eos in ("close", "stop"):
        result = run_one([THINK, 3, TOOL, 7, EOS], thinking_budget=2, eos_while_thinking=eos)
        assert result.token_ids == [THINK, 3, TOOL, 7, EOS]
        assert (result.injected_tokens, result.thinking_end, result.finish_reason) == (0, "eos", "eos")


def test_edge_38_a_prompt_that_ends_inside_a_tool_call_of_a_thought() -> None:
    """No forced token lands inside, though the budget is spent; the call's tokens were not counted either."""
    result = run_one([7, END_TOOL, 8], prompt=(*OPEN, 3, TOOL, 4, END, 5), thinking_budget=1)
    assert result.token_ids[: 2 + len(STOP)] == [7, END_TOOL, *STOP]
    assert result.thinking_tokens == 1


def test_edge_39_a_stray_close_in_the_answer_changes_nothing() -> None:
    result = run_one([THINK, 7, END, 8, END, 9, EOS], thinking_budget=1)
    assert result.token_ids == [THINK, 7, END, 8, END, 9, EOS]
    assert (result.thinking_end, result.thinking_tokens, result.answer_tokens) == ("natural", 1, 4)
    assert run_one([END, 8, EOS], thinking_budget=1).thinking_end == "none"


@pytest.mark.parametrize(
    "user", [(THINK, 1, 2), (1, END, 2), (EOS, THINK, 2), (THINK, 1, END), (EOS, *BLOCK[:2]), (1, EOS, THINK)]
)
def test_edge_40_markers_typed_by_a_user_are_text(user: tuple[int, ...]) -> None:
    """What stands before the last end of a turn opens, closes and counts nothing."""
    script = [THINK, 7, 8, 9]
    clean, typed = (run_one(script, prompt=(*said, EOS, GEN), thinking_budget=2) for said in ((1, 2, 3), user))
    assert typed == clean
    assert typed.thinking_end == "budget"


def test_edge_42_an_end_of_sequence_inside_the_thought_closes_it_or_ends_the_row() -> None:
    for eos in (EOS, EOS_2):
        closed = run_one([THINK, 7, eos])
        assert closed.token_ids[: 2 + len(STOP)] == [THINK, 7, *STOP]
        assert (closed.thinking_end, closed.answer_tokens) == ("eos", WRITE - 2 - len(STOP))
        plain = run_one([THINK, 7, eos], eos_while_thinking="stop")
        assert plain.token_ids == [THINK, 7, eos]
        assert (plain.thinking_end, plain.finish_reason, plain.answer_tokens) == ("eos", "eos", 0)
        assert closed.thinking_tokens == plain.thinking_tokens == 1
    # At the boundary the budget is what ended it.
    cut = run_one([THINK, 7, EOS], thinking_budget=1, eos_while_thinking="stop")
    assert cut.token_ids[: 2 + len(STOP)] == [THINK, 7, *STOP]
    assert (cut.thinking_end, cut.answer_tokens) == ("budget", WRITE - 2 - len(STOP))


def test_edge_43_an_end_of_sequence_right_after_the_close_is_an_empty_answer() -> None:
    result = run_one([THINK, 7, END, EOS])
    assert result.token_ids == [THINK, 7, END, EOS]
    assert (result.thinking_end, result.finish_reason, result.answer_tokens) == ("natural", "eos", 1)


def test_edge_43_an_option_keeps_the_answer_from_being_empty() -> None:
    """The end-of-sequence token is masked for one step; after a thought, without one, and after an empty block."""
    for script, fields in (([THINK, 7, END, EOS, EOS], {}), ([EOS, EOS], {}), ([EOS] * 6, {"thinking": False})):
        empty, kept = run([case(script, **fields, allow_empty_answer=allow) for allow in (True, False)])
        assert empty.answer_tokens == 1
        assert (kept.answer_tokens, kept.token_ids[-1]) == (2, EOS)
        assert kept.token_ids[-2] not in (EOS, EOS_2)


# Lengths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [0, 1, 5])
def test_edge_44_a_budget_beyond_the_room_is_cut_early_enough(reserve: int) -> None:
    """The stop text and the reserve fit to the token; one token less of room is refused, with the numbers."""
    result = run_one([THINK], thinking_budget=1000, max_new_tokens=20, answer_reserve=reserve)
    assert (len(result.token_ids), result.answer_tokens) == (20, reserve)
    assert (result.thinking_end, result.injected_tokens) == ("room", len(STOP))
    assert result.thinking_tokens == 20 - 1 - len(STOP) - reserve
    least = 1 + len(STOP) + reserve
    assert run_one([THINK], thinking_budget=9, max_new_tokens=least, answer_reserve=reserve).thinking_tokens == 0
    short = case(thinking_budget=9, max_new_tokens=least - 1, answer_reserve=reserve)
    with pytest.raises(ValueError, match=rf"max_new_tokens: {least - 1} .*at least {least} .*{len(STOP)} .*{reserve} "):
        check_request(short.request, CONFIG, short.tokens)


@pytest.mark.parametrize("held", [1, 4])
def test_edge_44_a_prompts_open_thought_is_refused_where_the_stop_text_cannot_fit(held: int) -> None:
    """With the budget spent by the prompt (held 4) as well as not (held 1)."""
    each = case(prompt=(*OPEN, *[3] * held), thinking_budget=3, max_new_tokens=len(STOP), answer_reserve=1)
    with pytest.raises(ValueError, match=rf"max_new_tokens: {len(STOP)} .*at least {len(STOP) + 1} "):
        check_request(each.request, CONFIG, each.tokens)


def test_edge_45_more_length_is_more_room_for_the_answer() -> None:
    short, long = (run_one([THINK], thinking_budget=5, max_new_tokens=n) for n in (20, 40))
    assert short.thinking_tokens == long.thinking_tokens == 5
    assert long.answer_tokens == short.answer_tokens + 20


def test_edge_46_length_reached_inside_the_stop_text() -> None:
    """Possible for an unlimited row that an end-of-sequence closed; the last slot of the buffer is the last written."""
    for length in (5, WRITE):
        script = [THINK, *[7] * (length - 4), EOS]
        cases = [case(script, max_new_tokens=length), case([7], max_new_tokens=WRITE)]
        result, neighbour = run(cases)
        assert result.token_ids == [THINK, *[7] * (length - 4), *STOP[:3]]
        assert (result.thinking_end, result.finish_reason) == ("eos", "length")
        assert (result.answer_tokens, result.injected_tokens, result.thinking_tokens) == (0, 3, length - 4)
        assert neighbour.token_ids == [7] + [0] * (WRITE - 1)


def test_edge_47_length_reached_while_thinking_leaves_all_in_the_thought() -> None:
    for n in (1, 2, 9):
        result = run_one([THINK], max_new_tokens=n)
        assert (result.thinking_tokens, result.answer_tokens, result.thinking_end) == (n - 1, 0, "length")
        assert result.finish_reason == "length"


def test_edge_48_finished_rows_neither_count_nor_write() -> None:
    """The model sees each token of each row once, at its position, the row's last token excepted, and no other."""
    cases = [case([7, EOS]), case([THINK, 7], thinking_budget=1), case(max_new_tokens=1), case(prompt=(*OPEN, 1, 2))]
    state = _begin(*pack(cases), UNLIMITED, write=WRITE)
    assert len({len(result.token_ids) for result in results(state)[: len(cases)]}) >= 3
    for i, (each, result) in enumerate(zip(cases, results(state)[: len(cases)], strict=True)):
        sequence = [*each.request.prompt_ids, *result.token_ids][:-1]
        times = np.asarray(state.cache["times"])[i]
        assert times.tolist() == [1] * len(sequence) + [0] * (len(times) - len(sequence))
        assert np.asarray(state.cache["seen"])[i, : len(sequence)].tolist() == sequence
        for buffer in (state.tokens_BM, state.logprobs_BM, state.forced_BM):
            assert not np.asarray(buffer)[i, len(result.token_ids) :].any()
    assert_as_reference(cases, results(state)[: len(cases)])


# Usage, streaming, program -------------------------------------------------------------------------------------------


def test_edge_54_the_three_counts_and_the_markers_sum_to_the_length() -> None:
    """For rows without tool calls; each sampled marker is in no count, each forced one among the injected."""
    cases = [
        case([THINK, 3, 4, END, 5, END, EOS]),
        case([THINK, 3, 4, 5], thinking_budget=2),
        case([THINK, END, EOS], thinking_budget=2),
        case([7, END, EOS], thinking_budget=2),
        case([5, EOS], thinking=False, prompt=(*PROMPT,)),
        case([3, END], prompt=OPEN),
        case([THINK, THINK, END]),
    ]
    sampled_markers = [2, 1, 2, 0, 0, 1, 2]
    for result, markers in zip(run(cases), sampled_markers, strict=True):
        counts = result.thinking_tokens + result.injected_tokens + result.answer_tokens
        assert counts + markers == len(result.token_ids) == len(result.forced) == len(result.logprobs)


def test_edge_55_a_thought_that_the_prompt_opened_is_counted() -> None:
    assert run_one([7, 8, END, 9], prompt=OPEN).thinking_tokens == 2
    assert run_one([7, 8, END, 9], prompt=(*OPEN, 3)).thinking_tokens == 3


def test_edge_56_each_way_a_thought_ends_is_told_apart() -> None:
    cases = {
        "natural": case([THINK, 7, END]),
        "budget": case([THINK, 7, 8], thinking_budget=1),
        "off": case(thinking=False),
        "none": case([7]),
        "eos": case([THINK, 7, EOS]),
        "length": case([THINK, 7]),
    }
    assert [result.thinking_end for result in run(list(cases.values()))] == list(cases)


def test_edge_57_a_closed_empty_block_in_the_prompt_is_answering() -> None:
    """Though nobody said `thinking=False`: no cut, and `<think>` cannot open another."""
    for fields in ({}, {"thinking_budget": 1}, {"thinking": False}, {"thinking_budget": 0}):
        result = run_one([THINK, 7, 8, EOS], prompt=(*PROMPT, *BLOCK), **fields)
        assert result.token_ids == [0, 7, 8, EOS]
        assert (result.injected_tokens, result.answer_tokens, result.thinking_end) == (0, 4, "off")


@pytest.mark.parametrize("offset", [1, 9, 20])
def test_edge_49_padding_on_either_side_changes_nothing(offset: int) -> None:
    """Prompts that begin at other slots, down to padding on the left alone: the same ids and counts."""
    cases = [
        Case(Request((1,) * i + PROMPT, thinking_budget=3, max_new_tokens=WRITE, temperature=i % 2), random_table(i))
        for i in range(ROWS)
    ]
    packed, table = pack(cases)
    slots = packed.prompt_BP.shape[1]
    moved = [min(offset, slots - len(each.request.prompt_ids)) for each in cases]
    roll = functools.partial(np.roll, axis=0)
    right = packed._replace(
        prompt_BP=np.stack([roll(row, by) for row, by in zip(packed.prompt_BP, moved, strict=True)]),
        there_BP=np.stack([roll(row, by) for row, by in zip(packed.there_BP, moved, strict=True)]),
    )
    assert results(_begin(right, table, UNLIMITED, write=WRITE)) == run(cases)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_edge_60_leaving_and_entering_the_loop_preserves_everything(steps: int) -> None:
    cases = [
        Case(Request(PROMPT, thinking_budget=b, max_new_tokens=WRITE, temperature=b % 2, seed=b), random_table(b))
        for b in range(ROWS)
    ]
    packed, table = pack(cases)
    state = _begin(packed, table, np.int32(steps), write=WRITE)
    entered = 1
    assert np.asarray(state.budget.written_B).max() == 1 + steps  # the prefill's token, and one a step
    while state.budget.active_B.any():
        state = _go_on(state, packed.rows, np.int32(steps))
        entered += 1
    assert entered > 3
    assert results(state) == run(cases)


def test_edge_64_samples_have_counters_of_their_own() -> None:
    """Eight samples of one prompt differ, each by the reference's rules, whoever its neighbours are."""
    cases = [
        Case(
            Request(PROMPT, thinking_budget=5, max_new_tokens=WRITE, temperature=1.0, seed=3, sample=i), random_table(2)
        )
        for i in range(ROWS)
    ]
    together = run(cases)
    assert_as_reference(cases, together)
    assert len({tuple(result.token_ids) for result in together}) == ROWS
    assert len({result.thinking_tokens for result in together}) > 1
    assert run(cases[5:6]) == together[5:6]


def test_edge_61_no_value_of_any_row_recompiles() -> None:
    run([case()])
    before = len(traces)
    rng = np.random.default_rng(0)
    for i in range(6):
        stop = (*rng.integers(0, 14, 1 + i).tolist(), END)
        fields = {
            "thinking_budget": "auto" if i == 5 else i - 1,
            "temperature": i / 3,
            "top_k": i,
            "top_p": 1 - i / 9,
            "seed": i,
            "sample": i,
            "grace": i,
            "presence_penalty": i / 9,
            "auto_threshold": i / 9 if i == 5 else None,
            "allow_empty_answer": i % 2 == 0,
        }
        run([case(prompt=(*[1] * i, *PROMPT), stop=stop, max_new_tokens=40 - i, answer_reserve=i, **fields)])
    assert len(traces) == before
