# Disposable Transfer Learning, with the native routine built in. Without a GPU it runs on the CPU.
#
#   docker build -t dtl .                                                                            torch with CUDA
#   docker build -t dtl --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .               CPU only, small
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/runs:/runs" -v "$PWD/data:/data" dtl         the demo
#   docker run --rm --gpus all ... dtl all --gpu 0                                                   the host's driver
#   docker run --rm --entrypoint python dtl -m pytest -q -p no:cacheprovider                         the tests
#
# Results and data lie in /runs and /data: mount them to keep them, and a second run goes on from them.
# PYTHON_IMAGE may name a digest (python@sha256:...) where a build must be the same to the byte.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    # the official image brings Python's headers; one made from Debian's own Python does not
    && { python -c "import os, sysconfig; os.stat(sysconfig.get_path('include') + '/Python.h')" 2>/dev/null \
         || apt-get install -y --no-install-recommends python3-dev; } \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY constraints.txt .
ARG TORCH_INDEX=
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt \
       ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch numpy cffi click matplotlib pytest hypothesis setuptools
COPY build_native.py _gc_native.c ./
RUN /opt/venv/bin/python build_native.py

FROM ${PYTHON_IMAGE}
# OpenMP's run-time library, which not every torch brings under this name
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
COPY --from=build /build/_gc_native_ext*.so /app/
COPY . /app/
# Any --user will do: nothing is written but to /runs, /data and /tmp, and no name is looked up for the user.
RUN mkdir -p /runs /data && chmod 1777 /runs /data
ENV PATH=/opt/venv/bin:$PATH DTL_OUT=/runs DTL_DATA_DIR=/data HOME=/tmp USER=dtl \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 1000:1000
ENTRYPOINT ["python", "dtl.py"]
CMD ["all"]
