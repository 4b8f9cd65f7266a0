"""Routes for the OpenAPI schema and its documentation page; the page loads nothing from other hosts."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, Response

from sandbox.api import paths
from sandbox.api.authentication import get_caller
from sandbox.api.responses import JsonResponse
from sandbox.api.route_declarations import create_router

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "cache-control": "private, no-cache",
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "referrer-policy": "no-referrer",
}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sandbox API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="stylesheet" href="/docs/page.css">
</head>
<body>
<div id="page"{attributes}>
<noscript>This page needs JavaScript; <a href="/openapi.json">the schema</a> does not.</noscript>
</div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START_SCRIPT = """// A path must not be a link, because it is inside the button that opens the operation.
const plainPaths = ({ React }) => ({
  wrapComponents: { DeepLink: () => ({ text }) => React.createElement("span", null, text) },
});

const page = document.getElementById("page");
const isWithoutTokens = "noTokens" in page.dataset;

// The quick start in the schema is generic: it uses the default address and a token.
function forThisServer(text) {
  const described = text.replaceAll("http://localhost:8122", location.origin);
  if (!isWithoutTokens) return described;
  return described
    .replace(/, and a token .*?`Authorization` header/s, "")
    .replaceAll(/\\nTOKEN=…| -H "Authoriz.*?"/g, "");
}

const ownQuickStart = () => ({
  statePlugins: {
    spec: {
      wrapActions: {
        updateJsonSpec: (update) => (schema) =>
          update({ ...schema, info: { ...schema.info, description: forThisServer(schema.info.description) } }),
      },
    },
  },
});

const nothing = () => () => null;
const withoutAuthorization = () => ({
  wrapComponents: { AuthorizeBtnContainer: nothing, authorizeOperationBtn: nothing },
});

const ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#page",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  syntaxHighlight: false,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
  plugins: [plainPaths, ownQuickStart, ...(isWithoutTokens ? [withoutAuthorization] : [])],
});

// Swagger UI leaves some fields unlabeled, gives tables the region role, and makes examples unscrollable by keyboard.
const FIELDS = "#page :is(input, select, textarea, .copy-to-clipboard button)";
const SCROLLABLE = "#page :is(pre, .model-box, .table-container):not([tabindex])";

function nameOf(field) {
  if (field.tagName === "BUTTON") return "Copy";
  const parameter = field.closest("[data-param-name]")?.dataset.paramName;
  return parameter ?? (field.tagName === "TEXTAREA" ? "Request body" : "Value");
}

// In an empty field, show an example instead of the field's name.
function exampleOf(field) {
  const operationId = field.closest(".opblock").id.split("-").at(-1);
  const operations = Object.values(ui.getState().getIn(["spec", "json"]).toJS().paths).flatMap(Object.values);
  const { parameters = [] } = operations.find((operation) => operation.operationId === operationId) ?? {};
  const parameter = parameters.find(({ name }) => name === field.closest("[data-param-name]").dataset.paramName);
  const { examples, format } = parameter?.schema ?? {};
  return parameter?.example ?? examples?.[0] ?? (format === "date-time" ? "2026-01-29T10:10:15Z" : "");
}

function complete() {
  for (const field of document.querySelectorAll(FIELDS))
    if (!field.labels?.length && !field.ariaLabel) field.ariaLabel = nameOf(field);
  for (const field of document.querySelectorAll("#page [data-param-name] input[type=text]:not([data-example])")) {
    field.dataset.example = exampleOf(field);
    field.placeholder = field.dataset.example;
  }
  for (const element of document.querySelectorAll(SCROLLABLE)) element.tabIndex = 0;
  for (const table of document.querySelectorAll("#page table[role]")) table.removeAttribute("role");
}

new MutationObserver(complete).observe(page, { childList: true, subtree: true });
"""
_STYLE = """body { margin: 0; }
.swagger-ui .info { margin: 1.5rem 0; }
.swagger-ui .scheme-container { margin: 0 0 1rem; padding: 0 0 1rem; box-shadow: none; }
.swagger-ui :is(.info__license, .response-col_links, .servers-title, .servers) { display: none; }
.swagger-ui .parameters textarea { min-height: 5rem; }
.swagger-ui .curl { overflow-x: auto; }
@media (max-width: 640px) {
  .swagger-ui .wrapper { padding: 0 0.75rem; }
  .swagger-ui .opblock .opblock-section-header { padding: 0.5rem 0.75rem; }
  .swagger-ui .opblock-description-wrapper, .swagger-ui .responses-inner { padding: 0.75rem; }
  .swagger-ui .opblock-summary-method { min-width: 4rem; padding: 0.375rem 0; }
  .swagger-ui table.headers :is(tbody, tr, td) { display: block; padding: 0.125rem 0; }
  .swagger-ui table.headers thead { display: none; }
}
"""
_SWAGGER_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
}

_INLINE_ASSETS = {"start.js": (_START_SCRIPT, "text/javascript"), "page.css": (_STYLE, "text/css")}


router = create_router("Documentation")


@router.get(paths.SCHEMA, include_in_schema=False)
async def get_schema(request: Request) -> JsonResponse[dict[str, Any]]:
    """Return the OpenAPI schema."""
    return JsonResponse(request.app.openapi())


@router.get(paths.DOCS, include_in_schema=False)
async def get_docs(request: Request) -> HTMLResponse:
    """Return the documentation page."""
    requires_token = get_caller(request).credentials is not None
    return HTMLResponse(_PAGE.format(attributes="" if requires_token else " data-no-tokens"), headers=_HEADERS)


@router.get(f"{paths.DOCS}/{{name}}", include_in_schema=False)
async def get_asset(name: str) -> Response:
    """Return a file that the documentation page loads."""
    if name in _INLINE_ASSETS:
        text, media_type = _INLINE_ASSETS[name]
        return Response(text, headers=_HEADERS, media_type=media_type)
    if name not in _SWAGGER_ASSETS:
        raise HTTPException(404)
    return FileResponse(_asset_directory() / name, headers=_HEADERS, media_type=_SWAGGER_ASSETS[name])


def _asset_directory() -> Path:
    """Return the directory of Swagger UI in the fastapi-offline package, without importing the package."""
    spec = find_spec("fastapi_offline")
    if spec is None or not spec.submodule_search_locations:
        raise HTTPException(404)
    return Path(spec.submodule_search_locations[0]) / "static"
