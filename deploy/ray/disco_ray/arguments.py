"""What `args` of the application may hold in the config file."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.settings import Settings

_RAYS = {"host", "port", "metrics_port"}  # settings that are Ray's business here


class Arguments(BaseModel):
    """Raises pydantic's ValidationError for unknown names and values that the server would not take."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = Field({}, description="the server's settings by name, as in DISCO_*")
    metrics_host: str = Field("0.0.0.0", min_length=1, description="address of the replicas' metrics ports")
    metrics_port: int = Field(9100, ge=1024, le=65000, description="of the first replica of a node")
    accept_seconds: float = Field(60.0, gt=0, description="time a request may wait for a replica with room")
    affinity_slack: float = Field(1.25, ge=1, description="load of a prefix's home, of the mean, at most")
    affinity_spare: int = Field(8, ge=1, description="requests that a home takes whatever the mean")

    @field_validator("settings")
    @classmethod
    def _valid(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_RAYS & settings.keys()):
            raise ValueError(f"{', '.join(taken)}: Ray has the say here; see http_options and metrics_port")
        Settings(**settings)
        return settings
