"""The page for a new task in a real browser: the form and the YAML stay in sync."""

import pytest

from doubles.browser import HEIGHT, accessibility_violations
from doubles.deployment import FINAL_STATES, Deployment, wait_until
from doubles.manifests import NAMES_BY_PROMPT
from doubles.stored_tasks import StoredTasks
from sandbox.model.failure import Failure, FailureCode

QUICK_REFERENCE_AUDIT = """# An audit
version: "1"
kind: Task
metadata:
  name: "Security Audit"
repository:
  url: "https://github.com/org/app.git"
  branch: "production"
claude:
  prompt: |
    Perform security audit:
    1. Run static analysis
    2. Check dependencies
    3. Generate report
  allowed_tools: ["Read", "Bash", "Grep", "Write"]
vm:
  network_mode: "isolated"  # No network for security
lifecycle:
  timeout: "8h"
  artifact_patterns: ["security-report.md"]
"""
FAILED_REPOSITORY = {"url": "https://github.com/org/app.git", "branch": "main"}
HOSTILE = "<img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def submit_server(tmp_path_factory):
    """A server with completed tasks for two repositories, and failed ones. New tasks cannot complete."""
    deployment = Deployment(tmp_path_factory.mktemp("submit"))
    try:
        tasks = StoredTasks(deployment.data_dir)
        for number, (name, branch) in enumerate([("web", "main"), ("app", "release-2"), ("app", "main")]):
            tasks.add_completed_task(
                f"task-{number}", repository={"url": f"https://github.com/org/{name}.git", "branch": branch}
            )
        for task_id, code, message in (
            ("slow", FailureCode.TIMEOUT, "The agent was still working after 24h; raise lifecycle.timeout."),
            (
                "silent",
                FailureCode.HANG,
                "The agent produced no output for 30m; raise lifecycle.hang_timeout or retry.",
            ),
        ):
            tasks.add_failed_task(task_id, Failure(code, message), repository=FAILED_REPOSITORY)
        tasks.index()
        deployment.model_url = "http://127.0.0.1:9"
        (deployment.home / ".gitconfig").write_text(
            f'[url "{deployment.model_url}/"]\n\tinsteadOf = https://github.com/\n'
        )
        deployment.start_server()
        yield deployment
    finally:
        deployment.close()


@pytest.fixture
def base_url(submit_server, browser):
    """The server's URL. After the test, the fixture fails on console errors or requests to other hosts."""
    address = submit_server.server.ready_message["http"]
    yield address
    browser.ignore_errors("status of 400")  # the result of a validation
    browser.assert_no_errors(address)
    # Until its clone has failed, the branch of a submitted task is suggested.
    wait_until(lambda: are_tasks_finished(submit_server), 60, "the end of the submitted tasks")


def are_tasks_finished(deployment):
    tasks = deployment.http.get("/api/v1/tasks", params={"limit": 100}).json()["tasks"]
    return all(task["state"] in FINAL_STATES for task in tasks)


def yaml_of(page):
    return page.locator("#manifest").input_value()


def open_yaml(page, text):
    page.get_by_role("tab", name="YAML").click()
    page.get_by_label("Manifest, YAML").fill(text)
    page.get_by_role("tab", name="Form").click()


def open_advanced(page):
    page.locator("#advanced > summary").press("Enter")
    page.locator("#cpus").wait_for()


def test_task_is_submitted_from_prompt_and_recent_repository(submit_server, base_url, browser):
    page = browser.open(f"{base_url}/submit")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.get_by_text("Describe the task and choose a repository.").wait_for()
    assert page.locator(".field-error").count() == 0, "empty fields are not errors until the user has filled them in"
    assert page.locator("#repositories option").evaluate_all("all => all.map((one) => one.value)") == [
        "https://github.com/org/app.git",
        "https://github.com/org/web.git",
    ]
    page.keyboard.type("## Fix the login\n\nIt fails for names with a #.")
    page.get_by_role("button", name="org/web@main").click()
    page.get_by_text("Ready to submit.").wait_for()
    page.get_by_role("button", name="Submit task").click()
    page.wait_for_url("**/tasks/*")
    task = submit_server.http.get(f"/api/v1{page.url.removeprefix(base_url)}").json()
    definition = task["definition"]
    assert task["name"] == "Fix the login"
    assert definition["repository"] == {**definition["repository"], "url": "https://github.com/org/web.git"}
    assert definition["claude"]["prompt"] == "## Fix the login\n\nIt fails for names with a #."
    page.goto(f"{base_url}/submit")
    assert page.get_by_label("Prompt", exact=True).input_value() == ""


def test_form_starts_with_the_repository_of_the_last_submitted_task(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    page.keyboard.type("Fix the login")
    page.get_by_label("Repository", exact=True).fill("org/app")
    page.get_by_label("Branch", exact=True).fill("release-2")
    page.get_by_role("button", name="Submit task").click()
    page.wait_for_url("**/tasks/*")
    page.goto(f"{base_url}/submit")
    page.get_by_text("Describe the task.", exact=True).wait_for()
    fields = {name: page.get_by_label(name, exact=True) for name in ("Prompt", "Repository", "Branch")}
    assert [field.input_value() for field in fields.values()] == ["", "https://github.com/org/app.git", "release-2"]
    assert page.locator(".field-error").count() == 0
    assert page.locator("#draft").is_hidden()
    page.evaluate("""localStorage["sandbox.repository"] = '{"url": "https://github.com/org/gone", "branch": "x"}'""")
    page.reload()
    page.get_by_text("Describe the task and choose a repository.").wait_for()
    assert [field.input_value() for field in fields.values()] == ["", "", "main"]


def test_branches_of_the_chosen_repository_are_suggested(base_url, browser):
    page = browser.open(f"{base_url}/submit")

    def suggested():
        return page.locator("#branches option").evaluate_all("all => all.map((one) => one.value)")

    assert suggested() == []
    page.get_by_role("combobox", name="Repository").fill("org/app")
    assert suggested() == ["main", "release-2"]
    page.get_by_role("button", name="org/web@main").click()
    assert suggested() == ["main"]
    page.get_by_role("combobox", name="Repository").fill("https://github.com/org/other")
    assert suggested() == []
    page.get_by_role("combobox", name="Repository").fill("https://GitHub.com/org/app.git//")
    assert suggested() == ["main", "release-2"]


def test_long_repository_url_does_not_block_the_page(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    page.evaluate("""
        () => {
            let last = performance.now();
            window.longestSeconds = 0;
            setInterval(() => {
                const now = performance.now();
                window.longestSeconds = Math.max(window.longestSeconds, (now - last) / 1000);
                last = now;
            }, 20);
        }
    """)
    page.get_by_role("combobox", name="Repository").fill("https://a/" + "/" * 90_000 + "x")
    page.wait_for_function("document.querySelector('#manifest').value.length > 90000")
    page.evaluate("() => new Promise((done) => setTimeout(done, 100))")
    assert page.evaluate("window.longestSeconds") < 4


def test_form_and_yaml_stay_in_sync_and_comments_survive(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    open_yaml(page, QUICK_REFERENCE_AUDIT)
    open_advanced(page)
    shown = {
        name: page.locator(f"#{name}").input_value() for name in ("branch", "name", "timeout", "artifact-patterns")
    }
    assert shown == {
        "branch": "production",
        "name": "Security Audit",
        "timeout": "8h",
        "artifact-patterns": "security-report.md",
    }
    assert page.get_by_label("Prompt", exact=True).input_value().startswith("Perform security audit:\n1. Run")
    assert "claude.allowed_tools" in page.locator("#form-others").inner_text()

    page.get_by_label("Branch", exact=True).fill("main")
    page.get_by_label("CPUs", exact=True).fill("8")
    page.get_by_label("Network access", exact=True).select_option("outbound")
    page.get_by_label("Timeout", exact=True).fill("")
    expected = (
        QUICK_REFERENCE_AUDIT.replace('"production"', '"main"')
        .replace('"isolated"', '"outbound"')
        .replace('  timeout: "8h"\n', "")
        .replace("No network for security\n", "No network for security\n  cpus: 8\n")
    )
    assert yaml_of(page) == expected
    page.get_by_label("Allowed hosts", exact=True).fill("api.github.com\n\nexample.org")
    page.get_by_label("Labels", exact=True).fill("team=platform\nnote=a=b")
    page.get_by_label("Prompt", exact=True).fill("Only\n  this: #1")
    page.get_by_text("Ready to submit.").wait_for()
    definition = page.evaluate(
        """async (body) => (await (await fetch("/api/v1/tasks?dry_run=true",
        { method: "POST", headers: { "content-type": "application/yaml" }, body })).json()).definition""",
        yaml_of(page),
    )
    assert definition["vm"]["allowed_hosts"] == ["api.github.com", "example.org"]
    assert "  labels:\n    team: platform\n    note: a=b\n" in yaml_of(page)
    assert definition["claude"]["prompt"] == "Only\n  this: #1"
    assert definition["claude"]["allowed_tools"] == ["Read", "Bash", "Grep", "Write"]
    assert [comment in yaml_of(page) for comment in ("# An audit", "# No network for security")] == [True, True]


def test_form_offers_an_interactive_session(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    open_yaml(page, QUICK_REFERENCE_AUDIT)
    open_advanced(page)
    session = page.get_by_label("Session", exact=True)
    written = {}
    for value in ("false", "true", ""):
        session.select_option(value)
        written[value] = [line.strip() for line in yaml_of(page).splitlines() if "headless" in line]
    assert written == {"false": ["headless: false"], "true": ["headless: true"], "": []}
    open_yaml(page, QUICK_REFERENCE_AUDIT.replace("claude:\n", "claude:\n  headless: false\n"))
    page.locator("#tab-form").click()
    assert session.input_value() == "false"
    assert "headless" not in page.locator("#form-others").inner_text()
    page.get_by_text("Ready to submit.").wait_for()


def test_typed_text_reaches_the_server_unchanged(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    texts = [
        *(
            "- a",
            "# c",
            "a: b",
            "null",
            "~",
            "true",
            "12",
            "2.50",
            "@x",
            "%x",
            "---",
            "'",
            '"',
            "\\",
            "{{x}}",
            "[a",
            "é😀",
        ),
        *(
            " lead",
            "trail ",
            "tab\there",
            "a\nb",
            "a\n\n  b\n",
            "  two\n one",
            "a\n\n\n",
            "---\n...",
            "\n a",
            "# c\n- a: b",
            "`$(x)`",
        ),
    ]
    script = """async ([text, prompts]) => {
        const { ManifestDocument } = await import("/assets/manifest_document.js");
        const read = [];
        let body = text;
        for (const prompt of prompts) {
            body = new ManifestDocument(body).set(["claude", "prompt"], prompt);
            const headers = { "content-type": "application/yaml" };
            const response = await fetch("/api/v1/tasks?dry_run=true", { method: "POST", headers, body });
            read.push((await response.json()).definition?.claude.prompt);
        }
        return [read, body];
    }"""
    read, body = page.evaluate(script, [QUICK_REFERENCE_AUDIT, texts])
    assert read == texts
    assert body.partition("claude:")[0] == QUICK_REFERENCE_AUDIT.partition("claude:")[0]
    assert "allowed_tools" + body.partition("allowed_tools")[2] in QUICK_REFERENCE_AUDIT


def test_secrets_are_references_and_are_edited_as_rows(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    open_yaml(page, QUICK_REFERENCE_AUDIT)
    open_advanced(page)
    for name in ("FIRST", "SECOND"):
        page.get_by_role("button", name="Add a secret").click()
        row = page.locator(".secret").last
        row.get_by_placeholder("Variable").fill(name)
        row.get_by_placeholder("Key in the source").fill(f"KEY_{name}")
    page.get_by_label("Source of secret 2", exact=True).select_option("vault")
    page.get_by_role("button", name="Remove secret 1").click()
    assert yaml_of(page).endswith('secrets:\n  - name: "SECOND"\n    source: vault\n    key: "KEY_SECOND"\n')
    page.get_by_label("Variable of secret 1", exact=True).fill("not a name")
    page.locator(".secret .field-error").wait_for()
    assert page.get_by_label("Variable of secret 1", exact=True).get_attribute("aria-invalid") == "true"
    page.get_by_role("button", name="Remove secret 1").click()
    assert "secrets" not in yaml_of(page)


def test_errors_are_shown_next_to_the_fields(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    open_yaml(page, QUICK_REFERENCE_AUDIT)
    open_advanced(page)
    page.get_by_label("CPUs", exact=True).fill("many")
    page.get_by_label("Memory", exact=True).fill("8X")
    page.get_by_text("2 errors").wait_for()
    for label in ("CPUs", "Memory"):
        field = page.get_by_label(label, exact=True)
        assert field.get_attribute("aria-invalid") == "true"
        assert page.locator(f"#{field.get_attribute('aria-describedby')}").is_visible()
    page.locator("#advanced > summary").click()
    page.get_by_role("button", name="Submit task").click()
    wait_until(
        lambda: page.evaluate("document.activeElement.id") in {"cpus", "memory"},
        20,
        "the focus in a field with an error",
    )
    page.get_by_label("CPUs", exact=True).fill("4")
    page.get_by_label("Memory", exact=True).fill("")
    page.get_by_text("Ready to submit.").wait_for()
    assert page.locator(".field-error").count() == 0


@pytest.mark.parametrize("width", [1440, 390])
def test_error_is_not_covered_by_the_bar_at_the_bottom(base_url, browser, width):
    page = browser.open(f"{base_url}/submit", width=width)
    open_yaml(page, QUICK_REFERENCE_AUDIT)
    open_advanced(page)
    for name in ("cpus", "timeout", "budget-usd"):
        field = page.locator(f"#{name}")
        field.fill("?")
        page.get_by_role("button", name="1 error").wait_for()
        page.evaluate("scrollTo(0, 0)")
        page.get_by_role("button", name="1 error").click()
        wait_until(lambda name=name: page.evaluate("document.activeElement.id") == name, 20, "the focused field")
        message = page.locator(".field-error").bounding_box()
        bar = page.locator(".submit-foot").bounding_box()
        assert message["y"] + message["height"] <= bar["y"], name
        field.fill("")
        page.get_by_text("Ready to submit.").wait_for()
    assert accessibility_violations(page) == []


def test_error_count_links_to_the_first_error(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    open_yaml(page, QUICK_REFERENCE_AUDIT.replace('"8h"', '"8x"').replace("production", "a..b"))
    page.get_by_role("button", name="2 errors").click()
    wait_until(lambda: page.evaluate("document.activeElement.id") == "branch", 20, "the field of the first error")
    assert accessibility_violations(page) == []
    page.get_by_role("tab", name="YAML").click()
    page.get_by_role("button", name="2 errors").click()
    wait_until(lambda: page.evaluate("document.activeElement.id") == "manifest", 20, "the text of the manifest")


def test_error_count_is_that_of_the_selected_tab(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    page.get_by_role("tab", name="YAML").click()
    page.get_by_label("Manifest, YAML").fill('version: "1"\nkind: Task\nclaude: {prompt: ""}\nvm: {cpus: 9999}\n')
    page.get_by_role("button", name="4 errors").wait_for()
    assert page.locator("#errors li").count() == 4
    page.get_by_role("tab", name="Form").click()
    page.get_by_role("button", name="1 error").wait_for()  # the other fields are empty, as in a new form
    assert page.locator("#errors li").all_inner_texts() == ["vm.cpus\nmust be at most 4096"]
    page.get_by_role("tab", name="YAML").click()
    page.get_by_role("button", name="4 errors").wait_for()


def test_link_to_the_schema_opens_the_schema_of_the_manifest(base_url, browser):
    page = browser.open(f"{base_url}/submit#yaml")
    page.get_by_role("link", name="the schema").click()
    schema = page.locator(".models article", has=page.get_by_text("Manifest", exact=True)).first
    schema.locator(".json-schema-2020-12-property").get_by_text("lifecycle", exact=True).first.wait_for()
    wait_until(lambda: 0 <= schema.bounding_box()["y"] < HEIGHT, 30, "the schema in the window")


@pytest.mark.parametrize(
    ("text", "note", "prompt_is_usable"),
    [
        ("a: [", "error in line 1", False),
        ("- a list\n", "not a mapping", False),
        ("x: &a 1\ny: *a\n", "anchors", False),
        ("vm: {cpus: 1, cpus: 2}\n", "same field twice", False),
        (QUICK_REFERENCE_AUDIT.replace("claude:", "other_agent:"), "section other_agent", False),
        (QUICK_REFERENCE_AUDIT + f"{HOSTILE}: 1\n", "", True),
        ("[" * 100_000, "error", False),
        ('vm: "text"\nclaude:\n  prompt: [1]\n', "", False),
        (f'claude:\n  prompt: "{"x" * 200_000}"\n', "too long", False),
    ],
    ids=[
        "invalid",
        "list",
        "anchors",
        "duplicate",
        "unknown_agent",
        "unknown_field",
        "deep",
        "other_types",
        "long",
    ],
)
def test_form_does_not_change_yaml_that_it_cannot_show(base_url, browser, text, note, prompt_is_usable):
    page = browser.open(f"{base_url}/submit")
    open_yaml(page, text)
    if note:
        page.locator("#form-note", has_text=note).wait_for()
    assert page.get_by_label("Prompt", exact=True).is_enabled() == prompt_is_usable
    assert yaml_of(page) == text
    assert page.evaluate("window.hacked") is None
    # The form can be used again as soon as the YAML is corrected.
    open_yaml(page, QUICK_REFERENCE_AUDIT)
    page.get_by_label("Prompt", exact=True).fill("Once more")
    assert "prompt: Once more" in yaml_of(page)


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("org/web", "https://github.com/org/web.git"),  # of a recent task
        ("web", "https://github.com/org/web.git"),
        ("acme/shop.js", "https://github.com/acme/shop.js"),
        ("https://example.org/acme/shop", "https://example.org/acme/shop"),
    ],
)
def test_short_name_of_a_repository_becomes_its_url(base_url, browser, typed, url):
    page = browser.open(f"{base_url}/submit")
    page.get_by_label("Prompt", exact=True).fill("Fix the login")
    field = page.get_by_label("Repository", exact=True)
    field.focus()
    page.keyboard.type(typed)
    assert field.input_value() == typed, "the text stays while the user types"
    page.get_by_text("Ready to submit.").wait_for()
    assert f'url: "{url}"' in yaml_of(page)
    field.blur()
    assert field.input_value() == url


def test_form_derives_the_same_names_from_prompts_as_the_server(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    script = "async (prompts) => prompts.map((await import('/assets/manifest_form.js')).nameOf)"
    assert page.evaluate(script, list(NAMES_BY_PROMPT)) == list(NAMES_BY_PROMPT.values())


def test_empty_form_has_no_error_for_the_name_and_focuses_the_prompt(base_url, browser):
    """The name comes from the prompt."""
    page = browser.open(f"{base_url}/submit")
    page.get_by_label("Repository", exact=True).focus()
    page.get_by_role("button", name="Submit task").click()
    page.get_by_text("2 errors", exact=True).wait_for()
    wait_until(lambda: page.evaluate("document.activeElement.id") == "prompt", 20, "the focus in the prompt")
    assert page.locator("#advanced").get_attribute("open") is None
    assert page.locator("#errors li").count() == 0


def test_empty_repository_is_reported_once(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    page.get_by_label("Prompt", exact=True).fill("Fix the login")
    page.get_by_role("button", name="Submit task").click()
    page.get_by_text("1 error", exact=True).wait_for()
    assert page.locator(".field-error").all_inner_texts() == ["Choose a repository."]
    assert page.locator("#errors li").count() == 0
    page.get_by_role("tab", name="YAML").click()
    items = page.locator("#errors li").all_inner_texts()
    assert len(items) == 1
    assert items[0].startswith("repository.url")
    assert "line " in items[0]
    page.get_by_role("tab", name="Form").click()
    page.get_by_label("Repository", exact=True).fill("no repository")
    page.locator(".field-error", has_text="Enter OWNER/NAME or a URL.").wait_for()
    page.get_by_label("Repository", exact=True).fill("ftp://example.org/shop")
    page.locator(".field-error", has_text="must be https://").wait_for()
    page.get_by_label("Prompt", exact=True).fill("")
    page.locator(".field-error", has_text="Describe the task.").wait_for()


def test_error_in_the_collapsed_part_of_the_form_is_listed(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    open_yaml(page, QUICK_REFERENCE_AUDIT.replace('"8h"', '"8x"'))
    page.locator("#errors li", has_text="lifecycle.timeout").wait_for()
    assert "line" not in page.locator("#errors li").inner_text()
    open_advanced(page)
    page.locator("#errors li").wait_for(state="detached")
    assert page.locator(".field-error").count() == 1


def test_typed_text_survives_a_reload(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    page.get_by_label("Prompt", exact=True).fill("Typed for long")
    page.reload()
    assert page.get_by_label("Prompt", exact=True).input_value() == "Typed for long"
    page.get_by_text("Your draft was restored.").wait_for()
    page.get_by_role("button", name="Discard it").click()
    assert page.get_by_label("Prompt", exact=True).input_value() == ""
    page.get_by_text("Describe the task").wait_for()
    page.reload()
    assert page.get_by_label("Prompt", exact=True).input_value() == ""


def test_template_changes_only_its_settings_and_can_be_undone(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    page.get_by_role("button", name="org/app@main").click()
    page.get_by_label("Prompt", exact=True).fill("Mine")
    open_advanced(page)
    page.get_by_label("Labels", exact=True).fill("team=web")
    page.get_by_label("CPUs", exact=True).fill("3")
    before = yaml_of(page)
    for template in ("Security audit", "Within a budget", "Bug fix with GitHub", "Large machine"):
        page.get_by_role("button", name=template).click()
        assert page.get_by_label("Prompt", exact=True).input_value() == "Mine"
        assert page.locator("#name").input_value() == "Mine"
        assert page.get_by_label("Labels", exact=True).input_value() == "team=web"
        assert page.get_by_label("Repository", exact=True).input_value() == "https://github.com/org/app.git"
        assert page.get_by_label("CPUs", exact=True).input_value() == ("16" if template == "Large machine" else "3")
        page.get_by_text("Ready to submit.").wait_for()
        page.get_by_role("button", name="Undo the template").click()
        assert yaml_of(page) == before
    # Templates can be combined. The template "Minimal" removes all settings.
    page.get_by_role("button", name="Bug fix with GitHub").click()
    page.get_by_role("button", name="Large machine").click()
    assert page.get_by_label("CPUs", exact=True).input_value() == "16"
    assert page.get_by_label("Variable of secret 1", exact=True).input_value() == "GITHUB_TOKEN"
    page.get_by_role("button", name="Minimal").click()
    page.get_by_text("Ready to submit.").wait_for()
    assert [name in yaml_of(page) for name in ("cpus", "secrets", "mcp_config")] == [False] * 3
    assert [text in yaml_of(page) for text in ("Mine", "team: web", "org/app.git")] == [True] * 3


def test_prompt_of_a_template_is_only_a_placeholder(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    page.get_by_role("button", name="org/app@main").click()
    prompt = page.get_by_label("Prompt", exact=True)
    for template, example in (
        ("Security audit", "Audit this"),
        ("Minimal", "Describe the work"),
        ("Bug fix", "Fix the"),
    ):
        page.get_by_role("button", name=template).click()
        assert prompt.input_value() == ""
        assert prompt.get_attribute("placeholder").startswith(example)
        page.get_by_text("Describe the task.", exact=True).wait_for()
    page.get_by_role("button", name="Submit task").click()
    page.locator("#panel-form .field-error").first.wait_for()
    assert "/submit" in page.url
    prompt.fill("Now it is described")
    assert page.locator("#name").input_value() == "Now it is described"
    page.get_by_text("Ready to submit.").wait_for()


def test_run_again_fills_the_form_with_the_manifest_of_the_task(base_url, browser):
    page = browser.open(f"{base_url}/submit?from=task-1")
    page.get_by_text("Ready to submit.").wait_for()
    assert page.get_by_label("Repository", exact=True).input_value() == "https://github.com/org/app.git"
    assert page.get_by_label("Prompt", exact=True).input_value()
    assert page.locator("[data-pattern]").count() == 0, "a template would change a manifest that is complete"
    name = page.locator("#name").input_value()
    page.get_by_label("Prompt", exact=True).fill("Another prompt")
    assert (name, page.locator("#name").input_value()) == (name, name)


def test_form_has_no_accessibility_violations(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    page.get_by_text("Describe the task").wait_for()
    assert accessibility_violations(page) == []
    open_advanced(page)
    page.get_by_role("button", name="Add a secret").click()
    page.get_by_role("button", name="Submit task").click()
    page.locator(".field-error").first.wait_for()
    assert accessibility_violations(page) == [], "with all fields and errors"
    page.get_by_role("tab", name="YAML").click()
    assert accessibility_violations(page) == [], "YAML"
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "tab-form"


def test_link_to_a_setting_opens_its_field(base_url, browser):
    page = browser.open(f"{base_url}/submit?from=slow&field=lifecycle.timeout")
    wait_until(lambda: page.evaluate("document.activeElement.id") == "timeout", 30, "the focused field")
    assert page.locator("#advanced").get_attribute("open") is not None
    assert page.locator("#timeout").input_value() == "48h"
    assert page.get_by_text("raised from 24h").is_visible()
    page.goto(f"{base_url}/submit?from=task-1&field=repository.branch")
    wait_until(lambda: page.evaluate("document.activeElement.id") == "branch", 30, "the focused field")
    assert page.locator("#advanced").get_attribute("open") is None
    page.goto(f"{base_url}/submit?from=task-1&field=unknown%22")
    page.locator("#validation-status.good").wait_for()
    assert page.evaluate("document.activeElement.id") == ""


def test_link_to_a_setting_that_the_form_lacks_opens_its_line_in_the_yaml(base_url, browser):
    page = browser.open(f"{base_url}/tasks/silent")
    page.get_by_role("link", name="Run again with more time").click()
    page.get_by_text("This form raises the hang timeout from 30m to 60m.").wait_for()
    wait_until(lambda: page.evaluate("document.activeElement.id") == "manifest", 30, "the focused editor")
    following = "document.activeElement.value.slice(document.activeElement.selectionStart)"
    assert page.evaluate(following).lstrip().startswith("hang_timeout: 60m\n")
    page.locator("#validation-status.good").wait_for()


def test_name_from_a_long_prompt_is_cut_at_a_word(base_url, browser):
    page = browser.open(f"{base_url}/submit")
    page.get_by_label("Prompt", exact=True).fill("word " * 40)
    wait_until(lambda: page.locator("#name").input_value() == "word " * 23 + "word…", 30, "the name")
