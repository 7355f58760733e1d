# The GPU image: torch's wheels bring the CUDA libraries, the host the driver
# (docker run --gpus all, with the NVIDIA container toolkit).
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/cache/huggingface \
    DISCO_CACHE=/cache/disco-serve

# Before the sources: torch changes less often than they do.
RUN pip install "torch>=2.11,<2.16"

WORKDIR /src
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY server server
COPY engine engine
COPY classifiers classifiers
RUN pip install .

COPY --chmod=0755 docker/entrypoint.sh /usr/local/bin/disco-entrypoint
RUN useradd --uid 10001 --create-home disco && install -d -o disco -g disco /cache
WORKDIR /home/disco
USER disco
VOLUME /cache
EXPOSE 8000

# Loading may download a model: failures count only after the start period.
HEALTHCHECK --interval=10s --timeout=5s --retries=3 --start-period=15m \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ.get(\"DISCO_PORT\", \"8000\")}/health', timeout=4)"]

ENTRYPOINT ["disco-entrypoint"]
CMD []
