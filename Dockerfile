# otdrg serve in a container, on a CPU:
#     docker build -t otdrg .
#     docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs/quickstart:/model:ro" otdrg
# On a GPU (the wheels of torch bring CUDA; the host needs NVIDIA's container toolkit):
#     docker build -t otdrg:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#     docker run --rm --gpus all -p 127.0.0.1:8000:8000 -v "$PWD/runs/quickstart:/model:ro" otdrg:cuda
ARG PYTHON=3.12-slim
FROM python:${PYTHON}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# In a layer of its own, because it is large and changes rarely. Versions are those that pyproject.toml allows.
# hadolint ignore=DL3013
RUN pip install torch torchvision --index-url "${TORCH_INDEX}"

WORKDIR /src
COPY pyproject.toml README.md LICENSE py.typed *.py ./
COPY commands/ commands/
COPY evaluation/ evaluation/
COPY experiments/ experiments/
COPY hub_card/ hub_card/
COPY inference/ inference/
COPY labelers/ labelers/
COPY metrics/ metrics/
COPY runtime/ runtime/
COPY serving/ serving/
COPY studies/ studies/
COPY training/ training/
# hadolint ignore=DL3013
RUN pip install ".[serve,dicom]" && rm -rf /src/*

RUN useradd --create-home --uid 1000 otdrg
USER 1000
WORKDIR /home/otdrg

EXPOSE 8000
# A large model takes minutes to load.
HEALTHCHECK --start-period=10m --interval=30s --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
# Inside the container; docker's -p decides who can ask. Arguments of `docker run` replace those of CMD.
ENTRYPOINT ["otdrg", "serve"]
CMD ["/model", "--server-name", "0.0.0.0"]
