# docker build -t llmproxy .
# docker run -v $PWD/conf:/etc/llmproxy:ro -v llmproxy:/var/lib/llmproxy -p 8080:8080 llmproxy
FROM python:3.13-slim AS build
WORKDIR /src
COPY deploy/requirements.lock ./
# Without an installer of its own: the base image's one works on it.
RUN python -m venv --without-pip /opt/llmproxy
RUN python -m pip --python /opt/llmproxy/bin/python install --no-cache-dir --require-hashes --only-binary :all: -r requirements.lock
COPY LICENSE README.md pyproject.toml setup.cfg ./
COPY llmproxy llmproxy
COPY twisted twisted
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir dist .
RUN python -m pip --python /opt/llmproxy/bin/python install --no-deps --no-index dist/llmproxy-*.whl
# Twisted keeps a list of its plugins in its own folder, where the service's user can't write.
RUN /opt/llmproxy/bin/twistd --help | grep llmproxy

FROM python:3.13-slim
COPY --from=build /opt/llmproxy /opt/llmproxy
# A number, so that Kubernetes' runAsNonRoot can tell that it is not root's.
RUN install -d -m 0750 -o 10001 -g 10001 /var/lib/llmproxy && install -d /etc/llmproxy
ENV PATH=/opt/llmproxy/bin:$PATH PYTHONUNBUFFERED=1 LLMPROXY_CONFIG=/etc/llmproxy/config.toml
WORKDIR /var/lib/llmproxy
USER 10001:10001
VOLUME /var/lib/llmproxy
EXPOSE 8080
# The process is python itself: SIGTERM drains it, SIGHUP makes it read its backends again.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8081/healthz', timeout=3)"]
ENTRYPOINT ["python", "-m", "llmproxy"]
