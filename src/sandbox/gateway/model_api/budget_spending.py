"""Adds up the cost of a task's model requests, and compares it with the budget."""

from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.limits import IN_FLIGHT_REQUESTS_EXEMPT_FROM_BUDGET
from sandbox.interfaces.gateway import Budget
from sandbox.model.events import COST_USD_MAX, Usage

TOKENS_MAX = 10**12
"""Maximum plausible token count of one request; a higher count is invalid."""


def valid_usage(usage: Usage | None) -> Usage | None:
    """Return the usage, or None if it is invalid and could lower the total cost or make the journal unreadable."""
    if usage is None:
        return None
    counts = (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens)
    are_counts_valid = all(map(is_token_count, counts))
    is_cost_valid = usage.cost_usd is None or 0 <= usage.cost_usd <= COST_USD_MAX
    return usage if are_counts_valid and is_cost_valid else None


def is_token_count(count: object) -> bool:
    """Return whether the value is a plausible token count."""
    return type(count) is int and 0 <= count <= TOKENS_MAX


def _total_tokens(usage: Usage) -> int:
    return usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens + usage.output_tokens


class BudgetSpending:
    """The total cost of all responses, compared with the budget. Reports a spent budget only once."""

    def __init__(self, budget: Budget, reporter: EventReporter) -> None:
        self._budget = budget
        self._reporter = reporter
        self._finished = (budget.spent_tokens, budget.spent_usd)
        self._running: dict[object, tuple[int, float]] = {}
        self._bounds: dict[object, Usage | None] = {}
        self._unpriced: str | None = None
        self._exhausted_reason: str | None = None
        self.has_budget_limit = budget.usd is not None or budget.tokens is not None

    def may_be_exceeded(self, bound: Usage | None) -> bool:
        """Return whether the requests in flight and one more may exceed the remaining budget.

        A few requests are always allowed: their actual cost is usually far below their bounds.
        """
        if len(self._bounds) < IN_FLIGHT_REQUESTS_EXEMPT_FROM_BUDGET:
            return False
        bounds = [each for each in (bound, *self._bounds.values()) if each is not None]
        tokens = self._finished[0] + sum(map(_total_tokens, bounds))
        usd = self._finished[1] + sum(each.cost_usd or 0.0 for each in bounds)
        budget = self._budget
        return (budget.tokens is not None and tokens > budget.tokens) or (budget.usd is not None and usd > budget.usd)

    def record_start(self, source: object, bound: Usage | None) -> None:
        """Record a request in flight and the upper bound of its usage."""
        self._bounds[source] = bound

    def update(self, source: object, usage: Usage | None) -> None:
        """Replace the running cost of a response."""
        if usage is not None:
            self._running[source] = self._cost(usage)
            self._check_budget()

    def finish(self, source: object, usage: Usage | None) -> None:
        """Add the final cost of a response to the total."""
        self._running.pop(source, None)
        self._bounds.pop(source, None)
        if usage is not None:
            tokens, usd = self._cost(usage)
            self._finished = (self._finished[0] + tokens, self._finished[1] + usd)
            self._check_budget()

    def exhausted_reason(self) -> str | None:
        """Return a sentence that says which budget is spent, or None."""
        self._check_budget()
        return self._exhausted_reason

    def _cost(self, usage: Usage) -> tuple[int, float]:
        if usage.cost_usd is None:
            self._unpriced = usage.model
        return _total_tokens(usage), usage.cost_usd or 0.0

    def _check_budget(self) -> None:
        if self.has_budget_limit and self._exhausted_reason is None:
            self._exhausted_reason = self._find_exhausted_reason()
            if self._exhausted_reason is not None:
                self._reporter.report_budget_exhausted(self._exhausted_reason)

    def _find_exhausted_reason(self) -> str | None:
        costs = [self._finished, *self._running.values()]
        tokens = sum(cost[0] for cost in costs)
        usd = round(sum(cost[1] for cost in costs), 6)
        consequence = "no more model requests are forwarded"
        if self._budget.usd is not None and self._unpriced is not None:
            model = self._reporter.sanitize(self._unpriced)
            return (
                f"A response came from the model {model}, which has no known price, so lifecycle.budget_usd cannot be "
                f"enforced; {consequence}. Set lifecycle.budget_tokens instead."
            )
        # The message omits the cost so far: the response continues, and the task's status will contain the final cost.
        spent = f"is spent; {consequence}. Raise the budget."
        if self._budget.usd is not None and usd >= self._budget.usd:
            return f"lifecycle.budget_usd ({self._budget.usd:.6g} USD) {spent}"
        if self._budget.tokens is not None and tokens >= self._budget.tokens:
            return f"lifecycle.budget_tokens ({self._budget.tokens:,} tokens) {spent}"
        return None
