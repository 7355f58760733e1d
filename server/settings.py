"""The server's settings: one model, filled from flags, `DISCO_*` variables and defaults, in that order."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engine.config import DType, EngineConfig, Offload, Quantization, RunnerKind
from server import tools
from server.bounds import MAX_N, MAX_SEQUENCES, MOST_OBJECTS
from server.keys import unfit
from server.log_lines import LogFormat
from server.metrics_labels import constant_labels


def _listed(value: Any) -> Any:
    """A list from an environment variable: JSON, or names set apart by commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [item.strip() for item in value.split(",") if item.strip()]


def is_web_url(text: str) -> bool:
    """An absolute http or https URL."""
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        return False


def _some(value: Any) -> Any:
    """As `_listed`; an empty variable is no way to say that there are none."""
    listed = _listed(value)
    if isinstance(value, str) and not listed:
        raise ValueError("is empty: leave it unset to have none")
    return listed


Strings = Annotated[list[str], NoDecode, BeforeValidator(_listed)]
Secrets = Annotated[list[SecretStr], NoDecode, BeforeValidator(_some)]


class Settings(BaseSettings):
    """Everything that a server is started with. `None` leaves the choice to the engine.

    Raises pydantic's ValidationError for unknown names and values out of range.
    """

    model_config = SettingsConfigDict(env_prefix="DISCO_", extra="forbid", frozen=True)

    target: str = Field("smollm2", min_length=1, description="target model: alias, id, directory or .gguf")
    draft: str | None = Field(
        None,
        description="default (the shipped draft; taken if none is named and the target has one), "
        "ngram (taken otherwise), none, self:N or a model",
    )
    drafter: str | None = Field(
        None,
        min_length=1,
        description="who drafts for requests that name nobody: model, ngram, none, or trees (dyspec, "
        "opt_tree, c2t, goodput_tree); default: a chain of the best that there is",
    )
    policy: str = Field("goodput", description="stop policy of requests that name none; trees need none")
    policy_options: dict[str, Any] = Field(
        {}, description="options of that policy, or of a --drafter of trees, as JSON"
    )

    head: Strings = Field([], description="trained heads of policies, files; the shipped ones are found")

    policy_state: str | None = Field(
        None, min_length=1, description="file for what policies learn over all requests; default: none"
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: Secrets = Field([], description="keys that open the API; none: open to all")
    api_key_file: str | None = Field(
        None,
        min_length=1,
        description="file of hashed keys, which `disco-serve key` makes; read again when it changes; "
        "default: none",
    )
    ssl_certfile: str | None = Field(
        None,
        min_length=1,
        description="serve https with this certificate (PEM, with its chain); default: http",
    )
    ssl_keyfile: str | None = Field(
        None, min_length=1, description="its private key; default: in --ssl-certfile"
    )
    served_model_name: Strings = Field([], description="names that requests may use; default: the target")
    cors_origin: Strings = Field(
        [], description="browser origin that may use the API, as https://app.example; default: none"
    )
    docs: bool = Field(True, description="describe the API at /docs and /openapi.json")
    page: bool = Field(True, description="serve the live page at /, which shows speculation at work")
    max_body_bytes: int = Field(8 * 2**20, ge=1, description="largest request body in bytes")
    max_body_objects: int = Field(MOST_OBJECTS, ge=1, description="most objects and arrays in a request body")
    read_seconds: float = Field(
        20.0, gt=0, description="time in which a request's headers must come, and then its body"
    )
    write_seconds: float = Field(
        60.0, gt=0, description="time after which a client that reads nothing of its answer is given up"
    )
    max_connections: int = Field(16384, ge=1, description="connections that may be open at once")
    max_queued_requests: int = Field(
        256, ge=0, description="sequences that may wait beside those that run; more get 429"
    )
    max_queued_tokens: int = Field(2**20, ge=1, description="tokens of prompts that may wait; more get 429")
    max_request_seconds: float | None = Field(
        None, gt=0, description="time that a request may take, also by its own 'timeout'; default: no end"
    )
    key_concurrency: int | None = Field(
        None, ge=1, description="requests of one key that may be open at once; default: no limit"
    )
    key_requests_per_minute: int | None = Field(
        None, ge=1, description="requests that one key may send in a minute; default: no limit"
    )
    key_tokens_per_minute: int | None = Field(
        None, ge=1, description="tokens, of prompts and answers, of one key in a minute; default: no limit"
    )
    max_n: int = Field(MAX_N, ge=1, le=MAX_N, description="largest 'n' of a request")
    max_sequences: int = Field(
        MAX_SEQUENCES, ge=1, le=MAX_SEQUENCES, description="most prompts times choices of a request"
    )
    max_logit_bias: int = Field(1024, ge=0, description="most entries of a request's 'logit_bias'")
    max_stop_length: int = Field(1024, ge=1, description="longest stop string, in characters")
    tool_format: str = Field(
        "auto", min_length=1, description="how the model writes tool calls; auto: found by its chat template"
    )
    grammar_seconds: float = Field(
        10.0, gt=0, description="time that compiling one grammar or JSON schema may take"
    )
    max_grammar_bytes: int = Field(65536, ge=1, description="largest grammar or JSON schema in bytes")
    step_seconds: float = Field(
        300.0,
        gt=0,
        description="time that one step of the engine may take; a longer one counts as hung, and the engine "
        "is restarted (loading and capturing graphs do not count)",
    )
    shutdown_seconds: float = Field(30.0, ge=0, description="time that open streams get at shutdown")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = Field("text", description="log lines: text, or json for a JSON object each")
    log_prompts: bool = Field(False, description="log the prompt and the text of requests, and trace them")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="serve /metrics on this port, too; default: none"
    )
    metrics_label: Strings = Field([], description="constant label of every metric, as NAME=VALUE")
    metrics_compat: Literal["vllm"] | None = Field(
        None, description="tell the metrics under these names, too; default: ours alone"
    )
    otlp_endpoint: str | None = Field(
        None,
        description="send traces to this OpenTelemetry collector, as http://host:4318; "
        "default: OTEL_EXPORTER_OTLP_ENDPOINT, else none",
    )

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: DType = Field("auto", description="auto: bfloat16 on a GPU, float32 on a CPU")
    max_model_len: int | None = Field(None, ge=1, description="prompt and output together, in tokens")
    memory_fraction: float | None = Field(None, gt=0, le=1, description="of free memory, for the KV cache")
    kv_blocks: int | None = Field(None, ge=1, description="KV blocks, instead of memory_fraction")
    max_num_seqs: int = Field(64, ge=1, description="sequences that run at once")
    max_sl: int = Field(16, ge=0, description="largest speculation lookahead, in tokens")
    token_budget: int | None = Field(None, ge=1, description="tokens of one target pass")
    prefix_cache: bool = Field(True, description="reuse the KV of shared prompt prefixes")
    prefix_cache_by_key: bool = Field(
        False, description="share them among requests of keys of one name only, not among all"
    )
    runner: RunnerKind = Field(
        "auto", description="auto: fused on a GPU for the Llama family, reference elsewhere"
    )
    offload: Offload = Field(
        "none", description="target: its layers stay in pinned host memory and are streamed in every pass"
    )
    resident_layers: int | None = Field(
        None, ge=0, description="layers of an offloaded target that stay on the GPU; default: what fits"
    )
    offload_buffers: int = Field(2, ge=2, description="layers that are on the GPU while streamed")
    quantization: Quantization = Field(
        "none", description="weight-only, of the target: int8, fp8 or int4; this changes its text"
    )
    draft_quantization: Quantization = Field(
        "none", description="weight-only, of the draft: int8, fp8 or int4; changes only what is accepted"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine")
    trust_remote_code: bool = Field(False, description="run code that comes with a model")

    @field_validator("tool_format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        known = ("auto", *tools.names())
        if name not in known:
            raise ValueError(f"unknown tool format '{name}'; known are {', '.join(known)}")
        return name

    @field_validator("api_key")
    @classmethod
    def _can_be_sent(cls, keys: list[SecretStr]) -> list[SecretStr]:
        for key in keys:
            if (reason := unfit(key.get_secret_value())) is not None:
                raise ValueError(reason)
        return keys

    @field_validator("cors_origin")
    @classmethod
    def _exact(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@*\sA-Z]+", origin):
                raise ValueError(f"'{origin[:100]}' is no origin, as https://app.example or http://app:8080")
        return origins

    @model_validator(mode="after")
    def _guarded(self) -> Settings:
        if "*" in self.cors_origin and not self.api_key and self.api_key_file is None:
            raise ValueError("--cors-origin: '*' without keys would let every web page use this server")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("--ssl-keyfile: wants --ssl-certfile, too")
        return self

    @model_validator(mode="after")
    def _two_ports(self) -> Settings:
        if self.metrics_port == self.port and self.port:
            raise ValueError(f"--metrics-port: {self.port} is the API's port, where /metrics is already")
        return self

    @field_validator("metrics_label")
    @classmethod
    def _label(cls, given: list[str]) -> list[str]:
        constant_labels(given)
        return given

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, url: str | None) -> str | None:
        if url is not None and not is_web_url(url):
            raise ValueError("not an http or https URL")
        return url

    @model_validator(mode="before")
    @classmethod
    def _name_the_target(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("served_model_name"):
            data = {**data, "served_model_name": [data.get("target", cls.model_fields["target"].default)]}
        return data

    def engine_config(self) -> EngineConfig:
        """What the engine process needs of these settings."""
        from engine.models.builtin import default_draft  # brings torch, which flags alone can do without

        return EngineConfig(
            target=self.target,
            draft=self.draft or default_draft(self.target),
            drafter=self.drafter,
            policy=self.policy,
            policy_options=self.policy_options,
            heads=tuple(self.head),
            policy_state=self.policy_state,
            device=self.device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            kv_blocks=self.kv_blocks,
            memory_fraction=self.memory_fraction,
            max_num_seqs=self.max_num_seqs,
            token_budget=self.token_budget,
            max_sl=self.max_sl,
            prefix_cache=self.prefix_cache,
            threads=self.threads,
            trust_remote_code=self.trust_remote_code,
            runner=self.runner,
            offload=self.offload,
            resident_layers=self.resident_layers,
            offload_buffers=self.offload_buffers,
            quantization=self.quantization,
            draft_quantization=self.draft_quantization,
        )
