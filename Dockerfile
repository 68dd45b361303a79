FROM python:3.13-slim

# With --build-arg STORE=yes it can do --store, which needs a library.
ARG STORE
RUN [ -z "$STORE" ] || pip install --no-cache-dir 'redis>=8.1,<9'
# The one file, and for --store another, is all there is; it writes nothing, so the root file system may be read-only. Everybody may read it,
# whatever its mode is outside.
# A step of its own: COPY --chmod takes BuildKit, which docker.io of Debian does not have.
COPY p2pserver.py /p2pserver.py
RUN chmod 0444 /p2pserver.py
COPY redis_registry.py /redis_registry.py
RUN chmod 0444 /redis_registry.py
ENV PYTHONDONTWRITEBYTECODE=1
USER 65534:65534
EXPOSE 8000/tcp 8000/udp 8001/udp

# It asks the address, port and protocol that the environment says, and for itself it need not verify the certificate.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["python", "-c", "import http.client as h, os, ssl; v = os.environ.get; port = int(next(filter(str.isdigit, (v('P2P_PORT', ''), v('PORT', ''), '8000')))); tls = {'context': ssl._create_unverified_context()} if v('P2P_TLS_CERT') else {}; c = (h.HTTPSConnection if tls else h.HTTPConnection)(v('P2P_HOST') or 'localhost', port, timeout=4, **tls); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]

ENTRYPOINT ["python", "/p2pserver.py"]
