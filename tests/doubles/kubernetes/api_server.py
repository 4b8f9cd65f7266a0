"""The API server of the double: HTTPS, bearer tokens, and every request and response validated against OpenAPI."""

import base64
import contextlib
import datetime
import ipaddress
import json
import re
import ssl
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from doubles.kubernetes.cluster import KubernetesCluster
from doubles.kubernetes.schemas import validate, validate_job

NAMESPACE, SERVER_TOKEN = "sandbox", "server-token"
_NAMESPACED = rf"/namespaces/{NAMESPACE}"
_PAGE_ITEMS = 2
"""A page has at most this many items, so that the tests cover several pages."""


class RefusedError(Exception):
    """A response with an error."""

    def __init__(self, code, reason, message):
        super().__init__(message)
        self.code, self.reason = code, reason


class CannedResponse:
    """A response that replaces the real one. headers: a list of pairs. delay_seconds: the time before it is sent."""

    def __init__(self, code=200, body=b"", headers=(), delay_seconds=0.0, is_performed=False):
        self.code, self.body, self.headers, self.delay_seconds = code, body, headers, delay_seconds
        self.is_performed = is_performed


def create_certificate(directory):
    """Create a self-signed certificate for 127.0.0.1; return the file of the certificate and that of the key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )
    files = directory / "ca.crt", directory / "server.key"
    files[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


class KubernetesApi:
    """Serves the objects of a `KubernetesCluster`.

    canned: responses, keyed by regular expressions for the method and the path; each is used once.
    denied: pairs of a verb and a resource that the server may not use.
    requests: the requests so far. errors: the violations that the double found; `close` checks that there are none.
    """

    def __init__(self, directory):
        directory.mkdir(exist_ok=True)
        self.cluster = KubernetesCluster()
        self.canned, self.denied, self.requests, self.errors = {}, set(), [], []
        self.tokens, self.server_tokens = {}, {SERVER_TOKEN}
        self.namespaces, self.accounts = {NAMESPACE}, {"sandbox-worker"}
        self.ca_file, key_file = create_certificate(directory)
        self.token_file = directory / "token"
        self.token_file.write_text(SERVER_TOKEN + "\n")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.ca_file, key_file)
        self._http = _Server(("127.0.0.1", 0), _handler(self), tls)
        self.url = f"https://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self):
        """Stop everything, and check that all requests were valid."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)
        self.cluster.close()
        assert self.errors == []

    def issue_token(self, pod, audience, account="sandbox-worker", **extra):
        """Return a token that is bound to a Pod, as its node gets it for a projected volume."""
        claims = {"sub": f"system:serviceaccount:{NAMESPACE}:{account}", "aud": [audience], "jti": str(uuid.uuid4())}
        parts = ({"alg": "RS256"}, claims, pod["metadata"]["uid"])
        token = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
        prefix = "authentication.kubernetes.io"
        uid, name = pod["metadata"]["uid"], pod["metadata"]["name"]
        facts = {f"{prefix}/pod-name": [name], f"{prefix}/pod-uid": [uid], **extra}
        self.tokens[token] = (claims["sub"], audience, facts)
        return token

    def respond(self, method, url, body, headers):
        """Return the code and the body of the response."""
        if headers.get("Authorization", "") not in {f"Bearer {token}" for token in self.server_tokens}:
            raise RefusedError(401, "Unauthorized", "Unauthorized")
        path, query = urlsplit(url).path, {key: values[0] for key, values in parse_qs(urlsplit(url).query).items()}
        for (route_method, pattern), handle in _ROUTES.items():
            if method == route_method and (found := re.fullmatch(pattern, path)):
                with self.cluster.lock:
                    return handle(self, *found.groups(), query=query, body=body, headers=headers)
        raise RefusedError(404, "NotFound", "the server could not find the requested resource")

    def check_allowed(self, verb, resource):
        if (verb, resource) in self.denied:
            message = f'{resource} is forbidden: User "server" cannot {verb} resource "{resource}"'
            raise RefusedError(403, "Forbidden", message)

    def _create_job(self, *, query, body, headers):
        self.check_allowed("create", "jobs")
        validate_job(body)
        name = body["metadata"]["name"]
        if NAMESPACE not in self.namespaces:
            raise RefusedError(404, "NotFound", f'namespaces "{NAMESPACE}" not found')
        if name in self.cluster.jobs:
            raise RefusedError(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
        return 201, self.cluster.create_job(body, NAMESPACE)

    def _get_job(self, name, *, query, body, headers):
        self.check_allowed("get", "jobs")
        return 200, self._find(self.cluster.jobs, "jobs.batch", name)

    def _list(self, resource, kind, objects, version, query):
        self.check_allowed("list", resource)
        selected = [each for each in objects.values() if _matches(each, query.get("labelSelector", ""))]
        start = int(query.get("continue", "0"))
        size = min(int(query.get("limit", "500")), _PAGE_ITEMS)
        rest = selected[start + size :]
        meta = {"resourceVersion": "1"}
        if rest:
            meta |= {"continue": str(start + size), "remainingItemCount": len(rest)}
        page = selected[start : start + size]
        return 200, {"apiVersion": version, "kind": kind, "metadata": meta, "items": page}

    def _list_jobs(self, *, query, body, headers):
        return self._list("jobs", "JobList", self.cluster.jobs, "batch/v1", query)

    def _list_pods(self, *, query, body, headers):
        return self._list("pods", "PodList", self.cluster.pods, "v1", query)

    def _list_nodes(self, *, query, body, headers):
        return self._list("nodes", "NodeList", self.cluster.nodes, "v1", query)

    def _patch_job(self, name, *, query, body, headers):
        self.check_allowed("patch", "jobs")
        return self._patch(self._find(self.cluster.jobs, "jobs.batch", name), body, headers, 0)

    def _patch_pod(self, name, *, query, body, headers):
        self.check_allowed("patch", "pods")
        return self._patch(self._find(self.cluster.pods, "pods", name), body, headers, 1)

    def _patch(self, target, body, headers, seconds_min):
        """Apply a merge patch. Only the deadline may be changed, and that of a Pod only to a lower value."""
        assert headers["Content-Type"] == "application/merge-patch+json"
        uid = body.get("metadata", {}).get("uid", target["metadata"]["uid"])
        if uid != target["metadata"]["uid"]:
            raise RefusedError(409, "Conflict", "Precondition failed: UID in precondition is another one")
        assert list(body["spec"]) == ["activeDeadlineSeconds"]
        seconds = body["spec"]["activeDeadlineSeconds"]
        if seconds < seconds_min or seconds > target["spec"].get("activeDeadlineSeconds", seconds):
            raise RefusedError(422, "Invalid", "spec.activeDeadlineSeconds: Invalid value")
        target["spec"]["activeDeadlineSeconds"] = seconds
        return 200, target

    def _find(self, objects, resource, name):
        if name not in objects:
            raise RefusedError(404, "NotFound", f'{resource} "{name}" not found')
        return objects[name]

    def _review_token(self, *, query, body, headers):
        self.check_allowed("create", "tokenreviews")
        validate(body)
        user, audience, extra = self.tokens.get(body["spec"]["token"], ("", None, {}))
        status = {"authenticated": False, "error": "[invalid bearer token]", "user": {}}
        if audience in body["spec"]["audiences"]:
            status = {"authenticated": True, "audiences": [audience], "user": {"username": user, "extra": extra}}
        # The API server returns the specification, with the token.
        return 201, {**body, "status": status, "metadata": {}}

    def _review_access(self, *, query, body, headers):
        validate(body)
        attributes = body["spec"]["resourceAttributes"]
        is_allowed = (attributes["verb"], attributes["resource"]) not in self.denied
        return 201, {**body, "status": {"allowed": is_allowed}, "metadata": {}}

    def _get_namespace(self, name, *, query, body, headers):
        if name not in self.namespaces:
            raise RefusedError(404, "NotFound", f'namespaces "{name}" not found')
        return 200, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}

    def _get_account(self, name, *, query, body, headers):
        if name not in self.accounts:
            raise RefusedError(404, "NotFound", f'serviceaccounts "{name}" not found')
        return 200, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}

    def _version(self, *, query, body, headers):
        return 200, {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}


_JOBS, _PODS = f"/apis/batch/v1{_NAMESPACED}/jobs", f"/api/v1{_NAMESPACED}/pods"
_ROUTES = {
    ("POST", _JOBS): KubernetesApi._create_job,
    ("GET", _JOBS): KubernetesApi._list_jobs,
    ("GET", f"{_JOBS}/([a-z0-9-]+)"): KubernetesApi._get_job,
    ("PATCH", f"{_JOBS}/([a-z0-9-]+)"): KubernetesApi._patch_job,
    ("GET", _PODS): KubernetesApi._list_pods,
    ("PATCH", f"{_PODS}/([a-z0-9-]+)"): KubernetesApi._patch_pod,
    ("GET", "/api/v1/nodes"): KubernetesApi._list_nodes,
    ("POST", "/apis/authentication.k8s.io/v1/tokenreviews"): KubernetesApi._review_token,
    ("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"): KubernetesApi._review_access,
    ("GET", "/api/v1/namespaces/([a-z0-9-]+)"): KubernetesApi._get_namespace,
    ("GET", f"/api/v1{_NAMESPACED}/serviceaccounts/([a-z0-9-]+)"): KubernetesApi._get_account,
    ("GET", "/version"): KubernetesApi._version,
}


def _matches(each, selector):
    pairs = (term.split("=", 1) for term in selector.split(",") if term)
    return all(each["metadata"]["labels"].get(name) == value for name, value in pairs)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address, handler, tls):
        super().__init__(address, handler)
        self._tls = tls

    def finish_request(self, request, client_address):
        """Perform the TLS handshake in the thread of the connection."""
        request.settimeout(30)
        with contextlib.suppress(OSError), self._tls.wrap_socket(request, server_side=True) as connection:
            super().finish_request(connection, client_address)

    def handle_error(self, request, client_address):
        """Clients that close a connection early are part of the tests."""


def _handler(api):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def _serve(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            api.requests.append(f"{self.command} {self.path}")
            canned = _take_canned(api, f"{self.command} {urlsplit(self.path).path}")
            code, content = (0, b"") if canned and not canned.is_performed else self._perform(body)
            headers = [("Content-Type", "application/json")]
            if canned is not None:
                time.sleep(canned.delay_seconds)
                code, content, headers = canned.code, canned.body, [*canned.headers]
            self.send_response(code)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _perform(self, body):
            try:
                code, answer = api.respond(self.command, self.path, json.loads(body or b"null"), self.headers)
                with api.cluster.lock:
                    if "kind" in answer:
                        validate(answer)
                    return code, json.dumps(answer).encode()
            except RefusedError as error:
                code = error.code
                answer = {"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure"}
                answer |= {"code": code, "reason": error.reason, "message": str(error)}
                validate(answer)
            except Exception as error:
                api.errors.append(f"{self.command} {self.path}: {error!r}")
                code, answer = 500, {"kind": "Status", "message": repr(error)[:1000]}
            return code, json.dumps(answer).encode()

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _serve  # noqa: N815

    return Handler


def _take_canned(api, request):
    for pattern, responses in api.canned.items():
        if responses and re.fullmatch(pattern, request):
            return responses.pop(0)
    return None
