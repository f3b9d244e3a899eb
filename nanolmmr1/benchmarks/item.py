"""One row of a benchmark with a model's responses and what the judge says of them.

Next: statistics.py, scores and their intervals.
"""

from typing import Any, NamedTuple


class Response(NamedTuple):
    """One response to a row."""

    text: str  # "" where rows of the benchmark must not be published
    answer: str  # the final answer that was read from it; "": none was found
    right: bool  # by the rules of the accuracy reward; False if `undecided`
    reason: str  # the rule that decided: one of reward.rules.REASONS
    undecided: bool  # no rule can tell; a judge would have to
    lenient: bool | None  # by the benchmark's official rule; None: it has no deterministic one, or that cannot tell
    format: bool  # whether it has the format that the prompt asks for
    tokens: int
    cut: bool  # ended by the limit of tokens


class Item(NamedTuple):
    """One row of a benchmark, answered by one model."""

    model: str  # its label in the tables
    benchmark: str  # its name
    id: str
    problem: str  # rows of one problem share it: they are no independent draws
    subjects: dict[str, str]  # column -> value, of the columns by which tables are broken down
    gold: str  # "" where rows must not be published
    responses: list[Response]  # as many as were asked for; [] with a fault
    fault: str = ""  # why the row was not asked, as "prompt too long"; it counts as wrong
    contaminated: bool | None = None  # whether a training set holds it; None: not looked for

    def record(self) -> dict[str, Any]:
        """The item as JSON-able values."""
        return self._asdict() | {"responses": [response._asdict() for response in self.responses]}

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Item":
        """The item of a record."""
        return cls(**record | {"responses": [Response(**each) for each in record["responses"]]})
