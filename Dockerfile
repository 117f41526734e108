# A server of the embedded model: docker build -t pastalm . && docker run -p 8000:8000 pastalm
# Another model, its weights kept: docker run -p 8000:8000 -v weights:/cache pastalm serve NAME --host 0.0.0.0
# Without gigabytes for GPUs: --build-arg TORCH_INDEX=an index of torch's builds for CPUs
FROM python:3.11 AS wheel
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY pastalm ./pastalm
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
ARG TORCH_INDEX=
ENV PASTALM_CACHE=/cache HF_HOME=/cache/huggingface PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
COPY --from=wheel /wheels /wheels
RUN pip install "$(ls /wheels/*.whl)[server]" -c constraints.txt && pasta pull && useradd --create-home pasta && chown -R pasta /cache
USER pasta
WORKDIR /home/pasta
EXPOSE 8000
HEALTHCHECK CMD python -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"
ENTRYPOINT ["pasta"]
CMD ["serve", "smollm2-135m-instruct", "--host", "0.0.0.0"]
