# Image for tools/launch_gke.sh. Build it in the root of this repository:
#   docker build --file=tools/launch_gke.Dockerfile --tag=IMAGE . && docker push IMAGE
FROM python:3.11-slim
WORKDIR /cap_pretrain
COPY setup.py pyproject.toml README.md ./
COPY cap_pretrain cap_pretrain
RUN pip install --no-cache-dir --editable '.[tpu,gcs]'
COPY configs configs
COPY tools tools
