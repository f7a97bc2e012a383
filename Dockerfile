# mm-gpt serve on the CPU. Build: docker build -t mm-gpt .   Run: docker run -p 127.0.0.1:8000:8000 mm-gpt
FROM python:3.12-slim

# curl for the health check; libgomp for PyTorch
RUN apt-get update && apt-get install -y --no-install-recommends curl libgomp1 && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# PyTorch's own index has it without CUDA: 5 GB less
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY mm_gpt ./mm_gpt
COPY vision ./vision
COPY datasets ./datasets
COPY eval ./eval
RUN pip install --no-cache-dir ".[serve]"

RUN useradd --create-home --uid 1000 serve && mkdir -p /models && chown serve /models
USER serve
# Weights and compiled kernels; a volume keeps them
ENV XDG_CACHE_HOME=/models HF_HOME=/models/huggingface PYTHONUNBUFFERED=1
VOLUME /models

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s CMD curl -fsS http://127.0.0.1:8000/health || exit 1
STOPSIGNAL SIGTERM
# exec form: SIGTERM reaches the server itself
ENTRYPOINT ["mm-gpt", "serve", "--host", "0.0.0.0", "--port", "8000"]
