"""docs/metrics.md: every metric with its definition, source, library, range and use."""

from __future__ import annotations

from typing import Any

from pages import code, page, table
from recipe_page import builtin, first_lines

from tunesmith.evaluation import METRICS
from tunesmith.evaluation.metrics import KINDS

INTRODUCTION = """
These names stand in `evaluate.metrics`, `train.early_stopping.metric` and behind `tunesmith evaluate --metrics`. A
recipe that names none gets those of its objective ([recipes](recipes.md#objectives)), of which a metric that not all
rows can have (of JSON, of probabilities) is left out where they cannot. *Of*: the kinds of answers that it is of; of
others it is refused before training. Each comes with its 95% interval, the number of
rows and a paired test of the difference ([statistics](statistics.md)); where rows cannot carry these the program says
why. *Computed by*: the library that does it, or tunesmith's own code and the library that tests hold it to.
"""

PROGRAMS = """
## Programs

`pass_at_1`, `pass_at_10` and so on run what the model writes, together with tests that each row holds. For HumanEval's
rows:

```yaml
data: {test: humaneval.jsonl, columns: {prompt: prompt, completion: canonical_solution}}
evaluate:
  metrics: [pass_at_1, pass_at_10]
  max_new_tokens: 512
  code: {tests: test, before: prompt, entry_point: entry_point, samples: 20, temperature: 0.8}
```

A program is the text of the column `before`, the answer (of one that has fenced code, the first such), the tests, and
`check(...)` of the entry point. It passes where it comes to its end without an exception.

It is a stranger's program, so it runs where it can do no harm: in namespaces of its own without network, as a user who
may do nothing, with the system's libraries and this Python read-only, one empty folder of 64 MiB in memory to write to,
10 seconds, 2 GiB of memory, 32 processes and threads, files of 16 MiB, and without the system calls that have no place
in it. That takes Linux 5.12 or newer on x86-64 or ARM64, and user namespaces; where any of it is missing (macOS,
Windows, most containers by default) the plan refuses `evaluate.code` and says what is missing. It keeps programs from
the machine and from each other. It does not judge a program that finds its own verdict in its process and forges it.
"""


def make() -> str:
    """The whole page."""
    rows: list[list[str]] = []
    for name in builtin(METRICS):
        metric: Any = METRICS.get(name)
        low, high = (f"{bound:g}".replace("inf", "∞") for bound in metric.bounds)
        span = f"{low} to {high}, {'higher' if metric.higher_is_better else 'lower'} is better"
        about = metric.about
        of = ", ".join(KINDS[kind] for kind in metric.of)
        rows.append([code(name), first_lines(metric), of, about.source, about.library, span, about.use])
    found = table(["metric", "is", "of", "source", "computed by", "range", "use it for"], rows)
    return page("Metrics", INTRODUCTION, found, PROGRAMS)
