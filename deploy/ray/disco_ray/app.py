"""The application that Ray Serve deploys: `import_path: disco_ray.app:build`."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter

from disco_ray.arguments import Arguments
from disco_ray.front import FrontApp
from disco_ray.replica import Replica
from disco_ray.router import PrefixRouter
from server.settings import Settings


@serve.deployment(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0.5})
@serve.ingress()
class Front:
    """The ingress. Ray asks `__serve_build_asgi_app__` for the app in the actor that serves it."""

    def __init__(self, replicas: DeploymentHandle, max_body_bytes: int, accept_seconds: float) -> None:
        self._answer = replicas.options(stream=True).answer
        self._limits = (max_body_bytes, accept_seconds)
        self._errors = Counter("disco_front_errors", "Errors that a front answered itself", ("code",))

    def __serve_build_asgi_app__(self) -> FrontApp:
        return FrontApp(self._answer.remote, *self._limits, self._count)

    def _count(self, code: str) -> None:
        self._errors.inc(tags={"code": code})


def build(given: dict[str, Any]) -> serve.Application:
    """Fronts before replicas; `given`: see `Arguments`. Numbers, resources and autoscaling are the config
    file's."""
    args = Arguments.model_validate(given)
    settings = Settings(**args.settings)
    router = RequestRouterConfig(
        request_router_class=PrefixRouter,
        request_router_kwargs={"slack": args.affinity_slack, "spare": args.affinity_spare},
    )
    replica = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=settings.max_num_seqs,
        ray_actor_options={"num_gpus": 1},
        request_router_config=router,
    )
    replicas = replica.bind(args.settings, args.metrics_host, args.metrics_port)
    return Front.bind(replicas, settings.max_body_bytes, args.accept_seconds)
