# syntax=docker/dockerfile:1
# The model is mounted, nothing is downloaded when it starts. Without a key only the container itself is answered:
#   docker build -t slora .
#   docker run --stop-timeout 60 -p 8000:8000 -v /models/base:/model:ro -v /models/adapters:/adapters:ro \
#     -e SLORA_API_KEY=… --gpus all slora

FROM rust:1-slim-bookworm AS wheel
RUN apt-get update && apt-get install --yes --no-install-recommends g++ python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /maturin && /maturin/bin/pip install --no-cache-dir 'maturin>=1.13,<2'
WORKDIR /source
COPY . .
RUN /maturin/bin/maturin build --release --out /dist

FROM python:3.12-slim-bookworm AS environment
# Empty for a server without CUDA: --build-arg EXTRAS=
ARG EXTRAS=[cuda]
RUN python -m venv /slora
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    wheel=$(echo /dist/slora-*.whl) && /slora/bin/pip install --no-cache-dir "$wheel$EXTRAS"

FROM python:3.12-slim-bookworm
RUN useradd --system --uid 10001 slora && mkdir /adapters /cache && chown slora /cache
COPY --from=environment /slora /slora
ENV PATH=/slora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SLORA_ADAPTER_DIR=/adapters \
    SLORA_CACHE_DIR=/cache \
    SLORA_HOST=0.0.0.0 \
    SLORA_MODEL=/model
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=5m \
    CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('SLORA_PORT', 8000))); c.request('GET', '/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["slora", "serve"]
