"""Routes for browser sessions: a token is exchanged for a cookie."""

from fastapi import Request
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.app_context import ContextDep
from sandbox.api.auth.credentials import session_cookie
from sandbox.api.auth.sessions import SESSION_COOKIE, SESSION_SECONDS
from sandbox.api.json_responses import JsonResponse
from sandbox.api.middleware.authentication import get_caller
from sandbox.api.route_declarations import create_router, problem_responses
from sandbox.model.wire.server_bodies import SessionBody

router = create_router("Sessions")


@router.post(paths.SESSION, responses=problem_responses())
async def open_session(request: Request, context: ContextDep) -> JsonResponse[SessionBody]:
    """Start a session: exchange the request's token for a cookie. Not needed on a server without tokens."""
    caller = get_caller(request)
    assert caller.principal is not None
    principal = caller.principal
    response = JsonResponse[SessionBody]({"role": principal.role.value, "name": principal.name})
    if caller.credentials is not None and caller.credentials.kind == "token":
        response.set_cookie(
            SESSION_COOKIE,
            context.admission.sessions.open(principal.id),
            max_age=SESSION_SECONDS,
            secure=_is_encrypted(request),
            httponly=True,
            samesite="strict",
        )
    return response


@router.delete(
    paths.SESSION,
    status_code=204,
    response_class=Response,
    responses={204: {"description": "The session is closed"}, **problem_responses()},
)
async def close_session(request: Request, context: ContextDep) -> Response:
    """End the session of this request's cookie."""
    if cookie := session_cookie(request):
        context.admission.sessions.close(cookie)
    response = Response(status_code=204)
    response.delete_cookie(SESSION_COOKIE, secure=_is_encrypted(request), httponly=True, samesite="strict")
    return response


def _is_encrypted(request: Request) -> bool:
    """Return whether the browser's connection is encrypted. If a proxy terminates TLS, `Origin` contains the scheme."""
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
