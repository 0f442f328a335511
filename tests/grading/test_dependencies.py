"""Which statements an answer needs, on notebooks small enough to say it by hand."""

from __future__ import annotations

import pytest

from llmcourse.grading.dependencies import ANSWER, LAB, OWN, Source, Wanted, plan
from llmcourse.grading.statements import MAX_ANALYZED, drop, keep, split

PROVEN = frozenset()


def lab(identifier, text, allowed=PROVEN):
    return Source(identifier, text, LAB, allowed)


def planned(sources, name="f", cells=(1,), **options):
    return plan(sources, {"e": Wanted(name, cells)}, **options)


def texts(made):
    return {identifier: [line for line in text.splitlines() if line] for identifier, text in made.cells}


@pytest.mark.parametrize(
    ("source", "binds", "needs"),
    [
        ("x = y + z", {"x"}, {"y", "z"}),
        ("x += 1", {"x"}, {"x"}),
        ("import a.b, c as d\nfrom e import g as h", {"a", "d", "h"}, set()),
        ("def f(p, q=default):\n    local = p\n    return other(local)", {"f"}, {"default", "other"}),
        ("class A(B):\n    k = v\n    def m(self): return w", {"A"}, {"B", "v", "w"}),
        ("t = [i * s for i in r if i]", {"t"}, {"s", "r"}),
        ("g = lambda n: n + m", {"g"}, {"m"}),
        ("def f():\n    global made\n    made = 1", {"f", "made"}, set()),
        ("@deco(1)\ndef f(): ...", {"f"}, {"deco"}),
        ("with o(p) as h:\n    u = h", {"h", "u"}, {"o", "p", "h"}),
        ("for i, (j, *k) in n: pass", {"i", "j", "k"}, {"n"}),
        ("if (w := v): pass", {"w"}, {"v"}),
        ("print(f'{inside!r:{width}}')", set(), {"inside", "width"}),
        ("try:\n    a\nexcept Exception as e:\n    b = 1", {"e", "b"}, {"a"}),
        ("x: int = y", {"x"}, {"y"}),
        ("await task", set(), {"task"}),
    ],
)
def test_names_are_those_of_the_notebook(source, binds, needs):
    statements = split(source)
    bound = set().union(*(one.binds for one in statements)) - {"__annotations__"}
    needed = set().union(*(one.needs for one in statements)) - {"__annotations__"}
    assert (bound, needed) == (binds, needs)


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("a['k'] = b", {"a"}),
        ("a.b.c = 1", {"a"}),
        ("a[0].append(1)", {"a"}),
        ("if p:\n    a.update(b)", {"a"}),
        ("del a[0]", {"a"}),
        ("a.b[0] += 1", {"a"}),
        ("b = a.pop()", set()),
        ("def f():\n    a.append(1)", set()),
        ("print(a)", set()),
    ],
)
def test_changes_are_writes_into_objects(source, changes):
    assert split(source)[0].changes == changes


@pytest.mark.parametrize(
    ("source", "cheap"),
    [
        ("import math", True),
        ("def f(x=g()): return h(x)", True),
        ("class A:\n    x = field()", True),
        ("n = {'a': [1, 2 * 3]}", True),
        ("n = train(3)", False),
        ("n: int = len(x)", False),
        ("for i in x: pass", False),
        ("print(1)", False),
        ("x = 1; train()", False),
    ],
)
def test_cheap_statements_import_define_or_assign_without_a_call(source, cheap):
    assert [one.cheap for one in split(source)] == [cheap]


def test_statements_on_one_line_belong_together_and_decorators_to_their_function():
    source = "a = 1; b = 2\n\n@x\n@y\ndef f():\n    pass\n# note\nc = 3"
    assert [(one.first, one.last) for one in split(source)] == [(0, 0), (2, 5), (7, 7)]
    assert keep(source, split(source)[1:2]).splitlines() == ["", "", "@x", "@y", "def f():", "    pass"]
    assert drop(source, split(source)[1:2]).splitlines() == [
        "a = 1; b = 2",
        "",
        "",
        "",
        "",
        "",
        "# note",
        "c = 3",
    ]


def test_magics_and_what_python_cannot_read():
    source = "%matplotlib inline\n!ls\nx = 1\n%time y = 2"
    assert [one.binds for one in split(source)] == [{"x"}]
    (timed,) = split("%%time\nz = f(1)")
    assert timed.binds == {"z"} and timed.needs == {"f"} and not timed.cheap
    assert split("%%bash\nx=1")[0].binds == frozenset()
    (broken,) = split("def f(:\n    x = 1\nk = 3\nclass C")
    assert broken.binds == {"k", "C", "f"} and not broken.cheap


@pytest.mark.parametrize(
    "source",
    [
        "a" + ".b" * 20_000,
        "-" * 40_000 + "1",
        "(" * 5000 + ")" * 5000,
        "[" * 20_000,
        "lambda:" * 6000 + "1",
        "x = " + "f(" * 15_000 + ")" * 15_000,
        "not " * 10_000 + "1",
        "\n".join(" " * i + "if 1:" for i in range(300)),
        "x = '''" + "\\N{BULLET}" * 4000,
        "1" * 40_000,
        "f'" + "{x!r:" * 3000,
        "x = 1\x00",
        "x\u2028= 1",
        "x = " + "1+" * 20_000 + "1",
        "y = 9 ** 9 ** 9 ** 9",
        "k = 1\n" * (MAX_ANALYZED // 5),
    ],
    ids=lambda source: source[:8],
)
def test_hostile_sources_are_read_without_harm(source):
    assert all(one.first <= one.last for one in split(source))


def test_transitive_needs_and_nothing_else():
    made = planned(
        [
            lab("setup", "import math, os\nimport sys\nA = 1\nB = A + 1\nC = 3"),
            Source("answer", "def f(): return g() + math.pi", ANSWER),
            Source("extra", "def g(): return B\nmodel = fit()\nprint(model)", OWN),
        ]
    )
    assert texts(made) == {
        "setup": ["import math, os", "A = 1", "B = A + 1"],
        "answer": ["def f(): return g() + math.pi"],
        "extra": ["def g(): return B"],
    }
    assert made.after == {"e": "extra"} and made.used == {"setup": [0, 2, 3], "answer": [0], "extra": [0]}


def test_an_experiment_is_withheld_unless_the_model_solutions_need_it():
    sources = [lab("setup", "model = train()"), Source("answer", "def f(): return model", ANSWER)]
    assert planned(sources).withheld == {"e": ["model"]} and "setup" not in texts(planned(sources))
    sources[0] = lab("setup", "model = train()", frozenset({0}))
    made = planned(sources)
    assert made.withheld == {} and texts(made)["setup"] == ["model = train()"]


def test_writes_into_a_needed_object_run_with_it_and_those_into_modules_do_not():
    setup = "import torch\nnames = []\nnames.append(1)\ntorch.set_num_threads(1)\nother = []\nother.append(2)"
    made = planned(
        [lab("s", setup, frozenset(range(6))), Source("answer", "def f(): return names, torch", ANSWER)]
    )
    assert texts(made)["s"] == ["import torch", "names = []", "names.append(1)"]


def test_a_helper_below_is_used_only_where_none_stands_above():
    below = Source("below", "def h(): return 2", OWN)
    answer = Source("answer", "def f(): return h()", ANSWER)
    above = Source("above", "def h(): return 1", OWN)
    assert texts(planned([lab("s", ""), answer, below])).keys() == {"answer", "below"}
    made = planned([above, answer, below])
    assert texts(made).keys() == {"above", "answer"} and made.after == {"e": "answer"}


def test_each_answer_is_asked_for_before_a_later_one_renames_its_helper():
    first = Source("first", "def h(): return 1\ndef f(): return h()", ANSWER)
    second = Source("second", "def h(): return 2\ndef g(): return h()", ANSWER)
    made = plan([first, second], {"a": Wanted("f", (0,)), "b": Wanted("g", (1,))})
    assert made.after == {"a": "first", "b": "second"}
    assert [identifier for identifier, _ in made.cells] == ["first", "second"]


def test_the_answer_of_another_exercise_may_be_used():
    first = Source("first", "def f(): return 1", ANSWER)
    second = Source("second", "def g(): return f()", ANSWER)
    decoy = Source("decoy", "def f(): return 3", OWN)
    made = plan([first, decoy, second], {"a": Wanted("f", (0,)), "b": Wanted("g", (2,))})
    assert [identifier for identifier, _ in made.cells] == ["first", "second"]


def test_an_answer_in_another_cell_counts_when_its_own_cell_is_untouched():
    stub = Source("stub", "def f(): raise NotImplementedError", ANSWER)
    made = planned([lab("s", ""), stub, Source("mine", "def f(): return 1", OWN)], stubs={1})
    assert texts(made).keys() == {"mine"} and made.elsewhere == {"e": "mine"} and made.after == {"e": "mine"}
    wrong = Source("answer", "def f(): return 2", ANSWER)
    made = planned([lab("s", ""), wrong, Source("mine", "def f(): return 1", OWN)])
    assert texts(made).keys() == {"answer"} and made.elsewhere == {}


def test_a_solution_cell_runs_without_what_only_an_experiment_could_feed():
    setup = lab("s", "import math\nbatch = load()")
    text = "print(batch.shape)\nprint(math.pi)\nwhile False: pass\ndef f(): return 1\nx = batch[0]\nprint(x)"
    made = planned([setup, Source("answer", text, ANSWER)])
    assert texts(made)["answer"] == ["print(math.pi)", "while False: pass", "def f(): return 1"]
    assert texts(made)["s"] == ["import math"]
    assert made.skipped == {"answer": ["print(batch.shape)", "x = batch[0]", "print(x)"]}


def test_a_cell_for_which_there_is_no_room_is_not_split(monkeypatch):
    monkeypatch.setattr("llmcourse.grading.dependencies.MAX_OWN", 30)
    big = Source("big", "print(1)\ndef h(): return 1\nprint(2)", OWN)
    made = planned([big, Source("answer", "def f(): return h()", ANSWER)])
    assert texts(made)["big"] == big.text.splitlines()


def test_star_imports_run_with_a_students_code():
    made = planned(
        [Source("own", "from math import *\nprint(1)", OWN), Source("answer", "def f(): return pi", ANSWER)]
    )
    assert texts(made)["own"] == ["from math import *"]
