# One image for every process; the command decides which. Build: docker build -t secateurs .
FROM python:3.11-slim AS build
# Where torch's CPU build comes from; leave it empty to install torch's default build (with CUDA: several GB).
ARG TORCH_INDEX_URL=""
ARG EXTRAS="all"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml README.md ./
COPY latency_profiler latency_profiler
COPY service service
COPY workers workers
COPY migrations migrations
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} ".[${EXTRAS}]"

FROM python:3.11-slim
RUN groupadd --gid 10001 secateurs \
    && useradd --uid 10001 --gid secateurs --create-home --home-dir /home/secateurs secateurs \
    && install -d -o secateurs -g secateurs /var/lib/secateurs /var/lib/secateurs/data /var/lib/secateurs/blobs
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SECATEURS_HOME=/var/lib/secateurs \
    SECATEURS_HOST=0.0.0.0
USER secateurs
WORKDIR /home/secateurs
VOLUME /var/lib/secateurs
EXPOSE 8740
STOPSIGNAL SIGTERM
CMD ["uvicorn", "service.app:create_app", "--factory", "--host", "0.0.0.0", "--port", "8740"]
