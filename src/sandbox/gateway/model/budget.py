"""When a model request may go on: not while the agent is held back, not once the budget is spent or the server's key
was refused, and not when it reaches beyond the model."""

from typing import Any

import msgspec

from sandbox.gateway.event_reporter import Reports
from sandbox.gateway.limits import HELD_BYTES_MAX
from sandbox.gateway.model.pricing import Asked, asked_by, price_objection
from sandbox.gateway.model.request_body import reach_objection, read_document
from sandbox.gateway.model.request_policy import Refused
from sandbox.gateway.model.usage_meter import Meter
from sandbox.interfaces.gateway import Budget, GatewayRules
from sandbox.model.events import Usage


class Admitted(msgspec.Struct, frozen=True):
    """A body to forward. `asked` is there where what comes of it may not go uncounted."""

    body: bytes
    asked: Asked | None


class Admission:
    """Shared by all conversations of a gateway. `is_holding` ends by `release`, once and for all."""

    def __init__(self, rules: GatewayRules, reports: Reports) -> None:
        self._reports = reports
        self._reaches_beyond = rules.egress.is_full
        self._has_been_answered = False
        self._key_refusal: Refused | None = None
        self._budget = rules.budget
        self._spending = Spending(rules.budget, reports)
        self._held_bytes = 0
        self.is_holding = rules.holds_model

    @property
    def needs_body(self) -> bool:
        """Whether a request can be judged only when its body is there too."""
        return self.is_holding or self.counts or not self._reaches_beyond

    @property
    def counts(self) -> bool:
        """Whether there is a budget, so that nothing may go uncounted."""
        return self._spending.is_bounded

    def release(self) -> None:
        """Requests are held back no longer."""
        self.is_holding = False

    def keep(self, byte_count: int) -> Refused | None:
        """Make room for bytes that wait to be judged and sent; `give_back` ends it."""
        if self._held_bytes + byte_count > HELD_BYTES_MAX:
            return Refused(
                429, "rate_limit_error", "Too many bytes of requests wait for the model; ask for less at once."
            )
        self._held_bytes += byte_count
        return None

    def give_back(self, byte_count: int) -> None:
        """These bytes wait no longer."""
        self._held_bytes -= byte_count

    def judge(self) -> Refused | None:
        """Whether the next request is forwarded, as far as that does not depend on its body."""
        if self._key_refusal is not None:
            return self._key_refusal
        reached = self._spending.reached()
        return None if reached is None else Refused(403, "permission_error", reached)

    def judge_body(self, body: bytes | bytearray, *, is_metered: bool) -> Refused | Admitted:
        """The body to forward, or why not. is_metered: its answer spends tokens."""
        document = read_document(body)
        if isinstance(document, Refused):
            return document
        refused = None if self._reaches_beyond else self._reach_refusal(document)
        if refused is None and self._budget.usd is not None and is_metered:
            refused = self._price_refusal(document)
        if refused is not None:
            return refused
        asked = asked_by(document, len(body)) if self.counts and is_metered else None
        return Admitted(msgspec.json.encode(document), asked)

    def hear(self, status: int, model_address: str) -> Refused | None:
        """The upstream answered with this status: what to say instead when that means that it refused our key.

        403 may be about what was asked for, so it means that only while the key was never good for anything.
        """
        self._has_been_answered |= status < 300
        if status == 401 or (status == 403 and not self._has_been_answered):
            message = f"The model at {model_address} refused the server's key ({status}); check the key that it has."
            if self._key_refusal is None:
                self._reports.key_refused(message)
            # 403, because Claude Code asks again for minutes after a 401.
            self._key_refusal = Refused(403, "permission_error", message)
            return self._key_refusal
        return None

    def watch(self, spender: object, meter: Meter) -> None:
        """An answer to `spender` goes on."""
        if self._spending.is_bounded:
            self._spending.running(spender, meter.so_far())

    def settle(self, spender: object, usage: Usage | None) -> None:
        """The answer to `spender` is over."""
        self._spending.finished(spender, usage)

    def _reach_refusal(self, document: dict[str, Any]) -> Refused | None:
        objection = reach_objection(document, self._reports.shown)
        if objection is None:
            return None
        message = (
            f"{objection} makes the model's servers reach elsewhere for the agent, "
            "which Sandbox lets through with vm.network_mode full only."
        )
        return Refused(403, "permission_error", message)

    def _price_refusal(self, document: dict[str, Any]) -> Refused | None:
        message = price_objection(document, self._reports.shown)
        return None if message is None else Refused(403, "permission_error", message)


class Spending:
    """What all answers together have cost so far, and whether that is the budget. Tells once that it is."""

    def __init__(self, budget: Budget, reports: Reports) -> None:
        self._budget = budget
        self._reports = reports
        self._finished = (budget.spent_tokens, budget.spent_usd)
        self._running: dict[object, tuple[int, float]] = {}
        self._unpriced: str | None = None
        self._reached: str | None = None
        self.is_bounded = budget.usd is not None or budget.tokens is not None

    def running(self, spender: object, usage: Usage | None) -> None:
        """What an answer has cost by now, instead of what was told of it before."""
        if usage is not None:
            self._running[spender] = self._cost(usage)
            self._look()

    def finished(self, spender: object, usage: Usage | None) -> None:
        """What an answer has cost in all."""
        self._running.pop(spender, None)
        if usage is not None:
            tokens, usd = self._cost(usage)
            self._finished = (self._finished[0] + tokens, self._finished[1] + usd)
            self._look()

    def reached(self) -> str | None:
        """A sentence about the budget that is spent; None while none is."""
        self._look()
        return self._reached

    def _cost(self, usage: Usage) -> tuple[int, float]:
        if usage.cost_usd is None:
            self._unpriced = usage.model
        cached = usage.cache_read_tokens + usage.cache_write_tokens
        return usage.input_tokens + cached + usage.output_tokens, usage.cost_usd or 0.0

    def _look(self) -> None:
        if self.is_bounded and self._reached is None:
            self._reached = self._exceeded()
            if self._reached is not None:
                self._reports.budget_reached(self._reached)

    def _exceeded(self) -> str | None:
        costs = [self._finished, *self._running.values()]
        tokens = sum(cost[0] for cost in costs)
        usd = round(sum(cost[1] for cost in costs), 6)
        end = "no further model request is forwarded"
        if self._budget.usd is not None and self._unpriced is not None:
            model = self._reports.shown(self._unpriced)
            return f"The model {model} answered, which has no price, so that lifecycle.budget_usd cannot hold; {end}."
        if self._budget.usd is not None and usd >= self._budget.usd:
            return f"lifecycle.budget_usd is spent ({usd:.6g} of {self._budget.usd:.6g} USD); {end}. Raise it."
        if self._budget.tokens is not None and tokens >= self._budget.tokens:
            return f"lifecycle.budget_tokens is spent ({tokens} of {self._budget.tokens} tokens); {end}. Raise it."
        return None
