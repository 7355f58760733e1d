"""Ray's side of prefix affinity: a request router that ranks replicas by `affinity`.

Ray's PrefixCacheAffinityRouter comes with `ray[llm]`, which brings vLLM; it keeps its prefixes in an actor
that every routing waits for, and a fault of that actor, or a request without a prompt, ends its routing
task, under which the request then hangs. ConsistentHashRouter of `ray.serve.experimental` knows no load: one
system prompt shared by all would fill one replica while others idle.
"""

from __future__ import annotations

from collections import Counter

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from disco_ray.affinity import least_busy, ranked
from disco_ray.call import Call


class PrefixRouter(RequestRouter):
    """Loads are this router's own requests under way: with several fronts, each sees its share.

    A request counts from its choice on, since a burst is routed before the first of it is sent.
    """

    def initialize_state(self, slack: float = 1.25, spare: int = 8) -> None:
        """`slack`, `spare`: see `affinity.ranked`. Raises ValueError for values that cannot work."""
        if slack < 1 or spare < 1:
            raise ValueError(f"slack and spare must be at least 1, not {slack} and {spare}")
        self._slack, self._spare = slack, spare
        self._places: dict[str, str] = {}  # a request's replica, by the request's id
        self._loads: Counter[str] = Counter()  # the same, counted by replica

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        present = {replica.replica_id.unique_id for replica in replicas}
        self._places = {request: name for request, name in self._places.items() if name in present}
        self._loads = Counter(self._places.values())

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        super().on_request_routed(pending_request, replica_id, result)
        self._place(pending_request.metadata.internal_request_id, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        if self._places.get(internal_request_id) == replica_id.unique_id:  # else another one took it
            self._place(internal_request_id, None)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank: Ray goes on to the next where one has no room."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # or it asks again at once, without end
        request = pending_request.metadata.internal_request_id
        self._place(request, None)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self._loads[name] for name in by_name}
        call = pending_request.args[0] if pending_request.args else None
        if isinstance(call, Call) and call.affinity is not None:
            names = ranked(call.affinity, loads, self._slack, self._spare)
        else:
            names = least_busy(request, loads)
        self._place(request, names[0])
        pending_request.future.add_done_callback(
            lambda future: self._place(request, None) if future.cancelled() else None
        )
        return [[by_name[name]] for name in names]

    def _place(self, request: str, name: str | None) -> None:
        before = self._places.pop(request, None)
        if before is not None:
            self._loads[before] -= 1
        if name is not None:
            self._places[request] = name
            self._loads[name] += 1
