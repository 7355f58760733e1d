# Two images of one file: `docker build .` makes the one for NVIDIA GPUs (the last stage), and
# `docker build --target cpu .` the small one without. Both are linux/amd64.
#
# BASE is a tag, which Debian's fixes still reach; to hold it, pass
# --build-arg BASE=python:3.11.15-slim-bookworm@sha256:... Any Debian with Python 3.11 and its venv will do.
ARG BASE=python:3.11.15-slim-bookworm

# --- the virtual environment: every package by its exact version (docker/requirements*.txt)
FROM ${BASE} AS builder
# pip's own variables, for a mirror or a folder of wheels. They end with a stage, and are in no image.
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/disco
ENV PATH=/opt/disco/bin:${PATH}
COPY docker/requirements.txt /build/
RUN pip install --no-deps -r /build/requirements.txt

FROM builder AS cpu-environment
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY docker/requirements-cpu.txt /build/
RUN pip install --no-deps --index-url "${TORCH_INDEX}" -r /build/requirements-cpu.txt

FROM builder AS package
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
COPY docker/requirements-build.txt /build/
RUN pip install --no-deps -r /build/requirements-build.txt
WORKDIR /build
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY server server
COPY engine engine
COPY classifiers classifiers
RUN pip install --no-deps --no-build-isolation --prefix=/package .

# --- what both images share: no compiler, no root, nothing written outside /cache and /tmp
FROM ${BASE} AS runtime
# tini: a signal before the server listens is heeded, and the engine's orphans are reaped.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini=0.19.* \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 disco \
 && useradd --uid 10001 --gid disco --home-dir /cache --no-create-home disco \
 && install -d -o disco -g disco /cache
COPY --chmod=0755 docker/entrypoint.sh /usr/local/bin/disco-entrypoint
COPY --chmod=0755 docker/health.py /usr/local/bin/disco-health
ENV PATH=/opt/disco/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    DISCO_CACHE=/cache/disco-serve \
    DISCO_HOST=0.0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="disco-serve" \
      org.opencontainers.image.description="An OpenAI-compatible server that speculates losslessly" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# By number, so that Kubernetes can tell that it is not root.
USER 10001:10001
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# Loading may download a model: failures count only after the start period.
HEALTHCHECK --interval=10s --timeout=5s --retries=3 --start-period=15m CMD ["disco-health"]
ENTRYPOINT ["disco-entrypoint"]

# --- docker build --target cpu
FROM runtime AS cpu
COPY --from=cpu-environment /opt/disco /opt/disco
COPY --from=package /package /opt/disco

# --- for GPUs: torch's wheels bring the CUDA libraries and NVRTC, the host the driver
FROM builder AS gpu-environment
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
COPY docker/requirements-gpu.txt /build/
RUN pip install --no-deps -r /build/requirements-gpu.txt

FROM runtime AS gpu
USER 0:0
# Triton builds its launcher with a C compiler and Python's headers when the engine starts.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc=4:12.2.* libc6-dev=2.36-* \
 && rm -rf /var/lib/apt/lists/* \
 && gcc -fsyntax-only -x c -include Python.h \
      -I "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')" /dev/null
USER 10001:10001
ENV TRITON_CACHE_DIR=/cache/triton \
    CUDA_CACHE_PATH=/cache/cuda \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-environment /opt/disco /opt/disco
COPY --from=package /package /opt/disco
