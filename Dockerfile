FROM python:3.13-slim

# With --build-arg STORE=yes it can do --store, which needs a library.
ARG STORE
RUN [ -z "$STORE" ] || pip install --no-cache-dir 'redis>=8.1,<9'
# The server is one file, and one more for --store; it writes nothing, so the root file system may be read-only.
COPY --chmod=0444 p2pserver.py redis_registry.py /
ENV PYTHONDONTWRITEBYTECODE=1
USER 65534:65534
EXPOSE 8000/tcp 8000/udp

HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('P2P_PORT') or os.environ.get('PORT') or 8000), timeout=4); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]

ENTRYPOINT ["python", "/p2pserver.py"]
